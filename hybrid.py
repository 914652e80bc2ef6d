"""SimMIM + MoCo v3: two objectives, one backbone (Park et al., 2023, arXiv 2305.00729, section 5).

Contrastive learning (CL) mostly affects the last blocks of a ViT: global attention, low
frequencies, shape, similar tokens. Masked image modeling (MIM) mostly affects the first ones: local
attention, high frequencies, texture, diverse tokens. If the two train different parts of a network,
one network trained with both should have the advantages of both, and the paper confirms it.

    x1, masked -> student  -> patches -> decoder --------------> pixels     L1 on masked pixels
    x2 -------+-> student  -> class -> projector  -> predictor -> q2        InfoNCE with k3
              +-> teacher* -> class -> projector* --------------> k2
    x3 -------+-> student  -> class -> projector  -> predictor -> q3        InfoNCE with k2
              +-> teacher* -> class -> projector* --------------> k3
         student: one backbone in all three passes; MIM uses its patch tokens, CL its class token
         * exponential moving average of the student's weights; no gradient

    L     = (1 - lambda) L_MIM + lambda L_CL                                      (section 5)
    L_MIM = mean over masked pixels and channels of |x1 - pixels|                 (SimMIM)
    L_CL  = ctr(q2, k3) + ctr(q3, k2)                                             (MoCo v3)
    ctr(q, k) = 2 tau mean over images i of
                -log e^(q_i.k_i/tau) / sum over images j of e^(q_i.k_j/tau)

lambda is the weight of CL: 0 is SimMIM, 1 is MoCo v3 on SimMIM's backbone; in both cases the views,
heads and passes of the other are left out. The factor 2 tau and the sum over two directions (kept
from MoCo v3: our choice) set the scale of lambda: an untrained network has L_CL = 0.8 ln 1024 = 5.5
with a batch of 1024 images, and L_MIM below 1.

The paper (ViT-B; Table G.1, iNat-2018 top-1 / ADE20K mIoU): lambda 0: 62.1 / 35.4, 1: 66.2 / 39.7,
the hybrid with 0.2: 68.8 / 42.2 (100 epochs, Table A.1; not stated for lambda 0 and 1).

The training code was never published. The paper gives the loss, SimMIM's backbone and Table A.1;
the first author's answer in a GitHub issue describes the three views and the modules. The rest is
taken from SimMIM and MoCo v3, and marked "our choice". Also our choice: the decoder is one 1x1
convolution (SimMIM; the author's sketch has a ViT), the patch projection is trained (SimMIM; MoCo
v3 freezes it), the contrastive loss uses the class token, and layers, norms and initial weights of
its heads are MoCo v3's, as is the teacher's update before the keys are computed. Table A.1 also
lists RandAug, mixup, cutmix and label smoothing; SimMIM's pretraining ignores these fields, and so
do we (our choice).

simmim.py and moco_v3.py explain the parts that are repeated here.

    python hybrid.py                                       minutes on a laptop, offline
    python hybrid.py --lambda-cl 0                         the loss of SimMIM
    torchrun --nproc_per_node=8 hybrid.py --data imagenet  the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, rng, visualize
from lib.config import Fraction, Positive, Size
from lib.distributed import BatchNorm, all_gather, unwrap
from lib.run import Run, cosine, ema_update, param_groups, set_lr

# B images per process, batch_size of all processes, N = h x w patches, D width, S image side, p
# patch side, out_dim width of queries and keys; mask: (B, h, w), of patches; masked_pixels:
# (B, S, S), the same mask of pixels


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/hybrid.yaml overrides them per data set (default: toy)."""
    # the network (paper, appendix A: SimMIM's ViT-B/16)
    img_size: Size = 224            # side of all views in pixels (our choice: both methods)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 768           # encoder width (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    pos: Literal["none", "sincos_row"] = "none"   # absolute position embeddings, beside the
                                    # relative ones (paper: SimMIM's, none; sincos_row, fixed: our
                                    # choice)
    layer_scale: float = 0.1        # initial scale of residual branches (paper: SimMIM's); 0: off
    init: Literal["beit", "moco"] = "beit"        # initial weights of the backbone: BEiT's (our
                                                  # choice: SimMIM) or MoCo v3's
    drop_path: Fraction = 0.1       # stochastic depth rate (paper), in all passes of the student
                                    # (our choice)
    mlp_dim: Size = 4096            # hidden width of projector, predictor (our choice: MoCo v3)
    out_dim: Size = 256             # width of queries and keys (our choice: MoCo v3)
    # the objective
    lambda_cl: Fraction = 0.2       # lambda, weight of L_CL (paper); that of L_MIM is 1 - lambda
    temperature: Positive = 0.2     # tau (our choice: MoCo v3)
    momentum_teacher: Fraction = 0.99      # EMA momentum, increased to 1 by a cosine; 0: constant
                                           # (our choice: MoCo v3)
    # the views
    mask_patch_size: Size = 32      # side of the masked squares in pixels (our choice: SimMIM)
    mask_ratio: Fraction = 0.6      # fraction of the squares, rounded up (our choice: SimMIM)
    mim_crop_min: Fraction = 0.67   # smallest area of the crop x1 (our choice: SimMIM)
    crop_min: Fraction = 0.08       # smallest area of the crops x2, x3 (our choice: MoCo v3)
    color_jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (our
                                                  # choice: MoCo v3)
    blur_p: Fraction = 1.0          # probability of blur in x2; x3: a tenth of it (our choice:
                                    # MoCo v3)
    # the optimization
    epochs: Positive = 100          # epochs (paper, Table A.1)
    warmup_epochs: float = 10.0     # linear warmup of the learning rate (paper)
    batch_size: Size = 1024         # global batch size (paper: 1k)
    lr: float = 1e-4                # base learning rate (paper); the peak is lr * batch/512 (our
                                    # choice: SimMIM)
    warmup_lr: float = 5e-7         # initial learning rate, times batch/512 (our choice: SimMIM)
    lr_drop_at: Fraction = 0.875    # fraction of the run after which lr is divided by 10 (paper:
                                    # "multistep"; our choice: SimMIM's 700 of 800 epochs)
    weight_decay: float = 0.05      # AdamW (paper); not for biases, norms, LayerScale and the class
                                    # token (our choice: SimMIM)
    clip_grad: float = 5.0          # max norm of the gradient (paper); 0: no clipping

    def __post_init__(self):
        config.check_bounds(self)
        if self.accum_iter > 1:
            raise ValueError("the hybrid contrasts the images of a batch: micro-batches would "
                             "change the result; leave out --accum-iter and use a smaller "
                             "--batch-size (for --lambda-cl 0 take simmim.py)")
        if self.lambda_cl > 0 and self.batch_size < 2:
            raise ValueError("--batch-size 1 has no other image as a negative: take 2 or more")
        if self.lambda_cl < 1:
            self.check_mask()

    def check_mask(self):
        if self.img_size % self.mask_patch_size or self.mask_patch_size % self.patch_size:
            raise ValueError(f"--mask-patch-size {self.mask_patch_size} must divide --img-size "
                             f"{self.img_size} and be a multiple of --patch-size {self.patch_size}")
        squares = (self.img_size // self.mask_patch_size)**2
        if not 0 < math.ceil(self.mask_ratio * squares) < squares:
            raise ValueError(f"--mask-ratio {self.mask_ratio}: of the {squares} squares of an "
                             f"image at least one must be masked and one visible")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """SimMIM's crop for x1, which will be masked; MoCo v3's pair for x2, x3 (both our choice)."""
    crop = dict(size=cfg.img_size, interpolation="bilinear")
    pair = dict(**crop, scale=(cfg.crop_min, 1.0), jitter=cfg.color_jitter, jitter_p=0.8,
                gray_p=0.2)
    mim = [data.View(**crop, scale=(cfg.mim_crop_min, 1.0))]
    cl = [data.View(**pair, blur_p=cfg.blur_p),
          data.View(**pair, blur_p=0.1 * cfg.blur_p, solarize_p=0.2)]
    return mim * (cfg.lambda_cl < 1) + cl * (cfg.lambda_cl > 0)


def square_mask(u, ratio, times):
    """u: (B, h, w) uniform numbers, one for each square of times x times patches. Masks the
    ceil(ratio h*w) squares with the smallest numbers, the same number in every image. Returns
    (B, h*times, w*times) bool, True: masked."""
    rank = u.flatten(1).argsort(dim=1, stable=True).argsort(1)  # stable: the same on every device
    squares = (rank < math.ceil(ratio * rank.shape[1])).view_as(u)
    return enlarge(squares, times)


def enlarge(mask, times):
    """(B, h, w) -> (B, h*times, w*times), every entry repeated."""
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


def draw_mask(index, cfg, *key):
    """Masks (B, h, w) bool of the images `index` (B,). key: seed and epoch, or "visualization"."""
    side = cfg.img_size // cfg.mask_patch_size
    u = rng.uniform(index, (side, side), *key, "mask")
    return square_mask(u, cfg.mask_ratio, cfg.mask_patch_size // cfg.patch_size)


# ---- Model and loss ------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers without bias, a batch norm after each, ReLU between; the last norm has neither
    scale nor shift, so over a batch every feature has mean 0 and variance 1."""
    layers = []
    for n, m in zip(widths, widths[1:-1]):
        layers += [nn.Linear(n, m, bias=False), BatchNorm(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False),
                         BatchNorm(widths[-1], affine=False))


class Network(nn.Module):
    """Backbone and three heads: decoder, projector, predictor. The teacher has the projector only,
    and no drop path (our choice)."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        D, hidden, out, p = cfg.embed_dim, cfg.mlp_dim, cfg.out_dim, cfg.patch_size
        self.backbone = vit.ViT(cfg.img_size, p, D, cfg.depth, cfg.num_heads, pos=cfg.pos,
                                rel_pos="shared", layer_scale=cfg.layer_scale or None,
                                qkv_bias="split", init=cfg.init, resize="size",
                                drop_path=0.0 if teacher else cfg.drop_path)
        if cfg.lambda_cl < 1 and not teacher:                                # decoder of MIM
            self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
            nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
            self.decoder = nn.Sequential(nn.Conv2d(D, 3 * p * p, 1), nn.PixelShuffle(p))
        if cfg.lambda_cl > 0:                                                # heads of CL
            self.projector = mlp(D, hidden, hidden, out)
            self.predictor = nn.Identity() if teacher else mlp(out, hidden, out)

    def forward(self, mim=None, cl=None):
        """mim: x1 (B, 3, S, S), mask (B, h, w), drop (B, 2*depth), the uniform numbers of the drop
        path; cl: x2, x3, drop (2B, 2*depth). Returns pixels (B, 3, S, S) and [q2, q3], each
        (B, out_dim); None for an input that is None."""
        pixels = q = None
        if mim:
            x1, mask, drop = mim
            _, patches = self.backbone.split(self.backbone(
                x1, mask=mask.flatten(1), mask_token=self.mask_token, drop=drop))     # (B, N, D)
            pixels = self.decoder(patches.transpose(1, 2).unflatten(2, mask.shape[1:]))
        if cl:                         # the heads take one view at a time, as in MoCo v3
            x2, x3, drop = cl
            cls, _ = self.backbone.split(self.backbone(torch.cat([x2, x3]), drop=drop))  # (2B, D)
            q = [self.predictor(self.projector(z)) for z in cls.chunk(2)]
        return pixels, q


def rec_loss(pixels, target, masked):
    """Mean absolute error over masked pixels and channels (SimMIM, section 3.4).
    pixels, target: (B, 3, S, S); masked: (B, S, S) bool."""
    return ((pixels - target).abs().sum(1) * masked).sum() / (3 * masked.sum())


def contrastive_loss(q, k, tau, first=0):
    """InfoNCE times 2 tau (our choice: MoCo v3, eq. 1). q: (B, out_dim) of the student; k:
    (batch_size, out_dim) of the teacher, of the other view, from all processes; the rows of this
    process start at `first`."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    label = torch.arange(first, first + len(q), device=q.device)
    return 2 * tau * F.cross_entropy(q @ k.T / tau, label)           # logits (B, batch_size)


# ---- Train ---------------------------------------------------------------------------------------


def schedules(step, total, warmup, cfg):
    """Learning rate: linear warmup, constant, then divided by 10 (SimMIM). Momentum: half a
    cosine up to 1."""
    lr = cfg.lr * (0.1 if step >= cfg.lr_drop_at * total else 1.0)
    if step < warmup:
        lr = cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / warmup
    momentum = cosine(step, total, cfg.momentum_teacher, 1.0) if cfg.momentum_teacher else 0.0
    return lr * cfg.batch_size / 512, momentum


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    run.init_encoder(unwrap(student).backbone)                               # with --init-from
    ema_update(teacher, student, 0.0)                                        # equal at the start
    groups = param_groups(student, cfg.weight_decay, no_decay=("cls_token",))
    opt = torch.optim.AdamW(groups, fused=True)
    run.restore(student=student, teacher=teacher, opt=opt)
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))
    B = cfg.batch_size // run.world
    first = run.rank * B                # where the keys of this process start among all keys

    for step, batch in run.steps(loader):
        lr, momentum = schedules(step, total, warmup, cfg)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        key = cfg.seed, batch.epoch
        drop = rng.uniform(batch.index, (3, 2 * cfg.depth), *key, "drop")
        drop = drop.transpose(0, 1)                                          # (3, B, 2*depth)
        mim = cl = None
        if cfg.lambda_cl < 1:
            x1, mask = batch.views[0], draw_mask(batch.index, cfg, *key)     # mask: (B, h, w)
            mim = x1, mask, drop[0]
        if cfg.lambda_cl > 0:
            cl = *batch.views[-2:], drop[1:].flatten(0, 1)                   # x2, x3, (2B, 2*depth)
            ema_update(teacher, student, momentum)

        # As in the author's sketch, x1 has no contrastive loss, and x2 and x3 are not masked. (In
        # iBOT and MMC the masked image has both losses.)
        with run.autocast():
            pixels, q = student(mim, cl)
            with torch.no_grad():
                _, k = teacher(cl=cl)                # train mode: statistics of the batch
        losses = {}                                                          # in fp32
        if mim:
            masked_pixels = enlarge(mask, cfg.patch_size)                    # (B, S, S)
            losses["loss_mim"] = rec_loss(pixels.float(), x1, masked_pixels)
        if cl:
            k2, k3 = (all_gather(z.float()) for z in k)              # (batch_size, out_dim)
            losses["loss_cl"] = (contrastive_loss(q[0].float(), k3, cfg.temperature, first) +
                                 contrastive_loss(q[1].float(), k2, cfg.temperature, first))
        loss = ((1 - cfg.lambda_cl) * losses.get("loss_mim", 0) +
                cfg.lambda_cl * losses.get("loss_cl", 0))

        loss.backward()
        # clip_grad_norm_ adds 1e-6 to the norm; 0: no clipping
        grad_norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip_grad or math.inf)
        run.log(loss=loss, **losses, lr=lr, grad_norm=grad_norm)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        net = unwrap(student)                # the one to evaluate and save (our choice: MoCo v3)
        if run.eval_due:
            found = visualize.evaluate(run, net.backbone, bank, queries)
            if mim:
                visible = x1.masked_fill(masked_pixels[:, None], torch.nan)
                mean_color = rec_loss(visible.nanmean((2, 3), keepdim=True), x1, masked_pixels)
                found["loss_mean_color"] = mean_color
                visualize.warn_of_mean_color(run, losses["loss_mim"], mean_color, "loss_mim",
                                             "a lower --lambda-cl" if cl else "another --lr")
            if cl:
                visualize.warn_of_equal_tokens(
                    run, found.get("feat_std", 1), "loss_cl", losses["loss_cl"],
                    4 * cfg.temperature * math.log(cfg.batch_size))
            run.log(**found)
            with run.evaluation(net):
                save_visualization(run, cfg, net, queries)
        if run.save_due:
            heads = {name: head.state_dict() for name, head in net.named_children()
                     if name != "backbone"}
            run.save_encoder(net.backbone, branch="base", heads=heads)
            run.save()


def save_visualization(run, cfg, net, images, n=8):
    """visualization.png: the image; its visible pixels and the reconstruction; the attention of
    the class token in the whole image (last block, mean of the heads)."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    columns, attention = {"image": x}, visualize.last_attention(run, net.backbone, x)
    if cfg.lambda_cl < 1:
        mask = draw_mask(index, cfg, "visualization")
        masked_pixels = enlarge(mask, cfg.patch_size)[:, None]
        with run.autocast():
            pixels, _ = net((x, mask, None))
        columns["visible"] = x * ~masked_pixels
        columns["reconstruction"] = torch.where(masked_pixels, pixels.float(), x)
    columns = {title: augment.denormalize(z) for title, z in columns.items()}
    columns["attention"] = visualize.attention_map(attention, cfg.img_size)
    visualize.save_grid(run, columns)


if __name__ == "__main__":
    config.main(main)
