"""Small trees of files in the true formats of the fine-grained, medical and detection sets, for tests.

Each builder writes one form of one dataset below `root` (what `$DIFFDA_DATA` names) and returns a `Tree` that
says what must be read there. The same call writes the same bytes; `reverse=True` creates the files in the
opposite order. JPEGs are RGB, grey and CMYK in turn. `TREES` has all builders by name. Those of sets with a
fixed list of classes write all of them, so that a task can be drawn from the tree."""

import dataclasses, hashlib, io, json
from pathlib import Path

import numpy as np
from PIL import Image

from trees import write

CARS = ("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012")
CELLS = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
DIAGNOSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
VARIANTS = ("707-320", "BAE 146-200", "F-16A/B", "Yak-42")


@dataclasses.dataclass
class Tree:
    """`train` and `test` are {id: label}; where diffda divides the set itself, `all` is given instead.
    `groups` is {id: patient or lesion}, `masks` {id: bool array}."""

    source: str  # what `Task.dataset` says
    folder: Path
    class_names: list
    train: dict = None
    test: dict = None
    all: dict = None
    groups: dict = None
    masks: dict = None
    share: float = 0.2  # for testing, of what `all` lists
    layout: str = "original"


def jpeg(key, size=(40, 32), banner=0) -> bytes:
    """A picture drawn from `key`, as a JPEG of mode RGB, L or CMYK (also by `key`); the lowest `banner` rows
    are white."""
    h = hashlib.sha256(str(key).encode()).digest()
    x = np.random.default_rng(list(h)).integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    if banner:
        x[-banner:] = 255
    out = io.BytesIO()
    Image.fromarray(x).convert(("RGB", "L", "CMYK")[h[0] % 3]).save(out, "JPEG", quality=90)
    return out.getvalue()


def png(x, palette=False) -> bytes:
    "Array `x` as a PNG; with `palette`, its values are numbers of a palette, as in VOC's masks."
    im = Image.frombytes("P", x.shape[::-1], x.astype(np.uint8).tobytes()) if palette else Image.fromarray(x)
    if palette:
        im.putpalette([c for i in range(256) for c in (i, 255 - i, i // 2)])
    out = io.BytesIO()
    im.save(out, "PNG")
    return out.getvalue()


def mat(**variables) -> bytes:
    "A MATLAB file of version 5, compressed, as MATLAB writes them."
    from scipy.io import savemat

    out = io.BytesIO()
    savemat(out, variables, do_compression=True)
    return out.getvalue()


def lines(rows) -> str:
    return "".join(f"{' '.join(map(str, r))}\n" for r in rows)


# fine-grained


def birds(root, classes=3, per_class=6, reverse=False) -> Tree:
    "CUB_200_2011/ with its five text files; every other image of a class is for training."
    folders = [
        f"{c + 1:03d}.{n}"
        for c, n in enumerate(
            (
                ["Black_footed_Albatross", "Anna_Hummingbird", "Cape_May_Warbler"]
                + [f"Bird_{i}" for i in range(200)]
            )[:classes]
        )
    ]
    images = [
        (f"{f}/{f[4:]}_{i:04d}_{1000 * c + i}.jpg", c, i % 2 == 0)
        for c, f in enumerate(folders)
        for i in range(per_class)
    ]
    files = {f"images/{p}": jpeg(p) for p, _, _ in images}
    files |= {
        "images.txt": lines((k, p) for k, (p, _, _) in enumerate(images, 1)),
        "classes.txt": lines(enumerate(folders, 1)),
        "image_class_labels.txt": lines((k, c + 1) for k, (_, c, _) in enumerate(images, 1)),
        "train_test_split.txt": lines((k, int(t)) for k, (_, _, t) in enumerate(images, 1)),
        "bounding_boxes.txt": lines((k, "2.0", "3.0", "30.0", "20.0") for k in range(1, len(images) + 1)),
    }

    def part(train):
        return {p[:-4]: c for p, c, t in images if t == train}

    return Tree(
        "birds",
        write(Path(root) / "CUB_200_2011", files, reverse),
        [f[4:] for f in folders],
        part(True),
        part(False),
    )


def birds_released(root, per_class=3, reverse=False) -> Tree:
    "CUB_200_2011/ as UniDiffDA's train and test folders."
    folders = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    ids = {
        p: {f"{p}/{f}/{f[4:]}_{i:04d}": c for c, f in enumerate(folders) for i in range(per_class)}
        for p in ("train", "test")
    }
    return Tree(
        "birds",
        write(Path(root) / "CUB_200_2011", {f"{k}.jpg": jpeg(k) for p in ids.values() for k in p}, reverse),
        [f[4:] for f in folders],
        ids["train"],
        ids["test"],
        layout="released",
    )


def aircraft(root, per_part=3, reverse=False, source="aircraft") -> Tree:
    """fgvc-aircraft-2013b/ with four variants, whose list is not in sorted order; each photograph ends in 20
    white rows."""
    images = [
        (f"{100000 + 7 * k:07d}", v, p)
        for k, (v, p) in enumerate(
            (v, p) for p in ("train", "val", "test") for v in VARIANTS for _ in range(per_part)
        )
    ]
    files = {f"data/images/{k}.jpg": jpeg(k, (40, 52), banner=20) for k, _, _ in images}
    files |= {
        f"data/images_variant_{p}.txt": lines((k, v) for k, v, q in images if q in p)
        for p in ("train", "val", "trainval", "test")
    }
    files["data/variants.txt"] = lines((v,) for v in VARIANTS[::-1])

    def part(p):
        return {k: VARIANTS.index(v) for k, v, q in images if q == p}

    return Tree(
        source,
        write(Path(root) / "fgvc-aircraft-2013b", files, reverse),
        list(VARIANTS),
        part("train"),
        part("test"),
    )


def aircraft_cropped(root, reverse=False) -> Tree:
    "The same files, for the source that cuts the strip off."
    return aircraft(root, 2, reverse, "aircraft-cropped")


def flowers102(root, per_part=1, reverse=False) -> Tree:
    "flowers-102/ with all 102 classes; classes and parts are mixed in the numbering, as in the original."
    from diffda.datasets.fine_grained import FLOWERS

    n = 102 * 3 * per_part
    label = {
        k: (k * 5) % 102 for k in range(1, n + 1)
    }  # every class comes equally often; so do the parts within it
    part = {k: ("trnid", "valid", "tstid")[(k - 1) // 102 % 3] for k in label}

    def numbers(p):
        return [k for k in label if part[k] == p]

    files = {f"jpg/image_{k:05d}.jpg": jpeg(k, (24, 20)) for k in label}
    files |= {
        "imagelabels.mat": mat(labels=np.array([[label[k] + 1 for k in label]], np.uint8)),
        "setid.mat": mat(**{p: np.array([numbers(p)], np.uint16) for p in ("trnid", "valid", "tstid")}),
    }

    def ids(*parts):
        return {f"image_{k:05d}": label[k] for p in parts for k in numbers(p)}

    return Tree(
        "flowers102",
        write(Path(root) / "flowers-102", files, reverse),
        list(FLOWERS),
        ids("trnid", "valid"),
        ids("tstid"),
    )


def cars(root, per_class=3, reverse=False) -> Tree:
    """stanford_cars/ with three models, one of them with a slash in its name; file names start anew in the
    test part."""
    fields = [(f, object) for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    rows = [
        (1, 2, 30, 20, c + 1, f"{k + 1:05d}.jpg")
        for k, c in enumerate(c for _ in range(per_class) for c in range(3))
    ]
    annotations = mat(annotations=np.array([rows], dtype=fields))
    files = {f"cars_{p}/{r[-1]}": jpeg(f"{p}{r[-1]}") for p in ("train", "test") for r in rows}
    files |= {
        "devkit/cars_meta.mat": mat(class_names=np.array([CARS], dtype=object)),
        "devkit/cars_train_annos.mat": annotations,
        "cars_test_annos_withlabels.mat": annotations,
    }

    def part(p):
        return {f"{p}/{r[-1][:-4]}": r[-2] - 1 for r in rows}

    return Tree(
        "cars", write(Path(root) / "stanford_cars", files, reverse), list(CARS), part("train"), part("test")
    )


# medical


def medmnist(root, source, folder, file, names, per_class=3, size=24, reverse=False) -> Tree:
    "One .npz in MedMNIST's format: uint8 images (n, size, size, 3) and labels (n, 1) of train, val and test."
    arrays, ids = {}, {}
    for p in ("train", "val", "test"):
        y = np.tile(np.arange(len(names), dtype=np.uint8), per_class)
        arrays |= {
            f"{p}_images": np.random.default_rng(len(p)).integers(
                0, 256, (len(y), size, size, 3), dtype=np.uint8
            ),
            f"{p}_labels": y[:, None],
        }
        ids[p] = {f"{source}-{p}-{i:05d}": int(k) for i, k in enumerate(y)}
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return Tree(
        source,
        write(Path(root) / folder, {file: out.getvalue()}, reverse),
        list(names),
        ids["train"],
        ids["test"],
        layout="medmnist",
    )


def blood_medmnist(root, reverse=False) -> Tree:
    return medmnist(root, "blood", "Blood", "bloodmnist_224.npz", CELLS, reverse=reverse)


def skin_medmnist(root, reverse=False) -> Tree:
    return medmnist(root, "skin", "Skin", "dermamnist_224.npz", DIAGNOSES, reverse=reverse)


def blood(root, per_class=5, reverse=False) -> Tree:
    "Blood/PBC_dataset_normal_DIB/<class>/*.jpg, and a file that a Mac leaves."
    ids = {f"{c}/{c[:2].upper()}_{100000 + 13 * i}": k for k, c in enumerate(CELLS) for i in range(per_class)}
    files = {f"PBC_dataset_normal_DIB/{i}.jpg": jpeg(i) for i in ids} | {
        "PBC_dataset_normal_DIB/neutrophil/._NE_1.jpg": b"no image"
    }
    return Tree(
        "blood",
        write(Path(root) / "Blood", files, reverse),
        list(CELLS),
        all={f"blood/{i}": k for i, k in ids.items()},
    )


def _shots(root, source, folder, names, shots, reverse):
    files = {}
    for n in (shots, shots + 1):  # the neighbour must not be taken
        files |= {
            f"shot{n}/{p}/{c}/{i}.jpg": jpeg(f"{n}{p}{c}{i}")
            for p, k in (("train", n), ("test", 2))
            for c in names
            for i in range(k)
        }

    def part(p, k):
        return {f"{p}/{c}/{i}": names.index(c) for c in names for i in range(k)}

    return Tree(
        source,
        write(Path(root) / folder, files, reverse),
        list(names),
        part("train", shots),
        part("test", 2),
        layout="released",
    )


def blood_released(root, shots=2, reverse=False) -> Tree:
    "Blood/shot<n>/{train,test}/<class>, for two numbers of shots."
    return _shots(root, "blood", "Blood", CELLS, shots, reverse)


def skin_released(root, shots=2, reverse=False) -> Tree:
    "Skin/shot<n>/{train,test}/<class>, for two numbers of shots."
    return _shots(root, "skin", "Skin", DIAGNOSES, shots, reverse)


def skin(root, lesions=4, reverse=False) -> Tree:
    """HAM10000 with `lesions` lesions per diagnosis, one or two pictures each, in two folders; lesions are
    mixed in the numbering."""
    rows, k = [], 24306
    for picture in range(2):
        for n in range(lesions):
            for d, dx in enumerate(DIAGNOSES):
                if picture == 0 or n % 2 == 0:
                    rows.append((f"HAM_{1000 * d + n:07d}", f"ISIC_{k:07d}", dx))
                    k += 1
    files = {
        f"HAM10000_images_part_{1 + i % 2}/{image}.jpg": jpeg(image, (60, 45))
        for i, (_, image, _) in enumerate(rows)
    }
    files["HAM10000_metadata.csv"] = "lesion_id,image_id,dx,dx_type,age,sex,localization\n" + "".join(
        f"{l},{i},{dx},histo,80.0,male,scalp\n" for l, i, dx in rows
    )
    return Tree(
        "skin",
        write(Path(root) / "Skin", files, reverse),
        list(DIAGNOSES),
        all={i: DIAGNOSES.index(dx) for _, i, dx in rows},
        groups={i: l for l, i, _ in rows},
    )


def brain_tumor(root, patients=5, slices=2, reverse=False) -> Tree:
    """brain_tumor/ with one MATLAB 7.3 file per slice (h5py is needed) in two folders, and cvind.mat; a
    tumor is a rectangle."""
    import h5py

    files, ids, groups, masks, k = {}, {}, {}, {}, 1
    for p in range(patients):
        for c in range(3):
            for s in range(slices):
                x = np.random.default_rng(k).integers(0, 3000, (30, 24)).astype(np.int16)
                mask = np.zeros((30, 24), bool)
                mask[5 + c : 12, 3 : 9 + s] = True
                out = io.BytesIO()
                with h5py.File(
                    out, "w", userblock_size=512
                ) as f:  # MATLAB's columns are HDF5's rows, and text is 16-bit numbers
                    g = f.create_group("cjdata")
                    for name, v in (
                        ("label", np.array([[c + 1.0]])),
                        ("PID", np.array([[ord(q)] for q in f"10{c}{p:03d}"], np.uint16)),
                        ("image", x.T),
                        ("tumorMask", mask.T.astype(np.uint8)),
                        ("tumorBorder", np.array([[3.0, 5.0, 9.0, 12.0]])),
                    ):
                        g[name] = v
                content = bytearray(out.getvalue())
                content[:19] = b"MATLAB 7.3 MAT-file"
                files[f"slices_{1 + k % 2}/{k}.mat"] = bytes(content)
                ids[str(k)], groups[str(k)], masks[str(k)], k = c, f"10{c}{p:03d}", mask, k + 1
    files["cvind.mat"] = b"folds are not read"
    return Tree(
        "brain-tumor",
        write(Path(root) / "brain_tumor", files, reverse),
        ["meningioma", "glioma", "pituitary"],
        all=ids,
        groups=groups,
        masks=masks,
    )


def brain_tumor_kaggle(root, per_class=3, reverse=False) -> Tree:
    "brain_tumor/{Training,Testing}/ with four classes."
    names = ["glioma", "meningioma", "notumor", "pituitary"]
    files = {
        f"{p}/{c}/{p[:2]}-{c[:2]}_{i:04d}.jpg": jpeg(f"{p}{c}{i}")
        for p in ("Training", "Testing")
        for c in names
        for i in range(per_class)
    }

    def part(p, q):
        return {f"{q}/{c}/{p[:2]}-{c[:2]}_{i:04d}": k for k, c in enumerate(names) for i in range(per_class)}

    return Tree(
        "brain-tumor",
        write(Path(root) / "brain_tumor", files, reverse),
        names,
        part("Training", "train"),
        part("Testing", "test"),
        layout="kaggle",
    )


# detection


def coco(root, per_class=3, reverse=False) -> Tree:
    """coco2017/ with three categories whose numbers have gaps; the last image of each part has no annotation.

    The largest object of an image is a rectangle: of one polygon, of two that touch, or of run lengths; a
    smaller one of another category lies beside it."""
    numbers, names, w, h = [1, 13, 90], ["person", "stop sign", "toothbrush"], 40, 32
    files, ids, masks = {}, {}, {}

    def box(x, y, a, b):
        return [x, y, a, y, a, b, x, b]

    for part, start in (("train2017", 0), ("val2017", 500)):
        images, annotations, ids[part] = [], [], {}
        for n in range(3 * per_class + 1):
            image, c = 1000 + start + 3 * n, n % 3
            file, inside = f"{image:012d}.jpg", np.zeros((h, w), bool)
            images.append({"id": image, "file_name": file, "height": h, "width": w, "license": 1})
            files[f"{part}/{file}"] = jpeg(file, (w, h))
            if n == 3 * per_class:
                continue
            inside[2 : 20 + c, 3 + c : 25] = True
            runs = np.diff(
                np.flatnonzero(np.diff(np.r_[-1, inside.T.ravel(), -1]))
            ).tolist()  # lengths of equal stretches down the columns
            outline = (
                [box(3 + c, 2, 25, 20 + c)],
                [box(3 + c, 2, 10, 20 + c), box(10, 2, 25, 20 + c)],
                {"counts": runs, "size": [h, w]},
            )[n // 3 % 3]
            annotations.append(
                {
                    "id": 2 * n + start,
                    "image_id": image,
                    "category_id": numbers[(c + 1) % 3],
                    "area": 9.5,
                    "segmentation": [box(30, 25, 33.5, 28)],
                    "iscrowd": 0,
                    "bbox": [30, 25, 3.5, 3],
                }
            )
            annotations.append(
                {
                    "id": 2 * n + 1 + start,
                    "image_id": image,
                    "category_id": numbers[c],
                    "area": float(inside.sum()),
                    "segmentation": outline,
                    "iscrowd": int(isinstance(outline, dict)),
                    "bbox": [3 + c, 2, 22 - c, 18 + c],
                }
            )
            ids[part][f"{part}/{file[:-4]}"], masks[f"{part}/{file[:-4]}"] = c, inside
        categories = [{"id": k, "name": v, "supercategory": "thing"} for k, v in zip(numbers, names)][::-1]
        files[f"annotations/instances_{part}.json"] = json.dumps(
            {
                "info": {},
                "licenses": [],
                "images": images,
                "annotations": annotations,
                "categories": categories,
            }
        )
    return Tree(
        "coco",
        write(Path(root) / "coco2017", files, reverse),
        names,
        ids["train2017"],
        ids["val2017"],
        masks=masks,
    )


def voc(root, per_class=2, reverse=False) -> Tree:
    """VOCdevkit/VOC2012/ with all 20 classes: a large object of the class, a small one of the next class,
    void around them.

    The last image of the training list has no object."""
    from diffda.datasets.detection import VOC_NAMES

    files, ids, masks, k = {}, {}, {}, 32
    for part in ("train", "val"):
        ids[part], listed = {}, []
        for n in range(20 * per_class + (part == "train")):
            name, c = f"2007_{k:06d}", n % 20
            objects, classes = np.zeros((24, 30), np.uint8), np.zeros((24, 30), np.uint8)
            objects[0] = classes[0] = 255
            if n < 20 * per_class:
                big, small = (1, 2) if n % 2 else (2, 1)  # the larger one is not always the first
                objects[3:14, 2 : 15 + c % 4], objects[18:21, 5:20] = big, small
                classes[objects == big], classes[objects == small] = c + 1, (c + 1) % 20 + 1
                classes[3, 2] = 255  # one pixel of void inside
                ids[part][name], masks[name] = c, objects == big
            files |= {
                f"JPEGImages/{name}.jpg": jpeg(name, (30, 24)),
                f"SegmentationObject/{name}.png": png(objects, True),
                f"SegmentationClass/{name}.png": png(classes, True),
            }
            listed.append((name,))
            k += 1
        files[f"ImageSets/Segmentation/{part}.txt"] = lines(listed)
    return Tree(
        "voc",
        write(Path(root) / "VOCdevkit" / "VOC2012", files, reverse),
        list(VOC_NAMES),
        ids["train"],
        ids["val"],
        masks=masks,
    )


def spurge(root, per_class=6, reverse=False) -> Tree:
    "spurge/{absent,apparent}/*.png, as DA-Fusion's code expects them."
    ids = {
        f"{c}/{i}_{j}": k
        for k, c in enumerate(("absent", "apparent"))
        for i in range(per_class // 2)
        for j in range(2)
    }
    files = {
        f"{i}.png": png(np.random.default_rng(n).integers(0, 256, (25, 25, 3), dtype=np.uint8))
        for n, i in enumerate(ids)
    }
    return Tree(
        "spurge",
        write(Path(root) / "spurge", files, reverse),
        ["absent", "apparent"],
        all={f"spurge/{i}": k for i, k in ids.items()},
        share=0.5,
    )


def spurge_public(root, per_class=3, reverse=False) -> Tree:
    "spurge/{train,test}/{absent,apparent}/*.png, the public survey as image folders."
    ids = {
        p: {f"{p}/{c}/{i}": k for k, c in enumerate(("absent", "apparent")) for i in range(per_class)}
        for p in ("train", "test")
    }
    files = {
        f"{i}.png": png(np.random.default_rng(n).integers(0, 256, (39, 39, 3), dtype=np.uint8))
        for n, i in enumerate((*ids["train"], *ids["test"]))
    }
    return Tree(
        "spurge",
        write(Path(root) / "spurge", files, reverse),
        ["absent", "apparent"],
        ids["train"],
        ids["test"],
        layout="public",
    )


TREES = {
    f.__name__: f
    for f in (
        birds,
        birds_released,
        aircraft,
        aircraft_cropped,
        flowers102,
        cars,
        blood,
        blood_medmnist,
        blood_released,
        skin,
        skin_medmnist,
        skin_released,
        brain_tumor,
        brain_tumor_kaggle,
        coco,
        voc,
        spurge,
        spurge_public,
    )
}
