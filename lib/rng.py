"""Derived randomness: every random number is a function of what it is for and of which image.

    u = rng.uniform(index, 4, seed, epoch, "crop")     # (B, 4): four numbers for each image

The numbers of image 17 are the same wherever it stands in the batch, on one process or on eight,
with 0 or 16 workers, in a run that was killed and resumed or in one that was not. So a checkpoint
holds no random state, and the picture of sample 17 is the same tomorrow.

It is a counter-based generator: hash (key, image, position) with the finaliser of SplitMix64
(Steele, Lea and Flood, 2014) and read the top bits. Integer arithmetic on int64 tensors wraps, so
it runs in batches on any device: about 100 million numbers a second on two cores.
"""
import hashlib
import math

import torch

GOLDEN = 0x9E3779B97F4A7C15 - 2**64       # 2^64 / golden ratio, odd: the increment of SplitMix64


def key(*parts):
    """A stable 64-bit number (as a signed int) from any ints and strings; the order matters."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def generator(*parts):
    """A torch.Generator for what is drawn once for all images, such as the order of an epoch."""
    return torch.Generator().manual_seed(key(*parts) & (2**63 - 1))


def _shift(x, bits):
    """Logical right shift: torch's own copies the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x):
    """The finaliser, in place: the arrays are large and memory traffic is all it costs."""
    x.bitwise_xor_(_shift(x, 30)).mul_(0xBF58476D1CE4E5B9 - 2**64)
    x.bitwise_xor_(_shift(x, 27)).mul_(0x94D049BB133111EB - 2**64)
    return x.bitwise_xor_(_shift(x, 31))


def _bits(index, shape, parts):
    """(B,) image numbers -> (B, *shape) int64 with 64 random bits each."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    start = _mix(index.long() * GOLDEN + key(*parts))        # (B,) one stream for each image
    counter = torch.arange(1, math.prod(shape) + 1, device=index.device) * GOLDEN
    return _mix(start[:, None] + counter).view(len(index), *shape)


def uniform(index, shape, *parts):
    """(B,) image numbers -> (B, *shape) float32 in [0, 1), in steps of 2^-24."""
    return _shift(_bits(index, shape, parts), 40).float().mul_(2.0**-24)


def normal(index, shape, *parts):
    """(B,) image numbers -> (B, *shape) float32, standard normal: Box and Muller's transform of two
    uniform numbers from the top and the low end of 64 bits."""
    bits = _bits(index, shape, parts)
    u = _shift(bits, 40).float().add_(0.5).mul_(2.0**-24)    # half a step up: never log(0)
    radius = u.log_().mul_(-2).sqrt_()
    angle = bits.bitwise_and_(0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return radius.mul_(angle.cos_())
