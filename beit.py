"""BEiT: BERT pre-training of image Transformers (Bao et al., ICLR 2022, arXiv 2106.08254).

BERT for images. A frozen tokenizer turns the image into a grid of visual words, one a patch, ids
out of K. About 40 % of the patches are hidden, in blocks: a learned mask token takes their place.
The whole sequence goes through a ViT, and a linear layer names the word at each hidden patch. To
predict words, not pixels, spends nothing on the finest detail; to hide blocks, not single patches,
leaves no neighbour to copy from.

    crop -+- 224 px -- patches -- mask token for -- ViT over -- Linear -- logits of hidden patches
          |                       hidden ones      all patches                  | cross-entropy
          +- 112 px -- tokenizer (frozen, no gradient) -- ids ------------------+

    L = - mean over hidden patches i of log softmax(W h_i + b)[y_i]             (section 2.3)

h is the output of the last LayerNorm, y the ids; visible patches have no loss. At the start L is
about ln K; a head that ignores its input reaches H, the entropy of the hidden words, and the share
of the commonest one (logged as `entropy` and `commonest`): only beyond these has anything been
learned.

The paper: ViT-B/16, 800 epochs: 83.2 fine-tuned, 56.7 by linear probe of block 9 of 12 (others
measure 41.8 at the last one, which predicts words). Block masks against single patches: 82.86
against 82.77 on ImageNet, 44.65 against 42.93 on ADE20K; pixels for words: 81.04 (300 epochs).

We follow the ImageNet-1K model: learned positions. The released 22K weights have, instead, a table
of relative ones shared by all blocks, and layer scale: --pos none --rel-pos --layer-scale 0.1; they
want images normalised by mean and deviation 0.5. Paper and official code differ in the mask: more
than 40 % there, at most 75 of 196 here, as in the code. Ours: colours are jittered after the crop,
not before it; the loss is a mean over the hidden patches of all processes, not of each; the rise
of the learning rate ends a step later.

    python beit.py                                         minutes on a laptop, offline
    torchrun --nproc_per_node=8 beit.py --data imagenet --tokenizer encoder.pkl    (not run by us)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, distributed, rng, tokenizer
from lib.run import Run, cosine, param_groups, set_lr

# B images of a process, N = n x n patches, T hidden patches of a batch, D width, K words, S pixels


@dataclass
class Config:
    # the network (paper, section 3: ViT-B/16)
    img_size: int = 224           # pixels (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 768          # width (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 12           # attention heads (paper)
    pos: str = "learned"          # positions: learned (paper), none (22K weights) or sincos_row
    rel_pos: bool = False         # a table of relative ones, shared by all blocks (22K weights)
    layer_scale: float = 0.0      # every branch begins so small; 0: as it is (22K weights: 0.1)
    init: str = "beit"            # weights: beit (official code) or moco (Xavier): see vit.py
    drop_path: float = 0.1        # stochastic depth (paper)
    # the tokenizer, see tokenizer.py
    tokenizer: str = ""           # its file, DALL-E's encoder.pkl (paper); none: trained, then kept
    tokenizer_kind: str = "vq"    # of a trained one: vq, or dvae as DALL-E's (our choice)
    tokenizer_steps: int = 10000  # of training it (our choice)
    codes: int = 8192             # K, words of a trained one (paper; our choice on less data)
    token_size: int = 112         # pixels, side of the tokenizer's view (paper)
    # the mask
    masked: int = 75              # patches hidden of an image, at most (paper: about 40 % of 196)
    min_block: int = 16           # patches, least area of a block (paper)
    # the view
    min_scale: float = 0.08       # least area of the crop (official code)
    jitter: float = 0.4           # brightness, contrast, saturation (official code)
    # the optimisation
    epochs: float = 800           # (paper)
    warmup_epochs: float = 10.0   # linear rise of the learning rate (paper)
    batch_size: int = 2048        # global (paper: 2k)
    lr: float = 1.5e-3            # peak, whatever the batch (paper)
    min_lr: float = 1e-5          # end of the cosine (official code)
    weight_decay: float = 0.05    # AdamW (paper); not of vectors, class token, positions (code)
    clip: float = 3.0             # norm of the gradient (official code)


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """One crop in two sizes: for the network, and for the tokenizer."""
    how = dict(scale=(cfg.min_scale, 1.0))
    if cfg.jitter:
        how |= dict(jitter=(cfg.jitter, cfg.jitter, cfg.jitter, 0.0), jitter_p=1.0)
    return [data.View(cfg.img_size, **how),
            data.View(cfg.token_size, **how, interpolation="lanczos", like=0)]


def block_mask(u, n, count, least):
    """Hides rectangles of a grid n x n, one after the other, until `count` patches are hidden or
    ten attempts in a row failed (official code; but ours hides one at least). u: attempts x 4
    uniform numbers for area, aspect ratio and place. An attempt fails when the rectangle spans a
    side of the grid, hides nothing new, or too much. Returns (n, n) bool, True: hidden."""
    mask, hidden, failed = torch.zeros(n, n, dtype=torch.bool).numpy(), 0, 0
    for u_area, u_aspect, u_top, u_left in u:
        if hidden == count or hidden and failed >= 10:
            break
        area = least + (count - hidden - least) * u_area         # from the least to what is missing
        aspect = 0.3 ** (1 - 2 * u_aspect)                       # log-uniform from 0.3 to 1/0.3
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failed += 1
        if 0 < h < n and 0 < w < n:
            top, left = int(u_top * (n - h + 1)), int(u_left * (n - w + 1))
            block = mask[top:top + h, left:left + w]
            new = h * w - int(block.sum())
            if 0 < new <= count - hidden:
                block[:] = True
                hidden, failed = hidden + new, 0
    return torch.from_numpy(mask)


def draw_mask(index, cfg, *key):
    """(B,) image numbers, on the CPU -> (B, N) bool."""
    n = cfg.img_size // cfg.patch_size
    u = rng.uniform(index, (100, 4), *key, "mask").tolist()      # of 1500 none took over 32
    return torch.stack([block_mask(v, n, cfg.masked, cfg.min_block) for v in u]).flatten(1)


# --------------------------------------------------------------------------------------------------
# Model and loss
# --------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Backbone, mask token, and the linear layer that names words."""

    def __init__(self, cfg, vocabulary):
        super().__init__()
        D = cfg.embed_dim
        self.backbone = vit.ViT(cfg.img_size, cfg.patch_size, D, cfg.depth, cfg.num_heads,
                                pos=cfg.pos, rel_pos="shared" if cfg.rel_pos else None,
                                layer_scale=cfg.layer_scale or None, qkv_bias="split",
                                drop_path=cfg.drop_path, resize="size", init=cfg.init)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.lm_head = nn.Linear(D, vocabulary)
        for weight in (self.mask_token, self.lm_head.weight):
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, x, mask, drop=None):
        """x: (B, 3, S, S), mask: (B, N) bool, drop: noise of the drop path. Returns the logits
        (T, K) of the hidden patches, image by image, row by row."""
        tokens = self.backbone(x, mask=mask, mask_token=self.mask_token, drop=drop)
        _, patches = self.backbone.split(tokens)                             # (B, N, D)
        return self.lm_head(patches[mask])


def token_loss(logits, ids, count=None):
    """Cross-entropy, mean over hidden patches. logits: (T, K), ids: (T,). `count`: to divide by, if
    these are not all of them."""
    return F.cross_entropy(logits.float(), ids, reduction="sum") / (len(ids) if count is None
                                                                    else count)


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    n = cfg.img_size // cfg.patch_size
    if cfg.pos == "none" and not cfg.rel_pos:
        raise ValueError("--pos none: add --rel-pos, or nothing tells one patch from another")
    if not 0 < cfg.min_block <= cfg.masked < n * n:
        raise ValueError(f"--masked {cfg.masked} of {n * n} patches in blocks of --min-block "
                         f"{cfg.min_block} or more: some must be hidden, and some not")

    loader, bank, queries = run.data(views(cfg))         # the last two: for the kNN accuracy only
    with torch.device("meta"):     # settings that cannot be are told before a tokenizer is trained
        Network(cfg, 1)
    dvae = tokenizer.get_tokenizer(cfg, run, loader.images, queries, views(cfg)[1])    # frozen words

    model = run.place(Network(cfg, dvae.vocabulary))
    net = distributed.unwrap(model)
    groups = param_groups(net, cfg.weight_decay, spare=("cls_token", "pos_embed"))
    opt = torch.optim.AdamW(groups, fused=True)
    words = tokenizer.Count(dvae.vocabulary).to(run.device)                  # of hidden patches
    run.restore(model=model, opt=opt, words=words, tokenizer=tokenizer.Fingerprint(dvae))
    total, warmup = run.length(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr = cosine(step, total, cfg.lr, cfg.min_lr, warmup)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        when = cfg.seed, batch.epoch
        masks = draw_mask(loader.locate(step)[1], cfg, *when)    # (B, N); batch.index, on the CPU
        count = distributed.all_mean(masks.sum().float()) / cfg.accumulate      # mean of the parts
        masks = masks.to(run.device, non_blocking=True).chunk(cfg.accumulate)
        for part, mask in zip(run.micro_batches(batch), masks):
            x, u = part.views
            ids = dvae.ids(u)[mask]                                          # (T,), no gradient
            drop = rng.uniform(part.index, 2 * cfg.depth, *when, "drop")
            with run.autocast():
                logits = model(x, mask, drop)                                # (T, K)
            loss = token_loss(logits, ids, count)
            run.backward(loss, opt, clip=cfg.clip)
            words.add(ids)
            run.log(loss=loss, acc=(logits.argmax(1) == ids).sum() / count)
        opt.step(), opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        run.log(lr=lr)
        if run.due(cfg.evals):
            found = words.facts() | run.knn(net.backbone, bank, queries, cfg.img_size)
            run.log(now=True, **found)
            with run.looking():
                show(run, cfg, net, dvae, queries)
            if loss > found["entropy"]:
                run.say("knows no more of hidden words than how common they are (loss not below "
                        "entropy): too early, or try another --lr")
        if run.save_due():
            run.save_encoder(net.backbone, branch="base")
            run.save()


@torch.no_grad()
def show(run, cfg, net, dvae, images, rows=8):
    """picture.png: test images, what is left of them, and two pictures that the tokenizer's decoder
    draws: of the true words, and of the words named at hidden patches among the true ones."""
    x, index = next(data.batches(images, cfg.img_size, rows, run.device, workers=0))
    u, _ = next(data.batches(images, cfg.token_size, rows, run.device, workers=0,
                             interpolation="lanczos"))
    mask = draw_mask(index.cpu(), cfg, "picture").to(run.device)
    ids = dvae.ids(u)
    net.eval()
    with run.autocast():
        logits = net(x, mask)
    net.train()
    named = ids.masked_scatter(mask, logits.argmax(1))
    n = cfg.img_size // cfg.patch_size
    hidden = F.interpolate(mask.view(-1, 1, n, n).float(), cfg.img_size) > 0
    drawn = [F.interpolate(dvae.decode(words), cfg.img_size).mul(255).round().to(torch.uint8)
             for words in (ids, named)]
    run.picture({"image": augment.denormalize(x), "masked": augment.denormalize(x * ~hidden),
                 "true words, drawn": drawn[0], "words named": drawn[1]})


if __name__ == "__main__":
    config.main(main)
