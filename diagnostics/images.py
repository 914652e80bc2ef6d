"""Images of the pretext tasks: reconstructions from the tokens of each block, and views."""
import torch
import torch.nn.functional as F

from diagnostics import decoders, inputs
from diagnostics.plots import ImageRow, Tile
from lib import rng


def show_layer_reconstruction(model, opt, num_blocks=6):
    """Tokens of each of the last six blocks, passed directly to the decoder or head of pretraining;
    mean absolute change from block to block, in units of pixel values from 0 to 1 (MMC, fig. 9).
    Our choices: the final norm is applied before the decoder, and all patches are shown as
    reconstructed, including visible ones."""
    x = inputs.load_first_images(model, opt, 1)
    depth = model.encoder.depth
    mask, visible, reconstruct = decoders.mask_and_reconstruct(model, x, opt.seed)
    blocks = range(max(0, depth - num_blocks), depth)
    recon = torch.cat([reconstruct(block).float() for block in blocks])          # (6, 3, S, S)
    std = x.new_tensor(model.std).view(3, 1, 1)
    change = (std * recon.diff(dim=0)).abs().mean(1)                             # (5, S, S)
    by_block = change.mean((1, 2))
    largest = max(change.max().item() if len(change) else 0, 1e-9)
    error = (std * (recon - x)).abs().masked_select(mask).view(len(blocks), -1).mean(1)
    images = inputs.to_uint8(model, torch.cat([x, visible, recon]))
    return dict(blocks=[block + 1 for block in blocks], change=by_block, largest_change=largest,
                error_masked=error, image_rows=[
        ImageRow("reconstruction", [Tile(images[0], "image"), *(
            Tile(image, f"from block {block + 1}") for block, image in zip(blocks, images[2:]))]),
        ImageRow(f"change, 0 to {largest:.2f}", [Tile(images[1], "input"), Tile(None), *(
            Tile(one, f"mean {mean:.3f}", limits=(0, largest))
            for one, mean in zip(change, by_block))])])


def show_views(model, opt):
    """What the pretext tasks of the methods give to a network; no network is involved. Single
    patches are hidden as in MAE, rectangles of noise or of another image as in MMC (its fig. 8)."""
    x = inputs.load_first_images(model, opt, 2)
    x, other, S, p = x[:1], x[-1:], x.shape[-1], model.encoder.patch_size
    g, index = S // p, torch.tensor([opt.image])
    rank = rng.uniform(index, g * g, opt.seed, "hide").argsort(1).argsort(1)
    mask = inputs.expand_mask(rank < round(0.75 * g * g), S).to(x.device)
    corners = rng.uniform(index, (255, 4), opt.seed, "rectangles")[0]
    for_noise, to_paste = (decoders.draw_rectangles(corners, S, ratio).to(x.device)
                           for ratio in (0.75, 0.3))
    noise = rng.normal(index, (3, S, S), opt.seed, "noise").to(x.device)
    patches = F.pad(x.unflatten(3, (g, p)).unflatten(2, (g, p)), (0, 1, 0, 0, 0, 1), value=9.0)
    views = {"image": x, "patches": patches.flatten(4).flatten(2, 3),                # white gaps
             "visible, 25%": x.masked_fill(mask, 0), "masked, 75%": x.masked_fill(~mask, 0),
             "75% noise": x.where(~for_noise, noise),
             "30% of another image": x.where(~to_paste, other)}
    shown = {name: inputs.to_uint8(model, z)[0] for name, z in views.items()}
    for i, crop in enumerate(inputs.sample_crops(model, x[0], 2, (0.2, 0.6), opt.seed), 1):
        shown[f"crop {i}"] = crop.permute(1, 2, 0).cpu().numpy()
    return dict(masked=mask.float().mean().item(), image_rows=[
        ImageRow(" ", [Tile(image, name) for name, image in shown.items()], once=True)])
