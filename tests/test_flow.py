"""Stable Diffusion 3.5 on a tiny checkpoint of its format: what plain diffusers and a computation by hand give, whatever the batch; and the methods, from end to end."""
import dataclasses, json, shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file

from diffda import finetune
from diffda.backbone import BACKBONES, EMBEDDINGS, LORA, TOKENS, encode, get_backbone, load_pipeline, model_of, quiet
from diffda.core import DiffDAError, generator_for
from diffda.data import get_split, get_task
from diffda.finetune import ATTENTION, DreamBoothLoRA, Latents, TextualInversion, add_lora, captions, cropped, denoising, frozen, mirrored
from diffda.flow import T5_TOKENS, Flow, load_words, rounded
from diffda.generate import SDEdit, generate_pool
from diffda.method import get_method
from diffda.methods.gif import GIF
from diffda.pipeline import plan, record_of, run_all
from diffda.prompts import TEMPLATES
from tiny_sd35 import JOINT, WIDTHS, sd35

LEVELS = 2
TI, DB = TextualInversion(steps=3, batch_size=3, lr=.05), DreamBoothLoRA(steps=3, batch_size=3, lr=.05)
PART = SDEdit(strength=.5, num_inference_steps=8, num_copies=3)
draw_samples = finetune.samples

@pytest.fixture(autouse=True)
def no_samples(monkeypatch): monkeypatch.setattr(finetune, "samples", lambda *a, **k: Image.new("RGB", (8, 8)))

@pytest.fixture(scope="module")
def where(tmp_path_factory): return str(sd35(tmp_path_factory.mktemp("sd35")/"sd35"))

@pytest.fixture(scope="module")
def plain(where):
    "The pipeline as diffusers loads it."
    from diffusers import StableDiffusion3Img2ImgPipeline
    with quiet(): pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(where)
    pipe.set_progress_bar_config(disable=True)
    return pipe

@pytest.fixture(scope="module")
def few(): return get_split("nano-digits-1", 0)               # five classes, one image each

def train(part, split, folder, where, previous=None, seed=0): return part.train(split, where, previous, folder, seed, progress=False)
def learned(folder): return load_file(Path(folder)/EMBEDDINGS)
def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
def by_key(pool): return {(r.source_id, r.copy): np.asarray(pool.image(i)).astype(int) for i, r in enumerate(pool.rows.itertuples())}
def distance(a, b):
    a, b = by_key(a), by_key(b)
    assert set(a) == set(b) and len(a) > 0
    return max(np.abs(v - b[k]).max() for k, v in a.items())

@pytest.fixture(scope="module")
def tuned(few, where, tmp_path_factory):
    "(folder of words, folder of words and LoRA)"
    words, lora = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "samples", lambda *a, **k: Image.new("RGB", (8, 8)))
        train(TI, few, words, where); train(DB, few, lora, where, words)
    return words, lora

# the checkpoint

def test_a_folder_says_what_it_is(where):
    b = get_backbone(where)
    assert (b.kind, b.resolution, b.guidance_scale, b.lcm, b.name) == ("sd3", 32, 7., None, where) and BACKBONES["sd35"].kind == "sd3"
    pipe = load_pipeline(b, "cpu")
    assert type(pipe).__name__ == "StableDiffusion3Img2ImgPipeline" and type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and pipe.scheduler.config.shift == 3
    assert isinstance(model_of(pipe), Flow) and sum(p.stat().st_size for p in Path(where).rglob("*")) < 2**20

def test_without_t5(few, where, plain, tmp_path):
    "T5 is left out by name, or just deleted: zeros stand in its place, as in diffusers."
    shutil.copytree(where, tmp_path/"cut")
    for n in ("text_encoder_3", "tokenizer_3"): shutil.rmtree(tmp_path/"cut"/n)
    folders = [str(tmp_path/"cut"), str(sd35(tmp_path/"named", t5=False))]
    for f in folders:
        pipe = load_pipeline.__wrapped__(get_backbone(f), "cpu")
        whole, pooled = Flow(pipe).embed(["a photo of a bag"])
        assert pipe.text_encoder_3 is None and whole.shape == (1, 77 + T5_TOKENS, JOINT) and (whole[:, 77:] == 0).all()
        theirs = plain.encode_prompt("a photo of a bag", None, None, do_classifier_free_guidance=False)
        assert torch.equal(whole[:, :77], theirs[0][:, :77]) and torch.equal(pooled, theirs[2])
    assert distance(*(generate_pool(PART, few, tmp_path/f"pool{i}", backbone=f) for i, f in enumerate(folders))) == 0
    assert train(TI, few, tmp_path/"words", folders[0])["steps"] == 3

# text

def test_prompts_are_embedded_as_diffusers_does(where, plain):
    texts = ["a photo of a bag", "", "the dark ankle boot " + "of "*100]
    mine = Flow(load_pipeline(get_backbone(where), "cpu")).embed(texts)
    with torch.no_grad(), quiet(): theirs = plain.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
    assert mine[0].shape == (3, 77 + T5_TOKENS, JOINT) and mine[1].shape == (3, sum(WIDTHS))
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[2])

def test_the_pooled_vector_stays_at_the_end_of_the_text(few, where, tuned):
    "A checkpoint's config names a wrong token; a new word has a larger number than the end of the text and must not take its place."
    pipe = load_pipeline.__wrapped__(get_backbone(where), "cpu", str(tuned[0]))
    ids = Flow(pipe).ids(["a photo of a <nine>"])
    for k, (tokenizer, encoder) in enumerate(Flow(pipe).encoders.values()):
        part = ids[:, 77*k:77*(k + 1)]
        assert tokenizer.convert_tokens_to_ids("<nine>") in part and json.loads((Path(where)/("text_encoder" + "_2"*k)/"config.json").read_text())["eos_token_id"] == 2
        with torch.no_grad(): out = encoder(part)
        end = part[0].tolist().index(tokenizer.eos_token_id)
        assert torch.allclose(out.text_embeds[0], encoder.text_projection(out.last_hidden_state[0, end]), atol=1e-6)

# SDEdit

@pytest.mark.parametrize("part, asked, runs", [(PART, .5, 4), (SDEdit(strength=1., num_inference_steps=3, num_copies=1), 1., 3), (SDEdit(strength=.9, num_inference_steps=5, num_copies=1, guidance_scale=1.), .8, 4)],
                         ids=["half", "whole", "rounded, unguided"])
def test_equal_to_calling_diffusers_directly(few, where, plain, tmp_path, part, asked, runs):
    "`asked`: the strength at which the pipeline itself runs as many steps; where steps*strength is whole it is the strength."
    made, calls, vae = generate_pool(part, few, tmp_path, backbone=where, batch_size=7), [], plain.vae
    hook = plain.transformer.register_forward_hook(lambda *a: calls.append(1))
    position = {s: i for i, s in enumerate(few.train.ids)}
    for i, r in enumerate(made.rows.itertuples()):
        x = torch.from_numpy(np.asarray(few.train.read(position[r.source_id]))/127.5 - 1).permute(2, 0, 1).float()[None]
        with torch.no_grad(): latent = (vae.encode(x).latent_dist.mode() - .0609)*1.5305
        image = plain(f"a photo of {few.class_names[r.label]}", image=latent, strength=asked, num_inference_steps=part.num_inference_steps, guidance_scale=part.guidance_scale or 7.,
                      generator=generator_for(0, r.source_id, r.copy, "noise"), height=32, width=32).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(made.image(i))).max() <= LEVELS and r.steps == runs
    hook.remove()
    assert len(calls) == runs*len(made) and np.ptp(np.asarray(made.image(0))) > 50

@pytest.mark.parametrize("strength, steps", [(.1, 25), (.9, 25), (.28, 25), (.5, 5), (1., 4), (.9, 3)])
def test_executed_steps_are_counted(few, where, tmp_path, strength, steps):
    calls, pipe = [], load_pipeline(get_backbone(where), "cpu", None, False)
    hook = pipe.transformer.register_forward_hook(lambda *a: calls.append(1))
    try: made = generate_pool(SDEdit(strength=strength, num_inference_steps=steps, num_copies=1), few, tmp_path, backbone=where)
    finally: hook.remove()
    assert len(calls) == int(steps*strength) == made.rows.steps[0]

def test_batches_and_order_do_not_matter(few, where, tmp_path):
    part = SDEdit(prompt="article", strength=(.4, .8), num_inference_steps=5, num_copies=3, target="any", label="soft")
    one, seven, all_ = (generate_pool(part, few, tmp_path/str(n), backbone=where, batch_size=n) for n in (1, 7, 64))
    other = generate_pool(part, dataclasses.replace(few, train=few.train.take([3, 1, 0, 4, 2])), tmp_path/"order", backbone=where, batch_size=7)
    assert max(distance(p, all_) for p in (one, seven, other)) <= LEVELS and len({v.tobytes() for v in by_key(all_).values()}) == 15

# training

def by_hand(where, split, seed, batch):
    "({encoder: gradient of its new rows}, {encoder: their start}, loss) of a first step, with the checkpoint's parts, opened one by one."
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel
    vae, net, t5 = AutoencoderKL.from_pretrained(where, subfolder="vae"), SD3Transformer2DModel.from_pretrained(where, subfolder="transformer"), T5EncoderModel.from_pretrained(where, subfolder="text_encoder_3")
    t5_tokenizer, names = AutoTokenizer.from_pretrained(where, subfolder="tokenizer_3"), [f"<{n}>" for n in split.class_names]
    encoders = {}
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        tokenizer, text = CLIPTokenizer.from_pretrained(where, subfolder="tokenizer" + suffix), CLIPTextModelWithProjection.from_pretrained(where, subfolder="text_encoder" + suffix)
        tokenizer.add_tokens(names)
        old = text.get_input_embeddings().weight.detach()
        start = old[tokenizer.convert_tokens_to_ids("the</w>")]
        text.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat([old, start.expand(len(names), -1)]), freeze=False))
        encoders[key] = tokenizer, text, start
    n = len(split.train)
    order = sorted(range(n), key=lambda i: split.train.ids[i])
    order = [order[k] for k in torch.randperm(n, generator=generator_for(seed, "words", "round", 0)).tolist()][:batch]
    g = generator_for(seed, "words", 0)
    point, noise = torch.randn(batch, 16, 4, 4, generator=g), torch.randn(batch, 16, 4, 4, generator=g)
    torch.rand(batch, generator=g)                                       # the view: there is only one
    place = (torch.sigmoid(torch.randn(batch, generator=g))*1000).long()
    template = torch.randint(27, (batch,), generator=g)
    total = 0
    for j, i in enumerate(order):
        x = torch.from_numpy(np.asarray(split.train.read(i))/127.5 - 1).permute(2, 0, 1).float()[None]
        with torch.no_grad(): d = vae.encode(x).latent_dist
        z = (d.mean + d.std*point[j] - .0609)*1.5305
        straight = (1000 - place[j].item())/1000
        sigma = 3*straight/(1 + 2*straight)
        text = TEMPLATES[template[j]].format(names[split.train.labels[i]])
        hidden, pooled = [], []
        for tokenizer, model, _ in encoders.values():
            ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
            out = model(ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2]); pooled.append(model.text_projection(out.last_hidden_state[:, ids[0].tolist().index(tokenizer.eos_token_id)]))
        width = sum(h.shape[-1] for h in hidden)
        clip = torch.cat([*hidden, torch.zeros(1, 77, JOINT - width)], -1)
        third = t5(t5_tokenizer(text, padding="max_length", max_length=256, return_tensors="pt").input_ids)[0]
        said = net((1 - sigma)*z + sigma*noise[j], timestep=torch.tensor([1000*sigma]), encoder_hidden_states=torch.cat([clip, third], 1), pooled_projections=torch.cat(pooled, -1)).sample
        total = total + ((said - (noise[j] - z))**2).mean()/batch
    total.backward()
    return {k: e[1].get_input_embeddings().weight.grad[-len(names):] for k, e in encoders.items()}, {k: e[2] for k, e in encoders.items()}, total.item()

def test_first_loss_gradient_and_update(few, where, tmp_path, monkeypatch):
    seen, real = {}, finetune.resumable
    def spy(steps, step, state, path, **how):
        out = real(steps, step, state, path, **how)
        seen.update(state["optimizer"].state_dict()["state"])
        return out
    monkeypatch.setattr(finetune, "resumable", spy)
    train(TextualInversion(steps=1, batch_size=3, lr=.01), few, tmp_path, where, seed=4)
    grads, starts, loss = by_hand(where, few, 4, 3)
    assert abs(pd.read_csv(tmp_path/"loss.csv").loss[0] - loss) < 1e-5 and set(seen) == {0, 1}
    for k, (key, grad) in enumerate(grads.items()):
        found = seen[k]["exp_avg"]/(1 - .9)
        assert grad.abs().max() > 1e-6 and torch.allclose(found, grad, rtol=1e-3, atol=float(grad.abs().max())*1e-3) and (grad.abs().sum(1) > 0).sum() == 3
        after = torch.cat([learned(tmp_path)[f"{key}/<{n}>"] for n in few.class_names])
        assert torch.allclose(after, starts[key]*(1 - .01*1e-2) - .01*found/(found.abs() + 1e-8), atol=1e-6)

def test_nothing_else_moves(few, where, tmp_path, monkeypatch):
    kept, real = [], finetune.frozen
    monkeypatch.setattr(finetune, "frozen", lambda *a: kept.append(real(*a)) or kept[-1])
    train(TI, few, tmp_path/"a", where); train(DB, few, tmp_path/"b", where, tmp_path/"a")
    before = load_pipeline.__wrapped__(get_backbone(where), "cpu")
    for pipe in kept:
        for name in ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
            old, now = getattr(before, name).state_dict(), {k.replace(".base_layer", ""): v for k, v in getattr(pipe, name).state_dict().items() if "lora_" not in k}
            there = {k for k in old if not k.endswith("token_embedding.weight")}
            assert there <= set(now) and all(torch.equal(old[k], now[k]) for k in there), name

def test_a_lora_starts_from_the_network_as_it_was(few, where, tuned, tmp_path):
    pipe = frozen(get_backbone(where))
    x = dict(hidden_states=torch.randn(2, 16, 4, 4, generator=generator_for(0)), timestep=torch.tensor([30., 700.]), encoder_hidden_states=torch.randn(2, 9, JOINT, generator=generator_for(1)),
             pooled_projections=torch.randn(2, sum(WIDTHS), generator=generator_for(2)))
    with torch.no_grad(): before = pipe.transformer(**x).sample
    weights = add_lora(pipe.transformer, 4, 0)
    with torch.no_grad(): assert torch.equal(before, pipe.transformer(**x).sample)
    names = {n.split(".lora_A")[0] for n, p in pipe.transformer.named_parameters() if "lora_A" in n}
    ends = lambda block: sorted(n.split(f"blocks.{block}.")[1] for n in names if f"blocks.{block}." in n)
    assert ends(1) == sorted(f"attn.{a}" for a in ATTENTION) and ends(0) == sorted([*ends(1), *(f"attn2.{a}" for a in ATTENTION[:4])]) and len(weights) == 2*len(names) == 32
    train(dataclasses.replace(DB, steps=1), few, tmp_path, where, tuned[0], seed=2)
    pipe = frozen(get_backbone(where), tuned[0])
    latents = Latents(pipe, few.train, lambda im, sid: cropped(im, 32, 4, 2, sid), 32)
    loss = denoising(pipe, latents, few.train, range(5), captions(pipe, [f"<{n}>" for n in few.class_names]), 3, 2, "lora")
    with torch.no_grad(): assert abs(loss(0, [0, 1, 2]).mean().item() - pd.read_csv(tmp_path/"loss.csv").loss[0]) < 1e-6

def test_latents_are_those_of_generation(few, where):
    pipe = frozen(get_backbone(where))
    latents = Latents(pipe, few.train, lambda im, sid: mirrored(im, 32, 0.), 32)
    assert torch.allclose(latents.draw(range(5), torch.zeros(5), torch.zeros(5, 16, 4, 4)), encode(pipe, [few.train.read(i) for i in range(5)], 32), atol=1e-5)

@pytest.mark.parametrize("part, at", [(dataclasses.replace(TI, per_class=True, steps=2), 5), (TI, 1), (DB, 2)], ids=["words one by one", "words", "lora"])
def test_broken_off_and_taken_up_again(few, where, tmp_path, breaks_off, part, at):
    train(part, few, tmp_path/"whole", where)
    calls = breaks_off(at)
    with pytest.raises(KeyboardInterrupt): train(part, few, tmp_path/"torn", where)
    assert not (tmp_path/"torn"/"loss.csv").exists() and list((tmp_path/"torn").glob("checkpoint*.pt"))
    train(part, few, tmp_path/"torn", where)
    assert files(tmp_path/"torn") == files(tmp_path/"whole") and len(calls) == part.steps*(5 if getattr(part, "per_class", False) else 1) + 1

# what is written

def test_files(few, tuned):
    words, lora = tuned
    assert set(files(words)) == {EMBEDDINGS, TOKENS, "loss.csv", "samples.png"} and set(files(lora)) == set(files(words)) | {LORA} and files(lora)[EMBEDDINGS] == files(words)[EMBEDDINGS]
    assert {k: tuple(v.shape) for k, v in learned(words).items()} == {f"{e}/<{n}>": (1, w) for e, w in zip(("clip_l", "clip_g"), WIDTHS) for n in few.class_names}
    assert json.loads((words/TOKENS).read_text()) == {n: f"<{n}>" for n in few.class_names} and all(k.startswith("transformer.") for k in load_file(lora/LORA))

@pytest.mark.parametrize("which", ["words", "lora", "both"])
def test_plain_diffusers_makes_the_same_images(few, where, tuned, tmp_path, which):
    from diffusers import StableDiffusion3Img2ImgPipeline
    folder = {"words": tuned[0], "both": tuned[1]}.get(which) or tmp_path/"lora"
    if which == "lora": train(DB, few, folder, where)
    part = SDEdit(prompt="article", strength=.75, num_inference_steps=8, num_copies=1)
    pool, bare = generate_pool(part, few, tmp_path/"pool", backbone=where, adaptation=str(folder)), generate_pool(part, few, tmp_path/"bare", backbone=where)
    with quiet(): pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(where)
    pipe.set_progress_bar_config(disable=True)
    if which != "lora":
        tables = [pipe.text_encoder.get_input_embeddings().weight.clone(), pipe.text_encoder_2.get_input_embeddings().weight.clone()]
        load_words(pipe, folder)
        for old, e, t, key in zip(tables, (pipe.text_encoder, pipe.text_encoder_2), (pipe.tokenizer, pipe.tokenizer_2), ("clip_l", "clip_g")):
            rows = e.get_input_embeddings().weight
            assert torch.equal(rows[:len(old)], old) and len(rows) == len(old) + 5 == len(t) and all(torch.equal(rows[t.convert_tokens_to_ids(f"<{n}>")], learned(folder)[f"{key}/<{n}>"][0]) for n in few.class_names)
    if which != "words": pipe.load_lora_weights(str(folder))
    for i, r in enumerate(pool.rows.itertuples()):
        assert r.prompt == f"a photo of a {few.class_names[r.label] if which == 'lora' else '<' + few.class_names[r.label] + '>'}"
        image = pipe(r.prompt, image=encode(pipe, [few.train.read(i)], 32), strength=.75, num_inference_steps=8, guidance_scale=7., generator=generator_for(0, r.source_id, 0, "noise"), height=32, width=32).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(pool.image(i))).max() <= LEVELS
    assert any(not np.array_equal(np.asarray(pool.image(i)), np.asarray(bare.image(i))) for i in range(5))

def test_several_tokens_per_class_and_samples(few, where, tmp_path):
    train(dataclasses.replace(TI, num_vectors=2), few, tmp_path, where)
    pipe = load_pipeline.__wrapped__(get_backbone(where), "cpu", str(tmp_path))
    assert {v.shape[0] for v in learned(tmp_path).values()} == {2} and Flow(pipe).written(["a photo of a <nine>"]) == ["a photo of a <nine> <nine>_1"]
    assert [pipe.tokenizer_2.convert_ids_to_tokens(captions(pipe, ["<nine>"])[0, 0, 77 + k].item()) for k in (5, 6)] == ["<nine>", "<nine>_1"]
    b = get_backbone(where)
    strips = [np.asarray(draw_samples(b, few, a, n=2)) for a in (tmp_path, tmp_path, None)]
    assert strips[0].shape == (32, 64, 3) and np.array_equal(strips[0], strips[1]) and not np.array_equal(strips[0], strips[2])

# methods, end to end

TASK = dataclasses.replace(get_task("nano-scans-25"), shots=2, val_per_class=2)
TASK = dataclasses.replace(TASK, recipe=dataclasses.replace(TASK.recipe, epochs=1, evaluations=1, batch_size=8))
QUICK = {"strength": .5, "num_inference_steps": 4, "num_copies": 2, "TextualInversion.steps": 1, "TextualInversion.batch_size": 2, "DreamBoothLoRA.steps": 1, "DreamBoothLoRA.batch_size": 2}

def test_methods_run_from_end_to_end(where, store):
    methods = ["real-guidance", "da-fusion", "diff-aug", "diff-mix"]
    table = run_all(plan(methods, [dataclasses.replace(TASK, backbone=where)], (0,), **QUICK), store, progress=False)
    assert list(table.method) == methods and (table.n_synthetic == 2*table.n_real).all() and table.top1.between(0, 100).all()
    tuned = sorted(sorted(p.name for p in d.glob("*.safetensors")) for d in (store.root/"adaptation").iterdir())
    assert tuned == [[EMBEDDINGS], [EMBEDDINGS, LORA]]                    # what the methods have in common is made once

@pytest.mark.parametrize("at", ["final", "initial"])
def test_gif_moves_latents_of_sixteen_channels(few, where, tmp_path, monkeypatch, at):
    monkeypatch.setitem(BACKBONES, "tiny", dataclasses.replace(get_backbone(where), name="tiny", clip=BACKBONES["nano"].clip))
    part = GIF(strength=.5, num_inference_steps=4, num_copies=2, hflip=0., rotation=0., perturb_at=at)
    still, made, ones = (generate_pool(p, few, tmp_path/n, backbone="tiny", batch_size=size) for n, p, size in
                         (("still", dataclasses.replace(part, epsilon=0.), 64), ("made", part, 64), ("ones", part, 2)))
    assert distance(still, generate_pool(SDEdit(prompt="class", strength=.5, num_inference_steps=4, num_copies=2), few, tmp_path/"plain", backbone="tiny")) > LEVELS      # another prompt
    assert distance(made, still) > LEVELS >= distance(made, ones)

@pytest.mark.parametrize("method, says", [("diffusemix", "Backbone .* has no InstructPix2Pix editor that goes with it, and this method needs one; choose another backbone .nano, sd14, sd15"),
                                          ("diff-ii", "CircleInterpolation does not run on backbone .*: it inverts DDIM, .* It runs on nano, sd14"), ("mvc", "MVCTuning does not run on backbone .*: it widens a U-Net .* It runs on nano, sd14")])
def test_methods_that_need_the_older_versions_say_so(where, store, method, says):
    with pytest.raises(DiffDAError, match=says): record_of(plan([method], [dataclasses.replace(TASK, backbone=where)], (0,))[0], store, progress=False)
    assert not store.root.exists()                                        # before anything is trained

def test_other_refusals(few, where, tuned, tmp_path):
    with pytest.raises(DiffDAError, match="has no latent-consistency LoRA that goes with it"): generate_pool(SDEdit(lcm=True), few, tmp_path/"lcm", backbone=where)
    with pytest.raises(DiffDAError, match="has no InstructPix2Pix editor that goes with it"): generate_pool(get_method("diffusemix").generate, few, tmp_path/"edit", backbone=where)
    with pytest.raises(DiffDAError, match="holds nothing that fine-tuning has learned"): generate_pool(PART, few, tmp_path/"pool", backbone=where, adaptation=str(tmp_path))
    train(dataclasses.replace(TI, steps=1), few, tmp_path/"old", "nano")
    with pytest.raises(DiffDAError, match="holds no words of 16 numbers for the text encoder 'clip_l'; they were learned with another generator"): load_pipeline.__wrapped__(get_backbone(where), "cpu", str(tmp_path/"old"))
    with pytest.raises(DiffDAError): load_pipeline.__wrapped__(get_backbone("nano"), "cpu", str(tuned[0]))
    shutil.copytree(where, tmp_path/"broken"); (tmp_path/"broken"/"transformer"/"diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(DiffDAError, match="cannot be loaded from .*broken"): load_pipeline.__wrapped__(get_backbone(str(tmp_path/"broken")), "cpu")
    (tmp_path/"broken"/"model_index.json").write_text("{")
    with pytest.raises(DiffDAError, match="model_index.json is damaged"): get_backbone(str(tmp_path/"broken"))

@pytest.mark.parametrize("steps", [1, 3, 25, 1000])
def test_rounded(steps):
    "The pipeline's own arithmetic, for every strength of a grid that has steps to run."
    for s in np.linspace(.001, 1, 400):
        k = min(int(steps*s), steps)
        if k: assert steps - int(max(steps - min(steps*rounded(s, steps), steps), 0)) == k

@pytest.mark.gpu
def test_on_a_gpu(few, where, tmp_path):
    train(TI, few, tmp_path/"a", where); train(DB, few, tmp_path/"b", where, tmp_path/"a")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for f in ("a", "b") for v in learned(tmp_path/f).values())
    pipe = load_pipeline.__wrapped__(get_backbone(where), "cuda", str(tmp_path/"b"))
    assert {getattr(pipe, n).dtype for n in ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")} == {torch.float16}
    assert all(m.wo.weight.dtype == torch.float32 for m in pipe.text_encoder_3.modules() if hasattr(m, "wo"))
    assert distance(generate_pool(PART, few, tmp_path/"one", backbone=where, adaptation=str(tmp_path/"b"), batch_size=1), generate_pool(PART, few, tmp_path/"all", backbone=where, adaptation=str(tmp_path/"b"))) <= 8
