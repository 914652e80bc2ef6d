"""Images per second that one CPU core decodes, crops and augments from JPEG files: our loader
(decoded by torchvision, cropped and resized by torch, colors augmented for a whole batch) against
torchvision's transforms of Pillow images one by one, with Pillow's blur as in the official code.
The files are images of the built-in data set, 500 x 375 pixels.

    python -m benchmarks.loading            # two minutes on a CPU
"""
import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2

import data
import dino
import mae
import moco_v3
from lib import augment, datasets, distributed, toy


def write_jpegs(folder, n=256):
    for index in torch.arange(n).split(32):
        for i, x in zip(index, toy.draw(index, "train", 500)["image"]):
            image = Image.fromarray(x.permute(1, 2, 0).numpy()).crop((0, 60, 500, 435))
            image.save(folder / f"{i:04}.jpg", quality=90)


def pillow_blur(sigma):
    return v2.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(*sigma))))


def torchvision_transform(view):
    """The composition of the official scripts, without the steps of probability 0."""
    kernel = v2.InterpolationMode(view.interpolation)
    steps = [v2.RandomResizedCrop(view.size, view.scale, view.ratio, interpolation=kernel),
             v2.RandomHorizontalFlip(view.flip)]
    if view.jitter_p:
        steps += [v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_p),
                  v2.RandomGrayscale(view.gray_p)]
    if view.blur_p:
        steps.append(v2.RandomApply([pillow_blur(view.blur_sigma)], view.blur_p))
    if view.solarize_p:
        steps.append(v2.RandomSolarize(128, view.solarize_p))
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(augment.MEAN, augment.STD)])


def torchvision_batches(paths, views, batch_size):
    """Yields batches forever, as a worker of torch's DataLoader makes them."""
    transforms = [torchvision_transform(view) for view in views for _ in range(view.copies)]
    while True:
        for start in range(0, len(paths) - batch_size + 1, batch_size):
            rows = []
            for path in paths[start:start + batch_size]:
                with Image.open(path) as file:
                    image = file.convert("RGB")
                rows.append([transform(image) for transform in transforms])
            yield [torch.stack(view) for view in zip(*rows)]


def measure_speeds(loaders, batch_size, n=12):
    """Images/s of each loader, from the median time of n batches. The loaders take turns, so that
    a change of the machine's speed affects all of them."""
    times = [[] for _ in loaders]
    for _ in range(n):
        for batches, taken in zip(loaders, times):
            begin = time.perf_counter()
            next(batches)
            taken.append(time.perf_counter() - begin)
    return [batch_size / statistics.median(taken) for taken in times]


def main(batch_size=64):
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    distributed.keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder))
        images = datasets.load_images(folder)
        for name, method in (("one view (MAE)", mae), ("two views (MoCo v3)", moco_v3),
                             ("2 + 8 crops (DINO)", dino)):
            views = method.views(method.Config())
            ours, reference = measure_speeds(
                (data.Loader(images, views, batch_size, workers=0).batches(),
                 torchvision_batches(images.paths, views, batch_size)), batch_size)
            print(f"{name:<20}{ours:6.0f} images/s; torchvision's transforms {reference:6.0f}; "
                  f"ratio {ours / reference:.1f}", flush=True)


if __name__ == "__main__":
    main()
