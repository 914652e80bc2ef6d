"""Colors of classes in figures."""
import functools

import torch


@functools.cache
def class_colors():
    """(256, 3) uint8: 0 is black, for background and ignored pixels; 1 ... 255 differ as much as
    possible, the first ones most. Each is the color of a grid that is farthest in CIELAB from all
    before it; very dark, very light and gray colors are left out."""
    side = torch.linspace(0, 1, 18)
    rgb = torch.cartesian_prod(side, side, side)
    lab = to_lab(rgb)
    chosen = (lab[:, 0] > 35) & (lab[:, 0] < 92) & (lab[:, 1:].norm(dim=1) > 25)
    rgb, lab = rgb[chosen], lab[chosen]
    picked = [int((rgb - torch.tensor([1.0, 0.0, 0.0])).norm(dim=1).argmin())]         # red first
    nearest = (lab - lab[picked[0]]).norm(dim=1)
    for _ in range(254):
        picked.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (lab - lab[picked[-1]]).norm(dim=1))
    colors = (255 * rgb[picked]).round().to(torch.uint8)
    return torch.cat([torch.zeros(1, 3, dtype=torch.uint8), colors])


def to_lab(rgb):
    """sRGB (..., 3) from 0 to 1 -> CIELAB (..., 3) at white point D65: equal distances look about
    equally large."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                                 [0.0193, 0.1192, 0.9505]]).T
    xyz = xyz / torch.tensor([0.9505, 1.0, 1.089])
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]),
                        200 * (f[..., 1] - f[..., 2])], -1)
