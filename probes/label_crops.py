"""Images with a class for every pixel, shared by the probes of segmentation: sizes, training crops,
windows, scores, the figure.

    sizes = segmentation_sizes(opt, toy_side)
    for x, labels in load_crops(model, opt, sizes, names, steps): ...        # training
    counts, figure, n = score_segmentation(predict, items, names, model, sizes)
    percentages(counts[0]), save_figure(figure, names, model, opt)

Memory does not grow with the data set: images are read one at a time, and at most 2 GiB of training
images per worker are kept for shuffling.
"""
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib import augment, metrics, rng, toy
from probes import annotations
from probes.common import is_toy, progress_bar
from probes.figures import FigureRows, save_image_grid
from probes.patches import normalize_images, resize_image, resize_labels
from probes.training import draw_uniform, flip_table, image_limit, load_batches

# Shapes: B images, C classes; (height, width) in pixels

MAX_BATCH = 16           # test images or windows of about 500 x 500 px in one forward pass


class Sizes(NamedTuple):
    """Sizes in pixels. Images keep their aspect ratio and fit into (long, short) sides."""
    crop: int            # side of a training crop, and of a test window
    stride: int          # distance between test windows
    train: tuple         # (long, short) in training, times a random factor of 0.5 to 2
    test: tuple          # (long, short) at test time


SEGMENTATION_SIZES = {
    "ade20k":     Sizes(512, 341, (2048, 512), (2048, 512)),
    "pascal":     Sizes(480, 161, (520, 520), (3840, 480)),
    "lip":        Sizes(320, 161, (1024, 320), (4096, 320)),
    "cityscapes": Sizes(512, 341, (2048, 1024), (2048, 1024)),       # test: our choice
    "voc":        Sizes(512, 341, (2048, 512), (2048, 512)),
    "coco":       Sizes(512, 341, (2048, 512), (2048, 512))}         # our choice
OWN_SIZES = Sizes(512, 341, (2048, 512), (2048, 512))    # of other folders, our choice
WARMUP_ITERS, CROPS_PER_BATCH = 1500, 16                 # of all recipes
MAX_HELD_OUT = 100                                       # held-out images at most


# ---- training crops ------------------------------------------------------------------------------


def segmentation_sizes(opt, toy_side):
    """The Sizes of the data set, scaled so that a crop has the side --img-size; on toy all sides
    are `toy_side`."""
    if is_toy(opt.data):
        return Sizes(toy_side, toy_side, (toy_side, toy_side), (toy_side, toy_side))
    sizes = SEGMENTATION_SIZES.get(opt.data, OWN_SIZES)
    scale = (opt.img_size or sizes.crop) / sizes.crop
    return Sizes(round(scale * sizes.crop), round(scale * sizes.stride),
                 *(tuple(round(scale * side) for side in sides)
                   for sides in (sizes.train, sizes.test)))


def crops_per_batch(opt):
    return opt.train_batch_size or CROPS_PER_BATCH


def segmentation_items(opt, split, sizes):
    """Items of a split with a class for every pixel, as annotations.segmentation gives them."""
    return annotations.segmentation(opt.data, opt.data_root, split, image_limit(opt, split),
                                    opt.level, sizes.crop)


def load_crops(model, opt, sizes, names, steps, hold_out=False, rank=0, world=1):
    """Yields x (B, 3, S, S) normalized, labels (B, S, S) int64, 255 = ignore, for a range of steps.

    B: number of crops of this process, crops_per_batch / world. hold_out: leave out every tenth
    image.
    """
    table = flip_table(names) if opt.swap_sides else None
    if table is not None and table.equal(torch.arange(256, dtype=torch.uint8)):
        raise ValueError(f"--swap-sides: no classes of {opt.data} are left and right: leave it out")
    return load_batches(
        functools.partial(training_items, opt, sizes, hold_out), crops_per_batch(opt),
        functools.partial(collate_crops, opt.seed, sizes, model.mean, model.std, table,
                          range(rank, crops_per_batch(opt), world)), steps, opt, model.device)


def training_items(opt, sizes, hold_out):
    return (item for i, item in enumerate(segmentation_items(opt, "train", sizes))
            if i % 10 or i >= 10 * MAX_HELD_OUT or not hold_out)


def collate_crops(seed, sizes, mean, std, table, index, step, items):
    """A batch of crops of items[i] for i in index. Smaller crops are padded with 0 and label 255 on
    the right and at the bottom."""
    crop = sizes.crop
    crops = [random_crop(items[i], sizes, rng.generator(seed, "crop", step, i), table)
             for i in index]
    x = [augment.normalize(image / 255, mean, std) for image, _ in crops]
    x = [F.pad(x, (0, crop - x.shape[2], 0, crop - x.shape[1])) for x in x]
    y = [F.pad(y, (0, crop - y.shape[1], 0, crop - y.shape[0]), value=255) for _, y in crops]
    return torch.stack(x), torch.stack(y).long()


def random_crop(item, sizes, g, table=None):
    """A random view of an item: image (3, height, width) from 0 to 255, labels (height, width); at
    most crop x crop.

    As in the released configurations: the size is scaled by 0.5 to 2; crop (up to ten tries for one
    in which no label has 75% of the labeled pixels); flip; color distortion. table: (256,) labels
    in a mirrored image; None: left stays left, as in the released code, although that is wrong for
    LIP's left arms.
    """
    long, short = sizes.train
    ratio = draw_uniform(g, 0.5, 2)
    shape = fit_shape(item.labels.shape, long * ratio, short * ratio)
    image, labels = resize_image(item.image, shape), resize_labels(item.labels, shape)
    for _ in range(10):
        top, left = (int(torch.randint(max(0, side - sizes.crop) + 1, (), generator=g))
                     for side in shape)
        rows, columns = slice(top, top + sizes.crop), slice(left, left + sizes.crop)
        counts = labels[rows, columns].flatten().long().bincount(minlength=256)[:255]
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    image, labels = image[:, rows, columns], labels[rows, columns]
    if draw_uniform(g) < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
        labels = labels if table is None else table[labels.long()]
    return distort_colors(image, g), labels


def fit_shape(shape, long, short):
    """(height, width) -> largest shape with the same aspect ratio within long and short sides."""
    factor = min(long / max(shape), short / min(shape))
    return [max(1, int(side * factor + 0.5)) for side in shape]


def distort_colors(x, g):
    """Photometric distortion of (3, height, width) from 0 to 255: brightness, contrast, saturation
    and hue, each with probability 1/2; contrast is changed before or after saturation and hue."""
    def coin():
        return draw_uniform(g) < 0.5

    if coin():
        x = (x + draw_uniform(g, -32, 32)).clamp(0, 255)
    contrast = draw_uniform(g, 0.5, 1.5) if coin() else 1.0
    contrast_first = coin()
    if contrast_first:
        x = (x * contrast).clamp(0, 255)
    if coin():                                           # HSV: saturation is 1 - lowest / value
        value, low = x.amax(0), x.amin(0)
        saturation = 1 - low / value.clamp(min=1e-6)
        target = (saturation * draw_uniform(g, 0.5, 1.5)).clamp(max=1)
        x = (value - (value - x) * target / saturation.clamp(min=1e-6)).clamp(0, 255)
    if coin():
        turn = int(torch.randint(-18, 18, (), generator=g)) / 180
        x = (augment.adjust_hue(x[None] / 255, torch.tensor([turn]))[0] * 255).clamp(0, 255)
    return x if contrast_first else (x * contrast).clamp(0, 255)


def poly_lr(step, total, peak, warmup):
    """Linear decay from `peak` to 0 (power 1), times a linear warmup from 1e-6 to 1."""
    return peak * (1 - step / total) * (1 - (1 - min(step / warmup, 1)) * (1 - 1e-6))


def segmentation_loss(logits, labels):
    """(B, C, height, width), (B, height, width) -> cross-entropy, summed over the labeled pixels
    and divided by the number of all pixels, as in the released code: crops with few labeled pixels
    have less weight."""
    return F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()


# ---- scores --------------------------------------------------------------------------------------


def score_segmentation(predict, items, names, model, sizes, n_figures=0, n_heads=1):
    """-> metrics.confusion of every head, summed over all items; FigureRows (image, truth,
    prediction) of at most `n_figures` items; number of items. predict: see `segment_image`."""
    counts = n_heads * [torch.zeros(len(names), len(names), dtype=torch.long)]
    figure, n_images = FigureRows(n_figures), 0
    for item in progress_bar(items, model):
        n_images += 1
        predictions = segment_image(predict, item.image, model, sizes)
        counts = [count + metrics.confusion(x.cpu(), item.labels, len(names))
                  for count, x in zip(counts, predictions)]
        known = item.labels != 255
        classes = {*item.labels[known].unique().tolist()}
        if figure.wants(classes):
            figure.add(classes, [item.image, item.labels, predictions[0].cpu(), known])
    return counts, figure, n_images


@torch.no_grad()
def segment_image(predict, image, model, sizes):
    """(3, height, width) uint8 -> the predicted class of every pixel by every head, a list of
    (height, width) int64.

    predict: windows (B, 3, height, width) normalized -> for each window, the logits of every head,
    (C, height, width) or larger. The logits of overlapping windows are averaged. An image that is
    smaller than a window is one window.
    """
    long, short = sizes.test
    x = normalize_images(model, resize_image(image, fit_shape(image.shape[1:], long, short)))
    corners = list(itertools.product(*(window_starts(n, sizes.crop, sizes.stride)
                                       for n in x.shape[1:])))
    height, width = (min(n, sizes.crop) for n in x.shape[1:])
    sums, counts = [], torch.zeros(x.shape[1:], device=x.device)
    for first in range(0, len(corners), MAX_BATCH):
        batch = corners[first:first + MAX_BATCH]
        windows = torch.stack([x[:, top:top + height, left:left + width] for top, left in batch])
        for (top, left), logits_of_heads in zip(batch, predict(windows)):
            window = ..., slice(top, top + height), slice(left, left + width)
            counts[window] += 1
            sums = sums or [x.new_zeros(len(logits), *x.shape[1:]) for logits in logits_of_heads]
            for total, logits in zip(sums, logits_of_heads):
                total[window] += logits[:, :height, :width]
    return [argmax_resized(total / counts, image.shape[1:]) for total in sums]


def window_starts(length, window, stride):
    """Start positions of the windows along a side; the last window ends at the image border."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


def argmax_resized(logits, shape, chunk=16):
    """Logits (C, ...) -> argmax over C of the logits resized to (height, width), a few classes at a
    time: resized logits of 150 classes would take gigabytes for a photo."""
    best = logits.new_full(shape, -torch.inf)
    classes = logits.new_zeros(shape, dtype=torch.long)
    for first in range(0, len(logits), chunk):
        value, index = resize_image(logits[first:first + chunk], shape).max(0)
        better = value > best
        best, classes = best.where(~better, value), classes.where(~better, index + first)
    return classes


def percentages(counts):
    """Sum of metrics.confusion -> a row of the table. ValueError: no pixel was counted."""
    if not counts.sum():
        raise ValueError("no labeled pixels in the test images: raise --limit or change --data")
    scores = metrics.segmentation_scores(counts)
    return {name: 100 * scores[name.lower()] for name in ("mIoU", "mAcc", "aAcc")}


def draw_classes(image, labels, known, names):
    """The image with a color for each class; background and ignored pixels are dark."""
    first = 0 if has_background(names) else 1
    return toy.overlay(image, (labels.long() + first).where(known, 0))


def save_figure(figure, names, model, opt):
    """Writes the images, their classes and the predicted ones, with a legend of those that are in
    the figure."""
    if not figure.items:
        return
    shown = {c for _, truth, predicted, known in figure.rows() for labels in (truth, predicted)
             for c in labels[known].unique().tolist()}
    first = 0 if has_background(names) else 1
    rows = [[image, *(draw_classes(image, labels, known, names) for labels in (truth, predicted))]
            for image, truth, predicted, known in figure.rows()]
    save_image_grid(rows, figure_path(model, opt), titles=("image", "annotation", "prediction"),
                    legend=[(c + first, names[c]) for c in sorted(shown) if c + first])


def has_background(names):
    """Whether the first class is the background."""
    return names[0].lower() == "background"


def figure_path(model, opt):
    level = annotations.check_level(opt.data, opt.level)
    names = opt.task, Path(opt.data).name, *[level] * bool(level), model.name
    return Path(opt.out) / f"{'-'.join(names)}.png"
