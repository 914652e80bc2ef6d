"""Reference curves: the loss and kNN curve of each method's default run on toy, `python METHOD.py`,
and on CIFAR-10, `python METHOD.py --data cifar10`. `python analysis.py --what loss` draws them
together with the curves of a user's run. When the default settings of a method change, run it again
and write its curve.

    python -m benchmarks.curves out/mae-toy out/mae-cifar10

writes the curves of these runs to diagnostics/curves.yaml and keeps those of other methods there.
"""
import argparse
import datetime
import importlib
import json
import math
from pathlib import Path

import torch
import yaml

from lib import config, distributed, toy

CURVES = Path(__file__).parent.parent / "diagnostics" / "curves.yaml"
HEADER = """\
# Logs of the default runs by data set; written by `python -m benchmarks.curves`.
# loss: mean since the previous line of the log, of which those of CIFAR-10 have more than are kept
# here; knn: percent correct, class token (500 images, 10 neighbors).
"""
FREE = {"data_root", "out", "workers", "device", "precision", "save_every"}    # need not be default
IMAGES = {"toy": toy.NUM_IMAGES["train"], "cifar10": 50_000}
LINES = 150                                  # of a curve of the loss, at most


def read_curve(out):
    """Reads the log of a default run -> data set, method, {"run", "step", "loss", "knn_step",
    "knn"}.

    ValueError: another data set; a setting other than those in FREE is not the default. CIFAR-10
    may be a part with more epochs, for as many steps as the default has (to 1%).
    """
    settings = config.read_yaml(Path(out) / "config.yaml")
    data, method = settings["data"], settings["method"]
    if data not in IMAGES:
        raise ValueError(f"{out} is not a default run: data is {data}, not {' or '.join(IMAGES)}")
    default = config.parse(importlib.import_module(method).Config, ["--data", data])
    free = FREE | {"epochs", "warmup_epochs"} if data == "cifar10" else FREE
    for name in settings.keys() - free:
        value = getattr(default, name)
        value = list(value) if isinstance(value, tuple) else value
        if settings[name] != value:
            raise ValueError(f"{out} is not a default run: {name} is {settings[name]}, not {value}")
    file = Path(out) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps, wanted = lines[-1]["step"], default.epochs * (IMAGES[data] // default.batch_size)
    if abs(steps - wanted) > 0.01 * wanted:
        raise ValueError(f"{out} is not a default run: it has {steps} steps, not {wanted:.0f}")
    evaluated = [line for line in lines if "knn" in line]
    every = math.ceil(len(lines) / LINES)
    lines = lines[every - 1:-1:every] + lines[-1:]
    precision = distributed.pick_precision(settings["precision"], distributed.pick_device())
    run = dict(day=datetime.date.fromtimestamp(file.stat().st_mtime),
               torch=torch.__version__.split("+")[0], seed=settings["seed"], precision=precision,
               epochs=settings["epochs"])
    return data, method, dict(
        run=run,
        step=[line["step"] for line in lines],
        loss=[round_digits(line["loss"], 4) for line in lines],
        knn_step=[line["step"] for line in evaluated],
        knn=[round_digits(line["knn"], 3) for line in evaluated])


def round_digits(x, n):
    """x rounded to n significant digits."""
    return float(f"{x:.{n}g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of default runs")
    runs = parser.parse_args().runs
    curves = config.read_yaml(CURVES) if CURVES.exists() else {}
    for data, method, curve in map(read_curve, runs):
        curves.setdefault(data, {})[method] = curve
    curves = {data: dict(sorted(curves[data].items())) for data in IMAGES if data in curves}
    text = yaml.dump(curves, default_flow_style=None, width=92, sort_keys=False)
    CURVES.write_text(HEADER + text)


if __name__ == "__main__":
    config.main(main)
