"""How long --task all will take: the time of one image, times the images that each task encodes.

    time_image = functools.cache(functools.partial(plan.seconds_per_image, model))
    plan.estimate_seconds("knn", model, opt, time_image)

Rough, within a factor of two or three: it answers whether to wait or to stop. The encoder's time is
measured at the size of the images; heads are counted by their multiplications.
"""
import time

import torch

from probes import annotations
from probes.common import DENSE, is_toy, load_labeled, load_split
from probes.heads import LR_FACTORS

FLOPS = 5e9              # per second, of small matrix products in one thread
READ_SECONDS = 0.01      # to decode one image file
PARTS_PER_IMAGE = 4      # crops of parts, or boxes, of an image
LBFGS_STEPS = 500        # of all values of C together, in one fold
LOGIT_SECONDS = 5e-8     # of linear_segmentation, forward and backward at the size of the image
CLASSES, TOY_CLASSES = 50, 17            # of pixels: typical of an annotated set; toy's


@torch.no_grad()
def seconds_per_image(model, side):
    """Seconds that the encoder needs for one image of that side; 0 without an encoder."""
    if not model.encoder:
        return 0.0
    side = side // model.encoder.patch_size * model.encoder.patch_size
    batch = max(1, 512**2 // side**2)                    # one small image alone would be slow
    x = torch.zeros(batch, 3, side, side, device=model.device)
    for _ in range(2):                                   # the first pass is slower
        begin = time.perf_counter()
        with model.autocast():
            model.encoder(x).float().sum().item()        # waits for a GPU
    return (time.perf_counter() - begin) / len(x)


def estimate_seconds(task, model, opt, time_image):
    """Seconds of a task with its options of --task all. time_image: side -> seconds of one image.

    Features that an earlier task has already encoded cost nothing.
    """
    def images(split):
        return len(load_split(opt.data, opt.data_root, split, model.img_size, opt.limit,
                              model.device))

    limit = opt.limit or 1000                            # of annotated images, if it is not given
    crops = (opt.train_batch_size or 16) * (opt.iters or 200)
    side = model.img_size
    if task in DENSE:
        side = 2 * model.img_size if is_toy(opt.data) else opt.img_size or 480
    elif task == "landmark_retrieval":
        side = model.img_size if is_toy(opt.data) else 224
    encoded = {
        "knn": lambda: images("train") + images("test"),
        "linear": lambda: 0 if opt.recipe == "logreg" else 2 * images("train"),
        "layerwise": lambda: images("train") + images("test"),
        "attentive": lambda: 2 * images("train") + images("test"),
        "object_retrieval": lambda: (
            PARTS_PER_IMAGE * limit if annotations.objects_are_boxes(opt.data) else images("test")),
        "part_retrieval": lambda: PARTS_PER_IMAGE * limit,
        "part_classification": lambda: 2 * PARTS_PER_IMAGE * limit,
        "landmark_retrieval": lambda: 640 if is_toy(opt.data) else 5000,
        "shape_bias": lambda: images("test") if is_toy(opt.data) else 1280,
        "frequency_noise": lambda: 11 * images("test"),
        "linear_segmentation": lambda: crops + 3 * limit,
        "zero_shot_segmentation": lambda: limit,
        "video": lambda: 24 * 10 if is_toy(opt.data) else 70 * limit,
        "pose": lambda: 16 * (opt.iters or 200) + 2 * limit,
    }.get(task, lambda: 0)()
    in_memory = is_toy(opt.data) or opt.data in ("cifar10", "cifar100", "stl10")
    read = 0.0 if in_memory else READ_SECONDS
    seconds = encoded * (time_image(side) + read) if encoded else 0.0
    if task == "linear_segmentation":
        classes = TOY_CLASSES if is_toy(opt.data) else CLASSES
        seconds += crops * len(opt.lr or "1") * side**2 * classes * LOGIT_SECONDS
    return seconds + head_flops(task, model, opt, images) / FLOPS


def head_flops(task, model, opt, images):
    """Multiplications of the training of a head on image features, with all folds."""
    if task not in ("linear", "layerwise", "attentive", "shape_bias", "frequency_noise"):
        return 0
    depth, width, tokens = 1, 3 * 32**2, 1               # pixels
    if model.encoder:
        width, depth = model.encoder.embed_dim, model.encoder.depth
        tokens = (model.img_size // model.encoder.patch_size) ** 2 + 1
    n = 5 * images("train")                              # four fifths in five folds, and all
    heads = len(LR_FACTORS)
    if task == "attentive":                              # each of width x width
        return n * opt.epochs * 3 * heads * width * (2 * tokens * max(1, width // 64) + 3 * width)
    passes = LBFGS_STEPS if opt.recipe == "logreg" else heads * (opt.epochs or 90)
    _, classes = load_labeled(model, opt, "train")
    return n * passes * 6 * width * classes * (depth if task == "layerwise" else 1)
