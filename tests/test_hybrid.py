"""The hybrid is its parts: held against simmim.py and moco_v3.py, functions as well as runs."""
import itertools
import json
import math
import signal
import sys

import pytest
import torch

import hybrid
import moco_v3
import simmim
from lib import config, rng, visualize
from lib.run import Run, ema_update, param_groups, set_lr

VIT = "--img-size 32 --patch-size 4 --embed-dim 24 --depth 3 --num-heads 2 --batch-size 8".split()
MIM = """--mask-patch-size 8 --drop-path 0.1 --pos none --init beit
         --layer-scale 0.1""".split()                                # as published
CL = "--mlp-dim 32 --out-dim 16".split()
BOTH = [*MIM, *CL]
QUICK = """--workers 0 --evals 0 --precision fp32 --device cpu --data synthetic --steps 3
           --warmup-epochs 0 --lr 0.2""".split()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def settings(*flags):
    return config.parse(hybrid.Config, [*VIT, *BOTH, *flags])


def networks(*flags):
    """Student and teacher, away from the small initial weights: with those the class tokens of all
    images are nearly equal, and the batch norms enlarge what rounding makes of them."""
    cfg = settings(*flags)
    student, teacher = hybrid.Network(cfg), hybrid.Network(cfg, teacher=True)
    teacher.requires_grad_(False)
    with torch.no_grad():
        for p in (*student.parameters(), *teacher.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    return student, teacher


def example(B=8):
    """Inputs of a step: three views, mask by patch and by pixel, numbers of the drop path."""
    generator, cfg = torch.Generator().manual_seed(1), settings()
    views = torch.randn(3, B, 3, 32, 32, generator=generator)
    mask = hybrid.draw_mask(torch.arange(B), cfg, 0, 0)
    drop = torch.rand(3, B, 6, generator=generator)
    return views, mask, hybrid.enlarge(mask, 4), drop


def both_losses(student, teacher, views, mask, masked, drop):
    pair = views[1], views[2], drop[1:].flatten(0, 1)
    pixels, (q2, q3) = student((views[0], mask, drop[0]), pair)
    _, (k2, k3) = teacher(cl=pair)
    cl = hybrid.contrastive_loss(q2, k3, 0.2) + hybrid.contrastive_loss(q3, k2, 0.2)
    return hybrid.rec_loss(pixels, views[0], masked), cl


def gradients(module, loss):
    module.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def parts_of(student, teacher):
    """The same weights in the networks of simmim.py, and of moco_v3.py with SimMIM's backbone."""
    mim = simmim.Network(config.parse(simmim.Config, [*VIT, *MIM]))
    heads = ("projector", "predictor")
    weights = student.state_dict()
    mim.load_state_dict({k: v for k, v in weights.items() if not k.startswith(heads)})
    pair = []
    for net in (student, teacher):
        cfg = config.parse(moco_v3.Config, [*VIT, *CL, "--stop-grad-conv1", "false"])
        moco = moco_v3.Network(cfg, teacher=net is teacher)
        moco.backbone = hybrid.Network(settings("--drop-path", "0")).backbone
        moco.load_state_dict({k: v for k, v in net.state_dict().items()
                              if not k.startswith(("mask_token", "decoder"))})
        pair.append(moco)
    return mim, *pair


def close(one, two, atol=5e-5):
    return one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=atol) for k in one)


def train(monkeypatch, out, method, *flags):
    """A run in this process -> what it saved in last.pt."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["", *VIT, *QUICK, *flags, "--out", str(out)])
    method.main()
    return torch.load(out / "last.pt", weights_only=True)["state"]


# ---- equal to its parts --------------------------------------------------------------------------


def test_repeated_pieces_are_equal_to_the_originals():
    q, k = torch.randn(2, 8, 16)
    for first in (0, 3):
        assert torch.equal(hybrid.contrastive_loss(q[:5], k, 0.3, first),
                           moco_v3.contrastive_loss(q[:5], k, 0.3, first))
    views, mask, masked, _ = example()
    index, cfg = torch.arange(8), settings()
    assert torch.equal(mask, simmim.draw_mask(index, cfg, 0, 0))
    assert torch.equal(masked, simmim.enlarge(mask, 4))
    assert torch.equal(hybrid.rec_loss(views[0], views[1], masked),
                       simmim.rec_loss(views[0], views[1], masked))
    cfg = config.parse(hybrid.Config, ["--data", "imagenet"])
    mim, cl = (config.parse(method.Config, ["--data", "imagenet"]) for method in
               (simmim, moco_v3))
    assert hybrid.views(cfg) == simmim.views(mim) + moco_v3.views(cl)


def test_lambda_0_has_the_gradients_of_simmim():
    (student, teacher), (views, mask, masked, drop) = networks(), example()
    mim, _ = both_losses(student, teacher, views, mask, masked, drop)
    alone, _, _ = parts_of(student, teacher)
    ours = gradients(student, mim)
    theirs = gradients(alone, simmim.rec_loss(alone(views[0], mask, drop[0]), views[0], masked))
    assert close(ours, theirs)                   # the same names, so none in projector, predictor
    other = gradients(alone, simmim.rec_loss(alone(views[1], mask, drop[0]), views[1], masked))
    assert not close(ours, other, atol=1e-2)
    assert not hasattr(networks("--lambda-cl", "0")[0], "projector")


def test_lambda_1_has_the_gradients_of_moco_on_the_same_backbone():
    (student, teacher), (views, mask, masked, drop) = networks("--drop-path", "0"), example()
    _, cl = both_losses(student, teacher, views, mask, masked, drop)
    _, q, k = parts_of(student, teacher)
    ours = gradients(student, cl)
    (q2, q3), (k2, k3) = q(*views[1:]), k(*views[1:])
    contrast = moco_v3.contrastive_loss
    theirs = gradients(q, contrast(q2, k3, 0.2) + contrast(q3, k2, 0.2))
    assert close(ours, theirs)                   # the same names, so none in mask token, decoder
    wrong = gradients(q, contrast(q2, k2, 0.2) + contrast(q3, k3, 0.2))
    assert not close(ours, wrong, atol=1e-2)
    net = networks("--lambda-cl", "1")[0]
    assert not hasattr(net, "mask_token") and not hasattr(net, "decoder")


def test_a_run_with_lambda_0_is_a_run_of_simmim_bit_by_bit(monkeypatch, tmp_path):
    states = []
    for method, flags in ((simmim, MIM), (hybrid, [*BOTH, "--lambda-cl", "0"]),
                          (hybrid, [*BOTH, "--lambda-cl", "0.1"])):
        saved = train(monkeypatch, tmp_path / str(len(states)), method, *flags)
        states.append(saved.get("model") or saved["student"])
    plain, ours, mixed = states
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert not torch.equal(plain["mask_token"], mixed["mask_token"])


# ---- the sum -------------------------------------------------------------------------------------


def test_both_losses_reach_the_whole_backbone():
    (student, teacher), step = networks(), example()
    mim, cl = (gradients(student, loss) for loss in both_losses(student, teacher, *step))
    shared = {f"backbone.{name}" for name, _ in student.backbone.named_parameters()}
    assert shared - {"backbone.cls_token"} <= mim.keys() and shared <= cl.keys()
    table = "backbone.rel_pos_bias.relative_position_bias_table"
    assert mim[table].any() and cl[table].any()


def test_loss_of_a_run_is_affine_in_lambda(monkeypatch, tmp_path):
    records = {}
    for weight in (0.25, 0.5, 0.75):              # the first step: equal weights, views and masks
        out = tmp_path / str(weight)
        train(monkeypatch, out, hybrid, *BOTH, "--lambda-cl", str(weight), "--steps", "1")
        records[weight] = json.loads((out / "metrics.jsonl").read_text())
    low, middle, high = records.values()
    assert middle["loss"] == pytest.approx((low["loss"] + high["loss"]) / 2, abs=1e-6)
    assert abs(high["loss"] - low["loss"]) > 0.1
    assert low["loss"] == pytest.approx(0.75 * low["loss_mim"] + 0.25 * low["loss_cl"], abs=1e-6)


@pytest.mark.parametrize("weight, views", [(0, 1), (0.2, 3), (1, 2)])
def test_views_of_weight_0_are_not_made(weight, views):
    cfg = config.parse(hybrid.Config, ["--data", "toy", "--lambda-cl", str(weight)])
    assert len(hybrid.views(cfg)) == views


@pytest.mark.parametrize("weight, heads", [
    (0, {"decoder", "mask_token"}), (1, {"projector", "predictor"})])
def test_a_run_at_either_end_has_the_parts_of_one_method(weight, heads, monkeypatch, tmp_path):
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {"feat_std": torch.tensor(0.3)})
    train(monkeypatch, tmp_path, hybrid, *BOTH, "--lambda-cl", str(weight), "--steps", "1",
          "--evals", "1")
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert ("loss_mim" in line) == ("loss_mean_color" in line) == (weight == 0)
    assert ("loss_cl" in line) == (weight == 1)
    saved = torch.load(tmp_path / "last.pt")["state"]["student"]
    assert {name.split(".")[0] for name in saved} - {"backbone"} == heads
    assert (tmp_path / "visualization.png").exists()


# ---- what depends on what ------------------------------------------------------------------------


def test_each_loss_sees_its_own_views_only():
    (student, teacher), (views, mask, masked, drop) = networks(), example()
    mim, cl = both_losses(student, teacher, views, mask, masked, drop)
    noise = torch.randn_like(views)

    def with_other(*which):
        chosen = torch.tensor([v in which for v in range(3)]).view(3, 1, 1, 1, 1)
        return both_losses(student, teacher, torch.where(chosen, noise, views), mask, masked, drop)

    assert torch.equal(with_other(0)[1], cl) and not torch.equal(with_other(0)[0], mim)
    assert torch.equal(with_other(1, 2)[0], mim) and not torch.equal(with_other(1)[1], cl)
    turned = mask.flip(1)
    moved = both_losses(student, teacher, views, turned, hybrid.enlarge(turned, 4), drop)
    assert torch.equal(moved[1], cl) and not torch.equal(moved[0], mim)
    under = torch.where(masked[:, None], noise[0], views[0])
    one, two = (student((x, mask, drop[0]))[0] for x in (views[0], under))
    assert torch.equal(one, two)


def test_a_mask_of_zeros_is_no_mask():
    student, _ = networks("--drop-path", "0")
    x = torch.randn(2, 3, 32, 32)
    none = torch.zeros(2, 64, dtype=torch.bool)
    tokens = student.backbone(x)
    assert torch.equal(tokens, student.backbone(x, mask=none, mask_token=student.mask_token))
    none[0, 0] = True
    assert not torch.equal(tokens, student.backbone(x, mask=none, mask_token=student.mask_token))


def test_teacher_copies_the_backbone_and_projector_and_has_no_gradient():
    student, teacher = networks()
    mim, cl = both_losses(student, teacher, *example())
    (mim + cl).backward()
    assert all(p.grad is None for p in teacher.parameters())
    names = {name.split(".")[0] for name, _ in teacher.named_parameters()}
    assert names == {"backbone", "projector"}
    inside = dict(teacher.backbone.named_parameters())
    assert inside.keys() == dict(student.backbone.named_parameters()).keys()
    for name in ("blocks.0.ls1.gamma", "blocks.0.attn.q_bias", "cls_token",
                 "rel_pos_bias.relative_position_bias_table"):
        assert name in inside
    assert not teacher.backbone.config["drop_path"] and student.backbone.config["drop_path"]
    weights = dict(student.named_parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    old = {name: p.clone() for name, p in teacher.named_parameters()}
    ema_update(teacher, student, 0.9)
    for name, p in teacher.named_parameters():
        assert torch.allclose(p, 0.9 * old[name] + 0.1 * weights[name], atol=1e-6)


# ---- the recipe ----------------------------------------------------------------------------------


def test_schedules_and_groups_are_the_parents():
    cfg, mim, cl = (config.parse(method.Config, ["--data", "imagenet"]) for method in
                    (hybrid, simmim, moco_v3))
    mim.batch_size = cfg.batch_size
    for step, start in itertools.product((0, 50, 100, 500, 874, 875, 999), (0.99, 0)):
        cfg.momentum_teacher = cl.momentum_teacher = start                             # 0 stays 0
        lr, momentum = hybrid.schedules(step, 1000, 100, cfg)
        assert lr == pytest.approx(simmim.schedule(step, 1000, 100, mim))
        assert momentum == moco_v3.schedules(step, 1000, 100, cl)[1]
    student, teacher = networks()
    alone, _, _ = parts_of(student, teacher)
    groups = [{name for name, p in net.named_parameters() for q in group["params"] if p is q}
              for net in (student, alone)
              for group in param_groups(net, 0.05, no_decay=("cls_token",))]
    assert {name for name in groups[0] if not name.startswith("pr")} == groups[2]
    assert {name for name in groups[1] if not name.startswith("pr")} == groups[3]
    assert "projector.0.weight" in groups[0] and "projector.1.weight" in groups[1]


def test_defaults_are_the_papers():
    cfg = config.parse(hybrid.Config, ["--data", "imagenet"])
    assert (cfg.lambda_cl, cfg.epochs, cfg.warmup_epochs, cfg.batch_size, cfg.lr, cfg.weight_decay,
            cfg.clip_grad, cfg.drop_path) == (0.2, 100, 10, 1024, 1e-4, 0.05, 5.0, 0.1)
    assert hybrid.schedules(200, 1000, 100, cfg)[0] == pytest.approx(2e-4)


def test_steps_of_a_run_are_those_of_the_recipe(monkeypatch, tmp_path):
    """Two steps written out: the views apart, the teacher updated before its keys, the other view's
    keys, the weighted sum, clip, AdamW."""
    recipe = """--lambda-cl 0.3 --momentum-teacher 0.5 --clip-grad 0.1 --lr-drop-at 0.5
                --weight-decay 5""".split()
    batches, steps = [], Run.steps

    def spy(self, loader):
        for step, batch in steps(self, loader):
            batches.append(batch)
            yield step, batch

    monkeypatch.setattr(Run, "steps", spy)
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {})
    train(monkeypatch, tmp_path, hybrid, *BOTH, *recipe, "--steps", "2", "--evals", "1")
    found = torch.load(tmp_path / "last.pt", weights_only=True)["state"]
    torch.manual_seed(0)
    cfg = settings(*recipe)
    student, teacher = hybrid.Network(cfg), hybrid.Network(cfg, teacher=True)
    weights = dict(student.named_parameters())
    opt = torch.optim.AdamW(param_groups(student, 5, no_decay=("cls_token",)))
    for step, batch in enumerate(batches):
        set_lr(opt, (1, 0.1)[step] * 0.2 * 8 / 512)
        with torch.no_grad():
            momentum = (0, 0.75)[step]                  # they begin equal; then 0.5 up to 1
            for name, p in teacher.named_parameters():
                p.lerp_(weights[name], 1 - momentum)
        x1, x2, x3 = batch.views
        mask = hybrid.draw_mask(batch.index, cfg, 0, batch.epoch)
        drop = rng.uniform(batch.index, (3, 6), 0, batch.epoch, "drop").unbind(1)
        pixels, (q2, q3) = student((x1, mask, drop[0]), (x2, x3, torch.cat(drop[1:])))
        _, (k2, k3) = teacher(cl=(x2, x3, None))
        mim = hybrid.rec_loss(pixels, x1, hybrid.enlarge(mask, 4))
        cl = hybrid.contrastive_loss(q2, k3, 0.2) + hybrid.contrastive_loss(q3, k2, 0.2)
        opt.zero_grad()
        (0.7 * mim + 0.3 * cl).backward()
        assert torch.nn.utils.clip_grad_norm_(student.parameters(), 0.1) > 0.2
        opt.step()
    for name, net in (("student", student), ("teacher", teacher)):
        x, y = (torch.cat([p.flatten() for p in weights]) for weights in (
            net.parameters(), (found[name][key] for key, _ in net.named_parameters())))
        assert (x - y).norm() < 1e-4 * x.norm(), name
    errors = [(z[m] - z[~m].mean()).abs().mean()
              for image, m in zip(x1, hybrid.enlarge(mask, 4)) for z in image]
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss_mean_color"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


@pytest.mark.parametrize("feat_std, loss, warning", [     # loss: relative to chance level
    (0.045, 1.01, True),
    (0.045, 0.93, False),                      # toy, step 525: a small feat_std, and it learns
    (0.3, 1.0, False)])                        # at the start
def test_collapse_shows_in_feat_std_and_loss_together(
        feat_std, loss, warning, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {"feat_std": torch.tensor(feat_std)})
    monkeypatch.setattr(hybrid, "contrastive_loss", lambda q, k, tau, first: (
        0 * q.sum() + loss * 2 * tau * math.log(8)))
    train(monkeypatch, tmp_path, hybrid, *BOTH, "--steps", "1", "--evals", "1")
    assert ("collapsed" in capsys.readouterr().out) == warning


def test_equal_class_tokens_give_a_warning(monkeypatch, tmp_path, capsys):
    class Blind(hybrid.Network):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.backbone.norm.weight.data.zero_()

    monkeypatch.setattr(hybrid, "Network", Blind)
    flags = *BOTH, "--steps", "1", "--evals", "1", "--lr", "0", "--temperature", "0.5"
    train(monkeypatch, tmp_path, hybrid, *flags)
    assert "loss_cl is at chance level (4.16)" in capsys.readouterr().out   # 2 ln 8


@pytest.mark.parametrize("flags, sentence", [
    ("--accum-iter 2", "leave out --accum-iter"),
    ("--batch-size 1", "2 or more"),
    ("--lambda-cl 1.2", "at most 1"),
    ("--mask-patch-size 12", "must divide --img-size 32"),
    ("--mask-ratio 1", "of the 16 squares"),
    ("--mask-ratio inf", "at most 1"),
    ("--mask-patch-size 0", "1 or more"),
    ("--lambda-cl 0 --accum-iter 2", "take simmim.py"),
])
def test_impossible_settings_are_refused(flags, sentence, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["", *VIT, *BOTH, *flags.split()])
    with pytest.raises(ValueError, match=sentence):
        hybrid.main()
