"""Which patches are similar: neighbors, objects, segments, prompts, crops of other images, t-SNE.

Each function returns {name: numbers} of one model. `shared` is the SharedPass with the statistics
that analysis.DIAGNOSTICS lists for it.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from diagnostics import formulas, inputs
from diagnostics.inputs import MissingInput
from diagnostics.plots import PINK, QUERY_COLORS, ImageRow, Tile
from lib import augment, checkpoint_heads, datasets
from probes import annotations, common
from probes.patches import deepest_patch


def measure_adjacent_count(model, opt, shared):
    """Counts by features after the final norm, and by label vectors. SelfPatch's 4.3 +- 1.2 is by
    labels, over the patches with any label, with the standard deviation over patches (our reading).
    Counts over depth are by features before the norm."""
    by_depth = shared.means["similar_neighbors_by_state"][::2]
    n = torch.arange(9.0).double()
    out = dict(count=list(range(9)), threshold=opt.threshold, depth=list(range(len(by_depth))),
               at_depth=by_depth)
    for name, key in (("features", "similar_neighbors"), ("labels", "similar_label_neighbors")):
        if key in shared.means:
            fraction = shared.means[key][0]                                              # (9,)
            mean = (fraction * n).sum()
            variance = ((fraction * n * n).sum() - mean**2).clamp(min=0)
            out |= {f"{name}_fraction": fraction, f"{name}_mean": mean.item(),
                    f"{name}_std": variance.sqrt().item()}
    return out


def measure_intra_inter(model, opt, shared):
    """MMC, fig. 5: cosines of pairs of patches of the same object and of different objects.

    Our choices, which MMC does not state: pairs within an image of the size of pretraining (MMC's
    prompts: --img-size 480), after the final norm; a patch has the label of at least half of its
    pixels; background is used only in pairs of different objects.
    """
    if "pairs" not in shared.means:
        raise MissingInput(inputs.why_no_pixel_labels(opt.data, opt.data_root))
    sums = shared.means["pairs"][0] * shared.num_images                              # (2, 201)
    bins, total = sums[:, :-1], sums[:, :-1].sum(1)
    if not total.all():
        raise MissingInput("no image has two patches of one object and two of different ones: "
                           "raise --limit")
    return dict(overlap=formulas.histogram_overlap(*bins).item(),
                intra=(sums[0, -1] / total[0]).item(), inter=(sums[1, -1] / total[1]).item(),
                pairs=total.tolist(), cosine=torch.linspace(-0.995, 0.995, 200),
                densities=bins / total[:, None] * 100)


# ---- segments ------------------------------------------------------------------------------------


def show_kmeans(model, opt, num_images=6):
    """k-means with k = 3 on the patches of each image separately (MMC, fig. 6). Our choices: tokens
    after the final norm, L2-normalized; the image size of pretraining (MMC's prompts: --img-size
    480)."""
    x = inputs.load_first_images(model, opt, num_images)
    segments = torch.stack([formulas.kmeans(z, seed=opt.seed)[0]
                            for z in inputs.encode_patches(model, x, opt.batch_size)])
    segments = segments.unflatten(1, (math.isqrt(segments.shape[1]), -1))            # (B, g, g)
    return dict(segments=segments, image_rows=[
        ImageRow("", [Tile(image) for image in inputs.to_uint8(model, x)], once=True),
        ImageRow("", [Tile(one, limits=(0, 2)) for one in segments])])


def show_pca(model, opt, num_images=6):
    """The first three principal components of the patches of all these images as red, green, blue,
    each scaled so that 0 and 1 are its 2nd and 98th percentile."""
    x = inputs.load_first_images(model, opt, num_images)
    z = inputs.encode_patches(model, x, opt.batch_size).double()                     # (B, N, D)
    v, explained = formulas.principal_components(z.flatten(0, 1))
    rgb = (z @ v.T).unflatten(1, (math.isqrt(z.shape[1]), -1))                       # (B, g, g, 3)
    low, high = (rgb.flatten(0, 2).quantile(q, 0) for q in (0.02, 0.98))
    rgb = ((rgb - low) / (high - low)).clamp(0, 1)
    return dict(explained=explained, image_rows=[
        ImageRow("", [Tile(image) for image in inputs.to_uint8(model, x)], once=True),
        ImageRow(" ".join(f"{share:.0%}" for share in explained.tolist()),
                 [Tile(one) for one in rgb])])


# ---- similarity to a prompt ----------------------------------------------------------------------

THRESHOLDS = [t / 10 for t in range(10)]


def show_prompt_heatmap(model, opt, num_shown=4):
    """Cosine of all patches with a prompt, a patch of an object. IoU of the patches above a
    threshold with the object: mean over prompts, one for each class in an image.

    Our choice: the image size of pretraining, center crop. MMC has whole images of 480 x 480
    (--img-size 480); the protocol of its table 1 is evaluate.py --task zero_shot_segmentation,
    whose numbers are not comparable. The prompt is the patch deepest in the object (our choice); an
    object that covers less than half of it is skipped. The baselines are the IoU of the whole
    image, which a model reaches whose tokens are all equal, and that of the prompt alone. The AUC
    does not need a threshold. Without pixel labels the prompt is the center patch, and there are no
    scores.
    """
    limit = max(opt.limit or 256, opt.image + num_shown)
    p = model.encoder.patch_size
    skipped = 0
    scores, tiles, heatmaps = [], [], []
    for x, index, labels in inputs.iterate_images(model, opt, limit, pixel_labels=True):
        z = inputs.encode_patches(model, x, opt.batch_size)
        g = x.shape[-1] // p
        for i, image in enumerate(inputs.to_uint8(model, x)):
            to_show = index[i] >= opt.image and len(tiles) < 2 * num_shown
            for target in [None] if labels is None else object_masks(labels[i]):
                place = (g // 2, g // 2) if target is None else deepest_patch(target, p)
                if place is None:
                    skipped += 1
                    continue
                row, column = place
                heatmap = z[i] @ z[i, g * row + column]                              # (N,)
                if target is not None:
                    known = labels[i].cpu() >= 0
                    scores.append(score_heatmap(heatmap, g * row + column, target, known, p))
                if to_show:                                  # the largest object with a prompt
                    to_show = False
                    outlines = [] if target is None else [(target, QUERY_COLORS[1])]
                    star = column + 0.5, row + 0.5
                    tiles += [Tile(image, star=(p * star[0], p * star[1]), outlines=outlines),
                              Tile(heatmap.view(g, g), star=star, limits=(0, 1))]
                    heatmaps.append(inputs.expand_patches(heatmap, p))
        if labels is None and len(tiles) == 2 * num_shown:   # nothing to score
            break
    if not tiles:
        raise MissingInput(f"--image {opt.image} is beyond the end of the data set, or no image "
                           "from there on has an object that covers half a patch")
    if not scores:
        return dict(image_rows=[ImageRow("", tiles)])
    *mean, whole_image, prompt_alone, auc = torch.tensor(scores).double().nanmean(0).tolist()
    best = max(mean)
    for tile, heatmap in zip(tiles[::2], heatmaps):
        tile.outlines.append((heatmap > THRESHOLDS[mean.index(best)], PINK))
    return dict(thresholds=THRESHOLDS, iou=mean, best=best, whole_image=whole_image,
                prompt_alone=prompt_alone, auc=auc, prompts=len(scores), skipped=skipped,
                image_rows=[ImageRow(
                    f"{len(scores)} prompts{f', {skipped} skipped' * bool(skipped)}: IoU "
                    f"{best:.2f}, whole image {whole_image:.2f}, prompt alone {prompt_alone:.2f}; "
                    f"AUC {auc:.2f}", tiles)])


def object_masks(labels):
    """(S, S) class of each pixel -> a mask (S, S) bool of each class except background, the largest
    first, on the CPU."""
    classes, area = labels[labels > 0].unique(return_counts=True)
    classes = classes[area.argsort(descending=True, stable=True)]
    return [(labels == label).cpu() for label in classes]


def score_heatmap(heatmap, prompt, target, known, p):
    """-> IoU at each of THRESHOLDS, of the whole image, of the prompt; AUC. heatmap: (N,) cosines;
    prompt: index of its patch; target, known: (S, S) bool; unknown pixels are not counted."""
    pixels = inputs.expand_patches(heatmap, p)
    inside, outside = (F.avg_pool2d(part[None].float(), p).flatten()
                       for part in (target, known & ~target))
    others = torch.arange(len(heatmap)) != prompt            # its cosine with itself is 1
    return [*(formulas.iou((pixels > t) & known, target) for t in THRESHOLDS),
            formulas.iou(known, target),
            formulas.iou(inputs.expand_patches(~others, p) & known, target),
            formulas.roc_auc(heatmap[others], inside[others], outside[others])]


# ---- similarity of crops -------------------------------------------------------------------------


def show_patch_retrieval(model, opt, num_queries=3):
    """The crops of all images that are nearest to a query crop, by the encoder (mean patch token
    after the final norm) and by the projection head (`checkpoint_heads.projector`: the features in
    the loss, for DINO and iBOT the logits).

    Every crop is encoded separately, because tokens of a whole image contain their surroundings. 24
    crops are shown, as in Zhu et al. (2023), whose script shows 84. Other crops of the query's
    image are left out: they overlap with it (our choice, for sets of few images; the script keeps
    them).
    """
    head = checkpoint_heads.projector(model.encoder)
    images, bank = [], {}
    limit = max(opt.limit or 1000, opt.image + num_queries)
    for x, *_ in inputs.iterate_images(model, opt, limit):
        x = augment.denormalize(x, model.mean, model.std)
        images.append(x.cpu())
        for part in x.split(8):
            windows = augment.normalize(formulas.extract_windows(part), model.mean, model.std)
            tokens = inputs.encode(model, windows, opt.batch_size)
            features = {"encoded": model.encoder.split(tokens)[1].mean(1)}
            if head:
                features["projected"] = head(tokens)
            for name, z in features.items():
                bank.setdefault(name, []).append(z.half().cpu())
    images, bank = torch.cat(images), {name: torch.cat(z) for name, z in bank.items()}
    owner = torch.arange(len(images)).repeat_interleave(49)

    out, rows = dict(queries=[], crops=len(owner)), []
    for i in range(opt.image, min(opt.image + num_queries, len(images))):
        query = 49 * i + 24                                  # the center of the image
        out["queries"].append(query)
        for name, z in bank.items():
            nearest, cosine = formulas.nearest_rows(z, query, 24, owner == owner[query])
            out.setdefault(f"{name}_crop", []).append(nearest)
            out.setdefault(f"{name}_similarity", []).append(cosine)
            rows.append(ImageRow(name, [retrieval_tile(images, query, nearest.tolist())]))
    if not rows:
        raise MissingInput(f"--image {opt.image} is beyond the end of the data set")
    return out | dict(image_rows=rows)


def retrieval_tile(images, query, nearest):
    """One tile: the image with its query crop framed, the query crop, the nearest crops. query,
    nearest: indices of crops, 49 per image."""
    S = images.shape[-1]
    crops = [255 * formulas.extract_windows(images[i // 49, None])[i % 49]
             for i in (query, *nearest)]
    parts = F.pad(torch.stack([images[query // 49].float(), *crops]), (0, S // 8), value=255)
    row, column = divmod(query % 49, 7)
    return Tile(torch.cat([*parts], 2).round().byte().permute(1, 2, 0), boxes=[
        (S // 8 * column, S // 8 * row, S // 4, QUERY_COLORS[0]),
        (S + S // 8, 0, S - 1, QUERY_COLORS[0])])


# ---- t-SNE ---------------------------------------------------------------------------------------


def measure_tsne(model, opt, num_classes=3, images_per_class=6):
    """t-SNE of the patches of 6 images of each of 3 classes, from the last block without the final
    norm, as Park et al. state (their notebook shows block 5 of 16 images). The purity of the
    nearest neighbors is measured before t-SNE."""
    images = load_class_images(model, opt, num_classes, images_per_class)
    if images is None:
        x = inputs.load_first_images(model, opt, num_classes * images_per_class)
    else:
        x, index = map(torch.cat, zip(*inputs.iterate_batches(model, opt, images)))
    encoder = model.encoder
    z = encoder.layers(x, [encoder.depth - 1], norm=False)[0][0]
    z = encoder.split(z)[1].float().cpu()                                            # (B, N, D)
    image = torch.arange(len(z)).repeat_interleave(z.shape[1])
    label = (image if images is None else
             images.labels[index.cpu()].repeat_interleave(z.shape[1]))
    same_image, same_class = formulas.neighbor_purity(z.flatten(0, 1), image, label)
    out = dict(purity_image=same_image, image=image, label=label,
               position=formulas.tsne(z.flatten(0, 1), seed=opt.seed))
    return out if images is None else out | dict(purity_class=same_class)


def load_class_images(model, opt, num_classes, images_per_class):
    """The first test images of the first classes (datasets.Images); None if the images of the data
    set have no class. MissingInput if there are too few."""
    if opt.data not in datasets.NAMES and opt.data in annotations.SEGMENTATION:
        return None
    limit = 1000 if common.is_toy(opt.data) else None        # files are not read here
    images = common.load_split(opt.data, opt.data_root, "test", model.img_size, limit,
                               model.device)
    if images.labels is None:
        return None
    members = [(images.labels == label).nonzero()[:images_per_class, 0]
               for label in images.labels.unique()]
    members = [rows for rows in members if len(rows) == images_per_class]
    if len(members) < num_classes:
        raise MissingInput(f"at least {num_classes} classes with {images_per_class} test images "
                           f"each are needed, {opt.data} has {len(members)}")
    rows = torch.cat(members[:num_classes])
    return replace(images, labels=images.labels[rows],
                   paths=images.paths and [images.paths[i] for i in rows.tolist()],
                   pixels=None if images.pixels is None else images.pixels[rows])
