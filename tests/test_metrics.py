"""lib/metrics.py against loops, scikit-learn, pycocotools, and values computed by hand."""
import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from lib import metrics


def on_circle(similarities):
    """Unit vectors with the given dot products with (1, 0)."""
    s = torch.tensor(similarities, dtype=torch.float64)
    return torch.stack([s, (1 - s * s).sqrt()], 1)


def slow_ap(scores, relevant):
    """The definition: mean precision at the relevant items, counted by comparing scores."""
    hits = [i for i, r in enumerate(relevant) if r]
    total = 0.0
    for i in hits:
        retrieved = [j for j, s in enumerate(scores) if s >= scores[i]]
        total += sum(relevant[j] for j in retrieved) / len(retrieved)
    return total / len(hits) if hits else math.nan


# --------------------------------------------------------------------------- nearest neighbors

def test_one_close_neighbor_outweighs_three_votes():
    similarity = torch.tensor([[0.9, 0.8, 0.79, 0.78]], dtype=torch.float64)
    votes = metrics.sum_votes(similarity, torch.tensor([[0, 1, 1, 1]]), 2) * math.exp(0.9 / 0.07)
    assert votes.round().tolist() == [[383518, 240655]]
    bank, query = on_circle([.9, .8, .79, .78, .1]), on_circle([1.0])
    labels = torch.tensor([0, 1, 1, 1, 0])
    assert metrics.knn(bank, labels, query, k=(4,))[4].tolist() == [0]
    # negative control: at a high temperature the majority wins
    assert metrics.knn(bank, labels, query, k=(4,), tau=100.0)[4].tolist() == [1]


def test_knn_equals_a_loop_over_queries_for_every_k_and_any_chunk():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 8, generator=g), torch.randn(23, 8, generator=g)
    labels = torch.randint(0, 5, (60,), generator=g)
    for chunk in (4, 256):
        predicted = metrics.knn(3 * bank, labels, queries / 7, k=(1, 5, 20, 500), chunk=chunk)
        for k, labels_k in predicted.items():
            for q, label in zip(queries, labels_k.tolist()):
                cosine = [float(q @ b / q.norm() / b.norm()) for b in bank]
                votes = [0.0] * 5
                for i in sorted(range(60), key=lambda i: -cosine[i])[:k]:
                    votes[labels[i]] += math.exp(cosine[i] / 0.07)
                assert label == max(range(5), key=lambda c: votes[c])


def test_knn_of_the_bank_itself_returns_its_labels():
    bank, labels = torch.eye(12), torch.arange(12) % 4
    assert metrics.knn(bank, labels, 5 * bank, k=(1,))[1].equal(labels)
    wrong = metrics.knn(bank, labels, bank.roll(1, 0), k=(1,))[1]        # negative control
    assert (wrong == labels).sum() == 0


def test_knn_is_finite_at_a_small_temperature():
    bank, labels = on_circle([.9, .8]).float(), torch.tensor([1, 0])
    assert metrics.knn(bank, labels, on_circle([1.0]).float(), k=(2,), tau=1e-3)[2].tolist() == [1]


# --------------------------------------------------------------------------- linear classifier

def ridge_by_refitting(x, labels, q):
    """metrics.ridge by the definition: one regression per strength and left-out item, solved with
    an augmented system instead of eigenvectors."""
    mean, std = x.mean(0), x.std(0, correction=0)
    x, q, y = (x - mean) / std, (q - mean) / std, torch.eye(3, dtype=x.dtype)[labels]

    def fit(rows, strength):
        inputs = torch.cat([x[rows], torch.ones(len(x[rows]), 1, dtype=x.dtype)], 1)
        penalty = torch.eye(x.shape[1] + 1, dtype=x.dtype) * strength
        penalty[-1, -1] = 0                                             # the bias is free
        return torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ y[rows])

    def predict(x, weight):
        return x @ weight[:-1] + weight[-1]

    everything = torch.arange(len(x))
    rank = min(x.shape[1], len(x) - 1)
    strengths = (x.square().sum() / rank * torch.logspace(-4, 3, 15, dtype=x.dtype)).tolist()
    errors = [sum((predict(x[i], fit(everything != i, strength)) - y[i]).square().sum().item()
                  for i in range(len(x))) for strength in strengths]
    strength = strengths[errors.index(min(errors))]
    return predict(q, fit(everything, strength)).argmax(1), strength / strengths[0]


@pytest.mark.parametrize("items, width", [(40, 6), (15, 30)])
def test_ridge_equals_refitting_without_each_item(items, width):
    g = torch.Generator().manual_seed(items)
    labels = torch.arange(items) % 3
    centers = torch.randn(3, width, generator=g)
    x = (centers[labels] + 1.5 * torch.randn(items, width, generator=g)).double()
    q = (centers[torch.arange(200) % 3] + 1.5 * torch.randn(200, width, generator=g)).double()
    expected, strength = ridge_by_refitting(x, labels, q)
    assert 1 < strength < 1e7                                           # not at an edge
    assert metrics.ridge(x, labels, q).equal(expected)
    scale = torch.logspace(-2, 2, width, dtype=x.dtype)                 # features are standardized
    assert metrics.ridge(x * scale + 7, labels, q * scale + 7).equal(expected)
    assert not metrics.ridge(x * scale, labels, q).equal(expected)      # negative control


def test_ridge_of_features_without_information_predicts_the_most_frequent_class():
    labels = torch.tensor([1, 2, 2, 0])
    for width in (2, 9):
        assert metrics.ridge(torch.ones(4, width), labels, torch.rand(3, width)).eq(2).all()
    assert metrics.ridge(torch.rand(1, 3), labels[:1], torch.rand(2, 3)).tolist() == [1, 1]


# --------------------------------------------------------------------------- accuracy

def test_accuracy_counts_the_top_n_and_leaves_out_those_that_are_always_100():
    scores = torch.tensor([[.1, .7, .2], [.5, .3, .2], [.2, .3, .5], [.1, .2, .7]])
    labels = torch.tensor([1, 1, 2, 0])
    assert metrics.accuracy(scores, labels, top=(1, 2, 3, 5)) == {"top-1": 50.0,
                                                                      "top-2": 75.0}
    assert metrics.accuracy(scores[:, :1], labels.mul(0)) == {"top-1": 100.0}


# --------------------------------------------------------------------------- average precision

@pytest.mark.parametrize("scores, relevant, expected", [
    ([6, 5, 4, 3, 2, 1], [1, 0, 1, 0, 0, 1], (1 + 2 / 3 + 3 / 6) / 3),
    ([.9, .5, .5, .5], [1, 0, 0, 1], 0.75),                  # a three-way tie is one group
    ([.5, .5, .5, .9], [0, 1, 0, 1], 0.75),                  # ... in any order
    ([2, 1], [0, 1], 0.5),
    ([1, 1, 1], [1, 0, 0], 1 / 3),
])
def test_average_precision_equals_values_computed_by_hand(scores, relevant, expected):
    scores = torch.tensor([scores], dtype=torch.float32)
    ap = metrics.average_precision(scores, torch.tensor([relevant]) > 0)
    assert ap.item() == pytest.approx(expected, abs=1e-12)


def random_rankings():
    g = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 12, (40, 30), generator=g).float()      # 12 levels: many ties
    scores[20:] = torch.rand(20, 30, generator=g)
    relevant = torch.rand(40, 30, generator=g) < 0.3
    relevant[3] = False
    return scores, relevant


def test_average_precision_equals_a_loop_with_and_without_ties():
    scores, relevant = random_rankings()
    ap = metrics.average_precision(scores, relevant)
    expected = [slow_ap(s.tolist(), r.tolist()) for s, r in zip(scores, relevant)]
    assert ap.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert ap[3].isnan() and not ap[:3].isnan().any()                 # nothing relevant: nan
    # negative control: breaking ties by position changes the values
    broken = metrics.average_precision(scores - 1e-3 * torch.arange(30), relevant)
    assert (broken[:20] - ap[:20]).abs().nan_to_num().max() > 0.01


def test_average_precision_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, relevant = random_rankings()
    ap = metrics.average_precision(scores, relevant)
    for i in set(range(40)) - {3}:
        expected = sklearn.average_precision_score(relevant[i], scores[i])
        assert ap[i].item() == pytest.approx(expected, abs=1e-9)


def test_retrieval_excludes_the_query_and_does_not_depend_on_the_block():
    g = torch.Generator().manual_seed(2)
    features = torch.randn(50, 6, generator=g).double()
    labels = torch.randint(0, 4, (50,), generator=g)
    features[1] = features[0]                                         # identical: a tie at the top
    labels[-1] = 9                                                    # the only item of its class
    ap = metrics.retrieval(features, labels)
    unit = features / features.norm(dim=1, keepdim=True)
    for i in range(50):
        others = [j for j in range(50) if j != i]
        same = labels[others] == labels[i]
        expected = slow_ap((unit[others] @ unit[i]).tolist(), same.tolist())
        assert ap[i].item() == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert torch.allclose(metrics.retrieval(features, labels, block=7), ap, equal_nan=True)
    # negative control: with the query in its own ranking, AP is higher
    with_self = metrics.average_precision(unit @ unit.T, labels[:, None] == labels)
    assert (with_self - ap)[:-1].mean() > 0.05


def test_retrieval_among_50_000_items_is_exact_in_blocks_of_bounded_size(monkeypatch):
    g, sizes, seen = torch.Generator().manual_seed(2), [], []
    features = torch.randn(50_000, 4, generator=g)
    labels = torch.randint(0, 5000, (50_000,), generator=g)         # few relevant items
    original = metrics.average_precision
    monkeypatch.setattr(metrics, "average_precision",
                        lambda scores, *a: sizes.append(scores.numel()) or original(scores, *a))

    def show(blocks):                                    # a progress bar; here the ends only
        seen.extend(blocks)
        return [blocks[0][:3], blocks[-1][-2:]]

    ap = metrics.retrieval(features, labels, show=show)
    assert torch.cat(seen).tolist() == list(range(50_000))
    assert max(map(len, seen)) * 50_000 <= 2**24 and sizes == [150_000, 100_000]
    unit = torch.nn.functional.normalize(features, dim=1)
    for query, found in zip([0, 1, 2, 49_998, 49_999], ap.tolist()):
        scores = unit @ unit[query]
        scores[query] = -2                               # last, and not relevant
        same = (labels == labels[query]).index_fill(0, torch.tensor(query), False)
        expected = slow_ap(scores.tolist(), same.tolist())
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(ap) == 5


def test_perfect_clusters_give_ap_one():
    labels = torch.arange(30) % 3
    noise = torch.randn(30, 3, generator=torch.Generator().manual_seed(3))
    features = torch.eye(3)[labels] + 0.01 * noise
    assert metrics.retrieval(features, labels).tolist() == [1.0] * 30


def test_chance_is_the_mean_over_all_permutations():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    expected = []
    for i in range(7):
        relevant = (labels[torch.arange(7) != i] == labels[i]).tolist()
        orders = list(itertools.permutations(relevant))
        scores = torch.arange(6, 0, -1.0).expand(len(orders), 6)
        expected.append(metrics.average_precision(scores, torch.tensor(orders)).mean().item())
    assert metrics.chance(labels).tolist() == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_class_means_weight_classes_equally_and_ignore_nan():
    values = torch.tensor([1.0, 3.0, math.nan, 10.0])
    assert metrics.class_means(values, torch.tensor([0, 0, 0, 4])).tolist() == [2.0, 10.0]


# --------------------------------------------------------------------------- segmentation

LABELS = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 1], [2, 2, 2, 255]])
PREDICTED = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 3], [2, 2, 0, 2]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_segmentation_scores_equal_values_computed_by_hand(dtype):
    counts = metrics.confusion(PREDICTED.to(dtype), LABELS.to(dtype), 5)
    assert counts.diag().tolist() == [2, 3, 2, 0, 0] and counts.sum() == 10
    assert counts.sum(1).tolist() == [3, 4, 3, 0, 0] and counts[1, 3] == 1
    scores = metrics.segmentation_scores(counts)
    assert scores["iou"].tolist() == pytest.approx([2 / 4, 3 / 5, 2 / 3, 0, math.nan], nan_ok=True)
    assert scores["miou"] == pytest.approx(0.441667, abs=1e-6)        # class 3: 0; 4: ignored
    assert scores["macc"] == pytest.approx(0.694444, abs=1e-6)        # three classes occur
    assert scores["aacc"] == pytest.approx(0.7)


def test_segmentation_scores_are_ratios_of_sums_not_means_over_images():
    rows = [(p[None], t[None]) for p, t in zip(PREDICTED, LABELS)]
    counts = sum(metrics.confusion(p, t, 5) for p, t in rows)
    assert counts.equal(metrics.confusion(PREDICTED, LABELS, 5))
    mean = sum(metrics.segmentation_scores(metrics.confusion(p, t, 5))["miou"] for p, t in rows) / 3
    assert abs(mean - 0.441667) > 0.01
    # negative control: with 255 as another class the scores are lower
    kept = metrics.confusion(PREDICTED, LABELS.where(LABELS != 255, 4), 5)
    assert metrics.segmentation_scores(kept)["miou"] < 0.44


def test_segmentation_scores_without_labels_are_nan():
    void = torch.full((2, 2), 255)
    scores = metrics.segmentation_scores(metrics.confusion(torch.zeros_like(void), void, 3))
    assert all(math.isnan(scores[key]) for key in ("miou", "macc", "aacc"))


@pytest.mark.parametrize("predicted, labels, message", [
    ([[0, 3]], [[0, 1]], "3 classes, 0 to 2, but predictions are from 0 to 3"),
    ([[0, 1]], [[0, 254]], "3 classes, 0 to 2, but labels are from 0 to 254"),
    ([[0, -1]], [[0, 1]], "predictions are from -1 to 0"),
    ([[0, 1, 1]], [[0, 1]], r"predictions \(1, 3\) and labels \(1, 2\): resize"),
])
def test_confusion_rejects_values_that_are_not_classes(predicted, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.confusion(torch.tensor(predicted), torch.tensor(labels), 3)


# --------------------------------------------------------------------------- videos

def block(size, top, left, bottom, right):
    mask = torch.zeros(*size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("size, rows, columns, shift, j, f", [
    *[((480, 854), (100, 200), (100, 300), shift, j, f) for shift, j, f in (
        (3, .970443, 1), (8, .923077, 1), (12, .886792, .683333), (20, .818182, .656667))],
    *[((60, 80), (10, 30), (10, 40), shift, j, f) for shift, j, f in (
        (1, .935484, 1), (2, .875, .62), (5, .714286, .56))]])
def test_scores_of_a_shifted_block(size, rows, columns, shift, j, f):
    truth = block(size, rows[0], columns[0], rows[1], columns[1])
    predicted = truth.roll(shift, 1)
    assert metrics.jaccard(predicted, truth).item() == pytest.approx(j, abs=1e-6)
    assert metrics.contour_accuracy(predicted, truth) == pytest.approx(f, abs=1e-6)
    if shift == 8:                             # negative control: tolerance of one pixel less
        assert metrics.contour_accuracy(predicted, truth, 7 / math.hypot(*size)) < 0.99


def test_boundary_is_on_the_upper_left_side_and_excludes_the_image_border():
    edge = metrics.find_boundary(block((5, 6), 1, 1, 3, 4))
    rows = ["".join(map(str, row)) for row in edge.int().tolist()]
    assert rows == ["111100", "100100", "111100", "000000", "000000"]
    assert not metrics.find_boundary(torch.ones(4, 5, dtype=torch.bool)).any()
    corner = metrics.find_boundary(block((4, 5), 3, 4, 4, 5)).nonzero().tolist()
    assert corner == [[2, 3], [2, 4], [3, 3]]              # the last pixel is never marked


def test_dilation_is_a_disk_clipped_to_the_image():
    g = torch.Generator().manual_seed(4)
    mask = torch.rand(14, 17, generator=g) < 0.03
    mask[0, 0] = mask[13, 16] = True
    y, x = torch.meshgrid(torch.arange(14), torch.arange(17), indexing="ij")
    for radius in (1, 2, 5):
        slow = torch.zeros_like(mask)
        for v, u in mask.nonzero().tolist():
            slow |= (y - v) ** 2 + (x - u) ** 2 <= radius**2
        assert metrics.dilate(mask, radius).equal(slow)


def test_empty_masks_and_boundaries():
    empty, square = torch.zeros(60, 80).bool(), block((60, 80), 5, 5, 9, 9)
    distant = block((60, 80), 40, 40, 50, 50)
    assert metrics.jaccard(torch.stack([empty, empty, square]),
                           torch.stack([empty, square, square])).tolist() == [1, 0, 1]
    pairs = [(empty, empty), (empty, square), (square, empty), (square, distant), (~empty, empty)]
    assert [metrics.contour_accuracy(*pair) for pair in pairs] == [1, 0, 0, 0, 1]


def video_masks(frames=7):
    """(frames, 60, 80): object 1 moves and is gone after frame 4, object 2 does not move and is
    surrounded by void."""
    masks = torch.zeros(frames, 60, 80, dtype=torch.uint8)
    for t in range(frames):
        if t < 5:
            masks[t, 10:30, 4 * t:4 * t + 20] = 1
        masks[t, 40:50, 50:60] = 255
        masks[t, 42:48, 52:58] = 2
    return masks


def test_a_video_is_scored_by_object_without_its_first_and_last_frame():
    truth = video_masks()
    predicted = truth.where(truth != 255, 0)
    predicted[0] = predicted[-1] = 0                       # these are not scored
    predicted[3][predicted[3] == 2] = 0
    j, f = metrics.score_video(predicted, truth)
    assert j.tolist() == f.tolist() == [[1] * 5, [1, 1, 0, 1, 1]]     # empty in both: 1
    scores = metrics.video_scores([(j, f), (j[:1] * 0.25, f[:1])])
    assert scores["j"] == pytest.approx((1 + 0.8 + 0.25) / 3)         # over objects, not videos
    assert scores["f"] == pytest.approx((1 + 0.8 + 1) / 3)
    assert scores["j&f"] == pytest.approx((scores["j"] + scores["f"]) / 2)
    assert scores["j_recall"] == pytest.approx((1 + 0.8 + 0) / 3)
    # negative control: an object predicted in the void scores lower
    worse, _ = metrics.score_video(truth.where(truth != 255, 2), truth)
    assert worse[1].max() < 0.5


def test_objects_are_those_of_the_first_frame():
    late = video_masks()
    late[3, :5, :5] = 3
    assert len(metrics.score_video(video_masks() % 255, late)[0]) == 2
    with pytest.raises(ValueError, match="object 3 is predicted, but there are only 2"):
        metrics.score_video(late % 255, late)
    with pytest.raises(ValueError, match=r"predictions \(2, 60, 80\) and truth .*3 or more frames"):
        metrics.score_video(late[:2] % 255, late[:2])
    j, f = metrics.score_video(torch.zeros(4, 8, 8).byte(), torch.zeros(4, 8, 8).byte())
    assert j.shape == f.shape == (0, 2)


def test_decay_compares_the_first_quarter_with_the_last():
    assert metrics.quarter_bounds(23) == [0, 6, 11, 17, 22]
    assert metrics.quarter_bounds(68) == [0, 17, 34, 50, 67]
    assert metrics.quarter_bounds(7) == [0, 2, 3, 5, 6]          # half to even: 0 1 3 5 6
    values = torch.tensor([[1, .9, .8, .7, .6, .5, .1]], dtype=torch.float64)
    scores = metrics.video_scores([(values, 1 - values)])
    assert scores["j_decay"] == pytest.approx(0.9 - 0.3) == -scores["f_decay"]
    assert scores["j_recall"] == pytest.approx(5 / 7)      # 0.5 is not above 0.5
    single = torch.tensor([[0.5]], dtype=torch.float64)
    assert metrics.video_scores([(single, single)])["j_decay"] == 0


# --------------------------------------------------------------------------- COCO

JOINTS = [0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16]         # labeled


def person():
    g = torch.Generator().manual_seed(5)
    truth = torch.cat([torch.rand(17, 2, generator=g) * 50 + 20, torch.zeros(17, 1)], 1)
    truth[JOINTS, 2] = 2
    return truth


def test_oks_of_keypoints_three_and_one_pixels_off():
    truth, box, area = person(), torch.tensor([20.0, 20, 70, 80]), torch.tensor(3000.0)
    points = truth + torch.tensor([3.0, -1, 0])
    assert metrics.oks(points, truth, box, area).item() == pytest.approx(0.828134, abs=1e-6)
    # negative control: the mean over all joints, labeled or not
    every = metrics.oks(points, truth + torch.tensor([0, 0, 1]), box, area).item()
    assert abs(every - 0.828134) > 0.001


def test_oks_equals_pycocotools_with_and_without_labeled_keypoints():
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    g = torch.Generator().manual_seed(6)
    unlabeled = torch.zeros(17, 3)
    truths, boxes = torch.stack([person(), unlabeled]), torch.tensor([[20.0, 20, 70, 80],
                                                                   [30, 30, 50, 60]])
    points = torch.rand(3, 17, 3, generator=g) * 120
    points[0] = truths[0] + 2
    ours = metrics.oks(points[:, None], truths, boxes, torch.tensor([3000.0, 900]))  # (3, 2)
    evaluation = cocoeval.COCOeval(iouType="keypoints")
    rows = [dict(keypoints=t.flatten().tolist(), area=a, bbox=[x, y, u - x, v - y])
            for t, a, (x, y, u, v) in zip(truths, (3000, 900), boxes.tolist())]
    evaluation._gts[0, 0] = rows
    evaluation._dts[0, 0] = [dict(keypoints=p.flatten().tolist(), score=3 - i)
                             for i, p in enumerate(points)]
    evaluation.params.imgIds = evaluation.params.catIds = [0]
    assert ours.flatten().tolist() == pytest.approx(evaluation.computeOks(0, 0).flatten().tolist(),
                                                    abs=1e-5)
    assert ours[1, 1] > 0                                  # distance to the enlarged box


def boxes(rows):
    rows = torch.tensor(rows, dtype=torch.float32).view(len(rows), 4)
    return torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:]], 1)


def two_images():
    """Rows x, y, width, height; the categories 1 and 3."""
    truths = [([[10, 10, 40, 40], [60, 60, 30, 30]], [1, 1], [0, 0]),
              ([[0, 0, 50, 50], [20, 20, 20, 20], [50, 0, 50, 100]], [1, 3, 1], [0, 0, 1])]
    found = [([[10, 10, 40, 40], [62, 60, 30, 30]], [.9, .8]),
             ([[0, 60, 10, 10], [0, 0, 50, 40], [60, 10, 20, 20]], [.7, .6, .95])]
    for (rows, labels, crowd), (guesses, scores) in zip(truths, found):
        true, guessed = boxes(rows), boxes(guesses)
        yield tuple(SimpleNamespace(
            boxes=b, areas=(b[:, 2:] - b[:, :2]).prod(1), labels=torch.tensor(c), scores=s,
            crowd=torch.tensor(d) > 0, masks=torch.stack([
                block((100, 100), y, x, v, u) for x, y, u, v in b.int().tolist()]))
            for b, c, s, d in ((true, labels, None, crowd),
                               (guessed, [1] * len(scores), torch.tensor(scores), [])))


EXPECTED = dict(AP=.387376, AP50=.457921, AP75=.457921, APs=.4, APm=.851485, APl=-1, AR1=.166667,
                AR10=.416667, AR100=.416667)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_coco_ap_of_two_images(kind):
    pytest.importorskip("pycocotools")
    scores = metrics.coco_ap(two_images(), kind)
    assert {key: scores[key] for key in EXPECTED} == pytest.approx(EXPECTED, abs=1e-6)


def test_coco_ap_handles_crowds_and_an_empty_set_of_detections(capsys):
    pytest.importorskip("pycocotools")
    pairs = list(two_images())
    pairs[1][0].crowd[:] = False                           # negative control: it counts as a miss
    assert metrics.coco_ap(pairs)["AP"] < 0.38
    for _, found in pairs:
        found.boxes, found.scores, found.labels = torch.zeros(0, 4), torch.zeros(0), []
    assert metrics.coco_ap(pairs)["AP"] == 0 and metrics.coco_ap([])["AP"] == -1
    assert capsys.readouterr().out == ""


def test_keypoint_ap_of_any_number_of_keypoints():
    pytest.importorskip("pycocotools")
    points = torch.rand(1, 5, 3, generator=torch.Generator().manual_seed(7)) * 90 + 1
    truth = SimpleNamespace(points=torch.cat([points, torch.zeros(1, 5, 3)]), boxes=torch.tensor(
        [[0, 0, 99.0, 99]] * 2), areas=torch.tensor([5000.0, 5000]), crowd=torch.zeros(2).bool())
    # d^2 = 25, area 5000 (the box has more): exp(-25 / (2 5000 0.1^2)) = 0.78 is above 6 of 10.
    for shift, ap, ar50 in ((0, 1, 1), (12.5**0.5, 0.6, 1), (500, 0, 0)):
        found = SimpleNamespace(points=points + shift, scores=torch.ones(1))
        scores = metrics.coco_ap([(truth, found)], "keypoints", sigmas=[0.05] * 5)
        assert scores["AP"] == pytest.approx(ap) and scores["AR50"] == pytest.approx(ar50)


def test_coco_ap_without_pycocotools_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match="computed by pycocotools: pip install pycocotools"):
        metrics.coco_ap([])
