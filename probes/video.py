"""Video object segmentation: masks of the first frame are propagated by patch similarity.

    python evaluate.py --task video --data davis --data-root /data --show

    masks of frame 0 -> labels of its patches -+
    earlier frames   -> ViT -> patch tokens   -+- the most similar patches nearby, weighted mean
    this frame       -> ViT -> patch tokens   -+      -> labels of its patches -> masks
"""
from collections import deque
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from lib import augment, checkpoints, datasets, metrics, progress, toy
from probes import annotations
from probes.common import (
    Report,
    describe_output,
    input_side,
    is_toy,
    progress_bar,
    require_tokens,
)
from probes.figures import save_image_grid
from probes.patches import (
    extract_patches,
    normalize_images,
    resize_image,
    resize_labels,
    upsample_maps,
)

# Shapes: D width, C labels (background and the objects of the first frame), p patch side; (height,
# width) in pixels, (rows, columns) of patches.

# Settings of DINO's script
MEMORY = 7                                               # previous frames
RADIUS = 12                                              # of the window, in patches
NEIGHBORS = 5                                            # most similar patches
TEMPERATURE = 0.1
DAVIS_STD = (0.228, 0.224, 0.225)                        # sic, in DINO's script
TOY_VIDEOS = 10                                          # unless --limit is given


def video(model, opt):
    """Masks of a video's first frame are propagated to all others by patch similarity: J and F.

    DINO's protocol on DAVIS-2017 (SelfPatch, supplement, tables 3-5; MMC, table 2). Nothing is
    trained: the label of each patch is the mean label of its 5 most similar patches, weighted by
    exp(cosine / 0.1). They are searched in the first frame and the previous 7 together, in a window
    of 25 x 25 patches (radius 12) around its position. Tokens are taken after the final norm
    (SelfPatch's code has none there). Our choice on toy: videos of 24 frames of twice the encoder's
    size, and a radius that is the same fraction of the frame, 12 of 30 patches. ValueError: a data
    set without videos, the pixels baseline, no video with an object.
    """
    require_tokens(model, opt.task)
    side = input_side(model, opt, 480)
    p = model.encoder.patch_size
    radius = max(1, round(RADIUS * (side // p) / 30)) if is_toy(opt.data) else RADIUS
    limit = opt.limit or (TOY_VIDEOS if is_toy(opt.data) else None)
    std = DAVIS_STD if opt.data == "davis" and tuple(model.std) == tuple(augment.STD) else None

    def encode(image):
        x = resize_image(image, frame_shape(image.shape[1:], side, p))
        x = normalize_images(model, x[None], std)
        return F.normalize(extract_patches(model, x)[0], dim=2)

    folder = Path(opt.out) / f"video-{Path(opt.data).name}-{model.name}"     # for --save
    if opt.save and folder.exists():
        folder.rename(kept := checkpoints.free_name(folder))
        print(f"the earlier {folder} is kept as {kept}", flush=True)
    if opt.save:
        checkpoints.make_folder(folder)
    scores, rows, n_frames, bad, unsaved = [], [], 0, {}, None
    videos = annotations.videos(opt.data, opt.data_root, "test", limit, side)
    for item in progress_bar(videos, model):
        try:
            masks = progress.bar(propagate_masks(item, encode, p, radius),
                                 f"{model.name}: {item.name}", len(item.masks) - 1, "frames")
            masks = torch.stack([item.masks[0], *masks])
        except datasets.UnreadableImage as error:        # a frame: the video is left out
            bad[item.name] = str(error)
            continue
        scores.append(metrics.score_video(masks, item.masks))
        if opt.save and not unsaved:
            try:
                save_masks(folder / item.name, masks)
            except OSError as error:                     # the scores are not lost
                unsaved = f"masks of {item.name} and later videos are not saved: {error}"
        n_frames += len(masks)
        if opt.show and len(rows) < 8:
            rows += draw_video(item, masks)
    datasets.report_unreadable(opt.data, bad, len(scores) + len(bad), "videos")
    if not sum(len(j) for j, _ in scores):
        raise ValueError(f"{opt.task}: no video with an object; raise --limit or change --data")
    if rows:
        save_image_grid(rows, Path(opt.out) / f"video-{Path(opt.data).name}-{model.name}.png",
                        names=["annotation", "prediction"] * (len(rows) // 2),
                        titles=("first frame, given", "later frames"))
    means = metrics.video_scores(scores)
    by_object = torch.cat([(j.mean(1) + f.mean(1)) / 2 for j, f in scores])
    notes = [unsaved] if unsaved else []
    if len(by_object) > 1:
        error = 100 * by_object.std().item() / len(by_object) ** 0.5
        notes.append(f"{model.name}: standard error of J&F over the objects: {error:.1f}")
    columns = {"J&F": "j&f", "J": "j", "F": "f", "J recall": "j_recall", "J decay": "j_decay",
               "F recall": "f_recall", "F decay": "f_decay"}
    return Report(
        {"patches": {column: 100 * means[name] for column, name in columns.items()}},
        f"first frame and the previous {MEMORY}, the {NEIGHBORS} most similar patches of all of "
        f"them within {radius} patches, temperature {TEMPERATURE}; {describe_output(model)}"
        f"frames with a short side of {side} px, patches of {p}; first and last frame not "
        f"scored", dict(videos=len(scores), frames=n_frames, objects=len(by_object)),
        notes)


def frame_shape(shape, short, p):
    """(height, width) of a frame -> that of the encoder's input. The short side becomes `short`.
    The long side is scaled with it and rounded down to a multiple of 64, or of p if p does not
    divide 64 or `short` is below 64 (our choice); it is at least `short`."""
    step = 64 if 64 % p == 0 and short >= 64 else p
    return [short if n == min(shape) else max(short, int(short * n / min(shape)) // step * step)
            for n in shape]


def propagate_masks(item, encode, p, radius):
    """Yields the predicted mask (height, width) uint8 of each frame after the first.

    item: an annotations.Video. encode: image -> (rows, columns, D), L2-normalized. Only the first
    frame and the last MEMORY frames are kept.
    """
    tokens = encode(item.frames[0])
    small = resize_labels(item.masks[0], tokens.shape[:2]).long().to(tokens.device)
    first = tokens, F.one_hot(small).float()             # channels 0 ... largest label in `small`
    memory = deque(maxlen=MEMORY)
    for t in range(1, len(item.masks)):
        tokens = encode(item.frames[t])
        known_tokens, known_labels = (torch.stack(x) for x in zip(first, *memory))
        labels = propagate_labels(tokens, known_tokens, known_labels, radius)
        memory.append((tokens, labels))
        yield labels_to_mask(labels, p, item.masks.shape[1:])


def propagate_labels(tokens, known_tokens, known_labels, radius):
    """tokens (rows, columns, D), known_tokens (frames, rows, columns, D), known_labels (frames,
    rows, columns, C) -> soft labels (rows, columns, C) of the tokens.

    Computed for one row of patches at a time, compared only with rows within the radius, so that
    videos with small patches fit in memory.
    """
    out, columns = [], tokens.shape[1]
    x = torch.arange(columns, device=tokens.device)
    near = (x[:, None] - x).abs() <= radius              # (known columns, columns)
    for y, row in enumerate(tokens):
        rows = slice(max(0, y - radius), y + radius + 1)
        source, labels = (known[:, rows].flatten(0, 2) for known in (known_tokens, known_labels))
        weight = (source @ row.T / TEMPERATURE).exp() * near.repeat(len(source) // columns, 1)
        least = weight.topk(min(NEIGHBORS, len(weight)), 0).values[-1]           # (columns,)
        weight = weight.where(weight >= least, 0)        # ties with the last neighbor are kept
        out.append((weight / weight.sum(0)).T @ labels)
    return torch.stack(out)


def labels_to_mask(labels, p, shape):
    """Soft labels (rows, columns, C) of patches -> mask (height, width) uint8 of the frame.

    Each channel that is not constant is stretched to the range 0 to 1 before the argmax. That helps
    small objects and is part of the protocol. A constant channel would become 0/0, so it is left
    unchanged.
    """
    maps = upsample_maps(labels.permute(2, 0, 1), p)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretch = (high > 0) & (high > low)
    maps = torch.where(stretch, (maps - low) / (high - low).where(stretch, 1), maps)
    return resize_labels(maps.argmax(0).to(torch.uint8), shape).cpu()


def save_masks(folder, masks):
    """Writes masks (frames, height, width) as 00000.png, 00001.png ..., object numbers with the
    palette of DAVIS, as its official evaluation reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    bits = torch.arange(256)[:, None] >> torch.arange(24)                    # (256, 24)
    palette = [sum((bits[:, 3 * k + channel] & 1) << (7 - k) for k in range(8))
               for channel in range(3)]                  # every third bit, the highest first
    for t, mask in enumerate(masks.numpy()):
        image = Image.fromarray(mask)
        image.putpalette(torch.stack(palette, 1).flatten().tolist())
        checkpoints.write_atomic(folder / f"{t:05}.png", partial(image.save, format="PNG"))


def draw_video(item, masks, n_frames=6):
    """Two rows of images: the true and the predicted masks of frames over the whole video."""
    times = [i * (len(masks) - 1) // (n_frames - 1) for i in range(n_frames)]
    return [[toy.overlay(item.frames[t], shown[t]) for t in times]
            for shown in (item.masks, masks)]
