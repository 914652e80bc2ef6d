"""The tables of results in docs/results.md: train every method with several seeds, evaluate every
model with the same probes, print the mean and standard deviation over the seeds. For comparison:
the same network trained with labels and untrained, and raw pixels.

    python -m benchmarks.results --table                  # print the table of results.yaml
    python -m benchmarks.results                          # train and evaluate: hours on 2 CPU cores
    python -m benchmarks.results --methods mae mmc --seeds 0
    python -m benchmarks.results --methods mmc_rec mmc_cls mmc_cls_rec mmc_cls_patch mmc  # ablation
    python -m benchmarks.results --data toy-scenes        # train on toy-scenes, evaluate on toy
    python -m benchmarks.results --data cifar10 --data-root FOLDER --methods mae -- --epochs 30
                                                          # what follows -- are flags of mae.py

Finished work is not repeated: a stopped run is resumed, and a probe that has a line with the same
settings in the run's results.jsonl is skipped. The numbers of a finished run are kept in
benchmarks/results.yaml, so that seeds can be added on another day or machine. Two models are
processed at a time with one thread each, which is faster than one model with two threads.
"""
import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

import evaluate
from benchmarks import METHODS, split_argv
from lib import checkpoints, config
from probes.common import WITHOUT_EFFECT, complete_settings

ROOT = Path(__file__).parent.parent
VARIANTS = {"selfpatch_moby": "SelfPatch on MoBY"}
BASELINES = {"supervised": "supervised", "untrained": "untrained (MMC's)", "pixels": "raw pixels"}
ROWS = METHODS | VARIANTS | BASELINES
ABLATIONS = {"mmc_rec": "L_rec", "mmc_cls": "L_cls", "mmc_cls_rec": "L_cls + L_rec",
             "mmc_cls_patch": "L_cls + L_patch"}          # MMC, Table 4
SCRIPTS = {
    "selfpatch_moby": ["selfpatch.py", "--base", "moby"],
    "mmc_rec": ["mmc.py", "--lambda-cls", "0", "--lambda-patch", "0"],
    "mmc_cls": ["mmc.py", "--lambda-rec", "0", "--lambda-patch", "0"],
    "mmc_cls_rec": ["mmc.py", "--lambda-patch", "0"],
    "mmc_cls_patch": ["mmc.py", "--lambda-rec", "0"],
    "supervised": ["-m", "benchmarks.supervised"],
    "untrained": ["mmc.py"]}
# flags of evaluate.py: {column of the table: (feature, None: the first; metric)}
CLASSIFICATION = {
    "knn": {"kNN, class token": ("cls", "k=10"), "kNN, mean patch token": ("patch", "k=10")},
    "linear": {"linear probe": (None, "top-1")},
    "linear --feature patch": {"linear probe, mean patch token": (None, "top-1")}}
PROBES = {"cifar10": CLASSIFICATION, "toy": CLASSIFICATION | {
    "finetune --recipe light --epochs 10 --limit 2000": {
        "fine-tuned, 2,000 labels": (None, "last epoch")},
    "part_retrieval": {"part retrieval AP": (None, "AP")},
    "linear_segmentation --level object": {"linear segmentation mIoU, objects": (None, "mIoU")},
    "linear_segmentation --level part": {"linear segmentation mIoU, parts": (None, "mIoU")},
    "zero_shot_segmentation": {"zero-shot segmentation IoU": (None, "Opt")},
    "video": {"video J&F": (None, "J&F")}}}
PIXEL_PROBES = ("knn", "linear", "part_retrieval")        # those that need no patch tokens
DIAGNOSTICS = {   # of analysis.py, in the last block: (column of the table, key, decimals)
    "attention_distance": ("attention distance", "pixels", 1),
    "nmi": ("NMI", "nmi", 2)}
COLUMNS = [*(name for columns in PROBES["toy"].values() for name in columns),
           *(name for name, *_ in DIAGNOSTICS.values())]
RESULTS, LOCK = Path(__file__).with_suffix(".yaml"), threading.Lock()
HEADER = """\
# Written by benchmarks/results.py: training data set, method, seed. The kNN probe compares with all
# training images. Units: percent; attention distance: pixels; NMI: 0 to 1.
"""


def list_runs(args):
    for seed in args.seeds:
        for method in args.methods:
            if method in BASELINES and args.data == "toy-scenes" or method == "pixels" and seed:
                continue                                # baselines: once, pixels without a seed
            name = f"{method}-{args.data}{f'-seed{seed}' * (seed > 0)}"
            yield args, method, seed, (Path(args.out) / name).absolute()


def train_command(args, method, seed, folder):
    """The command that trains a run; --resume if it was stopped."""
    flags = ["--steps", "1", "--lr", "0", "--evals", "0"] if method == "untrained" else args.flags
    return [*SCRIPTS.get(method, [f"{method}.py"]), "--data", args.data, *data_root(args), "--seed",
            str(seed), "--out", str(folder), *flags,
            *["--resume"] * (folder / "last.pt").is_file()]


def data_root(args):
    return ["--data-root", args.data_root] if args.data_root else []


def evaluated_data(trained_on):
    """The data set of the probes; toy-scenes has no classes of images."""
    return "toy" if trained_on == "toy-scenes" else trained_on


def run_script(log, *command):
    """Runs a script with one thread and appends its output to `log`. SystemExit if it fails."""
    with open(log, "a") as file:
        process = subprocess.run([sys.executable, *command], stdout=file, stderr=file, cwd=ROOT,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see the end of {log}")


def read_metrics(folder, data, probe):
    """The newest result of a probe: {feature: {metric: value}}, None if there is none. Lines of
    other settings, or of an earlier checkpoint of the run, do not count."""
    pixels, file = is_pixels(folder), folder / "results.jsonl"
    opt = evaluate.parse(["--task", *probe.split(), *pixel_size(data) * pixels])
    wanted = {name: value for name, value in json.loads(json.dumps(vars(opt))).items()
              if name not in WITHOUT_EFFECT}
    step = None if pixels else last_line(folder)["step"]
    for line in reversed(file.read_text().splitlines() if file.is_file() else []):
        line = json.loads(line)
        if (line["task"], line["data"], line["step"], not line["checkpoint"]) == (
                *opt.task, data, step, pixels) and (
                wanted.items() <= complete_settings(line["settings"]).items()):
            return line["metrics"]


def last_line(folder):
    """The last line of a run's log."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def pixel_size(data):
    """The flag with the side of the images, which no checkpoint gives for raw pixels."""
    return ["--img-size", "32" if data == "cifar10" else "48"]


def is_pixels(folder):
    return folder.name.startswith("pixels-")


def train_and_evaluate(run):
    """Trains the run and runs its probes, unless that is done already; writes results.yaml."""
    args, method, seed, folder = run
    folder.mkdir(parents=True, exist_ok=True)
    log, pixels, data = folder / "results.log", method == "pixels", evaluated_data(args.data)
    print(f"{folder}: the output is in {log.name}", flush=True)
    if not pixels and not (log.exists() and "\ndone after " in log.read_text()):
        run_script(log, *train_command(args, method, seed, folder))
        if "\ndone after " not in log.read_text():
            raise SystemExit(f"{folder} was stopped; run the same command again to resume")
    flags = ["--data", data, *data_root(args), *(
        ["--baseline", "pixels", *pixel_size(data), "--json", str(folder / "results.jsonl")]
        if pixels else ["--checkpoint", str(folder)])]
    for probe in list_probes(data, pixels):
        if read_metrics(folder, data, probe) is None:
            run_script(log, "evaluate.py", "--task", *probe.split(), *flags)
    if not pixels and not all(
            (folder / "analysis" / f"{name}.json").is_file() for name in DIAGNOSTICS):
        run_script(log, "analysis.py", "--what", *DIAGNOSTICS, *flags, "--out", str(folder))
    with LOCK:
        results = read_results()
        seeds = results.setdefault(args.data, {}).setdefault(method, {})
        seeds[seed] = ({} if pixels else describe_run(folder)) | collect_numbers(folder, data)
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


def list_probes(data, pixels):
    return [p for p in PROBES[data] if not pixels or p in PIXEL_PROBES]


def collect_numbers(folder, data):
    """{column of the table: number} of a run with all probes done."""
    numbers, pixels = {}, is_pixels(folder)
    for probe in list_probes(data, pixels):
        metrics = read_metrics(folder, data, probe)
        for column, (feature, name) in PROBES[data][probe].items():
            feature = feature if feature in metrics else next(iter(metrics))
            numbers[column] = round(metrics[feature][name], 1)
    if pixels:                                           # one feature, no attention
        del numbers["kNN, mean patch token"]
        return numbers
    knn = read_metrics(folder, data, "knn")
    if knn["cls"] == knn["patch"]:        # no class token: evaluate.py used the mean patch token
        del numbers["kNN, class token"]
    for name, (column, key, decimals) in DIAGNOSTICS.items():
        model, = json.loads((folder / "analysis" / f"{name}.json").read_text())["models"]
        numbers[column] = round(model["numbers"][key][-1], decimals)
    return numbers


def describe_run(folder):
    """Date, torch version, steps and precision of a run."""
    started = re.search(r"(bf16|fp32) on \d+ x .*, torch ([\d.]+)",
                        (folder / "results.log").read_text())
    day = datetime.date.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime)
    return dict(day=day, torch=started[2], steps=last_line(folder)["step"], precision=started[1])


def read_results():
    return config.read_yaml(RESULTS) if RESULTS.exists() else {}


def format_row(name, seeds, columns):
    """Cells of a row: mean over the seeds, and the standard deviation of two or more seeds. "-":
    the column does not apply (no class token)."""
    cells = [name, str(len(seeds))]
    for column in columns:
        values = [seed[column] for seed in seeds if column in seed]
        decimals = 2 if column == "NMI" else 1
        std = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{decimals}f}{std}" if values else "-")
    return cells


def print_table(methods, seeds, results):
    """A row for each method with results, a column for each number that any of them has."""
    rows = {m: [results[m][seed] for seed in seeds if seed in results.get(m, {})] for m in methods}
    columns = [c for c in COLUMNS if any(c in result for row in rows.values() for result in row)]
    print(f"| method | seeds | {' | '.join(columns)} |\n{'|---' * (2 + len(columns))}|")
    for method, row in rows.items():
        if row:
            print("| " + " | ".join(format_row((ROWS | ABLATIONS)[method], row, columns)) + " |")


def main():
    argv, flags = split_argv(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=ROWS | ABLATIONS,
                        help="rows of the table [all but the ablations mmc_*]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", default="toy", choices=("toy", "toy-scenes", "cifar10"),
                        help="training data [%(default)s]")
    parser.add_argument("--data-root", help="folder of the data set")
    parser.add_argument("--out", default="out", help="folder of the runs [out]")
    parser.add_argument("--table", action="store_true", help="only print the table of results.yaml")
    args = parser.parse_args(argv)
    args.flags = flags                                   # of the methods' scripts
    done = []
    if not args.table:
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(try_run, list_runs(args)))
    print_table(args.methods, args.seeds, read_results().get(args.data, {}))
    if not all(done):
        sys.exit("some runs are not finished (see above); run the same command again to continue")


if __name__ == "__main__":
    main()
