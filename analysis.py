"""Diagnostics: in what do encoders differ inside? Curves and pictures; nothing is trained.

    python analysis.py                                        # the standard report, newest run
    python analysis.py --checkpoint out/mae-toy out/dino-toy --what attention_distance nmi fourier
    python analysis.py --what all --data coco --data-root /data

    images -> z_0 -> [ attention A_l, heads o_l -> u_l -> MLP -> z_l ] x L -> final norm -> features
                       |                           |             |                            |
                       distance, nmi               similarities, spectra, Fourier             maps

z_0 is the embedding, u_l and z_l the residual stream after attention and after MLP of block l, all
before the final norm. Images are seen whole, without masks, and only patch tokens count. One pass
serves all curves: a block is measured as soon as it is computed and then forgotten; what stays are
sums over images in float64, so memory does not grow with their number.

The formulas stand in diagnostics.py, title, expected reading and drawing in figures.py. What makes
the numbers is a function here and a line of WHAT; what it needs of the shared pass, one of STREAMS.
A diagnostic leaves NAME.json, NAME.csv and, with matplotlib, NAME.png; index.html shows all.
"""
import argparse
import csv
import functools
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torchvision.transforms.v2 import functional as TF

import data
import evaluate
import vit
from diagnostics import figures
from diagnostics import formulas as d
from diagnostics.figures import PINK, QUERY, row, tile
from lib import augment, checkpoints, config, datasets, distributed, positions, rng
from probes import annotations, dense

# B images, L blocks, H heads, N = g x g patches, C width, p pixels a side of a patch, S of an image

natural = evaluate.natural
FLAGS = {      # name: (type or choices, default, help); the others are those of evaluate.py
    "what":       (str, [], "diagnostics, see below; all; none: the standard report"),
    **{name: evaluate.FLAGS[name] for name in ("checkpoint", "branch", "data", "data-root", "size",
                                               "out", "seed", "device", "workers")},
    "baseline":   (("untrained",), [], "for comparison: a ViT with random weights"),
    "limit":      (natural, None, "images; none: 256, sv_images 2048 or 4 C, patch_retrieval "
                   "1000, feature_variance 64"),
    "precision":  (str, "fp32", "of the encoder: bf16, fp32; sums are float64 either way"),
    "batch-size": (natural, 64, "images per forward"),
    "window":     (natural, None, "curves: patches see so many patches a side (odd); Park, D.1"),
    "center":     (bool, False, "token_similarity: also without the mean token of all images"),
    "copies":     (natural, 128, "feature_variance: views of an image"),
    "threshold":  (float, 0.95, "adjacent_count: cosine from which neighbours count as alike"),
    "image":      (int, 0, "first image of the pictures; files are taken evenly, so with another "
                   "--limit (and patch_retrieval's) it is another file"),
}


class Missing(ValueError):
    """Model or data set lack what a diagnostic looks at: said in one line, and the rest goes on."""


# ---- images --------------------------------------------------------------------------------------


def batches(model, args, limit, maps=False):
    """Test images, the same for every model: x (B, 3, S, S) normalised, their numbers (B,), and a
    class for every pixel (B, S, S) if asked for and there is one (no_maps), else None."""
    if args.data not in datasets.NAMES and args.data in annotations.SEGMENTATION or (
            maps and not no_maps(args.data, args.data_root)):
        yield from annotated(model, args, limit)
        return
    images = evaluate.load(args.data, args.data_root, "test", model.size, limit, args.device)
    for x, number in read(model, args, images):
        yield x, number, None


def read(model, args, images):
    return data.batches(images, model.size, args.batch_size, args.device, mean=model.mean,
                        std=model.std, workers=args.workers, interpolation=model.interpolation)


def level(name):
    """What a set's class maps are asked to tell apart: objects, if it can."""
    levels = annotations.SEGMENTATION[name][1]
    return next(kind for kind in ("object", "scene", "part") if kind in levels)


@functools.lru_cache
def no_maps(name, root):
    """Why there is no class for every pixel here; None: there is one."""
    if name not in annotations.SEGMENTATION:
        return (f"{name} has no class for every pixel: choose --data "
                f"{' or '.join(annotations.SEGMENTATION)}")
    try:
        next(iter(annotations.segmentation(name, root, "test", 1, level(name))), None)
    except (FileNotFoundError, ValueError) as error:
        return str(error)


def annotated(model, args, limit):
    """`batches` with class maps: 0 background, -1 unknown, in the geometry of data.batches."""
    S, kind = model.size, level(args.data)
    side = S if dense.is_toy(args) else S * 256 // 224               # short side, before the crop
    first = annotations.segmentation_classes(args.data, kind)[0].lower()
    items = iter(annotations.segmentation(args.data, args.data_root, "test", limit, kind, S))

    def centre(x, how):
        x = TF.resize(x, side, TF.InterpolationMode(how), antialias=True)
        return TF.center_crop(x, [S, S]).to(args.device)

    done = 0
    while some := list(itertools.islice(items, args.batch_size)):
        x = torch.stack([centre(item.image, model.interpolation) for item in some])
        y = torch.cat([centre(item.labels[None], "nearest-exact") for item in some]).long()
        y = torch.where(y == 255, -1, y + (first != "background"))
        number = torch.arange(done, done + len(some), device=args.device)
        yield augment.normalize(x / 255, model.mean, model.std), number, y
        done += len(some)


def few(model, args, n):
    """n test images from number --image on: (n, 3, S, S) normalised."""
    end, found = args.image + n, []
    for x, number, _ in batches(model, args, max(args.limit or 256, end)):   # as the shared pass
        found.append(x)
        if number[-1] >= end - 1:
            break
    x = torch.cat(found)[args.image:end]
    if not len(x):
        raise Missing(f"--image {args.image}: the data set ends before")
    return x


def picture(model, x):
    """(..., 3, S, S) normalised -> (..., S, S, 3) uint8 array."""
    return augment.denormalize(x, model.mean, model.std).movedim(-3, -1).cpu().numpy()


# ---- one pass: every block measured once, then forgotten -----------------------------------------


def half(args, x):
    return torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def walk(args, blocks, x, prefix, bias=lambda block: None, look=True):
    """Tokens (B, T, C) through blocks; yields for each what a method's forward does not keep.

    tokens z_l, class token and all; of patches only: before z_{l-1}, after u_l, out z_l (B, N, C),
    heads o_l (B, H, N, d); weights A_l (B, H, T, T), written out only if `look`.
    """
    for number, block in enumerate(blocks, 1):
        weights, heads = [] if look else None, []
        hook = block.attn.proj.register_forward_pre_hook(
            lambda module, given, heads=heads: heads.extend(given))
        with half(args, x):
            u = x + block.ls1(block.attn(block.norm1(x), bias(block), weights))
            z = u + block.ls2(block.mlp(block.norm2(u)))
        hook.remove()
        u, z = u.float(), z.float()
        heads = heads[0].unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)
        yield SimpleNamespace(
            number=number, tokens=z, before=x[:, prefix:], after=u[:, prefix:], out=z[:, prefix:],
            heads=heads[:, :, prefix:], weights=weights[0] if look else None)
        x = z


# name: (of what, function -> (B, ...), an image each). attention: weights; block: what walk yields;
# state: z_0, u_1, z_1, ... u_L, z_L; final: patches after the norm; labels: these and the shares of
# classes in each (B, N, classes). at: prefix, grid, between (distances of patches), threshold.
STREAMS = {
    "attention_distance": ("attention", lambda a, at: d.attention_distance(
        d.rows(a, at.prefix, 1e-32), at.between)),
    "nmi":              ("attention", lambda a, at: d.nmi(d.rows(a, at.prefix, 1e-8))),
    "class_mass":       ("attention", lambda a, at: d.class_mass(a, at.prefix)),
    "head_similarity":  ("block", lambda c, at: d.head_similarity(c.heads)),
    "depth_similarity": ("block", lambda c, at: d.depth_similarity(c.before, c.after)),
    "unison":           ("block", lambda c, at: d.unison(c.before, c.after)),
    "token_similarity": ("state", lambda z, at: d.token_similarity(z)),
    "token_mean":       ("state", lambda z, at: z.mean(1)),
    "centred_similarity": ("state", lambda z, at: d.token_similarity(z - next(at.mean))),
    "sv_tokens":        ("state", lambda z, at: d.log_spectrum(z)),
    "fourier":          ("state", lambda z, at: d.fourier(z, at.grid)),
    "adjacent_depth":   ("state", lambda z, at: d.adjacent(z, at.grid, at.threshold).mean(1)),
    "adjacent":         ("final", lambda z, at: counts(d.adjacent(z, at.grid, at.threshold))),
    "final_similarity": ("final", lambda z, at: d.token_similarity(z)),
    "adjacent_labels":  ("labels", lambda z, y, at: counts(d.adjacent(y, at.grid), y.any(2))),
    "pairs":            ("labels", lambda z, y, at: torch.stack(
        [d.pair_histogram(*one) for one in zip(z, d.majority(y))])),
}


def counts(neighbours, known=None):
    """(B, N) counts 0 ... 8 -> (B, 9) share of the patches with each; with known (B, N), of those
    that are, and fewer rows, as an image without any says nothing."""
    found = F.one_hot(neighbours.long(), 9).double()                                 # (B, N, 9)
    if known is None:
        return found.mean(1)
    found, known = (x[known.any(1)] for x in (found, known))
    return (found * known[..., None]).sum(1) / known.sum(1, keepdim=True)


class Means:
    """What the STREAMS of these names measure: means[name] over images, float64, (layers, ...)."""

    def __init__(self, names):
        self.names, self.sums = names, {}                    # (name, layer): images, their sum

    def measure(self, kind, layer, *what):
        for name in self.names:
            if STREAMS[name][0] == kind:
                values, (n, total) = STREAMS[name][1](*what), self.sums.get((name, layer), (0, 0))
                self.sums[name, layer] = n + len(values), total + values.double().sum(0).cpu()

    def through(self, args, blocks, x, at, bias=lambda block: None):
        """Tokens (B, T, C) through blocks, all that is asked measured -> what the last leaves."""
        look = any(STREAMS[name][0] == "attention" for name in self.names)
        self.measure("state", 0, x[:, at.prefix:].float(), at)
        for c in walk(args, blocks, x, at.prefix, bias, look):
            self.measure("state", 2 * c.number - 1, c.after, at)
            self.measure("state", 2 * c.number, c.out, at)
            self.measure("block", c.number, c, at)
            if look:
                self.measure("attention", c.number, c.weights, at)
        return c.tokens

    def __contains__(self, name):
        return any(key == name for key, _ in self.sums)

    def __getitem__(self, name):
        return torch.stack([total / n for (key, _), (n, total) in self.sums.items() if key == name])


@torch.no_grad()
def shared_pass(model, args, names):
    """All curves in one forward per batch -> means of the encoder, of MAE's decoder or why there
    are none; grid, number of images. Park et al. take the validation set, their notebooks a mean
    over batches of which they see one; here 256 images by default, each with the same weight."""
    encoder, decoder, behind = model.encoder, None, None
    if "decoder" in names:
        try:
            decoder, behind = mae_decoder(model), Means(["attention_distance", "nmi", "fourier"])
        except Missing as why:
            behind = why
    means = Means([name for name in STREAMS if name in names])
    maps, seen = any(STREAMS[name][0] == "labels" for name in means.names), 0
    mean = (shared_pass(model, args, ["token_mean"]).means["token_mean"].float().to(args.device)
            if "centred_similarity" in names else ())             # of each state, z_0, u_1, z_1 ...
    for x, _, labels in batches(model, args, args.limit or 256, maps):
        tokens, grid = encoder.embed(x)
        at = SimpleNamespace(prefix=encoder.num_prefix, grid=grid, threshold=args.threshold,
                             between=d.spacing(grid, encoder.patch_size).to(x.device),
                             mean=iter(mean))
        wall = encoder.local_mask(args.window, grid) if args.window else None
        bias = functools.partial(encoder.attention_bias, grid=grid, attn_mask=wall)
        tokens = encoder.norm(means.through(args, encoder.blocks, tokens, at, bias))
        patches = encoder.split(tokens)[1]
        means.measure("final", 0, patches, at)
        if labels is not None:
            y = d.label_shares(labels, encoder.patch_size, max(int(labels.max()) + 1, 1))
            means.measure("labels", 0, patches, y, at)
        if decoder:
            behind.through(args, decoder.blocks, decoder.enter(tokens), at)
        seen += len(x)
    return SimpleNamespace(means=means, decoder=behind, grid=grid, images=seen)


# ---- what paints, rebuilt from the checkpoint ----------------------------------------------------


def trained(model):
    """The state dict of pre-training that holds what paints, in official names, {} if there is
    none: of the file itself, of full.pt beside it (MAE, ASL, SimMIM) or the student's in last.pt
    (MMC, hybrid); and the settings of the run, if they lie there, too."""
    path, own = Path(model.source.path or ""), getattr(model.source, "method", None)
    files = [path, path.with_name("full.pt")] if model.source.path else []
    files += [path.with_name("last.pt")] if own in ("mmc", "hybrid") else []     # they are large
    for raw in (checkpoints.read_file(file) for file in files if file.is_file()):
        state = raw.get("model") or raw.get("state", {}).get("student", {})
        if PAINTERS.keys() & state.keys():
            config, device = path.with_name("config.yaml"), next(model.encoder.parameters()).device
            return ({key: x.to(device) for key, x in state.items()},
                    yaml.safe_load(config.read_text()) if config.is_file() else {})
    return {}, {}


def mae_decoder(model):
    """MAE's decoder: enter(tokens (B, 1+N, C), all of them, or with restore (B, N) some) -> what
    its first block gets; blocks; paint(tokens) -> (B, N, 3pp). Missing if there is none, or if how
    many heads it has is not known: the weights do not tell."""
    state, config = trained(model)
    if "decoder_embed.weight" not in state:
        raise Missing("no decoder of MAE (full.pt beside encoder.pt, or an official full file)")
    own = {key.removeprefix("decoder_"): x for key, x in state.items() if key[:8] == "decoder_"}
    pos, (width, dim) = own.pop("pos_embed"), own["embed.weight"].shape
    depth = len({key.split(".")[1] for key in own if key.startswith("blocks.")})
    heads = config.get("decoder_num_heads", 16 if width == 512 else None)            # the official
    if heads is None:
        raise Missing("config.yaml of the run is wanted beside its weights: how many heads has a "
                      f"decoder of width {width}? (MAE's own, 512 wide, has 16)")
    module = nn.ModuleDict(dict(
        embed=nn.Linear(dim, width), norm=nn.LayerNorm(width, 1e-6),
        blocks=nn.ModuleList(vit.Block(width, heads) for _ in range(depth)),
        pred=nn.Linear(width, len(own["pred.bias"])))).to(pos.device).eval()
    module.load_state_dict(own)

    def enter(tokens, restore=None):
        x = module["embed"](tokens)
        if restore is not None:
            missing = state["mask_token"].expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
            y = torch.cat([x[:, 1:], missing], 1)
            x = torch.cat([x[:, :1], y.gather(1, restore[..., None].expand_as(y))], 1)
        old, new = (math.isqrt(table.shape[1] - 1) for table in (pos, x))
        return x + positions.resize_positions(pos, (old, old), (new, new), 1, "size")

    return SimpleNamespace(enter=enter, blocks=module["blocks"],
                           paint=lambda x: module["pred"](module["norm"](x))[:, 1:])


def painter(model, x, seed):
    """Hides part of images x (B, 3, S, S) as pre-training did -> hidden (B, 1, S, S) bool, what is
    given (B, 3, S, S), and paint(block) -> (B, 3, S, S) from that block's tokens, later blocks left
    out, final norm as in training. Missing where nothing paints."""
    state, config = trained(model)
    kind = next((key for key in PAINTERS if key in state), None)
    if not kind:
        raise Missing("nothing paints: full.pt of MAE, ASL or SimMIM or last.pt of MMC or the "
                      "hybrid is wanted beside encoder.pt")
    return PAINTERS[kind](model, x, seed, state, config)


def mae_painter(model, x, seed, state, config):
    decoder, p = mae_decoder(model), model.encoder.patch_size
    if "norm_pix" not in config:
        print("note: no config.yaml beside the decoder: it is taken for MAE's official one "
              "(norm_pix, three quarters hidden)")
    g = x.shape[-1] // p
    visible = int(g * g * (1 - config.get("mask_ratio", 0.75)))
    order = rng.uniform(torch.arange(len(x), device=x.device), g * g, seed, "hide")
    order = order.argsort(dim=1, stable=True)
    restore = order.argsort(1)
    layers, _ = model.encoder.layers(x, keep=order[:, :visible])
    var, mean = torch.var_mean(F.pixel_unshuffle(x, p), 1, keepdim=True)             # (B, 1, g, g)

    def paint(block):
        z = decoder.enter(layers[block], restore)
        for own in decoder.blocks:
            z = own(z)
        z = pixels_last(decoder.paint(z), g)
        z = z * (var + 1e-6).sqrt() + mean if config.get("norm_pix", True) else z
        return F.pixel_shuffle(z, p)
    hidden = cells(restore >= visible, x.shape[-1])
    return hidden, x.masked_fill(hidden, 0), paint


def pixels_last(z, g):
    """(B, N, pp3), colours innermost -> (B, 3pp, g, g) for pixel_shuffle, that wants them first."""
    return z.unflatten(2, (-1, 3)).permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, (g, g))


def simmim_painter(model, x, seed, state, config):
    """Of the hybrid, too: its state, from last.pt, is not in official names."""
    encoder, p = model.encoder, model.encoder.patch_size
    g = x.shape[-1] // p
    side = max(1, config.get("mask_block", 32) // p)                                 # of a block
    rank = rng.uniform(torch.arange(len(x), device=x.device), (g // side) ** 2, seed, "hide")
    rank = rank.argsort(1).argsort(1)
    blocks = rank < math.ceil(config.get("mask_ratio", 0.6) * rank.shape[1])
    hidden = cells(blocks, x.shape[-1])
    token = state["encoder.mask_token"] if "encoder.mask_token" in state else state["mask_token"]
    layers, _ = encoder.layers(x, mask=hidden[:, 0, ::p, ::p].flatten(1), mask_token=token)

    def paint(block):
        z = encoder.split(layers[block])[1].mT.unflatten(2, (g, g))
        return F.pixel_shuffle(F.conv2d(z, state["decoder.0.weight"], state["decoder.0.bias"]), p)
    return hidden, x.masked_fill(hidden, 0), paint


def mmc_painter(model, x, seed, state, config):
    """By the student, on whose tokens the head has learned; encoder.pt is the teacher. Hidden are
    rectangles, in noise."""
    student = vit.ViT(**model.encoder.config).to(x.device).eval()
    student.load_state_dict({key.removeprefix("backbone."): z for key, z in state.items()
                             if key.startswith("backbone.")})
    head = checkpoints.numbered({key.removeprefix("head_rec."): z for key, z in state.items()
                         if key.startswith("head_rec.")}, relu=False).to(x.device).eval()
    number, S = torch.arange(len(x)), x.shape[-1]
    corners = rng.uniform(number, (255, 4), seed, "hide")
    hidden = torch.stack([rectangles(u, S, config.get("noise_share", 0.75)) for u in corners])
    hidden = hidden[:, None].to(x.device)
    given = rng.normal(number, x.shape[1:], seed, "noise").to(x.device).where(hidden, x)
    layers, _ = student.layers(given)

    def paint(block):
        z = head(student.split(layers[block])[1])
        return F.pixel_shuffle(pixels_last(z, S // student.patch_size), student.patch_size)
    return hidden, given, paint


def rectangles(u, S, share):
    """u (M, 4) uniform numbers for rectangles of sides below 0.3 S, one after the other until they
    cover `share` -> (S, S) bool."""
    hidden = torch.zeros(S, S, dtype=torch.bool)
    for top, left, high, wide in u.tolist():
        if hidden.sum() >= share * S * S:
            break
        top, left = (int(start * (S - 1)) for start in (top, left))
        high, wide = (1 + int(length * (int(0.3 * S) - 1)) for length in (high, wide))
        hidden[top:top + high, left:left + wide] = True
    return hidden


PAINTERS = {"decoder_embed.weight": mae_painter, "decoder.0.weight": simmim_painter,
            "head_rec.0.weight": mmc_painter}


# ---- numbers of curves, from the shared pass s ---------------------------------------------------


def upto(n, start=0):
    return list(range(start, n + start))


def distance_numbers(model, args, s):
    found, p = s.means["attention_distance"], model.encoder.patch_size               # (L, H)
    return dict(block=upto(len(found), 1), pixels=found.mean(1), patches=found.mean(1) / p,
                pixels_by_head=found, uniform=d.spacing(s.grid, p).double().mean().item())


def nmi_numbers(model, args, s):
    """Spread over heads (divisor H) of means over images, and the density of the heads of block 3
    (fig. E.1); how both are taken is our choice. Beside it the share of attention that goes to the
    class token, if there is one."""
    found, at = s.means["nmi"], torch.linspace(-0.1, 1.1, 512)                       # (L, H)
    third = found[min(3, len(found)) - 1]
    out = dict(block=upto(len(found), 1), nmi=found.mean(1), spread=found.std(1, correction=0),
               nmi_by_head=found, heads=found.shape[1], density_at=at,
               density=d.kde(third.float(), at), density_of=third)
    if model.encoder.num_prefix:
        out["class_mass"] = s.means["class_mass"].mean(1)
    return out


def block_numbers(name, model, args, s):
    return dict(block=upto(len(s.means[name]), 1), similarity=s.means[name])


def token_numbers(model, args, s):
    """Park et al., fig. 5c, "in the self-attentions": after them (our choice); beside it z_l."""
    found = s.means["token_similarity"]                      # z_0, u_1, z_1, ... u_L, z_L
    out = dict(block=upto(len(found) // 2, 1), after_attention=found[1::2],
               depth=upto(len(found) // 2 + 1), after_block=found[::2])
    if "centred_similarity" in s.means:
        found = s.means["centred_similarity"]
        out |= dict(centred_after_attention=found[1::2], centred_after_block=found[::2])
    return out


def unison_numbers(model, args, s):
    """Curves over all blocks, and two images in one basis before and after the last attention; how
    far apart their centres are after it, over before, in all dimensions (our choice). The paper
    shows MoCo's last block and SimMIM's first; here it is the last of every model."""
    found, encoder = s.means["unison"], model.encoder
    tokens, grid = encoder.embed(few(model, args, 2))
    wall = encoder.local_mask(args.window, grid) if args.window else None
    *_, last = walk(args, encoder.blocks, tokens, encoder.num_prefix,
                    lambda block: encoder.attention_bias(block, grid, attn_mask=wall), look=False)
    plane = d.principal_plane(last.before, last.after)                               # (2, I, N, 3)
    before, after = (z[0].mean(0) - z[-1].mean(0) for z in (last.before, last.after))
    return dict(block=upto(len(found), 1), common=found[:, 0], spread_ratio=found[:, 1],
                centre_ratio=(after.norm() / before.norm()).item(), plane=plane.cpu())


def spectrum_numbers(found):
    """(L+1, R) mean log spectra of z_0 ... z_L."""
    delta, (first, second) = d.delta(found), d.ranks(found.shape[1])
    return dict(rank=upto(found.shape[1], 1), delta=delta, depth=upto(len(found)),
                ranks=[first, second], at_first=delta[:, first - 1],
                at_second=delta[:, second - 1], log_second_value=found[:, 1])


def sv_tokens_numbers(model, args, s):
    return spectrum_numbers(s.means["sv_tokens"][::2])


def sv_images_numbers(model, args, s):
    """Mean patch tokens of many images, one covariance for each depth (fig. 7b). A pass of its own,
    as it takes more images: 2048 or 4 C (our choice; the paper: the validation set)."""
    encoder = model.encoder
    scatter = [d.Scatter() for _ in range(encoder.depth + 1)]
    for x, *_ in batches(model, args, args.limit or max(2048, 4 * encoder.embed_dim)):
        with half(args, x):
            tokens, grid = encoder.embed(x)
            wall = encoder.local_mask(args.window, grid) if args.window else None
            states = [tokens, *encoder.layers(x, norm=False, attn_mask=wall)[0]]
        for one, z in zip(scatter, states):
            one.add(encoder.split(z)[1].float().mean(1).cpu())
    if scatter[0].n < 3:
        raise Missing(f"3 images are the least, not {scatter[0].n}: raise --limit")
    found = torch.stack([one.log_spectrum() for one in scatter])
    return spectrum_numbers(found) | dict(images=scatter[0].n)


def fourier_numbers(model, args, s):
    found = s.means["fourier"]                                                       # (2L+1, K)
    delta = (found - found[:, :1])[::2]
    return dict(frequency=d.frequencies(s.grid), delta=delta, depth=upto(len(delta)),
                highest=delta[:, -1], highest_at=d.frequencies(s.grid)[-1])


def decoder_numbers(model, args, s):
    """The curves of fourier, nmi and attention_distance go on through MAE's decoder, to which all
    patches are given: no mask tokens (Park et al., fig. 10)."""
    if isinstance(s.decoder, Missing):
        raise s.decoder
    out = dict(highest_at=d.frequencies(s.grid)[-1])
    for name, means, start in (("", s.means, 0), ("decoder_", s.decoder, model.encoder.depth)):
        found = means["fourier"][::2]
        out |= {f"{name}depth": upto(len(found), start),
                f"{name}block": upto(len(found) - 1, start + 1),
                f"{name}highest": found[:, -1] - found[:, 0],
                f"{name}nmi": means["nmi"].mean(1),
                f"{name}pixels": means["attention_distance"].mean(1)}
    return out


def adjacent_numbers(model, args, s):
    """By features after the final norm, and by label vectors: the published 4.3, whose +- is over
    patches (our reading), of those where any pixel has a label. Over depth: before the norm."""
    depth, n = s.means["adjacent_depth"][::2], torch.arange(9.0).double()
    out = dict(count=upto(9), threshold=args.threshold, depth=upto(len(depth)), at_depth=depth)
    for name, key in (("features", "adjacent"), ("labels", "adjacent_labels")):
        if key in s.means:
            share = s.means[key][0]                                                  # (9,)
            mean = (share * n).sum()
            out |= {f"{name}_share": share, f"{name}_mean": mean.item(),
                    f"{name}_std": ((share * n * n).sum() - mean**2).clamp(min=0).sqrt().item()}
    return out


def pair_numbers(model, args, s):
    """MMC, fig. 5. Our choice where it is silent: pairs of one image of the size trained on (--size
    480: as MMC's prompts), after the final norm, a patch has the label of at least half of its
    pixels, background counts in pairs across only."""
    if "pairs" not in s.means:
        raise Missing(no_maps(args.data, args.data_root))
    found = s.means["pairs"][0] * s.images                                           # (2, 201)
    bins, total = found[:, :-1], found[:, :-1].sum(1)
    if not total.all():
        raise Missing("no image shows two patches of one object and two of different ones: raise "
                      "--limit")
    return dict(overlap=d.overlap(*bins).item(), intra=(found[0, -1] / total[0]).item(),
                inter=(found[1, -1] / total[1]).item(), pairs=total.tolist(),
                cosine=torch.linspace(-0.995, 0.995, 200), densities=bins / total[:, None] * 100)


# ---- pictures, and what needs a pass of its own --------------------------------------------------


def final(model, args, x):
    """(B, 3, S, S) -> all tokens after the final norm, --batch-size images at a time."""
    with half(args, x):
        return torch.cat([model.encoder(part).float() for part in x.split(args.batch_size)])


def map_numbers(model, args, s):
    """Two queries in the first, the middle and the last block but one (Park et al., fig. 2), mean
    of heads (our choice: the notebook has one head, and frames that drift, as they are 14 pixels
    wide and patches 16); and the class token in the last block, of which the first four heads are
    drawn (by DINO: each). Our choice: the size trained on (DINO: --size 480)."""
    x, encoder = few(model, args, 1), model.encoder
    L, p, P, g = encoder.depth, encoder.patch_size, encoder.num_prefix, (
        x.shape[-1] // encoder.patch_size)
    blocks = sorted({0, -(-L // 2) - 1, max(L - 2, 0)})
    queries = [(g // 2, g // 2), (g // 4, g // 8)]
    _, weights = encoder.layers(x, [L - 1], attention=[*blocks, L - 1])
    image = tile(picture(model, x)[0], boxes=[
        (p * c, p * r, p, colour) for (r, c), colour in zip(queries, QUERY)])
    maps, tiles = [], [image]
    for (r, c), colour in zip(queries, QUERY):
        for b in blocks:
            maps.append(d.rows(weights[b], P, 1e-8)[0].mean(0)[r * g + c].view(g, g))
            tiles.append(tile(maps[-1], f"block {b + 1}", boxes=[(c, r, 1, colour)]))
    heads = weights[L - 1][0, :, 0, P:].float() if P else weights[L - 1][0, :0, 0]   # (H or 0, N)
    kept = d.keep_mass(heads, 0.6).sum(1)
    tiles += [tile(one.view(g, g), f"class, head {h}\n60 % on {kept[h - 1]} patches")
              for h, one in enumerate(heads[:4], 1)]
    return dict(blocks=[b + 1 for b in blocks], queries=queries, maps=torch.stack(maps),
                class_token=heads, class_token_60_percent_on=kept, show=[row("", tiles)])


def unit(model, args, x):
    """(B, 3, S, S) -> (B, N, C) patches after the final norm, of length 1."""
    return F.normalize(model.encoder.split(final(model, args, x))[1], dim=-1).cpu()


def kmeans_numbers(model, args, s, shown=6):
    """k-means with k = 3, each image for itself (MMC, fig. 6), on unit vectors after the final
    norm, images of the size trained on (our choices; --size 480: as MMC's prompts)."""
    x = few(model, args, shown)
    found = torch.stack([d.kmeans(z, seed=args.seed)[0] for z in unit(model, args, x)])
    found = found.unflatten(1, (math.isqrt(found.shape[1]), -1))                     # (I, g, g)
    return dict(segments=found, show=[
        row("", [tile(image) for image in picture(model, x)], once=True),
        row("", [tile(one, limits=(0, 2)) for one in found])])


def pca_numbers(model, args, s, shown=6):
    """The three principal components of the patches of all these images as red, green and blue."""
    x = few(model, args, shown)
    z = unit(model, args, x).double()                                                # (I, N, C)
    v, explained = d.principal(z.flatten(0, 1))
    colour = (z @ v.T).unflatten(1, (math.isqrt(z.shape[1]), -1))                    # (I, g, g, 3)
    low, high = (colour.flatten(0, 2).quantile(share, 0) for share in (0.02, 0.98))
    colour = ((colour - low) / (high - low)).clamp(0, 1)
    return dict(explained=explained, show=[
        row("", [tile(image) for image in picture(model, x)], once=True),
        row("", [tile(one) for one in colour])])


def heat_numbers(model, args, s, shown=4):
    """Cosine of all patches to the prompt; IoU of what is above a threshold with the object: mean
    over prompts, one for each class in an image.

    Our choice: images of the size trained on, cut out of the middle. MMC has them 480 x 480 (--size
    480) and whole; the protocol of its table 1 is evaluate.py --task zero_shot_segmentation, whose
    numbers are others.
    The prompt lies deepest in the object (our choice); of what covers less than half of it, there
    is none: skipped. The whole picture is the floor: tokens that are all alike reach it and no
    more. `order` needs no threshold. Of data without class maps the prompt is the centre patch, and
    there are no scores.
    """
    limit, p = max(args.limit or 256, args.image + shown), model.encoder.patch_size
    thresholds, scores, skipped, tiles, heats = [t / 10 for t in range(10)], [], 0, [], []
    rule = SimpleNamespace(prompt="deepest")
    for x, number, labels in batches(model, args, limit, maps=True):
        z, g = unit(model, args, x), x.shape[-1] // p
        for i, image in enumerate(picture(model, x)):
            objects, fresh = [None], number[i] >= args.image and len(tiles) < 2 * shown
            if labels is not None:
                kinds, area = labels[i][labels[i] > 0].unique(return_counts=True)
                kinds = kinds[area.argsort(descending=True, stable=True)]            # largest first
                objects, known = [(labels[i] == kind).cpu() for kind in kinds], labels[i].cpu() >= 0
            for truth in objects:
                place = (g // 2, g // 2) if truth is None else dense.prompt(
                    truth, dense.cells(truth, p), p, rule, None)
                if place is None:
                    skipped += 1
                    continue
                q = g * place[0] + place[1]
                heat = z[i] @ z[i, q]                                                # (N,)
                big = pixels(heat, p)
                if truth is not None:
                    inside, outside = (F.avg_pool2d(part[None].float(), p).flatten()
                                       for part in (truth, known & ~truth))
                    others = torch.arange(len(heat)) != q                # it is like itself
                    scores.append([*(d.iou((big > t) & known, truth) for t in thresholds),
                                   d.iou(known, truth),
                                   d.order(heat[others], inside[others], outside[others])])
                if fresh:                                    # the largest object with a prompt
                    (r, c), fresh = place, False
                    outlines = [] if truth is None else [(truth, QUERY[1])]
                    tiles += [tile(image, star=(p * (c + 0.5), p * (r + 0.5)), outlines=outlines),
                              tile(heat.view(g, g), star=(c + 0.5, r + 0.5), limits=(0, 1))]
                    heats.append(big)
        if labels is None and len(tiles) == 2 * shown:       # nothing to score: enough is seen
            break
    if not tiles:
        raise Missing(f"--image {args.image}: the data set ends before, or shows no object from "
                      "there on that covers half a patch")
    if not scores:
        return dict(show=[row("", tiles)])
    *mean, floor, order = torch.tensor(scores).double().nanmean(0).tolist()
    best = max(mean)
    for shown_image, heat in zip(tiles[::2], heats):
        shown_image.outlines.append((heat > thresholds[mean.index(best)], PINK))
    return dict(thresholds=thresholds, iou=mean, best=best, whole_picture=floor, order=order,
                prompts=len(scores), skipped=skipped, show=[row(
                    f"IoU {best:.2f}, whole {floor:.2f}; order {order:.2f}", tiles)])


def pixels(values, p):
    """(N,) of patches -> (S, S): of the pixels in them."""
    g = math.isqrt(len(values))
    return values.view(g, g).repeat_interleave(p, 0).repeat_interleave(p, 1)


def retrieval_numbers(model, args, s, shown=3):
    """A crop asks for the crops most like it, by the encoder (mean patch, after the final norm) and
    by the projection head (`checkpoints.projector`: what enters the loss, of DINO and iBOT the
    logits).

    Every crop is encoded on its own, since tokens of the whole image know their surroundings. 24
    are shown, as in the part-aware study; its script shows 84. The query's own image is left out
    (our choice, for few images: its windows overlap; the script keeps it).
    """
    head, images, bank = checkpoints.projector(model.encoder), [], {}
    for x, *_ in batches(model, args, max(args.limit or 1000, args.image + shown)):
        images.append(augment.denormalize(x, model.mean, model.std).cpu())
        for part in x.split(8):
            tokens = final(model, args, d.windows(part))
            found = {"encoded": model.encoder.split(tokens)[1].mean(1)}
            found |= {"projected": head(tokens)} if head else {}
            for name, z in found.items():
                bank.setdefault(name, []).append(z.half().cpu())
    images, bank, S = torch.cat(images), {k: torch.cat(z) for k, z in bank.items()}, model.size
    owner = torch.arange(len(images)).repeat_interleave(49)

    def strip(q, nearest):
        """An image and the query in it, framed, and the nearest crops side by side: a tile."""
        crops = [d.windows(images[i // 49, None].float())[i % 49] for i in (q, *nearest)]
        gaps = F.pad(torch.stack([images[q // 49].float(), *crops]), (0, S // 8), value=255)
        return tile(torch.cat([*gaps], 2).clamp(0, 255).byte().permute(1, 2, 0), boxes=[
            (S // 8 * (q % 49 % 7), S // 8 * (q % 49 // 7), S // 4, QUERY[0]),
            (S + S // 8, 0, S - 1, QUERY[0])])

    out, rows = dict(queries=[], crops=len(owner)), []
    for q in (49 * i + 24 for i in range(args.image, min(args.image + shown, len(images)))):
        out["queries"].append(q)
        for name, z in bank.items():
            at, cosine = d.nearest(z, q, 24, owner == owner[q])
            out.setdefault(f"{name}_crop", []).append(at)
            out.setdefault(f"{name}_similarity", []).append(cosine)
            rows.append(row(name, [strip(q, at.tolist())]))
    if not rows:
        raise Missing(f"--image {args.image}: the data set ends before")
    return out | dict(show=rows)


def recon_numbers(model, args, s):
    """Which block paints? Tokens of the last six, each sent straight to the painting head; mean
    absolute change from block to block, of colours from 0 to 1 (MMC, fig. 9; our choice: the final
    norm before the head, all patches as painted, visible ones, too)."""
    x, L = few(model, args, 1), model.encoder.depth
    hidden, given, paint = painter(model, x, args.seed)
    blocks = upto(min(6, L), L - min(6, L))
    painted = torch.cat([paint(b).float() for b in blocks])                          # (6, 3, S, S)
    shade = x.new_tensor(model.std).view(3, 1, 1)
    change = (shade * painted.diff(dim=0)).abs().mean(1)                             # (5, S, S)
    by_block, top = change.mean((1, 2)), max(change.max().item() if len(change) else 0, 1e-9)
    error = (shade * (painted - x)).abs().masked_select(hidden).view(len(blocks), -1).mean(1)
    images = picture(model, torch.cat([x, given, painted]))
    return dict(blocks=[b + 1 for b in blocks], change=by_block, largest_change=top,
                error_where_hidden=error, show=[
        row("painted", [tile(images[0], "image"), *(
            tile(one, f"from block {b + 1}") for b, one in zip(blocks, images[2:]))]),
        row(f"change, 0 to {top:.2f}", [tile(images[1], "given"), tile(None), *(
            tile(one, f"mean {mean:.3f}", limits=(0, top))
            for one, mean in zip(change, by_block))])])


def tsne_numbers(model, args, s, each=6):
    """3 classes x 6 images, the last block without final norm, as the paper says (its notebook
    shows block 5 of 16 images). Purity makes the picture a number."""
    images = None                                            # a set of class maps has no classes
    if args.data in datasets.NAMES or args.data not in annotations.SEGMENTATION:
        limit = 1000 if args.data in ("toy", "toy-scenes") else None     # they are drawn, not read
        images = evaluate.load(args.data, args.data_root, "test", model.size, limit, args.device)
    known = images is not None and images.labels is not None
    if known:
        full = [(images.labels == c).nonzero()[:each, 0] for c in images.labels.unique()]
        full = [at for at in full if len(at) == each]
        if len(full) < 3:
            raise Missing(f"3 classes with {each} test images each are the least, {args.data} has "
                          f"{len(full)}")
        chosen = torch.cat(full[:3])
        images = replace(images, labels=images.labels[chosen],
                         paths=images.paths and [images.paths[i] for i in chosen.tolist()],
                         pixels=None if images.pixels is None else images.pixels[chosen])
        x = torch.cat([x for x, _ in read(model, args, images)])
    else:
        x = few(model, args, 3 * each)
    z = model.encoder.layers(x, [model.encoder.depth - 1], norm=False)[0][0]
    z = model.encoder.split(z)[1].float().cpu()                                      # (I, N, C)
    image = torch.arange(len(z)).repeat_interleave(z.shape[1])
    label = images.labels.repeat_interleave(z.shape[1]) if known else image
    same_image, same_class = d.purity(z.flatten(0, 1), image, label)
    return dict(purity_image=same_image, image=image, label=label,
                position=d.tsne(z.flatten(0, 1), seed=args.seed)) | (
                    dict(purity_class=same_class) if known else {})


def variance_numbers(model, args, s):
    """How much do features change: the class token under crops, patches under hidden others? MMC,
    table 10: 128 views of an image. Our choices: no final norm; crops of 0.4 to 1 of the view, no
    flip; noise in half of the patches, each drawn by itself where MMC hides blocks; 64 images, not
    all. Without a class token the patch mean stands in for it."""
    V, found, encoder = args.copies, [], model.encoder

    def last_block(x):
        parts = [encoder.layers(part, [encoder.depth - 1], norm=False)[0][0].float()
                 for part in x.split(args.batch_size)]
        return encoder.split(torch.cat(parts))

    for x, numbers, _ in batches(model, args, args.limit or 64):
        S, views, g = x.shape[-1], torch.arange(V), x.shape[-1] // encoder.patch_size
        for one, number in zip(x, numbers.tolist()):
            crops = cut(model, one, V, (0.4, 1.0), args.seed, number)
            cls, patches = last_block(augment.normalize(crops, model.mean, model.std))
            order = rng.uniform(views, g * g, args.seed, number, "hide").argsort(1)
            noise = rng.normal(views, (3, S, S), args.seed, number, "noise").to(x.device)
            hidden = torch.where(cells(order < g * g // 2, S).to(x.device), noise, one)
            found.append((*d.variance(patches.mean(1) if cls is None else cls),
                          *d.variance(last_block(hidden)[1])))
    crops, crops_share, hidden, hidden_share = torch.tensor(found).double().mean(0).tolist()
    what = "class token" if encoder.num_prefix else "patch mean"
    return dict(crops=crops, hidden_patches=hidden, images=len(found), views=V, bars={
        f"{what}, crops": crops_share, "patches, half of them hidden": hidden_share})


def cut(model, x, count, scale, *seed):
    """Image (3, S, S) -> (count, 3, S, S) random crops in [0, 1], shares `scale` of the area."""
    boxes = augment.crop_boxes(rng.uniform(torch.arange(count), 22, *seed, "crops"), *x.shape[1:],
                            torch.tensor(scale), torch.tensor([3 / 4, 4 / 3])).to(x.device)
    whole = augment.denormalize(x, model.mean, model.std).expand(count, -1, -1, -1)
    return augment.crop(whole, boxes, x.shape[-1])


def cells(hidden, S):
    """(B, N) bool of patches -> (B, 1, S, S) bool of pixels."""
    g = math.isqrt(hidden.shape[1])
    return F.interpolate(hidden.view(-1, 1, g, g).float(), S) > 0


def view_numbers(model, args, s):
    """What the pretext tasks of the methods see of an image; no network takes part."""
    x = few(model, args, 2)
    x, other, S, p = x[:1], x[-1:], x.shape[-1], model.encoder.patch_size
    g = S // p
    order = rng.uniform(torch.tensor([args.image]), g * g, args.seed, "hide").argsort(1).argsort(1)
    most, some = (cells(order < round(share * g * g), S).to(x.device) for share in (0.75, 0.3))
    noise = rng.normal(torch.tensor([args.image]), (3, S, S), args.seed, "noise").to(x.device)
    tiles = F.pad(x.unflatten(3, (g, p)).unflatten(2, (g, p)), (0, 1, 0, 0, 0, 1), value=9.0)
    columns = {"image": x, "patches": tiles.flatten(4).flatten(2, 3),                # white gaps
               "visible, 25 %": x.masked_fill(most, 0), "hidden, 75 %": x.masked_fill(~most, 0),
               "75 % noise": x.where(~most, noise), "30 % of another": x.where(~some, other)}
    shown = {name: picture(model, z)[0] for name, z in columns.items()}
    for i, crop in enumerate(cut(model, x[0], 2, (0.2, 0.6), args.seed), 1):
        shown[f"crop {i}"] = crop.permute(1, 2, 0).cpu().numpy()
    return dict(hidden=most.float().mean().item(), show=[
        row(" ", [tile(image, name) for name, image in shown.items()], once=True)])


# ---- numbers that training and evaluate.py measured ----------------------------------------------


def loss_numbers(model, args, s):
    """The run's own log and, of a run on toy, that of its method's default run, from curves.yaml;
    relative_distance: of the two losses, mean over the steps that both have (our choice)."""
    log = Path(model.source.path).with_name("metrics.jsonl") if model.source.path else None
    lines = log.read_text().splitlines() if log and log.is_file() else ()
    lines = [json.loads(line) for line in lines if line.endswith("}")]       # a kill tears the last
    if not lines:
        raise Missing("no log: metrics.jsonl of the run is wanted beside encoder.pt")
    votes = [line for line in lines if "knn" in line]
    out = dict(step=[line["step"] for line in lines], loss=[line["loss"] for line in lines],
               knn_step=[line["step"] for line in votes], knn=[line["knn"] for line in votes])
    known = config.read_yaml(Path(__file__).parent / "diagnostics/curves.yaml")
    if model.source.data == "toy" and model.source.method in known:
        ours = known[model.source.method]
        out |= {f"reference_{name}": ours[name] for name in out}
        there = dict(zip(ours["step"], ours["loss"]))
        far = [abs(x - there[n]) / there[n] for n, x in zip(out["step"], out["loss"]) if n in there]
        out |= dict(relative_distance=sum(far) / len(far)) if far else {}
    return out


HOW = "epochs limit recipe size seed feature k".split()      # models of a figure should share them


def recorded(model, args, task, more=""):
    """Lines of results.jsonl beside the checkpoint: of the file, branch and step that are looked
    at, this task and data set, latest last; `how` of each: its settings HOW."""
    path, own = Path(model.source.path or ""), (model.source.branch, model.source.step)
    file = path.with_name("results.jsonl") if model.source.path else None
    lines = map(json.loads, file.open()) if file and file.is_file() else ()
    lines = [x | dict(how={name: x["settings"].get(name) for name in HOW}) for x in lines
             if x["task"] == task and x["data"] == args.data and x["checkpoint"]
             and Path(x["checkpoint"]).name == path.name and (x["branch"], x["step"]) == own]
    if not lines:
        raise Missing(f"not yet measured on {args.data}: python evaluate.py --task {task}{more}")
    return lines


def layerwise_numbers(model, args, s):
    line = recorded(model, args, "layerwise")[-1]                            # "block 3 pat"
    top1 = {int(name.split()[1]): found["top-1"] for name, found in line["metrics"].items()}
    return dict(block=sorted(top1), top1=[top1[b] for b in sorted(top1)], how=line["how"])


def noise_numbers(model, args, s):
    """Accuracy with noise in a band minus without."""
    line = recorded(model, args, "frequency_noise")[-1]
    [found] = line["metrics"].values()
    drop = {float(name.split()[0]): x for name, x in found.items() if name.endswith(" pi")}
    return dict(frequency=sorted(drop), change=[-drop[f] for f in sorted(drop)], how=line["how"])


def bias_numbers(model, args, s):
    line = recorded(model, args, "shape_bias")[-1]
    [found] = line["metrics"].values()
    return dict(bars={name: x for name, x in found.items() if name != "either"}, how=line["how"])


def knn_numbers(model, args, s):
    line = recorded(model, args, "knn")[-1]
    return dict(bars={name: next(iter(numbers.values()))                     # the smallest k
                      for name, numbers in line["metrics"].items()}, how=line["how"])


def reinit_numbers(model, args, s):
    """Accuracy after fine-tuning with the first or last m blocks drawn anew, minus that of m = 0;
    as far as there are lines, of which those without --reinit count as m = 0. Only runs that were
    trained like the latest compare."""
    lines = recorded(model, args, "finetune", " --reinit first:0 (and first:1, last:1, ...)")
    found, out = {}, dict(how=lines[-1]["how"])
    for line in (line for line in lines if line["how"] == out["how"]):
        end, m = (line["settings"]["reinit"] or "first:0").split(":")
        [numbers] = line["metrics"].values()
        found[end if int(m) else "none", int(m)] = numbers["top-1"]
    zero = found.pop(("none", 0), None)
    if zero is None or not found:
        raise Missing("fine-tuning is to be measured with --reinit first:0 and with other blocks, "
                      "all with the settings of the latest run")
    for end in ("first", "last"):
        change = {0: 0.0} | {m: x - zero for (e, m), x in found.items() if e == end}
        change = dict(sorted(change.items()))
        out |= {f"{end}_count": list(change), f"{end}_change": list(change.values())}
    return out


def accuracy_numbers(model, args, s):
    """ASL, fig. 1, which gives no formula: here of the last tokens, after the final norm."""
    line = recorded(model, args, "linear")[-1]
    [found] = line["metrics"].values()
    return dict(linear=[found["top-1"]], similarity=s.means["final_similarity"], how=line["how"])


# ---- all of them ---------------------------------------------------------------------------------

WHAT = {       # name: (model, args, shared pass) -> numbers; what that needs of the shared pass
    "attention_distance":   (distance_numbers, "attention_distance"),
    "nmi":                  (nmi_numbers, "nmi class_mass"),
    "head_similarity":      (functools.partial(block_numbers, "head_similarity"),
                             "head_similarity"),
    "depth_similarity":     (functools.partial(block_numbers, "depth_similarity"),
                             "depth_similarity"),
    "token_similarity":     (token_numbers, "token_similarity"),
    "token_transform":      (unison_numbers, "unison"),
    "sv_tokens":            (sv_tokens_numbers, "sv_tokens"),
    "sv_images":            (sv_images_numbers, ""),
    "fourier":              (fourier_numbers, "fourier"),
    "decoder":              (decoder_numbers, "decoder attention_distance nmi fourier"),
    "adjacent_count":       (adjacent_numbers, "adjacent adjacent_labels adjacent_depth"),
    "intra_inter":          (pair_numbers, "pairs"),
    "attention_maps":       (map_numbers, ""),
    "pca":                  (pca_numbers, ""),
    "kmeans":               (kmeans_numbers, ""),
    "prompt_heatmap":       (heat_numbers, ""),
    "patch_retrieval":      (retrieval_numbers, ""),
    "layer_reconstruction": (recon_numbers, ""),
    "tsne":                 (tsne_numbers, ""),
    "feature_variance":     (variance_numbers, ""),
    "views":                (view_numbers, ""),
    "loss":                 (loss_numbers, ""),
    "layerwise":            (layerwise_numbers, ""),
    "frequency_noise":      (noise_numbers, ""),
    "shape_bias":           (bias_numbers, ""),
    "reinit":               (reinit_numbers, ""),
    "knn":                  (knn_numbers, ""),
    "accuracy_similarity":  (accuracy_numbers, "final_similarity"),
}
STANDARD = """attention_distance nmi head_similarity depth_similarity token_similarity sv_tokens
fourier attention_maps pca kmeans prompt_heatmap""".split()


# ---- command line and report ---------------------------------------------------------------------


def parse(argv=None):
    known = "\n".join(f"  {name:<22}{figure.title}{' *' * (name in STANDARD)}"
                      for name, figure in figures.FIGURES.items())
    parser = config.Parser(
        description=__doc__, epilog=f"diagnostics (*: standard report):\n{known}",
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (kind, default, text) in FLAGS.items():
        how = (dict(action="store_true") if kind is bool else dict(choices=kind)
               if isinstance(kind, tuple) else dict(type=kind, metavar=name.upper()))
        how |= dict(nargs="+") if isinstance(default, list) else {}
        shown = "" if default in (None, [], False) else f" [{default}]"
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"]),
                            default=default, help=text + shown, **how)
    args = parser.parse_args(argv)
    args.what = list(WHAT) if args.what == ["all"] else list(dict.fromkeys(args.what)) or STANDARD
    for name in args.what:
        if name not in WHAT:
            raise ValueError(f"unknown diagnostic {name!r}{config.nearest(name, WHAT)}")
    if args.image < 0:
        raise ValueError(f"--image {args.image}: images are counted from 0")
    if args.copies < 2:
        raise ValueError(f"--copies {args.copies}: a variance needs two views")
    args.device = distributed.pick_device(args.device)
    args.precision = distributed.pick_precision(args.precision, args.device)
    return args


@torch.no_grad()
def analyse(model, args):
    """All that is asked for, of one model -> {diagnostic: numbers}, {diagnostic: why it is left
    out}."""
    streams = {stream for name in args.what for stream in WHAT[name][1].split()}
    streams |= {"centred_similarity"} if args.center and "token_similarity" in streams else set()
    shared, found, missed = shared_pass(model, args, streams) if streams else None, {}, {}
    for name in args.what:
        try:
            found[name] = WHAT[name][0](model, args, shared)
        except Missing as why:
            missed[name] = str(why)
    return found, missed


def plain(x):
    """Tensors as lists, for JSON; what is not a number as null."""
    if torch.is_tensor(x):
        return plain(x.tolist())
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items() if name != "show"}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def flat(x, *at):
    """Nested numbers -> rows of CSV: name, four places for positions, value."""
    for key, value in x.items() if isinstance(x, dict) else enumerate(x):
        if isinstance(value, (dict, list)):
            yield from flat(value, *at, key)
        else:
            yield [*at, key, *[""] * (4 - len(at)), value]


def write(folder, name, results, args):
    """NAME.json, and NAME.csv with a row for each number and its position in the (nested) list."""
    content = dict(
        what=name, title=figures.FIGURES[name].title, reading=figures.FIGURES[name].reading,
        data=args.data,
        settings={key: str(value) for key, value in vars(args).items()}, torch=torch.__version__,
        models=[dict(model=r.model.name, checkpoint=r.model.source.path, step=r.model.source.step,
                     size=r.model.size, numbers=plain(r.numbers)) for r in results])
    text = json.dumps(content).encode()
    checkpoints.write_atomic(folder / f"{name}.json", lambda f: f.write(text))
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow("model quantity i j k l value".split())
        for r in results:
            out.writerows([r.model.name, *line] for line in flat(plain(r.numbers)))


def differences(results):
    """Of what evaluate.py recorded, the settings in which models differ, and how they do."""
    how = {r.model.name: r.numbers["how"] for r in results if "how" in r.numbers}
    return [f"--{key} " + ", ".join(f"{of[key]} ({name})" for name, of in how.items())
            for key in HOW if len({str(of[key]) for of in how.values()}) > 1]


def main(argv=None):
    args, begin = parse(argv), time.perf_counter()
    distributed.keep_memory()
    folder = Path(args.out) / "analysis"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another --out"
                      ) from None
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        plt = None
    found, missed, names = {name: [] for name in args.what}, {}, []
    for i, model in enumerate(evaluate.models(args)):
        names.append(model.name)
        numbers, left_out = analyse(model, args)
        for name, values in numbers.items():
            found[name].append(SimpleNamespace(
                model=model, numbers=values, show=values.get("show"), **figures.style(i)))
        for name, why in left_out.items():
            missed.setdefault((name, why), []).append(model.name)
        seconds = time.perf_counter() - begin
        print(f"{model.name}: {len(numbers)} diagnostics, after {seconds:.0f} s")
    found = {name: results for name, results in found.items() if results}
    for name, results in found.items():
        write(folder, name, results, args)
        if plt:
            figures.save(plt, folder / f"{name}.png", name, results)
        for r in results:                                    # in a line: the numbers that are one
            said = {key: x for key, x in plain(r.numbers).items() if isinstance(x, (int, float))}
            said = ", ".join(f"{key} {x:.4g}" for key, x in said.items())
            print(f"{name:<22}{r.model.name}{': ' * bool(said)}{said}")
    notes = [f"{name} left out ({', '.join(of)}): {why}" for (name, why), of in missed.items()]
    notes += [f"{name}: not measured alike: {', '.join(unlike)}" for name, results in found.items()
              if (unlike := differences(results))]
    head = f"{', '.join(names)}; test images of {args.data}; {args.precision}"
    figures.page(folder / "index.html", head, found, notes, bool(plt))
    for note in notes:
        print(f"note: {note}")
    if not plt:
        print("figures need matplotlib: pip install matplotlib; the numbers are complete")
    print(f"{time.perf_counter() - begin:.1f} s; {folder}/index.html; a .json, .csv"
          f"{', .png' * bool(plt)} for each diagnostic")


if __name__ == "__main__":
    config.main(main)
