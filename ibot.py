"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al., 2022, arXiv 2111.07832).

DINO, plus a second task on the patches. Some patches of the student's global crops are hidden
behind a learned mask token; the teacher sees the crops whole. For each hidden patch the student
must predict to which prototypes the teacher assigns it: BEiT's task, but the tokenizer is learned
on the way ("online"), its tokens are soft, and they get their meaning from the other task, DINO's:
to give all crops of an image the same class. One head serves both.

    2 global crops -+-> teacher* -+> class ---> head* -> t -> softmax((t - c) / tau_t)   = P
                    |             +> patches -> head* -> u -> softmax((u - c2) / tau_p)  = Q
                    |                                                  | cross-entropy: P with s of
                    |                                                  | crops v != g; Q with w of
                    |                                                  | the same patch, if hidden
                    +-> masked -> student -+> class ---> head -> s -> softmax(s / tau_s)
                                           +> patches -> head -> w -> softmax(w / tau_s)
    L local crops, unmasked ----> student --> class ---> head -> s, too
              * exponential moving average of the student's weights; no gradient

    L     = lambda_1 L_cls + lambda_2 L_pat,   both lambda = 1
    L_cls = 1/n sum over global g, sum over all crops v != g of
            - sum over k of P_g[k] log softmax(s_v / tau_s)[k],   n = 2 (1 + L)          (eq. 2)
    L_pat = mean over global crops of: mean over their hidden patches i of
            - sum over k of Q_i[k] log softmax(w_i / tau_s)[k],  0 if none is hidden     (eq. 3)
    c, c2 <- m_c c + (1 - m_c) mean of t over global crops, of u over *all* their patches

The paper (Table 1; ImageNet, teacher, kNN / linear): ViT-S/16 75.2 / 77.9 after 800 epochs
(DINO: 74.5 / 77.0), ViT-B/16 77.1 / 79.5 after 400. The defaults are the authors' command for the
former; their script's own defaults are not the paper's (no local crops, unshared student head).

Small data needs batch norms in the head, an option of the code (--bn-in-head): at first the logits
of different images are nearly the same, the centre takes away what they share, and what is left is
too little to sharpen, so that the loss stays at ln K.

From the official code, not the paper: the mean over the hidden patches of a crop before that over
crops, in which half of the crops, unmasked, count as 0; a centre for patches, c2, from all of them.
Ours: logits of hidden patches only are computed; the mean of all, for c2, is the last layer
(linear) of the mean; masks are made for the whole batch at once; batch norms see class tokens and
patches apart, as DINO's see the former (the script's: together, and one norm serves two layers),
and keep statistics of the former only. Left out: masking from a later epoch on, as for Swin.

    python ibot.py                                         minutes on a laptop, offline
    python ibot.py --mask-p 0                              DINO, exactly, with equal settings
    torchrun --nproc_per_node=16 ibot.py --data imagenet   the command above (not run by us)
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

# B images of a process, V = 2 + L crops of each, 2 global and L local, N patches, M of all hidden,
# D width, K prototypes; class and patches: logits t, u of the teacher, s, w of the student,
# assignments P, Q of the teacher


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
    hidden: int = 2048            # width inside the head (paper)
    bottleneck: int = 256         # width before the prototypes, where length becomes 1 (paper)
    out_dim: int = 8192           # K (paper); small data: 1024, or the loss stays at ln K
    bn_in_head: bool = False      # batch norms in the head (code: an option); small data needs them
    norm_last_layer: bool = False # prototypes stay at length 1 (code; ViT-B: True, for stability)
    shared_head: bool = True      # class and patches share prototypes (paper); false: two sets
                                  # in both networks (in the script the teacher keeps one)
    # the objective
    cls: float = 1.0              # lambda_1, weight of L_cls (paper)
    pat: float = 1.0              # lambda_2, weight of L_pat (paper)
    tau_student: float = 0.1      # temperature (paper)
    tau_start: float = 0.04       # teacher's temperature at first (code); lower if stuck at ln K
    tau_end: float = 0.07         # ... after its warm-up, of the class (code); higher is unstable
    tau_pat_end: float = 0.07     # ... and of the patches (code)
    tau_epochs: int = 30          # length of that warm-up, rising epoch by epoch (code; ViT-B: 50)
    center_momentum: float = 0.9  # of the centre (paper)
    freeze_epochs: float = 1.0    # the last layer stands still so long (code; ViT-B: 3)
    # the mask
    mask_p: float = 0.5           # share of the global crops that are masked (code)
    mask_min: float = 0.1         # ratio of hidden patches in these, uniform from this ... (code)
    mask_max: float = 0.5         # ... to this (code; shape rand: 0.65 to 0.75)
    mask_shape: str = "block"     # BEiT's rectangles; or rand: any (official ViT-B/L, too)
    # the views
    min_scale: float = 0.05       # least area of a local crop (paper)
    split_scale: float = 0.25     # its largest, and least of a global one (code; ViT-B: 0.32)
    local_crops: int = 10         # L (paper); 0: with --split-scale 0.14 (code)
    local_size: int = 96          # pixels, side of a local crop (paper)
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)   # brightness, contrast, saturation, hue (code: BYOL's)
    blur_p: float = 1.0           # blur of global crop 1; crop 2 a tenth, local ones half (code)
    # the optimisation
    epochs: float = 800           # (paper; ViT-B: 400)
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


def masks(index, cfg, *key):
    """Which patches of the two global crops of the images `index` (B,) the student does not see:
    (2B, N) bool, first crops first. Every crop has a ratio and a mask of its own."""
    def uniform(shape, purpose):                                             # (2B, *shape)
        return rng.uniform(index, (2, *shape), *key, purpose).transpose(0, 1).flatten(0, 1)

    side, u = cfg.img_size // cfg.patch_size, uniform((2,), "ratio")
    ratio = cfg.mask_min + u[:, 1] * (cfg.mask_max - cfg.mask_min)
    target = torch.where(u[:, 0] < cfg.mask_p, ratio, 0) * side**2           # (2B,) patches
    if cfg.mask_shape == "rand":
        rank = uniform((side**2,), "order").argsort(dim=1, stable=True).argsort(1)
        return rank < target.long()[:, None]
    return blocks(uniform((48, 4), "blocks"), target, side).flatten(1)       # enough, up to 0.5


def blocks(u, target, side):
    """BEiT's block-wise masks: rectangle after rectangle, each with something new and none beyond
    target (B,) patches; ten in a row that do not fit end it. u: (B, M, 4) uniform numbers for M
    rectangles. Returns (B, side, side) bool."""
    mask = torch.zeros(len(u), side, side, dtype=torch.bool, device=u.device)
    room, misses, place = target, torch.zeros_like(target), torch.arange(side, device=u.device)
    least, widest = (side // 3) ** 2, math.log(1 / 0.3)           # patches, log of height / width

    def span(length, at):                                                    # (B,) -> (B, side)
        start = (at * (side - length + 1)).floor()[:, None]
        return (place >= start) & (place < start + length[:, None])

    for area, aspect, top, left in u.permute(1, 2, 0):                       # each (B,)
        area, aspect = least + area * (room - least), ((2 * aspect - 1) * widest).exp()
        h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        new = span(h, top)[:, :, None] & span(w, left)[:, None] & ~mask
        count = new.sum((1, 2))
        fits = (h < side) & (w < side) & (count > 0) & (count <= room) & (misses < 10)
        mask |= new & fits[:, None, None]
        room = room - count * fits
        misses = torch.where(fits, 0, misses + 1)
    return mask


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
    """MLP, length 1, prototypes; for patches the same ones or their own."""

    def __init__(self, cfg, K):
        super().__init__()

        def layer(width):
            norm = [distributed.BatchNorm(cfg.hidden)] if cfg.bn_in_head else []
            return nn.Linear(width, cfg.hidden), *norm, nn.GELU()

        self.mlp = nn.Sequential(*layer(cfg.embed_dim), *layer(cfg.hidden),
                                 nn.Linear(cfg.hidden, cfg.bottleneck))
        self.last_layer = Prototypes(cfg.bottleneck, K, cfg.norm_last_layer)
        self.last_layer2 = (None if cfg.shared_head else
                            Prototypes(cfg.bottleneck, K, cfg.norm_last_layer))
        vit.init_linear(self.mlp, cfg.init)

    def project(self, x):
        return F.normalize(self.mlp(x), dim=-1)

    def project_patches(self, x):
        """Batch norms see patches by themselves, always by their batch, and keep nothing of them:
        what they keep is of class tokens, which are what is projected after training."""
        copies = {name: buffer.clone() for name, buffer in self.mlp.named_buffers()}
        z = torch.func.functional_call(self.mlp.train(), copies, x)
        self.mlp.train(self.training)
        return F.normalize(z, dim=-1)

    def forward(self, x):
        return self.last_layer(self.project(x))

    def patches(self, z):
        return (self.last_layer2 or self.last_layer)(z)


class Network(nn.Module):
    """Backbone, mask token and head; without drop path and mask token as a teacher."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                cfg.num_heads, pos=cfg.pos, init=cfg.init,
                                drop_path=0.0 if teacher else cfg.drop_path)
        self.head = Head(cfg, cfg.out_dim)
        self.norm_all = cfg.bn_in_head
        self.masked_embed = None if teacher else nn.Parameter(torch.zeros(1, cfg.embed_dim))

    def forward(self, x, mask, crops=None, drop=None, drop_crops=None):
        """x: (2B, 3, S, S), mask: (2B, N) bool, crops: (L*B, 3, s, s) or None, drop: noise of the
        drop path. Returns logits of classes ((2+L)*B, K) and of hidden patches (M, K), and from a
        teacher the mean logits of all patches (K,). Crops of one size go through the backbone
        together."""
        student = self.masked_embed is not None
        tokens = self.backbone(x, mask=mask if student else None, mask_token=self.masked_embed,
                               drop=drop)
        cls, patches = self.backbone.split(tokens)                           # (2B, D), (2B, N, D)
        if crops is not None:
            local, _ = self.backbone.split(self.backbone(crops, drop=drop_crops))
            cls = torch.cat([cls, local])                                    # ((2+L)*B, D)
        if student:
            # A batch norm sees all patches: as many in every process. Without, the hidden ones do.
            z = (self.head.project_patches(patches)[mask] if self.norm_all
                 else self.head.project(patches[mask]))
            return self.head(cls), self.head.patches(z)
        z = self.head.project_patches(patches)                               # (2B, N, 256)
        mean = self.head.patches(z.mean((0, 1)))                             # the layer is linear
        return self.head(cls), self.head.patches(z[mask]), mean


def assign(t, center, tau):
    """The teacher's logits (..., K), centred and sharpened: assignments to the prototypes."""
    return ((t - center) / tau).softmax(-1)


def cls_loss(s, P, tau):
    """Cross-entropy across crops (eq. 2). s: (V, B, K) logits of the student, global crops first;
    P: (2, B, K) of the teacher. Mean over images and the 2(V-1) pairs v != g."""
    log_S = (s / tau).log_softmax(-1)
    others = log_S.sum(0) - log_S[:2]                                        # (2, B, K): v != g
    return -(P * others).sum(-1).mean() / (len(s) - 1)


def pat_loss(w, Q, mask, tau):
    """Cross-entropy of hidden patches (eq. 3). w, Q: (M, K) logits of the student and assignments
    of the teacher; mask: (2B, N). Mean over the hidden patches of a crop, then over all crops."""
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)                    # of its crop's loss
    return -((Q * (w / tau).log_softmax(-1)).sum(-1) * share[mask]).sum() / len(mask)


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
    """Of this step: learning rate, weight decay, momentum and temperatures of the teacher."""
    warmup, peak = round(cfg.warmup_epochs * per_epoch), cfg.lr * cfg.batch_size / 256
    if step < warmup:                      # the peak comes in its last step and the next (code)
        lr = peak * step / max(1, warmup - 1)
    else:
        lr = cosine(step - warmup, total - warmup, peak, cfg.min_lr)
    weight_decay = cosine(step, total, cfg.weight_decay, cfg.weight_decay_end)
    momentum = cosine(step, total, cfg.momentum, 1.0)
    epoch = step // per_epoch
    warm = epoch / max(1, cfg.tau_epochs - 1) if epoch < cfg.tau_epochs else 1.0
    tau, tau_pat = (cfg.tau_start + warm * (end - cfg.tau_start)
                    for end in (cfg.tau_end, cfg.tau_pat_end))
    return lr, weight_decay, momentum, tau, tau_pat


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    if not min(cfg.tau_student, cfg.tau_start, cfg.tau_end, cfg.tau_pat_end) > 0:
        raise ValueError("--tau-student, --tau-start, --tau-end and --tau-pat-end are "
                         "temperatures: above 0")
    if cfg.out_dim < 2:
        raise ValueError("--out-dim must be 2 or more")
    if not 0 <= cfg.mask_min <= cfg.mask_max <= 1 or not 0 <= cfg.mask_p <= 1:
        raise ValueError("--mask-p, --mask-min and --mask-max are shares from 0 to 1, min <= max")
    if cfg.mask_shape not in ("block", "rand"):
        raise ValueError("--mask-shape is block or rand")
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
    center2 = Center(cfg.out_dim, cfg.center_momentum).to(run.device)        # of the patches
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, center=center, center2=center2, opt=opt)
    total, freeze = run.length(loader), round(cfg.freeze_epochs * len(loader))
    same = next(loader.batches()) if cfg.overfit_one_batch else None
    chance = math.log(cfg.out_dim)
    run.say(f"knowing nothing costs: cls ln K = {chance:.3f}, pat {cfg.mask_p * chance:.3f}, as "
            f"crops without a mask count as 0")

    for step, batch in run.steps(loader):
        lr, weight_decay, momentum, tau, tau_pat = schedules(step, total, len(loader), cfg)
        set_lr(opt, lr)
        opt.param_groups[0]["weight_decay"] = weight_decay      # not of biases, norms

        # ---- the method ----------------------------------------------------------------------
        means, means2, tallies, tallies_pat = [], [], [], []
        for part in run.micro_batches(same or batch):
            x = torch.cat(part.views[:2])                                    # (2B, 3, S, S)
            crops = torch.cat(part.views[2:]) if part.views[2:] else None    # (L*B, 3, s, s)
            drop = rng.uniform(part.index, (2 + cfg.local_crops, 2 * cfg.depth),
                               cfg.seed, part.epoch, "drop")
            drop = drop.transpose(0, 1).flatten(0, 1)                        # ((2+L)*B, 2*depth)
            mask = masks(part.index, cfg, cfg.seed, part.epoch)              # (2B, N)

            with run.autocast():
                with torch.no_grad():
                    t, u, mean = teacher(x, mask)                            # (2B, K), (M, K), (K,)
                s, w = student(x, mask, crops, drop[:len(x)], drop[len(x):])  # ((2+L)*B, K), (M, K)
            t = t.float().unflatten(0, (2, -1))                              # fp32 from here on
            P, Q = assign(t, center.center, tau), assign(u.float(), center2.center, tau_pat)
            cls = cls_loss(s.float().unflatten(0, (2 + cfg.local_crops, -1)), P, cfg.tau_student)
            pat = pat_loss(w.float(), Q, mask, cfg.tau_student)
            loss = cfg.cls * cls + cfg.pat * pat
            run.backward(loss, opt, clip=cfg.clip, per_tensor=True)

            means.append(t.mean((0, 1))), means2.append(mean.float())
            tallies.append(tally(P)), tallies_pat.append(tally(Q))
            entropy = torch.special.entr(P).sum(-1).mean()
            run.log(loss=loss, cls=cls, pat=pat, entropy=entropy, kl=cls - entropy, lr=lr)

        if step < freeze:            # None, not 0: AdamW would still decay and move what has zeros
            for name, p in student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        opt.step(), opt.zero_grad()
        ema_update(teacher, student, momentum)                            # with the new weights
        center.update(means), center2.update(means2)
        # ---- bookkeeping ---------------------------------------------------------------------

        (entropy, told), (entropy_pat, told_pat) = health(tallies), health(tallies_pat)
        run.log(told=told, entropy_pat=entropy_pat, told_pat=told_pat)
        if run.due(cfg.evals):
            run.log(now=True, **run.knn(teacher.backbone, bank, queries, cfg.img_size))
            with run.looking():
                show(run, cfg, distributed.unwrap(student), teacher, part.views, mask, center, tau,
                     center2)
            for words in (collapse("images", entropy, told, cfg.out_dim) +
                          collapse("patches", entropy_pat, told_pat, cfg.out_dim) * (len(Q) > 0)):
                run.say(words)
        if run.save_due():
            run.save_encoder(teacher.backbone, branch="teacher",
                             heads={"head": teacher.head.state_dict()})
            run.save()


@torch.no_grad()
def show(run, cfg, student, teacher, crops, mask, center, tau, center2, n=8):
    """picture.png: crops as the network sees them, what the teacher's class token attends to in
    the first (last block, mean of the heads), and assignments to the 16 prototypes used most here:
    of the first crop by the teacher (upper bars), of the second by the student (lower bars). Then
    the first crop as the student sees it, and the prototype (a colour) that the teacher finds
    likeliest for each patch, the student for each hidden one."""
    last, (g1, g2, *local) = cfg.depth - 1, (view[:n] for view in crops)
    student.eval(), teacher.eval()
    with run.autocast():
        t, u, _ = teacher(g1, torch.ones_like(mask[:n]))
        s, _ = student(g2, mask[len(crops[0]):][:n])
        _, w = student(g1, mask[:n])
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

    hidden = mask[:n].unflatten(1, (side, side))
    columns["masked"] = augment.denormalize(
        g1 * (1 - F.interpolate(hidden[:, None].float(), cfg.img_size)))
    best = (u.float() - center2.center).argmax(-1).view_as(hidden)           # (n, side, side)
    found = torch.full_like(best, -1).masked_scatter(hidden, w.argmax(-1))   # -1: not hidden
    for title, z in {"teacher": best, "student": found}.items():
        colours = torch.where(z < 0, 0, 0.2 + z * 0.618 % 0.8)
        columns[title] = visualize.heat_map(F.interpolate(colours[:, None], cfg.img_size)[:, 0])
    run.picture(columns)


if __name__ == "__main__":
    config.main(main)
