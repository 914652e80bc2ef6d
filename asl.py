"""ASL: Arbitrary Self-supervised Learning (Li et al., "Self-Supervised Representation Learning from
Arbitrary Scenarios", CVPR 2024).

MAE with two reconstructions of each removed patch, which must agree. The paper rewrites MAE's error
as a contrastive loss in which each patch is a class of its own and its pixels are a key that is not
learned (eq. 5 to 8). Global contrastive learning treats all patches of an image as one class. On
images of many objects the two conflict, and hybrids of both fall behind MAE. So ASL has no loss
between images or between different patches: it makes two versions of the tokens of the visible
patches, decodes both with the same decoder, and minimizes the distance between the two predictions
of each removed patch. The paper calls it contrastive, but there are no negatives, no temperature,
no second view and no teacher.

    patches -+- visible, 25% --> encoder -+--------> decoder* --> a -+- L_MAE: a and t
             |                            |                          +- L_SEM: a and b
             |                            +--> T --> decoder* --> b -+
             +- removed, 75% --> each to mean 0, variance 1 --> t        removed patches only
              T: one transformer block      * the same weights, mask tokens at the same positions

    L     = L_MAE + lambda_sem L_SEM, lambda_sem = 1                                    (eq. 11)
    L_MAE = mean over removed patches of (1/P) |t - a|^2                                (eq. 1, 2)
    L_SEM = mean over removed patches of (1/P) (|a - sg(b)|_1 + |sg(a) - b|_1)          (eq. 9, 10)

L_SEM is the paper's semantic loss (its 1/P: our choice). sg stops the gradient: each term sends it
through one of the two predictions only, so together they have the gradient of |a - b|_1 and twice
its value. L_MAE prevents a and b from becoming the same constant.

The diagram shows the default: an asymmetric structure at the end of the encoder (AEE), the block T,
makes b. With --dle, a and b come from two independent draws of dropout on the embedded tokens
(dropout in the linear embedding, DLE).

The paper (ViT-B, COCO, 800 epochs; linear probe on ImageNet-1K / box AP): MAE 46.8 / 49.3, ASL
48.6 / 50.3 (AEE, 1.5 times the cost of MAE) and 48.5 / 50.4 (DLE, twice); without L_SEM 46.6 /
49.2 (AEE) and 46.5 / 49.1 (DLE) (Table 7). Linear probe with the cosine distance in L_SEM 47.6,
with the class token aligned as well 45.6 (section 4.6).

We found neither code of the authors nor their appendix with the settings: what the main paper
leaves open is marked "our choice". It does not state whether L_MAE also covers b. Equation 1 has
only a, and so has our L_MAE; --mae-both adds b, as the rows of Table 7 without L_SEM probably do:
their cost is that of two reconstructions. full.pt, next to encoder.pt, also holds the decoder,
under MAE's names, and T as aug_block; encoder.pt is without T.

    python asl.py                                         minutes on a laptop, offline
    python asl.py --data toy-scenes                       several creatures in an image
    python asl.py --lambda-sem 0 --mae-both               no alignment: Table 7 (d), as we read it
    torchrun --nproc_per_node=8 asl.py --data coco        the paper's ViT-B (not run by us)
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
    """ImageNet's settings; configs/asl.yaml overrides them per data set (default: toy)."""
    # the encoder (paper: ViT-B)
    img_size: Size = 224            # image side in pixels (our choice: MAE)
    patch_size: Size = 16           # pixels per patch side (our choice: MAE)
    embed_dim: Size = 768           # encoder width, D (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    # the decoder, the same for both versions
    decoder_embed_dim: Size = 512   # decoder width, E (our choice: MAE)
    decoder_depth: Size = 8         # decoder blocks (our choice: MAE)
    decoder_num_heads: Size = 16    # attention heads of the decoder (our choice: MAE)
    # the two versions
    dle: bool = False               # make both versions by dropout in the embedding (DLE), instead
                                    # of the second by a block T (AEE, the paper's default)
    dropout: Fraction = 0.1         # DLE: rate on all embedded tokens (our choice: SimCSE's)
    # the objective
    mask_ratio: Fraction = 0.75     # fraction of the patches that are removed (our choice: MAE)
    norm_pix_loss: bool = True      # normalize each target patch (our choice: the MAE of Table 5)
    lambda_sem: float = 1.0         # weight of L_SEM (paper, eq. 11)
    cosine: bool = False            # L_SEM with 1 - cosine instead of L1 (paper's ablation;
                                    # its form for patches is our choice)
    align_cls: bool = False         # L_SEM also of the class token (paper's ablation: it hurts)
    mae_both: bool = False          # L_MAE: mean over a and b, instead of a alone (our choice)
    # the view
    crop_min: Fraction = 0.2        # smallest crop area, fraction of the image (our choice: MAE)
    # the optimization (our choice: MAE's)
    epochs: Positive = 1600         # epochs (our choice: the MAE of Table 5); COCO: 800 (paper)
    warmup_epochs: float = 40.0     # linear warmup of the learning rate from 0
    batch_size: Size = 4096         # global batch size
    lr: float = 1.5e-4              # base learning rate; the peak is lr * batch/256
    min_lr: float = 0.0             # final learning rate of the cosine
    weight_decay: float = 0.05      # AdamW's; also for class and mask token
    beta2: Fraction = 0.95          # AdamW's decay rate of squared gradients; torch: 0.999

    paper_data = "coco"             # config section of the paper's data, printed at the start

    def __post_init__(self):
        config.check_bounds(self)
        N = (self.img_size // self.patch_size)**2
        if not 0 < int(N * (1 - self.mask_ratio)) < N:
            raise ValueError(f"--mask-ratio {self.mask_ratio}: of the {N} patches of an image at "
                             f"least one must be removed and one kept")
        if self.dle and not 0 < self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} must be above 0 and below 1: without "
                             f"dropout the two versions of --dle are equal")
        if self.lambda_sem == 0 and not self.mae_both:
            raise ValueError("--lambda-sem 0: the second version has no loss; add --mae-both, or "
                             "use mae.py")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Crop and flip (our choice: MAE). Mask and second version are the augmentation (paper)."""
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
    """Encoder of the visible patches, in two versions, and decoder of all patches (Fig. 3)."""

    def __init__(self, cfg):
        super().__init__()
        self.mask_ratio = cfg.mask_ratio
        self.encoder = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                               cfg.num_heads, pos="sincos_col", resize="size", init="mae")
        self.decoder = Decoder(cfg, self.encoder.grid)
        self.aug_block, self.dropout = None, cfg.dropout
        if not cfg.dle:
            # T has the architecture of an encoder block. It comes after the encoder's final norm,
            # and no norm comes after it: all our choice (paper: one Transformer layer).
            self.aug_block = vit.Block(cfg.embed_dim, cfg.num_heads)
            init_linear(self.aug_block, "mae")

    def forward(self, x, noise, drop=None):
        """x: (B, 3, S, S), noise: (B, N), drop: (B, 2, 1+n_visible, D) numbers in [0, 1) that
        decide the dropout of both versions of DLE; None: no dropout, so with DLE b equals a.
        Returns pixels a and b (B, 1+N, P), class token first, and mask (B, N)."""
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        if self.aug_block:
            tokens = self.encoder(x, keep=keep)                              # (B, 1+n_visible, D)
            tokens = torch.cat([tokens, self.aug_block(tokens)])             # (2B, 1+n_visible, D)
        else:
            # One pass of both versions as a batch of 2B. Dropout of patches + positions and of the
            # class token is our choice.
            tokens, _ = self.encoder.embed(x, keep)
            tokens = torch.cat([tokens, tokens])
            if drop is not None:
                kept = drop.transpose(0, 1).flatten(0, 1) >= self.dropout
                tokens = tokens * kept / (1 - self.dropout)
            for block in self.encoder.blocks:
                tokens = block(tokens)
            tokens = self.encoder.norm(tokens)
        return *self.decoder(tokens, restore.repeat(2, 1)).chunk(2), mask


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


def sem_loss(a, b, mask, use_cosine=False):
    """Distance of two predictions (B, n, P) over the removed patches; mask: (B, n). Each of its two
    terms sends its gradient through one prediction only (eq. 9, 10). Mean over the P values (our
    choice, as in L_MAE: a sum would weigh P times as much)."""
    def distance(a, b):                                                      # -> (B, n)
        return 1 - F.cosine_similarity(a, b, dim=-1) if use_cosine else (a - b).abs().mean(-1)

    return masked_mean(distance(a, b.detach()) + distance(a.detach(), b), mask)


def asl_losses(a, b, target, mask, use_cosine=False, align_cls=False, mae_both=False):
    """L_MAE and L_SEM of the decoder's two outputs (B, 1+N, P), class token first."""
    loss_mae = mae_loss(a[:, 1:], target, mask)
    loss_sem = sem_loss(a[:, 1:], b[:, 1:], mask, use_cosine)
    if mae_both:
        loss_mae = (loss_mae + mae_loss(b[:, 1:], target, mask)) / 2
    if align_cls:              # the decoder's output, as for patches; weight 1: both our choice
        loss_sem = loss_sem + sem_loss(a[:, :1], b[:, :1], torch.ones_like(mask[:, :1]), use_cosine)
    return loss_mae, loss_sem


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
            drop = None
            if cfg.dle:
                shape = 2, 1 + int(N * (1 - cfg.mask_ratio)), cfg.embed_dim
                drop = rng.uniform(part.index, shape, cfg.seed, part.epoch, "dropout")
            with run.autocast():
                a, b, mask = model(x, noise, drop)                   # (B, 1+N, P) twice, (B, N)
            # From here on in fp32. With --norm-pix-loss, the target of a patch has its own mean and
            # contrast removed: what is left to predict is structure, and a dark or flat patch
            # counts as much as a bright or detailed one.
            target = targets(x, cfg.patch_size, cfg.norm_pix_loss)           # (B, N, P)
            # L_SEM gives each prediction a learned target: the other one. Alone it would be 0 if
            # both were the same constant, which L_MAE rules out.
            loss_mae, loss_sem = asl_losses(a.float(), b.float(), target, mask, cfg.cosine,
                                            cfg.align_cls, cfg.mae_both)
            loss = loss_mae + cfg.lambda_sem * loss_sem                      # eq. 11
            (loss / cfg.accum_iter).backward()
            run.log(loss=loss, loss_mae=loss_mae, loss_sem=loss_sem)
        run.log(lr=lr, grad_norm=grad_norm(net))                     # not clipped (our choice)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            run.log(**visualize.evaluate(run, net.encoder, bank, queries))
            with run.evaluation(net):
                save_visualization(run, cfg, net, queries)
            if cfg.lambda_sem and loss_sem < 1e-3:
                run.print0("loss_sem is below 0.001: the two predictions are nearly identical, so "
                           "the alignment adds little")
            if cfg.norm_pix_loss:
                flat = mae_loss(torch.zeros_like(target), target, mask)
                visualize.warn_of_flat_reconstruction(run, loss_mae, flat, "loss_mae")
        if run.save_due:
            run.save_encoder(net.encoder, full=checkpoints.mae_names(net), branch="base")
            run.save()


def save_visualization(run, cfg, net, images, n=8):
    """visualization.png: the image, what the encoder sees, the reconstructions a and b. With
    --norm-pix-loss these predict neither mean nor contrast of a patch: the true ones are used."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    patches = patchify(x, cfg.patch_size)
    mean, std = patch_stats(patches) if cfg.norm_pix_loss else (0, 1)
    with run.autocast():
        a, b, mask = net(x, rng.uniform(index, patches.shape[1], "visualization"))
    a, b = (z[:, 1:].float() * std + mean for z in (a, b))
    columns = {"image": x, "visible": visualize.fill_patches(patches, mask, 0),
               "reconstruction": visualize.fill_patches(patches, mask, a)}
    if not cfg.dle:                                                  # DLE: no dropout here, b = a
        columns["reconstruction b"] = visualize.fill_patches(patches, mask, b)
    visualize.save_grid(run, {title: augment.denormalize(z) for title, z in columns.items()})


if __name__ == "__main__":
    config.main(main)
