"""vit.py against numbers of the official modules, and timm."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vit
from lib import positions
from lib.weights import init_vit

TINY = dict(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3)
BEIT = dict(pos="none", rel_pos="shared", layer_scale=0.1, qkv_bias="split", init="beit")


def build(seed=0, scramble=True, **arguments):
    """A small ViT in eval mode; every trained parameter random, so that none can be overlooked."""
    torch.manual_seed(seed)
    model = vit.ViT(**{**TINY, **arguments})
    if scramble:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def images(batch=2, size=32, width=None, seed=1):
    shape = (batch, 3, size, width or size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --------------------------------------------------------------------------------- arithmetic

def wave(shape, s, amp):
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return amp * torch.sin(0.7 * k + s).view(shape)


def golden_block():
    block = vit.Block(8, 2, qkv_bias="split", layer_scale=0.1).double()
    names = ("ls1.gamma ls2.gamma norm1.weight norm1.bias norm2.weight norm2.bias attn.q_bias "
             "attn.v_bias attn.qkv.weight attn.proj.weight attn.proj.bias mlp.fc1.weight "
             "mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias").split()
    state = block.state_dict()
    assert set(names) == set(state)
    block.load_state_dict({name: wave(state[name].shape, s, 0.5) + (name[-8:] == "1.weight" and
                           name.startswith("norm") or name == "norm2.weight")
                           for s, name in enumerate(names, 1)})
    return block


def test_block_with_split_bias_and_layer_scale_gives_the_official_numbers():
    out = golden_block()(wave((1, 5, 8), 40, 1.0))
    close(out[0, 0], torch.tensor([-0.528401, -3.337466, -1.923337, 0.689427, -3.490365, -2.848510,
                                   -1.886143, 1.091664], dtype=torch.float64), 1e-6)
    assert out.sum().item() == pytest.approx(-3.686508375, abs=1e-8)
    assert out.square().sum().item() == pytest.approx(329.954383039, abs=1e-8)


def golden_bias(transposed=False):
    index = positions.relative_index((2, 2))
    return wave((12, 2), 50, 1.0)[index.T if transposed else index].permute(2, 0, 1)[None]


def test_block_with_relative_bias_gives_the_official_numbers_and_a_transposed_index_does_not():
    x = wave((1, 5, 8), 40, 1.0)
    out = golden_block()(x, golden_bias())
    close(out[0, 4], torch.tensor([6.376596, -0.244028, 0.623187, 2.319633, 2.650622, -0.407713,
                                   1.127355, 2.690164], dtype=torch.float64), 1e-6)
    assert out.sum().item() == pytest.approx(-3.935034833, abs=1e-8)
    assert out.square().sum().item() == pytest.approx(327.785663951, abs=1e-8)
    assert (golden_block()(x, golden_bias(transposed=True)) - out).abs().max() > 0.01


def test_relative_index_has_the_published_entries():
    index = positions.relative_index((14, 14))
    spots = {(0, 0): 731, (0, 1): 729, (1, 0): 730, (1, 1): 364, (1, 2): 363, (2, 1): 365,
             (1, 15): 337, (1, 196): 0, (196, 1): 728}
    assert {spot: index[spot].item() for spot in spots} == spots
    assert len(index.unique()) == 732
    close(index[1:, 1:] + index[1:, 1:].T, torch.full((196, 196), 728), 0)
    assert torch.equal(positions.relative_index((14, 14), prefix=0), index[1:, 1:])


@pytest.mark.parametrize("rel_pos", [None, "shared", "block"])
@pytest.mark.parametrize("local", [False, True])
def test_explicit_attention_equals_fused_and_its_rows_sum_to_one(rel_pos, local):
    model = build(rel_pos=rel_pos, layer_scale=0.1)
    mask = model.local_mask(3) if local else None
    tokens, maps = model.layers(images(), [1], attention=(0, 1), attn_mask=mask)
    close(tokens[0], model(images(), attn_mask=mask))
    for a in maps.values():
        close(a.sum(-1), torch.ones(2, 3, 17))
        assert not local or (a[:, :, ~mask] == 0).all() and (a[:, :, mask] > 0).all()


def test_local_mask_is_a_window_around_each_patch_and_does_not_restrict_the_class_token():
    model = build()
    for grid in ((4, 4), (2, 5)):
        mask = model.local_mask(3, grid)
        assert mask[0].all() and mask[:, 0].all()
        for q in range(grid[0] * grid[1]):
            for k in range(grid[0] * grid[1]):
                near = abs(q // grid[1] - k // grid[1]) <= 1 and abs(q % grid[1] - k % grid[1]) <= 1
                assert mask[1 + q, 1 + k] == near
    assert model.local_mask(7).all()
    with pytest.raises(ValueError, match="odd"):
        model.local_mask(4)


@pytest.mark.parametrize("rel_pos", [None, "shared", "block"])
def test_a_vit_with_a_window_applies_the_local_mask_at_every_size(rel_pos):
    model = build(rel_pos=rel_pos)
    windowed, whole = (vit.ViT(**model.config | dict(window=window)).eval() for window in (3, 7))
    for other in windowed, whole:
        other.load_state_dict(model.state_dict())
    for size in 32, 48:                                       # 4 x 4 and 6 x 6 patches
        x = images(size=size)
        mask = model.local_mask(3, (size // 8,) * 2)
        close(windowed(x), model(x, attn_mask=mask))
        assert (windowed(x) - model(x)).abs().max() > 1e-3
    close(whole(images()), model(images()))                   # 7 = 2 * 4 - 1: all patches


def test_local_mask_removes_the_influence_of_distant_patches():
    model, a = build(class_token=False, depth=1), images()
    b = a.clone()
    b[:, :, 24:, 24:] += 1                                    # only the last patch differs
    far, near = slice(0, 10), 15
    mask = model.local_mask(3)
    change = (model(a, attn_mask=mask) - model(b, attn_mask=mask)).abs().amax((0, 2))
    assert (change[far] == 0).all() and change[near] > 0.01
    assert ((model(a) - model(b)).abs().amax((0, 2))[far] > 0).all()


def test_bf16_on_cpu_takes_the_explicit_form_and_stays_near_fp32():
    model, x = build(**BEIT), images()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
        assert model.embed(x)[0].dtype == torch.float32
    assert half.dtype == torch.float32
    assert (half - model(x)).abs().mean() < 0.02


# ---------------------------------------------------------------------------------- positions

def published_sincos(dim, side, row_first):
    """The formula of the two papers' code, number by number."""
    table, q = np.zeros((side * side, dim)), dim // 4
    for n in range(side * side):
        first, second = (n // side, n % side) if row_first else (n % side, n // side)
        for k in range(q):
            a, b = first * 10000 ** (-k / q), second * 10000 ** (-k / q)
            quarters = (math.sin(a), math.cos(a), math.sin(b), math.cos(b))
            table[n, [k, q + k, 2 * q + k, 3 * q + k]] = quarters
    return torch.from_numpy(table).float()


def test_sincos_orders_are_the_published_ones_and_differ():
    row, col = (positions.sincos(64, (14, 14), order) for order in ("sincos_row", "sincos_col"))
    close(row, published_sincos(64, 14, True), 1e-6)
    close(col, published_sincos(64, 14, False), 1e-6)
    close(torch.cat([col[:, 32:], col[:, :32]], 1), row, 1e-6)
    assert (row - col).abs().max() > 1.5


def test_sincos_table_is_stored_and_never_trained():
    model = build(pos="sincos_col")
    assert not model.pos_embed.requires_grad and "pos_embed" in model.state_dict()
    assert (model.pos_embed[:, 0] == 0).all()
    close(model.pos_embed[0, 1:], positions.sincos(192, (4, 4), "sincos_col"), 0)
    assert build(pos="learned").pos_embed.requires_grad


def table14():
    patches = torch.sin(0.37 * torch.arange(14 * 14 * 2)).view(1, 196, 2)
    return torch.cat([torch.full((1, 1, 2), 7.0), patches], 1)


@pytest.mark.parametrize("rule, first, last, middle", [
    ("size", (0.004034, 0.213890, 0.576619, 0.950761), (-0.412058, -0.035488, 0.184989), 0.510112),
    ("dino", (0.004029, 0.212362, 0.573516, 0.947406), (-0.441123, -0.062187, 0.182407), 0.472122)])
def test_positions_at_480_px_have_the_official_values(rule, first, last, middle):
    out = positions.resize_positions(table14(), (14, 14), (30, 30), rule=rule)
    grid = out[0, 1:].view(30, 30, 2)
    assert (out[0, 0] == 7).all()
    close(grid[0, :4, 0], torch.tensor(first), 2e-6)
    close(grid[29, -3:, 1], torch.tensor(last), 2e-6)
    close(grid[15, 15, 0], torch.tensor(middle), 2e-6)


def test_stored_positions_are_used_unchanged_at_their_size_and_resampled_for_another_shape():
    for rule in ("size", "dino"):
        same = positions.resize_positions(table14(), (14, 14), (14, 14), rule=rule)
        assert torch.equal(same, table14())
        other = positions.resize_positions(table14(), (14, 14), (7, 28), rule=rule)
        assert not torch.equal(other, same)


def test_rows_and_columns_are_not_exchanged_in_images_that_are_not_square():
    grid = torch.stack([torch.arange(14.0).repeat_interleave(14), torch.arange(14.0).repeat(14)], 1)
    out = positions.resize_positions(grid[None], (14, 14), (7, 28), rule="size")[0]
    out = out.view(7, 28, 2)
    close(out[:, 0, 0], out[:, 9, 0], 1e-5)                   # channel 0 is the row, constant in it
    close(out[0, :, 1], out[5, :, 1], 1e-5)
    assert out[-1, 0, 0] > 12 and out[0, -1, 1] > 12
    for model in (build(pos="sincos_row"), build(rel_pos="block", pos="none")):
        assert model(images(size=24, width=56)).shape == (2, 1 + 3 * 7, 192)


def test_relative_tables_grow_by_the_geometric_spline_rule():
    """Numbers from SciPy's RectBivariateSpline on BEiT's grid of coordinates."""
    offsets = torch.sin(0.37 * torch.arange(27 * 27 * 2)).view(729, 2)
    table = torch.cat([offsets, torch.tensor([[5.0, 6.0]] * 3)])
    out = positions.resize_table(table, (14, 14), (30, 30))
    assert out.shape == (59 * 59 + 3, 2) and torch.equal(out[-3:], table[-3:])
    grid, old = out[:-3].view(59, 59, 2), offsets.view(27, 27, 2)
    close(grid[28:31, 28:31], old[12:15, 12:15], 1e-5)        # 0 and +-1 stay where they are
    close(grid[0, 0], old[0, 0], 1e-3)                        # so do the ends
    close(grid[3, 5], torch.tensor(GOLDEN_TABLE[0]), 1e-5)
    close(grid[20, 50], torch.tensor(GOLDEN_TABLE[1]), 1e-5)
    smaller = positions.resize_table(table, (14, 14), (6, 6))[:-3].view(11, 11, 2)
    close(smaller[2, 9], torch.tensor(GOLDEN_TABLE[2]), 1e-5)


def test_a_side_of_unchanged_length_keeps_its_relative_biases():
    """For an oblong input only the offsets along its longer side are resized."""
    by_row = torch.randn(27, 3, generator=torch.Generator().manual_seed(0))
    table = torch.cat([by_row.repeat_interleave(27, 0), torch.ones(3, 3)])
    wide = positions.resize_table(table, (14, 14), (14, 20))[:-3].view(27, 39, 3)
    close(wide, by_row[:, None].expand(-1, 39, -1), 1e-5)
    assert (wide[12] - wide[13]).abs().max() > 0.1            # control: rows do differ
    high = positions.resize_table(table, (14, 14), (20, 14))[:-3].view(39, 27, 3)
    close(high, high[:, :1].expand(-1, 27, -1), 1e-5)
    close(high[18:21, 0], by_row[12:15], 1e-5)                # resized: only 0 and +-1 are kept
    assert (high[6, 0] - by_row[0]).abs().max() > 0.1
    assert positions.resize_table(table, (14, 14), (14, 14)).equal(table)


GOLDEN_TABLE = ((1.01556498, 0.89146510), (0.04366464, 0.40065158), (-0.95151538, -0.77605642))


def test_relative_bias_at_another_size_reaches_the_model():
    model, large = build(**BEIT, depth=1), images(size=64)
    table = model.rel_pos_bias.relative_position_bias_table
    _, maps = model.layers(large, attention=[0])
    with torch.no_grad():
        native = build(**BEIT, depth=1, img_size=64)          # the same model made for that size
        native.load_state_dict({**model.state_dict(), "rel_pos_bias.relative_position_bias_table":
                                positions.resize_table(table, (4, 4), (8, 8))})
        close(model(large), native(large), 0)
        table[24] += 1                                        # the offset (0, 0)
    _, moved = model.layers(large, attention=[0])
    diagonal = torch.eye(65, dtype=torch.bool)[1:]
    assert (moved[0][:, :, 1:][:, :, diagonal] > maps[0][:, :, 1:][:, :, diagonal]).all()


# ------------------------------------------------------------------------------------- inputs

@pytest.mark.parametrize("more", [{}, BEIT, {"pos": "sincos_col", "class_token": False},
                                  {"pos": "none", "rel_pos": "block"}])
def test_all_patches_kept_in_any_order_give_the_full_forward_in_that_order(more):
    model, x = build(**more), images()
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s))
                         for s in range(2)])
    mask = model.local_mask(3)
    for extra in ({}, {"attn_mask": mask}):
        cls, patches = model.split(model(x, **extra))
        cls_kept, kept = model.split(model(x, keep=order, **extra))
        close(kept, patches.gather(1, order[:, :, None].expand(-1, -1, 192)))
        if cls is not None:
            close(cls_kept, cls)


def test_patches_not_kept_have_no_influence():
    model, x = build(rel_pos="shared"), images()
    y = x.clone()
    y[:, :, :8, :8] += 1                                      # patch 0
    keep = torch.tensor([[3, 7, 9]] * 2)
    assert torch.equal(model(x, keep=keep), model(y, keep=keep))
    assert model(x, keep=keep).shape == (2, 4, 192)
    assert not torch.equal(model(x, keep=keep), model(x, keep=keep + 1))


def test_masked_patches_are_the_mask_token_plus_position_whatever_the_image():
    model, token = build(), torch.randn(1, 1, 192)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5], mask[1] = True, True
    x, (h, w) = model.embed(images(), mask=mask, mask_token=token)
    plain = model.embed(images())[0]
    assert (h, w) == (4, 4)
    close(x[0, 6], (token + model.pos_embed[:, 6])[0, 0], 1e-6)
    close(x[1, 1:], (token + model.pos_embed[:, 1:])[0], 1e-6)
    others = [n for n in range(17) if n != 6]
    assert torch.equal(x[0, others], plain[0, others])
    assert torch.equal(x[:, 0], plain[:, 0])                                 # never the class token
    with pytest.raises(ValueError, match="mask_token"):
        model(images(), mask=mask)


def test_patch_embedding_equals_the_convolution():
    model = build()
    conv = F.conv2d(images(), model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    close(model.patch_embed(images()), conv.flatten(2).transpose(1, 2))


def test_sizes_and_blocks_that_do_not_fit_are_refused():
    model = build()
    for call, words in ((lambda: model(images(size=36)), "36x36 is not a multiple of patch size 8"),
                        (lambda: model(images()[..., :28]), "32x28 is not a multiple"),
                        (lambda: model(images()[:, :, :28]), "28x32 is not a multiple"),
                        (lambda: model.layers(images(), [2]), "0 to 1"),
                        (lambda: model.layers(images(), []), "0 to 1"),
                        (lambda: vit.ViT(img_size=30), "multiple of patch size"),
                        (lambda: build(num_heads=5), "multiple of 5 heads"),
                        (lambda: build(pos="sincos"), "pos must be one of"),
                        (lambda: build(qkv_bias=True), "qkv_bias must be one of"),
                        (lambda: build(drop_path=1.0), "drop_path")):
        with pytest.raises(ValueError, match=words):
            call()


def test_layers_give_every_block_with_and_without_the_norm():
    model, x = build(depth=3), images()
    normed, _ = model.layers(x)
    raw, _ = model.layers(x, norm=False)
    assert len(raw) == 3 and torch.equal(normed[2], model(x))
    for a, b in zip(normed, raw):
        assert torch.equal(a, model.norm(b))
    step, _ = model.embed(x)
    for block, expected in zip(model.blocks, raw):
        step = block(step)
        assert torch.equal(step, expected)
    (last, first), maps = model.layers(x, [2, 0], attention=[1])
    assert torch.equal(first, normed[0]) and list(maps) == [1]
    close(last, normed[2])                                    # block 1 took the explicit form
    cls, patches = model.split(last)
    assert torch.equal(cls, last[:, 0]) and torch.equal(patches, last[:, 1:])
    assert build(class_token=False).split(last)[0] is None
    bare = build(final_norm=False)
    assert torch.equal(bare(x), bare.layers(x, norm=False)[0][-1])


# ---------------------------------------------------------------------------------- drop path

def test_drop_path_with_handed_noise_follows_the_formula():
    model, x = build(depth=3, drop_path=0.5).train(), images()
    u = torch.tensor([[0.9, 0.0, 0.1, 0.3, 0.6, 0.4], [0.0, 0.0, 0.26, 0.24, 0.2, 0.5]])
    rates = (0, 0, 0.25, 0.25, 0.5, 0.5)
    expected, _ = model.embed(x)
    for i, block in enumerate(model.blocks):
        for half, (norm, inner) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
            rate = rates[2 * i + half]
            kept = (u[:, 2 * i + half] >= rate).float() / (1 - rate)
            expected = expected + kept[:, None, None] * inner(norm(expected))
    close(model(x, drop=u), model.norm(expected))
    assert not torch.allclose(model(x, drop=1 - u), model(x, drop=u))
    assert torch.equal(model(x, drop=torch.full((2, 6), 0.9)), model(x, drop=torch.ones(2, 6)))


def test_drop_path_keeps_the_expectation_and_is_off_in_eval_mode():
    model = build(depth=3, drop_path=0.4).train()
    factors = model.drop_factors(20000)
    close(factors.mean(0), torch.ones(6), 0.03)
    close((factors == 0).float().mean(0), torch.tensor([0, 0, 0.2, 0.2, 0.4, 0.4]), 0.02)
    assert torch.equal(factors.unique(), torch.tensor([0, 1, 1 / 0.8, 1 / 0.6]).unique())
    x = images()
    assert torch.equal(model.eval()(x, drop=torch.zeros(2, 6)), model(x))
    assert not torch.equal(model.train()(x, drop=torch.zeros(2, 6)), model.eval()(x))


# ------------------------------------------------------------------------------------ weights

def test_tensors_and_parameters_are_as_many_as_published():
    def count(size, **more):
        with torch.device("meta"):                            # no memory, no initial values
            model = vit.ViT(**vit.SIZES[size], **more)
        state = model.state_dict()
        return len(state), sum(value.numel() for value in state.values())

    assert count("base") == (150, 85_798_656)
    assert count("small") == (150, 21_665_664)
    assert count("base", pos="sincos_col", init="mae") == (150, 85_798_656)
    assert count("large") == (294, 303_301_632)
    assert count("base", **BEIT) == (186, 85_665_360)         # BEiT's 91,965,776 less head and mask
    assert 85_665_360 + 768 == 85_666_128                     # SimMIM's encoder and mask token
    assert count("base", qkv_bias="split") == (162, 85_798_656 - 12 * 768)
    assert count("base", pos="sincos_row", layer_scale=0.1, qkv_bias="split")[0] == 186     # CAE


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def test_initial_weights_follow_the_published_rules():
    D, pixels = 192, 3 * 8 * 8
    models = {init: build(scramble=False, init=init)
              for init in ("trunc", "beit", "mae", "cae", "moco")}
    for init, model in models.items():
        patch = model.patch_embed.proj
        assert all((layer.bias == 0).all() for layer in linears(model).values())
        assert (patch.bias == 0).all() == (init in ("beit", "cae", "moco"))
        block = model.blocks[1]
        bounds = {"mae": (6 / (4 * D), 6 / (2 * D), 6 / (pixels + D)),
                  "cae": (6 / (4 * D), 6 / (2 * D), 0.0004),
                  "moco": (6 / (2 * D), 6 / (2 * D), 6 / (pixels + D)),
                  "beit": (0.0004, 0.0004 / 4, 0.0004)}
        weights = (block.attn.qkv.weight, block.attn.proj.weight, patch.weight)
        for weight, bound in zip(weights, bounds.get(init, ())):
            assert 0.97 * bound**0.5 < weight.abs().max() <= bound**0.5 * 1.000001
        if init == "trunc":
            close(torch.stack([w.std() for w in weights[:2]]), torch.full((2,), 0.02), 5e-4)
            assert weights[0].abs().max() > 0.06
        if init in ("beit", "cae"):                           # the real std of a one-sigma cut
            for weight in (patch.weight, *[block.attn.qkv.weight] * (init == "beit")):
                assert weight.std().item() == pytest.approx(0.0108, abs=2e-4)
        std = 1e-6 if init == "moco" else 0.0108 if init in ("beit", "cae") else 0.02
        assert model.cls_token.std().item() == pytest.approx(std, rel=0.2)
    assert models["beit"].blocks[0].mlp.fc2.weight.abs().max() > 0.97 * 0.02 / 2**0.5
    assert models["beit"].blocks[1].mlp.fc2.weight.abs().max() <= 0.02 / 2
    assert (build(scramble=False, **BEIT).rel_pos_bias.relative_position_bias_table == 0).all()


def test_a_fresh_beit_treats_patches_as_a_set_until_its_table_is_filled():
    model, x = build(scramble=False, **BEIT), images()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    cut = x.unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    mixed = cut[:, order].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    close(model(mixed)[:, 1:], model(x)[:, 1:][:, order])
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    assert (model(mixed)[:, 1:] - model(x)[:, 1:][:, order]).abs().max() > 1e-3


def test_split_bias_equals_a_fused_one_and_a_key_bias_changes_nothing():
    split, fused = build(qkv_bias="split"), build(seed=5, qkv_bias="fused")
    state = {}
    for key, value in split.state_dict().items():
        if key.endswith("q_bias"):
            v = split.state_dict()[key.replace("q_bias", "v_bias")]
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(v), v])
        elif not key.endswith("v_bias"):
            state[key] = value
    fused.load_state_dict(state)
    assert torch.equal(fused(images()), split(images()))
    with torch.no_grad():
        fused.blocks[0].attn.qkv.bias[192:384] = torch.randn(192)
    close(fused(images()), split(images()))


def test_config_builds_the_model_again():
    model = build(**BEIT, drop_path=0.1)
    again = vit.ViT(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config and torch.equal(again.eval()(images()), model(images()))


def test_gradients_reach_every_trained_parameter():
    model = build(**BEIT, drop_path=0.1).train()
    model(images(), drop=torch.full((2, 4), 0.5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------- registers, SwiGLU

def test_register_tokens_take_part_and_are_left_out():
    model = build(registers=3)
    tokens = model(images())
    cls, patches = model.split(tokens)
    assert tokens.shape == (2, 20, 192) and patches.shape == (2, 16, 192)
    assert torch.equal(cls, tokens[:, 0]) and torch.equal(patches, tokens[:, 4:])
    embedded, _ = model.embed(images())
    assert torch.equal(embedded[:, 1:4], model.register_tokens.expand(2, -1, -1))
    keep = torch.tensor([[3, 5], [0, 9]])
    assert torch.equal(model.embed(images(), keep)[0][:, 4:],
                       embedded[:, 4:].gather(1, keep[:, :, None].expand(-1, -1, 192)))
    model.register_tokens.data += torch.randn(1, 3, 192)
    assert (model(images())[:, 0] - cls).abs().max() > 0.01
    with pytest.raises(ValueError, match="register tokens come after a class token"):
        build(registers=3, class_token=False)


def test_register_tokens_use_the_relative_positions_of_the_class_token():
    one, three = (positions.relative_index((4, 4), prefix) for prefix in (1, 3))
    assert torch.equal(three[2:, 2:], one)
    assert all(torch.equal(three[i, 2:], one[0]) and torch.equal(three[2:, i], one[:, 0])
               for i in (0, 1))
    model = build(registers=2, rel_pos="block", pos="none")
    assert model(images(size=48)).shape == (2, 39, 192)


def test_swiglu_written_out():
    model = build(swiglu=True, mlp_ratio=2)
    mlp, x = model.blocks[0].mlp, torch.randn(2, 5, 192)
    a, b = F.linear(x, mlp.fc1.weight, mlp.fc1.bias).split(384, -1)
    close(mlp(x), F.linear(a / (1 + (-a).exp()) * b, mlp.fc2.weight, mlp.fc2.bias))


# --------------------------------------------------------------------------------------- timm

@pytest.mark.parametrize("size, side", [("tiny", 224), ("small", 64)])
def test_state_dicts_go_to_and_from_timm_unchanged(size, side):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"vit_{size}_patch16_224", img_size=side, num_classes=0).eval()
    ours = vit.ViT(**vit.SIZES[size], img_size=side).eval()
    x = images(1, side)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        close(ours(x), theirs.forward_features(x))
        torch.manual_seed(1)
        init_vit(ours, "mae")
        theirs.load_state_dict(ours.state_dict())
        close(ours(x), theirs.forward_features(x))
        wrong = vit.ViT(**{**vit.SIZES[size], "num_heads": 12}, img_size=side).eval()
        wrong.load_state_dict(ours.state_dict())
        assert (wrong(x) - ours(x)).abs().max() > 1e-3


@pytest.mark.parametrize("rel_pos", ["shared", "block"])
def test_relative_bias_and_layer_scale_equal_timms_beit(rel_pos):
    beit = pytest.importorskip("timm.models.beit")
    torch.manual_seed(0)
    theirs = beit.Beit(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3,
                       num_classes=0, global_pool="token", init_values=0.1, use_abs_pos_emb=False,
                       use_rel_pos_bias=rel_pos == "block",
                       use_shared_rel_pos_bias=rel_pos == "shared").eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    state = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): value
             for key, value in theirs.state_dict().items()}
    ours = build(**{**BEIT, "rel_pos": rel_pos})
    ours.load_state_dict(state)
    close(ours(images()), theirs.forward_features(images()))
