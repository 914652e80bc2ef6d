"""BEiT: BERT pretraining of image Transformers (Bao et al., ICLR 2022, arXiv 2106.08254).

BERT for images. A frozen tokenizer turns the image into a grid of tokens, one for each patch, with
ids below K. About 40% of the patches are masked, in blocks: a learned mask token replaces them. A
ViT runs on the whole sequence, and a linear layer predicts the id of the token at each masked
patch. Predicting tokens instead of pixels spends no capacity on the finest detail; masking blocks
instead of single patches leaves no neighbor to copy from.

    crop -+- 224 px -- patches -- mask token for -- ViT on -- Linear -- logits of masked patches
          |                       masked ones       all patches                 | cross-entropy
          +- 112 px -- tokenizer (frozen, no gradient) -- ids ------------------+

    L = - mean over masked patches i of log softmax(W h_i + b)[y_i]             (section 2.3)

h is the output of the last LayerNorm, y the ids; visible patches have no loss. At the start L is
about ln K. The best possible head that ignores its input has as loss the entropy of the masked
tokens and as accuracy the frequency of the most frequent one (logged as token_entropy and
token_max_freq): the network has learned something only if `loss` is below the first and `mlm_acc`
above the second.

The paper: ViT-B/16, 800 epochs: 83.2 fine-tuned, 56.7 by a linear probe of block 9 of 12 (others
measured 41.8 at the last block, which predicts tokens). 300 epochs: block masks 82.86 on ImageNet
and 44.65 on ADE20K, random patches 82.77 and 42.93; pixels instead of tokens 81.04 on ImageNet.

We follow the ImageNet-1K model, which has learned positions. The released 22K weights have instead
one table of relative position biases shared by all blocks, and layer scale: --pos none
--rel-pos-bias --layer-scale 0.1; they need images normalized by mean and standard deviation 0.5.
The paper masks more than 40% of the patches; the official code, and ours, at most 75 of 196. Unlike
the code, we jitter colors after the crop, not before; take the mean of the loss over the masked
patches of all processes, not of each process; and end the warmup one step later.

    python beit.py                                         minutes on a laptop, offline
    torchrun --nproc_per_node=8 beit.py --data imagenet --tokenizer encoder.pkl    (not run by us)
"""
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import config, rng, tokenizer, visualize
from lib.config import Fraction, Positive, Several, Size
from lib.distributed import all_mean, unwrap
from lib.run import Run, cosine, param_groups, set_lr

# B images of a process's micro-batch, N = side x side patches, total_masked masked patches of these
# images together, D width, K codes, S image side


@dataclass
class Config(config.Settings):
    """ImageNet's settings; configs/beit.yaml overrides them per data set (default: toy)."""
    # the network (paper, section 3: ViT-B/16)
    img_size: Size = 224            # image side in pixels (paper)
    patch_size: Size = 16           # pixels per patch side (paper)
    embed_dim: Size = 768           # encoder width, D (paper)
    depth: Size = 12                # encoder blocks (paper)
    num_heads: Size = 12            # attention heads (paper)
    pos: Literal["learned", "none", "sincos_row"] = "learned"     # positions (paper; 22K: none)
    rel_pos_bias: bool = False      # one relative position bias for all blocks (22K weights)
    layer_scale: float = 0.0        # initial scale of residual branches (22K weights: 0.1); 0: off
    init: Literal["beit", "moco"] = "beit"        # initial weights, see lib/weights.py (code: beit)
    drop_path: Fraction = 0.1       # stochastic depth: rate of the last block (paper)
    # the tokenizer, see lib/tokenizer.py; without a file it is trained once and saved
    tokenizer: str = ""             # tokenizer file: DALL-E's encoder.pkl (paper); empty: train one
    tokenizer_kind: Literal["vq", "dvae"] = "vq"   # kind to train; dvae as DALL-E's (our choice)
    tokenizer_steps: Size = 10000   # steps of the tokenizer's training (our choice)
    vocab_size: Several = 8192      # codes of a trained tokenizer (paper; smaller data: our choice)
    second_input_size: Size = 112   # side of the tokenizer's view in pixels (code)
    # the mask
    num_mask_patches: Size = 75     # masked patches per image, at most (paper: about 40% of 196)
    min_mask_patches_per_block: Size = 16  # smallest block in patches (paper)
    # the view
    crop_min: Fraction = 0.08       # smallest crop area, fraction of the image (code)
    color_jitter: tuple = (0.4, 0.4, 0.4, 0.0)   # brightness, contrast, saturation, hue (code)
    # the optimization
    epochs: Positive = 800          # epochs (paper)
    warmup_epochs: float = 10.0     # linear warmup of the learning rate from 0 (paper)
    batch_size: Size = 2048         # global batch size (paper: 2k)
    lr: float = 1.5e-3              # peak learning rate, not scaled by the batch (paper)
    min_lr: float = 1e-5            # final learning rate of the cosine (code)
    weight_decay: float = 0.05      # AdamW's (paper); not of vectors, class token, positions (code)
    clip_grad: float = 3.0          # max norm of the gradient (code); 0: no clipping

    def __post_init__(self):
        config.check_bounds(self)
        tokenizer.check_settings(self)
        side = self.img_size // self.patch_size
        N = side**2
        if not self.min_mask_patches_per_block <= self.num_mask_patches < N:
            raise ValueError(f"--num-mask-patches {self.num_mask_patches} must be at least "
                             f"--min-mask-patches-per-block {self.min_mask_patches_per_block}, and "
                             f"below the {N} patches of an image")
        if round(math.sqrt(self.min_mask_patches_per_block)) >= side:
            raise ValueError(f"--min-mask-patches-per-block {self.min_mask_patches_per_block}: no "
                             f"square block of so many patches is smaller than {side} x {side}, "
                             f"all patches of an image; choose fewer")
        if self.pos == "none" and not self.rel_pos_bias:
            raise ValueError("--pos none: add --rel-pos-bias, or the network cannot tell positions "
                             "apart")


# ---- Views ---------------------------------------------------------------------------------------


def views(cfg):
    """The same crop in two sizes: for the network, and for the tokenizer."""
    crop = dict(scale=(cfg.crop_min, 1.0))
    if any(cfg.color_jitter):
        crop |= dict(jitter=cfg.color_jitter, jitter_p=1.0)
    return [data.View(cfg.img_size, **crop),
            data.View(cfg.second_input_size, **crop, interpolation="lanczos", like=0)]


def block_mask(u, side, num_mask_patches, min_patches):
    """Masks rectangles in a grid of side x side patches, one after the other, until
    num_mask_patches are masked or ten attempts in a row have failed (official code; ours masks at
    least one rectangle). An attempt fails if height or width of the rectangle is 0 or reaches that
    of the grid, or if it adds no patches or too many. u: (attempts, 4) uniform numbers for area,
    aspect ratio, top and left. Returns (side, side) bool, True: masked."""
    mask = np.zeros((side, side), bool)                          # in a loop faster than torch
    n_masked, failed = 0, 0
    for u_area, u_aspect, u_top, u_left in u:
        remaining = num_mask_patches - n_masked
        if remaining == 0 or n_masked and failed >= 10:
            break
        area = min_patches + (remaining - min_patches) * u_area
        aspect = 0.3 ** (1 - 2 * u_aspect)                       # log-uniform from 0.3 to 1/0.3
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failed += 1
        if 0 < h < side and 0 < w < side:
            top, left = int(u_top * (side - h + 1)), int(u_left * (side - w + 1))
            block = mask[top:top + h, left:left + w]
            added = h * w - int(block.sum())                     # the rest is already masked
            if 0 < added <= remaining:
                block[:] = True
                n_masked, failed = n_masked + added, 0
    return torch.from_numpy(mask)


def draw_mask(index, cfg, *key):
    """Masks (B, N) bool, on the CPU, of the images `index`. key: seed and epoch, or
    "visualization"."""
    side = cfg.img_size // cfg.patch_size
    u = rng.uniform(index, (100, 4), *key, "mask").tolist()      # 1500 masks: at most 32 attempts
    return torch.stack([block_mask(v, side, cfg.num_mask_patches, cfg.min_mask_patches_per_block)
                        for v in u]).flatten(1)


# ---- Model and loss ------------------------------------------------------------------------------


class Network(nn.Module):
    """Backbone, mask token, and the linear layer that predicts tokens."""

    def __init__(self, cfg, K):
        super().__init__()
        D = cfg.embed_dim
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, D, cfg.depth, cfg.num_heads,
                                pos=cfg.pos, rel_pos="shared" if cfg.rel_pos_bias else None,
                                layer_scale=cfg.layer_scale or None, qkv_bias="split",
                                drop_path=cfg.drop_path, resize="size", init=cfg.init)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.lm_head = nn.Linear(D, K)
        for weight in (self.mask_token, self.lm_head.weight):
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, x, mask, drop=None):
        """x: (B, 3, S, S), mask: (B, N) bool, drop: (B, 2*depth) random numbers for the drop path.
        Returns the logits (total_masked, K) of masked patches, image by image in raster order."""
        tokens = self.backbone(x, mask=mask, mask_token=self.mask_token, drop=drop)
        _, patches = self.backbone.split(tokens)                             # (B, N, D)
        return self.lm_head(patches[mask])


def token_loss(logits, ids, count):
    """Cross-entropy, summed over masked patches and divided by count. logits: (total_masked, K),
    ids: (total_masked,)."""
    return F.cross_entropy(logits, ids, reduction="sum") / count


# ---- Train ---------------------------------------------------------------------------------------


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    loader, bank, queries = data.training_sets(run, views(cfg))  # bank, queries: for evaluation
    with torch.device("meta"):   # rejects impossible settings before a tokenizer is trained
        Network(cfg, 1)
    tok = tokenizer.get_tokenizer(cfg, run, loader.images, queries, views(cfg)[1])      # frozen

    model = run.place(Network(cfg, tok.vocab_size))
    net = unwrap(model)
    run.init_encoder(net.backbone)                                           # with --init-from
    groups = param_groups(net, cfg.weight_decay, no_decay=("cls_token", "pos_embed"))
    opt = torch.optim.AdamW(groups, fused=True)
    counts = tokenizer.TokenCounts(tok.vocab_size).to(run.device)           # of masked patches
    run.restore(model=model, opt=opt, counts=counts, tokenizer=tokenizer.Fingerprint(tok))
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr = cosine(step, total, cfg.lr, cfg.min_lr, warmup)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        # Images differ in their number of masked patches, and the loss is the mean over the masked
        # patches of the global batch. So all masks are drawn first: the sums of each micro-batch
        # (loss and mlm_acc) are divided by the mean count of all of them. The loader knows the
        # indices on the CPU, where masks are drawn; batch.index would wait for the GPU.
        masks = draw_mask(loader.locate(step)[1], cfg, cfg.seed, batch.epoch)
        count = all_mean(masks.sum().float()) / cfg.accum_iter
        masks = masks.to(run.device, non_blocking=True).chunk(cfg.accum_iter)
        for part, mask in zip(run.micro_batches(batch), masks):
            x, view = part.views                     # (B, 3, S, S); view: for the tokenizer
            # The tokenizer sees the whole crop; the network has to infer the token of a masked
            # patch from the visible ones.
            ids = tok.ids(view)[mask]                            # (total_masked,), no gradient
            drop = rng.uniform(part.index, 2 * cfg.depth, cfg.seed, part.epoch, "drop")
            with run.autocast():
                logits = model(x, mask, drop)                            # (total_masked, K)
            loss = token_loss(logits.float(), ids, count)                            # in fp32
            (loss / cfg.accum_iter).backward()
            counts.add(ids)
            run.log(loss=loss, mlm_acc=(logits.argmax(1) == ids).sum() / count)
        # clip_grad_norm_ adds 1e-6 to the norm; 0: no clipping
        grad_norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_grad or math.inf)
        run.log(lr=lr, grad_norm=grad_norm)
        opt.step()
        opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        if run.eval_due:
            stats = counts.stats()
            run.log(**stats, **visualize.evaluate(run, net.backbone, bank, queries))
            with run.evaluation(net):
                save_visualization(run, cfg, net, tok, queries)
            visualize.warn_of_token_frequencies(run, loss, stats["token_entropy"])
        if run.save_due:
            run.save_encoder(net.backbone, branch="base")
            run.save()


def save_visualization(run, cfg, net, tok, images, n=8):
    """visualization.png: the image, its visible patches, and what the tokenizer decodes from the
    true tokens, and from these with the predicted tokens at masked patches."""
    x, index = next(data.batches(images, cfg.img_size, n, run.device, workers=0))
    view, _ = next(data.batches(images, cfg.second_input_size, n, run.device, workers=0,
                                interpolation="lanczos"))
    mask = draw_mask(index.cpu(), cfg, "visualization").to(run.device)
    ids = tok.ids(view)
    with run.autocast():
        logits = net(x, mask)
    predicted = ids.masked_scatter(mask, logits.argmax(1))
    visualize.save_grid(run, visualize.token_columns(x, mask, ids, predicted, tok))


if __name__ == "__main__":
    config.main(main)
