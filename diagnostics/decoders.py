"""Decoders rebuilt from checkpoints: from the tokens of any block back to pixels.

    mask, visible, reconstruct = mask_and_reconstruct(model, x, seed)
    reconstruct(block)                                  # (B, 3, S, S) from that block's tokens

encoder.pt does not hold a decoder. It is read from the checkpoint itself (official full files),
from full.pt next to it (MAE, ASL, SimMIM), or from the student in last.pt (MMC, hybrid).
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import nn

import vit
from diagnostics.inputs import MissingInput, expand_mask
from lib import checkpoint_heads, checkpoints, positions, rng


def load_pretraining_state(model):
    """The state dict that holds a decoder, and the settings of the run from config.yaml; {} for
    what is missing. Keys are official names, or in last.pt those of the student."""
    path, method = Path(model.source.path or ""), model.source.method
    files = [path, path.with_name("full.pt")] if model.source.path else []
    if method in ("mmc", "hybrid"):                            # last.pt is large
        files.append(path.with_name("last.pt"))
    for raw in (checkpoints.read_file(file) for file in files if file.is_file()):
        state = raw.get("model") or raw.get("state", {}).get("student", {})
        if RECONSTRUCTIONS.keys() & state.keys():
            config, device = path.with_name("config.yaml"), next(model.encoder.parameters()).device
            config = yaml.safe_load(config.read_text()) if config.is_file() else {}
            if raw.get("decoder_num_heads"):             # in full.pt
                config["decoder_num_heads"] = raw["decoder_num_heads"]
            return {key: x.to(device) for key, x in state.items()}, config
    return {}, {}


def strip_prefix(state, prefix):
    """The part of a state dict whose keys start with the prefix, without it."""
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


# ---- MAE, ASL ------------------------------------------------------------------------------------


class MAEDecoder(nn.Module):
    """MAE's decoder from a state dict in official names."""

    def __init__(self, state, num_heads):
        super().__init__()
        weights = strip_prefix(state, "decoder_")
        self.pos_embed = weights.pop("pos_embed")
        self.mask_token = state["mask_token"]
        width, dim = weights["embed.weight"].shape
        depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
        self.embed = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(vit.Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.pred = nn.Linear(width, len(weights["pred.bias"]))
        self.load_state_dict(weights)

    def embed_tokens(self, tokens, restore=None):
        """The input of the first block (B, L, width of the decoder).

        tokens: (B, L, D), all of them. Or only the visible ones, with restore (B, N), the position
        of each patch in the list of visible, then masked patches: mask tokens are inserted.
        """
        x = self.embed(tokens)
        if restore is not None:
            masked = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
            y = torch.cat([x[:, 1:], masked], 1)
            x = torch.cat([x[:, :1], y.gather(1, restore[..., None].expand_as(y))], 1)
        old, new = (math.isqrt(table.shape[1] - 1) for table in (self.pos_embed, x))
        return x + positions.resize_positions(self.pos_embed, (old, old), (new, new), "size")

    def predict(self, x):
        """Output of the last block -> pixels of each patch (B, N, 3pp)."""
        return self.pred(self.norm(x))[:, 1:]


def build_mae_decoder(model, state, config):
    """MAE's decoder from what `load_pretraining_state` returns. MissingInput if there is none, or
    if its number of heads is unknown: the weights do not determine it."""
    if "decoder_embed.weight" not in state:
        raise MissingInput("no decoder of MAE found: it needs full.pt next to encoder.pt, or an "
                           "official full file")
    width = len(state["decoder_embed.weight"])
    num_heads = config.get("decoder_num_heads", 16 if width == 512 else None)        # the official
    if num_heads is None:
        raise MissingInput("config.yaml is missing next to the weights, and the number of heads of "
                           f"a decoder of width {width} is unknown (MAE's has width 512 and 16 "
                           "heads): add config.yaml of the run")
    return MAEDecoder(state, num_heads).to(next(model.encoder.parameters()).device).eval()


def mask_and_reconstruct_mae(model, x, seed, state, config):
    decoder, p = build_mae_decoder(model, state, config), model.encoder.patch_size
    if "norm_pix_loss" not in config:
        print("note: no config.yaml next to the decoder; the settings of MAE's official decoder "
              "are assumed (norm_pix_loss, mask ratio 0.75)")
    g = x.shape[-1] // p
    num_visible = int(g * g * (1 - config.get("mask_ratio", 0.75)))
    u = rng.uniform(torch.arange(len(x), device=x.device), g * g, seed, "hide")
    order = u.argsort(dim=1, stable=True)
    restore = order.argsort(1)
    layers, _ = model.encoder.layers(x, keep=order[:, :num_visible])
    var, mean = torch.var_mean(F.pixel_unshuffle(x, p), 1, keepdim=True)             # (B, 1, g, g)

    def reconstruct(block):
        z = decoder.embed_tokens(layers[block], restore)
        for decoder_block in decoder.blocks:
            z = decoder_block(z)
        z = to_pixel_shuffle_order(decoder.predict(z), g)
        if config.get("norm_pix_loss", True):
            z = z * (var + 1e-6).sqrt() + mean
        return F.pixel_shuffle(z, p)
    mask = expand_mask(restore >= num_visible, x.shape[-1])
    return mask, x.masked_fill(mask, 0), reconstruct


def to_pixel_shuffle_order(z, g):
    """(B, N, pp3), colors innermost -> (B, 3pp, g, g), colors outermost as in F.pixel_shuffle."""
    return z.unflatten(2, (-1, 3)).permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, (g, g))


# ---- SimMIM, hybrid ------------------------------------------------------------------------------


def mask_and_reconstruct_simmim(model, x, seed, state, config):
    """For SimMIM and the hybrid, whose state is from last.pt and has other names."""
    encoder, p = model.encoder, model.encoder.patch_size
    g = x.shape[-1] // p
    side = max(1, config.get("mask_patch_size", 32) // p)      # of a masked square, in patches
    u = rng.uniform(torch.arange(len(x), device=x.device), (g // side) ** 2, seed, "hide")
    rank = u.argsort(1).argsort(1)
    squares = rank < math.ceil(config.get("mask_ratio", 0.6) * rank.shape[1])
    mask = expand_mask(squares, x.shape[-1])
    token = state["encoder.mask_token"] if "encoder.mask_token" in state else state["mask_token"]
    layers, _ = encoder.layers(x, mask=mask[:, 0, ::p, ::p].flatten(1), mask_token=token)

    def reconstruct(block):
        z = encoder.split(layers[block])[1].mT.unflatten(2, (g, g))
        return F.pixel_shuffle(F.conv2d(z, state["decoder.0.weight"], state["decoder.0.bias"]), p)
    return mask, x.masked_fill(mask, 0), reconstruct


# ---- MMC -----------------------------------------------------------------------------------------


def mask_and_reconstruct_mmc(model, x, seed, state, config):
    """Reconstructs from tokens of the student, on which the head was trained (encoder.pt holds the
    teacher). Masked rectangles are filled with noise."""
    student = vit.ViT(**model.encoder.config).to(x.device).eval()
    student.load_state_dict(strip_prefix(state, "backbone."))
    head = checkpoint_heads.build_sequential(strip_prefix(state, "head_rec."), relu=False)
    head = head.to(x.device).eval()
    index, S = torch.arange(len(x)), x.shape[-1]
    u = rng.uniform(index, (255, 4), seed, "hide")
    ratio = config.get("noise_ratio", 0.75)
    mask = torch.stack([draw_rectangles(candidates, S, ratio) for candidates in u])
    mask = mask[:, None].to(x.device)
    visible = rng.normal(index, x.shape[1:], seed, "noise").to(x.device).where(mask, x)
    layers, _ = student.layers(visible)

    def reconstruct(block):
        z = head(student.split(layers[block])[1])
        p = student.patch_size
        return F.pixel_shuffle(to_pixel_shuffle_order(z, S // p), p)
    return mask, visible, reconstruct


def draw_rectangles(u, S, ratio):
    """Random rectangles with sides below 0.3 S, one after the other until they cover the fraction
    `ratio`. u: uniform numbers (candidates, 4) -> (S, S) bool."""
    mask = torch.zeros(S, S, dtype=torch.bool)
    for top, left, height, width in u.tolist():
        if mask.sum() >= ratio * S * S:
            break
        top, left = (int(start * (S - 1)) for start in (top, left))
        height, width = (1 + int(length * (int(0.3 * S) - 1)) for length in (height, width))
        mask[top:top + height, left:left + width] = True
    return mask


# ---- all -----------------------------------------------------------------------------------------

RECONSTRUCTIONS = {                     # a key of the state dict that identifies the decoder
    "decoder_embed.weight": mask_and_reconstruct_mae,
    "decoder.0.weight": mask_and_reconstruct_simmim,
    "head_rec.0.weight": mask_and_reconstruct_mmc,
}


def mask_and_reconstruct(model, x, seed):
    """Masks images x (B, 3, S, S) as in pretraining and prepares their reconstruction.

    -> mask (B, 1, S, S) bool; visible (B, 3, S, S), the input of the encoder; reconstruct(block) ->
    (B, 3, S, S), from that block's tokens: later blocks are skipped, the final norm is applied as
    in training. MissingInput if the checkpoint has no decoder.
    """
    state, config = load_pretraining_state(model)
    key = next((key for key in RECONSTRUCTIONS if key in state), None)
    if not key:
        raise MissingInput("no decoder found: it needs full.pt of MAE, ASL or SimMIM, or last.pt "
                           "of MMC or the hybrid, next to encoder.pt")
    return RECONSTRUCTIONS[key](model, x, seed, state, config)
