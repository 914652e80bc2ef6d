"""DINO against closed forms and the published equations, with negative controls; and what the
files of the DINO family (dino, ibot, selfpatch) have in common."""
import importlib
import json
import math
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import dino
from lib import config, datasets, visualize
from lib.run import ema_update, param_groups

TINY = """--data synthetic --img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 2
--pos learned --init moco --drop-path 0.1 --head-hidden-dim 16 --bottleneck-dim 8 --out-dim 32
--use-bn-in-head false --norm-last-layer false --warmup-teacher-temp 0.04 --teacher-temp 0.04
--warmup-teacher-temp-epochs 0 --freeze-last-layer 0 --global-crops-scale 0.4 1
--local-crops-scale 0.1 0.4 --local-crops-number 2 --local-crops-size 16 --warmup-epochs 0
--batch-size 8 --lr 0.032 --clip-grad 3 --momentum-teacher 0.9 --weight-decay 0.04
--weight-decay-end 0.4 --precision fp32 --workers 0 --device cpu --evals 0 --log-every 1""".split()


def tiny(method, *flags):
    """Small settings of a method."""
    return config.parse(method.Config, [*TINY, *map(str, flags)])


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train("dino", "--steps", 2): the run's checkpoint {name: state dict} and its log lines."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(datasets, "load_images", limit_images(datasets.load_images))

    def run(method, *flags):
        out = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
        arguments = [method, *TINY, "--out", out, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        importlib.import_module(method).main()
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return torch.load(out / "last.pt")["state"], log

    yield run
    for name, handler in handlers.items():
        signal.signal(name, handler)
    torch.set_float32_matmul_precision(precision)


def limit_images(load):
    """load_images() of 64 images."""
    return lambda *given: load(*given[:4], limit=64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def images(n, size=32, seed=0):
    return normal(n, 3, size, size, seed=seed)


def assert_equal_states(a, b, *names):
    """Compares checkpoints. Biases of keys are left out: their gradient is rounding error only,
    which AdamW scales up to full steps."""
    for name in names:
        shared = a[name].keys() & b[name].keys()         # one of them may have more
        assert shared and len(shared) == min(len(a[name]), len(b[name])), name
        for key in shared:
            x, y = a[name][key], b[name][key]
            if key.endswith(".k.bias"):
                continue
            if key.endswith("qkv.bias"):
                x, y = (torch.cat([z.chunk(3)[0], z.chunk(3)[2]]) for z in (x, y))
            close(x, y, 1e-5)


def record_networks_and_targets(monkeypatch, method):
    """Two lists that the next runs of a method fill: its networks, and the targets of its losses
    (second arguments)."""
    networks, targets = [], []

    class Recorded(method.Network):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            networks.append(self)

    def recorded(loss):
        def call(prediction, target, *args, **kwargs):
            targets.append(target)
            return loss(prediction, target, *args, **kwargs)
        return call

    monkeypatch.setattr(method, "Network", Recorded)
    for name in {"cls_loss", "patch_loss"} & set(vars(method)):
        monkeypatch.setattr(method, name, recorded(getattr(method, name)))
    return networks, targets


def assert_no_gradient_in_teacher(networks, targets):
    student, teacher = networks
    flat = [z for target in targets for z in (target if isinstance(target, list) else [target])]
    assert flat and not any(z.requires_grad for z in flat)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


# ---- the loss ------------------------------------------------------------------------------------


def pair_by_pair(s, t, center, tau_t, tau_s, same=False):
    """Equation 3 as a loop over pairs of crops."""
    P, log_S = ((t - center) / tau_t).softmax(-1), (s / tau_s).log_softmax(-1)
    terms = [-(P[g] * log_S[v]).sum(-1).mean()
             for g in range(2) for v in range(len(s)) if v != g or same]
    return sum(terms) / len(terms), len(terms)


@pytest.mark.parametrize("n_local", [0, 1, 8])
def test_loss_equals_equation_3_pair_by_pair(n_local):
    s, t, c = normal(2 + n_local, 5, 7), normal(2, 5, 7, seed=1), normal(1, 7, seed=2)
    loss = dino.cls_loss(s, dino.assign(t, c, 0.04), 0.1)
    expected, pairs = pair_by_pair(s, t, c, 0.04, 0.1)
    assert pairs == 2 * (1 + n_local)
    close(loss, expected, 1e-4)
    assert abs(loss - pair_by_pair(s, t, c, 0.04, 0.1, same=True)[0]) > 0.01


def test_hand_value_for_two_prototypes():
    t = torch.tensor([[[0.04, 0.0]], [[0.0, 0.04]]])                         # (2, B=1, K=2)
    s = torch.tensor([[[0.1, 0.0]], [[0.0, 0.1]]])
    P = dino.assign(t, torch.zeros(1, 2), 0.04)
    close(P[0, 0], torch.tensor([0.73106, 0.26894]), 1e-5)
    assert abs(dino.cls_loss(s, P, 0.1).item() - 1.04432) < 1e-5
    assert abs(dino.cls_loss(s.flip(0), P, 0.1).item() - 0.58220) < 1e-5     # same-view pairs
    center = dino.Center(2, 0.9)
    center.update([t.mean((0, 1))])
    close(center.center, torch.tensor([[0.002, 0.002]]), 1e-8)


@pytest.mark.parametrize("K, expected", [(65536, 11.0904), (8192, 9.0109), (4096, 8.3178)])
def test_loss_of_equal_student_logits_is_ln_K_for_any_teacher(K, expected):
    P = dino.assign(normal(2, 3, K), torch.zeros(1, K), 0.04)
    loss = dino.cls_loss(torch.full((4, 3, K), 0.3), P, 0.1)
    assert abs(loss.item() - expected) < 2e-4 and abs(math.log(K) - expected) < 1e-4


def test_loss_ignores_a_constant_per_row_and_a_vector_added_to_teacher_and_center():
    s, t, c = normal(4, 3, 6), normal(2, 3, 6, seed=1), normal(1, 6, seed=2)

    def loss(s, t, c):
        return dino.cls_loss(s, dino.assign(t, c, 0.04), 0.1)

    d = normal(6, seed=3)
    close(loss(s, t, c), loss(s + normal(4, 3, 1), t, c), 1e-4)
    close(loss(s, t, c), loss(s, t + normal(2, 3, 1), c), 1e-4)
    close(loss(s, t, c), loss(s, t + d, c + d), 1e-4)
    assert abs(loss(s, t, c) - loss(s, t + d, c)) > 0.01


def test_swapping_the_global_crops_in_both_networks_leaves_the_loss_unchanged():
    s, P = normal(4, 3, 6), normal(2, 3, 6, seed=1).softmax(-1)
    swapped = s[[1, 0, 2, 3]]
    close(dino.cls_loss(s, P, 0.1), dino.cls_loss(swapped, P.flip(0), 0.1), 1e-5)
    assert abs(dino.cls_loss(s, P, 0.1) - dino.cls_loss(swapped, P, 0.1)) > 0.01


def test_center_approaches_a_constant_mean_geometrically():
    center, b = dino.Center(6, 0.9), normal(6)
    for n in range(1, 6):
        center.update([b - 1, b + 1])                                        # two micro-batches
        close(center.center, (1 - 0.9**n) * b[None])
    assert center.center.shape == (1, 6) and not center.center.requires_grad


# ---- collapse ------------------------------------------------------------------------------------


def test_both_kinds_of_collapse_are_reported_and_healthy_assignments_are_not():
    K = 64

    def compute_stats(P):
        stats = visualize.AssignmentStats()
        for part in P:                                                       # in micro-batches
            stats.add(part)
        return stats.compute()

    def warnings(P):
        lines = []
        visualize.warn_of_equal_assignments(
            SimpleNamespace(print0=lines.append), "images", *compute_stats(P), K)
        return lines

    uniform, one_hot = torch.full((2, 8, K), 1 / K), torch.zeros(2, 8, K)
    one_hot[..., 3] = 1.0
    healthy = F.one_hot(torch.arange(8), K).float().expand(2, 8, K)          # sharp and different
    assert "uniform" in warnings(uniform)[0] and "one-hot" in warnings(one_hot)[0]
    assert not warnings(healthy)
    entropy, mi = compute_stats(uniform)
    assert abs(entropy - math.log(K)) < 1e-4 and abs(mi) < 1e-4
    entropy, mi = compute_stats(healthy)
    assert abs(entropy) < 1e-6 and abs(mi - math.log(8)) < 1e-5
    P = normal(2, 8, K).softmax(-1)
    entropy, mean = -(P * P.log()).sum(-1).mean(), P.flatten(0, 1).mean(0)   # of both crops
    close(torch.stack(compute_stats(P)),
          torch.stack([entropy, -(mean * mean.log()).sum() - entropy]), 1e-5)
    stuck = dino.assign(normal(1, 1, K).expand(2, 8, K), normal(1, 1, K), 0.04)     # at ln K
    assert "uniform" in warnings(stuck)[0]


@pytest.mark.parametrize("method, collapsed", [
    ("dino", "images"), ("ibot", "images"), ("ibot", "patches"), ("selfpatch", "images"),
    ("selfpatch", "patches")])
def test_a_run_warns_of_collapsed_assignments(train, monkeypatch, capsys, method, collapsed):
    """All assignments are one-hot: the collapsed ones all to prototype 3, the others in turn."""
    kinds = iter(["images"])                             # assigned first; all others are patches

    def assign(t, center, tau):
        rows = torch.arange(t[..., 0].numel()).view(t.shape[:-1]) % t.shape[-1]
        if next(kinds, "patches") == collapsed:
            rows = torch.full_like(rows, 3)
        return F.one_hot(rows, t.shape[-1]).float()

    monkeypatch.setattr(importlib.import_module(method), "assign", assign)
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {})
    _, (line,) = train(method, "--steps", 1, "--evals", 1)
    printed = capsys.readouterr().out
    for what, name in (("images", "mi"), ("patches", "mi_patch")):
        assert (f"collapsed: all {what} get the same assignment, one-hot" in printed) == (
            what == collapsed)
        if name in line:
            assert line[name] == pytest.approx(0) if what == collapsed else line[name] > 1


# ---- the network ---------------------------------------------------------------------------------


def test_shapes_of_a_step_and_one_backbone_pass_for_each_size_of_crops():
    cfg = tiny(dino)
    student, teacher, sizes = dino.Network(cfg), dino.Network(cfg, teacher=True), []
    for net in (student, teacher):
        net.backbone.register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape)))
    assert student(images(6), images(6, 16)).shape == (4 * 3, 32)            # (2+n_local)*B, K
    assert teacher(images(6)).shape == (2 * 3, 32)
    assert sizes == [(6, 3, 32, 32), (6, 3, 16, 16), (6, 3, 32, 32)]
    assert dino.Center(32, 0.9).center.shape == (1, 32)
    assert [v.copies for v in dino.views(cfg)] == [1, 1, 2]


def test_rows_of_the_output_are_crops_in_order():
    net = dino.Network(tiny(dino), teacher=True)
    x, crops = images(4), images(6, 16)
    close(net(x, crops), torch.cat([net(x[i:i + 1]) for i in range(4)] +
                                   [net(c[None]) for c in crops]), 1e-5)


def test_small_crops_get_resized_positions_and_the_same_class_token():
    cfg = config.parse(dino.Config, ["--data", "imagenet", "--depth", "1"])
    backbone = dino.Network(cfg, teacher=True).backbone
    backbone.patch_embed.proj.weight.data.zero_()
    backbone.patch_embed.proj.bias.data.zero_()
    small, _ = backbone.embed(images(1, 96))
    large, _ = backbone.embed(images(1, 224))
    assert small.shape[1] == 37
    assert torch.equal(small[:, 0], large[:, 0])
    assert torch.equal(large[:, 1:], backbone.pos_embed[:, 1:])


def test_only_the_student_has_drop_path():
    cfg = tiny(dino, "--drop-path", 0.9)
    student, teacher = dino.Network(cfg), dino.Network(cfg, teacher=True)
    ema_update(teacher, student, 0.0)
    x, nothing, everything = images(4), torch.ones(4, 4) * 0.999, torch.zeros(4, 4)
    assert torch.equal(teacher(x), teacher(x, drop=everything))
    assert not torch.allclose(student(x, drop=nothing), student(x, drop=everything))


def test_prototypes_have_norm_1_and_a_frozen_gain_is_not_trained():
    torch.manual_seed(0)
    frozen, free = (dino.Head(tiny(dino, "--norm-last-layer", f), 32) for f in ("true", "false"))
    x = normal(5, 24)
    for head in (frozen, free):
        head(x).square().sum().backward()
    layer = frozen.last_layer
    assert layer.weight_g.grad is None and (layer.weight_g == 1).all()
    assert free.last_layer.weight_g.grad.abs().sum() > 0
    close(layer(torch.eye(8)).T.norm(dim=1), torch.ones(32))                 # rows of W
    assert frozen(x).abs().max() <= 1 + 1e-6
    free.last_layer.weight_g.data.fill_(3.0)
    assert free(x).abs().max() > 1
    pytorch = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 32, bias=False))
    pytorch.load_state_dict({"parametrizations.weight.original0": free.last_layer.weight_g,
                             "parametrizations.weight.original1": free.last_layer.weight_v})
    z = normal(5, 8)
    close(free.last_layer(z), pytorch(z))


def test_head_normalizes_the_input_of_the_prototypes():
    head, x = dino.Head(tiny(dino), 32), normal(5, 24)
    before = head(x)
    head.mlp[4].weight.data.mul_(7)                                          # its bias is 0
    close(head(x), before)
    head.mlp[2].weight.data.mul_(7)                                          # before a GELU
    assert not torch.allclose(head(x), before, atol=1e-4)


def test_batch_norms_of_the_head_are_where_the_official_option_has_them():
    head, plain = (dino.Head(tiny(dino, "--use-bn-in-head", f), 32) for f in ("true", "false"))
    x = 5 + normal(64, 24)
    for upto in (2, 5):                                     # after each hidden layer, before GELU
        close(head.mlp[:upto](x).mean(0), torch.zeros(16), atol=1e-5)
        close(head.mlp[:upto](x).var(0, unbiased=False), torch.ones(16), atol=1e-3)
    assert [k for k in head.mlp.state_dict() if "weight" in k] == [
        f"{n}.weight" for n in (0, 1, 3, 4, 6)]
    assert len(plain.mlp) == 5 and plain.mlp[:1](x).mean(0).abs().max() > 0.1


def test_no_gradient_reaches_the_teacher(train, monkeypatch):
    recorded = record_networks_and_targets(monkeypatch, dino)
    train("dino", "--steps", 1)
    assert_no_gradient_in_teacher(*recorded)


def test_weight_decay_is_of_matrices_tokens_positions_and_gains_not_of_vectors():
    net = dino.Network(tiny(dino))
    decayed = {id(p) for p in param_groups(net, 0.04)[0]["params"]}
    for name, p in net.named_parameters():
        vector = name.endswith("bias") or "norm" in name
        assert (id(p) in decayed) != vector, name
    names = dict(net.named_parameters())
    for name in ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight",
                 "head.last_layer.weight_v", "head.last_layer.weight_g"):
        assert id(names[name]) in decayed


# ---- schedules and steps -------------------------------------------------------------------------


def test_schedules_against_their_closed_forms():
    cfg = config.parse(dino.Config, ["--data", "imagenet"])
    per_epoch, total, warmup = 4, 300 * 4, 10 * 4
    at = [dino.schedules(step, total, per_epoch, cfg) for step in range(total)]
    lr, decay, momentum, temp = map(list, zip(*at))
    peak = 5e-4 * 1024 / 256
    assert lr[0] == 0 and lr[warmup - 1] == lr[warmup] == peak > lr[warmup + 1]
    assert 1e-6 < lr[-1] < 2e-6 and abs(decay[0] - 0.04) < 1e-9 and 0.399 < decay[-1] < 0.4
    half = total // 2
    assert abs(decay[half] - 0.22) < 1e-9
    assert abs(momentum[0] - 0.996) < 1e-12 and 0.9999 < momentum[-1] < 1
    assert abs(momentum[half] - 0.998) < 1e-9
    assert temp[0] == temp[per_epoch - 1] == 0.04 < temp[per_epoch]          # epoch by epoch
    assert abs(temp[29 * per_epoch] - 0.07) < 1e-12 and abs(temp[-1] - 0.07) < 1e-12
    assert temp[29 * per_epoch - 1] < 0.07
    cfg.warmup_teacher_temp_epochs = 0
    assert dino.schedules(0, total, per_epoch, cfg)[3] == 0.07


def train_plainly(method, cfg, objective):
    """Student and teacher after cfg.steps steps of a plain loop: schedules, parameter groups of
    AdamW, clipping, EMA. objective(student, teacher, batch): the loss; it updates the centers."""
    torch.manual_seed(cfg.seed)
    student, teacher = method.Network(cfg), method.Network(cfg, teacher=True)
    teacher.load_state_dict({k: student.state_dict()[k] for k in teacher.state_dict()})
    params = [p for p in student.parameters() if p.requires_grad]
    opt = torch.optim.AdamW([dict(params=[p for p in params if p.ndim > 1]),
                             dict(params=[p for p in params if p.ndim == 1], weight_decay=0.0)])
    images = datasets.load_images("synthetic", "", "train", 32, 64, "cpu")
    batches = data.Loader(images, method.views(cfg), 8, cfg.seed).batches()
    for step in range(cfg.steps):
        left = (1 + math.cos(math.pi * step / cfg.steps)) / 2
        for group in opt.param_groups:
            group["lr"] = 1e-6 + (0.032 * 8 / 256 - 1e-6) * left
        opt.param_groups[0]["weight_decay"] = 0.4 + (0.04 - 0.4) * left
        opt.zero_grad()
        objective(student, teacher, next(batches)).backward()
        for p in params:
            if p.grad is not None:
                p.grad.mul_(min(1.0, cfg.clip_grad / (p.grad.norm().item() + 1e-6)))
        opt.step()
        m, now = 1 - (1 - 0.9) * left, dict(student.named_parameters())
        for name, p in teacher.named_parameters():
            p.data = m * p.data + (1 - m) * now[name].data
    return dict(student=student.state_dict(), teacher=teacher.state_dict())


PLAIN = "--steps", 4, "--drop-path", 0, "--clip-grad", 0.05


def test_a_run_equals_a_plain_loop_over_the_published_steps(train):
    state, _ = train("dino", *PLAIN)
    center = torch.zeros(1, 32)

    def objective(student, teacher, batch):
        nonlocal center
        x = torch.cat(batch.views[:2])
        t = teacher(x).detach().unflatten(0, (2, 8))
        s = student(x, torch.cat(batch.views[2:])).unflatten(0, (4, 8))
        loss, _ = pair_by_pair(s, t, center, 0.04, 0.1)
        center = 0.9 * center + 0.1 * t.mean((0, 1))
        return loss

    expected = train_plainly(dino, tiny(dino, *PLAIN), objective)
    assert_equal_states(state, expected, "student", "teacher")
    close(state["center"]["center"], center, 1e-5)
    center.zero_()
    unclipped = train_plainly(dino, tiny(dino, *PLAIN, "--clip-grad", 1e9), objective)
    with pytest.raises(AssertionError):
        assert_equal_states(state, unclipped, "student")


def test_teacher_approaches_a_constant_student_geometrically():
    student, teacher = dino.Network(tiny(dino)), dino.Network(tiny(dino), teacher=True)
    begin, limit = ({k: p.detach().clone() for k, p in net.named_parameters()}
                    for net in (teacher, student))
    for n in range(1, 6):
        ema_update(teacher, student, 0.9)
        for name, p in teacher.named_parameters():
            close(p.data, 0.9**n * begin[name] + (1 - 0.9**n) * limit[name])
    name = "backbone.patch_embed.proj.weight"                                # control: they differ
    assert (begin[name] - limit[name]).abs().max() > 0.01
    assert all(torch.equal(p, limit[name]) for name, p in student.named_parameters())


def test_a_step_updates_teacher_and_center_as_published(train):
    state, _ = train("dino", "--steps", 1)
    cfg = tiny(dino)
    torch.manual_seed(cfg.seed)
    before = dino.Network(cfg)
    for name, old in before.named_parameters():
        new, teacher = state["student"][name], state["teacher"][name]
        close(teacher, 0.9 * old + 0.1 * new, 3e-7)
        assert not torch.equal(old, new), name
    images = datasets.load_images("synthetic", "", "train", 32, 64, "cpu")
    x = torch.cat(next(data.Loader(images, dino.views(cfg), 8).batches()).views[:2])
    teacher = dino.Network(cfg, teacher=True)
    ema_update(teacher, before, 0.0)
    logits = teacher(x)                                                      # raw, and before EMA
    close(state["center"]["center"], 0.1 * logits.mean(0, keepdim=True))


def test_frozen_last_layer_is_bit_identical_despite_weight_decay(train):
    flags = "--steps", 2, "--weight-decay", 0.4
    frozen, free = (train("dino", *flags, "--freeze-last-layer", n)[0]["student"] for n in (1, 0))
    cfg = tiny(dino)
    torch.manual_seed(cfg.seed)
    for name, old in dino.Network(cfg).named_parameters():
        last = "last_layer" in name
        assert torch.equal(frozen[name], old) == last, name
        assert not torch.equal(free[name], old), name


@pytest.mark.parametrize("method", ["dino", "ibot", "selfpatch"])
def test_the_freeze_of_the_last_layer_ends(train, method):
    """After one of the eight steps of an epoch: the second step trains it."""
    state, _ = train(method, "--steps", 2, "--freeze-last-layer", 0.125)
    module = importlib.import_module(method)
    torch.manual_seed(0)
    for name, old in module.Network(tiny(module)).named_parameters():
        if old.requires_grad:
            assert not torch.equal(state["student"][name], old), name


@pytest.mark.parametrize("method", ["dino", "ibot", "selfpatch"])
def test_assignments_losses_and_centers_are_in_fp32_under_bf16(train, monkeypatch, method):
    module, dtypes = importlib.import_module(method), {}

    def record_dtypes(owner, name):
        real = getattr(owner, name)

        def recorded(*given):
            flat = [x for each in given for x in (each if isinstance(each, list) else [each])]
            dtypes[name] = {x.dtype for x in flat if torch.is_tensor(x) and x.is_floating_point()}
            return real(*given)

        monkeypatch.setattr(owner, name, recorded)

    for name in ("assign", "cls_loss", *["patch_loss"] * (method != "dino")):
        record_dtypes(module, name)
    record_dtypes(module.Center, "update")
    train(method, "--steps", 1, "--precision", "bf16")
    assert len(dtypes) >= 3 and set.union(*dtypes.values()) == {torch.float32}


def test_the_gradient_of_each_tensor_is_clipped_by_its_own_norm():
    large, small, unused = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    for max_norm, expected in ((3.0, 3), (0, 30)):                           # 0: no clipping
        large.grad, small.grad = torch.full((2, 2), 15.0), torch.full((2, 2), 0.5)
        norm = dino.clip_per_tensor([large, small, unused], max_norm)
        assert abs(norm - math.sqrt(30**2 + 1)) < 1e-4                       # before clipping
        assert abs(large.grad.norm() - expected) < 1e-5 and abs(small.grad.norm() - 1) < 1e-7


@pytest.mark.parametrize("method", ["dino", "ibot", "selfpatch"])
def test_micro_batches_give_the_same_result(train, method):
    (whole, log), (parts, log_parts) = (train(method, "--steps", 2, "--accum-iter", n)
                                        for n in (1, 4))
    assert_equal_states(parts, whole, *whole.keys() - {"opt"})
    for line, line_parts in zip(log, log_parts, strict=True):
        for name in {"loss", "loss_cls", "loss_patch", "entropy", "kl", "mi", "entropy_patch",
                     "mi_patch"} & line.keys():
            assert line_parts[name] == pytest.approx(line[name], abs=1e-5), name


@pytest.mark.parametrize("method, end, end_patch", [
    ("dino", 0.07, None), ("ibot", 0.07, 0.06), ("selfpatch", 0.07, 0.07)])
def test_temperature_increases_epoch_by_epoch_in_the_loop(
        train, monkeypatch, method, end, end_patch):
    module, temps = importlib.import_module(method), []
    assign = module.assign
    monkeypatch.setattr(module, "assign", lambda t, center, tau: (
        temps.append(tau), assign(t, center, tau))[1])
    train(method, "--steps", 6, "--batch-size", 32, "--teacher-temp", end,
          "--warmup-teacher-temp-epochs", 3,
          *(("--teacher-patch-temp", end_patch) if method == "ibot" else ()))
    per_step = len(temps) // 6                                               # images, patches
    for first, last in ((0, end), *(((1, end_patch),) if end_patch else ())):
        half = (0.04 + last) / 2                                             # two steps per epoch
        assert temps[first::per_step] == pytest.approx([0.04, 0.04, half, half, last, last])


def test_overfitting_one_batch_brings_the_loss_far_below_ln_K(train):
    _, log = train("dino", "--overfit-one-batch", "--steps", 50, "--lr", 0.064,
                   "--bottleneck-dim", 32, "--norm-last-layer", "true", "--drop-path", 0,
                   "--local-crops-number", 0)
    assert log[-1]["loss"] < math.log(32) - 1.5 and log[-1]["mi"] > 1
    assert abs(log[-1]["loss"] - log[-1]["entropy"] - log[-1]["kl"]) < 1e-5


@pytest.mark.parametrize("method", ["ibot", "selfpatch"])
def test_overfitting_uses_the_same_batch_at_every_step(train, monkeypatch, method):
    module, inputs = importlib.import_module(method), []
    forward = module.Network.forward
    monkeypatch.setattr(module.Network, "forward", lambda net, x, *more: (
        inputs.append(x), forward(net, x, *more))[1])
    train(method, "--overfit-one-batch", "--steps", 2)
    assert len(inputs) == 4 and all(torch.equal(x, inputs[0]) for x in inputs)


def test_views_are_as_published():
    one, two, local = dino.views(config.parse(dino.Config, ["--data", "imagenet"]))
    assert [v.size for v in (one, two, local)] == [224, 224, 96]
    assert [v.scale for v in (one, two, local)] == [(0.4, 1), (0.4, 1), (0.05, 0.4)]
    assert [v.blur_p for v in (one, two, local)] == [1, 0.1, 0.5]
    assert [v.solarize_p for v in (one, two, local)] == [0, 0.2, 0]
    assert [v.copies for v in (one, two, local)] == [1, 1, 8]
    for v in (one, two, local):
        assert (v.jitter, v.jitter_p, v.gray_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (v.flip, v.interpolation, v.blur_sigma) == (0.5, "bicubic", (0.1, 2.0))


def test_defaults_are_the_recipe_of_300_epochs():
    cfg = config.parse(dino.Config, ["--data", "imagenet"])
    assert (cfg.embed_dim, cfg.num_heads, cfg.out_dim, cfg.head_hidden_dim) == (384, 6, 65536, 2048)
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.min_lr) == (300, 1024, 5e-4, 1e-6)
    assert (cfg.warmup_teacher_temp, cfg.teacher_temp) == (0.04, 0.07)
    assert (cfg.warmup_teacher_temp_epochs, cfg.student_temp) == (30, 0.1)
    head = dino.Head(cfg, cfg.out_dim)
    assert sum(p.numel() for p in head.parameters()) == 22_352_128           # the official one's
