"""Segmentation with a frozen encoder: how well do patch tokens identify the class of a pixel, or
the object that it belongs to?

    python evaluate.py --task linear_segmentation --level part --show
    python evaluate.py --task zero_shot_segmentation --data toy-scenes --baseline untrained

    image -> frozen ViT -> four blocks -> linear layer          -> classes       linear_segmentation
                        -> last block  -> cosine to one patch   -> mask       zero_shot_segmentation

Each probe is a function task(model, opt) -> Report.
"""
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lib import metrics, rng, toy
from probes import annotations
from probes.common import (
    Report,
    choose_recipe,
    describe_norm,
    input_side,
    is_toy,
    progress_bar,
    require_tokens,
    require_vit,
)
from probes.figures import FigureRows, save_image_grid
from probes.label_crops import (
    MAX_BATCH,
    MAX_HELD_OUT,
    SEGMENTATION_SIZES,
    WARMUP_ITERS,
    crops_per_batch,
    has_background,
    load_crops,
    percentages,
    poly_lr,
    save_figure,
    score_segmentation,
    segmentation_items,
    segmentation_loss,
    segmentation_sizes,
)
from probes.patches import (
    deepest_patch,
    extract_patches,
    normalize_images,
    resize_labels,
    upsample_maps,
)
from probes.training import Progress, image_limit, linear_adamw

# Shapes: B images, D width, C classes, p patch side; (height, width) in pixels, (rows, columns) of
# patches.


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
        needed = 1 + (hold_out and split == "train")
        if len(list(itertools.islice(segmentation_items(opt, split, sizes), needed))) < needed:
            raise ValueError(f"{opt.task}: no {split} images" + (
                " besides one held out to choose the learning rate: give one --lr" if needed > 1
                else f" in {opt.data}") + ", or raise --limit" * bool(opt.limit))

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
        counts, _, n_held = score_segmentation(predict, held, names, model, sizes, n_heads=len(lrs))
        scores = [metrics.segmentation_scores(head_counts)["miou"] for head_counts in counts]
        best = scores.index(max(scores))
        notes.append(f"{model.name}: lr {lrs[best]:g}; mIoU on {n_held} held-out images: " +
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
    cosine). Targets that cover less than half of their deepest patch (random: of every patch) are
    left out and counted. In data sets with a class map instead of masks, and with --level part or
    scene, each class except background is a target; void pixels and crowds are not counted. The
    columns "whole image" and "query patch" are the baselines that predict every patch, and the
    prompt only, which is always right.
    """
    require_tokens(model, opt.task)
    side = input_side(model, opt, 480)
    p = model.encoder.patch_size
    skipped = 0
    ious, fine, above, trivial, categories = [], [], [], [], []
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
                mask = resize_labels(mask & valid, (side, side))
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
                total, hit, patch = n_target.sum(), n_target[prompt], n_valid[prompt]
                trivial.append(torch.stack([total / n_valid.sum(), hit / (total + patch - hit)]))
                categories.append(category)
                candidates.append((category, (image, mask, similarity, prompt)))
            if candidates:
                category, row = next((pair for pair in candidates
                                      if pair[0] not in figure.classes()), candidates[0])
                figure.add({category}, row)
    if not ious:
        raise ValueError(f"{opt.task}: no target " + (
            f"is large enough for a prompt ({skipped} are too small)" if skipped else
            "in the test images") + "; raise --limit or change --data")

    notes = []
    if skipped:
        patch = "their deepest" if opt.prompt == "deepest" else "every"
        notes.append(f"{model.name}: {skipped} targets cover less than half of {patch} patch and "
                     f"are left out")
    target = {"category": "a category", "instance": "an instance", "stuff": "a stuff class"}
    iou, categories = 100 * torch.stack(ious), torch.tensor(categories)          # (targets, 10)
    fine = 100 * torch.stack(fine)                                               # (targets, 54)
    best = THRESHOLDS[int(iou.mean(0).argmax())]
    best_fine = FINE_THRESHOLDS[int(fine.mean(0).argmax())]
    if figure.items:
        name = ["similarity", Path(opt.data).name, *[opt.level] * bool(opt.level),
                *[opt.target] * (opt.target != "category"), *["random"] * (opt.prompt == "random"),
                *["centered"] * opt.center, model.name]
        save_image_grid([draw_similarity(*row, best_fine, p) for row in figure.rows()],
                        Path(opt.out) / f"{'-'.join(name)}.png",
                        titles=("query patch", "target", "yellow: similar",
                                f"cosine > {best_fine:.4g}"))

    def row(rows):
        """rows (targets or categories, thresholds) at THRESHOLDS and at FINE_THRESHOLDS."""
        means, fine_means = (x.mean(0) for x in rows)
        return {"Opt": means.max().item(), "Opt fine": fine_means.max().item()} | {
            f"T={t}": means[int(10 * t)].item() for t in (0.1, 0.2, 0.3, 0.4)}

    def by_category(x):
        return torch.stack([x[categories == c].mean(0) for c in categories.unique()])

    whole, alone = (100 * torch.stack(trivial).double().mean(0)).tolist()
    opt_iou = iou.mean(0).max().item()
    low, high = (FINE_THRESHOLDS[max(0, int((torch.stack(above).mean(0) > part).sum()) - 1)]
                 for part in (0.95, 0.05))
    notes.append(f"{model.name}: 90% of the cosines are between about {low:.4g} and {high:.4g}; "
                 f"Opt fine is at T = {best_fine:.4g}")
    if opt_iou < max(whole, alone) + 1:
        notes.append(f"{model.name}: Opt ({opt_iou:.1f}) is not a point above the whole image "
                     f"({whole:.1f}) and the query patch ({alone:.1f}), which any model reaches by "
                     f"predicting every patch, or that one: see Opt fine"
                     + ", or try --center" * (not opt.center))
    return Report(
        {"mean over targets": row((iou, fine)) | {"whole image": whole, "query patch": alone},
         "mean over categories": row((by_category(iou), by_category(fine)))},
        f"IoU of the patches with cosine > T to the {opt.prompt} patch of {target[opt.target]}"
        f"{f' ({opt.level})' if opt.level else ''}{describe_norm(model)}, {side} x {side} px, "
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
    if opt.target != "stuff" and opt.level in (None, "object") and annotations.has_masks(opt.data):
        for item in annotations.masks(opt.data, opt.data_root, "test", limit, side):
            pairs = list(zip(item.labels[~item.crowd].tolist(), item.masks[~item.crowd]))
            if opt.target == "category":
                pairs = [(c, torch.stack([m for other, m in pairs if other == c]).any(0))
                         for c in sorted({c for c, _ in pairs})]
            yield item.image, pairs, ~item.masks[item.crowd].any(0)      # crowds are not counted
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
