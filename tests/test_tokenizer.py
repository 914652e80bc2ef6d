"""The tokenizer against closed forms, published sizes, and files laid out as published."""

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
    """Smooth colour fields, which a small network learns fast."""
    coarse = torch.rand(n, 3, 5, 5, generator=seeded(seed))
    fine = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return datasets.Images("fields", "train", pixels=(255 * fine).to(torch.uint8))


VIEW = data.View(32, scale=(0.3, 1.0))


def settings(tmp_path, **more):
    return SimpleNamespace(**{**dict(
        data="synthetic", data_root="", seed=0, workers=0, img_size=64, patch_size=8, token_size=32,
        tokenizer="", tokenizer_kind="vq", tokenizer_steps=2, codes=16,
        out=str(tmp_path / "run")), **more})


def a_run(**more):
    return SimpleNamespace(**{**dict(device=torch.device("cpu"), rank=0, say=lambda text: None,
                                     leave_if_told=lambda: None), **more})


def small(kind="vq", vocabulary=16, cell=4, seed=0):
    """Untrained, but with words spread over what its encoder gives."""
    torch.manual_seed(seed)
    net = tokenizer.Small(kind, vocabulary, cell, width=8, dim=8).eval().requires_grad_(False)
    e = net.encode(torch.rand(8, 3, 32, 32))
    if kind == "vq":
        z = tokenizer.flat(e)
        tokenizer.restart_codes(net.codes, torch.zeros(vocabulary), z, seeded(seed))
    else:
        net.encoder[-1].bias -= e.mean((0, 2, 3))
    return net


# ---- DALL-E's networks ---------------------------------------------------------------------------


def test_dalle_has_the_published_shapes_tensors_and_parameters():
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


def test_dalle_block_is_the_published_formula():
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


def test_map_keeps_pixels_from_the_ends_and_unmap_undoes_it():
    v = torch.linspace(0, 1, 11)
    u = tokenizer.map_pixels(v)
    assert (u[0].item(), u[-1].item()) == pytest.approx((0.1, 0.9))
    assert torch.allclose(tokenizer.unmap_pixels(u), v, atol=1e-6)
    assert tokenizer.unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    assert u[0].logit().item() == pytest.approx(-2.197, abs=1e-3)


def test_ids_come_from_the_pixels_of_the_loaders_view_mapped_once():
    net, v = small(), torch.rand(4, 3, 32, 32, generator=seeded())
    v[0, :, 0, :2] = torch.tensor([0.0, 1.0])
    view = augment.normalize(v.clone())
    assert torch.allclose(tokenizer.pixels(view), v, atol=1e-6)
    u = tokenizer.map_pixels(tokenizer.pixels(view))
    assert u.min() >= 0.1 - 1e-6 and u.max() <= 0.9 + 1e-6
    ids = net.ids(view)
    assert torch.equal(ids, net.scores(u).argmax(1).flatten(1))
    assert not torch.equal(ids, net.ids(v))                                   # forgot to normalise
    assert not torch.equal(ids, net.scores(tokenizer.map_pixels(u)).argmax(1).flatten(1))   # twice


def test_logit_laplace_is_a_density_with_its_mode_where_it_should_be():
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


def test_unused_words_have_their_closed_form():
    same = torch.zeros(2, 8, 3, 3)
    onehot = torch.zeros(2, 8, 3, 3)
    onehot[:, 5] = 100.0
    spread = 100.0 * F.one_hot(torch.arange(2 * 4 * 4).view(2, 4, 4) % 8).permute(0, 3, 1, 2)
    for logits, unused in ((same, 0), (onehot, math.log(8)), (spread, 0)):    # sure, but all occur
        assert tokenizer.unused(logits.float()).item() == pytest.approx(unused, abs=1e-5)


def test_losses_are_the_stated_sums():
    u = tokenizer.map_pixels(torch.rand(2, 3, 32, 32, generator=seeded()))
    net, u.requires_grad = small("vq"), True
    loss, z, ids = tokenizer.vq_loss(net, u)
    c = net.codes[ids].permute(0, 3, 1, 2).requires_grad_()
    assert torch.equal(ids, net.scores(u).argmax(1)) and torch.equal(z, net.encode(u))
    drawn = (net.paint(c).sigmoid() - u).square().mean()
    assert torch.allclose(loss, drawn + 0.25 * (z - c).square().mean(), atol=1e-6)
    through, = torch.autograd.grad(drawn, c)                  # as if z were the code
    pull = 0.25 * 2 * (z - c) / z.numel()
    assert torch.allclose(torch.autograd.grad(loss, z)[0], through + pull, atol=1e-8)
    assert pull.abs().mean() > 1e-6
    net, noise = small("dvae"), torch.rand(2, 16, 8, 8, generator=seeded(1))
    net.encoder[-1].bias[3] += 3                              # its favourite word
    logits = net.encode(u)
    mix = tokenizer.gumbel_softmax(logits, 0.7, noise).permute(0, 2, 3, 1) @ net.codes
    out = net.paint(mix.permute(0, 3, 1, 2))
    nll = tokenizer.laplace_nll(u, out[:, :3], out[:, 3:]).mean()
    unused = tokenizer.unused(logits)
    assert unused > 0.5
    assert torch.allclose(tokenizer.dvae_loss(net, u, 0.7, noise), nll + 0.1 * unused, atol=1e-5)


def test_gumbel_softmax_draws_from_the_softmax_as_the_temperature_falls():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).view(1, 4, 1, 1)
    n = 20_000
    noise = rng.uniform(torch.arange(n), (4, 1, 1), "gumbel")
    mix = tokenizer.gumbel_softmax(logits.expand(n, -1, -1, -1), 1.0, noise)
    assert torch.allclose(mix.sum(1), torch.ones(n, 1, 1)) and mix.max(1).values.mean() < 0.9
    hard = tokenizer.gumbel_softmax(logits.expand(n, -1, -1, -1), 1e-3, noise)
    assert (hard.max(1).values > 0.999).float().mean() > 0.99
    seen, expected = hard.round().sum((0, 2, 3)), n * logits.flatten().softmax(0)
    assert ((seen - expected).square() / expected).sum() < 16.3               # chi-square, p 0.001
    flat = torch.full((4,), n / 4)                                            # control: no logits
    assert ((seen - flat).square() / flat).sum() > 1000


# ---- vector quantisation -------------------------------------------------------------------------


def test_quantise_finds_the_nearest_code_and_lets_the_gradient_straight_through():
    codes = torch.eye(6)[:4]
    z = F.normalize(codes[[2, 0, 3, 1]].T.reshape(1, 6, 2, 2)
                    + 0.1 * torch.randn(1, 6, 2, 2, generator=seeded()), dim=1).requires_grad_()
    q, ids = tokenizer.quantise(z, codes)
    assert ids.tolist() == [[[2, 0], [3, 1]]]
    assert torch.allclose(q, codes[ids].permute(0, 3, 1, 2), atol=1e-6)
    weight = torch.randn(q.shape, generator=seeded(1))
    (q * weight).sum().backward()
    assert torch.equal(z.grad, weight)                                        # as d/dq


def test_codes_move_towards_what_hit_them_stay_on_the_sphere_and_rest_when_unused():
    codes = F.normalize(torch.randn(5, 8, generator=seeded()), dim=1)
    z = F.normalize(torch.randn(40, 8, generator=seeded(1)), dim=1)
    ids, before = torch.arange(40) % 3, codes.clone()
    ids[-1] = 4                                                               # hit once
    hits = tokenizer.move_codes(codes, z, ids, 0.9)
    assert torch.allclose(codes.norm(dim=1), torch.ones(5), atol=1e-6)
    assert torch.equal(codes[3], before[3]) and hits.tolist() == [13, 13, 13, 0, 1]
    for hit in (0, 1, 2, 4):
        mean = F.normalize(z[ids == hit].sum(0), dim=0)
        moved = F.normalize(0.9 * before[hit] + 0.1 * mean, dim=0)
        assert torch.allclose(codes[hit], moved, atol=1e-6)
        assert codes[hit] @ mean > before[hit] @ mean


def test_dead_codes_become_vectors_of_the_batch_and_live_ones_stay():
    codes = F.normalize(torch.randn(5, 8, generator=seeded()), dim=1)
    z, before = F.normalize(torch.randn(40, 8, generator=seeded(1)), dim=1), codes.clone()
    rate = torch.tensor([3.0, 0.01, 0.06, 0.0, 1.0])
    tokenizer.restart_codes(codes, rate, z, seeded())
    for dead in (1, 3):
        assert (codes[dead] == z).all(1).any() and not (before[dead] == z).all(1).any()
    assert torch.equal(codes[[0, 2, 4]], before[[0, 2, 4]])
    assert (rate >= 0.05).all()                                               # a second chance


# ---- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vq", "dvae"])
def test_ids_are_numbers_of_words_the_same_every_time(kind):
    net, view = small(kind), torch.randn(3, 3, 32, 32, generator=seeded())
    ids = net.ids(view)
    assert ids.shape == (3, 64) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 16 and len(ids.unique()) > 1
    assert torch.equal(ids, net.ids(view)) and torch.equal(ids[1:2], net.ids(view[1:2]))
    drawn = net.decode(ids)
    assert drawn.shape == (3, 3, 32, 32) and 0 <= drawn.min() and drawn.max() <= 1


def test_a_view_moved_by_a_cell_has_moved_ids_inside():
    net, view = small(vocabulary=64), torch.randn(1, 3, 96, 96, generator=seeded())
    ids, moved = (net.ids(x).view(24, 24) for x in (view, view.roll((4, 4), (2, 3))))
    inside = slice(4, -4)                                     # what padding does not reach
    assert torch.equal(moved[inside, inside], ids.roll((1, 1), (0, 1))[inside, inside])
    assert not torch.equal(moved[inside, inside], ids[inside, inside])


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vq", "dvae"])
def test_training_falls_repeats_itself_and_leaves_the_global_generator_alone(kind, monkeypatch):
    torch.manual_seed(3)
    state, said, noise, loss = torch.get_rng_state(), [], [], tokenizer.dvae_loss
    monkeypatch.setattr(tokenizer, "dvae_loss", lambda *given: (
        noise.append(round(given[3].double().sum().item())), loss(*given))[1])
    cfg = SimpleNamespace(seed=0, tokenizer_kind=kind, tokenizer_steps=5, codes=16, workers=0)
    net = tokenizer.train(cfg, a_run(say=said.append), images(16), VIEW, 4)
    assert torch.equal(state, torch.get_rng_state())
    assert len(noise) == len(set(noise)) == 5 * (kind == "dvae")              # new in every step
    losses = [float(text.split()[-1]) for text in said]
    assert losses[-1] < losses[0]
    again = tokenizer.train(cfg, a_run(), images(16), VIEW, 4)
    cfg.seed = 1
    other = tokenizer.train(cfg, a_run(), images(16), VIEW, 4)
    same = [all(torch.equal(a, b) for a, b in zip(net.parameters(), n.parameters()))
            for n in (again, other)]
    assert same == [True, False]


def test_a_loss_that_is_not_finite_is_said_and_no_tokenizer_kept(tmp_path, monkeypatch):
    loss = tokenizer.dvae_loss
    monkeypatch.setattr(tokenizer, "dvae_loss", lambda *given: loss(*given) * math.nan)
    cfg = settings(tmp_path, tokenizer_kind="dvae")
    with pytest.raises(ValueError, match="not finite by its step 1: try --tokenizer-kind vq"):
        tokenizer.get_tokenizer(cfg, a_run(), images(), images(8), VIEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_temperature_falls_in_time_and_codes_settle_at_the_end(monkeypatch):
    seen, restarts = [], []
    cfg = SimpleNamespace(seed=0, tokenizer_kind="dvae", tokenizer_steps=8, codes=4, workers=0)
    real, restart = tokenizer.dvae_loss, tokenizer.restart_codes
    monkeypatch.setattr(tokenizer, "Small", partial(tokenizer.Small, width=8))
    monkeypatch.setattr(tokenizer, "dvae_loss", lambda net, u, tau, noise: (
        seen.append((tau, u.min() >= 0.1 - 1e-6, u.max() <= 0.9 + 1e-6)),
        real(net, u, tau, noise))[1])
    tokenizer.train(cfg, a_run(), images(2), VIEW, 4)
    taus, low, high = zip(*seen)
    assert taus[0] == 1 and taus[3] == pytest.approx((1 + 1 / 16) / 2) and taus[6:] == (1 / 16,) * 2
    assert all(low) and all(high)
    monkeypatch.setattr(tokenizer, "restart_codes", lambda codes, rate, *more: (
        restarts.append((rate < 0.05).all().item()), restart(codes, rate, *more)))
    cfg.tokenizer_kind, cfg.tokenizer_steps = "vq", 201
    tokenizer.train(cfg, a_run(), images(2), VIEW, 4)
    assert len(restarts) == 2 and restarts[0]                 # steps 0, of all, and 100, not 200


def test_survey_counts_words_and_errors():
    net, pictures = small(), images(8)
    found = tokenizer.survey(net, pictures, 32, a_run(), 0)
    x, _ = next(data.batches(pictures, 32))
    ids = net.ids(x).flatten()
    p = ids.bincount(minlength=16) / len(ids)
    v = pictures.pixels / 255
    mean = v.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    mean = mean.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert found["used"] == len(ids.unique()) and found["commonest"] == p.max()
    assert found["perplexity"] == pytest.approx(math.exp(-torch.xlogy(p, p).sum()), rel=1e-4)
    assert found["baseline"] == pytest.approx((mean - v).square().mean().item(), abs=1e-6)
    assert found["mse"] == pytest.approx((net.decode(net.ids(x)) - v).square().mean().item(),
                                         abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind, steps, least", [("vq", 300, 64), ("dvae", 600, 10)])
def test_a_trained_one_draws_what_it_sees_and_uses_its_words(kind, steps, least):
    """Soon: vq beats even the true mean colour of each cell, dvae that of the image."""
    toy, test = (datasets.load_images("toy", split=split, size=16, limit=limit)
                 for split, limit in (("train", 1500), ("test", 500)))
    for images in toy, test:                                # less noise, which no word can tell
        images.pixels = F.avg_pool2d(images.pixels.float(), 5, 1, 2).round().to(torch.uint8)
    cfg = SimpleNamespace(seed=0, tokenizer_kind=kind, tokenizer_steps=steps, codes=256, workers=0)
    net = tokenizer.train(cfg, a_run(), toy, replace(VIEW, size=16, interpolation="lanczos"), 4)
    found = tokenizer.survey(net, test, 16, a_run(), 0)
    v = test.pixels.float() / 255
    image = (v - v.mean((2, 3), keepdim=True)).square().mean()
    assert found["mse"] < (found["baseline"] if kind == "vq" else 0.5 * image)
    assert found["perplexity"] > least


# ---- files ---------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_once_and_kept(tmp_path, monkeypatch):
    cfg, said = settings(tmp_path), []
    net = tokenizer.get_tokenizer(cfg, a_run(say=said.append), images(), images(8), VIEW)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    assert len(said) > 1 and "16 words" in said[-1]
    assert net.report == tokenizer.survey(net, images(8), 32, a_run(), 0)     # of those held out
    assert f"{net.report['used']} used, perplexity" in said[-1]
    kept, = tmp_path.iterdir()
    before = kept.read_bytes()
    monkeypatch.setattr(tokenizer, "train", None)                             # not called again
    again = tokenizer.get_tokenizer(cfg, a_run(rank=1), images(), images(8), VIEW)
    named = tokenizer.get_tokenizer(settings(tmp_path, tokenizer=str(kept)), a_run(), images(), None, VIEW)
    view = torch.randn(2, 3, 32, 32, generator=seeded())
    assert torch.equal(net.ids(view), again.ids(view)) and torch.equal(net.ids(view),
                                                                       named.ids(view))
    assert kept.read_bytes() == before
    tokenizer.save(kept, small(), "")                         # a second run, at the same time
    assert kept.read_bytes() == before and list(tmp_path.iterdir()) == [kept]


def test_an_unreadable_held_out_image_does_not_cost_the_tokenizer(tmp_path, monkeypatch):
    def unreadable(*_):
        raise ValueError("cannot read 7.png")

    monkeypatch.setattr(tokenizer, "survey", unreadable)
    cfg, said = settings(tmp_path), []
    net = tokenizer.get_tokenizer(cfg, a_run(say=said.append), images(), images(8), VIEW)
    assert "left out: cannot read 7.png" in said and said[-1].endswith("16 words")
    assert net.report == "" and tokenizer.cache(cfg, images(), VIEW).exists()


def test_the_other_processes_wait_for_the_file_and_leave_when_told(tmp_path, monkeypatch):
    cfg, waited = settings(tmp_path), []

    def sleep(seconds):                                       # meanwhile, in process 0
        waited.append(seconds)
        if len(waited) == 3:
            tokenizer.save(tokenizer.cache(cfg, images(), VIEW), small(cell=4), "")

    monkeypatch.setattr(tokenizer.time, "sleep", sleep)
    monkeypatch.setattr(tokenizer, "train", None)
    assert tokenizer.get_tokenizer(cfg, a_run(rank=1), images(), None, VIEW).vocabulary == 16
    assert len(waited) == 3

    def leave():
        raise SystemExit

    with pytest.raises(SystemExit):
        other = settings(tmp_path, seed=1)
        tokenizer.get_tokenizer(other, a_run(rank=1, leave_if_told=leave), images(), None, VIEW)


def test_other_data_sizes_or_seeds_have_another_cache(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    cfg = settings(tmp_path)
    others = [settings(tmp_path, **{name: value}) for name, value in dict(
        seed=1, data="toy", data_root="/elsewhere", token_size=64, img_size=32, patch_size=4,
        codes=32, tokenizer_kind="dvae", tokenizer_steps=3).items()]
    others.append(settings(tmp_path, data=str(tmp_path / "photos")))
    places = [tokenizer.cache(cfg, images(), VIEW), tokenizer.cache(cfg, images(10), VIEW),
              tokenizer.cache(cfg, images(), replace(VIEW, size=16)),
              *(tokenizer.cache(other, images(), VIEW) for other in others)]
    assert len(set(places)) == len(places)
    same = settings(tmp_path, out=str(tmp_path / "another"), workers=7)
    assert tokenizer.cache(same, images(), VIEW) == places[0]
    assert places[-1].name.startswith("tokenizer-photos-") and places[-1].parent == tmp_path
    monkeypatch.chdir(tmp_path)                           # from wherever the run is started
    assert tokenizer.cache(same, images(), VIEW) == places[0]


@pytest.mark.parametrize("where", ["training", "writing"])
def test_a_killed_training_leaves_no_broken_cache(where, tmp_path, monkeypatch):
    cfg, whole = settings(tmp_path), torch.save

    def die(*_):
        raise KeyboardInterrupt

    def half(content, file):
        file.write(b"PK half a file")
        die()

    if where == "training":
        monkeypatch.setattr(tokenizer, "survey", die)
    else:
        monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.get_tokenizer(cfg, a_run(), images(), images(8), VIEW)
    assert not tokenizer.cache(cfg, images(), VIEW).exists()
    monkeypatch.undo()
    assert torch.save is whole
    assert tokenizer.get_tokenizer(cfg, a_run(), images(), images(8), VIEW).vocabulary == 16


@pytest.mark.parametrize("wrong, words", [
    (dict(token_size=36), "64 or 32"), (dict(token_size=24), "64 or 32"),
    (dict(token_size=8), "64 or 32"), (dict(tokenizer_kind="gan"), "vq or dvae"),
    (dict(codes=1), "--codes"), (dict(tokenizer_steps=0), "--tokenizer-steps"),
    (dict(tokenizer="none.pt"), "no checkpoint file")])
def test_settings_that_do_not_fit_get_one_sentence(wrong, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        tokenizer.get_tokenizer(settings(tmp_path, **wrong), a_run(), images(), images(8), VIEW)


def test_a_file_with_other_cells_is_refused(tmp_path):
    tokenizer.save(tmp_path / "t.pt", small(cell=8), "")
    with pytest.raises(ValueError, match="--token-size 64"):
        tokenizer.get_tokenizer(settings(tmp_path, tokenizer=str(tmp_path / "t.pt")), a_run(), None, None,
                      VIEW)


@pytest.mark.parametrize("content, words", [
    ({"some": torch.zeros(1)}, "no tokenizer"), ({"some": 1}, "no tokenizer"),
    ({"format": "tokenizer/1", "config": {"kind": "vq"}, "model": {}}, "no tokenizer"),
    ({"format": "encoder/1"}, "no tokenizer"), ({"state_dict": torch.zeros(1)}, "no tokenizer"),
    ({"state_dict": [torch.zeros(1)]}, "no tokenizer"), ([torch.zeros(1)], "holds a list"),
    ({"format": "tokenizer/1", "config": {"kind": "vq", "vocabulary": 4, "cell": 4}, "model": [],
      "report": ""}, "no tokenizer"),
    (torch.zeros(1), "holds a Tensor"),
    (b"<html>", "damaged")])
def test_files_that_are_no_tokenizer_get_one_sentence(content, words, tmp_path):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=words) as caught:
        tokenizer.load_tokenizer(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


class Executed:
    def __reduce__(self):
        return exec, ("import sys; sys.executed = True",)


def pickled(module, path, **more):
    """Saves a module as DALL-E's files are: pickled, of classes in a package dall_e."""
    names = "dall_e", "dall_e.utils", "dall_e.encoder"
    packages = {name: types.ModuleType(name) for name in names}

    def theirs(at, name):
        made = type(name, (nn.Module,), {"__module__": at})
        setattr(packages[at], name, made)
        return made

    Conv2d, Block = theirs("dall_e.utils", "Conv2d"), theirs("dall_e.encoder", "EncoderBlock")
    Whole = theirs("dall_e.encoder", "Encoder")

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

    whole = Whole()
    whole.blocks = convert(module.blocks)
    for name, value in more.items():
        setattr(whole, name, value)
    sys.modules.update(packages)
    try:
        torch.save(whole, path)
    finally:
        for name in packages:
            del sys.modules[name]


@pytest.mark.slow
def test_dalles_pickled_modules_load_without_running_them(tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder, decoder = tokenizer.dalle_encoder(), tokenizer.dalle_decoder()
    pickled(encoder, tmp_path / "encoder.pkl", vocab_size=8192)
    net = tokenizer.load_tokenizer(tmp_path / "encoder.pkl")
    assert (net.vocabulary, net.cell, net.decoder) == (8192, 8, None)
    for name, value in encoder.state_dict().items():
        assert torch.equal(net.encoder.state_dict()[name], value), name
    view = torch.randn(1, 3, 16, 16, generator=seeded())
    ids = net.ids(view)
    u = tokenizer.map_pixels(tokenizer.pixels(view))
    assert torch.equal(ids, encoder(u).argmax(1).flatten(1)) and ids.shape == (1, 4)
    colours = net.decode(ids)                                 # a colour for each word
    assert colours.shape == (1, 3, 16, 16)
    assert (colours[:, :, :8, :8] == colours[:, :, :1, :1]).all()

    pickled(decoder, tmp_path / "decoder.pkl")
    drawn = tokenizer.load_tokenizer(tmp_path / "encoder.pkl").decode(ids)
    onehot = F.one_hot(ids.view(1, 2, 2), 8192).permute(0, 3, 1, 2).float()
    assert torch.equal(drawn, tokenizer.unmap_pixels(decoder(onehot)[:, :3].sigmoid()))

    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "converted.pth")
    plain = tokenizer.load_tokenizer(tmp_path / "converted.pth")
    assert torch.equal(plain.ids(view), ids)


def test_code_in_a_pickled_module_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executed", False, raising=False)
    blocks = nn.Sequential(OrderedDict(input=tokenizer.Conv(3, 2, 1)))
    pickled(SimpleNamespace(blocks=blocks), tmp_path / "encoder.pkl", extra=Executed())
    with pytest.raises(ValueError, match="nothing was run"):
        tokenizer.load_tokenizer(tmp_path / "encoder.pkl")
    assert not sys.executed


def test_counts_are_of_all_words_that_were_to_be_named():
    count = tokenizer.Count(4)
    count.add(torch.tensor([[0, 1], [1, 1]])), count.add(torch.tensor([3, 3, 3, 1]))
    found = count.facts()                                                    # 1, 4, 0, 3 of 8
    assert found["commonest"] == 0.5
    assert found["entropy"].item() == pytest.approx(
        math.log(8) / 8 + math.log(2) / 2 + math.log(8 / 3) * 3 / 8)
    again = tokenizer.Count(4)
    again.load_state_dict(count.state_dict())                                # a run goes on
    assert again.facts() == found


def test_a_fingerprint_tells_tokenizers_apart_and_refuses_another():
    one, same, other = (tokenizer.Fingerprint(small(seed=seed)) for seed in (0, 0, 1))
    one.load_state_dict(same.state_dict())
    repainted = small()
    repainted.decoder[0].weight.data.zero_()              # draws other pictures of the same words
    one.load_state_dict(tokenizer.Fingerprint(repainted).state_dict())
    with pytest.raises(ValueError, match="its words are others"):
        one.load_state_dict(other.state_dict())


def test_training_ends_when_the_process_is_told_to_stop(tmp_path):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    cfg = config.parse(beit.Config, ["--tokenizer-steps", "5", "--codes", "16", "--workers", "0",
                                        "--out", str(tmp_path / "run")])
    try:
        run = Run(cfg)
        tokenizer.train(cfg, run, images(16), VIEW, 4)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            tokenizer.train(cfg, run, images(16), VIEW, 4)
        assert stop.value.code == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
