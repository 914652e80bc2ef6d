"""Checkpoints of encoders: ours, and the official files of DeiT, MoCo v3, DINO, iBOT, MAE, BEiT,
CAE, SimMIM and timm.

    net = checkpoints.load_encoder("out/mmc-toy/encoder.pt")      # a vit.ViT; net.source says what it is
    head = checkpoints.projector(net)                     # the head that training had put on it
    checkpoints.save_encoder("mine.pt", net, method="mine")       # in timm's names

The layout is told from the keys. A file is untrusted: nothing in it is run, and a key that is
missing or left over is an error. The model comes back as it lies in the file: position tables are
kept, not computed again, and q and v biases in the split form stay split, so training goes on with
the key bias at zero.
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
    """How an official file is laid out; keys without the wrapper ("model", "state_dict", none)."""
    method: str
    branches: dict                       # branch -> prefix of its keys; first the one to evaluate
    heads: dict = field(default_factory=dict)               # branch -> {head: prefix of its keys}
    drop: str = "(?!)"                   # keys that may be there and are not needed, a regex
    pos: str = "learned"                 # "none": a shared relative table instead
    resize: str = "size"
    init: str = "trunc"                  # how its code draws weights: for blocks that start anew
    twelve: bool = False                 # 12 heads at every width below 1024, not width / 64
    mean: tuple = MEAN
    std: tuple = STD
    interpolation: str = "bicubic"       # of the resize before the centre crop in evaluation


INDEX = r"rel_pos_bias\.relative_position_index"
HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
PAIR = dict(
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
                            twelve=True, interpolation="bilinear"),
    "DINO backbone": Layout("dino", {"teacher": ""}, resize="dino"),
    "DINO full":     Layout("dino", **PAIR),
    "iBOT backbone": Layout("ibot", {"teacher": ""}, drop="masked_embed$", resize="dino"),
    "iBOT full":     Layout("ibot", **PAIR),
    "MAE":           Layout("mae", {"base": ""}, {"base": {"decoder": "decoder_",
                                                        "aug_block": "aug_block."}},     # ASL's
                            drop="mask_token$", pos="sincos_col", init="mae"),
    "BEiT 22k":      Layout("beit", {"base": ""}, pos="none", init="beit", **HALF,
                            drop=rf"mask_token$|lm_head\.|cls_pt_layers\.|{INDEX}"),
    "BEiT 1k":       Layout("beit", {"base": ""}, init="beit", drop=r"mask_token$|lm_head\."),
    "CAE":           Layout("cae", {"base": "encoder."}, pos="sincos_row", init="cae", twelve=True,
                            drop=r"mask_token$|rd_pos_embed|alignment_encoder\.|teacher\."
                                 r"|regresser\.|decoder\.|pretext_neck\.|encoder_to_"),
    "SimMIM":        Layout("simmim", {"base": "encoder."}, pos="none", init="beit",
                            drop=rf"encoder\.mask_token$|decoder\.0\.|encoder\.{INDEX}"),
    "timm augreg":   Layout("augreg", {"base": ""}, drop=r"head\.|pre_logits\.", **HALF),
}


def save_encoder(path, net, **info):
    """Write an encoder checkpoint ("encoder.pt"), atomically: plain data, equal bytes if equal.

    info: branch, method, data, step, mean, std, interpolation, heads ({name: state dict}), or more.
    """
    content = dict(format="encoder/1", model=net.state_dict(), config=net.config,
                   branch="untrained", method=None, data=None, step=0, mean=MEAN, std=STD,
                   interpolation="bicubic", heads={})
    content = _plain({**content, **info}, "checkpoint")
    write_atomic(path, lambda file: torch.save(content, file))     # a name would get into the file


def write_atomic(path, write):
    """write(file) into a temporary file beside `path`, then rename: the file is whole or as before.

    OSError with a sentence when it cannot be written, on a full disk for one.
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
            raise                                                   # torch.save's are of the disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}); what was there before is untouched: free "
                      "some space, or choose another folder with --out") from None


def _plain(x, where):
    """A copy of nested plain data, tensors on the CPU; ValueError for what read() would refuse."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().clone()
    if isinstance(x, dict):
        return {name: _plain(value, f"{where}[{name!r}]") for name, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_plain(value, where) for value in x)
    if x is None or type(x) in (bool, int, float, str):
        return x
    raise ValueError(f"{where} is a {type(x).__name__}: make it a tensor, number, string or list")


class Inert:
    """Stands in for objects beside the weights: takes what it is given and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Beside tensors and plain types only these names in a file are known, and this is made of them.
# SimMIM's yacs node is a dict subclass, which the weights-only reader will not fill; it fills this.
STAND_INS = [(OrderedDict, "yacs.config.CfgNode"), (argparse.Namespace, "argparse.Namespace"),
             (pathlib.PurePosixPath, "pathlib.PosixPath"),
             (pathlib.PurePosixPath, "pathlib._local.PosixPath"), (Inert, "numpy.dtype"),
             (Inert, "numpy.core.multiarray.scalar"), (Inert, "numpy._core.multiarray.scalar")]


def read_file(path):
    """The raw content of a checkpoint: the dict that was saved, or the tensors of an .npz.

    FileNotFoundError if there is none; ValueError if it is damaged or holds more than plain data.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with torch.serialization.safe_globals(STAND_INS):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                # bytes from anywhere may fail anyhow: one sentence
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(f"{path} holds Python objects that are not plain data ({foreign[1]}); "
                             "nothing was run or loaded: get a file with tensors only") from None
        raise ValueError(f"{path} is damaged, cut off or not a PyTorch file "
                         f"({type(error).__name__}): fetch or copy it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not a dict with weights")
    return raw


def load_encoder(path, branch=None, img_size=None, quiet=False):
    """The encoder in a checkpoint file, ours or an official one, as a ViT in eval mode.

    branch    "teacher", "student", "base" or "momentum", as the file has; default: to be evaluated
    img_size  pixels a side it will be fed; only checked and printed, as positions follow the input
    Its `source` says what it is: path, layout, branch, method, data, step, mean, std, interpolation
    (of the input in training), heads {name: state dict} (projectors, decoder). Prints one line.

    The layout is told from the keys. Two things they do not tell: a flat file with head.weight is
    taken for timm's augreg (mean 0.5), one without for DINO's backbone. Of augreg two things are
    not timm's, our simplification: positions are stretched without antialiasing, and probes resize
    to 256, not 248, before they cut out 224.
    Errors: as read_file(), and ValueError for a layout, keys or shapes that do not fit.
    """
    raw = read_file(path)
    form = str(raw.get("format", ""))
    if form.startswith("training/"):
        raise ValueError(f"{path}: that is a training state; use encoder.pt beside it")
    parse = _ours if form.startswith("encoder/") else _official
    name, config, state, source = parse(path, raw, branch)
    try:
        net = vit.ViT(**config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: its config does not describe a ViT ({error})") from None
    want = net.state_dict()
    _fit(path, name, want.keys() - state.keys(), state.keys() - want.keys(),
         [f"{key} {tuple(value.shape)} for {tuple(want[key].shape)}" for key, value in state.items()
          if key in want and value.shape != want[key].shape])
    net.load_state_dict(state)
    net.source = SimpleNamespace(path=str(path), layout=name, **source)

    side, p = net.grid[0], net.patch_size
    if img_size and img_size % p:
        raise ValueError(f"image size {img_size} is not a multiple of patch size {p} of {path}")
    other = f" interpolated to {img_size // p}" if img_size and img_size != side * p else ""
    if not quiet:
        print(f"{os.path.basename(path)}: {name}, {net.source.branch}; {len(state)} tensors, width "
              f"{net.embed_dim}, depth {net.depth}, heads {config['num_heads']}, patch {p}, "
              f"grid {side}{other}; input mean {net.source.mean[0]:g}; "
              f"with {', '.join(net.source.heads) or 'no heads'}")
    return net.eval()


def _ours(path, raw, branch):
    """A file by save() -> layout name, ViT arguments, state dict, source."""
    names = ("branch", "method", "data", "step", "mean", "std", "interpolation", "heads")
    whole = {"model", "config", *names} <= raw.keys() and all(
        isinstance(raw[key], dict) for key in ("model", "config", "heads")) and all(
        torch.is_tensor(value) for value in raw["model"].values())
    if raw["format"] != "encoder/1" or not whole:
        raise ValueError(f"{path}: format {raw['format']} with {list(raw)} is not known here")
    if branch not in (None, raw["branch"]):
        raise ValueError(f"{path} holds the {raw['branch']} only, not the {branch}")
    return "ours", raw["config"], raw["model"], {name: raw[name] for name in names}


def _official(path, raw, branch):
    """A published file -> layout name, ViT arguments, state dict in our names, source."""
    name, flat = recognise(path, raw)
    if name is None:
        some = ", ".join(str(key) for key in list(flat)[:8])
        raise ValueError(f"{path}: unknown layout with {len(flat)} keys ({some} ...); known are "
                         f"{', '.join(LAYOUTS)} and our encoder.pt")
    layout = LAYOUTS[name]
    branch = branch or next(iter(layout.branches))
    if branch not in layout.branches:
        raise ValueError(f"{path} ({name}) has no {branch}, only {', '.join(layout.branches)}")

    state, heads, surplus, prefix = {}, {}, [], layout.branches[branch]
    starts = {start: head for head, start in layout.heads.get(branch, {}).items()}
    for key, value in flat.items():
        start = next((start for start in starts if key.startswith(start)), None)
        tensor = isinstance(value, torch.Tensor)
        value = value.float() if tensor and value.is_floating_point() else value         # from fp16
        if start:
            heads.setdefault(starts[start], {})[key[len(start):]] = value
        elif re.match(layout.drop, key):
            continue
        elif key.startswith(prefix) and tensor:
            key = key[len(prefix):].replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            state[key] = value
        elif not tensor or not key.startswith(tuple(layout.branches.values())):
            surplus.append(key)
    for head in heads.values():                      # iBOT's shared head is listed twice: keep one
        twins = {key: key.replace("layer2.", "layer.") for key in head if "last_layer2." in key}
        if all(one in head and torch.equal(head[two], head[one]) for two, one in twins.items()):
            for two in twins:
                del head[two]

    # arguments from shapes; the number of heads has none, and a wrong one would run all the same
    table, fc1 = "rel_pos_bias.relative_position_bias_table", "blocks.0.mlp.fc1.weight"
    anchors = ("patch_embed.proj.weight", fc1, table if layout.pos == "none" else "pos_embed")
    flat_ones = [f"{key} {tuple(state[key].shape)}" for key, dims in zip(anchors, (4, 2, 3))
                 if key in state and state[key].dim() != (2 if key == table else dims)]
    _fit(path, name, set(anchors) - state.keys(), surplus, flat_ones)
    dim, channels, p, _ = state["patch_embed.proj.weight"].shape
    if layout.pos == "none":
        side = (math.isqrt(len(state[table])) + 1) // 2                      # (2g-1)^2 + 3 rows
    else:
        side, cls_row = math.isqrt(state["pos_embed"].shape[1]), state["pos_embed"][:, 0]
        if layout.pos.startswith("sincos") == bool(cls_row.any()):  # zero in sin-cos tables only
            raise ValueError(f"{path} has the keys of {name}, but its positions are not "
                             f"{layout.pos}: another model, whose number of heads may differ")
    blocks = {key.split(".")[1] for key in state if re.match(r"blocks\.\d+\.", key)}
    told = raw.get("num_heads")                                                # by our full.pt only
    config = dict(
        img_size=side * p, patch_size=p, embed_dim=dim, depth=len(blocks), in_chans=channels,
        num_heads=told if type(told) is int else (
            (12 if dim < 1024 else 16) if layout.twelve else max(dim // 64, 1)),
        mlp_ratio=len(state[fc1]) / dim, pos=layout.pos,
        rel_pos="shared" if layout.pos == "none" else None,
        layer_scale=0.1 if "blocks.0.ls1.gamma" in state else None,
        qkv_bias="split" if "blocks.0.attn.q_bias" in state else "fused", resize=layout.resize,
        init=layout.init)
    return name, config, state, dict(
        branch=branch, method=raw.get("method", layout.method), data=raw.get("data"),
        step=raw.get("step"), mean=layout.mean, std=layout.std, interpolation=layout.interpolation,
        heads=heads)


def recognise(path, raw):
    """Key in LAYOUTS (None: unknown) and the flat dict of a raw checkpoint; ValueError: refused."""
    if all(isinstance(raw.get(branch), dict) for branch in ("teacher", "student")):
        flat = {f"{branch}.{key}": value for branch in ("teacher", "student")
                for key, value in raw[branch].items()}
        names = {"dino_loss": "DINO full", "ibot_loss": "iBOT full"}
        return next((name for loss, name in names.items() if loss in raw), None), flat
    if "embedding/kernel" in raw:
        return "timm augreg", _from_npz(raw)
    wrapper = next((key for key in ("state_dict", "model") if isinstance(raw.get(key), dict)), None)
    flat = {str(key): value for key, value in (raw[wrapper] if wrapper else raw).items()}

    def has(*prefixes):
        return any(key.startswith(prefixes) for key in flat)

    pos = flat.get("pos_embed")
    rows = pos.shape[1] if torch.is_tensor(pos) and pos.dim() == 3 else 0
    if has("dist_token", "head_dist"):
        raise ValueError(f"{path} is a distilled DeiT, another model (two class tokens): "
                         "use plain DeiT")
    if rows and has("cls_token") and math.isqrt(rows) ** 2 == rows:
        raise ValueError(f"{path} is a DeiT III, another model (class token without position): "
                         "use plain DeiT")
    if has("fc_norm."):
        raise ValueError(f"{path} is a fine-tuned classifier (fc_norm), and does not tell how its "
                         "input was normalised: use the pre-trained file")
    plain = has("blocks.0.") and has("patch_embed.proj.")
    tests = {                                                       # the first that holds, in order
        "state_dict": (("MoCo v3", has("module.base_encoder.")), ("iBOT backbone", plain)),
        "model": (("SimMIM", has("encoder.") and "decoder.0.weight" in flat),
                  ("CAE", has("encoder.") and has("regresser.", "pretext_neck.", "mask_token")),
                  ("BEiT 22k", has("lm_head.") and has("rel_pos_bias.")),
                  ("BEiT 1k", has("lm_head.")), ("DeiT", plain and has("head.")), ("MAE", plain)),
        None: (("timm augreg", plain and has("head.")), ("DINO backbone", plain))}
    return next((name for name, holds in tests[wrapper] if holds), None), flat


def _from_npz(arrays):
    """The Flax names and axis orders of the original ViT release -> timm's."""
    stems = {"embedding": "patch_embed.proj", "Transformer/encoder_norm": "norm", "head": "head",
             "pre_logits": "pre_logits.fc"}
    parts = {"LayerNorm_0": "norm1", "LayerNorm_2": "norm2", "MlpBlock_3/Dense_0": "mlp.fc1",
             "MlpBlock_3/Dense_1": "mlp.fc2", "MultiHeadDotProductAttention_1/out": "attn.proj"}
    numbers = {m[1] for key in arrays if (m := re.match(r"Transformer/encoderblock_(\d+)/", key))}
    for n in numbers:
        stems |= {f"Transformer/encoderblock_{n}/{k}": f"blocks.{n}.{v}" for k, v in parts.items()}
    arrays, out = dict(arrays), {}
    for theirs, ours in (("cls", "cls_token"),
                         ("Transformer/posembed_input/pos_embedding", "pos_embed")):
        if theirs in arrays:
            out[ours] = arrays.pop(theirs)
    for n in numbers:
        root = f"Transformer/encoderblock_{n}/MultiHeadDotProductAttention_1"
        for kind, name in (("kernel", "weight"), ("bias", "bias")):
            keys = [f"{root}/{part}/{kind}" for part in ("query", "key", "value")]
            if all(key in arrays for key in keys):        # (D, heads, D/heads) and (heads, D/heads)
                qkv = [arrays.pop(key) for key in keys]
                out[f"blocks.{n}.attn.qkv.{name}"] = torch.cat(
                    [x.flatten(1).T if kind == "kernel" else x.flatten() for x in qkv])
    for key, value in arrays.items():
        stem, _, kind = key.rpartition("/")
        if kind == "kernel":              # (p, p, 3, D), (heads, D/heads, D), or (in, out) as it is
            value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.flatten(0, -2).T
        ours = {"kernel": "weight", "scale": "weight", "bias": "bias"}.get(kind)
        out[f"{stems[stem]}.{ours}" if stem in stems and ours else key] = value
    return out


def _fit(path, name, missing, surplus, shapes):
    """ValueError with one sentence on what does not fit, if anything."""
    found = []
    for what, keys in (("missing", missing), ("left over", surplus), ("of another shape", shapes)):
        some = ", ".join(sorted(map(str, keys))[:6]) + (" ..." if len(keys) > 6 else "")
        found += [f"{len(keys)} {what}: {some}"] if keys else []
    if found:
        raise ValueError(f"{path}: recognised as {name}, but keys do not fit; {'; '.join(found)}. "
                         f"Layouts known: {', '.join(LAYOUTS)} and our encoder.pt")


# --------------------------------------------------------------------------------------------------
# The projection head that training had put on an encoder

def projector(encoder, narrow=True):
    """That of a loaded checkpoint: a module, tokens (B, P+N, D) after the final norm -> (B, C), the
    vector that stood for the image in training. None where the file has no such head (MAE, BEiT,
    CAE, SimMIM, backbones alone).

    MoCo v3, hybrid   class token -> projector; the predictor is left out
    MMC               class token -> its head for class tokens
    DINO, iBOT        class token -> MLP, length 1, prototypes: logits, before centre and softmax
    SelfPatch         patches -> class attention -> the same

    narrow: logits are given in an orthonormal basis of the space they span, 256 numbers instead of
    65,536: all lengths, angles and hence linear classifiers of logits are as they were.
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
    """What `projector` returns, built from state dicts."""

    def __init__(self, head, gather=None, num_heads=1, narrow=True):
        super().__init__()
        prototypes = {key: x for key, x in head.items() if key.startswith("last_layer.")}
        mlp = {key.removeprefix("mlp."): x for key, x in head.items()
               if not key.startswith("last_layer")}
        self.mlp, self.gather, self.prototypes = numbered(mlp, not prototypes), None, None
        if prototypes:
            weight = prototype_rows(prototypes)                                      # (K, C)
            if narrow and len(weight) > weight.shape[1]:        # W = QR: cosines of Wz are Rz's
                weight = torch.linalg.qr(weight, mode="r").R                         # (C, C)
            self.prototypes = nn.Parameter(weight)
        if gather:
            self.gather = Gather(gather, num_heads)

    def forward(self, tokens):
        z = self.mlp(self.gather(tokens) if self.gather else tokens[:, 0])
        if self.prototypes is None:
            return z
        return F.linear(F.normalize(z, dim=-1), self.prototypes)


def numbered(state, relu):
    """nn.Sequential from its state dict: a number without tensors is an activation."""
    layers = []
    for i in range(max(int(key.split(".")[0]) for key in state) + 1):
        own = {key.split(".", 1)[1]: x for key, x in state.items() if key.startswith(f"{i}.")}
        if not own:
            layers.append(nn.ReLU() if relu else nn.GELU())
            continue
        if "running_mean" in own:
            layer = nn.BatchNorm1d(len(own["running_mean"]), affine="weight" in own)
        else:
            layer = nn.Linear(*own["weight"].shape[::-1], bias="bias" in own)
        layer.load_state_dict(own)
        layers.append(layer)
    return nn.Sequential(*layers)


def prototype_rows(state):
    """(K, C) from the last layer of DINO's head: plain, or length and direction (weight norm)."""
    if "last_layer.weight" in state:
        return state["last_layer.weight"]
    for length, way in (("weight_g", "weight_v"), ("parametrizations.weight.original0",
                                                   "parametrizations.weight.original1")):
        if f"last_layer.{way}" in state:
            return state[f"last_layer.{length}"] * F.normalize(state[f"last_layer.{way}"], dim=1)
    raise KeyError("no weights of the last layer")


class Gather(nn.Module):
    """SelfPatch's aggregation: patches (B, N, D) -> image vector (B, D), by two class attentions,
    in which one vector attends to itself and to the patches (CaiT's block, no layer scale)."""

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
