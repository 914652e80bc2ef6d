"""data.py: views are valid, batches do not depend on how they are computed, and damaged files are
reported."""
import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from image_files import make_images, write_image, write_tree
from PIL import ExifTags, Image
from torchvision.transforms import RandomResizedCrop

import data
from data import View
from lib import augment, datasets, rng

COLORS = dict(jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.3)


def take(loader, n, start=0):
    """The first n batches from step `start` on."""
    return list(itertools.islice(loader.batches(start), n))


def equal(a, b):
    return torch.equal(a.index, b.index) and all(map(torch.equal, a.views, b.views))


# ---- View ----------------------------------------------------------------------------------------


def test_the_default_crop_of_a_view_is_torchvisions():
    view, theirs = data.View(64), RandomResizedCrop(64)
    assert (view.scale, view.ratio) == (theirs.scale, theirs.ratio)


def test_a_view_with_impossible_settings_is_an_error():
    with pytest.raises(ValueError, match="choose at most 2.4"):
        View(8, blur_sigma=(0.1, 3.0))
    for scale in ((0.4, 0.2), (-0.1, 1), (0.5, 1.5), (0.5,)):
        with pytest.raises(ValueError, match="two fractions of the image.*the smaller one first"):
            View(8, scale=scale)
    with pytest.raises(ValueError, match="--color-jitter .*: give four numbers, for brightness"):
        View(8, jitter=(0.3,))


# ---- Loader --------------------------------------------------------------------------------------

VIEWS = [View(16, scale=(0.4, 1.0), **COLORS), View(8, scale=(0.05, 0.4), **COLORS, copies=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("folder"), each=10)


def test_resume_from_any_step_gives_the_same_batches_bit_for_bit(folder):
    for images in (make_images(), datasets.load_images(folder)):
        whole = take(data.Loader(images, VIEWS, 8, seed=3, workers=0), 7)
        for start in (1, 4, 5):
            again = take(data.Loader(images, VIEWS, 8, seed=3, workers=0), 2, start)
            assert all(map(equal, again, whole[start:start + 2]))
        assert not equal(whole[0], whole[1])
        other = take(data.Loader(images, VIEWS, 8, seed=4, workers=0), 1)[0]
        assert not equal(whole[0], other)


def test_the_number_of_workers_changes_nothing(folder):
    images = datasets.load_images(folder)
    here = take(data.Loader(images, VIEWS, 8, workers=0), 4)
    there = take(data.Loader(images, VIEWS, 8, workers=2), 4)
    assert all(map(equal, here, there)) and [b.epoch for b in there] == [0, 0, 1, 1]


def test_large_images_are_cut_one_by_one_to_the_same_crops(folder, monkeypatch):
    loader = data.Loader(datasets.load_images(folder), [View(16, copies=2)], 12, workers=0)
    together, cut, sizes = next(loader.batches()), data.Loader.cut, []
    monkeypatch.setattr(data, "GROUP_BYTES", 1)
    monkeypatch.setattr(data.Loader, "cut", lambda self, group, *rest: (
        sizes.append(len(group)), cut(self, group, *rest)))
    alone = next(loader.batches())
    assert sizes == 12 * [1] + [0]
    assert all(map(torch.equal, alone.views, together.views))


def test_two_processes_get_the_two_halves_of_the_batch_of_one(folder):
    for images in (make_images(), datasets.load_images(folder)):
        one = take(data.Loader(images, VIEWS, 12, workers=0), 3)
        two = [take(data.Loader(images, VIEWS, 12, workers=0, rank=r, world=2), 3)
               for r in range(2)]
        for whole, a, b in zip(one, *two):
            assert torch.equal(whole.index, torch.cat([a.index, b.index]))
            for x, y, z in zip(whole.views, a.views, b.views):
                assert torch.equal(x, torch.cat([y, z]))
        assert not torch.equal(two[0][0].index, two[1][0].index)


def test_an_epoch_has_every_image_at_most_once_and_the_next_epoch_another_order():
    loader = data.Loader(make_images(40), [View(8)], 12)
    assert len(loader) == 3
    epochs = [torch.cat([b.index for b in take(loader, 3, 3 * e)]) for e in range(2)]
    assert all(len(e.unique()) == 36 for e in epochs) and not torch.equal(*epochs)


def test_the_views_of_an_image_differ_from_each_other_and_between_epochs():
    loader = data.Loader(make_images(8), [View(16, copies=2)], 8)
    first, second = take(loader, 2)
    assert len(first.views) == 2
    assert (first.views[0] - first.views[1]).abs().mean() > 0.05
    a, b = (x.views[0][x.index.argsort()] for x in (first, second))
    assert ((a - b).abs().mean((1, 2, 3)) > 0.01).all()


def test_a_like_view_is_the_same_crop_at_another_size(folder):
    view = View(32, jitter_p=0.8, gray_p=0.2)
    for images in (make_images(20, 64), datasets.load_images(folder)):
        twin = replace(view, size=16, like=0)
        big, small, other = take(data.Loader(images, [view, twin, replace(view, size=16)], 8,
                                             workers=0), 1)[0].views
        shrunk = F.interpolate(big, size=(16, 16), mode="bilinear", antialias=True)
        assert (shrunk - small).abs().mean() < 0.12 < (shrunk - other).abs().mean()


def test_loading_does_not_change_the_global_random_state(folder):
    before = torch.get_rng_state()
    for workers in (0, 1):
        take(data.Loader(datasets.load_images(folder), VIEWS, 4, workers=workers), 1)
        list(data.batches(datasets.load_images(folder), 16, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


def test_labels_belong_to_their_images(folder):
    images = datasets.load_images(folder)
    batch = take(data.Loader(images, [View(8)], 20, workers=0), 1)[0]
    names = [os.path.basename(os.path.dirname(images.paths[i])) for i in batch.index.tolist()]
    assert [images.classes[label] for label in batch.label.tolist()] == names


def test_an_impossible_batch_size_is_an_error_that_names_a_possible_one():
    with pytest.raises(ValueError, match="choose 1 to 40"):
        data.Loader(make_images(40), VIEWS, 41)
    with pytest.raises(ValueError, match="not divisible by the 3 processes: try 6"):
        data.Loader(make_images(40), VIEWS, 8, world=3)


def test_each_view_of_a_file_is_flipped_by_its_own_parameters(tmp_path):
    for i in range(12):
        write_image(f"{tmp_path}/{i}.png", size=(16, 16), seed=i)
    images = datasets.load_images(str(tmp_path))
    whole = View(16, scale=(1, 1), ratio=(1, 1), copies=2)
    batch = take(data.Loader(images, [whole], 12, seed=3, workers=0), 1)[0]
    for stream, view in enumerate(batch.views):
        flip = augment.sample_params(whole, batch.index, 3, 0, stream)["flip"]
        assert 0 < flip.sum() < 12
        for number, mirrored, out in zip(batch.index.tolist(), flip, augment.denormalize(view)):
            x = np.array(datasets.read_image(images.paths[number]))
            x = torch.from_numpy(x).permute(2, 0, 1)
            assert torch.equal(out, x.flip(2) if mirrored else x)


def write_photo(path, width, height, orientation=1):
    """Writes a JPEG file with details of all sizes, as photos have."""
    x = sum(F.interpolate(rng.uniform(torch.arange(1), (3, n * 3, n * 4), "photo", n) - 0.5,
                          size=(height, width), mode="bicubic") / n ** 0.5
            for n in (2, 4, 8, 16, 32, 64, 128, 256))[0]
    image = Image.fromarray(x.mul(200).add(128).clamp(0, 255).byte().permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, quality=92, exif=exif)


@pytest.mark.parametrize("width, height, orientation, scale", [
    (1026, 770, 1, 4), (1024, 768, 6, 4), (1026, 770, 6, 1), (500, 375, 1, 1)])
def test_crops_of_a_large_photo_are_torchvisions_when_decoded_at_a_smaller_scale(
        tmp_path, monkeypatch, width, height, orientation, scale):
    write_photo(tmp_path / "a.jpg", width, height, orientation)
    images = datasets.load_images(str(tmp_path))
    views = [View(48, scale=(0.5, 1), flip=0), View(24, scale=(0.15, 0.4), flip=0, copies=2)]
    loader = data.Loader(images, views, 1, workers=0)
    whole = datasets.read_image(images.paths[0])
    read, scales = datasets.read_pixels, []
    monkeypatch.setattr(datasets, "read_pixels", lambda *given: (
        found := read(*given), scales.append(found[2]))[0])

    def errors():
        """Mean difference from torchvision of each view of five epochs, in levels of 256."""
        for batch in take(loader, 5):
            u = loader.sample_box_numbers(batch.index, batch.epoch)[0]
            boxes = augment.crop_boxes(u, *whole.size[::-1], loader.scale, loader.ratio).tolist()
            for view, box, out in zip(loader.views, boxes, batch.views):
                theirs = TF.resized_crop(whole, *box, [view.size] * 2, T.InterpolationMode.BICUBIC)
                difference = augment.denormalize(out[0]).float() - TF.pil_to_tensor(theirs)
                yield difference.abs().mean().item()

    found = list(errors())
    assert set(scales) == {scale}
    assert max(found) < (0.4 if scale > 1 else 0.01)
    if scale > 1:                                          # control: half as many pixels
        monkeypatch.setattr(data.Loader, "choose_scale", lambda *_: 2 * scale)
        assert min(errors()) > 0.4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_file_is_reported_once_and_replaced_by_another(tmp_path, capsys, workers):
    images = datasets.load_images(write_tree(tmp_path, each=6))
    whole = open(images.paths[3], "rb").read()
    open(images.paths[3], "wb").write(whole[:len(whole) // 2])
    loader = data.Loader(images, [View(16)], 12, workers=workers)
    batches = take(loader, 3)
    assert loader.skipped == 3
    assert capsys.readouterr().err.count(images.paths[3] + ":") == 1
    for batch in batches:
        other = (3 + loader.stride) % 12
        assert sorted(batch.index.tolist()) == sorted([*range(3), *range(4, 12), other])
        assert torch.equal(batch.label, images.labels[batch.index])
    open(images.paths[3], "wb").write(whole)
    loader = data.Loader(images, [View(16)], 12, workers=workers)
    assert 3 in take(loader, 1)[0].index and loader.skipped == 0


def test_a_single_unreadable_image_in_a_batch_of_one_is_replaced(tmp_path):
    images = datasets.load_images(write_tree(tmp_path, each=4))
    open(images.paths[0], "wb").write(b"not an image")
    loader = data.Loader(images, [View(8)], 1, workers=0)
    assert 0 not in [batch.index.item() for batch in take(loader, len(images))]
    assert loader.skipped == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_is_mostly_unreadable_is_an_error(tmp_path, workers):
    images = datasets.load_images(write_tree(tmp_path, each=4))
    for path in images.paths[:6]:
        open(path, "wb").write(b"not an image")
    with pytest.raises(ValueError, match="^More than half .* batch .* cannot be read, .*identify"):
        take(data.Loader(images, [View(8)], 8, workers=workers), 1)


def test_unreadable_neighbors_are_no_reason_to_end_a_run(tmp_path):
    """A quarter of the files, one after the other as in a class folder: less than half."""
    images = datasets.load_images(write_tree(tmp_path, each=16))
    for path in images.paths[:8]:
        open(path, "wb").write(b"not an image")
    counts = torch.zeros(32)
    for batch in take(data.Loader(images, [View(8)], 8, workers=0), 40):
        counts += batch.index.bincount(minlength=32)
    assert not counts[:8].any()
    assert counts[8:].max() <= 4 * 10                      # not one image in place of all eight


def test_a_data_set_of_one_unreadable_image_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="a.png"):
        take(data.Loader(datasets.load_images(str(tmp_path)), [View(8)], 1, workers=0), 1)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 30, 97, 210])
def test_the_replacements_of_an_image_are_all_others(n):
    stride = data.Loader(make_images(n, 8), [View(8)], 1, workers=0).stride
    assert len({i * stride % n for i in range(n)}) == n


# ---- batches, for evaluation ---------------------------------------------------------------------


def test_batches_of_files_are_torchvisions_resize_and_center_crop(tmp_path):
    for i, size in enumerate([(40, 30), (31, 57), (64, 64), (20, 20)]):
        write_image(f"{tmp_path}/{i}.png", size=size, seed=i)
    images = datasets.load_images(str(tmp_path))
    standard = T.Compose([T.Resize(36, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToImage(),
                          T.ToDtype(torch.float32, scale=True),
                          T.Normalize(augment.MEAN, augment.STD)])
    theirs = torch.stack([standard(Image.open(path)) for path in images.paths])
    for workers in (0, 2):
        seen = list(data.batches(images, 32, batch_size=3, workers=workers))
        torch.testing.assert_close(torch.cat([x for x, _ in seen]), theirs, atol=1e-6, rtol=0)
        assert torch.cat([index for _, index in seen]).tolist() == [0, 1, 2, 3]
    wrong = torch.cat([x for x, _ in data.batches(images, 32, resize=40, workers=0)])
    assert (wrong - theirs).abs().mean() > 0.01


def test_batches_of_sets_in_memory_are_whole_images():
    images = make_images(10, 24)
    plain = torch.cat([x for x, _ in data.batches(images, 24, batch_size=4)])
    assert torch.equal(augment.denormalize(plain), images.pixels)
    large = torch.cat([x for x, _ in data.batches(images, 32, batch_size=4, resize=36)])
    theirs = F.interpolate(images.pixels / 255, size=(36, 36), mode="bicubic", antialias=True)
    theirs = TF.normalize(theirs.clamp(0, 1)[:, :, 2:34, 2:34], augment.MEAN, augment.STD)
    torch.testing.assert_close(large, theirs, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="smaller than the center crop"):
        next(data.batches(images, 32, resize=20))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_leave_out_unreadable_files_and_list_all_of_them(tmp_path, capsys, workers):
    images = datasets.load_images(write_tree(tmp_path))
    whole = [x for x, _ in data.batches(images, 16, batch_size=12, workers=workers)][0]
    bad = [2, 4, 5, 11]                                    # 4 and 5: a whole batch
    for number in bad:
        open(images.paths[number], "wb").write(b"\xff\xd8 no")
    good = [number for number in range(12) if number not in bad]
    seen = list(data.batches(images, 16, batch_size=2, workers=workers))
    assert torch.cat([index for _, index in seen]).tolist() == good and len(seen) == 5
    assert torch.equal(torch.cat([x for x, _ in seen]), whole[good])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("left out 4 of 12 images of")
    assert all(images.paths[number] in line for number in bad)
    list(data.batches(images, 16, batch_size=2, workers=workers))
    assert capsys.readouterr().err == ""                   # once is enough
    next(data.batches(images, 16, batch_size=3, workers=workers))      # as for a visualization
    assert "left out 1 of 3" in capsys.readouterr().err
    for number in good[:3]:
        open(images.paths[number], "wb").write(b"")
    with pytest.raises(datasets.UnreadableImage, match="7 of 12 images of .* cannot be read, for"):
        list(data.batches(images, 16, batch_size=2, workers=workers))
    shared = [data.batches(images, 16, 2, workers=workers, rank=rank, world=2) for rank in (0, 1)]
    assert sum(len(index) for part in shared for _, index in part) == 5      # the caller decides
