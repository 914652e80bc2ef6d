"""BEiT against the published formulas; its masks and parameter groups; with negative controls."""
import json
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import beit
import data
from lib import config, datasets, tokenizer

TINY = """--img-size 32 --patch-size 4 --embed-dim 24 --depth 3 --num-heads 2 --drop-path 0
          --batch-size 8 --num-mask-patches 25 --min-mask-patches-per-block 5
          --second-input-size 32 --vocab-size 16""".split()


def settings(*flags):
    return config.parse(beit.Config, [*TINY, *flags])


def network(*flags, K=16):
    torch.manual_seed(0)
    return beit.Network(settings(*flags), K)


RELEASED = "--pos none --rel-pos-bias --layer-scale 0.1 --init beit".split()      # the 22K weights'


def example(B=4):
    x = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return x, beit.draw_mask(torch.arange(B), settings(), 0, 0)


# ---- the mask ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masks():
    cfg = settings(*"""--img-size 224 --patch-size 16 --num-mask-patches 75
                       --min-mask-patches-per-block 16 --second-input-size 112""".split())
    return beit.draw_mask(torch.arange(10_000), cfg, 0, 0)


def test_number_of_masked_patches_is_distributed_as_in_the_official_code(masks):
    count = masks.sum(1)
    assert masks.shape == (10_000, 196) and count.max() == 75 and count.min() >= 16
    assert abs(count.float().mean().item() - 74.5) < 0.1
    assert 0.62 < (count == 75).float().mean() < 0.71                         # about two thirds
    assert (count <= 70).float().mean() < 0.02
    corners = masks.float().mean(0)[[0, 13, -14, -1]]
    assert corners.min() > 0.03 and corners.max() - corners.min() < 0.01


def test_masks_are_blocks(masks):
    def borders(mask):
        return sum((a != b).flatten(1).sum(1).float().mean() for a, b in (
            (mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])))

    scattered = torch.rand(10_000, 196).argsort(1) < 75
    assert borders(masks.view(-1, 14, 14)) < 0.5 * borders(scattered.view(-1, 14, 14))


def test_no_rectangle_is_as_wide_or_high_as_the_grid_and_each_adds_patches():
    shapes = set()
    for area in range(20):
        for aspect in range(50):
            mask = beit.block_mask([(area / 20, aspect / 50, 0.5, 0.5)], 14, 75, 16)
            h, w = mask.any(1).sum().item(), mask.any(0).sum().item()
            assert mask.sum() == h * w                                        # one rectangle
            shapes.add((h, w))
    assert max(max(shape) for shape in shapes) == 13 and (0, 0) in shapes
    first = (0.0, 0.5, 0.0, 0.0)                                              # 4 x 4 in a corner
    assert beit.block_mask([first], 14, 75, 16).sum() == 16
    assert beit.block_mask([first] * 20, 14, 75, 16).sum() == 16
    other = (0.0, 0.5, 0.9, 0.9)
    assert beit.block_mask([first] + [first] * 9 + [other], 14, 75, 16).sum() == 32
    assert beit.block_mask([first] + [first] * 10 + [other], 14, 75, 16).sum() == 16   # stopped


def test_a_mask_depends_on_image_and_epoch_only():
    cfg, index = settings(), torch.arange(16)
    mask = beit.draw_mask(index, cfg, 0, 0)
    assert torch.equal(mask[5:9], beit.draw_mask(index[5:9], cfg, 0, 0))
    assert not torch.equal(mask, beit.draw_mask(index, cfg, 0, 1))


def test_smaller_grids_have_the_same_fraction_of_masked_patches():
    mask = beit.draw_mask(torch.arange(2000), settings("--min-mask-patches-per-block", "6"), 0, 0)
    assert abs(mask.sum(1).float().mean().item() - 24.9) < 0.1


# ---- the view ------------------------------------------------------------------------------------


def test_network_and_tokenizer_get_the_same_crop_flip_and_colors():
    pixels = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    pixels = (F.interpolate(pixels, 64, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    cfg = settings(*"--img-size 64 --patch-size 8 --color-jitter 0.4 0.4 0.4 0".split())
    loader = data.Loader(datasets.Images("random", "train", pixels=pixels), beit.views(cfg), 8, 0)
    x, u = next(loader.batches()).views
    small = F.interpolate(x, 32, mode="bilinear", antialias=True)
    assert (small - u).abs().mean() < 0.05
    assert (small - u.flip(3)).abs().mean() > 0.2


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], RELEASED])
def test_masked_pixels_do_not_affect_the_logits(flags):
    net, (x, mask) = network(*flags).eval(), example()
    pixel_mask = mask.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    logits = net(x, mask)
    assert torch.equal(logits, net(torch.where(pixel_mask, torch.randn_like(x), x), mask))
    assert not torch.equal(logits, net(torch.where(pixel_mask, x, torch.randn_like(x)), mask))


def test_logits_and_labels_are_ordered_by_image_and_row():
    net, (x, mask) = network().eval(), example()
    logits, ids = net(x, mask), torch.arange(4 * 64).view(4, 64)
    assert len(logits) == len(ids[mask]) == mask.sum()
    assert (ids[mask].diff() > 0).all()
    _, patches = net.backbone.split(net.backbone(x, mask=mask, mask_token=net.mask_token))
    one_by_one = torch.cat([net.lm_head(patches[b, i:i + 1])
                            for b in range(4) for i in range(64) if mask[b, i]])
    assert torch.allclose(logits, one_by_one, atol=1e-6)


def test_every_parameter_gets_a_gradient_and_the_tokenizer_none():
    net, (x, mask) = network(*RELEASED), example()
    tok = tokenizer.Small("vq", 16, 4, width=8).requires_grad_(False)
    beit.token_loss(net(x, mask), tok.ids(x)[mask], mask.sum()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert {"mask_token", "backbone.cls_token", "backbone.blocks.0.ls1.gamma",
            "backbone.rel_pos_bias.relative_position_bias_table"} <= dict(
                net.named_parameters()).keys()
    assert all(p.grad is None for p in tok.parameters())


def test_gradient_of_the_head_equals_its_closed_form():
    net, (x, mask) = network(), example()
    ids = torch.randint(16, (4, 64), generator=torch.Generator().manual_seed(0))[mask]
    _, patches = net.backbone.split(net.backbone(x, mask=mask, mask_token=net.mask_token))
    h = patches[mask]
    beit.token_loss(net(x, mask), ids, len(ids)).backward()
    expected = (net.lm_head(h).softmax(1) - F.one_hot(ids, 16)).T @ h / len(h)
    assert torch.allclose(net.lm_head.weight.grad, expected, atol=1e-6)
    assert not torch.allclose(net.lm_head.weight.grad, expected * len(h) / 256, atol=1e-6)


def test_network_is_permutation_equivariant_only_while_the_table_is_zero():
    net, (x, mask) = network(*RELEASED).eval(), example()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def shuffle(x):                                                           # 4 x 4 patches
        p = x.unflatten(3, (8, 4)).unflatten(2, (8, 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return p[:, order].unflatten(1, (8, 8)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def by_patch(x, mask, at):
        return torch.zeros(4, 64, 16).masked_scatter(mask[:, :, None], net(x, mask))[:, at]

    def difference():
        return (by_patch(x, mask, order) - by_patch(shuffle(x), mask[:, order],
                                                    slice(None))).abs().max()

    assert difference() < 1e-6
    torch.nn.init.normal_(net.backbone.rel_pos_bias.relative_position_bias_table)
    assert difference() > 1e-4


def test_initial_weights_are_those_of_the_official_code():
    net = network(*RELEASED)
    for name, p in net.named_parameters():
        if "gamma" in name:
            assert (p == 0.1).all()
        elif name.endswith("bias_table") or "bias" in name:
            assert (p == 0).all(), name
        elif "norm" not in name:
            assert 0 < p.abs().max() <= 0.02, name
    for number, block in enumerate(net.backbone.blocks, 1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert 0.015 < weight.abs().max() * math.sqrt(2 * number) <= 0.0200001
    assert 0.0100 < net.lm_head.weight.std() < 0.0116                         # cut at one sigma


def test_number_of_parameters_of_the_released_network_is_the_published_one():
    with torch.device("meta"):
        net = beit.Network(config.parse(beit.Config, ["--data", "imagenet", *RELEASED]), 8192)
    assert sum(p.numel() for p in net.parameters()) == 91_965_776


@pytest.mark.slow
def test_initial_loss_is_the_published_one():
    torch.manual_seed(0)
    flags = "--embed-dim 768 --num-heads 12 --depth 1".split()
    net = beit.Network(settings(*flags, *RELEASED), 8192)
    x, mask = example(2)
    with torch.no_grad():
        n_masked = int(mask.sum())
        loss = beit.token_loss(net(x, mask), torch.randint(8192, (n_masked,)), n_masked)
    assert abs(loss.item() - math.log(8192) - 0.045) < 0.1


# ---- a step of training --------------------------------------------------------------------------


def train(monkeypatch, out, *flags):
    """A run on 16 images in this process. Returns {name of a function: (arguments, keyword
    arguments, result) of its last call}."""
    calls, pixels = {}, torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*args, **named):
            result = real(*args, **named)
            calls[name] = args, named, result
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((beit, "draw_mask"), (beit.Network, "forward"), (beit, "token_loss"),
                        (torch.nn.utils, "clip_grad_norm_"), (beit, "set_lr"),
                        (tokenizer.Tokenizer, "ids")):
        watch(owner, name)
    monkeypatch.setattr(datasets, "load_images",
                        lambda *_: datasets.Images("noise", "train", pixels=pixels))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["beit.py", *TINY, *"""--workers 0 --evals 0 --device cpu
        --precision fp32 --tokenizer-steps 1 --warmup-epochs 1 --out""".split(), str(out), *flags])
    beit.main()
    return calls


def test_a_step_combines_mask_tokens_loss_clipping_and_schedule(monkeypatch, tmp_path):
    calls = train(monkeypatch, tmp_path / "run", *"""--steps 4 --clip-grad 2 --lr 1e-3 --min-lr 2e-4
        --log-every 1 --rel-pos-bias --layer-scale 0.1 --pos learned""".split())
    (_, _, *key), _, drawn = calls["draw_mask"]
    (net, x, mask, _), _, logits = calls["forward"]
    assert key == [0, 1]                                      # seed, second epoch: two steps each
    assert torch.equal(mask, drawn)
    (_, view), _, ids = calls["ids"]
    assert x.shape == view.shape == (8, 3, 32, 32) and not torch.equal(x, view)
    (_, _, count), _, loss = calls["token_loss"]
    (opt, _), _, _ = calls["set_lr"]
    (_, max_norm), _, grad_norm = calls["clip_grad_norm_"]
    labels = torch.cat([ids[b, mask[b]] for b in range(8)])
    assert torch.allclose(loss, F.cross_entropy(logits, labels))
    assert count == mask.sum() and max_norm == 2
    assert [group["weight_decay"] for group in opt.param_groups] == [0.05, 0.0]
    log = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line["lr"] for line in log] == pytest.approx([0, 5e-4, 1e-3, 6e-4])   # warmup, cosine
    assert {group["lr"] for group in opt.param_groups} == {log[-1]["lr"]}
    right = logits.gather(1, labels[:, None])[:, 0] == logits.amax(1)
    assert log[-1]["mlm_acc"] == pytest.approx(right.float().mean().item()) and 0 < right.sum()
    assert log[-1]["grad_norm"] == pytest.approx(grad_norm.item())

    names = {id(p): name for name, p in net.named_parameters()}
    decayed, others = ({id(p) for p in group["params"]} for group in opt.param_groups)
    assert decayed | others == set(names) and not decayed & others
    assert {"mask_token", "backbone.rel_pos_bias.relative_position_bias_table", "lm_head.weight",
            "backbone.patch_embed.proj.weight"} <= {names[p] for p in decayed}
    for name in (names[p] for p in others):
        assert name.endswith(("bias", "gamma", "cls_token", "pos_embed")) or "norm" in name
    assert {"backbone.cls_token", "backbone.pos_embed"} <= {names[p] for p in others}


def test_clip_grad_0_does_not_clip(monkeypatch, tmp_path):
    calls = train(monkeypatch, tmp_path / "run", "--steps", "1", "--clip-grad", "0")
    assert calls["clip_grad_norm_"][0][1] == math.inf


def test_tokenizer_and_network_have_the_same_view_in_two_sizes():
    cfg = settings(*"--img-size 64 --patch-size 8 --color-jitter 0.4 0.4 0.4 0".split())
    x, u = beit.views(cfg)
    assert (x.size, u.size, x.interpolation, u.interpolation) == (64, 32, "bicubic", "lanczos")
    assert u.like == 0 and x.scale == u.scale and x.flip == 0.5
    assert (x.jitter, x.jitter_p) == (u.jitter, u.jitter_p) == ((0.4, 0.4, 0.4, 0.0), 1.0)


@pytest.mark.parametrize("flags, sentence", [
    ("--num-mask-patches 64", "below the 64 patches"),
    ("--num-mask-patches 4", "at least --min-mask-patches-per-block 5"),
    ("--num-mask-patches 60 --min-mask-patches-per-block 57", "smaller than 8 x 8"),
    ("--num-mask-patches 0", "1 or more"), ("--min-mask-patches-per-block 0", "1 or more"),
    ("--pos none", "add --rel-pos-bias"), ("--tokenizer-kind gan", "must be vq or dvae, not gan"),
    ("--vocab-size 1", "must be 2 or more, not 1"), ("--tokenizer-steps 0", "must be 1 or more"),
])
def test_impossible_settings_are_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(*flags.split())


# ---- the loss and the optimization ---------------------------------------------------------------


def test_loss_of_unequal_micro_batches_is_the_mean_over_all_masked_patches():
    logits, ids = torch.randn(30, 16), torch.randint(16, (30,))
    whole = beit.token_loss(logits, ids, 30)
    assert torch.allclose(whole, -logits.log_softmax(1)[torch.arange(30), ids].mean())
    parts = [slice(0, 13), slice(13, 30)]
    mean = sum(beit.token_loss(logits[s], ids[s], torch.tensor(15.0)) for s in parts) / 2
    assert torch.allclose(whole, mean)
    assert not torch.allclose(whole, sum(
        beit.token_loss(logits[s], ids[s], len(ids[s])) for s in parts) / 2)


def test_defaults_are_the_papers():
    cfg = config.parse(beit.Config, ["--data", "imagenet"])
    assert (cfg.embed_dim, cfg.depth, cfg.num_heads) == (768, 12, 12)
    assert (cfg.pos, cfg.rel_pos_bias, cfg.layer_scale) == ("learned", False, 0.0)
    assert (cfg.num_mask_patches, cfg.min_mask_patches_per_block, cfg.vocab_size,
            cfg.second_input_size) == (75, 16, 8192, 112)
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.min_lr, cfg.weight_decay, cfg.clip_grad) == (
        800, 2048, 1.5e-3, 1e-5, 0.05, 3.0)
    assert (cfg.warmup_epochs, cfg.drop_path, cfg.crop_min) == (10, 0.1, 0.08)
    assert cfg.color_jitter == (0.4, 0.4, 0.4, 0.0)
