"""MMC against the closed forms and the published equations, with controls that break each."""
import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from test_dino import (
    assert_equal_states,
    assert_no_gradient_in_teacher,
    limit_images,
    record_networks_and_targets,
)
from test_ibot import syntax_tree

import hybrid
import mmc
import moco_v3
from lib import config, datasets, distributed, rng, visualize
from lib.run import Run


def settings(*flags):
    """The dataclass with a small network: `--data imagenet` has an empty section."""
    small = ("--img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 2 --mlp-dim 32 "
             "--out-dim 16 --group-size 4 --local-crops-number 0")
    return config.parse(mmc.Config, ["--data", "imagenet", *small.split(), *flags])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def orthonormal(*shape):
    return torch.eye(math.prod(shape[:-1]), shape[-1]).view(shape)


# ---- the corruption ------------------------------------------------------------------------------


def loop_of_rectangles(u, size, ratio, align):
    """GMML's procedure as a loop over rectangles and pixels, from the same uniform numbers."""
    region, longest = torch.zeros(size, size, dtype=torch.bool), max(align + 1, int(0.3 * size))
    for a, b, c, d in u.tolist():
        if region.sum() >= ratio * size**2:
            break
        top, left = (int(v * (size - align)) // align * align for v in (a, b))
        h, w = (align + int(v * (longest - align)) for v in (c, d))
        h, w = (round(min(a, size - b) / align) * align for a, b in ((h, top), (w, left)))
        region[top : top + h, left : left + w] = True
    return region


@pytest.mark.parametrize("align", [1, 16])
def test_region_equals_one_rectangle_after_the_other(align):
    u = torch.rand(6, 255, 4, generator=torch.Generator().manual_seed(1))
    ratio = torch.tensor([0.0, 0.01, 0.3, 0.5, 0.63, 0.75])
    region = mmc.rectangles(u, 112, ratio, align)
    for i in range(6):
        assert torch.equal(region[i], loop_of_rectangles(u[i], 112, ratio[i].item(), align))
    areas = region.float().mean((1, 2))
    assert (areas >= ratio).all() and areas[5] < 1  # the candidates were enough, and not all used
    assert not torch.equal(region[5], loop_of_rectangles(u[5], 112, 0.5, align))


def test_batched_union_of_a_gpu_equals_the_loop_of_a_cpu():
    u = torch.rand(4, mmc.CANDIDATES, 4, generator=torch.Generator().manual_seed(2))
    ratio = torch.tensor([0.0, 0.2, 0.5, 0.8])
    for size, align in ((64, 1), (112, 16), (224, 1)):
        top, height = mmc.span(u[..., 0], u[..., 2], size, align)
        left, width = mmc.span(u[..., 1], u[..., 3], size, align)
        boxes = torch.stack([top, top + height, left, left + width], -1)
        loop = mmc.rectangles(u, size, ratio, align)
        assert torch.equal(loop, mmc.batched_union(boxes, size, ratio * size**2))
        assert not torch.equal(loop, mmc.batched_union(boxes, size, ratio * size**2 * 0.9))


def test_covered_area_reaches_its_target_and_aligned_regions_are_constant_on_patches():
    cfg = settings("--img-size", "112")
    index = torch.arange(512)
    region, pasted, other, _ = mmc.corruption(index, cfg, 4, 0, 0)
    area = region.float().mean((1, 2))
    assert abs(pasted.float().mean() - 0.35) < 0.06                             # 3 sigma
    assert (area[pasted] >= 0.3).all() and area[pasted].mean() < 0.34           # sheet: 0.31
    assert (area[~pasted] >= 0.5).all() and 0.59 < area[~pasted].mean() < 0.67  # sheet: 0.63
    assert area[~pasted].max() > 0.74                            # the candidates suffice for 0.75
    assert ((other - index) % 4).unique().tolist() == [1, 2, 3]  # any other image of the group
    cfg.drop_align = 16
    region = mmc.corruption(index, cfg, 4, 0, 0)[0].float()
    blocks = F.avg_pool2d(region[:, None], 16)
    assert torch.equal(region, F.interpolate(blocks, scale_factor=16)[:, 0])


def test_views_are_sits_pair_with_the_papers_strengths():
    one, two, local = mmc.views(settings("--local-crops-number", "10"))
    for view in one, two, local:
        assert (view.jitter, view.jitter_p, view.gray_p) == ((0.4, 0.4, 0.4, 0.0), 0.8, 0.2)
    assert (one.blur_p, two.blur_p, local.blur_p) == (1.0, 0.1, 0.5)
    assert (one.solarize_p, two.solarize_p, local.solarize_p) == (0.0, 0.2, 0.0)
    assert (one.scale, local.scale, local.copies) == ((0.25, 1.0), (0.05, 0.25), 10)
    without = settings("--local-crops-number", "10", "--lambda-cls", "0")
    assert mmc.views(without)[2].copies == 0                     # only L_cls uses local crops


def test_corruption_of_an_image_does_not_depend_on_its_batch_but_on_view_and_epoch():
    cfg = settings()
    whole, part = (
        mmc.corruption(torch.arange(8)[rows], cfg, 4, 0, 1, 0) for rows in (slice(8), slice(4, 8))
    )
    assert torch.equal(whole[0][4:], part[0]) and torch.equal(whole[3][4:], part[3])
    assert not torch.equal(whole[0], mmc.corruption(torch.arange(8), cfg, 4, 0, 1, 1)[0])
    assert not torch.equal(whole[0], mmc.corruption(torch.arange(8), cfg, 4, 0, 2, 0)[0])


def test_corrupt_changes_the_region_only_and_pastes_another_image_of_the_group():
    cfg = settings("--paste-prob", "0.5")
    x, index = torch.randn(16, 3, 32, 32), torch.arange(16)
    region, pasted, other, noise = mmc.corruption(index, cfg, 4, 0, 0)
    before = x.clone()
    y = mmc.corrupt(x, region, pasted, other, noise)
    assert torch.equal(x, before)  # the target is not destroyed
    inside = region[:, None].expand_as(x)
    assert torch.equal(y[~inside], x[~inside]) and not torch.equal(y[inside], x[inside])
    assert 0 < pasted.sum() < 16
    for i in range(16):
        source = x[other[i]] if pasted[i] else noise[i]
        assert torch.equal(y[i][inside[i]], source[inside[i]])
    assert (other != index).all() and torch.equal(other // 4, index // 4)


# ---- the losses: closed forms of the fact sheet --------------------------------------------------


def test_rec_loss_looks_at_the_region_only():
    target, region = torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8) < 0.4
    inside = region[:, None].expand_as(target)
    noise = torch.randn_like(target)
    assert mmc.rec_loss(torch.where(inside, target, noise), target, region) == 0
    off = mmc.rec_loss(torch.where(inside, target - 0.7, noise), target, region)
    assert abs(off.item() - 0.7) < 1e-6
    assert mmc.rec_loss(torch.where(inside, noise, target), target, region) > 0.5  # control
    assert mmc.rec_loss(noise, target, torch.zeros_like(region)) == 0  # and not nan
    halves = [mmc.rec_loss(noise[i:i + 1], target[i:i + 1], region[i:i + 1], region.sum() / 2)
              for i in (0, 1)]           # of two processes: their mean is that of all pixels
    whole = mmc.rec_loss(noise, target, region)
    assert torch.allclose(sum(halves) / 2, whole) and region[0].sum() != region[1].sum()
    assert torch.allclose(mmc.rec_loss(*(x.flip(0) for x in (noise, target, region))), whole)


@pytest.mark.parametrize("B, N, expected", [(3, 4, 2.19722), (48, 196, 9.12837)])
def test_patch_loss_of_equal_vectors_is_log_of_one_plus_negatives(B, N, expected):
    z = torch.ones(B, N, 4)
    assert abs(mmc.patch_loss(z, z, 0.2, group_size=B).item() - expected) < 1e-4


def test_patch_loss_of_orthonormal_perfect_vectors():
    z = orthonormal(2, 4, 8)
    assert abs(mmc.patch_loss(z, z, 0.2, group_size=2).item() - 0.026595) < 1e-6


def test_patch_loss_equals_equation_2_term_by_term():
    Q, K, total = unit(4, 3, 5), unit(4, 3, 5, seed=1), 0.0
    for b in range(4):
        others = [c for c in range(b // 2 * 2, b // 2 * 2 + 2) if c != b]  # groups of 2
        for i in range(3):
            positive = math.exp(Q[b, i] @ K[b, i] / 0.2)
            negative = sum(math.exp(Q[b, i] @ K[c, j] / 0.2) for c in others for j in range(3))
            total -= math.log(positive / (positive + negative)) / 12
    assert abs(mmc.patch_loss(Q, K, 0.2, group_size=2).item() - total) < 1e-5
    assert abs(mmc.patch_loss(Q, K, 0.2, group_size=4).item() - total) > 0.1  # control


def test_patch_loss_ignores_other_patches_of_the_same_image():
    Q, K = unit(3, 4, 6), unit(3, 4, 6, seed=1)

    def gradient_at_first_patch(K):          # it depends on the keys that the first query sees
        K = K.clone().requires_grad_()
        q = Q.clone().requires_grad_()
        loss = mmc.patch_loss(q, K, 0.2, group_size=3)
        (grad,) = torch.autograd.grad(loss, q)
        return grad[0, 0]

    same, other = K.clone(), K.clone()
    same[0, 1:] = unit(3, 6, seed=2)
    other[1, 2] = unit(6, seed=3)
    assert torch.allclose(gradient_at_first_patch(K), gradient_at_first_patch(same), atol=1e-7)
    assert not torch.allclose(gradient_at_first_patch(K), gradient_at_first_patch(other), atol=1e-4)


def test_cls_loss_closed_forms_and_number_of_pairs():
    z = torch.ones(2, 48, 4)
    assert abs(mmc.cls_loss(z, z, 0.2).item() - 3.87120) < 1e-4  # ln 48
    z = orthonormal(1, 4, 8).repeat(2, 1, 1)
    assert abs(mmc.cls_loss(z, z, 0.2).item() - 0.020012) < 1e-6
    q, k = unit(5, 6, 8), unit(2, 6, 8, seed=1)  # 3 local crops
    total = sum(F.cross_entropy(q[v] @ k[g].T / 0.2, torch.arange(6))
                for g in (0, 1) for v in range(5) if v != g)
    assert torch.allclose(mmc.cls_loss(q, k, 0.2), total / (2 * (1 + 3)))


def test_cls_loss_is_symmetric_in_views_and_finds_its_images_among_gathered_keys():
    q, k = unit(2, 4, 8), unit(2, 12, 8, seed=1)
    k[:, 4:8] = q.flip(0)  # ours begin at 4, and agree across views
    right = mmc.cls_loss(q, k, 0.2, first=4)
    assert torch.allclose(right, mmc.cls_loss(q.flip(0), k.flip(0), 0.2, first=4))
    assert right < 1 < mmc.cls_loss(q, k, 0.2, first=0)


@pytest.mark.parametrize("loss", [
    lambda q, k: mmc.patch_loss(q, k, 0.2, group_size=4),
    lambda q, k: mmc.cls_loss(q.transpose(0, 1), k.transpose(0, 1), 0.2)])
def test_contrastive_losses_ignore_norms_and_the_order_of_images(loss):
    q, k = unit(4, 2, 8), unit(4, 2, 8, seed=1)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(loss(q, k), loss(q * torch.rand(4, 2, 1), 7 * k), atol=1e-6)
    assert torch.allclose(loss(q, k), loss(q[order], k[order]), atol=1e-6)
    assert not torch.allclose(loss(q, k), loss(q[order], k), atol=1e-3)


# ---- the network ---------------------------------------------------------------------------------


def test_shapes_of_a_step_with_local_crops():
    cfg = settings("--local-crops-number", "3", "--local-crops-size", "16")
    net = mmc.Network(cfg)
    q, Q, pixels = net(torch.randn(2 * 4, 3, 32, 32), torch.randn(3 * 4, 3, 16, 16))
    assert q.shape == (5 * 4, 16) and Q.shape == (8, 16, 16) and pixels.shape == (8, 3, 32, 32)
    assert [v.copies for v in mmc.views(cfg)] == [1, 1, 3]


def test_projection_heads_are_copies_of_moco_v3s():
    assert syntax_tree(mmc.mlp) == syntax_tree(moco_v3.mlp) == syntax_tree(hybrid.mlp)


def test_unpatchify_puts_every_pixel_back():
    x = torch.arange(2 * 3 * 32 * 32.0).view(2, 3, 32, 32)
    patches = torch.stack([x[:, :, r:r + 8, c:c + 8].permute(0, 2, 3, 1).flatten(1)
                           for r in range(0, 32, 8) for c in range(0, 32, 8)], 1)
    assert torch.equal(mmc.unpatchify(patches), x)


@pytest.mark.parametrize("only", ["rec", "cls", "patch"])
def test_a_loss_trains_its_own_head_and_the_backbone(only):
    net, x = mmc.Network(settings()), torch.randn(8, 3, 32, 32)
    q, Q, pixels = net(x)
    k, K = unit(2, 4, 16), unit(8, 16, 16)
    {"rec": lambda: mmc.rec_loss(pixels, x, torch.ones(8, 32, 32, dtype=torch.bool)),
     "cls": lambda: mmc.cls_loss(q.unflatten(0, (2, 4)), k, 0.2),
     "patch": lambda: mmc.patch_loss(Q, K, 0.2, group_size=4)}[only]().backward()
    for name, p in net.named_parameters():
        touched = p.grad is not None and bool(p.grad.abs().sum() > 0)
        if name.startswith("head"):
            assert touched == (name.split(".")[0] == f"head_{only}"), name
    assert net.backbone.patch_embed.proj.weight.grad.abs().sum() > 0


# ---- a run against the fact sheet's equations ----------------------------------------------------


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run of mmc.main: settings, batches, networks, targets of the losses, checkpoint, log."""
    flags = ("--data synthetic --pos learned --img-size 16 --patch-size 8 --embed-dim 16 --depth 2 "
             "--num-heads 2 --mlp-dim 16 --out-dim 8 --group-size 4 --batch-size 8 "
             "--local-crops-number 2 --local-crops-size 8 --drop-path 0.3 --steps 3 "
             "--warmup-epochs 0 --lr 0.1 --clip-grad 0.05 --weight-decay 0.2 "
             "--momentum-teacher 0.8 --lambda-rec 2 --lambda-cls 1.5 --lambda-patch 0.5 "
             "--paste-prob 0.5 "
             "--workers 0 --evals 0 --log-every 1 --precision fp32 --device cpu").split()
    out, batches, steps = tmp_path_factory.mktemp("mmc"), [], Run.steps

    def spy(self, loader):
        for step, batch in steps(self, loader):
            batches.append(batch)
            yield step, batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "steps", spy)
        patch.setattr(distributed, "measure_peak", lambda *_: 1.0)
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(datasets, "load_images", limit_images(datasets.load_images))
        patch.setattr("sys.argv", ["mmc.py", *flags, "--out", str(out)])
        networks, targets = record_networks_and_targets(patch, mmc)
        mmc.main()
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (config.parse(mmc.Config, flags), batches, networks, targets,
            torch.load(out / "last.pt")["state"], log)


def written_out(cfg, batches, other_view=True):
    """Student, teacher and losses of those steps, by the fact sheet's sections 2 and 3. Only the
    networks and the draws of chance are mmc.py's; both are tested above."""
    torch.manual_seed(cfg.seed)
    student, teacher = mmc.Network(cfg), mmc.Network(cfg, teacher=True)
    teacher.load_state_dict({k: student.state_dict()[k] for k in teacher.state_dict()})
    now, B = dict(student.named_parameters()), 8
    opt = torch.optim.AdamW([dict(params=[p for p in now.values() if p.ndim > 1], weight_decay=0.2),
                             dict(params=[p for p in now.values() if p.ndim == 1], weight_decay=0)])
    losses = []
    for step, batch in enumerate(batches):
        x, crops = batch.views[:2], batch.views[2:]
        seen, wrong, count = [], 0.0, 0
        for v in range(2):                           # images, and in them the corrupted pixels
            region, pasted, other, noise = mmc.corruption(batch.index, cfg, 4, 0, batch.epoch, v)
            y = x[v].clone()
            for b in range(B):
                y[b][:, region[b]] = (x[v][other[b]] if pasted[b] else noise[b])[:, region[b]]
            seen.append((y, region))
        drop = rng.uniform(batch.index, (4, 4), 0, batch.epoch, "drop").unbind(1)
        q, Q, pixels = student(torch.cat([y for y, _ in seen]), torch.cat(crops),
                               torch.cat(drop[:2]), torch.cat(drop[2:]))
        k, K, _ = (z if z is None else z.detach() for z in teacher(torch.cat(x)))

        for v in range(2):
            for b in range(B):
                region = seen[v][1][b]
                wrong += (pixels[v * B + b] - x[v][b])[:, region].abs().sum()
                count += 3 * region.sum()
        Q, K, q, k = (F.normalize(z, dim=-1) for z in (Q, K, q, k))
        pat = 0.0
        for row in range(2 * B):                     # both views, 4 images a group
            rows = range(row // 4 * 4, row // 4 * 4 + 4)
            negatives = torch.cat([K[r] for r in rows if r != row])
            positive = (Q[row] * K[row]).sum(-1, keepdim=True)
            logits = torch.cat([positive, Q[row] @ negatives.T], 1) / 0.2
            pat += (logits.logsumexp(1) - logits[:, 0]).mean() / (2 * B)
        q, k, pairs = q.view(4, B, -1), k.view(2, B, -1), []
        for g in range(2):
            for v in range(4):
                if (v != g) == other_view or v > 1:
                    logits = q[v] @ k[g].T / 0.2
                    pairs.append((logits.logsumexp(1) - logits.diagonal()).mean())
        parts = dict(loss_rec=wrong / count, loss_cls=sum(pairs) / 6, loss_patch=pat)
        loss = 2 * parts["loss_rec"] + 1.5 * parts["loss_cls"] + 0.5 * parts["loss_patch"]
        losses.append(dict(parts, loss=loss))
        assert len(pairs) == 6

        left = (1 + math.cos(math.pi * step / 3)) / 2
        for group in opt.param_groups:
            group["lr"] = 1e-6 + (0.1 * B / 256 - 1e-6) * left
        opt.zero_grad()
        loss.backward()
        norms = [p.grad.norm().item() for p in now.values()]
        assert min(norms) < 0.05 < max(norms)                                # each for itself
        for p, norm in zip(now.values(), norms):
            p.grad *= min(1.0, 0.05 / (norm + 1e-6))
        opt.step()
        m = 1 - (1 - 0.8) * left
        for name, p in teacher.named_parameters():
            p.data = m * p.data + (1 - m) * now[name].data
    return dict(student=student.state_dict(), teacher=teacher.state_dict()), losses


def test_a_run_equals_the_published_steps_written_out(three_steps):
    cfg, batches, _, _, state, log = three_steps
    expected, losses = written_out(cfg, batches)
    assert_equal_states(state, expected, "student", "teacher")
    for line, parts in zip(log, losses, strict=True):
        for name, value in parts.items():
            assert line[name] == pytest.approx(value.item(), abs=1e-5), name
    with pytest.raises(AssertionError):
        assert_equal_states(state, written_out(cfg, batches, other_view=False)[0], "student")


def test_no_gradient_reaches_teacher_or_keys(three_steps):
    _, _, networks, targets, _, _ = three_steps
    assert_no_gradient_in_teacher(networks, targets)
    assert len(targets) == 2 * 3 and networks[1].head_rec is None


def test_weight_zero_removes_the_head():
    net = mmc.Network(settings("--lambda-rec", "0", "--lambda-patch", "0"))
    q, Q, pixels = net(torch.randn(4, 3, 32, 32))
    assert Q is None and pixels is None and net.head_rec is None and q.shape == (4, 16)


@pytest.mark.parametrize("weight, loss, warning",
                         [(1, 1.01, True), (1, 0.93, False), (0, 1, False)])
def test_collapse_shows_in_feat_std_and_loss_of_class_tokens_that_are_trained(
        weight, loss, warning, monkeypatch, tmp_path, capsys):
    flags = ("--data synthetic --img-size 16 --patch-size 8 --embed-dim 16 --depth 1 --num-heads 2 "
             "--mlp-dim 16 --group-size 4 --batch-size 8 --local-crops-number 0 --steps 1 "
             "--workers 0 --precision fp32 --device cpu --evals 1").split()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {"feat_std": torch.tensor(0.04)})
    monkeypatch.setattr(mmc, "cls_loss", lambda q, *_, **__: (
        0 * q.sum() + loss * math.log(8)))
    monkeypatch.setattr("sys.argv", ["", *flags, "--lambda-cls", str(weight),
                                     "--out", str(tmp_path)])
    mmc.main()
    assert ("collapsed" in capsys.readouterr().out) == warning


def test_defaults_are_the_papers():
    cfg = config.parse(mmc.Config, ["--data", "imagenet"])
    paper = dict(temperature=0.2, momentum_teacher=0.996, weight_decay=0.04, lr=7.5e-4,
                 min_lr=1e-6, mlp_dim=4096, epochs=400, embed_dim=768, patch_size=16, img_size=224,
                 noise_ratio=0.75, paste_ratio=0.3, paste_prob=0.35,
                 color_jitter=(0.4, 0.4, 0.4, 0.0), lambda_rec=1, lambda_cls=1, lambda_patch=1)
    assert {name: getattr(cfg, name) for name in paper} == paper
    cfg = config.parse(mmc.Config, ["--data", "imagenet100"])
    assert (cfg.embed_dim, cfg.num_heads, cfg.epochs) == (384, 6, 500)
