"""Fine-tuning: how good a start was the pre-training, if all weights may move?

    python evaluate.py --task finetune --recipe simmim --checkpoint out/simmim-toy
    python evaluate.py --task finetune --reinit last:2          # where does what was learned sit?
    python evaluate.py --task segmentation --head upernet --show

picture -> ViT -> patch mean -> linear layer                     -> its class          finetune
               -> maps of four blocks -> Semantic FPN or UPerNet -> that of each pixel segmentation
"""
import math
import re
import sys
from dataclasses import replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
import vit
from lib import augment, distributed, metrics, positions, rng
from lib.metrics import report
from lib.run import cosine
from probes import annotations, dense
from probes.common import Progress, labelled, settings_of, view
from probes.dense import BATCH, WARMUP

# B images, S pixels a side, H, W of a picture, h, w of a map, C classes, D width

# ---- classification ------------------------------------------------------------------------------

# lr: at a batch of `per`, else in proportion. clip: of the gradient's norm. mae, simmim: as their
# released code. mmc: Wu et al., table 7, where "64 on 4 GPUs" for ImageNet and "on 2" for others is
# read as 64 on each; what it leaves open (lr in proportion, end of the cosine, mixing, erasing,
# drop path, no clip, head) is as in mae: our choice.
FINETUNE = {
    "mae":    dict(lr=5e-4, per=256, batch=1024, epochs=100, warmup=5, clip=None,
                   augment="RandAugment"),
    "simmim": dict(lr=1.25e-3, per=512, batch=2048, epochs=100, warmup=20, clip=5.0,
                   augment="RandAugment"),
    "mmc":    dict(lr=5e-4, per=256, batch=256, epochs=100, warmup=5, clip=None,
                   augment="RandAugment")}
MMC_ELSEWHERE = dict(batch=128, epochs=200, augment="ThreeAugment")          # than on ImageNet
CROP = 0.08, 1.0                                         # shares of the picture's area
# On toy, our choice: minutes, not hours, so pictures that are nearly whole, not mixed and torn.
TOY = dict(batch=64, epochs=5, crop=(0.6, 1.0), augment="large crops and mirror alone")
LAYER_DECAY, WEIGHT_DECAY, DROP_PATH = 0.65, 0.05, 0.1   # of all three recipes


def finetune(model, args):
    """All weights are trained on as a classifier: how good a start was the pre-training?

    With --reinit some blocks forget first: where does what was learned sit? (Park et al., F.3)
    Reported is the best epoch on the test images, as the released code of linear probes does (of
    fine-tuning the papers do not say), which flatters: the last one stands beside.
    A run that is killed goes on, see common.Progress.
    """
    recipe, both = settings_of(args, FINETUNE), args.recipe == "mmc"
    if both and args.data != "imagenet":
        recipe = {**recipe, **MMC_ELSEWHERE}
    published, recipe = recipe, {**recipe, **(TOY if dense.is_toy(args) else {})}
    if not model.encoder:
        raise ValueError("finetune trains an encoder, and pixels have none: leave out that "
                         "--baseline, or take untrained")
    anew = blocks_anew(args.reinit, model.encoder.depth)
    (images, classes), (tests, _) = (labelled(model, args, s) for s in ("train", "test"))

    # Our choice for small sets: a batch of at most 1/64 of the images, so that they get enough
    # steps, and lr down with the root of it, as suits AdamW; in proportion, little would move.
    rank, world = distributed.rank(), distributed.world_size()
    size = min(recipe["batch"], max(16, world, len(images) // 64)) // world * world
    if len(images) < size or len(tests) < world:
        raise ValueError(f"finetune needs {size} training and {world} test images at least, and "
                         f"{args.data} has {len(images)} and {len(tests)}: raise --limit or change "
                         f"--data")
    crop = data.View(model.size, scale=recipe.get("crop", CROP))             # bicubic, and flip
    loader = data.Loader(images, [crop], size, args.seed, args.device, args.workers, rank, world)
    epochs = args.epochs or recipe["epochs"]
    total = epochs * len(loader)
    warmup = total * recipe["warmup"] // published["epochs"]
    peak = recipe["lr"] / recipe["per"] * math.sqrt(size * published["batch"])
    schedule, end = ((simmim_lr, 2.5e-7 / 1.25e-3 * peak) if args.recipe == "simmim" else
                     (cosine, 1e-6))            # 1e-6 both, at the recipe's batch

    torch.manual_seed(args.seed)
    net = Classifier(restart(model.encoder, anew, both, model.size), classes, both).to(args.device)
    opt = torch.optim.AdamW(layer_groups(net, LAYER_DECAY, WEIGHT_DECAY), betas=(0.9, 0.999),
                            fused=True)
    progress = Progress(model, args, net, opt)
    parallel = distributed.wrap_ddp(net, args.device)
    transform, mix = AUGMENT.get(recipe["augment"]), mixing(classes)
    curve, losses = progress.curve, []                   # curve: (top-1, top-5) of every epoch
    for step, batch in progress.steps(loader.batches(progress.step), total):
        torch.manual_seed(rng.key(args.seed, "finetune", step, rank))        # what torchvision uses
        lr = schedule(step, total, peak, end, warmup)
        for group in opt.param_groups:
            group["lr"] = lr * group["factor"]
        x, y = augment.denormalize(batch.views[0]), batch.label                 # (B, 3, S, S), (B,)
        if transform:
            x, y = mix(erase(augment.normalize(transform(x), model.mean, model.std)), y)
        else:
            x, y = augment.normalize(x / 255, model.mean, model.std), F.one_hot(y, classes).float()
        parts = range(0, len(x), args.batch_size)
        for i in parts:                                  # in parts, if --batch-size asks for it
            parallel.require_backward_grad_sync = i == parts[-1]             # DDP's no_sync
            rows = slice(i, i + args.batch_size)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                scores = parallel(x[rows])
            loss = soft_cross_entropy(scores.float(), y[rows]) / len(x)
            loss.backward()
            losses.append(loss.detach() * len(parts))
        if recipe["clip"]:
            nn.utils.clip_grad_norm_(net.parameters(), recipe["clip"])
        opt.step(), opt.zero_grad()

        ended = (step + 1) % len(loader) == 0
        if ended or step % 50 == 0:                      # now and then: a GPU has to be waited for
            mean = distributed.all_mean(torch.stack(losses).mean()).item()
            if not math.isfinite(mean):
                raise ValueError(f"{model.name}: the loss is not finite by step {step + 1} of "
                                 f"{total} (lr {lr:.1e}); try --precision fp32, or an earlier "
                                 f"checkpoint")
            progress.bar.set_postfix(loss=f"{mean:.3f}")
        if ended:
            curve.append(score(net, tests, model, args))
            tqdm.write(f"epoch {len(curve)}/{epochs}  loss {mean:.3f}  lr {lr:.1e}  top-1 "
                       f"{curve[-1][0]:.1f}%  eta {progress.eta(step)}", file=sys.stdout)
            losses = []
    progress.done()

    best, last = max(curve), curve[-1]
    row = {"top-1": best[0], "top-5": best[1], "last epoch": last[0], "last top-5": last[1]}
    start = f", {args.reinit} blocks drawn anew" if args.reinit else ""
    few = size < published["batch"] // world * world
    return report({"cls+pat" if both else "pat": row},
                  f"fine-tuned end to end, recipe {args.recipe}{start}: AdamW, batch {size}, lr "
                  f"{peak:.2g}{' (both our choice, for few images)' * few}, layer decay "
                  f"{LAYER_DECAY}, {epochs} epochs, {recipe['augment']}"
                  f"{', mixup, cutmix, erasing' if transform else ''}, drop path {DROP_PATH}; top-1, "
                  f"top-5 of the epoch that is best on the test images, and of the last; "
                  f"{view(model, args)}",
                  notes=[f"{model.name}: best epoch {curve.index(best) + 1} of {epochs}"],
                  train=len(images), test=len(tests))


class Classifier(nn.Module):
    """Encoder, pooled feature, linear head (B, C) that starts as good as zero.

    The feature is the patch mean through a LayerNorm of its own (fc_norm), in place of the
    encoder's. both (MMC): class token and patch mean side by side; our choice: after the encoder's
    norm, which stays.
    """

    def __init__(self, encoder, classes, both=False):
        super().__init__()
        width, eps = encoder.embed_dim, encoder.config["norm_eps"]
        self.encoder, self.both = encoder, both
        self.fc_norm = nn.Identity() if both else nn.LayerNorm(width, eps)
        self.head = nn.Linear(2 * width if both else width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        cls, patches = self.encoder.split(self.encoder(x))                   # (B, D), (B, N, D)
        z = patches.mean(1)
        if self.both:
            z = torch.cat([z if cls is None else cls, z], 1)                 # (B, 2D)
        return self.head(self.fc_norm(z))


def blocks_anew(text, depth):
    """ "first:2", "last:2" or None -> numbers of the blocks that are to be drawn anew."""
    found = re.fullmatch(r"(first|last):(\d+)", text or "first:0")
    n = int(found[2]) if found else -1
    if not 0 <= n <= depth:
        raise ValueError(f"--reinit {text}: give first:N or last:N with N from 0 to {depth}, the "
                         f"blocks of this encoder")
    return range(n) if found[1] == "first" else range(depth - n, depth)


def restart(encoder, anew=(), final_norm=False, size=None):
    """A copy of the encoder to train on: the blocks `anew` as before pre-training, with drop path.

    A relative position table that all blocks share becomes one for each (BEiT, SimMIM). Positions
    that pre-training kept fixed are trained, too, as MAE's code does. size: pixels a side of the
    pictures to come; positions are resampled to it here, once, so that each patch then trains its
    own.
    """
    config = {**encoder.config, "drop_path": DROP_PATH}
    config["final_norm"] &= final_norm
    state, key = encoder.state_dict(), "relative_position_bias_table"
    if config["rel_pos"] == "shared":
        config["rel_pos"] = "block"
        for i in range(encoder.depth):
            state[f"blocks.{i}.attn.{key}"] = state[f"rel_pos_bias.{key}"]
    if size not in (None, config["img_size"]):
        config["img_size"] = size
        grids = encoder.grid, (size // encoder.patch_size,) * 2
        for name, x in state.items():
            if name == "pos_embed":
                state[name] = positions.resize_positions(x, *grids, encoder.num_prefix, config["resize"])
            elif name.endswith(key):
                state[name] = positions.resize_table(x, *grids)
    copy = vit.ViT(**config)                             # drawn as the backbone draws its weights
    drawn = tuple(f"blocks.{i}." for i in anew)
    copy.load_state_dict({name: x if name.startswith(drawn) else state[name]
                          for name, x in copy.state_dict().items()})
    if copy.pos_embed is not None:
        copy.pos_embed.requires_grad_(True)
    return copy


def layer_groups(net, decay, weight_decay):
    """AdamW's groups of an `encoder` and its head. The lower a layer, the less it moves: lr times
    `factor`.

    Layer 0 embeds patches, class token and positions, layer i is block i of L, counted from 1, and
    L+1 the norm and the head: factor = decay^(L+1-layer). Vectors, class token and positions are
    not pulled to zero.
    """
    groups, top = {}, net.encoder.depth + 1
    for name, p in net.named_parameters():
        part, *rest = name.removeprefix("encoder.").split(".")
        embeds = part in ("patch_embed", "cls_token", "pos_embed")
        layer = int(rest[0]) + 1 if part == "blocks" else 0 if embeds else top
        free = p.ndim <= 1 or part in ("cls_token", "pos_embed")
        groups.setdefault((layer, free), []).append(p)
    return [dict(params=params, factor=decay**(top - layer),
                 weight_decay=0.0 if free else weight_decay)
            for (layer, free), params in groups.items()]


def simmim_lr(step, total, start, end, warmup):
    """The cosine runs from step 0 on, underneath the warm-up, which rises from `end`: at the peak
    lr steps down to where the cosine has got by then (from 5e-3 to 4.523e-3 in SimMIM's log)."""
    if step < warmup:
        return end + (start - end) * step / warmup
    return cosine(step, total, start, end)


def soft_cross_entropy(scores, targets, smoothing=0.1):
    """Summed over the batch. scores: (B, C), targets: (B, C), smoothed to 0.9 y + 0.1 / C."""
    return F.cross_entropy(scores, targets, label_smoothing=smoothing, reduction="sum")


def mixing(classes):
    """A function (x (B, 3, S, S), y (B,)) -> x mixed with its neighbours in the batch, y (B, C).

    Half of the batches are blended (mixup, share by Beta(0.8, 0.8)), the others get a box of the
    neighbour's (cutmix, area by Beta(1, 1)); the labels in proportion.
    """
    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                            v2.CutMix(alpha=1.0, num_classes=classes)])


def rand_augment(x):
    """RandAugment: twice one of 14 operations, each with probability 1/2, as timm's default.
    (B, 3, S, S) uint8 -> in [0, 1].

    The recipes say magnitude 9 of timm's 10 (m9-mstd0.5-inc1); of torchvision's bins 0 to 30 that
    is 27. What differs from timm: the strength does not vary (mstd), Posterize keeps 4 bits (timm:
    1), Invert and SolarizeAdd are missing, one of the 14 is Identity, and warps are bilinear. Our
    choice: if more than 32 images are hit a few share an operation, so that a GPU is not handed
    every picture by itself; with their signs there are no more than 23 operations, anyway.
    """
    one = v2.RandAugment(1, magnitude=27, interpolation=TF.InterpolationMode.BILINEAR,
                         fill=[round(255 * m) for m in augment.MEAN])
    x = x.clone()
    for _ in range(2):
        hit = torch.randperm(len(x))[torch.rand(len(x)) < 0.5]
        for rows in hit.to(x.device).chunk(32):
            if len(rows):                                # nobody hit: one empty chunk
                x[rows] = one(x[rows])
    return x / 255


def three_augment(x):
    """ThreeAugment (DeiT III): grey, solarised or blurred, and jitter. uint8 -> in [0, 1]."""
    x, kind = x / 255, torch.randint(3, (len(x),))
    radius, threshold = 0.1 + 1.9 * torch.rand(len(x)), torch.full((len(x),), 128 / 255)
    augment.apply(lambda x, _: augment.luma(x).expand_as(x), x, kind == 0, radius)
    augment.apply(augment.solarize, x, kind == 1, threshold)
    augment.apply(augment.blur, x, kind == 2, radius)
    order = torch.rand(len(x), 3).argsort(1)             # of brightness, contrast, saturation
    return augment.jitter(x, order, 0.7 + 0.6 * torch.rand(len(x), 3))


AUGMENT = {"RandAugment": rand_augment, "ThreeAugment": three_augment}


def erase(x, p=0.25):
    """Random erasing: a box of 2 to 33 % of the picture becomes noise, in a share p of the images.
    x is normalised, and so is the noise of each pixel."""
    size, u = x.shape[-1], torch.rand(len(x), 22)
    box = augment.crop_boxes(u, size, size, torch.tensor([0.02, 1 / 3]), torch.tensor([0.3, 1 / 0.3]))
    box[torch.rand(len(x)) >= p] = 0                     # of no height
    top, left, height, width = box.to(x.device)[:, :, None].unbind(1)        # (B, 1)
    at = torch.arange(size, device=x.device)
    rows, columns = (at >= top) & (at < top + height), (at >= left) & (at < left + width)
    inside = rows[:, None, :, None] & columns[:, None, None, :]              # (B, 1, S, S)
    return torch.where(inside, torch.randn_like(x), x)


@torch.no_grad()
def score(net, tests, model, args):
    """Top-1 and top-5 on the test images, in percent; each process looks at its share of them."""
    own = slice(distributed.rank(), None, distributed.world_size())
    some = replace(tests, labels=tests.labels[own], paths=tests.paths and tests.paths[own],
                   pixels=None if tests.paths else tests.pixels[own])
    net.eval()
    scores = []
    for x, _ in data.batches(some, model.size, args.batch_size, args.device, mean=model.mean,
                             std=model.std, workers=args.workers,
                             interpolation=model.interpolation):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            scores.append(net(x).float())
    net.train()
    percent = metrics.accuracy(torch.cat(scores), some.labels.to(args.device))
    right = torch.tensor([*percent, 1.0], dtype=torch.float64, device=args.device) * len(some)
    right = distributed.all_mean(right)
    return (right[:2] / right[2]).tolist()


# ---- a class for every pixel ---------------------------------------------------------------------

# blocks: of 12, counted from 1, in proportion for other depths. iters: of BATCH crops. selfpatch:
# as SelfPatch's released configuration of Semantic FPN, which follows XCiT's; its UPerNet has the
# same lr by our choice. mae: as MAE and BEiT fine-tune. Our choice: ASL and Park et al., who do not
# say theirs, are read as mae, and drop path is that of all recipes here.
SEGMENT = {
    "fpn": {
        "selfpatch": dict(blocks=(3, 6, 9, 12), lr=6e-5, decay=0.01, layer_decay=1.0, iters=40000)},
    "upernet": {
        "mae":       dict(blocks=(4, 6, 8, 12), lr=1e-4, decay=0.05, layer_decay=0.65,
                          iters=160000),
        "selfpatch": dict(blocks=(4, 6, 8, 12), lr=6e-5, decay=0.01, layer_decay=1.0,
                          iters=160000)}}
AUXILIARY, DROPOUT = 0.4, 0.1                            # weight of UPerNet's second loss; in heads
POOLS = 1, 2, 3, 6                                       # cells a side of UPerNet's averages
# On toy, our choice: a larger lr, few iterations. Fewer, of larger pictures, find the creature in
# the same time, but hardly which one it is.
TOY_SEGMENT = dict(lr=2e-3, iters=600)


def segmentation(model, args):
    """Semantic FPN or UPerNet (--head) on top, all weights trained: the class of every pixel.

    SelfPatch, supplement, tables 1 and 3; ASL, tables 4 and 5; Park et al., table G.1. Blocks of
    the encoder give four maps, before the final norm and without the class token; crops, resizing,
    flips and colours as in dense.linear_segmentation; scores at the original size, of whole
    pictures (fpn) or of windows (upernet: our choice for all papers). Our choices: on toy, pictures
    of the encoder's size, narrow heads, 600 iterations of a larger lr; warm-up shrinks with
    --iters; no bias decays. The processes of torchrun share crops, gradients, batch norm and test
    pictures.
    """
    dense.needs_tokens(model, args)
    head = args.head = args.head or "fpn"
    if head not in SEGMENT:
        raise ValueError(f"segmentation has no head {head}; choose --head {', '.join(SEGMENT)}")
    toy, rank, world = dense.is_toy(args), distributed.rank(), distributed.world_size()
    recipe = settings_of(args, SEGMENT[head])
    published, recipe = recipe["iters"], {**recipe, **(TOY_SEGMENT if toy else {})}
    if len(args.lr) > 1:
        raise ValueError("segmentation trains all weights, so with one --lr at a time")
    peak, iters = args.lr[0] if args.lr else recipe["lr"], args.iters or recipe["iters"]
    if BATCH % world:
        raise ValueError(f"{world} processes cannot share {BATCH} crops: take 1, 2, 4, 8 or 16")
    share = BATCH // world
    parts = -(-share // args.batch_size)                 # of a batch, if --batch-size asks for it
    if share // parts * world < 2:
        raise ValueError("batch norm needs crops to compare: --batch-size 2 or more")
    names = annotations.segmentation_classes(args.data, args.level, args.data_root)
    sizes, depth = dense.sizes_of(args, args.size or model.size), model.encoder.depth
    blocks = [max(1, round(block * depth / 12)) - 1 for block in recipe["blocks"]]
    for split in ("test", "train"):                      # what is missing is said before all work
        next(dense.mapped(args, split, sizes), None)

    torch.manual_seed(args.seed)
    net = Segmenter(model.encoder, blocks, head, len(names), sizes[0], toy).to(args.device)
    if args.device.type == "cuda":                       # quicker than BatchNorm2d, and the same
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    opt = torch.optim.AdamW(layer_groups(net, recipe["layer_decay"], recipe["decay"]),
                            betas=(0.9, 0.999), fused=True)
    progress = Progress(model, args, net, opt)
    parallel = distributed.wrap_ddp(net, args.device)
    warmup = max(1, WARMUP * iters // published)
    steps = range(progress.step, iters)
    batches = dense.crops(model, args, sizes, names, steps, rank=rank, world=world)
    losses, say = [], min(1000, max(1, iters // 10))
    for step, batch in progress.steps(batches, iters):
        x, y = (t.tensor_split(parts) for t in batch)
        torch.manual_seed(rng.key(args.seed, "segmentation", step, rank))    # dropout, drop path
        lr = dense.poly(step, iters, peak, warmup)
        for group in opt.param_groups:
            group["lr"] = lr * group["factor"]
        for number, (crops, labels) in enumerate(zip(x, y), 1):  # (b, 3, S, S), (b, S, S)
            parallel.require_backward_grad_sync = number == parts            # DDP's no_sync
            with torch.autocast(args.device.type, torch.bfloat16,
                                enabled=args.precision == "bf16"):
                logits, *second = parallel(crops)
            loss = dense.segmentation_loss(logits, labels)
            for logits in second:                        # UPerNet's auxiliary head
                loss = loss + AUXILIARY * dense.segmentation_loss(logits, labels)
            (loss * len(crops) / share).backward()
            losses.append(loss.detach())
        opt.step(), opt.zero_grad()

        due = (step + 1) % say == 0 or step + 1 == iters
        if due or step % 50 == 0:                        # now and then: a GPU has to be waited for
            mean = distributed.all_mean(torch.stack(losses).mean()).item()
            if not math.isfinite(mean):
                raise ValueError(f"{model.name}: the loss is not finite by step {step + 1} of "
                                 f"{iters} (lr {lr:.1e}); try --precision fp32, a smaller --lr or "
                                 f"an earlier checkpoint")
            progress.bar.set_postfix(loss=f"{mean:.3f}")
        if due:
            tqdm.write(f"step {step + 1:,}/{iters:,}  loss {mean:.3f}  lr {lr:.1e}  eta "
                       f"{progress.eta(step)}", file=sys.stdout)
            losses = []

    def predict(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return net(x)[0][:, None]                    # (B, 1 head, C, H, W)

    net.eval()
    view = sizes if head == "upernet" else (sizes[3][0], sizes[3][0], *sizes[2:])    # one window
    own = islice(dense.mapped(args, "test", sizes), rank, None, world)
    [counts], rows, number = dense.score_segmentation(predict, own, names, model, args, view,
                                                      8 if args.show else 0)
    counts, number = (distributed.all_mean(n) * world for n in (
        counts.double(), torch.tensor(number, dtype=torch.float64)))
    if rows and rank == 0:
        dense.contact_sheet(rows, dense.picture_of(model, args))
    progress.done()
    return report(
        {head: dense.percent(counts)},
        f"{NAMES[head]}, fine-tuned end to end, recipe {args.recipe}, {len(names)} classes; blocks "
        f"{' '.join(str(b + 1) for b in blocks)} of {depth} before the final norm; crops of "
        f"{sizes[0]} px, {iters:,} iterations of {BATCH} (the paper's: {published:,}), AdamW, lr "
        f"{peak:g}, weight decay {recipe['decay']}, layer decay {recipe['layer_decay']}, drop path "
        f"{DROP_PATH}; " + ("whole pictures" if head == "fpn" else
                            f"windows of {sizes[0]} px, stride {sizes[1]}") +
        "; a ratio of sums at the original size",
        [f"{model.name}: batch norm saw {share // parts * world} crops at a time, not {BATCH}"] * (
            parts > 1),
        test=int(number))


class Segmenter(nn.Module):
    """Encoder and head: pictures (B, 3, H, W) of any size -> [logits (B, C, H, W), ...]; the second
    ones are an auxiliary head's, in training.

    blocks: four numbers from 0. Sides that are no multiple of the patch are padded with 0, and the
    logits of the padding cut off.
    """

    def __init__(self, encoder, blocks, head, classes, crop, narrow=False):
        super().__init__()
        p, width = encoder.patch_size, encoder.embed_dim
        self.encoder, self.blocks = restart(encoder, size=-(-crop // p) * p), blocks
        if head == "fpn":
            self.head = SemanticFPN(width, classes, **dict(neck=64, channels=32) if narrow else {})
        else:
            self.head = UPerNet(width, classes, p, **dict(channels=64, aux=32) if narrow else {})

    def forward(self, x):
        p, (height, width) = self.encoder.patch_size, x.shape[2:]
        x = F.pad(x, (0, -width % p, 0, -height % p))
        outputs, _ = self.encoder.layers(x, self.blocks, norm=False)
        maps = [self.encoder.split(z)[1].transpose(1, 2).unflatten(2, (x.shape[2] // p, -1))
                for z in outputs]                                            # (B, D, h, w)
        return [like(logits.float(), x)[..., :height, :width] for logits in self.head(maps)]


class SemanticFPN(nn.Module):
    """Kirillov et al., 2019: four maps (B, D, h, w) of one size -> [logits (B, C, h, w)].

        block 3 -1x1- + -3x3- conv ------------------------------- + - dropout - 1x1
        block 6 -1x1- + -3x3- conv x2 ---------------------------- |
        block 9 -1x1- + -3x3- conv x2 conv x2 -------------------- |
        block 12 1x1- + -3x3- conv x2 conv x2 conv x2 ------------ |

    + on the left: from the bottom up, each adds the ones below; x2: upsampled. The head was made
    for maps of strides 4, 8, 16, 32; all of a plain ViT's have the patch's, and are enlarged and
    shrunk again as if they had not (SelfPatch's configuration).
    """

    def __init__(self, width, classes, neck=256, channels=128):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, neck, 1) for _ in range(4))
        self.smooth = nn.ModuleList(nn.Conv2d(neck, neck, 3, padding=1) for _ in range(4))
        for layer in (*self.laterals, *self.smooth):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.levels = nn.ModuleList([conv(neck, channels, 3)])
        for count in (1, 2, 3):
            layers = [(conv(channels if i else neck, channels, 3),
                       nn.Upsample(scale_factor=2, mode="bilinear")) for i in range(count)]
            self.levels.append(nn.Sequential(*sum(layers, ())))
        self.classify = classifier(channels, classes)

    def forward(self, maps):
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        for i in (2, 1, 0):
            maps[i] = maps[i] + maps[i + 1]
        maps = [level(smooth(x)) for level, smooth, x in zip(self.levels, self.smooth, maps)]
        return [self.classify(sum(like(x, maps[0]) for x in maps))]


class UPerNet(nn.Module):
    """Xiao et al., 2018: four maps (B, D, h, w) of one size -> [logits at stride 4]; in training
    also those of an auxiliary head (a fully convolutional one) on the map at stride 16.

        stride 4  -1x1- + -3x3-+
        stride 8  -1x1- + -3x3-+
        stride 16 -1x1- + -3x3-+
        stride 32 pooled, 3x3 -+- 3x3 - dropout - 1x1

    + on the left: each adds the coarser one below, enlarged. `pyramid` makes the strides.
    """

    def __init__(self, width, classes, patch_size=16, channels=512, aux=256):
        super().__init__()
        self.pyramid = pyramid(width, patch_size)
        self.pools = nn.ModuleList(conv(width, channels, 1) for _ in POOLS)
        self.context = conv(width + len(POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.fuse = conv(4 * channels, channels, 3)
        self.classify = classifier(channels, classes)
        self.auxiliary = nn.Sequential(conv(width, aux, 3), classifier(aux, classes))

    def forward(self, maps):
        maps = [level(x) for level, x in zip(self.pyramid, maps)]
        top = maps[3]
        pooled = [like(pool(F.adaptive_avg_pool2d(top, n)), top)
                  for n, pool in zip(POOLS, self.pools)]
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        levels.append(self.context(torch.cat([top, *pooled], 1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + like(levels[i + 1], levels[i])
        levels = [*(smooth(x) for smooth, x in zip(self.smooth, levels)), levels[3]]
        logits = self.classify(self.fuse(torch.cat([like(x, levels[0]) for x in levels], 1)))
        return [logits, self.auxiliary(maps[2])] if self.training else [logits]


NAMES = {"fpn": "Semantic FPN", "upernet": "UPerNet"}


def pyramid(width, patch_size=16):
    """Four modules that make maps of strides 4, 8, 16, 32 of a plain ViT's (B, D, h, w), as BEiT's
    code does for patches of 16 and 8. Our choice: of other patches as of 16."""
    def twice():
        return nn.ConvTranspose2d(width, width, 2, 2)

    if patch_size == 8:
        return nn.ModuleList([twice(), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)])
    return nn.ModuleList([nn.Sequential(twice(), BatchNorm2d(width), nn.GELU(), twice()),
                          twice(), nn.Identity(), nn.MaxPool2d(2)])


class BatchNorm2d(distributed.BatchNorm):
    """Of maps (B, D, h, w): over the crops of all processes."""

    def forward(self, x):
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


def conv(width, out, size):
    """Convolution that keeps h and w, batch norm, ReLU."""
    layer = nn.Conv2d(width, out, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, BatchNorm2d(out), nn.ReLU())


def classifier(width, classes):
    """Dropout of whole channels, and a linear layer for every pixel."""
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(DROPOUT), layer)


def like(x, other):
    """Maps (B, D, h, w) at the size of others, bilinear."""
    return F.interpolate(x, other.shape[2:], mode="bilinear", align_corners=False)
