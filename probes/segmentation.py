"""Segmentation: how well do patch tokens identify the class or the object of a pixel?

    python evaluate.py --task linear_segmentation --level part --show
    python evaluate.py --task zero_shot_segmentation --data toy-scenes --baseline untrained
    python evaluate.py --task segmentation --head upernet --show

    image -> frozen ViT -> four blocks -> linear layer             -> classes    linear_segmentation
                        -> last block  -> cosine to one patch      -> mask    zero_shot_segmentation
    image -> ViT        -> four blocks -> Semantic FPN or UPerNet  -> classes           segmentation
             fine-tuned end to end

Each probe is a function task(model, opt) -> Report. Memory does not grow with the data set: images
are read one at a time, and at most 2 GiB of training images per worker are kept for shuffling.
"""
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lib import augment, distributed, metrics, rng, toy
from probes import annotations
from probes.common import (
    Report,
    choose_recipe,
    input_side,
    is_toy,
    progress_bar,
    require_tokens,
    require_vit,
)
from probes.figures import FigureRows, save_image_grid
from probes.patches import (
    deepest_patch,
    extract_patches,
    normalize_images,
    resize_image,
    resize_labels,
    upsample_maps,
)
from probes.training import (
    Progress,
    copy_encoder,
    draw_uniform,
    flip_table,
    image_limit,
    layer_decay_groups,
    linear_adamw,
    load_batches,
    single_lr,
)

# Shapes: B images, D width, C classes, p patch side; (height, width) in pixels, (rows, columns) of
# patches.

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


# ---- a linear layer on frozen patch tokens -------------------------------------------------------

# blocks: of 12, counted from 1; scaled linearly for other depths.
LINEAR_SEGMENTATION_RECIPES = {
    # Zhu et al. (2023), tables 3, 5, 7-9, and their released configuration.
    "parts": dict(blocks=(4, 6, 8, 12), lr=4e-4, iters=160000, batch_norm=False),
    # MMC, supplement (which counts blocks from 0); batch norm as in VICRegL, which it follows.
    "mmc": dict(blocks=(6, 8, 10, 12), lr=1e-4, iters=40000, batch_norm=True)}
LINEAR_WEIGHT_DECAY = 0.05                               # of both recipes
# Our choice. The recipes' learning rates are for 40,000 iterations and more: a run with less than a
# tenth of the recipe's iterations chooses among others.
SHORT_LINEAR_LRS = 2e-3, 1e-2, 5e-2
TOY_LINEAR_ITERS, OWN_LINEAR_ITERS = 200, 1000
MAX_HELD_OUT = 100                                       # held-out images at most


def linear_segmentation(model, opt):
    """Linear layer on the patch tokens of four frozen blocks: the class of every pixel, mIoU.

    Zhu et al. (2023), tables 3, 5, 7-9 (--recipe parts), and MMC, table 3 (--recipe mmc): the
    outputs of frozen blocks are concatenated, without the final norm and the class token; one 1 x 1
    convolution; the logits are upsampled to the image. Random crops in training, a sliding window
    at test time, scores at the original size. Our choices: on toy, images of twice the encoder's
    size and 200 iterations, on other folders 1,000; with less than a tenth of the recipe's
    iterations (or with --lr) several learning rates trained in parallel, of which the best on
    held-out images, every tenth training image, is used; the warmup is scaled with --iters; batch
    norm without affine parameters, since the linear layer has them. ValueError: a data set without
    a class for every pixel, the pixels baseline, an unknown recipe.
    """
    require_tokens(model, opt.task)
    require_vit(model, opt.task)
    recipe_name, recipe = choose_recipe(opt, LINEAR_SEGMENTATION_RECIPES)
    depth, p = model.encoder.depth, model.encoder.patch_size
    names = annotations.segmentation_classes(opt.data, opt.level, opt.data_root)
    blocks = sorted({max(1, round(block * depth / 12)) - 1 for block in recipe["blocks"]})
    sizes = segmentation_sizes(opt, input_side(model, opt, 0))
    iters = opt.iters or (TOY_LINEAR_ITERS if is_toy(opt.data) else recipe["iters"]
                          if opt.data in SEGMENTATION_SIZES else OWN_LINEAR_ITERS)
    warmup = max(1, WARMUP_ITERS * iters // recipe["iters"])
    is_short = 10 * iters < recipe["iters"]
    lrs = opt.lr or (SHORT_LINEAR_LRS if is_short else [recipe["lr"]])
    hold_out = len(lrs) > 1
    for split in ("test", "train"):                      # reports missing files before training
        next(segmentation_items(opt, split, sizes), None)

    def encode(x):
        return torch.cat([extract_patches(model, part, blocks) for part in x.split(opt.batch_size)])

    def predict(x):
        for z in heads.normalize(encode(x)):             # the logits of all windows may not fit
            yield [upsample_maps(layer(z).permute(2, 0, 1), p) for layer in heads.layers]

    heads = LinearHeads(model.encoder.embed_dim * len(blocks), len(names), len(lrs),
                        recipe["batch_norm"], opt.seed).to(model.device)
    optimizer = linear_adamw(heads.layers, lrs, LINEAR_WEIGHT_DECAY)
    progress = Progress(model, opt, heads, optimizer)
    batches = load_crops(model, opt, sizes, names, range(progress.step, iters), hold_out)
    train_linear_heads(heads, optimizer, encode, progress.steps(batches, iters), iters, warmup, p)

    best, notes = 0, []
    if hold_out:
        held = itertools.islice(segmentation_items(opt, "train", sizes), 0, 10 * MAX_HELD_OUT, 10)
        counts, _, _ = score_segmentation(predict, held, names, model, sizes)
        scores = [metrics.segmentation_scores(head_counts)["miou"] for head_counts in counts]
        best = scores.index(max(scores))
        notes.append(f"{model.name}: lr {lrs[best]:g}; mIoU on held-out training images " +
                     ", ".join(f"{100 * s:.1f} at {lr:g}" for s, lr in zip(scores, lrs)))
        heads.layers = heads.layers[best:best + 1]
    [counts], figure, n_images = score_segmentation(
        predict, segmentation_items(opt, "test", sizes), names, model, sizes, 8 if opt.show else 0)
    save_figure(figure, names, model, opt)
    if opt.level in ("object", "part") and opt.data in ("ade20k", "pascal"):
        notes.append(f"the {len(names)} classes: {', '.join(names)}")
    progress.delete()
    block_names = " ".join(str(block + 1) for block in blocks)
    return Report(
        {f"blocks {block_names}": percentages(counts)},
        f"linear layer, recipe {recipe_name}, {len(names)} classes; blocks {block_names} of "
        f"{depth} before the final norm{', batch norm' * recipe['batch_norm']}; crops of "
        f"{sizes.crop} px, {iters:,} iterations with {crops_per_batch(opt)} crops each "
        f"(published: {recipe['iters']:,}), AdamW, lr "
        f"{'chosen on held-out images' if hold_out else f'{lrs[0]:g}'}; windows of {sizes.crop} "
        f"px, stride {sizes.stride}; a ratio of sums at the original size",
        dict(test=n_images), notes)


class LinearHeads(nn.Module):
    """Linear layers, one for each learning rate, on the same features (..., D); optionally after a
    batch norm."""

    def __init__(self, width, classes, count, batch_norm, seed):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False) if batch_norm else nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(width, classes) for _ in range(count))
        weight = 0.01 * torch.randn(classes, width, generator=rng.generator(seed, "heads"))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(weight)
                layer.bias.zero_()

    def normalize(self, z):
        return self.norm(z.flatten(0, -2)).view_as(z)


@torch.enable_grad()
def train_linear_heads(heads, optimizer, encode, steps, iters, warmup, p):
    """Trains all heads in parallel. encode: (B, 3, S, S) -> (B, rows, columns, D), no gradient;
    steps: (step, batch of `load_crops`).

    The logits of a batch at full size can take gigabytes. Gradients are therefore accumulated over
    parts of the batch whose logits take at most 256 MiB, or over single images that take more.
    """
    heads.train()
    for step, (x, labels) in steps:
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, iters, group["peak"], warmup)
        S = x.shape[3]
        part = max(1, 2**26 // (heads.layers[0].out_features * S**2))
        z = heads.normalize(encode(x))                   # (B, rows, columns, D)
        for layer in heads.layers:
            for features, y in zip(z.split(part), labels.split(part)):
                logits = upsample_maps(layer(features).permute(0, 3, 1, 2), p)
                loss = segmentation_loss(logits[..., :S, :S], y)
                (loss * len(y) / len(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    heads.eval()


# ---- zero-shot segmentation from one patch -------------------------------------------------------

THRESHOLDS = [i / 10 for i in range(10)]                # of MMC
# From -1 to 0.9999, denser toward 1: cosines of some models, such as MAE's, are all above 0.9.
FINE_THRESHOLDS = [1 - 2 * 0.83**i for i in range(54)]


def zero_shot_segmentation(model, opt):
    """Do the patches that are similar to one patch of an object cover the object? IoU.

    MMC, table 1: the image at 480 x 480; every patch whose cosine to the prompt exceeds T is
    predicted as target. Not specified there, so our choice: the target is the union of one
    category's masks in one image (--target instance: one mask; stuff: COCO's stuff classes); the
    prompt is the patch whose center is deepest inside the target (--prompt random: any patch that
    it covers at least half); tokens after the final norm; IoU averaged over all targets; one best T
    of 0 to 0.9 for the whole set ("Opt fine": of 54 from -1 to 0.9999, as the cosines of some
    models are all above 0.9; --center: the mean patch token of the image is subtracted before the
    cosine). Targets that cover less than half of their deepest patch (random:
    of every patch) are left out and counted. In data sets with a class map instead of masks, and
    with --level part or scene, each class except background is a target; void pixels are not
    counted. The column "whole image" is the baseline that predicts every patch.
    """
    require_tokens(model, opt.task)
    side = input_side(model, opt, 480)
    p = model.encoder.patch_size
    skipped = 0
    ious, fine, above, baseline, categories = [], [], [], [], []
    figure = FigureRows(8 if opt.show else 0)
    items = iter(progress_bar(segmentation_targets(opt, side), model))
    while batch := list(itertools.islice(items, min(MAX_BATCH, opt.batch_size))):
        images = torch.stack([resize_to_square(image, side) for image, _, _ in batch])
        tokens = extract_patches(model, normalize_images(model, images))
        if opt.center:
            tokens = tokens - tokens.mean((1, 2), keepdim=True)
        tokens = F.normalize(tokens, dim=3).cpu()
        for image, z, (_, targets, valid) in zip(images, tokens, batch):
            n_valid = count_pixels(resize_labels(valid, (side, side)), p)        # (rows, columns)
            candidates = []                              # for the figure: one target of an image
            for category, mask in targets:
                mask = resize_labels(mask, (side, side))
                n_target = count_pixels(mask, p)
                g = None
                if opt.prompt == "random":
                    g = rng.generator(opt.seed, "prompt", len(ious) + skipped)
                prompt = choose_prompt(mask, n_target, p, g)
                if prompt is None:
                    skipped += 1
                    continue
                similarity = z @ z[prompt]                                       # (rows, columns)
                ious.append(threshold_ious(similarity, n_target, n_valid, THRESHOLDS))
                fine.append(threshold_ious(similarity, n_target, n_valid, FINE_THRESHOLDS))
                above.append(torch.stack([(similarity > t).double().mean()
                                          for t in FINE_THRESHOLDS]))
                baseline.append((n_target.sum() / n_valid.sum()).item())
                categories.append(category)
                candidates.append((category, (image, mask, similarity, prompt)))
            if candidates:
                category, row = next((pair for pair in candidates
                                      if pair[0] not in figure.classes()), candidates[0])
                figure.add({category}, row)
    if not ious:
        raise ValueError(f"{opt.task}: no target is large enough for a prompt ({skipped} are too "
                         f"small); raise --limit or change --data")

    notes = []
    if skipped:
        patch = "their deepest" if opt.prompt == "deepest" else "every"
        notes.append(f"{skipped} targets cover less than half of {patch} patch and are left out")
    target = {"category": "a category", "instance": "an instance", "stuff": "a stuff class"}
    iou, categories = 100 * torch.stack(ious), torch.tensor(categories)          # (targets, 10)
    fine = 100 * torch.stack(fine)                                               # (targets, 54)
    best = THRESHOLDS[int(iou.mean(0).argmax())]
    best_fine = FINE_THRESHOLDS[int(fine.mean(0).argmax())]
    if figure.items:
        save_image_grid([draw_similarity(*row, best_fine, p) for row in figure.rows()],
                        Path(opt.out) / f"similarity-{Path(opt.data).name}-{model.name}.png",
                        titles=("query patch", "target", "similarity, low to high",
                                f"cosine > {best_fine:.4g}"))

    def row(rows):
        """rows (targets or categories, thresholds) at THRESHOLDS and at FINE_THRESHOLDS."""
        means, fine_means = (x.mean(0) for x in rows)
        return {"Opt": means.max().item(), "Opt fine": fine_means.max().item()} | {
            f"T={t}": means[int(10 * t)].item() for t in (0.1, 0.2, 0.3, 0.4)}

    def by_category(x):
        return torch.stack([x[categories == c].mean(0) for c in categories.unique()])

    floor, opt_iou = 100 * sum(baseline) / len(baseline), iou.mean(0).max().item()
    low, high = (FINE_THRESHOLDS[max(0, int((torch.stack(above).mean(0) > part).sum()) - 1)]
                 for part in (0.95, 0.05))
    notes.append(f"{model.name}: 90% of the cosines are between about {low:.4g} and {high:.4g}; "
                 f"Opt fine is at T = {best_fine:.4g}")
    if opt_iou < floor + 1:
        notes.append(f"{model.name}: Opt ({opt_iou:.1f}) is not above the whole image "
                     f"({floor:.1f}), which any model reaches by predicting every patch: see Opt "
                     f"fine" + ", or try --center" * (not opt.center))
    whole = {"whole image": floor}
    return Report(
        {"mean over targets": row((iou, fine)) | whole,
         "mean over categories": row((by_category(iou), by_category(fine)))},
        f"IoU of the patches with cosine > T to the {opt.prompt} patch of {target[opt.target]}"
        f"{f' ({opt.level})' if opt.level else ''}, after the final norm, {side} x {side} px, "
        f"{side // p} x {side // p} patches{', centered' * opt.center}; Opt: best T of 0, 0.1 ... "
        f"0.9 for the whole set, fine: of {len(FINE_THRESHOLDS)} from -1 to 0.9999; MMC: "
        f"480 x 480 px of COCO, targets not stated",
        dict(targets=len(ious), categories=len(categories.unique())),
        [f"{model.name}: Opt is T = {best}, mean over targets; "
         + ", ".join(f"{v:.1f} at {t}" for t, v in zip(THRESHOLDS, iou.mean(0).tolist())),
         *notes])


def segmentation_targets(opt, side):
    """Yields image (3, height, width) uint8; [(category, mask (height, width) bool), ...]; valid
    (height, width) bool, the pixels that are scored."""
    limit = image_limit(opt, "test")
    if opt.target != "stuff" and opt.level in (None, "object") and annotations.has("masks",
                                                                                   opt.data):
        for item in annotations.masks(opt.data, opt.data_root, "test", limit, side):
            pairs = list(zip(item.labels[~item.crowd].tolist(), item.masks[~item.crowd]))
            if opt.target == "category":
                pairs = [(c, torch.stack([m for other, m in pairs if other == c]).any(0))
                         for c in sorted({c for c, _ in pairs})]
            yield item.image, pairs, torch.ones(item.image.shape[1:], dtype=torch.bool)
        return
    if opt.target == "instance" or opt.target == "stuff" and (
            opt.data != "coco" or opt.level not in (None, "scene")):
        raise ValueError(f"{opt.data} has no --target {opt.target}"
                         f"{f' at --level {opt.level}' if opt.level else ''}; choose category")
    level = "scene" if opt.target == "stuff" else opt.level
    names = annotations.segmentation_classes(opt.data, level, opt.data_root)
    excluded = {0} if has_background(names) else set()
    if opt.target == "stuff":
        excluded = set(range(80))                        # COCO's things
    for item in annotations.segmentation(opt.data, opt.data_root, "test", limit, level, side):
        classes = [c for c in item.labels.unique().tolist() if c != 255 and c not in excluded]
        yield item.image, [(c, item.labels == c) for c in classes], item.labels != 255


def resize_to_square(image, side):
    """(3, height, width) uint8 -> (3, side, side) uint8, bicubic; the aspect ratio is not kept."""
    x = F.interpolate(image[None].float(), (side, side), mode="bicubic", antialias=True,
                      align_corners=False)[0]
    return x.round().clamp(0, 255).to(torch.uint8)


def count_pixels(mask, p):
    """(height, width) bool -> number of True pixels in each patch, (rows, columns) float32."""
    return F.avg_pool2d(mask[None].float(), p, divisor_override=1)[0]


def choose_prompt(mask, n_target, p, g=None):
    """(row, column) of the patch whose center is deepest in the mask (height, width); with a
    generator, of a random patch that the mask covers at least half. n_target: `count_pixels` of the
    mask. None: the mask does not cover half of such a patch."""
    if g:
        covered = (n_target >= p * p / 2).nonzero()
        if not len(covered):
            return None
        return tuple(covered[int(torch.randint(len(covered), (), generator=g))])
    return deepest_patch(mask, p)


def threshold_ious(similarity, n_target, n_valid, thresholds=THRESHOLDS):
    """similarity, n_target, n_valid (rows, columns) -> IoU (thresholds,) float64 of the patches
    above each threshold. n_target, n_valid: how many pixels of a patch belong to the target, and
    how many are scored. Patches are predicted as a whole, so these counts are enough."""
    predicted = similarity > torch.tensor(thresholds)[:, None, None]
    hit, total = ((predicted * x.double()).sum((1, 2)) for x in (n_target, n_valid))
    return hit / (n_target.double().sum() + total - hit)


def draw_similarity(image, mask, similarity, prompt, threshold, p):
    """Four images: the image with its prompt in red, the true mask, the similarity as a heat map
    (blue: the lowest of the image, yellow: the highest), and the prediction at the threshold."""
    marked, (top, left) = image.clone(), (int(i) * p for i in prompt)
    square = ..., slice(top, top + p), slice(left, left + p)
    marked[0][square], marked[1:][square] = 255, 40
    low, high = similarity.min(), similarity.max()
    heat = 255 * (similarity - low) / (high - low).clamp(min=1e-6)
    heat = heat.repeat_interleave(p, 0).repeat_interleave(p, 1)
    heat = torch.stack([heat, heat * 0.75, 255 - heat]).to(torch.uint8)
    heat = (0.3 * image + 0.7 * heat).to(torch.uint8)
    predicted = (similarity > threshold).repeat_interleave(p, 0).repeat_interleave(p, 1)
    return [marked, toy.overlay(image, mask), heat, toy.overlay(image, predicted)]


# ---- end-to-end fine-tuning ----------------------------------------------------------------------

# blocks: of 12, counted from 1; scaled linearly for other depths. selfpatch: SelfPatch's released
# configuration of Semantic FPN, which follows XCiT's; its UPerNet has the same lr by our choice.
# mae: as MAE and BEiT fine-tune. Our choice: mae also stands for ASL and Park et al., who do not
# state their settings, and all recipes have the same drop path.
SEGMENTATION_RECIPES = {
    "fpn": {
        "selfpatch": dict(blocks=(3, 6, 9, 12), lr=6e-5, decay=0.01, layer_decay=1.0, iters=40000)},
    "upernet": {
        "mae":       dict(blocks=(4, 6, 8, 12), lr=1e-4, decay=0.05, layer_decay=0.65,
                          iters=160000),
        "selfpatch": dict(blocks=(4, 6, 8, 12), lr=6e-5, decay=0.01, layer_decay=1.0,
                          iters=160000)}}
HEAD_NAMES = {"fpn": "Semantic FPN", "upernet": "UPerNet"}
DROP_PATH = 0.1                                          # of the encoder
DROPOUT = 0.1                                            # of the heads
AUXILIARY_WEIGHT = 0.4                                   # of UPerNet's second loss
POOL_SIZES = 1, 2, 3, 6                                  # sides of UPerNet's pooled maps, in cells
# Our choice on toy: a larger lr, few iterations. In the same time, fewer iterations on larger
# images learn to find the creature, but hardly its class.
TOY_SEGMENTATION = dict(lr=2e-3, iters=600)
OWN_ITERS = 4000                                         # of other folders, our choice


def segmentation(model, opt):
    """Semantic FPN or UPerNet (--head), fine-tuned end to end: the class of every pixel, mIoU.

    SelfPatch, supplement, tables 1 and 3; ASL, tables 4 and 5; Park et al., table G.1. Four blocks
    of the encoder give the maps, before the final norm and without the class token; training crops
    are those of `random_crop`; scores at the original size, of whole images (fpn) or of windows
    (upernet: our choice for all papers). Our choices: on toy, images of the encoder's size, narrow
    heads, 600 iterations with a larger lr; the warmup is scaled with --iters; no decay of biases.
    The processes of torchrun divide crops and test images among them, and synchronize gradients and
    batch norm. ValueError: an unknown head or recipe, several --lr, a number of processes that does
    not divide the crops, the pixels baseline, a data set without a class for every pixel.
    """
    require_tokens(model, opt.task)
    head = opt.head or "fpn"
    if head not in SEGMENTATION_RECIPES:
        raise ValueError(f"segmentation has no head {head}; choose --head "
                         f"{', '.join(SEGMENTATION_RECIPES)}")
    on_toy = is_toy(opt.data)
    rank, world = distributed.rank(), distributed.world_size()
    recipe_name, recipe = choose_recipe(opt, SEGMENTATION_RECIPES[head])
    published_iters = recipe["iters"]
    recipe = recipe | (TOY_SEGMENTATION if on_toy else {})
    if not on_toy and opt.data not in SEGMENTATION_SIZES:
        recipe = recipe | dict(iters=OWN_ITERS)
    peak = single_lr(opt, recipe["lr"])
    iters = opt.iters or recipe["iters"]
    batch_size = crops_per_batch(opt)
    if batch_size % world:
        raise ValueError(f"{world} processes cannot share {batch_size} crops: take a number that "
                         f"divides them, or another --train-batch-size")
    n_crops = batch_size // world                        # of this process
    n_parts = -(-n_crops // opt.batch_size)              # for gradient accumulation
    crops_in_norm = n_crops // n_parts * world
    if crops_in_norm < 2:
        raise ValueError("batch norm needs at least two crops: --batch-size 2 or more, "
                         "--train-batch-size 2 or more")
    names = annotations.segmentation_classes(opt.data, opt.level, opt.data_root)
    sizes = segmentation_sizes(opt, opt.img_size or model.img_size)
    depth = model.encoder.depth
    blocks = [max(1, round(block * depth / 12)) - 1 for block in recipe["blocks"]]
    for split in ("test", "train"):                      # reports missing files before training
        next(segmentation_items(opt, split, sizes), None)

    torch.manual_seed(opt.seed)
    net = Segmenter(model.encoder, blocks, head, len(names), sizes.crop, on_toy).to(model.device)
    if model.device.type == "cuda":                      # faster than BatchNorm2d, same result
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = torch.optim.AdamW(
        layer_decay_groups(net.named_parameters(), depth, recipe["layer_decay"], recipe["decay"]),
        betas=(0.9, 0.999), fused=True)
    progress = Progress(model, opt, net, optimizer)
    parallel = distributed.wrap_ddp(net, model.device)
    warmup = max(1, WARMUP_ITERS * iters // published_iters)
    steps = range(progress.step, iters)
    batches = load_crops(model, opt, sizes, names, steps, rank=rank, world=world)
    losses, print_every = [], min(1000, max(1, iters // 10))
    for step, batch in progress.steps(batches, iters):
        x, y = (tensor.tensor_split(n_parts) for tensor in batch)
        torch.manual_seed(rng.key(opt.seed, "segmentation", step, rank))     # dropout, drop path
        lr = poly_lr(step, iters, peak, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        for part, (crops, labels) in enumerate(zip(x, y), 1):
            parallel.require_backward_grad_sync = part == n_parts            # DDP's no_sync
            with model.autocast():
                logits, *auxiliary = parallel(crops)
            loss = segmentation_loss(logits, labels)
            for logits in auxiliary:                     # only of UPerNet
                loss = loss + AUXILIARY_WEIGHT * segmentation_loss(logits, labels)
            (loss * len(crops) / n_crops).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()

        due = (step + 1) % print_every == 0 or step + 1 == iters
        if due or step % 50 == 0:
            mean = progress.mean_loss(losses, lr, "--precision fp32, a smaller --lr or an earlier "
                                                  "checkpoint")
        if due:
            progress.print(f"step {step + 1:,}/{iters:,}  loss {mean:.3f}  lr {lr:.1e}")
            losses = []

    def predict(x):
        with model.autocast():
            return net(x)[0][:, None]                    # (B, 1 head, C, height, width)

    net.eval()
    longest = sizes.test[0]
    windows = sizes if head == "upernet" else sizes._replace(crop=longest, stride=longest)
    tests = itertools.islice(segmentation_items(opt, "test", sizes), rank, None, world)
    [counts], figure, n_images = score_segmentation(predict, tests, names, model, windows,
                                                    8 if opt.show else 0)
    counts, n_images = (distributed.all_mean(n) * world for n in (
        counts.double(), torch.tensor(n_images, dtype=torch.float64)))
    if rank == 0:
        save_figure(figure, names, model, opt)
    progress.delete()
    return Report(
        {head: percentages(counts)},
        f"{HEAD_NAMES[head]}, fine-tuned end to end, recipe {recipe_name}, {len(names)} classes; "
        f"blocks {' '.join(str(block + 1) for block in blocks)} of {depth} before the final norm; "
        f"crops of {sizes.crop} px, {iters:,} iterations with {batch_size} crops each "
        f"(published: {published_iters:,}), AdamW, lr {peak:g}, weight decay {recipe['decay']}, "
        f"layer decay {recipe['layer_decay']}, drop path {DROP_PATH}; " + (
            "whole images" if head == "fpn" else
            f"windows of {sizes.crop} px, stride {sizes.stride}") +
        "; a ratio of sums at the original size", dict(test=int(n_images)),
        [f"{model.name}: batch norm over {crops_in_norm} crops at a time, not "
         f"{batch_size}"] * (n_parts > 1))


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
    return load_batches(
        functools.partial(training_items, opt, sizes, hold_out), crops_per_batch(opt),
        functools.partial(collate_crops, opt.seed, sizes, model.mean, model.std, table,
                          range(rank, crops_per_batch(opt), world)), steps, opt, model.device)


def training_items(opt, sizes, hold_out):
    return (item for i, item in enumerate(segmentation_items(opt, "train", sizes))
            if i % 10 or not hold_out)


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


def score_segmentation(predict, items, names, model, sizes, n_figures=0):
    """-> metrics.confusion of every head, summed over all items; FigureRows (image, truth,
    prediction) of at most `n_figures` items; number of items. predict: see `segment_image`."""
    counts, figure, n_images = None, FigureRows(n_figures), 0
    for item in progress_bar(items, model):
        n_images += 1
        predictions = segment_image(predict, item.image, model, sizes)
        new = [metrics.confusion(x.cpu(), item.labels, len(names)) for x in predictions]
        counts = new if counts is None else [a + b for a, b in zip(counts, new)]
        known = item.labels != 255
        classes = {*item.labels[known].unique().tolist()}
        if figure.wants(classes):
            figure.add(classes, [item.image, item.labels, predictions[0].cpu(), known])
    if not n_images:
        raise ValueError("no test images: raise --limit or change --data")
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
    """Sum of metrics.confusion -> a row of the table."""
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


# ---- heads of the fine-tuned segmentation --------------------------------------------------------


class Segmenter(nn.Module):
    """Encoder and head: images (B, 3, height, width) of any size -> [logits (B, C, height, width)];
    in training, UPerNet adds those of its auxiliary head.

    blocks: indices of four blocks. Sides that are not a multiple of the patch side are padded with
    0, and the logits of the padding are cut off.
    """

    def __init__(self, encoder, blocks, head, classes, crop, narrow=False):
        super().__init__()
        p, widths = encoder.patch_size, [encoder.widths[i] for i in blocks]
        self.encoder = copy_encoder(encoder, DROP_PATH, img_size=-(-crop // p) * p)
        self.blocks, self.strides = blocks, [encoder.strides[i] for i in blocks]
        plain = len(set(encoder.strides)) == 1           # a ViT; a Swin's stages are a pyramid
        if head == "fpn":
            self.head = SemanticFPN(widths, classes, **dict(neck=64, channels=32) if narrow else {})
        else:
            self.head = UPerNet(widths, classes, p if plain else None,
                                **dict(channels=64, aux=32) if narrow else {})

    def forward(self, x):
        p, (height, width) = self.encoder.patch_size, x.shape[2:]
        x = F.pad(x, (0, -width % p, 0, -height % p))
        outputs, _ = self.encoder.layers(x, self.blocks, norm=False)
        maps = [self.encoder.split(z)[1].transpose(1, 2).unflatten(2, (x.shape[2] // stride, -1))
                for z, stride in zip(outputs, self.strides)]                 # (B, D, rows, columns)
        return [resize_like(logits.float(), x)[..., :height, :width] for logits in self.head(maps)]


class SemanticFPN(nn.Module):
    """Kirillov et al., 2019: four maps (B, D, rows, columns) -> [logits (B, C, rows, columns)].

        block 3 -1x1- + -3x3- conv ------------------------------- + - dropout - 1x1
        block 6 -1x1- + -3x3- conv x2 ---------------------------- |
        block 9 -1x1- + -3x3- conv x2 conv x2 -------------------- |
        block 12 1x1- + -3x3- conv x2 conv x2 conv x2 ------------ |

    + on the left: from the bottom up, the map below is added; x2: upsampled. The head was designed
    for maps of strides 4, 8, 16, 32, as a Swin has. All maps of a plain ViT have the stride of the
    patch; they are nevertheless upsampled, then resized back (SelfPatch's configuration).
    """

    def __init__(self, widths, classes, neck=256, channels=128):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, neck, 1) for width in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(neck, neck, 3, padding=1) for _ in range(4))
        for layer in (*self.laterals, *self.smooth):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.levels = nn.ModuleList([conv_norm_relu(neck, channels, 3)])
        for count in (1, 2, 3):
            layers = [(conv_norm_relu(channels if i else neck, channels, 3),
                       nn.Upsample(scale_factor=2, mode="bilinear")) for i in range(count)]
            self.levels.append(nn.Sequential(*sum(layers, ())))
        self.classify = make_classifier(channels, classes)

    def forward(self, maps):
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        for i in (2, 1, 0):
            maps[i] = maps[i] + resize_like(maps[i + 1], maps[i])
        maps = [level(smooth(x)) for level, smooth, x in zip(self.levels, self.smooth, maps)]
        return [self.classify(sum(resize_like(x, maps[0]) for x in maps))]


class UPerNet(nn.Module):
    """Xiao et al., 2018: four maps (B, D, rows, columns) -> [logits at stride 4]; in training also
    those of an auxiliary head (a fully convolutional one) on the map at stride 16.

        stride 4  -1x1- + -3x3-+
        stride 8  -1x1- + -3x3-+
        stride 16 -1x1- + -3x3-+
        stride 32 pooled, 3x3 -+- 3x3 - dropout - 1x1

    + on the left: the coarser map below is upsampled and added. `make_pyramid` makes the strides
    of a plain ViT; patch_size None: the maps have them, as those of a Swin.
    """

    def __init__(self, widths, classes, patch_size=16, channels=512, aux=256):
        super().__init__()
        self.pyramid = make_pyramid(widths[0], patch_size) if patch_size else (
            nn.ModuleList(nn.Identity() for _ in widths))
        self.pools = nn.ModuleList(conv_norm_relu(widths[3], channels, 1) for _ in POOL_SIZES)
        self.context = conv_norm_relu(widths[3] + len(POOL_SIZES) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_norm_relu(width, channels, 1) for width in widths[:3])
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in range(3))
        self.fuse = conv_norm_relu(4 * channels, channels, 3)
        self.classify = make_classifier(channels, classes)
        self.auxiliary = nn.Sequential(conv_norm_relu(widths[2], aux, 3),
                                       make_classifier(aux, classes))

    def forward(self, maps):
        maps = [level(x) for level, x in zip(self.pyramid, maps)]
        top = maps[3]
        pooled = [resize_like(pool(F.adaptive_avg_pool2d(top, n)), top)
                  for n, pool in zip(POOL_SIZES, self.pools)]
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        levels.append(self.context(torch.cat([top, *pooled], 1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize_like(levels[i + 1], levels[i])
        levels = [*(smooth(x) for smooth, x in zip(self.smooth, levels)), levels[3]]
        logits = self.classify(self.fuse(torch.cat([resize_like(x, levels[0]) for x in levels], 1)))
        return [logits, self.auxiliary(maps[2])] if self.training else [logits]


def make_pyramid(width, patch_size=16):
    """Four modules that make maps of strides 4, 8, 16, 32 from maps of a plain ViT (B, D, rows,
    columns), as in BEiT's code for patches of 16 and 8 px. Our choice: other patches as 16 px."""
    def upsample():
        return nn.ConvTranspose2d(width, width, 2, 2)

    if patch_size == 8:
        return nn.ModuleList([upsample(), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)])
    return nn.ModuleList([nn.Sequential(upsample(), BatchNorm2d(width), nn.GELU(), upsample()),
                          upsample(), nn.Identity(), nn.MaxPool2d(2)])


class BatchNorm2d(distributed.BatchNorm):
    """Batch norm of maps (B, D, rows, columns) over the crops of all processes."""

    def forward(self, x):
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


def conv_norm_relu(width, out, size):
    """Convolution that keeps the size of the map, batch norm, ReLU."""
    layer = nn.Conv2d(width, out, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, BatchNorm2d(out), nn.ReLU())


def make_classifier(width, classes):
    """Dropout of whole channels, then a linear layer at every pixel."""
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(DROPOUT), layer)


def resize_like(x, other):
    """Maps (B, D, rows, columns) resized to the size of `other`, bilinear."""
    return F.interpolate(x, other.shape[2:], mode="bilinear", align_corners=False)
