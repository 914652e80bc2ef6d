"""Diagnostics against closed forms, each with a control."""
import math

import pytest
import torch
import torch.nn.functional as F

from diagnostics import formulas as d


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(n):
    return torch.full((n, n), 1 / n)


def window(g):
    """Clipped 3 x 3 window on a g x g grid, rows of sum 1."""
    row, col = d.coordinates((g, g))
    a = ((row[:, None] - row).abs() <= 1) & ((col[:, None] - col).abs() <= 1)
    return a / a.sum(1, keepdim=True)


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("g, p, pixels", [(14, 16, 116.4922), (8, 4, 16.5459), (7, 32, 115.5029),
                                          (2, 1, 0.853553)])
def test_distance_of_uniform_attention_includes_self_pairs(g, p, pixels):
    between = d.spacing((g, g), p)
    assert d.attention_distance(uniform(g * g), between) == pytest.approx(pixels, rel=1e-5)
    assert d.attention_distance(torch.eye(g * g), between) == 0
    n = g * g                                                # control: over distinct pairs only
    assert between.sum() / (n * (n - 1)) != pytest.approx(pixels, rel=1e-3)


def test_distance_of_a_window():
    found = d.attention_distance(window(14), d.spacing((14, 14), 16))
    assert found == pytest.approx(16.6981, rel=1e-5)


def test_nmi_of_closed_forms():
    N = 196
    rows = torch.rand(N, generator=torch.Generator().manual_seed(0)).expand(N, N)
    one = torch.zeros(N, N).index_fill_(1, torch.tensor([3]), 1.0)
    groups = torch.block_diag(*[uniform(14)] * 14)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    half = 0.5 * torch.eye(N) + 0.5 * uniform(N)

    def nmi(a):
        return d.nmi(d.rows(a, 0, 1e-8)).item()

    assert nmi(uniform(N)) == pytest.approx(0, abs=1e-6)
    assert nmi(rows / rows.sum(1, keepdim=True)) == pytest.approx(0, abs=1e-6)
    assert nmi(torch.eye(N)) == pytest.approx(0.9999928, abs=2e-6)
    assert nmi(torch.eye(N)[order]) >= 0.99998               # dependence, not locality
    assert nmi(groups) == pytest.approx(0.5, abs=1e-5)
    assert nmi(half) == pytest.approx(0.371711, abs=1e-5)
    assert nmi(window(14)) == pytest.approx(0.604605, abs=1e-5)
    assert nmi(one) == 0                                     # 0/0 without the guard


def test_class_token_takes_mass_before_rows_are_renormalised():
    attention = torch.zeros(1, 1, 197, 197)
    attention[0, 0, 1:, 1:] = 1e-6 * torch.eye(196)
    attention[..., 0] = 1 - 1e-6
    assert d.class_mass(attention, 1).item() == pytest.approx(1, abs=1e-5)
    assert d.nmi(d.rows(attention, 1, 1e-8)) == pytest.approx(0.220, abs=1e-3)
    assert d.nmi(d.rows(attention, 1, 1e-20)) > 0.999       # control: no such epsilon
    attention[:] = 0.8 / 196
    attention[..., 0], attention[0, 0, 0] = 0.2, F.one_hot(torch.tensor(0), 197)
    assert d.class_mass(attention, 1).item() == pytest.approx(0.2)   # of patches, not of itself


def test_kde_has_scotts_width():
    found = d.kde(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 5.0]))
    assert found[0] == pytest.approx(0.465980, abs=1e-6) and found[1] < 1e-6


def test_mass_keeps_the_largest_weights_and_all_that_is_positive():
    assert abs(int(d.keep_mass(torch.ones(196), 0.5).sum()) - 98) <= 1
    weights = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0, 1, 2, 0]])
    for mass, kept in ((0.6, [[0, 1, 0, 1], [0, 0, 1, 0]]), (1.0, [[1] * 4, [0, 1, 1, 0]])):
        assert d.keep_mass(weights, mass).tolist() == kept


# ---- similarities --------------------------------------------------------------------------------


def test_similarity_of_heads():
    v, e = draw(2, 5, 8), torch.eye(4).double()
    same = v[:, None].expand(2, 3, 5, 8)
    assert d.head_similarity(same).tolist() == pytest.approx([1, 1])
    assert d.head_similarity(e[None, :, None].expand(1, 4, 5, 4)).item() == pytest.approx(0)
    assert d.head_similarity(torch.stack([v, -v], 1)).tolist() == pytest.approx([-1, -1])
    assert d.head_similarity(v[:, None]).isnan().all()


def test_similarity_before_and_after():
    z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert d.depth_similarity(z, z).item() == 1
    assert d.depth_similarity(z, -z).item() == -1
    turned = torch.stack([-z[..., 1], z[..., 0]], -1)
    assert d.depth_similarity(z, z + turned).item() == pytest.approx(1 / math.sqrt(2))


def test_similarity_of_tokens_leaves_self_pairs_out():
    N, v = 196, draw(24)
    halves = torch.cat([torch.eye(2)[:1].expand(98, 2), torch.eye(2)[1:].expand(98, 2)])[None]

    def similarity(z):
        return d.token_similarity(z).item()

    assert similarity(v.expand(1, N, 24)) == pytest.approx(1)
    assert similarity(torch.eye(N)[None]) == pytest.approx(0)
    opposite = torch.cat([v.expand(1, 98, 24), -v.expand(1, 98, 24)], 1)
    assert similarity(opposite) == pytest.approx(-1 / 195)
    assert similarity(halves) == pytest.approx(0.497436, abs=1e-6)        # self pairs in: 0.5
    assert abs(similarity(draw(1, N, 400))) < 0.01


def test_unison_tells_translation_from_scatter():
    z = draw(1, 196, 32)
    z = z - z.mean(1, keepdim=True)
    same = d.unison(z, z + draw(32, seed=1))[0]
    assert same.tolist() == pytest.approx([1, 1])
    assert d.unison(z, 2 * z)[0].tolist() == pytest.approx([0, 4], abs=1e-9)
    scattered = d.unison(z, z + draw(1, 196, 32, seed=2))[0, 0].item()
    assert scattered == pytest.approx(1 / 196, rel=0.5)


def test_common_basis_shows_a_translation():
    z, step = 0.1 * draw(2, 49, 16), draw(16, seed=1)
    before, after = d.principal_plane(z, z + step)
    assert (after - before).norm(dim=-1).std() < 0.2 * (after - before).norm(dim=-1).mean()
    alone = d.principal_plane(z, z)                   # control
    assert torch.equal(alone[0], alone[1])
    axes, _ = d.principal(draw(20, 6))
    assert all(v[v.abs().argmax()] > 0 for v in axes)        # else the sign is arbitrary
    assert torch.allclose(d.principal(-draw(20, 6))[0], axes)
    shares = d.principal(with_covariance([9.0, 4, 1, 2]))[1]                 # of the variance
    assert shares.tolist() == pytest.approx([9 / 16, 4 / 16, 2 / 16])


# ---- spectra -------------------------------------------------------------------------------------


def with_covariance(values, n=50, seed=0):
    """(n, C) whose sample covariance is exactly diag(values), in a turned basis."""
    C = len(values)
    x = draw(n, C, seed=seed)
    u = torch.linalg.qr(x - x.mean(0))[0]                    # orthonormal columns of mean 0
    turn = torch.linalg.qr(draw(C, C, seed=1))[0]
    return u * (torch.tensor(values).double() * (n - 1)).sqrt() @ turn


def test_spectrum_of_tokens_is_that_of_the_covariance():
    z = with_covariance([100.0, 10, 1, 0.1])[None]
    spectrum = d.log_spectrum(z)[0]
    found = d.delta(spectrum).tolist()
    assert found == pytest.approx([2.302585, 0, -2.302585, -4.605170], abs=1e-6)
    assert d.delta(spectrum / 2).tolist() != pytest.approx(found, abs=0.1)  # of the data
    assert torch.allclose(d.log_spectrum(3 * z + 7)[0], spectrum + 2 * math.log(3))
    wide = draw(1, 10, 40)                                   # by way of the Gram matrix
    c = wide[0] - wide[0].mean(0)
    covariance = torch.linalg.eigvalsh(c.T @ c / 9).flip(0)[:9].log()
    assert torch.allclose(d.log_spectrum(wide)[0], covariance, rtol=1e-9)
    assert d.log_spectrum(torch.ones(1, 5, 3)).isfinite().all()


def test_spectrum_over_images_does_not_depend_on_batches():
    x = with_covariance([100.0, 10, 1, 0.1], n=64) + 1000
    found = []
    for size in (64, 10, 1):
        scatter = d.Scatter()
        for part in x.split(size):
            scatter.add(part)
        found.append(scatter.log_spectrum())
    expected = [2.302585, 0, -2.302585, -4.605170]
    assert d.delta(found[0]).tolist() == pytest.approx(expected, abs=1e-6)
    assert all(torch.allclose(found[0], other, atol=1e-8) for other in found[1:])
    naive = (x.float().T @ x.float() / 64 - x.float().mean(0)[:, None] * x.float().mean(0))
    assert not torch.allclose(torch.linalg.eigvalsh(naive).flip(0).clamp(min=1e-9).log().double(),
                              found[0], atol=0.1)            # control: what streaming can do wrong


def test_images_on_a_line_have_one_singular_value():
    few, scatter = d.Scatter(), d.Scatter()
    few.add(draw(3, 5))
    assert few.log_spectrum().shape == (2,)      # three images span a plane, no more
    scatter.add(torch.arange(9.0)[:, None] * torch.tensor([3.0, 4, 0]))
    values = scatter.log_spectrum()              # variance of 0 ... 8 is 7.5, of the line 25 times
    assert values[0].item() == pytest.approx(math.log(25 * 7.5))
    assert values[1:].tolist() == pytest.approx([values[0].item() + math.log(1e-12)] * 2)


def maps(x, g=14):
    """Change of log amplitude from frequency 0 of (B, N, C)."""
    a = d.fourier(x, (g, g)).mean(0)
    return a - a[0]


def test_fourier_closed_forms():
    row, col = d.coordinates((14, 14))
    impulse = F.one_hot(torch.tensor([37]), 196).double()[:, :, None]
    assert maps(impulse).abs().max() < 1e-5
    assert maps(torch.ones(1, 196, 1))[1:].tolist() == pytest.approx([-19.093625] * 6, abs=1e-3)
    wave = (1 + (2 * math.pi * 6 * (row + col) / 14).double().cos())[None, :, None]
    assert maps(wave)[6].item() == pytest.approx(-math.log(2), abs=1e-6)
    assert maps(wave)[1:6].max() < -15
    board = (1.0 - 2 * ((row + col) % 2)).double()[None, :, None]
    assert maps(board).abs().max() < 1e-4                    # all of it at Nyquist: not looked at


def test_fourier_of_white_noise_is_not_flat():
    noise = draw(8, 196, 5000).float()
    assert maps(noise)[1:].tolist() == pytest.approx([0.5 * math.log(2)] * 6, abs=0.02)
    smooth = F.avg_pool2d(F.pad(noise.mT.unflatten(2, (14, 14)), (1, 1, 1, 1), mode="circular"), 3,
                          1)
    expected = [0.20997, -0.23148, -1.11437, -3.02838, -4.64755, -2.29210]
    assert maps(smooth.flatten(2).mT)[1:].tolist() == pytest.approx(expected, abs=0.025)


def test_highest_frequency_is_not_nyquist():
    assert d.frequencies((14, 14))[-1] == pytest.approx(6 / 7)
    assert d.frequencies((8, 8))[-1] == 0.75 and len(d.frequencies((7, 7))) == 4
    x = draw(1, 64, 3)
    full = torch.fft.fft2(x.mT.unflatten(2, (8, 8))).abs()
    expected = torch.stack([(full[..., k, k] + 1e-6).log().mean(1) for k in range(4)], 1)
    assert torch.allclose(d.fourier(x, (8, 8)), expected)


# ---- patches -------------------------------------------------------------------------------------


def test_adjacent_counts():
    one, left = torch.ones(1, 196, 3), (d.coordinates((14, 14))[1] < 7)[None, :, None]

    def mean(z, g=14, **how):
        return d.adjacent(z, (g, g), **how).mean().item()

    assert mean(one, wrap=True) == 8
    assert mean(one) == pytest.approx(1404 / 196) and mean(one[:, :64], 8) == 6.5625
    assert mean(torch.eye(196)[None]) == 0
    assert mean(torch.cat([left, ~left], 2).float()) == pytest.approx(1324 / 196)


def test_label_vectors_of_patches():
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, :, 2:] = 1
    labels[0, 0, 0] = 1
    shares = d.label_shares(labels, 2, 2)
    assert shares[0].tolist() == [[0.75, 0.25], [0, 1], [1, 0], [0, 1]]
    assert d.majority(shares).tolist() == [[0, 1, 0, 1]]
    unknown = d.label_shares(torch.full((1, 2, 4), -1), 2, 2)
    assert unknown.sum() == 0 and d.majority(unknown).tolist() == [[-1, -1]]
    halves = torch.tensor([[[0.5, 0.25], [0.45, 0.4]]])
    assert d.majority(halves).tolist() == [[0, -1]]
    count = d.adjacent(shares, (2, 2))[0]                # of 0.75, 0.25 with 1, 0: cosine 0.949
    assert count.tolist() == [0, 1, 0, 1]


def test_overlap_and_pairs():
    z = torch.eye(2)[torch.tensor([0, 0, 0, 1, 1, 1])]
    pairs = d.pair_histogram(z, torch.tensor([1, 1, 1, 2, 2, 2]))
    assert pairs[:, :-1].sum(1).tolist() == [6, 9] and pairs[:, -1].tolist() == [6, 0]
    assert pairs[0, 199] == 6 and pairs[1, 100] == 9         # bins of cosines 1 and 0
    assert d.overlap(*pairs[:, :-1]) == 0
    ground = d.pair_histogram(z, torch.tensor([0, 0, 0, 2, -1, 2]))
    assert ground[:, :-1].sum(1).tolist() == [1, 6]          # no pair within the background
    x = torch.linspace(-1, 1, 200).double()
    for apart, expected in ((0, 1.0), (1, 0.617075), (2, 0.317311), (4, 0.045500)):
        p, q = ((-0.5 * ((x - s * apart * 0.05) / 0.1) ** 2).exp() for s in (-1, 1))
        assert d.overlap(p, q).item() == pytest.approx(expected, abs=2e-3)
    few = draw(2, 500).mul(0.1).clamp(-1, 1)
    p, q = (torch.histc(side, 200, -1, 1) for side in few)
    assert d.overlap(p, q) < 0.9                             # too small, as pairs are few
    flat = (x > -1) & (x < 0), (x > -0.5) & (x < 0.5)
    assert d.overlap(*(f.double() for f in flat)).item() == pytest.approx(0.5, abs=0.01)


def test_iou_of_closed_forms():
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[4:28, 12:32] = True
    assert d.iou(mask, mask) == 1 and d.iou(mask & False, mask) == 0
    assert d.iou(mask, torch.ones_like(mask)) == pytest.approx(mask.float().mean().item())


def test_order_needs_no_threshold():
    heat, inside = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1.0, 0, 1, 0])
    assert d.order(heat, inside, 1 - inside) == pytest.approx(3 / 4)     # 3 of 4 pairs
    assert d.order(heat / 9 + 0.5, inside, 1 - inside) == pytest.approx(3 / 4)
    assert d.order(torch.ones(4), inside, 1 - inside) == 0.5             # ties
    share = torch.tensor([0.5, 0.5])         # inside: half of both; pairs: 1/4 right, 1/2 ties
    assert d.order(torch.tensor([1.0, 0.0]), share, 1 - share) == pytest.approx(0.5)
    assert math.isnan(d.order(heat, torch.ones(4), torch.zeros(4)))


def test_kmeans_finds_three_regions():
    truth = torch.tensor([0] * 30 + [1] * 20 + [2] * 14)
    label, history = d.kmeans(torch.eye(3)[truth])
    assert torch.equal(label, truth)                         # by size
    assert all(a >= b - 1e-12 for a, b in zip(history, history[1:])) and history[-1] < 1e-12
    noisy, history = d.kmeans(draw(64, 5))
    assert all(a >= b - 1e-9 for a, b in zip(history, history[1:])) and len(noisy.unique()) == 3
    assert d.kmeans(draw(9, 2), k=1)[0].unique().tolist() == [0]


def test_kmeans_keeps_the_best_of_its_starts():
    """The corners of 1.5 x 1: cut across, 4 times 0.5^2 is left; along, where it stays too,
    4 times 0.75^2."""
    x = torch.tensor([[0, 0], [0, 1], [1.5, 0], [1.5, 1]])
    ends = [d.kmeans(x, 2, restarts=1, seed=seed)[1][-1] for seed in range(20)]
    assert min(ends) == pytest.approx(1) and max(ends) == pytest.approx(2.25)    # both are found
    for seed in [seed for seed, end in enumerate(ends) if end > 2][:3]:      # one does not do
        label, history = d.kmeans(x, 2, seed=seed)
        assert history[-1] == pytest.approx(1) and label[0] == label[1] != label[2] == label[3]


def test_windows_and_nearest():
    x = torch.arange(224.0).expand(1, 3, 224, 224)
    crops = d.windows(x)
    assert crops.shape == (49, 3, 224, 224)
    centre = crops[:, 0].mean((1, 2)).view(7, 7)         # of a picture whose value is the column
    assert torch.allclose(centre[0], 27.5 + 28 * torch.arange(7.0), atol=0.2)
    assert crops[48, 0, 0, 0].item() == pytest.approx(168 - 0.375, abs=0.3)
    bank = torch.cat([draw(10, 4), draw(10, 4)])             # everything twice
    at, s = d.nearest(bank, 3, 5)
    assert at[0] == 13 and s[0].item() == pytest.approx(1) and 3 not in at
    assert (s.diff() <= 1e-6).all()
    assert 13 not in d.nearest(bank, 3, 5, torch.arange(20) == 13)[0]


def test_variance_of_views():
    z = draw(4, 5, 3)
    assert d.variance(z[:1].expand(7, 5, 3))[0] == 0
    assert d.variance(draw(2000, 50))[0] == pytest.approx(1, abs=0.02)
    assert d.variance(z[:2])[0] == pytest.approx(((z[0] - z[1]) ** 2 / 2).mean().item())
    V = 8                                # orthonormal rows: summed variance by V is 1 - 1/V
    assert d.variance(torch.eye(V))[0] * V * (V - 1) / V == pytest.approx(1 - 1 / V)
    for scale in (1, 10):                # of 3 and 1: variance 2, mean square 5
        views = scale * torch.tensor([[3.0], [1.0]])
        assert d.variance(views) == pytest.approx((2 * scale**2, 2 / 5))


def affinities(x, perplexity):
    """Of t-SNE, in float64: the width of each row by bisection, from the entropy as it is."""
    n = len(x)
    p, squared = torch.zeros(n, n).double(), torch.cdist(x.double(), x.double()).square()
    for i in range(n):
        others, low, high = torch.arange(n) != i, 1e-6, 1e6
        for _ in range(100):
            beta = math.sqrt(low * high)
            row = (-beta * (squared[i, others] - squared[i, others].min())).softmax(0)
            entropy = torch.special.entr(row).sum()
            low, high = (beta, high) if entropy > math.log(perplexity) else (low, beta)
        p[i, others] = row
    return (p + p.T) / (2 * n)


@pytest.mark.parametrize("start, exaggeration, momentum", [(0, 12, 0.5), (250, 1, 0.8)])
def test_steps_of_tsne_follow_the_gradient_of_its_divergence(start, exaggeration, momentum):
    x = draw(60, 5).float()
    p = exaggeration * affinities(x, 5)

    def gradient(y):              # sum of p log(p / q), but for a constant; q: near over its sum
        y = y.double().requires_grad_()
        near = 1 / (1 + torch.pdist(y).square())                  # each pair once
        row, col = torch.triu_indices(60, 60, 1)
        loss = (2 * near.sum()).log() - 2 * (p[row, col] * near.log()).sum()
        return torch.autograd.grad(loss, y)[0]

    y0, y1, y2 = (d.tsne(x, perplexity=5, iterations=start + n) for n in range(3))
    first, second = gradient(y0), gradient(y1)
    speed = -50 * 0.8 * first                                     # gains fall from 1 to 0.8
    gain = torch.where(second * speed < 0, 0.8 + 0.2, 0.8 * 0.8)
    for moved, step in ((y1 - y0, speed), (y2 - y1, momentum * speed - 50 * gain * second)):
        step = step - step.mean(0)                                # what comes back is centred
        assert (moved - step).abs().max() < 1e-3 * step.abs().max()
    assert (gain == 1).any() and (gain < 1).any()


def test_tsne_keeps_islands():
    truth = torch.arange(3).repeat_interleave(20)
    x = 20 * torch.eye(3)[truth] + draw(60, 3).float()
    y = d.tsne(x, perplexity=5, iterations=400)
    assert torch.equal(y, d.tsne(x, perplexity=5, iterations=400)) and y.isfinite().all()
    start = d.tsne(x, perplexity=5, iterations=0)
    assert start.shape == y.shape == (60, 2) and 0.8e-4 < start.std() < 1.2e-4
    image = torch.arange(60) % 20
    assert d.purity(x, image, truth, 5)[1] == 1
    assert d.purity(x, truth, image, 5)[0] == 1                   # each island an image
    assert d.purity(y, image, truth, 5)[1] > 0.85
    assert d.purity(draw(60, 2), image, truth, 5)[1] < 0.6        # control
