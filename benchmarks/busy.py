"""Speed beside other processes that compute, on a CPU: with the default number of threads (see
distributed.choose_threads), with one and with as many as there are cores.

    python -m benchmarks.busy                 # idle, then beside 1 and 2 processes; ten minutes
    python -m benchmarks.busy --beside 0 1 --steps 50

Prints a table: images/s of drawing the built-in data set, and of training MAE on it. The machine
must be idle otherwise.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUSY = "import torch\nx = torch.ones(512, 512)\ntorch.set_num_threads(1)\nwhile True: x @ x"
DRAW = """import time
from lib import datasets, distributed
distributed.choose_threads(distributed.pick_device("cpu"))
begin = time.perf_counter()
images = datasets.load_images("toy", limit=5000)
print(len(images) / (time.perf_counter() - begin))"""


def drawing_speed(env, _):
    """Images/s of drawing 5,000 images."""
    done = subprocess.run([sys.executable, "-c", DRAW], cwd=ROOT, env=env, check=True,
                          stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def training_speed(env, steps):
    """Images/s of MAE, of the last of `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "mae.py", "--steps", str(steps), "--evals", "0",
                        "--device", "cpu", "--log-every", str(max(1, steps // 2)), "--out",
                        folder], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["images_per_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1, 2],
                        help="numbers of computing processes (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: 40)")
    opt = parser.parse_args()
    cores = str(os.cpu_count())
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    settings = {"default": env, "1 thread": env | {"OMP_NUM_THREADS": "1"},
                f"{cores} threads": env | {"OMP_NUM_THREADS": cores}}
    print("images/s".ljust(24) + "".join(f"{name:>12}" for name in settings), flush=True)
    for number in opt.beside:
        beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
        try:
            time.sleep(10 if beside else 0)              # until they have imported torch
            for name, measure in (("drawing", drawing_speed), ("training", training_speed)):
                row = "".join(f"{measure(e, opt.steps):12,.0f}" for e in settings.values())
                print(f"{name}, beside {number}".ljust(24) + row, flush=True)
        finally:
            for process in beside:
                process.kill()


if __name__ == "__main__":
    main()
