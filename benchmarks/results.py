"""The table of results in docs/results.md: train every method on toy with several seeds, evaluate
every model with the same probes, print the mean and standard deviation over the seeds. For
comparison: the same network trained with labels and untrained, and raw pixels.

    python -m benchmarks.results --table                  # print what results.yaml holds
    python -m benchmarks.results                          # train and evaluate: hours on 2 CPU cores
    python -m benchmarks.results --methods mae mmc --seeds 0
    python -m benchmarks.results --data toy-scenes        # train on toy-scenes, evaluate on toy

Finished work is not repeated: a stopped run is resumed, and a probe that has a line in the run's
results.jsonl is skipped. The numbers of a finished run are kept in benchmarks/results.yaml, so that
seeds can be added on another day or machine. Two models are processed at a time with one thread
each, which is faster than one model with two threads.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from benchmarks import METHODS
from lib import checkpoints, config, distributed

ROOT = Path(__file__).parent.parent
BASELINES = {"supervised": "supervised", "untrained": "untrained (MMC's)", "pixels": "raw pixels"}
ROWS = METHODS | BASELINES
PROBES = {        # flags of evaluate.py: {column of the table: (feature, None: the first; metric)}
    "knn": {"kNN, class token": ("cls", "k=10"), "kNN, mean patch token": ("patch", "k=10")},
    "linear": {"linear probe": (None, "top-1")},
    "part_retrieval": {"part retrieval AP": (None, "AP")},
    "linear_segmentation --level object": {"linear segmentation mIoU, objects": (None, "mIoU")},
    "linear_segmentation --level part": {"linear segmentation mIoU, parts": (None, "mIoU")},
    "zero_shot_segmentation": {"zero-shot segmentation IoU": (None, "Opt")},
    "video": {"video J&F": (None, "J&F")}}
PIXEL_PROBES = ("knn", "linear", "part_retrieval")        # those that need no patch tokens
DIAGNOSTICS = {   # of analysis.py, in the last block: (column of the table, key, decimals)
    "attention_distance": ("attention distance", "pixels", 1),
    "nmi": ("NMI", "nmi", 2)}
COLUMNS = [*(name for columns in PROBES.values() for name in columns),
           *(name for name, *_ in DIAGNOSTICS.values())]
RESULTS, LOCK = Path(__file__).with_suffix(".yaml"), threading.Lock()
HEADER = """\
# Written by benchmarks/results.py: training data set, method, seed. The kNN probe compares with all
# 20,000 training images. Units: percent; attention distance: pixels of 48; NMI: 0 to 1.
"""


def list_runs(args):
    for seed in args.seeds:
        for method in args.methods:
            if method in BASELINES and args.data != "toy" or method == "pixels" and seed:
                continue                                # baselines: once, pixels without a seed
            name = f"{method}-{args.data}{f'-seed{seed}' * (seed > 0)}"
            yield method, args.data, seed, Path(args.out) / name


def train_command(method, trained_on, seed, folder):
    """The command that trains a run; --resume if it was stopped."""
    if method == "supervised":
        return "-m", "benchmarks.supervised", "--seed", str(seed), "--out", str(folder)
    script = "mmc.py" if method == "untrained" else f"{method}.py"
    flags = ("--steps", "1", "--lr", "0", "--evals", "0") if method == "untrained" else ()
    return (script, "--data", trained_on, "--seed", str(seed), "--out", str(folder), *flags,
            *["--resume"] * (folder / "last.pt").is_file())


def run_script(log, *command):
    """Runs a script with one thread and appends its output to `log`. SystemExit if it fails."""
    with open(log, "a") as file:
        process = subprocess.run([sys.executable, *command], stdout=file, stderr=file, cwd=ROOT,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see the end of {log}")


def read_metrics(folder, flags):
    """The newest result of a probe: {feature: {metric: value}}, None if there is none."""
    task, _, level = flags.partition(" --level ")
    of_pixels = is_pixels(folder)
    file = folder / "results.jsonl"
    for line in reversed(file.read_text().splitlines() if file.is_file() else []):
        line = json.loads(line)
        settings = line["settings"]
        if (line["task"], line["data"], settings["limit"]) == (task, "toy", None) and (
                not level or settings["level"] == level) and (not line["checkpoint"]) == of_pixels:
            return line["metrics"]


def is_pixels(folder):
    return folder.name.startswith("pixels-")


def train_and_evaluate(run):
    """Trains the run and runs its probes, unless that is done already; writes results.yaml."""
    method, trained_on, seed, folder = run
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log, pixels = folder / "results.log", method == "pixels"
    if not pixels and not (log.exists() and "\ndone after " in log.read_text()):
        run_script(log, *train_command(method, trained_on, seed, folder))
        if "\ndone after " not in log.read_text():
            raise SystemExit(f"{folder} was stopped; run the same command again to resume")
    model = (("--baseline", "pixels", "--json", str(folder / "results.jsonl")) if pixels else
             ("--checkpoint", str(folder)))
    for flags in PIXEL_PROBES if pixels else PROBES:
        if read_metrics(folder, flags) is None:
            run_script(log, "evaluate.py", "--task", *flags.split(), "--data", "toy", *model)
    if not pixels and not all(
            (folder / "analysis" / f"{name}.json").is_file() for name in DIAGNOSTICS):
        run_script(log, "analysis.py", "--what", *DIAGNOSTICS, "--checkpoint", str(folder),
                   "--data", "toy", "--out", str(folder))
    with LOCK:
        results = read_results()
        seeds = results.setdefault(trained_on, {}).setdefault(method, {})
        seeds[seed] = dict(**({} if pixels else describe_run(folder)), **collect_numbers(folder))
        text = HEADER + yaml.dump(results, default_flow_style=None, width=98, sort_keys=False)
        checkpoints.write_atomic(RESULTS, lambda file: file.write(text.encode()))
    print(f"{folder} done", flush=True)


def try_run(run):
    """True if the run was finished. If it fails, the reason is printed and the others continue."""
    try:
        train_and_evaluate(run)
    except SystemExit as reason:
        print(reason, flush=True)
        return False
    return True


def collect_numbers(folder):
    """{column of the table: number} of a run with all probes done."""
    numbers = {}
    for flags in PIXEL_PROBES if is_pixels(folder) else PROBES:
        metrics = read_metrics(folder, flags)
        for column, (feature, name) in PROBES[flags].items():
            feature = feature if feature in metrics else next(iter(metrics))
            numbers[column] = round(metrics[feature][name], 1)
    if is_pixels(folder):                                # one feature, no attention
        del numbers["kNN, mean patch token"]
        return numbers
    knn = read_metrics(folder, "knn")
    if knn["cls"] == knn["patch"]:        # no class token: evaluate.py used the mean patch token
        del numbers["kNN, class token"]
    for name, (column, key, decimals) in DIAGNOSTICS.items():
        model, = json.loads((folder / "analysis" / f"{name}.json").read_text())["models"]
        numbers[column] = round(model["numbers"][key][-1], decimals)
    return numbers


def describe_run(folder):
    """Date, torch version, steps and precision of a run."""
    settings = config.read_yaml(folder / "config.yaml")
    day = datetime.date.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    precision = distributed.pick_precision(settings["precision"], distributed.pick_device())
    return dict(day=day, torch=torch.__version__.split("+")[0], steps=last["step"],
                precision=precision)


def read_results():
    return config.read_yaml(RESULTS) if RESULTS.exists() else {}


def format_row(name, seeds):
    """Cells of a row: mean over the seeds, and the standard deviation of two or more seeds. "-":
    the column does not apply (no class token)."""
    cells = [name, str(len(seeds))]
    for column in COLUMNS:
        values = [seed[column] for seed in seeds if column in seed]
        decimals = 2 if column == "NMI" else 1
        std = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{decimals}f}{std}" if values else "-")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=ROWS,
                        help="rows of the table [all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", default="toy", help="training data: toy or toy-scenes [toy]")
    parser.add_argument("--out", default="out", help="folder of the runs [out]")
    parser.add_argument("--table", action="store_true", help="only print the table of results.yaml")
    args = parser.parse_args()
    done = []
    if not args.table:
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(try_run, list_runs(args)))
    results = read_results().get(args.data, {})
    print(f"| method | seeds | {' | '.join(COLUMNS)} |\n{'|---' * (2 + len(COLUMNS))}|")
    for method in args.methods:
        if seeds := [results[method][s] for s in args.seeds if s in results.get(method, {})]:
            print("| " + " | ".join(format_row(ROWS[method], seeds)) + " |")
    if not all(done):
        sys.exit("some runs are not finished (see above); run the same command again to continue")


if __name__ == "__main__":
    main()
