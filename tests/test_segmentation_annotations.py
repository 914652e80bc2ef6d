"""Label maps, masks and videos of probes/annotations.py and probes/label_maps.py: tiny data sets in
the official layouts, written here and checked by hand, and subsets of the real ones; errors."""
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lib import metrics, toy
from probes import annotations, label_maps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")    # of pycocotools
REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")


@pytest.fixture(autouse=True)
def clear_cache():
    annotations.read_coco_json.cache_clear()


def write_image(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 140, 30)).save(path)


def write_labels(path, values, mode="L"):
    """(height, width) numbers as a gray image or, mode P, as one whose palette differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image.putpalette([(7 * i + 3) % 256 for i in range(768)])
    image.save(path)


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def make_stripes(height, width, *values):
    """Vertical stripes of the values, about equally wide."""
    return np.array(values)[np.arange(width) * len(values) // width][None].repeat(height, 0)


def read_stripes(item):
    """The labels of an item from left to right; all rows are equal."""
    assert item.image.dtype == item.labels.dtype == torch.uint8
    assert item.image.shape == (3, *item.labels.shape)
    assert item.labels.equal(item.labels[:1].expand_as(item.labels))
    return item.labels[0].unique_consecutive().tolist()


# ---- label maps ----------------------------------------------------------------------------------


def write_ade20k(root, folder="ADEChallengeData2016"):
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(root / folder / f"images/{part}/{name}.jpg", 48, 64)
        write_labels(root / folder / f"annotations/{part}/{name}.png",
                     make_stripes(48, 64, 0, 1, 13, 150))


@pytest.mark.parametrize("folder", ["ADEChallengeData2016", "."])
def test_ade20k_labels_start_with_wall_and_ignore_pixels_without_class(tmp_path, folder):
    write_ade20k(tmp_path, folder)
    for split, name in (("train", "ADE_train_00000001"), ("val", "ADE_val_00000001")):
        [item] = annotations.segmentation("ade20k", tmp_path, split)
        assert item.id == name and item.image.shape == (3, 48, 64)
        assert read_stripes(item) == [255, 0, 12, 149]
    names = annotations.segmentation_classes("ade20k")
    assert len(names) == len(set(names)) == 150
    assert (names[0], names[12], names[149]) == ("wall", "person", "flag")
    [item] = annotations.segmentation("ade20k", tmp_path, "val", level="object")
    names = annotations.segmentation_classes("ade20k", "object")
    assert len(names) == len(set(names)) == 59 and names[6] == "person"
    assert read_stripes(item) == [255, 6, 255]                    # wall and flag have no parts


def write_voc(root, devkit="VOCdevkit/"):
    """a: VOC train; b: VOC val, and train of SBD; c: only in SBD."""
    top = root / f"{devkit}VOC2012"
    for name in "abc":
        write_image(top / f"JPEGImages/{name}.jpg", 30, 40)
    for name in "ab":
        write_labels(top / f"SegmentationClass/{name}.png", make_stripes(30, 40, 0, 15, 255), "P")
    write_text(top / "ImageSets/Segmentation/train.txt", "a")
    write_text(top / "ImageSets/Segmentation/val.txt", "b")
    return top


def write_sbd(root, values=(0, 20)):
    io = pytest.importorskip("scipy.io")
    folder = root / "benchmark_RELEASE/dataset"
    (folder / "cls").mkdir(parents=True)
    for name in "abc":
        labels = make_stripes(30, 40, *values).astype(np.uint8)
        io.savemat(folder / f"cls/{name}.mat", {"GTcls": {
            "Segmentation": labels, "Boundaries": np.zeros(1), "CategoriesPresent": [20]}})
    write_text(folder / "train.txt", "b", "c")
    write_text(folder / "val.txt", "a")


@pytest.mark.parametrize("devkit", ["VOCdevkit/", ""])
def test_voc_train_includes_sbd_but_not_the_val_images_of_voc(tmp_path, capsys, devkit):
    top = write_voc(tmp_path, devkit)
    [item] = annotations.segmentation("voc", tmp_path, "test")
    assert item.id == "b" and read_stripes(item) == [0, 15, 255]  # the numbers, not the palette
    assert capsys.readouterr().err == ""
    assert [item.id for item in annotations.segmentation("voc", tmp_path, "train")] == ["a"]
    assert "no benchmark_RELEASE (SBD)" in capsys.readouterr().err
    write_sbd(tmp_path)
    one, other = annotations.segmentation("voc", tmp_path, "train")
    assert (one.id, read_stripes(one)) == ("a", [0, 15, 255])
    assert (other.id, read_stripes(other)) == ("c", [0, 20])
    names = annotations.segmentation_classes("voc")
    assert len(names) == 21 and (names[0], names[15], names[20]) == (
        "background", "person", "tvmonitor")
    write_labels(top / "SegmentationClassAug/c.png", make_stripes(30, 40, 3))   # preferred
    write_text(top / "ImageSets/Segmentation/trainaug.txt", "c")
    [item] = annotations.segmentation("voc", tmp_path, "train")
    assert item.id == "c" and read_stripes(item) == [3]


def test_an_unknown_number_in_sbd_is_an_error_that_names_the_file(tmp_path):
    write_voc(tmp_path)
    write_sbd(tmp_path, (0, 21))
    with pytest.raises(ValueError, match="c.mat is damaged or does not .* voc .*21 is not a class"):
        list(annotations.segmentation("voc", tmp_path, "train"))


def write_pascal(root, part="rwing_1"):
    io = pytest.importorskip("scipy.io")

    def records(names, rows):
        out = np.empty((1, len(rows)), [(name, object) for name in names])
        for i, row in enumerate(rows):
            out[0, i] = row
        return out

    def mask(*columns):
        return np.isin(make_stripes(20, 30, 0, 1, 2, 3, 4), columns).astype(np.uint8)

    nothing = np.zeros((0, 0))
    parts = records(("part_name", "mask"), [("torso", mask(0, 1, 2)), ("beak", mask(1)),
                                            (part, mask(2))])
    kind = "class", "class_ind", "mask", "parts"
    things = {"2008_000002": [("bird", 3, mask(0, 1, 2), parts), ("boat", 4, mask(3), nothing)],
              "2008_000003": [("tvmonitor", 20, mask(1), records(
                  ("part_name", "mask"), [("screen", mask(1))]))], "2008_000004": []}
    for name, rows in things.items():
        write_image(root / f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg", 20, 30)
        objects = records(kind, rows) if rows else nothing
        path = root / f"trainval/Annotations_Part/{name}.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        io.savemat(path, {"anno": records(("imname", "objects"), [(name, objects)])})
    write_text(root / "VOCdevkit/VOC2010/ImageSets/Main/train.txt", *things)
    write_text(root / "VOCdevkit/VOC2010/ImageSets/Main/val.txt", "2008_000003")
    return io.loadmat(path.with_stem("2008_000002"))


def test_later_parts_of_pascal_cover_earlier_ones(tmp_path):
    raw = write_pascal(tmp_path)                           # the fixture has the official nesting
    objects = raw["anno"][0, 0]["objects"]
    assert objects[0, 0]["class"][0] == "bird" and objects[0, 1]["parts"].size == 0
    assert objects[0, 0]["parts"][0, 1]["part_name"][0] == "beak"
    names = annotations.segmentation_classes("pascal", "part")
    assert len(names) == len(set(names)) == 193
    assert names[0] == "aeroplane: body" and names[-1] == "tvmonitor: screen"
    bird, tv, empty = annotations.segmentation("pascal", tmp_path, "train", level="part")
    assert [names[i] if i < 255 else "" for i in read_stripes(bird)] == [
        "bird: torso", "bird: beak", "bird: rwing", ""]
    assert read_stripes(tv) == [255, 192, 255] and read_stripes(empty) == [255]
    classes = annotations.segmentation_classes("pascal")
    assert len(classes) == 16 and not {"boat", "chair", "diningtable", "sofa"} & set(classes)
    bird, tv, empty = annotations.segmentation("pascal", tmp_path, "train")
    assert read_stripes(bird) == [2, 255] and classes[2] == "bird"          # the boat is ignored
    assert read_stripes(tv) == [255, 15, 255] and read_stripes(empty) == [255]
    [item] = annotations.segmentation("pascal", tmp_path, "val")
    assert item.id == "2008_000003"


def test_the_numbers_of_parts_of_pascal_are_the_official_ones():
    counts = [7, 6, 13, 2, 13, 13, 17, 19, 18, 21, 5, 24, 2, 19, 13, 1]
    assert [len(parts) for parts in label_maps.PASCAL_PARTS.values()] == counts
    assert sum(counts) == 193
    assert list(label_maps.PASCAL_PARTS) == [
        name for name in label_maps.VOC[1:] if name not in ("boat", "chair", "diningtable", "sofa")]


def test_an_unknown_part_is_an_error_that_names_it(tmp_path):
    write_pascal(tmp_path, "propeller_2")
    with pytest.raises(ValueError, match="2008_000002.mat is damaged .*none of the 193: bird: pr"):
        list(annotations.segmentation("pascal", tmp_path, "train", level="part"))
    assert len(list(annotations.segmentation("pascal", tmp_path, "train"))) == 3


@pytest.mark.parametrize("twice", ["", "TrainVal_images/"])
def test_lip_has_levels_with_and_without_background(tmp_path, twice):
    for name, (height, width) in (("1_2", (120, 60)), ("3_4", (200, 33))):
        write_image(tmp_path / f"lip/{twice}TrainVal_images/val_images/{name}.jpg", height, width)
        write_labels(tmp_path / f"lip/TrainVal_parsing_annotations/val_segmentations/{name}.png",
              make_stripes(height, width, 0, 5, 14, 15))
    write_text(tmp_path / f"lip/{twice}val_id.txt", "1_2", "3_4")
    one, other = annotations.segmentation("lip", tmp_path)
    assert read_stripes(one) == read_stripes(other) == [255, 4, 13, 14]
    assert other.image.shape == (3, 200, 33)
    names = annotations.segmentation_classes("lip")
    assert len(names) == 19 and [names[i] for i in (4, 13, 14)] == [
        "UpperClothes", "Left-arm", "Right-arm"]
    scene = next(annotations.segmentation("lip", tmp_path, level="scene"))
    assert read_stripes(scene) == [0, 5, 14, 15]
    assert len(annotations.segmentation_classes("lip", "scene")) == 20


def test_cityscapes_has_nineteen_classes(tmp_path):
    for part, city in (("train", "aachen"), ("val", "frankfurt")):
        stem = f"{part}/{city}/{city}_000000_000019_"
        write_image(tmp_path / f"cityscapes/leftImg8bit/{stem}leftImg8bit.png", 32, 64)
        write_labels(tmp_path / f"cityscapes/gtFine/{stem}gtFine_labelIds.png",
              make_stripes(32, 64, 0, 7, 26, 33))
        write_labels(tmp_path / f"cityscapes/gtFine/{stem}gtFine_instanceIds.png",
                     make_stripes(32, 64, 9))
    [item] = annotations.segmentation("cityscapes", tmp_path, "train")
    assert item.id == "aachen_000000_000019" and read_stripes(item) == [255, 0, 13, 18]
    names = annotations.segmentation_classes("cityscapes")
    assert len(names) == 19 and [names[i] for i in (0, 13, 18)] == ["road", "car", "bicycle"]
    assert len(list(annotations.segmentation("cityscapes", tmp_path / "cityscapes", "val"))) == 1


# ---- parts of the full ADE20K --------------------------------------------------------------------


def write_codes(path, codes):
    """Class numbers as in the official images: 256 (red div 10) + green; blue is the instance."""
    codes = np.asarray(codes)
    rgb = np.stack([codes // 256 * 10 + 3, codes % 256, np.full_like(codes, 77)], -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((rgb * (codes > 0)[..., None]).astype(np.uint8)).save(path)


BUILDING, CAR, GRASS, WINDOW, WHEEL, DOOR = 312, 401, 1125, 3050, 3000, 774


def write_ade20k_full(root, size=(32, 32)):
    rows = {"training/urban/street/ADE_train_00000001": (
                [BUILDING, BUILDING, BUILDING, CAR, GRASS], [0, WINDOW, WINDOW, WHEEL, WINDOW]),
            "training/urban/street/ADE_train_00000002": ([BUILDING, CAR], [DOOR, 0]),
            "training/urban/street/ADE_train_00020211": ([CAR], [DOOR]),      # a later addition
            "validation/urban/street/ADE_val_00000001": (
                [CAR, BUILDING, 0], [WHEEL, WINDOW, WINDOW]),
            "validation/urban/street/ADE_val_00000002": ([CAR], None)}        # no object has parts
    for name, (objects, parts) in rows.items():
        stem = root / "ADE20K_2021_17_01/images/ADE" / name
        write_image(stem.with_suffix(".jpg"), *size)
        write_codes(stem.with_name(f"{stem.name}_seg.png"), make_stripes(*size, *objects))
        if parts:
            write_codes(stem.with_name(f"{stem.name}_parts_1.png"), make_stripes(*size, *parts))
        words = {BUILDING: "building", CAR: "car", WINDOW: "window", WHEEL: "wheel", DOOR: "door"}
        things = [{"name": word, "name_ndx": code} for code, word in words.items()]
        stem.with_suffix(".json").write_bytes(json.dumps(
            {"annotation": {"source": "caf\xe9", "object": things}},
            ensure_ascii=False).encode("latin1"))          # some files are not UTF-8
    return root / "ADE20K_2021_17_01/images/ADE/parts_209.txt"


def test_ade20k_parts_are_pairs_in_both_splits_the_most_frequent_first(tmp_path, capsys):
    path = write_ade20k_full(tmp_path)
    assert BUILDING == 10 // 10 * 256 + 56 and WINDOW == 110 // 10 * 256 + 234
    names = annotations.segmentation_classes("ade20k", "part", tmp_path)
    assert names == ["building: window", "car: wheel"]     # door is not in val
    assert f"counting the parts of ADE20K, once, for {path}" in capsys.readouterr().err
    one, two = annotations.segmentation("ade20k", tmp_path, "train", level="part")
    assert (one.id, two.id) == ("ADE_train_00000001", "ADE_train_00000002")
    assert read_stripes(one) == [255, 0, 1, 255] and read_stripes(two) == [255]
    one, two = annotations.segmentation("ade20k", tmp_path, "val", level="part")
    assert read_stripes(one) == [1, 0, 255] and read_stripes(two) == [255]
    assert capsys.readouterr().err == ""                   # the list is read from its file
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    wide = np.bincount(make_stripes(1, 32, 0, 1, 1, 2, 3)[0])
    assert [int(row[2]) for row in rows] == [32 * wide[1], 32 * wide[2]]
    path.write_text("".join("\t".join(row) + "\n" for row in rows[::-1]))
    item = next(annotations.segmentation("ade20k", tmp_path, level="part"))
    assert read_stripes(item)[:2] == [0, 1]
    path.write_text("not a list\n")
    with pytest.raises(ValueError, match="parts_209.txt is damaged or does .* ade20k-full"):
        annotations.segmentation_classes("ade20k", "part", tmp_path)


def test_pairs_with_few_pixels_are_not_parts(tmp_path):
    write_ade20k_full(tmp_path, (64, 64))
    folder = tmp_path / "ADE20K_2021_17_01/images/ADE"
    for pixels, names in ((1, 2), (5, 3)):                 # 0.1% of 3,700 pixels of building: 4
        for stem in ("training/urban/street/ADE_train_00000001",
                     "validation/urban/street/ADE_val_00000001"):
            codes = make_stripes(64, 64, *([0, WINDOW, WINDOW, WHEEL, 0] if "train_" in stem else
                                      [WHEEL, WINDOW, WINDOW]))
            codes[:pixels, 30] = WHEEL                     # on a building, in both splits
            write_codes(folder / f"{stem}_parts_1.png", codes)
        (folder / "parts_209.txt").unlink(missing_ok=True)
        assert len(annotations.segmentation_classes("ade20k", "part", tmp_path)) == names


def test_large_images_of_the_full_ade20k_are_resized_as_for_the_150_classes(tmp_path):
    write_ade20k_full(tmp_path, (600, 900))
    item = next(annotations.segmentation("ade20k", tmp_path, "train", level="part"))
    assert item.image.shape == (3, 512, 768) and read_stripes(item) == [255, 0, 1, 255]


# ---- COCO ----------------------------------------------------------------------------------------


SQUARE, TRIANGLE = [1, 1, 4, 1, 4, 3, 1, 3], [1, 1, 5, 1, 1, 5]


def write_coco(root, **changes):
    """An image of 6 x 7 pixels: an object of two polygons, a smaller one in it, a crowd."""
    rows = [
        dict(id=1, image_id=9, category_id=90, area=12, segmentation=[SQUARE, [4, 4, 7, 4, 7, 6,
                                                                             4, 6]]),
        dict(id=2, image_id=9, category_id=1, area=4, segmentation=[[1, 1, 3, 1, 3, 3, 1, 3]]),
        dict(id=3, image_id=9, category_id=1, area=24, iscrowd=1,
             segmentation={"size": [6, 7], "counts": [0, 12, 30]})]
    rows[1].update(changes)
    for number in (9, 25):
        write_image(root / f"coco/val2017/{number:012}.jpg", 6, 7)
    write_text(root / "coco/annotations/instances_val2017.json", json.dumps(dict(
        images=[dict(id=n, file_name=f"{n:012}.jpg", width=7, height=6) for n in (9, 25)],
        annotations=[dict(bbox=[1, 1, 3, 2], iscrowd=0) | row for row in rows], categories=[])))


def test_coco_masks_are_polygons_and_run_lengths(tmp_path):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path)
    item, none = annotations.masks("coco", tmp_path)
    assert item.masks.shape == (3, 6, 7) and item.masks.dtype == torch.bool
    assert item.masks.sum((1, 2)).tolist() == [12, 4, 12]
    assert item.masks[0, 1:3, 1:4].all() and item.masks[0, 4:6, 4:7].all()
    assert item.masks[2, :, :2].all()                      # column by column
    assert item.labels.tolist() == [79, 0, 0] and item.crowd.tolist() == [False, False, True]
    assert none.masks.shape == (0, 6, 7)
    assert not hasattr(next(annotations.boxes("coco", tmp_path)), "masks")
    write_image(tmp_path / "coco/val2017/000000000009.jpg", 12, 14)       # resized on disk
    again = next(annotations.masks("coco", tmp_path))
    assert again.image.shape == (3, 6, 7) and torch.equal(again.masks, item.masks)


@pytest.mark.parametrize("segmentation, rows", [
    ([SQUARE], ["0000000", "0111000", "0111000", "0000000", "0000000", "0000000"]),
    ([TRIANGLE], ["0000000", "0111000", "0110000", "0100000", "0000000", "0000000"]),
    ([[.5, .5, 4.5, .5, 4.5, 3.5, .5, 3.5]],
     ["0000000", "0111100", "0111100", "0111100", "0000000", "0000000"]),
    ({"size": [4, 5], "counts": [5, 2, 1, 3, 1, 2, 5, 1]}, ["00110", "01110", "01100", "00001"]),
    ({"size": [4, 5], "counts": "52110O4O"}, ["00110", "01110", "01100", "00001"]),
    ({"size": [2, 2], "counts": [0, 4]}, ["11", "11"]),
    ({"size": [2, 3], "counts": "6"}, ["000", "000"])])
def test_polygons_and_run_lengths_decode_to_the_official_masks(segmentation, rows):
    pytest.importorskip("pycocotools")
    mask = annotations.decode_mask(segmentation, torch.Size([len(rows), len(rows[0])]))
    assert ["".join(map(str, row)) for row in mask.int().tolist()] == rows


def test_label_maps_of_coco_have_small_objects_on_top_and_ignore_crowds(tmp_path):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path)
    item, none = annotations.segmentation("coco", tmp_path)
    assert item.labels.dtype == torch.uint8
    assert item.labels.tolist() == [[255, 255, 0, 0, 0, 0, 0], [255, 1, 1, 80, 0, 0, 0],
                                    [255, 1, 1, 80, 0, 0, 0], [255, 255, 0, 0, 0, 0, 0],
                                    [255, 255, 0, 0, 80, 80, 80], [255, 255, 0, 0, 80, 80, 80]]
    assert none.labels.max() == 0
    names = annotations.segmentation_classes("coco")
    assert len(names) == 81 and names[:2] == ["background", "person"] and names[80] == "toothbrush"


@pytest.mark.parametrize("segmentation, why", [
    ([], "without three corners"), ([[1, 2, 3, 4]], "without three corners"),
    ([[1, 2, 3, 4, 5, 6, 7]], "without three corners"), (None, "TypeError"),
    ([["a"] * 6], "ValueError"),
    ({"size": [6, 7], "counts": [5, 2]}, "do not add up"), ({"size": [6, 7]}, "KeyError: 'counts'"),
    ({"size": [6, 7], "counts": [50, -8]}, "do not add up"),
    ({"size": [6, 7], "counts": "zzzz"}, "Invalid RLE"),
    ({"size": [7, 6], "counts": [42]}, r"a mask of \[7, 6\] on an image of \[6, 7\]"),
])
def test_damaged_masks_are_an_error_that_names_the_file(tmp_path, segmentation, why):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path, segmentation=segmentation)
    where = "instances_val2017.json is damaged .*image 000000000009.jpg, annotation 2: "
    with pytest.raises(ValueError, match=f"{where}.*{why}"):
        list(annotations.masks("coco", tmp_path))


def test_coco_stuff_has_things_before_stuff(tmp_path):
    write_image(tmp_path / "coco/val2017/000000000009.jpg", 40, 50)
    path = tmp_path / "coco/stuffthingmaps/val2017/000000000009.png"
    write_labels(path, make_stripes(40, 50, 0, 12, 91, 181, 255))
    [item] = annotations.segmentation("coco", tmp_path, level="scene")
    names = annotations.segmentation_classes("coco", "scene")
    assert len(names) == len(set(names)) == 171
    assert item.id == 9 and read_stripes(item) == [0, 11, 80, 170, 255]
    assert [names[i] for i in (0, 11, 80, 170)] == ["person", "stop sign", "banner", "wood"]
    write_labels(path, make_stripes(40, 50, 11))           # street sign, which never occurs
    with pytest.raises(ValueError, match="the number 11 is not a class"):
        list(annotations.segmentation("coco", tmp_path, level="scene"))


# ---- videos --------------------------------------------------------------------------------------


def write_davis(root, frames=6):
    """A square that moves 4 pixels per frame. The second video has another one, and void."""
    top = root / "DAVIS"
    for name, mode in (("goat", "L"), ("ants", "P")):
        for t in range(frames):
            mask = np.zeros((96, 128), np.uint8)
            mask[20:40, 4 * t:4 * t + 20] = 1
            if name == "ants":
                mask[60:80, 60:90] = 255
                mask[62:78, 62:88] = 2
            write_image(top / f"JPEGImages/480p/{name}/{t:05}.jpg", 96, 128)
            write_labels(top / f"Annotations/480p/{name}/{t:05}.png", mask, mode)
    write_text(top / "ImageSets/2017/val.txt", "goat", "ants")
    return top


def test_void_in_davis_is_background(tmp_path):
    write_davis(tmp_path)
    goat, ants = annotations.videos("davis", tmp_path)
    assert (goat.name, goat.objects, ants.name, ants.objects) == ("goat", 1, "ants", 2)
    assert ants.masks.shape == (6, 96, 128) and ants.masks.dtype == torch.uint8
    assert ants.masks.unique().tolist() == [0, 1, 2]       # the numbers, not the palette; no 255
    assert (ants.masks[0] == 2).sum() == 16 * 26
    assert len(goat.frames) == 6 and goat.frames[2].shape == (3, 96, 128)
    assert len(list(goat.frames)) == 6
    moved = ants.masks[:1].repeat(6, 1, 1)                  # the square moved by hand
    for t in range(6):
        moved[t] = ants.masks[0].where(ants.masks[0] != 1, 0) + (ants.masks[0] == 1).roll(4 * t, 1)
    scores = metrics.video_scores([metrics.score_video(moved, ants.masks)])
    assert scores["j"] == scores["f"] == 1
    still = metrics.score_video(ants.masks[:1].repeat(6, 1, 1), ants.masks)
    assert metrics.video_scores([still])["j"] < 0.8        # negative control
    [video] = annotations.videos("davis", tmp_path / "DAVIS", limit=1)
    assert video.name == "goat"


def test_frames_are_read_when_used(tmp_path):
    top = write_davis(tmp_path)
    goat = next(annotations.videos("davis", tmp_path))
    (top / "JPEGImages/480p/goat/00003.jpg").write_bytes(b"not an image")
    assert goat.frames[2].shape == (3, 96, 128)
    with pytest.raises(ValueError, match="cannot read .*00003.jpg: .*restore the file"):
        goat.frames[3]
    assert len(list(annotations.videos("davis", tmp_path))) == 2   # it is reported when it is used


@pytest.mark.parametrize("harm, why", [
    (lambda top: (top / "Annotations/480p/goat/00003.png").unlink(), "6 frames and 5 annotations"),
    (lambda top: write_image(top / "Annotations/480p/goat/00003.png", 96, 128), "saved in color"),
    (lambda top: write_image(top / "JPEGImages/480p/goat/00003.jpg", 96, 100),
     "00003.jpg has size .100, 96."),
    (lambda top: write_labels(top / "Annotations/480p/goat/00003.png", np.zeros((9, 9))),
     "same shape"),
    (lambda top: write_text(top / "ImageSets/2017/val.txt", "cow"), "0 frames and 0 annotations"),
])
def test_a_damaged_video_is_an_error_that_names_it(tmp_path, harm, why):
    harm(write_davis(tmp_path))
    with pytest.raises(ValueError, match=f"480p/.* is damaged or does not .* davis .*{why}"):
        list(annotations.videos("davis", tmp_path))


# ---- toy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", pytest.param("toy-scenes", marks=pytest.mark.slow)])
def test_toy_has_label_maps_masks_and_videos(name):
    expected = toy.draw(torch.arange(70), "test", 64, name == "toy-scenes", annotate=True)
    maps = {level: list(annotations.segmentation(name, None, "test", 70, level, size=64))
            for level in (None, "part")}
    for i, (thing, parts) in enumerate(zip(maps[None], maps["part"])):
        assert thing.id == i and thing.image.equal(expected["image"][i])
        assert thing.labels.equal(expected["semantic"][i])
        there = expected["parts"][i] > 0                      # elsewhere: ignored
        assert (parts.labels[~there] == 255).all()
        assert (parts.labels[there] + 1).equal(expected["parts"][i][there])
    assert annotations.segmentation_classes(name) == ["background", *toy.CLASSES]
    assert annotations.segmentation_classes(name, "part") == toy.PARTS
    for i, item in enumerate(annotations.masks(name, limit=70, size=64)):
        assert item.masks.sum((1, 2)).tolist() == item.areas.tolist()
        assert item.masks.any(0).equal(expected["instances"][i] > 0)
    found = list(annotations.videos(name, limit=4, size=64))
    for video in found:
        assert len(video.frames) == len(video.masks) == 24 and video.frames[3].shape == (3, 64, 64)
        assert sorted(video.masks[0].unique().tolist()) == list(range(video.objects + 1))
        assert video.masks.max() == video.objects
    assert [video.name for video in found] == [f"test-{i}" for i in range(4)]
    assert max(video.objects for video in found) == (3 if name == "toy-scenes" else 1)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm, why", [
    (lambda path: write_labels(path, make_stripes(48, 64, 151)), "the number 151 is not a class"),
    (lambda path: write_labels(path, make_stripes(48, 60, 1)),
     r"labels for \[48, 60\] pixels of an image of"),
    (lambda path: write_image(path, 48, 64), "mode RGB instead .*saved in color"),
    (lambda path: path.write_bytes(b"not an image"), "cannot identify"),
    (lambda path: path.write_bytes(path.read_bytes()[:70]), "Error"),
])
def test_damaged_labels_are_an_error_that_names_the_file(tmp_path, harm, why):
    write_ade20k(tmp_path)
    path = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    harm(path)
    with pytest.raises(ValueError) as error:
        list(annotations.segmentation("ade20k", tmp_path))
    assert str(error.value).startswith(f"{path} is damaged or does not have the format of ade20k (")
    assert error.match(why) and "\n" not in str(error.value)


SETS = [("ade20k", "scene"), ("ade20k", "part"), ("pascal", None), ("voc", None), ("lip", None),
        ("cityscapes", None), ("coco", "object"), ("coco", "scene"), ("davis", None)]


@pytest.mark.parametrize("name, level", SETS)
def test_a_missing_set_is_an_error_with_its_layout_and_source(tmp_path, name, level):
    if name in ("pascal", "coco"):
        pytest.importorskip({"pascal": "scipy", "coco": "pycocotools"}[name])
    with pytest.raises(FileNotFoundError) as error:
        list(annotations.videos(name, tmp_path) if name == "davis" else
             annotations.segmentation(name, tmp_path, level=level))
    layout = annotations.LAYOUT["ade20k-full" if level == "part" else name]
    for part in (*layout, str(tmp_path), "nothing is downloaded"):
        assert part in str(error.value)


def test_folders_without_labels_are_a_missing_set(tmp_path):
    write_ade20k(tmp_path)
    folder = tmp_path / "ADEChallengeData2016/annotations/validation"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="No ade20k under .*expected ADEChallengeData2016/"):
        list(annotations.segmentation("ade20k", tmp_path))


def test_wrong_names_splits_and_levels_are_errors_with_the_next_step():
    with pytest.raises(ValueError, match="no segmentation of 'cub' here: choose toy or toy-scene"):
        annotations.segmentation("cub")
    with pytest.raises(ValueError, match="no segmentation of 'cub' here"):
        annotations.segmentation_classes("cub")
    with pytest.raises(ValueError, match="no videos of 'coco' here: choose toy or toy-scenes or d"):
        annotations.videos("coco")
    with pytest.raises(ValueError, match="no masks of 'voc' here: choose toy or toy-scenes or co"):
        annotations.masks("voc")
    with pytest.raises(ValueError, match="no level 'part' of voc: choose object"):
        annotations.segmentation("voc", level="part")
    with pytest.raises(ValueError, match="no level 'stuff' of ade20k: choose scene or object or p"):
        annotations.segmentation_classes("ade20k", "stuff")
    with pytest.raises(ValueError, match="no split 'all' of lip: choose train or test"):
        annotations.segmentation("lip", split="all")


@pytest.mark.parametrize("package, read", [
    ("scipy", lambda root: annotations.segmentation("pascal", root)),
    ("scipy", lambda root: annotations.segmentation("voc", root, "train")),
    ("pycocotools", lambda root: annotations.masks("coco", root)),
    ("pycocotools", lambda root: annotations.segmentation("coco", root)),
])
def test_without_a_package_the_error_shows_how_to_install_it(tmp_path, monkeypatch, package, read):
    write_voc(tmp_path)
    for part in ("train", "val"):
        write_text(tmp_path / f"benchmark_RELEASE/dataset/{part}.txt", "c")
    write_text(tmp_path / "benchmark_RELEASE/dataset/cls/c.mat", "")
    for module in list(sys.modules):
        if module.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"which {package} reads: pip install {package}$"):
        list(read(tmp_path))


# ---- subsets of the real sets --------------------------------------------------------------------


def unpack(name, folder):
    path = os.path.join(REAL, f"{name}.tar")
    if not os.path.exists(path):
        pytest.skip(f"no subset of {name} here")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_the_real_voc(tmp_path):
    root = unpack("voc_animals", tmp_path)
    assert label_maps.VOC == (root / "VOC2012/classes.txt").read_text().split()
    items = [item for split in ("train", "test")
             for item in annotations.segmentation("voc", root, split)]
    assert len(items) == 24 and all((item.labels == 255).any() for item in items)
    counts = sum(metrics.confusion(item.labels.clamp(max=20), item.labels, 21) for item in items)
    assert metrics.segmentation_scores(counts)["miou"] == 1
    content = json.loads((root / "VOC2012/animal_keypoints.json").read_text())
    files = {int(i): os.path.splitext(file)[0] for i, file in content["images"].items()}
    maps, hits = {item.id: item.labels for item in items}, []
    for animal in content["annotations"]:
        for x, y, visible in animal["keypoints"]:
            labels = maps[files[animal["image_id"]]]
            if visible and 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]:
                hits.append(labels[int(y), int(x)] > 0)    # the animal or its border
    assert len(hits) > 300 and sum(hits) > 0.95 * len(hits)


def test_the_real_ade20k(tmp_path):
    root = unpack("ade20k_samples", tmp_path)
    [item] = annotations.segmentation("ade20k", root)
    names = annotations.segmentation_classes("ade20k")
    assert {names[i] for i in item.labels.unique().tolist() if i < 255} >= {
        "building", "sky", "tree", "grass"}
    sky = (item.labels == names.index("sky")).nonzero()[:, 0].float().mean()
    grass = (item.labels == names.index("grass")).nonzero()[:, 0].float().mean()
    assert sky < grass                                     # the sky is above
    [item] = annotations.segmentation("ade20k", root, level="object")
    names = annotations.segmentation_classes("ade20k", "object")
    assert (item.labels == names.index("sky")).nonzero()[:, 0].float().mean() == sky


def test_the_real_davis(tmp_path):
    [video] = annotations.videos("davis", unpack("davis_subset", tmp_path))
    assert video.name == "car-shadow" and video.masks.shape == (40, 480, 854) and video.objects == 1
    assert video.frames[39].shape == (3, 480, 854)
    scores = metrics.video_scores([metrics.score_video(video.masks.roll(5, 2), video.masks)])
    assert 0.9 < scores["j"] < 0.95 and scores["f"] == 1   # 5 pixels: within the tolerance of 8


def test_the_real_coco(tmp_path):
    pytest.importorskip("pycocotools")
    root = unpack("coco_subset", tmp_path)
    items = list(annotations.masks("coco", root, "train"))
    assert sum(len(item.masks) for item in items) == 152
    gaps = []
    for item in items:
        assert item.masks.shape == (len(item.boxes), *item.image.shape[1:])
        for mask, box, area, crowd in zip(item.masks, item.boxes, item.areas, item.crowd):
            y, x = mask.nonzero().unbind(1)
            around = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            gaps.append((around - box).abs().max().item())
            assert crowd or abs(mask.sum() - area) < 0.1 * area + 30
    assert sum(gap < 1.5 for gap in gaps) >= 140 and max(gaps) < 8   # thin tips cover no pixel
    labels = {item.id: item.labels for item in annotations.segmentation("coco", root, "train")}
    assert sum((label == 255).any() for label in labels.values()) == 1
    people = [(item, points) for item in annotations.keypoints("coco", root, "train")
              for points in item.points.flatten(0, 1) if points[2] == 2]
    hits = [labels[item.id][int(y), int(x)] > 0 for item, (x, y, _) in people]
    assert len(hits) > 200 and sum(hits) > 0.95 * len(hits)
