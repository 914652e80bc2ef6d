"""The table of results in README: every method trained on toy with several seeds, every model asked
by the same probes, mean and deviation over seeds.

    python -m benchmarks.results --table                  # of what is known: benchmarks/results.yaml
    python -m benchmarks.results                          # all of it anew: hours on two CPU cores
    python -m benchmarks.results --methods mae mmc --seeds 0
    python -m benchmarks.results --data toy-scenes        # trained on scenes; asked on toy as ever

What is done is not done again: a run that was stopped goes on, and a probe whose line stands in the
run's results.jsonl is not repeated. What a finished run was found to be is kept in results.yaml, so
that seeds can be added on another day or machine. Two models are worked on at a time, each with one
thread: together they are faster than one with two.
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

from lib import checkpoints, config, distributed

ROOT = Path(__file__).parent.parent
METHODS = "mae asl simmim beit cae moco_v3 dino ibot selfpatch hybrid mmc".split()
PROBES = {        # flags of evaluate.py: column of the table: feature (None: the first), number
    "knn": {"kNN cls": ("cls", "k=10"), "kNN pat": ("pat", "k=10")},
    "linear": {"linear": (None, "top-1")},
    "part_retrieval": {"parts": (None, "AP")},
    "linear_segmentation --level object": {"objects, patches": (None, "mIoU")},
    "linear_segmentation --level part": {"parts, patches": (None, "mIoU")},
    "zero_shot_segmentation": {"prompted": (None, "Opt")},
    "video": {"video": (None, "J&F")}}
INSIDE = {"attention_distance": ("distance", "pixels", 1), "nmi": ("NMI", "nmi", 2)}   # last block
COLUMNS = [*(name for columns in PROBES.values() for name in columns),
           *(name for name, *_ in INSIDE.values())]
RESULTS, KEEPING = Path(__file__).with_suffix(".yaml"), threading.Lock()
HEAD = """\
# What benchmarks/results.py found: trained on, method, seed. kNN asks all 20,000 training images.
"""


def runs(args):
    for seed in args.seeds:
        for method in args.methods:
            name = f"{method}-{args.data}{f'-seed{seed}' * (seed > 0)}"
            yield method, args.data, seed, Path(args.out) / name


def call(log, script, *flags):
    """One script, with one thread, its words added to a file, which is named if it fails."""
    with open(log, "a") as file:
        ended = subprocess.run([sys.executable, str(ROOT / script), *flags], stdout=file,
                               stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode:
        raise SystemExit(f"{script} failed: the end of {log} says why")


def answer(folder, flags):
    """What a probe said of a run last: {feature: {number: value}}, None if it was not asked."""
    task, _, level = flags.partition(" --level ")
    file = folder / "results.jsonl"
    for line in reversed(file.read_text().splitlines() if file.is_file() else []):
        line = json.loads(line)
        own = line["settings"]
        if (line["task"], line["data"], own["limit"]) == (task, "toy", None) and (
                not level or own["level"] == level) and line["checkpoint"]:      # no baseline
            return line["metrics"]


def work(run):
    """Train, unless that is done; ask what was not asked yet; keep the answers."""
    method, trained_on, seed, folder = run
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "results.log"
    if not (log.exists() and "\ndone after " in log.read_text()):
        call(log, f"{method}.py", "--data", trained_on, "--seed", str(seed), "--out", str(folder),
             *["--resume"] * (folder / "last.pt").is_file())
        if "\ndone after " not in log.read_text():
            raise SystemExit(f"{folder} was stopped: the same command goes on")
    for flags in PROBES:
        if answer(folder, flags) is None:
            call(log, "evaluate.py", "--task", *flags.split(), "--data", "toy", "--checkpoint",
                 str(folder))
    if not all((folder / "analysis" / f"{name}.json").is_file() for name in INSIDE):
        call(log, "analysis.py", "--what", *INSIDE, "--checkpoint", str(folder), "--data", "toy",
             "--out", str(folder))
    with KEEPING:
        known = results()
        seeds = known.setdefault(trained_on, {}).setdefault(method, {})
        seeds[seed] = dict(**about(folder), **numbers(folder))
        text = HEAD + yaml.dump(known, default_flow_style=None, width=98, sort_keys=False)
        checkpoints.write_atomic(RESULTS, lambda file: file.write(text.encode()))
    print(f"{folder} done", flush=True)


def attempt(run):
    """Whether a run came to its end; if not it is said why, and the others go on."""
    try:
        work(run)
    except SystemExit as why:
        print(why, flush=True)
        return False
    return True


def numbers(folder):
    """{column of the table: number} of a run that was asked everything."""
    found = {}
    for flags, columns in PROBES.items():
        metrics = answer(folder, flags)
        for column, (feature, name) in columns.items():
            feature = feature or next(iter(metrics))
            found[column] = round(metrics[feature][name], 1)
    tokens = answer(folder, "knn")
    if tokens["cls"] == tokens["pat"]:                   # no class token: the mean stands in
        del found["kNN cls"]
    for name, (column, key, digits) in INSIDE.items():
        model, = json.loads((folder / "analysis" / f"{name}.json").read_text())["models"]
        found[column] = round(model["numbers"][key][-1], digits)
    return found


def about(folder):
    """How a run was made: from when it is, its steps, its precision."""
    settings = config.read_yaml(folder / "config.yaml")
    day = datetime.date.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return dict(day=str(day), torch=torch.__version__.split("+")[0], steps=last["step"],
                precision=distributed.pick_precision(settings["precision"], distributed.pick_device()))


def results():
    return config.read_yaml(RESULTS) if RESULTS.exists() else {}


def row(method, seeds):
    """Cells of a method: mean over seeds, and deviation if there are several."""
    cells = [method, str(len(seeds))]
    for column in COLUMNS:
        values = [seed[column] for seed in seeds if column in seed]
        digits = 2 if column == "NMI" else 1
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", default="toy", help="what is trained on: toy, toy-scenes [toy]")
    parser.add_argument("--out", default="out", help="folder of the runs [out]")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is known")
    args = parser.parse_args()
    done = []
    if not args.table:
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(attempt, runs(args)))
    known = results().get(args.data, {})
    print(f"| method | seeds | {' | '.join(COLUMNS)} |\n{'|---' * (2 + len(COLUMNS))}|")
    for method in args.methods:
        if seeds := [known[method][s] for s in args.seeds if s in known.get(method, {})]:
            print("| " + " | ".join(row(method, seeds)) + " |")
    if not all(done):
        sys.exit("not all runs came to their end: see above; the same command goes on")


if __name__ == "__main__":
    main()
