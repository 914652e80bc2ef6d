"""Accuracies of raw pixels on the built-in data set, and of networks after a few minutes of
training, with labels and without: run it before and after a change of lib/toy.py.

    python -m benchmarks.world                     # pixels only
    python -m benchmarks.world --minutes 2         # and 2 minutes of training of each of the four

The same protocol for all rows: 20,000 labeled images, 2,000 test images. kNN: 10 neighbors by
cosine; linear: ridge regression in closed form. Chance level: 6 %.
"""
import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import mmc
from benchmarks import METHODS, supervised
from lib import checkpoints, config, datasets, metrics, visualize

ROOT = Path(__file__).parent.parent
TRAINED = ("mmc", "moco_v3", "mae")


def accuracy(predicted, images):
    return 100 * (predicted == images.labels).double().mean().item()


def score_pixels(train, test):
    """{name: {"kNN", "linear"}} of raw pixels at 32 x 32, by several measures of similarity."""
    def shrink(images):
        return torch.cat([F.adaptive_avg_pool2d(x.float() / 255, 32).flatten(1)
                          for x in images.pixels.split(1000)])

    x, q = shrink(train), shrink(test)
    mean, gray = x.mean(0), x.mean()
    color, query_color = (z.unflatten(1, (3, -1)).mean(2) for z in (x, q))
    rows = {}
    for name, a, b in (("pixels, cosine", x, q),
                       ("pixels, cosine about mean gray", x - gray, q - gray),
                       ("pixels, cosine about the mean image", x - mean, q - mean)):
        rows[name] = {"kNN": accuracy(metrics.knn(a, train.labels, b, k=(10,))[10], test)}
    rows["pixels, cosine"]["linear"] = accuracy(metrics.ridge(x, train.labels, q), test)
    for name, a, b in (("pixels, Euclidean distance", x, q),
                       ("mean color, Euclidean distance", color, query_color)):
        nearest = torch.cat([torch.cdist(z, a).topk(10, largest=False)[1] for z in b.split(250)])
        rows[name] = {"kNN": accuracy(train.labels[nearest].mode(1)[0], test)}
    return rows


def score_encoder(encoder, cfg, train, test):
    """{"class token": {"kNN", "linear"}, "mean patch token": ...} of a frozen encoder."""
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), autocast=contextlib.nullcontext)
    with torch.no_grad():
        found = visualize.accuracies(*(visualize.embed(run, encoder, images)
                                       for images in (train, test)))
    return {"class token": {"kNN": found["knn"], "linear": found["linear"]},
            "mean patch token": {"kNN": found["knn_patch"], "linear": found["linear_patch"]}}


def pretrain(method, minutes, out):
    """Pretrains with `method` for about `minutes`, of which the speed of 40 steps is measured."""
    def run(steps, *flags):
        command = [sys.executable, ROOT / f"{method}.py", "--out", out, "--steps", str(steps),
                   "--save-every", "999", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[-1])

    batch_size = config.read_yaml(ROOT / "configs" / f"{method}.yaml")["toy"]["batch_size"]
    speed = run(40, "--evals", "0", "--log-every", "20")["images_per_s"]     # of the last 20
    steps = round(60 * minutes * speed / batch_size)
    run(steps, "--evals", "1")
    return steps * batch_size


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0,
                        help="minutes of training of each network; 0: none [%(default)s]")
    minutes = parser.parse_args().minutes
    cfg = config.parse(mmc.Config, [])                   # its section toy
    train, test = (datasets.load_images("toy", None, split, cfg.img_size)
                   for split in ("train", "test"))

    print("| | images seen | kNN | linear |\n|---|---|---|---|")

    def print_row(name, found, seen="-"):
        cells = (f"{found[key]:.1f}" if key in found else "-" for key in ("kNN", "linear"))
        print(f"| {name} | {seen} | {' | '.join(cells)} |", flush=True)

    for name, found in score_pixels(train, test).items():
        print_row(name, found)
    with tempfile.TemporaryDirectory() as folder:
        if minutes:
            _, seconds = supervised.train(40, 0, folder)
            steps = round(60 * minutes / seconds * 40)
            top1, _ = supervised.train(steps, 0, folder)
            print_row("supervised, its own head", {"linear": top1}, f"{64 * steps:,}")
        for method in TRAINED if minutes else ():
            out = Path(folder) / method
            seen = pretrain(method, minutes, out)
            encoder = checkpoints.load_encoder(out / "encoder.pt", quiet=True)
            if method == TRAINED[0]:
                untrained = type(encoder)(**encoder.config).eval()
                for token, found in score_encoder(untrained, cfg, train, test).items():
                    print_row(f"untrained, {token}", found)
            for token, found in score_encoder(encoder.eval(), cfg, train, test).items():
                print_row(f"{METHODS[method]}, {token}", found, f"{seen:,}")


if __name__ == "__main__":
    main()
