"""Evaluation during a run: kNN accuracy, statistics of assignments, images."""
import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from lib import augment, datasets, distributed, visualize
from lib.run import Run


class Lookup(nn.Module):
    """The brightness of an image is its row in two tables, of class tokens and of patches."""

    def __init__(self, cls, patches):
        super().__init__()
        self.cls, self.patches = cls, patches

    def forward(self, x):
        assert not self.training                                             # no drop path
        return augment.denormalize(x)[:, 0, 0, 0].long()

    def split(self, number):
        return self.cls[number], self.patches[number]


def test_knn_needs_two_splits_of_the_same_classes(monkeypatch):
    """Ten class tokens vote: the nearest alone is wrong. Patches of queries: the other class."""
    cfg = SimpleNamespace(workers=0, img_size=16)
    run = SimpleNamespace(device=torch.device("cpu"), cfg=cfg, autocast=contextlib.nullcontext)
    run.paused, run.evaluation = contextlib.nullcontext, lambda net: Run.evaluation(run, net)
    looks = torch.tensor([0] * 6 + [1] * 6 + [0, 0, 1, 1])                    # the last 4: queries
    labels = looks.clone()
    labels[0], cls = 1, 3 * F.one_hot(looks, 4).float()
    cls[1:6, 2] = 0.3                           # a little apart from image 0 and from the queries
    patches = F.one_hot(torch.cat([looks[:12], 1 - looks[12:]]), 4)[:, None].expand(-1, 2, -1)
    net = Lookup(cls, patches)
    pixels = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 3, 16, 16)
    bank = datasets.Images("x", "train", ["a", "b"], labels[:12], pixels[:12])
    tests = replace(bank, split="test", labels=labels[12:], pixels=pixels[12:])
    found = visualize.knn(run, net, bank, tests)
    assert (found["knn"], found["knn_patch"]) == (100, 0)
    unit = cls[:12] / cls[:12].square().sum(1, keepdim=True).sqrt()
    variance = (unit - unit.mean(0)).square().sum(0) / 11
    assert found["feat_std"].item() == pytest.approx(2 * variance.sqrt().mean().item())   # sqrt(D)
    for known, queries in ((bank, bank), (replace(bank, labels=None, classes=None), tests),
                         (bank, replace(tests, labels=None)),  # a flat val/
                         (bank, replace(tests, classes=["a", "c"]))):
        assert set(visualize.knn(run, net, known, queries)) == {"feat_std"}
    assert set(visualize.knn(run, net, replace(bank, labels=None, pixels=pixels[:1]),
                             tests)) == set()              # one image has no standard deviation
    assert net.training
    monkeypatch.setattr(distributed, "all_mean", lambda x: x / 2)       # another process could not
    assert visualize.knn(run, net, bank, tests) == {}


def test_knn_keeps_labels_and_images_together_if_a_file_is_unreadable(tmp_path, monkeypatch):
    """The color of an image is its class; without its label an image would shift the others'."""
    cfg = SimpleNamespace(workers=0, img_size=16)
    run = SimpleNamespace(device=torch.device("cpu"), cfg=cfg, autocast=contextlib.nullcontext)
    run.paused, run.evaluation = contextlib.nullcontext, lambda net: Run.evaluation(run, net)
    net = Lookup(torch.eye(2), torch.eye(2)[:, None])
    labels = torch.tensor([0, 1] * 6)
    paths = []
    for i, label in enumerate(labels.tolist()):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (16, 16), (label,) * 3).save(paths[-1])
    for i in (2, 9):                                       # one of the bank, one query
        open(paths[i], "w").close()
    bank = datasets.Images("x", "train", ["a", "b"], labels[:8], paths=paths[:8])
    tests = replace(bank, split="test", labels=labels[8:], paths=paths[8:])
    found = visualize.knn(run, net, bank, tests, k=1)
    assert (found["knn"], found["knn_patch"]) == (100, 100)


@pytest.mark.parametrize("P, entropy, mi", [
    (torch.full((3, 4), 0.25), math.log(4), 0.0),                            # uniform
    (torch.eye(4)[[2, 2, 2]], 0.0, 0.0),                                     # one for all
    (torch.eye(4), 0.0, math.log(4))])                                       # one each
def test_assignment_stats_against_closed_forms(P, entropy, mi):
    stats = visualize.AssignmentStats()
    for part in P.split(2):
        stats.add(part)
    found = stats.compute()
    assert found[0].item() == pytest.approx(entropy, abs=1e-6)
    assert found[1].item() == pytest.approx(mi, abs=1e-6)


@pytest.mark.parametrize("entropy, mi, sentence", [
    (4.0, 0.01, "uniform"), (0.5, 0.01, "one-hot"), (4.0, 0.2, None)])
def test_equal_assignments_give_a_warning_with_the_cure(entropy, mi, sentence):
    lines = []
    run = SimpleNamespace(print0=lines.append)
    visualize.warn_of_equal_assignments(run, "images", torch.tensor(entropy), torch.tensor(mi), 64)
    assert len(lines) == (sentence is not None) and (not lines or sentence in lines[0])
