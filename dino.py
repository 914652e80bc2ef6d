"""DINO: self-distillation with no labels (Caron et al., 2021, arXiv 2104.14294).

Two networks of the same architecture see crops of an image and assign each crop to K unnamed
classes ("prototypes"). The student learns to predict the teacher's assignment of a different crop;
the teacher is the moving average of the student and gets no gradient. The teacher sees only large
crops; the student also sees small ones, so it must predict the assignment of the whole from a part.

So far nothing forbids the same assignment for every image. Two opposed operations on the teacher's
output do: centering (subtract a running mean of the logits, eq. 4) keeps one prototype from
dominating, sharpening (a low temperature) keeps the assignment from being uniform.

    2 global crops -+-> teacher* -> class -> head* -> t -> softmax((t - c) / tau_t) = P
                    |                                 |                             | cross-entropy,
                    |                                 +-> c, after the step         | crop v != g
                    +-> student -+> class -> head --> s -> softmax(s / tau_s) ------+
    local crops ------> student -+
              * exponential moving average of the student's weights; no gradient

    L       = 1/n sum over global g, sum over all crops v != g of                     (eq. 2, 3)
              - sum over k of P_g[k] log softmax(s_v / tau_s)[k],   n = 2 (1 + n_local)
    c   <- m_c c   + (1 - m_c) mean of t over the global crops, after the step

The paper (Table 2; ImageNet, teacher, kNN / linear): ViT-S/16 74.5 / 77.0 after 800 epochs,
ViT-B/16 76.1 / 78.2 after 400. The defaults are the authors' recipe of 300 epochs: 73.3 / 76.0.

Short runs on toy and CIFAR-10 need batch norms in the head (--use-bn-in-head): at first the logits
of different images are nearly the same. The center removes what they have in common, the remainder
is too small to be sharpened, and the loss stays at ln K, that of a uniform guess.

From DINO's official code, not its paper: the division by n, the gradient clipped tensor by tensor,
and the last layer frozen in the first epoch. Ours: random numbers derived per image (lib/rng.py).

    python dino.py     toy (configs/dino.yaml): minutes on a laptop, offline, no local crops
    python dino.py --overfit-one-batch --steps 200   loss far below ln K, while mi stays high
                       (mi: mutual information of image and prototype; 0: collapsed)
    torchrun --nnodes=2 --nproc_per_node=8 dino.py --data imagenet    the defaults (not run by us)
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import config, rng, visualize
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import BatchNorm, all_mean, unwrap
from lib.run import Run, cosine, ema_update, param_groups, set_lr
from lib.weights import init_linear

# B images per process and micro-batch, 2 + n_local crops of each, D width, K prototypes, S and S'
# sides of a global and a local crop; tau_t, tau_s: --teacher-temp, --student-temp


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/dino.yaml overrides them per data set (default: toy)."""
    # the network (paper: ViT-S/16)
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
    head_hidden_dim: Size = 2048    # width inside the head (paper)
    bottleneck_dim: Size = 256      # width before the prototypes, L2-normalized (paper)
    out_dim: Several = 65536        # K prototypes (paper); fewer images: 1024 to 8192
    use_bn_in_head: bool = False    # batch norms in the head (code: option); few images: true
    norm_last_layer: bool = False   # keeps prototypes at norm 1 (code; ViT-B: True, for stability)
    # the objective
    student_temp: Positive = 0.1    # softmax temperature of the student (paper)
    warmup_teacher_temp: Positive = 0.04   # initial teacher temperature (paper); lower if the loss
                                           # stays at ln K; used if --warmup-teacher-temp-epochs > 0
    teacher_temp: Positive = 0.07   # teacher temperature after warmup (paper); higher is unstable
    warmup_teacher_temp_epochs: int = 30   # epochs of linear temperature warmup (paper)
    center_momentum: Fraction = 0.9 # EMA momentum of centers (paper)
    freeze_last_layer: float = 1.0  # epochs in which the last layer is frozen (code; ViT-B: 3)
    # the views
    global_crops_scale: tuple = (0.4, 1.0)   # global crop area (paper; released weights: 0.25 to 1;
                                              # without local crops, code: 0.14 to 1)
    local_crops_scale: tuple = (0.05, 0.4)    # local crop area (paper; released weights: to 0.25)
    local_crops_number: int = 8     # local crops per image, n_local (code; released weights: 10)
    local_crops_size: Size = 96     # side of a local crop in pixels (paper)
    color_jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (code)
    blur_p: Fraction = 1.0          # blur probability, crop 1; crop 2: a tenth, local: half (code)
    # the optimization
    epochs: Positive = 300          # training epochs (code; the paper's best: 800)
    warmup_epochs: float = 10.0     # linear warmup of the learning rate from 0 (paper)
    batch_size: Size = 1024         # global batch size (paper)
    lr: float = 5e-4                # base learning rate; the peak is lr * batch/256 (paper)
    min_lr: float = 1e-6            # final learning rate of the cosine (code)
    weight_decay: float = 0.04      # AdamW weight decay (paper); not for biases, norm layers (code)
    weight_decay_end: float = 0.4   # weight decay increases to this by a cosine (paper)
    clip_grad: float = 3.0          # max gradient norm of each tensor (code; ViT-B: 0.3); 0: off
    momentum_teacher: Fraction = 0.996     # teacher's EMA momentum, rises to 1 by a cosine (paper)
    overfit_one_batch: bool = False # train on the first batch only, as a check; on large data sets
                                    # add --warmup-epochs 0 --freeze-last-layer 0

    def __post_init__(self):
        config.check_bounds(self)
        if self.local_crops_number and self.local_crops_size % self.patch_size:
            raise ValueError("--local-crops-size must be a multiple of --patch-size")
        if self.use_bn_in_head and self.accum_iter > 1:
            raise ValueError("--use-bn-in-head normalizes over the batch: micro-batches would "
                             "change the result; use --accum-iter 1 or --use-bn-in-head false")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Two global crops, blurred and solarized with BYOL's unequal probabilities, and local ones."""
    color = dict(jitter=cfg.color_jitter, jitter_p=0.8, gray_p=0.2)
    crop = dict(size=cfg.img_size, scale=cfg.global_crops_scale, **color)
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


class Network(nn.Module):
    """Backbone and head; the teacher has no drop path."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                cfg.num_heads, pos=cfg.pos, init=cfg.init,
                                drop_path=0.0 if teacher else cfg.drop_path)
        self.head = Head(cfg, cfg.out_dim)

    def forward(self, x, crops=None, drop=None, drop_crops=None):
        """x: (2B, 3, S, S); crops: (n_local*B, 3, S', S') or None; drop, drop_crops: their random
        numbers for drop path. Crops of the same size go through the backbone together.
        Returns logits ((2+n_local)*B, K)."""
        cls, _ = self.backbone.split(self.backbone(x, drop=drop))            # (2B, D)
        if crops is not None:
            local, _ = self.backbone.split(self.backbone(crops, drop=drop_crops))
            cls = torch.cat([cls, local])                                    # ((2+n_local)*B, D)
        return self.head(cls)


def assign(t, center, tau):
    """Assignments to the prototypes: the teacher's logits t (..., K), centered and sharpened."""
    return ((t - center) / tau).softmax(-1)


def cls_loss(s, P, tau):
    """Cross-entropy across crops. s: (n_crops, B, K) logits of the student, global crops
    first; P: (2, B, K) of the teacher. Mean over images and the 2(n_crops-1) pairs v != g."""
    log_p = (s / tau).log_softmax(-1)
    log_p_sum = log_p.sum(0) - log_p[:2]     # (2, B, K), sum over v != g, once for each g
    return -(P * log_p_sum).sum(-1).mean() / (len(s) - 1)


class Center(nn.Module):
    """Running mean of the teacher's raw logits, the rows of all processes together."""

    def __init__(self, K, momentum):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, K))

    def update(self, means):
        """means: (K,) per micro-batch. Once per step, after the loss, which uses the old center."""
        self.center.lerp_(all_mean(torch.stack(means).mean(0)), 1 - self.momentum)


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
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    run.init_encoder(unwrap(student).backbone)                               # with --init-from
    ema_update(teacher, student, 0.0)                                        # equal at the start
    center = Center(cfg.out_dim, cfg.center_momentum).to(run.device)
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, center=center, opt=opt)
    total, freeze = run.total_steps(loader), round(cfg.freeze_last_layer * len(loader))
    fixed_batch = next(loader.batches()) if cfg.overfit_one_batch else None
    run.print0(f"loss of a uniform prediction: ln K = {math.log(cfg.out_dim):.3f}")

    for step, batch in run.steps(loader):
        lr, weight_decay, momentum, temp = schedules(step, total, len(loader), cfg)
        set_lr(opt, lr)
        opt.param_groups[0]["weight_decay"] = weight_decay      # group 1 (vectors) has none

        # ---- the method ----------------------------------------------------------------------
        means, stats = [], visualize.AssignmentStats()
        for part in run.micro_batches(fixed_batch or batch):
            x = torch.cat(part.views[:2])                                    # (2B, 3, S, S)
            crops = torch.cat(part.views[2:]) if part.views[2:] else None  # (n_local*B, 3, S', S')
            drop = rng.uniform(part.index, (2 + cfg.local_crops_number, 2 * cfg.depth),
                               cfg.seed, part.epoch, "drop")   # two residual branches per block
            drop = drop.transpose(0, 1).flatten(0, 1)                # ((2+n_local)*B, 2*depth)

            with run.autocast():
                # The teacher, an average of past students, is better than any one of them, so its
                # output is a useful target. It sees no local crop: targets describe the whole.
                with torch.no_grad():
                    t = teacher(x)                                           # (2B, K)
                s = student(x, crops, drop[:len(x)], drop[len(x):])          # ((2+n_local)*B, K)
            t = t.float().unflatten(0, (2, -1))                              # fp32 from here on
            s = s.float().unflatten(0, (2 + cfg.local_crops_number, -1))
            P = assign(t, center.center, temp)
            loss = cls_loss(s, P, cfg.student_temp)
            (loss / cfg.accum_iter).backward()

            means.append(t.mean((0, 1)))
            stats.add(P)
            entropy = torch.special.entr(P).sum(-1).mean()
            run.log(loss=loss, entropy=entropy, kl=loss - entropy)

        grad_norm = clip_per_tensor(student.parameters(), cfg.clip_grad)
        if step < freeze:         # None, not 0: with gradient 0 AdamW still applies weight decay
            for name, p in student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        opt.step()
        opt.zero_grad()
        ema_update(teacher, student, momentum)                               # with the new weights
        center.update(means)
        # ---- bookkeeping ---------------------------------------------------------------------

        entropy, mi = stats.compute()
        run.log(mi=mi, lr=lr, grad_norm=grad_norm)
        if run.eval_due:
            run.log(**visualize.evaluate(run, teacher.backbone, bank, queries))
            with run.evaluation(teacher):
                attention = visualize.last_attention(run, teacher.backbone, part.views[0][:8])
                visualize.save_self_distillation(
                    run, part.views, attention, P[0], (s[1] / cfg.student_temp).softmax(-1))
            visualize.warn_of_equal_assignments(run, "images", entropy, mi, cfg.out_dim)
        if run.save_due:
            run.save_encoder(teacher.backbone, branch="teacher",
                             heads={"head": teacher.head.state_dict()})
            run.save()


if __name__ == "__main__":
    config.main(main)
