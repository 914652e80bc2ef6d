"""CAE: context autoencoder (Chen et al., IJCV 2023, arXiv 2202.03026).

BEiT and MAE give two tasks to one network: representing the visible patches, and solving the
pretext task. CAE separates them. The encoder sees the visible half of the patches only and
represents it. The latent contextual regressor predicts, by cross-attention, the representations
that the encoder would give to the masked half. A small decoder predicts, from these and the
positions of the masked patches alone, the token of each masked patch: an id of a frozen tokenizer.
The alignment branch keeps the predicted representations in the encoder's space: their target is the
encoder's output for the masked patches.

    224 px -+- visible patches -- encoder -- z_v --> regressor -> zhat -> decoder -> logits
            |                              mask token ---^          |                   |
            |                                             alignment |     cross-entropy |
            +- masked patches --- encoder, no gradient --> zbar ----+                   |
    112 px ---- tokenizer, frozen --> ids ----------------------------------------------+
    (224 and 112 px: the same crop in two sizes)

    L = mean over masked patches i of -log softmax(logits_i)[y_i]
        + lambda * mean over masked patches and channels of (zhat - stop(zbar))^2,   lambda = 2

y are the ids. zhat and zbar are outputs of LayerNorms and need no other normalization. Alignment
alone would collapse (paper): all representations equal, latent_std 0. At the start the
cross-entropy is about ln K, and the alignment loss about 2. The best possible head that ignores its
input has as cross-entropy the entropy of the masked tokens and as accuracy the frequency of the
most frequent one (logged as token_entropy and token_max_freq): the network has learned something
only if `loss_token` is below the first and `mlm_acc` above the second.

The paper, ViT-B/16, 300 epochs, linear / attentive / fine-tuned (Table 5): 60.3 / 71.2 / 82.9
without decoder and alignment, 64.1 / 73.8 / 83.6 with both; 1600 epochs: 70.3 / 77.2 / 83.9
(repository). The class token has no loss: it learns only because patches attend to it.

We follow the official code where the paper is brief: in the regressor the masked queries are also
keys and values, and the second half of its block starts from the normalized input. Unlike the code,
we keep no copy of the encoder for the alignment: its authors call the two equivalent; and end the
warmup one step later.

    python cae.py                                         minutes on a laptop, offline
    torchrun --nproc_per_node=8 cae.py --data imagenet --tokenizer encoder.pkl    (not run by us)
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import config, positions, rng, tokenizer, visualize
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import unwrap
from lib.run import Run, cosine, param_groups, set_lr
from lib.weights import init_linear

# B images of a process's micro-batch, N = side x side patches, n_masked of each image masked and
# n_visible visible, D width of the encoder, E of regressor and decoder, H heads, K codes, S image
# side


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/cae.yaml overrides them per data set (default: toy)."""
    # the network (paper: ViT-B/16; official ViT-S: also 12 heads)
    img_size: Size = 224            # image side in pixels (paper)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 768           # encoder width, D (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 12            # attention heads, in all parts (paper)
    layer_scale: float = 0.1        # initial scale of residual branches (code; ViT-L: 1e-5, and
                                    # other initial weights than here); 0: off
    drop_path: Fraction = 0.1       # stochastic depth, in each of the three parts (code)
    regressor_depth: Size = 4       # regressor blocks, with cross-attention (paper)
    decoder_depth: int = 4          # decoder blocks, with self-attention (paper)
    decoder_embed_dim: int = 0      # width of regressor and decoder, E (code: 768); 0: D (paper)
    # the objective
    align_loss_weight: float = 2.0  # weight lambda of the alignment loss (paper)
    # the tokenizer, see lib/tokenizer.py; without a file it is trained once and saved
    tokenizer: str = ""             # tokenizer file: DALL-E's encoder.pkl (paper); empty: train one
    tokenizer_kind: Literal["vq", "dvae"] = "vq"   # kind to train; dvae as DALL-E's (our choice)
    tokenizer_steps: Size = 10000   # steps of the tokenizer's training (our choice)
    vocab_size: Several = 8192      # codes of a trained tokenizer (paper; smaller data: our choice)
    second_input_size: Size = 112   # side of the tokenizer's view in pixels (code)
    # the mask
    num_mask_patches: Size = 98     # masked patches of every image (paper: half of 196)
    min_mask_patches_per_block: Size = 16  # smallest block in patches (code)
    # the view
    crop_min: Fraction = 0.08       # smallest crop area, fraction of the image (code)
    # the optimization
    epochs: Positive = 1600         # epochs (paper: 300, 800 and 1600)
    warmup_epochs: float = 40.0     # linear warmup of learning rate from 0 (paper; 300 epochs: 10)
    batch_size: Size = 2048         # global batch size (paper)
    lr: float = 1.5e-3              # peak learning rate, not scaled by the batch (paper)
    min_lr: float = 1e-5            # final learning rate of the cosine (code)
    weight_decay: float = 0.05      # AdamW's (paper); also of class and mask token (code)
    clip_grad: float = 3.0          # max norm of the gradient (code); 0: no clipping

    def __post_init__(self):
        config.check_bounds(self)
        tokenizer.check_settings(self)
        side = self.img_size // self.patch_size
        N = side**2
        if not self.min_mask_patches_per_block <= self.num_mask_patches < N:
            raise ValueError(f"--num-mask-patches {self.num_mask_patches} must be at least "
                             f"--min-mask-patches-per-block {self.min_mask_patches_per_block}, and "
                             f"below the {N} patches of an image")
        if round(math.sqrt(self.min_mask_patches_per_block)) >= side:
            raise ValueError(f"--min-mask-patches-per-block {self.min_mask_patches_per_block}: no "
                             f"square block of so many patches is smaller than {side} x {side}, "
                             f"all patches of an image; choose fewer")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """The same crop in two sizes: for the network, and for the tokenizer."""
    crop = dict(scale=(cfg.crop_min, 1.0))
    return [data.View(cfg.img_size, **crop),
            data.View(cfg.second_input_size, **crop, interpolation="lanczos", like=0)]


def block_mask(u, side, num_mask_patches, min_patches):
    """Masks rectangles in a grid of side x side patches, one after the other, until exactly
    num_mask_patches are masked (official code). An attempt fails if height or width of the
    rectangle is 0 or reaches that of the grid, or if it adds no patches or too many. u: (attempts,
    4) uniform numbers for area, aspect ratio, top and left. Returns (side, side) bool, True:
    masked."""
    mask = np.zeros((side, side), bool)                          # in a loop faster than torch
    n_masked = 0
    for u_area, u_aspect, u_top, u_left in u:
        remaining = num_mask_patches - n_masked
        if remaining == 0:
            break
        area = min_patches + (remaining - min_patches) * u_area
        aspect = 0.3 ** (1 - 2 * u_aspect)                       # log-uniform from 0.3 to 1/0.3
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < side and 0 < w < side:
            top, left = int(u_top * (side - h + 1)), int(u_left * (side - w + 1))
            block = mask[top:top + h, left:left + w]
            added = h * w - int(block.sum())                     # the rest is already masked
            if 0 < added <= remaining:
                block[:] = True
                n_masked += added
    # If the attempts did not suffice, the first visible patches are masked.
    visible = (~mask).ravel().nonzero()[0]
    mask.ravel()[visible[:num_mask_patches - n_masked]] = True
    return torch.from_numpy(mask)


def draw_mask(index, cfg, *key):
    """Masks (B, N) bool, on the CPU, of the images `index`. key: seed and epoch, or
    "visualization"."""
    side = cfg.img_size // cfg.patch_size
    u = rng.uniform(index, (300, 4), *key, "mask").tolist()      # 1500 masks: at most 130 attempts
    return torch.stack([block_mask(v, side, cfg.num_mask_patches, cfg.min_mask_patches_per_block)
                        for v in u]).flatten(1)


def split_patches(mask, n_masked):
    """(B, N) bool, n_masked True in each row -> indices of the visible patches (B, n_visible) and
    of the masked ones (B, n_masked), both in raster order."""
    order = mask.int().argsort(dim=1, stable=True)
    return order.split([mask.shape[1] - n_masked, n_masked], 1)


# ---- Model and loss ------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys. The key has no bias: it cancels in the softmax."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.k = nn.Linear(dim, dim, bias=False)
        self.q, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, q, k, v):
        """q: (B, n_masked, E); k, v: (B, N, E). Returns (B, n_masked, E)."""
        q, k, v = (z.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for z in (self.q(q), self.k(k), self.v(v)))
        x = vit.attend(q, k, v)                                          # (B, H, n_masked, E/H)
        return self.proj(x.transpose(1, 2).flatten(2))


class RegressorBlock(nn.Module):
    """Block of the latent contextual regressor: the queries of the masked patches attend to the
    visible patches and to each other."""

    def __init__(self, dim, num_heads, layer_scale):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2 = (
            nn.LayerNorm(dim, 1e-6) for _ in range(4))
        self.cross_attn = CrossAttention(dim, num_heads)
        self.ls1, self.ls2 = (vit.LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
                              for _ in range(2))
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, z_v, pos, pos_v, factors=None):
        """x: (B, n_masked, E) queries, z_v: (B, n_visible, E), pos and pos_v: their positions,
        which are added to queries and keys, not to values. factors: (B, 2), drop-path factors of
        the two branches. Returns (B, n_masked, E)."""
        both = torch.cat([z_v, x], 1)                                        # (B, N, E)
        branch = self.ls1(self.cross_attn(
            self.norm1_q(x + pos), self.norm1_k(both + torch.cat([pos_v, pos], 1)),
            self.norm1_v(both)))
        x = x + (branch if factors is None else branch * factors[:, 0, None, None])
        x = self.norm2(x)            # the skip connection also starts after it (official code)
        branch = self.ls2(self.mlp(x))
        return x + (branch if factors is None else branch * factors[:, 1, None, None])


class Network(nn.Module):
    """Encoder, regressor and decoder, as in the diagram above."""

    def __init__(self, cfg, K):
        super().__init__()
        D, H, scale = cfg.embed_dim, cfg.num_heads, cfg.layer_scale or None
        E = cfg.decoder_embed_dim or D
        self.drop_path = cfg.drop_path
        # How many random numbers decide the drop path of an image: in the encoder's two passes, the
        # regressor and the decoder.
        self.drop_sizes = [2 * depth for depth in (cfg.depth, cfg.depth, cfg.regressor_depth,
                                                   cfg.decoder_depth)]
        self.encoder = vit.ViT(cfg.img_size, cfg.patch_size, D, cfg.depth, H, pos="sincos_row",
                               layer_scale=scale, qkv_bias="split",
                               drop_path=cfg.drop_path, resize="size", init="cae")
        self.encoder_to_regressor = nn.Identity() if E == D else nn.Sequential(
            nn.Linear(D, E), nn.LayerNorm(E, 1e-6))                          # official code
        pos = positions.sincos(E, self.encoder.grid)                         # (N, E), fixed
        self.register_buffer("pos", pos, persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.regressor = nn.ModuleList(RegressorBlock(E, H, scale)
                                       for _ in range(cfg.regressor_depth))
        self.regressor_norm = nn.LayerNorm(E, 1e-6)
        self.decoder = nn.ModuleList(vit.Block(E, H, qkv_bias="split", layer_scale=scale)
                                     for _ in range(cfg.decoder_depth))
        self.decoder_norm = nn.LayerNorm(E, 1e-6)
        self.head = nn.Linear(E, K)
        for part in (self.encoder_to_regressor, self.regressor, self.decoder, self.head):
            init_linear(part, "cae")                                     # Xavier, biases 0

    def forward(self, x, visible, masked, drop=None):
        """x: (B, 3, S, S), visible (B, n_visible) and masked (B, n_masked): patch indices, drop:
        (B, sum(drop_sizes)) random numbers that decide the drop path; None: from torch's generator.
        Returns logits (B, n_masked, K), zhat and zbar (B, n_masked, E)."""
        if drop is None:
            drop = torch.rand(len(x), sum(self.drop_sizes), device=x.device)
        drop_visible, drop_masked, drop_regressor, drop_decoder = drop.split(self.drop_sizes, 1)
        z_v = self.encode(x, visible, drop_visible)                          # (B, n_visible, E)
        with torch.no_grad():                            # its own drop path, as in official code
            zbar = self.encode(x, masked, drop_masked)                       # (B, n_masked, E)
        zhat = self.regress(z_v, self.pos[masked], self.pos[visible], drop_regressor)
        return self.decode(zhat, self.pos[masked], drop_decoder), zhat, zbar

    def encode(self, x, patches, drop=None):
        """Patch indices (B, n) -> the encoder's output (B, n, E) for these patches, in the width of
        the regressor: its input is only them and the class token, which is removed afterward."""
        return self.encoder_to_regressor(
            self.encoder.split(self.encoder(x, keep=patches, drop=drop))[1])

    def regress(self, z_v, pos, pos_v, drop=None):
        """Encoded visible patches z_v, positions of masked and of visible patches -> zhat."""
        x = self.mask_token.expand(*pos.shape[:2], -1)                       # (B, n_masked, E)
        for block, factors in zip(self.regressor, self.drop_factors(drop, len(self.regressor))):
            x = block(x, z_v, pos, pos_v, factors)
        return self.regressor_norm(x)

    def decode(self, zhat, pos, drop=None):
        """Predicted representations and positions of the masked patches -> logits."""
        x = zhat + pos
        for block, factors in zip(self.decoder, self.drop_factors(drop, len(self.decoder))):
            x = block(x, drop=factors)
        return self.head(self.decoder_norm(x))                               # (B, n_masked, K)

    def drop_factors(self, drop, depth):
        """Drop path of regressor or decoder, with a rate that increases linearly from 0: random
        numbers (B, 2*depth) -> for each block factors (B, 2), 0 or 1/keep; None without drop path,
        as in eval mode."""
        if drop is None or not self.training or not self.drop_path:
            return [None] * depth
        rates = torch.linspace(0, self.drop_path, depth, device=drop.device).repeat_interleave(2)
        return ((drop >= rates) / (1 - rates)).split(2, 1)


def token_loss(logits, ids):
    """Cross-entropy, mean over masked patches. logits: (B, n_masked, K), ids: (B, n_masked)."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def align_loss(zhat, zbar):
    """Squared error, mean over masked patches and channels. zhat, zbar: (B, n_masked, E)."""
    return F.mse_loss(zhat, zbar)


# ---- Train ---------------------------------------------------------------------------------------


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation
    with torch.device("meta"):   # rejects impossible settings before a tokenizer is trained
        Network(cfg, 1)
    tok = tokenizer.get_tokenizer(cfg, run, loader.images, queries, views(cfg)[1])      # frozen

    model = run.place(Network(cfg, tok.vocab_size))
    net = unwrap(model)
    run.init_encoder(net.encoder)                                            # with --init-from
    opt = torch.optim.AdamW(param_groups(net, cfg.weight_decay), fused=True)
    counts = tokenizer.TokenCounts(tok.vocab_size).to(run.device)           # of masked patches
    run.restore(model=model, opt=opt, counts=counts, tokenizer=tokenizer.Fingerprint(tok))
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr = cosine(step, total, cfg.lr, cfg.min_lr, warmup)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        # All images have the same number of masked patches, so each part can take its own mean.
        # The loader knows the indices on the CPU, where masks are drawn; batch.index would wait for
        # the GPU.
        masks = draw_mask(loader.locate(step)[1], cfg, cfg.seed, batch.epoch)
        masks = masks.to(run.device, non_blocking=True).chunk(cfg.accum_iter)
        for part, mask in zip(run.micro_batches(batch), masks):
            x, view = part.views                     # (B, 3, S, S); view: for the tokenizer
            visible, masked = split_patches(mask, cfg.num_mask_patches)
            ids = tok.ids(view).gather(1, masked)                    # (B, n_masked), no gradient
            drop = rng.uniform(part.index, sum(net.drop_sizes), cfg.seed, part.epoch, "drop")
            with run.autocast():
                logits, zhat, zbar = model(x, visible, masked, drop)
            # The token loss makes the representations informative. The alignment makes the
            # regressor predict them in the encoder's space, so the encoder only has to represent.
            loss_token = token_loss(logits.float(), ids)                     # in fp32
            loss_align = align_loss(zhat.float(), zbar.float())
            loss = loss_token + cfg.align_loss_weight * loss_align
            (loss / cfg.accum_iter).backward()
            counts.add(ids)
            run.log(loss=loss, loss_token=loss_token, loss_align=loss_align,
                    mlm_acc=(logits.argmax(2) == ids).float().mean())
        # clip_grad_norm_ adds 1e-6 to the norm; 0: no clipping
        grad_norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_grad or math.inf)
        run.log(lr=lr, grad_norm=grad_norm)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            stats = counts.stats()
            latent_std = zbar.float().std((0, 1)).mean()     # over patches; 0.4 at the start
            run.log(latent_std=latent_std, **stats,
                    **visualize.evaluate(run, net.encoder, bank, queries))
            with run.evaluation(net):
                save_visualization(run, cfg, net, tok, queries)
            if latent_std < 0.05:
                run.print0("collapsed: all patches have nearly the same representation (latent_std "
                           "near 0); try a lower --align-loss-weight or a lower --lr")
            else:
                visualize.warn_of_token_frequencies(run, loss_token, stats["token_entropy"],
                                                    "loss_token")
        if run.save_due:
            run.save_encoder(net.encoder, branch="base")
            run.save()


def save_visualization(run, cfg, net, tok, images, n=8):
    """visualization.png: the image, its visible patches, and what the tokenizer decodes from the
    true tokens, and from these with the predicted tokens at masked patches."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    view, _ = next(data.batches(images, cfg.second_input_size, n, run.device, workers=0,
                                interpolation="lanczos"))
    mask = draw_mask(index.cpu(), cfg, "visualization").to(run.device)
    visible, masked = split_patches(mask, cfg.num_mask_patches)
    ids = tok.ids(view)
    with run.autocast():
        logits, _, _ = net(x, visible, masked)
    predicted = ids.scatter(1, masked, logits.argmax(2))
    visualize.save_grid(run, visualize.token_columns(x, mask, ids, predicted, tok))


if __name__ == "__main__":
    config.main(main)
