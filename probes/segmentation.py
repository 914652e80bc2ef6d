"""Semantic segmentation by an encoder and a head that are fine-tuned end to end.

    python evaluate.py --task segmentation --head upernet --show

    image -> ViT -> four blocks -> Semantic FPN or UPerNet -> the class of every pixel
"""
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from lib import distributed, rng
from probes import annotations
from probes.common import Report, choose_recipe, is_toy, require_tokens
from probes.label_crops import (
    SEGMENTATION_SIZES,
    WARMUP_ITERS,
    crops_per_batch,
    load_crops,
    percentages,
    poly_lr,
    save_figure,
    score_segmentation,
    segmentation_items,
    segmentation_loss,
    segmentation_sizes,
)
from probes.training import Progress, copy_encoder, layer_decay_groups, single_lr

# Shapes: B images, D width, C classes; (height, width) in pixels, (rows, columns) of patches.


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
            parts = x.split(opt.batch_size)
            return torch.cat([net(part)[0] for part in parts])[:, None]      # (B, 1 head, C, ...)

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
