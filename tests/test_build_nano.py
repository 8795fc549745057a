"The nano world put together: the report's measures, a whole build in a few steps, and what is shipped."
import functools, hashlib, json, shutil

import numpy as np, pytest, torch
from diffda import build_data as bd
from diffda import build_models as bm
from diffda import build_nano as bn
from diffda.core import digest
from diffda.datasets.nano import WORLD
from diffda.generate import get_backbone
from diffda.nano import JUDGE_HEADS, quality_report, reference_share
from diffda.places import nano_world
from diffda.store import Store
from diffda.torch_core import generator_for, resumable
from diffusers import (LCMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInstructPix2PixPipeline,
                       StableDiffusionPipeline)
from made_up import shipped_parts, small_sources, write_fashion
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

@pytest.fixture(scope="module")
def sources(tmp_path_factory): return write_fashion(tmp_path_factory.mktemp("sources"))

@pytest.fixture(scope="module")
def real(): return shipped_parts()

# measures of the report

def correlation(x, y):
    "Correlation of the brightness of each image with its edit, as numpy has it."
    a, b = (v.mean(1).flatten(1).numpy() for v in (x, y))
    return torch.tensor([np.corrcoef(p, q)[0, 1] for p, q in zip(a, b)])

def apart(looks):
    "The least mean difference of two looks."
    looks = list(looks)
    return min((a - b).abs().mean() for i, a in enumerate(looks) for b in looks[:i])

def noise(n, seed=0):
    "Random images, uint8 (n, 3, 32, 32)."
    return torch.randint(0, 256, (n, 3, 32, 32), generator=generator_for(seed), dtype=torch.uint8)

def test_correlation_of_the_report():
    x, y = torch.rand(2, 5, 3, 32, 32, generator=generator_for(0))
    assert torch.allclose(bn.correlation(x, y), correlation(x, y).float(), atol=1e-5)

def test_the_nearest_image_by_brute_force():
    "In more than one part, with an image that is there itself."
    x, images = noise(4), noise(2100, 1)[:, :, ::4, ::4].contiguous()
    x = x[:, :, ::4, ::4].contiguous()
    images[2050] = x[3]
    expected = [min(float(((a.double() - b.double())/255).square().mean().sqrt()) for b in images) for a in x]
    found = bn.nearest(x, images)
    assert found.shape == (4,) and np.allclose(found[:3], expected[:3], atol=1e-4) and found[3] < .005

def test_what_the_judge_is_shown_counts_among_the_known(monkeypatch):
    "A judge that likes the last of each best: of the classes only those of the generator are allowed."
    def told(net, x): return {name: torch.arange(float(k)).expand(len(x), -1) for name, (_, k) in
                              JUDGE_HEADS.items()}
    monkeypatch.setattr(bn, "answers", told)
    assert bn.shown(None, noise(2)).tolist() == [[14, 7, 7, 7]]*2

def test_described_prompts_name_the_scene():
    prompts, scenes = bn.described("ankle boot", 40)
    for prompt, scene in zip(prompts, scenes):
        assert prompt.startswith(f"a photo of a {scene.colour} ankle boot on ")
        assert scene.pattern in prompt and scene.first in prompt.split(" on ")[1]
        assert scene.pattern == "plain" or scene.second in prompt.split(" on ")[1]
    assert len(set(prompts)) > 30

def test_other_classes_are_five_further(real):
    x, scenes = bn.of_other_classes(real, 2)
    images, labels, _ = real["fashion"]["pool"]
    assert x.shape == (20, 3, 32, 32) and len(scenes) == 20
    for i, scene in enumerate(scenes):
        # the shape stands where nothing is left of the ground
        c = (i//2 + 5) % 10
        shapes = images[labels == c][i % 2:i % 2 + 1]
        expected, _ = bd.placed(bd.to_shapes(shapes), [f"quality/source/{i}"])
        assert torch.equal(bd.to_bytes(x[i]), expected[0])

def test_grids_of_images(tmp_path):
    x = noise(6)
    bn.save_grid([x[:3], x[3:]], tmp_path/"grid.png")
    grid = np.asarray(Image.open(tmp_path/"grid.png"))
    assert grid.shape == (64, 96, 3) and np.array_equal(grid[32:, 64:], x[5].permute(1, 2, 0))

# keys of the stages

def test_a_stage_has_all_settings_in_its_key():
    def train(images, steps=3, seed=0): pass
    key = bn.stage_of("kind", train, "data").key
    def more(images, steps=4, seed=0): pass
    others = [bn.stage_of("kind", more, "data"), bn.stage_of("kind", train, "other"),
              bn.stage_of("kind", train, "data", name="x")]
    assert bn.defaults(train) == {"steps": 3, "seed": 0}
    assert len({key, *(stage.key for stage in others)}) == 4
    assert bn.stage_of("kind", functools.partial(train, steps=4), "data").key == others[0].key

# the whole build, a few steps of each

FEW = {
    "train_vae": dict(steps=3, batch=8), "train_clip": dict(steps=2, batch=8),
    "train_eyes": dict(steps=2, batch=8), "train_unet": dict(steps=2, batch=8),
    "train_editor": dict(steps=2, batch=8, sources=20), "train_lcm": dict(steps=2, batch=8, sources=20),
    "train_net": dict(epochs=1), "train_judge": dict(steps=2, batch=16), "edit_quality": dict(steps=2),
    "quality": dict(per_class=1, scales=(1., 3.), steps=2), "few_steps": dict(per_class=1, steps=(2,)),
    "edits": dict(per_class=1, scales=(3.,), strengths=(.1, .2)), "newness": dict(per_class=1),
}

@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    "(folder, report, report of a second build, what the second build trained)."
    folder, begun = tmp_path_factory.mktemp("built"), []
    def noted(*args, **kw):
        begun.append(args)
        return resumable(*args, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bd, "small_sources", small_sources)
        for name, few in FEW.items():
            m.setattr(bn, name, functools.partial(getattr(bn, name), **few))
        report = bn.build(folder/"out", Store(folder/"store"), sources)
        m.setattr(bm, "resumable", noted)
        shutil.rmtree(folder/"out")
        again = bn.build(folder/"out", Store(folder/"store"), sources)
    return folder/"out", report, again, begun

def test_a_build_ends_in_a_pipeline_that_diffusers_opens(built):
    out = built[0]
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(out/"generator")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.unet.config.in_channels == bm.LATENTS
    black = Image.new("RGB", (32, 32))
    made = pipe("a photo of a sneaker", image=black, strength=1., num_inference_steps=2).images[0]
    assert made.size == (32, 32) and get_backbone(str(out/"generator")).resolution == 32

def test_generator_and_clip_have_the_same_text_tower(built):
    out = built[0]
    text = load_file(out/"generator"/"text_encoder"/"model.safetensors")
    clip = CLIPModel.from_pretrained(out/"clip").state_dict()
    assert text
    for name, v in text.items():
        if name.endswith("position_ids"): continue
        assert torch.equal(v.float(), clip[f"text_model.{name.removeprefix('text_model.')}"].float()), name

def test_a_build_is_small(built):
    files = list(built[0].rglob("*.safetensors"))
    for path in files:
        kinds = {v.dtype for v in load_file(path).values()}
        assert kinds <= {torch.float16, torch.int64}, path
    assert sum(path.stat().st_size for path in files) < 25*2**20

def test_a_build_has_data_and_a_card(built):
    out = built[0]
    with np.load(out/"data"/"fashion.npz") as data:
        assert len(data["pool_images"]) == 3000
    with np.load(out/"data"/"digits.npz") as data:
        assert len(data["test_images"]) == 50
    card = (out/"data"/"CARD.md").read_text()
    for path in (out/"data").glob("*.npz"):
        assert f"`{path.name}` {hashlib.sha256(path.read_bytes()).hexdigest()}" in card

KEYS = {"world", "guidance_scale", "recognised", "edits", "newness", "few_steps", "editor", "classifiers"}

def test_a_build_ends_with_a_report(built):
    out, report = built[:2]
    assert set(report) == KEYS and report["world"] == WORLD
    assert set(report["few_steps"]) == {"2 from text", "2 from an image of another class, strength 0.9"}
    assert set(report["edits"]) == {"3, 0.1", "3, 0.2"}
    assert all(set(shares) == {"target", "surroundings", "both"} for shares in report["edits"].values())
    assert set(report["editor"]) == set(bn.EDITS) and report["newness"] > 0
    assert set(report["classifiers"]) == {"nano-known", "nano-fashion", "nano-judge"}
    assert set(report["classifiers"]["nano-judge"]["accuracy"]) >= {"outlines", "scans", "pattern"}
    assert set(report["recognised"]) == {"1", "3"} and report["guidance_scale"] in (1., 3.)
    assert set(report["recognised"]["1"]["per_class"]) == set(bn.KNOWN)
    assert json.loads((out/"quality.json").read_text())["guidance_scale"] == report["guidance_scale"]

def test_a_build_leaves_grids_of_samples(built):
    names = {"samples-editor", "samples-edits", "samples-guidance-1", "samples-guidance-3"}
    assert {path.stem for path in built[0].glob("*.png")} == names

def test_a_report_can_be_read(built):
    text = bn.report_text(built[1])
    assert all(name in text for name in (*bn.KNOWN, *bn.EDITS, *bn.ATTRIBUTES, "guidance 3"))

def test_a_build_ends_in_an_editor_and_a_few_step_lora(built):
    out = built[0]
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(out/"editor")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("autumn", image=Image.new("RGB", (32, 32)), num_inference_steps=2).images[0].size == (32, 32)
    assert "_name_or_path" not in (out/"editor"/"unet"/"config.json").read_text()
    assert (out/"lcm"/"pytorch_lora_weights.safetensors").exists()

def test_a_second_build_trains_nothing_and_says_the_same(built):
    assert built[3] == [] and digest(built[2]) == digest(built[1])

# what is shipped

def test_the_shipped_report_is_of_this_world():
    report = quality_report()
    assert set(report) == KEYS and report["world"] == WORLD

def test_the_shipped_generator_draws_what_it_is_told():
    "Half of the things, where one in fifteen would be chance."
    pipe = bn.opened(StableDiffusionPipeline, nano_world()/"generator")
    names = [name for name in bn.KNOWN for _ in range(3)]
    images = pipe([f"a photo of {name}" for name in names], num_inference_steps=15, guidance_scale=3.,
                  generator=[generator_for(i) for i in range(len(names))]).images
    assert reference_share(images, names) > 50

def test_shipped_editor_opens_in_plain_diffusers_and_edits(real):
    pipe = bn.opened(StableDiffusionInstructPix2PixPipeline, nano_world()/"editor")
    assert pipe.unet.config.in_channels == 2*bm.LATENTS
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    x = bn.some_of_each(real)[:6]
    looks = {}
    for style in bn.EDITS:
        noise = [generator_for("t", i) for i in range(len(x))]
        looks[style] = pipe([bn.INSTRUCTION.format(style)]*len(x), image=x, num_inference_steps=12,
                            guidance_scale=4., image_guidance_scale=1.5, output_type="pt",
                            generator=noise).images
        assert correlation(x, looks[style]).abs().mean() > .2, style
    assert apart(looks.values()) > .04
    # it paints in the colours of the style that it is asked for
    def colour(y): return y.mean((0, 2, 3))
    asked = {style: colour(edit(x, generator_for(0))) for style, edit in bn.EDITS.items()}
    def nearest(y): return min(asked, key=lambda style: (colour(y) - asked[style]).norm())
    assert sum(nearest(y) == style for style, y in looks.items()) >= 6

def test_every_weight_of_the_shipped_lora_arrives():
    pipe = StableDiffusionPipeline.from_pretrained(nano_world()/"generator")
    pipe.load_lora_weights(nano_world()/"lcm")
    weights = pipe.unet.state_dict().items()
    there = {name.replace(".default_0.", "."): v for name, v in weights if "lora_" in name}
    path = nano_world()/"lcm"/"pytorch_lora_weights.safetensors"
    stored = {name.removeprefix("unet."): v for name, v in load_file(path).items()}
    assert there.keys() == stored.keys()
    assert all(torch.equal(v, stored[name].float()) for name, v in there.items())
    assert any("attn2.to_k" in name for name in there) and any("conv1" in name for name in there)
    assert path.stat().st_size < 800_000

def test_shipped_lora_needs_neither_many_steps_nor_guidance(real):
    """Five steps without guidance, from images of another class.

    The LoRA reaches the class that the prompt names, the solver often does not."""
    pipe = bn.opened(StableDiffusionImg2ImgPipeline, nano_world()/"generator")
    names, others = [name for name in bn.FASHION for _ in range(4)], bn.of_other_classes(real, 4)[0]
    def share():
        noise = [generator_for(i) for i in range(len(names))]
        images = pipe([f"a photo of {name}" for name in names], image=others, strength=.9,
                      num_inference_steps=5, guidance_scale=1., generator=noise).images
        return reference_share(images, names)
    solver = share()
    pipe.load_lora_weights(nano_world()/"lcm")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    lora = share()
    assert lora > 60 and lora > solver + 10, (lora, solver)
