"""Readers on tiny sets in the official layouts, written here and checked by hand, and on pieces of
the real ones; whatever is missing or damaged is one clear sentence."""
import json
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
from lib import datasets, toy
from probes import annotations

REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")


@pytest.fixture(autouse=True)
def fresh():
    annotations.coco_json.cache_clear()


def photo(path, size=(64, 48), mode="RGB", value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def write_json(path, **content):
    text(path, json.dumps(content))


def short(paths):
    return [os.path.basename(path) for path in paths]


# ---- classification: datasets.load_images -------------------------------------------------------------------


def pets(root):
    folder = root / "oxford-iiit-pet"
    for i, name in enumerate(["Abyssinian_1", "Abyssinian_2", "yorkshire_terrier_7", "british_3"]):
        photo(folder / "images" / f"{name}.jpg", mode="L" if i == 1 else "RGB")
    lists = folder / "annotations"
    text(lists / "trainval.txt", "yorkshire_terrier_7 2 2 1", "Abyssinian_1 1 1 1")
    text(lists / "test.txt", "Abyssinian_2 1 1 1", "british_3 2 1 2")


def test_pets_are_read_from_the_official_lists(tmp_path):
    pets(tmp_path)
    train, test = (datasets.load_images("pets", tmp_path, split) for split in ("train", "val"))
    assert short(train.paths) == ["yorkshire_terrier_7.jpg", "Abyssinian_1.jpg"]
    assert train.labels.tolist() == [1, 0] and train.labels.dtype == torch.int64
    assert train.classes == ["Abyssinian", "Yorkshire Terrier"]
    assert short(test.paths) == ["Abyssinian_2.jpg", "british_3.jpg"] and test.split == "test"
    assert len(datasets.load_images("pets", tmp_path, limit=1)) == 1
    [(x, index)] = data.batches(train, 32, workers=0)      # as the probes do
    assert x.shape == (2, 3, 32, 32) and index.tolist() == [0, 1]


@pytest.mark.parametrize("line", ["Abyssinian_1 one 1 1", "Abyssinian_1 1", "Abyssinian_1 9 1 1"])
def test_damaged_pets_get_a_sentence(tmp_path, line):
    pets(tmp_path)
    text(tmp_path / "oxford-iiit-pet/annotations/trainval.txt", line)
    with pytest.raises(ValueError, match="trainval.txt .* is not as pets has it .*: expected oxfo"):
        datasets.load_images("pets", tmp_path)


def test_flowers_train_on_their_train_and_val(tmp_path, monkeypatch):
    io, published = pytest.importorskip("scipy.io"), pytest.importorskip("torchvision.datasets")
    files = {key: (name, None) for key, (name, _) in published.Flowers102._file_dict.items()}
    folder = tmp_path / "flowers-102"
    folder.mkdir()
    for i in range(1, 5):
        photo(folder / "jpg" / f"image_0000{i}.jpg")
    io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 102, 3, 3]], np.uint8)})
    io.savemat(folder / "setid.mat", {"trnid": [[2, 1]], "valid": [[4, 4]], "tstid": [[3, 3]]})
    with pytest.raises(ValueError, match=r"not as flowers has it \(RuntimeError: .*corrupted\): e"):
        datasets.load_images("flowers", tmp_path)                     # the md5 of the official files
    monkeypatch.setattr(published.Flowers102, "_file_dict", files)
    train, test = (datasets.load_images("flowers", tmp_path, split) for split in ("train", "test"))
    assert short(train.paths) == [f"image_0000{i}.jpg" for i in (2, 1, 4, 4)]
    assert train.labels.tolist() == [101, 0, 2, 2] and len(train.classes) == 102
    assert test.labels.tolist() == [2, 2] and test.classes[0] == "pink primrose"


def test_cars_count_their_classes_from_zero(tmp_path):
    io = pytest.importorskip("scipy.io")
    folder = tmp_path / "stanford_cars"
    kind = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for split, path in (("train", "devkit/cars_train_annos.mat"),
                        ("test", "cars_test_annos_withlabels.mat")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        rows = np.array([[(1, 1, 9, 9, c, f"0000{c}.jpg") for c in (2, 1, 2)]], kind)
        io.savemat(folder / path, {"annotations": rows})
        photo(folder / f"cars_{split}" / "00001.jpg")
    names = np.array([["AM General Hummer", "Acura RL"]], object)
    with pytest.raises(ValueError, match="not as cars has it .*cars_meta.mat.*: expected stanford"):
        datasets.load_images("cars", tmp_path)
    io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    for split in ("train", "test"):
        images = datasets.load_images("cars", tmp_path, split)
        assert images.labels.tolist() == [1, 0, 1] and images.classes == names[0].tolist()
        assert images.paths[1] == str(folder / f"cars_{split}" / "00001.jpg")


@pytest.mark.parametrize("name, file", [("flowers", "flowers-102/setid.mat"),
                                        ("cars", "stanford_cars/devkit/cars_train_annos.mat")])
def test_without_scipy_it_is_said_what_to_install(tmp_path, monkeypatch, name, file):
    text(tmp_path / file, "")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=f"labels of {name} are .mat .*: pip install scipy"):
        datasets.load_images(name, tmp_path)


def inat(root, folder="inat18"):
    categories = [{"id": 1, "name": "Turdus merula"}, {"id": 0, "name": "Apis mellifera"}]
    for split, ids in (("train", (7, 8, 9)), ("val", (4,))):
        names = {i: f"train_val2018/Aves/{i % 2}/{i}.jpg" for i in ids}
        write_json(root / folder / f"{split}2018.json", categories=categories,
                   images=[{"id": i, "file_name": name} for i, name in names.items()],
                   annotations=[{"id": 1, "image_id": i, "category_id": i % 2}
                                for i in reversed(ids)])


@pytest.mark.parametrize("folder", ["inat18", "."])
def test_inaturalist_joins_images_and_annotations(tmp_path, folder):
    inat(tmp_path, folder)
    train, test = (datasets.load_images("inat18", tmp_path, split) for split in ("train", "test"))
    assert train.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [0]
    assert train.classes == ["Apis mellifera", "Turdus merula"]
    assert train.paths[0] == str(tmp_path / folder / "train_val2018" / "Aves" / "1" / "7.jpg")
    content = json.loads((tmp_path / folder / "train2018.json").read_text())
    content["annotations"].pop()
    write_json(tmp_path / folder / "train2018.json", **content)
    with pytest.raises(ValueError, match="train2018.json .* not as inat18 has it .KeyError: 7"):
        datasets.load_images("inat18", tmp_path)


def test_miniimagenet_has_other_classes_in_each_split(tmp_path):
    folder = tmp_path / "miniimagenet"
    for split, wnids in (("train", "n03 n01"), ("val", "n04"), ("test", "n05 n06")):
        files = [(f"{wnid}0000000{i}.jpg", wnid) for wnid in wnids.split() for i in (1, 2, 3)]
        text(folder / f"{split}.csv", "filename,label", *map(",".join, files))
        for file, _ in files:
            photo(folder / "images" / file, (84, 84))
    train, val, test = (datasets.load_images("miniimagenet", tmp_path, s) for s in ("train", "val", "test"))
    assert train.classes == ["n01", "n03"] and train.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert val.classes == ["n04"] and val.split == "val" and test.classes == ["n05", "n06"]
    assert train.paths[0] == str(folder / "images" / "n0300000001.jpg")
    assert datasets.load_images("miniimagenet", tmp_path, limit=2).labels.tolist() == [1, 0]   # spread
    text(folder / "test.csv", "file,class", "a,b")
    with pytest.raises(ValueError, match="test.csv .* not as miniimagenet has it .KeyError: 'fil"):
        datasets.load_images("miniimagenet", tmp_path, "test")
    with pytest.raises(ValueError, match="No split 'dev' of miniimagenet: choose train or test or"):
        datasets.load_images("miniimagenet", tmp_path, "dev")


# ---- key-points ----------------------------------------------------------------------------------


def cub(root, folder="CUB_200_2011"):
    """Four birds; the eye, leg, wing and tail of the study are parts 11, 12, 9 and 14."""
    root = root / folder
    seen = {2: {11: (60, 80), 12: (120, 80)},              # 60 apart: crops of side 2 round(60/4)
            5: {11: (60, 80)},                             # alone: no crop
            6: {11: (60, 80), 9: (90, 80)},                # 30 apart: d/2 is not above 20
            9: {14: (10, 10), 9: (10.5, 100), 1: (10, 50)}}
    names = [f"{i // 6 + 1:03}.Bird/Bird_{i}.jpg" for i in seen]
    for i, name in zip(seen, names):
        photo(root / "images" / name, (200, 160), "L" if i == 5 else "RGB")
    text(root / "images.txt", *(f"{i} {name}" for i, name in zip(seen, names)))
    text(root / "train_test_split.txt", "2 1", "5 0", "6 1", "9 0")
    text(root / "bounding_boxes.txt", *(f"{i} {i}.0 20.0 30.0 40.5" for i in seen))
    text(root / "parts/part_locs.txt", *(
        "{} {} {:.1f} {:.1f} {}".format(i, p, *parts.get(p, (0, 0)), int(p in parts))
        for i, parts in seen.items() for p in range(1, 16)))
    return root


@pytest.mark.parametrize("folder", ["CUB_200_2011", "."])
def test_cub_has_a_bird_an_image_and_fifteen_parts(tmp_path, folder):
    cub(tmp_path, folder)
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
    cub(tmp_path)
    _, _, parts, _ = evaluate.KEYPOINTS["cub"]
    names = annotations.part_names("cub")

    def labels(rule):
        items = annotations.keypoints("cub", tmp_path, None)
        return [label for _, label in evaluate.part_crops(items, names, parts, 30, rule)]

    assert labels("code") == [0, 1, 2, 3]                  # bird 2: eye and leg; bird 9: wing, tail
    assert labels("paper") == [0, 1, 2]                    # the back is 40.0 from the tail: dropped


@pytest.mark.parametrize("file, content", [
    ("parts/part_locs.txt", "2 1 here 67.0 1\n"), ("parts/part_locs.txt", "2 1 138.0 67.0 1\n"),
    ("parts/part_locs.txt", ""), ("bounding_boxes.txt", "2 1.0 2.0\n"), ("images.txt", "two a\n"),
    ("images.txt", "2 a b.jpg\n"), ("train_test_split.txt", "3 1\n"), ("images.txt", "\0\xff"),
])
def test_a_damaged_cub_gets_a_sentence(tmp_path, file, content):
    (cub(tmp_path) / file).write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="damaged or not as cub has it .*: expected CUB_200_2011/"):
        list(annotations.keypoints("cub", tmp_path, "train"))


def coco(root, images="coco/", split="train2017"):
    """Three images; a crowd, categories 1 and 90, an image without annotation, persons."""
    sizes = {9: (64, 48), 25: (50, 70), 30: (40, 40)}
    for i, size in sizes.items():
        photo(root / f"{images}{split}/{i:012}.jpg", size, "L" if i == 30 else "RGB")
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
    coco(tmp_path, images)
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
    with pytest.raises(FileNotFoundError, match="No coco under .*annotations/.instances, person_"):
        list(annotations.boxes("coco", tmp_path, "val"))


def test_coco_comes_in_the_order_of_its_files(tmp_path):
    """So the nth image with its annotations is the nth of those without, at any limit."""
    coco(tmp_path)
    path = tmp_path / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    write_json(path, **content | dict(images=[content["images"][i] for i in (2, 0, 1)]))
    for limit, ids in ((None, [9, 25, 30]), (2, [9, 25])):
        plain = datasets.load_images("coco", root=str(tmp_path), split="train", limit=limit)
        found = [item.id for item in annotations.boxes("coco", tmp_path, "train", limit)]
        assert found == ids == [int(file[-16:-4]) for file in plain.paths]


def test_coco_numbers_and_names_are_eighty():
    assert len(annotations.COCO_CLASSES) == len(set(annotations.COCO_CLASSES)) == len(annotations.LABELS) == 80
    assert annotations.LABELS[13] == 11 and annotations.COCO_CLASSES[11] == "stop sign"      # 12 is a gap
    assert annotations.LABELS[90] == 79 and 12 not in annotations.LABELS
    assert len(annotations.COCO_PARTS) == 17 and len(annotations.CUB_PARTS) == 15


def test_coco_key_points_of_images_that_show_anybody(tmp_path, monkeypatch):
    coco(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    [item] = annotations.keypoints("coco", split="train")
    assert item.id == 25 and item.points.shape == (2, 17, 3)
    assert item.points[0, 10].tolist() == [5, 60, 2] and item.points[1, 15].tolist() == [30, 40, 1]
    assert item.areas.tolist() == [800, 800] and item.boxes[0].tolist() == [0, 0, 20, 40]
    _, _, parts, _ = evaluate.KEYPOINTS["coco"]
    names = annotations.part_names("coco")
    crops = list(evaluate.part_crops([item], names, parts, 26))
    assert [label for _, label in crops] == [0, 1]         # the ankle is another's, and hidden
    # Side 2 round(54/4) = 28 around (5, 6): 9 columns and 8 rows of it lie outside of the picture.
    [(nose, _), _] = evaluate.part_crops([item], names, parts, 28)
    assert nose[:, :8].max() == 0 and nose[:, :, :9].max() == 0 and nose[2, 8:, 9:].min() > 240


def test_coco_is_parsed_once(tmp_path, monkeypatch):
    coco(tmp_path)
    loads, parse = [], json.load
    monkeypatch.setattr(json, "load", lambda file: loads.append(file.name) or parse(file))
    for _ in range(3):
        assert len(list(annotations.boxes("coco", tmp_path, "train"))) == 3
    assert len(loads) == 1


@pytest.mark.parametrize("change, why", [
    (lambda c: c["annotations"][0].update(category_id=12), "KeyError: 12"),
    (lambda c: c["annotations"][0].update(image_id=12345), "KeyError: 12345"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "ValueError"),
    (lambda c: c["annotations"][0].pop("iscrowd"), "KeyError: 'iscrowd'"),
    (lambda c: c["annotations"][0].update(area=None), "TypeError"),
    (lambda c: c.pop("images"), "KeyError: 'images'"),
    (None, "JSONDecodeError"),
])
def test_a_damaged_coco_gets_a_sentence(tmp_path, change, why):
    coco(tmp_path)
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
    assert message.startswith(f"{path} is damaged or not as coco has it ({why}")
    assert "expected coco/{train2017" in message and "\n" not in message


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    coco(tmp_path)
    path = tmp_path / "coco/train2017/000000000025.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"Cannot read {path}: .*Restore the file"):
        list(annotations.keypoints("coco", tmp_path, "train"))


@pytest.mark.parametrize("name", ["toy", pytest.param("toy-scenes", marks=pytest.mark.slow)])
def test_the_built_in_creatures_are_served_as_drawn(name):
    items = list(annotations.keypoints(name, split="test", limit=70, size=96))
    drawn = toy.draw(torch.arange(70), "test", 96, name == "toy-scenes", annotate=True)
    visible = 0
    for i, item in enumerate(items):
        seen = drawn["classes"][i] >= 0
        assert item.image.equal(drawn["image"][i]) and item.id == i
        assert item.points.equal(drawn["keypoints"][i, seen])
        assert item.boxes.equal(drawn["boxes"][i, seen]) and (item.areas > 0).all()
        assert item.areas.sum() == (drawn["instances"][i] > 0).sum()
        for x, y, v in item.points.flatten(0, 1).tolist():
            if v == 2:
                visible += 1
                assert drawn["instances"][i][int(y), int(x)] > 0
        for number, (x, y, v) in enumerate(item.points[0].tolist(), 1):
            assert v < 2 or drawn["parts"][i][int(y), int(x)] == number
    assert visible > 70 and annotations.part_names(name) == toy.PARTS
    found = list(annotations.boxes(name, split="train", limit=2, size=64))
    assert found[1].image.shape == (3, 64, 64) and annotations.box_classes(name) == toy.CLASSES
    assert len(found[1].boxes) == len(found[1].labels) == len(found[1].crowd)


# ---- landmarks, cue conflicts --------------------------------------------------------------------


def landmarks(root, gnd=None, name="roxford5k", protocol=2):
    gnd = gnd or [dict(bbx=[1.5, 2.0, 30.0, 40.0], easy=[0, 4], hard=[], junk=[5]),
                  dict(bbx=[0, 0, 9, 9], easy=[], hard=[1, 2], junk=[])]
    content = dict(imlist=[f"all_souls_00000{i}" for i in range(6)], qimlist=["q1", "q2"], gnd=gnd)
    (root / name / "jpg").mkdir(parents=True, exist_ok=True)
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_landmarks_are_paths_boxes_and_numbers(tmp_path, protocol, kind):
    landmarks(tmp_path, [
        dict(bbx=[1.5, 2.0, 30.0, 40.0], easy=kind([0, 4]), hard=kind([]), junk=kind([5])),
        dict(bbx=[0, 0, 9, 9], easy=kind([]), hard=kind([1, 2]), junk=kind([]))], protocol=protocol)
    found = annotations.landmarks("roxford5k", tmp_path)
    assert found.database[4] == str(tmp_path / "roxford5k" / "jpg" / "all_souls_000004.jpg")
    assert short(found.queries) == ["q1.jpg", "q2.jpg"]
    assert found.boxes.tolist() == [[1.5, 2, 30, 40], [0, 0, 9, 9]]
    assert [x.tolist() for x in found.easy] == [[0, 4], []]
    assert [x.tolist() for x in found.hard] == [[], [1, 2]]
    assert [x.tolist() for x in found.junk] == [[5], []]
    assert all(x.dtype == torch.int64 for x in found.easy + found.hard + found.junk)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("gnd, why", [
    ([dict(bbx=[0, 0, 9, 9], easy=[6], hard=[], junk=[])] * 2, "does not go with the lists"),
    ([dict(bbx=[0, 0, 9, 9], easy=[], hard=[], junk=[-1])] * 2, "does not go with the lists"),
    ([dict(bbx=[0, 0, 9, 9], easy=[], hard=[], junk=[])], "does not go with the lists"),
    ([dict(bbx=[0, 0, 9], easy=[], hard=[], junk=[])] * 2, "RuntimeError"),
    ([dict(bbx=[0, 0, 9, 9], easy=[], junk=[])] * 2, "KeyError: 'hard'"),
])
def test_damaged_landmarks_get_a_sentence(tmp_path, gnd, why):
    landmarks(tmp_path, gnd)
    with pytest.raises(ValueError, match=f"gnd_roxford5k.pkl is damaged or not as .*{why}"):
        annotations.landmarks("roxford5k", tmp_path)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    landmarks(tmp_path, [Evil(tmp_path / "owned")])
    with pytest.raises(ValueError, match=r"mkdir.* refused\): expected roxford5k/{jpg"):
        annotations.landmarks("roxford5k", tmp_path)
    assert not (tmp_path / "owned").exists()
    pickle.loads((tmp_path / "roxford5k" / "gnd_roxford5k.pkl").read_bytes())
    assert (tmp_path / "owned").exists()                   # control: the pickle does bite


def test_cue_conflicts_are_in_the_file_names(tmp_path):
    folder = tmp_path / "cue-conflict"
    for path in ("cat/cat1-dog1.png", "cat/cat2-cat3.png", "dog/0007_cue_s1_dog2-cat1.png",
                 "car/car10-elephant2.png"):
        photo(folder / path)
    found = annotations.cue_conflict(tmp_path)
    pairs = [(found.classes[s], found.classes[t]) for s, t in zip(found.shapes, found.textures)]
    assert short(found.paths) == ["car10-elephant2.png", "cat1-dog1.png", "cat2-cat3.png",
                                  "0007_cue_s1_dog2-cat1.png"]
    assert pairs == [("car", "elephant"), ("cat", "dog"), ("cat", "cat"), ("dog", "cat")]
    assert len(found.classes) == 16
    for wrong in ("cat1.png", "cat1-unicorn1.png", "cat-dog.png", "wildcat1-dog1.png"):
        photo(folder / "cat" / wrong)
        with pytest.raises(ValueError, match=f"{wrong} is not named <shape><i>-<texture><j>.png"):
            annotations.cue_conflict(tmp_path)
        (folder / "cat" / wrong).unlink()


# ---- sentences -----------------------------------------------------------------------------------


VIEWS = {"cub": annotations.keypoints, "coco": annotations.boxes, "roxford5k": annotations.landmarks,
         "rparis6k": annotations.landmarks, "cue-conflict": lambda _, root: annotations.cue_conflict(root)}


@pytest.mark.parametrize("name", VIEWS)
def test_a_missing_set_prints_the_layout_and_where_to_get_it(tmp_path, name):
    for _ in range(2):                                     # nothing there; then an empty folder
        with pytest.raises(FileNotFoundError) as error:
            list(VIEWS[name](name, tmp_path))
        for part in (*annotations.LAYOUT[name], str(tmp_path), "nothing is downloaded"):
            assert part in str(error.value)
        for folder in ("CUB_200_2011", "coco", name):
            (tmp_path / folder).mkdir(exist_ok=True)


def test_wrong_names_and_splits_get_one_clear_sentence():
    with pytest.raises(ValueError, match="No key-points of 'cifar10' here: choose toy or toy-sc"):
        annotations.keypoints("cifar10")
    with pytest.raises(ValueError, match="No boxes of 'cub' here: choose toy or toy-scenes or co"):
        annotations.boxes("cub")
    with pytest.raises(ValueError, match="No landmarks of 'oxford' here: choose roxford5k or rp"):
        annotations.landmarks("oxford")
    for name, split in (("coco", None), ("toy", "all"), ("cub", "dev")):
        with pytest.raises(ValueError, match=f"No split {split!r} of {name}: choose train or test"):
            annotations.keypoints(name, split=split)


# ---- pieces of the real sets ---------------------------------------------------------------------


def unpack(name, folder):
    path = os.path.join(REAL, f"{name}_subset.tar")
    if not os.path.exists(path):
        pytest.skip(f"no piece of {name} here")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder


def crops(name, root):
    split, _, parts, _ = evaluate.KEYPOINTS[name]
    items = annotations.keypoints(name, root, split)
    return list(evaluate.part_crops(items, annotations.part_names(name), parts, 32))


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
        x0, y0, x1, y1 = item.boxes[0].tolist()            # birds' parts lie on the birds
        inside = (x >= x0 - 5) & (x <= x1 + 5) & (y >= y0 - 5) & (y <= y1 + 5)
        assert inside[v == 2].all() and x1 <= item.image.shape[2] and y1 <= item.image.shape[1]
    labels = torch.tensor([label for _, label in crops("cub", root)])
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
    assert len(crops("coco", root)) == 27


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
        assert len(numbers.unique()) == len(numbers) > 0   # nothing is two things at once
