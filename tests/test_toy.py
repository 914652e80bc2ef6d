"""The built-in data set: deterministic, train and test disjoint, classes differ in shape and in the
pattern of the coat, not in color; annotations agree with the pixels."""
import time

import pytest
import torch

from lib import toy

INDEX = torch.arange(40)


@pytest.fixture(scope="module")
def single():
    return toy.draw(INDEX, "train", annotate=True)


@pytest.fixture(scope="module")
def scenes():
    return toy.draw(INDEX, "train", scenes=True, annotate=True)


@pytest.fixture(scope="module")
def videos():
    return toy.video(torch.arange(3), frames=16)


@pytest.fixture(scope="module")
def splits():
    sizes = {"train": 2000, "test": 500}
    return {split: toy.draw(torch.arange(n), split, annotate=True) for split, n in sizes.items()}


def accuracy(distance, bank, queries, k=1):
    """Majority vote of the k nearest neighbors; distance (queries, bank), others: labels."""
    nearest = bank[distance.topk(k, largest=False).indices]
    return (nearest.mode(1).values == queries).float().mean().item()


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scenes_", [False, True])
def test_an_image_does_not_depend_on_its_batch(single, scenes, scenes_):
    whole = scenes if scenes_ else single
    for rows in ([5], [39, 5, 17], list(range(3, 30))):
        part = toy.draw(torch.tensor(rows), "train", scenes=scenes_, annotate=True)
        for name, x in whole.items():
            assert torch.equal(part[name], x[rows]), (name, rows)


def test_an_image_does_not_depend_on_the_number_of_threads(single):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(toy.draw(INDEX, "train")["image"], single["image"])
    finally:
        torch.set_num_threads(threads)


def test_annotation_does_not_change_the_image(single, scenes):
    assert torch.equal(toy.draw(INDEX, "train")["image"], single["image"])
    out = toy.draw(INDEX, "train", scenes=True)
    assert torch.equal(out["image"], scenes["image"]) and torch.equal(out["label"], scenes["label"])


def test_seed_split_and_kind_each_change_every_image(single, scenes):
    for other in (toy.draw(INDEX, "test"), toy.draw(INDEX, "train", seed=1), scenes):
        assert (other["image"] != single["image"]).flatten(1).any(1).all()


def test_train_and_test_share_no_image(splits):
    def rows(split):
        return {row.numpy().tobytes() for row in splits[split]["image"]}
    assert len(rows("train")) == 2000 and len(rows("test")) == 500
    assert not rows("train") & rows("test")


def test_another_size_gives_the_same_image(single):
    large = toy.draw(INDEX, "train", size=128, annotate=True)
    assert torch.equal(large["label"], single["label"])
    small = torch.nn.functional.avg_pool2d(large["image"].float(), 2)
    error = (small - single["image"].float()).abs().mean((1, 2, 3))
    assert error.max() < 8                                                          # gray levels
    assert (small - single["image"].roll(1, 0).float()).abs().mean() > 25         # negative control
    a = torch.nn.functional.avg_pool2d((large["instances"] > 0).float()[:, None], 2)[:, 0]
    b = (single["instances"] > 0).float()
    iou = torch.minimum(a, b).sum((1, 2)) / torch.maximum(a, b).sum((1, 2))
    assert iou.median() > 0.8 and iou.min() > 0.6, iou                      # legs are 2 pixels wide
    assert torch.allclose(large["keypoints"][..., :2], 2 * single["keypoints"][..., :2], atol=1e-3)


# ---- classes -------------------------------------------------------------------------------------


def test_classes_differ_in_parts_and_only_in_parts():
    rows = {tuple(sorted(c.items())) for c in toy.CLASS_PARTS.values()}
    assert len(rows) == len(toy.CLASSES) >= 12 and len(toy.PARTS) >= 6
    assert set().union(*toy.CLASS_PARTS.values()) <= set(toy.SHAPES)


def test_mean_color_of_a_creature_does_not_predict_its_class_but_its_outline_does(splits):
    train, test, C = splits["train"], splits["test"], len(toy.CLASSES)

    def nearest_centroid_accuracy(features):
        x, y = features(train), features(test)
        mean = torch.stack([x[train["label"] == c].mean(0) for c in range(C)])
        return accuracy(torch.cdist(y, mean), torch.arange(C), test["label"])

    def mean_color(out):
        mask = (out["instances"] > 0).float()[:, None]
        return (out["image"] * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1) / 255

    def outline(out):
        mask = (out["instances"] > 0).float()[:, None]
        return torch.nn.functional.avg_pool2d(mask, 4).flatten(1)

    chance = 1 / C
    limit = chance + 4 * (chance * (1 - chance) / 500) ** 0.5 + 0.02
    assert nearest_centroid_accuracy(mean_color) < limit
    assert nearest_centroid_accuracy(outline) > 3 * chance                        # negative control


def test_raw_pixels_predict_the_class_poorly(splits):
    x, y = (splits[split]["image"].flatten(1).float() / 255 for split in ("train", "test"))
    label, truth = splits["train"]["label"], splits["test"]["label"]
    assert accuracy(torch.cdist(y, x), label, truth, 10) < 0.25
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    assert accuracy(-(y @ x.T), label, truth, 10) < 0.25


def test_most_creatures_wear_the_pattern_typical_of_their_class(splits):
    typical = (splits["train"]["label"] == splits["train"]["pattern"]).float().mean()
    assert abs(typical - (toy.TYPICAL + (1 - toy.TYPICAL) / 16)) < 0.02
    assert len({tile.numpy().tobytes() for tile in toy.tiles()}) == len(toy.CLASSES)


@pytest.mark.parametrize("scenes_", [False, True])
def test_cue_conflict_changes_the_pattern_and_nothing_else(scenes_):
    plain, conflict = (toy.draw(INDEX, "test", scenes=scenes_, annotate=True, cue_conflict=c)
                       for c in (False, True))
    for name in ("label", "instances", "parts", "keypoints", "classes"):
        assert torch.equal(plain[name], conflict[name]), name
    assert (conflict["pattern"] != conflict["label"]).all()
    assert len(conflict["pattern"].unique()) > 10
    same = plain["pattern"] == conflict["pattern"]
    changed = (plain["image"] != conflict["image"]).flatten(1).any(1)
    background = torch.nn.functional.max_pool2d((plain["instances"] > 0).float(), 3, 1, 1) == 0
    difference = (plain["image"].int() - conflict["image"].int()).abs().amax(1)
    assert changed[~same].all() and (difference[background] > 0).float().mean() < 0.01   # whiskers


@pytest.mark.parametrize("kind", ["single", "video"])
def test_the_pattern_follows_the_creature_through_a_video(kind):
    """The torso keeps its coordinates in the pattern, while camera and creature move."""
    (before, *_, start), (after, *_, end) = (
        toy.sample_scene(INDEX, "test", 0, kind, torch.full((40,), t).double()) for t in (0, 1))
    exists = start[:, :, 0, 2] == 1                                             # (B, creatures)

    def coordinates(scene, points):
        xy1 = torch.cat([points[:, :, 0, :2], torch.ones_like(points[:, :, 0, :1])], -1)
        return (scene["coat_axes"] @ xy1[..., None])[..., 0][exists]            # (n, 2)

    moved = (coordinates(before, start) - coordinates(after, end)).norm(dim=-1)
    assert moved.max() < 0.2
    assert (coordinates(before, start) - coordinates(before, end)).norm(dim=-1).mean() > 0.2


def test_classes_are_about_equally_frequent(splits):
    count = splits["train"]["label"].bincount(minlength=len(toy.CLASSES)) * len(toy.CLASSES) / 2000
    assert count.min() > 0.7 and count.max() < 1.3


# ---- annotation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "scenes"])
def test_masks_boxes_and_classes_agree(name, request):
    out = request.getfixturevalue(name)
    instances, parts, semantic = out["instances"], out["parts"], out["semantic"]
    assert torch.equal(parts > 0, instances > 0) and torch.equal(semantic > 0, instances > 0)
    assert parts.max() == len(toy.PARTS)
    for b in range(len(INDEX)):
        for k, c in enumerate(out["classes"][b].tolist()):
            mask = instances[b] == k + 1
            assert (c >= 0) == mask.any().item()
            if c < 0:
                assert not out["boxes"][b, k].any() and not out["keypoints"][b, k, :, 2].any()
                continue
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert out["boxes"][b, k].tolist() == [float(v) for v in box]
            assert (semantic[b][mask] == c + 1).all()
            own = {p for p in toy.CLASS_PARTS[toy.CLASSES[c]] if p in toy.PARTS} | {"torso", "head"}
            assert {toy.PARTS[p - 1] for p in parts[b][mask].unique().tolist()} <= own
            has = {toy.PARTS[p] for p in out["keypoints"][b, k, :, 2].nonzero()[:, 0].tolist()}
            assert has == own, (toy.CLASSES[c], has)


@pytest.mark.parametrize("name", ["single", "scenes"])
def test_visible_keypoints_are_on_their_part_and_occluded_ones_are_not(name, request):
    out = request.getfixturevalue(name)
    seen = 0
    for b, k, p in (out["keypoints"][..., 2] > 0).nonzero().tolist():
        x, y, v = out["keypoints"][b, k, p].tolist()
        inside = 0 <= x < 64 and 0 <= y < 64
        on = (inside and out["instances"][b, int(y), int(x)] == k + 1
              and out["parts"][b, int(y), int(x)] == p + 1)
        assert on == (v == 2)
        seen += on
    assert 0.4 < seen / (out["keypoints"][..., 2] > 0).sum() < 0.97


def test_objects_in_front_occlude_pixels(monkeypatch):
    index, sample_scene = torch.arange(200), toy.sample_scene

    def without_occluders(*args):
        scene, *others = sample_scene(*args)
        scene["objects"][:, toy.CLUTTER:, 8] = -9.0                             # radius
        return scene, *others

    occluded = toy.draw(index, annotate=True)["instances"] > 0
    monkeypatch.setattr(toy, "sample_scene", without_occluders)
    complete = toy.draw(index, annotate=True)["instances"] > 0
    assert not (occluded & ~complete).any()
    lost = 1 - occluded.sum((1, 2)) / complete.sum((1, 2))
    assert 0.2 < (lost > 0.01).float().mean() < 0.9 and lost.max() < 0.8, lost


def test_scenes_contain_several_creatures_and_some_of_them_overlap(scenes):
    count = (scenes["classes"] >= 0).sum(1)
    assert (count >= 2).float().mean() > 0.9 and count.max() == 4
    box = scenes["boxes"]
    areas = [(scenes["instances"] == k + 1).sum((1, 2)) for k in range(4)]
    largest = torch.stack(areas, 1).argmax(1, keepdim=True)
    assert torch.equal(scenes["label"], scenes["classes"].gather(1, largest)[:, 0])
    low = torch.maximum(box[:, 0, :2], box[:, 1, :2])
    high = torch.minimum(box[:, 0, 2:], box[:, 1, 2:])
    assert 0.1 < (high > low).all(1).float().mean() < 0.95


# ---- video ---------------------------------------------------------------------------------------


def test_videos_keep_their_creatures_and_move_smoothly(videos):
    assert videos["image"].shape == (3, 16, 3, 64, 64)
    for b in range(3):
        creatures = set((videos["classes"][b] >= 0).nonzero()[:, 0].add(1).tolist())
        assert 2 <= len(creatures) <= 3
        for ids in (videos["instances"][b, 0], videos["instances"][b]):
            assert set(ids.unique().tolist()) - {0} == creatures
    ids = toy.video(torch.arange(8), frames=16)["instances"]
    change = (ids[:, 1:] != ids[:, :-1]).float().mean((2, 3))
    unrelated = (ids != ids.roll(1, 0)).float().mean()                          # of other videos
    assert 0 < change.min() and change.max() < 0.5 * unrelated
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))
    for k in (1, 2):
        mask = (videos["instances"] == k).float()
        area = mask.sum((2, 3))
        center = torch.einsum("bths,chs->btc", mask, grid) / area.clamp(min=1)[..., None]
        visible = area > 0.7 * area.amax(1, keepdim=True)                           # not occluded
        visible = visible[:, 1:] & visible[:, :-1]
        assert (center[:, 1:] - center[:, :-1]).norm(dim=-1)[visible].max() < 8     # pixels a frame


def test_the_first_frame_does_not_depend_on_the_number_of_frames(videos):
    assert torch.equal(toy.video(torch.arange(3), frames=2)["image"][:, 0], videos["image"][:, 0])


def test_a_video_of_one_creature_starts_with_its_image():
    out = toy.video(torch.arange(4), frames=2, split="test", scenes=False)
    assert torch.equal(out["image"][:, 0], toy.draw(torch.arange(4), "test")["image"])


# ---- the rest ------------------------------------------------------------------------------------


def test_drawing_is_fast_enough_during_training():
    toy.draw(INDEX)
    start = time.process_time()
    toy.draw(torch.arange(256))
    assert (time.process_time() - start) / 256 < 0.01                # 0.8 ms on an idle machine


def test_invalid_arguments_raise_value_error():
    with pytest.raises(ValueError, match="int64"):
        toy.draw(torch.arange(3.0))
    with pytest.raises(ValueError, match="train or test"):
        toy.draw(INDEX, "valid")


def test_contact_sheet_has_many_colors():
    sheet = toy.contact_sheet(size=32)
    assert sheet.width > 400 and len(sheet.getcolors(1 << 20)) > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_images(single):
    out = toy.draw(INDEX.cuda(), "train", annotate=True)
    assert (out["image"].cpu().int() - single["image"].int()).abs().float().mean() < 0.5
    assert (out["instances"].cpu() == single["instances"]).float().mean() > 0.999
