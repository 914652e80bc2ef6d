"""data.py against torchvision and PIL, readers on tiny fixtures, and the promises of the loader."""
import io
import itertools
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop

import data
from data import View
from lib import augment, datasets, rng

REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
COLOUR = dict(jitter_p=0.8, grey_p=0.2, blur_p=0.5, solarize_p=0.3)


def pictures(n=16, size=32, seed=0):
    """Smooth random pictures, (n, 3, size, size) uint8: noise alone hides errors of resampling."""
    u = rng.uniform(torch.arange(n), (3, 8, 8), seed, "pictures")
    x = F.interpolate(u, size=(size, size), mode="bicubic").clamp(0, 1)
    return x.mul(255).round().to(torch.uint8)


def resident(n=40, size=24, **more):
    return datasets.Images("made up", "train", pixels=pictures(n, size), **more)


def photo(path, mode="RGB", size=(40, 30), seed=0):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    noise = rng.uniform(torch.tensor([seed]), (6, 5, 4), "photo")[0].mul(255).byte().numpy()
    image = Image.fromarray(noise[..., :3]).resize(size, Image.BICUBIC)
    if mode == "RGBA":
        image.putalpha(128)
    image.convert(mode).save(path)
    return path


def tree(root, classes=("n01", "n02"), each=6, **more):
    for c, (name, i) in enumerate(itertools.product(classes, range(each))):
        photo(f"{root}/{name}/{name}_{i}.JPEG", seed=c, **more)
    return str(root)


def take(loader, n, start=0):
    return list(itertools.islice(loader.batches(start), n))


def same(a, b):
    return torch.equal(a.index, b.index) and all(map(torch.equal, a.views, b.views))


# ---- augmentations -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [16, 48])
def test_crop_and_resize_equal_torchvision_crop_by_crop(kernel, size):
    x = pictures(6, 40)
    box = torch.tensor([[0, 0, 40, 40], [3, 5, 20, 30], [10, 0, 7, 9], [1, 2, 39, 11],
                        [20, 20, 20, 20], [0, 39, 40, 1]])
    ours = augment.crop(x, box, size, kernel)
    for image, (top, left, h, w), out in zip(x, box.tolist(), ours):
        piece = image[None, :, top:top + h, left:left + w].float() / 255
        theirs = F.interpolate(piece, size=(size, size), mode=kernel, antialias=True).clamp(0, 1)
        torch.testing.assert_close(out, theirs[0], atol=2e-6, rtol=0)
        tv = TF.resized_crop(image.float() / 255, top, left, h, w, [size, size],
                             T.InterpolationMode(kernel), antialias=True)
        torch.testing.assert_close(out, tv.clamp(0, 1), atol=2e-6, rtol=0)
    flipped = augment.crop(x, box, size, kernel, torch.tensor([True, False] * 3))
    torch.testing.assert_close(flipped[0], ours[0].flip(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(flipped[1], ours[1])
    moved = augment.crop(x[:3], box[:3] + torch.tensor([1, 0, -1, 0]), size, kernel)
    assert (moved - ours[:3]).abs().max() > 0.01              # control: one pixel off is seen


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "lanczos"])
def test_each_kernel_is_pils_up_to_rounding_to_grey_levels(kernel):
    x = pictures(2, 40)
    ours = augment.crop(x, torch.tensor([[0, 0, 40, 40]]), 23, kernel) * 255
    for image, out in zip(x, ours):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = np.asarray(image.resize((23, 23), Image.Resampling[kernel.upper()]), np.float32)
        assert np.abs(out.permute(1, 2, 0).numpy() - theirs).max() < 1.6
        piece = torch.from_numpy(np.array(image))
        ours = datasets.resize(piece[3:39, :30], 23, kernel).permute(1, 2, 0).numpy()
        error = np.abs(ours - np.asarray(image.crop((0, 3, 30, 39)).resize(
            (23, 23), Image.Resampling[kernel.upper()]), np.float32))
        assert error.max() <= (kernel != "lanczos")


@pytest.mark.parametrize("height, width, scale", [(64, 64, (0.08, 1.0)), (375, 500, (0.4, 1.0)),
                                                  (30, 300, (0.5, 1.0))])
def test_crop_boxes_have_the_distribution_of_torchvision(height, width, scale):
    n, ratio = 6000, (3 / 4, 4 / 3)
    u = rng.uniform(torch.arange(n), 22, "boxes", height)
    ours = augment.crop_boxes(u, height, width, torch.tensor(scale), torch.tensor(ratio)).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, height, width)
        theirs = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
        theirs = torch.tensor(theirs).double()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()

    def far(a, b):
        """Largest distance of the two distribution functions, over position, size, area, shape."""
        worst = 0.0
        for f in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 2], lambda x: x[:, 3],
                  lambda x: x[:, 2] * x[:, 3], lambda x: x[:, 3] / x[:, 2]):
            p, q = f(a).sort().values, f(b).sort().values
            at = torch.cat([p, q]).unique()
            gap = torch.searchsorted(p, at, right=True) - torch.searchsorted(q, at, right=True)
            worst = max(worst, gap.abs().max().item() / n)
        return worst

    assert far(ours, theirs) < 1.95 * (2 / n) ** 0.5          # Kolmogorov-Smirnov at 0.1 %
    u2 = u.clone()
    u2[:, :10] = u2[:, :10] ** 1.3                            # control: areas that are not uniform
    other = augment.crop_boxes(u2, height, width, torch.tensor(scale), torch.tensor(ratio)).double()
    assert height == 30 or far(other, theirs) > 1.95 * (2 / n) ** 0.5


def test_the_crop_of_a_view_is_by_default_torchvisions():
    view, theirs = data.View(64), RandomResizedCrop(64)
    assert (view.scale, view.ratio) == (theirs.scale, theirs.ratio)


def test_an_image_that_is_too_long_gets_the_central_box():
    u, scale, ratio = torch.rand(5, 22), torch.tensor([0.9, 1.0]), torch.tensor([0.75, 4 / 3])
    box = augment.crop_boxes(u, 10, 100, scale, ratio)
    assert box.tolist() == [[0, 43, 10, 13]] * 5


def test_hue_equals_torchvision_for_each_angle():
    x = pictures(16).float() / 255
    x[14], x[15] = 0.5, 0.0                                   # no hue at all
    x[0, :, :4] = torch.tensor([1.0, 0.2, 1.0]).view(3, 1, 1)     # two largest channels
    x[1, :, :4] = torch.tensor([0.1, 0.7, 0.7]).view(3, 1, 1)
    turn = torch.linspace(-0.5, 0.5, 16)
    ours = augment.adjust_hue(x, turn)
    for a, b, t in zip(ours, x, turn.tolist()):
        torch.testing.assert_close(a, TF.adjust_hue(b, t), atol=2e-5, rtol=0)
    assert (ours[3] - x[3]).abs().max() > 0.05


@pytest.mark.parametrize("op", range(4))
def test_each_colour_operation_equals_torchvision(op):
    x = pictures(8).float() / 255
    factor = torch.linspace(-0.1, 0.1, 8) if op == augment.HUE else torch.linspace(0.3, 1.7, 8)
    ours = augment.jitter(x.clone(), torch.full((8, 1), op), factor[:, None])
    theirs = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue][op]
    for a, b, f in zip(ours, x, factor.tolist()):
        torch.testing.assert_close(a, theirs(b, f), atol=2e-5, rtol=0)


def test_jitter_of_a_batch_keeps_the_order_of_each_image():
    x = pictures(24).float() / 255
    op = torch.tensor(list(itertools.permutations(range(4))))
    low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    factor = (low + (high - low) * rng.uniform(torch.arange(24), 4, "f")).gather(1, op)
    functions = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]

    def reference(op):
        out = []
        for image, ops, factors in zip(x, op.tolist(), factor.tolist()):
            for o, f in zip(ops, factors):
                image = functions[o](image, f)
            out.append(image)
        return torch.stack(out)

    ours = augment.jitter(x.clone(), op, factor)
    torch.testing.assert_close(ours, reference(op), atol=5e-5, rtol=0)
    swapped, factor = op[:, [1, 0, 2, 3]], factor[:, [1, 0, 2, 3]]
    assert (ours - reference(swapped)).abs().max() > 0.01     # control: the order does matter


def test_grey_and_solarize_equal_torchvision():
    x = pictures(8).float() / 255
    torch.testing.assert_close(augment.luma(x), TF.rgb_to_grayscale(x), atol=1e-6, rtol=0)
    out = augment.solarize(x, torch.full((8,), 128 / 255))
    torch.testing.assert_close(out, TF.solarize(x, 128 / 255))
    theirs = ImageOps.solarize(Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()))
    ours = (out[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(theirs), ours)


@pytest.mark.parametrize("size", [16, 33])
def test_blur_is_pils_up_to_rounding_to_grey_levels(size):
    x = rng.uniform(torch.arange(12), (3, size, size), "noise").mul(255).byte()
    radius = torch.linspace(0.1, 2.0, 12)
    ours = augment.blur(x.float(), radius)
    for image, r, out in zip(x, radius.tolist(), ours):
        framed = np.pad(image.permute(1, 2, 0).numpy(), ((8, 8), (8, 8), (0, 0)), "edge")
        theirs = Image.fromarray(framed).filter(ImageFilter.GaussianBlur(r))
        theirs = np.asarray(theirs, np.float32)[8:-8, 8:-8]
        error = np.abs(out.permute(1, 2, 0).numpy() - theirs)
        assert error.max() <= 3               # PIL makes six passes, each rounds by up to 0.5
        assert r < 0.4 or error.mean() < 0.7  # (and so rounds the smallest radii away)
    assert (ours[11] - augment.blur(x.float(), radius.flip(0))[11]).abs().max() > 20
    torch.testing.assert_close(augment.blur(torch.ones(2, 3, size, size), radius[:2]),
                               torch.ones(2, 3, size, size))
    with pytest.raises(ValueError, match="radius 2.4"):
        View(8, blur_sigma=(0.1, 3.0))


def test_one_number_is_no_jitter():
    for scale in ((0.4, 0.2), (-0.1, 1), (0.5, 1.5)):
        with pytest.raises(ValueError, match="shares of the image, the smaller one first"):
            View(8, scale=scale)
    with pytest.raises(ValueError, match="four numbers, of brightness"):
        View(8, jitter=(0.3,))


def test_dice_fall_as_torchvision_says():
    n, view = 20000, View(8, jitter=(0.4, 0.3, 0.2, 0.1), flip=0.3, blur_p=0.1, **{
        k: v for k, v in COLOUR.items() if k != "blur_p"})
    dice = augment.sample_params(view, torch.arange(n), 0, 0, 0)
    for what, p in ((dice["flip"], 0.3), (dice["radius"] > 0, 0.1), (dice["threshold"] < 1, 0.3),
                    (dice["grey"], 0.2)):
        assert abs(what.float().mean().item() - p) < 4 * (p * (1 - p) / n) ** 0.5
    op, factor = dice["op"], dice["factor"]
    on = (factor != torch.tensor([1.0, 1.0, 1.0, 0.0])[op]).any(1)
    assert abs(on.float().mean().item() - 0.8) < 0.012
    orders, counts = op.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and (counts / n - 1 / 24).abs().max() < 0.006
    for o, (low, high) in enumerate([(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)]):
        values = factor[on].gather(1, (op[on] == o).int().argmax(1, keepdim=True))[:, 0]
        expected = torch.linspace(low, high, 11)[1:-1]
        measured = values.quantile(torch.linspace(0, 1, 11)[1:-1])
        assert (measured - expected).abs().max() < 0.02 * (high - low)
    radius = dice["radius"][dice["radius"] > 0]
    assert radius.min() >= 0.1 and radius.max() <= 2 and abs(radius.mean() - 1.05) < 0.05


def test_a_whole_view_equals_torchvision_with_the_same_parameters():
    images = resident(20)
    view = View(16, **COLOUR)
    batch = take(data.Loader(images, [view], 20, seed=5), 1)[0]
    dice = augment.sample_params(view, batch.index, 5, 0, 0)
    boxes = augment.crop_boxes(rng.uniform(batch.index, 22, 5, 0, 0, "box"), 24, 24,
                            torch.tensor(view.scale), torch.tensor(view.ratio))
    functions = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for row, number in enumerate(batch.index.tolist()):
        x = TF.resized_crop(images.pixels[number].float() / 255, *boxes[row].tolist(), [16, 16],
                            T.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        x = TF.horizontal_flip(x) if dice["flip"][row] else x
        for o, f in zip(dice["op"][row].tolist(), dice["factor"][row].tolist()):
            x = functions[o](x, f)
        x = TF.rgb_to_grayscale(x, 3) if dice["grey"][row] else x
        if dice["radius"][row] > 0:                           # PIL is another test: here our own
            x = augment.blur(x[None], dice["radius"][row:row + 1])[0]
        if dice["threshold"][row] < 1:
            keep = (x - 128 / 255).abs() > 1e-4               # rounding decides at the threshold
            x = torch.where(keep, TF.solarize(x, 128 / 255), augment.denormalize(
                batch.views[0][row]).float() / 255)
        x = TF.normalize(x, augment.MEAN, augment.STD)
        torch.testing.assert_close(batch.views[0][row], x, atol=0.02, rtol=0)
        assert (batch.views[0][row] - x).abs().median() < 1e-4


def test_denormalize_undoes_normalize():
    x = pictures(3)
    assert torch.equal(augment.denormalize(augment.normalize(x.float() / 255)), x)


# ---- the loader ----------------------------------------------------------------------------------

VIEWS = [View(16, scale=(0.4, 1.0), **COLOUR), View(8, scale=(0.05, 0.4), **COLOUR, copies=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("folder"), each=10)


def test_resume_from_any_step_gives_the_same_batches_bit_for_bit(folder):
    for images in (resident(), datasets.load_images(folder)):
        whole = take(data.Loader(images, VIEWS, 8, seed=3, workers=0), 7)
        for start in (1, 4, 5):
            again = take(data.Loader(images, VIEWS, 8, seed=3, workers=0), 2, start)
            assert all(map(same, again, whole[start:start + 2]))
            assert [b.step for b in again] == [start, start + 1]
        assert not same(whole[0], whole[1])
        other = take(data.Loader(images, VIEWS, 8, seed=4, workers=0), 1)[0]
        assert not same(whole[0], other)


def test_the_number_of_workers_changes_nothing(folder):
    images = datasets.load_images(folder)
    here = take(data.Loader(images, VIEWS, 8, workers=0), 4)
    there = take(data.Loader(images, VIEWS, 8, workers=2), 4)
    assert all(map(same, here, there)) and [b.epoch for b in there] == [0, 0, 1, 1]


def test_two_processes_see_the_two_halves_of_what_one_sees(folder):
    for images in (resident(), datasets.load_images(folder)):
        one = take(data.Loader(images, VIEWS, 12, workers=0), 3)
        two = [take(data.Loader(images, VIEWS, 12, workers=0, rank=r, world=2), 3)
               for r in range(2)]
        for whole, a, b in zip(one, *two):
            assert torch.equal(whole.index, torch.cat([a.index, b.index]))
            for x, y, z in zip(whole.views, a.views, b.views):
                assert torch.equal(x, torch.cat([y, z]))
        assert not torch.equal(two[0][0].index, two[1][0].index)


def test_an_epoch_shows_every_image_at_most_once_and_the_next_another_order():
    loader = data.Loader(resident(40), [View(8)], 12)
    assert len(loader) == 3
    epochs = [torch.cat([b.index for b in take(loader, 3, 3 * e)]) for e in range(2)]
    assert all(len(e.unique()) == 36 for e in epochs) and not torch.equal(*epochs)


def test_the_views_of_an_image_differ_and_follow_the_epoch():
    loader = data.Loader(resident(8), [View(16, copies=2)], 8)
    first, second = take(loader, 2)
    assert len(first.views) == 2
    assert (first.views[0] - first.views[1]).abs().mean() > 0.05
    a, b = (x.views[0][x.index.argsort()] for x in (first, second))
    assert ((a - b).abs().mean((1, 2, 3)) > 0.01).all()


def test_a_like_view_is_the_same_crop_at_another_size(folder):
    view = View(32, jitter_p=0.8, grey_p=0.2)
    for images in (resident(20, 64), datasets.load_images(folder)):
        twin = replace(view, size=16, like=0)
        big, small, other = take(data.Loader(images, [view, twin, replace(view, size=16)], 8,
                                             workers=0), 1)[0].views
        shrunk = F.interpolate(big, size=(16, 16), mode="bilinear", antialias=True)
        assert (shrunk - small).abs().mean() < 0.12 < (shrunk - other).abs().mean()


def test_loading_leaves_the_global_random_state_alone(folder):
    before = torch.get_rng_state()
    for workers in (0, 1):
        take(data.Loader(datasets.load_images(folder), VIEWS, 4, workers=workers), 1)
        list(data.batches(datasets.load_images(folder), 16, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


def test_labels_go_with_their_images(folder):
    images = datasets.load_images(folder)
    batch = take(data.Loader(images, [View(8)], 20, workers=0), 1)[0]
    names = [os.path.basename(os.path.dirname(images.paths[i])) for i in batch.index.tolist()]
    assert [images.classes[label] for label in batch.label.tolist()] == names


def test_impossible_batch_sizes_say_what_is_possible():
    with pytest.raises(ValueError, match="choose 1 to 40"):
        data.Loader(resident(40), VIEWS, 41)
    with pytest.raises(ValueError, match="not divisible by the 3 processes: try 6"):
        data.Loader(resident(40), VIEWS, 8, world=3)


def test_the_dice_mirror_files_each_view_for_itself(tmp_path):
    for i in range(12):
        photo(f"{tmp_path}/{i}.png", size=(16, 16), seed=i)
    images = datasets.load_images(str(tmp_path))
    whole = View(16, scale=(1, 1), ratio=(1, 1), copies=2)
    batch = take(data.Loader(images, [whole], 12, seed=3, workers=0), 1)[0]
    for stream, view in enumerate(batch.views):
        flip = augment.sample_params(whole, batch.index, 3, 0, stream)["flip"]
        assert 0 < flip.sum() < 12
        for number, mirrored, out in zip(batch.index.tolist(), flip, augment.denormalize(view)):
            x = torch.from_numpy(np.array(datasets.read_image(images.paths[number]))).permute(2, 0, 1)
            assert torch.equal(out, x.flip(2) if mirrored else x)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_file_is_named_once_and_replaced_by_the_next(tmp_path, capsys, workers):
    images = datasets.load_images(tree(tmp_path, each=6))
    whole = open(images.paths[3], "rb").read()
    open(images.paths[3], "wb").write(whole[:len(whole) // 2])
    loader = data.Loader(images, [View(16)], 12, workers=workers)
    batches = take(loader, 3)
    assert loader.skipped == 3
    assert capsys.readouterr().err.count(images.paths[3] + ":") == 1
    for batch in batches:
        assert sorted(batch.index.tolist()) == sorted([*range(3), 4, *range(4, 12)])
        assert torch.equal(batch.label, images.labels[batch.index])
    open(images.paths[3], "wb").write(whole)
    loader = data.Loader(images, [View(16)], 12, workers=workers)
    assert 3 in take(loader, 1)[0].index and loader.skipped == 0


def test_more_than_8_bits_a_colour_are_told_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for name, image in (("deep.png", ramp.astype(np.uint16)), ("float.tif", ramp / 65535),
                        ("good.png", (ramp / 257).astype(np.uint8))):
        Image.fromarray(image if name != "float.tif" else image.astype(np.float32)).save(
            tmp_path / name)
    for name in ("deep.png", "float.tif"):
        with pytest.raises(ValueError, match="more than 8 bits a colour"):
            datasets.read_image(tmp_path / name)
    assert datasets.read_image(tmp_path / "good.png").mode == "RGB"


def test_one_image_a_process_may_be_unreadable(tmp_path):
    images = datasets.load_images(tree(tmp_path, each=4))
    open(images.paths[0], "wb").write(b"not an image")
    loader = data.Loader(images, [View(8)], 1, workers=0)
    assert 0 not in [batch.index.item() for batch in take(loader, len(images))]
    assert loader.skipped == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_is_mostly_unreadable_is_an_error(tmp_path, workers):
    images = datasets.load_images(tree(tmp_path, each=4))
    for path in images.paths[:6]:
        open(path, "wb").write(b"not an image")
    with pytest.raises(ValueError, match="^More than half of a batch .* cannot be read"):
        take(data.Loader(images, [View(8)], 8, workers=workers), 1)


# ---- the test view -------------------------------------------------------------------------------


def test_the_test_view_of_files_is_torchvisions(tmp_path):
    for i, size in enumerate([(40, 30), (31, 57), (64, 64), (20, 20)]):
        photo(f"{tmp_path}/{i}.png", size=size, seed=i)
    images = datasets.load_images(str(tmp_path))
    standard = T.Compose([T.Resize(36, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToImage(),
                          T.ToDtype(torch.float32, scale=True), T.Normalize(augment.MEAN, augment.STD)])
    theirs = torch.stack([standard(Image.open(path)) for path in images.paths])
    for workers in (0, 2):
        seen = list(data.batches(images, 32, batch_size=3, workers=workers))
        torch.testing.assert_close(torch.cat([x for x, _ in seen]), theirs, atol=1e-6, rtol=0)
        assert torch.cat([index for _, index in seen]).tolist() == [0, 1, 2, 3]
    wrong = torch.cat([x for x, _ in data.batches(images, 32, resize=40, workers=0)])
    assert (wrong - theirs).abs().mean() > 0.01


def test_the_test_view_of_resident_sets_is_the_whole_image():
    images = resident(10, 24)
    plain = torch.cat([x for x, _ in data.batches(images, 24, batch_size=4)])
    assert torch.equal(augment.denormalize(plain), images.pixels)
    large = torch.cat([x for x, _ in data.batches(images, 32, batch_size=4, resize=36)])
    theirs = F.interpolate(images.pixels / 255, size=(36, 36), mode="bicubic", antialias=True)
    theirs = TF.normalize(theirs.clamp(0, 1)[:, :, 2:34, 2:34], augment.MEAN, augment.STD)
    torch.testing.assert_close(large, theirs, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="smaller than the centre crop"):
        next(data.batches(images, 32, resize=20))


def test_the_test_view_names_an_unreadable_file(tmp_path):
    images = datasets.load_images(tree(tmp_path))
    open(images.paths[2], "wb").write(b"\xff\xd8 no")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="^Cannot read .*n01_2.JPEG"):
            list(data.batches(images, 16, workers=workers))


# ---- readers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
def test_every_kind_of_file_becomes_rgb(tmp_path, name):
    modes = ["RGB", "L", "RGBA", "P", "1", "LA"] if name == "a.png" else ["RGB", "L", "CMYK"]
    for mode in modes:
        path = photo(f"{tmp_path}/{mode}-{name}", mode)
        image = datasets.read_image(path)
        assert image.mode == "RGB" and image.size == (40, 30)
        assert mode == "1" or abs(np.asarray(image).mean() - 127) < 60
        assert np.array_equal(image, datasets.read_pixels(path))


def test_the_loader_decodes_jpeg_to_the_bytes_of_pillow_without_it(tmp_path, monkeypatch):
    kinds = dict(plain={}, progressive=dict(progressive=True), fine=dict(subsampling=0),
                 coarse=dict(quality=5), restarts=dict(restart_marker_blocks=1))
    paths = []
    for kind, how in kinds.items():
        paths.append(f"{tmp_path}/{kind}.jpg")
        Image.open(photo(f"{tmp_path}/{kind}.png", size=(61, 35))).save(paths[-1], **how)
    pillow = [np.asarray(datasets.read_image(path)) for path in paths]
    for path in paths:                                   # damaged: Pillow's verdict and its words
        whole = open(path, "rb").read()
        for end in (0, 3, len(whole) // 2, len(whole) - 1):
            open(f"{tmp_path}/cut.jpg", "wb").write(whole[:end])
            with pytest.raises(OSError, match="identify|runcated"):
                datasets.read_pixels(f"{tmp_path}/cut.jpg")
    with monkeypatch.context() as without:               # as some later torchvision
        without.setitem(sys.modules, "torchvision.io", None)
        assert np.array_equal(datasets.read_pixels(paths[0]), pillow[0])
    monkeypatch.setattr(datasets, "read_image", None)
    for path, expected in zip(paths, pillow):
        assert np.array_equal(datasets.read_pixels(path), expected)


def test_a_folder_of_images_needs_no_labels(tmp_path):
    for i in range(4):
        photo(f"{tmp_path}/deep/er/{i}.png", seed=i)
    (tmp_path / "deep" / "notes.txt").write_text("hello")
    (tmp_path / "deep" / "._0.png").write_text("what macOS leaves behind")
    images = datasets.load_images(str(tmp_path))
    assert len(images) == 4 and images.labels is None and images.classes is None
    assert take(data.Loader(images, [View(8)], 2, workers=0), 1)[0].label is None
    assert len(next(data.batches(images, 8, workers=0))[0]) == 4


def test_class_folders_give_labels_and_splits_are_used_where_they_are(tmp_path):
    tree(tmp_path / "plain", ("cat", "dog"), 3)
    images = datasets.load_images(str(tmp_path / "plain"))
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [0] * 3 + [1] * 3
    assert images.split == "all"
    tree(tmp_path / "parts" / "train", ("cat", "dog"), 3)
    tree(tmp_path / "parts" / "val", ("cat", "dog"), 2)
    train, test = (datasets.load_images(str(tmp_path / "parts"), split=s) for s in ("train", "val"))
    assert (len(train), len(test), test.split) == (6, 4, "test")
    few = datasets.load_images(str(tmp_path / "plain"), limit=2)
    assert few.labels.tolist() == [0, 1]                      # spread over the classes
    plain = str(tmp_path / "plain")
    train, test = (datasets.load_images(plain, split=s, apart=True) for s in ("train", "val"))
    assert [images.paths.index(path) for path in test.paths] == [0, 5]              # every fifth
    assert sorted(train.paths + test.paths) == images.paths
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    assert (train.split, test.split) == ("train", "test")
    few = datasets.load_images(plain, limit=2, apart=True)
    assert [images.paths.index(path) for path in few.paths] == [1, 3]   # the limit is for the split


def test_imagenet_100_is_picked_out_of_imagenet(tmp_path, capsys):
    three = ["n02869837", "n01749939", "n99999999"]
    for part in ("train", "val"):
        tree(tmp_path / "imagenet" / part, three, 2)
    whole = datasets.load_images("imagenet", tmp_path, "val")
    assert whole.classes == sorted(three) and len(whole) == 6
    part = datasets.load_images("imagenet100", tmp_path, "test")
    assert len(part) == 4 and "2 of the 100" in capsys.readouterr().err
    assert part.classes == datasets.IMAGENET100 and len(set(part.classes)) == 100
    names = {os.path.basename(os.path.dirname(p)) for p in part.paths}
    assert names == {part.classes[i] for i in part.labels} == set(three[:2])
    assert len(datasets.load_images("imagenet", tmp_path / "imagenet")) == 6         # the root itself will do
    tree(tmp_path / "imagenet10" / "train", ["n07747607", "n00000001"], 2)
    ten = datasets.load_images("imagenet10", tmp_path, "train")
    assert len(ten) == 2 and len(set(ten.classes)) == 10 and ten.labels.unique().tolist() == [9]
    photo(f"{tmp_path}/flat/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(FileNotFoundError, match="val sorted into class folders"):
        datasets.load_images("imagenet", tmp_path / "flat", "val")


@pytest.mark.parametrize("place", ["coco/train2017", "train2017", "images/train2017"])
def test_coco_is_found_in_its_usual_places(tmp_path, place):
    photo(f"{tmp_path}/{place}/000000000009.jpg")
    images = datasets.load_images("coco", tmp_path)
    assert len(images) == 1 and images.labels is None


def cifar(root, key=str, protocol=2, evil=None, fine=False):
    """Two images in each batch; key: str as Python 2 wrote it, or bytes as others do."""
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    k = (lambda s: s.encode()) if key is bytes else str
    names = ["train", "test"] if fine else [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    label = "fine_label" if fine else "label"
    for i, name in enumerate(names):
        pixels = pictures(2, 32, seed=i).reshape(2, 3072).numpy()
        content = {k("data"): pixels, k(label + "s"): [i, 1]}
        (folder / name).write_bytes(pickle.dumps(content if evil is None else evil, protocol))
    content = {k(label + "_names"): [k(f"class {i}") for i in range(10)]}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("key", [str, bytes])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar_pickles_are_read(tmp_path, key, protocol):
    cifar(tmp_path, key, protocol)
    cifar(tmp_path, key, protocol, fine=True)
    train, test = (datasets.load_images("cifar10", tmp_path, split) for split in ("train", "val"))
    assert train.labels.tolist() == [0, 1, 1, 1, 2, 1, 3, 1, 4, 1] and train.classes[2] == "class 2"
    assert torch.equal(train.pixels[4:6], pictures(2, 32, seed=2))
    assert torch.equal(test.pixels, pictures(2, 32, seed=5))
    assert len(datasets.load_images("cifar10", tmp_path, limit=3)) == 3
    assert datasets.load_images("cifar100", tmp_path, "test").labels.tolist() == [1, 1]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    cifar(tmp_path, evil={"data": Evil(tmp_path / "owned"), "labels": [0]})
    with pytest.raises(ValueError, match=r"data_batch_1 is not a CIFAR file: .*mkdir.* refused"):
        datasets.load_images("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()
    pickle.load(io.BytesIO((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()))
    assert (tmp_path / "owned").exists()                      # control: the pickle does bite
    for module, name in (("numpy", "load"), ("builtins", "eval"), ("numpy.testing", "ndarray.x")):
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            datasets.ArraysOnly(io.BytesIO(f"c{module}\n{name}\n.".encode())).load()


def test_a_damaged_or_incomplete_cifar_says_so(tmp_path):
    cifar(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes((folder / "test_batch").read_bytes()[:200])
    with pytest.raises(ValueError, match="test_batch is not a CIFAR file"):
        datasets.load_images("cifar10", tmp_path, "test")
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="expected cifar-10-batches-py"):
        datasets.load_images("cifar10", tmp_path)


def test_stl10_is_stored_columns_first(tmp_path):
    x = pictures(3, 96)
    (tmp_path / "stl10_binary").mkdir()
    for name in ("train", "unlabeled"):
        x.mT.contiguous().numpy().tofile(tmp_path / "stl10_binary" / f"{name}_X.bin")
    np.array([1, 10, 3], np.uint8).tofile(tmp_path / "stl10_binary" / "train_y.bin")
    (tmp_path / "stl10_binary" / "class_names.txt").write_text("airplane\nbird\ncar\n")
    images = datasets.load_images("stl10", tmp_path)
    assert torch.equal(images.pixels, x) and images.labels.tolist() == [0, 9, 2]
    assert datasets.load_images("stl10", tmp_path, "unlabeled").labels is None
    for labels, cut in ((b"\1\2\3", 1000), (b"\1\2", 0)):
        (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(labels)
        file = tmp_path / "stl10_binary" / "train_X.bin"
        os.truncate(file, file.stat().st_size - cut)
        with pytest.raises(ValueError, match="train_X.bin is cut off, or does not go with"):
            datasets.load_images("stl10", tmp_path)
        x.mT.contiguous().numpy().tofile(file)


def test_the_built_in_sets_need_nothing():
    noise = datasets.load_images("synthetic", size=16, limit=8)
    assert noise.pixels.shape == (8, 3, 16, 16) and 100 < noise.pixels.float().mean() < 155
    for name in ("toy", "toy-scenes"):
        images = datasets.load_images(name, split="test", size=32, limit=5)
        drawn = datasets.toy.draw(torch.arange(5), "test", 32, scenes=name == "toy-scenes")
        assert torch.equal(images.pixels, drawn["image"])
        assert torch.equal(images.labels, drawn["label"])
        assert images.classes == list(datasets.toy.CLASSES)


@pytest.mark.skipif(not os.path.exists(f"{REAL}/cifar-10-batches-py"), reason="no CIFAR-10 here")
def test_the_real_cifar_has_the_known_statistics():
    images = datasets.load_images("cifar10", REAL)
    assert images.labels.bincount().unique().numel() == 1 and images.classes[3] == "cat"
    mean = images.pixels.float().mean((0, 2, 3)) / 255
    assert (mean - torch.tensor([0.4914, 0.4822, 0.4465])).abs().max() < 0.005


# ---- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", datasets.LAYOUT)
def test_a_missing_set_prints_the_layout_and_where_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        datasets.load_images(name, tmp_path)
    layout, source = datasets.LAYOUT[name]
    for part in (layout, source, str(tmp_path), "nothing is downloaded"):
        assert part in str(error.value)


def test_the_root_comes_from_the_environment_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    photo(f"{tmp_path}/coco/val2017/1.jpg")
    assert len(datasets.load_images("coco", split="val")) == 1
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        datasets.load_images("coco", "elsewhere", "val")


def test_wrong_names_and_numbers_get_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'cifar10'.*path of a folder"):
        datasets.load_images("cifar-10")
    with pytest.raises(FileNotFoundError, match="No folder ./nowhere"):
        datasets.load_images("./nowhere")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match="No images under .*for .jpg .*labels are not"):
        datasets.load_images(str(tmp_path))
    with pytest.raises(ValueError, match="No split 'dev'"):
        datasets.load_images("synthetic", split="dev")
    with pytest.raises(ValueError, match="limit is 0"):
        datasets.load_images("synthetic", limit=0)
