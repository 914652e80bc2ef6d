"""DINO against the closed forms and the published equations, with controls that break each."""
import importlib
import json
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import data
import dino
from lib import config, datasets
from lib.run import Run, ema_update, param_groups

TINY = """--data synthetic --img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 2
--pos learned --init moco --drop-path 0.1 --hidden 16 --bottleneck 8 --out-dim 32
--bn-in-head false --norm-last-layer false --tau-start 0.04 --tau-end 0.04 --tau-epochs 0
--freeze-epochs 0 --min-scale 0.1 --split-scale 0.4 --local-crops 2 --local-size 16
--warmup-epochs 0 --batch-size 8 --lr 0.032 --clip 3 --momentum 0.9 --weight-decay 0.04
--weight-decay-end 0.4 --precision fp32 --workers 0 --device cpu --evals 0 --log-every 1""".split()


def tiny(method, *flags):
    """Its settings, small."""
    return config.parse(method.Config, [*TINY, *map(str, flags)])


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train("dino", "--steps", 2): the run's checkpoint {name: state dict} and its log lines."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(datasets, "load_images", small_noise(datasets.load_images))

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


def small_noise(load):
    return lambda *given: load(*given[:4], limit=64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def images(n, size=32, seed=0):
    return normal(n, 3, size, size, seed=seed)


def same(a, b, *names):
    """Equal checkpoints. A key bias has no gradient but rounding errors, which AdamW blows up."""
    for name in names:
        shared = a[name].keys() & b[name].keys()         # one of them may hold more
        assert shared and len(shared) == min(len(a[name]), len(b[name])), name
        for key in shared:
            x, y = a[name][key], b[name][key]
            if key.endswith(".k.bias"):
                continue
            if key.endswith("qkv.bias"):
                x, y = (torch.cat([z.chunk(3)[0], z.chunk(3)[2]]) for z in (x, y))
            close(x, y, 1e-5)


def watch(monkeypatch, method):
    """What the next runs of a method build, and give to its losses as targets: two lists."""
    networks, targets = [], []

    class Watched(method.Network):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            networks.append(self)

    def watched(loss):
        def call(ours, target, *args, **kwargs):
            targets.append(target)
            return loss(ours, target, *args, **kwargs)
        return call

    monkeypatch.setattr(method, "Network", Watched)
    for name in {"cls_loss", "pat_loss"} & set(vars(method)):
        monkeypatch.setattr(method, name, watched(getattr(method, name)))
    return networks, targets


def no_gradient_reached_the_teacher(networks, targets):
    student, teacher = networks
    assert targets and not any(z.requires_grad for z in targets)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


# ---- the loss ------------------------------------------------------------------------------------


def pair_by_pair(s, t, center, tau_t, tau_s, same=False):
    """Equation 3 as a loop over pairs of crops."""
    P, log_S = ((t - center) / tau_t).softmax(-1), (s / tau_s).log_softmax(-1)
    terms = [-(P[g] * log_S[v]).sum(-1).mean()
             for g in range(2) for v in range(len(s)) if v != g or same]
    return sum(terms) / len(terms), len(terms)


@pytest.mark.parametrize("L", [0, 1, 8])
def test_loss_equals_equation_3_pair_by_pair(L):
    s, t, c = normal(2 + L, 5, 7), normal(2, 5, 7, seed=1), normal(1, 7, seed=2)
    loss = dino.cls_loss(s, dino.assign(t, c, 0.04), 0.1)
    expected, pairs = pair_by_pair(s, t, c, 0.04, 0.1)
    assert pairs == 2 * (1 + L)
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
def test_equal_student_logits_cost_ln_K_whatever_the_teacher_says(K, expected):
    P = dino.assign(normal(2, 3, K), torch.zeros(1, K), 0.04)
    loss = dino.cls_loss(torch.full((4, 3, K), 0.3), P, 0.1)
    assert abs(loss.item() - expected) < 2e-4 and abs(math.log(K) - expected) < 1e-4


def test_loss_ignores_constants_of_a_row_and_a_vector_added_to_teacher_and_centre():
    s, t, c = normal(4, 3, 6), normal(2, 3, 6, seed=1), normal(1, 6, seed=2)

    def loss(s, t, c):
        return dino.cls_loss(s, dino.assign(t, c, 0.04), 0.1)

    d = normal(6, seed=3)
    close(loss(s, t, c), loss(s + normal(4, 3, 1), t, c), 1e-4)
    close(loss(s, t, c), loss(s, t + normal(2, 3, 1), c), 1e-4)
    close(loss(s, t, c), loss(s, t + d, c + d), 1e-4)
    assert abs(loss(s, t, c) - loss(s, t + d, c)) > 0.01


def test_swapping_the_global_crops_of_both_networks_changes_nothing():
    s, P = normal(4, 3, 6), normal(2, 3, 6, seed=1).softmax(-1)
    swapped = s[[1, 0, 2, 3]]
    close(dino.cls_loss(s, P, 0.1), dino.cls_loss(swapped, P.flip(0), 0.1), 1e-5)
    assert abs(dino.cls_loss(s, P, 0.1) - dino.cls_loss(swapped, P, 0.1)) > 0.01


def test_centre_follows_a_constant_mean_geometrically():
    center, b = dino.Center(6, 0.9), normal(6)
    for n in range(1, 6):
        center.update([b - 1, b + 1])                                        # two micro-batches
        close(center.center, (1 - 0.9**n) * b[None])
    assert center.center.shape == (1, 6) and not center.center.requires_grad


# ---- collapse ------------------------------------------------------------------------------------


def test_both_collapses_are_called_by_their_names_and_health_is_not():
    def health(P):
        return dino.health([dino.tally(part) for part in P])                 # in micro-batches

    K = 64
    uniform, one_hot = torch.full((2, 8, K), 1 / K), torch.zeros(2, 8, K)
    one_hot[..., 3] = 1.0
    healthy = F.one_hot(torch.arange(8), K).float().expand(2, 8, K)          # sharp, but various
    words = [dino.collapse("images", *health(P), K) for P in (uniform, one_hot, healthy)]
    assert "uniform" in words[0][0] and "one-hot" in words[1][0] and not words[2]
    entropy, told = health(uniform)
    assert abs(entropy - math.log(K)) < 1e-4 and abs(told) < 1e-4
    entropy, told = health(healthy)
    assert abs(entropy) < 1e-6 and abs(told - math.log(8)) < 1e-5
    P = normal(2, 8, K).softmax(-1)
    rows = -(P * P.log()).sum(-1).mean(), P.flatten(0, 1).mean(0)            # of both crops
    close(torch.stack(health(P)),
          torch.stack([rows[0], -(rows[1] * rows[1].log()).sum() - rows[0]]), 1e-5)
    assert "uniform" in dino.collapse("images", *health(
        dino.assign(normal(1, 1, K).expand(2, 8, K), normal(1, 1, K), 0.04)), K)[0]  # stuck at ln K


@pytest.mark.parametrize("method, alike", [
    ("dino", "images"), ("ibot", "images"), ("ibot", "patches"), ("selfpatch", "images"),
    ("selfpatch", "patches")])
def test_a_run_says_which_assignments_are_all_the_same(train, monkeypatch, capsys, method, alike):
    """Each is one-hot: those named here of word 3, the others of one word after the other."""
    kinds = iter(["images"])                             # they come first; the rest are patches

    def assign(t, center, tau):
        rows = torch.arange(t[..., 0].numel()).view(t.shape[:-1]) % t.shape[-1]
        if next(kinds, "patches") == alike:
            rows = torch.full_like(rows, 3)
        return F.one_hot(rows, t.shape[-1]).float()

    monkeypatch.setattr(importlib.import_module(method), "assign", assign)
    monkeypatch.setattr(Run, "knn", lambda *_: {})
    _, (line,) = train(method, "--steps", 1, "--evals", 1)
    said = capsys.readouterr().out
    for what, name in (("images", "told"), ("patches", "told_pat")):
        assert (f"collapsed: all {what} get the same assignment, one-hot" in said) == (
            what == alike)
        if name in line:
            assert line[name] == pytest.approx(0) if what == alike else line[name] > 1


# ---- the network ---------------------------------------------------------------------------------


def test_shapes_of_a_step_and_one_forward_for_each_size_of_crops(monkeypatch):
    cfg = tiny(dino)
    student, teacher, sizes = dino.Network(cfg), dino.Network(cfg, teacher=True), []
    for net in (student, teacher):
        net.backbone.register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape)))
    assert student(images(6), images(6, 16)).shape == (4 * 3, 32)            # (2 + L) B, K
    assert teacher(images(6)).shape == (2 * 3, 32)
    assert sizes == [(6, 3, 32, 32), (6, 3, 16, 16), (6, 3, 32, 32)]
    assert dino.Center(32, 0.9).center.shape == (1, 32)
    assert [v.copies for v in dino.views(cfg)] == [1, 1, 2]


def test_rows_of_the_output_are_crops_in_order():
    net = dino.Network(tiny(dino), teacher=True)
    x, crops = images(4), images(6, 16)
    close(net(x, crops), torch.cat([net(x[i:i + 1]) for i in range(4)] +
                                   [net(c[None]) for c in crops]), 1e-5)


def test_small_crops_get_interpolated_positions_and_an_unchanged_class_slot():
    cfg = config.parse(dino.Config, ["--data", "imagenet", "--depth", "1"])
    backbone = dino.Network(cfg, teacher=True).backbone
    backbone.patch_embed.proj.weight.data.zero_(), backbone.patch_embed.proj.bias.data.zero_()
    small, _ = backbone.embed(images(1, 96))
    large, _ = backbone.embed(images(1, 224))
    assert small.shape[1] == 37
    assert torch.equal(small[:, 0], large[:, 0])
    assert torch.equal(large[:, 1:], backbone.pos_embed[:, 1:])


def test_only_the_student_drops_paths():
    cfg = tiny(dino, "--drop-path", 0.9)
    student, teacher = dino.Network(cfg), dino.Network(cfg, teacher=True)
    ema_update(teacher, student, 0.0)
    x, nothing, everything = images(4), torch.ones(4, 4) * 0.999, torch.zeros(4, 4)
    assert torch.equal(teacher(x), teacher(x, drop=everything))
    assert not torch.allclose(student(x, drop=nothing), student(x, drop=everything))


def test_prototypes_have_length_one_and_a_frozen_gain_stays_out_of_training():
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
    old = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 32, bias=False))
    old.load_state_dict({"parametrizations.weight.original0": free.last_layer.weight_g,
                         "parametrizations.weight.original1": free.last_layer.weight_v})
    z = normal(5, 8)
    close(free.last_layer(z), old(z))


def test_head_ignores_the_length_of_what_enters_the_prototypes():
    head, x = dino.Head(tiny(dino), 32), normal(5, 24)
    before = head(x)
    head.mlp[4].weight.data.mul_(7)                                          # its bias is 0
    close(head(x), before)
    head.mlp[2].weight.data.mul_(7)                                          # before a GELU
    assert not torch.allclose(head(x), before, atol=1e-4)


def test_batch_norms_of_the_head_stand_where_the_official_option_has_them():
    head, plain = (dino.Head(tiny(dino, "--bn-in-head", f), 32) for f in ("true", "false"))
    x = 5 + normal(64, 24)
    for upto in (2, 5):                                     # after each hidden layer, before GELU
        close(head.mlp[:upto](x).mean(0), torch.zeros(16), atol=1e-5)
        close(head.mlp[:upto](x).var(0, unbiased=False), torch.ones(16), atol=1e-3)
    assert [k for k in head.mlp.state_dict() if "weight" in k] == [
        f"{n}.weight" for n in (0, 1, 3, 4, 6)]
    assert len(plain.mlp) == 5 and plain.mlp[:1](x).mean(0).abs().max() > 0.1


def test_no_gradient_reaches_the_teacher(train, monkeypatch):
    seen = watch(monkeypatch, dino)
    train("dino", "--steps", 1)
    no_gradient_reached_the_teacher(*seen)


def test_matrices_tokens_positions_and_gains_decay_and_vectors_do_not():
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
    lr, decay, momentum, tau = map(list, zip(*at))
    peak = 5e-4 * 1024 / 256
    assert lr[0] == 0 and lr[warmup - 1] == lr[warmup] == peak > lr[warmup + 1]
    assert 1e-6 < lr[-1] < 2e-6 and abs(decay[0] - 0.04) < 1e-9 and 0.399 < decay[-1] < 0.4
    half = total // 2
    assert abs(decay[half] - 0.22) < 1e-9
    assert abs(momentum[0] - 0.996) < 1e-12 and 0.9999 < momentum[-1] < 1
    assert abs(momentum[half] - 0.998) < 1e-9
    assert tau[0] == tau[per_epoch - 1] == 0.04 < tau[per_epoch]             # epoch by epoch
    assert abs(tau[29 * per_epoch] - 0.07) < 1e-12 and abs(tau[-1] - 0.07) < 1e-12
    assert tau[29 * per_epoch - 1] < 0.07
    cfg.tau_epochs = 0
    assert dino.schedules(0, total, per_epoch, cfg)[3] == 0.07


def by_hand(method, cfg, objective):
    """Student and teacher after cfg.steps steps, plainly: schedules, groups of AdamW, clipping,
    average. objective(student, teacher, batch): the loss; it keeps the centres."""
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
                p.grad.mul_(min(1.0, cfg.clip / (p.grad.norm().item() + 1e-6)))
        opt.step()
        m, now = 1 - (1 - 0.9) * left, dict(student.named_parameters())
        for name, p in teacher.named_parameters():
            p.data = m * p.data + (1 - m) * now[name].data
    return dict(student=student.state_dict(), teacher=teacher.state_dict())


WRITTEN_OUT = "--steps", 4, "--drop-path", 0, "--clip", 0.05


def test_a_run_equals_the_published_steps_written_out(train):
    state, _ = train("dino", *WRITTEN_OUT)
    center = torch.zeros(1, 32)

    def objective(student, teacher, batch):
        nonlocal center
        x = torch.cat(batch.views[:2])
        t = teacher(x).detach().unflatten(0, (2, 8))
        s = student(x, torch.cat(batch.views[2:])).unflatten(0, (4, 8))
        loss, _ = pair_by_pair(s, t, center, 0.04, 0.1)
        center = 0.9 * center + 0.1 * t.mean((0, 1))
        return loss

    expected = by_hand(dino, tiny(dino, *WRITTEN_OUT), objective)
    same(state, expected, "student", "teacher")
    close(state["center"]["center"], center, 1e-5)
    center.zero_()
    unclipped = by_hand(dino, tiny(dino, *WRITTEN_OUT, "--clip", 1e9), objective)
    with pytest.raises(AssertionError):
        same(state, unclipped, "student")


def test_teacher_nears_a_constant_student_geometrically():
    student, teacher = dino.Network(tiny(dino)), dino.Network(tiny(dino), teacher=True)
    begin, there = ({k: p.detach().clone() for k, p in net.named_parameters()}
                    for net in (teacher, student))
    for n in range(1, 6):
        ema_update(teacher, student, 0.9)
        for name, p in teacher.named_parameters():
            close(p.data, 0.9**n * begin[name] + (1 - 0.9**n) * there[name])
    name = "backbone.patch_embed.proj.weight"                                # control: they differ
    assert (begin[name] - there[name]).abs().max() > 0.01
    assert all(torch.equal(p, there[name]) for name, p in student.named_parameters())


def test_a_real_step_moves_teacher_and_centre_as_written(train):
    state, _ = train("dino", "--steps", 1)
    cfg = tiny(dino)
    torch.manual_seed(cfg.seed)
    before = dino.Network(cfg)
    for name, old in before.named_parameters():
        new, teacher = state["student"][name], state["teacher"][name]
        close(teacher, 0.9 * old + 0.1 * new, 3e-7)
        assert not torch.equal(old, new), name
    loader = data.Loader(datasets.load_images("synthetic", "", "train", 32, 64, "cpu"), dino.views(cfg), 8)
    x = torch.cat(next(loader.batches()).views[:2])
    t = dino.Network(cfg, teacher=True)
    ema_update(t, before, 0.0)
    close(state["center"]["center"], 0.1 * t(x).mean(0, keepdim=True))       # raw, and before EMA


def test_frozen_last_layer_is_bit_identical_in_spite_of_weight_decay(train):
    flags = "--steps", 2, "--weight-decay", 0.4
    frozen, free = (train("dino", *flags, "--freeze-epochs", n)[0]["student"] for n in (1, 0))
    cfg = tiny(dino)
    torch.manual_seed(cfg.seed)
    for name, old in dino.Network(cfg).named_parameters():
        last = "last_layer" in name
        assert torch.equal(frozen[name], old) == last, name
        assert not torch.equal(free[name], old), name


@pytest.mark.parametrize("method", ["dino", "ibot", "selfpatch"])
def test_the_freeze_of_the_last_layer_ends(train, method):
    """One step of eight an epoch: the second one moves it."""
    state, _ = train(method, "--steps", 2, "--freeze-epochs", 0.125)
    torch.manual_seed(0)
    for name, old in importlib.import_module(method).Network(
            tiny(importlib.import_module(method))).named_parameters():
        if old.requires_grad:
            assert not torch.equal(state["student"][name], old), name


@pytest.mark.parametrize("method", ["dino", "ibot", "selfpatch"])
def test_assignments_losses_and_centres_are_in_fp32_under_bf16(train, monkeypatch, method):
    module, dtypes = importlib.import_module(method), {}

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*given):
            flat = [x for each in given for x in (each if isinstance(each, list) else [each])]
            dtypes[name] = {x.dtype for x in flat if torch.is_tensor(x) and x.is_floating_point()}
            return real(*given)

        monkeypatch.setattr(owner, name, watched)

    for name in ("assign", "cls_loss", *["pat_loss"] * (method != "dino")):
        watch(module, name)
    watch(module.Center, "update")
    train(method, "--steps", 1, "--precision", "bf16")
    assert len(dtypes) >= 3 and set.union(*dtypes.values()) == {torch.float32}


def test_every_gradient_is_clipped_by_its_own_norm(monkeypatch):
    monkeypatch.setattr(Run, "_open_folder", lambda self: None)
    run = Run(tiny(dino))
    large, small = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    opt = torch.optim.SGD([large, small])
    run._flops = 0
    run.backward((15 * large).sum() + (0.5 * small).sum(), opt, clip=3.0, per_tensor=True)
    assert abs(large.grad.norm() - 3) < 1e-5 and abs(small.grad.norm() - 1) < 1e-7


@pytest.mark.parametrize("method", ["dino", "ibot", "selfpatch"])
def test_micro_batches_change_nothing(train, method):
    (whole, log), (parts, log_parts) = (train(method, "--steps", 2, "--accumulate", n)
                                        for n in (1, 4))
    same(parts, whole, *whole.keys() - {"opt"})
    for line, line_parts in zip(log, log_parts, strict=True):
        for name in {"loss", "cls", "pat", "entropy", "kl", "told", "entropy_pat",
                     "told_pat"} & line.keys():
            assert line_parts[name] == pytest.approx(line[name], abs=1e-5), name


@pytest.mark.parametrize("method, end, end_pat", [
    ("dino", 0.07, None), ("ibot", 0.07, 0.06), ("selfpatch", 0.07, 0.07)])
def test_temperature_rises_epoch_by_epoch_in_the_loop(train, monkeypatch, method, end, end_pat):
    module, seen = importlib.import_module(method), []
    assign = module.assign
    monkeypatch.setattr(module, "assign", lambda t, center, tau: (
        seen.append(tau), assign(t, center, tau))[1])
    train(method, "--steps", 6, "--batch-size", 32, "--tau-end", end, "--tau-epochs", 3,
          *(("--tau-pat-end", end_pat) if method == "ibot" else ()))
    of_a_step = len(seen) // 6                                               # images, patches
    for first, top in ((0, end), *(((1, end_pat),) if end_pat else ())):
        half = (0.04 + top) / 2                                              # two steps an epoch
        assert seen[first::of_a_step] == pytest.approx([0.04, 0.04, half, half, top, top])


def test_overfitting_one_batch_brings_the_loss_far_below_ln_K(train):
    _, log = train("dino", "--overfit-one-batch", "--steps", 50, "--lr", 0.064, "--bottleneck", 32,
                   "--norm-last-layer", "true", "--drop-path", 0, "--local-crops", 0)
    assert log[-1]["loss"] < math.log(32) - 1.5 and log[-1]["told"] > 1
    assert abs(log[-1]["loss"] - log[-1]["entropy"] - log[-1]["kl"]) < 1e-5


@pytest.mark.parametrize("method", ["ibot", "selfpatch"])
def test_overfitting_shows_the_networks_one_batch_in_all_steps(train, monkeypatch, method):
    module, seen = importlib.import_module(method), []
    forward = module.Network.forward
    monkeypatch.setattr(module.Network, "forward", lambda net, x, *more: (
        seen.append(x), forward(net, x, *more))[1])
    train(method, "--overfit-one-batch", "--steps", 2)
    assert len(seen) == 4 and all(torch.equal(x, seen[0]) for x in seen)


def test_views_are_the_published_ones():
    one, two, local = dino.views(config.parse(dino.Config, ["--data", "imagenet"]))
    assert [v.size for v in (one, two, local)] == [224, 224, 96]
    assert [v.scale for v in (one, two, local)] == [(0.4, 1), (0.4, 1), (0.05, 0.4)]
    assert [v.blur_p for v in (one, two, local)] == [1, 0.1, 0.5]
    assert [v.solarize_p for v in (one, two, local)] == [0, 0.2, 0]
    assert [v.copies for v in (one, two, local)] == [1, 1, 8]
    for v in (one, two, local):
        assert (v.jitter, v.jitter_p, v.grey_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (v.flip, v.interpolation, v.blur_sigma) == (0.5, "bicubic", (0.1, 2.0))


def test_defaults_are_the_recipe_of_300_epochs():
    cfg = config.parse(dino.Config, ["--data", "imagenet"])
    assert (cfg.embed_dim, cfg.num_heads, cfg.out_dim, cfg.hidden) == (384, 6, 65536, 2048)
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.min_lr) == (300, 1024, 5e-4, 1e-6)
    assert (cfg.tau_start, cfg.tau_end, cfg.tau_epochs, cfg.tau_student) == (0.04, 0.07, 30, 0.1)
    head = dino.Head(cfg, cfg.out_dim)
    assert sum(p.numel() for p in head.parameters()) == 22_352_128           # fact sheet
