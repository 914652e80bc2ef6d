"""Detection: pyramids and windows against plain functional code, inputs that move boxes and masks
together, the recipes' numbers, scores worked out by hand, and small runs from the command line."""
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import vit
from lib import augment, config, distributed, metrics
from probes import annotations, detection

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")    # of pycocotools
REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
ROOT = Path(__file__).parent.parent
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
TINY = dict(channels=8, hidden=16, proposals=20, samples=8, batch=2, iters=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def encoder(**config):
    torch.manual_seed(0)
    net = vit.ViT(**{**SMALL, **config}).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)             # as if trained: no zeros, no ones
    return net


def model(net=None):
    return SimpleNamespace(name="small", encoder=net or encoder(), size=32, mean=augment.MEAN,
                           std=augment.STD, interpolation="bicubic",
                           source=SimpleNamespace(path=None, branch=None))


def recipe(name, **changes):
    return detection.FULL | detection.RECIPES[name] | TINY | changes


def pyramid(name, net, **changes):
    settings = recipe(name, **changes)
    made = detection.Pyramid(detection.trainable(net, settings), settings, 64).eval()
    for p in made.parameters():
        p.data += 0.05 * torch.randn_like(p)
    for name, x in made.named_buffers():
        if "running" in name:                            # mean and variance
            x.copy_(torch.rand_like(x) + 0.5)
    return made


def settings(*flags):
    args = evaluate.parse(["--task", "detection", "--device", "cpu", "--precision", "fp32",
                           "--workers", "0", *flags])
    args.data = args.data or "toy-scenes"
    return args


def message(capsys, *flags):
    """The one line that a mistake earns on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(["--task", "detection", "--device", "cpu", *flags]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ---- pyramids ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["1x", "100ep"])
def test_four_blocks_make_four_levels_and_an_fpn(name):
    made, images = pyramid(name, encoder()), torch.randn(2, 3, 64, 32)
    w = made.state_dict()
    if name == "1x":                                     # blocks 1, 2, 3, 4: of 12, 4, 6, 8, 12
        tokens = [z[:, 1:] for z in made.encoder.layers(images, [0, 1, 2, 3], norm=False)[0]]
    else:
        tokens = made.in_windows(images)

    def norm(x, at):
        weight, bias = w[f"{at}.weight"], w[f"{at}.bias"]
        if name == "1x" or at.startswith("fpn"):
            return F.batch_norm(x, w[f"{at}.running_mean"], w[f"{at}.running_var"], weight, bias)
        return F.group_norm(x, 32, weight, bias)

    def conv(x, at, padding):
        x = F.conv2d(x, w[f"{at}.0.weight"], w.get(f"{at}.0.bias"), padding=padding)
        return norm(x, f"{at}.1") if name == "100ep" else x

    def up(x, at):
        return F.conv_transpose2d(x, w[f"{at}.weight"], w[f"{at}.bias"], stride=2)

    a, b, c, d = (z.transpose(1, 2).reshape(2, 32, 8, 4) for z in tokens)
    maps = [up(F.gelu(norm(up(a, "scales.0.0"), "scales.0.1")), "scales.0.3"), up(b, "scales.1"),
            c, F.max_pool2d(d, 2)]
    expected, above = [], 0
    for i in (3, 2, 1, 0):                               # from coarse to fine
        above = conv(maps[i], f"fpn.inner_blocks.{i}", 0) + above
        expected.insert(0, conv(above, f"fpn.layer_blocks.{i}", 1))
        above = above.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = made(images)
    assert list(found) == ["0", "1", "2", "3", "pool"]
    assert [64 // x.shape[2] for x in found.values()] == [2, 4, 8, 16, 32]   # p/4 ... 4p
    for x, y in zip(found.values(), [*expected, expected[3][:, :, ::2, ::2]]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_simple_pyramid_is_made_of_the_last_block():
    made, images = pyramid("vitdet", encoder()), torch.randn(2, 3, 64, 32)
    w, z = made.state_dict(), made.in_windows(images)[-1].transpose(1, 2).reshape(2, 32, 8, 4)

    def norm(x, at):                                     # over the channels of every place
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * w[f"{at}.weight"][:, None, None] + w[f"{at}.bias"][:, None, None]

    def up(x, at):
        return F.conv_transpose2d(x, w[f"{at}.weight"], w[f"{at}.bias"], stride=2)

    four = up(F.gelu(norm(up(z, "scales.0.0"), "scales.0.1")), "scales.0.3")
    maps = [four, up(z, "scales.1"), z, F.max_pool2d(z, 2)]
    assert [x.shape[1] for x in maps] == [8, 16, 32, 32]                     # D/4, D/2, D, D
    found = made(images)
    assert [64 // x.shape[2] for x in found.values()] == [2, 4, 8, 16, 32]
    for i, x in enumerate(maps):
        x = norm(F.conv2d(x, w[f"levels.{i}.0.0.weight"]), f"levels.{i}.0.1")
        x = norm(F.conv2d(x, w[f"levels.{i}.1.0.weight"], padding=1), f"levels.{i}.1.1")
        torch.testing.assert_close(found[str(i)], x, rtol=1e-4, atol=1e-5)
    assert found["pool"].equal(found["3"][:, :, ::2, ::2]) and not made.fpn


# ---- windows -------------------------------------------------------------------------------------


def test_windows_are_cut_and_put_together_again():
    x = torch.arange(1.0, 2 * 5 * 7 + 1).view(2, 35, 1)
    windows = detection.to_windows(x, (5, 7), (3, 4))
    assert windows.shape == (2 * 2 * 2, 12, 1)
    grid = F.pad(x.view(2, 5, 7), (0, 1, 0, 1))
    for b in range(2):
        for i in range(2):
            for j in range(2):
                part = grid[b, 3 * i:3 * i + 3, 4 * j:4 * j + 4]
                assert windows[4 * b + 2 * i + j].view(3, 4).equal(part)
    assert detection.from_windows(windows, (5, 7), (3, 4)).equal(x)


@torch.no_grad()
def test_blocks_in_windows_see_nothing_else():
    made = pyramid("vitdet", encoder(class_token=False, pos="none"))
    images = torch.randn(2, 3, 64, 64)
    quarters = [made.in_windows(images[:, :, y:y + 32, x:x + 32])[0].unflatten(1, (4, 4))
                for y in (0, 32) for x in (0, 32)]
    apart = torch.cat([torch.cat(quarters[:2], 2), torch.cat(quarters[2:], 2)], 1).flatten(1, 2)
    assert (made.in_windows(images)[0] - apart).abs().max() > 0.05           # two blocks see all
    made.everywhere = []
    torch.testing.assert_close(made.in_windows(images)[0], apart)


@torch.no_grad()
def test_one_window_is_the_encoder_itself_with_its_table():
    def made_of(net):
        return detection.Pyramid(detection.trainable(net, recipe("100ep")), recipe("100ep"),
                                 64).eval()

    net, images = encoder(class_token=False, rel_pos="block"), torch.randn(2, 3, 32, 32)
    made, expected = made_of(net), net.layers(images, norm=False)[0]
    for x, y in zip(made.in_windows(images), expected, strict=True):
        torch.testing.assert_close(x, y)
    plain = encoder(class_token=False)                   # without a table: one of zeros
    made = made_of(plain)
    tables = [block.attn.relative_position_bias_table for block in made.encoder.blocks]
    assert all(table.shape == (49, 2) and not table.any() for table in tables)
    torch.testing.assert_close(made.in_windows(images)[3], plain.layers(images, [3], False)[0][0])
    made.encoder.blocks[2].attn.relative_position_bias_table += torch.randn(49, 2)
    assert (made.in_windows(images)[3] - plain.layers(images, [3], False)[0][0]).abs().max() > 0.01


@torch.no_grad()
def test_a_branch_is_dropped_for_a_whole_picture(monkeypatch):
    made = pyramid("vitdet", encoder()).train()
    assert made.encoder.config["drop_path"] == 0.1
    assert pyramid("1x", encoder()).encoder.config["drop_path"] == 0.05
    images, factors = torch.randn(2, 3, 64, 64), torch.tensor([[0.0], [1.0]]).expand(2, 8)
    monkeypatch.setattr(made.encoder, "drop_factors", lambda batch: factors)
    first, second = made.in_windows(images)[0]
    start = made.encoder.embed(images)[0][:, 1:]
    assert first.equal(start[0]) and (second - start[1]).abs().mean() > 0.05


@pytest.mark.parametrize("depth, everywhere", [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]),
                                               (4, [1, 3]), (3, [1, 2])])
def test_blocks_that_see_all(depth, everywhere):
    net = encoder(depth=depth)
    made = pyramid("100ep", net)
    assert made.everywhere == everywhere and made.window == 4
    if depth == 12:
        assert made.blocks == [2, 5, 8, 11] and pyramid("vitdet", net).blocks == [11]
        assert pyramid("1x", net).blocks == [3, 5, 7, 11] and not pyramid("1x", net).window


def test_all_that_is_trained_gets_a_gradient():              # or DDP would wait for ever
    for name in detection.RECIPES:
        made = detection.mask_rcnn(model(), 3, recipe(name), 64).train()
        target = dict(boxes=torch.tensor([[4.0, 4, 40, 50]]), labels=torch.tensor([1]),
                      masks=torch.ones(1, 64, 64, dtype=torch.uint8))
        sum(made([torch.rand(3, 64, 64)] * 2, [target] * 2).values()).backward()
        without = {n for n, p in made.named_parameters() if p.grad is None}
        assert without == (set() if name == "1x" else {"backbone.encoder.cls_token"})


# ---- input ---------------------------------------------------------------------------------------


def item(height=48, width=64, number=0):
    """A picture with two plain boxes in it, one red, one green, a crowd and a line of no width."""
    boxes = torch.tensor([[4.0, 6, 30, 40], [34, 10, 60, 34], [0, 0, 64, 48], [9, 9, 9, 20]])
    masks, image = torch.zeros(4, height, width).bool(), torch.zeros(3, height, width).byte()
    for k, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()[:2]):
        masks[k, y0:y1, x0:x1] = True
        image[k, y0:y1, x0:x1] = 255
    masks[2], masks[3, 9:20, 9] = True, True
    return SimpleNamespace(id=number, image=image, boxes=boxes, masks=masks,
                           labels=torch.tensor([7, 0, 3, 5]),
                           areas=masks.sum((1, 2)).float(),
                           crowd=torch.tensor([False, False, True, False]))


def extent(mask):
    y, x = mask.nonzero().unbind(1)
    return torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


@pytest.mark.parametrize("name, most", [("100ep", 1), ("1x", 3)])      # 1x: some are resized twice
def test_picture_boxes_and_masks_move_together(name, most):
    flipped, both, coloured, whole, off = 0, 0, 0, 0, []
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = detection.training_view(item(), recipe(name), 80, augment.MEAN)
        assert image.dtype == torch.uint8 and target["masks"].shape[1:] == image.shape[1:]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) <= 2
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"]):
            assert int(label) in (8, 1)                  # 0 is the background
            assert (extent(mask) - box).abs().max() <= most
            off.append((extent(mask.flip(-1)) - box).abs().max())
            inner = F.avg_pool2d(mask[None].float(), 7, 1, 3)[0] == 1
            if inner.any():                              # its own colour, away from the border
                own, other = image[[0, 1] if label == 8 else [1, 0]].float()
                assert own[inner].mean() > 200 and other[inner].mean() < 50
                coloured += 1
        if len(target["boxes"]) == 2:
            red, green = target["boxes"][target["labels"].argsort(descending=True)]
            flipped, both = flipped + int(red[0] > green[0]), both + 1
            found, edge = torch.stack([red, green]), torch.tensor(image.shape[:0:-1]) - 1
            if found.min() > 1 and (found[:, 2:] < edge).all():              # none is cut off
                zoom = (red[3] - red[1]) / 34            # as the boxes of the picture, or mirrored
                size = torch.tensor([[26, 34], [26, 24]]) * zoom
                assert (found[:, 2:] - found[:, :2] - size).abs().max() <= 1 + most
                gap = found[0, :2] - found[1, :2]
                assert (gap[1] + 4 * zoom).abs() <= 1 + most
                assert (gap[0].abs() - 30 * zoom).abs() <= 1 + most
                whole += 1
    assert max(off) > 10                                 # control: other boxes are seen to be wrong
    assert 5 < flipped < both - 5 and coloured > 40 and whole > 5


def test_what_is_cut_off_goes():
    counts = []
    for seed in range(30):
        torch.manual_seed(seed)
        _, target = detection.training_view(item(), recipe("100ep", scales=(8.0, 8.0)), 80,
                                            augment.MEAN)
        assert target["masks"].flatten(1).any(1).all()
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= 80).all()
        counts.append(len(target["boxes"]))
    assert {0, 1} <= set(counts) <= {0, 1, 2}


def test_jitter_is_on_a_canvas_of_the_mean_colour_from_a_tenth_to_twice():
    one = item()
    one.boxes, one.crowd = torch.tensor([[0.0, 0, 64, 48]] * 4), torch.tensor([False] + [True] * 3)
    one.masks[:] = True
    one.image[:] = 255
    factors = []
    for seed in range(120):
        torch.manual_seed(seed)
        image, target = detection.training_view(one, recipe("vitdet"), 80, (0.1, 0.5, 0.9))
        assert image.shape == (3, 80, 80)
        [(x0, y0, x1, y1)] = target["boxes"].tolist()
        assert (x0, y0) == (0, 0)                        # what is missing is on the right and below
        if y1 < 79:
            assert image[:, -1, -1].tolist() == [26, 128, 230]
            assert image[:, :int(y1), :int(x1)].float().mean() > 254
            factors.append(y1 / 60)                      # 64 x 48 fits into 80 as 80 x 60
        else:
            factors.append(1.34)
    assert 0.09 < min(factors) < 0.15 and abs(sum(f > 1.33 for f in factors) / 120 - 0.35) < 0.1


def test_multi_scale_has_the_sizes_of_the_sheet():
    whole, shapes = item(240, 320), []
    for seed in range(60):
        torch.manual_seed(seed)
        image, _ = detection.training_view(whole, recipe("1x"), 160, augment.MEAN)   # a fifth
        shapes.append(sorted(image.shape[1:]))
    allowed = torch.tensor([s / 5 for s in range(480, 801, 32)])
    for short, long in shapes:                           # rounded down
        assert (allowed - short).abs().min() <= 1 or long in (266, 267)
    assert max(short for short, _ in shapes) == 160 and max(long for _, long in shapes) <= 267
    plain = sum(abs(long / short - 4 / 3) < 0.02 for short, long in shapes)
    assert 15 < plain < 45                               # the others were cropped
    tall = item(48, 480)                                 # 800 to the short side would be too long
    torch.manual_seed(0)
    assert max(detection.training_view(tall, recipe("1x"), 160, augment.MEAN)[0].shape) <= 267


def views(items, rank=0, world=1, name="100ep", **changes):
    def read(split, order=None):
        return items if order is None else [items[i] for i in order(len(items))]

    made = detection.Views(read, recipe(name, **changes), 64, augment.MEAN, 0, keep=False)
    made.rank, made.world = rank, world
    return made


@pytest.mark.parametrize("flags, side, batch, limit", [
    ("--data coco --recipe 1x", 800, 8, None), ("--data coco --recipe vitdet", 1024, 64, None),
    ("--data coco --recipe vitdet --size 515 --limit 9", 512, 64, 9),
    ("--data toy-scenes --recipe vitdet", 32, 8, 600),
    ("--data toy-scenes --recipe vitdet --limit 9", 32, 8, 9)])
def test_pictures_are_as_large_as_the_recipe_says_and_on_toy_as_the_encoders(
        monkeypatch, flags, side, batch, limit):
    class Begun(Exception):
        pass

    def mask_rcnn(model, classes, recipe, side, bf16):
        raise Begun(side, recipe["batch"])

    asked = []
    monkeypatch.setattr(detection, "mask_rcnn", mask_rcnn)
    monkeypatch.setattr(annotations, "masks", lambda name, root, split, limit, size, order: (
        asked.append((split, limit, size)), [item()] if order is None else map(
            [item()].__getitem__, order(1)))[1])
    with pytest.raises(Begun) as stop:
        detection.detection(model(), settings(*flags.split()))
    assert stop.value.args == (side, batch) and set(asked) == {("train", limit, side)}


def test_an_epoch_shows_every_picture_once_split_over_processes(monkeypatch):
    seen = []
    monkeypatch.setattr(detection, "training_view", lambda one, *_: (
        one.id, dict(boxes=torch.ones(0 if one.id == 4 else 1, 4))))         # 4 has no object left
    items = [item(number=i) for i in range(7)]
    for rank in (0, 1):
        made = views(items, rank, 2)
        stream = iter(made)
        seen.append([next(stream)[0] for _ in range(12)])
        assert made.images == 7
    first = [ids[:4] for ids in seen]
    assert len({*first[0], *first[1]} - {4}) == 6 and 4 not in sum(seen, [])
    whole = iter(views(items))
    one, two = ([next(whole)[0] for _ in range(6)] for _ in range(2))
    assert sorted(one) == sorted(two) == [0, 1, 2, 3, 5, 6] and one != two
    again = iter(views(items))
    assert one == [next(again)[0] for _ in range(6)]     # and the same in every run
    assert next(iter(views(items[:1], 3, 4)))[0] == 0    # fewer images than processes


def test_a_set_without_objects_is_refused():
    empty = item()
    empty.crowd[:] = True
    with pytest.raises(ValueError, match="no objects in the training images: raise --limit"):
        next(iter(views([empty] * 3)))


def test_the_error_of_a_worker_is_one_line():
    def loader():
        yield 1
        raise ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback "
                         "(most recent call last):\n  File ...\nValueError: Cannot read x.jpg\n")

    stream = detection.out_of_workers(loader())
    assert next(stream) == 1
    with pytest.raises(ValueError) as stop:
        next(stream)
    assert str(stop.value) == "Cannot read x.jpg"


# ---- recipes, optimiser --------------------------------------------------------------------------


def test_recipes_are_those_of_the_sheet():
    columns = ("blocks", "windows", "convs", "side", "batch", "epochs", "lr", "decay",
               "layer_decay", "drop_path", "norm")
    assert {name: tuple(r[c] for c in columns) for name, r in detection.RECIPES.items()} == {
        "1x": ((4, 6, 8, 12), False, (1, 0), 800, 8, 12, 5e-5, 0.05, 1, 0.05, "BN"),
        "100ep": ((3, 6, 9, 12), True, (2, 4), 1024, 64, 100, 8e-5, 0.1, 1, 0.1, "GN"),
        "vitdet": ((12,), True, (2, 4), 1024, 64, 100, 1e-4, 0.1, 0.7, 0.1, "LN")}
    none, wish = settings(), settings("--epochs", "3")
    for name, iters in (("1x", 177000), ("100ep", 184375), ("vitdet", 184375)):
        assert detection.length(detection.RECIPES[name], 118000, none) == iters
    assert detection.length(detection.RECIPES["1x"], 80, wish) == 30
    assert detection.length(detection.FULL | detection.RECIPES["1x"] | detection.TOY, 80,
                            none) == detection.TOY["iters"]
    assert detection.length(detection.RECIPES["1x"], 80, settings("--iters", "5")) == 5


def test_schedules_of_the_sheet():
    def factors(name, iters, *steps):
        return [detection.lr_factor(step, iters, detection.RECIPES[name]) for step in steps]

    epoch = 14750                                        # 118,000 images in batches of 8
    assert factors("1x", 177000, 0, 500, 1000, 8 * epoch - 1, 8 * epoch, 11 * epoch) == (
        pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01]))
    assert factors("vitdet", 184375, 0, 250, 163888, 163889, 177545, 177546) == pytest.approx(
        [0.001, 1, 1, 0.1, 0.1, 0.01])
    assert factors("100ep", 184375, 0, 184375 / 2, 184375) == pytest.approx([0.001, 0.5, 0])
    assert 461 == round(184375 / 100 / 4)                # a quarter of an epoch
    assert factors("100ep", 184375, 460, 461)[0] < 0.999 < factors("100ep", 184375, 460, 461)[1]
    assert factors("1x", 100, 0, 5, 10) == pytest.approx([0.001, 0.5005, 1])          # a short run


def test_torchvisions_detector_is_set_as_in_the_sheet():
    net = encoder(patch_size=16, img_size=64)
    full, m = detection.FULL | detection.RECIPES["vitdet"], model(net)
    m.mean, m.std = (0.5,) * 3, (0.25,) * 3              # of an official file, say
    made = detection.mask_rcnn(m, 80, full, 1024)
    assert (made.transform.image_mean, made.transform.image_std) == (m.mean, m.std)
    rpn, heads = made.rpn, made.roi_heads
    assert rpn.anchor_generator.sizes == [(32,), (64,), (128,), (256,), (512,)]
    assert set(rpn.anchor_generator.aspect_ratios) == {(0.5, 1.0, 2.0)}
    assert [m.high_threshold for m in (rpn.proposal_matcher, heads.proposal_matcher)] == [0.7, 0.5]
    assert [m.low_threshold for m in (rpn.proposal_matcher, heads.proposal_matcher)] == [0.3, 0.5]
    assert [(s.batch_size_per_image, s.positive_fraction) for s in (
        rpn.fg_bg_sampler, heads.fg_bg_sampler)] == [(256, 0.5), (512, 0.25)]
    assert rpn.nms_thresh == 0.7 and heads.nms_thresh == 0.5 and heads.score_thresh == 0.05
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert heads.box_coder.weights == (10, 10, 5, 5) and heads.detections_per_img == 100
    assert heads.box_roi_pool.output_size == (7, 7) and heads.mask_roi_pool.output_size == (14, 14)
    assert heads.box_roi_pool.sampling_ratio == heads.mask_roi_pool.sampling_ratio == 0
    assert len(rpn.head.conv) == 2 and heads.box_predictor.cls_score.weight.shape == (81, 1024)
    assert heads.mask_predictor.mask_fcn_logits.weight.shape == (81, 256, 1, 1)
    kinds = [type(layer).__name__ for layer in heads.box_head.modules()]
    assert kinds.count("Conv2d") == kinds.count("LayerNorm2d") == 4 and kinds.count("Linear") == 1
    assert made.transform.min_size == (1024,) and made.transform.max_size == 1024
    one = detection.mask_rcnn(model(net), 80, recipe("1x"), 800)
    assert one.transform.max_size == 1333 and len(one.rpn.head.conv) == 1
    assert [type(layer).__name__ for layer in one.roi_heads.box_head.children()] == ["Linear"] * 2


def test_objects_are_looked_up_on_the_level_of_their_size():
    pool = detection.pooling(7, 16)
    sides = torch.tensor([50.0, 111, 113, 223, 225, 447, 449, 2000])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    assert pool.map_levels([boxes]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert detection.pooling(7, 8).scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    maps = {str(i): torch.full((1, 1, 512 >> i, 512 >> i), float(i)) for i in range(4)}
    small = torch.tensor([[0.0, 0, 30, 30]])             # a small picture comes first: no matter
    for shape in ((33, 40), (1024, 1024)):
        assert (pool(maps, [small], [shape]) == 0).all()
        assert (pool(maps, [small * 10], [shape]) == 2).all()


def test_groups_of_the_optimiser():
    for name, decay, wd in (("vitdet", 0.7, 0.1), ("1x", 1, 0.05)):
        net = detection.mask_rcnn(model(), 3, recipe(name), 64)
        names = {id(p): n.removeprefix("backbone.") for n, p in net.named_parameters()}
        found = [(names[id(p)], group["factor"], group["weight_decay"])
                 for group in detection.groups(net, recipe(name)) for p in group["params"]]
        by_name = {n: (f, w) for n, f, w in found}
        assert len(found) == len(by_name)
        assert set(names.values()) - set(by_name) == ({"encoder.cls_token"} if name == "vitdet"
                                                      else set())
        assert by_name["encoder.pos_embed"] == (pytest.approx(decay**5), 0)
        assert by_name["encoder.patch_embed.proj.weight"] == (pytest.approx(decay**5), wd)
        assert by_name["encoder.blocks.0.mlp.fc1.weight"] == (pytest.approx(decay**4), wd)
        assert by_name["encoder.blocks.3.norm1.weight"] == (pytest.approx(decay), 0)
        for head in ("scales.1.weight", "rpn.head.cls_logits.weight",
                     "roi_heads.box_predictor.bbox_pred.weight"):
            assert by_name[head] == (1, wd)
        assert by_name["scales.0.1.weight"] == (1, 0)    # a norm of the pyramid


# ---- the loop ------------------------------------------------------------------------------------


class Stub(torch.nn.Module):
    """An encoder that rests, and a layer on the mean colour; its loss is a mean over pictures."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.seen = torch.nn.Module(), torch.nn.Linear(3, 1), []
        self.backbone.encoder = encoder()

    def forward(self, images, targets):
        self.seen.append(images)
        colours = torch.stack([image.mean((1, 2)) for image in images])
        return {name: self.head(colours).square().mean() for name in ("box", "mask")}


def trained(name, iters, *flags, **changes):
    """A Stub after so many batches of three pictures of 0 to 255."""
    torch.manual_seed(0)
    net, one = Stub(), dict(boxes=torch.ones(1, 4))
    batches = [[(torch.randint(256, (3, 8, 8)).byte(), one) for _ in range(3)]
               for _ in range(iters)]
    args, own = settings(*flags), recipe(name, **changes)
    opt = torch.optim.AdamW(detection.groups(net, own), betas=(0.9, 0.999))
    progress = detection.Progress(model(), args, net, opt)
    detection.train(net, opt, progress, batches, own, iters, model(), args)
    return net


@pytest.mark.parametrize("name, lr, decay, layers, shares", [
    ("1x", 5e-5, 0.05, 1, [0.001, 0.5005] + [1] * 11 + [0.1] * 5 + [0.01] * 2),
    ("100ep", 8e-5, 0.1, 1, [0.001, 0.5005 * (1 + math.cos(math.pi / 20)) / 2] + [
        (1 + math.cos(math.pi * step / 20)) / 2 for step in range(2, 20)]),
    ("vitdet", 1e-4, 0.1, 0.7, [0.001, 0.5005] + [1] * 16 + [0.1, 0.01])])
def test_every_step_has_the_lr_and_decay_of_the_sheet(monkeypatch, name, lr, decay, layers, shares):
    steps = []

    class AdamW(torch.optim.AdamW):
        def step(self):
            steps.append({id(p): (group["lr"], group["weight_decay"], group["betas"])
                          for group in self.param_groups for p in group["params"]})
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    net = trained(name, 20)
    block = net.backbone.encoder.blocks[2].mlp.fc1       # two layers below the heads, of four
    for step, share in zip(steps, shares, strict=True):
        for p, factor, wd in ((net.head.weight, 1, decay), (net.head.bias, 1, 0),
                              (block.weight, layers**2, decay), (block.bias, layers**2, 0),
                              (net.backbone.encoder.patch_embed.proj.weight, layers**5, decay)):
            assert step[id(p)] == (pytest.approx(lr * share * factor), wd, (0.9, 0.999))


def test_the_net_sees_pictures_from_0_to_1_and_parts_make_the_same_step(monkeypatch):
    """By SGD: to AdamW a loss that is three times as large looks the same."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, betas: torch.optim.SGD(groups, 1.0))
    whole, *others = (trained("1x", 2, "--batch-size", n, lr=0.1) for n in ("256", "1", "2"))
    pictures = torch.stack(sum(whole.seen, []))
    assert pictures.min() == 0 and pictures.max() == 1 and len(pictures) == 6
    torch.manual_seed(0)
    start = Stub().head.weight
    assert [[len(images) for images in net.seen] for net in others] == [[1] * 6, [2, 1] * 2]
    for net in others:
        torch.testing.assert_close(net.head.weight, whole.head.weight, rtol=0, atol=1e-6)
    assert (whole.head.weight - start).abs().max() > 1e-3


# ---- the test ------------------------------------------------------------------------------------


def test_a_mask_is_what_is_above_a_half():
    masks = torch.tensor([0.4, 0.6])[:, None, None, None].expand(2, 1, 8, 8)
    found = detection.predict(
        lambda images: [dict(labels=torch.ones(2), scores=torch.ones(2), boxes=torch.ones(2, 4),
                             masks=masks)], objects(8).image, torch.device("cpu"))
    assert not found.masks[0].any() and found.masks[1].all() and found.masks.shape == (2, 8, 8)


def test_numbers_with_gaps_come_back():
    numbers = torch.tensor([1, 11, 13, 44, 46, 90])      # 12, 45 and others are not there
    one = item()
    one.labels = torch.tensor([annotations.LABELS[n] for n in numbers.tolist()])
    one.boxes = torch.tensor([[4.0, 6, 30, 40]] * 6)
    one.masks, one.crowd = one.masks[:1].expand(6, -1, -1), torch.zeros(6).bool()
    _, target = detection.training_view(one, recipe("vitdet", scales=(1.0, 1.0)), 64, augment.MEAN)
    assert target["labels"].tolist() == [1, 11, 12, 40, 41, 80]              # 0: background

    def net(images):
        assert images[0].max() <= 1
        return [dict(labels=target["labels"], scores=torch.ones(6), boxes=target["boxes"],
                     masks=0.6 * target["masks"][:, None])]

    found = detection.predict(net, one.image, torch.device("cpu"))
    assert [annotations.COCO_IDS[label] for label in found.labels] == numbers.tolist()
    assert found.masks.equal(target["masks"].bool())


def found_by(shift, one):
    """The truth, moved by so many pixels to the right."""
    single = ~one.crowd
    return SimpleNamespace(
        boxes=one.boxes[single] + torch.tensor([shift, 0, shift, 0]), labels=one.labels[single],
        masks=one.masks[single].roll(shift, 2), scores=torch.full((int(single.sum()),), 0.9))


def objects(size=100):
    """A picture with one square of half its size, as readers have it."""
    mask = torch.zeros(1, size, size).bool()
    mask[0, 20:70, 20:70] = True
    return SimpleNamespace(id=0, image=mask.byte() * 255 * torch.ones(3, 1, 1, dtype=torch.uint8),
                           boxes=torch.tensor([[20.0, 20, 70, 70]]), labels=torch.tensor([2]),
                           masks=mask, areas=mask.sum((1, 2)).float(),
                           crowd=torch.zeros(1).bool())


@pytest.mark.parametrize("shift, expected", [(0, (100, 100, 100)), (10, (40, 100, 0)),
                                             (40, (0, 0, 0))])
def test_scores_by_hand(monkeypatch, shift, expected):
    """50 px wide, moved by 10: IoU 40/60, so right at 0.5, 0.55, 0.6 and 0.65 of ten thresholds."""
    pytest.importorskip("pycocotools")
    items = [objects() for _ in range(3)]
    before = {n: x.clone() for n, x in encoder().state_dict().items()}
    small = model()

    def read(name, root, split, limit, size, order):
        return items if order is None else (items[i] for i in order(len(items)))

    monkeypatch.setattr(annotations, "masks", read)
    monkeypatch.setattr(detection, "TOY", TINY)
    monkeypatch.setattr(detection, "predict", lambda net, image, device: found_by(
        40 if net.training else shift, items[0]))
    result = detection.detection(small, settings("--recipe", "vitdet", "--size", "64"))
    [row] = result.rows.values()
    assert [row[f"{kind} {name}"] for kind in ("box", "mask") for name in ("AP", "AP50", "AP75")
            ] == pytest.approx(2 * expected)
    assert result.images == {"train": 3, "test": 3}
    assert "recipe vitdet" in result.protocol and "windows of 4" in result.protocol
    assert not small.encoder.training                    # what was given is as it was
    assert all(x.equal(before[n]) for n, x in small.encoder.state_dict().items())


def test_run_lengths_score_as_masks_do():
    pytest.importorskip("pycocotools")
    one = item()
    pairs = [(one, found_by(5, one))]
    runs = [tuple(map(detection.packed, pair)) for pair in pairs]
    assert isinstance(runs[0][0].masks, list) and not hasattr(runs[0][0], "image")
    for kind in ("bbox", "segm"):
        scores = metrics.coco_ap(pairs, kind)
        assert metrics.coco_ap(runs, kind) == scores and 0 < scores["AP"] < 1


def test_the_processes_share_the_test_images(monkeypatch):
    pytest.importorskip("pycocotools")
    items, looked_at, gathered = [objects() for _ in range(5)], [], []
    monkeypatch.setattr(annotations, "masks", lambda *a: items if a[5] is None else (
        items[i] for i in a[5](5)))
    monkeypatch.setattr(detection, "TOY", TINY)
    monkeypatch.setattr(detection, "train", lambda *_: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(detection, "predict", lambda *_: looked_at.append(1) or found_by(
        0, items[0]))

    def gather(parts, mine):
        gathered.append(mine)
        parts[:] = [mine, [(truth, found_by_nobody(truth)) for truth, _ in mine]]

    def found_by_nobody(truth):
        return SimpleNamespace(boxes=truth.boxes[:0], labels=truth.labels[:0], masks=[],
                               scores=torch.zeros(0))

    monkeypatch.setattr(detection.dist, "all_gather_object", gather)
    for rank, images in ((0, 3), (1, 2)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        looked_at.clear()
        result = detection.detection(model(), settings())
        assert len(looked_at) == images == len(gathered[-1])
        assert result.images["test"] == 2 * images       # and the others' count: half is found
        assert result.rows["pyramid"]["box AP"] == pytest.approx(100 * 51 / 101)


def test_mistakes_get_one_sentence(capsys, tmp_path, monkeypatch):
    flags = "--data", "toy-scenes", "--baseline", "untrained", "--limit", "2", "--out", str(
        tmp_path)
    assert "pixels have none" in message(capsys, *flags, "--baseline", "pixels")
    assert "choose --recipe 1x, 100ep, vitdet" in message(capsys, *flags, "--recipe", "mae")
    assert "No masks of 'cub' here" in message(capsys, *flags, "--data", "cub")
    with pytest.raises(ValueError, match="patches of 4, 8, 16 or 32 px, small has 2"):
        detection.detection(model(encoder(patch_size=2)), settings())
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 3)
        with pytest.raises(ValueError, match="3 processes cannot share 8 images: take a number"):
            detection.detection(model(), settings())
    monkeypatch.setattr(detection, "TOY", TINY | dict(lr=math.nan))
    error = message(capsys, *flags)
    assert "not finite by iteration" in error and "--precision fp32" in error
    monkeypatch.setattr(detection, "TOY", TINY)
    with monkeypatch.context() as patch:
        nobody = objects()
        nobody.boxes, nobody.labels, nobody.masks, nobody.areas, nobody.crowd = (
            x[:0] for x in (nobody.boxes, nobody.labels, nobody.masks, nobody.areas, nobody.crowd))
        patch.setattr(detection, "train", lambda *_: None)
        patch.setattr(annotations, "masks", lambda *a: [objects() if a[2] == "train" else nobody])
        assert "no objects in the test images of toy-scenes" in message(capsys, *flags)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "pip install pycocotools" in message(capsys, *flags)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_one_line_and_one_picture(tmp_path, torchrun):
    pytest.importorskip("pycocotools")
    command = [*torchrun, "evaluate.py", "--task", "detection", "--baseline", "untrained",
               "--data", "toy-scenes", "--limit", "5", "--iters", "2", "--device", "cpu", "--show",
               "--out", str(tmp_path), "--recipe", "vitdet", "--reference"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [line] = (tmp_path / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["images"] == {"train": 5, "test": 5}
    assert set(result["metrics"]["pyramid"]) == {
        f"{kind} {name}" for kind in ("box", "mask") for name in ("AP", "AP50", "AP75")}
    assert (tmp_path / "detection-toy-scenes-untrained.png").stat().st_size > 10000
    assert done.stdout.count("untrained: detection") == 1
    assert "MAE (ViTDet's paper, ViT-B; coco)" in done.stdout


@pytest.mark.slow
def test_the_real_coco(tmp_path):
    path = os.path.join(REAL, "coco_subset.tar")
    if not os.path.exists(path):
        pytest.skip("no piece of coco here")
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    annotations.coco_json.cache_clear()
    for one in annotations.masks("coco", tmp_path, "train"):
        for name, side in (("1x", 800), ("vitdet", 1024)):
            torch.manual_seed(one.id)
            _, target = detection.training_view(one, detection.FULL | detection.RECIPES[name],
                                                side, augment.MEAN)
            for box, mask in zip(target["boxes"], target["masks"]):
                out = extent(mask) - box                 # outlines and boxes are annotated apart
                assert max(-out[0], -out[1], out[2], out[3]) <= 5
                assert name == "1x" or not out.any()     # a crop may leave less than a box holds
    order = [one.id for one in annotations.masks("coco", tmp_path, "train", None, 0,
                                               lambda n: [n - 1, 0])]
    ids = [one.id for one in annotations.boxes("coco", tmp_path, "train")]
    assert order == [ids[-1], ids[0]]
