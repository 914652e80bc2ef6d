"""Discrete tokenizers: an image becomes a grid of tokens, whose ids BEiT and CAE predict.

A tokenizer is an autoencoder with a discrete bottleneck. It is trained once and then frozen:

    view -> u in [0.1, 0.9] -> encoder -> scores of K codes for each cell -> argmax -> ids
                                                                              |
                               u' <- decoder <- code of each id <-------------+

A cell is the square of the view that gets one token; there are as many cells as patches. A code is
one of the K entries of the codebook, an id its index, and a token the code that a cell gets.
Pretraining needs encoder and argmax only; the decoder is for visualizations. Three kinds:

dalle  the published encoder of DALL-E (Ramesh et al., 2021), used by BEiT and CAE: 8192 codes,
       cells of 8 pixels. The user gives a file with its weights; no code in the file is run.
vq     vector quantization (van den Oord et al., 2017); takes about a minute on toy. The encoder's
       output z and the codes c are unit vectors (as in BEiT v2) and ids = argmax z.c. The gradient
       is straight-through: the decoder gets z + stop(c - z). Codes are moving averages of their z,
       and rarely used codes are re-initialized. The network and the code updates are our choice.
           L = mean (u' - u)^2 + 0.25 mean (z - stop(c))^2
dvae   DALL-E's algorithm with a small network: the decoder gets a mixture of codes, drawn by the
       Gumbel-softmax (Jang et al., 2017) at a temperature tau that decreases from 1 to 1/16
           L = -ln f(u | mu, b) + 0.1 (ln K - H(mean q))
       with the logit-Laplace density f and the posterior q over codes. The last term keeps the
       codes in use (without it most never are); it is our choice, DALL-E has KL(q || uniform).

BEiT's appendix reports that accuracy is 0.2 points lower with a tokenizer trained on ImageNet-1K
than with DALL-E's.
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
from lib import augment, checkpoints, distributed, progress, rng
from lib.run import cosine, set_lr

# B images, S image side, K codes, N = h x w cells of an image, dim width of a code

EPS = 0.1                    # distance of pixels from 0 and 1, where the logit is infinite (DALL-E)


def map_pixels(v):
    """Pixels in [0, 1] -> [0.1, 0.9], the input of the encoders."""
    return (1 - 2 * EPS) * v + EPS


def unmap_pixels(u):
    """The inverse of `map_pixels`, clipped to [0, 1]."""
    return ((u - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def unnormalize(view):
    """View (B, 3, S, S), normalized by the loader -> pixels in [0, 1]."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(view.device, non_blocking=True)
                 for v in (augment.MEAN, augment.STD))
    return (view * std + mean).clamp(0, 1)


class Tokenizer(nn.Module):
    """Base class: ids of a view, pixels of ids. Attributes: vocab_size (K), cell (side in pixels).

    A subclass defines scores(u): (B, 3, S, S) -> (B, K, h, w), and decode_grid(ids): (B, h, w) ->
    pixels (B, 3, S, S) in [0, 1]."""

    report = ""                               # result of evaluate_tokenizer(), if trained here

    @torch.no_grad()
    def ids(self, view):
        """View (B, 3, S, S), normalized by the loader -> ids (B, N) int64 in raster order."""
        return self.scores(map_pixels(unnormalize(view))).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, ids):
        """Ids (B, N) of a square grid -> pixels (B, 3, S, S) in [0, 1]."""
        return self.decode_grid(ids.unflatten(1, (math.isqrt(ids.shape[1]), -1)))


# --------------------------------------------------------------------------------------------------
# DALL-E's encoder and decoder


class Conv(nn.Module):
    """A convolution that keeps the size. Its parameters have the names of DALL-E's files."""

    def __init__(self, n_in, n_out, k):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, k, k) / math.sqrt(n_in * k**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class DalleBlock(nn.Module):
    """A residual block of four convolutions, whose inner width is a quarter of the output's."""

    def __init__(self, n_in, n_out, kernels):
        super().__init__()
        self.id_path = nn.Identity() if n_in == n_out else Conv(n_in, n_out, 1)
        hidden, path = n_out // 4, OrderedDict()
        for i, k in enumerate(kernels, 1):
            path[f"relu_{i}"] = nn.ReLU()
            path[f"conv_{i}"] = Conv(n_in if i == 1 else hidden, n_out if i == 4 else hidden, k)
        self.res_path = nn.Sequential(path)

    def forward(self, x):
        return self.id_path(x) + self.res_path(x) / 64          # the number of blocks, squared


def build_dalle(n_in, k, first, widths, kernels, resize, n_out):
    """DALL-E's encoder or decoder: a convolution, 4 groups of 2 blocks, of which the first three
    end in `resize`, and a convolution. There is no normalization layer."""
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
    return build_dalle(3, 7, 256, (256, 512, 1024, 2048), (3, 3, 3, 1), nn.MaxPool2d(2), 8192)


def dalle_decoder():
    """(B, 8192, h, w) one-hot -> (B, 6, 8h, 8w): mu and ln b of the logit-Laplace density."""
    return build_dalle(8192, 1, 128, (2048, 1024, 512, 256), (1, 3, 3, 3),
                       nn.Upsample(scale_factor=2), 6)


class Dalle(Tokenizer):
    """DALL-E's tokenizer. Without its decoder, decode() gives each code a color of its own.

    It computes in fp32 (on a GPU, matrix products in TF32), the official module on a GPU in fp16:
    where two scores are nearly equal, ids may differ."""
    vocab_size, cell = 8192, 8

    def __init__(self, with_decoder=False):
        super().__init__()
        self.encoder = dalle_encoder()
        self.decoder = dalle_decoder() if with_decoder else None

    def scores(self, u):
        return self.encoder(u)

    def decode_grid(self, ids):
        if self.decoder is None:
            colors = rng.uniform(torch.arange(self.vocab_size, device=ids.device), 3, "colour")
            return F.interpolate(colors[ids].permute(0, 3, 1, 2), scale_factor=self.cell)
        onehot = F.one_hot(ids, self.vocab_size).permute(0, 3, 1, 2).float()
        return unmap_pixels(self.decoder(onehot)[:, :3].sigmoid())


# --------------------------------------------------------------------------------------------------
# The small tokenizer: vq or dvae


class Residual(nn.Sequential):
    """x + convolutions of x."""

    def __init__(self, width):
        super().__init__(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
                         nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return x + super().forward(x)


class Small(Tokenizer):
    """A small convolutional encoder and decoder, of kind "vq" or "dvae".

    The encoder is the sum of a linear map of each cell, which learns within seconds, and a
    convolutional network that also sees the neighborhood: stride-2 convolutions down to one
    position per cell, then two residual blocks. The decoder mirrors it."""

    def __init__(self, kind, vocab_size, cell, width=64, dim=32):
        super().__init__()
        self.config = dict(kind=kind, vocab_size=vocab_size, cell=cell, width=width, dim=dim)
        self.kind, self.vocab_size, self.cell = kind, vocab_size, cell
        n_encoded, n_decoded = (vocab_size, 6) if kind == "dvae" else (dim, 3)
        widths = [width] * (cell.bit_length() - 2)                # between the stride-2 layers
        down = [layer for a, b in zip([3, *widths], [*widths, width])
                for layer in (nn.Conv2d(a, b, 4, 2, padding=1), nn.ReLU())]
        up = [layer for a, b in zip([width, *widths], [*widths, n_decoded])
              for layer in (nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, padding=1))]
        self.encoder = nn.Sequential(*down[:-1], Residual(width), Residual(width), nn.ReLU(),
                                     nn.Conv2d(width, n_encoded, 1))
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 1), Residual(width), Residual(width),
                                     *up)
        self.linear_in = nn.Conv2d(3, n_encoded, cell, cell)
        self.linear_out = nn.ConvTranspose2d(dim, n_decoded, cell, cell)
        self.codes = nn.Parameter(F.normalize(torch.randn(vocab_size, dim), dim=1),
                                  requires_grad=kind == "dvae")   # of vq: moving averages

    def encode(self, u):
        """(B, 3, S, S) -> unit vectors (B, dim, h, w) (vq), or logits (B, K, h, w) (dvae)."""
        e = self.linear_in(u) + self.encoder(u)
        return F.normalize(e, dim=1) if self.kind == "vq" else e

    def decode_features(self, z):
        """(B, dim, h, w) -> (B, 3, S, S) before the sigmoid; dvae: (B, 6, S, S), mu and ln b."""
        return self.linear_out(z) + self.decoder(z)

    def scores(self, u):
        return similarity(self.encode(u), self.codes) if self.kind == "vq" else self.encode(u)

    def decode_grid(self, ids):
        decoded = self.decode_features(self.codes[ids].permute(0, 3, 1, 2))
        return unmap_pixels(decoded[:, :3].sigmoid())


def similarity(z, codes):
    """(B, dim, h, w), (K, dim) -> (B, K, h, w) inner products."""
    return torch.einsum("bdhw,kd->bkhw", z, codes)


def quantize(z, codes):
    """Unit vectors z (B, dim, h, w) -> nearest codes (B, dim, h, w), with the straight-through
    gradient to z, and their ids (B, h, w)."""
    ids = similarity(z, codes).argmax(1)
    return z + (codes[ids].permute(0, 3, 1, 2) - z).detach(), ids


def vq_loss(net, u):
    """u (B, 3, S, S) -> loss, z (B, dim, h, w) and ids (B, h, w); the last two are for
    `update_codes`."""
    z = net.encode(u)
    q, ids = quantize(z, net.codes)
    loss = F.mse_loss(net.decode_features(q).sigmoid(), u) + 0.25 * F.mse_loss(z, q.detach())
    return loss, z, ids


@torch.no_grad()
def update_codes(codes, z, ids, momentum):
    """Replaces each used code by the L2-normalized average of the code (weight `momentum`) and the
    mean direction of its z. codes (K, dim), in place; z (n, dim); ids (n,), the code of each z.
    Returns the number of uses of each code (K,)."""
    uses = torch.bincount(ids, minlength=len(codes)).to(z.dtype)
    mean = F.normalize(torch.zeros_like(codes).index_add_(0, ids, z), dim=1)
    average = F.normalize(torch.lerp(mean, codes, momentum), dim=1)
    codes.copy_(torch.where(uses[:, None] > 0, average, codes))
    return uses


@torch.no_grad()
def restart_codes(codes, rate, z, generator):
    """Replaces codes that are used less than 0.05 times per batch by random vectors of z (n, dim).

    rate: (K,) running mean of the uses per batch; 1 for replaced codes, so that they are not
    replaced again before they can be used. Both are changed in place."""
    cells = torch.randint(len(z), (len(codes),), generator=generator).to(z.device)
    dead = rate < 0.05
    codes.copy_(torch.where(dead[:, None], z[cells], codes))
    rate.masked_fill_(dead, 1.0)


def laplace_nll(u, mu, ln_b):
    """-ln of the logit-Laplace density f(u | mu, b), elementwise (DALL-E, section A.3)."""
    return (u.logit() - mu).abs() / ln_b.exp() + ln_b + math.log(2) + (u * (1 - u)).log()


def usage_penalty(logits):
    """Logits (B, K, h, w) -> ln K - H(mean posterior of the batch): 0 if all codes are equally
    frequent, ln K if only one is used."""
    q = logits.softmax(1).mean((0, 2, 3))
    return math.log(len(q)) + torch.xlogy(q, q).sum()


def dvae_loss(net, u, tau, noise):
    """Loss of u (B, 3, S, S). noise: uniform in [0, 1), (B, K, h, w), for the Gumbel-softmax."""
    logits = net.encode(u)
    mix = gumbel_softmax(logits, tau, noise)                         # soft: no straight-through
    mu, ln_b = net.decode_features(torch.einsum("bkhw,kd->bdhw", mix, net.codes)).chunk(2, 1)
    return laplace_nll(u, mu, ln_b).mean() + 0.1 * usage_penalty(logits)


def gumbel_softmax(logits, tau, noise):
    """Softmax over dimension 1 of (logits + Gumbel noise) / tau. As tau decreases to 0, it becomes
    a one-hot sample from softmax(logits)."""
    gumbel = -(-(noise.clamp(min=1e-7)).log()).log()
    return ((logits + gumbel) / tau).softmax(1)


# --------------------------------------------------------------------------------------------------
# Training of the small tokenizer

BATCH, LR, WARMUP, WEIGHT_DECAY = 32, 1e-3, 50, 1e-4        # AdamW, cosine to 0 (our choice)
MOMENTUM = 0.9                                              # of vq's codes (our choice)


def train_tokenizer(cfg, run, images, view, cell):
    """A Small tokenizer, trained on `view` of the images: the same crops as in pretraining.

    Raises ValueError if the loss is not finite when it is printed, about five times."""
    with torch.random.fork_rng([]):       # so the method's initial weights do not change
        torch.manual_seed(cfg.seed)
        net = Small(cfg.tokenizer_kind, cfg.vocab_size, cell).to(run.device)
    total, vq = cfg.tokenizer_steps, cfg.tokenizer_kind == "vq"
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.0,
                            weight_decay=WEIGHT_DECAY)
    rate = torch.zeros(cfg.vocab_size, device=run.device)   # running mean of the uses per batch
    loader = data.Loader(images, [view], min(BATCH, len(images)), cfg.seed, run.device, cfg.workers)
    steps = progress.bar(range(total), "tokenizer", unit="steps")          # process 0 only
    for step, batch in zip(steps, loader.batches()):
        run.check_stop()
        set_lr(opt, cosine(step + 1, total, LR, 0.0, WARMUP))
        u, key = map_pixels(unnormalize(batch.views[0])), (cfg.seed, "tokenizer", step)
        if vq:
            if step % 100 == 0 and step < 0.8 * total:      # step 0: all codes; none at the end
                with torch.no_grad():
                    z = flatten_cells(net.encode(u))
                restart_codes(net.codes, rate, z, rng.generator(*key))
            loss, z, ids = vq_loss(net, u)
            uses = update_codes(net.codes, flatten_cells(z.detach()), ids.flatten(), MOMENTUM)
            rate.lerp_(uses, 0.05)
        else:
            tau = cosine(step, round(0.75 * total), 1.0, 1 / 16)
            shape = cfg.vocab_size, u.shape[2] // cell, u.shape[3] // cell
            loss = dvae_loss(net, u, tau, rng.uniform(batch.index, shape, *key))
        opt.zero_grad()
        loss.backward()
        opt.step()
        if (step + 1) % (total // 5 or 1) == 0 or step + 1 == total:
            if not loss.isfinite():
                other = "another --seed" if vq else "--tokenizer-kind vq"
                raise ValueError(f"the tokenizer's loss is not finite at its step {step + 1}: try "
                                 f"{other}, or give a trained tokenizer with --tokenizer")
            run.print0(f"tokenizer: step {step + 1}/{total}  loss {loss.item():.4f}")
    return net.eval()


def flatten_cells(z):
    """(B, dim, h, w) -> (B*h*w, dim)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def evaluate_tokenizer(net, images, size, run, workers):
    """Statistics on held-out images, resized to `size` pixels: {name: number}.

    used_codes: number of codes that occur. perplexity: exp of the entropy of the codes.
    token_max_freq: frequency of the most frequent code. mse: mean squared error of the
    reconstruction. mse_mean_color: that of the mean color of each cell, as a baseline."""
    counts, errors, n = torch.zeros(net.vocab_size, device=run.device), torch.zeros(2), 0
    found = data.batches(images, size, device=run.device, workers=workers)
    batches = math.ceil(len(images) / 256)
    for x, _ in progress.bar(found, "evaluating the tokenizer", batches, "batches"):
        ids, v = net.ids(x), unnormalize(x)
        mean = F.interpolate(F.avg_pool2d(v, net.cell), scale_factor=net.cell)
        errors += torch.stack([F.mse_loss(y, v) for y in (net.decode(ids), mean)]).cpu() * len(x)
        counts += torch.bincount(ids.flatten(), minlength=net.vocab_size)
        n += len(x)
    p = counts / counts.sum()
    return dict(used_codes=int((p > 0).sum()), perplexity=torch.special.entr(p).sum().exp().item(),
                token_max_freq=p.max().item(), mse=errors[0].item() / n,
                mse_mean_color=errors[1].item() / n)


class TokenCounts(nn.Module):
    """Frequencies of the K target tokens during training, over all processes.

    They give the best loss and accuracy of a head that ignores its input. The counts are part of
    the run's checkpoint."""

    def __init__(self, vocab_size):
        super().__init__()
        self.register_buffer("hits", torch.zeros(vocab_size, dtype=torch.float64))

    def add(self, ids):
        """Counts ids (any shape) of all processes, each of which calls this at the same time."""
        ones = torch.ones(ids.numel(), dtype=torch.float64, device=ids.device)
        here = torch.zeros_like(self.hits).index_add_(0, ids.flatten(), ones)
        self.hits += distributed.world_size() * distributed.all_mean(here)

    def stats(self):
        """Entropy of the target tokens in nats, and frequency of the most frequent one."""
        p = self.hits / self.hits.sum()
        return dict(token_entropy=torch.special.entr(p).sum(), token_max_freq=p.max())


# --------------------------------------------------------------------------------------------------
# Files


def check_settings(cfg):
    """Raises ValueError for settings of the tokenizer that do not match the patches. For
    Config.__post_init__ of BEiT and CAE, after config.check_bounds(cfg)."""
    side = cfg.img_size // cfg.patch_size
    cell = cfg.second_input_size // side
    if cfg.second_input_size % side or cell < 2 or cell & (cell - 1):
        raise ValueError(f"--second-input-size must be {side} (patches per side) times 2, 4, 8, "
                         f"..., not {cfg.second_input_size}: try {8 * side} or {4 * side}")


def get_tokenizer(cfg, run, images, held_out, view):
    """The frozen tokenizer of a run, on its device.

    It is loaded from the file given by --tokenizer. Without a file, it is trained on `view` of the
    images, evaluated on the images `held_out`, and saved in the parent of the run's folder, where
    the next run with the same data, seed and sizes finds it. Raises ValueError if the cells of a
    loaded tokenizer do not match the patches."""
    side = cfg.img_size // cfg.patch_size
    cell = cfg.second_input_size // side
    if cfg.tokenizer:
        net, path = load_tokenizer(cfg.tokenizer), cfg.tokenizer
    else:
        path = cache_path(cfg, images, view)
        if run.rank == 0 and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            run.print0(f"training a tokenizer ({cfg.tokenizer_kind}, {cfg.vocab_size} codes) once; "
                       f"--tokenizer takes a trained one")
            net, report = train_tokenizer(cfg, run, images, view, cell), ""
            try:
                report = evaluate_tokenizer(net, held_out, cfg.second_input_size, run, cfg.workers)
            except ValueError as error:                              # an unreadable image
                run.print0(f"the tokenizer is not evaluated: {error}")
            save_tokenizer(path, net, report)
        while not path.exists():     # other processes poll: a collective could time out
            run.check_stop()
            time.sleep(1)
        net = load_tokenizer(path)
    if net.cell != cell:
        raise ValueError(f"{path} has cells of {net.cell} pixels: use --second-input-size "
                         f"{net.cell * side} for {side} x {side} tokens, one for each patch")
    run.print0(f"tokenizer {path}: {net.vocab_size} codes" + (net.report and (
        "; on test images {used_codes} used, perplexity {perplexity:.0f}, most frequent code "
        "{token_max_freq:.1%}; mean squared error {mse:.4f} (mean color of a cell: "
        "{mse_mean_color:.4f})").format(**net.report)))
    return net.to(run.device).eval().requires_grad_(False)


def cache_path(cfg, images, view):
    """File of the tokenizer for these settings. Its name has a hash of all that it depends on."""
    folder = os.path.isdir(cfg.data)
    settings = (os.path.abspath(cfg.data) if folder else cfg.data,
                cfg.data_root and os.path.abspath(cfg.data_root), len(images), view, cfg.img_size,
                cfg.patch_size, cfg.second_input_size, cfg.tokenizer_kind, cfg.vocab_size,
                cfg.tokenizer_steps, cfg.seed)
    name = f"tokenizer-{os.path.basename(settings[0])}-{rng.key(*settings) % 2**32:08x}.pt"
    return Path(cfg.out).parent / name


def save_tokenizer(path, net, report):
    """Writes the file atomically. If two runs train at the same time, the first file is kept."""
    temporary = f"{path}.{os.getpid()}"
    checkpoints.write_atomic(temporary, lambda file: torch.save(
        {"format": "tokenizer/1", "config": net.config, "report": report,
         "model": {name: x.cpu() for name, x in net.state_dict().items()}}, file))
    if path.exists():
        os.remove(temporary)
    else:
        os.replace(temporary, path)


class StateDictOnly(dict):
    """Replaces the module classes in DALL-E's pickled files: a module becomes its state dict, and
    no code in the file is run."""

    def __setstate__(self, state):
        self.update(state["_parameters"])
        for name, child in state["_modules"].items():
            self.update({f"{name}.{key}": x for key, x in child.items()})


ALLOWED = [(StateDictOnly, name) for name in (
    "dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock", "dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.upsampling.Upsample")]


def load_tokenizer(path):
    """The tokenizer in a file, one of ours or DALL-E's.

    DALL-E's is the official encoder.pkl (a pickled module, of which no code is run) or its state
    dict; a decoder.pkl in the same folder is used for decode(). Raises ValueError for other
    files."""
    path, raw = Path(path), read_state(path)
    try:
        if raw.get("format") == "tokenizer/1":
            net = Small(**raw["config"])
            net.load_state_dict(raw["model"])
            net.report = raw["report"]
            return net
        decoder = path.with_name(path.name.replace("encoder", "decoder"))
        net = Dalle(with_decoder=decoder != path and decoder.exists())
        net.encoder.load_state_dict(raw)
        if net.decoder is not None:
            net.decoder.load_state_dict(read_state(decoder))
        return net
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is not a tokenizer, neither one of ours nor DALL-E's "
                         f"({reason} ...): give another file with --tokenizer") from None


def read_state(path):
    """Content of a checkpoint file; for a pickled module, its state dict."""
    with torch.serialization.safe_globals(ALLOWED):
        try:
            raw = checkpoints.read_file(path)
        except ValueError as error:
            raise ValueError(f"{error}. If it is a module pickled by PyTorch before 1.6, save its "
                             f"state_dict() in a file on a machine with dall_e") from None
    return raw.get("state_dict", raw)


class Fingerprint:
    """Hash of a tokenizer's weights, for a run's checkpoint. The ids of another tokenizer have
    other meanings, so a run must be resumed with the same one: load_state_dict raises ValueError
    for the hash of another."""

    def __init__(self, net):
        content = b"".join(x.cpu().numpy().tobytes() for name, x in net.state_dict().items()
                           if not name.startswith(("decoder.", "linear_out.")))   # no effect on ids
        self.value = hashlib.blake2b(content, digest_size=8).hexdigest()

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, saved):
        if saved != self.state_dict():
            raise ValueError("it is another tokenizer: give the file of the original one with "
                             "--tokenizer, for example out/tokenizer-*.pt")
