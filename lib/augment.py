"""TODO lib/augment"""

import torch
import torch.nn.functional as F

from lib import rng

# B images, V views, H, W pixels of an image, S of a view

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # ImageNet, of RGB / 255


# --------------------------------------------------------------------------------------------------
# Augmentations: (B, 3, S, S) float32 in [0, 1] and parameters for each image, all images at once


def crop_boxes(u, height, width, scale, ratio):
    """RandomResizedCrop: (..., 22) uniform numbers -> (..., 4) int64 top, left, height, width.

    Ten tries for area and ratio; if none fits, the largest central box of an allowed ratio, as
    torchvision does. height, width: of the image. scale, ratio: (2,) or (..., 2) tensors.
    """
    (s0, s1), (r0, r1) = scale[..., None].unbind(-2), ratio[..., None].unbind(-2)
    area = height * width * (s0 + (s1 - s0) * u[..., :10])
    aspect = (r0.log() + (r1 / r0).log() * u[..., 10:20]).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)                      # (..., 10)
    first, some = fits.int().argmax(-1, keepdim=True), fits.any(-1, keepdim=True)
    h = torch.where(some, h.gather(-1, first), (width / r0).round().clamp(max=height))
    w = torch.where(some, w.gather(-1, first), (height * r1).round().clamp(max=width))
    top = torch.where(some, u[..., 20:21] * (height - h + 1), (height - h) / 2)
    left = torch.where(some, u[..., 21:22] * (width - w + 1), (width - w) / 2)
    return torch.cat([top, left, h, w], -1).long()


def triangle(x):
    return (1 - x.abs_()).clamp_(min=0)


def cubic(x):
    """Keys' kernel with a = -1/2, PIL's, as a sum of truncated powers: no branch."""
    near, far = (1 - x.abs_()).clamp_(min=0), (2 - x).clamp_(min=0)
    return (far * far).mul_(far.sub_(1)).mul_(0.5).add_((near * near).mul_(1 - 2 * near))


def lanczos(x):
    return torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)


KERNELS = {"bilinear": triangle, "bicubic": cubic, "lanczos": lanczos}


def resample(start, length, size, out, kernel, flip=None):
    """(B,) pieces [start, start + length) of an axis of `size` pixels -> (B, out, size) weights.

    Row i mixes output pixel i. Where the piece shrinks, the kernel is as much wider: antialiasing.
    Pixels outside of the piece weigh nothing, as if it had been cut out first.
    """
    scale = length[:, None] / out                                                # (B, 1)
    stretch = scale.clamp(min=1)
    place = torch.arange(out, device=start.device) + 0.5
    if flip is not None:
        place = torch.where(flip[:, None], out - place, place)                   # at no cost
    centre = (start[:, None] + place * scale) / stretch                          # (B, out)
    pixel = torch.arange(size, device=start.device) + 0.5
    weight = KERNELS[kernel]((pixel / stretch)[:, None] - centre[:, :, None])    # (B, out, size)
    weight *= ((pixel > start[:, None]) & (pixel < (start + length)[:, None]))[:, None]
    return weight.div_(weight.sum(-1, keepdim=True))


def crop(x, box, size, kernel="bicubic", flip=None):
    """(B, 3, H, W) uint8, (B or 1, 4) boxes -> (B, 3, S, S) in [0, 1]: rows @ x @ columns."""
    rows = resample(box[:, 0], box[:, 2], x.shape[2], size, kernel)
    columns = resample(box[:, 1], box[:, 3], x.shape[3], size, kernel, flip)
    return mix(rows, x.float(), columns).mul_(1 / 255).clamp_(0, 1)            # bicubic overshoots


def mix(rows, x, columns):
    """rows x columns^T of every image and channel; the channels share the second product."""
    return ((rows[:, None] @ x).flatten(1, 2) @ columns.mT).unflatten(1, (x.shape[1], -1))


def luma(x):
    return x[:, :1].mul(0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def adjust_hue(x, turn):
    """Rotates the hue by (B,) turns; the largest and the smallest channel keep their values."""
    r, g, b = x.split(1, 1)
    top, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = top - low
    per = 1 / chroma.clamp(min=1e-12)                                            # grey: any hue
    # Hue in sixths, by which channel is the largest; lerp by 0 or 1 is torch.where, but 4 x faster.
    not_red, not_green = (top - r).sign_(), (top - g).sign_()
    h = (b - r).mul_(per).add_(2).lerp_((r - g).mul_(per).add_(4), not_green)
    h = (g - b).mul_(per).lerp_(h, not_red)
    h = h.add_(6 * turn.view(-1, 1, 1, 1))
    h = h.sub_((h / 6).floor_().mul_(6))                                         # h mod 6
    ramps = (h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()       # red, green, blue
    return torch.cat([ramp.clamp_(0, 1).mul_(chroma).add_(low) for ramp in ramps], 1)


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def jitter(x, op, factor):
    """Colour jitter in place. op, factor: (B, T) on the CPU, what is done t-th and how strongly.

    The first three are one formula, x <- factor x + (1 - factor) other, with black, the mean luma
    or the luma as the other picture: done for all images at once, whatever the order of each.
    """
    weight = torch.stack([(1 - factor) * (op != HUE), op == CONTRAST, op == SATURATION], -1)
    weight = weight.to(x.device, non_blocking=True)[..., None, None, None]       # (B, T, 3, 1..)
    for t in range(op.shape[1]):
        amount, contrast, saturation = weight[:, t].unbind(1)
        grey = luma(x)
        mean = grey.mean((2, 3), keepdim=True)
        x.lerp_(grey.mul_(saturation).add_(mean.mul_(contrast)), amount).clamp_(0, 1)
        apply(adjust_hue, x, (op[:, t] == HUE) & (factor[:, t] != 0), factor[:, t])
    return x


def blur(x, radius):
    """PIL's Gaussian blur of (B,) radii up to 2.4: three box blurs, here as one kernel of 13 pixels
    along each axis. The edges go on for ever; by PIL they are repeated before each of the three.

    A box has a fractional length with the variance wanted; its ends count in part (Gwosdek et al.,
    2011, eq. 7, 11, 14).
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
    return torch.where(x >= threshold.view(-1, 1, 1, 1), 1 - x, x)


def apply(transform, x, chosen, parameter):
    """x[chosen] = transform(x[chosen], parameter[chosen]), in place.

    chosen and parameter are on the CPU, so the rows are known without waiting for the GPU.
    """
    rows = chosen.nonzero().flatten()
    if len(rows):
        parameter = parameter[rows].to(x.device, non_blocking=True)
        rows = rows.to(x.device, non_blocking=True)
        x.index_copy_(0, rows, transform(x.index_select(0, rows), parameter))


def sample_params(view, index, *key):
    """What happens to each of (B,) images in a view, but its box: dict of (B, ...) on the CPU."""
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
            "grey": chance(view.grey_p, "grey"),
            "radius": chance(view.blur_p, "blur") * uniform((), *view.blur_sigma, "radius"),
            "threshold": torch.where(chance(view.solarize_p, "solarize"), 128 / 255, 2.0)}


def augment_colors(x, dice):
    """Jitter, grey, blur, solarise, normalise: (B, 3, S, S) in [0, 1], in place."""
    jitter(x, dice["op"], dice["factor"])
    apply(lambda x, _: luma(x).expand_as(x), x, dice["grey"], dice["grey"])
    apply(blur, x, dice["radius"] > 0, dice["radius"])
    apply(solarize, x, dice["threshold"] < 1, dice["threshold"])
    return normalize(x)


def normalize(x, mean=MEAN, std=STD):
    """(B, 3, S, S) in [0, 1] -> about mean 0 and deviation 1, in place."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(x.device, non_blocking=True) for v in (mean, std))
    return x.sub_(mean).div_(std)


def denormalize(x, mean=MEAN, std=STD):
    """(..., 3, S, S) normalised -> uint8, for pictures."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return (x.float() * std + mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)

