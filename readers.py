"""Annotated pictures, as probes ask for them: key-points, boxes, landmarks, cue conflicts.

    for item in readers.keypoints("cub", root="/data", split="test"):
        item.image, item.points                      # (3, H, W) uint8, (K, P, 3) float32
    names = readers.part_names("cub")                # of the P key-points

A view is one function for all sets that can serve it, and gives the same shape whatever the set:
one item for each image, read when its turn comes. What is classified whole is in data.py. Sets are
read in their official layout (LAYOUT); nothing is downloaded. Coordinates are pixels of the stored
image, x to the right and y down, as the annotation has them; boxes are x0, y0, x1, y1.

FileNotFoundError shows the layout expected and where to get the set. ValueError, in one sentence: a
set or split that is not there, an annotation or image that cannot be read.
"""
import functools
import json
import os
import re
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torchvision.transforms.v2.functional import pil_to_tensor

import data
import toy

# K objects of an image, P key-points of an object, H, W pixels

LAYOUT = {                                  # as in data.py, with the annotations
    "cub": ("CUB_200_2011/{images/<class>/*.jpg, images.txt, train_test_split.txt, "
            "bounding_boxes.txt, parts/part_locs.txt}",
            "'CUB-200-2011' from vision.caltech.edu/datasets/cub_200_2011"),
    "coco": ("coco/{train2017/*.jpg, val2017/*.jpg, annotations/{instances, person_keypoints}_"
             "{train2017, val2017}.json}", "'2017 Train images', '2017 Val images' and '2017 "
             "Train/Val annotations' from cocodataset.org"),
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

# ---- opening an annotation -----------------------------------------------------------------------


def find(name, root, *places):
    """The first of the places under root (none: $DATA_ROOT, else datasets) that exists."""
    root = root or os.environ.get("DATA_ROOT", "datasets")
    return data.find(name, root, *places, layouts=LAYOUT)


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
        return pil_to_tensor(data.read_image(path))
    except Exception as error:
        raise ValueError(f"Cannot read {path}: {error}. Restore the file") from None


def spread(items, limit):
    """So many of a list, evenly spread as it is often sorted by class; None: all."""
    n = len(items)
    return items if limit is None or limit >= n else [items[i * n // limit] for i in range(limit)]


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


def drawn(scenes, root, split, limit, size):
    """toy, toy-scenes: creatures of which nothing is seen are left out."""
    for index in torch.arange(limit or toy.SIZES[split]).split(64):
        out = toy.draw(index, split, size, scenes, annotate=True)
        creature = torch.arange(1, out["classes"].shape[1] + 1)[:, None, None]
        areas = (out["instances"][:, None] == creature).sum((2, 3)).float()
        for i, number in enumerate(index.tolist()):
            seen = out["classes"][i] >= 0
            yield SimpleNamespace(
                id=number, image=out["image"][i], points=out["keypoints"][i, seen],
                boxes=out["boxes"][i, seen], areas=areas[i, seen], labels=out["classes"][i, seen],
                crowd=torch.zeros(int(seen.sum()), dtype=torch.bool))


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
    """-> [(number of the image, file name, its annotations), ...] of instances or key-points."""
    with reading("coco", path), open(path, encoding="utf-8") as file:
        content = json.load(file)
        rows = {image["id"]: (image["id"], image["file_name"], []) for image in content["images"]}
        for annotation in content["annotations"]:
            rows[annotation["image_id"]][2].append(annotation)
        return list(rows.values())


def coco(kind, root, split, limit, size):
    """COCO 2017 (Lin et al., 2014); kind: instances or person_keypoints. Crowds are among them."""
    year = {"train": "train2017", "test": "val2017"}[split]
    path = find("coco", root, *(f"{at}annotations/{kind}_{year}.json" for at in ("coco/", "")))
    folder = find("coco", root, *(at + year for at in ("coco/", "", "coco/images/", "images/")))
    rows, people = coco_json(path), kind == "person_keypoints"
    with reading("coco", path):             # half of the images show nobody: not read in vain
        rows = [row for row in rows if not people or any(a["num_keypoints"] for a in row[2])]
    for number, file, annotations in spread(rows, limit):
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
        yield item


# ---- the views -----------------------------------------------------------------------------------

ONE, SCENES = functools.partial(drawn, False), functools.partial(drawn, True)
KEYPOINTS = {  # data set: reader, names of the parts
    "toy": (ONE, toy.PARTS), "toy-scenes": (SCENES, toy.PARTS), "cub": (cub, CUB_PARTS),
    "coco": (functools.partial(coco, "person_keypoints"), COCO_PARTS)}
BOXES = {      # data set: reader, names of the classes
    "toy": (ONE, toy.CLASSES), "toy-scenes": (SCENES, toy.CLASSES),
    "coco": (functools.partial(coco, "instances"), COCO_CLASSES)}


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


class PlainOnly(data.ArraysOnly):
    """Dicts, lists, strings and numbers: these need no class, so none is allowed."""
    allowed = {}


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
        content = PlainOnly(file, encoding="latin1").load()
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
        raise data.missing("cue-conflict", folder, LAYOUT)
    pairs = []
    for path in paths:                      # some copies put a number and more in front
        pair = re.search(r"(?:^|_)([a-z]+)\d+-([a-z]+)\d+\.png$", os.path.basename(path).lower())
        if not pair or not set(pair.groups()) <= set(SHAPES):
            raise ValueError(f"{path} is not named <shape><i>-<texture><j>.png, like "
                             f"cat7-dog3.png, with two of {', '.join(SHAPES)}")
        pairs.append([SHAPES.index(word) for word in pair.groups()])
    shapes, textures = torch.tensor(pairs).unbind(1)
    return SimpleNamespace(paths=paths, shapes=shapes, textures=textures, classes=list(SHAPES))
