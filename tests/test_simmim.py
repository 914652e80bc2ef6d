"""SimMIM against the arithmetic and the recorded values of the official ViT-B."""
import copy
import json
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import simmim
from lib import checkpoints, config, positions, rng, visualize
from lib.run import Run, param_groups, set_lr

TINY = """--img-size 32 --patch-size 4 --mask-patch-size 8 --embed-dim 24 --depth 3 --num-heads 2
          --drop-path 0 --batch-size 8
          --pos none --init beit --layer-scale 0.1""".split()             # as published


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def settings(*flags):
    return config.parse(simmim.Config, [*TINY, *flags])


def network(*flags):
    return simmim.Network(settings(*flags))


def example(cfg, B=4):
    """Images (B, 3, 32, 32), masks of patches (B, 8, 8) and of pixels (B, 32, 32)."""
    mask = simmim.draw_mask(torch.arange(B), cfg, 0, 0)
    return torch.randn(B, 3, 32, 32), mask, simmim.enlarge(mask, cfg.patch_size)


# ---- the mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, patch, square, n_masked", [(224, 16, 32, 120), (192, 16, 32, 88),
                                                           (32, 4, 8, 40)])
def test_every_image_has_the_same_number_of_masked_patches_in_whole_squares(
        size, patch, square, n_masked):
    cfg = settings("--img-size", str(size), "--patch-size", str(patch),
                   "--mask-patch-size", str(square))
    mask = simmim.draw_mask(torch.arange(64), cfg, 0, 0)
    assert mask.shape == (64, size // patch, size // patch)
    assert (mask.sum((1, 2)) == n_masked).all()

    def fraction_of_whole_squares(mask):
        mean = F.avg_pool2d(mask[:, None].float(), square // patch)
        return ((mean == 0) | (mean == 1)).float().mean()

    assert fraction_of_whole_squares(mask) == 1
    assert fraction_of_whole_squares(mask.roll(1, 2)) < 1                      # off by one patch


def test_squares_are_masked_equally_often_and_differently_in_every_epoch():
    cfg, index = settings(), torch.arange(4000)
    mask = simmim.draw_mask(index, cfg, 0, 0)
    assert (mask.float().mean(0) - 10 / 16).abs().max() < 0.03            # 4 standard errors: 0.031
    assert not torch.equal(mask, simmim.draw_mask(index, cfg, 0, 1))
    assert torch.equal(mask[7:9], simmim.draw_mask(index[7:9], cfg, 0, 0))


# ---- the loss ------------------------------------------------------------------------------------


def test_loss_is_the_mean_absolute_error_over_masked_pixels_and_colors():
    x, _, masked = example(settings())
    y = torch.randn_like(x)
    inside = masked[:, None].expand_as(x)
    loss = simmim.rec_loss(y, x, masked)
    assert loss.item() == pytest.approx((x - y)[inside].abs().mean().item(), rel=1e-5)
    assert simmim.rec_loss(x - 0.7, x, masked).item() == pytest.approx(0.7, rel=1e-5)
    official = ((x - y).abs() * masked[:, None]).sum() / (masked.sum() + 1e-5) / 3
    assert loss.item() == pytest.approx(official.item(), rel=1e-5)
    y = torch.where(inside, y, x)
    assert simmim.rec_loss(y, x, masked) == loss != (x - y).abs().mean()
    assert simmim.rec_loss(torch.where(inside, x, y), x, masked) == 0


def test_gradient_is_a_sign_at_masked_pixels_and_zero_elsewhere():
    x, _, masked = example(settings())
    y = torch.randn_like(x).requires_grad_()
    simmim.rec_loss(y, x, masked).backward()
    expected = (y - x).sign() * masked[:, None] / (3 * masked.sum())
    assert torch.allclose(y.grad, expected, atol=1e-9)


# ---- the network ---------------------------------------------------------------------------------


def test_numbers_of_parameters_are_the_published_ones():
    cfg = config.parse(simmim.Config, ["--data", "imagenet"])
    with torch.device("meta"):
        net = simmim.Network(cfg)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in
             (("encoder", net.backbone), ("head", net.decoder), ("all", net))}
    assert count["encoder"] + net.mask_token.numel() == 85_666_128
    assert (count["head"], count["all"]) == (590_592, 86_256_720)
    assert all(p.requires_grad for p in net.parameters())
    assert net.backbone.rel_pos_bias.relative_position_bias_table.shape == (732, 12)


def test_masked_pixels_do_not_affect_the_prediction():
    net, (x, mask, masked) = network(), example(settings())
    noise = torch.randn_like(x)
    y = net(x, mask)
    assert torch.equal(y, net(torch.where(masked[:, None], noise, x), mask))
    assert not torch.equal(y, net(torch.where(masked[:, None], x, noise), mask))


def test_head_orders_color_row_column():
    net, (x, mask, _) = network(), example(settings())
    _, patches = net.backbone.split(net.backbone(x, mask=mask.flatten(1),
                                                 mask_token=net.mask_token))
    numbers = F.linear(patches, net.decoder[0].weight.flatten(1), net.decoder[0].bias)
    y, p = net(x, mask), 4
    for row, column in ((0, 0), (2, 5), (7, 1)):
        patch = y[:, :, p * row:p * row + p, p * column:p * column + p]
        found = numbers[:, 8 * row + column]
        assert torch.allclose(patch, found.view(-1, 3, p, p), atol=1e-6)
        as_mae = found.view(-1, p, p, 3).permute(0, 3, 1, 2)
        assert not torch.allclose(patch, as_mae, atol=1e-3)


def test_initial_weights_are_the_official_ones():
    net = network("--embed-dim", "96", "--num-heads", "3")
    assert not net.backbone.rel_pos_bias.relative_position_bias_table.any()
    for number, block in enumerate(net.backbone.blocks, 1):
        assert (block.ls1.gamma == 0.1).all() and (block.ls2.gamma == 0.1).all()
        assert 0.0199 < block.attn.qkv.weight.abs().max() <= 0.02
        bound = 0.02 / math.sqrt(2 * number)
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    for token in (net.mask_token, net.backbone.cls_token):
        assert 0.018 < token.abs().max() <= 0.02
        assert 0.008 < token.std() < 0.014                                    # one sigma: 0.0108
    bound = 1 / math.sqrt(96)                                                 # PyTorch's default
    assert 0.99 * bound < net.decoder[0].weight.abs().max() <= bound
    assert net.decoder[0].bias.any()


def test_network_is_permutation_equivariant_only_while_the_table_is_zero():
    net, (x, mask, _) = network(), example(settings())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def shuffle(x):                                                  # permutes the patches
        patches = F.unfold(x, 4, stride=4)[:, :, order]
        return F.fold(patches, (32, 32), 4, stride=4)

    def difference():
        one = F.unfold(net(x, mask), 4, stride=4)[:, :, order]
        two = F.unfold(net(shuffle(x), mask.flatten(1)[:, order].view_as(mask)), 4, stride=4)
        return (one - two).abs().max()

    assert difference() < 1e-5
    torch.nn.init.normal_(net.backbone.rel_pos_bias.relative_position_bias_table)
    assert difference() > 1e-3


def test_full_pt_is_loaded_as_the_official_file(tmp_path):
    net = network()
    torch.nn.init.normal_(net.backbone.rel_pos_bias.relative_position_bias_table)
    state = checkpoints.simmim_names(net)
    assert {"encoder.mask_token", "encoder.cls_token", "encoder.blocks.0.gamma_1",
            "encoder.blocks.2.attn.v_bias", "encoder.norm.weight", "decoder.0.weight",
            "encoder.rel_pos_bias.relative_position_bias_table"} <= state.keys()
    torch.save({"model": state, "num_heads": 2}, tmp_path / "full.pt")
    loaded = checkpoints.load_encoder(tmp_path / "full.pt", quiet=True)
    x = torch.randn(2, 3, 32, 32)
    assert loaded.source.layout == "SimMIM"
    assert torch.equal(loaded(x), net.eval().backbone(x))


def test_relative_positions_have_the_recorded_indices():
    index = positions.relative_index((14, 14))
    recorded = {(0, 0): 731, (0, 1): 729, (1, 0): 730, (1, 1): 364, (1, 2): 363, (2, 1): 365,
                (1, 15): 337}
    assert {at: index[at].item() for at in recorded} == recorded


def test_a_key_bias_has_no_effect():
    net, (x, mask, _) = network(), example(settings())
    fused = copy.deepcopy(net)
    for block in fused.backbone.blocks:
        attention, D = block.attn, 24
        attention.split = False
        attention.qkv.bias = torch.nn.Parameter(torch.zeros(3 * D))
    y = net(x, mask)
    assert torch.allclose(y, fused(x, mask), atol=1e-6)
    for part, same in ((slice(24, 48), True), (slice(0, 24), False)):         # key; query (control)
        with torch.no_grad():
            for block in fused.backbone.blocks:
                block.attn.qkv.bias[part] = torch.randn(24)
            torch.nn.init.normal_(fused.backbone.rel_pos_bias.relative_position_bias_table)
            net.backbone.load_state_dict(fused.backbone.state_dict(), strict=False)
        assert torch.allclose(net(x, mask), fused(x, mask), atol=1e-5) == same


# ---- the recipe ----------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient():
    net, (x, mask, masked) = network("--drop-path", "0.1"), example(settings())
    simmim.rec_loss(net(x, mask), x, masked).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.backbone.cls_token.grad.any() and net.mask_token.grad.any()
    assert net.backbone.rel_pos_bias.relative_position_bias_table.grad.any()


def test_weight_decay_applies_to_the_same_parameters_as_in_the_official_code():
    net = network()
    decayed, others = param_groups(net, 0.05, no_decay=("cls_token",))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    names = {p: name for name, p in net.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    outside = {names[p] for p in decayed["params"] if "blocks" not in names[p]}
    assert outside == {"mask_token", "backbone.patch_embed.proj.weight", "decoder.0.weight",
                       "backbone.rel_pos_bias.relative_position_bias_table"}
    inside = {names[p].split(".", 3)[3] for p in decayed["params"] if "blocks" in names[p]}
    assert inside == {f"{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1",
                                                      "mlp.fc2")}


def test_learning_rate_has_a_linear_warmup_and_a_step():
    cfg = config.parse(simmim.Config, ["--data", "imagenet"])

    def at(epoch):
        return simmim.schedule(10 * epoch, 10 * cfg.epochs, 10 * cfg.warmup_epochs, cfg)

    assert [at(0), at(10), at(699.9)] == pytest.approx([2e-6, 4e-4, 4e-4])    # batch 2048
    assert at(5) == pytest.approx((2e-6 + 4e-4) / 2)
    assert [at(700), at(799)] == pytest.approx([4e-5, 4e-5])


def test_view_and_defaults_are_the_published_ones():
    cfg = config.parse(simmim.Config, ["--data", "imagenet"])
    view, = simmim.views(cfg)
    assert (view.size, view.scale, view.interpolation) == (224, (0.67, 1.0), "bilinear")
    assert (view.jitter_p, view.gray_p, view.blur_p, view.solarize_p) == (0, 0, 0, 0)
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.weight_decay, cfg.clip_grad, cfg.drop_path,
            cfg.mask_ratio, cfg.mask_patch_size) == (800, 2048, 1e-4, 0.05, 5.0, 0.1, 0.6, 32)


def test_steps_of_a_run_equal_those_written_out(monkeypatch, tmp_path):
    """Two steps: mask and drop path by seed, epoch and image; loss; clipping; AdamW."""
    recipe = """--drop-path 0.5 --warmup-epochs 0 --lr 0.2 --lr-drop-at 0.5 --clip-grad 0.01
                --weight-decay 5""".split()
    parts, micro_batches = [], Run.micro_batches

    def spy(self, batch):
        for part in micro_batches(self, batch):
            parts.append(part)
            yield part

    monkeypatch.setattr(Run, "micro_batches", spy)
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [
        "", *TINY, *recipe, *"--data synthetic --steps 2 --evals 1 --precision fp32".split(),
        "--device", "cpu", "--out", str(tmp_path)])
    simmim.main()
    torch.manual_seed(0)
    cfg = settings(*recipe)
    net, norms = simmim.Network(cfg), []
    opt = torch.optim.AdamW(param_groups(net, 5, no_decay=("cls_token",)))
    for part, factor in zip(parts, (1, 0.1), strict=True):
        set_lr(opt, factor * 0.2 * 8 / 512)
        x, mask = part.views[0], simmim.draw_mask(part.index, cfg, 0, part.epoch)
        drop = rng.uniform(part.index, 6, 0, part.epoch, "drop")
        opt.zero_grad()
        simmim.rec_loss(net(x, mask, drop), x, simmim.enlarge(mask, 4)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01))
        assert norms[-1] > 0.02
        opt.step()
    found = torch.load(tmp_path / "last.pt", weights_only=True)["state"]["model"]
    for name, x in net.state_dict().items():
        assert (found[name] - x).norm() < 1e-4 * x.norm(), name
    x, masked = parts[-1].views[0], simmim.enlarge(mask, 4)
    errors = [(z[m] - z[~m].mean()).abs().mean() for image, m in zip(x, masked) for z in image]
    log = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert log["loss_mean_color"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert log["grad_norm"] == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4)


@pytest.mark.parametrize("flags, sentence", [
    ("--mask-patch-size 12", "must divide --img-size 32"),
    ("--mask-patch-size 16 --patch-size 32", "be a multiple of --patch-size 32"),
    ("--mask-ratio 0", "of the 16 squares of an image at least one must be masked"),
    ("--mask-ratio 0.99", "of the 16 squares of an image at least one must be masked"),
    ("--mask-ratio inf", "at most 1"),
    ("--mask-patch-size 0", "1 or more"),
    ("--lr-drop-at 2", "at most 1"),
])
def test_impossible_settings_are_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(*flags.split())
