"""Encoder checkpoints: our encoder.pt, and the official files of DeiT, DeiT III, MoCo v3, MoBY,
DINO, iBOT, SelfPatch, DINOv2, MAE, BEiT, CAE, SimMIM and timm.

    net = checkpoints.load_encoder("out/mmc-toy/encoder.pt")      # a ViT; net.source: its origin
    checkpoints.save_encoder("mine.pt", net, method="mine")       # with timm's parameter names

Files are untrusted: no code in them is run, and a missing or unexpected key is an error. The layout
of an official file is recognized from its keys, in lib/checkpoint_layouts.py.
"""
import argparse
import errno
import os
import pathlib
import re
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import torch

import vit
from lib import swin
from lib.checkpoint_layouts import (
    MEAN,
    NORMALIZATIONS,
    STD,
    check_keys,
    parse_official_file,
)


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
    temporary = f"{path}.{os.getpid()}.tmp"              # another process may write the same file
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
        reason = getattr(error, "strerror", None) or "the disk is probably full"   # torch's reasons
        unchanged = "; the previous file is unchanged" * os.path.exists(path)      # are obscure
        raise OSError(f"cannot write {path} ({reason}){unchanged}: free some space, or choose "
                      "another folder with --out") from None


def make_folder(path):
    """Creates a folder for results -> Path. OSError with a readable message if it cannot, or if
    nothing can be written there."""
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise OSError(f"cannot write to {path} ({error.strerror}); choose another --out") from None
    return pathlib.Path(path)


def free_name(path):
    """Path of a folder or file that is to be kept -> the first of NAME.1, NAME.2, ... that does not
    exist (of a file NAME.1.pt)."""
    name, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")
    names = (path.with_name(f"{name}.{n}{suffix}") for n in range(1, 10**6))
    return next(name for name in names if not name.exists())


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
    """The raw content of a checkpoint: the dict that was saved, or the tensors of an .npz or
    .safetensors.

    FileNotFoundError: no such file. OSError: it cannot be read. ValueError: it is damaged, is not a
    dict, contains Python objects that are not plain data (see ALLOWED), or needs a package that is
    not installed.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        raw = read_tensors(path)
    except MemoryError:
        raise
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is read by the package {error.name}: "
                         f"pip install {error.name}") from None
    except Exception as error:                # untrusted bytes can raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # truncated
            raise OSError(f"cannot read {path} ({error.strerror})") from None
        foreign = re.search(r"GLOBAL (\S+)|(Object arrays|Can only \w+)", str(error))
        if foreign:
            raise ValueError(f"{path} contains Python objects that are not plain data "
                             f"({foreign[1] or foreign[2]}); nothing was run or loaded: use a file "
                             "that contains only tensors") from None
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript program, and no code in a file is run: use "
                             "the file with its weights") from None
        raise ValueError(f"{path} is damaged, truncated or not a PyTorch file "
                         f"({type(error).__name__}): download or copy it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} contains a {type(raw).__name__}, not a dict of weights: use a "
                         "checkpoint with a state dict")
    return raw


def read_tensors(path):
    """What `read_file` returns, with the errors of the packages that read it."""
    if path.endswith(".npz"):
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"        # also under another name, such as .bin
    if path.endswith(".safetensors") or is_safetensors:
        from safetensors.torch import load_file  # here: an optional package
        return load_file(path)
    with torch.serialization.safe_globals(ALLOWED):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_encoder(path, branch=None, img_size=None, quiet=False, num_heads=None, normalization=None):
    """The encoder of a checkpoint file, ours or an official one, as a ViT or Swin in eval
    mode.

    branch         "teacher", "student", "base", "momentum" or "ema", if the file has it; default:
                   the one that the method evaluates
    img_size       side of the images it will get, in pixels: only checked and printed, since the
                   ViT resizes its positions to the input
    quiet          do not print the lines that describe the model
    num_heads      attention heads of an official file; default: as in the file, else as published
                   for its method, width and depth
    normalization  of the input of an official file, "imagenet" or "0.5"; default: as in the file,
                   else as published for its method

    The ViT's attribute `source` has path, layout, branch, method, data, step, mean, std,
    interpolation and img_size (of the input in evaluation) and heads {name: state dict}
    (projectors, decoder, classifier).

    A simplification of ours for timm's augreg: probes resize images to 256, not 248, before the
    center crop of 224.
    Errors: those of read_file(), and ValueError for an unknown layout, keys or shapes that do not
    match, or (UnknownHeads) an unknown number of heads.
    """
    raw = read_file(path)
    form = str(raw.get("format", ""))
    if form.startswith("training/"):
        raise ValueError(f"{path} is a training state; use encoder.pt of the same folder")
    parse = parse_own_file if form.startswith("encoder/") else parse_official_file
    name, config, state, source = parse(path, raw, branch, num_heads, normalization)
    try:
        net = build_encoder(config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: its config does not describe a ViT or Swin ({error})") from None
    expected = net.state_dict()
    check_keys(path, name, expected.keys() - state.keys(), state.keys() - expected.keys(),
               [f"{key} {tuple(value.shape)} for {tuple(expected[key].shape)}"
                for key, value in state.items()
                if key in expected and value.shape != expected[key].shape])
    net.load_state_dict(state)
    net.source = SimpleNamespace(path=str(path), layout=name, **source)
    net.source.img_size = net.source.img_size or config["img_size"]

    if img_size and img_size % net.patch_size:
        raise ValueError(f"image size {img_size} is not a multiple of patch size {net.patch_size} "
                         f"of {path}")
    if not quiet:
        print_description(net, img_size or net.source.img_size)
    return net.eval()


def build_encoder(config):
    """The untrained encoder, a ViT or a Swin, that has this `config`."""
    return swin.Swin(**config) if "depths" in config else vit.ViT(**config)


def print_description(net, img_size):
    """Prints what was loaded, and for images of which side."""
    source, side, p = net.source, net.grid[0], net.patch_size
    path = pathlib.Path(source.path)
    name = f"{path.resolve().parent.name}/{path.name}" if path.name == "encoder.pt" else path.name
    also = f" (also in the file: {', '.join(source.other_branches)})" * bool(source.other_branches)
    step = f" after step {source.step}" if source.step else ""
    heads = f" ({source.num_heads_from})" * bool(source.num_heads_from)
    registers = net.config.get("registers")              # a Swin has none
    registers = f"registers {registers}, " * bool(registers)
    resized = f" interpolated to {img_size // p}" if img_size != side * p else ""
    norm = "" if net.config["final_norm"] else "no final norm, "
    window = net.config.get("window")                    # a Swin has none
    norm += f"attention within {window} x {window} patches, " * bool(window)
    print(f"{name}: {source.layout}, {source.branch}{also}{step}; "
          f"{len(net.state_dict())} tensors, width {net.embed_dim}, depth {net.depth}, heads "
          f"{net.config['num_heads']}{heads}, patch {p}, {registers}grid {side}{resized}; {norm}"
          f"input mean {source.mean[0]:g}; with {', '.join(source.heads) or 'no heads'}")
    for note in source.notes:
        print(f"note: {name}: {note}")


def parse_own_file(path, raw, branch=None, num_heads=None, normalization=None):
    """Content of a file of save_encoder() -> layout name, ViT arguments, state dict, source.
    ValueError: another format, or an argument that is not as in the file."""
    names = ("branch", "method", "data", "step", "mean", "std", "interpolation", "heads")
    complete = {"model", "config", *names} <= raw.keys() and all(
        isinstance(raw[key], dict) for key in ("model", "config", "heads")) and all(
        torch.is_tensor(value) for value in raw["model"].values())
    if raw["format"] != "encoder/1" or not complete:
        raise ValueError(f"{path} has an unknown format, {raw['format']} with {list(raw)}: use an "
                         "encoder.pt that this version of the code has written")
    if branch not in (None, raw["branch"]):
        raise ValueError(f"{path} has no {branch}, only {raw['branch']}: choose another --branch")
    heads = raw["config"].get("num_heads")
    if num_heads not in (None, heads):
        raise ValueError(f"{path} has {heads} heads, not {num_heads}: leave out --num-heads")
    if normalization and NORMALIZATIONS[normalization]["mean"] != raw["mean"]:
        raise ValueError(f"{path} contains the mean of its input, {raw['mean']}: leave out "
                         "--normalization")
    return "ours", raw["config"], raw["model"], dict(
        {name: raw[name] for name in names}, other_branches=[], num_heads_from="", notes=[],
        img_size=None)
