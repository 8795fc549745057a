"""Datasets of a few tiny images in the true form in which each is distributed.

One function per dataset: `caltech101(root, …)` writes below `root` (what `DIFFDA_DATA` names) and returns the
dataset's own folder. The images are JPEGs of 40x30 pixels in RGB, grey and CMYK in turn, unless the format
says otherwise; their pixels depend on their paths alone, and a class has a colour, so that a classifier can
learn it.
`reverse=True` writes the same files in the opposite order: nothing that is read may depend on it. `per_class`
counts the images to train on, or all where a dataset has no parts."""

import csv, hashlib, io, json, pickle
from pathlib import Path

import numpy as np, torch
from PIL import Image

MODES = ("RGB", "L", "CMYK")
SYNSETS = {
    "n01558993": "robin, American robin, Turdus migratorius",
    "n02012849": "crane",
    "n02113186": "Cardigan, Cardigan Welsh corgi",
    "n02119022": "red fox, Vulpes vulpes",
    "n02326432": "hare",
    "n02963159": "cardigan",
    "n03126707": "crane",
    "n03062245": "cocktail shaker",
}  # word-net ids and their words, as in ImageNet
TAXA = [
    ("Lepidoptera", "Erebidae", "Catocala", "Catocala fraxini"),
    ("Poales", "Cyperaceae", "Carex", "Carex arctata"),
    ("Lepidoptera", "Erebidae", "Sphingomorpha", "Sphingomorpha chlorea"),
    ("Lepidoptera", "Noctuidae", "Deltote", "Deltote bankiana"),
    ("Lamiales", "Oleaceae", "Fraxinus", "Fraxinus angustifolia"),
]


def pixels(key, label=0, size=(40, 30)):
    "A uint8 array (height, width, 3): noise that depends on `key` around a colour that depends on `label`."
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(str(key).encode()).digest()[:8], "big"))
    colour = np.random.default_rng(label).integers(40, 216, 3)
    return (colour + rng.integers(-40, 40, (size[1], size[0], 3))).clip(0, 255).astype(np.uint8)


def picture(key, label=0, mode="RGB", size=(40, 30), form="JPEG") -> bytes:
    "The bytes of an image file."
    buffer = io.BytesIO()
    Image.fromarray(pixels(key, label, size)).convert(mode).save(buffer, form)
    return buffer.getvalue()


def write(folder, files: dict, reverse=False) -> Path:
    "Write {path below `folder`: bytes or str} in that order, or the opposite one."
    folder = Path(folder)
    for rel, content in list(files.items())[:: -1 if reverse else 1]:
        path = folder / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def pictures(paths, **kw) -> dict:
    "{path: bytes} for [(path, label), …], with the modes in turn."

    def form(p):
        return "PNG" if p.endswith(".png") else "JPEG"

    return {
        p: picture(p, y, MODES[i % 3] if form(p) == "JPEG" else "RGB", form=form(p), **kw)
        for i, (p, y) in enumerate(paths)
    }


# everyday objects


def caltech101(root, classes=("accordion", "ant", "cougar_face", "inline_skate"), per_class=6, reverse=False):
    """caltech101/101_ObjectCategories/<class>/image_0001.jpg and the background folder; `classes` may be a
    number."""
    if isinstance(classes, int):
        classes = ("accordion", "ant", "inline_skate", "yin_yang", "watch")[:classes]
    paths = [
        (f"101_ObjectCategories/{c}/image_{i:04d}.jpg", y)
        for y, c in enumerate(("BACKGROUND_Google", *classes))
        for i in range(1, per_class + 1)
    ]
    return write(Path(root) / "caltech101", pictures(paths), reverse)


def cifar(root, name, classes=3, per_class=6, tests=2, reverse=False):
    """cifar10/cifar-10-batches-py or cifar100/cifar-100-python: pickles of arrays, as torchvision unpacks
    them."""
    words = {
        "cifar10": ["airplane", "automobile", "bird", "cat"],
        "cifar100": ["apple", "aquarium_fish", "baby", "bear"],
    }[name][:classes]

    def part(p, n):
        y = [k for _ in range(n) for k in range(classes)]
        return np.stack(
            [pixels(f"{name}{p}{i}", k, (32, 32)).transpose(2, 0, 1).ravel() for i, k in enumerate(y)]
        ), y

    (x, y), (tx, ty) = part("train", per_class), part("test", tests)
    if name == "cifar10":
        cut = np.array_split(np.arange(len(y)), 5)
        files = {
            f"data_batch_{b + 1}": {
                "batch_label": f"training batch {b + 1} of 5",
                "labels": [y[i] for i in k],
                "data": x[k],
                "filenames": [f"{i}.png" for i in k],
            }
            for b, k in enumerate(cut)
        }
        files |= {
            "test_batch": {"labels": ty, "data": tx},
            "batches.meta": {"label_names": words, "num_cases_per_batch": 10000, "num_vis": 3072},
        }
        top = "cifar-10-batches-py"
    else:
        files = {
            "train": {"fine_labels": y, "coarse_labels": [0] * len(y), "data": x},
            "test": {"fine_labels": ty, "coarse_labels": [0] * len(ty), "data": tx},
            "meta": {"fine_label_names": words, "coarse_label_names": ["things"]},
        }
        top = "cifar-100-python"
    return write(Path(root) / name, {f"{top}/{f}": pickle.dumps(v, 2) for f, v in files.items()}, reverse)


def cifar10(root, **kw):
    return cifar(root, "cifar10", **kw)


def cifar100(root, **kw):
    return cifar(root, "cifar100", **kw)


def cifar100_subset(root, classes=3, per_class=4, reverse=False):
    "CIFAR100/train-subset/<class>/*.png beside torchvision's files, UniDiffDA's form."
    folder = cifar100(root, classes=classes, reverse=reverse).rename(Path(root) / "CIFAR100")
    words = ["apple", "aquarium_fish", "baby", "bear"][:classes]
    return write(
        folder,
        pictures(
            [(f"train-subset/{c}/{i}.png", y) for y, c in enumerate(words) for i in range(per_class)],
            size=(32, 32),
        ),
        reverse,
    )


def imagenet(
    root,
    layout="torchvision",
    wnids=tuple(SYNSETS)[:5],
    per_class=4,
    tests=2,
    folder="imagenet",
    reverse=False,
):
    """ILSVRC2012 as `layout` 'torchvision' (train/<wnid>, val/<wnid>, meta.bin), 'devkit' (train/<wnid>, flat
    val, ILSVRC2012_devkit_t12) or 'kaggle' (ILSVRC/Data/CLS-LOC with flat val, LOC_*).

    Validation image k shows class k modulo the number of classes, in all three."""
    top = "ILSVRC/Data/CLS-LOC/" if layout == "kaggle" else ""
    answers = [(f"ILSVRC2012_val_{k + 1:08d}", wnids[k % len(wnids)]) for k in range(tests * len(wnids))]
    files = {
        f"{top}train/{w}/{w}_{100 + i}.JPEG": picture(f"{w}{i}", y, MODES[i % 3])
        for y, w in enumerate(wnids)
        for i in range(per_class)
    }
    files |= {
        f"{top}val/{f'{w}/' if layout == 'torchvision' else ''}{name}.JPEG": picture(
            name, wnids.index(w), MODES[k % 3]
        )
        for k, (name, w) in enumerate(answers)
    }
    if layout == "kaggle":
        files |= {
            "LOC_synset_mapping.txt": "".join(f"{w} {SYNSETS[w]}\n" for w in sorted(wnids)),
            "LOC_val_solution.csv": "ImageId,PredictionString\n"
            + "".join(f"{n},{w} 1 2 30 20 {w} 5 6 20 21 \n" for n, w in reversed(answers)),
        }
    elif layout == "torchvision":
        buffer = io.BytesIO()
        torch.save(({w: tuple(SYNSETS[w].split(", ")) for w in wnids}, [w for _, w in answers]), buffer)
        files["meta.bin"] = buffer.getvalue()
    else:
        from scipy.io import savemat

        entry = np.dtype(
            [
                (n, object)
                for n in (
                    "ILSVRC2012_ID",
                    "WNID",
                    "words",
                    "gloss",
                    "num_children",
                    "children",
                    "wordnet_height",
                    "num_train_images",
                )
            ]
        )
        leaves = [(k + 1, w, SYNSETS[w], "…", 0, np.zeros(0), 0, 1300) for k, w in enumerate(reversed(wnids))]
        buffer = io.BytesIO()
        savemat(
            buffer,
            {
                "synsets": np.array(
                    [*leaves, (1001, "n00001740", "entity", "…", 2, np.array([1, 2]), 5, 0)], dtype=entry
                )[:, None]
            },
        )
        number = {w: n for n, w, *_ in leaves}
        files |= {
            "ILSVRC2012_devkit_t12/data/meta.mat": buffer.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
                f"{number[w]}\n" for _, w in answers
            ),
        }
    return write(Path(root) / folder, files, reverse)


def tiny_imagenet(root, wnids=tuple(SYNSETS)[:5], per_class=4, tests=2, reverse=False):
    "tiny-imagenet-200 with wnids.txt, words.txt (of more than the classes), boxes and val_annotations.txt."
    notes = [(f"val_{k}.JPEG", wnids[k % len(wnids)]) for k in range(tests * len(wnids))]
    files = {
        f"train/{w}/images/{w}_{i}.JPEG": picture(f"{w}{i}", y, MODES[i % 3], (64, 64))
        for y, w in enumerate(wnids)
        for i in range(per_class)
    }
    files |= {
        f"train/{w}/{w}_boxes.txt": "".join(f"{w}_{i}.JPEG\t0\t0\t62\t63\n" for i in range(per_class))
        for w in wnids
    }
    files |= {
        f"val/images/{f}": picture(f, wnids.index(w), MODES[k % 3], (64, 64))
        for k, (f, w) in enumerate(notes)
    }
    files |= {
        "val/val_annotations.txt": "".join(f"{f}\t{w}\t0\t32\t44\t62\n" for f, w in notes),
        "wnids.txt": "".join(f"{w}\n" for w in reversed(wnids)),
        "words.txt": "".join(f"{w}\t{words}\n" for w, words in SYNSETS.items()),
        "test/images/test_0.JPEG": picture("test_0", 0, "RGB", (64, 64)),
    }
    return write(Path(root) / "tiny-imagenet-200", files, reverse)


def released(
    root, folder="Caltech101", classes=("accordion", "ant"), per_class=4, tests=2, shots=None, reverse=False
):
    """UniDiffDA's folders: <folder>/train/<class>/ and <folder>/test/<class>/, below shot<n>/ if `shots` is
    given."""
    top = f"shot{shots}/" if shots else ""
    paths = [
        (f"{top}{part}/{c}/{c}_{i}.jpg", y)
        for part, n in (("train", per_class), ("test", tests))
        for y, c in enumerate(classes)
        for i in range(n)
    ]
    return write(Path(root) / folder, pictures(paths), reverse)


# domains and levels

DOMAINS = ("real", "clipart", "infograph", "painting", "quickdraw", "sketch")


def domainnet(
    root,
    classes=("aircraft_carrier", "t-shirt", "The_Eiffel_Tower"),
    per_class=4,
    tests=2,
    domains=DOMAINS,
    reverse=False,
):
    "domainnet/<domain>/<class>/ and txt/<domain>_{train,test}.txt; painting has no t-shirt."
    files = {}
    for d in domains:
        for part, n, first in (("train", per_class, 1), ("test", tests, per_class + 1)):
            rows = [
                (f"{d}/{c}/{d}_{y + 1:03d}_{i:06d}.{'png' if d == 'quickdraw' else 'jpg'}", y)
                for y, c in enumerate(classes)
                for i in range(first, first + n)
                if (d, c) != ("painting", "t-shirt")
            ]
            files |= pictures(rows)
            files[f"txt/{d}_{part}.txt"] = "".join(f"{p} {y}\n" for p, y in rows)
    return write(Path(root) / "domainnet", files, reverse)


def semi_inat(root, species=5, per_class=4, tests=2, reverse=False):
    """semi-inat-2021 with annotation_v2.json, l_train/<class_id>/ and val/<class_id>/; species 0 and 2 are
    of one family, 3 of the same order."""
    paths = [
        (f"{part}/{k}/{hashlib.md5(f'{part}{k}{i}'.encode()).hexdigest()}.jpg", k)
        for part, n in (("l_train", per_class), ("val", tests))
        for k in range(species)
        for i in range(n)
    ]
    notes = [
        {
            "class_id": k,
            "kingdom": "Animalia",
            "phylum": "Arthropoda",
            "class": "Insecta",
            **dict(zip(("order", "family", "genus", "species"), TAXA[k])),
        }
        for k in range(species)
    ]
    about = {
        "info": {"year": 2021, "version": "2"},
        "annotations": notes[::-1],
        "unlabeled_taxa": [{"image_name": "x.jpg", "kingdom": "Plantae", "phylum": "Tracheophyta"}],
    }
    return write(
        Path(root) / "semi-inat-2021", {**pictures(paths), "annotation_v2.json": json.dumps(about)}, reverse
    )


# a user's own


def class_folders(root, classes=("cat", "dog"), per_class=6, reverse=False):
    "mine/<class>/<i>.jpg, without a test part."
    return write(
        Path(root) / "mine",
        pictures([(f"{c}/{i}.jpg", y) for y, c in enumerate(classes) for i in range(per_class)]),
        reverse,
    )


def train_test(root, classes=("cat", "dog"), per_class=4, tests=2, parts=("train", "test"), reverse=False):
    "mine/train/<class>/<i>.jpg and mine/test/<class>/<i>.jpg, or parts of other names."
    return write(
        Path(root) / "mine",
        pictures(
            [
                (f"{p}/{c}/{i}.jpg", y)
                for p, n in zip(parts, (per_class, tests, tests))
                for y, c in enumerate(classes)
                for i in range(n)
            ]
        ),
        reverse,
    )


def imagefolder(
    root, form="jsonl", classes=("cat", "dog"), per_class=4, tests=2, split=True, nested=False, reverse=False
):
    """mine/metadata.jsonl (or .csv) with file_name, label and perhaps split, and images of flat names;
    `nested`: train/ and test/ with a metadata file each, and no split."""
    rows = [
        (f"{c}{p}{i}.jpg", c, p)
        for p, n in (("train", per_class), ("test", tests))
        for c in classes
        for i in range(n)
    ]

    def table(rows, split):
        if form == "jsonl":
            return "".join(
                json.dumps({"file_name": f, "label": c, **({"split": p} if split else {})}) + "\n"
                for f, c, p in rows
            )
        text = io.StringIO()
        csv.writer(text).writerows(
            [
                ["file_name", "label", *(["split"] if split else [])],
                *([f, c, *([p] if split else [])] for f, c, p in rows),
            ]
        )
        return text.getvalue()

    files = pictures([(f"{p}/{f}" if nested else f, classes.index(c)) for f, c, p in rows])
    if nested:
        files |= {
            f"{part}/metadata.{form}": table([r for r in rows if r[2] == part], False)
            for part in ("train", "test")
        }
    else:
        files[f"metadata.{form}"] = table(rows, split)
    return write(Path(root) / "mine", files, reverse)


def csv_list(root, classes=("cat", "dog"), per_class=4, tests=2, split=True, head=True, reverse=False):
    "mine/list.csv with path, label and perhaps split, over images/<n>.jpg; returns the CSV file."
    rows = [
        (f"images/{p}{y}{i}.jpg", c, p)
        for p, n in (("train", per_class), ("test", tests))
        for y, c in enumerate(classes)
        for i in range(n)
    ]
    text = ("path,label" + ",split" * split + "\n") * head + "".join(
        ",".join(r[: 2 + split]) + "\n" for r in rows
    )
    return (
        write(
            Path(root) / "mine",
            {**pictures([(f, classes.index(c)) for f, c, _ in rows]), "list.csv": text},
            reverse,
        )
        / "list.csv"
    )
