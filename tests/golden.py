"""Golden traces: the loss of every method and its parts at fixed steps of a tiny run (CPU, fp32,
one thread, drawn creatures) lie in golden.yaml, and test_golden.py holds the code to them.

    python tests/golden.py                       # rewrites golden.yaml

Regenerate golden.yaml only when a change of numerics is meant, and state it in the commit: which
methods move, how far, and why. A method that moves unasked has a bug, or had one.
"""
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
from test_methods import METHODS, flags

from lib import config, datasets, distributed

TRACES = Path(__file__).with_suffix(".yaml")
STEPS = 1, 2, 5, 10, 20
PARTS = """loss loss_rec loss_cls loss_patch loss_mae loss_sem loss_mim loss_cl loss_token
           loss_align entropy""".split()
ROUNDING = 5e-5      # relative; between threads and instruction sets 8e-6, of the hybrid 1.3e-5
DECAY = 0.5          # ten times the usual, or twenty steps would hardly show what decays
# Settings of the sections toy when the numbers were recorded: with newer ones they would move.
OWN = dict(mmc=dict(momentum_teacher=0.99),
           moby=dict(momentum_teacher=0.99, temperature=0.2),
           simmim=dict(pos="none", init="beit"),
           hybrid=dict(momentum_teacher=0.99,
                       lr=1e-3),      # at the lr of toy rounding grows to 5e-2 in twenty steps
           beit=dict(num_mask_patches=8, min_mask_patches_per_block=2))   # as most others


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


def digits(x, n):
    return float(f"{x:.{n}g}")


def write(path, head, content):
    path.write_text(head + yaml.dump(content, default_flow_style=None, width=92, sort_keys=False))


def main():
    found = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as out:
            parts = trace(method, Path(out) / "run")
        found[method] = {name: [digits(x, 7) for x in values] for name, values in parts.items()}
    write(TRACES, f"# Values at steps {STEPS}; see golden.py, which writes this file.\n", found)


if __name__ == "__main__":
    config.main(main)
