"""The built-in world: deterministic, disjoint, fair (shape is the class, colour not), annotated."""
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
def film():
    return toy.video(torch.arange(3), frames=16)


@pytest.fixture(scope="module")
def many():
    sizes = {"train": 2000, "test": 500}
    return {split: toy.draw(torch.arange(n), split, annotate=True) for split, n in sizes.items()}


def accuracy(distance, bank, queries, k=1):
    """Majority of the k nearest; distance (queries, bank)."""
    nearest = bank[distance.topk(k, largest=False).indices]
    return (nearest.mode(1).values == queries).float().mean().item()


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scenes_", [False, True])
def test_a_picture_does_not_depend_on_its_batch(single, scenes, scenes_):
    whole = scenes if scenes_ else single
    for some in ([5], [39, 5, 17], list(range(3, 30))):
        part = toy.draw(torch.tensor(some), "train", scenes=scenes_, annotate=True)
        for name, x in whole.items():
            assert torch.equal(part[name], x[some]), (name, some)


def test_a_picture_does_not_depend_on_the_number_of_threads(single):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(toy.draw(INDEX, "train")["image"], single["image"])
    finally:
        torch.set_num_threads(threads)


def test_annotation_does_not_change_the_picture(single, scenes):
    assert torch.equal(toy.draw(INDEX, "train")["image"], single["image"])
    out = toy.draw(INDEX, "train", scenes=True)
    assert torch.equal(out["image"], scenes["image"]) and torch.equal(out["label"], scenes["label"])


def test_seed_split_and_kind_each_change_every_picture(single, scenes):
    for other in (toy.draw(INDEX, "test"), toy.draw(INDEX, "train", seed=1), scenes):
        assert (other["image"] != single["image"]).flatten(1).any(1).all()


def test_train_and_test_share_no_picture(many):
    def rows(split):
        return {row.numpy().tobytes() for row in many[split]["image"]}
    assert len(rows("train")) == 2000 and len(rows("test")) == 500
    assert not rows("train") & rows("test")


def test_another_size_is_the_same_picture(single):
    large = toy.draw(INDEX, "train", size=128, annotate=True)
    assert torch.equal(large["label"], single["label"])
    small = torch.nn.functional.avg_pool2d(large["image"].float(), 2)
    error = (small - single["image"].float()).abs().mean((1, 2, 3))
    assert error.max() < 8                                                          # grey levels
    assert (small - single["image"].roll(1, 0).float()).abs().mean() > 25          # another picture
    a = torch.nn.functional.avg_pool2d((large["instances"] > 0).float()[:, None], 2)[:, 0]
    b = (single["instances"] > 0).float()
    iou = torch.minimum(a, b).sum((1, 2)) / torch.maximum(a, b).sum((1, 2))
    assert iou.median() > 0.8 and iou.min() > 0.6, iou                      # legs are 2 pixels wide
    assert torch.allclose(large["keypoints"][..., :2], 2 * single["keypoints"][..., :2], atol=1e-3)


# ---- what tells the classes apart ----------------------------------------------------------------


def test_classes_differ_in_parts_and_only_in_parts():
    rows = {tuple(sorted(c.items())) for c in toy.BESTIARY.values()}
    assert len(rows) == len(toy.CLASSES) >= 12 and len(toy.PARTS) >= 6
    assert set().union(*toy.BESTIARY.values()) <= set(toy.SHAPES)


def test_colour_of_a_creature_says_nothing_of_its_class_but_its_outline_does(many):
    train, test, C = many["train"], many["test"], len(toy.CLASSES)

    def centroids(features):
        x, y = features(train), features(test)
        mean = torch.stack([x[train["label"] == c].mean(0) for c in range(C)])
        return accuracy(torch.cdist(y, mean), torch.arange(C), test["label"])

    def colour(out):
        mask = (out["instances"] > 0).float()[:, None]
        return (out["image"] * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1) / 255

    def outline(out):
        mask = (out["instances"] > 0).float()[:, None]
        return torch.nn.functional.avg_pool2d(mask, 4).flatten(1)

    chance = 1 / C
    assert centroids(colour) < chance + 4 * (chance * (1 - chance) / 500) ** 0.5 + 0.02
    assert centroids(outline) > 3 * chance                                    # the negative control


def test_raw_pixels_do_not_tell_the_class(many):
    x, y = (many[split]["image"].flatten(1).float() / 255 for split in ("train", "test"))
    label, truth = many["train"]["label"], many["test"]["label"]
    assert accuracy(torch.cdist(y, x), label, truth, 10) < 0.25
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    assert accuracy(-(y @ x.T), label, truth, 10) < 0.25


def test_every_class_appears_about_equally_often(many):
    count = many["train"]["label"].bincount(minlength=len(toy.CLASSES)) * len(toy.CLASSES) / 2000
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
            own = {p for p in toy.BESTIARY[toy.CLASSES[c]] if p in toy.PARTS} | {"torso", "head"}
            assert {toy.PARTS[p - 1] for p in parts[b][mask].unique().tolist()} <= own
            has = {toy.PARTS[p] for p in out["keypoints"][b, k, :, 2].nonzero()[:, 0].tolist()}
            assert has == own, (toy.CLASSES[c], has)


@pytest.mark.parametrize("name", ["single", "scenes"])
def test_visible_key_points_lie_on_their_part_and_hidden_ones_do_not(name, request):
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


def test_what_stands_in_front_takes_pixels_away(monkeypatch):
    index, nothing = torch.arange(200), torch.tensor(-9.0)
    whole = toy.world

    def open_view(*args):
        w, cls, points = whole(*args)
        w["pieces"][:, 6:, 8] = nothing
        return w, cls, points

    covered = toy.draw(index, annotate=True)["instances"] > 0
    monkeypatch.setattr(toy, "world", open_view)
    free = toy.draw(index, annotate=True)["instances"] > 0
    assert not (covered & ~free).any()
    lost = 1 - covered.sum((1, 2)) / free.sum((1, 2))
    assert 0.2 < (lost > 0.01).float().mean() < 0.9 and lost.max() < 0.8, lost


def test_scenes_hold_several_creatures_of_which_some_overlap(scenes):
    count = (scenes["classes"] >= 0).sum(1)
    assert (count >= 2).float().mean() > 0.9 and count.max() == 4
    box, area = scenes["boxes"], []
    for k in range(4):
        area.append((scenes["instances"] == k + 1).sum((1, 2)))
    largest = torch.stack(area, 1).argmax(1, keepdim=True)
    assert torch.equal(scenes["label"], scenes["classes"].gather(1, largest)[:, 0])
    low = torch.maximum(box[:, 0, :2], box[:, 1, :2])
    high = torch.minimum(box[:, 0, 2:], box[:, 1, 2:])
    assert 0.1 < (high > low).all(1).float().mean() < 0.95


# ---- video ---------------------------------------------------------------------------------------


def test_films_keep_their_creatures_and_move_smoothly(film):
    assert film["image"].shape == (3, 16, 3, 64, 64)
    for b in range(3):
        alive = set((film["classes"][b] >= 0).nonzero()[:, 0].add(1).tolist())
        assert 2 <= len(alive) <= 3
        first = film["instances"][b, 0].unique().tolist()
        assert set(first) - {0} == alive == set(film["instances"][b].unique().tolist()) - {0}
    ids = film["instances"]
    step = (ids[:, 1:] != ids[:, :-1]).float().mean((2, 3))
    cut = (ids != ids.roll(1, 0)).float().mean()
    assert 0 < step.min() and step.max() < 0.5 * cut
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))
    for k in (1, 2):
        mask = (film["instances"] == k).float()
        area = mask.sum((2, 3))
        centre = torch.einsum("bths,chs->btc", mask, grid) / area.clamp(min=1)[..., None]
        whole = area > 0.7 * area.amax(1, keepdim=True)                             # not occluded
        whole = whole[:, 1:] & whole[:, :-1]
        assert (centre[:, 1:] - centre[:, :-1]).norm(dim=-1)[whole].max() < 8       # pixels a frame


def test_the_first_frame_of_a_film_does_not_depend_on_its_length(film):
    assert torch.equal(toy.video(torch.arange(3), frames=2)["image"][:, 0], film["image"][:, 0])


def test_a_film_of_one_creature_starts_as_the_still():
    out = toy.video(torch.arange(4), frames=2, split="test", scenes=False)
    assert torch.equal(out["image"][:, 0], toy.draw(torch.arange(4), "test")["image"])


# ---- the rest ------------------------------------------------------------------------------------


def test_drawing_is_fast_enough_to_do_while_training():
    toy.draw(INDEX)
    start = time.process_time()
    toy.draw(torch.arange(256))
    assert (time.process_time() - start) / 256 < 0.01                # 0.8 ms on a free machine


def test_bad_input_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="int64"):
        toy.draw(torch.arange(3.0))
    with pytest.raises(ValueError, match="train and test"):
        toy.draw(INDEX, "valid")


def test_the_contact_sheet_has_colour_in_every_row():
    sheet = toy.contact_sheet(size=32)
    assert sheet.width > 400 and len(sheet.getcolors(1 << 20)) > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_world(single):
    out = toy.draw(INDEX.cuda(), "train", annotate=True)
    assert (out["image"].cpu().int() - single["image"].int()).abs().float().mean() < 0.5
    assert (out["instances"].cpu() == single["instances"]).float().mean() > 0.999
