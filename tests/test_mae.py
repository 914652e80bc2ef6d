"""MAE against its formula and the conventions of the official code, with negative controls."""
import math
import signal
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import data
import mae
from lib import augment, checkpoints, config, datasets, rng, visualize
from lib.run import Run, param_groups, set_lr

SMALL = ("--img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 3 --decoder-embed-dim "
         "16 --decoder-depth 2 --decoder-num-heads 2").split()


def settings(*flags):
    return config.parse(mae.Config, [*SMALL, *flags])


def network(*flags, seed=0):
    torch.manual_seed(seed)
    return mae.Network(settings(*flags))


def batch(B=3, size=32, patch=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 3, size, size, generator=g)
    return x, torch.rand(B, (size // patch)**2, generator=g)


def vit_b():
    """The paper's ViT-B/16, on the meta device."""
    with torch.device("meta"):
        return mae.Network(config.parse(mae.Config, ["--data", "imagenet"]))


# ---- the mask ------------------------------------------------------------------------------------


def test_random_masking_keeps_the_patches_of_lowest_noise_and_restore_inverts_the_shuffle():
    noise = batch(5, 224, 16)[1]
    keep, restore, mask = mae.random_masking(noise, 0.75)
    assert keep.shape == (5, 49) and restore.shape == mask.shape == (5, 196)
    assert (mask.sum(1) == 147).all()
    for n in range(5):
        shuffle = sorted(range(196), key=noise[n].tolist().__getitem__)
        assert keep[n].tolist() == shuffle[:49]
        assert not mask[n, keep[n]].any()
        assert restore[n, shuffle].tolist() == list(range(196))
    assert not torch.equal(mask[0], mask[1])                           # each image has its own mask


@pytest.mark.parametrize("N, ratio, kept", [(196, 0.75, 49), (100, 0.8, 19), (100, 0.9, 9)])
def test_number_of_visible_patches_is_rounded_down_as_in_the_official_code(N, ratio, kept):
    assert mae.random_masking(torch.rand(1, N), ratio)[0].shape[1] == kept


# ---- patches and targets -------------------------------------------------------------------------


def test_patchify_orders_row_column_channel_and_fill_patches_inverts_it():
    x = batch(2, 64, 16)[0]
    patches = mae.patchify(x, 16)
    assert patches.shape == (2, 16, 768)
    assert torch.equal(patches[0, 0].view(16, 16, 3), x[0, :, :16, :16].permute(1, 2, 0))
    assert torch.equal(patches[1, 6].view(16, 16, 3), x[1, :, 16:32, 32:48].permute(1, 2, 0))
    none = torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(visualize.fill_patches(patches, none, 0), x)
    other = patches.transpose(1, 2).reshape(2, 16, 768)
    assert not torch.equal(visualize.fill_patches(other, none, 0), x)


def test_targets_are_normalized_by_unbiased_patch_statistics_with_eps_inside_the_root():
    x = 1e-3 * batch(2)[0]                                             # so small that eps matters
    found = mae.targets(x, 8, norm_pix_loss=True)
    for n, (r, c) in ((0, (0, 0)), (1, (2, 3))):
        u = x[n, :, 8 * r:8 * r + 8, 8 * c:8 * c + 8].permute(1, 2, 0).flatten().double()
        var = ((u - u.mean())**2).sum() / (192 - 1)
        expected = (u - u.mean()) / math.sqrt(var + 1e-6)
        assert torch.allclose(found[n, 4 * r + c].double(), expected, atol=1e-5)
        outside = (u - u.mean()) / (math.sqrt(var) + 1e-6)
        assert not torch.allclose(found[n, 4 * r + c].double(), outside, atol=1e-2)


@pytest.mark.parametrize("patch, expected", [(16, 0.9986969), (8, 0.9947906)])
def test_loss_of_predicting_zero_is_1_minus_1_over_P(patch, expected):
    x, noise = batch(4, 64, patch)
    target, mask = mae.targets(x, patch, True), mae.random_masking(noise, 0.75)[2]
    loss = mae.mae_loss(torch.zeros_like(target), target, mask).item()
    assert loss == pytest.approx(expected, abs=2e-6)
    assert loss == pytest.approx(1 - 1 / (3 * patch**2), abs=3e-6)     # with a biased variance: 1


def test_target_of_a_constant_image_is_zero_and_finite():
    x, mask = torch.full((1, 3, 32, 32), 0.7), torch.ones(1, 16, dtype=torch.bool)
    assert mae.mae_loss(torch.zeros(1, 16, 192), mae.targets(x, 8, True), mask) == 0
    assert mae.mae_loss(torch.zeros(1, 16, 192), mae.targets(x, 8, False), mask) > 0.4


def test_loss_of_normalized_pixels_ignores_brightness_and_contrast():
    (x, noise), pred = batch(), torch.randn(3, 16, 192)
    mask = mae.random_masking(noise, 0.75)[2]
    for norm_pix_loss, equal in ((True, True), (False, False)):
        a, b = (mae.mae_loss(pred, mae.targets(z, 8, norm_pix_loss), mask)
                for z in (x, 1.7 * x - 0.4))
        assert torch.allclose(a, b, atol=1e-5) == equal


def test_loss_is_the_mean_squared_error_over_the_removed_patches():
    x, noise = batch()
    target, mask = mae.targets(x, 8, False), mae.random_masking(noise, 0.75)[2]
    assert mae.mae_loss(target + 0.3, target, mask).item() == pytest.approx(0.09, rel=1e-4)
    wrong = torch.where(mask[:, :, None], target, target + 5)          # errors on visible patches
    assert mae.mae_loss(wrong, target, mask) == 0 < mae.mae_loss(wrong, target, ~mask)


def test_predictions_of_visible_patches_get_no_gradient():
    pred = torch.randn(3, 16, 192, requires_grad=True)
    x, noise = batch()
    mask = mae.random_masking(noise, 0.75)[2]
    mae.mae_loss(pred, mae.targets(x, 8, True), mask).backward()
    assert (pred.grad[~mask] == 0).all() and (pred.grad[mask] != 0).any(1).all()


def test_removed_patches_are_filled_and_visible_ones_stay():
    x, noise = batch()
    patches, mask = mae.patchify(x, 8), mae.random_masking(noise, 0.75)[2]
    mean, _ = mae.patch_stats(patches)
    assert torch.equal(visualize.fill_patches(patches, mask, patches), x)
    flat = mae.patchify(visualize.fill_patches(patches, mask, mean.expand_as(patches)), 8)
    assert torch.equal(flat[~mask], patches[~mask])
    assert torch.allclose(flat[mask], patches[mask].mean(1, keepdim=True).expand(-1, 192))


# ---- the network ---------------------------------------------------------------------------------


def test_shapes_of_vit_b():
    net, shapes = vit_b(), {}
    for name in ("encoder.blocks.0", "decoder.embed", "decoder.blocks.0"):
        net.get_submodule(name).register_forward_hook(
            lambda module, x, y, name=name: shapes.update({name: tuple(y.shape)}))
    pred, mask = net(torch.empty(2, 3, 224, 224, device="meta"),
                     torch.empty(2, 196, device="meta"))
    assert pred.shape == (2, 196, 768) and mask.shape == (2, 196)
    assert shapes == {"encoder.blocks.0": (2, 50, 768), "decoder.embed": (2, 50, 512),
                      "decoder.blocks.0": (2, 197, 512)}


def test_removed_pixels_do_not_affect_the_prediction():
    net, (x, noise) = network(), batch()
    keep, _, mask = mae.random_masking(noise, 0.75)
    removed = visualize.fill_patches(torch.zeros(len(x), 16, 192), mask, 1).bool()
    other = torch.where(removed, torch.randn_like(x), x)
    assert torch.equal(net.encoder(x, keep=keep), net.encoder(other, keep=keep))
    assert torch.equal(net(x, noise)[0], net(other, noise)[0])
    other = torch.where(removed, x, torch.randn_like(x))               # negative control
    assert not torch.allclose(net(x, noise)[0], net(other, noise)[0], atol=1e-3)


def test_encoder_does_not_depend_on_the_order_of_the_visible_patches():
    net, (x, noise) = network(), batch()
    keep = mae.random_masking(noise, 0.5)[0]
    order = torch.randperm(keep.shape[1])
    cls, patches = net.encoder.split(net.encoder(x, keep=keep))
    cls2, patches2 = net.encoder.split(net.encoder(x, keep=keep[:, order]))
    assert torch.allclose(cls, cls2, atol=1e-5)
    assert torch.allclose(patches[:, order], patches2, atol=1e-5)
    assert not torch.allclose(patches, patches2, atol=1e-3)


def test_decoder_equals_a_loop_over_patches():
    net, (x, noise) = network(), batch(B=2)
    decoder, (keep, restore, mask) = net.decoder, mae.random_masking(noise, 0.75)
    tokens = net.encoder(x, keep=keep)
    found = decoder(tokens, restore)
    for n in range(2):
        sequence = [decoder.embed(tokens[n, 0])]
        for patch in range(16):
            at = (keep[n] == patch).nonzero()
            sequence.append(decoder.mask_token[0, 0] if mask[n, patch]
                            else decoder.embed(tokens[n, 1 + at.item()]))
        z = (torch.stack(sequence) + decoder.pos_embed[0])[None]
        for block in decoder.blocks:
            z = block(z)
        assert torch.allclose(found[n], decoder.pred(decoder.norm(z))[0], atol=1e-5)
    assert not torch.allclose(decoder(tokens, restore.flip(1)), found, atol=1e-3)


@pytest.mark.parametrize("norm_pix_loss, loss, cls_token, mask_token, patch_embed", [
    (True, 1.69490767, 0.01765005, 0.18012156, 0.04787450),
    (False, 1.71713531, 0.01785163, 0.17945744, 0.04832977)])
def test_loss_and_gradients_equal_those_recorded_from_the_official_code(
        norm_pix_loss, loss, cls_token, mask_token, patch_embed):
    net, zero, index = network(), torch.zeros(1, dtype=torch.long), torch.arange(3)
    with torch.no_grad():                              # the same weights as in the official code
        for name, p in checkpoints.mae_names(net).items():
            if not name.endswith("pos_embed"):
                scale_of_norm = "norm" in name and name.endswith("weight")
                p.copy_(0.2 * rng.normal(zero, p.shape, name)[0] + scale_of_norm)
    x, noise = rng.normal(index, (3, 32, 32), "image"), rng.uniform(index, 16, "mask")
    pred, mask = net(x, noise)
    found = mae.mae_loss(pred, mae.targets(x, 8, norm_pix_loss), mask)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    for p, norm in ((net.encoder.cls_token, cls_token), (net.decoder.mask_token, mask_token),
                    (net.encoder.patch_embed.proj.weight, patch_embed)):
        assert p.grad.norm().item() == pytest.approx(norm, rel=1e-4)


def test_positions_are_zero_for_the_class_token_and_encode_the_column_first():
    net = network("--img-size", "24")                                  # a grid of 3 x 3
    for pos in (net.encoder.pos_embed, net.decoder.pos_embed):
        q, grid = pos.shape[2] // 4, pos[0, 1:].unflatten(0, (3, 3))
        assert (pos[0, 0] == 0).all()
        corner = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(q)
        assert torch.equal(grid[0, 0], corner)
        assert torch.equal(grid[0, :, :2 * q], grid[2, :, :2 * q])     # first half: column only
        assert torch.equal(grid[:, 0, 2 * q:], grid[:, 2, 2 * q:])     # second half: row only
        assert not torch.equal(grid[:, 0, :2 * q], grid[:, 2, :2 * q])
        assert not torch.equal(grid[0, :, 2 * q:], grid[2, :, 2 * q:])
        assert grid[2, 1, 0].item() == pytest.approx(math.sin(1))
        assert grid[2, 1, 2 * q].item() == pytest.approx(math.sin(2))


def test_every_parameter_is_trained_except_the_positions():
    net, (x, noise) = network(), batch()
    frozen = {"encoder.pos_embed", "decoder.pos_embed"}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt = torch.optim.AdamW(param_groups(net, 0.05), lr=1e-2)
    pred, mask = net(x, noise)
    mae.mae_loss(pred, mae.targets(x, 8, True), mask).backward()
    opt.step()
    for name, p in net.named_parameters():
        if name in frozen:
            assert p.grad is None and torch.equal(p, before[name])
            continue
        grad = p.grad
        if name.endswith("qkv.bias"):                  # the key's third cancels in the softmax
            grad = grad.view(3, -1)[[0, 2]]
        assert (grad.abs() > 1e-9).any(), name
        assert not torch.equal(p, before[name]), name


def test_weight_decay_applies_to_matrices_and_tokens_not_to_vectors():
    net = network()
    decayed, rest = ({id(p) for p in g["params"]} for g in param_groups(net, 0.05))
    for name, p in net.named_parameters():
        matrix = name.endswith(("_token", "proj.weight", "qkv.weight", "fc1.weight", "fc2.weight",
                                "embed.weight", "pred.weight"))
        frozen = name.endswith("pos_embed")
        assert (id(p) in decayed, id(p) in rest) == (matrix, not matrix and not frozen), name


def test_initial_weights_are_those_of_the_official_code():
    net = network("--embed-dim", "192", "--decoder-embed-dim", "128")
    for name, p in net.named_parameters():
        if name.endswith("_token"):
            assert p.std().item() == pytest.approx(0.02, rel=0.3), name
        elif name.endswith("patch_embed.proj.bias"):                   # PyTorch's default
            assert 0 < p.abs().max() <= 1 / math.sqrt(192)
        elif p.ndim == 1:
            assert (p == float("norm" in name and name.endswith("weight"))).all(), name
        elif not name.endswith("pos_embed"):                           # q, k, v: one matrix
            n, m = p.flatten(1).shape
            bound = math.sqrt(6 / (n + m))
            assert 0.97 * bound < p.abs().max() <= bound * (1 + 1e-6), name


def test_numbers_of_parameters_of_vit_b_are_the_published_ones():
    net = vit_b()
    count = {"all": sum(p.numel() for p in net.parameters()),
             "encoder": sum(p.numel() for p in net.encoder.parameters()),
             "trained": sum(p.numel() for p in net.parameters() if p.requires_grad)}
    assert count == {"all": 111_907_840, "encoder": 85_798_656, "trained": 111_655_680}


# ---- checkpoints and the run ---------------------------------------------------------------------


def test_state_dict_has_the_published_names():
    def block(prefix):
        return {f"{prefix}.{layer}.{kind}" for kind in ("weight", "bias") for layer in (
            "norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}

    expected = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    expected |= {f"{layer}.{kind}" for kind in ("weight", "bias") for layer in (
        "patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")}
    for i in range(12):
        expected |= block(f"blocks.{i}") | (block(f"decoder_blocks.{i}") if i < 8 else set())
    state = checkpoints.mae_names(vit_b())
    assert state.keys() == expected
    assert {name: tuple(state[name].shape) for name in (
        "cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "decoder_pred.weight")} == {
        "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 197, 512), "decoder_pred.weight": (768, 512)}


@pytest.fixture
def run(monkeypatch):
    """run(out, *flags): one step in this process, whose signal handlers stay unchanged."""
    def main(out, *flags):
        monkeypatch.setattr(sys, "argv", [
            "mae.py", *SMALL, "--data", "synthetic", "--steps", "1", "--batch-size", "8",
            "--device", "cpu", "--out", str(out), *flags])
        mae.main()

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return main


def test_steps_of_a_run_equal_those_written_out(run, tmp_path, monkeypatch):
    """Two steps: mask by seed, epoch and image; loss; AdamW; half a cosine to zero."""
    parts, micro_batches = [], Run.micro_batches

    def spy(self, batch):
        for part in micro_batches(self, batch):
            parts.append(part)
            yield part

    monkeypatch.setattr(Run, "micro_batches", spy)
    run(tmp_path, *"--steps 2 --warmup-epochs 0 --lr 0.3 --precision fp32 --evals 0".split())
    net = network()
    decayed, rest = ([p for p in net.parameters() if p.requires_grad and (p.ndim > 1) == matrix]
                     for matrix in (True, False))
    opt = torch.optim.AdamW([dict(params=decayed, weight_decay=0.05),
                             dict(params=rest, weight_decay=0)], betas=(0.9, 0.95))
    for part, factor in zip(parts, (1, 0.5), strict=True):
        set_lr(opt, factor * 0.3 * 8 / 256)
        x, = part.views
        pred, mask = net(x, rng.uniform(part.index, 16, 0, part.epoch, "mask"))
        opt.zero_grad()
        mae.mae_loss(pred, mae.targets(x, 8, True), mask).backward()
        opt.step()
    found = torch.load(tmp_path / "last.pt", weights_only=True)["state"]["model"]
    for name, x in net.state_dict().items():
        if not name.endswith("qkv.bias"):                              # key bias: rounding noise
            assert (found[name] - x).norm() < 1e-4 * x.norm(), name


def test_first_step_of_a_warmup_changes_no_weight(run, tmp_path):
    for warmup, equal in (("0.1", True), ("0", False)):
        run(tmp_path / warmup, "--warmup-epochs", warmup)
        initial = checkpoints.mae_names(network())
        found = checkpoints.read_file(tmp_path / warmup / "full.pt")["model"]
        assert all(torch.equal(found[name], x) for name, x in initial.items()) == equal


def test_full_pt_loads_as_an_official_file_with_its_decoder(run, tmp_path):
    run(tmp_path)
    full, encoder = (checkpoints.load_encoder(tmp_path / name, quiet=True)
                     for name in ("full.pt", "encoder.pt"))
    assert (full.source.layout, full.source.method, full.source.step) == ("MAE", "mae", 1)
    assert full.config == {**encoder.config, "mlp_ratio": 4.0}
    assert full.config["num_heads"] == 3                               # not 24 / 64
    x = batch()[0]
    assert torch.equal(full(x), encoder(x)) and encoder.source.heads == {}
    decoder = {"mask_token": torch.zeros(1, 1, 16), **full.source.heads["decoder"]}
    network().decoder.load_state_dict(decoder)                         # complete: raises otherwise


def test_visualization_shows_image_visible_patches_and_reconstruction(monkeypatch):
    columns, run = {}, SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    monkeypatch.setattr(visualize, "save_grid", lambda run, found: columns.update(found))
    images, net = datasets.load_images("toy", split="test", size=32, limit=3), network()
    x, index = next(data.batches(images, 32))
    with torch.no_grad():
        mae.save_visualization(run, settings(), net, images)
        pred, mask = net(x, rng.uniform(index, 16, "visualization"))
    patches = mae.patchify(x, 8)
    removed = visualize.fill_patches(0 * patches, mask, 1).bool()                # (B, 3, S, S)
    assert list(columns) == ["image", "visible", "reconstruction"]
    image, visible, found = columns.values()
    assert torch.equal(image, images.pixels)
    assert torch.equal(visible, torch.where(removed, augment.denormalize(0 * x), image))
    mean, std = mae.patch_stats(patches)
    expected = visualize.fill_patches(patches, mask, pred * std + mean)
    assert torch.equal(found, augment.denormalize(expected))
    assert torch.equal(found[~removed], image[~removed]) and (found != image)[removed].any()


@pytest.mark.parametrize("ratio, sentence", [
    *((ratio, "of the 16 patches of an image at least one must be removed and one kept")
      for ratio in ("0", "1", "0.99", "1e-20")),
    ("inf", "at most 1"), ("-1", "0 or more"), ("nan", "0 or more")])
def test_impossible_mask_ratio_is_refused(ratio, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings("--mask-ratio", ratio)


def test_without_a_decoder_block_nothing_would_be_learned():
    """The predictions of masked patches would not depend on the visible ones."""
    with pytest.raises(ValueError, match="--decoder-depth must be 1 or more"):
        settings("--decoder-depth", "0")


def test_defaults_are_the_papers():
    cfg = config.parse(mae.Config, ["--data", "imagenet"])
    assert (cfg.mask_ratio, cfg.norm_pix_loss, cfg.crop_min, cfg.epochs) == (0.75, True, 0.2, 800)
    assert (cfg.batch_size, cfg.lr, cfg.warmup_epochs, cfg.min_lr) == (4096, 1.5e-4, 40, 0)
    assert (cfg.weight_decay, cfg.beta2) == (0.05, 0.95)
    view, = mae.views(cfg)
    assert (view.scale, view.interpolation, view.flip) == ((0.2, 1.0), "bicubic", 0.5)
    assert view.jitter_p == view.gray_p == view.blur_p == view.solarize_p == 0
