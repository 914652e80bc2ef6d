"""The folder of a run, out/METHOD-DATA: only one run writes to it, and nothing in it is lost.

    config.yaml      all settings                  last.pt      the state that --resume continues
    metrics.jsonl    a line for each log line      .lock        held by the process that writes
"""
import dataclasses
import errno
import fcntl
import json
from pathlib import Path

import torch
import yaml

from lib import checkpoints


class RunFolder:
    """Used by lib.run.Run, in the first process; load() in all."""

    def __init__(self, cfg):
        self.cfg, self.path, self.lock = cfg, Path(cfg.out), None

    def check_resume(self):
        if not (self.path / "last.pt").exists():
            raise ValueError(f"nothing to resume: there is no {self.path / 'last.pt'}; leave out "
                             f"--resume to start, or name the run's folder with --out")

    def open(self, resume):
        """Creates and locks the folder. Without `resume` an earlier run in it is renamed; returns
        its new path, or None. Raises ValueError or OSError with a sentence."""
        kept = None
        try:
            self._lock()
            there = {file.name for file in self.path.iterdir()}
            if not resume and there & {"last.pt", "encoder.pt"}:
                if "config.yaml" not in there or Path.cwd().is_relative_to(self.path.resolve()):
                    raise ValueError(f"{self.path} contains other files, too; choose a folder of "
                                     f"the run's own with --out")
                names = (self.path.with_name(f"{self.path.name}.{n}") for n in range(1, 10**6))
                kept = next(name for name in names if not name.exists())
                self.path.rename(kept)
                self._lock()
            if not resume:
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
        except OSError as e:
            raise OSError(f"cannot write to {self.path} ({e.strerror or e}); choose a folder with "
                          f"--out") from None
        return kept

    def _lock(self):
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "w")               # released with the process
        try:
            # not flock: decoders would inherit it, and hold it longer than a killed run lives
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run is writing to {self.path}; choose a folder with "
                             f"--out") from None
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise                                    # a file system without locks is accepted

    def write_config(self):
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in
                 dataclasses.asdict(self.cfg).items() if k not in ("resume", "config")}
        text = yaml.safe_dump({"method": self.cfg.method, **plain}, sort_keys=False).encode()
        checkpoints.write_atomic(self.path / "config.yaml", lambda f: f.write(text))

    def append_log(self, record):
        with open(self.path / "metrics.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")

    def trim_log(self, step):
        """Removes the lines after `step`, and one that a kill left incomplete."""
        log = self.path / "metrics.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            text = "".join(line + "\n" for line in kept).encode()
            checkpoints.write_atomic(log, lambda f: f.write(text))

    def tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
        return SummaryWriter(self.path)

    def save(self, state, step, meter):
        """Writes last.pt. state: {name: module or optimizer}; meter: {name: (sum, count)}."""
        content = {"format": "training/1", "method": self.cfg.method, "step": step,
                   "state": {name: x.state_dict() for name, x in state.items()}, "meter": meter}
        checkpoints.write_atomic(self.path / "last.pt", lambda f: torch.save(content, f))

    def load(self, state):
        """Loads last.pt into `state`, as in save(). Returns step and meter. Raises ValueError for a
        file of another method or shape, OSError if it cannot be read now."""
        path = self.path / "last.pt"
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
        if set(saved["state"]) != set(state):
            raise ValueError(f"{path} contains {sorted(saved['state'])}, "
                             f"needed are {sorted(state)}")
        for name, x in state.items():
            own = [{k: v for k, v in group.items() if k != "params"}
                   for group in getattr(x, "param_groups", [])]
            try:
                x.load_state_dict(saved["state"][name])
            except (RuntimeError, ValueError, KeyError) as e:
                reason = str(e).splitlines()[-1].strip()
                raise ValueError(f"{path} contains a {name} that does not fit ({reason}); resume "
                                 f"with the settings in {self.path / 'config.yaml'}") from None
            for group, now in zip(getattr(x, "param_groups", []), own):
                group.update(now)                        # today's weight decay, not the saved one
        return saved["step"], {name: list(entry) for name, entry in meter.items()}
