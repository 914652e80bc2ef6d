"""Files of annotated data sets: their paths, and how they are opened.

    path = find_path("coco", root, "coco/annotations/instances_val2017.json")
    with name_damaged_file("coco", path), open(path) as file:      # any error names path and layout
        content = json.load(file)
    for image, label in read_images("coco", items):    # of (path, label): those that can be read

Shared by probes/annotations.py and probes/label_maps.py.
"""
import importlib
import json
from contextlib import contextmanager
from functools import lru_cache

import torch
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resize

from lib import datasets

LAYOUT = {                                  # expected files, and where to get them
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

OWN_LAYOUT = "what docs/own-data.md describes"

COCO_CLASSES = [name.replace("_", " ") for name in """person bicycle car motorcycle airplane bus
train truck boat traffic_light fire_hydrant stop_sign parking_meter bench bird cat dog horse sheep
cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard
sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass
cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake
chair couch potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone
microwave oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier
toothbrush""".split()]
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def find_path(name, root, *places):
    """The first of the places under root that exists. root None: $DATA_ROOT, else "datasets".

    FileNotFoundError names the expected layout.
    """
    return datasets.find(name, datasets.root_of(root), *places, layouts=LAYOUT)


def list_prefixes(*folders):
    """Path prefixes of a data set under the root: one of these folders, or the root itself ("")."""
    return [f"{folder}/" for folder in folders] + [""]


@contextmanager
def name_damaged_file(name, path):
    """Turns any error inside into a ValueError that names the annotation file and the layout.

    Yields a dict, to which the code inside adds the item that it reads, such as
    place["annotation"] = 7: the message names it."""
    place = {}
    try:
        yield place
    except Exception as error:              # damaged files can raise any exception
        item = ", ".join(f"{kind} {which}" for kind, which in place.items())
        known = name in LAYOUT
        raise ValueError(f"{path} is damaged or does not have the format of "
                         f"{name if known else 'annotated data'} "
                         f"({item}{': ' * bool(item)}{type(error).__name__}: {error}): expected "
                         f"{LAYOUT[name][0] if known else OWN_LAYOUT}") from None


def load_image(path):
    """-> (3, height, width) uint8 RGB, not turned by EXIF, as annotations count stored pixels.
    UnreadableImage, a ValueError, names a file that cannot be read."""
    try:
        return pil_to_tensor(datasets.read_image(path, upright=False))
    except Exception as error:              # a damaged file can raise any exception
        raise datasets.UnreadableImage(f"cannot read {path}: {error}; restore the file") from error


def read_images(name, items):
    """(path, ...) of each image -> (image (3, height, width) uint8, path, ...) of those that can be
    read. The others are listed on stderr at the end. UnreadableImage: more than half of them."""
    bad, seen = {}, 0
    try:
        for path, *rest in items:
            seen += 1
            try:
                image = load_image(path)
            except datasets.UnreadableImage as error:
                bad[path] = str(error.__cause__)
                continue
            yield image, path, *rest
    finally:                                # also if only some images are taken
        datasets.report_unreadable(name, bad, seen)
    datasets.check_readable(name, bad, seen)


def match_size(name, image, path, width, height):
    """The image at the width and height of its annotation (None: unknown).

    Annotation tools show photos upright: if only the upright image fits, it is taken. An image that
    was resized on disk is resized back, so that coordinates and areas fit. ValueError: the
    proportions differ."""
    if None in (width, height) or image.shape[1:] == (height, width):
        return image
    upright = pil_to_tensor(datasets.read_image(path))
    if upright.shape[1:] == (height, width):
        return upright
    for x in (image, upright):
        h, w = x.shape[1:]
        if abs(w * height - h * width) <= width + height:            # sides are rounded to pixels
            datasets.print_once(f"note: images of {name} have another size on disk than in their "
                                f"annotation: they are resized to that of the annotation")
            return resize(x, [height, width], InterpolationMode.BICUBIC, antialias=True)
    raise ValueError(f"{path} has {image.shape[2]} x {image.shape[1]} pixels and its annotation "
                     f"{width} x {height}, other proportions: restore the original image")


def check_inside(path, width, height, x, y):
    """ValueError if the annotation extends to (x, y), clearly outside of the image."""
    if x > 1.1 * width or y > 1.1 * height:
        raise ValueError(f"{path} has {width} x {height} pixels, but its annotation extends to "
                         f"x {x:.0f}, y {y:.0f}: was it resized? restore the original image")


def read_ids(name, path):
    """The first word of each line of a text file."""
    with name_damaged_file(name, path), open(path, encoding="utf-8") as lines:
        return [words[0] for words in map(str.split, lines) if words]


@lru_cache(maxsize=2)                       # hundreds of megabytes: parsed once
def read_coco_json(path, name="coco"):
    """-> [(file name, its entry in `images`, its annotations), ...] for each image of instances or
    keypoints, sorted by file name as in datasets.load_images, so that --limit takes the same images
    as there (except of keypoints, where images without any are left out first); and categories."""
    with name_damaged_file(name, path) as place, open(path, encoding="utf-8") as file:
        content, rows = json.load(file), {}
        for number, image in enumerate(content["images"], 1):
            place["image number"] = number
            rows[image["id"]] = str(image["file_name"]), image, []
        place.clear()
        for annotation in content["annotations"]:
            place["annotation"] = annotation.get("id")
            rows[annotation["image_id"]][2].append(annotation)
        place.clear()
        return sorted(rows.values(), key=lambda row: row[0]), content.get("categories", [])


def import_optional(module, what):
    """Imports a module of an optional package. ValueError: how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise ValueError(f"{what}, which {package} reads: pip install {package}") from None


def select_evenly(items, limit, order=None):
    """`limit` evenly spaced items of a list (None: all), because lists are often sorted by class.

    order: a function (number of selected items) -> indices of those to take, in their order.
    """
    n = len(items)
    if limit is not None and limit < n:
        items = [items[i * n // limit] for i in range(limit)]
    return items if order is None else [items[i] for i in order(len(items))]


def to_corners(boxes):
    """Rows of x, y, width, height -> (objects, 4) float32 x0, y0, x1, y1."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(len(boxes), 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
