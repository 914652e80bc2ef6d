"""TODO lib/positions"""
import functools

import numpy as np
import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# Positions: what tells one patch from another

def coordinates(grid, device=None):
    """Row and column of every patch of a grid (h, w): two (h*w,) int64 tensors."""
    h, w = grid
    row, col = torch.arange(h, device=device), torch.arange(w, device=device)
    return row.repeat_interleave(w), col.repeat(h)


def sincos(dim, grid, order="sincos_row"):
    """Fixed 2-D sine-cosine table (h*w, D) float32, for integer coordinates.

    Its quarters are sin(row), cos(row), sin(column), cos(column) in "sincos_row" (MoCo v3, CAE);
    in "sincos_col" (MAE) the columns come first. Trained weights work with their own order only.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that 4 divides, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))         # (D/4,)
    row, col = (axis[:, None] * omega for axis in coordinates(grid))                     # (N, D/4)
    first, second = (row, col) if order == "sincos_row" else (col, row)
    return torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], 1).float()


def resize_positions(pos, old, new, prefix=1, rule="dino"):
    """Positions (1, P+h*w, D) from grid `old` to grid `new`, bicubic; the class token's row stays.

    "size" asks for the new size (DeiT, MAE, BEiT). "dino" (DINO, iBOT) gives a scale factor with
    0.1 added against rounding down; that also moves the sampling points, so their features need it.
    """
    if new == old:
        return pos
    table = pos[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)                   # (1, D, h, w)
    target = dict(size=new)
    if rule == "dino":
        target = dict(scale_factor=tuple((n + 0.1) / o for n, o in zip(new, old)))
    table = F.interpolate(table, mode="bicubic", **target)
    return torch.cat([pos[:, :prefix], table.flatten(2).transpose(1, 2)], 1)


def relative_index(grid, prefix=1, device=None):
    """(L, L) int64: which row of the relative position table a (query, key) pair uses (BEiT).

    The first (2h-1)(2w-1) rows are the offsets, query minus key; three more are for class token to
    patch, patch to class token, and class token to itself.
    """
    h, w = grid
    row, col = coordinates(grid, device)
    index = (row[:, None] - row + h - 1) * (2 * w - 1) + (col[:, None] - col + w - 1)    # (N, N)
    if prefix:
        offsets = (2 * h - 1) * (2 * w - 1)
        index = F.pad(index, (1, 0, 1, 0), value=offsets)
        index[1:, 0], index[0, 0] = offsets + 1, offsets + 2
    return index


@functools.lru_cache(maxsize=32)
def _spline(old, new, dtype, device):
    """(new, old) matrix from values at `old` offsets to values at `new` ones, by BEiT's rule.

    The old offsets move to 0, +-1, +-(1+q), +-(1+q+q^2), ... with q such that they reach the new
    ends: near neighbours keep their bias, far ones are stretched. Between them runs a not-a-knot
    cubic spline; that is linear in the values, so all of it is one matrix.
    """
    n, reach, low, high = old // 2, new // 2, 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**n) / (1 - q) > reach else (q, high)
    x = np.cumsum(q ** np.arange(n))
    x = np.concatenate([-x[::-1], [0], x])
    y = np.arange(-reach, reach + 1).clip(x[0], x[-1])
    x, y, knots = x / x[-1], y / x[-1], x[2:-2] / x[-1]        # to [-1, 1], or cubes lose digits

    def basis(at):                                     # 1, x, x^2, x^3 and max(x - knot, 0)^3
        return np.hstack([at[:, None] ** np.arange(4), np.maximum(at[:, None] - knots, 0) ** 3])

    weights = np.linalg.solve(basis(x).T, basis(y).T).T
    return torch.from_numpy(weights).to(device, dtype)


def resize_table(table, old, new):
    """Relative position table ((2h-1)(2w-1) [+3], H) from grid `old` to `new`; the last 3 stay."""
    if min(old) < 3:
        raise ValueError(f"relative positions of a {old[0]}x{old[1]} grid are too few to resize")
    (a, b), (c, d) = [(2 * h - 1, 2 * w - 1) for h, w in (old, new)]
    rows, cols = (_spline(*n, table.dtype, table.device) for n in ((a, c), (b, d)))
    offsets = torch.einsum("ca,db,abh->cdh", rows, cols, table[:a * b].unflatten(0, (a, b)))
    return torch.cat([offsets.flatten(0, 1), table[a * b:]])

