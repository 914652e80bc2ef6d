"""How much faster is a step of mmc.py with its input than a plain implementation? The plain one:
fp32, attention written out, every view of every image transformed by torchvision, one by one.

    python -m benchmarks.throughput            # a minute on two CPU cores; takes mmc.py's flags
"""
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import data
import mmc
from lib import augment


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    scores = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v


def torchvision_transform(view):
    steps = [
        v2.RandomResizedCrop(view.size, view.scale, view.ratio, interpolation=3),
        v2.RandomHorizontalFlip(view.flip),
        v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_p),
        v2.RandomGrayscale(view.gray_p),
        v2.RandomApply([v2.GaussianBlur(9, view.blur_sigma)], view.blur_p),
        v2.RandomSolarize(0.5, view.solarize_p),
    ]
    normalize = v2.Normalize(augment.MEAN, augment.STD)
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), *steps, normalize])


class PlainLoader(data.Loader):
    def __init__(self, images, views, *rest):
        super().__init__(images, [data.View(1)], *rest)
        self.transforms = [torchvision_transform(v) for v in views for _ in range(v.copies)]

    def batches(self, start=0):
        for batch in super().batches(start):
            pixels = self.images.pixels[batch.index]
            batch.views = [torch.stack([transform(x) for x in pixels])
                           for transform in self.transforms]
            yield batch


def measure_speed(*flags):
    """Images/s of the last ten of thirty steps of mmc.py."""
    with tempfile.TemporaryDirectory() as out:
        sys.argv = ["mmc.py", "--steps", "30", "--log-every", "10", "--evals", "0", "--out", out]
        sys.argv += flags
        mmc.main()
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["images_per_s"]


def main():
    flags = sys.argv[1:]
    if {"-h", "--help"} & set(flags):
        print(__doc__)
        return
    ours = measure_speed(*flags)
    data.Loader, F.scaled_dot_product_attention = PlainLoader, plain_attention
    plain = measure_speed("--precision", "fp32", *flags)
    print(f"{ours:.0f} images/s; plain implementation {plain:.0f} images/s; "
          f"ratio {ours / plain:.1f}")


if __name__ == "__main__":
    main()
