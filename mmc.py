"""MMC: Masked Momentum Contrastive learning (Wu et al., 2023, arXiv 2308.11448).

One student, three tasks. It sees a corrupted image (random rectangles replaced by noise or by
pieces of another image); a teacher, the moving average of the student, sees the same image intact.
The student must
  REC  paint the corrupted pixels back          -> patches of one object become alike
  PAT  recognise, for each of its patches, the teacher's token of the same patch among the
       patches of *other* images                -> objects come apart
  CLS  recognise, by its class token, the teacher's class token of the *other view* of the
       same image among those of other images   -> meaning, which PAT hands down to the patches

    view v -+- corrupted -> student -+- patches -> h_rec -> pixels   L1 on the corrupted pixels
            |                        +- patches -> h_pat -> Q_v      InfoNCE with K_v, same patch
            |                        +- class   -> h_cls -> q_v      InfoNCE with k_g, g != v
            +- intact ---> teacher* -+- patches -> h_pat* -> K_v
                                     +- class   -> h_cls* -> k_v
    local crops, intact -> student -+- class   -> h_cls -> q_v too
              * exponential moving average of the student's weights; no gradient

    L     = L_rec + L_pat + L_cls                                                      (eq. 4)
    L_rec = mean over corrupted pixels of |x - h_rec(f_s(x'))|     (eq. 1, normaliser: our choice)
    L_pat = mean over patches i of
            -log e^(Q_i.K_i/tau) / (e^(Q_i.K_i/tau) + sum over patches j of other images
                                                               of e^(Q_i.K_j/tau))     (eq. 2)
    L_cls = mean over pairs of views of -log e^(q.k/tau) / sum over images of e^(q.k'/tau)  (eq. 3)

All Q, K, q, k have length 1, and no predictor stands between (our choice: SiT has none).

The paper (Table 4: ViT-S, ImageNet-100, 200 epochs; kNN on class token / on the mean patch token):
REC alone 17.2 / 14.7, CLS alone 75.0 / 63.9, CLS + REC 72.5 / 53.7, CLS + PAT 75.6 / 75.5, all
three 77.5 / 77.0: PAT lifts the patch tokens, REC helps only where both others are.

No code of the authors was found. What the paper leaves open is marked "our choice" where it is
decided, with the relative that decides so: SiT, GMML, MC-SSL (shared authors), MoCo v3, DINO, iBOT.
So are a patch projection that learns (SiT; MoCo v3 freezes it), and the teacher as the network that
is evaluated and saved (DINO, iBOT).

    python mmc.py                                         minutes on a laptop, offline
    python mmc.py --rec 0 --pat 0                         CLS alone, as in Table 4
    torchrun --nproc_per_node=8 mmc.py --data imagenet    the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, distributed, rng, visualize
from lib.run import Run, cosine, ema_update, param_groups, set_lr

# B images of a process, V = 2 global views, L local crops, N patches, D width, C width of what is
# contrasted, G images of a group, S pixels, s of a local crop, M candidate rectangles;
# Q, q: patches and class token of the student, K, k: of the teacher


@dataclass
class Config:
    # the network (paper, Implementation Details: ViT-B/16, for ImageNet-100 ViT-S/16)
    img_size: int = 224           # pixels, side of a global view (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 768          # width of the backbone (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 12           # attention heads (paper)
    pos: str = "learned"          # positions: learned (our choice: SiT) or sincos_row (MoCo v3)
    init: str = "trunc"           # backbone: trunc (our choice: SiT) or moco (Xavier, as MoCo v3)
    drop_path: float = 0.1        # stochastic depth, student only (our choice: SiT)
    hidden: int = 4096            # width inside the heads, 3-layer MLPs (paper); small data: 256
    out_dim: int = 256            # C, of h_cls and h_pat (our choice: MoCo v3, SiT)
    # the objective
    rec: float = 1.0              # weight of L_rec (paper, eq. 4); 0 removes a term and its head
    cls: float = 1.0              # weight of L_cls (paper, eq. 4); SiT: 2 directions x 2 tau = 0.8
    pat: float = 1.0              # weight of L_pat (paper, eq. 4)
    tau: float = 0.2              # temperature of both contrasts (paper)
    group: int = 48               # G: images contrasted by patch, pasted from (our choice)
                                  # the paper's batch; logits grow as (G*N)^2
    # the corruption: the paper's 75 % and 30 % "of the masked blocks", 35 % of the images, read as
    # shares of the area, as in GMML's script (our choice: taken literally they do not add up)
    noise_share: float = 0.75     # noise: area (paper); above 0.5: uniform from there (GMML)
    paste_share: float = 0.3      # paste: area covered from another image (paper)
    paste_p: float = 0.35         # share of images, view by view, that are pasted into (paper)
    align: int = 1                # rectangles snap to so many pixels (our choice: SiT, GMML)
    # the views
    min_scale: float = 0.25       # least area of a global crop (our choice: MC-SSL)
                                  # without local crops: 0.2, SiT
    local_crops: int = 10         # small crops, intact, for the student (our choice: MC-SSL)
                                  # the paper: "without masking for the teacher", and no number
    local_size: int = 96          # pixels (our choice: MC-SSL, DINO)
    jitter: float = 0.4           # strength of brightness, contrast, saturation jitter (paper)
    hue: float = 0.0              # strength of hue jitter (paper: not listed; relatives: 0.1)
    blur_p: float = 1.0           # blur of view 1; of view 2 a tenth, of local crops half
                                  # (paper: "strength of 1.0", read as SiT's p)
    # the optimisation
    epochs: float = 400           # paper: 400 on ImageNet-1K, 500 on ImageNet-100
    warmup_epochs: float = 10.0   # linear rise of the learning rate (our choice: SiT, DINO)
    batch_size: int = 384         # global; paper: 48, read as 48 per GPU on 8 GPUs (our choice)
    lr: float = 7.5e-4            # peak (paper), times batch/256: 1.1e-3 (our choice: SiT, DINO)
    min_lr: float = 1e-6          # end of the cosine (paper)
    weight_decay: float = 0.04    # AdamW (paper); constant, not of biases and norms (our choice)
    clip: float = 3.0             # gradient norm, each tensor for itself (our choice: SiT)
    momentum: float = 0.996       # of the teacher, rising to 1 by a cosine (paper)


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """Two global crops by SiT's asymmetric recipe with the paper's jitter; local crops by MC-SSL's.
    A probability without a remark is theirs (our choice)."""
    colour = dict(jitter=(cfg.jitter, cfg.jitter, cfg.jitter, cfg.hue), jitter_p=0.8, grey_p=0.2)
    crop = dict(size=cfg.img_size, scale=(cfg.min_scale, 1.0), **colour)
    return [data.View(**crop, blur_p=cfg.blur_p),
            data.View(**crop, blur_p=0.1 * cfg.blur_p, solarize_p=0.2),      # 0.1: SiT, 0.2: paper
            data.View(cfg.local_size, scale=(0.05, 0.25), **colour, blur_p=0.5 * cfg.blur_p,
                      copies=cfg.local_crops if cfg.cls else 0)]             # 0.5: DINO


def rectangles(u, size, share, align=1):
    """GMML's region: random rectangles, one after the other, until they cover `share` of the area.

    u: (B, M, 4) uniform numbers for M candidates, share: (B,). Returns (B, size, size) bool.
    A rectangle is the outer product of a row and a column indicator, so a union is where a matrix
    product is above zero; how many it takes is found by bisection, for all images at once."""
    def randint(i, low, high):                                          # the upper end is exclusive
        return low + (u[..., i] * (high - low)).long()

    def span(start, length):                                        # (B, M) -> (B, M, size), 0/1
        end = start + (torch.minimum(length, size - start) / align).round().long() * align
        at = torch.arange(size, device=u.device)
        return ((at >= start[..., None]) & (at < end[..., None])).to(torch.bfloat16)    # exact

    longest = max(align + 1, int(0.3 * size))                          # sides are shorter than this
    top, left = (randint(i, 0, size - align) // align * align for i in (0, 1))
    rows = span(top, randint(2, align, longest)).transpose(1, 2)        # (B, size, M)
    cols = span(left, randint(3, align, longest))                       # (B, M, size)

    def union(n):                                                   # of the first n (B,) candidates
        return (rows * (torch.arange(u.shape[1], device=u.device) < n[:, None])[:, None]) @ cols > 0

    few = torch.full_like(share, -1, dtype=torch.long)                  # do not cover the share,
    many = torch.full_like(few, u.shape[1])                             # taken to cover it
    for _ in range(u.shape[1].bit_length()):
        n = (few + many) // 2
        enough = union(n).sum((1, 2)) >= share * size**2
        few, many = torch.where(enough, few, n), torch.where(enough, n, many)
    return union(many)


def corruption(index, cfg, *key):
    """What happens to the images `index` (B,) in the view and epoch named by `key`, for corrupt():
    region (B, S, S) bool, pasted (B,) bool, other (B,) row of the batch, noise (B, 3, S, S)."""
    u = rng.uniform(index, 3, *key, "kind")
    pasted = u[:, 0] < cfg.paste_p
    most = torch.where(pasted, cfg.paste_share, cfg.noise_share)
    share = most - u[:, 1] * (most - most.clamp(max=0.5))        # uniform in [min(0.5, most), most]
    candidates = rng.uniform(index, (255, 4), *key, "rectangles")       # cover 0.85 of the area
    region = rectangles(candidates, cfg.img_size, share, cfg.align)
    row = torch.arange(len(index), device=index.device)
    # 1 .. G-1 rows on: never itself (our choice; in GMML it may be, and then nothing changes)
    shift = 1 + (u[:, 2] * (cfg.group - 1)).long()
    other = row // cfg.group * cfg.group + (row + shift) % cfg.group
    return region, pasted, other, rng.normal(index, (3, *region.shape[1:]), *key, "noise")


def corrupt(x, region, pasted, other, noise):
    """(B, 3, S, S) normalised -> a copy, its region filled with noise or another intact image."""
    fill = torch.where(pasted[:, None, None, None], x[other], noise)
    return torch.where(region[:, None], fill, x)


# --------------------------------------------------------------------------------------------------
# Model and loss
# --------------------------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers without bias, a batch norm after each, ReLU between; the last norm has neither
    scale nor shift, so over a batch every feature has mean 0 and variance 1 (our choice: MoCo v3;
    the paper: 3 layers)."""
    layers = []
    for n, m in zip(widths, widths[1:-1]):
        layers += [nn.Linear(n, m, bias=False), distributed.BatchNorm(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False),
                         distributed.BatchNorm(widths[-1], affine=False))


class Network(nn.Module):
    """Backbone and heads (paper, Fig. 3); one final norm serves all heads (our choice: SiT)."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                cfg.num_heads, pos=cfg.pos, init=cfg.init,
                                drop_path=cfg.drop_path)
        D, hidden, C = cfg.embed_dim, cfg.hidden, cfg.out_dim
        self.head_cls = mlp(D, hidden, hidden, C) if cfg.cls else None
        self.head_pat = mlp(D, hidden, hidden, C) if cfg.pat else None
        self.head_rec = nn.Sequential(               # 3 layers (paper); GELU, no norm: our choice
            nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, 3 * cfg.patch_size**2)) if cfg.rec else None

    def forward(self, x, crops=None, drop=None, drop_crops=None):
        """x: (V*B, 3, S, S), crops: (L*B, 3, s, s) or None, drop: noise of the drop path.
        Returns class ((V+L)*B, C), patches (V*B, N, C), pixels (V*B, 3, S, S), each None without
        its head. Batch norms see all views at once (our choice: SiT; with local crops: DINO)."""
        cls, patches = self.backbone.split(self.backbone(x, drop=drop))      # (V*B, D), (V*B, N, D)
        if crops is not None:                                                # class token only
            local, _ = self.backbone.split(self.backbone(crops, drop=drop_crops))
            cls = torch.cat([cls, local])                                    # ((V+L)*B, D)
        q = self.head_cls(cls) if self.head_cls else None
        Q = self.head_pat(patches) if self.head_pat else None                # each patch is a row
        pixels = unpatchify(self.head_rec(patches)) if self.head_rec else None
        return q, Q, pixels


def unpatchify(patches):
    """(B, N, p*p*3) -> (B, 3, S, S)."""
    n, p = math.isqrt(patches.shape[1]), math.isqrt(patches.shape[2] // 3)
    x = patches.unflatten(2, (p, p, 3)).unflatten(1, (n, n))                 # (B, n, n, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def rec_loss(pixels, target, region, count=None):
    """Mean absolute error over the corrupted pixels and channels (our choice: SiT, GMML). Eq. 1
    divides by all P pixels: this times the corrupted share, 0.52 on average, and times 3 if its
    norm adds the channels up.
    pixels, target: (B, 3, S, S), region: (B, S, S). `count`: to divide by, if not this region's.
    The target is the augmented, normalised view before its corruption; its patches are not
    normalised one by one (our choice: SiT, GMML)."""
    count = region.sum() if count is None else count
    return ((pixels.float() - target).abs().sum(1) * region).sum() / (3 * count).clamp(min=1)


def cls_loss(q, k, tau, first=0):
    """InfoNCE across views (eq. 3). q: (V+L, B, C) of the student, global views first;
    k: (V, B', C) of the teacher, B' the images of all processes (our choice: MoCo v3, SiT), ours
    from `first` on. Mean over the 2(1+L) pairs v != g: to cross views is our choice (SiT, MoCo v3;
    Fig. 3: "across views"). SiT and MoCo v3 add both directions, times 2 tau; eq. 3 does not."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    label = torch.arange(first, first + q.shape[1], device=q.device)
    return torch.stack([F.cross_entropy(q[v] / tau @ k[g].T, label)          # logits (B, B')
                        for g in range(len(k)) for v in range(len(q)) if v != g]).mean()


def pat_loss(Q, K, tau, group):
    """InfoNCE among patches (eq. 2). Q, K: (V*B, N, C) of student (corrupted) and teacher (intact),
    same views. The positive is the same patch, the negatives are all patches of the other images of
    its group, in one view of one process (our choice). Other patches of the same image are neither:
    pushing them away would tear objects apart. All patches count, corrupted or not (eq. 2; iBOT
    counts the masked ones)."""
    N = Q.shape[1]
    image = torch.arange(group, device=Q.device).repeat_interleave(N)
    patch = torch.arange(group * N, device=Q.device)
    neither = (image[:, None] == image) & (patch[:, None] != patch)          # (G*N, G*N)
    Q, K = (F.normalize(z.float(), dim=-1).view(-1, group * N, z.shape[-1]) for z in (Q, K))
    return torch.stack([F.cross_entropy((q / tau @ k.T).masked_fill_(neither, -torch.inf), patch)
                        for q, k in zip(Q, K)]).mean()


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    B = cfg.batch_size // run.world                                          # of this process
    if cfg.accumulate > 1:
        raise ValueError("MMC contrasts the images of a batch: micro-batches would change the "
                         "result; leave out --accumulate and use a smaller --batch-size")
    if cfg.group < 2 or B % cfg.group:
        raise ValueError(f"--group {cfg.group}: MMC contrasts an image with others of its group: "
                         f"2 or more, and a divisor of the {B} images of a process")
    if not cfg.noise_share <= 0.8 >= cfg.paste_share:
        raise ValueError("--noise-share and --paste-share: 0.8 of the area is the most")
    if not 1 <= cfg.align <= cfg.img_size / 6:
        raise ValueError(f"--align {cfg.align}: 1 to a sixth of --img-size, or the rectangles do "
                         f"not reach their share of the area")
    if cfg.local_crops and cfg.local_size % cfg.patch_size:
        raise ValueError("--local-size must be a multiple of --patch-size")
    if not cfg.tau > 0:
        raise ValueError("--tau is a temperature: above 0")
    if not (cfg.rec or cfg.cls or cfg.pat):
        raise ValueError("--rec, --cls and --pat are all 0: nothing to learn")

    loader, bank, queries = run.data(views(cfg))         # the last two: for the kNN accuracy only

    student = run.place(Network(cfg))
    teacher = run.place(Network(replace(cfg, drop_path=0.0, rec=0.0)).requires_grad_(False))
    ema_update(teacher, student, 0.0)                                     # they begin equal
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, opt=opt)
    total, warmup = run.length(loader), round(cfg.warmup_epochs * len(loader))
    peak_lr = cfg.lr * cfg.batch_size / 256

    for step, batch in run.steps(loader):
        lr = cosine(step, total, peak_lr, cfg.min_lr, warmup)
        momentum = cosine(step, total, cfg.momentum, 1.0)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        when = cfg.seed, batch.epoch
        how = [corruption(batch.index, cfg, *when, v) for v in range(2)]
        seen = torch.cat([corrupt(x, *h) for x, h in zip(batch.views, how)])  # (2B, 3, S, S)
        region = torch.cat([region for region, *_ in how])                   # (2B, S, S)
        intact = torch.cat(batch.views[:2])                                  # (2B, 3, S, S)
        crops = torch.cat(batch.views[2:]) if batch.views[2:] else None      # (L*B, 3, s, s)
        drop = rng.uniform(batch.index, (2 + cfg.local_crops, 2 * cfg.depth), *when, "drop")
        drop = drop.transpose(0, 1).flatten(0, 1)                            # ((2+L)*B, 2*depth)

        with run.autocast():
            with torch.no_grad():
                k, K, _ = teacher(intact)        # in training mode: its own batch statistics (SiT)
            q, Q, pixels = student(seen, crops, drop[:2 * B], drop[2 * B:])

        parts = {}                            # fp32 from here on (on a GPU: products in TF32)
        if cfg.rec:              # divided alike everywhere: the mean of processes is one of pixels
            count = distributed.all_mean(region.sum().float())
            parts["rec"] = rec_loss(pixels, intact, region, count)
        if cfg.cls:
            k = distributed.all_gather(k.float().unflatten(0, (2, B)).transpose(0, 1))  # (B', 2, C)
            q = q.unflatten(0, (-1, B))                                      # (2+L, B, C)
            parts["cls"] = cls_loss(q, k.transpose(0, 1), cfg.tau, first=run.rank * B)
        if cfg.pat:
            parts["pat"] = pat_loss(Q, K, cfg.tau, cfg.group)
        loss = sum(getattr(cfg, name) * part for name, part in parts.items())        # eq. 4

        run.backward(loss, opt, clip=cfg.clip, per_tensor=True)
        opt.step(), opt.zero_grad()
        ema_update(teacher, student, momentum)                            # with the new weights
        # ---- bookkeeping ---------------------------------------------------------------------

        run.log(loss=loss, **parts, lr=lr)
        if run.due(cfg.evals):
            found = run.knn(teacher.backbone, bank, queries, cfg.img_size)
            run.log(now=True, **found)
            with run.looking():
                show(run, cfg, distributed.unwrap(student), teacher, queries)
            # a small spread (1: all over the sphere, 0: one point) is enough for the batch norms,
            # as long as cls falls
            chance = math.log(cfg.batch_size)
            if cfg.cls and found.get("spread", 1) < 0.05 and parts["cls"] > 0.98 * chance:
                run.say(f"collapsed: all class tokens look alike (spread near 0), and cls is not "
                        f"below {chance:.2f}, the cost of knowing nothing; try a lower --lr or "
                        f"more --warmup-epochs")
        if run.save_due():
            run.save_encoder(teacher.backbone, branch="teacher", heads={
                name: head.state_dict() for name, head in
                (("cls", teacher.head_cls), ("pat", teacher.head_pat)) if head})
            run.save()


@torch.no_grad()
def show(run, cfg, student, teacher, images, n=8):
    """picture.png: the intact view, what the student sees, what it paints back, and how alike
    the teacher finds each patch and the central one (cosine: the paper's one-patch prompt)."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    region, *fill = corruption(index, replace(cfg, group=len(x)), "picture")
    corrupted = corrupt(x, region, *fill)
    columns = {"intact": x, "corrupted": corrupted}
    student.eval()
    with run.autocast():
        _, _, pixels = student(corrupted)
        _, patches = teacher.backbone.split(teacher.backbone(x))
    student.train()
    if cfg.rec:
        columns["painted back"] = torch.where(region[:, None], pixels.float(), x)
    columns = {title: augment.denormalize(z) for title, z in columns.items()}
    z = F.normalize(patches.float(), dim=-1)                                 # (n, N, D)
    side = math.isqrt(z.shape[1])
    alike = z @ z[:, side // 2 * (side + 1), :, None]                        # (n, N, 1)
    alike = F.interpolate(alike.view(-1, 1, side, side), cfg.img_size)[:, 0]
    run.picture({**columns, "like the centre": visualize.heat_map(alike)})


if __name__ == "__main__":
    config.main(main)
