"""Pose estimation: heat maps, crops and flips against numbers worked out by hand; planted joints
are found where they are."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_models import make_encoder, make_model, make_options, record_adamw, unpack_real

import evaluate
from lib import metrics, rng
from probes import annotations, pose, training

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")    # of pycocotools


@pytest.fixture(autouse=True)
def seeded_without_gradient():
    annotations.read_coco_json.cache_clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def small_model(**config):
    return make_model(make_encoder(**{"embed_dim": 24, **config}))


# ---- settings ------------------------------------------------------------------------------------


def test_settings_are_the_documented_ones():
    assert pose.POSE_RECIPES["coco"] == dict(
        shape=(256, 192), batch=512, warmup=500, lr=5e-4, decay=0.01,
        iters=pytest.approx(20 * 149813 / 512, abs=5))
    assert (pose.STRIDE, pose.MIN_MAXIMUM, pose.DUPLICATE_OKS) == (4, 0.2, 0.9)


def test_every_step_has_the_documented_learning_rate(monkeypatch):
    steps, recipe, model = record_adamw(monkeypatch), pose.POSE_RECIPES["coco"], small_model()
    weight = torch.tensor([[1.0, 0, 0, 0, 0]])               # v = 0 of all joints but one
    batch = torch.zeros(1, 3, 16, 16), torch.ones(1, 5, 4, 4), weight
    head = pose.make_head(5, model, 0)
    optimizer = training.linear_adamw([head], [recipe["lr"]], recipe["decay"])
    pose.train_head(head, optimizer, enumerate([batch] * 20), 20, recipe, model, 256)
    factors = [0.5] + [1] * 14 + [0.1] * 3 + [0.01] * 2      # of 20 epochs: x 0.1 after 15 and 18
    assert steps == [[(pytest.approx(5e-4 * factor), decay, (0.9, 0.999)) for decay in (0.01, 0)]
                     for factor in factors]
    assert head.bias[0] > 0 and not head.bias[1:].any()      # unlabeled joints are not trained


# ---- heat maps -----------------------------------------------------------------------------------


def test_heat_maps_are_decoded_as_by_hand():
    maps = torch.zeros(3, 5, 6)
    maps[0, 2, 3], maps[0, 2, 4], maps[0, 1, 3] = 1.0, 0.5, 0.25     # right, and up
    maps[1, 0, 0], maps[1, 0, 1] = 0.7, 0.6                  # at the border: not moved
    maps[2, 3, 1], maps[2, 3, 0] = 0.9, 0.1                  # left; up and down are equal
    points, maxima = pose.decode_maps(maps)
    assert points.tolist() == [[3.25, 1.75], [0, 0], [0.75, 3]]
    assert maxima.tolist() == pytest.approx([1, 0.7, 0.9])


def test_gaussians_are_centered_on_the_nearest_cell():
    points = torch.tensor([[21.9, 40.0, 2], [22.1, 1.0, 1], [30, 30, 0], [-90, 20, 2]])
    maps, weights = pose.gaussian_maps(points, (64, 48), 2.0)
    assert maps.shape == (4, 16, 12) and weights.tolist() == [1, 1, 0, 0]
    assert maps[0].argmax() == 10 * 12 + 5 and maps[1].argmax() == 6       # round(5.475), (5.525)
    assert maps[0, 10, 5] == 1 and maps[0, 10, 7].item() == pytest.approx(0.60653, abs=1e-5)
    assert maps[0, 3, 5] == 0 and maps[0, 4, 5] > 0          # cut at 6 cells


def test_maps_of_a_mirrored_crop_are_flipped_back():
    """A joint at pixel 20 is at pixel 27 of the mirror image of 48: cells 5 and 7."""
    mirrored = torch.tensor([1, 0])
    maps, _ = pose.gaussian_maps(torch.tensor([[20.0, 8, 2], [32, 8, 2]]), (16, 48), 1.0)
    flipped, _ = pose.gaussian_maps(torch.tensor([[15.0, 8, 2], [27, 8, 2]]), (16, 48), 1.0)
    assert pose.unflip_maps(flipped[None], mirrored)[0].flatten(1).argmax(1).equal(
        maps.flatten(1).argmax(1))


# ---- crops ---------------------------------------------------------------------------------------


def test_a_box_becomes_the_crop_and_points_come_back():
    box = torch.tensor([10.0, 20, 40, 100])                  # 30 x 80, widened to 60 x 80
    matrix = pose.crop_matrix(box, (256, 192))
    corners = pose.transform_points(torch.tensor([[0.0, 0], [192, 256]]), matrix)
    assert corners.tolist() == [[-12.5, 10], [62.5, 110]]
    matrix = pose.crop_matrix(box, (256, 192), 0.8, 30)
    points = torch.rand(7, 2) * 100
    back = pose.transform_points(pose.transform_points(points, matrix), pose.invert_matrix(matrix))
    torch.testing.assert_close(back, points, atol=1e-3, rtol=0)
    image = torch.arange(120)[None, None].expand(3, 120, 120).to(torch.uint8)
    matrix = pose.crop_matrix(torch.tensor([30.0, 30, 70, 70]), (50, 50))
    crop = pose.warp_crop(image, matrix, (50, 50))
    torch.testing.assert_close(crop[0, 0], torch.arange(25.0, 75))


def test_training_views_move_points_with_the_image():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    image[:, 40:43, 60:63] = 255
    item = SimpleNamespace(image=image, box=torch.tensor([20.0, 20, 80, 80]),
                           points=torch.tensor([[61.0, 41, 2], [0, 0, 0]]))
    for seed in range(6):
        crop, points = pose.random_view(item, (128, 128), torch.tensor([1, 0]), rng.generator(seed))
        [joint] = points[points[:, 2] > 0]
        y, x = divmod(int(F.avg_pool2d(crop[:1], 3, 1, 1).argmax()), 128)
        assert abs(x - joint[0]) <= 2 and abs(y - joint[1]) <= 2


# ---- prediction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [16, 14])                   # 14 divides neither 256 nor 192
def test_planted_joints_are_found_where_they_are(p):
    """A spot on the left and one on the right; an "encoder" whose tokens are the brightness of the
    patch and its side of the crop. In a mirrored crop the sides are exchanged, as for one that
    recognizes people."""
    def layers(x, blocks, norm):
        bright = F.avg_pool2d(x[:, :1], p)
        left = torch.arange(bright.shape[3]) < bright.shape[3] // 2
        return [torch.cat([bright * left, bright * ~left], 1).flatten(2).mT], None

    encoder = SimpleNamespace(patch_size=p, depth=1, layers=layers, split=lambda z: (None, z))
    model = make_model(encoder, mean=(0, 0, 0), std=(1, 1, 1))
    head = torch.nn.Linear(2, 2, bias=False)
    head.weight[:] = torch.eye(2)
    image, truth = torch.zeros(3, 500, 300, dtype=torch.uint8), [[99.5, 249.5], [199.5, 249.5]]
    for x in (100, 200):
        image[:, 250 - p // 2:250 + p // 2, x - p // 2:x + p // 2] = 255
    high, low = range(22, 22 + 2 * p), range(198, 198 + 2 * p)           # rows of the crop
    rows = torch.tensor([*high, *low])
    shift = torch.stack([20 + rows % 40, 250 - rows], 1)     # columns: 41 to 80 and 141 to 180
    boxes = torch.cat([shift + torch.tensor([19.2, 25.6]),   # these become 256 x 192, unscaled
                       shift + torch.tensor([172.8, 230.4])], 1)

    def error(mirrored):
        item = SimpleNamespace(image=image, boxes=boxes)
        points, _ = pose.predict_points(item, range(len(rows)), head, (256, 192),
                                        torch.tensor(mirrored), model, 256)
        return points - torch.tensor(truth)                  # (4p, 2, 2)

    found = error([1, 0])
    assert found.abs().max() <= p / 2 + pose.STRIDE
    drift = (found[2 * p:] - found[:2 * p]).mean((0, 1))
    assert drift.abs().max() < 1.5                           # 266 px resized to 256: 6.6
    assert error([0, 1]).abs().max() > 90                    # control: without exchanged sides


def test_the_score_is_the_mean_of_the_maxima_above_a_fifth():
    head, item = torch.nn.Linear(24, 3), SimpleNamespace(
        image=torch.zeros(3, 40, 40).byte(), boxes=torch.tensor([[4.0, 4, 36, 36]]))
    head.weight.zero_()

    def score(*maxima):                                      # every map is constant
        head.bias[:] = torch.tensor(maxima)
        _, [score] = pose.predict_points(item, [0], head, (32, 32), torch.arange(3), small_model(),
                                         256)
        return score.item()

    assert score(0.9, 0.1, 0.7) == pytest.approx(0.8) and score(0.1, 0.19, -1) == 0


def test_duplicates_are_removed():
    points = torch.tensor([[[5.0, 5], [20, 20]], [[5.1, 5], [20, 20]], [[60, 60], [80, 80]]])
    boxes = torch.tensor([[0.0, 0, 30, 30]] * 2 + [[50.0, 50, 90, 90]])
    kept = pose.remove_duplicates(points, torch.tensor([0.5, 0.9, 0.7]), boxes,
                                  torch.full((3,), 900.0), [0.05, 0.05])
    assert kept == [1, 2]


def test_labeled_joints_are_scored_relative_to_the_longer_side_and_crowds_are_not(monkeypatch):
    """Two creatures of the test split and a crowd. Of the first, all joints but the fourth are
    labeled and 9 px off; of the second only the first is, and it is 11 px off. All others are far
    off."""
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

    def predict(item, objects, *_):
        return item.points[objects][..., :2] + F.pad(item.off[objects][..., None], (0, 1)), None

    monkeypatch.setattr(annotations, "keypoints", keypoints)
    monkeypatch.setattr(pose, "predict_points", predict)
    report = pose.pose(small_model(), make_options("pose", "--iters", "1"))
    assert report.images == {"objects": 2}
    # exp(-81 / (2 area (2 * 0.05)^2)) = 1/e, exp(-121 / ...) = 1/e^2
    assert report.rows["patches"] == pytest.approx({
        "OKS": 100 * (math.exp(-1) + math.exp(-2)) / 2, "PCK@0.1": 100 * (joints - 1) / joints})


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(monkeypatch):
    def keypoints(name, root, split, limit, size):
        for number in range(6):
            g = rng.generator(split, number)
            yield SimpleNamespace(image=torch.randint(256, (3, 64, 48), generator=g).byte(),
                                  points=F.pad(48 * torch.rand(1, 17, 2, generator=g), (0, 1),
                                               value=2), boxes=torch.tensor([[2.0, 2, 40, 60]]),
                                  areas=torch.full((1,), 2000.0), crowd=torch.zeros(1).bool())

    def results(*argv):
        report = pose.pose(small_model(), make_options("pose", "--data", "coco", "--iters", "3",
                                                       *argv))
        return report.rows, report.notes

    monkeypatch.setattr(annotations, "keypoints", keypoints)
    monkeypatch.setattr(metrics, "coco_ap", lambda *_: dict.fromkeys(("AP", "AP50", "AR", "AR50"),
                                                                     0.0))
    monkeypatch.setitem(pose.POSE_RECIPES, "coco", dict(shape=(64, 48), batch=4, iters=9, warmup=1,
                                                        lr=1e-2, decay=0.01))
    alone = results("--workers", "0")
    assert results("--workers", "2") == alone != results("--workers", "0", "--seed", "1")


def test_it_runs_on_toy(tmp_path):
    evaluate.main(["--task", "pose", "--baseline", "untrained", "--out", str(tmp_path), "--device",
                   "cpu", "--precision", "fp32", "--data", "toy-scenes", "--limit", "12",
                   "--img-size", "64", "--iters", "3", "--show"])
    [line] = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert all(0 <= row["PCK@0.1"] <= 100 for row in line["metrics"].values())
    assert line["images"]["objects"] >= 1 and "Gaussians of sigma 0.5 cells" in line["protocol"]
    assert list(tmp_path.glob("pose-toy*.png"))


def test_user_errors_are_one_sentence():
    with pytest.raises(ValueError, match="pose needs tokens, and pixels have none"):
        pose.pose(make_model(None, name="pixels"), make_options("pose"))
    with pytest.raises(ValueError, match="needs keypoints and object areas, and cub does not have"):
        pose.pose(small_model(), make_options("pose", "--data", "cub"))
    with pytest.raises(ValueError, match="pose takes one --lr at a time"):
        pose.pose(small_model(), make_options("pose", "--lr", "0.1", "0.2"))


def test_boxes_are_scaled_in_whole_cells():
    assert pose.scale_shape((256, 192), None) == (256, 192)
    assert pose.scale_shape((256, 192), 128) == (128, 96)
    assert pose.scale_shape((256, 192), 50) == (48, 36)


@pytest.mark.parametrize("missing", ["no test split", "pip install pycocotools"])
def test_what_is_missing_is_reported_before_training(monkeypatch, missing):
    def keypoints(name, root, split, *_):
        if split == "test" and missing == "no test split":
            raise ValueError(missing)
        yield SimpleNamespace(image=torch.zeros(3, 64, 48, dtype=torch.uint8),
                              points=torch.ones(1, 17, 3), boxes=torch.tensor([[2.0, 2, 40, 60]]),
                              areas=torch.ones(1), crowd=torch.zeros(1).bool())

    steps = record_adamw(monkeypatch)
    monkeypatch.setattr(annotations, "keypoints", keypoints)
    monkeypatch.setitem(pose.POSE_RECIPES, "coco", {**pose.POSE_RECIPES["coco"], "batch": 2})
    if missing == "no test split":
        monkeypatch.setattr(metrics, "coco_ap", lambda *_: None)
    else:
        monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match=missing):
        pose.pose(small_model(), make_options("pose", "--data", "coco", "--iters", "1"))
    assert not steps


def test_the_real_coco(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setitem(pose.POSE_RECIPES, "coco", {**pose.POSE_RECIPES["coco"], "batch": 8})
    root = unpack_real("coco_subset", tmp_path / "coco")
    (root / "coco/val2017").symlink_to("train2017")
    kind = "coco/annotations/person_keypoints"
    (root / f"{kind}_val2017.json").symlink_to("person_keypoints_train2017.json")
    report = pose.pose(small_model(), make_options(
        "pose", "--data", "coco", "--data-root", str(root), "--limit", "3", "--iters", "1",
        "--batch-size", "128"))
    row = report.rows["patches"]
    assert 0 <= row["AP"] <= row["AR50"] <= 100
