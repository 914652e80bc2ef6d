"""Formulas of the diagnostics against closed forms, most with a control."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diagnostics_helpers import random
from PIL import Image

from diagnostics import formulas
from lib.positions import coordinates


def uniform(n):
    return torch.full((n, n), 1 / n)


def local_attention(g):
    """Uniform over the 3 x 3 neighborhood on a g x g grid, rows of sum 1."""
    row, col = coordinates((g, g))
    a = ((row[:, None] - row).abs() <= 1) & ((col[:, None] - col).abs() <= 1)
    return a / a.sum(1, keepdim=True)


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("g, p, pixels", [(14, 16, 116.4922), (8, 4, 16.5459), (7, 32, 115.5029),
                                          (2, 1, 0.853553)])
def test_attention_distance_of_uniform_attention_includes_self_pairs(g, p, pixels):
    distances, n = formulas.patch_distances((g, g), p), g * g
    assert formulas.attention_distance(uniform(n), distances) == pytest.approx(pixels, rel=1e-5)
    assert formulas.attention_distance(torch.eye(n), distances) == 0
    assert distances.sum() / (n * (n - 1)) != pytest.approx(pixels, rel=1e-3)        # control


def test_attention_distance_of_local_attention():
    found = formulas.attention_distance(local_attention(14), formulas.patch_distances((14, 14), 16))
    assert found == pytest.approx(16.6981, rel=1e-5)


@pytest.mark.parametrize("g, p, wrong_by", [(8, 4, 1e-6), (14, 16, 5e-5), (32, 16, 1e-3)])
def test_attention_distance_does_not_lose_digits_in_large_grids(g, p, wrong_by):
    """The same float32 attention and distances, summed exactly (math.fsum)."""
    a, distances = uniform(g * g), formulas.patch_distances((g, g), p)
    exact = a[0, 0].item() * math.fsum(distances.flatten().tolist()) / (g * g)
    assert abs(formulas.attention_distance(a, distances).item() - exact) < 5e-7
    in_fp32 = torch.einsum("qk,qk->", a, distances) / (g * g)
    assert abs(in_fp32.item() - exact) > wrong_by                            # control


def test_nmi_of_closed_forms():
    N = 196
    rows = torch.rand(N, generator=torch.Generator().manual_seed(0)).expand(N, N)
    one_key = torch.zeros(N, N).index_fill_(1, torch.tensor([3]), 1.0)
    groups = torch.block_diag(*[uniform(14)] * 14)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    half = 0.5 * torch.eye(N) + 0.5 * uniform(N)

    def nmi(a):
        return formulas.nmi(formulas.patch_attention(a, 0, 1e-8)).item()

    assert nmi(uniform(N)) == pytest.approx(0, abs=1e-6)
    assert nmi(rows / rows.sum(1, keepdim=True)) == pytest.approx(0, abs=1e-6)
    assert nmi(torch.eye(N)) == pytest.approx(0.9999928, abs=2e-6)
    assert nmi(torch.eye(N)[order]) >= 0.99998               # dependence, not locality
    assert nmi(groups) == pytest.approx(0.5, abs=1e-5)
    assert nmi(half) == pytest.approx(0.371711, abs=1e-5)
    assert nmi(local_attention(14)) == pytest.approx(0.604605, abs=1e-5)
    assert nmi(one_key) == 0                                 # would be 0/0


def test_attention_to_the_class_token_lowers_the_nmi():
    weights = torch.zeros(1, 1, 197, 197)
    weights[0, 0, 1:, 1:] = 1e-6 * torch.eye(196)
    weights[..., 0] = 1 - 1e-6
    assert formulas.class_token_attention(weights, 1).item() == pytest.approx(1, abs=1e-5)
    nmi, control = (formulas.nmi(formulas.patch_attention(weights, 1, eps))
                    for eps in (1e-8, 1e-20))
    assert nmi == pytest.approx(0.220, abs=1e-3) and control > 0.999


def test_class_token_attention_is_that_of_patches():
    weights = torch.full((1, 1, 197, 197), 0.8 / 196)
    weights[..., 0], weights[0, 0, 0] = 0.2, F.one_hot(torch.tensor(0), 197)
    assert formulas.class_token_attention(weights, 1).item() == pytest.approx(0.2)
    with_registers = formulas.class_token_attention(weights, 5).item()                  # 4 of them
    assert with_registers == pytest.approx(0.2 + 4 * 0.8 / 196)
    assert formulas.class_token_attention(weights, 0).item() == 0


def test_kernel_density_has_scotts_bandwidth():
    found = formulas.kernel_density(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 5.0]))
    assert found[0] == pytest.approx(0.465980, abs=1e-6) and found[1] < 1e-6


def test_top_mass_mask_keeps_the_largest_weights_and_no_zeros():
    assert abs(int(formulas.top_mass_mask(torch.ones(196), 0.5).sum()) - 98) <= 1
    weights = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0, 1, 2, 0]])
    for mass, kept in ((0.6, [[0, 1, 0, 1], [0, 0, 1, 0]]), (1.0, [[1] * 4, [0, 1, 1, 0]])):
        assert formulas.top_mass_mask(weights, mass).tolist() == kept


# ---- similarities --------------------------------------------------------------------------------


def test_head_similarity():
    v, e = random(2, 5, 8), torch.eye(4).double()
    similarity = formulas.head_similarity
    assert similarity(v[:, None].expand(2, 3, 5, 8)).tolist() == pytest.approx([1, 1])
    assert similarity(e[None, :, None].expand(1, 4, 5, 4)).item() == pytest.approx(0)
    assert similarity(torch.stack([v, -v], 1)).tolist() == pytest.approx([-1, -1])
    assert similarity(v[:, None]).isnan().all()


def test_depth_similarity():
    z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    rotated = torch.stack([-z[..., 1], z[..., 0]], -1)
    similarity = formulas.depth_similarity
    assert similarity(z, z).item() == 1 and similarity(z, -z).item() == -1
    assert similarity(z, z + rotated).item() == pytest.approx(1 / math.sqrt(2))


def test_token_similarity_excludes_self_pairs():
    N, v = 196, random(24)
    halves = torch.cat([torch.eye(2)[:1].expand(98, 2), torch.eye(2)[1:].expand(98, 2)])[None]

    def similarity(z):
        return formulas.token_similarity(z).item()

    assert similarity(v.expand(1, N, 24)) == pytest.approx(1)
    assert similarity(torch.eye(N)[None]) == pytest.approx(0)
    opposite = torch.cat([v.expand(1, 98, 24), -v.expand(1, 98, 24)], 1)
    assert similarity(opposite) == pytest.approx(-1 / 195)
    assert similarity(halves) == pytest.approx(0.497436, abs=1e-6)        # with self pairs: 0.5
    assert abs(similarity(random(1, N, 400))) < 0.01


def test_common_update_separates_translation_from_independent_updates():
    z = random(1, 196, 32)
    z = z - z.mean(1, keepdim=True)
    translated = formulas.common_update(z, z + random(32, seed=1))[0]
    assert translated.tolist() == pytest.approx([1, 1])
    assert formulas.common_update(z, 2 * z)[0].tolist() == pytest.approx([0, 4], abs=1e-9)
    independent = formulas.common_update(z, z + random(1, 196, 32, seed=2))[0, 0].item()
    assert independent == pytest.approx(1 / 196, rel=0.5)


def test_a_translation_is_visible_in_the_common_basis():
    z, step = 0.1 * random(2, 49, 16), random(16, seed=1)
    before, after = formulas.project_to_common_basis(z, z + step)
    assert (after - before).norm(dim=-1).std() < 0.2 * (after - before).norm(dim=-1).mean()
    control = formulas.project_to_common_basis(z, z)
    assert torch.equal(control[0], control[1])


def test_principal_components_have_a_fixed_sign():
    v, _ = formulas.principal_components(random(20, 6))
    assert all(row[row.abs().argmax()] > 0 for row in v)
    assert torch.allclose(formulas.principal_components(-random(20, 6))[0], v)
    _, fractions = formulas.principal_components(with_covariance([9.0, 4, 1, 2]))
    assert fractions.tolist() == pytest.approx([9 / 16, 4 / 16, 2 / 16])


# ---- spectra -------------------------------------------------------------------------------------


def with_covariance(values, n=50, seed=0):
    """(n, D) whose sample covariance is exactly diag(values), in a rotated basis."""
    D = len(values)
    x = random(n, D, seed=seed)
    u = torch.linalg.qr(x - x.mean(0))[0]                    # orthonormal columns of mean 0
    rotation = torch.linalg.qr(random(D, D, seed=1))[0]
    return u * (torch.tensor(values).double() * (n - 1)).sqrt() @ rotation


def test_log_spectrum_is_that_of_the_covariance():
    z = with_covariance([100.0, 10, 1, 0.1])[None]
    spectrum = formulas.log_spectrum(z)[0]
    found = formulas.relative_to_second(spectrum).tolist()
    assert found == pytest.approx([2.302585, 0, -2.302585, -4.605170], abs=1e-6)
    of_data = formulas.relative_to_second(spectrum / 2).tolist()          # control: not squared
    assert of_data != pytest.approx(found, abs=0.1)
    assert torch.allclose(formulas.log_spectrum(3 * z + 7)[0], spectrum + 2 * math.log(3))
    assert formulas.log_spectrum(torch.ones(1, 5, 3)).isfinite().all()


def test_log_spectrum_of_fewer_tokens_than_dimensions():
    z = random(1, 10, 40)                                    # computed from the Gram matrix
    c = z[0] - z[0].mean(0)
    expected = torch.linalg.eigvalsh(c.T @ c / 9).flip(0)[:9].log()
    assert torch.allclose(formulas.log_spectrum(z)[0], expected, rtol=1e-9)


def test_running_covariance_does_not_depend_on_batches():
    x = with_covariance([100.0, 10, 1, 0.1], n=64) + 1000
    found = []
    for size in (64, 10, 1):
        covariance = formulas.RunningCovariance()
        for part in x.split(size):
            covariance.add(part)
        found.append(covariance.log_spectrum())
    expected = [2.302585, 0, -2.302585, -4.605170]
    assert formulas.relative_to_second(found[0]).tolist() == pytest.approx(expected, abs=1e-6)
    assert all(torch.allclose(found[0], other, atol=1e-8) for other in found[1:])
    naive = (x.float().T @ x.float() / 64 - x.float().mean(0)[:, None] * x.float().mean(0))
    assert not torch.allclose(torch.linalg.eigvalsh(naive).flip(0).clamp(min=1e-9).log().double(),
                              found[0], atol=0.1)            # control: rounding without centering


def test_running_covariance_of_few_vectors_and_of_vectors_on_a_line():
    three, line = formulas.RunningCovariance(), formulas.RunningCovariance()
    three.add(random(3, 5))
    assert three.log_spectrum().shape == (2,)    # three vectors span a plane
    line.add(torch.arange(9.0)[:, None] * torch.tensor([3.0, 4, 0]))
    values = line.log_spectrum()                 # variance of 0 ... 8 is 7.5, of the line 25 times
    assert values[0].item() == pytest.approx(math.log(25 * 7.5))
    assert values[1:].tolist() == pytest.approx([values[0].item() + math.log(1e-12)] * 2)


def relative_amplitude(z, g=14):
    """Log amplitude of (B, N, D) minus that of frequency 0, mean over B."""
    a = formulas.log_amplitude(z, (g, g)).mean(0)
    return a - a[0]


def test_log_amplitude_of_closed_forms():
    row, col = coordinates((14, 14))
    impulse = F.one_hot(torch.tensor([37]), 196).double()[:, :, None]
    assert relative_amplitude(impulse).abs().max() < 1e-5
    constant = relative_amplitude(torch.ones(1, 196, 1))[1:].tolist()
    assert constant == pytest.approx([-19.093625] * 6, abs=1e-3)
    wave = (1 + (2 * math.pi * 6 * (row + col) / 14).double().cos())[None, :, None]
    assert relative_amplitude(wave)[6].item() == pytest.approx(-math.log(2), abs=1e-6)
    assert relative_amplitude(wave)[1:6].max() < -15
    checkerboard = (1.0 - 2 * ((row + col) % 2)).double()[None, :, None]
    assert relative_amplitude(checkerboard).abs().max() < 1e-4   # Nyquist, which is not included


def test_log_amplitude_of_white_noise_is_not_flat():
    noise = random(8, 196, 5000).float()
    expected = [0.5 * math.log(2)] * 6
    assert relative_amplitude(noise)[1:].tolist() == pytest.approx(expected, abs=0.02)
    smooth = F.avg_pool2d(F.pad(noise.mT.unflatten(2, (14, 14)), (1, 1, 1, 1), mode="circular"), 3,
                          1)
    expected = [0.20997, -0.23148, -1.11437, -3.02838, -4.64755, -2.29210]
    found = relative_amplitude(smooth.flatten(2).mT)[1:].tolist()
    assert found == pytest.approx(expected, abs=0.025)


def test_the_highest_frequency_is_below_nyquist():
    assert formulas.diagonal_frequencies((14, 14))[-1] == pytest.approx(6 / 7)
    assert formulas.diagonal_frequencies((8, 8))[-1] == 0.75
    assert len(formulas.diagonal_frequencies((7, 7))) == 4
    x = random(1, 64, 3)
    full = torch.fft.fft2(x.mT.unflatten(2, (8, 8))).abs()
    expected = torch.stack([(full[..., k, k] + 1e-6).log().mean(1) for k in range(4)], 1)
    assert torch.allclose(formulas.log_amplitude(x, (8, 8)), expected)


# ---- patches -------------------------------------------------------------------------------------


def test_count_similar_neighbors():
    ones, left = torch.ones(1, 196, 3), (coordinates((14, 14))[1] < 7)[None, :, None]

    def mean(z, g=14, **settings):
        return formulas.count_similar_neighbors(z, (g, g), **settings).mean().item()

    assert mean(ones, wrap=True) == 8
    assert mean(ones) == pytest.approx(1404 / 196) and mean(ones[:, :64], 8) == 6.5625
    assert mean(torch.eye(196)[None]) == 0
    assert mean(torch.cat([left, ~left], 2).float()) == pytest.approx(1324 / 196)


def test_label_fractions_and_majority_label():
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, :, 2:] = 1
    labels[0, 0, 0] = 1
    fractions = formulas.label_fractions(labels, 2, 2)
    assert fractions[0].tolist() == [[0.75, 0.25], [0, 1], [1, 0], [0, 1]]
    assert formulas.majority_label(fractions).tolist() == [[0, 1, 0, 1]]
    unknown = formulas.label_fractions(torch.full((1, 2, 4), -1), 2, 2)
    assert unknown.sum() == 0 and formulas.majority_label(unknown).tolist() == [[-1, -1]]
    halves = torch.tensor([[[0.5, 0.25], [0.45, 0.4]]])
    assert formulas.majority_label(halves).tolist() == [[0, -1]]
    count = formulas.count_similar_neighbors(fractions, (2, 2))[0]
    assert count.tolist() == [0, 1, 0, 1]                # cosine of (0.75, 0.25) and (1, 0): 0.949


def test_pair_similarity_histogram():
    z = torch.eye(2)[torch.tensor([0, 0, 0, 1, 1, 1])]
    pairs = formulas.pair_similarity_histogram(z, torch.tensor([1, 1, 1, 2, 2, 2]))
    assert pairs[:, :-1].sum(1).tolist() == [6, 9] and pairs[:, -1].tolist() == [6, 0]
    assert pairs[0, 199] == 6 and pairs[1, 100] == 9         # bins of cosines 1 and 0
    assert formulas.histogram_overlap(*pairs[:, :-1]) == 0
    pairs = formulas.pair_similarity_histogram(z, torch.tensor([0, 0, 0, 2, -1, 2]))
    assert pairs[:, :-1].sum(1).tolist() == [1, 6]           # no pair within the background


def test_histogram_overlap():
    x = torch.linspace(-1, 1, 200).double()
    for distance, expected in ((0, 1.0), (1, 0.617075), (2, 0.317311), (4, 0.045500)):
        p, q = ((-0.5 * ((x - s * distance * 0.05) / 0.1) ** 2).exp() for s in (-1, 1))
        assert formulas.histogram_overlap(p, q).item() == pytest.approx(expected, abs=2e-3)
    samples = random(2, 500).mul(0.1).clamp(-1, 1)
    p, q = (torch.histc(sample, 200, -1, 1) for sample in samples)
    assert formulas.histogram_overlap(p, q) < 0.9            # too small, as the samples are small
    boxes = (x > -1) & (x < 0), (x > -0.5) & (x < 0.5)
    found = formulas.histogram_overlap(*(box.double() for box in boxes)).item()
    assert found == pytest.approx(0.5, abs=0.01)


def test_iou():
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[4:28, 12:32] = True
    assert formulas.iou(mask, mask) == 1 and formulas.iou(mask & False, mask) == 0
    whole = torch.ones_like(mask)
    assert formulas.iou(mask, whole) == pytest.approx(mask.float().mean().item())


def test_roc_auc():
    scores, inside = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1.0, 0, 1, 0])
    assert formulas.roc_auc(scores, inside, 1 - inside) == pytest.approx(3 / 4)   # 3 of 4 pairs
    assert formulas.roc_auc(scores / 9 + 0.5, inside, 1 - inside) == pytest.approx(3 / 4)
    assert formulas.roc_auc(torch.ones(4), inside, 1 - inside) == 0.5             # ties
    half = torch.tensor([0.5, 0.5])          # half of each patch: 1/4 of the pairs right, 1/2 ties
    assert formulas.roc_auc(torch.tensor([1.0, 0.0]), half, 1 - half) == pytest.approx(0.5)
    assert math.isnan(formulas.roc_auc(scores, torch.ones(4), torch.zeros(4)))


def test_kmeans_finds_three_clusters():
    truth = torch.tensor([0] * 30 + [1] * 20 + [2] * 14)
    label, inertia = formulas.kmeans(torch.eye(3)[truth])
    assert torch.equal(label, truth)                         # largest cluster first
    assert all(a >= b - 1e-12 for a, b in zip(inertia, inertia[1:])) and inertia[-1] < 1e-12
    label, inertia = formulas.kmeans(random(64, 5))
    assert all(a >= b - 1e-9 for a, b in zip(inertia, inertia[1:])) and len(label.unique()) == 3
    assert formulas.kmeans(random(9, 2), k=1)[0].unique().tolist() == [0]


def test_kmeans_keeps_the_best_of_its_restarts():
    """The corners of a rectangle 1.5 x 1. Best clusters: inertia 4 times 0.5^2; local minimum:
    4 times 0.75^2."""
    x = torch.tensor([[0, 0], [0, 1], [1.5, 0], [1.5, 1]])
    ends = [formulas.kmeans(x, 2, restarts=1, seed=seed)[1][-1] for seed in range(20)]
    assert min(ends) == pytest.approx(1) and max(ends) == pytest.approx(2.25)    # both are found
    for seed in [seed for seed, end in enumerate(ends) if end > 2][:3]:
        label, inertia = formulas.kmeans(x, 2, seed=seed)
        assert inertia[-1] == pytest.approx(1) and label[0] == label[1] != label[2] == label[3]


# ---- views and many images -----------------------------------------------------------------------


def test_extract_windows():
    x = torch.arange(224).byte().expand(1, 3, 224, 224)      # the value of a pixel is its column
    crops = 255 * formulas.extract_windows(x)
    assert crops.shape == (49, 3, 224, 224)
    mean = crops[:, 0].mean((1, 2)).view(7, 7)
    assert torch.allclose(mean[0], 27.5 + 28 * torch.arange(7.0), atol=0.2)
    assert crops[48, 0, 0, 0].item() == pytest.approx(168 - 0.375, abs=0.3)


def test_windows_are_enlarged_as_by_pillow():
    """torch's own bicubic kernel is another one. (Overshoots Pillow clips once for each axis.)"""
    x = torch.randint(60, 196, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    image = Image.fromarray(x[1].permute(1, 2, 0).numpy()).resize((128, 128), Image.BICUBIC)
    window = torch.tensor(np.array(image)[16:48, 80:112]).permute(2, 0, 1)       # row 1, column 5
    assert (255 * formulas.extract_windows(x)[49 + 12] - window).abs().max() < 1.5
    other = F.interpolate(x[1:].float(), scale_factor=4, mode="bicubic")[0, :, 16:48, 80:112]
    assert (other - window).abs().max() > 5
    extreme = formulas.extract_windows(255 * (x > 128).byte())
    assert extreme.min() == 0 and extreme.max() == 1


def test_nearest_rows():
    bank = torch.cat([random(10, 4), random(10, 4)])         # each row twice
    rows, cosine = formulas.nearest_rows(bank, 3, 5)
    assert rows[0] == 13 and cosine[0].item() == pytest.approx(1) and 3 not in rows
    assert (cosine.diff() <= 1e-6).all()
    assert 13 not in formulas.nearest_rows(bank, 3, 5, torch.arange(20) == 13)[0]


def test_view_variance():
    z = random(4, 5, 3)
    assert formulas.view_variance(z[:1].expand(7, 5, 3))[0] == 0
    assert formulas.view_variance(random(2000, 50))[0] == pytest.approx(1, abs=0.02)
    expected = ((z[0] - z[1]) ** 2 / 2).mean().item()
    assert formulas.view_variance(z[:2])[0] == pytest.approx(expected)
    V = 8                                # orthonormal rows: sum of variances, divisor V, is 1 - 1/V
    found = formulas.view_variance(torch.eye(V))[0] * V * (V - 1) / V
    assert found == pytest.approx(1 - 1 / V)
    for scale in (1, 10):                # of 3 and 1: variance 2, mean square 5
        views = scale * torch.tensor([[3.0], [1.0]])
        assert formulas.view_variance(views) == pytest.approx((2 * scale**2, 2 / 5))


def affinities(x, perplexity):
    """Those of t-SNE in float64: the bandwidth of each row by bisection of its entropy."""
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
def test_tsne_steps_follow_the_gradient_of_the_divergence(start, exaggeration, momentum):
    x = random(60, 5).float()
    p = exaggeration * affinities(x, 5)

    def gradient(y):              # of sum p log(p / q) up to a constant; q: near over its sum
        y = y.double().requires_grad_()
        near = 1 / (1 + torch.pdist(y).square())                  # each pair once
        row, col = torch.triu_indices(60, 60, 1)
        loss = (2 * near.sum()).log() - 2 * (p[row, col] * near.log()).sum()
        return torch.autograd.grad(loss, y)[0]

    y0, y1, y2 = (formulas.tsne(x, perplexity=5, iterations=start + n) for n in range(3))
    first, second = gradient(y0), gradient(y1)
    speed = -50 * 0.8 * first                                     # gains decrease from 1 to 0.8
    gain = torch.where(second * speed < 0, 0.8 + 0.2, 0.8 * 0.8)
    for moved, step in ((y1 - y0, speed), (y2 - y1, momentum * speed - 50 * gain * second)):
        step = step - step.mean(0)                                # the result is centered
        assert (moved - step).abs().max() < 1e-3 * step.abs().max()
    assert (gain == 1).any() and (gain < 1).any()


def test_tsne_keeps_clusters():
    truth = torch.arange(3).repeat_interleave(20)
    x = 20 * torch.eye(3)[truth] + random(60, 3).float()
    y = formulas.tsne(x, perplexity=5, iterations=400)
    assert torch.equal(y, formulas.tsne(x, perplexity=5, iterations=400)) and y.isfinite().all()
    start = formulas.tsne(x, perplexity=5, iterations=0)
    assert start.shape == y.shape == (60, 2) and 0.8e-4 < start.std() < 1.2e-4
    image = torch.arange(60) % 20
    assert formulas.neighbor_purity(x, image, truth, 5)[1] == 1
    assert formulas.neighbor_purity(x, truth, image, 5)[0] == 1        # each cluster an image
    assert formulas.neighbor_purity(y, image, truth, 5)[1] > 0.85
    assert formulas.neighbor_purity(random(60, 2), image, truth, 5)[1] < 0.6      # control
