"""Images in, views out: data sets, the augmentations of self-supervision, and the loader.

    images = data.load("cifar10", root="/data")                # or toy, imagenet, coco, a folder
    views = [View(224, scale=(0.4, 1.0), copies=2), View(96, scale=(0.05, 0.4), copies=8)]
    loader = Loader(images, views, batch_size=256, seed=0, device="cuda")
    for batch in loader.batches(start=0):                      # endless; batch.views: ten tensors

    small sets   uint8, whole on the device ── crop, resize, flip: two matrix products ──┐
    trees        JPEG ── a worker decodes once, cuts the crops of all views ── uint8 ────┤
                                                                                         ▼
                 batched on the device: jitter, grey, blur, solarise, normalise ── float32

Every random number is a function of (seed, epoch, view, purpose, image), see rng.py. So the number
of workers or processes, a resume, the place of an image in its batch never change what is seen.
"""
import atexit
import codecs
import csv
import difflib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling
from torch.utils.data import DataLoader

import rng
import toy

# B images, V views, H, W pixels of an image, S of a view

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # ImageNet, of RGB / 255

# --------------------------------------------------------------------------------------------------
# What a view is


@dataclass
class View:
    """How one view of an image is made, in this order. Probabilities are per image.

    Without further arguments: random resized crop and flip, all that masked image modelling uses.
    DINO and MoCo v3 add jitter_p 0.8, grey_p 0.2, and blur and solarise by view (BYOL, app. B).
    """
    size: int                               # side of the output, pixels
    scale: tuple = (0.08, 1.0)              # area of the crop / of the image (Inception); MAE 0.2-1
    ratio: tuple = (3 / 4, 4 / 3)           # width / height of the crop, log-uniform (Inception)
    interpolation: str = "bicubic"          # or bilinear (SimMIM, MoCo v3), lanczos; antialiased
    flip: float = 0.5                       # probability of mirroring left and right
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue (BYOL)
    jitter_p: float = 0.0                   # probability of the four together, in random order
    grey_p: float = 0.0                     # probability of dropping the colour
    blur_p: float = 0.0                     # probability of a Gaussian blur
    blur_sigma: tuple = (0.1, 2.0)          # PIL's radius, uniform, pixels of the view (SimCLR)
    solarize_p: float = 0.0                 # probability of inverting all values >= 128 (BYOL)
    copies: int = 1                         # so many such views, each with its own random numbers
    like: int | None = None                 # take those of this view (from 0): the same crop at
    #                                         another size, for a tokenizer (BEiT, CAE)

    def __post_init__(self):
        if not 0 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"a crop's least and largest area, {self.scale[0]:g} and "
                             f"{self.scale[1]:g}, are shares of the image, the smaller one first")
        if self.blur_sigma[1] > 2.4:
            raise ValueError(f"blur_sigma {self.blur_sigma}: `blur` reaches 6 pixels, radius 2.4")
        if len(self.jitter) != 4:
            raise ValueError(f"jitter {self.jitter}: four numbers, of brightness, contrast, "
                             f"saturation, hue")


# --------------------------------------------------------------------------------------------------
# Augmentations: (B, 3, S, S) float32 in [0, 1] and parameters for each image, all images at once


def crop_boxes(u, height, width, scale, ratio):
    """RandomResizedCrop: (..., 22) uniform numbers -> (..., 4) int64 top, left, height, width.

    Ten tries for area and ratio; if none fits, the largest central box of an allowed ratio, as
    torchvision does. height, width: of the image. scale, ratio: (2,) or (..., 2) tensors.
    """
    (s0, s1), (r0, r1) = scale[..., None].unbind(-2), ratio[..., None].unbind(-2)
    area = height * width * (s0 + (s1 - s0) * u[..., :10])
    aspect = (r0.log() + (r1 / r0).log() * u[..., 10:20]).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)                      # (..., 10)
    first, some = fits.int().argmax(-1, keepdim=True), fits.any(-1, keepdim=True)
    h = torch.where(some, h.gather(-1, first), (width / r0).round().clamp(max=height))
    w = torch.where(some, w.gather(-1, first), (height * r1).round().clamp(max=width))
    top = torch.where(some, u[..., 20:21] * (height - h + 1), (height - h) / 2)
    left = torch.where(some, u[..., 21:22] * (width - w + 1), (width - w) / 2)
    return torch.cat([top, left, h, w], -1).long()


def triangle(x):
    return (1 - x.abs_()).clamp_(min=0)


def cubic(x):
    """Keys' kernel with a = -1/2, PIL's, as a sum of truncated powers: no branch."""
    near, far = (1 - x.abs_()).clamp_(min=0), (2 - x).clamp_(min=0)
    return (far * far).mul_(far.sub_(1)).mul_(0.5).add_((near * near).mul_(1 - 2 * near))


def lanczos(x):
    return torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)


KERNELS = {"bilinear": triangle, "bicubic": cubic, "lanczos": lanczos}


def resample(start, length, size, out, kernel, flip=None):
    """(B,) pieces [start, start + length) of an axis of `size` pixels -> (B, out, size) weights.

    Row i mixes output pixel i. Where the piece shrinks, the kernel is as much wider: antialiasing.
    Pixels outside of the piece weigh nothing, as if it had been cut out first.
    """
    scale = length[:, None] / out                                                # (B, 1)
    stretch = scale.clamp(min=1)
    place = torch.arange(out, device=start.device) + 0.5
    if flip is not None:
        place = torch.where(flip[:, None], out - place, place)                   # at no cost
    centre = (start[:, None] + place * scale) / stretch                          # (B, out)
    pixel = torch.arange(size, device=start.device) + 0.5
    weight = KERNELS[kernel]((pixel / stretch)[:, None] - centre[:, :, None])    # (B, out, size)
    weight *= ((pixel > start[:, None]) & (pixel < (start + length)[:, None]))[:, None]
    return weight.div_(weight.sum(-1, keepdim=True))


def crop(x, box, size, kernel="bicubic", flip=None):
    """(B, 3, H, W) uint8, (B or 1, 4) boxes -> (B, 3, S, S) in [0, 1]: rows @ x @ columns."""
    rows = resample(box[:, 0], box[:, 2], x.shape[2], size, kernel)
    columns = resample(box[:, 1], box[:, 3], x.shape[3], size, kernel, flip)
    return mix(rows, x.float(), columns).mul_(1 / 255).clamp_(0, 1)            # bicubic overshoots


def mix(rows, x, columns):
    """rows x columns^T of every image and channel; the channels share the second product."""
    return ((rows[:, None] @ x).flatten(1, 2) @ columns.mT).unflatten(1, (x.shape[1], -1))


def luma(x):
    return x[:, :1].mul(0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def adjust_hue(x, turn):
    """Rotates the hue by (B,) turns; the largest and the smallest channel keep their values."""
    r, g, b = x.split(1, 1)
    top, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = top - low
    per = 1 / chroma.clamp(min=1e-12)                                            # grey: any hue
    # Hue in sixths, by which channel is the largest; lerp by 0 or 1 is torch.where, but 4 x faster.
    not_red, not_green = (top - r).sign_(), (top - g).sign_()
    h = (b - r).mul_(per).add_(2).lerp_((r - g).mul_(per).add_(4), not_green)
    h = (g - b).mul_(per).lerp_(h, not_red)
    h = h.add_(6 * turn.view(-1, 1, 1, 1))
    h = h.sub_((h / 6).floor_().mul_(6))                                         # h mod 6
    ramps = (h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()       # red, green, blue
    return torch.cat([ramp.clamp_(0, 1).mul_(chroma).add_(low) for ramp in ramps], 1)


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def jitter(x, op, factor):
    """Colour jitter in place. op, factor: (B, T) on the CPU, what is done t-th and how strongly.

    The first three are one formula, x <- factor x + (1 - factor) other, with black, the mean luma
    or the luma as the other picture: done for all images at once, whatever the order of each.
    """
    weight = torch.stack([(1 - factor) * (op != HUE), op == CONTRAST, op == SATURATION], -1)
    weight = weight.to(x.device, non_blocking=True)[..., None, None, None]       # (B, T, 3, 1..)
    for t in range(op.shape[1]):
        amount, contrast, saturation = weight[:, t].unbind(1)
        grey = luma(x)
        mean = grey.mean((2, 3), keepdim=True)
        x.lerp_(grey.mul_(saturation).add_(mean.mul_(contrast)), amount).clamp_(0, 1)
        apply(adjust_hue, x, (op[:, t] == HUE) & (factor[:, t] != 0), factor[:, t])
    return x


def blur(x, radius):
    """PIL's Gaussian blur of (B,) radii up to 2.4: three box blurs, here as one kernel of 13 pixels
    along each axis. The edges go on for ever; by PIL they are repeated before each of the three.

    A box has a fractional length with the variance wanted; its ends count in part (Gwosdek et al.,
    2011, eq. 7, 11, 14).
    """
    variance = radius.square() / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()                      # 0 or 1 pixel
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1).square()))
    reach, place = (whole + part)[:, None, None], torch.arange(13, device=x.device)
    box = (reach + 1 - (place[:, None] - place).abs()).clamp_(0, 1).div_(2 * reach + 1)
    kernel = (box @ box @ box)[:, 6].repeat_interleave(3, 0)                     # (3B, 13)
    planes = F.pad(x.flatten(0, 1)[None], (6, 6, 6, 6), mode="replicate")
    for along in kernel[:, None, None], kernel[:, None, :, None]:
        planes = F.conv2d(planes, along, groups=len(kernel))
    return planes.view_as(x)


def solarize(x, threshold):
    return torch.where(x >= threshold.view(-1, 1, 1, 1), 1 - x, x)


def apply(transform, x, chosen, parameter):
    """x[chosen] = transform(x[chosen], parameter[chosen]), in place.

    chosen and parameter are on the CPU, so the rows are known without waiting for the GPU.
    """
    rows = chosen.nonzero().flatten()
    if len(rows):
        parameter = parameter[rows].to(x.device, non_blocking=True)
        rows = rows.to(x.device, non_blocking=True)
        x.index_copy_(0, rows, transform(x.index_select(0, rows), parameter))


def throw_dice(view, index, *key):
    """What happens to each of (B,) images in a view, but its box: dict of (B, ...) on the CPU."""
    def uniform(shape, low, high, purpose):
        return low + (high - low) * rng.uniform(index, shape, *key, purpose)

    def chance(p, purpose):
        return rng.uniform(index, (), *key, purpose) < p

    low = torch.tensor([max(0.0, 1 - s) for s in view.jitter[:3]] + [-view.jitter[3]])
    high = torch.tensor([1 + s for s in view.jitter[:3]] + [view.jitter[3]])
    factor = torch.where(chance(view.jitter_p, "jitter")[:, None],
                         uniform(4, low, high, "factor"), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    op = uniform(4, 0, 1, "order").argsort(1)                                    # a permutation
    steps = 4 if view.jitter_p > 0 else 0
    return {"flip": chance(view.flip, "flip"),
            "op": op[:, :steps],
            "factor": factor.gather(1, op)[:, :steps],
            "grey": chance(view.grey_p, "grey"),
            "radius": chance(view.blur_p, "blur") * uniform((), *view.blur_sigma, "radius"),
            "threshold": torch.where(chance(view.solarize_p, "solarize"), 128 / 255, 2.0)}


def colour(x, dice):
    """Jitter, grey, blur, solarise, normalise: (B, 3, S, S) in [0, 1], in place."""
    jitter(x, dice["op"], dice["factor"])
    apply(lambda x, _: luma(x).expand_as(x), x, dice["grey"], dice["grey"])
    apply(blur, x, dice["radius"] > 0, dice["radius"])
    apply(solarize, x, dice["threshold"] < 1, dice["threshold"])
    return normalize(x)


def normalize(x, mean=MEAN, std=STD):
    """(B, 3, S, S) in [0, 1] -> about mean 0 and deviation 1, in place."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(x.device, non_blocking=True) for v in (mean, std))
    return x.sub_(mean).div_(std)


def denormalize(x, mean=MEAN, std=STD):
    """(..., 3, S, S) normalised -> uint8, for pictures."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return (x.float() * std + mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------
# Data sets


LAYOUT = {                                  # what is looked for under the root, and where to get it
    "cifar10": ("cifar-10-batches-py/{data_batch_1 .. data_batch_5, test_batch, batches.meta}",
                "'CIFAR-10 python version' from cs.toronto.edu/~kriz/cifar.html"),
    "cifar100": ("cifar-100-python/{train, test, meta}",
                 "'CIFAR-100 python version' from cs.toronto.edu/~kriz/cifar.html"),
    "stl10": ("stl10_binary/{train_X, train_y, test_X, test_y, unlabeled_X}.bin, class_names.txt",
              "'STL-10 binary files' from cs.stanford.edu/~acoates/stl10"),
    "imagenet": ("imagenet/{train, val}/<wnid>/*.JPEG, val sorted into class folders like train",
                 "'ILSVRC2012' from image-net.org (registration)"),
    "imagenet100": ("imagenet/{train, val}/<wnid>/*.JPEG or imagenet100/{train, val}/...",
                    "'ILSVRC2012' from image-net.org (registration); 100 of its classes are used"),
    "imagenet10": ("imagenet/{train, val}/<wnid>/*.JPEG or imagenet10/{train, val}/...",
                   "'ILSVRC2012' from image-net.org (registration); 10 of its classes are used"),
    "coco": ("coco/{train2017, val2017}/*.jpg",
             "'2017 Train images' and '2017 Val images' from cocodataset.org"),
    "pets": ("oxford-iiit-pet/{images/*.jpg, annotations/{trainval, test}.txt}",
             "'images.tar.gz' and 'annotations.tar.gz' from robots.ox.ac.uk/~vgg/data/pets"),
    "flowers": ("flowers-102/{jpg/*.jpg, imagelabels.mat, setid.mat}",
                "'102flowers.tgz' and both .mat files from robots.ox.ac.uk/~vgg/data/flowers/102"),
    "cars": ("stanford_cars/{cars_train/*.jpg, cars_test/*.jpg, cars_test_annos_withlabels.mat, "
             "devkit/{cars_meta, cars_train_annos}.mat}",
             "a mirror of 'Stanford Cars' (its first host is gone)"),
    "inat18": ("inat18/{train2018.json, val2018.json, train_val2018/<group>/<number>/*.jpg}",
               "'iNaturalist 2018' from github.com/visipedia/inat_comp"),
    "miniimagenet": ("miniimagenet/{images/*.jpg, train.csv, val.csv, test.csv}",
                     "a copy of 'miniImageNet' with the lists of Ravi and Larochelle"),
}
LISTS = {      # sets whose official lists say which image is where: folders, list of train, of test
    "pets": (("oxford-iiit-pet", "pets/oxford-iiit-pet"),
             "annotations/trainval.txt", "annotations/test.txt"),
    "flowers": (("flowers-102", "flowers/flowers-102"), "setid.mat", "setid.mat"),
    "cars": (("stanford_cars", "cars/stanford_cars"),
             "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
    "inat18": (("inat18", "inat2018", ""), "train2018.json", "val2018.json"),
    "miniimagenet": (("miniimagenet", "mini-imagenet", ""), "train.csv", "test.csv"),
}
NAMES = ("toy", "toy-scenes", "synthetic", *LAYOUT)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# The usual ImageNet-100, of contrastive multiview coding (Tian et al., 2020); others differ.
IMAGENET100 = sorted("n" + digits for digits in """
02869837 01749939 02488291 02107142 13037406 02091831 04517823 04589890 03062245 01773797 01735189
07831146 07753275 03085013 04485082 02105505 01983481 02788148 03530642 04435653 02086910 02859443
13040303 03594734 02085620 02099849 01558993 04493381 02109047 04111531 02877765 04429376 02009229
01978455 02106550 01820546 01692333 07714571 02974003 02114855 03785016 03764736 03775546 02087046
07836838 04099969 04592741 03891251 02701002 03379051 02259212 07715103 03947888 04026417 02326432
03637318 01980166 02113799 02086240 03903868 02483362 04127249 02089973 03017168 02093428 02804414
02396427 04418357 02172182 01729322 02113978 03787032 02089867 02119022 03777754 04238763 02231487
03032252 02138441 02104029 03837869 03494278 04136333 03794056 03492542 02018207 04067472 03930630
03584829 02123045 04229816 02100583 03642806 04336792 03259280 02116738 02108089 03424325 01855672
02090622""".split())
SUBSETS = {"imagenet100": IMAGENET100,         # and the ten of SelfPatch's Table 5 (its supplement)
           "imagenet10": ["n02056570", "n02085936", "n02128757", "n02690373", "n02692877",
                          "n03095699", "n04254680", "n04285008", "n04467665", "n07747607"]}


@dataclass
class Images:
    """A data set: pixels (a small one, whole on the device) or paths (a tree of files)."""
    name: str
    split: str
    classes: list | None = None             # names, in the order of the labels
    labels: torch.Tensor | None = None      # (n,) int64, on the CPU
    pixels: torch.Tensor | None = None      # (n, 3, H, W) uint8
    paths: list | None = None

    def __len__(self):
        return len(self.paths if self.pixels is None else self.pixels)

    def some(self, rows, split):
        """Of a tree of files those with these numbers (m,), as a split of that name."""
        return replace(self, split=split, paths=[self.paths[i] for i in rows.tolist()],
                       labels=None if self.labels is None else self.labels[rows])


def root_of(given):
    return given or os.environ.get("DATA_ROOT", "datasets")


def load(name, root=None, split="train", size=64, limit=None, device="cpu", apart=False):
    """A data set by its name, or any tree of images by its path. Nothing is downloaded.

    root: folder that holds the official layout (default: $DATA_ROOT, else "datasets").
    split: train or test (= val), stl10 also unlabeled; a folder without them serves all for either.
    miniimagenet has 64 classes to train on, 16 others as val and 20 others as test.
    size: pixels of toy and synthetic images. limit: use so many images: the first ones, or of
    files, which are sorted by class, evenly spread ones; toy draws any number. apart: of a folder
    without splits every fifth image is for the test, the others are to train on.
    Raises FileNotFoundError that shows the layout expected, ValueError for what is unknown.
    """
    root = root_of(root)
    splits = ["train", "test", *{"stl10": ["unlabeled"], "miniimagenet": ["val"]}.get(name, [])]
    split = "test" if split == "val" and split not in splits else split
    if split not in splits:
        raise ValueError(f"No split {split!r} of {name}: choose {' or '.join(splits)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give a number of images from 1, or nothing for all")
    if name in ("toy", "toy-scenes"):
        parts = [toy.draw(index, split, size, scenes=name == "toy-scenes")
                 for index in torch.arange(limit or toy.SIZES[split]).split(256)]
        pixels, labels = (torch.cat([part[key] for part in parts]) for key in ("image", "label"))
        images = Images(name, split, list(toy.CLASSES), labels, pixels)
    elif name == "synthetic":               # noise: how fast a step is when its input is for free
        noise = torch.randint(256, (limit or 2048, 3, size, size), dtype=torch.uint8,
                              generator=rng.generator("synthetic", split))
        images = Images(name, split, pixels=noise)
    elif name in ("cifar10", "cifar100"):
        images = Images(name, split, *read_cifar(name, root, split))
    elif name == "stl10":
        images = Images(name, split, *read_stl10(root, split))
    else:
        images = (Images(name, split, *read_list(name, root, split)) if name in LISTS else
                  load_tree(name, root, split))
        if apart and images.split == "all" and len(images) > 1:
            tests = torch.arange(len(images)) % 5 == 0
            images = images.some((tests == (split == "test")).nonzero()[:, 0], split)
            print(f"note: {name} has no train/ and val/: for probes {len(images)} of its "
                  f"{len(tests)} images are {split}", file=sys.stderr)
        if limit and limit < len(images):
            images = images.some(torch.arange(limit) * len(images) // limit, images.split)
        return images
    images.pixels = images.pixels[:limit].to(device)
    images.labels = None if images.labels is None else images.labels[:limit]
    return images


def load_tree(name, root, split):
    """ImageNet, COCO or a path -> Images with paths; the class is the first folder on the way."""
    only = SUBSETS.get(name, [""])
    if name in LAYOUT:
        folder = {"train": "train", "test": "val"}[split] + ("2017" if name == "coco" else "")
        places = (["coco", "", "coco/images", "images"] if name == "coco" else
                  ["imagenet", "", "imagenet1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"])
        places = [name] * (name in SUBSETS) + places
        folder = find(name, root, *(os.path.join(place, folder) for place in places))
    elif os.path.isdir(name):
        have = {"train": ["train"], "test": ["val", "test"]}
        have = {s: [f for f in have[s] if os.path.isdir(os.path.join(name, f))] for s in have}
        split = split if all(have.values()) else "all"
        folder = name if split == "all" else os.path.join(name, have[split][0])
    elif os.sep in name or name.startswith("."):
        raise FileNotFoundError(f"No folder {name}: give the path of a tree of images, or one of "
                                f"{', '.join(NAMES)}")
    else:
        near = difflib.get_close_matches(name, NAMES, 1, 0)[0]
        raise ValueError(f"Unknown data set {name!r}, did you mean {near!r}? Known are "
                         f"{', '.join(NAMES)}; the path of a folder of images will do too")
    paths = sorted(os.path.join(at, file) for wnid in only
                   for at, _, files in os.walk(os.path.join(folder, wnid), followlinks=True)
                   for file in files if file.lower().endswith(SUFFIXES) and file[0] != ".")
    if not paths:
        raise FileNotFoundError(f"No images under {folder}: looked for {' '.join(SUFFIXES)} in it "
                                "and its sub-folders" + (
                                    "; labels are not needed" if name not in LAYOUT else
                                    f". Expected {LAYOUT[name][0]}"))
    tops = [path[len(folder):].lstrip(os.sep).split(os.sep)[:-1][:1] for path in paths]
    found = sorted({top[0] for top in tops if top})
    if name in SUBSETS and len(found) < len(only):
        print(f"note: only {len(found)} of the {len(only)} classes are in {folder}",
              file=sys.stderr)
    classes = SUBSETS.get(name, found)
    if len(classes) < 2 or not all(tops):
        if name == "imagenet":
            raise missing(name, folder)                    # the official val archive is flat
        return Images(name, split, paths=paths)
    number = {c: i for i, c in enumerate(classes)}
    labels = torch.tensor([number[top] for top, in tops])
    return Images(name, split, list(classes), labels, paths=paths)


def missing(name, root, layouts=LAYOUT):
    layout, source = layouts[name]
    return FileNotFoundError(
        f"No {name} under {root}: expected {layout}. Get {source}, unpack it, and give the folder "
        "that holds it as data root (or in $DATA_ROOT); nothing is downloaded")


def find(name, root, *places, layouts=LAYOUT):
    """The first of the places under root that exists."""
    for place in places:
        if os.path.exists(path := os.path.normpath(os.path.join(root, place))):
            return path
    raise missing(name, root, layouts)


class ArraysOnly(pickle.Unpickler):
    """A pickle can name any function to be called; here only those that rebuild numpy arrays."""
    allowed = {"ndarray": np.ndarray, "dtype": np.dtype, "encode": codecs.encode, "bytes": bytes,
               "_reconstruct": np.zeros(1).__reduce__()[0],
               "_frombuffer": np.zeros(1).__reduce_ex__(5)[0]}

    def find_class(self, module, name):
        modules = "numpy", "_codecs", "builtins", "__builtin__"
        if module.split(".")[0] not in modules or name not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return self.allowed[name]           # ours, under whatever module this numpy keeps it


def read_cifar(name, root, split):
    """-> classes, labels, pixels (n, 3, 32, 32) from the official pickles."""
    folder, meta, files, key = {
        ("cifar10", "train"): ("cifar-10-batches-py", "batches.meta",
                               [f"data_batch_{i}" for i in range(1, 6)], "label"),
        ("cifar10", "test"): ("cifar-10-batches-py", "batches.meta", ["test_batch"], "label"),
        ("cifar100", "train"): ("cifar-100-python", "meta", ["train"], "fine_label"),
        ("cifar100", "test"): ("cifar-100-python", "meta", ["test"], "fine_label"),
    }[name, split]

    def read(file):
        path = find(name, root, f"{folder}/{file}", f"{name}/{folder}/{file}")
        try:
            with open(path, "rb") as f:     # latin1: what arrays pickled by Python 2 need
                content = ArraysOnly(io.BytesIO(f.read()), encoding="latin1").load()
            return {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        except Exception as error:          # a damaged pickle raises nearly anything
            raise ValueError(f"{path} is not a CIFAR file: {error}") from None

    try:
        parts, names = [read(file) for file in files], read(meta)[f"{key}_names"]
        pixels = torch.from_numpy(np.concatenate([part["data"] for part in parts]))
        labels = torch.tensor(list(itertools.chain(*(part[f"{key}s"] for part in parts))))
        classes = [c.decode() if isinstance(c, bytes) else c for c in names]
        return classes, labels, pixels.view(-1, 3, 32, 32)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} under {root} is not as expected: {error}") from None


def read_stl10(root, split):
    """-> classes, labels, pixels (n, 3, 96, 96); the files store columns first."""
    path = find("stl10", root, f"stl10_binary/{split}_X.bin", f"stl10/stl10_binary/{split}_X.bin")
    pixels, labels, each = np.fromfile(path, np.uint8), None, 3 * 96 * 96
    if split != "unlabeled":
        folder = os.path.dirname(path)
        labels = np.fromfile(find("stl10", folder, f"{split}_y.bin"), np.uint8).astype(np.int64) - 1
        with open(find("stl10", folder, "class_names.txt")) as file:
            classes = file.read().split()
    if len(pixels) % each or labels is not None and len(pixels) != each * len(labels):
        raise ValueError(f"{path} is cut off, or does not go with its labels: load it anew")
    pixels = torch.from_numpy(pixels.reshape(-1, 3, 96, 96)).mT.contiguous()
    return (None, None, pixels) if labels is None else (classes, torch.from_numpy(labels), pixels)


def read_list(name, root, split):
    """-> classes, labels, None, paths of a set of LISTS.

    Of Flowers-102, train is its train and val, 2,040 images, as for transfer (the papers do not
    say; our choice). iNaturalist 2018: its val is test, as the labels of its test are not public.
    """
    folders, *lists = LISTS[name]
    file = f"{split}.csv" if name == "miniimagenet" else lists[split == "test"]
    path = find(name, root, *(os.path.join(folder, file) for folder in folders))
    folder = os.path.normpath(path[:-len(file)])
    if file.endswith(".mat") and not importlib.util.find_spec("scipy"):
        raise ValueError(f"The labels of {name} are .mat files, which scipy reads: "
                         "pip install scipy")
    try:
        if name == "inat18":
            with open(path, encoding="utf-8") as text:
                content = json.load(text)
            categories = sorted(content["categories"], key=lambda c: c["id"])    # 0 ... 8141
            classes = [category["name"] for category in categories]
            number = {category["id"]: i for i, category in enumerate(categories)}
            label = {a["image_id"]: number[a["category_id"]] for a in content["annotations"]}
            labels = [label[image["id"]] for image in content["images"]]
            paths = [os.path.join(folder, image["file_name"]) for image in content["images"]]
        elif name == "miniimagenet":
            with open(path, encoding="utf-8", newline="") as text:
                rows = [(row["filename"], row["label"]) for row in csv.DictReader(text)]
            classes = sorted({label for _, label in rows})
            labels = [classes.index(label) for _, label in rows]
            paths = [os.path.join(folder, "images", image) for image, _ in rows]
        else:
            from torchvision import datasets  # here: it is slow to import
            above = os.path.dirname(folder)
            if name == "pets":
                read = datasets.OxfordIIITPet(above, "trainval" if split == "train" else "test")
                paths, labels, classes = read._images, read._labels, read.classes
            elif name == "flowers":
                parts = [datasets.Flowers102(above, s)
                         for s in (["train", "val"] if split == "train" else ["test"])]
                paths = sum((part._image_files for part in parts), [])
                labels = sum((part._labels for part in parts), [])
                classes = datasets.Flowers102.classes
            else:
                read = datasets.StanfordCars(above, split)
                paths, labels = zip(*read._samples)
                classes = read.classes
        labels = torch.tensor([int(label) for label in labels])
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels {labels.min()} to {labels.max()}, {len(classes)} classes")
        return list(classes), labels, None, [str(path) for path in paths]
    except Exception as error:              # damaged lists raise nearly anything
        what = f"{type(error).__name__}: {error}".split(". ")[0]     # without 'use download=True'
        raise ValueError(f"{path} or a file beside it is not as {name} has it ({what}): expected "
                         f"{LAYOUT[name][0]}") from None


def read_image(path):
    """-> RGB, whatever is in the file (grey, CMYK, palette); EXIF orientation is left alone.
    ValueError for 16-bit and float images."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":              # Pillow would cut them off at 255
            raise ValueError(f"more than 8 bits a colour (mode {image.mode}): convert it")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def read_pixels(path):
    """-> (H, W, 3) uint8, those of read_image, and its errors. JPEG is decoded by torchvision where
    it still can (from 0.29 on it says that it will not for ever): the same pixels, one copy less,
    a loader a quarter to a third faster (10 crops, one)."""
    try:
        from torchvision.io import decode_jpeg, read_file  # here: they are slow to import
        x = decode_jpeg(read_file(path))
        if len(x) == 3:                                    # grey and CMYK are Pillow's
            return x.permute(1, 2, 0)
    except Exception:                                      # no JPEG, or damaged: Pillow says how
        pass
    return torch.from_numpy(np.array(read_image(path)))


def resize(x, size, kernel):
    """(H, W, 3) uint8 -> (3, size, size): torch's antialiased kernel is Pillow's to one level of
    256, in a third of the time; Lanczos only Pillow has."""
    if kernel == "lanczos":
        image = Image.fromarray(x.numpy()).resize((size, size), Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    x = x.permute(2, 0, 1)[None]                         # still (H, W, 3) in memory: the fast path
    return F.interpolate(x, (size, size), mode=kernel, antialias=True)[0]


# --------------------------------------------------------------------------------------------------
# The loader


@dataclass
class Batch:
    views: list                             # V x (B, 3, S, S) float32, normalised, on the device
    index: torch.Tensor                     # (B,) int64, numbers of the images in the set
    label: torch.Tensor | None              # (B,) int64
    epoch: int
    step: int                               # of the run, from 0

    def split(self, n):
        """n equal parts, for gradient accumulation."""
        labels = self.label.chunk(n) if self.label is not None else [None] * n
        for i, (index, label) in enumerate(zip(self.index.chunk(n), labels)):
            yield Batch([v.chunk(n)[i] for v in self.views], index, label, self.epoch, self.step)


class Loader:
    """Batches of views without end. (seed, step) decides everything in them.

    batch_size is global: each of `world` processes gets an equal share, in the order of the ranks.
    What is left of an epoch and fills no batch is dropped. A file that cannot be read is named once
    on stderr, the next image of the set takes its place, and `skipped` counts it. ValueError: a
    batch size that cannot be; more than half of a batch unreadable.
    """

    def __init__(self, images, views, batch_size, seed=0, device="cpu", workers=2, rank=0, world=1):
        if not 0 < batch_size <= len(images):
            raise ValueError(f"Batch size {batch_size} does not go with the {len(images)} images "
                             f"of {images.name} ({images.split}): choose 1 to {len(images)}")
        if batch_size % world:
            raise ValueError(f"The global batch size {batch_size} is not divisible by the {world} "
                             f"processes: try {batch_size // world * world or world}")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.device, self.workers = torch.device(device), workers
        self.rank, self.world = rank, world
        self.views = [view for view in views for _ in range(view.copies)]
        self.streams = [v if view.like is None else view.like for v, view in enumerate(self.views)]
        self.scale = torch.tensor([view.scale for view in self.views])           # (V, 2)
        self.ratio = torch.tensor([view.ratio for view in self.views])
        self.order = None, None                                                  # epoch, numbers
        self.skipped, self.named = 0, set()

    def __len__(self):
        """Steps in an epoch."""
        return len(self.images) // self.batch_size

    def locate(self, step):
        """Step of the run -> epoch, (B,) image numbers of this process."""
        epoch, place = divmod(step, len(self))
        if self.order[0] != epoch:
            generator = rng.generator(self.seed, "order", epoch)
            self.order = epoch, torch.randperm(len(self.images), generator=generator)
        share = self.batch_size // self.world
        begin = place * self.batch_size + self.rank * share
        return epoch, self.order[1][begin:begin + share]

    def box_numbers(self, index, epoch):
        """(B,) image numbers -> (B, V, 22) for crop_boxes."""
        return torch.stack([rng.uniform(index, 22, self.seed, epoch, stream, "box")
                            for stream in self.streams], 1)

    def batches(self, start=0):
        """Batch after Batch from any step of the run; nothing of what lies before is computed."""
        if self.images.paths is None:
            height, width = self.images.pixels.shape[2:]
            for step in itertools.count(start):
                epoch, index = self.locate(step)
                u = self.box_numbers(index, epoch)
                boxes = crop_boxes(u, height, width, self.scale, self.ratio)     # (B, V, 4)
                yield self.finish(step, index, boxes.to(self.device, non_blocking=True).unbind(1))
        results = in_workers(self.cut, range(start, sys.maxsize), self.workers, self.device)
        for step, (index, crops, bad) in enumerate(results, start):
            self.skipped += len(bad)
            for number in sorted(bad.keys() - self.named):
                self.named.add(number)
                print(f"skipped {self.images.paths[number]}: {bad[number]}", file=sys.stderr)
            if crops is None:
                raise ValueError(f"More than half of a batch of {self.images.name} cannot be read, "
                                 f"{self.images.paths[min(bad)]} for one: are these images?")
            yield self.finish(step, index, crops)

    def cut(self, step):
        """In a worker: step -> image numbers, V x (B, 3, S, S) uint8 crops, {unreadable: why}."""
        epoch, index = self.locate(step)
        u, index, bad = self.box_numbers(index, epoch), index.clone(), {}
        crops = [torch.empty(len(index), 3, v.size, v.size, dtype=torch.uint8) for v in self.views]
        for rows in torch.arange(len(index)).split(8):     # their boxes in one go, for speed
            images = []
            for row in rows.tolist():
                number, image = int(index[row]), None
                while image is None:
                    try:
                        image = read_pixels(self.images.paths[number])
                    except Exception as error:             # a damaged file raises nearly anything
                        bad[number] = str(error)
                        if 2 * len(bad) > max(2, len(index)):
                            return index, None, bad
                        number = (number + 1) % len(self.images)
                index[row] = number
                images.append(image)                                             # (H, W, 3)
            sides = torch.tensor([image.shape[:2] for image in images])[:, :, None, None]
            boxes = crop_boxes(u[rows], *sides.unbind(1), self.scale, self.ratio).tolist()
            for row, image, of_views in zip(rows, images, boxes):
                for view, out, (top, left, height, width) in zip(self.views, crops, of_views):
                    piece = image[top:top + height, left:left + width]
                    out[row] = resize(piece, view.size, view.interpolation)
        return index, crops, bad

    def finish(self, step, index, cuts):
        """Image numbers and, of each view, boxes (resident pixels) or uint8 crops -> Batch."""
        epoch, number = step // len(self), index.to(self.device, non_blocking=True)
        # On a CPU a few images at a time stay in its cache from the first operation to the last.
        group = 16 if self.device.type == "cpu" else len(index)
        views = []
        for view, stream, cut in zip(self.views, self.streams, cuts):
            dice = throw_dice(view, index, self.seed, epoch, stream)
            out = torch.empty(len(index), 3, view.size, view.size, device=self.device)
            for begin in range(0, len(index), group):
                rows = slice(begin, begin + group)
                part = {what: of_image[rows] for what, of_image in dice.items()}
                if self.images.paths is None:
                    x = self.images.pixels.index_select(0, number[rows])   # [...] is 20 x slower
                    flip = part["flip"].to(self.device, non_blocking=True)
                    out[rows] = crop(x, cut[rows], view.size, view.interpolation, flip)
                else:
                    x = cut[rows].to(self.device, non_blocking=True)       # bytes: fast to mirror
                    apply(lambda x, _: x.flip(3), x, part["flip"], part["flip"])
                    out[rows].copy_(x).mul_(1 / 255)
                colour(out[rows], part)
            views.append(out)
        labels = self.images.labels
        label = None if labels is None else labels[index].to(self.device, non_blocking=True)
        return Batch(views, number, label, epoch, step)


def in_workers(function, items, count, device):
    """function(item) for item after item, computed ahead in `count` processes (0: in this one)."""
    return DataLoader(items, batch_size=None, collate_fn=function, num_workers=count,
                      worker_init_fn=start_worker, pin_memory=device.type == "cuda",
                      generator=torch.Generator())         # or it moves the global one


def start_worker(_):
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)              # the main process decides when to stop


@atexit.register
def end_workers():
    """They ignore the SIGTERM by which Python would end them, and it would wait for ever."""
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    if daemons:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # or the DataLoader reports their end
    for child in daemons:                                  # what else a caller started is his
        child.kill()


# --------------------------------------------------------------------------------------------------
# Every image once, as tests see it


def batches(images, size, batch_size=256, device="cpu", resize=None, mean=MEAN, std=STD, workers=2,
            interpolation="bicubic", rank=0, world=1):
    """Iterator of ((B, 3, size, size) normalised, (B,) image numbers), in order, on the device.

    Files: short side to `resize` (default 256/224 size), centre crop. Resident sets: whole image at
    `size`, or resized to `resize` if that is given, centre crop. ValueError names an unreadable
    file: to leave it out would move the rows against the labels. rank, world: only every world-th
    batch, from the rank-th on; files of the others are not opened.
    """
    device, files = torch.device(device), images.paths is not None
    resize = resize or (size * 256 // 224 if files else size)
    if resize < size:
        raise ValueError(f"resize {resize} is smaller than the centre crop {size}: give {size} up")
    numbers = torch.arange(len(images)).split(batch_size)[rank::world]
    read = partial(read_centres, images.paths, size, resize, interpolation)
    for index, x in zip(numbers, in_workers(read, numbers, workers, device) if files else numbers):
        if isinstance(x, str):
            raise ValueError(f"Cannot read {x}. Delete or replace the file")
        if files:
            x = x.to(device, non_blocking=True).permute(0, 3, 1, 2)
            x = x.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
        else:
            x = images.pixels[index[0]:index[-1] + 1].to(device)
            if x.shape[2:] != (resize, resize):
                whole = torch.tensor([[0, 0, *x.shape[2:]]], device=device)
                x = crop(x, whole, resize, interpolation)
            else:
                x = x.float().mul_(1 / 255)
            edge = round((resize - size) / 2)
            x = x[:, :, edge:edge + size, edge:edge + size].contiguous()
        yield normalize(x, mean, std), index.to(device, non_blocking=True)


def read_centres(paths, size, resize, interpolation, index):
    """In a worker: (B,) image numbers -> (B, size, size, 3) uint8, or which file is bad and why."""
    out = torch.empty(len(index), size, size, 3, dtype=torch.uint8)
    for row, number in enumerate(index.tolist()):
        try:
            image = read_image(paths[number])
        except Exception as error:
            return f"{paths[number]}: {error}"
        short = min(image.size)
        width, height = (resize * side // short for side in image.size)
        image = image.resize((width, height), Resampling[interpolation.upper()])
        left, top = round((width - size) / 2), round((height - size) / 2)
        out[row] = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))
    return out
