"""iBOT against the closed forms and the published equations, with controls that break each."""
import ast
import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from test_dino import (  # noqa: F401
    WRITTEN_OUT,
    by_hand,
    close,
    images,
    no_gradient_reached_the_teacher,
    normal,
    pair_by_pair,
    same,
    tiny,
    train,
    watch,
)

import dino
import ibot
import selfpatch
from lib import config, rng
from lib.run import ema_update, param_groups

MASKS = "--mask-p", 0.5, "--mask-min", 0.1, "--mask-max", 0.5, "--mask-shape", "block"


def grid_of_14(*flags):
    return config.parse(ibot.Config, ["--data", "imagenet", *map(str, flags)])


# ---- what it shares with DINO --------------------------------------------------------------------


def test_without_masks_a_run_is_dinos(train):  # noqa: F811
    flags = "--steps", 3, "--drop-path", 0.3
    plain, log = train("dino", *flags)
    without, log_without = train("ibot", *flags, "--mask-p", 0, "--tau-pat-end", 0.04)
    same(without, plain, "student", "teacher", "center")
    for a, b in zip(log, log_without):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and b["pat"] == 0
        assert abs(a["told"] - b["told"]) < 1e-5 and abs(a["entropy"] - b["entropy"]) < 1e-5
    masked, _ = train("ibot", *flags, *MASKS, "--tau-pat-end", 0.04)
    with pytest.raises(AssertionError):
        same(masked, plain, "student")


def code(thing):
    """Its syntax tree without docstrings and comments."""
    tree = ast.parse(inspect.getsource(thing))
    for node in ast.walk(tree):
        body = getattr(node, "body", [None])
        if isinstance(body, list) and isinstance(body[0], ast.Expr):
            body.pop(0)
    return ast.dump(tree)


@pytest.mark.parametrize("method", [ibot, selfpatch])
def test_pieces_taken_from_dino_are_still_copies(method):
    for name in ("views", "Prototypes", "assign", "cls_loss", "Center", "tally", "health",
                 "collapse"):
        assert code(getattr(method, name)) == code(getattr(dino, name)), name
    assert code(method.Network) != code(dino.Network)


# ---- the loss ------------------------------------------------------------------------------------


def everything(u, w, mask, center, tau_t=0.04, tau_s=0.1):
    """L_pat as a loop over crops and patches, from logits (2B, N, K) of all patches."""
    total = 0.0
    for b in range(len(mask)):
        hidden = mask[b].nonzero().flatten().tolist()
        Q, log_S = ((u[b] - center) / tau_t).softmax(-1), (w[b] / tau_s).log_softmax(-1)
        terms = [-(Q[i] * log_S[i]).sum() for i in hidden]
        total += sum(terms) / max(1, len(hidden)) / len(mask)
    return total


def test_patch_loss_equals_its_equation_patch_by_patch():
    u, w, c = normal(4, 6, 5), normal(4, 6, 5, seed=1), normal(5, seed=2)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 1], mask[1, 2:5], mask[3] = True, True, True                     # crop 2: none
    loss = ibot.pat_loss(w[mask], ibot.assign(u[mask], c, 0.04), mask, 0.1)
    close(loss, everything(u, w, mask, c), 1e-4)
    over_all_patches = F.cross_entropy(w[mask] / 0.1, ibot.assign(u[mask], c, 0.04))
    assert abs(loss - over_all_patches) > 0.1                                # another weighting


def test_patch_loss_hand_values():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = True                                           # one in each crop
    Q = ibot.assign(torch.tensor([[0.04, 0.0]]).expand(2, 2), torch.zeros(1, 2), 0.04)
    for w, expected in (([0.0, 0.1], 1.04432), ([0.1, 0.0], 0.58220)):
        loss = ibot.pat_loss(torch.tensor([w]).expand(2, 2), Q, mask, 0.1)
        assert abs(loss.item() - expected) < 1e-5


def test_equal_student_logits_cost_ln_K_times_the_share_of_masked_crops():
    K, mask = 64, torch.zeros(4, 6, dtype=torch.bool)
    mask[2, :3] = True                                                       # one of four crops
    w, Q = torch.zeros(3, K), normal(3, K).softmax(-1)
    assert abs(ibot.pat_loss(w, Q, mask, 0.1).item() - 1.03972) < 1e-4
    s, P = torch.zeros(5, 2, K), normal(2, 2, K).softmax(-1)
    assert abs(ibot.cls_loss(s, P, 0.1).item() - 4.15888) < 1e-4


def test_empty_masks_cost_nothing_and_are_no_division_by_zero():
    mask, none = torch.zeros(4, 6, dtype=torch.bool), torch.zeros(0, 5)
    assert ibot.pat_loss(none, none, mask, 0.1) == 0
    assert [x.item() for x in ibot.health([ibot.tally(none)])] == [0, 0]


# ---- the masks -----------------------------------------------------------------------------------


def one_rectangle_after_the_other(u, target, side):
    """BEiT's procedure as a loop, from the same uniform numbers."""
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


def test_block_masks_equal_one_rectangle_after_the_other():
    u, target = rng.uniform(torch.arange(40), (48, 4), "u"), torch.linspace(0, 98, 40)
    masks = ibot.blocks(u, target, 14)
    for i in range(40):
        assert torch.equal(masks[i], one_rectangle_after_the_other(u[i], target[i].item(), 14))
    assert (masks.sum((1, 2)) <= target).all() and not masks[0].any()


def test_block_masks_cover_what_the_official_ones_do():
    u = rng.uniform(torch.arange(2000), (48, 4), "u")
    for ratio, share in zip((0.1, 0.2, 0.3, 0.4, 0.5), (0.090, 0.195, 0.292, 0.395, 0.498)):
        found = ibot.blocks(u, torch.full((2000,), ratio * 196), 14).float().mean()
        assert abs(found - share) < 0.002                                    # fact sheet, measured


def test_half_of_the_crops_are_masked_and_the_mean_share_is_the_recipes():
    mask = ibot.masks(torch.arange(4000), grid_of_14(), 0, 0)
    share = mask.float().mean(1)
    assert mask.shape == (8000, 196) and abs((share == 0).float().mean() - 0.5) < 0.02
    assert abs(share.mean() - 0.146) < 0.004 and share.max() <= 0.5


def test_random_masks_hide_exactly_so_many_patches():
    cfg = grid_of_14("--mask-shape", "rand", "--mask-p", 1, "--mask-min", 0.3, "--mask-max", 0.3)
    mask = ibot.masks(torch.arange(50), cfg, 0, 0)
    assert (mask.sum(1) == int(0.3 * 196)).all()
    assert abs(mask.float().mean(0) - 0.3).max() < 0.3                       # everywhere


@pytest.mark.parametrize("shape", ["block", "rand"])
def test_every_crop_has_its_own_mask_whatever_its_batch(shape):
    cfg = grid_of_14("--mask-p", 1, "--mask-shape", shape)
    mask = ibot.masks(torch.arange(8), cfg, 0, 0)
    assert len({tuple(m.tolist()) for m in mask}) == 16                      # images and crops
    assert torch.equal(ibot.masks(torch.arange(8)[5:], cfg, 0, 0).view(2, 3, -1),
                       mask.view(2, 8, -1)[:, 5:])
    assert not torch.equal(mask, ibot.masks(torch.arange(8), cfg, 0, 1))     # nor the epoch's


# ---- the network ---------------------------------------------------------------------------------


def pair(*flags):
    torch.manual_seed(0)
    cfg = tiny(ibot, *MASKS, *flags)
    student, teacher = ibot.Network(cfg), ibot.Network(cfg, teacher=True).requires_grad_(False)
    ema_update(teacher, student, 0.0)
    return student.eval(), teacher.eval()


def some(n=6, N=16):
    return torch.rand(n, N, generator=torch.Generator().manual_seed(3)) < 0.4


def test_shapes_and_the_centre_of_all_patches_without_their_logits():
    student, teacher = pair()
    x, mask = images(6), some()
    s, w = student(x, mask, images(6, 16))
    t, u, mean = teacher(x, mask)
    assert s.shape == (4 * 3, 32) and w.shape == (mask.sum(), 32) and t.shape == (6, 32)
    _, everywhere, _ = teacher(x, torch.ones_like(mask))                     # (2B*N, K)
    close(mean, everywhere.mean(0), 1e-5)
    close(u, everywhere.view(6, 16, 32)[mask], 1e-5)
    assert (mean - u.mean(0)).abs().max() > 1e-3                             # of hidden ones only
    center = ibot.Center(32, 0.9)
    center.update([mean])
    close(center.center, 0.1 * everywhere.mean(0, keepdim=True))


def test_only_the_student_sees_masks_and_only_on_global_crops():
    student, teacher = pair()
    x, crops, mask = images(6), images(6, 16), some()
    none = torch.zeros_like(mask)
    close(teacher(x, mask)[0], teacher(x, none)[0])
    s, plain = student(x, mask, crops)[0], student(x, none, crops)[0]
    masked = mask.any(1)
    assert ((s - plain)[:6].abs().amax(1) > 1e-4).equal(masked) and masked.any()
    close(s[6:], plain[6:])
    close(plain[:6], teacher(x, none)[0])                                    # the same weights


def test_hidden_patches_tell_nothing_but_where_they_are():
    student, _ = pair()
    backbone, mask = student.backbone, torch.ones(2, 16, dtype=torch.bool)
    tokens, _ = backbone.embed(images(2), mask=mask, mask_token=student.masked_embed)
    assert torch.equal(tokens[0, 1:], backbone.pos_embed[0, 1:])
    assert torch.equal(tokens[1, 0], (backbone.cls_token + backbone.pos_embed[:, :1])[0, 0])
    student.masked_embed.data.fill_(1.0)
    tokens, _ = backbone.embed(images(2), mask=mask, mask_token=student.masked_embed)
    close(tokens[0, 1:], backbone.pos_embed[0, 1:] + 1)


def test_mask_token_is_the_students_and_learns_only_from_masks():
    student, teacher = pair()
    assert teacher.masked_embed is None and student.masked_embed.shape == (1, 24)
    assert "masked_embed" not in dict(teacher.named_parameters())
    for mask, learns in ((some(), True), (torch.zeros(6, 16, dtype=torch.bool), False)):
        student.zero_grad()
        s, w = student(images(6), mask)
        (s.square().sum() + w.square().sum()).backward()
        assert bool(student.masked_embed.grad.abs().sum() > 0) == learns
    decayed = param_groups(student, 0.04)[0]["params"]
    assert any(p is student.masked_embed for p in decayed)


def test_a_shared_head_is_one_tensor_that_learns_from_both_tasks():
    shared, _ = pair()
    apart, _ = pair("--shared-head", "false")
    assert not any("last_layer2" in name for name in shared.state_dict())
    z = F.normalize(normal(3, 8), dim=-1)
    assert torch.equal(shared.head.patches(z), shared.head.last_layer(z))
    assert not torch.allclose(apart.head.patches(z), apart.head.last_layer(z))

    def gradient(net, cls, pat):
        net.zero_grad()
        s, w = net(images(6), some())
        (cls * s.square().mean() + pat * w.square().mean()).backward()
        return net.head.last_layer.weight_v.grad

    both = gradient(shared, 1, 1).clone()
    close(both, gradient(shared, 1, 0).clone() + gradient(shared, 0, 1))
    assert gradient(shared, 0, 1).abs().sum() > 0 and gradient(apart, 0, 1).abs().sum() == 0


def test_batch_norms_see_all_patches_whatever_is_hidden():
    student, _ = pair("--bn-in-head", "true", "--drop-path", 0)
    x, head, rows = images(6), student.train().head, []
    head.mlp[1].register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // 16))
    for mask in (some(), some().flip(0).roll(1, 1), torch.zeros(6, 16, dtype=torch.bool)):
        _, w = student(x, mask, images(6, 16))
        assert sorted(rows) == [4 * 3, 6 * 16]                     # as many in every process
        tokens = student.backbone(x, mask=mask, mask_token=student.masked_embed)
        patches = student.backbone.split(tokens)[1]
        close(w, head.patches(head.project(patches))[mask], 1e-5)
        if mask.any():
            among_hidden = head.patches(head.project(patches[mask]))
            assert (w - among_hidden).abs().max() > 0.01
        rows.clear()
    hidden = head.mlp[:2](patches)                                 # (6, 16, 16)
    close(hidden.mean((0, 1)), torch.zeros(16), 1e-5)
    assert hidden.mean(0).abs().max() > 0.1                        # not for each patch apart


def test_batch_norms_keep_what_they_saw_of_class_tokens_alone():
    def kept(head):
        return [buffer.clone() for buffer in head.mlp.buffers()]

    for net in pair("--bn-in-head", "true", "--drop-path", 0):
        before, mask = copy.deepcopy(net.head), some()
        net.train()(images(6), mask)
        token = net.masked_embed
        tokens = net.backbone(images(6), mask=None if token is None else mask, mask_token=token)
        before.train()(tokens[:, 0])
        assert all(torch.equal(*pair) for pair in zip(kept(net.head), kept(before), strict=True))
        before(tokens[:, 1:])                                      # control: patches move them
        assert (kept(net.head)[0] - kept(before)[0]).abs().max() > 1e-3
        z = net.head.project_patches(tokens[:, 1:])                # after training, too, patches
        assert torch.equal(net.eval().head.project_patches(tokens[:, 1:]), z)    # by themselves
        assert not any(layer.training for layer in net.modules())


def test_loss_parts_look_at_their_own_logits():
    both, x, mask = pair("--shared-head", "false"), images(6), some()
    student, teacher = both

    def parts():
        (s, w), (t, u, _) = student(x, mask), teacher(x, mask)
        P, Q = (ibot.assign(z, torch.zeros(1, 32), 0.04) for z in (t.unflatten(0, (2, 3)), u))
        return ibot.cls_loss(s.unflatten(0, (2, 3)), P, 0.1), ibot.pat_loss(w, Q, mask, 0.1), w

    def change(layer):
        for net in both:
            getattr(net.head, layer).weight_v.data = normal(32, 8, seed=5)
        return parts()

    cls, pat, w = parts()
    w.retain_grad(), pat.backward()
    assert (w.grad.abs().sum(1) > 0).all()                                   # every hidden patch
    new_cls, new_pat, _ = change("last_layer2")                              # of patches
    assert torch.equal(new_cls, cls) and abs(new_pat - pat) > 1e-2
    newer_cls, newer_pat, _ = change("last_layer")                           # of classes
    assert torch.equal(newer_pat, new_pat) and abs(newer_cls - cls) > 1e-2


def test_no_gradient_reaches_the_teacher(train, monkeypatch):  # noqa: F811
    seen = watch(monkeypatch, ibot)
    train("ibot", "--steps", 1, *MASKS)
    no_gradient_reached_the_teacher(*seen)


@pytest.mark.parametrize("shared", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_a_run_equals_the_published_steps_written_out(train, shared):  # noqa: F811
    flags = (*WRITTEN_OUT, *MASKS, "--shared-head", shared, "--tau-pat-end", 0.06, "--cls", 0.5,
             "--pat", 2, "--steps", 10)                                      # into the second epoch
    state, log = train("ibot", *flags)
    cfg, c, c2, losses = tiny(ibot, *flags), torch.zeros(1, 32), torch.zeros(1, 32), []

    def objective(student, teacher, batch):
        nonlocal c, c2
        x, mask = torch.cat(batch.views[:2]), ibot.masks(batch.index, cfg, 0, batch.epoch)
        t, u, _ = (z.detach() for z in teacher(x, torch.ones_like(mask)))
        s, hidden = student(x, mask, torch.cat(batch.views[2:]))
        t, u, w = t.unflatten(0, (2, 8)), u.unflatten(0, mask.shape), torch.zeros(*mask.shape, 32)
        w[mask] = hidden                                                     # (2B, N, K)
        cls, _ = pair_by_pair(s.unflatten(0, (4, 8)), t, c, 0.04, 0.1)
        pat = everything(u, w, mask, c2, tau_t=0.06)
        c, c2 = 0.9 * c + 0.1 * t.mean((0, 1)), 0.9 * c2 + 0.1 * u.mean((0, 1))
        losses.append((0.5 * cls + 2 * pat).item())
        return 0.5 * cls + 2 * pat

    same(state, by_hand(ibot, cfg, objective), "student", "teacher")
    close(state["center"]["center"], c, 1e-5)
    close(state["center2"]["center"], c2, 1e-5)
    close(torch.tensor([line["loss"] for line in log]), torch.tensor(losses), 1e-4)


def test_a_real_step_moves_teacher_and_both_centres_as_written(train):  # noqa: F811
    state, log = train("ibot", "--steps", 1, *MASKS, "--tau-pat-end", 0.04)
    torch.manual_seed(0)
    before = ibot.Network(tiny(ibot))
    assert "masked_embed" in state["student"] and "masked_embed" not in state["teacher"]
    for name, old in before.named_parameters():
        if name != "masked_embed":
            close(state["teacher"][name], 0.9 * old + 0.1 * state["student"][name], 1e-7)
            assert not torch.equal(old, state["student"][name]), name
    assert state["center"]["center"].shape == state["center2"]["center"].shape == (1, 32)
    assert abs(log[0]["loss"] - log[0]["cls"] - log[0]["pat"]) < 1e-5
    assert abs(log[0]["kl"] - (log[0]["cls"] - log[0]["entropy"])) < 1e-5
    frozen = train("ibot", "--steps", 2, "--freeze-epochs", 1, "--shared-head", "false")[0]
    torch.manual_seed(0)
    for name, old in ibot.Network(tiny(ibot, "--shared-head", "false")).named_parameters():
        assert torch.equal(frozen["student"][name], old) == ("last_layer" in name), name


def test_schedules_are_dinos_but_for_the_temperature_of_patches():
    cfg = grid_of_14()
    for step in range(0, 800 * 5, 7):
        *shared, _ = ibot.schedules(step, 800 * 5, 5, cfg)
        assert shared == list(dino.schedules(step, 800 * 5, 5, cfg))


def test_temperatures_of_class_and_patches_have_their_own_ends():
    cfg = grid_of_14("--tau-end", 0.06)
    *_, tau, tau_pat = ibot.schedules(40 * 5, 800 * 5, 5, cfg)
    assert (round(tau, 6), round(tau_pat, 6)) == (0.06, 0.07)
    assert ibot.schedules(0, 800 * 5, 5, cfg)[3:] == (0.04, 0.04)


def test_defaults_are_the_published_command():
    cfg = grid_of_14()
    assert (cfg.out_dim, cfg.shared_head, cfg.norm_last_layer) == (8192, True, False)
    assert (cfg.epochs, cfg.local_crops, cfg.split_scale) == (800, 10, 0.25)
    assert (cfg.mask_p, cfg.mask_min, cfg.mask_max) == (0.5, 0.1, 0.5)
    head = ibot.Head(cfg, cfg.out_dim)
    assert sum(p.numel() for p in head.parameters()) == 7_614_720            # fact sheet
