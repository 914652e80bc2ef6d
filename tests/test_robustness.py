"""Probes of shape bias and of noise in frequency bands, on hand-made predictions."""
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from small_models import make_encoder, make_model, make_options

import data
from lib import datasets, metrics, toy
from probes import annotations, common, robustness


def run(task, *flags, model=None):
    """The Report of a probe for a small model."""
    return getattr(robustness, task)(model or make_model(make_encoder()),
                                     make_options(task, *flags))


# ---- shape bias ----------------------------------------------------------------------------------


def test_the_imagenet_classes_of_the_16_categories():
    classes = robustness.IMAGENET_CLASSES
    assert len(classes) == 16 and len(classes["bird"]) == 49 and len(classes["dog"]) == 109
    assert not {7, 9, 17, 21, 84, 85, 86, 97, 134} & set(classes["bird"])
    everything = sum(classes.values(), [])
    assert len(set(everything)) == len(everything) and max(everything) < 1000


def test_the_probability_of_a_category_is_the_mean_of_its_classes_and_not_their_sum():
    p = torch.full((1, 1000), 1e-5)
    p[0, robustness.IMAGENET_CLASSES["dog"]] = 0.004     # 109 of them: 0.44 in sum
    p[0, 404] = 0.3                                      # airplane: a single class
    names = list(robustness.IMAGENET_CLASSES)
    assert names[robustness.predict_category(p.log(), names).item()] == "airplane"
    total = torch.stack([p[:, m].sum(1) for m in robustness.IMAGENET_CLASSES.values()], 1)
    assert names[total.argmax().item()] == "dog"         # control


def test_shape_bias_from_images_to_numbers(tmp_path, monkeypatch):
    names = sorted(robustness.IMAGENET_CLASSES)
    pairs = [("cat", "dog"), ("cat", "dog"), ("dog", "cat"), ("car", "car"), ("oven", "knife")]
    paths = []
    for number, _ in enumerate(pairs):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (40, 40), (50 * number, 0, 0)).save(paths[-1])
    shapes, textures = torch.tensor([[names.index(name) for name in pair]
                                     for pair in pairs]).unbind(1)
    images = datasets.Images("cue-conflict", "test", paths=paths)
    stimuli = annotations.CueConflict(images, shapes, textures, names)
    monkeypatch.setattr(annotations, "cue_conflict", lambda *_: stimuli)
    # predictions: shape, texture, shape, of an image without conflict, neither
    scores = torch.zeros(5, 1000)
    for row, name in enumerate(["cat", "dog", "dog", "knife", "bird"]):
        scores[row, robustness.IMAGENET_CLASSES[name]] = 20
    head = SimpleNamespace(scores=lambda z: scores, training="SGD", notes=["lr 1"])
    monkeypatch.setattr(robustness, "train_linear_classifier", lambda *a: ("patch", head, 7))
    monkeypatch.setattr(robustness, "load_labeled", lambda *a: (None, 1000))
    monkeypatch.setattr(common, "load_split", lambda *a: images)           # a data set of files
    sides, batches = [], data.batches
    monkeypatch.setattr(data, "batches", lambda *a, **b: (sides.append(b["resize"]),
                                                          batches(*a, **b))[1])
    for flags, view, selection in (
            (["--no-crop", "--show", "--out", str(tmp_path)], "whole image at 32 px",
             "lr chosen by 5 folds"),
            (["--paper-lr", "--recipe", "park"], "short side 36 px, center crop of 32 px",
             "lr 1 and weight decay 0.05 as printed")):
        report = run("shape_bias", "--data", "imagenet", *flags)
        assert f"; {view}; " in report.protocol
        assert f"recipe park (SGD); {selection}" in report.protocol
        assert "; mean probability of each category's classes; " in report.protocol
    with Image.open(tmp_path / "shape_bias-imagenet-small.png") as figure:
        assert figure.height == 4 * 130                     # not the image without conflict
    assert sides == [32, None]                           # the whole image; the center crop
    row = report.rows["patch"]
    assert row["cat"] == 50 and row["dog"] == 100 and row["shape bias"] == 75
    assert math.isnan(row["oven"]) and row["either"] == 75 and "car" not in row
    monkeypatch.setattr(robustness, "load_labeled", lambda *a: (None, 999))
    with pytest.raises(ValueError, match="all 1,000 classes of ImageNet, and this folder has 999"):
        run("shape_bias", "--data", "imagenet")


def test_shape_bias_counts_only_decisions_for_shape_or_texture():
    shapes, textures = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 2, 0, 2, 0])
    predicted = torch.tensor([0, 1, 1, 0, 1, 1])
    bias, either = metrics.shape_bias(predicted, shapes, textures)
    assert bias[0] == 0.5 and bias[1] == 0.5 and math.isnan(bias[2])
    assert either == pytest.approx(4 / 6)


@pytest.mark.parametrize("cue, bias", [("label", 100), ("pattern", 0)])
def test_a_classifier_of_toy_that_sees_one_cue_decides_by_it(tmp_path, monkeypatch, cue, bias):
    """Control from images to numbers: images of toy are replaced by 4 x 4 pixels of which the one
    of the class of one cue is bright, and a classifier is trained on these pixels."""
    def draw(index, *args, **flags):
        out = real_draw(index, *args, **flags)
        shows.append(flags.get("cue_conflict", False))
        bright = torch.nn.functional.one_hot(out[cue], 16).view(-1, 1, 4, 4).expand(-1, 3, 4, 4)
        return out | {"image": (255 * bright).to(torch.uint8)}

    shows, real_draw = [], toy.draw
    monkeypatch.setattr(toy, "draw", draw)
    monkeypatch.setattr(common, "load_split", common.load_split.__wrapped__)       # no cache
    report = run("shape_bias", "--limit", "400", "--recipe", "logreg", "--show", "--out",
                 str(tmp_path), model=make_model(None, img_size=4))
    row = report.rows["pixels"]
    assert row == {"shape bias": bias, "either": 100, **dict.fromkeys(toy.CLASSES, bias)}
    assert report.images == dict(train=400, test=400) and True in shows and False in shows
    assert "; whole image at 4 px; class with the highest score; mean over" in report.protocol
    with Image.open(tmp_path / "shape_bias-toy-small.png") as figure:
        assert figure.height == 8 * 130


def test_shape_bias_of_an_untrained_network_on_toy():
    """All test images are counted, in the order in which they are drawn, in any batches."""
    flags = "--limit", "60", "--recipe", "logreg"
    rows = [run("shape_bias", *flags, "--batch-size", n).rows["patch"] for n in ("60", "7")]
    assert str(rows[0]) == str(rows[1]) and 0 < rows[0]["either"] < 100      # some are nan
    assert set(rows[0]) == {"shape bias", "either", *toy.CLASSES}
    for name in ("toy-scenes", "cifar10"):
        with pytest.raises(ValueError, match="choose --data toy, or imagenet"):
            run("shape_bias", "--data", name)


# ---- noise ---------------------------------------------------------------------------------------


def test_frequency_bands_cover_the_spectrum_exactly_once():
    sizes = [int(robustness.frequency_band(224, t / 10 * math.pi).sum()) for t in range(11)]
    assert sizes == [121, 968, 1936, 3216, 3960, 4928, 5896, 6864, 8592, 8888, 4807]
    bands = [robustness.frequency_band(64, t / 10 * math.pi) for t in range(11)]
    assert sum(band.int() for band in bands).eq(1).all()
    keep = bands[5]                                      # -w for every w: the inverse is real
    assert keep.roll((-1, -1), (0, 1)).flip(0, 1).equal(keep)


def test_the_band_differs_from_the_released_one_at_its_borders_only():
    """The released band, a difference of two centered squares, written out: as it is named in the
    docstring, its borders have no counterpart; ours has all of them."""
    def square(half_side):                               # of even side, around frequency 0
        w = torch.fft.fftfreq(224, 1 / 224)
        inside = (w >= -half_side) & (w < half_side)
        return inside[:, None] & inside

    def unpaired(keep):
        return int((keep & ~keep.roll((-1, -1), (0, 1)).flip(0, 1)).sum())

    f, half = 0.5 * math.pi, 0.05 * math.pi
    inner, outer = (int((f + side) * 224 / (2 * math.pi)) for side in (-half, half))
    released, ours = square(outer) & ~square(inner), robustness.frequency_band(224, f)
    assert unpaired(released) / int(released.sum()) == pytest.approx(0.09, abs=0.001)
    assert unpaired(ours) == 0 and "9% of a band" in robustness.frequency_band.__doc__
    w = torch.fft.fftfreq(224, 1 / 224).abs()
    w = torch.maximum(w[:, None], w)
    assert set(w[released ^ ours].tolist()) == {inner, outer}


def test_noise_stays_in_its_band_and_has_the_energy_of_its_band():
    index, total = torch.arange(40), 0
    for tenth in range(11):
        f = tenth / 10 * math.pi
        noise, keep = robustness.band_noise(index, 64, f, 0.7), robustness.frequency_band(64, f)
        energy = torch.fft.fft2(noise.double()).abs().square()
        assert (energy * ~keep).sum() < 1e-10 * energy.sum()
        fraction = keep.double().mean().item()
        assert noise.square().mean().item() == pytest.approx(0.49 * fraction, rel=0.1)
        total = total + noise
        equal = robustness.band_noise(index, 64, f, 0.7, equal_energy=True)
        assert equal.square().mean().item() == pytest.approx(0.049, rel=0.1)
    assert torch.allclose(total.abs(), torch.tensor(0.7), atol=1e-4)   # all bands: the signs again
    alone = robustness.band_noise(index[7:8], 64, 1.0, 0.7)
    assert alone.equal(robustness.band_noise(index, 64, 1.0, 0.7)[7:8])    # in any batch


def test_a_drop_is_the_accuracy_lost_to_noise_in_one_band(monkeypatch):
    labels = torch.arange(8) % 4
    head = SimpleNamespace(scores=lambda z: z, training="SGD", notes=[])
    clean, noisy = torch.eye(4)[labels], torch.eye(4)[labels.clamp(max=2)]   # a quarter is wrong
    x, sensitive = torch.randn(8, 3, 32, 32), robustness.frequency_band(32, 0.3 * math.pi)

    def extract_features(model, opt, split, names, encode, change):
        """Features of a model that is sensitive to noise around 0.3 pi only."""
        assert split == "test"
        noise = change(x, torch.arange(8)) - x if change else torch.zeros_like(x)
        hit = (torch.fft.fft2(noise).abs() * sensitive).mean() > 1e-3
        return {"cls": noisy if hit else clean}, labels, 4

    monkeypatch.setattr(robustness, "train_linear_classifier", lambda *a: ("cls", head, 7))
    monkeypatch.setattr(robustness, "extract_features", extract_features)
    report = run("frequency_noise", "--limit", "8")
    drops = {f"{tenth / 10:g} pi": 25 * (tenth == 3) for tenth in range(11)}
    assert report.rows["cls"] == {"clean": 100, "mean drop": pytest.approx(25 / 11), **drops}
    assert "recipe park (SGD); lr chosen by 5 folds" in report.protocol
    sizes = [int(robustness.frequency_band(32, i / 10 * math.pi).sum()) for i in range(11)]
    assert f"do not rise steadily ({' '.join(map(str, sizes))})" in report.notes[0]
    assert run("frequency_noise", "--limit", "8", "--equal-energy").notes == []
    report = run("frequency_noise", "--limit", "8", "--recipe", "park", "--paper-lr")
    assert "lr 1 and weight decay 0.05 as printed" in report.protocol


def test_features_with_noise_are_not_cached(tmp_path):
    flags = "--limit 20 --epochs 1 --eps 50 --out".split()
    plain, cached = (run("frequency_noise", *flags, str(tmp_path), *more).rows["patch"]
                     for more in ([], ["--cache"]))
    assert plain == cached and any(plain[name] for name in plain if name.endswith(" pi"))
