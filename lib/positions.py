"""Positions of patches: sine-cosine tables, relative position indices, and resizing of both.

    table = positions.sincos(768, (14, 14))                           # (N, D), fixed
    pos = positions.resize_positions(pos, (14, 14), (16, 16))         # (1, L, D), learned or fixed
    index = positions.relative_index((14, 14))                        # (L, L), rows of a table
    table = positions.resize_table(table, (14, 14), (16, 16))         # a row for each offset

A grid is (rows, columns) of patches; the N patches are in raster order. L tokens are `prefix` class
and register tokens, and the patches; D width, H heads. Each rule follows the code of the method
that it is named after, because trained weights only work with the rule of their method.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F


def coordinates(grid, device=None):
    """Row and column of every patch of a grid: two (N,) int64 tensors."""
    h, w = grid
    row, col = torch.arange(h, device=device), torch.arange(w, device=device)
    return row.repeat_interleave(w), col.repeat(h)


def sincos(dim, grid, order="sincos_row"):
    """Fixed 2-D sine-cosine table (N, D) float32, for integer coordinates.

    The four quarters of D are sin(row), cos(row), sin(column), cos(column) for "sincos_row"
    (MoCo v3, CAE); for "sincos_col" (MAE) the column comes first. ValueError: 4 does not divide D.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))         # (D/4,)
    row, col = (axis[:, None] * omega for axis in coordinates(grid))                     # (N, D/4)
    first, second = (row, col) if order == "sincos_row" else (col, row)
    return torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], 1).float()


def resize_positions(pos, old, new, rule="dino"):
    """Positions (1, L, D) from grid `old` to grid `new`, bicubic; a row of the class token is kept.

    Rule "size" gives interpolate() the new size (DeiT, MAE, BEiT). Rule "dino" (DINO, iBOT, DINOv2
    without registers) gives it a scale factor, with 0.1 added to the new side to avoid rounding
    down. That also shifts the sampling points, so features of these models need this rule. Rule
    "antialias" (DINOv2 with registers, timm) is "size" with a filter that widens on a smaller grid.
    """
    if new == old:
        return pos
    prefix = pos.shape[1] - old[0] * old[1]
    table = pos[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)                   # (1, D, h, w)
    target = dict(size=new)
    if rule == "dino":
        target = dict(scale_factor=tuple((n + 0.1) / o for n, o in zip(new, old)))
    table = F.interpolate(table, mode="bicubic", antialias=rule == "antialias", **target)
    return torch.cat([pos[:, :prefix], table.flatten(2).transpose(1, 2)], 1)


def relative_index(grid, prefix=1, device=None):
    """(L, L) int64: the row of the relative position table for each (query, key) pair (BEiT).

    The first (2h-1)(2w-1) rows are the offsets, query minus key, of a grid (h, w). Three more rows
    are for class token to patch, patch to class token, and class token to itself; register tokens
    use the rows of the class token.
    """
    h, w = grid
    row, col = coordinates(grid, device)
    index = (row[:, None] - row + h - 1) * (2 * w - 1) + (col[:, None] - col + w - 1)    # (N, N)
    if prefix:
        offsets = (2 * h - 1) * (2 * w - 1)
        index = F.pad(index, (prefix, 0, prefix, 0), value=offsets)
        index[prefix:, :prefix], index[:prefix, :prefix] = offsets + 1, offsets + 2
    return index


@functools.lru_cache(maxsize=32)
def _spline_matrix(old, new, dtype, device):
    """(new, old) matrix from values at `old` offsets to values at `new` offsets, by BEiT's rule.

    The old offsets are placed at 0, +-1, +-(1+q), +-(1+q+q^2), ... where q is such that the last
    one is the largest new offset: near neighbors keep their bias, and the biases of far ones are
    stretched. A not-a-knot cubic spline interpolates between them. It is linear in the values, so
    the result is one matrix. Equal numbers of offsets give the identity: q is at least 1.01, so the
    rule would shift even these (BEiT's code resizes square grids only, and only if they differ).
    """
    if old == new:
        return torch.eye(old, dtype=dtype, device=device)
    n, reach, low, high = old // 2, new // 2, 1.01, 1.5                     # q by bisection
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**n) / (1 - q) > reach else (q, high)
    x = np.cumsum(q ** np.arange(n))
    x = np.concatenate([-x[::-1], [0], x])
    y = np.arange(-reach, reach + 1).clip(x[0], x[-1])
    x, y, knots = x / x[-1], y / x[-1], x[2:-2] / x[-1]    # to [-1, 1], so that cubes stay precise

    def basis(z):                                          # 1, z, z^2, z^3, max(z - knot, 0)^3
        return np.hstack([z[:, None] ** np.arange(4), np.maximum(z[:, None] - knots, 0) ** 3])

    weights = np.linalg.solve(basis(x).T, basis(y).T).T
    return torch.from_numpy(weights).to(device, dtype)


def resize_table(table, old, new):
    """Relative position table ((2h-1)(2w-1) [+3], H) from grid `old` to grid `new`.

    The three rows of the class token, if any, are kept. ValueError: a side of `old` below 3.
    """
    if min(old) < 3:
        raise ValueError(f"relative positions of a {old[0]}x{old[1]} grid cannot be resized: both "
                         "sides must be 3 or more")
    (a, b), (c, d) = [(2 * h - 1, 2 * w - 1) for h, w in (old, new)]
    rows, cols = (_spline_matrix(*n, table.dtype, table.device) for n in ((a, c), (b, d)))
    offsets = torch.einsum("ca,db,abh->cdh", rows, cols, table[:a * b].unflatten(0, (a, b)))
    return torch.cat([offsets.flatten(0, 1), table[a * b:]])


def resize_state(state, old, new, rule="dino"):
    """Resizes, in the state dict of a ViT, its absolute and relative positions from grid `old` to
    grid `new`. Errors: those of resize_table()."""
    for name in state if new != old else ():
        if name == "pos_embed":
            state[name] = resize_positions(state[name], old, new, rule)
        elif name.endswith("relative_position_bias_table"):
            state[name] = resize_table(state[name], old, new)
