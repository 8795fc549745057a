"""What fine-tuning learns: the gradient that a computation by hand gives, nothing but what is meant to move, and files that diffusers itself reads.

Trainings here last a few steps. `samples.png` is drawn for real in one test only, because it takes longer than all of them."""
import dataclasses, json, math, os, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file

from diffda import finetune
from diffda.backbone import BACKBONES, EMBEDDINGS, LORA, TOKENS, TUNING, class_words, get_backbone, load_pipeline, settled
from diffda.core import DiffDAError, canonical, generator_for
from diffda.data import Samples, Split, get_split
from diffda.finetune import DreamBoothLoRA, Latents, TextualInversion, add_lora, captions, cropped, denoising, frozen, in_rounds, mirrored, placeholders, tune
from diffda.generate import Prompts, SDEdit, generate_pool
from diffda.pipeline import adaptation_stages, plan
from diffda.prompts import TEMPLATES

WHERE, NANO = BACKBONES["nano"].source, get_backbone("nano")
draw_samples = finetune.samples

@pytest.fixture(autouse=True)
def no_samples(monkeypatch): monkeypatch.setattr(finetune, "samples", lambda *a, **k: Image.new("RGB", (8, 8)))

@pytest.fixture(scope="module")
def few(): return get_split("nano-digits-1", 0)               # five classes, one image each

def changed(split, **fields): return dataclasses.replace(split, **fields)
def train(part, split, folder, previous=None, seed=0): return part.train(split, "nano", previous, folder, seed, progress=False)
def learned(folder): return load_file(Path(folder)/EMBEDDINGS)
def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}

TI, DB = TextualInversion(steps=3, batch_size=3), DreamBoothLoRA(steps=3, batch_size=3)

@pytest.fixture(scope="module")
def words(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "samples", lambda *a, **k: Image.new("RGB", (8, 8)))
        counts = train(dataclasses.replace(TI, lr=.05), few, folder)
    assert counts["steps"] == 3 and 0 < counts["last_loss"] < 3
    return folder

@pytest.fixture(scope="module")
def lora(few, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "samples", lambda *a, **k: Image.new("RGB", (8, 8)))
        train(dataclasses.replace(DB, lr=.05), few, folder, words)
    return folder

# against a computation by hand

def by_hand(split, seed, batch):
    "(gradient of the new rows, their start) after one forward and backward pass with the checkpoint's parts, opened one by one."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    tokenizer, text = CLIPTokenizer.from_pretrained(WHERE, subfolder="tokenizer"), CLIPTextModel.from_pretrained(WHERE, subfolder="text_encoder")
    vae, unet = AutoencoderKL.from_pretrained(WHERE, subfolder="vae"), UNet2DConditionModel.from_pretrained(WHERE, subfolder="unet")
    tokens = [f"<{n}>" for n in split.class_names]
    tokenizer.add_tokens(tokens)
    old = text.get_input_embeddings().weight.detach()
    start = old[tokenizer.convert_tokens_to_ids("the</w>")]
    table = torch.cat([old, start.expand(len(tokens), -1)]).clone().requires_grad_(True)
    text.get_input_embeddings().weight = torch.nn.Parameter(table.detach())
    factor, c = vae.config.scaling_factor, json.loads((Path(WHERE)/"scheduler"/"scheduler_config.json").read_text())
    kept = torch.cumprod(1 - torch.linspace(c["beta_start"]**.5, c["beta_end"]**.5, 1000, dtype=torch.float64)**2, 0)
    n = len(split.train)
    order = sorted(range(n), key=lambda i: split.train.ids[i])
    order = [order[k] for k in torch.randperm(n, generator=generator_for(seed, "words", "round", 0)).tolist()][:batch]
    g = generator_for(seed, "words", 0)
    point, noise = torch.randn(batch, 4, 8, 8, generator=g), torch.randn(batch, 4, 8, 8, generator=g)
    torch.rand(batch, generator=g)                                       # the view: there is only one
    t, template = torch.randint(1000, (batch,), generator=g), torch.randint(27, (batch,), generator=g)
    loss = 0
    for j, i in enumerate(order):
        x = torch.from_numpy(np.asarray(split.train.read(i))/127.5 - 1).permute(2, 0, 1).float()[None]
        with torch.no_grad(): d = vae.encode(x).latent_dist
        z = (d.mean + d.std*point[j])*factor
        a = kept[t[j]]
        noisy = (a.sqrt()*z + (1 - a).sqrt()*noise[j]).float()
        ids = tokenizer(TEMPLATES[template[j]].format(tokens[split.train.labels[i]]), padding="max_length", return_tensors="pt").input_ids
        hidden = torch.func.functional_call(text, {table_name(text): table}, (ids,))[0]
        loss = loss + ((unet(noisy, t[j], hidden).sample - noise[j])**2).mean()/batch
    loss.backward()
    assert table.grad[:len(old)].abs().max() > 0                         # the other rows have a gradient too; it must not be used
    return table.grad[len(old):], start, loss.item()

def table_name(text): return next(n for n, p in text.named_parameters() if p is text.get_input_embeddings().weight)

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
    assert grad.abs().max() > 1e-6 and torch.allclose(found, grad, rtol=1e-3, atol=float(grad.abs().max())*1e-4)
    assert (grad.abs().sum(1) > 0).sum() == 3                            # three images of the batch, three of five words
    assert torch.allclose(seen["exp_avg_sq"]/(1 - .999), grad**2, rtol=2e-3, atol=float((grad**2).max())*1e-3)
    after = torch.cat([learned(tmp_path)[f"<{n}>"] for n in few.class_names])
    assert torch.allclose(after, start*(1 - .01*1e-2) - .01*found/(found.abs() + 1e-8), atol=1e-6)
    assert abs(pd.read_csv(tmp_path/"loss.csv").loss[0] - loss) < 1e-5

def test_a_lora_starts_from_the_network_as_it_was(few):
    pipe = frozen(NANO)
    x, t, h = torch.randn(2, 4, 8, 8, generator=generator_for(0)), torch.tensor([3, 700]), torch.randn(2, 32, 128, generator=generator_for(1))
    with torch.no_grad(): before = pipe.unet(x, t, h).sample
    weights = add_lora(pipe.unet, 4, 0)
    with torch.no_grad(): assert torch.equal(before, pipe.unet(x, t, h).sample)
    named = dict(pipe.unet.named_parameters())
    a, b = ([p for n, p in named.items() if k in n] for k in ("lora_A", "lora_B"))
    assert len(weights) == len(a) + len(b) and len(a) == len(b) == 4*sum(n.endswith("to_q.weight") or n.endswith("to_q.base_layer.weight") for n in named)
    assert all((p == 0).all() for p in b) and .2 < torch.cat([p.flatten() for p in a]).std() < .3 and all(p.shape[0] == 4 for p in a)
    assert {n for n, p in named.items() if p.requires_grad} == {n for n in named if "lora_" in n}

def test_first_loss_of_a_lora_is_that_of_the_words(few, words, tmp_path):
    "B is zero at the start, so the first loss is that of the network without LoRA, under captions with the learned words."
    train(dataclasses.replace(DB, steps=1), few, tmp_path, words, seed=2)
    pipe = frozen(NANO, words)
    latents = Latents(pipe, few.train, lambda im, sid: cropped(im, 32, 4, 2, sid), 32)
    loss = denoising(pipe, latents, few.train, range(5), captions(pipe, [f"<{n}>" for n in few.class_names]), 3, 2, "lora")
    with torch.no_grad(): assert abs(loss(0, [0, 1, 2]).mean().item() - pd.read_csv(tmp_path/"loss.csv").loss[0]) < 1e-6

def test_captions_that_say_more_about_their_image(few, words, tmp_path):
    "With phrases, the first loss of a LoRA is that of 'a photo of a <word>, <phrase>', computed by hand; without, neither captions nor keys change."
    path = tmp_path/"phrases.json"
    path.write_text(json.dumps({i: ["bright", "dark and wide."] if k == 3 else f"narrow {k}" for k, i in enumerate(few.train.ids)}))
    part = dataclasses.replace(DB, steps=1, phrases=str(path))
    pipe, names = frozen(NANO, words), [f"<{n}>" for n in few.class_names]
    texts, rows = part.captions(pipe, names, few)
    said = [[f"a photo of a {names[y]}, {p}" for p in (("bright", "dark and wide") if k == 3 else (f"narrow {k}",)*2)] for k, y in enumerate(few.train.labels)]
    ids = pipe.tokenizer(sum(said, []), padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
    assert list(rows) == list(range(5)) and torch.equal(texts.reshape(10, -1), ids)
    train(part, few, tmp_path/"a", words, seed=2)
    latents = Latents(pipe, few.train, lambda im, sid: cropped(im, 32, 4, 2, sid), 32)
    seen = {}
    hook = pipe.text_encoder.register_forward_hook(lambda m, i, k, o: seen.update(ids=i[0] if i else k["input_ids"]), with_kwargs=True)
    with torch.no_grad(): value = denoising(pipe, latents, few.train, range(5), texts, 3, 2, "lora", rows=rows)(0, [0, 1, 2]).mean().item()
    hook.remove()
    order = sorted(range(5), key=lambda i: few.train.ids[i])
    which = [order[k] for k in in_rounds(5, 0, 3, 2, "lora")]
    assert all(any(torch.equal(own, ids[2*i + k]) for k in (0, 1)) for own, i in zip(seen["ids"], which)) and abs(value - pd.read_csv(tmp_path/"a"/"loss.csv").loss[0]) < 1e-6
    plain, rows = DB.captions(pipe, names, few)
    assert torch.equal(plain, captions(pipe, names)) and list(rows) == few.train.labels.tolist() and "phrases" not in canonical(DB) and canonical(part)["phrases_key"]
    once = canonical(part)
    path.write_text(json.dumps({i: "other" for i in few.train.ids}))
    assert canonical(dataclasses.replace(DB, steps=1, phrases=str(path))) != once
    path.write_text("{}")
    with pytest.raises(DiffDAError, match="has no phrase for 5 of 5 training images"): train(dataclasses.replace(TI, phrases=str(path)), few, tmp_path/"b")
    with pytest.raises(DiffDAError, match="there is no file none.json"): TextualInversion(phrases="none.json")

def test_velocity_is_the_target_where_the_checkpoint_predicts_it(few):
    pipe = frozen(NANO)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    latents = Latents(pipe, few.train, lambda im, sid: mirrored(im, 32, 0.), 32)
    texts = captions(pipe, few.class_names)
    loss = denoising(pipe, latents, few.train, range(5), texts, 1, 0, "v")
    seen = {}
    hook = pipe.unet.register_forward_hook(lambda m, i, o: seen.update(x=i[0], t=i[1], out=o.sample))
    with torch.no_grad(): value = loss(0, [0])
    hook.remove()
    g = generator_for(0, "v", 0)
    point, noise = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g)
    i = sorted(range(5), key=lambda i: few.train.ids[i])[in_rounds(5, 0, 1, 0, "v")[0]]
    z, a = (latents.mean[i] + latents.std[i]*point)*pipe.vae.config.scaling_factor, torch.cumprod(1 - torch.linspace(.00085**.5, .012**.5, 1000)**2, 0)[seen["t"]]
    assert torch.allclose(seen["x"], a.sqrt()*z + (1 - a).sqrt()*noise, atol=1e-4)
    assert abs(value.item() - ((seen["out"] - (a.sqrt()*noise - (1 - a).sqrt()*z))**2).mean().item()) < 1e-4

# nothing else moves

@pytest.mark.parametrize("part", [dataclasses.replace(TI, lr=.05), dataclasses.replace(DB, lr=.05)], ids=["words", "lora"])
def test_nothing_else_moves(few, tmp_path, monkeypatch, part):
    kept, real = [], finetune.frozen
    monkeypatch.setattr(finetune, "frozen", lambda *a: kept.append(real(*a)) or kept[-1])
    train(part, few, tmp_path)
    pipe = kept[0]
    before, inverted = load_pipeline.__wrapped__(NANO, "cpu"), isinstance(part, TextualInversion)
    for name in ("vae", "unet", "text_encoder"):
        old = getattr(before, name).state_dict()
        now = {k.replace(".base_layer", ""): v for k, v in getattr(pipe, name).state_dict().items() if "lora_" not in k}
        there = {k for k in old if not (inverted and k.endswith("token_embedding.weight"))}          # Words stands in the table's place
        assert there <= set(now) and all(torch.equal(old[k], now[k]) for k in there), name
    table = before.text_encoder.get_input_embeddings().weight
    if inverted:
        assert torch.equal(pipe.text_encoder.get_input_embeddings().table, table)
        adapted = load_pipeline.__wrapped__(NANO, "cpu", str(tmp_path))
        rows = adapted.text_encoder.get_input_embeddings().weight
        assert torch.equal(rows[:len(table)], table) and len(rows) == len(table) + 5
        for token, row in learned(tmp_path).items():
            assert row.dtype == torch.float32 and torch.equal(rows[adapted.tokenizer.convert_tokens_to_ids(token)], row[0]) and not torch.equal(row[0], table[adapted.tokenizer.convert_tokens_to_ids("the</w>")])

def test_global_random_state_and_the_pipeline_at_hand_are_left_alone(few, tmp_path, words, lora):
    shared = load_pipeline(NANO, "cpu")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train(dataclasses.replace(TI, lr=.05), few, tmp_path/"a"); train(dataclasses.replace(DB, lr=.05), few, tmp_path/"b", tmp_path/"a")
    assert torch.equal(before, torch.get_rng_state()) and files(tmp_path/"a") == files(words) and files(tmp_path/"b") == files(lora)
    assert shared is load_pipeline(NANO, "cpu") and len(shared.tokenizer) == 782 and not any("lora" in n for n, _ in shared.unet.named_parameters())

# what is written

def test_files(few, words, lora):
    assert set(files(words)) == {EMBEDDINGS, TOKENS, "loss.csv", "samples.png"} and set(files(lora)) == set(files(words)) | {LORA}
    assert json.loads((words/TOKENS).read_text()) == {n: f"<{n}>" for n in few.class_names}
    assert {k: tuple(v.shape) for k, v in learned(words).items()} == {f"<{n}>": (1, 128) for n in few.class_names}
    assert files(lora)[EMBEDDINGS] == files(words)[EMBEDDINGS] and files(lora)[TOKENS] == files(words)[TOKENS]
    for folder in (words, lora): assert list(pd.read_csv(folder/"loss.csv").columns) == ["step", "loss"] and len(pd.read_csv(folder/"loss.csv")) == 3
    assert all(k.startswith("unet.") for k in load_file(lora/LORA))

def test_samples_show_what_was_learned(few, words):
    strips = [np.asarray(draw_samples(NANO, few, a, n=2)) for a in (words, words, None)]
    assert strips[0].shape == (32, 64, 3) and np.array_equal(strips[0], strips[1]) and not np.array_equal(strips[0], strips[2])

@pytest.mark.parametrize("which", ["words", "lora", "both"])
def test_plain_diffusers_makes_the_same_images(few, words, lora, tmp_path, which):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
    folder = {"words": words, "both": lora}.get(which) or tmp_path/"lora"
    if which == "lora": train(dataclasses.replace(DB, lr=.05), few, folder)
    part = SDEdit(prompt="article", strength=.9, num_inference_steps=6, num_copies=1)
    pool = generate_pool(part, few, tmp_path/"pool", adaptation=str(folder))
    plain = generate_pool(part, few, tmp_path/"plain")
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(WHERE)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2)
    pipe.set_progress_bar_config(disable=True)
    if which != "lora": pipe.load_textual_inversion([{t: v} for t, v in load_file(folder/EMBEDDINGS).items()])
    if which != "words": pipe.load_lora_weights(str(folder))
    for i, r in enumerate(pool.rows.itertuples()):
        assert r.prompt == f"a photo of a {few.class_names[r.label] if which == 'lora' else '<' + few.class_names[r.label] + '>'}"
        with torch.no_grad(): latent = pipe.vae.encode(pipe.image_processor.preprocess(few.train.read(i))).latent_dist.mode()*pipe.vae.config.scaling_factor
        image = pipe(r.prompt, image=latent, strength=.9, num_inference_steps=6, guidance_scale=r.guidance, generator=generator_for(0, r.source_id, 0, "noise")).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(pool.image(i))).max() <= 2
    assert any(not np.array_equal(np.asarray(pool.image(i)), np.asarray(plain.image(i))) for i in range(5))

# how the work is cut up

@pytest.mark.parametrize("part, at", [(dataclasses.replace(TI, lr=.05, per_class=True, steps=2), 5), (dataclasses.replace(TI, lr=.05), 1), (dataclasses.replace(DB, lr=.05), 2)],
                         ids=["words one by one", "words", "lora"])
def test_broken_off_and_taken_up_again(few, tmp_path, breaks_off, part, at):
    "An error in the middle of a step, and a second life: the files are those of an undisturbed run, byte for byte."
    train(part, few, tmp_path/"whole")
    calls = breaks_off(at)
    with pytest.raises(KeyboardInterrupt): train(part, few, tmp_path/"torn")
    assert not (tmp_path/"torn"/"loss.csv").exists() and list((tmp_path/"torn").glob("checkpoint*.pt"))
    done = len(calls) - 1
    train(part, few, tmp_path/"torn")
    total = part.steps*(5 if getattr(part, "per_class", False) else 1)
    assert files(tmp_path/"torn") == files(tmp_path/"whole") and len(calls) == total + 1 and done == at

def test_pieces_of_a_batch_and_order_of_the_images_do_not_matter(few, tmp_path, monkeypatch, words):
    train(dataclasses.replace(TI, lr=.05), changed(few, train=few.train.take([3, 1, 0, 4, 2])), tmp_path/"order")
    monkeypatch.setattr(finetune, "_at_once", lambda latents: 1)
    train(dataclasses.replace(TI, lr=.05), few, tmp_path/"pieces")
    for other in ("order", "pieces"):
        assert all(torch.allclose(v, learned(words)[k], atol=1e-4) for k, v in learned(tmp_path/other).items())
    train(dataclasses.replace(TI, lr=.05), few, tmp_path/"seed", seed=1)
    assert any((v - learned(words)[k]).abs().max() > 1e-2 for k, v in learned(tmp_path/"seed").items())

@pytest.mark.slow
def test_two_processes_share_a_batch(few, tmp_path, words):
    program = f'''
from PIL import Image
from diffda import finetune
from diffda.data import get_split
finetune.samples = lambda *a, **k: Image.new("RGB", (8, 8))
finetune.TextualInversion(steps=3, batch_size=3, lr=.05).train(get_split("nano-digits-1", 0), "nano", None, {str(tmp_path/"two")!r}, 0, progress=False)
'''
    (tmp_path/"program.py").write_text(program)
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(tmp_path/"program.py")],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(torch.allclose(v, learned(words)[k], atol=1e-4) for k, v in learned(tmp_path/"two").items())
    assert np.allclose(pd.read_csv(tmp_path/"two"/"loss.csv").loss, pd.read_csv(words/"loss.csv").loss, atol=1e-5)

def test_rounds():
    seen = in_rounds(7, 0, 70, "s")
    assert all(sorted(seen[k:k+7]) == list(range(7)) for k in range(0, 70, 7)) and len({tuple(seen[k:k+7]) for k in range(0, 70, 7)}) > 5
    assert [in_rounds(7, k, 3, "s") for k in (0, 3, 66)] == [seen[0:3], seen[3:6], seen[66:69]]

def test_tune_is_adamw(tmp_path):
    "Five steps with a bounded gradient, beside the same by hand in float64."
    target = torch.tensor([[3., -4.], [1., 2.]])
    x = torch.nn.Parameter(torch.tensor([1., 1.]))
    losses = tune([x], lambda i, members: ((x - target[members])**2).sum(1)*(i + 1), 5, .1, 2, tmp_path/"c.pt", clip=1., progress=False)
    w, m, v = np.array([1., 1.]), np.zeros(2), np.zeros(2)
    for i in range(5):
        assert abs(losses[i] - ((w - target.numpy())**2).sum()/2*(i + 1)) < 1e-4
        g = (2*(w - target.numpy())).mean(0)*(i + 1)
        g = g*min(1, 1/(np.linalg.norm(g) + 1e-6))
        m, v = .9*m + .1*g, .999*v + .001*g*g
        w = w*(1 - .1*.01) - .1*(m/(1 - .9**(i + 1)))/(np.sqrt(v/(1 - .999**(i + 1))) + 1e-8)
    assert np.allclose(x.detach().numpy(), w, atol=1e-5)

def test_a_rate_that_is_too_large_is_an_error(few, tmp_path):
    with pytest.raises(DiffDAError, match=r"learn words diverged: the loss of step \d+ is nan. Take a smaller learning rate than 1e\+30"): train(dataclasses.replace(TI, lr=1e30, steps=20), few, tmp_path)

def test_the_rate_grows_with_the_batch_if_asked_to(few, tmp_path):
    for name, part in (("a", dataclasses.replace(TI, steps=1, lr=.02, scale_lr=True)), ("b", dataclasses.replace(TI, steps=1, lr=.06))): train(part, few, tmp_path/name)
    assert all(torch.equal(v, learned(tmp_path/"b")[k]) for k, v in learned(tmp_path/"a").items())

# words

def test_several_tokens_per_class(few, tmp_path):
    train(dataclasses.replace(TI, lr=.05, num_vectors=3), few, tmp_path)
    assert {k: tuple(v.shape) for k, v in learned(tmp_path).items()} == {f"<{n}>": (3, 128) for n in few.class_names} and class_words(few.class_names, tmp_path)[0] == "<five>"
    pipe = load_pipeline.__wrapped__(NANO, "cpu", str(tmp_path))
    ids = pipe.tokenizer.convert_tokens_to_ids(["<nine>", "<nine>_1", "<nine>_2"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], learned(tmp_path)["<nine>"])
    assert captions(pipe, ["<nine>"])[0, 0].tolist()[5:8] == ids             # start, a, photo, of, a, and then the three
    with torch.no_grad(): whole = pipe.text_encoder(captions(pipe, ["<nine>"])[0, :1])[0]
    assert torch.allclose(Prompts(pipe).texts(["a photo of a <nine>"]), whole, atol=1e-5)

def test_a_class_of_its_own(few, tmp_path):
    "Learned one by one, a word depends on the images of its own class only."
    part = dataclasses.replace(TI, lr=.05, per_class=True, steps=2)
    counts = train(part, few, tmp_path/"a")
    black = Samples(few.train.ids, few.train.labels, lambda i: few.train.read(i) if i == 2 else Image.new("RGB", (32, 32)), few.train.mark)
    train(part, changed(few, train=black), tmp_path/"b")
    a, b = learned(tmp_path/"a"), learned(tmp_path/"b")
    own = few.class_names[few.train.labels[2]]
    assert counts["steps"] == 10 and list(pd.read_csv(tmp_path/"a"/"loss.csv").columns) == ["run", "step", "loss"]
    assert torch.allclose(a[f"<{own}>"], b[f"<{own}>"], atol=1e-5) and all((a[k] - b[k]).abs().max() > 1e-3 for k in a if k != f"<{own}>")

def test_where_words_start(few, tmp_path):
    table, tokenizer = load_pipeline(NANO, "cpu").text_encoder.get_input_embeddings().weight, load_pipeline(NANO, "cpu").tokenizer
    for initializer, ids in (("digit", lambda n: tokenizer("digit", add_special_tokens=False).input_ids), ("class", lambda n: tokenizer(n, add_special_tokens=False).input_ids)):
        train(dataclasses.replace(TI, steps=1, lr=1e-9, initializer=initializer, num_vectors=2), few, tmp_path/initializer)
        for n in few.class_names: assert torch.allclose(learned(tmp_path/initializer)[f"<{n}>"], table[ids(n)].mean(0).expand(2, -1), atol=1e-6)

@pytest.mark.parametrize("names, says", [(["ankle boot", "Ankle-Boot", "a", "b", "c"], "'ankle boot' and 'Ankle-Boot' would share the placeholder <ankle_boot>"),
                                         (["A|B", "a b", "a", "b", "c"], "share the placeholder <a_b>")])
def test_names_that_collide(few, tmp_path, names, says):
    with pytest.raises(DiffDAError, match=says): train(TI, changed(few, class_names=names), tmp_path)

def test_names_of_any_script(few, tmp_path):
    names = ["Fünf", "ШЕСТЬ", "七", "<8>", "a {} b"]
    train(dataclasses.replace(TI, steps=1), changed(few, class_names=names), tmp_path)
    assert class_words(names, tmp_path) == ["<fünf>", "<шесть>", "<七>", "<_8_>", "<a____b>"]
    pipe = load_pipeline.__wrapped__(NANO, "cpu", str(tmp_path))
    assert all(pipe.tokenizer.tokenize(f"a photo of a {w}")[-1] == w for w in class_words(names, tmp_path))

def test_words_that_are_there_already(few, words, tmp_path):
    with pytest.raises(DiffDAError, match="<five> of class 'five' is a word of the tokenizer already"): train(TI, few, tmp_path, words)
    with pytest.raises(DiffDAError, match="<bag>_1 of class 'bag' is a word of the tokenizer"): placeholders(["bag"], 1, {"<bag>_1": 0})

def test_words_that_no_caption_contains(few, tmp_path):
    with pytest.raises(DiffDAError, match="Class 'nine' has no training image, so no caption would contain <nine>"):
        train(TI, changed(few, train=few.train.take(np.flatnonzero(few.train.labels != 4))), tmp_path)
    with pytest.raises(DiffDAError, match=r"No training caption contains <five>_2\d of class 'five': a caption holds 32 tokens and the class has 40"): train(dataclasses.replace(TI, num_vectors=40), few, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))

@pytest.mark.parametrize("word, says", [("aircraft", r"must be one token; 'aircraft' is 4: a ir cra ft</w>"), ("", "does not know the word ''")])
def test_words_that_cannot_be_started_from(few, tmp_path, word, says):
    with pytest.raises(DiffDAError, match=says): train(dataclasses.replace(TI, initializer=word), few, tmp_path)

# views

def test_views(few):
    im = few.train.read(0)
    (a, p), (b, q) = mirrored(im, 32, .25)
    assert (p, q) == (.75, .25) and np.array_equal(np.asarray(a)[:, ::-1], np.asarray(b)) and len(mirrored(im, 32, 1.)) == 1
    ramp = Image.fromarray(np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (40, 1, 3)))
    views = cropped(ramp, 40, 8, 0, "ramp")
    starts = [int(np.asarray(v)[0, 0, 0]) for v, _ in views]
    assert all(v.size == (40, 40) and np.array_equal(np.asarray(v)[0, :, 0], np.arange(s, s + 40)) for (v, _), s in zip(views, starts)) and len(set(starts)) > 3
    assert [np.asarray(v).tobytes() for v, _ in cropped(ramp, 40, 8, 0, "ramp")] == [np.asarray(v).tobytes() for v, _ in views]
    tall = cropped(ramp.transpose(Image.TRANSPOSE), 20, 2, 0)
    assert [v.size for v, _ in tall] == [(20, 20)]*2 and cropped(ramp.resize((41, 40)), 32, 4, 0)[0][0].size == (32, 32)

def test_views_come_in_their_shares(few):
    pipe = frozen(NANO)
    views = lambda im, sid: mirrored(im, 32, .25) if sid != few.train.ids[1] else mirrored(im, 32, 0.)
    latents = Latents(pipe, few.train, views, 32)
    assert len(latents.mean) == 9 and latents.first == [0, 2, 3, 5, 7]
    at = lambda i, u: latents.draw([i], torch.tensor([u]), torch.zeros(1, 4, 8, 8))[0]/latents.factor
    for i, u, k in ((0, .74, 0), (0, .76, 1), (1, .99, 2), (4, 0., 7), (4, .9999, 8)): assert torch.allclose(at(i, u), latents.mean[k])
    with torch.no_grad(): d = pipe.vae.encode(pipe.image_processor.preprocess(few.train.read(4))).latent_dist
    assert torch.allclose(latents.mean[7], d.mean[0], atol=1e-5) and torch.allclose(latents.std[7], d.std[0], atol=1e-5)
    drawn = latents.draw([4], torch.tensor([0.]), torch.full((1, 4, 8, 8), 2.))
    assert torch.allclose(drawn[0], (d.mean[0] + 2*d.std[0])*pipe.vae.config.scaling_factor, atol=1e-4)

def test_images_of_other_shapes(few, tmp_path):
    odd = Samples(few.train.ids, few.train.labels, lambda i: few.train.read(i).resize((50 + 10*i, 60)), few.train.mark)
    train(dataclasses.replace(TI, steps=1, hflip=.5), changed(few, train=odd), tmp_path/"a")
    assert train(dataclasses.replace(DB, steps=1, crops=2), changed(few, train=odd), tmp_path/"b", tmp_path/"a")["steps"] == 1

# settings, chains, stages

def test_what_is_left_open_is_settled():
    digits, scans = get_split("nano-digits-1", 0).task, get_split("nano-scans-2", 0).task
    sd = dataclasses.replace(NANO, resolution=512)
    ti, db = TextualInversion(), DreamBoothLoRA()
    assert (lambda p: (p.steps, p.lr, p.batch_size, p.scale_lr, p.hflip, p.initializer))(settled(ti, sd)) == (2000, 5e-4, 64, False, .5, "the")
    assert (lambda p: (p.steps, p.lr*p.batch_size, p.scale_lr, p.rank))(settled(db, sd)) == (1000, 3.2e-4, True, 8)
    assert settled(ti, sd, scans).steps == settled(db, sd, scans).steps == 500 and settled(ti, sd, digits).initializer == "digit" and settled(ti, sd, scans).initializer == "the"
    assert settled(ti, NANO, scans) == settled(ti, NANO) == TextualInversion(**TUNING["nano"]["TextualInversion"]) and settled(ti, NANO).hflip == 0
    assert settled(dataclasses.replace(ti, steps=7, initializer="a"), sd, scans) == dataclasses.replace(settled(ti, sd, scans), steps=7, initializer="a")

@pytest.mark.parametrize("make, says", [(lambda: TextualInversion(steps=0), "TextualInversion: steps is at least 1; found 0"), (lambda: TextualInversion(lr=0.), "lr is above 0; found 0.0"), (lambda: TextualInversion(num_vectors=0), "num_vectors is at least 1"),
                                        (lambda: TextualInversion(hflip=1.5), r"hflip is a share in \[0, 1\]; found 1.5"), (lambda: DreamBoothLoRA(rank=0), "DreamBoothLoRA: rank is at least 1"), (lambda: DreamBoothLoRA(clip=-1.), "clip is above 0")])
def test_settings(make, says):
    with pytest.raises(DiffDAError, match=says): make()

def test_a_second_lora_is_refused(few, lora, tmp_path):
    with pytest.raises(DiffDAError, match="starts from a network without a LoRA"): train(DB, few, tmp_path, lora)

def test_words_after_a_lora_and_a_whole_network_take_it_over(few, tmp_path):
    before = tmp_path/"before"
    train(dataclasses.replace(DB, lr=.05, steps=1), few, before)
    pipe = load_pipeline.__wrapped__(NANO, "cpu")
    with torch.no_grad(): pipe.unet.conv_out.bias += 1
    pipe.unet.save_pretrained(before/"unet")
    train(TI, few, tmp_path/"after", before)
    assert files(tmp_path/"after")[LORA] == files(before)[LORA] and files(tmp_path/"after"/"unet") == files(before/"unet")
    assert torch.equal(load_pipeline.__wrapped__(NANO, "cpu", str(tmp_path/"after")).unet.conv_out.bias, pipe.unet.conv_out.bias)
    train(TI, few, tmp_path/"alone")
    assert pd.read_csv(tmp_path/"after"/"loss.csv").loss[0] > pd.read_csv(tmp_path/"alone"/"loss.csv").loss[0] + .5         # trained under the network that was handed over

@pytest.mark.parametrize("task", ["nano-fashion", "nano-digits-5", "nano-scans-5"])
def test_methods_share_what_they_have_in_common(task):
    stages = [[s.key for _, s in adaptation_stages(r, get_split(task, 0))] for r in plan(["da-fusion", "diff-aug", "diff-mix"], [task], (0,))]
    assert [len(s) for s in stages] == [1, 2, 2] and stages[1] == stages[2] and stages[0] == stages[1][:1]

@pytest.mark.gpu
def test_on_a_gpu(few, tmp_path):
    train(TI, few, tmp_path/"a"); train(DB, few, tmp_path/"b", tmp_path/"a")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for f in ("a", "b") for v in learned(tmp_path/f).values()) and all(v.isfinite().all() for v in load_file(tmp_path/"b"/LORA).values())
    assert all(math.isfinite(x) for f in ("a", "b") for x in pd.read_csv(tmp_path/f/"loss.csv").loss)
