"""Probes that look at every patch: which class, which object, which film's object, which joint?

    python evaluate.py --task linear_segmentation --level part --show
    python evaluate.py --task zero_shot_segmentation --data toy-scenes --baseline untrained
    python evaluate.py --task video --data davis --data-root /data --show
    python evaluate.py --task pose --data coco --data-root /data

The encoder is frozen in all of them; what is trained is one linear layer, or nothing:

    picture -> ViT -> one token a patch -+- linear layer -> classes    linear_segmentation
               frozen                    +- cosine to one patch        zero_shot_segmentation
                                         +- cosine to earlier frames   video
                                         +- linear layer -> heat maps  pose

Each probe is a function task(model, args) -> report, as in evaluate.py, which gives it a line in
DENSE. Pictures come one at a time and the memory is bounded, whatever the size of the set.
"""
import functools
import itertools
import math
import re
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm

import data
from lib import augment, metrics, rng, toy
from probes import annotations
from probes.common import Progress, settings_of

# B images, h, w grid of patches, p pixels a side of a patch, D width, C classes, L learning rates,
# H, W pixels, M frames in memory, P key-points, K objects

AT_ONCE = 16             # pictures or windows of about 500 pixels a side in one forward
ROOM = 2**31             # bytes of pictures that are kept to be shuffled: 2 GiB for each worker
TOY = dict(train=1000, test=300)         # images of toy's splits, unless --limit says other


# ---- patches -------------------------------------------------------------------------------------


def normalised(model, images, args, std=None):
    """(..., 3, H, W) of 0 to 255 -> what the encoder takes, on the device."""
    x = images.to(args.device).float() / 255
    return augment.normalize(x, model.mean, std or model.std)


@torch.no_grad()
def patches(model, x, args, blocks=None):
    """x (B, 3, H, W) normalised, any size -> patch tokens (B, h, w, D) float32, no class token.

    blocks: numbers from 0, side by side and without the final norm; None: the last, normed. What
    is no multiple of the patch is padded with 0 on the right and at the bottom.
    """
    p, (height, width) = model.encoder.patch_size, x.shape[2:]
    x = F.pad(x, (0, -width % p, 0, -height % p))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        outputs, _ = model.encoder.layers(x, blocks or [model.encoder.depth - 1], not blocks)
    tokens = torch.cat([model.encoder.split(z)[1].float() for z in outputs], 2)
    if not tokens.isfinite().all():
        raise ValueError(f"{model.name}: its features are not finite; try --precision fp32, or an "
                         f"earlier checkpoint")
    return tokens.unflatten(1, (x.shape[2] // p, x.shape[3] // p))


def upsample(maps, factor):
    """(..., C, h, w) -> (..., C, factor h, factor w), bilinear."""
    flat = maps.unsqueeze(0) if maps.ndim == 3 else maps
    out = F.interpolate(flat, scale_factor=float(factor), mode="bilinear", align_corners=False)
    return out[0] if maps.ndim == 3 else out


def resize(image, shape):
    """(C, H, W) -> float32 of another shape, bilinear without antialias: as all the published code
    does here, even where it shrinks."""
    return F.interpolate(image[None].float(), tuple(shape), mode="bilinear", align_corners=False)[0]


def resize_labels(labels, shape):
    """(H, W) numbers -> of another shape, nearest."""
    return F.interpolate(labels[None, None].float(), tuple(shape), mode="nearest-exact")[0, 0].to(
        labels.dtype)


def needs_tokens(model, args):
    if not model.encoder:
        raise ValueError(f"{args.task} needs tokens, and pixels have none: leave out that "
                         "--baseline")


def is_toy(args):
    return args.data in ("toy", "toy-scenes")


def side_of(model, args, otherwise):
    """Pixels a side: the protocol's, of toy twice what the encoder was trained on."""
    side = args.size or (2 * model.size if is_toy(args) else otherwise)
    return side // model.encoder.patch_size * model.encoder.patch_size


def shuffled(read, g):
    """Endless items of read(), an iterator with an end, in random order.

    What fits in ROOM bytes is kept, and drawn anew for every epoch. Of a larger set, a pool of that
    size is kept: an item that is drawn makes room for the next one.
    """
    stream, pool, room = read(), [], ROOM
    for item in stream:
        pool.append(item)
        room -= item.image.nbytes
        if room <= 0:
            break
    else:
        if not pool:
            raise ValueError("no training images: raise --limit or change --data")
        while True:
            yield from (pool[i] for i in torch.randperm(len(pool), generator=g).tolist())
    for item in itertools.chain(stream, itertools.chain.from_iterable(iter(read, None))):
        i = int(torch.randint(len(pool), (), generator=g))
        yield pool[i]
        pool[i] = item


def batches(read, count, make, steps, args):
    """Yields make(step, items) on the device for a range of steps: tensors of the next `count`
    items of those of read(), shuffled. A run that was killed goes on in another order. Workers
    prepare them ahead, but for toy, which is quick."""
    for batch in data.in_workers(Batches(read, count, make, args.seed, steps.start), steps,
                                 0 if is_toy(args) else args.workers, args.device):
        if isinstance(batch, str):
            raise ValueError(batch)
        yield [x.to(args.device, non_blocking=True) for x in batch]


class Batches:
    """step -> make(step, items); or what is wrong with a file, as an error of a worker would come
    with its traceback.

    To be asked step after step, or for every nth of them by each of n workers: all of them, and all
    processes, read the same pictures in the same order, so their number changes nothing.
    """

    def __init__(self, read, count, make, seed, begin=0):
        self.read, self.count, self.make, self.seed = read, count, make, seed
        self.begin = self.done = begin                   # steps that lie behind
        self.stream = None

    def __call__(self, step):
        if not self.stream:                              # in the worker, if there are workers
            self.stream = shuffled(self.read, rng.generator(self.seed, "order", self.begin))
        try:
            for _ in range(self.done, step + 1):         # the earlier ones: other workers' steps
                items = list(itertools.islice(self.stream, self.count))
        except ValueError as error:
            return str(error)
        self.done = step + 1
        return self.make(step, items)


def uniform(g, low=0.0, high=1.0):
    return low + (high - low) * torch.rand((), generator=g).item()


def adamw(layers, lrs, weight_decay):
    """One AdamW for several layers, each with a learning rate of its own; biases do not decay."""
    groups = [dict(params=[p], peak=lr, weight_decay=weight_decay if p.ndim > 1 else 0.0)
              for layer, lr in zip(layers, lrs) for p in layer.parameters()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))


def contact_sheet(rows, path, side=128):
    """Rows of pictures (3, H, W) uint8, each made `side` pixels high -> one PNG, and says where."""
    gap, lines = 2, []
    for row in rows:
        cells = [resize(x, (side, round(side * x.shape[2] / x.shape[1]))) for x in row]
        lines.append(torch.cat([F.pad(cell, (0, gap, 0, gap), value=255) for cell in cells], 2))
    width = max(line.shape[2] for line in lines)
    sheet = torch.cat([F.pad(line, (0, width - line.shape[2]), value=255) for line in lines], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(sheet.clamp(0, 255) / 255, path)
    print(f"{path}: a picture of it")


def bar(items, model, total=None):
    return tqdm(items, desc=model.name, total=total, delay=5, leave=False, dynamic_ncols=True,
                disable=None)


# ---- a linear layer for each patch ---------------------------------------------------------------

# blocks: of 12, counted from 1, in proportion for other depths. lr: of toy several, the best on
# held-out images is taken: the sheets' rates are for 40,000 iterations and more.
RECIPES = {
    # Part-aware study: tables 3, 5, 7-9 and its released configuration.
    "parts": dict(blocks=(4, 6, 8, 12), lr=4e-4, iters=160000, batch_norm=False),
    # MMC, supplement (which counts blocks from 0); batch norm as in VICRegL, which it follows.
    "mmc": dict(blocks=(6, 8, 10, 12), lr=1e-4, iters=40000, batch_norm=True)}
WARMUP, BATCH, DECAY = 1500, 16, 0.05                    # iterations, crops, weight decay: of both
TOY_ITERS, TOY_LRS = 200, (2e-3, 1e-2, 5e-2)            # our choice
HELD_OUT = 100                                           # images at most, of every tenth
# crop = window, stride; (long, short) side of pictures in training, times 0.5 to 2, and in the test
SIZES = {
    "ade20k":     (512, 341, (2048, 512), (2048, 512)),
    "pascal":     (480, 161, (520, 520), (3840, 480)),
    "lip":        (320, 161, (1024, 320), (4096, 320)),
    "cityscapes": (512, 341, (2048, 1024), (2048, 1024)),            # test: our choice
    "voc":        (512, 341, (2048, 512), (2048, 512)),
    "coco":       (512, 341, (2048, 512), (2048, 512))}              # our choice


def linear_segmentation(model, args):
    """Linear layer on the patches of four blocks: the class of every pixel, by object or by part.

    Part-aware study, tables 3, 5, 7-9 (--recipe parts), and MMC, table 3 (--recipe mmc): frozen
    blocks side by side, without the final norm and the class token, one 1 x 1 convolution, logits
    enlarged to the picture. Random crops in training, a sliding window in the test, scores at the
    original size. Our choices: on toy, pictures of twice the encoder's size, 200 iterations, and
    several learning rates side by side (elsewhere with --lr), of which every tenth training image,
    held out, chooses one; warm-up shrinks with --iters; batch norm without gain and shift, which
    the linear layer has anyway; ValueError for a set without classes for pixels, for pixels as a
    baseline, for a recipe that is none.
    """
    needs_tokens(model, args)
    recipe, depth = settings_of(args, RECIPES), model.encoder.depth
    names = annotations.segmentation_classes(args.data, args.level, args.data_root)
    blocks = sorted({max(1, round(block * depth / 12)) - 1 for block in recipe["blocks"]})
    sizes = sizes_of(args, side_of(model, args, 0))
    iters = args.iters or (TOY_ITERS if is_toy(args) else recipe["iters"])
    lrs = args.lr or (TOY_LRS if is_toy(args) else [recipe["lr"]])
    for split in ("test", "train"):                      # what is missing is said before all work
        next(mapped(args, split, sizes), None)

    def encode(x):
        return torch.cat([patches(model, part, args, blocks) for part in x.split(args.batch_size)])

    def predict(x):                                      # one window at a time: there may be many
        for z in heads.normed(encode(x)):                # heads, and classes
            yield [upsample(layer(z).permute(2, 0, 1), model.encoder.patch_size)
                   for layer in heads.layers]

    several = len(lrs) > 1
    heads = Heads(model.encoder.embed_dim * len(blocks), len(names), len(lrs),
                  recipe["batch_norm"], args.seed).to(args.device)
    opt = adamw(heads.layers, lrs, DECAY)
    progress = Progress(model, args, heads, opt)
    views = crops(model, args, sizes, names, range(progress.step, iters), several)
    train_segmentation(heads, opt, encode, progress.steps(views, iters), model, args, sizes[0],
                       iters)

    chosen, notes = 0, []
    if several:
        held = itertools.islice(mapped(args, "train", sizes), 0, 10 * HELD_OUT, 10)
        found = [metrics.segmentation_scores(counts)["miou"] for counts in score_segmentation(
            predict, held, names, model, args, sizes)[0]]
        chosen = found.index(max(found))
        notes.append(f"{model.name}: lr {lrs[chosen]:g}; mIoU on held-out training images " +
                     ", ".join(f"{100 * s:.1f} at {lr:g}" for s, lr in zip(found, lrs)))
        heads.layers = heads.layers[chosen:chosen + 1]
    [counts], rows, count = score_segmentation(predict, mapped(args, "test", sizes), names, model,
                                               args, sizes, 8 if args.show else 0)
    if rows:
        contact_sheet(rows, picture_of(model, args))
    if args.level in ("object", "part") and args.data in ("ade20k", "pascal"):
        notes.append(f"the {len(names)} classes: {', '.join(names)}")
    shown = " ".join(str(b + 1) for b in blocks)
    progress.done()
    return metrics.report(
        {f"blocks {shown}": percent(counts)},
        f"linear layer, recipe {args.recipe}, {len(names)} classes; blocks {shown} of {depth} "
        f"before the final norm{', batch norm' * recipe['batch_norm']}; crops of {sizes[0]} px, "
        f"{iters:,} iterations of {BATCH} (the paper's: {recipe['iters']:,}), AdamW, lr "
        f"{'chosen on held-out images' if several else f'{lrs[0]:g}'}; windows of {sizes[0]} px, "
        f"stride {sizes[1]}; a ratio of sums at the original size", notes, test=count)


def sizes_of(args, side):
    """The line of SIZES; of toy all are `side`."""
    leave_size(args)
    return (side, side, (side, side), (side, side)) if is_toy(args) else SIZES[args.data]


def leave_size(args):
    if args.size and not is_toy(args):
        raise ValueError(f"{args.task} on {args.data} has the protocol's sizes: leave out --size")


def mapped(args, split, sizes):
    """Items of a split with a class for every pixel, as annotations.segmentation gives them."""
    limit = args.limit or (TOY[split] if is_toy(args) else None)
    return annotations.segmentation(args.data, args.data_root, split, limit, args.level, sizes[0])


def picture_of(model, args):
    level = args.level or next(iter(annotations.SEGMENTATION[args.data][1]))
    return Path(args.out) / f"{args.task}-{args.data}-{level}-{model.name}.png"


def percent(counts):
    """Sum of metrics.confusion -> a row of the table."""
    scores = metrics.segmentation_scores(counts)
    return {name: 100 * scores[name.lower()] for name in ("mIoU", "mAcc", "aAcc")}


class Heads(nn.Module):
    """L linear layers on the same features (..., D); BatchNorm in front of them by choice."""

    def __init__(self, width, classes, count, batch_norm, seed):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False) if batch_norm else nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(width, classes) for _ in range(count))
        weight = 0.01 * torch.randn(classes, width, generator=rng.generator(seed, "heads"))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(weight)
                layer.bias.zero_()

    def normed(self, z):
        return self.norm(z.flatten(0, -2)).view_as(z)


@torch.enable_grad()
def train_segmentation(heads, opt, encode, steps, model, args, crop, iters):
    """Trains the heads side by side. encode: (B, 3, S, S) -> (B, h, w, D); steps: numbers, and what
    `crops` gives.

    Logits of a batch at full size can be gigabytes: loss and gradient are taken of so many pictures
    at a time as are at most 256 MiB of logits, which adds up to the same.
    """
    some = max(1, 2**26 // (heads.layers[0].out_features * crop**2))
    warmup = max(1, WARMUP * iters // RECIPES[args.recipe]["iters"])
    heads.train()
    for step, (x, labels) in steps:
        for group in opt.param_groups:
            group["lr"] = poly(step, iters, group["peak"], warmup)
        z = heads.normed(encode(x))                      # (B, h, w, D), no gradient behind it
        for layer in heads.layers:
            for features, y in zip(z.split(some), labels.split(some)):
                logits = upsample(layer(features).permute(0, 3, 1, 2), model.encoder.patch_size)
                loss = segmentation_loss(logits[..., :crop, :crop], y)
                (loss * len(y) / BATCH).backward()
        opt.step()
        opt.zero_grad()
    heads.eval()


def poly(step, total, peak, warmup):
    """Straight down from `peak` to 0 (power 1), times a straight rise from 1e-6 to 1 at first."""
    return peak * (1 - step / total) * (1 - (1 - min(step / warmup, 1)) * (1 - 1e-6))


def segmentation_loss(logits, labels):
    """(B, C, H, W), (B, H, W) -> cross-entropy, summed over labelled pixels, divided by all pixels.

    That is what the released code does: crops with few labels pull less.
    """
    return F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()


def scaled(shape, long, short):
    """(H, W) -> the shape whose long and short sides are at most these, proportions kept."""
    factor = min(long / max(shape), short / min(shape))
    return [max(1, int(side * factor + 0.5)) for side in shape]


def training_crop(item, sizes, g, swap=None):
    """A random view of an item: image (3, H, W) of 0 to 255, labels (H, W); crop x crop at most.

    As the released configurations have it: size by 0.5 to 2, crop (up to ten tries for one where no
    label takes 75 % of what is labelled), flip, colours. swap: (256,) labels after a flip; None:
    left stays left, as in the released code, wrong as that is for LIP's left arms.
    """
    crop, _, (long, short), _ = sizes
    ratio = uniform(g, 0.5, 2)
    shape = scaled(item.labels.shape, long * ratio, short * ratio)
    image, labels = resize(item.image, shape), resize_labels(item.labels, shape)
    for _ in range(10):
        top, left = (int(torch.randint(max(0, side - crop) + 1, (), generator=g)) for side in shape)
        rows, columns = slice(top, top + crop), slice(left, left + crop)
        seen = labels[rows, columns].flatten().long().bincount(minlength=256)[:255]
        if (seen > 0).sum() > 1 and seen.max() < 0.75 * seen.sum():
            break
    image, labels = image[:, rows, columns], labels[rows, columns]
    if uniform(g) < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
        labels = labels if swap is None else swap[labels.long()]
    return distort(image, g), labels


def crops(model, args, sizes, names, steps, hold_out=False, rank=0, world=1):
    """Yields x (B, 3, S, S) normalised, labels (B, S, S) int64, 255 = ignore, for a range of steps:
    of every batch of BATCH crops this process's share. hold_out: without every tenth image."""
    swap = sides(names) if args.swap_sides else None
    return batches(functools.partial(training_items, args, sizes, hold_out), BATCH,
                   functools.partial(stacked, args.seed, sizes, model.mean, model.std, swap,
                                     range(rank, BATCH, world)), steps, args)


def training_items(args, sizes, hold_out):
    return (item for number, item in enumerate(mapped(args, "train", sizes))
            if number % 10 or not hold_out)


def stacked(seed, sizes, mean, std, swap, own, step, items):
    """Crops of the items with the numbers `own`, as a batch. What is smaller gets 0 and label 255
    on the right and at the bottom."""
    crop = sizes[0]
    views = [training_crop(items[i], sizes, rng.generator(seed, "crop", step, i), swap)
             for i in own]
    x = [augment.normalize(image / 255, mean, std) for image, _ in views]
    x = [F.pad(x, (0, crop - x.shape[2], 0, crop - x.shape[1])) for x in x]
    y = [F.pad(y, (0, crop - y.shape[1], 0, crop - y.shape[0]), value=255) for _, y in views]
    return torch.stack(x), torch.stack(y).long()


def distort(x, g):
    """Photometric distortion of (3, H, W), 0 to 255: each of four changes with probability 1/2."""
    def maybe():
        return uniform(g) < 0.5

    if maybe():
        x = (x + uniform(g, -32, 32)).clamp(0, 255)
    contrast = uniform(g, 0.5, 1.5) if maybe() else 1.0
    first = maybe()
    if first:
        x = (x * contrast).clamp(0, 255)
    if maybe():                                          # HSV: saturation is 1 - lowest / value
        value, low = x.amax(0), x.amin(0)
        saturation = 1 - low / value.clamp(min=1e-6)
        wanted = (saturation * uniform(g, 0.5, 1.5)).clamp(max=1)
        x = (value - (value - x) * wanted / saturation.clamp(min=1e-6)).clamp(0, 255)
    if maybe():
        turn = int(torch.randint(-18, 18, (), generator=g)) / 180
        x = (augment.adjust_hue(x[None] / 255, torch.tensor([turn]))[0] * 255).clamp(0, 255)
    return x if first else (x * contrast).clamp(0, 255)


def sides(names):
    """(256,) uint8: the label after a flip, left-arm for right-arm, "cat: leye" for "cat: reye"."""
    table, names = torch.arange(256, dtype=torch.uint8), [name.lower() for name in names]
    for i, name in enumerate(names):
        other = name.replace("left", "\0").replace("right", "left").replace("\0", "right")
        if other == name:                                # Pascal-Part's, but for "bus: roofside"
            other = re.sub("(?<=: )[lr]", lambda side: "rl"["lr".index(side[0])], name)
        table[i] = names.index(other) if other in names else i
    return table


def starts(length, window, stride):
    """Where windows begin along a side; the last one is moved back to end with the picture."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


@torch.no_grad()
def segment(predict, image, model, args, sizes):
    """(3, H, W) uint8 -> the most likely class of every pixel by every head, [(H, W) int64].

    predict: windows (B, 3, h, w) normalised -> for each of them the logits (C, >= h, >= w) of every
    head. Windows overlap; their logits are averaged. A side shorter than a window is taken as it
    is.
    """
    window, stride, _, (long, short) = sizes
    x = normalised(model, resize(image, scaled(image.shape[1:], long, short)), args)
    places = list(itertools.product(*(starts(n, window, stride) for n in x.shape[1:])))
    height, width = (min(n, window) for n in x.shape[1:])
    sums, counts = [], torch.zeros(x.shape[1:], device=x.device)
    for some in range(0, len(places), AT_ONCE):
        some = places[some:some + AT_ONCE]
        found = predict(torch.stack([x[:, top:top + height, left:left + width]
                                     for top, left in some]))
        for (top, left), heads in zip(some, found):
            at = ..., slice(top, top + height), slice(left, left + width)
            counts[at] += 1
            sums = sums or [x.new_zeros(len(logits), *x.shape[1:]) for logits in heads]
            for total, logits in zip(sums, heads):
                total[at] += logits[:, :height, :width]
    return [likeliest(logits / counts, image.shape[1:]) for logits in sums]


def likeliest(logits, shape, chunk=16):
    """(C, h, w) -> argmax over C at another size (H, W), a few classes at a time: of 150 classes
    and a photo, all at once would be gigabytes."""
    best, where = logits.new_full(shape, -torch.inf), logits.new_zeros(shape, dtype=torch.long)
    for first in range(0, len(logits), chunk):
        value, index = resize(logits[first:first + chunk], shape).max(0)
        better = value > best
        best, where = best.where(~better, value), where.where(~better, index + first)
    return where


def score_segmentation(predict, items, names, model, args, sizes, show=0):
    """-> metrics.confusion of every head, summed over all items; rows of pictures (image, truth,
    prediction) of the first `show` items; number of items. predict: see `segment`."""
    counts, rows, number = None, [], 0
    for number, item in enumerate(bar(items, model), 1):
        found = segment(predict, item.image, model, args, sizes)
        new = [metrics.confusion(predicted.cpu(), item.labels, len(names)) for predicted in found]
        counts = new if counts is None else [a + b for a, b in zip(counts, new)]
        if number <= show:
            known = item.labels != 255
            rows.append([item.image, *(painted(item.image, labels, known, names)
                                       for labels in (item.labels, found[0].cpu()))])
    if not number:
        raise ValueError(f"{args.task}: nothing to look at; raise --limit or change --data")
    return counts, rows, number


def painted(image, labels, known, names):
    """A colour for every class on the picture; background and what is not known stay dark."""
    first = 0 if names[0] == "background" else 1
    return toy.overlay(image, (labels.long() + first).where(known, 0))


# ---- one patch asks for its object ---------------------------------------------------------------

THRESHOLDS = [i / 10 for i in range(10)]


def zero_shot_segmentation(model, args):
    """One patch of an object is shown: which patches are similar to it, and are they the object?

    MMC, table 1: the picture at 480 x 480, the target is every patch whose cosine to the prompt
    exceeds T. Left open there, so our choice: the target is the union of one category's masks in
    one picture (--target instance: one mask; stuff: COCO's stuff classes), the prompt the patch
    whose centre lies deepest inside it (--prompt random: any that it covers at least half), tokens
    after the final norm, IoU averaged over all targets; the best T of 0 to 0.9 is one for the whole
    set. Targets that cover less than half of their prompt are left out and counted. Sets with a map
    of classes instead of masks, and --level part or scene, give a target for each class but
    background; void counts nowhere. The column "whole picture" is the floor: everything is said to
    be the object.
    """
    needs_tokens(model, args)
    side, p = side_of(model, args, 480), model.encoder.patch_size
    found, categories, floor, skipped, rows = [], [], [], 0, []
    items = iter(bar(targets(args, side), model))
    while some := list(itertools.islice(items, min(AT_ONCE, args.batch_size))):
        images = torch.stack([squashed(image, side) for image, _, _ in some])
        z = F.normalize(patches(model, normalised(model, images, args), args), dim=3).cpu()
        for number, (_, masks, valid) in enumerate(some):
            for category, mask in masks:
                mask = resize_labels(mask, (side, side))
                cover = cells(mask, p)                                           # (h, w)
                place = prompt(mask, cover, p, args, len(found) + skipped)
                if place is None:
                    skipped += 1
                    continue
                similarity = z[number] @ z[number][place]                        # (h, w)
                of = cells(resize_labels(valid, (side, side)), p)
                found.append(sweep(similarity, cover, of))
                floor.append((cover.sum() / of.sum()).item())
                categories.append(category)
                if args.show and len(rows) < 8:
                    rows.append((images[number], mask, similarity, place))
    if not found:
        raise ValueError(f"{args.task}: no target is large enough for a prompt, of {skipped}; "
                         f"raise --limit or change --data")
    iou, categories = 100 * torch.stack(found), torch.tensor(categories)         # (targets, 10)
    best = THRESHOLDS[int(iou.mean(0).argmax())]
    if rows:
        contact_sheet([similarity_row(*row, best, p) for row in rows],
                      Path(args.out) / f"similarity-{args.data}-{model.name}.png")
    by_category = torch.stack([iou[categories == c].mean(0) for c in categories.unique()])

    def row(means):
        return {"Opt": means.max().item()} | {f"T={t}": means[int(10 * t)].item()
                                              for t in (0.1, 0.2, 0.3, 0.4)}
    share = 100 * sum(floor) / len(floor)
    return metrics.report(
        {"mean over targets": row(iou.mean(0)) | {"whole picture": share},
         "mean over categories": row(by_category.mean(0))},
        f"IoU of the patches with cosine > T to the {args.prompt} patch of a {args.target}"
        f"{f' ({args.level})' if args.level else ''}, after the final norm, {side} x {side} px, "
        f"{side // p} x {side // p} patches; Opt: best T of 0, 0.1 ... 0.9 for the whole set; the "
        f"paper: 480 x 480 px of COCO, targets not stated",
        [f"{model.name}: Opt is T = {best}, mean over targets; "
         + ", ".join(f"{v:.1f} at {t}" for t, v in zip(THRESHOLDS, iou.mean(0).tolist())),
         f"{skipped} targets cover less than half of their prompt and are left out"],
        targets=len(found), categories=len(by_category))


def squashed(image, side):
    """(3, H, W) uint8 -> squashed to a square, bicubic, uint8."""
    x = F.interpolate(image[None].float(), (side, side), mode="bicubic", antialias=True,
                      align_corners=False)[0]
    return x.round().clamp(0, 255).to(torch.uint8)


def targets(args, side):
    """Yields image (3, H, W) uint8, [(category, mask (H, W) bool), ...], valid (H, W) bool."""
    limit = args.limit or (TOY["test"] if is_toy(args) else None)
    if args.data in annotations.MASKS and args.target != "stuff" and args.level in (None, "object"):
        for item in annotations.masks(args.data, args.data_root, "test", limit, side):
            pairs = list(zip(item.labels[~item.crowd].tolist(), item.masks[~item.crowd]))
            if args.target == "category":
                pairs = [(c, torch.stack([m for other, m in pairs if other == c]).any(0))
                         for c in sorted({c for c, _ in pairs})]
            yield item.image, pairs, torch.ones(item.image.shape[1:], dtype=torch.bool)
        return
    if args.target == "instance" or args.target == "stuff" and (
            args.data != "coco" or args.level not in (None, "scene")):
        raise ValueError(f"{args.data} has no --target {args.target}"
                         f"{f' at --level {args.level}' if args.level else ''}; choose category")
    level = "scene" if args.target == "stuff" else args.level
    names = annotations.segmentation_classes(args.data, level, args.data_root)
    outside = {names.index("background")} if "background" in names else set()
    if args.target == "stuff":
        outside = set(range(80))
    for item in annotations.segmentation(args.data, args.data_root, "test", limit, level, side):
        classes = [c for c in item.labels.unique().tolist() if c != 255 and c not in outside]
        yield item.image, [(c, item.labels == c) for c in classes], item.labels != 255


def cells(mask, p):
    """(H, W) bool -> number of its pixels in each patch (h, w) float32."""
    return F.avg_pool2d(mask[None].float(), p, divisor_override=1)[0]


def prompt(mask, cover, p, args, number):
    """The patch (row, column) that is shown, None if the target does not cover half of it."""
    if args.prompt == "random":
        able = (cover >= p * p / 2).nonzero()
        g = rng.generator(args.seed, "prompt", number)
        return tuple(able[int(torch.randint(len(able), (), generator=g))]) if len(able) else None
    place = divmod(int(depth_at_centres(mask, p).argmax()), cover.shape[1])      # ties: the first
    return place if cover[place] >= p * p / 2 else None


def depth_at_centres(mask, p):
    """(H, W) bool -> squared distance (h, w) of each patch's centre to the nearest pixel outside of
    the mask; what is beyond the picture is outside, too (our choice).

    Exact, in two passes: down each column to the nearest such pixel, then along the row.
    """
    free = F.pad(~mask, (1, 1, 1, 1), value=True)        # (H + 2, W + 2)
    y, x = (torch.arange(-1, n - 1).float() for n in free.shape)
    rows, columns = (torch.arange(n // p) * p + (p - 1) / 2 for n in mask.shape)
    down = (rows[:, None] - y).square()                                          # (h, H + 2)
    down = torch.stack([d[:, None].where(free, torch.inf).amin(0) for d in down])
    along = (columns[:, None] - x).square()                                      # (w, W + 2)
    return torch.stack([(along + d).amin(1) for d in down])


def sweep(similarity, cover, of):
    """IoU (10,) float64 of the patches above each threshold; cover, of: how many pixels of a patch
    are the target's, and how many count. Each patch is painted whole, so no pixel is needed."""
    chosen = similarity > torch.tensor(THRESHOLDS)[:, None, None]                # (10, h, w)
    hit, said = ((chosen * x.double()).sum((1, 2)) for x in (cover, of))
    return hit / (cover.double().sum() + said - hit)


def similarity_row(image, mask, similarity, place, threshold, p):
    """Picture with its prompt, truth, similarity as a heat map, prediction at the threshold."""
    marked, (top, left) = image.clone(), (int(i) * p for i in place)
    square = ..., slice(top, top + p), slice(left, left + p)
    marked[0][square], marked[1:][square] = 255, 40
    heat = (similarity.clamp(0, 1) * 255).repeat_interleave(p, 0).repeat_interleave(p, 1)
    heat = torch.stack([heat, heat * 0.75, 255 - heat]).to(torch.uint8)          # blue 0, yellow 1
    heat = (0.3 * image + 0.7 * heat).to(torch.uint8)
    chosen = (similarity > threshold).repeat_interleave(p, 0).repeat_interleave(p, 1)
    return [marked, toy.overlay(image, mask), heat, toy.overlay(image, chosen)]


# ---- masks follow their objects through a film ---------------------------------------------------

MEMORY, RADIUS, NEAREST, TAU = 7, 12, 5, 0.1             # DINO's script: frames, patches, patches
DAVIS_STD = (0.228, 0.224, 0.225)                        # sic


def video(model, args):
    """The masks of a film's first frame are handed on, patch to similar patch, to all others.

    DINO's protocol on DAVIS-2017 (SelfPatch, supplement, tables 3-5; MMC, table 2), nothing is
    trained: each patch takes the mean label of its 5 most similar patches within 12 patches of its
    place, in the first frame and in the previous 7 together, weighted by exp(cosine / 0.1). Tokens
    after the final norm (SelfPatch's code has none there). Our choice on toy: films of 24 frames of
    twice the encoder's size, and the same share of the frame, 12 of 30 patches, as the window.
    """
    needs_tokens(model, args)
    side, p = side_of(model, args, 480), model.encoder.patch_size
    radius = max(1, round(RADIUS * (side // p) / 30)) if is_toy(args) else RADIUS
    std = DAVIS_STD if args.data == "davis" and tuple(model.std) == tuple(augment.STD) else None
    films, strips, count = [], [], 0
    for film in bar(annotations.videos(args.data, args.data_root, "test", args.limit or (
            10 if is_toy(args) else None), side), model):
        def encode(image):
            x = normalised(model, resize(image, frame_shape(image.shape[1:], side, p)), args,
                           std=std)
            return F.normalize(patches(model, x[None], args)[0], dim=2)

        masks = torch.stack([film.masks[0], *follow(film, encode, p, radius)])
        films.append(metrics.film_scores(masks, film.masks))
        count += len(masks)
        if args.show and len(strips) < 8:
            strips += film_strip(film, masks)
    if not sum(len(j) for j, _ in films):
        raise ValueError(f"{args.task}: no film with an object; raise --limit or change --data")
    if strips:
        contact_sheet(strips, Path(args.out) / f"video-{args.data}-{model.name}.png")
    scores = {name: 100 * value for name, value in metrics.video_scores(films).items()}
    names = {"j&f": "J&F", "j": "J", "f": "F", "j_recall": "J recall", "j_decay": "J decay",
             "f_recall": "F recall", "f_decay": "F decay"}
    return metrics.report(
        {"patches": {shown: scores[name] for name, shown in names.items()}},
        f"first frame and the previous {MEMORY}, the {NEAREST} nearest patches of all of them "
        f"within {radius} patches, temperature {TAU}; last block, after the final norm; frames "
        f"with a short side of {side} px, patches of {p}; first and last frame not scored",
        films=len(films), frames=count)


def frame_shape(shape, short, p):
    """(H, W) -> the short side as given, the other in proportion, floored to a multiple of 64; of
    the patch, where that does not divide 64: our choice."""
    step = 64 if 64 % p == 0 and short >= 64 else p
    return [short if n == min(shape) else max(short, int(short * n / min(shape)) // step * step)
            for n in shape]


def follow(film, encode, p, radius):
    """Yields the mask (H, W) uint8 of each frame after the first; encode: image -> (h, w, D) of
    length 1. Kept of the past: the first frame, and the last MEMORY."""
    first = encode(film.frames[0])
    small = resize_labels(film.masks[0], first.shape[:2]).long().to(first.device)
    first = first, F.one_hot(small).float()              # channels up to what is left in `small`
    memory = deque(maxlen=MEMORY)
    for t in range(1, len(film.masks)):
        feature = encode(film.frames[t])
        z, labels = (torch.stack(x) for x in zip(first, *memory))
        soft = propagate(feature, z, labels, radius)
        memory.append((feature, soft))
        yield harden(soft, p, film.masks.shape[1:])


def propagate(feature, memory, labels, radius):
    """feature (h, w, D), memory (M, h, w, D), labels (M, h, w, C) -> labels (h, w, C).

    Row by row: only the rows of the window are compared, so films of small patches fit in memory.
    """
    out, width = [], feature.shape[1]
    x = torch.arange(width, device=feature.device)
    near = (x[:, None] - x).abs() <= radius                                      # (w source, w)
    for y, target in enumerate(feature):
        rows = slice(max(0, y - radius), y + radius + 1)
        source, known = memory[:, rows].flatten(0, 2), labels[:, rows].flatten(0, 2)
        a = (source @ target.T / TAU).exp() * near.repeat(len(source) // width, 1)
        least = a.topk(min(NEAREST, len(a)), 0).values[-1]                       # (w,)
        a = a.where(a >= least, 0)                       # ties of the fifth stay
        out.append((a / a.sum(0)).T @ known)
    return torch.stack(out)


def harden(soft, p, shape):
    """Soft labels (h, w, C) of patches -> (H, W) uint8 of the frame.

    Each channel that is not all 0 is stretched to 0 ... 1 before the largest wins: that helps small
    objects, and is part of the protocol. One that is constant would become 0/0; it is left as is.
    """
    maps = upsample(soft.permute(2, 0, 1), p)
    low, high = (getattr(maps, of)((1, 2), keepdim=True) for of in ("amin", "amax"))
    stretch = (high > 0) & (high > low)
    maps = torch.where(stretch, (maps - low) / (high - low).where(stretch, 1), maps)
    return resize_labels(maps.argmax(0).to(torch.uint8), shape).cpu()


def film_strip(film, masks, frames=6):
    """Two rows of pictures: truth, and what was propagated."""
    at = [i * (len(masks) - 1) // (frames - 1) for i in range(frames)]
    return [[toy.overlay(film.frames[t], of[t]) for t in at] for of in (film.masks, masks)]


# ---- a heat map for each joint -------------------------------------------------------------------

# Our choice, as the study prints four numbers and no settings: 20 epochs of COCO's 149,813 persons
# are 5,850 iterations; the learning rate falls to a tenth after 15 and after 18 of 20 epochs.
POSE = {
    "coco": dict(shape=(256, 192), batch=512, iters=5850, warmup=500, lr=5e-4, decay=0.01),
    "toy":  dict(shape=None, batch=16, iters=TOY_ITERS, warmup=10, lr=1e-2, decay=0.01)}
STRIDE, SURE, SAME, TOY_SIGMA = 4, 0.2, 0.9, 0.05        # TOY_SIGMA: 10 % of the size is OKS 0.6


def pose(model, args):
    """Linear heat maps: where in the box of a person, or of a creature, is each joint?

    Part-aware study, table 10, which says "linear"; all else is our choice, as in the usual
    top-down pipelines: the true box, widened to 3:4 and by a quarter, becomes 256 x 192 px; one
    linear layer on the patches of the last block, after the final norm, gives a map for each joint,
    enlarged to cells of 4 px; squared error to a Gaussian (sigma 2 cells, on toy in proportion: 1
    cell at 128 px) at joints with v > 0; flips, sizes by 0.75 to 1.25 and turns by up to 30 degrees
    in training; flip-averaged in the test. Score: OKS AP of COCO by pycocotools. On toy, whose
    boxes become squares of twice the encoder's size: mean OKS (the same sigma for all parts) and
    PCK, the share of joints within a tenth of the box's longer side. COCO gives these two as well.
    ValueError: key-points of a set without areas, COCO without pycocotools.
    """
    needs_tokens(model, args)
    if not is_toy(args) and args.data != "coco":
        raise ValueError(f"pose reads no key-points of {args.data}; choose --data coco, toy or "
                         "toy-scenes")
    leave_size(args)
    names = annotations.part_names(args.data)
    recipe = POSE["toy" if is_toy(args) else "coco"]
    side = side_of(model, args, 256)
    shape = recipe["shape"] or (side, side)
    sigmas = [TOY_SIGMA] * len(names) if is_toy(args) else metrics.SIGMAS
    swap = sides(names)[:len(names)].long()
    iters = args.iters or recipe["iters"]

    if args.data == "coco":
        metrics.coco_ap([])                              # says now if pycocotools is missing
    for split in ("test", "train"):                      # and what else is
        next(with_points(args, split, side), None)
    sigma = 2 * shape[0] / 256                           # cells
    head = pose_head(len(names), model, args)
    opt = adamw([head], [recipe["lr"]], recipe["decay"])
    progress = Progress(model, args, head, opt)
    views = batches(functools.partial(boxes_of, args, side), recipe["batch"],
                    functools.partial(training_poses, args.seed, shape, swap, sigma),
                    range(progress.step, iters), args)
    train_pose(head, opt, progress.steps(views, iters), shape, iters, recipe, model, args)
    images, rows, close, similar, count = [], [], [], [], 0
    for item in bar(with_points(args, "test", side), model):
        who = persons(item)
        if not who:
            continue
        points, scores = predict(item, who, head, shape, swap, model, args)      # (K, P, 2), (K,)
        truth, boxes, areas = item.points[who], item.boxes[who], item.areas[who]
        similar.append(metrics.oks(points, truth, boxes, areas, sigmas))
        far = (points - truth[..., :2]).norm(dim=2) / (boxes[:, 2:] - boxes[:, :2]).amax(1)[:, None]
        close.append((far <= 0.1)[truth[..., 2] > 0])
        count += len(who)
        if args.show and len(rows) < 8:
            rows.append(pose_row(item.image, boxes[0], truth[0], points[0], shape))
        if args.data == "coco":                          # the pictures are not needed any more
            keep = distinct(points, scores, boxes, areas, sigmas)
            images.append((SimpleNamespace(boxes=item.boxes, areas=item.areas, crowd=item.crowd,
                                           points=item.points),
                           SimpleNamespace(points=visible(points[keep]), scores=scores[keep])))
    if not count:
        raise ValueError("pose: no one in the test images; raise --limit or change --data")
    if rows:
        contact_sheet(rows, Path(args.out) / f"pose-{args.data}-{model.name}.png", 192)
    row = {"OKS": 100 * torch.cat(similar).mean().item(),
           "PCK@0.1": 100 * torch.cat(close).double().mean().item()}
    if images:
        found = metrics.coco_ap(images, "keypoints", sigmas)
        row = {name: 100 * found[name] for name in ("AP", "AP50", "AR", "AR50")} | row
    progress.done()
    return metrics.report(
        {"patches": row},
        f"linear heat maps of {len(names)} joints in the true box, {shape[0]} x {shape[1]} px, "
        f"maps of {shape[0] // STRIDE} x {shape[1] // STRIDE}, Gaussians of sigma {sigma:g} cells; "
        f"last block, after the final norm; {iters:,} iterations of {recipe['batch']}, AdamW, lr "
        f"{recipe['lr']:g}; flip-averaged; OKS"
        + (f" with sigma {TOY_SIGMA} for all parts" if is_toy(args) else " with COCO's sigmas"),
        objects=count)


def with_points(args, split, side):
    """Items of a split with key-points, as annotations.keypoints gives them."""
    limit = args.limit or (TOY[split] if is_toy(args) else None)
    return annotations.keypoints(args.data, args.data_root, split, limit, side)


def boxes_of(args, side):
    """Yields an item for every box of the training images."""
    for item in with_points(args, "train", side):
        for k in persons(item):
            yield SimpleNamespace(image=item.image, box=item.boxes[k], points=item.points[k])


def persons(item):
    """Numbers of the objects of an item that are no crowd and have a labelled joint."""
    return ((item.points[..., 2] > 0).any(1) & ~item.crowd).nonzero()[:, 0].tolist()


def to_image(box, shape, scale=1.0, degrees=0.0):
    """(2, 3) float64: where in the image a pixel (x, y, 1) of the crop lies.

    box: x0 y0 x1 y1, widened to the proportions of shape (H, W), then by 1.25 and by scale; the
    crop is turned about its centre.
    """
    x0, y0, x1, y1 = box.tolist()
    height, width = shape
    step = 1.25 * scale * max((x1 - x0) / width, (y1 - y0) / height, 1e-3)      # px of image a px
    turn = math.radians(degrees)
    turned = step * torch.tensor([[math.cos(turn), -math.sin(turn)],
                                  [math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    centre = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2], dtype=torch.float64)
    middle = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    return torch.cat([turned, (centre - turned @ middle)[:, None]], 1)


def moved(points, matrix):
    """(..., 2) points by a (2, 3) matrix."""
    return (points.double() @ matrix[:, :2].T + matrix[:, 2]).float()


def inverse(matrix):
    back = torch.linalg.inv(matrix[:, :2])
    return torch.cat([back, -back @ matrix[:, 2:]], 1)


def cut(image, matrix, shape):
    """(3, H, W) uint8 -> the crop (3, *shape) float32 of 0 to 255, bilinear; outside is black."""
    y, x = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    at = moved(torch.stack([x, y], -1), matrix)
    last = torch.tensor([image.shape[2] - 1, image.shape[1] - 1])
    return F.grid_sample(image[None].float(), 2 * at[None] / last - 1, align_corners=True)[0]


def heat_maps(points, shape, sigma):
    """points (P, 3) in the crop -> Gaussians (P, h, w) of peak 1, cut at 3 sigma, about the nearest
    cell, which is cell i for pixel 4 i; weights (P,): 0 where v = 0 or all of it lies outside."""
    cell = (points[:, :2] / STRIDE + 0.5).floor()
    size = torch.tensor([shape[1] // STRIDE, shape[0] // STRIDE])
    reach = int(3 * sigma)
    offsets = [torch.arange(n) - c[:, None] for n, c in zip(size.tolist(), cell.T)]     # x, y
    x, y = ((-o**2 / (2 * sigma**2)).exp() * (o.abs() <= reach) for o in offsets)
    inside = ((cell + reach >= 0) & (cell - reach < size)).all(1)
    return y[:, :, None] * x[:, None], (inside & (points[:, 2] > 0)).float()


def decode(maps):
    """(P, h, w) -> x, y (P, 2) in cells: the maximum and a quarter towards the higher neighbour;
    the maxima (P,)."""
    P, h, w = maps.shape
    best, place = maps.flatten(1).max(1)
    x, y, joint = place % w, place // w, torch.arange(P, device=maps.device)
    inner = (x > 0) & (x < w - 1) & (y > 0) & (y < h - 1)
    left, right = (maps[joint, y, (x + d).clamp(0, w - 1)] for d in (-1, 1))
    above, below = (maps[joint, (y + d).clamp(0, h - 1), x] for d in (-1, 1))
    step = torch.stack([right - left, below - above], 1).sign() * 0.25 * inner[:, None]
    return torch.stack([x, y], 1) + step, best


def joint_maps(head, x, shape, model, args):
    """x (B, 3, *shape) normalised -> (B, P, h, w). The linear layer comes before the enlarging,
    which it commutes with: P maps are enlarged instead of D. By the patch's own factor, then cut:
    of patches of 14 the grid is wider than the picture, and squeezed into it joints would drift."""
    maps = torch.cat([head(patches(model, part, args)) for part in x.split(args.batch_size)])
    maps = upsample(maps.permute(0, 3, 1, 2), model.encoder.patch_size / STRIDE)
    return maps[..., :shape[0] // STRIDE, :shape[1] // STRIDE]


def pose_head(joints, model, args):
    """Linear layer (..., D) -> (..., P)."""
    head = nn.Linear(model.encoder.embed_dim, joints)
    with torch.no_grad():
        g = rng.generator(args.seed, "heads")
        head.weight.copy_(0.001 * torch.randn(head.weight.shape, generator=g))
        head.bias.zero_()
    return head.to(args.device)


@torch.enable_grad()
def train_pose(head, opt, steps, shape, iters, recipe, model, args):
    """On random views of boxes: see `training_poses`."""
    warmup = min(recipe["warmup"], max(1, iters // 10))
    for step, (crop, goal, weight) in steps:
        drop = 0.1 ** ((step >= 0.75 * iters) + (step >= 0.9 * iters))
        for group in opt.param_groups:
            group["lr"] = group["peak"] * min(1, (step + 1) / warmup) * drop
        x = normalised(model, crop, args)
        error = (joint_maps(head, x, shape, model, args) - goal).square().mean((2, 3))  # (B, P)
        (error * weight).mean().backward()
        opt.step()
        opt.zero_grad()


def training_poses(seed, shape, swap, sigma, step, items):
    """-> crops (B, 3, *shape) of 0 to 255, heat maps (B, P, h, w), their weights (B, P)."""
    crops, points = zip(*(training_pose(item, shape, swap, rng.generator(seed, "pose", step, i))
                          for i, item in enumerate(items)))
    maps, weights = zip(*(heat_maps(of, shape, sigma) for of in points))
    return torch.stack(crops), torch.stack(maps), torch.stack(weights)


def training_pose(item, shape, swap, g):
    """A random view of a box: crop (3, *shape) of 0 to 255, points (P, 3) in it."""
    matrix = to_image(item.box, shape, uniform(g, 0.75, 1.25), uniform(g, -30, 30))
    crop, points = cut(item.image, matrix, shape), item.points.clone()
    points[:, :2] = moved(points[:, :2], inverse(matrix))
    if uniform(g) < 0.5:
        crop, points = crop.flip(-1), points[swap]       # left and right change names, too
        points[:, 0] = shape[1] - 1 - points[:, 0]
    return crop, points


@torch.no_grad()
def predict(item, who, head, shape, swap, model, args):
    """-> points (K, P, 2) in the image, scores (K,): mean of the maxima that are above 0.2."""
    matrices = [to_image(item.boxes[k], shape) for k in who]
    x = torch.stack([normalised(model, cut(item.image, m, shape), args) for m in matrices])
    maps = joint_maps(head, x, shape, model, args)
    maps = (maps + unflipped(joint_maps(head, x.flip(-1), shape, model, args), swap)) / 2
    points, scores = [], []
    for one, matrix in zip(maps.cpu(), matrices):
        cell, best = decode(one)
        points.append(moved(STRIDE * cell, matrix))
        sure = best[best > SURE]
        scores.append(sure.mean() if len(sure) else best.new_zeros(()))
    return torch.stack(points), torch.stack(scores)


def unflipped(maps, swap):
    """Maps (B, P, h, w) of mirrored crops -> as of the crops, one cell to the right: cell i stands
    for pixel 4 i, and the mirror image of pixel 4 i is 3/4 of a cell off."""
    maps = maps.flip(-1)[:, swap]
    return torch.cat([maps[..., :1], maps[..., :-1]], 3)


def distinct(points, scores, boxes, areas, sigmas):
    """Numbers of the predictions to keep, best first: none is closer than OKS 0.9 to a better."""
    kept = []
    for k in scores.argsort(descending=True, stable=True).tolist():
        same = [metrics.oks(points[k], visible(points[other]), boxes[other], areas[other], sigmas)
                for other in kept]
        if not any(s > SAME for s in same):
            kept.append(k)
    return kept


def visible(points):
    """(..., 2) -> (..., 3): v = 2."""
    return F.pad(points, (0, 1), value=2.0)


def pose_row(image, box, truth, points, shape):
    """Two pictures of the box: where the joints are, and where they were found; a colour each."""
    matrix = to_image(box, shape)
    crop, rows = cut(image, matrix, shape).to(torch.uint8), []
    known = (truth[:, 2] > 0) * 2.0
    for at in (truth[:, :2], points):
        at = moved(at, inverse(matrix))
        x, y = (v.clamp(0, n - 1) for v, n in zip(at.T, shape[::-1]))
        spots = torch.zeros(shape, dtype=torch.uint8)
        for number, (row, column) in enumerate(zip(y.long(), x.long()), 1):
            spots[(row - 2).clamp(0):row + 3, (column - 2).clamp(0):column + 3] = (
                number if known[number - 1] else 0)
        rows.append(toy.overlay(crop, spots, torch.stack([x, y, known], 1)))
    return rows
