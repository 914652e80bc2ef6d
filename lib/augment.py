"""Image augmentations for self-supervised training, computed for a whole batch on its device.

    key = seed, epoch, view_number
    u = rng.uniform(index, 22, *key, "box")                           # index: (B,) image indices
    boxes = crop_boxes(u, height, width, torch.tensor(view.scale), torch.tensor(view.ratio))
    params = sample_params(view, index, *key)                         # view: a data.View
    x = crop(pixels, boxes, view.size, view.interpolation, params["flip"])
    x = augment_colors(x, params)                                     # normalized, for the network

All random numbers come from lib/rng.py and are sampled before any pixel is computed. The functions
that compute pixels take images and one row of parameters for each image, and are deterministic. The
results equal torchvision's (crop, flip, jitter, gray, solarize) and Pillow's (resize kernels, blur)
up to rounding; tests/test_augment.py compares them. data.py calls these functions.
"""
import torch
import torch.nn.functional as F

from lib import rng

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # ImageNet, of RGB / 255

# --------------------------------------------------------------------------------------------------
# Sampling the parameters


def crop_boxes(u, height, width, scale, ratio):
    """Boxes of RandomResizedCrop: (..., 22) uniform numbers -> (..., 4) int64 top, left, height,
    width, in pixels.

    There are ten tries for area and aspect ratio. If none fits, the box is the largest central one
    of an allowed ratio, as in torchvision. height, width: of the image, in pixels. scale (area of
    the crop / of the image), ratio (width / height): (2,) or (..., 2) tensors, minimum and maximum.
    """
    (s0, s1), (r0, r1) = scale[..., None].unbind(-2), ratio[..., None].unbind(-2)
    area = height * width * (s0 + (s1 - s0) * u[..., :10])
    aspect = (r0.log() + (r1 / r0).log() * u[..., 10:20]).exp()                  # log-uniform
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)                      # (..., 10)
    first, any_fits = fits.int().argmax(-1, keepdim=True), fits.any(-1, keepdim=True)
    h = torch.where(any_fits, h.gather(-1, first), (width / r0).round().clamp(max=height))
    w = torch.where(any_fits, w.gather(-1, first), (height * r1).round().clamp(max=width))
    top = torch.where(any_fits, u[..., 20:21] * (height - h + 1), (height - h) / 2)
    left = torch.where(any_fits, u[..., 21:22] * (width - w + 1), (width - w) / 2)
    return torch.cat([top, left, h, w], -1).long()


def sample_params(view, index, *key):
    """All random parameters of a data.View except the box, for the images with indices (B,).

    Returns a dict of CPU tensors with B rows: flip and gray (bool), op and factor (the order and
    the factors of `jitter`), radius (of the blur; 0: none), threshold (of solarize; 2: none).
    """
    def uniform(shape, low, high, purpose):
        return low + (high - low) * rng.uniform(index, shape, *key, purpose)

    def chance(p, purpose):
        return rng.uniform(index, (), *key, purpose) < p

    low = torch.tensor([max(0.0, 1 - s) for s in view.jitter[:3]] + [-view.jitter[3]])
    high = torch.tensor([1 + s for s in view.jitter[:3]] + [view.jitter[3]])
    factor = torch.where(chance(view.jitter_p, "jitter")[:, None],
                         uniform(4, low, high, "factor"), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    op = uniform(4, 0, 1, "order").argsort(1)                                    # a permutation
    steps = 4 if view.jitter_p > 0 else 0
    return {"flip": chance(view.flip, "flip"),
            "op": op[:, :steps],
            "factor": factor.gather(1, op)[:, :steps],
            "gray": chance(view.gray_p, "grey"),       # this spelling is part of the random key
            "radius": chance(view.blur_p, "blur") * uniform((), *view.blur_sigma, "radius"),
            "threshold": torch.where(chance(view.solarize_p, "solarize"), 128 / 255, 2.0)}


# --------------------------------------------------------------------------------------------------
# Crop, resize and flip, as two matrix products


def crop(x, box, size, kernel="bicubic", flip=None):
    """(B, 3, height, width) uint8 -> (B, 3, size, size) float32 in [0, 1].

    box: (B, 4) or (1, 4), as from `crop_boxes`. flip: (B,) bool or None, mirrors left and right.
    Computed as rows @ x @ columns^T, with one matrix of resampling weights for each axis.
    """
    rows = resample_weights(box[:, 0], box[:, 2], x.shape[2], size, kernel)
    columns = resample_weights(box[:, 1], box[:, 3], x.shape[3], size, kernel, flip)
    x = (rows[:, None] @ x.float()).flatten(1, 2) @ columns.mT     # the channels share this product
    return x.unflatten(1, (-1, size)).mul_(1 / 255).clamp_(0, 1)   # bicubic overshoots


def resample_weights(start, length, size, out, kernel, flip=None):
    """Weights (B, out, size) that resample the segments [start, start + length) of an axis, both
    (B,) in pixels, from `size` input pixels to `out` output pixels.

    Row i has the weights of output pixel i. Where a segment shrinks, the kernel is wider by the
    same factor: this is the antialiasing. Pixels outside the segment have weight 0, as if it had
    been cut out first.
    """
    scale = length[:, None] / out                                                # (B, 1)
    stretch = scale.clamp(min=1)
    place = torch.arange(out, device=start.device) + 0.5
    if flip is not None:
        place = torch.where(flip[:, None], out - place, place)     # mirroring here is free
    center = (start[:, None] + place * scale) / stretch                          # (B, out)
    pixel = torch.arange(size, device=start.device) + 0.5
    weight = KERNELS[kernel]((pixel / stretch)[:, None] - center[:, :, None])    # (B, out, size)
    weight *= ((pixel > start[:, None]) & (pixel < (start + length)[:, None]))[:, None]
    return weight.div_(weight.sum(-1, keepdim=True))


def triangle(x):
    return (1 - x.abs_()).clamp_(min=0)


def cubic(x):
    """Keys' kernel with a = -1/2, as in Pillow; a sum of truncated powers, so without branches."""
    near, far = (1 - x.abs_()).clamp_(min=0), (2 - x).clamp_(min=0)
    return (far * far).mul_(far.sub_(1)).mul_(0.5).add_((near * near).mul_(1 - 2 * near))


def lanczos(x):
    return torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)


KERNELS = {"bilinear": triangle, "bicubic": cubic, "lanczos": lanczos}

# --------------------------------------------------------------------------------------------------
# Colors: x is (B, 3, S, S) float32 in [0, 1], RGB

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)                                 # values of `op`


def augment_colors(x, params):
    """Color jitter, gray, blur, solarize, normalize, in place. params: see `sample_params`."""
    jitter(x, params["op"], params["factor"])
    apply(lambda x, _: luma(x).expand_as(x), x, params["gray"], params["gray"])
    apply(blur, x, params["radius"] > 0, params["radius"])
    apply(solarize, x, params["threshold"] < 1, params["threshold"])
    return normalize(x)


def apply(transform, x, chosen, parameter):
    """x[chosen] = transform(x[chosen], parameter[chosen]), in place.

    chosen and parameter, both (B,), are on the CPU, so the rows are known without waiting for the
    GPU.
    """
    rows = chosen.nonzero().flatten()
    if len(rows):
        parameter = parameter[rows].to(x.device, non_blocking=True)
        rows = rows.to(x.device, non_blocking=True)
        x.index_copy_(0, rows, transform(x.index_select(0, rows), parameter))


def jitter(x, op, factor):
    """Color jitter, in place. op, factor: (B, steps) on the CPU, the operation of each step and its
    factor.

    Brightness, contrast and saturation have one formula, x <- factor x + (1 - factor) other, where
    other is black, the mean luma, or the luma. So one step handles all images of the batch,
    although each has its own order of operations.
    """
    weight = torch.stack([(1 - factor) * (op != HUE), op == CONTRAST, op == SATURATION], -1)
    weight = weight.to(x.device, non_blocking=True)[..., None, None, None]       # (B, steps, 3, ..)
    for step in range(op.shape[1]):
        amount, contrast, saturation = weight[:, step].unbind(1)
        gray = luma(x)
        mean = gray.mean((2, 3), keepdim=True)
        x.lerp_(gray.mul_(saturation).add_(mean.mul_(contrast)), amount).clamp_(0, 1)
        apply(adjust_hue, x, (op[:, step] == HUE) & (factor[:, step] != 0), factor[:, step])
    return x


def luma(x):
    """(B, 3, S, S) -> (B, 1, S, S): gray with the weights of ITU-R 601, rounded as torchvision."""
    return x[:, :1].mul(0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def adjust_hue(x, turn):
    """Rotates the hue by (B,) turns. The largest and the smallest channel keep their values."""
    r, g, b = x.split(1, 1)
    top, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = top - low
    per = 1 / chroma.clamp(min=1e-12)                                            # gray: any hue
    # Hue in sixths, by which channel is the largest; lerp by 0 or 1 is torch.where, but 4x faster.
    not_red, not_green = (top - r).sign_(), (top - g).sign_()
    h = (b - r).mul_(per).add_(2).lerp_((r - g).mul_(per).add_(4), not_green)
    h = (g - b).mul_(per).lerp_(h, not_red)
    h = h.add_(6 * turn.view(-1, 1, 1, 1))
    h = h.sub_((h / 6).floor_().mul_(6))                                         # h mod 6
    ramps = (h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()       # red, green, blue
    return torch.cat([ramp.clamp_(0, 1).mul_(chroma).add_(low) for ramp in ramps], 1)


def blur(x, radius):
    """Pillow's Gaussian blur, radius (B,) in pixels, at most 2.4: three box blurs, computed here as
    one kernel of 13 pixels along each axis.

    A box has a fractional length, chosen to give the variance, and fractional weights at its ends
    (Gwosdek et al., 2011, eq. 7, 11, 14). The border pixels are repeated once, before the combined
    kernel; Pillow repeats them before each of the three.
    """
    variance = radius.square() / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()                      # 0 or 1 pixel
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1).square()))
    reach, place = (whole + part)[:, None, None], torch.arange(13, device=x.device)
    box = (reach + 1 - (place[:, None] - place).abs()).clamp_(0, 1).div_(2 * reach + 1)
    kernel = (box @ box @ box)[:, 6].repeat_interleave(3, 0)                     # (3B, 13)
    planes = F.pad(x.flatten(0, 1)[None], (6, 6, 6, 6), mode="replicate")
    for along in kernel[:, None, None], kernel[:, None, :, None]:
        planes = F.conv2d(planes, along, groups=len(kernel))
    return planes.view_as(x)


def solarize(x, threshold):
    """Inverts all values >= threshold (B,)."""
    return torch.where(x >= threshold.view(-1, 1, 1, 1), 1 - x, x)


# --------------------------------------------------------------------------------------------------
# Normalization


def normalize(x, mean=MEAN, std=STD):
    """(B, 3, S, S) in [0, 1] -> about mean 0 and standard deviation 1, in place."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(x.device, non_blocking=True) for v in (mean, std))
    return x.sub_(mean).div_(std)


def denormalize(x, mean=MEAN, std=STD):
    """(..., 3, S, S) normalized -> uint8: the inverse of normalize(), up to rounding."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return (x.float() * std + mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
