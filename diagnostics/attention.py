"""Where attention goes: distance, mutual information of query and key, heads, maps of queries.

Each function returns {name: numbers} of one model. `shared` is the SharedPass with the statistics
that analysis.DIAGNOSTICS lists for it.
"""
import torch

from diagnostics import formulas, inputs
from diagnostics.plots import QUERY_COLORS, ImageRow, Tile


def measure_attention_distance(model, opt, shared):
    found, p = shared.means["attention_distance"], model.encoder.patch_size      # (depth, H)
    return dict(block=list(range(1, len(found) + 1)), pixels=found.mean(1),
                patches=found.mean(1) / p, pixels_by_head=found,
                uniform=formulas.patch_distances(shared.grid, p).double().mean().item())


def measure_nmi(model, opt, shared):
    """Mean and standard deviation over heads (divisor H) of the means over images, and the density
    of the heads of block 3 (fig. E.1); how both are computed is our choice. Also the fraction of
    attention that goes to the class token, if the model has one."""
    found, at = shared.means["nmi"], torch.linspace(-0.1, 1.1, 512)              # (depth, H)
    block_3 = found[min(3, len(found)) - 1]
    out = dict(block=list(range(1, len(found) + 1)), nmi=found.mean(1),
               std_over_heads=found.std(1, correction=0), nmi_by_head=found, heads=found.shape[1],
               density_at=at, density=formulas.kernel_density(block_3.float(), at),
               density_of=block_3)
    if model.encoder.num_prefix:
        out["class_token_attention"] = shared.means["class_token_attention"].mean(1)
    return out


def measure_head_similarity(model, opt, shared):
    found = shared.means["head_similarity"]
    return dict(block=list(range(1, len(found) + 1)), similarity=found)


def show_attention_maps(model, opt):
    """Attention maps of one image: of two queries in the first, the middle and the second to last
    block (Park et al., fig. 2), and of the class token in the last block.

    Queries: mean over heads (our choice: the notebook has one head, and frames that drift, as they
    are 14 pixels wide and patches 16). Class token: the first four heads are drawn (DINO: each).
    Our choice: the image size of pre-training (DINO: --img-size 480).
    """
    x, encoder = inputs.load_first_images(model, opt, 1), model.encoder
    depth, p, prefix = encoder.depth, encoder.patch_size, encoder.num_prefix
    g = x.shape[-1] // p
    blocks = sorted({0, -(-depth // 2) - 1, max(depth - 2, 0)})
    queries = [(g // 2, g // 2), (g // 4, g // 8)]
    _, weights = encoder.layers(x, [depth - 1], attention=[*blocks, depth - 1])
    tiles = [Tile(inputs.to_uint8(model, x)[0], boxes=[
        (p * column, p * row, p, color) for (row, column), color in zip(queries, QUERY_COLORS)])]
    maps = []
    for (row, column), color in zip(queries, QUERY_COLORS):
        for block in blocks:
            a = formulas.patch_attention(weights[block], prefix, 1e-8)[0].mean(0)        # (N, N)
            maps.append(a[row * g + column].view(g, g))
            tiles.append(Tile(maps[-1], f"block {block + 1}", boxes=[(column, row, 1, color)]))
    last = weights[depth - 1][0]                                                     # (H, L, L)
    heads = last[:, 0, prefix:].float() if prefix else last[:0, 0]              # (H or 0, N)
    kept = formulas.top_mass_mask(heads, 0.6).sum(1)
    tiles += [Tile(a.view(g, g), f"class token, head {number}\n60 % on {count} patches")
              for number, (a, count) in enumerate(zip(heads[:4], kept), 1)]
    return dict(blocks=[block + 1 for block in blocks], queries=queries, maps=torch.stack(maps),
                class_token=heads, class_token_60_percent_on=kept,
                image_rows=[ImageRow("", tiles)])
