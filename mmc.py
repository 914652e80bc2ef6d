"""MMC: Masked Momentum Contrastive learning (Wu et al., 2023, arXiv 2308.11448).

A student gets a corrupted image: random rectangles are replaced by noise or by parts of another
image. A teacher, the moving average of the student, gets the same image intact. Three losses (the
arrows give the effect that the authors intend):
  L_rec    reconstruct the corrupted pixels        -> patches of one object become similar
  L_patch  pull each patch token toward the teacher's token of the same patch and away from
           its tokens of *other* images            -> objects are separated
  L_cls    pull the class token toward the teacher's class token of the *other view* of the image
           and away from those of other images     -> semantics, which L_patch transfers to patches

    view v -+- corrupted -> student -+- patches -> h_rec -> pixels   L1 on the corrupted pixels
            |                        +- patches -> h_patch -> Q_v    InfoNCE with K_v, same patch
            |                        +- class   -> h_cls -> q_v      InfoNCE with k of other view
            +- intact ---> teacher* -+- patches -> h_patch* -> K_v
                                     +- class   -> h_cls* -> k_v
    local crop, intact --> student --- class   -> h_cls -> q         InfoNCE with k_1, k_2
         * exponential moving average of the student's weights; no gradient. v = 1, 2: global views

    L       = L_rec + L_patch + L_cls                                                  (eq. 4)
    L_rec   = mean over corrupted pixels of |x - h_rec(f_s(x'))|      (eq. 1, but see rec_loss)
    L_patch = mean over patches i of
              -log e^(Q_i.K_i/tau) / (e^(Q_i.K_i/tau) + sum over patches j of other images
                                                                of e^(Q_i.K_j/tau))    (eq. 2)
    L_cls   = mean over pairs of views of -log e^(q.k/tau) / sum over images j of e^(q.k_j/tau)
                                                                                       (eq. 3)

All Q, K, q, k are L2-normalized, as in MoCo v3 and SiT, and as in SiT there is no predictor (both
our choice).

The paper (Table 4: ViT-S, ImageNet-100, 200 epochs; kNN on class token / on the mean patch token):
L_rec alone 17.2 / 14.7, L_cls alone 75.0 / 63.9, L_cls + L_rec 72.5 / 53.7, L_cls + L_patch 75.6 /
75.5, all three 77.5 / 77.0: L_patch improves the patch tokens, L_rec helps only with both others.

We found no code by the authors. What the paper leaves open is marked "our choice", with the method
that we followed: GMML, SiT and MC-SSL (the same group: arXiv 2205.14986, 2104.03602, 2111.15340),
MoCo v3, DINO or iBOT. Also our choice: the patch projection is trained (SiT; MoCo v3 freezes it),
the heads have PyTorch's initial weights (MoCo v3; SiT: normal, std 0.02), and the teacher is the
network that is evaluated and saved (DINO, iBOT).

    python mmc.py                                         minutes on a laptop, offline
    python mmc.py --lambda-rec 0 --lambda-patch 0         L_cls alone, as in Table 4
    torchrun --nproc_per_node=8 mmc.py --data imagenet    the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, rng, visualize
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import BatchNorm, all_gather, all_mean, unwrap
from lib.run import Run, cosine, ema_update, param_groups, set_lr

# B images per process, V = 2 global views, n_local local crops, N patches, D width, out_dim width
# of queries and keys, S and S' side of a global and a local crop; Q, q: projected patch and class
# tokens of the student, K, k: of the teacher


CANDIDATES = 255                        # rectangles drawn per image and view: enough for 80%
Area = Annotated[float, (0, 0.8)]       # fraction of an image that they cover


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/mmc.yaml overrides them per data set (default: toy)."""
    # the network (paper, Implementation Details: ViT-B/16, for ImageNet-100 ViT-S/16)
    img_size: Size = 224            # side of a global view in pixels (paper)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 768           # encoder width (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    pos: Literal["learned", "sincos_row"] = "learned"     # position embedding (our choice: SiT)
    init: Literal["trunc", "moco"] = "trunc"      # initial weights of the backbone; trunc: normal,
                                                  # std 0.02 (our choice: SiT); moco: Xavier uniform
    drop_path: Fraction = 0.1       # stochastic depth rate of the student (our choice: SiT)
    mlp_dim: Size = 4096            # hidden width of the heads, MLPs of 3 layers (paper)
    out_dim: Size = 256             # width of queries and keys (our choice: MoCo v3, SiT)
    # the objective; weight 0 removes a loss and its head
    lambda_rec: float = 1.0         # weight of L_rec (paper, eq. 4)
    lambda_cls: float = 1.0         # weight of L_cls (paper, eq. 4); SiT's loss corresponds to 0.8
    lambda_patch: float = 1.0       # weight of L_patch (paper, eq. 4)
    temperature: Positive = 0.2     # tau of both contrastive losses (paper)
    group_size: Several = 48        # images whose patches are contrasted with each other, and that
                                    # are pasted into each other (our choice: the paper's batch);
                                    # memory grows with batch_size * group_size * patches^2
    # the corruption: the paper's 75% noise and 30% other images "of the masked blocks" are together
    # over 100%; we read these and its 35% of the images as in GMML's script (our choice)
    noise_ratio: Area = 0.75        # area replaced by noise (paper); if above 0.5, it is drawn per
                                    # image and view, uniform in [0.5, noise_ratio] (GMML)
    paste_ratio: Area = 0.3         # area replaced by another image (paper); same rule
    paste_prob: Fraction = 0.35     # probability, per view, of pasting instead of noise (paper)
    drop_align: int = 1             # rectangles start at multiples of this, in pixels, and end at
                                    # one or at the border (our choice: SiT, GMML)
    # the views
    global_crops_scale: tuple = (0.25, 1.0)   # area of a global crop (our choice: MC-SSL; use 0.2
                                              # without local crops: SiT)
    local_crops_scale: tuple = (0.05, 0.25)   # area of a local crop (our choice: MC-SSL)
    local_crops_number: int = 10    # uncorrupted local crops for the student (our choice: MC-SSL,
                                    # DINO; the paper gives no number, only "for the teacher",
                                    # which would make small crops the targets)
    local_crops_size: Size = 96     # side of a local crop in pixels (our choice: MC-SSL, DINO)
    color_jitter: tuple = (0.4, 0.4, 0.4, 0.0)    # brightness, contrast, saturation (paper); hue
                                                  # (not listed in the paper; related methods: 0.1)
    blur_p: Fraction = 1.0          # probability of blur in view 1 (our reading of the paper's
                                    # "strength of 1.0"); view 2: a tenth (SiT), local: half (DINO)
    # the optimization
    epochs: Positive = 400          # epochs (paper: 400 on ImageNet-1K, 500 on ImageNet-100)
    warmup_epochs: float = 10.0     # linear warmup of the learning rate (our choice: SiT, DINO)
    batch_size: Size = 384          # global batch size (our choice: the paper's 48, times 8 GPUs)
    lr: float = 7.5e-4              # base learning rate (paper); the peak is lr * batch/256 (our
                                    # choice: SiT, DINO)
    min_lr: float = 1e-6            # final learning rate of the cosine schedule (paper)
    weight_decay: float = 0.04      # AdamW (paper); constant, not for biases and norms (our choice)
    clip_grad: float = 3.0          # max gradient norm of each tensor (our choice: SiT); 0: off
    momentum_teacher: Fraction = 0.996     # EMA momentum, increased to 1 by a cosine (paper)

    def __post_init__(self):
        config.check_bounds(self)
        if self.accum_iter > 1:
            raise ValueError("MMC contrasts the images of a batch: micro-batches would change the "
                             "result; leave out --accum-iter and use a smaller --batch-size")
        if not 1 <= self.drop_align <= self.img_size / 6:
            raise ValueError(f"--drop-align {self.drop_align} must be between 1 and "
                             f"{self.img_size // 6}, a sixth of --img-size: on a coarser grid the "
                             f"rectangles can fail to cover the requested area")
        crops = self.lambda_cls and self.local_crops_number
        if crops and self.local_crops_size % self.patch_size:
            raise ValueError("--local-crops-size must be a multiple of --patch-size")
        if not (self.lambda_rec or self.lambda_cls or self.lambda_patch):
            raise ValueError("--lambda-rec, --lambda-cls and --lambda-patch are all 0: there is no "
                             "loss")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Two global crops with SiT's asymmetric augmentation and the paper's color jitter; local crops
    of MC-SSL's scale. jitter_p and gray_p are those of SiT and MC-SSL (all our choice)."""
    color = dict(jitter=cfg.color_jitter, jitter_p=0.8, gray_p=0.2)
    crop = dict(size=cfg.img_size, scale=cfg.global_crops_scale, **color)
    return [data.View(**crop, blur_p=cfg.blur_p),
            data.View(**crop, blur_p=0.1 * cfg.blur_p, solarize_p=0.2),      # 0.1: SiT, 0.2: paper
            data.View(cfg.local_crops_size, scale=cfg.local_crops_scale, **color,
                      blur_p=0.5 * cfg.blur_p,                               # 0.5: DINO
                      copies=cfg.local_crops_number if cfg.lambda_cls else 0)]


def span(u_start, u_length, size, align):
    """Start and length (in pixels, multiples of `align`) of a rectangle along one axis of an image
    of `size` pixels, from uniform numbers: at most 30% of the side before the length is rounded to
    `align`; what crosses the border is cut off (GMML)."""
    start = (u_start * (size - align)).long() // align * align
    length = align + (u_length * (max(align + 1, int(0.3 * size)) - align)).long()
    return start, (torch.minimum(length, size - start) / align).round().long() * align


def rectangles(u, size, ratio, align=1):
    """GMML's random region: rectangles are added until they cover `ratio` of the area. u: (B,
    CANDIDATES, 4) uniform numbers, ratio: (B,). Returns (B, size, size) bool."""
    top, height = span(u[..., 0], u[..., 2], size, align)            # (B, n) each, n CANDIDATES
    left, width = span(u[..., 1], u[..., 3], size, align)
    boxes, area = torch.stack([top, top + height, left, left + width], -1), ratio * size**2
    if u.device.type != "cpu":
        return batched_union(boxes, size, area)
    region = torch.zeros(len(u), size, size, dtype=torch.bool)
    for mask, candidates, enough in zip(region.numpy(), boxes.numpy(), area.tolist()):  # one image
        for y0, y1, x0, x1 in candidates:
            if np.count_nonzero(mask) >= enough:
                break
            mask[y0:y1, x0:x1] = True
    return region


def batched_union(boxes, size, area):
    """The loop of rectangles() for all images of a batch at once, which a GPU needs. A rectangle is
    the outer product of indicators of its rows and of its columns, so rows @ columns counts the
    rectangles that cover a pixel; the smallest sufficient number of rectangles is found by
    bisection. boxes: (B, n, 4) top, bottom, left, right; area: (B,) pixels to cover."""
    def indicator(start, end):                            # (B, n) -> (B, n, size), 0 or 1
        pixel = torch.arange(size, device=boxes.device)
        return ((pixel >= start[..., None]) & (pixel < end[..., None])).to(torch.bfloat16)

    top, bottom, left, right = boxes.unbind(-1)
    rows = indicator(top, bottom).transpose(1, 2)         # (B, size, n)
    columns = indicator(left, right)                      # (B, n, size)

    def union(n):                                         # of the first n[b] rectangles of image b
        chosen = torch.arange(boxes.shape[1], device=boxes.device) < n[:, None]
        return (rows * chosen[:, None]) @ columns > 0

    low = torch.full_like(area, -1, dtype=torch.long)     # never enough
    high = torch.full_like(low, boxes.shape[1])           # always enough, or all there are
    for _ in range(boxes.shape[1].bit_length()):
        n = (low + high) // 2
        enough = union(n).sum((1, 2)) >= area
        low, high = torch.where(enough, low, n), torch.where(enough, n, high)
    return union(high)


def corruption(index, cfg, group_size, *key):
    """Random corruption of the images `index` (B,), for corrupt(): region (B, S, S) bool, pasted
    (B,) bool, other (B,) row of the batch to paste from, noise (B, 3, S, S). `key` seeds the
    numbers: in training seed, epoch and view."""
    u_paste, u_ratio, u_other = rng.uniform(index, 3, *key, "kind").unbind(1)
    pasted = u_paste < cfg.paste_prob
    highest = torch.where(pasted, cfg.paste_ratio, cfg.noise_ratio)
    lowest = highest.clamp(max=0.5)
    ratio = highest - u_ratio * (highest - lowest)
    candidates = rng.uniform(index, (CANDIDATES, 4), *key, "rectangles")
    region = rectangles(candidates, cfg.img_size, ratio, cfg.drop_align)
    row = torch.arange(len(index), device=index.device)
    # another image of the group, never the image itself (our choice; GMML allows the latter)
    shift = 1 + (u_other * (group_size - 1)).long()
    other = row // group_size * group_size + (row + shift) % group_size
    return region, pasted, other, rng.normal(index, (3, *region.shape[1:]), *key, "noise")


def corrupt(x, region, pasted, other, noise):
    """(B, 3, S, S) normalized -> a copy whose region is noise or the same region of another
    image."""
    fill = torch.where(pasted[:, None, None, None], x[other], noise)
    return torch.where(region[:, None], fill, x)


# ---- Model and loss ------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers without bias, a batch norm after each, ReLU between; the last norm has neither
    scale nor shift, so over a batch every feature has mean 0 and variance 1 (our choice: MoCo v3).
    """
    layers = []
    for n, m in zip(widths, widths[1:-1]):
        layers += [nn.Linear(n, m, bias=False), BatchNorm(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False),
                         BatchNorm(widths[-1], affine=False))


class Network(nn.Module):
    """Backbone and heads (paper, Fig. 3); all heads share the final LayerNorm (our choice: SiT).
    The teacher has neither drop path nor the head of L_rec."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                cfg.num_heads, pos=cfg.pos, init=cfg.init,
                                drop_path=0.0 if teacher else cfg.drop_path)
        D, hidden, out = cfg.embed_dim, cfg.mlp_dim, cfg.out_dim
        self.head_cls = mlp(D, hidden, hidden, out) if cfg.lambda_cls else None
        self.head_patch = mlp(D, hidden, hidden, out) if cfg.lambda_patch else None
        self.head_rec = nn.Sequential(               # 3 layers (paper); GELU, no norm: our choice
            nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, 3 * cfg.patch_size**2)) if cfg.lambda_rec and not teacher else None

    def forward(self, x, crops=None, drop=None, drop_crops=None):
        """x: (V*B, 3, S, S); crops: (n_local*B, 3, S', S') or None; drop (V*B, 2*depth), drop_crops
        (n_local*B, 2*depth): uniform numbers that decide the drop path. Returns q ((V+n_local)*B,
        out_dim), Q (V*B, N, out_dim), pixels (V*B, 3, S, S), each None without its head. Batch
        statistics are those of all views together (our choice: SiT; with local crops: DINO)."""
        cls, patches = self.backbone.split(self.backbone(x, drop=drop))      # (V*B, D), (V*B, N, D)
        if crops is not None:                                                # class token only
            local, _ = self.backbone.split(self.backbone(crops, drop=drop_crops))
            cls = torch.cat([cls, local])                                    # ((V+n_local)*B, D)
        q = self.head_cls(cls) if self.head_cls else None
        Q = self.head_patch(patches) if self.head_patch else None            # norms over V*B*N
        pixels = unpatchify(self.head_rec(patches)) if self.head_rec else None
        return q, Q, pixels


def unpatchify(patches):
    """(B, N, p*p*3) -> (B, 3, S, S)."""
    side, p = math.isqrt(patches.shape[1]), math.isqrt(patches.shape[2] // 3)
    x = patches.unflatten(2, (p, p, 3)).unflatten(1, (side, side))           # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def rec_loss(pixels, target, region, count=None):
    """Mean absolute error over the corrupted pixels and channels (our choice: SiT, GMML). Eq. 1
    divides by all pixels: its value is ours times the corrupted fraction, 0.52 on average (times 3
    if its norm is a sum over the channels).
    pixels, target: (B, 3, S, S), region: (B, S, S); count: number of corrupted pixels to divide by,
    default region.sum(). The target is the augmented, normalized view before its corruption,
    without per-patch normalization (our choice: SiT, GMML)."""
    count = region.sum() if count is None else count
    return ((pixels - target).abs().sum(1) * region).sum() / (3 * count).clamp(min=1)


def cls_loss(q, k, tau, first=0):
    """InfoNCE across views (eq. 3). q: (V+n_local, B, out_dim) of the student, global views first;
    k: (V, batch_size, out_dim) of the teacher, from all processes (our choice: MoCo v3, SiT); the
    rows of this process start at `first`. Mean over the 2(1+n_local) pairs v != g: only different
    views are paired (our choice: SiT, MoCo v3; Fig. 3: "across views"). SiT and MoCo v3 sum both
    directions and multiply by 2 tau; eq. 3 does not."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    label = torch.arange(first, first + q.shape[1], device=q.device)
    return torch.stack([F.cross_entropy(q[v] / tau @ k[g].T, label)          # (B, batch_size)
                        for g in range(len(k)) for v in range(len(q)) if v != g]).mean()


def patch_loss(Q, K, tau, group_size):
    """InfoNCE among patches (eq. 2). Q, K: (V*B, N, out_dim) of student (corrupted) and teacher
    (intact), of the same views. The positive is the same patch; the negatives are all patches of
    the other images of its group, in the same view (our choice). Other patches of the same image
    are ignored, so that patches of one object are not pushed apart. The loss is over all patches,
    corrupted or not (eq. 2; iBOT's over the masked ones)."""
    N = Q.shape[1]
    image = torch.arange(group_size, device=Q.device).repeat_interleave(N)
    patch = torch.arange(group_size * N, device=Q.device)
    ignored = (image[:, None] == image) & (patch[:, None] != patch)      # (group_size*N)^2
    Q, K = (F.normalize(z, dim=-1).view(-1, group_size * N, z.shape[-1]) for z in (Q, K))
    # q / tau: dividing the logits would take longer.
    return torch.stack([F.cross_entropy((q / tau @ k.T).masked_fill_(ignored, -torch.inf), patch)
                        for q, k in zip(Q, K)]).mean()


# ---- Train ---------------------------------------------------------------------------------------


def clip_per_tensor(parameters, max_norm):
    """Scales the gradient of each tensor to a norm of at most max_norm; max_norm 0: no clipping.
    Returns the norm of all gradients together, before clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm:
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1)))
    return norms.norm()


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    B = cfg.batch_size // run.world                                          # images per process
    if B % cfg.group_size:
        size = math.gcd(cfg.group_size, B)
        raise ValueError(f"--group-size {cfg.group_size} must divide the {B} images per process: "
                         f"try {f'--group-size {size}' if size > 1 else 'another --batch-size'}")
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    run.init_encoder(unwrap(student).backbone)                               # with --init-from
    ema_update(teacher, student, 0.0)                                        # equal at the start
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, opt=opt)
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))
    peak_lr = cfg.lr * cfg.batch_size / 256

    for step, batch in run.steps(loader):
        lr = cosine(step, total, peak_lr, cfg.min_lr, warmup)
        momentum = cosine(step, total, cfg.momentum_teacher, 1.0)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        key = cfg.seed, batch.epoch
        corruptions = [corruption(batch.index, cfg, cfg.group_size, *key, v) for v in range(2)]
        intact = torch.cat(batch.views[:2])                                  # (2B, 3, S, S)
        x = torch.cat([corrupt(view, *c) for view, c in zip(batch.views, corruptions)])
        region = torch.cat([c[0] for c in corruptions])                      # (2B, S, S)
        crops = torch.cat(batch.views[2:]) if batch.views[2:] else None  # (n_local*B, 3, S', S')
        drop = rng.uniform(batch.index, (2 + cfg.local_crops_number, 2 * cfg.depth), *key, "drop")
        drop = drop.transpose(0, 1).flatten(0, 1)                    # ((2+n_local)*B, 2*depth)

        # The teacher gets the intact image: where a patch is corrupted, the student has to predict
        # the teacher's token from the surrounding patches.
        with run.autocast():
            with torch.no_grad():
                k, K, _ = teacher(intact)        # train mode: statistics of the batch, as in SiT
            q, Q, pixels = student(x, crops, drop[:2 * B], drop[2 * B:])

        losses = {}                                                  # in fp32
        if cfg.lambda_rec:
            # All processes divide by the same mean count: DDP's mean of their gradients is then
            # that of the mean over all corrupted pixels of the global batch.
            count = all_mean(region.sum().float())
            losses["loss_rec"] = rec_loss(pixels.float(), intact, region, count)
        if cfg.lambda_cls:
            k = all_gather(k.float().unflatten(0, (2, B)).transpose(0, 1))   # (batch_size, 2, ...)
            q = q.float().unflatten(0, (-1, B))                              # (2+n_local, B, ...)
            losses["loss_cls"] = cls_loss(q, k.transpose(0, 1), cfg.temperature, run.rank * B)
        if cfg.lambda_patch:
            losses["loss_patch"] = patch_loss(Q.float(), K.float(), cfg.temperature, cfg.group_size)
        loss = (cfg.lambda_rec * losses.get("loss_rec", 0) +
                cfg.lambda_cls * losses.get("loss_cls", 0) +
                cfg.lambda_patch * losses.get("loss_patch", 0))               # eq. 4

        loss.backward()
        grad_norm = clip_per_tensor(student.parameters(), cfg.clip_grad)
        run.log(loss=loss, **losses, lr=lr, grad_norm=grad_norm)
        opt.step()
        opt.zero_grad()
        ema_update(teacher, student, momentum)                               # after the step
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            found = visualize.evaluate(run, teacher.backbone, bank, queries)
            run.log(**found)
            with run.evaluation(student, teacher):
                save_visualization(run, cfg, unwrap(student), teacher, queries)
            if cfg.lambda_cls:
                visualize.warn_of_equal_tokens(run, found.get("feat_std", 1), "loss_cls",
                                               losses["loss_cls"], math.log(cfg.batch_size))
        if run.save_due:
            run.save_encoder(teacher.backbone, branch="teacher", heads={
                name: head.state_dict() for name, head in
                (("cls", teacher.head_cls), ("patch", teacher.head_patch)) if head})
            run.save()


def save_visualization(run, cfg, student, teacher, images, n=8):
    """visualization.png: test images; the same images, corrupted as in training; the student's
    reconstruction; cosine similarity of each of the teacher's patch tokens to that of the center
    patch (as in the paper's zero-shot segmentation), from the smallest in the image (blue) to 1."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    region, *fill = corruption(index, cfg, len(x), "visualization")  # pastes from all n images
    corrupted = corrupt(x, region, *fill)
    columns = {"intact": x, "corrupted": corrupted}
    with run.autocast():
        _, _, pixels = student(corrupted)
        _, patches = teacher.backbone.split(teacher.backbone(x))
    if cfg.lambda_rec:
        columns["reconstruction"] = torch.where(region[:, None], pixels.float(), x)
    columns = {title: augment.denormalize(z) for title, z in columns.items()}
    z = F.normalize(patches.float(), dim=-1)                                 # (n, N, D)
    side = math.isqrt(z.shape[1])
    center = side // 2 * side + side // 2
    similarity = z @ z[:, center, :, None]                   # (n, N, 1)
    lowest = similarity.amin(1, keepdim=True)
    similarity = (similarity - lowest) / (1 - lowest).clamp(min=1e-6)
    similarity = F.interpolate(similarity.view(-1, 1, side, side), cfg.img_size)[:, 0]
    columns["similarity to the center"] = visualize.heat_map(similarity)
    visualize.save_grid(run, columns)


if __name__ == "__main__":
    config.main(main)
