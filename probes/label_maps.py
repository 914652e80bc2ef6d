"""Label maps: data sets with a class for every pixel, in their official files.

    items, read = list_voc("object", root, "train")
    name, image_path, label_path = items[0]
    labels = read(label_path, (height, width))          # (height, width) uint8 array of classes

A function list_<data set>(level, root, split) returns
    items: a list of (name of the image, path of the image, path of its annotation), and
    read: a function (path of an annotation, (height, width) of its image) -> labels: classes from
          0, and 255 for pixels to ignore.
probes/annotations.py calls these functions, reads the images and reports errors.
"""
import glob
import json
import os
import re
import sys

import numpy as np
from PIL import Image

from lib import datasets
from probes.annotation_files import (
    COCO_IDS,
    LAYOUT,
    find_path,
    import_optional,
    list_prefixes,
    name_damaged_file,
    read_ids,
)

# --------------------------------------------------------------------------------------------------
# Names of the classes, in the order of the labels

# ADE20K's classes 1 ... 150: the first name of each in objectInfo150.txt.
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
# The 59 objects that have parts (from the code of Zhu et al., 2023), as id in ADE : id or ids in
# the full ADE20K (convertFromADE/mapFromADE.txt).
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
CITYSCAPES = dict(zip(          # name: its id in *_labelIds.png
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
window-other wood""".split()                                        # COCO's ids 92 ... 182
PASCAL_CLASSES = [f"{name}: {part}" for name, parts in PASCAL_PARTS.items() for part in parts]

# --------------------------------------------------------------------------------------------------
# Label images: one id for each pixel


def read_label_image(path):
    """-> (height, width) uint8 ids; for a palette image the indices, not the colors."""
    with Image.open(path) as image:
        if image.mode == "1":                                      # black and white: 0 and 1
            return np.array(image, np.uint8)
        if image.mode in ("I", "I;16") and max(image.getextrema()) < 256:
            return np.array(image).astype(np.uint8)
        if image.mode not in ("L", "P"):
            raise ValueError(f"a label image of mode {image.mode} instead of one number a pixel: "
                             "was it saved in color?")
        return np.array(image)


def make_label_reader(classes):
    """{id in the file: class or 255} -> function read, as above. Other ids are errors."""
    table, known = np.zeros(256, np.uint8), np.zeros(256, bool)
    table[list(classes)], known[list(classes)] = list(classes.values()), True

    def read(path, shape):
        ids = read_label_image(path)
        if not known[ids].all():
            raise ValueError(f"the number {ids[~known[ids]][0]} is not a class")
        return table[ids]
    return read


def pair_files(names, images, labels):
    """Items for names whose images are <name>.jpg and whose labels are <name>.png."""
    return [(name, os.path.join(images, f"{name}.jpg"), os.path.join(labels, f"{name}.png"))
            for name in names]


# --------------------------------------------------------------------------------------------------
# Scenes and objects


def list_ade20k(level, root, split):
    """SceneParse150 (Zhou et al., 2017): all 150 classes, or the 59 objects that have parts."""
    part = {"train": "training", "test": "validation"}[split]
    places = list_prefixes("ADEChallengeData2016", "ade20k/ADEChallengeData2016")
    images, labels = (find_path("ade20k", root, *(f"{at}{what}/{part}" for at in places))
                      for what in ("images", "annotations"))
    names = sorted(file[:-4] for file in os.listdir(labels)
                   if file.startswith("ADE_") and file.endswith(".png"))
    if level == "scene":
        classes = {0: 255} | {i + 1: i for i in range(150)}
    else:
        classes = dict.fromkeys(range(151), 255) | {
            number: i for i, ([number], _) in enumerate(ADE_OBJECTS)}
    return pair_files(names, images, labels), make_label_reader(classes)


def list_voc(level, root, split):
    """VOC 2012 (Everingham et al.). train includes the labels of SBD (Hariharan et al., 2011)."""
    top = find_path("voc", root, *list_prefixes(
        "VOCdevkit/VOC2012", "VOC2012", "voc/VOCdevkit/VOC2012", "voc"))
    official = os.path.join(top, "SegmentationClass")
    augmented = os.path.join(top, "SegmentationClassAug")
    images = os.path.join(top, "JPEGImages")
    lists = {part: find_path("voc", top, f"ImageSets/Segmentation/{part}.txt")
             for part in ("train", "val")}
    label = {name: os.path.join(official, f"{name}.png")
             for name in read_ids("voc", lists["train" if split == "train" else "val"])}
    prepared = os.path.join(top, "ImageSets", "Segmentation", "trainaug.txt")
    if split == "train" and os.path.isdir(augmented) and os.path.exists(prepared):
        label = {name: os.path.join(augmented, f"{name}.png")
                 for name in read_ids("voc", prepared)}
    elif split == "train":
        try:
            sbd = find_path("voc", root, *(f"{at}dataset/cls" for at in (
                "benchmark_RELEASE/", "voc/benchmark_RELEASE/", "sbd/benchmark_RELEASE/")))
            others = set().union(*(read_ids("voc", os.path.join(os.path.dirname(sbd), part))
                                   for part in ("train.txt", "val.txt")))
            others -= label.keys() | set(read_ids("voc", lists["val"]))
            label |= {name: os.path.join(sbd, f"{name}.mat") for name in sorted(others)}
        except FileNotFoundError:
            datasets.print_once(f"note: no benchmark_RELEASE (SBD) next to {top}: training on the "
                                f"{len(label)} images of VOC instead of the usual 10,582")
    if any(path.endswith(".mat") for path in label.values()):
        loadmat = import_optional("scipy.io", "the labels of SBD are .mat files").loadmat
    read_png = make_label_reader({i: i for i in (*range(21), 255)})

    def read(path, shape):
        if path.endswith(".png"):
            return read_png(path, shape)
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
        labels = np.array(content["GTcls"].Segmentation, np.uint8)
        if labels.max() > 20:
            raise ValueError(f"the number {labels.max()} is not a class")
        return labels

    return [(name, os.path.join(images, f"{name}.jpg"), path) for name, path in label.items()], read


def list_lip(level, root, split):
    """Look Into Person (Gong et al., 2017). left and right are as seen by the person. Some copies
    have nested folders of the same name, such as TrainVal_images/TrainVal_images."""
    part = "train" if split == "train" else "val"
    places = [at + twice for at in list_prefixes("lip", "LIP", "ATR/LIP")
              for twice in ("", "TrainVal_images/", "TrainVal_parsing_annotations/")]
    images = find_path("lip", root, *(f"{at}TrainVal_images/{part}_images" for at in places))
    labels = find_path("lip", root, *(f"{at}TrainVal_parsing_annotations/{part}_segmentations"
                                      for at in places))
    names = read_ids("lip", find_path("lip", root, *(f"{at}{part}_id.txt" for at in places)))
    classes = {i: i for i in range(20)} if level == "scene" else {0: 255} | {
        i + 1: i for i in range(19)}
    return pair_files(names, images, labels), make_label_reader(classes | {255: 255})


def list_cityscapes(level, root, split):
    """Cityscapes (Cordts et al., 2016): the 19 classes that are used for training and
    evaluation."""
    part = "train" if split == "train" else "val"
    images, labels = (find_path("cityscapes", root, *(
        f"{at}{what}/{part}" for at in list_prefixes("cityscapes")))
        for what in ("leftImg8bit", "gtFine"))
    ending = "_gtFine_labelIds.png"
    paths = sorted(glob.glob(os.path.join(glob.escape(labels), "*", f"*{ending}")))
    names = [os.path.relpath(path, labels)[:-len(ending)] for path in paths]
    classes = dict.fromkeys(range(256), 255) | {
        number: i for i, number in enumerate(CITYSCAPES.values())}
    return [(os.path.basename(name), os.path.join(images, f"{name}_leftImg8bit.png"), path)
            for name, path in zip(names, paths)], make_label_reader(classes)


def list_coco_stuff(level, root, split):
    """COCO-Stuff (Caesar et al., 2018): 80 thing and 91 stuff classes. Files hold the id of a class
    minus 1."""
    year = {"train": "train2017", "test": "val2017"}[split]
    labels = find_path("coco", root, *(f"{at}stuffthingmaps/{year}"
                                       for at in list_prefixes("coco")))
    images = find_path("coco", root, *(at + year for at in (
        "coco/", "", "coco/images/", "images/")))
    names = sorted(file[:-4] for file in os.listdir(labels) if re.fullmatch(r"\d+\.png", file))
    classes = {number - 1: i for i, number in enumerate([*COCO_IDS, *range(92, 183)])}
    items = [(int(name), *paths) for name, *paths in pair_files(names, images, labels)]
    return items, make_label_reader(classes | {255: 255})


# --------------------------------------------------------------------------------------------------
# Parts


def list_pascal(level, root, split):
    """Pascal-Part (Chen et al., 2014) on VOC2010. Where masks overlap, the last one in the file is
    used."""
    loadmat = import_optional("scipy.io", "the annotations of pascal are .mat files").loadmat
    folder = find_path("pascal", root, *(f"{at}Annotations_Part" for at in (
        "trainval/", "pascal/trainval/", *list_prefixes("pascal"))))
    part = "train" if split == "train" else "val"
    places = list_prefixes("VOCdevkit/VOC2010", "VOC2010", "pascal/VOCdevkit/VOC2010")
    lists = find_path("pascal", root, *(f"{at}ImageSets/Main/{part}.txt" for at in places))
    images = find_path("pascal", root, *(f"{at}JPEGImages" for at in places))
    objects = {name: i for i, name in enumerate(PASCAL_PARTS)}
    parts = {name: i for i, name in enumerate(PASCAL_CLASSES)}

    def read(path, shape):
        labels, unknown = np.full(tuple(shape), 255, np.uint8), []
        content = loadmat(path, squeeze_me=True, struct_as_record=False)["anno"]
        for thing in np.atleast_1d(content.objects):              # one object is not in a list
            kind = thing.__dict__["class"]                         # `class` is a keyword of Python
            if level == "object":
                labels[thing.mask > 0] = objects.get(kind, 255)
                continue
            for part in np.atleast_1d(thing.parts):
                name = f"{kind}: " + re.sub(r"_\d+$", "", part.part_name)
                if name in parts:
                    labels[part.mask > 0] = parts[name]
                else:
                    unknown.append(name)
        if unknown:
            raise ValueError(f"parts that are none of the 193: {', '.join(unknown)}")
        return labels

    return [(name, os.path.join(images, f"{name}.jpg"), os.path.join(folder, f"{name}.mat"))
            for name in read_ids("pascal", lists)], read


def list_ade20k_full(level, root, split):
    """The full ADE20K (Zhou et al., 2017) with 209 parts, see `load_ade20k_parts`."""
    table = np.full(60 * 8192, 255, np.uint8)
    for number, (pair, _) in enumerate(load_ade20k_parts(root)):
        table[pair] = number

    def read(stem, shape):
        return table[read_ade20k_pairs(stem)]

    return [(os.path.basename(stem), f"{stem}.jpg", stem)
            for stem in list_ade20k_stems(root, split)], read


ADE_FULL = list_prefixes("ADE20K_2021_17_01", "ade20k/ADE20K_2021_17_01")


def list_ade20k_stems(root, split):
    """Paths, without the extension, of the images of the full ADE20K that are also in
    SceneParse150: those with a number up to 20,210."""
    part = {"train": "training", "test": "validation"}[split]
    folder = find_path("ade20k-full", root, *(f"{at}images/ADE/{part}" for at in ADE_FULL))
    ending = "_" + 8 * "[0-9]" + "_seg.png"
    stems = glob.glob(os.path.join(glob.escape(folder), "*", "*", f"ADE_*{ending}"))
    stems = sorted((stem[:-8] for stem in stems), key=os.path.basename)
    return [stem for stem in stems if int(stem[-8:]) <= 20210]


def read_ade20k_pairs(stem):
    """-> (height, width) int64, 8192 object + part: object 1 ... 59, or 0 for all others; part 0
    means that a pixel has no part."""
    def read_codes(ending):
        with Image.open(stem + ending) as image:
            rgb = np.array(image.convert("RGB")).astype(np.int64)
        return rgb[..., 0] // 10 * 256 + rgb[..., 1]              # blue is the instance

    objects = np.zeros(8192, np.int64)
    for number, (_, sources) in enumerate(ADE_OBJECTS, 1):
        objects[sources] = number
    pairs = objects[read_codes("_seg.png")] * 8192
    if os.path.exists(f"{stem}_parts_1.png"):                      # else its objects have no parts
        pairs += read_codes("_parts_1.png")
    return pairs


def load_ade20k_parts(root):
    """-> [(8192 object + part, name), ...]: 209 pairs of an object and a part of the full ADE20K.

    Zhu et al. (2023) count "209 parts that occur in training and validation" and give no list; this
    list is ours. Candidates are pairs of one of the 59 objects and a part of the first level that
    occur in both splits and cover at least 0.1% of the object's training pixels (fewer are errors
    at borders, where the maps of objects and parts disagree). Of these, the 209 with the most
    training pixels are taken, in this order. They are counted once, which takes a while, and
    stored in parts_209.txt next to the splits.
    """
    top = find_path("ade20k-full", root, *(f"{at}images/ADE" for at in ADE_FULL))
    path = os.path.join(top, "parts_209.txt")
    if not os.path.exists(path):
        stems = [list_ade20k_stems(root, split) for split in ("train", "test")]
        if not all(stems):
            raise datasets.missing_error("ade20k-full", top, LAYOUT)
        if not os.access(top, os.W_OK):
            raise ValueError(f"{path} has to be written once, and you do not have permission: run "
                             "this once as a user who has it")
        print(f"note: counting the parts of ADE20K, once, for {path}", file=sys.stderr)
        rows = count_ade20k_parts(*stems)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines("{}\t{}: {}\t{}\t{}\n".format(*row) for row in rows)
        os.replace(f"{path}.tmp", path)
    with name_damaged_file("ade20k-full", path), open(path, encoding="utf-8") as file:
        rows = [line.split("\t") for line in file]
        return [(int(pair), name) for pair, name, *_ in rows]


def count_ade20k_parts(train, test):
    """-> rows of pair, object, part, pixels in train, pixels in test; those with the most pixels in
    train first."""
    counts, names = np.zeros((2, 60 * 8192), np.int64), {}
    for count, stems in zip(counts, (train, test)):
        for stem in stems:
            with name_damaged_file("ade20k-full", stem):
                new = np.bincount(read_ade20k_pairs(stem).ravel(), minlength=count.size)
                count += new
                if not set(new.nonzero()[0] % 8192) <= names.keys():
                    with open(f"{stem}.json", encoding="utf-8", errors="replace") as file:
                        content = json.load(file)["annotation"]["object"]
                    names |= {thing["name_ndx"]: thing["name"] for thing in content}
                    names.setdefault(0, "")
    per_object = counts[0].reshape(60, 8192).sum(1).repeat(8192)
    keep = (counts > 0).all(0) & (counts[0] >= 0.001 * per_object)
    keep[:8192] = False                                            # none of the 59 objects
    keep[::8192] = False                                           # no part
    pairs = sorted(keep.nonzero()[0].tolist(), key=lambda pair: (-counts[0, pair], pair))[:209]
    return [(pair, ADE[ADE_OBJECTS[pair // 8192 - 1][0][0] - 1], names[pair % 8192],
             *counts[:, pair]) for pair in pairs]
