"""CAE against the published formulas: what each part depends on, where gradients stop, blocks."""
import json
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import beit
import cae
import vit
from lib import config, datasets, positions, tokenizer

TINY = """--img-size 32 --patch-size 4 --embed-dim 24 --depth 2 --num-heads 2 --drop-path 0
          --regressor-depth 2 --decoder-depth 2 --batch-size 8 --num-mask-patches 32
          --min-mask-patches-per-block 5 --second-input-size 32 --vocab-size 16""".split()


def settings(*flags):
    return config.parse(cae.Config, [*TINY, *flags])


def network(*flags, K=16, randomize=True):
    """A small network in eval mode. randomize: noise on every trained parameter, so that each has
    an effect."""
    torch.manual_seed(0)
    net = cae.Network(settings(*flags), K)
    if randomize:
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
    return net.eval()


def example(B=4):
    """Images, masks, indices of the visible and of the masked patches."""
    x = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = cae.draw_mask(torch.arange(B), settings(), 0, 0)
    return x, mask, *cae.split_patches(mask, 32)


def token_ids(*shape):
    return torch.randint(16, shape, generator=torch.Generator().manual_seed(0))


# ---- the mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, count, least", [
    (14, 98, 16), *(pytest.param(*sizes, marks=pytest.mark.slow)
                    for sizes in ((8, 32, 5), (4, 8, 2), (16, 128, 21)))])
def test_every_mask_has_the_same_number_of_masked_patches(size, count, least):
    cfg = settings("--img-size", str(4 * size), "--second-input-size", str(4 * size),
                   "--num-mask-patches", str(count), "--min-mask-patches-per-block", str(least))
    mask = cae.draw_mask(torch.arange(1000), cfg, 0, 0)
    assert (mask.sum(1) == count).all()
    rate = mask.float().mean(0)
    assert (rate > 0.03).all()
    corners = rate[[0, size - 1, -size, -1]]     # the first is not masked to reach the number
    assert corners.max() - corners.min() < 0.1
    assert torch.equal(mask[5:9], cae.draw_mask(torch.arange(5, 9), cfg, 0, 0))
    assert not torch.equal(mask, cae.draw_mask(torch.arange(1000), cfg, 0, 1))


def test_masks_are_blocks():
    def borders(mask):
        return sum((a != b).flatten(1).sum(1).float().mean() for a, b in (
            (mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])))

    cfg = settings(*"""--img-size 224 --patch-size 16 --num-mask-patches 98
                       --min-mask-patches-per-block 16 --second-input-size 112""".split())
    mask = cae.draw_mask(torch.arange(1000), cfg, 0, 0)
    scattered = torch.rand(1000, 196).argsort(1) < 98
    assert borders(mask.view(-1, 14, 14)) < 0.5 * borders(scattered.view(-1, 14, 14))


def test_no_rectangle_is_as_wide_or_high_as_the_grid_and_missing_patches_are_filled_up():
    wide = (0.9, 0.0, 0.0, 0.0)                              # 5 x 17 patches: fails
    square = (0.0, 0.5, 0.5, 0.5)                            # 4 x 4
    assert cae.block_mask([wide], 14, 98, 16).flatten()[:98].all()
    mask = cae.block_mask([wide, square], 14, 98, 16)
    assert mask[5:9, 5:9].all() and mask.sum() == 98


def test_masks_are_beits_except_that_attempts_do_not_end():
    u = torch.rand(200, 400, 4, generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(beit.block_mask(v, 14, 75, 16), cae.block_mask(v, 14, 75, 16)) for v in u]
    equal = [torch.equal(a, b) for a, b in pairs if a.sum() == 75]
    assert all(equal) and 100 < len(equal) < 200
    assert all((b | ~a).all() and b.sum() == 75 for a, b in pairs)


def test_visible_and_masked_patches_are_in_raster_order():
    mask = cae.draw_mask(torch.arange(4), settings(), 0, 0)
    visible, masked = cae.split_patches(mask, 32)
    for b in range(4):
        assert masked[b].tolist() == mask[b].nonzero()[:, 0].tolist()
        assert visible[b].tolist() == (~mask[b]).nonzero()[:, 0].tolist()


# ---- what each part depends on -------------------------------------------------------------------


def test_masked_pixels_affect_the_target_only_and_visible_ones_the_prediction_only():
    net, (x, mask, visible, masked) = network(), example()
    pixel_mask = mask.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    logits, zhat, zbar = net(x, visible, masked)
    assert logits.shape == (4, 32, 16) and zhat.shape == zbar.shape == (4, 32, 24)
    new = net(torch.where(pixel_mask, other, x), visible, masked)
    assert torch.equal(new[0], logits) and torch.equal(new[1], zhat)
    assert not torch.equal(new[2], zbar)
    new = net(torch.where(pixel_mask, x, other), visible, masked)
    assert torch.equal(new[2], zbar) and not torch.equal(new[0], logits)


def test_target_is_the_encoders_output_for_masked_patches_and_class_token_only():
    net, (x, _, visible, masked) = network(), example()
    tokens = net.encoder(x, keep=masked)
    assert tokens.shape == (4, 1 + 32, 24)
    _, _, zbar = net(x, visible, masked)
    assert torch.equal(zbar, tokens[:, 1:])
    whole = net.encoder(x)[:, 1:].gather(1, masked[:, :, None].expand(-1, -1, 24))
    assert not torch.allclose(zbar, whole, atol=1e-2)                         # another method


def test_network_is_equivariant_to_the_order_of_masked_patches_and_invariant_to_the_visible():
    net, (x, _, visible, masked) = network(), example()
    logits, zhat, zbar = net(x, visible, masked)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    for new, old in zip(net(x, visible, masked[:, order]), (logits, zhat, zbar)):
        assert torch.allclose(new, old[:, order], atol=1e-5)
        assert not torch.allclose(new, old, atol=1e-2)
    assert torch.allclose(net(x, visible[:, order], masked)[1], zhat, atol=1e-5)


def test_regressor_and_decoder_get_the_positions_of_their_patches():
    net, (x, _, visible, masked) = network(), example()
    pos, z_v = net.encoder.pos_embed[0, 1:], net.encode(x, visible)
    inputs, zhat = [], net.regress(z_v, pos[masked], pos[visible])
    assert torch.equal(zhat, net(x, visible, masked)[1])
    assert torch.equal(net.decode(zhat, pos[masked]), net(x, visible, masked)[0])
    net.decoder[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    net.decode(zhat, pos[masked])
    assert torch.equal(inputs[0], zhat + pos[masked])


def test_regressor_and_decoder_can_have_another_width_than_the_encoder():
    """Official code: one linear layer and a LayerNorm after the encoder, also for the target."""
    net, (x, _, visible, masked) = network("--decoder-embed-dim", "32"), example()
    logits, zhat, zbar = net(x, visible, masked)
    assert logits.shape == (4, 32, 16) and zhat.shape == zbar.shape == (4, 32, 32)
    linear, norm = net.encoder_to_regressor
    tokens = net.encoder(x, keep=masked)[:, 1:]
    expected = F.layer_norm(tokens @ linear.weight.T + linear.bias, (32,), norm.weight, norm.bias,
                            1e-6)
    assert torch.allclose(zbar, expected, atol=1e-5)
    pos = positions.sincos(32, (8, 8))
    new = net.regress(net.encode(x, visible), pos[masked], pos[visible])
    assert torch.equal(new, zhat) and torch.equal(net.decode(new, pos[masked]), logits)
    assert linear.weight.shape == (32, 24) and net.mask_token.shape == (1, 1, 32)
    default, same = (network(*flags) for flags in ((), ("--decoder-embed-dim", "24")))
    assert default.state_dict().keys() == same.state_dict().keys()
    assert torch.equal(default.pos, default.encoder.pos_embed[0, 1:])
    for size, message in (("30", "30 must be a multiple of 4"), ("32", "not a multiple of 3")):
        with pytest.raises(ValueError, match=message):
            network("--decoder-embed-dim", size, "--num-heads", "3", "--decoder-depth", "0")


def test_drop_path_of_the_regressor_multiplies_each_branch_of_each_image_by_its_factor():
    g = torch.Generator().manual_seed(0)
    x, z_v, pos, pos_v = (torch.randn(4, 3, 24, generator=g) for _ in range(4))
    block = cae.RegressorBlock(24, 4, 0.5)
    block.norm2.weight.data = torch.rand(24, generator=g)
    factors = torch.tensor([[2.0, 3], [2, 0], [0, 3], [0, 0]])
    out, both = block(x, z_v, pos, pos_v, factors), torch.cat([z_v, x], 1)
    branch = 0.5 * block.cross_attn(block.norm1_q(x + pos), block.norm1_k(
        both + torch.cat([pos_v, pos], 1)), block.norm1_v(both))
    y = block.norm2(x + torch.tensor([2.0, 2, 0, 0])[:, None, None] * branch)
    expected = y + torch.tensor([3.0, 0, 3, 0])[:, None, None] * 0.5 * block.mlp(y)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.equal(out[3], block.norm2(x)[3])
    assert not torch.allclose(out, block(x, z_v, pos, pos_v), atol=1e-2)


# ---- where gradients stop ------------------------------------------------------------------------


@pytest.mark.parametrize("decoder_embed_dim", ["0", "16"])
def test_every_parameter_gets_a_gradient_and_none_through_the_target(decoder_embed_dim):
    net, (x, _, visible, masked) = network("--decoder-embed-dim", decoder_embed_dim).train(), (
        example())
    tok = tokenizer.Small("vq", 16, 4, width=8).requires_grad_(False)
    labels = tok.ids(x).gather(1, masked)
    logits, zhat, zbar = net(x, visible, masked)
    assert zhat.requires_grad and not zbar.requires_grad

    def gradients(loss):
        grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads)]

    trained = [p for p in net.parameters() if p.requires_grad]
    loss_token, loss_align = cae.token_loss(logits, labels), cae.align_loss(zhat, zbar)
    both = gradients(loss_token + 2 * loss_align)
    constant = gradients(loss_token + 2 * cae.align_loss(zhat, zbar.clone().detach()))
    assert all(torch.equal(a, b) for a, b in zip(both, constant))
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    for name, g in zip(names, both):
        if name.endswith("norm1_k.bias"):                    # cancels in the softmax
            assert g.abs().max() < 1e-6
        else:
            assert g.abs().max() > 1e-6, name
    assert {"encoder.cls_token", "mask_token", "regressor.0.cross_attn.q.bias"} <= set(names)
    assert "encoder.pos_embed" not in names

    through = cae.align_loss(zhat, net.encode(x, masked))       # negative control: no stop-gradient
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(
        gradients(through), gradients(loss_align)))


# ---- blocks --------------------------------------------------------------------------------------


def wave(shape, s, amp):
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return amp * torch.sin(0.7 * k + s).view(shape)


def test_regressor_block_equals_numbers_of_the_official_code():
    block = cae.RegressorBlock(8, 2, 0.1).double()
    names = """ls1.gamma ls2.gamma norm1_q.weight norm1_q.bias norm1_k.weight norm1_k.bias
        norm1_v.weight norm1_v.bias norm2.weight norm2.bias cross_attn.q.bias cross_attn.v.bias
        cross_attn.q.weight cross_attn.k.weight cross_attn.v.weight cross_attn.proj.weight
        cross_attn.proj.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias""".split()
    state = block.state_dict()
    assert set(names) == set(state)
    block.load_state_dict({
        name: wave(state[name].shape, s, 0.5) + float("norm" in name and name.endswith("weight"))
        for s, name in enumerate(names, 1)})
    x, z_v, pos, pos_v = (wave((1, n, 8), s, 1.0) for n, s in ((2, 30), (3, 31), (2, 32), (3, 33)))
    expected = torch.tensor([
        [3.465320, -2.491871, -0.810744, -1.996437, 6.550590, -3.045472, 0.420104, 2.785111],
        [2.327857, -1.064666, -0.423534, -5.153805, 8.577475, -3.358129, 1.814080, 2.514145]],
        dtype=torch.float64)
    assert torch.allclose(block(x, z_v, pos, pos_v)[0], expected, atol=1e-6)
    assert not torch.allclose(block(x, z_v, pos_v[:, :2], pos_v)[0], expected, atol=1e-2)


def regressor_example():
    torch.manual_seed(0)
    block = network().regressor[0]
    return block, *(torch.randn(2, n, 24) for n in (5, 7, 5, 7))              # x, z_v, pos, pos_v


def test_second_half_of_a_regressor_block_starts_from_the_normalized_input():
    block, x, z_v, pos, pos_v = regressor_example()
    with torch.no_grad():
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    out = block(x, z_v, pos, pos_v)
    assert torch.equal(out, block.norm2(x)) and torch.equal(out, block(x, 0 * z_v, pos, pos_v))
    assert not torch.allclose(out, x, atol=1e-1)                  # as in a pre-norm block


def test_positions_are_not_added_to_the_values():
    block, x, z_v, pos, pos_v = regressor_example()
    before = block(x, z_v, pos, pos_v)
    assert not torch.allclose(before, block(x, z_v, pos + 1, pos_v * 2), atol=1e-4)
    with torch.no_grad():
        block.cross_attn.k.weight.zero_()                                     # equal keys
    assert torch.equal(block(x, z_v, pos, pos_v), block(x, z_v, pos + 1, pos_v * 2))


def test_regressor_attends_to_visible_patches_and_masked_queries(monkeypatch):
    net, (x, _, visible, masked) = network(), example()
    keys = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: (
        keys.append((q.shape[2], k.shape[2])), attend(q, k, v, attn_mask))[1])
    pos = net.encoder.pos_embed[0, 1:]
    net.regress(net.encode(x, visible), pos[masked], pos[visible])
    assert keys[-2:] == [(32, 64), (32, 64)]                                  # all N patches
    block, x, z_v, pos, pos_v = regressor_example()
    other = torch.cat([x[:, :1], -x[:, 1:]], 1)
    first = block(x, z_v, pos, pos_v)[:, 0]
    assert not torch.allclose(first, block(other, z_v, pos, pos_v)[:, 0], atol=1e-4)


def test_drop_path_of_each_part_is_decided_by_the_given_numbers():
    net, (x, _, visible, masked) = network("--drop-path", "0.5").train(), example()
    assert net.drop_sizes == [4, 4, 4, 4]
    keep = torch.full((4, 16), 0.99)
    kept = net(x, visible, masked, keep)
    outputs = (True, True, False), (False, False, True), (True, True, False), (True, False, False)
    for part, changed in enumerate(outputs):                 # of logits, zhat, zbar
        drop = keep.clone()
        drop[:, 4 * part + 2:4 * part + 4] = 0.1             # both branches of its second block
        new = net(x, visible, masked, drop)
        assert [not torch.equal(a, b) for a, b in zip(new, kept)] == list(changed)
    first, second = net.drop_factors(keep[:, :4], 2)
    assert (first == 1).all() and (second == 2).all()        # 1 / (1 - 0.5)
    assert net.eval().drop_factors(keep[:, :4], 2) == [None, None]


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

    for owner, name in ((cae, "draw_mask"), (cae.Network, "forward"), (torch.Tensor, "backward"),
                        (torch.nn.utils, "clip_grad_norm_"), (cae, "set_lr"),
                        (tokenizer.Tokenizer, "ids")):
        watch(owner, name)
    monkeypatch.setattr(datasets, "load_images",
                        lambda *_: datasets.Images("noise", "train", pixels=pixels))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["cae.py", *TINY, *"""--workers 0 --evals 0 --device cpu
        --precision fp32 --tokenizer-steps 1 --warmup-epochs 1 --out""".split(), str(out), *flags])
    cae.main()
    return calls


def test_a_step_combines_mask_tokens_losses_clipping_and_schedule(monkeypatch, tmp_path):
    calls = train(monkeypatch, tmp_path / "run", *"""--steps 4 --clip-grad 2 --lr 1e-3 --min-lr 2e-4
        --log-every 1 --align-loss-weight 3""".split())
    (index, _, *key), _, mask = calls["draw_mask"]
    (_, x, visible, masked, _), _, (logits, zhat, zbar) = calls["forward"]
    assert key == [0, 1]                                      # seed, second epoch: two steps each
    for found, expected in zip((visible, masked), cae.split_patches(mask, 32)):
        assert torch.equal(found, expected)
    (_, view), _, ids = calls["ids"]
    assert x.shape == view.shape == (8, 3, 32, 32) and not torch.equal(x, view)
    labels = torch.stack([ids[b, masked[b]] for b in range(8)])
    (loss,), _, _ = calls["backward"]
    (opt, _), _, _ = calls["set_lr"]
    (_, max_norm), _, grad_norm = calls["clip_grad_norm_"]
    assert torch.allclose(loss, cae.token_loss(logits, labels) + 3 * cae.align_loss(zhat, zbar))
    assert max_norm == 2
    assert [group["weight_decay"] for group in opt.param_groups] == [0.05, 0.0]
    assert {p.ndim for p in opt.param_groups[1]["params"]} == {1}
    log = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line["lr"] for line in log] == pytest.approx([0, 5e-4, 1e-3, 6e-4])   # warmup, cosine
    assert {group["lr"] for group in opt.param_groups} == {log[-1]["lr"]}
    right = logits.gather(2, labels[:, :, None])[:, :, 0] == logits.amax(2)
    assert log[-1]["mlm_acc"] == pytest.approx(right.float().mean().item()) and 0 < right.sum()
    assert log[-1]["grad_norm"] == pytest.approx(grad_norm.item())


@pytest.mark.parametrize("equal", [True, False])
def test_equal_representations_of_all_patches_get_a_warning(equal, monkeypatch, tmp_path, capsys):
    """After a LayerNorm each of them has standard deviation 1: latent_std is over patches."""
    forward, targets = cae.Network.forward, []

    def answer(net, *given):
        logits, zhat, zbar = forward(net, *given)
        targets.append(zbar[:1, :1].expand_as(zbar) if equal else zbar)
        return logits, zhat, targets[-1]

    monkeypatch.setattr(cae.Network, "forward", answer)
    train(monkeypatch, tmp_path, "--steps", "1", "--evals", "1")
    assert ("collapsed" in capsys.readouterr().out) == equal
    rows = targets[0].flatten(0, 1)                          # targets[1]: of the visualization
    std = ((rows - rows.mean(0)).square().sum(0) / (len(rows) - 1)).sqrt().mean()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["latent_std"] == pytest.approx(std.item(), abs=1e-6) and (std < 1e-6) == equal


def test_tokenizer_and_network_have_the_same_view_in_two_sizes():
    x, u = cae.views(settings("--img-size", "64", "--patch-size", "8"))
    assert (x.size, u.size, x.interpolation, u.interpolation) == (64, 32, "bicubic", "lanczos")
    assert u.like == 0 and x.scale == u.scale and (x.flip, x.jitter_p) == (0.5, 0.0)


def test_views_are_beits_without_color_jitter():
    """So that both use the same file of a trained tokenizer."""
    for jitter, equal in (("0", True), ("0.4", False)):
        cfg = config.parse(beit.Config, ["--color-jitter", jitter, "0", "0", "0"])
        assert (beit.views(cfg) == cae.views(config.parse(cae.Config, []))) == equal


@pytest.mark.parametrize("flags, sentence", [
    ("--num-mask-patches 64", "below the 64 patches"),
    ("--num-mask-patches 4", "at least --min-mask-patches-per-block 5"),
    ("--num-mask-patches 60 --min-mask-patches-per-block 57", "smaller than 8 x 8"),
    ("--num-mask-patches 0", "1 or more"), ("--min-mask-patches-per-block 0", "1 or more"),
    ("--regressor-depth 0", "1 or more"),
])
def test_impossible_settings_are_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(*flags.split())


# ---- initialization ------------------------------------------------------------------------------


def test_numbers_of_parameters_are_the_published_ones():
    cfg = config.parse(cae.Config, ["--data", "imagenet"])
    with torch.device("meta"):
        net = cae.Network(cfg, 8192)

    def count(*modules):
        return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)

    assert count(net.encoder) == 85_656_576 and net.encoder.pos_embed.numel() == 151_296
    assert count(net.regressor, net.regressor_norm) == 28_368_384
    assert count(net.decoder, net.decoder_norm, net.head) == 34_655_744
    assert net.mask_token.numel() == 768 and count(net) == 148_681_472


def test_positions_are_fixed_and_encode_the_row_first():
    table = vit.ViT(img_size=224, embed_dim=768, depth=1, num_heads=12, pos="sincos_row",
                    init="cae").pos_embed
    assert (table[0, 0] == 0).all() and not table.requires_grad
    below, right = table[0, 1 + 14], table[0, 2]
    assert below[0].item() == pytest.approx(0.841471, abs=1e-6) and below[384] == 0
    assert right[384].item() == pytest.approx(0.841471, abs=1e-6) and right[0] == 0
    assert network().encoder.config["pos"] == "sincos_row"


def test_initial_losses_predictions_and_weights_are_the_published_ones():
    flags = "--embed-dim 768 --num-heads 12 --depth 1 --regressor-depth 1 --decoder-depth 1".split()
    net, (x, _, visible, masked) = network(*flags, K=8192, randomize=False), example(2)
    with torch.no_grad():
        logits, zhat, zbar = net(x, visible, masked)
    assert zhat.mean(-1).abs().max() < 1e-5
    assert (zhat.var(-1, correction=0) - 1).abs().max() < 1e-3
    labels = torch.randint(8192, (64, *masked.shape))
    loss_token = torch.stack([cae.token_loss(logits, ids) for ids in labels]).mean()
    assert loss_token.item() == pytest.approx(9.011 + 0.086, abs=0.03)     # ln 8192 + variance / 2
    assert 1.7 < cae.align_loss(zhat, zbar).item() < 2.1
    bounds = {"encoder.blocks.0.attn.qkv.weight": 0.0442,
              "encoder.blocks.0.attn.proj.weight": 0.0625,
              "regressor.0.cross_attn.q.weight": 0.0625, "head.weight": 0.0259,
              "encoder.patch_embed.proj.weight": 0.02, "mask_token": 0.02}
    for name, bound in bounds.items():
        assert net.get_parameter(name).abs().max().item() == pytest.approx(bound, rel=0.01), name


def test_losses_are_plain_means():
    zhat, zbar = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.allclose(cae.align_loss(zhat, zbar), (zhat - zbar).square().sum() / 30)
    logits, ids = torch.randn(2, 3, 16), token_ids(2, 3)
    expected = -sum(logits[b, i].log_softmax(0)[ids[b, i]] for b in range(2) for i in range(3)) / 6
    assert torch.allclose(cae.token_loss(logits, ids), expected)


def test_defaults_are_the_papers():
    cfg = config.parse(cae.Config, ["--data", "imagenet"])
    assert (cfg.align_loss_weight, cfg.num_mask_patches, cfg.min_mask_patches_per_block,
            cfg.layer_scale) == (2.0, 98, 16, 0.1)
    assert (cfg.regressor_depth, cfg.decoder_depth) == (4, 4)
    assert (cfg.vocab_size, cfg.second_input_size) == (8192, 112)
    assert (cfg.batch_size, cfg.lr, cfg.min_lr, cfg.weight_decay, cfg.clip_grad) == (
        2048, 1.5e-3, 1e-5, 0.05, 3.0)
    assert (cfg.epochs, cfg.warmup_epochs, cfg.drop_path, cfg.crop_min) == (1600, 40, 0.1, 0.08)
