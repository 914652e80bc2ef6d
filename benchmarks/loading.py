"""Images a second that one core decodes, cuts and augments, from a folder of JPEG files: ours
(decoded by torchvision, cut and resized by torch, colours changed for a whole batch) against the
usual way, torchvision's transforms of one Pillow image after the other, blurred by Pillow as in the
official codes. The files are creatures of 500 x 375 pixels.

    python -m benchmarks.loading            # two minutes on a CPU
"""
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


def files(folder, n=256):
    for index in torch.arange(n).split(32):
        for number, x in zip(index, toy.draw(index, "train", 500)["image"]):
            picture = Image.fromarray(x.permute(1, 2, 0).numpy()).crop((0, 60, 500, 435))
            picture.save(folder / f"{number:04}.jpg", quality=90)


def blur(sigma):
    return v2.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(*sigma))))


def transform(view):
    """What the official scripts compose; steps with probability 0 are left out."""
    how = v2.InterpolationMode(view.interpolation)
    chosen = [v2.RandomResizedCrop(view.size, view.scale, view.ratio, interpolation=how),
              v2.RandomHorizontalFlip(view.flip)]
    if view.jitter_p:
        chosen += [v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_p),
                   v2.RandomGrayscale(view.grey_p)]
    if view.blur_p:
        chosen.append(v2.RandomApply([blur(view.blur_sigma)], view.blur_p))
    if view.solarize_p:
        chosen.append(v2.RandomSolarize(128, view.solarize_p))
    return v2.Compose([*chosen, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(augment.MEAN, augment.STD)])


def usual(paths, views, batch_size):
    """Batches without end, as torch's DataLoader makes them in its worker."""
    cuts = [transform(view) for view in views for _ in range(view.copies)]
    while True:
        for at in range(0, len(paths) - batch_size + 1, batch_size):
            rows = []
            for path in paths[at:at + batch_size]:
                with Image.open(path) as file:
                    image = file.convert("RGB")
                rows.append([cut(image) for cut in cuts])
            yield [torch.stack(view) for view in zip(*rows)]


def speeds(ways, batch_size, n=12):
    """Images/s of each way, by the median batch; in turns, as a machine has its moods."""
    taken = [[] for _ in ways]
    for _ in range(n):
        for batches, times in zip(ways, taken):
            begin = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - begin)
    return [batch_size / statistics.median(times) for times in taken]


def main(batch_size=64):
    torch.set_num_threads(1)
    distributed.keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        files(Path(folder))
        images = datasets.load_images(folder)
        for name, method in (("one view (MAE)", mae), ("two views (MoCo v3)", moco_v3),
                             ("2 + 8 crops (DINO)", dino)):
            views = method.views(method.Config())
            ours, plain = speeds((data.Loader(images, views, batch_size, workers=0).batches(),
                                  usual(images.paths, views, batch_size)), batch_size)
            print(f"{name:<20}{ours:6.0f} images/s; the usual way {plain:6.0f}; "
                  f"ratio {ours / plain:.1f}", flush=True)


if __name__ == "__main__":
    main()
