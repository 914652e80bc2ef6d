"""iBOT against closed forms and the published equations, with negative controls."""
import ast
import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from test_dino import (  # noqa: F401
    PLAIN,
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

import dino
import ibot
import selfpatch
from lib import config, rng, visualize
from lib.run import ema_update, param_groups

MASKS = "--mask-prob", 0.5, "--pred-ratio", 0.3, "--pred-ratio-var", 0.2, "--pred-shape", "block"


def published(*flags):
    """The settings of the published command: a grid of 14 x 14 patches."""
    return config.parse(ibot.Config, ["--data", "imagenet", *map(str, flags)])


# ---- what it has in common with DINO -------------------------------------------------------------


def test_without_masks_a_run_equals_dinos(train):  # noqa: F811
    flags = "--steps", 3, "--drop-path", 0.3
    expected, log = train("dino", *flags)
    unmasked, log_unmasked = train("ibot", *flags, "--mask-prob", 0, "--teacher-patch-temp", 0.04)
    assert_equal_states(unmasked, expected, "student", "teacher", "center")
    for a, b in zip(log, log_unmasked):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and b["loss_patch"] == 0
        assert abs(a["mi"] - b["mi"]) < 1e-5 and abs(a["entropy"] - b["entropy"]) < 1e-5
    masked, _ = train("ibot", *flags, *MASKS, "--teacher-patch-temp", 0.04)
    with pytest.raises(AssertionError):
        assert_equal_states(masked, expected, "student")


def syntax_tree(thing):
    """Of a function or class, without docstrings and comments."""
    tree = ast.parse(inspect.getsource(thing))
    for node in ast.walk(tree):
        body = getattr(node, "body", [None])
        if isinstance(body, list) and isinstance(body[0], ast.Expr):
            body.pop(0)
    return ast.dump(tree)


@pytest.mark.parametrize("method", [ibot, selfpatch])
def test_parts_copied_from_dino_are_equal(method):
    assert method.views(tiny(method)) == dino.views(tiny(dino))
    for name in ("Prototypes", "assign", "cls_loss", "Center", "clip_per_tensor"):
        assert syntax_tree(getattr(method, name)) == syntax_tree(getattr(dino, name)), name
    assert syntax_tree(method.Network) != syntax_tree(dino.Network)


# ---- the loss ------------------------------------------------------------------------------------


def patch_by_patch(u, w, mask, center, tau_t=0.04, tau_s=0.1):
    """L_patch as a loop over crops and patches, from logits (2B, N, K) of all patches."""
    total = 0.0
    for b in range(len(mask)):
        masked = mask[b].nonzero().flatten().tolist()
        Q, log_S = ((u[b] - center) / tau_t).softmax(-1), (w[b] / tau_s).log_softmax(-1)
        terms = [-(Q[i] * log_S[i]).sum() for i in masked]
        total += sum(terms) / max(1, len(masked)) / len(mask)
    return total


def test_patch_loss_equals_its_equation_patch_by_patch():
    u, w, c = normal(4, 6, 5), normal(4, 6, 5, seed=1), normal(5, seed=2)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 1], mask[1, 2:5], mask[3] = True, True, True                     # crop 2: none
    loss = ibot.patch_loss(w[mask], ibot.assign(u[mask], c, 0.04), mask, 0.1)
    close(loss, patch_by_patch(u, w, mask, c), 1e-4)
    over_all_patches = F.cross_entropy(w[mask] / 0.1, ibot.assign(u[mask], c, 0.04))
    assert abs(loss - over_all_patches) > 0.1                                # different weights


def test_patch_loss_hand_values():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = True                                           # one in each crop
    Q = ibot.assign(torch.tensor([[0.04, 0.0]]).expand(2, 2), torch.zeros(1, 2), 0.04)
    for w, expected in (([0.0, 0.1], 1.04432), ([0.1, 0.0], 0.58220)):
        loss = ibot.patch_loss(torch.tensor([w]).expand(2, 2), Q, mask, 0.1)
        assert abs(loss.item() - expected) < 1e-5


def test_loss_of_equal_student_logits_is_ln_K_times_the_fraction_of_masked_crops():
    K, mask = 64, torch.zeros(4, 6, dtype=torch.bool)
    mask[2, :3] = True                                                       # one of four crops
    w, Q = torch.zeros(3, K), normal(3, K).softmax(-1)
    assert abs(ibot.patch_loss(w, Q, mask, 0.1).item() - 1.03972) < 1e-4
    s, P = torch.zeros(5, 2, K), normal(2, 2, K).softmax(-1)
    assert abs(ibot.cls_loss(s, P, 0.1).item() - 4.15888) < 1e-4


def test_empty_masks_give_loss_0_and_no_division_by_zero():
    mask, none = torch.zeros(4, 6, dtype=torch.bool), torch.zeros(0, 5)
    assert ibot.patch_loss(none, none, mask, 0.1) == 0
    stats = visualize.AssignmentStats()
    stats.add(none)
    assert [x.item() for x in stats.compute()] == [0, 0]


# ---- the masks -----------------------------------------------------------------------------------


def official_block_mask(u, target, side):
    """The official procedure with its nested loops, from the same uniform numbers."""
    mask, count, numbers = torch.zeros(side, side, dtype=torch.bool), 0, iter(u.tolist())
    while count < target:
        for _ in range(10):
            area, aspect, top, left = next(numbers, (0, 0, 0, 0))
            area = (side // 3) ** 2 + area * (target - count - (side // 3) ** 2)
            aspect = math.exp(math.log(0.3) + aspect * math.log(1 / 0.3**2))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= side or w >= side:
                continue
            top, left = int(top * (side - h + 1)), int(left * (side - w + 1))
            block = mask[top:top + h, left:left + w]
            new = h * w - int(block.sum())
            if 0 < new <= target - count:
                block[:] = True
                count += new
                break
        else:
            break
    return mask


@pytest.mark.parametrize("side", [8, 14])
def test_block_masks_equal_the_plain_loop_and_the_official_one(side):
    u, target = rng.uniform(torch.arange(40), (48, 4), "u"), torch.linspace(0, side**2 / 2, 40)
    masks = ibot.block_masks(u, target, side)
    for i in range(40):
        assert torch.equal(masks[i], ibot.block_mask(u[i], target[i].item(), side))
        assert torch.equal(masks[i], official_block_mask(u[i], target[i].item(), side))
    assert (masks.sum((1, 2)) <= target).all() and not masks[0].any()


def test_block_masks_cover_the_same_fraction_as_the_official_ones():
    u = rng.uniform(torch.arange(2000), (48, 4), "u")
    for ratio, expected in zip((0.1, 0.2, 0.3, 0.4, 0.5), (0.090, 0.195, 0.292, 0.395, 0.498)):
        found = ibot.block_masks(u, torch.full((2000,), ratio * 196), 14).float().mean()
        assert abs(found - expected) < 0.002             # measured with the official code


def test_half_of_the_crops_are_masked_and_the_mean_fraction_is_the_official_one():
    mask = ibot.sample_masks(torch.arange(4000), published(), 0, 0)
    fraction = mask.float().mean(1)
    assert mask.shape == (8000, 196) and abs((fraction == 0).float().mean() - 0.5) < 0.02
    assert abs(fraction.mean() - 0.146) < 0.004 and fraction.max() <= 0.5


def test_random_masks_have_the_exact_number_of_patches():
    cfg = published("--pred-shape", "rand", "--mask-prob", 1, "--pred-ratio-var", 0)
    mask = ibot.sample_masks(torch.arange(50), cfg, 0, 0)
    assert (mask.sum(1) == int(0.3 * 196)).all()
    assert abs(mask.float().mean(0) - 0.3).max() < 0.3                       # at all places


def test_mask_ratio_is_uniform_within_pred_ratio_var_of_pred_ratio():
    cfg = published("--pred-shape", "rand", "--mask-prob", 1, "--pred-ratio", 0.7,
                    "--pred-ratio-var", 0.05)                                # official for ViT-B/L
    count = ibot.sample_masks(torch.arange(2000), cfg, 0, 0).sum(1)
    assert (count.min(), count.max()) == (int(0.65 * 196), 0.75 * 196 - 1)
    assert abs(count.float().mean() - (0.7 * 196 - 0.5)) < 0.3               # rounded down
    assert abs(count.float().std() - 0.1 * 196 / 12**0.5) < 0.2


@pytest.mark.parametrize("shape", ["block", "rand"])
def test_each_crop_has_its_own_mask_which_does_not_depend_on_its_batch(shape):
    cfg = published("--mask-prob", 1, "--pred-shape", shape)
    mask = ibot.sample_masks(torch.arange(8), cfg, 0, 0)
    assert len({tuple(m.tolist()) for m in mask}) == 16                      # images and crops
    assert torch.equal(ibot.sample_masks(torch.arange(8)[5:], cfg, 0, 0).view(2, 3, -1),
                       mask.view(2, 8, -1)[:, 5:])
    assert not torch.equal(mask, ibot.sample_masks(torch.arange(8), cfg, 0, 1))     # other epoch


# ---- the network ---------------------------------------------------------------------------------


def pair(*flags):
    torch.manual_seed(0)
    cfg = tiny(ibot, *MASKS, *flags)
    student, teacher = ibot.Network(cfg), ibot.Network(cfg, teacher=True).requires_grad_(False)
    ema_update(teacher, student, 0.0)
    return student.eval(), teacher.eval()


def random_mask(n=6, N=16):
    return torch.rand(n, N, generator=torch.Generator().manual_seed(3)) < 0.4


def test_shapes_and_the_mean_logits_of_all_patches():
    student, teacher = pair()
    x, mask = images(6), random_mask()
    s, w = student(x, mask, images(6, 16))
    t, u, mean = teacher(x, mask)
    assert s.shape == (4 * 3, 32) and w.shape == (mask.sum(), 32) and t.shape == (6, 32)
    _, of_all, _ = teacher(x, torch.ones_like(mask))                         # (2B*N, K)
    close(mean, of_all.mean(0), 1e-5)
    close(u, of_all.view(6, 16, 32)[mask], 1e-5)
    assert (mean - u.mean(0)).abs().max() > 1e-3                             # of masked ones only
    center = ibot.Center(32, 0.9)
    center.update([mean])
    close(center.center, 0.1 * of_all.mean(0, keepdim=True))


def test_only_global_crops_of_the_student_are_masked():
    student, teacher = pair()
    x, crops, mask = images(6), images(6, 16), random_mask()
    none = torch.zeros_like(mask)
    close(teacher(x, mask)[0], teacher(x, none)[0])
    s, plain = student(x, mask, crops)[0], student(x, none, crops)[0]
    masked = mask.any(1)
    assert ((s - plain)[:6].abs().amax(1) > 1e-4).equal(masked) and masked.any()
    close(s[6:], plain[6:])
    close(plain[:6], teacher(x, none)[0])                                    # the same weights


def test_masked_patches_are_mask_token_plus_position():
    student, _ = pair()
    backbone, mask = student.backbone, torch.ones(2, 16, dtype=torch.bool)
    tokens, _ = backbone.embed(images(2), mask=mask, mask_token=student.masked_embed)
    assert torch.equal(tokens[0, 1:], backbone.pos_embed[0, 1:])
    assert torch.equal(tokens[1, 0], (backbone.cls_token + backbone.pos_embed[:, :1])[0, 0])
    student.masked_embed.data.fill_(1.0)
    tokens, _ = backbone.embed(images(2), mask=mask, mask_token=student.masked_embed)
    close(tokens[0, 1:], backbone.pos_embed[0, 1:] + 1)


def test_mask_token_is_in_the_student_only_and_gets_a_gradient_only_from_masks():
    student, teacher = pair()
    assert teacher.masked_embed is None and student.masked_embed.shape == (1, 24)
    assert "masked_embed" not in dict(teacher.named_parameters())
    for mask, trained in ((random_mask(), True), (torch.zeros(6, 16, dtype=torch.bool), False)):
        student.zero_grad()
        s, w = student(images(6), mask)
        (s.square().sum() + w.square().sum()).backward()
        assert bool(student.masked_embed.grad.abs().sum() > 0) == trained
    decayed = param_groups(student, 0.04)[0]["params"]
    assert any(p is student.masked_embed for p in decayed)


def test_a_shared_head_is_one_tensor_with_gradients_of_both_tasks():
    shared, _ = pair()
    unshared, _ = pair("--shared-head", "false")
    assert not any("last_layer2" in name for name in shared.state_dict())
    z = F.normalize(normal(3, 8), dim=-1)
    assert torch.equal(shared.head.patch_logits(z), shared.head.last_layer(z))
    assert not torch.allclose(unshared.head.patch_logits(z), unshared.head.last_layer(z))

    def gradient(net, lambda1, lambda2):
        net.zero_grad()
        s, w = net(images(6), random_mask())
        (lambda1 * s.square().mean() + lambda2 * w.square().mean()).backward()
        return net.head.last_layer.weight_v.grad

    both = gradient(shared, 1, 1).clone()
    close(both, gradient(shared, 1, 0).clone() + gradient(shared, 0, 1))
    assert gradient(shared, 0, 1).abs().sum() > 0 and gradient(unshared, 0, 1).abs().sum() == 0


def test_batch_norms_get_all_patches_for_any_mask():
    student, _ = pair("--use-bn-in-head", "true", "--drop-path", 0)
    x, head, rows = images(6), student.train().head, []
    head.mlp[1].register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // 16))
    for mask in (random_mask(), random_mask().flip(0).roll(1, 1),
                 torch.zeros(6, 16, dtype=torch.bool)):
        _, w = student(x, mask, images(6, 16))
        assert sorted(rows) == [4 * 3, 6 * 16]                     # equal in all processes
        tokens = student.backbone(x, mask=mask, mask_token=student.masked_embed)
        patches = student.backbone.split(tokens)[1]
        close(w, head.patch_logits(head.project(patches))[mask], 1e-5)
        if mask.any():
            of_masked_only = head.patch_logits(head.project(patches[mask]))
            assert (w - of_masked_only).abs().max() > 0.01
        rows.clear()
    normalized = head.mlp[:2](patches)                             # (6, 16, 16)
    close(normalized.mean((0, 1)), torch.zeros(16), 1e-5)
    assert normalized.mean(0).abs().max() > 0.1                    # not for each patch separately


def test_running_statistics_of_batch_norms_are_of_class_tokens_only():
    def statistics(head):
        return [buffer.clone() for buffer in head.mlp.buffers()]

    for net in pair("--use-bn-in-head", "true", "--drop-path", 0):
        before, mask = copy.deepcopy(net.head), random_mask()
        net.train()(images(6), mask)
        token = net.masked_embed
        tokens = net.backbone(images(6), mask=None if token is None else mask, mask_token=token)
        before.train()(tokens[:, 0])
        found, expected = statistics(net.head), statistics(before)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        before(tokens[:, 1:])                                      # control: patches change them
        assert (found[0] - statistics(before)[0]).abs().max() > 1e-3
        z = net.head.project_patches(tokens[:, 1:])                # batch statistics also in eval()
        assert torch.equal(net.eval().head.project_patches(tokens[:, 1:]), z)
        assert not any(layer.training for layer in net.modules())


def test_each_loss_depends_on_its_own_logits_only():
    both, x, mask = pair("--shared-head", "false"), images(6), random_mask()
    student, teacher = both

    def compute_losses():
        (s, w), (t, u, _) = student(x, mask), teacher(x, mask)
        P, Q = (ibot.assign(z, torch.zeros(1, 32), 0.04) for z in (t.unflatten(0, (2, 3)), u))
        return ibot.cls_loss(s.unflatten(0, (2, 3)), P, 0.1), ibot.patch_loss(w, Q, mask, 0.1), w

    def change(layer):
        for net in both:
            getattr(net.head, layer).weight_v.data = normal(32, 8, seed=5)
        return compute_losses()

    loss_cls, loss_patch, w = compute_losses()
    w.retain_grad()
    loss_patch.backward()
    assert (w.grad.abs().sum(1) > 0).all()                                   # all masked patches
    new_cls, new_patch, _ = change("last_layer2")                            # of patches
    assert torch.equal(new_cls, loss_cls) and abs(new_patch - loss_patch) > 1e-2
    newer_cls, newer_patch, _ = change("last_layer")                         # of class tokens
    assert torch.equal(newer_patch, new_patch) and abs(newer_cls - loss_cls) > 1e-2


def test_no_gradient_reaches_the_teacher(train, monkeypatch):  # noqa: F811
    recorded = record_networks_and_targets(monkeypatch, ibot)
    train("ibot", "--steps", 1, *MASKS)
    assert_no_gradient_in_teacher(*recorded)


@pytest.mark.parametrize("shared", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_a_run_equals_a_plain_loop_over_the_published_steps(train, shared):  # noqa: F811
    flags = (*PLAIN, *MASKS, "--shared-head", shared, "--teacher-patch-temp", 0.06,
             "--lambda1", 0.5, "--lambda2", 2, "--steps", 10)                # into the second epoch
    state, log = train("ibot", *flags)
    cfg, c, c2, losses = tiny(ibot, *flags), torch.zeros(1, 32), torch.zeros(1, 32), []

    def objective(student, teacher, batch):
        nonlocal c, c2
        x, mask = torch.cat(batch.views[:2]), ibot.sample_masks(batch.index, cfg, 0, batch.epoch)
        t, u, _ = (z.detach() for z in teacher(x, torch.ones_like(mask)))
        s, masked = student(x, mask, torch.cat(batch.views[2:]))
        t, u, w = t.unflatten(0, (2, 8)), u.unflatten(0, mask.shape), torch.zeros(*mask.shape, 32)
        w[mask] = masked                                                     # (2B, N, K)
        loss_cls, _ = pair_by_pair(s.unflatten(0, (4, 8)), t, c, 0.04, 0.1)
        loss_patch = patch_by_patch(u, w, mask, c2, tau_t=0.06)
        c, c2 = 0.9 * c + 0.1 * t.mean((0, 1)), 0.9 * c2 + 0.1 * u.mean((0, 1))
        losses.append((0.5 * loss_cls + 2 * loss_patch).item())
        return 0.5 * loss_cls + 2 * loss_patch

    assert_equal_states(state, train_plainly(ibot, cfg, objective), "student", "teacher")
    close(state["center"]["center"], c, 1e-5)
    close(state["center_patch"]["center"], c2, 1e-5)
    close(torch.tensor([line["loss"] for line in log]), torch.tensor(losses), 1e-4)


def test_a_step_updates_teacher_and_both_centers_as_published(train):  # noqa: F811
    state, log = train("ibot", "--steps", 1, *MASKS, "--teacher-patch-temp", 0.04)
    torch.manual_seed(0)
    before = ibot.Network(tiny(ibot))
    assert "masked_embed" in state["student"] and "masked_embed" not in state["teacher"]
    for name, old in before.named_parameters():
        if name != "masked_embed":
            close(state["teacher"][name], 0.9 * old + 0.1 * state["student"][name], 1e-7)
            assert not torch.equal(old, state["student"][name]), name
    assert state["center"]["center"].shape == state["center_patch"]["center"].shape == (1, 32)
    assert abs(log[0]["loss"] - log[0]["loss_cls"] - log[0]["loss_patch"]) < 1e-5
    assert abs(log[0]["kl"] - (log[0]["loss_cls"] - log[0]["entropy"])) < 1e-5


def test_both_last_layers_are_frozen_at_first(train):  # noqa: F811
    frozen = train("ibot", "--steps", 2, "--freeze-last-layer", 1, "--shared-head", "false")[0]
    torch.manual_seed(0)
    for name, old in ibot.Network(tiny(ibot, "--shared-head", "false")).named_parameters():
        assert torch.equal(frozen["student"][name], old) == ("last_layer" in name), name


def test_schedules_are_dinos_except_the_temperature_of_patches():
    cfg = published()
    for step in range(0, 800 * 5, 7):
        *shared, _ = ibot.schedules(step, 800 * 5, 5, cfg)
        assert shared == list(dino.schedules(step, 800 * 5, 5, cfg))


def test_temperatures_of_class_and_patches_end_separately():
    cfg = published("--teacher-temp", 0.06)
    *_, temp, patch_temp = ibot.schedules(40 * 5, 800 * 5, 5, cfg)
    assert (round(temp, 6), round(patch_temp, 6)) == (0.06, 0.07)
    assert ibot.schedules(0, 800 * 5, 5, cfg)[3:] == (0.04, 0.04)


def test_defaults_are_the_published_command():
    cfg = published()
    assert (cfg.out_dim, cfg.shared_head, cfg.norm_last_layer) == (8192, True, False)
    assert (cfg.epochs, cfg.local_crops_number) == (800, 10)
    assert (cfg.global_crops_scale, cfg.local_crops_scale) == ((0.25, 1), (0.05, 0.25))
    assert (cfg.mask_prob, cfg.pred_ratio, cfg.pred_ratio_var) == (0.5, 0.3, 0.2)
    head = ibot.Head(cfg, cfg.out_dim)
    assert sum(p.numel() for p in head.parameters()) == 7_614_720            # the official one's
