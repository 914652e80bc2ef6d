"""Images, and folders of image files, for the tests of data.py, lib/augment.py, lib/datasets.py."""
import itertools
import os

import torch
import torch.nn.functional as F
from PIL import Image

from lib import datasets, rng


def smooth_pixels(n=16, size=32, seed=0):
    """(n, 3, size, size) uint8, random but smooth: noise alone would hide errors of resampling."""
    u = rng.uniform(torch.arange(n), (3, 8, 8), seed, "pictures")
    x = F.interpolate(u, size=(size, size), mode="bicubic").clamp(0, 1)
    return x.mul(255).round().to(torch.uint8)


def make_images(n=40, size=24, **more):
    """A data set in memory."""
    return datasets.Images("made up", "train", pixels=smooth_pixels(n, size), **more)


def write_image(path, mode="RGB", size=(40, 30), seed=0):
    """Writes an image file of that mode and (width, height) and returns its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    noise = rng.uniform(torch.tensor([seed]), (6, 5, 4), "photo")[0].mul(255).byte().numpy()
    image = Image.fromarray(noise[..., :3]).resize(size, Image.BICUBIC)
    if mode == "RGBA":
        image.putalpha(128)
    image.convert(mode).save(path)
    return path


def write_tree(root, classes=("n01", "n02"), each=6, **more):
    """Writes a folder of class folders with `each` images each and returns its path."""
    for c, (name, i) in enumerate(itertools.product(classes, range(each))):
        write_image(f"{root}/{name}/{name}_{i}.JPEG", seed=c, **more)
    return str(root)
