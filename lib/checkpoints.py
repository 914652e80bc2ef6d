"""Encoder checkpoints: our encoder.pt, and the official files of DeiT, MoCo v3, DINO, iBOT, MAE,
BEiT, CAE, SimMIM and timm.

    net = checkpoints.load_encoder("out/mmc-toy/encoder.pt")      # a ViT; net.source: its origin
    head = checkpoints.projector(net)                             # its projection head, or None
    checkpoints.save_encoder("mine.pt", net, method="mine")       # with timm's parameter names

The layout of a file is recognized from its keys. Files are untrusted: no code in them is run, and a
missing or unexpected key is an error. Weights are loaded unchanged: position tables are kept, not
recomputed, and separate q and v biases stay separate, so that further training keeps the key bias
at zero.
"""
import argparse
import math
import os
import pathlib
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                 # ImageNet's


@dataclass
class Layout:
    """Keys of an official file, inside its wrapper ("model", "state_dict" or none), and settings
    that do not follow from the keys."""
    method: str
    branches: dict                       # branch -> prefix of its keys; the first is the default
    heads: dict = field(default_factory=dict)               # branch -> {head: prefix of its keys}
    drop: str = "(?!)"                   # keys that may be present and are not needed, a regex
    pos: str = "learned"                 # "none": a shared relative table instead
    resize: str = "size"
    init: str = "trunc"                  # its code's initialization, for re-initialized blocks
    twelve_heads: bool = False           # at every width below 1024, instead of width / 64
    mean: tuple = MEAN
    std: tuple = STD
    interpolation: str = "bicubic"       # of the resize before the center crop in evaluation


REL_POS_INDEX = r"rel_pos_bias\.relative_position_index"
MEAN_HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
TEACHER_STUDENT = dict(
    branches={"teacher": "teacher.backbone.", "student": "student.module.backbone."},
    heads={"teacher": {"head": "teacher.head."}, "student": {"head": "student.module.head."}},
    drop=r"teacher\.head\.|student\.module\.(head\.|backbone\.masked_embed$)", resize="dino")
LAYOUTS = {
    "DeiT":          Layout("deit", {"base": ""}, drop=r"head\."),
    "MoCo v3":       Layout("moco_v3", {"base": "module.base_encoder.",
                                        "momentum": "module.momentum_encoder."},
                            {"base": {"projector": "module.base_encoder.head.",
                                      "predictor": "module.predictor."},
                             "momentum": {"projector": "module.momentum_encoder.head."}},
                            drop=r"module\.predictor\.", pos="sincos_row", init="moco",
                            twelve_heads=True, interpolation="bilinear"),
    "DINO backbone": Layout("dino", {"teacher": ""}, resize="dino"),
    "DINO full":     Layout("dino", **TEACHER_STUDENT),
    "iBOT backbone": Layout("ibot", {"teacher": ""}, drop="masked_embed$", resize="dino"),
    "iBOT full":     Layout("ibot", **TEACHER_STUDENT),
    "MAE":           Layout("mae", {"base": ""}, {"base": {"decoder": "decoder_",
                                                        "aug_block": "aug_block."}},     # ASL's
                            drop="mask_token$", pos="sincos_col", init="mae"),
    "BEiT 22k":      Layout("beit", {"base": ""}, pos="none", init="beit", **MEAN_HALF,
                            drop=rf"mask_token$|lm_head\.|cls_pt_layers\.|{REL_POS_INDEX}"),
    "BEiT 1k":       Layout("beit", {"base": ""}, init="beit", drop=r"mask_token$|lm_head\."),
    "CAE":           Layout("cae", {"base": "encoder."}, pos="sincos_row", init="cae",
                            drop=r"mask_token$|rd_pos_embed|alignment_encoder\.|teacher\."
                                 r"|regresser\.|decoder\.|pretext_neck\.|encoder_to_",
                            twelve_heads=True),
    "SimMIM":        Layout("simmim", {"base": "encoder."}, pos="none", init="beit",
                            drop=rf"encoder\.mask_token$|decoder\.0\.|encoder\.{REL_POS_INDEX}"),
    "timm augreg":   Layout("augreg", {"base": ""}, drop=r"head\.|pre_logits\.", **MEAN_HALF),
}


def mae_names(net):
    """The state dict of the network of mae.py or asl.py, under the names of MAE's published files;
    ASL's aug_block keeps its name."""
    return {key.removeprefix("encoder.").replace("decoder.mask_token", "mask_token")
            .replace("decoder.", "decoder_"): x for key, x in net.state_dict().items()}


def simmim_names(net):
    """The state dict of the network of simmim.py, under the names of SimMIM's published files."""
    def rename(key):
        key = re.sub(r"ls([12])\.gamma", r"gamma_\1", key.replace("backbone.", "encoder."))
        return key.replace("mask_token", "encoder.mask_token")

    return {rename(key): x for key, x in net.state_dict().items()}


def save_encoder(path, net, **info):
    """Writes an encoder checkpoint ("encoder.pt") atomically.

    info: branch, method, data, step, mean, std, interpolation, heads ({name: state dict}), and any
    other plain data. Equal content gives equal bytes. ValueError: a value is not plain data.
    """
    content = dict(format="encoder/1", model=net.state_dict(), config=net.config,
                   branch="untrained", method=None, data=None, step=0, mean=MEAN, std=STD,
                   interpolation="bicubic", heads={})
    content = copy_plain_data({**content, **info}, "checkpoint")
    write_atomic(path, lambda file: torch.save(content, file))     # given a path, torch stores it


def write_atomic(path, write):
    """Calls write(file) for a temporary file next to `path`, then renames it to `path`.

    So the file is either complete or as before. OSError with a readable message if it cannot be
    written, for example on a full disk.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        pathlib.Path(temporary).unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and not re.search("StreamWriter|unexpected pos",
                                                             str(error)):
            raise                         # not one of torch.save's errors for a failed disk write
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}); the previous file is unchanged: free some "
                      "space, or choose another folder with --out") from None


def copy_plain_data(x, where):
    """A copy of nested plain data, tensors on the CPU. ValueError for what read_file() rejects.

    where: the name of x in the error message.
    """
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().clone()
    if isinstance(x, dict):
        return {name: copy_plain_data(value, f"{where}[{name!r}]") for name, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(copy_plain_data(value, where) for value in x)
    if x is None or type(x) in (bool, int, float, str):
        return x
    raise ValueError(f"{where} is a {type(x).__name__}: make it a tensor, number, string or list")


class Ignored:
    """Replaces objects in a file that are not weights: accepts any state and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Classes that a file may contain besides tensors and plain types, and what replaces them. SimMIM's
# yacs node is a dict subclass, which the weights-only reader does not fill; it fills OrderedDict.
ALLOWED = [(OrderedDict, "yacs.config.CfgNode"), (argparse.Namespace, "argparse.Namespace"),
           (pathlib.PurePosixPath, "pathlib.PosixPath"),
           (pathlib.PurePosixPath, "pathlib._local.PosixPath"), (Ignored, "numpy.dtype"),
           (Ignored, "numpy.core.multiarray.scalar"), (Ignored, "numpy._core.multiarray.scalar")]


def read_file(path):
    """The raw content of a checkpoint: the dict that was saved, or the tensors of an .npz.

    FileNotFoundError: no such file. ValueError: it is damaged, is not a dict, or contains Python
    objects that are not plain data (see ALLOWED).
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with torch.serialization.safe_globals(ALLOWED):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                # untrusted bytes can raise anything
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(f"{path} contains Python objects that are not plain data "
                             f"({foreign[1]}); nothing was run or loaded: use a file that contains "
                             "only tensors") from None
        raise ValueError(f"{path} is damaged, truncated or not a PyTorch file "
                         f"({type(error).__name__}): download or copy it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} contains a {type(raw).__name__}, not a dict of weights: use a "
                         "checkpoint with a state dict")
    return raw


def load_encoder(path, branch=None, img_size=None, quiet=False):
    """The encoder of a checkpoint file, ours or an official one, as a ViT in eval mode.

    branch    "teacher", "student", "base" or "momentum", if the file has it; default: the one that
              the method evaluates
    img_size  side of the images it will get, in pixels: only checked and printed, since the ViT
              resizes its positions to the input
    quiet     do not print the line that describes the model

    The ViT's attribute `source` has path, layout, branch, method, data, step, mean, std,
    interpolation (of the input in training) and heads {name: state dict} (projectors, decoder).

    The layout is recognized from the keys, except for one ambiguity: a flat file with head.weight
    is taken as timm's augreg (mean 0.5), without it as DINO's backbone. Two simplifications of ours
    for augreg: positions are resized without antialiasing, and probes resize images to 256, not
    248, before the center crop of 224.
    Errors: those of read_file(), and ValueError for an unknown layout or keys or shapes that do not
    match.
    """
    raw = read_file(path)
    form = str(raw.get("format", ""))
    if form.startswith("training/"):
        raise ValueError(f"{path} is a training state; use encoder.pt of the same folder")
    parse = parse_own_file if form.startswith("encoder/") else parse_official_file
    name, config, state, source = parse(path, raw, branch)
    try:
        net = vit.ViT(**config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: its config does not describe a ViT ({error})") from None
    expected = net.state_dict()
    check_keys(path, name, expected.keys() - state.keys(), state.keys() - expected.keys(),
               [f"{key} {tuple(value.shape)} for {tuple(expected[key].shape)}"
                for key, value in state.items()
                if key in expected and value.shape != expected[key].shape])
    net.load_state_dict(state)
    net.source = SimpleNamespace(path=str(path), layout=name, **source)

    side, p = net.grid[0], net.patch_size
    if img_size and img_size % p:
        raise ValueError(f"image size {img_size} is not a multiple of patch size {p} of {path}")
    resized = f" interpolated to {img_size // p}" if img_size and img_size != side * p else ""
    if not quiet:
        print(f"{os.path.basename(path)}: {name}, {net.source.branch}; {len(state)} tensors, width "
              f"{net.embed_dim}, depth {net.depth}, heads {config['num_heads']}, patch {p}, "
              f"grid {side}{resized}; input mean {net.source.mean[0]:g}; "
              f"with {', '.join(net.source.heads) or 'no heads'}")
    return net.eval()


def parse_own_file(path, raw, branch):
    """Content of a file of save_encoder() -> layout name, ViT arguments, state dict, source."""
    names = ("branch", "method", "data", "step", "mean", "std", "interpolation", "heads")
    complete = {"model", "config", *names} <= raw.keys() and all(
        isinstance(raw[key], dict) for key in ("model", "config", "heads")) and all(
        torch.is_tensor(value) for value in raw["model"].values())
    if raw["format"] != "encoder/1" or not complete:
        raise ValueError(f"{path} has an unknown format, {raw['format']} with {list(raw)}: use an "
                         "encoder.pt that this version of the code has written")
    if branch not in (None, raw["branch"]):
        raise ValueError(f"{path} has no {branch}, only {raw['branch']}: choose another --branch")
    return "ours", raw["config"], raw["model"], {name: raw[name] for name in names}


def parse_official_file(path, raw, branch):
    """Content of a published file -> layout name, ViT arguments, state dict, source."""
    name, flat = recognize_layout(path, raw)
    if name is None:
        first = ", ".join(str(key) for key in list(flat)[:8])
        raise ValueError(f"{path} has an unknown layout with {len(flat)} keys ({first} ...); known "
                         f"are {', '.join(LAYOUTS)} and our encoder.pt")
    layout = LAYOUTS[name]
    branch = branch or next(iter(layout.branches))
    if branch not in layout.branches:
        raise ValueError(f"{path} ({name}) has no {branch}, only {', '.join(layout.branches)}: "
                         "choose another --branch")
    state, heads, unexpected = split_keys(flat, layout, branch)
    num_heads = raw.get("num_heads")                                           # in our full.pt only
    config = infer_config(path, name, state, unexpected,
                          num_heads if type(num_heads) is int else None)
    return name, config, state, dict(
        branch=branch, method=raw.get("method", layout.method), data=raw.get("data"),
        step=raw.get("step"), mean=layout.mean, std=layout.std, interpolation=layout.interpolation,
        heads=heads)


def split_keys(flat, layout, branch):
    """Content of a published file -> the encoder's state dict with timm's names, {head: state
    dict}, and a list of the keys that the layout does not have. Half precision becomes fp32."""
    state, heads, unexpected, prefix = {}, {}, [], layout.branches[branch]
    head_prefixes = {start: head for head, start in layout.heads.get(branch, {}).items()}
    for key, value in flat.items():
        start = next((start for start in head_prefixes if key.startswith(start)), None)
        is_tensor = isinstance(value, torch.Tensor)
        value = value.float() if is_tensor and value.is_floating_point() else value
        if start:
            heads.setdefault(head_prefixes[start], {})[key[len(start):]] = value
        elif re.match(layout.drop, key):
            continue
        elif key.startswith(prefix) and is_tensor:
            key = key[len(prefix):].replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            state[key] = value
        elif not is_tensor or not key.startswith(tuple(layout.branches.values())):
            unexpected.append(key)
    for head in heads.values():                    # iBOT's shared head is stored twice: keep one
        twins = {key: key.replace("layer2.", "layer.") for key in head if "last_layer2." in key}
        if all(one in head and torch.equal(head[two], head[one]) for two, one in twins.items()):
            for two in twins:
                del head[two]
    return state, heads, unexpected


def infer_config(path, name, state, unexpected, num_heads):
    """ViT arguments of a published file, from the shapes of its weights.

    num_heads: the number of heads if the file contains it, else None: then the layout gives it. It
    cannot be inferred from shapes, and a wrong value would cause no error, only wrong features.
    ValueError: keys or shapes do not match the layout.
    """
    layout = LAYOUTS[name]
    table, fc1 = "rel_pos_bias.relative_position_bias_table", "blocks.0.mlp.fc1.weight"
    required = ("patch_embed.proj.weight", fc1, table if layout.pos == "none" else "pos_embed")
    misshapen = [f"{key} {tuple(state[key].shape)}" for key, dims in zip(required, (4, 2, 3))
                 if key in state and state[key].dim() != (2 if key == table else dims)]
    check_keys(path, name, set(required) - state.keys(), unexpected, misshapen)
    dim, channels, p, _ = state["patch_embed.proj.weight"].shape
    if layout.pos == "none":
        side = (math.isqrt(len(state[table])) + 1) // 2                   # (2 side - 1)^2 + 3 rows
    else:
        side, cls_row = math.isqrt(state["pos_embed"].shape[1]), state["pos_embed"][:, 0]
        if layout.pos.startswith("sincos") == bool(cls_row.any()):  # zero in sin-cos tables only
            raise ValueError(f"{path} has the keys of {name}, but its positions are not "
                             f"{layout.pos}: it is another model, whose number of heads may differ")
    if num_heads is None:
        num_heads = max(dim // 64, 1)
        if layout.twelve_heads:
            num_heads = 12 if dim < 1024 else 16
    blocks = {key.split(".")[1] for key in state if re.match(r"blocks\.\d+\.", key)}
    return dict(
        img_size=side * p, patch_size=p, embed_dim=dim, depth=len(blocks), in_chans=channels,
        num_heads=num_heads, mlp_ratio=len(state[fc1]) / dim, pos=layout.pos,
        rel_pos="shared" if layout.pos == "none" else None,
        layer_scale=0.1 if "blocks.0.ls1.gamma" in state else None,
        qkv_bias="split" if "blocks.0.attn.q_bias" in state else "fused", resize=layout.resize,
        init=layout.init)


def recognize_layout(path, raw):
    """Raw checkpoint -> its key in LAYOUTS (None: unknown), and its content without the wrapper.

    ValueError: a known model that is not supported (distilled DeiT, DeiT III, fine-tuned BEiT).
    """
    if all(isinstance(raw.get(branch), dict) for branch in ("teacher", "student")):
        flat = {f"{branch}.{key}": value for branch in ("teacher", "student")
                for key, value in raw[branch].items()}
        names = {"dino_loss": "DINO full", "ibot_loss": "iBOT full"}
        return next((name for loss, name in names.items() if loss in raw), None), flat
    if "embedding/kernel" in raw:
        return "timm augreg", convert_npz(raw)
    wrapper = next((key for key in ("state_dict", "model") if isinstance(raw.get(key), dict)), None)
    flat = {str(key): value for key, value in (raw[wrapper] if wrapper else raw).items()}

    def has(*prefixes):
        return any(key.startswith(prefixes) for key in flat)

    pos = flat.get("pos_embed")
    rows = pos.shape[1] if torch.is_tensor(pos) and pos.dim() == 3 else 0
    if has("dist_token", "head_dist"):
        raise ValueError(f"{path} is a distilled DeiT, which has two class tokens: use plain DeiT")
    if rows and has("cls_token") and math.isqrt(rows) ** 2 == rows:
        raise ValueError(f"{path} is a DeiT III, whose class token has no position: use plain DeiT")
    if has("fc_norm."):
        raise ValueError(f"{path} is a fine-tuned classifier (fc_norm), and the normalization of "
                         "its input is not in the file: use the pretrained file")
    plain = has("blocks.0.") and has("patch_embed.proj.")
    tests = {                                      # wrapper -> (layout, test), the first that holds
        "state_dict": (("MoCo v3", has("module.base_encoder.")), ("iBOT backbone", plain)),
        "model": (("SimMIM", has("encoder.") and "decoder.0.weight" in flat),
                  ("CAE", has("encoder.") and has("regresser.", "pretext_neck.", "mask_token")),
                  ("BEiT 22k", has("lm_head.") and has("rel_pos_bias.")),
                  ("BEiT 1k", has("lm_head.")), ("DeiT", plain and has("head.")), ("MAE", plain)),
        None: (("timm augreg", plain and has("head.")), ("DINO backbone", plain))}
    return next((name for name, holds in tests[wrapper] if holds), None), flat


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
            if all(key in arrays for key in keys):        # (D, heads, D/heads) and (heads, D/heads)
                qkv = [arrays.pop(key) for key in keys]
                out[f"blocks.{n}.attn.qkv.{name}"] = torch.cat(
                    [x.flatten(1).T if kind == "kernel" else x.flatten() for x in qkv])
    for key, value in arrays.items():
        stem, _, kind = key.rpartition("/")
        if kind == "kernel":              # (p, p, 3, D), (heads, D/heads, D), or (in, out)
            value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.flatten(0, -2).T
        ours = {"kernel": "weight", "scale": "weight", "bias": "bias"}.get(kind)
        out[f"{stems[stem]}.{ours}" if stem in stems and ours else key] = value
    return out


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


# --------------------------------------------------------------------------------------------------
# Projection head of an encoder


def projector(encoder, narrow=True):
    """The projection head of a loaded encoder as a frozen module, or None.

    It maps tokens (B, L, D) after the final norm to the output of the head for the class token,
    which represents the image in the loss. None: the file has no such head (MAE, BEiT, CAE, SimMIM,
    files with the backbone only).

    MoCo v3, hybrid   class token -> projector; the predictor is left out
    MMC               class token -> its head "cls"; "patch", the head for patches, is left out
    DINO, iBOT        class token -> MLP, L2-normalized -> prototypes: logits (B, K), before center
                      and softmax
    SelfPatch         patches -> class attention -> the same as DINO

    narrow: logits in an orthonormal basis of their span, (B, 256) instead of (B, 65536). Lengths
    and angles of logits do not change, hence neither do linear classifiers of them.
    ValueError: the keys of the head do not have a known form.
    """
    heads = getattr(encoder, "source", None) and encoder.source.heads
    names = [name for name in ("projector", "cls", "head", "c_head") if heads and name in heads]
    if not names:
        return None
    try:
        head = Projector(heads[names[0]], heads.get("ca_head"), encoder.config["num_heads"], narrow)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{encoder.source.path}: cannot rebuild the head with the keys "
                         f"{', '.join(heads[names[0]])} ({error})") from None
    return head.to(encoder.drop_rates.device).eval().requires_grad_(False)


class Projector(nn.Module):
    """A projection head built from state dicts, see `projector`."""

    def __init__(self, head, pooling=None, num_heads=1, narrow=True):
        super().__init__()
        prototypes = {key: x for key, x in head.items() if key.startswith("last_layer.")}
        mlp = {key.removeprefix("mlp."): x for key, x in head.items()
               if not key.startswith("last_layer")}
        self.mlp = build_sequential(mlp, relu=not prototypes)
        self.pooling = ClassAttention(pooling, num_heads) if pooling else None
        self.prototypes = None
        if prototypes:
            weight = prototype_matrix(prototypes)                              # (K, bottleneck)
            if narrow and len(weight) > weight.shape[1]:      # W = QR: |Wz| = |Rz|, equal angles
                weight = torch.linalg.qr(weight, mode="r").R          # (bottleneck, bottleneck)
            self.prototypes = nn.Parameter(weight)

    def forward(self, tokens):
        z = self.mlp(self.pooling(tokens) if self.pooling else tokens[:, 0])
        if self.prototypes is None:
            return z
        return F.linear(F.normalize(z, dim=-1), self.prototypes)


def build_sequential(state, relu):
    """nn.Sequential of Linear and BatchNorm1d layers from its state dict. An index without
    tensors is an activation: ReLU, or GELU if not `relu`."""
    layers = []
    for i in range(max(int(key.split(".")[0]) for key in state) + 1):
        layer_state = {key.split(".", 1)[1]: x for key, x in state.items()
                       if key.startswith(f"{i}.")}
        if not layer_state:
            layers.append(nn.ReLU() if relu else nn.GELU())
            continue
        if "running_mean" in layer_state:
            layer = nn.BatchNorm1d(len(layer_state["running_mean"]), affine="weight" in layer_state)
        else:
            layer = nn.Linear(*layer_state["weight"].shape[::-1], bias="bias" in layer_state)
        layer.load_state_dict(layer_state)
        layers.append(layer)
    return nn.Sequential(*layers)


def prototype_matrix(state):
    """Prototypes (K, bottleneck) from the last layer of DINO's head, plain or with weight norm."""
    if "last_layer.weight" in state:
        return state["last_layer.weight"]
    for length, direction in (("weight_g", "weight_v"), ("parametrizations.weight.original0",
                                                         "parametrizations.weight.original1")):
        if f"last_layer.{direction}" in state:
            return state[f"last_layer.{length}"] * F.normalize(
                state[f"last_layer.{direction}"], dim=1)
    raise KeyError("no weights of the last layer")


class ClassAttention(nn.Module):
    """SelfPatch's aggregation: patches (B, N, D) -> image vector (B, D), by two class-attention
    blocks, in which one token attends to itself and to the patches (CaiT's, no layer scale)."""

    def __init__(self, state, num_heads):
        super().__init__()
        dim, self.num_heads = state["cls_token"].shape[2], num_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_blocks, self.norm = nn.ModuleList(), nn.LayerNorm(dim, 1e-6)
        for _ in {key.split(".")[1] for key in state if key.startswith("cls_blocks.")}:
            parts = {name: nn.Linear(dim, dim) for name in ("q", "k", "v", "proj")}
            mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            self.cls_blocks.append(nn.ModuleDict({
                **parts, "mlp": mlp, "norm1": nn.LayerNorm(dim, 1e-6),
                "norm2": nn.LayerNorm(dim, 1e-6)}))
        self.load_state_dict(state)

    def forward(self, y):
        z = self.cls_token.expand(len(y), -1, -1)                                    # (B, 1, D)
        for block in self.cls_blocks:
            x = block["norm1"](torch.cat([z, y], 1))                                 # (B, 1+N, D)
            q, k, v = (block[name](x[:, :1] if name == "q" else x)
                       .unflatten(2, (self.num_heads, -1)).transpose(1, 2) for name in "qkv")
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)   # (B, 1, D)
            z = z + block["proj"](x)
            z = z + block["mlp"](block["norm2"](z))
        return self.norm(z)[:, 0]
