"""lib/rng.py: the distributions are right, and only the key and the image number matter."""
import torch

from lib import rng

INDEX = torch.arange(2000)


def test_uniform_numbers_are_uniform_and_uncorrelated():
    u = rng.uniform(INDEX, 100, 0, "a")
    assert u.min() >= 0 and u.max() < 1
    fraction = torch.histc(u, 10, 0, 1) / u.numel()
    assert (fraction - 0.1).abs().max() < 0.005
    z = (u - 0.5) * 12**0.5                                      # unit variance
    for shifted in (z[:, 1:] * z[:, :-1], z[1:] * z[:-1]):       # along the row, between images
        assert shifted.mean().abs() < 0.01
    assert (z * (rng.uniform(INDEX, 100, 1, "a") - 0.5)).mean().abs() < 0.01      # between keys


def test_normal_numbers_have_the_moments_of_a_normal():
    n = rng.normal(INDEX, 100, 0, "a").double()
    moments = [n.pow(k).mean().item() for k in (1, 2, 3, 4)]
    for found, expected in zip(moments, (0, 1, 0, 3)):
        assert abs(found - expected) < 0.05
    tail = (n.abs() > 1.959964).double().mean().item()
    assert abs(tail - 0.05) < 0.003


def test_numbers_depend_on_the_key_and_the_image_only():
    u = rng.uniform(INDEX, (2, 3), 7, "crop")
    assert torch.equal(u[5:9], rng.uniform(INDEX[5:9], (2, 3), 7, "crop"))
    assert torch.equal(u.flip(0), rng.uniform(INDEX.flip(0), (2, 3), 7, "crop"))
    assert not torch.equal(u, rng.uniform(INDEX, (2, 3), 7, "flip"))
    assert not torch.equal(u, rng.uniform(INDEX, (2, 3), 8, "crop"))
    assert len(u[:, 0, 0].unique()) > 1990


def test_the_generator_gives_the_recorded_numbers():
    """A changed generator would silently change every run and every visualization."""
    assert rng.key(0, "a") == 9026062096370171638
    u = rng.uniform(torch.tensor([0, 1]), 2, 0, "a").flatten()
    assert torch.allclose(u, torch.tensor([0.045269, 0.948206, 0.397304, 0.920443]), atol=1e-6)
