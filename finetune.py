"""Fine-tuning: how good a start was the pre-training, if all weights may move?

    python evaluate.py --task finetune --recipe simmim --checkpoint out/simmim-toy
    python evaluate.py --task finetune --reinit last:2          # where does what was learned sit?
"""
import math
import re
import sys
import time
from dataclasses import replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
import metrics
import rng
import training
import vit
from features import labelled, settings_of, view
from metrics import report

# B images, S pixels a side, C classes, D width

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
LAYER_DECAY, WEIGHT_DECAY, DROP_PATH = 0.65, 0.05, 0.1   # of all three recipes


def finetune(model, args):
    """All weights are trained on as a classifier: how good a start was the pre-training?

    With --reinit some blocks forget first: where does what was learned sit? (Park et al., F.3)
    The papers report the best epoch on the test images, which flatters: the last one stands beside.
    """
    recipe, both = settings_of(args, FINETUNE), args.recipe == "mmc"
    if both and args.data != "imagenet":
        recipe = {**recipe, **MMC_ELSEWHERE}
    if not model.encoder:
        raise ValueError("finetune trains an encoder, and pixels have none: leave out that "
                         "--baseline, or take untrained")
    anew = blocks_anew(args.reinit, model.encoder.depth)
    (images, classes), (tests, _) = (labelled(model, args, s) for s in ("train", "test"))

    # Our choice for small sets: a batch of at most 1/64 of the images, so that they get enough
    # steps, and lr down with the root of it, as suits AdamW; in proportion, little would move.
    rank, world = training.rank(), training.world_size()
    size = min(recipe["batch"], max(16, len(images) // 64)) // world * world
    loader = data.Loader(images, [data.View(model.size)], size, args.seed, args.device,
                         args.workers, rank, world)      # crop of 8 to 100 %, bicubic, and flip
    epochs = args.epochs or recipe["epochs"]
    total = epochs * len(loader)
    warmup = total * recipe["warmup"] // recipe["epochs"]
    peak = recipe["lr"] * recipe["batch"] / recipe["per"] * math.sqrt(size / recipe["batch"])
    schedule, end = ((simmim_lr, 2.5e-7 / 1.25e-3 * peak) if args.recipe == "simmim" else
                     (training.cosine, 1e-6))            # 1e-6 both, at the recipe's batch

    torch.manual_seed(args.seed)
    net = Classifier(restart(model.encoder, anew, final_norm=both), classes, both).to(args.device)
    opt = torch.optim.AdamW(layer_groups(net, LAYER_DECAY, WEIGHT_DECAY), betas=(0.9, 0.999),
                            fused=True)
    parallel = training.share_gradients(net, args.device)
    augment, mix = AUGMENT[recipe["augment"]], mixing(classes)
    bar = tqdm(total=total, desc=model.name, leave=False, dynamic_ncols=True,
               disable=rank > 0 or not sys.stderr.isatty())
    curve, losses, begin = [], [], time.perf_counter()   # curve: (top-1, top-5) of every epoch
    for step, batch in enumerate(islice(loader.batches(), total)):
        torch.manual_seed(rng.key(args.seed, "finetune", step, rank))        # what torchvision uses
        lr = schedule(step, total, peak, end, warmup)
        for group in opt.param_groups:
            group["lr"] = lr * group["factor"]
        x = augment(data.denormalize(batch.views[0]))                        # (B, 3, S, S)
        x = erase(data.normalize(x, model.mean, model.std))
        x, y = mix(x, batch.label)                                           # y: (B, C), sums to 1
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
        bar.update()

        ended = (step + 1) % len(loader) == 0
        if ended or step % 50 == 0:                      # now and then: a GPU has to be waited for
            mean = training.all_mean(torch.stack(losses).mean()).item()
            if not math.isfinite(mean):
                raise ValueError(f"{model.name}: the loss is not finite by step {step + 1} of "
                                 f"{total} (lr {lr:.1e}); try --precision fp32, or an earlier "
                                 f"checkpoint")
            bar.set_postfix(loss=f"{mean:.3f}")
        if ended:
            curve.append(score(net, tests, model, args))
            left = (time.perf_counter() - begin) * (total - step - 1) / (step + 1)
            tqdm.write(f"epoch {len(curve)}/{epochs}  loss {mean:.3f}  lr {lr:.1e}  top-1 "
                       f"{curve[-1][0]:.1f}%  eta {tqdm.format_interval(left)}", file=sys.stdout)
            losses = []
    bar.close()

    best, last = max(curve), curve[-1]
    row = {"top-1": best[0], "top-5": best[1], "last epoch": last[0], "last top-5": last[1]}
    start = f", {args.reinit} blocks drawn anew" if args.reinit else ""
    small = " (both our choice, for few images)" if size < recipe["batch"] // world * world else ""
    return report({"cls+pat" if both else "pat": row},
                  f"fine-tuned end to end, recipe {args.recipe}{start}: AdamW, batch {size}, lr "
                  f"{peak:.2g}{small}, layer decay {LAYER_DECAY}, {epochs} epochs, "
                  f"{recipe['augment']}, mixup, cutmix, erasing, drop path {DROP_PATH}; top-1, "
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


def restart(encoder, anew=(), final_norm=False):
    """A copy of the encoder to train on: the blocks `anew` as before pre-training, with drop path.

    A relative position table that all blocks share becomes one for each (BEiT, SimMIM). Positions
    that pre-training kept fixed are trained, too, as MAE's code does.
    """
    config = {**encoder.config, "drop_path": DROP_PATH}
    config["final_norm"] &= final_norm
    state, key = encoder.state_dict(), "relative_position_bias_table"
    if config["rel_pos"] == "shared":
        config["rel_pos"] = "block"
        for i in range(encoder.depth):
            state[f"blocks.{i}.attn.{key}"] = state[f"rel_pos_bias.{key}"]
    copy = vit.ViT(**config)                             # drawn as the backbone draws its weights
    new = tuple(f"blocks.{i}." for i in anew)
    copy.load_state_dict({name: x if name.startswith(new) else state[name]
                          for name, x in copy.state_dict().items()})
    if copy.pos_embed is not None:
        copy.pos_embed.requires_grad_(True)
    return copy


def layer_groups(net, decay, weight_decay):
    """AdamW's groups of a Classifier. The lower a layer, the less it moves: lr times `factor`.

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
    return training.cosine(step, total, start, end)


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
    """RandAugment: two of 14 operations on every image. (B, 3, S, S) uint8 -> in [0, 1].

    The recipes say magnitude 9 of timm's 10 (m9-mstd0.5-inc1); of torchvision's bins 0 to 30 that
    is 27. Its strength does not vary (mstd), and posterize and solarize differ a little from timm.
    Our choice: in a batch above 32 a few images share an operation, so that a GPU is not handed
    every picture by itself; with their signs there are no more than 23 operations, anyway.
    """
    one = v2.RandAugment(1, magnitude=27, interpolation=TF.InterpolationMode.BILINEAR,
                         fill=[round(255 * m) for m in data.MEAN])
    x = x.clone()
    for _ in range(2):
        for rows in torch.randperm(len(x)).to(x.device).chunk(32):
            x[rows] = one(x[rows])
    return x / 255


def three_augment(x):
    """ThreeAugment (DeiT III): grey, solarised or blurred, and jitter. uint8 -> in [0, 1]."""
    x, kind = x / 255, torch.randint(3, (len(x),))
    radius, threshold = 0.1 + 1.9 * torch.rand(len(x)), torch.full((len(x),), 128 / 255)
    data.apply(lambda x, _: data.luma(x).expand_as(x), x, kind == 0, radius)
    data.apply(data.solarize, x, kind == 1, threshold)
    data.apply(data.blur, x, kind == 2, radius)
    order = torch.rand(len(x), 3).argsort(1)             # of brightness, contrast, saturation
    return data.jitter(x, order, 0.7 + 0.6 * torch.rand(len(x), 3))


AUGMENT = {"RandAugment": rand_augment, "ThreeAugment": three_augment}


def erase(x, p=0.25):
    """Random erasing: a box of 2 to 33 % of the picture becomes noise, in a share p of the images.
    x is normalised, and so is the noise of each pixel."""
    size, u = x.shape[-1], torch.rand(len(x), 22)
    box = data.crop_boxes(u, size, size, torch.tensor([0.02, 1 / 3]), torch.tensor([0.3, 1 / 0.3]))
    box[torch.rand(len(x)) >= p] = 0                     # of no height
    top, left, height, width = box.to(x.device)[:, :, None].unbind(1)        # (B, 1)
    at = torch.arange(size, device=x.device)
    rows, columns = (at >= top) & (at < top + height), (at >= left) & (at < left + width)
    inside = rows[:, None, :, None] & columns[:, None, None, :]              # (B, 1, S, S)
    return torch.where(inside, torch.randn_like(x), x)


@torch.no_grad()
def score(net, tests, model, args):
    """Top-1 and top-5 on the test images, in percent; each process looks at its share of them."""
    own = slice(training.rank(), None, training.world_size())
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
    right = training.all_mean(right)
    return (right[:2] / right[2]).tolist()
