"""What the probes share: options, models, reports, features of a frozen encoder.

A probe is a function task(model: Model, opt: Options) -> Report. It starts from one of these two,
or from patch tokens (probes/patches.py):

    features, labels, num_classes = extract_features(model, opt, "train", ["cls", "patch"])
    features, numbers = encode_batches(model, opt, batches, ["cls"])        # {"cls": (n, D)}

Under torchrun each process encodes its own batches, and all processes receive the features of all
images, in the order and with the bits of a single process:

    batches  0 1 2 3 4 ..   process 0: 0 2 4 ..  --+
                            process 1: 1 3 ..    --+- all_gather -- 0 1 2 3 4 ..  in both

All of them then compute the same vote, ranking or head: waiting for one process would take as long,
and no result has to be sent.
"""
import contextlib
import functools
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import vit
from lib import (
    augment,
    checkpoint_heads,
    checkpoints,
    datasets,
    distributed,
    progress,
    rng,
    swin,
    tree,
)
from lib.flags import flag
from probes.annotation_files import LAYOUT

# B images, L tokens, D width, S image side; n images of a data set

# ---- options -------------------------------------------------------------------------------------

LINEAR = ("linear", "shape_bias", "frequency_noise")           # tasks with a linear classifier
PARTS = ("part_retrieval", "part_classification")
VECTORS = ("knn", "few_shot", "object_retrieval", *PARTS, "landmark_retrieval")
# Flags that change no number, but for rounding.
WITHOUT_EFFECT = """checkpoint baseline data data_root device precision batch_size workers task out
json cache reference save show""".split()
# The dense tasks: the encoder is frozen, and a prediction is made from every patch token.
DENSE = ("linear_segmentation", "zero_shot_segmentation", "video", "pose")


@dataclass(frozen=True)
class CommonOptions:
    """The flags that evaluate.py and analysis.py share."""
    checkpoint: tuple[str, ...] = flag(
        (), "checkpoint files, or folders of runs; default: the newest run in --out",
        group="models")
    baseline: tuple[str, ...] = flag(
        (), "models to compare with: raw pixels, or a ViT with random weights",
        choices=("pixels", "untrained"), group="models")
    branch: str | None = flag(
        None, "which weights to load from a checkpoint that holds several: teacher, student, base, "
        "momentum or ema", group="models")
    num_heads: int | None = flag(
        None, "attention heads of an official checkpoint; default: as published for its method, "
        "width and depth, unless the file contains it", at_least=1, group="models")
    normalization: str | None = flag(
        None, "of the input of an official checkpoint: mean and standard deviation of ImageNet, or "
        "0.5; default: as published for its method, unless the file contains it",
        choices=("imagenet", "0.5"), group="models")
    img_size: int | None = flag(
        None, "side of the input images in pixels. Default: as in pretraining; on toy twice that "
        "for linear_segmentation, zero_shot_segmentation, video and pose; on other data sets the "
        "protocol's for these, segmentation and detection, and 224 (longer side) for "
        "landmark_retrieval. Of linear_segmentation and segmentation it is the side of a crop, and "
        "images are scaled with it; of pose the height of a box",
        at_least=1, group="models")
    window: int | None = flag(
        None, "each patch attends only to the patches in a square window around it, with this side "
        "in patches (an odd number; Park et al., appendix D.1), and to the class token",
        at_least=1, group="models")
    precision: str = flag("auto", "precision of the encoder; auto: bf16 if the device supports it",
                          choices=("auto", "bf16", "fp32"), group="models")
    device: str = flag("auto", "cuda, cuda:1, cpu or auto (a GPU if there is one)", group="models")
    data: str | None = flag(
        None, "data set by name, or a folder; default: that of the first checkpoint that names one "
        "(official files do not), else toy", group="data")
    data_root: str | None = flag(
        None, "folder of the data sets; default: $DATA_ROOT, else datasets/", group="data")
    limit: int | None = flag(
        None, "number of images of each split; default: all of them, on toy a fixed number in some "
        "tasks", at_least=1, group="data")
    batch_size: int = flag(256, "images per forward pass", at_least=1, group="data")
    workers: int = flag(2, "processes that decode images", at_least=0, group="data")
    out: str = flag("out", "folder of the runs, and of figures that are written", group="output")
    seed: int = flag(0, "seed of random choices in a probe, and of untrained weights",
                     group="models")


@dataclass(frozen=True)
class Options(CommonOptions):
    """The flags of evaluate.py. Never changed: `dataclasses.replace` makes another one."""
    task: tuple[str, ...] = flag(("knn",), "what to measure, see the list below")
    # (a function of probes/ receives the options of one task, with its name in `task`)
    json: str | None = flag(
        None, "file to append results to; default: results.jsonl next to the checkpoint",
        group="output")
    cache: bool = flag(
        False, "store the features of images in --out/features, and reuse them in later calls. No "
        "effect on dense tasks and on tasks that train the encoder", group="output")
    reference: bool = flag(False, "also print the numbers of the papers", group="output")
    save: bool = flag(
        False, "store in --out the fine-tuned network, for --task classify or to use elsewhere; of "
        "video the propagated masks", group="output", only_for=("finetune", "video"))
    show: bool = flag(False, "write figures of what a task used or predicted to --out",
                      group="output",
                      only_for=("part_retrieval", "shape_bias", "segmentation", "detection",
                                *DENSE))

    feature: str | None = flag(
        None, "use only this feature; default: those of the protocol",
        choices=("cls", "patch", "hyber", "projected"), group="features",
        only_for=(*LINEAR, *VECTORS, "layerwise"))
    hyber_norm: str = flag(
        "separate", "feature hyber = cls and patch, L2-normalized separately, or jointly after "
        "concatenation (iBOT)", choices=("separate", "joint"), group="features",
        only_for=(*LINEAR, *VECTORS))

    recipe: str | None = flag(
        None, "training settings of a paper; default: the first in the list of the task. "
        "linear: mae, dino, park, logreg; shape_bias, frequency_noise: park, mae, dino, logreg; "
        "layerwise: park, logreg; part_classification: part, logreg; finetune: mae (fewer than "
        "10,000 images: light), simmim, mmc, light; "
        "linear_segmentation: parts, mmc; segmentation: selfpatch (fpn), mae or selfpatch "
        "(upernet); detection: 1x, 100ep, vitdet",
        choices=("mae", "dino", "park", "logreg", "part", "simmim", "mmc", "light", "parts",
                 "selfpatch", "1x", "100ep", "vitdet"),
        group="training", only_for=(*LINEAR, "layerwise", "part_classification", "finetune",
                                    "segmentation", "linear_segmentation", "detection"))
    paper_lr: bool = flag(
        False, "use the learning rate and weight decay of recipe park as printed by Park et al.",
        group="training", only_for=(*LINEAR, "layerwise"))
    epochs: int | None = flag(
        None, "training epochs; default: the recipe's, 5 for finetune on toy", at_least=1,
        group="training", only_for=(*LINEAR, "layerwise", "attentive", "part_classification",
                                    "finetune", "detection"))
    iters: int | None = flag(
        None, "training iterations; default: the protocol's, 200 to 600 on toy, fewer on your own "
        "data", at_least=1, group="training",
        only_for=("segmentation", "linear_segmentation", "pose", "detection"))
    lr: tuple[float, ...] = flag(
        (), "learning rate; linear_segmentation takes several and trains one layer with each; "
        "default: the recipe's (linear_segmentation of few iterations: three)", at_least=0,
        group="training",
        only_for=("finetune", "segmentation", "linear_segmentation", "pose", "detection"))
    train_batch_size: int | None = flag(
        None, "crops, boxes or images in a training step; default: the recipe's", at_least=1,
        group="training", only_for=("segmentation", "linear_segmentation", "pose", "detection"))
    head: str | None = flag(
        None, "type of head. part_classification: linear (default), attentive; segmentation: fpn "
        "(default), upernet", choices=("linear", "attentive", "fpn", "upernet"), group="training",
        only_for=("part_classification", "segmentation"))
    bn: str = flag(
        "running", "statistics of the attentive head's batch norm at test time: running averages, "
        "or those of the test batch (as in the published code)", choices=("running", "batch"),
        group="training", only_for=("attentive", "part_classification"))
    reinit: str | None = flag(
        None, "re-initialize blocks before training: first:N or last:N", group="training",
        only_for=("finetune",))
    swap_sides: bool = flag(
        False, "swap the labels left and right in mirrored training images", group="training",
        only_for=("segmentation", "linear_segmentation"))

    k: tuple[int, ...] = flag((10, 20), "numbers of neighbors", at_least=1, group="protocol",
                              only_for=("knn",))
    episodes: int = flag(600, "number of 5-way 1-shot episodes", at_least=2, group="protocol",
                         only_for=("few_shot",))
    max_aspect: float = flag(1.2, "largest ratio of the longer to the shorter side of a box",
                             at_least=1, group="protocol", only_for=("object_retrieval",))
    min_side: int = flag(64, "smallest shorter side of a box in pixels", at_least=1,
                         group="protocol", only_for=("object_retrieval",))
    max_items: int | None = flag(
        None, "number of images or crops, drawn at random; default: all of them", at_least=1,
        group="protocol",
        only_for=("object_retrieval", "part_retrieval"))
    crop: str = flag("code", "geometry of the part crops of Zhu et al. (2023): that of their "
                     "released code, or of their text", choices=("code", "paper"),
                     group="protocol", only_for=PARTS)
    parts: tuple[str, ...] = flag((), "names of keypoints, or all; default: those of Zhu et al.",
                                  group="protocol", only_for=PARTS)
    multiscale: bool = flag(False, "average the features of 3 image sizes", group="protocol",
                            only_for=("landmark_retrieval",))
    crop_queries: bool = flag(False, "crop query images to their boxes", group="protocol",
                              only_for=("landmark_retrieval",))
    no_crop: bool = flag(False, "use the whole image, without the center crop", group="protocol",
                         only_for=("shape_bias",))
    eps: float = flag(0.7, "strength of the noise, in units of the normalized input", at_least=0,
                      group="protocol", only_for=("frequency_noise",))
    equal_energy: bool = flag(
        False, "noise of equal energy in all bands; default: of equal density", group="protocol",
        only_for=("frequency_noise",))
    level: str | None = flag(
        None, "classes to segment: objects, parts, or all of the scene; default: the first of "
        "these levels that the data set has",
        choices=("object", "part", "scene"), group="protocol",
        only_for=("segmentation", "linear_segmentation", "zero_shot_segmentation"))
    prompt: str = flag(
        "deepest", "query patch: the one deepest inside the target, or a random one",
        choices=("deepest", "random"), group="protocol", only_for=("zero_shot_segmentation",))
    center: bool = flag(
        False, "subtract the mean patch token of the image before the cosine", group="protocol",
        only_for=("zero_shot_segmentation",))
    target: str = flag(
        "category", "target to segment: all masks of a category, one mask, or a stuff class",
        choices=("category", "instance", "stuff"), group="protocol",
        only_for=("zero_shot_segmentation",))


# ---- models and reports --------------------------------------------------------------------------


@dataclass
class Model:
    """A model to evaluate: a frozen encoder and its input, or raw pixels (encoder None)."""
    name: str
    encoder: vit.ViT | swin.Swin | None
    img_size: int                        # side of the input in pixels
    mean: tuple[float, ...]              # of the input normalization
    std: tuple[float, ...]
    interpolation: str                   # of the resize of images
    source: SimpleNamespace              # path, method, branch, step, data ...: see lib/checkpoints
    device: torch.device
    precision: str                       # bf16 or fp32

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @functools.cached_property
    def identity(self):
        """Everything of the model that its features depend on. The weights count, not their file,
        which a training run may replace in the meantime."""
        digest = hashlib.blake2b(digest_size=16)
        states = [self.encoder.state_dict(), *self.source.heads.values()] if self.encoder else []
        for state in states:
            for name, x in state.items():
                digest.update(name.encode())
                if torch.is_tensor(x):
                    digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return (digest.hexdigest(), self.encoder and sorted(self.encoder.config.items()),
                self.img_size, self.mean, self.std, self.interpolation, self.precision,
                self.device.type)


@dataclass
class Report:
    """What a probe returns. rows: {feature: {column: number}}, in percent unless the protocol
    gives another unit; images: their number, by role."""
    rows: dict[str, dict[str, float]]
    protocol: str
    images: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# The untrained ViT without a checkpoint: as mmc.py on toy.
UNTRAINED = dict(img_size=48, patch_size=8, embed_dim=96, depth=3, num_heads=3, pos="sincos_row",
                 init="moco")
NO_SOURCE = SimpleNamespace(path=None, method=None, branch=None, step=None, data=None,
                            mean=augment.MEAN, std=augment.STD, interpolation="bicubic",
                            img_size=UNTRAINED["img_size"], heads={})


def load_models(opt: CommonOptions) -> list[Model]:
    """The given checkpoints, or the newest run in --out; then the baselines, on the device.

    Baselines have the architecture of the first checkpoint and its size, normalization and resizing
    of images. Without any checkpoint and baseline the
    model is an untrained ViT. ValueError: an image size that is not a multiple of the patch size;
    also the errors of checkpoints.load_encoder.
    """
    device = distributed.pick_device(opt.device)
    precision = distributed.pick_precision(opt.precision, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)                # where the DataLoader's thread pins memory
    newest = sorted(Path(opt.out).glob("*/encoder.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    for file in Path(opt.out).glob("*/config.yaml") if newest and not opt.checkpoint else ():
        if not file.with_name("encoder.pt").exists() and (
                file.stat().st_mtime > newest[0].stat().st_mtime):
            datasets.print_once(f"note: {file.parent} is newer and has no encoder.pt yet; this is "
                                f"{newest[0].parent}", sys.stdout)
    paths, baselines = [Path(path) for path in opt.checkpoint] or newest, opt.baseline
    for path in paths:
        if path.is_dir() and not (path / "encoder.pt").exists() and (
                runs := sorted(path.glob("*/encoder.pt"))):
            raise ValueError(f"--checkpoint {path} is a folder of runs: choose one of them, such "
                             f"as {runs[-1].parent}")
        if (path / "config.yaml").exists() and not (path / "encoder.pt").exists():
            raise FileNotFoundError(f"{path} has no encoder.pt yet: a run writes it every "
                                    f"--save-every minutes and at its end")
    paths = [path / "encoder.pt" if path.is_dir() else path for path in paths]
    if not paths and not baselines:
        print(f"no run in {opt.out}/ yet: evaluating an untrained ViT. To train one: python mmc.py")
        baselines = ("untrained",)
    encoders = [checkpoints.load_encoder(
        path, opt.branch, opt.img_size, num_heads=opt.num_heads, normalization=opt.normalization)
        for path in paths]
    names = [path.resolve().parent.name if path.name == "encoder.pt" else path.stem
             for path in paths]
    names = [name.encode(errors="backslashreplace").decode() for name in names]   # for figures
    names = [name if names.index(name) == i else f"{name} ({i + 1})"     # a column for each
             for i, name in enumerate(names)]
    config = encoders[0].config if encoders else UNTRAINED
    first = encoders[0].source if encoders else NO_SOURCE
    inputs = {name: getattr(first, name) for name in ("img_size", "mean", "std", "interpolation")}
    for baseline in baselines:
        torch.manual_seed(opt.seed)
        encoders.append(checkpoints.build_encoder(config).eval() if baseline == "untrained" else
                        None)
    models = []
    for name, encoder in zip([*names, *baselines], encoders):
        source = getattr(encoder, "source", SimpleNamespace(**vars(NO_SOURCE) | inputs))
        img_size = opt.img_size or source.img_size
        if encoder and img_size % encoder.patch_size:
            raise ValueError(f"image size {img_size} is not a multiple of patch size "
                             f"{encoder.patch_size} of {name}")
        if encoder and opt.window:
            if isinstance(encoder, swin.Swin):
                raise ValueError(f"{name} is a Swin, which has windows of its own: leave out "
                                 f"--window")
            encoder.local_mask(opt.window)               # refuses even numbers
            encoder.config["window"] = opt.window
        models.append(Model(name, encoder and encoder.to(device), img_size, source.mean, source.std,
                            source.interpolation, source, device, precision))
    return models


def complete_settings(settings):
    """The settings of a line of results.jsonl. A flag that is newer than the line has its default,
    as the line was made without it."""
    return json.loads(json.dumps(asdict(Options()))) | settings


def default_data(models):
    """The data set of the first checkpoint that names one, else toy."""
    return next((model.source.data for model in models if model.source.data), "toy")


def choose_recipe(opt, recipes):
    """Name and settings of --recipe; default: the first one. ValueError: an unknown recipe."""
    name = opt.recipe or next(iter(recipes))
    if name not in recipes:
        raise ValueError(f"{opt.task} has no recipe {name}; choose --recipe {', '.join(recipes)}")
    return name, recipes[name]


def is_toy(name):
    """True for the synthetic data sets of lib/toy.py."""
    return name in ("toy", "toy-scenes")


def require_tokens(model, task):
    if not model.encoder:
        raise ValueError(f"{task} needs tokens, and pixels have none: leave out that --baseline")


def require_vit(model, what):
    """ValueError for a Swin: `what` needs blocks that all have the same patches."""
    if isinstance(model.encoder, swin.Swin):
        raise ValueError(f"{what} needs a ViT, whose blocks all have the same patches and attend "
                         f"to all of them; {model.name} is a Swin: leave it out")


# ---- features of a batch -------------------------------------------------------------------------


def pooled_features(encoder, x):
    """x (B, 3, S, S) -> three features of an image, after the final norm: {name: (B, D or 2D)}.

    cls: class token; of a model without one the mean patch token. patch: mean patch token. hyber:
    both, each L2-normalized first, as the shorter one would hardly count otherwise (the name is
    MMC's, the scaling our choice; iBOT's is in `jointly_normalized`).
    """
    return pool_tokens(encoder, encoder(x))


def pool_tokens(encoder, tokens):
    cls, patches = encoder.split(tokens)
    patch = patches.float().mean(1)
    cls = patch if cls is None else cls.float()
    return {"cls": cls, "patch": patch,
            "hyber": torch.cat([F.normalize(cls), F.normalize(patch)], 1)}


def jointly_normalized(encoder, x):
    """`pooled_features` with iBOT's hyber: concatenated first, then L2-normalized."""
    features = pooled_features(encoder, x)
    return features | {"hyber": F.normalize(torch.cat([features["cls"], features["patch"]], 1))}


load_projector = functools.lru_cache(maxsize=1)(checkpoint_heads.projector)     # once a model


def projected_features(encoder, x):
    """`pooled_features` and "projected": the output of the checkpoint's projection head.

    "projected" is missing if the checkpoint has no such head; `checkpoint_heads.projector` lists
    what is projected. Zhu et al. (2023) compare the two: encoded features represent parts,
    projected ones objects.
    """
    tokens, head = encoder(x), load_projector(encoder)
    features = pool_tokens(encoder, tokens)
    if head:
        with torch.autocast(x.device.type, enabled=False):
            features["projected"] = head(tokens.float())
    return features


def block_features(encoder, x):
    """Class token and mean patch token of every block's output, without the final norm."""
    outputs, _ = encoder.layers(x, norm=False)
    features = {}
    for number, tokens in enumerate(outputs, 1):
        z = pool_tokens(encoder, tokens)
        features |= {f"block {number} {name}": z[name] for name in ("cls", "patch")}
    return features


def all_tokens(encoder, x):
    """All tokens (B, L, D) after the final norm, in 16 bits to save memory."""
    return {"tokens": encoder(x).half()}


def dino_features(encoder, x):
    """Input of DINO's linear probe, after the final norm. Narrow models (ViT-S): class tokens of
    the last four blocks. Wide ones (ViT-B): class token and mean patch token of the last block."""
    if encoder.embed_dim >= 768:
        z = pooled_features(encoder, x)
        return {"cls+patch": torch.cat([z["cls"], z["patch"]], 1)}
    outputs, _ = encoder.layers(x, range(max(0, encoder.depth - 4), encoder.depth))
    split = [encoder.split(tokens) for tokens in outputs]
    return {f"{len(split)} x cls": torch.cat([patches.mean(1) if cls is None else cls
                                              for cls, patches in split], 1)}


def pixel_features(_, x):
    """The baseline without an encoder: the image, averaged to a grid of at most 32 x 32."""
    x = F.interpolate(x, (32, 32), mode="area") if x.shape[-1] > 32 else x
    return {"pixels": x.flatten(1)}


def select_features(opt, *protocol):
    """Names of the features of a probe (--feature, or the protocol's), and the function that
    computes them."""
    names = [opt.feature] if opt.feature else list(protocol)
    if opt.hyber_norm == "joint" and "hyber" in names:
        return names, jointly_normalized
    return names, projected_features if "projected" in names else pooled_features


# ---- features of a data set ----------------------------------------------------------------------


@torch.no_grad()
def encode_batches(model, opt, batches, names=("cls", "patch", "hyber"), encode=pooled_features,
                   total=None, key=None):
    """One pass over (x (B, 3, S, S), numbers (B,)) -> {name: (n, ...)}, numbers (n,).

    batches: those of this process, see `own_items`; the result holds all of them. numbers: labels
    or indices of the images. names: the features to keep; if a model has none of them (pixels have
    no class token), all of its features are kept. encode: encoder, x -> features. total: number of
    images, for the progress bar. key: describes the images, which are then encoded once for all
    tasks of a call, and with --cache once for all calls.
    ValueError: no images, features that are not finite or do not fit in the memory, most images
    cannot be read.
    """
    encode = encode if model.encoder else pixel_features
    in_memory = kept is not None and key is not None and encode in OF_SEVERAL_TASKS
    on_disk = opt.cache and key is not None
    name = feature_name(model, opt, encode, key) if in_memory or on_disk else None
    if in_memory and name in kept:
        features, numbers = kept[name]
        return keep_features(model, features, names), numbers
    path = Path(opt.out) / "features" / f"{name}.pt"
    if on_disk and distributed.rank() == 0:
        checkpoints.make_folder(path.parent)             # before the work
    content = read_stored(path) if on_disk else None
    if on_disk and all(gather_objects(content is not None)):
        datasets.print_once(f"note: {model.name}: stored features, {path}", sys.stdout)
        features = {key: z.to(model.device) for key, z in content["features"].items()}
        numbers = content["numbers"].to(model.device)
    else:
        features, numbers = encode_once(model, opt, batches, encode, total,
                                        () if in_memory or on_disk else names)
        if on_disk and distributed.rank() == 0:
            content = dict(features={key: z.cpu() for key, z in features.items()},
                           numbers=numbers.cpu())
            checkpoints.write_atomic(path, lambda file: torch.save(content, file))
    if in_memory:
        kept[name] = features, numbers
        while sum(z.nbytes for tensors, _ in kept.values() for z in tensors.values()) > KEPT_BYTES:
            del kept[next(iter(kept))]
    return keep_features(model, features, names), numbers


def read_stored(path):
    """The dict in a file of features; None without one, or if it is damaged, which is noted."""
    if not path.is_file():
        return None
    with contextlib.suppress(ValueError, OSError):
        content = checkpoints.read_file(path)
        if content.keys() >= {"features", "numbers"}:
            return content
    datasets.print_once(f"note: {path} is damaged: its features are computed again", sys.stdout)
    return None


def encode_once(model, opt, batches, encode, total, names):
    """The pass of `encode_batches`. names: () for all features."""
    features, error, size, count = {}, None, 0, 0
    bar = progress.bar(desc=f"{model.name}: encoding", total=total, unit="images",
                       shown=distributed.rank() == 0)
    try:
        for x, number in batches:
            with model.autocast():
                z = encode(model.encoder, x)
            for name, value in keep_features(model, z, names).items():
                features.setdefault(name, []).append(value if name == "tokens" else value.float())
            features.setdefault("numbers", []).append(number.to(x.device))
            size += sum(values[-1].nbytes for values in features.values())
            count += len(x)
            check_memory(model, size / count, max(total or 0, count * distributed.world_size()))
            bar.update(len(x) * distributed.world_size())
    except (ValueError, FileNotFoundError) as e:         # images that cannot be read
        error = e
    finally:
        bar.close()
    for problem in filter(None, gather_objects(error)):  # in all processes, or some would wait
        raise problem
    features = gather_batches(features, model.device)
    if total:
        datasets.check_count(opt.data, len(features.get("numbers", ())), total)
    if not features:
        raise ValueError(f"{opt.task}: no images to evaluate; raise --limit or change --data")
    numbers = features.pop("numbers")
    if not all(z.isfinite().all() for z in features.values()):
        raise not_finite(model)
    return features, numbers


def check_memory(model, size, count):
    """ValueError if the features of `count` images, each of `size` bytes, and the copy in which
    they are joined, do not fit in the memory. On a CPU the processes share it."""
    copies = 2 * (1 if model.device.type == "cuda" else distributed.world_size())
    need, memory = copies * size * count / 2**30, distributed.total_memory(model.device)
    if need > memory:
        raise ValueError(f"{model.name}: the features of {count:,} images (mirror images count) "
                         f"need {need:.0f} GiB of memory, of which there are {memory:.0f}: use "
                         f"fewer images (--limit), or one --feature")


def not_finite(model):
    if not all(p.isfinite().all() for p in model.encoder.parameters()):
        return ValueError(f"{model.name}: its weights are not finite: leave it out, or take an "
                          f"earlier checkpoint")
    return ValueError(f"{model.name}: its features are not finite; try --precision fp32, or an "
                      f"earlier checkpoint")


def own_items(items):
    """This process's items: every world_size-th one, starting at its rank."""
    return islice(items, distributed.rank(), None, distributed.world_size())


def gather_objects(value):
    """The values of all processes, in the order of ranks."""
    values = [value] * distributed.world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def gather_batches(features, device):
    """{name: [(B, ...), ...] batches of this process} -> {name: (n, ...)} of all, interleaved."""
    layout = {name: ([len(z) for z in batches], batches[0].shape[1:], batches[0].dtype)
              for name, batches in features.items()}
    layouts, rows = gather_objects(layout), {}
    for name, (_, shape, dtype) in {k: v for layout in layouts for k, v in layout.items()}.items():
        sizes = [layout[name][0] if name in layout else [] for layout in layouts]
        z = torch.cat(features.pop(name, [torch.empty(0, *shape, dtype=dtype, device=device)]))
        if len(layouts) > 1:                             # all_gather needs equal lengths
            padding = z.new_zeros(max(map(sum, sizes)) - len(z), *shape)
            parts = distributed.all_gather(torch.cat([z, padding])).chunk(len(layouts))
            parts = [part[:sum(size)].split(size) for part, size in zip(parts, sizes)]
            z = torch.cat([z for turn in zip_longest(*parts) for z in turn if z is not None])
        rows[name] = z
    return rows


def keep_features(model, features, names):
    """The features with these names, or all if there is none of them."""
    if list(names) == ["projected"] and "projected" not in features and model.encoder:
        raise ValueError(f"{model.name} has no projection head in its checkpoint; take a file with "
                         f"one (encoder.pt of dino, ibot, selfpatch, moco_v3, moby, mmc or "
                         f"hybrid; official files: MoCo v3, MoBY, full checkpoints of DINO and "
                         f"iBOT), or another --feature")
    return {name: z for name, z in features.items() if name in names} or features


# Functions of features that several tasks take; the others (of blocks, tokens) are not kept.
OF_SEVERAL_TASKS = pooled_features, jointly_normalized, projected_features, pixel_features
KEPT_BYTES = 2**30       # of the features in `kept`: the oldest ones are dropped
kept = None              # {feature_name: (features, numbers)} for several tasks: `keep_in_memory`


@contextlib.contextmanager
def keep_in_memory():
    """What is encoded inside is kept in memory, and not encoded again for another task."""
    global kept
    kept = {}
    try:
        yield
    finally:
        kept = None


def feature_name(model, opt, encode, key):
    """A name with a hash of everything that features depend on. Image files are assumed not to
    change; if they do, delete the folder of --cache."""
    places = [str(Path(place).resolve()) for place in (opt.data, datasets.root_of(opt.data_root))]
    what = (encode.__name__, *places, opt.limit, opt.batch_size, key)
    return f"{model.name}-{Path(opt.data).name}-{hash_settings(model, what)}"


def hash_settings(model, what):
    """16 hexadecimal digits of a model and of what is computed with it."""
    return f"{rng.key(str((model.identity, what))) % 2**64:016x}"


@functools.lru_cache                                     # several models use the same images
def load_split(name, root, split, img_size, limit, device):
    images = datasets.load_images(name, root, split, img_size, limit, device, hold_out=True)
    for note in images.notes:
        datasets.print_once(f"note: {note}", sys.stdout)             # of the first process only
    return images


def load_labeled(model, opt, split):
    """A split whose images have labels (datasets.Images), and its number of classes.

    Splits without a common class number their own classes: both must have the same ones. With
    split "train" both are therefore loaded.
    ValueError: no classes; no labels; splits with different classes. A class of the test images
    without training images is only noted.
    """
    if opt.data in LAYOUT and opt.data not in datasets.NAMES:
        labeled = [name for name in datasets.NAMES if name not in ("synthetic", "coco")]
        raise ValueError(f"{opt.task} needs images with one class each, and {opt.data} has none: "
                         f"choose --data {', '.join(labeled)} or a folder")
    where = opt.data, opt.data_root
    images = load_split(*where, split, model.img_size, opt.limit, model.device)
    if images.labels is None:
        raise ValueError(f"{opt.task} needs labels, and {opt.data} has none: choose another "
                         f"--data, or give each class its own subfolder")
    if split == "train":
        tests = load_split(*where, "test", model.img_size, opt.limit, model.device)
        if tests.labels is not None and tests.classes != images.classes:
            n, m = (len(split.classes or []) for split in (images, tests))
            other = sorted({*(images.classes or ())} ^ {*(tests.classes or ())})
            raise ValueError(f"{opt.task} needs the same classes in both splits, and the training "
                             f"and test images of {opt.data} have different ones ({n} and {m}): "
                             f"make {tree.list_names(other)} complete, or give the folder that "
                             f"contains both splits by its path")
        if tests.labels is not None and (
                new := int((~torch.isin(tests.labels, images.labels)).sum())):
            datasets.print_once(
                f"note: {new:,} of {len(tests):,} test images are of classes without a training "
                f"image, and cannot be right{': raise --limit' * bool(opt.limit)}", sys.stdout)
    return images, len(images.classes or range(int(images.labels.max()) + 1))


def extract_features(model, opt, split, names=("cls", "patch", "hyber"), encode=pooled_features,
                     mirror=False, change=None, whole=False):
    """One pass over a split in the standard test view -> {name: (n, D)}, labels (n,), number of
    classes.

    mirror: also encode the mirror image of every image -> {name: (n, 2, D)}. change: a function of
    a batch x and the indices of its images, applied before encoding. whole: no center crop.
    """
    images, num_classes = load_labeled(model, opt, split)
    whole = whole and images.paths is not None           # others are never cropped
    batches = data.batches(images, model.img_size, opt.batch_size, model.device, mean=model.mean,
                           std=model.std, workers=opt.workers, interpolation=model.interpolation,
                           resize=model.img_size if whole else None, rank=distributed.rank(),
                           world=distributed.world_size())
    if mirror:
        batches = ((torch.cat([x, x.flip(-1)]), index.repeat(2)) for x, index in batches)
    if change:
        batches = ((change(x, index), index) for x, index in batches)
    files = rng.key(str(images.paths), str(images.labels.tolist()))
    key = None if change else (split, mirror, whole, files)
    features, index = encode_batches(model, opt, batches, names, encode,
                                     len(images) * (1 + mirror), key)
    if mirror:                                           # both rows of an image next to each other
        order = index.argsort(stable=True)
        features = {name: z[order].unflatten(0, (-1, 2)) for name, z in features.items()}
        index = index[order][::2]
    return features, images.labels.to(index.device)[index], num_classes


def describe_output(model):
    """What the features are taken from, in words for a protocol; of pixels: nothing."""
    return f"last block{describe_norm(model)}; " if model.encoder else ""


def describe_norm(model):
    """Whether the final norm is applied: an encoder without one is used as it is (our choice)."""
    if not model.encoder:
        return ""
    return f", {'after the' if model.encoder.config['final_norm'] else 'without'} final norm"


def describe_view(model, opt, whole=False):
    """The standard test view in words: a center crop of files; small data sets in memory are used
    whole.

    The latter is our choice: CIFAR could be resized and cropped like files, 32 -> 256 -> 224 px,
    and lose its border. whole: files are not cropped either.
    """
    images = load_split(opt.data, opt.data_root, "test", model.img_size, opt.limit, model.device)
    resize = f" ({model.interpolation})" * (model.interpolation != "bicubic")
    if images.paths and not whole:
        return (f"short side {model.img_size * 256 // 224} px{resize}, center crop of "
                f"{model.img_size} px")
    return f"whole image at {model.img_size} px{resize}"


# ---- input and output ----------------------------------------------------------------------------

def input_side(model, opt, default):
    """Side of the input of a dense task in pixels: --img-size, else on toy twice the size in
    pretraining, else the protocol's `default`; rounded down to a multiple of the patch."""
    side = opt.img_size or (2 * model.img_size if is_toy(opt.data) else default)
    return side // model.encoder.patch_size * model.encoder.patch_size


def progress_bar(items, model, total=None):
    return progress.bar(items, f"{model.name}: evaluating", total, "images",
                        shown=distributed.rank() == 0)
