"""MoCo v3: momentum contrast for Vision Transformers (Chen, Xie and He, 2021, arXiv 2104.02057).

Every image gives two random views. A student turns a view into a query; a teacher, the moving
average of the student, turns the other view into a key (the paper's encoder f_q and momentum
encoder f_k). The query must pick, among the keys of all images of the batch, that of its own image.
There is no queue: the other images of a large batch are the negatives.

    view 1 -+- student --- class - projector --- predictor - q1      InfoNCE with k2
            +- teacher* -- class - projector* -------------- k1
    view 2 -+- student --- class - projector --- predictor - q2      InfoNCE with k1
            +- teacher* -- class - projector* -------------- k2
              * exponential moving average of the student's weights; no gradient
    the patch projection, the first layer of both, keeps its random initial weights for ever

    L = ctr(q1, k2) + ctr(q2, k1)                                                 (Algorithm 1)
    ctr(q, k) = 2 tau mean over images i of
                -log e^(q_i.k_i/tau) / sum over images j of e^(q_i.k_j/tau)       (eq. 1)

All q, k have length 1; the factor 2 tau makes up for the gradient's 1/tau. A network
that knows nothing has L = 4 tau ln N with N images in the batch: 6.65 for 4096.

What the paper found: ViTs train unstably this way. Nothing diverges; the kNN curve dips and some
accuracy is lost, the more the larger batch and learning rate. The gradient spikes first in the
first layer, so that layer is frozen: 71.7 -> 73.4 (section 4.2, ViT-B, 100 epochs; linear probe).
ViT-S / ViT-B, 300 epochs: 72.5 / 76.5 (Table 4); without predictor 75.5; without momentum, which is
the SimCLR* of Park et al. (2023), 74.3 (section 6.2).

Where the paper differs from the official code, or is silent, we follow the code: the teacher moves
before the keys, not after the step (the same keys); its momentum rises to 1 (paper: for ResNets
only); weight decay takes every parameter, biases and norms, too. The ConvStem is left out.

    python moco_v3.py                                       minutes on a laptop, offline
    python moco_v3.py --momentum 0                          SimCLR*
    torchrun --nproc_per_node=8 moco_v3.py --data imagenet  the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, distributed, visualize
from lib.run import Run, cosine, ema_update, set_lr

# B images of a process, N of all processes, P patches, D width, C width of contrast, S pixels


@dataclass
class Config:
    # the network (paper, section 5: ViT-B/16)
    img_size: int = 224           # pixels, side of a view (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 768          # width of the backbone (paper); ViT-S: 384
    depth: int = 12               # blocks (paper)
    num_heads: int = 12           # attention heads; in ViT-S, too (official code), not DeiT's 6
    freeze_patch: bool = True     # patch projection stays random (paper, section 4.2)
    hidden: int = 4096            # width inside projector and predictor (paper); small data: 256
    out_dim: int = 256            # C (paper)
    # the objective
    tau: float = 0.2              # temperature (paper); the official script's default is a ResNet's
    momentum: float = 0.99        # of the teacher (paper), rising to 1 (code); 0 stays 0: SimCLR*
    # the views
    min_scale: float = 0.08       # least area of a crop (official code, for ViTs)
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)   # brightness, contrast, saturation, hue (code: BYOL's)
    blur_p: float = 1.0           # blur of view 1; of view 2 a tenth (code: BYOL's)
    # the optimisation
    epochs: float = 300           # (paper)
    warmup_epochs: float = 40.0   # linear rise of the learning rate from 0 (paper)
    batch_size: int = 4096        # global (paper)
    lr: float = 1.5e-4            # peak, times batch/256 (paper, with the frozen projection)
    weight_decay: float = 0.1     # AdamW, on every parameter (paper; code)


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """BYOL's asymmetric pair: view 1 is always blurred, view 2 rarely, but sometimes solarised."""
    same = dict(size=cfg.img_size, scale=(cfg.min_scale, 1.0), interpolation="bilinear",
                jitter=cfg.jitter, jitter_p=0.8, grey_p=0.2)
    return [data.View(**same, blur_p=cfg.blur_p),
            data.View(**same, blur_p=0.1 * cfg.blur_p, solarize_p=0.2)]


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
    """Backbone, projector and, in the student only, predictor (paper, section 3)."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        D, hidden, C = cfg.embed_dim, cfg.hidden, cfg.out_dim
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, D, cfg.depth, cfg.num_heads,
                                pos="sincos_row", resize="size", init="moco")
        self.backbone.patch_embed.requires_grad_(not cfg.freeze_patch)       # weight and bias
        self.projector = mlp(D, hidden, hidden, C)
        self.predictor = nn.Identity() if teacher else mlp(C, hidden, C)

    def forward(self, x1, x2):
        """Two views, each (B, 3, S, S) -> two (B, C). They share the backbone's batch, but not the
        heads': a batch norm over both views would be another method (SimCLR's)."""
        cls, _ = self.backbone.split(self.backbone(torch.cat([x1, x2])))     # (2B, D)
        return [self.predictor(self.projector(z)) for z in cls.chunk(2)]


def contrast(q, k, tau, first=0):
    """InfoNCE times 2 tau (eq. 1). q: (B, C) of the student; k: (N, C) of the teacher, of the
    other view, from all processes; ours stand from row `first` on. Queries never meet queries, nor
    keys of their own view."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    label = torch.arange(first, first + len(q), device=q.device)
    return 2 * tau * F.cross_entropy(q @ k.T / tau, label)                   # logits (B, N)


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedules(step, total, warmup, cfg):
    """Learning rate: up from 0, then half a cosine down to 0. Momentum: half a cosine up to 1."""
    lr = cosine(step, total, cfg.lr * cfg.batch_size / 256, 0.0, warmup)
    return lr, cosine(step, total, cfg.momentum, 1.0) if cfg.momentum else 0.0


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    B = cfg.batch_size // run.world                                          # of this process
    if cfg.accumulate > 1:
        raise ValueError("MoCo v3 contrasts the images of a batch: micro-batches would change the "
                         "result; leave out --accumulate and use a smaller --batch-size")
    if not cfg.tau > 0:
        raise ValueError("--tau is a temperature: above 0")
    if cfg.batch_size < 2:
        raise ValueError("--batch-size 1 leaves no other image to contrast with: take 2 or more")

    loader, bank, queries = run.data(views(cfg))         # the last two: for the kNN accuracy only

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    ema_update(teacher, student, 0.0)              # they begin equal, frozen projection included
    params = [p for p in student.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, weight_decay=cfg.weight_decay, fused=True)
    run.restore(student=student, teacher=teacher, opt=opt)
    total, warmup = run.length(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr, momentum = schedules(step, total, warmup, cfg)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        ema_update(teacher, student, momentum)                            # before the keys
        with run.autocast():
            q1, q2 = student(*batch.views)
            with torch.no_grad():
                k1, k2 = teacher(*batch.views)       # in training mode: its own batch statistics
        k1, k2 = (distributed.all_gather(k.float()) for k in (k1, k2))          # (N, C)
        first = run.rank * B
        loss = contrast(q1, k2, cfg.tau, first) + contrast(q2, k1, cfg.tau, first)

        run.backward(loss, opt)                                              # never clipped
        opt.step(), opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        run.log(loss=loss, lr=lr)
        backbone = distributed.unwrap(student).backbone
        if run.due(cfg.evals):
            found = run.knn(backbone, bank, queries, cfg.img_size)
            run.log(now=True, **found)
            with run.looking():
                show(run, cfg, backbone, batch.views, q1, k2[first:first + B])
            # a small spread (1: all over the sphere, 0: one point) is enough for the batch norms,
            # as long as the loss falls
            chance = 4 * cfg.tau * math.log(cfg.batch_size)
            if found.get("spread", 1) < 0.05 and loss > 0.98 * chance:
                run.say(f"collapsed: all class tokens look alike (spread near 0), and the loss is "
                        f"not below {chance:.2f}, the cost of knowing nothing; try a lower --lr or "
                        f"more --warmup-epochs")
        if run.save_due():
            heads = {name: getattr(distributed.unwrap(student), name).state_dict()
                     for name in ("projector", "predictor")}
            run.save_encoder(backbone, branch="base", heads=heads, interpolation="bilinear")
            run.save()


@torch.no_grad()
def show(run, cfg, backbone, pair, q1, k2, n=8):
    """picture.png: two views as the networks see them, what the class token attends to in view 1
    (last block, mean of the heads), and the view 2 that the query of view 1 picks in this batch."""
    last, x1, x2 = cfg.depth - 1, pair[0][:n], pair[1]
    with run.autocast():
        _, maps = backbone.layers(x1, [last], attention=[last])
    attention = maps[last][:, :, 0, 1:].float().mean(1)                      # (n, P)
    side = math.isqrt(attention.shape[1])
    attention = (attention / attention.amax(1, keepdim=True)).view(-1, 1, side, side)
    pick = (F.normalize(q1[:n].float(), dim=-1) @ F.normalize(k2, dim=-1).T).argmax(1)
    run.picture({"view 1": augment.denormalize(x1), "view 2": augment.denormalize(x2[:n]),
                 "attention": visualize.heat_map(F.interpolate(attention, cfg.img_size)[:, 0]),
                 "picked": augment.denormalize(x2[pick])})


if __name__ == "__main__":
    config.main(main)
