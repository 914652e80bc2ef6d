"""TODO lib/datasets"""
import codecs
import csv
import difflib
import importlib.util
import io
import itertools
import json
import os
import pickle
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling

from lib import rng, toy

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


def load_images(name, root=None, split="train", size=64, limit=None, device="cpu", apart=False):
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
                 for index in torch.arange(limit or toy.NUM_IMAGES[split]).split(256)]
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

