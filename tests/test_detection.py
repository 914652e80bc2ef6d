"""Detection: pyramids and windows against plain functional code, inputs that move boxes and masks
together, the published settings, scores worked out by hand, and small runs of the command."""
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_models import make_encoder, make_model, make_options, unpack_real
from torchvision import tv_tensors

import evaluate
from lib import augment, config, distributed, metrics
from probes import annotations, detection, training

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")    # of pycocotools
ROOT = Path(__file__).parent.parent
TINY = dict(channels=8, fc_dim=16, proposals=20, samples=8, batch=2, iters=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_encoder(**config):
    return make_encoder(0.05, **{"depth": 4, **config})


def small_model(encoder=None, **changes):
    return make_model(encoder or small_encoder(), **changes)


def tiny_recipe(name, **changes):
    return detection.DETECTOR | detection.DETECTION_RECIPES[name] | TINY | changes


def make_pyramid(name, encoder, **changes):
    recipe = tiny_recipe(name, **changes)
    pyramid = detection.Pyramid(detection.make_backbone(encoder, recipe), recipe, 64).eval()
    for p in pyramid.parameters():
        p.data += 0.05 * torch.randn_like(p)
    for name, x in pyramid.named_buffers():
        if "running" in name:                            # mean and variance
            x.copy_(torch.rand_like(x) + 0.5)
    return pyramid


def detection_options(*argv):
    return make_options("detection", *argv, data="toy-scenes")


def error_line(capsys, *flags):
    """The line that a user error prints on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(["--task", "detection", "--device", "cpu", *flags]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ---- pyramids ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["1x", "100ep"])
def test_four_blocks_and_an_fpn_make_the_levels(name):
    pyramid, images = make_pyramid(name, small_encoder()), torch.randn(2, 3, 64, 32)
    w = pyramid.state_dict()
    if name == "1x":                                     # blocks 1, 2, 3, 4: of 12, 4, 6, 8, 12
        tokens = [z[:, 1:] for z in pyramid.encoder.layers(images, [0, 1, 2, 3], norm=False)[0]]
    else:
        tokens = pyramid.windowed_blocks(images)

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
    found = pyramid(images)
    assert list(found) == ["0", "1", "2", "3", "pool"]
    assert [64 // x.shape[2] for x in found.values()] == [2, 4, 8, 16, 32]   # p/4 ... 4p
    for x, y in zip(found.values(), [*expected, expected[3][:, :, ::2, ::2]]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_simple_pyramid_is_made_from_the_last_block():
    pyramid, images = make_pyramid("vitdet", small_encoder()), torch.randn(2, 3, 64, 32)
    w = pyramid.state_dict()
    z = pyramid.windowed_blocks(images)[-1].transpose(1, 2).reshape(2, 32, 8, 4)

    def norm(x, at):                                     # over the channels of every place
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * w[f"{at}.weight"][:, None, None] + w[f"{at}.bias"][:, None, None]

    def up(x, at):
        return F.conv_transpose2d(x, w[f"{at}.weight"], w[f"{at}.bias"], stride=2)

    finest = up(F.gelu(norm(up(z, "scales.0.0"), "scales.0.1")), "scales.0.3")
    maps = [finest, up(z, "scales.1"), z, F.max_pool2d(z, 2)]
    assert [x.shape[1] for x in maps] == [8, 16, 32, 32]                     # D/4, D/2, D, D
    found = pyramid(images)
    assert [64 // x.shape[2] for x in found.values()] == [2, 4, 8, 16, 32]
    for i, x in enumerate(maps):
        x = norm(F.conv2d(x, w[f"levels.{i}.0.0.weight"]), f"levels.{i}.0.1")
        x = norm(F.conv2d(x, w[f"levels.{i}.1.0.weight"], padding=1), f"levels.{i}.1.1")
        torch.testing.assert_close(found[str(i)], x, rtol=1e-4, atol=1e-5)
    assert found["pool"].equal(found["3"][:, :, ::2, ::2]) and not pyramid.fpn


# ---- windows -------------------------------------------------------------------------------------


def test_windows_are_split_and_joined():
    x = torch.arange(1.0, 2 * 5 * 7 + 1).view(2, 35, 1)
    windows = detection.split_windows(x, (5, 7), (3, 4))
    assert windows.shape == (2 * 2 * 2, 12, 1)
    grid = F.pad(x.view(2, 5, 7), (0, 1, 0, 1))
    for b in range(2):
        for i in range(2):
            for j in range(2):
                part = grid[b, 3 * i:3 * i + 3, 4 * j:4 * j + 4]
                assert windows[4 * b + 2 * i + j].view(3, 4).equal(part)
    assert detection.join_windows(windows, (5, 7), (3, 4)).equal(x)


@torch.no_grad()
def test_windowed_blocks_do_not_attend_beyond_their_window():
    pyramid = make_pyramid("vitdet", small_encoder(class_token=False, pos="none"))
    images = torch.randn(2, 3, 64, 64)
    quarters = [pyramid.windowed_blocks(images[:, :, y:y + 32, x:x + 32])[0].unflatten(1, (4, 4))
                for y in (0, 32) for x in (0, 32)]
    separate = torch.cat([torch.cat(quarters[:2], 2), torch.cat(quarters[2:], 2)], 1).flatten(1, 2)
    # Two blocks are global.
    assert (pyramid.windowed_blocks(images)[0] - separate).abs().max() > 0.05
    pyramid.global_blocks = []
    torch.testing.assert_close(pyramid.windowed_blocks(images)[0], separate)


@torch.no_grad()
def test_with_one_window_the_backbone_is_the_encoder_with_its_bias_table():
    def pyramid_of(encoder):
        recipe = tiny_recipe("100ep")
        return detection.Pyramid(detection.make_backbone(encoder, recipe), recipe, 64).eval()

    encoder, images = small_encoder(class_token=False, rel_pos="block"), torch.randn(2, 3, 32, 32)
    pyramid, expected = pyramid_of(encoder), encoder.layers(images, norm=False)[0]
    for x, y in zip(pyramid.windowed_blocks(images), expected, strict=True):
        torch.testing.assert_close(x, y)
    registers = pyramid_of(small_encoder(registers=2))             # not used, and not trained
    assert not registers.encoder.register_tokens.requires_grad
    assert registers.windowed_blocks(images)[0].shape == (2, 16, encoder.embed_dim)
    plain = small_encoder(class_token=False)             # without a table: one of zeros
    pyramid, [expected] = pyramid_of(plain), plain.layers(images, [3], False)[0]
    tables = [block.attn.relative_position_bias_table for block in pyramid.encoder.blocks]
    assert all(table.shape == (49, 2) and not table.any() for table in tables)
    torch.testing.assert_close(pyramid.windowed_blocks(images)[3], expected)
    pyramid.encoder.blocks[2].attn.relative_position_bias_table += torch.randn(49, 2)
    assert (pyramid.windowed_blocks(images)[3] - expected).abs().max() > 0.01


@torch.no_grad()
def test_a_branch_is_dropped_for_a_whole_image(monkeypatch):
    pyramid = make_pyramid("vitdet", small_encoder()).train()
    assert pyramid.encoder.config["drop_path"] == 0.1
    assert make_pyramid("1x", small_encoder()).encoder.config["drop_path"] == 0.05
    images, factors = torch.randn(2, 3, 64, 64), torch.tensor([[0.0], [1.0]]).expand(2, 8)
    monkeypatch.setattr(pyramid.encoder, "drop_factors", lambda batch: factors)
    first, second = pyramid.windowed_blocks(images)[0]
    start = pyramid.encoder.embed(images)[0][:, 1:]
    assert first.equal(start[0]) and (second - start[1]).abs().mean() > 0.05


@pytest.mark.parametrize("depth, global_blocks", [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]),
                                                  (4, [1, 3]), (3, [1, 2])])
def test_global_blocks_are_evenly_spaced(depth, global_blocks):
    encoder = small_encoder(depth=depth)
    pyramid = make_pyramid("100ep", encoder)
    assert pyramid.global_blocks == global_blocks and pyramid.window == 4
    if depth == 12:
        assert pyramid.blocks == [2, 5, 8, 11] and make_pyramid("vitdet", encoder).blocks == [11]
        pyramid = make_pyramid("1x", encoder)
        assert pyramid.blocks == [3, 5, 7, 11] and not pyramid.window


def test_all_trained_parameters_get_a_gradient():            # else DDP would wait forever
    for name in detection.DETECTION_RECIPES:
        net = detection.make_mask_rcnn(small_model(), 3, tiny_recipe(name), 64).train()
        target = dict(boxes=torch.tensor([[4.0, 4, 40, 50]]), labels=torch.tensor([1]),
                      masks=torch.ones(1, 64, 64, dtype=torch.uint8))
        sum(net([torch.rand(3, 64, 64)] * 2, [target] * 2).values()).backward()
        without = {n for n, p in net.named_parameters() if p.grad is None}
        assert without == (set() if name == "1x" else {"backbone.encoder.cls_token"})


# ---- input ---------------------------------------------------------------------------------------


def make_item(height=48, width=64, number=0):
    """An image with two solid boxes, one red, one green, a crowd and a box of no width."""
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


def mask_box(mask):
    y, x = mask.nonzero().unbind(1)
    return torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


@pytest.mark.parametrize("name, tolerance", [("100ep", 1), ("1x", 3)])   # 1x resizes some twice
def test_image_boxes_and_masks_move_together(name, tolerance):
    flipped, both, colored, uncut, mirrored_errors = 0, 0, 0, 0, []
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = detection.training_view(make_item(), tiny_recipe(name), 80, augment.MEAN)
        assert image.dtype == torch.uint8 and target["masks"].shape[1:] == image.shape[1:]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) <= 2
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"]):
            assert int(label) in (8, 1)                  # 0 is the background
            assert (mask_box(mask) - box).abs().max() <= tolerance
            mirrored_errors.append((mask_box(mask.flip(-1)) - box).abs().max())
            inner = F.avg_pool2d(mask[None].float(), 7, 1, 3)[0] == 1
            if inner.any():                              # its own color, away from the border
                own, other = image[[0, 1] if label == 8 else [1, 0]].float()
                assert own[inner].mean() > 200 and other[inner].mean() < 50
                colored += 1
        if len(target["boxes"]) == 2:
            red, green = target["boxes"][target["labels"].argsort(descending=True)]
            flipped, both = flipped + int(red[0] > green[0]), both + 1
            found, edge = torch.stack([red, green]), torch.tensor(image.shape[:0:-1]) - 1
            if found.min() > 1 and (found[:, 2:] < edge).all():              # none is cut off
                zoom = (red[3] - red[1]) / 34            # as the boxes of the image, or mirrored
                size = torch.tensor([[26, 34], [26, 24]]) * zoom
                assert (found[:, 2:] - found[:, :2] - size).abs().max() <= 1 + tolerance
                gap = found[0, :2] - found[1, :2]
                assert (gap[1] + 4 * zoom).abs() <= 1 + tolerance
                assert (gap[0].abs() - 30 * zoom).abs() <= 1 + tolerance
                uncut += 1
    assert max(mirrored_errors) > 10                     # control: other boxes have large errors
    assert 5 < flipped < both - 5 and colored > 40 and uncut > 5


def test_objects_outside_of_the_crop_are_removed():
    counts = []
    for seed in range(30):
        torch.manual_seed(seed)
        recipe = tiny_recipe("100ep", scales=(8.0, 8.0))
        _, target = detection.training_view(make_item(), recipe, 80, augment.MEAN)
        assert target["masks"].flatten(1).any(1).all()
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= 80).all()
        counts.append(len(target["boxes"]))
    assert {0, 1} <= set(counts) <= {0, 1, 2}


def test_jitter_scales_by_a_tenth_to_two_on_a_canvas_of_the_mean_color():
    item = make_item()
    item.boxes = torch.tensor([[0.0, 0, 64, 48]] * 4)
    item.crowd = torch.tensor([False] + [True] * 3)
    item.masks[:] = True
    item.image[:] = 255
    factors = []
    for seed in range(120):
        torch.manual_seed(seed)
        image, target = detection.training_view(item, tiny_recipe("vitdet"), 80, (0.1, 0.5, 0.9))
        assert image.shape == (3, 80, 80)
        [(x0, y0, x1, y1)] = target["boxes"].tolist()
        assert (x0, y0) == (0, 0)                        # padded on the right and at the bottom
        if y1 < 79:
            assert image[:, -1, -1].tolist() == [26, 128, 230]
            assert image[:, :int(y1), :int(x1)].float().mean() > 254
            factors.append(y1 / 60)                      # 64 x 48 fits into 80 as 80 x 60
        else:
            factors.append(1.34)
    assert 0.09 < min(factors) < 0.15 and abs(sum(f > 1.33 for f in factors) / 120 - 0.35) < 0.1


def test_training_images_are_resized_like_test_images(monkeypatch):
    image = torch.randint(256, (3, 400, 400), dtype=torch.uint8)
    monkeypatch.setattr(torch, "rand", lambda shape: 0.9 + torch.zeros(shape))     # no crop
    for resized in (detection.multi_scale(dict(image=tv_tensors.Image(image)), 1 / 5),
                    detection.large_scale_jitter(dict(image=tv_tensors.Image(image)), 99,
                                                 (0.5, 0.5001), augment.MEAN)):
        found = resized["image"].float()[:, :49, :49]
        side = 49 if resized["image"].shape[1] == 99 else resized["image"].shape[1]
        plain, smooth = (F.interpolate(image[None].float(), (side, side), mode="bilinear",
                                       antialias=antialias)[0, :, :49, :49]
                         for antialias in (False, True))
        assert (found - plain).abs().max() <= 1 and (found - smooth).abs().max() > 20


def test_multi_scale_has_the_published_sizes():
    item, shapes = make_item(240, 320), []
    for seed in range(60):
        torch.manual_seed(seed)
        image, _ = detection.training_view(item, tiny_recipe("1x"), 160, augment.MEAN)   # a fifth
        shapes.append(sorted(image.shape[1:]))
    allowed = torch.tensor([s / 5 for s in range(480, 801, 32)])
    for short, long in shapes:                           # rounded down
        assert (allowed - short).abs().min() <= 1 or long in (266, 267)
    assert max(short for short, _ in shapes) == 160 and max(long for _, long in shapes) <= 267
    uncropped = sum(abs(long / short - 4 / 3) < 0.02 for short, long in shapes)
    assert 15 < uncropped < 45
    tall = make_item(48, 480)                            # with 800 the long side would be too long
    torch.manual_seed(0)
    image, _ = detection.training_view(tall, tiny_recipe("1x"), 160, augment.MEAN)
    assert max(image.shape) <= 267


def make_views(items, rank=0, world=1):
    def read(split, order=None):
        return items if order is None else [items[i] for i in order(len(items))]

    views = detection.TrainingViews(read, tiny_recipe("100ep"), 64, augment.MEAN, 0, keep=False)
    views.rank, views.world = rank, world
    return views


@pytest.mark.parametrize("flags, side, batch, limit", [
    ("--data coco --recipe 1x", 800, 8, None), ("--data coco --recipe vitdet", 1024, 64, None),
    ("--data coco --recipe vitdet --img-size 515 --limit 9", 512, 64, 9),
    ("--data coco --recipe vitdet --img-size 256 --train-batch-size 3", 256, 3, None),
    ("--data toy-scenes --recipe vitdet", 32, 8, 600),
    ("--data toy-scenes --recipe vitdet --limit 9", 32, 8, 9)])
def test_images_have_the_size_of_the_recipe_and_on_toy_that_of_the_encoder(
        monkeypatch, flags, side, batch, limit):
    class Begun(Exception):
        pass

    def make_mask_rcnn(model, classes, recipe, side, masks):
        raise Begun(side, recipe["batch"])

    requests = []
    monkeypatch.setattr(detection, "make_mask_rcnn", make_mask_rcnn)
    monkeypatch.setattr(annotations, "masks", lambda name, root, split, limit, size, order: (
        requests.append((split, limit, size)), [make_item()] if order is None else map(
            [make_item()].__getitem__, order(1)))[1])
    with pytest.raises(Begun) as stop:
        detection.detection(small_model(), detection_options(*flags.split()))
    assert stop.value.args == (side, batch) and set(requests) == {("train", limit, side)}


def test_an_epoch_has_every_image_once_split_over_processes(monkeypatch):
    ids_of_rank = []
    monkeypatch.setattr(detection, "training_view", lambda item, *_: (
        item.id, dict(boxes=torch.ones(0 if item.id == 4 else 1, 4))))       # 4: no object is left
    items = [make_item(number=i) for i in range(7)]
    for rank in (0, 1):
        views = make_views(items, rank, 2)
        stream = iter(views)
        ids_of_rank.append([next(stream)[0] for _ in range(12)])
        assert views.n_images == 7
    first = [ids[:4] for ids in ids_of_rank]
    assert len({*first[0], *first[1]} - {4}) == 6 and 4 not in sum(ids_of_rank, [])
    stream = iter(make_views(items))
    one, two = ([next(stream)[0] for _ in range(6)] for _ in range(2))
    assert sorted(one) == sorted(two) == [0, 1, 2, 3, 5, 6] and one != two
    again = iter(make_views(items))
    assert one == [next(again)[0] for _ in range(6)]     # and the same in every run
    assert next(iter(make_views(items[:1], 3, 4)))[0] == 0    # fewer images than processes


def test_a_data_set_without_objects_is_refused():
    item = make_item()
    item.crowd[:] = True
    with pytest.raises(ValueError, match="no objects in the training images: raise --limit"):
        next(iter(make_views([item] * 3)))


def test_the_part_of_a_process_may_have_no_objects_in_an_epoch():
    """One of eight images has objects, and each of four processes gets two of them in an epoch."""
    crowds, item = [make_item() for _ in range(7)], make_item()
    for crowd in crowds:
        crowd.crowd[:] = True
    views = iter(make_views([*crowds, item], 3, 4))
    assert len([next(views) for _ in range(4)]) == 4


def test_the_error_of_a_worker_is_one_line():
    def loader():
        yield 1
        raise ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback "
                         "(most recent call last):\n  File ...\nValueError: cannot read x.jpg\n")

    stream = detection.shorten_worker_errors(loader())
    assert next(stream) == 1
    with pytest.raises(ValueError) as stop:
        next(stream)
    assert str(stop.value) == "cannot read x.jpg"


# ---- recipes, optimizer --------------------------------------------------------------------------


def test_recipes_are_the_published_ones():
    recipes = detection.DETECTION_RECIPES
    columns = ("blocks", "windows", "convs", "side", "batch", "epochs", "lr", "decay",
               "layer_decay", "drop_path", "norm")
    assert {name: tuple(r[column] for column in columns) for name, r in recipes.items()} == {
        "1x": ((4, 6, 8, 12), False, (1, 0), 800, 8, 12, 5e-5, 0.05, 1, 0.05, "BN"),
        "100ep": ((3, 6, 9, 12), True, (2, 4), 1024, 64, 100, 8e-5, 0.1, 1, 0.1, "GN"),
        "vitdet": ((12,), True, (2, 4), 1024, 64, 100, 1e-4, 0.1, 0.7, 0.1, "LN")}
    default = detection_options()
    for name, iters in (("1x", 177000), ("100ep", 184375), ("vitdet", 184375)):
        assert detection.count_iters(recipes[name], 118000, default) == iters
    assert detection.count_iters(recipes["1x"], 80, detection_options("--epochs", "3")) == 30
    assert detection.count_iters(recipes["1x"], 80, detection_options("--iters", "5")) == 5
    toy = detection.TOY_DETECTION
    assert detection.count_iters(recipes["1x"] | toy, 80, default) == toy["iters"]


def test_schedules_are_the_published_ones():
    def factors(name, iters, *steps):
        return [detection.lr_factor(step, iters, detection.DETECTION_RECIPES[name])
                for step in steps]

    epoch = 14750                                        # 118,000 images in batches of 8
    assert factors("1x", 177000, 0, 500, 1000, 8 * epoch - 1, 8 * epoch, 11 * epoch) == (
        pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01]))
    assert factors("vitdet", 184375, 0, 250, 163888, 163889, 177545, 177546) == pytest.approx(
        [0.001, 1, 1, 0.1, 0.1, 0.01])
    assert factors("100ep", 184375, 0, 184375 / 2, 184375) == pytest.approx([0.001, 0.5, 0])
    assert 461 == round(184375 / 100 / 4)                # a quarter of an epoch
    assert factors("100ep", 184375, 460, 461)[0] < 0.999 < factors("100ep", 184375, 460, 461)[1]
    assert factors("1x", 100, 0, 5, 10) == pytest.approx([0.001, 0.5005, 1])          # a short run


def test_torchvisions_detector_has_the_published_settings():
    encoder = small_encoder(patch_size=16, img_size=64)
    recipe = detection.DETECTOR | detection.DETECTION_RECIPES["vitdet"]
    model = small_model(encoder, mean=(0.5,) * 3, std=(0.25,) * 3)       # as of an official file
    net = detection.make_mask_rcnn(model, 80, recipe, 1024)
    assert (net.transform.image_mean, net.transform.image_std) == (model.mean, model.std)
    rpn, heads = net.rpn, net.roi_heads
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
    assert net.transform.min_size == (1024,) and net.transform.max_size == 1024
    net = detection.make_mask_rcnn(small_model(encoder), 80, tiny_recipe("1x"), 800)
    assert net.transform.max_size == 1333 and len(net.rpn.head.conv) == 1
    assert [type(layer).__name__ for layer in net.roi_heads.box_head.children()] == ["Linear"] * 2


def test_objects_are_pooled_from_the_level_of_their_size():
    pool = detection.make_roi_align(7, 16)
    sides = torch.tensor([50.0, 111, 113, 223, 225, 447, 449, 2000])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    assert pool.map_levels([boxes]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert detection.make_roi_align(7, 8).scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    maps = {str(i): torch.full((1, 1, 512 >> i, 512 >> i), float(i)) for i in range(4)}
    small = torch.tensor([[0.0, 0, 30, 30]])             # a small image comes first: no effect
    for shape in ((33, 40), (1024, 1024)):
        assert (pool(maps, [small], [shape]) == 0).all()
        assert (pool(maps, [small * 10], [shape]) == 2).all()


def test_parameter_groups_follow_the_recipe():
    for name, decay, wd in (("vitdet", 0.7, 0.1), ("1x", 1, 0.05)):
        net = detection.make_mask_rcnn(small_model(), 3, tiny_recipe(name), 64)
        names = {id(p): n.removeprefix("backbone.") for n, p in net.named_parameters()}
        groups = detection.parameter_groups(net, tiny_recipe(name))
        found = [(names[id(p)], group["factor"], group["weight_decay"])
                 for group in groups for p in group["params"]]
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
    """An unused encoder, and a layer on the mean color; its loss is a mean over images."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.inputs = torch.nn.Module(), torch.nn.Linear(3, 1), []
        self.backbone.encoder = small_encoder()

    def forward(self, images, targets):
        self.inputs.append(images)
        colors = torch.stack([image.mean((1, 2)) for image in images])
        return {name: self.head(colors).square().mean() for name in ("box", "mask")}


def train_stub(name, iters, *argv, **changes):
    """A Stub after `iters` batches of three images of 0 to 255."""
    torch.manual_seed(0)
    net, target = Stub(), dict(boxes=torch.ones(1, 4))
    batches = [[(torch.randint(256, (3, 8, 8)).byte(), target) for _ in range(3)]
               for _ in range(iters)]
    opt, recipe = detection_options(*argv), tiny_recipe(name, **changes)
    optimizer = torch.optim.AdamW(detection.parameter_groups(net, recipe), betas=(0.9, 0.999))
    progress = training.Progress(small_model(), opt, net, optimizer)
    detection.train_detector(net, optimizer, progress, batches, recipe, iters,
                             torch.device("cpu"), opt)
    return net


@pytest.mark.parametrize("name, lr, decay, layer_decay, factors", [
    ("1x", 5e-5, 0.05, 1, [0.001, 0.5005] + [1] * 11 + [0.1] * 5 + [0.01] * 2),
    ("100ep", 8e-5, 0.1, 1, [0.001, 0.5005 * (1 + math.cos(math.pi / 20)) / 2] + [
        (1 + math.cos(math.pi * step / 20)) / 2 for step in range(2, 20)]),
    ("vitdet", 1e-4, 0.1, 0.7, [0.001, 0.5005] + [1] * 16 + [0.1, 0.01])])
def test_every_step_has_the_published_lr_and_decay(monkeypatch, name, lr, decay, layer_decay,
                                                   factors):
    steps = []

    class AdamW(torch.optim.AdamW):
        def step(self):
            steps.append({id(p): (group["lr"], group["weight_decay"], group["betas"])
                          for group in self.param_groups for p in group["params"]})
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    net = train_stub(name, 20)
    block = net.backbone.encoder.blocks[2].mlp.fc1       # two layers below the heads, of four
    embedding = net.backbone.encoder.patch_embed.proj
    for step, factor in zip(steps, factors, strict=True):
        for p, of_layer, wd in ((net.head.weight, 1, decay), (net.head.bias, 1, 0),
                                (block.weight, layer_decay**2, decay),
                                (block.bias, layer_decay**2, 0),
                                (embedding.weight, layer_decay**5, decay)):
            assert step[id(p)] == (pytest.approx(lr * factor * of_layer), wd, (0.9, 0.999))


def test_images_are_from_0_to_1_and_gradient_accumulation_makes_the_same_step(monkeypatch):
    """With SGD: to AdamW a loss that is three times as large looks the same."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, betas: torch.optim.SGD(groups, 1.0))
    whole, *others = (train_stub("1x", 2, "--batch-size", n, lr=0.1) for n in ("256", "1", "2"))
    images = torch.stack(sum(whole.inputs, []))
    assert images.min() == 0 and images.max() == 1 and len(images) == 6
    torch.manual_seed(0)
    start = Stub().head.weight
    assert [[len(images) for images in net.inputs] for net in others] == [[1] * 6, [2, 1] * 2]
    for net in others:
        torch.testing.assert_close(net.head.weight, whole.head.weight, rtol=0, atol=1e-6)
    assert (whole.head.weight - start).abs().max() > 1e-3


# ---- the test ------------------------------------------------------------------------------------


def test_a_mask_is_where_the_probability_exceeds_a_half():
    masks = torch.tensor([0.4, 0.6])[:, None, None, None].expand(2, 1, 8, 8)
    found = detection.predict_objects(
        lambda images: [dict(labels=torch.ones(2), scores=torch.ones(2), boxes=torch.ones(2, 4),
                             masks=masks)], make_square(8).image, torch.device("cpu"))
    assert not found.masks[0].any() and found.masks[1].all() and found.masks.shape == (2, 8, 8)


def test_category_numbers_of_coco_are_recovered_from_labels():
    numbers = torch.tensor([1, 11, 13, 44, 46, 90])      # 12, 45 and others are not categories
    item = make_item()
    item.labels = torch.tensor([annotations.LABELS[n] for n in numbers.tolist()])
    item.boxes = torch.tensor([[4.0, 6, 30, 40]] * 6)
    item.masks, item.crowd = item.masks[:1].expand(6, -1, -1), torch.zeros(6).bool()
    recipe = tiny_recipe("vitdet", scales=(1.0, 1.0))
    _, target = detection.training_view(item, recipe, 64, augment.MEAN)
    assert target["labels"].tolist() == [1, 11, 12, 40, 41, 80]              # 0: background

    def net(images):
        assert images[0].max() <= 1
        return [dict(labels=target["labels"], scores=torch.ones(6), boxes=target["boxes"],
                     masks=0.6 * target["masks"][:, None])]

    found = detection.predict_objects(net, item.image, torch.device("cpu"))
    assert [annotations.COCO_IDS[label] for label in found.labels] == numbers.tolist()
    assert found.masks.equal(target["masks"].bool())


def shift_truth(item, shift):
    """Predictions: the truth, moved by so many pixels to the right."""
    single = ~item.crowd
    return SimpleNamespace(
        boxes=item.boxes[single] + torch.tensor([shift, 0, shift, 0]), labels=item.labels[single],
        masks=item.masks[single].roll(shift, 2), scores=torch.full((int(single.sum()),), 0.9))


def make_square(size=100):
    """An item with one square of half the size of the image."""
    mask = torch.zeros(1, size, size).bool()
    mask[0, 20:70, 20:70] = True
    return SimpleNamespace(id=0, image=mask.byte() * 255 * torch.ones(3, 1, 1, dtype=torch.uint8),
                           boxes=torch.tensor([[20.0, 20, 70, 70]]), labels=torch.tensor([2]),
                           masks=mask, areas=mask.sum((1, 2)).float(),
                           crowd=torch.zeros(1).bool())


@pytest.mark.parametrize("shift, expected", [(0, (100, 100, 100)), (10, (40, 100, 0)),
                                             (40, (0, 0, 0))])
def test_scores_are_those_worked_out_by_hand(monkeypatch, shift, expected):
    """50 px wide, moved by 10: IoU 40/60, correct at 0.5, 0.55, 0.6 and 0.65 of ten thresholds."""
    pytest.importorskip("pycocotools")
    items = [make_square() for _ in range(3)]
    model = small_model()
    before = {n: x.clone() for n, x in model.encoder.state_dict().items()}

    def read(name, root, split, limit, size, order):
        return items if order is None else (items[i] for i in order(len(items)))

    monkeypatch.setattr(annotations, "masks", read)
    monkeypatch.setattr(detection, "TOY_DETECTION", TINY)
    monkeypatch.setattr(detection, "predict_objects", lambda net, image, device: shift_truth(
        items[0], 40 if net.training else shift))
    report = detection.detection(model, detection_options("--recipe", "vitdet", "--img-size", "64"))
    [row] = report.rows.values()
    assert [row[f"{kind} {name}"] for kind in ("box", "mask") for name in ("AP", "AP50", "AP75")
            ] == pytest.approx(2 * expected)
    assert report.images == {"train": 3, "test": 3}
    assert "recipe vitdet" in report.protocol and "windows of 4" in report.protocol
    assert not model.encoder.training                    # the given encoder does not change
    assert all(x.equal(before[n]) for n, x in model.encoder.state_dict().items())


def test_run_lengths_have_the_scores_of_masks():
    pytest.importorskip("pycocotools")
    item = make_item()
    pairs = [(item, shift_truth(item, 5))]
    packed = [tuple(map(detection.pack_objects, pair)) for pair in pairs]
    assert isinstance(packed[0][0].masks, list) and not hasattr(packed[0][0], "image")
    for kind in ("bbox", "segm"):
        scores = metrics.coco_ap(pairs, kind)
        assert metrics.coco_ap(packed, kind) == scores and 0 < scores["AP"] < 1


def test_the_processes_share_the_test_images(monkeypatch):
    pytest.importorskip("pycocotools")
    items, predicted, gathered = [make_square() for _ in range(5)], [], []
    monkeypatch.setattr(annotations, "masks", lambda *a: items if a[5] is None else (
        items[i] for i in a[5](5)))
    monkeypatch.setattr(detection, "TOY_DETECTION", TINY)
    monkeypatch.setattr(detection, "train_detector", lambda *_: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(detection, "predict_objects",
                        lambda *_: predicted.append(1) or shift_truth(items[0], 0))

    def gather(parts, own):
        gathered.append(own)
        parts[:] = [own, [(truth, find_nothing(truth)) for truth, _ in own]]

    def find_nothing(truth):
        return SimpleNamespace(boxes=truth.boxes[:0], labels=truth.labels[:0], masks=[],
                               scores=torch.zeros(0))

    monkeypatch.setattr(detection.dist, "all_gather_object", gather)
    for rank, n_images in ((0, 3), (1, 2)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        predicted.clear()
        report = detection.detection(small_model(), detection_options())
        assert len(predicted) == n_images == len(gathered[-1])
        assert report.images["test"] == 2 * n_images     # those of the other count: half is found
        assert report.rows["pyramid"]["box AP"] == pytest.approx(100 * 51 / 101)


def test_user_errors_are_one_sentence(capsys, tmp_path, monkeypatch):
    flags = "--data", "toy-scenes", "--baseline", "untrained", "--limit", "2", "--out", str(
        tmp_path)
    assert "pixels have none" in error_line(capsys, *flags, "--baseline", "pixels")
    assert "choose --recipe 1x, 100ep, vitdet" in error_line(capsys, *flags, "--recipe", "mae")
    error = error_line(capsys, *flags, "--data", "cub")
    assert "no boxes of 'cub' here: choose toy or toy-scenes or coco or" in error
    with pytest.raises(ValueError, match="a power of two and at least 4 px, and small has 2"):
        detection.detection(small_model(small_encoder(patch_size=2)), detection_options())
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 3)
        with pytest.raises(ValueError, match="3 processes cannot share 8 images: take a number"):
            detection.detection(small_model(), detection_options())
    monkeypatch.setattr(detection, "TOY_DETECTION", TINY | dict(lr=math.nan))
    error = error_line(capsys, *flags)
    assert "not finite at step" in error and "--precision fp32" in error
    monkeypatch.setattr(detection, "TOY_DETECTION", TINY)
    with monkeypatch.context() as patch:
        empty = make_square()
        empty.boxes, empty.labels, empty.masks, empty.areas, empty.crowd = (
            x[:0] for x in (empty.boxes, empty.labels, empty.masks, empty.areas, empty.crowd))
        patch.setattr(detection, "train_detector", lambda *_: None)
        patch.setattr(annotations, "masks",
                      lambda *a, **k: [make_square() if "train" in a else empty])
        assert "no objects in the test images of toy-scenes" in error_line(capsys, *flags)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "pip install pycocotools" in error_line(capsys, *flags)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_one_line_and_one_figure(tmp_path, torchrun):
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
    unpack_real("coco_subset", tmp_path)
    annotations.read_coco_json.cache_clear()
    for item in annotations.masks("coco", tmp_path, "train"):
        for name, side in (("1x", 800), ("vitdet", 1024)):
            torch.manual_seed(item.id)
            recipe = detection.DETECTOR | detection.DETECTION_RECIPES[name]
            _, target = detection.training_view(item, recipe, side, augment.MEAN)
            for box, mask in zip(target["boxes"], target["masks"]):
                error = mask_box(mask) - box             # outlines and boxes are annotated apart
                assert max(-error[0], -error[1], error[2], error[3]) <= 5
                assert name == "1x" or not error.any()   # the box of a cropped object may be larger
    order = [item.id for item in annotations.masks("coco", tmp_path, "train", None, 0,
                                                   lambda n: [n - 1, 0])]
    ids = [item.id for item in annotations.boxes("coco", tmp_path, "train")]
    assert order == [ids[-1], ids[0]]
