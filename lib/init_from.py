"""Initial weights of a run from a checkpoint: --init-from FILE, for continued pretraining.

    initial = InitialWeights(cfg)                        # reads the file and compares the sizes
    lines = initial.load(network, network.encoder, full=checkpoints.mae_names(network))

The file is a published one, or encoder.pt or full.pt of a run: all that lib/checkpoints.py reads.
Afterwards the run's encoder computes the same tokens as the encoder in the file; if only one of
them has a class token or a final norm (SelfPatch), these are left out or start from scratch, are
listed, and the tokens differ. What the run's method stores in another form is converted (see
`convert`); other kinds of positions, register tokens and SwiGLU are refused. Decoders of MAE, ASL
and SimMIM are loaded too. Everything else is initialized from scratch.
"""
import re
import typing
from pathlib import Path

import torch

from lib import checkpoints, config, positions
from lib.checkpoint_layouts import UnknownHeads


class InitialWeights:
    """The weights in --init-from FILE.

    FileNotFoundError: no such file. ValueError: it cannot be read, or the network in it has another
    size than that of the settings cfg; the message names the flags to pass.
    """

    def __init__(self, cfg):
        self.cfg, self.path = cfg, Path(cfg.init_from)
        if self.path.is_dir():
            raise ValueError(f"--init-from {self.path} is a folder: name a file, such as its "
                             f"encoder.pt, or full.pt with the decoder")
        given = dict(quiet=True,
                     normalization=None if cfg.normalization == "auto" else cfg.normalization)
        try:
            self.encoder = checkpoints.load_encoder(self.path, **given)
        except UnknownHeads:                             # then those of this run are assumed
            self.encoder = checkpoints.load_encoder(self.path, num_heads=cfg.num_heads, **given)
            self.encoder.source.notes.append("the file does not contain its number of attention "
                                             f"heads, {cfg.num_heads} is assumed (--num-heads)")
        if "depths" in self.encoder.config:
            raise ValueError(f"--init-from {self.path}: the file has a Swin, and runs start from a "
                             f"ViT: use another file")
        if not all(x.isfinite().all() for x in self.encoder.state_dict().values()):
            raise ValueError(f"--init-from {self.path}: its weights are not finite: use another "
                             f"file, or an earlier checkpoint of that run")
        raw = checkpoints.read_file(self.path)
        self.published = published_tensors(raw)
        sizes = {name: self.encoder.config[name]
                 for name in ("embed_dim", "depth", "num_heads", "patch_size")}
        if hasattr(cfg, "decoder_num_heads"):                    # mae.py and asl.py
            sizes |= mae_decoder_sizes(self.path, raw, self.published)
            if "decoder_embed_dim" in sizes and "decoder_num_heads" not in sizes:
                self.encoder.source.notes.append(
                    f"the file does not contain the number of attention heads of its decoder, "
                    f"{cfg.decoder_num_heads} is assumed (--decoder-num-heads)")
        flags = [f"{config.flag(name)} {value}" for name, value in sizes.items()
                 if value != getattr(cfg, name)]
        if flags:
            raise ValueError(f"--init-from {self.path}: the network in the file has another size "
                             f"than this run's; to start from it, pass {' '.join(flags)}")

    def load(self, network, encoder, full=None):
        """Writes the weights into `encoder`, the ViT of the network, and into `full`.

        full: {published name: tensor of the network}, as from checkpoints.mae_names(). Returns
        lines that describe what was done. ValueError: the encoder of the network is of another kind
        than that in the file, or a tensor has another shape.
        """
        self.check_kind(encoder.config)
        state, notes = convert(self.encoder, encoder)
        own = encoder.state_dict()                       # the tensors of the network themselves
        addresses = {x.data_ptr() for x in own.values()}
        rest = {name: x for name, x in (full or {}).items() if x.data_ptr() not in addresses}
        decoder = self.decoder_tensors(rest, encoder.grid)
        loaded = {x.data_ptr() for x in (*self.copy(state, own), *self.copy(decoder, rest))}

        source = self.encoder.source
        first = (f"initial weights from {self.path} ({source.layout}, {source.branch}): "
                 f"{len(state.keys() & own.keys())} of {len(own)} tensors of the encoder")
        if rest:
            first += f", {len(decoder)} of {len(rest)} of decoder and mask token"
        scratch = [name for name, x in network.state_dict().items() if x.data_ptr() not in loaded]
        unused = {"encoder": state.keys() - own.keys(), **{
            head: tensors for head, tensors in source.heads.items()
            if not any(name.startswith(head) for name in decoder)}}
        return [first, *source.notes, *notes, f"from scratch: {listed(scratch)}",
                *(f"in the file, not used: {part}, {listed(names)}"
                  for part, names in unused.items() if names)]

    def copy(self, source, target):
        """Copies the tensors with equal names from one dict to the other, and returns these tensors
        of `target`. ValueError: different shapes."""
        names = source.keys() & target.keys()
        for name in names:
            old, new = tuple(source[name].shape), tuple(target[name].shape)
            if old != new:
                raise ValueError(f"--init-from {self.path}: {name} has shape {old}, in this run "
                                 f"{new}: use another file")
            target[name].copy_(source[name])
        return [target[name] for name in names]

    def check_kind(self, ours):
        """ValueError, with the flags to pass if there are any, unless an encoder with the ViT
        arguments `ours` can represent the one in the file."""
        theirs, flags = self.encoder.config, []
        for name in ("in_chans", "mlp_ratio", "swiglu", "registers"):
            if theirs[name] != ours[name]:
                raise ValueError(f"--init-from {self.path}: its encoder has {name} {theirs[name]}, "
                                 f"this run's {ours[name]}: use another file")
        if (theirs["pos"] == "none") != (ours["pos"] == "none"):
            choices = typing.get_args(typing.get_type_hints(type(self.cfg)).get("pos"))
            flags += [next((f"--pos {choice}" for choice in choices
                            if (choice == "none") == (theirs["pos"] == "none")), None)]
        if theirs["rel_pos"] not in (None, ours["rel_pos"]):
            shared = theirs["rel_pos"] == "shared" and hasattr(self.cfg, "rel_pos_bias")
            flags += ["--rel-pos-bias" if shared else None]
        if flags:
            step = "use a file of a similar method" if None in flags else f"pass {' '.join(flags)}"
            raise ValueError(f"--init-from {self.path}: its encoder has {kind(theirs)} positions, "
                             f"this run's has {kind(ours)} ones; {step}")

    def decoder_tensors(self, rest, grid):
        """{name: tensor} of the file for the published names `rest`; {} if it has no decoder.
        Positions are interpolated to `grid`."""
        found = {name: x.float() for name, x in self.published.items() if name in rest}
        if not any("decoder" in name for name in found):
            return {}                                    # a mask token alone is another method's
        if "decoder_pos_embed" in found:
            found["decoder_pos_embed"] = positions.resize_positions(
                found["decoder_pos_embed"], self.encoder.grid, grid, rule="size")
        return found


def published_tensors(raw):
    """{name: tensor} of the content of a published file or full.pt."""
    wrapper = next((key for key in ("model", "state_dict") if isinstance(raw.get(key), dict)), None)
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): x
            for name, x in (raw[wrapper] if wrapper else raw).items() if torch.is_tensor(x)}


def mae_decoder_sizes(path, raw, tensors):
    """{setting: value} of the decoder of MAE or ASL; {} if the file has none.

    Weights do not determine the number of heads: full.pt contains it; that of an earlier version
    has it in config.yaml next to it. Published decoders, of width 512, have 16.
    """
    if "decoder_embed.weight" not in tensors:
        return {}
    width = len(tensors["decoder_embed.weight"])
    depth = len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")})
    settings, num_heads = path.with_name("config.yaml"), raw.get("decoder_num_heads")
    if num_heads is None and settings.is_file():
        num_heads = config.read_yaml(settings).get("decoder_num_heads")
    num_heads = num_heads or (16 if width == 512 else None)
    sizes = dict(decoder_embed_dim=width, decoder_depth=depth)
    return sizes | (dict(decoder_num_heads=num_heads) if num_heads else {})


def kind(vit_arguments):
    """Kind of the positions of a ViT, in words."""
    absolute = ["absolute"] * (vit_arguments["pos"] != "none")
    relative = {None: [], "shared": ["relative"], "block": ["relative (a table for each block)"]}
    return " and ".join(absolute + relative[vit_arguments["rel_pos"]]) or "no"


def listed(names):
    """ "2 tensors (a, b)", with at most six names."""
    names, dots = sorted(names), ", ..." if len(names) > 6 else ""
    return f"{len(names)} tensors" + f" ({', '.join(names[:6])}{dots})" * bool(names)


# ---- conversion of an encoder --------------------------------------------------------------------


def convert(loaded, encoder):
    """The state dict of the ViT `loaded` for the ViT `encoder`, which then computes the same tokens
    from the same images, if both have the same parts; and sentences that describe what was
    changed."""
    state, notes = loaded.state_dict(), []
    source = loaded.source
    if (tuple(source.mean), tuple(source.std)) != (checkpoints.MEAN, checkpoints.STD):
        absorb_normalization(state, source.mean, source.std)
        notes += [f"its images were normalized by mean {source.mean[0]:g}: the patch embedding is "
                  "adapted to ImageNet's"]
    if loaded.grid != encoder.grid:
        old, new = (f"{grid[0]}x{grid[1]}" for grid in (loaded.grid, encoder.grid))
        notes += [f"positions are interpolated from {old} to {new}"]
    convert_positions(state, loaded, encoder)
    for i in range(loaded.depth):
        convert_biases(state, f"blocks.{i}.attn", encoder.config["qkv_bias"])
        convert_layer_scale(state, f"blocks.{i}", encoder.config["layer_scale"])
    if loaded.config["layer_scale"] is None and encoder.config["layer_scale"] is not None:
        notes += ["layer scale is 1, since the file has none"]
    if loaded.config["layer_scale"] is not None and encoder.config["layer_scale"] is None:
        notes += ["layer scale is multiplied into the weights"]
    return state, notes


def absorb_normalization(state, mean, std):
    """Adapts the patch embedding, which is for images normalized by this mean and std (of each
    channel), to images normalized by ImageNet's."""
    mean, std, new_mean, new_std = (torch.tensor(values).view(3, 1, 1) for values in (
        mean, std, checkpoints.MEAN, checkpoints.STD))
    weight = state["patch_embed.proj.weight"]                                # (D, 3, p, p)
    state["patch_embed.proj.weight"] = weight * new_std / std
    state["patch_embed.proj.bias"] = (
        state["patch_embed.proj.bias"] + (weight * (new_mean - mean) / std).sum((1, 2, 3)))


def convert_positions(state, loaded, encoder):
    """Resizes positions to the encoder's grid, by the rule of `loaded`. Fixed tables have a 0 for
    the class token: its position becomes a part of the class token. If only one of the two encoders
    has a class token, the other's row is left out, or from scratch."""
    prefix = loaded.num_prefix
    positions.resize_state(state, loaded.grid, encoder.grid, loaded.config["resize"])
    if "pos_embed" not in state:
        return
    cls, patches = state["pos_embed"][:, :prefix], state["pos_embed"][:, prefix:]
    if prefix and encoder.config["pos"] != "learned":
        state["cls_token"] = state["cls_token"] + cls
        cls = torch.zeros_like(cls)
    if prefix != encoder.num_prefix and encoder.pos_embed is not None:
        cls = encoder.pos_embed[:, :encoder.num_prefix].detach().cpu()
    state["pos_embed"] = torch.cat([cls, patches], 1)


def convert_biases(state, attention, wanted):
    """Fused biases of query, key and value to split ones, or vice versa. A bias of the key has no
    effect, because it cancels in the softmax: there is none in the split form."""
    fused, split = f"{attention}.qkv.bias", (f"{attention}.q_bias", f"{attention}.v_bias")
    if wanted == "split" and fused in state:
        state[split[0]], _, state[split[1]] = state.pop(fused).chunk(3)
    elif wanted == "fused" and split[0] in state:
        q, v = (state.pop(name) for name in split)
        state[fused] = torch.cat([q, torch.zeros_like(q), v])


def convert_layer_scale(state, block, wanted):
    """Without layer scale in the file: factors 1. Without it in the encoder (`wanted` is None): the
    factors are multiplied into the layer before."""
    for scale, layer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        bias = state[f"{block}.{layer}.bias"]
        if wanted is not None:
            state.setdefault(f"{block}.{scale}", torch.ones_like(bias))
        elif f"{block}.{scale}" in state:
            gamma = state.pop(f"{block}.{scale}")
            state[f"{block}.{layer}.weight"] = state[f"{block}.{layer}.weight"] * gamma[:, None]
            state[f"{block}.{layer}.bias"] = bias * gamma
