"""Probes that look at every patch: planted features are found and shuffled ones are not, a planted
film is followed, sweeps and decoding agree with brute force and hand-worked numbers, and every task
runs once from the command line, on toy and on pieces of the real sets."""
import colorsys
import itertools
import json
import math
import os
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import vit
from lib import augment, checkpoints, metrics, rng
from probes import annotations, dense

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")    # of pycocotools
REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)


@pytest.fixture(autouse=True)
def quiet():
    annotations.coco_json.cache_clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def model(**config):
    torch.manual_seed(0)
    encoder = vit.ViT(**{**SMALL, **config}).eval()
    return SimpleNamespace(name="small", encoder=encoder, size=32, mean=augment.MEAN, std=augment.STD,
                           interpolation="bicubic", source=SimpleNamespace(path=None, branch=None))


def settings(*flags):
    args = evaluate.parse(["--device", "cpu", "--precision", "fp32", "--workers", "0", *flags])
    args.data = args.data or "toy"
    return args


# ---- settings ------------------------------------------------------------------------------------


def test_settings_are_those_of_the_sheet():
    wide = (512, 341, (2048, 512), (2048, 512))          # crop, stride; training, test: long, short
    assert dense.SIZES == {
        "ade20k": wide, "voc": wide, "coco": wide,
        "cityscapes": (512, 341, (2048, 1024), (2048, 1024)),
        "pascal": (480, 161, (520, 520), (3840, 480)), "lip": (320, 161, (1024, 320), (4096, 320))}
    assert dense.RECIPES == {
        "parts": dict(blocks=(4, 6, 8, 12), lr=4e-4, iters=160000, batch_norm=False),
        "mmc": dict(blocks=(6, 8, 10, 12), lr=1e-4, iters=40000, batch_norm=True)}
    assert (dense.WARMUP, dense.BATCH, dense.DECAY) == (1500, 16, 0.05)
    assert dense.POSE["coco"] == dict(shape=(256, 192), batch=512, warmup=500, lr=5e-4, decay=0.01,
                                      iters=pytest.approx(20 * 149813 / 512, abs=5))
    assert (dense.STRIDE, dense.SURE, dense.SAME) == (4, 0.2, 0.9)
    assert (dense.MEMORY, dense.RADIUS, dense.NEAREST, dense.TAU) == (7, 12, 5, 0.1)
    assert dense.DAVIS_STD == (0.228, 0.224, 0.225)
    assert dense.THRESHOLDS == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def recorded(monkeypatch):
    """A list to which every step of AdamW adds, for each group: lr, weight decay, betas."""
    steps = []

    class AdamW(torch.optim.AdamW):
        def step(self):
            steps.append([(group["lr"], group["weight_decay"], group["betas"])
                          for group in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    return steps


def test_linear_segmentation_is_trained_as_in_the_sheet(monkeypatch):
    steps, heads = recorded(monkeypatch), dense.Heads(4, 3, 2, False, 0)
    opt = dense.adamw(heads.layers, [4e-4, 1e-3], dense.DECAY)
    monkeypatch.setitem(dense.RECIPES, "parts", {**dense.RECIPES["parts"], "iters": 3000})
    batch = torch.zeros(16, 3, 8, 8), torch.zeros(16, 8, 8, dtype=torch.long)
    dense.train_segmentation(heads, opt, lambda x: torch.randn(16, 1, 1, 4), enumerate([batch] * 4),
                             model(), settings("--recipe", "parts"), 8, 4)
    shares = 1e-6, 0.75 * 0.5000005, 0.5, 0.25           # two steps of warm-up, down to 0
    for groups, share in zip(steps, shares, strict=True):
        assert groups == [(pytest.approx(lr * share), decay, (0.9, 0.999))
                          for lr in (4e-4, 1e-3) for decay in (0.05, 0)]         # weight, bias


def test_pose_is_trained_as_in_the_sheet(monkeypatch):
    steps, recipe, args = recorded(monkeypatch), dense.POSE["coco"], settings()
    weight = torch.tensor([[1.0, 0, 0, 0, 0]])               # v = 0 of all joints but one
    views = torch.zeros(1, 3, 16, 16), torch.ones(1, 5, 4, 4), weight
    head = dense.pose_head(5, model(), args)
    opt = dense.adamw([head], [recipe["lr"]], recipe["decay"])
    dense.train_pose(head, opt, enumerate([views] * 20), (16, 16), 20, recipe, model(), args)
    shares = [0.5] + [1] * 14 + [0.1] * 3 + [0.01] * 2   # of 20 epochs: x 0.1 after 15 and 18
    assert steps == [[(pytest.approx(5e-4 * share), decay, (0.9, 0.999)) for decay in (0.01, 0)]
                     for share in shares]
    assert head.bias[0] > 0 and not head.bias[1:].any()      # only what has a place is learned


# ---- patches, windows, crops ---------------------------------------------------------------------


def test_patches_are_the_raw_blocks_side_by_side_or_the_last_one_normed():
    small, x = model(), torch.randn(2, 3, 40, 24)
    z = dense.patches(small, x, settings(), [0, 2])
    outputs, _ = small.encoder.layers(x, [0, 2], norm=False)
    for at, of in zip(z.split(24, 3), outputs):
        assert at.equal(of[:, 1:].unflatten(1, (5, 3)))
    normed = dense.patches(small, x, settings())
    assert normed.equal(small.encoder(x)[:, 1:].unflatten(1, (5, 3)))
    assert dense.patches(small, x[:, :, :35, :17], settings()).shape == (2, 5, 3, 24)     # padded


def test_windows_begin_where_the_published_code_has_them():
    for sizes, expected in (((683, 512, 341), [0, 171]), ((1024, 512, 341), [0, 341, 512]),
                            ((2048, 512, 341), [0, 341, 682, 1023, 1364, 1536]),
                            ((641, 480, 161), [0, 161]), ((720, 480, 161), [0, 161, 240]),
                            ((480, 320, 161), [0, 160]), ((300, 512, 341), [0])):
        assert dense.starts(*sizes) == expected


def test_sizes_keep_proportions():
    assert dense.scaled((480, 640), 2048, 512) == [512, 683]
    assert dense.scaled((375, 500), 520, 520) == [390, 520]
    assert dense.scaled((100, 1000), 2048, 512) == [205, 2048]


def test_the_argmax_at_another_size_is_the_same_in_parts():
    logits = torch.randn(37, 9, 11)
    expected = F.interpolate(logits[None], (20, 31), mode="bilinear")[0].argmax(0)
    assert dense.likeliest(logits, (20, 31)).equal(expected)


def test_windows_are_averaged_where_they_overlap(monkeypatch):
    """Windows that disagree: the nth says its colours plus n, another head ten times as much."""
    seen = itertools.count()

    def predict(x):
        assert x.shape[1:] == (3, 32, 32)
        for window in x:
            logits = F.pad(window + next(seen), (0, 8, 0, 0), value=99)  # wider than the window
            yield logits, 10 * logits

    monkeypatch.setattr(dense, "likeliest", lambda logits, shape: logits)
    image, small = torch.randint(256, (3, 40, 72), dtype=torch.uint8), model()
    found, tenfold = dense.segment(predict, image, small, settings(), (32, 24, None, (10000, 40)))
    sums, counts = torch.zeros(40, 72), torch.zeros(40, 72)
    for n, (top, left) in enumerate(itertools.product((0, 8), (0, 24, 40))):
        sums[top:top + 32, left:left + 32] += n
        counts[top:top + 32, left:left + 32] += 1
    assert next(seen) == 6 and (sums / counts)[0, 23:25].tolist() == [0, 0.5]
    torch.testing.assert_close(found, dense.normalised(small, image, settings()) + sums / counts)
    torch.testing.assert_close(tenfold, 10 * found)


def test_the_picture_marks_the_prompt_in_red():
    image, mask = torch.full((3, 24, 32), 99, dtype=torch.uint8), torch.ones(24, 32)
    marked, *_ = dense.similarity_row(image, mask, torch.rand(3, 4), (1, 2), 0.5, p=8)
    square = torch.zeros(24, 32, dtype=torch.bool)
    square[8:16, 16:24] = True
    assert torch.equal((marked != 99).all(0), square) and (image == 99).all()
    assert marked[:, square].unique(dim=1).T.tolist() == [[255, 40, 40]]


def test_flips_change_sides_only_if_asked(monkeypatch):
    def swapped(name):
        names = annotations.segmentation_classes(name, "part")
        table = dense.sides(names)
        assert table[table.long()].equal(torch.arange(256, dtype=torch.uint8))
        return names, table, {names[i]: names[table[i]] for i in range(len(names)) if table[i] != i}

    _, _, pairs = swapped("pascal")
    assert len(pairs) == 108 and pairs["cat: rear"] == "cat: lear"
    assert pairs["horse: lfuleg"] == "horse: rfuleg" and "bus: roofside" not in pairs
    names, table, pairs = swapped("lip")
    assert len(pairs) == 6 and pairs["Left-arm"] == "Right-arm"
    x = torch.arange(8, dtype=torch.uint8)
    labels = 4 + x + x[:, None]                              # up to 18, the last of LIP's
    item = SimpleNamespace(image=labels.expand(3, 8, 8), labels=labels)
    sizes, kinds = (8, 8, (8, 8), (8, 8)), set()
    monkeypatch.setattr(dense, "distort", lambda x, g: 255 - x)
    for seed in range(8):
        (image, plain), (_, swapped) = (dense.training_crop(item, sizes, rng.generator(seed), swap)
                                        for swap in (None, table))
        assert (255 - image - plain).abs().max() < 1.01      # nearest: half a pixel off, twice
        assert swapped.equal(plain) or swapped.equal(table[plain.long()])
        kinds.add(bool(swapped.equal(plain)))
    assert kinds == {True, False}                            # some are flipped, some are not


def test_crops_avoid_a_single_label_and_colours_stay_in_range():
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, :16] = 1
    item = SimpleNamespace(image=torch.randint(256, (3, 64, 64), dtype=torch.uint8), labels=labels)
    mixed = 0
    for seed in range(30):
        image, y = dense.training_crop(item, (16, 16, (64, 64), None), rng.generator(seed))
        assert image.shape == (3, 16, 16) and y.shape == (16, 16)
        assert 0 <= image.min() and image.max() <= 255
        mixed += y.float().mean().item() > 0.25 and y.float().mean().item() < 0.75
    assert mixed >= 15                                       # a first try: about 5


def test_pictures_for_training_are_half_to_twice_as_large(monkeypatch):
    monkeypatch.setattr(dense, "distort", lambda x, g: x)
    labels = torch.arange(400).view(20, 20) % 2              # two of them: no second try
    item = SimpleNamespace(image=torch.zeros(3, 20, 20).byte(), labels=labels.byte())
    sides = [len(dense.training_crop(item, (99, 99, (20, 20), None), rng.generator(seed))[1])
             for seed in range(100)]                         # a crop is never cut from them
    assert 10 <= min(sides) < 13 and 37 < max(sides) <= 40 and 23 < sum(sides) / 100 < 27


@pytest.mark.parametrize("first", [True, False])
def test_colours_are_distorted_as_colorsys_has_them(monkeypatch, first):
    x = torch.randint(256, (3, 6, 8)).float()
    x[:, 0] = torch.linspace(0, 255, 8)                      # greys
    yes, no = 0.0, 1.0
    numbers = iter([yes, 25.0, yes, 1.3, yes if first else no, yes, 1.4, yes])
    monkeypatch.setattr(dense, "uniform", lambda *_: next(numbers))
    found = dense.distort(x, rng.generator(3))
    turn = int(torch.randint(-18, 18, (), generator=rng.generator(3))) / 180
    assert turn and not list(numbers)

    def clipped(pixel):
        return [min(max(v, 0), 1) for v in pixel]

    for pixel, mine in zip(x.flatten(1).T.tolist(), found.flatten(1).T, strict=True):
        pixel = clipped(v / 255 + 25 / 255 for v in pixel)
        if first:
            pixel = clipped(1.3 * v for v in pixel)
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixel = colorsys.hsv_to_rgb((h + turn) % 1, min(1.4 * s, 1), v)
        if not first:
            pixel = clipped(1.3 * v for v in pixel)
        torch.testing.assert_close(mine, 255 * torch.tensor(pixel).float(), rtol=0,
                                   atol=0.01)


def test_the_loss_is_divided_by_all_pixels():
    logits = torch.zeros(1, 4, 2, 2)
    labels = torch.tensor([[[1, 255], [255, 255]]])
    assert dense.segmentation_loss(logits, labels).item() == pytest.approx(
        torch.tensor(4.0).log().item() / 4)


def test_a_pool_is_shuffled_and_loses_nothing(monkeypatch):
    def read():
        return (SimpleNamespace(image=torch.zeros(10, dtype=torch.uint8), id=i) for i in range(12))

    def first(count):
        stream = dense.shuffled(read, rng.generator(0))
        return [next(stream).id for _ in range(count)]

    ids = first(24)                                          # all fit: whole epochs
    assert sorted(ids[:12]) == sorted(ids[12:]) == list(range(12)) and ids[:12] != ids[12:]
    monkeypatch.setattr(dense, "ROOM", 50)                   # a pool of five
    ids = first(240)
    assert set(ids) == set(range(12)) and ids[:12] != sorted(ids[:12])
    assert max(map(ids.count, range(12))) - min(map(ids.count, range(12))) <= 8


# ---- linear segmentation -------------------------------------------------------------------------


def planted(monkeypatch, shuffle):
    """Items of random blocks of classes; the "encoder" reads class and noise off the picture."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 16, generator=g)

    def segmentation(name, root, split, limit, level, size):
        for number in range(24 if split == "train" else 8):
            blocks = torch.randint(3, (8, 8), generator=rng.generator(split, number))
            labels = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
            image = F.one_hot(labels, 3).permute(2, 0, 1).to(torch.uint8) * 255
            yield SimpleNamespace(id=number, image=image, labels=labels.to(torch.uint8))

    def patches(model, x, args, blocks):
        z = F.avg_pool2d(x, 8).permute(0, 2, 3, 1) @ mix
        z = z + 0.1 * torch.randn(z.shape, generator=g)
        if shuffle:
            flat = z.flatten(1, 2)
            z = flat[:, torch.randperm(flat.shape[1], generator=g)].view_as(z)
        return z

    monkeypatch.setattr(annotations, "segmentation", segmentation)
    monkeypatch.setattr(annotations, "segmentation_classes", lambda *_: ["a", "b", "c"])
    monkeypatch.setattr(dense, "patches", patches)
    monkeypatch.setattr(dense, "distort", lambda x, g: x)
    monkeypatch.setattr(dense, "SIZES", {"voc": (64, 64, (64, 64), (64, 64))})
    small = model()
    small.encoder.embed_dim = 16
    return small


@pytest.mark.parametrize("recipe", ["parts", pytest.param("mmc", marks=pytest.mark.slow)])
def test_linear_segmentation_finds_what_is_planted_and_nothing_in_shuffled_patches(
        monkeypatch, recipe):
    monkeypatch.setitem(dense.RECIPES, recipe, {**dense.RECIPES[recipe], "blocks": (12,)})
    scores = []
    for shuffle in (False, True):
        small = planted(monkeypatch, shuffle)
        args = settings("--data", "voc", "--recipe", recipe, "--iters", "40", "--lr", "1e-5",
                        "1e-1")
        result = dense.linear_segmentation(small, args)
        [row] = result.rows.values()
        scores.append(row["mIoU"])
        assert shuffle or "lr 0.1;" in result.notes[0]       # held-out images choose the larger
    assert scores[0] > 80 and scores[1] < 35


def test_rates_are_chosen_on_images_that_are_not_trained_on(monkeypatch):
    trained, scored, small = set(), [], planted(monkeypatch, False)
    crop, segment = dense.training_crop, dense.segment
    monkeypatch.setitem(dense.RECIPES, "parts", {**dense.RECIPES["parts"], "blocks": (12,)})
    monkeypatch.setattr(dense, "training_crop", lambda item, *rest: (
        trained.add(item.id), crop(item, *rest))[1])
    monkeypatch.setattr(dense, "segment", lambda predict, image, *rest: (
        scored.append(image), segment(predict, image, *rest))[1])
    train, test = ([item.image for item in annotations.segmentation("voc", None, split, None, None, 64)]
                   for split in ("train", "test"))
    for lrs, held in (["1e-3"], []), (["1e-3", "1e-2"], [0, 10, 20]):
        trained.clear(), scored.clear()
        dense.linear_segmentation(small, settings("--data", "voc", "--iters", "2", "--lr", *lrs))
        assert trained == set(range(24)) - set(held)         # 32 crops: more than an epoch
        assert torch.stack(scored).equal(torch.stack([*(train[n] for n in held), *test]))


@pytest.mark.parametrize("recipe, depth, expected", [
    ("parts", 12, [3, 5, 7, 11]), ("mmc", 12, [5, 7, 9, 11]), ("parts", 24, [7, 11, 15, 23]),
    ("mmc", 3, [1, 2])])
def test_a_recipe_says_which_blocks_are_read_and_how_they_are_normed(monkeypatch, recipe, depth,
                                                                     expected):
    trained, small = [], planted(monkeypatch, False)
    patches, train = dense.patches, dense.train_segmentation

    def several(model, x, args, blocks):
        assert blocks == expected
        return patches(model, x, args, blocks).repeat(1, 1, 1, len(blocks))

    small.encoder.depth = depth
    monkeypatch.setattr(dense, "patches", several)
    monkeypatch.setattr(dense, "train_segmentation", lambda heads, *rest: (
        trained.append(heads), train(heads, *rest)))
    dense.linear_segmentation(small, settings("--data", "voc", "--recipe", recipe, "--iters", "1"))
    [heads], z = trained, 5 * torch.randn(2, 3, 3, 16 * len(expected))
    assert heads.normed(z).equal(z) == (recipe == "parts")
    torch.testing.assert_close(heads.normed(z)[:1], heads.normed(z[:1]))     # not by its own batch


@pytest.mark.parametrize("most", [3, 256])
def test_no_forward_is_larger_than_batch_size(monkeypatch, most):
    seen, small = [], planted(monkeypatch, False)
    patches = dense.patches
    monkeypatch.setitem(dense.RECIPES, "parts", {**dense.RECIPES["parts"], "blocks": (12,)})
    monkeypatch.setattr(dense, "patches", lambda model, x, args, blocks: (
        seen.append(len(x)), patches(model, x, args, blocks))[1])
    dense.linear_segmentation(small, settings("--data", "voc", "--iters", "1", "--batch-size",
                                              str(most)))
    assert max(seen) == min(most, dense.BATCH) and sum(seen) == dense.BATCH + 8


@pytest.mark.slow
@pytest.mark.parametrize("task", ["linear_segmentation", "pose"])
def test_the_number_of_workers_changes_nothing(monkeypatch, task):
    def keypoints(name, root, split, limit, size):
        for number in range(6):
            g = rng.generator(split, number)
            yield SimpleNamespace(image=torch.randint(256, (3, 64, 48), generator=g).byte(),
                                  points=F.pad(48 * torch.rand(1, 17, 2, generator=g), (0, 1),
                                               value=2), boxes=torch.tensor([[2.0, 2, 40, 60]]),
                                  areas=torch.full((1,), 2000.0), crowd=torch.zeros(1).bool())

    def found(*flags):
        small = planted(monkeypatch, False) if task == "linear_segmentation" else model()
        args = settings("--task", task, "--data", name, "--iters", "3", *flags)
        args.lr = args.lr or ([1e-3, 1e-2] if task == "linear_segmentation" else [])
        result = evaluate.TASKS[task](small, args)
        return result.rows, result.notes

    name = "voc" if task == "linear_segmentation" else "coco"
    monkeypatch.setattr(annotations, "keypoints", keypoints)
    monkeypatch.setattr(metrics, "coco_ap", lambda *_: dict.fromkeys(("AP", "AP50", "AR", "AR50"),
                                                                     0.0))
    monkeypatch.setitem(dense.POSE, "coco", dict(shape=(64, 48), batch=4, iters=9, warmup=1,
                                                 lr=1e-2, decay=0.01))
    monkeypatch.setitem(dense.RECIPES, "parts", {**dense.RECIPES["parts"], "blocks": (12,)})
    alone = found("--workers", "0")
    assert found("--workers", "2") == alone != found("--workers", "0", "--seed", "1")


# ---- a prompt ------------------------------------------------------------------------------------


def test_the_sweep_equals_painting_every_pixel():
    similarity = torch.rand(4, 5) * 2 - 1
    mask, valid = torch.rand(32, 40) > 0.6, torch.rand(32, 40) > 0.1
    found = dense.sweep(similarity, dense.cells(mask & valid, 8), dense.cells(valid, 8))
    for iou, threshold in zip(found, dense.THRESHOLDS):
        painted = (similarity > threshold).repeat_interleave(8, 0).repeat_interleave(8, 1) & valid
        union = (painted | (mask & valid)).sum().item()
        assert iou.item() == pytest.approx((painted & mask).sum().item() / union)


def test_the_prompt_lies_deepest():
    mask = torch.rand(32, 40) > 0.05
    mask[3:20, 9:30] = True
    found = dense.depth_at_centres(mask, 8)
    wide = F.pad(mask, (1, 1, 1, 1))
    free = (~wide).nonzero().float() - 1
    for y in range(4):
        for x in range(5):
            centre = torch.tensor([8 * y + 3.5, 8 * x + 3.5])
            assert found[y, x] == (free - centre).square().sum(1).min()
    args = settings("--task", "zero_shot_segmentation")
    whole = torch.ones(40, 40, dtype=torch.bool)
    assert dense.prompt(whole, dense.cells(whole, 8), 8, args, 0) == (2, 2)
    thin = torch.zeros(40, 40, dtype=torch.bool)
    thin[:, 20:22] = True
    assert dense.prompt(thin, dense.cells(thin, 8), 8, args, 0) is None


def test_whose_patches_are_alike_is_segmented(monkeypatch):
    """Patches of one category point one way, however long they are: IoU is what the grid allows; at
    random, the floor."""
    def scores(similar):
        def patches(model, x, args, blocks=None):
            seen = F.avg_pool2d(x.amax(1, keepdim=True), 8).permute(0, 2, 3, 1)
            length = torch.tensor([0.3, 3.0] * 4)[:, None, None]
            return (torch.cat([seen, 1 - seen], 3) * length if similar
                    else torch.randn(*seen.shape[:3], 8))

        def masks(name, root, split, limit, size):
            for top in (0, 8, 16):
                mask = torch.zeros(64, 64, dtype=torch.bool)
                mask[top:top + 24, 8:40] = True
                yield SimpleNamespace(
                    image=mask.expand(3, 64, 64).to(torch.uint8) * 255, labels=torch.tensor([3]),
                    masks=mask[None], crowd=torch.tensor([False]))

        monkeypatch.setattr(dense, "patches", patches)
        monkeypatch.setattr(dense, "normalised", lambda model, images, args: images / 255)
        monkeypatch.setattr(annotations, "masks", masks)
        args = settings("--task", "zero_shot_segmentation", "--size", "64")
        return dense.zero_shot_segmentation(model(), args).rows["mean over targets"]

    found = scores(True)
    assert found["Opt"] == found["T=0.4"] == pytest.approx(100)
    assert found["whole picture"] == pytest.approx(18.75) and scores(False)["Opt"] < 40


def test_the_best_threshold_is_one_for_all_and_categories_count_alike(monkeypatch):
    """Of category 3 two targets, each with a best threshold of its own, of category 5 one."""
    iou = torch.zeros(3, 10, dtype=torch.float64)            # at T = 0, 0.1 ... 0.9
    iou[0, 1], iou[1, 2], iou[2, 1:3] = 0.6, 0.6, torch.tensor([0.9, 0.3])
    each, whole = iter(iou), torch.ones(1, 64, 64, dtype=torch.bool)
    monkeypatch.setattr(annotations, "masks", lambda *_: (
        SimpleNamespace(image=torch.zeros(3, 64, 64).byte(), labels=torch.tensor([label]),
                        masks=whole, crowd=torch.tensor([False])) for label in (3, 3, 5)))
    monkeypatch.setattr(dense, "sweep", lambda *_: next(each))
    args = settings("--task", "zero_shot_segmentation", "--size", "64")
    result = dense.zero_shot_segmentation(model(), args)
    over_targets, over_categories = result.rows.values()
    assert over_targets == pytest.approx({"Opt": 50, "T=0.1": 50, "T=0.2": 30, "T=0.3": 0,
                                          "T=0.4": 0, "whole picture": 100})
    assert over_categories == pytest.approx({"Opt": 60, "T=0.1": 60, "T=0.2": 30, "T=0.3": 0,
                                             "T=0.4": 0})
    assert "Opt is T = 0.1" in result.notes[0]
    assert result.images == {"targets": 3, "categories": 2}


def test_targets_are_categories_or_instances_but_no_crowds(monkeypatch):
    masks = torch.zeros(4, 16, 16, dtype=torch.bool)
    for k, mask in enumerate(masks):
        mask[4 * k:4 * k + 4] = True
    item = SimpleNamespace(image=torch.zeros(3, 16, 16).byte(), labels=torch.tensor([3, 5, 3, 3]),
                           masks=masks, crowd=torch.tensor([False, False, False, True]))
    monkeypatch.setattr(annotations, "masks", lambda *_: [item])

    def pairs(target):
        [(_, pairs, valid)] = dense.targets(settings("--target", target), 16)
        assert valid.all()
        return pairs

    (a, both), (b, one) = pairs("category")
    assert (a, b) == (3, 5) and both.equal(masks[0] | masks[2]) and one.equal(masks[1])
    for (label, mask), k in zip(pairs("instance"), (0, 1, 2), strict=True):
        assert label == item.labels[k] and mask.equal(masks[k])


def test_parts_are_asked_by_the_class_maps_of_the_level():
    def targets(*flags):
        args = settings("--task", "zero_shot_segmentation", "--limit", "1", *flags)
        return next(dense.targets(args, 32))

    _, pairs, valid = targets("--level", "part")
    [item] = annotations.segmentation("toy", limit=1, level="part", size=32)
    assert len(pairs) > 2 and valid.equal(item.labels != 255) and not valid.all()
    for part, mask in pairs:
        assert mask.equal(item.labels == part)
    [(thing, whole)] = targets()[1]
    [(same, mask)] = targets("--level", "object")[1]
    assert same == thing and mask.equal(whole)
    with pytest.raises(ValueError, match="No level 'scene' of toy: choose object or part"):
        targets("--level", "scene")
    with pytest.raises(ValueError, match="toy has no --target instance at --level part"):
        targets("--level", "part", "--target", "instance")
    with pytest.raises(ValueError, match="coco has no --target stuff at --level object; choose"):
        targets("--data", "coco", "--level", "object", "--target", "stuff")


def test_void_counts_nowhere_and_background_is_no_target(monkeypatch):
    """Void looks like the object: to say that it is one costs nothing."""
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[8:32, 8:40], labels[40:56, 8:40] = 1, 255
    item = SimpleNamespace(image=(labels > 0).expand(3, 64, 64).byte() * 255, labels=labels)

    def patches(model, x, args, blocks=None):
        seen = F.avg_pool2d(x.amax(1, keepdim=True), 8).permute(0, 2, 3, 1)
        return torch.cat([seen, 1 - seen], 3)

    monkeypatch.setattr(dense, "patches", patches)
    monkeypatch.setattr(dense, "normalised", lambda model, images, args: images / 255)
    monkeypatch.setattr(annotations, "segmentation", lambda *_: [item])
    monkeypatch.setattr(annotations, "segmentation_classes", lambda *_: ["background", "cat"])
    args = settings("--task", "zero_shot_segmentation", "--size", "64", "--data", "voc")
    result = dense.zero_shot_segmentation(model(), args)
    row = result.rows["mean over targets"]
    assert result.images == {"targets": 1, "categories": 1} and row["Opt"] == pytest.approx(100)
    assert row["whole picture"] == pytest.approx(100 * 24 * 32 / (64 * 64 - 16 * 32))


# ---- films ---------------------------------------------------------------------------------------


def square_film(frames=12):
    masks = torch.zeros(frames, 80, 96, dtype=torch.uint8)
    for t in range(frames):
        masks[t, 16 + 8 * (t % 3):40 + 8 * (t % 3), 4 * t // 8 * 8:4 * t // 8 * 8 + 24] = 1
    masks[:, 64:, 80:] = 2                                   # and one that stays
    return SimpleNamespace(name="square", frames=masks[:, None].expand(-1, 3, -1, -1),
                           masks=masks, objects=2)


def test_a_planted_film_is_followed_to_the_pixel():
    """Patches of one pixel, as larger ones lose corners when their maps are enlarged."""
    film, g = square_film(), torch.Generator().manual_seed(0)
    film.frames, film.masks = film.frames[..., ::8, ::8], film.masks[:, ::8, ::8]

    def encode(image):                                       # a direction for every object
        return F.one_hot(image[0].long(), 3).float()

    def noise(image):
        return F.normalize(torch.randn(10, 12, 16, generator=g), dim=2)

    j = []
    for features in (encode, noise):
        masks = torch.stack([film.masks[0], *dense.follow(film, features, 1, 4)])
        j.append(metrics.film_scores(masks, film.masks)[0].mean().item())
    assert j[0] == 1 and j[1] < 0.6


def test_propagation_equals_the_published_dense_arithmetic():
    h, w, D, M, C, radius = 6, 7, 5, 3, 3, 2
    feature, memory = (F.normalize(torch.randn(n, h, w, D), dim=3) for n in (1, M))
    labels = torch.rand(M, h, w, C)
    y, x = (v.flatten() for v in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    a = (memory.flatten(0, 2) @ feature.flatten(0, 2).T / 0.1).exp() * near.repeat(M, 1)
    a[a < a.topk(5, 0).values[-1:]] = 0                      # over all frames together
    expected = ((a / a.sum(0)).T @ labels.flatten(0, 2)).view(h, w, C)
    found = dense.propagate(feature[0], memory, labels, radius)
    torch.testing.assert_close(found, expected)


def test_only_the_first_frame_and_the_last_seven_are_kept_with_what_they_were_given(monkeypatch):
    film, frames, maps = square_film(12), [], []

    def encode(image):                                       # every frame has its number
        frames.append(len(frames))
        return torch.full((10, 12, 1), float(frames[-1]))

    def propagate(feature, memory, labels, radius):
        now = int(feature[0, 0, 0])
        kept = [0, *range(max(1, now - 7), now)]
        assert memory[:, 0, 0, 0].tolist() == kept
        assert labels.equal(torch.stack([maps[t] for t in kept]))
        maps.append(F.normalize(torch.rand(10, 12, 3), p=1, dim=2))      # soft, and so it is kept
        return maps[-1]

    maps.append(F.one_hot(dense.resize_labels(film.masks[0], (10, 12)).long(), 3).float())
    monkeypatch.setattr(dense, "propagate", propagate)
    masks = list(dense.follow(film, encode, 8, 4))
    assert frames == list(range(12)) and len(masks) == len(maps) - 1 == 11


def test_films_are_compared_by_cosine_and_davis_has_a_deviation_of_its_own(monkeypatch):
    seen, mix = [], 0.01 * torch.randn(192, 8)               # exp(dot / 0.1) stays finite
    frames, masks = torch.randint(256, (4, 3, 64, 64)).byte(), torch.zeros(4, 64, 64).byte()
    masks[:, 16:48, 16:48] = 1
    film = SimpleNamespace(name="noise", frames=frames, masks=masks, objects=1)
    monkeypatch.setattr(annotations, "videos", lambda *_: [film])

    def row(lengths, std=augment.STD):
        def patches(model, x, args):
            seen.append(x[0])
            return lengths * (F.pixel_unshuffle(x, 8).permute(0, 2, 3, 1) @ mix)

        small = model()
        small.std = std
        monkeypatch.setattr(dense, "patches", patches)
        [row] = dense.video(small, settings("--task", "video", "--data", "davis", "--size",
                                            "64")).rows.values()
        return row

    found = row(1)
    assert 0 < found["J&F"] < 100 and row(torch.tensor([1.0, 4] * 4)[:, None, None]) == found
    row(1, (0.5, 0.5, 0.5))                                  # an encoder that brings another
    stds = torch.tensor([(0.228, 0.224, 0.225)] * 2 + [(0.5, 0.5, 0.5)])[:, None, :, None, None]
    expected = (frames / 255 - torch.tensor(augment.MEAN)[:, None, None]) / stds
    torch.testing.assert_close(torch.stack(seen), expected.flatten(0, 1))


def test_channels_are_stretched_before_the_largest_wins():
    soft = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])          # background would win everywhere
    assert dense.harden(soft, 1, (1, 2)).tolist() == [[0, 1]]
    constant = torch.tensor([[[0.5, 0.0], [0.5, 0.0]]])      # 0/0 in the published code
    assert dense.harden(constant, 1, (1, 2)).tolist() == [[0, 0]]


def test_frames_are_480_by_a_multiple_of_64():
    assert dense.frame_shape((480, 854), 480, 16) == [480, 832]
    assert dense.frame_shape((854, 480), 480, 16) == [832, 480]
    assert dense.frame_shape((128, 128), 128, 8) == [128, 128]
    assert dense.frame_shape((480, 854), 476, 14) == [476, 840]          # 14 does not divide 64
    assert dense.frame_shape((854, 480), 476, 14) == [840, 476]


# ---- joints --------------------------------------------------------------------------------------


def test_heat_maps_are_decoded_by_hand():
    maps = torch.zeros(3, 5, 6)
    maps[0, 2, 3], maps[0, 2, 4], maps[0, 1, 3] = 1.0, 0.5, 0.25     # right, and up
    maps[1, 0, 0], maps[1, 0, 1] = 0.7, 0.6                  # at the rim: as it is
    maps[2, 3, 1], maps[2, 3, 0] = 0.9, 0.1                  # left; up and down are equal
    points, best = dense.decode(maps)
    assert points.tolist() == [[3.25, 1.75], [0, 0], [0.75, 3]]
    assert best.tolist() == pytest.approx([1, 0.7, 0.9])


def test_gaussians_stand_on_the_nearest_cell_and_decode_to_it():
    points = torch.tensor([[21.9, 40.0, 2], [22.1, 1.0, 1], [30, 30, 0], [-90, 20, 2]])
    maps, weights = dense.heat_maps(points, (64, 48), 2.0)
    assert maps.shape == (4, 16, 12) and weights.tolist() == [1, 1, 0, 0]
    assert maps[0].argmax() == 10 * 12 + 5 and maps[1].argmax() == 6       # round(5.475), (5.525)
    assert maps[0, 10, 5] == 1 and maps[0, 10, 7].item() == pytest.approx(0.60653, abs=1e-5)
    assert maps[0, 3, 5] == 0 and maps[0, 4, 5] > 0          # cut at 6 cells


def test_a_box_becomes_the_crop_and_points_come_back():
    box = torch.tensor([10.0, 20, 40, 100])                  # 30 x 80, widened to 60 x 80
    matrix = dense.to_image(box, (256, 192))
    corners = dense.moved(torch.tensor([[0.0, 0], [192, 256]]), matrix)
    assert corners.tolist() == [[-12.5, 10], [62.5, 110]]
    matrix = dense.to_image(box, (256, 192), 0.8, 30)
    points = torch.rand(7, 2) * 100
    torch.testing.assert_close(dense.moved(dense.moved(points, matrix), dense.inverse(matrix)),
                               points, atol=1e-3, rtol=0)
    image = torch.arange(120)[None, None].expand(3, 120, 120).to(torch.uint8)
    crop = dense.cut(image, dense.to_image(torch.tensor([30.0, 30, 70, 70]), (50, 50)), (50, 50))
    torch.testing.assert_close(crop[0, 0], torch.arange(25.0, 75))


def test_mirrored_maps_are_turned_back():
    """A joint at pixel 20 is at pixel 27 of the mirror image of 48: cells 5 and 7."""
    swap = torch.tensor([1, 0])
    maps, _ = dense.heat_maps(torch.tensor([[20.0, 8, 2], [32, 8, 2]]), (16, 48), 1.0)
    mirror, _ = dense.heat_maps(torch.tensor([[15.0, 8, 2], [27, 8, 2]]), (16, 48), 1.0)
    assert dense.unflipped(mirror[None], swap)[0].flatten(1).argmax(1).equal(
        maps.flatten(1).argmax(1))


@pytest.mark.parametrize("p", [16, 14])                   # 14 divides neither 256 nor 192
def test_planted_joints_are_found_where_they_are(p):
    """A spot on the left and one on the right; an "encoder" that sees how bright a patch is, and on
    which side it lies: of a mirrored crop it says the other side, as one that knows people does."""
    def layers(x, blocks, norm):
        seen = F.avg_pool2d(x[:, :1], p)
        left = torch.arange(seen.shape[3]) < seen.shape[3] // 2
        return [torch.cat([seen * left, seen * ~left], 1).flatten(2).mT], None

    planted, head = model(), torch.nn.Linear(2, 2, bias=False)
    planted.mean, planted.std = (0, 0, 0), (1, 1, 1)
    planted.encoder = SimpleNamespace(patch_size=p, depth=1, layers=layers,
                                      split=lambda z: (None, z))
    head.weight[:] = torch.eye(2)
    image, truth = torch.zeros(3, 500, 300, dtype=torch.uint8), [[99.5, 249.5], [199.5, 249.5]]
    for x in (100, 200):
        image[:, 250 - p // 2:250 + p // 2, x - p // 2:x + p // 2] = 255
    high, low = range(22, 22 + 2 * p), range(198, 198 + 2 * p)           # rows of the crop
    rows = torch.tensor([*high, *low])
    shift = torch.stack([20 + rows % 40, 250 - rows], 1)     # columns: 41 to 80 and 141 to 180
    boxes = torch.cat([shift + torch.tensor([19.2, 25.6]),   # what becomes 256 x 192, unscaled
                       shift + torch.tensor([172.8, 230.4])], 1)

    def error(swap):
        item = SimpleNamespace(image=image, boxes=boxes)
        points, _ = dense.predict(item, range(len(rows)), head, (256, 192), torch.tensor(swap),
                                  planted, settings())
        return points - torch.tensor(truth)                  # (4p, 2, 2)

    found = error([1, 0])
    assert found.abs().max() <= p / 2 + dense.STRIDE
    drift = (found[2 * p:] - found[:2 * p]).mean((0, 1))
    assert drift.abs().max() < 1.5                           # 266 px squeezed into 256: 6.6
    assert error([0, 1]).abs().max() > 90                    # control: sides that are not swapped


def test_training_views_move_points_with_the_picture():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    image[:, 40:43, 60:63] = 255
    item = SimpleNamespace(image=image, box=torch.tensor([20.0, 20, 80, 80]),
                           points=torch.tensor([[61.0, 41, 2], [0, 0, 0]]))
    for seed in range(6):
        crop, points = dense.training_pose(item, (128, 128), torch.tensor([1, 0]),
                                           rng.generator(seed))
        [joint] = points[points[:, 2] > 0]
        y, x = divmod(int(F.avg_pool2d(crop[:1], 3, 1, 1).argmax()), 128)
        assert abs(x - joint[0]) <= 2 and abs(y - joint[1]) <= 2


def test_joints_are_scored_by_the_longer_side_if_labelled_and_of_no_crowd(monkeypatch):
    """Two creatures of the test split and a crowd. Of one all joints but the fourth are labelled
    and 9 px off; of the other only the first is, and 11 px off. All else is far from its place."""
    joints = len(annotations.part_names("toy"))
    v = torch.ones(3, joints)
    v[0, 3], v[1, 1:] = 0, 0
    off = torch.tensor([9.0, 11, 500])[:, None].where(v > 0, 500)
    boxes = torch.tensor([[0.0, 0, 40, 100], [10, 10, 110, 50], [0, 0, 100, 100]])

    def keypoints(name, root, split, limit, size):
        far = 0 if split == "test" else 500
        yield SimpleNamespace(image=torch.zeros(3, 120, 120).byte(), boxes=boxes,
                              points=torch.stack([20 * v, 50 * v, v], 2), off=far + off,
                              areas=torch.tensor([4050.0, 3025, 5000]),
                              crowd=torch.tensor([False, False, True]))

    def predict(item, who, *_):
        return item.points[who][..., :2] + F.pad(item.off[who][..., None], (0, 1)), None

    monkeypatch.setattr(annotations, "keypoints", keypoints)
    monkeypatch.setattr(dense, "predict", predict)
    result = dense.pose(model(), settings("--task", "pose", "--iters", "1"))
    assert result.images == {"objects": 2}
    # exp(-81 / (2 area (2 * 0.05)^2)) = 1/e, exp(-121 / ...) = 1/e^2
    assert result.rows["patches"] == pytest.approx({
        "OKS": 100 * (math.exp(-1) + math.exp(-2)) / 2, "PCK@0.1": 100 * (joints - 1) / joints})


def test_a_person_is_as_sure_as_the_maxima_above_a_fifth():
    head, item = torch.nn.Linear(24, 3), SimpleNamespace(
        image=torch.zeros(3, 40, 40).byte(), boxes=torch.tensor([[4.0, 4, 36, 36]]))
    head.weight.zero_()

    def score(*maxima):                                      # every map is flat
        head.bias[:] = torch.tensor(maxima)
        _, [score] = dense.predict(item, [0], head, (32, 32), torch.arange(3), model(), settings())
        return score.item()

    assert score(0.9, 0.1, 0.7) == pytest.approx(0.8) and score(0.1, 0.19, -1) == 0


def test_the_same_person_is_found_once():
    points = torch.tensor([[[5.0, 5], [20, 20]], [[5.1, 5], [20, 20]], [[60, 60], [80, 80]]])
    boxes = torch.tensor([[0.0, 0, 30, 30]] * 2 + [[50.0, 50, 90, 90]])
    kept = dense.distinct(points, torch.tensor([0.5, 0.9, 0.7]), boxes, torch.full((3,), 900.0),
                          [0.05, 0.05])
    assert kept == [1, 2]


# ---- every task from the command line ------------------------------------------------------------


def run(tmp_path, *flags):
    path = tmp_path / "encoder.pt"
    if not path.exists():
        checkpoints.save_encoder(path, model().encoder, branch="base", method="mae", data="toy", step=1,
                 mean=augment.MEAN, std=augment.STD)
    evaluate.main(["--checkpoint", str(path), "--out", str(tmp_path), "--device", "cpu",
                   "--precision", "fp32", *flags])
    return json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("task, column, images, pictures", [
    ("linear_segmentation --level part --iters 3", "mIoU", "test", "linear_seg*toy*part*"),
    ("linear_segmentation --level object --recipe mmc --iters 2 --lr 1e-3", "aAcc", "test",
     "linear_seg*"),
    ("zero_shot_segmentation --prompt random", "T=0.1", "targets", "similarity-toy*"),
    ("video", "J&F", "films", "video-toy*"), ("pose --iters 3", "PCK@0.1", "objects", "pose-toy*")])
def test_every_task_runs_on_toy(tmp_path, task, column, images, pictures):
    limit = "1" if task == "video" else "12"
    line = run(tmp_path, "--task", *task.split(), "--data", "toy-scenes", "--limit", limit,
               "--show")
    assert all(0 <= row[column] <= 100 for row in line["metrics"].values())
    assert line["images"][images] >= 1 and line["protocol"]
    assert ("Gaussians of sigma 0.5 cells" in line["protocol"]) == task.startswith("pose")
    assert list(tmp_path.glob(f"{pictures}.png"))


def test_what_cannot_be_is_one_sentence():
    pixels = SimpleNamespace(name="pixels", encoder=None, size=32)
    for task in ("linear_segmentation", "zero_shot_segmentation", "video", "pose"):
        with pytest.raises(ValueError, match="pixels have none"):
            evaluate.TASKS[task](pixels, settings("--task", task))
    with pytest.raises(ValueError, match="no recipe dino; choose --recipe parts, mmc"):
        dense.linear_segmentation(model(), settings("--recipe", "dino"))
    with pytest.raises(ValueError, match="no recipe parts"):
        evaluate.settings_of(settings("--task", "linear", "--recipe", "parts"), evaluate.RECIPES)
    with pytest.raises(ValueError, match="No segmentation of 'cub'"):
        dense.linear_segmentation(model(), settings("--data", "cub"))
    with pytest.raises(ValueError, match="no key-points of cub"):
        dense.pose(model(), settings("--data", "cub"))
    for task, name in (("linear_segmentation", "voc"), ("pose", "coco")):
        with pytest.raises(ValueError, match=f"{task} on {name} has the protocol's sizes: leave"):
            evaluate.TASKS[task](model(), settings("--task", task, "--data", name, "--size", "64"))
    with pytest.raises(ValueError, match="no --target stuff"):
        dense.zero_shot_segmentation(model(), settings("--target", "stuff"))


@pytest.mark.parametrize("task, name, missing", [
    ("linear_segmentation", "voc", "no test split"), ("pose", "coco", "no test split"),
    ("pose", "coco", "pip install pycocotools")])
def test_what_is_missing_is_said_before_training(monkeypatch, task, name, missing):
    def read(name, root, split, *_):
        if split == "test" and missing == "no test split":
            raise ValueError(missing)
        yield SimpleNamespace(image=torch.zeros(3, 64, 48, dtype=torch.uint8),
                              labels=torch.arange(64 * 48).view(64, 48).to(torch.uint8) % 3,
                              points=torch.ones(1, 17, 3), boxes=torch.tensor([[2.0, 2, 40, 60]]),
                              areas=torch.ones(1), crowd=torch.zeros(1).bool())

    steps = []
    monkeypatch.setattr(annotations, "segmentation", read)
    monkeypatch.setattr(annotations, "keypoints", read)
    monkeypatch.setitem(dense.SIZES, "voc", (32, 24, (32, 32), (32, 32)))
    monkeypatch.setitem(dense.POSE, "coco", {**dense.POSE["coco"], "batch": 2})
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: steps.append(1))
    if missing == "no test split":
        monkeypatch.setattr(metrics, "coco_ap", lambda *_: None)
    else:
        monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match=missing):
        evaluate.TASKS[task](model(), settings("--task", task, "--data", name, "--iters", "1"))
    assert not steps


# ---- pieces of the real sets ---------------------------------------------------------------------


def unpack(name, folder):
    path = os.path.join(REAL, f"{name}.tar")
    if not os.path.exists(path):
        pytest.skip(f"no piece of {name} here")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_the_real_davis(tmp_path):
    root = unpack("davis_subset", tmp_path / "davis")
    line = run(tmp_path, "--task", "video", "--data", "davis", "--data-root", str(root), "--size",
               "128")
    assert line["images"] == {"films": 1, "frames": 40}
    assert 0 < line["metrics"]["patches"]["J&F"] < 100


def test_the_real_voc(tmp_path, monkeypatch):
    root = unpack("voc_animals", tmp_path / "voc")
    monkeypatch.setitem(dense.SIZES, "voc", (64, 43, (256, 64), (256, 64)))
    flags = "--data", "voc", "--data-root", str(root), "--limit", "3"
    line = run(tmp_path, "--task", "linear_segmentation", "--recipe", "mmc", "--iters", "2", *flags)
    assert 0 <= line["metrics"]["blocks 2 3"]["mIoU"] <= 100
    line = run(tmp_path, "--task", "zero_shot_segmentation", "--size", "64", *flags)
    assert line["images"]["targets"] >= 3


def test_the_real_coco(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setitem(dense.POSE, "coco", {**dense.POSE["coco"], "batch": 8})
    root = unpack("coco_subset", tmp_path / "coco")
    (root / "coco/val2017").symlink_to("train2017")
    for kind in ("instances", "person_keypoints"):
        (root / f"coco/annotations/{kind}_val2017.json").symlink_to(f"{kind}_train2017.json")
    flags = "--data", "coco", "--data-root", str(root), "--limit", "3"
    line = run(tmp_path, "--task", "pose", "--iters", "1", "--batch-size", "128", *flags)
    assert 0 <= line["metrics"]["patches"]["AP"] <= line["metrics"]["patches"]["AR50"] <= 100
    for target in ("category", "instance"):
        line = run(tmp_path, "--task", "zero_shot_segmentation", "--size", "64", "--target", target,
                   *flags)
        assert line["images"]["targets"] >= 1
