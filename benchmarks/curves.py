"""Reference curves: the loss and kNN curve of each method's default run, `python METHOD.py` on toy.
`python analysis.py --what loss` draws them together with the curves of a user's run. When the
default settings of a method change, run it again and write its curve.

    python -m benchmarks.curves out/*-toy

writes the curves of these runs to diagnostics/curves.yaml and keeps those of other methods there.
"""
import argparse
import datetime
import importlib
import json
from pathlib import Path

import torch
import yaml

from lib import config, distributed

CURVES = Path(__file__).parent.parent / "diagnostics" / "curves.yaml"
HEADER = """\
# Logs of the default runs, `python METHOD.py` on toy; written by `python -m benchmarks.curves`.
# loss: mean since the previous line; knn: percent correct, class token (500 images, 10 neighbors).
"""
FREE = {"out", "workers", "device", "precision", "save_every"}    # may differ from default


def read_curve(out):
    """Reads the log of a default run -> method, {"run", "step", "loss", "knn_step", "knn"}.

    ValueError: a setting other than those in FREE is not the default.
    """
    settings = config.read_yaml(Path(out) / "config.yaml")
    default = vars(config.parse(importlib.import_module(settings["method"]).Config, []))
    for name in settings.keys() - FREE:
        value = list(default[name]) if isinstance(default[name], tuple) else default[name]
        if settings[name] != value:
            raise ValueError(f"{out} is not a default run: {name} is {settings[name]}, not {value}")
    file = Path(out) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    evaluated = [line for line in lines if "knn" in line]
    precision = distributed.pick_precision(settings["precision"], distributed.pick_device())
    run = dict(day=datetime.date.fromtimestamp(file.stat().st_mtime),
               torch=torch.__version__.split("+")[0], seed=settings["seed"], precision=precision)
    return settings["method"], dict(
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
    curves |= dict(read_curve(out) for out in runs)
    text = yaml.dump(dict(sorted(curves.items())), default_flow_style=None, width=92,
                     sort_keys=False)
    CURVES.write_text(HEADER + text)


if __name__ == "__main__":
    config.main(main)
