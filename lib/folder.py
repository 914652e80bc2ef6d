"""The folder of a run, out/METHOD-DATA. Only one run at a time writes to it, and a new run renames
the folder of an earlier one that has saved something.

    config.yaml          the method and all settings but resume and config
    metrics.jsonl        a line for each log line
    last.pt              the state that --resume continues from
    encoder.pt           the encoder and its heads, for evaluation and other code
    full.pt              some methods: also the decoder, under the names of the published files
    visualization.png    images and what the network makes of them
    .lock                locked by the process that writes; others: TensorBoard's (--tensorboard)
"""
import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import sys
from pathlib import Path

import torch
import yaml

from lib import checkpoints, config, progress, tree

# Settings of a run that --resume may not change, as nothing else would notice: batch and seed give
# every step its images, and all numbers of heads have the same shapes.
FIXED = "batch_size", "seed", "num_heads", "decoder_num_heads"


def finite(numbers):
    """{name: number} with None (null) for what is not finite, which JSON cannot express."""
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def read_lines(file, keys=()):
    """The lines of a .jsonl file, as dicts; none without a file. A last line that is incomplete, as
    of a process that was killed while it wrote it, is left out; other damaged ones, and those
    without `keys`, are too, and are counted on stderr."""
    lines = file.read_bytes().splitlines() if file and file.is_file() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):            # also of bytes that are not UTF-8
            if isinstance(content := json.loads(line), dict) and content.keys() >= set(keys):
                found.append(content)
    damaged = len(lines) - len(found) - (bool(lines) and not lines[-1].endswith(b"}"))
    if damaged > 0:
        progress.write(f"note: {file}: {damaged} damaged lines left out", sys.stderr)
    return found


class RunFolder:
    """Used by lib.run.Run: check_resume() and load() in every process, the rest in process 0."""

    def __init__(self, cfg):
        self.cfg, self.path, self.lock = cfg, Path(cfg.out), None

    def check_resume(self):
        """Raises ValueError if there is no last.pt."""
        if not (self.path / "last.pt").exists():
            raise ValueError(f"nothing to resume: there is no {self.path / 'last.pt'}; leave out "
                             f"--resume to start, or name the run's folder with --out")

    def settings(self):
        """All settings but resume and config, as plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in
                dataclasses.asdict(self.cfg).items() if k not in ("resume", "config")}

    def open(self, resume):
        """Creates and locks the folder. Returns the new path of an earlier run, or None.

        Without `resume`, a folder with last.pt or encoder.pt is an earlier run and is renamed; the
        log of a run that ended before it saved anything is deleted; a folder of images is refused.
        Raises ValueError or OSError with a readable message."""
        new_path = None
        try:
            if not resume and self.path.exists():
                self._refuse_other_files()
            self._lock()
            files = {file.name for file in self.path.iterdir()}
            if not resume and files & {"last.pt", "encoder.pt"}:
                if "config.yaml" not in files:
                    raise ValueError(f"{self.path} has last.pt or encoder.pt but no config.yaml, "
                                     f"so it is not a run's folder; choose another one with --out")
                if Path.cwd().is_relative_to(self.path.resolve()):
                    raise ValueError(f"the current directory is inside {self.path}, so the earlier "
                                     f"run there cannot be renamed; start from another directory, "
                                     f"or choose another folder with --out")
                folder = self.path.resolve()             # of a link: what it leads to
                new_path = checkpoints.free_name(folder)
                folder.rename(new_path)
                if Path(self.cfg.init_from).resolve().is_relative_to(folder):
                    file = Path(self.cfg.init_from).resolve().relative_to(folder)
                    self.cfg.init_from = str(new_path / file)
                self._lock()
            if not resume:
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
            for file in self.path.glob("*.pt.*.tmp"):    # of a process that was killed
                file.unlink()
        except OSError as e:
            raise OSError(f"cannot write to {self.path} ({e.strerror or e}); choose a folder with "
                          f"--out") from None
        return new_path

    def _lock(self):
        self.path.resolve().mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "w")               # released when the process ends
        try:
            # not flock: DataLoader workers would inherit it and keep it after their run is killed
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run is writing to {self.path}; choose a folder with "
                             f"--out") from None
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise                                    # a file system without locks is accepted

    def _refuse_other_files(self):
        """Raises ValueError for a folder of images, as the files of the run would be among them,
        and for one whose files the run would replace."""
        files = {file.name for file in self.path.iterdir()}
        if files & {"last.pt", "encoder.pt", ".lock"}:   # a run's, perhaps with its visualization
            return
        if found := sorted(files & {"metrics.jsonl", "config.yaml"}):
            raise ValueError(f"{self.path} contains {', '.join(found)}, but is not a run's folder; "
                             f"choose another one with --out")
        if images := tree.list_images(str(self.path))[0]:
            raise ValueError(f"{self.path} contains images, such as {images[0]}, and the files of "
                             f"the run would be among them; choose another folder with --out")

    def write_config(self):
        """Writes config.yaml, which --resume and --config read."""
        content = {"method": self.cfg.method, **self.settings()}
        text = yaml.safe_dump(content, sort_keys=False).encode()
        checkpoints.write_atomic(self.path / "config.yaml", lambda f: f.write(text))

    def append_log(self, record):
        """Writes a line of metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as f:
            f.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def trim_log(self, step):
        """Removes the lines after `step`, and an incomplete one of a process that was killed."""
        log = self.path / "metrics.jsonl"
        if log.exists():
            kept = [line for line in self.read_log() if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept).encode()
            checkpoints.write_atomic(log, lambda f: f.write(text))

    def read_log(self):
        """The lines of metrics.jsonl, as dicts."""
        return read_lines(self.path / "metrics.jsonl", ["step"])

    def tensorboard(self, step):
        """A SummaryWriter for this folder; what an earlier process wrote after `step` is hidden.
        Raises ValueError without the package."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
        return SummaryWriter(self.path, purge_step=step + 1)

    def save(self, state, step, sums, images, threads):
        """Writes last.pt. state: {name: module or optimizer}; sums: {name: (sum, count)} of what
        was logged since the last line; images: of an epoch; threads: of a run on a CPU, else
        None."""
        content = {"format": "training/1", "method": self.cfg.method, "step": step,
                   "images": images, "threads": threads, "meter": sums,
                   "settings": self.settings(),
                   "state": {name: x.state_dict() for name, x in state.items()}}
        checkpoints.write_atomic(self.path / "last.pt", lambda f: torch.save(content, f))

    def load(self, state):
        """Loads last.pt into `state`. Returns step, sums, images and threads, see save(), and the
        settings {name: value} that were others. The hyperparameters of optimizers stay those of
        this run. Raises ValueError for a file of another method, with other shapes or FIXED
        settings, OSError if it cannot be read now."""
        path = self.path / "last.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            kind, method, step = saved["format"], saved["method"], saved["step"]
            states, sums = saved["state"], saved["meter"]
        except Exception as e:
            truncated = getattr(e, "errno", None) == errno.EINVAL            # of torch.load
            if isinstance(e, (OSError, MemoryError)) and not truncated:
                raise OSError(f"cannot read {path} ({e}); nothing is lost: try again") from None
            raise ValueError(f"{path} is not a checkpoint that can be resumed "
                             f"({type(e).__name__}); start again without --resume") from None
        if (kind, method) != ("training/1", self.cfg.method):
            raise ValueError(f"{path} is of method {method}, not {self.cfg.method}; name the right "
                             f"folder with --out")
        now, before = self.settings(), saved.get("settings")
        if before is None and (self.path / "config.yaml").exists():          # of an earlier version
            before = config.read_yaml(self.path / "config.yaml")
        changed = {name: x for name, x in (before or {}).items() if name in now and now[name] != x}
        for name in FIXED:
            if name in changed:
                raise ValueError(f"{config.flag(name)} {now[name]} cannot resume the run in "
                                 f"{self.path}: use {config.flag(name)} {before[name]}, or start "
                                 f"again without --resume")
        if set(states) != set(state):
            raise ValueError(f"{path} contains {', '.join(sorted(states))}, but this run "
                             f"needs {', '.join(sorted(state))}; name the right folder with --out")
        for name, x in state.items():
            groups = [{k: v for k, v in group.items() if k != "params"}
                      for group in getattr(x, "param_groups", [])]
            try:
                x.load_state_dict(states[name])
            except (RuntimeError, ValueError, KeyError) as e:
                others = ", ".join(f"{config.flag(k)} {now[k]}, not {x}" for k, x in changed.items()
                                   if k != "out")
                reason = f"settings: {others}" if others else str(e).splitlines()[-1].strip()
                raise ValueError(f"{path} contains a {name} that does not fit ({reason}); compare "
                                 f"with the settings in {self.path / 'config.yaml'}") from None
            for group, current in zip(getattr(x, "param_groups", []), groups):
                group.update(current)       # lr, weight decay, ... of this run, not the saved ones
        sums = {name: tuple(entry) for name, entry in sums.items()}
        return step, sums, saved.get("images"), saved.get("threads"), changed
