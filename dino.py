"""DINO: self-distillation with no labels (Caron et al., 2021, arXiv 2104.14294).

Two networks of one architecture look at different crops of an image and sort it into K nameless
classes ("prototypes"). The student learns to predict the teacher's assignment; the teacher is the
moving average of the student and never sees a gradient. Only large crops go to the teacher, small
ones too to the student: from a part it must tell what the whole would be called.

Nothing so far forbids one answer for everything. Two opposed forces on the teacher's output do:
centring (subtract a running mean of the logits) lets no prototype win everywhere, sharpening (a
low temperature) keeps the answer from being uniform.

    2 global crops -+-> teacher* -> class -> head* -> t -> softmax((t - c) / tau_t) = P
                    |                                 |                             | cross-entropy,
                    |                                 +-> c <- 0.9 c + 0.1 mean t   | crop v != g
                    +-> student -+> class -> head --> s -> softmax(s / tau_s) ------+
    L local crops ----> student -+
              * exponential moving average of the student's weights; no gradient

    L = 1/n sum over global g, sum over all crops v != g of
        - sum over k of P_g[k] log softmax(s_v / tau_s)[k],   n = 2 (1 + L)           (eq. 2, 3)
    c <- m_c c + (1 - m_c) mean of t over the global crops of the batch                  (eq. 4)

The paper (Table 2; ImageNet, teacher, kNN / linear): ViT-S/16 74.5 / 77.0 after 800 epochs,
ViT-B/16 76.1 / 78.2 after 400. The defaults are the authors' recipe of 300 epochs: 73.3 / 76.0.

Small data needs batch norms in the head, an option of the code (--bn-in-head): at first the logits
of different images are nearly the same, the centre takes away what they share, and what is left is
too little to sharpen, so that the loss stays at ln K.

From the official code, not the paper: the division by n, the gradient clipped tensor by tensor, and
the last layer that stands still in the first epoch. Ours: the sum over pairs is taken inside, as
P_g . (sum_v log S_v - log S_g), two products instead of n; randomness is derived (rng.py).

    python dino.py                                         minutes on a laptop, offline
    python dino.py --overfit-one-batch --steps 200         does it learn at all? loss far below ln K
    torchrun --nproc_per_node=16 dino.py --data imagenet   the recipe above (not run by us)
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

# B images of a process, V = 2 + L crops of each, 2 global and L local, N patches, D width, K
# prototypes; t, s: logits of teacher and student, P: assignments of the teacher


@dataclass
class Config:
    # the network (paper, Table 1 and appendix C: ViT-S/16)
    img_size: int = 224           # pixels, side of a global crop (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 384          # width of the backbone (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 6            # attention heads (paper)
    pos: str = "learned"          # positions: learned (paper) or sincos_row (our choice)
    init: str = "trunc"           # weights: trunc (normal 0.02: code) or moco (Xavier: our choice)
    drop_path: float = 0.1        # stochastic depth, student only (code)
    hidden: int = 2048            # width inside the head (paper)
    bottleneck: int = 256         # width before the prototypes, where length becomes 1 (paper)
    out_dim: int = 65536          # K (paper); small data: 1024-8192, or the loss stays at ln K
    bn_in_head: bool = False      # batch norms in the head (code: an option); small data needs them
    norm_last_layer: bool = False # prototypes stay at length 1 (code; ViT-B: True, for stability)
    # the objective
    tau_student: float = 0.1      # temperature (paper)
    tau_start: float = 0.04       # teacher's temperature at first (paper); lower if stuck at ln K
    tau_end: float = 0.07         # ... and after its warm-up (paper); higher is unstable
    tau_epochs: int = 30          # length of that warm-up, rising epoch by epoch (paper)
    center_momentum: float = 0.9  # of the centre (paper)
    freeze_epochs: float = 1.0    # the last layer stands still so long (code; ViT-B: 3)
    # the views
    min_scale: float = 0.05       # least area of a local crop (paper)
    split_scale: float = 0.4      # its largest, and least of a global one (paper; released: 0.25)
    local_crops: int = 8          # L (code; released: 10); 0: with --split-scale 0.14 (code)
    local_size: int = 96          # pixels, side of a local crop (paper)
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)   # brightness, contrast, saturation, hue (code: BYOL's)
    blur_p: float = 1.0           # blur of global crop 1; crop 2 a tenth, local ones half (code)
    # the optimisation
    epochs: float = 300           # (code; the paper's best: 800)
    warmup_epochs: float = 10.0   # linear rise of the learning rate (paper)
    batch_size: int = 1024        # global (paper)
    lr: float = 5e-4              # peak, times batch/256 (paper)
    min_lr: float = 1e-6          # end of its cosine (code)
    weight_decay: float = 0.04    # AdamW, not of biases and norms (paper; code)
    weight_decay_end: float = 0.4 # rising to this by a cosine (paper)
    clip: float = 3.0             # gradient norm, each tensor for itself (code; ViT-B: 0.3); 0: off
    momentum: float = 0.996       # of the teacher, rising to 1 by a cosine (paper)
    overfit_one_batch: bool = False        # the first batch again and again, to see it learn;
                                  # photos: with --warmup-epochs 0 --freeze-epochs 0


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """Two global crops, unequally blurred and solarised as in BYOL, and L local ones."""
    colour = dict(jitter=cfg.jitter, jitter_p=0.8, grey_p=0.2)
    crop = dict(size=cfg.img_size, scale=(cfg.split_scale, 1.0), **colour)
    return [data.View(**crop, blur_p=cfg.blur_p),
            data.View(**crop, blur_p=0.1 * cfg.blur_p, solarize_p=0.2),
            data.View(cfg.local_size, scale=(cfg.min_scale, cfg.split_scale), **colour,
                      blur_p=0.5 * cfg.blur_p, copies=cfg.local_crops)]


# --------------------------------------------------------------------------------------------------
# Model and loss
# --------------------------------------------------------------------------------------------------


class Prototypes(nn.Module):
    """A Linear whose K rows have length g (weight norm): logits are cosines, times g."""

    def __init__(self, dim, K, frozen):
        super().__init__()
        self.weight_v = nn.Linear(dim, K, bias=False).weight                 # (K, dim)
        self.weight_g = nn.Parameter(torch.ones(K, 1), requires_grad=not frozen)

    def forward(self, z):
        return F.linear(z, self.weight_g * F.normalize(self.weight_v, dim=1))


class Head(nn.Module):
    """MLP, length 1, prototypes (paper, appendix C)."""

    def __init__(self, cfg, K):
        super().__init__()

        def layer(width):
            norm = [distributed.BatchNorm(cfg.hidden)] if cfg.bn_in_head else []
            return nn.Linear(width, cfg.hidden), *norm, nn.GELU()

        self.mlp = nn.Sequential(*layer(cfg.embed_dim), *layer(cfg.hidden),
                                 nn.Linear(cfg.hidden, cfg.bottleneck))
        self.last_layer = Prototypes(cfg.bottleneck, K, cfg.norm_last_layer)
        vit.init_linear(self.mlp, cfg.init)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """Backbone and head; without drop path as a teacher."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                cfg.num_heads, pos=cfg.pos, init=cfg.init,
                                drop_path=0.0 if teacher else cfg.drop_path)
        self.head = Head(cfg, cfg.out_dim)

    def forward(self, x, crops=None, drop=None, drop_crops=None):
        """x: (2B, 3, S, S), crops: (L*B, 3, s, s) or None, drop: noise of the drop path.
        Returns logits ((2+L)*B, K). Crops of one size go through the backbone together."""
        cls, _ = self.backbone.split(self.backbone(x, drop=drop))            # (2B, D)
        if crops is not None:
            local, _ = self.backbone.split(self.backbone(crops, drop=drop_crops))
            cls = torch.cat([cls, local])                                    # ((2+L)*B, D)
        return self.head(cls)


def assign(t, center, tau):
    """The teacher's logits (..., K), centred and sharpened: assignments to the prototypes."""
    return ((t - center) / tau).softmax(-1)


def cls_loss(s, P, tau):
    """Cross-entropy across crops (eq. 3). s: (V, B, K) logits of the student, global crops first;
    P: (2, B, K) of the teacher. Mean over images and the 2(V-1) pairs v != g."""
    log_S = (s / tau).log_softmax(-1)
    others = log_S.sum(0) - log_S[:2]                                        # (2, B, K): v != g
    return -(P * others).sum(-1).mean() / (len(s) - 1)


class Center(nn.Module):
    """Running mean of the teacher's raw logits over the images of all processes (eq. 4)."""

    def __init__(self, K, momentum):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, K))

    def update(self, means):
        """means: (K,) for each micro-batch. Once a step, after the loss: it uses the old one."""
        mean = distributed.all_mean(torch.stack(means).mean(0))
        self.center.lerp_(mean, 1 - self.momentum)


def tally(P):
    """Of assignments P (..., K): how many there are, the sum of their entropies, their sum (K,)."""
    P = P.flatten(0, -2)
    return P.new_full((), len(P)), torch.special.entr(P).sum(), P.sum(0)


def health(tallies):
    """From those of a step's micro-batches, of all processes: the entropy of the assignments, and
    the information in them about the image: entropy of their mean less that. In nats."""
    rows, entropy, mean = (distributed.all_mean(torch.stack(x).sum(0)) for x in zip(*tallies))
    entropy, mean = entropy / rows.clamp(min=1), mean / rows.clamp(min=1)
    return entropy, torch.special.entr(mean).sum() - entropy


def collapse(what, entropy, told, K):
    """In words, what is wrong with the numbers of health(); nothing if all is well."""
    if told > 0.05:
        return []
    kind, cure = (("uniform", "lower temperatures of the teacher (--tau-...), or --bn-in-head")
                  if entropy > math.log(K) / 2 else ("one-hot", "a lower --center-momentum"))
    return [f"collapsed: all {what} get the same assignment, {kind} (entropy {entropy:.2f}, "
            f"ln K {math.log(K):.2f}); try {cure}"]


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedules(step, total, per_epoch, cfg):
    """Of this step: learning rate, weight decay, momentum and temperature of the teacher."""
    warmup, peak = round(cfg.warmup_epochs * per_epoch), cfg.lr * cfg.batch_size / 256
    if step < warmup:                      # the peak comes in its last step and the next (code)
        lr = peak * step / max(1, warmup - 1)
    else:
        lr = cosine(step - warmup, total - warmup, peak, cfg.min_lr)
    weight_decay = cosine(step, total, cfg.weight_decay, cfg.weight_decay_end)
    momentum = cosine(step, total, cfg.momentum, 1.0)
    epoch = step // per_epoch
    warm = epoch / max(1, cfg.tau_epochs - 1) if epoch < cfg.tau_epochs else 1.0
    return lr, weight_decay, momentum, cfg.tau_start + warm * (cfg.tau_end - cfg.tau_start)


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    if not min(cfg.tau_student, cfg.tau_start, cfg.tau_end) > 0:
        raise ValueError("--tau-student, --tau-start and --tau-end are temperatures: above 0")
    if cfg.out_dim < 2:
        raise ValueError("--out-dim must be 2 or more")
    if cfg.local_crops and cfg.local_size % cfg.patch_size:
        raise ValueError("--local-size must be a multiple of --patch-size")
    if cfg.bn_in_head and cfg.accumulate > 1:
        raise ValueError("--bn-in-head normalises over the batch: micro-batches would change the "
                         "result; leave out --accumulate, or add --bn-in-head false")

    loader, bank, queries = run.data(views(cfg))         # the last two: for the kNN accuracy only

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    ema_update(teacher, student, 0.0)                                     # they begin equal
    center = Center(cfg.out_dim, cfg.center_momentum).to(run.device)
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, center=center, opt=opt)
    total, freeze = run.length(loader), round(cfg.freeze_epochs * len(loader))
    same = next(loader.batches()) if cfg.overfit_one_batch else None
    run.say(f"knowing nothing costs ln K = {math.log(cfg.out_dim):.3f}")

    for step, batch in run.steps(loader):
        lr, weight_decay, momentum, tau = schedules(step, total, len(loader), cfg)
        set_lr(opt, lr)
        opt.param_groups[0]["weight_decay"] = weight_decay      # not of biases, norms

        # ---- the method ----------------------------------------------------------------------
        means, tallies = [], []
        for part in run.micro_batches(same or batch):
            x = torch.cat(part.views[:2])                                    # (2B, 3, S, S)
            crops = torch.cat(part.views[2:]) if part.views[2:] else None    # (L*B, 3, s, s)
            drop = rng.uniform(part.index, (2 + cfg.local_crops, 2 * cfg.depth),
                               cfg.seed, part.epoch, "drop")
            drop = drop.transpose(0, 1).flatten(0, 1)                        # ((2+L)*B, 2*depth)

            with run.autocast():
                with torch.no_grad():
                    t = teacher(x)                                           # (2B, K)
                s = student(x, crops, drop[:len(x)], drop[len(x):])          # ((2+L)*B, K)
            t = t.float().unflatten(0, (2, -1))                              # fp32 from here on
            P = assign(t, center.center, tau)
            loss = cls_loss(s.float().unflatten(0, (2 + cfg.local_crops, -1)), P, cfg.tau_student)
            run.backward(loss, opt, clip=cfg.clip, per_tensor=True)

            means.append(t.mean((0, 1))), tallies.append(tally(P))
            entropy = torch.special.entr(P).sum(-1).mean()
            run.log(loss=loss, entropy=entropy, kl=loss - entropy, lr=lr)

        if step < freeze:            # None, not 0: AdamW would still decay and move what has zeros
            for name, p in student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        opt.step(), opt.zero_grad()
        ema_update(teacher, student, momentum)                            # with the new weights
        center.update(means)
        # ---- bookkeeping ---------------------------------------------------------------------

        entropy, told = health(tallies)
        run.log(told=told)
        if run.due(cfg.evals):
            run.log(now=True, **run.knn(teacher.backbone, bank, queries, cfg.img_size))
            with run.looking():
                show(run, cfg, distributed.unwrap(student), teacher, part.views, center, tau)
            for words in collapse("images", entropy, told, cfg.out_dim):
                run.say(words)
        if run.save_due():
            run.save_encoder(teacher.backbone, branch="teacher",
                             heads={"head": teacher.head.state_dict()})
            run.save()


@torch.no_grad()
def show(run, cfg, student, teacher, crops, center, tau, n=8):
    """picture.png: crops as the network sees them, what the teacher's class token attends to in
    the first (last block, mean of the heads), and assignments to the 16 prototypes used most here:
    of the first crop by the teacher (upper bars), of the second by the student (lower bars)."""
    last, (g1, g2, *local) = cfg.depth - 1, (view[:n] for view in crops)
    student.eval(), teacher.eval()
    with run.autocast():
        t, s = teacher(g1), student(g2)
        _, maps = teacher.backbone.layers(g1, [last], attention=[last])
    student.train(), teacher.train()
    columns = {"global 1": g1, "global 2": g2}
    if local:
        columns["local"] = F.interpolate(local[0], cfg.img_size)
    columns = {title: augment.denormalize(z) for title, z in columns.items()}

    def panel(x):                               # (n, h, w) -> heat maps, the largest value yellow
        x = x / x.amax((1, 2), keepdim=True).clamp(min=1e-9)
        return visualize.heat_map(F.interpolate(x[:, None], cfg.img_size)[:, 0])

    side = cfg.img_size // cfg.patch_size
    columns["attention"] = panel(maps[last][:, :, 0, 1:].float().mean(1).unflatten(1, (side, side)))
    P, S = assign(t.float(), center.center, tau), (s.float() / cfg.tau_student).softmax(-1)
    most = P.sum(0).topk(min(16, cfg.out_dim)).indices
    columns["assignment"] = panel(torch.stack([P, S], 1)[:, :, most])        # (n, 2, 16)
    run.picture(columns)


if __name__ == "__main__":
    config.main(main)
