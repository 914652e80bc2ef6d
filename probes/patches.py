"""Shared by the probes of single patches: patch tokens of images of any size, resizing, and the
deepest patch of an object."""
import torch
import torch.nn.functional as F

from lib import augment
from probes.common import not_finite


def normalize_images(model, images, std=None):
    """(..., 3, height, width) from 0 to 255 -> the encoder's input, float32 on the device."""
    x = images.to(model.device).float() / 255
    return augment.normalize(x, model.mean, std or model.std)


@torch.no_grad()
def extract_patches(model, x, blocks=None):
    """x (B, 3, height, width) normalized -> patch tokens (B, rows, columns, D) float32.

    The class token is left out. blocks: indices of blocks, whose outputs are concatenated without
    the final norm; None: the last block, with the final norm. Sides that are not a multiple of the
    patch side are padded with 0 on the right and at the bottom. ValueError: the tokens are not
    finite.
    """
    p, (height, width) = model.encoder.patch_size, x.shape[2:]
    x = F.pad(x, (0, -width % p, 0, -height % p))
    with model.autocast():
        outputs, _ = model.encoder.layers(x, blocks or [model.encoder.depth - 1], not blocks)
    tokens = torch.cat([model.encoder.split(z)[1].float() for z in outputs], 2)
    if not tokens.isfinite().all():
        raise not_finite(model)
    return tokens.unflatten(1, (x.shape[2] // p, x.shape[3] // p))


def upsample_maps(maps, factor):
    """(..., C, rows, columns) -> (..., C, factor * rows, factor * columns), bilinear."""
    batch = maps.unsqueeze(0) if maps.ndim == 3 else maps
    out = F.interpolate(batch, scale_factor=float(factor), mode="bilinear", align_corners=False)
    return out[0] if maps.ndim == 3 else out


def resize_image(image, shape):
    """(C, height, width) -> (C, *shape) float32, bilinear, without antialiasing even if it shrinks,
    as in all the published code."""
    return F.interpolate(image[None].float(), tuple(shape), mode="bilinear", align_corners=False)[0]


def resize_labels(labels, shape):
    """(height, width) integers -> the same of another shape, nearest neighbor."""
    return F.interpolate(labels[None, None].float(), tuple(shape), mode="nearest-exact")[0, 0].to(
        labels.dtype)


def deepest_patch(mask, p):
    """The patch (row, column) whose center is farthest from the border of an object, mask (height,
    width) bool; None if the object covers less than half of that patch."""
    depth = depth_at_centers(mask, p)
    row, column = divmod(int(depth.argmax()), depth.shape[1])            # ties: the first
    covered = mask[row * p:(row + 1) * p, column * p:(column + 1) * p].sum()
    return (row, column) if covered >= p * p / 2 else None


def depth_at_centers(mask, p):
    """(height, width) bool -> squared distance (rows, columns) of the center of each patch to the
    nearest pixel outside the mask. Pixels beyond the image border are outside (our choice).

    Exact, in two passes: the nearest such pixel of each column, then the minimum over the columns.
    """
    outside = F.pad(~mask, (1, 1, 1, 1), value=True)     # (height + 2, width + 2)
    y, x = (torch.arange(-1, n - 1).float() for n in outside.shape)
    center_y, center_x = (torch.arange(n // p) * p + (p - 1) / 2 for n in mask.shape)
    down = (center_y[:, None] - y).square()              # (rows, height + 2)
    down = torch.stack([d[:, None].where(outside, torch.inf).amin(0) for d in down])
    along = (center_x[:, None] - x).square()             # (columns, width + 2)
    return torch.stack([(along + d).amin(1) for d in down])
