"""A training run: where it computes, where it writes, how far it is. The loop is the method's.

    cfg = config.parse(Config)
    run = Run(cfg)                                     # device, processes, signals
    loader, bank, queries = data.training_sets(run, views(cfg))
    model = run.place(Network(cfg))
    run.restore(model=model, opt=opt)                  # what checkpoints hold; --resume loads it
    for step, batch in run.steps(loader):              # continues after the last checkpoint
        with run.autocast():
            loss = ...
        loss.backward()
        opt.step()
        opt.zero_grad()
        run.log(loss=loss, lr=lr)                      # averaged until the next line is printed
        if run.eval_due:
            run.log(**visualize.knn(run, encoder, bank, queries))
        if run.save_due:
            run.save_encoder(encoder)                  # out/METHOD-DATA/encoder.pt
            run.save()                                 # out/METHOD-DATA/last.pt

One process is the normal case; many (torchrun, CPU or GPU, one node or several) run the same code
with run.world > 1. Only the *global* batch size is a setting. Run knows no method; no line of it
changes a loss, a gradient or a weight.
"""
import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lib import checkpoints, distributed, rng
from lib.folder import RunFolder

# --------------------------------------------------------------------------------------------------
# Schedules, parameter groups, moving averages


def cosine(step, total, start, end, warmup=0):
    """Linear from 0 to `start` over `warmup` steps, then half a cosine down or up to `end`."""
    if step < warmup:
        return start * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def param_groups(module, weight_decay, no_decay=()):
    """Two groups for AdamW: without weight decay are vectors (biases, norms) and parameters whose
    names end in one of `no_decay`."""
    decayed, others = dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)
    for name, p in module.named_parameters():
        if p.requires_grad:
            (others if p.ndim <= 1 or name.endswith(no_decay) else decayed)["params"].append(p)
    return [decayed, others]


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


def grad_norm(module):
    """Norm of all gradients together."""
    return torch.nn.utils.get_total_norm(
        [p.grad for p in module.parameters() if p.grad is not None])


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, for the parameters (not buffers)
    that the teacher has. momentum 0 copies exactly."""
    source = dict(distributed.unwrap(student).named_parameters())
    names, target = zip(*distributed.unwrap(teacher).named_parameters())
    torch._foreach_lerp_(target, [source[name] for name in names], 1 - momentum)


# --------------------------------------------------------------------------------------------------
# The run


class Run:
    """step: steps done. Within the loop: total; eval_due, save_due: whether this step is followed
    by an evaluation, by a checkpoint."""

    def __init__(self, cfg):
        self.cfg, self.out, self.folder = cfg, Path(cfg.out), RunFolder(cfg)
        self.rank = int(os.environ.get("RANK", 0))                   # set by torchrun
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = distributed.pick_device(cfg.device)
        self.precision = distributed.pick_precision(cfg.precision, self.device)
        self.step, self.saved, self.signal, self.meter = 0, None, 0, {}
        self.modules, self.writer, self.flops = [], None, None
        if cfg.batch_size % (self.world * cfg.accum_iter):
            raise ValueError(f"--batch-size {cfg.batch_size} is the global batch: it must be a "
                             f"multiple of {self.world} processes x {cfg.accum_iter} micro-batches")
        if cfg.resume:
            self.folder.check_resume()
        paper = "the paper's settings" + f": --data {cfg.paper_data}" * (
            cfg.section != cfg.paper_data)
        self.print0(f"{cfg.method} on {cfg.data}: configs/{cfg.method}.yaml [{cfg.section}]; "
                    f"{paper}")
        distributed.keep_memory()
        torch.set_float32_matmul_precision("high")                   # TF32 for a GPU's fp32 parts
        distributed.init_distributed(self.device)
        torch.manual_seed(cfg.seed)                                  # equal weights everywhere
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, self._on_signal)

    def _on_signal(self, number, frame):
        if self.signal and number == signal.SIGINT:                  # a second Ctrl-C
            raise KeyboardInterrupt
        self.signal = number

    def check_stop(self):
        """Ends the process after a signal: for long work before the first step. Of several
        processes maybe only one received it: it fails, and torchrun ends the others."""
        if self.signal:
            self.print0(f"received {signal.Signals(self.signal).name} before the first step")
            sys.exit(int(self.world > 1))

    def print0(self, text):
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, module):
        """Moves it to the device; in DDP if there are several processes and weights to train."""
        module = distributed.wrap_ddp(module.to(self.device), self.device)
        self.modules.append(module)
        return module

    # ---- the loop --------------------------------------------------------------------------------

    def total_steps(self, loader):
        """Optimizer steps of the whole run."""
        return self.cfg.steps or max(1, round(self.cfg.epochs * len(loader)))

    def steps(self, loader):
        """Yields (step, batch) from where the run stands to its end.

        A signal (SIGTERM, SIGUSR1, Ctrl-C) makes the next step the last one, which is saved."""
        self.total = self.total_steps(loader)
        self._print_settings(len(loader))
        self.peak = distributed.peak_flops(self.device, self.precision) * self.world
        batches, begin, skipped = loader.batches(start=self.step), self.step, 0
        bar = tqdm(total=self.total, initial=begin, leave=False, dynamic_ncols=True,
                   disable=self.rank > 0 or not sys.stderr.isatty())
        self.last_save = time.perf_counter()
        self.interval = Interval(begin)
        for step in range(begin, self.total):
            called = time.perf_counter()
            batch = next(batches)
            self.interval.waited += time.perf_counter() - called
            torch.manual_seed(rng.key(self.cfg.seed, "step", step, self.rank))  # for dropout
            overdue, stop = self._max_over_processes(
                time.perf_counter() - self.last_save >= 60 * self.cfg.save_every, self.signal)
            last = step + 1 == self.total
            evals = self.cfg.evals
            self.eval_due = step * evals // self.total < (step + 1) * evals // self.total
            self.save_due = bool(overdue or stop or last)
            # The FLOPs of a step are counted once, at the first step without an evaluation.
            count = self.flops is None and not self.eval_due
            with FlopCounterMode(display=False) if count else contextlib.nullcontext() as counter:
                yield step, batch
            if count:
                self.flops = counter.get_total_flops() * self.world / self.cfg.batch_size
            if step == begin and self.cfg.compile:       # not before: FLOPs are counted uncompiled
                for module in self.modules:
                    module.compile()
            if loader.skipped > skipped:
                skipped = loader.skipped
                self.print0(f"unreadable images replaced so far: {skipped} (repeats count, other "
                            f"processes do not)")
            self._print_if_due()
            self.step = step + 1
            bar.update()
            if stop and not last:
                bar.close()
                self.print0(f"received {signal.Signals(stop).name}: saved after step {self.step}; "
                            f"--resume continues from there")
                distributed.exit_together()
                sys.exit(0)
        bar.close()
        if self.rank == 0:
            files = ", ".join(sorted(p.name for p in self.out.glob("[!.]*")))
            self.print0(f"done after {self.total} steps; {self.out}/ contains {files}")

    def _max_over_processes(self, *numbers):
        """The maximum of each number over the processes, so that all of them decide alike."""
        numbers = torch.tensor([int(n) for n in numbers])            # on the CPU: no GPU wait
        if self.world > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def micro_batches(self, batch):
        """Yields the batch in --accum-iter equal parts. DDP averages gradients over the processes
        in the backward pass of the last one only."""
        for i, part in enumerate(batch.split(self.cfg.accum_iter)):
            for module in self.modules:
                if isinstance(module, DistributedDataParallel):
                    module.require_backward_grad_sync = i + 1 == self.cfg.accum_iter    # no_sync()
            yield part

    # ---- the log ---------------------------------------------------------------------------------

    def log(self, **values):
        """Adds numbers to the means that the next line prints and metrics.jsonl keeps. Raises
        ValueError if the loss or the norm of the gradient is not finite; on a GPU not here, where
        it would have to wait, but when the next line is printed or a checkpoint is saved."""
        for name, x in values.items():
            total, n = self.meter.get(name, (0.0, 0))
            self.meter[name] = [total + (x.detach().double() if torch.is_tensor(x) else x), n + 1]
        if self.device.type == "cpu":
            self._check_finite()

    def _check_finite(self):
        found = {name: float(self.meter[name][0] / self.meter[name][1])
                 for name in ("loss", "grad_norm", "lr") if name in self.meter}
        if not math.isfinite(sum(found.values())):
            kept = f"of step {self.saved}" if self.saved else "none"
            raise ValueError(f"the loss is not finite by step {self.step + 1}: "
                             f"{', '.join(f'{name} {x:.4g}' for name, x in found.items())}; last "
                             f"good checkpoint: {kept}; try --precision fp32 or a lower --lr")

    def _mean(self, x):
        x = torch.as_tensor(x, dtype=torch.float64, device=self.device)
        return distributed.all_mean(x).item()

    def _print_if_due(self):
        done = self.step + 1
        due = self.eval_due or done % self.cfg.log_every == 0 or done == self.total
        if not due or not self.meter:
            return
        self._check_finite()
        record = dict(step=done)
        for name, (total, n) in self.meter.items():
            record[name] = self._mean(total) / n
        seconds = max(1e-9, self.interval.seconds())
        steps = done - self.interval.first_step
        record["images_per_s"] = steps * self.cfg.batch_size / seconds
        record["data_time"] = self.interval.waited / steps
        if self.flops:
            record["mfu"] = self.flops * record["images_per_s"] / self.peak
        record["memory_gib"] = distributed.peak_memory(self.device)
        eta = tqdm.format_interval((self.total - done) * seconds / steps)
        values = (f"{name} {FORMATS.get(name, '{:.3f}').format(x)}" for name, x in record.items()
                  if name not in ("step", "memory_gib"))
        self.print0(f"step {done}/{self.total}  {'  '.join(values)}  eta {eta}")
        if self.rank == 0:
            self.folder.append_log(record)
            if self.writer:
                for name, value in record.items():
                    self.writer.add_scalar(name, value, done)
                self.writer.flush()
        self.meter, self.interval = {}, Interval(done)

    def _print_settings(self, per_epoch):
        """The numbers that reproductions get wrong first, once."""
        cfg = self.cfg
        for source in dict.fromkeys(cfg.origin.values()):
            values = (f"{k} {getattr(cfg, k)}" for k, by in cfg.origin.items() if by == source)
            self.print0(f"{source}: {', '.join(values)}")
        size = sum(p.numel() for m in self.modules for p in m.parameters() if p.requires_grad)
        self.print0(f"{self.total} steps of {cfg.batch_size} images (global), "
                    f"{self.total / per_epoch:.1f} epochs, {size / 1e6:.1f} M parameters, "
                    f"{self.precision} on {self.world} x {distributed.device_name(self.device)}, "
                    f"torch {torch.__version__}")
        warmup = round(getattr(cfg, "warmup_epochs", 0) * per_epoch)
        if warmup >= self.total:
            self.print0(f"the run ends within its warm-up of {warmup} steps: lower "
                        f"--warmup-epochs")

    @contextlib.contextmanager
    def paused(self):
        """What is done in here (evaluation, checkpoints) does not count as training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()                     # the queued work does count
        begin = time.perf_counter()
        yield
        self.interval.paused += time.perf_counter() - begin

    @contextlib.contextmanager
    def evaluation(self, *modules):
        """For what is computed beside training: paused(), these modules in eval mode, no gradients;
        an unreadable image is reported, not the end of the run."""
        for module in modules:
            module.eval()
        with self.paused(), torch.no_grad():
            try:
                yield
            except ValueError as e:
                tqdm.write(f"evaluation skipped: {e}", file=sys.stdout)  # maybe in one process
        for module in modules:
            module.train()

    # ---- checkpoints -----------------------------------------------------------------------------

    def restore(self, **state):
        """Opens the run's folder, registers what a checkpoint holds (modules, optimizers, by name)
        and, with --resume, loads it. Raises ValueError for a file of another method or shape."""
        self.state = {name: distributed.unwrap(x) for name, x in state.items()}
        problem = [None]
        try:
            if self.rank == 0 and (kept := self.folder.open(self.cfg.resume)):
                self.print0(f"the earlier run in {self.out} is kept as {kept}")
        except (ValueError, OSError) as e:
            problem = [e]
        if self.world > 1:
            dist.broadcast_object_list(problem)                      # all stop, or none
        if problem[0]:
            raise problem[0]
        if self.cfg.resume:
            self.step, self.meter = self.folder.load(self.state)
            self.saved = self.step
            self.print0(f"resumed from {self.out / 'last.pt'} after step {self.step}")
        if self.rank == 0:
            self.folder.write_config()
            self.folder.trim_log(self.step)                          # lines later than last.pt
            self.writer = self.folder.tensorboard() if self.cfg.tensorboard else None

    def save(self):
        """Writes last.pt: what restore() was given and how far the run is. A kill at any instant
        leaves the last complete file. Raises OSError with a sentence when the disk is full."""
        self._check_finite()
        self._print_if_due()                             # a checkpoint is never ahead of the log
        with self.paused():
            meter = {name: (self._mean(total), n) for name, (total, n) in self.meter.items()}
            if self.rank == 0:
                self.folder.save(self.state, self.step + 1, meter)
        self.saved, self.last_save = self.step + 1, time.perf_counter()

    def save_encoder(self, backbone, full=None, **info):
        """Writes encoder.pt, which checkpoints.load_encoder and evaluate.py read. To be called
        before save(), so that a kill in between is mended by --resume. info: branch, heads, ...
        (checkpoints.save_encoder). full: a state dict under the names of the published files,
        decoder included, for full.pt."""
        self._check_finite()
        if self.rank > 0:
            return
        about = dict(method=self.cfg.method, data=self.cfg.data, step=self.step + 1)
        with self.paused():
            checkpoints.save_encoder(self.out / "encoder.pt", backbone, **about, **info)
            if full:
                full = {name: x.cpu() for name, x in full.items()}
                content = dict(model=full, num_heads=backbone.config["num_heads"], **about)
                checkpoints.write_atomic(self.out / "full.pt", lambda f: torch.save(content, f))


# How the console prints a number, by its name; metrics.jsonl keeps all digits.
FORMATS = {"lr": "{:.1e}", "grad_norm": "{:.2f}", "knn": "{:.1f}%", "knn_patch": "{:.1f}%",
           "images_per_s": "{:,.0f}", "mfu": "{:.0%}"}


class Interval:
    """Time since the last printed line, of which some was waited for data, some paused."""

    def __init__(self, first_step):
        self.first_step, self.begin = first_step, time.perf_counter()
        self.waited, self.paused = 0.0, 0.0

    def seconds(self):
        """Seconds of training."""
        return time.perf_counter() - self.begin - self.paused
