"""SelfPatch: patch-level self-supervision (Yun et al., 2022, arXiv 2206.07990), on top of DINO.

DINO teaches one vector per image. SelfPatch gives every patch a target, too: what lies next to a
patch mostly belongs to the same thing. Of its 8 neighbours the teacher takes the k most similar
ones and sums them up by attention; from the patch itself, in the same crop, the student must
predict the teacher's assignment of that summary to prototypes. The patch is not in the summary, or
copying would do. The backbone has no class token: the attention that sums up neighbours also makes
the image vector, out of all patches, for DINO's loss.

    crops -+-> teacher* -> patches -+-> attention* over all patches  -> c_head* -> t     P (global)
           |                        +-> attention* over k neighbours -> p_head* -> u     Q
           |                            of each patch                            | cross-entropy: P
           |                                                                     | with s of crops
           |                                                                     | v != g; Q with w
           |                                                                     | of the same patch
           +-> student -> patches -+-> attention over all patches ---> c_head --> s
                                   +---------------------------------> p_head --> w
       * exponential moving average of the student's weights; no gradient
       P = softmax((t - c) / tau_t), Q = softmax((u - c_p) / tau_t)

    L     = L_cls + lambda L_pat,   lambda = 0.1                                        (code)
    L_cls = 1/n sum over global g, sum over all crops v != g of
            - sum over k of P_g[k] log softmax(s_v / tau_s)[k],   n = 2 (1 + L)
    L_pat = mean over all crops of: mean over their patches i of
            - sum over k of Q_i[k] log softmax(w_i / tau_s)[k]
    c, c_p <- m_c c + (1 - m_c) mean of t, of u over *all* crops, local ones included

The paper (ViT-S/16, ImageNet, DINO -> with SelfPatch): COCO box AP 40.8 -> 42.1, ADE20K mIoU
(Semantic FPN) 38.3 -> 41.2 (epochs: 300 -> 200, supplement A), linear 75.1 -> 75.6 (300 each, D).

Small data needs batch norms in the head, an option of the code (--bn-in-head): at first the logits
of different images are nearly the same, the centre takes away what they share, and what is left is
too little to sharpen, so that the loss stays at ln K.

From the official code, not the paper: local crops go to the teacher and into both centres. L_pat
alone trains no attention: only L_cls does, and the teacher turns it upon neighbours. Not the code:
its neighbours wrap round the border, so a patch at the left edge may be told to be like one at the
right; here a border patch has 5 neighbours, a corner 3, and fewer positives if need be (--borders
official for the code's). Ours: keys and values of a patch are computed once for all whom it
neighbours, one attention serves image and patches, and batch norms take (B, N, D), on which the
code's fail. Left out: SelfPatch on MoBY.

    python selfpatch.py                                         minutes on a laptop, offline
    python selfpatch.py --pat 0                                 DINO without a class token
    torchrun --nproc_per_node=8 selfpatch.py --data imagenet    the paper's (not run by us)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, distributed, positions, rng, visualize
from lib.run import Run, cosine, ema_update, param_groups, set_lr

# B images of a process, V = 2 + L crops of each, 2 global and L local, N patches, D width, K
# prototypes; image and patches: logits t, u of the teacher, s, w of the student, assignments P, Q
# of the teacher


@dataclass
class Config:
    # the network (paper: ViT-S/16)
    img_size: int = 224           # pixels, side of a global crop (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 384          # width of the backbone (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 6            # attention heads (paper)
    pos: str = "learned"          # positions: learned (paper) or sincos_row (our choice)
    init: str = "trunc"           # weights: trunc (normal 0.02: code) or moco (Xavier: our choice)
    drop_path: float = 0.1        # stochastic depth, student only (code)
    hidden: int = 2048            # width inside the head (DINO)
    bottleneck: int = 256         # width before the prototypes, where length becomes 1 (DINO)
    out_dim: int = 65536          # K of images (paper; COCO: 4096); small data: 1024
    out_dim_pat: int = 4096       # K of patches (paper)
    bn_in_head: bool = False      # batch norms in the head (code: an option); small data needs them
    norm_last_layer: bool = True  # prototypes stay at length 1 (code)
    # the objective
    pat: float = 0.1              # lambda, weight of L_pat (code)
    k: int = 4                    # positives of a patch (paper; 2 for patches of 32 pixels)
    borders: str = "correct"      # where neighbours end (our choice); official: they wrap round
    tau_student: float = 0.1      # temperature (code)
    tau_start: float = 0.04       # teacher's temperature at first (code); lower if stuck at ln K
    tau_end: float = 0.04         # ... and after its warm-up (code; DINO: 0.07); higher is unstable
    tau_epochs: int = 0           # length of that warm-up, rising epoch by epoch (code; DINO: 30)
    center_momentum: float = 0.9  # of the centre (code)
    freeze_epochs: float = 1.0    # the last layer stands still so long (code)
    # the views
    min_scale: float = 0.05       # least area of a local crop (code)
    split_scale: float = 0.25     # its largest, and least of a global one (code)
    local_crops: int = 8          # L (paper; COCO: 2); 0: with --split-scale 0.14 (code)
    local_size: int = 96          # pixels, side of a local crop (paper)
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)   # brightness, contrast, saturation, hue (code: BYOL's)
    blur_p: float = 1.0           # blur of global crop 1; crop 2 a tenth, local ones half (code)
    # the optimisation
    epochs: float = 200           # (paper; classification: 300)
    warmup_epochs: float = 10.0   # linear rise of the learning rate (paper)
    batch_size: int = 1024        # global (paper)
    lr: float = 5e-4              # peak, times batch/256 (paper)
    min_lr: float = 1e-6          # end of its cosine (code)
    weight_decay: float = 0.04    # AdamW, not of biases and norms (code)
    weight_decay_end: float = 0.4 # rising to this by a cosine (code)
    clip: float = 3.0             # gradient norm, each tensor for itself (code); 0: off
    momentum: float = 0.996       # of the teacher, rising to 1 by a cosine (code)
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
    """MLP, length 1, prototypes (DINO's paper, appendix C)."""

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


class ClassAttention(nn.Module):
    """Vectors z (B, Q, D) gather from patches y (B, N, D), each from itself and from those that
    mask (B, Q, N) allows; only z changes (CaiT's block, without layer scale)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, z, y, mask=None, weights=None):
        """weights: a list, gets the softmax over the patches (B, H, Q, N)."""
        def heads(x):                                                        # (B, H, ., D/H)
            return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        own, y = self.norm1(z), self.norm1(y)
        q, k, v = (heads(f(own)) for f in (self.q, self.k, self.v))          # (B, H, Q, D/H)
        to_self, to_patches = (q * k).sum(-1, keepdim=True), q @ heads(self.k(y)).mT
        if mask is not None:
            to_patches = to_patches.masked_fill(~mask[:, None], -torch.inf)
        a = torch.cat([to_self, to_patches], -1) * q.shape[-1]**-0.5
        a = a.softmax(-1)                                                    # (B, H, Q, 1+N)
        if weights is not None:
            weights.append(a[..., 1:])
        x = a[..., :1] * v + a[..., 1:] @ heads(self.v(y))
        z = z + self.proj(x.transpose(1, 2).flatten(2))
        return z + self.mlp(self.norm2(z))


class Aggregation(nn.Module):
    """Sums up patches by two class attentions (paper, section 3.2): those of the whole crop for its
    image vector and, in the teacher, the positives of each patch for that patch's target."""

    def __init__(self, cfg):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, cfg.embed_dim) * 0.02)
        self.cls_blocks = nn.ModuleList(ClassAttention(cfg.embed_dim, cfg.num_heads)
                                        for _ in range(2))
        self.norm = nn.LayerNorm(cfg.embed_dim, 1e-6)
        vit.init_linear(self.cls_blocks, cfg.init)

    def forward(self, y, positives=None, weights=None):
        """y: (B, N, D) of the last block. Returns (B, 1+N, D): the image vector and, with
        positives (B, N, N) bool, their sums; else the patches as they are."""
        rows, mask = 1, None
        if positives is not None:
            rows, mask = 1 + y.shape[1], F.pad(positives, (0, 0, 1, 0), value=True)
        z = self.cls_token.expand(len(y), rows, -1)
        for block in self.cls_blocks:
            z = block(z, y, mask, weights)
        return self.norm(z if positives is not None else torch.cat([z, y], 1))


def neighbours(side, borders, device=None):
    """(N, N) bool: which patches of a square grid touch, be it by a corner."""
    apart = [(x[:, None] - x).abs() for x in positions.coordinates((side, side), device)]
    if borders == "official":                                                # a torus
        apart = [torch.minimum(d, side - d) for d in apart]
    return torch.maximum(*apart) == 1


def choose(y, near, k):
    """Of each patch's neighbours the k most similar ones, by the cosine of their vectors y
    (B, N, D), all of them if there are fewer: (B, N, N) bool."""
    with torch.autocast(y.device.type, enabled=False):                       # bf16 would make ties
        y = F.normalize(y.float(), dim=-1)
        alike = (y @ y.mT).masked_fill(~near, -torch.inf)
    best = alike.topk(min(k, len(near)), -1).indices
    return torch.zeros_like(near).expand(alike.shape).scatter(2, best, True) & near


class Network(nn.Module):
    """Backbone, aggregation and heads; without drop path as a teacher, but summing up positives."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                cfg.num_heads, pos=cfg.pos, init=cfg.init,
                                drop_path=0.0 if teacher else cfg.drop_path,
                                class_token=False, final_norm=False)
        self.ca_head = Aggregation(cfg)
        self.c_head, self.p_head = Head(cfg, cfg.out_dim), Head(cfg, cfg.out_dim_pat)
        self.teacher, self.k, self.borders = teacher, cfg.k, cfg.borders

    def forward(self, x, crops=None, drop=None, drop_crops=None):
        """x: (2B, 3, S, S), crops: (L*B, 3, s, s) or None, drop: noise of the drop path. Returns
        logits of images ((2+L)*B, K) and, for each size of crops, of patches (2B or L*B, N, K).
        Crops of one size go through the backbone together."""
        tokens = [self.aggregate(self.backbone(x, drop=drop))]               # (2B, 1+N, D)
        if crops is not None:
            tokens.append(self.aggregate(self.backbone(crops, drop=drop_crops)))
        cls = torch.cat([z[:, 0] for z in tokens])                           # ((2+L)*B, D)
        return self.c_head(cls), [self.p_head(z[:, 1:]) for z in tokens]

    def aggregate(self, y, weights=None):
        if not self.teacher:
            return self.ca_head(y, weights=weights)
        near = neighbours(math.isqrt(y.shape[1]), self.borders, y.device)
        return self.ca_head(y, choose(y, near, self.k), weights)


def assign(t, center, tau):
    """The teacher's logits (..., K), centred and sharpened: assignments to the prototypes."""
    return ((t - center) / tau).softmax(-1)


def cls_loss(s, P, tau):
    """DINO's cross-entropy across crops. s: (V, B, K) logits of the student, global crops first;
    P: (2, B, K) of the teacher. Mean over images and the 2(V-1) pairs v != g."""
    log_S = (s / tau).log_softmax(-1)
    others = log_S.sum(0) - log_S[:2]                                        # (2, B, K): v != g
    return -(P * others).sum(-1).mean() / (len(s) - 1)


def pat_loss(w, Q, tau):
    """Cross-entropy of patches. w, Q: for each size of crops (2B or L*B, N, K), logits of the
    student and assignments of the teacher. Mean over the patches of a crop, then over all crops."""
    each = [-(q * (x / tau).log_softmax(-1)).sum(-1).mean(1) for x, q in zip(w, Q)]
    return torch.cat(each).mean()


class Center(nn.Module):
    """Running mean of the teacher's raw logits over the images of all processes."""

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
    the information in them about image or patch: entropy of their mean less that. In nats."""
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
    if min(cfg.out_dim, cfg.out_dim_pat) < 2:
        raise ValueError("--out-dim and --out-dim-pat must be 2 or more")
    if not 1 <= cfg.k <= 8 or cfg.borders not in ("correct", "official"):
        raise ValueError("--k is 1 to 8 of the 8 neighbours, --borders correct or official")
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
    center_p = Center(cfg.out_dim_pat, cfg.center_momentum).to(run.device)   # of the patches
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, center=center, center_p=center_p, opt=opt)
    total, freeze = run.length(loader), round(cfg.freeze_epochs * len(loader))
    same = next(loader.batches()) if cfg.overfit_one_batch else None
    run.say(f"knowing nothing costs: cls ln K = {math.log(cfg.out_dim):.3f}, pat "
            f"{math.log(cfg.out_dim_pat):.3f}")

    for step, batch in run.steps(loader):
        lr, weight_decay, momentum, tau = schedules(step, total, len(loader), cfg)
        set_lr(opt, lr)
        opt.param_groups[0]["weight_decay"] = weight_decay      # not of biases, norms

        # ---- the method ----------------------------------------------------------------------
        means, means_p, tallies, tallies_pat = [], [], [], []
        for part in run.micro_batches(same or batch):
            x = torch.cat(part.views[:2])                                    # (2B, 3, S, S)
            crops = torch.cat(part.views[2:]) if part.views[2:] else None    # (L*B, 3, s, s)
            drop = rng.uniform(part.index, (2 + cfg.local_crops, 2 * cfg.depth),
                               cfg.seed, part.epoch, "drop")
            drop = drop.transpose(0, 1).flatten(0, 1)                        # ((2+L)*B, 2*depth)

            with run.autocast():
                with torch.no_grad():
                    t, u = teacher(x, crops)                                 # ((2+L)*B, K), ...
                s, w = student(x, crops, drop[:len(x)], drop[len(x):])       # ((2+L)*B, K), ...
            t = t.float().unflatten(0, (2 + cfg.local_crops, -1))            # fp32 from here on
            u, w = [z.float() for z in u], [z.float() for z in w]
            P, Q = assign(t[:2], center.center, tau), [assign(z, center_p.center, tau) for z in u]
            cls = cls_loss(s.float().unflatten(0, (2 + cfg.local_crops, -1)), P, cfg.tau_student)
            pat = pat_loss(w, Q, cfg.tau_student)
            loss = cls + cfg.pat * pat
            run.backward(loss, opt, clip=cfg.clip, per_tensor=True)

            means.append(t.mean((0, 1)))                                     # DINO: of t[:2]
            means_p.append(torch.cat([z.flatten(0, 1) for z in u]).mean(0))
            tallies.append(tally(P)), tallies_pat.append(tally(Q[0]))     # of global crops
            entropy = torch.special.entr(P).sum(-1).mean()
            run.log(loss=loss, cls=cls, pat=pat, entropy=entropy, kl=cls - entropy, lr=lr)

        if step < freeze:            # None, not 0: AdamW would still decay and move what has zeros
            for name, p in student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        opt.step(), opt.zero_grad()
        ema_update(teacher, student, momentum)                            # with the new weights
        center.update(means), center_p.update(means_p)
        # ---- bookkeeping ---------------------------------------------------------------------

        (entropy, told), (entropy_pat, told_pat) = health(tallies), health(tallies_pat)
        run.log(told=told, entropy_pat=entropy_pat, told_pat=told_pat)
        if run.due(cfg.evals):
            run.log(now=True, **run.knn(teacher.backbone, bank, queries, cfg.img_size))
            with run.looking():
                show(run, cfg, distributed.unwrap(student), teacher, part.views, center, tau,
                     center_p)
            for words in (collapse("images", entropy, told, cfg.out_dim) +
                          collapse("patches", entropy_pat, told_pat, cfg.out_dim_pat)):
                run.say(words)
        if run.save_due():
            run.save_encoder(teacher.backbone, branch="teacher",
                             heads={name: getattr(teacher, name).state_dict()
                                    for name in ("ca_head", "c_head", "p_head")})
            run.save()


@torch.no_grad()
def show(run, cfg, student, teacher, crops, center, tau, center_p, n=8):
    """picture.png: crops as the network sees them, what the teacher's image vector attends to in
    the first (last block, mean of the heads), and assignments to the 16 prototypes used most here:
    of the first crop by the teacher (upper bars), of the second by the student (lower bars). Then
    the prototype (a colour) likeliest for each patch of the first crop: for its neighbours in the
    teacher, for itself in the student."""
    maps, (g1, g2, *local) = [], (view[:n] for view in crops)
    student.eval(), teacher.eval()
    with run.autocast():
        (t, (u,)), (s, _), (_, (w,)) = teacher(g1), student(g2), student(g1)
        teacher.aggregate(teacher.backbone(g1), maps)
    student.train(), teacher.train()
    columns = {"global 1": g1, "global 2": g2}
    if local:
        columns["local"] = F.interpolate(local[0], cfg.img_size)
    columns = {title: augment.denormalize(z) for title, z in columns.items()}

    def panel(x):                               # (n, h, w) -> heat maps, the largest value yellow
        x = x / x.amax((1, 2), keepdim=True).clamp(min=1e-9)
        return visualize.heat_map(F.interpolate(x[:, None], cfg.img_size)[:, 0])

    side = cfg.img_size // cfg.patch_size
    columns["attention"] = panel(maps[-1][:, :, 0].float().mean(1).unflatten(1, (side, side)))
    P, S = assign(t.float(), center.center, tau), (s.float() / cfg.tau_student).softmax(-1)
    most = P.sum(0).topk(min(16, cfg.out_dim)).indices
    columns["assignment"] = panel(torch.stack([P, S], 1)[:, :, most])        # (n, 2, 16)

    for title, z in {"teacher": u.float() - center_p.center, "student": w}.items():
        colours = 0.2 + z.argmax(-1).unflatten(1, (side, side)) * 0.618 % 0.8
        columns[title] = visualize.heat_map(F.interpolate(colours[:, None], cfg.img_size)[:, 0])
    run.picture(columns)


if __name__ == "__main__":
    config.main(main)
