"""Image data sets on disk: find the files, read the labels, decode the images.

    images = load_images("cifar10", root="/data", split="train")      # or toy, imagenet, coco, ...
    images = load_images("/data/my_photos")                           # or any folder of images
    images.pixels, images.paths, images.labels, images.classes        # see `Images`
    read_pixels(images.paths[17])[0]                                  # (height, width, 3) uint8

    small sets (toy, CIFAR, STL-10)   -> pixels: one uint8 tensor, all of it on the device
    all others (folders of files)     -> paths: decoded when needed, by the workers of data.py

Data sets are read in their official layout (LAYOUT). Nothing is downloaded; if a data set is
missing, the error shows the layout and where to get it. probes/annotations.py reads data sets that
have more than one class per image, such as boxes or masks.
"""
import codecs
import contextlib
import csv
import difflib
import functools
import importlib.util
import io
import itertools
import json
import math
import mmap
import os
import pickle
import re
import sys
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling
from torch.utils.data import DataLoader

from lib import distributed, progress, rng, toy, tree

# --------------------------------------------------------------------------------------------------
# The known data sets

LAYOUT = {                                  # files expected under the root, and where to get them
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
    "cub": ("CUB_200_2011/{images/<class>/*.jpg, images.txt, image_class_labels.txt, classes.txt, "
            "train_test_split.txt}",
            "'CUB-200-2011' from vision.caltech.edu/datasets/cub_200_2011"),
    "cars": ("stanford_cars/{cars_train/*.jpg, cars_test/*.jpg, cars_test_annos_withlabels.mat, "
             "devkit/{cars_meta, cars_train_annos}.mat}",
             "a mirror of 'Stanford Cars' (its first host is gone)"),
    "inat18": ("inat18/{train2018.json, val2018.json, train_val2018/<group>/<number>/*.jpg}",
               "'iNaturalist 2018' from github.com/visipedia/inat_comp"),
    "miniimagenet": ("miniimagenet/{images/*.jpg, train.csv, val.csv, test.csv}",
                     "a copy of 'miniImageNet' with the lists of Ravi and Larochelle"),
}
LISTS = {      # sets with official lists of images: folders, list of train, list of test
    "pets": (("oxford-iiit-pet", "pets/oxford-iiit-pet"),
             "annotations/trainval.txt", "annotations/test.txt"),
    "flowers": (("flowers-102", "flowers/flowers-102"), "setid.mat", "setid.mat"),
    "cub": (("CUB_200_2011", "cub/CUB_200_2011", ""), "images.txt", "images.txt"),
    "cars": (("stanford_cars", "cars/stanford_cars"),
             "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
    "inat18": (("inat18", "inat2018", ""), "train2018.json", "val2018.json"),
    "miniimagenet": (("miniimagenet", "mini-imagenet", ""), "train.csv", "test.csv"),
}
NAMES = ("toy", "toy-scenes", "synthetic", *LAYOUT)

# The usual ImageNet-100, of Contrastive Multiview Coding (Tian et al., 2020). There are others.
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
SUBSETS = {"imagenet100": IMAGENET100,         # imagenet10: SelfPatch, supplement, table 5
           "imagenet10": ["n02056570", "n02085936", "n02128757", "n02690373", "n02692877",
                          "n03095699", "n04254680", "n04285008", "n04467665", "n07747607"]}

# --------------------------------------------------------------------------------------------------
# Loading a data set


class UnreadableImage(ValueError):
    """An image file that cannot be left out, or most files of a pass, cannot be read."""


@dataclass
class Images:
    """A split of a data set, with either pixels (small sets, on the device) or paths (files)."""
    name: str
    split: str
    classes: list | None = None             # names, in the order of the labels
    labels: torch.Tensor | None = None      # (n,) int64, on the CPU
    pixels: torch.Tensor | None = None      # (n, 3, height, width) uint8
    paths: list | None = None
    notes: list = field(default_factory=list)            # what was found and what is passed over

    def __len__(self):
        return len(self.paths if self.pixels is None else self.pixels)

    def select(self, rows, split):
        """The images with indices rows (m,), as a split of that name. Only for sets with paths."""
        return replace(self, split=split, paths=[self.paths[i] for i in rows.tolist()],
                       labels=None if self.labels is None else self.labels[rows],
                       notes=list(self.notes))


def load_images(name, root=None, split="train", size=64, limit=None, device="cpu", hold_out=False):
    """Images of a data set by its name, or of any folder of images by its path.

    root: folder that contains the official layout (default: $DATA_ROOT, else "datasets").
    split: train or test (val is the same), for stl10 also unlabeled. A folder without folders for
    both gives all its images for each. miniimagenet has three splits of different classes: train
    (64), val (16) and test (20).
    size: side of toy and synthetic images, in pixels.
    limit: number of images. Of a small set the first ones are taken; of files, which are sorted by
    class, evenly spaced ones; toy generates any number.
    hold_out: for kNN and probes. Images without a label are left out if others have one; in a
    folder without train/ and val/, every fifth image is test, the others are train.
    Raises FileNotFoundError, which shows the expected layout, and ValueError for an unknown name or
    split and for damaged labels.
    """
    root = root_of(root)
    splits = ["train", "test", *{"stl10": ["unlabeled"], "miniimagenet": ["val"]}.get(name, [])]
    split = "test" if split == "val" and split not in splits else split
    if split not in splits:
        raise ValueError(f"No split {split!r} of {name}: choose {' or '.join(splits)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give at least 1, or leave it out for all images")
    if name in ("toy", "toy-scenes"):
        drawn = draw_toy(name, split, size, limit or toy.NUM_IMAGES[split])
        images = Images(name, split, list(toy.CLASSES), *drawn)
    elif name == "synthetic":               # noise, to measure training without reading images
        noise = torch.randint(256, (limit or 2048, 3, size, size), dtype=torch.uint8,
                              generator=rng.generator("synthetic", split))
        images = Images(name, split, pixels=noise)
    else:
        with progress.activity(f"reading {name}, {split}", distributed.rank() == 0):
            images = read_split(name, root, split)
    if images.paths is not None:
        if hold_out and images.labels is not None:
            images = images.select((images.labels >= 0).nonzero()[:, 0], images.split)
        if hold_out and images.split == "all" and len(images) > 1:
            is_test = torch.arange(len(images)) % 5 == 0
            images = images.select((is_test == (split == "test")).nonzero()[:, 0], split)
            tests = int(is_test.sum())
            images.notes.append(
                f"{name}: no folders for both train and val, so every fifth image is a test image: "
                f"kNN and probes learn from {len(is_test) - tests:,} and are tested on {tests:,}; "
                f"pretraining, which uses no labels, uses all. If images are frames of videos or "
                f"bursts, make folders train and val")
        if limit and limit < len(images):
            images = images.select(torch.arange(limit) * len(images) // limit, images.split)
        return images
    images.pixels = images.pixels[:limit].to(device)
    images.labels = None if images.labels is None else images.labels[:limit]
    return images


def draw_toy(name, split, size, n):
    """The first n images of toy or toy-scenes -> labels (n,), pixels (n, 3, size, size).

    With several threads, many images are drawn in processes instead, each of one thread: a drawing
    is thousands of small operations, after each of which the threads would wait for each other."""
    shared = mmap.mmap(-1, n * 3 * size * size)          # not in /dev/shm, which is small in Docker
    pixels = torch.from_numpy(np.frombuffer(shared, np.uint8)).view(n, 3, size, size)

    def draw(index):
        drawn = toy.draw(index, split, size, scenes=name == "toy-scenes")
        pixels[index[0]:index[-1] + 1] = drawn["image"]
        return drawn["label"].tolist()

    processes = min(torch.get_num_threads(), n // 500)   # fewer images: starting takes longer
    if processes == 1 or sys.platform != "linux":
        processes = 0                                    # in this one
    parts = DataLoader(torch.arange(n).split(256), batch_size=None, collate_fn=draw,
                       num_workers=processes, worker_init_fn=distributed.start_worker,
                       multiprocessing_context=distributed.worker_context(processes),
                       generator=torch.Generator())      # else it uses the global one
    labels = []
    with progress.bar(desc=f"drawing {name}, {split}", total=n, unit="images",
                      shown=distributed.rank() == 0) as bar:
        for part in parts:
            labels += part
            bar.update(len(part))
    return torch.tensor(labels), pixels


def root_of(given):
    """The folder that contains the data sets: as given, else $DATA_ROOT, else "datasets"."""
    return given or os.environ.get("DATA_ROOT", "datasets")


def find(name, root, *places, layouts=LAYOUT):
    """The first of the places under root that exists. FileNotFoundError if none does."""
    for place in places:
        if os.path.exists(path := os.path.normpath(os.path.join(root, place))):
            return path
    raise missing_error(name, root, layouts, places)


def missing_error(name, root, layouts=LAYOUT, places=()):
    """places: where a part of the data set was looked for. If other parts are there, the message
    names the missing one."""
    layout, source = layouts[name]
    parts = [place for place in map(os.path.normpath, places) if os.sep in place
             and os.path.isdir(os.path.join(root, place.split(os.sep)[0]))]
    missing = f"{parts[0]} (a part of {name})" if parts else name
    return FileNotFoundError(
        f"No {missing} under {root}: expected {layout}. Get {source}, unpack it, and give the "
        "folder that contains it with --data-root (or in $DATA_ROOT); nothing is downloaded")


# --------------------------------------------------------------------------------------------------
# Readers of the layouts


def read_split(name, root, split):
    """A split of a data set on disk, by its name or its path -> Images."""
    if name in ("cifar10", "cifar100"):
        return Images(name, split, *read_cifar(name, root, split))
    if name == "stl10":
        return Images(name, split, *read_stl10(root, split))
    if name in LISTS:
        return Images(name, split, *read_list(name, root, split))
    return load_tree(name, root, split)


def load_tree(name, root, split):
    """ImageNet, COCO or a path -> Images with paths, whose split is "all" for a folder of images
    without folders for both splits. See lib/tree.py for the rules."""
    subset = SUBSETS.get(name)
    folder = find_official_folder(name, root, split) if name in LAYOUT else find_folder(name)
    paths, passed = list_images(folder, subset)
    passed_over = tree.describe_passed(passed)
    if not paths:
        hint = ("For another choice of classes give the folder by its path" if subset else
                f"Expected {LAYOUT[name][0]}" if name in LAYOUT else
                "Unpack archives, convert other formats; labels are not needed")
        raise FileNotFoundError(
            f"No images under {folder}: looked for {' '.join(sorted(tree.readable_suffixes()))} in "
            f"it and its subfolders{'; passed over: ' * bool(passed_over)}{passed_over}. {hint}")
    relative = [path[len(folder):].lstrip(os.sep) for path in paths]
    if name in LAYOUT:
        members = [(path, *tree.folders_of(path)[:1]) for path in relative]
        splits, notes = tree.label_splits({split: members})
        notes.insert(0, f"{len(paths):,} images in {folder}"
                        f"{tree.describe_classes(splits) * (not subset)}")
    else:
        images, label_maps = tree.pair_label_maps(relative)
        used, pairs = relative, images.keys() & label_maps.keys()
        if pairs:
            used = [path for path in relative if not tree.find_key(path)[1]]
        splits, notes = tree.find_splits(used)
        if pairs:
            notes.append(f"passed over: {len(relative) - len(used):,} label maps, which the probes "
                         "of segmentation read")
    split = split if split in splits else "all"
    found = splits[split]
    if subset:
        found.labels = [subset.index(path.split(os.sep)[0]) for path in found.paths]
        found.classes, folders = list(subset), len(set(found.labels))
        if folders < len(subset):
            notes.append(f"only {folders} of the {len(subset)} classes are in {folder}; for "
                         f"another choice of classes give the folder by its path")
    if name == "imagenet" and not found.classes:
        raise missing_error(name, folder)                  # the official val archive is flat
    if passed_over:
        notes.append(f"passed over: {passed_over}")
    return Images(name, split, found.classes, found.labels and torch.tensor(found.labels),
                  paths=[os.path.join(folder, path) for path in found.paths],
                  notes=[f"{name}: {note}" for note in notes])


listed = None            # {(folder, only): what tree.list_images returns} inside of `list_once`


@contextlib.contextmanager
def list_once():
    """Inside, each folder is listed once: a million files take minutes on some disks."""
    global listed
    listed = {}
    try:
        yield
    finally:
        listed = None


def list_images(folder, only):
    key = folder, only and tuple(only)
    if listed is None:
        return tree.list_images(folder, only)
    if key not in listed:
        listed[key] = tree.list_images(folder, only)
    return listed[key]


def find_official_folder(name, root, split):
    """The folder of a split of ImageNet or COCO."""
    folder = {"train": "train", "test": "val"}[split] + ("2017" if name == "coco" else "")
    places = (["coco", "", "coco/images", "images"] if name == "coco" else
              ["imagenet", "", "imagenet1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"])
    places = [name] * (name in SUBSETS) + places
    return find(name, root, *(os.path.join(place, folder) for place in places))


def find_folder(name):
    """The folder of images of that path."""
    if os.path.isdir(name):
        if not os.access(name, os.R_OK | os.X_OK):
            raise PermissionError(f"cannot open the folder {name} (permission denied): change its "
                                  f"permissions")
        return name
    if os.path.exists(name):
        raise ValueError(f"{name} is a file: give the folder that contains the images, and unpack "
                         f"archives first")
    if os.sep in name or name.startswith("."):
        raise FileNotFoundError(f"No folder {os.path.abspath(name)}: give the path of a folder of "
                                f"images, or one of {', '.join(NAMES)}")
    close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"No data set, and no folder in {os.getcwd()}, has the name {name!r}{hint} "
                     f"Give one of {', '.join(NAMES)}, or the path of a folder of images")


class ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and numbers and nothing else. A pickle file can call any function by
    name, so all other functions are refused."""
    allowed = {"ndarray": np.ndarray, "dtype": np.dtype, "encode": codecs.encode, "bytes": bytes,
               "scalar": np.float64(0).__reduce__()[0],
               "_reconstruct": np.zeros(1).__reduce__()[0],
               "_frombuffer": np.zeros(1).__reduce_ex__(5)[0]}

    def find_class(self, module, name):
        modules = "numpy", "_codecs", "builtins", "__builtin__"
        if module.split(".")[0] not in modules or name not in self.allowed:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which is refused")
        return self.allowed[name]           # versions of numpy have it in different modules


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
            with open(path, "rb") as f:     # latin1: for arrays pickled by Python 2
                content = ArraysOnly(io.BytesIO(f.read()), encoding="latin1").load()
            return {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        except Exception as error:          # a damaged pickle can raise any exception
            raise ValueError(f"{path} is not a CIFAR file: {error}") from None

    try:
        parts, names = [read(file) for file in files], read(meta)[f"{key}_names"]
        pixels = torch.from_numpy(np.concatenate([part["data"] for part in parts]))
        labels = torch.tensor(list(itertools.chain(*(part[f"{key}s"] for part in parts))))
        classes = [c.decode() if isinstance(c, bytes) else c for c in names]
        check_labels(labels, len(pixels), len(classes))
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels of {pixels.dtype}")
        return classes, labels, pixels.view(-1, 3, 32, 32)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} under {root} does not have the format of {name}: "
                         f"{error}") from None


def read_stl10(root, split):
    """-> classes, labels, pixels (n, 3, 96, 96). The files store each image column by column."""
    path = find("stl10", root, f"stl10_binary/{split}_X.bin", f"stl10/stl10_binary/{split}_X.bin")
    pixels, labels, image_size = np.fromfile(path, np.uint8), None, 3 * 96 * 96
    if split != "unlabeled":
        labels, classes = (find("stl10", root, f"stl10_binary/{file}", f"stl10/stl10_binary/{file}")
                           for file in (f"{split}_y.bin", "class_names.txt"))
        labels = np.fromfile(labels, np.uint8).astype(np.int64) - 1
        with open(classes) as file:
            classes = file.read().split()
    if (len(pixels) % image_size
            or labels is not None and len(pixels) != image_size * len(labels)):
        raise ValueError(f"{path} is truncated, or does not match its labels: download it again")
    if labels is not None and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"the labels of {path} are not those of {len(classes)} classes: download "
                         f"it again")
    pixels = torch.from_numpy(pixels.reshape(-1, 3, 96, 96)).mT.contiguous()
    return (None, None, pixels) if labels is None else (classes, torch.from_numpy(labels), pixels)


def read_list(name, root, split):
    """-> classes, labels, None, paths of a data set in LISTS.

    Flowers-102: train is its train and val, 2,040 images, as is usual for transfer (our choice: the
    papers do not specify it). iNaturalist 2018: test is its val, because the labels of its test are
    not public.
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
            paths, labels, classes = read_inaturalist(path, folder)
        elif name == "miniimagenet":
            paths, labels, classes = read_miniimagenet(path, folder)
        elif name == "cub":
            paths, labels, classes = read_cub(folder, split)
        else:
            paths, labels, classes = read_with_torchvision(name, os.path.dirname(folder), split)
        labels = torch.tensor([int(label) for label in labels])
        check_labels(labels, len(paths), len(classes))
        return list(classes), labels, None, [str(path) for path in paths]
    except Exception as error:              # damaged lists can raise any exception
        what = f"{type(error).__name__}: {error}".split(". ")[0]     # without 'use download=True'
        raise ValueError(f"{path} or a file next to it does not have the format of {name} "
                         f"({what}): expected {LAYOUT[name][0]}") from None


def check_labels(labels, n, classes):
    """ValueError unless there are n labels from 0 to classes - 1."""
    if len(labels) != n or not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{len(labels):,} labels from {labels.min()} to {labels.max()} for {n:,} "
                         f"images of {classes} classes")


def read_inaturalist(path, folder):
    """-> paths, labels, classes."""
    with open(path, encoding="utf-8") as text:
        content = json.load(text)
    categories = sorted(content["categories"], key=lambda c: c["id"])            # 0 ... 8141
    label_of = {category["id"]: i for i, category in enumerate(categories)}
    label = {a["image_id"]: label_of[a["category_id"]] for a in content["annotations"]}
    return ([os.path.join(folder, image["file_name"]) for image in content["images"]],
            [label[image["id"]] for image in content["images"]],
            [category["name"] for category in categories])


def read_miniimagenet(path, folder):
    """-> paths, labels, classes."""
    with open(path, encoding="utf-8", newline="") as text:
        rows = [(row["filename"], row["label"]) for row in csv.DictReader(text)]
    classes = sorted({label for _, label in rows})
    return ([os.path.join(folder, "images", image) for image, _ in rows],
            [classes.index(label) for _, label in rows], classes)


def read_cub(folder, split):
    """-> paths, labels, classes: all 200, also if only some of them have images."""
    def read_rows(file):                    # lines of `number word`, numbers from 1
        with open(os.path.join(folder, file), encoding="utf-8") as lines:
            return dict(line.split() for line in lines)

    files, classes, class_of, is_train = map(read_rows, (
        "images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt"))
    chosen = [i for i in files if is_train[i] == str(int(split == "train"))]
    return ([os.path.join(folder, "images", files[i]) for i in chosen],
            [int(class_of[i]) - 1 for i in chosen], list(classes.values()))


def read_with_torchvision(name, root, split):
    """-> paths, labels, classes of pets, flowers or cars."""
    from torchvision import datasets  # here: it is slow to import
    if name == "pets":
        pets = datasets.OxfordIIITPet(root, "trainval" if split == "train" else "test")
        return pets._images, pets._labels, pets.classes
    if name == "flowers":
        parts = [datasets.Flowers102(root, part)
                 for part in (["train", "val"] if split == "train" else ["test"])]
        return (sum((part._image_files for part in parts), []),
                sum((part._labels for part in parts), []), datasets.Flowers102.classes)
    cars = datasets.StanfordCars(root, split)
    return *zip(*cars._samples), cars.classes


# --------------------------------------------------------------------------------------------------
# Messages


@functools.cache
def print_once(line, file=None):
    """Prints a line to the file, by default stderr, unless it was printed there before."""
    progress.write(line, file)


def report_unreadable(name, bad, total, what="images"):
    """After a pass over `total` images: lists those that were left out because they cannot be read,
    bad {path: error}; of many the first hundred."""
    if bad:
        files = tree.list_names([f"{path} ({error})" for path, error in bad.items()], 100)
        print_once(f"left out {len(bad)} of {total} {what} of {name} that cannot be read: {files}")


def check_count(name, count, total):
    """As check_readable, in a pass that several processes shared, of which each listed its own:
    `count` of `total` images could be read."""
    if 2 * count < total:
        raise UnreadableImage(f"{total - count} of {total} images of {name} cannot be read, see "
                              f"the lists above: are these images?")


def check_readable(name, bad, total):
    """Raises UnreadableImage if more than half of the image files of a pass cannot be read."""
    if 2 * len(bad) > total:
        path, error = next(iter(bad.items()))
        raise UnreadableImage(f"{len(bad)} of {total} images of {name} cannot be read, for example "
                              f"{path} ({error}): are these images?")


# --------------------------------------------------------------------------------------------------
# Decoding and resizing one image


def read_image(file, upright=True, scale=1):
    """Path or open file -> Pillow image in RGB, also for gray, CMYK and palette files; the first of
    several frames.

    Transparent pixels are blended with white: the color that a file has under full transparency is
    arbitrary. upright: turned as its EXIF orientation states (photos of phones); not for images
    with annotations, whose coordinates are those of the stored pixels. scale: 4 or 8 decodes a
    JPEG file with so much fewer pixels on each side, each the mean of about a square of pixels.
    ValueError for 16-bit and float images and for more pixels than Pillow allows.
    """
    with open_image(file) as image:
        # Stored as "RGB;16B", of which Pillow keeps 8 bits. "BGR;16" has 16 bits for all colors.
        deep = any(re.search("(?<!BGR);16", str(tile.args)) for tile in image.tile)
        if image.mode[0] in "IF" or deep:
            raise ValueError(f"more than 8 bits per color (mode {image.mode}): convert it")
        if scale > 1:
            image.draft(None, [side // scale for side in image.size])
        image.load()
        if upright and orientation_of(image) > 1:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def open_image(file):
    """The Pillow image of a path or open file, of which only the header is read yet."""
    with warnings.catch_warnings():            # about damaged EXIF data and about large images
        warnings.simplefilter("ignore")
        try:
            with Image.open(file) as image:
                yield image
        except UnidentifiedImageError:         # its message repeats the path
            raise UnidentifiedImageError("cannot identify the image format") from None
        except Image.DecompressionBombError:
            raise ValueError(f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: cut it into "
                             f"parts") from None


def orientation_of(image):
    """EXIF orientation, 1 (upright) to 8; 1 if there is none or it is damaged."""
    try:
        number = image.getexif().get(ExifTags.Base.Orientation, 1)
        return number if number in range(1, 9) else 1
    except Exception:                          # damaged EXIF data can raise any exception
        return 1


def read_pixels(path, choose_scale=lambda height, width: 1):
    """-> (height, width, 3) uint8, with the pixels and the errors of `read_image`; height and width
    of the file, upright; the scale at which it was decoded. choose_scale: for JPEG files, from
    height and width to 1, 4 or 8.

    JPEG is decoded by torchvision where it still can (since 0.29 it warns that this will be
    removed): the pixels are the same, there is one copy less, and the loader is a quarter (10
    crops) to a third (1 crop) faster. Only Pillow can decode at a smaller scale.
    """
    with open(path, "rb") as file:
        content = bytearray(file.read())
    scale, plain = 1, False
    with open_image(io.BytesIO(content)) as image:     # the header, and the limit of its size
        if image.format in ("JPEG", "MPO"):            # MPO: of phones, JPEG with a second image
            orientation, side = orientation_of(image), image.size[::-1]
            side = side[::-1] if orientation > 4 else side
            # Of a smaller image the last row and column can stand for less than `scale` pixels;
            # turned, they would be the first.
            if orientation == 1 or all(pixels % 8 == 0 for pixels in side):
                scale = choose_scale(*side)
            plain = image.mode == "RGB" and orientation == 1 and scale == 1
    pixels = None
    if plain:
        with contextlib.suppress(Exception):           # damaged: as Pillow
            from torchvision.io import decode_jpeg  # here: it is slow to import

            pixels = decode_jpeg(torch.frombuffer(content, dtype=torch.uint8)).permute(1, 2, 0)
    if pixels is None:
        pixels = torch.from_numpy(np.array(read_image(io.BytesIO(content), scale=scale)))
    return pixels, side if scale > 1 else pixels.shape[:2], scale


def resize(x, box, size, kernel, scale=1):
    """(height, width, 3) uint8 -> (3, size, size) uint8: the crop `box` (top, left, height, width),
    antialiased. scale: x has that many times fewer pixels on each side than what box refers to.

    torch's bilinear and bicubic kernels equal Pillow's up to one of 256 levels and take a third of
    the time. Only Pillow has Lanczos, and boxes that end between two pixels.
    """
    top, left, bottom, right = (v / scale for v in (*box[:2], box[0] + box[2], box[1] + box[3]))
    y, x0 = int(top), int(left)
    x = x[y:math.ceil(bottom), x0:math.ceil(right)]
    if kernel == "lanczos" or scale > 1:
        image = Image.fromarray(x.numpy()).resize(
            (size, size), Resampling[kernel.upper()], (left - x0, top - y, right - x0, bottom - y))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    x = x.permute(2, 0, 1)[None]               # still (height, width, 3) in memory: the fast path
    return F.interpolate(x, (size, size), mode=kernel, antialias=True)[0]
