"""Readers on tiny sets in the official layouts, written here and checked by hand;
whatever is missing or damaged is one clear sentence."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data


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


# ---- classification: data.load -------------------------------------------------------------------


def pets(root):
    folder = root / "oxford-iiit-pet"
    for i, name in enumerate(["Abyssinian_1", "Abyssinian_2", "yorkshire_terrier_7", "british_3"]):
        photo(folder / "images" / f"{name}.jpg", mode="L" if i == 1 else "RGB")
    lists = folder / "annotations"
    text(lists / "trainval.txt", "yorkshire_terrier_7 2 2 1", "Abyssinian_1 1 1 1")
    text(lists / "test.txt", "Abyssinian_2 1 1 1", "british_3 2 1 2")


def test_pets_are_read_from_the_official_lists(tmp_path):
    pets(tmp_path)
    train, test = (data.load("pets", tmp_path, split) for split in ("train", "val"))
    assert short(train.paths) == ["yorkshire_terrier_7.jpg", "Abyssinian_1.jpg"]
    assert train.labels.tolist() == [1, 0] and train.labels.dtype == torch.int64
    assert train.classes == ["Abyssinian", "Yorkshire Terrier"]
    assert short(test.paths) == ["Abyssinian_2.jpg", "british_3.jpg"] and test.split == "test"
    assert len(data.load("pets", tmp_path, limit=1)) == 1
    [(x, index)] = data.batches(train, 32, workers=0)      # as the probes do
    assert x.shape == (2, 3, 32, 32) and index.tolist() == [0, 1]


@pytest.mark.parametrize("line", ["Abyssinian_1 one 1 1", "Abyssinian_1 1", "Abyssinian_1 9 1 1"])
def test_damaged_pets_get_a_sentence(tmp_path, line):
    pets(tmp_path)
    text(tmp_path / "oxford-iiit-pet/annotations/trainval.txt", line)
    with pytest.raises(ValueError, match="trainval.txt .* is not as pets has it .*: expected oxfo"):
        data.load("pets", tmp_path)


def test_flowers_train_on_their_train_and_val(tmp_path, monkeypatch):
    io, datasets = pytest.importorskip("scipy.io"), pytest.importorskip("torchvision.datasets")
    files = {key: (name, None) for key, (name, _) in datasets.Flowers102._file_dict.items()}
    folder = tmp_path / "flowers-102"
    folder.mkdir()
    for i in range(1, 5):
        photo(folder / "jpg" / f"image_0000{i}.jpg")
    io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 102, 3, 3]], np.uint8)})
    io.savemat(folder / "setid.mat", {"trnid": [[2, 1]], "valid": [[4, 4]], "tstid": [[3, 3]]})
    with pytest.raises(ValueError, match=r"not as flowers has it \(RuntimeError: .*corrupted\): e"):
        data.load("flowers", tmp_path)                     # the md5 of the official files
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    train, test = (data.load("flowers", tmp_path, split) for split in ("train", "test"))
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
        data.load("cars", tmp_path)
    io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    for split in ("train", "test"):
        images = data.load("cars", tmp_path, split)
        assert images.labels.tolist() == [1, 0, 1] and images.classes == names[0].tolist()
        assert images.paths[1] == str(folder / f"cars_{split}" / "00001.jpg")


@pytest.mark.parametrize("name, file", [("flowers", "flowers-102/setid.mat"),
                                        ("cars", "stanford_cars/devkit/cars_train_annos.mat")])
def test_without_scipy_it_is_said_what_to_install(tmp_path, monkeypatch, name, file):
    text(tmp_path / file, "")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=f"labels of {name} are .mat .*: pip install scipy"):
        data.load(name, tmp_path)


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
    train, test = (data.load("inat18", tmp_path, split) for split in ("train", "test"))
    assert train.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [0]
    assert train.classes == ["Apis mellifera", "Turdus merula"]
    assert train.paths[0] == str(tmp_path / folder / "train_val2018" / "Aves" / "1" / "7.jpg")
    content = json.loads((tmp_path / folder / "train2018.json").read_text())
    content["annotations"].pop()
    write_json(tmp_path / folder / "train2018.json", **content)
    with pytest.raises(ValueError, match="train2018.json .* not as inat18 has it .KeyError: 7"):
        data.load("inat18", tmp_path)


def test_miniimagenet_has_other_classes_in_each_split(tmp_path):
    folder = tmp_path / "miniimagenet"
    for split, wnids in (("train", "n03 n01"), ("val", "n04"), ("test", "n05 n06")):
        files = [(f"{wnid}0000000{i}.jpg", wnid) for wnid in wnids.split() for i in (1, 2, 3)]
        text(folder / f"{split}.csv", "filename,label", *map(",".join, files))
        for file, _ in files:
            photo(folder / "images" / file, (84, 84))
    train, val, test = (data.load("miniimagenet", tmp_path, s) for s in ("train", "val", "test"))
    assert train.classes == ["n01", "n03"] and train.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert val.classes == ["n04"] and val.split == "val" and test.classes == ["n05", "n06"]
    assert train.paths[0] == str(folder / "images" / "n0300000001.jpg")
    assert data.load("miniimagenet", tmp_path, limit=2).labels.tolist() == [1, 0]   # spread
    text(folder / "test.csv", "file,class", "a,b")
    with pytest.raises(ValueError, match="test.csv .* not as miniimagenet has it .KeyError: 'fil"):
        data.load("miniimagenet", tmp_path, "test")
    with pytest.raises(ValueError, match="No split 'dev' of miniimagenet: choose train or test or"):
        data.load("miniimagenet", tmp_path, "dev")
