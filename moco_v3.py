"""MoCo v3: momentum contrast for Vision Transformers (Chen, Xie and He, 2021, arXiv 2104.02057).

Every image gives two random views. A student turns a view into a query; a teacher, the moving
average of the student, turns the other view into a key (the paper's encoder f_q and momentum
encoder f_k). The query must be more similar to the key of its own image than to the keys of all
other images of the batch. There is no queue: the other images of a large batch are the negatives.

    view 1 -+- student --- class - projector --- predictor - q1      InfoNCE with k2
            +- teacher* -- class - projector* -------------- k1
    view 2 -+- student --- class - projector --- predictor - q2      InfoNCE with k1
            +- teacher* -- class - projector* -------------- k2
              * exponential moving average of the student's weights; no gradient
    the patch projection, the first layer of both, keeps its random initial weights

    L = ctr(q1, k2) + ctr(q2, k1)                                                 (Algorithm 1)
    ctr(q, k) = 2 tau mean over images i of
                -log e^(q_i.k_i/tau) / sum over images j of e^(q_i.k_j/tau)       (eq. 1)

All q, k are L2-normalized; the factor 2 tau compensates for the 1/tau of the gradient. At chance
level L = 4 tau ln(batch size): 6.65 for 4096 images.

What the paper found: ViTs train unstably this way. Nothing diverges; the kNN curve dips and some
accuracy is lost, the more the larger batch and learning rate. The gradient spikes first in the
first layer, so that layer is frozen: 71.7 -> 73.4 (section 4.2, ViT-B, 100 epochs; linear probe).
ViT-S / ViT-B, 300 epochs: 72.5 / 76.5 (Table 4); without predictor 75.5; without momentum, which is
the SimCLR* of Park et al. (2023), 74.3 (section 6.2).

Where the paper differs from the official code, or is silent, we follow the code: the teacher is
updated before the keys, not after the step (the same keys); its momentum increases to 1 (paper: for
ResNets only); weight decay applies to every parameter, biases and norms, too. The ConvStem is left
out.

    python moco_v3.py                                       minutes on a laptop, offline
    python moco_v3.py --momentum-teacher 0                  SimCLR*
    torchrun --nproc_per_node=8 moco_v3.py --data imagenet  the paper's ViT-B/16 (not run by us)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, visualize
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import BatchNorm, all_gather, unwrap
from lib.run import Run, cosine, ema_update, grad_norm, set_lr

# B images of a process, batch_size of all processes, N patches, D width, S image side,
# out_dim width of queries and keys


@dataclass
class Config(config.Settings):
    # the network (paper, section 5: ViT-B/16)
    img_size: Size = 224            # pixels, side of a view (paper)
    patch_size: Size = 16           # pixels (paper)
    embed_dim: Size = 768           # width of the backbone (paper); ViT-S: 384
    depth: Size = 12                # blocks (paper)
    num_heads: Size = 12            # attention heads; in ViT-S, too (official code), not DeiT's 6
    stop_grad_conv1: bool = True    # the patch projection stays random (paper, section 4.2)
    mlp_dim: Size = 4096            # width inside projector and predictor (paper); small data: 256
    out_dim: Size = 256             # width of queries and keys (paper)
    # the objective
    temperature: Positive = 0.2     # tau (paper); the official script's default is a ResNet's
    momentum_teacher: Fraction = 0.99      # increasing to 1 (paper; code); 0 stays 0: SimCLR*
    # the views
    crop_min: Fraction = 0.08       # smallest area of a crop (official code, for ViTs)
    color_jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (code)
    blur_p: Fraction = 1.0          # blur of view 1; of view 2 a tenth (code: BYOL's)
    # the optimization
    epochs: float = 300             # (paper)
    warmup_epochs: float = 40.0     # linear increase of the learning rate from 0 (paper)
    batch_size: Several = 4096      # global (paper)
    lr: float = 1.5e-4              # peak, times batch/256 (paper, with the frozen projection)
    weight_decay: float = 0.1       # AdamW, on every parameter (paper; code)

    def __post_init__(self):
        config.check_bounds(self)
        if self.accum_iter > 1:
            raise ValueError("MoCo v3 contrasts the images of a batch: micro-batches would change "
                             "the result; leave out --accum-iter and use a smaller --batch-size")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """BYOL's asymmetric pair: view 1 is always blurred, view 2 rarely, but sometimes solarized."""
    crop = dict(size=cfg.img_size, scale=(cfg.crop_min, 1.0), interpolation="bilinear",
                jitter=cfg.color_jitter, jitter_p=0.8, gray_p=0.2)
    return [data.View(**crop, blur_p=cfg.blur_p),
            data.View(**crop, blur_p=0.1 * cfg.blur_p, solarize_p=0.2)]


# ---- Model and loss ------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers without bias, a batch norm after each, ReLU between; the last norm has neither
    scale nor shift, so over a batch every feature has mean 0 and variance 1."""
    layers = []
    for n, m in zip(widths, widths[1:-1]):
        layers += [nn.Linear(n, m, bias=False), BatchNorm(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False),
                         BatchNorm(widths[-1], affine=False))


class Network(nn.Module):
    """Backbone, projector and, in the student only, predictor (paper, section 3)."""

    def __init__(self, cfg, teacher=False):
        super().__init__()
        D, hidden, out = cfg.embed_dim, cfg.mlp_dim, cfg.out_dim
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, D, cfg.depth, cfg.num_heads,
                                pos="sincos_row", resize="size", init="moco")
        self.backbone.patch_embed.requires_grad_(not cfg.stop_grad_conv1)    # weight and bias
        self.projector = mlp(D, hidden, hidden, out)
        self.predictor = nn.Identity() if teacher else mlp(out, hidden, out)

    def forward(self, x1, x2):
        """Two views, each (B, 3, S, S) -> two (B, out_dim). They share the backbone's batch, but
        not the heads': a batch norm over both views would be another method (SimCLR's)."""
        cls, _ = self.backbone.split(self.backbone(torch.cat([x1, x2])))     # (2B, D)
        return [self.predictor(self.projector(z)) for z in cls.chunk(2)]


def contrastive_loss(q, k, tau, first=0):
    """InfoNCE times 2 tau (eq. 1). q: (B, out_dim) of the student; k: (batch_size, out_dim) of the
    teacher, of the other view, from all processes; ours begin at row `first`. Queries are never
    compared with queries, nor with keys of their own view."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    label = torch.arange(first, first + len(q), device=q.device)
    return 2 * tau * F.cross_entropy(q @ k.T / tau, label)           # logits (B, batch_size)


# ---- Train ---------------------------------------------------------------------------------------


def schedules(step, total, warmup, cfg):
    """Learning rate: up from 0, then half a cosine down to 0. Momentum: half a cosine up to 1."""
    lr = cosine(step, total, cfg.lr * cfg.batch_size / 256, 0.0, warmup)
    return lr, cosine(step, total, cfg.momentum_teacher, 1.0) if cfg.momentum_teacher else 0.0


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for kNN only

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    ema_update(teacher, student, 0.0)               # equal at the start, frozen projection included
    params = [p for p in student.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, weight_decay=cfg.weight_decay, fused=True)
    run.restore(student=student, teacher=teacher, opt=opt)
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))
    B = cfg.batch_size // run.world
    first = run.rank * B                             # our rows among the keys of all processes

    for step, batch in run.steps(loader):
        lr, momentum = schedules(step, total, warmup, cfg)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        # Keys come from a slowly changing network: a target that changed as fast as the student
        # would make the task inconsistent from step to step.
        ema_update(teacher, student, momentum)                               # before the keys
        with run.autocast():
            q1, q2 = student(*batch.views)
            with torch.no_grad():
                k1, k2 = teacher(*batch.views)       # in training mode: its own batch statistics
        # The keys of all processes are negatives: more of them make a harder task.
        k1, k2 = (all_gather(k.float()) for k in (k1, k2))           # (batch_size, out_dim)
        loss = (contrastive_loss(q1, k2, cfg.temperature, first) +
                contrastive_loss(q2, k1, cfg.temperature, first))

        loss.backward()
        run.log(loss=loss, lr=lr, grad_norm=grad_norm(student))      # never clipped (official code)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        net = unwrap(student)
        if run.eval_due:
            found = visualize.knn(run, net.backbone, bank, queries)
            run.log(**found)
            with run.evaluation():
                save_visualization(run, net.backbone, batch.views, q1, k2[first:first + B])
            visualize.warn_of_equal_tokens(run, found.get("feat_std", 1), "loss", loss,
                                           4 * cfg.temperature * math.log(cfg.batch_size))
        if run.save_due:
            heads = {name: getattr(net, name).state_dict() for name in ("projector", "predictor")}
            run.save_encoder(net.backbone, branch="base", heads=heads, interpolation="bilinear")
            run.save()


def save_visualization(run, backbone, pair, q1, k2, n=8):
    """visualization.png: two views as the networks see them; the attention of the class token in
    view 1 (last block, mean of the heads); the view 2 in this batch whose key is the most similar
    to the query of view 1."""
    x1, x2 = pair[0][:n], pair[1]
    attention = visualize.last_attention(run, backbone, x1)
    nearest = (F.normalize(q1[:n].float(), dim=-1) @ F.normalize(k2, dim=-1).T).argmax(1)
    visualize.save_grid(run, {
        "view 1": augment.denormalize(x1), "view 2": augment.denormalize(x2[:n]),
        "attention": visualize.attention_map(attention, run.cfg.img_size),
        "most similar": augment.denormalize(x2[nearest])})


if __name__ == "__main__":
    config.main(main)
