"""Discrete tokenizers: an image becomes a grid of visual words, whose ids BEiT and CAE predict.

A tokenizer is an autoencoder with a discrete bottleneck, trained once and then frozen:

    view -> u in [0.1, 0.9] -> encoder -> scores of K words for each cell -> argmax -> ids
                                                                             |
                               u' <- decoder <- vector of the word <---------+

Pretraining needs encoder and argmax only; the decoder turns ids into pictures. Three kinds:

dalle  the published encoder of DALL-E (Ramesh et al., 2021), which BEiT and CAE use: 8192 words,
       cells of 8 pixels. Its weights come from a file that the user names; nothing in it is run.
vq     vector quantisation (van den Oord et al., 2017), on toy trained in about a minute. With unit
       vectors (as in BEiT v2) z of the encoder and c of the K codes, ids = argmax z.c, and the
       gradient goes straight through: the decoder sees z + stop(c - z). Codes are moving averages
       of their z, those that are hardly hit begin anew; all this and the network: our choice.
           L = mean (u' - u)^2 + 0.25 mean (z - stop(c))^2
dvae   DALL-E's own algorithm in small: the decoder sees a mixture of codes, drawn by the
       Gumbel-softmax (Jang et al., 2017) at a temperature tau that falls from 1 to 1/16
           L = -ln f(u | mu, b) + 0.1 (ln K - H(mean q))
       with the logit-Laplace density f and the posterior q over words. The last term keeps the
       words in use (without, most never are), where DALL-E has KL(q || uniform): our choice.

BEiT's appendix finds that a tokenizer of one's own, trained on ImageNet-1K, costs 0.2 points.
"""
import hashlib
import math
import os
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from lib import augment, checkpoints, distributed, rng
from lib.run import cosine, set_lr

# B images, S pixels, K words, h x w = N cells of an image, d width of a code, W width of a network

EPS = 0.1                    # pixels stay so far from 0 and 1, where the logit is infinite (DALL-E)


def map_pixels(v):
    """[0, 1] -> [0.1, 0.9]: what encoders take, never mean and standard deviation."""
    return (1 - 2 * EPS) * v + EPS


def unmap_pixels(u):
    return ((u - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def pixels(view):
    """(B, 3, S, S) normalised, as the loader gives it -> in [0, 1]."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(view.device, non_blocking=True)
                 for v in (augment.MEAN, augment.STD))
    return (view * std + mean).clamp(0, 1)


class Tokenizer(nn.Module):
    """What all kinds share: ids of a view, pictures of ids. Has vocabulary (K) and cell (pixels).
    A kind brings scores(u): (B, 3, S, S) -> (B, K, h, w), and draw(ids): (B, h, w) -> pixels."""

    report = ""                               # what survey() found, for one trained here

    @torch.no_grad()
    def ids(self, view):
        """(B, 3, S, S) normalised, as the loader gives it -> (B, N) int64, row by row."""
        return self.scores(map_pixels(pixels(view))).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, ids):
        """(B, N) -> (B, 3, S, S) in [0, 1]."""
        return self.draw(ids.unflatten(1, (math.isqrt(ids.shape[1]), -1)))


# --------------------------------------------------------------------------------------------------
# DALL-E's encoder and decoder


class Conv(nn.Module):
    """A convolution that keeps the size; its weights are called w and b, as in DALL-E's files."""

    def __init__(self, n_in, n_out, k):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, k, k) / math.sqrt(n_in * k**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class DalleBlock(nn.Module):
    def __init__(self, n_in, n_out, kernels):
        super().__init__()
        self.id_path = nn.Identity() if n_in == n_out else Conv(n_in, n_out, 1)
        hidden, path = n_out // 4, OrderedDict()
        for i, k in enumerate(kernels, 1):
            path[f"relu_{i}"] = nn.ReLU()
            path[f"conv_{i}"] = Conv(n_in if i == 1 else hidden, n_out if i == 4 else hidden, k)
        self.res_path = nn.Sequential(path)

    def forward(self, x):
        return self.id_path(x) + self.res_path(x) / 64                   # 8 blocks, squared


def dalle(n_in, k, first, widths, kernels, resize, n_out):
    """Encoder and decoder are built alike: a convolution, 4 groups of 2 blocks with a change of
    size after the first three, a convolution. No normalisation anywhere."""
    blocks, width = OrderedDict(input=Conv(n_in, first, k)), first
    for g, n in enumerate(widths, 1):
        group = OrderedDict(block_1=DalleBlock(width, n, kernels),
                            block_2=DalleBlock(n, n, kernels))
        if g < 4:
            group["resize"] = resize
        blocks[f"group_{g}"], width = nn.Sequential(group), n
    blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(width, n_out, 1)))
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(blocks)))


def dalle_encoder():
    """(B, 3, S, S) -> scores (B, 8192, S/8, S/8)."""
    return dalle(3, 7, 256, (256, 512, 1024, 2048), (3, 3, 3, 1), nn.MaxPool2d(2), 8192)


def dalle_decoder():
    """(B, 8192, h, w) one-hot -> (B, 6, 8h, 8w): mu and ln b of the logit-Laplace density."""
    return dalle(8192, 1, 128, (2048, 1024, 512, 256), (1, 3, 3, 3), nn.Upsample(scale_factor=2), 6)


class Dalle(Tokenizer):
    """DALL-E's tokenizer; without its decoder, pictures show each word in a colour of its own. In
    fp32, on a GPU with products in TF32, where the official module takes fp16: the ids of close
    calls may differ from its."""
    vocabulary, cell = 8192, 8

    def __init__(self, with_decoder=False):
        super().__init__()
        self.encoder = dalle_encoder()
        self.decoder = dalle_decoder() if with_decoder else None

    def scores(self, u):
        return self.encoder(u)

    def draw(self, ids):
        if self.decoder is None:
            colours = rng.uniform(torch.arange(self.vocabulary, device=ids.device), 3, "colour")
            return F.interpolate(colours[ids].permute(0, 3, 1, 2), scale_factor=self.cell)
        onehot = F.one_hot(ids, self.vocabulary).permute(0, 3, 1, 2).float()
        return unmap_pixels(self.decoder(onehot)[:, :3].sigmoid())


# --------------------------------------------------------------------------------------------------
# The small one


class Residual(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
                         nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return x + super().forward(x)


class Small(Tokenizer):
    """Each way a linear map of a cell, which learns within seconds, plus what convolutions see in
    and around it: halvings down to a cell, two residual blocks, and back."""

    def __init__(self, kind, vocabulary, cell, width=64, dim=32):
        super().__init__()
        self.config = dict(kind=kind, vocabulary=vocabulary, cell=cell, width=width, dim=dim)
        self.kind, self.vocabulary, self.cell = kind, vocabulary, cell
        n_in, n_out = (vocabulary, 6) if kind == "dvae" else (dim, 3)    # of encoder, of decoder
        widths = [width] * (cell.bit_length() - 2)                       # between the halvings
        down = [layer for a, b in zip([3, *widths], [*widths, width])
                for layer in (nn.Conv2d(a, b, 4, 2, padding=1), nn.ReLU())]
        up = [layer for a, b in zip([width, *widths], [*widths, n_out])
              for layer in (nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, padding=1))]
        self.encoder = nn.Sequential(*down[:-1], Residual(width), Residual(width), nn.ReLU(),
                                     nn.Conv2d(width, n_in, 1))
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 1), Residual(width), Residual(width),
                                     *up)
        self.linear_in = nn.Conv2d(3, n_in, cell, cell)
        self.linear_out = nn.ConvTranspose2d(dim, n_out, cell, cell)
        self.codes = nn.Parameter(F.normalize(torch.randn(vocabulary, dim), dim=1),
                                  requires_grad=kind == "dvae")          # vq averages instead

    def encode(self, u):
        """-> (B, d, h, w) of length 1 (vq), or logits (B, K, h, w) (dvae)."""
        e = self.linear_in(u) + self.encoder(u)
        return F.normalize(e, dim=1) if self.kind == "vq" else e

    def paint(self, z):
        """(B, d, h, w) -> (B, 3, S, S) before the sigmoid; dvae: (B, 6, S, S), mu and ln b."""
        return self.linear_out(z) + self.decoder(z)

    def scores(self, u):
        return similarity(self.encode(u), self.codes) if self.kind == "vq" else self.encode(u)

    def draw(self, ids):
        return unmap_pixels(self.paint(self.codes[ids].permute(0, 3, 1, 2))[:, :3].sigmoid())


def similarity(z, codes):
    """(B, d, h, w), (K, d) -> (B, K, h, w) inner products."""
    return torch.einsum("bdhw,kd->bkhw", z, codes)


def quantise(z, codes):
    """z: (B, d, h, w) of length 1 -> the nearest codes (B, d, h, w), with the gradient that goes
    straight through to z, and their ids (B, h, w)."""
    ids = similarity(z, codes).argmax(1)
    return z + (codes[ids].permute(0, 3, 1, 2) - z).detach(), ids


def vq_loss(net, u):
    """-> loss, its z (B, d, h, w) and ids (B, h, w), from which the codes learn."""
    z = net.encode(u)
    q, ids = quantise(z, net.codes)
    return F.mse_loss(net.paint(q).sigmoid(), u) + 0.25 * F.mse_loss(z, q.detach()), z, ids


@torch.no_grad()
def move_codes(codes, z, ids, momentum):
    """Each code that was hit moves towards the mean of its vectors and back to length 1; the
    others stay. codes (K, d), in place; z (n, d), ids (n,). Returns the hits (K,)."""
    hits = torch.bincount(ids, minlength=len(codes)).to(z.dtype)
    mean = F.normalize(torch.zeros_like(codes).index_add_(0, ids, z), dim=1)
    moved = F.normalize(torch.lerp(mean, codes, momentum), dim=1)
    codes.copy_(torch.where(hits[:, None] > 0, moved, codes))
    return hits


@torch.no_grad()
def restart_codes(codes, rate, z, generator):
    """Codes hit less than 0.05 times a batch (rate: (K,), running mean) become vectors of z."""
    cells = torch.randint(len(z), (len(codes),), generator=generator).to(z.device)
    dead = rate < 0.05
    codes.copy_(torch.where(dead[:, None], z[cells], codes))
    rate.masked_fill_(dead, 1.0)                                     # a chance until next time


def laplace_nll(u, mu, ln_b):
    """-ln of the logit-Laplace density f(u | mu, b), elementwise (DALL-E, section A.3)."""
    return (u.logit() - mu).abs() / ln_b.exp() + ln_b + math.log(2) + (u * (1 - u)).log()


def unused(logits):
    """(B, K, h, w) -> ln K - H(mean posterior of the batch): 0 if all words are used alike, ln K if
    only one is."""
    q = logits.softmax(1).mean((0, 2, 3))
    return math.log(len(q)) + torch.xlogy(q, q).sum()


def dvae_loss(net, u, tau, noise):
    """noise: uniform in [0, 1), (B, K, h, w), for the Gumbel-softmax."""
    logits = net.encode(u)
    mix = gumbel_softmax(logits, tau, noise)                         # soft: no straight-through
    mu, ln_b = net.paint(torch.einsum("bkhw,kd->bdhw", mix, net.codes)).chunk(2, 1)
    return laplace_nll(u, mu, ln_b).mean() + 0.1 * unused(logits)


def gumbel_softmax(logits, tau, noise):
    """Softmax over dimension 1 at temperature tau of logits plus Gumbel noise: as tau falls, rows
    become one-hot draws from softmax(logits)."""
    gumbel = -(-(noise.clamp(min=1e-7)).log()).log()
    return ((logits + gumbel) / tau).softmax(1)


# --------------------------------------------------------------------------------------------------
# Training the small one on the spot

BATCH, LR, WARMUP, WEIGHT_DECAY = 32, 1e-3, 50, 1e-4        # AdamW, cosine to 0 (our choice)
MOMENTUM = 0.9                                         # of vq's codes (our choice)


def train(cfg, run, images, view, cell):
    """A Small tokenizer of the images, seen in `view`: it must have seen the method's crops."""
    with torch.random.fork_rng([]):       # the method's weights do not depend on whether we trained
        torch.manual_seed(cfg.seed)
        net = Small(cfg.tokenizer_kind, cfg.codes, cell).to(run.device)
    total, vq = cfg.tokenizer_steps, cfg.tokenizer_kind == "vq"
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.0,
                            weight_decay=WEIGHT_DECAY)
    rate = torch.zeros(cfg.codes, device=run.device)        # hits of each code in a batch, averaged
    loader = data.Loader(images, [view], min(BATCH, len(images)), cfg.seed, run.device, cfg.workers)
    for step, batch in zip(range(total), loader.batches()):
        run.leave_if_told()
        set_lr(opt, cosine(step + 1, total, LR, 0.0, WARMUP))
        u, key = map_pixels(pixels(batch.views[0])), (cfg.seed, "tokenizer", step)
        if vq:
            if step % 100 == 0 and step < 0.8 * total:      # the first time: all; last: they settle
                with torch.no_grad():
                    z = flat(net.encode(u))
                restart_codes(net.codes, rate, z, rng.generator(*key))
            loss, z, ids = vq_loss(net, u)
            rate.lerp_(move_codes(net.codes, flat(z.detach()), ids.flatten(), MOMENTUM), 0.05)
        else:
            tau = cosine(step, round(0.75 * total), 1.0, 1 / 16)
            shape = cfg.codes, u.shape[2] // cell, u.shape[3] // cell
            loss = dvae_loss(net, u, tau, rng.uniform(batch.index, shape, *key))
        opt.zero_grad()
        loss.backward()
        opt.step()
        if (step + 1) % (total // 5 or 1) == 0 or step + 1 == total:
            if not loss.isfinite():
                raise ValueError(f"the tokenizer's loss is not finite by its step {step + 1}: try "
                                 f"--tokenizer-kind vq, or name a trained one with --tokenizer")
            run.say(f"tokenizer: step {step + 1}/{total}  loss {loss.item():.4f}")
    return net.eval()


def flat(z):
    """(B, d, h, w) -> (B*h*w, d)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def survey(net, images, size, run, workers):
    """What the words of held-out images are worth: {name: number}."""
    counts, errors, n = torch.zeros(net.vocabulary, device=run.device), torch.zeros(2), 0
    for x, _ in data.batches(images, size, device=run.device, workers=workers):
        ids, v = net.ids(x), pixels(x)
        mean = F.interpolate(F.avg_pool2d(v, net.cell), scale_factor=net.cell)
        errors += torch.stack([F.mse_loss(y, v) for y in (net.decode(ids), mean)]).cpu() * len(x)
        counts += torch.bincount(ids.flatten(), minlength=net.vocabulary)
        n += len(x)
    p = counts / counts.sum()
    return dict(used=int((p > 0).sum()), perplexity=torch.special.entr(p).sum().exp().item(),
                commonest=p.max().item(), mse=errors[0].item() / n, baseline=errors[1].item() / n)


class Count(nn.Module):
    """How often which of K words was to be named, by all processes: what a head can know that
    ignores its input."""

    def __init__(self, vocabulary):
        super().__init__()
        self.register_buffer("hits", torch.zeros(vocabulary, dtype=torch.float64))

    def add(self, ids):
        ones = torch.ones(ids.numel(), dtype=torch.float64, device=ids.device)
        here = torch.zeros_like(self.hits).index_add_(0, ids.flatten(), ones)
        self.hits += distributed.world_size() * distributed.all_mean(here)

    def facts(self):
        """The entropy of these words in nats, the share of the commonest."""
        p = self.hits / self.hits.sum()
        return dict(entropy=torch.special.entr(p).sum(), commonest=p.max())


# --------------------------------------------------------------------------------------------------
# Files


def get_tokenizer(cfg, run, images, held_out, view):
    """The frozen tokenizer of a run: from the file that --tokenizer names, or trained on the spot
    and kept beside the run's folder, for the next run with the same data, seed and sizes. view: of
    the tokenizer. Raises ValueError when its cells do not fit the patches."""
    side = cfg.img_size // cfg.patch_size
    cell = cfg.token_size // side
    if cfg.token_size % side or cell < 2 or cell & (cell - 1):
        raise ValueError(f"--token-size {cfg.token_size} does not cut into {side} x {side} cells, "
                         f"one a patch, of 2, 4, 8, ... pixels: try {8 * side} or {4 * side}")
    if cfg.tokenizer_kind not in ("vq", "dvae"):
        raise ValueError(f"--tokenizer-kind {cfg.tokenizer_kind}: vq or dvae")
    if cfg.codes < 2 or cfg.tokenizer_steps < 1:
        raise ValueError("--codes must be 2 or more, and --tokenizer-steps 1 or more")
    if cfg.tokenizer:
        net, path = load_tokenizer(cfg.tokenizer), cfg.tokenizer
    else:
        path = cache(cfg, images, view)
        if run.rank == 0 and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            run.say(f"training a tokenizer ({cfg.tokenizer_kind}, {cfg.codes} words), once; "
                    f"--tokenizer names a trained one")
            net, report = train(cfg, run, images, view, cell), ""
            try:
                report = survey(net, held_out, cfg.token_size, run, cfg.workers)
            except ValueError as error:                              # an image that is unreadable
                run.say(f"left out: {error}")
            save(path, net, report)
        while not path.exists():     # the others, maybe for longer than a collective would wait
            run.leave_if_told()
            time.sleep(1)
        net = load_tokenizer(path)
    if net.cell != cell:
        raise ValueError(f"{path} has cells of {net.cell} pixels: give --token-size "
                         f"{net.cell * side} for {side} x {side} words, one a patch")
    run.say(f"tokenizer {path}: {net.vocabulary} words" + (net.report and (
        "; on test images {used} used, perplexity {perplexity:.0f}, the commonest in "
        "{commonest:.1%} of cells; squared error {mse:.4f} (mean colour of a cell: {baseline:.4f})"
        ).format(**net.report)))
    return net.to(run.device).eval().requires_grad_(False)


def cache(cfg, images, view):
    """Where the tokenizer of these settings is kept: all that it depends on is in the name."""
    folder = os.path.isdir(cfg.data)
    what = (os.path.abspath(cfg.data) if folder else cfg.data,
            cfg.data_root and os.path.abspath(cfg.data_root), len(images), view, cfg.img_size,
            cfg.patch_size, cfg.token_size, cfg.tokenizer_kind, cfg.codes, cfg.tokenizer_steps,
            cfg.seed)
    name = f"tokenizer-{os.path.basename(what[0])}-{rng.key(*what) % 2**32:08x}.pt"
    return Path(cfg.out).parent / name


def save(path, net, report):
    """The file is whole or not there; where two runs train at once, the first one's stays."""
    own = f"{path}.{os.getpid()}"
    checkpoints.write_atomic(own, lambda file: torch.save(
        {"format": "tokenizer/1", "config": net.config, "report": report,
         "model": {name: x.cpu() for name, x in net.state_dict().items()}}, file))
    os.remove(own) if path.exists() else os.replace(own, path)


class Shell(dict):
    """Stands in for the modules of a pickled DALL-E: becomes their state dict, and runs nothing."""

    def __setstate__(self, state):
        self.update(state["_parameters"])
        for name, child in state["_modules"].items():
            self.update({f"{name}.{key}": x for key, x in child.items()})


SHELLS = [(Shell, name) for name in (
    "dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock", "dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.upsampling.Upsample")]


def load_tokenizer(path):
    """A tokenizer from a file of ours, or DALL-E's encoder: the official encoder.pkl (a pickled
    module, read without running it) or its state dict. A decoder.pkl beside it draws pictures."""
    path, raw = Path(path), read(path)
    try:
        if raw.get("format") == "tokenizer/1":
            net = Small(**raw["config"])
            net.load_state_dict(raw["model"])
            net.report = raw["report"]
            return net
        beside = path.with_name(path.name.replace("encoder", "decoder"))
        net = Dalle(with_decoder=beside != path and beside.exists())
        net.encoder.load_state_dict(raw)
        if net.decoder is not None:
            net.decoder.load_state_dict(read(beside))
        return net
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is no tokenizer, neither one of ours nor DALL-E's ({reason} ...)"
                         ) from None


def read(path):
    with torch.serialization.safe_globals(SHELLS):
        try:
            raw = checkpoints.read_file(path)
        except ValueError as error:
            raise ValueError(f"{error}. If it is a module pickled by PyTorch before 1.6: where "
                             f"dall_e is installed, save its state_dict() in a file") from None
    return raw.get("state_dict", raw)


class Fingerprint:
    """Goes into a run's checkpoint: with another tokenizer ids mean something else, so a run goes
    on with its own or not at all."""

    def __init__(self, net):
        content = b"".join(x.cpu().numpy().tobytes() for name, x in net.state_dict().items()
                           if not name.startswith(("decoder.", "linear_out.")))   # draw pictures
        self.value = hashlib.blake2b(content, digest_size=8).hexdigest()

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, saved):
        if saved != self.state_dict():
            raise ValueError("its words are others: name the file it learned with by --tokenizer, "
                             "out/tokenizer-*.pt")
