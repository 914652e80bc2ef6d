"""How much of the built-in data set do raw pixels know, and how much is learned in a few minutes,
with labels and without? Scores lib/toy.py: run it before and after a change of the images.

    python -m benchmarks.world                     # pixels only: half a minute on two CPU cores
    python -m benchmarks.world --minutes 2         # and 2 minutes of training of each of the four

Every row is judged alike: a classifier gets 20,000 labeled images and is tested on 2,000. kNN: 10
neighbors by cosine; linear: ridge regression in closed form. Chance is 6 %.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import mmc
from benchmarks import METHODS, supervised
from lib import checkpoints, config, datasets, metrics

ROOT = Path(__file__).parent.parent
TRAINED = ("mmc", "moco_v3", "mae")


def accuracy(predicted, images):
    return 100 * (predicted == images.labels).double().mean().item()


def score(x, train, q, test):
    """Features of training and test images -> accuracies in percent: {"kNN", "linear"}."""
    return {"kNN": accuracy(metrics.knn(x, train.labels, q, k=(10,))[10], test),
            "linear": accuracy(metrics.ridge(x, train.labels, q), test)}


def score_pixels(train, test):
    """{name: {"kNN", "linear"}} of raw pixels at 32 x 32, by several measures of similarity."""
    def shrink(images):
        return torch.cat([F.adaptive_avg_pool2d(x.float() / 255, 32).flatten(1)
                          for x in images.pixels.split(1000)])

    x, q = shrink(train), shrink(test)
    mean, gray = x.mean(0), x.mean()
    color, query_color = (z.unflatten(1, (3, -1)).mean(2) for z in (x, q))
    rows = {"pixels, cosine": score(x, train, q, test)}
    for name, a, b in (("pixels, cosine about mean gray", x - gray, q - gray),
                       ("pixels, cosine about the mean image", x - mean, q - mean)):
        rows[name] = {"kNN": accuracy(metrics.knn(a, train.labels, b, k=(10,))[10], test)}
    for name, a, b in (("pixels, Euclidean distance", x, q),
                       ("mean color, Euclidean distance", color, query_color)):
        nearest = torch.cat([torch.cdist(z, a).topk(10, largest=False)[1] for z in b.split(250)])
        rows[name] = {"kNN": accuracy(train.labels[nearest].mode(1)[0], test)}
    return rows


def score_encoder(encoder, size, train, test):
    """{"class token": {"kNN", "linear"}, "mean patch token": ...} of a frozen encoder."""
    features = []
    for images in (train, test):
        tokens = []
        with torch.no_grad():
            for x, _ in data.batches(images, size):
                cls, patches = encoder.split(encoder(x))
                tokens.append(torch.stack([cls, patches.mean(1)]))
        features.append(torch.cat(tokens, 1))
    return {name: score(x, train, q, test)
            for name, x, q in zip(("class token", "mean patch token"), *features)}


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
    size = config.parse(mmc.Config, []).img_size
    train, test = (datasets.load_images("toy", None, split, size) for split in ("train", "test"))

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
                for token, found in score_encoder(untrained, size, train, test).items():
                    print_row(f"untrained, {token}", found)
            for token, found in score_encoder(encoder.eval(), size, train, test).items():
                print_row(f"{METHODS[method]}, {token}", found, f"{seen:,}")


if __name__ == "__main__":
    main()
