"""Formulas of the diagnostics: pure functions of tensors. No model, no data set, no figure.

Shapes as in vit.py: B images, H heads, N = h x w patches in row-major order, L tokens (class token
and patches), D width, S image side, p patch side, C classes, V views. A state (B, N, D) holds the
patch tokens at one point of the residual stream, before the final norm. Attention weights are taken
after the softmax; their last axis is the keys. Results are per image, so that a caller can give
every image the same weight in a mean.

"Park et al." is "What Do Self-Supervised Vision Transformers Learn?" (2023). Where that paper and
its published notebooks differ or leave something open, the docstring states what is done here.
"""
import math

import torch
import torch.nn.functional as F

from lib import augment, rng
from lib.positions import coordinates

# ---- attention: which keys does a query attend to? -----------------------------------------------


def patch_attention(weights, num_prefix, eps):
    """Attention weights (..., L, L) -> those between patches (..., N, N): eps is added to every
    entry, and rows are normalized to sum 1 again."""
    a = weights[..., num_prefix:, num_prefix:].float() + eps
    return a / a.sum(-1, keepdim=True)


def patch_distances(grid, p=1):
    """(N, N) distances between the centers of patches, in pixels."""
    row, col = coordinates(grid)
    return p * torch.hypot((row[:, None] - row).float(), (col[:, None] - col).float())


def attention_distance(a, distances):
    """Mean distance between a query and its keys, weighted by attention, in pixels.

    a: (..., N, N) with rows that sum to 1; distances: `patch_distances` -> (...). Park et al., fig.
    3. 0: each patch attends to itself only. Uniform attention gives the mean of `distances`, self
    pairs included (116.492 px for 14 x 14 patches of 16 px). The sums are float64: in float32 the
    rounding of N^2 summands can exceed 0.1 px at 60 x 60 patches.
    """
    return (a * distances).sum(-1, dtype=torch.float64).mean(-1)


def nmi(a):
    """Normalized mutual information of query and key, in [0, 1].

    a: (..., N, N) with rows that sum to 1 -> (...). I / sqrt(H(q) H(k)) with uniform queries and
    I = H(k) - mean over queries of H(row). 0: all queries have the same attention map. 1: any
    permutation, so this measures dependence on the query, not locality. If all attention goes to
    one key the value is 0/0; it is set to 0. Source: Park et al., fig. 4. As in the notebook,
    callers add 1e-8 to every entry before the rows are normalized (`patch_attention`).
    """
    h_key = torch.special.entr(a.mean(-2)).sum(-1)
    mutual = (h_key - torch.special.entr(a).sum(-1).mean(-1)).clamp(min=0)
    value = mutual / (h_key * math.log(a.shape[-1])).clamp(min=1e-30).sqrt()
    return value.masked_fill(h_key < 1e-3, 0)


def class_token_attention(weights, num_prefix):
    """(B, H, L, L) -> (B, H): the fraction of a patch's attention that goes to the class token and
    to registers, mean over patches.

    Where it is close to 1, `nmi` is too low: the 1e-8 that `patch_attention` adds makes the
    remaining attention to patches nearly uniform.
    """
    return weights[..., num_prefix:, :num_prefix].float().sum(-1).mean(-1)


def kernel_density(values, points):
    """Density of the values (n,) at the points (m,) -> (m,). Gaussian kernels with Scott's
    bandwidth, at least 0.01 (Park et al. do not state their bandwidth)."""
    h = max(values.std().item() * len(values) ** -0.2, 0.01) if len(values) > 1 else 0.01
    z = (points[:, None] - values) / h
    return (-0.5 * z * z).exp().mean(1) / (h * math.sqrt(2 * math.pi))


def top_mass_mask(weights, mass):
    """(..., N) weights -> (..., N) bool: the largest weights, which together hold the fraction
    `mass` of the sum (the masks in DINO's and iBOT's figures of attention)."""
    ascending, index = (weights / weights.sum(-1, keepdim=True)).double().sort(-1)
    kept = (ascending.cumsum(-1) > 1 - mass + 1e-12) & (ascending > 0)
    return torch.zeros_like(kept).scatter(-1, index, kept)


# ---- similarity of heads, of layers, of tokens ---------------------------------------------------


def mean_pairwise_cosine(x):
    """Mean cosine of the n(n - 1) pairs of different vectors: (..., n, D) -> (...) float64.

    No n x n matrix: (|sum of unit vectors|^2 - n) / (n(n - 1)). nan if n is 1.
    """
    n = x.shape[-2]
    squared_sum = F.normalize(x.double(), dim=-1, eps=1e-8).sum(-2).square().sum(-1)
    return (squared_sum - n) / (n * (n - 1) or math.nan)


def head_similarity(outputs):
    """Mean cosine of the outputs of two heads for a token: (B, H, N, D/H) -> (B,), nan if H is 1.

    Park et al., fig. 5a, does not name the tensor; here it is taken before the output projection
    (our choice). Each head has its own subspace, so the value depends on the basis, as in their
    paper.
    """
    return mean_pairwise_cosine(outputs.transpose(1, 2)).mean(1)


def depth_similarity(before, after):
    """Mean cosine of a token before and after an attention layer: (B, N, D) twice -> (B,).

    Park et al., fig. 5b; "after" includes the residual (our choice).
    """
    return F.cosine_similarity(before.double(), after.double(), dim=-1).mean(1)


token_similarity = mean_pairwise_cosine     # of a state (B, N, D) -> (B,): Park et al., fig. 5c


def common_update(before, after):
    """How far a layer changes all tokens of an image alike: (B, N, D) twice -> (B, 2). Our measures
    for Park et al., fig. 6.

    With u = after - before: |mean of u|^2 / mean of |u|^2, which is 1 if all tokens get the same
    update and 1/N if the updates are independent; and the variance of the tokens after the layer,
    divided by the variance before it.
    """
    before, after = before.double(), after.double()
    update = after - before
    common = update.mean(1).square().sum(-1) / update.square().sum(-1).mean(1)
    return torch.stack([common, after.var(1).sum(-1) / before.var(1).sum(-1)], 1)


def principal_components(x, n=3):
    """(M, D) -> the n leading right singular vectors (n, D) of x - mean, and the fraction of the
    variance that each explains (n,). The sign is arbitrary; here the entry with the largest
    absolute value is positive."""
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    v = v[:n] * v[:n].gather(1, v[:n].abs().argmax(1, keepdim=True)).sign()
    return v, (s.square() / s.square().sum())[:n]


def project_to_common_basis(before, after):
    """States of a few images (B, N, D) twice -> (2, B, N, 3), both in the basis of their
    `principal_components`.

    Park et al., fig. 6, does not state what is decomposed; here all tokens of the figure together,
    minus their mean (our choice). With a basis for each state a translation would be invisible.
    """
    both = torch.stack([before, after]).double()
    v, _ = principal_components(both.flatten(0, 2))
    return (both - both.mean((0, 1, 2))) @ v.T


# ---- spectra of representations ------------------------------------------------------------------


def clipped_log(values):
    """Log of descending values (..., R), clipped at 1e-12 times the first: smaller values are
    rounding errors."""
    return values.maximum((1e-12 * values[..., :1]).clamp(min=1e-300)).log()


def log_spectrum(z):
    """Log singular values of the covariance of an image's tokens: (B, N, D) -> (B, min(N - 1, D)).

    Park et al., fig. 7a. According to the author's reply these are values of the covariance (twice
    the log of the data's singular values, up to a constant), and logs are averaged over images.
    Computed from the smaller of the two square matrices.
    """
    z = z.double() - z.double().mean(1, keepdim=True)
    N, D = z.shape[1:]
    square = (z @ z.mT if N <= D else z.mT @ z) / (N - 1)
    return clipped_log(torch.linalg.eigvalsh(square).flip(-1)[..., :min(N - 1, D)])


class RunningCovariance:
    """Mean and covariance of vectors that arrive in batches, in float64 (Chan et al., 1979)."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, x):
        """x: (B, D). The scatter is the sum of (x - mean)(x - mean)^T. It never contains the square
        of the mean, so no digits cancel."""
        x, n = x.double(), self.n
        mean = x.mean(0)
        step, self.n = mean - self.mean, n + len(x)
        between = step[:, None] * step * n * len(x) / self.n
        self.scatter = self.scatter + (x - mean).T @ (x - mean) + between
        self.mean = self.mean + step * len(x) / self.n

    def log_spectrum(self):
        """Like `log_spectrum`, of all vectors: (min(n - 1, D),). Park et al., fig. 7b."""
        values = torch.linalg.eigvalsh(self.scatter / (self.n - 1)).flip(0)
        return clipped_log(values[:self.n - 1])


def relative_to_second(log_values):
    """(..., R) minus the second largest; the first is often a common offset. Park et al. write "the
    (second) largest", their fig. E.3 uses the second; they did not publish the code of it."""
    return log_values - log_values[..., 1:2]


def plotted_ranks(size, count):
    """The two ranks, of `count`, that are plotted over depth: 64 and 128 (Park et al.). If there
    are fewer than 129 patches or, over images, dimensions (`size`), a third and two thirds of them,
    or of the values, if these are fewer still (our choice)."""
    ranks = (64, 128) if size >= 129 else (size // 3, 2 * size // 3)
    if count < ranks[1]:
        ranks = count // 3, 2 * count // 3
    return tuple(max(1, rank) for rank in ranks)


def diagonal_frequencies(grid):
    """The frequencies of `log_amplitude`, in units of pi: 2k/g for k < g/2, g the shorter side.

    For an even g the Nyquist frequency is not included: 14 patches end at 0.857 pi, which the
    notebooks label 1.0 pi. Values of different grids are therefore not comparable.
    """
    return [2 * k / min(grid) for k in range(-(-min(grid) // 2))]


def log_amplitude(z, grid):
    """Fourier amplitudes of the D feature maps of a state: (B, N, D) -> (B, len(frequencies)), the
    mean over channels of ln(|F(k, k)| + 1e-6).

    Park et al., fig. 9, as in the notebook: only the diagonal of the 2-D transform, log before the
    mean, no window. White noise rises by ln(2)/2 from k = 0 to any other k: the sum of a real map
    is real, the other coefficients are complex.
    """
    row, col = (axis.double() for axis in coordinates(grid, z.device))
    k = torch.arange(-(-min(grid) // 2), device=z.device)[:, None]
    angle = 2 * math.pi * k * (row / grid[0] + col / grid[1])                   # (frequencies, N)
    amplitude = torch.hypot(angle.cos() @ z.double(), angle.sin() @ z.double())
    return (amplitude + 1e-6).log().mean(-1)


# ---- similarity of patches -----------------------------------------------------------------------


def count_similar_neighbors(z, grid, threshold=0.95, wrap=False):
    """How many of its eight neighbors are similar to a patch: (B, N, D) -> (B, N) counts.

    Similar: cosine >= threshold. SelfPatch, appendix G: 4.3 +- 1.2 for label vectors
    (`label_fractions`) at 0.95. Its training code wraps around the border of the image (`wrap`);
    here a corner has three neighbors.
    """
    z = F.normalize(z.double(), dim=-1).unflatten(1, grid)                            # (B, h, w, D)
    row, col = (axis.view(grid) for axis in coordinates(grid, z.device))
    count = torch.zeros(z.shape[:3], device=z.device)
    for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)):       # each pair once, from the upper patch
        similar = (z * z.roll((-dr, -dc), (1, 2))).sum(-1) >= threshold - 1e-12
        if not wrap:
            similar &= (row + dr < grid[0]) & (col + dc >= 0) & (col + dc < grid[1])
        count += similar.float() + similar.roll((dr, dc), (1, 2)).float()
    return count.flatten(1)


def label_fractions(labels, p, num_classes):
    """(B, S, S) class of each pixel, -1 for unknown -> (B, N, C) fractions of each patch's area."""
    h, w = labels.shape[1] // p, labels.shape[2] // p
    pixels = labels.unflatten(2, (w, p)).unflatten(1, (h, p)).transpose(2, 3)     # (B, h, w, p, p)
    pixels = pixels.flatten(3).flatten(1, 2).long() + 1                               # (B, N, pp)
    count = torch.zeros(*pixels.shape[:2], num_classes + 1, device=labels.device)
    return count.scatter_add_(2, pixels, torch.ones_like(pixels, dtype=torch.float))[..., 1:] / p**2


def majority_label(fractions):
    """(B, N, C) -> (B, N): the class that covers at least half of a patch, or -1."""
    fraction, label = fractions.max(-1)
    return label.masked_fill(fraction < 0.5, -1)


def pair_similarity_histogram(z, labels, bins=200):
    """Cosines of all pairs of patches of one image: (N, D), (N,) -> (2, bins + 1) float64.

    Row 0: pairs within a class, row 1: pairs across classes. Columns: counts in equal bins over
    [-1, 1], then the sum of the cosines. Label 0 is background, which counts in pairs across
    classes only; patches with label -1 are left out. MMC, fig. 5, states only "intra- and
    inter-object".
    """
    z = F.normalize(z.double(), dim=-1)
    i, j = torch.triu_indices(len(z), len(z), 1, device=z.device)
    s, a, b = (z @ z.T)[i, j].clamp(-1, 1), labels[i], labels[j]
    place, known = ((s + 1) / 2 * bins).long().clamp(max=bins - 1), (a >= 0) & (b >= 0)
    return torch.stack([
        torch.cat([torch.bincount(place[pair], minlength=bins).double(), s[pair].sum()[None]])
        for pair in (known & (a == b) & (a > 0), known & (a != b))])


def histogram_overlap(p, q):
    """Area under the minimum of two histograms (bins,), each scaled to area 1. 0: separable, 1:
    equal. It is too small for small samples: two samples of 500 values from one distribution give
    about 0.8 instead of 1."""
    return torch.minimum(p / p.sum(), q / q.sum()).sum()


def iou(predicted, truth):
    """Intersection over union of two bool masks of the same shape -> float; 0 if both are empty."""
    return ((predicted & truth).sum() / (predicted | truth).sum().clamp(min=1)).item()


def roc_auc(scores, inside, outside):
    """Area under the ROC curve of an object: the probability that a point of the object has a
    higher score than a point outside it. It does not need a threshold.

    scores: (N,) of patches; inside, outside: (N,) the fractions of each patch that are object and
    that are outside -> float. 0.5 is chance level; ties count half; nan if one of the two is empty.
    """
    scores, rank = scores.unique(return_inverse=True)                                 # ascending
    inside, outside = (torch.zeros(len(scores)).double().index_add(0, rank, part.double())
                       for part in (inside, outside))
    below = outside.cumsum(0) - outside / 2
    return ((inside @ below) / (inside.sum() * outside.sum())).item()


def kmeans(x, k=3, restarts=10, iterations=100, seed=0):
    """(N, D) -> labels (N,), 0 being the largest cluster; inertia in each iteration of the best
    restart.

    MMC, fig. 6, states only k = 3; here with k-means++ (Arthur and Vassilvitskii, 2007).
    """
    g = rng.generator(seed, "kmeans")
    x, runs = x.double(), []
    for _ in range(restarts):
        centers = x[torch.randint(len(x), (1,), generator=g)]
        for _ in range(k - 1):
            squared = torch.cdist(x, centers).amin(1).square() + 1e-12
            centers = torch.cat([centers, x[torch.multinomial(squared, 1, generator=g)]])
        inertia = []
        for _ in range(iterations):
            distance, label = torch.cdist(x, centers).min(1)
            inertia.append(distance.square().sum().item())
            member = F.one_hot(label, k).double()                                       # (N, k)
            mean = member.T @ x / member.sum(0)[:, None].clamp(min=1)
            new = torch.where(member.any(0)[:, None], mean, centers)
            if torch.equal(new, centers):
                break
            centers = new
        runs.append((inertia[-1], label, inertia))
    _, label, inertia = min(runs, key=lambda run: run[0])
    by_size = label.bincount(minlength=k).argsort(descending=True, stable=True)
    return by_size.argsort()[label], inertia


# ---- views, and features of many images ----------------------------------------------------------


def extract_windows(x):
    """(B, 3, S, S) uint8 -> (49 B, 3, S, S) in [0, 1]: windows of side S/4 at stride S/8, enlarged
    to side S.

    Window i of an image is in row i // 7, column i % 7. As in the code of Zhu et al. (2023), the
    image is enlarged four times, by the bicubic kernel of Pillow, then cut.
    """
    S = x.shape[-1]
    windows = augment.crop(x, torch.tensor([[0, 0, S, S]], device=x.device), 4 * S)
    windows = windows.unfold(2, S, S // 2).unfold(3, S, S // 2)                # (B, 3, 7, 7, S, S)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def nearest_rows(bank, query, k=24, leave_out=None):
    """The k rows of bank (M, D) with the highest cosine to row `query` -> row indices (k,), cosines
    (k,). The query itself and the rows in leave_out (M,) bool are never among them."""
    s = F.normalize(bank.float(), dim=1) @ F.normalize(bank[query].float(), dim=0)
    s[query] = -2
    s = s if leave_out is None else s.masked_fill(leave_out, -2)
    return s.topk(min(k, int((s > -2).sum())))[::-1]


def view_variance(z):
    """Features of V views (V, ..., D) -> their variance over views (divisor V - 1), mean over all
    other axes; and this variance divided by the mean square of the features, which does not depend
    on their scale. MMC, table 10.
    """
    z = z.double()
    raw = z.var(0).mean().item()
    return raw, raw / max(z.square().mean().item(), 1e-300)


def neighbor_purity(z, image, label, k=10):
    """The fraction of the k nearest tokens that are of the same image; and, of the k nearest tokens
    in other images, the fraction of the same class. z: (n, D); image, label: (n,) -> two floats."""
    d = torch.cdist(z.float(), z.float()).fill_diagonal_(math.inf)
    same = image[d.topk(k, largest=False).indices] == image[:, None]
    others = d.masked_fill_(image[:, None] == image, math.inf).topk(k, largest=False).indices
    return same.double().mean().item(), (label[others] == label[:, None]).double().mean().item()


def tsne(x, perplexity=20, iterations=1000, seed=0):
    """Exact t-SNE (van der Maaten and Hinton, 2008), (n, D) -> (n, 2).

    As in scikit-learn, with a random initialization: momentum 0.5, then 0.8; exaggeration 12 for
    the first 250 steps; learning rate n/48, at least 50.
    """
    n = len(x)
    d = torch.cdist(x.float(), x.float()).square().fill_diagonal_(math.inf)
    d = (d - d.amin(1, keepdim=True)).fill_diagonal_(0)
    d = d / d.mean()
    beta, low, high = torch.ones(n, 1), torch.zeros(n, 1), torch.full((n, 1), math.inf)
    for _ in range(40):                                # bisection: a bandwidth for each point
        p = (-beta * d).exp_().fill_diagonal_(0)
        total = p.sum(1, keepdim=True)
        entropy = total.log() + beta * torch.einsum("ij,ij->i", p, d)[:, None] / total
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    p = p / total
    p = ((p + p.T) / (2 * n)).clamp(min=1e-12)
    y = 1e-4 * torch.randn(n, 2, generator=rng.generator(seed, "tsne"))
    rate = max(n / 48, 50)
    for step in range(iterations):
        if step in (0, 250):                           # the second phase also starts from rest
            speed, gain = torch.zeros_like(y), torch.ones_like(y)
        length = y.square().sum(1)
        near = torch.addmm(length[:, None] + length, y, y.T, alpha=-2).add_(1).reciprocal_()
        near.fill_diagonal_(0)
        pull = torch.sub(p * 12 if step < 250 else p, near, alpha=1 / near.sum().item()).mul_(near)
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gain = torch.where(gradient * speed < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        speed = (0.5 if step < 250 else 0.8) * speed - rate * gain * gradient
        y = y + speed
    return y - y.mean(0)
