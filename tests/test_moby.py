"""MoBY against its closed forms, a ring buffer as in the official code, and the layout of that."""
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import moby
from lib import config, visualize
from lib.run import Run, ema_update

TINY = """--img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 2 --mlp-dim 32
          --out-dim 16 --batch-size 8 --queue-size 24 --workers 0 --evals 0 --precision fp32
          --device cpu --data synthetic --temperature 0.2 --drop-path 0.1""".split()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def settings(*flags):
    return config.parse(moby.Config, [*TINY, *flags])


def networks(*flags):
    cfg = settings(*flags)
    student, teacher = moby.Network(cfg), moby.Network(cfg, teacher=True)
    teacher.requires_grad_(False)
    ema_update(teacher, student, 0.0)
    return student, teacher


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def symmetric(q1, q2, k1, k2, queue1, queue2, tau=0.2):
    return (moby.contrastive_loss(q1, k2, queue2, tau) + moby.contrastive_loss(q2, k1, queue1, tau))


def train(monkeypatch, out, steps, *flags):
    """A run in this process -> what it saved in last.pt."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["moby.py", *TINY, "--warmup-epochs", "0", "--lr", "0.1",
                                      "--steps", str(steps), "--out", str(out), *flags])
    moby.main()
    return torch.load(out / "last.pt", weights_only=True)["state"]


@pytest.fixture
def recorded(monkeypatch):
    """Of each step of a run: the outputs of both networks, and what is logged."""
    outputs, logged, forward = [], [], moby.Network.forward
    monkeypatch.setattr(moby.Network, "forward", lambda net, *given: (
        outputs.append(forward(net, *given)), outputs[-1])[1])
    monkeypatch.setattr(Run, "log", lambda run, **values: logged.append(values))
    return outputs, logged


# ---- the loss: closed forms ----------------------------------------------------------------------


@pytest.mark.parametrize("K, equal, aligned, opposed", [
    (4096, 16.6360, 6.70672, 26.63554), (12, 5.12990, 0.155505, 14.97093)])
def test_losses_of_equal_and_of_orthogonal_vectors(K, equal, aligned, opposed):
    q, other = torch.eye(4, 8)[:1].expand(5, -1), torch.eye(4, 8)[1:2].expand(K, -1)
    same = q[:1].expand(K, -1)
    for k, queue, expected in ((q, same, equal), (q, other, aligned), (-q, other, opposed)):
        loss = symmetric(q, q, k, k, queue, queue).item()
        assert loss == pytest.approx(expected, rel=2e-5)
    assert 2 * math.log(1 + K) == pytest.approx(equal, rel=2e-5)
    assert 2 * math.log(1 + K * math.exp(-1 / 0.2)) == pytest.approx(aligned, rel=2e-5)
    assert 2 * math.log(1 + K * math.exp(1 / 0.2)) == pytest.approx(opposed, rel=2e-5)
    assert 2 * 0.2 * math.log(1 + K) < equal / 2             # with the factor 2 tau of MoCo v3


def test_loss_equals_the_formula_term_by_term():
    q, k, queue, tau, total = unit(5, 6), unit(5, 6, seed=1), unit(7, 6, seed=2), 0.2, 0.0
    for i in range(5):
        positive = math.exp(q[i] @ k[i] / tau)
        total -= math.log(positive / (positive + sum(math.exp(q[i] @ n / tau) for n in queue))) / 5
    assert moby.contrastive_loss(q, k, queue, tau).item() == pytest.approx(total, abs=1e-6)
    assert moby.contrastive_loss(q, k.flip(0), queue, tau).item() != pytest.approx(total, abs=1e-2)


def test_loss_ignores_lengths_the_order_of_the_queue_and_the_names_of_the_views():
    q1, q2, k1, k2 = (unit(6, 8, seed=s) for s in range(4))
    queue1, queue2 = unit(2, 9, 8, seed=4)
    loss = symmetric(q1, q2, k1, k2, queue1, queue2)
    longer = [z * (0.1 + torch.rand(6, 1)) for z in (q1, q2, k1, k2)]
    assert torch.allclose(loss, symmetric(*longer, queue1.flip(0), queue2.roll(3, 0)), atol=1e-6)
    assert torch.allclose(loss, symmetric(q2, q1, k2, k1, queue2, queue1), atol=1e-6)
    assert not torch.allclose(loss, symmetric(q2, q1, k2, k1, queue1, queue2), atol=1e-3)
    assert not torch.allclose(loss, symmetric(q1, q2, k2, k1, queue1, queue2), atol=1e-3)
    assert not torch.allclose(loss, symmetric(*longer, 2 * queue1, queue2), atol=1e-3)


def test_halves_of_a_batch_have_the_loss_of_the_whole_without_the_keys_of_the_other():
    q, k, queue = unit(8, 6), unit(8, 6, seed=1), unit(5, 6, seed=2)
    halves = [moby.contrastive_loss(q[i:i + 4], k[i:i + 4], queue, 0.2) for i in (0, 4)]
    whole = moby.contrastive_loss(q, k, queue, 0.2)
    assert torch.allclose(whole, sum(halves) / 2, atol=1e-6)
    mixed = [moby.contrastive_loss(q[i:i + 4], k[4 - i:8 - i], queue, 0.2) for i in (0, 4)]
    assert not torch.allclose(whole, sum(mixed) / 2, atol=1e-2)


# ---- the queue -----------------------------------------------------------------------------------


def test_a_queue_holds_the_last_keys_of_each_view_the_oldest_first():
    queue, batches = moby.Queue(6, 3), torch.randn(5, 2, 2, 3)       # 5 steps of 2 images
    initial = queue.keys
    assert initial.norm(dim=-1).allclose(torch.ones(2, 6))
    assert initial.unique(dim=1).shape == initial.shape and not initial[0].equal(initial[1])
    for t, keys in enumerate(batches):
        queue.append(*keys)
        seen = F.normalize(batches[:t + 1], dim=-1).transpose(0, 1).flatten(1, 2)
        seen = torch.cat([initial, seen], 1)
        assert torch.equal(queue.keys, seen[:, -6:])
    assert list(queue.state_dict()) == ["keys"]


def test_the_losses_of_a_run_are_those_of_a_ring_buffer(recorded, monkeypatch, tmp_path):
    """The official code writes keys to a ring buffer after the loss; here 5 steps of 8 keys go
    around it once."""
    original = {}
    monkeypatch.setattr(Run, "restore", lambda run, restore=Run.restore, **state: (
        original.update(keys=state["queue"].keys.clone()), restore(run, **state)))
    state = train(monkeypatch, tmp_path, 5)
    outputs, logged = recorded

    def losses(before=False, shared=False):
        buffers, place, found = original["keys"].clone(), 0, []
        for step in range(5):
            queries, keys = outputs[2 * step:2 * step + 2]
            q, k = (F.normalize(torch.stack(z), dim=-1) for z in (queries, keys))
            if before:
                buffers[:, place:place + 8] = k
            total = 0
            for view in (0, 1):
                negatives = buffers[0 if shared else 1 - view]
                logits = torch.cat([(q[view] * k[1 - view]).sum(1, True), q[view] @ negatives.T], 1)
                total = total - (logits / 0.2).log_softmax(1)[:, 0].mean()
            found.append(total.item())
            buffers[:, place:place + 8] = k
            place = (place + 8) % 24
        return found, buffers.roll(-place, 1)

    logged = [values["loss"].item() for values in logged if "loss" in values]
    found, buffers = losses()
    assert logged == pytest.approx(found, rel=1e-5)
    assert torch.allclose(state["queue"]["keys"], buffers, atol=1e-6)
    for wrong in (dict(before=True), dict(shared=True)):
        assert logged != pytest.approx(losses(**wrong)[0], rel=1e-3)


def test_a_queue_smaller_than_the_batch_is_refused(monkeypatch):
    assert settings("--queue-size", "8").queue_size == 8
    with pytest.raises(ValueError, match="at least --batch-size 8"):
        settings("--queue-size", "7")


# ---- the networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("D, heads, backbone, projector", [
    (192, 3, 5_524_416, 1_847_552), (384, 6, 21_665_664, 2_633_984)])
def test_parameter_counts_are_the_published_ones(D, heads, backbone, projector):
    cfg = config.parse(moby.Config, ["--data", "imagenet", "--embed-dim", str(D),
                                     "--num-heads", str(heads)])
    with torch.device("meta"):
        student, teacher = moby.Network(cfg), moby.Network(cfg, teacher=True)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(student.backbone) == backbone
    assert count(student.projector) == projector
    assert count(student.predictor) == 2_109_696
    if D == 384:
        assert count(student) == 26_409_344 and count(student) + count(teacher) == 50_708_992


def test_with_swin_tiny_the_parameter_counts_are_the_published_ones():
    cfg = config.parse(moby.Config, ["--data", "imagenet", "--backbone", "swin_tiny"])
    with torch.device("meta"):
        student, teacher = moby.Network(cfg), moby.Network(cfg, teacher=True)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (
        student.backbone, student.projector, student, teacher)]
    assert sizes[:3] == [27_519_354, 4_206_848, 33_835_898] and sum(sizes[2:]) == 65_562_100
    assert student.backbone.config["drop_path"] == 0.2
    assert teacher.backbone.config["drop_path"] == 0


def test_the_image_vector_of_a_swin_is_the_mean_of_its_normalized_tokens():
    flags = "--data toy --img-size 32 --backbone swin_micro --drop-path 0.1"
    cfg = config.parse(moby.Config, flags.split())
    student, teacher = moby.Network(cfg), moby.Network(cfg, teacher=True)
    x1, x2 = torch.randn(2, 8, 3, 32, 32)
    k1, _ = teacher(x1, x2)
    z = teacher.backbone(torch.cat([x1, x2]))[:8].mean(1)
    assert z.shape == (8, 128) and torch.allclose(teacher.projector(z), k1, atol=1e-5)
    q1, q2 = student(x1, x1, torch.rand(16, 2 * cfg.depth))
    assert not torch.allclose(q1, q2, atol=1e-3) and cfg.depth == 6              # drop path


@pytest.mark.parametrize("flags, sentence", [
    ("--img-size 36", "36 is not a multiple of 8"), ("--init-from a.pt", "choose --backbone vit"),
    ("--depth 3", "--depth 3 does not go with"), ("--backbone resnet", "swin_tiny or swin_micro")])
def test_what_a_swin_cannot_do_is_one_sentence(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.parse(moby.Config, ["--backbone", "swin_micro", *flags.split()])


def test_state_dict_has_the_layers_of_the_official_heads():
    student, teacher = (net.state_dict() for net in networks())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    layers = {0: ["weight", "bias"], 1: norm, 3: ["weight", "bias"]}
    for head in ("projector", "predictor"):
        expected = {f"{head}.{i}.{name}" for i, names in layers.items() for name in names}
        assert {key for key in student if key.startswith(head)} == expected
    assert student.keys() - teacher.keys() == {key for key in student if "predictor" in key}


def test_batch_statistics_do_not_mix_the_views():
    student, _ = networks("--drop-path", "0")
    x1, x2 = torch.randn(2, 8, 3, 32, 32)
    q1, q2 = student(x1, 3 * x2)
    assert q1.shape == q2.shape == (8, 16)
    hidden = []
    student.projector[1].register_forward_hook(lambda *given: hidden.append(given[2]))
    student(x1, 3 * x2)
    for z in hidden:
        assert torch.allclose(z.mean(0), torch.zeros(32), atol=1e-5)
    assert len(hidden) == 2
    both = student.predictor(student.projector(student.backbone(torch.cat([x1, 3 * x2]))[:, 0]))
    assert not torch.allclose(both, torch.cat([q1, q2]), atol=1e-3)


def test_only_the_student_drops_branches_by_the_numbers_of_the_view():
    student, teacher = networks("--drop-path", "0.9")
    x, drop = torch.randn(8, 3, 32, 32), torch.rand(16, 4)
    q1, q2 = student(x, x, drop)
    assert not torch.allclose(q1, q2, atol=1e-3)                  # other numbers for the other view
    assert torch.equal(q1, student(x, x, drop)[0])
    again = student(x, x, drop.roll(8, 0))
    assert torch.allclose(again[1], q1, atol=1e-5) and torch.allclose(again[0], q2, atol=1e-5)
    k1, k2 = teacher(x, x)
    assert torch.allclose(k1, k2, atol=1e-5)
    k1, k2 = networks("--drop-path", "0")[0](x, x, drop)
    assert torch.allclose(k1, k2, atol=1e-5)


# ---- gradients and the teacher -------------------------------------------------------------------


def test_who_gets_a_gradient():
    student, teacher = networks()
    x1, x2 = torch.randn(2, 8, 3, 32, 32)
    symmetric(*student(x1, x2), *teacher(x1, x2), *moby.Queue(24, 16).keys).backward()
    assert all(p.grad is None for p in teacher.parameters())
    # biases that a batch norm takes away, and the biases of keys, a third of qkv.bias
    cancel = ("projector.0.bias", "projector.3.bias", "predictor.0.bias", "backbone.norm.bias")
    for name, p in student.named_parameters():
        if name == "backbone.pos_embed":                                     # fixed on toy
            assert p.grad is None
        elif name in cancel:
            assert p.grad.abs().max() < 1e-5, name
        elif not name.endswith("qkv.bias"):
            assert p.grad.abs().max() > 1e-5, name


def test_the_teacher_is_updated_with_the_student_before_the_step(monkeypatch, tmp_path):
    weights, momenta = [], []

    def update(teacher, student, momentum):
        weights.append({name: p.detach().clone() for name, p in student.named_parameters()})
        momenta.append(momentum)
        ema_update(teacher, student, momentum)

    monkeypatch.setattr(moby, "ema_update", update)
    state = train(monkeypatch, tmp_path, 3, "--momentum-teacher", "0.9")
    copied, first, second, third = weights
    assert momenta == pytest.approx([0.0, 0.9, 0.925, 0.975])         # the copy, then up to 1
    for name in (name for name in state["teacher"] if name in copied):
        assert torch.equal(first[name], copied[name])                 # nothing happens in step 0
        expected = 0.975 * (0.925 * first[name] + 0.075 * second[name]) + 0.025 * third[name]
        assert torch.allclose(state["teacher"][name], expected, atol=1e-6), name
    moved = torch.cat([(state["student"][name] - third[name]).flatten() for name in third])
    assert moved.abs().max() > 1e-4                                   # control: the last step


def test_each_query_is_compared_with_key_and_queue_of_the_other_view(
        recorded, monkeypatch, tmp_path):
    outputs, logged = recorded
    compared, contrastive_loss = [], moby.contrastive_loss
    monkeypatch.setattr(moby, "contrastive_loss", lambda *given: (
        compared.append(given), contrastive_loss(*given))[1])
    train(monkeypatch, tmp_path, 2, "--temperature", "0.3")
    (q1, q2), (k1, k2) = outputs[-2:]
    for (q, k, queue, tau), (mine, key, last) in zip(
            compared[-2:], ((q1, k2, outputs[1][1]), (q2, k1, outputs[1][0])), strict=True):
        assert torch.equal(q, mine) and torch.equal(k, key) and tau == 0.3
        assert not k.requires_grad and not queue.requires_grad and queue.shape == (24, 16)
        assert torch.equal(queue[-8:], F.normalize(last, dim=-1))     # of the step before
    assert logged[-1]["lr"] == pytest.approx((0.1 + 5e-6) / 2 * 8 / 512)     # cosine, half way


@pytest.mark.parametrize("feat_std, loss, warning", [     # loss: relative to chance level
    (0.045, 1.01, True), (0.045, 0.93, False), (0.3, 1.0, False)])
def test_collapse_shows_in_feat_std_and_loss_together(
        feat_std, loss, warning, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {"feat_std": torch.tensor(feat_std)})
    monkeypatch.setattr(moby, "contrastive_loss", lambda q, *_: (
        0 * q.sum() + loss * math.log(25)))
    train(monkeypatch, tmp_path, 1, "--evals", "1")
    assert ("collapsed" in capsys.readouterr().out) == warning


# ---- the recipe ----------------------------------------------------------------------------------


def test_schedules_against_the_closed_forms():
    cfg = config.parse(moby.Config, ["--data", "imagenet", "--batch-size", "256"])
    at = {epoch: moby.schedules(10 * epoch, 3000, 50, cfg) for epoch in (0, 2.5, 5, 150, 300)}
    assert at[0] == pytest.approx((2.5e-7, 0.99)) and at[300] == pytest.approx((2.5e-6, 1))
    assert at[2.5][0] == pytest.approx((2.5e-7 + 5e-4) / 2, rel=1e-6)
    cosine = (1 + math.cos(math.pi * 5 / 300)) / 2                 # not 1: it began at step 0
    assert at[5][0] == pytest.approx(2.5e-6 + (5e-4 - 2.5e-6) * cosine, rel=1e-9)
    assert cosine == pytest.approx(0.9993, abs=5e-5)
    assert at[150] == pytest.approx(((5e-4 + 2.5e-6) / 2, 1 - 0.01 / 2))


def test_weight_decay_is_for_matrices_position_table_and_class_token(monkeypatch, tmp_path):
    groups = train(monkeypatch, tmp_path, 1, "--pos", "learned")["opt"]["param_groups"]
    parameters = dict(networks("--pos", "learned")[0].named_parameters())
    decayed = [name for name, p in parameters.items() if p.ndim > 1]
    assert {"backbone.pos_embed", "backbone.cls_token"} <= set(decayed)
    assert [group["weight_decay"] for group in groups] == [0.05, 0]
    assert [len(group["params"]) for group in groups] == [
        len(decayed), len(parameters) - len(decayed)]


def test_the_gradient_is_clipped_as_a_whole(recorded, monkeypatch, tmp_path):
    clip = torch.nn.utils.clip_grad_norm_
    norms = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: (
        norms.append(norm), clip(parameters, norm))[1])
    for flags in ((), ("--clip-grad", "0")):
        train(monkeypatch, tmp_path / f"run{len(flags)}", 1, *flags)
    assert norms == [5.0, math.inf]


def test_views_and_defaults_are_the_published_ones():
    cfg = config.parse(moby.Config, ["--data", "imagenet"])
    one, two = moby.views(cfg)
    for view in (one, two):
        assert (view.size, view.scale, view.interpolation) == (224, (0.08, 1.0), "bilinear")
        assert (view.jitter, view.jitter_p, view.gray_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (view.flip, view.blur_sigma, view.copies) == (0.5, (0.1, 2.0), 1)
    assert (one.blur_p, one.solarize_p) == (1.0, 0.0)
    assert (two.blur_p, two.solarize_p) == (0.1, 0.2)
    assert (cfg.temperature, cfg.queue_size, cfg.momentum_teacher, cfg.weight_decay, cfg.lr,
            cfg.batch_size, cfg.epochs, cfg.warmup_epochs, cfg.drop_path, cfg.clip_grad) == (
                0.2, 4096, 0.99, 0.05, 1e-3, 512, 300, 5, 0.2, 5)
    coco = config.parse(moby.Config, ["--data", "coco"])
    assert (coco.embed_dim, coco.num_heads, coco.epochs, coco.batch_size) == (192, 3, 200, 256)


@pytest.mark.parametrize("flags, sentence", [
    ("--accum-iter 2", "leave out --accum-iter"),
    ("--batch-size 1", "2 or more"),
    ("--temperature 0", "must be above 0"),
])
def test_settings_that_cannot_be(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(*flags.split())
