"""Object detection and instance segmentation with Mask R-CNN on a fine-tuned ViT: box and mask AP.

    python evaluate.py --task detection --recipe vitdet --data coco --data-root /data
    python evaluate.py --task detection --data toy-scenes --show               # minutes, offline
    torchrun --nproc_per_node=8 evaluate.py --task detection --recipe 1x --data coco

Mask R-CNN (He et al., 2017) with the ViT as its backbone, fine-tuned end to end:

    image -> ViT -> maps of 4 strides, and a 5th -+- RPN -> proposals
                    p/4  p/2  p  2p  4p           +- of each proposal: class and a better box
                                                  +- of each proposal: mask of 28 x 28
                                                     box and mask AP of COCO (pycocotools)

torchvision has the detector: anchors, RPN, RoI heads, FPN, losses, resizing at test time. This file
adapts a ViT to it: feature pyramids, attention in windows, input, recipes and the training loop.

torchvision differs from the code of the papers: RoIAlign is not aligned to half pixels (its
MultiScaleRoIAlign has no such flag), the box loss is a smooth L1 with beta 1/9, and the last layers
have PyTorch's initialization. Differences from the published numbers in the second digit therefore
mean nothing.
"""
import functools
import itertools
import math
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

import vit
from lib import distributed, metrics, rng
from lib.colors import class_colors
from probes import annotations
from probes.common import (
    Report,
    choose_recipe,
    is_toy,
    progress_bar,
    require_tokens,
    require_vit,
)
from probes.figures import FigureRows, save_image_grid
from probes.training import Progress, copy_encoder, layer_decay_groups, single_lr

# Shapes: B images, N patches, D width, p patch side; (height, width) in pixels, (rows, columns) of
# patches. Boxes are x0 y0 x1 y1 in pixels.

# 1x: SelfPatch. 100ep: Li et al. (2021), whose protocol ASL uses. vitdet: Li et al. (2022).
# blocks: of 12, counted from 1, scaled linearly for other depths; vitdet makes all levels from one
# map. steps: fractions of the run at which lr is divided by 10; (): cosine to 0. side: of the
# canvas in pixels; 1x: short side at test time. convs: number of convolutions of the RPN, and of
# the box head before its FC layers.
DETECTION_RECIPES = {
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
# channels: of the pyramid and the heads; fc_dim: width of the box head's FC layers; proposals:
# boxes of the RPN per image; samples: proposals per image that are trained on; scales: range of the
# factor of large-scale jitter.
DETECTOR = dict(channels=256, fc_dim=1024, proposals=1000, samples=512, scales=(0.1, 2.0))
# Our choice: a detector that two CPU cores can train in minutes.
TOY_DETECTION = dict(channels=64, fc_dim=256, proposals=100, samples=32, scales=(0.7, 1.4), batch=8,
                     lr=1e-3, iters=300)
TOY_DETECTION_IMAGES = dict(train=600, test=100)         # unless --limit is given
NORMS = {None: None, "BN": nn.BatchNorm2d, "GN": functools.partial(nn.GroupNorm, 32),
         "LN": functools.partial(LayerNorm2d, eps=1e-6)}


def require_whole_attention(model, opt):
    """ValueError if both the recipe and the model have windows."""
    recipe = opt.recipe or "1x"
    if model.encoder and model.encoder.config.get("window") and (
            DETECTION_RECIPES.get(recipe, {}).get("windows")):
        raise ValueError(f"recipe {recipe} has windows of its own: leave out --window, or take "
                         f"--recipe 1x")


def detection(model, opt):
    """Mask R-CNN, fine-tuned end to end: average precision of boxes and masks of objects.

    SelfPatch, supplement, table 3 (--recipe 1x); ASL, tables 1, 3, 5 (100ep: ASL cites Li et al.
    (2021), and its row for MAE is their published number); ViTDet (vitdet), for comparison. Our
    choices for all recipes: no decay of biases; images padded to a multiple of 4 patches, so that
    anchors lie on the cells of all levels; images and views without any object are skipped
    in training; BN synchronized on GPUs only. 100ep, vitdet: the class token is removed; windows as
    large as the grid in pretraining (14 x 14 of ViT-B/16), at most half the input; each block has a
    table of relative position biases (the ViTDet paper has decomposed ones); tables of global
    blocks have the size of a window and are resized to the whole grid. On toy: the encoder's size,
    a small detector, few iterations. ValueError: the pixels baseline, a data set without masks, no
    pycocotools, a patch side that is not a power of two, a batch that the processes cannot share.
    """
    require_tokens(model, opt.task)
    if not annotations.has("boxes", opt.data):
        raise ValueError(f"detection needs masks or boxes of objects, and {opt.data} has none; "
                         f"choose --data {' or '.join(annotations.BOXES)} or a folder "
                         "(docs/own-data.md)")
    masks = annotations.has("masks", opt.data)
    metrics.coco_ap([])                                  # reports a missing pycocotools
    if model.encoder.depth != 4 or (opt.recipe or "1x") != "1x":             # four stages of a Swin
        require_vit(model, "detection (except --recipe 1x with a Swin of four stages)")
    p = finest_patch(model.encoder)
    if p < 4 or p & (p - 1):
        raise ValueError(f"detection needs a patch side that is a power of two and at least 4 px, "
                         f"and {model.name} has {p}")
    on_toy = is_toy(opt.data)
    rank, world = distributed.rank(), distributed.world_size()
    recipe_name, recipe = choose_recipe(opt, DETECTION_RECIPES)
    recipe = DETECTOR | recipe | (TOY_DETECTION if on_toy else {})
    recipe |= dict(batch=opt.train_batch_size or recipe["batch"],
                   lr=single_lr(opt, recipe["lr"]))
    side = (opt.img_size or (model.img_size if on_toy else recipe["side"])) // p * p
    names = annotations.box_classes(opt.data)
    if recipe["batch"] % world:                          # else the length of the run would change
        raise ValueError(f"{world} processes cannot share {recipe['batch']} images: take a number "
                         f"that divides them, or another --train-batch-size")

    def read(split, order=None):
        limit = opt.limit or (TOY_DETECTION_IMAGES[split] if on_toy else None)
        read_items = annotations.masks if masks else annotations.boxes
        return read_items(opt.data, opt.data_root, split, limit, side, order)

    views = TrainingViews(read, recipe, side, model.mean, opt.seed, keep=on_toy)
    next(iter(views))                                    # reports a bad data set before training
    iters = count_iters(recipe, views.n_images, opt)
    workers = 0 if on_toy else opt.workers
    batches = DataLoader(views, recipe["batch"] // world, collate_fn=list, num_workers=workers,
                         worker_init_fn=distributed.start_worker,
                         multiprocessing_context=distributed.worker_context(workers),
                         generator=torch.Generator())
    torch.manual_seed(opt.seed)
    net = make_mask_rcnn(model, len(names), recipe, side, masks).to(model.device)
    if world > 1 and model.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = torch.optim.AdamW(parameter_groups(net, recipe), betas=(0.9, 0.999))
    progress = Progress(model, opt, net, optimizer)
    views.first_epoch = progress.step * recipe["batch"] // views.n_images
    train_detector(net, optimizer, progress, batches, recipe, iters, model.device, opt)

    net.eval()
    pairs, figure, in_figure = [], FigureRows(8 if opt.show and rank == 0 else 0), set()
    for item in progress_bar(read("test", lambda n: range(rank, n, world)), model):
        predicted = predict_objects(net, item.image, model.device)
        if figure.wants(classes := {*item.labels.tolist()}):
            in_figure |= classes | {*predicted.labels[:len(item.boxes)].tolist()}
            figure.add(classes, [draw_objects(item.image, item),
                         draw_objects(item.image, predicted, len(item.boxes))])
        pairs.append((pack_objects(item), pack_objects(predicted)))
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, pairs)
        pairs = sum(parts, [])
    if not any((~truth.crowd).any() for truth, _ in pairs):
        raise ValueError(f"no objects in the test images of {opt.data}: "
                         f"{'raise --limit or ' * bool(opt.limit)}change --data")
    if figure.items:
        name = f"detection-{Path(opt.data).name}-{model.name}.png"
        save_image_grid(figure.rows(), Path(opt.out) / name, 256, ("annotation", "prediction"),
                        legend=[(c + 1, names[c]) for c in sorted(in_figure)])
    kinds = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
    scores = {kind: metrics.coco_ap(pairs, coco) for kind, coco in kinds.items()}
    progress.delete()
    blocks, global_blocks = (" ".join(str(i + 1) for i in index)
                             for index in (net.backbone.blocks, net.backbone.global_blocks))
    attention = (f"attention in windows of {net.backbone.window} patches, global in blocks "
                 f"{global_blocks}, bias tables" if recipe["windows"] else "global attention")
    small = " of a small detector (our choice)" if on_toy else ""
    return Report(
        {"pyramid": {f"{kind} {name}": 100 * scores[kind][name]
                     for kind in scores for name in ("AP", "AP50", "AP75")}},
        f"{'Mask' if masks else 'Faster'} R-CNN of torchvision (RoIAlign not aligned, smooth L1), "
        f"fine-tuned end to end, recipe {recipe_name}: pyramid from blocks {blocks}, {attention}; "
        f"{iters:,} iterations with {recipe['batch']} images each{small}, AdamW, lr "
        f"{recipe['lr']:g}, weight decay {recipe['decay']:g}, layer decay "
        f"{recipe['layer_decay']:g}, drop path {recipe['drop_path']:g}; "
        f"{recipe['input']} input, {side} px; no test-time augmentation",
        dict(train=views.n_images, test=len(pairs)))


def count_iters(recipe, n_images, opt):
    """Iterations: --iters; else those of --epochs or of the recipe's epochs, on toy a fixed number.
    """
    if opt.iters or "iters" in recipe and not opt.epochs:
        return opt.iters or recipe["iters"]
    return max(1, round((opt.epochs or recipe["epochs"]) * n_images / recipe["batch"]))


# ---- the network ---------------------------------------------------------------------------------


def make_mask_rcnn(model, classes, recipe, side, masks=True):
    """torchvision's Mask R-CNN on the Pyramid; class 0 is the background. Without masks it has no
    mask head, which makes it Faster R-CNN."""
    p = finest_patch(model.encoder)
    channels, fc_dim = recipe["channels"], recipe["fc_dim"]
    rpn_convs, box_convs = recipe["convs"]
    strides = [p // 4, p // 2, p, 2 * p, 4 * p]
    norm = NORMS[recipe["heads"]]
    box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * box_convs, [fc_dim], norm) if (
        box_convs) else TwoMLPHead(channels * 7 * 7, fc_dim)
    net = MaskRCNN(
        Pyramid(make_backbone(model.encoder, recipe), recipe, side, model.precision == "bf16"),
        min_size=side, max_size=side * 1333 // 800 if recipe["input"] == "multi-scale" else side,
        image_mean=model.mean, image_std=model.std, size_divisible=4 * p,
        _skip_resize=True,                               # in training: views have their final size
        rpn_anchor_generator=AnchorGenerator([(8 * s,) for s in strides], [(0.5, 1.0, 2.0)] * 5),
        rpn_head=RPNHead(channels, 3, rpn_convs),
        rpn_post_nms_top_n_train=recipe["proposals"], rpn_post_nms_top_n_test=recipe["proposals"],
        rpn_pre_nms_top_n_train=2 * recipe["proposals"],
        rpn_pre_nms_top_n_test=recipe["proposals"],
        box_batch_size_per_image=recipe["samples"],
        box_roi_pool=make_roi_align(7, p), box_head=box_head,
        box_predictor=FastRCNNPredictor(fc_dim, classes + 1),
        mask_roi_pool=make_roi_align(14, p),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1))
    if not masks:
        net.roi_heads.mask_roi_pool = net.roi_heads.mask_head = None
        net.roi_heads.mask_predictor = None
    return net


def finest_patch(encoder):
    """Four times the stride of the finest level: a ViT's patch side, or of a Swin four patches."""
    return 4 * encoder.strides[0] if is_swin(encoder) else encoder.patch_size


def is_swin(encoder):
    return len(set(encoder.strides)) > 1


def make_backbone(encoder, recipe):
    """A trainable copy of the encoder. With windows, each block has a bias table; new ones are
    0."""
    start = copy_encoder(encoder, recipe["drop_path"])
    if is_swin(encoder):
        return start
    config = dict(start.config)
    if recipe["windows"]:
        config["rel_pos"] = "block"
    backbone = vit.ViT(**config)
    backbone.load_state_dict({**backbone.state_dict(), **start.state_dict()})
    for p in backbone.parameters():
        p.requires_grad_(True)
    for token in (backbone.cls_token, backbone.register_tokens) if recipe["windows"] else ():
        if token is not None:
            token.requires_grad_(False)                  # not used
    return backbone


class Pyramid(nn.Module):
    """(B, 3, height, width) normalized -> {"0" ... "3", "pool": (B, channels, rows, columns)} of
    strides p/4 ... 4p.

    With an FPN (1x, 100ep) each of four blocks gives a level, of a Swin each of its four stages
    (then p is four times its first stride), and the FPN adds coarser levels to finer ones; without
    it (vitdet: the simple pyramid) all levels are made from the last block. Outputs of blocks are
    taken before the final norm. With bf16 the encoder runs in bf16, all else
    in fp32.
    """

    def __init__(self, encoder, recipe, side, bf16=False):
        super().__init__()
        D, depth = encoder.embed_dim, encoder.depth
        norm = NORMS[recipe["norm"]]
        self.encoder = encoder
        self.bf16 = bf16
        self.out_channels = recipe["channels"]
        self.blocks = [max(1, round(block * depth / 12)) - 1 for block in recipe["blocks"]]
        self.window = recipe["windows"] and min(encoder.grid[0], side // encoder.patch_size // 2)
        every = max(2, depth // 4)                       # every 3rd block of ViT-B, 6th of ViT-L
        self.global_blocks = sorted({*range(every - 1, depth, every), depth - 1})
        simple = len(self.blocks) == 1
        half, quarter = (D // 2, D // 4) if simple else (D, D)
        self.strides = [encoder.strides[i] for i in self.blocks]
        self.scales = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(D, half, 2, 2), norm(half), nn.GELU(),
                          nn.ConvTranspose2d(half, quarter, 2, 2)),
            nn.ConvTranspose2d(D, half, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        widths, fpn_norm = [quarter, half, D, D], NORMS[recipe["fpn"]]
        if is_swin(encoder):                             # its stages are a pyramid
            widths, self.scales = encoder.widths, nn.ModuleList(nn.Identity() for _ in range(4))
        conv = functools.partial(Conv2dNormActivation, norm_layer=fpn_norm, activation_layer=None)
        self.levels = nn.ModuleList(
            nn.Sequential(conv(width, self.out_channels, 1),
                          conv(self.out_channels, self.out_channels, 3))
            for width in widths) if simple else None
        self.fpn = None if simple else FeaturePyramidNetwork(widths, self.out_channels,
                                                             norm_layer=fpn_norm)
        self.fifth = LastLevelMaxPool()

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.windowed_blocks(images) if self.window else [
                self.encoder.split(z)[1]
                for z in self.encoder.layers(images, self.blocks, norm=False)[0]]
        maps = [z.float().transpose(1, 2).unflatten(2, (images.shape[2] // stride, -1))
                for z, stride in zip(outputs, self.strides)]
        maps = [scale(z) for scale, z in zip(self.scales, maps * 4 if self.levels else maps)]
        names = ["0", "1", "2", "3"]
        if self.levels:
            maps = [level(z) for level, z in zip(self.levels, maps)]
        else:
            maps = list(self.fpn(dict(zip(names, maps))).values())
        maps, names = self.fifth(maps, [], names)
        return dict(zip(names, maps))

    def windowed_blocks(self, images):
        """-> patch tokens (B, N, D) of self.blocks. Only the global blocks attend beyond a window.
        As in ViTDet, windows are zero-padded, and tokens also attend to the padding."""
        encoder, window = self.encoder, (self.window, self.window)
        prefix = encoder.num_prefix
        x, grid = encoder.embed(images)
        x = x[:, prefix:]
        outputs = {}
        factors = encoder.drop_factors(len(x))
        for i, block in enumerate(encoder.blocks):
            attends_to_all = i in self.global_blocks
            bias = encoder.attention_bias(block, grid if attends_to_all else window)
            bias = bias[:, :, prefix:, prefix:]
            drop = None if factors is None else factors[:, 2 * i:2 * i + 2]
            if attends_to_all:
                x = block(x, bias, drop)
            else:
                z = split_windows(x, grid, window)
                if drop is not None:                     # a branch is dropped for a whole image
                    drop = drop.repeat_interleave(len(z) // len(x), 0)
                x = join_windows(block(z, bias, drop), grid, window)
            outputs[i] = x
        return [outputs[i] for i in self.blocks]


def split_windows(x, grid, window):
    """(B, N, D) -> (B * number of windows, patches of a window, D), windows in raster order,
    zero-padded. grid, window: (rows, columns) in patches."""
    (h, w), (a, b) = grid, window
    x = F.pad(x.unflatten(1, (h, w)), (0, 0, 0, -w % b, 0, -h % a))
    x = x.unflatten(2, (-1, b)).unflatten(1, (-1, a))                        # (B, m, a, n, b, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join_windows(x, grid, window):
    """The inverse of split_windows."""
    (h, w), (a, b) = grid, window
    x = x.unflatten(1, (a, b)).unflatten(0, (-1, -(-h // a), -(-w // b)))    # (B, m, n, a, b, D)
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :h, :w].flatten(1, 2)


def make_roi_align(size, p):
    """RoIAlign to size x size cells; the samples of a cell are as many as the cells of the map that
    it covers.

    The scales are set here, because torchvision would infer them from the first batch and keep
    them.
    """
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio=0)
    finest = p.bit_length() - 3                          # log2 of p/4
    pool.scales = [2.0**-level for level in range(finest, finest + 4)]
    pool.map_levels = LevelMapper(finest, finest + 3)    # 224 px: stride 16
    return pool


# ---- input ---------------------------------------------------------------------------------------


class TrainingViews(IterableDataset):
    """Endless random views (image, target) of the training images, in a new order in every epoch.

    read: as in `detection`; keep: read once and keep all items in memory. first_epoch: a resumed
    run starts with the epoch in which it was interrupted. The images of an epoch are split over
    processes and their workers, and each worker makes its own batches: with another number of
    workers, batches have other images, and the result differs. ValueError: after MAX_EMPTY epochs
    without a view (the part of a worker may have no objects in some of them).
    """
    MAX_EMPTY = 20

    def __init__(self, read, recipe, side, mean, seed, keep):
        self.read = read
        self.recipe = recipe
        self.side = side
        self.mean = mean
        self.seed = seed
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.kept = list(read("train")) if keep else None
        self.n_images, self.first_epoch = None, 0

    def __iter__(self):
        worker = get_worker_info()
        n_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        empty = 0                                        # epochs without a view, one after another
        for epoch in itertools.count(self.first_epoch):
            def order(n_images, epoch=epoch):
                self.n_images = n_images
                g = rng.generator(self.seed, "order", epoch)
                index = torch.randperm(n_images, generator=g).tolist()
                part = index[worker_id + n_workers * self.rank::n_workers * self.world]
                return part or index                     # too few images to be split

            items = (self.read("train", order) if self.kept is None else
                     (self.kept[i] for i in order(len(self.kept))))
            empty += 1
            for item in items:
                torch.manual_seed(rng.key(self.seed, "view", epoch, item.id))
                image, target = training_view(item, self.recipe, self.side, self.mean)
                if len(target["boxes"]):
                    empty = 0
                    yield image, target
            if empty == self.MAX_EMPTY:
                raise ValueError("no objects in the training images: raise --limit or change "
                                 "--data")


def training_view(item, recipe, side, mean):
    """-> image (3, height, width) uint8; boxes (objects, 4), labels (objects,) from 1 and, if the
    item has them, masks (objects, height, width) uint8 of the objects that remain in the view.

    Crowds are left out, and also boxes with a side of less than a pixel. Images are resized without
    antialiasing, as torchvision's detector resizes test images.
    """
    single = ~item.crowd
    sample = dict(
        image=tv_tensors.Image(item.image),
        boxes=tv_tensors.BoundingBoxes(item.boxes[single], format="XYXY",
                                       canvas_size=item.image.shape[1:]))
    if hasattr(item, "masks"):
        sample["masks"] = tv_tensors.Mask(item.masks[single].byte())
    sample = v2.RandomHorizontalFlip()(sample)
    sample = multi_scale(sample, side / 800) if recipe["input"] == "multi-scale" else (
        large_scale_jitter(sample, side, recipe["scales"], mean))
    boxes = TF.clamp_bounding_boxes(sample["boxes"]).as_subclass(torch.Tensor)
    remain = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    if "masks" in sample:
        masks = sample["masks"].as_subclass(torch.Tensor)
        remain &= (masks > 0).flatten(1).any(1)
    target = dict(boxes=boxes[remain], labels=item.labels[single][remain] + 1)
    if "masks" in sample:
        target["masks"] = masks[remain]
        if recipe["input"] == "jitter":                  # tight boxes of cropped objects (ViTDet)
            target["boxes"] = masks_to_boxes(masks[remain]) + torch.tensor([0, 0, 1, 1])
    return sample["image"].as_subclass(torch.Tensor), target


def multi_scale(sample, zoom=1.0):
    """1x, as in DETR: the short side is 480 to 800 px, the long side at most 1333 px; with
    probability 1/2 of a random crop. zoom: factor of all these sizes."""
    def resize_short_side(sizes, max_long=None):
        return v2.RandomShortestSize([round(s * zoom) for s in sizes], antialias=False,
                                     max_size=max_long and round(max_long * zoom))(sample)

    if torch.rand(()) < 0.5:
        sample = resize_short_side([400, 500, 600])
        largest = [min(n, round(600 * zoom)) for n in sample["image"].shape[1:]]
        smallest = [min(n, round(384 * zoom)) for n in sample["image"].shape[1:]]
        sample = random_crop(sample, *(int(torch.randint(a, b + 1, ())) for a, b in
                                       zip(smallest, largest)))
    return resize_short_side(range(480, 801, 32), 1333)


def large_scale_jitter(sample, side, scales, mean):
    """100ep, vitdet: resized to fit into the canvas, times a random factor in the range `scales`;
    cropped at random if larger, padded with the mean color on the right and at the bottom if
    smaller."""
    sample = v2.ScaleJitter((side, side), scales, antialias=False)(sample)
    sample = random_crop(sample, side, side)
    height, width = sample["image"].shape[1:]
    fill = {tv_tensors.Image: [round(255 * m) for m in mean], "others": 0}
    return v2.Pad([0, 0, side - width, side - height], fill)(sample)


def random_crop(sample, height, width):
    """A random crop of at most height x width pixels."""
    h, w = sample["image"].shape[1:]
    height, width = min(height, h), min(width, w)
    top, left = (int(torch.randint(n + 1, ())) for n in (h - height, w - width))
    return {name: TF.crop(x, top, left, height, width) for name, x in sample.items()}


# ---- training ------------------------------------------------------------------------------------


def parameter_groups(net, recipe):
    """Groups for AdamW: encoder layers as in fine-tuning; all new layers have the full lr."""
    named = [(name.removeprefix("backbone."), p) for name, p in net.named_parameters()
             if p.requires_grad]
    return layer_decay_groups(named, net.backbone.encoder.depth, recipe["layer_decay"],
                              recipe["decay"])


def lr_factor(step, iters, recipe):
    """The factor of lr: a linear warmup from 0.001 to 1 (at most a tenth of the run), times steps,
    or times half a cosine from 1 to 0, which begins at step 0."""
    warmup = min(recipe["warmup"], iters // 10)
    up = 0.001 + 0.999 * step / warmup if step < warmup else 1.0
    if recipe["steps"]:
        return up * 0.1 ** sum(step >= round(fraction * iters) for fraction in recipe["steps"])
    return up * (1 + math.cos(math.pi * step / iters)) / 2


@torch.enable_grad()
def train_detector(net, optimizer, progress, batches, recipe, iters, device, opt):
    """Trains end to end. The loss is torchvision's sum of five: objectness and box of the RPN;
    class, box and mask of the heads."""
    parallel, losses = distributed.wrap_ddp(net, device), []
    net.train()
    for step, batch in progress.steps(shorten_worker_errors(batches), iters):
        torch.manual_seed(rng.key(opt.seed, "detection", step, distributed.rank()))  # for samples
        lr = recipe["lr"] * lr_factor(step, iters, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        parts = range(0, len(batch), opt.batch_size)     # gradient accumulation
        for i in parts:
            parallel.require_backward_grad_sync = i == parts[-1]             # DDP's no_sync
            part = batch[i:i + opt.batch_size]
            images = [image.to(device).float() / 255 for image, _ in part]
            targets = [{name: x.to(device) for name, x in target.items()} for _, target in part]
            loss = sum(parallel(images, targets).values()) * len(part) / len(batch)
            loss.backward()
            losses.append(loss.detach() * len(parts))
        optimizer.step()
        optimizer.zero_grad()

        due = (step + 1) % max(1, iters // 10) == 0
        if due or step % 50 == 0 or step + 1 == iters:
            mean = progress.mean_loss(losses, lr)
        if due:
            progress.print(f"step {step + 1:,}/{iters:,}  loss {mean:.3f}  lr {lr:.1e}")
            losses = []


def shorten_worker_errors(batches):
    """The batches. The text of an exception in a worker is its traceback; only the message in its
    last line is kept."""
    try:
        yield from batches
    except ValueError as error:
        line = str(error).strip().splitlines()[-1]
        raise ValueError(line.removeprefix("ValueError: ")) from None


# ---- prediction ----------------------------------------------------------------------------------


@torch.no_grad()
def predict_objects(net, image, device):
    """(3, height, width) uint8 -> scores (objects,), boxes (objects, 4), labels (objects,) from 0
    and, with a mask head, masks (objects, height, width) bool."""
    output = net([image.to(device).float() / 255])[0]
    found = SimpleNamespace(scores=output["scores"].cpu(), boxes=output["boxes"].cpu(),
                            labels=output["labels"].cpu() - 1)
    if "masks" in output:
        found.masks = (output["masks"][:, 0] > 0.5).cpu()
    return found


def pack_objects(item):
    """The fields that the score depends on, without the image; masks are COCO's run lengths."""
    from pycocotools import mask
    packed = SimpleNamespace(**{name: x for name, x in vars(item).items() if name in (
        "boxes", "labels", "scores", "areas", "crowd")})
    if hasattr(item, "masks"):
        packed.masks = mask.encode(np.asfortranarray(item.masks.permute(1, 2, 0).byte().numpy()))
    return packed


def draw_objects(image, objects, count=None):
    """The image with boxes and masks, in a color for each class. count: number of objects;
    predicted ones are ordered by their scores."""
    colors = class_colors()[1 + objects.labels % 255].tolist()
    for k, (box, color) in enumerate(zip(objects.boxes[:count], map(tuple, colors))):
        if hasattr(objects, "masks"):
            # One by one: torchvision leaves black pixels where masks overlap.
            image = draw_segmentation_masks(image, objects.masks[k], colors=color)
        width = image.shape[1] // 150 + 1
        image = draw_bounding_boxes(image, box[None], colors=color, width=width)
    return image
