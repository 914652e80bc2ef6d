"""lib/datasets.py on tiny data sets in the official layouts, written here, and on real CIFAR-10."""
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import smooth_pixels, write_image, write_tree
from PIL import Image

import data
from data import View
from lib import datasets

REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def write_json(path, **content):
    write_text(path, json.dumps(content))


def file_names(paths):
    return [os.path.basename(path) for path in paths]


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
def test_every_kind_of_image_file_becomes_rgb(tmp_path, name):
    modes = ["RGB", "L", "RGBA", "P", "1", "LA"] if name == "a.png" else ["RGB", "L", "CMYK"]
    for mode in modes:
        path = write_image(f"{tmp_path}/{mode}-{name}", mode)
        image = datasets.read_image(path)
        assert image.mode == "RGB" and image.size == (40, 30)
        assert mode == "1" or abs(np.asarray(image).mean() - 127) < 60
        assert np.array_equal(image, datasets.read_pixels(path)[0])


def test_read_pixels_decodes_jpeg_to_the_pixels_of_pillow_without_using_it(tmp_path, monkeypatch):
    kinds = dict(plain={}, progressive=dict(progressive=True), fine=dict(subsampling=0),
                 coarse=dict(quality=5), restarts=dict(restart_marker_blocks=1))
    paths = []
    for kind, how in kinds.items():
        paths.append(f"{tmp_path}/{kind}.jpg")
        Image.open(write_image(f"{tmp_path}/{kind}.png", size=(61, 35))).save(paths[-1], **how)
    pillow = [np.asarray(datasets.read_image(path)) for path in paths]
    for path in paths:                                   # damaged: Pillow's error
        whole = open(path, "rb").read()
        for end in (0, 3, len(whole) // 2, len(whole) - 1):
            open(f"{tmp_path}/cut.jpg", "wb").write(whole[:end])
            with pytest.raises(OSError, match="identify|runcated"):
                datasets.read_pixels(f"{tmp_path}/cut.jpg")
    with monkeypatch.context() as without:               # as in a later torchvision
        without.setitem(sys.modules, "torchvision.io", None)
        assert np.array_equal(datasets.read_pixels(paths[0])[0], pillow[0])
    monkeypatch.setattr(datasets, "read_image", None)
    for path, expected in zip(paths, pillow):
        assert np.array_equal(datasets.read_pixels(path)[0], expected)


def draw_corner():
    """An image that shows which side is up: red, the upper left corner blue."""
    image = Image.new("RGB", (48, 32), "red")
    image.paste((0, 0, 255), (0, 0, 16, 16))
    return image


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_except_for_annotated_images(tmp_path, ending, orientation):
    exif, path = Image.Exif(), tmp_path / f"a.{ending}"
    exif[0x0112] = orientation
    inverse = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
               6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = draw_corner()
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[inverse[orientation]])
    stored.save(path, exif=exif)
    for x in (np.asarray(datasets.read_image(path)), datasets.read_pixels(path)[0].numpy()):
        assert np.abs(x.astype(int) - np.asarray(draw_corner())).mean() < 12
    if ending != "tif":                                    # Pillow itself turns TIFF
        assert datasets.read_image(path, upright=False).size == stored.size
    plain = Image.open(path)                               # control: without EXIF it lies
    if orientation > 1 and ending != "tif":
        assert plain.size != (48, 32) or np.abs(
            np.asarray(plain.convert("RGB")).astype(int) - np.asarray(draw_corner())).mean() > 12


def test_damaged_exif_data_is_ignored(tmp_path):
    path = tmp_path / "a.jpg"
    draw_corner().save(path, exif=b"Exif\0\0MM\0*\0\0\xff\xff\x12")
    assert datasets.read_image(path).size == (48, 32)
    assert datasets.read_pixels(path)[0].shape == (32, 48, 3)


def test_colors_under_full_transparency_are_not_seen(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[:2, :, 3], pixels[2, :, 3] = 255, 255, 128     # red, half of it hidden
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.webp", lossless=True, exact=True)
    gif = Image.fromarray(np.repeat([[0], [1]], 4, 1).astype(np.uint8), "P")
    gif.putpalette([255, 0, 0, 0, 255, 0])
    gif.save(tmp_path / "b.gif", transparency=1)
    for name in ("a.png", "a.webp"):
        found = np.asarray(datasets.read_image(tmp_path / name))
        assert np.array_equal(found, datasets.read_pixels(tmp_path / name)[0])
        assert found[0, 0].tolist() == [255, 0, 0] and found[3, 3].tolist() == [255, 255, 255]
        assert abs(int(found[2, 0, 1]) - 127) <= 1
    assert np.asarray(datasets.read_image(tmp_path / "b.gif")).tolist() == [
        [[255, 0, 0]] * 4, [[255, 255, 255]] * 4]


def test_too_many_pixels_are_the_same_error_in_training_and_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)    # Pillow refuses above twice as many
    for name, size in (("good.jpg", (40, 30)), ("large.jpg", (60, 30))):
        write_image(f"{tmp_path}/{name}", size=size)
    for read in (datasets.read_image, datasets.read_pixels):
        with pytest.raises(ValueError, match="more than 1,400 pixels: cut it into parts"):
            read(f"{tmp_path}/large.jpg")
        assert len(read(f"{tmp_path}/good.jpg").getbands() if read is datasets.read_image
                   else read(f"{tmp_path}/good.jpg")[0][0, 0]) == 3


def test_more_than_8_bits_per_color_are_an_error(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for name, image in (("deep.png", ramp.astype(np.uint16)), ("float.tif", ramp / 65535),
                        ("good.png", (ramp / 257).astype(np.uint8))):
        Image.fromarray(image if name != "float.tif" else image.astype(np.float32)).save(
            tmp_path / name)
    def chunk(kind, content):                            # Pillow writes no RGB of 16 bits
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + ramp[:, :, None].astype(">u2").repeat(3, 2)[y].tobytes()
                    for y in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    (tmp_path / "color.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(
        b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert Image.open(tmp_path / "color.png").mode == "RGB"
    for name in ("deep.png", "float.tif", "color.png"):
        with pytest.raises(ValueError, match="more than 8 bits per color"):
            datasets.read_image(tmp_path / name)
    assert datasets.read_image(tmp_path / "good.png").mode == "RGB"
    header = b"BM" + struct.pack("<IHHI", 54 + 128, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 8, 8, 1, 16, 0, 128, 0, 0, 0, 0)
    (tmp_path / "old.bmp").write_bytes(header + bytes(128))      # 16 bits for all colors
    assert datasets.read_image(tmp_path / "old.bmp").mode == "RGB"


def test_photos_of_phones_are_decoded_as_jpeg(tmp_path, monkeypatch):
    """MPO is a JPEG file with a second image, which is not used."""
    one, two = (Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).resize((800, 800))
                for rng in map(np.random.default_rng, (0, 1)))
    one.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[two], quality=95)
    one.save(tmp_path / "plain.jpg", quality=95)
    pixels, side, scale = datasets.read_pixels(tmp_path / "phone.jpg")
    assert (Image.open(tmp_path / "phone.jpg").format, side, scale) == ("MPO", (800, 800), 1)
    assert torch.equal(pixels, datasets.read_pixels(tmp_path / "plain.jpg")[0])
    small, side, scale = datasets.read_pixels(tmp_path / "phone.jpg", lambda *_: 8)
    assert (small.shape, side, scale) == ((100, 100, 3), (800, 800), 8)


def test_a_very_narrow_image_does_not_take_gigabytes(tmp_path, monkeypatch):
    Image.linear_gradient("L").resize((1, 8000)).save(tmp_path / "strip.png")
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: (
        sizes.append(size), resize(self, size, *rest))[1])
    crops, index, bad = data.read_center_crops(
        [tmp_path / "strip.png"], 224, 256, "bicubic", torch.tensor([0]))
    assert crops.shape == (1, 224, 224, 3) and not bad
    assert 100 < crops.float().mean() < 155              # the middle of the gradient
    assert sizes == [(256, 20 * 256)]                    # not 256 x 2,048,000


# ---- folders and binary files --------------------------------------------------------------------


def test_a_folder_of_images_needs_no_labels(tmp_path):
    for i in range(4):
        write_image(f"{tmp_path}/deep/er/{i}.png", seed=i)
    (tmp_path / "deep" / "notes.txt").write_text("hello")
    (tmp_path / "deep" / "._0.png").write_text("written by macOS")
    images = datasets.load_images(str(tmp_path))
    assert len(images) == 4 and images.labels is None and images.classes is None
    assert next(data.Loader(images, [View(8)], 2, workers=0).batches()).label is None
    assert len(next(data.batches(images, 8, workers=0))[0]) == 4


def test_class_folders_give_labels_and_split_folders_give_splits(tmp_path):
    write_tree(tmp_path / "plain", ("cat", "dog"), 3)
    images = datasets.load_images(str(tmp_path / "plain"))
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [0] * 3 + [1] * 3
    assert images.split == "all"
    write_tree(tmp_path / "parts" / "train", ("cat", "dog"), 3)
    write_tree(tmp_path / "parts" / "val", ("cat", "dog"), 2)
    train, test = (datasets.load_images(str(tmp_path / "parts"), split=s) for s in ("train", "val"))
    assert (len(train), len(test), test.split) == (6, 4, "test")
    few = datasets.load_images(str(tmp_path / "plain"), limit=2)
    assert few.labels.tolist() == [0, 1]                      # evenly spaced over the classes
    plain = str(tmp_path / "plain")
    train, test = (datasets.load_images(plain, split=s, hold_out=True) for s in ("train", "val"))
    assert [images.paths.index(path) for path in test.paths] == [0, 5]              # every fifth
    assert sorted(train.paths + test.paths) == images.paths
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    assert (train.split, test.split) == ("train", "test")
    few = datasets.load_images(plain, limit=2, hold_out=True)
    assert [images.paths.index(path) for path in few.paths] == [1, 3]   # limit: within the split


def test_imagenet100_selects_its_classes_in_imagenet(tmp_path):
    three = ["n02869837", "n01749939", "n99999999"]
    for part in ("train", "val"):
        write_tree(tmp_path / "imagenet" / part, three, 2)
    whole = datasets.load_images("imagenet", tmp_path, "val")
    assert whole.classes == sorted(three) and len(whole) == 6
    part = datasets.load_images("imagenet100", tmp_path, "test")
    assert len(part) == 4 and "only 2 of the 100 classes" in part.notes[1]
    assert part.notes[0].endswith(f"4 images in {tmp_path / 'imagenet' / 'val'}")  # not "no labels"
    assert part.notes[2].endswith("passed over: folders of other classes: n99999999 (1)")
    assert part.classes == datasets.IMAGENET100 and len(set(part.classes)) == 100
    names = {os.path.basename(os.path.dirname(p)) for p in part.paths}
    assert names == {part.classes[i] for i in part.labels} == set(three[:2])
    with datasets.list_once():                           # as training does
        assert datasets.load_images("imagenet100", tmp_path, "test").paths == part.paths
    itself = datasets.load_images("imagenet", tmp_path / "imagenet")
    assert len(itself) == 6
    write_tree(tmp_path / "imagenet10" / "train", ["n07747607", "n00000001"], 2)
    ten = datasets.load_images("imagenet10", tmp_path, "train")
    assert len(ten) == 2 and len(set(ten.classes)) == 10 and ten.labels.unique().tolist() == [9]
    write_image(f"{tmp_path}/flat/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(FileNotFoundError, match="val sorted into class folders"):
        datasets.load_images("imagenet", tmp_path / "flat", "val")


@pytest.mark.parametrize("place", ["coco/train2017", "train2017", "images/train2017"])
def test_coco_is_found_in_its_usual_places(tmp_path, place):
    write_image(f"{tmp_path}/{place}/000000000009.jpg")
    images = datasets.load_images("coco", tmp_path)
    assert len(images) == 1 and images.labels is None


def write_cifar(root, key=str, protocol=2, evil=None, fine=False):
    """Two images per file. key: type of the keys, str as written by Python 2, or bytes."""
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    k = (lambda s: s.encode()) if key is bytes else str
    names = ["train", "test"] if fine else [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    label = "fine_label" if fine else "label"
    for i, name in enumerate(names):
        pixels = smooth_pixels(2, 32, seed=i).reshape(2, 3072).numpy()
        content = {k("data"): pixels, k(label + "s"): [i, 1]}
        (folder / name).write_bytes(pickle.dumps(content if evil is None else evil, protocol))
    content = {k(label + "_names"): [k(f"class {i}") for i in range(10)]}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("key", [str, bytes])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar_pickles_of_all_protocols_are_read(tmp_path, key, protocol):
    write_cifar(tmp_path, key, protocol)
    write_cifar(tmp_path, key, protocol, fine=True)
    train, test = (datasets.load_images("cifar10", tmp_path, split) for split in ("train", "val"))
    assert train.labels.tolist() == [0, 1, 1, 1, 2, 1, 3, 1, 4, 1] and train.classes[2] == "class 2"
    assert torch.equal(train.pixels[4:6], smooth_pixels(2, 32, seed=2))
    assert torch.equal(test.pixels, smooth_pixels(2, 32, seed=5))
    assert len(datasets.load_images("cifar10", tmp_path, limit=3)) == 3
    assert datasets.load_images("cifar100", tmp_path, "test").labels.tolist() == [1, 1]


class Malicious:
    """Creates a folder when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    write_cifar(tmp_path, evil={"data": Malicious(tmp_path / "owned"), "labels": [0]})
    with pytest.raises(ValueError, match=r"data_batch_1 is not a CIFAR file: .*mkdir.* refused"):
        datasets.load_images("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()
    pickle.load(io.BytesIO((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()))
    assert (tmp_path / "owned").exists()                      # control: the pickle is harmful
    for module, name in (("numpy", "load"), ("builtins", "eval"), ("numpy.testing", "ndarray.x")):
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            datasets.ArraysOnly(io.BytesIO(f"c{module}\n{name}\n.".encode())).load()


def test_numbers_of_numpy_are_unpickled():
    content = {"box": [np.float32(1.5), np.int64(7)], "ids": np.arange(3)}
    for protocol in range(2, 6):
        found = datasets.ArraysOnly(io.BytesIO(pickle.dumps(content, protocol))).load()
        assert found["box"] == content["box"] and found["ids"].tolist() == [0, 1, 2]


def test_a_damaged_or_incomplete_cifar_is_an_error(tmp_path):
    write_cifar(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes((folder / "test_batch").read_bytes()[:200])
    with pytest.raises(ValueError, match="test_batch is not a CIFAR file"):
        datasets.load_images("cifar10", tmp_path, "test")
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="expected cifar-10-batches-py"):
        datasets.load_images("cifar10", tmp_path)


def test_stl10_is_stored_column_by_column(tmp_path):
    x = smooth_pixels(3, 96)
    (tmp_path / "stl10_binary").mkdir()
    for name in ("train", "unlabeled"):
        x.mT.contiguous().numpy().tofile(tmp_path / "stl10_binary" / f"{name}_X.bin")
    np.array([1, 10, 3], np.uint8).tofile(tmp_path / "stl10_binary" / "train_y.bin")
    (tmp_path / "stl10_binary" / "class_names.txt").write_text("a b c d e f g h i j")
    images = datasets.load_images("stl10", tmp_path)
    assert torch.equal(images.pixels, x) and images.labels.tolist() == [0, 9, 2]
    assert datasets.load_images("stl10", tmp_path, "unlabeled").labels is None
    for labels, cut in ((b"\1\2\3", 1000), (b"\1\2", 0)):
        (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(labels)
        file = tmp_path / "stl10_binary" / "train_X.bin"
        os.truncate(file, file.stat().st_size - cut)
        with pytest.raises(ValueError, match="train_X.bin is truncated, or does not match"):
            datasets.load_images("stl10", tmp_path)
        x.mT.contiguous().numpy().tofile(file)


def test_the_built_in_sets_need_no_files():
    noise = datasets.load_images("synthetic", size=16, limit=8)
    assert noise.pixels.shape == (8, 3, 16, 16) and 100 < noise.pixels.float().mean() < 155
    for name in ("toy", "toy-scenes"):
        images = datasets.load_images(name, split="test", size=32, limit=5)
        expected = datasets.toy.draw(torch.arange(5), "test", 32, scenes=name == "toy-scenes")
        assert torch.equal(images.pixels, expected["image"])
        assert torch.equal(images.labels, expected["label"])
        assert images.classes == list(datasets.toy.CLASSES)


@pytest.mark.skipif(not os.path.exists(f"{REAL}/cifar-10-batches-py"), reason="no CIFAR-10 here")
def test_the_real_cifar_has_the_known_statistics():
    images = datasets.load_images("cifar10", REAL)
    assert images.labels.bincount().unique().numel() == 1 and images.classes[3] == "cat"
    mean = images.pixels.float().mean((0, 2, 3)) / 255
    assert (mean - torch.tensor([0.4914, 0.4822, 0.4465])).abs().max() < 0.005


# ---- sets with official lists --------------------------------------------------------------------


def write_pets(root):
    folder = root / "oxford-iiit-pet"
    for i, name in enumerate(["Abyssinian_1", "Abyssinian_2", "yorkshire_terrier_7", "british_3"]):
        write_image(folder / "images" / f"{name}.jpg", "L" if i == 1 else "RGB")
    lists = folder / "annotations"
    write_text(lists / "trainval.txt", "yorkshire_terrier_7 2 2 1", "Abyssinian_1 1 1 1")
    write_text(lists / "test.txt", "Abyssinian_2 1 1 1", "british_3 2 1 2")


def test_pets_are_read_from_the_official_lists(tmp_path):
    write_pets(tmp_path)
    train, test = (datasets.load_images("pets", tmp_path, split) for split in ("train", "val"))
    assert file_names(train.paths) == ["yorkshire_terrier_7.jpg", "Abyssinian_1.jpg"]
    assert train.labels.tolist() == [1, 0] and train.labels.dtype == torch.int64
    assert train.classes == ["Abyssinian", "Yorkshire Terrier"]
    assert file_names(test.paths) == ["Abyssinian_2.jpg", "british_3.jpg"] and test.split == "test"
    assert len(datasets.load_images("pets", tmp_path, limit=1)) == 1
    [(x, index)] = data.batches(train, 32, workers=0)      # as in the probes
    assert x.shape == (2, 3, 32, 32) and index.tolist() == [0, 1]


@pytest.mark.parametrize("line", ["Abyssinian_1 one 1 1", "Abyssinian_1 1", "Abyssinian_1 9 1 1"])
def test_damaged_lists_of_pets_are_an_error(tmp_path, line):
    write_pets(tmp_path)
    write_text(tmp_path / "oxford-iiit-pet/annotations/trainval.txt", line)
    message = "trainval.txt .* does not have the format of pets .*: expected oxford"
    with pytest.raises(ValueError, match=message):
        datasets.load_images("pets", tmp_path)


def test_flowers_train_on_their_train_and_val(tmp_path, monkeypatch):
    io, published = pytest.importorskip("scipy.io"), pytest.importorskip("torchvision.datasets")
    files = {key: (name, None) for key, (name, _) in published.Flowers102._file_dict.items()}
    folder = tmp_path / "flowers-102"
    folder.mkdir()
    for i in range(1, 5):
        write_image(folder / "jpg" / f"image_0000{i}.jpg")
    io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 102, 3, 3]], np.uint8)})
    io.savemat(folder / "setid.mat", {"trnid": [[2, 1]], "valid": [[4, 4]], "tstid": [[3, 3]]})
    with pytest.raises(ValueError, match=r"format of flowers \(RuntimeError: .*corrupted\): expe"):
        datasets.load_images("flowers", tmp_path)                    # the md5 of the official files
    monkeypatch.setattr(published.Flowers102, "_file_dict", files)
    train, test = (datasets.load_images("flowers", tmp_path, split) for split in ("train", "test"))
    assert file_names(train.paths) == [f"image_0000{i}.jpg" for i in (2, 1, 4, 4)]
    assert train.labels.tolist() == [101, 0, 2, 2] and len(train.classes) == 102
    assert test.labels.tolist() == [2, 2] and test.classes[0] == "pink primrose"


@pytest.mark.parametrize("folder", ["CUB_200_2011", "."])
def test_cub_has_its_classes_and_its_official_split(tmp_path, folder):
    lists = {"images.txt": "3 002.Lark/b.jpg\n7 001.Wren/a.jpg\n9 002.Lark/c.jpg",
             "image_class_labels.txt": "3 2\n7 1\n9 2", "train_test_split.txt": "3 1\n7 0\n9 0",
             "classes.txt": "1 001.Wren\n2 002.Lark\n3 003.Owl"}
    for name, text in lists.items():
        write_text(tmp_path / folder / name, text)
    train, test = (datasets.load_images("cub", tmp_path, split) for split in ("train", "test"))
    assert file_names(train.paths) == ["b.jpg"] and train.labels.tolist() == [1]
    assert file_names(test.paths) == ["a.jpg", "c.jpg"] and test.labels.tolist() == [0, 1]
    assert train.classes == test.classes == ["001.Wren", "002.Lark", "003.Owl"]
    write_text(tmp_path / folder / "train_test_split.txt", "3 1")
    with pytest.raises(ValueError, match="does not have the format of cub .*: expected CUB_200"):
        datasets.load_images("cub", tmp_path)


def test_the_missing_part_of_a_data_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="^No coco under .*: expected coco/.train2017, "):
        datasets.load_images("coco", tmp_path, "test")
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"^No coco/val2017 \(a part of coco\) under "):
        datasets.load_images("coco", tmp_path, "test")


def test_cars_count_their_classes_from_zero(tmp_path):
    io = pytest.importorskip("scipy.io")
    folder = tmp_path / "stanford_cars"
    kind = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for split, path in (("train", "devkit/cars_train_annos.mat"),
                        ("test", "cars_test_annos_withlabels.mat")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        rows = np.array([[(1, 1, 9, 9, c, f"0000{c}.jpg") for c in (2, 1, 2)]], kind)
        io.savemat(folder / path, {"annotations": rows})
        write_image(folder / f"cars_{split}" / "00001.jpg")
    names = np.array([["AM General Hummer", "Acura RL"]], object)
    with pytest.raises(ValueError, match="format of cars .*cars_meta.mat.*: expected stanford"):
        datasets.load_images("cars", tmp_path)
    io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    for split in ("train", "test"):
        images = datasets.load_images("cars", tmp_path, split)
        assert images.labels.tolist() == [1, 0, 1] and images.classes == names[0].tolist()
        assert images.paths[1] == str(folder / f"cars_{split}" / "00001.jpg")


@pytest.mark.parametrize("name, file", [("flowers", "flowers-102/setid.mat"),
                                        ("cars", "stanford_cars/devkit/cars_train_annos.mat")])
def test_without_scipy_the_error_shows_how_to_install_it(tmp_path, monkeypatch, name, file):
    write_text(tmp_path / file, "")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=f"labels of {name} are .mat .*: pip install scipy"):
        datasets.load_images(name, tmp_path)


def write_inaturalist(root, folder="inat18"):
    categories = [{"id": 1, "name": "Turdus merula"}, {"id": 0, "name": "Apis mellifera"}]
    for split, ids in (("train", (7, 8, 9)), ("val", (4,))):
        names = {i: f"train_val2018/Aves/{i % 2}/{i}.jpg" for i in ids}
        write_json(root / folder / f"{split}2018.json", categories=categories,
                   images=[{"id": i, "file_name": name} for i, name in names.items()],
                   annotations=[{"id": 1, "image_id": i, "category_id": i % 2}
                                for i in reversed(ids)])


@pytest.mark.parametrize("folder", ["inat18", "."])
def test_inaturalist_joins_images_and_annotations(tmp_path, folder):
    write_inaturalist(tmp_path, folder)
    train, test = (datasets.load_images("inat18", tmp_path, split) for split in ("train", "test"))
    assert train.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [0]
    assert train.classes == ["Apis mellifera", "Turdus merula"]
    assert train.paths[0] == str(tmp_path / folder / "train_val2018" / "Aves" / "1" / "7.jpg")
    content = json.loads((tmp_path / folder / "train2018.json").read_text())
    content["annotations"].pop()
    write_json(tmp_path / folder / "train2018.json", **content)
    with pytest.raises(ValueError, match="train2018.json .* the format of inat18 .KeyError: 7"):
        datasets.load_images("inat18", tmp_path)


def test_miniimagenet_has_other_classes_in_each_split(tmp_path):
    folder = tmp_path / "miniimagenet"
    for split, wnids in (("train", "n03 n01"), ("val", "n04"), ("test", "n05 n06")):
        files = [(f"{wnid}0000000{i}.jpg", wnid) for wnid in wnids.split() for i in (1, 2, 3)]
        write_text(folder / f"{split}.csv", "filename,label", *map(",".join, files))
        for file, _ in files:
            write_image(folder / "images" / file, size=(84, 84))
    train, val, test = (datasets.load_images("miniimagenet", tmp_path, split)
                        for split in ("train", "val", "test"))
    assert train.classes == ["n01", "n03"] and train.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert val.classes == ["n04"] and val.split == "val" and test.classes == ["n05", "n06"]
    assert train.paths[0] == str(folder / "images" / "n0300000001.jpg")
    spaced = datasets.load_images("miniimagenet", tmp_path, limit=2)
    assert spaced.labels.tolist() == [1, 0]
    write_text(folder / "test.csv", "file,class", "a,b")
    with pytest.raises(ValueError, match="test.csv .* the format of miniimagenet .KeyError: 'file"):
        datasets.load_images("miniimagenet", tmp_path, "test")
    with pytest.raises(ValueError, match="No split 'dev' of miniimagenet: choose train or test or"):
        datasets.load_images("miniimagenet", tmp_path, "dev")


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", datasets.LAYOUT)
def test_a_missing_set_is_an_error_with_its_layout_and_source(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        datasets.load_images(name, tmp_path)
    layout, source = datasets.LAYOUT[name]
    for part in (layout, source, str(tmp_path), "nothing is downloaded"):
        assert part in str(error.value)


def test_the_default_root_is_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    write_image(f"{tmp_path}/coco/val2017/1.jpg")
    assert len(datasets.load_images("coco", split="val")) == 1
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        datasets.load_images("coco", "elsewhere", "val")


def test_wrong_names_and_numbers_are_errors_with_the_next_step(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'cifar10'.*path of a folder"):
        datasets.load_images("cifar-10")
    with pytest.raises(ValueError, match=f"{os.getcwd()}, has the name 'xyzzy'. Give one of toy"):
        datasets.load_images("xyzzy")                         # nothing is similar: no suggestion
    with pytest.raises(FileNotFoundError, match=f"No folder {os.getcwd()}/nowhere"):
        datasets.load_images("./nowhere")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match="No images .*for .*.jpg .*: .txt .1.. Unpack"):
        datasets.load_images(str(tmp_path))
    with pytest.raises(ValueError, match="No split 'dev'"):
        datasets.load_images("synthetic", split="dev")
    with pytest.raises(ValueError, match="limit is 0"):
        datasets.load_images("synthetic", limit=0)


DRAW_IN_PROCESSES = """
import multiprocessing, os, torch
from lib import datasets

torch.set_num_threads(2)
x = torch.rand(600, 600)
(x @ x).exp().sum()                      # starts threads, which a forked process does not have
parent, draw = os.getpid(), datasets.toy.draw

def spy(index, *args, **kwargs):
    assert os.getpid() != parent and torch.get_num_threads() == 1
    return draw(index, *args, **kwargs)

datasets.toy.draw = spy
images = datasets.load_images("toy", split="test", size=16, limit=1100)
assert torch.get_num_threads() == 2 and not multiprocessing.active_children()
torch.save([images.pixels, images.labels], os.environ["FILE"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere toy is drawn in the process")
def test_toy_drawn_in_processes_is_the_same(tmp_path):
    alone = datasets.load_images("toy", split="test", size=16, limit=1100)
    subprocess.run([sys.executable, "-c", DRAW_IN_PROCESSES], check=True, timeout=300,
                   cwd=Path(__file__).parent.parent,
                   env=os.environ | {"FILE": str(tmp_path / "drawn")})
    pixels, labels = torch.load(tmp_path / "drawn")
    assert torch.equal(pixels, alone.pixels) and torch.equal(labels, alone.labels)


@pytest.mark.parametrize("platform, threads, limit", [
    ("darwin", 2, 1000), ("linux", 1, 1000), ("linux", 8, 999)])
def test_toy_is_drawn_in_the_process_if_that_is_safer_or_faster(monkeypatch, platform, threads,
                                                                limit):
    drawn = []
    monkeypatch.setattr(datasets.sys, "platform", platform)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(datasets.toy, "draw", lambda index, *_, **__: (
        drawn.append(os.getpid()), {"image": torch.zeros(len(index), 3, 8, 8), "label": index})[1])
    assert len(datasets.load_images("toy", size=8, limit=limit)) == limit
    assert set(drawn) == {os.getpid()}


def test_drawing_and_reading_show_how_far_they_are(monkeypatch, tmp_path):
    seen, draw, scandir = [], datasets.toy.draw, os.scandir

    def look(function):
        return lambda *args, **kwargs: (
            seen.extend(bar.line() for bar in datasets.progress.running[-1:]),
            function(*args, **kwargs))[1]

    monkeypatch.setattr(datasets.progress, "running", [])
    monkeypatch.setattr(datasets.toy, "draw", look(draw))
    datasets.load_images("toy", limit=300, size=16)
    assert "drawing toy, train: 0 of 300 images" in seen[0]
    assert "drawing toy, train: 256 of 300 images" in seen[1]
    seen.clear()
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(datasets.tree.os, "scandir", look(scandir))
    datasets.load_images(str(tmp_path))
    assert [line.split(": ")[1].split(",")[0] for line in seen] == [
        "after 00:00", "2 files", "3 files"]             # before a folder is read
    assert datasets.progress.running == []
