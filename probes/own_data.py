"""Your own annotated data, as the path of a folder: label maps, boxes, masks and keypoints.

    maps = find_label_maps("/data/camvid")               # None: there are none
    maps.items["train"], maps.classes, maps.read         # see LabelMaps
    objects = find_objects("/data/herd", "boxes")        # of a COCO JSON or VOC XML files, or None
    objects["test"].rows, objects["test"].classes        # see Objects

docs/own-data.md has the rules. What is found is printed once. ValueError: names that do not match,
ambiguous splits or classes, files that cannot be read.
"""
import glob
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import lru_cache

from lib import datasets, tree
from probes.annotation_files import (
    check_inside,
    name_damaged_file,
    read_coco_json,
    select_evenly,
)
from probes.label_maps import make_label_reader, read_label_image

CLASS_FILES = ("classes.txt", "class_names.txt", "codes.txt")
NOT_CLASSES = ("void", "ignore", "ignored", "unlabeled", "unlabelled")      # have label 255
OTHER_JSON = ("captions", "panoptic", "stuff")           # of COCO: no boxes of objects


@dataclass(frozen=True)
class LabelMaps:
    """Images with a label map. items: {"train", "test": [(name, path, path of the label map)]};
    read: as in probes/label_maps.py."""
    items: dict
    classes: list
    read: object


@dataclass(frozen=True)
class Objects:
    """Annotated objects of a split, as read by annotations.read_objects."""
    name: str                      # of the data set in messages
    path: str                      # of the annotations
    rows: list                     # (path of the image, its entry, its annotations), as in COCO
    labels: dict                   # {category_id: label from 0}
    classes: list                  # names, in the order of the labels
    parts: list                    # names of the keypoints; []: there are none
    masks: bool                    # whether every object has a mask


def has(folder, what):
    """Whether a folder has "segmentation", "masks", "boxes" or "keypoints"."""
    if what == "segmentation" and find_label_maps(folder):
        return True
    objects = find_objects(folder, what)
    return bool(objects) and {"boxes": True, "keypoints": bool(objects["train"].parts)}.get(
        what, objects["train"].masks)


# --------------------------------------------------------------------------------------------------
# Label maps


@lru_cache(maxsize=4)
def find_label_maps(folder):
    """The LabelMaps of a folder; None if it has none. tree.pair_label_maps tells which files belong
    together."""
    paths, _ = tree.list_images(folder)
    relative = [os.path.relpath(path, folder) for path in paths]
    images, labels = tree.pair_label_maps(relative)
    if not images or not labels:
        return None
    if len(images) + len(labels) < len(relative):
        twice = sorted({*relative} - {*images.values(), *labels.values()})
        raise ValueError(f"{folder} has two files for one image or label map: {twice[0]} and one "
                         "that differs in ending or folder only; remove one of them")
    both = sorted(images.keys() & labels.keys())
    if not both:
        raise ValueError(f"no label map in {folder} has the name of an image, see "
                         f"{min(images.values())} and {min(labels.values())}: give both the same "
                         "name")
    if lossy := [labels[key] for key in both
                 if labels[key].lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif"))]:
        raise ValueError(f"{os.path.join(folder, lossy[0])} is a JPEG file, which changes the "
                         "numbers of a label map: save it as PNG")
    keys, source = split_keys(folder, both, ("", "ImageSets/Segmentation"))
    items = {split: [(key, *(os.path.join(folder, paths[key]) for paths in (images, labels)))
                     for key in keys[split]] for split in keys}
    names, file = read_class_names(folder, [path for part in items.values() for *_, path in part])
    numbers = [number for number, name in names.items() if name.lower() not in NOT_CLASSES]
    table = dict.fromkeys(names, 255) | {number: i for i, number in enumerate(numbers)} | {255: 255}
    classes = [names[number] for number in numbers]
    if len(classes) < 2:
        raise ValueError(f"the label maps in {folder} have only {len(classes)} class ({file}), and "
                         f"probes need two, of which one may be the background")
    report(folder, f"{len(items['train']):,} training and {len(items['test']):,} test images with "
           f"a label map ({source}); {len(classes)} classes ({file}): {tree.list_names(classes)}")
    for what, some, others in (("images without a label map", images, labels),
                               ("label maps without an image", labels, images)):
        if alone := sorted(some[key] for key in some.keys() - others.keys()):
            report(folder, f"not used: {len(alone):,} {what}: {tree.list_names(alone, 3)}")
    return LabelMaps(items, classes, make_label_reader(table))


def list_label_maps(folder, level, root, split):
    """Items and reader of a split, as the functions of probes/label_maps.py return them."""
    maps = find_label_maps(folder)
    return maps.items[split], maps.read


def read_class_names(folder, label_paths):
    """-> {number in the label maps: name}, and where the names are from: a line of classes.txt for
    each number from 0, or lines of number and name; without the file the numbers that occur.
    ValueError: an empty line, a number that is missing, twice or above 254; masks of 0 and 255."""
    sample = set()
    for path in select_evenly(label_paths, 20):
        with name_damaged_file(folder, path):
            sample |= set(read_label_image(path).ravel().tolist())
    if 255 in sample and sample <= {0, 255}:
        raise ValueError(f"the label maps in {folder} contain only 0 and 255, and 255 means that a "
                         "pixel is ignored: save the object as 1")
    file = next((file for file in CLASS_FILES if os.path.isfile(os.path.join(folder, file))), None)
    if not file:
        numbers = set()
        for path in label_paths:
            with name_damaged_file(folder, path):
                numbers |= set(read_label_image(path).ravel().tolist())
        return ({number: f"class {number}" for number in range(max(numbers - {255}) + 1)},
                f"no {CLASS_FILES[0]}: the numbers in the label maps")
    with open(os.path.join(folder, file), encoding="utf-8-sig") as lines:
        lines = [line.strip() for line in lines.read().rstrip().split("\n")]
    numbered = [re.fullmatch(r"(\d+)[\s:,;]+(\S.*)", line) for line in lines]
    names = ([(int(match[1]), match[2]) for match in numbered] if all(numbered) else
             list(enumerate(lines)))
    if not all(name for _, name in names) or len(dict(names)) < len(names) or max(names)[0] > 255:
        raise ValueError(f"{os.path.join(folder, file)}: expected the name of a class in each line "
                         "(the first is number 0), or a number from 0 to 254 and a name")
    return {number: name for number, name in names if number != 255}, file


# --------------------------------------------------------------------------------------------------
# Splits


def split_keys(folder, keys, list_folders):
    """Relative paths without endings -> {"train": keys, "test": keys}, and how they were split: by
    folders, by lists such as train.txt and val.txt, or every fifth key is a test key."""
    members, notes = tree.group_splits(keys)
    if len(members) == 2:
        for note in notes:
            report(folder, note)
        train, test = ([row[0] for row in rows] for rows in members.values())
        return dict(train=train, test=test), " and ".join(f"{name}/" for name in members)
    lists = {}
    for place in list_folders:
        for split, words in (("train", tree.TRAIN), ("test", tree.TEST)):
            found = [path for word in words if os.path.isfile(
                path := os.path.join(folder, place, f"{word}.txt"))]
            lists.setdefault(split, found[0]) if found else None
    if "test" in lists:
        listed = {split: find_listed(folder, path, keys) for split, path in lists.items()}
        test = [key for key in keys if key in listed["test"]]
        train = [key for key in keys if key not in listed["test"] and (
            "train" not in listed or key in listed["train"])]
        source = " and ".join(os.path.relpath(path, folder) for path in lists.values())
        if not train or not test:
            raise ValueError(f"{folder}: {source} leave no image for training or none for testing: "
                             "expected the name of an image in each line")
        return dict(train=train, test=test), source
    return hold_out(keys), "every fifth is a test image, as there are no folders for both splits"


def find_listed(folder, path, keys):
    """The keys (relative paths without endings) that a list names, a line each: by the whole path
    or its end. A second word on a line, such as the path of a label map, is ignored. What names no
    image is reported."""
    by_name, found, unknown = {}, set(), []
    for key in keys:
        by_name.setdefault(os.path.basename(key), []).append(key)

    def matching(text):
        has_ending = os.path.splitext(text)[1].lower() in tree.SUFFIXES
        name = tree.find_key(text if has_ending else f"{text}.png")[0]
        if name in by_name.get(os.path.basename(name), ()):
            return [name]
        return [key for key in by_name.get(os.path.basename(name), ()) if key == name
                or key.endswith(f"/{name}") or name.endswith(f"/{key}")]

    with name_damaged_file(folder, path), open(path, encoding="utf-8-sig") as lines:
        for line in filter(None, map(str.strip, lines)):
            named = matching(line) or matching(line.split()[0])
            found.update(named)
            unknown += [line] * (not named)
    if unknown:
        report(folder, f"{len(unknown):,} lines of {os.path.relpath(path, folder)} name no image "
                       f"with annotations: {tree.list_names(unknown, 3)}")
    return found


def hold_out(items):
    """Every fifth item is a test item, as in datasets.load_images."""
    if len(items) < 2:
        raise ValueError("only one annotated image, and probes need one for training and one for "
                         "testing")
    return dict(train=[item for i, item in enumerate(items) if i % 5], test=items[::5])


def report(folder, note):
    datasets.print_once(f"note: {os.path.basename(os.path.abspath(folder))}: {note}")


# --------------------------------------------------------------------------------------------------
# Objects: COCO's JSON, VOC's XML


@lru_cache(maxsize=4)
def find_objects(folder, what):
    """-> {"train": Objects, "test": Objects} of the JSON files of a folder in COCO's format, else
    of its XML files in VOC's; None if it has neither. what: "keypoints" prefers a file with this
    word in its name, if there are several of a split."""
    found = find_coco(folder, what == "keypoints") or find_voc(folder)
    if not found:
        return None
    (rows, paths, categories), source = found
    used = {(split, annotation["category_id"]) for split in rows
            for *_, annotations in rows[split] for annotation in annotations}
    known = [(category["id"], str(category["name"]), category.get("keypoints") or [])
             for split in rows for category in sorted(categories[split], key=lambda c: c["id"])
             if (split, category["id"]) in used]
    classes = list(dict.fromkeys(name for _, name, _ in known))
    parts = {tuple(parts) for *_, parts in known if parts}
    if len(parts) > 1:
        first, second = sorted(parts)[:2]
        raise ValueError(f"categories in {folder} have different keypoints ({', '.join(first)}; "
                         f"{', '.join(second)}): give all of them the same names")
    objects = [annotation for split in rows for *_, annotations in rows[split]
               for annotation in annotations]
    masks = sum(bool(annotation.get("segmentation")) for annotation in objects)
    parts = list(next(iter(parts), ()))
    report(folder, f"{len(rows['train']):,} training and {len(rows['test']):,} test images with "
           f"{len(objects):,} objects ({source}); {len(classes)} classes: "
           f"{tree.list_names(classes)}" + f"; {len(parts)} keypoints" * bool(parts))
    for split, part in rows.items():
        if all(annotation["iscrowd"] for *_, annotations in part for annotation in annotations):
            raise ValueError(f"{folder}: no image for {split}ing has an object that is not a crowd "
                             f"or difficult")
    if 0 < masks < len(objects):
        report(folder, f"masks are not used, as {len(objects) - masks:,} objects have none")
    return {split: Objects(
        folder, paths[split], rows[split],
        {category["id"]: classes.index(str(category["name"])) for category in categories[split]
         if str(category["name"]) in classes},
        classes, parts, 0 < masks == len(objects)) for split in rows}


def find_coco(folder, keypoints):
    """-> (rows, paths of the annotations, categories), each {"train", "test": ...}, and the source
    in words; None if there is no JSON file in COCO's format."""
    groups = {}                                          # word in the name: [path]
    for place in ("", "annotations", "*"):
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), place, "*.json"))):
            files = groups.setdefault(find_split_word(path, folder), [])
            if path not in files and is_coco(path):
                files.append(path)
    groups = {word: choose_json(files, keypoints) for word, files in groups.items() if files}
    if not groups:
        return None
    kinds = {word: re.sub(r"\d", "", word) for word in groups}
    train = [word for word in groups if kinds[word] in tree.TRAIN]
    test = sorted((word for word in groups if kinds[word] in tree.TEST),
                  key=lambda word: tree.TEST.index(kinds[word]))
    if len(train) == 1 and test:
        parts = {split: (groups[word], *read_split(groups[word], word, folder))
                 for split, word in (("train", train[0]), ("test", test[0]))}
        paths, rows, categories = ({split: part[i] for split, part in parts.items()}
                                   for i in range(3))
        source = " and ".join(os.path.relpath(path, folder) for path in paths.values())
    elif len(groups) == 1:
        [(word, path)] = groups.items()
        content, kinds = read_split(path, word, folder)
        rows, paths, categories = (hold_out(content), *(dict(train=x, test=x)
                                                        for x in (path, kinds)))
        source = f"{os.path.relpath(path, folder)}; every fifth image is a test image"
    else:
        raise ValueError(f"{folder} has the JSON files {tree.list_names(sorted(groups.values()))}: "
                         "name one train and one val, or leave one of them in the folder")
    return (rows, paths, categories), source


def is_coco(path):
    with open(path, "rb") as file:
        return re.search(rb'"(images|annotations|categories)"\s*:\s*\[', file.read(1 << 16))


def find_split_word(path, folder):
    """The word for a split in the name of a file, else in the path of its folder, with digits that
    follow it: train2017 of instances_train2017.json; "" if there is none."""
    *folders, name = os.path.relpath(path, folder).lower().split(os.sep)
    for text in (name, *folders):
        for word in re.findall(r"[a-z]+\d*", text):
            if re.sub(r"\d", "", word) in (*tree.TRAIN, *tree.TEST):
                return word
    return ""


def choose_json(paths, keypoints):
    """The file of a split with the wanted annotations. ValueError: several."""
    if len(paths) > 1:
        names = {path: os.path.basename(path).lower() for path in paths}
        paths = [path for path in paths if ("keypoint" in names[path]) == keypoints
                 and not any(word in names[path] for word in OTHER_JSON)] or paths
    if len(paths) > 1:
        raise ValueError(f"{tree.list_names(paths)} have annotations of the same split: leave one "
                         "of them in the folder")
    return paths[0]


def read_split(path, word, folder):
    """A JSON file -> rows of Objects, categories. word: of its split, also a folder's name."""
    rows, categories = read_coco_json(path, folder)
    places = [os.path.dirname(path), *(os.path.join(folder, place) for place in (
        word, f"images/{word}", f"{word}/images", "images", "data", ""))]
    first = [row[0] for row in rows[:10]]
    place = next((place for place in places for name in first
                  if os.path.isfile(os.path.join(place, name))), None)
    if place is None:
        raise ValueError(f"{path}: its images, such as {', '.join(first[:1]) or 'none'}, are not "
                         f"in {', '.join(dict.fromkeys(map(os.path.normpath, places)))}")
    with name_damaged_file(folder, path) as at:
        for category in categories:
            category["id"], category["name"]
        for name, image, annotations in rows:
            at["image"] = name
            for annotation in annotations:
                at["annotation"] = annotation.get("id")
                annotation["category_id"]
                annotation.setdefault("iscrowd", 0)
                x, y, *sides = annotation["bbox"]
                annotation["area"] = annotation.get("area") or sides[0] * sides[1]
                if image.get("width") and image.get("height"):
                    check_inside(f"{path}: {name}", image["width"], image["height"],
                                 x + sides[0], y + sides[1])
        boxes = [annotation["bbox"] for *_, annotations in rows for annotation in annotations]
        if boxes and all(min(box[2:]) < 1 for box in boxes):
            raise ValueError("all boxes are smaller than a pixel: COCO's are x, y, width and "
                             "height in pixels, not fractions of the image")
    return [(os.path.join(place, name), *rest) for name, *rest in rows], categories


def find_voc(folder):
    """`find_coco` of XML files in VOC's format, one for each image; difficult objects are crowds.
    None: no such file."""
    files = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "*.xml"), recursive=True):
        with name_damaged_file(folder, path):
            root = ElementTree.parse(path).getroot()
        if root.tag == "annotation":
            files[path] = root
    if not files:
        return None
    keyed = [{path: tree.find_key(path) for path in (os.path.relpath(path, folder)
                                                     for path in paths)}
             for paths in (files, tree.list_images(folder)[0])]
    xml = {key: path for path, (key, _) in keyed[0].items()}
    images = {key: path for path, (key, is_label) in keyed[1].items() if not is_label}
    both = sorted(xml.keys() & images.keys())
    if not both:
        raise ValueError(f"no XML file in {folder} has the name of an image: see "
                         f"{min(xml.values())}")
    if alone := sorted(xml[key] for key in xml.keys() - images.keys()):
        report(folder, f"not used: {len(alone):,} annotations without an image: "
               f"{tree.list_names(alone, 3)}")
    keys, source = split_keys(folder, both, ("", "ImageSets/Main"))
    rows = {split: [read_xml(folder, key, images[key], xml[key], files) for key in keys[split]]
            for split in keys}
    names = sorted({annotation["category_id"] for split in rows for *_, annotations in rows[split]
                    for annotation in annotations})
    categories = [dict(id=name, name=name) for name in names]
    return (rows, dict.fromkeys(rows, folder), dict.fromkeys(rows, categories)), source


def read_xml(folder, key, image, path, files):
    """A row of Objects. VOC counts pixels from 1, and its boxes include the last one."""
    root, annotations = files[os.path.join(folder, path)], []
    with name_damaged_file(folder, os.path.join(folder, path)) as place:
        size = [int(root.findtext(f"size/{side}") or 0) or None for side in ("width", "height")]
        for number, thing in enumerate(root.findall("object"), 1):
            place["object"] = number
            x0, y0, x1, y1 = (float(thing.find(f"bndbox/{corner}").text)
                              for corner in ("xmin", "ymin", "xmax", "ymax"))
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            annotations.append(dict(
                id=number, category_id=thing.findtext("name").strip(), bbox=box,
                area=box[2] * box[3], iscrowd=int(thing.findtext("difficult") or 0)))
    return (os.path.join(folder, image), dict(id=key, width=size[0], height=size[1]), annotations)
