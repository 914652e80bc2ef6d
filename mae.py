"""MAE: Masked Autoencoders (He et al., CVPR 2022, arXiv 2111.06377).

Throw three quarters of an image's patches away, look at the rest, and paint what is missing. So
much is redundant in an image that a few missing patches can be copied from their neighbours; with
75 % gone the painter needs an idea of the object. The encoder, which is kept, sees the visible
patches only: a quarter of the tokens, and never a mask token, which it would not meet later either.
A narrow decoder is told where the others were and paints them; afterwards it is thrown away.

    patches -+- visible, 25 % --> encoder --> tokens --+
             |                                         +--> decoder --> pixels of every patch
             |     a mask token for each removed patch +                        |
             +- removed, 75 % --> each to mean 0, variance 1 --> squared error, removed patches only

Nothing stops a gradient: no teacher, no second view, no negatives; images do not meet in the loss.

    L = sum over images n, patches i of m_ni (1/P) |y_ni - t_ni|^2  /  sum over n, i of m_ni

m is 1 for a removed patch, else 0; y is the decoder's output, P = 3pp the numbers in a patch, and
t = (u - mean(u)) / sqrt(var(u) + 1e-6), u the patch of the normalised image, channels together.
That var divides by P - 1 is the official code's; the paper has words for all this, no equations.
To paint every patch flat costs (P-1)/P: a loss that stays near 1 has learned nothing.

The paper: ViT-B/16, 1600 epochs: 83.6 fine-tuned, 68.0 by a linear probe (Tables 3, 12): above the
contrastive methods of its day by the one, below by the other. ViT-L, 800 epochs: linear 73.9 with
normalised pixels, 73.5 with plain ones (Table 1d); with a decoder of one block 65.5 (Table 1a), for
then the encoder's last blocks have to paint.

The class token carries no loss: its kNN accuracy and `spread` say less than the patches'.
full.pt beside encoder.pt holds the decoder, too, in the names of the published *_full.pth files.

    python mae.py                                         minutes on a laptop, offline
    python mae.py --norm-pix false                        plain pixels, as in most of Table 1
    torchrun --nproc_per_node=8 mae.py --data imagenet    the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, distributed, positions, rng
from lib.run import Run, cosine, param_groups, set_lr

# B images of a process, N patches, K visible ones, D width, E width of the decoder, S pixels,
# p pixels a side of a patch, P = 3pp numbers in a patch


@dataclass
class Config:
    # the encoder (paper: ViT-B/16, L/16, H/14; there is no official ViT-S)
    img_size: int = 224           # pixels (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 768          # D (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 12           # attention heads (paper)
    # the decoder, the same for every encoder
    decoder_embed_dim: int = 512  # E (paper, Table 1b)
    decoder_depth: int = 8        # blocks (paper, Table 1a); with few a linear probe suffers most
    decoder_num_heads: int = 16   # attention heads (official code)
    # the objective
    mask_ratio: float = 0.75      # share of the patches removed (paper, Fig. 5)
    norm_pix: bool = True         # target normalised by patch (paper, Table 3; Tables 1, 2: not)
    # the view
    min_scale: float = 0.2        # least area of the crop (official code)
    # the optimisation (paper, Table 8)
    epochs: float = 800           # paper's ablations; released weights and Table 3: 1600
    warmup_epochs: float = 40.0   # linear rise of the learning rate from exactly 0 (paper)
    batch_size: int = 4096        # global (paper)
    lr: float = 1.5e-4            # peak, times batch/256 (paper)
    min_lr: float = 0.0           # end of the cosine (official code)
    weight_decay: float = 0.05    # AdamW (paper); class and mask token decay, too (official code)
    beta2: float = 0.95           # AdamW's memory of squared gradients (paper); torch: 0.999


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """Crop and flip: masking is the augmentation, colour jitter hurts (paper, Table 1e)."""
    return [data.View(cfg.img_size, scale=(cfg.min_scale, 1.0))]


def random_masking(noise, ratio):
    """Shuffle the patches, keep the first K. noise: (B, N), the shuffle is its order.

    Returns keep (B, K), the patches that stay, as shuffled; restore (B, N), the place of each patch
    in the shuffle; mask (B, N) bool, True: removed."""
    K = int(noise.shape[1] * (1 - ratio))                # rounded down, as in MAE's code
    shuffle = noise.argsort(dim=1, stable=True)          # stable: the same on every device
    restore = shuffle.argsort(1)                         # the inverse permutation
    return shuffle[:, :K], restore, restore >= K


# --------------------------------------------------------------------------------------------------
# Model and loss
# --------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Tokens of the visible patches, and where they were -> pixels of all patches (MAE, Fig. 1)."""

    def __init__(self, cfg, grid):
        super().__init__()
        E = cfg.decoder_embed_dim
        self.embed = nn.Linear(cfg.embed_dim, E)
        self.mask_token = nn.Parameter(torch.empty(1, 1, E).normal_(std=0.02))
        pos = F.pad(positions.sincos(E, grid, "sincos_col"), (0, 0, 1, 0))         # class token: zeros
        self.pos_embed = nn.Parameter(pos[None], requires_grad=False)
        self.blocks = nn.ModuleList(vit.Block(E, cfg.decoder_num_heads)
                                    for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(E, 1e-6)
        self.pred = nn.Linear(E, 3 * cfg.patch_size**2)
        vit.init_linear(self, "mae")

    def forward(self, tokens, restore):
        """tokens: (B, 1+K, D), class token first, restore: (B, N). Returns (B, 1+N, P)."""
        x = self.embed(tokens)                                               # (B, 1+K, E)
        missing = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], missing], 1)                          # (B, N, E), shuffled
        patches = patches.gather(1, restore[:, :, None].expand_as(patches))  # row by row again
        x = torch.cat([x[:, :1], patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x))


class Network(nn.Module):
    """An encoder of what is visible and a decoder of everything."""

    def __init__(self, cfg):
        super().__init__()
        self.mask_ratio = cfg.mask_ratio
        self.encoder = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                               cfg.num_heads, pos="sincos_col", resize="size", init="mae")
        self.decoder = Decoder(cfg, self.encoder.grid)

    def forward(self, x, noise):
        """x: (B, 3, S, S), noise: (B, N). Returns pixels (B, N, P) and mask (B, N)."""
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        tokens = self.encoder(x, keep=keep)                                  # (B, 1+K, D)
        return self.decoder(tokens, restore)[:, 1:], mask                    # no class token


def official(net):
    """The state dict of the network in the names of MAE's published files."""
    return {key.removeprefix("encoder.").replace("decoder.mask_token", "mask_token")
            .replace("decoder.", "decoder_"): x for key, x in net.state_dict().items()}


def patchify(x, p):
    """(B, 3, S, S) -> (B, N, P), in a patch row by row, the channel fastest."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))                        # (B, 3, n, p, n, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches):
    """(B, N, P) -> (B, 3, S, S)."""
    n, p = math.isqrt(patches.shape[1]), math.isqrt(patches.shape[2] // 3)
    x = patches.unflatten(2, (p, p, 3)).unflatten(1, (n, n))                 # (B, n, n, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def statistics(patches):
    """Mean and deviation (B, N, 1) of each patch (B, N, P), its channels together."""
    var, mean = torch.var_mean(patches, -1, correction=1, keepdim=True)      # unbiased: P - 1
    return mean, (var + 1e-6).sqrt()


def targets(x, p, norm_pix):
    """What is to be predicted: (B, 3, S, S) -> (B, N, P)."""
    patches = patchify(x, p)
    mean, deviation = statistics(patches)
    return (patches - mean) / deviation if norm_pix else patches


def paint(pred, patches, mask, norm_pix):
    """The image (B, 3, S, S) with its removed patches as predicted. A network that learned from
    normalised patches does not say how bright and how rich in contrast one is: both are taken from
    the true patch (B, N, P), so that the picture knows more than the network."""
    if norm_pix:
        mean, deviation = statistics(patches)
        pred = pred * deviation + mean
    return unpatchify(torch.where(mask[:, :, None], pred, patches))


def masked_mean(error, mask):
    """Mean of (B, N) over the removed patches; those seen weigh nothing."""
    return (error * mask).sum() / mask.sum()


def mae_loss(pred, target, mask):
    """Squared error of pixels (B, N, P), of the removed patches."""
    return masked_mean((pred.float() - target).square().mean(-1), mask)


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    N = (cfg.img_size // cfg.patch_size)**2
    if not (0 < cfg.mask_ratio < 1 and 0 < int(N * (1 - cfg.mask_ratio)) < N):
        raise ValueError(f"--mask-ratio {cfg.mask_ratio}: of the {N} patches of an image at least "
                         f"one must stay and one go, so a share between 0 and 1")

    loader, bank, queries = run.data(views(cfg))         # the last two: for the kNN accuracy only

    model = run.place(Network(cfg))
    net = distributed.unwrap(model)
    opt = torch.optim.AdamW(param_groups(net, cfg.weight_decay),
                            betas=(0.9, cfg.beta2), fused=True)
    run.restore(model=model, opt=opt)
    total, warmup = run.length(loader), round(cfg.warmup_epochs * len(loader))
    peak_lr = cfg.lr * cfg.batch_size / 256

    for step, batch in run.steps(loader):
        lr = cosine(step, total, peak_lr, cfg.min_lr, warmup)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        for part in run.micro_batches(batch):
            x, = part.views                                                  # (B, 3, S, S)
            noise = rng.uniform(part.index, N, cfg.seed, part.epoch, "mask")
            with run.autocast():
                pred, mask = model(x, noise)                         # (B, N, P), (B, N)
            target = targets(x, cfg.patch_size, cfg.norm_pix)                # fp32 from here on
            loss = mae_loss(pred, target, mask)
            run.backward(loss, opt)
            run.log(loss=loss, lr=lr)
        opt.step(), opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.due(cfg.evals):
            run.log(now=True, **run.knn(net.encoder, bank, queries, cfg.img_size))
            with run.looking():
                show(run, cfg, net, queries)
            flat = mae_loss(torch.zeros_like(target), target, mask)
            if cfg.norm_pix and loss > 0.98 * flat:
                run.say(f"every patch is still painted flat (loss near {flat:.2f}): train "
                        f"longer, or try another --lr or a lower --mask-ratio")
        if run.save_due():
            run.save_encoder(net.encoder, full=official(net), branch="base")
            run.save()


@torch.no_grad()
def show(run, cfg, net, images, n=8):
    """picture.png: the image, what the encoder sees, and the removed patches painted back."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    patches = patchify(x, cfg.patch_size)
    noise = rng.uniform(index, patches.shape[1], "picture")
    net.eval()
    with run.autocast():
        pred, mask = net(x, noise)
    net.train()
    columns = {"image": x, "visible": unpatchify(patches.masked_fill(mask[:, :, None], 0)),
               "painted back": paint(pred.float(), patches, mask, cfg.norm_pix)}
    run.picture({title: augment.denormalize(z) for title, z in columns.items()})


if __name__ == "__main__":
    config.main(main)
