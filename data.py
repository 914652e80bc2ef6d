"""The input of training and evaluation: batches of augmented views, made from images.

    images = datasets.load_images("cifar10", root="/data")            # or toy, imagenet, a folder
    views = [View(224, scale=(0.4, 1.0), copies=2), View(96, scale=(0.05, 0.4), copies=8)]
    loader = Loader(images, views, batch_size=256, seed=0, device="cuda")
    for batch in loader.batches(start=0):                             # endless; 10 tensors in views

    small sets    uint8, all on the device -- crop, resize, flip: two matrix products --+
    files         JPEG -- a worker decodes it once and crops all views -- uint8 --------+
                                                                                        v
                  in batches on the device: color jitter, gray, blur, solarize, normalize -> float32

This file describes views and makes batches. The data sets are in lib/datasets.py, the augmentations
in lib/augment.py. Loader.batches is for training: endless and augmented. The function `batches` is
for evaluation: each image once, in order, without augmentation.

Every random number is a function of (seed, epoch, view, purpose, image), see lib/rng.py. So a view
does not depend on the number of workers or processes, on whether the run was resumed, or on the
image's place in its batch.
"""
import itertools
import math
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL.Image import Resampling
from torch.utils.data import DataLoader

from lib import augment, datasets, distributed, progress, rng, tree

# --------------------------------------------------------------------------------------------------
# Views


@dataclass
class View:
    """How one view of an image is made, in the order of the fields. Probabilities are per image.

    The default is random resized crop and flip, which is all that masked image modeling uses. DINO
    and MoCo v3 add jitter_p 0.8, gray_p 0.2, and blur and solarize by view (BYOL, appendix B).
    """
    size: int                               # side of the output, pixels
    scale: tuple = (0.08, 1.0)              # area of the crop / of the image (Inception); MAE 0.2-1
    ratio: tuple = (3 / 4, 4 / 3)           # width / height of the crop, log-uniform (Inception)
    interpolation: str = "bicubic"          # or bilinear (SimMIM, MoCo v3), lanczos; antialiased
    flip: float = 0.5                       # probability of mirroring left and right
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (BYOL)
    jitter_p: float = 0.0                   # probability of all four, in random order
    gray_p: float = 0.0                     # probability of conversion to gray
    blur_p: float = 0.0                     # probability of a Gaussian blur
    blur_sigma: tuple = (0.1, 2.0)          # Pillow's radius, in pixels, uniform (SimCLR)
    solarize_p: float = 0.0                 # probability of inverting all values >= 128 (BYOL)
    copies: int = 1                         # number of such views, with different random numbers
    like: int | None = None                 # index of the view whose random numbers are used: the
    #                                         same crop at another size, for a tokenizer (BEiT, CAE)

    def __post_init__(self):
        if len(self.scale) != 2 or not 0 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop areas {self.scale}: give two fractions of the image, between 0 "
                             "and 1, the smaller one first")
        if self.blur_sigma[1] > 2.4:
            raise ValueError(f"blur_sigma {self.blur_sigma}: choose at most 2.4, as the kernel of "
                             "`blur` ends at 6 pixels")
        if len(self.jitter) != 4:
            raise ValueError(f"--color-jitter {self.jitter}: give four numbers, for brightness, "
                             "contrast, saturation and hue")


@dataclass
class Batch:
    """The images of one process in a step, or in a micro-batch (split), in all views."""
    views: list                             # of (B, 3, S, S) float32, normalized, on the device
    index: torch.Tensor                     # (B,) int64, indices of the images in the data set
    label: torch.Tensor | None              # (B,) int64
    epoch: int

    def split(self, n):
        """n equal parts, for gradient accumulation."""
        labels = self.label.chunk(n) if self.label is not None else [None] * n
        for i, (index, label) in enumerate(zip(self.index.chunk(n), labels)):
            yield Batch([v.chunk(n)[i] for v in self.views], index, label, self.epoch)


# --------------------------------------------------------------------------------------------------
# Training: endless batches of augmented views

GROUP_BYTES = 2**27      # of decoded images that a worker holds at once, unless one alone has more


class Loader:
    """Endless batches of views. Their content is a function of seed and step.

    batch_size is global: each of `world` processes gets an equal part, in the order of the ranks.
    Images at the end of an epoch that do not fill a batch are dropped. A file that cannot be read
    is reported once on stderr and replaced by another image of the data set; `skipped` counts the
    replacements. ValueError: an impossible batch size; most images tried for a batch unreadable.
    """

    def __init__(self, images, views, batch_size, seed=0, device="cpu", workers=2, rank=0, world=1):
        if not 0 < batch_size <= len(images):
            raise ValueError(f"Batch size {batch_size} is not possible with the {len(images)} "
                             f"images of {images.name} ({images.split}): choose 1 to {len(images)}")
        if batch_size % world:
            raise ValueError(f"The global batch size {batch_size} is not divisible by the {world} "
                             f"processes: try {batch_size // world * world or world}")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.device, self.workers = torch.device(device), workers
        self.rank, self.world = rank, world
        self.views = [view for view in views for _ in range(view.copies)]
        # The view index in each view's random key; a view with `like` has that of another view.
        self.streams = [v if view.like is None else view.like for v, view in enumerate(self.views)]
        self.scale = torch.tensor([view.scale for view in self.views])         # (len(views), 2)
        self.ratio = torch.tensor([view.ratio for view in self.views])
        self.order = None, None                                                # epoch, permutation
        # From an unreadable image to the one that replaces it: far away, as files like it are often
        # neighbors. Without a common factor, so that all images are tried in the end.
        self.stride = next(stride for stride in itertools.count(round(0.618 * len(images)) or 1)
                           if math.gcd(stride, len(images)) == 1)
        self.skipped, self.reported = 0, set()

    def __len__(self):
        """Steps per epoch."""
        return len(self.images) // self.batch_size

    def locate(self, step):
        """Step of the run -> epoch, (B,) image indices of this process."""
        epoch, place = divmod(step, len(self))
        if self.order[0] != epoch:
            generator = rng.generator(self.seed, "order", epoch)
            self.order = epoch, torch.randperm(len(self.images), generator=generator)
        local = self.batch_size // self.world
        begin = place * self.batch_size + self.rank * local
        return epoch, self.order[1][begin:begin + local]

    def batches(self, start=0):
        """Yields a Batch for each step from `start` on, endlessly. Skips earlier steps."""
        if self.images.paths is None:
            yield from self.batches_of_pixels(start)
        else:
            yield from self.batches_of_files(start)

    def batches_of_pixels(self, start):
        """batches() of a set in memory."""
        height, width = self.images.pixels.shape[2:]
        for step in itertools.count(start):
            epoch, index = self.locate(step)
            u = self.sample_box_numbers(index, epoch)
            boxes = augment.crop_boxes(u, height, width, self.scale, self.ratio)
            boxes = boxes.to(self.device, non_blocking=True)                   # (B, len(views), 4)
            yield self.augment_batch(step, index, boxes.unbind(1))

    def batches_of_files(self, start):
        """batches() of a set of files, which workers read ahead."""
        results = in_workers(self.read_crops, range(start, sys.maxsize), self.workers, self.device)
        for step, (index, crops, bad) in enumerate(results, start):
            self.skipped += len(bad)
            for i in sorted(bad.keys() - self.reported):
                self.reported.add(i)
                if len(self.reported) <= 100:
                    progress.write(f"skipped {self.images.paths[i]}: {bad[i]}")
                elif len(self.reported) == 101:
                    progress.write("further images that cannot be read are not listed")
            if crops is None:
                i = min(bad)
                raise ValueError(f"More than half of the images tried for a batch of "
                                 f"{self.images.name} cannot be read, for example "
                                 f"{self.images.paths[i]} ({bad[i]}): are these images?")
            yield self.augment_batch(step, index, crops)

    def sample_box_numbers(self, index, epoch):
        """(B,) image indices -> (B, len(views), 22) uniform numbers for `augment.crop_boxes`."""
        return torch.stack([rng.uniform(index, 22, self.seed, epoch, stream, "box")
                            for stream in self.streams], 1)

    def read_crops(self, step):
        """In a worker: step -> image indices (B,), the uint8 crops (B, 3, S, S) of each view, and
        {index: error} of the files that cannot be read."""
        epoch, index = self.locate(step)
        u, index, bad, failed = self.sample_box_numbers(index, epoch), index.clone(), {}, 0
        crops = [torch.empty(len(index), 3, v.size, v.size, dtype=torch.uint8) for v in self.views]
        group = []                                         # see `cut`
        for row in range(len(index)):
            i, image = int(index[row]), None
            while image is None:
                try:
                    image, side, scale = datasets.read_pixels(
                        self.images.paths[i], partial(self.choose_scale, u[row]))
                except Exception as error:                 # a damaged file can raise any exception
                    bad[i] = str(error)
                    failed += 1                            # `row` images have been read
                    if failed > max(4, row, len(index) / 2):
                        return index, None, bad
                    i = (i + self.stride) % len(self.images)
            index[row] = i
            group.append((row, image, side, scale))                            # (height, width, 3)
            # Boxes are faster for 8 images at once, of which large ones would fill the memory.
            if len(group) == 8 or sum(image.numel() for _, image, *_ in group) > GROUP_BYTES:
                self.cut(group, u, crops)
                group = []
        self.cut(group, u, crops)
        return index, crops, bad

    def cut(self, group, u, crops):
        """Writes the crops of decoded images. group: [(row of the batch, image, (height, width) of
        the file, scale at which it was decoded)]."""
        if not group:
            return
        rows, images, sides, scales = zip(*group)
        sides = torch.tensor(sides)[:, :, None, None]
        boxes = augment.crop_boxes(u[list(rows)], *sides.unbind(1), self.scale, self.ratio)
        for row, image, boxes_of_views, scale in zip(rows, images, boxes.tolist(), scales):
            for view, out, box in zip(self.views, crops, boxes_of_views):
                out[row] = datasets.resize(image, box, view.size, view.interpolation, scale)

    def choose_scale(self, u, height, width):
        """(len(views), 22) uniform numbers, size of a JPEG file -> at which scale to decode it: 8
        or 4 if each crop keeps twice as many pixels on a side as its view has, else 1. With fewer,
        the crops would visibly differ from those of the whole image. 2 is no faster than 1, as
        resizing takes longer than after 1."""
        size = torch.tensor([view.size for view in self.views])
        if min(height, width) < 8 * size.max():            # most images: without computing boxes
            return 1
        boxes = augment.crop_boxes(u, height, width, self.scale, self.ratio)
        ratio = (boxes[:, 2:].amin(1) / size).min()
        return next((scale for scale in (8, 4) if ratio >= 2 * scale), 1)

    def augment_batch(self, step, index, cuts):
        """Image indices (B,), and for each view the boxes (if the pixels are on the device) or the
        uint8 crops (if they come from files) -> Batch."""
        epoch, device_index = step // len(self), index.to(self.device, non_blocking=True)
        # On a CPU, 16 images at a time stay in its cache from the first operation to the last.
        group = 16 if self.device.type == "cpu" else len(index)
        views = []
        for view, stream, cut in zip(self.views, self.streams, cuts):
            params = augment.sample_params(view, index, self.seed, epoch, stream)
            out = torch.empty(len(index), 3, view.size, view.size, device=self.device)
            for begin in range(0, len(index), group):
                rows = slice(begin, begin + group)
                part = {name: values[rows] for name, values in params.items()}
                if self.images.paths is None:
                    x = self.images.pixels.index_select(0, device_index[rows])  # 20x faster than []
                    flip = part["flip"].to(self.device, non_blocking=True)
                    out[rows] = augment.crop(x, cut[rows], view.size, view.interpolation, flip)
                else:
                    x = cut[rows].to(self.device, non_blocking=True)       # uint8: fast to mirror
                    augment.apply(lambda x, _: x.flip(3), x, part["flip"], part["flip"])
                    out[rows].copy_(x).mul_(1 / 255)
                augment.augment_colors(out[rows], part)
            views.append(out)
        labels = self.images.labels
        label = None if labels is None else labels[index].to(self.device, non_blocking=True)
        return Batch(views, device_index, label, epoch)


def training_sets(run, views):
    """The images of a run (a lib.run.Run): loader, bank, queries.

    The loader makes the views of all training images: of STL-10 the unlabeled ones, of a folder
    without train/ and val/ all images. For the kNN accuracy there are 2,000 training images as bank
    and 500 test images as queries, with their labels, if there are any. In a folder without train/
    and val/, bank and queries do not overlap, but the loader contains both."""
    cfg = run.cfg
    train_split = "unlabeled" if cfg.data == "stl10" else "train"
    with datasets.list_once():
        images, bank, queries = (
            datasets.load_images(cfg.data, cfg.data_root, split, cfg.img_size, limit, run.device,
                                 hold_out)
            for split, limit, hold_out in ((train_split, None, False), ("train", 2000, True),
                                           ("test", 500, True)))
    for note in dict.fromkeys(images.notes + bank.notes + queries.notes):
        run.print0(note)
    if None not in (bank.classes, queries.classes) and bank.classes != queries.classes:
        run.print0(f"no kNN, as training and test images have different classes: "
                   f"{tree.list_names(sorted({*bank.classes} ^ {*queries.classes}))} only in one")
    if cfg.batch_size > len(images):
        raise ValueError(f"--batch-size {cfg.batch_size} is more than the {len(images)} training "
                         f"images of {cfg.data}: {propose_batch_size(cfg, len(images), run.world)}")
    loader = Loader(images, views, cfg.batch_size, cfg.seed, run.device, cfg.workers, run.rank,
                    run.world)
    return loader, bank, queries


def propose_batch_size(cfg, n, world):
    """Flags of a batch of at most n images that all settings allow, in words: as many times a power
    of two as there are processes, micro-batches and images of a group (MMC)."""
    parts, group = world * cfg.accum_iter, getattr(cfg, "group_size", 1)
    if n >= parts * group:
        return f"try --batch-size {parts * group * 2**int(math.log2(n // (parts * group)))}"
    if n >= 2 * parts:
        batch = parts * 2**int(math.log2(n // parts))
        return f"try --batch-size {batch} --group-size {batch // world}"
    return "add images" + ", or use fewer processes or a smaller --accum-iter" * (parts > 1)


# --------------------------------------------------------------------------------------------------
# Evaluation: each image once, center crop


def batches(images, size, batch_size=256, device="cpu", resize=None, mean=augment.MEAN,
            std=augment.STD, workers=2, interpolation="bicubic", rank=0, world=1):
    """For evaluation: yields ((B, 3, size, size) normalized, (B,) image indices), each image once
    and in order, on the device.

    Files: the short side is resized to `resize` pixels (default 256/224 size), then center crop.
    Sets in memory: the whole image at `size`; if `resize` is given, resized to it, then center
    crop. rank, world: only every world-th batch, from batch `rank` on; other files are not opened.
    Files that cannot be read are left out and listed on stderr at the end: take the labels at the
    indices. Raises datasets.UnreadableImage, a ValueError, if they are more than half; not with
    `world`, as the processes must agree.
    """
    device, files = torch.device(device), images.paths is not None
    resize = resize or (size * 256 // 224 if files else size)
    if resize < size:
        raise ValueError(f"resize {resize} is smaller than the center crop: choose at least {size}")
    indices = torch.arange(len(images)).split(batch_size)[rank::world]
    read, bad, seen = partial(read_center_crops, images.paths, size, resize, interpolation), {}, 0
    found = in_workers(read, indices, workers, device) if files else indices
    try:
        for index, x in zip(indices, found):
            if files:
                seen += len(index)
                x, index, errors = x
                bad |= errors
                if not len(index):
                    continue
                x = x.to(device, non_blocking=True).permute(0, 3, 1, 2)
                x = x.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
            else:
                x = images.pixels[index[0]:index[-1] + 1].to(device)
                if x.shape[2:] != (resize, resize):
                    whole = torch.tensor([[0, 0, *x.shape[2:]]], device=device)
                    x = augment.crop(x, whole, resize, interpolation)
                else:
                    x = x.float().mul_(1 / 255)
                edge = round((resize - size) / 2)
                x = x[:, :, edge:edge + size, edge:edge + size].contiguous()
            yield augment.normalize(x, mean, std), index.to(device, non_blocking=True)
    finally:                                               # also if only some batches are taken
        if rank == distributed.rank():                     # all processes may read the same files
            datasets.report_unreadable(images.name, bad, seen)
    if world == 1:
        datasets.check_readable(images.name, bad, seen)


def read_center_crops(paths, size, resize, interpolation, index):
    """In a worker: (B,) image indices -> (n, size, size, 3) uint8 and the indices (n,) of those
    that can be read, {path: error} of the others."""
    crops, bad = {}, {}
    for i in index.tolist():
        try:
            image = datasets.read_image(paths[i])
        except Exception as error:                         # a damaged file can raise any exception
            bad[paths[i]] = str(error)
            continue
        short = min(image.size)
        width, height = (resize * side // short for side in image.size)
        if max(width, height) > 20 * resize:               # a strip: too large as a whole
            middle = 10 * short
            left, top = (max(0, side // 2 - middle) for side in image.size)
            image = image.crop((left, top, min(image.width, left + 2 * middle),
                                min(image.height, top + 2 * middle)))
            width, height = (resize * side // short for side in image.size)
        image = image.resize((width, height), Resampling[interpolation.upper()])
        left, top = round((width - size) / 2), round((height - size) / 2)
        crop = image.crop((left, top, left + size, top + size))
        crops[i] = torch.from_numpy(np.array(crop))
    out = torch.stack(list(crops.values())) if crops else torch.empty(0, size, size, 3)
    return out, torch.tensor(list(crops), dtype=torch.int64), bad


# --------------------------------------------------------------------------------------------------
# Worker processes


def in_workers(function, items, count, device):
    """Yields function(item) for each item, computed ahead in `count` processes (0: in this one),
    without torch's warning if these are more than cores, which is --workers' choice."""
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    return DataLoader(items, batch_size=None, collate_fn=function, num_workers=count,
                      worker_init_fn=distributed.start_worker, pin_memory=device.type == "cuda",
                      multiprocessing_context=distributed.worker_context(count),
                      generator=torch.Generator())         # else it uses the global one
