"The embedded world: what is drawn in front of what, its data sets, and who answers for what images show."
import collections, dataclasses, functools, hashlib

import numpy as np, pytest, torch
from diffda import nano
from diffda.core import DiffDAError
from diffda.data import get_split, get_task
from diffda.datasets import nano as world
from diffda.datasets.nano import (COLOURS, DOMAINS, NANO_CLASSES, ORDERS, PATTERNS, SPECIES, STYLES, WORLD,
                                  Scene, composed, elsewhere, ground, ground_words, nano_array, nano_dataset,
                                  nano_shape, outlined, scene_of)
from diffda.generate import generate_pool
from made_up import shipped
from PIL import Image
from pools import some
from scipy.stats import chi2_contingency

def pixels(image): return np.asarray(image).astype(int)

data = functools.cache(nano_dataset)

@pytest.fixture
def drawn(monkeypatch):
    "The scenes that are drawn, in order."
    noted = []
    def composed(shape, scene, text=""):
        noted.append(scene)
        return Image.new("RGB", (32, 32))
    monkeypatch.setattr(world, "composed", composed)
    return noted

def scenes_of(samples, drawn, step=1):
    "(labels, scenes) of every `step`-th image."
    drawn.clear()
    places = range(0, len(samples), step)
    for i in places: samples.read(i)
    return samples.labels[list(places)], list(drawn)

# scenes

def test_a_scene_by_hand():
    "The first 16 hexadecimal digits of the hash are the seed."
    seed = int(hashlib.sha256(b"scene/some text").hexdigest()[:16], 16)
    rng = np.random.default_rng(seed)
    colour, first, second, *_ = (list(COLOURS)[i] for i in rng.permutation(8))
    assert scene_of("some text") == Scene(colour, PATTERNS[rng.integers(8)], first, second)

def test_things_and_grounds_never_share_a_colour():
    scenes = [scene_of(f"any/{i}") for i in range(3000)]
    assert all(len({s.colour, s.first, s.second}) == 3 for s in scenes)

@pytest.mark.parametrize("field, values", [("colour", list(COLOURS)), ("pattern", PATTERNS),
                                           ("first", list(COLOURS)), ("second", list(COLOURS))])
def test_every_value_is_as_frequent(field, values):
    counts = collections.Counter(getattr(scene_of(f"any/{i}"), field) for i in range(4000))
    # the standard deviation is 21
    assert set(counts) == set(values) and all(abs(n - 500) < 90 for n in counts.values())

@pytest.mark.parametrize("name", ["fashion", "digits", "outlines", "domains"])
@pytest.mark.parametrize("field", ["colour", "pattern", "first"])
def test_scenes_are_independent_of_the_class(name, field):
    samples = data(name).train
    table = collections.Counter(zip(samples.labels.tolist(),
                                    (getattr(scene_of(id), field) for id in samples.ids)))
    rows, columns = ({key[i] for key in table} for i in (0, 1))
    assert chi2_contingency([[table[r, c] for c in columns] for r in rows]).pvalue > .001

def test_grounds_in_words():
    def words(pattern, both=True): return ground_words(Scene("red", pattern, "orange", "blue"), both)
    assert words("plain") == "plain orange" and words("gradient") == "an orange and blue gradient"
    assert words("checks") == "orange and blue checks" and words("checks", False) == "orange checks"

# pixels by hand: 60 % of the colour and 40 % of grey 110; 15 levels darker and lighter where there are two

ORANGE, BLUE = (197, 128, 44), (68, 92, 179)
DARK_ORANGE, LIGHT_BLUE = (182, 113, 29), (83, 107, 194)

def of_pattern(pattern, text=""): return ground(Scene("red", pattern, "orange", "blue"), text)

def test_a_plain_ground_by_hand(): assert (of_pattern("plain") == ORANGE).all()

def test_a_gradient_by_hand():
    x = of_pattern("gradient")
    assert (x[0] == DARK_ORANGE).all() and (x[31] == LIGHT_BLUE).all()
    # row 10 has the share 255*10//31 = 82 of 255
    assert (x[10] == [182 - 32, 113 - 2, 29 + 53]).all()

def test_stripes_by_hand():
    x = of_pattern("level stripes")
    assert (x[4] == LIGHT_BLUE).all() and (x[12] == DARK_ORANGE).all() and (x[20] == LIGHT_BLUE).all()
    # the soft edge has the share 127 of 255
    assert (x[0] == [132, 110, 111]).all()
    assert np.array_equal(of_pattern("upright stripes"), x.transpose(1, 0, 2))
    slanted = of_pattern("slanted stripes")
    assert all(np.array_equal(slanted[i, 0], slanted[0, i]) for i in range(32))
    assert all(np.array_equal(slanted[i, 0], x[i, 0]) for i in range(32))

def test_checks_by_hand():
    x = of_pattern("checks")
    for y in (4, 12, 20, 28):
        for z in (4, 12, 20, 28):
            assert (x[y, z] == (LIGHT_BLUE if (y - z) % 16 else DARK_ORANGE)).all()

def test_spots_by_hand():
    x = of_pattern("spots")
    for y, z in ((4, 4), (12, 12), (20, 4), (28, 28)): assert (x[y, z] == LIGHT_BLUE).all()
    for y, z in ((4, 12), (12, 4), (0, 0)): assert (x[y, z] == DARK_ORANGE).all()
    # 13 squared pixels off the middle: half the way
    assert (x[6, 7] == [132, 110, 111]).all()

def test_clouds_depend_on_the_text_alone():
    a, b = of_pattern("clouds", "a"), of_pattern("clouds", "b")
    assert np.array_equal(a, of_pattern("clouds", "a")) and np.abs(a - b).mean() > 10
    assert np.array_equal(of_pattern("checks", "a"), of_pattern("checks", "b"))

def test_patterns_are_distinguishable():
    "Moved by any number of pixels, none is another; the plain one is the only flat one."
    grounds = {pattern: of_pattern(pattern).astype(int) for pattern in PATTERNS}
    for i, a in enumerate(PATTERNS):
        for b in PATTERNS[:i]:
            moved = (np.roll(grounds[b], by, (0, 1)) for by in np.ndindex(16, 16))
            assert min(np.abs(grounds[a] - x).mean() for x in moved) > 8, (a, b)
    assert [p for p, x in grounds.items() if x.std((0, 1)).max() == 0] == ["plain"]

def test_colours_are_distinguishable_as_grounds():
    tones = [ground(Scene("red", "plain", c, c))[0, 0] for c in COLOURS]
    assert min(np.abs(a - b).max() for i, a in enumerate(tones) for b in tones[:i]) > 35

def test_a_composition_by_hand():
    shape = np.zeros((32, 32), np.uint8)
    shape[0, 1], shape[0, 2] = 30, 255
    x = pixels(composed(shape, Scene("red", "plain", "orange", "blue")))
    assert x[0, 0].tolist() == list(ORANGE) and x[0, 2].tolist() == [230, 30, 40]
    # light 109 of 255, cover 120 of 255
    assert x[0, 1].tolist() == [150, 73, 31]

def test_an_outline_is_what_a_3x3_maximum_adds():
    shape = nano_shape(shipped("digits")["pool_images"][3])
    x = torch.from_numpy(np.array(shape))[None].float()
    assert np.array_equal((torch.nn.functional.max_pool2d(x, 3, 1, 1) - x)[0], pixels(outlined(shape)))

# renderings

@pytest.fixture(scope="module")
def picture(): return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))

def test_inverted_and_posterized(picture):
    x = pixels(picture)
    assert np.array_equal(pixels(world.inverted(picture)), 255 - x)
    levels = np.where(x < 64, 0, np.where(x < 192, 127, 255))
    assert np.array_equal(pixels(world.posterized(picture)), levels)

def test_edges_are_the_range_of_a_neighbourhood(picture):
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    def most(v): return torch.nn.functional.max_pool2d(v, 3, 1, 1)
    # Pillow treats the border in a way of its own
    assert np.array_equal((most(x) + most(-x)).permute(1, 2, 0)[1:-1, 1:-1],
                          pixels(world.edges(picture))[1:-1, 1:-1])

def test_blurred_is_a_binomial(picture):
    x, line = pixels(picture), np.array([1, 4, 6, 4, 1])/16
    def along(v, axis): return np.apply_along_axis(np.convolve, axis, v, line, "valid")
    expected = along(along(x, 0), 1)
    assert np.abs(pixels(world.blurred(picture))[2:-2, 2:-2] - expected).max() <= .51

def test_noisy_is_the_same_each_time(picture):
    y = world.noisy(picture)
    assert np.array_equal(pixels(y), pixels(world.noisy(picture)))
    change = np.abs(pixels(y) - pixels(picture))
    assert change.max() == 70 and 25 < change.mean() < 36

# data sets

GOLDEN = {
    "fashion": "99cb8350ae62b40a", "digits": "eecc2333273063d6", "outlines": "d20e38ca38684c59",
    "scans": "f2aff517ea832f07", "stains": "6449233c48f1c077", "species": "a142a9fb23ecb6b2",
    "family": "a142a9fb23ecb6b2", "order": "a142a9fb23ecb6b2", "domains": "d90f8ae14348e208",
    "tied": "f4a4a6938dd3cfe0"}

@pytest.mark.parametrize("name", NANO_CLASSES)
def test_pixels_are_stable(name):
    assert WORLD == 2, "another world: make these digests again"
    ds, h = nano_dataset(name), hashlib.sha256()
    for part in (ds.train, ds.test, *ds.also.values()):
        for i in (0, len(part)//2, len(part) - 1): h.update(part.read(i).tobytes())
    assert h.hexdigest()[:16] == GOLDEN[name], "raise WORLD with any change"

@pytest.mark.parametrize("name", NANO_CLASSES)
def test_a_data_set_is_whole(name):
    ds, k = data(name), len(NANO_CLASSES[name])
    assert ds.class_names == NANO_CLASSES[name]
    for part in (ds.train, ds.test, *ds.also.values()):
        assert set(part.labels.tolist()) == set(range(k)) and len(set(part.ids)) == len(part)
        image = part.read(len(part)//3)
        assert image.mode == "RGB" and image.size == (32, 32) and pixels(image).std() > 10
    assert not set(ds.train.ids) & set(ds.test.ids)

def test_marks_are_of_one_image_each():
    for name in ("fashion", "species", "tied", "stains"):
        part = data(name).train
        marks = [part.mark(i) for i in range(0, len(part), 5)]
        assert len(set(marks)) == len(marks) and marks[0] == nano_dataset(name).train.mark(0)

def test_a_mark_changes_with_id_shape_and_world(monkeypatch):
    shapes = np.zeros((2, 28, 28), np.uint8)
    shapes[1, 3, 3] = 1
    def mark(id, i): return world._samples([id]*2, [0, 0], shapes, world._thing).mark(i)
    before = mark("a", 0)
    assert len({before, mark("b", 0), mark("a", 1)}) == 3
    monkeypatch.setattr(world, "WORLD", WORLD + 1)
    assert mark("a", 0) != before

# the tree

def test_levels_of_the_tree_agree():
    levels = {level: data(level) for level in ("species", "family", "order")}
    for part in ("train", "test"):
        species, family, order = (getattr(levels[level], part) for level in levels)
        assert species.ids == family.ids == order.ids
        for s, f, o in zip(species.labels, family.labels, order.labels):
            assert SPECIES[s].split(" ", 1)[1] == NANO_CLASSES["family"][f]
            assert f in ORDERS[NANO_CLASSES["order"][o]]

def test_every_kind_is_in_one_order():
    assert sorted(kind for members in ORDERS.values() for kind in members) == list(range(10))

def test_the_tree_has_the_labels_of_its_shapes():
    shapes = shipped("fashion")
    kinds = dict(zip(shapes["pool_index"].tolist(), shapes["pool_labels"].tolist()))
    family = data("family").train
    assert all(kinds[int(id.rsplit("-", 1)[1])] == label for id, label in zip(family.ids, family.labels))

def test_species_are_long_tailed():
    counts = sorted(np.bincount(data("species").train.labels), reverse=True)
    assert counts == [max(4, round(40*.93**k)) for k in range(30)]
    assert counts[:3] == [40, 37, 35] and counts[-1] == 5

def test_test_species_are_balanced():
    labels = data("species").test.labels
    assert np.bincount(labels//3).tolist() == [200]*10
    counts = np.bincount(labels)
    assert min(counts) > 45 and max(counts) < 90

@pytest.mark.parametrize("part", ["train", "test"])
def test_a_species_has_its_colour(part, drawn):
    labels, scenes = scenes_of(getattr(data("species"), part), drawn)
    for label, scene in zip(labels, scenes):
        assert SPECIES[label].split(" ")[0] == scene.colour
        assert len({scene.colour, scene.first, scene.second}) == 3

# domains and ties

def test_domains_are_the_same_scenes_in_five_styles():
    ds = data("domains")
    assert tuple(ds.also) == tuple(STYLES) == DOMAINS[1:] and len(ds.also) == 5
    for style, part in ds.also.items():
        assert part.labels.tolist() == ds.test.labels.tolist()
        assert part.ids == [f"{id}-{style}" for id in ds.test.ids]
        for i in (0, 700):
            assert np.array_equal(pixels(part.read(i)), pixels(STYLES[style](ds.test.read(i))))

def tied_share(part, drawn):
    labels, scenes = scenes_of(part, drawn)
    return np.mean([scene.pattern == PATTERNS[label % 8] for label, scene in zip(labels, scenes)])

def test_surroundings_give_the_class_away_only_in_the_pool(drawn):
    ds = data("tied")
    # nine in ten, and an eighth of the others
    assert abs(tied_share(ds.train, drawn) - .9125) < .02
    assert abs(tied_share(ds.test, drawn) - .125) < .03

# elsewhere

@pytest.mark.parametrize("name", ["fashion", "digits", "outlines"])
def test_elsewhere_the_thing_is_kept(name):
    train, shapes = data(name).train, shipped(nano_array(name))["pool_images"]
    for i in (0, 17, 299):
        shape = nano_shape(shapes[i])
        grey = pixels(outlined(shape) if name == "outlines" else shape)
        before, now = pixels(train.read(i)), pixels(elsewhere(train.ids[i], "there"))
        # what is brighter than 63 is all thing
        assert np.array_equal(before[grey > 63], now[grey > 63]) and (grey > 63).any()
        assert np.abs(before - now)[grey == 0].mean() > 15

def test_elsewhere_the_ground_is_that_of_the_text():
    train = data("fashion").train
    i = next(i for i, id in enumerate(train.ids) if scene_of(id).colour == scene_of("there").colour)
    bare = pixels(nano_shape(shipped("fashion")["pool_images"][i])) == 0
    expected = ground(scene_of("there"), "there")
    assert np.array_equal(pixels(elsewhere(train.ids[i], "there"))[bare], expected[bare])

def test_elsewhere_no_ground_has_the_colour_of_the_thing(drawn):
    ids = data("digits").train.ids[:300]
    for i, id in enumerate(ids): elsewhere(id, f"there/{i}")
    assert all(len({s.colour, s.first, s.second}) == 3 for s in drawn)
    assert [s.colour for s in drawn] == [scene_of(id).colour for id in ids]

@pytest.mark.parametrize("id", ["scans-pool-00003", "fashion-test-00000", "domains-pool-00012", "five", "",
                                "fashion-pool", "fashion-pool-nowhere", "fashion-pool-99999"])
def test_other_ids_cannot_be_put_elsewhere(id):
    with pytest.raises(DiffDAError, match="cannot be put elsewhere"):
        elsewhere(id, "there")

# the oracle

def test_the_oracle_draws_the_things_elsewhere(tmp_path):
    split = some((0, 30))
    pool = generate_pool(nano.Elsewhere(num_copies=2), split, tmp_path, seed=3)
    assert len(pool) == 4
    for i, row in enumerate(pool.rows.itertuples()):
        expected = elsewhere(row.source_id, f"3/{row.source_id}/{row.copy}")
        assert np.array_equal(pixels(pool.image(i)), pixels(expected))
        assert row.prompt == f"{split.class_names[row.label]}, elsewhere" and row.steps == 0

def test_the_oracle_is_a_method_for_three_data_sets():
    assert isinstance(nano.ORACLE.generate, nano.Elsewhere)
    for task in ("nano-fashion", "nano-digits-1", "nano-outlines-1"):
        nano.ORACLE.generate.check(get_task(task))
    for task in ("nano-scans-5", "nano-stains-10", "nano-species", "nano-tied", "birds-5"):
        with pytest.raises(DiffDAError, match="not of "):
            nano.ORACLE.generate.check(get_task(task))

# the judge

def test_the_judges_heads_follow_each_other():
    assert tuple(nano.JUDGE_HEADS) == nano.ATTRIBUTES
    assert list(nano.JUDGE_HEADS.values()) == [(0, 30), (30, 8), (38, 8), (46, 8)]
    assert nano.JUDGE_OUTPUTS == 54

class Counting(torch.nn.Module):
    "Its outputs are 0, 1, 2, …"
    def forward(self, x): return torch.arange(float(nano.JUDGE_OUTPUTS)).expand(len(x), -1)

def test_answers_are_the_outputs_of_each_head():
    told = nano.answers(Counting(), torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert {name: v[1].tolist() for name, v in told.items()} == {
        "class": [*range(30)], "colour": [*range(30, 38)], "pattern": [*range(38, 46)],
        "ground": [*range(46, 54)]}

@pytest.mark.parametrize("name, first", [("fashion", 0), ("family", 0), ("domains", 0), ("tied", 0),
                                         ("digits", 15), ("outlines", 15), ("scans", 20), ("stains", 20)])
def test_the_judges_classes_of_a_data_set(name, first):
    expected = {word: ((first + i,), None) for i, word in enumerate(NANO_CLASSES[name])}
    assert nano.judged_classes(name) == nano.judged_classes(f"nano/{name}") == expected

def test_the_judges_classes_of_the_tree():
    species, order = nano.judged_classes("species"), nano.judged_classes("nano/order")
    assert list(species) == SPECIES and list(order) == NANO_CLASSES["order"]
    assert species["red t-shirt"] == ((0,), "red") and SPECIES[0] == "red t-shirt"
    assert all(members == (i//3,) and name.startswith(f"{colour} ")
               for i, (name, (members, colour)) in enumerate(species.items()))
    assert order["shoes"] == ((5, 7, 9), None)

def test_the_judges_classes_of_the_generator():
    known = nano.judged_classes()
    assert list(known) == NANO_CLASSES["fashion"] + ["zero", "one", "two", "three", "four"]
    assert [members for members, _ in known.values()] == [(i,) for i in range(15)]
    assert nano.judged_classes("Caltech101") == {}

@pytest.fixture
def told(monkeypatch):
    "What the judge says of any two images, drawn at random."
    g = torch.Generator().manual_seed(0)
    found = {name: torch.randn(2, k, generator=g) for name, (_, k) in nano.JUDGE_HEADS.items()}
    monkeypatch.setattr(nano, "judge", lambda: None)
    monkeypatch.setattr(nano, "answers", lambda net, x: found)
    return found

TWO = [Image.new("RGB", (32, 32))]*2

def test_scores_of_species_and_orders_by_hand(told):
    seen, colours = (told[name].double().numpy() for name in ("class", "colour"))
    shades = colours - np.log(np.exp(colours).sum(1, keepdims=True))
    shade = [list(COLOURS).index(name.split()[0]) for name in SPECIES]
    expected = [seen[:, i//3] + shades[:, k] for i, k in enumerate(shade)]
    assert np.allclose(nano.judged(TWO, "species"), np.stack(expected, 1), atol=1e-5)
    expected = [np.log(np.exp(seen[:, list(members)]).sum(1)) for members in ORDERS.values()]
    assert np.allclose(nano.judged(TWO, "order"), np.stack(expected, 1), atol=1e-5)

def test_reference_share_by_hand(told):
    best = [NANO_CLASSES["digits"][i] for i in told["class"][:, 15:20].argmax(1)]
    other = next(name for name in NANO_CLASSES["digits"] if name != best[1])
    assert nano.reference_share(TWO, best, "nano/digits") == 100
    assert nano.reference_share(TWO, [best[0], other], "nano/digits") == 50

def test_no_share_for_what_the_judge_does_not_know(told):
    assert np.isnan(nano.reference_share(TWO, ["sandal", "five"], "nano/digits"))
    assert np.isnan(nano.reference_share(TWO, ["five", "five"], "Caltech101"))

LEAST = {"nano-fashion": 75, "nano-stains-10": 60, "nano-species": 60, "nano-order": 85, "nano-tied": 75,
         "nano-domains": 75, "nano-outlines-1": 75}

@pytest.mark.parametrize("name", ["nano-fashion", "nano-digits-1", "nano-outlines-1", "nano-scans-5",
                                  "nano-stains-10", "nano-species", "nano-order", "nano-tied",
                                  "nano-domains"])
def test_the_shipped_judge_knows_the_real_images(name):
    task = get_task(name)
    ds = data(task.dataset.removeprefix("nano/"))
    places = range(0, len(ds.test), len(ds.test)//200)
    images, labels = [ds.test.read(i) for i in places], [ds.test.labels[i] for i in places]
    right = [ds.class_names[c] for c in labels]
    wrong = [ds.class_names[(c + 1) % len(ds.class_names)] for c in labels]
    assert nano.reference_share(images, right, task.dataset) > LEAST.get(name, 90)
    assert nano.reference_share(images, wrong, task.dataset) < 20

def test_the_shipped_judge_knows_scenes():
    train = data("fashion").train
    x = torch.from_numpy(np.stack([np.asarray(train.read(i)) for i in range(200)])).permute(0, 3, 1, 2)
    told, scenes = nano.answers(nano.judge(), x), [scene_of(id) for id in train.ids[:200]]
    for attribute, field, values in (("colour", "colour", COLOURS), ("pattern", "pattern", PATTERNS),
                                     ("ground", "first", COLOURS)):
        truth = [list(values).index(getattr(scene, field)) for scene in scenes]
        assert (told[attribute].argmax(1).numpy() == truth).mean() > .85, attribute

# captions from measurements

def test_prompts_for_attributes():
    prompts = nano.attribute_prompts("bag")
    assert prompts["colour"][0] == "a photo of a red bag" and len(prompts["colour"]) == 8
    assert prompts["pattern"][:2] == ["a photo of a bag on plain red", "a photo of a bag on a red gradient"]
    assert prompts["ground"][-1] == "a photo of a bag on pink checks"

@pytest.mark.parametrize("task", ["nano-digits-1", "nano-stains-10"])
def test_captions_of_training_images(task):
    split = get_split(task, 0).few(3) if task != "nano-digits-1" else get_split(task, 0)
    texts = nano.measured_captions(split)
    assert len(texts) == len(split.train) and texts == nano.measured_captions(split)
    grounds = {ground_words(Scene("red", p, c, c), both=False) for c in COLOURS for p in PATTERNS}
    for text, label in zip(texts, split.train.labels):
        head, rest = text.split(". ")
        colour, place = rest.split(", on ")
        assert head == f"This is an image of {split.class_names[label]}"
        assert colour in COLOURS and place in grounds
    tokens = [f"<{i}>" for i in range(len(split.class_names))]
    assert nano.measured_captions(split, tokens)[0].startswith("This is an image of <0>. ")

def test_the_shipped_clip_sees_scenes():
    train = data("fashion").train
    words = nano.scene_words([train.read(i) for i in range(120)])
    scenes = [dataclasses.astuple(scene_of(id))[:3] for id in train.ids[:120]]
    shares = (np.array(words) == np.array(scenes)).mean(0)
    # by chance it would be an eighth
    assert (shares > .5).all(), shares
