"""MMC: Masked Momentum Contrastive learning (Wu et al., 2023, arXiv 2308.11448).

One student, three tasks. It sees a corrupted image (random rectangles replaced by noise or by
parts of another image); a teacher, the moving average of the student, sees the same image intact.
The student must
  REC  reconstruct the corrupted pixels         -> patches of one object become similar
  PAT  match each of its patches with the teacher's token of the same patch, among the
       patches of *other* images                -> objects are separated
  CLS  match its class token with the teacher's class token of the *other view* of the
       same image, among those of other images  -> semantics, which PAT passes on to the patches

    view v -+- corrupted -> student -+- patches -> h_rec -> pixels   L1 on the corrupted pixels
            |                        +- patches -> h_pat -> Q_v      InfoNCE with K_v, same patch
            |                        +- class   -> h_cls -> q_v      InfoNCE with k_g, g != v
            +- intact ---> teacher* -+- patches -> h_pat* -> K_v
                                     +- class   -> h_cls* -> k_v
    local crops, intact -> student -+- class   -> h_cls -> q_v too
              * exponential moving average of the student's weights; no gradient

    L     = L_rec + L_pat + L_cls                                                      (eq. 4)
    L_rec = mean over corrupted pixels of |x - h_rec(f_s(x'))|     (eq. 1, normalizer: our choice)
    L_pat = mean over patches i of
            -log e^(Q_i.K_i/tau) / (e^(Q_i.K_i/tau) + sum over patches j of other images
                                                               of e^(Q_i.K_j/tau))     (eq. 2)
    L_cls = mean over pairs of views of -log e^(q.k/tau) / sum over images of e^(q.k'/tau)  (eq. 3)

All Q, K, q, k are L2-normalized, and there is no predictor (our choice: SiT has none).

The paper (Table 4: ViT-S, ImageNet-100, 200 epochs; kNN on class token / on the mean patch token):
REC alone 17.2 / 14.7, CLS alone 75.0 / 63.9, CLS + REC 72.5 / 53.7, CLS + PAT 75.6 / 75.5, all
three 77.5 / 77.0: PAT improves the patch tokens, REC helps only together with both others.

No code of the authors was found. What the paper leaves open is marked "our choice" where it is
decided, with the related method that decides it: SiT, GMML, MC-SSL (shared authors), MoCo v3, DINO,
iBOT. So are a patch projection that is trained (SiT; MoCo v3 freezes it), and the teacher as the
network that is evaluated and saved (DINO, iBOT).

    python mmc.py                                         minutes on a laptop, offline
    python mmc.py --lambda-rec 0 --lambda-patch 0         CLS alone, as in Table 4
    torchrun --nproc_per_node=8 mmc.py --data imagenet    the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, rng, visualize
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import BatchNorm, all_gather, all_mean, unwrap
from lib.run import Run, cosine, ema_update, param_groups, set_lr

# B images of a process, V = 2 global views, n_local local crops, N patches, D width, out_dim width
# of queries and keys, group_size images of a group, S and s side of a global and a local crop;
# Q, q: patches and class token of the student, K, k: of the teacher


Area = Annotated[float, (0, 0.8)]       # fraction of an image; 255 random rectangles cover 0.85


@dataclass
class Config(config.Settings):
    # the network (paper, Implementation Details: ViT-B/16, for ImageNet-100 ViT-S/16)
    img_size: Size = 224            # pixels, side of a global view (paper)
    patch_size: Size = 16           # pixels (paper)
    embed_dim: Size = 768           # width of the backbone (paper)
    depth: Size = 12                # blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    pos: Literal["learned", "sincos_row"] = "learned"     # positions (our choice: SiT)
    init: Literal["trunc", "moco"] = "trunc"      # normal 0.02 (our choice: SiT) or Xavier
    drop_path: Fraction = 0.1       # stochastic depth, student only (our choice: SiT)
    mlp_dim: Size = 4096            # width inside the heads, 3-layer MLPs (paper); small data: 256
    out_dim: Size = 256             # width of h_cls and h_pat (our choice: MoCo v3, SiT)
    # the objective
    lambda_rec: float = 1.0         # weight of L_rec (paper, eq. 4); 0 removes a term and its head
    lambda_cls: float = 1.0         # weight of L_cls (paper, eq. 4); SiT: 2 directions x 2 tau = .8
    lambda_patch: float = 1.0       # weight of L_pat (paper, eq. 4)
    temperature: Positive = 0.2     # tau of both contrastive losses (paper)
    group_size: Several = 48        # images whose patches are contrasted, and pasted (our choice:
                                    # the paper's batch; logits grow as (group_size * N)^2)
    # the corruption: the paper's 75 % and 30 % "of the masked blocks", 35 % of the images, read as
    # fractions of the area, as in GMML's script (our choice: literally they do not add up)
    noise_ratio: Area = 0.75        # noise: area (paper); above 0.5: uniform from there (GMML)
    paste_ratio: Area = 0.3         # paste: area covered from another image (paper)
    paste_prob: Fraction = 0.35     # fraction of images, view by view, that are pasted into (paper)
    drop_align: int = 1             # pixels, grid of the rectangles (our choice: SiT, GMML)
    # the views
    global_crops_scale: tuple = (0.25, 1.0)   # area of a global crop (our choice: MC-SSL; without
                                              # local crops: from 0.2, SiT)
    local_crops_scale: tuple = (0.05, 0.25)   # area of a local crop (our choice: MC-SSL)
    local_crops_number: int = 10    # n_local, intact, for the student (our choice: MC-SSL; the
                                    # paper: "without masking for the teacher", and no number)
    local_crops_size: Size = 96     # pixels, side of a local crop (our choice: MC-SSL, DINO)
    color_jitter: tuple = (0.4, 0.4, 0.4, 0.0)    # brightness, contrast, saturation (paper); hue
                                                  # (paper: not listed; related methods: 0.1)
    blur_p: Fraction = 1.0          # blur of view 1; of view 2 a tenth, of local crops half
                                    # (paper: "strength of 1.0", read as SiT's p)
    # the optimization
    epochs: float = 400             # paper: 400 on ImageNet-1K, 500 on ImageNet-100
    warmup_epochs: float = 10.0     # linear increase of the learning rate (our choice: SiT, DINO)
    batch_size: Size = 384          # global; paper: 48, read as 48 per GPU on 8 GPUs (our choice)
    lr: float = 7.5e-4              # peak (paper), times batch/256: 1.1e-3 (our choice: SiT, DINO)
    min_lr: float = 1e-6            # end of the cosine (paper)
    weight_decay: float = 0.04      # AdamW (paper); constant, not of biases and norms (our choice)
    clip_grad: float = 3.0          # max gradient norm of each tensor (our choice: SiT); 0: off
    momentum_teacher: Fraction = 0.996     # of the teacher, increasing to 1 by a cosine (paper)

    def __post_init__(self):
        config.check_bounds(self)
        if self.accum_iter > 1:
            raise ValueError("MMC contrasts the images of a batch: micro-batches would change the "
                             "result; leave out --accum-iter and use a smaller --batch-size")
        if not 1 <= self.drop_align <= self.img_size / 6:
            raise ValueError(f"--drop-align {self.drop_align} must be 1 to a sixth of --img-size, "
                             f"or the rectangles cannot cover their fraction of the area")
        if self.local_crops_number and self.local_crops_size % self.patch_size:
            raise ValueError("--local-crops-size must be a multiple of --patch-size")
        if not (self.lambda_rec or self.lambda_cls or self.lambda_patch):
            raise ValueError("--lambda-rec, --lambda-cls and --lambda-patch are all 0: there is no "
                             "loss")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Two global crops by SiT's asymmetric recipe with the paper's jitter; local crops by MC-SSL's.
    A probability without a comment is theirs (our choice)."""
    color = dict(jitter=cfg.color_jitter, jitter_p=0.8, gray_p=0.2)
    crop = dict(size=cfg.img_size, scale=cfg.global_crops_scale, **color)
    return [data.View(**crop, blur_p=cfg.blur_p),
            data.View(**crop, blur_p=0.1 * cfg.blur_p, solarize_p=0.2),      # 0.1: SiT, 0.2: paper
            data.View(cfg.local_crops_size, scale=cfg.local_crops_scale, **color,
                      blur_p=0.5 * cfg.blur_p,                               # 0.5: DINO
                      copies=cfg.local_crops_number if cfg.lambda_cls else 0)]


def rectangles(u, size, ratio, align=1):
    """GMML's region: random rectangles, one after the other, until they cover `ratio` of the area.
    For one image, in a loop (tests/test_mmc.py runs it):

        region = torch.zeros(size, size, dtype=torch.bool)
        for u_top, u_left, u_height, u_width in u:
            if region.sum() >= ratio * size**2:
                break
            top, height = span(u_top, u_height)
            left, width = span(u_left, u_width)
            region[top:top + height, left:left + width] = True

    Here for all images at once. u: (B, candidates, 4) uniform numbers, ratio: (B,). Returns (B,
    size, size) bool. A rectangle is the outer product of a row and a column indicator, so a union
    is where a matrix product is above zero; how many rectangles it takes is found by bisection."""
    def span(u_start, u_length):       # -> start and length in pixels, both multiples of align
        longest = max(align + 1, int(0.3 * size))                       # exclusive
        start = (u_start * (size - align)).long() // align * align
        length = align + (u_length * (longest - align)).long()
        return start, (torch.minimum(length, size - start) / align).round().long() * align

    def indicator(start, length):                         # (B, candidates) -> (..., size), 0 or 1
        at, start = torch.arange(size, device=u.device), start[..., None]
        return ((at >= start) & (at < start + length[..., None])).to(torch.bfloat16)    # exact

    rows = indicator(*span(u[..., 0], u[..., 2])).transpose(1, 2)       # (B, size, candidates)
    columns = indicator(*span(u[..., 1], u[..., 3]))                    # (B, candidates, size)

    def union(n):                                             # of the first n (B,) candidates
        first = torch.arange(u.shape[1], device=u.device) < n[:, None]
        return (rows * first[:, None]) @ columns > 0

    too_few = torch.full_like(ratio, -1, dtype=torch.long)
    enough = torch.full_like(too_few, u.shape[1])
    for _ in range(u.shape[1].bit_length()):
        n = (too_few + enough) // 2
        covers = union(n).sum((1, 2)) >= ratio * size**2
        too_few, enough = torch.where(covers, too_few, n), torch.where(covers, n, enough)
    return union(enough)


def corruption(index, cfg, group_size, *key):
    """Random corruption of the images `index` (B,) in the view and epoch given by `key`, for
    corrupt(): region (B, S, S) bool, pasted (B,) bool, other (B,) row of the batch to paste from,
    noise (B, 3, S, S)."""
    u = rng.uniform(index, 3, *key, "kind")
    pasted = u[:, 0] < cfg.paste_prob
    most = torch.where(pasted, cfg.paste_ratio, cfg.noise_ratio)
    ratio = most - u[:, 1] * (most - most.clamp(max=0.5))        # uniform in [min(0.5, most), most]
    candidates = rng.uniform(index, (255, 4), *key, "rectangles")       # cover 0.85 of the area
    region = rectangles(candidates, cfg.img_size, ratio, cfg.drop_align)
    row = torch.arange(len(index), device=index.device)
    # never itself (our choice; in GMML it may be, and then nothing changes)
    shift = 1 + (u[:, 2] * (group_size - 1)).long()
    other = row // group_size * group_size + (row + shift) % group_size
    return region, pasted, other, rng.normal(index, (3, *region.shape[1:]), *key, "noise")


def corrupt(x, region, pasted, other, noise):
    """(B, 3, S, S) normalized -> a copy, its region filled with noise or another intact image."""
    fill = torch.where(pasted[:, None, None, None], x[other], noise)
    return torch.where(region[:, None], fill, x)


# ---- Model and loss ------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers without bias, a batch norm after each, ReLU between; the last norm has neither
    scale nor shift, so over a batch every feature has mean 0 and variance 1 (our choice: MoCo v3;
    the paper: 3 layers)."""
    layers = []
    for n, m in zip(widths, widths[1:-1]):
        layers += [nn.Linear(n, m, bias=False), BatchNorm(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False),
                         BatchNorm(widths[-1], affine=False))


class Network(nn.Module):
    """Backbone and heads (paper, Fig. 3); one final norm serves all heads (our choice: SiT). The
    teacher has neither drop path nor the head of L_rec."""

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
        """x: (V*B, 3, S, S); crops: (n_local*B, 3, s, s) or None; drop: random numbers that decide
        the drop path. Returns class tokens ((V+n_local)*B, out_dim), patches (V*B, N, out_dim),
        pixels (V*B, 3, S, S), each None without its head. Batch norms see all views at once (our
        choice: SiT; with local crops: DINO)."""
        cls, patches = self.backbone.split(self.backbone(x, drop=drop))      # (V*B, D), (V*B, N, D)
        if crops is not None:                                                # class token only
            local, _ = self.backbone.split(self.backbone(crops, drop=drop_crops))
            cls = torch.cat([cls, local])                                    # ((V+n_local)*B, D)
        q = self.head_cls(cls) if self.head_cls else None
        Q = self.head_patch(patches) if self.head_patch else None            # each patch is a row
        pixels = unpatchify(self.head_rec(patches)) if self.head_rec else None
        return q, Q, pixels


def unpatchify(patches):
    """(B, N, p*p*3) -> (B, 3, S, S)."""
    side, p = math.isqrt(patches.shape[1]), math.isqrt(patches.shape[2] // 3)
    x = patches.unflatten(2, (p, p, 3)).unflatten(1, (side, side))           # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def rec_loss(pixels, target, region, count=None):
    """Mean absolute error over the corrupted pixels and channels (our choice: SiT, GMML). Eq. 1
    divides by all pixels: this times the corrupted fraction, 0.52 on average, and times 3 if its
    norm sums over the channels.
    pixels, target: (B, 3, S, S), region: (B, S, S). count: corrupted pixels to divide by; default:
    this region's. The target is the augmented, normalized view before its corruption, without
    normalization by patch (our choice: SiT, GMML)."""
    count = region.sum() if count is None else count
    return ((pixels.float() - target).abs().sum(1) * region).sum() / (3 * count).clamp(min=1)


def cls_loss(q, k, tau, first=0):
    """InfoNCE across views (eq. 3). q: (V+n_local, B, out_dim) of the student, global views first;
    k: (V, batch_size, out_dim) of the teacher, from all processes (our choice: MoCo v3, SiT); ours
    begin at row `first`. Mean over the 2(1+n_local) pairs v != g: to cross views is our choice
    (SiT, MoCo v3; Fig. 3: "across views"). SiT and MoCo v3 sum both directions, times 2 tau; eq. 3
    does not."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    label = torch.arange(first, first + q.shape[1], device=q.device)
    return torch.stack([F.cross_entropy(q[v] / tau @ k[g].T, label)          # (B, batch_size)
                        for g in range(len(k)) for v in range(len(q)) if v != g]).mean()


def patch_loss(Q, K, tau, group_size):
    """InfoNCE among patches (eq. 2). Q, K: (V*B, N, out_dim) of student (corrupted) and teacher
    (intact), same views. The positive is the same patch, the negatives are all patches of the other
    images of its group, in one view of one process (our choice). Other patches of the same image
    are neither: repelling them would divide objects. All patches count, corrupted or not (eq. 2;
    iBOT counts the masked ones)."""
    N = Q.shape[1]
    image = torch.arange(group_size, device=Q.device).repeat_interleave(N)
    patch = torch.arange(group_size * N, device=Q.device)
    neither = (image[:, None] == image) & (patch[:, None] != patch)      # square, group_size * N
    Q, K = (F.normalize(z.float(), dim=-1).view(-1, group_size * N, z.shape[-1]) for z in (Q, K))
    return torch.stack([F.cross_entropy((q / tau @ k.T).masked_fill_(neither, -torch.inf), patch)
                        for q, k in zip(Q, K)]).mean()


# ---- Train ---------------------------------------------------------------------------------------


def clip_per_tensor(parameters, max_norm):
    """Scales the gradient of each tensor to norm max_norm at most (0: no clipping). Returns the
    norm of all gradients together, before clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm:
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1)))
    return norms.norm()


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    B = cfg.batch_size // run.world                                          # of this process
    if B % cfg.group_size:
        raise ValueError(f"--group-size {cfg.group_size} must divide the {B} images of a process")
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for kNN only

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
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
        when = cfg.seed, batch.epoch
        how = [corruption(batch.index, cfg, cfg.group_size, *when, v) for v in range(2)]
        x = torch.cat([corrupt(view, *h) for view, h in zip(batch.views, how)])   # (2B, 3, S, S)
        region = torch.cat([region for region, *_ in how])                   # (2B, S, S)
        intact = torch.cat(batch.views[:2])                                  # (2B, 3, S, S)
        crops = torch.cat(batch.views[2:]) if batch.views[2:] else None      # (n_local*B, 3, s, s)
        drop = rng.uniform(batch.index, (2 + cfg.local_crops_number, 2 * cfg.depth), *when, "drop")
        drop = drop.transpose(0, 1).flatten(0, 1)                    # ((2+n_local)*B, 2*depth)

        # The teacher sees what the student does not: its tokens of corrupted patches are targets
        # that can be reached only from the context.
        with run.autocast():
            with torch.no_grad():
                k, K, _ = teacher(intact)        # in training mode: its own batch statistics (SiT)
            q, Q, pixels = student(x, crops, drop[:2 * B], drop[2 * B:])

        parts = {}                               # fp32 from here on
        if cfg.lambda_rec:
            # One count for all processes: the mean of their losses is the mean over all pixels.
            count = all_mean(region.sum().float())
            parts["loss_rec"] = rec_loss(pixels, intact, region, count)
        if cfg.lambda_cls:
            k = all_gather(k.float().unflatten(0, (2, B)).transpose(0, 1))   # (batch_size, 2, ...)
            q = q.unflatten(0, (-1, B))                                      # (2+n_local, B, ...)
            parts["loss_cls"] = cls_loss(q, k.transpose(0, 1), cfg.temperature, run.rank * B)
        if cfg.lambda_patch:
            parts["loss_patch"] = patch_loss(Q, K, cfg.temperature, cfg.group_size)
        loss = (cfg.lambda_rec * parts.get("loss_rec", 0) +
                cfg.lambda_cls * parts.get("loss_cls", 0) +
                cfg.lambda_patch * parts.get("loss_patch", 0))               # eq. 4

        loss.backward()
        grad_norm = clip_per_tensor(student.parameters(), cfg.clip_grad)
        run.log(loss=loss, **parts, lr=lr, grad_norm=grad_norm)
        opt.step()
        opt.zero_grad()
        ema_update(teacher, student, momentum)                               # with the new weights
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            found = visualize.knn(run, teacher.backbone, bank, queries)
            run.log(**found)
            with run.evaluation(student):
                save_visualization(run, cfg, unwrap(student), teacher, queries)
            if cfg.lambda_cls:
                visualize.warn_of_equal_tokens(run, found.get("feat_std", 1), "loss_cls",
                                               parts["loss_cls"], math.log(cfg.batch_size))
        if run.save_due:
            run.save_encoder(teacher.backbone, branch="teacher", heads={
                name: head.state_dict() for name, head in
                (("cls", teacher.head_cls), ("patch", teacher.head_patch)) if head})
            run.save()


def save_visualization(run, cfg, student, teacher, images, n=8):
    """visualization.png: the intact view; what the student sees; the reconstruction; the similarity
    of the teacher's token of each patch with that of the central one (cosine: the paper's
    segmentation from one patch)."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    region, *fill = corruption(index, cfg, len(x), "picture")
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
    similarity = z @ z[:, side // 2 * (side + 1), :, None]                   # (n, N, 1)
    similarity = F.interpolate(similarity.view(-1, 1, side, side), cfg.img_size)[:, 0]
    columns["similarity to the center"] = visualize.heat_map(similarity)
    visualize.save_grid(run, columns)


if __name__ == "__main__":
    config.main(main)
