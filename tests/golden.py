"""Golden traces: the loss of every method and its parts at fixed steps of a tiny run (CPU, fp32,
one thread, drawn creatures) lie in golden.yaml, and test_golden.py holds the code to them.

    python tests/golden.py                       # writes golden.yaml anew
    python tests/golden.py --curves out/*-toy    # writes the curves of these default runs to
                                                 # curves.yaml; other methods' there are kept

Regenerate golden.yaml only when a change of numerics is meant, and say so in the commit: which
methods move, how far, and why. A method that moves unasked has a bug, or had one. The curves are
what `python analysis.py --what loss` lays under a user's own; when a default run's settings change,
run it again first.
"""
import argparse
import datetime
import importlib
import json
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import yaml

sys.path.append(str(Path(__file__).parent.parent))
from test_methods import METHODS, ROOT, flags

from lib import config, datasets, distributed

TRACES, CURVES = Path(__file__).with_suffix(".yaml"), ROOT / "diagnostics" / "curves.yaml"
CURVES_HEAD = """\
# The logs of the default runs, `python METHOD.py` on toy; written by tests/golden.py --curves.
# loss: mean since the line before; knn: percent right by class token (500 images, 10 neighbours).
"""
STEPS = 1, 2, 5, 10, 20
PARTS = "loss rec cls pat mae sem mim cl tokens align entropy".split()
ROUNDING = 5e-5      # relative; between threads and instruction sets 8e-6, of the hybrid 1.3e-5
DECAY = 0.5          # ten times the usual, or twenty steps would hardly show what decays
OWN = dict(hybrid=dict(lr=1e-3),      # at the lr of toy rounding grows to 5e-2 in twenty steps
           beit=dict(masked=8, min_block=2))              # of test_methods, as most others have it


def truncated(x, mean=0.0, std=1.0, a=-2.0, b=2.0):
    """For torch's own trunc_normal_, whose draws differ from version to version (2.11, 2.14)."""
    with torch.no_grad():
        return x.normal_(mean, std).clamp_(a, b)


def trace(method, out, *more, **settings):
    """{part of the loss: [its value at each of STEPS]} of a run of METHOD.py in this process.
    more, settings: flags and Config fields that differ."""
    settings = dict(weight_decay=DECAY) | OWN.get(method, {}) | settings
    argv = flags(method, "--data", "toy", "--steps", STEPS[-1], "--out", out, *more, **settings)
    load, threads = datasets.load_images, torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.object(sys, "argv", [f"{method}.py", *argv]), \
            mock.patch.object(signal, "signal"), \
            mock.patch.object(distributed, "measure_peak", return_value=1.0), \
            mock.patch.object(torch.nn.init, "trunc_normal_", truncated), \
            mock.patch.object(datasets, "load_images", lambda *given: load(*given[:4], limit=160)):
        importlib.import_module(method).main()               # two epochs of 160 images
    torch.set_num_threads(threads)
    lines = log(out)
    return {name: [lines[step - 1][name] for step in STEPS] for name in PARTS if name in lines[0]}


def log(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def curve(out):
    """The log of a default run, thinned to what is drawn. Raises ValueError for another run."""
    settings = config.read_yaml(Path(out) / "config.yaml")
    default = vars(config.parse(importlib.import_module(settings["method"]).Config, []))
    for name in settings.keys() - {"out", "seed", "workers", "device", "precision", "save_every"}:
        value = list(default[name]) if isinstance(default[name], tuple) else default[name]
        if settings[name] != value:
            raise ValueError(f"{out} is no default run: {name} is {settings[name]}, not {value}")
    lines = log(out)
    votes = [line for line in lines if "knn" in line]
    day = datetime.date.fromtimestamp((Path(out) / "metrics.jsonl").stat().st_mtime)
    return settings["method"], dict(
        run=dict(day=day, torch=torch.__version__.split("+")[0], seed=settings["seed"],
                 precision=distributed.pick_precision(settings["precision"], distributed.pick_device())),
        step=[line["step"] for line in lines], loss=[digits(line["loss"], 4) for line in lines],
        knn_step=[line["step"] for line in votes], knn=[digits(line["knn"], 3) for line in votes])


def digits(x, n):
    return float(f"{x:.{n}g}")


def write(path, head, content):
    path.write_text(head + yaml.dump(content, default_flow_style=None, width=92, sort_keys=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", metavar="RUN", help="folders of default runs")
    if runs := parser.parse_args().curves:
        found = config.read_yaml(CURVES) if CURVES.exists() else {}
        found |= dict(curve(out) for out in runs)
        write(CURVES, CURVES_HEAD, dict(sorted(found.items())))
        return
    found = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as out:
            parts = trace(method, Path(out) / "run")
        found[method] = {name: [digits(x, 7) for x in values] for name, values in parts.items()}
    write(TRACES, f"# Values at steps {STEPS}; see golden.py, which writes this file.\n", found)


if __name__ == "__main__":
    config.main(main)
