"""End-to-end segmentation: heads against their functional form, groups and schedule against the
published numbers, processes and workers against one, and a small run with shuffled labels as a
control."""
import functools
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_models import make_encoder, make_model, make_options
from torch import nn

import evaluate
from lib import config, rng, swin
from probes import annotations, label_crops, segmentation, training
from probes.figures import FigureRows
from probes.label_crops import Sizes

ROOT = Path(__file__).parent.parent
SMALL_VOC = Sizes(32, 24, (64, 32), (64, 32))


def small_model(**config):
    return make_model(make_encoder(0.1, **config))


def segmentation_options(*argv):
    return make_options("segmentation", *argv)


def scramble(net):
    """Noise on parameters and running statistics, as if trained: no zeros, no ones."""
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for name, x in net.named_buffers():
        if name.endswith("running_mean"):
            x.normal_()
        if name.endswith("running_var"):
            x.uniform_(0.5, 2)
    return net


def plant_two_classes(monkeypatch, shuffled=False):
    """Reddish and bluish squares instead of data; shuffled: with the labels of another image."""
    def read_items(name, root, split, limit, level, size):
        for number in range(32 if split == "train" else 8):
            side = torch.randint(2, (2, 2), generator=rng.generator(split, number))
            other = torch.randint(2, (2, 2), generator=rng.generator(split, number, "other"))
            side, other = (x.repeat_interleave(16, 0).repeat_interleave(16, 1)
                           for x in (side, other))
            image = torch.randint(100, (3, 32, 32), generator=rng.generator(number, "noise"))
            image[0] += 120 * (1 - side)
            image[2] += 120 * side
            yield SimpleNamespace(image=image.to(torch.uint8),
                                  labels=(other if shuffled else side).to(torch.uint8))

    monkeypatch.setattr(annotations, "segmentation", read_items)
    monkeypatch.setattr(annotations, "segmentation_classes", lambda *_: ["red", "blue"])
    monkeypatch.setitem(label_crops.SEGMENTATION_SIZES, "voc", SMALL_VOC)


# ---- heads ---------------------------------------------------------------------------------------


def conv_norm_relu(x, state, name):
    """Convolution without bias, batch norm by its running statistics, ReLU, step by step."""
    weight = state[f"{name}.0.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean, var, gain, shift = (state[f"{name}.1.{of}"][:, None, None] for of in (
        "running_mean", "running_var", "weight", "bias"))
    return ((x - mean) / (var + 1e-5).sqrt() * gain + shift).clamp(min=0)


def bilinear(x, shape):
    """Half-pixel bilinear resizing by two matrices, without F.interpolate."""
    def matrix(old, new):
        at = ((torch.arange(new) + 0.5) * old / new - 0.5).clamp(0, old - 1)
        return (1 - (at[:, None] - torch.arange(old)).abs()).clamp(min=0)            # (new, old)
    rows, columns = (matrix(o, n) for o, n in zip(x.shape[2:], shape))
    return rows @ x @ columns.T


def double(x):
    return bilinear(x, [2 * n for n in x.shape[2:]])


def classify(x, state, name="classify"):
    return torch.einsum("kd,bdhw->bkhw", state[f"{name}.1.weight"][..., 0, 0], x) + (
        state[f"{name}.1.bias"][:, None, None])


@torch.no_grad()
def test_semantic_fpn_is_the_published_head():
    torch.manual_seed(0)
    head = scramble(segmentation.SemanticFPN([12] * 4, 5, neck=8, channels=6)).eval()
    maps, state = [torch.randn(2, 12, 5, 7) for _ in range(4)], head.state_dict()
    x = [F.conv2d(m, state[f"laterals.{i}.weight"], state[f"laterals.{i}.bias"])
         for i, m in enumerate(maps)]
    x = [x[0] + x[1] + x[2] + x[3], x[1] + x[2] + x[3], x[2] + x[3], x[3]]   # top-down
    x = [F.conv2d(m, state[f"smooth.{i}.weight"], state[f"smooth.{i}.bias"], padding=1)
         for i, m in enumerate(x)]
    total = conv_norm_relu(x[0], state, "levels.0")      # nominal stride 4: 1 block, no upsampling
    for level, count in ((1, 1), (2, 2), (3, 3)):        # 8, 16, 32: 1, 2, 3 blocks
        z = x[level]
        for i in range(count):
            z = double(conv_norm_relu(z, state, f"levels.{level}.{2 * i}"))
        total = total + bilinear(z, (5, 7))
    [found] = head(maps)
    torch.testing.assert_close(found, classify(total, state), rtol=1e-4, atol=1e-4)
    assert head.classify[0].p == 0.1 and isinstance(head.classify[0], nn.Dropout2d)


def upsampled(x, state, name):
    """Transposed convolution of 2 x 2 with stride 2: each pixel becomes four, independently."""
    out = torch.einsum("bdhw,dkij->bkhiwj", x, state[f"{name}.weight"])
    return out.flatten(4, 5).flatten(2, 3) + state[f"{name}.bias"][:, None, None]


@torch.no_grad()
@pytest.mark.parametrize("patch", [16, 8])
def test_upernet_is_the_published_head(patch):
    torch.manual_seed(0)
    head = scramble(segmentation.UPerNet([12] * 4, 5, patch, channels=6, aux=4)).eval()
    head.training = True                                 # the auxiliary head, but no dropout
    maps, s = [torch.randn(2, 12, 8, 12) for _ in range(4)], head.state_dict()
    if patch == 16:
        z = upsampled(maps[0], s, "pyramid.0.0")
        mean, var, gain, shift = (s[f"pyramid.0.1.{of}"][:, None, None] for of in (
            "running_mean", "running_var", "weight", "bias"))
        z = F.gelu((z - mean) / (var + 1e-5).sqrt() * gain + shift)
        x = [upsampled(z, s, "pyramid.0.3"), upsampled(maps[1], s, "pyramid.1"), maps[2],
             maps[3].unflatten(3, (6, 2)).unflatten(2, (4, 2)).amax((3, 5))]
    else:
        x = [upsampled(maps[0], s, "pyramid.0"), maps[1],
             maps[2].unflatten(3, (6, 2)).unflatten(2, (4, 2)).amax((3, 5)),
             maps[3].unflatten(3, (3, 4)).unflatten(2, (2, 4)).amax((3, 5))]
    for level, stride in zip(x, (4, 8, 16, 32)):         # of an image of 8 p x 12 p pixels
        assert level.shape == (2, 12, 8 * patch // stride, 12 * patch // stride)

    def pooled(x, n):                                    # cells may overlap
        h, w = x.shape[2:]
        return torch.stack([torch.stack([
            x[:, :, i * h // n:-(-(i + 1) * h // n), j * w // n:-(-(j + 1) * w // n)].mean((2, 3))
            for j in range(n)], 2) for i in range(n)], 2)

    top = [x[3]] + [bilinear(conv_norm_relu(pooled(x[3], n), s, f"pools.{i}"), x[3].shape[2:])
                    for i, n in enumerate((1, 2, 3, 6))]
    y = [conv_norm_relu(x[i], s, f"laterals.{i}") for i in range(3)]
    y.append(conv_norm_relu(torch.cat(top, 1), s, "context"))
    for i in (2, 1, 0):
        y[i] = y[i] + bilinear(y[i + 1], y[i].shape[2:])
    y = [conv_norm_relu(y[i], s, f"smooth.{i}") for i in range(3)] + y[3:]
    y = conv_norm_relu(torch.cat([bilinear(z, y[0].shape[2:]) for z in y], 1), s, "fuse")
    second = conv_norm_relu(x[2], s, "auxiliary.0")
    found = head(maps)
    assert len(found) == 2
    torch.testing.assert_close(found[0], classify(y, s), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], classify(second, s, "auxiliary.1"), rtol=1e-4, atol=1e-4)
    assert len(head.eval()(maps)) == 1


def test_heads_have_the_published_widths():
    with torch.device("meta"):
        fpn = segmentation.SemanticFPN([384] * 4, 150)
        uper = segmentation.UPerNet([768] * 4, 150)
    assert [x.out_channels for x in (*fpn.laterals, *fpn.smooth)] == [256] * 8
    assert fpn.classify[1].weight.shape == (150, 128, 1, 1)
    assert uper.context[0].weight.shape == (512, 768 + 4 * 512, 3, 3)
    assert uper.fuse[0].weight.shape == (512, 2048, 3, 3)
    assert uper.auxiliary[0][0].weight.shape == (256, 768, 3, 3)
    assert uper.classify[1].weight.shape == (150, 512, 1, 1)
    layer = segmentation.make_classifier(512, 150)[1]
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05) and not layer.bias.any()


@torch.no_grad()
def test_the_head_gets_raw_blocks_as_maps_and_logits_have_the_size_of_the_image():
    encoder = make_encoder(0.1)
    net, maps = segmentation.Segmenter(encoder, [0, 1, 1, 2], "fpn", 5, 32, True).eval(), []
    logits = torch.randn(2, 5, 5, 3)
    net.head.forward = lambda x: maps.extend(x) or [logits]
    x = torch.randn(2, 3, 35, 22)
    [found] = net(x)
    outputs, _ = encoder.layers(F.pad(x, (0, 2, 0, 5)), [0, 1, 2], norm=False)
    for tokens, number in zip(maps, (0, 1, 1, 2)):
        expected = outputs[number][:, 1:].unflatten(1, (5, 3)).permute(0, 3, 1, 2)
        torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(found, bilinear(logits, (40, 24))[:, :, :35, :22])
    larger = segmentation.Segmenter(encoder, [0, 1, 1, 2], "fpn", 5, 44, True)
    assert larger.encoder.grid == (6, 6)


@torch.no_grad()
@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_heads_take_the_stages_of_a_swin_as_they_are(head):
    torch.manual_seed(0)
    encoder = swin.Swin(64, 2, 16, (2, 1, 1, 1), (1, 2, 4, 8)).eval()
    net, maps = segmentation.Segmenter(encoder, [0, 1, 2, 3], head, 5, 64, True).eval(), []
    forward = net.head.forward
    net.head.forward = lambda x: (maps.extend(x), forward(x))[1]
    x = torch.randn(2, 3, 60, 37)
    [found] = net(x)
    assert found.shape == (2, 5, 60, 37)
    outputs, _ = encoder.layers(F.pad(x, (0, 11, 0, 4)), norm=False)
    for tokens, z, width, stride in zip(maps, outputs, (16, 32, 64, 128), (2, 4, 8, 16)):
        assert tokens.shape == (2, width, 64 // stride, 48 // stride)
        assert torch.equal(tokens.flatten(2).mT, z)
    if head == "upernet":                                # no layer makes other strides
        assert not list(net.head.pyramid.parameters())
        net.head.training = True
        logits, auxiliary = forward(maps)
        assert logits.shape[2:] == (32, 24) and auxiliary.shape[2:] == (8, 6)


# ---- batch norm ----------------------------------------------------------------------------------


def test_batch_norm_is_torchs_and_can_be_made_synchronous():
    torch.manual_seed(0)
    ours, theirs, x = segmentation.BatchNorm2d(6), nn.BatchNorm2d(6), torch.randn(4, 6, 5, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ours))
    assert isinstance(net[0], nn.SyncBatchNorm)
    torch.testing.assert_close(net(x), theirs(x))


# ---- the optimizer -------------------------------------------------------------------------------


def test_groups_of_heads_and_encoder_are_the_published_ones():
    net = segmentation.Segmenter(make_encoder(0.1, depth=12), [3, 5, 7, 11], "upernet", 5, 32, True)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = training.layer_decay_groups(net.named_parameters(), 12, 0.65, 0.05)
    found = {names[id(p)]: (group["factor"], group["weight_decay"])
             for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    for name, (factor, decay) in {
            "encoder.pos_embed": (0.65**13, 0), "encoder.cls_token": (0.65**13, 0),
            "encoder.patch_embed.proj.weight": (0.65**13, 0.05),
            "encoder.blocks.0.attn.qkv.weight": (0.65**12, 0.05),
            "encoder.blocks.11.norm1.weight": (0.65, 0),
            "encoder.blocks.11.mlp.fc2.bias": (0.65, 0), "head.pyramid.0.weight": (1, 0.05),
            "head.pyramid.0.bias": (1, 0), "head.fuse.0.weight": (1, 0.05),
            "head.fuse.1.weight": (1, 0), "head.auxiliary.1.1.bias": (1, 0)}.items():
        assert found[name] == (pytest.approx(factor), decay), name
    assert all(factor == 1 for factor, _ in (found[n] for n in found if n.startswith("head.")))


def test_the_schedule_is_that_worked_out_by_hand():
    assert (label_crops.CROPS_PER_BATCH, label_crops.WARMUP_ITERS) == (16, 1500)
    found = [label_crops.poly_lr(step, 40000, 6e-5, 1500)
             for step in (0, 750, 1500, 20000, 39999)]
    assert found == pytest.approx([6e-11, 6e-5 * 0.98125 * 0.5000005, 6e-5 * 0.9625, 3e-5, 1.5e-9])


@pytest.mark.parametrize("flags, lr, decay, factors, words", [
    ("--head fpn", 6e-5, 0.01, {1.0}, ["blocks 3 6 9 12 of 12", "40,000)", "whole images"]),
    ("--head upernet", 1e-4, 0.05, {0.65**i for i in range(14)},
     ["blocks 4 6 8 12 of 12", "160,000)", "windows of 32 px, stride 24"]),
    ("--head upernet --recipe selfpatch --lr 3e-4", 3e-4, 0.01, {1.0}, ["160,000)", "lr 0.0003"])])
def test_recipes_are_the_published_ones(monkeypatch, flags, lr, decay, factors, words):
    plant_two_classes(monkeypatch)
    steps, optimizers, windows = [], [], []
    monkeypatch.setattr(segmentation.SemanticFPN.__init__, "__defaults__", (8, 4))   # for speed
    monkeypatch.setattr(segmentation.UPerNet.__init__, "__defaults__", (16, 8, 4))

    class AdamW(torch.optim.AdamW):
        def step(self):
            steps.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
            super().step()
            optimizers.append(self)

    def score(predict, items, names, model, sizes, n_figures=0):
        windows.append(sizes.crop)
        return [torch.eye(2, dtype=torch.int64)], FigureRows(0), 1

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(segmentation, "score_segmentation", score)
    opt = segmentation_options("--data", "voc", "--iters", "2", *flags.split())
    report = segmentation.segmentation(small_model(depth=12, embed_dim=8), opt)
    assert {weight_decay for _, weight_decay in steps[1]} == {0, decay}
    assert sorted({rate for rate, _ in steps[1]}) == pytest.approx(    # halfway down; no warmup
        sorted(lr / 2 * factor for factor in factors))
    assert all(p.grad is None for group in optimizers[-1].param_groups for p in group["params"])
    assert all(word in report.protocol for word in words), report.protocol
    assert windows == [64 if "fpn" in flags else 32]
    assert report.rows[opt.head] == {"mIoU": 100, "mAcc": 100, "aAcc": 100}


# ---- batches -------------------------------------------------------------------------------------


def test_processes_and_workers_together_read_what_one_process_reads(monkeypatch):
    plant_two_classes(monkeypatch)

    def crops(workers, rank, world):
        opt = segmentation_options("--data", "voc", "--workers", str(workers))
        return list(label_crops.load_crops(small_model(), opt, SMALL_VOC, ["red", "blue"],
                                            range(3), rank=rank, world=world))

    whole = crops(0, 0, 1)
    assert whole[0][0].shape == (16, 3, 32, 32) and not whole[0][0].equal(whole[1][0])
    for workers, rank, world in ((2, 0, 1), (0, 0, 2), (2, 1, 2)):
        for step, batch in enumerate(crops(workers, rank, world)):
            for own, all_crops in zip(batch, whole[step], strict=True):
                assert own.equal(all_crops[rank::world])


def test_a_damaged_file_is_reported_in_one_sentence_even_from_a_worker(monkeypatch):
    plant_two_classes(monkeypatch)
    read = annotations.segmentation

    def read_one(*args):
        yield next(read(*args))
        raise ValueError("cannot read x.jpg")

    monkeypatch.setattr(annotations, "segmentation", read_one)
    with pytest.raises(ValueError, match="^cannot read x.jpg$"):
        segmentation.segmentation(small_model(),
                                  segmentation_options("--data", "voc", "--workers", "1"))


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_planted_classes_are_learned_and_the_given_encoder_does_not_change(monkeypatch, head):
    monkeypatch.setattr(label_crops, "CROPS_PER_BATCH", 8)                  # for speed
    model, scores = small_model(), []
    before = {name: x.clone() for name, x in model.encoder.state_dict().items()}
    for shuffled in (False, True):
        plant_two_classes(monkeypatch, shuffled)
        report = segmentation.segmentation(model, segmentation_options(
            "--head", head, "--iters", "12", "--lr", "1e-2"))
        scores.append(report.rows[head]["mAcc"])
    assert scores[0] > 90 and 35 < scores[1] < 65
    assert not model.encoder.training and report.images == {"test": 8}
    assert all(x.equal(before[name]) for name, x in model.encoder.state_dict().items())


def logits_after_two_steps(monkeypatch, *argv):
    """Of a run in which crops do not depend on each other; and its report."""
    predictors = []
    with monkeypatch.context() as patch:
        plant_two_classes(patch)
        patch.setattr(segmentation, "BatchNorm2d", functools.partial(nn.GroupNorm, 1))
        patch.setattr(segmentation, "DROP_PATH", 0.0)
        patch.setattr(segmentation, "DROPOUT", 0.0)
        patch.setattr(segmentation, "score_segmentation", lambda predict, *rest: (
            predictors.append(predict), ([torch.eye(2)], FigureRows(0), 1))[1])
        report = segmentation.segmentation(small_model(),
                                           segmentation_options("--iters", "2", *argv))
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    return predictors[0](x), report


def test_gradient_accumulation_makes_the_same_step_except_for_batch_norm(monkeypatch):
    (whole, _), (parts, report) = (logits_after_two_steps(monkeypatch, "--batch-size", n)
                                   for n in ("16", "3"))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert "batch norm over 2 crops at a time, not 16" in report.notes[0]
    other, _ = logits_after_two_steps(monkeypatch, "--seed", "1")
    assert not torch.allclose(other, whole, rtol=1e-2, atol=1e-2)


def test_the_auxiliary_loss_has_a_weight_of_two_fifths(monkeypatch, capsys):
    plant_two_classes(monkeypatch)
    monkeypatch.setattr(segmentation, "segmentation_loss", lambda logits, y: 1 + 0 * logits.sum())
    for head, loss in (("fpn", "1.000"), ("upernet", "1.400")):
        segmentation.segmentation(small_model(),
                                  segmentation_options("--head", head, "--iters", "1"))
        assert f"loss {loss}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, expected", [
    ("--baseline pixels", "segmentation needs tokens, and pixels have none"),
    ("--head attentive", "no head attentive; choose --head fpn, upernet"),
    ("--recipe mae", "segmentation has no recipe mae; choose --recipe selfpatch"),
    ("--lr 1e-3 1e-2", "one --lr at a time"), ("--batch-size 1", "--batch-size 2 or more"),
    ("--data cifar10", "no segmentation of 'cifar10' here"),
    ("--data voc --data-root x", "No voc under x: expected"),
    ("--train-batch-size 1", "--train-batch-size 2 or more"),
    ("--level scene", "no level 'scene' of toy"),
    ("--lr 1e38 --iters 2 --img-size 32", "the loss is not finite at step 2 of 2"),
    ("--lr nan", "argument --lr: expected a number of at least 0, not 'nan'"),
    ("--swap-sides", "--swap-sides: no classes of toy are left and right"),
    ("--task part_classification --head fpn", "no head fpn; choose --head linear, attentive")])
def test_user_errors_are_one_sentence(capsys, tmp_path, flags, expected):
    flags = ["--baseline", "untrained", "--limit", "4", "--out", str(tmp_path), *flags.split()]
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(["--task", "segmentation", "--device", "cpu", *flags]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert expected in error


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--head fpn --level part --show", "--head upernet"])
def test_it_runs_on_toy(tmp_path, flags, capsys):
    evaluate.main(["--task", "segmentation", "--baseline", "untrained", "--limit", "32", "--iters",
                   "2", "--out", str(tmp_path), "--device", "cpu", "--reference", *flags.split()])
    line, = (tmp_path / "results.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["metrics"].keys() == {flags.split()[1]} and row["images"] == {"test": 32}
    assert len(list(tmp_path.glob("segmentation-toy-part-untrained.png"))) == ("part" in flags)
    assert "SelfPatch (SelfPatch, suppl. table 1, ViT-S; ade20k)" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, torchrun, monkeypatch, capsys):
    flags = ["--task", "segmentation", "--head", "upernet", "--baseline", "untrained", "--limit",
             "33", "--device", "cpu", "--precision", "fp32", "--iters", "4", "--img-size", "64"]
    script = tmp_path / "run.py"
    script.write_text(
        "import evaluate, sys\nfrom lib import config\nfrom probes import segmentation\n"
        "segmentation.DROP_PATH = segmentation.DROPOUT = 0.0\n"   # random in each process
        "config.main(lambda: evaluate.main(sys.argv[1:]))\n")
    done = subprocess.run(
        [*torchrun, str(script), *flags, "--out", str(tmp_path / "two")], cwd=ROOT, text=True,
        capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(segmentation, "DROP_PATH", 0.0)
    monkeypatch.setattr(segmentation, "DROPOUT", 0.0)
    evaluate.main([*flags, "--out", str(tmp_path / "one")])
    found = []
    for out, name in ((capsys.readouterr().out, "one"), (done.stdout, "two")):
        line, = (tmp_path / name / "results.jsonl").read_text().splitlines()
        assert json.loads(line)["images"]["test"] == 33
        found.append((json.loads(line)["metrics"]["upernet"], [
            float(text.split()[3]) for text in out.splitlines() if text.startswith("step ")]))
    (one, losses), (two, same) = found
    assert len(losses) == 4 and len(set(losses)) > 1
    assert same == pytest.approx(losses, abs=2e-3) and two == pytest.approx(one, abs=0.2)


# ---- the papers' numbers -------------------------------------------------------------------------


def test_published_numbers_of_dense_probes_have_the_names_of_their_columns():
    def row(task, data, start):
        return next(result.report.rows for result in evaluate.paper_results(task, data)
                    if result.model.startswith(start))

    assert row("segmentation", "ade20k", "SelfPatch (SelfPatch, suppl. table 1") == {
        "fpn": {"mIoU": 41.2, "mAcc": 52.1, "aAcc": 80.7}}
    assert row("linear_segmentation", "pascal", "BEiT (Zhu et al., table 8, 193") == {
        "blocks 4 6 8 12": {"mIoU": 14.8, "mAcc": 21.4, "aAcc": 47.0}}
    assert row("linear_segmentation", "voc", "MMC") == {"blocks 6 8 10 12": {"mIoU": 77.7}}
    assert row("zero_shot_segmentation", "coco", "MMC")["mean over targets"]["Opt"] == 38.4
    assert row("video", "davis", "MMC (MMC, table 2, ViT-B") == {
        "patches": {"J&F": 63.8, "J": 61.8, "F": 65.6}}
    assert row("pose", "coco", "CAE") == {
        "patches": {"AP": 17.5, "AP50": 50.1, "AR": 28.9, "AR50": 64.0}}
