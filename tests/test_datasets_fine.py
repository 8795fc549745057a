"The fine-grained, medical and detection sets, read from small trees in their true formats, whole and broken."

import hashlib, json, os, sys

import numpy as np, pytest

import trees_fine
from diffda.core import DiffDAError
from diffda.data import Task, Training, get_split, load_dataset
from diffda.datasets.base import damaged, get_source, hold_out, list_sources, readable
from diffda.datasets.detection import VOC_NAMES, outline_mask
from diffda.datasets.fine_grained import FLOWERS
from diffda.samples import Samples
from diffda.pipeline import plan, run_all
from trees_fine import TREES, mat, png

QUICK = Training(
    "small-resnet", epochs=1, batch_size=8, lr=0.05, resize=32, crop=32, pad=2, hflip=0.0, evaluations=1
)
SHOTS = {"blood_released": 2, "skin_released": 2}


def task(source, shots=1, **changes):
    return Task(f"{source}-small", source, "paper", "fine-grained", shots, QUICK, "Small", "nano", **changes)


def built(name, root, **options):
    "The tree of builder `name`; without h5py, those that need it are left out."
    if name == "brain_tumor":
        pytest.importorskip("h5py")
    return TREES[name](root, **options)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    return tmp_path / "data"


def read(tree, **changes):
    return load_dataset(
        task(tree.source, **{"shots": SHOTS.get(f"{tree.source}_{tree.layout}", 1), **changes})
    )


def by_hand(tree):
    """The test ids by the published rule, written down once more: per class, the groups in the order of
    their hashes, the first share of them, rounded down."""
    groups, out = tree.groups or {i: i for i in tree.all}, set()
    for k in set(tree.all.values()):
        order = sorted(
            {groups[i] for i, label in tree.all.items() if label == k},
            key=lambda g: hashlib.sha256(b"test/" + g.encode()).hexdigest(),
        )
        taken = order[: max(1, int(tree.share * len(order)))]
        out |= {i for i in tree.all if groups[i] in taken}
    return out


# what is read


SOURCES = {
    "birds", "aircraft", "flowers102", "cars", "blood", "skin", "brain-tumor", "coco", "voc", "spurge",
}


def test_all_sources_are_known():
    assert SOURCES | {"aircraft-cropped"} <= set(list_sources())
    for name in SOURCES:
        s = get_source(name)
        assert s.page.startswith("http")
        assert s.licence
        assert s.how.endswith(".")
        assert s.expects
        assert s.size_gb > 0
        assert s.folders


@pytest.mark.parametrize("name", TREES)
def test_ids_labels_and_names(name, data):
    tree = built(name, data)
    ds = read(tree)
    pairs = [dict(zip(part.ids, part.labels.tolist())) for part in (ds.train, ds.test)]
    listed = get_source(
        tree.source
    ).class_names  # a form of the dataset with other classes says so in its counts
    assert (
        not listed
        or ds.class_names == list(listed)
        or tree.layout in get_source(tree.source).counts
        and "classes" in get_source(tree.source).counts[tree.layout]
    )
    assert ds.class_names == tree.class_names
    assert ds.layout == tree.layout
    assert all(len(p) == len(part) > 0 for p, part in zip(pairs, (ds.train, ds.test)))
    if tree.all is None:
        assert pairs == [tree.train, tree.test]
    else:
        test = by_hand(tree)
        assert set(pairs[1]) == test
        assert set(pairs[0]) == tree.all.keys() - test
        assert pairs[0] | pairs[1] == tree.all
        assert {*pairs[0].values()} == {*pairs[1].values()} == {*tree.all.values()}
    for part in (ds.train, ds.test):
        assert damaged(part) == [] and all(part.read(i).mode == "RGB" for i in range(len(part)))
        if tree.groups:
            assert part.groups == [tree.groups[i] for i in part.ids]
        assert (part.mask is not None) == (tree.masks is not None)
    if tree.groups:
        assert not set(ds.train.groups) & set(ds.test.groups)


@pytest.mark.parametrize("name", TREES)
def test_the_same_split_from_another_place_and_order(name, data, tmp_path, monkeypatch):
    first = built(name, data)
    shots = SHOTS.get(name, 1)
    a = get_split(task(first.source, shots), 1)
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path / "elsewhere" / "data"))
    built(name, tmp_path / "elsewhere" / "data", reverse=True)
    b = get_split(task(first.source, shots), 1)
    assert a.digest == b.digest and a.train.ids == b.train.ids and a.test.ids == b.test.ids
    assert np.bincount(a.train.labels).tolist() == [shots] * len(first.class_names)


@pytest.mark.parametrize("name", TREES)
def test_a_part_of_a_set_is_refused_unless_wanted(name, data, monkeypatch):
    tree = built(name, data)
    monkeypatch.delenv("DIFFDA_PARTIAL")
    source = get_source(tree.source)
    if not (source.counts.get(tree.layout) or len(tree.class_names) != source.classes):
        return  # nobody published how many there are
    n = {"train": len(tree.train or ()), "test": len(tree.test or ()), "all": len(tree.all or ())}
    with pytest.raises(DiffDAError, match="set DIFFDA_PARTIAL=1") as e:
        read(tree)
    for part, expected in source.counts.get(tree.layout, {}).items():
        if part != "classes":
            assert f"{n[part]} images in {part} where {expected} are expected" in str(e.value)
    assert ("classes where" in str(e.value)) == (
        len(tree.class_names) != source.counts.get(tree.layout, {}).get("classes", source.classes)
    )


@pytest.mark.parametrize(
    "source",
    ["birds", "aircraft", "flowers102", "cars", "blood", "skin", "brain-tumor", "coco", "voc", "spurge"],
)
def test_directions_for_who_has_nothing(source, data):
    with pytest.raises(DiffDAError) as e:
        load_dataset(task(source))
    s = get_source(source)
    assert all(
        part in str(e.value) for part in (s.title, str(data), s.folders[0], s.expects, s.how, "DIFFDA_DATA")
    )


@pytest.mark.parametrize("name", TREES)
def test_one_epoch_on_each_tree(name, data, store):
    tree = built(name, data)
    (row,) = run_all(
        plan(["baseline"], [task(tree.source, SHOTS.get(name, 1))], (0,)), store, progress=False
    ).to_dict("records")
    assert row["n_real"] == SHOTS.get(name, 1) * len(tree.class_names)
    assert 0 <= row["top1"] <= 100
    assert len(row["per_class"]) == len(tree.class_names)


def test_validation_images_show_other_lesions(data):
    trees_fine.skin(data, lesions=8)
    split = get_split(task("skin", 2, val_per_class=2), 0)
    parts = [set(p.groups) for p in (split.train, split.val, split.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


# masks


@pytest.mark.parametrize("name", ["coco", "voc", "brain_tumor"])
def test_masks_pixel_by_pixel(name, data):
    tree = built(name, data)
    ds = read(tree)
    for part in (ds.train, ds.test, get_split(task(tree.source), 0).train):
        for i, sid in enumerate(part.ids):
            m = part.mask(i)
            assert (
                m.mode == "L"
                and m.size == part.read(i).size
                and np.array_equal(np.asarray(m), tree.masks[sid] * np.uint8(255))
            ), sid


def test_a_polygon_has_the_pixels_whose_centres_are_inside():
    x, y = np.meshgrid(np.arange(20) + 0.5, np.arange(20) + 0.5)
    assert np.array_equal(
        np.asarray(outline_mask([[1.2, 1.3, 18.1, 1.3, 1.2, 17.7]], (20, 20))) > 0,
        (x > 1.2) & (y > 1.3) & ((x - 1.2) / 16.9 + (y - 1.3) / 16.4 < 1),
    )


def test_run_lengths_go_down_the_columns():
    assert np.array_equal(
        np.asarray(outline_mask({"counts": [1, 2, 3], "size": [2, 3]}, (2, 3))) // 255, [[0, 1, 0], [1, 0, 0]]
    )
    with pytest.raises(DiffDAError, match="outline of a cat is malformed"):
        outline_mask([], (2, 3), "a cat")
    for bad in ({"counts": [1, 2], "size": [2, 3]}, {"size": [2, 3]}, [[1, 2, 3]], None):
        with pytest.raises(DiffDAError, match="outline of an object is malformed"):
            outline_mask(bad, (2, 3))


def test_packed_run_lengths_need_their_tool(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(
        DiffDAError,
        match="Packed run lengths of COCO need the package pycocotools to be read: pip install pycocotools",
    ):
        outline_mask({"counts": "04", "size": [2, 2]}, (2, 2))


def test_another_outline_is_another_split(data):
    "What is made inside a mask depends on it, so the digest must."
    tree = trees_fine.coco(data)
    before = get_split(task("coco"), 0).digest
    path = tree.folder / "annotations" / "instances_val2017.json"
    found = json.loads(path.read_text())
    found["annotations"][1]["segmentation"] = [[0, 0, 9, 0, 9, 9]]
    path.write_text(json.dumps(found))
    os.utime(path, (1, 1))
    assert get_split(task("coco"), 0).digest != before


# names and details


def test_readable_names(data):
    assert readable(get_source("birds"), "Black_footed_Albatross") == "Black footed Albatross"
    assert readable(get_source("aircraft"), "F-16A/B") == "F-16A/B"
    trees_fine.blood(data)
    trees_fine.skin(data)
    assert load_dataset(task("blood", names="readable")).class_names[3] == "immature granulocyte"
    assert load_dataset(task("skin", names="readable")).class_names == [
        "actinic keratosis",
        "basal cell carcinoma",
        "benign keratosis",
        "dermatofibroma",
        "melanoma",
        "melanocytic nevus",
        "vascular lesion",
    ]


def test_flower_names_are_torchvisions_but_clean():
    import torchvision

    theirs = getattr(torchvision.datasets.Flowers102, "classes", None)
    assert len(FLOWERS) == 102 and (theirs is None or [n.strip(" ?") for n in theirs] == list(FLOWERS))


def test_voc_names():
    assert len(VOC_NAMES) == 20
    assert VOC_NAMES[0] == "airplane"
    assert VOC_NAMES[10] == "dining table"
    assert VOC_NAMES[13] == "motorcycle"
    assert VOC_NAMES[15] == "potted plant"
    assert VOC_NAMES[19] == "television"


def test_torchvision_reads_the_same_aircraft_flowers_and_cars(data, monkeypatch):
    "The trees are in the format that torchvision knows, and both read the same labels."
    import torchvision

    monkeypatch.setattr(
        torchvision.datasets.Flowers102, "_check_integrity", lambda self: True
    )  # it compares checksums of the true files
    trees_fine.aircraft(data)
    trees_fine.flowers102(data)
    trees_fine.cars(data)
    for source, theirs in (
        ("aircraft", torchvision.datasets.FGVCAircraft(data, "train")),
        ("flowers102", torchvision.datasets.Flowers102(data, "test")),
        ("cars", torchvision.datasets.StanfordCars(data, "test")),
    ):
        ours = load_dataset(task(source))
        part = ours.train if source == "aircraft" else ours.test
        pairs = [theirs[i] for i in range(len(part))]
        names = [getattr(theirs, "classes", FLOWERS)[label].strip(" ?") for _, label in pairs]
        assert len(theirs) == len(part) and names == [ours.class_names[k] for k in part.labels]
        assert all(
            np.array_equal(np.asarray(im), np.asarray(part.read(i))) for i, (im, _) in enumerate(pairs)
        )


def test_the_banner_is_cut_off_and_counts(data):
    trees_fine.aircraft(data)
    a, b = (load_dataset(task(s)) for s in ("aircraft", "aircraft-cropped"))
    whole, cut = np.asarray(a.train.read(0)), np.asarray(b.train.read(0))
    assert whole.shape == (52, 40, 3)
    assert cut.shape == (32, 40, 3)
    assert np.array_equal(whole[:32], cut)
    assert whole[-15:].min() > 200
    assert a.train.ids == b.train.ids
    assert get_split(task("aircraft"), 0).digest != get_split(task("aircraft-cropped"), 0).digest


def test_the_shots_of_a_task_choose_the_released_folder(data):
    trees_fine.blood_released(data, shots=2)
    assert [len(load_dataset(task("blood", n)).train) for n in (2, 3)] == [16, 24]
    with pytest.raises(
        DiffDAError, match="does not look like Blood .*: expected bloodmnist_224.npz, or .*shot<n>"
    ):
        load_dataset(task("blood", 5))


def test_a_table_with_tabs(data):
    tree = trees_fine.skin(data)
    before = read(tree)
    table = tree.folder / "HAM10000_metadata.csv"
    (tree.folder / "HAM10000_metadata.tab").write_text("\ufeff" + table.read_text().replace(",", "\t"))
    table.unlink()
    assert read(tree).test.ids == before.test.ids


def test_hold_out_takes_whole_groups():
    samples = Samples(
        [f"im{i}" for i in range(40)],
        [i // 20 for i in range(40)],
        None,
        None,
        [f"g{i // 2}" for i in range(40)],
    )
    train, test = hold_out(samples, 0.35)
    assert np.bincount(test.labels).tolist() == [6, 6]
    assert not set(train.groups) & set(test.groups)
    assert len(train) == 28
    mixed = Samples(
        ["x", "y", "z"], [0, 1, 1], None, None, ["a", "a", "b"]
    )  # a group of two classes is on one side; each class has a group to test
    assert [len(p) for p in hold_out(mixed, 0.1)] == [0, 3]


# broken trees


def drop(*paths):
    def do(tree):
        for p in paths:
            for f in list(tree.folder.glob(p)):
                f.unlink()

    return do


def text(path, old, new):
    def do(tree):
        p = tree.folder / path
        before = p.read_bytes()
        assert old.encode() in before
        p.write_bytes(before.replace(old.encode(), new if isinstance(new, bytes) else new.encode()))
        os.utime(p, (1, 1))

    return do


def put(path, content):
    def do(tree):
        (tree.folder / path).write_bytes(content)
        os.utime(tree.folder / path, (2, 2))

    return do


def cut(path, keep=0.5):
    def do(tree):
        for p in list(tree.folder.glob(path)):
            b = p.read_bytes()
            p.write_bytes(b[: int(len(b) * keep)])
            os.utime(p, (3, 3))

    return do


def linked(path, target=None):
    "Replace a file by a link to a copy of it outside, or to nowhere."

    def do(tree):
        p = tree.folder / path
        aside = tree.folder.parent / "aside.bin"
        aside.write_bytes(p.read_bytes())
        p.unlink()
        p.symlink_to(target or aside)

    return do


def arrays(file, **changes):
    "Rewrite a MedMNIST file with other arrays; None leaves one out."

    def do(tree):
        with np.load(tree.folder / file) as f:
            a = dict(f)
        a |= {k: v(a[k]) if callable(v) else v for k, v in changes.items()}
        np.savez(tree.folder / file, **{k: v for k, v in a.items() if v is not None})
        os.utime(tree.folder / file, (4, 4))

    return do


def annotations(part, change):
    def do(tree):
        p = tree.folder / "annotations" / f"instances_{part}2017.json"
        d = json.loads(p.read_text())
        change(d)
        p.write_text(json.dumps(d))
        os.utime(p, (5, 5))

    return do


def wrong_label(x):
    x = x.copy()
    x[3:5] = 8
    return x


def set_all(key, field, value, n=None):
    def do(d):
        for a in d[key][:n]:
            a[field] = value

    return do


BROKEN = [
    ("birds", drop("classes.txt"), "birds' at .* has 1 x missing file: classes.txt"),
    ("birds", drop("images/002*/*"), "has 6 x missing file, first images/002.Anna_Hummingbird/"),
    (
        "birds",
        text("images.txt", "3 001.", "three001."),
        "1 x malformed line in images.txt: line 3: 'three001",
    ),
    ("birds", text("images.txt", "3 001.", "3 0\0001."), "1 x image in the folder of another class"),
    ("birds", text("images.txt", "\n2 001", "\n1 001"), "1 x malformed line in images.txt: line 2: '1 001"),
    (
        "birds",
        text("image_class_labels.txt", " 3\n", " 9\n"),
        "6 x image without a class of classes.txt, first 003.Cape_May_Warbler",
    ),
    (
        "birds",
        text("image_class_labels.txt", "\n2 1\n", "\n2 2\n"),
        "1 x image in the folder of another class: 001",
    ),
    (
        "birds",
        text("train_test_split.txt", "\n4 0\n", "\n4 7\n"),
        "1 x image that is neither for training .1. nor for testing .0.",
    ),
    (
        "birds",
        text("train_test_split.txt", "\n18 0\n", "\n18 0\n99 0\n"),
        "1 x line about an image that images.txt does not list: 99",
    ),
    ("birds", text("classes.txt", "2 002", "two 002"), "1 x class without a number: two 002"),
    (
        "birds",
        lambda t: [
            f(t)
            for f in (
                text("images.txt", "Anna_Hummingbird_0000", b"Ann\xe4_Hummingbird_0000"),
                drop("images/002*/*0000*"),
            )
        ],
        r"1 x missing file: images/002.Anna_Hummingbird/Ann\\udce4",
    ),
    (
        "birds",
        linked("images/001.Black_footed_Albatross/Black_footed_Albatross_0000_0.jpg"),
        "1 x link that leads out of the folder: images/001",
    ),
    (
        "birds",
        linked("images/001.Black_footed_Albatross/Black_footed_Albatross_0000_0.jpg", "/nowhere/at/all.jpg"),
        "1 x link that leads nowhere: images/001",
    ),
    (
        "birds",
        put("train_test_split.txt", trees_fine.lines((k, 1) for k in range(1, 19)).encode()),
        "has no image to test",
    ),
    (
        "aircraft",
        text("data/images_variant_test.txt", "F-16A/B", "F-17"),
        "3 x variant that variants.txt does not list, first 'F-17' of image",
    ),
    ("aircraft", drop("data/variants.txt"), "1 x missing file: variants.txt"),
    (
        "aircraft",
        text("data/images_variant_test.txt", "0100168", "0100000"),
        "1 x image with the name of another one: images/0100000.jpg",
    ),
    (
        "aircraft",
        text("data/images_variant_train.txt", "0100000 707-320", "0100000"),
        "1 x malformed line in images_variant_train.txt: line 1: '0100000'",
    ),
    ("flowers102", drop("setid.mat"), "setid.mat is missing"),
    ("flowers102", cut("imagelabels.mat"), "imagelabels.mat is damaged"),
    ("flowers102", put("imagelabels.mat", b"\0" * 400), "imagelabels.mat (is damaged|has no variable)"),
    ("flowers102", put("setid.mat", mat(trnid=np.array([[1, 2]]))), "setid.mat has no variable 'valid'"),
    (
        "flowers102",
        put("setid.mat", mat(trnid=np.array([["a", "b"]]))),
        "Variable 'trnid' of .*setid.mat is no list of numbers",
    ),
    (
        "flowers102",
        put("setid.mat", mat(trnid=[1, 0], valid=[2, 999], tstid=[3])),
        "2 x image number outside the 306 of imagelabels.mat, first 0",
    ),
    (
        "flowers102",
        put("setid.mat", mat(trnid=[1, 2], valid=[3, 4], tstid=[2, 4])),
        "2 x image with the name of another one, first jpg/image_00002.jpg",
    ),
    (
        "flowers102",
        put("imagelabels.mat", mat(labels=np.full((1, 306), 103))),
        "306 x label outside the 102 classes, first 102 of jpg/image_00001.jpg",
    ),
    ("flowers102", drop("jpg/image_0000[1-4].jpg"), "4 x missing file, first jpg/image_00001.jpg"),
    (
        "cars",
        put(
            "cars_test_annos_withlabels.mat",
            mat(annotations=np.array([[("1.jpg",)] * 2], dtype=[("fname", object)])),
        ),
        "have no field 'class': this is not the file with",
    ),
    ("cars", drop("devkit/cars_meta.mat"), "devkit/cars_meta.mat is missing"),
    (
        "cars",
        put("devkit/cars_meta.mat", mat(class_names=np.array(trees_fine.CARS[:2], dtype=object))),
        "6 x label outside the 2 classes, first 2 of cars_train/00003.jpg",
    ),
    (
        "cars",
        put(
            "devkit/cars_train_annos.mat",
            mat(
                annotations=np.array(
                    [[("x", "00001.jpg"), (1, "00002.jpg")]], dtype=[("class", object), ("fname", object)]
                )
            ),
        ),
        "1 x annotation without a class number: 1 of cars_train_annos.mat",
    ),
    ("cars", drop("cars_test/*"), "9 x missing file, first cars_test/00001.jpg"),
    (
        "blood",
        drop("PBC_dataset_normal_DIB/ig/*", "PBC_dataset_normal_DIB/platelet/*"),
        "2 x class folder without images, first ig",
    ),
    ("blood_medmnist", cut("*.npz"), "bloodmnist_224.npz is damaged"),
    ("blood_medmnist", put("bloodmnist_224.npz", b"no zip"), "bloodmnist_224.npz is damaged"),
    ("blood_medmnist", arrays("bloodmnist_224.npz", test_labels=None), "has no array 'test_labels'"),
    (
        "blood_medmnist",
        arrays("bloodmnist_224.npz", train_labels=wrong_label),
        "2 x label outside the 8 classes, first 8 of image 3 of train",
    ),
    (
        "blood_medmnist",
        arrays("bloodmnist_224.npz", train_labels=lambda y: y[:-1]),
        r"train images of shape .24, 24, 24, 3. .uint8. and 23 labels .uint8.; expected",
    ),
    (
        "blood_medmnist",
        arrays("bloodmnist_224.npz", test_images=lambda x: x.astype(np.float32)),
        "test images of shape .* .float32.",
    ),
    (
        "skin_medmnist",
        arrays("dermamnist_224.npz", train_images=lambda x: x[..., 0]),
        "train images of shape .21, 24, 24.",
    ),
    ("skin", drop("HAM10000_metadata.csv"), "does not look like Skin .*: expected HAM10000_metadata"),
    ("skin", text("HAM10000_metadata.csv", "lesion_id", "lesion"), "has no column 'lesion_id'"),
    ("skin", put("HAM10000_metadata.csv", b""), "has no column 'image_id', or no line"),
    (
        "skin",
        put("HAM10000_metadata.csv", b"lesion_id,image_id,dx\n\xff\xfe,a,nv\n"),
        "HAM10000_metadata.csv cannot be read",
    ),
    (
        "skin",
        text("HAM10000_metadata.csv", ",mel,", ",melanoma,"),
        "6 x diagnosis that is none of the 7, first 'melanoma' of ISIC_",
    ),
    ("skin", text("HAM10000_metadata.csv", "HAM_0000001,", ","), "1 x line with an empty field: line 9 of"),
    (
        "skin",
        drop("HAM10000_images_part_2/*"),
        "21 x missing file, first HAM10000_images_part_1/ISIC_0024307.jpg",
    ),
    ("brain_tumor", cut("slices_1/*.mat"), "15 x file without a readable cjdata, first slices_1/"),
    ("brain_tumor", put("slices_1/2.mat", b"text"), "1 x file without a readable cjdata: slices_1/2.mat"),
    (
        "brain_tumor",
        lambda t: (
            (t.folder / "slices_1" / "3.mat").write_bytes((t.folder / "slices_2" / "3.mat").read_bytes())
            if (t.folder / "slices_2" / "3.mat").exists()
            else (t.folder / "slices_2" / "2.mat").write_bytes((t.folder / "slices_1" / "2.mat").read_bytes())
        ),
        "1 x image with the name of another one",
    ),
    ("brain_tumor_kaggle", drop("Testing/notumor/*"), "1 x class folder without images: notumor"),
    ("coco", cut("annotations/instances_val2017.json"), "instances_val2017.json is damaged .JSONDecodeError"),
    (
        "coco",
        put("annotations/instances_val2017.json", b"\xff\xfe"),
        "instances_val2017.json is damaged .UnicodeDecodeError",
    ),
    (
        "coco",
        put("annotations/instances_val2017.json", b"[1, 2]"),
        "instances_val2017.json is damaged .TypeError",
    ),
    ("coco", drop("annotations/instances_train2017.json"), "instances_train2017.json is missing"),
    (
        "coco",
        annotations("val", set_all("annotations", "image_id", 7, 4)),
        "4 x annotation of an image that is not listed, first image 7 in instances_val2017.json",
    ),
    (
        "coco",
        annotations("val", set_all("annotations", "category_id", 14, 3)),
        "3 x annotation of a category that is not listed, first category 14",
    ),
    (
        "coco",
        annotations("val", set_all("annotations", "area", None, 2)),
        "2 x malformed annotation, first number 1 of",
    ),
    ("coco", annotations("val", set_all("categories", "name", "x", 1)), "list different categories"),
    (
        "coco",
        annotations("train", set_all("images", "file_name", "000000001000.jpg", 3)),
        "2 x image with the name of another one, first train2017/000000001000.jpg",
    ),
    (
        "coco",
        annotations("train", set_all("images", "file_name", "../../../etc/a.jpg", 1)),
        "1 x missing file",
    ),
    (
        "coco",
        annotations("train", set_all("images", "file_name", "a\0.jpg", 1)),
        "1 x file name with a zero byte",
    ),
    ("coco", drop("val2017/*"), "9 x missing file, first val2017/"),
    (
        "voc",
        drop("SegmentationObject/2007_00003[2-5].png"),
        "4 x missing file, first SegmentationObject/2007_000032.png",
    ),
    ("voc", drop("ImageSets/Segmentation/val.txt"), "1 x missing file: ImageSets/Segmentation/val.txt"),
    (
        "voc",
        put("SegmentationClass/2007_000033.png", png(np.zeros((24, 30, 3), np.uint8))),
        "1 x pair of masks that cannot be used: Mask .*2007_000033.png has mode RGB, so its numbers are lost",
    ),
    (
        "voc",
        put("SegmentationClass/2007_000033.png", png(np.zeros((24, 31)), True)),
        r"differ in size: .24, 31. and .24, 30.",
    ),
    (
        "voc",
        cut("SegmentationObject/2007_00003[3-4].png"),
        "2 x pair of masks that cannot be used, first Mask .*2007_000033.png is damaged",
    ),
    (
        "voc",
        put("SegmentationClass/2007_000033.png", png(np.full((24, 30), 21), True)),
        "1 x label outside the 20 classes: 20 of JPEGImages/2007_000033.jpg",
    ),
    (
        "voc",
        put("SegmentationClass/2007_000033.png", png(np.full((24, 30), 255), True)),
        "1 x label outside the 20 classes: -1 of JPEGImages/2007_000033.jpg",
    ),
    (
        "voc",
        text("ImageSets/Segmentation/val.txt", "2007_000075", "2007_000032"),
        "3 x image with the name of another one, first JPEGImages/2007_000032.jpg",
    ),
    (
        "voc",
        linked("SegmentationObject/2007_000033.png"),
        "1 x link that leads out of the folder: SegmentationObject/2007_000033.png",
    ),
    ("spurge", drop("apparent/*"), "1 x class folder without images: apparent"),
    ("spurge_public", drop("test/absent/*"), "1 x class folder without images: absent"),
]


@pytest.mark.parametrize("name, damage, sentence", BROKEN, ids=[f"{i}-{b[0]}" for i, b in enumerate(BROKEN)])
def test_broken_trees_are_told_in_one_sentence(name, damage, sentence, data):
    tree = built(name, data)
    damage(tree)
    with pytest.raises(DiffDAError, match=sentence) as e:
        read(tree)
    assert "\n" not in str(e.value) and str(data) in str(e.value) and str(e.value).encode()


@pytest.mark.parametrize(
    "source, folder",
    [("blood", "Blood"), ("skin", "Skin"), ("brain-tumor", "brain_tumor"), ("spurge", "spurge")],
)
def test_a_folder_of_something_else(source, folder, data):
    (data / folder / "other").mkdir(parents=True)
    with pytest.raises(DiffDAError, match="does not look like") as e:
        load_dataset(task(source))
    assert get_source(source).how in str(e.value)


def test_names_that_are_not_utf8(data):
    tree = trees_fine.birds(data)
    old = tree.folder / "images" / "002.Anna_Hummingbird" / "Anna_Hummingbird_0000_1000.jpg"
    try:
        os.rename(old, os.fsencode(old).replace(b"Anna_H", b"Ann\xe4_H"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    p = tree.folder / "images.txt"
    p.write_bytes(p.read_bytes().replace(b"/Anna_Hummingbird_0000", b"/Ann\xe4_Hummingbird_0000"))
    with pytest.raises(DiffDAError):
        read(tree)


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("birds", "images/*/*_0000_*.jpg"),
        ("coco", "val2017/*0.jpg"),
        ("voc", "JPEGImages/2007_00003*.jpg"),
        ("skin", "*/*7.jpg"),
        ("cars", "cars_*/*2.jpg"),
    ],
)
def test_truncated_images_are_counted_when_opened(name, pattern, data):
    tree = built(name, data)
    cut(pattern)(tree)
    hit = {p.stem for p in tree.folder.glob(pattern)}
    ds = read(tree)
    told = damaged(ds.train) + damaged(ds.test)
    listed = [i for i in ds.train.ids + ds.test.ids if i.rsplit("/", 1)[-1] in hit]
    assert len(told) == len(listed) > 0 and all("is damaged" in t and str(data) in t for t in told)


@pytest.mark.parametrize(
    "module, name, sentence",
    [
        ("scipy.io", "cars", "MATLAB files .* need the package scipy to be read: pip install scipy"),
        ("h5py", "brain_tumor", "7.3 need the package h5py to be read: pip install h5py"),
    ],
)
def test_packages_that_are_not_there(module, name, sentence, data, monkeypatch):
    if name == "brain_tumor":
        trees_fine.write(data / "brain_tumor", {"1.mat": b""})
    else:
        trees_fine.cars(data)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DiffDAError, match=sentence):
        load_dataset(task(get_source(name.replace("_", "-")).name))


def test_any_damage_to_a_file_of_facts_is_one_clear_error(data):
    """Bytes overwritten anywhere in the lists, tables, arrays and MATLAB files: a dataset or a DiffDAError,
    never another exception."""
    rng, refused = np.random.default_rng(0), 0
    for name, path in (
        ("birds", "images.txt"),
        ("birds", "train_test_split.txt"),
        ("aircraft", "data/images_variant_train.txt"),
        ("flowers102", "setid.mat"),
        ("cars", "devkit/cars_train_annos.mat"),
        ("blood_medmnist", "bloodmnist_224.npz"),
        ("skin", "HAM10000_metadata.csv"),
        ("coco", "annotations/instances_val2017.json"),
        ("voc", "SegmentationObject/2007_000033.png"),
    ):
        tree = built(name, data / name / path.replace("/", "-"))
        os.environ["DIFFDA_DATA"] = str(data / name / path.replace("/", "-"))  # put back by the fixture
        good = np.frombuffer((tree.folder / path).read_bytes(), np.uint8)
        for i in range(12):
            bad = good.copy()
            bad[rng.integers(0, len(bad), 8)] = rng.integers(0, 256, 8)
            (tree.folder / path).write_bytes(bad.tobytes())
            os.utime(tree.folder / path, (i + 10, i + 10))
            try:
                read(tree)
            except DiffDAError:
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_slice_without_contrast_is_black(value, tmp_path):
    h5py = pytest.importorskip("h5py")
    from diffda.datasets.medical import read_slice

    with h5py.File(tmp_path / "1.mat", "w") as f:
        f["cjdata/image"] = np.full((4, 5), value)
    assert read_slice(tmp_path / "1.mat").size == (4, 5)
    assert np.asarray(read_slice(tmp_path / "1.mat")).max() == 0
    with h5py.File(tmp_path / "2.mat", "w") as f:
        f["cjdata/image"] = np.arange(20.0).reshape(4, 5) * 100  # MATLAB's columns first
    assert np.array_equal(
        np.asarray(read_slice(tmp_path / "2.mat"))[..., 0],
        (np.arange(20.0).reshape(4, 5).T * 255 / 19).round(),
    )
