"""Probes of retrieval: crops of hand-made images, probes against oracles and noise, the metrics."""
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from small_models import make_encoder, make_model, make_options
from torch.utils._python_dispatch import TorchDispatchMode

from lib import augment, metrics, toy
from probes import annotations, retrieval


def run(task, *flags):
    """The Report of a probe for a small model."""
    return getattr(retrieval, task)(make_model(make_encoder()), make_options(task, *flags))


# ---- objects -------------------------------------------------------------------------------------


def test_boxes_are_clipped_and_must_be_square_and_large_enough_and_no_crowd():
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(120), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    boxes = torch.tensor([[10., 20, 60, 70], [-9, -9, 50, 50], [0, 0, 61, 50], [0, 0, 60, 50],
                          [0, 0, 49, 49], [10, 20, 60, 70]])
    item = SimpleNamespace(image=image, boxes=boxes, labels=torch.arange(6),
                           crowd=torch.tensor([0, 0, 0, 0, 0, 1]).bool())
    found = list(retrieval.crop_boxes([item], 50, 1.2, 50))
    assert [label for _, label in found] == [0, 1, 3]
    assert found[0][0].equal(image[:, 20:70, 10:60]) and found[1][0].equal(image[:, :50, :50])
    assert len(list(retrieval.crop_boxes([item], 50, 2, 10))) == 5


def test_object_retrieval_of_an_oracle_and_of_noise(monkeypatch):
    def retrieve(z, labels):
        monkeypatch.setattr(retrieval, "extract_features",
                            lambda m, o, split, *_: {"test": ({"cls": z}, labels, 5)}[split])
        return run("object_retrieval", "--limit", "8")

    labels, g = torch.arange(300) % 5, torch.Generator().manual_seed(2)
    assert retrieve(torch.eye(5)[labels], labels).rows["cls"]["AP"] == pytest.approx(100, abs=1)
    row = retrieve(torch.randn(300, 16, generator=g), labels).rows["cls"]
    assert row["AP"] == pytest.approx(row["chance"], abs=1)
    with pytest.raises(ValueError, match="no two items have the same class"):
        retrieve(torch.randn(4, 3), torch.arange(4))
    [note] = retrieve(torch.randn(3, 3), torch.tensor([0, 0, 1])).notes
    assert note == "1 items are the only one of their class and are not used as queries"


def test_max_items_draws_the_same_items_every_time():
    features, labels = {"cls": torch.arange(50.)[:, None]}, torch.arange(50)
    subset, kept = retrieval.draw_subset(features, labels, 7, seed=0)
    again, _ = retrieval.draw_subset(features, labels, 7, seed=0)
    assert len(kept) == 7 and subset["cls"][:, 0].tolist() == kept.tolist()
    assert subset["cls"].equal(again["cls"])
    assert retrieval.draw_subset(features, labels, None, seed=0)[1].equal(labels)


# ---- parts ---------------------------------------------------------------------------------------

NAMES = ["eye", "leg", "wing", "belly"]
POINTS = torch.tensor([[100., 60, 2], [200, 60, 2], [100, 130, 1], [130, 60, 2]])


def make_image():
    """(3, 200, 300), every pixel another color: (row, column mod 256, 7)."""
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(300), indexing="ij")
    return torch.stack([rows, columns % 256, torch.full_like(rows, 7)]).to(torch.uint8)


def crop_parts(*objects, parts, size=50, rule="code"):
    """The crops of an image with these objects, (4, 3) each."""
    item = SimpleNamespace(image=make_image(), points=torch.stack(objects))
    return list(retrieval.crop_parts([item], NAMES, parts, size, rule))


def test_crops_have_the_side_and_place_of_the_released_code():
    # eye and leg are 100 apart: side 2 * 25. The wing is not visible, the belly not chosen.
    eye, leg = crop_parts(POINTS, parts=("leg", "eye", "wing"))
    assert (eye[1], leg[1]) == (1, 0)                     # indices in the given order
    assert eye[0].equal(make_image()[:, 35:85, 75:125])           # 50 pixels: not resized
    assert leg[0].equal(make_image()[:, 35:85, 175:225])


def test_crops_of_the_paper_are_as_wide_as_the_distance_to_any_keypoint():
    # The belly is 30 from the eye (left out: 15 px), 70 from the leg; black beyond the right edge.
    shifted = POINTS + torch.tensor([75., 0, 0])
    [(crop, label)] = crop_parts(shifted, parts=("leg", "eye"), size=70, rule="paper")
    assert label == 0 and crop[:, :, 60:].max() == 0
    assert crop[:, :, :60].equal(make_image()[:, 25:95, 240:])


def test_a_part_is_left_out_if_it_is_alone_or_another_one_has_the_same_position():
    alone = torch.tensor([[100., 60, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    same_position = torch.tensor([[100., 60, 2], [100, 60, 2], [0, 0, 0], [0, 0, 0]])
    for points in (alone, same_position):
        assert crop_parts(points, parts=NAMES) == []


def test_parts_without_a_crop_are_named():
    assert retrieval.note_missing_parts(("eye", "leg", "tail"), torch.tensor([1, 1])) == [
        "no crop of eye, tail is large enough"]
    assert retrieval.note_missing_parts(("eye", "leg"), torch.tensor([1, 0])) == []


def test_other_objects_count_in_the_paper_and_not_in_the_code():
    # Two eyes 100 apart: of one object each, so by the code both are alone. A leg 60 below the
    # first gives it a crop of side 30 by the code and 60 by the paper; the other is far from all.
    one, two = torch.zeros(4, 3), torch.zeros(4, 3)
    one[0], two[0] = torch.tensor([100., 60, 2]), torch.tensor([200., 60, 2])
    assert crop_parts(one, two, parts=("eye", "leg")) == []
    crops = crop_parts(one, two, parts=("eye",), rule="paper")
    assert [crop.shape for crop, _ in crops] == [(3, 50, 50)] * 2
    one[1] = torch.tensor([100., 120, 2])
    eye, leg = crop_parts(one, two, parts=("eye", "leg"), size=30)
    assert (eye[1], leg[1]) == (0, 1) and eye[0].equal(make_image()[:, 45:75, 85:115])
    crops = crop_parts(one, two, parts=("eye", "leg"), size=60, rule="paper")
    assert len(crops) == 3 and crops[0][0].equal(make_image()[:, 30:90, 70:130])


def test_part_retrieval_of_an_oracle_and_of_noise(monkeypatch):
    labels = torch.tensor([label for _, label in retrieval.crop_parts(
        annotations.keypoints("toy", limit=60), toy.PARTS, retrieval.KEYPOINT_DATA["toy"][2], 8)])
    noise = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(0))
    for oracle, features in ((True, torch.eye(4)[labels]), (False, noise)):
        result = {"cls": features}, labels
        monkeypatch.setattr(retrieval, "encode_batches", lambda *a, result=result, **b: result)
        row = run("part_retrieval", "--limit", "60").rows["cls"]
        if oracle:
            assert row["AP"] == pytest.approx(100) and row["AP by part"] == pytest.approx(100)
        else:
            assert row["AP"] == pytest.approx(row["chance"], abs=2.5)
            assert row["AP by part"] == pytest.approx(row["chance by part"], abs=2.5)
        assert row["chance by part"] < row["chance"] - 5 < 40            # most crops are heads


def test_part_retrieval_ranks_at_most_max_items(monkeypatch):
    features, labels = {"cls": torch.randn(50, 4)}, (torch.arange(50) % 10).clamp(max=3)
    monkeypatch.setattr(retrieval, "encode_batches", lambda *a, **b: (features, labels))
    report = run("part_retrieval", "--max-items", "9")
    subset, labels = retrieval.draw_subset(features, labels, 9, seed=0)
    assert report.images == {"crops": 9} and set(labels.tolist()) == {0, 3}
    assert report.rows == retrieval.score_retrieval(subset, labels, "part")[0]
    assert not any("large enough" in note for note in report.notes)     # 1 and 2 have crops


def test_the_border_of_training_crops_is_cut_off_in_part_classification(monkeypatch):
    crops, splits = [], []

    def batch_crops(given, *_):
        images, labels = zip(*given)
        crops.append(torch.stack(images))
        return iter([(torch.zeros(len(images), 3, 32, 32), torch.tensor(labels))])

    keypoints = annotations.keypoints

    def test_images(name, root, split, limit):           # of both splits, to compare the crops
        splits.append(split)
        return keypoints(name, root, "test", limit)

    monkeypatch.setattr(retrieval, "batch_crops", batch_crops)
    monkeypatch.setattr(annotations, "keypoints", test_images)
    report = run("part_classification", "--limit", "12", "--epochs", "1")
    train, test = crops
    assert splits == ["train", "test"] and "head, leg, wing, tail of toy;" in report.protocol
    assert train.shape == test.shape == (len(train), 3, 32, 32)
    large = F.interpolate(test.float(), (36, 36), mode="bicubic")[:, :, 2:-2, 2:-2]
    close, far = ((a - train).abs().mean().item() for a in (large, test.float()))
    assert close < far / 2


def test_protocols_of_part_classification_differ_where_the_numbers_do(monkeypatch):
    labels = torch.arange(20) % 4
    monkeypatch.setattr(retrieval, "encode_batches",
                        lambda *a, **b: ({"tokens": torch.zeros(20, 3)}, labels))
    head = SimpleNamespace(evaluate=lambda *_: {"top-1": 1.0, "top-5": 1.0}, notes=[],
                           training="SGD")
    monkeypatch.setattr(retrieval, "train_classifier", lambda *a: head)
    flags = ("", "--crop paper", "--head attentive", "--head attentive --bn batch")
    protocols = [run("part_classification", *f.split()).protocol for f in flags]
    assert len(set(protocols)) == 4 and "squares as in the study's paper" in protocols[1]
    assert "attentive head with batch norm of the test batch (SGD" in protocols[3]


# ---- landmarks -----------------------------------------------------------------------------------


def test_toy_landmarks_are_easy_hard_and_junk_frames_of_the_querys_video(monkeypatch):
    image = torch.arange(64, dtype=torch.uint8).view(4, 16, 1, 1, 1).expand(4, 16, 3, 64, 64)
    instances = torch.ones(4, 16, 64, 64, dtype=torch.uint8)
    instances[2, [0, 9]] = 0                              # no creature in two frames of video 2
    monkeypatch.setattr(toy, "video", lambda *a, **b: {"image": image, "instances": instances})
    found = retrieval.draw_toy_landmarks("toy", 32, None, 0, n_videos=4)
    assert len(found.database) == 60 and found.database[0].shape == (3, 32, 32)
    assert [int(x.max()) for x in found.queries] == [8, 24, 40, 56]
    for v in range(4):
        frames = {kind: [int(found.database[n].min()) - 16 * v for n in getattr(found, kind)[v]]
                  for kind in ("easy", "hard", "junk")}
        assert frames["junk"] == ([0, 9] if v == 2 else [])
        assert set(frames["easy"]) == {4, 5, 6, 7, 9, 10, 11, 12} - set(frames["junk"])
        assert set(frames["hard"]) == {0, 1, 2, 3, 13, 14, 15} - set(frames["junk"])


@pytest.mark.parametrize("readable", [range(6), (0, 1, 2, 4, 5)])       # 3 is junk
def test_landmarks_are_scored_as_medium_hard_and_easy(monkeypatch, readable):
    order = torch.tensor([3, 0, 5, 1, 2, 4])              # the ranking of the revisited AP below
    database = torch.empty(6, 2)
    database[order] = torch.stack([torch.tensor([10., k]) for k in range(6)])
    landmarks = SimpleNamespace(database=[0] * 6, queries=[0, 0], boxes=None, easy=[[0], []],
                                hard=[torch.tensor([1]), []], junk=[[3], []])
    monkeypatch.setattr(annotations, "landmarks", lambda name, root: landmarks)
    rows = torch.tensor(readable)
    found = iter([({"cls": database[rows]}, rows),
                  ({"cls": torch.tensor([[1., 0], [1, 0]])}, torch.arange(2))])
    monkeypatch.setattr(retrieval, "encode_batches", lambda *a, **b: next(found))
    row = run("landmark_retrieval", "--data", "roxford5k").rows["cls"]
    assert row["medium mAP"] == pytest.approx(79.1667, abs=1e-3)   # the second query is left out
    assert row["hard mAP"] == pytest.approx(25) and row["easy mAP"] == pytest.approx(100)
    assert row["m mP@10"] == pytest.approx(200 / 3) and row["h mP@10"] == pytest.approx(50)


@pytest.mark.parametrize("flags", [[], ["--crop-queries"]])
def test_only_queries_are_cropped_and_only_with_the_flag(monkeypatch, flags):
    image, calls = torch.randint(256, (3, 40, 40), dtype=torch.uint8), []
    boxes = torch.tensor([[0., 0, 20, 30], [9, 9, 40, 40]])
    landmarks = SimpleNamespace(database=[image] * 3, queries=[image] * 2, boxes=boxes,
                                easy=[[0], [1]], hard=[[1], [2]], junk=[[], []])
    monkeypatch.setattr(annotations, "landmarks", lambda *_: landmarks)
    images = retrieval.landmark_images
    monkeypatch.setattr(retrieval, "landmark_images",
                        lambda *a: (calls.append((len(a[0]), a[1])), images(*a))[1])
    report = run("landmark_retrieval", "--data", "roxford5k", *flags)
    assert [(n, given is boxes) for n, given in calls] == [(3, False), (2, bool(flags))]
    assert calls[0][1] is None and (calls[1][1] is None) == (not flags)
    assert ("queries cropped to their boxes" if flags else "whole queries") in report.protocol
    assert "queries are frames of videos" in run("landmark_retrieval", "--limit", "2").protocol


def test_unreadable_landmarks_are_left_out_and_listed(tmp_path, capsys):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path in (paths[0], paths[2]):
        Image.new("RGB", (40, 30)).save(path)
    open(paths[1], "w").close()
    model, boxes = make_model(make_encoder()), [[0, 0, 40, 31]] * 3
    items = retrieval.landmark_images(paths, boxes, 32, model)
    assert [index.item() for _, index in items] == [0, 2]
    assert f"left out 1 of 3 images of the landmarks that cannot be read: {paths[1]}" in (
        capsys.readouterr().err)
    with pytest.raises(ValueError, match="0.png has 40 x 30 pixels, but its annotation extends to"):
        list(retrieval.landmark_images(paths, [[0, 0, 80, 60]] * 3, 32, model))


def test_truncated_landmarks_are_used_as_far_as_they_go(tmp_path, capsys):
    paths = [tmp_path / "whole.jpg", tmp_path / "cut.jpg"]
    noise = torch.randint(256, (60, 80, 3), dtype=torch.uint8).numpy()
    for path in paths:
        Image.fromarray(noise).save(path, quality=95)
    os.truncate(paths[1], paths[1].stat().st_size * 3 // 4)
    model = make_model(make_encoder())
    (whole, _), (cut, index) = retrieval.landmark_images(paths, None, 80, model)
    same = (whole == cut).all(1)[0]                              # (height, width)
    assert index == 1 and same[:30].all() and not same[-1].any()
    assert f"1 of 2 images of the landmarks are truncated: {paths[1]}" in capsys.readouterr().err
    assert not ImageFile.LOAD_TRUNCATED_IMAGES                   # elsewhere such a file is an error


def test_multiscale_averages_class_tokens_only():
    with pytest.raises(ValueError, match="averages class tokens: leave out --feature patch"):
        run("landmark_retrieval", "--multiscale", "--feature", "patch", "--limit", "1")


def test_landmark_images_keep_their_aspect_ratio_and_are_cut_to_patches():
    model, tall = make_model(make_encoder()), torch.randint(256, (3, 100, 41), dtype=torch.uint8)
    [(x, index)] = retrieval.landmark_images([tall], None, 50, model)
    assert x.shape == (1, 3, 48, 16) and index.item() == 0         # 50 x 20 or 21, cut
    [(x, _)] = retrieval.landmark_images([tall], None, 200, model)
    assert x.shape == (1, 3, 96, 40)                               # never enlarged
    exact = augment.normalize(tall[None, :, :96, :40].float() / 255)
    assert torch.allclose(x, exact, atol=1e-6)
    [(x, _)] = retrieval.landmark_images([tall], [[8, 16, 32, 48]], 200, model)
    assert torch.allclose(x, augment.normalize(tall[None, :, 16:48, 8:32].float() / 255), atol=1e-6)


def test_multiscale_features_are_the_mean_of_three_sizes():
    encoder, x = make_encoder().requires_grad_(False), torch.randn(2, 3, 64, 64)
    expected = encoder(x)[:, 0]
    for side in (45, 32):
        small = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        expected = expected + encoder(small[:, :, :side // 8 * 8, :side // 8 * 8])[:, 0]
    found = retrieval.multiscale_features(encoder, x)["multiscale"]
    assert torch.allclose(found, expected / 3, atol=1e-5)


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives, junk, ap, precision", [
    ([0, 1], [3], 0.791667, [1, 2 / 3, 2 / 3]),
    ([5, 4], [], 0.216667, [0, 0.2, 1 / 3]),
    ([9], [3], 0.0, [0, 0, 0]),                           # never found
])
def test_revisited_ap_has_the_values_of_the_official_tool(positives, junk, ap, precision):
    ranking = torch.tensor([3, 0, 5, 1, 2, 4])
    found, at = metrics.revisited(ranking, torch.tensor(positives), torch.tensor(junk))
    assert found == pytest.approx(ap, abs=1e-6) and at == pytest.approx(precision)
    kept, _ = metrics.revisited(ranking, torch.tensor(positives), torch.tensor([]))
    assert (kept < found - 0.1) == (junk == [3] and ap > 0)         # control: junk matters


def test_revisited_ap_without_a_positive_is_left_out_of_the_mean():
    ap, at = metrics.revisited(torch.arange(4), torch.tensor([]), torch.tensor([1]))
    assert math.isnan(ap) and all(map(math.isnan, at))


def test_revisited_ap_is_the_area_under_the_trapezoids():
    g = torch.Generator().manual_seed(4)
    for _ in range(10):
        ranking, positives = torch.randperm(30, generator=g), torch.randperm(30, generator=g)[:6]
        area, recall, hits = 0.0, 0.0, 0
        for n, item in enumerate(ranking.tolist(), 1):    # down the ranked list
            hits += item in positives
            if item in positives:
                left = 1.0 if n == 1 else (hits - 1) / (n - 1)
                area += (hits / 6 - recall) * (left + hits / n) / 2
                recall = hits / 6
        found, _ = metrics.revisited(ranking, positives, torch.tensor([]))
        assert found == pytest.approx(area, abs=1e-12)


def test_mean_ap_of_retrieval_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(6)
    z, y = torch.randn(60, 5, generator=g).double(), torch.randint(0, 4, (60,), generator=g)
    unit = z / z.norm(dim=1, keepdim=True)
    expected = [sklearn.average_precision_score(
        (y[others] == y[i]).numpy(), (unit[others] @ unit[i]).numpy())
        for i in range(60) for others in [torch.arange(60) != i]]
    assert metrics.retrieval(z, y).mean().item() == pytest.approx(sum(expected) / 60, abs=1e-9)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is created."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.slow
def test_retrieval_among_6000_items_never_holds_the_whole_matrix():
    z, y = torch.randn(6000, 8), torch.arange(6000) % 10
    with LargestTensor() as largest:
        ap = metrics.retrieval(z, y, block=10**9)
    assert len(ap) == 6000 and largest.elements <= 2**24            # the whole matrix: 3.6e7
    assert ap.mean().item() == pytest.approx(metrics.chance(y)[0].item(), abs=0.01)
