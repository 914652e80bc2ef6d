"""SimMIM: a simple framework for masked image modeling (Xie et al., 2022, arXiv 2111.09886).

Mask a random 60% of the image, in squares of 32 x 32 pixels; replace every masked patch by one
learned mask token; run *all* patches through a plain ViT. There is no tokenizer, no second view, no
teacher, and no separate transformer decoder: one linear layer predicts the raw pixels.

    image -- patches -- mask token for -- ViT on -- Linear -- pixels    L1 on the masked ones
                        masked ones       all patches
                                                  (one branch: no gradient is stopped)

    L = mean over masked pixels and colors of |x - y|                              (section 3.4)

x is the normalized image (not normalized by patch, as MAE's target is), y the reconstruction.

The size of the squares matters: single patches of 16 pixels are predicted from their neighbors;
squares of 32 pixels, or a high ratio, force the network to use distant patches (Fig. 3, Table 1).
(The default run, on toy, masks single patches: larger squares are not better there.) Compared with
MAE, the mask tokens go through the encoder, so a step costs more, and the last blocks act as the
decoder: probe the mean patch token (the class token has no loss), in a linear probe that of block 8
of 12, or fine-tune. The paper reports for ViT-B, 800 epochs: 83.8 fine-tuned, 56.7 by a linear
probe (Table 6). full.pt, next to encoder.pt, holds all weights, under the names of the published
file.

The ViT is that of BEiT's released ImageNet-22k models: no absolute positions, one table of relative
position biases shared by all blocks, layer scale, no key bias. The table starts at zero: before
training the network cannot tell positions apart. (The short default run adds fixed positions and
starts from Xavier weights, without layer scale and drop path; --pos none --init beit --layer-scale
0.1 --drop-path 0.1 is the published network.)

Where the paper and the released configuration differ, we follow the configuration: a learning rate
that is constant after the warmup, 4e-4 at batch 2048, and a tenth of that after 7/8 of the run
(paper: 8e-4 at batch 2048, and for ViT-B a cosine). We do not copy that the first two steps of the
official code have the same learning rate, nor the 1e-5 that it adds to the number of masked pixels,
nor that it clips gradients after each micro-batch.

    python simmim.py                                       minutes on a laptop, offline
    torchrun --nproc_per_node=8 simmim.py --data imagenet  released ViT-B/16 setup (not run by us)
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import data
import vit
from lib import augment, checkpoints, config, rng, visualize
from lib.config import Fraction, Positive, Size
from lib.distributed import unwrap
from lib.run import Run, param_groups, set_lr

# B images of a process's micro-batch, N = h x w patches, D width, S image side, p patch side;
# mask: (B, h, w), of patches; masked_pixels: (B, S, S), the same mask of pixels


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/simmim.yaml overrides them per data set (default: toy)."""
    # the network (paper, Table 6: ViT-B/16)
    img_size: Size = 224            # image side in pixels (paper)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 768           # encoder width, D (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    pos: Literal["none", "sincos_row"] = "none"   # absolute position embeddings, beside the
                                    # relative ones (paper: none; sincos_row, fixed: our choice)
    layer_scale: float = 0.1        # initial scale of residual branches (code); 0: off
    init: Literal["beit", "moco"] = "beit"        # initial weights, see lib/weights.py (code: beit)
    drop_path: Fraction = 0.1       # stochastic depth, also in pretraining (code)
    # the mask
    mask_patch_size: Size = 32      # side of the masked squares in pixels (paper)
    mask_ratio: Fraction = 0.6      # fraction of squares masked, rounded up: 30 of 49 (paper)
    # the view
    crop_min: Fraction = 0.67       # smallest crop area, fraction of the image (paper)
    # the optimization
    epochs: Positive = 800          # epochs (paper)
    warmup_epochs: float = 10.0     # linear warmup from --warmup-lr (code; paper, ViT-B: 20)
    batch_size: Size = 2048         # global batch size (paper)
    lr: float = 1e-4                # base learning rate; the peak is lr * batch/512 (code)
    warmup_lr: float = 5e-7         # first learning rate of the warmup, times batch/512 (code)
    lr_drop_at: Fraction = 0.875    # fraction of the run after which lr is a tenth (code: 700/800)
    weight_decay: float = 0.05      # AdamW's (paper); also of mask token and bias table, not of
                                    # the class token (code)
    clip_grad: float = 5.0          # max norm of the gradient (code); 0: no clipping

    def __post_init__(self):
        config.check_bounds(self)
        if self.img_size % self.mask_patch_size or self.mask_patch_size % self.patch_size:
            raise ValueError(f"--mask-patch-size {self.mask_patch_size} must divide --img-size "
                             f"{self.img_size} and be a multiple of --patch-size {self.patch_size}")
        squares = (self.img_size // self.mask_patch_size)**2
        if not 0 < math.ceil(self.mask_ratio * squares) < squares:
            raise ValueError(f"--mask-ratio {self.mask_ratio}: of the {squares} squares of an "
                             f"image at least one must be masked and one visible")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """Crop and flip, without color augmentation."""
    return [data.View(cfg.img_size, scale=(cfg.crop_min, 1.0), interpolation="bilinear")]


def square_mask(u, ratio, times):
    """u: (B, h, w) uniform numbers, one for each square of times x times patches. Masks the
    ceil(ratio h*w) squares with the smallest numbers, the same number in every image. Returns
    (B, h*times, w*times) bool, True: masked."""
    rank = u.flatten(1).argsort(dim=1, stable=True).argsort(1)  # stable: the same on every device
    squares = (rank < math.ceil(ratio * rank.shape[1])).view_as(u)
    return enlarge(squares, times)


def enlarge(mask, times):
    """(B, h, w) -> (B, h*times, w*times), every entry repeated."""
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


def draw_mask(index, cfg, *key):
    """Masks (B, h, w) bool of the images `index` (B,). key: seed and epoch, or "visualization"."""
    side = cfg.img_size // cfg.mask_patch_size
    u = rng.uniform(index, (side, side), *key, "mask")
    return square_mask(u, cfg.mask_ratio, cfg.mask_patch_size // cfg.patch_size)


# ---- Model and loss ------------------------------------------------------------------------------


class Network(nn.Module):
    """Backbone, mask token, and the linear layer that predicts pixels (paper, Fig. 1)."""

    def __init__(self, cfg):
        super().__init__()
        D, p = cfg.embed_dim, cfg.patch_size
        self.backbone = vit.ViT(cfg.img_size, p, D, cfg.depth, cfg.num_heads, pos=cfg.pos,
                                rel_pos="shared", layer_scale=cfg.layer_scale or None,
                                qkv_bias="split", drop_path=cfg.drop_path, resize="size",
                                init=cfg.init)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        # A Linear on each patch; PixelShuffle arranges its 3pp outputs as colors of p x p pixels.
        self.decoder = nn.Sequential(nn.Conv2d(D, 3 * p * p, 1), nn.PixelShuffle(p))

    def forward(self, x, mask, drop=None):
        """x: (B, 3, S, S), mask: (B, h, w) bool, drop: (B, 2*depth) random numbers that decide the
        drop path. Returns pixels (B, 3, S, S)."""
        tokens = self.backbone(x, mask=mask.flatten(1), mask_token=self.mask_token, drop=drop)
        _, patches = self.backbone.split(tokens)                             # (B, N, D)
        return self.decoder(patches.transpose(1, 2).unflatten(2, mask.shape[1:]))


def rec_loss(pixels, target, masked):
    """Mean absolute error over masked pixels and channels (section 3.4).
    pixels, target: (B, 3, S, S); masked: (B, S, S) bool."""
    return ((pixels - target).abs().sum(1) * masked).sum() / (3 * masked.sum())


# ---- Train ---------------------------------------------------------------------------------------


def schedule(step, total, warmup, cfg):
    """Learning rate of a step: linear warmup, then constant, then a tenth."""
    scale = cfg.batch_size / 512
    if step < warmup:
        return scale * (cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / warmup)
    return scale * cfg.lr * (0.1 if step >= cfg.lr_drop_at * total else 1.0)


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation

    model = run.place(Network(cfg))
    net = unwrap(model)
    run.init_encoder(net.backbone, full=checkpoints.simmim_names(net))       # with --init-from
    groups = param_groups(net, cfg.weight_decay, no_decay=("cls_token",))
    opt = torch.optim.AdamW(groups, fused=True)
    run.restore(model=model, opt=opt)
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr = schedule(step, total, warmup, cfg)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        for part in run.micro_batches(batch):
            x, = part.views                                                  # (B, 3, S, S)
            # A new random mask in each epoch: the same image is a new problem each time.
            mask = draw_mask(part.index, cfg, cfg.seed, part.epoch)          # (B, h, w)
            drop = rng.uniform(part.index, 2 * cfg.depth, cfg.seed, part.epoch, "drop")
            with run.autocast():
                pixels = model(x, mask, drop)                                # (B, 3, S, S)
            # From here on in fp32. Only masked pixels have a loss: the visible ones are in the
            # input, and copying them teaches nothing.
            masked_pixels = enlarge(mask, cfg.patch_size)                    # (B, S, S)
            loss = rec_loss(pixels.float(), x, masked_pixels)
            (loss / cfg.accum_iter).backward()
            run.log(loss=loss)
        # clip_grad_norm_ adds 1e-6 to the norm; 0: no clipping
        grad_norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_grad or math.inf)
        run.log(lr=lr, grad_norm=grad_norm)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            visible = x.masked_fill(masked_pixels[:, None], torch.nan)
            mean_color = rec_loss(visible.nanmean((2, 3), keepdim=True), x, masked_pixels)
            run.log(loss_mean_color=mean_color)
            run.log(**visualize.evaluate(run, net.backbone, bank, queries))
            with run.evaluation(net):
                save_visualization(run, cfg, net, queries)
            visualize.warn_of_mean_color(run, loss, mean_color, "loss", "another --lr")
        if run.save_due:
            run.save_encoder(net.backbone, full=checkpoints.simmim_names(net), branch="base")
            run.save()


def save_visualization(run, cfg, net, images, n=8):
    """visualization.png: the image, its visible pixels, the reconstruction."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    mask = draw_mask(index, cfg, "visualization")
    masked_pixels = enlarge(mask, cfg.patch_size)[:, None]
    with run.autocast():
        pixels = net(x, mask)
    columns = {"image": x, "visible": x * ~masked_pixels,
               "reconstruction": torch.where(masked_pixels, pixels.float(), x)}
    visualize.save_grid(run, {title: augment.denormalize(z) for title, z in columns.items()})


if __name__ == "__main__":
    config.main(main)
