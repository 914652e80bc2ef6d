"""What representations look like from block to block: similarity, spectra, frequencies, variance.

Each function returns {name: numbers} of one model. `shared` is the SharedPass with the statistics
that analysis.DIAGNOSTICS lists for it.
"""
import torch

from diagnostics import formulas, inputs
from diagnostics.inputs import MissingInput
from diagnostics.shared_pass import iterate_blocks
from lib import augment, rng


def measure_depth_similarity(model, opt, shared):
    found = shared.means["depth_similarity"]
    return dict(block=list(range(1, len(found) + 1)), similarity=found)


def measure_token_similarity(model, opt, shared):
    """Park et al., fig. 5c, "in the self-attentions": after them (our choice); also of z_l."""
    found = shared.means["token_similarity"]                 # z_0, u_1, z_1, ... u_L, z_L
    depth = len(found) // 2
    out = dict(block=list(range(1, depth + 1)), after_attention=found[1::2],
               depth=list(range(depth + 1)), after_block=found[::2])
    if "centered_similarity" in shared.means:
        found = shared.means["centered_similarity"]
        out |= dict(centered_after_attention=found[1::2], centered_after_block=found[::2])
    return out


def measure_token_transform(model, opt, shared):
    """How far attention changes all tokens of an image alike, for each block; and two images in a
    common basis before and after the last attention. center_ratio: distance of their centers after
    it over before it, in all dimensions (our choice).

    The paper shows MoCo's last block and SimMIM's first; here it is the last of every model.
    """
    found, encoder = shared.means["common_update"], model.encoder
    tokens, grid = encoder.embed(inputs.load_first_images(model, opt, 2))
    mask = encoder.local_mask(opt.window, grid) if opt.window else None
    *_, last = iterate_blocks(
        model, encoder.blocks, tokens, encoder.num_prefix,
        lambda block: encoder.attention_bias(block, grid, attn_mask=mask), with_weights=False)
    states = last.before, last.after_attention                                       # (2, N, D)
    before, after = (z[0].mean(0) - z[-1].mean(0) for z in states)
    return dict(block=list(range(1, len(found) + 1)), common=found[:, 0],
                variance_ratio=found[:, 1], center_ratio=(after.norm() / before.norm()).item(),
                plane=formulas.project_to_common_basis(*states).cpu())


# ---- spectra -------------------------------------------------------------------------------------


def summarize_spectra(log_spectra):
    """log_spectra: (depth + 1, ranks), means over images, of z_0 ... z_L."""
    delta = formulas.relative_to_second(log_spectra)
    first, second = formulas.plotted_ranks(log_spectra.shape[1])
    return dict(rank=list(range(1, log_spectra.shape[1] + 1)), delta=delta,
                depth=list(range(len(log_spectra))), ranks=[first, second],
                at_first=delta[:, first - 1], at_second=delta[:, second - 1],
                log_second_value=log_spectra[:, 1])


def measure_sv_tokens(model, opt, shared):
    return summarize_spectra(shared.means["sv_tokens"][::2])


def measure_sv_images(model, opt):
    """Mean patch tokens of many images, one covariance for each depth (fig. 7b). A separate pass,
    because it takes more images: 2048 or 4 D (our choice; the paper: the validation set)."""
    encoder = model.encoder
    covariances = [formulas.RunningCovariance() for _ in range(encoder.depth + 1)]
    for x, *_ in inputs.iterate_images(model, opt, opt.limit or max(2048, 4 * encoder.embed_dim)):
        with model.autocast():
            tokens, grid = encoder.embed(x)
            mask = encoder.local_mask(opt.window, grid) if opt.window else None
            states = [tokens, *encoder.layers(x, norm=False, attn_mask=mask)[0]]
        for covariance, z in zip(covariances, states):
            covariance.add(encoder.split(z)[1].float().mean(1).cpu())
    n = covariances[0].n
    if n < 3:
        raise MissingInput(f"at least 3 images are needed, not {n}: raise --limit")
    log_spectra = torch.stack([covariance.log_spectrum() for covariance in covariances])
    return summarize_spectra(log_spectra) | dict(images=n)


def measure_fourier(model, opt, shared):
    found = shared.means["fourier"]                               # (2 depth + 1, frequencies)
    delta, frequencies = (found - found[:, :1])[::2], formulas.diagonal_frequencies(shared.grid)
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
        found = means["fourier"][::2]
        out |= {f"{prefix}depth": list(range(start, start + len(found))),
                f"{prefix}block": list(range(start + 1, start + len(found))),
                f"{prefix}highest": found[:, -1] - found[:, 0],
                f"{prefix}nmi": means["nmi"].mean(1),
                f"{prefix}pixels": means["attention_distance"].mean(1)}
    return out


# ---- variance over views -------------------------------------------------------------------------


def measure_feature_variance(model, opt):
    """Variance of the class token over random crops, and of patches when other patches are masked.

    MMC, table 10: 128 views of an image. Our choices: no final norm; crops of 0.4 to 1 of the area,
    no flip; noise in half of the patches, drawn one by one where MMC masks blocks; 64 images, not
    all. Without a class token the mean patch token takes its place.
    """
    V, found, encoder = opt.copies, [], model.encoder

    def encode_last_block(x):
        """-> class tokens (V, D) or None, patches (V, N, D), without the final norm."""
        parts = [encoder.layers(part, [encoder.depth - 1], norm=False)[0][0].float()
                 for part in x.split(opt.batch_size)]
        return encoder.split(torch.cat(parts))

    for x, numbers, _ in inputs.iterate_images(model, opt, opt.limit or 64):
        S, views, g = x.shape[-1], torch.arange(V), x.shape[-1] // encoder.patch_size
        for image, number in zip(x, numbers.tolist()):
            crops = inputs.sample_crops(model, image, V, (0.4, 1.0), opt.seed, number)
            cls, patches = encode_last_block(augment.normalize(crops, model.mean, model.std))
            order = rng.uniform(views, g * g, opt.seed, number, "hide").argsort(1)
            noise = rng.normal(views, (3, S, S), opt.seed, number, "noise").to(x.device)
            mask = inputs.expand_mask(order < g * g // 2, S).to(x.device)
            masked = encode_last_block(torch.where(mask, noise, image))[1]
            found.append((*formulas.view_variance(patches.mean(1) if cls is None else cls),
                          *formulas.view_variance(masked)))
    crops, crops_relative, masked, masked_relative = torch.tensor(found).double().mean(0).tolist()
    token = "class token" if encoder.num_prefix else "mean patch token"
    return dict(crops=crops, masked_patches=masked, images=len(found), views=V, bars={
        f"{token}, random crops": crops_relative,
        "patches, half of them masked": masked_relative})
