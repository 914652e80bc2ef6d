"""Segmentation from frozen patches: planted features are found and shuffled ones are not; windows,
crops and thresholds agree with brute force and with numbers worked out by hand."""
import colorsys
import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_models import make_encoder, make_model, make_options, record_adamw, unpack_real

import evaluate
from lib import augment, checkpoints, rng
from probes import annotations, label_crops, patches, training
from probes import frozen_segmentation as frozen
from probes.label_crops import Sizes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")    # of pycocotools


@pytest.fixture(autouse=True)
def seeded_without_gradient():
    annotations.read_coco_json.cache_clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def small_model(**config):
    return make_model(make_encoder(**{"embed_dim": 24, **config}))


def linear_options(*argv):
    return make_options("linear_segmentation", *argv)


def zero_shot_options(*argv):
    return make_options("zero_shot_segmentation", *argv)


# ---- settings ------------------------------------------------------------------------------------


def test_settings_are_the_published_ones():
    wide = (512, 341, (2048, 512), (2048, 512))          # crop, stride; training, test: long, short
    assert label_crops.SEGMENTATION_SIZES == {
        "ade20k": wide, "voc": wide, "coco": wide,
        "cityscapes": (512, 341, (2048, 1024), (2048, 1024)),
        "pascal": (480, 161, (520, 520), (3840, 480)), "lip": (320, 161, (1024, 320), (4096, 320))}
    assert frozen.LINEAR_SEGMENTATION_RECIPES == {
        "parts": dict(blocks=(4, 6, 8, 12), lr=4e-4, iters=160000, batch_norm=False),
        "mmc": dict(blocks=(6, 8, 10, 12), lr=1e-4, iters=40000, batch_norm=True)}
    assert label_crops.WARMUP_ITERS == 1500 and label_crops.CROPS_PER_BATCH == 16
    assert frozen.LINEAR_WEIGHT_DECAY == 0.05
    assert frozen.THRESHOLDS == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def test_linear_heads_are_trained_with_the_published_schedule(monkeypatch):
    steps, heads = record_adamw(monkeypatch), frozen.LinearHeads(4, 3, 2, False, 0)
    optimizer = training.linear_adamw(heads.layers, [4e-4, 1e-3], frozen.LINEAR_WEIGHT_DECAY)
    batch = torch.zeros(16, 3, 8, 8), torch.zeros(16, 8, 8, dtype=torch.long)
    frozen.train_linear_heads(heads, optimizer, lambda x: torch.randn(16, 1, 1, 4),
                                    enumerate([batch] * 4), iters=4, warmup=2, p=8)
    factors = 1e-6, 0.75 * 0.5000005, 0.5, 0.25          # two steps of warmup, down to 0
    for groups, factor in zip(steps, factors, strict=True):
        assert groups == [(pytest.approx(lr * factor), decay, (0.9, 0.999))
                          for lr in (4e-4, 1e-3) for decay in (0.05, 0)]         # weight, bias


# ---- windows and crops ---------------------------------------------------------------------------


def test_windows_begin_where_the_published_code_has_them():
    for sizes, expected in (((683, 512, 341), [0, 171]), ((1024, 512, 341), [0, 341, 512]),
                            ((2048, 512, 341), [0, 341, 682, 1023, 1364, 1536]),
                            ((641, 480, 161), [0, 161]), ((720, 480, 161), [0, 161, 240]),
                            ((480, 320, 161), [0, 160]), ((300, 512, 341), [0])):
        assert label_crops.window_starts(*sizes) == expected


def test_the_aspect_ratio_is_kept():
    assert label_crops.fit_shape((480, 640), 2048, 512) == [512, 683]
    assert label_crops.fit_shape((375, 500), 520, 520) == [390, 520]
    assert label_crops.fit_shape((100, 1000), 2048, 512) == [205, 2048]


def test_the_argmax_at_another_size_is_the_same_in_chunks():
    logits = torch.randn(37, 9, 11)
    expected = F.interpolate(logits[None], (20, 31), mode="bilinear")[0].argmax(0)
    assert label_crops.argmax_resized(logits, (20, 31)).equal(expected)


def test_windows_are_averaged_where_they_overlap(monkeypatch):
    """Windows that disagree: the logits of the nth are its colors plus n; those of another head are
    ten times as large."""
    counter = itertools.count()

    def predict(x):
        assert x.shape[1:] == (3, 32, 32)
        for window in x:
            logits = F.pad(window + next(counter), (0, 8, 0, 0), value=99)   # wider than the window
            yield logits, 10 * logits

    monkeypatch.setattr(label_crops, "argmax_resized", lambda logits, shape: logits)
    image, model = torch.randint(256, (3, 40, 72), dtype=torch.uint8), small_model()
    found, tenfold = label_crops.segment_image(predict, image, model,
                                                Sizes(32, 24, None, (10000, 40)))
    sums, counts = torch.zeros(40, 72), torch.zeros(40, 72)
    for n, (top, left) in enumerate(itertools.product((0, 8), (0, 24, 40))):
        sums[top:top + 32, left:left + 32] += n
        counts[top:top + 32, left:left + 32] += 1
    assert next(counter) == 6 and (sums / counts)[0, 23:25].tolist() == [0, 0.5]
    torch.testing.assert_close(found, patches.normalize_images(model, image) + sums / counts)
    torch.testing.assert_close(tenfold, 10 * found)


def test_flips_change_sides_only_if_asked(monkeypatch):
    def swapped_names(name):
        names = annotations.segmentation_classes(name, "part")
        table = training.flip_table(names)
        assert table[table.long()].equal(torch.arange(256, dtype=torch.uint8))
        return names, table, {names[i]: names[table[i]] for i in range(len(names)) if table[i] != i}

    _, _, pairs = swapped_names("pascal")
    assert len(pairs) == 108 and pairs["cat: rear"] == "cat: lear"
    assert pairs["horse: lfuleg"] == "horse: rfuleg" and "bus: roofside" not in pairs
    names, table, pairs = swapped_names("lip")
    assert len(pairs) == 6 and pairs["Left-arm"] == "Right-arm"
    x = torch.arange(8, dtype=torch.uint8)
    labels = 4 + x + x[:, None]                              # up to 18, the last of LIP's
    item = SimpleNamespace(image=labels.expand(3, 8, 8), labels=labels)
    sizes, kinds = Sizes(8, 8, (8, 8), (8, 8)), set()
    monkeypatch.setattr(label_crops, "distort_colors", lambda x, g: 255 - x)
    for seed in range(8):
        (image, plain), (_, swapped) = (
            label_crops.random_crop(item, sizes, rng.generator(seed), of_flip)
            for of_flip in (None, table))
        assert (255 - image - plain).abs().max() < 1.01      # nearest: half a pixel off, twice
        assert swapped.equal(plain) or swapped.equal(table[plain.long()])
        kinds.add(bool(swapped.equal(plain)))
    assert kinds == {True, False}                            # some are flipped, others are not


def test_crops_avoid_a_single_label_and_colors_stay_in_range():
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, :16] = 1
    item = SimpleNamespace(image=torch.randint(256, (3, 64, 64), dtype=torch.uint8), labels=labels)
    mixed = 0
    for seed in range(30):
        image, y = label_crops.random_crop(item, Sizes(16, 16, (64, 64), None),
                                            rng.generator(seed))
        assert image.shape == (3, 16, 16) and y.shape == (16, 16)
        assert 0 <= image.min() and image.max() <= 255
        mixed += y.float().mean().item() > 0.25 and y.float().mean().item() < 0.75
    assert mixed >= 15                                       # with one try: about 5


def test_training_images_are_scaled_by_a_half_to_two(monkeypatch):
    monkeypatch.setattr(label_crops, "distort_colors", lambda x, g: x)
    labels = torch.arange(400).view(20, 20) % 2              # two of them: no second try
    item = SimpleNamespace(image=torch.zeros(3, 20, 20).byte(), labels=labels.byte())
    sides = [len(label_crops.random_crop(item, Sizes(99, 99, (20, 20), None),
                                          rng.generator(seed))[1])
             for seed in range(100)]                         # smaller than a crop: not cropped
    assert 10 <= min(sides) < 13 and 37 < max(sides) <= 40 and 23 < sum(sides) / 100 < 27


@pytest.mark.parametrize("contrast_first", [True, False])
def test_colors_are_distorted_as_by_colorsys(monkeypatch, contrast_first):
    x = torch.randint(256, (3, 6, 8)).float()
    x[:, 0] = torch.linspace(0, 255, 8)                      # grays
    yes, no = 0.0, 1.0
    numbers = iter([yes, 25.0, yes, 1.3, yes if contrast_first else no, yes, 1.4, yes])
    monkeypatch.setattr(label_crops, "draw_uniform", lambda *_: next(numbers))
    found = label_crops.distort_colors(x, rng.generator(3))
    turn = int(torch.randint(-18, 18, (), generator=rng.generator(3))) / 180
    assert turn and not list(numbers)

    def clip(pixel):
        return [min(max(v, 0), 1) for v in pixel]

    for pixel, result in zip(x.flatten(1).T.tolist(), found.flatten(1).T, strict=True):
        pixel = clip(v / 255 + 25 / 255 for v in pixel)
        if contrast_first:
            pixel = clip(1.3 * v for v in pixel)
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixel = colorsys.hsv_to_rgb((h + turn) % 1, min(1.4 * s, 1), v)
        if not contrast_first:
            pixel = clip(1.3 * v for v in pixel)
        torch.testing.assert_close(result, 255 * torch.tensor(pixel).float(), rtol=0, atol=0.01)


def test_the_loss_is_divided_by_the_number_of_all_pixels():
    logits = torch.zeros(1, 4, 2, 2)
    labels = torch.tensor([[[1, 255], [255, 255]]])
    assert label_crops.segmentation_loss(logits, labels).item() == pytest.approx(
        torch.tensor(4.0).log().item() / 4)


# ---- linear segmentation -------------------------------------------------------------------------


def plant_classes(monkeypatch, shuffle=False):
    """Items with random blocks of classes; the "encoder" reads class and noise from the image.
    Returns a model."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 16, generator=g)

    def read_items(name, root, split, limit, level, size):
        for number in range(24 if split == "train" else 8):
            blocks = torch.randint(3, (8, 8), generator=rng.generator(split, number))
            labels = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
            image = F.one_hot(labels, 3).permute(2, 0, 1).to(torch.uint8) * 255
            yield SimpleNamespace(id=number, image=image, labels=labels.to(torch.uint8))

    def extract_patches(model, x, blocks):
        z = F.avg_pool2d(x, 8).permute(0, 2, 3, 1) @ mix
        z = z + 0.1 * torch.randn(z.shape, generator=g)
        if shuffle:
            flat = z.flatten(1, 2)
            z = flat[:, torch.randperm(flat.shape[1], generator=g)].view_as(z)
        return z

    monkeypatch.setattr(annotations, "segmentation", read_items)
    monkeypatch.setattr(annotations, "segmentation_classes", lambda *_: ["a", "b", "c"])
    monkeypatch.setattr(frozen, "extract_patches", extract_patches)
    monkeypatch.setattr(label_crops, "distort_colors", lambda x, g: x)
    monkeypatch.setattr(label_crops, "SEGMENTATION_SIZES",
                        {"voc": Sizes(64, 64, (64, 64), (64, 64))})
    model = small_model()
    model.encoder.embed_dim = 16
    return model


def test_sizes_are_scaled_with_the_crop():
    def sizes(*flags):
        return label_crops.segmentation_sizes(linear_options("--data", *flags), 0)

    assert sizes("cityscapes") == sizes("cityscapes", "--img-size", "512") == (
        512, 341, (2048, 1024), (2048, 1024))
    assert sizes("cityscapes", "--img-size", "256") == (256, 170, (1024, 512), (1024, 512))
    assert sizes("lip", "--img-size", "80") == (80, 40, (256, 80), (1024, 80))
    assert sizes("some/folder") == label_crops.OWN_SIZES


@pytest.mark.parametrize("flags, n_crops, lrs", [
    ("--iters 2 --train-batch-size 3", 6, [2e-3, 1e-2, 5e-2]), ("--iters 1", 16, None),
    ("--iters 1 --lr 0.5", 16, [0.5])])
def test_small_runs_have_their_batch_and_learning_rates(monkeypatch, flags, n_crops, lrs):
    crops, seen, model = [], [], plant_classes(monkeypatch)
    read_last_block(monkeypatch, "parts")
    crop, make_optimizer = label_crops.random_crop, frozen.linear_adamw
    monkeypatch.setattr(label_crops, "random_crop", lambda *args: crops.append(1) or crop(*args))
    monkeypatch.setattr(frozen, "linear_adamw", lambda layers, lrs, decay: (
        seen.extend(lrs), make_optimizer(layers, lrs, decay))[1])
    if lrs is None:                                        # a tenth of the recipe's: its own
        recipes = frozen.LINEAR_SEGMENTATION_RECIPES
        monkeypatch.setitem(recipes, "parts", {**recipes["parts"], "iters": 10})
    report = frozen.linear_segmentation(model, linear_options("--data", "voc", "--workers",
                                                                    "0", *flags.split()))
    assert len(crops) == n_crops and seen == (lrs or [4e-4])
    assert f"iterations with {3 if n_crops == 6 else 16} crops each" in report.protocol


def read_last_block(monkeypatch, recipe):
    recipes = frozen.LINEAR_SEGMENTATION_RECIPES
    monkeypatch.setitem(recipes, recipe, {**recipes[recipe], "blocks": (12,)})


@pytest.mark.parametrize("recipe", ["parts", pytest.param("mmc", marks=pytest.mark.slow)])
def test_planted_classes_are_found_and_none_in_shuffled_patches(monkeypatch, recipe):
    read_last_block(monkeypatch, recipe)
    scores = []
    for shuffle in (False, True):
        model = plant_classes(monkeypatch, shuffle)
        opt = linear_options("--data", "voc", "--recipe", recipe, "--iters", "40", "--lr", "1e-5",
                             "1e-1")
        report = frozen.linear_segmentation(model, opt)
        [row] = report.rows.values()
        scores.append(row["mIoU"])
        assert shuffle or "lr 0.1;" in report.notes[0]       # held-out images choose the larger
        assert re.search(r"mIoU on \d+ held-out images: ", report.notes[0])
    assert scores[0] > 80 and scores[1] < 35


def test_learning_rates_are_chosen_on_images_that_are_not_trained_on(monkeypatch):
    trained, scored, model = set(), [], plant_classes(monkeypatch)
    crop, segment = label_crops.random_crop, label_crops.segment_image
    read_last_block(monkeypatch, "parts")
    monkeypatch.setattr(label_crops, "random_crop", lambda item, *rest: (
        trained.add(item.id), crop(item, *rest))[1])
    monkeypatch.setattr(label_crops, "segment_image", lambda predict, image, *rest: (
        scored.append(image), segment(predict, image, *rest))[1])
    train, test = ([item.image for item in annotations.segmentation("voc", None, split, None, None,
                                                                    64)]
                   for split in ("train", "test"))
    for lrs, held in (["1e-3"], []), (["1e-3", "1e-2"], [0, 10, 20]):
        trained.clear()
        scored.clear()
        frozen.linear_segmentation(model, linear_options("--data", "voc", "--iters", "2",
                                                               "--lr", *lrs))
        assert trained == set(range(24)) - set(held)         # 32 crops: more than an epoch
        assert torch.stack(scored).equal(torch.stack([*(train[n] for n in held), *test]))


@pytest.mark.parametrize("recipe, depth, expected", [
    ("parts", 12, [3, 5, 7, 11]), ("mmc", 12, [5, 7, 9, 11]), ("parts", 24, [7, 11, 15, 23]),
    ("mmc", 3, [1, 2])])
def test_a_recipe_sets_the_blocks_and_the_batch_norm(monkeypatch, recipe, depth, expected):
    trained, model = [], plant_classes(monkeypatch)
    extract, train = frozen.extract_patches, frozen.train_linear_heads

    def extract_blocks(model, x, blocks):
        assert blocks == expected
        return extract(model, x, blocks).repeat(1, 1, 1, len(blocks))

    model.encoder.depth = depth
    monkeypatch.setattr(frozen, "extract_patches", extract_blocks)
    monkeypatch.setattr(frozen, "train_linear_heads", lambda heads, *rest: (
        trained.append(heads), train(heads, *rest)))
    frozen.linear_segmentation(model, linear_options("--data", "voc", "--recipe", recipe,
                                                           "--iters", "1"))
    [heads], z = trained, 5 * torch.randn(2, 3, 3, 16 * len(expected))
    assert heads.normalize(z).equal(z) == (recipe == "parts")
    torch.testing.assert_close(heads.normalize(z)[:1], heads.normalize(z[:1]))   # running averages


@pytest.mark.parametrize("batch_size", [3, 256])
def test_no_forward_pass_is_larger_than_batch_size(monkeypatch, batch_size):
    sizes, model = [], plant_classes(monkeypatch)
    extract = frozen.extract_patches
    read_last_block(monkeypatch, "parts")
    monkeypatch.setattr(frozen, "extract_patches", lambda model, x, blocks: (
        sizes.append(len(x)), extract(model, x, blocks))[1])
    frozen.linear_segmentation(model, linear_options(
        "--data", "voc", "--iters", "1", "--lr", "1e-3", "--batch-size", str(batch_size)))
    assert max(sizes) == min(batch_size, label_crops.CROPS_PER_BATCH)
    assert sum(sizes) == label_crops.CROPS_PER_BATCH + 8


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(monkeypatch):
    def results(*argv):
        report = frozen.linear_segmentation(plant_classes(monkeypatch), linear_options(
            "--data", "voc", "--iters", "3", "--lr", "1e-3", "1e-2", *argv))
        return report.rows, report.notes

    read_last_block(monkeypatch, "parts")
    alone = results("--workers", "0")
    assert results("--workers", "2") == alone != results("--workers", "0", "--seed", "1")


# ---- zero-shot segmentation ----------------------------------------------------------------------


def test_the_ious_are_those_of_all_pixels():
    similarity = torch.rand(4, 5) * 2 - 1
    mask, valid = torch.rand(32, 40) > 0.6, torch.rand(32, 40) > 0.1
    found = frozen.threshold_ious(similarity, frozen.count_pixels(mask & valid, 8),
                                        frozen.count_pixels(valid, 8))
    for iou, threshold in zip(found, frozen.THRESHOLDS):
        predicted = (similarity > threshold).repeat_interleave(8, 0).repeat_interleave(8, 1) & valid
        union = (predicted | (mask & valid)).sum().item()
        assert iou.item() == pytest.approx((predicted & mask).sum().item() / union)


def test_the_prompt_is_the_deepest_patch():
    mask = torch.rand(32, 40) > 0.05
    mask[3:20, 9:30] = True
    found = patches.depth_at_centers(mask, 8)
    outside = (~F.pad(mask, (1, 1, 1, 1))).nonzero().float() - 1
    for y in range(4):
        for x in range(5):
            center = torch.tensor([8 * y + 3.5, 8 * x + 3.5])
            assert found[y, x] == (outside - center).square().sum(1).min()

    def prompt(mask, g=None):
        return frozen.choose_prompt(mask, frozen.count_pixels(mask, 8), 8, g)

    assert prompt(torch.ones(40, 40, dtype=torch.bool)) == (2, 2)
    thin = torch.zeros(40, 40, dtype=torch.bool)
    thin[:, 20:22] = True
    assert prompt(thin) is None and prompt(thin, rng.generator(0)) is None


def test_similar_patches_are_segmented(monkeypatch):
    """Patches of one category have the same direction and different lengths: IoU is what the grid
    allows. With random tokens it is near the baseline."""
    def scores(similar):
        def extract_patches(model, x):
            white = F.avg_pool2d(x.amax(1, keepdim=True), 8).permute(0, 2, 3, 1)
            length = torch.tensor([0.3, 3.0] * 4)[:, None, None]
            return (torch.cat([white, 1 - white], 3) * length if similar
                    else torch.randn(*white.shape[:3], 8))

        def masks(name, root, split, limit, size):
            for top in (0, 8, 16):
                mask = torch.zeros(64, 64, dtype=torch.bool)
                mask[top:top + 24, 8:40] = True
                yield SimpleNamespace(
                    image=mask.expand(3, 64, 64).to(torch.uint8) * 255, labels=torch.tensor([3]),
                    masks=mask[None], crowd=torch.tensor([False]))

        monkeypatch.setattr(frozen, "extract_patches", extract_patches)
        monkeypatch.setattr(frozen, "normalize_images", lambda model, images: images / 255)
        monkeypatch.setattr(annotations, "masks", masks)
        report = frozen.zero_shot_segmentation(small_model(),
                                                     zero_shot_options("--img-size", "64"))
        return report.rows["mean over targets"]

    found = scores(True)
    assert found["Opt"] == found["T=0.4"] == pytest.approx(100)
    assert found["whole image"] == pytest.approx(18.75) and scores(False)["Opt"] < 40
    assert found["query patch"] == pytest.approx(100 * 8 * 8 / (24 * 32))


@pytest.mark.parametrize("flags", [[], ["--center"]])
def test_high_cosines_are_told_apart_by_fine_thresholds_or_after_centering(monkeypatch, flags):
    def masks(name, *_):
        mask = torch.zeros(64, 64, dtype=torch.bool)
        mask[:32, :32] = True
        yield SimpleNamespace(image=mask.expand(3, 64, 64).to(torch.uint8) * 255,
                              masks=mask[None], labels=torch.zeros(1, dtype=torch.int64),
                              crowd=torch.zeros(1, dtype=torch.bool))

    def extract_patches(model, x):                         # one direction, a little of another
        bright = F.avg_pool2d(x[:, :1], model.encoder.patch_size).permute(0, 2, 3, 1)
        return torch.cat([torch.full_like(bright, 10), bright.sign()], 3)

    monkeypatch.setattr(annotations, "masks", masks)
    monkeypatch.setattr(frozen, "extract_patches", extract_patches)
    report = frozen.zero_shot_segmentation(
        small_model(), zero_shot_options("--img-size", "64", *flags))
    row, notes = report.rows["mean over targets"], " ".join(report.notes)
    assert row["whole image"] == pytest.approx(25) and row["Opt fine"] == pytest.approx(100)
    assert row["Opt"] == pytest.approx(100 if flags else 25)
    words = "is not a point above the whole image (25.0) and the query patch (6.2)"
    assert (words in notes) == (not flags)


def test_predicting_only_the_query_patch_is_no_segmentation(monkeypatch):
    """Tokens that are all orthogonal. The target covers three quarters of its patch, and no other:
    were the rest of the patch not counted, its IoU would be 100."""
    def masks(*_):
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[0, 8:16, 16:22] = True
        yield SimpleNamespace(image=torch.zeros(3, 64, 64).byte(), masks=mask,
                              labels=torch.tensor([3]), crowd=torch.tensor([False]))

    monkeypatch.setattr(annotations, "masks", masks)
    monkeypatch.setattr(frozen, "extract_patches", lambda *_: torch.eye(64).view(1, 8, 8, 64))
    report = frozen.zero_shot_segmentation(small_model(), zero_shot_options("--img-size", "64"))
    row = report.rows["mean over targets"]
    assert row["Opt"] == row["query patch"] == pytest.approx(75) and row["whole image"] < 2
    assert any("Opt (75.0) is not a point above" in note for note in report.notes)


def test_the_best_threshold_is_one_for_all_and_categories_weigh_the_same(monkeypatch):
    """Two targets of category 3, each with its own best threshold, and one of category 5."""
    iou = torch.zeros(3, 10, dtype=torch.float64)            # at T = 0, 0.1 ... 0.9
    iou[0, 1], iou[1, 2], iou[2, 1:3] = 0.6, 0.6, torch.tensor([0.9, 0.3])
    ious, whole = iter(iou), torch.ones(1, 64, 64, dtype=torch.bool)
    monkeypatch.setattr(annotations, "masks", lambda *_: (
        SimpleNamespace(image=torch.zeros(3, 64, 64).byte(), labels=torch.tensor([label]),
                        masks=whole, crowd=torch.tensor([False])) for label in (3, 3, 5)))
    monkeypatch.setattr(frozen, "threshold_ious", lambda *args: (
        next(ious) if args[3] is frozen.THRESHOLDS else torch.full((54,), 0.7)))
    report = frozen.zero_shot_segmentation(small_model(),
                                                 zero_shot_options("--img-size", "64"))
    over_targets, over_categories = report.rows.values()
    assert over_targets == pytest.approx({"Opt": 50, "Opt fine": 70, "T=0.1": 50, "T=0.2": 30,
                                          "T=0.3": 0, "T=0.4": 0, "whole image": 100,
                                          "query patch": 100 / 64})
    assert over_categories == pytest.approx({"Opt": 60, "Opt fine": 70, "T=0.1": 60, "T=0.2": 30,
                                             "T=0.3": 0, "T=0.4": 0})
    assert "Opt is T = 0.1" in report.notes[0]
    assert report.images == {"targets": 3, "categories": 2}


@pytest.mark.parametrize("target, prompt, phrase, which", [
    ("category", "deepest", "a category,", "their deepest"),
    ("instance", "random", "an instance,", "every")])
def test_small_targets_are_reported_if_there_are_any(monkeypatch, target, prompt, phrase, which):
    def report(*sides):
        masks = torch.zeros(len(sides), 64, 64, dtype=torch.bool)
        for mask, side in zip(masks, sides):
            mask[:side, :side] = True
        monkeypatch.setattr(annotations, "masks", lambda *_: [SimpleNamespace(
            image=torch.zeros(3, 64, 64).byte(), labels=torch.arange(len(sides)), masks=masks,
            crowd=torch.zeros(len(sides), dtype=torch.bool))])
        return frozen.zero_shot_segmentation(small_model(), zero_shot_options(
            "--img-size", "64", "--target", target, "--prompt", prompt))

    assert f"{prompt} patch of {phrase}" in report(32).protocol
    assert not any("left out" in note for note in report(32).notes)
    assert f"small: 2 targets cover less than half of {which} patch and are left out" in report(
        32, 2, 3).notes


def test_targets_are_categories_or_instances_but_not_crowds(monkeypatch):
    masks = torch.zeros(4, 16, 16, dtype=torch.bool)
    for k, mask in enumerate(masks):
        mask[4 * k:4 * k + 4] = True
    item = SimpleNamespace(image=torch.zeros(3, 16, 16).byte(), labels=torch.tensor([3, 5, 3, 3]),
                           masks=masks, crowd=torch.tensor([False, False, False, True]))
    monkeypatch.setattr(annotations, "masks", lambda *_: [item])

    def pairs(target):
        [(_, pairs, valid)] = frozen.segmentation_targets(
            zero_shot_options("--target", target), 16)
        assert valid.equal(~masks[3])                    # a crowd is not scored
        return pairs

    (a, both), (b, one) = pairs("category")
    assert (a, b) == (3, 5) and both.equal(masks[0] | masks[2]) and one.equal(masks[1])
    for (label, mask), k in zip(pairs("instance"), (0, 1, 2), strict=True):
        assert label == item.labels[k] and mask.equal(masks[k])


@pytest.mark.parametrize("flags, message", [
    ("--limit 1", "no train images besides one held out to choose the learning rate: give one"),
    ("--limit 4 --swap-sides", "--swap-sides: no classes of toy are left and right")])
def test_what_cannot_be_trained_is_refused_before_training(flags, message):
    with pytest.raises(ValueError, match=message):
        frozen.linear_segmentation(small_model(), make_options(
            "linear_segmentation", "--data", "toy", "--iters", "2", *flags.split()))


def test_only_the_images_that_choose_the_learning_rate_are_held_out(monkeypatch):
    monkeypatch.setattr(label_crops, "MAX_HELD_OUT", 2)
    monkeypatch.setattr(label_crops, "segmentation_items", lambda *_: range(40))
    kept = [list(label_crops.training_items(None, None, hold_out)) for hold_out in (True, False)]
    assert sorted({*range(40)} - {*kept[0]}) == [0, 10] and kept[1] == list(range(40))


def test_without_a_labeled_pixel_there_is_no_score():
    with pytest.raises(ValueError, match="no labeled pixels in the test images"):
        label_crops.percentages(torch.zeros(2, 2, dtype=torch.long))


def test_targets_of_a_level_come_from_its_class_maps():
    def targets(*argv):
        opt = zero_shot_options("--limit", "1", *argv)
        return next(frozen.segmentation_targets(opt, 32))

    _, pairs, valid = targets("--level", "part")
    [item] = annotations.segmentation("toy", limit=1, level="part", size=32)
    assert len(pairs) > 2 and valid.equal(item.labels != 255) and not valid.all()
    for part, mask in pairs:
        assert mask.equal(item.labels == part)
    [(thing, whole)] = targets()[1]
    [(same, mask)] = targets("--level", "object")[1]
    assert same == thing and mask.equal(whole)
    with pytest.raises(ValueError, match="no level 'scene' of toy: choose object or part"):
        targets("--level", "scene")
    with pytest.raises(ValueError, match="toy has no --target instance at --level part"):
        targets("--level", "part", "--target", "instance")
    with pytest.raises(ValueError, match="coco has no --target stuff at --level object; choose"):
        targets("--data", "coco", "--level", "object", "--target", "stuff")


def test_void_is_not_counted_and_background_is_no_target(monkeypatch):
    """Void pixels look like the object: predicting them changes nothing."""
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[8:32, 8:40], labels[40:56, 8:40] = 1, 255
    item = SimpleNamespace(image=(labels > 0).expand(3, 64, 64).byte() * 255, labels=labels)

    def extract_patches(model, x):
        white = F.avg_pool2d(x.amax(1, keepdim=True), 8).permute(0, 2, 3, 1)
        return torch.cat([white, 1 - white], 3)

    monkeypatch.setattr(frozen, "extract_patches", extract_patches)
    monkeypatch.setattr(frozen, "normalize_images", lambda model, images: images / 255)
    monkeypatch.setattr(annotations, "segmentation", lambda *_: [item])
    monkeypatch.setattr(annotations, "segmentation_classes", lambda *_: ["background", "cat"])
    report = frozen.zero_shot_segmentation(
        small_model(), zero_shot_options("--img-size", "64", "--data", "voc"))
    row = report.rows["mean over targets"]
    assert report.images == {"targets": 1, "categories": 1} and row["Opt"] == pytest.approx(100)
    assert row["whole image"] == pytest.approx(100 * 24 * 32 / (64 * 64 - 16 * 32))


def test_the_figure_marks_the_prompt_in_red():
    image, mask = torch.full((3, 24, 32), 99, dtype=torch.uint8), torch.ones(24, 32)
    marked, *_ = frozen.draw_similarity(image, mask, torch.rand(3, 4), (1, 2), 0.5, p=8)
    square = torch.zeros(24, 32, dtype=torch.bool)
    square[8:16, 16:24] = True
    assert torch.equal((marked != 99).all(0), square) and (image == 99).all()
    assert marked[:, square].unique(dim=1).T.tolist() == [[255, 40, 40]]


# ---- command line --------------------------------------------------------------------------------


def evaluate_small(tmp_path, *flags):
    """The line that evaluate.py appends to results.jsonl for a small checkpoint."""
    path = tmp_path / "encoder.pt"
    if not path.exists():
        checkpoints.save_encoder(path, small_model().encoder, branch="base", method="mae",
                                 data="toy", step=1, mean=augment.MEAN, std=augment.STD)
    evaluate.main(["--checkpoint", str(path), "--out", str(tmp_path), "--device", "cpu",
                   "--precision", "fp32", *flags])
    return json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("task, column, images, figures", [
    ("linear_segmentation --level part --iters 3", "mIoU", "test", "linear_seg*toy*part*"),
    ("linear_segmentation --level object --recipe mmc --iters 2 --lr 1e-3", "aAcc", "test",
     "linear_seg*"),
    ("zero_shot_segmentation --prompt random", "T=0.1", "targets", "similarity-toy*")])
def test_each_task_runs_on_toy(tmp_path, task, column, images, figures):
    line = evaluate_small(tmp_path, "--task", *task.split(), "--data", "toy-scenes", "--limit",
                          "12", "--show")
    assert all(0 <= row[column] <= 100 for row in line["metrics"].values())
    assert line["images"][images] >= 1 and line["protocol"]
    assert list(tmp_path.glob(f"{figures}.png"))


def test_user_errors_are_one_sentence():
    linear, zero_shot = frozen.linear_segmentation, frozen.zero_shot_segmentation
    for probe, opt in (linear, linear_options()), (zero_shot, zero_shot_options()):
        with pytest.raises(ValueError, match="pixels have none"):
            probe(make_model(None, name="pixels"), opt)
    for argv, message in (
            ("--recipe dino", "no recipe dino; choose --recipe parts, mmc"),
            ("--data cub", "no segmentation of 'cub'"),
            ("--data nothing", "no segmentation of 'nothing' here")):
        with pytest.raises(ValueError, match=message):
            linear(small_model(), linear_options(*argv.split()))
    with pytest.raises(ValueError, match="no --target stuff"):
        zero_shot(small_model(), zero_shot_options("--target", "stuff"))


def test_a_missing_test_split_is_reported_before_training(monkeypatch):
    def read_items(name, root, split, *_):
        if split == "test":
            raise ValueError("no test split")
        yield SimpleNamespace(image=torch.zeros(3, 64, 48, dtype=torch.uint8),
                              labels=torch.arange(64 * 48).view(64, 48).to(torch.uint8) % 3)

    steps = record_adamw(monkeypatch)
    monkeypatch.setattr(annotations, "segmentation", read_items)
    monkeypatch.setitem(label_crops.SEGMENTATION_SIZES, "voc", Sizes(32, 24, (32, 32), (32, 32)))
    with pytest.raises(ValueError, match="no test split"):
        frozen.linear_segmentation(small_model(), linear_options("--data", "voc", "--iters",
                                                                       "1"))
    assert not steps


# ---- pieces of the real data sets ----------------------------------------------------------------


def test_the_real_voc(tmp_path, monkeypatch):
    root = unpack_real("voc_animals", tmp_path / "voc")
    monkeypatch.setitem(label_crops.SEGMENTATION_SIZES, "voc", Sizes(64, 43, (256, 64), (256, 64)))
    flags = "--data", "voc", "--data-root", str(root), "--limit", "3"
    line = evaluate_small(tmp_path, "--task", "linear_segmentation", "--recipe", "mmc", "--iters",
                          "2", *flags)
    assert 0 <= line["metrics"]["blocks 2 3"]["mIoU"] <= 100
    line = evaluate_small(tmp_path, "--task", "zero_shot_segmentation", "--img-size", "64", *flags)
    assert line["images"]["targets"] >= 3


def test_the_real_coco(tmp_path):
    pytest.importorskip("pycocotools")
    root = unpack_real("coco_subset", tmp_path / "coco")
    (root / "coco/val2017").symlink_to("train2017")
    (root / "coco/annotations/instances_val2017.json").symlink_to("instances_train2017.json")
    for target in ("category", "instance"):
        line = evaluate_small(tmp_path, "--task", "zero_shot_segmentation", "--img-size", "64",
                              "--target", target, "--data", "coco", "--data-root", str(root),
                              "--limit", "3")
        assert line["images"]["targets"] >= 1
