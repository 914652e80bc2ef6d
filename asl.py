"""ASL: Arbitrary Self-supervised Learning (Li et al., CVPR 2024).

MAE with two reconstructions of each patch that must agree. The paper rewrites MAE's error as a
contrastive loss in which each patch is a class of its own and its pixels are a key that is not
learned (eq. 5 to 8). Global contrastive learning treats all patches of an image as one class. On
images of many objects the two conflict, and hybrids of both fall behind MAE. So ASL compares
patches only. It makes a second version of the encoded visible patches, decodes both versions with
the same decoder, and minimizes the distance between the two predictions of each removed patch. The
paper calls it contrastive; there are no negatives, no temperature, no second view, no teacher.

    patches -+- visible, 25 % --> encoder -+--------> decoder* --> a -+- L_MAE: a and u
             |                             |                          +- L_SEM: a and b
             |                             +--> T --> decoder* --> b -+
             +- removed, 75 % --> each to mean 0, variance 1 --> u       removed patches only
              T: one transformer block      * the same weights, mask tokens in the same places

    L     = L_MAE + lambda_sem L_SEM, lambda_sem = 1                                    (eq. 11)
    L_MAE = mean over removed patches of (1/P) |u - a|^2                                (eq. 1, 2)
    L_SEM = mean over removed patches of (1/P) (|a - sg(b)|_1 + |sg(a) - b|_1)          (eq. 9, 10)

sg stops the gradient. It stops each side once, and both branches share their weights, so L_SEM has
the gradient of |a - b|_1 and twice its value. L_MAE rules out that a and b are equal constants.

The paper (ViT-B, COCO, 800 epochs; linear probe on ImageNet-1K / box AP): MAE 46.8 / 49.3, ASL
48.6 / 50.3; with dropout instead of T 48.5 / 50.4, at 2 x the cost of MAE instead of 1.5 x; without
L_SEM 46.6 and 46.5 (Table 7); with cosine similarity 47.6, with the class token aligned, too, 45.6
(section 4.6).

We found neither code of the authors nor their appendix with the settings: what the main paper
leaves open is marked "our choice". It does not state whether L_MAE includes b. Equation 1 has no b,
so ours does not; --mae-both does, as the rows of Table 7 without L_SEM probably did: their cost
includes b. full.pt beside encoder.pt also holds the decoder, under MAE's names, and T as aug_block;
encoder.pt is without T.

    python asl.py                                         minutes on a laptop, offline
    python asl.py --data toy-scenes                       several creatures in an image
    python asl.py --lambda-sem 0 --mae-both               no alignment: Table 7 (d), as we read it
    torchrun --nproc_per_node=8 asl.py --data coco        the paper's ViT-B (not run by us)
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
    # the encoder (paper: ViT-B)
    img_size: Size = 224            # pixels (our choice: MAE)
    patch_size: Size = 16           # pixels (our choice: MAE)
    embed_dim: Size = 768           # D (paper)
    depth: Size = 12                # blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    # the decoder, the same for both branches
    decoder_embed_dim: Size = 512   # E (our choice: MAE)
    decoder_depth: int = 8          # blocks (our choice: MAE)
    decoder_num_heads: Size = 16    # attention heads (our choice: MAE)
    # the second branch
    dle: bool = False               # b by dropout (DLE) instead of a block T (AEE, paper's default)
    dropout: Fraction = 0.1         # DLE: rate on patches + positions (our choice: SimCSE)
    # the objective
    mask_ratio: Fraction = 0.75     # fraction of the patches removed (our choice: MAE)
    norm_pix_loss: bool = True      # target normalized by patch (our choice: the MAE of Table 5)
    lambda_sem: float = 1.0         # weight of L_SEM (paper, eq. 11)
    cosine: bool = False            # L_SEM by 1 - cosine instead of L1 (paper's ablation)
    align_cls: bool = False         # L_SEM of the class token, too (paper's ablation: it hurts)
    mae_both: bool = False          # L_MAE: mean of a's and b's, not a's alone (our choice)
    # the view
    crop_min: Fraction = 0.2        # smallest area of the crop (our choice: MAE)
    # the optimization (our choice: MAE's)
    epochs: float = 1600            # ImageNet-1K (our choice: MAE in Table 5); COCO: 800 (paper)
    warmup_epochs: float = 40.0     # linear increase of the learning rate from exactly 0
    batch_size: Size = 4096         # global; the paper counts iterations of it (section 4.3.2)
    lr: float = 1.5e-4              # peak, times batch/256
    min_lr: float = 0.0             # end of the cosine
    weight_decay: float = 0.05      # AdamW; also of class and mask token
    beta2: Fraction = 0.95          # AdamW's decay rate of squared gradients; torch: 0.999

    paper_data = "coco"             # the section with the settings that the paper states

    def __post_init__(self):
        config.check_bounds(self)
        N = (self.img_size // self.patch_size)**2
        if not 0 < int(N * (1 - self.mask_ratio)) < N:
            raise ValueError(f"--mask-ratio {self.mask_ratio}: of the {N} patches of an image at "
                             f"least one must be removed and one kept")
        if self.dle and not 0 < self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} must be above 0 and below 1: without "
                             f"dropout the two branches of --dle are equal")
        if self.lambda_sem == 0 and not self.mae_both:
            raise ValueError("--lambda-sem 0: the second branch has no loss; add --mae-both, or "
                             "use mae.py")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Crop and flip (our choice: MAE). Mask and second branch are the augmentation (paper)."""
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
    """Encoder of the visible patches, second version of its tokens, decoder of both (Fig. 3)."""

    def __init__(self, cfg):
        super().__init__()
        self.mask_ratio = cfg.mask_ratio
        self.encoder = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                               cfg.num_heads, pos="sincos_col", resize="size", init="mae")
        self.decoder = Decoder(cfg, self.encoder.grid)
        self.aug_block, self.dropout = None, cfg.dropout
        if not cfg.dle:
            # T is a block as the encoder's, after its final norm, without one of its own: all our
            # choice (paper: one Transformer layer).
            self.aug_block = vit.Block(cfg.embed_dim, cfg.num_heads)
            init_linear(self.aug_block, "mae")

    def forward(self, x, noise, drop=None):
        """x: (B, 3, S, S), noise: (B, N), drop: (B, 2, 1+n_visible, D) numbers in [0, 1) that
        decide the dropout of DLE, None: no dropout, b equals a. Returns pixels a and b (B, 1+N, P),
        class token first, and mask (B, N)."""
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        if self.aug_block:
            tokens = self.encoder(x, keep=keep)                              # (B, 1+n_visible, D)
            tokens = torch.cat([tokens, self.aug_block(tokens)])             # (2B, 1+n_visible, D)
        else:
            # Two passes; dropout of patches + positions and of the class token: our choice.
            tokens, _ = self.encoder.embed(x, keep)
            tokens = torch.cat([tokens, tokens])
            if drop is not None:
                kept = drop.transpose(0, 1).flatten(0, 1) >= self.dropout
                tokens = tokens * kept / (1 - self.dropout)
            for block in self.encoder.blocks:
                tokens = block(tokens)
            tokens = self.encoder.norm(tokens)
        return *self.decoder(tokens, restore.repeat(2, 1)).chunk(2), mask


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


def sem_loss(a, b, mask, use_cosine=False):
    """Distance of two predictions (B, N, P) over the removed patches, with the gradient to one side
    at a time (eq. 9, 10). Mean over the P numbers (our choice, as in L_MAE: a sum would weigh P
    times as much)."""
    a, b = a.float(), b.float()

    def distance(a, b):                                                      # -> (B, N)
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
            drop = None
            if cfg.dle:
                shape = 2, 1 + int(N * (1 - cfg.mask_ratio)), cfg.embed_dim
                drop = rng.uniform(part.index, shape, cfg.seed, part.epoch, "dropout")
            with run.autocast():
                a, b, mask = model(x, noise, drop)                   # (B, 1+N, P) twice, (B, N)
            # The target of a patch has its own mean and contrast removed: what is left to predict
            # is structure, and a dark or flat patch counts as much as a bright or rich one.
            target = targets(x, cfg.patch_size, cfg.norm_pix_loss)           # fp32 from here on
            # L_SEM trains b and gives the first branch a second target, one that is learned. Alone
            # it would be 0 for two equal constants, which L_MAE rules out.
            loss_mae, loss_sem = asl_losses(a, b, target, mask, cfg.cosine, cfg.align_cls,
                                            cfg.mae_both)
            loss = loss_mae + cfg.lambda_sem * loss_sem                      # eq. 11
            (loss / cfg.accum_iter).backward()
            run.log(loss=loss, loss_mae=loss_mae, loss_sem=loss_sem)
        run.log(lr=lr, grad_norm=grad_norm(net))                     # never clipped (our choice)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            run.log(**visualize.knn(run, net.encoder, bank, queries))
            with run.evaluation(net):
                save_visualization(run, cfg, net, queries)
            if loss_sem < 1e-3:
                run.print0("the two branches agree (loss_sem near 0): from here on this is MAE")
            flat = mae_loss(torch.zeros_like(target), target, mask)
            if cfg.norm_pix_loss:
                visualize.warn_of_flat_reconstruction(run, loss_mae, flat, "loss_mae")
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
    """visualization.png: the image, what the encoder sees, the reconstructions by a and by b."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    patches = patchify(x, cfg.patch_size)
    with run.autocast():
        a, b, mask = net(x, rng.uniform(index, patches.shape[1], "picture"))
    columns = {"image": x, "visible": unpatchify(patches.masked_fill(mask[:, :, None], 0)),
               "reconstruction": reconstruct(a[:, 1:].float(), patches, mask, cfg.norm_pix_loss)}
    if not cfg.dle:                                                  # without dropout b equals a
        columns["second branch"] = reconstruct(b[:, 1:].float(), patches, mask, cfg.norm_pix_loss)
    visualize.save_grid(run, {title: augment.denormalize(z) for title, z in columns.items()})


if __name__ == "__main__":
    config.main(main)
