"Datasets as people have them on disk, and the rule that draws the same images everywhere."

import dataclasses, functools, hashlib, io

import numpy as np, pytest, torch
from PIL import Image

from diffda import data
from diffda.core import DiffDAError, canonical
from diffda.data import (
    Prompting,
    Task,
    Training,
    get_split,
    get_task,
    list_tasks,
    load_dataset,
    make_split,
    read_split_file,
    register_task,
    split_file,
    trained_as,
    write_split_file,
)
from diffda.datasets.base import Source, register_source, released
from diffda.datasets.nano import NANO_CLASSES, composed, nano_dataset, nano_shape, outlined, scene_of
from diffda.samples import Dataset, checked_name, folder_dataset, ranked, read_image
from made_up import shipped

TOY = Task("toy", "Toy", "paper", "conventional", 2, Training(), "Toy", "sd15", val_per_class=1)


def picture(seed, mode="RGB", size=(12, 9)):
    x = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(x).convert(mode)


def tree(
    root,
    classes=("ant", "elephant"),
    n=4,
    modes=("RGB", "L", "CMYK", "RGBA", "P", "1"),
    parts=("train", "test"),
):
    """root/<part>/<class>/<image>, with the picture modes in turn; CMYK goes into a JPEG, the others into
    PNGs."""
    for part in parts:
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                mode = modes[(c * n + i) % len(modes)]
                picture(c * 100 + i, mode).save(
                    root / part / name / (f"im{i}.jpg" if mode == "CMYK" else f"im{i}.png")
                )
    return root


# reading


@pytest.mark.parametrize(
    "mode, ending",
    [
        ("L", "png"),
        ("CMYK", "jpg"),
        ("RGBA", "png"),
        ("P", "png"),
        ("1", "png"),
        ("L", "JPEG"),
        ("CMYK", "tif"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, ending):
    path = tmp_path / f"a.{ending}"
    picture(0, mode).save(path)
    im = read_image(path)
    assert im.mode == "RGB" and im.size == (12, 9)
    assert np.array_equal(np.asarray(im), np.asarray(Image.open(path).convert("RGB")))
    assert np.asarray(im).std() > 10


def test_grey_keeps_its_values(tmp_path):
    x = np.arange(108, dtype=np.uint8).reshape(9, 12) * 2
    Image.fromarray(x).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.repeat(x[..., None], 3, 2))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    x = (np.arange(108).reshape(9, 12) * 600).astype(np.uint16)
    Image.fromarray(x).save(tmp_path / "a.png")
    assert np.abs(np.asarray(read_image(tmp_path / "a.png"))[..., 0].astype(int) - x / 257).max() <= 1


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DiffDAError, match="none.png does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("this is no image")
    with pytest.raises(DiffDAError, match="text.png is damaged"):
        read_image(tmp_path / "text.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DiffDAError, match="empty.png is damaged"):
        read_image(tmp_path / "empty.png")


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "bmp", "tiff"])
def test_any_damage_is_one_clear_error(tmp_path, form):
    "Truncated anywhere, or with bytes overwritten: an image or a DiffDAError, never another exception."
    buffer, rng, refused = io.BytesIO(), np.random.default_rng(0), 0
    picture(0, size=(40, 40)).save(buffer, form)
    good = np.frombuffer(buffer.getvalue(), np.uint8)
    for i in range(60):
        bad = good.copy()
        if i % 2:
            bad = bad[: rng.integers(0, len(bad))]
        else:
            bad[rng.integers(0, len(bad), 12)] = rng.integers(0, 256, 12)
        (tmp_path / "x.img").write_bytes(bad.tobytes())
        try:
            assert read_image(tmp_path / "x.img").mode == "RGB"
        except DiffDAError:
            refused += 1
    assert refused >= 20  # half of the sixty are truncated, most of them visibly


# folders


def test_folder_dataset(tmp_path):
    ds = folder_dataset("toy", tree(tmp_path / "Toy"))
    assert ds.class_names == ["ant", "elephant"] and len(ds.train) == len(ds.test) == 8
    assert ds.train.ids[:2] == ["train/ant/im0", "train/ant/im1"]
    assert ds.train.labels.tolist() == [0] * 4 + [1] * 4
    for i in range(8):
        im, label = ds.train[i]
        assert im.mode == "RGB" and label == i // 4
    part = ds.train.take([5, 0])
    assert part.ids == ["train/elephant/im1", "train/ant/im0"] and part.labels.tolist() == [1, 0]
    assert np.array_equal(np.asarray(part.read(0)), np.asarray(ds.train.read(5)))
    assert part.mark(0) == ds.train.mark(5) != ds.train.mark(0)


def test_labels_come_from_folders_not_from_substrings(tmp_path):
    names = ("ant", "chair", "elephant", "man", "wheelchair", "woman")
    ds = folder_dataset("toy", tree(tmp_path / "Toy", names, n=2))
    assert ds.class_names == list(names)
    assert [ds.class_names[l] for l in ds.train.labels] == [i.split("/")[1] for i in ds.train.ids]
    split = make_split(dataclasses.replace(TOY, shots=1, val_per_class=1), 0, ds)
    assert [split.class_names[l] for l in split.train.labels] == list(names)
    assert [i.split("/")[1] for i in split.val.ids] == list(names)


def test_images_in_folders_below_a_class_keep_distinct_ids(tmp_path):
    root = tree(tmp_path / "Toy")
    (root / "train" / "ant" / "sub").mkdir()
    picture(1).save(root / "train" / "ant" / "sub" / "im0.png")
    ids = folder_dataset("toy", root).train.ids
    assert "train/ant/sub/im0" in ids and "train/ant/im0" in ids and len(set(ids)) == 9


def test_missing_folder_says_where_data_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path))
    with pytest.raises(
        DiffDAError,
        match=f"Caltech-101 .* is not in {tmp_path}: no folder caltech101 or .*To get it: .*DIFFDA_DATA",
    ):
        get_split("caltech101", 0)
    with pytest.raises(DiffDAError, match="Toy/train/<class>/<image>.*DIFFDA_DATA"):
        folder_dataset("toy", tmp_path / "Toy")
    tree(tmp_path / "Toy", parts=("train",))
    with pytest.raises(DiffDAError, match="Toy/test/<class>/<image>"):
        folder_dataset("toy", tmp_path / "Toy")


def test_empty_class(tmp_path):
    root = tree(tmp_path / "Toy")
    for p in ("train", "test"):
        (root / p / "bear").mkdir()
    with pytest.raises(DiffDAError, match="train has 1 x class folder without images: bear"):
        folder_dataset("toy", root)


def test_class_on_one_side_only(tmp_path):
    root = tree(tmp_path / "Toy")
    (root / "train" / "zebra").mkdir()
    picture(0).save(root / "train" / "zebra" / "a.png")
    with pytest.raises(DiffDAError, match="only on one side: zebra"):
        folder_dataset("toy", root)


def test_one_class_is_too_few(tmp_path):
    with pytest.raises(DiffDAError, match="has 1 class folder.*at least 2"):
        folder_dataset("toy", tree(tmp_path / "Toy", ("ant",)))


def test_two_images_of_one_name(tmp_path):
    root = tree(tmp_path / "Toy")
    picture(0).save(root / "train" / "ant" / "im0.jpg")
    with pytest.raises(DiffDAError, match="1 x image with the name of another one: ant/im0.png"):
        folder_dataset("toy", root)


def test_corrupt_training_image_is_named_when_read(tmp_path):
    root = tree(tmp_path / "Toy")
    (root / "train" / "ant" / "im0.png").write_bytes((root / "train" / "ant" / "im0.png").read_bytes()[:60])
    with pytest.raises(DiffDAError, match="train/ant/im0.png is damaged"):
        folder_dataset("toy", root).train.read(0)


def test_too_few_images(tmp_path):
    ds = folder_dataset("toy", tree(tmp_path / "Toy"))
    with pytest.raises(
        DiffDAError, match="'ant' of Toy has 4 images; task 'toy' needs 4 to train and 1 to validate"
    ):
        make_split(dataclasses.replace(TOY, shots=4), 0, ds)
    with pytest.raises(DiffDAError, match="has 4 images; task 'toy' needs 5 to train[.]"):
        make_split(dataclasses.replace(TOY, shots=5, val_per_class=0), 0, ds)


# the rule


def by_hand(ids, seed):
    return sorted(ids, key=lambda s: hashlib.sha256(f"{seed}/{s}".encode()).hexdigest())


def test_ranking_golden():
    # sha256sum says of '0/a', '0/b', '0/c': d3216b8d..., 7d9abe6c..., 288182d7...
    assert [["a", "b", "c"][i] for i in ranked(["a", "b", "c"], 0)] == ["c", "b", "a"]
    many = [f"train/x/{i}" for i in range(50)]
    assert (
        [many[i] for i in ranked(many, 3)]
        == by_hand(many, 3)
        != by_hand(many, 4)
        == [many[i] for i in ranked(many, 4)]
    )


def test_split_takes_the_first_of_each_class():
    split = get_split("nano-scans-25", 1)
    pool = load_dataset(split.task).train
    for c in range(10):
        order = by_hand([s for s, l in zip(pool.ids, pool.labels) if l == c], 1)
        assert [s for s, l in zip(split.train.ids, split.train.labels) if l == c] == order[:25]
        assert [s for s, l in zip(split.val.ids, split.val.labels) if l == c] == order[25:35]


def test_parts_of_a_split_are_disjoint():
    for name in list_tasks("nano"):
        s = get_split(name, 0)
        train, val, test = set(s.train.ids), set(s.val.ids if s.val else ()), set(s.test.ids)
        assert not train & val
        assert not train & test
        assert not val & test
        assert len(train) == len(s.train)
        if s.task.shots is not None:
            assert len(train) == s.task.shots * len(s.class_names)
        assert (s.val is None) == (s.task.val_per_class == 0)
        assert set(s.train.labels) == set(range(len(s.class_names)))


def test_larger_splits_contain_smaller_ones():
    ids = {n: set(get_split(f"nano-digits-{n}", 2).train.ids) for n in (1, 5, 10)}
    assert ids[1] < ids[5] < ids[10] and [len(v) for v in ids.values()] == [5, 25, 50]


def test_split_does_not_depend_on_file_order():
    ds = load_dataset(get_task("nano-scans-5"))
    shuffled = Dataset(
        ds.name, ds.class_names, ds.train.take(np.random.default_rng(0).permutation(len(ds.train))), ds.test
    )
    a, b = (make_split(get_task("nano-scans-5"), 0, d) for d in (ds, shuffled))
    assert a.train.ids == b.train.ids
    assert a.train.labels.tolist() == b.train.labels.tolist()
    assert a.digest == b.digest
    assert np.array_equal(np.asarray(a.train.read(7)), np.asarray(b.train.read(7)))


def test_seeds_change_the_digest(tmp_path):
    root = tree(tmp_path / "Toy", n=6)
    digests = [make_split(TOY, s, folder_dataset("toy", root)).digest for s in (0, 0, 1, 2, 3)]
    assert digests[0] == digests[1] and len(set(digests)) > 2


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_every_image_of_a_split_counts_in_its_digest(tmp_path, part):
    "Results are kept by this digest, so another training, validation or test image must change it."
    root = tree(tmp_path / "Toy")

    def split():
        return make_split(TOY, 0, folder_dataset("toy", root))

    before = split()
    (changed,) = root.glob(f"{getattr(before, part).ids[0]}.*")
    picture(999).save(changed)
    assert split().digest != before.digest


def test_digest_mismatch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "splits_dir", lambda: tmp_path)
    task = get_task("nano-digits-5")
    path = write_split_file(task, tmp_path, seeds=(0, 1))
    listed = read_split_file(task)
    split = get_split(task, 1)  # agrees, so it passes
    assert listed["digests"]["1"] == split.digest
    assert listed["train_ids"]["1"] == split.train.ids
    assert listed["counts"]["train"] == 25
    path.write_text(path.read_text().replace(split.digest, "0" * 16))
    with pytest.raises(
        DiffDAError,
        match="'nano-digits-5', seed 1, are not the published ones "
        f".digest {split.digest}, expected {'0' * 16}",
    ):
        get_split("nano-digits-5", 1)
    get_split(dataclasses.replace(task, shots=4), 1)  # another task of the same name is not held to it


def test_published_splits_are_those_we_draw():
    published = [t for t in list_tasks("nano") if read_split_file(get_task(t))]
    assert published == list_tasks("nano")
    for t in published:
        for seed in read_split_file(get_task(t))["digests"]:
            get_split(t, int(seed))  # raises if they differ


# tasks and the embedded data


def test_unknown_task_lists_the_nearest():
    with pytest.raises(DiffDAError, match="did you mean .*nano-fashion"):
        get_task("nano-fasion")
    with pytest.raises(DiffDAError, match="scale"):
        list_tasks("large")


def test_scales():
    assert set(list_tasks()) == set(list_tasks("nano")) | set(list_tasks("paper"))
    assert not set(list_tasks("nano")) & set(list_tasks("paper"))
    assert all(get_task(t).scale == "nano" and get_task(t).backbone == "nano" for t in list_tasks("nano"))


def test_nano_images_are_framed_or_enlarged():
    x = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    im = np.asarray(nano_shape(x))
    assert im.shape == (32, 32)
    assert np.array_equal(im[2:30, 2:30], x)
    assert im.sum() == x.sum(dtype=int)
    y = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(y)[None, None].float(), size=32, mode="bilinear", align_corners=False
    )[0, 0].numpy()
    assert np.abs(np.asarray(nano_shape(y)) - expected).max() <= 1  # PIL rounds twice, once per axis


@pytest.mark.parametrize(
    "name, k, per_class",
    [("fashion", 10, 300), ("digits", 5, 100), ("scans", 10, 90), ("outlines", 5, 100), ("stains", 10, 90)],
)
def test_embedded_data(name, k, per_class):
    ds = nano_dataset(name)
    assert ds.class_names == NANO_CLASSES[name] and len(ds.class_names) == k
    assert np.bincount(ds.train.labels).tolist() == [per_class] * k and set(ds.test.labels) == set(range(k))
    im = ds.train.read(3)
    assert im.size == (32, 32) and im.mode == "RGB" and np.asarray(im).std() > 10


def test_scans_are_scikit_learns():
    from sklearn.datasets import load_digits

    d, ds = load_digits(), nano_dataset("scans")
    for part in (ds.train, ds.test):
        for i in (0, 5, 60):
            j = int(part.ids[i].rsplit("-", 1)[1])
            assert part.labels[i] == d.target[j]
            assert np.array_equal(
                np.asarray(part.read(i)),
                np.asarray(nano_shape((d.images[j] * 255 / 16).round().astype(np.uint8)).convert("RGB")),
            )
    assert len(ds.train) + len(ds.test) == len(d.target) == len(set(ds.train.ids + ds.test.ids))


@pytest.mark.parametrize("name, base", [("outlines", "digits"), ("stains", "scans")])
def test_views_show_the_same_data_otherwise(name, base):
    view, ds = nano_dataset(name), nano_dataset(base)
    assert view.class_names == ds.class_names
    assert view.train.labels.tolist() == ds.train.labels.tolist()
    assert len(view.test) == len(ds.test)
    assert [i.replace(name, base) for i in view.train.ids] == ds.train.ids
    assert not set(view.train.ids) & set(ds.train.ids)
    for i in (0, 7, 99):
        a, b = np.asarray(view.train.read(i)), np.asarray(ds.train.read(i))
        assert a.shape == b.shape
        assert np.array_equal(a, np.asarray(view.train.read(i)))
        assert np.abs(a.astype(int) - b).mean() > 15
        assert view.train.mark(i) == view.train.mark(i) != ds.train.mark(i)
        assert view.train.mark(i) != view.train.mark(i + 1)


def test_outlines_are_composed_from_the_outline_of_the_digit():
    shape, train = nano_shape(shipped("digits")["pool_images"][3]), nano_dataset("outlines").train
    expected = composed(outlined(shape), scene_of(train.ids[3]), train.ids[3])
    assert np.array_equal(np.asarray(train.read(3)), np.asarray(expected))


def test_stains_are_the_same_pixels_everywhere():
    """A digest of one image of each class, made where the split files were made; and the digit is still the
    darkest thing on average."""
    ds, scans = nano_dataset("stains"), nano_dataset("scans")
    h = hashlib.sha256(b"".join(ds.train.read(i).tobytes() for i in range(0, 900, 90))).hexdigest()
    assert h[:16] == "b8f6bd53910f4091"
    inside, outside = [], []
    for i in range(0, 900, 30):
        v, ink = np.asarray(ds.train.read(i)).mean(2), np.asarray(scans.train.read(i))[..., 0]
        inside.append(v[ink > 200].mean())
        outside.append(v[ink < 30].mean())
    assert np.mean(outside) - np.mean(inside) > 25


def test_tasks_of_the_views():
    a, b = get_task("nano-outlines-1"), get_task("nano-stains-50")
    assert (a.family, a.metaclass, a.counterpart) == ("fine-grained", "outline", "Aircraft 1-shot")
    assert a.training == get_task("nano-digits-1").training
    assert (b.family, b.medium, b.counterpart, b.shots, b.val_per_class) == (
        "medical",
        "a stained image",
        "Skin 50/class",
        50,
        10,
    )
    assert NANO_CLASSES["outlines"] == ["five", "six", "seven", "eight", "nine"]


# limits

WRONG = [
    dict(epochs=-1), dict(epochs=0), dict(epochs="3"), dict(epochs=1.5), dict(epochs=True),
    dict(batch_size=0), dict(lr=0), dict(lr=float("nan")), dict(weight_decay=-1e-4), dict(momentum=1.0),
    dict(momentum=-0.1), dict(label_smoothing=1), dict(hflip=1.1), dict(vflip=-1), dict(rotation=181),
    dict(crop=300), dict(resize=0), dict(pad=-1), dict(evaluations=-1), dict(draws=-1), dict(optimizer="sdg"),
    dict(layers="first"), dict(schedule=""), dict(interpolation="nearest"), dict(mean=(0.5, 0.5)),
    dict(std=(0.0, 1.0, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_training_outside_its_limits_is_one_sentence(wrong):
    (field,) = wrong
    with pytest.raises(DiffDAError, match=field) as e:
        Training(**wrong)
    assert "\n" not in str(e.value)


def test_trainings_at_their_limits():
    Training(crop=272)
    Training(epochs=1, evaluations=0, momentum=0, rotation=180, hflip=1, interpolation="bicubic")
    assert Training().interpolation == "bilinear"
    assert all(get_task(name).training for name in list_tasks())
    other = trained_as(get_task("birds-5"), "dafusion")
    assert other.training == get_task("cars-4").training
    assert trained_as(get_task("nano-digits-5"), "dafusion") == get_task("nano-digits-5")


NO_FILES = ["../evil", "/evil", "a/../b", "a b", "", ".", "a//b", "a" * 101, "ü" * 51, "a\nb"]


@pytest.mark.parametrize("name", NO_FILES)
def test_names_that_cannot_be_files(name, tmp_path):
    for change in (dict(name=name), dict(dataset=name)):
        if change.get("dataset") == "/evil":  # an absolute path names one's own images
            continue
        with pytest.raises(DiffDAError, match="letters, digits"):
            dataclasses.replace(TOY, **change)
    with pytest.raises(DiffDAError, match="The name of a dataset"):
        Source(name, "", None, (), 2, {}, "", "", "", "", 0)


def test_split_files_stay_in_their_folder(tmp_path):
    assert checked_name("Blätter_2.b-c/d", "task")
    own = dataclasses.replace(TOY, dataset=str(tmp_path / ".." / "far"))
    path = split_file(own, tmp_path / "splits")
    assert path.resolve().is_relative_to(tmp_path / "splits")


@pytest.mark.parametrize("change", [dict(fraction=0), dict(fraction=1.1), dict(shots=0), dict(shots=1.0)])
def test_a_task_outside_its_limits(change):
    with pytest.raises(DiffDAError, match=next(iter(change))):
        dataclasses.replace(TOY, **change)


def test_fractions_are_nested():
    whole = get_task("nano-digits-10")
    parts = [get_split(dataclasses.replace(whole, fraction=f), 1) for f in (0.01, 0.25, 0.5, 1.0)]
    ids = [set(s.train.ids) for s in parts]
    assert [len(i) for i in ids] == [5, 10, 25, 50]  # at least one; round(2.5) is 2
    assert ids[0] < ids[1] < ids[2] < ids[3]
    assert len({tuple(s.val.ids) for s in parts}) == 1
    assert len({s.digest for s in parts}) == 4
    half = dataclasses.replace(whole, fraction=0.5)
    assert read_split_file(whole)
    assert not read_split_file(half)  # what is published is the whole
    assert canonical(whole).keys() - canonical(half).keys() == set()
    assert "fraction" not in canonical(whole)


def test_what_prompts_may_read():
    task = get_task("domainnet")
    assert isinstance(task.prompting, Prompting)
    assert task.prompting.domains == task.domains
    assert task.prompting.metaclass is None
    assert get_task("birds-5").prompting.metaclass == "bird"
    assert get_task("skin-10").prompting.medium == "a dermatoscopic image"


def test_a_stranger_registers_a_dataset_and_a_task(tmp_path, monkeypatch):
    "What a notebook of one's own does; a name that is taken is refused."
    from diffda import data
    from diffda.datasets.base import SOURCES

    for registry in (data.TASKS, SOURCES):
        registry.discover()
        monkeypatch.setattr(registry, "known", dict(registry.known))
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path))
    tree(tmp_path / "Toy")
    facts = ("train and test", "here", "free", "draw it.", 0.1)
    register_source(Source("toy", "Toys", functools.partial(released, "toy"), ("Toy",), 2, {}, *facts))
    register_task(dataclasses.replace(TOY, dataset="toy"))
    assert "toy" in list_tasks("paper")
    assert len(get_split("toy", 0).train) == 4
    with pytest.raises(DiffDAError, match="task 'birds-5' is already registered"):
        register_task(dataclasses.replace(TOY, name="birds-5"))


def test_a_few_of_a_split():
    whole = get_split("nano-fashion", 0)
    few = whole.few(2)
    assert few.train.labels.tolist() == sorted([*range(10)] * 2)
    assert few.train.ids[:2] == whole.train.ids[:2]
    assert few.val is None
    assert len(few.test) == len(whole.test)
    some = whole.few(3, classes=[8, 1])
    assert some.train.labels.tolist() == [8] * 3 + [1] * 3
    assert whole.take([7, 3]).train.ids == [whole.train.ids[7], whole.train.ids[3]]
    assert len({whole.digest, few.digest, some.digest, whole.few(1).digest}) == 4
    assert whole.few(2).digest == few.digest
