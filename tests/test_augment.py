"""lib/augment.py against torchvision and Pillow."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from image_files import make_images, smooth_pixels
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop

import data
from data import View
from lib import augment, datasets, rng

COLORS = dict(jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.3)


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [16, 48])
def test_crop_equals_torchvision_on_each_image(kernel, size):
    x = smooth_pixels(6, 40)
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
    assert (moved - ours[:3]).abs().max() > 0.01              # control: a shift of one pixel


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "lanczos"])
def test_each_resize_kernel_equals_pillow_up_to_rounding(kernel):
    x = smooth_pixels(2, 40)
    ours = augment.crop(x, torch.tensor([[0, 0, 40, 40]]), 23, kernel) * 255
    for image, out in zip(x, ours):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = np.asarray(image.resize((23, 23), Image.Resampling[kernel.upper()]), np.float32)
        assert np.abs(out.permute(1, 2, 0).numpy() - theirs).max() < 1.6
        piece = torch.from_numpy(np.array(image))
        ours = datasets.resize(piece, (3, 0, 36, 30), 23, kernel).permute(1, 2, 0).numpy()
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

    def distance(a, b):
        """Largest distance of the distribution functions of position, size, area and aspect."""
        worst = 0.0
        for f in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 2], lambda x: x[:, 3],
                  lambda x: x[:, 2] * x[:, 3], lambda x: x[:, 3] / x[:, 2]):
            p, q = f(a).sort().values, f(b).sort().values
            at = torch.cat([p, q]).unique()
            gap = torch.searchsorted(p, at, right=True) - torch.searchsorted(q, at, right=True)
            worst = max(worst, gap.abs().max().item() / n)
        return worst

    assert distance(ours, theirs) < 1.95 * (2 / n) ** 0.5          # Kolmogorov-Smirnov at 0.1 %
    u2 = u.clone()
    u2[:, :10] = u2[:, :10] ** 1.3                            # control: areas not uniform
    other = augment.crop_boxes(u2, height, width, torch.tensor(scale), torch.tensor(ratio)).double()
    assert height == 30 or distance(other, theirs) > 1.95 * (2 / n) ** 0.5


def test_crop_boxes_of_a_very_wide_image_are_central():
    u, scale, ratio = torch.rand(5, 22), torch.tensor([0.9, 1.0]), torch.tensor([0.75, 4 / 3])
    box = augment.crop_boxes(u, 10, 100, scale, ratio)
    assert box.tolist() == [[0, 43, 10, 13]] * 5


def test_adjust_hue_equals_torchvision_for_each_angle():
    x = smooth_pixels(16).float() / 255
    x[14], x[15] = 0.5, 0.0                                   # gray: no hue
    x[0, :, :4] = torch.tensor([1.0, 0.2, 1.0]).view(3, 1, 1)     # two channels are largest
    x[1, :, :4] = torch.tensor([0.1, 0.7, 0.7]).view(3, 1, 1)
    turn = torch.linspace(-0.5, 0.5, 16)
    ours = augment.adjust_hue(x, turn)
    for a, b, t in zip(ours, x, turn.tolist()):
        torch.testing.assert_close(a, TF.adjust_hue(b, t), atol=2e-5, rtol=0)
    assert (ours[3] - x[3]).abs().max() > 0.05


@pytest.mark.parametrize("op", range(4))
def test_each_color_operation_equals_torchvision(op):
    x = smooth_pixels(8).float() / 255
    factor = torch.linspace(-0.1, 0.1, 8) if op == augment.HUE else torch.linspace(0.3, 1.7, 8)
    ours = augment.jitter(x.clone(), torch.full((8, 1), op), factor[:, None])
    theirs = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue][op]
    for a, b, f in zip(ours, x, factor.tolist()):
        torch.testing.assert_close(a, theirs(b, f), atol=2e-5, rtol=0)


def test_jitter_applies_to_each_image_its_own_order_of_operations():
    x = smooth_pixels(24).float() / 255
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
    assert (ours - reference(swapped)).abs().max() > 0.01     # control: the order matters


def test_luma_and_solarize_equal_torchvision():
    x = smooth_pixels(8).float() / 255
    torch.testing.assert_close(augment.luma(x), TF.rgb_to_grayscale(x), atol=1e-6, rtol=0)
    out = augment.solarize(x, torch.full((8,), 128 / 255))
    torch.testing.assert_close(out, TF.solarize(x, 128 / 255))
    theirs = ImageOps.solarize(Image.fromarray(smooth_pixels(1)[0].permute(1, 2, 0).numpy()))
    ours = (out[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(theirs), ours)


@pytest.mark.parametrize("size", [16, 33])
def test_blur_equals_pillow_up_to_rounding(size):
    x = rng.uniform(torch.arange(12), (3, size, size), "noise").mul(255).byte()
    radius = torch.linspace(0.1, 2.0, 12)
    ours = augment.blur(x.float(), radius)
    for image, r, out in zip(x, radius.tolist(), ours):
        framed = np.pad(image.permute(1, 2, 0).numpy(), ((8, 8), (8, 8), (0, 0)), "edge")
        theirs = Image.fromarray(framed).filter(ImageFilter.GaussianBlur(r))
        theirs = np.asarray(theirs, np.float32)[8:-8, 8:-8]
        error = np.abs(out.permute(1, 2, 0).numpy() - theirs)
        assert error.max() <= 3               # Pillow makes six passes, each rounds by up to 0.5,
        assert r < 0.4 or error.mean() < 0.7  # so the smallest radii have no effect there
    assert (ours[11] - augment.blur(x.float(), radius.flip(0))[11]).abs().max() > 20
    torch.testing.assert_close(augment.blur(torch.ones(2, 3, size, size), radius[:2]),
                               torch.ones(2, 3, size, size))


def test_sampled_parameters_have_the_distributions_of_torchvision():
    n, view = 20000, View(8, jitter=(0.4, 0.3, 0.2, 0.1), flip=0.3, blur_p=0.1, **{
        k: v for k, v in COLORS.items() if k != "blur_p"})
    params = augment.sample_params(view, torch.arange(n), 0, 0, 0)
    for chosen, p in ((params["flip"], 0.3), (params["radius"] > 0, 0.1),
                      (params["threshold"] < 1, 0.3), (params["gray"], 0.2)):
        assert abs(chosen.float().mean().item() - p) < 4 * (p * (1 - p) / n) ** 0.5
    op, factor = params["op"], params["factor"]
    on = (factor != torch.tensor([1.0, 1.0, 1.0, 0.0])[op]).any(1)
    assert abs(on.float().mean().item() - 0.8) < 0.012
    orders, counts = op.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and (counts / n - 1 / 24).abs().max() < 0.006
    for o, (low, high) in enumerate([(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)]):
        values = factor[on].gather(1, (op[on] == o).int().argmax(1, keepdim=True))[:, 0]
        expected = torch.linspace(low, high, 11)[1:-1]
        measured = values.quantile(torch.linspace(0, 1, 11)[1:-1])
        assert (measured - expected).abs().max() < 0.02 * (high - low)
    radius = params["radius"][params["radius"] > 0]
    assert radius.min() >= 0.1 and radius.max() <= 2 and abs(radius.mean() - 1.05) < 0.05


def test_a_complete_view_equals_torchvision_with_the_same_parameters():
    images = make_images(20)
    view = View(16, **COLORS)
    batch = next(data.Loader(images, [view], 20, seed=5).batches())
    params = augment.sample_params(view, batch.index, 5, 0, 0)
    boxes = augment.crop_boxes(rng.uniform(batch.index, 22, 5, 0, 0, "box"), 24, 24,
                               torch.tensor(view.scale), torch.tensor(view.ratio))
    functions = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for row, number in enumerate(batch.index.tolist()):
        x = TF.resized_crop(images.pixels[number].float() / 255, *boxes[row].tolist(), [16, 16],
                            T.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        x = TF.horizontal_flip(x) if params["flip"][row] else x
        for o, f in zip(params["op"][row].tolist(), params["factor"][row].tolist()):
            x = functions[o](x, f)
        x = TF.rgb_to_grayscale(x, 3) if params["gray"][row] else x
        if params["radius"][row] > 0:                         # ours: tested against Pillow above
            x = augment.blur(x[None], params["radius"][row:row + 1])[0]
        if params["threshold"][row] < 1:
            keep = (x - 128 / 255).abs() > 1e-4               # rounding decides near the threshold
            x = torch.where(keep, TF.solarize(x, 128 / 255), augment.denormalize(
                batch.views[0][row]).float() / 255)
        x = TF.normalize(x, augment.MEAN, augment.STD)
        torch.testing.assert_close(batch.views[0][row], x, atol=0.02, rtol=0)
        assert (batch.views[0][row] - x).abs().median() < 1e-4


def test_denormalize_undoes_normalize():
    x = smooth_pixels(3)
    assert torch.equal(augment.denormalize(augment.normalize(x.float() / 255)), x)
