"""lib/tree.py: folders as people have them, written here. What is an image, which folders are
splits and classes, and that nothing is passed over in silence."""
import os
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from image_files import write_image
from PIL import Image

from lib import datasets, tree


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def load(root, split="train", **more):
    return datasets.load_images(str(root), split=split, **more)


def names(images):
    """{class or None: names of its files}."""
    found = {}
    for path, label in zip(images.paths, images.labels.tolist()):
        found.setdefault(images.classes[label] if label >= 0 else None, []).append(
            os.path.basename(path))
    return found


# ---- files ---------------------------------------------------------------------------------------


def test_endings_that_pillow_reads_are_images_and_the_others_are_counted(tmp_path):
    read = "jpg jpeg jpe jfif png webp bmp tif tiff gif ppm pgm avif jp2 JPG Png".split()
    for ending in read:
        kind = {"jfif": "JPEG", "jpe": "JPEG", "pgm": "PPM", "jp2": "JPEG2000", "tif": "TIFF",
                "jpg": "JPEG", "JPG": "JPEG"}.get(ending, ending.upper())
        Image.new("RGB", (8, 6), "red").save(tmp_path / f"a.{ending}", kind)
    touch(tmp_path, "b.heic", "c.heic", "d.txt", "e.CSV", "noending", ".DS_Store", "._a.jpg")
    paths, passed = tree.list_images(str(tmp_path))
    assert [Path(path).name for path in paths] == sorted(f"a.{ending}" for ending in read)
    for path in paths:
        assert datasets.read_image(path).size == (8, 6)
        assert datasets.read_pixels(path)[0].shape == (6, 8, 3)
    text = tree.describe_passed(passed)
    assert "images that cannot be read here, convert them to JPEG or PNG: .heic (2)" in text
    assert "other files: .csv (1), .txt (1), no ending (1)" in text
    assert "hidden files: .DS_Store (1), ._* (1)" in text
    assert tree.describe_passed({}) == ""


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX"])
def test_hidden_and_system_folders_are_no_classes(tmp_path, folder):
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg", f"{folder}/c.jpg", f"cat/{folder}/d.jpg")
    images = load(tmp_path)
    assert names(images) == {"cat": ["a.jpg"], "dog": ["b.jpg"]}
    assert f"hidden or system folders: {folder} (2)" in images.notes[-1]
    touch(tmp_path, f"{folder}/x/e.jpg")
    assert len(load(tmp_path / folder)) == 2               # it is read if it is asked for


def test_a_hidden_folder_in_one_split_does_not_end_knn(tmp_path):
    touch(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "train/.ipynb_checkpoints/a.jpg",
          "val/cat/c.jpg", "val/dog/d.jpg")
    assert load(tmp_path).classes == load(tmp_path, "test").classes == ["cat", "dog"]


@pytest.mark.parametrize("out", ["out/mmc-x", "runs/mine", "cat/mine"])
def test_output_of_runs_is_no_data(tmp_path, monkeypatch, out):
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg", f"{out}/visualization.png", f"{out}/metrics.jsonl")
    if out.startswith("out"):
        touch(tmp_path, "out/video-davis.png", "out/analysis/loss.png")    # of evaluate, analysis
    monkeypatch.chdir(tmp_path)
    images = load(".")
    assert names(images) == {"cat": ["a.jpg"], "dog": ["b.jpg"]}
    assert f"output of runs: {'out' if out.startswith('out') else out} (1)" in images.notes[-1]
    (tmp_path / out / "metrics.jsonl").unlink()
    assert len(load(".")) > 2                              # control: an ordinary folder `out`


def test_links_give_each_image_once_and_end(tmp_path):
    pool, root = tmp_path / "pool", tmp_path / "data"
    touch(pool, "p.jpg")
    touch(root, "b/1.jpg", "c/2.jpg")
    for link, target in (("a_link", root / "b"), ("b/up", root), ("b/parent", tmp_path),
                         ("c/pool", pool), ("c/1_again.jpg", root / "b/1.jpg"),
                         ("c/p_again.jpg", pool / "p.jpg"), ("c/gone.jpg", root / "no.jpg"),
                         ("c/self", root / "c/self")):
        (root / link).symlink_to(target)
    paths, passed = tree.list_images(str(root))
    assert sorted(map(os.path.realpath, paths)) == sorted(
        map(str, (pool / "p.jpg", root / "b/1.jpg", root / "c/2.jpg")))
    assert {str(root / "b/1.jpg"), str(root / "c/2.jpg")} < set(paths)     # not through a link
    assert passed["broken links and special files"] == {".jpg": 1, "no ending": 1}
    assert sum(passed["links to what is listed already"].values()) >= 4
    for name in ("x", "y"):                                # classes made of links to a pool
        (tmp_path / "linked" / name).mkdir(parents=True)
        touch(pool, f"{name}.jpg")
        (tmp_path / "linked" / name / "1.jpg").symlink_to(pool / f"{name}.jpg")
    assert names(load(tmp_path / "linked")) == {"x": ["1.jpg"], "y": ["1.jpg"]}


def test_splits_made_of_links_keep_their_labels(tmp_path):
    """images/ has all files, train/ and val/ have links to some of them."""
    def link(name, *links):
        for path in links:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).symlink_to(tmp_path / name)

    touch(tmp_path, *(f"images/{i}.jpg" for i in range(5)))
    link("images/0.jpg", "train/cat/0.jpg"), link("images/1.jpg", "train/dog/1.jpg")
    link("images/2.jpg", "val/cat/2.jpg"), link("images/3.jpg", "val/dog/3.jpg", "val/cat/3.jpg")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert names(train) == {"cat": ["0.jpg"], "dog": ["1.jpg"]}
    assert names(test) == {"cat": ["2.jpg", "3.jpg"]}      # 3.jpg once
    assert any("beside train/ and val/: images in images/ (1)" in note for note in train.notes)
    assert any("links to what is listed already: 3.jpg (1)" in note for note in train.notes)
    link("train/cat/0.jpg", "val/cat/0.jpg")               # a training image is no test image
    assert names(load(tmp_path, "test")) == names(test)


def test_a_folder_without_permission_is_counted(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(path):
        if path == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)             # root may open every folder
    paths, passed = tree.list_images(str(tmp_path))
    assert len(paths) == 1 and passed["folders that cannot be opened"] == {"b": 1}


# ---- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("test", ["val", "valid", "Validation", "dev", "test", "TESTING"])
def test_the_usual_names_of_splits_in_any_case(tmp_path, train, test):
    touch(tmp_path, f"{train}/cat/a.jpg", f"{train}/dog/b.jpg", f"{test}/cat/c.jpg",
          f"{test}/dog/d.jpg")
    assert names(load(tmp_path)) == {"cat": ["a.jpg"], "dog": ["b.jpg"]}
    assert names(load(tmp_path, "test")) == {"cat": ["c.jpg"], "dog": ["d.jpg"]}
    assert load(tmp_path).notes == load(tmp_path, "test").notes == [
        f"{tmp_path}: 2 images in {train}/, 2 images in {test}/; 2 classes: cat, dog"]


@pytest.mark.parametrize("files, classes", [
    (["train/cat/a.jpg", "train/dog/b.jpg"], {"cat": ["a.jpg"], "dog": ["b.jpg"]}),
    (["val/cat/a.jpg", "val/dog/b.jpg"], {"cat": ["a.jpg"], "dog": ["b.jpg"]}),
    (["val/cat/a.jpg", "test/cat/b.jpg", "test/dog/c.jpg"],
     {"cat": ["b.jpg", "a.jpg"], "dog": ["c.jpg"]}),
    (["train/cat/a.jpg", "train/dog/b.jpg", "cover.jpg"],
     {"cat": ["a.jpg"], "dog": ["b.jpg"], None: ["cover.jpg"]}),
    (["train/a.jpg", "bus/b.jpg", "car/c.jpg"],            # vehicles: a class named train
     {"train": ["a.jpg"], "bus": ["b.jpg"], "car": ["c.jpg"]}),
    (["zip/inner/cat/a.jpg", "zip/inner/dog/b.jpg"], {"cat": ["a.jpg"], "dog": ["b.jpg"]}),
])
def test_without_both_splits_all_images_are_one(tmp_path, files, classes):
    touch(tmp_path, *files)
    images = load(tmp_path)
    assert images.split == "all" and names(images) == classes
    assert images.paths == load(tmp_path, "test").paths


@pytest.mark.parametrize("files, note", [
    (["train2017/a.jpg", "val2017/b.jpg"],
     "train2017, val2017 are read as classes: if they are splits, rename them to train and val"),
    (["images_train/cat/a.jpg", "images_test/cat/b.jpg"], "images_test, images_train are read as"),
    (["data/train/cat/a.jpg", "data/train/dog/b.jpg", "data/val/cat/c.jpg", "extra/d.jpg"],
     "folders for training and testing in data/ are not used, as there are others beside"),
    (["cat/train/a.jpg", "cat/val/b.jpg", "dog/train/c.jpg", "dog/val/d.jpg"], "in cat/, dog/ are"),
    (["cat/train/a.jpg", "dog/c.jpg"], ""), (["testing rig/a.jpg", "bus/b.jpg"], "")])
def test_what_looks_like_splits_and_is_not_used_is_named(tmp_path, files, note):
    touch(tmp_path, *files)
    assert note in (notes := " ".join(load(tmp_path).notes)) and bool(note) == (
        "read as classes" in notes or "not used" in notes)


@pytest.mark.parametrize("train, test", [("training_set", "test_set"), ("train", "validate"),
                                         ("Train", "Eval")])
def test_further_names_of_splits(tmp_path, train, test):
    touch(tmp_path, f"{train}/cat/a.jpg", f"{train}/dog/b.jpg", f"{test}/cat/c.jpg")
    assert names(load(tmp_path)) == {"cat": ["a.jpg"], "dog": ["b.jpg"]}
    assert names(load(tmp_path, "test")) == {"cat": ["c.jpg"]}


def test_images_of_equal_names_are_all_used_beside_label_maps(tmp_path):
    touch(tmp_path, "images/1.jpg", "images/1.png", "img/1.jpg", "images/2.jpg", "labels/1.png")
    images = load(tmp_path)
    assert len(images) == 4 and "passed over: 1 label maps" in " ".join(images.notes)


def test_many_classes_that_differ_between_the_splits_take_no_minutes():
    members = {split: [(f"{split}/{i}.jpg", f"{split} {i}") for i in range(5000)]
               for split in ("train", "val")}
    begin = time.process_time()
    splits, _ = tree.label_splits(members)
    assert time.process_time() - begin < 3 and len(splits["val"].classes) == 5000


@pytest.mark.parametrize("between", ["images/", "data/jpg/"])
def test_one_folder_between_the_splits_and_their_classes_is_skipped(tmp_path, between):
    touch(tmp_path, f"train/{between}cat/a.jpg", f"train/{between}dog/b.jpg",
          f"val/{between}cat/c.jpg", "train/labels/a.txt")
    assert names(load(tmp_path)) == {"cat": ["a.jpg"], "dog": ["b.jpg"]}
    assert names(load(tmp_path, "test")) == {"cat": ["c.jpg"]}
    touch(tmp_path, "val/dog/d.jpg")                       # not in all: it may be a class
    assert load(tmp_path, "test").classes == sorted([between.split("/")[0], "dog"])


@pytest.mark.skipif(os.sep != "/", reason="a backslash is a separator")
def test_names_with_backslashes_of_archives_from_windows_are_paths(tmp_path):
    touch(tmp_path, "train\\cat\\a.jpg", "train\\dog\\b.jpg", "val\\cat\\c.jpg")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert names(train) == {"cat": ["train\\cat\\a.jpg"], "dog": ["train\\dog\\b.jpg"]}
    assert names(test) == {"cat": ["val\\cat\\c.jpg"]} and os.path.exists(test.paths[0])


def test_splits_in_a_folder_of_their_own_and_what_is_beside_them(tmp_path):
    touch(tmp_path, "archive/train/cat/a.jpg", "archive/train/dog/b.jpg", "archive/valid/cat/c.jpg",
          "archive/test/cat/d.jpg", "archive/masks/e.png", "archive/cover.jpg", "readme.txt")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert names(train) == {"cat": ["a.jpg"], "dog": ["b.jpg"]} and names(test) == {
        "cat": ["c.jpg"]}
    assert train.notes == [f"{tmp_path}: {note}" for note in (
        "2 images in train/, 1 images in valid/; 2 classes: cat, dog",
        "classes without images in valid/: dog",
        "not used, as they are beside train/ and valid/: images in cover.jpg (1), masks/ (1), "
        "test/ (1)", "passed over: other files: .txt (1)")]
    touch(tmp_path, "archive/training/x.jpg")
    with pytest.raises(ValueError, match="train and training are both folders of training images"):
        load(tmp_path)


# ---- classes -------------------------------------------------------------------------------------


def test_one_stray_image_does_not_cost_the_labels(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5)), "stray.jpg")
    images = load(tmp_path)                                # pretraining: all images
    assert len(images) == 11 and names(images)[None] == ["stray.jpg"]
    assert "in no class folder, which kNN and probes leave out: stray.jpg" in images.notes[1]
    train, test = (load(tmp_path, split, hold_out=True) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2) and None not in names(train) | names(test)


def test_classes_that_differ_between_the_splits_are_named(tmp_path):
    touch(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "train/owl/c.jpg", "val/cat/d.jpg",
          "val/emu/e.jpg")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert train.classes == test.classes == ["cat", "dog", "emu", "owl"]
    assert test.labels.tolist() == [0, 2]
    assert any("without images in val/: dog, owl" in note for note in train.notes)
    assert any("without images in train/: emu" in note for note in train.notes)
    (tmp_path / "val/cat").rename(tmp_path / "val/yak")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert (train.classes, test.classes) == (["cat", "dog", "owl"], ["emu", "yak"])
    assert any("train/ and val/ have no class in common" in note for note in train.notes)
    for name in ("emu", "yak"):
        for path in (tmp_path / "val" / name).iterdir():
            path.rename(tmp_path / "val" / path.name)
    test = load(tmp_path, "test")
    assert test.labels is None and any("no class folders in val/" in note for note in test.notes)


def test_names_that_differ_in_case_or_composition_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "p\u00e2t\u00e9")
                            for form in ("NFC", "NFD"))
    assert composed != decomposed
    touch(tmp_path, "train/Cat/a.jpg", f"train/{composed}/b.jpg", "val/cat/c.jpg",
          f"val/{decomposed}/d.jpg")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert train.classes == test.classes == ["Cat", composed]
    assert train.labels.tolist() == [0, 1] and names(test) == {"Cat": ["c.jpg"],
                                                               composed: ["d.jpg"]}
    assert any("val/cat has the class of train/Cat" in note for note in test.notes)
    touch(tmp_path, "val/CAT/f.jpg")                       # two that may be it: neither is
    assert load(tmp_path).classes == ["CAT", "Cat", "cat", composed]
    (tmp_path / "val/CAT/f.jpg").unlink()
    touch(tmp_path, "train/cat/e.jpg")                     # letters: a and A are two classes
    assert load(tmp_path).classes == ["Cat", "cat", composed]
    assert names(load(tmp_path, "test")) == {"cat": ["c.jpg"], composed: ["d.jpg"]}


def test_no_images_at_all_is_an_error_that_lists_what_there_is(tmp_path):
    touch(tmp_path, "a.heic", ".git/b.jpg", "data.zip")
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path)
    for part in (".heic (1)", ".zip (1)", ".git (1)", ".jpg", "Unpack archives"):
        assert part in str(error.value)


def test_a_file_or_an_archive_instead_of_a_folder_is_refused_with_the_next_step(tmp_path):
    touch(tmp_path, "photos.zip")
    with pytest.raises(ValueError, match="photos.zip is a file: give the folder .* unpack"):
        load(tmp_path / "photos.zip")


# ---- names that cannot be printed ----------------------------------------------------------------


def test_names_that_are_not_unicode_are_read(tmp_path):
    if sys.platform != "linux":
        pytest.skip("other systems refuse such names")
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    write_image(f"{folder}/1.png"), write_image(f"{tmp_path}/tea/2.png")
    images = load(tmp_path)
    assert len(images) == 2 and images.classes[0] == "caf\udce9"
    assert datasets.read_pixels(images.paths[0])[0].shape == (30, 40, 3)
