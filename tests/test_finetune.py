"""Fine-tuning: groups, schedules and targets against the published numbers, copies against their
originals, augmentations against torchvision's, and a small run with shuffled labels as control."""
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
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
import evaluate
import vit
from lib import augment, checkpoints, config, datasets, distributed
from probes import common, finetune

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
BEIT = dict(pos="none", rel_pos="shared", layer_scale=0.1, qkv_bias="split", init="beit")
ROOT = Path(__file__).parent.parent


def encoder(seed=0, scramble=False, **config):
    torch.manual_seed(seed)
    net = vit.ViT(**{**SMALL, **config}).eval()
    for p in net.parameters() if scramble else []:
        p.data += 0.1 * torch.randn_like(p)              # as if trained: no zeros, no ones
    return net


def model(net):
    return SimpleNamespace(name="small", encoder=net, size=32, mean=augment.MEAN, std=augment.STD,
                           interpolation="bicubic", source=SimpleNamespace(path=None, branch=None))


def settings(*flags):
    args = evaluate.parse(["--task", "finetune", "--device", "cpu", "--precision", "fp32",
                           "--workers", "0", *flags])
    args.data = args.data or "cifar10"
    return args


def message(capsys, *flags):
    """The one line that a mistake earns on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(["--task", "finetune", "--device", "cpu", *flags]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ---- the optimiser ----


def groups_of(net):
    """{name of a parameter: (factor, weight decay)}"""
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: (group["factor"], group["weight_decay"])
            for group in finetune.layer_groups(net, 0.65, 0.05) for p in group["params"]}


def test_layer_decay_of_twelve_blocks_as_published():
    net = finetune.Classifier(finetune.restart(encoder(depth=12)), 10)
    factor = {name: f for name, (f, _) in groups_of(net).items()}
    assert set(factor) == {name for name, _ in net.named_parameters()}       # each, and once
    for name, value in {"head.weight": 1, "fc_norm.bias": 1, "encoder.blocks.11.norm1.weight": 0.65,
                        "encoder.blocks.11.mlp.fc2.weight": 0.65,
                        "encoder.blocks.0.attn.qkv.weight": 0.0057, "encoder.pos_embed": 0.0037,
                        "encoder.cls_token": 0.0037, "encoder.patch_embed.proj.bias": 0.0037,
                        }.items():
        assert factor[name] == pytest.approx(value, abs=5e-5)
    norm = finetune.Classifier(finetune.restart(encoder(depth=12), final_norm=True), 10, both=True)
    assert groups_of(norm)["encoder.norm.weight"] == (1, 0)


def test_matrices_decay_but_no_vectors_class_token_or_positions():
    net = finetune.Classifier(finetune.restart(encoder(**BEIT)), 10)
    decays = {name for name, (_, wd) in groups_of(net).items() if wd}
    assert decays == {"head.weight", "encoder.patch_embed.proj.weight"} | {
        f"encoder.blocks.{i}.{name}" for i in range(3) for name in (
            "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
            "attn.relative_position_bias_table")}
    positions = groups_of(finetune.Classifier(finetune.restart(encoder(pos="sincos_col")), 10))
    assert positions["encoder.pos_embed"][1] == 0        # fixed before, trained here, no decay


def test_the_schedule_of_simmim():
    simmim = [finetune.simmim_lr(epoch, 100, 5e-3, 1e-6, 20) for epoch in (0, 10, 19.999, 20, 100)]
    assert simmim == pytest.approx([1e-6, 2.5005e-3, 5e-3, 4.523e-3, 1e-6], rel=2e-4)


# ---- the copy that is trained ----


def test_recipes_are_those_of_the_sheet():
    columns = ("lr", "per", "batch", "epochs", "warmup", "clip", "augment")
    assert {name: tuple(r[c] for c in columns) for name, r in finetune.FINETUNE.items()} == {
        "mae": (5e-4, 256, 1024, 100, 5, None, "RandAugment"),
        "simmim": (1.25e-3, 512, 2048, 100, 20, 5.0, "RandAugment"),
        "mmc": (5e-4, 256, 4 * 64, 100, 5, None, "RandAugment")}
    assert finetune.MMC_ELSEWHERE == dict(batch=2 * 64, epochs=200, augment="ThreeAugment")
    assert (finetune.LAYER_DECAY, finetune.WEIGHT_DECAY, finetune.DROP_PATH) == (0.65, 0.05, 0.1)


@pytest.mark.parametrize("name, words", [("imagenet", "100 epochs, RandAugment,"),
                                         ("cifar10", "200 epochs, ThreeAugment,")])
def test_mmc_has_a_recipe_for_imagenet_and_one_for_all_else(monkeypatch, name, words):
    two_classes(monkeypatch, False)
    monkeypatch.setattr(finetune, "Progress", lambda *_: SimpleNamespace(    # all steps lie behind
        step=0, curve=[(0.0, 0.0)], steps=lambda *_: (), done=lambda: None))
    result = finetune.finetune(model(encoder()), settings("--data", name, "--recipe", "mmc"))
    assert words in result.protocol


def test_a_restarted_encoder_gives_the_same_tokens_and_shares_no_memory():
    x = torch.randn(2, 3, 32, 32)
    for arguments in (BEIT, dict(pos="sincos_col"), dict(class_token=False)):
        net = encoder(scramble=True, **arguments)
        copy = finetune.restart(net, final_norm=True).eval()
        torch.testing.assert_close(copy(x), net(x))
        memory = {p.data_ptr() for p in net.parameters()}
        assert not memory & {p.data_ptr() for p in copy.parameters()}
        assert all(p.requires_grad for p in copy.parameters())
    small = torch.randn(2, 3, 48, 48)                    # tables are resized, too
    net = encoder(scramble=True, **BEIT)
    torch.testing.assert_close(finetune.restart(net, final_norm=True).eval()(small), net(small))


def test_the_shared_table_becomes_one_for_each_block():
    net = encoder(scramble=True, **BEIT)
    tables = [block.attn.relative_position_bias_table for block in finetune.restart(net).blocks]
    shared = net.rel_pos_bias.relative_position_bias_table
    assert all(torch.equal(table, shared) for table in tables)
    tables[0].data.zero_()
    assert torch.equal(tables[1], shared) and shared.any()


@pytest.mark.parametrize("flag, anew", [("first:2", {0, 1}), ("last:1", {2}), ("first:0", set())])
@pytest.mark.parametrize("config", [{}, BEIT])
def test_reinit_draws_those_blocks_anew_and_nothing_else(flag, anew, config):
    net = encoder(scramble=True, **config)
    torch.manual_seed(5)
    fresh = vit.ViT(**{**net.config, "rel_pos": config and "block" or None})
    torch.manual_seed(5)
    copy = finetune.restart(net, finetune.blocks_anew(flag, 3), final_norm=True)
    kept, first = finetune.restart(net, final_norm=True).state_dict(), fresh.state_dict()
    for name, x in copy.state_dict().items():
        drawn = name.startswith(tuple(f"blocks.{i}." for i in anew))
        assert torch.equal(x, (first if drawn else kept)[name]), name
        assert not torch.equal(first[name], kept[name]) or name == "pos_embed"


def test_an_official_encoder_knows_how_its_blocks_were_drawn(tmp_path):
    net = encoder(pos="sincos_col", init="mae", num_heads=1, resize="size")
    state = {**net.state_dict(), "mask_token": torch.zeros(1, 1, 8),
             "decoder_pred.weight": torch.zeros(4, 8)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    assert checkpoints.load_encoder(tmp_path / "mae.pth").config["init"] == "mae"


def test_pooled_features_and_a_head_near_zero():
    net, x = encoder(scramble=True), torch.randn(2, 3, 32, 32)
    pat = finetune.Classifier(finetune.restart(net), 5).eval()
    raw = net.layers(x, [2], norm=False)[0][0]
    z = torch.nn.functional.layer_norm(raw[:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(pat(x), z @ pat.head.weight.T)
    both = finetune.Classifier(finetune.restart(net, final_norm=True), 5, both=True).eval()
    tokens = net(x)
    z = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(both(x), z @ both.head.weight.T)
    big = finetune.Classifier(finetune.restart(net), 1000).head
    assert big.weight.std().item() == pytest.approx(2e-5, rel=0.05) and not big.bias.any()


# ---- targets and augmentations ----


def test_mixed_and_smoothed_targets():
    torch.manual_seed(0)
    x, y = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16), torch.tensor([0, 1, 2, 2])
    kinds = set()
    for _ in range(40):
        mixed, target = finetune.mixing(5)(x, y)
        assert target.shape == (4, 5)
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        share = 1 - target[1, 1].item()                  # of image 0 in image 1
        assert target[1, 0].item() == pytest.approx(share, abs=1e-6)
        assert target[3, 2].item() == pytest.approx(1)   # 2 with 2
        assert mixed[1].mean().item() == pytest.approx(1 - share, abs=1e-5)
        kinds.add("cutmix" if mixed[1].unique().numel() <= 2 and set(
            mixed[1].unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert kinds == {"mixup", "cutmix"}
    # By hand: 0.7 of class 0 and 0.3 of class 1 of four, smoothed: .655, .295, .025, .025.
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    loss = finetune.soft_cross_entropy(scores, torch.tensor([[0.7, 0.3, 0.0, 0.0]]))
    log_sum = torch.logsumexp(scores, 1).item()
    assert loss.item() == pytest.approx(log_sum - (0.655 * 2 + 0.295 * 1 - 0.025), rel=1e-6)
    uniform = finetune.soft_cross_entropy(torch.zeros(3, 4), torch.eye(4)[:3])
    assert uniform.item() == pytest.approx(3 * 1.386294, rel=1e-6)           # a sum, not a mean


def test_shares_of_mixing_are_drawn_from_the_betas_of_the_recipes():
    """Mixup: Beta(a, a) has the variance 1 / (4 (2 a + 1)). Cutmix: of a side s, centred anywhere,
    s - s^2 / 4 lie within the picture on average, whose square is s^2 - 5/12 s^3 on average; for
    two sides and s^2 uniform that makes a variance of 0.1386 - 0.3208^2."""
    torch.manual_seed(0)
    x, y = torch.zeros(2, 1, 32, 32), torch.arange(2)
    for mix, variance in zip(finetune.mixing(2).transforms, (1 / (4 * 2.6), 0.0357)):
        shares = torch.stack([mix(x, y)[1][0, 0] for _ in range(300)])
        assert shares.var().item() == pytest.approx(variance, rel=0.2)


def test_rand_augment_is_torchvisions_at_nine_tenths_of_its_range():
    x = torch.randint(256, (20, 3, 24, 24), dtype=torch.uint8)
    torch.manual_seed(3)
    ours = finetune.rand_augment(x)
    torch.manual_seed(3)
    theirs = x.clone()
    one = v2.RandAugment(1, magnitude=27, interpolation=TF.InterpolationMode.BILINEAR,
                         fill=[124, 116, 104])
    for _ in range(2):
        order, dice = torch.randperm(20), torch.rand(20)
        for i in order[dice < 0.5].tolist():
            theirs[i] = one(theirs[i])
    assert torch.equal(ours, theirs / 255) and not torch.equal(ours, x / 255)
    strength = v2.RandAugment._AUGMENTATION_SPACE["Rotate"][0](31, 24, 24)
    assert strength[27].item() == pytest.approx(27)      # degrees of 30, as timm's 9 of 10


def test_rand_augment_leaves_as_many_pictures_alone_as_timms_of_the_recipe():
    auto = pytest.importorskip("timm.data.auto_augment")
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    x = F.interpolate(torch.rand(1000, 3, 5, 5), 24, mode="bicubic")       # not of full contrast
    x = (40 + 160 * x.clamp(0, 1)).to(torch.uint8)
    ours = (finetune.rand_augment(x) == x / 255).flatten(1).all(1).float().mean().item()
    augment = auto.rand_augment_transform("rand-m9-inc1")        # mstd: Pillow refuses its 0 bits
    images = [TF.to_pil_image(image) for image in x]
    theirs = sum(augment(image).tobytes() == image.tobytes() for image in images) / len(images)
    assert ours == pytest.approx(theirs, abs=0.07) and 0.2 < theirs < 0.35


def test_three_augment_does_one_of_three_and_jitters(monkeypatch):
    torch.manual_seed(0)
    x = torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8)
    y = finetune.three_augment(x)
    grey = (y - y.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 70 < grey.sum() < 130                         # a third; no jitter brings colour back
    assert y.min() >= 0 and y.max() <= 1 and not torch.equal(y, x / 255)
    strengths = []
    monkeypatch.setattr(augment, "jitter", lambda x, order, how: strengths.append(how) or x)
    y, z = finetune.three_augment(x), x / 255
    solarised = (y == torch.where(x >= 128, 1 - z, z)).flatten(1).all(1)
    smooth = y.std((2, 3)).amax(1) < 0.9 * z.std((2, 3)).amin(1)
    grey = (y == y[:, :1]).flatten(1).all(1)
    assert 70 < solarised.sum() < 130 and (smooth | solarised | grey).float().mean() > 0.95
    assert strengths[0].shape == (300, 3)
    assert 0.7 <= strengths[0].min() < 0.72 and 1.28 < strengths[0].max() <= 1.3


def test_erasing_puts_noise_into_a_box_of_a_quarter_of_the_images():
    torch.manual_seed(0)
    x = torch.full((800, 3, 32, 32), 7.0)
    changed = finetune.erase(x) != 7
    assert 150 < changed.any((1, 2, 3)).float().sum() < 250
    for mask in changed[changed.flatten(1).any(1)][:50]:
        rows, columns = mask.any(0).any(1).nonzero(), mask.any(0).any(0).nonzero()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert mask.all(0).sum() == box and 0.01 < box / 1024 < 0.36
    noise = finetune.erase(x, p=1.0)
    noise = noise[noise != 7]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


# ---- whole runs ----


def two_classes(monkeypatch, shuffled):
    """Pictures that a glance tells: reddish and bluish noise; or with labels by the coin."""
    g = torch.Generator().manual_seed(0)

    def load(name, root, split, size, limit, device):
        labels = torch.arange(256) % 2
        pixels = torch.randint(100, (256, 3, 32, 32), dtype=torch.uint8, generator=g)
        pixels[:, 0] += (120 * (labels == 0)).byte()[:, None, None]
        pixels[:, 2] += (120 * (labels == 1)).byte()[:, None, None]
        if shuffled:
            labels = labels[torch.randperm(256, generator=g)]
        return datasets.Images(name, split, ["red", "blue"], labels, pixels)

    monkeypatch.setattr(common, "load", load)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mae", "simmim", "mmc"])
def test_it_learns_what_is_there_and_leaves_the_encoder_alone(monkeypatch, recipe):
    net = encoder(**(BEIT if recipe == "simmim" else {}))
    before = {name: x.clone() for name, x in net.state_dict().items()}
    # Few steps ask for a larger lr than the recipe's.
    monkeypatch.setitem(finetune.FINETUNE, recipe, {**finetune.FINETUNE[recipe], "lr": 8e-3})
    args, found = settings("--recipe", recipe, "--epochs", "4"), []
    for shuffled in (False, True):
        with monkeypatch.context() as patch:
            two_classes(patch, shuffled)
            result = finetune.finetune(model(net), args)
        (feature, row), = result.rows.items()
        assert feature == ("cls+pat" if recipe == "mmc" else "pat")
        found.append(row["last epoch"])
    assert found[0] > 90 and 30 < found[1] < 70
    assert not net.training and all(torch.equal(x, before[name])
                                    for name, x in net.state_dict().items())
    assert ("ThreeAugment" if recipe == "mmc" else "RandAugment") in result.protocol
    assert "our choice" in result.protocol


def test_creatures_are_fine_tuned_for_minutes_and_whole(monkeypatch):
    two_classes(monkeypatch, False)
    monkeypatch.setattr(finetune, "score", lambda *_: (0.0, 0.0))
    targets, loss = [], finetune.soft_cross_entropy
    monkeypatch.setattr(finetune, "soft_cross_entropy",
                        lambda z, y: targets.append(y) or loss(z, y))
    crops, view, warmups, half = [], data.View, [], finetune.cosine
    monkeypatch.setattr(data, "View", lambda *a, **b: crops.append(b["scale"]) or view(*a, **b))
    monkeypatch.setattr(finetune, "cosine", lambda *a: warmups.append(a[4]) or half(*a))
    said = finetune.finetune(model(encoder()), settings("--data", "toy")).protocol
    assert ", 5 epochs, large crops and mirror alone, drop path" in said
    assert "batch 16, lr 0.00025 (both our choice" in said       # as of other sets: of the recipe's
    assert crops == [(0.6, 1.0)] and set(warmups) == {4}         # 5 % of 80 steps
    assert finetune.TOY["batch"] == 64
    assert {tuple(y) for y in torch.cat(targets).tolist()} == {(0.0, 1.0), (1.0, 0.0)}   # not mixed
    said = finetune.finetune(model(encoder()), settings("--data", "toy", "--epochs", "2")).protocol
    assert ", 2 epochs, large crops" in said


def test_parts_of_a_batch_make_the_same_step(monkeypatch):
    def loss_after(size):
        two_classes(monkeypatch, False)
        seen = []
        monkeypatch.setattr(finetune, "score", lambda net, *_: seen.append(
            [p.detach().clone() for p in net.parameters()]) or (0.0, 0.0))
        monkeypatch.setattr(finetune, "DROP_PATH", 0.0)  # drawn for each part
        result = finetune.finetune(model(encoder()),
                                   settings("--epochs", "1", "--batch-size", size))
        # 1/64 of 256 images is below the least batch; 2e-3 at 1024, times the root of 16/1024.
        assert "batch 16, lr 0.00025 (both our choice" in result.protocol
        return seen[0]

    whole, parts = loss_after("256"), loss_after("5")
    moved = max((a - b).abs().max().item() for a, b in zip(whole, parts))
    assert moved < 1e-5


@pytest.mark.parametrize("recipe, warmup, clip", [("mae", 1, None), ("simmim", 6, 5.0)])
def test_every_step_is_as_the_recipe_says(monkeypatch, recipe, warmup, clip):
    two_classes(monkeypatch, False)                      # 2 epochs of 16 batches
    seen = SimpleNamespace(lrs=[], clips=[], nets=[], targets=[], pictures=[], loaders=[])

    def noting(where, function):
        """The function, which keeps what it is given."""
        return lambda *a: (where.append(a), function(*a))[1]

    for name, where in (("Classifier", seen.nets), ("soft_cross_entropy", seen.targets),
                        ("erase", seen.pictures)):
        monkeypatch.setattr(finetune, name, noting(where, getattr(finetune, name)))
    monkeypatch.setitem(finetune.AUGMENT, "RandAugment", lambda x: x / 255)
    monkeypatch.setattr(data, "Loader", noting(seen.loaders, data.Loader))
    curve = [(20.0, 80.0), (30.0, 60.0)][::-1 if recipe == "mae" else 1]     # of the epochs
    left = iter(curve)
    monkeypatch.setattr(finetune, "score", lambda *_: next(left))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda _, norm: seen.clips.append(norm))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda opt: seen.lrs.append(
        {g["factor"]: g["lr"] for g in opt.param_groups}))                   # no weight moves
    net = encoder(scramble=True)
    m = model(net)
    m.mean, m.std = (0.5,) * 3, (0.25,) * 3              # of an official file, say
    result = finetune.finetune(m, settings("--recipe", recipe, "--epochs", "2", "--reinit",
                                           "last:1"))

    [(_, [crop], *_)] = seen.loaders
    assert crop.scale == (0.08, 1.0)
    assert result.rows == {"pat": {"top-1": 30, "top-5": 60, "last epoch": curve[1][0],
                                   "last top-5": curve[1][1]}}
    assert result.notes == [f"small: best epoch {curve.index((30, 60)) + 1} of 2"]
    peak = {"mae": 2e-3 * (16 / 1024)**0.5, "simmim": 5e-3 * (16 / 2048)**0.5}[recipe]

    def lr_at(step):
        if recipe == "simmim":
            return finetune.simmim_lr(step, 32, peak, 2e-4 * peak, warmup)
        down = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (step - 1) / 31)) / 2
        return down * (step > 0)                         # one step of warm-up, from 0

    assert len(seen.lrs) == 32 and seen.clips == [clip] * 32 * bool(clip)
    for number, lrs in enumerate(seen.lrs):
        assert lrs == {0.65**n: pytest.approx(lr_at(number) * 0.65**n) for n in range(5)}
    assert any((y.amax(1) < 1).any() for _, y in seen.targets)               # mixed
    x = torch.cat([x for x, in seen.pictures])
    assert len(x) == 512 and -2 <= x.min() < -1.9 and 1 < x.max() <= 2       # by its own mean
    [(copy, *_)] = seen.nets
    assert copy.config["drop_path"] == 0.1
    for name, x in copy.state_dict().items():            # the last block, and it alone, forgot
        assert torch.equal(x, net.state_dict()[name]) != name.startswith("blocks.2."), name


def test_positions_are_resampled_to_another_size_once(monkeypatch):
    two_classes(monkeypatch, False)
    m, nets = model(encoder()), []
    m.size = 48

    def stop(net, *_):
        nets.append(net)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "Classifier", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(m, settings())
    assert nets[0].config["img_size"] == 48 and nets[0].pos_embed.shape == (1, 37, 32)


def test_mistakes_get_one_sentence(capsys, tmp_path, monkeypatch):
    flags = "--baseline", "untrained", "--limit", "32", "--out", str(tmp_path)
    error = message(capsys, *flags, "--reinit", "first:99")
    assert "first:99" in error and "0 to 4" in error
    assert "first:N or last:N" in message(capsys, *flags, "--reinit", "middle")
    assert "mae, simmim, mmc" in message(capsys, *flags, "--recipe", "dino")
    assert "pixels" in message(capsys, *flags, "--baseline", "pixels")
    with pytest.raises(SystemExit) as stop:
        evaluate.parse(["--task", "finetune", "--recipe", "magic"])
    assert stop.value.code == 2 and "magic" in capsys.readouterr().err
    monkeypatch.setitem(finetune.FINETUNE, "mae", {**finetune.FINETUNE["mae"], "lr": float("nan")})
    error = message(capsys, *flags, "--epochs", "2")
    assert "not finite by step" in error and "--precision fp32" in error


def test_too_few_images_are_one_sentence_before_training(capsys, tmp_path, monkeypatch):
    flags = "--baseline", "untrained", "--out", str(tmp_path)
    error = message(capsys, *flags, "--limit", "10")
    assert ("finetune needs 16 training and 1 test images at least, and toy has 10 and 10: raise "
            "--limit or change --data") in error
    two_classes(monkeypatch, False)
    monkeypatch.setattr(distributed, "world_size", lambda: 300)
    monkeypatch.setattr(finetune, "Classifier", lambda *_: pytest.fail("has begun"))
    with pytest.raises(ValueError, match="needs 300 training and 300 test images at least, and"):
        finetune.finetune(model(encoder()), settings())
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    load = common.load
    monkeypatch.setattr(common, "load", lambda name, root, split, *more: (
        few(load(name, root, split, *more), 2) if split == "test" else load(name, root, split,
                                                                            *more)))
    with pytest.raises(ValueError, match="15 training and 3 test images at least, and cifar10 has "
                                         "256 and 2"):
        finetune.finetune(model(encoder()), settings())


def few(images, n):
    return replace(images, labels=images.labels[:n], pixels=images.pixels[:n])


def test_linear_names_its_own_recipes(capsys):
    with pytest.raises(ValueError, match="linear has no recipe mmc; choose --recipe mae, dino"):
        evaluate.linear(model(encoder()), settings("--recipe", "mmc", "--task", "linear"))


@pytest.mark.slow
def test_two_processes_write_one_line_and_other_tasks_run_in_one(tmp_path, torchrun):
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
    net = finetune.Classifier(finetune.restart(encoder()), 2)
    two_classes(monkeypatch, False)
    tests, args = replace(common.load("toy", None, "test", 32, None, None)), settings()
    training_then, sums = [], []
    net.head.register_forward_hook(lambda head, *_: training_then.append(head.training))
    whole = finetune.score(net, tests, model(net.encoder), args)
    assert training_then == [False] and net.training     # no drop path while scored, and then again
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_mean", lambda x: sums.append(x) or x)
    for number in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        finetune.score(net, tests, model(net.encoder), args)
    right = sum(sums)
    assert right[2] == 256 and (right[:2] / right[2]).tolist() == pytest.approx(whole)


# ---- killed, and on ----


class Killed(Exception):
    pass


def asked(task, folder, *flags):
    args = evaluate.parse(["--task", task, "--data", "toy", "--limit", "16", "--device", "cpu",
                           "--precision", "fp32", "--out", str(folder), *flags])
    return evaluate.TASKS[task](model(encoder()), args)


@pytest.mark.parametrize("task", ["finetune", "segmentation", "linear_segmentation", "pose",
                                  pytest.param("detection", marks=pytest.mark.slow)])
def test_a_probe_that_was_killed_goes_on(task, monkeypatch, tmp_path, capsys):
    if task == "detection":
        pytest.importorskip("pycocotools")
    length = ["--epochs", "4"] if task == "finetune" else ["--iters", "4"]   # 4 steps
    monkeypatch.setattr(common.Progress, "MINUTES", 0)                     # kept after each step
    step, left, betas = torch.optim.AdamW.step, [9], set()

    def counting(self, *more):
        if not left[0]:
            raise Killed
        left[0] -= 1
        betas.update(group["betas"] for group in self.param_groups)
        return step(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", counting)
    whole, folder = asked(task, tmp_path / "whole", *length), tmp_path / "killed"
    assert left == [5] and not any((tmp_path / "whole" / "progress").iterdir())
    assert betas == {(0.9, 0.999)}
    left[0] = 3
    with pytest.raises(Killed):
        asked(task, folder, *length)
    [file] = (folder / "progress").iterdir()
    capsys.readouterr()
    left[0] = 9
    orders, generator = [], common.rng.generator
    asked(task, folder, *length, "--seed", "1")          # another question, so from the start
    assert left == [5] and "goes on" not in capsys.readouterr().out
    monkeypatch.setattr(common.rng, "generator", lambda *key: (
        orders.append(key), generator(*key))[1])
    found = asked(task, folder, *length)
    assert left == [4] and f"{file}: goes on after step 3" in capsys.readouterr().out
    assert not file.exists()
    # In the epoch it was in, of one step (detection: two, after a first look); else in a new order.
    begins = [key[2] for key in orders if key[1] == "order"]
    assert begins[task == "detection"] == (1 if task == "detection" else 3)
    if task == "finetune":                               # the others see other pictures from there
        assert found.rows == whole.rows and found.notes == whole.notes


def test_progress_that_cannot_be_read_or_written_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common.Progress, "MINUTES", 0)

    def full(path, write):
        raise OSError(f"cannot write {path} (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_atomic", full)
        assert asked("finetune", tmp_path, "--epochs", "1").rows             # goes on nevertheless
    assert "No space left" in capsys.readouterr().err
    monkeypatch.setattr(common.Progress, "done", lambda self: None)
    asked("finetune", tmp_path, "--epochs", "1")
    [file] = (tmp_path / "progress").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="delete it, and finetune starts anew"):
        asked("finetune", tmp_path, "--epochs", "1")
