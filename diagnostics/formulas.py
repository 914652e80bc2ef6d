"""Diagnostics: pure functions of tensors that say in what two encoders differ inside. They know no
model, no data set and no figure.

Letters: B images, H heads, N = h x w patches row by row, P class tokens (0 or 1), T = P + N, C
width, d = C/H width of a head, p pixels a side of a patch, S of an image. A state (B, N, C) is the
patch tokens somewhere in the residual stream, before the final norm; an attention is after softmax,
its last axis the keys. Values are per image: whoever averages gives every image the same weight.

Park et al. is "What Do Self-Supervised Vision Transformers Learn?" (2023). Where it and its
published notebooks differ, or are silent, the docstring says what is done here.
"""
import math

import torch
import torch.nn.functional as F

from lib import rng


def coordinates(grid, device=None):
    """Row and column of each patch of a grid (h, w): two (N,) int64."""
    h, w = grid
    return torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).T


# ---- attention: where does a query look? ---------------------------------------------------------


def rows(attention, prefix, eps):
    """Attention (..., T, T) -> patch to patch (..., N, N), eps added, rows again of sum 1."""
    a = attention[..., prefix:, prefix:].float() + eps
    return a / a.sum(-1, keepdim=True)


def spacing(grid, p=1):
    """(N, N) distances between the centres of patches, in pixels."""
    row, col = coordinates(grid)
    return p * torch.hypot((row[:, None] - row).float(), (col[:, None] - col).float())


def attention_distance(a, between):
    """How far does a query look? a (..., N, N) rows of sum 1, `spacing` -> (...) mean distance, px.

    Park et al., fig. 3. 0: each patch looks at itself. The mean of `between`, self pairs included
    (116.492 px for 14 x 14 patches of 16): all of them look everywhere alike.
    """
    return torch.einsum("...qk,qk->...", a, between) / a.shape[-1]


def nmi(a):
    """How much does the map depend on the query? a (..., N, N) rows of sum 1 -> (...) in [0, 1].

    Mutual information of query and key over sqrt(H(q) H(k)), queries uniform: I = H(k) - mean over
    queries of H(row). 0: all queries share one map; 1: any permutation, so this is dependence, not
    locality. All mass on one key is 0/0, here 0. Source: Park et al., fig. 4; as in the notebook,
    1e-8 is added to every entry before rows are brought to sum 1.
    """
    h_key = torch.special.entr(a.mean(-2)).sum(-1)
    mutual = (h_key - torch.special.entr(a).sum(-1).mean(-1)).clamp(min=0)
    value = mutual / (h_key * math.log(a.shape[-1])).clamp(min=1e-30).sqrt()
    return value.masked_fill(h_key < 1e-3, 0)


def class_mass(attention, prefix):
    """(B, H, T, T) -> (B, H) share of a patch's attention that goes to the class token.

    To be read beside `nmi`: where it is nearly all, the 1e-8 flattens what is left to patches.
    """
    return attention[..., prefix:, :prefix].float().sum(-1).mean(-1)


def kde(values, at):
    """Density of a few numbers (n,) at the places (m,) -> (m,). Gaussian kernels of Scott's width,
    at least 0.01 (the paper's is not stated)."""
    h = max(values.std().item() * len(values) ** -0.2, 0.01) if len(values) > 1 else 0.01
    z = (at[:, None] - values) / h
    return (-0.5 * z * z).exp().mean(1) / (h * math.sqrt(2 * math.pi))


def keep_mass(weights, mass):
    """(..., N) weights -> bool: the largest, that together hold `mass` of the sum (DINO, iBOT)."""
    ascending, order = (weights / weights.sum(-1, keepdim=True)).double().sort(-1)
    kept = (ascending.cumsum(-1) > 1 - mass + 1e-12) & (ascending > 0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


# ---- similarity: do heads, layers, tokens differ? ------------------------------------------------


def pair_cosine(x):
    """Mean cosine of the n(n - 1) pairs of different vectors: (..., n, D) -> (...) float64.

    No n x n matrix: (|sum of unit vectors|^2 - n) / (n(n - 1)). nan if n is 1.
    """
    n = x.shape[-2]
    together = F.normalize(x.double(), dim=-1, eps=1e-8).sum(-2).square().sum(-1)
    return (together - n) / (n * (n - 1) or math.nan)


def head_similarity(o):
    """Do heads say the same of a token? Outputs of the heads (B, H, N, d) -> (B,), nan if H is 1.

    Park et al., fig. 5a, names no tensor; here, before the output projection (our choice). Heads
    live in subspaces of their own, so the value depends on the basis; that is the paper's notion.
    """
    return pair_cosine(o.transpose(1, 2)).mean(1)


def depth_similarity(before, after):
    """Mean cosine of a token before and after an attention layer. (B, N, C) twice -> (B,).

    Park et al., fig. 5b; "after" includes the residual (our choice).
    """
    return F.cosine_similarity(before.double(), after.double(), dim=-1).mean(1)


token_similarity = pair_cosine        # of a state (B, N, C) -> (B,): Park et al., fig. 5c


def unison(before, after):
    """How does a layer move the tokens of an image? (B, N, C) twice -> (B, 2), our numbers for
    Park et al., fig. 6.

    With steps s = after - before: |mean of s|^2 / mean of |s|^2, 1 if all tokens move together, 1/N
    if each for itself; and the variance after over the variance before.
    """
    before, after = before.double(), after.double()
    step = after - before
    common = step.mean(1).square().sum(-1) / step.square().sum(-1).mean(1)
    return torch.stack([common, after.var(1).sum(-1) / before.var(1).sum(-1)], 1)


def principal(x, n=3):
    """(M, D) -> the n leading right singular vectors (n, D) of x - mean, largest entry positive,
    and the share of the variance of each (n,)."""
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    v = v[:n] * v[:n].gather(1, v[:n].abs().argmax(1, keepdim=True)).sign()     # else arbitrary
    return v, (s.square() / s.square().sum())[:n]


def principal_plane(before, after):
    """States of I images (I, N, C) -> (2, I, N, 3), both in one basis: that of `principal`.

    Park et al., fig. 6, which does not say what is decomposed: all shown tokens together, less
    their mean (our choice). With a basis for each a translation would not be seen.
    """
    both = torch.stack([before, after]).double()
    v, _ = principal(both.flatten(0, 2))
    return (both - both.mean((0, 1, 2))) @ v.T


# ---- spectra: what volume do representations fill, and at which frequencies? ---------------------


def logs(values):
    """Log of falling values (..., R), cut off at 1e-12 of the first: what is below is rounding."""
    return values.maximum((1e-12 * values[..., :1]).clamp(min=1e-300)).log()


def log_spectrum(z):
    """Singular values of the covariance of an image's tokens: (B, N, C) -> (B, min(N - 1, C)) logs.

    Park et al., fig. 7a. By the author's reply it is the covariance (a variance: twice the log of
    the data's own singular values), and logs are averaged. Of the two square matrices the smaller.
    """
    z = z.double() - z.double().mean(1, keepdim=True)
    N, C = z.shape[1:]
    square = (z @ z.mT if N <= C else z.mT @ z) / (N - 1)
    return logs(torch.linalg.eigvalsh(square).flip(-1)[..., :min(N - 1, C)])


class Scatter:
    """Mean and covariance of vectors that come batch by batch, in float64 (Chan et al., 1979)."""

    def __init__(self):
        self.n, self.mean, self.m2 = 0, 0.0, 0.0

    def add(self, x):
        """x: (b, C). m2, the sum of (x - mean)(x - mean)^T, never sees the square of the mean."""
        x, n = x.double(), self.n
        mean = x.mean(0)
        step, self.n = mean - self.mean, n + len(x)
        self.m2 = self.m2 + (x - mean).T @ (x - mean) + step[:, None] * step * n * len(x) / self.n
        self.mean = self.mean + step * len(x) / self.n

    def log_spectrum(self):
        """As `log_spectrum`, of all vectors: (min(n - 1, C),). Park et al., fig. 7b."""
        return logs(torch.linalg.eigvalsh(self.m2 / (self.n - 1)).flip(0)[:self.n - 1])


def delta(log_values):
    """(..., R) less the second largest: the first is often a common offset. The paper writes "the
    (second) largest", its fig. E.3 plots the second, its notebook takes no difference."""
    return log_values - log_values[..., 1:2]


def ranks(count):
    """The two ranks that curves follow: 64 and 128 (paper); of fewer, a third and two thirds."""
    return (64, 128) if count >= 129 else (max(1, count // 3), max(1, 2 * count // 3))


def frequencies(grid):
    """Those of `fourier`, in units of pi: 2k/g for k < g/2, g the shorter side.

    For an even g the highest, Nyquist, is not among them: 14 patches end at 0.857 pi, which the
    notebooks label 1.0 pi. So values of different grids do not compare.
    """
    return [2 * k / min(grid) for k in range(-(-min(grid) // 2))]


def fourier(z, grid):
    """(B, N, C) tokens as C maps -> (B, K) mean over channels of ln(|F(k, k)| + 1e-6).

    Park et al., fig. 9, by the notebook: only the diagonal of the 2-D transform, log before the
    mean, no window. White noise rises by ln(2)/2 from k = 0 to any other k: the sum of a real map
    is real, the other coefficients are complex.
    """
    row, col = coordinates(grid, z.device).double()
    k = torch.arange(-(-min(grid) // 2), device=z.device)[:, None]
    angle = 2 * math.pi * k * (row / grid[0] + col / grid[1])                             # (K, N)
    amplitude = torch.hypot(angle.cos() @ z.double(), angle.sin() @ z.double())        # (B, K, C)
    return (amplitude + 1e-6).log().mean(-1)


# ---- patches: which of them are alike? -----------------------------------------------------------


def adjacent(z, grid, threshold=0.95, wrap=False):
    """How many of its eight neighbours are like a patch? (B, N, C) -> (B, N) counts.

    Alike: cosine >= threshold. SelfPatch, appendix G: 4.3 +- 1.2 of label vectors (`label_shares`)
    at 0.95. Its training code wraps around the image's border; here a corner has three neighbours.
    """
    z = F.normalize(z.double(), dim=-1).unflatten(1, grid)                            # (B, h, w, C)
    row, col = coordinates(grid, z.device).view(2, *grid)
    count = torch.zeros(z.shape[:3], device=z.device)
    for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)):       # each pair once, from the upper of two
        alike = (z * z.roll((-dr, -dc), (1, 2))).sum(-1) >= threshold - 1e-12
        if not wrap:
            alike &= (row + dr < grid[0]) & (col + dc >= 0) & (col + dc < grid[1])
        count += alike.float() + alike.roll((dr, dc), (1, 2)).float()
    return count.flatten(1)


def label_shares(labels, p, classes):
    """(B, S, S) class of each pixel, -1 for none -> (B, N, classes) shares of each patch's area."""
    h, w = labels.shape[1] // p, labels.shape[2] // p
    pixels = labels.unflatten(2, (w, p)).unflatten(1, (h, p)).transpose(2, 3)     # (B, h, w, p, p)
    pixels = pixels.flatten(3).flatten(1, 2).long() + 1                               # (B, N, pp)
    count = torch.zeros(*pixels.shape[:2], classes + 1, device=labels.device)
    return count.scatter_add_(2, pixels, torch.ones_like(pixels, dtype=torch.float))[..., 1:] / p**2


def majority(shares):
    """(B, N, classes) -> (B, N) the class of at least half of a patch, or -1."""
    share, label = shares.max(-1)
    return label.masked_fill(share < 0.5, -1)


def pair_histogram(z, labels, bins=200):
    """Cosines of all pairs of patches of one image: (N, C), (N,) -> (2, bins + 1) float64.

    Row 0: pairs within a class, row 1: across classes. Columns: counts in equal bins over [-1, 1],
    and the sum of the cosines. Labels: 0 is background, which counts in pairs across only; -1 is
    left out. MMC, fig. 5, says no more than "intra- and inter-object".
    """
    z = F.normalize(z.double(), dim=-1)
    i, j = torch.triu_indices(len(z), len(z), 1, device=z.device)
    s, a, b = (z @ z.T)[i, j].clamp(-1, 1), labels[i], labels[j]
    place, known = ((s + 1) / 2 * bins).long().clamp(max=bins - 1), (a >= 0) & (b >= 0)
    return torch.stack([
        torch.cat([torch.bincount(place[pair], minlength=bins).double(), s[pair].sum()[None]])
        for pair in (known & (a == b) & (a > 0), known & (a != b))])


def overlap(p, q):
    """Area under the smaller of two histograms (bins,), each brought to area 1: 0 separable, 1 the
    same. Few pairs make it too small: two draws of 500 give about 0.8 for 1."""
    return torch.minimum(p / p.sum(), q / q.sum()).sum()


def iou(found, truth):
    """Two bool masks of one shape -> a float; 0 if both are empty."""
    return ((found & truth).sum() / (found | truth).sum().clamp(min=1)).item()


def order(heat, inside, outside):
    """How often is a point of the object hotter than one outside? heat (N,) of patches, inside and
    outside (N,) the shares of each that are object and that are not -> a float; 0.5: chance, ties
    count half, nan without one of the two. The area under the ROC curve: no threshold in it."""
    heat, at = heat.unique(return_inverse=True)                                       # ascending
    inside, outside = (torch.zeros(len(heat)).double().index_add(0, at, part.double())
                       for part in (inside, outside))
    below = outside.cumsum(0) - outside / 2
    return ((inside @ below) / (inside.sum() * outside.sum())).item()


def kmeans(x, k=3, restarts=10, iterations=100, seed=0):
    """(N, C) -> labels (N,), largest cluster first; inertia after each step of the best start.

    MMC, fig. 6, has k = 3 and no more; here k-means++ starts (Arthur and Vassilvitskii, 2007).
    """
    g, x, runs = rng.generator(seed, "kmeans"), x.double(), []
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=g)]
        for _ in range(k - 1):
            far = torch.cdist(x, centres).amin(1).square() + 1e-12
            centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=g)]])
        inertia = []
        for _ in range(iterations):
            near, label = torch.cdist(x, centres).min(1)
            inertia.append(near.square().sum().item())
            member = F.one_hot(label, k).double()                                       # (N, k)
            mean = member.T @ x / member.sum(0)[:, None].clamp(min=1)
            new = torch.where(member.any(0)[:, None], mean, centres)
            if torch.equal(new, centres):
                break
            centres = new
        runs.append((inertia[-1], label, inertia))
    _, label, inertia = min(runs, key=lambda run: run[0])
    order = label.bincount(minlength=k).argsort(descending=True, stable=True)
    return order.argsort()[label], inertia


# ---- views, and many images together -------------------------------------------------------------


def windows(x):
    """(B, 3, S, S) -> (49 B, 3, S, S): windows of side S/4 at stride S/8, enlarged.

    Crop i of an image is in row i // 7, column i % 7. As in the part-aware study's code, the image
    is enlarged four times and then cut.
    """
    S = x.shape[-1]
    cut = F.interpolate(x, scale_factor=4, mode="bicubic").unfold(2, S, S // 2).unfold(3, S, S // 2)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)                       # of (B, 3, 7, 7, S, S)


def nearest(bank, query, k=24, leave_out=None):
    """The rows of bank (M, D) most like row `query`, by cosine -> numbers (k,), cosines (k,).

    The query itself is never among them, nor are the rows leave_out (M,) bool.
    """
    s = F.normalize(bank.float(), dim=1) @ F.normalize(bank[query].float(), dim=0)
    s[query] = -2
    s = s if leave_out is None else s.masked_fill(leave_out, -2)
    return s.topk(min(k, int((s > -2).sum())))[::-1]


def variance(z):
    """Features of V views (V, ..., C) -> variance over views (divisor V - 1), mean over the rest;
    and that over the mean square, as the first goes with the scale of the features. MMC, table 10.
    """
    z = z.double()
    raw = z.var(0).mean().item()
    return raw, raw / max(z.square().mean().item(), 1e-300)


def purity(z, image, label, k=10):
    """Of the k nearest tokens, the share of the same image; of the k nearest of other images, the
    share of the same class. z: (n, C), image, label: (n,) -> two floats."""
    d = torch.cdist(z.float(), z.float()).fill_diagonal_(math.inf)
    same = image[d.topk(k, largest=False).indices] == image[:, None]
    others = d.masked_fill_(image[:, None] == image, math.inf).topk(k, largest=False).indices
    return same.double().mean().item(), (label[others] == label[:, None]).double().mean().item()


def tsne(x, perplexity=20, iterations=1000, seed=0):
    """Exact t-SNE (van der Maaten and Hinton, 2008), (n, C) -> (n, 2).

    As scikit-learn does it, from a random start: momentum 0.5, then 0.8, exaggeration 12 for the
    first 250 steps, learning rate n/48 but at least 50.
    """
    n = len(x)
    d = torch.cdist(x.float(), x.float()).square().fill_diagonal_(math.inf)
    d = (d - d.amin(1, keepdim=True)).fill_diagonal_(0)
    d = d / d.mean()
    beta, low, high = torch.ones(n, 1), torch.zeros(n, 1), torch.full((n, 1), math.inf)
    for _ in range(40):                                # bisection: each place its own width
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
        if step in (0, 250):                           # without exaggeration it starts from rest
            speed, gain = torch.zeros_like(y), torch.ones_like(y)
        length = y.square().sum(1)
        near = torch.addmm(length[:, None] + length, y, y.T, alpha=-2).add_(1).reciprocal_()
        near.fill_diagonal_(0)
        pull = torch.sub(p * 12 if step < 250 else p, near, alpha=1 / near.sum().item()).mul_(near)
        slope = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gain = torch.where(slope * speed < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        speed = (0.5 if step < 250 else 0.8) * speed - rate * gain * slope
        y = y + speed
    return y - y.mean(0)
