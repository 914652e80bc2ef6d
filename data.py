"""Images in, views out: data sets, the augmentations of self-supervision, and the loader.

    images = datasets.load_images("cifar10", root="/data")                # or toy, imagenet, coco, a folder
    views = [View(224, scale=(0.4, 1.0), copies=2), View(96, scale=(0.05, 0.4), copies=8)]
    loader = Loader(images, views, batch_size=256, seed=0, device="cuda")
    for batch in loader.batches(start=0):                      # endless; batch.views: ten tensors

    small sets   uint8, whole on the device ── crop, resize, flip: two matrix products ──┐
    trees        JPEG ── a worker decodes once, cuts the crops of all views ── uint8 ────┤
                                                                                         ▼
                 batched on the device: jitter, grey, blur, solarise, normalise ── float32

Every random number is a function of (seed, epoch, view, purpose, image), see rng.py. So the number
of workers or processes, a resume, the place of an image in its batch never change what is seen.
"""
import atexit
import itertools
import multiprocessing
import signal
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL.Image import Resampling
from torch.utils.data import DataLoader

from lib import augment, datasets, rng

# --------------------------------------------------------------------------------------------------
# What a view is


@dataclass
class View:
    """How one view of an image is made, in this order. Probabilities are per image.

    Without further arguments: random resized crop and flip, all that masked image modelling uses.
    DINO and MoCo v3 add jitter_p 0.8, grey_p 0.2, and blur and solarise by view (BYOL, app. B).
    """
    size: int                               # side of the output, pixels
    scale: tuple = (0.08, 1.0)              # area of the crop / of the image (Inception); MAE 0.2-1
    ratio: tuple = (3 / 4, 4 / 3)           # width / height of the crop, log-uniform (Inception)
    interpolation: str = "bicubic"          # or bilinear (SimMIM, MoCo v3), lanczos; antialiased
    flip: float = 0.5                       # probability of mirroring left and right
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (BYOL)
    jitter_p: float = 0.0                   # probability of the four together, in random order
    grey_p: float = 0.0                     # probability of dropping the colour
    blur_p: float = 0.0                     # probability of a Gaussian blur
    blur_sigma: tuple = (0.1, 2.0)          # PIL's radius, uniform, pixels of the view (SimCLR)
    solarize_p: float = 0.0                 # probability of inverting all values >= 128 (BYOL)
    copies: int = 1                         # so many such views, each with its own random numbers
    like: int | None = None                 # take those of this view (from 0): the same crop at
    #                                         another size, for a tokenizer (BEiT, CAE)

    def __post_init__(self):
        if not 0 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"a crop's least and largest area, {self.scale[0]:g} and "
                             f"{self.scale[1]:g}, are shares of the image, the smaller one first")
        if self.blur_sigma[1] > 2.4:
            raise ValueError(f"blur_sigma {self.blur_sigma}: `blur` reaches 6 pixels, radius 2.4")
        if len(self.jitter) != 4:
            raise ValueError(f"jitter {self.jitter}: four numbers, of brightness, contrast, "
                             f"saturation, hue")


# --------------------------------------------------------------------------------------------------
# The loader


@dataclass
class Batch:
    views: list                             # V x (B, 3, S, S) float32, normalised, on the device
    index: torch.Tensor                     # (B,) int64, numbers of the images in the set
    label: torch.Tensor | None              # (B,) int64
    epoch: int
    step: int                               # of the run, from 0

    def split(self, n):
        """n equal parts, for gradient accumulation."""
        labels = self.label.chunk(n) if self.label is not None else [None] * n
        for i, (index, label) in enumerate(zip(self.index.chunk(n), labels)):
            yield Batch([v.chunk(n)[i] for v in self.views], index, label, self.epoch, self.step)


class Loader:
    """Batches of views without end. (seed, step) decides everything in them.

    batch_size is global: each of `world` processes gets an equal share, in the order of the ranks.
    What is left of an epoch and fills no batch is dropped. A file that cannot be read is named once
    on stderr, the next image of the set takes its place, and `skipped` counts it. ValueError: a
    batch size that cannot be; more than half of a batch unreadable.
    """

    def __init__(self, images, views, batch_size, seed=0, device="cpu", workers=2, rank=0, world=1):
        if not 0 < batch_size <= len(images):
            raise ValueError(f"Batch size {batch_size} does not go with the {len(images)} images "
                             f"of {images.name} ({images.split}): choose 1 to {len(images)}")
        if batch_size % world:
            raise ValueError(f"The global batch size {batch_size} is not divisible by the {world} "
                             f"processes: try {batch_size // world * world or world}")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.device, self.workers = torch.device(device), workers
        self.rank, self.world = rank, world
        self.views = [view for view in views for _ in range(view.copies)]
        self.streams = [v if view.like is None else view.like for v, view in enumerate(self.views)]
        self.scale = torch.tensor([view.scale for view in self.views])           # (V, 2)
        self.ratio = torch.tensor([view.ratio for view in self.views])
        self.order = None, None                                                  # epoch, numbers
        self.skipped, self.named = 0, set()

    def __len__(self):
        """Steps in an epoch."""
        return len(self.images) // self.batch_size

    def locate(self, step):
        """Step of the run -> epoch, (B,) image numbers of this process."""
        epoch, place = divmod(step, len(self))
        if self.order[0] != epoch:
            generator = rng.generator(self.seed, "order", epoch)
            self.order = epoch, torch.randperm(len(self.images), generator=generator)
        share = self.batch_size // self.world
        begin = place * self.batch_size + self.rank * share
        return epoch, self.order[1][begin:begin + share]

    def box_numbers(self, index, epoch):
        """(B,) image numbers -> (B, V, 22) for crop_boxes."""
        return torch.stack([rng.uniform(index, 22, self.seed, epoch, stream, "box")
                            for stream in self.streams], 1)

    def batches(self, start=0):
        """Batch after Batch from any step of the run; nothing of what lies before is computed."""
        if self.images.paths is None:
            height, width = self.images.pixels.shape[2:]
            for step in itertools.count(start):
                epoch, index = self.locate(step)
                u = self.box_numbers(index, epoch)
                boxes = augment.crop_boxes(u, height, width, self.scale, self.ratio)     # (B, V, 4)
                yield self.finish(step, index, boxes.to(self.device, non_blocking=True).unbind(1))
        results = in_workers(self.cut, range(start, sys.maxsize), self.workers, self.device)
        for step, (index, crops, bad) in enumerate(results, start):
            self.skipped += len(bad)
            for number in sorted(bad.keys() - self.named):
                self.named.add(number)
                print(f"skipped {self.images.paths[number]}: {bad[number]}", file=sys.stderr)
            if crops is None:
                raise ValueError(f"More than half of a batch of {self.images.name} cannot be read, "
                                 f"{self.images.paths[min(bad)]} for one: are these images?")
            yield self.finish(step, index, crops)

    def cut(self, step):
        """In a worker: step -> image numbers, V x (B, 3, S, S) uint8 crops, {unreadable: why}."""
        epoch, index = self.locate(step)
        u, index, bad = self.box_numbers(index, epoch), index.clone(), {}
        crops = [torch.empty(len(index), 3, v.size, v.size, dtype=torch.uint8) for v in self.views]
        for rows in torch.arange(len(index)).split(8):     # their boxes in one go, for speed
            images = []
            for row in rows.tolist():
                number, image = int(index[row]), None
                while image is None:
                    try:
                        image = datasets.read_pixels(self.images.paths[number])
                    except Exception as error:             # a damaged file raises nearly anything
                        bad[number] = str(error)
                        if 2 * len(bad) > max(2, len(index)):
                            return index, None, bad
                        number = (number + 1) % len(self.images)
                index[row] = number
                images.append(image)                                             # (H, W, 3)
            sides = torch.tensor([image.shape[:2] for image in images])[:, :, None, None]
            boxes = augment.crop_boxes(u[rows], *sides.unbind(1), self.scale, self.ratio).tolist()
            for row, image, of_views in zip(rows, images, boxes):
                for view, out, (top, left, height, width) in zip(self.views, crops, of_views):
                    piece = image[top:top + height, left:left + width]
                    out[row] = datasets.resize(piece, view.size, view.interpolation)
        return index, crops, bad

    def finish(self, step, index, cuts):
        """Image numbers and, of each view, boxes (resident pixels) or uint8 crops -> Batch."""
        epoch, number = step // len(self), index.to(self.device, non_blocking=True)
        # On a CPU a few images at a time stay in its cache from the first operation to the last.
        group = 16 if self.device.type == "cpu" else len(index)
        views = []
        for view, stream, cut in zip(self.views, self.streams, cuts):
            dice = augment.sample_params(view, index, self.seed, epoch, stream)
            out = torch.empty(len(index), 3, view.size, view.size, device=self.device)
            for begin in range(0, len(index), group):
                rows = slice(begin, begin + group)
                part = {what: of_image[rows] for what, of_image in dice.items()}
                if self.images.paths is None:
                    x = self.images.pixels.index_select(0, number[rows])   # [...] is 20 x slower
                    flip = part["flip"].to(self.device, non_blocking=True)
                    out[rows] = augment.crop(x, cut[rows], view.size, view.interpolation, flip)
                else:
                    x = cut[rows].to(self.device, non_blocking=True)       # bytes: fast to mirror
                    augment.apply(lambda x, _: x.flip(3), x, part["flip"], part["flip"])
                    out[rows].copy_(x).mul_(1 / 255)
                augment.augment_colors(out[rows], part)
            views.append(out)
        labels = self.images.labels
        label = None if labels is None else labels[index].to(self.device, non_blocking=True)
        return Batch(views, number, label, epoch, step)


def in_workers(function, items, count, device):
    """function(item) for item after item, computed ahead in `count` processes (0: in this one)."""
    return DataLoader(items, batch_size=None, collate_fn=function, num_workers=count,
                      worker_init_fn=start_worker, pin_memory=device.type == "cuda",
                      generator=torch.Generator())         # or it moves the global one


def start_worker(_):
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)              # the main process decides when to stop


@atexit.register
def end_workers():
    """They ignore the SIGTERM by which Python would end them, and it would wait for ever."""
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    if daemons:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # or the DataLoader reports their end
    for child in daemons:                                  # what else a caller started is his
        child.kill()


# --------------------------------------------------------------------------------------------------
# Every image once, as tests see it


def batches(images, size, batch_size=256, device="cpu", resize=None, mean=augment.MEAN, std=augment.STD, workers=2,
            interpolation="bicubic", rank=0, world=1):
    """Iterator of ((B, 3, size, size) normalised, (B,) image numbers), in order, on the device.

    Files: short side to `resize` (default 256/224 size), centre crop. Resident sets: whole image at
    `size`, or resized to `resize` if that is given, centre crop. ValueError names an unreadable
    file: to leave it out would move the rows against the labels. rank, world: only every world-th
    batch, from the rank-th on; files of the others are not opened.
    """
    device, files = torch.device(device), images.paths is not None
    resize = resize or (size * 256 // 224 if files else size)
    if resize < size:
        raise ValueError(f"resize {resize} is smaller than the centre crop {size}: give {size} up")
    numbers = torch.arange(len(images)).split(batch_size)[rank::world]
    read = partial(read_center_crops, images.paths, size, resize, interpolation)
    for index, x in zip(numbers, in_workers(read, numbers, workers, device) if files else numbers):
        if isinstance(x, str):
            raise ValueError(f"Cannot read {x}. Delete or replace the file")
        if files:
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


def read_center_crops(paths, size, resize, interpolation, index):
    """In a worker: (B,) image numbers -> (B, size, size, 3) uint8, or which file is bad and why."""
    out = torch.empty(len(index), size, size, 3, dtype=torch.uint8)
    for row, number in enumerate(index.tolist()):
        try:
            image = datasets.read_image(paths[number])
        except Exception as error:
            return f"{paths[number]}: {error}"
        short = min(image.size)
        width, height = (resize * side // short for side in image.size)
        image = image.resize((width, height), Resampling[interpolation.upper()])
        left, top = round((width - size) / 2), round((height - size) / 2)
        out[row] = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))
    return out

