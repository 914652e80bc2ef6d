"""Fine-tuning: schedules and targets against the published numbers, augmentations against
torchvision's and timm's, and a small run with shuffled labels as a control."""
import contextlib
import functools
import json
import math
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import make_encoder, make_model, make_options
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
import evaluate
from lib import augment, checkpoint_heads, checkpoints, config, datasets, distributed, metrics, swin
from probes import classification, common, finetune, training

BEIT = dict(pos="none", rel_pos="shared", layer_scale=0.1, qkv_bias="split", init="beit")
ROOT = Path(__file__).parent.parent


def finetune_options(*argv):
    """--recipe mae, unless another one is named."""
    recipe = [] if "--recipe" in argv else ["--recipe", "mae"]
    return make_options("finetune", *recipe, *argv, data="cifar10")


def make_classifier(encoder, classes, with_cls=False):
    return finetune.Classifier(training.copy_encoder(encoder, 0.1, final_norm=with_cls), classes,
                               with_cls)


def error_line(capsys, *flags):
    """The line that a user error prints on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(["--task", "finetune", "--device", "cpu", *flags]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ---- recipes -------------------------------------------------------------------------------------


def test_simmims_learning_rate_is_the_published_one():
    found = [finetune.simmim_lr(epoch, 100, 5e-3, 1e-6, 20) for epoch in (0, 10, 19.999, 20, 100)]
    assert found == pytest.approx([1e-6, 2.5005e-3, 5e-3, 4.523e-3, 1e-6], rel=2e-4)


def test_recipes_are_the_published_ones():
    columns = ("lr", "lr_batch", "batch", "epochs", "warmup", "clip", "augment")
    assert {name: tuple(recipe[column] for column in columns)
            for name, recipe in finetune.FINETUNE_RECIPES.items() if name != "light"} == {
        "mae": (5e-4, 256, 1024, 100, 5, None, "RandAugment"),
        "simmim": (1.25e-3, 512, 2048, 100, 20, 5.0, "RandAugment"),
        "mmc": (5e-4, 256, 4 * 64, 100, 5, None, "RandAugment")}
    assert finetune.MMC_NOT_IMAGENET == dict(batch=2 * 64, epochs=200, augment="ThreeAugment")
    assert (finetune.LAYER_DECAY, finetune.WEIGHT_DECAY, finetune.DROP_PATH) == (0.65, 0.05, 0.1)


@pytest.mark.parametrize("name, words", [("imagenet", "100 epochs, RandAugment,"),
                                         ("cifar10", "200 epochs, ThreeAugment,")])
def test_mmc_has_a_recipe_for_imagenet_and_one_for_other_data_sets(monkeypatch, name, words):
    plant_two_classes(monkeypatch)
    monkeypatch.setattr(finetune, "Progress", lambda *_: SimpleNamespace(    # all steps are done
        step=0, curve=[({"top-1": 0.0}, 5)], steps=lambda *_: (), delete=lambda: None))
    opt = finetune_options("--data", name, "--recipe", "mmc")
    assert words in finetune.finetune(make_model(make_encoder()), opt).protocol


@pytest.mark.parametrize("text, expected", [("first:2", [0, 1]), ("last:1", [2]), ("first:0", []),
                                            (None, []), ("last:3", [0, 1, 2])])
def test_reinit_counts_blocks_from_either_end(text, expected):
    assert list(finetune.parse_reinit(text, 3)) == expected


# ---- the network ---------------------------------------------------------------------------------


def test_all_parameters_are_trained_once():
    net = make_classifier(make_encoder(), 10)
    groups = training.layer_decay_groups(net.named_parameters(), 3, 0.65, 0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())


def test_features_are_pooled_and_the_head_is_near_zero():
    encoder, x = make_encoder(0.1), torch.randn(2, 3, 32, 32)
    net = make_classifier(encoder, 5).eval()
    raw = encoder.layers(x, [2], norm=False)[0][0]
    z = F.layer_norm(raw[:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(net(x), z @ net.head.weight.T)
    net = make_classifier(encoder, 5, with_cls=True).eval()
    tokens = encoder(x)
    z = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(net(x), z @ net.head.weight.T)
    head = make_classifier(encoder, 1000).head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.05) and not head.bias.any()


# ---- targets and augmentations -------------------------------------------------------------------


def test_targets_are_mixed_and_smoothed():
    torch.manual_seed(0)
    x, y = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16), torch.tensor([0, 1, 2, 2])
    kinds = set()
    for _ in range(40):
        mixed, target = finetune.make_mixing(5)(x, y)
        assert target.shape == (4, 5)
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        weight = 1 - target[1, 1].item()                 # of image 0 in image 1
        assert target[1, 0].item() == pytest.approx(weight, abs=1e-6)
        assert target[3, 2].item() == pytest.approx(1)   # 2 with 2
        assert mixed[1].mean().item() == pytest.approx(1 - weight, abs=1e-5)
        kinds.add("cutmix" if mixed[1].unique().numel() <= 2 and set(
            mixed[1].unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert kinds == {"mixup", "cutmix"}
    # Worked out by hand: 0.7 of class 0, 0.3 of class 1, smoothed: .655, .295, .025, .025.
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    loss = finetune.soft_cross_entropy(scores, torch.tensor([[0.7, 0.3, 0.0, 0.0]]))
    log_sum = torch.logsumexp(scores, 1).item()
    assert loss.item() == pytest.approx(log_sum - (0.655 * 2 + 0.295 * 1 - 0.025), rel=1e-6)
    uniform = finetune.soft_cross_entropy(torch.zeros(3, 4), torch.eye(4)[:3])
    assert uniform.item() == pytest.approx(3 * 1.386294, rel=1e-6)           # a sum, not a mean


def test_weights_of_mixing_come_from_the_betas_of_the_recipes():
    """Mixup: Beta(a, a) has the variance 1 / (4 (2 a + 1)). Cutmix: of a side s with a uniform
    center, s - s^2 / 4 lies within the image on average, whose square is s^2 - 5/12 s^3 on average;
    for two sides and uniform s^2 that makes a variance of 0.1386 - 0.3208^2."""
    torch.manual_seed(0)
    x, y = torch.zeros(2, 1, 32, 32), torch.arange(2)
    for mix, variance in zip(finetune.make_mixing(2).transforms, (1 / (4 * 2.6), 0.0357)):
        weights = torch.stack([mix(x, y)[1][0, 0] for _ in range(300)])
        assert weights.var().item() == pytest.approx(variance, rel=0.2)


def test_rand_augment_is_torchvisions_at_nine_tenths_of_its_range():
    x = torch.randint(256, (20, 3, 24, 24), dtype=torch.uint8)
    torch.manual_seed(3)
    found = finetune.rand_augment(x)
    torch.manual_seed(3)
    expected = x.clone()
    operation = v2.RandAugment(1, magnitude=27, interpolation=TF.InterpolationMode.BILINEAR,
                               fill=[124, 116, 104])
    for _ in range(2):
        order, u = torch.randperm(20), torch.rand(20)
        for i in order[u < 0.5].tolist():
            expected[i] = operation(expected[i])
    assert torch.equal(found, expected / 255) and not torch.equal(found, x / 255)
    strength = v2.RandAugment._AUGMENTATION_SPACE["Rotate"][0](31, 24, 24)
    assert strength[27].item() == pytest.approx(27)      # degrees of 30, as timm's 9 of 10


def test_rand_augment_leaves_as_many_images_unchanged_as_timms():
    auto = pytest.importorskip("timm.data.auto_augment")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    x = F.interpolate(torch.rand(1000, 3, 5, 5), 24, mode="bicubic")       # not of full contrast
    x = (40 + 160 * x.clamp(0, 1)).to(torch.uint8)
    ours = (finetune.rand_augment(x) == x / 255).flatten(1).all(1).float().mean().item()
    transform = auto.rand_augment_transform("rand-m9-inc1")      # mstd: Pillow refuses its 0 bits
    images = [TF.to_pil_image(image) for image in x]
    theirs = sum(transform(image).tobytes() == image.tobytes() for image in images) / len(images)
    assert ours == pytest.approx(theirs, abs=0.07) and 0.2 < theirs < 0.35


def test_three_augment_applies_one_of_three_and_jitters(monkeypatch):
    torch.manual_seed(0)
    x = torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8)
    y = finetune.three_augment(x)
    gray = (y - y.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 70 < gray.sum() < 130                         # a third; jitter does not add color
    assert y.min() >= 0 and y.max() <= 1 and not torch.equal(y, x / 255)
    strengths = []
    monkeypatch.setattr(augment, "jitter",
                        lambda x, order, strength: strengths.append(strength) or x)
    y, z = finetune.three_augment(x), x / 255
    solarized = (y == torch.where(x >= 128, 1 - z, z)).flatten(1).all(1)
    blurred = y.std((2, 3)).amax(1) < 0.9 * z.std((2, 3)).amin(1)
    gray = (y == y[:, :1]).flatten(1).all(1)
    assert 70 < solarized.sum() < 130 and (blurred | solarized | gray).float().mean() > 0.95
    assert strengths[0].shape == (300, 3)
    assert 0.7 <= strengths[0].min() < 0.72 and 1.28 < strengths[0].max() <= 1.3


def test_a_quarter_of_the_images_gets_a_box_of_noise():
    torch.manual_seed(0)
    x = torch.full((800, 3, 32, 32), 7.0)
    changed = finetune.erase_boxes(x) != 7
    assert 150 < changed.any((1, 2, 3)).float().sum() < 250
    for mask in changed[changed.flatten(1).any(1)][:50]:
        rows, columns = mask.any(0).any(1).nonzero(), mask.any(0).any(0).nonzero()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert mask.all(0).sum() == box and 0.01 < box / 1024 < 0.36
    noise = finetune.erase_boxes(x, probability=1.0)
    noise = noise[noise != 7]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


# ---- whole runs ----------------------------------------------------------------------------------


def plant_two_classes(monkeypatch, shuffled=False):
    """Images of reddish and of bluish noise, easy to tell apart; shuffled: with random labels."""
    g = torch.Generator().manual_seed(0)

    def load_split(name, root, split, img_size, limit, device):
        labels = torch.arange(256) % 2
        pixels = torch.randint(100, (256, 3, 32, 32), dtype=torch.uint8, generator=g)
        pixels[:, 0] += (120 * (labels == 0)).byte()[:, None, None]
        pixels[:, 2] += (120 * (labels == 1)).byte()[:, None, None]
        if shuffled:
            labels = labels[torch.randperm(256, generator=g)]
        return datasets.Images(name, split, ["red", "blue"], labels, pixels)

    monkeypatch.setattr(common, "load_split", load_split)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mae", "simmim", "mmc"])
def test_planted_classes_are_learned_and_the_given_encoder_does_not_change(monkeypatch, recipe):
    encoder = make_encoder(**(BEIT if recipe == "simmim" else {}))
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    # Few steps need a larger lr than the recipe's.
    recipes = finetune.FINETUNE_RECIPES
    monkeypatch.setitem(recipes, recipe, {**recipes[recipe], "lr": 8e-3})
    opt, accuracies = finetune_options("--recipe", recipe, "--epochs", "4"), []
    for shuffled in (False, True):
        with monkeypatch.context() as patch:
            plant_two_classes(patch, shuffled)
            report = finetune.finetune(make_model(encoder), opt)
        (feature, row), = report.rows.items()
        assert feature == ("cls+patch" if recipe == "mmc" else "patch")
        accuracies.append(row["last epoch"])
    assert accuracies[0] > 90 and 30 < accuracies[1] < 70
    assert not encoder.training and all(torch.equal(x, before[name])
                                        for name, x in encoder.state_dict().items())
    assert ("ThreeAugment" if recipe == "mmc" else "RandAugment") in report.protocol
    assert "our choice" in report.protocol


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: make_encoder(**BEIT),
                                  lambda: swin.make_swin("swin_micro", 32).eval()])
def test_the_stored_network_classifies_as_at_the_end_of_its_training(monkeypatch, tmp_path, make):
    monkeypatch.setattr(finetune, "DROP_PATH", 0.3)
    plant_two_classes(monkeypatch, shuffled=True)
    monkeypatch.setattr(common, "load_split", functools.cache(common.load_split))  # not new images
    nets, make_net = [], finetune.Classifier
    monkeypatch.setattr(finetune, "Classifier",
                        lambda *given: nets.append(make_net(*given)) or nets[-1])
    tmp_path = tmp_path / "new"                          # a folder that does not exist yet
    flags = "--epochs", "2", "--lr", "3e-3", "--out", str(tmp_path), "--recipe", "light"
    row, = finetune.finetune(make_model(make()), finetune_options(*flags, "--save")).rows.values()
    assert 0 < row["last epoch"] < 100
    path = tmp_path / "finetuned-small-cifar10.pt"
    stored = checkpoints.load_encoder(path, quiet=True)
    assert (stored.source.branch, stored.source.data) == ("finetuned", "cifar10")
    head, x = checkpoint_heads.classifier(stored), torch.randn(4, 3, 32, 32)
    assert head.fc_norm.eps == nets[0].fc_norm.eps                               # Swin: 1e-5
    assert torch.allclose(head(stored(x)), nets[0].eval()(x), atol=1e-5)
    report = classification.classify(make_model(stored), make_options("classify", data="cifar10"))
    assert report.rows["classifier"]["top-1"] == row["last epoch"]
    first = path.read_bytes()
    finetune.finetune(make_model(make()), finetune_options(*flags, "--save", "--seed", "1"))
    assert path.with_name("finetuned-small-cifar10.1.pt").read_bytes() == first     # it is kept
    path.unlink()
    finetune.finetune(make_model(make()), finetune_options(*flags))
    assert not path.exists()


@pytest.mark.slow
def test_training_and_test_images_are_resized_alike(monkeypatch, tmp_path):
    """With bicubic resizing, as in the recipes, and so is the stored network evaluated."""
    plant_two_classes(monkeypatch)
    used, View = [], finetune.data.View
    batches = finetune.data.batches
    monkeypatch.setattr(finetune.data, "batches", lambda *given, interpolation, **more: (
        used.append(interpolation), batches(*given, interpolation=interpolation, **more))[1])
    monkeypatch.setattr(finetune.data, "View", lambda *given, **more: (
        used.append(View(*given, **more).interpolation), View(*given, **more))[1])
    model = make_model(make_encoder(), interpolation="bilinear")
    finetune.finetune(model, finetune_options("--epochs", "1", "--recipe", "light", "--save",
                                              "--out", str(tmp_path)))
    stored = checkpoints.load_encoder(tmp_path / "finetuned-small-cifar10.pt", quiet=True)
    assert used == ["bicubic"] * 2 and stored.source.interpolation == "bicubic"


def test_toy_is_fine_tuned_for_few_epochs_on_crops_of_most_of_the_image(monkeypatch):
    plant_two_classes(monkeypatch)
    monkeypatch.setattr(finetune, "test_accuracy", lambda *_: ({"top-1": 0.0}, 5))
    targets, loss = [], finetune.soft_cross_entropy
    monkeypatch.setattr(finetune, "soft_cross_entropy",
                        lambda z, y, smoothing: targets.append(y) or loss(z, y, smoothing))
    scales, view, warmups, cosine = [], data.View, [], finetune.cosine
    monkeypatch.setattr(data, "View", lambda *a, **b: scales.append(b["scale"]) or view(*a, **b))
    monkeypatch.setattr(finetune, "cosine", lambda *a: warmups.append(a[4]) or cosine(*a))
    model = make_model(make_encoder())
    protocol = finetune.finetune(model, finetune_options("--data", "toy")).protocol
    assert ", 5 epochs, crops of 0.6 to 1 of the image and flips only, drop path" in protocol
    assert "batch 16, lr 0.00025 (both our choice" in protocol   # from the recipe's batch, not 64
    assert scales == [(0.6, 1.0)] and set(warmups) == {4}        # 5% of 80 steps
    assert finetune.TOY_FINETUNE["batch"] == 64
    assert {tuple(y) for y in torch.cat(targets).tolist()} == {(0.0, 1.0), (1.0, 0.0)}   # not mixed
    opt = finetune_options("--data", "toy", "--epochs", "2")
    assert ", 2 epochs, crops of 0.6" in finetune.finetune(model, opt).protocol


@pytest.mark.parametrize("flags, recipe, smoothing, lr", [
    ([], "light", 0.0, 0.001), (["--lr", "3e-3"], "light", 0.0, 0.003),
    (["--recipe", "mae"], "mae", 0.1, 0.00025), (["--recipe", "light"], "light", 0.0, 0.001)])
def test_few_images_are_fine_tuned_lightly(monkeypatch, capsys, flags, recipe, smoothing, lr):
    """256 images. Only a recipe that was not chosen by the user is announced."""
    plant_two_classes(monkeypatch)
    monkeypatch.setattr(finetune, "test_accuracy", lambda *_: ({"top-1": 0.0}, 5))
    seen, scales, view, loss = [], [], data.View, finetune.soft_cross_entropy
    monkeypatch.setattr(data, "View", lambda *a, **b: scales.append(b["scale"]) or view(*a, **b))
    monkeypatch.setattr(finetune, "soft_cross_entropy", lambda z, y, smoothing: seen.append(
        (smoothing, (y.amax(1) == 1).all().item())) or loss(z, y, smoothing))
    opt = make_options("finetune", "--epochs", "1", *flags, data="cifar10")
    protocol = finetune.finetune(make_model(make_encoder()), opt).protocol
    assert f"recipe {recipe}" in protocol and f"batch 16, lr {lr:g}" in protocol
    assert {s for s, _ in seen} == {smoothing}
    assert all(pure for _, pure in seen) == (recipe == "light")               # not mixed
    assert scales == [(0.35, 1.0) if recipe == "light" else (0.08, 1.0)]
    announced = "recipe light, as cifar10 has 256 training images" in capsys.readouterr().out
    assert announced == ("--recipe" not in flags)


def test_gradient_accumulation_makes_the_same_step(monkeypatch):
    def parameters_after(batch_size):
        plant_two_classes(monkeypatch)
        seen = []
        monkeypatch.setattr(finetune, "test_accuracy", lambda net, *_: seen.append(
            [p.detach().clone() for p in net.parameters()]) or ({"top-1": 0.0}, 5))
        monkeypatch.setattr(finetune, "DROP_PATH", 0.0)  # its random numbers depend on the parts
        report = finetune.finetune(make_model(make_encoder()), finetune_options(
            "--epochs", "1", "--batch-size", batch_size))
        # 1/64 of 256 images is below the least batch; 2e-3 at 1024, times the root of 16/1024.
        assert "batch 16, lr 0.00025 (both our choice" in report.protocol
        return seen[0]

    whole, parts = parameters_after("256"), parameters_after("5")
    assert max((a - b).abs().max().item() for a, b in zip(whole, parts)) < 1e-5


@pytest.mark.parametrize("recipe, clip", [("mae", None), ("simmim", 5.0)])
def test_every_step_follows_the_recipe(monkeypatch, recipe, clip):
    plant_two_classes(monkeypatch)                       # 2 epochs of 16 batches
    seen = SimpleNamespace(lrs=[], clips=[], encoders=[], targets=[], images=[], loaders=[])

    def recording(calls, function):
        """The function; its arguments are appended to `calls`."""
        return lambda *args: (calls.append(args), function(*args))[1]

    for name, calls in (("Classifier", seen.encoders), ("soft_cross_entropy", seen.targets),
                        ("erase_boxes", seen.images)):
        monkeypatch.setattr(finetune, name, recording(calls, getattr(finetune, name)))
    monkeypatch.setitem(finetune.AUGMENTATIONS, "RandAugment", lambda x: x / 255)
    monkeypatch.setattr(data, "Loader", recording(seen.loaders, data.Loader))
    curve = [{"top-1": 20.0, "top-5": 80.0}, {"top-1": 30.0, "top-5": 60.0}]     # of the epochs
    if recipe == "mae":
        curve.reverse()
    accuracies = iter(curve)
    monkeypatch.setattr(finetune, "test_accuracy", lambda *_: (next(accuracies), 5))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda _, norm: seen.clips.append(norm))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: seen.lrs.append(
        {group["factor"]: group["lr"] for group in optimizer.param_groups}))     # no update
    encoder = make_encoder(0.1)
    model = make_model(encoder, mean=(0.5,) * 3, std=(0.25,) * 3)    # as of an official file
    report = finetune.finetune(model, finetune_options("--recipe", recipe, "--epochs", "2",
                                                       "--reinit", "last:1"))

    [(_, [crop], *_)] = seen.loaders
    assert crop.scale == (0.08, 1.0)
    assert report.rows == {"patch": {"top-1": 30, "top-5": 60, "last epoch": curve[1]["top-1"],
                                     "last top-5": curve[1]["top-5"]}}
    assert report.notes == [f"small: best epoch {2 - (recipe == 'mae')} of 2"]
    peak = {"mae": 2e-3 * (16 / 1024)**0.5, "simmim": 5e-3 * (16 / 2048)**0.5}[recipe]

    def lr_at(step, factor):
        if recipe == "simmim":         # of timm's scheduler: base rates scaled, both ends not
            base, end = factor * peak, 2e-4 * peak
            if step < 6:
                return end + step * (base - end) / 6
            return end + (base - end) * (1 + math.cos(math.pi * step / 32)) / 2
        down = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (step - 1) / 31)) / 2
        return factor * down * (step > 0)                # one step of warmup, from 0

    assert len(seen.lrs) == 32 and seen.clips == [clip] * 32 * bool(clip)
    for step, lrs in enumerate(seen.lrs):
        assert lrs == {0.65**n: pytest.approx(lr_at(step, 0.65**n)) for n in range(5)}
    assert any((y.amax(1) < 1).any() for _, y, _ in seen.targets)            # mixed
    assert {smoothing for *_, smoothing in seen.targets} == {0.1}
    x = torch.cat([x for x, in seen.images])
    assert len(x) == 512 and -2 <= x.min() < -1.9 and 1 < x.max() <= 2       # the model's mean
    [(copy, *_)] = seen.encoders
    assert copy.config["drop_path"] == 0.1
    for name, x in copy.state_dict().items():            # only the last block is re-initialized
        assert torch.equal(x, encoder.state_dict()[name]) != name.startswith("blocks.2."), name


def test_positions_are_resampled_to_another_image_size_once(monkeypatch):
    plant_two_classes(monkeypatch)
    encoders = []

    def stop(encoder, *_):
        encoders.append(encoder)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "Classifier", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(make_model(make_encoder(), img_size=48), finetune_options())
    assert encoders[0].config["img_size"] == 48 and encoders[0].pos_embed.shape == (1, 37, 32)


def test_user_errors_are_one_sentence(capsys, tmp_path, monkeypatch):
    flags = "--baseline", "untrained", "--limit", "32", "--out", str(tmp_path)
    error = error_line(capsys, *flags, "--reinit", "first:99")
    assert "first:99" in error and "from 0 to 3" in error
    assert "first:N or last:N" in error_line(capsys, *flags, "--reinit", "middle")
    assert "mae, simmim, mmc" in error_line(capsys, *flags, "--recipe", "dino")
    assert "pixels" in error_line(capsys, *flags, "--baseline", "pixels")
    assert "choose another --recipe" in error_line(capsys, *flags, "--recipe", "mmc", "--save")
    with pytest.raises(SystemExit) as stop:
        evaluate.parse(["--task", "finetune", "--recipe", "magic"])
    assert stop.value.code == 2 and "magic" in capsys.readouterr().err
    recipes = finetune.FINETUNE_RECIPES
    monkeypatch.setitem(recipes, "mae", {**recipes["mae"], "lr": float("nan")})
    error = error_line(capsys, *flags, "--epochs", "2")
    assert "not finite at step" in error and "--precision fp32" in error


def test_too_few_images_are_reported_before_training(capsys, tmp_path, monkeypatch):
    flags = "--baseline", "untrained", "--out", str(tmp_path)
    error = error_line(capsys, *flags, "--limit", "10")
    assert ("finetune needs at least 16 training and 1 test images, and toy has 10 and 10: raise "
            "--limit or change --data") in error
    plant_two_classes(monkeypatch)
    monkeypatch.setattr(distributed, "world_size", lambda: 300)
    monkeypatch.setattr(finetune, "Classifier", lambda *_: pytest.fail("training has begun"))
    with pytest.raises(ValueError, match="needs at least 300 training and 300 test images, and"):
        finetune.finetune(make_model(make_encoder()), finetune_options())
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    load_split = common.load_split

    def load_two_tests(name, root, split, *rest):
        images = load_split(name, root, split, *rest)
        if split == "train":
            return images
        return replace(images, labels=images.labels[:2], pixels=images.pixels[:2])

    monkeypatch.setattr(common, "load_split", load_two_tests)
    with pytest.raises(ValueError, match="15 training and 3 test images, and cifar10 has "
                                         "256 and 2"):
        finetune.finetune(make_model(make_encoder()), finetune_options())


def test_linear_names_its_own_recipes():
    with pytest.raises(ValueError, match="linear has no recipe mmc; choose --recipe mae, dino"):
        classification.linear(make_model(make_encoder()), make_options("linear", "--recipe", "mmc"))


@pytest.mark.slow
def test_two_processes_write_one_line(tmp_path, torchrun):
    for task in ("finetune", "knn"):
        out = tmp_path / task
        command = [*torchrun, "evaluate.py", "--task", task, "--baseline", "untrained", "--limit",
                   "64", *["--epochs", "1"] * (task == "finetune"), "--workers", "0", "--device",
                   "cpu", "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        line, = (out / "results.jsonl").read_text().splitlines()
        assert json.loads(line)["images"]["test"] == 64
        assert done.stdout.count(f"untrained: {task}") == 1


def test_the_processes_share_the_test_images(monkeypatch):
    net, parts, training_modes = make_classifier(make_encoder(), 2), [], []
    plant_two_classes(monkeypatch)
    tests = common.load_split("toy", None, "test", 32, None, None)
    model, opt = make_model(net.encoder), finetune_options()
    net.head.register_forward_hook(lambda head, *_: training_modes.append(head.training))
    whole, count = finetune.test_accuracy(net, tests, model, opt)
    assert training_modes == [False] and net.training    # no drop path at test time
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(finetune, "gather_batches", lambda found, _: parts.append(
        {name: torch.cat(batches) for name, batches in found.items()}) or parts[-1])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with contextlib.suppress(datasets.UnreadableImage):      # half of the images are missing
            finetune.test_accuracy(net, tests, model, opt)
    scores, labels = (torch.cat([part[name] for part in parts]) for name in ("scores", "labels"))
    assert len(labels) == count == 256 and len(parts[0]["labels"]) == 128
    assert metrics.accuracy(scores, labels) == pytest.approx(whole)
    monkeypatch.setattr(finetune, "gather_batches",
                        lambda found, _: {name: torch.cat(x)[:127] for name, x in found.items()})
    with pytest.raises(datasets.UnreadableImage, match="129 of 256 images of toy cannot be read"):
        finetune.test_accuracy(net, tests, model, opt)
