"Small made-up sources in place of the public ones, and the data that the package ships, as the build has it."
import gzip, struct

import numpy as np, pytest

from diffda import build_data as bd
from diffda.places import nano_world

def idx(array, kind=8):
    "The bytes of an idx file."
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()

def write_fashion(folder):
    """Write four idx files like Fashion-MNIST's with 310 training and 5 test images per class; the folder.

    They show a bright square whose place tells the class."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 310), ("t10k", 5)):
        y = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), n))
        x = rng.integers(0, 60, (len(y), 28, 28), dtype=np.uint8)
        for i, c in enumerate(y):
            x[i, 2*c:2*c+8, 4:24] = 200
        for name, array in (("images-idx3", x), ("labels-idx1", y)):
            (folder/f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array), 1))
    return folder

def small_sources():
    "Noise in place of MNIST and the 8x8 digits."
    rng = np.random.default_rng(1)
    def make(n, side):
        images = rng.integers(0, 256, (10*n, side, side), dtype=np.uint8)
        return images, rng.permutation(np.repeat(np.arange(10), n))
    return make(110, 28), make(95, 8)

def made_up_parts(fashion) -> dict:
    "The parts of the made-up sources; `fashion` is the folder that `write_fashion` filled."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bd, "small_sources", small_sources)
        return bd.make_parts(fashion)

def shipped(name) -> dict:
    "The arrays of the shipped data `name`."
    with np.load(nano_world("data", f"{name}.npz")) as arrays: return dict(arrays)

def shipped_parts() -> dict:
    "dataset -> part -> (images, labels, index) of what is shipped."
    fields = ("images", "labels", "index")
    found = {name: shipped(name) for name in ("fashion", "digits", "scans")}
    return {name: {part: tuple(arrays[f"{part}_{field}"] for field in fields) for part in ("pool", "test")}
            for name, arrays in found.items()}
