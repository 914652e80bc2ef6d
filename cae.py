"""CAE: context autoencoder (Chen et al., IJCV 2023, arXiv 2202.03026).

BEiT and MAE leave two jobs to one network: to represent what is seen, and to solve the pretext
task. CAE parts them. The encoder sees the visible half of the patches only, and represents. The
latent contextual regressor guesses, by cross-attention, the representations that the encoder would
give to the hidden half. A small decoder names, from these guesses alone, the visual word of each
hidden patch: an id of a frozen tokenizer. The alignment branch keeps the guesses in the space of
representations: the encoder itself, shown the hidden patches, says what they should have been.

    224 px -+- visible patches -- encoder --- z_v ----> regressor -> zhat -> decoder -> logits
            |                                 mask token ---^         |                    |
            |                                               alignment |      cross-entropy |
            +- hidden patches --- encoder, no gradient --> zbar ------+                    |
    112 px ---- tokenizer, frozen --> ids --------------------------------------------------+
    (both renderings of the same crop)

    L = mean over hidden patches i of -log softmax(logits_i)[y_i]
        + lambda * mean over hidden patches and channels of (zhat - stop(zbar))^2,   lambda = 2

Both zhat and zbar leave a LayerNorm, so neither needs another normalisation. Alignment alone would
collapse (paper): all representations equal, `std` 0. At the start the cross-entropy is about ln K,
and the alignment about 2. A head that ignores its input reaches H, the entropy of the hidden words,
and the share of the commonest one (logged as `entropy` and `commonest`): only beyond these has
anything been learned.

The paper, ViT-B/16, 300 epochs, linear / attentive / fine-tuned (Table 5): 60.3 / 71.2 / 82.9
without decoder and alignment, 64.1 / 73.8 / 83.6 with both; 1600 epochs: 70.3 / 77.2 / 83.9
(repository). The class token has no loss and learns only by being looked at.

We follow the official code where the paper is brief: hidden queries are keys and values, too, in
the regressor, and the second half of its block goes on from the normalised stream. Unlike the code
we keep no copy of the encoder for the alignment: its authors call the two equivalent.

    python cae.py                                         minutes on a laptop, offline
    torchrun --nproc_per_node=8 cae.py --data imagenet --tokenizer encoder.pkl    (not run by us)
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import vit
from lib import augment, config, distributed, rng, tokenizer
from lib.run import Run, cosine, param_groups, set_lr

# B images of a process, N = n x n patches: M hidden, N - M visible; D width, K words, S pixels


@dataclass
class Config:
    # the encoder (paper: ViT-B/16; official ViT-S: 12 heads, too)
    img_size: int = 224           # pixels (paper)
    patch_size: int = 16          # pixels (paper)
    embed_dim: int = 768          # D, of regressor and decoder, too (paper)
    depth: int = 12               # blocks (paper)
    num_heads: int = 12           # attention heads, everywhere (paper)
    layer_scale: float = 0.1      # every branch begins so small (code; ViT-L: 1e-5); 0: as it is
    drop_path: float = 0.1        # stochastic depth, in each of the three parts (official code)
    regressor_depth: int = 4      # cross-attention blocks (paper)
    decoder_depth: int = 4        # self-attention blocks (paper)
    # the objective
    align: float = 2.0            # lambda (paper)
    # the tokenizer, see tokenizer.py
    tokenizer: str = ""           # its file, DALL-E's encoder.pkl (paper); none: trained, then kept
    tokenizer_kind: str = "vq"    # of a trained one: vq, or dvae as DALL-E's (our choice)
    tokenizer_steps: int = 10000  # of training it (our choice)
    codes: int = 8192             # K, words of a trained one (paper; our choice on less data)
    token_size: int = 112         # pixels, side of the tokenizer's view (paper)
    # the mask
    masked: int = 98              # M, patches hidden of an image (paper: half of 196)
    min_block: int = 16           # patches, least area of a block (official code)
    # the view
    min_scale: float = 0.08       # least area of the crop (official code)
    # the optimisation
    epochs: float = 1600          # paper: 300, 800 and 1600
    warmup_epochs: float = 40.0   # linear rise of the learning rate (paper; 300 epochs: 10)
    batch_size: int = 2048        # global (paper)
    lr: float = 1.5e-3            # peak, whatever the batch (paper)
    min_lr: float = 1e-5          # end of the cosine (official code)
    weight_decay: float = 0.05    # AdamW (paper); class and mask token decay, too (code)
    clip: float = 3.0             # norm of the gradient (official code)


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def views(cfg):
    """One crop in two sizes: for the network, and for the tokenizer."""
    how = dict(scale=(cfg.min_scale, 1.0))
    return [data.View(cfg.img_size, **how),
            data.View(cfg.token_size, **how, interpolation="lanczos", like=0)]


def block_mask(u, n, count, least):
    """Hides rectangles of a grid n x n, one after the other, until exactly `count` patches are
    hidden (official code). u: attempts x 4 uniform numbers for area, aspect ratio and place. An
    attempt fails when the rectangle spans a side of the grid, hides nothing new, or too much.
    Returns (n, n) bool, True: hidden."""
    mask, hidden = torch.zeros(n, n, dtype=torch.bool).numpy(), 0
    for u_area, u_aspect, u_top, u_left in u:
        if hidden == count:
            break
        area = least + (count - hidden - least) * u_area         # from the least to what is missing
        aspect = 0.3 ** (1 - 2 * u_aspect)                       # log-uniform from 0.3 to 1/0.3
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < n and 0 < w < n:
            top, left = int(u_top * (n - h + 1)), int(u_left * (n - w + 1))
            block = mask[top:top + h, left:left + w]
            new = h * w - int(block.sum())
            if 0 < new <= count - hidden:
                block[:] = True
                hidden += new
    left_over = (~mask).ravel().nonzero()[0][:count - hidden]    # none, unless the attempts run out
    mask.ravel()[left_over] = True
    return torch.from_numpy(mask)


def draw_mask(index, cfg, *key):
    """(B,) image numbers, on the CPU -> (B, N) bool, M of them True."""
    n = cfg.img_size // cfg.patch_size
    u = rng.uniform(index, (300, 4), *key, "mask").tolist()     # of 1500 none took over 130
    return torch.stack([block_mask(v, n, cfg.masked, cfg.min_block) for v in u]).flatten(1)


def parted(mask, count):
    """(B, N) bool with `count` True each -> numbers of visible (B, N-M) and hidden patches (B, M),
    both row by row."""
    order = mask.int().argsort(dim=1, stable=True)
    return order.split([mask.shape[1] - count, count], 1)


# --------------------------------------------------------------------------------------------------
# Model and loss
# --------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Queries look at keys; the key has no bias, as it would cancel in the softmax."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.k = nn.Linear(dim, dim, bias=False)
        self.q, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, q, k, v):
        q, k, v = (z.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for z in (self.q(q), self.k(k), self.v(v)))
        x = vit.attend(q, k, v)                                              # (B, H, M, D/H)
        return self.proj(x.transpose(1, 2).flatten(2))


class RegressorBlock(nn.Module):
    """Latent contextual regressor: the hidden queries look at the visible and at each other."""

    def __init__(self, dim, num_heads, layer_scale):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2 = (
            nn.LayerNorm(dim, 1e-6) for _ in range(4))
        self.cross_attn = CrossAttention(dim, num_heads)
        self.ls1, self.ls2 = (vit.LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
                              for _ in range(2))
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, z_v, pos, pos_v, drop=None):
        """x: (B, M, D) queries, z_v: (B, N-M, D), pos and pos_v: their positions, which go into
        queries and keys, not into values. drop: (B, 2) factors of the branches."""
        both = torch.cat([z_v, x], 1)                                        # (B, N, D)
        branch = self.ls1(self.cross_attn(
            self.norm1_q(x + pos), self.norm1_k(both + torch.cat([pos_v, pos], 1)),
            self.norm1_v(both)))
        x = x + (branch if drop is None else branch * drop[:, 0, None, None])
        x = self.norm2(x)            # and on from here: no ordinary pre-norm block (official code)
        branch = self.ls2(self.mlp(x))
        return x + (branch if drop is None else branch * drop[:, 1, None, None])


class CAE(nn.Module):
    """Encoder, regressor and decoder, as in the diagram above."""

    def __init__(self, cfg, vocabulary):
        super().__init__()
        D, H, scale = cfg.embed_dim, cfg.num_heads, cfg.layer_scale or None
        self.drop_path = cfg.drop_path
        self.draws = [2 * depth for depth in (cfg.depth, cfg.depth, cfg.regressor_depth,
                                              cfg.decoder_depth)]
        self.encoder = vit.ViT(cfg.img_size, cfg.patch_size, D, cfg.depth, H, pos="sincos_row",
                               layer_scale=scale, qkv_bias="split",
                               drop_path=cfg.drop_path, resize="size", init="cae")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.regressor = nn.ModuleList(RegressorBlock(D, H, scale)
                                       for _ in range(cfg.regressor_depth))
        self.regressor_norm = nn.LayerNorm(D, 1e-6)
        self.decoder = nn.ModuleList(vit.Block(D, H, qkv_bias="split", layer_scale=scale)
                                     for _ in range(cfg.decoder_depth))
        self.decoder_norm = nn.LayerNorm(D, 1e-6)
        self.head = nn.Linear(D, vocabulary)
        for part in (self.regressor, self.decoder, self.head):
            vit.init_linear(part, "cae")                                     # Xavier, biases 0

    def forward(self, x, visible, hidden, drop=None):
        """x: (B, 3, S, S), visible (B, N-M) and hidden (B, M): patch numbers, drop: noise of the
        drop path (B, sum(draws)). Returns logits (B, M, K), zhat and zbar (B, M, D)."""
        drop = torch.rand(len(x), sum(self.draws), device=x.device) if drop is None else drop
        seen, target, drop_r, drop_d = drop.split(self.draws, 1)
        z_v = self.represent(x, visible, seen)                               # (B, N-M, D)
        with torch.no_grad():                            # its own drop path, as in official code
            zbar = self.represent(x, hidden, target)                         # (B, M, D)
        pos = self.encoder.pos_embed[0, 1:]                                  # (N, D), fixed
        zhat = self.regress(z_v, pos[hidden], pos[visible], drop_r)
        return self.decode(zhat, pos[hidden], drop_d), zhat, zbar

    def represent(self, x, patches, drop=None):
        """The encoder shown some patches and its class token, which stays behind: (B, some, D)."""
        return self.encoder.split(self.encoder(x, keep=patches, drop=drop))[1]

    def regress(self, z_v, pos, pos_v, drop=None):
        x = self.mask_token.expand(*pos.shape[:2], -1)                       # (B, M, D)
        for block, factor in zip(self.regressor, self.factors(drop, len(self.regressor))):
            x = block(x, z_v, pos, pos_v, factor)
        return self.regressor_norm(x)

    def decode(self, zhat, pos, drop=None):
        x = zhat + pos
        for block, factor in zip(self.decoder, self.factors(drop, len(self.decoder))):
            x = block(x, drop=factor)
        return self.head(self.decoder_norm(x))                               # (B, M, K)

    def factors(self, drop, depth):
        """Drop path of a part, its rate rising from 0: for each block (B, 2), 0 or 1/keep."""
        if drop is None or not self.training or not self.drop_path:
            return [None] * depth
        rates = torch.linspace(0, self.drop_path, depth, device=drop.device).repeat_interleave(2)
        return ((drop >= rates) / (1 - rates)).split(2, 1)


def token_loss(logits, ids):
    """Cross-entropy, mean over hidden patches. logits: (B, M, K), ids: (B, M)."""
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())


def align_loss(zhat, zbar):
    """Squared error, mean over hidden patches and channels. zhat, zbar: (B, M, D)."""
    return F.mse_loss(zhat.float(), zbar.float())


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def main():
    cfg = config.parse(Config)
    run = Run(cfg)
    N = (cfg.img_size // cfg.patch_size)**2
    if not 0 < cfg.min_block <= cfg.masked < N:
        raise ValueError(f"--masked {cfg.masked} of {N} patches in blocks of --min-block "
                         f"{cfg.min_block} or more: some must be hidden, and some not")

    loader, bank, queries = run.data(views(cfg))         # the last two: for the kNN accuracy only
    with torch.device("meta"):     # settings that cannot be are told before a tokenizer is trained
        CAE(cfg, 1)
    dvae = tokenizer.get_tokenizer(cfg, run, loader.images, queries, views(cfg)[1])    # frozen words

    model = run.place(CAE(cfg, dvae.vocabulary))
    net = distributed.unwrap(model)
    opt = torch.optim.AdamW(param_groups(net, cfg.weight_decay), fused=True)
    words = tokenizer.Count(dvae.vocabulary).to(run.device)                  # of hidden patches
    run.restore(model=model, opt=opt, words=words, tokenizer=tokenizer.Fingerprint(dvae))
    total, warmup = run.length(loader), round(cfg.warmup_epochs * len(loader))

    for step, batch in run.steps(loader):
        lr = cosine(step, total, cfg.lr, cfg.min_lr, warmup)
        set_lr(opt, lr)

        # ---- the method ----------------------------------------------------------------------
        when = cfg.seed, batch.epoch
        index = loader.locate(step)[1]                           # batch.index, but on the CPU
        masks = draw_mask(index, cfg, *when).to(run.device, non_blocking=True)   # (B, N)
        for part, mask in zip(run.micro_batches(batch), masks.chunk(cfg.accumulate)):
            x, u = part.views
            visible, hidden = parted(mask, cfg.masked)
            ids = dvae.ids(u).gather(1, hidden)                              # (B, M), no gradient
            drop = rng.uniform(part.index, sum(net.draws), *when, "drop")
            with run.autocast():
                logits, zhat, zbar = model(x, visible, hidden, drop)
            tokens, align = token_loss(logits, ids), align_loss(zhat, zbar)          # in fp32
            loss = tokens + cfg.align * align
            run.backward(loss, opt, clip=cfg.clip)
            words.add(ids)
            acc = (logits.argmax(2) == ids).float().mean()
            run.log(loss=loss, tokens=tokens, align=align, acc=acc)
        opt.step(), opt.zero_grad()
        # ---- bookkeeping ---------------------------------------------------------------------

        run.log(lr=lr)
        if run.due(cfg.evals):
            std = zbar.float().std((0, 1)).mean()        # over patches: 0.4 at first; 0: collapsed
            found = words.facts() | run.knn(net.encoder, bank, queries, cfg.img_size)
            run.log(now=True, std=std, **found)
            with run.looking():
                show(run, cfg, net, dvae, queries)
            if std < 0.05:
                run.say("collapsed: all patches are represented alike (std near 0); try a lower "
                        "--align, or a lower --lr")
            elif tokens > found["entropy"]:
                run.say("knows no more of hidden words than how common they are (tokens not below "
                        "entropy): too early, or try another --lr")
        if run.save_due():
            run.save_encoder(net.encoder, branch="base")
            run.save()


@torch.no_grad()
def show(run, cfg, net, dvae, images, rows=8):
    """picture.png: test images, what is left of them, and two pictures that the tokenizer's decoder
    draws: of the true words, and of the words named at hidden patches among the true ones."""
    x, index = next(data.batches(images, cfg.img_size, rows, run.device, workers=0))
    u, _ = next(data.batches(images, cfg.token_size, rows, run.device, workers=0,
                             interpolation="lanczos"))
    mask = draw_mask(index.cpu(), cfg, "picture").to(run.device)
    visible, hidden = parted(mask, cfg.masked)
    ids = dvae.ids(u)
    net.eval()
    with run.autocast():
        logits, _, _ = net(x, visible, hidden)
    net.train()
    named = ids.scatter(1, hidden, logits.argmax(2))
    n = cfg.img_size // cfg.patch_size
    gone = F.interpolate(mask.view(-1, 1, n, n).float(), cfg.img_size) > 0
    drawn = [F.interpolate(dvae.decode(words), cfg.img_size).mul(255).round().to(torch.uint8)
             for words in (ids, named)]
    run.picture({"image": augment.denormalize(x), "visible": augment.denormalize(x * ~gone),
                 "true words, drawn": drawn[0], "words named": drawn[1]})


if __name__ == "__main__":
    config.main(main)
