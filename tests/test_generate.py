"""Synthetic pools: the same images however the work is cut up, and those that diffusers' own pipeline makes.

Images are compared to two grey levels of 255: a batch of another size takes other code paths in the matrix
products, which changes a value in single precision by some 1e-6, and where it lies at the border of two
levels rounding shows it as one level; the second level is room."""
import dataclasses, json, shutil

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import save_file

from diffda import generate
from pools import LEVELS, by_key, distance, from_latents
from diffda.core import DiffDAError
from diffda.torch_core import generator_for
from diffda.data import Split, get_split
from diffda.samples import Samples
from diffda.backbone import EMBEDDINGS, LORA, backbone_key, get_backbone
from diffda.models import load_pipeline
from diffda.generate import SDEdit, SyntheticPool, file_name, generate_pool

PART = SDEdit(strength=.5, num_inference_steps=8, num_copies=3)
FIELDS = {"file_name", "label", "source_id", "source_label", "target_label", "label_weights", "copy",
          "prompt",
          "strength", "steps", "guidance", "seed", "method", "backbone", "adaptation"}
NANO = get_backbone("nano")
WHERE = NANO.source

def some(idx=(0, 1, 30, 126, 225, 249), class_names=None):
    "A few images of a split of nano-fashion."
    s = get_split("nano-fashion", 0)
    return Split(s.task, 0, class_names or s.class_names, s.train.take(idx), None, s.test, "few")

@pytest.fixture(scope="module")
def few(): return some()

@pytest.fixture(scope="module")
def pool(few, tmp_path_factory):
    return generate_pool(PART, few, tmp_path_factory.mktemp("pool"), batch_size=64)

# the same images

@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_matter(few, pool, tmp_path, size):
    assert distance(generate_pool(PART, few, tmp_path, batch_size=size), pool) <= LEVELS

def test_order_does_not_matter(pool, tmp_path):
    other = generate_pool(PART, some((249, 225, 126, 30, 1, 0)), tmp_path, batch_size=7)
    assert other.rows.source_id[0] == pool.rows.source_id[17] and distance(other, pool) <= LEVELS

def test_company_does_not_matter(pool, tmp_path):
    alone = generate_pool(PART, some((126,)), tmp_path)
    a, b = by_key(alone), by_key(pool)
    assert len(a) == 3 and max(np.abs(v - b[k]).max() for k, v in a.items()) <= LEVELS

def test_two_half_shards(few, pool, tmp_path):
    assert generate_pool(PART, few, tmp_path, batch_size=4, shard=(0, 2)) is None
    assert not (tmp_path/"metadata.jsonl").exists()
    assert 0 < len(list(tmp_path.rglob("*.png"))) < len(pool)
    whole = generate_pool(PART, few, tmp_path, batch_size=4, shard=(1, 2))
    assert whole.rows.equals(pool.rows) and distance(whole, pool) <= LEVELS

def test_the_same_again_bit_for_bit(few, pool, tmp_path):
    assert generate_pool(PART, few, tmp_path, batch_size=64).digest() == pool.digest()

def test_copies_sources_and_seeds_differ(few, pool, tmp_path):
    images = [v.tobytes() for v in by_key(pool).values()]
    assert len(set(images)) == len(images)
    assert distance(generate_pool(PART, few, tmp_path, seed=1), pool) > LEVELS

def test_global_random_state_does_not_matter_and_is_left_alone(few, pool, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert generate_pool(PART, few, tmp_path, batch_size=64).digest() == pool.digest()
    assert torch.equal(before, torch.get_rng_state())

# diffusers

@pytest.fixture(scope="module")
def stock():
    "The stock pipeline, as anybody would open it."
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(WHERE)
    scheduler = DPMSolverMultistepScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++",
                                           solver_order=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu", torch.float32)

def test_stock_pipeline_opens_the_nano_folder(stock):
    kinds = {k: type(v).__name__ for k, v in stock.components.items() if v is not None}
    assert kinds == {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
                     "unet": "UNet2DConditionModel", "scheduler": "DPMSolverMultistepScheduler"}
    black = Image.new("RGB", (32, 32))
    out = stock("a photo of a bag", image=black, strength=.5, num_inference_steps=4).images[0]
    assert out.size == (32, 32)

def latent_of(stock, image):
    "The scaled latent of a PIL image, by the stock pipeline's own encoder."
    with torch.no_grad(): found = stock.vae.encode(stock.image_processor.preprocess(image)).latent_dist.mode()
    return found*stock.vae.config.scaling_factor

PARTS = {"half": PART, "whole": SDEdit(strength=1., num_inference_steps=3, num_copies=1),
         "unguided": SDEdit(strength=.9, num_inference_steps=5, num_copies=1, guidance_scale=1.)}

@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_equal_to_calling_diffusers_directly(few, stock, tmp_path, part):
    made = generate_pool(part, few, tmp_path, batch_size=7)
    position = {s: i for i, s in enumerate(few.train.ids)}
    worst = 0
    for i, r in enumerate(made.rows.itertuples()):
        latent = latent_of(stock, few.train.read(position[r.source_id]))
        noise = generator_for(0, r.source_id, r.copy, "noise")
        direct = from_latents(stock, f"a photo of {few.class_names[r.label]}", latent,
                              strength=part.strength, num_inference_steps=part.num_inference_steps,
                              generator=noise, guidance_scale=part.guidance_scale or NANO.guidance_scale)
        worst = max(worst, np.abs(np.asarray(direct).astype(int) - np.asarray(made.image(i))).max())
    assert worst <= LEVELS

def test_images_are_still_taken_for_images(few, stock):
    "Latents of six channels are what the pipeline learned to take; the rest is diffusers' own."
    pipe, how = load_pipeline(NANO, "cpu"), dict(strength=.5, num_inference_steps=4)
    ours, theirs = (each("a photo of a bag", image=few.train.read(0), generator=generator_for("image"),
                         **how).images[0] for each in (pipe, stock))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))

@pytest.mark.parametrize("strength, steps", [(.5, 8), (.1, 25), (.9, 5), (1., 4), (.28, 25)])
def test_executed_steps_are_counted(tmp_path, monkeypatch, strength, steps):
    calls, load = [], load_pipeline
    pipe = load(get_backbone("nano"), "cpu", None)
    hook = pipe.unet.register_forward_hook(lambda *a: calls.append(1))
    monkeypatch.setattr(generate, "load_pipeline", lambda *a, **k: pipe)
    part = SDEdit(strength=strength, num_inference_steps=steps, num_copies=1)
    try: made = generate_pool(part, some((0, 1)), tmp_path)
    finally: hook.remove()
    assert len(calls) == int(steps*strength) == made.rows.steps[0] and made.rows.strength[0] == strength

def test_what_is_the_same_is_computed_once(tmp_path, monkeypatch):
    """Two images with five copies in batches of three: two encoded images, and one pass per distinct prompt
    beside the empty one."""
    pipe, encoded, prompts = load_pipeline(get_backbone("nano"), "cpu", None), [], []
    monkeypatch.setattr(generate, "load_pipeline", lambda *a, **k: pipe)
    def encoding(module, given, out): encoded.append(len(given[0]))
    def reading(module, given, named, out): prompts.append(len(out[0]))
    hooks = [pipe.vae.encoder.register_forward_hook(encoding),
             pipe.text_encoder.register_forward_hook(reading, with_kwargs=True)]
    try: generate_pool(dataclasses.replace(PART, num_copies=5), some((0, 1)), tmp_path, batch_size=3)
    finally:
        for h in hooks: h.remove()
    assert sum(encoded) == 2 and sum(prompts) == 2

# prompts, targets, labels and strengths

# names within names
NAMES = ("ant", "chair", "elephant", "man", "mango", "wheelchair", "woman", "or", "ant hill", "orange")

def test_soft_labels_share_target_and_source():
    split = some(range(250), class_names=list(NAMES))
    rows = SDEdit(target="any", label="soft", strength=.7, num_copies=4).rows(split, NANO, 0)
    for r in rows:
        target, source = r["target_label"], r["source_label"]
        weights = {p["label"]: p["weight"] for p in r["label_weights"]}
        shared = pytest.approx({target: .83666, source: .16334}, abs=1e-5)
        assert weights == ({target: 1.} if target == source else shared)
        assert r["label"] == target and r["prompt"] == f"a photo of {NAMES[target]}"
        assert split.train.labels[split.train.ids.index(r["source_id"])] == source
    # uniform over all classes, the image's own among them
    counts = np.bincount([r["target_label"] for r in rows], minlength=10)
    assert ((counts - 100)**2/100).sum() < 9 + 5*18**.5
    assert abs(np.mean([r["target_label"] == r["source_label"] for r in rows]) - .1) < .04

def test_hard_labels_are_the_targets():
    rows = SDEdit(target="any").rows(some(range(250)), NANO, 0)
    for r in rows:
        assert r["label"] == r["target_label"] and r["label_weights"] == [{"label": r["label"], "weight": 1.}]

def test_each_image_draws_its_own_strength():
    part = SDEdit(strength=[.25, .5, .75, 1], num_inference_steps=8, num_copies=4)
    assert part == SDEdit(strength=(.25, .5, .75, 1.), num_inference_steps=8, num_copies=4)
    rows = part.rows(some(range(250)), NANO, 0)
    for strength, steps in ((.25, 2), (.5, 4), (.75, 6), (1., 8)):
        found = [r["steps"] for r in rows if r["strength"] == strength]
        assert abs(len(found) - 250) < 70 and set(found) == {steps}

def test_mixed_strengths_do_not_depend_on_batches(few, tmp_path):
    part = SDEdit(strength=(.3, .9), num_inference_steps=4, num_copies=2, target="any")
    a, b = (generate_pool(part, few, tmp_path/str(size), batch_size=size) for size in (64, 1))
    assert distance(a, b) <= LEVELS and set(a.rows.strength) == {.3, .9}

def test_learned_words_stand_for_the_names():
    words = [f"<{i}>" for i in range(10)]
    rows = SDEdit(prompt="article").rows(some((0, 30)), NANO, 0, words)
    assert {r["prompt"] for r in rows} == {"a photo of a <0>", "a photo of a <1>"}

def test_medical_prompts_name_the_medium():
    scans = get_split("nano-scans-5", 0)
    assert SDEdit(prompt="medical").rows(scans, NANO, 0)[0]["prompt"] == "a scan of zero"
    with pytest.raises(DiffDAError, match="needs a medium"):
        SDEdit(prompt="medical").rows(some((0,)), NANO, 0)

def test_few_steps_by_the_consistency_lora(few, pool, tmp_path):
    "Three steps are run where three are recorded, with weights that are not there afterwards."
    part = SDEdit(lcm=True, num_inference_steps=4, strength=.9, guidance_scale=1., num_copies=1)
    calls = []
    pipe = part.load(get_backbone("nano"), "cpu")
    hook = pipe.unet.register_forward_hook(lambda *a: calls.append(1))
    made = generate_pool(part, few, tmp_path/"lcm")
    hook.remove()
    assert len(calls) == made.rows.steps[0] == 3 and type(pipe.scheduler).__name__ == "LCMScheduler"
    assert distance(generate_pool(PART, few, tmp_path/"again"), pool) <= LEVELS

# what a pool says of itself

def test_rows(few, pool):
    assert FIELDS <= set(pool.rows.columns) and len(pool) == 18
    for i, r in enumerate(pool.rows.itertuples()):
        label = few.train.labels[i//3]
        assert (r.source_id, r.copy) == (few.train.ids[i//3], i%3)
        assert r.label == r.source_label == r.target_label == label
        assert r.label_weights == [{"label": label, "weight": 1.}]
        assert r.prompt == f"a photo of {few.class_names[label]}"
        assert (r.strength, r.steps, r.guidance) == (.5, 4, NANO.guidance_scale)
        assert (r.seed, r.backbone, r.adaptation) == (0, "nano", None)
    assert pool.weights(10).sum() == 18
    assert np.array_equal(pool.weights(10).argmax(1), np.repeat(few.train.labels, 3))

def test_rows_keep_requested_and_executed_steps():
    r = SDEdit(strength=.1, num_inference_steps=25).rows(some((0,)), NANO, 0)[0]
    assert (r["num_inference_steps"], r["steps"], r["guidance"]) == (25, 2, NANO.guidance_scale)
    assert SDEdit(guidance_scale=0.).rows(some((0,)), NANO, 0)[0]["guidance"] == 0

def test_metaclass_stands_in_the_prompt():
    digits, scans = get_split("nano-digits-1", 0), get_split("nano-scans-5", 0)
    prompts = {r["prompt"] for r in SDEdit(prompt="metaclass").rows(digits, NANO, 0)}
    assert prompts == {f"a photo of a {n} digit" for n in ("five", "six", "seven", "eight", "nine")}
    with pytest.raises(DiffDAError, match="needs a metaclass"):
        SDEdit(prompt="metaclass").rows(scans, NANO, 0)

def test_every_image_has_a_file_of_its_own():
    ids = ["train/k/a_b", "train/k/a/b", "train/k_a/b", "train/k/a_b_0"]
    whole = get_split("nano-fashion", 0)
    odd = Split(whole.task, 0, whole.class_names, Samples(ids, [0, 0, 0, 0], None, None), None, None, "odd")
    names = [r["file_name"] for r in PART.rows(odd, NANO, 0)]
    assert len(set(names)) == len(names) == 12

def test_a_pool_is_an_imagefolder(pool, tmp_path):
    from datasets import load_dataset
    copy = shutil.copytree(pool.folder, tmp_path/"copy")
    # a killed run may leave such a file
    some_image = next(copy.rglob("*.png"))
    shutil.copy(some_image, some_image.parent/".left-over.123.tmp.png")
    ds = load_dataset("imagefolder", data_dir=str(copy), split="train", cache_dir=str(tmp_path/"cache"))
    assert len(ds) == len(pool) and FIELDS - {"file_name"} <= set(ds.column_names)
    where = {(row["source_id"], row["copy"]): row for row in ds}
    for i, r in enumerate(pool.rows.itertuples()):
        row = where[r.source_id, r.copy]
        assert (row["label"], row["prompt"]) == (r.label, r.prompt)
        assert np.array_equal(np.asarray(row["image"].convert("RGB")), np.asarray(pool.image(i)))

def test_folders_carry_the_label_with_the_largest_weight(tmp_path):
    "Torchvision sees the classes that the images count for, not those that they were made from."
    from torchvision.datasets import ImageFolder
    part = SDEdit(target="any", label="soft", strength=.5, num_inference_steps=4, num_copies=4)
    made = generate_pool(part, some(), tmp_path)
    assert json.loads((tmp_path/"class_names.json").read_text()) == made.class_names == some().class_names
    weights, moved = made.weights(10), made.rows.source_label != made.rows.target_label
    assert moved.any() and np.array_equal(weights.argmax(1), made.rows.label)
    label = {str(tmp_path/name): row.argmax() for name, row in zip(made.rows.file_name, weights)}
    found = ImageFolder(str(tmp_path/"images"))
    assert len(found) == len(made)
    for path, number in found.samples: assert found.classes[number] == made.class_names[label[path]]

def test_the_larger_weight_decides_on_the_folder():
    "A target that counts for less than the source does not name the folder, and a slash is no folder."
    row = dict(source_id="x", copy=2, label_weights=[{"label": 1, "weight": .3}, {"label": 0, "weight": .7}])
    assert file_name(row, ["a/b", "c"]) == "images/a_b/x_2.png"

# damage

@pytest.fixture
def broken(pool, tmp_path): return shutil.copytree(pool.folder, tmp_path/"pool")

@pytest.mark.parametrize("keep", [0, 60, .5])
def test_damaged_image(broken, pool, keep):
    path = broken/pool.rows.file_name[3]
    data = path.read_bytes()
    path.write_bytes(data[:int(keep*len(data)) if isinstance(keep, float) else keep])
    p = SyntheticPool(broken)
    with pytest.raises(DiffDAError, match=f"{path} is damaged. Delete it and .*DONE, then run again"):
        p.image(3)
    assert p.image(2).size == (32, 32)

def without_the_last(text): return text[:text.rindex("\n", 0, -1) + 1]

DISAGREEING = {"fewer": (without_the_last, "lists 17 images where 18 were made"),
               "more": (lambda text: text + text.splitlines()[0] + "\n", "lists 19 images where 18"),
               "torn": (lambda text: text[:-30], "metadata.jsonl is damaged")}

@pytest.mark.parametrize("change, says", DISAGREEING.values(), ids=DISAGREEING)
def test_rows_that_disagree(broken, change, says):
    meta = broken/"metadata.jsonl"
    meta.write_text(change(meta.read_text()))
    with pytest.raises(DiffDAError, match=says): SyntheticPool(broken, 18)

def test_missing_image_and_missing_metadata(broken, pool):
    (broken/pool.rows.file_name[5]).unlink()
    with pytest.raises(DiffDAError, match=f"lacks 1 of its images, first {pool.rows.file_name[5]}"):
        SyntheticPool(broken)
    (broken/"metadata.jsonl").unlink()
    with pytest.raises(DiffDAError, match="metadata.jsonl is missing"): SyntheticPool(broken)

@pytest.mark.parametrize("leads", ["../secret.png", "images/../../secret.png", "/etc/hostname"])
def test_a_file_outside_the_pool_is_refused(broken, leads):
    "Whoever sends a pool does not choose what is read on this machine."
    (broken.parent/"secret.png").write_bytes(b"")
    meta = broken/"metadata.jsonl"
    first, *others = meta.read_text().splitlines(keepends=True)
    meta.write_text(json.dumps({**json.loads(first), "file_name": leads}) + "\n" + "".join(others))
    with pytest.raises(DiffDAError, match=f"lists a file outside it, {leads!r}"): SyntheticPool(broken)

def test_missing_images_are_made_anew_and_the_rest_is_kept(few, pool, tmp_path):
    first = generate_pool(PART, few, tmp_path, batch_size=6)
    digest = first.digest()
    files = [tmp_path/f for f in first.rows.file_name]
    before = [f.stat().st_mtime_ns for f in files]
    for i in (7, 8): files[i].unlink()
    (tmp_path/"metadata.jsonl").unlink()
    assert generate_pool(PART, few, tmp_path, batch_size=6).digest() == digest
    after = [f.stat().st_mtime_ns for f in files]
    assert after[:6] == before[:6] and after[12:] == before[12:] and after[7] != before[7]

def test_a_folder_with_other_images_is_refused(few, pool, tmp_path):
    folder = shutil.copytree(pool.folder, tmp_path/"pool")
    # the same again is fine
    assert generate_pool(PART, few, folder, batch_size=7).digest() == pool.digest()
    for other in (dataclasses.replace(PART, strength=.9), dataclasses.replace(PART, prompt="article")):
        with pytest.raises(DiffDAError, match="made with other settings"): generate_pool(other, few, folder)
    with pytest.raises(DiffDAError, match="made with other settings"):
        generate_pool(PART, few, folder, seed=1)
    assert SyntheticPool(folder).digest() == pool.digest()

def test_an_adaptation_without_weights_is_refused(few, tmp_path):
    with pytest.raises(DiffDAError, match="holds nothing that fine-tuning has learned"):
        generate_pool(PART, few, tmp_path/"pool", adaptation=str(tmp_path/"none"))

# settings and checkpoints that cannot be

@pytest.mark.parametrize("settings, says", [
    (dict(strength=.1, num_inference_steps=5), r"int\(0.1\*5\) = 0 steps.*at least 0.2"),
    (dict(strength=0.), r"strength lies in \(0, 1\]; found 0.0"), (dict(strength=1.1), "found 1.1"),
    (dict(num_copies=0), "num_copies is at least 1; found 0")])
def test_settings(settings, says):
    with pytest.raises(DiffDAError, match=says): SDEdit(**settings)

def test_wrong_kinds_of_checkpoint(tmp_path):
    with pytest.raises(DiffDAError, match="Unknown backbone 'sd51': did you mean .*sd15"):
        get_backbone("sd51")
    lora, other = tmp_path/"lora", tmp_path/"p2p"
    for folder in (lora, other): folder.mkdir()
    (lora/LORA).write_bytes(b"")
    with pytest.raises(DiffDAError, match="not a diffusers pipeline: it has no model_index.json"):
        get_backbone(str(lora))
    for kind in ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLPipeline", None):
        (other/"model_index.json").write_text(json.dumps({"_class_name": kind} if kind else {}))
        says = f"holds a {kind or 'nothing'}; this method needs a text-to-image Stable Diffusion"
        with pytest.raises(DiffDAError, match=says): get_backbone(str(other))
        with pytest.raises(DiffDAError): generate_pool(PART, some((0,)), tmp_path/"out", backbone=str(other))

VICTIMS = ("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/model.safetensors",
           "model_index.json")

@pytest.mark.parametrize("victim", VICTIMS)
def test_damaged_checkpoint(tmp_path, victim):
    copy = shutil.copytree(WHERE, tmp_path/"copy")
    data = (copy/victim).read_bytes()
    (copy/victim).write_bytes(data[:len(data)//2])
    with pytest.raises(DiffDAError, match="copy"):
        generate_pool(PART, some((0,)), tmp_path/"out", backbone=str(copy))

def test_a_local_checkpoint_is_told_by_its_content(tmp_path, few, pool):
    copy = shutil.copytree(WHERE, tmp_path/"copy")
    b = get_backbone(str(copy))
    assert b.resolution == 32 and backbone_key(b) == backbone_key(NANO)
    config = json.loads((copy/"unet"/"config.json").read_text())
    other = shutil.copytree(copy, tmp_path/"other")
    (other/"unet"/"config.json").write_text(json.dumps({**config, "changed": 1}))
    assert backbone_key(get_backbone(str(other))) != backbone_key(b)
    part = dataclasses.replace(PART, guidance_scale=NANO.guidance_scale)
    made = generate_pool(part, few, tmp_path/"out", backbone=str(copy))
    assert distance(made, pool) <= LEVELS

# what fine-tuning learned

@pytest.fixture(scope="module")
def lora(stock, tmp_path_factory):
    "A LoRA with random weights on the attention of the denoising network, saved as diffusers saves it."
    import copy
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    unet, folder = copy.deepcopy(stock.unet), tmp_path_factory.mktemp("lora")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    g = generator_for("lora")
    for n, p in unet.named_parameters():
        if "lora_" in n: p.data = torch.randn(p.shape, generator=g)*.3
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    assert (folder/LORA).exists()
    return folder, unet

@pytest.fixture(scope="module")
def inversion(stock, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ti")
    vector = torch.randn(1, stock.text_encoder.config.hidden_size, generator=generator_for("ti"))
    save_file({"<thing>": vector}, folder/EMBEDDINGS)
    return folder

def test_lora_is_applied_and_does_not_stay(few, pool, lora, stock, tmp_path):
    folder, unet = lora
    adapted = generate_pool(PART, few, tmp_path/"a", adaptation=str(folder), batch_size=64)
    assert distance(adapted, pool) > LEVELS
    # the network with peft's own layers says what the images should be
    original, stock.unet = stock.unet, unet
    try:
        direct = from_latents(stock, adapted.rows.prompt[0], latent_of(stock, few.train.read(0)), strength=.5,
                              num_inference_steps=8, guidance_scale=NANO.guidance_scale,
                              generator=generator_for(0, few.train.ids[0], 0, "noise"))
    finally: stock.unet = original
    assert np.abs(np.asarray(direct).astype(int) - np.asarray(adapted.image(0))).max() <= LEVELS
    assert generate_pool(PART, few, tmp_path/"b", batch_size=64).digest() == pool.digest()

def test_rows_name_what_was_learned(lora, pool, tmp_path):
    adapted = generate_pool(PART, some((0,)), tmp_path, adaptation=str(lora[0]))
    assert adapted.rows.adaptation.notna().all() and pool.rows.adaptation.isna().all()

def test_textual_inversion_is_applied_and_does_not_stay(inversion, tmp_path):
    split = some((0, 1), class_names=["<thing>", *some().class_names[1:]])
    part = dataclasses.replace(PART, strength=1., guidance_scale=7.5)
    plain = generate_pool(part, split, tmp_path/"a")
    adapted = generate_pool(part, split, tmp_path/"b", adaptation=str(inversion))
    assert set(plain.rows.prompt) == {"a photo of <thing>"} and distance(plain, adapted) > LEVELS
    assert "<thing>" in load_pipeline(get_backbone("nano"), "cpu", str(inversion)).tokenizer.get_vocab()
    assert "<thing>" not in load_pipeline(get_backbone("nano"), "cpu", None).tokenizer.get_vocab()
    assert generate_pool(part, split, tmp_path/"c").digest() == plain.digest()

def test_both_together(inversion, lora, tmp_path):
    both = shutil.copytree(lora[0], tmp_path/"both")
    shutil.copy(inversion/EMBEDDINGS, both)
    split = some((0, 1), class_names=["<thing>", *some().class_names[1:]])
    part = dataclasses.replace(PART, strength=1., guidance_scale=7.5)
    learned = {"x": None, "y": lora[0], "z": inversion, "w": both}
    def drawn(name, learned):
        return generate_pool(part, split, tmp_path/name, adaptation=learned and str(learned))
    pools = [drawn(*each) for each in learned.items()]
    assert all(distance(a, b) > LEVELS for i, a in enumerate(pools) for b in pools[:i])

# on a GPU

@pytest.mark.gpu
def test_generation_on_a_gpu(few, tmp_path):
    made = generate_pool(PART, few, tmp_path, device="cuda")
    assert len(made) == 18 and len({np.asarray(made.image(i)).tobytes() for i in range(18)}) == 18
