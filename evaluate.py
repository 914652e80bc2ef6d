"""Probes: what did a checkpoint, ours or an official one, learn? Features in, a number out.

    python evaluate.py                                        # kNN of the newest run in out/
    python evaluate.py --task linear --checkpoint out/mmc-toy mae_pretrain_vit_base.pth
    python evaluate.py --task part_retrieval --baseline pixels untrained --show

Each model is a few rows of the printed table and one line of results.jsonl by its checkpoint.

A probe is one function that reads like its protocol, task(model, args) -> report(rows, protocol),
and one line in TASKS. It gets features from `features` (one pass over a split) or `extract` (one
pass over any batches), scores from metrics.py, and its own flags from a line in FLAGS.
"""
import argparse
import functools
import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

import data
import metrics
import readers
import rng
import training
import vit

# B images, N patches, D width, S pixels a side, C classes, L learning rates, P key-points


def natural(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


FLAGS = {      # name: (type or choices, default, help); a list takes several values
    "task":       (str, "knn", "what to measure, see below"),
    "checkpoint": (str, [], "files or folders of runs; none: the newest run in --out"),
    "baseline":   (("pixels", "untrained"), [], "floors: raw pixels, a ViT with random weights"),
    "branch":     (("teacher", "student", "base", "momentum"), None, "which weights, if several"),
    "data":       (str, None, "data set or folder; none: what the checkpoint was trained on"),
    "data-root":  (str, None, "where data sets lie; none: $DATA_ROOT, else datasets/"),
    "size":       (natural, None, "pixels a side of the input; none: as in training"),
    "limit":      (natural, None, "use so many images of each split; none: all"),
    "out":        (str, "out", "folder of the runs, and for pictures"),
    "json":       (str, None, "file to append to; none: results.jsonl by the checkpoint"),
    "seed":       (int, 0, "of what a probe draws, and of untrained weights"),
    "device":     (str, "auto", "cuda, cuda:1, cpu or auto"),
    "precision":  (str, "auto", "of the encoder: bf16, fp32; auto: bf16 where the device has it"),
    "batch-size": (natural, 256, "images per forward"),
    "workers":    (int, 2, "processes that decode images"),
    "feature":    (("cls", "pat", "hyber"), None, "only this one; none: what the protocol says"),
    "k":          (natural, [10, 20], "knn: numbers of neighbours"),
    "recipe":     (("mae", "dino", "park", "simmim", "mmc"), "mae", "whose settings; linear: mae, "
                   "dino, park; finetune: mae, simmim, mmc"),
    "epochs":     (natural, None, "linear, finetune: of the training; none: the recipe's"),
    "reinit":     (str, None, "finetune: first:N or last:N, so many blocks start anew"),
    "crop":       (("code", "paper"), "code", "part_retrieval: geometry, see part_crops"),
    "parts":      (str, [], "part_retrieval: names of key-points, or all; none: the study's"),
    "show":       (bool, False, "part_retrieval: write a contact sheet of the crops to --out"),
}

# ---- features ------------------------------------------------------------------------------------


def pooled(encoder, x):
    """(B, 3, S, S) -> three features of a picture, after the final norm: {name: (B, D or 2D)}.

    cls: class token. pat: mean of the patch tokens. hyber: both, each brought to length 1 first, as
    the shorter one would hardly count otherwise (the name is MMC's, the scaling our choice).
    """
    cls, patches = encoder.split(encoder(x))
    pat = patches.float().mean(1)
    cls = pat if cls is None else cls.float()            # no class token: the mean stands in for it
    return {"cls": cls, "pat": pat, "hyber": torch.cat([F.normalize(cls), F.normalize(pat)], 1)}


def last_blocks(encoder, x):
    """What DINO's linear probe sees, after the final norm. Narrow models (ViT-S): class tokens of
    the last four blocks. Wide ones (ViT-B): class token and patch mean of the last block."""
    if encoder.embed_dim >= 768:
        z = pooled(encoder, x)
        return {"cls+pat": torch.cat([z["cls"], z["pat"]], 1)}
    outputs, _ = encoder.layers(x, range(max(0, encoder.depth - 4), encoder.depth))
    split = [encoder.split(tokens) for tokens in outputs]
    return {"4 x cls": torch.cat([pat.mean(1) if cls is None else cls for cls, pat in split], 1)}


def pixels(_, x):
    """The floor below every encoder: the picture itself, as means over a 32 x 32 grid at most."""
    x = F.interpolate(x, (32, 32), mode="area") if x.shape[-1] > 32 else x
    return {"pixels": x.flatten(1)}


@torch.no_grad()
def extract(model, batches, args, names=("cls", "pat", "hyber"), tokens=pooled):
    """One pass over (x (B, 3, S, S), numbers (B,)) -> {name: (n, D) float32}, numbers (n,).

    numbers: what goes with the images, such as labels or their place in the data set. names: the
    features to keep; of a model that has none of them (pixels have no class token) all it has.
    """
    tokens, found, numbers = tokens if model.encoder else pixels, {}, []
    for x, number in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = tokens(model.encoder, x)
        for name in [name for name in z if name in names] or z:
            found.setdefault(name, []).append(z[name].float())
        numbers.append(number.to(x.device))
    if not numbers:
        raise ValueError(f"{args.task}: nothing to look at; raise --limit or change --data")
    found = {name: torch.cat(z) for name, z in found.items()}
    if not all(z.isfinite().all() for z in found.values()):
        raise ValueError(f"{model.name}: its features are not finite; try --precision fp32, or an "
                         f"earlier checkpoint")
    return found, torch.cat(numbers)


@functools.lru_cache                                     # several models look at the same images
def load(name, root, split, size, limit, device):
    """data.load; of a folder without train/ and val/, every fifth image is the test split."""
    images = data.load(name, root, split, size, limit, device)
    if images.split != "all":
        return images
    chosen = (torch.arange(len(images)) % 5 == 0) == (split == "test")
    print(f"{name} has no train/ and val/: {split} is {chosen.sum()} of its {len(images)} images")
    return replace(images, split=split, paths=[p for p, c in zip(images.paths, chosen) if c],
                   labels=None if images.labels is None else images.labels[chosen])


def labelled(model, args, split):
    """A split whose images have labels, and the number of classes."""
    images = load(args.data, args.data_root, split, model.size, args.limit, args.device)
    if images.labels is None:
        raise ValueError(f"this data set has no labels ({args.data}), and {args.task} needs them: "
                         f"choose another --data, or give each class a sub-folder of its own")
    return images, len(images.classes or range(int(images.labels.max()) + 1))


def features(model, args, split, names=("cls", "pat", "hyber"), tokens=pooled, mirror=False):
    """One pass over a split in the standard test view -> {name: (n, D)}, labels (n,), classes C.

    mirror: encode the mirror image of every picture, too -> {name: (n, 2, D)}.
    """
    images, classes = labelled(model, args, split)
    batches = data.batches(images, model.size, args.batch_size, args.device, mean=model.mean,
                           std=model.std, workers=args.workers, interpolation=model.interpolation)
    if mirror:
        batches = ((torch.cat([x, x.flip(-1)]), index.repeat(2)) for x, index in batches)
    found, index = extract(model, batches, args, names, tokens)
    if mirror:                                           # an image's two rows become neighbours
        order = index.argsort(stable=True)
        found = {name: z[order].view(-1, 2, z.shape[1]) for name, z in found.items()}
        index = index[order][::2]
    return found, images.labels.to(index.device)[index], classes


def view(model, args):
    """The standard test view in words: files lose their rim, small resident sets are seen whole."""
    files = load(args.data, args.data_root, "test", model.size, args.limit, args.device).paths
    rim = f"centre of short side {model.size * 256 // 224}" if files else "whole picture"
    return f"{rim} at {model.size} px"


def settings_of(args, recipes):
    """The settings of --recipe. ValueError if the task has none of that name."""
    if args.recipe not in recipes:
        raise ValueError(f"{args.task} has no recipe {args.recipe}; choose --recipe "
                         f"{', '.join(recipes)}")
    return recipes[args.recipe]


def report(rows, protocol, notes=(), **images):
    """What a probe returns. rows: {feature: {column: percent}}; images: their number, by role."""
    return SimpleNamespace(rows=rows, protocol=protocol, notes=list(notes), images=images)


# ---- probes --------------------------------------------------------------------------------------


def knn(model, args):
    """Nearest neighbours vote: the train split is the bank, the test split asks. No training."""
    names = [args.feature] if args.feature else ["cls", "pat", "hyber"]
    bank, labels, classes = features(model, args, "train", names)
    queries, truth, _ = features(model, args, "test", names)
    k = sorted({min(n, len(labels)) for n in args.k})
    rows = {}
    for name, z in bank.items():
        predicted = metrics.knn(z, labels, queries[name], k, tau=0.07, classes=classes)
        rows[name] = {f"k={n}": 100 * (predicted[n] == truth).double().mean().item() for n in k}
    short = [f"the bank has {len(labels)} images: k ends there"] if max(args.k) > max(k) else []
    return report(rows, "top-1; the k nearest by cosine vote with weight exp(cosine / 0.07); last "
                  f"block, after the final norm; {view(model, args)}", short,
                  train=len(labels), test=len(truth))


# lr: at batch 256, else in proportion. mae, dino: as their released code. park: batch and epochs of
# Park et al., table A.1; its lr 1 with decay 0.05 would shrink weights by 5 % a step: lr is ours.
RECIPES = {
    "mae":  dict(lr=0.1,   batch=16384, epochs=90,  warmup=10, lars=True,  standardise=True),
    "dino": dict(lr=0.001, batch=1024,  epochs=100, warmup=0,  lars=False, standardise=False),
    "park": dict(lr=0.1,   batch=1024,  epochs=50,  warmup=0,  lars=False, standardise=True)}
SWEEP = (0.3, 1, 3, 10, 30, 100, 300)                    # times the recipe's lr: a head for each


def linear(model, args):
    """Linear classifier on frozen features: which classes are there for the taking?

    The papers show the encoder a new random crop of every image in every epoch. Our choice: it sees
    the test view and its mirror image, once, and each epoch draws one of the two: one pass instead
    of 90, and numbers a little below the papers' protocol, for all models alike. Also ours: a batch
    of at most 1/32 of the images, so that a small set gets enough steps; standardising by all
    training features, which is what the recipes' BatchNorm without affine converges to; cosine per
    step; a sweep of lr. The papers report the best epoch on the test images. Here a tenth of the
    training images is held out to choose lr and epoch, and the test images are looked at once.
    """
    recipe = settings_of(args, RECIPES)
    epochs = args.epochs or recipe["epochs"]
    tokens = last_blocks if args.recipe == "dino" and not args.feature else pooled
    names = [args.feature or "cls"]                      # last_blocks has one, under its own name
    found, y, classes = features(model, args, "train", names, tokens, mirror=True)
    tests, truth, _ = features(model, args, "test", names, tokens)
    [(name, x)], [x_test] = found.items(), tests.values()                   # (n, 2, D), (m, D)
    if recipe["standardise"]:
        var, mean = torch.var_mean(x, dim=(0, 1))
        x, x_test = (x - mean) * (var + 1e-6).rsqrt(), (x_test - mean) * (var + 1e-6).rsqrt()
    best, last, lr, epoch = train_heads(x, y, classes, recipe, epochs, args.seed)
    top1, top5 = metrics.accuracy(F.linear(x_test, *best), truth)
    end = metrics.accuracy(F.linear(x_test, *last), truth)[0]
    how = ("LARS" if recipe["lars"] else "SGD") + ", standardised" * recipe["standardise"]
    return report({name: {"top-1": top1, "top-5": top5, "last epoch": end}},
                  f"linear head, recipe {args.recipe} ({how}, {epochs} epochs), after the final "
                  f"norm; {view(model, args)} and its mirror image, no random crops; lr and epoch "
                  f"chosen on a held-out tenth", train=len(y), test=len(truth),
                  notes=[f"{model.name}: base lr {lr:.2g}, epoch {epoch} of {epochs}"])


@torch.no_grad()                                         # the gradient stands in the loop
def train_heads(x, y, classes, recipe, epochs, seed):
    """Trains a linear head for each lr of SWEEP, side by side on the same batches.

    x: (n, V, D) features of V views of each image, y: (n,). Returns (weight (C, D), bias (C,)) of
    the head and epoch with the best accuracy on a held-out tenth of the images, the same head after
    the last epoch, its base lr, and that epoch (counted from 1).
    """
    (n, views, width), heads, g = x.shape, len(SWEEP), rng.generator(seed, "linear")
    if n < 10:
        raise ValueError(f"linear holds out a tenth of the training images: {n} are too few")
    held, train = torch.randperm(n, generator=g).to(x.device).tensor_split([n // 10])
    batch = max(1, min(recipe["batch"], len(train) // 32))
    total = epochs * -(-len(train) // batch)
    warmup = total * recipe["warmup"] // recipe["epochs"]
    lrs = torch.tensor(SWEEP, device=x.device) * recipe["lr"] * batch / 256
    weight = 0.01 * torch.randn(classes, width, generator=g).to(x.device).repeat(heads, 1, 1)
    bias = torch.zeros(heads, classes, 1, device=x.device)                  # (L, C, 1)
    momenta = torch.zeros_like(weight), torch.zeros_like(bias)              # (L, C, D), (L, C, 1)

    def scores(x):                                                          # (B, D) -> (B, L, C)
        return (x @ weight.flatten(0, 1).T + bias.flatten()).view(-1, heads, classes)

    step, best = 0, (-1,)
    for epoch in range(1, epochs + 1):
        for index in train[torch.randperm(len(train), generator=g).to(x.device)].split(batch):
            shown = torch.randint(views, (len(index),), generator=g).to(x.device)
            seen, labels = x[index, shown], F.one_hot(y[index], classes)[:, None]
            slope = (scores(seen).softmax(2) - labels) / len(index)         # of the cross-entropy
            grads = (slope.flatten(1).T @ seen).view_as(weight), slope.sum(0)[..., None]
            lr = lrs * training.cosine(step, total, 1.0, 0.0, warmup)
            descend((weight, bias), grads, momenta, lr, recipe["lars"])
            step += 1
        right = sum((scores(x[index, 0]).argmax(2) == y[index, None]).sum(0)
                    for index in held.split(8192))                          # (L,)
        if right.max() > best[0]:
            head = int(right.argmax())
            best = right.max(), head, epoch, weight[head].clone(), bias[head, :, 0].clone()
    _, head, epoch, *winner = best
    return winner, (weight[head], bias[head, :, 0]), SWEEP[head] * recipe["lr"], epoch


def descend(params, grads, momenta, lrs, lars, trust=0.001):
    """A step of SGD with momentum 0.9, in place, for heads side by side: params (L, ...), lrs (L,).

    lars (You et al., 2017; as in MAE): the gradient of a weight is first brought to `trust` times
    the length of the weight, so that lr is a relative step whatever the scale of the loss. Biases
    (last axis 1) go without.
    """
    for p, grad, m in zip(params, grads, momenta):
        if lars and p.shape[-1] > 1:
            size, slope = p.flatten(1).norm(dim=1), grad.flatten(1).norm(dim=1)
            scale = torch.where((size > 0) & (slope > 0), trust * size / slope, 1.0)
            grad = grad * scale[:, None, None]
        m.mul_(0.9).add_(grad)
        p.sub_(lrs[:, None, None] * m)


# ---- fine-tuning ---------------------------------------------------------------------------------

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


# ---- retrieval -----------------------------------------------------------------------------------


def part_retrieval(model, args):
    """Do crops of one part find each other, over poses and species? Each asks for all others.

    From the part-aware study, table 4 (left): does the feature of a crop say *what it shows*?
    """
    if args.data not in KEYPOINTS:
        raise ValueError(f"part_retrieval reads no key-points of {args.data}; choose --data "
                         f"{' or '.join(KEYPOINTS)}")
    split, at_most, parts, source = KEYPOINTS[args.data]
    known = readers.part_names(args.data)
    parts = known if args.parts == ["all"] else tuple(dict.fromkeys(args.parts)) or parts
    for part in parts:
        if part not in known:
            raise ValueError(f"{args.data} has no part {part!r}{training.nearest(part, known)}")

    def crops():
        items = readers.keypoints(args.data, args.data_root, split, args.limit or at_most)
        return part_crops(items, known, parts, model.size, args.crop)

    names = [args.feature] if args.feature else ["cls", "pat"]
    found, labels = extract(model, crop_batches(crops(), model, args), args, names)
    if args.show:
        contact_sheet(crops(), parts, Path(args.out) / f"part_crops-{args.data}.png")
    rows, chance = {}, 100 * metrics.chance(labels).nanmean().item()
    for name, z in found.items():
        ap = metrics.retrieval(z, labels)
        mean, by_part = ap.nanmean().item(), metrics.class_means(ap, labels).nanmean().item()
        rows[name] = {"AP": 100 * mean, "AP by part": 100 * by_part, "chance": chance}
    side = {"code": "2 round(d/4), d to the nearest of these on the same object",
            "paper": "d to the nearest of all key-points"}
    return report(rows, f"average precision by cosine, query left out; last block, after the final "
                  f"norm; visible {', '.join(parts)} of {source}; squares, side {side[args.crop]}, "
                  f"kept if 20 < d/2 < 1000 px, resized to {model.size} px",
                  crops=len(labels))


KEYPOINTS = {  # data set: split, images at most, the study's parts, what the protocol says of it
    "toy": ("test", 1000, ("head", "leg", "wing", "tail"), "test creatures drawn at 256 px"),
    "toy-scenes": ("test", 1000, ("head", "leg", "wing", "tail"), "test scenes drawn at 256 px"),
    "cub": (None, None, ("right_eye", "right_leg", "left_wing", "tail"), "CUB, train and test"),
    "coco": ("train", None, ("nose", "right_wrist", "left_ankle"), "persons of COCO train2017")}


def part_crops(items, names, parts, size, rule="code"):
    """Yields (square around a part (3, size, size) uint8, the part's position in `parts`).

    items: as from readers.keypoints, names: of their P key-points; only v = 2 counts as visible.
    The study's numbers were made with its released code ("code"): d is the smallest non-zero
    distance to another *chosen* visible part of the same object, the side 2 round(d/4); so an
    object needs two of them. The text ("paper") says side d, over all visible key-points of the
    image. Both: kept if 20 < d/2 < 1000 px of the original; what lies outside is black.
    """
    chosen = torch.tensor([name in parts for name in names])
    for item in items:
        visible = item.points[..., 2] == 2                                      # (K, P)
        for k, i in (visible & chosen).nonzero().tolist():
            point = item.points[k, i, :2]
            others = (item.points[k, visible[k] & chosen] if rule == "code" else
                      item.points[visible])[:, :2]
            distances = (others - point).norm(dim=1)
            d = min(distances[distances > 0].tolist(), default=0)               # alone: not kept
            if 20 < d / 2 < 1000:
                side = 2 * round(d / 4) if rule == "code" else round(d)
                x, y = (point - side / 2).round().int().tolist()
                crop = TF.crop(item.image, y, x, side, side)                    # fills with black
                crop = TF.resize(crop, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
                yield crop, parts.index(names[i])


def crop_batches(crops, model, args):
    """(crop (3, S, S) uint8, label) one by one -> batches (B, 3, S, S) normalised, labels (B,)."""
    crops = iter(crops)
    while batch := list(islice(crops, args.batch_size)):
        x, labels = zip(*batch)
        x = torch.stack(x).to(args.device).float() / 255
        yield data.normalize(x, model.mean, model.std), torch.tensor(labels)


def contact_sheet(crops, parts, path, across=16):
    """Writes a PNG with the first crops of each part in a row: is the wing on the wing?"""
    rows = [[] for _ in parts]
    for crop, label in crops:
        rows[label].append(crop)
        if min(map(len, rows)) == across:
            break
    rows = [(row + [torch.zeros_like(crop)] * across)[:across] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.stack(sum(rows, [])) / 255, path, nrow=across)
    print(f"{path}: {', '.join(parts)}, a row each")


TASKS = {
    "knn": knn,
    "linear": linear,
    "finetune": finetune,
    "part_retrieval": part_retrieval,
}
SHARED = {"finetune"}        # its work is split over the processes of torchrun; others run in one

# ---- models --------------------------------------------------------------------------------------

SHAPE = dict(img_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4, pos="sincos_row",
             init="moco")                                # without a checkpoint: as mmc.py on toy


def models(args):
    """Yields what is evaluated: the given checkpoints or the newest run in --out; then baselines.

    A model has name, encoder (a ViT; None: raw pixels), size, mean, std, interpolation, source.
    """
    newest = sorted(Path(args.out).glob("*/encoder.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    paths, baselines = [Path(path) for path in args.checkpoint] or newest, args.baseline
    paths = [path / "encoder.pt" if path.is_dir() else path for path in paths]
    if not paths and not baselines:
        print(f"no run in {args.out}/ yet: this is an untrained ViT. To train one: python mmc.py")
        baselines = ["untrained"]
    encoders = [vit.load(path, args.branch, args.size) for path in paths]
    args.data = args.data or next((e.source.data for e in encoders if e.source.data), "toy")
    names = [path.parent.name if path.name == "encoder.pt" else path.stem for path in paths]
    shape = encoders[0].config if encoders else SHAPE    # baselines are like the first checkpoint
    for baseline in baselines:
        torch.manual_seed(args.seed)
        encoders.append(vit.ViT(**shape).eval() if baseline == "untrained" else None)
    unknown = SimpleNamespace(path=None, method=None, branch=None, step=None, mean=data.MEAN,
                              std=data.STD, interpolation="bicubic")
    for name, encoder in zip([*names, *baselines], encoders):
        source = getattr(encoder, "source", unknown)
        size = args.size or (encoder.config if encoder else shape)["img_size"]
        yield SimpleNamespace(name=name, encoder=encoder and encoder.to(args.device), size=size,
                              mean=source.mean, std=source.std, source=source,
                              interpolation=source.interpolation)


# ---- command line, table, JSON -------------------------------------------------------------------


def parse(argv=None):
    tasks = "\n".join(f"  {name:<16}{task.__doc__.splitlines()[0]}" for name, task in TASKS.items())
    parser = training.Parser(description=__doc__, epilog=f"tasks:\n{tasks}", allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (kind, default, text) in FLAGS.items():
        flags = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
        how = dict(nargs="+") if isinstance(default, list) else {}
        if kind is bool:
            how = dict(action="store_true")
        elif isinstance(kind, tuple):
            how["choices"] = kind
        else:
            how |= dict(type=kind, metavar=name.upper())
        shown = "" if default in (None, []) or kind is bool else f" [{default}]"
        parser.add_argument(*flags, default=default, help=text + shown, **how)
    args = parser.parse_args(argv)
    if args.task not in TASKS:
        raise ValueError(f"unknown task {args.task!r}{training.nearest(args.task, TASKS)}")
    args.device = training.pick_device(args.device)
    args.precision = training.pick_precision(args.precision, args.device)
    return args


def table(results):
    """Prints a row for each model and feature, a column for each number, in percent."""
    columns = list(dict.fromkeys(c for _, r in results for row in r.rows.values() for c in row))
    lines = [("model", "feature", *columns)]
    for model, result in results:
        for i, (feature, row) in enumerate(result.rows.items()):
            numbers = [f"{row[c]:.1f}" if c in row else "" for c in columns]
            lines.append(("" if i else model.name, feature, *numbers))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        left, right = map(str.ljust, line[:2], widths), map(str.rjust, line[2:], widths[2:])
        print(*left, *right, sep="  ")


def record(model, result, args, seconds):
    """A line of JSON: all that the table says, and all settings."""
    return json.dumps(dict(
        task=args.task, model=model.name, checkpoint=model.source.path, method=model.source.method,
        branch=model.source.branch, step=model.source.step, data=args.data, images=result.images,
        metrics=result.rows, protocol=result.protocol, notes=result.notes,
        seconds=round(seconds, 1), torch=torch.__version__,
        settings={**vars(args), "device": str(args.device)})) + "\n"


def append(path):
    """The file, open for a line at its end. OSError with a sentence if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a")
    except OSError as e:
        raise OSError(f"cannot write {path} ({e.strerror}); name a file with --json") from None


def main(argv=None):
    args, first = parse(argv), os.environ.get("RANK", "0") == "0"
    if args.task in SHARED:
        training.join(args.device)
    elif not first:
        return
    if not first:                                        # the first process speaks and writes
        sys.stdout = open(os.devnull, "w")
    training.keep_memory()
    results, folder, begin = [], Path(args.out), time.perf_counter()
    for model in models(args):
        start = time.perf_counter()
        if model.source.path:
            folder = Path(model.source.path).parent      # baselines: with the checkpoint before
        path = Path((args.json or folder / "results.jsonl") if first else os.devnull)
        with append(path) as file:                       # opened first: no work for a bad path
            result = TASKS[args.task](model, args)
            if not model.encoder:
                result.notes.append("pixels: the picture as 32 x 32 means at most, no encoder")
            elif not model.encoder.num_prefix:
                result.notes.append(f"{model.name} has no class token: its patch mean stands in")
            file.write(record(model, result, args, time.perf_counter() - start))
        results.append((model, result))
    counts = ", ".join(f"{n:,} {role}" for role, n in result.images.items())
    print(f"\n{args.task} on {args.data} ({counts}), {args.precision}, {args.device.type}; percent")
    for protocol in dict.fromkeys(r.protocol for _, r in results):          # input sizes may differ
        print(", ".join(m.name for m, r in results if r.protocol == protocol) + f": {protocol}")
    table(results)
    for note in dict.fromkeys(note for _, r in results for note in r.notes):
        print(f"note: {note}")
    for model, r in results:                             # in one line: the best of the first column
        column = next(iter(next(iter(r.rows.values()))))
        feature = max(r.rows, key=lambda name: r.rows[name][column])
        print(f"{model.name}: {args.task} {r.rows[feature][column]:.1f} % ({column}, {feature})")
    print(f"{time.perf_counter() - begin:.1f} s, appended to {path}")


if __name__ == "__main__":
    training.main(main)
