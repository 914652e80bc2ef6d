"""Derived randomness: a random number is a function of a key and of the image's index.

    u = rng.uniform(index, 4, seed, epoch, "crop")     # (B, 4): four numbers for each image

The random numbers of image 17 do not depend on its place in the batch, on the number of processes
or workers, or on whether the run was resumed. So a checkpoint contains no random state, and a
visualization of image 17 can be reproduced later.

The strings name purposes and are part of the key: renaming one changes the results of a run.

The generator is counter-based: it hashes (key, image, position) with the finalizer of SplitMix64
(Steele, Lea and Flood, 2014) and uses the top bits. Integer arithmetic on int64 tensors wraps
around, so it runs in batches on any device: about 100 million numbers per second on two cores.
"""
import hashlib
import math

import torch

GOLDEN = 0x9E3779B97F4A7C15 - 2**64       # 2^64 / golden ratio, odd: the increment of SplitMix64


def key(*parts):
    """A stable hash of ints and strings, a signed 64-bit int. Their order matters."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def generator(*parts):
    """A torch.Generator for what is drawn once for all images, such as the order of an epoch."""
    return torch.Generator().manual_seed(key(*parts) & (2**63 - 1))


def _shift(x, bits):
    """Logical right shift: torch's >> copies the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x):
    """The finalizer of SplitMix64, in place: memory traffic decides its speed."""
    x.bitwise_xor_(_shift(x, 30)).mul_(0xBF58476D1CE4E5B9 - 2**64)
    x.bitwise_xor_(_shift(x, 27)).mul_(0x94D049BB133111EB - 2**64)
    return x.bitwise_xor_(_shift(x, 31))


def _bits(index, shape, parts):
    """(B,) image indices -> (B, *shape) int64 with 64 random bits each."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    start = _mix(index.long() * GOLDEN + key(*parts))        # (B,), one stream per image
    counter = torch.arange(1, math.prod(shape) + 1, device=index.device) * GOLDEN
    return _mix(start[:, None] + counter).view(len(index), *shape)


def uniform(index, shape, *parts):
    """(B,) image indices -> (B, *shape) float32 in [0, 1), in steps of 2^-24."""
    return _shift(_bits(index, shape, parts), 40).float().mul_(2.0**-24)


def normal(index, shape, *parts):
    """(B,) image indices -> (B, *shape) float32, standard normal.

    Box-Muller transform of two uniform numbers, taken from the top and the low end of 64 bits.
    """
    bits = _bits(index, shape, parts)
    u = _shift(bits, 40).float().add_(0.5).mul_(2.0**-24)    # half a step up: never log(0)
    radius = u.log_().mul_(-2).sqrt_()
    angle = bits.bitwise_and_(0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return radius.mul_(angle.cos_())
