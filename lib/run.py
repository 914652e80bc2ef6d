"""A training run: its device and processes, its step count, its log and its checkpoints. The
training loop itself is in each method's file; this is mae.py's, shortened:

    cfg = config.parse(Config)
    run = Run(cfg)                                     # device, processes, signals
    loader, bank, queries = data.training_sets(run, views(cfg))
    model = run.place(Network(cfg))                    # on the device; DDP, if several processes
    net = unwrap(model)
    opt = torch.optim.AdamW(param_groups(net, cfg.weight_decay))
    run.restore(model=model, opt=opt)                  # what a checkpoint holds; --resume loads it
    total, warmup = run.total_steps(loader), round(cfg.warmup_epochs * len(loader))
    peak_lr, N = cfg.lr * cfg.batch_size / 256, net.encoder.grid[0]**2
    for step, batch in run.steps(loader):              # continues after the last checkpoint
        lr = cosine(step, total, peak_lr, cfg.min_lr, warmup)
        set_lr(opt, lr)
        for part in run.micro_batches(batch):          # --accum-iter equal parts
            x, = part.views                            # (B, 3, S, S)
            noise = rng.uniform(part.index, N, cfg.seed, part.epoch, "mask")
            with run.autocast():
                pred, mask = model(x, noise)
            loss = mae_loss(pred, targets(x, cfg.patch_size, cfg.norm_pix_loss), mask)     # fp32
            (loss / cfg.accum_iter).backward()
            run.log(loss=loss)                         # averaged until the next line is printed
        run.log(lr=lr, grad_norm=grad_norm(net))
        opt.step()
        opt.zero_grad()
        if run.eval_due:
            run.log(**visualize.evaluate(run, net.encoder, bank, queries))
            with run.evaluation(net):                  # eval mode, no gradients, not timed
                save_visualization(run, cfg, net, queries)
        if run.save_due:
            run.save_encoder(net.encoder, branch="base")    # out/METHOD-DATA/encoder.pt
            run.save()                                      # out/METHOD-DATA/last.pt

One process is the normal case; several (torchrun, CPU or GPU, one node or more) run the same code
with run.world > 1. Only the *global* batch size is a setting.

Run contains nothing of a method: losses, schedules and optimizer steps are in the method's file.
What it does to the training implicitly: Run() seeds torch and allows TF32, place() wraps in DDP,
steps() seeds torch again before each step and compiles the placed modules (--compile),
micro_batches() limits DDP's averaging to the last part, init_encoder() loads weights (--init-from),
and restore() loads weights and optimizers (--resume).
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

from lib import checkpoints, config, datasets, distributed, progress, rng
from lib.folder import RunFolder
from lib.init_from import InitialWeights

# --------------------------------------------------------------------------------------------------
# Schedules, parameter groups, moving averages


def cosine(step, total, start, end, warmup=0):
    """Linear from 0 to `start` over `warmup` steps, then half a cosine down or up to `end`."""
    if step < warmup:
        return start * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def param_groups(module, weight_decay, no_decay=()):
    """Two parameter groups for AdamW. The second has no weight decay: vectors (biases, norms) and
    parameters whose names end in one of `no_decay`. Frozen parameters are in neither."""
    decayed, others = dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)
    for name, p in module.named_parameters():
        if p.requires_grad:
            (others if p.ndim <= 1 or name.endswith(no_decay) else decayed)["params"].append(p)
    return [decayed, others]


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


def grad_norm(module):
    """L2 norm of all gradients of a module, taken as one vector."""
    return torch.nn.utils.get_total_norm(
        [p.grad for p in module.parameters() if p.grad is not None])


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, for each parameter of the teacher,
    not for its buffers. With momentum 0 it is an exact copy."""
    source = dict(distributed.unwrap(student).named_parameters())
    names, target = zip(*distributed.unwrap(teacher).named_parameters())
    torch._foreach_lerp_(target, [source[name] for name in names], 1 - momentum)


def describe_flat_loss(log):
    """A sentence with the likely cause if the loss at the end of a log is that of its first line;
    else None."""
    losses = [line["loss"] for line in log if "loss" in line]
    if len(losses) < 2 or losses[-1] < 0.99 * losses[0]:
        return None
    peak = max(line.get("lr", 0) for line in log)
    cause = (f"a learning rate of at most {peak:.1e}: raise --lr" if peak < 1e-4 else
             f"too few steps, or too high a learning rate (up to {peak:.1e})")
    return (f"the loss did not fall: {losses[0]:.3f} at first, {losses[-1]:.3f} at the end; likely "
            f"cause: {cause}")


# --------------------------------------------------------------------------------------------------
# The run


class Run:
    """The state of a run, and what its loop calls (see the top of this file).

    Methods read cfg, device, rank, world and, in the body of the loop, eval_due and save_due:
    whether this step's body should evaluate, and whether it should save."""

    def __init__(self, cfg):
        self.cfg, self.out, self.folder = cfg, Path(cfg.out), RunFolder(cfg)
        self.rank = int(os.environ.get("RANK", 0))                   # set by torchrun
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = distributed.pick_device(cfg.device)
        self.precision = distributed.pick_precision(cfg.precision, self.device)
        self.step = 0                       # completed steps; in the body: without the current one
        self.total = 0                      # steps of the whole run, known in steps()
        self.images = None                  # of an epoch, known in steps(); before: of last.pt
        self.eval_due = self.save_due = False    # what the body of this step should do
        self.signal = 0                     # the signal received last; 0: none
        self.modules = []                   # of place(), for DDP and --compile
        self.initial = None                 # weights of --init-from, until they are loaded
        self.state = None                   # what checkpoints hold, from restore()
        self.sums = {}                      # {logged name: (sum, count)} since the last line
        self.interval = Interval(0)         # times since the last line
        self.flops = None                   # of one image, forward and backward, once counted
        self.peak_flops = 1.0               # FLOP/s of all devices, known in steps()
        self.last_saved_step = None         # of the last checkpoint
        self.last_save = 0.0                # time of the last checkpoint, or of the start
        self.writer = None                  # TensorBoard's, in process 0
        if cfg.batch_size % (self.world * cfg.accum_iter):
            raise ValueError(f"--batch-size {cfg.batch_size} is the global batch: it must be a "
                             f"multiple of {self.world} processes x {cfg.accum_iter} micro-batches")
        if cfg.data not in datasets.NAMES:
            datasets.find_folder(cfg.data)               # a misspelled name: before any output
        if cfg.resume:
            self.folder.check_resume()
        hint = "" if cfg.section == cfg.paper_data else f": --data {cfg.paper_data}"
        self.print0(f"{cfg.method} on {cfg.data}: configs/{cfg.method}.yaml [{cfg.section}]; "
                    f"the paper's settings{hint}")
        if self.device.type == "cpu" and cfg.section == "imagenet100" and "photos" in cfg.sections:
            self.print0("these settings need a GPU; --section photos has some for a CPU")
        if cfg.init_from and cfg.resume:
            self.print0(f"--init-from {cfg.init_from} is not read: the run continues from its own "
                        f"last.pt")
        elif cfg.init_from:
            self.initial = InitialWeights(cfg)
        distributed.keep_memory()
        torch.set_float32_matmul_precision("high")                   # TF32 for a GPU's fp32 parts
        distributed.init_distributed(self.device)
        if not cfg.resume and (note := distributed.choose_threads(self.device)):
            self.print0(note)                                        # else see restore()
        torch.manual_seed(cfg.seed)                                  # equal initial weights
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if self.signal and number == signal.SIGINT:      # Ctrl-C after any signal: end at once
            raise KeyboardInterrupt
        self.signal = number

    def check_stop(self):
        """Exits if a signal was received: to be called in long work before the first step. With
        several processes the exit code is 1, since perhaps only this process received the signal:
        torchrun then ends the others."""
        if self.signal:
            self.print0(f"received {signal.Signals(self.signal).name} before the first step")
            sys.exit(int(self.world > 1))

    def print0(self, text):
        if self.rank == 0:
            progress.write(text, sys.stdout)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, module):
        """The module on the device; in DDP, if there are several processes and it has parameters
        to train."""
        module = distributed.wrap_ddp(module.to(self.device), self.device)
        self.modules.append(module)
        return module

    def init_encoder(self, encoder, full=None):
        """With --init-from, loads the encoder of its file into that of the first placed module, and
        prints what was loaded and what is from scratch; else does nothing. To be called before the
        encoder is copied to a teacher. full: as for save_encoder(), overwritten too. Raises
        ValueError if the encoders differ in kind."""
        if self.initial:
            network = distributed.unwrap(self.modules[0])
            self.print0("\n".join(self.initial.load(network, encoder, full)))
            self.initial = None

    # ---- the loop --------------------------------------------------------------------------------

    def total_steps(self, loader):
        """Optimizer steps of the whole run: --steps, or else --epochs in steps, at least 1."""
        return self.cfg.steps or max(1, round(self.cfg.epochs * len(loader)))

    def steps(self, loader):
        """Yields (step, batch) from the first step that is not done to the end of the run.

        After a signal (SIGTERM, SIGUSR1, Ctrl-C) the step in progress and at most one more are
        completed and saved; then the process exits with code 0. Ctrl-C after any signal ends it at
        once."""
        self.total = self.total_steps(loader)
        if self.cfg.resume and self.step >= self.total:
            self.print0(f"the run in {self.out} is already complete ({self.step} of {self.total} "
                        f"steps): nothing was trained, nothing was changed")
            return
        self._print_settings(len(loader))
        if self.images not in (None, len(loader.images)):
            self.print0(f"the data set has changed: it has {len(loader.images):,} images now and "
                        f"had {self.images:,}; order of the images and schedules are those of the "
                        f"new number")
        self.images = len(loader.images)
        self.peak_flops = distributed.peak_flops(self.device, self.precision) * self.world
        batches, begin, skipped, compiled = loader.batches(start=self.step), self.step, 0, False
        self.last_save = time.perf_counter()
        self.interval = Interval(begin)
        if self.rank == 0:
            self.folder.write_config()
        with progress.bar(desc=self.out.name, total=self.total, unit="steps", initial=begin,
                          shown=self.rank == 0) as bar:
            for step in range(begin, self.total):
                called = time.perf_counter()
                batch = next(batches)
                self.interval.waited += time.perf_counter() - called
                # The methods draw from lib.rng only; this is for an evaluation's untrained network.
                torch.manual_seed(rng.key(self.cfg.seed, "step", step, self.rank))
                overdue, stop = self._max_over_processes(
                    time.perf_counter() - self.last_save >= 60 * self.cfg.save_every, self.signal)
                last = step + 1 == self.total
                evals = self.cfg.evals
                self.eval_due = step * evals // self.total < (step + 1) * evals // self.total
                self.save_due = bool(overdue or stop or last)
                # FLOPs are counted in the first step without an evaluation, which adds its own.
                count = self.flops is None and not self.eval_due
                counter = FlopCounterMode(display=False) if count else contextlib.nullcontext()
                with counter:
                    yield step, batch
                if count:
                    self.flops = counter.get_total_flops() * self.world / self.cfg.batch_size
                if self.cfg.compile and not compiled and self.flops is not None:
                    compiled = True                      # not before: FLOPs are counted uncompiled
                    self.print0("compiling the networks: the next steps can take minutes")
                    for module in self.modules:
                        module.compile()
                if loader.skipped > skipped and (step + 1) % self.cfg.log_every == 0:
                    skipped = loader.skipped
                    self.print0(f"{skipped} unreadable images replaced so far in process 0 (an "
                                f"image counts each time)")
                self._print_if_due()
                self.step = step + 1
                bar.update()
                if stop and not last:
                    bar.close()
                    self.print0(f"received {signal.Signals(stop).name}: saved after step "
                                f"{self.step}; --resume continues from there")
                    distributed.exit_together()
                    sys.exit(0)
        if self.rank == 0:
            if warning := describe_flat_loss(self.folder.read_log()):
                self.print0(warning)
            files = ", ".join(sorted(p.name for p in self.out.glob("[!.]*")))
            self.print0(f"done after {self.total} steps; {self.out}/ contains {files}")

    def _max_over_processes(self, *numbers):
        """Maximum of each number over the processes, so that all processes decide alike."""
        numbers = torch.tensor([int(n) for n in numbers])            # on the CPU: no GPU wait
        if self.world > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def micro_batches(self, batch):
        """Yields the batch in --accum-iter equal parts. DDP averages the gradients over the
        processes in the backward pass of the last part only, as with its no_sync()."""
        for i, part in enumerate(batch.split(self.cfg.accum_iter)):
            for module in self.modules:
                if isinstance(module, DistributedDataParallel):
                    module.require_backward_grad_sync = i + 1 == self.cfg.accum_iter
            yield part

    # ---- the log ---------------------------------------------------------------------------------

    def log(self, **values):
        """Adds values to the means since the last line, which the next line and metrics.jsonl
        contain. All processes must log the same names in the same order, because each mean is
        taken over the processes. Raises ValueError if the loss or the gradient norm is not finite;
        on a GPU, to avoid a wait here, at the next line, evaluation or checkpoint."""
        for name, x in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            total = total + (x.detach().double() if torch.is_tensor(x) else x)
            self.sums[name] = (total, count + 1)
        if self.device.type == "cpu":
            self._check_finite()

    def _check_finite(self):
        means = {name: float(self.sums[name][0] / self.sums[name][1])
                 for name in ("loss", "grad_norm", "lr") if name in self.sums}
        if not math.isfinite(sum(means.values())):
            saved = f"after step {self.last_saved_step}" if self.last_saved_step else "none"
            raise ValueError(f"the loss or the gradient norm is not finite by step "
                             f"{self.step + 1}: "
                             f"{', '.join(f'{name} {x:.4g}' for name, x in means.items())}; last "
                             f"checkpoint: {saved}; try --precision fp32 or a lower --lr")

    def _mean(self, x):
        """Mean of a number or scalar tensor over the processes."""
        x = torch.as_tensor(x, dtype=torch.float64, device=self.device)
        return distributed.all_mean(x).item()

    def _print_if_due(self):
        done = self.step + 1
        due = self.eval_due or done % self.cfg.log_every == 0 or done == self.total
        if not due or not self.sums:
            return
        self._check_finite()
        record = dict(step=done)
        for name, (total, count) in self.sums.items():
            record[name] = self._mean(total) / count
        seconds = max(1e-9, self.interval.seconds())
        steps = done - self.interval.first_step
        record["images_per_s"] = steps * self.cfg.batch_size / seconds
        record["data_time"] = self.interval.waited / steps
        if self.flops:
            record["mfu"] = self.flops * record["images_per_s"] / self.peak_flops
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
        self.sums, self.interval = {}, Interval(done)

    def _print_settings(self, per_epoch):
        """Prints once what reproductions most often get wrong: settings with their sources, steps,
        epochs and parameters."""
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
            self.print0(f"the run ends within its warmup of {warmup} steps: lower "
                        f"--warmup-epochs")
        for name, what in (("freeze_last_layer", "the head's last layer is frozen to its end"),
                           ("warmup_teacher_temp_epochs", "--teacher-temp is not reached")):
            if round(getattr(cfg, name, 0) * per_epoch) >= self.total:
                self.print0(f"the run is too short: {what}; lower {config.flag(name)}")

    @contextlib.contextmanager
    def paused(self):
        """What runs within (evaluation, checkpoints) does not count as training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()                     # training work still queued does count
        begin = time.perf_counter()
        yield
        self.interval.paused += time.perf_counter() - begin

    @contextlib.contextmanager
    def evaluation(self, *modules):
        """For computations next to training: paused(), these modules in eval mode, no gradients.
        If most images are unreadable (datasets.UnreadableImage), the evaluation ends with a
        message, but not the run. Raises ValueError if the loss is not finite: no figure can be
        drawn then."""
        self._check_finite()
        for module in modules:
            module.eval()
        with self.paused(), torch.no_grad():
            try:
                yield
            except datasets.UnreadableImage as e:        # perhaps in this process only: no print0
                progress.write(f"evaluation skipped: {e}", sys.stdout)
        for module in modules:
            module.train()

    # ---- checkpoints -----------------------------------------------------------------------------

    def restore(self, **state):
        """Opens the run's folder, registers what checkpoints hold (modules and optimizers, by name)
        and, with --resume, loads last.pt into them. Must be called before save(). Raises ValueError
        for a file of another method or with other shapes, OSError if the folder is not writable."""
        self.state = {name: distributed.unwrap(x) for name, x in state.items()}
        problem = [None]
        try:
            if self.rank == 0 and (kept := self.folder.open(self.cfg.resume)):
                self.print0(f"the earlier run in {self.out} is kept as {kept}")
        except (ValueError, OSError) as e:
            problem = [e]
        if self.world > 1:
            dist.broadcast_object_list(problem)          # either all processes stop or none
        if problem[0]:
            raise problem[0]
        if self.cfg.resume:
            self.step, self.sums, self.images, threads, changed = self.folder.load(self.state)
            self.last_saved_step = self.step
            changed.pop("out", None)                     # a folder that was moved
            values = (f"{k} {getattr(self.cfg, k)} (was {x})" for k, x in changed.items())
            self.print0(f"resumed from {self.out / 'last.pt'} after step {self.step}"
                        f"{'; changed: ' * bool(changed)}{', '.join(values)}")
            if threads and self._computes_alone() and (note := distributed.keep_threads(threads)):
                self.print0(note)
        if self.rank == 0:
            self.folder.trim_log(self.step)              # removes lines later than last.pt
            self.writer = self.folder.tensorboard(self.step) if self.cfg.tensorboard else None

    def _computes_alone(self):
        """Whether the number of threads is that of choose_threads()."""
        return self.device.type == "cpu" and self.world == 1

    def save(self):
        """Writes last.pt: the state given to restore(), the step, and the means of the next line.
        If the process is killed meanwhile, the previous file remains. Raises OSError with a
        readable message, for example on a full disk, and RuntimeError without a restore()."""
        if self.state is None:
            raise RuntimeError("run.save() needs to know what to save: call run.restore(...) first")
        self._check_finite()
        self._print_if_due()                             # a checkpoint is never ahead of the log
        with self.paused():
            sums = {name: (self._mean(total), count) for name, (total, count) in self.sums.items()}
            if self.rank == 0:
                threads = torch.get_num_threads() if self._computes_alone() else None
                self.folder.save(self.state, self.step + 1, sums, self.images, threads)
        self.last_saved_step, self.last_save = self.step + 1, time.perf_counter()

    def save_encoder(self, backbone, full=None, **info):
        """Writes encoder.pt, which checkpoints.load_encoder and evaluate.py read. Call it before
        save(): if the process is killed in between, --resume writes both files again.

        info: branch, heads, ... (see checkpoints.save_encoder). full: a state dict for full.pt,
        with the decoder, under the names of the published files."""
        self._check_finite()
        if self.rank > 0:
            return
        about = dict(method=self.cfg.method, data=self.cfg.data, step=self.step + 1)
        with self.paused():
            checkpoints.save_encoder(self.out / "encoder.pt", backbone, **about, **info)
            if full:
                full = {name: x.cpu() for name, x in full.items()}
                content = dict(model=full, num_heads=backbone.config["num_heads"], **about,
                               decoder_num_heads=getattr(self.cfg, "decoder_num_heads", None))
                checkpoints.write_atomic(self.out / "full.pt", lambda f: torch.save(content, f))


# How the console prints a value, by its name; metrics.jsonl keeps all digits.
FORMATS = {"lr": "{:.1e}", "grad_norm": "{:.2f}", "knn": "{:.1f}%", "linear": "{:.1f}%",
           "knn_patch": "{:.1f}%", "linear_patch": "{:.1f}%", "images_per_s": "{:,.0f}",
           "mfu": "{:.0%}"}


class Interval:
    """Wall time since the last printed line, with the seconds waited for data and those paused."""

    def __init__(self, first_step):
        self.first_step, self.begin = first_step, time.perf_counter()
        self.waited, self.paused = 0.0, 0.0

    def seconds(self):
        """Seconds of training: without pauses, with waiting for data."""
        return time.perf_counter() - self.begin - self.paused
