"""The shared pass: most curves of analysis.py from one forward pass over the images.

    images -> z_0 -> [ attention A_l, heads o_l -> u_l -> MLP -> z_l ] x depth -> norm -> patches
                       |                           |             |                         |
                       attention                   block         state                     final

The output of a block is measured as soon as it is computed, then discarded. Sums over images are
kept in float64, so memory does not grow with the number of images. Each statistic is an entry of
STATISTICS. --subtract-mean needs a second pass; sv_images, feature_variance, the scatter plots of
token_transform and the diagnostics that show images have passes of their own.
"""
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diagnostics import decoders, formulas, inputs
from diagnostics.inputs import MissingInput


@dataclass
class BlockOutput:
    """Intermediate tensors of block l. Patches only, unless stated otherwise."""
    number: int                         # l, from 1
    tokens: torch.Tensor                # z_l with the class token (B, L, D)
    before: torch.Tensor                # z_{l-1} (B, N, D)
    after_attention: torch.Tensor       # u_l (B, N, D)
    out: torch.Tensor                   # z_l (B, N, D)
    heads: torch.Tensor                 # o_l, before the output projection (B, H, N, D/H)
    weights: torch.Tensor | None        # A_l of all tokens (B, H, L, L)


def iterate_blocks(model, blocks, x, num_prefix, get_bias=lambda block: None,
                   with_weights=True) -> Iterator[BlockOutput]:
    """Passes tokens x (B, L, D) through blocks and yields tensors that ViT.forward does not keep.

    get_bias: block -> bias of its attention logits. with_weights: attention weights are computed
    explicitly, which is slower; else `weights` is None.
    """
    for number, block in enumerate(blocks, 1):
        weights, heads = [] if with_weights else None, []
        hook = block.attn.proj.register_forward_pre_hook(
            lambda module, args, heads=heads: heads.extend(args))
        with model.autocast():
            u = x + block.ls1(block.attn(block.norm1(x), get_bias(block), weights))
            z = u + block.ls2(block.mlp(block.norm2(u)))
        hook.remove()
        u, z = u.float(), z.float()
        heads = heads[0].unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)
        yield BlockOutput(
            number, tokens=z, before=x[:, num_prefix:], after_attention=u[:, num_prefix:],
            out=z[:, num_prefix:], heads=heads[:, :, num_prefix:],
            weights=weights[0] if with_weights else None)
        x = z


@dataclass
class Context:
    """What statistics need in addition to the tensors of the model."""
    num_prefix: int
    grid: tuple
    distances: torch.Tensor             # between patches, in pixels (N, N)
    threshold: float                    # --threshold
    mean_tokens: torch.Tensor | None    # mean token of each state over all images


# name: (kind of tensors, function of them and the Context -> (B, ...), a value for each image).
# Kinds: "attention" weights; "block" BlockOutput; "state" z_0, u_1, z_1, u_2, z_2, ...; "centered
# state" a state minus its mean token over all images; "final" patches after the norm; "labels"
# these patches, and the fractions of the classes in each patch (B, N, C).
STATISTICS = {
    "attention_distance": ("attention", lambda a, context: formulas.attention_distance(
        formulas.patch_attention(a, context.num_prefix, 1e-32), context.distances)),
    "nmi": ("attention", lambda a, context: formulas.nmi(
        formulas.patch_attention(a, context.num_prefix, 1e-8))),
    "class_token_attention": ("attention", lambda a, context: formulas.class_token_attention(
        a, context.num_prefix)),
    "head_similarity": ("block", lambda b, context: formulas.head_similarity(b.heads)),
    "depth_similarity": ("block", lambda b, context: formulas.depth_similarity(
        b.before, b.after_attention)),
    "common_update": ("block", lambda b, context: formulas.common_update(
        b.before, b.after_attention)),
    "token_similarity": ("state", lambda z, context: formulas.token_similarity(z)),
    "centered_similarity": ("centered state", lambda z, context: formulas.token_similarity(z)),
    "mean_token": ("state", lambda z, context: z.mean(1)),
    "sv_tokens": ("state", lambda z, context: formulas.log_spectrum(z)),
    "fourier": ("state", lambda z, context: formulas.log_amplitude(z, context.grid)),
    "similar_neighbors_by_state": ("state", lambda z, context: formulas.count_similar_neighbors(
        z, context.grid, context.threshold).mean(1)),
    "similar_neighbors": ("final", lambda z, context: count_fractions(
        formulas.count_similar_neighbors(z, context.grid, context.threshold))),
    "final_similarity": ("final", lambda z, context: formulas.token_similarity(z)),
    "similar_label_neighbors": ("labels", lambda z, y, context: count_fractions(
        formulas.count_similar_neighbors(y, context.grid), y.any(2))),
    "pairs": ("labels", lambda z, y, context: torch.stack([
        formulas.pair_similarity_histogram(*image)
        for image in zip(z, formulas.majority_label(y))])),
}


def count_fractions(counts, known=None):
    """(B, N) neighbor counts 0 ... 8 -> (B, 9) fraction of the patches with each count. known (B,
    N) bool: only these patches are counted, and images without such a patch have no row."""
    onehot = F.one_hot(counts.long(), 9).double()                                    # (B, N, 9)
    if known is None:
        return onehot.mean(1)
    onehot, known = (x[known.any(1)] for x in (onehot, known))
    return (onehot * known[..., None]).sum(1) / known.sum(1, keepdim=True)


class Means:
    """Means over images of the named STATISTICS: means[name] is float64 (layers, ...)."""

    def __init__(self, names):
        self.names, self.sums = names, {}              # (name, layer): number of images, their sum

    def add(self, kind, layer, *tensors_and_context):
        for name in self.names:
            if STATISTICS[name][0] == kind:
                values = STATISTICS[name][1](*tensors_and_context)
                n, total = self.sums.get((name, layer), (0, 0))
                self.sums[name, layer] = n + len(values), total + values.double().sum(0).cpu()

    def add_state(self, layer, z, context):
        self.add("state", layer, z, context)
        if "centered_similarity" in self.names:
            self.add("centered state", layer, z - context.mean_tokens[layer], context)

    def add_blocks(self, model, blocks, x, context, get_bias=lambda block: None):
        """Measures tokens x (B, L, D) while they pass through blocks -> output of the last
        block."""
        with_weights = any(STATISTICS[name][0] == "attention" for name in self.names)
        self.add_state(0, x[:, context.num_prefix:].float(), context)
        for block in iterate_blocks(model, blocks, x, context.num_prefix, get_bias, with_weights):
            self.add_state(2 * block.number - 1, block.after_attention, context)
            self.add_state(2 * block.number, block.out, context)
            self.add("block", block.number, block, context)
            if with_weights:
                self.add("attention", block.number, block.weights, context)
        return block.tokens

    def __contains__(self, name):
        return any(key == name for key, _ in self.sums)

    def __getitem__(self, name):
        return torch.stack([total / n for (key, _), (n, total) in self.sums.items() if key == name])


@dataclass
class SharedPass:
    """Results of the shared pass."""
    means: Means                                   # of the encoder
    decoder: Means | MissingInput | None           # of MAE's decoder, or why there is none
    grid: tuple
    num_images: int


@torch.no_grad()
def run_shared_pass(model, opt, names):
    """One forward pass per batch that measures the STATISTICS in `names` -> SharedPass. The name
    "decoder" adds those of MAE's decoder.

    Park et al. use the validation set; their notebooks average over batches, and run one. Here 256
    images are used by default, and each has the same weight.
    """
    encoder = model.encoder
    decoder = decoder_means = mean_tokens = None
    if "decoder" in names:
        try:
            decoder = decoders.build_mae_decoder(model, *decoders.load_pretraining_state(model))
            decoder_means = Means(["attention_distance", "nmi", "fourier"])
        except MissingInput as error:
            decoder_means = error
    means = Means([name for name in STATISTICS if name in names])
    if "centered_similarity" in names:                         # needs a separate pass before
        mean_tokens = run_shared_pass(model, opt, ["mean_token"]).means["mean_token"]
        mean_tokens = mean_tokens.float().to(model.device)
    pixel_labels = any(STATISTICS[name][0] == "labels" for name in means.names)
    num_images = 0
    for x, _, labels in inputs.iterate_images(model, opt, opt.limit or 256, pixel_labels):
        tokens, grid = encoder.embed(x)
        distances = formulas.patch_distances(grid, encoder.patch_size).to(x.device)
        context = Context(encoder.num_prefix, grid, distances, opt.threshold, mean_tokens)
        get_bias = functools.partial(encoder.attention_bias, grid=grid)
        tokens = encoder.norm(means.add_blocks(model, encoder.blocks, tokens, context, get_bias))
        patches = encoder.split(tokens)[1]
        means.add("final", 0, patches, context)
        if labels is not None:
            y = formulas.label_fractions(labels, encoder.patch_size, max(int(labels.max()) + 1, 1))
            means.add("labels", 0, patches, y, context)
        if decoder:
            decoder_means.add_blocks(model, decoder.blocks, decoder.embed_tokens(tokens), context)
        num_images += len(x)
    return SharedPass(means, decoder_means, grid, num_images)
