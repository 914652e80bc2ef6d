"""Evaluation during a run: kNN accuracy, statistics of assignments, images."""
import contextlib
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import vit
from lib import augment, datasets, distributed, metrics, visualize
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


def small_run(step, printed):
    """What visualize.evaluate needs of a run of 20 steps with 2 evaluations."""
    run = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext, step=step,
                          total=20, cfg=SimpleNamespace(workers=0, img_size=16, evals=2),
                          print0=printed.append)
    run.paused, run.evaluation = contextlib.nullcontext, lambda net: Run.evaluation(run, net)
    run._check_finite = lambda: None
    return run


def test_knn_needs_two_splits_of_the_same_classes(monkeypatch):
    """Ten class tokens vote: the nearest alone is wrong. Patches of queries: the other class."""
    run = small_run(19, printed := [])
    looks = torch.tensor([0] * 6 + [1] * 6 + [0, 0, 1, 1])                    # the last 4: queries
    labels = looks.clone()
    labels[0], cls = 1, 3 * F.one_hot(looks, 4).float()
    cls[1:6, 2] = 0.3                           # a little apart from image 0 and from the queries
    patches = F.one_hot(torch.cat([looks[:12], 1 - looks[12:]]), 4)[:, None].expand(-1, 2, -1)
    net = Lookup(cls, patches)
    pixels = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 3, 16, 16)
    bank = datasets.Images("x", "train", ["a", "b"], labels[:12], pixels[:12])
    tests = replace(bank, split="test", labels=labels[12:], pixels=pixels[12:])
    found = visualize.evaluate(run, net, bank, tests)
    assert (found["knn"], found["knn_patch"]) == (100, 0)
    linear = metrics.ridge(cls[:12], labels[:12], cls[12:]) == labels[12:]
    assert found["linear"] == 100 * linear.float().mean() and found["linear_patch"] == 0
    unit = cls[:12] / cls[:12].square().sum(1, keepdim=True).sqrt()
    variance = (unit - unit.mean(0)).square().sum(0) / 11
    assert found["feat_std"].item() == pytest.approx(2 * variance.sqrt().mean().item())   # sqrt(D)
    for known, queries in ((bank, bank), (replace(bank, labels=None, classes=None), tests),
                         (bank, replace(tests, labels=None)),  # a flat val/
                         (bank, replace(tests, classes=["a", "c"]))):
        assert set(visualize.evaluate(run, net, known, queries)) == {"feat_std"}
    assert set(visualize.evaluate(run, net, replace(bank, labels=None, pixels=pixels[:1]),
                             tests)) == set()              # one image has no standard deviation
    assert net.training
    monkeypatch.setattr(distributed, "all_mean", lambda x: x / 2)       # another process could not
    assert visualize.evaluate(run, net, bank, tests) == {}
    assert not printed                                                  # the second evaluation


def test_the_first_evaluation_also_classifies_pixels_and_an_untrained_network():
    """Class 1 is a little brighter, and its position differs from image to image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 2
    pixels = torch.full((48, 3, 16, 16), 100, dtype=torch.uint8)
    for i in labels.nonzero()[:, 0].tolist():
        top, left = torch.randint(0, 12, (2,), generator=generator).tolist()
        pixels[i, :, top:top + 4, left:left + 4] += 80
    bank = datasets.Images("x", "train", ["a", "b"], labels[:36], pixels[:36])
    tests = replace(bank, split="test", labels=labels[36:], pixels=pixels[36:])
    net = vit.ViT(16, 8, 32, 1, 2)
    lines = {}
    for step in (9, 19):                                    # both evaluations of the run
        run = small_run(step, lines.setdefault(step, []))
        found = visualize.evaluate(run, net, bank, tests)
        assert set(found) == {"knn", "linear", "knn_patch", "linear_patch", "feat_std"}
    assert not lines[19]
    (raw, untrained), weights = lines[9], copy.deepcopy(net.state_dict())
    assert raw.startswith("for comparison, raw pixels: knn ") and "_patch" not in raw
    assert untrained.startswith("for comparison, an untrained network: knn ")
    x, q = (augment.normalize(z.float() / 255).flatten(1) for z in (bank.pixels, tests.pixels))
    for name, predicted in (("knn", metrics.knn(x, bank.labels, q, k=(10,))[10]),
                            ("linear", metrics.ridge(x, bank.labels, q))):
        accuracy = 100 * (predicted == tests.labels).float().mean()
        assert f"{name} {accuracy:.1f}%" in raw
    assert all(torch.equal(x, weights[name]) for name, x in net.state_dict().items())
    run = small_run(0, printed := [])
    run.total, run.cfg.evals = 2, 10                                    # evaluates in every step
    visualize.evaluate(run, net, bank, tests)
    assert printed


def test_knn_keeps_labels_and_images_together_if_a_file_is_unreadable(tmp_path, monkeypatch):
    """The color of an image is its class; without its label an image would shift the others'."""
    run = small_run(19, [])
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
    found = visualize.evaluate(run, net, bank, tests)
    assert (found["knn"], found["knn_patch"]) == (100, 100)


def test_images_are_resized_as_evaluate_resizes_them_for_the_method(tmp_path):
    """MoCo v3 and MoBY: bilinear. (A noisy image; bicubic: negative control.)"""
    noise = torch.randint(256, (50, 50, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "0.png")
    images = datasets.Images("x", "test", None, None, paths=[str(tmp_path / "0.png")])
    run = small_run(19, [])
    found = {kernel: visualize.embed(run, visualize.Pixels(), images, kernel)[0]
             for kernel in ("bilinear", "bicubic")}
    (x, _), = data.batches(images, 16, workers=0, interpolation="bilinear")
    assert torch.equal(found["bilinear"][0], visualize.Pixels()(x))
    assert not torch.equal(found["bilinear"], found["bicubic"])


def test_all_images_of_an_evaluation_are_resized_in_the_same_way(monkeypatch):
    """Of the network and of what it is compared with; bicubic: the default."""
    pixels, used = torch.zeros(20, 3, 16, 16, dtype=torch.uint8), []
    bank = datasets.Images("x", "train", ["a", "b"], torch.arange(20) % 2, pixels)
    embed = visualize.embed
    monkeypatch.setattr(visualize, "embed", lambda run, encoder, images, interpolation: (
        used.append(interpolation), embed(run, encoder, images, interpolation))[1])
    for given in ("bilinear",), ():
        visualize.evaluate(small_run(9, []), vit.ViT(16, 8, 32, 1, 2), bank,
                           replace(bank, split="test"), *given)
    assert used == ["bilinear"] * 6 + ["bicubic"] * 6


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


def test_the_grid_enlarges_small_images(tmp_path):
    for side, scale in ((32, 3), (48, 2), (224, 1)):
        run = SimpleNamespace(rank=0, out=tmp_path, cfg=SimpleNamespace(img_size=side))
        column = torch.zeros(5, 3, side, side, dtype=torch.uint8)
        visualize.save_grid(run, {"image": column, "visible": column})
        with Image.open(tmp_path / "visualization.png") as page:
            assert page.size == (2 * (side + 4) * scale, 5 * (side + 4) * scale + 16)
