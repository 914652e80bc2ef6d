"""Attention: distance, mutual information of query and key, similarity of heads, attention maps.

Each function returns {name: numbers} of one model. `shared` is the SharedPass with the statistics
that analysis.DIAGNOSTICS lists for it.
"""
import torch

from diagnostics import formulas, inputs
from diagnostics.inputs import MissingInput
from diagnostics.plots import QUERY_COLORS, ImageRow, Tile


def measure_attention_distance(model, opt, shared):
    distance = shared.means["attention_distance"]                                # (depth, H)
    p = model.encoder.patch_size
    return dict(block=list(range(1, len(distance) + 1)), pixels=distance.mean(1),
                patches=distance.mean(1) / p, pixels_by_head=distance,
                uniform=formulas.patch_distances(shared.grid, p).double().mean().item())


def measure_nmi(model, opt, shared):
    """NMI of each head, averaged over images: mean and standard deviation over heads (divisor H),
    and the density over the heads of block 3 (Park et al., fig. E.1). How both are computed is our
    choice. Also the fraction of attention to class token and registers, if the model has them."""
    nmi = shared.means["nmi"]                                                    # (depth, H)
    block_3 = nmi[min(3, len(nmi)) - 1]
    points = torch.linspace(-0.1, 1.1, 512)
    out = dict(block=list(range(1, len(nmi) + 1)), nmi=nmi.mean(1),
               std_over_heads=nmi.std(1, correction=0), nmi_by_head=nmi, heads=nmi.shape[1],
               density_at=points, density=formulas.kernel_density(block_3.float(), points),
               density_of=block_3)
    if model.encoder.num_prefix:
        out["class_token_attention"] = shared.means["class_token_attention"].mean(1)
    return out


def measure_head_similarity(model, opt, shared):
    if model.encoder.config["num_heads"] == 1:
        raise MissingInput("the model has one attention head: there is none to compare it with")
    similarity = shared.means["head_similarity"]
    return dict(block=list(range(1, len(similarity) + 1)), similarity=similarity,
                heads=model.encoder.config["num_heads"])


def show_attention_maps(model, opt):
    """Attention maps of one image: of two queries in the first, the middle and the second to last
    block (of fewer than 6 blocks: the last), and of the class token in the last block.

    Park et al., fig. 2; the blocks and the places of the queries are our choice. Maps of queries
    are means over heads (our choice; the notebook shows one head, and its frames drift because they
    are 14 pixels wide and patches 16). Of the class token the first four heads are drawn (DINO:
    all). Our choice: the image size of pretraining (DINO: --img-size 480).
    """
    x = inputs.load_first_images(model, opt, 1)
    encoder = model.encoder
    depth, p, prefix = encoder.depth, encoder.patch_size, encoder.num_prefix
    g = x.shape[-1] // p
    blocks = sorted({0, -(-depth // 2) - 1, depth - 2 if depth >= 6 else depth - 1})
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
    tiles += [Tile(a.view(g, g), f"class token, head {number}\n60% on {count} patches")
              for number, (a, count) in enumerate(zip(heads[:4], kept), 1)]
    return dict(blocks=[block + 1 for block in blocks], queries=queries, maps=torch.stack(maps),
                class_token=heads, class_token_60_percent_on=kept,
                image_rows=[ImageRow("", tiles)])
