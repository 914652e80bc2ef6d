"""BEiT against the published arithmetic, its masks, and its parameter groups."""
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
from lib.run import Run

TINY = """--img-size 32 --patch-size 4 --embed-dim 24 --depth 3 --num-heads 2 --drop-path 0
          --batch-size 8 --masked 25 --min-block 5 --token-size 32 --codes 16""".split()


def settings(*flags):
    return config.parse(beit.Config, [*TINY, *flags])


def network(*flags, K=16):
    torch.manual_seed(0)
    return beit.Network(settings(*flags), K)


RELEASED = "--pos none --rel-pos --layer-scale 0.1 --init beit".split()          # the 22K weights'


def example(B=4):
    x = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return x, beit.draw_mask(torch.arange(B), settings(), 0, 0)


# ---- the mask ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masks():
    cfg = settings("--img-size", "224", "--patch-size", "16", "--masked", "75", "--min-block", "16")
    return beit.draw_mask(torch.arange(10_000), cfg, 0, 0)


def test_masks_hide_as_many_patches_as_published(masks):
    count = masks.sum(1)
    assert masks.shape == (10_000, 196) and count.max() == 75 and count.min() >= 16
    assert abs(count.float().mean().item() - 74.5) < 0.1
    assert 0.62 < (count == 75).float().mean() < 0.71                         # about two thirds
    assert (count <= 70).float().mean() < 0.02
    often = masks.float().mean(0)[[0, 13, -14, -1]]                           # the corners
    assert often.min() > 0.03 and often.max() - often.min() < 0.01


def test_masks_are_blocks(masks):
    def borders(mask):
        return sum((a != b).flatten(1).sum(1).float().mean() for a, b in (
            (mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])))

    scattered = torch.rand(10_000, 196).argsort(1) < 75
    assert borders(masks.view(-1, 14, 14)) < 0.5 * borders(scattered.view(-1, 14, 14))


def test_no_rectangle_spans_a_side_or_repeats_what_is_hidden():
    shapes = set()
    for area in range(20):
        for aspect in range(50):
            mask = beit.block_mask([(area / 20, aspect / 50, 0.5, 0.5)], 14, 75, 16)
            h, w = mask.any(1).sum().item(), mask.any(0).sum().item()
            assert mask.sum() == h * w                                        # one rectangle
            shapes.add((h, w))
    assert max(max(shape) for shape in shapes) == 13 and (0, 0) in shapes
    once = (0.0, 0.5, 0.0, 0.0)                                               # 4 x 4 in a corner
    assert beit.block_mask([once], 14, 75, 16).sum() == 16
    assert beit.block_mask([once] * 20, 14, 75, 16).sum() == 16
    other = (0.0, 0.5, 0.9, 0.9)
    assert beit.block_mask([once] + [once] * 9 + [other], 14, 75, 16).sum() == 32
    assert beit.block_mask([once] + [once] * 10 + [other], 14, 75, 16).sum() == 16   # gave up


def test_a_mask_depends_on_the_image_and_the_epoch_alone():
    cfg, index = settings(), torch.arange(16)
    mask = beit.draw_mask(index, cfg, 0, 0)
    assert torch.equal(mask[5:9], beit.draw_mask(index[5:9], cfg, 0, 0))
    assert not torch.equal(mask, beit.draw_mask(index, cfg, 0, 1))


def test_smaller_grids_hide_the_same_share():
    mask = beit.draw_mask(torch.arange(2000), settings("--min-block", "6"), 0, 0)
    assert abs(mask.sum(1).float().mean().item() - 24.9) < 0.1


# ---- the view ------------------------------------------------------------------------------------


def test_network_and_tokenizer_see_the_same_crop_flip_and_colours():
    pixels = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    pixels = (F.interpolate(pixels, 64, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    cfg = settings("--img-size", "64", "--patch-size", "8", "--jitter", "0.4")
    loader = data.Loader(datasets.Images("fields", "train", pixels=pixels), beit.views(cfg), 8, 0)
    x, u = next(loader.batches()).views
    small = F.interpolate(x, 32, mode="bilinear", antialias=True)
    assert (small - u).abs().mean() < 0.05
    assert (small - u.flip(3)).abs().mean() > 0.2


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], RELEASED])
def test_logits_do_not_know_the_pixels_of_hidden_patches(flags):
    net, (x, mask) = network(*flags).eval(), example()
    hidden = mask.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    logits = net(x, mask)
    assert torch.equal(logits, net(torch.where(hidden, torch.randn_like(x), x), mask))
    assert not torch.equal(logits, net(torch.where(hidden, x, torch.randn_like(x)), mask))


def test_logits_and_labels_go_image_by_image_and_row_by_row():
    net, (x, mask) = network().eval(), example()
    logits, ids = net(x, mask), torch.arange(4 * 64).view(4, 64)
    assert len(logits) == len(ids[mask]) == mask.sum()
    assert (ids[mask].diff() > 0).all()
    _, patches = net.backbone.split(net.backbone(x, mask=mask, mask_token=net.mask_token))
    one_by_one = torch.cat([net.lm_head(patches[b, i:i + 1])
                            for b in range(4) for i in range(64) if mask[b, i]])
    assert torch.allclose(logits, one_by_one, atol=1e-6)


def test_gradients_reach_all_that_is_trained_and_nothing_of_the_tokenizer():
    net, (x, mask) = network(*RELEASED), example()
    dvae = tokenizer.Small("vq", 16, 4, width=8).requires_grad_(False)
    beit.token_loss(net(x, mask), dvae.ids(x)[mask]).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert {"mask_token", "backbone.cls_token", "backbone.blocks.0.ls1.gamma",
            "backbone.rel_pos_bias.relative_position_bias_table"} <= dict(
                net.named_parameters()).keys()
    assert all(p.grad is None for p in dvae.parameters())


def test_gradient_of_the_head_has_its_closed_form():
    net, (x, mask) = network(), example()
    ids = torch.randint(16, (4, 64), generator=torch.Generator().manual_seed(0))[mask]
    _, patches = net.backbone.split(net.backbone(x, mask=mask, mask_token=net.mask_token))
    h = patches[mask]
    beit.token_loss(net(x, mask), ids).backward()
    expected = (net.lm_head(h).softmax(1) - F.one_hot(ids, 16)).T @ h / len(h)
    assert torch.allclose(net.lm_head.weight.grad, expected, atol=1e-6)
    assert not torch.allclose(net.lm_head.weight.grad, expected * len(h) / 256, atol=1e-6)


def test_a_fresh_network_takes_patches_for_a_set_until_its_table_is_filled():
    net, (x, mask) = network(*RELEASED).eval(), example()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def shuffle(x):                                                           # 4 x 4 patches
        p = x.unflatten(3, (8, 4)).unflatten(2, (8, 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return p[:, order].unflatten(1, (8, 8)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def by_patch(x, mask, at):
        return torch.zeros(4, 64, 16).masked_scatter(mask[:, :, None], net(x, mask))[:, at]

    def differ():
        return (by_patch(x, mask, order) - by_patch(shuffle(x), mask[:, order],
                                                    slice(None))).abs().max()

    assert differ() < 1e-6
    torch.nn.init.normal_(net.backbone.rel_pos_bias.relative_position_bias_table)
    assert differ() > 1e-4


def test_weights_begin_as_in_the_official_code():
    net = network(*RELEASED)
    for name, p in net.named_parameters():
        if "gamma" in name:
            assert (p == 0.1).all()
        elif name.endswith("bias_table") or "bias" in name:
            assert (p == 0).all(), name
        elif "norm" not in name:
            assert 0 < p.abs().max() <= 0.02, name
    for l, block in enumerate(net.backbone.blocks, 1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert 0.015 < weight.abs().max() * math.sqrt(2 * l) <= 0.0200001
    assert 0.0100 < net.lm_head.weight.std() < 0.0116                         # cut at one sigma


def test_released_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        net = beit.Network(config.parse(beit.Config, ["--data", "imagenet", *RELEASED]), 8192)
    assert sum(p.numel() for p in net.parameters()) == 91_965_776


def test_initial_loss_is_the_published_one():
    torch.manual_seed(0)
    net = beit.Network(settings(*"--embed-dim 768 --num-heads 12 --depth 1".split(), *RELEASED), 8192)
    x, mask = example(2)
    with torch.no_grad():
        loss = beit.token_loss(net(x, mask), torch.randint(8192, (int(mask.sum()),)))
    assert abs(loss.item() - math.log(8192) - 0.045) < 0.1


# ---- a step of training --------------------------------------------------------------------------


def train(monkeypatch, out, *flags):
    """A run on 16 images in this process -> the last call of each function of interest."""
    calls, pixels = {}, torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*args, **named):
            result = real(*args, **named)
            calls[name] = args, named, result
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((beit, "draw_mask"), (beit.Network, "forward"), (Run, "backward"),
                        (tokenizer.Tokenizer, "ids")):
        watch(owner, name)
    monkeypatch.setattr(datasets, "load_images", lambda *_: datasets.Images("noise", "train", pixels=pixels))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["beit.py", *TINY, *"""--workers 0 --evals 0 --device cpu
        --precision fp32 --tokenizer-steps 1 --warmup-epochs 1 --out""".split(), str(out), *flags])
    beit.main()
    return calls


def test_a_step_puts_the_pieces_together(monkeypatch, tmp_path):
    calls = train(monkeypatch, tmp_path / "run", *"""--steps 4 --clip 2 --lr 1e-3 --min-lr 2e-4
        --log-every 1 --rel-pos --layer-scale 0.1 --pos learned""".split())
    (_, _, *key), _, drawn = calls["draw_mask"]
    (net, x, mask, _), _, logits = calls["forward"]
    assert key == [0, 1]                                      # seed, second epoch: two steps each
    assert torch.equal(mask, drawn)
    (_, view), _, ids = calls["ids"]
    assert x.shape == view.shape == (8, 3, 32, 32) and not torch.equal(x, view)
    (_, loss, opt), how, _ = calls["backward"]
    labels = torch.cat([ids[b, mask[b]] for b in range(8)])
    assert torch.allclose(loss, F.cross_entropy(logits, labels))
    assert how == {"clip": 2.0}
    assert [group["weight_decay"] for group in opt.param_groups] == [0.05, 0.0]
    log = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line["lr"] for line in log] == pytest.approx([0, 5e-4, 1e-3, 6e-4])   # up, half down
    assert {group["lr"] for group in opt.param_groups} == {log[-1]["lr"]}
    right = logits.gather(1, labels[:, None])[:, 0] == logits.amax(1)
    assert log[-1]["acc"] == pytest.approx(right.float().mean().item()) and 0 < right.sum()

    names = {id(p): name for name, p in net.named_parameters()}
    decayed, spared = ({id(p) for p in group["params"]} for group in opt.param_groups)
    assert decayed | spared == set(names) and not decayed & spared
    assert {"mask_token", "backbone.rel_pos_bias.relative_position_bias_table", "lm_head.weight",
            "backbone.patch_embed.proj.weight"} <= {names[p] for p in decayed}
    for name in (names[p] for p in spared):
        assert name.endswith(("bias", "gamma", "cls_token", "pos_embed")) or "norm" in name
    assert {"backbone.cls_token", "backbone.pos_embed"} <= {names[p] for p in spared}


def test_tokenizer_sees_the_crop_of_the_network():
    x, u = beit.views(settings("--img-size", "64", "--jitter", "0.4"))
    assert (x.size, u.size, x.interpolation, u.interpolation) == (64, 32, "bicubic", "lanczos")
    assert u.like == 0 and x.scale == u.scale and x.flip == 0.5
    assert (x.jitter, x.jitter_p) == (u.jitter, u.jitter_p) == ((0.4, 0.4, 0.4, 0.0), 1.0)


@pytest.mark.parametrize("masked, least", [(64, 5), (0, 0), (4, 5)])
def test_masks_that_cannot_be_get_a_sentence(masked, least, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="some must be hidden"):
        train(monkeypatch, tmp_path, "--masked", str(masked), "--min-block", str(least))


# ---- the loss and the optimisation ---------------------------------------------------------------


def test_loss_is_the_mean_over_hidden_patches_however_they_are_split():
    logits, ids = torch.randn(30, 16), torch.randint(16, (30,))
    whole = beit.token_loss(logits, ids)
    assert torch.allclose(whole, -logits.log_softmax(1)[torch.arange(30), ids].mean())
    parts = [slice(0, 13), slice(13, 30)]                                     # unequal, like masks
    mean = sum(beit.token_loss(logits[s], ids[s], torch.tensor(15.0)) for s in parts) / 2
    assert torch.allclose(whole, mean)
    assert not torch.allclose(whole, sum(beit.token_loss(logits[s], ids[s]) for s in parts) / 2)


def test_defaults_are_the_papers():
    cfg = config.parse(beit.Config, ["--data", "imagenet"])
    assert (cfg.embed_dim, cfg.depth, cfg.num_heads, cfg.pos, cfg.rel_pos, cfg.layer_scale) == (
        768, 12, 12, "learned", False, 0.0)
    assert (cfg.masked, cfg.min_block, cfg.codes, cfg.token_size) == (75, 16, 8192, 112)
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.min_lr, cfg.weight_decay, cfg.clip) == (
        800, 2048, 1.5e-3, 1e-5, 0.05, 3.0)
    assert (cfg.warmup_epochs, cfg.drop_path, cfg.min_scale, cfg.jitter) == (10, 0.1, 0.08, 0.4)
