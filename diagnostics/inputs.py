"""Inputs of the diagnostics: test images, a class for every pixel, encoded patches, masks, crops.

The same images are used for every model, with the same bicubic resizing, as models are compared
also by their response to frequencies; only size and normalization are those of the model
(probes.common.Model).
"""
import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

import data
from lib import augment, datasets, progress, rng, toy
from probes import annotations, common

MOST_SHOWN = 18          # images in a figure (t-SNE)


class MissingInput(ValueError):
    """The model or the data set lacks what a diagnostic needs. The report prints the reason in one
    line and continues with the other diagnostics."""


# ---- images --------------------------------------------------------------------------------------


def iterate_images(model, opt, limit, pixel_labels=False):
    """Yields `limit` test images in batches: x (B, 3, S, S) normalized, their indices (B,), and
    labels (B, S, S), a class for every pixel, or None. Of small sets the first images are taken, of
    files evenly spaced ones. There are labels if pixel_labels is set and the data set has them, and
    always if it is a segmentation data set only."""
    if opt.data not in datasets.NAMES and opt.data in annotations.SEGMENTATION or (
            pixel_labels and not why_no_pixel_labels(opt.data, opt.data_root)):
        yield from iterate_annotated_images(model, opt, limit)
        return
    images = common.load_split(opt.data, opt.data_root, "test", model.img_size, limit,
                               model.device)
    with progress.bar(desc=f"{model.name}: images", total=len(images), unit="images") as bar:
        for x, index in iterate_batches(model, opt, images):
            yield x, index, None
            bar.update(len(x))


def iterate_batches(model, opt, images):
    return data.batches(images, model.img_size, opt.batch_size, model.device, mean=model.mean,
                        std=model.std, workers=opt.workers)


def annotation_level(name):
    """The level of pixel labels that is used: object if available, else scene, else part."""
    levels = annotations.SEGMENTATION[name][1]
    return next(level for level in ("object", "scene", "part") if level in levels)


@functools.lru_cache
def why_no_pixel_labels(name, root):
    """The reason why a data set has no pixel labels; None if it has them."""
    if name not in annotations.SEGMENTATION:
        return (f"{name} has no class for every pixel: choose --data "
                f"{' or '.join(annotations.SEGMENTATION)}")
    try:
        next(iter(annotations.segmentation(name, root, "test", 1, annotation_level(name))), None)
    except (FileNotFoundError, ValueError) as error:
        return str(error)


def iterate_annotated_images(model, opt, limit):
    """`iterate_images` with labels: 0 background, -1 unknown; resized and cropped as in
    data.batches."""
    S, level = model.img_size, annotation_level(opt.data)
    short_side = S if common.is_toy(opt.data) else S * 256 // 224              # before the crop
    first = annotations.segmentation_classes(opt.data, level)[0].lower()
    items = iter(annotations.segmentation(opt.data, opt.data_root, "test", limit, level, S))

    def resize_and_crop(x, interpolation):
        x = TF.resize(x, short_side, TF.InterpolationMode(interpolation), antialias=True)
        return TF.center_crop(x, [S, S]).to(model.device)

    done = 0
    with progress.bar(desc=f"{model.name}: images", unit="images") as bar:
        while batch := list(itertools.islice(items, opt.batch_size)):
            x = torch.stack([resize_and_crop(item.image, "bicubic") for item in batch])
            y = torch.cat([resize_and_crop(item.labels[None], "nearest-exact") for item in batch])
            y = torch.where(y == 255, -1, y.long() + (first != "background"))
            index = torch.arange(done, done + len(batch), device=model.device)
            yield augment.normalize(x / 255, model.mean, model.std), index, y
            done += len(batch)
            bar.update(len(batch))


def load_first_images(model, opt, n):
    """The n test images from index --image on: (n, 3, S, S) normalized; fewer at the end of the
    data set. MissingInput if there is none."""
    end, parts = opt.image + n, []
    limit = max(opt.limit or 256, opt.image + MOST_SHOWN)      # the same files in all figures
    if common.is_toy(opt.data):                                # which has any number
        limit = end = min(end, toy.NUM_IMAGES["test"])
        if opt.image >= end:
            raise MissingInput(f"--image {opt.image} is beyond the end of the data set")
    for x, index, _ in iterate_images(model, opt, limit):
        parts.append(x)
        if index[-1] >= end - 1:
            break
    x = torch.cat(parts)[opt.image:end]
    if not len(x):
        raise MissingInput(f"--image {opt.image} is beyond the end of the data set")
    return x


def to_uint8(model, x):
    """(..., 3, S, S) normalized -> (..., S, S, 3) uint8 array."""
    return augment.denormalize(x, model.mean, model.std).movedim(-3, -1).cpu().numpy()


# ---- features ------------------------------------------------------------------------------------


def encode(model, x, batch_size):
    """(B, 3, S, S) -> all tokens after the final norm (B, L, D), batch_size images at a time."""
    with model.autocast():
        return torch.cat([model.encoder(part).float() for part in x.split(batch_size)])


def encode_patches(model, x, batch_size):
    """(B, 3, S, S) -> (B, N, D) patches after the final norm, L2-normalized, on the CPU."""
    return F.normalize(model.encoder.split(encode(model, x, batch_size))[1], dim=-1).cpu()


# ---- masks and crops -----------------------------------------------------------------------------


def sample_block_masks(count, g, *seed):
    """Masks (count, g * g) bool of a g x g grid, True: masked, g * g // 2 patches in each.

    Rectangles with sides of g/4 to g/2 patches, one after the other until there are enough; of the
    last one the upper rows. They may extend beyond the grid, whose borders are thus masked as often
    as its center.
    """
    # (mask, rectangle, axis, length and start); 32 rectangles cover half of the grid in practice
    u = rng.uniform(torch.arange(count), (32, 2, 2), *seed, "rectangles")
    low, high = max(1, g // 4), max(1, g // 2)
    length = low + (u[..., 0] * (high - low + 1)).floor()
    start = (u[..., 1] * (g + length - 1)).floor() - length + 1
    place = torch.arange(g)
    rows, columns = ((place >= start[:, :, axis, None]) &
                     (place < (start + length)[:, :, axis, None]) for axis in (0, 1))
    covered = (rows[:, :, :, None] & columns[:, :, None]).flatten(2)         # (count, 32, g * g)
    first = torch.where(covered.any(1), covered.int().argmax(1), covered.shape[1])
    return first.argsort(dim=1, stable=True).argsort(1) < g * g // 2


def expand_mask(mask, S):
    """(B, N) bool of patches -> (B, 1, S, S) bool of pixels."""
    g = math.isqrt(mask.shape[1])
    return F.interpolate(mask.view(-1, 1, g, g).float(), S) > 0


def expand_patches(values, p):
    """(N,) values of patches -> (S, S): each pixel has the value of its patch."""
    g = math.isqrt(len(values))
    return values.view(g, g).repeat_interleave(p, 0).repeat_interleave(p, 1)


def sample_crops(model, x, count, scale, *seed):
    """Image (3, S, S) normalized -> (count, 3, S, S) random crops in [0, 1]; scale: smallest and
    largest fraction of the area."""
    u = rng.uniform(torch.arange(count), 22, *seed, "crops")
    boxes = augment.crop_boxes(u, *x.shape[1:], torch.tensor(scale), torch.tensor([3 / 4, 4 / 3]))
    whole = augment.denormalize(x, model.mean, model.std).expand(count, -1, -1, -1)
    return augment.crop(whole, boxes.to(x.device), x.shape[-1])
