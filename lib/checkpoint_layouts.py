"""Published checkpoint files: their layouts, and how each becomes the arguments and weights of a
ViT (of MoBY also of a Swin).

    name, config, state, source = checkpoint_layouts.parse_official_file(path, raw)

    raw content of a file
      | find_encoders       a dict of keys for each encoder (teacher, student ...)
      | recognize_layout    which of LAYOUTS it is, from its keys
      | split_keys          the encoder's state dict under timm's names, its heads
      | infer_config        the architecture, from the shapes of the weights
    arguments of vit.ViT, state dict, source

What the keys do not show (heads of the attention, normalization of the input) comes from the file's
own arguments, else from what was published with this layout, else from the caller. Weights are
unchanged: position tables are kept, not recomputed, and separate q and v biases stay separate, so
that further training keeps the key bias at zero.
"""
import argparse
import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lib import positions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                 # ImageNet's
NORMALIZATIONS = {"imagenet": dict(mean=MEAN, std=STD), "0.5": dict(mean=(0.5,) * 3,
                                                                    std=(0.5,) * 3)}
# (width, depth) -> attention heads, of the published models. Width / 64 is wrong for several.
VIT_HEADS = {(192, 12): 3, (384, 12): 6, (512, 12): 8, (768, 12): 12, (1024, 24): 16,
             (1280, 32): 16, (1408, 40): 16, (1536, 40): 24, (1664, 48): 16}
MOCO_HEADS = {(384, 12): 12, (768, 12): 12}
CAE_HEADS = {(192, 12): 12, (384, 12): 12, (768, 12): 12, (1024, 24): 16}


def published(*widths):
    """VIT_HEADS of these widths: those that were published with a layout."""
    return {size: heads for size, heads in VIT_HEADS.items() if size[0] in widths}


@dataclass
class Layout:
    """What is the same for all files of a layout and does not follow from their keys."""
    method: str | None
    heads: dict = field(default_factory=dict)    # {head: prefix of its keys}
    drop: str = "(?!)"                   # keys that may be present and are not needed, a regex
    branch: str = "base"                 # name of the only branch, of files with one
    num_heads: dict = field(default_factory=lambda: VIT_HEADS)
    resize: str = "size"
    init: str = "trunc"                  # its code's initialization, for re-initialized blocks
    layer_scale: float = 0.1             # likewise
    normalization: str = "imagenet"
    unsure: str = ""                     # which files of this layout need the other normalization
    interpolation: str = "bicubic"       # of the resize before the center crop in evaluation
    img_size: int | None = None          # side in evaluation; None: that of the position table


# "../" precedes the names of keys that are beside the encoder, see find_encoders.
DINO = dict(branch="teacher", resize="dino")
BEIT = dict(init="beit", normalization="0.5", drop=r"lm_head\.|cls_pt_(layers|norm|lm_head)\.")
MOBY = dict(interpolation="bilinear",
            drop=r"\.\./(encoder|projector|predictor)(_k)?\.|\.\./queue|.*\.attn_mask$")
LAYOUTS = {
    "DeiT": Layout("deit", num_heads=published(192, 384, 768), unsure="timm's augreg models"),
    "DeiT III": Layout("deit3", num_heads=published(384, 512, 768, 1024, 1280), layer_scale=1e-4),
    "MoCo v3": Layout("moco_v3", {"projector": "head.", "predictor": "../predictor."},
                      drop=r"\.\./(base|momentum)_encoder\.", num_heads=MOCO_HEADS, init="moco",
                      interpolation="bilinear"),
    "MoBY": Layout("moby", {"projector": "../projector.", "predictor": "../predictor."}, **MOBY),
    "MoBY momentum": Layout("moby", {"projector": "../projector_k."}, **MOBY),
    "DINO": Layout("dino", {"head": "../head."}, **DINO, num_heads=published(384, 768),
                   unsure="timm's augreg models"),
    "iBOT": Layout("ibot", {"head": "../head."}, **DINO, num_heads=published(384, 768, 1024),
                   unsure="timm's augreg models"),
    "SelfPatch": Layout("selfpatch", {name: f"../{name}." for name in ("ca_head", "c_head",
                                                                       "p_head")}, **DINO,
                        num_heads=published(384)),
    "DINOv2": Layout("dinov2", drop=r"\.\./(dino|ibot)_head\.", layer_scale=1e-5, img_size=224,
                     num_heads=published(384, 768, 1024, 1536), **DINO),
    "MAE": Layout("mae", {"decoder": "decoder_", "aug_block": "aug_block."}, init="mae",    # ASL's
                  num_heads=published(768, 1024, 1280)),
    "fine-tuned MAE": Layout("mae", init="mae", num_heads=published(768, 1024, 1280)),
    "BEiT": Layout("beit", **BEIT),
    "BEiT 1k": Layout("beit", **BEIT | dict(normalization="imagenet"),
                      unsure="models that were trained as BEiT's 22k ones"),
    "BEiT v2": Layout("beit", **BEIT | dict(normalization="imagenet")),
    "BEiT or SimMIM": Layout("beit", **BEIT, unsure="SimMIM and BEiT v2"),
    "fine-tuned BEiT": Layout("beit", **BEIT, unsure="BEiT 1k, BEiT v2 and SimMIM"),
    "CAE": Layout("cae", drop=r"\.\./(mask_token|rd_pos_embed$|(alignment_encoder|teacher|regresser"
                              r"|decoder|pretext_neck|encoder_to_\w+)\.)",
                  num_heads=CAE_HEADS, init="cae"),
    "SimMIM": Layout("simmim", init="beit", drop=r"\.\./decoder\.0\."),
    "timm": Layout("augreg", resize="antialias", normalization="0.5",
                   unsure="timm's models other than augreg"),
    "plain ViT": Layout(None, unsure="timm's augreg models"),
}
# Keys of every layout: buffers that are recomputed, tokens that only pretraining uses, and a
# classifier with what it adds to the encoder.
NOT_NEEDED = r"mask_token$|masked_embed$|(.*\.)?relative_position_index$"
CLASSIFIER = r"(head|fc_norm|pre_logits|attentive_blocks)\.|query_token$"
TIMM_NAMES = ((r"gamma_([12])$", r"ls\1.gamma"), (r"mlp\.w12\.", "mlp.fc1."),
              (r"mlp\.w3\.", "mlp.fc2."), (r"^reg_token$", "register_tokens"),
              (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"))           # DINOv2 in chunks of blocks
# Branches, by words in the prefix of an encoder's keys or in the name of its entry in the file.
BRANCHES = {"teacher": "teacher", "student": "student", "momentum": "momentum",
            "encoder_k": "momentum", "ema": "ema"}
ANCHOR = "patch_embed.proj.weight"                 # every ViT has it: what precedes it is a prefix
NPZ_ANCHOR = "embedding/kernel"                    # the same in .npz files


class UnknownHeads(ValueError):
    """The number of attention heads follows neither from the file nor from its layout."""


def parse_official_file(path, raw, branch=None, num_heads=None, normalization=None):
    """Content of a published file -> layout name, ViT arguments, state dict, source.

    Other arguments: see checkpoints.load_encoder. source also has what is printed: other_branches,
    num_heads_from and notes, sentences about what is assumed or left out. ValueError: an unknown
    layout, keys that do not match it, a branch that the file does not have. UnknownHeads.
    """
    encoders = {}
    for found, keys in find_encoders(raw).items():
        refuse_unsupported(path, keys)
        name = recognize_layout(keys, raw)
        if name is None:
            first = ", ".join(list(keys)[:8])
            raise ValueError(f"{path} has an unknown layout with {len(keys)} keys ({first} ...); "
                             f"known are {', '.join(LAYOUTS)} and our encoder.pt")
        if found == "base":
            found = "student" if "masked_embed" in keys else LAYOUTS[name].branch
        encoders[found] = name, keys
    order = [b for b in ("base", "teacher", "student") if b in encoders] + list(encoders)
    branch = branch or order[0]
    if branch not in encoders:
        raise ValueError(f"{path} ({name}) has no {branch}, only {', '.join(encoders)}: choose "
                         "another --branch")
    name, keys = encoders[branch]
    state, heads, unexpected, beside = split_keys(keys, LAYOUTS[name])
    if LAYOUTS[name].method == "moby":
        heads = {head: rename_moby_head(tensors) for head, tensors in heads.items()}
    if "layers.0.blocks.0.norm1.weight" in state:
        state, config = convert_swin(path, name, state, unexpected)
        origin = "in the file"
    else:
        config = infer_config(path, name, state, unexpected)
        config["num_heads"], origin = choose_num_heads(path, name, config, raw, state, num_heads)
    mean_and_std, notes = choose_normalization(name, raw, normalization)
    if beside:
        notes.append(f"{len(beside)} keys beside the encoder are left out: "
                     f"{', '.join(beside[:4])}{' ...' * (len(beside) > 4)}")
    layout = LAYOUTS[name]
    return name, config, state, dict(
        branch=branch, other_branches=[b for b in encoders if b != branch],
        method=raw.get("method", layout.method), data=raw.get("data"), step=raw.get("step"),
        interpolation=layout.interpolation, heads=heads, img_size=layout.img_size,
        num_heads_from=origin, notes=notes, **mean_and_std)


# --------------------------------------------------------------------------------------------------
# Keys


def find_encoders(raw):
    """{branch: {key: value}} of a file, for each ViT in it.

    "module." and "_orig_mod." are removed from all keys, and from those of the encoder the prefix
    that precedes them ("backbone.", "encoder." ...). Keys without this prefix are not the
    encoder's: their names start with "../". Without any ViT: the keys of the largest state dict.
    """
    if NPZ_ANCHOR in raw:
        return {"base": convert_npz(raw)}
    encoders, found = {}, state_dicts(raw)
    for entry, state in found.items():
        for prefix in [key.removesuffix(ANCHOR) for key in state if key.endswith(ANCHOR)]:
            branch = next((branch for word, branch in BRANCHES.items() if re.search(
                rf"(\b|_){word}(\b|_)", f"{prefix} {entry}")), "base")
            if branch in encoders:                           # for example CAE's alignment_encoder
                branch = prefix.rstrip(".") or entry
            encoders[branch] = {timm_name(key.removeprefix(prefix)) if key.startswith(prefix) else
                                f"../{key}": x for key, x in state.items()}
    return encoders or {"base": max(found.values(), key=len)}


def state_dicts(raw):
    """{entry: {key: value}} of the entries of a file that contain tensors ("model", "teacher" ...),
    and of the file itself as the entry "", without "module." and "_orig_mod." in keys."""
    entries = {str(entry): x for entry, x in raw.items()
               if isinstance(x, dict) and any(map(torch.is_tensor, x.values()))}
    return {entry: {re.sub(r"\b(module|_orig_mod)\.", "", str(key)): x for key, x in state.items()}
            for entry, state in {**entries, "": raw}.items()}


def timm_name(key):
    for pattern, name in TIMM_NAMES:
        key = re.sub(pattern, name, key)
    return key


def refuse_unsupported(path, keys):
    """ValueError for known files that are not supported."""
    def has(*starts):
        return any(key.startswith(starts) for key in keys)

    patches = keys.get(ANCHOR)
    if any(re.match(r"(.*\.)?(encoder|model)\.layer\.\d", key) for key in keys):
        raise ValueError(f"{path} has the names of the transformers library: use the official file "
                         "or timm's of the same model")
    if has("dist_token", "head_dist"):
        raise ValueError(f"{path} is a distilled DeiT, which has two class tokens: use plain DeiT")
    if has("rope", "storage_tokens") or any(key.endswith("bias_mask") for key in keys) or (
            has("register_tokens") and not has("pos_embed")):            # timm's files
        raise ValueError(f"{path} is a DINOv3 or another model with rotary positions, which vit.py "
                         "does not have: use DINOv2")
    if torch.is_tensor(patches) and patches.dim() == 4 and patches.shape[1] != 3:
        raise ValueError(f"{path} is a model of images with {patches.shape[1]} channels, and all "
                         "data sets here have 3 (RGB): use a model of RGB images")


def recognize_layout(keys, raw):
    """Keys of an encoder, see find_encoders -> its name in LAYOUTS; None: unknown."""
    def has(*starts):
        return any(key.startswith(starts) for key in keys)

    if has("../projector_k.") and has("blocks.0.", "layers.0.blocks."):
        return "MoBY momentum" if has("../encoder.") else "MoBY"
    if not has("blocks.0.") or ANCHOR not in keys:
        return None
    pos, flat = kind_of_positions(keys), any(
        str(key).endswith((ANCHOR, NPZ_ANCHOR)) for key in raw)
    shared_table, block_table = has("rel_pos_bias."), has("blocks.0.attn.relative_position_bias")
    table = shared_table or block_table
    split, scaled = has("blocks.0.attn.q_bias"), has("blocks.0.ls1.")
    tests = (                                              # (layout, test), the first that holds
        ("MoCo v3", has("../predictor.", "../base_encoder.", "../momentum_encoder.")),
        ("SimMIM", has("../decoder.0.")),
        ("CAE", has("../regresser.", "../pretext_neck.", "../alignment_encoder.")),
        ("BEiT v2", has("cls_pt_layers.")),
        ("BEiT 1k", has("lm_head.") and not table),
        ("BEiT", has("lm_head.")),
        ("CAE", pos == "sincos_row" and split),                      # also a fine-tuned one
        ("SimMIM", table and "max_accuracy" in raw),
        ("BEiT or SimMIM", shared_table),
        ("fine-tuned BEiT", table or split),
        ("SelfPatch", not has("cls_token", "norm.", "head.", "fc_norm.")),
        ("DINOv2", has("register_tokens") or scaled and has_class_position(keys)),
        ("DeiT III", scaled and has("cls_token")),
        ("MAE", pos == "sincos_col" or has("decoder_embed.")),
        ("MoCo v3", pos == "sincos_row"),
        ("fine-tuned MAE", has("fc_norm.") and (has("cls_token") or not flat)),
        ("iBOT", "ibot_loss" in raw or has("masked_embed", "../head.last_layer2.")),
        ("timm", has("head.") and flat),
        ("DeiT", has("head.")),
        ("iBOT", "state_dict" in raw),
        ("DINO", flat or has("../head.") or "teacher" in raw or "student" in raw),
        ("plain ViT", True))
    return next(name for name, holds in tests if holds)


def kind_of_positions(keys):
    """Keys of an encoder -> "learned", "sincos_row", "sincos_col" or "none" (see vit.ViT)."""
    if "pos_embed" not in keys:
        return "none"
    if has_class_position(keys):
        pos = keys["pos_embed"].float()
        side = math.isqrt(pos.shape[1])
        for order in ("sincos_row", "sincos_col") if pos.shape[2] % 4 == 0 else ():
            table = F.pad(positions.sincos(pos.shape[2], (side, side), order), (0, 0, 1, 0))
            if torch.allclose(pos[0], table, atol=1e-3, rtol=1e-2):    # the precision of bf16
                return order
    return "learned"


def has_class_position(keys):
    """Whether pos_embed has a row for the class token: (1, 1 + side^2, D)."""
    pos = keys.get("pos_embed")
    rows = pos.shape[1] if torch.is_tensor(pos) and pos.dim() == 3 else 0
    return rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1


def split_keys(keys, layout):
    """Keys of an encoder -> its state dict, {head: state dict}, and the keys that the layout does
    not have, in the encoder and beside it. Half precision becomes fp32; integers are no weights of
    an encoder (a quantized one needs their scale)."""
    state, heads, unexpected, beside = {}, {}, [], []
    for key, value in keys.items():
        is_tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided
        is_weight = is_tensor and value.is_floating_point()
        value = value.float() if is_weight else value
        head = next((head for head, start in layout.heads.items() if key.startswith(start)), None)
        if key in ("head.weight", "head.bias") or not head and re.match(CLASSIFIER, key):
            head = "classifier"
        if is_tensor and head == "classifier":
            heads.setdefault(head, {})[key] = value
        elif is_tensor and head:
            heads.setdefault(head, {})[key.removeprefix(layout.heads[head])] = value
        elif re.match(f"{NOT_NEEDED}|{layout.drop}", key):
            continue
        elif key.startswith("../"):
            beside.append(key.removeprefix("../"))
        elif is_weight:
            state[key] = value
        else:
            unexpected.append(key)
    for head in heads.values():                    # iBOT's shared head is stored twice: keep one
        twins = {key: key.replace("layer2.", "layer.") for key in head if "last_layer2." in key}
        if all(one in head and torch.equal(head[two], head[one]) for two, one in twins.items()):
            for two in twins:
                del head[two]
    pos = state.get("pos_embed")
    if "cls_token" in state and pos is not None and pos.dim() == 3 and (
            math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]):
        state["pos_embed"] = F.pad(pos, (0, 0, 1, 0))      # DeiT III: 0 instead of no position
    return state, heads, unexpected, beside


def convert_npz(arrays):
    """The Flax names and axis orders of the original ViT release -> timm's."""
    stems = {"embedding": "patch_embed.proj", "Transformer/encoder_norm": "norm", "head": "head",
             "pre_logits": "pre_logits.fc"}
    parts = {"LayerNorm_0": "norm1", "LayerNorm_2": "norm2", "MlpBlock_3/Dense_0": "mlp.fc1",
             "MlpBlock_3/Dense_1": "mlp.fc2", "MultiHeadDotProductAttention_1/out": "attn.proj"}
    block_numbers = {match[1] for key in arrays
                     if (match := re.match(r"Transformer/encoderblock_(\d+)/", key))}
    for n in block_numbers:
        stems |= {f"Transformer/encoderblock_{n}/{k}": f"blocks.{n}.{v}" for k, v in parts.items()}
    arrays, out = dict(arrays), {}
    for theirs, ours in (("cls", "cls_token"),
                         ("Transformer/posembed_input/pos_embedding", "pos_embed")):
        if theirs in arrays:
            out[ours] = arrays.pop(theirs)
    for n in block_numbers:
        root = f"Transformer/encoderblock_{n}/MultiHeadDotProductAttention_1"
        for kind, name in (("kernel", "weight"), ("bias", "bias")):
            keys = [f"{root}/{part}/{kind}" for part in ("query", "key", "value")]
            if all(key in arrays and arrays[key].dim() > 1 for key in keys):
                qkv = [arrays.pop(key) for key in keys]   # (D, heads, D/heads) and (heads, D/heads)
                out[f"blocks.{n}.attn.qkv.{name}"] = torch.cat(
                    [x.flatten(1).T if kind == "kernel" else x.flatten() for x in qkv])
    for key, value in arrays.items():
        stem, _, kind = key.rpartition("/")
        if kind == "kernel" and value.dim() > 1:    # (p, p, 3, D), (heads, D/heads, D) or (in, out)
            value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.flatten(0, -2).T
        ours = {"kernel": "weight", "scale": "weight", "bias": "bias"}.get(kind)
        out[f"{stems[stem]}.{ours}" if stem in stems and ours else key] = value
    return out


def rename_moby_head(head):
    """MoBY's names of the layers of a head -> those of moby.py."""
    indices = {"linear_hidden.1": "0", "linear_hidden.2": "1", "linear_out": "3"}
    return {re.sub(r"^(linear_hidden\.\d|linear_out)", lambda stem: indices.get(stem[0], stem[0]),
                   key): x for key, x in head.items()}


def convert_swin(path, name, state, unexpected):
    """State dict of MoBY's Swin -> the same with torchvision's names, arguments of swin.Swin.
    ValueError: keys or shapes do not match."""
    def rename(key):
        key = re.sub(r"^patch_embed\.(proj|norm)\.",
                     lambda part: f"features.0.{0 if part[1] == 'proj' else 2}.", key)
        key = re.sub(r"^layers\.(\d+)\.blocks\.", lambda n: f"features.{2 * int(n[1]) + 1}.", key)
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda n: f"features.{2 * int(n[1]) + 2}.",
                     key)
        return key.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.3.")

    state = {rename(key): x for key, x in state.items()}
    embed, table = "features.0.0.weight", "features.{}.0.attn.relative_position_bias_table"
    blocks = [re.match(r"features\.(\d+)\.\d+\.norm1\.weight", key) for key in state]
    blocks = [int(match[1]) for match in blocks if match]
    stages = sorted(set(blocks))
    rank = {embed: 4, **{table.format(stage): 2 for stage in stages}}
    check_keys(path, name, rank.keys() - state.keys(), unexpected,
               [f"{key} {tuple(state[key].shape)}" for key in rank
                if key in state and state[key].dim() != rank[key]])
    tables = [state[table.format(stage)] for stage in stages]                # ((2 window - 1)^2, H)
    window, p = (math.isqrt(len(tables[-1])) + 1) // 2, state[embed].shape[2]
    config = dict(
        img_size=window * p * 2 ** (len(stages) - 1), patch_size=p, embed_dim=len(state[embed]),
        depths=tuple(blocks.count(stage) for stage in stages),
        num_heads=tuple(bias.shape[1] for bias in tables), drop_path=0.0, final_norm=True)
    return state, config


# --------------------------------------------------------------------------------------------------
# Architecture and input


def infer_config(path, name, state, unexpected):
    """ViT arguments of a published file, without num_heads, from the shapes of its weights.
    ValueError: keys or shapes do not match the layout."""
    layout, fc1 = LAYOUTS[name], "blocks.0.mlp.fc1.weight"
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    rank = {ANCHOR: 4, fc1: 2, "blocks.0.mlp.fc2.weight": 2,
            (tables or ["pos_embed"])[0]: 2 if tables else 3}
    rank |= {key: 3 for key in ("pos_embed", "register_tokens") if key in state}
    check_keys(path, name, rank.keys() - state.keys(), unexpected,
               [f"{key} {tuple(state[key].shape)}" for key in rank
                if key in state and (state[key].dim() != rank[key] or not state[key].numel())])
    dim, channels, p, _ = state[ANCHOR].shape
    side = math.isqrt(state["pos_embed"].shape[1]) if "pos_embed" in state else (
        (math.isqrt(len(state[tables[0]])) + 1) // 2)                     # (2 side - 1)^2 + 3 rows
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    registers = state.get("register_tokens")
    return dict(
        img_size=side * p, patch_size=p, embed_dim=dim, depth=len(blocks), in_chans=channels,
        mlp_ratio=hidden / dim, swiglu=len(state[fc1]) == 2 * hidden,
        class_token="cls_token" in state, pos=kind_of_positions(state),
        registers=0 if registers is None else registers.shape[1],
        rel_pos=None if not tables else "shared" if tables[0].startswith("rel_pos") else "block",
        layer_scale=layout.layer_scale if "blocks.0.ls1.gamma" in state else None,
        qkv_bias=next((kind for kind, key in (("split", "q_bias"), ("fused", "qkv.bias"))
                       if f"blocks.0.attn.{key}" in state), "none"),
        final_norm="norm.weight" in state, init=layout.init,
        resize=layout.resize if registers is None else "antialias")


def choose_num_heads(path, name, config, raw, state, given):
    """The number of attention heads, and where it comes from, in words.

    Weights have the same shapes for every number of heads: a wrong one would cause no error, only
    wrong features. ValueError: `given` contradicts the file, or does not divide the width.
    UnknownHeads.
    """
    tables = [x.shape[1] for key, x in state.items() if key.endswith("position_bias_table")]
    kernels = [x.shape[1] for key, x in raw.items() if str(key).endswith("query/kernel")]
    stated = [n for n in (*tables, *kernels, raw.get("num_heads")) if type(n) is int]
    if stated:
        if given not in (None, stated[0]):
            raise ValueError(f"{path} has {stated[0]} heads, not {given}: leave out --num-heads")
        return stated[0], "in the file"
    if given is not None:
        if given < 1 or config["embed_dim"] % given:
            raise ValueError(f"{path} has width {config['embed_dim']}, which is not a multiple of "
                             f"{given} attention heads: choose another --num-heads")
        return given, "--num-heads"
    size = config["embed_dim"], config["depth"]
    if size not in LAYOUTS[name].num_heads:
        raise UnknownHeads(f"{path} does not contain its number of attention heads, and no {name} "
                           f"of width {size[0]} and depth {size[1]} was published: give it with "
                           "--num-heads (often width / 64)")
    return LAYOUTS[name].num_heads[size], "assumed" if name == "plain ViT" else "as published"


def choose_normalization(name, raw, given):
    """Mean and std of the input normalization, and a list: a sentence if they are only assumed.

    given: a key of NORMALIZATIONS, or None for the file's arguments (the codes of BEiT and CAE
    store it), else for what its layout was published with.
    """
    layout, args = LAYOUTS[name], raw.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    stated = args.get("imagenet_default_mean_and_std") if isinstance(args, dict) else None
    if given or stated is not None:
        return NORMALIZATIONS[given or ("imagenet" if stated else "0.5")], []
    usual = NORMALIZATIONS[layout.normalization]
    if not layout.unsure or {NPZ_ANCHOR, "teacher", "student"} & raw.keys():
        return usual, []
    [other] = NORMALIZATIONS.keys() - {layout.normalization}
    return usual, [f"the file does not contain the normalization of its input, mean "
                   f"{usual['mean'][0]:g} is assumed; {layout.unsure} need --normalization {other}"]


def check_keys(path, name, missing, unexpected, misshapen):
    """Raises ValueError that lists the keys, if there are any."""
    problems = []
    for what, keys in (("missing", missing), ("unexpected", unexpected),
                       ("of another shape", misshapen)):
        first = ", ".join(sorted(map(str, keys))[:6]) + (" ..." if len(keys) > 6 else "")
        problems += [f"{len(keys)} {what}: {first}"] if keys else []
    if problems:
        raise ValueError(f"{path} is recognized as {name}, but its keys do not match; "
                         f"{'; '.join(problems)}. Known layouts: {', '.join(LAYOUTS)} and our "
                         "encoder.pt")
