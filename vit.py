"""The one Vision Transformer (Dosovitskiy et al., 2021) behind every method.

    images (B, 3, height, width)
      | cut into patches, Linear                      patch_embed        (B, N, D)
      | masked patches replaced by mask_token         mask
      | positions added                               pos_embed
      | a selection of patches, class token in front  keep, cls_token    (B, L, D)
      | depth x { x + ls1 * attn(norm1(x))            drop path on both branches
      |           x + ls2 * mlp(norm2(x)) }
      | LayerNorm                                     norm
    tokens (B, L, D)            split() -> class token (B, D), patches (B, N, D)

Shapes in all files of this repository:
    B batch, N patches (in raster order), L tokens (class and register tokens, patches), D width,
    H heads, S image side, p patch side, K prototypes or codes, V global views, C classes

Arguments of the published backbones, ViT(**SIZES["base"], ...); all but DINO, iBOT, SelfPatch and
DINOv2 also resize="size", which matters at other image sizes:

    DeiT, DINO, iBOT      the defaults
    DeiT III              layer_scale=1e-4
    DINOv2                patch_size=14, img_size=518, layer_scale=1e-5; with registers also
                          registers=4, resize="antialias"; the largest one swiglu=True
    MoCo v3               pos="sincos_row", init="moco"               (ViT-S also has 12 heads)
    MAE                   pos="sincos_col", init="mae"
    SelfPatch             class_token=False, final_norm=False
    BEiT 22k, SimMIM      pos="none", rel_pos="shared", layer_scale=0.1, qkv_bias="split",
                          init="beit"
    BEiT (paper; 1k)      qkv_bias="split", init="beit"
    BEiT, fine-tuning     as BEiT 22k, but rel_pos="block", final_norm=False
    CAE                   pos="sincos_row", layer_scale=0.1, qkv_bias="split",
                          init="cae"                                  (ViT-S also has 12 heads)

BEiT, SimMIM, CAE and the students of DINO, iBOT and SelfPatch train with drop_path=0.1. With the
default arguments the parameter names are timm's: a state dict of a ViT-B can be loaded into
create_model("vit_base_patch16_224", num_classes=0) and back, unchanged. lib/checkpoints.py reads
our files and the official ones, and writes ours; lib/positions.py has the position tables.
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from lib import positions
from lib.weights import init_vit

SIZES = {
    "tiny":  dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base":  dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}


# --------------------------------------------------------------------------------------------------
# Model

class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel size, computed as a Linear on each patch's pixels,
    which is 4x faster on a CPU."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images):
        p = self.proj.stride[0]
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))                  # (B, 3, h, p, w, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)                       # (B, N, 3pp)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)                  # (B, N, D)


def attend(q, k, v, bias=None, weights=None):
    """softmax(q k^T / sqrt(d) + bias) v: (B, H, queries, d). q: (B, H, queries, d); k, v:
    (B, H, L, d); bias: added to the logits, broadcastable to their shape (B, H, queries, L).
    weights: None, or a list to which the softmax is appended."""
    bias = None if bias is None else bias.to(q.dtype)
    # bf16 on CPU: for short sequences the explicit form is more than 2x faster than the fused
    short = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 256
    if weights is None and not short:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    logits = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)                    # (B, H, queries, L)
    a = (logits if bias is None else logits + bias).softmax(-1)
    if weights is not None:
        weights.append(a)
    return a @ v


class Attention(nn.Module):
    """Multi-head self-attention. qkv_bias: "fused" (one parameter), "none", or "split" (BEiT): two
    parameters, for query and value. Split and fused can compute the same functions, because a key
    bias cancels in the softmax."""

    def __init__(self, dim, num_heads, qkv_bias="fused"):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias == "fused")
        self.proj = nn.Linear(dim, dim)
        self.split = qkv_bias == "split"
        if self.split:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x, bias=None, weights=None):
        """x: (B, L, D); bias and weights as in `attend`."""
        qkv_bias = self.qkv.bias
        if self.split:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                        # each (B, H, L, D/H)
        x = attend(q, k, v, bias, weights)                                   # (B, H, L, D/H)
        return self.proj(x.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def forward(self, x):
        return x * self.gamma


class SwiGLU(nn.Module):
    """Gated activation (Shazeer, 2020): silu(a) * b, of the two halves of the channels."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return F.silu(a) * b


class Block(nn.Module):
    """Pre-norm transformer block, of encoders and decoders."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias="fused", layer_scale=None,
                 norm_eps=1e-6, swiglu=False):
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 2 * hidden if swiglu else hidden),
            act=SwiGLU() if swiglu else nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x, bias=None, drop=None, weights=None):
        """x: (B, L, D); bias and weights as in `attend`. drop: (B, 2), the factors of the attention
        and the MLP branch, 0 or 1 / (1 - rate), from ViT.drop_factors; None: no drop path."""
        branch = self.ls1(self.attn(self.norm1(x), bias, weights))
        x = x + (branch if drop is None else branch * drop[:, 0, None, None])
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if drop is None else branch * drop[:, 1, None, None])


class ViT(nn.Module):
    """A Vision Transformer encoder: images -> tokens. net.config contains all arguments, so that
    ViT(**net.config) builds the same architecture.

    img_size     side in pixels for which positions are made; for other sizes, square or not, they
                 are interpolated
    class_token  whether there is one, in front of the patches
    pos          absolute positions: "learned", "sincos_row" or "sincos_col" (fixed, see
                 positions.sincos), "none"
    rel_pos      relative position bias: None, "shared" (one table for all blocks) or "block" (a
                 table per block)
    layer_scale  initial value of LayerScale after each branch; None: no LayerScale
    qkv_bias     "fused", "split" or "none", see Attention
    drop_path    fraction of branches dropped in the last block, increasing linearly from 0 in the
                 first (a single block: 0)
    final_norm   whether a LayerNorm follows the last block
    resize       rule for absolute positions, "dino", "size" or "antialias", see
                 positions.resize_positions; tables of relative positions are always resized by
                 BEiT's rule
    init         initial weights, see lib/weights.py
    registers    number of register tokens (DINOv2): learned tokens without position after the class
                 token; split() leaves them out
    swiglu       whether MLPs have the gated activation SwiGLU instead of GELU (DINOv2 giant)
    window       patches attend only to window x window patches (see local_mask); None: to all
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6,
                 mlp_ratio=4.0, in_chans=3, class_token=True, pos="learned", rel_pos=None,
                 layer_scale=None, qkv_bias="fused", drop_path=0.0, norm_eps=1e-6, final_norm=True,
                 resize="dino", init="trunc", registers=0, swiglu=False, window=None):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        for name, choice in (("pos", ("learned", "sincos_row", "sincos_col", "none")),
                             ("rel_pos", (None, "shared", "block")),
                             ("resize", ("dino", "size", "antialias")),
                             ("qkv_bias", ("fused", "split", "none")),
                             ("init", ("trunc", "beit", "mae", "cae", "moco"))):
            if config[name] not in choice:
                raise ValueError(f"{name} must be one of {choice}, not {config[name]!r}")
        if img_size % patch_size:
            raise ValueError(f"image size {img_size} is not a multiple of patch size {patch_size}")
        if registers and not class_token:
            raise ValueError("register tokens come after a class token: add class_token=True")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be a fraction in [0, 1), not {drop_path}")
        self.config, self.embed_dim, self.depth, self.patch_size = (
            config, embed_dim, depth, patch_size)
        self.grid, self.num_prefix = (img_size // patch_size,) * 2, class_token + registers
        self.widths, self.strides = [embed_dim] * depth, [patch_size] * depth    # of each block

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None)
        self.pos_embed = None
        if pos != "none":                 # sin-cos: stored, as official files do, but never trained
            self.pos_embed = nn.Parameter(
                torch.zeros(1, class_token + self.grid[0] ** 2, embed_dim), pos == "learned")
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, layer_scale, norm_eps, swiglu)
            for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, norm_eps) if final_norm else nn.Identity()

        self.rel_pos_bias = nn.Module() if rel_pos == "shared" else None
        owners = {None: [], "shared": [self.rel_pos_bias], "block": [b.attn for b in self.blocks]}
        for owner in owners[rel_pos]:
            rows = (2 * self.grid[0] - 1) ** 2 + 3 * class_token                 # initialized to 0
            owner.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        index = positions.relative_index(self.grid, self.num_prefix) if rel_pos else None
        self.register_buffer("index", index, persistent=False)
        rates = torch.linspace(0, drop_path, depth).repeat_interleave(2)
        self.register_buffer("drop_rates", rates, persistent=False)
        if window is not None:
            self.local_mask(window)                                # refuses even numbers
        init_vit(self, init)

    def forward(self, x, keep=None, mask=None, mask_token=None, drop=None, attn_mask=None):
        """Images (B, 3, height, width) -> tokens (B, L, D) after the final norm.

        keep       (B, n) patch indices: the blocks get only these n patches, in this order (MAE)
        mask       (B, N) bool, True: this patch is replaced by mask_token, which is
                   broadcast, before positions are added
        drop       (B, 2*depth) uniform random numbers in [0, 1): a branch (attention and MLP of
                   block 0, 1, ...) is dropped where its number is below its rate; None: torch's
                   global generator. Used in training mode only
        attn_mask  (L, L) bool, True: this query may attend to this key (the opposite of `mask`,
                   where True hides); for example local_mask()
        """
        same = dict(keep=keep, mask=mask, mask_token=mask_token, drop=drop, attn_mask=attn_mask)
        return self.layers(x, [self.depth - 1], **same)[0][0]

    def layers(self, x, blocks=None, norm=True, attention=(), *, keep=None, mask=None,
               mask_token=None, drop=None, attn_mask=None):
        """Tokens after the blocks in `blocks` (indices from 0; default: all) and attention weights
        of the blocks in `attention`. Other arguments: see forward().

        Returns a list of (B, L, D), after the final norm if `norm`, in the order of `blocks`; and
        {block: (B, H, L, L)}. Blocks after the last one needed are not computed.
        """
        blocks = range(self.depth) if blocks is None else blocks
        wanted = {*blocks, *attention}
        if not wanted or min(wanted) < 0 or max(wanted) >= self.depth:
            raise ValueError(f"blocks must be 0 to {self.depth - 1}, not {sorted(wanted)}")
        x, grid = self.embed(x, keep, mask, mask_token)
        factors = self.drop_factors(len(x), drop)
        outputs, maps = {}, {}
        for i, block in enumerate(self.blocks[:max(wanted) + 1]):
            if i == 0 or self.config["rel_pos"] == "block":           # else all blocks share it
                bias = self.attention_bias(block, grid, keep, attn_mask)
            weights = [] if i in attention else None
            x = block(x, bias, None if factors is None else factors[:, 2 * i:2 * i + 2], weights)
            if i in blocks:
                outputs[i] = self.norm(x) if norm else x
            if weights:
                maps[i] = weights[0]
        return [outputs[i] for i in blocks], maps

    def split(self, tokens):
        """(B, L, D) -> class token (B, D), or None if the model has none; patches (B, N, D)."""
        return (tokens[:, 0] if self.num_prefix else None), tokens[:, self.num_prefix:]

    def local_mask(self, window, grid=None):
        """An attn_mask (L, L): patches attend to window x window patches (Park et al., appendix D).

        window is odd. Attention from and to the class token is not restricted (our choice: Park et
        al. leave it open). grid: (h, w) of the input, if its size is not img_size.
        """
        if window < 1 or window % 2 == 0:
            raise ValueError(f"the window must be an odd number of patches, not {window}")
        row, col = positions.coordinates(grid or self.grid, self.drop_rates.device)
        steps = torch.maximum((row[:, None] - row).abs(), (col[:, None] - col).abs())    # (N, N)
        return F.pad(steps <= window // 2, (self.num_prefix, 0, self.num_prefix, 0), value=True)

    # ---- parts of layers()

    def embed(self, images, keep=None, mask=None, mask_token=None):
        """Images -> input tokens (B, L, D) of the first block, and the patch grid (h, w)."""
        p, (h, w) = self.patch_size, images.shape[2:]
        if h % p or w % p:
            raise ValueError(f"image size {h}x{w} is not a multiple of patch size {p}")
        grid, pos = (h // p, w // p), None
        x = self.patch_embed(images)                                                     # (B, N, D)
        x = x.to(self.patch_embed.proj.weight.dtype)       # the residual stays fp32 under autocast
        if mask is not None:
            if mask_token is None:
                raise ValueError("mask needs a mask_token (1, 1, D)")
            x = torch.where(mask[:, :, None], mask_token, x)
        if self.pos_embed is not None:
            pos = positions.resize_positions(self.pos_embed, self.grid, grid,
                                             self.config["resize"])
            x = x + pos[:, -x.shape[1]:]
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))                 # (B, n, D)
        if self.cls_token is not None:
            first = self.cls_token if pos is None else self.cls_token + pos[:, :1]
            if self.register_tokens is not None:
                first = torch.cat([first, self.register_tokens], 1)
            x = torch.cat([first.expand(len(x), -1, -1), x], 1)                        # (B, L, D)
        return x, grid

    def drop_factors(self, batch, drop=None):
        """Stochastic depth (Huang et al., 2016): (B, 2*depth) factors of the branches, 0 or
        1 / (1 - rate); None in eval mode or without drop path. drop: see forward()."""
        if not self.training or not self.config["drop_path"]:
            return None
        if drop is None:
            drop = torch.rand(batch, 2 * self.depth, device=self.drop_rates.device)
        return (drop >= self.drop_rates) / (1 - self.drop_rates)

    def attention_bias(self, block, grid, keep=None, attn_mask=None):
        """Relative position bias, plus -inf where attn_mask is False; None without both.

        Its shape is (1, H or 1, L, L), or with `keep` (B, H or 1, L, L).
        """
        bias = None
        if attn_mask is None and self.config["window"]:
            attn_mask = self.local_mask(self.config["window"], grid)
        if self.config["rel_pos"]:
            owner = block.attn if self.config["rel_pos"] == "block" else self.rel_pos_bias
            table, index = owner.relative_position_bias_table, self.index
            if grid != self.grid:
                table = positions.resize_table(table, self.grid, grid)
                index = positions.relative_index(grid, self.num_prefix, table.device)
            bias = table[index].permute(2, 0, 1)                                         # (H, L, L)
        if attn_mask is not None:
            blocked = torch.zeros(attn_mask.shape, device=attn_mask.device)
            blocked = blocked.masked_fill(~attn_mask, -math.inf)[None]                   # (1, L, L)
            bias = blocked if bias is None else bias + blocked
        if bias is None or keep is None:
            return None if bias is None else bias[None]
        rows = F.pad(keep + self.num_prefix, (self.num_prefix, 0))          # (B, L) token indices
        return bias[:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)
