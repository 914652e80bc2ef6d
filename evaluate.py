"""Probes: what did a checkpoint, ours or an official one, learn? Features in, a number out.

    python evaluate.py                                        # kNN of the newest run in out/
    python evaluate.py --task linear --checkpoint out/mmc-toy mae_pretrain_vit_base.pth
    python evaluate.py --task part_retrieval --baseline pixels untrained --show
    python evaluate.py --task all --checkpoint out/mmc-toy out/mae-toy --reference

Each model is a few rows of the printed table and one line of results.jsonl by its checkpoint.

A probe is one function that reads like its protocol, task(model, args) -> report(rows, protocol),
and one line in TASKS. It gets features from `features` (one pass over a split) or `extract` (one
pass over any batches), scores from metrics.py, and its own flags from a line in FLAGS. Probes that
look at every patch are in dense.py, those that train all weights in finetune.py.

torchrun --nproc_per_node=8 evaluate.py ...: the processes share the encoding of images, see
features.py, and fine-tuning; the probes of dense.py run in the first of them alone.
"""
import argparse
import copy
import functools
import json
import math
import os
import sys
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL.Image import Resampling
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import data
import vit
from lib import augment, checkpoints, config, datasets, distributed, metrics, rng, toy
from lib.metrics import report
from lib.run import cosine
from probes import annotations, dense, detection, finetune
from probes.common import (
    all_tokens,
    block_means,
    each,
    extract,
    features,
    labelled,
    last_blocks,
    load,
    pooled,
    settings_of,
    share,
    view,
    wanted,
)

# B images, N tokens, D width, S pixels a side, C classes, L learning rates, H attention heads,
# P key-points, E episodes, M items


def natural(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


FLAGS = {      # name: (type or choices, default, help); a list takes several values
    "task":       (str, "knn", "what to measure, see below"),
    "checkpoint": (str, [], "files or folders of runs; none: the newest run in --out"),
    "baseline":   (("pixels", "untrained"), [], "floors: raw pixels, a ViT with random weights"),
    "branch":     (("teacher", "student", "base", "momentum"), None, "which weights, if several"),
    "data":       (str, None, "data set or folder; none: that of the first checkpoint that names "
                   "one, else toy (official files name none)"),
    "data-root":  (str, None, "where data sets lie; none: $DATA_ROOT, else datasets/"),
    "size":       (natural, None, "pixels a side of the input; none: as in training; detection, "
                   "zero_shot_segmentation and video have their own; segmentation, "
                   "linear_segmentation and pose, too, and but for toy take no other"),
    "limit":      (natural, None, "use so many images of each split; none: all, of toy fewer in "
                   "some probes"),
    "out":        (str, "out", "folder of the runs, and for pictures"),
    "json":       (str, None, "file to append to; none: results.jsonl by the checkpoint"),
    "seed":       (int, 0, "of what a probe draws, and of untrained weights"),
    "device":     (str, "auto", "cuda, cuda:1, cpu or auto"),
    "precision":  (str, "auto", "of the encoder: bf16, fp32; auto: bf16 where the device has it"),
    "batch-size": (natural, 256, "images per forward"),
    "workers":    (int, 2, "processes that decode images"),
    "cache":      (bool, False, "keep features in --out/features, and take them from there"),
    "reference":  (bool, False, "print the papers' numbers under ours"),
    "feature":    (("cls", "pat", "hyber", "projected"), None, "only this; none: the protocol's"),
    "hyber-norm": (("halves", "joint"), "halves", "hyber: cls and pat brought to length 1 one by "
                   "one, or together (iBOT)"),
    "k":          (natural, [10, 20], "knn: numbers of neighbours"),
    "recipe":     (("mae", "dino", "park", "simmim", "mmc", "parts", "selfpatch", "1x", "100ep",
                    "vitdet"), None, "whose settings; none: the first; linear: mae, dino, park; "
                   "shape_bias, frequency_noise: park, mae, dino; finetune: mae, simmim, mmc; "
                   "linear_segmentation: parts, mmc; segmentation: fpn selfpatch, upernet mae, "
                   "selfpatch; detection: 1x, 100ep, vitdet"),
    "paper":      (bool, False, "linear, layerwise, shape_bias, frequency_noise: lr and weight "
                   "decay of recipe park as printed"),
    "bn":         (("running", "batch"), "running", "attentive head: statistics of its batch norm "
                   "at test; batch: as the published code"),
    "epochs":     (natural, None, "of a head's or all weights' training; none: the recipe's; "
                   "finetune on toy: 5"),
    "reinit":     (str, None, "finetune: first:N or last:N, so many blocks start anew"),
    "crop":       (("code", "paper"), "code", "parts: geometry, see part_crops"),
    "parts":      (str, [], "names of key-points, or all; none: the study's"),
    "head":       (("linear", "attentive", "fpn", "upernet"), None, "part_classification: linear, "
                   "attentive; segmentation: fpn, upernet; none: the first"),
    "episodes":   (natural, 600, "few_shot: number of draws"),
    "max-aspect": (float, 1.2, "object_retrieval: longer side / shorter side of a box, at most"),
    "min-side":   (natural, 64, "object_retrieval: shorter side of a box in pixels, at least"),
    "max-items":  (natural, None, "retrieval: of so many items, drawn at random; none: all"),
    "imsize":     (natural, None, "landmark_retrieval: longer side, px; none: 224, toy: --size"),
    "multiscale": (bool, False, "landmark_retrieval: features of 3 sizes, averaged"),
    "crop-queries": (bool, False, "landmark_retrieval: cut queries to their boxes"),
    "no-crop":    (bool, False, "shape_bias: pictures whole, without the centre crop"),
    "eps":        (float, 0.7, "frequency_noise: strength, in units of the normalised input"),
    "equal-energy": (bool, False, "frequency_noise: bands of equal strength, not of equal density"),
    "level":      (("object", "part", "scene"), None, "segmentation: which classes; none: the "
                   "first that the data set has"),
    "iters":      (natural, None, "segmentation, linear_segmentation, pose, detection: steps of "
                   "training; none: the protocol's, on toy a few hundred"),
    "lr":         (float, [], "linear_segmentation: learning rates, side by side; none: the "
                   "recipe's, on toy three; segmentation: one"),
    "swap-sides": (bool, False, "segmentation: left becomes right in flipped pictures"),
    "prompt":     (("deepest", "random"), "deepest", "zero_shot_segmentation: which patch"),
    "target":     (("category", "instance", "stuff"), "category", "zero_shot_segmentation: what is "
                   "looked for"),
    "show":       (bool, False, "write pictures of what a probe saw to --out: part_retrieval, "
                   "segmentation, detection and the probes of dense.py"),
}

# ---- probes --------------------------------------------------------------------------------------


def knn(model, args):
    """Nearest neighbours vote: the train split is the bank, the test split asks. No training.

    Our choice, here and in all probes of classes: CIFAR's pictures are seen whole, see `view`.
    """
    names, tokens = wanted(args, "cls", "pat", "hyber")
    bank, labels, classes = features(model, args, "train", names, tokens)
    queries, truth, _ = features(model, args, "test", names, tokens)
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
# Park et al., table A.1; its lr 1 with decay 0.05 (the line below; literal: at any batch, no sweep)
# would shrink weights by 5 % a step: lr is ours. cae: CAE's attentive probe, lr 0.4 at 8192. part:
# of part_classification, lr 0.4 and 0.04 at 1024.
RECIPES = {
    "mae":  dict(lr=0.1,   batch=16384, epochs=90,  warmup=10, lars=True,  standardise=True),
    "dino": dict(lr=0.001, batch=1024,  epochs=100, warmup=0,  lars=False, standardise=False),
    "park": dict(lr=0.1,   batch=1024,  epochs=50,  warmup=0,  lars=False, standardise=True),
    "park paper": dict(lr=1.0, batch=1024, epochs=50, warmup=0, lars=False, standardise=True,
                       decay=0.05, literal=True),
    "cae":  dict(lr=0.0125, batch=8192, epochs=90,  warmup=10, lars=False, standardise=False),
    "part": dict(lr=0.1,   batch=1024,  epochs=90,  warmup=0,  lars=False, standardise=False),
    "part attentive":
            dict(lr=0.01,  batch=1024,  epochs=90,  warmup=0,  lars=False, standardise=False)}
SWEEP = (0.3, 1, 3, 10, 30, 100, 300)                    # times the recipe's lr: a head for each


def linear(model, args):
    """Linear classifier on frozen features: which classes are there for the taking?

    The papers show the encoder a new random crop of every image in every epoch. Our choice: it sees
    the test view and its mirror image, once, and each epoch draws one of the two: one pass instead
    of 90; how far this is below the papers' protocol, and whether alike for all models, was not
    measured. Also ours: a batch of at most 1/32 of the images, so that a small set gets enough
    steps; standardising by all training features, which is what the recipes' BatchNorm without
    affine converges to; cosine per step; a sweep of lr; of recipe park the patch mean, as SimMIM
    trains no class token. The released scripts report the best epoch on the test images. Here a
    tenth of the training images is held out to choose lr and epoch, and the test images are looked
    at once.
    --recipe park --paper takes lr 1 (at any batch; the table calls it a base rate) and weight decay
    0.05 from the paper's table A.1, without a sweep. That is not the default because each step
    takes 5 % off the weights, with momentum ten times that: a head keeps little of what it learned.
    """
    name, head, train = trained(model, args)
    tests, truth, _ = features(model, args, "test", *seen_by_linear(args))
    recipe = linear_recipe(args)
    how = ("LARS" if recipe["lars"] else "SGD") + ", standardised" * recipe["standardise"]
    return report({name: head.score(*tests.values(), truth)},
                  f"linear head, recipe {args.recipe} ({how}, {head.epochs} epochs), after the "
                  f"final norm; {view(model, args)} and its mirror image, no random crops; "
                  f"{chosen(recipe)}", train=train, test=len(truth),
                  notes=[f"{model.name}: base lr {head.lr:.2g}, epoch {head.epoch} of "
                         f"{head.epochs}"])


def linear_recipe(args):
    """The settings of --recipe for a linear head, of park with --paper those of its table."""
    recipe = settings_of(args, {name: RECIPES[name] for name in ("mae", "dino", "park")})
    if args.paper and args.recipe != "park":
        raise ValueError("--paper is about the settings of recipe park: add --recipe park")
    return RECIPES["park paper"] if args.paper else recipe


def chosen(recipe):
    return (f"lr {recipe['lr']:g} and decay {recipe['decay']:g} as printed, epoch"
            if recipe.get("literal") else "lr and epoch") + " chosen on a held-out tenth"


def seen_by_linear(args):
    """Names and function of what the recipe looks at; last_blocks has one, under its own name."""
    tokens = last_blocks if args.recipe == "dino" and not args.feature else None
    name = args.feature or ("pat" if args.recipe == "park" else "cls")
    return [name], tokens or wanted(args, name)[1]


def trained(model, args):
    """The head of `linear`: the feature's name, the classifier, number of training images."""
    recipe, (names, tokens) = linear_recipe(args), seen_by_linear(args)
    found, y, classes = features(model, args, "train", names, tokens, mirror=True)
    [(name, x)] = found.items()                                             # (n, 2, D)
    return name, classifier(x, y, classes, recipe, args), len(y)


def layerwise(model, args):
    """Linear classifier on the output of every block: where in the depth are the classes?

    Park et al., figure 11, a curve without numbers: masked models rise to a maximum before the last
    blocks, contrastive ones to the end. Recipe park. Our choice, as in `linear`, are its settings,
    one pass over the images and a held-out tenth; also ours: the patch mean (--feature cls for the
    class token) without the final norm, each dimension standardised, as the scales of the blocks
    differ. All blocks come from one pass, so n x 2 x depth x D numbers must fit in memory. --paper:
    the paper's lr and decay, see `linear`.
    """
    feature, depth = args.feature or "pat", model.encoder.depth if model.encoder else 0
    recipe = RECIPES["park paper" if args.paper else "park"]
    if feature not in ("cls", "pat"):
        raise ValueError("layerwise reads --feature cls or pat")
    names = [f"block {number} {feature}" for number in range(1, depth + 1)]
    found, y, classes = features(model, args, "train", names, block_means, mirror=True)
    tests, truth, _ = features(model, args, "test", names, block_means)
    heads = {name: classifier(x, y, classes, recipe, args) for name, x in found.items()}
    rows = {name: head.score(tests[name], truth) for name, head in heads.items()}
    return report(rows, f"linear head, recipe park (SGD, standardised, "
                  f"{args.epochs or recipe['epochs']} epochs), of every block, before the final "
                  f"norm; {view(model, args)} and its mirror image, no random crops; "
                  f"{chosen(recipe)}", train=len(y), test=len(truth),
                  notes=[f"{model.name}: base lr of the blocks "
                         f"{', '.join(f'{head.lr:.2g}' for head in heads.values())}"])


def attentive(model, args):
    """Classifier that chooses which tokens to look at: for models without a trained class token.

    Part-aware study, table 1, with CAE's head and recipe: a query attends once to all tokens, class
    token included, after the final norm. Our choice, as in `linear`: the test view and its mirror
    image instead of random crops, encoded once; small batches; a held-out tenth chooses lr and
    epoch. Also ours: lr ends at 0 (CAE: 1e-6); the last layer is drawn with 0.01, as in the study's
    code for parts (CAE: 0.02, times 0.001); running statistics of the batch norm at test. The
    published code takes the test batch's own, so that an answer depends on its neighbours: --bn
    batch, with batches of 256 in the order of the data set. All tokens stay in memory, in 16 bits,
    of each process, and twice while they are put in order.
    """
    if not model.encoder:
        raise ValueError("attentive needs tokens, and pixels have none: leave out that --baseline")
    images, _ = labelled(model, args, "train")
    size = len(images) * 2 * ((model.size // model.encoder.patch_size) ** 2 + 1) * 2 / 2**30
    if (size := 2 * size * model.encoder.embed_dim) > 48:
        raise ValueError(f"attentive keeps the tokens of {len(images):,} images, {size:.0f} GiB: "
                         f"take fewer with --limit")
    found, y, classes = features(model, args, "train", ["tokens"], all_tokens, mirror=True)
    tests, truth, _ = features(model, args, "test", ["tokens"], all_tokens)
    head = classifier(found["tokens"], y, classes, RECIPES["cae"], args,
                      functools.partial(AttentiveHeads, bn=args.bn))
    return report({"tokens": head.score(tests["tokens"], truth)},
                  f"one query attends to all tokens after the final norm, batch norm"
                  f"{' of the test batch' * (args.bn == 'batch')}, linear; "
                  f"recipe cae (SGD, {head.epochs} epochs); {view(model, args)} and its mirror "
                  f"image, no random crops; lr and epoch chosen on a held-out tenth",
                  train=len(y), test=len(truth),
                  notes=[f"{model.name}: base lr {head.lr:.2g}, epoch {head.epoch} of "
                         f"{head.epochs}"])


# ---- probes: heads, several learning rates side by side ------------------------------------------


class LinearHeads:
    """L linear classifiers: features (B, D) -> scores (B, L, C)."""
    least = 1                                            # images in a batch

    def __init__(self, heads, width, classes, g, device):
        weight = 0.01 * torch.randn(classes, width, generator=g).to(device).repeat(heads, 1, 1)
        self.params = [weight, torch.zeros(heads, classes, 1, device=device)]
        self.state = []                                  # what is kept, but not by the gradient

    def __call__(self, x, training=False):
        weight, bias = self.params                                          # (L, C, D), (L, C, 1)
        return (x @ weight.flatten(0, 1).T + bias.flatten()).unflatten(1, bias.shape[:2])


class AttentiveHeads:
    """L attentive classifiers: tokens (B, N, D) -> scores (B, L, C). No residual, no MLP.

    A learned query attends to all tokens, with D/64 attention heads and a LayerNorm for each of
    query, key and value; then a projection, batch norm without affine, and a linear classifier.
    As there is one query, nothing is projected token by token: q . (W_k x) = (W_k^T q) . x, and the
    weighted mean of W_v x is W_v times that of x. So L heads cost hardly more than one. The shift
    of the key's LayerNorm is left out: it cancels in the softmax. bn: the statistics at test,
    "running" or those of the "batch".
    """
    least = 16                                           # or the batch norm has few to compare

    def __init__(self, heads, width, classes, g, device, bn="running"):
        def drawn(*shape, std=0.02):
            x = torch.empty(shape)
            return torch.nn.init.trunc_normal_(x, std=std, generator=g).to(device)

        one, zero = torch.ones(width, device=device), torch.zeros(width, device=device)
        alone = [drawn(width), one, zero, one, one, zero,            # query; LayerNorms: q, k, v
                 drawn(width, width), zero, drawn(width, width),     # W_q, b_q, W_k
                 drawn(width, width), zero, drawn(width, width), zero,      # W_v, b_v, W_o, b_o
                 drawn(classes, width, std=0.01), torch.zeros(classes, device=device)]
        self.params = [p.repeat(heads, *[1] * p.ndim) for p in alone]
        self.state = [zero.repeat(heads, 1), one.repeat(heads, 1)]          # running mean, variance
        self.bn = bn

    def __call__(self, x, training=False):
        (query, q_gain, q_shift, k_gain, v_gain, v_shift, w_q, b_q, w_k, w_v, b_v, w_o, b_o,
         weight, bias) = self.params
        D = x.shape[2]
        H = max(1, D // 64)
        if D % H:
            raise ValueError(f"the attentive head splits the width by 64, and {D} does not")
        x = F.layer_norm(x.float(), [D], eps=1e-6)                          # gain, shift: below
        q = F.layer_norm(query, [D], eps=1e-6) * q_gain + q_shift
        q = torch.einsum("loi,li->lo", w_q, q) + b_q
        q = q.unflatten(1, (H, -1)) * (D // H) ** -0.5                      # (L, H, D/H)
        asked = torch.einsum("lhd,lhdi->lhi", q, w_k.unflatten(1, (H, -1))) * k_gain[:, None]
        shown = (x @ asked.flatten(0, 1).T).softmax(1)                      # (B, N, L*H)
        v = (shown.mT @ x).unflatten(1, q.shape[:2])                        # (B, L, H, D)
        v = v * v_gain[:, None] + v_shift[:, None]
        v = torch.einsum("blhi,lhdi->blhd", v, w_v.unflatten(1, (H, -1))).flatten(2) + b_v
        z = torch.einsum("bli,loi->blo", v, w_o) + b_o                      # (B, L, D)
        mean, var = self.state
        if training or self.bn == "batch":
            mean, var = z.mean(0), z.var(0, correction=0)
        if training:
            with torch.no_grad():
                n = len(z)
                self.state[0].lerp_(mean, 0.1)
                self.state[1].lerp_(var * (n / max(n - 1, 1)), 0.1)
        z = (z - mean) * (var + 1e-5).rsqrt()
        return torch.einsum("bli,lci->blc", z, weight) + bias


def classifier(x, y, classes, recipe, args, kind=LinearHeads):
    """Trains heads on frozen features x (n, V, ...) of V views of each image, labels y (n,).

    -> namespace: scores(x), last(x) of the best epoch and of the last, (m, ...) -> (m, C); score(x,
    labels), a row of the table; lr, epoch, epochs.
    """
    mean, scale = 0.0, 1.0
    if recipe["standardise"]:
        var, mean = torch.var_mean(x, dim=(0, 1))
        scale = (var + 1e-6).rsqrt()
        x = (x - mean) * scale
    epochs = args.epochs or recipe["epochs"]
    best, last, lr, epoch = train_heads(x, y, classes, recipe, epochs, args.seed, kind)

    def using(head):
        return lambda x: torch.cat([head((part - mean) * scale)[:, 0] for part in x.split(256)])

    def score(x, labels):
        top1, top5 = metrics.accuracy(using(best)(x), labels)
        end = metrics.accuracy(using(last)(x), labels)[0]
        return {"top-1": top1, "top-5": top5, "last epoch": end}

    return SimpleNamespace(scores=using(best), last=using(last), score=score, lr=lr, epoch=epoch,
                           epochs=epochs)


@torch.enable_grad()
def train_heads(x, y, classes, recipe, epochs, seed, kind=LinearHeads):
    """Trains a head for each lr of SWEEP (literal: for one), side by side on the same batches.

    x: (n, V, ...) features of V views of each image, y: (n,). Returns the head of the epoch with
    the best accuracy on a held-out tenth of the images, the same head after the last epoch, its
    base lr, and that epoch (counted from 1).
    """
    (n, views), g = x.shape[:2], rng.generator(seed, "linear")
    if n < 10:
        raise ValueError(f"a tenth of the training images is held out: {n} are too few; raise "
                         f"--limit or change --data")
    held, train = torch.randperm(n, generator=g).to(x.device).tensor_split([n // 10])
    sweep = (1.0,) if recipe.get("literal") else SWEEP
    heads = kind(len(sweep), x.shape[-1], classes, g, x.device)
    batch = min(len(train), max(heads.least, min(recipe["batch"], len(train) // 32)))
    used = len(train) - (len(train) % batch == 1 < heads.least)    # of one row batch norm makes 0
    total = epochs * -(-used // batch)
    warmup = total * recipe["warmup"] // recipe["epochs"]
    scale = 1.0 if recipe.get("literal") else batch / 256
    lrs = torch.tensor(sweep, device=x.device) * recipe["lr"] * scale
    momenta = [torch.zeros_like(p) for p in heads.params]
    for p in heads.params:
        p.requires_grad_()

    step, best = 0, (-1,)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train), generator=g)[:used].to(x.device)
        for index in train[order].split(batch):
            shown = torch.randint(views, (len(index),), generator=g).to(x.device)
            scores = heads(x[index, shown], training=True)                  # (B, L, C)
            labels = y[index, None].expand(-1, len(sweep))
            loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
            grads = torch.autograd.grad(loss / len(index), heads.params)    # a mean for each head
            with torch.no_grad():
                lr = lrs * cosine(step, total, 1.0, 0.0, warmup)
                descend(heads.params, grads, momenta, lr, recipe["lars"], recipe.get("decay", 0))
            step += 1
        with torch.no_grad():
            right = sum((heads(x[index, 0]).argmax(2) == y[index, None]).sum(0)
                        for index in held.split(256))                       # (L,)
        if right.max() > best[0]:
            number = int(right.argmax())
            best = right.max(), number, epoch, one_head(heads, number)
    _, number, epoch, winner = best
    return winner, one_head(heads, number), sweep[number] * recipe["lr"], epoch


def one_head(heads, number):
    """A copy of one of the heads as it is now, fixed."""
    head = copy.copy(heads)
    head.params, head.state = ([p.detach()[number:number + 1].clone() for p in tensors]
                               for tensors in (heads.params, heads.state))
    return head


def descend(params, grads, momenta, lrs, lars, decay=0.0, trust=0.001):
    """A step of SGD with momentum 0.9, in place, for heads side by side: params (L, ...), lrs (L,).

    decay: of weights and biases alike, as part of the gradient, like torch.optim.SGD's.
    lars (You et al., 2017; as in MAE): the gradient of a weight is first brought to `trust` times
    the length of the weight, so that lr is a relative step whatever the scale of the loss. Biases
    (last axis 1) go without.
    """
    for p, grad, m in zip(params, grads, momenta):
        each = (-1, *[1] * (p.ndim - 1))                                    # (L,) -> (L, 1, ...)
        grad = grad + decay * p
        if lars and p.shape[-1] > 1:
            size, slope = p.flatten(1).norm(dim=1), grad.flatten(1).norm(dim=1)
            scale = torch.where((size > 0) & (slope > 0), trust * size / slope, 1.0)
            grad = grad * scale.view(each)
        m.mul_(0.9).add_(grad)
        p.sub_(lrs.view(each) * m)


# ---- probes: without training --------------------------------------------------------------------


def few_shot(model, args):
    """Which of five classes, from one picture of each? 5-way 1-shot, nothing is trained.

    MMC, table 8: the class token, cosine similarity. Accuracy: the most similar of the five is the
    answer. F1: "same class" is said above a threshold T; the best of T = 0.1, 0.2, .. 0.9. Our
    choice, as the paper is silent: 600 episodes with 15 queries of each class, from the test split;
    accuracy with its 95 % interval; F1 over the pairs of all episodes together. Chance is 20 %
    accuracy; to say "same" to everything gives an F1 of 33.3 %.
    """
    ways, queries, thresholds = 5, 15, [t / 10 for t in range(1, 10)]
    names, tokens = wanted(args, "cls")
    labelled(model, args, "test")                        # first, as it knows what to say
    whole = squares(model, args)
    found, labels, classes = features(model, args, "test", names, tokens, whole=whole)
    members = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    members = [rows for rows in members if len(rows) > queries]
    if len(members) < ways:
        raise ValueError(f"few_shot needs {ways} classes with {queries + 1} test images each; "
                         f"{args.data} has {len(members)}: raise --limit or change --data")
    g = rng.generator(args.seed, "few_shot")

    def some(rows):
        return rows[torch.randperm(len(rows), generator=g)[:queries + 1].to(rows.device)]

    chosen = torch.stack([torch.stack([some(members[c]) for c in torch.randperm(
        len(members), generator=g)[:ways].tolist()]) for _ in range(args.episodes)])   # (E, 5, 16)
    truth = torch.arange(ways, device=labels.device).repeat_interleave(queries)        # (75,)
    rows = {}
    for name, z in found.items():
        z = F.normalize(z, dim=1)
        similarity = torch.cat([                                                       # (E, 75, 5)
            z[part[:, :, 1:].flatten(1)] @ z[part[:, :, 0]].mT for part in chosen.split(64)])
        right = (similarity.argmax(2) == truth).double().mean(1)                       # (E,)
        same = (truth[:, None] == torch.arange(ways, device=truth.device)).expand_as(similarity)
        f1 = metrics.f1_sweep(similarity, same, thresholds)
        spread = 1.96 * right.std().item() / args.episodes ** 0.5 if args.episodes > 1 else 0.0
        rows[name] = {"accuracy": 100 * right.mean().item(), "+-": 100 * spread,
                      "F1": 100 * f1.max().item(), "T x 100": 100 * thresholds[int(f1.argmax())],
                      **{f"F1 {t}": 100 * value for t, value in zip(thresholds, f1.tolist())}}
    return report(rows, f"5-way 1-shot, {args.episodes} episodes, 15 queries of each class, "
                  f"cosine; last block, after the final norm; {view(model, args, whole)}; accuracy "
                  f"+- 95 % interval; F1 of saying 'same' above T; chance 20.0 and 33.3",
                  test=len(labels),
                  notes=[f"{len(members)} classes of {args.data}, test split"])


def squares(model, args):
    """Are the pictures square? Then nothing needs to be cut off (asked of the first one)."""
    paths = load(args.data, args.data_root, "test", model.size, args.limit, args.device).paths
    return bool(paths) and len(set(datasets.read_image(paths[0]).size)) == 1


def ranked(found, labels, kind):
    """Rows of a retrieval table: each item asks for the others with its label."""
    rows, chance = {}, 100 * metrics.chance(labels).nanmean().item()
    for name, z in found.items():
        ap = metrics.retrieval(z, labels)
        mean, by_class = ap.nanmean().item(), metrics.class_means(ap, labels).nanmean().item()
        rows[name] = {"AP": 100 * mean, f"AP by {kind}": 100 * by_class, "chance": chance}
    alone = int(ap.isnan().sum())
    if alone == len(labels):
        raise ValueError(f"no two items share a {kind}, so nothing can be retrieved: raise --limit "
                         f"or change --data")
    return rows, [f"{alone} items are the only one of their {kind}: not asked for"] * (alone > 0)


def object_retrieval(model, args):
    """Do pictures of one class find each other? Each asks for all others, encoded and projected.

    Part-aware study, table 2: CIFAR-10, and boxes of COCO that are "approximately square". Our
    choice, as it says no more: the test split, and boxes (not crowds) of at least 64 px and at most
    1.2 times as long as wide, clipped, squashed to a square; the query is not in its own list.
    Chance is about the share of the query's class. Not here: the training split.
    """
    names, tokens = wanted(args, "cls", "pat", "projected")
    if args.data in ("coco", "toy-scenes"):
        items = annotations.boxes(args.data, args.data_root, "test", args.limit)
        crops = box_crops(items, model.size, args.max_aspect, args.min_side)
        found, labels = extract(model, crop_batches(crops, model, args), args, names, tokens,
                                key=("boxes", args.max_aspect, args.min_side))
        seen = (f"boxes with sides of {args.min_side} px and more, {args.max_aspect:g} : 1 at most,"
                f" squashed to {model.size} px")
    else:
        found, labels, _ = features(model, args, "test", names, tokens)
        seen = view(model, args)
    found, labels = subset(found, labels, args)
    rows, notes = ranked(found, labels, "class")
    return report(rows, f"average precision by cosine, query left out; last block, after the final "
                  f"norm; {seen}", notes, items=len(labels))


def subset(found, labels, args):
    """At most --max-items rows, drawn at random."""
    rows = torch.randperm(len(labels), generator=rng.generator(args.seed, "subset"))
    rows = rows[:args.max_items].sort().values.to(labels.device)
    return {name: z[rows] for name, z in found.items()}, labels[rows]


def landmark_retrieval(model, args):
    """Queries look for other views of their landmark in a database, by class token.

    MMC, table 9: revisited Oxford and Paris, mean AP of the medium (easy and hard views) and the
    hard setting; no whitening, no expansion of queries. Our choice, DINO's default: longer side 224
    (--imsize 512 --multiscale is its better one), queries whole although the benchmark gives boxes
    (--crop-queries). Pictures keep their shape; the sides lose what does not fill a patch.

    toy and toy-scenes, our own stand-in: 40 films of 16 frames, each frame cut to a random half or
    more of the picture around a point on a creature, and the ninth of each film asks for the rest
    of it. Within 4 frames of it is easy, farther away hard, and junk where less than a fifth shows
    a creature; distractors are all other films. Creatures walk and turn no corner, so viewpoints
    differ less than on Oxford: compare with --baseline pixels untrained.
    """
    home = args.data in ("toy", "toy-scenes")
    side = args.imsize or (model.size if home else 224)
    world = toy_landmarks(side, args) if home else annotations.landmarks(args.data, args.data_root)
    names, tokens = wanted(args, "cls")
    if args.multiscale:
        if args.feature not in (None, "cls"):
            raise ValueError(f"--multiscale averages class tokens: leave out --feature "
                             f"{args.feature}, or --multiscale")
        names, tokens = ["multiscale"], multiscale
    boxes = world.boxes if args.crop_queries else None
    seed = [args.seed] * home                            # it cuts the frames of toy
    database, queries = (
        extract(model, landmark_views(items, cut, side, model, args), args, names, tokens,
                len(items), (role, side, cut is not None, *seed))[0]
        for role, items, cut in (("database", world.database, None),
                                 ("queries", world.queries, boxes)))
    rows = {}
    for name, z in database.items():
        similarity = F.normalize(queries[name], dim=1) @ F.normalize(z, dim=1).T
        ranking = similarity.argsort(dim=1, descending=True, stable=True).cpu()
        rows[name] = {}
        for setting, good, bad in (("medium", "easy hard", "junk"), ("hard", "hard", "junk easy"),
                                   ("easy", "easy", "junk hard")):
            lists = [[torch.cat([torch.as_tensor(getattr(world, which)[q], dtype=torch.long)
                                 for which in whose.split()]) for whose in (good, bad)]
                     for q in range(len(ranking))]
            each = [metrics.revisited(order, *pair) for order, pair in zip(ranking, lists)]
            ap = torch.tensor([ap for ap, _ in each], dtype=torch.float64)
            at = torch.tensor([p for _, p in each], dtype=torch.float64)    # (Q, 3): 1, 5, 10
            rows[name][f"{setting} mAP"] = 100 * ap.nanmean().item()
            rows[name][f"{setting[0]} mP@10"] = 100 * at[:, 2].nanmean().item()
    what = "a frame asks for the rest of its film" if home else "whole queries"
    what = "queries cut to their boxes" if boxes is not None else what
    return report(rows, f"revisited protocol, {what}; cosine; last block, after the final norm; "
                  f"longer side {side} px" + ", 3 scales averaged" * args.multiscale,
                  database=len(world.database), queries=len(world.queries))


def multiscale(encoder, x):
    """Class tokens of the picture at 1, 1/sqrt(2) and 1/2 of its size, averaged."""
    p, total = encoder.patch_size, 0
    for scale in (1, 2 ** -0.5, 0.5):
        h, w = (max(p, int(side * scale) // p * p) for side in x.shape[2:])
        size = [int(side * scale) for side in x.shape[2:]]
        z = x if scale == 1 else F.interpolate(x, size, mode="bilinear", align_corners=False)
        z = z[:, :, :h, :w] if min(z.shape[2:]) >= p else F.interpolate(x, (h, w), mode="bilinear")
        total = total + pooled(encoder, z)["cls"]
    return {"multiscale": total / 3}


# ---- probes: of robustness -----------------------------------------------------------------------

# The 16 categories of the cue-conflict set: members among ImageNet's 1,000 classes, in sorted order
MEMBERS = {name: [n for part in text.split() for low, _, high in [part.partition("-")]
                  for n in range(int(low), int(high or low) + 1)] for name, text in {
    "airplane": "404", "bear": "294-297", "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914", "bottle": "440 720 737 898 899 901 907", "car": "436 511 817",
    "cat": "281-286", "chair": "423 559 765 857", "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385 386", "keyboard": "508 878", "knife": "499", "oven": "766",
    "truck": "555 569 656 675 717 734 864 867"}.items()}


def shape_bias(model, args):
    """A cat with the skin of an elephant: does the model say cat, or elephant?

    Park et al., figure 8a: on "Stylized ImageNet", read as its authors' cue-conflict images, the
    1,200 whose shape and texture disagree. The classifier is the linear probe, trained on ImageNet
    (--data imagenet). A category's probability is the mean over its member classes. Of the
    decisions for either cue, the share for the shape; the number is the mean over the 16 shapes. A
    supervised ResNet-50 has about 21 %. Recipe park, see `linear`. Not here: a fine-tuned
    classifier (Park et al., F.2), and accuracy on Stylized-ImageNet.

    There is no stand-in on toy: its classes differ in shape alone, so no cue could conflict.
    """
    args.recipe = args.recipe or "park"
    if args.data != "imagenet":
        raise ValueError("shape_bias needs a classifier of ImageNet's 1,000 classes and the "
                         "cue-conflict images: get both, then --data imagenet")
    world = annotations.cue_conflict(args.data_root)
    if (classes := labelled(model, args, "train")[1]) != 1000:
        raise ValueError(f"shape_bias needs all 1,000 classes of ImageNet, and this tree has "
                         f"{classes:,}: get the others, too, or another --data-root")
    names, tokens = seen_by_linear(args)
    _, head, train = trained(model, args)
    images = datasets.Images("cue-conflict", "test", paths=list(world.paths))
    batches = data.batches(images, model.size, args.batch_size, args.device, mean=model.mean,
                           std=model.std, workers=args.workers, interpolation=model.interpolation,
                           resize=model.size if args.no_crop else None, rank=distributed.rank(),
                           world=distributed.world_size())
    found, index = extract(model, batches, args, names, tokens, len(images),
                           ("cue-conflict", args.no_crop))
    [(name, z)] = found.items()
    decided = sixteen(head.scores(z), world.classes).cpu()
    shapes, textures = world.shapes[index.cpu()], world.textures[index.cpu()]
    conflict = shapes != textures
    bias, either = metrics.shape_bias(decided[conflict], shapes[conflict], textures[conflict])
    mean = torch.tensor(list(bias.values()), dtype=torch.float64).nanmean().item()
    row = {"shape bias": 100 * mean, "either": 100 * either}
    row |= {world.classes[c]: 100 * value for c, value in bias.items()}
    return report({name: row}, f"linear head, recipe {args.recipe} ({head.epochs} epochs), "
                  f"{chosen(linear_recipe(args))}; {view(model, args, args.no_crop)}; mean "
                  f"probability of each category's classes; mean over shapes of shape / (shape or "
                  f"texture)", train=train, test=int(conflict.sum()))


def sixteen(scores, categories):
    """(B, 1000) scores -> (B,) the category with the largest mean probability of its members."""
    p = scores.softmax(1)
    return torch.stack([p[:, MEMBERS[name]].mean(1) for name in categories], 1).argmax(1)


def frequency_noise(model, args):
    """How much accuracy does noise of one frequency cost? Low ones are outlines, high ones texture.

    Park et al., figure 8b, a curve without numbers: contrastive models lose less at high
    frequencies. The linear probe's head, on the test images of the evaluated set; noise on the
    normalised image, the same for all models. Our choice, as the paper gives but a window of 0.1
    pi: strength 0.7 with random signs, bands 0.1 pi wide around f = 0, 0.1 pi, .. pi, not clipped.
    A band has the more energy the higher it is (--equal-energy: the same for all). Recipe park, see
    `linear`. Not here: fine-tuned models (F.2).
    """
    args.recipe = args.recipe or "park"
    names, tokens = seen_by_linear(args)
    name, head, train = trained(model, args)

    def top1(change):
        tests, truth, _ = features(model, args, "test", names, tokens, change=change)
        return metrics.accuracy(head.scores(*tests.values()), truth)[0], len(truth)

    clean, test = top1(None)
    drops = {}
    for tenth in range(11):
        def add(x, index, tenth=tenth):
            return x + band_noise(index, x.shape[-1], tenth / 10 * math.pi, args)
        drops[f"{tenth / 10:g} pi"] = clean - top1(add)[0]
    mean = sum(drops.values()) / len(drops)
    return report({name: {"mean drop": mean, "clean": clean, **drops}},
                  f"points of top-1 lost to noise of strength {args.eps:g} in a band 0.1 pi wide "
                  f"around a frequency" + ", equal energy" * args.equal_energy +
                  f"; linear head, recipe {args.recipe} ({head.epochs} epochs), "
                  f"{chosen(linear_recipe(args))}; {view(model, args)}", train=train, test=test)


def ring(size, f, half=0.05 * math.pi):
    """(S, S) bool: the coefficients of fft2 whose larger frequency lies in [f - half, f + half)."""
    w = 2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64).abs()
    w = torch.maximum(w[:, None], w) + 1e-9              # edges: not a matter of rounding
    return (w >= f - half) & (w < f + half)


def band_noise(index, size, f, args):
    """(B,) image numbers -> (B, 3, S, S): random signs times --eps, less all other frequencies."""
    noise = args.eps * rng.normal(index, (3, size, size), args.seed, "noise").sign()
    keep = ring(size, f).to(index.device)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * keep).real
    if args.equal_energy:                                # as if a tenth of all were kept
        noise = noise * (0.1 / keep.double().mean().clamp(min=1e-9).item()) ** 0.5
    return noise


# ---- probes: of parts ----------------------------------------------------------------------------


def part_retrieval(model, args):
    """Do crops of one part find each other, over poses and species? Each asks for all others.

    From the part-aware study, table 4 (left): does the feature of a crop say *what it shows*?
    """
    known, parts, (split, at_most, _, source) = key_points(args)
    limit = args.limit or at_most

    def crops():
        items = annotations.keypoints(args.data, args.data_root, split, limit)
        return part_crops(items, known, parts, model.size, args.crop)

    names, tokens = wanted(args, "cls", "pat", "projected")
    found, labels = extract(model, crop_batches(crops(), model, args), args, names, tokens,
                            key=("parts", split, limit, model.size, args.crop, tuple(parts)))
    small = without_crops(parts, labels)                 # of all, not of --max-items
    found, labels = subset(found, labels, args)
    if args.show:
        contact_sheet(crops(), parts, Path(args.out) / f"part_crops-{args.data}.png")
    rows, notes = ranked(found, labels, "part")
    side = {"code": "2 round(d/4), d to the nearest of these on the same object",
            "paper": "d to the nearest of all key-points"}
    return report(rows, f"average precision by cosine, query left out; last block, after the final "
                  f"norm; visible {', '.join(parts)} of {source}; squares, side {side[args.crop]}, "
                  f"kept if 20 < d/2 < 1000 px, resized to {model.size} px",
                  notes + small, crops=len(labels))


def part_classification(model, args):
    """Which part does a crop show? A linear or an attentive head (--head) on frozen features.

    Part-aware study, table 4 (right), on the crops of part_retrieval. As in its released code, the
    training crops are enlarged by 256/224 and lose their rim, the test crops are seen whole; no
    augmentation. Our choice, as in `linear`: small batches, a sweep of lr around the paper's, a
    held-out tenth that chooses lr and epoch (the code: the best epoch on the test crops).
    """
    args.head = args.head or "linear"
    if args.head not in ("linear", "attentive"):
        raise ValueError(f"part_classification has no head {args.head}; choose --head linear, "
                         f"attentive")
    known, parts, _ = key_points(args)
    if args.head == "attentive" and not model.encoder:
        raise ValueError("the attentive head needs tokens, and pixels have none")
    names, tokens = wanted(args, "cls", "pat", "projected")
    kind, recipe = LinearHeads, RECIPES["part"]
    if args.head == "attentive":
        kind = functools.partial(AttentiveHeads, bn=args.bn)
        names, tokens, recipe = ["tokens"], all_tokens, RECIPES["part attentive"]

    def crops(split, large):
        rim = round((large - model.size) / 2)
        items = annotations.keypoints(args.data, args.data_root, split, args.limit)
        for crop, label in part_crops(items, known, parts, large, args.crop):
            yield crop[:, rim:rim + model.size, rim:rim + model.size], label

    (found, y), (tests, truth) = (         # key: on toy and with a --limit, as of part_retrieval
        extract(model, crop_batches(crops(split, large), model, args), args, names, tokens,
                key=("parts", split, args.limit, large, args.crop, tuple(parts)))
        for split, large in (("train", model.size * 256 // 224), ("test", model.size)))
    heads = {name: classifier(x[:, None], y, len(parts), recipe, args, kind)
             for name, x in found.items()}
    rows = {name: head.score(tests[name], truth) for name, head in heads.items()}
    for row in rows.values():
        del row["top-5"]                                 # of three or four parts
    epochs = args.epochs or recipe["epochs"]
    whose = " with batch norm of the test batch" * (args.head == "attentive" and args.bn == "batch")
    return report(rows, f"{args.head} head{whose} (SGD, {epochs} epochs), after the final norm; "
                  f"{', '.join(parts)} of {args.data}; squares by the study's {args.crop}, in "
                  f"training without their rim; lr and epoch chosen on a held-out tenth",
                  train=len(y), test=len(truth),
                  notes=[f"{model.name}, {name}: base lr {head.lr:.2g}, epoch {head.epoch} of "
                         f"{epochs}" for name, head in heads.items()] + without_crops(parts, y))


# ---- crops and readers ---------------------------------------------------------------------------


def box_crops(items, size, max_aspect, min_side):
    """Yields (box (3, size, size) uint8, its label): those of annotations.boxes that are large enough
    and nearly square, clipped to the picture and squashed to a square."""
    for item in items:
        height, width = item.image.shape[1:]
        for box, label, crowd in zip(item.boxes, item.labels, item.crowd):
            x0, y0 = (max(0, round(v)) for v in box[:2].tolist())
            x1, y1 = (min(limit, round(v)) for v, limit in zip(box[2:].tolist(), (width, height)))
            short, long = sorted((x1 - x0, y1 - y0))
            if not crowd and short >= max(1, min_side) and long <= max_aspect * short:
                crop = item.image[:, y0:y1, x0:x1]
                yield TF.resize(crop, [size, size], TF.InterpolationMode.BICUBIC,
                                antialias=True), int(label)


def landmark_views(items, boxes, side, model, args):
    """Paths or pictures (3, H, W) uint8 -> (x (1, 3, h, w) normalised, number (1,)), one by one.

    The longer side is shrunk to `side`, never enlarged; h and w are multiples of the patch.
    """
    p = model.encoder.patch_size if model.encoder else 1
    for number, item in share(enumerate(items)):
        image = TF.to_pil_image(item) if torch.is_tensor(item) else datasets.read_image(item)
        if boxes is not None:
            image = image.crop([round(float(v)) for v in boxes[number]])
        image.thumbnail((side, side), Resampling.LANCZOS)
        x = TF.pil_to_tensor(image)
        x = x[:, :max(p, x.shape[1] // p * p), :max(p, x.shape[2] // p * p)]
        x = F.pad(x, (0, max(0, p - x.shape[2]), 0, max(0, p - x.shape[1])))    # narrower than one
        x = x[None].to(args.device).float() / 255
        yield augment.normalize(x, model.mean, model.std), torch.tensor([number])


def toy_landmarks(side, args, films=40, frames=16, at=8, near=4):
    """What landmark_retrieval looks at on toy, in the form of annotations.landmarks."""
    films, size = min(films, args.limit or films), 2 * side
    shot = toy.video(torch.arange(films), frames, size=size, scenes=args.data == "toy-scenes")
    u = rng.uniform(torch.arange(films * frames), 2, args.seed, "photographer")
    views, seen = [], []
    for image, there, (zoom, spot) in zip(shot["image"].flatten(0, 1),
                                          shot["instances"].flatten(0, 1) > 0, u.tolist()):
        length, pixels = round(size * (0.5 + 0.5 * zoom)), there.nonzero()
        aim = pixels[int(spot * len(pixels))].tolist() if len(pixels) else (side, side)
        y, x = (min(max(0, centre - length // 2), size - length) for centre in aim)
        views.append(TF.resize(image[:, y:y + length, x:x + length], [side, side],
                               TF.InterpolationMode.BICUBIC, antialias=True))
        seen.append(there[y:y + length, x:x + length].double().mean().item() >= 0.2)
    others = [t for t in range(frames) if t != at]
    lists = {kind: [[] for _ in range(films)] for kind in ("easy", "hard", "junk")}
    for film in range(films):
        for place, t in enumerate(others):
            kind = "easy" if abs(t - at) <= near else "hard"
            kind = kind if seen[film * frames + t] else "junk"
            lists[kind][film].append(film * len(others) + place)
    return SimpleNamespace(database=[views[f * frames + t] for f in range(films) for t in others],
                           queries=views[at::frames], boxes=None, **lists)


KEYPOINTS = {  # data set: split, images at most, the study's parts, what the protocol says of it
    "toy": ("test", 1000, ("head", "leg", "wing", "tail"), "test creatures drawn at 256 px"),
    "toy-scenes": ("test", 1000, ("head", "leg", "wing", "tail"), "test scenes drawn at 256 px"),
    "cub": (None, None, ("right_eye", "right_leg", "left_wing", "tail"), "CUB, train and test"),
    "coco": ("train", None, ("nose", "right_wrist", "left_ankle"), "persons of COCO train2017")}


def key_points(args):
    """All parts of the data set, those that are asked for, and its line of KEYPOINTS."""
    if args.data not in KEYPOINTS:
        raise ValueError(f"{args.task} reads no key-points of {args.data}; choose --data "
                         f"{' or '.join(KEYPOINTS)}")
    known, line = annotations.part_names(args.data), KEYPOINTS[args.data]
    parts = known if args.parts == ["all"] else tuple(dict.fromkeys(args.parts)) or line[2]
    for part in parts:
        if part not in known:
            raise ValueError(f"{args.data} has no part {part!r}{config.nearest(part, known)}")
    if len(parts) < 2 and args.crop == "code":
        raise ValueError(f"--crop code measures from one of --parts to another, and {parts[0]} is "
                         f"alone: name two or more, or take --crop paper")
    return known, parts, line


def without_crops(parts, labels):
    """A note for the table. --crop paper keeps hardly an eye or a nose: others are too near."""
    none = [part for i, part in enumerate(parts) if not (labels == i).any()]
    return [f"no crop of {', '.join(none)} is large enough"] * bool(none)


def part_crops(items, names, parts, size, rule="code"):
    """Yields (square around a part (3, size, size) uint8, the part's position in `parts`).

    items: as from annotations.keypoints, names: of their P key-points; only v = 2 counts as visible.
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
    """(crop (3, S, S) uint8, label) one by one -> batches (B, 3, S, S) normalised, labels (B,).

    Several processes cut all crops, as a picture has many, and encode their share of them."""
    crops = iter(crops)
    for batch in share(iter(lambda: list(islice(crops, args.batch_size)), [])):
        x, labels = zip(*batch)
        x = torch.stack(x).to(args.device).float() / 255
        yield augment.normalize(x, model.mean, model.std), torch.tensor(labels)


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


DENSE = {
    "linear_segmentation": dense.linear_segmentation,
    "zero_shot_segmentation": dense.zero_shot_segmentation,
    "video": dense.video,
    "pose": dense.pose,
}
TASKS = {
    "knn": knn,
    "few_shot": few_shot,
    "linear": linear,
    "layerwise": layerwise,
    "attentive": attentive,
    "finetune": finetune.finetune,
    "segmentation": finetune.segmentation,
    "detection": detection.detection,
    "object_retrieval": object_retrieval,
    "part_retrieval": part_retrieval,
    "part_classification": part_classification,
    "landmark_retrieval": landmark_retrieval,
    "shape_bias": shape_bias,
    "frequency_noise": frequency_noise,
    **DENSE,
}
TUNED = {"finetune", "segmentation", "detection"}        # these train all weights
FROZEN = [task for task in TASKS if task not in TUNED]   # what --task all runs
OF_LINEAR, OF_PARTS = "linear shape_bias frequency_noise", "part_retrieval part_classification"
OF_VECTORS = f"knn few_shot object_retrieval {OF_PARTS} landmark_retrieval"
READ_BY = {       # a flag that these tasks read and the others refuse: it would change no number
    "recipe": f"{OF_LINEAR} finetune segmentation linear_segmentation detection",
    "paper": f"{OF_LINEAR} layerwise",
    "epochs": f"{OF_LINEAR} layerwise attentive part_classification finetune detection",
    "iters": "segmentation linear_segmentation pose detection",
    "lr": "segmentation linear_segmentation",
    "feature": f"{OF_LINEAR} {OF_VECTORS} layerwise",
    "hyber-norm": f"{OF_LINEAR} {OF_VECTORS}",
    "k": "knn",
    "bn": "attentive part_classification",
    "reinit": "finetune",
    "crop": OF_PARTS,
    "parts": OF_PARTS,
    "head": "part_classification segmentation",
    "episodes": "few_shot",
    "max-aspect": "object_retrieval",
    "min-side": "object_retrieval",
    "max-items": "object_retrieval part_retrieval",
    "imsize": "landmark_retrieval",
    "multiscale": "landmark_retrieval",
    "crop-queries": "landmark_retrieval",
    "no-crop": "shape_bias",
    "eps": "frequency_noise",
    "equal-energy": "frequency_noise",
    "level": "segmentation linear_segmentation zero_shot_segmentation",
    "swap-sides": "segmentation linear_segmentation",
    "prompt": "zero_shot_segmentation",
    "target": "zero_shot_segmentation",
    "show": f"part_retrieval segmentation detection {' '.join(DENSE)}"}
ALL_EPOCHS, ALL_IMAGES = 10, 2000      # of its heads, and of toy's splits, unless flags say other;
OWN_LIMIT = {*DENSE, "part_retrieval"}                   # these have smaller ones of their own

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
    encoders = [checkpoints.load_encoder(path, args.branch, args.size) for path in paths]
    args.data = args.data or next((e.source.data for e in encoders if e.source.data), "toy")
    names = [path.parent.name if path.name == "encoder.pt" else path.stem for path in paths]
    names = [name if names.index(name) == i else f"{name} ({i + 1})"     # a column for each
             for i, name in enumerate(names)]
    shape = encoders[0].config if encoders else SHAPE    # baselines are like the first checkpoint
    for baseline in baselines:
        torch.manual_seed(args.seed)
        encoders.append(vit.ViT(**shape).eval() if baseline == "untrained" else None)
    unknown = SimpleNamespace(path=None, method=None, branch=None, step=None, mean=augment.MEAN,
                              std=augment.STD, interpolation="bicubic")
    for name, encoder in zip([*names, *baselines], encoders):
        source = getattr(encoder, "source", unknown)
        size = args.size or (encoder.config if encoder else shape)["img_size"]
        if encoder and size % encoder.patch_size:
            raise ValueError(f"image size {size} is not a multiple of patch size "
                             f"{encoder.patch_size} of {name}")
        yield SimpleNamespace(name=name, encoder=encoder and encoder.to(args.device), size=size,
                              mean=source.mean, std=source.std, source=source,
                              interpolation=source.interpolation)


# ---- command line, table, JSON -------------------------------------------------------------------


def parse(argv=None):
    tasks = "\n".join(f"  {name:<24}{task.__doc__.splitlines()[0]}" for name, task in TASKS.items())
    tasks += (f"\n  {'all':<24}All of these that checkpoint and data allow, in one table: heads "
              f"train {ALL_EPOCHS} epochs,\n{'':<26}and of toy {ALL_IMAGES:,} images of each split "
              f"are used, unless --epochs, --limit say other")
    parser = config.Parser(description=__doc__, epilog=f"tasks:\n{tasks}", allow_abbrev=False,
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
    if args.task not in (*TASKS, "all"):
        raise ValueError(f"unknown task {args.task!r}{config.nearest(args.task, TASKS)}")
    args.device = distributed.pick_device(args.device)
    args.precision = distributed.pick_precision(args.precision, args.device)
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


def table_of_all(results):
    """Prints the first number of each feature of each task, a column for each model. results: with
    task. The other numbers are in results.jsonl."""
    models = list(dict.fromkeys(model.name for model, _ in results))
    rows = {}                                          # (task, feature, column) -> {model: number}
    for model, result in results:
        for feature, row in result.rows.items():
            column, number = next(iter(row.items()))
            rows.setdefault((result.task, feature, column), {})[model.name] = number
    lines, before = [("task", "feature", "number", *models)], None
    for (task, *names), row in rows.items():
        numbers = [f"{row[name]:.1f}" if name in row else "" for name in models]
        lines.append(("" if task == before else task, *names, *numbers))
        before = task
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        left, right = map(str.ljust, line[:3], widths), map(str.rjust, line[3:], widths[3:])
        print(*left, *right, sep="  ")


def reference(task, name):
    """The papers' rows, for the evaluated data set if there are any, as `table` takes them."""
    tables = config.read_yaml(Path(__file__).parent / "probes/papers.yaml").get(task, [])
    rows = []
    for t in [t for t in tables if t["data"] == name] or tables:
        columns = [column.split("/") for column in t["columns"]]
        for model, numbers in t["rows"].items():
            found = {}
            for (feature, column), number in zip(columns, numbers):
                if number is not None:
                    found.setdefault(feature, {})[column] = number
            rows.append((SimpleNamespace(name=f"{model} ({t['where']}; {t['data']})"),
                         SimpleNamespace(rows=found)))
    return rows


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
    for flag, tasks in READ_BY.items():
        given = getattr(args, flag.replace("-", "_")) != FLAGS[flag][1]
        if given and args.task not in (*tasks.split(), "all"):
            raise ValueError(f"{args.task} does not read --{flag}: leave it out")
    if args.task not in DENSE:
        distributed.init_distributed(args.device)
    elif not first:
        return
    if not first:                                        # the first process speaks and writes
        sys.stdout, args.show = open(os.devnull, "w"), False
    distributed.keep_memory()
    every = args.task == "all"
    jobs, results, missed, folder, begin = [], [], {}, Path(args.out), time.perf_counter()
    written, failed = {}, None                           # written: in order, each file once
    for model in models(args):
        if model.source.path:
            folder = Path(model.source.path).parent      # baselines: with the checkpoint before
        path = Path((args.json or folder / "results.jsonl") if first else os.devnull)
        jobs += [(model, path, task) for task in (FROZEN if every else [args.task])]
    # Dense probes come last: the first process does them alone, and the others wait at the end.
    end = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if every and (
        distributed.world_size() > 1) else None
    for model, path, task in sorted(jobs, key=lambda job: job[2] in DENSE):
        if task in DENSE and not first:
            continue
        own, start = argparse.Namespace(**{**vars(args), "task": task}), time.perf_counter()
        if every:                                        # probes share features; quick heads
            own.cache = args.cache or "attentive" not in (task, args.head)   # its tokens are many
            own.epochs = args.epochs or ALL_EPOCHS
            if dense.is_toy(args) and task not in OWN_LIMIT:
                own.limit = args.limit or ALL_IMAGES
        with append(path) as file:                       # opened first: no work for a bad path
            try:
                result = TASKS[task](model, own)
            except Exception as error:
                if every and isinstance(error, (ValueError, FileNotFoundError)):
                    missed.setdefault((model.name, str(error)), []).append(task)
                    continue
                failed = error                           # after the table of what came before it
                break
            result.task = task
            if args.hyber_norm == "joint" and "hyber" in result.rows:
                result.protocol += "; hyber: cls and pat brought to length 1 together"
            if not model.encoder:
                result.notes.append("pixels: the picture as 32 x 32 means at most, no encoder")
            elif not model.encoder.num_prefix and task not in DENSE:
                result.notes.append(f"{model.name} has no class token: its patch mean stands in")
            seconds = time.perf_counter() - start
            file.write(record(model, result, own, seconds))
            written[str(path)] = True
        if every:
            print(f"{model.name}: {task}, {seconds:.1f} s", flush=True)
        results.append((model, result))
    if failed and not (first and results):
        raise failed
    if end and not failed:
        dist.barrier(end)
    missed = [f"{name}: no {', '.join(tasks)}: {error}" for (name, error), tasks in missed.items()]
    if not failed and not any(each(bool(results))):      # the first alone has those of dense probes
        raise ValueError("; ".join(missed))
    if not first:
        return
    say(results, args)
    if every and not args.epochs:
        print(f"note: heads were trained for {ALL_EPOCHS} epochs: fewer than in their protocols")
    for note in dict.fromkeys([note for _, r in results for note in r.notes] + missed):
        print(f"note: {note}")
    if args.reference:
        for task in dict.fromkeys(r.task for _, r in results):
            theirs = reference(task, args.data)
            print(f"\n{task}: the papers' numbers, not measured here" if theirs else
                  f"\n{task}: the papers print no numbers")
            if theirs:
                table(theirs)
    if not every:                                        # in one line: the best of the first column
        for model, r in results:
            column = next(iter(next(iter(r.rows.values()))))
            feature = max(r.rows, key=lambda name: r.rows[name].get(column, -1))
            number = f"{r.rows[feature][column]:.1f} % ({column}, {feature})"
            print(f"{model.name}: {args.task} {number}")
    print(f"{time.perf_counter() - begin:.1f} s, appended to {', '.join(written)}", flush=True)
    if failed:
        raise failed


def say(results, args):
    """Prints what was measured, how, and the table."""
    where = f"{args.precision}, {args.device.type}; percent"
    for task in dict.fromkeys(r.task for _, r in results):
        mine = [(model, r) for model, r in results if r.task == task]
        counts = ", ".join(f"{n:,} {role}" for role, n in mine[-1][1].images.items())
        print(f"\n{task} on {args.data} ({counts}), {where}")
        for protocol in dict.fromkeys(r.protocol for _, r in mine):         # input sizes may differ
            print(", ".join(m.name for m, r in mine if r.protocol == protocol) + f": {protocol}")
        if args.task != "all":
            table(mine)
    if args.task == "all":
        print()
        table_of_all(results)


if __name__ == "__main__":
    config.main(main)
