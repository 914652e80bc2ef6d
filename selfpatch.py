"""SelfPatch: patch-level self-supervision (Yun et al., 2022, arXiv 2206.07990), on DINO or MoBY.

DINO has a target for one vector per image. SelfPatch adds a target for each patch: neighboring
patches mostly belong to the same object. Of the 8 neighbors of a patch the teacher takes the most
similar ones as positives and aggregates them by attention into one vector; from the patch itself,
in the same crop, the student must predict the teacher's assignment of this vector to prototypes.
A patch is not among its own positives: otherwise copying it would be a trivial solution. The
backbone has no class token: the attention that aggregates positives also aggregates all patches,
into the image vector for DINO's loss.

    crops -+-> teacher* -> patches -+-> attention* over all patches -> c_head* -> t      P (global)
           |                        +-> attention* over positives ---> p_head* -> u      Q
           |                            of each patch                           | cross-entropy: P
           |                                                                    | with s of crops
           |                                                                    | v != g; Q with w
           |                                                                    | of the same patch
           +-> student -> patches -+-> attention over all patches ---> c_head --> s
                                   +---------------------------------> p_head --> w
       * exponential moving average of the student's weights; no gradient
       P = softmax((t - c) / tau_t), Q = softmax((u - c_p) / tau_t)

    L       = L_cls + lambda L_patch,   lambda = 0.1                                     (code)
    L_cls   = 1/n sum over global g, sum over all crops v != g of
              - sum over k of P_g[k] log softmax(s_v / tau_s)[k],   n = 2 (1 + n_local)
    L_patch = mean over all crops of: mean over their patches i of
              - sum over k of Q_i[k] log softmax(w_i / tau_s)[k]
    c   <- m_c c   + (1 - m_c) mean of t over *all* crops, local ones included, after the step
    c_p <- m_c c_p + (1 - m_c) mean of u over all patches of these

With --base moby, L_cls is the loss of MoBY (Xie et al., 2021; see moby.py) between two global
crops: c_head is a projector to keys t and, in the student, a predictor to queries s behind it, and

    L_cls = ctr(s_1, t_2, queue of t_2) + ctr(s_2, t_1, queue of t_1)

The learning rate (warmup from 0), the clipping and the place of the EMA update are then MoBY's, on
ImageNet, ImageNet-100 and COCO also the settings of the optimization and the drop path. The student
is evaluated, as in MoBY. With --backbone swin_tiny, patches are those of the last stage, of 32
pixels: add --num-positives 2 (supplement G).

The paper (ViT-S/16, ImageNet; DINO -> SelfPatch): COCO box AP 40.8 -> 42.1, ADE20K mIoU (Semantic
FPN) 38.3 -> 41.2 (300 -> 200 epochs, supplement A), linear 75.1 -> 75.6 (300 epochs, supplement D).

Short runs on toy and CIFAR-10 need batch norms in the head (--use-bn-in-head): at first the logits
of different images are nearly the same. The center removes what they have in common, the remainder
is too small to be sharpened, and loss_cls stays at ln K, that of a uniform guess.

From DINO's official code, not its paper: the division by n, the gradient clipped tensor by tensor,
and the last layer frozen in the first epoch. Ours: random numbers derived per image (lib/rng.py).
From SelfPatch's official code, not its paper: local crops go to the teacher and into both centers;
L_patch does not train the aggregation blocks, only L_cls does; the teacher also applies their
moving average to the positives; and neighbors wrap around the border: a positive of a patch at the
left edge may lie at the right edge. Ours, but not on ImageNet and COCO: neighbors end at the
border, where a patch has 5 (in a corner 3) and no more positives than these (--borders correct).
Also ours: keys and values of a patch are computed once for all its neighbors; one pass of attention
computes the image vector and the patch targets together; batch norms take (B, N, D), where the
code's fail. All of --base moby but the fact that they trained it (supplement A) is ours, as there
is no code: the image vector, lambda and the head of the patches are those of SelfPatch on DINO.

    python selfpatch.py   toy (configs/selfpatch.yaml): minutes on a laptop, offline, no local crops
    python selfpatch.py --lambda-patch 0   DINO without a class token (local crops enter c)
    python selfpatch.py --base moby        MoBY without a class token, and the loss of patches
    python selfpatch.py --base moby --backbone swin_micro     the same with a small Swin
    torchrun --nproc_per_node=8 selfpatch.py --data imagenet  as published, not run
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import config, positions, rng, swin, visualize
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import BatchNorm, all_gather, all_mean, unwrap
from lib.run import Run, cosine, ema_update, param_groups, set_lr
from lib.weights import init_linear

# B images per process and micro-batch, 2 + n_local crops of each, D width, K prototypes, S and S'
# sides of a global and a local crop; tau_t, tau_s: --teacher-temp, --student-temp
# N patches of a crop, H heads, K_patch patch prototypes; t, u: teacher's logits; s, w: student's


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/selfpatch.yaml overrides them per data set (default: toy)."""
    base: Literal["dino", "moby"] = "dino"    # method of the image-level loss (paper: both, moby in
                                              # supplement A); moby: other values in the .yaml
    # the network (paper: ViT-S/16; supplement A: ViT-Ti/16, Swin-T)
    backbone: Literal["vit", "swin_tiny", "swin_micro"] = "vit"    # vit: the sizes below (paper);
                                    # swin_tiny (paper: on MoBY); swin_micro: small images (our
                                    # choice)
    img_size: Size = 224            # image side in pixels (global crop; paper)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 384           # encoder width, D (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 6             # attention heads (paper)
    pos: Literal["learned", "sincos_row"] = "learned"  # position embeddings (paper);
                                                       # sincos_row, fixed: our choice
    init: Literal["trunc", "moco"] = "trunc"  # initial weights; trunc: normal, std 0.02 (code);
                                              # moco: Xavier (our choice)
    drop_path: Fraction = 0.1       # rate of stochastic depth, student only (code)
    head_hidden_dim: Size = 2048    # width inside the head (DINO)
    bottleneck_dim: Size = 256      # width before the prototypes, L2-normalized (DINO)
    out_dim: Several = 65536        # image prototypes, K (paper; COCO: 4096); fewer images: 1024;
                                    # moby: width of queries and keys, 256 (MoBY)
    mlp_dim: Size = 4096            # moby: hidden width of projector and predictor (MoBY)
    out_dim_selfpatch: Several = 4096      # patch prototypes, K_patch (paper)
    use_bn_in_head: bool = False    # batch norms in the head (code: option); few images: true
    norm_last_layer: bool = True    # keeps prototypes at norm 1 (code)
    # the objective
    lambda_patch: float = 0.1       # weight of L_patch (code)
    num_positives: int = 4          # positives per patch (paper; 2 for patches of 32 pixels)
    borders: Literal["official", "correct"] = "official" # neighbors wrap around the border (code);
                                                         # correct: they end there (our choice)
    student_temp: Positive = 0.1    # softmax temperature of the student (code)
    warmup_teacher_temp: Positive = 0.04   # initial teacher temperature (code); lower if loss_cls
                                           # stays at ln K; used if --warmup-teacher-temp-epochs > 0
    teacher_temp: Positive = 0.04   # teacher temperature after warmup (code; DINO: 0.07)
    warmup_teacher_temp_epochs: int = 0    # epochs of linear temperature warmup (code; DINO: 30)
    center_momentum: Fraction = 0.9 # EMA momentum of centers (code)
    freeze_last_layer: float = 1.0  # epochs in which the last layer is frozen (code)
    temperature: Positive = 0.2     # moby: tau of the contrastive loss (MoBY)
    queue_size: Size = 4096         # moby: keys in the queue of each view (MoBY); choose at most an
                                    # eighth of the images
    # the views
    global_crops_scale: tuple = (0.25, 1.0)   # global crop area (code;
                                              # without local crops, code: 0.14 to 1)
    local_crops_scale: tuple = (0.05, 0.25)   # local crop area (code)
    local_crops_number: int = 8     # local crops per image, n_local (paper; COCO: 2)
    local_crops_size: Size = 96     # side of a local crop in pixels (paper)
    color_jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (code)
    blur_p: Fraction = 1.0          # blur probability, crop 1; crop 2: a tenth, local: half (code)
    # the optimization
    epochs: Positive = 200          # training epochs (paper; classification: 300)
    warmup_epochs: float = 10.0     # linear warmup of the learning rate from 0 (paper)
    batch_size: Size = 1024         # global batch size (paper)
    lr: float = 5e-4                # base learning rate; the peak is lr * batch/256 (paper)
    min_lr: float = 1e-6            # final learning rate of the cosine (code)
    weight_decay: float = 0.04      # AdamW weight decay; not for biases, norm layers (code)
    weight_decay_end: float = 0.4   # weight decay increases to this by a cosine (code)
    clip_grad: float = 3.0          # max gradient norm of each tensor (code); moby: of all
                                    # together, 5 (MoBY); 0: off
    momentum_teacher: Fraction = 0.996     # teacher's EMA momentum, rises to 1 by a cosine (code)
    overfit_one_batch: bool = False # train on the first batch only, as a check; on large data sets
                                    # add --warmup-epochs 0 --freeze-last-layer 0

    def __post_init__(self):
        if self.backbone in swin.SIZES:
            swin.set_sizes(self)
        config.check_bounds(self)
        if not 1 <= self.num_positives <= 8:
            raise ValueError("--num-positives must be 1 to 8 of the 8 neighbors")
        if self.local_crops_number and self.local_crops_size % self.patch_size:
            raise ValueError("--local-crops-size must be a multiple of --patch-size")
        if self.use_bn_in_head and self.accum_iter > 1:
            raise ValueError("--use-bn-in-head normalizes over the batch: micro-batches would "
                             "change the result; use --accum-iter 1 or --use-bn-in-head false")
        if self.base == "moby" and self.accum_iter > 1:
            raise ValueError("MoBY's batch norms see all images of a batch: micro-batches would "
                             "change the result; leave out --accum-iter")
        if self.base == "moby" and self.local_crops_number:
            raise ValueError("--base moby has two views and no local crops: pass "
                             "--local-crops-number 0")
        if self.base == "moby" and self.queue_size < self.batch_size:
            raise ValueError(f"--queue-size {self.queue_size} must hold the keys of a batch, at "
                             f"least --batch-size {self.batch_size}")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Two global crops, blurred and solarized with BYOL's unequal probabilities, and local ones."""
    color = dict(jitter=cfg.color_jitter, jitter_p=0.8, gray_p=0.2)
    crop = dict(size=cfg.img_size, scale=cfg.global_crops_scale, **color,
                interpolation="bilinear" if cfg.base == "moby" else "bicubic")
    return [data.View(**crop, blur_p=cfg.blur_p),
            data.View(**crop, blur_p=0.1 * cfg.blur_p, solarize_p=0.2),
            data.View(cfg.local_crops_size, scale=cfg.local_crops_scale, **color,
                      blur_p=0.5 * cfg.blur_p, copies=cfg.local_crops_number)]


# ---- Model and loss ------------------------------------------------------------------------------


class Prototypes(nn.Module):
    """A Linear whose K rows have norms weight_g, learned or fixed at 1 (weight norm). For a unit
    vector z, logits are these norms times cosines."""

    def __init__(self, dim, K, unit_norm):
        super().__init__()
        self.weight_v = nn.Linear(dim, K, bias=False).weight                 # (K, dim)
        self.weight_g = nn.Parameter(torch.ones(K, 1), requires_grad=not unit_norm)

    def forward(self, z):
        return F.linear(z, self.weight_g * F.normalize(self.weight_v, dim=1))


class Head(nn.Module):
    """MLP, L2 normalization, prototypes."""

    def __init__(self, cfg, K):
        super().__init__()

        def layer(width):
            norm = [BatchNorm(cfg.head_hidden_dim)] if cfg.use_bn_in_head else []
            return nn.Linear(width, cfg.head_hidden_dim), *norm, nn.GELU()

        self.mlp = nn.Sequential(*layer(cfg.embed_dim), *layer(cfg.head_hidden_dim),
                                 nn.Linear(cfg.head_hidden_dim, cfg.bottleneck_dim))
        self.last_layer = Prototypes(cfg.bottleneck_dim, K, cfg.norm_last_layer)
        init_linear(self.mlp, cfg.init)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def mlp(n, hidden, out):
    """Two linear layers with a batch norm and a ReLU between; the output is not normalized."""
    return nn.Sequential(nn.Linear(n, hidden), BatchNorm(hidden), nn.ReLU(),
                         nn.Linear(hidden, out))


class QueryHead(nn.Module):
    """The head of images of --base moby: projector and, in the student only, predictor."""

    def __init__(self, cfg, teacher):
        super().__init__()
        self.projector = mlp(cfg.embed_dim, cfg.mlp_dim, cfg.out_dim)
        self.predictor = nn.Identity() if teacher else mlp(cfg.out_dim, cfg.mlp_dim, cfg.out_dim)

    def forward(self, x):
        """(2B, D) -> (2B, out_dim), one view at a time: batch statistics do not mix the views."""
        return torch.cat([self.predictor(self.projector(z)) for z in x.chunk(2)])


class ClassAttention(nn.Module):
    """Each vector of z (B, n_queries, D) attends to itself and to those of the patches y (B, N, D)
    that mask (B, n_queries, N) allows. Only z is updated (CaiT's block, without layer scale)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, z, y, mask=None, weights=None):
        """weights: a list, gets the attention to y only (B, H, n_queries, N): rows sum to < 1."""
        def heads(x):                                                        # (B, H, ., D/H)
            return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        query, y = self.norm1(z), self.norm1(y)
        q, k, v = (heads(f(query)) for f in (self.q, self.k, self.v))       # (B, H, n_queries, D/H)
        to_self, to_patches = (q * k).sum(-1, keepdim=True), q @ heads(self.k(y)).mT
        if mask is not None:
            to_patches = to_patches.masked_fill(~mask[:, None], -torch.inf)
        a = (torch.cat([to_self, to_patches], -1) * q.shape[-1]**-0.5).softmax(-1)  # (B, H, ., 1+N)
        if weights is not None:
            weights.append(a[..., 1:])
        x = a[..., :1] * v + a[..., 1:] @ heads(self.v(y))
        z = z + self.proj(x.transpose(1, 2).flatten(2))
        return z + self.mlp(self.norm2(z))


class Aggregation(nn.Module):
    """Two stacked class attentions that start from cls_token (paper, section 3.2), for two uses:
    all patches give the image vector; in the teacher, a patch's positives give its target."""

    def __init__(self, cfg):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, cfg.embed_dim) * 0.02)
        self.cls_blocks = nn.ModuleList(ClassAttention(cfg.embed_dim, cfg.num_heads)
                                        for _ in range(2))
        self.norm = nn.LayerNorm(cfg.embed_dim, 1e-6)
        init_linear(self.cls_blocks, cfg.init)

    def forward(self, y, positives=None, weights=None):
        """y: (B, N, D) of the last block; positives: (B, N, N) bool or None. Returns (B, 1+N, D):
        the image vector, then per patch the aggregate of its positives (None: the patch itself)."""
        n_queries, mask = 1, None
        if positives is not None:
            n_queries, mask = 1 + y.shape[1], F.pad(positives, (0, 0, 1, 0), value=True)
        z = self.cls_token.expand(len(y), n_queries, -1)
        for block in self.cls_blocks:
            z = block(z, y, mask, weights)
        return self.norm(z if positives is not None else torch.cat([z, y], 1))


def neighbor_mask(side, borders, device=None):
    """(N, N) bool: which patches of a square grid touch at a side or a corner."""
    distance = [(x[:, None] - x).abs() for x in positions.coordinates((side, side), device)]
    if borders == "official":                                                # they wrap around
        distance = [torch.minimum(d, side - d) for d in distance]
    return torch.maximum(*distance) == 1


def select_positives(y, neighbors, num_positives):
    """(B, N, N) bool: of the neighbors (N, N) of each patch the num_positives ones whose vectors y
    (B, N, D) have the largest cosine similarity to its own; all of them if there are fewer."""
    with torch.autocast(y.device.type, enabled=False):                       # bf16 would make ties
        y = F.normalize(y.float(), dim=-1)
        similarity = (y @ y.mT).masked_fill(~neighbors, -torch.inf)
    best = similarity.topk(min(num_positives, len(neighbors)), -1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter(2, best, True) & neighbors


class Network(nn.Module):
    """Backbone, aggregation and heads; the teacher has no drop path, and aggregates positives."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        more = dict(drop_path=0.0 if teacher else cfg.drop_path, final_norm=False)
        if cfg.backbone == "vit":
            self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                    cfg.num_heads, pos=cfg.pos, init=cfg.init, class_token=False,
                                    **more)
        else:
            self.backbone = swin.make_swin(cfg.backbone, cfg.img_size, **more)
        self.ca_head = Aggregation(cfg)
        self.c_head = QueryHead(cfg, teacher) if cfg.base == "moby" else Head(cfg, cfg.out_dim)
        self.p_head = Head(cfg, cfg.out_dim_selfpatch)
        self.is_teacher, self.num_positives, self.borders = teacher, cfg.num_positives, cfg.borders

    def forward(self, x, crops=None, drop=None, drop_crops=None):
        """x: (2B, 3, S, S); crops: (n_local*B, 3, S', S') or None; drop, drop_crops: their random
        numbers for drop path. Crops of the same size go through the backbone together.
        Returns logits of images ((2+n_local)*B, K), with --base moby queries or keys (2B, out_dim),
        and a list of logits of patches: (2B, N, K_patch) and, of local crops, (n_local*B, N,
        K_patch)."""
        tokens = [self.aggregate(self.backbone(x, drop=drop))]               # (2B, 1+N, D)
        if crops is not None:
            tokens.append(self.aggregate(self.backbone(crops, drop=drop_crops)))
        cls = torch.cat([z[:, 0] for z in tokens])                           # ((2+n_local)*B, D)
        return self.c_head(cls), [self.p_head(z[:, 1:]) for z in tokens]

    def aggregate(self, y, weights=None):
        if not self.is_teacher:
            return self.ca_head(y, weights=weights)
        neighbors = neighbor_mask(math.isqrt(y.shape[1]), self.borders, y.device)
        return self.ca_head(y, select_positives(y, neighbors, self.num_positives), weights)


def assign(t, center, tau):
    """Assignments to the prototypes: the teacher's logits t (..., K), centered and sharpened."""
    return ((t - center) / tau).softmax(-1)


def cls_loss(s, P, tau):
    """Cross-entropy across crops. s: (n_crops, B, K) logits of the student, global crops
    first; P: (2, B, K) of the teacher. Mean over images and the 2(n_crops-1) pairs v != g."""
    log_p = (s / tau).log_softmax(-1)
    log_p_sum = log_p.sum(0) - log_p[:2]     # (2, B, K), sum over v != g, once for each g
    return -(P * log_p_sum).sum(-1).mean() / (len(s) - 1)


def contrastive_loss(q, k, queue, tau):
    """InfoNCE of --base moby. q: (B, out_dim) of the student; k: (B, out_dim) of the teacher, of
    the other view; queue: (queue_size, out_dim), earlier keys of that view, L2-normalized."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    positive = (q * k).sum(-1, keepdim=True)                         # (B, 1)
    logits = torch.cat([positive, q @ queue.T], 1) / tau             # (B, 1 + queue_size)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def patch_loss(w, Q, tau):
    """Cross-entropy of patches. w, Q: the student's logits and the teacher's assignments, a tensor
    (2B or n_local*B, N, K_patch) per crop size. Mean over patches of a crop, then over crops."""
    losses = [-(q * (x / tau).log_softmax(-1)).sum(-1).mean(1) for x, q in zip(w, Q)]
    return torch.cat(losses).mean()


class Center(nn.Module):
    """Running mean of the teacher's raw logits, the rows of all processes together."""

    def __init__(self, K, momentum):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, K))

    def update(self, means):
        """means: (K,) per micro-batch. Once per step, after the loss, which uses the old center."""
        self.center.lerp_(all_mean(torch.stack(means).mean(0)), 1 - self.momentum)


class Queue(nn.Module):
    """The last `size` keys of each view, from all processes, the oldest first; initially random."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(2, size, dim), dim=-1))

    def append(self, k1, k2):
        """k1, k2: (batch_size, out_dim), keys of both views. Once per step, after the loss, which
        uses the old queue; as many of the oldest keys are dropped."""
        new = F.normalize(torch.stack([k1, k2]), dim=-1)
        self.keys = torch.cat([self.keys[:, len(k1):], new], 1)


# ---- Train ---------------------------------------------------------------------------------------


def schedules(step, total, per_epoch, cfg):
    """Values at this step of all settings that follow a schedule."""
    warmup, peak = round(cfg.warmup_epochs * per_epoch), cfg.lr * cfg.batch_size / 256
    lr = (peak * step / max(1, warmup - 1) if step < warmup else  # linspace(0, peak, warmup) (code)
          cosine(step - warmup, total - warmup, peak, cfg.min_lr))
    weight_decay = cosine(step, total, cfg.weight_decay, cfg.weight_decay_end)
    momentum = cosine(step, total, cfg.momentum_teacher, 1.0)
    epoch, last_warmup_epoch = step // per_epoch, cfg.warmup_teacher_temp_epochs - 1
    ramp = epoch / max(1, last_warmup_epoch) if epoch <= last_warmup_epoch else 1.0  # from 0 to 1
    temp = cfg.warmup_teacher_temp + ramp * (cfg.teacher_temp - cfg.warmup_teacher_temp)
    return lr, weight_decay, momentum, temp


def moby_lr(step, total, per_epoch, cfg):
    """Learning rate of MoBY: linear warmup, here from 0, then the rest of half a cosine that began
    at step 0."""
    warmup, peak = round(cfg.warmup_epochs * per_epoch), cfg.lr * cfg.batch_size / 256
    return peak * step / warmup if step < warmup else cosine(step, total, peak, cfg.min_lr)


def clip_per_tensor(parameters, max_norm):
    """Scales the gradient of each tensor to a norm of at most max_norm (official code); max_norm 0:
    no clipping. Returns the norm of all gradients together, before clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm:
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1)))
    return norms.norm()


def main():
    cfg = config.parse(Config)
    run, moby = Run(cfg), cfg.base == "moby"
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    run.init_encoder(unwrap(student).backbone)                               # with --init-from
    ema_update(teacher, student, 0.0)                                        # equal at the start
    if moby:
        queue = Queue(cfg.queue_size, cfg.out_dim).to(run.device)
    else:
        center = Center(cfg.out_dim, cfg.center_momentum).to(run.device)
    center_patch = Center(cfg.out_dim_selfpatch, cfg.center_momentum).to(run.device)
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, center_patch=center_patch, opt=opt,
                **(dict(queue=queue) if moby else dict(center=center)))
    total, freeze = run.total_steps(loader), round(cfg.freeze_last_layer * len(loader))
    fixed_batch = next(loader.batches()) if cfg.overfit_one_batch else None
    chance = 2 * math.log(1 + cfg.queue_size) if moby else math.log(cfg.out_dim)
    run.print0(f"loss of a uniform prediction: loss_cls "
               f"{'2 ln(1 + queue size)' if moby else 'ln K'} = {chance:.3f}, "
               f"loss_patch ln K_patch = {math.log(cfg.out_dim_selfpatch):.3f}")

    for step, batch in run.steps(loader):
        lr, weight_decay, momentum, temp = schedules(step, total, len(loader), cfg)
        if moby:
            lr = moby_lr(step, total, len(loader), cfg)
        set_lr(opt, lr)
        opt.param_groups[0]["weight_decay"] = weight_decay      # group 1 (vectors) has none

        # ---- the method ----------------------------------------------------------------------
        if moby:
            ema_update(teacher, student, momentum)                           # with the old weights
        means, stats = [], visualize.AssignmentStats()
        means_patch, stats_patch = [], visualize.AssignmentStats()
        for part in run.micro_batches(fixed_batch or batch):
            x = torch.cat(part.views[:2])                                    # (2B, 3, S, S)
            crops = torch.cat(part.views[2:]) if part.views[2:] else None  # (n_local*B, 3, S', S')
            drop = rng.uniform(part.index, (2 + cfg.local_crops_number, 2 * cfg.depth),
                               cfg.seed, part.epoch, "drop")   # two residual branches per block
            drop = drop.transpose(0, 1).flatten(0, 1)                # ((2+n_local)*B, 2*depth)

            with run.autocast():
                # The teacher, an average of past students, is better than any one of them, so its
                # output is a useful target. It also sees local crops: targets are of the same crop.
                with torch.no_grad():
                    t, u = teacher(x, crops)     # ((2+n_local)*B, K), [(2B, N, K_patch), ...]
                s, w = student(x, crops, drop[:len(x)], drop[len(x):])
            t = t.float().unflatten(0, (2 + cfg.local_crops_number, -1))     # fp32 from here on
            s = s.float().unflatten(0, (2 + cfg.local_crops_number, -1))
            u, w = [z.float() for z in u], [z.float() for z in w]
            if moby:
                loss_cls = (contrastive_loss(s[0], t[1], queue.keys[1], cfg.temperature) +
                            contrastive_loss(s[1], t[0], queue.keys[0], cfg.temperature))
            else:
                P = assign(t[:2], center.center, temp)           # of global crops only, as in DINO
                loss_cls = cls_loss(s, P, cfg.student_temp)
            Q = [assign(z, center_patch.center, temp) for z in u]
            loss_patch = patch_loss(w, Q, cfg.student_temp)
            loss = loss_cls + cfg.lambda_patch * loss_patch
            (loss / cfg.accum_iter).backward()

            means_patch.append(torch.cat([z.flatten(0, 1) for z in u]).mean(0))
            stats_patch.add(Q[0])                                            # of global crops
            run.log(loss=loss, loss_cls=loss_cls, loss_patch=loss_patch)
            if not moby:
                means.append(t.mean((0, 1)))                                 # DINO: of t[:2]
                stats.add(P)
                entropy = torch.special.entr(P).sum(-1).mean()
                run.log(entropy=entropy, kl=loss_cls - entropy)

        if moby:          # clip_grad_norm_ adds 1e-6 to the norm; 0: no clipping
            grad_norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip_grad or math.inf)
        else:
            grad_norm = clip_per_tensor(student.parameters(), cfg.clip_grad)
        if step < freeze:         # None, not 0: with gradient 0 AdamW still applies weight decay
            for name, p in student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        opt.step()
        opt.zero_grad()
        if moby:
            queue.append(*(all_gather(k) for k in t))                        # of the global batch
        else:
            ema_update(teacher, student, momentum)                           # with the new weights
            center.update(means)
        center_patch.update(means_patch)
        # ---- bookkeeping ---------------------------------------------------------------------

        entropy_patch, mi_patch = stats_patch.compute()
        if not moby:
            entropy, mi = stats.compute()
            run.log(mi=mi)
        run.log(entropy_patch=entropy_patch, mi_patch=mi_patch, lr=lr, grad_norm=grad_norm)
        net = unwrap(student) if moby else teacher                           # the one to evaluate
        interpolation = "bilinear" if moby else "bicubic"                    # in evaluation
        if run.eval_due:
            found = visualize.evaluate(run, net.backbone, bank, queries, interpolation)
            run.log(**found)
            with run.evaluation(net):
                maps = []
                with run.autocast():
                    net.aggregate(net.backbone(part.views[0][:8]), maps)
                assignments = () if moby else (P[0], (s[1] / cfg.student_temp).softmax(-1))
                visualize.save_self_distillation(
                    run, part.views, maps[-1][:, :, 0], *assignments,
                    extra=patch_columns(run, u[0], w[0], center_patch, min(8, len(part.index))))
            if moby:
                visualize.warn_of_equal_tokens(run, found.get("feat_std", 1), "loss_cls", loss_cls,
                                               chance)
            else:
                visualize.warn_of_equal_assignments(run, "images", entropy, mi, cfg.out_dim)
            visualize.warn_of_equal_assignments(run, "patches", entropy_patch, mi_patch,
                                                cfg.out_dim_selfpatch)
        if run.save_due:
            heads = dict(ca_head=net.ca_head, p_head=net.p_head, **(
                dict(net.c_head.named_children()) if moby else dict(c_head=net.c_head)))
            run.save_encoder(net.backbone, branch="base" if moby else "teacher",
                             interpolation=interpolation,
                             heads={name: head.state_dict() for name, head in heads.items()})
            run.save()


def patch_columns(run, u, w, center, n):
    """Columns of visualization.png: prototype (a color) of each patch of the first crop, n images.
    Teacher: from u (2B, N, K_patch), of the patch's positives; student: from w, of the patch."""
    columns, side = {}, math.isqrt(u.shape[1])
    for title, logits in {"teacher": u[:n] - center.center, "student": w[:n]}.items():
        ids = logits.argmax(-1).unflatten(1, (side, side))                   # (n, side, side)
        columns[title] = visualize.prototype_map(ids, run.cfg.img_size)
    return columns


if __name__ == "__main__":
    config.main(main)
