"""MoBY: momentum contrast with a queue and a predictor (Xie et al., 2021, arXiv 2105.04553).

The name joins MoCo v2 and BYOL. As in MoCo v2, a query should be more similar to the key of the
other view of its image than to a queue of keys of earlier images; keys are computed by a teacher,
the moving average of the student. Because of the queue, the number of negatives does not depend on
the batch size; in MoCo v3 it does. As in BYOL, the student has a predictor that the teacher lacks,
the two views are augmented differently, and each is query and key. New is one more asymmetry, for
Transformers: the student drops residual branches at random (drop path), the teacher never does.

    view 1 -+- student  -> class -> projector  -> predictor -> q1      InfoNCE with k2, queue of k2
            +- teacher* -> class -> projector* --------------> k1
    view 2 -+- student  -> class -> projector  -> predictor -> q2      InfoNCE with k1, queue of k1
            +- teacher* -> class -> projector* --------------> k2
         * exponential moving average of the student's weights; no gradient, no drop path
         after the loss k1 and k2 are appended to their queues, the oldest keys are dropped

    L = ctr(q1, k2, Q2) + ctr(q2, k1, Q1)
    ctr(q, k, Q) = mean over images i of
                   -log e^(q_i.k_i/tau) / (e^(q_i.k_i/tau) + sum over keys j of e^(q_i.Q_j/tau))

All q, k are L2-normalized. The negatives of a query are the keys in the queue of the other view,
not the other keys of its batch, nor other queries. At chance level L = 2 ln(1 + queue size): 16.6
for 4096. At first the queue holds random vectors, from which a key is easily distinguished; the
loss may rise until queue size / batch size steps have filled it.

The paper (ImageNet, linear probe, 300 epochs): DeiT-S 72.8, where MoCo v3 and DINO without local
crops have 72.5; Swin-T 75.0. The images of a batch are not negatives of each other, so a batch of
512 suffices.

Where the paper differs from the official code, or does not specify a detail, we follow the code:
the teacher is updated before the keys are computed, not after the step; batch norm only within the
heads, not behind their last layer; after the warmup the learning rate continues on the cosine that
began at step 0. We do not copy that the code's learning rate is one step late, that its queues
differ between processes at first (with PyTorch 2.1 or later), and that a resumed run starts again
with the first momentum.

    python moby.py                                       minutes on a laptop, offline
    python moby.py --drop-path 0.1                       with the asymmetry that is new, which the
                                                         short run on toy leaves out
    python moby.py --backbone swin_micro                 a small Swin instead of the ViT
    torchrun --nproc_per_node=8 moby.py --data imagenet  the paper's DeiT-S/16 (not run by us)
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, rng, swin, visualize
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import BatchNorm, all_gather, unwrap
from lib.run import Run, cosine, ema_update, param_groups, set_lr

# B images per process, batch_size of all processes, N patches, D width, S image side,
# out_dim width of queries and keys


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/moby.yaml overrides them per data set (default: toy)."""
    # the network (paper: DeiT-S/16, Swin-T)
    backbone: Literal["vit", "swin_tiny", "swin_micro"] = "vit"    # vit: the sizes below (paper);
                                    # swin_tiny (paper); swin_micro: for small images (our choice)
    img_size: Size = 224            # side of a view in pixels (paper)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 384           # encoder width (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 6             # attention heads (paper); MoCo v3's ViT-S has 12
    pos: Literal["learned", "sincos_row"] = "learned"  # position embeddings (paper);
                                                       # sincos_row, fixed: our choice
    init: Literal["trunc", "moco"] = "trunc"  # initial weights of the backbone; trunc: normal, std
                                              # 0.02 (code); moco: Xavier uniform (our choice)
    drop_path: Fraction = 0.2       # rate of stochastic depth, student only (code)
    mlp_dim: Size = 4096            # hidden width of projector and predictor (code)
    out_dim: Size = 256             # width of queries and keys (code)
    # the objective
    temperature: Positive = 0.2     # tau (code)
    queue_size: Size = 4096         # keys in the queue of each view (code); choose at most an
                                    # eighth of the images, or it often holds the query's own image
    momentum_teacher: Fraction = 0.99      # EMA momentum, increased to 1 by a cosine (paper)
    # the views
    crop_min: Fraction = 0.08       # smallest area of a crop (code)
    color_jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (code)
    blur_p: Fraction = 1.0          # probability of blur in view 1; view 2: a tenth of it (code:
                                    # BYOL's)
    # the optimization
    epochs: Positive = 300          # epochs (paper)
    warmup_epochs: float = 5.0      # linear warmup from --warmup-lr (code)
    batch_size: Several = 512       # global batch size (paper)
    lr: float = 1e-3                # base learning rate; the peak is lr * batch/512 (code)
    warmup_lr: float = 5e-7         # first learning rate of the warmup, times batch/512 (code)
    min_lr: float = 5e-6            # final learning rate, times batch/512 (code)
    weight_decay: float = 0.05      # AdamW's (code); not for biases, norm layers (code)
    clip_grad: float = 5.0          # max norm of the gradient (code); 0: no clipping

    def __post_init__(self):
        if self.backbone in swin.SIZES:
            swin.set_sizes(self)
        config.check_bounds(self)
        if self.accum_iter > 1:
            raise ValueError("MoBY's batch norms see all images of a batch: micro-batches would "
                             "change the result; leave out --accum-iter and use a smaller "
                             "--batch-size")
        if self.queue_size < self.batch_size:
            raise ValueError(f"--queue-size {self.queue_size} must hold the keys of a batch, at "
                             f"least --batch-size {self.batch_size}")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """BYOL's asymmetric pair (official code): view 1 is always blurred (at the default blur_p),
    view 2 rarely, and sometimes solarized."""
    crop = dict(size=cfg.img_size, scale=(cfg.crop_min, 1.0), interpolation="bilinear",
                jitter=cfg.color_jitter, jitter_p=0.8, gray_p=0.2)
    return [data.View(**crop, blur_p=cfg.blur_p),
            data.View(**crop, blur_p=0.1 * cfg.blur_p, solarize_p=0.2)]


# ---- Model and loss ------------------------------------------------------------------------------


def mlp(n, hidden, out):
    """Two linear layers with a batch norm and a ReLU between; the output is not normalized."""
    return nn.Sequential(nn.Linear(n, hidden), BatchNorm(hidden), nn.ReLU(),
                         nn.Linear(hidden, out))


class Network(nn.Module):
    """Backbone, projector and, in the student only, predictor and drop path."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        D, hidden, out = cfg.embed_dim, cfg.mlp_dim, cfg.out_dim
        drop_path = 0.0 if teacher else cfg.drop_path
        if cfg.backbone == "vit":
            self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, D, cfg.depth, cfg.num_heads,
                                    pos=cfg.pos, init=cfg.init, drop_path=drop_path, resize="size")
        else:
            self.backbone = swin.make_swin(cfg.backbone, cfg.img_size, drop_path=drop_path)
        self.projector = mlp(D, hidden, out)
        self.predictor = nn.Identity() if teacher else mlp(out, hidden, out)

    def forward(self, x1, x2, drop=None):
        """Two views, each (B, 3, S, S) -> [q1, q2], each (B, out_dim). The backbone processes both
        views in one batch, the heads one view at a time: batch statistics do not mix the views.
        drop: (2B, 2*depth), the random numbers for drop path. A Swin has no class token: the mean
        patch token takes its place."""
        cls, patches = self.backbone.split(self.backbone(torch.cat([x1, x2]), drop=drop))
        cls = patches.mean(1) if cls is None else cls                        # (2B, D)
        return [self.predictor(self.projector(z)) for z in cls.chunk(2)]


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


def contrastive_loss(q, k, queue, tau):
    """InfoNCE. q: (B, out_dim) of the student; k: (B, out_dim) of the teacher, of the other view;
    queue: (queue_size, out_dim), earlier keys of that view, L2-normalized. The negatives are those
    of the queue only, not the other keys of the batch."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    positive = (q * k).sum(-1, keepdim=True)                         # (B, 1)
    logits = torch.cat([positive, q @ queue.T], 1) / tau             # (B, 1 + queue_size)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


# ---- Train ---------------------------------------------------------------------------------------


def schedules(step, total, warmup, cfg):
    """Learning rate: linear warmup, then the rest of half a cosine that began at step 0. Momentum:
    half a cosine up to 1."""
    lr = (cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / warmup if step < warmup else
          cosine(step, total, cfg.lr, cfg.min_lr))
    return lr * cfg.batch_size / 512, cosine(step, total, cfg.momentum_teacher, 1.0)


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    run.init_encoder(unwrap(student).backbone)                               # with --init-from
    ema_update(teacher, student, 0.0)                                        # equal at the start
    queue = Queue(cfg.queue_size, cfg.out_dim).to(run.device)               # equal in all processes
    opt = torch.optim.AdamW(param_groups(student, cfg.weight_decay), fused=True)
    run.restore(student=student, teacher=teacher, queue=queue, opt=opt)
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr, momentum = schedules(step, total, warmup, cfg)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        drop = rng.uniform(batch.index, (2, 2 * cfg.depth), cfg.seed, batch.epoch, "drop")
        drop = drop.transpose(0, 1).flatten(0, 1)        # (2B, 2*depth), two branches per block

        # Keys come from a slowly changing network: those in the queue are from earlier steps, and
        # would not fit together if it changed as fast as the student.
        ema_update(teacher, student, momentum)
        with run.autocast():
            q1, q2 = student(*batch.views, drop)
            with torch.no_grad():
                k1, k2 = teacher(*batch.views)       # train mode: statistics of the batch
        k1, k2 = k1.float(), k2.float()                                      # (B, out_dim)
        # Each view has a queue of its own: keys that are augmented differently from the positive
        # would be easy to tell apart from it.
        loss = (contrastive_loss(q1.float(), k2, queue.keys[1], cfg.temperature) +
                contrastive_loss(q2.float(), k1, queue.keys[0], cfg.temperature))

        loss.backward()
        # clip_grad_norm_ adds 1e-6 to the norm; 0: no clipping
        grad_norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip_grad or math.inf)
        run.log(loss=loss, lr=lr, grad_norm=grad_norm)
        opt.step()
        opt.zero_grad()
        queue.append(all_gather(k1), all_gather(k2))                 # keys of the global batch
        # ---- bookkeeping ---------------------------------------------------------------------

        net = unwrap(student)                # the one to evaluate and save (code), not the teacher
        if run.eval_due:
            found = visualize.evaluate(run, net.backbone, bank, queries, "bilinear")
            run.log(**found)
            with run.evaluation(net.backbone):
                save_visualization(run, net.backbone, batch.views, q1, k2)
            visualize.warn_of_equal_tokens(run, found.get("feat_std", 1), "loss", loss,
                                           2 * math.log(1 + cfg.queue_size))
        if run.save_due:
            heads = {name: getattr(net, name).state_dict() for name in ("projector", "predictor")}
            run.save_encoder(net.backbone, branch="base", heads=heads, interpolation="bilinear")
            run.save()


def save_visualization(run, backbone, pair, q1, k2, n=8):
    """visualization.png: the two views; the attention of the class token in view 1 (last block,
    mean of the heads; a Swin has none); the second view, among those of this process, whose key is
    most similar to the query of view 1."""
    x1, x2 = pair[0][:n], pair[1]
    columns = {"view 1": augment.denormalize(x1), "view 2": augment.denormalize(x2[:n])}
    if backbone.num_prefix:
        attention = visualize.last_attention(run, backbone, x1)
        columns["attention"] = visualize.attention_map(attention, run.cfg.img_size)
    nearest = (F.normalize(q1[:n].float(), dim=-1) @ F.normalize(k2, dim=-1).T).argmax(1)
    visualize.save_grid(run, columns | {"most similar": augment.denormalize(x2[nearest])})


if __name__ == "__main__":
    config.main(main)
