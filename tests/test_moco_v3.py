"""MoCo v3 against the closed forms of its paper and the layout of the official code."""
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import moco_v3
from lib import config, positions, visualize
from lib.run import Run, ema_update

TINY = """--img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 2 --mlp-dim 32
          --out-dim 16 --batch-size 8 --workers 0 --evals 0 --precision fp32 --device cpu
          --data synthetic""".split()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def settings(*flags):
    return config.parse(moco_v3.Config, [*TINY, *flags])


def networks(*flags):
    cfg = settings(*flags)
    student, teacher = moco_v3.Network(cfg), moco_v3.Network(cfg, teacher=True)
    teacher.requires_grad_(False)
    ema_update(teacher, student, 0.0)
    return student, teacher


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def symmetric(q1, q2, k1, k2, tau=0.2):
    return moco_v3.contrastive_loss(q1, k2, tau) + moco_v3.contrastive_loss(q2, k1, tau)


def train(monkeypatch, out, steps, *flags):
    """A run in this process -> what it saved in last.pt."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["moco_v3.py", *TINY, "--warmup-epochs", "0", "--lr", "0.1",
                                      "--steps", str(steps), "--out", str(out), *flags])
    moco_v3.main()
    return torch.load(out / "last.pt", weights_only=True)["state"]


# ---- the loss: closed forms of the paper ---------------------------------------------------------


@pytest.mark.parametrize("N, expected", [(4, 1.10904), (4096, 6.6542)])
def test_loss_of_collapsed_features_is_4_tau_log_of_the_batch(N, expected):
    z = torch.ones(N, 3)
    assert symmetric(z, z, z, z).item() == pytest.approx(expected, abs=2e-5 * expected)


def test_loss_of_perfect_orthogonal_features():
    z = torch.eye(4, 8)
    assert symmetric(z, z, z, z).item() == pytest.approx(0.0160098, abs=1e-6)
    assert 0.8 * math.log(1 + 3 * math.exp(-5)) == pytest.approx(0.0160098, abs=1e-6)


def test_loss_equals_equation_1_term_by_term():
    q, k, tau, total = unit(5, 6), unit(5, 6, seed=1), 0.2, 0.0
    for i in range(5):
        logits = [math.exp(q[i] @ k[j] / tau) for j in range(5)]
        total -= 2 * tau * math.log(logits[i] / sum(logits)) / 5
    assert moco_v3.contrastive_loss(q, k, tau).item() == pytest.approx(total, abs=1e-6)
    assert moco_v3.contrastive_loss(q, k.flip(0), tau).item() != pytest.approx(total, abs=1e-2)


def test_loss_ignores_lengths():
    q1, q2, k1, k2 = (unit(6, 8, seed=s) for s in range(4))
    loss = symmetric(q1, q2, k1, k2)
    longer = [z * (0.1 + torch.rand(6, 1)) for z in (q1, q2, k1, k2)]
    assert torch.allclose(loss, symmetric(*longer), atol=1e-6)
    assert not torch.allclose(loss, symmetric(q1, q2, k2, k1), atol=1e-3)     # own view's keys


def test_halves_of_a_batch_with_gathered_keys_have_the_loss_of_the_whole():
    q, k = unit(8, 6), unit(8, 6, seed=1)
    whole = moco_v3.contrastive_loss(q, k, 0.2)
    halves = [moco_v3.contrastive_loss(q[i:i + 4], k, 0.2, first=i) for i in (0, 4)]
    assert torch.allclose(whole, sum(halves) / 2, atol=1e-6)
    shifted = (halves[0] + moco_v3.contrastive_loss(q[4:], k, 0.2)) / 2     # without the offset
    local = sum(moco_v3.contrastive_loss(q[i:i + 4], k[i:i + 4], 0.2) for i in (0, 4)) / 2
    assert not torch.allclose(whole, shifted, atol=1e-2)
    assert not torch.allclose(whole, local, atol=1e-2)


# ---- the networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("D, parameters", [(384, 21_665_664), (768, 85_798_656)])
def test_parameter_counts_are_the_published_ones(D, parameters):
    cfg = config.parse(moco_v3.Config, ["--data", "imagenet", "--embed-dim", str(D)])
    with torch.device("meta"):
        student, teacher = moco_v3.Network(cfg), moco_v3.Network(cfg, teacher=True)

    def count(module, trainable=False):
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)

    backbone = student.backbone
    assert cfg.num_heads == 12
    assert count(backbone) == parameters      # pos_embed, stored but never trained, is one of them
    if D == 768:
        assert count(student.projector) == 20_987_904
        assert count(student.predictor) == 2_105_344
        assert count(student) + count(teacher) == 215_678_464
        assert count(student, trainable=True) == 108_150_016


def test_shapes_and_normalized_output_over_the_batch_of_a_view():
    student, teacher = networks()
    x1, x2 = torch.randn(2, 8, 3, 32, 32)
    q, k = student(x1, 3 * x2), teacher(x1, 3 * x2)
    for z in (*q, *k):
        assert z.shape == (8, 16)
        assert torch.allclose(z.mean(0), torch.zeros(16), atol=1e-5)
        assert torch.allclose(z.var(0, unbiased=False), torch.ones(16), atol=1e-2)
    both = student.predictor(student.projector(student.backbone(torch.cat([x1, 3 * x2]))[:, 0]))
    assert not torch.allclose(both, torch.cat(q), atol=1e-2)           # norms over both views


def test_state_dict_has_the_official_layers():
    student, teacher = (net.state_dict() for net in networks())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    heads = {"projector": {0: ["weight"], 1: norm, 3: ["weight"], 4: norm, 6: ["weight"],
                           7: norm[2:]},
             "predictor": {0: ["weight"], 1: norm, 3: ["weight"], 4: norm[2:]}}
    for head, layers in heads.items():
        expected = {f"{head}.{i}.{name}" for i, names in layers.items() for name in names}
        assert {key for key in student if key.startswith(head)} == expected
    assert not any(key.startswith("predictor") for key in teacher)
    assert student.keys() - teacher.keys() == {key for key in student if "predictor" in key}


def test_initial_weights_are_the_official_ones():
    student = moco_v3.Network(settings("--embed-dim", "96"))
    backbone, D = student.backbone, 96
    for weight, bound in ((backbone.blocks[0].attn.qkv.weight, math.sqrt(6 / (2 * D))),
                          (backbone.patch_embed.proj.weight, math.sqrt(6 / (3 * 64 + D))),
                          (backbone.blocks[0].mlp.fc1.weight, math.sqrt(6 / (5 * D))),
                          (student.projector[0].weight, 1 / math.sqrt(D))):    # library default
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not backbone.patch_embed.proj.bias.any()
    assert 0 < backbone.cls_token.abs().max() < 1e-5


def test_positions_are_rows_first():
    table = networks()[0].backbone.pos_embed[0]
    assert not table[0].any()
    grid, half = table[1:].view(4, 4, 24), 12
    assert torch.equal(grid[:, :1, :half].expand(-1, 4, -1), grid[..., :half])
    assert torch.equal(grid[:1, :, half:].expand(4, -1, -1), grid[..., half:])
    mae = positions.sincos(24, (4, 4), "sincos_col")
    assert torch.allclose(table[1:], mae.roll(half, 1), atol=1e-6)
    assert (table[1:] - mae).abs().max() > 1                                  # not interchangeable


# ---- gradients and the teacher -------------------------------------------------------------------


def test_who_gets_a_gradient():
    student, teacher = networks()
    x1, x2 = torch.randn(2, 8, 3, 32, 32)
    symmetric(*student(x1, x2), *teacher(x1, x2)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    cancel = ("backbone.norm.bias", "qkv.bias")            # by batch norm; the key third by softmax
    for name, p in student.named_parameters():
        if name == "backbone.pos_embed" or "patch_embed" in name:
            assert p.grad is None, name
        elif not name.endswith(cancel):
            assert p.grad.abs().sum() > 0, name
    student, _ = networks("--stop-grad-conv1", "false")
    sum((q * torch.randn(8, 16)).sum() for q in student(x1, x2)).backward()
    assert student.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
    assert student.backbone.patch_embed.proj.bias.grad is not None


def test_teacher_is_an_average_of_parameters_and_begins_equal():
    student, teacher = networks()
    weights = dict(student.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in teacher.named_parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    old = {name: p.clone() for name, p in teacher.named_parameters()}
    ema_update(teacher, student, 1.0)
    assert all(torch.equal(p, old[name]) for name, p in teacher.named_parameters())
    ema_update(teacher, student, 0.9)
    for name, p in teacher.named_parameters():
        assert torch.allclose(p, 0.9 * old[name] + 0.1 * weights[name], atol=1e-6)


def test_without_momentum_the_teacher_is_the_student_before_the_step(monkeypatch, tmp_path):
    one = train(monkeypatch, tmp_path / "one", 1)["student"]
    state = train(monkeypatch, tmp_path / "two", 2, "--momentum-teacher", "0")
    student, teacher = state["student"], state["teacher"]
    trained = [name for name in teacher if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(teacher[name], one[name]) for name in trained)
    moved = {name for name in trained if not torch.equal(teacher[name], student[name])}
    frozen = {name for name in trained if "pos_embed" in name or "patch_embed" in name}
    assert moved == set(trained) - frozen
    assert frozen == {"backbone.pos_embed", *(f"backbone.patch_embed.proj.{name}"
                                              for name in ("weight", "bias"))}


def test_a_step_contrasts_each_query_with_the_other_views_keys(monkeypatch, tmp_path):
    outputs, pairs, momenta, logged = [], [], [], {}
    forward, contrastive_loss = moco_v3.Network.forward, moco_v3.contrastive_loss
    monkeypatch.setattr(moco_v3.Network, "forward", lambda net, *views: (
        outputs.append(forward(net, *views)), outputs[-1])[1])
    monkeypatch.setattr(moco_v3, "contrastive_loss", lambda q, k, tau, first=0: (
        pairs.append((q, k, tau, first)), contrastive_loss(q, k, tau, first))[1])
    monkeypatch.setattr(moco_v3, "ema_update", lambda *args: (
        momenta.append(args[2]), ema_update(*args))[1])
    monkeypatch.setattr(Run, "log", lambda run, **values: logged.update(values))
    train(monkeypatch, tmp_path, 2, "--momentum-teacher", "0.99", "--temperature", "0.2")
    (q1, q2), (k1, k2) = outputs[-2:]
    assert len(pairs) == 4
    for (q, k, tau, first), (mine, key) in zip(pairs[-2:], ((q1, k2), (q2, k1)), strict=True):
        assert torch.equal(q, mine) and torch.equal(k, key) and (tau, first) == (0.2, 0)
    for k in (k1, k2):                                        # by the statistics of its own batch
        assert not k.requires_grad and torch.allclose(k.mean(0), torch.zeros(16), atol=1e-5)
    assert momenta == [0.0, 0.99, pytest.approx(0.995)]       # the copy, then up to 1
    assert torch.allclose(logged["loss"], symmetric(q1, q2, k1, k2))
    assert logged["lr"] == pytest.approx(0.1 * 8 / 256 / 2)   # half a cosine, half way


@pytest.mark.parametrize("feat_std, loss, warning", [     # loss: relative to chance level
    (0.045, 1.01, True), (0.045, 0.93, False), (0.3, 1.0, False)])
def test_collapse_shows_in_feat_std_and_loss_together(
        feat_std, loss, warning, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {"feat_std": torch.tensor(feat_std)})
    monkeypatch.setattr(moco_v3, "contrastive_loss", lambda q, k, tau, first: (
        0 * q.sum() + loss * 2 * tau * math.log(8)))
    train(monkeypatch, tmp_path, 1, "--evals", "1")
    assert ("collapsed" in capsys.readouterr().out) == warning


# ---- the recipe ----------------------------------------------------------------------------------


def test_schedules_against_the_closed_forms():
    cfg = config.parse(moco_v3.Config, ["--data", "imagenet"])
    peak = 1.5e-4 * 4096 / 256
    at = {epoch: moco_v3.schedules(10 * epoch, 3000, 400, cfg) for epoch in (0, 20, 40, 150, 300)}
    assert at[0] == (0, 0.99) and at[300] == pytest.approx((0, 1))
    assert at[40][0] == pytest.approx(peak) and at[20][0] == pytest.approx(peak / 2)
    assert at[150][1] == pytest.approx(1 - 0.01 / 2)
    cfg.momentum_teacher = 0.0
    assert {moco_v3.schedules(step, 3000, 400, cfg)[1] for step in (0, 1500, 2999)} == {0.0}


def test_every_trained_parameter_decays(monkeypatch, tmp_path):
    groups = train(monkeypatch, tmp_path, 1)["opt"]["param_groups"]
    trained = sum(p.requires_grad for p in networks()[0].parameters())
    assert [group["weight_decay"] for group in groups] == [0.1]
    assert len(groups[0]["params"]) == trained


def test_views_and_defaults_are_the_published_ones():
    cfg = config.parse(moco_v3.Config, ["--data", "imagenet"])
    one, two = moco_v3.views(cfg)
    for view in (one, two):
        assert (view.size, view.scale, view.interpolation) == (224, (0.08, 1.0), "bilinear")
        assert (view.jitter, view.jitter_p, view.gray_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (view.flip, view.blur_sigma, view.copies) == (0.5, (0.1, 2.0), 1)
    assert (one.blur_p, one.solarize_p) == (1.0, 0.0)
    assert (two.blur_p, two.solarize_p) == (0.1, 0.2)
    assert (cfg.temperature, cfg.momentum_teacher, cfg.weight_decay, cfg.lr, cfg.batch_size,
            cfg.epochs, cfg.warmup_epochs) == (0.2, 0.99, 0.1, 1.5e-4, 4096, 300, 40)
    small = config.parse(moco_v3.Config, ["--data", "imagenet100"])
    assert (small.embed_dim, small.num_heads) == (384, 12)


@pytest.mark.parametrize("flags, sentence", [
    ("--accum-iter 2", "leave out --accum-iter"),
    ("--batch-size 1", "2 or more"),
])
def test_settings_that_cannot_be(flags, sentence, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["", *TINY, *flags.split()])
    with pytest.raises(ValueError, match=sentence):
        moco_v3.main()
