"""Small models, options and pieces of real data sets for the tests of probes."""
import os
import tarfile
from dataclasses import replace

import pytest
import torch

import vit
from lib import augment, flags
from probes.common import NO_SOURCE, Model, Options

REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")


def make_encoder(scramble=0.0, **config):
    """A ViT with seed 0. scramble: standard deviation of noise on all its parameters, as if it were
    trained, so that none is 0 or 1."""
    torch.manual_seed(0)
    net = vit.ViT(**{**dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2),
                     **config}).eval()
    for p in net.parameters() if scramble else []:
        p.data += scramble * torch.randn_like(p)
    return net


def make_model(encoder, **changes):
    return Model(**dict(name="small", encoder=encoder, img_size=32, mean=augment.MEAN,
                        std=augment.STD, interpolation="bicubic", source=NO_SOURCE,
                        device=torch.device("cpu"), precision="fp32") | changes)


def make_options(task, *argv, data="toy"):
    """The Options of one task, as its function receives them; `data` unless there is --data."""
    opt = flags.parse_flags(Options, ["--task", task, "--device", "cpu", "--precision", "fp32",
                                      "--workers", "0", *argv])
    return replace(opt, task=task, data=opt.data or data)


def unpack_real(name, folder):
    """The folder with a piece of the real data set. Skips the test where it is missing."""
    path = os.path.join(REAL, f"{name}.tar")
    if not os.path.exists(path):
        pytest.skip(f"no piece of {name} here")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder


def record_adamw(monkeypatch):
    """A list to which every step of AdamW appends, for each group: lr, weight decay, betas."""
    steps = []

    class AdamW(torch.optim.AdamW):
        def step(self):
            steps.append([(group["lr"], group["weight_decay"], group["betas"])
                          for group in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    return steps
