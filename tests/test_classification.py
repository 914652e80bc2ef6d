"""Probes of classes against oracles, noise and plain loops."""
import types

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import make_encoder, make_model, make_options

import data
from lib import metrics, rng
from probes import annotations, classification, heads, robustness
from probes.common import load_split


def run(task, *flags):
    """The Report of a probe for a small model."""
    return getattr(classification, task)(make_model(make_encoder()), make_options(task, *flags))


def replace_features(monkeypatch, features, labels, classes):
    """Features and labels of the test split, and of no other."""
    monkeypatch.setattr(classification, "extract_features", lambda m, o, split, *_, **__: {
        "test": ({"cls": features}, labels, classes)}[split])


# ---- knn -----------------------------------------------------------------------------------------


def test_knn_weighs_votes_with_a_temperature_of_007(monkeypatch):
    def at(*cosines):                                    # unit vectors around (1, 0)
        return torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines])

    # One neighbor of class 0 at the query, two of class 1 farther away: with 2 exp(s / tau) these
    # win for tau above 0.058 if s is 0.96, above 0.087 if it is 0.94.
    flags = "--limit", "3", "--k", "3", "--feature", "cls"
    for s, winner in ((0.96, 1), (0.94, 0)):
        splits = {"train": ({"cls": at(1.0, s, s)}, torch.tensor([0, 1, 1]), 2),
                  "test": ({"cls": at(1.0)}, torch.tensor([winner]), 2)}
        monkeypatch.setattr(classification, "extract_features",
                            lambda m, o, split, *_, splits=splits: splits[split])
        assert run("knn", *flags).rows["cls"] == {"k=3": 100}


# ---- linear classifiers --------------------------------------------------------------------------


@pytest.mark.parametrize("task, feature", [("linear", "cls"), ("frequency_noise", "patch"),
                                           ("shape_bias", "patch")])
def test_recipe_and_feature_of_the_linear_classifiers(monkeypatch, task, feature):
    """Recipe park uses the patch mean, and is the default of the probes of its paper."""
    calls = []

    def stop(*_, **__):
        raise KeyboardInterrupt

    def record(model, opt, names, encode, recipe):
        calls.append((recipe, names))
        stop()

    for module in (classification, robustness):
        monkeypatch.setattr(module, "train_linear_classifier", record)
    monkeypatch.setattr(robustness, "load_labeled", lambda *_: (None, 1000))
    monkeypatch.setattr(annotations, "cue_conflict", lambda *_: None)
    probe = getattr(classification if task == "linear" else robustness, task)
    default = {"cls": ("mae", ["cls"]), "patch": ("park", ["patch"])}[feature]
    for flags, (recipe, names) in (
            ([], default), (["--recipe", "park"], ("park", ["patch"])),
            (["--recipe", "park", "--feature", "cls"], ("park", ["cls"])),
            (["--recipe", "park", "--paper-lr"], ("park paper", ["patch"])),
            (["--recipe", "mae"], ("mae", ["cls"])),
            (["--recipe", "logreg"], ("logreg", [feature]))):
        with pytest.raises(KeyboardInterrupt):
            probe(make_model(make_encoder()), make_options(task, "--data", "imagenet", *flags))
        assert calls.pop() == (heads.LINEAR_RECIPES[recipe], names) and not calls


@pytest.mark.parametrize("task, flags", [("linear", ["--recipe", "park"]),
                                         ("linear", ["--recipe", "logreg"]), ("layerwise", []),
                                         ("layerwise", ["--recipe", "logreg"]), ("attentive", [])])
def test_classifiers_are_trained_on_train_and_evaluated_on_test(monkeypatch, task, flags):
    """Every fourth test image has the features of another class: 75 % are right, of train's all."""
    labels = {"train": torch.arange(64) % 4, "test": torch.arange(48) % 4}
    wrong = torch.arange(48) // 4 % 4 == 0
    classes = labels | {"test": torch.where(wrong, 3 - labels["test"], labels["test"])}

    def answer(model, opt, split, names, *_, mirror=False):
        z = torch.eye(16)[classes[split]]
        z = z[:, None].expand(-1, 3, -1) if names == ["tokens"] else z
        return {name: torch.stack([z, z], 1) if mirror else z for name in names}, labels[split], 4

    for module in (classification, heads):
        monkeypatch.setattr(module, "extract_features", answer)
    opt = make_options(task, "--limit", "4", "--epochs", "2", *flags)
    report = getattr(classification, task)(make_model(make_encoder(depth=2)), opt)
    assert len(report.rows) == (2 if task == "layerwise" else 1)          # every block
    assert all(row["top-1"] == 75 for row in report.rows.values())
    assert report.images == {"train": 64, "test": 48}


# ---- few-shot ------------------------------------------------------------------------------------


def test_few_shot_of_an_oracle_of_noise_and_of_equal_features(monkeypatch):
    labels, g = torch.arange(400) % 8, torch.Generator().manual_seed(0)
    for z, accuracy, f1 in ((torch.eye(8)[labels], 100, 100),
                            (torch.randn(400, 64, generator=g), 20, 20.6),   # see below
                            (torch.ones(400, 4), None, 100 / 3)):
        replace_features(monkeypatch, z, labels, 8)
        row = run("few_shot", "--limit", "8", "--episodes", "300").rows["cls"]
        if accuracy:
            assert row["accuracy"] == pytest.approx(accuracy, abs=1.5)
        # Cosines of noise have a standard deviation of 1/8: 21.2 % are above T = 0.1, a fifth of
        # them of the same class; F1 = 2 * 20 * 21.2 / (20 + 21.2).
        assert row["F1"] == pytest.approx(f1, abs=1 if accuracy == 20 else 0.1)
        assert row["F1"] == max(row[f"F1 {t / 10}"] for t in range(1, 10))


def test_few_shot_equals_a_loop_over_episodes(monkeypatch):
    g = torch.Generator().manual_seed(1)
    labels, z = torch.arange(120) % 6, torch.randn(120, 5, generator=g)
    z[:, :3] += 1.5 * torch.eye(6)[labels][:, :3]
    replace_features(monkeypatch, z, labels, 6)
    row = run("few_shot", "--limit", "8", "--episodes", "20", "--seed", "3").rows["cls"]
    g, unit, accuracy = rng.generator(3, "few_shot"), z / z.norm(dim=1, keepdim=True), []
    for _ in range(20):                                   # the same draws, in order
        episode = [(labels == c).nonzero()[:, 0][torch.randperm(20, generator=g)[:16]]
                   for c in torch.randperm(6, generator=g)[:5].tolist()]
        support = torch.stack([unit[rows[0]] for rows in episode])
        hits = [int((support @ unit[q]).argmax()) == c for c, rows in enumerate(episode)
                for q in rows[1:].tolist()]
        accuracy.append(sum(hits) / 75)
    accuracy = torch.tensor(accuracy, dtype=torch.float64)
    assert row["accuracy"] == pytest.approx(100 * accuracy.mean().item())
    assert row["+-"] == pytest.approx(196 * accuracy.std().item() / 20 ** 0.5)


def test_few_shot_needs_enough_images_of_five_classes():
    with pytest.raises(ValueError, match="needs 5 classes with 16 test images each; toy has 0"):
        run("few_shot", "--limit", "20")


def test_few_shot_does_not_crop_square_images(tmp_path, monkeypatch):
    for kind, (width, height) in (("square", (40, 40)), ("wide", (80, 40))):
        for c in range(5):
            (tmp_path / kind / str(c)).mkdir(parents=True)
            for n in range(80):                          # every fifth is a test image: 16
                image = torch.randint(256, (height, width, 3), dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(tmp_path / kind / str(c) / f"{n:02}.png")
    calls, batches = [], data.batches
    monkeypatch.setattr(data, "batches", lambda *a, **b: (calls.append(b["resize"]),
                                                          batches(*a, **b))[1])
    for kind, resize, view in (("square", 32, "; whole image at 32 px;"),
                               ("wide", None, "; short side 36 px, center crop of 32 px;")):
        report = run("few_shot", "--episodes", "5", "--data", str(tmp_path / kind))
        assert view in report.protocol
        assert calls.pop() == resize and not calls


def test_f1_equals_scikit_learn_and_the_f1_of_predicting_always_the_same():
    g = torch.Generator().manual_seed(5)
    same = torch.rand(400, generator=g) < 0.3
    similarity = torch.rand(400, generator=g) * 0.6 + 0.3 * same
    thresholds = [0.1, 0.35, 0.5, 0.95]
    found = metrics.f1_sweep(similarity, same, thresholds)
    for t, f1 in zip(thresholds, found.tolist()):
        predicted = similarity > t
        positives = predicted.sum().item() + same.sum().item()
        expected = 2 * (predicted & same).sum().item() / max(1, positives)
        assert f1 == pytest.approx(expected, abs=1e-12)
    pairs = torch.tensor([True] + [False] * 4).repeat(30)
    assert metrics.f1_sweep(torch.ones(150), pairs, [0.5]).item() == pytest.approx(1 / 3)
    sklearn = pytest.importorskip("sklearn.metrics")
    for t, f1 in zip(thresholds, found.tolist()):
        assert f1 == pytest.approx(sklearn.f1_score(same, similarity > t, zero_division=0))


# ---- classify ------------------------------------------------------------------------------------


def make_classifier_model(classes=16, **changes):
    model = make_model(make_encoder(scramble=0.1, registers=2))
    heads = {"classifier": {"head.weight": torch.randn(classes, 32), "head.bias":
                            torch.randn(classes), **changes}} if classes else {}
    model.encoder.source = types.SimpleNamespace(path="file.pth", heads=heads)
    return model


@pytest.mark.parametrize("mean", [False, True])
def test_classify_evaluates_the_classifier_of_the_checkpoint(mean):
    """Against the plain loop; the labels are those of toy, so that a random classifier is right for
    some images and another order of its classes for others."""
    torch.manual_seed(1)
    changes = {"fc_norm.weight": torch.rand(32), "fc_norm.bias": torch.rand(32)} if mean else {}
    model, opt = make_classifier_model(**changes), make_options("classify", "--limit", "64")
    report = classification.classify(model, opt)
    images = load_split("toy", None, "test", 32, 64, model.device)
    x, _ = next(iter(data.batches(images, 32, 64, model.device)))
    head = model.encoder.source.heads["classifier"]

    def accuracy(n, order=slice(None)):
        with torch.no_grad():
            tokens = model.encoder(x)
        z = tokens[:, 0]
        if mean:
            z = F.layer_norm(tokens[:, 3:].mean(1), (32,), head["fc_norm.weight"],
                             head["fc_norm.bias"], 1e-6)
        best = (z @ head["head.weight"].T + head["head.bias"])[:, order].argsort(1, True)[:, :n]
        return 100 * sum(int(label) in row for label, row in zip(images.labels, best.tolist())) / 64

    row = report.rows["classifier"]
    assert row == {"top-1": pytest.approx(accuracy(1)), "top-5": pytest.approx(accuracy(5))}
    assert row["top-5"] > row["top-1"] > 0 and report.images == {"test": 64}
    assert row["top-5"] != pytest.approx(accuracy(5, torch.arange(16).roll(1)))
    assert ("mean patch token" if mean else "class token") in report.protocol


def test_classify_refuses_other_classes_and_files_without_a_classifier():
    opt = make_options("classify", "--limit", "4")
    with pytest.raises(ValueError, match="has 1,000 classes, and toy has 16: choose --data with"):
        classification.classify(make_classifier_model(1000), opt)
    for model in (make_classifier_model(0), make_model(make_encoder()), make_model(None)):
        with pytest.raises(ValueError, match="small contains no classifier: take a fine-tuned or"):
            classification.classify(model, opt)
