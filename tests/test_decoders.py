"""Decoders rebuilt from checkpoints against the networks of the methods."""
import pytest
import torch
import torch.nn.functional as F
from diagnostics_helpers import TINY_FLAGS, make_model, options, random, save_mae, tiny_model

import analysis
import hybrid
import mae
import mmc
import simmim
from diagnostics import decoders
from diagnostics.decoders import (
    build_mae_decoder,
    load_pretraining_state,
    mask_and_reconstruct,
)
from diagnostics.inputs import MissingInput
from lib import checkpoints, config, rng, visualize


def zero_last_layers(block):
    """Makes a block the identity."""
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


@torch.no_grad()
def test_mae_decoder_equals_the_decoder_of_the_network(tmp_path):
    model, net = save_mae(tmp_path / "mae")
    decoder = build_mae_decoder(model, *load_pretraining_state(model))
    x = random(2, 3, 32, 32).float()
    tokens = net.encoder(x)
    order = torch.arange(64).expand(2, 64)
    z = decoder.embed_tokens(tokens)
    for block in decoder.blocks:
        z = block(z)
    assert torch.allclose(decoder.predict(z), net.decoder(tokens, order)[:, 1:], atol=1e-5)
    shuffled = net.decoder(tokens, order.flip(1))[:, 1:]
    assert not torch.allclose(decoder.predict(z), shuffled, atol=1e-3)   # control


def test_identity_blocks_of_the_decoder_give_a_flat_curve(tmp_path):
    model, net = save_mae(tmp_path / "mae")
    opt = options("--limit", "3", "--what", "decoder")
    found = analysis.run_diagnostics(model, opt)[0]["decoder"]
    assert found["decoder_depth"] == [3, 4, 5] and found["decoder_block"] == [4, 5]
    assert (found["decoder_highest"].diff().abs() > 1e-3).all()          # control
    path, raw = tmp_path / "mae/full.pt", torch.load(tmp_path / "mae/full.pt")
    for key, x in raw["model"].items():
        if key.startswith("decoder_blocks") and ("attn.proj" in key or "mlp.fc2" in key):
            x.zero_()
    torch.save(raw, path)
    curve = analysis.run_diagnostics(model, opt)[0]["decoder"]["decoder_highest"]
    assert torch.allclose(curve, curve[:1].expand(3), atol=1e-6)


def test_a_decoder_of_unknown_heads_is_reported(tmp_path):
    model, _ = save_mae(tmp_path / "mae")
    (tmp_path / "mae/config.yaml").unlink()
    found, missing = analysis.run_diagnostics(model, options(
        "--limit", "2", "--what", "nmi", "decoder", "layer_reconstruction"))
    assert set(found) == {"nmi"} and set(missing) == {"decoder", "layer_reconstruction"}
    assert all("decoder of width 16" in reason for reason in missing.values())


def test_a_decoder_of_width_512_without_settings_is_the_official_one(tmp_path, capsys):
    model, _ = save_mae(tmp_path / "mae")
    (tmp_path / "mae/config.yaml").unlink()
    net = mae.Network(config.parse(mae.Config, [*TINY_FLAGS, "--decoder-embed-dim", "512"]))
    torch.save(dict(model=checkpoints.mae_names(net)), tmp_path / "mae/full.pt")
    capsys.readouterr()
    assert build_mae_decoder(model, *load_pretraining_state(model)).blocks[0].attn.num_heads == 16
    mask_and_reconstruct(model, torch.zeros(1, 3, 32, 32), 0)
    assert "norm_pix_loss" in capsys.readouterr().out


@torch.no_grad()
def test_mae_reconstruction_from_the_last_block_is_that_of_the_network(tmp_path):
    model, net = save_mae(tmp_path / "mae")
    x = random(2, 3, 32, 32).float()
    mask, visible, reconstruct = mask_and_reconstruct(model, x, 0)
    noise = rng.uniform(torch.arange(2), 64, 0, "hide")
    pred, removed = net(x, noise)
    assert torch.equal(mask[:, 0, ::4, ::4].flatten(1), removed) and removed.sum() == 96
    assert torch.equal(visible, x.where(~mask, 0.0))
    expected = visualize.fill_patches(pred, torch.zeros_like(removed), 0)
    assert torch.allclose(reconstruct(2), expected, atol=1e-5)
    assert not torch.allclose(reconstruct(1), reconstruct(2), atol=1e-3)
    zero_last_layers(net.encoder.blocks[2])
    *_, reconstruct = mask_and_reconstruct(model, x, 0)
    assert torch.equal(reconstruct(1), reconstruct(2))                   # an identity block


@torch.no_grad()
def test_simmim_reconstruction_is_that_of_the_network(tmp_path):
    cfg = config.parse(simmim.Config, [*TINY_FLAGS, "--mask-patch-size", "8"])
    torch.manual_seed(0)
    net = simmim.Network(cfg).eval()
    torch.save(dict(model=checkpoints.simmim_names(net)), tmp_path / "full.pt")
    (tmp_path / "config.yaml").write_text(f"mask_patch_size: 8\nmask_ratio: {cfg.mask_ratio}\n")
    model, x = make_model(net.backbone, tmp_path / "encoder.pt"), random(2, 3, 32, 32).float()
    mask, visible, reconstruct = mask_and_reconstruct(model, x, 0)
    mask = mask[:, 0, ::4, ::4]
    assert mask.sum((1, 2)).tolist() == [40, 40]             # 10 of 16 squares, four patches each
    assert torch.allclose(reconstruct(2), net(x, mask), atol=1e-5)
    assert not torch.allclose(reconstruct(1), reconstruct(2), atol=1e-3)         # control


def save_student(method, folder, *flags):
    """A model whose reconstruction head is in the student of last.pt -> model, student, images."""
    cfg = config.parse(method.Config, [*TINY_FLAGS, "--mlp-dim", "16", "--out-dim", "8", *flags])
    torch.manual_seed(0)
    net = method.Network(cfg).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save(dict(format="training/1", state=dict(student=net.state_dict())), folder / "last.pt")
    (folder / "config.yaml").write_text("noise_ratio: 0.4\nmask_patch_size: 8\nmask_ratio: 0.5\n")
    model = tiny_model(folder / "encoder.pt", **net.backbone.config)
    model.source.method = method.__name__
    return model, net, random(2, 3, 32, 32).float()


@torch.no_grad()
def test_hybrid_reconstruction_is_that_of_the_network(tmp_path):
    model, net, x = save_student(hybrid, tmp_path, "--mask-patch-size", "8")
    model.encoder.load_state_dict(net.backbone.state_dict())     # encoder.pt holds the student
    mask, _, reconstruct = mask_and_reconstruct(model, x, 0)
    pixels, _ = net((x, mask[:, 0, ::4, ::4], None))
    assert torch.allclose(reconstruct(2), pixels, atol=1e-5)
    assert not torch.allclose(reconstruct(1), reconstruct(2), atol=1e-3)         # control


@torch.no_grad()
def test_mmc_reconstruction_is_that_of_the_student_with_rectangles_of_noise(tmp_path):
    model, net, x = save_student(mmc, tmp_path)
    mask, visible, reconstruct = mask_and_reconstruct(model, x, 0)       # encoder.pt: the teacher
    assert torch.allclose(reconstruct(2), net(visible)[2], atol=1e-5)
    assert not torch.allclose(reconstruct(2), net(x)[2], atol=1e-3)      # control: intact image
    u = rng.uniform(torch.arange(2), (255, 4), 0, "hide")
    assert torch.equal(mask[:, 0], mmc.rectangles(u, 32, torch.tensor([0.4, 0.4])))
    assert torch.equal(visible.where(~mask, 0.0), x.where(~mask, 0.0))
    assert (visible[mask.expand_as(x)] != x[mask.expand_as(x)]).all()


def test_last_pt_is_read_for_mmc_and_hybrid_only(tmp_path):
    """It is a large file."""
    model, _, x = save_student(mmc, tmp_path)
    model.source.method = "dino"
    with pytest.raises(MissingInput, match="no decoder found"):
        mask_and_reconstruct(model, x, 0)


def test_a_missing_decoder_is_reported():
    found, missing = analysis.run_diagnostics(tiny_model(), options(
        "--limit", "2", "--what", "decoder", "layer_reconstruction", "nmi"))
    assert set(found) == {"nmi"} and set(missing) == {"decoder", "layer_reconstruction"}


def test_pixel_shuffle_order():
    pixels = random(2, 3, 32, 32)
    patches = F.pixel_unshuffle(pixels, 4)                               # (B, 3pp, g, g)
    colors_innermost = patches.unflatten(1, (3, 16)).permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)
    assert torch.equal(decoders.to_pixel_shuffle_order(colors_innermost, 8), patches)
