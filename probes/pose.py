"""Pose estimation: where are the joints? One linear layer on frozen patch tokens gives heat maps.

    python evaluate.py --task pose --data coco --data-root /data --show

    image -> crop of the box -> frozen ViT -> patch tokens -> linear layer, x p/4 -> a heat map of
             256 x 192                                                               each joint
"""
import functools
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from lib import metrics, rng, toy
from probes import annotations
from probes.common import (
    Report,
    describe_output,
    input_side,
    is_toy,
    progress_bar,
    require_tokens,
)
from probes.figures import FigureRows, save_image_grid
from probes.patches import extract_patches, normalize_images, upsample_maps
from probes.training import (
    Progress,
    draw_uniform,
    flip_table,
    image_limit,
    linear_adamw,
    load_batches,
    single_lr,
)

# Shapes: B crops, D width; shape (height, width) of a crop in pixels, (rows, columns) of a heat map
# in cells of STRIDE pixels. Points are x, y in pixels, and v: 0 not labeled, 1 occluded, 2 visible.
# A matrix (2, 3) maps pixels (x, y, 1) of a crop to points of the image.

# Our choice, because Zhu et al. (2023) print four numbers and no settings: 20 epochs of COCO's
# 149,813 persons are 5,850 iterations; the learning rate is divided by 10 after 15 and after 18 of
# 20 epochs.
POSE_RECIPES = {
    "coco": dict(shape=(256, 192), batch=512, iters=5850, warmup=500, lr=5e-4, decay=0.01),
    "toy":  dict(shape=None, batch=16, iters=200, warmup=10, lr=1e-2, decay=0.01),
    "own":  dict(shape=(256, 256), batch=64, iters=1000, warmup=50, lr=2e-3, decay=0.01)}
STRIDE = 4               # pixels of the crop per cell of a heat map
MIN_MAXIMUM = 0.2        # the score of a prediction is the mean of the maxima above it
DUPLICATE_OKS = 0.9      # of two predictions with a larger OKS the worse one is removed
SIGMA = 0.05             # of all but COCO's: an error of 10% of the size has an OKS of 0.6


def pose(model, opt):
    """Linear heat maps of the joints in the box of a person, or of a creature of toy: OKS, AP.

    Zhu et al. (2023), table 10, who state only "linear". All else is our choice, as usual in
    top-down pipelines: the true box, widened to 3:4 and by a quarter, becomes 256 x 192 px; one
    linear layer on the patch tokens of the last block, after the final norm, gives a map for each
    joint, upsampled to cells of 4 px; squared error to a Gaussian (sigma 2 cells, at another size
    than 256 px in proportion to it: 1 cell at 128 px) at joints with v > 0; flips, scales of 0.75
    to 1.25 and rotations by up to 30 degrees in training; averaged over the flipped image at test
    time. Score on COCO: OKS AP by pycocotools. On toy (boxes become squares of twice the encoder's
    size) and on COCO: mean OKS (on toy with the same sigma for all parts) and PCK, the fraction of
    joints within a tenth of the longer side of the box. ValueError: a data set without keypoints
    and areas, the pixels baseline, COCO without pycocotools.
    """
    require_tokens(model, opt.task)
    on_toy = is_toy(opt.data)
    require_areas(opt)
    names = annotations.part_names(opt.data)
    recipe = POSE_RECIPES["toy" if on_toy else opt.data if opt.data == "coco" else "own"]
    side = input_side(model, opt, 256)
    shape = scale_shape(recipe["shape"], opt.img_size) if recipe["shape"] else (side, side)
    batch_size, lr = opt.train_batch_size or recipe["batch"], single_lr(opt, recipe["lr"])
    sigmas = metrics.SIGMAS if names == annotations.COCO_PARTS else [SIGMA] * len(names)
    mirrored = flip_table(names)[:len(names)].long()
    iters = opt.iters or recipe["iters"]
    if not on_toy:
        metrics.coco_ap([])                              # reports a missing pycocotools
    for split in ("test", "train"):                      # reports missing files before training
        if next(keypoint_items(opt, split, side), None) is None:
            raise ValueError(f"pose: no {split} images of {opt.data} have keypoints")

    sigma = 2 * shape[0] / 256                           # cells
    head = make_head(len(names), model, opt.seed)
    optimizer = linear_adamw([head], [lr], recipe["decay"])
    progress = Progress(model, opt, head, optimizer)
    batches = load_batches(
        functools.partial(training_boxes, opt, side), batch_size,
        functools.partial(collate_views, opt.seed, shape, mirrored, sigma),
        range(progress.step, iters), opt, model.device)
    train_head(head, optimizer, progress.steps(batches, iters), iters, recipe, model,
               opt.batch_size)

    pairs, figure = [], FigureRows(8 if opt.show else 0)
    within, similarities = [], []
    n_objects = 0
    for item in progress_bar(keypoint_items(opt, "test", side), model):
        objects = labeled_objects(item)
        if not objects:
            continue
        points, scores = predict_points(item, objects, head, shape, mirrored, model, opt.batch_size)
        truth = item.points[objects]
        boxes, areas = item.boxes[objects], item.areas[objects]
        similarities.append(metrics.oks(points, truth, boxes, areas, sigmas))
        longer = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        distance = (points - truth[..., :2]).norm(dim=2) / longer[:, None]       # (objects, joints)
        within.append((distance <= 0.1)[truth[..., 2] > 0])
        n_objects += len(objects)
        joints = {*(truth[0, :, 2] > 0).nonzero()[:, 0].tolist()}
        if figure.wants(joints):
            figure.add(joints, draw_pose(item.image, boxes[0], truth[0], points[0], shape))
        if not on_toy:                                   # kept without the image
            keep = remove_duplicates(points, scores, boxes, areas, sigmas)
            pairs.append((SimpleNamespace(boxes=item.boxes, areas=item.areas, crowd=item.crowd,
                                          points=item.points),
                          SimpleNamespace(points=mark_visible(points[keep]), scores=scores[keep])))
    if not n_objects:
        raise ValueError("pose: no labeled object in the test images; raise --limit or change "
                         "--data")
    if figure.items:
        save_image_grid(figure.rows(),
                        Path(opt.out) / f"pose-{Path(opt.data).name}-{model.name}.png", 192,
                        ("annotation", "prediction"),
                        legend=[(i + 1, names[i]) for i in sorted(figure.classes())])
    row = {"OKS": 100 * torch.cat(similarities).mean().item(),
           "PCK@0.1": 100 * torch.cat(within).double().mean().item()}
    if pairs:
        ap = metrics.coco_ap(pairs, "keypoints", sigmas)
        row = {name: 100 * ap[name] for name in ("AP", "AP50", "AR", "AR50")} | row
    progress.delete()
    return Report(
        {"patches": row},
        f"linear heat maps of {len(names)} joints in the true box, {shape[0]} x {shape[1]} px, "
        f"maps of {shape[0] // STRIDE} x {shape[1] // STRIDE}, Gaussians of sigma {sigma:g} cells; "
        f"{describe_output(model)}{iters:,} iterations with {batch_size} boxes "
        f"each, AdamW, lr {lr:g}; averaged over the flipped image; OKS"
        + (" with COCO's sigmas" if sigmas is metrics.SIGMAS else
           f" with sigma {SIGMA} for all parts"),
        dict(objects=n_objects))


def require_areas(opt):
    if opt.data == "cub" or not annotations.has("keypoints", opt.data):
        raise ValueError(f"pose needs keypoints and object areas, and {opt.data} does not have "
                         "both; choose --data coco, toy, toy-scenes or a folder "
                         "(docs/own-data.md)")


def scale_shape(shape, height):
    """(height, width) of a crop scaled to a height (None: as it is), in whole cells of a map."""
    scale = (height or shape[0]) / shape[0]
    return tuple(max(1, round(scale * side / STRIDE)) * STRIDE for side in shape)


def keypoint_items(opt, split, side):
    """Items of a split, as annotations.keypoints gives them."""
    return annotations.keypoints(opt.data, opt.data_root, split, image_limit(opt, split), side)


def labeled_objects(item):
    """Indices of the objects of an item that have a labeled joint and are not a crowd."""
    return ((item.points[..., 2] > 0).any(1) & ~item.crowd).nonzero()[:, 0].tolist()


# ---- training ------------------------------------------------------------------------------------


def training_boxes(opt, side):
    """Yields an item for every box of the training images."""
    for item in keypoint_items(opt, "train", side):
        for k in labeled_objects(item):
            yield SimpleNamespace(image=item.image, box=item.boxes[k], points=item.points[k])


def collate_views(seed, shape, mirrored, sigma, step, items):
    """-> crops (B, 3, *shape) from 0 to 255, target maps (B, joints, rows, columns), their weights
    (B, joints)."""
    crops, points = zip(*(random_view(item, shape, mirrored, rng.generator(seed, "pose", step, i))
                          for i, item in enumerate(items)))
    maps, weights = zip(*(gaussian_maps(joints, shape, sigma) for joints in points))
    return torch.stack(crops), torch.stack(maps), torch.stack(weights)


def random_view(item, shape, mirrored, g):
    """A random view of a box: crop (3, *shape) from 0 to 255, points (joints, 3) in it.

    mirrored: the index of each joint in a mirrored image.
    """
    matrix = crop_matrix(item.box, shape, draw_uniform(g, 0.75, 1.25), draw_uniform(g, -30, 30))
    crop = warp_crop(item.image, matrix, shape)
    points = item.points.clone()
    points[:, :2] = transform_points(points[:, :2], invert_matrix(matrix))
    if draw_uniform(g) < 0.5:
        crop, points = crop.flip(-1), points[mirrored]   # left joints become right ones
        points[:, 0] = shape[1] - 1 - points[:, 0]
    return crop, points


def gaussian_maps(points, shape, sigma):
    """points (joints, 3) in the crop -> Gaussians (joints, rows, columns) with maximum 1, cut at 3
    sigma, centered on the nearest cell (cell i is at pixel 4 i); weights (joints,): 0 where v = 0
    or the whole Gaussian is outside the crop."""
    cell = (points[:, :2] / STRIDE + 0.5).floor()
    size = torch.tensor([shape[1] // STRIDE, shape[0] // STRIDE])
    reach = int(3 * sigma)
    offsets = [torch.arange(n) - c[:, None] for n, c in zip(size.tolist(), cell.T)]     # x, y
    x, y = ((-o**2 / (2 * sigma**2)).exp() * (o.abs() <= reach) for o in offsets)
    inside = ((cell + reach >= 0) & (cell - reach < size)).all(1)
    return y[:, :, None] * x[:, None], (inside & (points[:, 2] > 0)).float()


def make_head(n_joints, model, seed):
    """Linear layer (..., D) -> (..., joints)."""
    head = nn.Linear(model.encoder.embed_dim, n_joints)
    with torch.no_grad():
        g = rng.generator(seed, "heads")
        head.weight.copy_(0.001 * torch.randn(head.weight.shape, generator=g))
        head.bias.zero_()
    return head.to(model.device)


@torch.enable_grad()
def train_head(head, optimizer, steps, iters, recipe, model, batch_size):
    """Trains the linear layer. steps: (step, batch of `collate_views`)."""
    warmup = min(recipe["warmup"], max(1, iters // 10))
    for step, (crops, target, weight) in steps:
        drop = 0.1 ** ((step >= 0.75 * iters) + (step >= 0.9 * iters))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (step + 1) / warmup) * drop
        maps = predict_maps(head, normalize_images(model, crops), model, batch_size)
        error = (maps - target).square().mean((2, 3))                        # (B, joints)
        (error * weight).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- prediction ----------------------------------------------------------------------------------


def predict_maps(head, x, model, batch_size):
    """x (B, 3, height, width) normalized -> heat maps (B, joints, rows, columns).

    The linear layer is applied before the upsampling, with which it commutes, because its output
    has fewer maps than D. Maps are upsampled by p / STRIDE, then cut: with patches of 14 px the
    padded grid is wider than the crop, and resizing it to the crop would shift joints.
    """
    maps = torch.cat([head(extract_patches(model, part)) for part in x.split(batch_size)])
    maps = upsample_maps(maps.permute(0, 3, 1, 2), model.encoder.patch_size / STRIDE)
    return maps[..., :x.shape[2] // STRIDE, :x.shape[3] // STRIDE]


@torch.no_grad()
def predict_points(item, objects, head, shape, mirrored, model, batch_size):
    """-> points (objects, joints, 2) in the image; scores (objects,): the mean of the maxima of the
    maps that exceed MIN_MAXIMUM."""
    matrices = [crop_matrix(item.boxes[k], shape) for k in objects]
    x = torch.stack([normalize_images(model, warp_crop(item.image, m, shape)) for m in matrices])
    maps = predict_maps(head, x, model, batch_size)
    flipped = predict_maps(head, x.flip(-1), model, batch_size)
    maps = (maps + unflip_maps(flipped, mirrored)) / 2
    points, scores = [], []
    for object_maps, matrix in zip(maps.cpu(), matrices):
        cells, maxima = decode_maps(object_maps)
        points.append(transform_points(STRIDE * cells, matrix))
        counted = maxima[maxima > MIN_MAXIMUM]
        scores.append(counted.mean() if len(counted) else maxima.new_zeros(()))
    return torch.stack(points), torch.stack(scores)


def unflip_maps(maps, mirrored):
    """Maps (B, joints, rows, columns) of mirrored crops -> maps of the crops, shifted by one cell
    to the right: cell i is at pixel 4 i, whose mirror image is 3/4 of a cell away from a cell."""
    maps = maps.flip(-1)[:, mirrored]
    return torch.cat([maps[..., :1], maps[..., :-1]], 3)


def decode_maps(maps):
    """(joints, rows, columns) -> x, y (joints, 2) in cells: the maximum, moved by a quarter of a
    cell toward the higher neighbor on each axis; and the maxima (joints,)."""
    n_joints, rows, columns = maps.shape
    maxima, place = maps.flatten(1).max(1)
    x, y = place % columns, place // columns
    joint = torch.arange(n_joints, device=maps.device)
    inner = (x > 0) & (x < columns - 1) & (y > 0) & (y < rows - 1)
    left, right = (maps[joint, y, (x + d).clamp(0, columns - 1)] for d in (-1, 1))
    above, below = (maps[joint, (y + d).clamp(0, rows - 1), x] for d in (-1, 1))
    step = torch.stack([right - left, below - above], 1).sign() * 0.25 * inner[:, None]
    return torch.stack([x, y], 1) + step, maxima


def remove_duplicates(points, scores, boxes, areas, sigmas):
    """Indices of the predictions to keep, best first: each has an OKS of at most DUPLICATE_OKS with
    all better ones that are kept."""
    kept = []
    for k in scores.argsort(descending=True, stable=True).tolist():
        similarities = [metrics.oks(points[k], mark_visible(points[other]), boxes[other],
                                    areas[other], sigmas) for other in kept]
        if not any(similarity > DUPLICATE_OKS for similarity in similarities):
            kept.append(k)
    return kept


def mark_visible(points):
    """(..., 2) -> (..., 3): v = 2."""
    return F.pad(points, (0, 1), value=2.0)


# ---- crops ---------------------------------------------------------------------------------------


def crop_matrix(box, shape, scale=1.0, degrees=0.0):
    """Matrix (2, 3) float64 from the crop to the image.

    box: x0 y0 x1 y1, widened to the aspect ratio of shape, then by 1.25 and by scale; the crop is
    rotated about its center.
    """
    x0, y0, x1, y1 = box.tolist()
    height, width = shape
    step = 1.25 * scale * max((x1 - x0) / width, (y1 - y0) / height, 1e-3)   # image px / crop px
    turn = math.radians(degrees)
    rotation = step * torch.tensor([[math.cos(turn), -math.sin(turn)],
                                    [math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    box_center = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2], dtype=torch.float64)
    crop_center = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    return torch.cat([rotation, (box_center - rotation @ crop_center)[:, None]], 1)


def transform_points(points, matrix):
    """(..., 2) points, mapped by a (2, 3) matrix."""
    return (points.double() @ matrix[:, :2].T + matrix[:, 2]).float()


def invert_matrix(matrix):
    inverse = torch.linalg.inv(matrix[:, :2])
    return torch.cat([inverse, -inverse @ matrix[:, 2:]], 1)


def warp_crop(image, matrix, shape):
    """(3, height, width) uint8 -> the crop (3, *shape) float32 from 0 to 255, bilinear; black
    outside the image."""
    y, x = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    source = transform_points(torch.stack([x, y], -1), matrix)
    last = torch.tensor([image.shape[2] - 1, image.shape[1] - 1])
    return F.grid_sample(image[None].float(), 2 * source[None] / last - 1, align_corners=True)[0]


def draw_pose(image, box, truth, points, shape):
    """Two images of the box: the true and the predicted joints, in a color for each joint."""
    matrix, rows = crop_matrix(box, shape), []
    crop = warp_crop(image, matrix, shape).to(torch.uint8)
    labeled = (truth[:, 2] > 0) * 2.0
    for joints in (truth[:, :2], points):
        joints = transform_points(joints, invert_matrix(matrix))
        x, y = (v.clamp(0, n - 1) for v, n in zip(joints.T, shape[::-1]))
        squares = torch.zeros(shape, dtype=torch.uint8)
        for i, (row, column) in enumerate(zip(y.long(), x.long())):
            squares[(row - 2).clamp(0):row + 3, (column - 2).clamp(0):column + 3] = (
                i + 1 if labeled[i] else 0)
        rows.append(toy.overlay(crop, squares, torch.stack([x, y, labeled], 1)))
    return rows
