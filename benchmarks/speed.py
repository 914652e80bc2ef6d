"""Images a second, share of the arithmetic that the device can do, and memory of every method: its
default network (toy), or what the flags say, on noise that costs nothing to load.

    python -m benchmarks.speed                                     # five minutes on two CPU cores
    python -m benchmarks.speed mae -- --img-size 224 --patch-size 16 --embed-dim 384 --depth 12 \\
        --num-heads 6 --batch-size 4                          # what follows -- goes to the scripts
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHODS = "mae asl simmim beit cae moco_v3 dino ibot selfpatch hybrid mmc".split()


def measure(method, flags):
    """-> (images/s, MFU, GiB) of the last of three stretches of ten steps."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / f"{method}.py", "--data", "synthetic", "--steps", "30",
                   "--log-every", "10", "--evals", "0", "--save-every", "999", "--out", out, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        line = json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[-1])
    return line["images_per_s"], line["mfu"], line["memory_gib"]


def main():
    named, _, flags = " ".join(sys.argv[1:]).partition("-- ")
    if unknown := set(named.split()) - set(METHODS):
        sys.exit(f"no method {' '.join(unknown)}: choose {' '.join(METHODS)}")
    print("| method | images/s | MFU | memory |\n|---|---|---|---|")
    for method in named.split() or METHODS:
        speed, mfu, memory = measure(method, flags.split())
        print(f"| {method} | {speed:.0f} | {100 * mfu:.0f} % | {memory:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
