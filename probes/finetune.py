"""Fine-tuning: how good are pretrained weights as an initialization, if all weights are trained?

    python evaluate.py --task finetune --recipe simmim --checkpoint out/simmim-toy
    python evaluate.py --task finetune --reinit last:2     # contribution of the last two blocks

    image -> ViT -> mean of the patch tokens -> LayerNorm -> linear layer -> class
"""
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
from lib import augment, checkpoints, datasets, distributed, metrics, rng
from lib.run import cosine
from probes.common import (
    Report,
    choose_recipe,
    describe_view,
    gather_batches,
    is_toy,
    load_labeled,
)
from probes.training import Progress, copy_encoder, layer_decay_groups

# Shapes: B images, N patches, D width, C classes, S image side

# lr: at a batch of lr_batch; scaled linearly to `batch`, and with the square root from there to the
# smaller batches of small data sets (see below). clip: largest norm of the gradient. augment: a key
# of AUGMENTATIONS. mae, simmim: their released code. mmc: Wu et al., table 7, where "64 on 4 GPUs"
# for ImageNet and "on 2" for others is read as 64 per GPU. What they leave open is our choice: lr
# scaled linearly, end of the cosine, mixing, erasing, drop path and no clip as in mae; head: see
# Classifier.
FINETUNE_RECIPES = {
    "mae":    dict(lr=5e-4, lr_batch=256, batch=1024, epochs=100, warmup=5, clip=None,
                   augment="RandAugment"),
    "simmim": dict(lr=1.25e-3, lr_batch=512, batch=2048, epochs=100, warmup=20, clip=5.0,
                   augment="RandAugment"),
    "mmc":    dict(lr=5e-4, lr_batch=256, batch=256, epochs=100, warmup=5, clip=None,
                   augment="RandAugment"),
    # Our choice for few images, which the strong augmentation of the others and their smoothing
    # keep from being learned at all: crops of at least 0.35 of the image, flips.
    "light":  dict(lr=4e-3, lr_batch=256, batch=256, epochs=50, warmup=5, clip=None, augment=None,
                   crop_scale=(0.35, 1.0), smoothing=0.0)}
FEW_IMAGES = 10_000                                      # fewer: light, unless --recipe is given
MMC_NOT_IMAGENET = dict(batch=128, epochs=200, augment="ThreeAugment")       # on other data sets
CROP_SCALE = 0.08, 1.0                                   # area of the crop / area of the image
# On toy, our choice, to train in minutes: crops of most of the image, no mixing, no erasing.
TOY_FINETUNE = dict(batch=64, epochs=5, crop_scale=(0.6, 1.0), augment=None)
LAYER_DECAY, WEIGHT_DECAY, DROP_PATH = 0.65, 0.05, 0.1   # of all recipes
SMOOTHING = 0.1                                          # of the targets, in those of papers


def finetune(model, opt):
    """End-to-end fine-tuning as a classifier: top-1 and top-5 accuracy.

    With --reinit some blocks are re-initialized first, which shows how much of the accuracy comes
    from their pretrained weights (Park et al., F.3). The result is that of the best epoch on the
    test images, as in the released code of linear probes (the papers do not state it for
    fine-tuning). That is optimistic, so the last epoch is also reported. Our choice: recipe light
    for fewer than 10,000 images, if --recipe is not given (not on toy, which has settings of its
    own). The same command resumes an interrupted run, see training.Progress. ValueError: the pixels
    baseline, wrong --reinit, too few images, several --lr.
    """
    name, _ = choose_recipe(opt, FINETUNE_RECIPES)       # an unknown one is refused before any work
    if opt.save and name == "mmc":
        raise ValueError("--save: a head of class token and mean patch token, that of recipe mmc, "
                         "cannot be stored: choose another --recipe")
    if opt.save:
        checkpoints.make_folder(opt.out)
    if len(opt.lr) > 1:
        raise ValueError("finetune takes one --lr at a time")
    if not model.encoder:
        raise ValueError("finetune trains an encoder, and pixels have none: leave out that "
                         "--baseline, or take untrained")
    model = replace(model, interpolation="bicubic")      # in training and test, as all recipes
    reinit = parse_reinit(opt.reinit, model.encoder.depth)
    (images, classes), (tests, _) = (load_labeled(model, opt, s) for s in ("train", "test"))
    chosen_light = not opt.recipe and len(images) < FEW_IMAGES and not is_toy(opt.data)
    recipe_name, published = choose_recipe(
        replace(opt, recipe="light") if chosen_light else opt, FINETUNE_RECIPES)
    if recipe_name == "mmc" and opt.data != "imagenet":
        published = published | MMC_NOT_IMAGENET
    recipe = published | (TOY_FINETUNE if is_toy(opt.data) else {})
    with_cls = recipe_name == "mmc"                      # the head also takes the class token

    # Our choice for small data sets: a batch of at most 1/64 of the images, so that there are
    # enough steps, and lr scaled with the square root of the batch, as suits AdamW; scaled
    # linearly, lr would be too small.
    rank, world = distributed.rank(), distributed.world_size()
    batch_size = min(recipe["batch"], max(16, world, len(images) // 64)) // world * world
    if len(images) < batch_size or len(tests) < world:
        raise ValueError(f"finetune needs at least {batch_size} training and {world} test images, "
                         f"and {opt.data} has {len(images)} and {len(tests)}: raise --limit or "
                         f"change --data")
    crop = data.View(model.img_size, scale=recipe.get("crop_scale", CROP_SCALE))     # and a flip
    loader = data.Loader(images, [crop], batch_size, opt.seed, model.device, opt.workers, rank,
                         world)
    epochs = opt.epochs or recipe["epochs"]
    total = epochs * len(loader)
    warmup = total * recipe["warmup"] // published["epochs"]
    peak = recipe["lr"] / recipe["lr_batch"] * math.sqrt(batch_size * published["batch"])
    if opt.lr:
        [peak] = opt.lr

    def group_lr(step, factor):
        """Learning rate of the parameters with this factor of the layer decay. In MAE's code it
        scales the whole schedule; in SimMIM's only the peak: the warmup starts, and the cosine
        ends, at the same rate in all layers."""
        if recipe_name == "simmim":
            end = 2.5e-7 / 1.25e-3 * peak                # 1e-6 at the recipe's batch
            return simmim_lr(step, total, factor * peak, end, warmup)
        return factor * cosine(step, total, peak, 1e-6, warmup)

    torch.manual_seed(opt.seed)
    encoder = copy_encoder(model.encoder, DROP_PATH, reinit, with_cls, model.img_size)
    net = Classifier(encoder, classes, with_cls).to(model.device)
    optimizer = torch.optim.AdamW(
        layer_decay_groups(net.named_parameters(), encoder.depth, LAYER_DECAY, WEIGHT_DECAY),
        betas=(0.9, 0.999), fused=True)
    progress = Progress(model, opt, net, optimizer)
    if chosen_light and rank == 0:
        print(f"finetune: recipe light, as {opt.data} has {len(images):,} training images; "
              f"--recipe mae for the paper's", flush=True)
    parallel = distributed.wrap_ddp(net, model.device)
    transform = AUGMENTATIONS[recipe["augment"]] if recipe["augment"] else None
    mix, smoothing = make_mixing(classes), recipe.get("smoothing", SMOOTHING)
    curve = progress.curve             # accuracies and number of test images, of every epoch
    losses = []
    for step, batch in progress.steps(loader.batches(progress.step), total):
        torch.manual_seed(rng.key(opt.seed, "finetune", step, rank))         # augment, drop path
        lr = group_lr(step, 1.0)                         # of the head: printed
        for group in optimizer.param_groups:
            group["lr"] = group_lr(step, group["factor"])
        x, y = augment.denormalize(batch.views[0]), batch.label                 # (B, 3, S, S), (B,)
        if transform:
            x = augment.normalize(transform(x), model.mean, model.std)
            x, y = mix(erase_boxes(x), y)
        else:
            x = augment.normalize(x / 255, model.mean, model.std)
            y = F.one_hot(y, classes).float()
        parts = range(0, len(x), opt.batch_size)         # gradient accumulation
        for i in parts:
            parallel.require_backward_grad_sync = i == parts[-1]             # DDP's no_sync
            rows = slice(i, i + opt.batch_size)
            with model.autocast():
                scores = parallel(x[rows])
            loss = soft_cross_entropy(scores.float(), y[rows], smoothing) / len(x)
            loss.backward()
            losses.append(loss.detach() * len(parts))
        if recipe["clip"]:
            nn.utils.clip_grad_norm_(net.parameters(), recipe["clip"])
        optimizer.step()
        optimizer.zero_grad()

        epoch_ends = (step + 1) % len(loader) == 0
        if epoch_ends or step % 50 == 0:
            mean = progress.mean_loss(losses, lr)
        if epoch_ends:
            found, count = test_accuracy(net, tests, model, opt)
            curve.append((found, count))
            progress.print(f"epoch {len(curve)}/{epochs}  loss {mean:.3f}  lr {lr:.1e}  top-1 "
                           f"{found['top-1']:.1f}%")
            losses = []
    if opt.save and rank == 0:
        save_network(net, model, opt)
    progress.delete()

    found = [accuracies for accuracies, _ in curve]
    best, (last, num_tests) = max(found, key=lambda accuracies: accuracies["top-1"]), curve[-1]
    row = best | {{"top-1": "last epoch", "top-5": "last top-5"}[name]: x
                  for name, x in last.items()}
    start = f", blocks {opt.reinit} re-initialized" if opt.reinit else ""
    few_images = batch_size < published["batch"] // world * world
    augmentation = (f"{recipe['augment']}, mixup, cutmix, erasing" if recipe["augment"] else
                    f"crops of {recipe['crop_scale'][0]} to 1 of the image and flips only")
    light = ", our choice for fewer than 10,000 images: --recipe mae for the paper's"
    return Report({"cls+patch" if with_cls else "patch": row},
                  f"fine-tuned end to end, recipe {recipe_name}{light * chosen_light}{start}: "
                  f"AdamW, batch {batch_size}, lr {peak:.2g}"
                  f"{' (both our choice, for few images)' * (few_images and not opt.lr)}, "
                  f"label smoothing {smoothing}, layer decay "
                  f"{LAYER_DECAY}, {epochs} epochs, {augmentation}, drop path {DROP_PATH}; "
                  f"accuracy of the epoch that is best on the test images, and of the last; "
                  f"{describe_view(model, opt)}", dict(train=len(images), test=num_tests),
                  [f"{model.name}: best epoch {found.index(best) + 1} of {epochs}"])


# ---- the network ---------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Encoder, pooled feature, linear head (B, C), initialized near zero.

    The feature is the mean of the patch tokens after a new LayerNorm (fc_norm), which replaces the
    encoder's final norm. with_cls (MMC): class token and patch mean, concatenated; our choice:
    after the encoder's final norm, which is kept, and without fc_norm.
    """

    def __init__(self, encoder, classes, with_cls=False):
        super().__init__()
        width, eps = encoder.embed_dim, encoder.config.get("norm_eps", 1e-5)         # Swin: 1e-5
        self.encoder, self.with_cls = encoder, with_cls
        self.fc_norm = nn.Identity() if with_cls else nn.LayerNorm(width, eps)
        self.head = nn.Linear(2 * width if with_cls else width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        cls, patches = self.encoder.split(self.encoder(x))                   # (B, D), (B, N, D)
        z = patches.mean(1)
        if self.with_cls:
            z = torch.cat([z if cls is None else cls, z], 1)                 # (B, 2D)
        return self.head(self.fc_norm(z))


def save_network(net, model, opt):
    """Writes encoder and head as they are after the last epoch, as an encoder checkpoint. An
    earlier file of that name is renamed."""
    path = Path(opt.out) / f"finetuned-{model.name}-{Path(opt.data).name}.pt"
    if path.exists():
        kept = checkpoints.free_name(path)
        path.rename(kept)
        print(f"the earlier {path} is kept as {kept}", flush=True)
    head = {key: x for key, x in net.state_dict().items() if not key.startswith("encoder.")}
    checkpoints.save_encoder(
        path, net.encoder, branch="finetuned", method=model.source.method, data=opt.data,
        mean=model.mean, std=model.std, interpolation=model.interpolation,
        heads={"classifier": head})
    print(f"{path}: the fine-tuned network after the last epoch", flush=True)


def parse_reinit(text, depth):
    """ "first:2", "last:2" or None -> indices of the blocks to re-initialize."""
    match = re.fullmatch(r"(first|last):(\d+)", text or "first:0")
    n = int(match[2]) if match else -1
    if not 0 <= n <= depth:
        raise ValueError(f"--reinit {text}: give first:N or last:N with N from 0 to {depth}, the "
                         f"number of blocks of this encoder")
    return range(n) if match[1] == "first" else range(depth - n, depth)


def simmim_lr(step, total, start, end, warmup):
    """Cosine from step 0 on; during the warmup a linear increase from `end` to `start` instead.

    At the end of the warmup lr therefore drops to the value of the cosine at that step (from 5e-3
    to 4.523e-3 in SimMIM's log).
    """
    if step < warmup:
        return end + (start - end) * step / warmup
    return cosine(step, total, start, end)


def soft_cross_entropy(scores, targets, smoothing=SMOOTHING):
    """Cross-entropy, summed over the batch. scores, targets: (B, C); targets are smoothed to
    (1 - smoothing) y + smoothing / C."""
    return F.cross_entropy(scores, targets, label_smoothing=smoothing, reduction="sum")


@torch.no_grad()
def test_accuracy(net, tests, model, opt):
    """metrics.accuracy on the test images that can be read, and their number; each process
    evaluates its part of them."""
    world = distributed.world_size()
    batch_size = max(1, min(opt.batch_size, len(tests) // world))        # some for each process
    found = {"scores": [], "labels": []}
    net.eval()
    for x, index in data.batches(tests, model.img_size, batch_size, model.device, mean=model.mean,
                                 std=model.std, workers=opt.workers,
                                 interpolation=model.interpolation, rank=distributed.rank(),
                                 world=world):
        with model.autocast():
            found["scores"].append(net(x).float())
        found["labels"].append(tests.labels.to(model.device)[index])
    net.train()
    found = gather_batches({name: batches for name, batches in found.items() if batches},
                           model.device)
    count = len(found.get("labels", ()))
    datasets.check_count(tests.name, count, len(tests))
    return metrics.accuracy(found["scores"], found["labels"]), count


# ---- augmentation --------------------------------------------------------------------------------


def make_mixing(classes):
    """A function of (x (B, 3, S, S), y (B,)) -> x mixed with other images of the batch, y (B, C).

    Half of the batches are blended (mixup, weight from Beta(0.8, 0.8)); in the others a box is
    replaced by that of the other image (cutmix, area from Beta(1, 1)). Labels are mixed with the
    same weights.
    """
    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                            v2.CutMix(alpha=1.0, num_classes=classes)])


def rand_augment(x):
    """RandAugment: two times one of 14 operations, applied with probability 1/2, as in timm's
    default. (B, 3, S, S) uint8 -> (B, 3, S, S) in [0, 1].

    The recipes give magnitude 9 of timm's 10 (m9-mstd0.5-inc1); of torchvision's bins 0 to 30 that
    is 27. Differences from timm: the strength does not vary (mstd), Posterize keeps 4 bits (timm:
    1), Invert and SolarizeAdd are missing, one of the 14 is Identity, and warps are bilinear. Our
    choice: if more than 32 images are chosen, they are split into 32 groups with one operation
    each, so that a GPU does not process single images; there are only 23 operations, signs
    included.
    """
    operation = v2.RandAugment(1, magnitude=27, interpolation=TF.InterpolationMode.BILINEAR,
                               fill=[round(255 * m) for m in augment.MEAN])
    x = x.clone()
    for _ in range(2):
        chosen = torch.randperm(len(x))[torch.rand(len(x)) < 0.5]
        for rows in chosen.to(x.device).chunk(32):
            if len(rows):                                # without a chosen image the chunk is empty
                x[rows] = operation(x[rows])
    return x / 255


def three_augment(x):
    """ThreeAugment (DeiT III): grayscale, solarize or blur, then color jitter. uint8 -> [0, 1]."""
    x, kind = x / 255, torch.randint(3, (len(x),))
    radius, threshold = 0.1 + 1.9 * torch.rand(len(x)), torch.full((len(x),), 128 / 255)
    augment.apply(lambda x, _: augment.luma(x).expand_as(x), x, kind == 0, radius)
    augment.apply(augment.solarize, x, kind == 1, threshold)
    augment.apply(augment.blur, x, kind == 2, radius)
    order = torch.rand(len(x), 3).argsort(1)             # of brightness, contrast, saturation
    return augment.jitter(x, order, 0.7 + 0.6 * torch.rand(len(x), 3))


AUGMENTATIONS = {"RandAugment": rand_augment, "ThreeAugment": three_augment}


def erase_boxes(x, probability=0.25):
    """Random erasing: a box of 2 to 33% of the area becomes noise, drawn for each pixel from N(0,
    1). x: (B, 3, S, S) normalized."""
    size, u = x.shape[-1], torch.rand(len(x), 22)
    box = augment.crop_boxes(u, size, size, torch.tensor([0.02, 1 / 3]),
                             torch.tensor([0.3, 1 / 0.3]))
    box[torch.rand(len(x)) >= probability] = 0           # a box of height 0
    top, left, height, width = box.to(x.device)[:, :, None].unbind(1)        # (B, 1)
    position = torch.arange(size, device=x.device)
    rows = (position >= top) & (position < top + height)
    columns = (position >= left) & (position < left + width)
    inside = rows[:, None, :, None] & columns[:, None, None, :]              # (B, 1, S, S)
    return torch.where(inside, torch.randn_like(x), x)
