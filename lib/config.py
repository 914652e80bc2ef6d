"""TODO config"""
import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import typing
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from lib import distributed

# --------------------------------------------------------------------------------------------------
# Settings


@dataclasses.dataclass
class Settings:
    """What every run can be told, whatever the method; the method's own Config adds to it."""
    data: str = "toy"            # a data set by name (data.py lists them), or a folder of images
    data_root: str = ""          # where the data sets lie; default: $DATA_ROOT, else datasets/
    out: str = ""                # folder of this run; default: out/METHOD-DATA
    resume: bool = False         # go on from the last checkpoint in the run's folder
    seed: int = 0                # everything random follows from it
    steps: int = 0               # optimiser steps; 0: --epochs decides
    accumulate: int = 1          # micro-batches a step, where the method allows it: less memory
    workers: int = 2             # image decoders beside each training process
    device: str = "auto"         # cuda or cpu; auto: cuda if there is one
    precision: str = "auto"      # bf16 or fp32; auto: bf16 where the device computes in it
    compile: bool = False        # torch.compile, from the second step on
    config: str = ""             # a YAML file, laid over the method's own section
    log_every: int = 10          # steps between log lines
    save_every: float = 5.0      # minutes between checkpoints; 0: after every step
    evals: int = 10              # kNN accuracy and picture, so many times a run
    tensorboard: bool = False    # TensorBoard files, too (pip install tensorboard)


# These take the section of their nearest kin; a folder of images takes imagenet100's.
FALLBACK_SECTIONS = {"toy-scenes": "toy", "synthetic": "toy", "cifar100": "cifar10", "stl10": "cifar10"}


def fields(cls):
    """{name: (type, default, help)} of a dataclass: the help is the comment on the field's line."""
    hints, lines = typing.get_type_hints(cls), inspect.getsource(cls).splitlines()
    found = (re.match(r"\s+(\w+):[^#]*#\s*(.+)", line) for line in lines)
    comments = {match[1]: match[2] for match in found if match}
    return {f.name: (hints[f.name], f.default, comments.get(f.name, ""))
            for f in dataclasses.fields(cls)}


def nearest(name, known):
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """argparse whose complaint about an unknown flag names the nearest known one. Exit code 2."""

    def error(self, message):
        if found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            known = [o for a in self._actions for o in a.option_strings if o.startswith("--")]
            close = difflib.get_close_matches(found[1], known, n=1, cutoff=0)
            message = f"unknown flag {found[1]}; did you mean {close[0]}?"
        self.exit(2, f"error: {message} (--help lists all)\n")


def convert(name, value, kind):
    """A YAML or command-line value as the field's type: PyYAML takes 1e-6 for a string."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if kind is tuple:
            return tuple(float(v) for v in value)
        if kind is int and not re.fullmatch(r"-?\d+", str(value)):
            if not float(value).is_integer():                        # 1e3 is
                raise ValueError
            return int(float(value))
        if value is None:
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise ValueError(f"{name} is {value!r}, but should be of type {kind.__name__}") from None


def read_yaml(path):
    try:
        found = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"no config file {path}") from None
    except yaml.YAMLError as e:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold lines of the form name: value")
    return found


SIZES = {"batch_size", "accumulate", "log_every", "img_size", "patch_size", "local_size",
         "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_num_heads", "hidden",
         "bottleneck", "out_dim"}                        # 1 or more; all other numbers: 0 or more
SHARES = {"momentum", "center_momentum", "min_scale", "split_scale", "mim_scale", "blur_p",
          "paste_p", "drop_at", "drop_path", "beta2"}    # 1 at most


def parse(cls, argv=None):
    """This run's settings: dataclass <- the data set's section of configs/METHOD.yaml <- with
    --resume the run's own config.yaml <- --config FILE <- command line. cfg.origin says who set
    what. Raises ValueError for unknown keys (naming the nearest) and values of a wrong type."""
    method, known = Path(inspect.getfile(cls)).stem, {**fields(Settings), **fields(cls)}
    parser = Parser(f"python {method}.py", description=sys.modules[cls.__module__].__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, (kind, default, text) in known.items():
        flags = {f"--{name.replace('_', '-')}": None, f"--{name}": None}     # either spelling
        many = {tuple: dict(nargs="+"), bool: dict(nargs="?", const=True)}.get(kind, {})
        parser.add_argument(*flags, help=f"{text} [{default}]".replace("%", "%%"),
                            metavar=kind.__name__, **many)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}

    values, origin = {}, {}

    def lay_over(found, who):
        for name, value in found.items():
            if name not in known:
                raise ValueError(f"unknown key {name!r} in {who}{nearest(name, known)}")
            values[name], origin[name] = convert(name, value, known[name][0]), who

    sections = read_yaml(Path(__file__).parent.parent / "configs" / f"{method}.yaml")
    own = read_yaml(given["config"]) if "config" in given else {}
    flat = not set(own) & set(sections)                              # or sections, as in configs/
    top = {**(own if flat else {}), **given}
    dataset = str(top.get("data", "toy"))
    section = dataset if dataset in sections else FALLBACK_SECTIONS.get(dataset, "imagenet100")
    out = Path(top.get("out") or f"out/{method}-{Path(dataset).resolve().name}").absolute()
    if Path.cwd() in out.parents:
        out = out.relative_to(Path.cwd())
    lay_over(sections[section] or {}, f"section {section}")
    resume = convert("resume", {**(own if flat else own.get(section) or {}), **given}.get(
        "resume", False), bool)
    if resume and (out / "config.yaml").exists():
        lay_over({k: v for k, v in read_yaml(out / "config.yaml").items()
                  if k != "method" and (k not in known or v != values.get(k, known[k][1]))},
                 "the run to resume")
    lay_over({k: v for k, v in (own if flat else own.get(section) or {}).items() if k != "method"},
             given.get("config"))
    lay_over(given, "flags")

    both = dataclasses.make_dataclass("Config", [("method", str, method)], bases=(cls, Settings))
    cfg = both(**{**values, "out": str(out)})
    cfg.origin = origin
    for name, (kind, *_) in known.items():
        least, most = int(name in SIZES), 1 if name in SHARES else math.inf
        if kind in (int, float) and not least <= getattr(cfg, name) <= most:             # nor NaN
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more" +
                             " and at most 1" * (name in SHARES))
    return cfg


def main(function):
    """Runs a script's main: what a user can mend becomes one sentence on stderr and exit code 2;
    with TRACEBACK=1 in the environment the traceback comes instead."""
    try:
        function()
    except (ValueError, OSError, RuntimeError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            e = "the GPU's memory is full: a smaller --batch-size, or --accumulate where it may be"
        elif re.search(r"DataLoader worker \(pid", str(e)):     # not: an error in a decoder
            e = "an image decoder died (memory or /dev/shm full?): fewer --workers, then --resume"
        elif isinstance(e, RuntimeError):
            raise
        if os.environ.get("TRACEBACK"):
            raise
        if str(e).startswith("Caught"):         # in a decoder, with its traceback
            e = str(e).splitlines()[-1]
        print(f"error: {e}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)                         # nccl's clean-up would wait for the other processes
        sys.exit(2)
    distributed.exit_together()

