"""Representations from block to block: similarity, spectra, frequencies, variance.

Each function returns {name: numbers} of one model. `shared` is the SharedPass with the statistics
that analysis.DIAGNOSTICS lists for it.
"""
import math

import torch

from diagnostics import formulas, inputs
from diagnostics.inputs import MissingInput
from diagnostics.shared_pass import iterate_blocks
from lib import augment, rng


def measure_depth_similarity(model, opt, shared):
    similarity = shared.means["depth_similarity"]
    return dict(block=list(range(1, len(similarity) + 1)), similarity=similarity)


def measure_token_similarity(model, opt, shared):
    """Park et al., fig. 5c, "in the self-attentions": measured after them (our choice), and after
    each block."""
    similarity = shared.means["token_similarity"]            # of z_0, u_1, z_1, u_2, z_2, ...
    depth = len(similarity) // 2
    out = dict(block=list(range(1, depth + 1)), after_attention=similarity[1::2],
               depth=list(range(depth + 1)), after_block=similarity[::2])
    if "centered_similarity" in shared.means:
        centered = shared.means["centered_similarity"]
        out |= dict(centered_after_attention=centered[1::2], centered_after_block=centered[::2])
    return out


def measure_token_transform(model, opt, shared):
    """How far attention changes all tokens of an image alike, for each block; and the tokens of two
    images before and after the last attention, in a common basis (a pass of its own). center_ratio:
    distance of the centers of the two images after the attention, divided by that before it, in all
    dimensions (our choice).

    Park et al. show MoCo's last block and SimMIM's first; here it is the last block of every model.
    """
    update, encoder = shared.means["common_update"], model.encoder
    tokens, grid = encoder.embed(inputs.load_first_images(model, opt, 2))
    *_, last = iterate_blocks(
        model, encoder.blocks, tokens, encoder.num_prefix,
        lambda block: encoder.attention_bias(block, grid), with_weights=False)
    states = last.before, last.after_attention                                       # (2, N, D)
    before, after = (z[0].mean(0) - z[-1].mean(0) for z in states)
    return dict(block=list(range(1, len(update) + 1)), common=update[:, 0],
                variance_ratio=update[:, 1], center_ratio=(after.norm() / before.norm()).item(),
                plane=formulas.project_to_common_basis(*states).cpu())


# ---- spectra -------------------------------------------------------------------------------------


def summarize_spectra(log_spectra, size):
    """log_spectra: (depth + 1, ranks), means over images, of the embedding and each block. size:
    see plotted_ranks."""
    delta = formulas.relative_to_second(log_spectra)
    first, second = formulas.plotted_ranks(size, log_spectra.shape[1])
    return dict(rank=list(range(1, log_spectra.shape[1] + 1)), delta=delta,
                depth=list(range(len(log_spectra))), ranks=[first, second],
                at_first=delta[:, first - 1], at_second=delta[:, second - 1],
                log_second_value=log_spectra[:, 1])


def measure_sv_tokens(model, opt, shared):
    return summarize_spectra(shared.means["sv_tokens"][::2], math.prod(shared.grid))


def measure_sv_images(model, opt):
    """Spectrum of the mean patch tokens of many images at each depth (Park et al., fig. 7b).

    A separate pass, because it takes more images: 2048, or 4 D if that is more (our choice; Park et
    al.: the validation set).
    """
    encoder = model.encoder
    covariances = [formulas.RunningCovariance() for _ in range(encoder.depth + 1)]
    for x, *_ in inputs.iterate_images(model, opt, opt.limit or max(2048, 4 * encoder.embed_dim)):
        with model.autocast():
            tokens, _ = encoder.embed(x)
            states = [tokens, *encoder.layers(x, norm=False)[0]]
        for covariance, z in zip(covariances, states):
            covariance.add(encoder.split(z)[1].float().mean(1).cpu())
    n = covariances[0].n
    if n < 3:
        raise MissingInput(f"at least 3 images are needed, not {n}: raise --limit")
    log_spectra = torch.stack([covariance.log_spectrum() for covariance in covariances])
    return summarize_spectra(log_spectra, encoder.embed_dim) | dict(images=n)


def measure_fourier(model, opt, shared):
    log_amplitude = shared.means["fourier"]                       # (2 depth + 1, frequencies)
    delta = (log_amplitude - log_amplitude[:, :1])[::2]
    frequencies = formulas.diagonal_frequencies(shared.grid)
    return dict(frequency=frequencies, delta=delta, depth=list(range(len(delta))),
                highest=delta[:, -1], highest_at=frequencies[-1])


def measure_decoder(model, opt, shared):
    """The curves of fourier, nmi and attention_distance, continued through MAE's decoder, whose
    input is all patches and no mask tokens (Park et al., fig. 10)."""
    if isinstance(shared.decoder, MissingInput):
        raise shared.decoder
    out = dict(highest_at=formulas.diagonal_frequencies(shared.grid)[-1])
    for prefix, means, start in (("", shared.means, 0),
                                 ("decoder_", shared.decoder, model.encoder.depth)):
        log_amplitude = means["fourier"][::2]
        out |= {f"{prefix}depth": list(range(start, start + len(log_amplitude))),
                f"{prefix}block": list(range(start + 1, start + len(log_amplitude))),
                f"{prefix}highest": log_amplitude[:, -1] - log_amplitude[:, 0],
                f"{prefix}nmi": means["nmi"].mean(1),
                f"{prefix}pixels": means["attention_distance"].mean(1)}
    return out


# ---- variance over views -------------------------------------------------------------------------


def measure_feature_variance(model, opt):
    """Variance of the class token over random crops, and of the patch tokens over masked views: of
    all patches, each of which is masked in about half of the views (in blocks).

    MMC, table 10: 128 views per image. Our choices: no final norm; crops of 0.4 to 1 of the input
    (the center crop of the file), no flip; masked patches are noise, half of the patches of each
    view (inputs.sample_block_masks; MMC states only blocks); 64 images, not all. Without a class
    token the mean patch token is used.
    """
    V, encoder = opt.copies, model.encoder
    variances = []

    def encode_last_block(x):
        """-> class tokens (V, D) or None, patches (V, N, D), without the final norm."""
        parts = [encoder.layers(part, [encoder.depth - 1], norm=False)[0][0].float()
                 for part in x.split(opt.batch_size)]
        return encoder.split(torch.cat(parts))

    for x, index, _ in inputs.iterate_images(model, opt, opt.limit or 64):
        S, g = x.shape[-1], x.shape[-1] // encoder.patch_size
        views = torch.arange(V)
        for image, i in zip(x, index.tolist()):
            crops = inputs.sample_crops(model, image, V, (0.4, 1.0), opt.seed, i)
            cls, patches = encode_last_block(augment.normalize(crops, model.mean, model.std))
            hidden = inputs.sample_block_masks(V, g, opt.seed, i)
            noise = rng.normal(views, (3, S, S), opt.seed, i, "noise").to(x.device)
            mask = inputs.expand_mask(hidden, S).to(x.device)
            masked = encode_last_block(torch.where(mask, noise, image))[1]
            variances.append((*formulas.view_variance(patches.mean(1) if cls is None else cls),
                              *formulas.view_variance(masked)))
    means = torch.tensor(variances).double().mean(0).tolist()
    crops, crops_relative, masked, masked_relative = means
    token = "class token" if encoder.num_prefix else "mean patch token"
    return dict(crops=crops, masked_patches=masked, images=len(variances), views=V, bars={
        f"{token}, random crops": crops_relative,
        "patches, half of them masked": masked_relative})
