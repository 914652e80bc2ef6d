"""Shared by the probes that train: shuffled batches, parameter groups, an encoder to fine-tune, and
progress that is saved, so that an interrupted run can be resumed."""
import contextlib
import itertools
import math
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import vit
from lib import checkpoints, distributed, positions, progress, rng, swin
from probes.common import hash_settings, is_toy

SHUFFLE_BYTES = 2**31    # images kept in memory for shuffling: 2 GiB per worker
TOY_LIMITS = dict(train=1000, test=300)  # default number of toy images in the patch probes


def image_limit(opt, split):
    """Number of images of a split to use; None: all. --limit, else TOY_LIMITS on toy."""
    return opt.limit or (TOY_LIMITS[split] if is_toy(opt.data) else None)


def single_lr(opt, default):
    """--lr of a task that takes one, else the default. ValueError: several."""
    if len(opt.lr) > 1:
        raise ValueError(f"{opt.task} takes one --lr at a time")
    return opt.lr[0] if opt.lr else default


# ---- progress ------------------------------------------------------------------------------------


class Progress:
    """Counts and saves the steps of a training run. The same command resumes an interrupted run.

        progress = Progress(model, opt, net, optimizer)
        for step, batch in progress.steps(batches_from(progress.step), total):
            ...
        progress.delete()                                # after the result is computed

    step: number of steps done, 0 in a new run. curve: a list that is saved with them. After every
    MINUTES (and at the end, if the run took longer) the process of rank 0 writes a file to
    --out/progress; its name contains a hash of everything that affects the result. ValueError: the
    file cannot be read or does not match the network.
    """

    MINUTES = 5              # minutes between two saves
    # Flags that do not affect the result, or only through the model, which is also hashed.
    NOT_HASHED = {"checkpoint", "baseline", "json", "out", "device", "precision", "workers",
                  "cache", "reference", "show", "save"}

    def __init__(self, model, opt, net, optimizer):
        settings = sorted((k, v) for k, v in vars(opt).items() if k not in self.NOT_HASHED)
        digits = hash_settings(model, settings)
        name = f"{opt.task}-{model.name}-{Path(opt.data).name}-{digits}.pt"
        self.path = Path(opt.out) / "progress" / name
        self.name = model.name
        self.net = net
        self.optimizer = optimizer
        self.step = 0
        self.curve = []
        if self.path.is_file():
            try:
                state = checkpoints.read_file(self.path)
                net.load_state_dict(state["net"])
                optimizer.load_state_dict(state["opt"])
                self.step, self.curve = state["step"], state["curve"]
            except (ValueError, KeyError, RuntimeError):
                raise ValueError(f"{self.path} is damaged or of another version; delete it to "
                                 f"start {opt.task} from scratch") from None
            if distributed.rank() == 0:
                print(f"{self.path}: resumed after step {self.step:,}", flush=True)

    def steps(self, batches, total):
        """Yields (step, batch) up to `total` steps; shows a progress bar and saves regularly.

        Ctrl-C: the step in progress is completed and saved, then KeyboardInterrupt; a second one
        ends it at once. With several processes, which end at different steps, nothing is saved."""
        self.first, self.total, self.begin = self.step, total, time.monotonic()
        self.bar = progress.bar(desc=f"{self.name}: training", total=total, unit="steps",
                                initial=self.step, shown=distributed.rank() == 0)
        saved = self.begin
        try:
            with catch_interrupt() as interrupts:
                for step, batch in zip(range(self.step, total), batches):
                    yield step, batch
                    self.step = step + 1
                    self.bar.update()
                    due = time.monotonic() - (self.begin if self.step == total else saved)
                    stop, is_saved = bool(interrupts), False
                    if (due > 60 * self.MINUTES or stop) and distributed.rank() == 0:
                        is_saved = self.save()
                        saved = time.monotonic()
                    if stop:
                        raise KeyboardInterrupt(
                            f"saved after step {self.step:,} of {total:,}: the same command "
                            f"continues" if is_saved else f"step {self.step:,} was not saved")
        finally:
            self.bar.close()

    def mean_loss(self, losses, lr, remedy="--precision fp32, or an earlier checkpoint"):
        """Mean of the losses over all processes, also shown in the bar. Call it at the end of a
        step, but not of every step, because it waits for the GPU. ValueError: it is not finite."""
        mean = distributed.all_mean(torch.stack(losses).mean()).item()
        if not math.isfinite(mean):
            raise ValueError(f"{self.name}: the loss is not finite at step {self.step + 1} of "
                             f"{self.total} (lr {lr:.1e}); try {remedy}")
        self.bar.set_postfix(loss=f"{mean:.3f}")
        return mean

    def print(self, line):
        """Prints a line above the bar, with the remaining time. Call it at the end of a step."""
        seconds = (time.monotonic() - self.begin) / (self.step + 1 - self.first)
        eta = tqdm.format_interval(seconds * (self.total - self.step - 1))
        progress.write(f"{line}  eta {eta}", sys.stdout)

    def save(self):
        """Writes the file -> whether it could. A full disk is reported but does not stop the
        run."""
        state = dict(net=self.net.state_dict(), opt=self.optimizer.state_dict(), step=self.step,
                     curve=self.curve)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.write_atomic(self.path, lambda file: torch.save(state, file))
            return True
        except OSError as error:
            print(error, file=sys.stderr)
            return False

    def delete(self):
        if distributed.rank() == 0:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def catch_interrupt():
    """Yields a list to which the first Ctrl-C adds a number; the second raises KeyboardInterrupt.
    With several processes and outside of the main thread nothing changes, nor where Ctrl-C is
    ignored (in background jobs of a script)."""
    interrupts, before = [], signal.getsignal(signal.SIGINT)
    if (distributed.world_size() > 1 or before in (signal.SIG_IGN, None)
            or threading.current_thread() is not threading.main_thread()):
        yield interrupts
        return

    def catch(number, frame):
        interrupts.append(number)
        signal.signal(number, before)
        progress.write("interrupted: this step is completed and saved; Ctrl-C again ends at once")

    signal.signal(signal.SIGINT, catch)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


# ---- batches -------------------------------------------------------------------------------------


def load_batches(read, batch_size, collate, steps, opt, device):
    """Yields collate(step, items), tensors on the device, for a range of steps.

    items: the next `batch_size` items of read(), shuffled. A resumed run continues in another
    order. Workers prepare batches in advance; toy is fast and does not need workers.
    """
    batches = ShuffledBatches(read, batch_size, collate, opt.seed, steps.start)
    workers = 0 if is_toy(opt.data) else opt.workers
    for batch in data.in_workers(batches, steps, workers, device):
        if isinstance(batch, str):
            raise ValueError(batch)
        yield [x.to(device, non_blocking=True) for x in batch]


class ShuffledBatches:
    """step -> collate(step, items), or an error message as a str: the message of an exception in a
    worker would contain its traceback.

    It is called for consecutive steps, or by each of n workers for every nth step. All workers and
    processes read the same images in the same order, so their number does not affect the batches.
    """

    def __init__(self, read, batch_size, collate, seed, first_step=0):
        self.read = read
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self.first_step = first_step
        self.done = first_step
        self.stream = None

    def __call__(self, step):
        if not self.stream:                              # created in the worker, if there is one
            g = rng.generator(self.seed, "order", self.first_step)
            self.stream = shuffle_items(self.read, g)
        try:
            for _ in range(self.done, step + 1):         # skips the steps of other workers
                items = list(itertools.islice(self.stream, self.batch_size))
        except ValueError as error:
            return str(error)
        self.done = step + 1
        return self.collate(step, items)


def shuffle_items(read, g):
    """Yields the items of read(), a finite iterator, endlessly in random order.

    If the images fit in SHUFFLE_BYTES, they are kept and permuted in each epoch. Of a larger set, a
    pool of that size is kept, and each item drawn from it is replaced by the next one of read().
    """
    stream = read()
    pool, room = [], SHUFFLE_BYTES
    for item in stream:
        pool.append(item)
        room -= item.image.nbytes
        if room <= 0:
            break
    else:
        if not pool:
            raise ValueError("no training images: raise --limit or change --data")
        while True:
            yield from (pool[i] for i in torch.randperm(len(pool), generator=g).tolist())
    for item in itertools.chain(stream, itertools.chain.from_iterable(iter(read, None))):
        i = int(torch.randint(len(pool), (), generator=g))
        yield pool[i]
        pool[i] = item


def draw_uniform(g, low=0.0, high=1.0):
    return low + (high - low) * torch.rand((), generator=g).item()


def flip_table(names):
    """(256,) uint8: the label of each class in a mirrored image: that of right-arm for left-arm,
    of "cat: reye" for "cat: leye", of r_eye for l_eye, of eye-r for eye-l."""
    table, names = torch.arange(256, dtype=torch.uint8), [name.lower() for name in names]
    for i, name in enumerate(names):
        other = name.replace("left", "\0").replace("right", "left").replace("\0", "right")
        if other == name:                                # Pascal-Part's "cat: leye"; l_eye, eye_r
            other = re.sub(r"(?<=: )[lr]|^[lr](?=[_-])|(?<=[_-])[lr]$",
                           lambda side: "rl"["lr".index(side[0])], name)
        table[i] = names.index(other) if other in names else i
    return table


# ---- optimizers and the encoder to fine-tune -----------------------------------------------------


def linear_adamw(layers, lrs, weight_decay):
    """One AdamW for several layers, each with its peak learning rate; biases are not decayed."""
    groups = [dict(params=[p], peak=lr, weight_decay=weight_decay if p.ndim > 1 else 0.0)
              for layer, lr in zip(layers, lrs) for p in layer.parameters()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))


def layer_decay_groups(named_parameters, depth, layer_decay, weight_decay):
    """Parameter groups for AdamW: an `encoder` with that depth and its head. The learning rate of a
    group is lr times its `factor`, which is smaller for earlier layers.

    Layer 0: patch embedding, class and register tokens, positions; layer i: block i, counted from 1
    (of a Swin: stage i with the merging before it; our choice); layer depth + 1: final norm and
    head. factor = layer_decay^(depth + 1 - layer). Vectors, class and register tokens, and
    positions have no weight decay.
    """
    groups, top = {}, depth + 1
    for name, p in named_parameters:
        part, *rest = name.removeprefix("encoder.").split(".")
        tokens = part in ("cls_token", "register_tokens", "pos_embed")
        embeds = tokens or part == "patch_embed"
        layer = int(rest[0]) + 1 if part == "blocks" else 0 if embeds else top
        if part == "features":                           # Swin: embedding, stage, merging, ...
            layer = 0 if rest[0] == "0" else int(rest[0]) // 2 + 1
        no_decay = p.ndim <= 1 or tokens
        groups.setdefault((layer, no_decay), []).append(p)
    return [dict(params=params, factor=layer_decay**(top - layer),
                 weight_decay=0.0 if no_decay else weight_decay)
            for (layer, no_decay), params in groups.items()]


def copy_encoder(encoder, drop_path, reinit=(), final_norm=False, img_size=None):
    """A copy of the encoder to fine-tune; the blocks `reinit` are re-initialized.

    A relative position table that all blocks share becomes one table per block (BEiT, SimMIM).
    Positions that were fixed in pretraining are trained, as in MAE's code. img_size: side of the
    training images in pixels; positions are resampled to it here, once, so that each patch has its
    own trained position.
    """
    config = {**encoder.config, "drop_path": drop_path}
    config["final_norm"] &= final_norm
    state, key = encoder.state_dict(), "relative_position_bias_table"
    if isinstance(encoder, swin.Swin):
        if reinit:
            raise ValueError("--reinit re-initializes blocks of a ViT, and this encoder is a Swin")
        copy = swin.Swin(**config)                       # windows keep their size
        copy.load_state_dict({name: state[name] for name in copy.state_dict()})
        return copy
    if config["rel_pos"] == "shared":
        config["rel_pos"] = "block"
        for i in range(encoder.depth):
            state[f"blocks.{i}.attn.{key}"] = state[f"rel_pos_bias.{key}"]
    if img_size not in (None, config["img_size"]):
        config["img_size"] = img_size
        positions.resize_state(state, encoder.grid, (img_size // encoder.patch_size,) * 2,
                               config["resize"])
    copy = vit.ViT(**config)                             # initialized as before pretraining
    reinitialized = tuple(f"blocks.{i}." for i in reinit)
    copy.load_state_dict({name: x if name.startswith(reinitialized) else state[name]
                          for name, x in copy.state_dict().items()})
    if copy.pos_embed is not None:
        copy.pos_embed.requires_grad_(True)
    return copy
