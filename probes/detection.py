"""Detection: are the features a good start for finding objects, with boxes and masks?

    python evaluate.py --task detection --recipe vitdet --data coco --data-root /data
    python evaluate.py --task detection --data toy-scenes --show               # minutes, offline
    torchrun --nproc_per_node=8 evaluate.py --task detection --recipe 1x --data coco

Mask R-CNN (He et al., 2017) with the ViT as its backbone, all weights trained:

    picture -> ViT -> maps of 4 strides, and a 5th -+- RPN -> boxes that may hold something
                      p/4  p/2  p  2p  4p           +- of each: class and a better box
                                                    +- of each: mask of 28 x 28
                                                       box and mask AP of COCO (pycocotools)

torchvision has the detector: anchors, RPN, RoI heads, the FPN, their losses, resizing in the test.
What is here is what makes a ViT fit: its pyramids, attention in windows, inputs, recipes, the loop.

Where torchvision differs from what the papers used: RoIAlign is not aligned to half pixels (its
MultiScaleRoIAlign has no such flag), the box loss is a smooth L1 with beta 1/9, the last layers
start as PyTorch's. So the second digit of a comparison with the papers' numbers means nothing.
"""
import functools
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import (
    Conv2dNormActivation,
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    masks_to_boxes,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

import data
import vit
from lib import distributed, metrics, rng
from probes import annotations, dense, finetune
from probes.common import Progress, settings_of

# B images, N patches, h, w grid of patches, p pixels a side of a patch, D width, K objects

# 1x: SelfPatch. 100ep: Li et al. (2021), which the numbers of ASL follow. vitdet: Li et al. (2022).
# blocks: of 12, counted from 1, in proportion for other depths; of vitdet's one map all levels are
# made. steps: shares of the run after which lr falls to a tenth; none: cosine to 0. side: of the
# canvas, 1x: short side in the test. convs: of the RPN; of the box head, in front of its FCs.
RECIPES = {
    "1x":     dict(blocks=(4, 6, 8, 12), windows=False, norm="BN", fpn=None, convs=(1, 0),
                   heads=None, input="multi-scale", side=800, batch=8, epochs=12, lr=5e-5,
                   decay=0.05, layer_decay=1.0, drop_path=0.05, warmup=1000,
                   steps=(8 / 12, 11 / 12)),
    "100ep":  dict(blocks=(3, 6, 9, 12), windows=True, norm="GN", fpn="BN", convs=(2, 4),
                   heads="BN", input="jitter", side=1024, batch=64, epochs=100, lr=8e-5,
                   decay=0.1, layer_decay=1.0, drop_path=0.1, warmup=461, steps=()),
    "vitdet": dict(blocks=(12,), windows=True, norm="LN", fpn="LN", convs=(2, 4),
                   heads="LN", input="jitter", side=1024, batch=64, epochs=100, lr=1e-4,
                   decay=0.1, layer_decay=0.7, drop_path=0.1, warmup=250, steps=(8 / 9, 26 / 27))}
# channels: of the pyramid and the heads; hidden: of the box head's FCs; per image, proposals: boxes
# from the RPN, samples: those that are trained on. scales: of large-scale jitter.
FULL = dict(channels=256, hidden=1024, proposals=1000, samples=512, scales=(0.1, 2.0))
# Our choice: what two CPU cores can train in minutes.
TOY = dict(channels=64, hidden=256, proposals=100, samples=32, scales=(0.7, 1.4), batch=8, lr=1e-3,
           iters=300)
TOY_IMAGES = dict(train=600, test=100)                   # unless --limit says other
NORMS = {None: None, "BN": nn.BatchNorm2d, "GN": functools.partial(nn.GroupNorm, 32),
         "LN": functools.partial(LayerNorm2d, eps=1e-6)}


def detection(model, args):
    """Mask R-CNN, all weights trained: boxes and masks of objects, average precision.

    SelfPatch, supplement, table 3 (--recipe 1x), ASL, tables 1, 3, 5 (100ep: ASL cites it, and
    MAE's row is its published number) and ViTDet (vitdet), for comparison. Our choices. In all: no
    decay of biases; pictures padded to a multiple of 4 patches, so that anchors lie on the cells of
    all levels; in training, images and views in which no object is left are skipped; BN
    synchronised on GPUs only. 100ep, vitdet: the class token goes; windows as large as the grid of
    the pre-training (14 x 14 of ViT-B/16), at most half the input; vitdet, too, has a table of
    relative position biases in each block, where it would have decomposed ones; those of the global
    blocks have the window's size, too, and are stretched to the whole grid. On toy: the encoder's
    size, a small detector, few iterations. ValueError: pixels as a baseline, a set without masks,
    no pycocotools, a batch that the processes cannot share.
    """
    dense.needs_tokens(model, args)
    annotations.view(args.data, "train", annotations.MASKS, "masks")
    metrics.coco_ap([])                                  # says now if pycocotools is missing
    p = model.encoder.patch_size
    if p < 4 or p & (p - 1):
        raise ValueError(f"detection needs patches of 4, 8, 16 or 32 px, {model.name} has {p}")
    toy = dense.is_toy(args)
    recipe = FULL | settings_of(args, RECIPES) | (TOY if toy else {})
    side = (args.size or (model.size if toy else recipe["side"])) // p * p
    names, rank, world = annotations.box_classes(args.data), distributed.rank(), distributed.world_size()
    if recipe["batch"] % world:                          # or the run would be longer or shorter
        raise ValueError(f"{world} processes cannot share {recipe['batch']} images: take a number "
                         f"that divides them")

    def read(split, order=None):
        limit = args.limit or (TOY_IMAGES[split] if toy else None)
        return annotations.masks(args.data, args.data_root, split, limit, side, order)

    views = Views(read, recipe, side, model.mean, args.seed, keep=toy)
    next(iter(views))                                    # what is wrong with the set is said now
    iters = length(recipe, views.images, args)
    share = recipe["batch"] // world                     # images of this process
    batches = DataLoader(views, share, collate_fn=list, num_workers=0 if toy else args.workers,
                         worker_init_fn=data.start_worker, generator=torch.Generator())
    torch.manual_seed(args.seed)
    net = mask_rcnn(model, len(names), recipe, side, args.precision == "bf16").to(args.device)
    if world > 1 and args.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    opt = torch.optim.AdamW(groups(net, recipe), betas=(0.9, 0.999))
    progress = Progress(model, args, net, opt)
    views.begin = progress.step * recipe["batch"] // views.images
    train(net, opt, progress, batches, recipe, iters, model, args)

    net.eval()
    pairs, rows = [], []
    mine = dense.bar(read("test", lambda n: range(rank, n, world)), model)
    for item in mine:
        found = predict(net, item.image, args.device)
        if args.show and rank == 0 and len(rows) < 8:
            rows.append(beside(item, found))
        pairs.append((packed(item), packed(found)))
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, pairs)
        pairs = sum(parts, [])
    if not any(len(truth.boxes) for truth, _ in pairs):
        raise ValueError(f"no objects in the test images of {args.data}: raise --limit or change "
                         "--data")
    if rows:
        path = Path(args.out) / f"detection-{args.data}-{model.name}.png"
        dense.contact_sheet(rows, path, 256)
    scores = {kind: metrics.coco_ap(pairs, of) for kind, of in (("box", "bbox"), ("mask", "segm"))}
    blocks, wide = (" ".join(str(i + 1) for i in numbers)
                    for numbers in (net.backbone.blocks, net.backbone.everywhere))
    progress.done()
    attention = (f"attention in windows of {net.backbone.window} patches, global in blocks {wide}, "
                 f"bias tables" if recipe["windows"] else "global attention")
    small = " of a small detector (our choice)" if toy else ""
    return metrics.report(
        {"pyramid": {f"{kind} {name}": 100 * scores[kind][name]
                     for kind in scores for name in ("AP", "AP50", "AP75")}},
        f"Mask R-CNN of torchvision (RoIAlign not aligned, smooth L1), fine-tuned end to end, "
        f"recipe {args.recipe}: pyramid from blocks {blocks}, {attention}; {iters:,} iterations of "
        f"{recipe['batch']}{small}, AdamW, lr {recipe['lr']:g}, weight decay {recipe['decay']:g}, "
        f"layer decay {recipe['layer_decay']:g}, drop path {recipe['drop_path']:g}; "
        f"{recipe['input']} input, {side} px; no test-time augmentation",
        train=views.images, test=len(pairs))


def length(recipe, images, args):
    """Iterations: those asked for, of toy our choice, else so many epochs of the images."""
    if args.iters or "iters" in recipe and not args.epochs:
        return args.iters or recipe["iters"]
    return max(1, round((args.epochs or recipe["epochs"]) * images / recipe["batch"]))


# ---- the network ---------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """(B, 3, H, W) normalised -> {"0" ... "3", "pool": (B, channels, h, w)}, strides p/4 ... 4p.

    With an FPN (1x, 100ep) each of four blocks gives a level, and the FPN adds the coarser to the
    finer ones; without (vitdet: the simple pyramid) all levels are made of the last block. Blocks
    are taken without the final norm. The encoder runs in bf16 if asked for, all else in fp32.
    """

    def __init__(self, encoder, recipe, side, bf16=False):
        super().__init__()
        D, depth, norm = encoder.embed_dim, encoder.depth, NORMS[recipe["norm"]]
        self.encoder, self.bf16, self.out_channels = encoder, bf16, recipe["channels"]
        self.blocks = [max(1, round(block * depth / 12)) - 1 for block in recipe["blocks"]]
        self.window = recipe["windows"] and min(encoder.grid[0], side // encoder.patch_size // 2)
        every = max(2, depth // 4)                       # the last of 3 blocks of ViT-B, 6 of ViT-L
        self.everywhere = sorted({*range(every - 1, depth, every), depth - 1})
        simple = len(self.blocks) == 1
        half, quarter = (D // 2, D // 4) if simple else (D, D)
        self.scales = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(D, half, 2, 2), norm(half), nn.GELU(),
                          nn.ConvTranspose2d(half, quarter, 2, 2)),
            nn.ConvTranspose2d(D, half, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        widths, fpn_norm = [quarter, half, D, D], NORMS[recipe["fpn"]]
        conv = functools.partial(Conv2dNormActivation, norm_layer=fpn_norm, activation_layer=None)
        self.levels = nn.ModuleList(
            nn.Sequential(conv(width, self.out_channels, 1),
                          conv(self.out_channels, self.out_channels, 3))
            for width in widths) if simple else None
        self.fpn = None if simple else FeaturePyramidNetwork(widths, self.out_channels,
                                                             norm_layer=fpn_norm)
        self.sixth = LastLevelMaxPool()

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.in_windows(images) if self.window else [
                self.encoder.split(z)[1]
                for z in self.encoder.layers(images, self.blocks, norm=False)[0]]
        grid = [n // self.encoder.patch_size for n in images.shape[2:]]
        maps = [z.float().transpose(1, 2).unflatten(2, grid) for z in outputs]      # (B, D, h, w)
        maps = [scale(z) for scale, z in zip(self.scales, maps * 4 if self.levels else maps)]
        names = ["0", "1", "2", "3"]
        if self.levels:
            maps = [level(z) for level, z in zip(self.levels, maps)]
        else:
            maps = list(self.fpn(dict(zip(names, maps))).values())
        maps, names = self.sixth(maps, [], names)
        return dict(zip(names, maps))

    def in_windows(self, images):
        """-> patch tokens (B, N, D) of the blocks asked for. Few blocks see all, others a window;
        as in ViTDet windows are filled up with zeros, which are attended to."""
        encoder, window = self.encoder, (self.window, self.window)
        x, grid = encoder.embed(images)
        x, prefix, outputs = x[:, encoder.num_prefix:], encoder.num_prefix, {}
        factors = encoder.drop_factors(len(x))
        for i, block in enumerate(encoder.blocks):
            whole = i in self.everywhere
            bias = encoder.attention_bias(block, grid if whole else window)[:, :, prefix:, prefix:]
            drop = None if factors is None else factors[:, 2 * i:2 * i + 2]
            if whole:
                x = block(x, bias, drop)
            else:
                z = to_windows(x, grid, window)                              # (B x windows, ., D)
                if drop is not None:                     # a branch is dropped for a whole picture
                    drop = drop.repeat_interleave(len(z) // len(x), 0)
                x = from_windows(block(z, bias, drop), grid, window)
            outputs[i] = x
        return [outputs[i] for i in self.blocks]


def to_windows(x, grid, window):
    """(B, h*w, D) -> (B * number of windows, a*b, D), row by row, filled up with zeros."""
    (h, w), (a, b) = grid, window
    x = F.pad(x.unflatten(1, (h, w)), (0, 0, 0, -w % b, 0, -h % a))
    x = x.unflatten(2, (-1, b)).unflatten(1, (-1, a))                        # (B, m, a, n, b, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x, grid, window):
    """The inverse of to_windows."""
    (h, w), (a, b) = grid, window
    x = x.unflatten(1, (a, b)).unflatten(0, (-1, -(-h // a), -(-w // b)))    # (B, m, n, a, b, D)
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :h, :w].flatten(1, 2)


def trainable(encoder, recipe):
    """A copy of the encoder to train. Windows: a table of biases in each block, 0 where new."""
    start = finetune.restart(encoder)
    config = {**start.config, "drop_path": recipe["drop_path"]}
    if recipe["windows"]:
        config["rel_pos"] = "block"
    copy = vit.ViT(**config)
    copy.load_state_dict({**copy.state_dict(), **start.state_dict()})
    for p in copy.parameters():
        p.requires_grad_(True)
    if recipe["windows"] and copy.cls_token is not None:
        copy.cls_token.requires_grad_(False)             # not used
    return copy


def mask_rcnn(model, classes, recipe, side, bf16=False):
    """torchvision's Mask R-CNN on the Pyramid; class 0 is the background."""
    p, channels, hidden = model.encoder.patch_size, recipe["channels"], recipe["hidden"]
    rpn_convs, box_convs = recipe["convs"]
    strides, norm = [p // 4, p // 2, p, 2 * p, 4 * p], NORMS[recipe["heads"]]
    box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * box_convs, [hidden], norm) if (
        box_convs) else TwoMLPHead(channels * 7 * 7, hidden)
    return MaskRCNN(
        Pyramid(trainable(model.encoder, recipe), recipe, side, bf16),
        min_size=side, max_size=side * 1333 // 800 if recipe["input"] == "multi-scale" else side,
        image_mean=model.mean, image_std=model.std, size_divisible=4 * p,
        _skip_resize=True,                               # in training: the views have their size
        rpn_anchor_generator=AnchorGenerator([(8 * s,) for s in strides], [(0.5, 1.0, 2.0)] * 5),
        rpn_head=RPNHead(channels, 3, rpn_convs),
        rpn_post_nms_top_n_train=recipe["proposals"], rpn_post_nms_top_n_test=recipe["proposals"],
        rpn_pre_nms_top_n_train=2 * recipe["proposals"],
        rpn_pre_nms_top_n_test=recipe["proposals"],
        box_batch_size_per_image=recipe["samples"],
        box_roi_pool=pooling(7, p), box_head=box_head,
        box_predictor=FastRCNNPredictor(hidden, classes + 1),
        mask_roi_pool=pooling(14, p), mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1))


def pooling(size, p):
    """RoIAlign to size x size cells, each a mean of as many samples as it covers cells of a map.

    The scales are set by hand: torchvision would guess them from the first batch, for good.
    """
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio=0)
    finest = p.bit_length() - 3                          # log2 of p/4
    pool.scales = [2.0**-level for level in range(finest, finest + 4)]
    pool.map_levels = LevelMapper(finest, finest + 3)    # 224 px: stride 16
    return pool


# ---- input ---------------------------------------------------------------------------------------


class Views(IterableDataset):
    """Endless random views of the training images, (image, target); every epoch a new order.

    begin: the first epoch; a run that was killed begins the one anew that it was in.
    read: as in `detection`; keep: read once, and keep all items in memory. The images of an epoch
    are split over processes and their workers, each of which fills batches of its own: with another
    number of workers, other images share a batch, so a run differs.
    """

    def __init__(self, read, recipe, side, mean, seed, keep):
        self.read, self.recipe, self.side, self.mean, self.seed = read, recipe, side, mean, seed
        self.rank, self.world, self.images = distributed.rank(), distributed.world_size(), None
        self.kept, self.begin = list(read("train")) if keep else None, 0

    def __iter__(self):
        worker = get_worker_info()
        n, me = (worker.num_workers, worker.id) if worker else (1, 0)
        for epoch in itertools.count(self.begin):
            def order(images, epoch=epoch):
                self.images, g = images, rng.generator(self.seed, "order", epoch)
                every = torch.randperm(images, generator=g).tolist()
                return every[me + n * self.rank::n * self.world] or every    # too few to share

            items = (self.read("train", order) if self.kept is None else
                     (self.kept[i] for i in order(len(self.kept))))
            any_objects = False
            for item in items:
                any_objects |= not item.crowd.all()
                torch.manual_seed(rng.key(self.seed, "view", epoch, item.id))
                image, target = training_view(item, self.recipe, self.side, self.mean)
                if len(target["boxes"]):
                    yield image, target
            if not any_objects:
                raise ValueError("no objects in the training images: raise --limit or change "
                                 "--data")


def training_view(item, recipe, side, mean):
    """-> image (3, H, W) uint8; boxes (K, 4), labels (K,) from 1, masks (K, H, W) uint8 of what is
    left of the objects. Crowds are no objects; what is thinner than a pixel goes."""
    single = ~item.crowd
    sample = dict(
        image=tv_tensors.Image(item.image), masks=tv_tensors.Mask(item.masks[single].byte()),
        boxes=tv_tensors.BoundingBoxes(item.boxes[single], format="XYXY",
                                       canvas_size=item.image.shape[1:]))
    sample = v2.RandomHorizontalFlip()(sample)
    sample = multi_scale(sample, side / 800) if recipe["input"] == "multi-scale" else (
        large_scale_jitter(sample, side, recipe["scales"], mean))
    boxes = TF.clamp_bounding_boxes(sample["boxes"]).as_subclass(torch.Tensor)
    masks = sample["masks"].as_subclass(torch.Tensor)
    left = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1) & (masks > 0).flatten(1).any(1)
    boxes, masks = boxes[left], masks[left]
    if recipe["input"] == "jitter":                      # of an object that was cut, a box may hold
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])     # less: drawn anew (ViTDet)
    return sample["image"].as_subclass(torch.Tensor), dict(
        boxes=boxes, labels=item.labels[single][left] + 1, masks=masks)


def multi_scale(sample, zoom=1.0):
    """1x, as in DETR: the short side from 480 to 800 px, the long one at most 1333; in half of the
    cases of a random crop. zoom: times all these sizes."""
    def shortest(sizes, most=None):
        return v2.RandomShortestSize([round(s * zoom) for s in sizes],
                                     most and round(most * zoom))(sample)

    if torch.rand(()) < 0.5:
        sample = shortest([400, 500, 600])
        most = [min(n, round(600 * zoom)) for n in sample["image"].shape[1:]]
        least = [min(n, round(384 * zoom)) for n in sample["image"].shape[1:]]
        sample = random_crop(sample, *(int(torch.randint(a, b + 1, ())) for a, b in
                                       zip(least, most)))
    return shortest(range(480, 801, 32), 1333)


def large_scale_jitter(sample, side, scales, mean):
    """100ep, vitdet: fitted into the canvas, times 0.1 to 2; what sticks out is cut off at random,
    what is missing on the right and at the bottom is filled with the mean colour."""
    sample = v2.ScaleJitter((side, side), scales)(sample)
    sample = random_crop(sample, side, side)
    height, width = sample["image"].shape[1:]
    fill = {tv_tensors.Image: [round(255 * m) for m in mean], "others": 0}
    return v2.Pad([0, 0, side - width, side - height], fill)(sample)


def random_crop(sample, height, width):
    """At most so many pixels of it, anywhere."""
    h, w = sample["image"].shape[1:]
    height, width = min(height, h), min(width, w)
    top, left = (int(torch.randint(n + 1, ())) for n in (h - height, w - width))
    return {name: TF.crop(x, top, left, height, width) for name, x in sample.items()}


# ---- training ------------------------------------------------------------------------------------


def groups(net, recipe):
    """AdamW's groups: layers of the encoder as in fine-tuning, all that is new at the full lr."""
    named = [(name.removeprefix("backbone."), p) for name, p in net.named_parameters()
             if p.requires_grad]
    like = SimpleNamespace(encoder=net.backbone.encoder, named_parameters=lambda: named)
    return finetune.layer_groups(like, recipe["layer_decay"], recipe["decay"])


def lr_factor(step, iters, recipe):
    """Linear from 0.001 over the warm-up (at most a tenth of the run), then steps or a cosine."""
    warmup = min(recipe["warmup"], iters // 10)
    up = 0.001 + 0.999 * step / warmup if step < warmup else 1.0
    if recipe["steps"]:
        return up * 0.1 ** sum(step >= round(share * iters) for share in recipe["steps"])
    return up * (1 + math.cos(math.pi * step / iters)) / 2


@torch.enable_grad()
def train(net, opt, progress, batches, recipe, iters, model, args):
    """All weights; a batch goes through in parts of --batch-size. The loss is torchvision's sum of
    five: object or not and box of the RPN, class, box and mask of the heads."""
    parallel, losses = distributed.wrap_ddp(net, args.device), []
    net.train()
    for step, batch in progress.steps(out_of_workers(batches), iters):
        torch.manual_seed(rng.key(args.seed, "detection", step, distributed.rank()))  # what is sampled
        factor = lr_factor(step, iters, recipe)
        for group in opt.param_groups:
            group["lr"] = recipe["lr"] * factor * group["factor"]
        parts = range(0, len(batch), args.batch_size)
        for i in parts:
            parallel.require_backward_grad_sync = i == parts[-1]             # DDP's no_sync
            part = batch[i:i + args.batch_size]
            images = [image.to(args.device).float() / 255 for image, _ in part]
            targets = [{name: x.to(args.device) for name, x in target.items()}
                       for _, target in part]
            loss = sum(parallel(images, targets).values()) * len(part) / len(batch)
            loss.backward()
            losses.append(loss.detach() * len(parts))
        opt.step(), opt.zero_grad()
        if (step + 1) % max(1, iters // 10) == 0 or step % 50 == 0 or step + 1 == iters:
            mean = distributed.all_mean(torch.stack(losses).mean()).item()
            if not math.isfinite(mean):
                raise ValueError(f"{model.name}: the loss is not finite by iteration {step + 1} of "
                                 f"{iters} (lr {recipe['lr'] * factor:.1e}); try --precision fp32, "
                                 f"or an earlier checkpoint")
            progress.bar.set_postfix(loss=f"{mean:.3f}")
        if (step + 1) % max(1, iters // 10) == 0:
            tqdm.write(f"iteration {step + 1:,}/{iters:,}  loss {mean:.3f}  lr "
                       f"{recipe['lr'] * factor:.1e}  eta {progress.eta(step)}", file=sys.stdout)
            losses = []


def out_of_workers(batches):
    """What goes wrong in a worker comes with its traceback as text; the last line says it all."""
    try:
        yield from batches
    except ValueError as error:
        line = str(error).strip().splitlines()[-1]
        raise ValueError(line.removeprefix("ValueError: ")) from None


# ---- the test ------------------------------------------------------------------------------------


@torch.no_grad()
def predict(net, image, device):
    """(3, H, W) uint8 -> scores (M,), boxes (M, 4), labels (M,) from 0, masks (M, H, W) bool."""
    found = net([image.to(device).float() / 255])[0]
    return SimpleNamespace(scores=found["scores"].cpu(), boxes=found["boxes"].cpu(),
                           labels=found["labels"].cpu() - 1,
                           masks=(found["masks"][:, 0] > 0.5).cpu())


def packed(item):
    """What scoring looks at, without the picture, and with masks as COCO's run lengths."""
    from pycocotools import mask
    runs = mask.encode(np.asfortranarray(item.masks.permute(1, 2, 0).byte().numpy()))
    return SimpleNamespace(**{name: x for name, x in vars(item).items() if name in (
        "boxes", "labels", "scores", "areas", "crowd")}, masks=runs)


def beside(item, found):
    """Two pictures: the truth, and as many of those found, the surest first; a colour a class."""
    best = slice(len(item.boxes))                        # found are in the order of their scores
    return [painted(item.image, item.boxes, item.labels, item.masks),
            painted(item.image, found.boxes[best], found.labels[best], found.masks[best])]


def painted(image, boxes, labels, masks):
    """One object after the other: torchvision leaves black where masks overlap."""
    colours = (rng.uniform(labels, 3, "colour") * 256).int().tolist()
    for box, mask, colour in zip(boxes, masks, map(tuple, colours)):
        image = draw_segmentation_masks(image, mask, colors=colour)
        width = image.shape[1] // 150 + 1
        image = draw_bounding_boxes(image, box[None], colors=colour, width=width)
    return image
