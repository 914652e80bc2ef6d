"""The shared pass against the ViT's own forward, decoders against the methods', and the report."""
import csv
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import analysis
import hybrid
import mae
import mmc
import simmim
import vit
from diagnostics import figures
from lib import augment, checkpoints, config, datasets, rng, toy
from probes import annotations

TINY = dict(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=3)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(path=None, **config):
    torch.manual_seed(0)
    encoder = vit.ViT(**{**TINY, **config}).eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.2 * torch.randn_like(p))
    encoder.source = SimpleNamespace(path=path, branch="base", step=1, heads={})
    return SimpleNamespace(name="tiny", encoder=encoder, size=32, mean=augment.MEAN, std=augment.STD,
                           source=encoder.source, interpolation="bicubic")


def settings(*flags):
    args = analysis.parse([*flags, "--device", "cpu", "--workers", "0"])
    args.data = args.data or "toy"
    return args


@pytest.mark.parametrize("config", [{}, dict(pos="none", rel_pos="shared", layer_scale=0.1,
                                             qkv_bias="split"), dict(class_token=False)])
@torch.no_grad()
def test_walk_is_the_forward(config):
    encoder, x, args = model(**config).encoder, draw(2, 3, 32, 32).float(), settings()
    tokens, grid = encoder.embed(x)
    passed, fused = (list(analysis.walk(args, encoder.blocks, tokens, encoder.num_prefix,
                                        lambda b: encoder.attention_bias(b, grid), look))
                     for look in (True, False))
    outputs, found = encoder.layers(x, norm=False, attention=range(3))
    assert torch.equal(passed[0].before, encoder.split(tokens)[1])
    for l, (c, f) in enumerate(zip(passed, fused)):
        assert torch.allclose(c.tokens, outputs[l], atol=1e-5)
        assert torch.allclose(c.weights, found[l], atol=1e-6)
        assert f.weights is None and torch.allclose(f.tokens, c.tokens, atol=1e-5)
        block, heads = encoder.blocks[l], c.heads.transpose(1, 2).flatten(2)
        after = c.before + block.ls1(block.attn.proj(heads))
        assert torch.allclose(after, c.after, atol=1e-5)
        assert not torch.allclose(after, c.out, atol=1e-2)               # control


def means(m, names, *flags):
    return analysis.shared_pass(m, settings(*flags), names).means


def test_zero_projection_leaves_tokens_alone():
    m = model()
    torch.nn.init.zeros_(m.encoder.blocks[1].attn.proj.weight)
    torch.nn.init.zeros_(m.encoder.blocks[1].attn.proj.bias)
    found = means(m, {"depth_similarity"}, "--limit", "4")["depth_similarity"]
    assert found[1] == pytest.approx(1, abs=1e-12) and found[0] < 0.999


def test_means_do_not_depend_on_batches():
    m, names = model(), set(analysis.STREAMS)
    a, b = (means(m, names, "--limit", "7", "--batch-size", size) for size in ("7", "3"))
    for name in names:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6), name
    fewer = means(m, names, "--limit", "3")                              # control
    assert not torch.allclose(a["nmi"], fewer["nmi"], rtol=1e-4)


def test_a_direction_that_all_tokens_share_can_be_taken_off():
    m, args = model(), settings("--limit", "8", "--what", "token_similarity", "--center")
    net = m.encoder
    net.patch_embed.proj.bias.data[:] = 20 * draw(net.embed_dim)         # the same for every token
    found, plain = (analysis.analyse(m, a)[0]["token_similarity"] for a in (
        args, settings("--limit", "8", "--what", "token_similarity")))
    with torch.no_grad():
        [(x, *_)] = analysis.batches(m, args, 8)
        states = [net.embed(x)[0], *net.layers(x, norm=False)[0]]
    assert len(states) == len(found["centred_after_block"]) == 4
    for state, ours in zip(states, found["centred_after_block"]):       # each with its own mean
        z = net.split(state)[1]
        z = F.normalize(z - z.mean((0, 1)), dim=-1)
        off = ~torch.eye(z.shape[1], dtype=torch.bool)
        torch.testing.assert_close(ours.float(), (z @ z.mT)[:, off].mean(), atol=1e-5, rtol=1e-4)
    assert found["after_block"][0] > 0.9 > 0.3 > found["centred_after_block"][0]
    assert "centred_after_block" not in plain
    assert torch.equal(plain["after_block"], found["after_block"])


@torch.no_grad()
def test_last_tokens_are_those_after_the_final_norm():
    m, args = model(), settings("--limit", "4")
    [(x, *_)] = analysis.batches(m, args, 4)
    z, off = F.normalize(m.encoder(x)[:, 1:], dim=-1), ~torch.eye(64, dtype=torch.bool)
    found = means(m, {"final_similarity"}, "--limit", "4")["final_similarity"].item()
    assert found == pytest.approx((z @ z.mT)[:, off].mean().item(), abs=1e-5)


def test_so_many_images_are_asked_for(monkeypatch):
    class Asked(Exception):
        pass

    def batches(model, args, limit, *_, **__):
        raise Asked(limit)

    monkeypatch.setattr(analysis, "batches", batches)
    small, wide = model(), model(embed_dim=600, depth=1)     # wide: 4 C are more than 2048
    for numbers, m, images in (
            (analysis.shared_pass, small, 256), (analysis.sv_images_numbers, small, 2048),
            (analysis.sv_images_numbers, wide, 2400), (analysis.retrieval_numbers, small, 1000),
            (analysis.variance_numbers, small, 64), (analysis.heat_numbers, small, 256)):
        for flags, expected in (((), images), (("--limit", "9"), 9)):
            with pytest.raises(Asked) as stop:
                numbers(m, settings(*flags), {"nmi"})
            assert stop.value.args == (expected,), numbers


def test_attention_is_written_out_only_if_looked_at(monkeypatch):
    looked, walk = [], analysis.walk
    monkeypatch.setattr(analysis, "walk", lambda *given: looked.append(given[-1]) or walk(*given))
    means(model(), {"fourier"}, "--limit", "2")
    means(model(), {"nmi"}, "--limit", "2")
    assert looked == [False, True]


def test_narrow_window_is_local():
    names = {"attention_distance", "nmi"}
    found = means(model(), names, "--limit", "2", "--window", "1")
    assert found["attention_distance"].max() < 1e-6 and found["nmi"].min() > 0.999
    free = means(model(), names, "--limit", "2")["nmi"]
    wide = means(model(), names, "--limit", "2", "--window", "15")["nmi"]    # 2g - 1: all is seen
    assert torch.allclose(wide, free, atol=1e-7) and wide.max() < 0.999


@pytest.mark.parametrize("k, keys", [(3, 8.16327), (5, 20.8980), (7, 37.7347), (13, 100),
                                     (27, 196)])
def test_window_lets_so_many_patches_be_seen(k, keys):
    encoder = vit.ViT(56, 4, embed_dim=4, depth=1, num_heads=1)          # 14 x 14 patches
    mask = encoder.local_mask(k)[1:, 1:]
    assert mask.double().sum(1).mean().item() == pytest.approx(keys, rel=1e-5)
    assert mask.any(1).all()                                 # no query is left without a key


def test_maps_are_those_of_the_queries(monkeypatch):
    m, args = model(), settings("--limit", "1")
    own, even = torch.eye(65).expand(1, 3, 65, 65), torch.full((1, 3, 65, 65), 1 / 65)
    weights = {0: own, 1: even, 2: even}
    monkeypatch.setattr(m.encoder, "layers", lambda *given, **how: (None, weights))
    found = analysis.map_numbers(m, args, None)              # blocks 1 and 2 of 3, two queries
    assert found["blocks"] == [1, 2] and found["queries"] == [(4, 4), (2, 1)]
    maps = found["maps"]                                     # (queries x blocks, 8, 8)
    assert torch.allclose(maps.sum((1, 2)), torch.ones(4))
    assert maps[0, 4, 4] > 0.999 and maps[2, 2, 1] > 0.999   # each looks at itself: there
    assert torch.allclose(maps[[1, 3]], torch.full((2, 8, 8), 1 / 64))
    image, *tiles = found["show"][0].tiles
    assert [box[:3] for box in image.boxes] == [(16, 16, 4), (4, 8, 4)]  # pixels of the two patches
    assert tiles[0].boxes[0][:3] == (4, 4, 1) and tiles[2].boxes[0][:3] == (1, 2, 1)
    assert abs(int(found["class_token_60_percent_on"][0]) - 39) <= 1     # of 64 alike


def test_the_plane_is_seen_through_the_window():
    """A window of one patch without class token: the last block does to a token what it would do
    to it alone."""
    m, args = model(class_token=False), settings("--limit", "2", "--window", "1")
    s = analysis.shared_pass(m, args, {"unison"})
    found = analysis.unison_numbers(m, args, s)
    for block in m.encoder.blocks:                           # each patch attends to itself
        attention = block.attn
        attention.forward = lambda x, *_, own=attention: own.proj(
            F.linear(x, own.qkv.weight, own.qkv.bias).chunk(3, 2)[2])
    alone = analysis.unison_numbers(m, settings("--limit", "2"), s)
    torch.testing.assert_close(found["plane"], alone["plane"], atol=1e-4, rtol=1e-4)
    assert found["centre_ratio"] == pytest.approx(alone["centre_ratio"], rel=1e-4)
    free = analysis.unison_numbers(model(class_token=False), settings("--limit", "2"), s)
    assert free["centre_ratio"] != pytest.approx(alone["centre_ratio"], rel=1e-2)       # control


def test_without_a_class_token_there_is_no_attention_to_it():
    for token in (True, False):
        m, args = model(class_token=token), settings("--limit", "2", "--what", "nmi")
        assert ("class_mass" in analysis.analyse(m, args)[0]["nmi"]) == token


def test_images_whose_centres_move_apart():
    m, args = model(), settings("--limit", "2")
    s, last = analysis.shared_pass(m, args, {"unison"}), m.encoder.blocks[2]
    last.norm1, attention = torch.nn.Identity(), last.attn
    attention.forward = lambda x, *_: 0 * attention.proj(x)              # adds nothing
    assert analysis.unison_numbers(m, args, s)["centre_ratio"] == pytest.approx(1)
    attention.forward = lambda x, *_: x + 0 * attention.proj(x)          # adds the token itself
    assert analysis.unison_numbers(m, args, s)["centre_ratio"] == pytest.approx(2)


# ---- decoders ------------------------------------------------------------------------------------


def save_mae(folder):
    """A run's folder with MAE's encoder.pt, full.pt and config.yaml."""
    cfg = config.parse(mae.Config, "--img-size 32 --patch-size 4 --embed-dim 24 --depth 3 "
                          "--num-heads 3 --decoder-embed-dim 16 --decoder-depth 2 "
                          "--decoder-num-heads 2".split())
    torch.manual_seed(0)
    net = mae.Network(cfg).eval()
    folder.mkdir(parents=True)
    checkpoints.save_encoder(folder / "encoder.pt", net.encoder, method="mae", data="toy", branch="base",
                     step=3)
    torch.save(dict(model=mae.official(net), num_heads=3), folder / "full.pt")
    (folder / "config.yaml").write_text("decoder_num_heads: 2\nmask_ratio: 0.75\nnorm_pix: false\n")
    m = model(str(folder / "encoder.pt"))
    m.encoder = net.encoder
    m.encoder.source = m.source
    return m, net


@torch.no_grad()
def test_decoder_is_maes_own_and_in_order(tmp_path):
    m, net = save_mae(tmp_path / "mae")
    decoder, x = analysis.mae_decoder(m), draw(2, 3, 32, 32).float()
    tokens = net.encoder(x)
    order = torch.arange(64).expand(2, 64)
    z = decoder.enter(tokens)
    for block in decoder.blocks:
        z = block(z)
    assert torch.allclose(decoder.paint(z), net.decoder(tokens, order)[:, 1:], atol=1e-5)
    shuffled = net.decoder(tokens, order.flip(1))[:, 1:]
    assert not torch.allclose(decoder.paint(z), shuffled, atol=1e-3)     # control
    for block in net.encoder.blocks:         # the encoder path keeps the order of the patches
        for last in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(last.weight), torch.nn.init.zeros_(last.bias)
    tokens, grid = net.encoder.embed(x)
    *_, c = analysis.walk(settings(), net.encoder.blocks, tokens, 1)
    assert torch.equal(c.tokens, tokens)


def test_identity_blocks_of_the_decoder_give_a_flat_curve(tmp_path):
    m, net = save_mae(tmp_path / "mae")
    args = settings("--limit", "3", "--what", "decoder")
    found = analysis.analyse(m, args)[0]["decoder"]
    assert found["decoder_depth"] == [3, 4, 5] and found["decoder_block"] == [4, 5]
    assert (found["decoder_highest"].diff().abs() > 1e-3).all()          # control
    path, raw = tmp_path / "mae/full.pt", torch.load(tmp_path / "mae/full.pt")
    for key, x in raw["model"].items():
        if key.startswith("decoder_blocks") and ("attn.proj" in key or "mlp.fc2" in key):
            x.zero_()
    torch.save(raw, path)
    flat = analysis.analyse(m, args)[0]["decoder"]["decoder_highest"]
    assert torch.allclose(flat, flat[:1].expand(3), atol=1e-6)


def test_what_a_decoder_without_its_settings_is_taken_for(tmp_path, capsys):
    m, net = save_mae(tmp_path / "mae")
    (tmp_path / "mae/config.yaml").unlink()
    found, missed = analysis.analyse(m, settings(
        "--limit", "2", "--what", "nmi", "decoder", "layer_reconstruction"))
    assert set(found) == {"nmi"} and set(missed) == {"decoder", "layer_reconstruction"}
    assert all("decoder of width 16" in why for why in missed.values())
    net = mae.Network(config.parse(mae.Config, "--img-size 32 --patch-size 4 --embed-dim 24 "
                                      "--depth 3 --num-heads 3 --decoder-embed-dim 512".split()))
    torch.save(dict(model=mae.official(net)), tmp_path / "mae/full.pt")
    capsys.readouterr()
    assert analysis.mae_decoder(m).blocks[0].attn.num_heads == 16        # 512 wide: MAE's own
    analysis.painter(m, torch.zeros(1, 3, 32, 32), 0)
    assert "norm_pix" in capsys.readouterr().out


@torch.no_grad()
def test_last_block_paints_what_the_network_paints(tmp_path):
    m, net = save_mae(tmp_path / "mae")
    x = draw(2, 3, 32, 32).float()
    hidden, given, paint = analysis.painter(m, x, 0)
    noise = rng.uniform(torch.arange(2), 64, 0, "hide")
    pred, mask = net(x, noise)
    assert torch.equal(hidden[:, 0, ::4, ::4].flatten(1), mask) and mask.sum() == 96
    assert torch.equal(given, x.where(~hidden, 0.0))
    assert torch.allclose(paint(2), mae.unpatchify(pred), atol=1e-5)
    assert not torch.allclose(paint(1), paint(2), atol=1e-3)
    for last in (net.encoder.blocks[2].attn.proj, net.encoder.blocks[2].mlp.fc2):
        torch.nn.init.zeros_(last.weight), torch.nn.init.zeros_(last.bias)
    *_, paint = analysis.painter(m, x, 0)
    assert torch.equal(paint(1), paint(2))                   # an identity block changes nothing


@torch.no_grad()
def test_simmim_paints_what_its_network_paints(tmp_path):
    cfg = config.parse(simmim.Config, "--img-size 32 --patch-size 4 --mask-block 8 --embed-dim "
                          "24 --depth 3 --num-heads 3".split())
    torch.manual_seed(0)
    net = simmim.Network(cfg).eval()
    torch.save(dict(model=simmim.official(net)), tmp_path / "full.pt")
    (tmp_path / "config.yaml").write_text(f"mask_block: 8\nmask_ratio: {cfg.mask_ratio}\n")
    m, x = model(str(tmp_path / "encoder.pt")), draw(2, 3, 32, 32).float()
    m.encoder, m.encoder.source = net.backbone, m.source
    hidden, given, paint = analysis.painter(m, x, 0)
    mask = hidden[:, 0, ::4, ::4]
    assert mask.sum((1, 2)).tolist() == [40, 40]             # 10 of 16 blocks, four patches each
    assert torch.allclose(paint(2), net(x, mask), atol=1e-5)
    assert not torch.allclose(paint(1), paint(2), atol=1e-3)             # control


def trained(method, folder, *flags):
    """A model whose painting head lies in the student of last.pt; and that student."""
    cfg = config.parse(method.Config, "--img-size 32 --patch-size 4 --embed-dim 24 --depth 3 "
                          "--num-heads 3 --hidden 16 --out-dim 8".split() + list(flags))
    torch.manual_seed(0)
    net = method.Network(cfg).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save(dict(format="training/1", state=dict(student=net.state_dict())), folder / "last.pt")
    (folder / "config.yaml").write_text("noise_share: 0.4\nmask_block: 8\nmask_ratio: 0.5\n")
    m = model(str(folder / "encoder.pt"), **net.backbone.config)
    m.encoder.source.method = method.__name__
    return m, net, draw(2, 3, 32, 32).float()


@torch.no_grad()
def test_hybrid_paints_what_its_network_paints(tmp_path):
    m, net, x = trained(hybrid, tmp_path, "--mask-block", "8")
    m.encoder.load_state_dict(net.backbone.state_dict())     # base: encoder.pt holds the student
    hidden, _, paint = analysis.painter(m, x, 0)
    pixels, _ = net((x, hidden[:, 0, ::4, ::4], None))
    assert torch.allclose(paint(2), pixels, atol=1e-5)
    assert not torch.allclose(paint(1), paint(2), atol=1e-3)             # control


@torch.no_grad()
def test_mmc_paints_by_its_student_in_rectangles_of_noise(tmp_path):
    m, net, x = trained(mmc, tmp_path)
    hidden, given, paint = analysis.painter(m, x, 0)         # encoder.pt: a teacher, other weights
    assert torch.allclose(paint(2), net(given)[2], atol=1e-5)
    assert not torch.allclose(paint(2), net(x)[2], atol=1e-3)            # control: of the intact
    u = rng.uniform(torch.arange(2), (255, 4), 0, "hide")
    assert torch.equal(hidden[:, 0], mmc.rectangles(u, 32, torch.tensor([0.4, 0.4])))
    assert torch.equal(given.where(~hidden, 0.0), x.where(~hidden, 0.0))
    assert (given[hidden.expand_as(x)] != x[hidden.expand_as(x)]).all()
    m.encoder.source.method = "dino"                         # last.pt is large: not opened in vain
    with pytest.raises(analysis.Missing, match="nothing paints"):
        analysis.painter(m, x, 0)


def test_without_a_decoder_one_line_says_so():
    found, missed = analysis.analyse(model(), settings(
        "--limit", "2", "--what", "decoder", "layer_reconstruction", "nmi"))
    assert set(found) == {"nmi"} and set(missed) == {"decoder", "layer_reconstruction"}


# ---- labels of pixels ----------------------------------------------------------------------------


def test_labels_are_those_of_the_picture():
    m, args = model(), settings("--limit", "5", "--batch-size", "3")
    found = list(analysis.batches(m, args, 5, maps=True))
    x, number, labels = (torch.cat(parts) for parts in zip(*found))
    drawn = toy.draw(number, "test", 32, annotate=True)
    assert number.tolist() == [0, 1, 2, 3, 4] and torch.equal(labels, drawn["semantic"].long())
    plain = torch.cat([x for x, *_ in analysis.batches(m, args, 5)])
    assert torch.allclose(x, plain, atol=1e-6)               # one and the same images
    assert all(labels is None for *_, labels in analysis.batches(m, args, 5))


def voc(root):
    """VOC's layout: a dark picture with a bright square, an aeroplane, that has an unknown rim."""
    top = root / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (top / name).mkdir(parents=True)
    image, labels = np.full((2, 80, 120, 3), 20, np.uint8), np.zeros((2, 80, 120), np.uint8)
    image[:, 20:60, 40:80], labels[:, 18:62, 38:82], labels[:, 20:60, 40:80] = 230, 255, 1
    for part in ("train", "val"):
        (top / f"ImageSets/Segmentation/{part}.txt").write_text("a\nb\n")
    for i, name in enumerate("ab"):
        Image.fromarray(image[i]).save(top / f"JPEGImages/{name}.jpg", quality=95)
        Image.fromarray(labels[i]).save(top / f"SegmentationClass/{name}.png")
    return ["--data", "voc", "--data-root", str(root)]


def test_only_patches_with_a_label_have_neighbours_of_the_same(monkeypatch):
    """Three images of 8 x 8 patches: one class; its lower half unknown; nothing known."""
    labels = torch.zeros(3, 32, 32, dtype=torch.long)
    labels[1, 16:], labels[2] = -1, -1
    monkeypatch.setattr(analysis, "batches", lambda *_, **__: (
        (torch.zeros(n, 3, 32, 32), None, part) for n, part in ((2, labels[:2]), (1, labels[2:]))))
    m, args = model(), settings("--limit", "3", "--what", "adjacent_count")
    found = analysis.analyse(m, args)[0]["adjacent_count"]
    # 8 x 8: 420 of 512; 4 x 8: 4 corners of 3, 16 at the rim of 5, 12 of 8
    assert found["labels_mean"] == pytest.approx((420 / 64 + (4 * 3 + 16 * 5 + 12 * 8) / 32) / 2)
    assert found["labels_share"].sum() == pytest.approx(1) and found["labels_share"][0] == 0
    labels[:] = -1
    assert np.isnan(analysis.analyse(m, args)[0]["adjacent_count"]["labels_mean"])


def test_every_set_of_class_maps_can_be_asked(tmp_path):
    m, args = model(), settings("--limit", "4", *voc(tmp_path))
    [(x, number, labels)] = analysis.batches(m, args, 4, maps=True)
    assert x.shape == (2, 3, 32, 32) and set(labels.unique().tolist()) == {-1, 0, 1}
    bright = x.mean(1) > 0
    assert (bright[labels == 1]).all() and not bright[labels == 0].any()    # cut out alike
    args.what = ["intra_inter", "prompt_heatmap", "adjacent_count", "attention_distance", "tsne"]
    found, missed = analysis.analyse(m, args)
    assert not missed and found["intra_inter"]["pairs"][0] > 0 and found["prompt_heatmap"][
        "prompts"] == 2
    shown = found["prompt_heatmap"]["show"][0].tiles[0]
    (truth, _), (above, _) = shown.outlines
    place = int(shown.star[1]), int(shown.star[0])
    assert truth[place] and above[place]


def test_alike_tokens_reach_the_floor_of_the_prompt_and_no_more(tmp_path, monkeypatch):
    m, args = model(), settings("--limit", "2", *voc(tmp_path))
    alike = torch.ones(1, 64, 4).expand(2, 64, 4) / 2
    monkeypatch.setattr(analysis, "unit", lambda *given: alike)
    found = analysis.heat_numbers(m, args, None)
    assert found["best"] == pytest.approx(found["whole_picture"]) and found["order"] == 0.5
    monkeypatch.setattr(analysis, "unit", lambda *given: torch.eye(64).expand(2, 64, 64))
    assert analysis.heat_numbers(m, args, None)["order"] == 0.5          # but for the prompt itself
    [(*_, labels)] = analysis.batches(m, args, 2, maps=True)             # void counts nowhere
    expected = (labels[0] == 1).sum() / (labels[0] >= 0).sum()
    assert found["whole_picture"] == pytest.approx(expected.item())
    cover = F.avg_pool2d((labels == 1).float(), 4).flatten(1)      # (2, 64)
    perfect = F.normalize(torch.stack([cover, 1 - cover], 2), dim=2)
    monkeypatch.setattr(analysis, "unit", lambda *given: perfect)
    found = analysis.heat_numbers(m, args, None)             # control
    assert found["order"] > 0.95 and found["best"] > found["whole_picture"] + 0.3


def test_what_covers_no_half_of_a_patch_gets_no_prompt(monkeypatch):
    m, args = model(img_size=224, patch_size=16), settings("--image", "1")
    labels, x = torch.zeros(2, 224, 224, dtype=torch.long), torch.zeros(2, 3, 224, 224)
    labels[:, 97:103, 97:103] = 1                            # between the centres of patches
    labels[1, 160:192, 160:165] = 2                          # covers a third of its patches
    labels[1, 32:41, 32:48] = 3                              # and more than half of one
    labels[1, 64:77, 64:74] = 4                              # as does this, a little smaller
    monkeypatch.setattr(analysis, "batches", lambda *_, **__: [(x, torch.arange(2), labels)])
    monkeypatch.setattr(analysis, "unit", lambda *given: torch.eye(196).expand(2, 196, 196))
    found = analysis.heat_numbers(m, args, None)
    assert (found["prompts"], found["skipped"]) == (2, 3)
    [image, heat] = found["show"][0].tiles
    assert image.star == (40, 40) and (image.outlines[0][0] == (labels[1] == 3)).all()
    assert heat.image.flatten().argmax() == 2 * 14 + 2
    args.image = 0                                           # the first has none: the second it is
    assert analysis.heat_numbers(m, args, None)["show"][0].tiles[0].star == (40, 40)
    labels[1] = 0
    with pytest.raises(analysis.Missing, match="no object"):
        analysis.heat_numbers(m, args, None)


def test_without_class_maps_no_more_is_encoded_than_is_shown(monkeypatch):
    seen, args = [], settings("--data", "synthetic", "--batch-size", "2")
    monkeypatch.setattr(analysis, "unit", lambda m, args, x: (
        seen.append(len(x)), torch.eye(64).expand(2, 64, 64))[1])
    [shown] = analysis.heat_numbers(model(), args, None)["show"]
    assert seen == [2, 2] and len(shown.tiles) == 8          # four images and their maps


def test_sets_without_a_background_start_at_class_one(monkeypatch):
    items = [SimpleNamespace(image=torch.zeros(3, 36, 36, dtype=torch.uint8),
                             labels=torch.tensor([[0, 255]] * 2, dtype=torch.uint8)
                             .repeat_interleave(18, 0).repeat_interleave(18, 1))]
    monkeypatch.setattr(annotations, "segmentation", lambda *given: iter(items))
    [(*_, labels)] = analysis.annotated(model(), settings("--data", "cityscapes"), 1)
    assert labels.unique().tolist() == [-1, 1]


def test_a_set_without_class_maps_is_told_which_have_some():
    assert "choose --data toy or" in analysis.no_maps("cifar10", None)
    assert analysis.no_maps("toy", None) is None


def test_tsne_shows_three_classes_of_all_that_there_are(tmp_path, monkeypatch):
    """Of 1500 files an evenly spread 1000 would leave four of a class's six."""
    m, args = model(), settings("--data", str(tmp_path))
    for c in range(250):
        (tmp_path / f"val/{c:03}").mkdir(parents=True)
        for i in range(6 if c > 1 else 5):
            (tmp_path / f"val/{c:03}/{i}.png").touch()
    (tmp_path / "train/000").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(datasets, "read_image", lambda path: (
        asked.append(path), Image.new("RGB", (40, 40), (9 * int(path[-7:-6]), 0, 0)))[1])
    monkeypatch.setattr(analysis.d, "tsne", lambda z, **_: z[:, :2])
    found = analysis.tsne_numbers(m, args, None)
    assert [path[-9:] for path in asked] == [
        f"{c:03}/{i}.png" for c in (2, 3, 4) for i in range(6)]          # and no other is opened
    assert found["label"].tolist() == [c for c in (2, 3, 4) for _ in range(6 * 64)]
    assert found["purity_class"] > 0.9                       # a colour for each class
    for c in range(4, 250):
        (tmp_path / f"val/{c:03}/0.png").unlink()
    analysis.evaluate.load.cache_clear()
    with pytest.raises(analysis.Missing, match="3 classes with 6 test images"):
        analysis.tsne_numbers(m, args, None)


# ---- the command line ----------------------------------------------------------------------------


def report(tmp_path, *flags):
    save_mae(tmp_path / "out/mae-toy")
    analysis.main(["--out", str(tmp_path / "out"), "--limit", "8", "--workers", "0",
                   "--device", "cpu", *flags])
    return tmp_path / "out/analysis"


def test_pictures_from_beyond_the_limit_and_from_beyond_the_set(tmp_path):
    what = "kmeans patch_retrieval prompt_heatmap nmi".split()
    m, args = model(), settings("--limit", "4", "--image", "4", "--what", *what)
    found, missed = analysis.analyse(m, args)                # toy has more than it is asked for
    assert not missed and found["patch_retrieval"]["queries"] == [49 * i + 24 for i in (4, 5, 6)]
    (tmp_path / "train").mkdir(), (tmp_path / "val").mkdir()
    for i in range(5):
        Image.new("RGB", (40, 40), (50 * i, 0, 0)).save(tmp_path / f"val/{i}.png")
    args.data = str(tmp_path)
    found, missed = analysis.analyse(m, args)
    assert not missed and found["patch_retrieval"]["queries"] == [4 * 49 + 24]
    args.image = 100
    found, missed = analysis.analyse(m, args)
    assert set(found) == {"nmi"} and set(missed) == {*what} - {"nmi"}
    assert all(why.startswith("--image 100: the data set ends before") for why in missed.values())


def test_report_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = report(tmp_path, "--what", "nmi", "fourier", "layerwise", "--baseline", "untrained")
    out = capsys.readouterr().out
    assert "pip install matplotlib" in out and "--task layerwise" in out
    assert {f.name for f in folder.iterdir()} == {
        "nmi.json", "nmi.csv", "fourier.json", "fourier.csv", "index.html"}
    whole = json.loads((folder / "nmi.json").read_text())
    found, path = whole["models"], str(tmp_path / "out/mae-toy/encoder.pt")
    assert [m["model"] for m in found] == ["mae-toy", "untrained"]
    assert (found[0]["checkpoint"], found[0]["step"], found[0]["size"]) == (path, 3, 32)
    assert (whole["what"], whole["data"], whole["settings"]["limit"]) == ("nmi", "toy", "8")
    with open(folder / "nmi.csv") as file:
        rows = [r for r in csv.DictReader(file) if r["quantity"] == "nmi"
                and r["model"] == "mae-toy"]
    assert [float(r["value"]) for r in rows] == found[0]["numbers"]["nmi"]
    nested = list(analysis.flat({"a": [[1, 2], [3]], "b": {"c": 4}}))
    assert nested == [["a", 0, 0, "", "", 1], ["a", 0, 1, "", "", 2], ["a", 1, 0, "", "", 3],
                      ["b", "c", "", "", "", 4]]
    assert (folder / "index.html").read_text().count("<h2") == 2


def test_what_is_no_number_is_null_in_json():
    numbers = dict(x=torch.tensor([1, math.nan, -math.inf]), y=(math.nan, 2), show="tiles")
    assert analysis.plain(numbers) == dict(x=[1, None, None], y=[None, 2])


def test_unknown_diagnostic_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean fourier"):
        analysis.parse(["--what", "furier"])
    assert analysis.parse(["--what", "all"]).what == list(analysis.WHAT) == list(figures.FIGURES)
    assert analysis.parse([]).what == analysis.STANDARD
    with pytest.raises(ValueError, match="--copies 1"):      # said before anything is computed
        analysis.parse(["--copies", "1"])


def test_a_curve_of_two_widths_is_labelled_with_both():
    def label(draw, *numbers):
        said, m = {}, SimpleNamespace(name="tiny")
        draw(SimpleNamespace(plot=lambda *given, **look: None, set=said.update), [
            SimpleNamespace(model=m, numbers=n, **figures.style(0)) for n in numbers])
        return said["ylabel"]

    curve = figures.curve("x", "y", "across", "rank {ranks[0]}")
    own, other = (dict(x=[1], y=[1], ranks=[rank]) for rank in (32, 64))
    assert label(curve, own, other) == "rank 32 /\nrank 64" and label(curve, own, own) == "rank 32"


@pytest.mark.parametrize("labels", [3, 18])                # classes, images
def test_islands_have_a_colour_each(labels):
    pytest.importorskip("matplotlib")
    colours, label = [], torch.arange(labels).repeat(2)
    ax = SimpleNamespace(scatter=lambda *_, color, **__: colours.append(color),
                         set=lambda **_: None)
    figures.islands(ax, [SimpleNamespace(numbers=dict(
        label=label, position=torch.zeros(len(label), 2), purity_image=1))])
    assert len(set(colours)) == len(colours) == labels


def test_recorded_numbers_are_drawn_from_results(tmp_path):
    m, _ = save_mae(tmp_path / "mae")
    args = settings("--limit", "2")
    own = dict(data="toy", checkpoint=m.source.path, branch="base", step=1, settings={})
    tune, layers = dict(own, task="finetune"), dict(own, task="layerwise")
    other = {"block 1 pat": {"top-1": 99.0}}                 # of other data, weights, steps
    lines = [dict(layers, metrics={"block 2 pat": {"top-1": 7.0}, "block 1 pat": {"top-1": 5.0}}),
             dict(layers, metrics=other, data="cifar10"), dict(layers, metrics=other, step=2),
             dict(layers, metrics=other, branch="teacher"),
             dict(tune, metrics={"pat": {"top-1": 60.0}}, settings={"reinit": None}),
             dict(tune, metrics={"pat": {"top-1": 40.0}}, settings={"reinit": "last:2"}),
             dict(own, task="frequency_noise",
                  metrics={"cls": {"clean": 50.0, "0.1 pi": 3.0, "1 pi": 8.0}}),
             dict(own, task="knn", metrics={"cls": {"k=10": 30.0, "k=20": 20.0}},
                  checkpoint=None),                          # a baseline, measured beside it
             dict(own, task="shape_bias", metrics={"cls": {"shape bias": 60.0, "either": 50.0,
                                                           "cat": 70.0}})]
    (tmp_path / "mae/results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = analysis.layerwise_numbers(m, args, None)
    assert (found["block"], found["top1"]) == ([1, 2], [5.0, 7.0])
    found = analysis.noise_numbers(m, args, None)
    assert (found["frequency"], found["change"]) == ([0.1, 1.0], [-3.0, -8.0])
    assert analysis.bias_numbers(m, args, None)["bars"] == {"shape bias": 60.0, "cat": 70.0}
    tuned = analysis.reinit_numbers(m, args, None)
    assert tuned["last_change"] == [0, -20] and tuned["first_change"] == [0]
    for more in (dict(epochs=50), dict(epochs=50, reinit="first:1")):    # other runs, not to mix
        lines += [dict(tune, metrics={"pat": {"top-1": 90.0}}, settings=dict(reinit=None) | more)]
        (tmp_path / "mae/results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        if "reinit" not in more:
            with pytest.raises(analysis.Missing, match="settings of the latest"):
                analysis.reinit_numbers(m, args, None)
    tuned = analysis.reinit_numbers(m, args, None)
    assert tuned["last_change"] == [0] and tuned["first_change"] == [0, 0]
    with pytest.raises(analysis.Missing, match="--task knn"):
        analysis.knn_numbers(m, args, None)
    lines[7]["checkpoint"] = m.source.path
    (tmp_path / "mae/results.jsonl").write_text(json.dumps(lines[7]) + "\n")
    assert analysis.knn_numbers(m, args, None)["bars"] == {"cls": 30}        # of the smallest k
    m.source.path = str(tmp_path / "mae/other.pt")           # control: another checkpoint's numbers
    with pytest.raises(analysis.Missing, match="--task layerwise"):
        analysis.layerwise_numbers(m, args, None)


def test_models_that_were_not_measured_alike_get_a_note(tmp_path, capsys):
    flags = []
    for name, top1, limit, k in (("a", 30.0, None, [10]), ("b", 40.0, 2000, [10])):
        m, _ = save_mae(tmp_path / name)
        flags.append(str(tmp_path / name))
        (tmp_path / name / "results.jsonl").write_text(json.dumps(dict(
            task="knn", data="toy", checkpoint=m.source.path, branch="base", step=3,
            metrics={"cls": {"k=10": top1}}, settings=dict(limit=limit, k=k, device="cpu"))) + "\n")
    args = ["--out", str(tmp_path), "--device", "cpu", "--what", "knn", "--checkpoint"]
    analysis.main([*args, *flags])
    note = "knn: not measured alike: --limit None (a), 2000 (b)\n"
    assert f"note: {note}" in capsys.readouterr().out
    page = (tmp_path / "analysis/index.html").read_text()
    assert f"note: {note.strip()}</p>" in page
    analysis.main([*args, *flags[:1]])
    assert "alike" not in capsys.readouterr().out            # control


@pytest.mark.slow
def test_pictures_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    what = ("decoder token_transform sv_tokens intra_inter attention_maps patch_retrieval "
            "layer_reconstruction").split()
    folder = report(tmp_path, "--baseline", "untrained", "--what", *what)
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in what)
    assert (folder / "index.html").read_text().count("<img") == len(what)
