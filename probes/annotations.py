"""Annotated data sets: keypoints, boxes, masks, label maps, videos, landmarks, cue conflicts.

    for item in annotations.keypoints("cub", root="/data", split="test"):
        item.image, item.points                # a KeypointImage, see below
    names = annotations.part_names("cub")      # names of the keypoints, in order
    for item in annotations.segmentation("ade20k", "/data", "test", level="object"):
        item.image, item.labels                # a SegmentationImage

Each function reads all data sets that have its kind of annotation, and yields the same type of item
for all of them: one item per image, read when the iterator reaches it. Data sets with one class per
image are in lib/datasets.py. Data sets are read in their official layout (annotation_files.LAYOUT);
nothing is downloaded. Coordinates are pixels of the stored image, x to the right and y down, as in
the annotation; boxes are x0, y0, x1, y1.

FileNotFoundError shows the expected layout and where to get the data set. ValueError: an unknown
data set or split, an annotation or image that cannot be read, a missing package (scipy reads .mat
files, pycocotools reads COCO's masks).
"""
import contextlib
import glob
import math
import os
import re
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import InterpolationMode, resize

from lib import datasets, toy, tree
from probes import label_maps, own_data
from probes.annotation_files import (
    COCO_CLASSES,
    COCO_IDS,
    LAYOUT,
    check_inside,
    find_path,
    import_optional,
    list_prefixes,
    load_image,
    match_size,
    name_damaged_file,
    read_coco_json,
    read_ids,
    read_images,
    select_evenly,
    to_corners,
)

# --------------------------------------------------------------------------------------------------
# Items of the iterators


@dataclass(frozen=True)
class KeypointImage:
    """An image with keypoints of its objects (birds, persons, creatures)."""
    id: int                        # of the image in the data set
    image: torch.Tensor            # (3, height, width) uint8
    points: torch.Tensor           # (objects, parts, 3) float32 x, y, v; v: 0 not labeled,
    #                                1 occluded, 2 visible
    boxes: torch.Tensor            # (objects, 4) float32
    areas: torch.Tensor | None     # (objects,) float32, pixels of the masks; None: unknown
    crowd: torch.Tensor            # (objects,) bool: a region of many objects, without points


@dataclass(frozen=True)
class BoxImage:
    """An image with boxes. It may have no objects."""
    id: int                        # of the image in the data set
    image: torch.Tensor            # (3, height, width) uint8
    boxes: torch.Tensor            # (objects, 4) float32; some in COCO are less than a pixel wide
    labels: torch.Tensor           # (objects,) int64 from 0, in the order of `box_classes`
    areas: torch.Tensor            # (objects,) float32, pixels of the masks
    crowd: torch.Tensor            # (objects,) bool: a region of many objects, to ignore


@dataclass(frozen=True)
class MaskImage(BoxImage):
    """An image with masks. They may overlap: which object is in front is not annotated."""
    masks: torch.Tensor            # (objects, height, width) bool; a crowd has one mask


@dataclass(frozen=True)
class SegmentationImage:
    """An image with a class for every pixel."""
    id: int | str                  # number or name of the image in the data set
    image: torch.Tensor            # (3, height, width) uint8
    labels: torch.Tensor           # (height, width) uint8, in the order of `segmentation_classes`;
    #                                255: ignored in training and evaluation


class Frames:
    """The frames of a video, as a sequence that reads frames[t] from its file when it is used."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, t):
        return load_image(self.paths[t])


@dataclass(frozen=True)
class Video:
    """A sequence of frames with the masks of its objects."""
    name: str
    frames: Frames | torch.Tensor  # frames[t]: (3, height, width) uint8
    masks: torch.Tensor            # (frames, height, width) uint8: 0 background and void, then the
    #                                objects; an object may be absent in some frames
    objects: int                   # largest label in the first mask; objects that appear later
    #                                are not counted


@dataclass(frozen=True)
class Landmarks:
    """Queries and a database of images of landmarks. Lists of indices may be empty."""
    database: list                 # paths
    queries: list                  # 70 paths
    boxes: torch.Tensor            # (queries, 4) float32, of the landmark in the query
    easy: list                     # for each query an int64 tensor of database indices
    hard: list
    junk: list


@dataclass(frozen=True)
class CueConflict:
    """Images with the shape of one object and the texture of another."""
    images: datasets.Images
    shapes: torch.Tensor           # (images,) int64, indices of classes
    textures: torch.Tensor         # (images,) int64
    classes: list                  # 16 names, the same for shapes and textures


# --------------------------------------------------------------------------------------------------
# The kinds of annotation


def keypoints(name, root=None, split="test", limit=None, size=256):
    """Iterator of KeypointImage, of the images with any keypoint.

    split: train or test (val is the same); for cub and folders also None, all images. limit:
    number of images, the first of toy, evenly spaced ones of files. size: side of toy images in
    pixels; parts are close together in small ones.
    """
    reader, split = find_reader(name, split, KEYPOINTS, "keypoints")
    return reader(root, split, limit, size)


def part_names(name):
    """Names of the keypoints, in order, with _ for spaces. left and right are as seen by the animal
    or person."""
    return list(KEYPOINTS[name][1]) if name in KEYPOINTS else find_own(name, "keypoints").parts


def boxes(name, root=None, split="test", limit=None, size=256, order=None):
    """Iterator of BoxImage. split, limit, size: as in `keypoints`; order: as in `masks`."""
    reader, split = find_reader(name, split, BOXES, "boxes")
    return reader(root, split, limit, size, order)


def box_classes(name):
    """Names in the order of the labels. COCO has 80: its ids 1 ... 90 without the gaps."""
    return list(BOXES[name][1]) if name in BOXES else find_own(name, "boxes").classes


def find_own(folder, what):
    """Annotated objects in a folder (own_data.Objects). ValueError: it has none of these."""
    find_reader(folder, "train", {}, what)
    return own_data.find_objects(folder, what)["train"]


def has(what, name):
    """Whether a data set, or the folder of that path, has "segmentation", "keypoints", "boxes" or
    "masks"."""
    return name in READERS[what] or os.path.isdir(name) and own_data.has(name, what)


def has_masks(name):
    """Whether a data set has masks of objects that are not made from label maps, and a folder no
    label maps, which all tasks prefer."""
    return name in MASKS or (os.path.isdir(name) and not own_data.find_label_maps(name)
                             and own_data.has(name, "masks"))


def objects_are_boxes(name):
    """Whether the objects of a data set, to be retrieved, are boxes; else they are whole images."""
    return name in ("coco", "toy-scenes") or name not in BOXES and has("boxes", name)


def masks(name, root=None, split="test", limit=None, size=256, order=None):
    """Iterator of MaskImage. split, limit, size: as in `keypoints`.

    order: a function (number of images) -> indices of those to read, in their order.
    """
    reader, split = find_reader(name, split, MASKS, "masks")
    return reader(root, split, limit, size, order)


def segmentation(name, root=None, split="test", limit=None, level=None, size=256):
    """Iterator of SegmentationImage. split, limit, size: as in `keypoints`.

    level: the set of classes; default: the first one of the data set:
      toy, toy-scenes  object (16 creatures and background), part (9)
      ade20k           scene (150), object (the 59 that have parts), part (209: see
                       label_maps.load_ade20k_parts)
      pascal           object (16), part (193); the other classes of VOC are ignored
      voc              object (20 and background); train: the 10,582 images with SBD's labels
      lip              part (19), scene (the same and background)
      cityscapes       scene (19)
      coco             object (80 and background; crowds ignored), scene (80 things, 91 stuff)
    """
    reader, split = find_reader(name, split, SEGMENTATION, "segmentation")
    return reader(check_level(name, level), root, split, limit, size)


def segmentation_classes(name, level=None, root=None):
    """Names in the order of the labels. Level part of ade20k needs root, as its parts are
    counted."""
    find_reader(name, "test", SEGMENTATION, "segmentation")
    if name not in SEGMENTATION:
        check_level(name, level)
        maps = own_data.find_label_maps(name)
        classes = maps.classes if maps else ["background", *find_own(name, "masks").classes]
        if len(classes) > 255:                           # 255: ignored
            raise ValueError(f"{name} has {len(classes)} classes, and label maps have at most 255")
        return list(classes)
    classes = SEGMENTATION[name][1][check_level(name, level)]
    if classes is None:
        return [part for _, part in label_maps.load_ade20k_parts(root)]
    return list(classes)


def videos(name, root=None, split="test", limit=None, size=256):
    """Iterator of Video: davis, or toy and toy-scenes, whose creatures walk.

    split, limit, size: as in `keypoints`.
    """
    reader, split = find_reader(name, split, VIDEOS, "videos")
    return reader(root, split, limit, size)


def landmarks(name, root=None):
    """Landmarks of Revisited Oxford and Paris (Radenovic et al., 2018), roxford5k and rparis6k.

    The images are not checked: the lists define the set.
    """
    if name not in ("roxford5k", "rparis6k"):
        raise ValueError(f"no landmarks of {name!r} here: choose roxford5k, rparis6k or toy")
    path = find_path(name, root, f"{name}/gnd_{name}.pkl", f"gnd_{name}.pkl")
    folder = find_path(name, root, f"{name}/jpg", "jpg")
    with name_damaged_file(name, path), open(path, "rb") as file:
        content = datasets.ArraysOnly(file, encoding="latin1").load()
        truth = content["gnd"]
        database, queries = ([os.path.join(folder, f"{image}.jpg") for image in content[key]]
                             for key in ("imlist", "qimlist"))
        lists = {key: [torch.tensor(query[key], dtype=torch.int64) for query in truth]
                 for key in ("easy", "hard", "junk")}
        index = torch.cat(sum(lists.values(), []))
        if len(truth) != len(queries) or not ((0 <= index) & (index < len(database))).all():
            raise ValueError("the ground truth does not match the lists of images")
        boxes = torch.tensor([query["bbx"] for query in truth], dtype=torch.float32)
        return Landmarks(database, queries, boxes.view(len(truth), 4), **lists)


SHAPES = """airplane bear bicycle bird boat bottle car cat chair clock dog elephant keyboard knife
oven truck""".split()


def cue_conflict(name, root=None, limit=None, size=64):
    """The CueConflict for a classifier of toy or imagenet. limit, size: of toy, as in `keypoints`.

    toy: the test images, but the creature wears the typical pattern of another class.
    imagenet: those of Geirhos et al. (2019): cat7-dog3.png is a cat with a dog's texture. Images in
    which both are equal (80 of 1,280) have no conflict and are not scored.
    """
    if name == "toy":
        parts = [toy.draw(index, "test", size, cue_conflict=True)
                 for index in torch.arange(limit or toy.NUM_IMAGES["test"]).split(256)]
        pixels, shapes, patterns = (torch.cat([part[key] for part in parts])
                                    for key in ("image", "label", "pattern"))
        return CueConflict(datasets.Images("cue-conflict", "test", pixels=pixels), shapes, patterns,
                           list(toy.CLASSES))
    if name != "imagenet":
        raise ValueError(f"no cue-conflict images of {name!r} here, which shape_bias needs: choose "
                         f"--data toy, or imagenet with all of its classes")
    folder = find_path("cue-conflict", root, "cue-conflict", "cue_conflict",
                       "style-transfer-preprocessed-512",
                       "stimuli/style-transfer-preprocessed-512")
    paths = [path for path in tree.list_images(folder)[0] if path.lower().endswith(".png")]
    if not paths:
        raise datasets.missing_error("cue-conflict", folder, LAYOUT)
    pairs = []
    for path in paths:                      # names have a prefix with a number in some copies
        pair = re.search(r"(?:^|_)([a-z]+)\d+-([a-z]+)\d+\.png$", os.path.basename(path).lower())
        if not pair or not set(pair.groups()) <= set(SHAPES):
            raise ValueError(f"{path} is not named <shape><i>-<texture><j>.png, like "
                             f"cat7-dog3.png, with two of {', '.join(SHAPES)}")
        pairs.append([SHAPES.index(name) for name in pair.groups()])
    shapes, textures = torch.tensor(pairs).unbind(1)
    images = datasets.Images("cue-conflict", "test", paths=paths)
    return CueConflict(images, shapes, textures, list(SHAPES))


def find_reader(name, split, readers, what):
    """-> the reader of a data set, and the split as train, test or None. ValueError: `readers` has
    no such data set, or there is no such split."""
    own = name not in readers and os.path.isdir(name)
    if own:
        if what not in OWN_READERS:
            raise ValueError(f"no {what} are read from own folders: choose {', '.join(readers)}")
        if not own_data.has(name, what):
            boxes = "; with boxes alone: detection, object_retrieval" * (what == "segmentation")
            raise ValueError(f"no {what} in {name}: docs/own-data.md shows which files are "
                             f"read{boxes}")
        readers = {name: (partial(OWN_READERS[what], name),)}
    if name not in readers:
        raise ValueError(f"no {what} of {name!r} here: choose {' or '.join(readers)}"
                         + " or a folder (docs/own-data.md)" * (what in OWN_READERS))
    split = "test" if split == "val" else split
    if split not in ("train", "test") and not (split is None and (own or name == "cub")):
        raise ValueError(f"no split {split!r} of {name}: choose train or test")
    return readers[name][0], split


def check_level(name, level):
    if name not in SEGMENTATION:
        if level:
            raise ValueError(f"{name} has one list of classes: leave out --level")
        return None
    levels = list(SEGMENTATION[name][1])
    if level not in (None, *levels):
        raise ValueError(f"no level {level!r} of {name}: choose {' or '.join(levels)}")
    return level or levels[0]


# --------------------------------------------------------------------------------------------------
# Readers: keypoints, boxes and masks


def read_toy(kind, scenes, root, split, limit, size, order=None):
    """toy, toy-scenes. Creatures that are not visible at all are left out."""
    ids = select_evenly(range(limit or toy.NUM_IMAGES[split]), None, order)
    for index in torch.tensor(ids, dtype=torch.int64).split(64):
        out = toy.draw(index, split, size, scenes, annotate=True)
        creature = torch.arange(1, out["classes"].shape[1] + 1)[:, None, None]
        masks = out["instances"][:, None] == creature              # (B, creatures, S, S)
        areas = masks.sum((2, 3)).float()
        for i, image_id in enumerate(index.tolist()):
            seen = out["classes"][i] >= 0
            values = dict(
                id=image_id, image=out["image"][i], points=out["keypoints"][i, seen],
                boxes=out["boxes"][i, seen], areas=areas[i, seen], labels=out["classes"][i, seen],
                masks=masks[i, seen], crowd=torch.zeros(int(seen.sum()), dtype=torch.bool))
            yield kind(**{field.name: values[field.name] for field in fields(kind)})


CUB_PARTS = """back beak belly breast crown forehead left_eye left_leg left_wing nape right_eye
right_leg right_wing tail throat""".split()


def read_cub(root, split, limit, size):
    """CUB-200-2011 (Wah et al., 2011): one bird per image. Areas are unknown."""
    files = "images.txt", "train_test_split.txt", "bounding_boxes.txt", "parts/part_locs.txt"
    paths = [find_path("cub", root, f"CUB_200_2011/{file}", file) for file in files]
    images, trains, boxes, parts = (read_rows("cub", path) for path in paths)
    folder = os.path.dirname(paths[0])
    with name_damaged_file("cub", folder) as place:
        chosen = []
        for number in images:
            place["image"] = number
            if split is None or trains[number] == [["1" if split == "train" else "0"]]:
                chosen.append(number)

    def parse():
        """-> path, number, keypoints and box of each bird."""
        for number in select_evenly(chosen, limit):
            with name_damaged_file("cub", folder) as place:
                place["image"] = number
                [[file]], [box] = images[number], boxes[number]
                point = {int(part): [float(x), float(y), 2 * int(visible)]
                         for part, x, y, visible in parts[number]}
                points = torch.tensor([[point[i + 1] for i in range(len(CUB_PARTS))]])
                box = to_corners([[float(side) for side in box]])
            yield os.path.join(folder, "images", file), number, points, box

    for image, path, number, points, box in read_images("cub", parse()):
        corner = torch.cat([box[:, 2:], points[0, :, :2]]).amax(0)
        check_inside(path, image.shape[2], image.shape[1], *corner.tolist())
        yield KeypointImage(number, image, points, box, areas=None,
                            crowd=torch.zeros(1, dtype=torch.bool))


def read_rows(name, path):
    """A text file of lines `number word ...` -> {number: [words of a line, of the next, ...]}."""
    rows = {}
    with name_damaged_file(name, path) as place, open(path, encoding="utf-8") as lines:
        for line, words in enumerate(map(str.split, lines), 1):
            place["line"] = line
            if words:
                rows.setdefault(int(words[0]), []).append(words[1:])
    return rows


COCO_PARTS = """nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow
right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle
right_ankle""".split()
LABELS = {number: label for label, number in enumerate(COCO_IDS)}      # 1 ... 90 -> 0 ... 79


def read_coco(kind, root, split, limit, size, order=None):
    """COCO 2017 (Lin et al., 2014), crowds included. kind: KeypointImage, BoxImage or MaskImage."""
    require_pycocotools(kind)
    path, folder = find_coco_files(root, split, kind is KeypointImage)
    rows, _ = read_coco_json(path)
    rows = [(os.path.join(folder, name), *rest) for name, *rest in rows]
    objects = own_data.Objects("coco", path, rows, LABELS, COCO_CLASSES, COCO_PARTS, True)
    yield from read_objects(kind, objects, limit, order)


def find_coco_files(root, split, people):
    """Paths of the annotations of persons or of all objects, and of the folder of images."""
    year = {"train": "train2017", "test": "val2017"}[split]
    path = find_path("coco", root, *(
        f"{at}annotations/{'person_keypoints' if people else 'instances'}_{year}.json"
        for at in ("coco/", "")))
    return path, find_path("coco", root, *(at + year for at in (
        "coco/", "", "coco/images/", "images/")))


def find_coco_split(root):
    """The split of COCO whose keypoints are there: train, else test, else train."""
    for split in ("train", "test"):
        with contextlib.suppress(FileNotFoundError):
            find_coco_files(root, split, people=True)
            return split
    return "train"


def read_own_objects(kind, what, folder, root, split, limit, size, order=None):
    """COCO's JSON or VOC's XML in a folder, see probes/own_data.py. split None: all images."""
    objects = own_data.find_objects(folder, what)
    chosen = objects[split] if split else replace(
        objects["train"], path=folder, rows=objects["train"].rows + objects["test"].rows)
    yield from read_objects(kind, chosen, limit, order)


def read_objects(kind, objects, limit, order):
    """Items of one kind from annotated objects (own_data.Objects)."""
    require_pycocotools(kind)
    parse, rows = partial(parse_coco, objects), objects.rows
    if kind is KeypointImage:               # images without keypoints, half of COCO, are not read
        rows = [row for row in rows if any(parse(row, count_keypoints))]
    items = ((row[0], row) for row in select_evenly(rows, limit, order))
    for image, path, row in read_images(objects.name, items):
        _, about, annotations = row
        image = match_size(objects.name, image, path, about.get("width"), about.get("height"))
        shape, n = image.shape[1:], len(annotations)
        values = dict(
            boxes=torch.cat([to_corners([]), *parse(row, lambda a: to_corners([a["bbox"]]))]),
            areas=torch.tensor(parse(row, lambda a: float(a["area"]))),
            crowd=torch.tensor(parse(row, lambda a: bool(a["iscrowd"])), dtype=torch.bool))
        if kind is KeypointImage:
            values["points"] = torch.stack(parse(row, read_points, len(objects.parts)))
        else:
            values["labels"] = torch.tensor(
                parse(row, lambda a: objects.labels[a["category_id"]]), dtype=torch.int64)
        if kind is MaskImage:
            found = parse(row, lambda a, shape=shape: decode_mask(a["segmentation"], shape))
            values["masks"] = torch.stack(found or [torch.zeros(shape, dtype=torch.bool)])[:n]
        yield kind(id=about["id"], image=image, **values)


def require_pycocotools(kind):
    if kind is MaskImage:
        import_optional("pycocotools.mask", "masks of COCO are polygons and run lengths")


def parse_coco(objects, row, function, *rest):
    """-> function(annotation, *rest) of each annotation of an image, a row of own_data.Objects. An
    error names file, image and annotation."""
    values = []
    with name_damaged_file(objects.name, objects.path) as place:
        place["image"] = os.path.basename(row[0])
        for annotation in row[2]:
            place["annotation"] = annotation.get("id")
            values.append(function(annotation, *rest))
    return values


def count_keypoints(annotation):
    """Number of labeled keypoints; an annotation may have none."""
    return sum(v > 0 for v in (annotation.get("keypoints") or [])[2::3])


def read_points(annotation, n_parts):
    """-> (parts, 3) float32; zeros for an object without keypoints."""
    points = annotation.get("keypoints") or [0] * 3 * n_parts
    return torch.tensor(points, dtype=torch.float32).view(n_parts, 3)


def decode_mask(segmentation, shape):
    """Polygons (the mask is their union) or run lengths -> (height, width) bool, by pycocotools.

    ValueError for what pycocotools accepts but reads incorrectly: an odd number of coordinates, run
    lengths that do not cover the image.
    """
    from pycocotools import mask
    if isinstance(segmentation, list):
        if not segmentation or any(len(line) < 6 or len(line) % 2 for line in segmentation):
            raise ValueError("a polygon without three corners of x and y: delete this annotation")
        segmentation = mask.merge(mask.frPyObjects(segmentation, *shape))
    elif list(segmentation["size"]) != list(shape):
        raise ValueError(f"a mask of {segmentation['size']} on an image of {list(shape)}")
    elif isinstance(segmentation["counts"], list):
        if min(segmentation["counts"]) < 0 or sum(segmentation["counts"]) != math.prod(shape):
            raise ValueError("run lengths that do not add up to the image")
        segmentation = mask.frPyObjects(segmentation, *shape)
    return torch.from_numpy(mask.decode(segmentation)).bool()


# --------------------------------------------------------------------------------------------------
# Readers: label maps


def read_label_maps(name, list_files, level, root, split, limit, size):
    """A data set with one annotation file per image. list_files: as in probes/label_maps.py."""
    items, read = list_files(level, root, split)
    if not items:
        raise datasets.missing_error(name, datasets.root_of(root), LAYOUT)
    items = ((path, id, annotation) for id, path, annotation in select_evenly(items, limit))
    for image, path, id, annotation in read_images(name, items):
        with name_damaged_file(name, annotation):
            labels = torch.from_numpy(read(annotation, image.shape[1:]))
        if name not in LAYOUT:                                     # your own data
            image = match_size(name, image, path, *labels.shape[::-1])
        with name_damaged_file(name, annotation):
            if labels.shape != image.shape[1:]:
                raise ValueError(f"labels for {list(labels.shape)} pixels of an image of "
                                 f"{list(image.shape[1:])}")
        if name == "ade20k-full" and min(labels.shape) > 512:      # as for the 150 classes
            shape = [math.ceil(side * 512 / min(labels.shape)) for side in labels.shape]
            image = resize(image, shape, InterpolationMode.BICUBIC, antialias=True)
            labels = resize(labels[None], shape, InterpolationMode.NEAREST_EXACT)[0]
        yield SegmentationImage(id, image, labels)


def read_ade20k_maps(level, *rest):
    if level == "part":
        return read_label_maps("ade20k-full", label_maps.list_ade20k_full, level, *rest)
    return read_label_maps("ade20k", label_maps.list_ade20k, level, *rest)


def read_coco_maps(level, root, split, limit, size):
    """Level object is made from the masks."""
    if level == "scene":
        yield from read_label_maps("coco", label_maps.list_coco_stuff, level, root, split, limit,
                                   size)
        return
    yield from draw_label_maps(read_coco(MaskImage, root, split, limit, size))


def read_own_maps(folder, level, root, split, limit, size):
    """Label maps in a folder, else made from its masks, see probes/own_data.py."""
    if own_data.find_label_maps(folder):
        yield from read_label_maps(folder, partial(own_data.list_label_maps, folder), level, root,
                                   split, limit, size)
        return
    yield from draw_label_maps(read_own_objects(MaskImage, "masks", folder, root, split, limit,
                                                size))


def draw_label_maps(items):
    """MaskImage -> SegmentationImage: 0 background, then the classes. Drawn in this order: crowds
    (label 255), then objects from large to small."""
    for item in items:
        labels = torch.zeros(item.image.shape[1:], dtype=torch.uint8)
        labels[item.masks[item.crowd].any(0)] = 255
        for k in item.areas.argsort(descending=True, stable=True).tolist():
            if not item.crowd[k]:
                labels[item.masks[k]] = int(item.labels[k]) + 1
        yield SegmentationImage(item.id, item.image, labels)


def read_toy_maps(scenes, level, root, split, limit, size):
    """toy, toy-scenes. At level part the background is ignored: only parts are compared."""
    for index in torch.arange(limit or toy.NUM_IMAGES[split]).split(64):
        out = toy.draw(index, split, size, scenes, annotate=True)
        labels = out["semantic"] if level == "object" else out["parts"] - 1     # uint8: 0 -> 255
        for image_id, image, label in zip(index.tolist(), out["image"], labels):
            yield SegmentationImage(image_id, image, label)


# --------------------------------------------------------------------------------------------------
# Readers: videos


def read_davis(root, split, limit, size):
    """DAVIS-2017 (Pont-Tuset et al., 2017), 480p, semi-supervised."""
    part = "train" if split == "train" else "val"
    lists = find_path("davis", root, *(f"{at}ImageSets/2017/{part}.txt" for at in list_prefixes(
        "DAVIS", "davis", "DAVIS-2017-trainval-480p/DAVIS")))
    top = lists[:-len(f"ImageSets/2017/{part}.txt")]
    for name in select_evenly(read_ids("davis", lists), limit):
        images = sorted(glob.glob(os.path.join(
            glob.escape(os.path.join(top, "JPEGImages", "480p", name)), "*.jpg")))
        labels = sorted(glob.glob(os.path.join(
            glob.escape(os.path.join(top, "Annotations", "480p", name)), "*.png")))
        with name_damaged_file("davis", os.path.join(top, "Annotations", "480p", name)):
            if not images or [os.path.basename(path)[:-4] for path in images] != [
                    os.path.basename(path)[:-4] for path in labels]:
                raise ValueError(f"{len(images)} frames and {len(labels)} annotations whose names "
                                 "do not match")
            masks = np.stack([label_maps.read_label_image(path) for path in labels])
            for path in images:
                with contextlib.suppress(OSError), Image.open(path) as image:    # only the header
                    if image.size != masks.shape[:0:-1]:
                        raise ValueError(f"{os.path.basename(path)} has size {image.size}, its "
                                         f"annotation {masks.shape[:0:-1]}")
        masks[masks == 255] = 0
        yield Video(name, Frames(images), torch.from_numpy(masks), objects=int(masks[0].max()))


def read_toy_videos(scenes, root, split, limit, size):
    """toy, toy-scenes. The objects are the creatures in the first frame, numbered from 1."""
    for index in range(limit or 30):                               # 30: as many as DAVIS has
        video = toy.video(torch.tensor([index]), 24, split, size, scenes)
        masks = video["instances"][0]
        label_of = torch.zeros(256, dtype=torch.uint8)             # 0: creatures that appear later
        for label, creature in enumerate(masks[0][masks[0] > 0].unique().tolist(), 1):
            label_of[creature] = label
        masks = label_of[masks.long()]
        yield Video(f"{split}-{index}", video["image"][0], masks, objects=int(masks[0].max()))


# --------------------------------------------------------------------------------------------------
# Readers and names of the data sets

TOY = {"toy": False, "toy-scenes": True}                   # data set: are there several creatures?
KEYPOINTS = {                                              # data set: reader, names of the parts
    **{name: (partial(read_toy, KeypointImage, scenes), toy.PARTS) for name, scenes in TOY.items()},
    "cub": (read_cub, CUB_PARTS),
    "coco": (partial(read_coco, KeypointImage), COCO_PARTS)}
BOXES = {                                                  # data set: reader, names of the classes
    **{name: (partial(read_toy, BoxImage, scenes), toy.CLASSES) for name, scenes in TOY.items()},
    "coco": (partial(read_coco, BoxImage), COCO_CLASSES)}
MASKS = {
    **{name: (partial(read_toy, MaskImage, scenes), toy.CLASSES) for name, scenes in TOY.items()},
    "coco": (partial(read_coco, MaskImage), COCO_CLASSES)}
SEGMENTATION = {                                           # data set: reader, {level: classes}
    **{name: (partial(read_toy_maps, scenes),
              {"object": ["background", *toy.CLASSES], "part": toy.PARTS})
       for name, scenes in TOY.items()},
    "ade20k": (read_ade20k_maps, {
        "scene": label_maps.ADE,
        "object": [label_maps.ADE[number - 1] for [number], _ in label_maps.ADE_OBJECTS],
        "part": None}),                                    # see label_maps.load_ade20k_parts
    "pascal": (partial(read_label_maps, "pascal", label_maps.list_pascal),
               {"object": list(label_maps.PASCAL_PARTS), "part": label_maps.PASCAL_CLASSES}),
    "voc": (partial(read_label_maps, "voc", label_maps.list_voc), {"object": label_maps.VOC}),
    "lip": (partial(read_label_maps, "lip", label_maps.list_lip),
            {"part": label_maps.LIP[1:], "scene": label_maps.LIP}),
    "cityscapes": (partial(read_label_maps, "cityscapes", label_maps.list_cityscapes),
                   {"scene": list(label_maps.CITYSCAPES)}),
    "coco": (read_coco_maps, {"object": ["background", *COCO_CLASSES],
                              "scene": COCO_CLASSES + label_maps.STUFF})}
VIDEOS = {                                                 # data set: reader
    **{name: (partial(read_toy_videos, scenes),) for name, scenes in TOY.items()},
    "davis": (read_davis,)}
READERS = dict(keypoints=KEYPOINTS, boxes=BOXES, masks=MASKS, segmentation=SEGMENTATION)
OWN_READERS = {                                            # of a folder of your own data
    "keypoints": partial(read_own_objects, KeypointImage, "keypoints"),
    "boxes": partial(read_own_objects, BoxImage, "boxes"),
    "masks": partial(read_own_objects, MaskImage, "masks"),
    "segmentation": read_own_maps}
