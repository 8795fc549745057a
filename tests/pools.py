"Small splits for tests of generation, and how far two pools of synthetic images are apart."
import dataclasses

import numpy as np

from diffda.data import get_split

# grey levels that arithmetic in another order may cost, see test_generate.py
LEVELS = 2

def some(positions):
    "The training images at `positions` of the nano fashion task, as a split of their own."
    whole = get_split("nano-fashion", 0)
    return dataclasses.replace(whole, train=whole.train.take(positions), val=None, digest="few")

def by_key(pool):
    "{(source id, copy): pixels} of a pool."
    rows = enumerate(pool.rows.itertuples())
    return {(row.source_id, row.copy): np.asarray(pool.image(i)).astype(int) for i, row in rows}

def distance(a, b):
    "The largest difference, in grey levels, of two pools of the same images."
    a, b = by_key(a), by_key(b)
    assert set(a) == set(b) and len(a) > 0
    return max(np.abs(pixels - b[key]).max() for key, pixels in a.items())
