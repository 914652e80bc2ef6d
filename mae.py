"""MAE: Masked Autoencoders (He et al., CVPR 2022, arXiv 2111.06377).

Remove three quarters of an image's patches, encode the rest, and reconstruct what is missing. An
image is so redundant that a few missing patches could be copied from their neighbors; with 75 %
removed, the reconstruction needs an idea of the object. The encoder, which is kept, sees the
visible patches only: a quarter of the tokens, and never a mask token, which it would not meet after
pretraining either. A narrow decoder receives the encoded patches and mask tokens, in their places,
and predicts the pixels; it is discarded afterwards.

    patches -+- visible, 25 % --> encoder --> tokens --+
             |                                         +--> decoder --> pixels of every patch
             |     a mask token for each removed patch +                        |
             +- removed, 75 % --> each to mean 0, variance 1 --> squared error, removed patches only

Nothing stops a gradient: no teacher, no second view, no negatives; the loss compares no images.

    L = sum over images n, patches i of m_ni (1/P) |y_ni - t_ni|^2  /  sum over n, i of m_ni

m is 1 for a removed patch, else 0; y is the decoder's output, P = 3pp the numbers in a patch, and
t = (u - mean(u)) / sqrt(var(u) + 1e-6), u the patch of the normalized image, channels together.
That var divides by P - 1 is the official code's; the paper has words for all this, no equations.
Predicting 0 everywhere has loss (P-1)/P: a loss that stays near 1 has learned nothing.

The paper: ViT-B/16, 1600 epochs: 83.6 fine-tuned, 68.0 by a linear probe (Tables 3, 12): above the
contrastive methods of its day by the first, below by the second. ViT-L, 800 epochs: linear 73.9
with normalized pixels, 73.5 with plain ones (Table 1d); with a decoder of one block 65.5 (Table
1a), because then the encoder's last blocks have to do the reconstruction.

The class token has no loss: its kNN accuracy and feat_std are less telling than the patches'.
full.pt beside encoder.pt also holds the decoder, under the names of the published *_full.pth files.

    python mae.py                                         minutes on a laptop, offline
    python mae.py --norm-pix-loss false                   plain pixels, as in most of Table 1
    torchrun --nproc_per_node=8 mae.py --data imagenet    the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, positions, rng, visualize
from lib.config import Fraction, Size
from lib.distributed import unwrap
from lib.run import Run, cosine, grad_norm, param_groups, set_lr
from lib.weights import init_linear

# B images of a process, N patches, n_visible of them visible, D width, E width of the decoder,
# S image side, p patch side, P = 3pp numbers in a patch


@dataclass
class Config(config.Settings):
    # the encoder (paper: ViT-B/16, L/16, H/14; there is no official ViT-S)
    img_size: Size = 224            # pixels (paper)
    patch_size: Size = 16           # pixels (paper)
    embed_dim: Size = 768           # D (paper)
    depth: Size = 12                # blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    # the decoder, the same for every encoder
    decoder_embed_dim: Size = 512   # E (paper, Table 1b)
    decoder_depth: int = 8          # blocks (paper, Table 1a); few hurt the linear probe most
    decoder_num_heads: Size = 16    # attention heads (official code)
    # the objective
    mask_ratio: Fraction = 0.75     # fraction of the patches removed (paper, Fig. 5)
    norm_pix_loss: bool = True      # target normalized by patch (paper, Table 3; Tables 1, 2: not)
    # the view
    crop_min: Fraction = 0.2        # smallest area of the crop (official code)
    # the optimization (paper, Table 8)
    epochs: float = 800             # paper's ablations; released weights and Table 3: 1600
    warmup_epochs: float = 40.0     # linear increase of the learning rate from exactly 0 (paper)
    batch_size: Size = 4096         # global (paper)
    lr: float = 1.5e-4              # peak, times batch/256 (paper)
    min_lr: float = 0.0             # end of the cosine (official code)
    weight_decay: float = 0.05      # AdamW (paper); also of class and mask token (official code)
    beta2: Fraction = 0.95          # AdamW's decay rate of squared gradients (paper); torch: 0.999

    def __post_init__(self):
        config.check_bounds(self)
        N = (self.img_size // self.patch_size)**2
        if not 0 < int(N * (1 - self.mask_ratio)) < N:
            raise ValueError(f"--mask-ratio {self.mask_ratio}: of the {N} patches of an image at "
                             f"least one must be removed and one kept")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Crop and flip: masking is the augmentation, color jitter hurts (paper, Table 1e)."""
    return [data.View(cfg.img_size, scale=(cfg.crop_min, 1.0))]


def random_masking(noise, ratio):
    """Shuffle the patches, keep the first n_visible. noise: (B, N); its order is the shuffle.

    Returns keep (B, n_visible), the patches that stay, in shuffled order; restore (B, N), the place
    of each patch in the shuffle; mask (B, N) bool, True: removed."""
    n_visible = int(noise.shape[1] * (1 - ratio))        # rounded down, as in MAE's code
    shuffle = noise.argsort(dim=1, stable=True)          # stable: the same on every device
    restore = shuffle.argsort(1)                         # the inverse permutation
    return shuffle[:, :n_visible], restore, restore >= n_visible


# ---- Model and loss ------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Tokens of the visible patches and their places -> pixels of all patches (MAE, Fig. 1)."""

    def __init__(self, cfg, grid):
        super().__init__()
        E = cfg.decoder_embed_dim
        self.embed = nn.Linear(cfg.embed_dim, E)
        self.mask_token = nn.Parameter(torch.empty(1, 1, E).normal_(std=0.02))
        pos = F.pad(positions.sincos(E, grid, "sincos_col"), (0, 0, 1, 0))   # class token: zeros
        self.pos_embed = nn.Parameter(pos[None], requires_grad=False)
        self.blocks = nn.ModuleList(vit.Block(E, cfg.decoder_num_heads)
                                    for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(E, 1e-6)
        self.pred = nn.Linear(E, 3 * cfg.patch_size**2)
        init_linear(self, "mae")

    def forward(self, tokens, restore):
        """tokens: (B, 1+n_visible, D), class token first; restore: (B, N). Returns (B, 1+N, P)."""
        x = self.embed(tokens)                                               # (B, 1+n_visible, E)
        missing = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], missing], 1)                          # (B, N, E), shuffled
        patches = patches.gather(1, restore[:, :, None].expand_as(patches))  # row by row again
        x = torch.cat([x[:, :1], patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x))


class Network(nn.Module):
    """An encoder of the visible patches and a decoder of all patches."""

    def __init__(self, cfg):
        super().__init__()
        self.mask_ratio = cfg.mask_ratio
        self.encoder = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                               cfg.num_heads, pos="sincos_col", resize="size", init="mae")
        self.decoder = Decoder(cfg, self.encoder.grid)

    def forward(self, x, noise):
        """x: (B, 3, S, S), noise: (B, N). Returns pixels (B, N, P) and mask (B, N)."""
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        tokens = self.encoder(x, keep=keep)                                  # (B, 1+n_visible, D)
        return self.decoder(tokens, restore)[:, 1:], mask                    # no class token


def official_names(net):
    """The state dict of the network under the names of MAE's published files."""
    return {key.removeprefix("encoder.").replace("decoder.mask_token", "mask_token")
            .replace("decoder.", "decoder_"): x for key, x in net.state_dict().items()}


def patchify(x, p):
    """(B, 3, S, S) -> (B, N, P), within a patch row by row, the channel fastest."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))                        # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches):
    """(B, N, P) -> (B, 3, S, S)."""
    side, p = math.isqrt(patches.shape[1]), math.isqrt(patches.shape[2] // 3)
    x = patches.unflatten(2, (p, p, 3)).unflatten(1, (side, side))           # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_stats(patches):
    """Mean and standard deviation (B, N, 1) of each patch (B, N, P), its channels together."""
    var, mean = torch.var_mean(patches, -1, correction=1, keepdim=True)      # unbiased: P - 1
    return mean, (var + 1e-6).sqrt()


def targets(x, p, norm_pix_loss):
    """What is to be predicted: (B, 3, S, S) -> (B, N, P)."""
    patches = patchify(x, p)
    mean, std = patch_stats(patches)
    return (patches - mean) / std if norm_pix_loss else patches


def masked_mean(error, mask):
    """Mean of (B, N) over the removed patches only."""
    return (error * mask).sum() / mask.sum()


def mae_loss(pred, target, mask):
    """Squared error of pixels (B, N, P), over the removed patches."""
    return masked_mean((pred.float() - target).square().mean(-1), mask)


# ---- Train ---------------------------------------------------------------------------------------


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for kNN only

    model = run.place(Network(cfg))
    net = unwrap(model)
    opt = torch.optim.AdamW(param_groups(net, cfg.weight_decay), betas=(0.9, cfg.beta2), fused=True)
    run.restore(model=model, opt=opt)
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))
    peak_lr = cfg.lr * cfg.batch_size / 256
    N = (cfg.img_size // cfg.patch_size)**2

    for step, batch in run.steps(loader):
        lr = cosine(step, total, peak_lr, cfg.min_lr, warmup)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        for part in run.micro_batches(batch):
            x, = part.views                                                  # (B, 3, S, S)
            # A new random mask in each epoch: the same image is a new problem each time.
            noise = rng.uniform(part.index, N, cfg.seed, part.epoch, "mask")
            with run.autocast():
                pred, mask = model(x, noise)                         # (B, N, P), (B, N)
            # The target of a patch has its own mean and contrast removed: what is left to predict
            # is structure, and a dark or flat patch counts as much as a bright or rich one.
            target = targets(x, cfg.patch_size, cfg.norm_pix_loss)           # fp32 from here on
            loss = mae_loss(pred, target, mask)
            (loss / cfg.accum_iter).backward()
            run.log(loss=loss)
        run.log(lr=lr, grad_norm=grad_norm(net))                     # never clipped (official code)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            run.log(**visualize.knn(run, net.encoder, bank, queries))
            with run.evaluation(net):
                save_visualization(run, cfg, net, queries)
            flat = mae_loss(torch.zeros_like(target), target, mask)
            if cfg.norm_pix_loss:
                visualize.warn_of_flat_reconstruction(run, loss, flat)
        if run.save_due:
            run.save_encoder(net.encoder, full=official_names(net), branch="base")
            run.save()


def reconstruct(pred, patches, mask, norm_pix_loss):
    """The image (B, 3, S, S) with its removed patches as predicted. A network trained on normalized
    patches predicts neither mean nor contrast of a patch: both are taken from the true patch
    (B, N, P), so the visualization shows more than the network knows."""
    if norm_pix_loss:
        mean, std = patch_stats(patches)
        pred = pred * std + mean
    return unpatchify(torch.where(mask[:, :, None], pred, patches))


def save_visualization(run, cfg, net, images, n=8):
    """visualization.png: the image, what the encoder sees, the reconstruction."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    patches = patchify(x, cfg.patch_size)
    with run.autocast():
        pred, mask = net(x, rng.uniform(index, patches.shape[1], "picture"))
    columns = {"image": x, "visible": unpatchify(patches.masked_fill(mask[:, :, None], 0)),
               "reconstruction": reconstruct(pred.float(), patches, mask, cfg.norm_pix_loss)}
    visualize.save_grid(run, {title: augment.denormalize(z) for title, z in columns.items()})


if __name__ == "__main__":
    config.main(main)
