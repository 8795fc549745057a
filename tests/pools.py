"Small splits for tests of generation, and how far two pools of synthetic images are apart."
import contextlib, dataclasses, types

import numpy as np
from PIL import Image

from diffda.core import read_json
from diffda.data import get_split
from diffda.places import nano_world

# (channels, height, width) of a latent of the nano generator
LATENT = (read_json(nano_world("generator", "vae", "config.json"))["latent_channels"], 8, 8)
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

# what stands for an image whose latents are given
ANY = Image.new("RGB", (32, 32))

@contextlib.contextmanager
def encoded_as(pipe, latents):
    """While it lasts, the autoencoder of `pipe` says `latents` (unscaled) of `ANY` image.

    diffusers' own pipelines take latents in the place of images if these have four channels; here they have
    six."""
    def encode(x): return types.SimpleNamespace(latents=latents)
    pipe.vae.encode = encode
    try: yield
    finally: del pipe.vae.encode

def from_latents(pipe, prompt, latents, **how):
    "The first result of diffusers' own image-to-image `pipe` that starts from scaled `latents`."
    unscaled = latents/pipe.vae.config.scaling_factor
    with encoded_as(pipe, unscaled): return pipe(prompt, image=ANY, **how).images[0]
