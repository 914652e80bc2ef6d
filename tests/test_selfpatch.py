"""SelfPatch against closed forms and the published equations, with negative controls."""
import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_dino import (  # noqa: F401
    PLAIN,
    TINY,
    assert_equal_states,
    assert_no_gradient_in_teacher,
    close,
    images,
    normal,
    pair_by_pair,
    record_networks_and_targets,
    tiny,
    train,
    train_plainly,
)
from test_ibot import syntax_tree
from test_methods import TAKEN_AWAY

import dino
import moby
import selfpatch
from lib import config
from lib.run import ema_update

SMALL = ("--out-dim-selfpatch", 16, "--lambda-patch", 0.1, "--num-positives", 4,
         "--borders", "correct")


# ---- what it has in common with DINO -------------------------------------------------------------


class ImageNetwork(selfpatch.Network):
    """SelfPatch's network with the interface of DINO's: image logits only."""

    def __init__(self, cfg, teacher=False):
        cfg.base, cfg.backbone = "dino", "vit"
        cfg.out_dim_selfpatch, cfg.num_positives, cfg.borders = 16, 4, "correct"
        super().__init__(cfg, teacher)
        self.head = self.c_head

    def forward(self, *crops):
        return super().forward(*crops)[0]


def test_with_lambda_0_a_run_equals_dinos_on_the_same_network(train, monkeypatch):  # noqa: F811
    flags = "--steps", 3, "--drop-path", 0.3, "--local-crops-number", 0      # equal centers
    without, log_without = train("selfpatch", *flags, *SMALL, "--lambda-patch", 0)
    with_patches, _ = train("selfpatch", *flags, *SMALL, "--lambda-patch", 1)
    monkeypatch.setattr(dino, "Network", ImageNetwork)
    expected, log = train("dino", *flags)
    for name in ("student", "teacher"):             # p_head: without loss, decays; head: c_head
        expected[name] = {k: v for k, v in expected[name].items()
                          if not k.startswith(("p_head", "head"))}
    assert_equal_states(without, expected, "student", "teacher", "center")
    for a, b in zip(log, log_without):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and b["loss_patch"] > 1
    with pytest.raises(AssertionError):
        assert_equal_states(with_patches, expected, "student")


def test_schedules_and_head_are_dinos_queue_and_heads_mobys():
    for name in ("Head", "schedules"):
        assert syntax_tree(getattr(selfpatch, name)) == syntax_tree(getattr(dino, name)), name
    for name in ("mlp", "Queue"):
        assert syntax_tree(getattr(selfpatch, name)) == syntax_tree(getattr(moby, name)), name
    q, k, queue = normal(4, 6), normal(4, 6, seed=1), F.normalize(normal(9, 6, seed=2), dim=1)
    assert torch.equal(*(m.contrastive_loss(q, k, queue, 0.3) for m in (selfpatch, moby)))


# ---- what it has in common with MoBY -------------------------------------------------------------


MOBY = ("--base", "moby", "--local-crops-number", 0, "--mlp-dim", 32, "--queue-size", 24,
        "--out-dim", 12, "--weight-decay-end", 0.04)


class PairNetwork(selfpatch.Network):
    """SelfPatch's network with the interface of MoBY's: queries or keys of two views."""

    def __init__(self, cfg, teacher=False):
        cfg.base, cfg.head_hidden_dim, cfg.bottleneck_dim = "moby", 16, 8
        cfg.use_bn_in_head = cfg.norm_last_layer = False
        cfg.out_dim_selfpatch, cfg.num_positives, cfg.borders = 16, 4, "correct"
        super().__init__(cfg, teacher)
        self.projector, self.predictor = self.c_head.projector, self.c_head.predictor

    def forward(self, x1, x2, drop=None):
        return super().forward(torch.cat([x1, x2]), drop=drop)[0].chunk(2)


def test_with_lambda_0_a_run_equals_mobys_on_the_same_network(train, monkeypatch):  # noqa: F811
    flags = "--steps", 3, "--drop-path", 0.3, "--warmup-epochs", 0.25, "--min-lr", 0
    without, log_without = train("selfpatch", *SMALL, *MOBY, *flags, "--lambda-patch", 0)
    with_patches, _ = train("selfpatch", *SMALL, *MOBY, *flags, "--lambda-patch", 1)
    known = config.fields(moby.Config)
    same = [x for name, value in zip(TINY[::2], TINY[1::2])
            if name[2:].replace("-", "_") in known for x in (name, value)]
    monkeypatch.setattr(moby, "Network", PairNetwork)
    monkeypatch.setattr("test_dino.TINY", same)
    mine = ("--mlp-dim", 32, "--queue-size", 24, "--out-dim", 12, "--warmup-lr", 0, "--lr", 0.064,
            "--crop-min", 0.4, "--color-jitter", 0.1, 0.1, 0.1, 0.5)
    expected, log = train("moby", *mine, *flags)
    unseen = r"^(p_head|projector|predictor)\.|" + TAKEN_AWAY["selfpatch"]    # p_head: decays only
    for name in ("student", "teacher"):
        expected[name] = {k: v for k, v in expected[name].items() if not re.search(unseen, k)}
    assert_equal_states(without, expected, "student", "teacher", "queue")
    for a, b in zip(log, log_without, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and b["loss_patch"] > 1
        assert a["lr"] == pytest.approx(b["lr"])
    with pytest.raises(AssertionError):
        assert_equal_states(with_patches, expected, "student")


def test_on_moby_the_patch_loss_is_that_on_dino(train, monkeypatch):  # noqa: F811
    outputs, forward = [], selfpatch.Network.forward
    monkeypatch.setattr(selfpatch.Network, "forward", lambda *given: (
        outputs.append(forward(*given)), outputs[-1])[1])
    state, log = train("selfpatch", *SMALL, *MOBY, "--steps", 1, "--lambda-patch", 0.7)
    (_, (u,)), (_, (w,)) = outputs                                           # teacher, student
    crops = [F.cross_entropy(x / 0.1, (y / 0.04).softmax(-1)) for x, y in zip(w, u, strict=True)]
    assert len(crops) == 16 and log[0]["loss_patch"] == pytest.approx(
        torch.stack(crops).mean().item(), rel=1e-5)
    assert log[0]["loss"] == pytest.approx(log[0]["loss_cls"] + 0.7 * log[0]["loss_patch"])
    assert not {"entropy", "kl", "mi"} & log[0].keys() and "center" not in state
    close(state["center_patch"]["center"], 0.1 * u.mean((0, 1))[None])


def test_on_moby_the_image_head_trains_the_aggregation_and_the_patch_loss_does_not():
    student, teacher = pair(*MOBY)
    x = images(6)
    s, w = student.train()(x)
    t, u = teacher.train()(x)
    assert s.shape == t.shape == (6, 12) and not hasattr(teacher.c_head.predictor, "weight")
    Q = [selfpatch.assign(z, torch.zeros(1, 16), 0.04) for z in u]
    selfpatch.patch_loss(w, Q, 0.1).backward(retain_graph=True)
    assert not student.ca_head.cls_token.grad.any() and student.ca_head.norm.weight.grad.any()
    selfpatch.contrastive_loss(s[:3], t[3:], selfpatch.Queue(24, 12).keys[0], 0.2).backward()
    assert student.ca_head.cls_token.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_on_moby_a_collapse_of_the_images_gives_a_warning(
        train, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("lib.visualize.evaluate", lambda *_: {"feat_std": torch.tensor(0.01)})
    for fraction in (1.0, 0.9):                              # of the chance level
        monkeypatch.setattr(selfpatch, "contrastive_loss", lambda q, *_, fraction=fraction: (
            0 * q.sum() + fraction * math.log(25)))
        train("selfpatch", *SMALL, *MOBY, "--steps", 1, "--evals", 1)
        assert ("collapsed: all class tokens" in capsys.readouterr().out) == (fraction == 1)


@pytest.mark.parametrize("base, kernel", [([], "bicubic"), (MOBY, "bilinear")])
def test_images_are_resized_in_evaluation_as_for_its_base(
        base, kernel, train, monkeypatch):  # noqa: F811
    used = []
    monkeypatch.setattr("lib.visualize.evaluate", lambda *args: (used.append(args[4]), {})[1])
    monkeypatch.setattr("lib.run.Run.save_encoder",
                        lambda *_, interpolation, **__: used.append(interpolation))
    train("selfpatch", *SMALL, *base, "--steps", 1, "--evals", 1)
    assert used == [kernel, kernel]


@pytest.mark.parametrize("flags, sentence", [
    ("--local-crops-number 2", "pass --local-crops-number 0"),
    ("--accum-iter 2", "leave out --accum-iter"),
    ("--queue-size 7", "at least --batch-size 8")])
def test_on_moby_some_settings_are_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(selfpatch, *SMALL, *MOBY, *flags.split())
    tiny(selfpatch, *SMALL, *MOBY)


def test_with_a_swin_the_patches_are_those_of_its_last_stage_before_the_norm():
    sizes = "--img-size 64 --head-hidden-dim 16 --bottleneck-dim 8 --batch-size 8".split()
    cfg = config.parse(selfpatch.Config, [*sizes, *map(str, SMALL + MOBY), "--backbone",
                                          "swin_micro"])
    assert (cfg.patch_size, cfg.embed_dim, cfg.num_heads) == (16, 128, 4)
    student, teacher = selfpatch.Network(cfg), selfpatch.Network(cfg, teacher=True)
    for net in (student, teacher):
        s, (w,) = net(images(6, 64), drop=torch.rand(6, 12))
        assert s.shape == (6, 12) and w.shape == (6, 16, 16)
        assert not list(net.backbone.norm.parameters())
    y = student.backbone.eval()(images(6, 64))
    assert torch.equal(y, student.backbone.layers(images(6, 64), [2], norm=False)[0][0])
    assert student.ca_head.cls_blocks[0].num_heads == 4
    with torch.device("meta"):
        cfg = config.parse(selfpatch.Config, ["--data", "coco", "--backbone", "swin_tiny", "--base",
                                              "moby"])
        net = selfpatch.Network(cfg)
    assert sum(p.numel() for p in net.ca_head.parameters()) == 14_178_048
    assert net.ca_head.cls_blocks[0].num_heads == 24 and net.backbone.grid == (7, 7)
    neighbors = selfpatch.neighbor_mask(7, "official")
    assert list_neighbors(neighbors, 0) == [[1, 6, 7, 8, 13, 42, 43, 48]]


def test_settings_of_moby_are_those_of_its_file():
    for data in ("imagenet", "imagenet100", "coco"):
        cfg = config.parse(selfpatch.Config, ["--data", data, "--base", "moby"])
        own = config.parse(moby.Config, ["--data", data])
        for name in ("out_dim", "mlp_dim", "queue_size", "temperature", "drop_path", "clip_grad",
                     "momentum_teacher", "weight_decay", "warmup_epochs", "color_jitter", "blur_p"):
            assert getattr(cfg, name) == getattr(own, name), name
        assert cfg.lr / 256 == own.lr / 512 and cfg.weight_decay_end == cfg.weight_decay
        assert cfg.min_lr == pytest.approx(own.min_lr * cfg.batch_size / 512)
        assert cfg.global_crops_scale[0] == own.crop_min
        assert selfpatch.views(cfg)[:2] == moby.views(own)
    assert (cfg.epochs, cfg.batch_size, cfg.embed_dim) == (200, 256, 192)


# ---- neighbors -----------------------------------------------------------------------------------


def list_neighbors(neighbors, *patches):
    return [neighbors[i].nonzero().flatten().tolist() for i in patches]


def test_official_neighbors_wrap_around_the_border():
    neighbors = selfpatch.neighbor_mask(14, "official")
    assert list_neighbors(neighbors, 0, 15) == [
        [1, 13, 14, 15, 27, 182, 183, 195], [0, 1, 2, 14, 16, 28, 29, 30]]
    assert list_neighbors(selfpatch.neighbor_mask(6, "official"), 0) == [
        [1, 5, 6, 7, 11, 30, 31, 35]]
    assert (neighbors.sum(1) == 8).all()
    assert neighbors.equal(neighbors.T) and not neighbors.diagonal().any()


def test_correct_neighbors_end_at_the_border():
    neighbors = selfpatch.neighbor_mask(14, "correct")
    assert list_neighbors(neighbors, 0, 15, 13) == [
        [1, 14, 15], [0, 1, 2, 14, 16, 28, 29, 30], [12, 26, 27]]
    assert sorted(neighbors.sum(1).unique().tolist()) == [3, 5, 8]
    assert neighbors.equal(neighbors.T) and not neighbors.diagonal().any()
    assert (neighbors <= selfpatch.neighbor_mask(14, "official")).all()


def test_neighbors_wrap_around_as_published_on_imagenet_and_coco():
    found = {data: config.parse(selfpatch.Config, ["--data", data]).borders
             for data in ("imagenet", "coco", "toy", "cifar10", "imagenet100")}
    assert [*found.values()] == ["official"] * 2 + ["correct"] * 3


def test_positives_are_the_most_similar_neighbors():
    y = normal(2, 36, 8)
    for borders in ("official", "correct"):
        neighbors = selfpatch.neighbor_mask(6, borders)
        positives = selfpatch.select_positives(y, neighbors, 4)
        for b in range(2):
            for i in range(36):
                candidates = neighbors[i].nonzero().flatten()
                cosines = F.cosine_similarity(y[b, i][None], y[b, candidates])
                best = candidates[cosines.argsort(descending=True)[:4]]
                assert positives[b, i].nonzero().flatten().tolist() == sorted(best.tolist())
        assert selfpatch.select_positives(y, neighbors, 8).equal(neighbors.expand(2, -1, -1))
    assert not selfpatch.select_positives(y.abs() + 1, neighbors, 4).equal(positives)


# ---- the aggregation -----------------------------------------------------------------------------


def aggregation():
    torch.manual_seed(0)
    module = selfpatch.Aggregation(tiny(selfpatch, *SMALL))
    for p in module.parameters():                        # no bias stays 0, no scale of a norm 1
        p.data += 0.2 * torch.randn_like(p)
    return module


def aggregate_plainly(module, y, patches):
    """The published procedure for one set of `patches` of y (N, D), head by head: class attention
    over [class; patches] twice, then the norm."""
    def attend(block, z):
        u = block.norm1(torch.cat([z, y[patches]]))
        q, k, v = block.q(u[:1]), block.k(u), block.v(u)
        heads = []
        for dims in torch.arange(24).chunk(block.num_heads):
            a = (q[:, dims] @ k[:, dims].T / math.sqrt(len(dims))).softmax(-1)
            heads.append(a @ v[:, dims])
        z = z + block.proj(torch.cat(heads, 1))
        return z + block.mlp(block.norm2(z))

    z = module.cls_token[0]
    for block in module.cls_blocks:
        z = attend(block, z)
    return module.norm(z)[0]


@pytest.mark.parametrize("borders", ["correct", "official"])
def test_aggregation_equals_the_published_procedure_patch_by_patch(borders):
    module, y = aggregation(), normal(2, 16, 24)
    positives = selfpatch.select_positives(y, selfpatch.neighbor_mask(4, borders), 4)
    found = module(y, positives)
    assert found.shape == (2, 17, 24)
    for b in range(2):
        close(found[b, 0], aggregate_plainly(module, y[b], torch.arange(16)), 1e-5)
        for i in (0, 5, 14):
            chosen = positives[b, i].nonzero().flatten()
            close(found[b, 1 + i], aggregate_plainly(module, y[b], chosen.flip(0)), 1e-5)
            with pytest.raises(AssertionError):
                close(found[b, 1 + i], aggregate_plainly(module, y[b], chosen[:-1]), 1e-3)


def test_image_vector_is_equal_in_student_and_teacher_and_patches_have_the_same_norm():
    module, y = aggregation(), normal(2, 16, 24)
    student = module(y)
    teacher = module(y, selfpatch.select_positives(y, selfpatch.neighbor_mask(4, "correct"), 4))
    assert student.shape == teacher.shape == (2, 17, 24)
    close(student[:, 0], teacher[:, 0], 1e-5)
    close(student[:, 1:], module.norm(y))
    assert not torch.allclose(student[:, 1:], teacher[:, 1:], atol=0.1)


def test_target_of_a_patch_does_not_depend_on_the_patch():
    module, y = aggregation(), normal(1, 36, 24)
    neighbors = selfpatch.neighbor_mask(6, "official")

    def targets(y, num_positives):
        return module(y, selfpatch.select_positives(y, neighbors, num_positives))[0, 1:]

    other = y.clone()
    other[0, 14] = normal(24, seed=5)
    changed = (targets(y, 8) - targets(other, 8)).abs().amax(1) > 1e-5
    assert changed.equal(neighbors[14])                              # those of its 8 neighbors
    scaled = y.clone()
    scaled[0, 14] *= 7
    close(targets(y, 4), targets(scaled, 4), 1e-3)                           # eps of the norm
    of_equal_patches = targets(y[:, :1].expand(1, 36, 24), 4)
    close(of_equal_patches, of_equal_patches[:1].expand(36, 24), 1e-5)


def test_teacher_aggregates_positives_of_its_own_last_block():
    for borders, num_positives in (("correct", 2), ("official", 4)):
        _, teacher = pair("--borders", borders, "--num-positives", num_positives)
        y = teacher.backbone(images(2))
        neighbors = selfpatch.neighbor_mask(4, borders)
        positives = selfpatch.select_positives(y, neighbors, num_positives)
        expected = teacher.ca_head(y, positives)
        assert torch.equal(teacher.aggregate(y), expected)
        close(teacher(images(2))[1][0], teacher.p_head(expected[:, 1:]), 1e-5)


# ---- the loss ------------------------------------------------------------------------------------


def test_patch_loss_is_a_mean_over_crops_of_means_over_patches():
    w = [normal(4, 9, 5), normal(6, 4, 5, seed=1)]
    Q = [normal(4, 9, 5, seed=2).softmax(-1), normal(6, 4, 5, seed=3).softmax(-1)]
    crops = [F.cross_entropy(x / 0.1, q) for W, R in zip(w, Q) for x, q in zip(W, R)]
    assert len(crops) == 10
    close(selfpatch.patch_loss(w, Q, 0.1), torch.stack(crops).mean(), 1e-5)
    at_once = F.cross_entropy(*(torch.cat([z.flatten(0, 1) for z in x]) for x in (
        [z / 0.1 for z in w], Q)))
    assert abs(at_once - torch.stack(crops).mean()) > 0.01                 # weights global more


def test_loss_of_equal_student_logits_is_ln_K_of_both_losses():
    P, Q = normal(2, 3, 64).softmax(-1), [normal(6, 4, 32).softmax(-1)]
    loss = (selfpatch.cls_loss(torch.zeros(4, 3, 64), P, 0.1)
            + 0.1 * selfpatch.patch_loss([torch.zeros(6, 4, 32)], Q, 0.1))
    assert abs(loss.item() - 4.50546) < 1e-4


# ---- the network ---------------------------------------------------------------------------------


def pair(*flags):
    torch.manual_seed(0)
    cfg = tiny(selfpatch, *SMALL, *flags)
    student = selfpatch.Network(cfg)
    teacher = selfpatch.Network(cfg, teacher=True).requires_grad_(False)
    ema_update(teacher, student, 0.0)
    return student.eval(), teacher.eval()


def test_shapes_of_a_step():
    for net in pair():
        s, w = net(images(6), images(6, 16))
        assert s.shape == (4 * 3, 32) and [x.shape for x in w] == [(6, 16, 16), (6, 4, 16)]
    assert not [name for name in net.backbone.state_dict() if name in ("cls_token", "norm.weight")]
    assert net.backbone.pos_embed.shape == (1, 16, 24)


def test_patch_loss_trains_backbone_last_norm_and_its_head_but_no_attention():
    student, teacher = pair("--norm-last-layer", "true")
    x, crops = images(6), images(6, 16)
    _, u = teacher(x, crops)
    Q = [selfpatch.assign(z, torch.zeros(1, 16), 0.04) for z in u]
    selfpatch.patch_loss(student(x, crops)[1], Q, 0.1).backward()
    for name, p in student.named_parameters():
        trained = p.grad is not None and bool(p.grad.abs().sum() > 0)
        expected = name.startswith(("backbone", "ca_head.norm", "p_head"))
        assert trained == (expected and not name.endswith("weight_g")), name
    assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()
    s = student(x, crops)[0].unflatten(0, (4, 3))
    selfpatch.cls_loss(s, normal(2, 3, 32).softmax(-1), 0.1).backward()
    assert student.ca_head.cls_token.grad.abs().sum() > 0                    # L_cls trains it


def test_no_gradient_reaches_the_teacher(train, monkeypatch):  # noqa: F811
    networks, targets = record_networks_and_targets(monkeypatch, selfpatch)
    train("selfpatch", "--steps", 1, *SMALL)
    assert_no_gradient_in_teacher(networks, targets)


def test_a_run_equals_a_plain_loop_over_the_published_steps(train):  # noqa: F811
    flags = *PLAIN, *SMALL, "--lambda-patch", 0.7, "--norm-last-layer", "true"
    state, _ = train("selfpatch", *flags)
    c, c_p = torch.zeros(1, 32), torch.zeros(1, 16)

    def objective(student, teacher, batch):
        nonlocal c, c_p
        x, crops = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])
        with torch.no_grad():
            t, u = teacher(x, crops)
        s, w = student(x, crops)
        s, t = s.unflatten(0, (4, 8)), t.unflatten(0, (4, 8))
        losses = [F.cross_entropy(a / 0.1, ((b - c_p) / 0.04).softmax(-1))   # of a crop
                  for size in range(2) for a, b in zip(w[size], u[size])]
        loss = pair_by_pair(s, t[:2], c, 0.04, 0.1)[0] + 0.7 * sum(losses) / (4 * 8)
        patches = torch.cat([z.flatten(0, 1) for z in u])                    # of equal weight
        c, c_p = 0.9 * c + 0.1 * t.mean((0, 1)), 0.9 * c_p + 0.1 * patches.mean(0)
        return loss

    expected = train_plainly(selfpatch, tiny(selfpatch, *flags), objective)
    assert_equal_states(state, expected, "student", "teacher")
    close(state["center"]["center"], c, 1e-5)
    close(state["center_patch"]["center"], c_p, 1e-5)


def test_a_step_updates_the_teacher_as_published(train):  # noqa: F811
    state, log = train("selfpatch", "--steps", 1, *SMALL)
    torch.manual_seed(0)
    before = selfpatch.Network(tiny(selfpatch, *SMALL))
    assert set(state["teacher"]) == set(state["student"])
    for name, old in before.named_parameters():
        close(state["teacher"][name], 0.9 * old + 0.1 * state["student"][name], 1e-7)
    assert abs(log[0]["loss"] - log[0]["loss_cls"] - 0.1 * log[0]["loss_patch"]) < 1e-5
    assert abs(log[0]["kl"] - (log[0]["loss_cls"] - log[0]["entropy"])) < 1e-5


def test_centers_are_means_over_all_crops_and_over_all_patches(train, monkeypatch):  # noqa: F811
    t, u = normal(4 * 8, 32), [normal(16, 16, 16), normal(16, 4, 16)]

    class Fixed(selfpatch.Network):
        def forward(self, *x):
            found = super().forward(*x)
            return (t, u) if self.is_teacher else found

    monkeypatch.setattr(selfpatch, "Network", Fixed)
    state, _ = train("selfpatch", "--steps", 1, *SMALL)
    close(state["center"]["center"], 0.1 * t.mean(0, keepdim=True))
    close(state["center_patch"]["center"],
          0.1 * torch.cat([z.flatten(0, 1) for z in u]).mean(0, keepdim=True))
    assert (state["center"]["center"] - 0.1 * t[:16].mean(0)).abs().max() > 1e-3   # DINO's


def test_both_last_layers_are_frozen_at_first(train):  # noqa: F811
    state, _ = train("selfpatch", "--steps", 2, "--freeze-last-layer", 1, *SMALL)
    torch.manual_seed(0)
    for name, old in selfpatch.Network(tiny(selfpatch, *SMALL)).named_parameters():
        assert torch.equal(state["student"][name], old) == ("last_layer" in name), name


@pytest.mark.parametrize("size, parameters", [(192, 890_304), (384, 3_550_080), (768, 14_178_048)])
def test_aggregation_has_the_official_size(size, parameters):
    cfg = config.parse(selfpatch.Config, ["--data", "imagenet", "--embed-dim", str(size)])
    module = selfpatch.Aggregation(cfg)
    assert sum(p.numel() for p in module.parameters()) == parameters
    for p in (module.cls_token, module.cls_blocks[1].k.weight, module.cls_blocks[0].mlp[2].weight):
        assert abs(p.std() - 0.02) < 3e-3
    assert {m.eps for m in module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_defaults_are_the_papers():
    cfg = config.parse(selfpatch.Config, ["--data", "imagenet"])
    assert (cfg.out_dim, cfg.out_dim_selfpatch) == (65536, 4096)
    assert (cfg.num_positives, cfg.lambda_patch) == (4, 0.1)
    assert (cfg.epochs, cfg.batch_size, cfg.local_crops_number) == (200, 1024, 8)
    assert (cfg.warmup_teacher_temp, cfg.teacher_temp) == (0.04, 0.04)       # unlike DINO
    assert (cfg.warmup_teacher_temp_epochs, cfg.norm_last_layer) == (0, True)
    assert (cfg.global_crops_scale, cfg.local_crops_scale) == ((0.25, 1), (0.05, 0.25))
    cfg = config.parse(selfpatch.Config, ["--data", "coco"])
    assert (cfg.embed_dim, cfg.num_heads, cfg.batch_size) == (192, 3, 256)
    assert (cfg.out_dim, cfg.out_dim_selfpatch) == (4096, 4096)
    assert (cfg.local_crops_number, cfg.epochs) == (2, 200)
