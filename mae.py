"""MAE: Masked Autoencoders (He et al., CVPR 2022, arXiv 2111.06377).

Remove three quarters of an image's patches, encode the rest, and reconstruct what is missing. An
image is so redundant that a few missing patches could be copied from their neighbors; with 75%
removed, the reconstruction needs an idea of the object. The encoder, which is kept, sees only the
visible patches: a quarter of the tokens, and no mask tokens, so that its input is of the same kind
after pretraining. A narrow decoder receives the encoded patches and mask tokens, each at its
position, and predicts the pixels; it is discarded after pretraining.

    patches -+- visible, 25% --> encoder --> tokens --+
             |                                        +--> decoder --> pixels of every patch
             |    a mask token for each removed patch +                        |
             +- removed, 75% --> each normalized to mean 0, variance 1 --> squared error

There is no stop-gradient, no teacher, no second view, and no comparison of images.

    L = sum over images n, patches i of m_ni (1/P) |y_ni - t_ni|^2  /  sum over n, i of m_ni

m is 1 for a removed patch, else 0; y is the decoder's output, P = 3pp the number of values in a
patch, and t = (u - mean(u)) / sqrt(var(u) + 1e-6), where u is the patch of the input image, all
channels together; with --norm-pix-loss false, t = u. var divides by P - 1, as in the official
code; the paper gives the loss in words, without equations. With normalized targets, predicting 0
everywhere has loss (P-1)/P: if the loss stays near 1, the network has learned nothing.

The paper (ImageNet-1K top-1): ViT-B/16, 1600 epochs (--epochs 1600): 83.6 fine-tuned, better than
the contrastive methods of its time, and 68.0 with a linear probe, worse than they (Tables 3, 12).
ViT-L, 800 epochs: linear 73.9 with normalized pixels, 73.5 with plain ones (Table 1d), 65.5 with a
decoder of one block (Table 1a), because then the encoder's last blocks have to reconstruct.

The class token has no loss: read knn and feat_std, which are computed from it, beside knn_patch.
full.pt, next to encoder.pt, also holds the decoder, named as in the published *_full.pth files.

    python mae.py                                         minutes on a laptop, offline
    python mae.py --norm-pix-loss false                   plain pixels, as in most of Table 1
    torchrun --nproc_per_node=8 mae.py --data imagenet    the paper's ViT-B/16 (not run by us)
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, checkpoints, config, positions, rng, visualize
from lib.config import Fraction, Positive, Size
from lib.distributed import unwrap
from lib.run import Run, cosine, grad_norm, param_groups, set_lr
from lib.weights import init_linear

# B images of a process's micro-batch, N patches, n_visible of them visible, D encoder width,
# E decoder width, S image side, p patch side, P = 3pp values in a patch


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/mae.yaml overrides them per data set (default: toy)."""
    # the encoder (paper: ViT-B/16, L/16, H/14; there is no official ViT-S)
    img_size: Size = 224            # image side in pixels (paper)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 768           # encoder width, D (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    # the decoder, the same for every encoder
    decoder_embed_dim: Size = 512   # decoder width, E (paper, Table 1b)
    decoder_depth: Size = 8         # decoder blocks (paper, Table 1a); a shallow decoder hurts
                                    # linear probing most
    decoder_num_heads: Size = 16    # attention heads of the decoder (code)
    # the objective
    mask_ratio: Fraction = 0.75     # fraction of the patches that are removed (paper, Fig. 5)
    norm_pix_loss: bool = True      # normalize each target patch (paper, Table 3; not Tables 1, 2)
    # the view
    crop_min: Fraction = 0.2        # smallest crop area, fraction of the image (code)
    # the optimization (paper, Table 8)
    epochs: Positive = 800          # epochs (paper's ablations; released weights and Table 3: 1600)
    warmup_epochs: float = 40.0     # linear warmup of the learning rate from 0 (paper)
    batch_size: Size = 4096         # global batch size (paper)
    lr: float = 1.5e-4              # base learning rate; the peak is lr * batch/256 (paper)
    min_lr: float = 0.0             # final learning rate of the cosine (code)
    weight_decay: float = 0.05      # AdamW's (paper); also for class and mask token (code)
    beta2: Fraction = 0.95          # AdamW's decay rate of squared gradients (paper); torch: 0.999

    def __post_init__(self):
        config.check_bounds(self)
        N = (self.img_size // self.patch_size)**2
        if not 0 < int(N * (1 - self.mask_ratio)) < N:
            raise ValueError(f"--mask-ratio {self.mask_ratio}: of the {N} patches of an image at "
                             f"least one must be removed and one kept")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Crop and flip. Masking is the augmentation; color jitter hurts (paper, Table 1e)."""
    return [data.View(cfg.img_size, scale=(cfg.crop_min, 1.0))]


def random_masking(noise, ratio):
    """Ranks the patches by their noise (B, N); the first n_visible stay visible.

    Returns keep (B, n_visible), the indices of the visible patches in shuffled order; restore
    (B, N), the position of each patch in the shuffle; mask (B, N) bool, True: removed."""
    n_visible = int(noise.shape[1] * (1 - ratio))        # rounded down, as in MAE's code
    shuffle = noise.argsort(dim=1, stable=True)          # stable: the same on every device
    restore = shuffle.argsort(1)                         # the inverse permutation
    return shuffle[:, :n_visible], restore, restore >= n_visible


# ---- Model and loss ------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Visible tokens and the order of the shuffle -> pixels of all patches (MAE, Fig. 1)."""

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
        """tokens (B, 1+n_visible, D), class token first; restore (B, N) -> (B, 1+N, P)."""
        x = self.embed(tokens)                                               # (B, 1+n_visible, E)
        missing = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], missing], 1)                          # (B, N, E), shuffled
        patches = patches.gather(1, restore[:, :, None].expand_as(patches))  # in raster order
        x = torch.cat([x[:, :1], patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x))


class Network(nn.Module):
    """Encoder of the visible patches and decoder of all patches (Fig. 1)."""

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


def patchify(x, p):
    """(B, 3, S, S) -> (B, N, P), the pixels of a patch in raster order, channels fastest."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))                        # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def patch_stats(patches):
    """Mean and standard deviation (B, N, 1) of each patch (B, N, P), all channels together."""
    var, mean = torch.var_mean(patches, -1, correction=1, keepdim=True)      # unbiased: P - 1
    return mean, (var + 1e-6).sqrt()


def targets(x, p, norm_pix_loss):
    """Targets of the prediction: images (B, 3, S, S) -> (B, N, P)."""
    patches = patchify(x, p)
    mean, std = patch_stats(patches)
    return (patches - mean) / std if norm_pix_loss else patches


def masked_mean(error, mask):
    """Mean of the error (B, N) over the removed patches, where the mask (B, N) is True."""
    return (error * mask).sum() / mask.sum()


def mae_loss(pred, target, mask):
    """Mean squared error of the pixels (B, N, P) of removed patches; mask: (B, N)."""
    return masked_mean((pred - target).square().mean(-1), mask)


# ---- Train ---------------------------------------------------------------------------------------


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation

    model = run.place(Network(cfg))
    net = unwrap(model)
    run.init_encoder(net.encoder, full=checkpoints.mae_names(net))           # with --init-from
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
            # From here on in fp32. With --norm-pix-loss, the target of a patch has its own mean and
            # contrast removed: what is left to predict is structure, and a dark or flat patch
            # counts as much as a bright or detailed one.
            target = targets(x, cfg.patch_size, cfg.norm_pix_loss)           # (B, N, P)
            loss = mae_loss(pred.float(), target, mask)
            (loss / cfg.accum_iter).backward()
            run.log(loss=loss)
        run.log(lr=lr, grad_norm=grad_norm(net))                     # not clipped (official code)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            run.log(**visualize.evaluate(run, net.encoder, bank, queries))
            with run.evaluation(net):
                save_visualization(run, cfg, net, queries)
            if cfg.norm_pix_loss:
                flat = mae_loss(torch.zeros_like(target), target, mask)
                visualize.warn_of_flat_reconstruction(run, loss, flat)
        if run.save_due:
            run.save_encoder(net.encoder, full=checkpoints.mae_names(net), branch="base")
            run.save()


def save_visualization(run, cfg, net, images, n=8):
    """visualization.png: the image, what the encoder sees, the reconstruction. A network trained
    with --norm-pix-loss predicts neither mean nor contrast of a patch: the true ones are used."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    patches = patchify(x, cfg.patch_size)
    mean, std = patch_stats(patches) if cfg.norm_pix_loss else (0, 1)
    with run.autocast():
        pred, mask = net(x, rng.uniform(index, patches.shape[1], "visualization"))
    columns = {"image": x, "visible": visualize.fill_patches(patches, mask, 0),
               "reconstruction": visualize.fill_patches(patches, mask, pred.float() * std + mean)}
    visualize.save_grid(run, {title: augment.denormalize(z) for title, z in columns.items()})


if __name__ == "__main__":
    config.main(main)
