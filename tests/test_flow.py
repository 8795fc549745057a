"""Stable Diffusion 3.5 on a tiny checkpoint of its format: what plain diffusers and a computation by hand
give, whatever the batch; and the methods, from end to end."""
import dataclasses, json, shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file

from diffda import finetune
from diffda.backbone import BACKBONES, EMBEDDINGS, LORA, TOKENS, get_backbone
from diffda.core import DiffDAError
from diffda.data import get_split, get_task
from diffda.finetune import (ATTENTION, DreamBoothLoRA, Latents, TextualInversion, add_lora, template_ids,
                             cropped, denoising, frozen, mirrored)
from diffda.generate import SDEdit, generate_pool
from diffda.jobs import plan
from diffda.method import get_method
from diffda.methods.gif import GIF
from diffda.models import (T5_TOKENS, Flow, encode, load_pipeline, load_words, model_of, open_pipeline, quiet,
                           rounded)
from diffda.pipeline import run_all
from diffda.prompts import TEMPLATES
from diffda.settings import settled
from diffda.torch_core import generator_for
from tiny_sd35 import JOINT, WIDTHS, sd35

LEVELS = 2
TI = TextualInversion(steps=3, batch_size=3, lr=.05)
DB = DreamBoothLoRA(steps=3, batch_size=3, lr=.05)
PART = SDEdit(strength=.5, num_inference_steps=8, num_copies=3)
draw_samples = finetune.samples

def no_strip(*a, **k): return Image.new("RGB", (8, 8))

@pytest.fixture(autouse=True)
def no_samples(monkeypatch): monkeypatch.setattr(finetune, "samples", no_strip)

@pytest.fixture(scope="module")
def where(tmp_path_factory): return str(sd35(tmp_path_factory.mktemp("sd35")/"sd35"))

@pytest.fixture(scope="module")
def plain(where): return plain_pipe(where)

def plain_pipe(where):
    "The pipeline as diffusers loads it."
    from diffusers import StableDiffusion3Img2ImgPipeline
    with quiet(): pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(where)
    pipe.set_progress_bar_config(disable=True)
    return pipe

@pytest.fixture(scope="module")
def few():
    "Five classes, one image each."
    return get_split("nano-digits-1", 0)

def train(part, split, folder, where, previous=None, seed=0):
    "The counts of a training with final settings."
    folder.mkdir(exist_ok=True)
    backbone = get_backbone(where)
    return settled(part, backbone, split.task).train(split, backbone, previous, folder, seed, progress=False)

def learned(folder): return load_file(Path(folder)/EMBEDDINGS)
def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
def first_loss(folder): return pd.read_csv(folder/"loss.csv").loss[0]
def levels(image): return np.asarray(image).astype(int)

def by_key(pool):
    return {(r.source_id, r.copy): levels(pool.image(i)) for i, r in enumerate(pool.rows.itertuples())}

def distance(a, b):
    "The largest difference between the images of two pools, of 255."
    a, b = by_key(a), by_key(b)
    assert set(a) == set(b) and len(a) > 0
    return max(np.abs(v - b[k]).max() for k, v in a.items())

@pytest.fixture(scope="module")
def tuned(few, where, tmp_path_factory):
    "(folder of words, folder of words and LoRA)"
    words, lora = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "samples", no_strip)
        train(TI, few, words, where)
        train(DB, few, lora, where, words)
    return words, lora

# the checkpoint

def test_a_folder_says_what_it_is(where):
    b = get_backbone(where)
    assert (b.kind, b.resolution, b.guidance_scale, b.lcm, b.name) == ("sd3", 32, 7., None, where)
    assert BACKBONES.get("sd35").kind == "sd3"
    pipe = load_pipeline(b, "cpu")
    assert type(pipe).__name__ == "StableDiffusion3Img2ImgPipeline" and isinstance(model_of(pipe), Flow)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipe.scheduler.config.shift == 3
    assert sum(p.stat().st_size for p in Path(where).rglob("*")) < 2**20

def test_without_t5(few, where, plain, tmp_path):
    "T5 is left out by name, or just deleted: zeros stand in its place, as in diffusers."
    cut = shutil.copytree(where, tmp_path/"cut")
    for name in ("text_encoder_3", "tokenizer_3"): shutil.rmtree(cut/name)
    folders = [str(cut), str(sd35(tmp_path/"named", t5=False))]
    theirs = plain.encode_prompt("a photo of a bag", None, None, do_classifier_free_guidance=False)
    for folder in folders:
        pipe = open_pipeline(get_backbone(folder), "cpu")
        words, pooled = Flow(pipe).embed(["a photo of a bag"])
        assert pipe.text_encoder_3 is None and words.shape == (1, 77 + T5_TOKENS, JOINT)
        assert (words[:, 77:] == 0).all() and torch.equal(words[:, :77], theirs[0][:, :77])
        assert torch.equal(pooled, theirs[2])
    pools = [generate_pool(PART, few, tmp_path/f"pool{i}", backbone=f) for i, f in enumerate(folders)]
    assert distance(*pools) == 0
    assert train(TI, few, tmp_path/"words", folders[0])["steps"] == 3

# text

def test_prompts_are_embedded_as_diffusers_does(where, plain):
    texts = ["a photo of a bag", "", "the dark ankle boot " + "of "*100]
    words, pooled = Flow(load_pipeline(get_backbone(where), "cpu")).embed(texts)
    with torch.no_grad(), quiet():
        theirs = plain.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
    assert words.shape == (3, 77 + T5_TOKENS, JOINT) and pooled.shape == (3, sum(WIDTHS))
    assert torch.equal(words, theirs[0]) and torch.equal(pooled, theirs[2])

def test_the_pooled_vector_stays_at_the_end_of_the_text(where, tuned):
    """A checkpoint's config names a wrong token; a new word has a larger number than the end of the text and
    must not take its place."""
    pipe = open_pipeline(get_backbone(where), "cpu", str(tuned[0]))
    ids = Flow(pipe).ids(["a photo of a <nine>"])
    for k, (_, tokenizer, encoder) in enumerate(Flow(pipe).readers):
        config = Path(where)/("text_encoder" + "_2"*k)/"config.json"
        assert json.loads(config.read_text())["eos_token_id"] == 2
        part = ids[:, 77*k:77*(k + 1)]
        assert tokenizer.convert_tokens_to_ids("<nine>") in part
        with torch.no_grad(): out = encoder(part)
        end = part[0].tolist().index(tokenizer.eos_token_id)
        projected = encoder.text_projection(out.last_hidden_state[0, end])
        assert torch.allclose(out.text_embeds[0], projected, atol=1e-6)

# SDEdit

WHOLE = SDEdit(strength=1., num_inference_steps=3, num_copies=1)
UNGUIDED = SDEdit(strength=.9, num_inference_steps=5, num_copies=1, guidance_scale=1.)

@pytest.mark.parametrize("part, asked, runs", [(PART, .5, 4), (WHOLE, 1., 3), (UNGUIDED, .8, 4)],
                         ids=["half", "whole", "rounded, unguided"])
def test_equal_to_calling_diffusers_directly(few, where, plain, tmp_path, part, asked, runs):
    "`asked`: the strength at which the pipeline itself runs as many steps."
    made, calls = generate_pool(part, few, tmp_path, backbone=where, batch_size=7), []
    hook = plain.transformer.register_forward_hook(lambda *a: calls.append(1))
    for i, r in enumerate(made.rows.itertuples()):
        x = torch.from_numpy(levels(few.train.read(few.train.ids.index(r.source_id)))/127.5 - 1)
        with torch.no_grad(): z = plain.vae.encode(x.permute(2, 0, 1).float()[None]).latent_dist.mode()
        image = plain(f"a photo of {few.class_names[r.label]}", image=(z - .0609)*1.5305, strength=asked,
                      num_inference_steps=part.num_inference_steps, guidance_scale=part.guidance_scale or 7.,
                      generator=generator_for(0, r.source_id, r.copy, "noise"), height=32, width=32).images[0]
        assert np.abs(levels(image) - levels(made.image(i))).max() <= LEVELS and r.steps == runs
    hook.remove()
    assert len(calls) == runs*len(made) and np.ptp(levels(made.image(0))) > 50

@pytest.mark.parametrize("strength, steps", [(.1, 25), (.9, 25), (.28, 25), (.5, 5), (1., 4), (.9, 3)])
def test_executed_steps_are_counted(few, where, tmp_path, strength, steps):
    calls, pipe = [], load_pipeline(get_backbone(where), "cpu", None, False)
    hook = pipe.transformer.register_forward_hook(lambda *a: calls.append(1))
    part = SDEdit(strength=strength, num_inference_steps=steps, num_copies=1)
    try: made = generate_pool(part, few, tmp_path, backbone=where)
    finally: hook.remove()
    assert len(calls) == int(steps*strength) == made.rows.steps[0]

def test_batches_and_order_do_not_matter(few, where, tmp_path):
    part = SDEdit(prompt="article", strength=(.4, .8), num_inference_steps=5, num_copies=3, target="any",
                  label="soft")
    def pool(split, name, n): return generate_pool(part, split, tmp_path/name, backbone=where, batch_size=n)
    one, seven, together = pool(few, "one", 1), pool(few, "seven", 7), pool(few, "together", 64)
    shuffled = dataclasses.replace(few, train=few.train.take([3, 1, 0, 4, 2]))
    other = pool(shuffled, "order", 7)
    assert max(distance(p, together) for p in (one, seven, other)) <= LEVELS
    assert len({image.tobytes() for image in by_key(together).values()}) == 15

# training

def encoders_of(where, names):
    "{key: (tokenizer, text encoder, start of new words)} of both CLIPs, with the words `names`."
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer
    encoders = {}
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        tokenizer = CLIPTokenizer.from_pretrained(where, subfolder="tokenizer" + suffix)
        text = CLIPTextModelWithProjection.from_pretrained(where, subfolder="text_encoder" + suffix)
        tokenizer.add_tokens(names)
        old = text.get_input_embeddings().weight.detach()
        start = old[tokenizer.convert_tokens_to_ids("the</w>")]
        table = torch.cat([old, start.expand(len(names), -1)])
        text.set_input_embeddings(torch.nn.Embedding.from_pretrained(table, freeze=False))
        encoders[key] = tokenizer, text, start
    return encoders

def read_by_hand(encoders, t5, t5_tokenizer, text):
    "(sequence, pooled vector) of a text."
    hidden, pooled = [], []
    for tokenizer, model, _ in encoders.values():
        ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        out = model(ids, output_hidden_states=True)
        end = ids[0].tolist().index(tokenizer.eos_token_id)
        hidden.append(out.hidden_states[-2])
        pooled.append(model.text_projection(out.last_hidden_state[:, end]))
    width = sum(h.shape[-1] for h in hidden)
    clip = torch.cat([*hidden, torch.zeros(1, 77, JOINT - width)], -1)
    third = t5(t5_tokenizer(text, padding="max_length", max_length=256, return_tensors="pt").input_ids)[0]
    return torch.cat([clip, third], 1), torch.cat(pooled, -1)

def first_batch(split, seed, size):
    "(image, point, noise, place on the line, template) of each member of the first batch."
    n = len(split.train)
    order = sorted(range(n), key=lambda i: split.train.ids[i])
    shuffled = torch.randperm(n, generator=generator_for(seed, "words", "round", 0)).tolist()
    g = generator_for(seed, "words", 0)
    point, noise = torch.randn(size, 16, 4, 4, generator=g), torch.randn(size, 16, 4, 4, generator=g)
    # the view: there is only one
    torch.rand(size, generator=g)
    place = (torch.sigmoid(torch.randn(size, generator=g))*1000).long()
    template = torch.randint(27, (size,), generator=g)
    return zip([order[k] for k in shuffled[:size]], point, noise, place, template)

def by_hand(where, split, seed, size):
    "({encoder: gradient of its new rows}, {encoder: their start}, loss) of a first step."
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import AutoTokenizer, T5EncoderModel
    vae = AutoencoderKL.from_pretrained(where, subfolder="vae")
    net = SD3Transformer2DModel.from_pretrained(where, subfolder="transformer")
    t5 = T5EncoderModel.from_pretrained(where, subfolder="text_encoder_3")
    t5_tokenizer = AutoTokenizer.from_pretrained(where, subfolder="tokenizer_3")
    names = [f"<{n}>" for n in split.class_names]
    encoders, total = encoders_of(where, names), 0
    for i, point, noise, place, template in first_batch(split, seed, size):
        x = torch.from_numpy(levels(split.train.read(i))/127.5 - 1).permute(2, 0, 1).float()[None]
        with torch.no_grad(): d = vae.encode(x).latent_dist
        z = (d.mean + d.std*point - .0609)*1.5305
        straight = (1000 - place.item())/1000
        sigma = 3*straight/(1 + 2*straight)
        text = TEMPLATES[template].format(names[split.train.labels[i]])
        words, pooled = read_by_hand(encoders, t5, t5_tokenizer, text)
        text = {"encoder_hidden_states": words, "pooled_projections": pooled}
        said = net((1 - sigma)*z + sigma*noise, timestep=torch.tensor([1000*sigma]), **text).sample
        total = total + ((said - (noise - z))**2).mean()/size
    total.backward()
    grads = {k: text.get_input_embeddings().weight.grad[-len(names):] for k, (_, text, _) in encoders.items()}
    return grads, {k: start for k, (_, _, start) in encoders.items()}, total.item()

def test_first_loss_gradient_and_update(few, where, tmp_path, monkeypatch):
    seen, real = {}, finetune.resumable
    def spy(steps, step, state, path, **how):
        out = real(steps, step, state, path, **how)
        seen.update(state["optimizer"].state_dict()["state"])
        return out
    monkeypatch.setattr(finetune, "resumable", spy)
    train(TextualInversion(steps=1, batch_size=3, lr=.01), few, tmp_path, where, seed=4)
    grads, starts, loss = by_hand(where, few, 4, 3)
    assert abs(first_loss(tmp_path) - loss) < 1e-5 and set(seen) == {0, 1}
    for k, (key, grad) in enumerate(grads.items()):
        found, largest = seen[k]["exp_avg"]/(1 - .9), float(grad.abs().max())
        assert largest > 1e-6 and torch.allclose(found, grad, rtol=1e-3, atol=largest*1e-3)
        assert (grad.abs().sum(1) > 0).sum() == 3
        after = torch.cat([learned(tmp_path)[f"{key}/<{n}>"] for n in few.class_names])
        expected = starts[key]*(1 - .01*1e-2) - .01*found/(found.abs() + 1e-8)
        assert torch.allclose(after, expected, atol=1e-6)

def test_nothing_else_moves(few, where, tmp_path, monkeypatch):
    kept, real = [], finetune.frozen
    def keeping(*a):
        kept.append(real(*a))
        return kept[-1]
    monkeypatch.setattr(finetune, "frozen", keeping)
    train(TI, few, tmp_path/"a", where)
    train(DB, few, tmp_path/"b", where, tmp_path/"a")
    before = open_pipeline(get_backbone(where), "cpu")
    names = ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    for pipe, name in ((pipe, name) for pipe in kept for name in names):
        old, state = getattr(before, name).state_dict(), getattr(pipe, name).state_dict()
        now = {k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k}
        there = {k for k in old if not k.endswith("token_embedding.weight")}
        assert there <= set(now) and all(torch.equal(old[k], now[k]) for k in there), name

def noise(seed, *shape): return torch.randn(shape, generator=generator_for(seed))

def test_a_lora_starts_from_the_network_as_it_was(where):
    pipe = frozen(get_backbone(where))
    x = dict(hidden_states=noise(0, 2, 16, 4, 4), timestep=torch.tensor([30., 700.]),
             encoder_hidden_states=noise(1, 2, 9, JOINT), pooled_projections=noise(2, 2, sum(WIDTHS)))
    with torch.no_grad(): before = pipe.transformer(**x).sample
    weights = add_lora(pipe.transformer, 4, 0)
    with torch.no_grad(): assert torch.equal(before, pipe.transformer(**x).sample)
    names = {n.split(".lora_A")[0] for n, p in pipe.transformer.named_parameters() if "lora_A" in n}
    first, second = ({n.split(block)[1] for n in names if block in n} for block in ("blocks.0.", "blocks.1."))
    assert second == {f"attn.{a}" for a in ATTENTION}
    assert first == second | {f"attn2.{a}" for a in ATTENTION[:4]} and len(weights) == 2*len(names) == 32

def test_first_loss_of_a_lora_is_that_of_the_words(few, where, tuned, tmp_path):
    train(dataclasses.replace(DB, steps=1), few, tmp_path, where, tuned[0], seed=2)
    pipe = frozen(get_backbone(where), tuned[0])
    latents = Latents(pipe, few.train, lambda image, sample_id: cropped(image, 32, 4, 2, sample_id), 32)
    texts = template_ids(pipe, [f"<{n}>" for n in few.class_names])
    loss = denoising(pipe, latents, few.train, range(5), texts, 3, 2, "lora")
    with torch.no_grad(): assert abs(loss(0, [0, 1, 2]).mean().item() - first_loss(tmp_path)) < 1e-6

def test_latents_are_those_of_generation(few, where):
    pipe = frozen(get_backbone(where))
    latents = Latents(pipe, few.train, lambda image, _: mirrored(image, 32, 0.), 32)
    found = latents.draw(range(5), torch.zeros(5), torch.zeros(5, 16, 4, 4))
    assert torch.allclose(found, encode(pipe, [few.train.read(i) for i in range(5)], 32), atol=1e-5)

ONE_BY_ONE = dataclasses.replace(TI, per_class=True, steps=2)

@pytest.mark.parametrize("part, at", [(ONE_BY_ONE, 5), (TI, 1), (DB, 2)],
                         ids=["words one by one", "words", "lora"])
def test_broken_off_and_taken_up_again(few, where, tmp_path, breaks_off, part, at):
    train(part, few, tmp_path/"whole", where)
    calls = breaks_off(at)
    with pytest.raises(KeyboardInterrupt): train(part, few, tmp_path/"torn", where)
    assert not (tmp_path/"torn"/"loss.csv").exists() and list((tmp_path/"torn").glob("checkpoint*.pt"))
    train(part, few, tmp_path/"torn", where)
    assert files(tmp_path/"torn") == files(tmp_path/"whole")
    assert len(calls) == part.steps*(5 if part is ONE_BY_ONE else 1) + 1

# what is written

def test_files(few, tuned):
    words, lora = tuned
    assert set(files(words)) == {EMBEDDINGS, TOKENS, "loss.csv", "samples.png"}
    assert set(files(lora)) == set(files(words)) | {LORA}
    assert files(lora)[EMBEDDINGS] == files(words)[EMBEDDINGS]
    widths = dict(zip(("clip_l", "clip_g"), WIDTHS))
    expected = {f"{e}/<{n}>": (1, width) for e, width in widths.items() for n in few.class_names}
    assert {k: tuple(v.shape) for k, v in learned(words).items()} == expected
    assert json.loads((words/TOKENS).read_text()) == {n: f"<{n}>" for n in few.class_names}
    assert all(k.startswith("transformer.") for k in load_file(lora/LORA))

def test_words_go_into_any_pipeline(few, where, tuned):
    "The tables get the new rows, and no other word moves."
    pipe, rows = plain_pipe(where), learned(tuned[0])
    parts = {"clip_l": (pipe.text_encoder, pipe.tokenizer), "clip_g": (pipe.text_encoder_2, pipe.tokenizer_2)}
    before = {key: encoder.get_input_embeddings().weight.clone() for key, (encoder, _) in parts.items()}
    load_words(pipe, tuned[0])
    for key, (encoder, tokenizer) in parts.items():
        old, table = before[key], encoder.get_input_embeddings().weight
        assert torch.equal(table[:len(old)], old) and len(table) == len(old) + 5 == len(tokenizer)
        for name in few.class_names:
            number = tokenizer.convert_tokens_to_ids(f"<{name}>")
            assert torch.equal(table[number], rows[f"{key}/<{name}>"][0])

@pytest.mark.parametrize("which", ["words", "lora", "both"])
def test_plain_diffusers_makes_the_same_images(few, where, tuned, tmp_path, which):
    folder = {"words": tuned[0], "both": tuned[1]}.get(which) or tmp_path/"lora"
    if which == "lora": train(DB, few, folder, where)
    part = SDEdit(prompt="article", strength=.75, num_inference_steps=8, num_copies=1)
    pool = generate_pool(part, few, tmp_path/"pool", backbone=where, adaptation=str(folder))
    bare = generate_pool(part, few, tmp_path/"bare", backbone=where)
    pipe = plain_pipe(where)
    if which != "lora": load_words(pipe, folder)
    if which != "words": pipe.load_lora_weights(str(folder))
    for i, r in enumerate(pool.rows.itertuples()):
        name = few.class_names[r.label]
        assert r.prompt == f"a photo of a {name if which == 'lora' else f'<{name}>'}"
        z, g = encode(pipe, [few.train.read(i)], 32), generator_for(0, r.source_id, 0, "noise")
        image = pipe(r.prompt, image=z, strength=.75, num_inference_steps=8, guidance_scale=7., generator=g,
                     height=32, width=32).images[0]
        assert np.abs(levels(image) - levels(pool.image(i))).max() <= LEVELS
    assert any(not np.array_equal(levels(pool.image(i)), levels(bare.image(i))) for i in range(5))

def test_several_tokens_per_class_and_samples(few, where, tmp_path):
    train(dataclasses.replace(TI, num_vectors=2), few, tmp_path, where)
    pipe, b = open_pipeline(get_backbone(where), "cpu", str(tmp_path)), get_backbone(where)
    assert {v.shape[0] for v in learned(tmp_path).values()} == {2}
    assert Flow(pipe).written(["a photo of a <nine>"]) == ["a photo of a <nine> <nine>_1"]
    second = template_ids(pipe, ["<nine>"])[0, 0, 77:]
    assert pipe.tokenizer_2.convert_ids_to_tokens(second[5:7].tolist()) == ["<nine>", "<nine>_1"]
    one, again, other = (levels(draw_samples(b, few, a, n=2)) for a in (tmp_path, tmp_path, None))
    assert one.shape == (32, 64, 3) and np.array_equal(one, again) and not np.array_equal(one, other)

# methods, end to end

TASK = dataclasses.replace(get_task("nano-scans-25"), shots=2, val_per_class=2)
SHORT = dataclasses.replace(TASK.training, epochs=1, evaluations=1, batch_size=8)
TASK = dataclasses.replace(TASK, training=SHORT)
QUICK = {"strength": .5, "num_inference_steps": 4, "num_copies": 2, "TextualInversion.steps": 1,
         "TextualInversion.batch_size": 2, "DreamBoothLoRA.steps": 1, "DreamBoothLoRA.batch_size": 2}

def on(where): return [dataclasses.replace(TASK, backbone=where)]

def test_methods_run_from_end_to_end(where, store):
    methods = ["real-guidance", "da-fusion", "diff-aug", "diff-mix"]
    table = run_all(plan(methods, on(where), (0,), **QUICK), store, progress=False)
    assert list(table.method) == methods and table.top1.between(0, 100).all()
    assert (table.n_synthetic == 2*table.n_real).all()
    # what the methods have in common is made once
    folders = (store.root/"adaptation").iterdir()
    tuned = [sorted(p.name for p in folder.glob("*.safetensors")) for folder in folders]
    assert sorted(tuned) == [[EMBEDDINGS], [EMBEDDINGS, LORA]]

@pytest.mark.parametrize("at", ["final", "initial"])
def test_gif_moves_latents_of_sixteen_channels(few, where, tmp_path, monkeypatch, at):
    tiny = dataclasses.replace(get_backbone(where), name="tiny", clip=get_backbone("nano").clip)
    monkeypatch.setitem(BACKBONES.known, "tiny", tiny)
    part = GIF(strength=.5, num_inference_steps=4, num_copies=2, hflip=0., rotation=0., perturb_at=at)
    def pool(part, name, size=64):
        return generate_pool(part, few, tmp_path/name, backbone="tiny", batch_size=size)
    still = pool(dataclasses.replace(part, epsilon=0.), "still")
    made, ones = pool(part, "made"), pool(part, "ones", 2)
    # another prompt
    plain = pool(SDEdit(prompt="class", strength=.5, num_inference_steps=4, num_copies=2), "plain")
    assert distance(still, plain) > LEVELS and distance(made, still) > LEVELS >= distance(made, ones)

@pytest.mark.parametrize("method, says", [
    ("diffusemix", "Backbone .* has no InstructPix2Pix editor that goes with it, and this method needs one; "
                   "choose another backbone .nano, sd14, sd15"),
    ("diff-ii", "CircleInterpolation does not run on backbone .*: it inverts DDIM, .* "
                "It runs on those of Stable Diffusion 1 and 2"),
    ("mvc", "MVCTuning does not run on backbone .*: it widens a U-Net .* "
            "It runs on those of Stable Diffusion 1 and 2")])
def test_methods_that_need_the_older_versions_say_so(where, store, method, says):
    with pytest.raises(DiffDAError, match=says):
        run_all(plan([method], on(where), (0,)), store, progress=False)
    # before anything is trained
    assert not store.root.exists()

@pytest.mark.parametrize("part, adaptation, says", [
    (SDEdit(lcm=True), False, "has no latent-consistency LoRA that goes with it"),
    (get_method("diffusemix").generate, False, "has no InstructPix2Pix editor that goes with it"),
    (PART, True, "holds nothing that fine-tuning has learned")])
def test_refused_pools(few, where, tmp_path, part, adaptation, says):
    (tmp_path/"empty").mkdir()
    learned_in = str(tmp_path/"empty") if adaptation else None
    with pytest.raises(DiffDAError, match=says):
        generate_pool(part, few, tmp_path/"pool", backbone=where, adaptation=learned_in)

def test_words_of_another_generator(few, where, tuned, tmp_path):
    train(dataclasses.replace(TI, steps=1), few, tmp_path, "nano")
    says = "no words of 16 numbers for the text encoder 'clip_l'; they were learned with another generator"
    with pytest.raises(DiffDAError, match=says): open_pipeline(get_backbone(where), "cpu", str(tmp_path))
    with pytest.raises(DiffDAError): open_pipeline(get_backbone("nano"), "cpu", str(tuned[0]))

def test_a_damaged_checkpoint(where, tmp_path):
    broken = shutil.copytree(where, tmp_path/"broken")
    (broken/"transformer"/"diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(DiffDAError, match="cannot be loaded from .*broken"):
        open_pipeline(get_backbone(str(broken)), "cpu")
    (broken/"model_index.json").write_text("{")
    with pytest.raises(DiffDAError, match="model_index.json is damaged"): get_backbone(str(broken))

@pytest.mark.parametrize("steps", [1, 3, 25, 1000])
def test_rounded(steps):
    "The pipeline's own arithmetic, for every strength of a grid that has steps to run."
    for strength in np.linspace(.001, 1, 400):
        expected = min(int(steps*strength), steps)
        if not expected: continue
        asked = min(steps*rounded(strength, steps), steps)
        assert steps - int(max(steps - asked, 0)) == expected

@pytest.mark.gpu
def test_on_a_gpu(few, where, tmp_path):
    train(TI, few, tmp_path/"a", where)
    train(DB, few, tmp_path/"b", where, tmp_path/"a")
    for folder in (tmp_path/"a", tmp_path/"b"):
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in learned(folder).values())
    tuned = str(tmp_path/"b")
    pipe = open_pipeline(get_backbone(where), "cuda", tuned)
    parts = (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    assert {part.dtype for part in parts} == {torch.float16}
    kept = [module.wo.weight.dtype for module in pipe.text_encoder_3.modules() if hasattr(module, "wo")]
    assert set(kept) == {torch.float32}
    one = generate_pool(PART, few, tmp_path/"one", backbone=where, adaptation=tuned, batch_size=1)
    assert distance(one, generate_pool(PART, few, tmp_path/"all", backbone=where, adaptation=tuned)) <= 8
