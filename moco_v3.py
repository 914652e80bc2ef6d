"""MoCo v3: momentum contrast for Vision Transformers (Chen, Xie and He, 2021, arXiv 2104.02057).

Two random views are taken of every image. A student (the paper's encoder f_q) maps one view to a
query; a teacher (momentum encoder f_k), the moving average of the student, maps the other view to a
key. The query should be more similar to the key of its own image than to the keys of all other
images of the batch. Unlike in MoCo v1 and v2 there is no queue of keys: the negatives come from a
large batch.

    view 1 -+- student  -> class -> projector  -> predictor -> q1      InfoNCE with k2
            +- teacher* -> class -> projector* --------------> k1
    view 2 -+- student  -> class -> projector  -> predictor -> q2      InfoNCE with k1
            +- teacher* -> class -> projector* --------------> k2
         * exponential moving average of the student's weights; no gradient
         the patch projection, the first layer of both, keeps its random initial weights

    L = ctr(q1, k2) + ctr(q2, k1)                                                 (Algorithm 1)
    ctr(q, k) = 2 tau mean over images i of
                -log e^(q_i.k_i/tau) / sum over images j of e^(q_i.k_j/tau)       (eq. 1)

All q, k are L2-normalized; the factor tau cancels the 1/tau of the gradient. At chance level
L = 4 tau ln(batch size): 6.65 for 4096 images.

What the paper found: training ViTs this way is unstable. Training does not diverge, but the kNN
curve dips, and the larger the batch and the learning rate, the more accuracy is lost. The gradient
spikes first in the first layer, so that layer is frozen: 71.7 -> 73.4 (section 4.2, ViT-B, 100
epochs; linear probe). ViT-S / ViT-B, 300 epochs: 72.5 / 76.5 (Table 4); ViT-B without predictor
75.5, without momentum 74.3 (section 6.2). Park et al. (2023) call the latter SimCLR*.

Where the paper differs from the official code, or does not specify a detail, we follow the code:
the teacher is updated before the keys are computed, not after the step; its momentum increases to 1
(in the paper for ResNets only); weight decay applies to every parameter, including biases and
norms. The ConvStem is left out.

    python moco_v3.py                                       minutes on a laptop, offline
    python moco_v3.py --momentum-teacher 0                  without momentum (SimCLR*)
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

# B images per process, batch_size of all processes, N patches, D width, S image side,
# out_dim width of queries and keys


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/moco_v3.yaml overrides them per data set (default: toy)."""
    # the network (paper, section 5: ViT-B/16)
    img_size: Size = 224            # side of a view in pixels (paper)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 768           # encoder width (paper); ViT-S: 384
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 12            # attention heads (paper); ViT-S also has 12 (code)
    stop_grad_conv1: bool = True    # freeze the random patch projection (paper, section 4.2)
    mlp_dim: Size = 4096            # hidden width of projector and predictor (paper)
    out_dim: Size = 256             # width of queries and keys (paper)
    # the objective
    temperature: Positive = 0.2     # tau (paper); the official script's default is for ResNets
    momentum_teacher: Fraction = 0.99      # EMA momentum (paper), increased to 1 by a cosine
                                           # (code); 0: no momentum, constant (in the other
                                           # methods but hybrid.py 0 also increases)
    # the views
    crop_min: Fraction = 0.08       # smallest area of a crop (code, for ViTs)
    color_jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (code)
    blur_p: Fraction = 1.0          # probability of blur in view 1; view 2: a tenth of it (code:
                                    # BYOL's)
    # the optimization
    epochs: Positive = 300          # epochs (paper)
    warmup_epochs: float = 40.0     # linear warmup of the learning rate from 0 (paper)
    batch_size: Several = 4096      # global batch size (paper)
    lr: float = 1.5e-4              # base learning rate (paper, for a frozen patch projection); the
                                    # peak is lr * batch/256
    weight_decay: float = 0.1       # AdamW (paper), on every parameter (code)

    def __post_init__(self):
        config.check_bounds(self)
        if self.accum_iter > 1:
            raise ValueError("MoCo v3 contrasts the images of a batch: micro-batches would change "
                             "the result; leave out --accum-iter and use a smaller --batch-size")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """BYOL's asymmetric pair (official code): view 1 is always blurred (at the default blur_p),
    view 2 rarely, and sometimes solarized."""
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
        """Two views, each (B, 3, S, S) -> [q1, q2], each (B, out_dim). The backbone processes both
        views in one batch, the heads one view at a time: batch statistics do not mix the views."""
        cls, _ = self.backbone.split(self.backbone(torch.cat([x1, x2])))     # (2B, D)
        return [self.predictor(self.projector(z)) for z in cls.chunk(2)]


def contrastive_loss(q, k, tau, first=0):
    """InfoNCE times 2 tau (eq. 1). q: (B, out_dim) of the student; k: (batch_size, out_dim) of the
    teacher, of the other view, from all processes; the rows of this process start at `first`.
    Queries are never compared with queries, nor with keys of their own view."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    label = torch.arange(first, first + len(q), device=q.device)
    return 2 * tau * F.cross_entropy(q @ k.T / tau, label)           # logits (B, batch_size)


# ---- Train ---------------------------------------------------------------------------------------


def schedules(step, total, warmup, cfg):
    """Learning rate: linear warmup from 0, half a cosine down to 0. Momentum: half a cosine up to
    1."""
    lr = cosine(step, total, cfg.lr * cfg.batch_size / 256, 0.0, warmup)
    return lr, cosine(step, total, cfg.momentum_teacher, 1.0) if cfg.momentum_teacher else 0.0


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation

    student = run.place(Network(cfg))
    teacher = run.place(Network(cfg, teacher=True).requires_grad_(False))
    run.init_encoder(unwrap(student).backbone)                               # with --init-from
    ema_update(teacher, student, 0.0)               # equal at the start, frozen projection included
    params = [p for p in student.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, weight_decay=cfg.weight_decay, fused=True)
    run.restore(student=student, teacher=teacher, opt=opt)
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))
    B = cfg.batch_size // run.world
    first = run.rank * B                # where the keys of this process start among all keys

    for step, batch in run.steps(loader):
        lr, momentum = schedules(step, total, warmup, cfg)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        # Keys come from a slowly changing network: a target that changed as fast as the student
        # would make the task inconsistent from step to step.
        ema_update(teacher, student, momentum)
        with run.autocast():
            q1, q2 = student(*batch.views)
            with torch.no_grad():
                k1, k2 = teacher(*batch.views)       # train mode: statistics of the batch
        # The keys of all processes are compared: more negatives make a harder task.
        k1, k2 = (all_gather(k.float()) for k in (k1, k2))           # (batch_size, out_dim)
        loss = (contrastive_loss(q1.float(), k2, cfg.temperature, first) +
                contrastive_loss(q2.float(), k1, cfg.temperature, first))

        loss.backward()
        run.log(loss=loss, lr=lr, grad_norm=grad_norm(student))      # never clipped (official code)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        net = unwrap(student)                # the one to evaluate and save (code), not the teacher
        if run.eval_due:
            found = visualize.evaluate(run, net.backbone, bank, queries, "bilinear")
            run.log(**found)
            with run.evaluation(net.backbone):
                save_visualization(run, net.backbone, batch.views, q1, k2[first:first + B])
            visualize.warn_of_equal_tokens(run, found.get("feat_std", 1), "loss", loss,
                                           4 * cfg.temperature * math.log(cfg.batch_size))
        if run.save_due:
            heads = {name: getattr(net, name).state_dict() for name in ("projector", "predictor")}
            run.save_encoder(net.backbone, branch="base", heads=heads, interpolation="bilinear")
            run.save()


def save_visualization(run, backbone, pair, q1, k2, n=8):
    """visualization.png: the two views; the attention of the class token in view 1 (last block,
    mean of the heads); the second view, among those of this process, whose key is most similar to
    the query of view 1."""
    x1, x2 = pair[0][:n], pair[1]
    columns = {"view 1": augment.denormalize(x1), "view 2": augment.denormalize(x2[:n])}
    attention = visualize.last_attention(run, backbone, x1)
    columns["attention"] = visualize.attention_map(attention, run.cfg.img_size)
    nearest = (F.normalize(q1[:n].float(), dim=-1) @ F.normalize(k2, dim=-1).T).argmax(1)
    visualize.save_grid(run, columns | {"most similar": augment.denormalize(x2[nearest])})


if __name__ == "__main__":
    config.main(main)
