"""What analysis.py makes of the shared pass: which layer, which divisor, which part of an image."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_analysis import model, settings

import analysis
from diagnostics import formulas as d


def passed(**means):
    means = {name: torch.tensor(x).double() for name, x in means.items()}
    return SimpleNamespace(means=means, decoder=None, grid=(8, 8), images=2)


def test_curves_are_of_the_layers_they_name():
    m, args, heads = model(), settings(), [[0, 4], [8, 8], [4, 8]]                   # (L, H)
    found = analysis.distance_numbers(m, args, passed(attention_distance=heads))
    assert found["pixels"].tolist() == [2, 8, 6] and found["patches"].tolist() == [0.5, 2, 1.5]
    assert found["uniform"] == pytest.approx(16.5459, rel=1e-5)
    found = analysis.nmi_numbers(m, args, passed(nmi=[[0, 0], [0, 1], [1, 1]], class_mass=heads))
    assert found["nmi"].tolist() == [0, 0.5, 1] and found["spread"].tolist() == [0, 0.5, 0]
    assert found["density_at"][found["density"].argmax()] == pytest.approx(1, abs=0.01)  # block 3
    assert found["density_of"].tolist() == [1, 1] and found["class_mass"].tolist() == [2, 8, 6]
    states = [[i, i, 3 * i] for i in range(7)]               # z_0, u_1, z_1, ... z_3
    found = analysis.fourier_numbers(m, args, passed(fourier=states))
    assert found["highest"].tolist() == [0, 4, 8, 12]
    found = analysis.token_numbers(m, args, passed(token_similarity=range(7)))
    assert found["after_attention"].tolist() == [1, 3, 5]
    assert found["after_block"].tolist() == [0, 2, 4, 6]
    states = [[9 + i, -i, -2 * i, -4 * i, -5 * i, -6 * i] for i in range(7)]
    found = analysis.sv_tokens_numbers(m, args, passed(sv_tokens=states))
    assert found["ranks"] == [2, 4] and d.ranks(128) == (42, 85) and d.ranks(129) == (64, 128)
    assert found["at_first"].tolist() == [0] * 4             # the second is what is taken off
    assert found["at_second"].tolist() == [0, -6, -12, -18]
    assert found["log_second_value"].tolist() == [0, -2, -4, -6]
    found = analysis.unison_numbers(m, args, passed(unison=[[0.25, 4]] * 3))
    assert found["common"].tolist() == [0.25] * 3 and found["spread_ratio"].tolist() == [4] * 3


@torch.no_grad()
def test_precision_is_that_of_the_blocks_not_of_what_is_measured():
    m = model()
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        tokens, _ = m.encoder.embed(torch.ones(1, 3, 32, 32))
        c = next(analysis.walk(settings("--precision", name), m.encoder.blocks, tokens, 1))
        assert c.heads.dtype == kind and c.out.dtype == torch.float32


def test_curves_go_on_through_the_decoder():
    def curves(blocks, slope, nmi):
        return passed(fourier=[[i, (slope + 1) * i] for i in range(2 * blocks + 1)],
                      nmi=[[0, nmi]] * blocks, attention_distance=[[nmi, 2 * nmi]] * blocks)
    both = curves(3, 1, 1)
    both.decoder = curves(2, 3, 4).means
    found = analysis.decoder_numbers(model(), settings(), both)
    assert found["depth"] == [0, 1, 2, 3] and found["decoder_depth"] == [3, 4, 5]
    assert found["block"] == [1, 2, 3] and found["decoder_block"] == [4, 5]
    assert found["highest"].tolist() == [0, 2, 4, 6]
    assert found["decoder_highest"].tolist() == [0, 6, 12]
    assert found["nmi"].tolist() == [0.5] * 3 and found["decoder_nmi"].tolist() == [2, 2]
    assert found["pixels"].tolist() == [1.5] * 3 and found["decoder_pixels"].tolist() == [6, 6]


def test_counts_and_pairs_are_brought_to_means():
    m, args, share = model(), settings(), [[0.5, 0, 0, 0, 0.5, 0, 0, 0, 0]]
    found = analysis.adjacent_numbers(m, args, passed(adjacent=share, adjacent_depth=range(7)))
    assert found["features_mean"] == 2 and found["features_std"] == 2
    pairs = torch.zeros(1, 2, 201)                           # means of two images
    pairs[0, 0, 150], pairs[0, 0, -1], pairs[0, 1, 100], pairs[0, 1, -1] = 10, 5, 20, 2
    found = analysis.pair_numbers(m, args, passed(pairs=pairs.tolist()))
    assert (found["intra"], found["inter"], found["pairs"]) == (0.5, pytest.approx(0.1), [20, 40])
    assert (0.01 * found["densities"].sum(1)).tolist() == pytest.approx([1, 1])      # areas


@torch.no_grad()
def test_spectrum_over_images_is_of_mean_patches():
    m, args = model(), settings("--limit", "40")
    [(x, *_)] = analysis.batches(m, args, 40)
    z = m.encoder.split(m.encoder.layers(x, [1], norm=False)[0][0])[1].mean(1).double()
    expected = d.delta(torch.linalg.eigvalsh(z.T.cov()).flip(0).log())
    found = analysis.sv_images_numbers(m, args, None)["delta"]
    assert torch.allclose(found[2], expected, atol=1e-3)


@torch.no_grad()
def test_pictures_show_what_their_titles_say():
    m, args = model(), settings("--limit", "6")
    x = analysis.few(m, args, 6)
    z = F.normalize(m.encoder.split(m.encoder(x))[1], dim=-1)
    segments = analysis.kmeans_numbers(m, args, None)["segments"]
    assert torch.equal(segments[0].flatten(), d.kmeans(z[0], seed=0)[0])
    colours = torch.tensor(analysis.pca_numbers(m, args, None)["show"][1].tiles[0].image)
    high = z[0].double() @ d.principal(z.flatten(0, 1).double())[0].T                # (N, 3)
    for pair in zip(colours.flatten(0, 1).T, high.T):        # the higher, the more of its colour
        assert torch.corrcoef(torch.stack(pair))[0, 1] > 0.9
    tiles = {t.title: t.image for t in analysis.view_numbers(m, args, None)["show"][0].tiles}
    for name, share in (("hidden, 75 %", 0.75), ("visible, 25 %", 0.25), ("75 % noise", 0.25)):
        same = (tiles[name] == tiles["image"]).all(-1).mean()
        assert same == pytest.approx(share, abs=0.02), name


@torch.no_grad()
def test_retrieved_crops_are_the_nearest_of_other_images():
    m, args = model(), settings("--limit", "6")
    found = analysis.retrieval_numbers(m, args, None)
    assert found["queries"] == [24, 49 + 24, 98 + 24]        # the middle of the first three
    crops = m.encoder.split(m.encoder(d.windows(analysis.few(m, args, 6))))[1].mean(1)
    owner = torch.arange(6 * 49) // 49
    for q, at, s in zip(*(found[key] for key in ("queries", "encoded_crop", "encoded_similarity"))):
        cosine = F.cosine_similarity(crops[q], crops)
        assert (owner[at] != owner[q]).all() and torch.allclose(s, cosine[at], atol=2e-3)
        assert s[0] == pytest.approx(cosine[owner != owner[q]].max().item(), abs=2e-3)


@torch.no_grad()
def test_tsne_is_of_the_last_block_before_the_norm(monkeypatch):
    m, args, asked = model(), settings(), []
    layers = m.encoder.layers
    monkeypatch.setattr(d, "tsne", lambda z, **_: z[:, :2])
    monkeypatch.setattr(m.encoder, "layers", lambda x, *given, **how: (
        asked.append((given, how)), layers(x, *given, **how))[1])
    found = analysis.tsne_numbers(m, args, None)
    assert asked == [(([2],), dict(norm=False))] and found["position"].shape == (18 * 64, 2)


def test_painting_is_scored_where_it_was_hidden_and_in_colours_of_0_to_1(monkeypatch):
    m, args = model(), settings("--limit", "1")
    hidden = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hidden[..., :8] = True
    monkeypatch.setattr(analysis, "painter", lambda m, x, seed: (
        hidden, x, lambda b: x - (b + 1) ** 2 * hidden))     # 1, 4, 9 too dark where hidden
    found = analysis.recon_numbers(m, args, None)
    shade = sum(m.std) / 3
    assert found["error_where_hidden"].tolist() == pytest.approx([shade, 4 * shade, 9 * shade])
    assert found["change"].tolist() == pytest.approx([3 * shade / 4, 5 * shade / 4])


def test_views_are_crops_of_the_image_and_the_image_half_hidden(monkeypatch):
    m, args, seen = model(), settings("--limit", "1", "--copies", "6"), []
    monkeypatch.setattr(m.encoder, "layers", lambda x, *_, **__: (
        seen.append(x), ([torch.zeros(len(x), 65, 24)], {}))[1])
    analysis.variance_numbers(m, args, None)
    [(x, *_)] = analysis.batches(m, args, 1)
    crops, hidden = seen
    assert (hidden == x).all(1).float().mean((1, 2)).tolist() == [0.5] * 6
    assert not torch.equal(hidden[0] == x[0], hidden[1] == x[0])         # not the same half
    assert all((crop != other).any() for crop, other in zip(crops, crops[1:]))
    spread, whole = crops.std((2, 3)).mean(), x.std((2, 3)).mean()
    assert spread > 0.6 * whole                              # much of it, not a speck


def test_variance_is_of_all_that_are_asked_for_and_says_of_what():
    args = settings("--limit", "66", "--copies", "2")
    for m, of in ((model(), "class token"), (model(class_token=False), "patch mean")):
        found = analysis.variance_numbers(m, args, None)
        assert found["images"] == 66 and list(found["bars"])[0] == f"{of}, crops"


def test_accuracy_is_set_against_the_last_tokens(monkeypatch):
    line = dict(metrics={"cls": {"top-1": 40.0}}, how={"limit": None})
    monkeypatch.setattr(analysis, "recorded", lambda *_: [line])
    found = analysis.accuracy_numbers(model(), settings(), passed(final_similarity=[0.25]))
    assert found["linear"] == [40.0] and found["similarity"].tolist() == [0.25]
