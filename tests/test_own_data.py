"""Your own annotated data (probes/own_data.py): folders as people have them, written here and
checked by hand."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from lib import datasets, tree
from probes import annotations, detection, label_crops, own_data, retrieval
from probes.common import Options

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")    # of pycocotools


@pytest.fixture(autouse=True)
def clear_caches(monkeypatch):
    for cached in (own_data.find_label_maps, own_data.find_objects, annotations.read_coco_json,
                   datasets.print_once):
        getattr(cached, "cache_clear", lambda: None)()
    notes = []
    monkeypatch.setattr(datasets, "print_once", lambda note, *_: notes.append(note))
    return notes


def write_image(path, width=8, height=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 140, 30)).save(path)


def write_labels(path, *values, mode="L", width=8, height=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array(values)[np.arange(width) * len(values) // width]
    Image.fromarray(row[None].repeat(height, 0).astype(np.uint8)).convert(mode).save(path)


def write_pair(root, image, labels, *values):
    write_image(root / image)
    write_labels(root / labels, *values)


def labels_of(folder, split):
    return [(item.id, item.labels[0].unique_consecutive().tolist())
            for item in annotations.segmentation(str(folder), split=split)]


# ---- label maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("image, labels", [
    ("images/{split}/{name}.jpg", "labels/{split}/{name}.png"),
    ("{split}/images/{name}.jpg", "{split}/masks/{name}.png"),
    ("img_dir/{split}/{name}.png", "ann_dir/{split}/{name}.png"),
    ("img/{split}/{name}.png", "ann/{split}/{name}.png"),
    ("{split}/{name}.png", "{split}annot/{name}.png"),
    ("{split}/{name}.png", "{split}_labels/{name}_L.png"),
])
def test_an_image_and_its_label_map_are_paired_in_all_usual_layouts(tmp_path, image, labels):
    for split, name, values in (("train", "a", (0, 1)), ("train", "b", (1, 2)), ("val", "a", (2,))):
        write_pair(tmp_path, image.format(split=split, name=name),
                   labels.format(split=split, name=name), *values)
    (tmp_path / "classes.txt").write_text("road\ncar\nsky\n")
    assert labels_of(tmp_path, "train") == [("train/a", [0, 1]), ("train/b", [1, 2])]
    assert labels_of(tmp_path, "val") == [("val/a", [2])]
    assert annotations.segmentation_classes(str(tmp_path)) == ["road", "car", "sky"]
    images = datasets.load_images(str(tmp_path))           # pretraining does not see the label maps
    assert len(images) == 2 and images.classes is None
    assert not any("annot" in path or "labels" in path or "masks" in path for path in images.paths)
    assert any("passed over: 3 label maps" in note for note in images.notes)


def test_lists_split_flat_folders_and_without_them_every_fifth_is_tested(tmp_path, clear_caches):
    for name in "abcdef":
        write_pair(tmp_path, f"images/{name}.png", f"labels/{name}_P.png", 0, 1)
    assert [name for name, _ in labels_of(tmp_path, "test")] == ["a", "f"]
    assert [name for name, _ in labels_of(tmp_path, "train")] == list("bcde")
    assert any("no classes.txt: the numbers in the label maps" in note for note in clear_caches)
    own_data.find_label_maps.cache_clear()
    (tmp_path / "valid.txt").write_text("b.png\nimages/d.png labels/d.png\n")
    assert [name for name, _ in labels_of(tmp_path, "test")] == ["b", "d"]
    assert [name for name, _ in labels_of(tmp_path, "train")] == list("acef")
    own_data.find_label_maps.cache_clear()
    (tmp_path / "train.txt").write_text("a\nc\n")
    assert [name for name, _ in labels_of(tmp_path, "train")] == ["a", "c"]


def test_lists_name_images_by_their_path_or_its_end(tmp_path, clear_caches):
    for name in ("1", "seqA/0", "seqA/1", "seqB/0", "seqB/1", "seqB/a.1", "seqB/pig 1"):
        write_pair(tmp_path, f"images/{name}.png", f"labels/{name}.png", 0, 1)
    (tmp_path / "train.txt").write_text("seqA/0\nimages/seqA/1.png\n")
    (tmp_path / "val.txt").write_text("seqB/0\nseqB/a.1\npig 1.png\nseqC/0\n")
    maps = own_data.find_label_maps(str(tmp_path)).items
    assert [key for key, *_ in maps["train"]] == ["seqA/0", "seqA/1"]
    assert [key for key, *_ in maps["test"]] == ["seqB/0", "seqB/a.1", "seqB/pig 1"]
    assert any("1 lines of val.txt name no image with annotations: seqC/0" in note
               for note in clear_caches)


def test_classes_have_numbers_and_void_is_ignored(tmp_path):
    for name, values in (("a", (0, 4, 7, 255)), ("b", (7,))):
        write_pair(tmp_path, f"images/{name}.png", f"labels/{name}.png", *values)
    (tmp_path / "codes.txt").write_text("0 Void\n4: tree\n7, tall building\n")
    assert annotations.segmentation_classes(str(tmp_path)) == ["tree", "tall building"]
    assert labels_of(tmp_path, "test") == [("a", [255, 0, 1, 255])]
    own_data.find_label_maps.cache_clear()
    write_labels(tmp_path / "labels/a.png", 5)
    with pytest.raises(ValueError, match="a.png is damaged .* number 5 is not a class.*own-data"):
        labels_of(tmp_path, "test")


def test_files_without_a_partner_are_counted(tmp_path, clear_caches):
    for name in "abc":
        write_pair(tmp_path, f"images/{name}.png", f"labels/{name}.png", 0, 1)
    write_image(tmp_path / "images/d.png")
    labels_of(tmp_path, "test")
    assert any("not used: 1 images without a label map: images/d.png" in note
               for note in clear_caches)


@pytest.mark.parametrize("damage, message", [
    (lambda root: [write_labels(root / f"labels/{name}.png", 0, 255) for name in "ab"],
     "contain only 0 and 255.*save the object as 1"),
    (lambda root: write_labels(root / "labels/a.png", 0, 1, mode="RGB"), "was it saved in color"),
    (lambda root: [write_labels(root / "labels/a.png", 0, 255),              # one mask is empty
                   write_labels(root / "labels/b.png", 0)], "contain only 0 and 255"),
    (lambda root: [write_labels(root / f"labels/{name}.png", 0) for name in "ab"], "only 1 class"),
    (lambda root: [(root / f"labels/{name}.png").rename(root / f"labels/other{name}.png")
                   for name in "ab"], "no label map in .* has the name of an image"),
    (lambda root: write_image(root / "images/a.jpg"), "two files for one image or label map"),
    (lambda root: write_labels(root / "labels/a.png", 0, 1, width=5), "other proportions"),
    (lambda root: [(root / f"images/{name}.png").unlink() or (root / f"labels/{name}.png").unlink()
                   for name in "b"], "only one annotated image"),
    (lambda root: (root / "classes.txt").write_text("road\n\ncar\n"), "the name of a class"),
    (lambda root: (root / "classes.txt").write_text("1 road\n1 car\n"), "the name of a class"),
])
def test_damaged_label_maps_are_one_sentence(tmp_path, damage, message):
    for name in "ab":
        write_pair(tmp_path, f"images/{name}.png", f"labels/{name}.png", 0, 1)
    labels_of(tmp_path, "test")                            # control: without the damage it is read
    own_data.find_label_maps.cache_clear()
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        labels_of(tmp_path, "test")
        labels_of(tmp_path, "train")


def test_a_lossy_label_map_is_refused(tmp_path):
    for name in "ab":
        write_pair(tmp_path, f"images/{name}.png", f"labels/{name}.jpg", 0, 1)
    with pytest.raises(ValueError, match="a.jpg is a JPEG file.*save it as PNG"):
        labels_of(tmp_path, "test")


def test_class_folders_that_are_called_like_these_remain_classes():
    paths = ["mask/1.png", "mask/2.png", "no_mask/3.png"]
    images, labels = tree.pair_label_maps(paths)
    assert not images.keys() & labels.keys()               # not a pair: load_tree keeps all images


def test_a_missing_kind_names_the_page(tmp_path):
    write_image(tmp_path / "a.png")
    for read, what in ((annotations.segmentation, "segmentation"), (annotations.boxes, "boxes"),
                       (annotations.masks, "masks"), (annotations.keypoints, "keypoints")):
        assert not annotations.has(what, str(tmp_path))
        with pytest.raises(ValueError, match=f"no {what} in .*docs/own-data.md"):
            read(str(tmp_path))
    with pytest.raises(ValueError, match="no boxes of 'nothing' here.* or a folder"):
        annotations.boxes("nothing")


# ---- COCO's JSON ---------------------------------------------------------------------------------

SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]


def coco(names, ids=(7, 3), **fields):
    """Content of a JSON file: an object of the second category in each image."""
    return dict(
        images=[dict(id=i, file_name=name, width=8, height=6) for i, name in enumerate(names)],
        annotations=[dict(id=i, image_id=i, category_id=ids[1], **{"bbox": [1, 1, 4, 3], **fields})
                     for i in range(len(names))],
        categories=[dict(id=ids[0], name="unused"), dict(id=ids[1], name="cow", **(
            dict(keypoints=["nose", "tail"]) if "keypoints" in fields else {}))])


def write_coco(root, image, path, names, **fields):
    for name in names:
        write_image(root / image / name)
    path = root / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco(names, **fields)))


@pytest.mark.parametrize("image, path", [
    ("{split}", "{split}/_annotations.coco.json"),
    ("{split}2017", "annotations/instances_{split}2017.json"),
    ("images/{split}", "annotations/{split}.json"),
    ("images", "{split}.json"),
])
def test_coco_files_are_found_in_all_usual_layouts(tmp_path, clear_caches, image, path):
    for split, names in (("train", ["a.png", "b.png"]), ("val", ["c.png"])):
        write_coco(tmp_path, image.format(split=split), path.format(split=split), names,
                   ids=(7, 3) if split == "train" else (1, 2))      # other ids, the same class
    (tmp_path / "settings.json").write_text("{}")
    folder = str(tmp_path)
    for split, n in (("train", 2), ("val", 1)):
        items = list(annotations.boxes(folder, split=split))
        assert len(items) == n
        assert all(item.boxes.tolist() == [[1, 1, 5, 4]] and item.labels.tolist() == [0] and
                   item.areas.tolist() == [12] and not item.crowd.any() for item in items)
    assert annotations.box_classes(folder) == ["cow"]      # a category without objects is no class
    assert annotations.has("boxes", folder) and not annotations.has("masks", folder)
    assert any("2 training and 1 test images with 3 objects" in note for note in clear_caches)


@pytest.mark.parametrize("change, message", [
    (dict(bbox=[0.1, 0.1, 0.5, 0.5]), "all boxes are smaller than a pixel"),
    (dict(bbox=[6, 4, 8, 6]), "extends to x 14, y 10"), (dict(iscrowd=1), "no image for testing")])
def test_boxes_that_cannot_be_meant_are_refused(tmp_path, change, message):
    write_coco(tmp_path, "train", "train.json", ["a.png"])
    write_coco(tmp_path, "val", "val.json", ["c.png"], **change)
    with pytest.raises(ValueError, match=message):
        next(annotations.boxes(str(tmp_path)))


def test_an_area_of_zero_is_that_of_the_box(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path, split, f"{split}.json", ["a.png"], area=0)
    assert next(annotations.boxes(str(tmp_path))).areas.tolist() == [12]


def test_own_boxes_are_retrieved_from_the_command_line(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path, split, f"{split}.json", ["a.png", "b.png"])
    flags = ["--device", "cpu", "--baseline", "pixels", "--data", str(tmp_path), "--out",
             str(tmp_path / "out"), "--task", "object_retrieval", "--max-aspect", "2"]
    with pytest.raises(ValueError, match="no box has sides of at least 64 px and at most 2 : 1"):
        evaluate.main(flags)
    evaluate.main([*flags, "--min-side", "1"])
    [line] = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert line["images"] == {"items": 2}


def test_one_file_is_split_and_its_masks_become_label_maps(tmp_path):
    pytest.importorskip("pycocotools")
    names = [f"{i}.png" for i in range(6)]
    write_coco(tmp_path, "images", "annotations/instances_default.json", names, segmentation=SQUARE)
    folder = str(tmp_path)
    assert [item.id for item in annotations.masks(folder)] == [0, 5]
    assert annotations.segmentation_classes(folder) == ["background", "cow"]
    items = list(annotations.segmentation(folder, split="train"))
    assert len(items) == 4 and items[0].labels[2].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_keypoints_have_the_names_of_the_category(tmp_path):
    write_coco(tmp_path, "", "person_keypoints_train.json", ["a.png", "b.png"],
               keypoints=[1, 2, 2, 3, 4, 1], num_keypoints=2)
    write_coco(tmp_path, "", "instances_train.json", ["a.png", "b.png"])
    folder = str(tmp_path)
    assert annotations.part_names(folder) == ["nose", "tail"]
    [item] = annotations.keypoints(folder, split="train")
    assert item.points.tolist() == [[[1, 2, 2], [3, 4, 1]]] and item.areas.tolist() == [12]
    assert len(list(annotations.keypoints(folder, split=None))) == 2
    assert not own_data.find_objects(folder, "boxes")["train"].parts


@pytest.mark.parametrize("damage, message", [
    (lambda c: c["annotations"][0].pop("bbox"), "annotation 0: KeyError: 'bbox'"),
    (lambda c: c["annotations"][0].pop("category_id"), "annotation 0: KeyError: 'category_id'"),
    (lambda c: c["images"][0].update(file_name="x.png") or c["images"].pop(1) and
     c["annotations"].pop(1), "its images, such as x.png, are not in"),
    (lambda c: c["categories"].append(dict(id=9, name="pig", keypoints=["eye"])) or
     c["annotations"][0].update(category_id=9), None),     # keypoints of one category only: read
])
def test_damaged_coco_files_are_one_sentence(tmp_path, damage, message):
    write_coco(tmp_path, "images", "all.json", ["a.png", "b.png"])
    content = coco(["a.png", "b.png"])
    damage(content)
    (tmp_path / "all.json").write_text(json.dumps(content))
    if message is None:
        assert annotations.box_classes(str(tmp_path)) == ["cow", "pig"]
        return
    with pytest.raises(ValueError, match=message) as error:
        list(annotations.boxes(str(tmp_path), split="test"))
    assert "\n" not in str(error.value)


def test_files_of_one_split_that_cannot_be_told_apart_are_named(tmp_path):
    write_coco(tmp_path, "", "train_a.json", ["a.png", "b.png"])
    write_coco(tmp_path, "", "train_b.json", ["a.png", "b.png"])
    with pytest.raises(ValueError, match="train_a.json, .*train_b.json have annotations of"):
        annotations.has("boxes", str(tmp_path))


# ---- VOC's XML -----------------------------------------------------------------------------------


@pytest.mark.parametrize("image, path", [
    ("JPEGImages/{}.jpg", "Annotations/{}.xml"), ("{}.jpg", "{}.xml")])
def test_voc_boxes_count_from_one_and_difficult_ones_are_ignored(tmp_path, image, path):
    for name in "abc":
        write_image(tmp_path / image.format(name))
        write_labels(tmp_path / f"SegmentationClass/{name}.png", 0, 1)       # are no images
        file = tmp_path / path.format(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        objects = "".join(
            f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox><xmin>2</xmin>"
            "<ymin>1</ymin><xmax>5</xmax><ymax>3</ymax></bndbox></object>"
            for kind, difficult in (("dog", 0), ("cat", int(name == "a"))))
        file.write_text(f"<annotation><size><width>8</width><height>6</height></size>{objects}"
                        "</annotation>")
    lists = tmp_path / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\nc\n")
    (lists / "val.txt").write_text("a\n")
    folder = str(tmp_path)
    [item] = annotations.boxes(folder)
    assert item.boxes.tolist() == [[1, 0, 5, 3]] * 2 and item.labels.tolist() == [1, 0]
    assert abs(item.image.float().mean((1, 2)) - torch.tensor([90, 140, 30])).max() < 3
    assert item.crowd.tolist() == [False, True] and item.areas.tolist() == [12, 12]
    assert len(list(annotations.boxes(folder, split="train"))) == 2
    assert annotations.box_classes(folder) == ["cat", "dog"]


# ---- the probes ----------------------------------------------------------------------------------


def test_without_masks_the_detector_has_no_mask_head(tmp_path):
    write_coco(tmp_path, "", "all.json", ["a.png", "b.png"])
    [item] = annotations.boxes(str(tmp_path))
    recipe = detection.DETECTOR | detection.DETECTION_RECIPES["1x"]
    image, target = detection.training_view(item, recipe, 32, (0.5,) * 3)
    assert set(target) == {"boxes", "labels"} and target["labels"].tolist() == [1]
    assert detection.draw_objects(item.image, item).shape == item.image.shape


def test_part_retrieval_takes_the_split_of_coco_that_is_there(tmp_path):
    for split in ("train", "val"):
        options = Options(task="part_retrieval", data="coco", data_root=str(tmp_path))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        path = tmp_path / f"annotations/person_keypoints_{split}2017.json"
        path.write_text("{}")
        (tmp_path / f"{split}2017").mkdir()
        assert retrieval.choose_parts(options)[2][0] == dict(train="train", val="test")[split]
        path.unlink()
    with pytest.raises(FileNotFoundError, match="person_keypoints"):
        next(annotations.keypoints("coco", tmp_path, "train"))


def test_figures_of_a_folder_are_named_by_its_last_part(tmp_path):
    write_pair(tmp_path, "images/a.png", "labels/a.png", 0, 1)
    write_pair(tmp_path, "images/b.png", "labels/b.png", 0, 1)
    options = Options(task="linear_segmentation", data=str(tmp_path), out="out")
    path = label_crops.figure_path(type("Model", (), dict(name="m")), options)
    assert str(path) == f"out/linear_segmentation-{tmp_path.name}-m.png"
    assert torch.is_tensor(next(annotations.segmentation(str(tmp_path))).labels)
    with pytest.raises(ValueError, match="one list of classes: leave out --level"):
        annotations.segmentation_classes(str(tmp_path), "part")
