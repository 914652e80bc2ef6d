"""The shared pass of the diagnostics against the ViT's own forward and against direct formulas."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diagnostics_helpers import options, random, tiny_model

import vit
from diagnostics import inputs, shared_pass
from diagnostics.shared_pass import iterate_blocks, run_shared_pass


def means(model, names, *flags):
    return run_shared_pass(model, options(*flags), names).means


def zero_projection(layer):
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)


@pytest.mark.parametrize("config", [{}, dict(pos="none", rel_pos="shared", layer_scale=0.1,
                                             qkv_bias="split"), dict(class_token=False)])
@torch.no_grad()
def test_iterate_blocks_gives_the_tensors_of_the_forward_pass(config):
    model, x = tiny_model(**config), random(2, 3, 32, 32).float()
    encoder = model.encoder
    tokens, grid = encoder.embed(x)
    explicit, fused = (list(iterate_blocks(model, encoder.blocks, tokens, encoder.num_prefix,
                                           lambda block: encoder.attention_bias(block, grid),
                                           with_weights))
                       for with_weights in (True, False))
    outputs, weights = encoder.layers(x, norm=False, attention=range(3))
    assert torch.equal(explicit[0].before, encoder.split(tokens)[1])
    for i, (b, f) in enumerate(zip(explicit, fused)):
        assert torch.allclose(b.tokens, outputs[i], atol=1e-5)
        assert torch.allclose(b.weights, weights[i], atol=1e-6)
        assert f.weights is None and torch.allclose(f.tokens, b.tokens, atol=1e-5)
        block, heads = encoder.blocks[i], b.heads.transpose(1, 2).flatten(2)
        after = b.before + block.ls1(block.attn.proj(heads))
        assert torch.allclose(after, b.after_attention, atol=1e-5)
        assert not torch.allclose(after, b.out, atol=1e-2)               # control


@torch.no_grad()
def test_identity_blocks_return_the_tokens_in_the_same_order():
    model = tiny_model()
    for block in model.encoder.blocks:
        zero_projection(block.attn.proj)
        zero_projection(block.mlp.fc2)
    tokens, _ = model.encoder.embed(random(2, 3, 32, 32).float())
    *_, last = iterate_blocks(model, model.encoder.blocks, tokens, 1)
    assert torch.equal(last.tokens, tokens)


@torch.no_grad()
def test_precision_applies_to_the_blocks_and_not_to_the_measured_states():
    model = tiny_model()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        tokens, _ = model.encoder.embed(torch.ones(1, 3, 32, 32))
        block = next(iterate_blocks(replace(model, precision=precision), model.encoder.blocks,
                                    tokens, 1))
        assert block.heads.dtype == dtype and block.out.dtype == torch.float32


def test_attention_with_zero_projection_leaves_tokens_unchanged():
    model = tiny_model()
    zero_projection(model.encoder.blocks[1].attn.proj)
    found = means(model, {"depth_similarity"}, "--limit", "4")["depth_similarity"]
    assert found[1] == pytest.approx(1, abs=1e-12) and found[0] < 0.999


def test_means_do_not_depend_on_batches():
    model, names = tiny_model(), set(shared_pass.STATISTICS)
    a, b = (means(model, names, "--limit", "7", "--batch-size", size) for size in ("7", "3"))
    for name in names:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6), name
    fewer = means(model, names, "--limit", "3")                          # control
    assert not torch.allclose(a["nmi"], fewer["nmi"], rtol=1e-4)


def test_centered_similarity_is_without_the_mean_token_of_each_state():
    model, opt = tiny_model(), options("--limit", "8")
    encoder = model.encoder
    encoder.patch_embed.proj.bias.data[:] = 20 * random(encoder.embed_dim)   # equal for all tokens
    with torch.no_grad():
        [(x, *_)] = inputs.iterate_images(model, opt, 8)
        states = [encoder.embed(x)[0], *encoder.layers(x, norm=False)[0]]
    found = means(model, {"token_similarity", "centered_similarity"}, "--limit", "8")
    for z, measured in zip(states, found["centered_similarity"][::2]):
        z = encoder.split(z)[1]
        z = F.normalize(z - z.mean((0, 1)), dim=-1)
        pairs = ~torch.eye(z.shape[1], dtype=torch.bool)
        torch.testing.assert_close(measured.float(), (z @ z.mT)[:, pairs].mean(), atol=1e-5,
                                   rtol=1e-4)
    assert found["token_similarity"][0] > 0.9 > 0.3 > found["centered_similarity"][0]


@torch.no_grad()
def test_final_similarity_is_after_the_final_norm():
    model = tiny_model()
    [(x, *_)] = inputs.iterate_images(model, options("--limit", "4"), 4)
    z, pairs = F.normalize(model.encoder(x)[:, 1:], dim=-1), ~torch.eye(64, dtype=torch.bool)
    found = means(model, {"final_similarity"}, "--limit", "4")["final_similarity"].item()
    assert found == pytest.approx((z @ z.mT)[:, pairs].mean().item(), abs=1e-5)


def test_attention_weights_are_computed_only_if_needed(monkeypatch):
    with_weights, original = [], shared_pass.iterate_blocks

    def record(*args):
        with_weights.append(args[-1])
        return original(*args)

    monkeypatch.setattr(shared_pass, "iterate_blocks", record)
    means(tiny_model(), {"fourier"}, "--limit", "2")
    means(tiny_model(), {"nmi"}, "--limit", "2")
    assert with_weights == [False, True]


def test_window_of_one_patch_makes_attention_local():
    names = {"attention_distance", "nmi"}
    found = means(tiny_model(window=1), names, "--limit", "2")
    assert found["attention_distance"].max() < 1e-6 and found["nmi"].min() > 0.999
    free = means(tiny_model(), names, "--limit", "2")["nmi"]
    wide = means(tiny_model(window=15), names, "--limit", "2")["nmi"]            # 2g - 1: all
    assert torch.allclose(wide, free, atol=1e-7) and wide.max() < 0.999


@pytest.mark.parametrize("window, keys", [(3, 8.16327), (5, 20.8980), (7, 37.7347), (13, 100),
                                          (27, 196)])
def test_mean_number_of_keys_in_a_window(window, keys):
    encoder = vit.ViT(56, 4, embed_dim=4, depth=1, num_heads=1)          # 14 x 14 patches
    mask = encoder.local_mask(window)[1:, 1:]
    assert mask.double().sum(1).mean().item() == pytest.approx(keys, rel=1e-5)
    assert mask.any(1).all()                                             # no query without a key
