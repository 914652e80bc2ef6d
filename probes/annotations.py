"""Annotated pictures, as probes ask for them: key-points, boxes, masks, maps of classes, films,
landmarks, cue conflicts.

    for item in readers.keypoints("cub", root="/data", split="test"):
        item.image, item.points                      # (3, H, W) uint8, (K, P, 3) float32
    names = readers.part_names("cub")                # of the P key-points
    for item in readers.segmentation("ade20k", "/data", "test", level="object"):
        item.image, item.labels                      # (3, H, W) uint8, (H, W) uint8, 255 = ignore

A view is one function for all sets that can serve it, and gives the same shape whatever the set:
one item for each image, read when its turn comes. What is classified whole is in data.py. Sets are
read in their official layout (LAYOUT); nothing is downloaded. Coordinates are pixels of the stored
image, x to the right and y down, as the annotation has them; boxes are x0, y0, x1, y1.

FileNotFoundError shows the layout expected and where to get the set. ValueError, in one sentence: a
set or split that is not there, an annotation or image that cannot be read, a package that reads it
and is not installed (scipy: .mat files; pycocotools: COCO's masks).
"""
import functools
import glob
import importlib
import json
import math
import os
import re
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resize

from lib import datasets, toy

# K objects of an image, P key-points of an object, T frames of a film, H, W pixels

LAYOUT = {                                  # as in data.py, with the annotations
    "cub": ("CUB_200_2011/{images/<class>/*.jpg, images.txt, train_test_split.txt, "
            "bounding_boxes.txt, parts/part_locs.txt}",
            "'CUB-200-2011' from vision.caltech.edu/datasets/cub_200_2011"),
    "coco": ("coco/{train2017/*.jpg, val2017/*.jpg, annotations/{instances, person_keypoints}_"
             "{train2017, val2017}.json, stuffthingmaps/{train2017, val2017}/*.png}", "'2017 Train "
             "images', '2017 Val images' and '2017 Train/Val annotations' from cocodataset.org, "
             "and for level scene stuffthingmaps_trainval2017 from github.com/nightrome/cocostuff"),
    "ade20k": ("ADEChallengeData2016/{images, annotations}/{training, validation}/ADE_*",
               "'Scene Parsing train/val' from sceneparsing.csail.mit.edu"),
    "ade20k-full": ("ADE20K_2021_17_01/images/ADE/{training, validation}/<group>/<scene>/ADE_*"
                    "{.jpg, _seg.png, _parts_1.png, .json}",
                    "'Full Dataset' from groups.csail.mit.edu/vision/datasets/ADE20K"),
    "pascal": ("{trainval/Annotations_Part/*.mat, VOCdevkit/VOC2010/{JPEGImages/*.jpg, "
               "ImageSets/Main/{train, val}.txt}}", "'PASCAL-Part annotations' from roozbehm.info/"
               "pascal-parts and VOC2010 trainval from host.robots.ox.ac.uk/pascal/VOC"),
    "voc": ("{VOCdevkit/VOC2012/{JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/"
            "{train, val}.txt}, benchmark_RELEASE/dataset/{cls/*.mat, train.txt, val.txt}}",
            "VOC2012 trainval from host.robots.ox.ac.uk/pascal/VOC and the 'Semantic Boundaries "
            "Dataset' (benchmark.tgz) from home.bharathh.info/pubs/codes/SBD"),
    "lip": ("lip/{TrainVal_images/{train_images, val_images}/*.jpg, TrainVal_parsing_annotations/"
            "{train_segmentations, val_segmentations}/*.png, train_id.txt, val_id.txt}",
            "'Single Person' from sysu-hcp.net/lip"),
    "cityscapes": ("cityscapes/{leftImg8bit/{train, val}/<city>/*_leftImg8bit.png, gtFine/{train, "
                   "val}/<city>/*_gtFine_labelIds.png}", "leftImg8bit_trainvaltest and "
                   "gtFine_trainvaltest from cityscapes-dataset.com"),
    "davis": ("DAVIS/{JPEGImages/480p/<sequence>/*.jpg, Annotations/480p/<sequence>/*.png, "
              "ImageSets/2017/{train, val}.txt}", "'DAVIS 2017 TrainVal Images and Annotations "
              "(480p)', the semi-supervised ones, from davischallenge.org"),
    "cue-conflict": ("cue-conflict/<shape>/<shape><i>-<texture><j>.png",
                     "stimuli/style-transfer-preprocessed-512 of "
                     "github.com/rgeirhos/texture-vs-shape")} | {
    name: (f"{name}/{{jpg/*.jpg, gnd_{name}.pkl}}",
           f"the images from robots.ox.ac.uk/~vgg/data/{old} and gnd_{name}.pkl from "
           "github.com/filipradenovic/revisitop")
    for name, old in (("roxford5k", "oxbuildings"), ("rparis6k", "parisbuildings"))}

CUB_PARTS = """back beak belly breast crown forehead left_eye left_leg left_wing nape right_eye
right_leg right_wing tail throat""".split()
COCO_PARTS = """nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow
right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle
right_ankle""".split()
COCO_CLASSES = [name.replace("_", " ") for name in """person bicycle car motorcycle airplane bus
train truck boat traffic_light fire_hydrant stop_sign parking_meter bench bird cat dog horse sheep
cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard
sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass
cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake
chair couch potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone
microwave oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier
toothbrush""".split()]
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
LABELS = {number: label for label, number in enumerate(COCO_IDS)}      # 1 ... 90 -> 0 ... 79
SHAPES = """airplane bear bicycle bird boat bottle car cat chair clock dog elephant keyboard knife
oven truck""".split()

# Segmentation. The first name of objectInfo150.txt, ADE20K's 1 ... 150, with _ for spaces.
ADE = [name.replace("_", " ") for name in """wall building sky floor tree ceiling road bed
windowpane grass cabinet sidewalk person earth door table mountain plant curtain chair car water
painting sofa shelf house sea mirror rug field armchair seat fence desk rock wardrobe lamp bathtub
railing cushion base box column signboard chest_of_drawers counter sand sink skyscraper fireplace
refrigerator grandstand path stairs runway case pool_table pillow screen_door stairway river bridge
bookcase blind coffee_table toilet flower book hill bench countertop stove palm kitchen_island
computer swivel_chair boat bar arcade_machine hovel bus towel light truck tower chandelier awning
streetlight booth television airplane dirt_track apparel pole land bannister escalator ottoman
bottle buffet poster stage van ship fountain conveyer_belt canopy washer plaything swimming_pool
stool barrel basket waterfall tent bag minibike cradle oven ball food step tank trade_name microwave
pot animal bicycle lake dishwasher screen blanket sculpture hood sconce vase traffic_light tray
ashcan fan pier crt_screen plate monitor bulletin_board shower radiator glass clock flag""".split()]
# The 59 objects that have parts (the part-aware study's code): number
# in ADE:number(s) in the whole ADE20K, as convertFromADE/mapFromADE.txt has them.
ADE_OBJECTS = [[[int(i) for i in side.split(",")] for side in pair.split(":")] for pair in """2:312
3:2420 5:2855 8:165 9:3055 11:350 13:1831 15:774,783 16:2684 18:1910 20:471 21:401 24:2473 25:2329
26:1276 31:57 32:2272 33:907 34:724 36:2985,533 37:1395 38:155 43:581 45:491 48:2388 49:2423 51:2096
77:223 54:2530 57:1948 60:2531 63:239 64:212 65:571 66:2793 72:2598 75:591 76:2679 81:327 83:1451
84:2880 86:480 91:14 98:1702 99:249 103:2928 108:2989 111:2586 117:1563 119:1708 125:1551 130:747
131:2254 134:1260 135:2243 137:2836 140:894 148:1098 149:530""".split()]
VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor""".split()
PASCAL_PARTS = {line.split()[0]: line.split()[1:] for line in """
aeroplane body stern lwing rwing tail engine wheel
bicycle fwheel bwheel saddle handlebar chainwheel headlight
bird head leye reye beak torso neck lwing rwing lleg lfoot rleg rfoot tail
bottle cap body
bus frontside leftside rightside backside roofside leftmirror rightmirror fliplate bliplate door \
wheel headlight window
car frontside leftside rightside backside roofside leftmirror rightmirror fliplate bliplate door \
wheel headlight window
cat head leye reye lear rear nose torso neck lfleg lfpa rfleg rfpa lbleg lbpa rbleg rbpa tail
cow head leye reye lear rear muzzle lhorn rhorn torso neck lfuleg lflleg rfuleg rflleg lbuleg \
lblleg rbuleg rblleg tail
dog head leye reye lear rear nose torso neck lfleg lfpa rfleg rfpa lbleg lbpa rbleg rbpa tail muzzle
horse head leye reye lear rear muzzle torso neck lfuleg lflleg rfuleg rflleg lbuleg lblleg rbuleg \
rblleg tail lfho rfho lbho rbho
motorbike fwheel bwheel handlebar saddle headlight
person head leye reye lear rear lebrow rebrow nose mouth hair torso neck llarm luarm lhand rlarm \
ruarm rhand llleg luleg lfoot rlleg ruleg rfoot
pottedplant pot plant
sheep head leye reye lear rear muzzle lhorn rhorn torso neck lfuleg lflleg rfuleg rflleg lbuleg \
lblleg rbuleg rblleg tail
train head hfrontside hleftside hrightside hbackside hroofside headlight coach cfrontside \
cleftside crightside cbackside croofside
tvmonitor screen""".strip().split("\n")}
LIP = """Background Hat Hair Glove Sunglasses UpperClothes Dress Coat Socks Pants Jumpsuits Scarf
Skirt Face Left-arm Right-arm Left-leg Right-leg Left-shoe Right-shoe""".split()
CITYSCAPES = dict(zip(          # name: its number in *_labelIds.png
    ["road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
     "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
     "motorcycle", "bicycle"],
    [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]))
STUFF = """banner blanket branch bridge building-other bush cabinet cage cardboard carpet
ceiling-other ceiling-tile cloth clothes clouds counter cupboard curtain desk-stuff dirt door-stuff
fence floor-marble floor-other floor-stone floor-tile floor-wood flower fog food-other fruit
furniture-other grass gravel ground-other hill house leaves light mat metal mirror-stuff moss
mountain mud napkin net paper pavement pillow plant-other plastic platform playingfield railing
railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow solid-other stairs
stone straw structural-other table tent textile-other towel tree vegetable wall-brick wall-concrete
wall-other wall-panel wall-stone wall-tile wall-wood water-other waterdrops window-blind
window-other wood""".split()                                        # COCO's 92 ... 182

# ---- opening an annotation -----------------------------------------------------------------------


def find(name, root, *places):
    """The first of the places under root (none: $DATA_ROOT, else datasets) that exists."""
    return datasets.find(name, datasets.root_of(root), *places, layouts=LAYOUT)


@contextmanager
def reading(name, path):
    """What goes wrong inside is the fault of the annotation at `path`, and is said so."""
    try:
        yield
    except Exception as error:              # damaged annotations raise nearly anything
        raise ValueError(f"{path} is damaged or not as {name} has it ({type(error).__name__}: "
                         f"{error}): expected {LAYOUT[name][0]}") from None


def picture(path):
    """-> (3, H, W) uint8 RGB."""
    try:
        return pil_to_tensor(datasets.read_image(path))
    except Exception as error:
        raise ValueError(f"Cannot read {path}: {error}. Restore the file") from None


def extra(module, what):
    """A module that not everybody needs, imported where it is used."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise ValueError(f"{what}, which {package} reads: pip install {package}") from None


def spread(items, limit, order=None):
    """So many of a list, evenly spread as it is often sorted by class; None: all. order: a function
    of their number -> which of them to take, and in which order."""
    n = len(items)
    if limit is not None and limit < n:
        items = [items[i * n // limit] for i in range(limit)]
    return items if order is None else [items[i] for i in order(len(items))]


def corners(boxes):
    """Rows of x, y, width, height -> (K, 4) float32 x0, y0, x1, y1."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(len(boxes), 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def view(name, split, sets, what):
    """Checks the request for a view -> the reader of the set, split as train, test or None."""
    if name not in sets:
        raise ValueError(f"No {what} of {name!r} here: choose {' or '.join(sets)}")
    split = "test" if split == "val" else split
    if split not in ("train", "test") and (name, split) != ("cub", None):
        raise ValueError(f"No split {split!r} of {name}: choose train or test")
    return sets[name][0], split


# ---- the sets ------------------------------------------------------------------------------------


def drawn(scenes, root, split, limit, size, order=None):
    """toy, toy-scenes: creatures of which nothing is seen are left out."""
    numbers = spread(range(limit or toy.NUM_IMAGES[split]), None, order)
    for index in torch.tensor(numbers, dtype=torch.int64).split(64):
        out = toy.draw(index, split, size, scenes, annotate=True)
        creature = torch.arange(1, out["classes"].shape[1] + 1)[:, None, None]
        masks = out["instances"][:, None] == creature                           # (B, K, S, S)
        areas = masks.sum((2, 3)).float()
        for i, number in enumerate(index.tolist()):
            seen = out["classes"][i] >= 0
            yield SimpleNamespace(
                id=number, image=out["image"][i], points=out["keypoints"][i, seen],
                boxes=out["boxes"][i, seen], areas=areas[i, seen], labels=out["classes"][i, seen],
                masks=masks[i, seen], crowd=torch.zeros(int(seen.sum()), dtype=torch.bool))


def table(name, path):
    """A text file of `number words ...` -> {number: [words of a line, words of the next, ...]}."""
    rows = {}
    with reading(name, path), open(path, encoding="utf-8") as lines:
        for number, *words in filter(None, map(str.split, lines)):
            rows.setdefault(int(number), []).append(words)
    return rows


def cub(root, split, limit, size):
    """CUB-200-2011 (Wah et al., 2011): a bird an image. Areas are not known."""
    files = "images.txt", "train_test_split.txt", "bounding_boxes.txt", "parts/part_locs.txt"
    paths = [find("cub", root, f"CUB_200_2011/{file}", file) for file in files]
    images, trains, boxes, places = (table("cub", path) for path in paths)
    folder = os.path.dirname(paths[0])
    with reading("cub", folder):
        chosen = [number for number in images
                  if split is None or trains[number] == [["1" if split == "train" else "0"]]]
    for number in spread(chosen, limit):
        with reading("cub", folder):
            [[file]], [box] = images[number], boxes[number]
            found = {int(part): [float(x), float(y), 2 * int(visible)]
                     for part, x, y, visible in places[number]}
            item = SimpleNamespace(
                id=number, boxes=corners([[float(side) for side in box]]), areas=None,
                points=torch.tensor([[found[i + 1] for i in range(len(CUB_PARTS))]]),
                crowd=torch.zeros(1, dtype=torch.bool))
        item.image = picture(os.path.join(folder, "images", file))
        yield item


@functools.lru_cache(maxsize=2)             # hundreds of megabytes: parsed once
def coco_json(path):
    """-> [(number of the image, file name, its annotations), ...] of instances or key-points, by
    file name: as datasets.load_images has them, so that --limit takes the same images of both."""
    with reading("coco", path), open(path, encoding="utf-8") as file:
        content = json.load(file)
        rows = {image["id"]: (image["id"], image["file_name"], []) for image in content["images"]}
        for annotation in content["annotations"]:
            rows[annotation["image_id"]][2].append(annotation)
        return sorted(rows.values(), key=lambda row: row[1])


def decode(segmentation, shape):
    """Polygons, whose union is the mask, or run lengths -> (H, W) bool; pycocotools does the work.

    What that takes without complaint and misreads is refused: half a corner, runs that end early.
    """
    from pycocotools import mask
    if isinstance(segmentation, list):
        if not segmentation or any(len(line) < 6 or len(line) % 2 for line in segmentation):
            raise ValueError("a polygon that has no three corners of x and y")
        segmentation = mask.merge(mask.frPyObjects(segmentation, *shape))
    elif list(segmentation["size"]) != list(shape):
        raise ValueError(f"a mask of {segmentation['size']} on an image of {list(shape)}")
    elif isinstance(segmentation["counts"], list):
        if min(segmentation["counts"]) < 0 or sum(segmentation["counts"]) != math.prod(shape):
            raise ValueError("run lengths that do not add up to the image")
        segmentation = mask.frPyObjects(segmentation, *shape)
    return torch.from_numpy(mask.decode(segmentation)).bool()


def coco(kind, root, split, limit, size, order=None, masks=False):
    """COCO 2017 (Lin et al., 2014); kind: instances or person_keypoints. Crowds are among them."""
    if masks:
        extra("pycocotools.mask", "The masks of coco are polygons and run lengths")
    year = {"train": "train2017", "test": "val2017"}[split]
    path = find("coco", root, *(f"{at}annotations/{kind}_{year}.json" for at in ("coco/", "")))
    folder = find("coco", root, *(at + year for at in ("coco/", "", "coco/images/", "images/")))
    rows, people = coco_json(path), kind == "person_keypoints"
    with reading("coco", path):             # half of the images show nobody: not read in vain
        rows = [row for row in rows if not people or any(a["num_keypoints"] for a in row[2])]
    for number, file, annotations in spread(rows, limit, order):
        with reading("coco", path):
            item = SimpleNamespace(
                id=number, boxes=corners([a["bbox"] for a in annotations]),
                areas=torch.tensor([a["area"] for a in annotations], dtype=torch.float32),
                crowd=torch.tensor([a["iscrowd"] for a in annotations], dtype=torch.bool))
            if people:
                item.points = torch.tensor([a["keypoints"] for a in annotations],
                                           dtype=torch.float32).view(len(annotations), 17, 3)
            else:
                item.labels = torch.tensor([LABELS[a["category_id"]] for a in annotations],
                                           dtype=torch.int64)
        item.image = picture(os.path.join(folder, file))
        if masks:
            shape = item.image.shape[1:]
            with reading("coco", path):
                item.masks = torch.stack([decode(a["segmentation"], shape) for a in annotations] or
                                         [torch.zeros(shape, dtype=torch.bool)])[:len(annotations)]
        yield item


# ---- the sets, a class for each pixel ------------------------------------------------------------
#
# A set is a function of level, root, split -> [(id, path of the image, annotation), ...], and read:
# an annotation and (H, W) of its image -> (H, W) uint8 array of classes from 0, 255 to ignore.


def maps(name, files, level, root, split, limit, size):
    """Iterator of items of a set whose annotations are files, one an image."""
    items, read = files(level, root, split)
    if not items:
        raise datasets.missing(name, datasets.root_of(root), LAYOUT)
    for number, path, annotation in spread(items, limit):
        image = picture(path)
        with reading(name, annotation):
            labels = torch.from_numpy(read(annotation, image.shape[1:]))
            if labels.shape != image.shape[1:]:
                raise ValueError(f"labels for {list(labels.shape)} pixels of an image of "
                                 f"{list(image.shape[1:])}")
        if name == "ade20k-full" and min(labels.shape) > 512:      # as for the 150 classes
            shape = [math.ceil(side * 512 / min(labels.shape)) for side in labels.shape]
            image = resize(image, shape, InterpolationMode.BICUBIC, antialias=True)
            labels = resize(labels[None], shape, InterpolationMode.NEAREST_EXACT)[0]
        yield SimpleNamespace(id=number, image=image, labels=labels)


def drawn_map(scenes, level, root, split, limit, size):
    """toy, toy-scenes. The parts are scored among themselves, so their background is ignored."""
    for index in torch.arange(limit or toy.NUM_IMAGES[split]).split(64):
        out = toy.draw(index, split, size, scenes, annotate=True)
        labels = out["semantic"] if level == "object" else out["parts"] - 1     # uint8: 0 -> 255
        for number, image, label in zip(index.tolist(), out["image"], labels):
            yield SimpleNamespace(id=number, image=image, labels=label)


def numbers(path):
    """A picture of numbers -> (H, W) uint8; of a palette the numbers, never the colours."""
    with Image.open(path) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"a label picture of mode {image.mode}, not of one number a pixel: "
                             "was it saved in colour?")
        return np.array(image)


def lookup(values):
    """{number in the file: class or 255} -> reader of pictures that have these numbers only."""
    table = np.full(256, 254, np.uint8)
    table[list(values)] = list(values.values())

    def read(path, shape):
        found = numbers(path)
        labels = table[found]
        if (labels == 254).any():
            raise ValueError(f"the number {found[labels == 254][0]} is no class")
        return labels
    return read


def ids(name, path):
    """The first word of each line."""
    with reading(name, path), open(path, encoding="utf-8") as lines:
        return [words[0] for words in map(str.split, lines) if words]


def tops(*folders):
    """Where a set may lie under the root: in a folder of its name, or unpacked right there."""
    return [f"{folder}/" for folder in folders] + [""]


ADE_TOPS = tops("ADE20K_2021_17_01", "ade20k/ADE20K_2021_17_01")


def ade20k(level, root, split):
    """SceneParse150 (Zhou et al., 2017): all 150 classes, or the 59 objects that have parts."""
    part = {"train": "training", "test": "validation"}[split]
    places = tops("ADEChallengeData2016", "ade20k/ADEChallengeData2016")
    images, labels = (find("ade20k", root, *(f"{at}{what}/{part}" for at in places))
                      for what in ("images", "annotations"))
    names = sorted(file[:-4] for file in os.listdir(labels)
                   if file.startswith("ADE_") and file.endswith(".png"))
    if level == "scene":
        table = {0: 255} | {i + 1: i for i in range(150)}
    else:
        table = dict.fromkeys(range(151), 255) | {
            i: number for number, ([i], _) in enumerate(ADE_OBJECTS)}
    return [(name, os.path.join(images, f"{name}.jpg"), os.path.join(labels, f"{name}.png"))
            for name in names], lookup(table)


def ade20k_stems(root, split):
    """Images of the whole ADE20K without ending, those that SceneParse150 has: the first 20,210."""
    part = {"train": "training", "test": "validation"}[split]
    folder = find("ade20k-full", root, *(f"{at}images/ADE/{part}" for at in ADE_TOPS))
    ending = "_" + 8 * "[0-9]" + "_seg.png"
    stems = glob.glob(os.path.join(glob.escape(folder), "*", "*", f"ADE_*{ending}"))
    stems = sorted((stem[:-8] for stem in stems), key=os.path.basename)
    return [stem for stem in stems if int(stem[-8:]) <= 20210]


def ade20k_pairs(stem):
    """(H, W) int64: 8192 times the object, 1 ... 59 or 0 for others, plus the part, 0 for none."""
    def codes(ending):
        with Image.open(stem + ending) as image:
            rgb = np.array(image.convert("RGB")).astype(np.int64)
        return rgb[..., 0] // 10 * 256 + rgb[..., 1]                # blue tells instances apart

    which = np.zeros(8192, np.int64)
    for number, (_, sources) in enumerate(ADE_OBJECTS, 1):
        which[sources] = number
    objects = which[codes("_seg.png")]
    if not os.path.exists(f"{stem}_parts_1.png"):                   # nothing in it has parts
        return objects * 8192
    return objects * 8192 + codes("_parts_1.png")


def ade20k_parts(root):
    """-> [(object * 8192 + part, its name), ...], the 209 most frequent pairs of the whole ADE20K.

    The study counts "209 parts that occur in training and validation" and gives no list; this one
    is ours: pairs of one of the 59 objects and a part of the first level, in both splits, with at
    least 0.1 % of the object's pixels (objects and parts disagree at borders), by training pixels.
    Counted once, which takes a while, and kept in parts_209.txt beside the splits.
    """
    top = find("ade20k-full", root, *(f"{at}images/ADE" for at in ADE_TOPS))
    path = os.path.join(top, "parts_209.txt")
    if not os.path.exists(path):
        train, test = (ade20k_stems(root, split) for split in ("train", "test"))
        if not train or not test:
            raise datasets.missing("ade20k-full", top, LAYOUT)
        if not os.access(top, os.W_OK):
            raise ValueError(f"{path} has to be written, once, and you may not: let somebody run "
                             f"this who may")
        print(f"note: counting the parts of ADE20K, once, for {path}", file=sys.stderr)
        counts, names = np.zeros((2, 60 * 8192), np.int64), {}
        for count, stems in zip(counts, (train, test)):
            for stem in stems:
                with reading("ade20k-full", stem):
                    here = np.bincount(ade20k_pairs(stem).ravel(), minlength=count.size)
                    count += here
                    if not set(here.nonzero()[0] % 8192) <= names.keys():
                        with open(f"{stem}.json", encoding="utf-8", errors="replace") as file:
                            content = json.load(file)["annotation"]["object"]
                        names |= {thing["name_ndx"]: thing["name"] for thing in content}
                        names.setdefault(0, "")
        per_object = counts[0].reshape(60, 8192).sum(1).repeat(8192)
        keep = (counts > 0).all(0) & (counts[0] >= 0.001 * per_object)
        keep[:8192], keep[::8192] = False, False                    # no object of the 59; no part
        keep = sorted(keep.nonzero()[0].tolist(), key=lambda pair: (-counts[0, pair], pair))[:209]
        rows = [(pair, ADE[ADE_OBJECTS[pair // 8192 - 1][0][0] - 1], names[pair % 8192],
                 *counts[:, pair]) for pair in keep]
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines("{}\t{}: {}\t{}\t{}\n".format(*row) for row in rows)
        os.replace(f"{path}.tmp", path)
    with reading("ade20k-full", path), open(path, encoding="utf-8") as file:
        rows = [line.split("\t") for line in file]
        return [(int(pair), name) for pair, name, *_ in rows]


def ade20k_full(level, root, split):
    table = np.full(60 * 8192, 255, np.uint8)
    for number, (pair, _) in enumerate(ade20k_parts(root)):
        table[pair] = number
    return [(os.path.basename(stem), f"{stem}.jpg", stem)
            for stem in ade20k_stems(root, split)], lambda stem, _: table[ade20k_pairs(stem)]


def pascal(level, root, split):
    """Pascal-Part (Chen et al., 2014) on VOC2010: what hides what is the order in the file."""
    loadmat = extra("scipy.io", "The annotations of pascal are .mat files").loadmat
    folder = find("pascal", root, *(f"{at}Annotations_Part" for at in (
        "trainval/", "pascal/trainval/", *tops("pascal"))))
    lists, images = (find("pascal", root, *(at + what for at in tops(
        "VOCdevkit/VOC2010", "VOC2010", "pascal/VOCdevkit/VOC2010"))) for what in (
        f"ImageSets/Main/{'train' if split == 'train' else 'val'}.txt", "JPEGImages"))
    classes = list(PASCAL_PARTS) if level == "object" else PASCAL_CLASSES

    def read(path, shape):
        labels, unknown = np.full(tuple(shape), 255, np.uint8), []
        content = loadmat(path, squeeze_me=True, struct_as_record=False)["anno"]
        for thing in np.atleast_1d(content.objects):                # one comes without its list
            if level == "object":
                labels[thing.mask > 0] = classes.index(thing.__dict__["class"]) if (
                    thing.__dict__["class"] in classes) else 255
            for part in np.atleast_1d(thing.parts) if level == "part" else []:
                name = f"{thing.__dict__['class']}: " + re.sub(r"_\d+$", "", part.part_name)
                if name in classes:
                    labels[part.mask > 0] = classes.index(name)
                else:
                    unknown.append(name)
        if unknown:
            raise ValueError(f"parts that are none of the 193: {', '.join(unknown)}")
        return labels

    return [(name, os.path.join(images, f"{name}.jpg"), os.path.join(folder, f"{name}.mat"))
            for name in ids("pascal", lists)], read


def voc(level, root, split):
    """VOC 2012 (Everingham et al.), to train with the labels of SBD (Hariharan et al., 2011)."""
    top = find("voc", root, *tops("VOCdevkit/VOC2012", "VOC2012", "voc/VOCdevkit/VOC2012", "voc"))
    official, augmented, images = (os.path.join(top, at) for at in (
        "SegmentationClass", "SegmentationClassAug", "JPEGImages"))
    lists = {part: find("voc", top, f"ImageSets/Segmentation/{part}.txt")
             for part in ("train", "val")}
    label = {name: os.path.join(official, f"{name}.png")
             for name in ids("voc", lists["train" if split == "train" else "val"])}
    prepared = os.path.join(top, "ImageSets", "Segmentation", "trainaug.txt")
    if split == "train" and os.path.isdir(augmented) and os.path.exists(prepared):
        label = {name: os.path.join(augmented, f"{name}.png") for name in ids("voc", prepared)}
    elif split == "train":
        try:
            sbd = find("voc", root, *(f"{at}dataset/cls" for at in (
                "benchmark_RELEASE/", "voc/benchmark_RELEASE/", "sbd/benchmark_RELEASE/")))
            others = set().union(*(ids("voc", os.path.join(os.path.dirname(sbd), part))
                                   for part in ("train.txt", "val.txt")))
            others -= label.keys() | set(ids("voc", lists["val"]))
            label |= {name: os.path.join(sbd, f"{name}.mat") for name in sorted(others)}
        except FileNotFoundError:
            print(f"note: no benchmark_RELEASE (SBD) beside {top}: training on VOC's own "
                  f"{len(label)} images, not on the usual 10,582", file=sys.stderr)
    if any(path.endswith(".mat") for path in label.values()):
        loadmat = extra("scipy.io", "The labels of SBD are .mat files").loadmat
    check = lookup({i: i for i in (*range(21), 255)})

    def read(path, shape):
        if path.endswith(".png"):
            return check(path, shape)
        labels = np.array(loadmat(path, squeeze_me=True, struct_as_record=False)[
            "GTcls"].Segmentation, np.uint8)
        if labels.max() > 20:
            raise ValueError(f"the number {labels.max()} is no class")
        return labels

    return [(name, os.path.join(images, f"{name}.jpg"), path) for name, path in label.items()], read


def lip(level, root, split):
    """Look Into Person (Gong et al., 2017); left and right are the person's. A level may double."""
    part = "train" if split == "train" else "val"
    places = [at + twice for at in tops("lip", "LIP", "ATR/LIP")
              for twice in ("", "TrainVal_images/", "TrainVal_parsing_annotations/")]
    images = find("lip", root, *(f"{at}TrainVal_images/{part}_images" for at in places))
    labels = find("lip", root, *(f"{at}TrainVal_parsing_annotations/{part}_segmentations"
                                 for at in places))
    names = ids("lip", find("lip", root, *(f"{at}{part}_id.txt" for at in places)))
    table = {i: i for i in range(20)} if level == "scene" else {0: 255} | {
        i + 1: i for i in range(19)}
    return [(name, os.path.join(images, f"{name}.jpg"), os.path.join(labels, f"{name}.png"))
            for name in names], lookup(table | {255: 255})


def cityscapes(level, root, split):
    """Cityscapes (Cordts et al., 2016): 19 of its labels are trained and scored."""
    part = "train" if split == "train" else "val"
    images, labels = (find("cityscapes", root, *(f"{at}{what}/{part}" for at in tops("cityscapes")))
                      for what in ("leftImg8bit", "gtFine"))
    ending = "_gtFine_labelIds.png"
    found = sorted(glob.glob(os.path.join(glob.escape(labels), "*", f"*{ending}")))
    names = [os.path.relpath(path, labels)[:-len(ending)] for path in found]
    table = dict.fromkeys(range(256), 255) | {
        number: i for i, number in enumerate(CITYSCAPES.values())}
    return [(os.path.basename(name), os.path.join(images, f"{name}_leftImg8bit.png"), path)
            for name, path in zip(names, found)], lookup(table)


def coco_scene(level, root, split):
    """COCO-Stuff (Caesar et al., 2018): the files have the number less 1."""
    year = {"train": "train2017", "test": "val2017"}[split]
    labels = find("coco", root, *(f"{at}stuffthingmaps/{year}" for at in tops("coco")))
    images = find("coco", root, *(at + year for at in ("coco/", "", "coco/images/", "images/")))
    names = sorted(file[:-4] for file in os.listdir(labels) if re.fullmatch(r"\d+\.png", file))
    table = {number - 1: i for i, number in enumerate([*COCO_IDS, *range(92, 183)])}
    return [(int(name), os.path.join(images, f"{name}.jpg"), os.path.join(labels, f"{name}.png"))
            for name in names], lookup(table | {255: 255})


def coco_maps(level, root, split, limit, size):
    """Level object, painted from the instances: crowds, to ignore, then large before small."""
    if level == "scene":
        yield from maps("coco", coco_scene, level, root, split, limit, size)
        return
    for item in coco("instances", root, split, limit, size, masks=True):
        labels = torch.zeros(item.image.shape[1:], dtype=torch.uint8)
        labels[item.masks[item.crowd].any(0)] = 255
        for k in item.areas.argsort(descending=True, stable=True).tolist():
            if not item.crowd[k]:
                labels[item.masks[k]] = int(item.labels[k]) + 1
        yield SimpleNamespace(id=item.id, image=item.image, labels=labels)


def ade20k_maps(level, *rest):
    name, files = ("ade20k-full", ade20k_full) if level == "part" else ("ade20k", ade20k)
    return maps(name, files, level, *rest)


# ---- the sets, films -----------------------------------------------------------------------------


class Frames:
    """Pictures that are read when asked for: frames[t] -> (3, H, W) uint8; to be looped over."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, t):
        return picture(self.paths[t])


def davis(root, split, limit, size):
    """DAVIS-2017 (Pont-Tuset et al., 2017), 480p, semi-supervised."""
    part = "train" if split == "train" else "val"
    lists = find("davis", root, *(f"{at}ImageSets/2017/{part}.txt" for at in tops(
        "DAVIS", "davis", "DAVIS-2017-trainval-480p/DAVIS")))
    top = lists[:-len(f"ImageSets/2017/{part}.txt")]
    for name in spread(ids("davis", lists), limit):
        images, labels = (sorted(glob.glob(os.path.join(glob.escape(os.path.join(
            top, kind, "480p", name)), ending))) for kind, ending in (
            ("JPEGImages", "*.jpg"), ("Annotations", "*.png")))
        with reading("davis", os.path.join(top, "Annotations", "480p", name)):
            if not images or [os.path.basename(path)[:-4] for path in images] != [
                    os.path.basename(path)[:-4] for path in labels]:
                raise ValueError(f"{len(images)} frames and {len(labels)} annotations that are not "
                                 "of the same names")
            masks = np.stack([numbers(path) for path in labels])
            for path in images:
                with Image.open(path) as image:                     # the head of the file only
                    if image.size != masks.shape[:0:-1]:
                        raise ValueError(f"{os.path.basename(path)} is {image.size} large, its "
                                         f"annotation {masks.shape[:0:-1]}")
        masks[masks == 255] = 0
        yield SimpleNamespace(name=name, frames=Frames(images), masks=torch.from_numpy(masks),
                              objects=int(masks[0].max()))


def filmed(scenes, root, split, limit, size):
    """toy, toy-scenes: the creatures that the first frame shows, counted anew."""
    for index in range(limit or 30):                                # as many as DAVIS has
        film = toy.video(torch.tensor([index]), 24, split, size, scenes)
        masks = film["instances"][0]
        order = torch.zeros(256, dtype=torch.uint8)                 # a later comer: background
        for number, creature in enumerate(masks[0][masks[0] > 0].unique().tolist(), 1):
            order[creature] = number
        masks = order[masks.long()]
        yield SimpleNamespace(name=f"{split}-{index}", frames=film["image"][0], masks=masks,
                              objects=int(masks[0].max()))


# ---- the views -----------------------------------------------------------------------------------

ONE, SCENES = functools.partial(drawn, False), functools.partial(drawn, True)
KEYPOINTS = {  # data set: reader, names of the parts
    "toy": (ONE, toy.PARTS), "toy-scenes": (SCENES, toy.PARTS), "cub": (cub, CUB_PARTS),
    "coco": (functools.partial(coco, "person_keypoints"), COCO_PARTS)}
BOXES = {      # data set: reader, names of the classes
    "toy": (ONE, toy.CLASSES), "toy-scenes": (SCENES, toy.CLASSES),
    "coco": (functools.partial(coco, "instances"), COCO_CLASSES)}
MASKS = BOXES | {"coco": (functools.partial(coco, "instances", masks=True), COCO_CLASSES)}
PASCAL_CLASSES = [f"{name}: {part}" for name, parts in PASCAL_PARTS.items() for part in parts]
SEGMENTATION = {  # data set: reader, level: names of the classes
    **{name: (functools.partial(drawn_map, name == "toy-scenes"),
              {"object": ["background", *toy.CLASSES], "part": toy.PARTS})
       for name in ("toy", "toy-scenes")},
    "ade20k": (ade20k_maps, {
        "scene": ADE, "object": [ADE[i - 1] for [i], _ in ADE_OBJECTS], "part": None}),
    "pascal": (functools.partial(maps, "pascal", pascal),
               {"object": list(PASCAL_PARTS), "part": PASCAL_CLASSES}),
    "voc": (functools.partial(maps, "voc", voc), {"object": VOC}),
    "lip": (functools.partial(maps, "lip", lip), {"part": LIP[1:], "scene": LIP}),
    "cityscapes": (functools.partial(maps, "cityscapes", cityscapes), {"scene": list(CITYSCAPES)}),
    "coco": (coco_maps, {"object": ["background", *COCO_CLASSES], "scene": COCO_CLASSES + STUFF})}
VIDEOS = {"toy": (functools.partial(filmed, False),), "davis": (davis,),
          "toy-scenes": (functools.partial(filmed, True),)}


def keypoints(name, root=None, split="test", limit=None, size=256):
    """Iterator of items, one an image, of those with any key-point; K objects: birds, persons.

    image (3, H, W) uint8; points (K, P, 3) float32: x, y, v with v 2 visible, 1 labelled but
    hidden, 0 absent; boxes (K, 4) float32; areas (K,) float32 of the masks, or None; crowd (K,)
    bool: no single person (has no points); id: the set's number of the image.
    split: train, test (= val); of cub also None, all images. limit: so many images, evenly spread.
    size: pixels a side of toy pictures; in smaller ones parts are close together.
    """
    reader, split = view(name, split, KEYPOINTS, "key-points")
    return reader(root, split, limit, size)


def part_names(name):
    """The P key-points of a set, in order, with _ for spaces; left and right are the animal's."""
    return list(KEYPOINTS[name][1])


def boxes(name, root=None, split="test", limit=None, size=256):
    """Iterator of items, one an image; an image without objects has K = 0.

    image (3, H, W) uint8; boxes (K, 4) float32, some of COCO's less than a pixel wide; labels (K,)
    int64 from 0, in the order of box_classes; areas (K,) float32 of the masks, pixels; crowd (K,)
    bool: a region of many objects, to ignore; id: the set's number of the image.
    split, limit, size: as of `keypoints`.
    """
    reader, split = view(name, split, BOXES, "boxes")
    return reader(root, split, limit, size)


def box_classes(name):
    """Names in the order of the labels; of COCO, 80: its numbers 1 ... 90 without their gaps."""
    return list(BOXES[name][1])


def masks(name, root=None, split="test", limit=None, size=256, order=None):
    """As `boxes`, and masks (K, H, W) bool: of COCO, pycocotools makes them from the outlines.

    A crowd's mask covers many objects. Masks may overlap: who is in front is not annotated.
    order: a function of the number of images -> which of them to read, and in which order.
    """
    reader, split = view(name, split, MASKS, "masks")
    return reader(root, split, limit, size, order)


def segmentation(name, root=None, split="test", limit=None, level=None, size=256):
    """Iterator of items, one an image: a class for every pixel.

    image (3, H, W) uint8; labels (H, W) uint8: 0 ... classes - 1 in the order of
    segmentation_classes, 255 = ignore: neither trained nor scored; id: the set's name of the image.
    level: what is told apart, by default the first of the set:
      toy, toy-scenes  object (16 creatures and background), part (9)
      ade20k           scene (150), object (the 59 that have parts), part (209: see ade20k_parts)
      pascal           object (16), part (193); the other classes of VOC are ignored
      voc              object (20 and background); to train: the 10,582 with SBD's labels
      lip              part (19), scene (the same and background)
      cityscapes       scene (19)
      coco             object (80 and background; crowds ignored), scene (80 things, 91 stuff)
    split, limit, size: as of `keypoints`.
    """
    reader, split = view(name, split, SEGMENTATION, "segmentation")
    return reader(checked(name, level), root, split, limit, size)


def checked(name, level):
    levels = list(SEGMENTATION[name][1])
    if level not in (None, *levels):
        raise ValueError(f"No level {level!r} of {name}: choose {' or '.join(levels)}")
    return level or levels[0]


def segmentation_classes(name, level=None, root=None):
    """Names in the order of the labels; ade20k's parts are counted in the set, so need its root."""
    view(name, "test", SEGMENTATION, "segmentation")
    classes = SEGMENTATION[name][1][checked(name, level)]
    return [part for _, part in ade20k_parts(root)] if classes is None else list(classes)


def videos(name, root=None, split="test", limit=None, size=256):
    """Iterator of items, one a sequence: davis, or toy and toy-scenes, whose creatures walk.

    name; frames: T images, frames[t] is (3, H, W) uint8 and of files read when asked for; masks
    (T, H, W) uint8, 0 background and void, then the objects; objects: K, the largest number in the
    first mask. An object may be gone in some frames; one that comes later is none of the K.
    split, limit, size: as of `keypoints`.
    """
    reader, split = view(name, split, VIDEOS, "videos")
    return reader(root, split, limit, size)


def landmarks(name, root=None):
    """Revisited Oxford and Paris (Radenovic et al., 2018), names roxford5k and rparis6k.

    -> database (n paths), queries (70 paths), boxes (70, 4) float32 of the landmark in the query;
    easy, hard, junk: for each query an int64 tensor of numbers in the database, maybe empty.
    The images are not looked at: some are cut short, and the lists decide what belongs.
    """
    if name not in ("roxford5k", "rparis6k"):
        raise ValueError(f"No landmarks of {name!r} here: choose roxford5k or rparis6k")
    path = find(name, root, f"{name}/gnd_{name}.pkl", f"gnd_{name}.pkl")
    folder = find(name, root, f"{name}/jpg", "jpg")
    with reading(name, path), open(path, "rb") as file:
        content = datasets.ArraysOnly(file, encoding="latin1").load()
        truth = content["gnd"]
        database, queries = ([os.path.join(folder, f"{image}.jpg") for image in content[key]]
                             for key in ("imlist", "qimlist"))
        lists = {key: [torch.tensor(query[key], dtype=torch.int64) for query in truth]
                 for key in ("easy", "hard", "junk")}
        numbers = torch.cat(sum(lists.values(), []))
        if len(truth) != len(queries) or not ((0 <= numbers) & (numbers < len(database))).all():
            raise ValueError("the ground truth does not go with the lists of images")
        found = torch.tensor([query["bbx"] for query in truth], dtype=torch.float32)
        found = found.view(len(truth), 4)
    return SimpleNamespace(database=database, queries=queries, boxes=found, **lists)


def cue_conflict(root=None):
    """Shape of one thing, texture of another (Geirhos et al., 2019): cat7-dog3.png is such a cat.

    -> paths (n), shapes, textures (n,) int64, classes: the 16 names. Where both are equal (80 of
    the 1,280) there is no conflict: such images are not scored.
    """
    folder = find("cue-conflict", root, "cue-conflict", "cue_conflict",
                  "style-transfer-preprocessed-512", "stimuli/style-transfer-preprocessed-512")
    paths = sorted(os.path.join(at, file) for at, _, files in os.walk(folder, followlinks=True)
                   for file in files if file.lower().endswith(".png") and file[0] != ".")
    if not paths:
        raise datasets.missing("cue-conflict", folder, LAYOUT)
    pairs = []
    for path in paths:                      # some copies put a number and more in front
        pair = re.search(r"(?:^|_)([a-z]+)\d+-([a-z]+)\d+\.png$", os.path.basename(path).lower())
        if not pair or not set(pair.groups()) <= set(SHAPES):
            raise ValueError(f"{path} is not named <shape><i>-<texture><j>.png, like "
                             f"cat7-dog3.png, with two of {', '.join(SHAPES)}")
        pairs.append([SHAPES.index(word) for word in pair.groups()])
    shapes, textures = torch.tensor(pairs).unbind(1)
    return SimpleNamespace(paths=paths, shapes=shapes, textures=textures, classes=list(SHAPES))
