"""lib/tokenizer.py against closed forms, published sizes, and files in the published layout."""
import math
import os
import signal
import sys
import types
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import beit
import data
from lib import augment, config, datasets, rng, tokenizer
from lib.run import Run


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=64, size=32, seed=0):
    """Smooth color fields, which a small network learns fast."""
    coarse = torch.rand(n, 3, 5, 5, generator=seeded(seed))
    fine = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return datasets.Images("fields", "train", pixels=(255 * fine).to(torch.uint8))


VIEW = data.View(32, scale=(0.3, 1.0))


def settings(tmp_path, **more):
    return SimpleNamespace(**{**dict(
        data="synthetic", data_root="", seed=0, workers=0, img_size=64, patch_size=8,
        second_input_size=32, tokenizer="", tokenizer_kind="vq", tokenizer_steps=2, vocab_size=16,
        out=str(tmp_path / "run")), **more})


def make_run(**more):
    return SimpleNamespace(**{**dict(device=torch.device("cpu"), rank=0, print0=lambda text: None,
                                     check_stop=lambda: None), **more})


def make_small(kind="vq", vocab_size=16, cell=4, seed=0):
    """An untrained tokenizer whose encoder outputs several different codes."""
    torch.manual_seed(seed)
    net = tokenizer.Small(kind, vocab_size, cell, width=8, dim=8).eval().requires_grad_(False)
    e = net.encode(torch.rand(8, 3, 32, 32))
    if kind == "vq":
        z = tokenizer.flatten_cells(e)
        tokenizer.restart_codes(net.codes, torch.zeros(vocab_size), z, seeded(seed))
    else:
        net.encoder[-1].bias -= e.mean((0, 2, 3))
    return net


# ---- DALL-E's networks ---------------------------------------------------------------------------


def test_dalle_has_the_published_shapes_keys_and_numbers_of_parameters():
    with torch.device("meta"):
        encoder, decoder = tokenizer.dalle_encoder(), tokenizer.dalle_decoder()
        assert encoder(torch.empty(1, 3, 112, 112)).shape == (1, 8192, 14, 14)
        assert decoder(torch.empty(1, 8192, 14, 14)).shape == (1, 6, 112, 112)
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    names = set(encoder.state_dict())
    assert len(names) == 74
    assert {"blocks.input.w", "blocks.group_1.block_1.res_path.conv_1.w", "blocks.output.conv.b",
            "blocks.group_4.block_2.res_path.conv_4.b", "blocks.group_3.block_1.id_path.w"} <= names
    assert not any("id_path" in name for name in names if "group_1" in name or "block_2" in name)
    x = torch.randn(1, 2, 4, 4)
    halved, doubled = (net.blocks.group_1.resize(x) for net in (encoder, decoder))
    assert torch.equal(halved, x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).amax((3, 5)))
    assert torch.equal(doubled, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_dalle_block_equals_the_published_formula():
    torch.manual_seed(0)
    block, x = tokenizer.DalleBlock(8, 16, (3, 3, 3, 1)), torch.randn(2, 8, 6, 6)
    state = block.state_dict()

    def conv(x, name):
        w = state[f"{name}.w"]
        return F.conv2d(x, w, state[f"{name}.b"], padding=w.shape[2] // 2)

    y = x
    for i in (1, 2, 3, 4):
        y = conv(y.relu(), f"res_path.conv_{i}")
    assert torch.allclose(block(x), conv(x, "id_path") + y / 64, atol=1e-6)
    assert not torch.allclose(block(x), conv(x, "id_path") + y / 8, atol=1e-3)
    assert state["res_path.conv_1.w"].shape == (4, 8, 3, 3)                   # a quarter as wide
    assert abs(tokenizer.Conv(64, 64, 3).w.std().item() * 24 - 1) < 0.02      # 1 / sqrt(64 * 9)


# ---- pixels --------------------------------------------------------------------------------------


def test_unmap_pixels_inverts_map_pixels():
    v = torch.linspace(0, 1, 11)
    u = tokenizer.map_pixels(v)
    assert (u[0].item(), u[-1].item()) == pytest.approx((0.1, 0.9))
    assert torch.allclose(tokenizer.unmap_pixels(u), v, atol=1e-6)
    assert tokenizer.unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    assert u[0].logit().item() == pytest.approx(-2.197, abs=1e-3)


def test_ids_are_of_the_unnormalized_view_mapped_once():
    net, v = make_small(), torch.rand(4, 3, 32, 32, generator=seeded())
    v[0, :, 0, :2] = torch.tensor([0.0, 1.0])
    view = augment.normalize(v.clone())
    assert torch.allclose(tokenizer.unnormalize(view), v, atol=1e-6)
    u = tokenizer.map_pixels(tokenizer.unnormalize(view))
    assert u.min() >= 0.1 - 1e-6 and u.max() <= 0.9 + 1e-6
    ids = net.ids(view)
    assert torch.equal(ids, net.scores(u).argmax(1).flatten(1))
    assert not torch.equal(ids, net.ids(v))                             # control: not normalized
    twice = net.scores(tokenizer.map_pixels(u)).argmax(1).flatten(1)
    assert not torch.equal(ids, twice)


def test_logit_laplace_is_a_density_and_its_likelihood_is_maximal_at_the_logit():
    def f(u, mu, b):
        u, mu, b = (torch.as_tensor(x, dtype=torch.float64) for x in (u, mu, b))
        return (-tokenizer.laplace_nll(u, mu, b.log())).exp()

    assert f(0.5, 0, 1).item() == pytest.approx(2)                            # NLL -0.6931
    assert tokenizer.laplace_nll(*(torch.tensor(x) for x in (0.5, 0.0, 0.0))).item() == (
        pytest.approx(-math.log(2)))
    u = torch.linspace(0, 1, 400_001, dtype=torch.float64)[1:-1]
    for mu, b in ((0, 1), (0.7, 0.5), (-1, 0.3)):
        assert torch.trapezoid(f(u, mu, b), u).item() == pytest.approx(1, abs=1e-3)
        assert torch.allclose(f(u, mu, b), f(1 - u, -mu, b))
    mu = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    best = mu[tokenizer.laplace_nll(torch.tensor(0.7, dtype=torch.float64), mu, mu * 0).argmin()]
    assert best.item() == pytest.approx(math.log(0.7 / 0.3), abs=1e-3)


# ---- the d-VAE -----------------------------------------------------------------------------------


def test_usage_penalty_equals_its_closed_form():
    same = torch.zeros(2, 8, 3, 3)
    onehot = torch.zeros(2, 8, 3, 3)
    onehot[:, 5] = 100.0
    spread = 100.0 * F.one_hot(torch.arange(2 * 4 * 4).view(2, 4, 4) % 8).permute(0, 3, 1, 2)
    for logits, penalty in ((same, 0), (onehot, math.log(8)), (spread, 0)):   # spread: all occur
        assert tokenizer.usage_penalty(logits.float()).item() == pytest.approx(penalty, abs=1e-5)


def test_losses_and_gradients_equal_the_formulas():
    u = tokenizer.map_pixels(torch.rand(2, 3, 32, 32, generator=seeded()))
    net, u.requires_grad = make_small("vq"), True
    loss, z, ids = tokenizer.vq_loss(net, u)
    c = net.codes[ids].permute(0, 3, 1, 2).requires_grad_()
    assert torch.equal(ids, net.scores(u).argmax(1)) and torch.equal(z, net.encode(u))
    error = (net.decode_features(c).sigmoid() - u).square().mean()
    assert torch.allclose(loss, error + 0.25 * (z - c).square().mean(), atol=1e-6)
    straight_through, = torch.autograd.grad(error, c)
    commitment = 0.25 * 2 * (z - c) / z.numel()
    assert torch.allclose(torch.autograd.grad(loss, z)[0], straight_through + commitment, atol=1e-8)
    assert commitment.abs().mean() > 1e-6
    net, noise = make_small("dvae"), torch.rand(2, 16, 8, 8, generator=seeded(1))
    net.encoder[-1].bias[3] += 3                              # a frequent code
    logits = net.encode(u)
    mix = tokenizer.gumbel_softmax(logits, 0.7, noise).permute(0, 2, 3, 1) @ net.codes
    out = net.decode_features(mix.permute(0, 3, 1, 2))
    nll = tokenizer.laplace_nll(u, out[:, :3], out[:, 3:]).mean()
    penalty = tokenizer.usage_penalty(logits)
    assert penalty > 0.5
    assert torch.allclose(tokenizer.dvae_loss(net, u, 0.7, noise), nll + 0.1 * penalty, atol=1e-5)


def test_gumbel_softmax_samples_from_the_softmax_at_a_low_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).view(1, 4, 1, 1)
    n = 20_000
    noise = rng.uniform(torch.arange(n), (4, 1, 1), "gumbel")
    mix = tokenizer.gumbel_softmax(logits.expand(n, -1, -1, -1), 1.0, noise)
    assert torch.allclose(mix.sum(1), torch.ones(n, 1, 1)) and mix.max(1).values.mean() < 0.9
    hard = tokenizer.gumbel_softmax(logits.expand(n, -1, -1, -1), 1e-3, noise)
    assert (hard.max(1).values > 0.999).float().mean() > 0.99
    seen, expected = hard.round().sum((0, 2, 3)), n * logits.flatten().softmax(0)
    assert ((seen - expected).square() / expected).sum() < 16.3               # chi-square, p 0.001
    uniform = torch.full((4,), n / 4)                                         # negative control
    assert ((seen - uniform).square() / uniform).sum() > 1000


# ---- vector quantization -------------------------------------------------------------------------


def test_quantize_finds_the_nearest_code_and_has_the_straight_through_gradient():
    codes = torch.eye(6)[:4]
    z = F.normalize(codes[[2, 0, 3, 1]].T.reshape(1, 6, 2, 2)
                    + 0.1 * torch.randn(1, 6, 2, 2, generator=seeded()), dim=1).requires_grad_()
    q, ids = tokenizer.quantize(z, codes)
    assert ids.tolist() == [[[2, 0], [3, 1]]]
    assert torch.allclose(q, codes[ids].permute(0, 3, 1, 2), atol=1e-6)
    weight = torch.randn(q.shape, generator=seeded(1))
    (q * weight).sum().backward()
    assert torch.equal(z.grad, weight)                                        # the gradient of q


def test_used_codes_are_averaged_with_their_vectors_and_unused_ones_do_not_change():
    codes = F.normalize(torch.randn(5, 8, generator=seeded()), dim=1)
    z = F.normalize(torch.randn(40, 8, generator=seeded(1)), dim=1)
    ids, before = torch.arange(40) % 3, codes.clone()
    ids[-1] = 4                                                               # used once
    uses = tokenizer.update_codes(codes, z, ids, 0.9)
    assert torch.allclose(codes.norm(dim=1), torch.ones(5), atol=1e-6)
    assert torch.equal(codes[3], before[3]) and uses.tolist() == [13, 13, 13, 0, 1]
    for used in (0, 1, 2, 4):
        mean = F.normalize(z[ids == used].sum(0), dim=0)
        average = F.normalize(0.9 * before[used] + 0.1 * mean, dim=0)
        assert torch.allclose(codes[used], average, atol=1e-6)
        assert codes[used] @ mean > before[used] @ mean


def test_rarely_used_codes_are_replaced_by_vectors_of_the_batch():
    codes = F.normalize(torch.randn(5, 8, generator=seeded()), dim=1)
    z, before = F.normalize(torch.randn(40, 8, generator=seeded(1)), dim=1), codes.clone()
    rate = torch.tensor([3.0, 0.01, 0.06, 0.0, 1.0])
    tokenizer.restart_codes(codes, rate, z, seeded())
    for dead in (1, 3):
        assert (codes[dead] == z).all(1).any() and not (before[dead] == z).all(1).any()
    assert torch.equal(codes[[0, 2, 4]], before[[0, 2, 4]])
    assert (rate >= 0.05).all()                                   # not replaced again at once


# ---- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vq", "dvae"])
def test_ids_are_deterministic_and_decode_to_pixels(kind):
    net, view = make_small(kind), torch.randn(3, 3, 32, 32, generator=seeded())
    ids = net.ids(view)
    assert ids.shape == (3, 64) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 16 and len(ids.unique()) > 1
    assert torch.equal(ids, net.ids(view)) and torch.equal(ids[1:2], net.ids(view[1:2]))
    decoded = net.decode(ids)
    assert decoded.shape == (3, 3, 32, 32) and 0 <= decoded.min() and decoded.max() <= 1


def test_ids_of_a_view_shifted_by_a_cell_are_shifted():
    net, view = make_small(vocab_size=64), torch.randn(1, 3, 96, 96, generator=seeded())
    ids, shifted = (net.ids(x).view(24, 24) for x in (view, view.roll((4, 4), (2, 3))))
    inside = slice(4, -4)                                     # not affected by padding
    assert torch.equal(shifted[inside, inside], ids.roll((1, 1), (0, 1))[inside, inside])
    assert not torch.equal(shifted[inside, inside], ids[inside, inside])


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vq", "dvae"])
def test_training_lowers_the_loss_is_repeatable_and_keeps_the_global_rng_state(kind, monkeypatch):
    torch.manual_seed(3)
    state, lines, noise, loss = torch.get_rng_state(), [], [], tokenizer.dvae_loss
    monkeypatch.setattr(tokenizer, "dvae_loss", lambda *args: (
        noise.append(round(args[3].double().sum().item())), loss(*args))[1])
    cfg = SimpleNamespace(seed=0, tokenizer_kind=kind, tokenizer_steps=5, vocab_size=16, workers=0)
    net = tokenizer.train_tokenizer(cfg, make_run(print0=lines.append), images(16), VIEW, 4)
    assert torch.equal(state, torch.get_rng_state())
    assert len(noise) == len(set(noise)) == 5 * (kind == "dvae")           # different in every step
    losses = [float(line.split()[-1]) for line in lines]
    assert losses[-1] < losses[0]
    again = tokenizer.train_tokenizer(cfg, make_run(), images(16), VIEW, 4)
    cfg.seed = 1
    other = tokenizer.train_tokenizer(cfg, make_run(), images(16), VIEW, 4)
    same = [all(torch.equal(a, b) for a, b in zip(net.parameters(), n.parameters()))
            for n in (again, other)]
    assert same == [True, False]


@pytest.mark.parametrize("kind, cure", [("dvae", "--tokenizer-kind vq"), ("vq", "another --seed")])
def test_a_loss_that_is_not_finite_raises_and_no_tokenizer_is_saved(
        kind, cure, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "laplace_nll", lambda u, mu, ln_b: mu * math.nan)
    monkeypatch.setattr(F, "mse_loss", lambda x, y: x.mean() * math.nan)
    cfg = settings(tmp_path, tokenizer_kind=kind)
    with pytest.raises(ValueError, match=f"not finite at its step 1: try {cure}, or give"):
        tokenizer.get_tokenizer(cfg, make_run(), images(), images(8), VIEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_schedules_of_the_temperature_and_of_restarts(monkeypatch):
    seen, restarts = [], []
    cfg = SimpleNamespace(seed=0, tokenizer_kind="dvae", tokenizer_steps=8, vocab_size=4,
                          workers=0)
    real, restart = tokenizer.dvae_loss, tokenizer.restart_codes
    monkeypatch.setattr(tokenizer, "Small", partial(tokenizer.Small, width=8))
    monkeypatch.setattr(tokenizer, "dvae_loss", lambda net, u, tau, noise: (
        seen.append((tau, u.min() >= 0.1 - 1e-6, u.max() <= 0.9 + 1e-6)),
        real(net, u, tau, noise))[1])
    tokenizer.train_tokenizer(cfg, make_run(), images(2), VIEW, 4)
    taus, low, high = zip(*seen)
    assert taus[0] == 1 and taus[3] == pytest.approx((1 + 1 / 16) / 2) and taus[6:] == (1 / 16,) * 2
    assert all(low) and all(high)
    monkeypatch.setattr(tokenizer, "restart_codes", lambda codes, rate, *more: (
        restarts.append((rate < 0.05).all().item()), restart(codes, rate, *more)))
    cfg.tokenizer_kind, cfg.tokenizer_steps = "vq", 201
    tokenizer.train_tokenizer(cfg, make_run(), images(2), VIEW, 4)
    assert len(restarts) == 2 and restarts[0]                 # at steps 0 (all) and 100, not 200


def test_evaluate_tokenizer_counts_codes_and_errors():
    net, test = make_small(), images(8)
    found = tokenizer.evaluate_tokenizer(net, test, 32, make_run(), 0)
    x, _ = next(data.batches(test, 32))
    ids = net.ids(x).flatten()
    p = ids.bincount(minlength=16) / len(ids)
    v = test.pixels / 255
    mean = v.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    mean = mean.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert found["used_codes"] == len(ids.unique()) and found["token_max_freq"] == p.max()
    assert found["perplexity"] == pytest.approx(math.exp(-torch.xlogy(p, p).sum()), rel=1e-4)
    assert found["mse_mean_color"] == pytest.approx((mean - v).square().mean().item(), abs=1e-6)
    assert found["mse"] == pytest.approx((net.decode(net.ids(x)) - v).square().mean().item(),
                                         abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind, steps, least", [("vq", 300, 64), ("dvae", 600, 6)])
def test_a_trained_tokenizer_reconstructs_images_and_uses_many_codes(kind, steps, least):
    """vq is better than the mean color of each cell, dvae than that of the image."""
    toy, test = (datasets.load_images("toy", split=split, size=16, limit=limit)
                 for split, limit in (("train", 1500), ("test", 500)))
    for images in toy, test:                                # less noise
        images.pixels = F.avg_pool2d(images.pixels.float(), 5, 1, 2).round().to(torch.uint8)
    cfg = SimpleNamespace(seed=0, tokenizer_kind=kind, tokenizer_steps=steps, vocab_size=256,
                          workers=0)
    view = replace(VIEW, size=16, interpolation="lanczos")
    net = tokenizer.train_tokenizer(cfg, make_run(), toy, view, 4)
    found = tokenizer.evaluate_tokenizer(net, test, 16, make_run(), 0)
    v = test.pixels.float() / 255
    image = (v - v.mean((2, 3), keepdim=True)).square().mean()
    assert found["mse"] < (found["mse_mean_color"] if kind == "vq" else 0.5 * image)
    assert found["perplexity"] > least


# ---- files ---------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_once_and_saved(tmp_path, monkeypatch):
    cfg, lines = settings(tmp_path), []
    net = tokenizer.get_tokenizer(cfg, make_run(print0=lines.append), images(), images(8), VIEW)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    assert len(lines) > 1 and "16 codes" in lines[-1]
    held_out = tokenizer.evaluate_tokenizer(net, images(8), 32, make_run(), 0)
    assert net.report == held_out
    assert f"{net.report['used_codes']} used, perplexity" in lines[-1]
    kept, = tmp_path.iterdir()
    before = kept.read_bytes()
    monkeypatch.setattr(tokenizer, "train_tokenizer", None)                   # not called again
    again = tokenizer.get_tokenizer(cfg, make_run(rank=1), images(), images(8), VIEW)
    cfg.tokenizer = str(kept)
    named = tokenizer.get_tokenizer(cfg, make_run(), images(), None, VIEW)
    view = torch.randn(2, 3, 32, 32, generator=seeded())
    for other in (again, named):
        assert torch.equal(net.ids(view), other.ids(view))
    assert kept.read_bytes() == before
    tokenizer.save_tokenizer(kept, make_small(), "")         # a second run, at the same time
    assert kept.read_bytes() == before and list(tmp_path.iterdir()) == [kept]


def test_a_tokenizer_is_saved_when_a_held_out_image_is_unreadable(tmp_path, monkeypatch):
    def unreadable(*_):
        raise ValueError("cannot read 7.png")

    monkeypatch.setattr(tokenizer, "evaluate_tokenizer", unreadable)
    cfg, lines = settings(tmp_path), []
    net = tokenizer.get_tokenizer(cfg, make_run(print0=lines.append), images(), images(8), VIEW)
    assert "the tokenizer is not evaluated: cannot read 7.png" in lines
    assert lines[-1].endswith("16 codes")
    assert net.report == "" and tokenizer.cache_path(cfg, images(), VIEW).exists()


def test_the_other_processes_wait_for_the_file_and_stop_on_a_signal(tmp_path, monkeypatch):
    cfg, waited = settings(tmp_path), []

    def sleep(seconds):                                       # meanwhile process 0 saves it
        waited.append(seconds)
        if len(waited) == 3:
            path = tokenizer.cache_path(cfg, images(), VIEW)
            tokenizer.save_tokenizer(path, make_small(cell=4), "")

    monkeypatch.setattr(tokenizer.time, "sleep", sleep)
    monkeypatch.setattr(tokenizer, "train_tokenizer", None)
    assert tokenizer.get_tokenizer(cfg, make_run(rank=1), images(), None, VIEW).vocab_size == 16
    assert len(waited) == 3

    def stop():
        raise SystemExit

    with pytest.raises(SystemExit):
        other = settings(tmp_path, seed=1)
        tokenizer.get_tokenizer(other, make_run(rank=1, check_stop=stop), images(), None, VIEW)


def test_other_data_sizes_or_seeds_have_another_cache_path(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    cfg = settings(tmp_path)
    others = [settings(tmp_path, **{name: value}) for name, value in dict(
        seed=1, data="toy", data_root="/elsewhere", second_input_size=64, img_size=32, patch_size=4,
        vocab_size=32, tokenizer_kind="dvae", tokenizer_steps=3).items()]
    others.append(settings(tmp_path, data=str(tmp_path / "photos")))
    paths = [tokenizer.cache_path(cfg, images(), VIEW),
             tokenizer.cache_path(cfg, images(10), VIEW),
             tokenizer.cache_path(cfg, images(), replace(VIEW, size=16)),
             *(tokenizer.cache_path(other, images(), VIEW) for other in others)]
    assert len(set(paths)) == len(paths)
    same = settings(tmp_path, out=str(tmp_path / "another"), workers=7)
    assert tokenizer.cache_path(same, images(), VIEW) == paths[0]
    assert paths[-1].name.startswith("tokenizer-photos-") and paths[-1].parent == tmp_path
    monkeypatch.chdir(tmp_path)                           # the same from any folder
    assert tokenizer.cache_path(same, images(), VIEW) == paths[0]


@pytest.mark.parametrize("where", ["training", "writing"])
def test_an_interrupted_training_leaves_no_broken_file(where, tmp_path, monkeypatch):
    cfg, save = settings(tmp_path), torch.save

    def interrupt(*_):
        raise KeyboardInterrupt

    def write_half(content, file):
        file.write(b"PK half a file")
        interrupt()

    if where == "training":
        monkeypatch.setattr(tokenizer, "evaluate_tokenizer", interrupt)
    else:
        monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.get_tokenizer(cfg, make_run(), images(), images(8), VIEW)
    assert not tokenizer.cache_path(cfg, images(), VIEW).exists()
    monkeypatch.undo()
    assert torch.save is save
    assert tokenizer.get_tokenizer(cfg, make_run(), images(), images(8), VIEW).vocab_size == 16


@pytest.mark.parametrize("wrong, message", [
    (dict(second_input_size=36), "64 or 32"), (dict(second_input_size=24), "64 or 32"),
    (dict(second_input_size=8), "64 or 32")])
def test_check_settings_rejects_settings_that_do_not_match(wrong, message, tmp_path):
    tokenizer.check_settings(settings(tmp_path))
    with pytest.raises(ValueError, match=message):
        tokenizer.check_settings(settings(tmp_path, **wrong))


def test_a_missing_file_raises(tmp_path):
    cfg = settings(tmp_path, tokenizer="none.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        tokenizer.get_tokenizer(cfg, make_run(), images(), images(8), VIEW)


def test_a_file_with_other_cells_is_rejected(tmp_path):
    tokenizer.save_tokenizer(tmp_path / "t.pt", make_small(cell=8), "")
    cfg = settings(tmp_path, tokenizer=str(tmp_path / "t.pt"))
    with pytest.raises(ValueError, match="--second-input-size 64"):
        tokenizer.get_tokenizer(cfg, make_run(), None, None, VIEW)


@pytest.mark.parametrize("content, message", [
    ({"some": torch.zeros(1)}, "not a tokenizer"), ({"some": 1}, "not a tokenizer"),
    ({"format": "tokenizer/1", "config": {"kind": "vq"}, "model": {}}, "not a tokenizer"),
    ({"format": "encoder/1"}, "not a tokenizer"),
    ({"state_dict": torch.zeros(1)}, "not a tokenizer"),
    ({"state_dict": [torch.zeros(1)]}, "not a tokenizer"), ([torch.zeros(1)], "contains a list"),
    ({"format": "tokenizer/1", "config": {"kind": "vq", "vocab_size": 4, "cell": 4}, "model": [],
      "report": ""}, "not a tokenizer"),
    (torch.zeros(1), "contains a Tensor"),
    (b"<html>", "damaged")])
def test_errors_of_files_that_are_not_tokenizers_are_one_sentence(content, message, tmp_path):
    path = tmp_path / "encoder.pkl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.load_tokenizer(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


class Executed:
    def __reduce__(self):
        return exec, ("import sys; sys.executed = True",)


def save_pickled(module, path, **more):
    """Saves a module like DALL-E's files: pickled, with classes of a package dall_e."""
    names = "dall_e", "dall_e.utils", "dall_e.encoder"
    packages = {name: types.ModuleType(name) for name in names}

    def make_class(package, name):
        made = type(name, (nn.Module,), {"__module__": package})
        setattr(packages[package], name, made)
        return made

    Conv2d = make_class("dall_e.utils", "Conv2d")
    Block = make_class("dall_e.encoder", "EncoderBlock")
    Encoder = make_class("dall_e.encoder", "Encoder")

    def convert(m):
        kinds = {tokenizer.Conv: Conv2d, tokenizer.DalleBlock: Block}
        if type(m) in kinds:
            out = kinds[type(m)]()
            out.device, out.kw, out.use_float16 = torch.device("cpu"), 3, True
            out._parameters, out._modules = m._parameters, OrderedDict(
                (name, convert(child)) for name, child in m._modules.items())
            return out
        if isinstance(m, nn.Sequential):
            return nn.Sequential(OrderedDict((k, convert(v)) for k, v in m._modules.items()))
        return m

    encoder = Encoder()
    encoder.blocks = convert(module.blocks)
    for name, value in more.items():
        setattr(encoder, name, value)
    sys.modules.update(packages)
    try:
        torch.save(encoder, path)
    finally:
        for name in packages:
            del sys.modules[name]


@pytest.mark.slow
def test_pickled_modules_of_dalle_load_without_running_their_code(tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder, decoder = tokenizer.dalle_encoder(), tokenizer.dalle_decoder()
    save_pickled(encoder, tmp_path / "encoder.pkl", vocab_size=8192)
    net = tokenizer.load_tokenizer(tmp_path / "encoder.pkl")
    assert (net.vocab_size, net.cell, net.decoder) == (8192, 8, None)
    for name, value in encoder.state_dict().items():
        assert torch.equal(net.encoder.state_dict()[name], value), name
    view = torch.randn(1, 3, 16, 16, generator=seeded())
    ids = net.ids(view)
    u = tokenizer.map_pixels(tokenizer.unnormalize(view))
    assert torch.equal(ids, encoder(u).argmax(1).flatten(1)) and ids.shape == (1, 4)
    colors = net.decode(ids)                                  # a color for each code
    assert colors.shape == (1, 3, 16, 16)
    assert (colors[:, :, :8, :8] == colors[:, :, :1, :1]).all()

    save_pickled(decoder, tmp_path / "decoder.pkl")
    decoded = tokenizer.load_tokenizer(tmp_path / "encoder.pkl").decode(ids)
    onehot = F.one_hot(ids.view(1, 2, 2), 8192).permute(0, 3, 1, 2).float()
    assert torch.equal(decoded, tokenizer.unmap_pixels(decoder(onehot)[:, :3].sigmoid()))

    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "converted.pth")
    plain = tokenizer.load_tokenizer(tmp_path / "converted.pth")
    assert torch.equal(plain.ids(view), ids)


def test_code_in_a_pickled_module_is_rejected_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executed", False, raising=False)
    blocks = nn.Sequential(OrderedDict(input=tokenizer.Conv(3, 2, 1)))
    save_pickled(SimpleNamespace(blocks=blocks), tmp_path / "encoder.pkl", extra=Executed())
    with pytest.raises(ValueError, match="nothing was run"):
        tokenizer.load_tokenizer(tmp_path / "encoder.pkl")
    assert not sys.executed


def test_token_counts_accumulate_and_are_saved():
    counts = tokenizer.TokenCounts(4)
    counts.add(torch.tensor([[0, 1], [1, 1]]))
    counts.add(torch.tensor([3, 3, 3, 1]))
    found = counts.stats()                                                   # 1, 4, 0, 3 of 8
    assert found["token_max_freq"] == 0.5
    assert found["token_entropy"].item() == pytest.approx(
        math.log(8) / 8 + math.log(2) / 2 + math.log(8 / 3) * 3 / 8)
    again = tokenizer.TokenCounts(4)
    again.load_state_dict(counts.state_dict())                               # on resuming
    assert again.stats() == found


def test_a_fingerprint_rejects_another_tokenizer():
    one, same, other = (tokenizer.Fingerprint(make_small(seed=seed)) for seed in (0, 0, 1))
    one.load_state_dict(same.state_dict())
    other_decoder = make_small()
    other_decoder.decoder[0].weight.data.zero_()          # the ids are the same
    one.load_state_dict(tokenizer.Fingerprint(other_decoder).state_dict())
    with pytest.raises(ValueError, match="it is another tokenizer"):
        one.load_state_dict(other.state_dict())


def test_training_stops_on_sigterm(tmp_path):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    cfg = config.parse(beit.Config, ["--tokenizer-steps", "5", "--vocab-size", "16",
                                     "--workers", "0", "--out", str(tmp_path / "run")])
    try:
        run = Run(cfg)
        tokenizer.train_tokenizer(cfg, run, images(16), VIEW, 4)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            tokenizer.train_tokenizer(cfg, run, images(16), VIEW, 4)
        assert stop.value.code == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
