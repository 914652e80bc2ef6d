"""Keypoints, boxes, landmarks and cue conflicts of probes/annotations.py: tiny data sets in the
official layouts, written here and checked by hand, and subsets of the real ones; errors."""
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lib import datasets, toy
from probes import annotations, retrieval

REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")


@pytest.fixture(autouse=True)
def clear_cache():
    annotations.read_coco_json.cache_clear()


def write_image(path, size=(64, 48), mode="RGB", value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def write_json(path, **content):
    write_text(path, json.dumps(content))


def file_names(paths):
    return [os.path.basename(path) for path in paths]


# ---- keypoints and boxes -------------------------------------------------------------------------


def write_cub(root, folder="CUB_200_2011"):
    """Four birds. The eye, leg, wing and tail of Zhu et al. (2023) are parts 11, 12, 9 and 14."""
    root = root / folder
    seen = {2: {11: (60, 80), 12: (120, 80)},              # 60 apart: crops of side 2 round(60/4)
            5: {11: (60, 80)},                             # a single part: no crop
            6: {11: (60, 80), 9: (90, 80)},                # 30 apart: d/2 is not above 20
            9: {14: (10, 10), 9: (10.5, 100), 1: (10, 50)}}
    names = [f"{i // 6 + 1:03}.Bird/Bird_{i}.jpg" for i in seen]
    for i, name in zip(seen, names):
        write_image(root / "images" / name, (200, 160), "L" if i == 5 else "RGB")
    write_text(root / "images.txt", *(f"{i} {name}" for i, name in zip(seen, names)))
    write_text(root / "train_test_split.txt", "2 1", "5 0", "6 1", "9 0")
    write_text(root / "bounding_boxes.txt", *(f"{i} {i}.0 20.0 30.0 40.5" for i in seen))
    write_text(root / "parts/part_locs.txt", *(
        "{} {} {:.1f} {:.1f} {}".format(i, p, *parts.get(p, (0, 0)), int(p in parts))
        for i, parts in seen.items() for p in range(1, 16)))
    return root


@pytest.mark.parametrize("folder", ["CUB_200_2011", "."])
def test_cub_has_one_bird_per_image_and_fifteen_parts(tmp_path, folder):
    write_cub(tmp_path, folder)
    items = list(annotations.keypoints("cub", tmp_path, None))
    assert [item.id for item in items] == [2, 5, 6, 9]
    for split, ids in (("train", [2, 6]), ("test", [5, 9]), ("val", [5, 9])):
        assert [item.id for item in annotations.keypoints("cub", tmp_path, split)] == ids
    assert [item.id for item in annotations.keypoints("cub", tmp_path, None, limit=2)] == [2, 6]
    names, item = annotations.part_names("cub"), items[3]
    assert item.points.shape == (1, 15, 3) and item.points.dtype == torch.float32
    assert item.points[0, names.index("left_wing")].tolist() == [10.5, 100, 2]
    assert item.points[0, names.index("beak")].tolist() == [0, 0, 0]
    assert item.boxes.tolist() == [[9, 20, 39, 60.5]] and item.crowd.tolist() == [False]
    for item in items:
        assert item.image.shape == (3, 160, 200) and item.image.dtype == torch.uint8


def test_crops_of_cub_follow_the_code_and_the_paper(tmp_path):
    write_cub(tmp_path)
    _, _, parts, _ = retrieval.KEYPOINT_DATA["cub"]
    names = annotations.part_names("cub")

    def labels(rule):
        items = annotations.keypoints("cub", tmp_path, None)
        return [label for _, label in retrieval.crop_parts(items, names, parts, 30, rule)]

    assert labels("code") == [0, 1, 2, 3]                  # bird 2: eye and leg; bird 9: wing, tail
    assert labels("paper") == [0, 1, 2]                    # the back is 40.0 from the tail: dropped


@pytest.mark.parametrize("file, content", [
    ("parts/part_locs.txt", "2 1 here 67.0 1\n"), ("parts/part_locs.txt", "2 1 138.0 67.0 1\n"),
    ("parts/part_locs.txt", ""), ("bounding_boxes.txt", "2 1.0 2.0\n"), ("images.txt", "two a\n"),
    ("images.txt", "2 a b.jpg\n"), ("train_test_split.txt", "3 1\n"), ("images.txt", "\0\xff"),
])
def test_a_damaged_cub_is_an_error_that_names_the_file(tmp_path, file, content):
    (write_cub(tmp_path) / file).write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="does not have the format of cub .*: expected CUB_200_2"):
        list(annotations.keypoints("cub", tmp_path, "train"))


def write_coco(root, images="coco/", split="train2017"):
    """Three images, with a crowd, categories 1 and 90, and persons. One has no annotation."""
    sizes = {9: (64, 48), 25: (50, 70), 30: (40, 40)}
    for i, size in sizes.items():
        write_image(root / f"{images}{split}/{i:012}.jpg", size, "L" if i == 30 else "RGB")
    shared = dict(images=[dict(id=i, file_name=f"{i:012}.jpg", width=w, height=h)
                          for i, (w, h) in sizes.items()])
    counts = {"size": [48, 64], "counts": [0, 3072]}
    write_json(root / f"coco/annotations/instances_{split}.json", **shared, annotations=[
        dict(id=1, image_id=9, category_id=90, bbox=[1.5, 2, 10, 20.25], area=150.5, iscrowd=0,
             segmentation=[[1, 2, 3, 4, 5, 6]]),
        dict(id=2, image_id=30, category_id=1, bbox=[0, 0, 40, 40], area=9, iscrowd=0,
             segmentation=[]),
        dict(id=3, image_id=9, category_id=1, bbox=[0, 0, 64, 48], area=3072, iscrowd=1,
             segmentation=counts)], categories=[])
    person = dict(category_id=1, iscrowd=0, area=800.0, bbox=[0, 0, 20, 40])
    points = [[0, 0, 0]] * 17
    one, two = list(points), list(points)
    one[0], one[10] = [5, 6, 2], [5, 60, 2]                # nose and right wrist, 54 apart
    two[15], two[16] = [30, 40, 1], [31, 41, 2]
    rows = [(1, 25, one, 2), (2, 9, points, 0), (3, 25, two, 2)]
    write_json(root / f"coco/annotations/person_keypoints_{split}.json", **shared, annotations=[
        person | dict(id=i, image_id=image, keypoints=sum(p, []), num_keypoints=n)
        for i, image, p, n in rows], categories=[])


@pytest.mark.parametrize("images", ["coco/", "coco/images/"])
def test_coco_boxes_have_labels_without_gaps(tmp_path, images):
    write_coco(tmp_path, images)
    one, none, other = annotations.boxes("coco", tmp_path, "train")
    names = annotations.box_classes("coco")
    assert (one.id, none.id, other.id) == (9, 25, 30)
    assert one.boxes.tolist() == [[1.5, 2, 11.5, 22.25], [0, 0, 64, 48]]
    assert one.labels.tolist() == [79, 0] and one.labels.dtype == torch.int64
    assert [names[i] for i in one.labels] == ["toothbrush", "person"]
    assert one.crowd.tolist() == [False, True] and one.areas.tolist() == [150.5, 3072]
    assert none.boxes.shape == (0, 4) and len(none.labels) == len(none.crowd) == 0
    assert one.image.shape == (3, 48, 64) and other.image.shape == (3, 40, 40)
    limited = [item.id for item in annotations.boxes("coco", tmp_path / "coco", "train", limit=2)]
    assert limited == [9, 25]
    with pytest.raises(FileNotFoundError, match="^No coco/annotations/instances_val2017"):
        list(annotations.boxes("coco", tmp_path, "val"))


def test_coco_is_ordered_by_file_name(tmp_path):
    """So image number n is the same with and without annotations, for any limit."""
    write_coco(tmp_path)
    path = tmp_path / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    write_json(path, **content | dict(images=[content["images"][i] for i in (2, 0, 1)]))
    for limit, ids in ((None, [9, 25, 30]), (2, [9, 25])):
        plain = datasets.load_images("coco", root=str(tmp_path), split="train", limit=limit)
        found = [item.id for item in annotations.boxes("coco", tmp_path, "train", limit)]
        assert found == ids == [int(file[-16:-4]) for file in plain.paths]


def test_coco_has_eighty_classes():
    names, labels = annotations.COCO_CLASSES, annotations.LABELS
    assert len(names) == len(set(names)) == len(labels) == 80
    assert labels[13] == 11 and names[11] == "stop sign"   # 12 is a gap
    assert labels[90] == 79 and 12 not in labels
    assert len(annotations.COCO_PARTS) == 17 and len(annotations.CUB_PARTS) == 15


def test_coco_keypoints_are_of_images_that_show_a_person(tmp_path, monkeypatch):
    write_coco(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    [item] = annotations.keypoints("coco", split="train")
    assert item.id == 25 and item.points.shape == (2, 17, 3)
    assert item.points[0, 10].tolist() == [5, 60, 2] and item.points[1, 15].tolist() == [30, 40, 1]
    assert item.areas.tolist() == [800, 800] and item.boxes[0].tolist() == [0, 0, 20, 40]
    _, _, parts, _ = retrieval.KEYPOINT_DATA["coco"]
    names = annotations.part_names("coco")
    crops = list(retrieval.crop_parts([item], names, parts, 26))
    assert [label for _, label in crops] == [0, 1]         # the ankles are another's, and occluded
    # Side 2 round(54/4) = 28 around (5, 6): 9 columns and 8 rows of it lie outside of the image.
    [(nose, _), _] = retrieval.crop_parts([item], names, parts, 28)
    assert nose[:, :8].max() == 0 and nose[:, :, :9].max() == 0 and nose[2, 8:, 9:].min() > 240


def test_coco_is_parsed_once(tmp_path, monkeypatch):
    write_coco(tmp_path)
    loads, parse = [], json.load
    monkeypatch.setattr(json, "load", lambda file: loads.append(file.name) or parse(file))
    for _ in range(3):
        assert len(list(annotations.boxes("coco", tmp_path, "train"))) == 3
    assert len(loads) == 1


THIRD = "image 000000000009.jpg, annotation 3"


@pytest.mark.parametrize("change, why", [
    (lambda c: c["annotations"][2].update(category_id=12), f"{THIRD}: KeyError: 12"),
    (lambda c: c["annotations"][2].update(image_id=12345), "annotation 3: KeyError: 12345"),
    (lambda c: c["annotations"][2].update(bbox=[1, 2, 3]), f"{THIRD}: RuntimeError"),
    (lambda c: c["annotations"][2].pop("iscrowd"), f"{THIRD}: KeyError: 'iscrowd'"),
    (lambda c: c["annotations"][2].update(area=None), f"{THIRD}: TypeError"),
    (lambda c: c["images"][1].pop("file_name"), "image number 2: KeyError: 'file_name'"),
    (lambda c: c.pop("images"), "KeyError: 'images'"),
    (None, "JSONDecodeError"),
])
def test_a_damaged_coco_is_an_error_that_names_the_file(tmp_path, change, why):
    write_coco(tmp_path)
    path = tmp_path / "coco/annotations/instances_train2017.json"
    whole = path.read_text()
    if change:
        content = json.loads(whole)
        change(content)
        write_json(path, **content)
    else:
        path.write_text(whole[:len(whole) // 2])
    with pytest.raises(ValueError) as error:
        list(annotations.boxes("coco", tmp_path, "train"))
    message = str(error.value)
    assert message.startswith(f"{path} is damaged or does not have the format of coco ({why}")
    assert "expected coco/{train2017" in message and "\n" not in message


def test_unreadable_images_are_left_out_and_listed(tmp_path, capsys):
    write_coco(tmp_path)
    path = tmp_path / "coco/train2017/000000000025.jpg"
    path.write_bytes(b"not an image")
    assert [item.id for item in annotations.boxes("coco", tmp_path, "train")] == [9, 30]
    assert f"left out 1 of 3 images of coco that cannot be read: {path} (cannot identify" in (
        capsys.readouterr().err)
    with pytest.raises(datasets.UnreadableImage, match="1 of 1 images of coco cannot be read"):
        list(annotations.keypoints("coco", tmp_path, "train"))


# ---- images of another size than their annotation ------------------------------------------------


def resize_file(path, size):
    Image.open(path).resize(size).save(path)


def test_coco_images_that_were_resized_on_disk_are_resized_to_their_annotation(tmp_path, capsys):
    write_coco(tmp_path)
    path = tmp_path / "coco/train2017/000000000009.jpg"
    expected = next(annotations.boxes("coco", tmp_path, "train"))
    for size in ((32, 24), (19, 14), (128, 96)):           # 19 x 14: rounded down
        resize_file(path, size)
        item = next(annotations.boxes("coco", tmp_path, "train"))
        assert item.image.shape == expected.image.shape == (3, 48, 64)
        assert torch.equal(item.boxes, expected.boxes)
        assert (item.image.float() - expected.image.float()).abs().max() < 8
    assert capsys.readouterr().err.count("another size on disk than in their annotation") <= 1
    resize_file(path, (48, 48))
    with pytest.raises(ValueError, match=f"{path} has 48 x 48 pixels and its annotation 64 x 48"):
        next(annotations.boxes("coco", tmp_path, "train"))
    content = json.loads((tmp_path / "coco/annotations/instances_train2017.json").read_text())
    for image in content["images"]:                        # unknown: not compared
        del image["width"], image["height"]
    write_json(tmp_path / "coco/annotations/instances_train2017.json", **content)
    annotations.read_coco_json.cache_clear()
    assert next(annotations.boxes("coco", tmp_path, "train")).image.shape == (3, 48, 48)


def test_an_image_is_turned_if_only_then_its_annotation_fits(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "coco/train2017/000000000009.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6                                       # as stored by phones: on its side
    image = Image.new("RGB", (64, 48))
    image.paste((255, 0, 0), (0, 0, 64, 10))
    image.save(path, exif=exif)
    stored = next(annotations.boxes("coco", tmp_path, "train")).image
    assert stored.shape == (3, 48, 64) and stored[0, :8].min() > 200       # fits: not turned
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    turned = next(annotations.boxes("coco", tmp_path, "train")).image
    assert turned.shape == (3, 48, 64) and turned[0, :8].min() > 200


def test_cub_images_that_were_resized_on_disk_are_refused(tmp_path):
    write_cub(tmp_path)
    path = tmp_path / "CUB_200_2011/images/001.Bird/Bird_2.jpg"
    resize_file(path, (112, 90))                           # the leg is at x 120: 7% beyond
    assert len(list(annotations.keypoints("cub", tmp_path, None))) == 4
    resize_file(path, (100, 80))
    with pytest.raises(ValueError, match=f"{path} has 100 x 80 pixels, but .* x 120, y 80: was it"):
        list(annotations.keypoints("cub", tmp_path, None))


@pytest.mark.parametrize("name", ["toy", pytest.param("toy-scenes", marks=pytest.mark.slow)])
def test_toy_items_are_the_images_and_annotations_of_toy_draw(name):
    items = list(annotations.keypoints(name, split="test", limit=70, size=96))
    expected = toy.draw(torch.arange(70), "test", 96, name == "toy-scenes", annotate=True)
    visible = 0
    for i, item in enumerate(items):
        seen = expected["classes"][i] >= 0
        assert item.image.equal(expected["image"][i]) and item.id == i
        assert item.points.equal(expected["keypoints"][i, seen])
        assert item.boxes.equal(expected["boxes"][i, seen]) and (item.areas > 0).all()
        assert item.areas.sum() == (expected["instances"][i] > 0).sum()
        for x, y, v in item.points.flatten(0, 1).tolist():
            if v == 2:
                visible += 1
                assert expected["instances"][i][int(y), int(x)] > 0
        for number, (x, y, v) in enumerate(item.points[0].tolist(), 1):
            assert v < 2 or expected["parts"][i][int(y), int(x)] == number
    assert visible > 70 and annotations.part_names(name) == toy.PARTS
    found = list(annotations.boxes(name, split="train", limit=2, size=64))
    assert found[1].image.shape == (3, 64, 64) and annotations.box_classes(name) == toy.CLASSES
    assert len(found[1].boxes) == len(found[1].labels) == len(found[1].crowd)


# ---- landmarks, cue conflicts --------------------------------------------------------------------


def write_landmarks(root, gnd=None, name="roxford5k", protocol=2):
    gnd = gnd or [dict(bbx=[1.5, 2.0, 30.0, 40.0], easy=[0, 4], hard=[], junk=[5]),
                  dict(bbx=[0, 0, 9, 9], easy=[], hard=[1, 2], junk=[])]
    content = dict(imlist=[f"all_souls_00000{i}" for i in range(6)], qimlist=["q1", "q2"], gnd=gnd)
    (root / name / "jpg").mkdir(parents=True, exist_ok=True)
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_landmarks_are_paths_boxes_and_numbers(tmp_path, protocol, kind):
    write_landmarks(tmp_path, [
        dict(bbx=[1.5, 2.0, 30.0, 40.0], easy=kind([0, 4]), hard=kind([]), junk=kind([5])),
        dict(bbx=[0, 0, 9, 9], easy=kind([]), hard=kind([1, 2]), junk=kind([]))], protocol=protocol)
    found = annotations.landmarks("roxford5k", tmp_path)
    assert found.database[4] == str(tmp_path / "roxford5k" / "jpg" / "all_souls_000004.jpg")
    assert file_names(found.queries) == ["q1.jpg", "q2.jpg"]
    assert found.boxes.tolist() == [[1.5, 2, 30, 40], [0, 0, 9, 9]]
    assert [x.tolist() for x in found.easy] == [[0, 4], []]
    assert [x.tolist() for x in found.hard] == [[], [1, 2]]
    assert [x.tolist() for x in found.junk] == [[5], []]
    assert all(x.dtype == torch.int64 for x in found.easy + found.hard + found.junk)


class Malicious:
    """Creates a folder when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("gnd, why", [
    ([dict(bbx=[0, 0, 9, 9], easy=[6], hard=[], junk=[])] * 2, "does not match the lists"),
    ([dict(bbx=[0, 0, 9, 9], easy=[], hard=[], junk=[-1])] * 2, "does not match the lists"),
    ([dict(bbx=[0, 0, 9, 9], easy=[], hard=[], junk=[])], "does not match the lists"),
    ([dict(bbx=[0, 0, 9], easy=[], hard=[], junk=[])] * 2, "RuntimeError"),
    ([dict(bbx=[0, 0, 9, 9], easy=[], junk=[])] * 2, "KeyError: 'hard'"),
])
def test_damaged_landmarks_are_an_error_that_names_the_file(tmp_path, gnd, why):
    write_landmarks(tmp_path, gnd)
    with pytest.raises(ValueError, match=f"gnd_roxford5k.pkl is damaged or does .*{why}"):
        annotations.landmarks("roxford5k", tmp_path)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    write_landmarks(tmp_path, [Malicious(tmp_path / "owned")])
    with pytest.raises(ValueError, match=r"mkdir.* refused\): expected roxford5k/{jpg"):
        annotations.landmarks("roxford5k", tmp_path)
    assert not (tmp_path / "owned").exists()
    pickle.loads((tmp_path / "roxford5k" / "gnd_roxford5k.pkl").read_bytes())
    assert (tmp_path / "owned").exists()                   # control: the pickle is harmful


def test_cue_conflicts_are_read_from_the_file_names(tmp_path):
    folder = tmp_path / "cue-conflict"
    for path in ("cat/cat1-dog1.png", "cat/cat2-cat3.png", "dog/0007_cue_s1_dog2-cat1.png",
                 "car/car10-elephant2.png"):
        write_image(folder / path)
    found = annotations.cue_conflict("imagenet", tmp_path)
    pairs = [(found.classes[s], found.classes[t]) for s, t in zip(found.shapes, found.textures)]
    assert file_names(found.images.paths) == ["car10-elephant2.png", "cat1-dog1.png",
                                              "cat2-cat3.png", "0007_cue_s1_dog2-cat1.png"]
    assert pairs == [("car", "elephant"), ("cat", "dog"), ("cat", "cat"), ("dog", "cat")]
    assert len(found.classes) == 16
    for wrong in ("cat1.png", "cat1-unicorn1.png", "cat-dog.png", "wildcat1-dog1.png"):
        write_image(folder / "cat" / wrong)
        with pytest.raises(ValueError, match=f"{wrong} is not named <shape><i>-<texture><j>.png"):
            annotations.cue_conflict("imagenet", tmp_path)
        (folder / "cat" / wrong).unlink()


def test_cue_conflicts_of_toy_are_its_test_images_with_the_pattern_of_another_class():
    found, plain = annotations.cue_conflict("toy", limit=300, size=32), toy.draw(
        torch.arange(300), "test", 32)
    assert found.classes == toy.CLASSES and found.images.pixels.shape == (300, 3, 32, 32)
    assert found.shapes.equal(plain["label"]) and (found.textures != found.shapes).all()
    assert set(found.textures.tolist()) == set(range(16))
    changed = (found.images.pixels != plain["image"]).flatten(1).any(1)
    assert changed.equal(found.textures != plain["pattern"]) and changed.double().mean() > 0.9
    alone = toy.draw(torch.tensor([299]), "test", 32, cue_conflict=True)    # of the second block
    assert found.images.pixels[299:].equal(alone["image"])
    assert found.textures[299:].equal(alone["pattern"])
    for name in ("toy-scenes", "cifar10"):
        with pytest.raises(ValueError, match=f"{name}.*shape_bias needs: choose --data toy, or"):
            annotations.cue_conflict(name)


# ---- errors --------------------------------------------------------------------------------------


READERS = {"cub": annotations.keypoints, "coco": annotations.boxes,
           "roxford5k": annotations.landmarks, "rparis6k": annotations.landmarks,
           "cue-conflict": lambda _, root: annotations.cue_conflict("imagenet", root)}


@pytest.mark.parametrize("name", READERS)
def test_a_missing_set_is_an_error_with_its_layout_and_source(tmp_path, name):
    for _ in range(2):                                     # no folder; then an empty one
        with pytest.raises(FileNotFoundError) as error:
            list(READERS[name](name, tmp_path))
        for part in (*annotations.LAYOUT[name], str(tmp_path), "nothing is downloaded"):
            assert part in str(error.value)
        for folder in ("CUB_200_2011", "coco", name):
            (tmp_path / folder).mkdir(exist_ok=True)


def test_wrong_names_and_splits_are_errors_with_the_next_step():
    with pytest.raises(ValueError, match="no keypoints of 'cifar10' here: choose toy or toy-sce"):
        annotations.keypoints("cifar10")
    with pytest.raises(ValueError, match="no boxes of 'cub' here: choose toy or toy-scenes or co"):
        annotations.boxes("cub")
    with pytest.raises(ValueError, match="no landmarks of 'oxford' here: choose roxford5k, rp"):
        annotations.landmarks("oxford")
    for name, split in (("coco", None), ("toy", "all"), ("cub", "dev")):
        with pytest.raises(ValueError, match=f"no split {split!r} of {name}: choose train or test"):
            annotations.keypoints(name, split=split)


# ---- subsets of the real sets --------------------------------------------------------------------


def unpack(name, folder):
    path = os.path.join(REAL, f"{name}_subset.tar")
    if not os.path.exists(path):
        pytest.skip(f"no subset of {name} here")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder


def make_crops(name, root):
    split, _, parts, _ = retrieval.KEYPOINT_DATA[name]
    items = annotations.keypoints(name, root, split)
    return list(retrieval.crop_parts(items, annotations.part_names(name), parts, 32))


def test_the_real_cub(tmp_path):
    root = unpack("cub", tmp_path)
    items = list(annotations.keypoints("cub", root, None))
    assert len(items) == 40
    assert [len(list(annotations.keypoints("cub", root, s))) for s in ("train", "test")] == [20, 20]
    with open(root / "CUB_200_2011/parts/parts.txt") as file:
        names = [line.split(maxsplit=1)[1].strip().replace(" ", "_") for line in file]
    assert annotations.part_names("cub") == names
    assert items[0].id == 12 and items[0].points[0, 0].tolist() == [138, 67, 2]
    for item in items:
        x, y, v = item.points[0].unbind(1)
        assert (v == 2).sum() >= 6 and set(v.tolist()) <= {0, 2}
        x0, y0, x1, y1 = item.boxes[0].tolist()            # parts are on the birds
        inside = (x >= x0 - 5) & (x <= x1 + 5) & (y >= y0 - 5) & (y <= y1 + 5)
        assert inside[v == 2].all() and x1 <= item.image.shape[2] and y1 <= item.image.shape[1]
    labels = torch.tensor([label for _, label in make_crops("cub", root)])
    assert len(labels) == 82 and labels.bincount().min() >= 10


def test_the_real_coco(tmp_path):
    root = unpack("coco", tmp_path)
    items = list(annotations.boxes("coco", root, "train"))
    assert len(items) == 20 and sum(len(item.boxes) for item in items) == 152
    assert sum(int(item.crowd.sum()) for item in items) == 1
    for item in items:
        _, height, width = item.image.shape
        assert (item.boxes >= 0).all() and (item.boxes[:, 2] <= width + 0.5).all()
        assert (item.boxes[:, 3] <= height + 0.5).all()
        assert (item.boxes[:, 2:] > item.boxes[:, :2]).all()
    with open(root / "coco/annotations/instances_train2017.json") as file:
        categories = json.load(file)["categories"]
    assert annotations.COCO_IDS == [category["id"] for category in categories]
    assert annotations.COCO_CLASSES == [category["name"] for category in categories]
    with open(root / "coco/annotations/person_keypoints_train2017.json") as file:
        assert annotations.COCO_PARTS == json.load(file)["categories"][0]["keypoints"]
    people = list(annotations.keypoints("coco", root, "train"))
    assert sum(int((item.points[..., 2] > 0).any(1).sum()) for item in people) == 26
    assert len(make_crops("coco", root)) == 27


@pytest.mark.parametrize("name, images", [("roxford5k", 4993), ("rparis6k", 6322)])
def test_the_real_landmarks(tmp_path, name, images):
    path = os.path.join(REAL, f"gnd_{name}.pkl")
    if not os.path.exists(path):
        pytest.skip(f"no ground truth of {name} here")
    (tmp_path / name / "jpg").mkdir(parents=True)
    (tmp_path / name / f"gnd_{name}.pkl").symlink_to(os.path.abspath(path))
    found = annotations.landmarks(name, tmp_path)
    assert len(found.database) == images and len(found.queries) == len(found.boxes) == 70
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert not set(found.queries) & set(found.database)
    for lists in zip(found.easy, found.hard, found.junk):
        numbers = torch.cat(lists)
        assert len(numbers.unique()) == len(numbers) > 0   # each number is in one list
