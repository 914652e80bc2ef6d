"""The table of results in README, made anew: every method trained on toy with several seeds, every
model asked by the same probes, mean and deviation over seeds.

    python tests/results.py                          # all of it: hours on two CPU cores
    python tests/results.py --methods mae mmc --seeds 0
    python tests/results.py --data toy-scenes        # trained on scenes; asked on toy as ever
    python tests/results.py --table                  # of what is there already

What is done is not done again: a run that was stopped goes on, and a probe whose line stands in the
run's results.jsonl is not repeated. Two models are worked on at a time, each with one thread:
together they are faster than one with two.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHODS = "mae asl simmim beit cae moco_v3 dino ibot selfpatch hybrid mmc".split()
PROBES = {        # flags of evaluate.py: column of the table: feature (else the first), number
    "knn": {"kNN cls": ("cls", "k=10"), "kNN pat": ("pat", "k=10")},
    "linear": {"linear": ("cls", "top-1")},
    "part_retrieval": {"parts": ("cls", "AP")},
    "linear_segmentation --level object": {"seg. object": (None, "mIoU")},
    "linear_segmentation --level part": {"seg. part": (None, "mIoU")},
    "zero_shot_segmentation": {"prompted": (None, "Opt")},
    "video": {"video": (None, "J&F")}}
INSIDE = {"attention_distance": ("distance", "pixels", 0), "nmi": ("NMI", "nmi", 2)}   # last block


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
    """Train, unless that is done; ask what was not asked yet."""
    method, trained_on, seed, folder = run
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "results.log"
    call(log, f"{method}.py", "--data", trained_on, "--seed", str(seed), "--out", str(folder),
         *["--resume"] * (folder / "last.pt").is_file())
    for flags in PROBES:
        if answer(folder, flags) is None:
            call(log, "evaluate.py", "--task", *flags.split(), "--data", "toy", "--checkpoint",
                 str(folder))
    if not all((folder / "analysis" / f"{name}.json").is_file() for name in INSIDE):
        call(log, "analysis.py", "--what", *INSIDE, "--checkpoint", str(folder), "--data", "toy",
             "--out", str(folder))
    print(f"{folder} done", flush=True)


def cell(values, digits=1):
    """Mean over seeds, and deviation if there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""


def row(method, folders):
    cells = [method, str(len(folders))]
    for flags, columns in PROBES.items():
        found = [metrics for folder in folders if (metrics := answer(folder, flags))]
        cells += [cell([metrics.get(feature, next(iter(metrics.values())))[name]
                        for metrics in found]) for feature, name in columns.values()]
    for name, (_, key, digits) in INSIDE.items():
        files = [file for f in folders if (file := f / "analysis" / f"{name}.json").is_file()]
        cells.append(cell([json.loads(file.read_text())["models"][0]["numbers"][key][-1]
                           for file in files], digits))
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", default="toy", help="what is trained on: toy, toy-scenes [toy]")
    parser.add_argument("--out", default="out", help="folder of the runs [out]")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    args = parser.parse_args()
    if not args.table:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, runs(args)))
    heads = ["method", "seeds", *(name for columns in PROBES.values() for name in columns),
             *(name for name, _, _ in INSIDE.values())]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for method in args.methods:
        folders = [folder for m, *_, folder in runs(args)
                   if m == method and (folder / "metrics.jsonl").is_file()]
        if folders:
            print("| " + " | ".join(row(method, folders)) + " |")


if __name__ == "__main__":
    main()
