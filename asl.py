"""ASL: Arbitrary Self-supervised Learning (Li et al., CVPR 2024).

MAE, whose two paintings of the same patch must agree. The paper rewrites MAE's error as a contrast
in which each patch is a class of its own, with its pixels for a key that cannot learn (eq. 5 to 8).
Global contrastive learning calls all patches of an image one class: in photos of many things the
two pull in opposite directions, and hybrids fall behind MAE. So ASL stays with the patch. From the
features of the visible patches it makes a second version, lets the same decoder paint from either,
and draws the two predictions of each removed patch together: targets that learn, beside MAE's.
Despite the paper's word, contrastive: no negatives, no temperature, no second view, no teacher.

    patches -+- visible, 25 % --> encoder -+--------> decoder* --> a -+- L_MAE: a near u
             |                             |                          +- L_SEM: a and b alike
             |                             +--> T --> decoder* --> b -+
             +- removed, 75 % --> each to mean 0, variance 1 --> u       removed patches only
              T: one transformer block      * one and the same, mask tokens in the same places

    L     = L_MAE + L_SEM                                                               (eq. 11)
    L_MAE = mean over removed patches of (1/P) |u - a|^2                                (eq. 1, 2)
    L_SEM = mean over removed patches of (1/P) (|a - sg(b)|_1 + |sg(a) - b|_1)          (eq. 9, 10)

sg stops the gradient, but as it stops each side once and both share their weights, the gradient of
L_SEM is that of |a - b|_1 and only its value is doubled. What forbids two equal constants is L_MAE.

The paper (ViT-B, COCO, 800 epochs; linear probe on ImageNet-1K / box AP): MAE 46.8 / 49.3, ASL
48.6 / 50.3; by dropout instead of T 48.5 / 50.4, at 2 x the cost of MAE instead of 1.5 x; without
L_SEM 46.6 and 46.5 (Table 7); by cosine 47.6, with the class token aligned, too, 45.6 (4.6).

No code of the authors was found, nor their appendix with the settings: what the paper itself leaves
open is marked "our choice". It is silent on whether L_MAE counts b, too: equation 1 knows no b, so
ours does not; --mae-both does, as the rows of Table 7 without L_SEM probably did: they pay for b.
full.pt beside encoder.pt holds the decoder, too, in MAE's names, and T as aug_block; the encoder
works without T.

    python asl.py                                         minutes on a laptop, offline
    python asl.py --data toy-scenes                       several creatures: not one thing an image
    python asl.py --sem 0 --mae-both                      no alignment: Table 7 (d), as we read it
    torchrun --nproc_per_node=8 asl.py --data coco        the paper's ViT-B (not run by us)
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
    # the encoder (paper: ViT-B)
    img_size: int = 224           # pixels (our choice: MAE)
    patch_size: int = 16          # pixels (our choice: MAE)
    embed_dim: int = 768          # D (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 12           # attention heads (paper)
    # the decoder, one for both branches
    decoder_embed_dim: int = 512  # E (our choice: MAE)
    decoder_depth: int = 8        # blocks (our choice: MAE)
    decoder_num_heads: int = 16   # attention heads (our choice: MAE)
    # the second branch
    dle: bool = False             # b by dropout (DLE), not by a block T (AEE, paper's default)
    dropout: float = 0.1          # DLE: rate on patches + positions (our choice: SimCSE)
    # the objective
    mask_ratio: float = 0.75      # share of the patches removed (our choice: MAE)
    norm_pix: bool = True         # target normalised by patch (our choice: the MAE of Table 5)
    sem: float = 1.0              # weight of L_SEM (paper, eq. 11)
    cosine: bool = False          # L_SEM by 1 - cosine, not by L1 (paper's ablation)
    align_cls: bool = False       # L_SEM of the class token, too (paper's ablation: it hurts)
    mae_both: bool = False        # L_MAE: mean of a's and b's, not of a's alone (our choice)
    # the view
    min_scale: float = 0.2        # least area of the crop (our choice: MAE)
    # the optimisation (our choice: MAE's)
    epochs: float = 1600          # ImageNet-1K (our choice: the MAE of Table 5); COCO: 800 (paper)
    warmup_epochs: float = 40.0   # linear rise of the learning rate from exactly 0
    batch_size: int = 4096        # global; the paper's unit of iterations (section 4.3.2)
    lr: float = 1.5e-4            # peak, times batch/256
    min_lr: float = 0.0           # end of the cosine
    weight_decay: float = 0.05    # AdamW; class and mask token decay, too
    beta2: float = 0.95           # AdamW's memory of squared gradients; torch: 0.999


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """Crop and flip (our choice: MAE). What augments is the mask, and the second branch (paper)."""
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
    """An encoder of what is visible, a second version of its tokens, a decoder of both (Fig. 3)."""

    def __init__(self, cfg):
        super().__init__()
        self.mask_ratio = cfg.mask_ratio
        self.encoder = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                               cfg.num_heads, pos="sincos_col", resize="size", init="mae")
        self.decoder = Decoder(cfg, self.encoder.grid)
        self.aug_block, self.dropout = None, cfg.dropout
        if not cfg.dle:     # T: a block as the encoder's, after its final norm, none behind it: all
            #                 our choice (paper: one Transformer layer)
            self.aug_block = vit.Block(cfg.embed_dim, cfg.num_heads)
            vit.init_linear(self.aug_block, "mae")

    def forward(self, x, noise, drop=None):
        """x: (B, 3, S, S), noise: (B, N), drop: (B, 2, 1+K, D) numbers in [0, 1) that decide the
        dropout of DLE, None: without, b is a. Returns pixels a and b (B, 1+N, P), class token
        first, and mask (B, N)."""
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        if self.aug_block:
            tokens = self.encoder(x, keep=keep)                              # (B, 1+K, D)
            tokens = torch.cat([tokens, self.aug_block(tokens)])             # (2B, 1+K, D)
        else:               # two passes; dropout on patches + positions and class token: our choice
            tokens, _ = self.encoder.embed(x, keep)
            tokens = torch.cat([tokens, tokens])
            if drop is not None:
                stay = drop.transpose(0, 1).flatten(0, 1) >= self.dropout
                tokens = tokens * stay / (1 - self.dropout)
            for block in self.encoder.blocks:
                tokens = block(tokens)
            tokens = self.encoder.norm(tokens)
        return *self.decoder(tokens, restore.repeat(2, 1)).chunk(2), mask


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


def sem_loss(a, b, mask, cosine=False):
    """Two paintings (B, N, P) of the removed patches, each drawn to the other as it is (eq. 9, 10).
    Mean over the P numbers (our choice, as L_MAE: a sum would weigh P times as much)."""
    a, b = a.float(), b.float()

    def apart(a, b):                                                         # -> (B, N)
        return 1 - F.cosine_similarity(a, b, dim=-1) if cosine else (a - b).abs().mean(-1)

    return masked_mean(apart(a, b.detach()) + apart(a.detach(), b), mask)


def asl_losses(a, b, target, mask, cosine=False, align_cls=False, mae_both=False):
    """L_MAE and L_SEM of the decoder's two outputs (B, 1+N, P), class token first."""
    mae, sem = mae_loss(a[:, 1:], target, mask), sem_loss(a[:, 1:], b[:, 1:], mask, cosine)
    if mae_both:
        mae = (mae + mae_loss(b[:, 1:], target, mask)) / 2
    if align_cls:              # the decoder's output, as for patches; weight 1: both our choice
        sem = sem + sem_loss(a[:, :1], b[:, :1], torch.ones_like(mask[:, :1]), cosine)
    return mae, sem


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
    if cfg.dle and not 0 < cfg.dropout < 1:
        raise ValueError(f"--dropout {cfg.dropout}: a rate between 0 and 1; without dropout both "
                         f"branches are one")
    if cfg.sem == 0 and not cfg.mae_both:
        raise ValueError("--sem 0: nothing is asked of the second branch; add --mae-both, or run "
                         "mae.py")

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
            shape = 2, 1 + int(N * (1 - cfg.mask_ratio)), cfg.embed_dim
            drop = (rng.uniform(part.index, shape, cfg.seed, part.epoch, "dropout")
                    if cfg.dle else None)
            with run.autocast():
                a, b, mask = model(x, noise, drop)                   # (B, 1+N, P) twice, (B, N)
            target = targets(x, cfg.patch_size, cfg.norm_pix)                # fp32 from here on
            mae, sem = asl_losses(a, b, target, mask, cfg.cosine, cfg.align_cls, cfg.mae_both)
            loss = mae + cfg.sem * sem                                       # eq. 11
            run.backward(loss, opt)
            run.log(loss=loss, mae=mae, sem=sem, lr=lr)
        opt.step(), opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.due(cfg.evals):
            run.log(now=True, **run.knn(net.encoder, bank, queries, cfg.img_size))
            with run.looking():
                show(run, cfg, net, queries)
            if sem < 1e-3:
                run.say("the two branches agree (sem near 0): from here on this is MAE")
            flat = mae_loss(torch.zeros_like(target), target, mask)
            if cfg.norm_pix and mae > 0.98 * flat:
                run.say(f"every patch is still painted flat (mae near {flat:.2f}): train "
                        f"longer, or try another --lr or a lower --mask-ratio")
        if run.save_due():
            run.save_encoder(net.encoder, full=official(net), branch="base")
            run.save()


@torch.no_grad()
def show(run, cfg, net, images, n=8):
    """picture.png: the image, what the encoder sees, its removed patches painted by a and by b."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    patches = patchify(x, cfg.patch_size)
    noise = rng.uniform(index, patches.shape[1], "picture")
    net.eval()
    with run.autocast():
        a, b, mask = net(x, noise)
    net.train()
    columns = {"image": x, "visible": unpatchify(patches.masked_fill(mask[:, :, None], 0)),
               "painted back": paint(a[:, 1:].float(), patches, mask, cfg.norm_pix)}
    if not cfg.dle:                                      # without dropout b is a
        columns["second branch"] = paint(b[:, 1:].float(), patches, mask, cfg.norm_pix)
    run.picture({title: augment.denormalize(z) for title, z in columns.items()})


if __name__ == "__main__":
    config.main(main)
