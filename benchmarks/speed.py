"""Images per second, model FLOPs utilization (MFU) and memory of every method, with the default
network of toy or the given flags, on random pixels that need no loading.

    python -m benchmarks.speed                                     # five minutes on two CPU cores
    python -m benchmarks.speed mae -- --img-size 224 --patch-size 16 --embed-dim 384 --depth 12 \\
        --num-heads 6 --batch-size 4             # what follows -- are flags of the method's script
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import METHODS

ROOT = Path(__file__).parent.parent


def measure_speed(method, flags):
    """-> (images/s, MFU, GiB) of the last ten of thirty steps."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / f"{method}.py", "--data", "synthetic", "--steps", "30",
                   "--log-every", "10", "--evals", "0", "--save-every", "999", "--out", out, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        line = json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[-1])
    return line["images_per_s"], line["mfu"], line["memory_gib"]


def main():
    argv, flags = sys.argv[1:], []
    if "--" in argv:
        argv, flags = argv[:argv.index("--")], argv[argv.index("--") + 1:]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    methods = parser.parse_args(argv).methods or list(METHODS)
    if unknown := set(methods) - set(METHODS):
        parser.error(f"no method {' '.join(sorted(unknown))}; choose from {' '.join(METHODS)}")
    print("| method | images/s | MFU | memory |\n|---|---|---|---|")
    for method in methods:
        speed, mfu, memory = measure_speed(method, flags)
        print(f"| {METHODS[method]} | {speed:.0f} | {100 * mfu:.0f}% | {memory:.1f} GiB |",
              flush=True)


if __name__ == "__main__":
    main()
