"""Swin Transformers (Liu et al., 2021), backbones of moby.py and selfpatch.py: torchvision's, with
the interface of vit.ViT. Parameters have torchvision's names: a state dict of swin_tiny can be
loaded into torchvision.models.swin_t(), whose classifier `head` and index buffers, which it
computes, are all that is missing (strict=False).

    images (B, 3, height, width)
      | cut into patches, Linear, LayerNorm             features.0     width C, stride p
      | blocks: attention within windows, every second
      |   block shifted by half a window; MLP           features.1         "
      | 2 x 2 patches merged into one of twice the width    features.2     width 2 C, stride 2 p
      | blocks ... merged ... blocks                    features.3, ...
      | LayerNorm                                       norm
    tokens (B, N, D)           split() -> None (there is no class token), patches (B, N, D)

A stage is what has one width. Seen from outside, a patch is one of the last stage: `embed_dim` is
its width, `patch_size` its stride, 32 pixels of swin_tiny; `depth` is the number of stages.
"""
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

# swin_micro: our choice, for images of 32 to 64 px. patch_size None: 16 x 16 patches at first.
SIZES = {
    "swin_tiny":  dict(patch_size=4, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_micro": dict(patch_size=None, embed_dim=32, depths=(2, 2, 2), num_heads=(1, 2, 4)),
}


class Swin(SwinTransformer):
    """A Swin Transformer without classifier: images -> tokens. net.config contains all arguments,
    so that Swin(**net.config) builds the same architecture.

    img_size    side in pixels that the windows are made for: the last stage is one window
    patch_size  side of the patches of the first stage
    embed_dim   width of the first stage
    depths      number of blocks of each stage
    num_heads   attention heads of each stage
    drop_path   fraction of branches dropped in the last block, increasing linearly from 0 in the
                first
    final_norm  whether a LayerNorm follows the last block
    ValueError: an image side that is not a multiple of the stride of the last stage.
    """

    def __init__(self, img_size, patch_size, embed_dim, depths, num_heads, drop_path=0.0,
                 final_norm=True):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        stride = patch_size * 2 ** (len(depths) - 1)
        if img_size % stride:
            raise ValueError(f"image size {img_size} is not a multiple of {stride}, the stride of "
                             f"the Swin's last stage")
        side = img_size // stride
        super().__init__([patch_size] * 2, embed_dim, list(depths), list(num_heads), [side] * 2,
                         stochastic_depth_prob=0.0, num_classes=1)     # drop path: see forward()
        self.head = nn.Identity()
        if not final_norm:
            self.norm = nn.Identity()
        self.config, self.depth, self.num_prefix = config, len(depths), 0
        self.patch_size, self.grid = stride, (side, side)
        self.widths = [embed_dim * 2**stage for stage in range(len(depths))]
        self.strides = [patch_size * 2**stage for stage in range(len(depths))]
        self.embed_dim = self.widths[-1]
        for block in (block for stage in self.features[1::2] for block in stage):
            index = block.attn.relative_position_index   # recomputed, not a part of checkpoints
            block.attn.register_buffer("relative_position_index", index, persistent=False)
        rates = torch.linspace(0, drop_path, sum(depths)).repeat_interleave(2)
        self.register_buffer("drop_rates", rates, persistent=False)

    def forward(self, x, drop=None):
        """Images (B, 3, height, width) -> tokens (B, N, D) of the last stage, after the final norm.

        drop: (B, 2 * number of blocks) uniform random numbers in [0, 1): a branch (attention and
        MLP of block 0, 1, ...) is dropped where its number is below its rate; None: torch's global
        generator. Used in training mode only. The sides must be multiples of patch_size."""
        return self.layers(x, [self.depth - 1], drop=drop)[0][0]

    def layers(self, x, blocks=None, norm=True, attention=(), *, drop=None):
        """As ViT.layers, with stages instead of blocks: tokens (B, N, width) after the last block
        of each stage in `blocks` (default: all), where N and width differ. The final norm is that
        of the last stage; others have none. ValueError: attention weights, of which there are none
        over all patches."""
        if attention:
            raise ValueError("a Swin attends within windows only: it has no attention over all "
                             "patches")
        blocks = range(self.depth) if blocks is None else blocks
        if not len(blocks) or min(blocks) < 0 or max(blocks) >= self.depth:
            raise ValueError(f"stages must be 0 to {self.depth - 1}, not {sorted(blocks)}")
        if x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise ValueError(f"image size {x.shape[2]}x{x.shape[3]} is not a multiple of patch "
                             f"size {self.patch_size}")
        dtype, factors = self.drop_rates.dtype, self.drop_factors(len(x), drop)
        outputs, i = {}, 0
        for stage in range(max(blocks) + 1):
            # features 0, 2, 4, ...: patch embedding, merging; the residual stays fp32 in autocast
            x = self.features[2 * stage](x).to(dtype)                        # (B, h, w, width)
            for block in self.features[2 * stage + 1]:
                drop_attn, drop_mlp = (1, 1) if factors is None else (
                    factors[:, n, None, None, None] for n in (2 * i, 2 * i + 1))
                x = x + block.attn(block.norm1(x)) * drop_attn
                x = x + block.mlp(block.norm2(x)) * drop_mlp
                i += 1
            if stage in blocks:
                last = stage == self.depth - 1
                outputs[stage] = (self.norm(x) if norm and last else x).flatten(1, 2)
        return [outputs[stage] for stage in blocks], {}

    def split(self, tokens):
        """(B, N, D) -> None, as there is no class token; patches (B, N, D)."""
        return None, tokens

    def drop_factors(self, batch, drop=None):
        """Stochastic depth: factors of the branches, 0 or 1 / (1 - rate); None in eval mode or
        without drop path. drop: see forward()."""
        if not self.training or not self.config["drop_path"]:
            return None
        if drop is None:
            drop = torch.rand(batch, len(self.drop_rates), device=self.drop_rates.device)
        return (drop >= self.drop_rates) / (1 - self.drop_rates)


def make_swin(name, img_size, **more):
    """The Swin of that name for images of this side. more: drop_path, final_norm."""
    size = dict(SIZES[name])
    size["patch_size"] = size["patch_size"] or max(1, img_size // 16)
    return Swin(img_size, **size, **more)


def set_sizes(cfg):
    """Sets patch_size, embed_dim, depth and num_heads of a run's settings to those of its Swin: of
    the last stage, and the number of all blocks. Also pos and init. ValueError as of Swin, and with
    --init-from."""
    if cfg.init_from:
        raise ValueError("--init-from loads a ViT: leave it out, or choose --backbone vit")
    with torch.device("meta"):
        net = make_swin(cfg.backbone, cfg.img_size)
    cfg.patch_size, cfg.embed_dim, cfg.depth = net.patch_size, net.embed_dim, len(net.drop_rates)//2
    cfg.num_heads, cfg.pos, cfg.init = net.config["num_heads"][-1], "learned", "trunc"
