"""What fine-tuning learns: the gradient that a computation by hand gives, nothing but what is meant to move,
and files that diffusers itself reads.

Trainings here last a few steps. `samples.png` is drawn for real in one test only, because it takes longer
than all of them."""
import dataclasses, json, math, os, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file

from diffda import finetune
from diffda.backbone import EMBEDDINGS, LORA, TOKENS, class_words, get_backbone
from diffda.core import DiffDAError, canonical
from diffda.data import get_split
from diffda.samples import Samples
from diffda.finetune import (DreamBoothLoRA, Latents, TextualInversion, add_lora, template_ids, cropped,
                             denoising, frozen, in_rounds, mirrored, placeholders, tune)
from diffda.generate import Prompts, SDEdit, generate_pool
from diffda.jobs import plan
from diffda.models import load_pipeline, open_pipeline
from diffda.settings import settled
from diffda.prompts import TEMPLATES
from diffda.torch_core import generator_for
from pools import LATENT, LEVELS, from_latents

NANO = get_backbone("nano")
WHERE = NANO.source
draw_samples = finetune.samples

def no_strip(*a, **k): return Image.new("RGB", (8, 8))

@pytest.fixture(autouse=True)
def no_samples(monkeypatch): monkeypatch.setattr(finetune, "samples", no_strip)

@pytest.fixture(scope="module")
def few():
    "Five classes, one image each."
    return get_split("nano-digits-1", 0)

def changed(split, **fields): return dataclasses.replace(split, **fields)
def learned(folder): return load_file(Path(folder)/EMBEDDINGS)
def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
def shapes(folder): return {word: tuple(rows.shape) for word, rows in learned(folder).items()}
def losses(folder): return pd.read_csv(folder/"loss.csv").loss

def train(part, split, folder, previous=None, seed=0):
    "The counts of a training with final settings."
    folder.mkdir(exist_ok=True)
    return settled(part, NANO, split.task).train(split, NANO, previous, folder, seed, progress=False)

TI, DB = TextualInversion(steps=3, batch_size=3), DreamBoothLoRA(steps=3, batch_size=3)
FAST_TI, FAST_DB = dataclasses.replace(TI, lr=.05), dataclasses.replace(DB, lr=.05)

@pytest.fixture(scope="module")
def words(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "samples", no_strip)
        counts = train(FAST_TI, few, folder)
    assert counts["steps"] == 3 and 0 < counts["last_loss"] < 3
    return folder

@pytest.fixture(scope="module")
def lora(few, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "samples", no_strip)
        train(FAST_DB, few, folder, words)
    return folder

# against a computation by hand

def parts_of_nano():
    "(autoencoder, network, text encoder, tokenizer) of the checkpoint, opened one by one."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    kinds = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel,
             "tokenizer": CLIPTokenizer}
    return [kind.from_pretrained(WHERE, subfolder=name) for name, kind in kinds.items()]

def kept_signal():
    "The share of signal (squared) that each of the 1000 time steps keeps."
    c = json.loads((Path(WHERE)/"scheduler"/"scheduler_config.json").read_text())
    roots = torch.linspace(c["beta_start"]**.5, c["beta_end"]**.5, 1000, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, 0)

def first_batch(split, seed, size):
    "(image, point, noise, time step, template) of each member of the first batch."
    n = len(split.train)
    order = sorted(range(n), key=lambda i: split.train.ids[i])
    shuffled = torch.randperm(n, generator=generator_for(seed, "words", "round", 0)).tolist()
    g = generator_for(seed, "words", 0)
    point, noise = torch.randn(size, *LATENT, generator=g), torch.randn(size, *LATENT, generator=g)
    # the view: there is only one
    torch.rand(size, generator=g)
    t, template = torch.randint(1000, (size,), generator=g), torch.randint(27, (size,), generator=g)
    return zip([order[k] for k in shuffled[:size]], point, noise, t, template)

def by_hand(split, seed, size):
    "(gradient of the new rows, their start, loss) after one pass with the checkpoint's parts."
    vae, unet, text, tokenizer = parts_of_nano()
    tokens = [f"<{n}>" for n in split.class_names]
    tokenizer.add_tokens(tokens)
    old = text.get_input_embeddings().weight.detach()
    start = old[tokenizer.convert_tokens_to_ids("the</w>")]
    table = torch.cat([old, start.expand(len(tokens), -1)]).clone().requires_grad_(True)
    text.get_input_embeddings().weight = torch.nn.Parameter(table.detach())
    kept, loss = kept_signal(), 0
    for i, point, noise, t, template in first_batch(split, seed, size):
        x = torch.from_numpy(np.asarray(split.train.read(i))/127.5 - 1).permute(2, 0, 1).float()[None]
        with torch.no_grad(): d = vae.encode(x).latent_dist
        z, a = (d.mean + d.std*point)*vae.config.scaling_factor, kept[t]
        noisy = (a.sqrt()*z + (1 - a).sqrt()*noise).float()
        caption = TEMPLATES[template].format(tokens[split.train.labels[i]])
        ids = tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
        hidden = torch.func.functional_call(text, {table_name(text): table}, (ids,))[0]
        # what the nano network tells: velocity
        velocity = (a.sqrt()*noise - (1 - a).sqrt()*z).float()
        loss = loss + ((unet(noisy, t, hidden).sample - velocity)**2).mean()/size
    loss.backward()
    # the other rows have a gradient too; it must not be used
    assert table.grad[:len(old)].abs().max() > 0
    return table.grad[len(old):], start, loss.item()

def table_name(text):
    table = text.get_input_embeddings().weight
    return next(name for name, p in text.named_parameters() if p is table)

def test_first_gradient_and_first_update(few, tmp_path, monkeypatch):
    seen, real = {}, finetune.resumable
    def spy(steps, step, state, path, **how):
        out = real(steps, step, state, path, **how)
        seen.update(state["optimizer"].state_dict()["state"][0])
        return out
    monkeypatch.setattr(finetune, "resumable", spy)
    train(TextualInversion(steps=1, batch_size=3, lr=.01), few, tmp_path, seed=4)
    grad, start, loss = by_hand(few, 4, 3)
    found = seen["exp_avg"]/(1 - .9)
    assert grad.abs().max() > 1e-6
    assert torch.allclose(found, grad, rtol=1e-3, atol=float(grad.abs().max())*1e-4)
    # three images of the batch, three of five words
    assert (grad.abs().sum(1) > 0).sum() == 3
    assert torch.allclose(seen["exp_avg_sq"]/(1 - .999), grad**2, rtol=2e-3, atol=float((grad**2).max())*1e-3)
    after = torch.cat([learned(tmp_path)[f"<{n}>"] for n in few.class_names])
    assert torch.allclose(after, start*(1 - .01*1e-2) - .01*found/(found.abs() + 1e-8), atol=1e-6)
    assert abs(losses(tmp_path)[0] - loss) < 1e-5

def test_a_lora_starts_from_the_network_as_it_was(few):
    pipe = frozen(NANO)
    x, t = torch.randn(2, *LATENT, generator=generator_for(0)), torch.tensor([3, 700])
    h = torch.randn(2, 32, 128, generator=generator_for(1))
    with torch.no_grad(): before = pipe.unet(x, t, h).sample
    weights = add_lora(pipe.unet, 4, 0)
    with torch.no_grad(): assert torch.equal(before, pipe.unet(x, t, h).sample)
    named = dict(pipe.unet.named_parameters())
    a, b = ([p for n, p in named.items() if k in n] for k in ("lora_A", "lora_B"))
    attentions = sum(n.endswith(("to_q.weight", "to_q.base_layer.weight")) for n in named)
    assert len(weights) == len(a) + len(b) and len(a) == len(b) == 4*attentions
    assert all((p == 0).all() for p in b) and all(p.shape[0] == 4 for p in a)
    assert .2 < torch.cat([p.flatten() for p in a]).std() < .3
    assert {n for n, p in named.items() if p.requires_grad} == {n for n in named if "lora_" in n}

def cropped_latents(pipe, split):
    return Latents(pipe, split.train, lambda image, sample_id: cropped(image, 32, 4, 2, sample_id), 32)

def test_first_loss_of_a_lora_is_that_of_the_words(few, words, tmp_path):
    "B is zero at the start, so the first loss is that of the network without LoRA."
    train(dataclasses.replace(DB, steps=1), few, tmp_path, words, seed=2)
    pipe = frozen(NANO, words)
    texts = template_ids(pipe, [f"<{n}>" for n in few.class_names])
    loss = denoising(pipe, cropped_latents(pipe, few), few.train, range(5), texts, 3, 2, "lora")
    with torch.no_grad(): assert abs(loss(0, [0, 1, 2]).mean().item() - losses(tmp_path)[0]) < 1e-6

# phrases

@pytest.fixture
def phrases(few, tmp_path):
    "A file of one phrase per image, and two for number 3."
    path = tmp_path/"phrases.json"
    said = [f"on red {k}" if k != 3 else ["on red checks", "against plain blue."] for k in range(5)]
    path.write_text(json.dumps(dict(zip(few.train.ids, said))))
    return path

def test_captions_that_say_more_about_their_image(few, words, phrases, tmp_path):
    "With phrases, the first loss of a LoRA is that of 'a photo of a <word>, <phrase>', computed by hand."
    part, pipe = dataclasses.replace(DB, steps=1, phrases=str(phrases)), frozen(NANO, words)
    names = [f"<{n}>" for n in few.class_names]
    texts, rows = part.captions(pipe, names, few)
    said = []
    for k, y in enumerate(few.train.labels):
        own = ("on red checks", "against plain blue") if k == 3 else (f"on red {k}", f"on red {k}")
        said += [f"a photo of a {names[y]}, {phrase}" for phrase in own]
    length = pipe.tokenizer.model_max_length
    how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = pipe.tokenizer(said, max_length=length, **how).input_ids
    assert list(rows) == list(range(5)) and torch.equal(texts.reshape(10, -1), ids)
    train(part, few, tmp_path/"a", words, seed=2)
    seen = {}
    def note(module, args, named, out): seen["ids"] = args[0] if args else named["input_ids"]
    hook = pipe.text_encoder.register_forward_hook(note, with_kwargs=True)
    loss = denoising(pipe, cropped_latents(pipe, few), few.train, range(5), texts, 3, 2, "lora", rows=rows)
    with torch.no_grad(): value = loss(0, [0, 1, 2]).mean().item()
    hook.remove()
    order = sorted(range(5), key=lambda i: few.train.ids[i])
    for own, k in zip(seen["ids"], in_rounds(5, 0, 3, 2, "lora")):
        i = order[k]
        assert any(torch.equal(own, ids[2*i + which]) for which in (0, 1))
    assert abs(value - losses(tmp_path/"a")[0]) < 1e-6

def test_phrases_and_keys(few, words, phrases, tmp_path):
    "Without phrases neither captions nor keys change; with them the key is that of the file."
    part, pipe = dataclasses.replace(DB, steps=1, phrases=str(phrases)), frozen(NANO, words)
    names = [f"<{n}>" for n in few.class_names]
    plain, rows = DB.captions(pipe, names, few)
    assert torch.equal(plain, template_ids(pipe, names)) and list(rows) == few.train.labels.tolist()
    assert "phrases" not in canonical(DB) and canonical(part)["phrases_key"]
    once = canonical(part)
    phrases.write_text(json.dumps({i: "other" for i in few.train.ids}))
    assert canonical(dataclasses.replace(DB, steps=1, phrases=str(phrases))) != once
    phrases.write_text("{}")
    with pytest.raises(DiffDAError, match="has no phrase for 5 of 5 training images"):
        train(dataclasses.replace(TI, phrases=str(phrases)), few, tmp_path/"b")
    with pytest.raises(DiffDAError, match="there is no file none.json"): TextualInversion(phrases="none.json")

@pytest.mark.parametrize("told", ["v_prediction", "epsilon"])
def test_the_target_is_what_the_checkpoint_predicts(few, told):
    "Velocity, as in the nano world, or noise."
    pipe = frozen(NANO)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.scheduler.register_to_config(prediction_type=told)
    latents = Latents(pipe, few.train, lambda im, sid: mirrored(im, 32, 0.), 32)
    loss = denoising(pipe, latents, few.train, range(5), template_ids(pipe, few.class_names), 1, 0, "v")
    seen = {}
    hook = pipe.unet.register_forward_hook(lambda m, i, o: seen.update(x=i[0], t=i[1], out=o.sample))
    with torch.no_grad(): value = loss(0, [0])
    hook.remove()
    g = generator_for(0, "v", 0)
    point, noise = torch.randn(1, *LATENT, generator=g), torch.randn(1, *LATENT, generator=g)
    i = sorted(range(5), key=lambda i: few.train.ids[i])[in_rounds(5, 0, 1, 0, "v")[0]]
    z = (latents.mean[i] + latents.std[i]*point)*pipe.vae.config.scaling_factor
    a = torch.cumprod(1 - torch.linspace(.00085**.5, .012**.5, 1000)**2, 0)[seen["t"]]
    assert torch.allclose(seen["x"], a.sqrt()*z + (1 - a).sqrt()*noise, atol=1e-4)
    target = noise if told == "epsilon" else a.sqrt()*noise - (1 - a).sqrt()*z
    assert abs(value.item() - ((seen["out"] - target)**2).mean().item()) < 1e-4

# nothing else moves

def trained_pipe(part, few, folder, monkeypatch):
    "The pipeline that `part` was trained with."
    kept, real = [], finetune.frozen
    def keeping(*a):
        kept.append(real(*a))
        return kept[-1]
    monkeypatch.setattr(finetune, "frozen", keeping)
    train(part, few, folder)
    return kept[0]

@pytest.mark.parametrize("part", [FAST_TI, FAST_DB], ids=["words", "lora"])
def test_nothing_else_moves(few, tmp_path, monkeypatch, part):
    pipe, before = trained_pipe(part, few, tmp_path, monkeypatch), open_pipeline(NANO, "cpu")
    for name in ("vae", "unet", "text_encoder"):
        old, state = getattr(before, name).state_dict(), getattr(pipe, name).state_dict()
        now = {k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k}
        # another module stands in the table's place
        there = {k for k in old if part is FAST_DB or not k.endswith("token_embedding.weight")}
        assert there <= set(now) and all(torch.equal(old[k], now[k]) for k in there), name

def test_no_other_word_moves(few, tmp_path, monkeypatch):
    pipe, before = trained_pipe(FAST_TI, few, tmp_path, monkeypatch), open_pipeline(NANO, "cpu")
    table = before.text_encoder.get_input_embeddings().weight
    assert torch.equal(pipe.text_encoder.get_input_embeddings().table, table)
    adapted = open_pipeline(NANO, "cpu", str(tmp_path))
    rows = adapted.text_encoder.get_input_embeddings().weight
    assert torch.equal(rows[:len(table)], table) and len(rows) == len(table) + 5
    start = table[adapted.tokenizer.convert_tokens_to_ids("the</w>")]
    for token, row in learned(tmp_path).items():
        assert row.dtype == torch.float32 and not torch.equal(row[0], start)
        assert torch.equal(rows[adapted.tokenizer.convert_tokens_to_ids(token)], row[0])

def test_global_random_state_and_the_pipeline_at_hand_are_left_alone(few, tmp_path, words, lora):
    shared, tokenizer = load_pipeline(NANO, "cpu"), parts_of_nano()[-1]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train(FAST_TI, few, tmp_path/"a")
    train(FAST_DB, few, tmp_path/"b", tmp_path/"a")
    assert torch.equal(before, torch.get_rng_state())
    assert files(tmp_path/"a") == files(words) and files(tmp_path/"b") == files(lora)
    assert shared is load_pipeline(NANO, "cpu") and len(shared.tokenizer) == len(tokenizer)
    assert not any("lora" in n for n, _ in shared.unet.named_parameters())

# what is written

def test_files(few, words, lora):
    assert set(files(words)) == {EMBEDDINGS, TOKENS, "loss.csv", "samples.png"}
    assert set(files(lora)) == set(files(words)) | {LORA}
    assert json.loads((words/TOKENS).read_text()) == {n: f"<{n}>" for n in few.class_names}
    assert shapes(words) == {f"<{n}>": (1, 128) for n in few.class_names}
    assert all(files(lora)[name] == files(words)[name] for name in (EMBEDDINGS, TOKENS))
    for folder in (words, lora):
        table = pd.read_csv(folder/"loss.csv")
        assert list(table.columns) == ["step", "loss"] and len(table) == 3
    assert all(k.startswith("unet.") for k in load_file(lora/LORA))

def test_samples_show_what_was_learned(few, words):
    one, again, other = (np.asarray(draw_samples(NANO, few, a, n=2)) for a in (words, words, None))
    assert one.shape == (32, 64, 3) and np.array_equal(one, again) and not np.array_equal(one, other)

def plain_pipe(folder, with_words, with_lora):
    "What diffusers itself makes of the files in `folder`."
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(WHERE)
    solver = {"algorithm_type": "dpmsolver++", "solver_order": 2}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **solver)
    pipe.set_progress_bar_config(disable=True)
    if with_words: pipe.load_textual_inversion([{t: v} for t, v in learned(folder).items()])
    if with_lora: pipe.load_lora_weights(str(folder))
    return pipe

@pytest.mark.parametrize("which", ["words", "lora", "both"])
def test_plain_diffusers_makes_the_same_images(few, words, lora, tmp_path, which):
    folder = {"words": words, "both": lora}.get(which) or tmp_path/"lora"
    if which == "lora": train(FAST_DB, few, folder)
    part = SDEdit(prompt="article", strength=.9, num_inference_steps=6, num_copies=1)
    pool = generate_pool(part, few, tmp_path/"pool", adaptation=str(folder))
    plain = generate_pool(part, few, tmp_path/"plain")
    pipe = plain_pipe(folder, which != "lora", which != "words")
    for i, r in enumerate(pool.rows.itertuples()):
        name = few.class_names[r.label]
        assert r.prompt == f"a photo of a {name if which == 'lora' else f'<{name}>'}"
        pixels = pipe.image_processor.preprocess(few.train.read(i))
        with torch.no_grad(): mode = pipe.vae.encode(pixels).latent_dist.mode()
        latent = mode*pipe.vae.config.scaling_factor
        image = from_latents(pipe, r.prompt, latent, strength=.9, num_inference_steps=6,
                             guidance_scale=r.guidance,
                             generator=generator_for(0, r.source_id, 0, "noise"))
        assert np.abs(np.asarray(image).astype(int) - np.asarray(pool.image(i))).max() <= LEVELS
    assert any(not np.array_equal(np.asarray(pool.image(i)), np.asarray(plain.image(i))) for i in range(5))

# how the work is cut up

ONE_BY_ONE = dataclasses.replace(FAST_TI, per_class=True, steps=2)

@pytest.mark.parametrize("part, at", [(ONE_BY_ONE, 5), (FAST_TI, 1), (FAST_DB, 2)],
                         ids=["words one by one", "words", "lora"])
def test_broken_off_and_taken_up_again(few, tmp_path, breaks_off, part, at):
    "An error in the middle of a step, and a second life: the files are those of an undisturbed run."
    train(part, few, tmp_path/"whole")
    calls = breaks_off(at)
    with pytest.raises(KeyboardInterrupt): train(part, few, tmp_path/"torn")
    assert not (tmp_path/"torn"/"loss.csv").exists() and list((tmp_path/"torn").glob("checkpoint*.pt"))
    done = len(calls) - 1
    train(part, few, tmp_path/"torn")
    total = part.steps*(5 if part is ONE_BY_ONE else 1)
    assert files(tmp_path/"torn") == files(tmp_path/"whole") and len(calls) == total + 1 and done == at

def close(folder, words):
    "Whether the words in two folders are the same but for rounding."
    expected = learned(words)
    return all(torch.allclose(rows, expected[word], atol=1e-4) for word, rows in learned(folder).items())

def test_pieces_of_a_batch_and_order_of_the_images_do_not_matter(few, tmp_path, monkeypatch, words):
    train(FAST_TI, changed(few, train=few.train.take([3, 1, 0, 4, 2])), tmp_path/"order")
    monkeypatch.setattr(finetune, "_at_once", lambda latents: 1)
    train(FAST_TI, few, tmp_path/"pieces")
    for other in ("order", "pieces"):
        assert close(tmp_path/other, words)
    train(FAST_TI, few, tmp_path/"seed", seed=1)
    assert any((v - learned(words)[k]).abs().max() > 1e-2 for k, v in learned(tmp_path/"seed").items())

START = '''
from accelerate import PartialState
from PIL import Image
from diffda import finetune
from diffda.backbone import get_backbone
from diffda.core import make_dir
from diffda.data import get_split
from diffda.settings import settled
from diffda.store import Stage, Store
finetune.samples = lambda *a, **k: Image.new("RGB", (8, 8))
part, split = finetune.TextualInversion(steps=3, batch_size=3, lr=.05), get_split("nano-digits-1", 0)
part, backbone = settled(part, get_backbone("nano"), split.task), get_backbone("nano")
def work(folder, store): return part.train(split, backbone, None, folder, 0, progress=False)
'''
DIRECT = '''
work(make_dir({folder!r}), None)
assert PartialState().num_processes == 2
'''
STORED = '''
store, stage = Store({folder!r}), Stage("adaptation", part, (split.digest,), work, together=True)
store.run(stage)
assert PartialState().num_processes == 2
'''

def in_two_processes(program, path):
    "Run the text of a program in two processes on the CPU, for a bounded time: a lock can last for ever."
    path.write_text(program)
    own = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launch, str(path)], capture_output=True, text=True,
                          env=os.environ | own, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

def check_same(folder, words):
    "Assert that the words in `folder` are those of one process."
    assert set(files(folder)) - {"DONE", "stage.json", ".lock"} == set(files(words))
    assert close(folder, words)
    assert np.allclose(losses(folder), losses(words), atol=1e-5)

@pytest.mark.slow
def test_two_processes_share_a_batch(tmp_path, words):
    in_two_processes(START + DIRECT.format(folder=str(tmp_path/"two")), tmp_path/"program.py")
    check_same(tmp_path/"two", words)

@pytest.mark.slow
def test_two_processes_do_a_stage_of_the_store_together(tmp_path, words):
    "Only the first holds the stage's lock; the second must not wait for it."
    in_two_processes(START + STORED.format(folder=str(tmp_path/"store")), tmp_path/"program.py")
    folder, = (tmp_path/"store"/"adaptation").iterdir()
    check_same(folder, words)
    assert json.loads((folder/"DONE").read_text())["steps"] == 3

def test_rounds():
    seen = in_rounds(7, 0, 70, "s")
    rounds = [tuple(seen[k:k+7]) for k in range(0, 70, 7)]
    assert all(sorted(r) == list(range(7)) for r in rounds) and len(set(rounds)) > 5
    assert [in_rounds(7, k, 3, "s") for k in (0, 3, 66)] == [seen[0:3], seen[3:6], seen[66:69]]

def test_tune_is_adamw(tmp_path):
    "Five steps with a bounded gradient, beside the same by hand in float64."
    target = torch.tensor([[3., -4.], [1., 2.]])
    x = torch.nn.Parameter(torch.tensor([1., 1.]))
    def loss(i, members): return ((x - target[members])**2).sum(1)*(i + 1)
    found = tune([x], loss, 5, .1, 2, tmp_path/"c.pt", clip=1., progress=False)
    w, m, v = np.array([1., 1.]), np.zeros(2), np.zeros(2)
    for i in range(5):
        assert abs(found[i] - ((w - target.numpy())**2).sum()/2*(i + 1)) < 1e-4
        g = (2*(w - target.numpy())).mean(0)*(i + 1)
        g = g*min(1, 1/(np.linalg.norm(g) + 1e-6))
        m, v = .9*m + .1*g, .999*v + .001*g*g
        w = w*(1 - .1*.01) - .1*(m/(1 - .9**(i + 1)))/(np.sqrt(v/(1 - .999**(i + 1))) + 1e-8)
    assert np.allclose(x.detach().numpy(), w, atol=1e-5)

def test_a_rate_that_is_too_large_is_an_error(few, tmp_path):
    says = r"learn words diverged: the loss of step \d+ is nan. Take a smaller learning rate than 1e\+30"
    part = dataclasses.replace(TI, lr=1e30, steps=20)
    with pytest.raises(DiffDAError, match=says): train(part, few, tmp_path)

def test_the_rate_grows_with_the_batch_if_asked_to(few, tmp_path):
    train(dataclasses.replace(TI, steps=1, lr=.02, scale_lr=True), few, tmp_path/"a")
    train(dataclasses.replace(TI, steps=1, lr=.06), few, tmp_path/"b")
    assert all(torch.equal(v, learned(tmp_path/"b")[k]) for k, v in learned(tmp_path/"a").items())

# words

def test_several_tokens_per_class(few, tmp_path):
    train(dataclasses.replace(FAST_TI, num_vectors=3), few, tmp_path)
    assert shapes(tmp_path) == {f"<{n}>": (3, 128) for n in few.class_names}
    assert class_words(few.class_names, tmp_path)[0] == "<five>"
    pipe = open_pipeline(NANO, "cpu", str(tmp_path))
    ids = pipe.tokenizer.convert_tokens_to_ids(["<nine>", "<nine>_1", "<nine>_2"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], learned(tmp_path)["<nine>"])
    # start, a, photo, of, a, and then the three
    caption = template_ids(pipe, ["<nine>"])[0, :1]
    assert caption[0].tolist()[5:8] == ids
    with torch.no_grad(): whole = pipe.text_encoder(caption)[0]
    assert torch.allclose(Prompts(pipe).texts(["a photo of a <nine>"]), whole, atol=1e-5)

def test_a_class_of_its_own(few, tmp_path):
    "Learned one by one, a word depends on the images of its own class only."
    counts = train(ONE_BY_ONE, few, tmp_path/"a")
    def read(i): return few.train.read(i) if i == 2 else Image.new("RGB", (32, 32))
    black = Samples(few.train.ids, few.train.labels, read, few.train.mark)
    train(ONE_BY_ONE, changed(few, train=black), tmp_path/"b")
    a, b = learned(tmp_path/"a"), learned(tmp_path/"b")
    own = f"<{few.class_names[few.train.labels[2]]}>"
    assert counts["steps"] == 10
    assert list(pd.read_csv(tmp_path/"a"/"loss.csv").columns) == ["run", "step", "loss"]
    assert torch.allclose(a[own], b[own], atol=1e-5)
    assert all((a[k] - b[k]).abs().max() > 1e-3 for k in a if k != own)

@pytest.mark.parametrize("initializer, metaclass, expected", [
    ("digit", "digit", "digit"), ("class", "digit", None), ("metaclass", "digit", "digit"),
    ("metaclass", None, "the")])
def test_where_words_start(few, tmp_path, initializer, metaclass, expected):
    "From the word `expected`, or from the name of the class."
    pipe = load_pipeline(NANO, "cpu")
    table = pipe.text_encoder.get_input_embeddings().weight
    split = changed(few, task=dataclasses.replace(few.task, metaclass=metaclass))
    assert few.task.metaclass == "digit"
    part = dataclasses.replace(TI, steps=1, lr=1e-9, initializer=initializer, num_vectors=2)
    train(part, split, tmp_path)
    for name in few.class_names:
        ids = pipe.tokenizer(expected or name, add_special_tokens=False).input_ids
        assert torch.allclose(learned(tmp_path)[f"<{name}>"], table[ids].mean(0).expand(2, -1), atol=1e-6)

@pytest.mark.parametrize("names, says", [
    (["ankle boot", "Ankle-Boot", "a", "b", "c"],
     "'ankle boot' and 'Ankle-Boot' would share the placeholder <ankle_boot>"),
    (["A|B", "a b", "a", "b", "c"], "share the placeholder <a_b>")])
def test_names_that_collide(few, tmp_path, names, says):
    with pytest.raises(DiffDAError, match=says): train(TI, changed(few, class_names=names), tmp_path)

def test_names_of_any_script(few, tmp_path):
    names = ["Fünf", "ШЕСТЬ", "七", "<8>", "a {} b"]
    train(dataclasses.replace(TI, steps=1), changed(few, class_names=names), tmp_path)
    assert class_words(names, tmp_path) == ["<fünf>", "<шесть>", "<七>", "<_8_>", "<a____b>"]
    pipe = open_pipeline(NANO, "cpu", str(tmp_path))
    assert all(pipe.tokenizer.tokenize(f"a photo of a {w}")[-1] == w for w in class_words(names, tmp_path))

def test_words_that_are_there_already(few, words, tmp_path):
    with pytest.raises(DiffDAError, match="<five> of class 'five' is a word of the tokenizer already"):
        train(TI, few, tmp_path, words)
    with pytest.raises(DiffDAError, match="<bag>_1 of class 'bag' is a word of the tokenizer"):
        placeholders(["bag"], 1, {"<bag>_1": 0})

def test_words_that_no_caption_contains(few, tmp_path):
    without_nine = changed(few, train=few.train.take(np.flatnonzero(few.train.labels != 4)))
    says = "Class 'nine' has no training image, so no caption would contain <nine>"
    with pytest.raises(DiffDAError, match=says):
        train(TI, without_nine, tmp_path)
    says = (r"No training caption contains <five>_2\d of class 'five': "
            "a caption holds 32 tokens and the class has 40")
    part = dataclasses.replace(TI, num_vectors=40)
    with pytest.raises(DiffDAError, match=says): train(part, few, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))

@pytest.mark.parametrize("word, says", [("aircraft", r"must be one token; 'aircraft' is 5: a ir cra f t</w>"),
                                        ("", "does not know the word ''")])
def test_words_that_cannot_be_started_from(few, tmp_path, word, says):
    part = dataclasses.replace(TI, initializer=word)
    with pytest.raises(DiffDAError, match=says): train(part, few, tmp_path)

# views

def test_mirror_images(few):
    (plain, p), (mirror, q) = mirrored(few.train.read(0), 32, .25)
    assert (p, q) == (.75, .25) and np.array_equal(np.asarray(plain)[:, ::-1], np.asarray(mirror))
    assert len(mirrored(few.train.read(0), 32, 1.)) == 1

def test_random_squares():
    ramp = Image.fromarray(np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (40, 1, 3)))
    views, again = ([np.asarray(view) for view, _ in cropped(ramp, 40, 8, 0, "ramp")] for _ in range(2))
    starts = [int(view[0, 0, 0]) for view in views]
    for view, start in zip(views, starts):
        assert view.shape == (40, 40, 3) and np.array_equal(view[0, :, 0], np.arange(start, start + 40))
    assert len(set(starts)) > 3 and np.array_equal(views, again)
    tall = cropped(ramp.transpose(Image.TRANSPOSE), 20, 2, 0)
    assert [view.size for view, _ in tall] == [(20, 20)]*2
    assert cropped(ramp.resize((41, 40)), 32, 4, 0)[0][0].size == (32, 32)

def test_views_come_in_their_shares(few):
    pipe = frozen(NANO)
    def views(im, sid): return mirrored(im, 32, 0. if sid == few.train.ids[1] else .25)
    latents = Latents(pipe, few.train, views, 32)
    assert len(latents.mean) == 9 and latents.first == [0, 2, 3, 5, 7]
    for i, u, k in ((0, .74, 0), (0, .76, 1), (1, .99, 2), (4, 0., 7), (4, .9999, 8)):
        drawn = latents.draw([i], torch.tensor([u]), torch.zeros(1, *LATENT))[0]
        assert torch.allclose(drawn/latents.factor, latents.mean[k])
    with torch.no_grad(): d = pipe.vae.encode(pipe.image_processor.preprocess(few.train.read(4))).latent_dist
    assert torch.allclose(latents.mean[7], d.mean[0], atol=1e-5)
    assert torch.allclose(latents.std[7], d.std[0], atol=1e-5)
    drawn = latents.draw([4], torch.tensor([0.]), torch.full((1, *LATENT), 2.))
    assert torch.allclose(drawn[0], (d.mean[0] + 2*d.std[0])*pipe.vae.config.scaling_factor, atol=1e-4)

def test_images_of_other_shapes(few, tmp_path):
    def read(i): return few.train.read(i).resize((50 + 10*i, 60))
    odd = changed(few, train=Samples(few.train.ids, few.train.labels, read, few.train.mark))
    train(dataclasses.replace(TI, steps=1, hflip=.5), odd, tmp_path/"a")
    assert train(dataclasses.replace(DB, steps=1, crops=2), odd, tmp_path/"b", tmp_path/"a")["steps"] == 1

# settings, chains, stages

def test_what_is_left_open_is_settled():
    digits, scans = get_split("nano-digits-1", 0).task, get_split("nano-scans-2", 0).task
    sd, ti, db = dataclasses.replace(NANO, resolution=512), TextualInversion(), DreamBoothLoRA()
    words, lora = settled(ti, sd), settled(db, sd)
    assert (words.steps, words.lr, words.batch_size, words.scale_lr) == (2000, 5e-4, 64, False)
    assert (words.hflip, words.initializer) == (.5, "the")
    assert (lora.steps, lora.lr*lora.batch_size, lora.scale_lr, lora.rank) == (1000, 3.2e-4, True, 8)
    assert settled(ti, sd, scans).steps == settled(db, sd, scans).steps == 500
    # the task's word takes its place in training, see test_where_words_start
    assert settled(ti, sd, digits).initializer == "metaclass"
    assert settled(ti, sd, scans).initializer == "the"
    small = TextualInversion(steps=400, lr=5e-3, batch_size=16, initializer="the", hflip=0.)
    assert settled(ti, NANO, scans) == settled(ti, NANO) == small and small.hflip == 0
    told = settled(dataclasses.replace(ti, steps=7, initializer="a"), sd, scans)
    assert told == dataclasses.replace(settled(ti, sd, scans), steps=7, initializer="a")

@pytest.mark.parametrize("kind, wrong, says", [
    (TextualInversion, {"steps": 0}, "TextualInversion: steps is at least 1; found 0"),
    (TextualInversion, {"lr": 0.}, "lr is above 0; found 0.0"),
    (TextualInversion, {"lr": math.nan}, "lr is above 0; found nan"),
    (TextualInversion, {"num_vectors": 0}, "num_vectors is at least 1"),
    (TextualInversion, {"hflip": 1.5}, r"hflip lies in \[0, 1\]; found 1.5"),
    (DreamBoothLoRA, {"rank": 0}, "DreamBoothLoRA: rank is at least 1"),
    (DreamBoothLoRA, {"clip": -1.}, "clip is above 0")])
def test_settings(kind, wrong, says):
    with pytest.raises(DiffDAError, match=says): kind(**wrong)

def test_a_second_lora_is_refused(few, lora, tmp_path):
    says = "starts from a network without a LoRA"
    with pytest.raises(DiffDAError, match=says): train(DB, few, tmp_path, lora)

def test_words_after_a_lora_and_a_whole_network_take_it_over(few, tmp_path):
    before = tmp_path/"before"
    train(dataclasses.replace(FAST_DB, steps=1), few, before)
    pipe = open_pipeline(NANO, "cpu")
    with torch.no_grad(): pipe.unet.conv_out.bias += 1
    pipe.unet.save_pretrained(before/"unet")
    train(TI, few, tmp_path/"after", before)
    assert files(tmp_path/"after")[LORA] == files(before)[LORA]
    assert files(tmp_path/"after"/"unet") == files(before/"unet")
    after = open_pipeline(NANO, "cpu", str(tmp_path/"after"))
    assert torch.equal(after.unet.conv_out.bias, pipe.unet.conv_out.bias)
    train(TI, few, tmp_path/"alone")
    # trained under the network that was handed over
    assert losses(tmp_path/"after")[0] > losses(tmp_path/"alone")[0] + .5

@pytest.mark.parametrize("task", ["nano-fashion", "nano-digits-5", "nano-scans-5"])
def test_methods_share_what_they_have_in_common(task):
    jobs = plan(["da-fusion", "diff-aug", "diff-mix"], [task], (0,))
    stages = [[stage.key for stage in job.tuning] for job in jobs]
    assert [len(s) for s in stages] == [1, 2, 2] and stages[1] == stages[2] and stages[0] == stages[1][:1]

@pytest.mark.gpu
def test_on_a_gpu(few, tmp_path):
    train(TI, few, tmp_path/"a")
    train(DB, few, tmp_path/"b", tmp_path/"a")
    for folder in (tmp_path/"a", tmp_path/"b"):
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in learned(folder).values())
        assert all(math.isfinite(x) for x in losses(folder))
    assert all(v.isfinite().all() for v in load_file(tmp_path/"b"/LORA).values())
