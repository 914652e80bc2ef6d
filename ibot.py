"""iBOT: image BERT pretraining with an online tokenizer (Zhou et al., 2022, arXiv 2111.07832).

DINO with a second task, on patches. Some patches of the student's global crops are masked, that is,
replaced by a learned mask token; the teacher sees these crops unmasked. For each masked patch the
student must predict the teacher's assignment of that patch to the prototypes. This is BEiT's task,
but the tokenizer is the teacher, learned at the same time ("online"), and its tokens are soft. They
get their semantics from the first task, DINO's: equal assignments for all crops of an image. Both
tasks share one head.

    2 global crops -+-> teacher* -+> class ---> head* -> t -> softmax((t - c) / tau_t)   = P
                    |             +> patches -> head* -> u -> softmax((u - c_p) / tau_p) = Q
                    |                                                  | cross-entropy: P with s of
                    |                                                  | crops v != g; Q with w of
                    |                                                  | the same patch, if masked
                    +-> mask --> student -+> class ---> head -> s -> softmax(s / tau_s)
                                          +> patches -> head -> w -> softmax(w / tau_s)
    local crops, unmasked -----> student --> class ---> head -> s -> softmax(s / tau_s)
              * exponential moving average of the student's weights; no gradient

    L       = lambda1 L_cls + lambda2 L_patch,   lambda1 = lambda2 = 1
    L_cls   = 1/n sum over global g, sum over all crops v != g of                        (eq. 2)
              - sum over k of P_g[k] log softmax(s_v / tau_s)[k],   n = 2 (1 + n_local)
    L_patch = mean over global crops of: mean over their masked patches i of
              - sum over k of Q_i[k] log softmax(w_i / tau_s)[k],   0 if none is masked  (eq. 3)
    c   <- m_c c   + (1 - m_c) mean of t over the global crops, after the step
    c_p <- m_c c_p + (1 - m_c) mean of u over *all* patches of these, masked or not

The paper (Table 1; ImageNet, teacher, kNN / linear): ViT-S/16 75.2 / 77.9 after 800 epochs
(DINO: 74.5 / 77.0), ViT-B/16 77.1 / 79.5 after 400. The defaults are the authors' command for the
former; their script's own defaults are not the paper's (no local crops, unshared student head).

Short runs on toy and CIFAR-10 need batch norms in the head (--use-bn-in-head): at first the logits
of different images are nearly the same. The center removes what they have in common, the remainder
is too small to be sharpened: loss_cls stays at ln K, loss_patch at mask_prob ln K (uniform guess).

From DINO's official code, not its paper: the division by n, the gradient clipped tensor by tensor,
and the last layer frozen in the first epoch. Ours: random numbers derived per image (lib/rng.py).
As in the official code, we average first over the masked patches of a crop, then over all crops; a
crop without a mask (about half of them) counts as 0. Patches have their own center, c_p. Ours:
- Masks are made for the whole batch at once. Logits are computed for masked patches only. The mean
  logits of all patches, for c_p, come from the mean input of the last layer, which is linear.
- Batch norms normalize class tokens and patches separately and keep running statistics of class
  tokens only; the script normalizes both together and reuses one batch norm module in two layers.
Left out: the option to start masking at a later epoch (official code, used for Swin).

    python ibot.py     toy (configs/ibot.yaml): minutes on a laptop, offline, no local crops
    python ibot.py --mask-prob 0   same as dino.py if all shared settings are equal
    torchrun --nnodes=2 --nproc_per_node=8 ibot.py --data imagenet    the defaults (not run by us)
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
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import BatchNorm, all_mean, unwrap
from lib.run import Run, cosine, ema_update, param_groups, set_lr
from lib.weights import init_linear

# B images per process and micro-batch, 2 + n_local crops of each, D width, K prototypes, S and S'
# sides of a global and a local crop; tau_t, tau_s: --teacher-temp, --student-temp
# N patches of a global crop, n_masked masked ones in all global crops; tau_p: --teacher-patch-temp
# teacher's logits t (class tokens) and u (patches), assignments P and Q; student's logits s and w


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/ibot.yaml overrides them per data set (default: toy)."""
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
    out_dim: Several = 8192         # K prototypes (paper); fewer images: 1024 to 4096
    use_bn_in_head: bool = False    # batch norms in the head (code: option); few images: true
    norm_last_layer: bool = False   # keeps prototypes at norm 1 (code; ViT-B: True, for stability)
    shared_head: bool = True        # patches share the prototypes (paper); false: separate ones, in
                                    # student and teacher (in the script the teacher still shares)
    # the objective
    lambda1: float = 1.0            # weight of L_cls (paper)
    lambda2: float = 1.0            # weight of L_patch (paper)
    student_temp: Positive = 0.1    # softmax temperature of the student (paper)
    warmup_teacher_temp: Positive = 0.04   # initial teacher temperature (code); lower if loss_cls
                                           # stays at ln K; used if --warmup-teacher-temp-epochs > 0
    teacher_temp: Positive = 0.07   # teacher temperature after warmup (code); higher is unstable
    teacher_patch_temp: Positive = 0.07    # teacher temperature for patches after warmup (code)
    warmup_teacher_temp_epochs: int = 30   # epochs of linear temperature warmup (code; ViT-B: 50)
    center_momentum: Fraction = 0.9 # EMA momentum of centers (paper)
    freeze_last_layer: float = 1.0  # epochs in which the last layer is frozen (code; ViT-B: 3)
    # the mask
    mask_prob: Fraction = 0.5       # fraction of masked global crops (code: draws ratio 0 or 0.3)
    pred_ratio: Fraction = 0.3      # mean masked fraction of a crop with a mask (code; rand: 0.7)
    pred_ratio_var: Fraction = 0.2  # half-width: uniform in pred_ratio +- this (code; rand: 0.05)
    pred_shape: Literal["block", "rand"] = "block"    # rectangles as in BEiT, or single patches
                                                      # (code: block for ViT-S, both for ViT-B/L)
    # the views
    global_crops_scale: tuple = (0.25, 1.0)   # global crop area (code; ViT-B: 0.32 to 1;
                                              # without local crops, code: 0.14 to 1)
    local_crops_scale: tuple = (0.05, 0.25)   # local crop area (paper; ViT-B: up to 0.32)
    local_crops_number: int = 10    # local crops per image, n_local (paper)
    local_crops_size: Size = 96     # side of a local crop in pixels (paper)
    color_jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (code)
    blur_p: Fraction = 1.0          # blur probability, crop 1; crop 2: a tenth, local: half (code)
    # the optimization
    epochs: Positive = 800          # training epochs (paper; ViT-B: 400)
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
        if self.pred_ratio < self.pred_ratio_var or self.pred_ratio + self.pred_ratio_var > 1:
            raise ValueError("--pred-ratio minus and plus --pred-ratio-var must be fractions from "
                             "0 to 1: the fraction of masked patches is uniform between them")
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


def sample_masks(index, cfg, *key):
    """Masks of both global crops of the images `index` (B,): (2B, N) bool, True: masked. The first
    crops of all images come first. Ratio and mask are sampled independently for each crop."""
    def uniform(shape, purpose):                                             # (2B, *shape)
        return rng.uniform(index, (2, *shape), *key, purpose).transpose(0, 1).flatten(0, 1)

    side, u = cfg.img_size // cfg.patch_size, uniform((2,), "ratio")
    low, high = cfg.pred_ratio - cfg.pred_ratio_var, cfg.pred_ratio + cfg.pred_ratio_var
    ratio = low + u[:, 1] * (high - low)
    target = torch.where(u[:, 0] < cfg.mask_prob, ratio, 0) * side**2        # (2B,) patches
    if cfg.pred_shape == "rand":
        rank = uniform((side**2,), "order").argsort(dim=1, stable=True).argsort(1)
        return rank < target.long()[:, None]
    # 48 attempts suffice for ratios up to 0.5; above that, more would enlarge some masks
    return block_masks(uniform((48, 4), "blocks"), target, side).flatten(1)


def block_mask(u, target, side):
    """BEiT's block-wise mask of one crop: adds rectangles, each covering at least one new patch, up
    to `target` patches in total; stops when ten in a row do not fit. u: (n_rectangles, 4) uniform
    random numbers. Returns (side, side) bool. Not called: the readable form of block_masks."""
    mask, smallest, misses = torch.zeros(side, side, dtype=torch.bool), (side // 3)**2, 0
    for area, aspect, top, left in u.tolist():
        room = target - int(mask.sum())                  # patches
        area = smallest + area * (room - smallest)       # uniform between smallest and room
        aspect = 0.3 ** (1 - 2 * aspect)                 # height / width: log-uniform, 0.3 to 1/0.3
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = int(top * (side - h + 1)), int(left * (side - w + 1))
        grown = mask.clone()
        grown[top:top + h, left:left + w] = True
        fits = h < side and w < side and 0 < grown.sum() - mask.sum() <= room
        mask, misses = (grown, 0) if fits else (mask, misses + 1)
        if misses == 10:
            break
    return mask


def block_masks(u, target, side):
    """block_mask of n crops at once. u: (n, n_rectangles, 4), target: (n,). Returns (n, side, side)
    bool."""
    mask = torch.zeros(len(u), side, side, dtype=torch.bool, device=u.device)
    room, misses, index = target, torch.zeros_like(target), torch.arange(side, device=u.device)
    smallest, log_aspect = (side // 3)**2, math.log(1 / 0.3)   # log_aspect: of the largest ratio

    def span(length, start):                             # rows or columns of rectangles: (n, side)
        start = (start * (side - length + 1)).floor()[:, None]
        return (index >= start) & (index < start + length[:, None])

    for area, aspect, top, left in u.permute(1, 2, 0):                       # each (n,)
        area, aspect = smallest + area * (room - smallest), ((2 * aspect - 1) * log_aspect).exp()
        h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        new = span(h, top)[:, :, None] & span(w, left)[:, None] & ~mask      # (n, side, side)
        count = new.sum((1, 2))
        fits = (h < side) & (w < side) & (count > 0) & (count <= room) & (misses < 10)
        mask |= new & fits[:, None, None]
        room = room - count * fits
        misses = torch.where(fits, 0, misses + 1)        # stays at 10 or more: nothing fits then
    return mask


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
        self.last_layer2 = (None if cfg.shared_head else                     # for patches
                            Prototypes(cfg.bottleneck_dim, K, cfg.norm_last_layer))
        init_linear(self.mlp, cfg.init)

    def forward(self, x):
        return self.last_layer(self.project(x))

    def project(self, x):
        return F.normalize(self.mlp(x), dim=-1)

    def project_patches(self, x):
        """project() of patches: batch norms use the statistics of x, also in eval mode, and do not
        change the running statistics. The running statistics are those of class tokens, the only
        tokens that go through the saved head after training."""
        copies = {name: buffer.clone() for name, buffer in self.mlp.named_buffers()}
        z = torch.func.functional_call(self.mlp.train(), copies, x)
        self.mlp.train(self.training)
        return F.normalize(z, dim=-1)

    def patch_logits(self, z):
        return (self.last_layer2 or self.last_layer)(z)


class Network(nn.Module):
    """Backbone, mask token and head; the teacher has neither drop path nor mask token."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                cfg.num_heads, pos=cfg.pos, init=cfg.init,
                                drop_path=0.0 if teacher else cfg.drop_path)
        self.head = Head(cfg, cfg.out_dim)
        self.use_bn = cfg.use_bn_in_head
        self.masked_embed = None if teacher else nn.Parameter(torch.zeros(1, cfg.embed_dim))

    def forward(self, x, mask, crops=None, drop=None, drop_crops=None):
        """x: (2B, 3, S, S); crops: (n_local*B, 3, S', S') or None; drop, drop_crops: their random
        numbers for drop path. Crops of the same size go through the backbone together.
        mask: (2B, N) bool. Returns logits of class tokens ((2+n_local)*B, K) and of masked patches
        (n_masked, K); the teacher also returns the mean logits of all patches (K,)."""
        student = self.masked_embed is not None
        tokens = self.backbone(x, mask=mask if student else None, mask_token=self.masked_embed,
                               drop=drop)    # the mask token, (1, D) as in the code, is broadcast
        cls, patches = self.backbone.split(tokens)                           # (2B, D), (2B, N, D)
        if crops is not None:
            local, _ = self.backbone.split(self.backbone(crops, drop=drop_crops))
            cls = torch.cat([cls, local])                                    # ((2+n_local)*B, D)
        if student:
            # Batch norms get all patches: they need equally many rows in all processes.
            z = (self.head.project_patches(patches)[mask] if self.use_bn
                 else self.head.project(patches[mask]))
            return self.head(cls), self.head.patch_logits(z)
        z = self.head.project_patches(patches)                       # (2B, N, bottleneck_dim)
        u_mean = self.head.patch_logits(z.mean((0, 1)))              # the last layer is linear
        return self.head(cls), self.head.patch_logits(z[mask]), u_mean


def assign(t, center, tau):
    """Assignments to the prototypes: the teacher's logits t (..., K), centered and sharpened."""
    return ((t - center) / tau).softmax(-1)


def cls_loss(s, P, tau):
    """Cross-entropy across crops. s: (n_crops, B, K) logits of the student, global crops
    first; P: (2, B, K) of the teacher. Mean over images and the 2(n_crops-1) pairs v != g."""
    log_p = (s / tau).log_softmax(-1)
    log_p_sum = log_p.sum(0) - log_p[:2]     # (2, B, K), sum over v != g, once for each g
    return -(P * log_p_sum).sum(-1).mean() / (len(s) - 1)


def patch_loss(w, Q, mask, tau):
    """Cross-entropy of masked patches (eq. 3). w, Q: (n_masked, K) logits of the student and
    assignments of the teacher; mask: (2B, N). Mean over the masked patches of a crop, then over
    all crops; a crop without masked patches counts as 0."""
    weight = mask.to(w) / mask.sum(1, keepdim=True).clamp(min=1)     # (2B, N): 1/masked of the crop
    return -((Q * (w / tau).log_softmax(-1)).sum(-1) * weight[mask]).sum() / len(mask)


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
    patch_temp = cfg.warmup_teacher_temp + ramp * (cfg.teacher_patch_temp - cfg.warmup_teacher_temp)
    return lr, weight_decay, momentum, temp, patch_temp


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
    center_patch = Center(cfg.out_dim, cfg.center_momentum).to(run.device)
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, center=center, center_patch=center_patch, opt=opt)
    total, freeze = run.total_steps(loader), round(cfg.freeze_last_layer * len(loader))
    fixed_batch = next(loader.batches()) if cfg.overfit_one_batch else None
    run.print0(f"loss of a uniform prediction: loss_cls ln K = {math.log(cfg.out_dim):.3f}, "
               f"loss_patch {cfg.mask_prob * math.log(cfg.out_dim):.3f}; unmasked crops count as 0")

    for step, batch in run.steps(loader):
        lr, weight_decay, momentum, temp, patch_temp = schedules(step, total, len(loader), cfg)
        set_lr(opt, lr)
        opt.param_groups[0]["weight_decay"] = weight_decay      # group 1 (vectors) has none

        # ---- the method ----------------------------------------------------------------------
        means, stats = [], visualize.AssignmentStats()
        means_patch, stats_patch = [], visualize.AssignmentStats()
        for part in run.micro_batches(fixed_batch or batch):
            x = torch.cat(part.views[:2])                                    # (2B, 3, S, S)
            crops = torch.cat(part.views[2:]) if part.views[2:] else None  # (n_local*B, 3, S', S')
            drop = rng.uniform(part.index, (2 + cfg.local_crops_number, 2 * cfg.depth),
                               cfg.seed, part.epoch, "drop")   # two residual branches per block
            drop = drop.transpose(0, 1).flatten(0, 1)                # ((2+n_local)*B, 2*depth)
            mask = sample_masks(part.index, cfg, cfg.seed, part.epoch)       # (2B, N)

            with run.autocast():
                # The teacher, an average of past students, is better than any one of them, so its
                # output is a useful target. It sees no local crop: targets describe the whole.
                # It sees no mask either: targets depend on the patch, which the student must infer.
                with torch.no_grad():
                    t, u, u_mean = teacher(x, mask)          # (2B, K), (n_masked, K), (K,)
                s, w = student(x, mask, crops, drop[:len(x)], drop[len(x):])
            t = t.float().unflatten(0, (2, -1))                              # fp32 from here on
            s = s.float().unflatten(0, (2 + cfg.local_crops_number, -1))
            u, w = u.float(), w.float()                                      # (n_masked, K)
            P = assign(t, center.center, temp)
            Q = assign(u, center_patch.center, patch_temp)
            loss_cls = cls_loss(s, P, cfg.student_temp)
            loss_patch = patch_loss(w, Q, mask, cfg.student_temp)
            loss = cfg.lambda1 * loss_cls + cfg.lambda2 * loss_patch
            (loss / cfg.accum_iter).backward()

            means.append(t.mean((0, 1)))
            stats.add(P)
            means_patch.append(u_mean.float())
            stats_patch.add(Q)
            entropy = torch.special.entr(P).sum(-1).mean()
            run.log(loss=loss, loss_cls=loss_cls, loss_patch=loss_patch, entropy=entropy,
                    kl=loss_cls - entropy)

        grad_norm = clip_per_tensor(student.parameters(), cfg.clip_grad)
        if step < freeze:         # None, not 0: with gradient 0 AdamW still applies weight decay
            for name, p in student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        opt.step()
        opt.zero_grad()
        ema_update(teacher, student, momentum)                               # with the new weights
        center.update(means)
        center_patch.update(means_patch)
        # ---- bookkeeping ---------------------------------------------------------------------

        entropy, mi = stats.compute()
        entropy_patch, mi_patch = stats_patch.compute()
        run.log(mi=mi, entropy_patch=entropy_patch, mi_patch=mi_patch, lr=lr, grad_norm=grad_norm)
        if run.eval_due:
            run.log(**visualize.evaluate(run, teacher.backbone, bank, queries))
            with run.evaluation(teacher):
                attention = visualize.last_attention(run, teacher.backbone, part.views[0][:8])
                visualize.save_self_distillation(
                    run, part.views, attention, P[0], (s[1] / cfg.student_temp).softmax(-1),
                    patch_columns(run, teacher, part.views[0][:8], mask[:len(part.index)][:8], w,
                                  center_patch))
            visualize.warn_of_equal_assignments(run, "images", entropy, mi, cfg.out_dim)
            if len(Q):                                       # without masks no assignments
                visualize.warn_of_equal_assignments(run, "patches", entropy_patch, mi_patch,
                                                    cfg.out_dim)
        if run.save_due:
            run.save_encoder(teacher.backbone, branch="teacher",
                             heads={"head": teacher.head.state_dict()})
            run.save()


def patch_columns(run, teacher, x, mask, w, center):
    """Columns of visualization.png: crops x (n, 3, S, S), masked patches in gray; the prototype (a
    color) to which the teacher assigns each patch, and the student each masked one.
    mask: (n, N); w: student's logits of masked patches, those of x first; center: c_p."""
    with run.autocast():
        _, u, _ = teacher(x, torch.ones_like(mask))                          # of all patches
    size, side = x.shape[3], math.isqrt(mask.shape[1])
    masked = mask.unflatten(1, (side, side))                                 # (n, side, side)
    pixel_mask = F.interpolate(masked[:, None].float(), size).bool()
    teacher_ids = (u.float() - center.center).argmax(-1).view_as(masked)
    student_ids = torch.full_like(teacher_ids, -1).masked_scatter(masked, w.argmax(-1))
    return {"masked": augment.denormalize(x * ~pixel_mask),
            "teacher": visualize.prototype_map(teacher_ids, size),
            "student": visualize.prototype_map(student_ids, size)}           # -1: not masked


if __name__ == "__main__":
    config.main(main)
