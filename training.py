"""Plumbing that every method shares. It offers values, context managers and two iterators; it never
calls you, knows no method, and makes no decision that a paper argues about.

    cfg = training.config(Config)                      # dataclass <- YAML section <- command line
    run = training.start(cfg)                          # device, processes, signals
    net, teacher = run.place(Net(cfg)), run.place(Teacher(cfg))
    run.restore(net=net, teacher=teacher, opt=opt)     # these are saved; with --resume, loaded
    for step, batch in run.steps(loader):              # goes on where the last checkpoint stopped
        with run.autocast():
            loss = ...
        run.backward(loss, opt, clip=3.0)              # not finite: stops, with a report
        opt.step(), opt.zero_grad()
        run.log(loss=loss, lr=lr)                      # averaged until the next line is printed
        if run.save_due():                             # interval, last step, or told to stop
            run.save()                                 # out/METHOD-DATA/last.pt, atomically

One process is the normal case; many (torchrun, CPU or GPU, one node or several) are the same code
with run.world > 1. Only the *global* batch size is a setting.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import checkpoints
import data
import metrics
import rng

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
KIN = {"toy-scenes": "toy", "synthetic": "toy", "cifar100": "cifar10", "stl10": "cifar10"}


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


def config(cls, argv=None):
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

    sections = read_yaml(Path(__file__).parent / "configs" / f"{method}.yaml")
    own = read_yaml(given["config"]) if "config" in given else {}
    flat = not set(own) & set(sections)                              # or sections, as in configs/
    top = {**(own if flat else {}), **given}
    dataset = str(top.get("data", "toy"))
    section = dataset if dataset in sections else KIN.get(dataset, "imagenet100")
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
    leave()


def leave():
    """Of several processes, ends this one when all have come here; without the clean-up of
    torch.distributed, whose threads now and then abort a process that has done its work."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


# --------------------------------------------------------------------------------------------------
# Devices and processes


def pick_device(name="auto"):
    """auto: this process's GPU, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", name)
    if not found:
        raise ValueError(f"--device {name!r}: cuda, cuda:1, cpu or auto")
    if found[1] == "cpu":
        return torch.device("cpu")
    index = int(found[2] or os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there is no GPU {index} here, torch sees "
                         f"{torch.cuda.device_count()}; try --device cpu or fewer processes")
    return torch.device("cuda", index)


def pick_precision(name, device):
    """auto: bf16 on GPUs from Ampere on and on CPUs with bf16 instructions, else fp32."""
    if name not in ("auto", "bf16", "fp32"):
        raise ValueError(f"--precision {name!r}: bf16, fp32 or auto")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def peak_memory(device):
    """GiB that this process held at most: on a GPU, of its memory that tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20                  # bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def keep_memory():
    """Tells glibc to keep what is freed instead of handing large tensors back to the kernel: their
    page faults cost a small ViT on a CPU a fifth of its speed. Does nothing elsewhere."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 2**31 - 1)       # mmap and trim thresholds


def join(device):
    """Joins the processes that torchrun started, if it did: from here on rank() and world_size()
    know."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif world > 1:                                                  # torchrun leaves one thread
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1)
        torch.set_num_threads(max(1, cores // processes))
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def share_gradients(module, device):
    """The module; of several processes, wrapped in DDP if there is something to train."""
    if world_size() > 1 and any(p.requires_grad for p in module.parameters()):
        return DistributedDataParallel(
            module, device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
    return module


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x):
    """(B, ...) of each process -> (world*B, ...) in the order of ranks. No gradient: for keys."""
    x = x.detach().contiguous()
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def all_mean(x):
    """Mean of a tensor over the processes. No gradient: for normalisers and logs."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


class SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):                    # every process's loss depends on every input
        return SumOverProcesses.forward(None, grad)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows (..., D) of *all* processes, so that eight normalise as one would
    (torch's SyncBatchNorm has no CPU path). Each process must bring the same number of rows."""

    def forward(self, x):
        rows = x.flatten(0, -2)
        if world_size() == 1 or not self.training:
            return super().forward(rows).view(x.shape)
        n = rows.shape[0] * world_size()
        wide = rows.float()
        mean = SumOverProcesses.apply(wide.sum(0)) / n
        var = SumOverProcesses.apply((wide - mean).square().sum(0)) / n     # two passes: exact
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        y = (wide - mean) * (var + self.eps).rsqrt()
        return (y * self.weight + self.bias if self.affine else y).to(x.dtype).view(x.shape)


# --------------------------------------------------------------------------------------------------
# Schedules, parameter groups, averages


def cosine(step, total, start, end, warmup=0):
    """Linear from 0 to `start` over `warmup` steps, then half a cosine down or up to `end`."""
    if step < warmup:
        return start * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def decay_groups(module, weight_decay, spare=()):
    """Two groups for AdamW: vectors (biases, norms) and names that end in one of `spare` do not
    decay, all others do."""
    decayed, spared = dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)
    for name, p in module.named_parameters():
        if p.requires_grad:
            (spared if p.ndim <= 1 or name.endswith(spare) else decayed)["params"].append(p)
    return [decayed, spared]


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


def unwrap(module):
    return module.module if isinstance(module, DistributedDataParallel) else module


@torch.no_grad()
def ema_(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, for the parameters (not buffers)
    that the teacher has; fused, no host synchronisation. momentum 0 copies exactly."""
    source = dict(unwrap(student).named_parameters())
    names, target = zip(*unwrap(teacher).named_parameters())
    torch._foreach_lerp_(target, [source[name] for name in names], 1 - momentum)


# --------------------------------------------------------------------------------------------------
# The run

# Dense bf16 peak in TFLOP/s by name of the GPU (data sheets); any other device is measured.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10": 125,
         "L4": 121, "RTX 4090": 165, "RTX 3090": 71}


class Run:
    """One training run: where it computes, where it writes, how far it is (`step`)."""

    def __init__(self, cfg):
        self.cfg, self.out = cfg, Path(cfg.out)
        self.rank = int(os.environ.get("RANK", 0))                   # set by torchrun
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(cfg.device)
        self.precision = pick_precision(cfg.precision, self.device)
        self.step, self.saved, self.meter = 0, None, {}
        self._stopping = self._signalled = self._now = False
        self._micro, self._placed, self._flops, self._writer = (1, 1), [], None, None
        if cfg.batch_size % (self.world * cfg.accumulate):
            raise ValueError(f"--batch-size {cfg.batch_size} is the global batch: it must be a "
                             f"multiple of {self.world} processes x {cfg.accumulate} micro-batches")
        if cfg.resume and not (self.out / "last.pt").exists():
            raise ValueError(f"nothing to resume: there is no {self.out / 'last.pt'}; leave out "
                             f"--resume to start, or name the run's folder with --out")
        keep_memory()
        torch.set_float32_matmul_precision("high")                   # TF32 for a GPU's fp32 parts
        join(self.device)
        torch.manual_seed(cfg.seed)                                  # equal weights everywhere
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, self._on_signal)

    def _on_signal(self, number, frame):
        if self._signalled and number == signal.SIGINT:              # a second Ctrl-C means it
            raise KeyboardInterrupt
        self._signalled = True

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, module):
        """To the device; wrapped in DDP if there are several processes and something to train."""
        module = share_gradients(module.to(self.device), self.device)
        self._placed.append(module)
        return module

    # ---- folder and checkpoints ----

    def _open_folder(self):
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.out / ".lock", "w")               # goes with the process
            try:
                # not flock: decoders would inherit it, and hold it longer than a killed run lives
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(f"another run is writing to {self.out}; choose a folder with "
                                 f"--out") from None
            except OSError as e:
                if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise                                    # a file system without locks will do
            there = {file.name for file in self.out.iterdir()}
            if not self.cfg.resume and there & {"last.pt", "encoder.pt"}:
                if "config.yaml" not in there or Path.cwd().is_relative_to(self.out.resolve()):
                    raise ValueError(f"{self.out} holds other things, too; choose a folder of the "
                                     f"run's own with --out")
                names = (self.out.with_name(f"{self.out.name}.{n}") for n in range(1, 10**6))
                kept = next(name for name in names if not name.exists())
                self.out.rename(kept)
                self.say(f"the earlier run in {self.out} is kept as {kept}")
                return self._open_folder()
            if not self.cfg.resume:
                (self.out / "metrics.jsonl").unlink(missing_ok=True)
                self._write_config()
        except OSError as e:
            raise OSError(f"cannot write to {self.out} ({e.strerror or e}); choose a folder with "
                          f"--out") from None
        if self.cfg.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
            self._writer = SummaryWriter(self.out)

    def _write_config(self):
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in
                 dataclasses.asdict(self.cfg).items() if k not in ("resume", "config")}
        text = yaml.safe_dump(plain, sort_keys=False).encode()
        checkpoints.replace_file(self.out / "config.yaml", lambda f: f.write(text))

    def restore(self, **state):
        """Opens the run's folder, registers what a checkpoint holds (modules, optimisers, by name)
        and, with --resume, loads it. Raises ValueError for a file of another method or shape."""
        self.state, path = {name: unwrap(x) for name, x in state.items()}, self.out / "last.pt"
        problem = [None]
        try:
            if self.rank == 0:
                self._open_folder()
        except (ValueError, OSError) as e:
            problem = [e]
        if self.world > 1:
            dist.broadcast_object_list(problem)                      # all stop, or none
        if problem[0]:
            raise problem[0]
        if not self.cfg.resume:
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            kind, method, meter = saved["format"], saved["method"], saved["meter"]
        except (OSError, MemoryError) as e:
            raise OSError(f"cannot read {path} ({e}); nothing is lost: try again") from None
        except Exception as e:
            raise ValueError(f"{path} is no checkpoint that can be resumed ({type(e).__name__}); "
                             f"start again without --resume") from None
        if (kind, method) != ("training/1", self.cfg.method):
            raise ValueError(f"{path} is of method {method}, not {self.cfg.method}; name the right "
                             f"folder with --out")
        if set(saved["state"]) != set(self.state):
            raise ValueError(f"{path} holds {sorted(saved['state'])}, "
                             f"needed are {sorted(self.state)}")
        for name, x in self.state.items():
            own = [{k: v for k, v in group.items() if k != "params"}
                   for group in getattr(x, "param_groups", [])]
            try:
                x.load_state_dict(saved["state"][name])
            except (RuntimeError, ValueError, KeyError) as e:
                reason = str(e).splitlines()[-1].strip()
                raise ValueError(f"{path} holds a {name} that does not fit ({reason}); resume with "
                                 f"the settings in {self.out / 'config.yaml'}") from None
            for group, now in zip(getattr(x, "param_groups", []), own):
                group.update(now)                                    # today's weight decay counts
        self.step = self.saved = saved["step"]
        self.meter = {name: list(entry) for name, entry in meter.items()}
        log = self.out / "metrics.jsonl"
        if self.rank == 0:
            self._write_config()
        if self.rank == 0 and log.exists():                          # forget what came after it
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            text = "".join(line + "\n" for line in kept).encode()
            checkpoints.replace_file(log, lambda f: f.write(text))
        self.say(f"resumed from {path} after step {self.step}")

    def save_due(self):
        """True after every --save-every minutes, after the last step, and when told to stop by
        SIGTERM, SIGUSR1 or Ctrl-C; in all processes or none, though a signal may reach only one."""
        old = time.perf_counter() - self._last_save >= 60 * self.cfg.save_every
        flags = torch.tensor([float(old), float(self._signalled)])   # on the CPU: no GPU wait
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self._stopping = bool(flags[1])
        return bool(flags.any()) or self.step + 1 == self.total

    def leave_if_told(self):
        """Ends the process if it was told to stop: for long work before the first step. Of several,
        maybe only one was told: it fails, and torchrun ends the others."""
        if self._signalled:
            self.say("told to stop before the first step")
            sys.exit(int(self.world > 1))

    def save(self):
        """Writes last.pt: what restore() was given and where the run stands. A kill at any instant
        leaves the last whole file. Raises OSError with a sentence when the disk is full."""
        self._check_finite()
        self._print_if_due()                                         # the log never lags behind
        with self.pause():
            meter = {name: (self._mean(total), n) for name, (total, n) in self.meter.items()}
            if self.rank == 0:
                state = {name: x.state_dict() for name, x in self.state.items()}
                checkpoints.replace_file(self.out / "last.pt", lambda f: torch.save(
                    {"format": "training/1", "method": self.cfg.method, "step": self.step + 1,
                     "state": state, "meter": meter}, f))
            self.saved, self._last_save = self.step + 1, time.perf_counter()

    def save_encoder(self, backbone, full=None, **info):
        """Writes encoder.pt, what a user takes away (checkpoints.load reads it). Call it before
        save(), so that a kill in between is mended by --resume. info: branch, heads (see
        checkpoints.save). full: a state dict in the names of an official file, decoder and all, for
        full.pt beside."""
        self._check_finite()
        if self.rank > 0:
            return
        about = dict(method=self.cfg.method, data=self.cfg.data, step=self.step + 1)
        with self.pause():
            checkpoints.save(self.out / "encoder.pt", backbone, **about, **info)
            if full:
                full = {name: x.cpu() for name, x in full.items()}
                content = dict(model=full, num_heads=backbone.config["num_heads"], **about)
                checkpoints.replace_file(self.out / "full.pt", lambda f: torch.save(content, f))

    # ---- the loop ----

    def data(self, views):
        """A data.Loader of views of the training images (of STL-10 the unlabelled ones, of a folder
        without train/ and val/ all); 2,000 training and 500 test images with their labels, for
        `knn`."""
        cfg = self.cfg
        which = "unlabeled" if cfg.data == "stl10" else "train"
        images, bank, queries = (
            data.load(cfg.data, cfg.data_root, split, cfg.img_size, limit, self.device, apart)
            for split, limit, apart in ((which, None, False), ("train", 2000, True),
                                        ("test", 500, True)))
        loader = data.Loader(images, views, cfg.batch_size, cfg.seed, self.device, cfg.workers,
                             self.rank, self.world)
        return loader, bank, queries

    def length(self, loader):
        """Optimiser steps of the whole run."""
        return self.cfg.steps or max(1, round(self.cfg.epochs * len(loader)))

    def steps(self, loader):
        """Yields (step, batch) from where the run stands to its end; steps are optimiser steps."""
        self.total = self.length(loader)
        self._announce(len(loader))
        batches, begin = loader.batches(start=self.step), self.step
        bar = tqdm(total=self.total, initial=begin, leave=False, dynamic_ncols=True,
                   disable=self.rank > 0 or not sys.stderr.isatty())
        self._clock = self._last_save = time.perf_counter()
        self._waited, self._paused, self._printed, self._skipped = 0.0, 0.0, begin, 0
        for step in range(begin, self.total):
            asked = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - asked
            torch.manual_seed(rng.key(self.cfg.seed, "step", step, self.rank))  # if not handed in
            if step == begin:                                        # count the FLOPs of one step
                self._counter = FlopCounterMode(display=False)
                self._counter.__enter__()
            yield step, batch
            if step == begin and self.cfg.compile:                   # counted uncompiled
                for module in self._placed:
                    module.compile()
            if loader.skipped > self._skipped:
                self._skipped = loader.skipped
                self.say(f"images replaced so far, as unreadable: {self._skipped} (repeats count, "
                         f"other processes do not)")
            self._print_if_due()
            self.step = step + 1
            bar.update()
            if self._stopping and self.step < self.total:
                bar.close()
                self.say(f"told to stop: saved after step {self.step}; --resume goes on from there")
                leave()
                sys.exit(0)
        bar.close()
        if self.rank == 0:
            files = ", ".join(sorted(p.name for p in self.out.glob("[!.]*")))
            self.say(f"done after {self.total} steps; {self.out}/ holds {files}")

    def micro_batches(self, batch):
        """Yields the batch in --accumulate equal parts; backward() averages their gradients, which
        meet across processes at the last part only."""
        for i, part in enumerate(batch.split(self.cfg.accumulate)):
            self._micro = (i + 1, self.cfg.accumulate)
            for module in self._placed:
                module.require_backward_grad_sync = i + 1 == self.cfg.accumulate  # DDP's no_sync
            yield part

    def backward(self, loss, opt, clip=None, per_tensor=False):
        """Gradients of the loss; after the last micro-batch they are clipped to norm `clip`, of all
        or of each tensor for itself. Raises ValueError with a report when loss or norm is not
        finite (on a GPU when the next line is printed or saved: no synchronisation before)."""
        i, n = self._micro
        (loss / n).backward()
        if i < n:
            return
        grads = [p.grad for g in opt.param_groups for p in g["params"] if p.grad is not None]
        norms = torch._foreach_norm(grads)
        total = torch.stack(norms).norm()
        if clip and per_tensor:
            torch._foreach_mul_(grads, list((clip / (torch.stack(norms) + 1e-6)).clamp(max=1)))
        elif clip:
            torch._foreach_mul_(grads, (clip / (total + 1e-6)).clamp(max=1))
        self._lr, self._health = opt.param_groups[0]["lr"], (loss.detach(), total)
        if self._flops is None:
            self._counter.__exit__(None, None, None)
            self._flops = self._counter.get_total_flops() * self.world / self.cfg.batch_size
        if self.device.type == "cpu":
            self._check_finite()

    def _check_finite(self):
        loss, norm = (x.item() for x in self._health)
        if not math.isfinite(loss + norm):
            kept = f"of step {self.saved}" if self.saved else "none"
            raise ValueError(f"the loss is not finite by step {self.step + 1}: loss {loss:g}, "
                             f"gradient norm {norm:g}, lr {self._lr:.2e}; last good checkpoint: "
                             f"{kept}; try --precision fp32 or a lower --lr")

    # ---- what is looked at ----

    def log(self, now=False, **values):
        """Adds numbers to the means that the next line prints and metrics.jsonl keeps; a line
        comes every --log-every steps, and at this step with now=True."""
        for name, x in values.items():
            total, n = self.meter.get(name, (0.0, 0))
            self.meter[name] = [total + (x.detach().double() if torch.is_tensor(x) else x), n + 1]
        self._now |= now

    def _mean(self, x):
        return all_mean(torch.as_tensor(x, dtype=torch.float64, device=self.device)).item()

    def _print_if_due(self):
        done = self.step + 1
        due = self._now or done % self.cfg.log_every == 0 or done == self.total
        if not due or not self.meter:
            return
        self._check_finite()
        means = {name: self._mean(total) / n for name, (total, n) in self.meter.items()}
        seconds = max(1e-9, time.perf_counter() - self._clock - self._paused)
        speed = (done - self._printed) * self.cfg.batch_size / seconds
        mfu = self._flops * speed / (self._peak * self.world)
        record = dict(step=done, **means, grad_norm=self._health[1].item(), images_per_s=speed,
                      mfu=mfu, data_share=self._waited / seconds,
                      memory_gib=peak_memory(self.device))
        text = f"step {done}/{self.total}"
        for name, value in record.items():
            if name in means and name != "lr":
                text += f"  {name} {value:.1f}%" if "knn" in name else f"  {name} {value:.3f}"
        self.say(f"{text}  lr {self._lr:.1e}  |g| {record['grad_norm']:.2f}  img/s {speed:,.0f}  "
                 f"mfu {mfu:.0%}  data {record['data_share']:.0%}  "
                 f"eta {tqdm.format_interval((self.total - done) * self.cfg.batch_size / speed)}")
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            if self._writer:
                for name, value in record.items():
                    self._writer.add_scalar(name, value, done)
                self._writer.flush()
        self.meter, self._now, self._printed = {}, False, done
        self._clock, self._waited, self._paused = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def pause(self):
        """What is done in here (probes, pictures, checkpoints) does not count as training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()                                 # what was queued before does
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    @contextlib.contextmanager
    def looking(self):
        """pause(), for pictures and probes: an unreadable image among those looked at is said, and
        training goes on."""
        with self.pause():
            try:
                yield
            except ValueError as e:
                tqdm.write(f"left out: {e}", file=sys.stdout)        # maybe in this process only

    def due(self, times):
        """True `times` times a run, evenly spread, the last time at its last step."""
        return self.step * times // self.total < (self.step + 1) * times // self.total

    @torch.no_grad()
    def knn(self, encoder, bank, queries, size, k=10):
        """{"knn", "knn_pat"}: percent right of the weighted k-nearest-neighbour vote (as in
        evaluate.py) by class token and by mean patch token, of two sets of data.Images, if they
        have the same classes and are not the same images; and {"spread"}: deviation of the
        normalised class tokens times sqrt(D), 0 if collapsed."""
        def embed(images):
            parts = []
            for x, _ in data.batches(images, size, device=self.device, workers=self.cfg.workers):
                with self.autocast():
                    cls, patches = encoder.split(encoder(x))
                pat = patches.float().mean(1)
                parts.append(torch.stack([pat if cls is None else cls.float(), pat]))
            return torch.cat(parts, 1)                               # (2, images, D)

        found = {}
        encoder.eval()
        with self.looking():
            known = embed(bank)
            found["spread"] = (F.normalize(known[0], dim=-1).std(0).mean() * known.shape[2]**0.5)
            labelled = bank.labels is not None and queries.labels is not None
            if labelled and bank.classes == queries.classes and bank.split != queries.split:
                labels, truth = bank.labels.to(self.device), queries.labels.to(self.device)
                for name, b, q in zip(("knn", "knn_pat"), known, embed(queries)):
                    right = metrics.knn(b, labels, q, k=(k,))[k] == truth
                    found[name] = 100 * right.float().mean()
        encoder.train()
        n = len(found)                                   # an image that one process cannot read:
        return found if self._mean(n * n) == self._mean(n)**2 else {}      # all log it, or none

    def picture(self, columns, name="picture.png", scale=2):
        """Writes a PNG of {title: (n, 3, H, W) uint8}, side by side, a row for each image."""
        if self.rank > 0:
            return
        rows = torch.cat([F.pad(x.cpu(), (0, 4, 0, 4), value=255) for x in columns.values()], 3)
        sheet = Image.fromarray(torch.cat(list(rows), 1).permute(1, 2, 0).numpy())
        page = Image.new("RGB", (sheet.width * scale, sheet.height * scale + 16), "white")
        page.paste(sheet.resize((page.width, page.height - 16), Image.NEAREST), (0, 16))
        for i, title in enumerate(columns):
            ImageDraw.Draw(page).text((i * page.width // len(columns), 2), title, fill="black")
        checkpoints.replace_file(self.out / name, lambda f: page.save(f, "PNG"))

    def _announce(self, per_epoch):
        """The numbers that reproductions get wrong first, once."""
        cfg, name = self.cfg, "CPU"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        listed = PEAKS if self.precision == "bf16" else {}
        self._peak = next((1e12 * peak for gpu, peak in listed.items()
                           if re.search(rf"\b{gpu}\b(?! (NVL|Ti|Laptop))", name)), None)
        self._peak = self._peak or measure_peak(self.device, self.precision)
        for who in dict.fromkeys(cfg.origin.values()):
            values = (f"{k} {getattr(cfg, k)}" for k, by in cfg.origin.items() if by == who)
            self.say(f"{who}: {', '.join(values)}")
        size = sum(p.numel() for m in self._placed for p in m.parameters() if p.requires_grad)
        self.say(f"{cfg.method} on {cfg.data}: {self.total} steps of {cfg.batch_size} images "
                 f"(global), {self.total / per_epoch:.1f} epochs, {size / 1e6:.1f} M parameters, "
                 f"{self.precision} on {self.world} x {name}, torch {torch.__version__}")
        warmup = round(getattr(cfg, "warmup_epochs", 0) * per_epoch)
        if warmup >= self.total:
            self.say(f"the run ends within its warm-up of {warmup} steps: lower --warmup-epochs")


def start(cfg):
    """The Run of these settings. Raises ValueError for a device, a batch or a run to resume that
    cannot be had."""
    return Run(cfg)


def measure_peak(device, precision):
    """FLOP/s of a square matrix product, best of five: what MFU refers to without a data sheet."""
    size = 8192 if device.type == "cuda" else 2048       # a GPU is through with less at once
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, times = torch.ones(size, size, device=device, dtype=dtype), []
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def heat(x):
    """(n, H, W) in [0, 1] -> (n, 3, H, W) uint8, dark blue to yellow: safe for the colour-blind."""
    ramp = torch.tensor([[25, 20, 80], [35, 95, 140], [40, 160, 135], [150, 210, 70],
                         [253, 231, 37]])
    at = x.cpu().float().clamp(0, 1) * (len(ramp) - 1)
    low = at.long().clamp(max=len(ramp) - 2)
    colour = ramp[low] + (ramp[low + 1] - ramp[low]) * (at - low)[..., None]
    return colour.permute(0, 3, 1, 2).to(torch.uint8)
