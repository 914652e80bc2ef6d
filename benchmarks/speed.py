"""Images per second, model FLOPs utilization (MFU), memory and the rest of a step of every method,
with the default network of toy or the given flags, on random pixels that need no loading.

    python -m benchmarks.speed                                     # five minutes on two CPU cores
    python -m benchmarks.speed mae -- --img-size 224 --patch-size 16 --embed-dim 384 --depth 12 \\
        --num-heads 6 --batch-size 4             # what follows -- are flags of the method's script

Rest: the percentage of a step's time, with its input, that is neither matrix products (with
convolutions) nor attention (with every softmax, since on a CPU short sequences are attended with
separate operations), by torch.profiler in five steps after the others. The profiler itself adds
about a microsecond to every operation, which the rest includes.
"""
import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import METHODS, split_argv
from lib import config
from lib.run import Run

STEPS, PROFILED = 30, 5
# Operations that are matrix products or attention; also all whose names contain "attention".
PRODUCTS = {f"aten::{name}" for name in (
    "mm addmm bmm baddbmm _softmax _softmax_backward_data mkldnn_convolution cudnn_convolution "
    "_slow_conv2d_forward convolution_backward").split()}


def rest_fraction(events, seconds, device="cpu"):
    """Fraction of `seconds` that the operations of a profile (its key_averages()) spent neither in
    matrix products nor in attention, on a CPU or a GPU ("cuda")."""
    name = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    found = sum(getattr(e, name) for e in events                     # microseconds
                if e.key in PRODUCTS or e.key.startswith("aten::") and "attention" in e.key)
    return 1 - found / 1e6 / seconds


def profiled(steps, file):
    """Run.steps that profiles the steps after the first STEPS and writes their rest to a file."""
    def wrapped(self, loader):
        def now():
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        profiler = torch.profiler.profile()
        for step, batch in steps(self, loader):
            if step == STEPS:
                profiler.start()
                begin = now()
            if step == STEPS + PROFILED:
                seconds = now() - begin
                profiler.stop()
                rest = rest_fraction(profiler.key_averages(), seconds, self.device.type)
                file.write_text(str(rest))
            yield step, batch
    return wrapped


def run_method(method, argv, file):
    """METHOD.py with the flags argv and profiled steps, in a process of its own."""
    sys.argv, sys.stdout = [f"{method}.py", *argv], open(os.devnull, "w")
    Run.steps = profiled(Run.steps, file)
    config.main(importlib.import_module(method).main)


def measure_speed(method, flags):
    """-> (images/s, MFU, GiB) of the last ten of STEPS steps, rest of the step afterwards."""
    with tempfile.TemporaryDirectory() as out:
        argv = ["--data", "synthetic", "--evals", "0", "--save-every", "999", *flags,
                "--steps", str(STEPS + PROFILED + 1), "--log-every", "10", "--out", f"{out}/run"]
        file = Path(out) / "rest"
        process = multiprocessing.get_context("spawn").Process(
            target=run_method, args=(method, argv, file))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{method}.py failed: see above")
        lines = map(json.loads, (Path(out) / "run/metrics.jsonl").read_text().splitlines())
        line = next(line for line in lines if line["step"] == STEPS)
        return line["images_per_s"], line["mfu"], line["memory_gib"], float(file.read_text())


def main():
    argv, flags = split_argv(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    methods = parser.parse_args(argv).methods or list(METHODS)
    if unknown := set(methods) - set(METHODS):
        parser.error(f"no method {' '.join(sorted(unknown))}; choose from {' '.join(METHODS)}")
    print("| method | images/s | MFU | rest | memory |\n|---|---|---|---|---|")
    for method in methods:
        speed, mfu, memory, rest = measure_speed(method, flags)
        print(f"| {METHODS[method]} | {speed:.0f} | {100 * mfu:.0f}% | {100 * rest:.0f}% | "
              f"{memory:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
