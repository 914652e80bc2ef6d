"""SimMIM + MoCo v3: two objectives, one backbone (Park et al., 2023, arXiv 2305.00729, section 5).

Contrastive learning (CL) shapes the last blocks of a ViT: global, low frequencies, shape, all
tokens alike. Masked image modelling (MIM) shapes the first ones: local, high frequencies, texture,
tokens diverse. If they need different parts of the network, then one network trained by both should
get the best of both. It does. Read simmim.py and moco_v3.py first; their pieces are repeated here.

    x1, masked -- student --- patches - decoder ---------------- pixels    L1 on the hidden ones
    x2 -------+-- student --- class --- projector --- predictor - q2       InfoNCE with k3
              +-- teacher* -- class --- projector* -------------- k2
    x3 -------+-- student --- class --- projector --- predictor - q3       InfoNCE with k2
              +-- teacher* -- class --- projector* -------------- k3
    student: one backbone in all three passes; its patches paint, its class token contrasts
              * exponential moving average of the student's weights; no gradient

    L     = (1 - lambda) L_MIM + lambda L_CL                                      (section 5)
    L_MIM = mean over hidden pixels and colours of |x1 - y|                       (SimMIM)
    L_CL  = ctr(q2, k3) + ctr(q3, k2)                                             (MoCo v3)
    ctr(q, k) = 2 tau mean over images i of
                -log e^(q_i.k_i/tau) / sum over images j of e^(q_i.k_j/tau)

lambda weighs CL: 0 is SimMIM, 1 is MoCo v3 on SimMIM's backbone; at either end the other's view,
heads and passes are left out. The factor 2 tau and the sum of two directions (MoCo v3's, kept: our
choice) decide what a lambda means: a fresh network has L_CL = 0.8 ln N = 5.5 for N = 1024 images,
and L_MIM = 0.8 or 0.9.

The paper (ViT-B; Table G.1, iNat-2018 top-1 / ADE20K mIoU): lambda 0: 62.1 / 35.4, 1: 66.2 / 39.7,
the hybrid with 0.2: 68.8 / 42.2, after 100 epochs (Table A.1); not said of lambda 0 and 1.

The training code was never published. The paper gives the loss, SimMIM's backbone and Table A.1;
the first author, in an issue, the three views and "base, decoder, momentum". The rest is taken from
the parents, and marked "our choice"; so are a decoder that is one 1x1 convolution (SimMIM; the
author's sketch has a ViT), a patch projection that learns (SimMIM; MoCo v3 freezes it), and the
class token as what is contrasted (MoCo v3). Table A.1 also
lists RandAug, mixup, cutmix and label smoothing: fields of SimMIM's configuration which its
pretraining ignores; so do we (our choice).

    python hybrid.py                                       minutes on a laptop, offline
    python hybrid.py --lam 0 --pos none --init beit        SimMIM, exactly, if the others are equal
    torchrun --nproc_per_node=8 hybrid.py --data imagenet  the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, distributed, rng, visualize
from lib.run import Run, cosine, ema_update, param_groups, set_lr

# B images of a process, N of all processes, n x n patches, G x G blocks of the mask, D width,
# C width of contrast, S pixels


@dataclass
class Config:
    # the network (paper, appendix A: SimMIM's ViT-B/16)
    img_size: int = 224           # pixels, side of all views (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 768          # width of the backbone (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 12           # attention heads (paper)
    pos: str = "none"             # absolute positions: none (SimMIM) or sincos_row
    layer_scale: float = 0.1      # every branch begins so small (SimMIM); 0: as it is
    init: str = "beit"            # weights: beit (our choice: SimMIM) or moco (Xavier): see vit.py
    drop_path: float = 0.1        # stochastic depth (paper); in all student passes (our choice)
    hidden: int = 4096            # width inside projector, predictor (our choice: MoCo v3)
    out_dim: int = 256            # C (our choice: MoCo v3)
    # the objective
    lam: float = 0.2              # lambda, the weight of CL (paper); MIM has 1 - lambda
    tau: float = 0.2              # temperature (our choice: MoCo v3)
    momentum: float = 0.99        # of the teacher, rising to 1; 0 stays 0 (our choice: MoCo v3)
    # the views
    mask_block: int = 32          # pixels, side of the squares hidden or shown (our choice: SimMIM)
    mask_ratio: float = 0.6       # share of the blocks, rounded up (our choice: SimMIM)
    mim_scale: float = 0.67       # least area of the crop x1 (our choice: SimMIM)
    min_scale: float = 0.08       # least area of the crops x2, x3 (our choice: MoCo v3)
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)   # brightness, contrast, saturation, hue (our choice)
    blur_p: float = 1.0           # blur of x2; of x3 a tenth (our choice: MoCo v3)
    # the optimisation
    epochs: float = 100           # (paper, Table A.1)
    warmup_epochs: float = 10.0   # linear rise of the learning rate (paper)
    batch_size: int = 1024        # global (paper: 1k)
    lr: float = 1e-4              # (paper), times batch/512 (our choice: SimMIM)
    warmup_lr: float = 5e-7       # where the rise begins, times batch/512 (our choice: SimMIM)
    drop_at: float = 0.875        # share of the run after which the rate is a tenth (our choice)
    #                               paper: "multistep", not when; SimMIM: 700 of 800 epochs
    weight_decay: float = 0.05    # AdamW (paper); not of vectors, class token (our choice: SimMIM)
    clip: float = 5.0             # norm of the gradient of the sum (paper)


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """SimMIM's crop for x1, which will be masked; MoCo v3's pair for x2, x3 (both our choice)."""
    crop = dict(size=cfg.img_size, interpolation="bilinear")
    pair = dict(**crop, scale=(cfg.min_scale, 1.0), jitter=cfg.jitter, jitter_p=0.8, grey_p=0.2)
    mim = [data.View(**crop, scale=(cfg.mim_scale, 1.0))]
    cl = [data.View(**pair, blur_p=cfg.blur_p),
          data.View(**pair, blur_p=0.1 * cfg.blur_p, solarize_p=0.2)]
    return mim * (cfg.lam < 1) + cl * (cfg.lam > 0)


def block_mask(u, ratio, times):
    """u: (B, G, G) uniform numbers. Hides the ceil(ratio G*G) blocks with the smallest, so as many
    in every image; a block is times x times patches. Returns (B, n, n) bool, True: hidden."""
    rank = u.flatten(1).argsort(dim=1, stable=True).argsort(1)  # stable: the same on every device
    blocks = (rank < math.ceil(ratio * rank.shape[1])).view_as(u)
    return enlarge(blocks, times)


def enlarge(mask, times):
    """(B, n, n) -> (B, n*times, n*times), every entry repeated."""
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


def draw_mask(index, cfg, *key):
    """Which patches are hidden of the images `index` (B,) in the epoch named by `key`."""
    G = cfg.img_size // cfg.mask_block
    u = rng.uniform(index, (G, G), *key, "mask")
    return block_mask(u, cfg.mask_ratio, cfg.mask_block // cfg.patch_size)


# --------------------------------------------------------------------------------------------------
# Model and loss
# --------------------------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers without bias, a batch norm after each, ReLU between; the last norm has neither
    scale nor shift, so over a batch every feature has mean 0 and variance 1."""
    layers = []
    for n, m in zip(widths, widths[1:-1]):
        layers += [nn.Linear(n, m, bias=False), distributed.BatchNorm(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False),
                         distributed.BatchNorm(widths[-1], affine=False))


class Network(nn.Module):
    """Backbone and three heads: decoder, projector, predictor. The teacher has the projector only,
    and no drop path (our choice)."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        D, hidden, C, p = cfg.embed_dim, cfg.hidden, cfg.out_dim, cfg.patch_size
        self.backbone = vit.ViT(cfg.img_size, p, D, cfg.depth, cfg.num_heads, pos=cfg.pos,
                                rel_pos="shared", layer_scale=cfg.layer_scale or None,
                                qkv_bias="split", init=cfg.init,
                                drop_path=0.0 if teacher else cfg.drop_path)
        if cfg.lam < 1 and not teacher:                                      # SimMIM's
            self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
            nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
            self.decoder = nn.Sequential(nn.Conv2d(D, 3 * p * p, 1), nn.PixelShuffle(p))
        if cfg.lam > 0:                                                      # MoCo v3's
            self.projector = mlp(D, hidden, hidden, C)
            self.predictor = nn.Identity() if teacher else mlp(C, hidden, C)

    def forward(self, masked=None, pair=None):
        """masked: x1 (B, 3, S, S), mask (B, n, n), noise of the drop path; pair: x2, x3, noise.
        Returns pixels (B, 3, S, S) and [q2, q3], each (B, C); None for what was not given."""
        pixels = q = None
        if masked:
            x1, mask, drop = masked
            _, patches = self.backbone.split(self.backbone(
                x1, mask=mask.flatten(1), mask_token=self.mask_token, drop=drop))   # (B, n*n, D)
            pixels = self.decoder(patches.transpose(1, 2).unflatten(2, mask.shape[1:]))
        if pair:                       # x1 stays out of the heads: their batch norms see one view
            x2, x3, drop = pair
            cls, _ = self.backbone.split(self.backbone(torch.cat([x2, x3]), drop=drop))  # (2B, D)
            q = [self.predictor(self.projector(z)) for z in cls.chunk(2)]
        return pixels, q


def rec_loss(pixels, target, hidden):
    """Mean absolute error over hidden pixels and colours (SimMIM, section 3.4).
    pixels, target: (B, 3, S, S); hidden: (B, S, S) bool."""
    return ((pixels.float() - target).abs().sum(1) * hidden).sum() / (3 * hidden.sum())


def contrast(q, k, tau, first=0):
    """InfoNCE times 2 tau (our choice: MoCo v3, eq. 1). q: (B, C) of the student; k: (N, C) of the
    teacher, of the other view, from all processes; ours stand from row `first` on."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    label = torch.arange(first, first + len(q), device=q.device)
    return 2 * tau * F.cross_entropy(q @ k.T / tau, label)                   # logits (B, N)


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedules(step, total, warmup, cfg):
    """Learning rate: SimMIM's line up, constant, then a tenth. Momentum: half a cosine up to 1."""
    lr = cfg.lr * (0.1 if step >= cfg.drop_at * total else 1.0)
    if step < warmup:
        lr = cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / warmup
    momentum = cosine(step, total, cfg.momentum, 1.0) if cfg.momentum else 0.0
    return lr * cfg.batch_size / 512, momentum


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    B = cfg.batch_size // run.world                                          # of this process
    if not 0 <= cfg.lam <= 1:
        raise ValueError(f"--lam {cfg.lam}: the weight of the contrast lies between 0 and 1")
    if cfg.accumulate > 1:
        raise ValueError("the hybrid contrasts the images of a batch: micro-batches would change "
                         "the result; leave out --accumulate and use a smaller --batch-size (for "
                         "--lam 0 take simmim.py)")
    if not cfg.tau > 0:
        raise ValueError("--tau is a temperature: above 0")
    if cfg.lam > 0 and cfg.batch_size < 2:
        raise ValueError("--batch-size 1: the hybrid contrasts an image with others: 2 or more")
    if cfg.lam < 1 and (cfg.mask_block < 1 or cfg.img_size % cfg.mask_block or
                        cfg.mask_block % cfg.patch_size):
        raise ValueError(f"--mask-block {cfg.mask_block}: blocks must tile the image of "
                         f"{cfg.img_size} pixels, and patches of {cfg.patch_size} the blocks")
    blocks = (cfg.img_size // max(1, cfg.mask_block)) ** 2
    if cfg.lam < 1 and not (0 < cfg.mask_ratio < 1 and
                            math.ceil(cfg.mask_ratio * blocks) < blocks):
        raise ValueError(f"--mask-ratio {cfg.mask_ratio}: of the {blocks} blocks of an image at "
                         f"least one must be hidden and one stay")

    loader, bank, queries = run.data(views(cfg))         # the last two: for the kNN accuracy only

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    ema_update(teacher, student, 0.0)                                     # they begin equal
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay, spare=("cls_token",)),
                            fused=True)
    run.restore(student=student, teacher=teacher, opt=opt)
    total, warmup = run.length(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr, momentum = schedules(step, total, warmup, cfg)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        when, masked, pair, parts = (cfg.seed, batch.epoch), None, None, {}
        drop = rng.uniform(batch.index, (3, 2 * cfg.depth), *when, "drop").transpose(0, 1)
        if cfg.lam < 1:
            x1, mask = batch.views[0], draw_mask(batch.index, cfg, *when)    # (B, n, n)
            masked = x1, mask, drop[0]
        if cfg.lam > 0:
            pair = *batch.views[-2:], drop[1:].flatten(0, 1)                 # x2, x3, (2B, 2*depth)
            ema_update(teacher, student, momentum)                        # before the keys

        with run.autocast():
            pixels, q = student(masked, pair)
            with torch.no_grad():
                _, k = teacher(pair=pair)                # in training mode: batch statistics
        if masked:                               # fp32 from here on (GPU: products in TF32)
            hidden = enlarge(mask, cfg.patch_size)       # (B, S, S), as many in every image
            parts["mim"] = rec_loss(pixels, x1, hidden)
        if pair:
            k2, k3 = (distributed.all_gather(z.float()) for z in k)             # (N, C)
            first = run.rank * B
            parts["cl"] = contrast(q[0], k3, cfg.tau, first) + contrast(q[1], k2, cfg.tau, first)
        loss = (1 - cfg.lam) * parts.get("mim", 0) + cfg.lam * parts.get("cl", 0)

        run.backward(loss, opt, clip=cfg.clip)
        opt.step(), opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        run.log(loss=loss, **parts, lr=lr)
        net = distributed.unwrap(student)
        if run.due(cfg.evals):
            found = run.knn(net.backbone, bank, queries, cfg.img_size)
            if masked:
                visible = x1.masked_fill(hidden[:, None], torch.nan)
                found["flat"] = rec_loss(visible.nanmean((2, 3), keepdim=True), x1, hidden)
            run.log(now=True, **found)
            with run.looking():
                show(run, cfg, net, queries)
            if masked and parts["mim"] > found["flat"]:
                cure = "a lower --lam" if cfg.lam else "another --lr"
                run.say("paints no better than the mean colour of what is visible (mim above "
                        f"flat): too early, or try {cure}")
            # a small spread (1: all over the sphere, 0: one point) is enough for the batch norms,
            # as long as cl falls
            chance = 4 * cfg.tau * math.log(cfg.batch_size)
            if pair and found.get("spread", 1) < 0.05 and parts["cl"] > 0.98 * chance:
                run.say(f"collapsed: all class tokens look alike (spread near 0), and cl is "
                        f"not below {chance:.2f}, the cost of knowing nothing; try a lower --lr or "
                        f"more --warmup-epochs")
        if run.save_due():
            heads = {name: head.state_dict() for name, head in net.named_children()
                     if name != "backbone"}
            run.save_encoder(net.backbone, branch="base", heads=heads)
            run.save()


@torch.no_grad()
def show(run, cfg, net, images, n=8):
    """picture.png: test images; what is left of them and what the network paints in the gaps; what
    the class token attends to in the intact image (last block, mean of the heads)."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    columns, last = {"image": x}, cfg.depth - 1
    net.eval()
    with run.autocast():
        _, maps = net.backbone.layers(x, [last], attention=[last])
        if cfg.lam < 1:
            mask = draw_mask(index, cfg, "picture")
            pixels, _ = net((x, mask, None))
            hidden = enlarge(mask, cfg.patch_size)[:, None]
            columns["masked"] = x * ~hidden
            columns["painted"] = torch.where(hidden, pixels.float(), x)
    net.train()
    attention = maps[last][:, :, 0, 1:].float().mean(1)                      # (n, n*n)
    side = math.isqrt(attention.shape[1])
    attention = (attention / attention.amax(1, keepdim=True)).view(-1, 1, side, side)
    attention = visualize.heat_map(F.interpolate(attention, cfg.img_size)[:, 0])
    columns = {title: augment.denormalize(z) for title, z in columns.items()}
    run.picture({**columns, "attention": attention})


if __name__ == "__main__":
    config.main(main)
