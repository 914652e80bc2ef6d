"""TODO run"""
import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from lib import checkpoints, datasets, distributed, metrics, rng

# --------------------------------------------------------------------------------------------------
# Schedules, parameter groups, averages


def cosine(step, total, start, end, warmup=0):
    """Linear from 0 to `start` over `warmup` steps, then half a cosine down or up to `end`."""
    if step < warmup:
        return start * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def param_groups(module, weight_decay, spare=()):
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


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, for the parameters (not buffers)
    that the teacher has; fused, no host synchronisation. momentum 0 copies exactly."""
    source = dict(distributed.unwrap(student).named_parameters())
    names, target = zip(*distributed.unwrap(teacher).named_parameters())
    torch._foreach_lerp_(target, [source[name] for name in names], 1 - momentum)


class Run:
    """One training run: where it computes, where it writes, how far it is (`step`)."""

    def __init__(self, cfg):
        self.cfg, self.out = cfg, Path(cfg.out)
        self.rank = int(os.environ.get("RANK", 0))                   # set by torchrun
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = distributed.pick_device(cfg.device)
        self.precision = distributed.pick_precision(cfg.precision, self.device)
        self.step, self.saved, self.meter = 0, None, {}
        self._stopping = self._signalled = self._now = False
        self._micro, self._placed, self._flops, self._writer = (1, 1), [], None, None
        if cfg.batch_size % (self.world * cfg.accumulate):
            raise ValueError(f"--batch-size {cfg.batch_size} is the global batch: it must be a "
                             f"multiple of {self.world} processes x {cfg.accumulate} micro-batches")
        if cfg.resume and not (self.out / "last.pt").exists():
            raise ValueError(f"nothing to resume: there is no {self.out / 'last.pt'}; leave out "
                             f"--resume to start, or name the run's folder with --out")
        distributed.keep_memory()
        torch.set_float32_matmul_precision("high")                   # TF32 for a GPU's fp32 parts
        distributed.init_distributed(self.device)
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
        module = distributed.wrap_ddp(module.to(self.device), self.device)
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
        checkpoints.write_atomic(self.out / "config.yaml", lambda f: f.write(text))

    def restore(self, **state):
        """Opens the run's folder, registers what a checkpoint holds (modules, optimisers, by name)
        and, with --resume, loads it. Raises ValueError for a file of another method or shape."""
        self.state, path = {name: distributed.unwrap(x) for name, x in state.items()}, self.out / "last.pt"
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
            checkpoints.write_atomic(log, lambda f: f.write(text))
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
                checkpoints.write_atomic(self.out / "last.pt", lambda f: torch.save(
                    {"format": "training/1", "method": self.cfg.method, "step": self.step + 1,
                     "state": state, "meter": meter}, f))
            self.saved, self._last_save = self.step + 1, time.perf_counter()

    def save_encoder(self, backbone, full=None, **info):
        """Writes encoder.pt, what a user takes away (checkpoints.load_encoder reads it). Call it before
        save(), so that a kill in between is mended by --resume. info: branch, heads (see
        checkpoints.save_encoder). full: a state dict in the names of an official file, decoder and all, for
        full.pt beside."""
        self._check_finite()
        if self.rank > 0:
            return
        about = dict(method=self.cfg.method, data=self.cfg.data, step=self.step + 1)
        with self.pause():
            checkpoints.save_encoder(self.out / "encoder.pt", backbone, **about, **info)
            if full:
                full = {name: x.cpu() for name, x in full.items()}
                content = dict(model=full, num_heads=backbone.config["num_heads"], **about)
                checkpoints.write_atomic(self.out / "full.pt", lambda f: torch.save(content, f))

    # ---- the loop ----

    def data(self, views):
        """A data.Loader of views of the training images (of STL-10 the unlabelled ones, of a folder
        without train/ and val/ all); 2,000 training and 500 test images with their labels, for
        `knn`."""
        cfg = self.cfg
        which = "unlabeled" if cfg.data == "stl10" else "train"
        images, bank, queries = (
            datasets.load_images(cfg.data, cfg.data_root, split, cfg.img_size, limit, self.device, apart)
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
                distributed.exit_together()
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
        return distributed.all_mean(torch.as_tensor(x, dtype=torch.float64, device=self.device)).item()

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
                      memory_gib=distributed.peak_memory(self.device))
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
        evaluate.py) by class token and by mean patch token, of two sets of datasets.Images, if they
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
        checkpoints.write_atomic(self.out / name, lambda f: page.save(f, "PNG"))

    def _announce(self, per_epoch):
        """The numbers that reproductions get wrong first, once."""
        cfg, name = self.cfg, "CPU"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        listed = distributed.PEAKS if self.precision == "bf16" else {}
        self._peak = next((1e12 * peak for gpu, peak in listed.items()
                           if re.search(rf"\b{gpu}\b(?! (NVL|Ti|Laptop))", name)), None)
        self._peak = self._peak or distributed.measure_peak(self.device, self.precision)
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

