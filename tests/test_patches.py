"""Patch tokens: raw blocks, the normalized last block, padding."""
import torch
from small_models import make_encoder, make_model

from probes import patches


@torch.no_grad()
def test_tokens_are_those_of_raw_blocks_or_of_the_last_block_after_the_norm():
    model, x = make_model(make_encoder(embed_dim=24)), torch.randn(2, 3, 40, 24)
    z = patches.extract_patches(model, x, [0, 2])
    outputs, _ = model.encoder.layers(x, [0, 2], norm=False)
    for found, expected in zip(z.split(24, 3), outputs):
        assert found.equal(expected[:, 1:].unflatten(1, (5, 3)))
    normalized = patches.extract_patches(model, x)
    assert normalized.equal(model.encoder(x)[:, 1:].unflatten(1, (5, 3)))
    padded = patches.extract_patches(model, x[:, :, :35, :17])
    assert padded.shape == (2, 5, 3, 24)


def test_deepest_patch():
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[4:16, 8:32] = True                                  # rows 1 to 3, columns 2 to 7
    assert patches.deepest_patch(mask, 4) == (2, 3)
    assert patches.deepest_patch(torch.zeros(32, 32, dtype=torch.bool), 4) is None
