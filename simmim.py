"""SimMIM: a simple framework for masked image modelling (Xie et al., 2022, arXiv 2111.09886).

Hide a random 60 % of the image, in coarse blocks of 32 x 32 pixels; put one learned mask token in
the place of every hidden patch; run *all* patches through a plain ViT; let one linear layer predict
the raw pixels. No tokenizer, no decoder, no second view, no teacher.

    image -- patches -- mask token for -- ViT over -- Linear -- pixels    L1 on the hidden ones
                        hidden ones       all patches
                                                  (one branch: the gradient is stopped nowhere)

    L = mean over hidden pixels and colours of |x - y|                             (section 3.4)

x is the normalised image (not per patch, as MAE's target is), y what was painted.

Blocks matter: single patches of 16 pixels are guessed from their neighbours, while 32 pixels, or a
high ratio, force the network to look far (Fig. 3, Table 1). Compared with MAE the mask tokens go
through the encoder, so that a step costs more, and the last blocks act as the decoder: probe the
mean patch token (the class token has no loss), for a linear probe that of block 8 of 12, or
fine-tune. The paper reports for ViT-B, 800 epochs: 83.8 fine-tuned, 56.7 by linear probe (Table 6).
full.pt beside encoder.pt holds all in the names of the published file.

The ViT is BEiT's: no absolute positions, one table of relative ones shared by all blocks, layer
scale, no key bias. The table begins at zero: a fresh network takes the patches for a set.

Where paper and released configuration differ we follow the latter: learning rate 1e-4 for every 512
images, constant after the warm-up, a tenth from 7/8 of the run on (paper: 8e-4 for a batch of 2048,
and for ViT-B a cosine). We do not copy that its first two steps run at the same rate, nor the 1e-5
it adds to the number of hidden pixels.

    python simmim.py                                       minutes on a laptop, offline
    torchrun --nproc_per_node=8 simmim.py --data imagenet  the paper's ViT-B/16 (not run by us)
"""
import math
import re
from dataclasses import dataclass

import torch
from torch import nn

import data
import vit
from lib import augment, config, distributed, rng
from lib.run import Run, param_groups, set_lr

# B images, N = n x n patches, G x G blocks of the mask, D width, S pixels


@dataclass
class Config:
    # the network (paper, Table 6: ViT-B/16)
    img_size: int = 224           # pixels (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 768          # width (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 12           # attention heads (paper)
    layer_scale: float = 0.1      # every branch begins so small (official code); 0: as it is
    drop_path: float = 0.1        # stochastic depth, in pretraining, too (official code)
    # the mask
    mask_block: int = 32          # pixels: one draw hides or shows so large a square (paper)
    mask_ratio: float = 0.6       # share of the blocks, rounded up: 30 of 49 (paper)
    # the view
    min_scale: float = 0.67       # least area of the crop (paper)
    # the optimisation
    epochs: float = 800           # (paper)
    warmup_epochs: float = 10.0   # linear rise of the learning rate (code; paper, ViT-B: 20)
    batch_size: int = 2048        # global (paper)
    lr: float = 1e-4              # times batch/512, where others have 256 (code)
    warmup_lr: float = 5e-7       # where the rise begins, times batch/512 (code)
    drop_at: float = 0.875        # share of the run after which the rate is a tenth (code: 700/800)
    weight_decay: float = 0.05    # AdamW (paper); mask token and table, too, not class token (code)
    clip: float = 5.0             # norm of the gradient (code)


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """One crop, flipped or not; no colour is touched."""
    return [data.View(cfg.img_size, scale=(cfg.min_scale, 1.0), interpolation="bilinear")]


def block_mask(u, ratio, times):
    """u: (B, G, G) uniform numbers. Hides the ceil(ratio G*G) blocks with the smallest, so as many
    in every image; a block is times x times patches. Returns (B, n, n) bool, True: hidden."""
    rank = u.flatten(1).argsort(dim=1, stable=True).argsort(1)  # stable: the same on every device
    blocks = (rank < math.ceil(ratio * rank.shape[1])).view_as(u)
    return enlarge(blocks, times)


def enlarge(mask, times):
    """(B, n, n) -> (B, n*times, n*times), every entry repeated."""
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


def draw_mask(index, cfg, *key):
    """Which patches are hidden of the images `index` (B,) in the epoch named by `key`."""
    G = cfg.img_size // cfg.mask_block
    u = rng.uniform(index, (G, G), *key, "mask")
    return block_mask(u, cfg.mask_ratio, cfg.mask_block // cfg.patch_size)


# --------------------------------------------------------------------------------------------------
# Model and loss
# --------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Backbone, mask token, and the one-layer decoder (paper, Fig. 1)."""

    def __init__(self, cfg):
        super().__init__()
        D, p = cfg.embed_dim, cfg.patch_size
        self.backbone = vit.ViT(cfg.img_size, p, D, cfg.depth, cfg.num_heads, pos="none",
                                rel_pos="shared", layer_scale=cfg.layer_scale or None,
                                qkv_bias="split", drop_path=cfg.drop_path, init="beit")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        # a Linear on each patch; PixelShuffle lays 3pp numbers out as colours of p x p pixels
        self.decoder = nn.Sequential(nn.Conv2d(D, 3 * p * p, 1), nn.PixelShuffle(p))

    def forward(self, x, mask, drop=None):
        """x: (B, 3, S, S), mask: (B, n, n) bool, drop: noise of the drop path -> (B, 3, S, S)."""
        tokens = self.backbone(x, mask=mask.flatten(1), mask_token=self.mask_token, drop=drop)
        _, patches = self.backbone.split(tokens)                             # (B, N, D)
        return self.decoder(patches.transpose(1, 2).unflatten(2, mask.shape[1:]))


def official(net):
    """The state dict of the network in the names of the published file."""
    def rename(key):
        key = re.sub(r"ls([12])\.gamma", r"gamma_\1", key.replace("backbone.", "encoder."))
        return key.replace("mask_token", "encoder.mask_token")

    return {rename(key): x for key, x in net.state_dict().items()}


def rec_loss(pixels, target, hidden):
    """Mean absolute error over hidden pixels and colours (section 3.4).
    pixels, target: (B, 3, S, S); hidden: (B, S, S) bool."""
    return ((pixels.float() - target).abs().sum(1) * hidden).sum() / (3 * hidden.sum())


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedule(step, total, warmup, cfg):
    """Learning rate: a line up, constant, then a tenth."""
    scale = cfg.batch_size / 512
    if step < warmup:
        return scale * (cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / warmup)
    return scale * cfg.lr * (0.1 if step >= cfg.drop_at * total else 1.0)


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    if cfg.mask_block < 1 or cfg.img_size % cfg.mask_block or cfg.mask_block % cfg.patch_size:
        raise ValueError(f"--mask-block {cfg.mask_block}: blocks must tile the image of "
                         f"{cfg.img_size} pixels, and patches of {cfg.patch_size} the blocks")
    blocks = (cfg.img_size // cfg.mask_block) ** 2
    if not (0 < cfg.mask_ratio < 1 and math.ceil(cfg.mask_ratio * blocks) < blocks):
        raise ValueError(f"--mask-ratio {cfg.mask_ratio}: of the {blocks} blocks of an image at "
                         f"least one must be hidden and one stay")

    loader, bank, queries = run.data(views(cfg))         # the last two: for the kNN accuracy only

    model = run.place(Network(cfg))
    net = distributed.unwrap(model)
    groups = param_groups(net, cfg.weight_decay, spare=("cls_token",))
    opt = torch.optim.AdamW(groups, fused=True)
    run.restore(model=model, opt=opt)
    total, warmup = run.length(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr = schedule(step, total, warmup, cfg)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        for part in run.micro_batches(batch):
            x, = part.views                                                  # (B, 3, S, S)
            when = cfg.seed, part.epoch
            mask = draw_mask(part.index, cfg, *when)                         # (B, n, n)
            drop = rng.uniform(part.index, 2 * cfg.depth, *when, "drop")
            with run.autocast():
                pixels = model(x, mask, drop)
            hidden = enlarge(mask, cfg.patch_size)                           # (B, S, S)
            loss = rec_loss(pixels, x, hidden)                               # in fp32
            run.backward(loss, opt, clip=cfg.clip)
            run.log(loss=loss, lr=lr)
        opt.step(), opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.due(cfg.evals):
            visible = x.masked_fill(hidden[:, None], torch.nan)
            flat = rec_loss(visible.nanmean((2, 3), keepdim=True), x, hidden)
            run.log(now=True, flat=flat, **run.knn(net.backbone, bank, queries, cfg.img_size))
            with run.looking():
                show(run, cfg, net, queries)
            if loss > flat:
                run.say("paints no better than the mean colour of what is visible (loss above "
                        "flat): too early, or try another --lr")
        if run.save_due():
            run.save_encoder(net.backbone, full=official(net), branch="base")
            run.save()


@torch.no_grad()
def show(run, cfg, net, images, n=8):
    """picture.png: test images, what is left of them, and what the network paints in the gaps."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    mask = draw_mask(index, cfg, "picture")
    hidden = enlarge(mask, cfg.patch_size)[:, None]
    net.eval()
    with run.autocast():
        pixels = net(x, mask)
    net.train()
    columns = {"image": x, "masked": x * ~hidden, "painted": torch.where(hidden, pixels.float(), x)}
    run.picture({title: augment.denormalize(z) for title, z in columns.items()})


if __name__ == "__main__":
    config.main(main)
