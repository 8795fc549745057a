"DiffuseMix: its mask and blend pixel by pixel, its edits against diffusers' own pipeline, and its fractals."
import dataclasses, json, time

import numpy as np, pytest, torch
from PIL import Image

from diffda.backbone import BACKBONES, get_backbone
from diffda.core import DiffDAError
from diffda.torch_core import generator_for
from diffda.data import get_split, get_task, list_tasks
from diffda.generate import Studio, generate_pool
from diffda.method import get_method
from diffda.places import nano_world
from diffda.methods.diffusemix import (FAMILIES, FRACTALS, REDRAWS, STYLES, DiffuseMix, fractal,
                                       fractal_image, fractal_names, hybrid, mask, plain)
from diffda.utilize import FullConcatenation, FullReplacement, GlobalReplacement
from pools import LEVELS, by_key, distance, some

PART = DiffuseMix(num_inference_steps=3, num_copies=3)

@pytest.fixture(scope="module")
def few(): return some((0, 30, 126, 225))

@pytest.fixture(scope="module", autouse=True)
def editor(tmp_path_factory):
    """An InstructPix2Pix made of the nano generator's parts; the nano backbone's editor here.

    The channels of the image have small random weights."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(get_backbone("nano").source)
    old, folder = pipe.unet.conv_in, tmp_path_factory.mktemp("editor")
    new = torch.nn.Conv2d(2*old.in_channels, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        widen = .05*torch.randn(old.weight.shape, generator=generator_for("widen"))
        new.weight.copy_(torch.cat([old.weight, widen], 1))
        new.bias.copy_(old.bias)
    pipe.unet.conv_in = new
    pipe.unet.register_to_config(in_channels=2*old.in_channels)
    none = dict(safety_checker=None, feature_extractor=None, image_encoder=None)
    parts = {name: part for name, part in pipe.components.items() if name not in none}
    edits = StableDiffusionInstructPix2PixPipeline(**parts, **none, requires_safety_checker=False)
    edits.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as m:
        # a path that is absolute stays what it is
        nano = dataclasses.replace(BACKBONES.get("nano"), editor=str(folder))
        m.setitem(BACKBONES.known, "nano", nano)
        yield folder

@pytest.fixture(scope="module")
def pool(few, tmp_path_factory): return generate_pool(PART, few, tmp_path_factory.mktemp("mix"))

def rows_of(part, split): return part.rows(split, get_backbone("nano"), 0)

# mask and blend

def noise_image(size, *parts):
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator_for(size, *parts))
    return Image.fromarray(pixels.numpy().astype(np.uint8))

def by_loops(real, edited, fract, direction, width, share):
    "One pixel at a time; `width` in these pixels."
    x, g, f = (np.asarray(i).tolist() for i in (real, edited, fract))
    n = len(x)
    out = np.zeros((n, n, 3), np.uint8)
    for i in range(n):
        for j in range(n):
            at = (j if direction == "horizontal" else i) + .5
            left, right = n/2 - width/2, n/2 + width/2
            m = 0 if at <= left else 1 if at >= right else (at - left)/width
            for c in range(3):
                v = (1 - share)*((1 - m)*x[i][j][c] + m*g[i][j][c]) + share*f[i][j][c]
                out[i, j, c] = round(min(max(v, 0), 255))
    return out

@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("size, width", [(256, 20), (32, 2.5)])
def test_every_pixel(size, width, direction):
    images = [noise_image(size, k) for k in "abc"]
    ours = np.asarray(hybrid(*images, direction)).astype(int)
    expected = by_loops(*images, direction, width, .2)
    assert ours.shape == (size, size, 3)
    assert np.abs(ours - expected).max() <= 1 and (ours == expected).mean() > .999

def test_mask():
    m = mask(256)
    assert (m[:118] == 0).all() and (m[138:] == 1).all()
    assert np.allclose(m[118:138], (np.arange(20) + .5)/20) and np.allclose(m + m[::-1], 1)
    assert np.allclose(mask(32), [0]*15 + [.3, .7] + [1]*15) and mask(32, 0.).tolist() == [0.]*16 + [1.]*16
    assert np.allclose(mask(512)[236:276], (np.arange(40) + .5)/40)

def test_left_and_top_are_real():
    x, g, f = (Image.new("RGB", (64, 64), (v, v, v)) for v in (200, 100, 0))
    h, v = (np.asarray(hybrid(x, g, f, d, blend=0.)) for d in ("horizontal", "vertical"))
    assert (h[:, :29] == 200).all() and (h[:, 35:] == 100).all()
    assert (v[:29] == 200).all() and (v[35:] == 100).all()
    white = Image.new("RGB", (64, 64), "white")
    assert (np.asarray(hybrid(x, g, f, "vertical"))[0] == 160).all()
    assert (np.asarray(hybrid(x, g, white, "vertical", blend=1.)) == 255).all()

# the images

def test_against_diffusers_and_loops(few, pool, editor, tmp_path):
    "Each image alone, through the stock pipeline with the picture itself, then put together pixel by pixel."
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
    stock = StableDiffusionInstructPix2PixPipeline.from_pretrained(editor, safety_checker=None)
    stock.scheduler = EulerAncestralDiscreteScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    for i in (0, 4, 8, 11):
        r = pool.rows.iloc[i]
        real = few.train.read(i//3)
        own = generator_for(0, r.source_id, int(r["copy"]), "noise")
        edited = stock(f"A transformed version of image into {r['style']}", image=real, num_inference_steps=3,
                       guidance_scale=4., image_guidance_scale=1.5, generator=own).images[0]
        expected = by_loops(real, edited, fractal_image(r.fractal, 32), r.direction, 2.5, .2)
        assert np.abs(expected.astype(int) - np.asarray(pool.image(i))).max() <= LEVELS

def test_the_editor_sees_the_image(few, tmp_path):
    part = dataclasses.replace(PART, blend=0.)
    a = generate_pool(part, few, tmp_path/"a")
    ids = few.train.ids
    def another(i): return few.train.read((i + 1) % 4)
    train = type(few.train)(ids, few.train.labels, another, few.train.mark)
    swapped = dataclasses.replace(few, train=train, test=None, digest="swapped")
    b = generate_pool(part, swapped, tmp_path/"b")
    for i, r in enumerate(a.rows.itertuples()):
        half = np.s_[:, 20:] if r.direction == "horizontal" else np.s_[20:]
        assert np.abs(np.asarray(a.image(i)).astype(int) - np.asarray(b.image(i)))[half].max() > LEVELS

@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_matter(few, pool, tmp_path, size):
    assert distance(generate_pool(PART, few, tmp_path, batch_size=size), pool) <= LEVELS

def test_order_and_shards_do_not_matter(few, pool, tmp_path):
    other = generate_pool(PART, some((225, 126, 30, 0)), tmp_path/"a", batch_size=5)
    assert other.rows.source_id[0] == pool.rows.source_id[9] and distance(other, pool) <= LEVELS
    assert generate_pool(PART, few, tmp_path/"b", batch_size=5, shard=(0, 2)) is None
    assert distance(generate_pool(PART, few, tmp_path/"b", batch_size=5, shard=(1, 2)), pool) <= LEVELS

def test_global_random_state_is_left_alone(few, pool, tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert generate_pool(PART, few, tmp_path).digest() == pool.digest()
    assert torch.equal(before, torch.get_rng_state()) and (np.random.get_state()[1] == numpys).all()

def test_copies_and_seeds_differ(few, pool, tmp_path):
    assert len({v.tobytes() for v in by_key(pool).values()}) == 12
    assert distance(generate_pool(PART, few, tmp_path, seed=1), pool) > LEVELS

def test_size(few, tmp_path):
    "As asked for, but never above the generator's resolution."
    for asked, size in ((16, 16), (24, 24), (48, 32)):
        part = dataclasses.replace(PART, size=asked, num_copies=1)
        assert generate_pool(part, few, tmp_path/str(asked)).image(0).size == (size, size)
    with pytest.raises(DiffDAError, match="size is a multiple of 4 pixels for this editor; found 30"):
        generate_pool(dataclasses.replace(PART, size=30), few, tmp_path/"odd")

# plain edits

def test_plain():
    speck, digit = np.zeros((2, 32, 32, 3), np.uint8)
    speck[3, 3] = 40
    digit[8:20, 14:17] = 255
    assert all(plain(Image.new("RGB", (32, 32), colour)) for colour in ("black", "white", (10, 200, 30)))
    assert plain(Image.fromarray(speck)) and not plain(Image.fromarray(digit)) and not plain(noise_image(32))

def test_plain_edits_are_drawn_again_and_noted(few, pool, tmp_path, monkeypatch):
    "Two images come out black: one once, one whatever the noise. The others stay what they were."
    rows, edit = rows_of(PART, few), DiffuseMix.edit
    once, always = rows[1]["file_name"], rows[5]["file_name"]
    asked, black = [], Image.new("RGB", (32, 32))
    def spoiled(self, studio, rows, real, purpose):
        asked.append((purpose, [r["file_name"] for r in rows]))
        def bad(name): return name == always or (name == once and purpose == "noise")
        images = edit(self, studio, rows, real, purpose)
        return [black if bad(r["file_name"]) else im for r, im in zip(rows, images)]
    monkeypatch.setattr(DiffuseMix, "edit", spoiled)
    made = generate_pool(PART, few, tmp_path)
    assert [(p, len(f)) for p, f in asked] == [("noise", 12), ("noise 1", 2), ("noise 2", 1), ("noise 3", 1)]
    assert len(asked) == REDRAWS + 1
    files = [json.loads(path.read_text()) for path in (tmp_path/".redrawn").iterdir()]
    notes = {note["file_name"]: (note["redraws"], note["plain"]) for note in files}
    assert notes == {once: (1, False), always: (3, True)}
    a, b = by_key(made), by_key(pool)
    for i, (k, v) in enumerate(a.items()): assert (np.abs(v - b[k]).max() <= LEVELS) == (i not in (1, 5))

def test_no_note_where_nothing_was_plain(pool): assert not (pool.folder/".redrawn").exists()

# fractals

def test_families_are_deterministic_and_differ():
    assert len(FAMILIES) >= 5 and len(FRACTALS) == len(set(FRACTALS)) == 20*len(FAMILIES)
    for kind in FAMILIES:
        one = fractal(kind, 64, 7)
        assert one.mode == "RGB" and one.size == (64, 64) and one == fractal(kind, 64, 7)
        assert not np.array_equal(np.asarray(one), np.asarray(fractal(kind, 64, 8)))
    images = [np.asarray(fractal_image(n, 32)) for n in FRACTALS]
    assert len({im.tobytes() for im in images}) == len(FRACTALS)
    assert min(im.std(axis=(0, 1)).max() for im in images) > 10

def test_fractals_do_not_change():
    "The colours of three pixels; families of smooth functions only, up to a grey level or two of rounding."
    pixels = [np.asarray(fractal(kind, 32, 0)) for kind in ("julia", "newton", "plasma")]
    now = [image[[4, 16, 29], [9, 20, 5]].tolist() for image in pixels]
    assert np.abs(np.array(now) - np.array(KNOWN)).max() <= 2

KNOWN = [[[43, 111, 137], [27, 134, 160], [50, 102, 128]],
         [[151, 50, 162], [126, 71, 185], [144, 56, 169]],
         [[239, 15, 253], [138, 120, 98], [61, 191, 98]]]

def test_fast_enough():
    best = []
    for kind in FAMILIES:
        took = []
        for i in range(3):
            began = time.process_time()
            fractal(kind, 256, i)
            took.append(time.process_time() - began)
        best.append(min(took))
    assert max(best) < .3, best

@pytest.fixture
def folder(tmp_path):
    (tmp_path/"f"/"more").mkdir(parents=True)
    Image.new("RGB", (50, 40), "red").save(tmp_path/"f"/"a.png")
    Image.new("L", (9, 9), 128).save(tmp_path/"f"/"more"/"b.jpg")
    (tmp_path/"f"/"readme.txt").write_text("x")
    return tmp_path/"f"

def test_a_folder_of_fractals(few, folder, tmp_path):
    part = dataclasses.replace(PART, fractals=str(folder), blend=1., num_inference_steps=1)
    made = generate_pool(part, few, tmp_path/"out")
    assert set(made.rows.fractal) == {"a.png", "more/b.jpg"} == set(fractal_names(str(folder)))
    colours = {"a.png": (255, 0, 0), "more/b.jpg": (128, 128, 128)}
    for i, name in enumerate(made.rows.fractal):
        assert np.abs(np.asarray(made.image(i)).astype(int) - colours[name]).max() <= 2

def test_another_content_is_another_setting(folder):
    a = DiffuseMix(fractals=str(folder))
    assert a.fractals_key and DiffuseMix().fractals_key is None
    assert a == DiffuseMix(fractals=str(folder)) == dataclasses.replace(a)
    Image.new("RGB", (64, 64), "blue").save(folder/"c.png")
    assert DiffuseMix(fractals=str(folder)) != a and dataclasses.replace(a, fractals=None) == DiffuseMix()

def test_folders_that_cannot_be(few, folder, tmp_path):
    with pytest.raises(DiffDAError, match="The folder of fractals .*none does not exist"):
        DiffuseMix(fractals=str(tmp_path/"none"))
    (tmp_path/"empty").mkdir()
    (tmp_path/"empty"/"notes.txt").write_text("x")
    with pytest.raises(DiffDAError, match="The folder of fractals .*empty holds no images"):
        DiffuseMix(fractals=str(tmp_path/"empty"))
    for f in ("a.png", "more/b.jpg"): (folder/f).write_bytes((folder/f).read_bytes()[:30])
    part = dataclasses.replace(PART, fractals=str(folder))
    with pytest.raises(DiffDAError, match="Image .* is damaged"): generate_pool(part, few, tmp_path/"out")

# what a pool says of itself

def test_rows():
    whole = get_split("nano-fashion", 0)
    rows = rows_of(DiffuseMix(), whole)
    assert {r["style"] for r in rows} == set(STYLES) and {r["fractal"] for r in rows} == set(FRACTALS)
    assert .4 < np.mean([r["direction"] == "horizontal" for r in rows]) < .6
    assert len({tuple(r[k] for r in rows[:40]) for k in ("style", "direction", "fractal")}) == 3
    for r in rows:
        assert r["prompt"] == f"A transformed version of image into {r['style']}"
        assert not any(name in r["prompt"] for name in whole.class_names)
    r = rows[8]
    assert r["label"] == r["source_label"] and r["label_weights"] == [{"label": r["label"], "weight": 1.}]
    assert (r["steps"], r["num_inference_steps"], r["guidance"], r["strength"]) == (100, 100, 4., None)
    assert rows_of(DiffuseMix(num_inference_steps=25), whole)[0]["steps"] == 25

def test_size_by_backbone(few, monkeypatch, tmp_path):
    "256 pixels where the generator's resolution allows it; seen in what the editor is given."
    seen = []
    def edit(self, studio, rows, real, purpose):
        seen.append(next(iter(real.values())).size)
        return [noise_image(real[r["source_id"]].width) for r in rows]
    monkeypatch.setattr(DiffuseMix, "edit", edit)
    rows = rows_of(PART, few)
    for resolution, size in ((512, 256), (768, 256), (256, 256), (64, 64), (32, 32)):
        studio = Studio(PART, few, get_backbone("nano"), "cpu", None, rows, tmp_path)
        studio.backbone = dataclasses.replace(studio.backbone, resolution=resolution)
        assert PART.draw(studio, rows[:1])[0].size == (size, size) == seen[-1]

@pytest.mark.parametrize("task", list_tasks())
def test_settings_of_tasks(task):
    t, m = get_task(task), get_method("diffusemix").at(get_task(task))
    settings = {"conventional": FullConcatenation(), "fine-grained": GlobalReplacement(p=.3),
                "medical": FullReplacement()}
    assert m.utilize == settings[t.family]

@pytest.mark.parametrize("settings, says", [
    (dict(blend=1.5), "found 1.5"), (dict(ramp=-1.), "found -1"),
    (dict(num_inference_steps=0), r"in \[1, 1000\]; found 0"), (dict(num_copies=0), "at least 1")])
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(DiffDAError, match=says): DiffuseMix(**settings)

def test_it_takes_no_adaptation(few, tmp_path):
    (tmp_path/"tuned").mkdir()
    with pytest.raises(DiffDAError, match="cannot use a fine-tuned generator"):
        generate_pool(PART, few, tmp_path/"out", adaptation=str(tmp_path/"tuned"))

def test_the_shipped_editor(few, tmp_path, monkeypatch):
    "It changes the image, and keeps more of it than of another."
    nano = dataclasses.replace(get_backbone("nano"), editor=str(nano_world("editor")))
    monkeypatch.setitem(BACKBONES.known, "nano", nano)
    part = dataclasses.replace(PART, num_inference_steps=15, num_copies=2)
    rows = rows_of(part, few)
    real = {i: few.train.read(k) for k, i in enumerate(few.train.ids)}
    studio = Studio(part, few, nano, "cpu", None, rows, tmp_path)
    edited = np.stack([np.asarray(im).mean(2) for im in part.edit(studio, rows, real, "noise")])
    x = np.repeat([np.asarray(im).mean(2) for im in real.values()], 2, 0)
    def alike(a, b): return np.mean([np.corrcoef(i.ravel(), j.ravel())[0, 1] for i, j in zip(a, b)])
    assert np.abs(edited - x).mean() > 5 and alike(edited, x) > alike(edited, np.roll(x, 2, 0)) + .1

@pytest.mark.parametrize("kind, says", [
    ("missing", "no model_index.json"), ("other", "needs an InstructPix2Pix")])
def test_wrong_editor(few, tmp_path, monkeypatch, kind, says):
    nano = get_backbone("nano")
    editor = nano.source if kind == "other" else str(tmp_path/"none")
    monkeypatch.setitem(BACKBONES.known, "nano", dataclasses.replace(nano, editor=editor))
    with pytest.raises(DiffDAError, match=says): generate_pool(PART, few, tmp_path/"out")
