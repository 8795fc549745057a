"""Datasets of everyday objects, of domains and levels, and of the user's own: read from trees of the true
form, and told clearly what is wrong with one."""

import dataclasses, hashlib, json, os, pickle, shutil

import numpy as np, pytest
from PIL import Image

import trees
from diffda.core import DiffDAError
from diffda.store import Store
from diffda.data import Task, Training, get_split, load_dataset
from diffda.datasets.base import damaged, distinct, get_source, hold_out, list_sources
from diffda.datasets.domains import LEVELS
from diffda.datasets.folders import HeldOut, user_dataset
from diffda.own import user_task
from diffda.datasets.natural import CALTECH101, CALTECH97, IMAGENET100
from diffda.pipeline import plan, run_all

TINY = Training("small-resnet", epochs=1, batch_size=8, lr=0.05, resize=32, crop=32, pad=2, evaluations=1)


def task(dataset, shots=2, **kw):
    return Task(f"tiny-{dataset}", dataset, "paper", "conventional", shots, TINY, "", "sd15", **kw)


def read(dataset):
    return load_dataset(task(dataset))


TREES = {
    "caltech101": trees.caltech101,
    "caltech101-full": trees.caltech101,
    "cifar10": trees.cifar10,
    "cifar100": trees.cifar100,
    "imagenet1k": trees.imagenet,
    "imagenet100": trees.imagenet,
    "tiny-imagenet": trees.tiny_imagenet,
    "domainnet": trees.domainnet,
    **{f"semi-inat-{level}": trees.semi_inat for level in LEVELS},
}
OTHERS = {
    "subset": ("cifar100", trees.cifar100_subset),
    "kaggle": ("imagenet1k", lambda r, **kw: trees.imagenet(r, "kaggle", **kw)),
    "devkit": ("imagenet1k", lambda r, **kw: trees.imagenet(r, "devkit", **kw)),
    "kaggle-100": ("imagenet100", lambda r, **kw: trees.imagenet(r, "kaggle", **kw)),
    "released": ("caltech101", trees.released),
    "released-100": (
        "imagenet100",
        lambda r, **kw: trees.released(r, "ImageNet100", ("red_fox", "robin"), **kw),
    ),
}
FORMS = {**{name: (name, build) for name, build in TREES.items()}, **OTHERS}
OWN = {
    "folders": trees.class_folders,
    "train-test": trees.train_test,
    "val": lambda r, **kw: trees.train_test(r, parts=("training", "valid"), **kw),
    "jsonl": trees.imagefolder,
    "meta-csv": lambda r, **kw: trees.imagefolder(r, "csv", **kw),
    "nested": lambda r, **kw: trees.imagefolder(r, nested=True, **kw),
    "unsplit": lambda r, **kw: trees.imagefolder(r, split=False, **kw),
    "csv": trees.csv_list,
    "headless": lambda r, **kw: trees.csv_list(r, head=False, **kw),
    "csv-unsplit": lambda r, **kw: trees.csv_list(r, split=False, head=False, **kw),
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    "The folder that DIFFDA_DATA names, in which a part of a dataset is welcome."
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    return tmp_path / "data"


def refused(dataset, *sentences):
    "The one error that reading `dataset` raises; it must contain all `sentences`."
    with pytest.raises(DiffDAError) as e:
        read(dataset)
    for s in sentences:
        assert s in str(e.value), str(e.value)
    return str(e.value)


def edit(path, change):
    path.write_text(change(path.read_text()))


# all of them


@pytest.mark.parametrize("form", FORMS)
def test_a_split_does_not_depend_on_the_disk(form, root, tmp_path, monkeypatch):
    "Same ids and digest when the files were made in the opposite order, in another place."
    dataset, build = FORMS[form]
    build(root)
    a = get_split(task(dataset), 1)
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path / "elsewhere"))
    build(tmp_path / "elsewhere", reverse=True)
    b = get_split(task(dataset), 1)
    assert a.train.ids == b.train.ids and a.test.ids == b.test.ids and a.digest == b.digest
    k = len(a.class_names)
    assert len(a.train) == 2 * k
    assert set(a.train.labels) == set(range(k))
    assert not set(a.train.ids) & set(a.test.ids)
    assert len(set(a.class_names)) == k >= 2


@pytest.mark.parametrize("form", FORMS)
def test_every_image_is_rgb(form, root):
    dataset, build = FORMS[form]
    build(root)
    found = read(dataset)
    for part in (found.train, found.test, *found.also.values()):
        assert damaged(part) == []
        assert all(part.read(i).mode == "RGB" for i in range(len(part)))
        assert len(part) > 0


@pytest.mark.parametrize("dataset", TREES)
def test_a_part_does_not_pass_for_the_whole(dataset, root, monkeypatch):
    folder = TREES[dataset](root)
    n, source = len(read(dataset).class_names), get_source(dataset)
    monkeypatch.delenv("DIFFDA_PARTIAL")
    if dataset.startswith("cifar"):
        refused(
            dataset,
            f"Dataset '{dataset}' at {folder}",
            f"{7 if dataset == 'cifar10' else 3} x file that is not the published one "
            "(its MD5 sum differs), first ",
        )
    else:
        refused(
            dataset,
            f"{n} classes where {source.classes} are expected",
            f"images in train where {source.counts['original']['train']} are expected",
            "DIFFDA_PARTIAL=1",
        )


@pytest.mark.parametrize("dataset", TREES)
def test_no_dataset_and_an_empty_one(dataset, root):
    source = get_source(dataset)
    refused(dataset, f"Dataset {source.title} is not in {root}", source.expects, source.how)
    (root / source.folders[0]).mkdir(parents=True)
    refused(
        dataset, f"{root / source.folders[0]} does not look like {source.title}: expected {source.expects}"
    )


def test_facts():
    for name in TREES:
        s = get_source(name)
        assert s.page.startswith("http")
        assert s.licence
        assert s.how.endswith(".")
        assert s.size_gb > 0
        assert s.counts["original"]["train"] > s.counts["original"]["test"]
        assert name in list_sources()


@pytest.mark.parametrize("form", list(FORMS) + list(OWN))
def test_one_epoch(form, root, tmp_path):
    if form in OWN:
        t = dataclasses.replace(user_task(OWN[form](root), 2, backbone="nano"), training=TINY)
    else:
        t = task(FORMS[form][0])
        FORMS[form][1](root)
    row = run_all(plan(["baseline"], [t], (0,)), Store(tmp_path / "store"), progress=False).iloc[0]
    assert row.n_real == 2 * len(load_dataset(t).class_names) and 0 <= row.top1 <= 100


# what several readers need


def test_hold_out_by_hand(root):
    trees.caltech101(root, per_class=11)
    found = read("caltech101")
    ids = [f"ant/image_{i:04d}" for i in range(1, 12)]
    order = sorted(ids, key=lambda s: hashlib.sha256(f"test/{s}".encode()).digest())
    assert [i for i in found.test.ids if i.startswith("ant/")] == sorted(order[:2])
    assert [i for i in found.train.ids if i.startswith("ant/")] == sorted(order[2:])
    train, test = hold_out(found.train, 0.01)
    assert len(test) == 3 and len(train) == len(found.train) - 3  # at least one of each class


def test_distinct():
    assert distinct({"a": "crane", "b": "Crane ", "c": "red fox"}) == {
        "a": "crane_a",
        "b": "Crane_b",
        "c": "red_fox",
    }


# Caltech-101


def test_caltech(root):
    top = trees.caltech101(root) / "101_ObjectCategories"
    found, full = read("caltech101"), read("caltech101-full")
    assert all(
        get_source(n).class_names == tuple(sorted(get_source(n).class_names))
        for n in ("caltech101", "caltech101-full")
    )  # the order in which folders are read
    assert found.class_names == ["accordion", "ant", "inline_skate"]
    assert full.class_names == ["accordion", "ant", "cougar_face", "inline_skate"]
    assert sorted(found.train.ids + found.test.ids) == [
        f"{c}/image_{i:04d}" for c in found.class_names for i in range(1, 7)
    ]
    assert all(
        found.class_names[y] == i.split("/")[0]
        for part in (found.train, found.test)
        for i, y in zip(part.ids, part.labels)
    )
    assert len(found.test) == 3
    import torchvision

    tv = torchvision.datasets.Caltech101(root)
    theirs = {
        f"{tv.categories[y]}/image_{i:04d}": np.asarray(tv[k][0].convert("RGB"))
        for k, (i, y) in enumerate(zip(tv.index, tv.y))
    }
    assert set(theirs) == set(full.train.ids + full.test.ids)
    assert all(
        np.array_equal(theirs[i], np.asarray(full.train.read(k))) for k, i in enumerate(full.train.ids)
    )
    assert load_dataset(task("caltech101", names="readable")).class_names == [
        "accordion",
        "ant",
        "inline skate",
    ]
    shutil.move(top, root / "caltech101" / "moved")
    (root / "caltech101" / "caltech-101").mkdir()
    shutil.move(root / "caltech101" / "moved", root / "caltech101" / "caltech-101" / "101_ObjectCategories")
    assert read("caltech101").train.ids == found.train.ids  # as the zip unpacks


def test_caltech_by_the_numbers():
    assert len(CALTECH97) == 97
    assert set(CALTECH101) - set(CALTECH97) == {
        "Faces_easy",
        "cougar_face",
        "crocodile_head",
        "flamingo_head",
    }
    assert sum(CALTECH101.values()) == 8677
    assert get_source("caltech101").counts["original"] == {"train": 6501, "test": 1576}
    assert get_source("caltech101-full").counts["original"] == {"train": 6982, "test": 1695}
    assert list(CALTECH101) == sorted(CALTECH101)  # the order of torchvision


def test_caltech_broken(root, tmp_path):
    top = trees.caltech101(root) / "101_ObjectCategories"
    for c in ("unicorn", "gryphon"):
        (top / c).mkdir()
    (top / "watch").mkdir()
    refused(
        "caltech101",
        "2 x folder that is no class of the list, first gryphon",
        "1 x class folder without images: watch",
    )
    for c in ("unicorn", "gryphon", "watch"):
        (top / c).rmdir()
    (tmp_path / "outside.jpg").write_bytes(trees.picture("x"))
    for i in (1, 2):
        (top / "ant" / f"image_000{i}.jpg").unlink()
        (top / "ant" / f"image_000{i}.jpg").symlink_to(tmp_path / "outside.jpg")
    (top / "ant" / "image_0003.jpg").unlink()
    (top / "ant" / "image_0003.jpg").symlink_to(top / "nowhere.jpg")
    (top / "ant" / "image_0004.jpg").unlink()
    (top / "ant" / "image_0004.jpg").symlink_to(top / "accordion" / "image_0001.jpg")  # stays inside
    open(os.fsencode(top / "accordion") + b"/caf\xe9.jpg", "wb").write(trees.picture("y"))
    refused(
        "caltech101",
        "2 x link that leads out of the folder, first ant/image_0001.jpg",
        "1 x link that leads nowhere: ant/image_0003.jpg",
        "1 x file name that is not UTF-8: accordion/caf\\udce9.jpg",
    )


def test_truncated_images_are_counted_by_damaged(root):
    top = trees.caltech101(root, per_class=10) / "101_ObjectCategories"
    for i in range(1, 11):
        p = top / "ant" / f"image_{i:04d}.jpg"
        p.write_bytes(p.read_bytes()[:200])
    found = read("caltech101")
    told = damaged(found.train) + damaged(found.test)
    assert len(told) == 10 and all("ant/image_" in t and "is damaged" in t for t in told)


def test_released_folders(root):
    trees.released(root)
    found = read("caltech101")
    assert found.layout == "released"
    assert found.class_names == ["accordion", "ant"]
    assert found.train.ids[0] == "train/accordion/accordion_0"
    assert len(found.test) == 4
    refused("caltech101-full", "does not look like Caltech-101 (101 classes)")  # they are 97 classes


# CIFAR


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, root):
    trees.cifar(root, name, per_class=7)
    found = read(name)
    assert found.class_names == (
        ["airplane", "automobile", "bird"] if name == "cifar10" else ["apple", "aquarium_fish", "baby"]
    )
    assert found.train.ids == [f"{name}-train-{i:05d}" for i in range(21)]
    assert found.train.labels.tolist() == [0, 1, 2] * 7
    assert found.test.ids[-1] == f"{name}-test-00005"
    for i in (0, 11, 20):
        assert np.array_equal(
            np.asarray(found.train.read(i)), trees.pixels(f"{name}train{i}", i % 3, (32, 32))
        )
    assert found.train.mark(0) != found.train.mark(1)


def test_cifar_lies_where_torchvision_puts_it(root):
    folder = trees.cifar100(root)
    ids = read("cifar100").train.ids
    shutil.move(folder / "cifar-100-python", root)
    folder.rmdir()  # CIFAR100(root, download=True)
    assert read("cifar100").train.ids == ids


def test_cifar_broken(root):
    top = trees.cifar100(root) / "cifar-100-python"
    good = pickle.loads((top / "train").read_bytes())
    (top / "train").write_bytes(pickle.dumps({**good, "fine_labels": [7, -1] + good["fine_labels"][2:]}))
    refused("cifar100", "2 x label outside the 3 classes, first 7 in train")
    (top / "train").write_bytes(pickle.dumps({**good, "fine_labels": good["fine_labels"][1:]}))
    refused("cifar100", "1 x array with another number of labels than images: train: 17 and 18")
    (top / "train").write_bytes((top / "meta").read_bytes()[:20])
    refused("cifar100", f"The files of cifar100 in {top} are damaged")
    (top / "train").unlink()
    (top / "meta").unlink()
    refused("cifar100", "2 x missing file, first train")


class Forged:
    "An entry of a pickle that calls something when the file is opened."

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_forged_file_runs_nothing(name, protocol, root, tmp_path, monkeypatch):
    "Where a part is welcome no MD5 sum is compared; a command in a pickle is still not run."
    folder = trees.cifar(root, name)
    victim = next(folder.rglob("data_batch_3" if name == "cifar10" else "train"))
    trace = tmp_path / "was_here"
    calls = [(os.system, f"touch {trace}"), (eval, f"open({str(trace)!r}, 'w')")]
    good = pickle.loads(victim.read_bytes())
    for call in calls:
        victim.write_bytes(pickle.dumps({**good, "extra": Forged(*call)}, protocol))
        refused(name, f"The files of {name} in {victim.parent} are damaged", "which is no part of an array")
        assert not trace.exists()
    pickle.loads(victim.read_bytes())
    assert trace.exists()  # the forgery is a true one
    monkeypatch.delenv("DIFFDA_PARTIAL")
    refused(name, "file that is not the published one")


@pytest.mark.parametrize("dtype", ["float32", "int64", "O"])
def test_pixels_of_another_type(dtype, root):
    top = trees.cifar100(root) / "cifar-100-python"
    good = pickle.loads((top / "train").read_bytes())
    (top / "train").write_bytes(pickle.dumps({**good, "data": good["data"].astype(dtype)}, 2))
    refused("cifar100", "are damaged (pixels of type ")


def test_cifar_subset(root):
    folder = trees.cifar100_subset(root)
    found = read("cifar100")
    assert found.layout == "released"
    assert found.train.ids[:2] == ["train-subset/apple/0", "train-subset/apple/1"]
    assert found.test.ids[0] == "cifar100-test-00000"
    assert len(found.train) == 12
    (folder / "train-subset" / "baby").rename(folder / "train-subset" / "babe")
    refused(
        "cifar100",
        "1 x folder that is no class of the list: train-subset/babe",
        "1 x missing class folder: train-subset/baby",
    )
    shutil.rmtree(folder / "cifar-100-python")
    refused("cifar100", "does not look like CIFAR-100")


# ImageNet

WNIDS = sorted(list(trees.SYNSETS)[:5])
WORDS = ["robin", "crane", "Cardigan", "red_fox", "hare"]


@pytest.mark.parametrize("layout", ["torchvision", "kaggle", "devkit"])
def test_imagenet(layout, root):
    trees.imagenet(root, layout)
    found = read("imagenet1k")
    assert found.class_names == WORDS  # in the order of the ids; words that repeat are tested below
    assert found.train.ids[:5] == [
        *(f"train/n01558993/n01558993_{i}" for i in range(100, 104)),
        "train/n02012849/n02012849_100",
    ]
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    answers = {f"val/ILSVRC2012_val_{k + 1:08d}": k % 5 for k in range(10)}
    assert dict(zip(found.test.ids, found.test.labels.tolist())) == answers
    some = read("imagenet100")
    assert some.class_names == ["robin", "red_fox", "hare"]
    assert some.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(some.train) == 12


def test_the_forms_of_imagenet_give_the_same_splits(root):
    digests = set()
    for layout in ("torchvision", "kaggle", "devkit"):
        folder = trees.imagenet(root, layout)
        digests.add((get_split(task("imagenet1k"), 0).digest, get_split(task("imagenet100"), 0).digest))
        shutil.rmtree(folder)
    assert len(digests) == 1


def test_imagenet_as_torchvision_reads_it(root):
    import torchvision

    folder = trees.imagenet(root)
    for split, part in (("train", read("imagenet1k").train), ("val", read("imagenet1k").test)):
        tv = torchvision.datasets.ImageNet(folder, split)
        assert {os.path.splitext(os.path.basename(p))[0]: y for p, y in tv.imgs} == {
            i.split("/")[-1]: y for i, y in zip(part.ids, part.labels)
        }
        assert [c[0].replace(" ", "_") for c in tv.classes] == WORDS


@pytest.mark.parametrize("layout", ["torchvision", "kaggle", "devkit"])
def test_words_that_repeat(layout, root):
    trees.imagenet(root, layout, wnids=tuple(trees.SYNSETS))
    assert read("imagenet1k").class_names == [
        "robin",
        "crane_n02012849",
        "Cardigan_n02113186",
        "red_fox",
        "hare",
        "cardigan_n02963159",
        "cocktail_shaker",
        "crane_n03126707",
    ]
    assert load_dataset(task("imagenet1k", names="readable")).class_names == [
        "robin",
        "crane bird",
        "Cardigan Welsh corgi",
        "red fox",
        "hare",
        "cardigan",
        "cocktail shaker",
        "construction crane",
    ]


def test_imagenet100_list():
    assert len(IMAGENET100) == 100
    assert IMAGENET100["n02869837"] == "bonnet"
    assert IMAGENET100["n13040303"] == "stinkhorn"
    assert IMAGENET100["n02086240"] == "Shih-Tzu"


def test_imagenet_broken(root):
    folder = trees.imagenet(root, "kaggle")
    val = folder / "ILSVRC/Data/CLS-LOC/val"
    edit(
        folder / "LOC_val_solution.csv",
        lambda t: (
            t.replace("ILSVRC2012_val_00000003,n02113186", "ILSVRC2012_val_00000003;n02113186")
            .replace("_00000004,n02119022", "_00000004,")
            .replace("_00000001,n01558993", "_00000001,n09999999")
        ),
    )
    refused(
        "imagenet1k",
        "2 x malformed line in LOC_val_solution.csv, first line 8: 'ILSVRC2012_val_00000004, 1 2 30",
    )
    edit(
        folder / "LOC_val_solution.csv",
        lambda t: "".join(
            l + "\n" for l in t.splitlines() if "_00000003;" not in l and "_00000004," not in l
        ),
    )
    (val / "ILSVRC2012_val_00000002.JPEG").unlink()
    (val / "ILSVRC2012_val_00000005.JPEG").unlink()
    refused(
        "imagenet1k",
        "2 x image without a label, first ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_0000000",
        "1 x label outside the list of classes: n09999999 of ILSVRC2012_val_00000001",
    )
    trees.imagenet(root, "kaggle")
    for n in (2, 5):
        (val / f"ILSVRC2012_val_0000000{n}.JPEG").unlink()
    refused("imagenet1k", "2 x missing file, first ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_0000000")
    (val.parent / "train" / "n00000000").mkdir()
    (val.parent / "train" / "fox").mkdir()
    refused("imagenet1k", "2 x folder that is no class of the list, first ILSVRC/Data/CLS-LOC/train/fox")
    refused("imagenet100", "1 x folder that is no class of the list: ILSVRC/Data/CLS-LOC/train/fox")
    (folder / "LOC_val_solution.csv").unlink()
    refused("imagenet100", "validation images without labels")
    (folder / "LOC_synset_mapping.txt").unlink()
    refused("imagenet1k", "nothing that tells their words")


@pytest.mark.parametrize(
    "layout, file", [("torchvision", "meta.bin"), ("devkit", "ILSVRC2012_devkit_t12/data/meta.mat")]
)
def test_imagenet_lists_that_are_damaged(layout, file, root):
    path = trees.imagenet(root, layout) / file
    path.write_bytes(path.read_bytes()[:100])
    refused("imagenet1k", f"{path} is damaged")


def test_imagenet_devkit_numbers(root):
    folder = trees.imagenet(root, "devkit")
    edit(
        folder / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
        lambda t: "77\nx\n" + t[4:],
    )
    refused(
        "imagenet1k",
        "1 x malformed line in ILSVRC2012_validation_ground_truth.txt: line 2: 'x'",
        "1 x label outside the list of classes: 77",
    )


# Tiny ImageNet


def test_tiny(root):
    trees.tiny_imagenet(root)
    found = read("tiny-imagenet")
    assert found.class_names == WORDS
    assert found.train.ids[:2] == ["train/n01558993_0", "train/n01558993_1"]
    assert found.train.labels.tolist() == sorted([0, 1, 2, 3, 4] * 4)
    assert dict(zip(found.test.ids, found.test.labels.tolist())) == {f"val/val_{k}": k % 5 for k in range(10)}


def test_tiny_broken(root):
    folder = trees.tiny_imagenet(root)
    edit(
        folder / "val/val_annotations.txt",
        lambda t: t.replace("val_0.JPEG\tn01558993", "val_0.JPEG n01558993").replace(
            "val_1.JPEG\tn02012849", "val_1.JPEG\tn09999999"
        ),
    )
    edit(folder / "words.txt", lambda t: t.replace("n02326432", "n02326433"))
    shutil.rmtree(folder / "train/n02119022")
    refused(
        "tiny-imagenet",
        "1 x malformed line in val_annotations.txt: line 1: 'val_0.JPEG n01558993",
        "1 x label outside the list of classes: n09999999 of val_1.JPEG",
        "1 x class without a word in words.txt: n02326432",
        "1 x missing class folder: train/n02119022/images",
        "1 x image without a label: val/images/val_0.JPEG",
    )


# DomainNet


def test_domainnet(root):
    trees.domainnet(root)
    found = read("domainnet")
    assert found.class_names == ["aircraft_carrier", "t-shirt", "The_Eiffel_Tower"]
    assert list(found.also) == ["clipart", "infograph", "painting", "quickdraw", "sketch"]
    assert found.train.ids[:2] == [
        "real/The_Eiffel_Tower/real_003_000001",
        "real/The_Eiffel_Tower/real_003_000002",
    ]
    assert len(found.train) == 12
    assert len(found.test) == 6
    for name, part in (("real", found.test), *found.also.items()):
        assert all(i.split("/")[:2] == [name, found.class_names[y]] for i, y in zip(part.ids, part.labels))
    assert {n: len(p) for n, p in found.also.items()} == {
        "clipart": 6,
        "infograph": 6,
        "painting": 4,
        "quickdraw": 6,
        "sketch": 6,
    }  # a class that painting lacks


def test_domainnet_broken(root):
    folder = trees.domainnet(root)
    edit(
        folder / "txt/clipart_test.txt",
        lambda t: (
            t.replace("000005.jpg 0", "000005.jpg 1")
            .replace("000006.jpg 2", "000006.jpg 345")
            .replace("000005.jpg 2", "000005.jpg two")
        ),
    )
    edit(folder / "txt/sketch_test.txt", lambda t: t.replace("sketch/", "real/"))
    edit(folder / "txt/real_test.txt", lambda t: t + "real/t-shirt/real_002_000001.jpg 1\n")
    refused(
        "domainnet",
        "2 x line of a list of clipart whose label is not that of its class folder, "
        "first clipart/aircraft_carrier/clipart_001_000005.jpg 1",
        "1 x malformed line in clipart_test.txt: line 5: "
        "'clipart/The_Eiffel_Tower/clipart_003_000005.jpg two'",
        "6 x line of a list of sketch that is of another domain",
        "1 x image both to train and to test: real/t-shirt/real_002_000001.jpg",
    )
    trees.domainnet(root)
    shutil.rmtree(folder / "painting/aircraft_carrier")  # the archives that are not the cleaned ones
    refused("domainnet", "2 x missing file, first painting/aircraft_carrier/painting_001_000005.jpg")
    edit(folder / "txt/real_train.txt", lambda t: t.replace(" 1\n", " 5\n"))
    refused("domainnet", "x label that no line of real_train.txt has, first 1")
    edit(folder / "txt/real_train.txt", lambda t: t.replace(" 5\n", " 0\n"))
    refused("domainnet", "1 x label of two class folders in real_train.txt: 0: aircraft_carrier, t-shirt")


def test_domains_that_are_missing(root, monkeypatch):
    trees.domainnet(root, domains=("real", "sketch"))
    assert list(read("domainnet").also) == ["sketch"]
    monkeypatch.delenv("DIFFDA_PARTIAL")
    refused(
        "domainnet",
        "4 x missing file, first txt/clipart_test.txt",
        "4 x missing domain, first clipart",
        "DIFFDA_PARTIAL=1",
    )


# Semi-iNat


@pytest.mark.parametrize(
    "level, names, labels",
    [
        (
            "species",
            [
                "Catocala_fraxini",
                "Carex_arctata",
                "Sphingomorpha_chlorea",
                "Deltote_bankiana",
                "Fraxinus_angustifolia",
            ],
            [0, 1, 2, 3, 4],
        ),
        ("family", ["Cyperaceae", "Erebidae", "Noctuidae", "Oleaceae"], [1, 0, 1, 2, 3]),
        ("order", ["Lamiales", "Lepidoptera", "Poales"], [1, 2, 1, 1, 0]),
    ],
)
def test_semi_inat(level, names, labels, root):
    trees.semi_inat(root)
    found = read(f"semi-inat-{level}")
    assert found.class_names == names and len(found.train) == 20 and len(found.test) == 10
    for part in (found.train, found.test):
        assert all(labels[int(i.split("/")[1])] == y for i, y in zip(part.ids, part.labels))
    assert found.test.ids[0].startswith("val/0/")


def test_semi_inat_broken(root):
    folder = trees.semi_inat(root)
    (folder / "l_train/3").rename(folder / "l_train/33")
    shutil.rmtree(folder / "val/1")
    refused(
        "semi-inat-family",
        "1 x folder that is no class of annotation_v2.json: l_train/33",
        "2 x missing class folder, first l_train/3",
    )
    about = json.loads((folder / "annotation_v2.json").read_text())
    del about["annotations"][0]["order"]
    about["annotations"][1]["class_id"] = 0
    (folder / "annotation_v2.json").write_text(json.dumps(about))
    refused(
        "semi-inat-order",
        "1 x entry of annotation_v2.json without its order: {'class_id': 4",
        "1 x class that annotation_v2.json has twice: 0",
    )
    edit(folder / "annotation_v2.json", lambda t: t[:50])
    refused("semi-inat-order", f"{folder / 'annotation_v2.json'} is damaged")


# images of the user's own


@pytest.mark.parametrize("form", OWN)
def test_own_images(form, root, tmp_path):
    a, b = (user_dataset(OWN[form](p, reverse=p != root)) for p in (root, tmp_path / "elsewhere"))
    assert a.class_names == ["cat", "dog"]
    assert a.layout.startswith("user")
    assert not a.also
    assert a.train.ids == b.train.ids
    assert a.test.ids == b.test.ids
    assert not set(a.train.ids) & set(a.test.ids)
    sizes = {
        "folders": (10, 2),
        "unsplit": (10, 2),
        "csv-unsplit": (10, 2),
    }  # six of a class, of which a fifth, rounded down
    assert (len(a.train), len(a.test)) == sizes.get(form, (8, 4))
    assert damaged(a.train) == damaged(a.test) == []
    assert sorted(np.bincount(a.train.labels)) == [len(a.train) // 2] * 2
    t = user_task(OWN[form](root), 2, backbone="nano", val_per_class=1)
    split = get_split(t, 0)
    assert os.path.isabs(t.dataset)
    assert t.scale == "nano"
    assert len(split.train) == 4
    assert len(split.val) == 2
    assert split.test.ids == a.test.ids


def test_labels_of_own_images(root):
    "By the class that the fixture wrote into each name or path."
    for build, word in (
        (trees.class_folders, lambda i: i.split("/")[0]),
        (trees.train_test, lambda i: i.split("/")[1]),
        (trees.imagefolder, lambda i: i[:3]),
        (trees.csv_list, lambda i: ["cat", "dog"][int(i[-2])]),
    ):
        found = user_dataset(build(root))
        for part in (found.train, found.test):
            assert [found.class_names[y] for y in part.labels] == [word(i) for i in part.ids]
        shutil.rmtree(root / "mine")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_imagefolder_as_hugging_face_reads_it(form, root, tmp_path):
    import datasets

    folder = trees.imagefolder(root, form, nested=True)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    ours = user_dataset(folder)
    for name, part in (("train", ours.train), ("test", ours.test)):

        def key(im, c):
            return (hashlib.md5(np.asarray(im.convert("RGB")).tobytes()).hexdigest(), c)

        assert {key(r["image"], r["label"]) for r in theirs[name]} == {
            key(part.read(i), ours.class_names[part.labels[i]]) for i in range(len(part))
        }


def test_share_of_own_images(root):
    folder = trees.class_folders(root, per_class=10)
    ids = [f"cat/{i}" for i in range(10)]
    order = sorted(ids, key=lambda s: hashlib.sha256(f"test/{s}".encode()).digest())
    for share, n in ((0.3, 3), (0.05, 1), (0.99, 9)):
        assert [i for i in user_dataset(folder, share).test.ids if i.startswith("cat")] == sorted(order[:n])
    for share in (0, 1, -1, 2):
        pytest.raises(DiffDAError, user_dataset, folder, share).match("test_share is between 0 and 1; found")


def test_forms_of_own_folders(root, tmp_path):
    three = user_dataset(trees.train_test(root / "a", parts=("train", "test", "val")))
    assert list(three.also) == ["val"]
    assert len(three.also["val"]) == 4
    assert three.test.ids[0].startswith("test/")
    assert user_dataset(trees.class_folders(root / "b", classes=("train", "car"))).class_names == [
        "car",
        "train",
    ]  # vehicles
    only = user_dataset(trees.train_test(root / "c", parts=("train",)))
    assert len(only.train) == 6 and len(only.test) == 2 and only.test.ids[0].startswith("train/")
    folder = trees.class_folders(root / "d")
    for junk in (
        ".ipynb_checkpoints/x.png",
        "cat/._0.jpg",
        "cat/.cache/1.jpg",
        "__MACOSX/cat/0.jpg",
        "notes.txt",
    ):
        trees.write(folder, {junk: b"junk"})
    (folder / "cat" / "deep").mkdir()
    (folder / "cat" / "deep" / "0.jpg").write_bytes(trees.picture("deep"))
    assert sorted(user_dataset(folder).train.ids + user_dataset(folder).test.ids) == sorted(
        ["cat/deep/0", *(f"{c}/{i}" for c in ("cat", "dog") for i in range(6))]
    )
    numbers = trees.csv_list(root / "e", classes=tuple(map(str, range(8, 12))))
    assert user_dataset(numbers).class_names == ["8", "9", "10", "11"]
    (root / "images").symlink_to(trees.class_folders(tmp_path / "far"))  # the folder itself may be a link
    assert len(user_dataset(root / "images").train) == 10


def test_a_csv_from_a_spreadsheet(root):
    path = trees.csv_list(root)
    good = user_dataset(path)
    path.write_text(
        "\ufeff"
        + path.read_text()
        .replace("path,label,split", "Filename,Class,Set")
        .replace(",", ";")
        .replace("/", "\\")
        .replace("\n", "\r\n"),
        encoding="utf-8",
    )
    found = user_dataset(path)
    assert found.train.ids == good.train.ids
    assert found.train.labels.tolist() == good.train.labels.tolist()
    assert found.class_names == good.class_names
    edit(path, lambda t: t.replace("images\\", f"{path.parent}/images/"))
    assert user_dataset(path).train.ids == good.train.ids  # absolute paths into the folder


def told(path, *sentences):
    with pytest.raises(DiffDAError) as e:
        user_dataset(path)
    for s in sentences:
        assert s in str(e.value), str(e.value)


def test_own_folders_broken(root, tmp_path):
    told(root / "none", f"There is nothing at {root / 'none'}")
    folder = trees.class_folders(root, classes=("cat",))
    told(folder, "images of 1 class(es); a classifier needs at least 2")
    (folder / "dog").mkdir()
    (folder / "stray.jpg").write_bytes(trees.picture("s"))
    told(
        folder,
        "1 x image outside the class folders: stray.jpg",
        "1 x class folder without images: dog",
        str(folder),
    )
    (folder / "stray.jpg").rename(folder / "dog/a.jpg")
    told(folder, "1 x class of one image, which cannot be both trained and tested on: dog")
    (folder / "dog/b.jpg").symlink_to(trees.class_folders(tmp_path / "far") / "cat/0.jpg")
    (folder / "dog/c.jpg").symlink_to(folder / "cat/99.jpg")
    (folder / "cat/0.png").write_bytes(trees.picture("t", form="PNG"))
    told(
        folder,
        "1 x link that leads out of the folder: dog/b.jpg",
        "1 x link that leads nowhere: dog/c.jpg",
        "1 x image with the name of another one: cat/0.png",
    )
    open(os.fsencode(folder / "cat") + b"/\xff.jpg", "wb").write(trees.picture("u"))
    told(folder, "1 x file name that is not UTF-8: cat/\\udcff.jpg")
    shutil.rmtree(folder)
    folder = trees.train_test(root)
    (folder / "test/dog").rename(folder / "test/wolf")
    told(folder, "1 x class without test images: dog", "1 x class without training images: wolf")
    (folder / "valid/cat").mkdir(parents=True)
    (folder / "val").mkdir()
    told(folder, "1 x second folder for the part val")


def test_own_lists_broken(root):
    path = trees.csv_list(root, per_class=5)
    first = path.read_text()
    path.write_text(first + "images/none1.jpg,cat,train\nimages/none2.jpg,cat,train\n")
    told(path, "2 x missing file, first images/none1.jpg", f"at {path.parent}")
    path.write_text(
        first
        + "images/train00.jpg,dog,train\nimages/train01.jpg,cat,test\n../x.jpg,cat,train\n"
        + "/etc/x.jpg,cat,train\nimages/test00.jpg,cat\nimages/test01.jpg, ,test\n,cat,test\n"
        + "images/train02.jpg,cat,tarin\n"
    )
    told(
        path,
        "1 x malformed line in list.csv: line 20: 2 fields where 3 are expected",
        "2 x path that leads out of the folder, first ../x.jpg",
        "1 x row of list.csv without a label: images/test01.jpg",
        "1 x row of list.csv without a file",
        "1 x split that is not train, test or val: 'tarin' of images/train02.jpg",
        "1 x image with two labels: images/train00.jpg: cat, dog",
        "1 x image in two parts: images/train01.jpg",
    )
    path.write_text(first.replace("label", "weight"))
    told(path, f"{path} has the columns path, weight, split, and none for the label: call it label or class")
    path.write_text(first.replace(",train", ",val").replace(",test", ",val"))
    told(path, "has no training part: only val")
    path.write_text("")
    told(path, "images of 0 class(es)")
    shutil.rmtree(root / "mine")
    path = trees.imagefolder(root) / "metadata.jsonl"
    first = path.read_text()
    path.write_text(
        first
        + '{"file_name": "x.jpg", "lab\n[1, 2]\n'
        + '{"file_name": "cattrain0.jpg", "label": null, "split": "train"}\n'
        + '{"label": "cat", "split": "train"}\n'
        + '{"file_name": "dogtrain0.jpg", "label": "dog"}\n'
    )
    told(
        path.parent,
        '2 x malformed line in metadata.jsonl, first line 13: \'{"file_name": "x.jpg", "lab\'',
        "1 x row of metadata.jsonl without a label: cattrain0.jpg",
        "1 x row of metadata.jsonl without a file",
        "1 x image in two parts: dogtrain0.jpg",
    )
    path.write_text('{"file_name": "cattrain0.jpg", "text": "a cat"}\n')
    told(path.parent, "has the columns file_name, text, and none for the label")


def test_what_is_not_read_is_said(root):
    folder = trees.class_folders(root)
    for name in ("cat/a.heic", "dog/b.HEIC", "dog/c.avif", "dog/readme.txt", "dog/.DS_Store"):
        (folder / name).write_bytes(b"x")
    with pytest.warns(
        UserWarning,
        match=r"holds 3 files with endings that are not read \(1 x .avif, 2 x .heic\) beside 12 images",
    ):
        user_dataset(folder)
    with pytest.raises(DiffDAError, match="test_share is between 0 and 1; found x"):
        user_dataset(folder, test_share="x")
    with pytest.raises(DiffDAError, match="form of class names"):
        user_dataset(folder, names="zzz")
    (root / "long.csv").write_text("path,label\n" + "x" * 200_000 + ",cat\n")
    with pytest.raises(DiffDAError, match="is no CSV file that can be read: line 2, field larger than"):
        user_dataset(root / "long.csv")


def test_user_task(root, monkeypatch):
    folder = trees.class_folders(root, classes=("red_cat", "blue_dog"))
    monkeypatch.chdir(root)
    t = user_task("mine", 3, backbone="nano")
    assert t.dataset == str(folder)
    assert t.name == "mine"
    assert load_dataset(t).class_names == ["blue dog", "red cat"]
    assert load_dataset(dataclasses.replace(t, names="folder")).class_names == ["blue_dog", "red_cat"]
    big = user_task(folder, family="medical", medium="a scan", name="scans", metaclass="cell")
    assert (
        big.scale,
        big.backbone,
        big.training,
        big.shots,
        big.family,
        big.medium,
        big.name,
        big.metaclass,
    ) == ("paper", "sd15", Training(), None, "medical", "a scan", "scans", "cell")
    assert len(get_split(big, 0).train) == 10
    with pytest.raises(DiffDAError, match="shots"):
        user_task(folder, 0)
    with pytest.raises(DiffDAError, match="family"):
        user_task(folder, family="medcal")
    with pytest.raises(DiffDAError, match="names"):
        user_task(folder, names="read")
    with pytest.raises(
        DiffDAError, match=f"Class 'blue dog' of {folder} has 5 images; task 'mine' needs 6 to train"
    ):
        get_split(dataclasses.replace(t, shots=6), 0)
    with pytest.raises(
        DiffDAError,
        match="Class 'blue dog' of .* has 5 images; task 'mine' needs 9 to train. "
        "1 more of the 2 classes are too small: red cat",
    ):
        user_task(folder, 9)
    with pytest.raises(DiffDAError, match="val_per_class"):
        user_task(folder, val_per_class="2")
    victim = sorted((folder / "red_cat").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(
        DiffDAError, match=f"1 of the 12 images at {folder} cannot be read, first: Image {victim} is damaged"
    ):
        user_task(folder, 3)
    assert user_task(folder, 3, check=False).shots == 3
    trees.class_folders(root / "two", classes=("a_b", "a b"))
    with pytest.raises(DiffDAError, match="differ only in blanks and underscores"):
        user_task(root / "two" / "mine")


def test_what_is_held_out_is_said(root, capsys):
    folder = trees.class_folders(root, per_class=10)
    t = user_task(folder, 3, backbone="nano")
    assert t.held_out == HeldOut(0.2, "test", 4)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "mine: 2 classes, 16 images to train on, 4 held out to test on (20% of each class" in said
    more = user_task(folder, 3, backbone="nano", test_share=0.5, test_seed=7)
    assert more.held_out == HeldOut(0.5, 7, 10)
    assert len(get_split(more, 0).test) == 10
    assert get_split(more, 0).test.ids == user_dataset(folder, 0.5, test_seed=7).test.ids
    assert get_split(more, 0).test.ids != user_dataset(folder, 0.5).test.ids
    given = user_task(trees.train_test(root / "parts"), 2, backbone="nano")
    assert given.held_out is None
    assert "4 in the test part" in capsys.readouterr().out
    with pytest.raises(DiffDAError, match="test_share is between 0 and 1; found 1"):
        user_task(folder, 3, test_share=1)


@pytest.mark.parametrize("file", ["stage.json", "records.jsonl"])
@pytest.mark.parametrize("build", [trees.class_folders, trees.imagefolder])
def test_a_store_among_the_images_is_refused(file, build, root):
    "Its images would be a class, and of results and pools nobody wants to train a classifier unawares."
    folder = build(root)
    trees.write(folder, {f"store/pool/ab12/{file}": "{}", "store/pool/ab12/images/0.jpg": trees.picture("x")})
    where = folder / "store" / "pool" / "ab12"
    told(folder, f"{folder} holds a store or results of diffda, in {where}", "move them out")


def test_a_task_of_a_folder_with_any_name(root):
    trees.class_folders(root)
    (root / "mine").rename(root / "my images (ünd more)")
    t = user_task(root / "my images (ünd more)", 2, backbone="nano", fraction=0.5)
    assert t.name == "my-images-ünd-more-"
    assert len(get_split(t, 0).train) == 2


def test_other_domains_are_looked_at(root, tmp_path):
    """One classifier of real images; its record has the accuracy on each of the other domains, and their
    images are part of the split's digest."""
    trees.domainnet(root)
    photographs = task("domainnet")
    run_all(plan(["baseline"], [photographs], (0,)), Store(tmp_path / "store"), progress=False)
    results = [json.loads(path.read_text()) for path in (tmp_path / "store").rglob("re*.json")]
    also = next(result["also"] for result in results if result.get("also"))
    assert set(also) == {"clipart", "infograph", "painting", "quickdraw", "sketch"}
    assert all(0 <= found["top1"] <= 100 for found in also.values())
    before = get_split(photographs, 0).digest
    victim = next((root / "domainnet" / "sketch").rglob("*.jpg"))
    Image.new("RGB", (8, 8), "red").save(victim)
    after = get_split(photographs, 0)
    listed = any(victim.stem in i for i in after.also["sketch"].ids)
    assert (after.digest != before) == listed
