"""Metrics: pure functions of tensors, features in, numbers out. They know no model and no data set.

Letters: Q queries, M items they are compared with, D width, C classes; T frames, K objects, P
key-points, H, W pixels.
"""
import contextlib
import io
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F


def report(rows, protocol, notes=(), **images):
    """What a probe returns. rows: {feature: {column: percent}}; images: their number, by role."""
    return SimpleNamespace(rows=rows, protocol=protocol, notes=list(notes), images=images)


def votes(similarity, labels, classes, tau=0.07):
    """Class scores of weighted nearest neighbours: each neighbour adds exp(s / tau) to its class.

    It is not a majority vote: one close neighbour outweighs several a little farther away.
    similarity, labels: (Q, k) of the k neighbours -> (Q, classes). A row is given in units of its
    nearest neighbour's weight, which changes no decision and lets tau be as small as one likes.
    Source: Wu et al. 2018, section 3.4; DINO's kNN evaluation uses the same rule.
    """
    weights = ((similarity - similarity.amax(1, keepdim=True)) / tau).exp()
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)


def knn(bank, bank_labels, queries, k=(10, 20), tau=0.07, classes=None, chunk=256):
    """Weighted k-nearest-neighbour classification by cosine similarity.

    bank: (M, D), bank_labels: (M,) int64, queries: (Q, D) -> {k: predicted labels (Q,)}.
    A k above M is clipped to M. Memory grows with chunk * M, not with Q * M.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = classes or int(bank_labels.max()) + 1
    predicted = {n: [] for n in k}
    for q in queries.split(chunk):                                # by size: 7 queries work, too
        similarity, nearest = (q @ bank.T).topk(min(max(k), len(bank)), dim=1)    # best first
        for n in k:
            score = votes(similarity[:, :n], bank_labels[nearest[:, :n]], classes, tau)
            predicted[n].append(score.argmax(1))
    return {n: torch.cat(p) for n, p in predicted.items()}


def accuracy(scores, labels, top=(1, 5)):
    """scores: (Q, C), labels: (Q,) -> [top-1, top-5] in percent. If C < 5, top-5 is top-C."""
    best = scores.topk(min(max(top), scores.shape[1]), dim=1).indices == labels[:, None]
    return [100 * best[:, :n].any(1).double().mean().item() for n in top]


def average_precision(scores, relevant):
    """AP of ranked lists: the mean, over a query's relevant items, of the precision at their rank.

    scores: (Q, M), higher is better; relevant: (Q, M) bool -> (Q,) float64, nan where nothing is
    relevant. Items of equal score form one step, with the precision taken after the whole group, so
    the result depends on the scores alone and never on the order in which the items were given.
    """
    scores, order = scores.sort(dim=1)                            # ascending: a group begins where
    relevant = relevant.gather(1, order)                          # searchsorted finds its score
    first = torch.searchsorted(scores, scores)                    # (Q, M)
    hits = relevant.flip(1).cumsum(1).flip(1).gather(1, first)    # relevant items as good or better
    precision = hits / (scores.shape[1] - first).double()         # ... out of all as good or better
    return (precision * relevant).sum(1) / relevant.sum(1)


def retrieval(features, labels, block=1024):
    """Every item asks for the others of its class, by cosine similarity -> AP of each, (M,).

    features: (M, D), labels: (M,). The query is not in its own list. nan: nobody shares its class.
    At most `block` of them ask at a time, with about a gigabyte of working memory.
    """
    features = F.normalize(features, dim=1)
    block = max(1, min(block, 2**24 // len(features)))
    aps = []
    for index in torch.arange(len(features), device=features.device).split(block):
        scores = features[index] @ features.T                     # (block, M)
        relevant = labels[index, None] == labels
        row = torch.arange(len(index), device=index.device)
        scores[row, index] = -torch.inf                           # last and not relevant:
        relevant[row, index] = False                              # as if it were not there
        aps.append(average_precision(scores, relevant))
    return torch.cat(aps)


def class_means(values, labels):
    """Mean of values (M,) over each class, nan left out -> (number of classes present,)."""
    return torch.stack([values[labels == c].nanmean() for c in labels.unique()])


def chance(labels):
    """What `retrieval` gives on average when the ranking is random: (M,) float64.

    P of the n = M - 1 others are relevant. Up to a relevant item of rank r there are, it included,
    1 + (r - 1) p of them on average, with p = (P - 1)/(n - 1); over r its precision has the mean
    p + (1 - p) H_n / n, H_n being the harmonic number.
    """
    n = len(labels) - 1
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).sum().item()
    _, inverse, count = labels.unique(return_inverse=True, return_counts=True)
    relevant = count[inverse].double() - 1                        # P of each item
    p = (relevant - 1) / max(n - 1, 1)
    return torch.where(relevant > 0, p + (1 - p) * harmonic / max(n, 1), torch.nan)


def f1_sweep(similarity, same, thresholds):
    """F1 of the decision "same, if more similar than T", for each T, over all pairs together.

    similarity, same (bool): of one shape -> (number of thresholds,) float64. F1 = 2 TP / (2 TP +
    FP + FN); to say "same" to every pair gives 2 p / (1 + p), p being the share of equal pairs.
    """
    scores = []
    for t in thresholds:
        said = similarity > t
        hit, wrong = (said & same).sum().double(), (said != same).sum().double()    # FP + FN
        scores.append(2 * hit / (2 * hit + wrong).clamp(min=1))
    return torch.stack(scores)


def revisited(ranking, positives, junk, ks=(1, 5, 10)):
    """AP and precision at k of one query, as the revisited Oxford and Paris benchmarks count them.

    ranking: (M,) item numbers, the most similar first; positives, junk: (any,) item numbers. Junk
    is taken out of the ranking. AP is the area under the curve of precision over recall, by the
    trapezoid rule; positives that are not in the ranking count as not found. Precision at k: k is
    at most the rank of the last positive. -> AP, [precision at k]; nan without a positive.
    """
    ranking = ranking[~torch.isin(ranking, junk)]
    ranks = torch.isin(ranking, positives).nonzero()[:, 0].double()     # from 0
    if not len(positives) or not len(ranks):
        return (0.0, [0.0] * len(ks)) if len(positives) else (torch.nan, [torch.nan] * len(ks))
    found = torch.arange(len(ranks), dtype=torch.float64, device=ranks.device)
    before = torch.where(ranks == 0, 1.0, found / ranks)                # precision left of each hit
    ap = ((before + (found + 1) / (ranks + 1)) / 2).sum() / len(positives)
    reach = [min(k, int(ranks[-1]) + 1) for k in ks]
    return ap.item(), [(ranks < k).sum().item() / k for k in reach]


def shape_bias(decided, shapes, textures):
    """decided, shapes, textures: (n,) categories -> {shape: share of its decisions for the shape
    among those for shape or texture (nan: no such)}, share of decisions that are either."""
    shape, texture = decided == shapes, decided == textures
    bias = {}
    for c in shapes.unique().tolist():
        by_shape, by_texture = (x[shapes == c].sum().item() for x in (shape, texture))
        bias[c] = by_shape / (by_shape + by_texture) if by_shape + by_texture else torch.nan
    return bias, (shape | texture).double().mean().item()


# ---- a class for every pixel ---------------------------------------------------------------------


def confusion(predicted, labels, classes):
    """Pixels by label (row) and prediction (column): (C, C) int64. Where the label is 255, none.

    predicted, labels: integer tensors of one shape, the image's own. Over a data set, add them up:
    the scores are ratios of sums. ValueError: other shapes, a number that is no class.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"Predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)}: "
                         "resize the predictions to the size of the labels")
    counted = labels != 255
    labels, predicted = labels[counted].long(), predicted[counted].long()
    for what, x in (("label", labels), ("prediction", predicted)):
        if len(x) and not 0 <= x.min() <= x.max() < classes:
            raise ValueError(f"There are {classes} classes, 0 to {classes - 1}, but {what}s from "
                             f"{x.min()} to {x.max()}")
    return (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)


def segmentation_scores(counts):
    """Sum of `confusion` over all images -> dict of fractions: miou, macc, aacc (all pixels).

    Also iou, acc: (C,) float64, nan where 0/0: such a class is left out of the mean. One that never
    occurs but is predicted has IoU 0, which counts, and no accuracy. Source: Long et al., 2015.
    """
    hit, label, predicted = counts.diag().double(), counts.sum(1).double(), counts.sum(0).double()
    iou, acc = hit / (label + predicted - hit), hit / label
    return {"miou": iou.nanmean().item(), "macc": acc.nanmean().item(),
            "aacc": (hit.sum() / label.sum()).item(), "iou": iou, "acc": acc}


# ---- masks of objects, in films ------------------------------------------------------------------


def jaccard(a, b):
    """J, region similarity: IoU of masks (..., H, W) bool -> (...) float64; two empty ones: 1."""
    union = (a | b).sum((-2, -1)).double()
    return torch.where(union > 0, (a & b).sum((-2, -1)) / union, 1.0)


def boundary(mask):
    """Where a mask (..., H, W) bool differs from its right, lower or lower-right neighbour.

    Neighbours outside of the image do not count: a full mask has no boundary.
    """
    out = torch.zeros_like(mask)
    out[..., :-1] |= mask[..., :-1] ^ mask[..., 1:]
    out[..., :-1, :] |= mask[..., :-1, :] ^ mask[..., 1:, :]
    out[..., :-1, :-1] |= mask[..., :-1, :-1] ^ mask[..., 1:, 1:]
    return out


def dilate(mask, radius):
    """(H, W) bool -> what is at most `radius` pixels from it."""
    wide = F.pad(mask, (radius,) * 4)
    dy, dx = torch.cartesian_prod(*[torch.arange(-radius, radius + 1, device=mask.device)] * 2).T
    disk = (dy * wide.shape[1] + dx)[dy**2 + dx**2 <= radius**2]
    out = torch.zeros_like(wide).flatten()
    out[(wide.flatten().nonzero() + disk).flatten()] = True         # (points, pixels of the disk)
    return out.view_as(wide)[radius:-radius, radius:-radius]


def contour(predicted, truth, tolerance=0.008):
    """F, the contour accuracy of a mask (H, W) bool: a float; tolerance: of the image's diagonal.

    A boundary pixel is right if the other boundary is within ceil(tolerance * diagonal) pixels; F
    is the harmonic mean of the shares of right ones. No boundary in both: 1. In one: 0.
    """
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    edges = [boundary(predicted), boundary(truth)]
    sizes = [edge.sum().item() for edge in edges]
    if not all(sizes):
        return float(not any(sizes))
    precision, recall = ((edge & dilate(other, radius)).sum().item() / size
                         for edge, other, size in zip(edges, edges[::-1], sizes))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def film_scores(predicted, truth):
    """J and F of the objects of a film, each (K, T - 2) float64: all frames but the first and last.

    predicted, truth: (T, H, W) integers, 0 = background. The objects are 1 ... the largest number
    in truth[0]; void, 255, is background. ValueError: fewer than three frames, other shapes, an
    object predicted that is not there. Source: the DAVIS-2017 semi-supervised evaluation.
    """
    truth = truth.where(truth != 255, 0)
    K = int(truth[0].max())
    if predicted.shape != truth.shape or len(truth) < 3:
        raise ValueError(f"Predictions {tuple(predicted.shape)} and truth {tuple(truth.shape)}: "
                         "give both as (T, H, W), with T of 3 or more")
    if predicted.max() > K:
        raise ValueError(f"Object {predicted.max()} is predicted, but there are only {K}")
    pairs = [(predicted[1:-1] == k, truth[1:-1] == k) for k in range(1, K + 1)]
    j = [jaccard(*pair).cpu() for pair in pairs]
    f = [torch.tensor([contour(*frame) for frame in zip(*pair)], dtype=torch.float64)
         for pair in pairs]
    none = torch.zeros(0, len(truth) - 2, dtype=torch.float64)
    return (torch.stack(j), torch.stack(f)) if K else (none, none)


def quarters(n):
    """Borders of the quarters of n frames: linspace(1, n, 5) rounded half up, less 1."""
    return [(i * (n - 1) + 2) // 4 for i in range(5)]


def video_scores(films):
    """[(J, F) of each film] -> dict of fractions: means over the objects of all films.

    j, f: mean over frames; j&f: of both. j_recall, f_recall: frames above 0.5. j_decay, f_decay:
    mean of the first quarter less mean of the last; borders belong to both of their quarters.
    """
    scores = {}
    for what, sequences in zip("jf", zip(*films)):
        objects = [values for sequence in sequences for values in sequence]     # (T - 2,) each
        for key, of_object in (
                (what, lambda x: x.mean()), (f"{what}_recall", lambda x: (x > 0.5).double().mean()),
                (f"{what}_decay", lambda x: x[:quarters(len(x))[1] + 1].mean()
                 - x[quarters(len(x))[3]:].mean())):
            scores[key] = torch.stack([of_object(x) for x in objects]).mean().item()
    return {"j&f": (scores["j"] + scores["f"]) / 2} | scores


# ---- COCO's average precision --------------------------------------------------------------------

SIGMAS = [sigma / 1000 for sigma in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87,
                                     89, 89)]                       # how far annotators disagree


def oks(points, truth, boxes, areas, sigmas=SIGMAS):
    """Object key-point similarity: mean of exp(-d^2 / (2 area (2 sigma)^2)) over labelled joints.

    points (..., P, 2 or 3), truth (..., P, 3) with v > 0 where labelled, boxes (..., 4) x0 y0 x1
    y1, areas (...) of the truth; they broadcast -> (...). Where nothing is labelled, d is how far
    a point lies outside of the box widened by its own size on all sides, over all points.
    """
    labelled = truth[..., 2] > 0
    size = boxes[..., 2:] - boxes[..., :2]
    low, high = (boxes[..., :2] - size)[..., None, :], (boxes[..., 2:] + size)[..., None, :]
    outside = (low - points[..., :2]).clamp(min=0) + (points[..., :2] - high).clamp(min=0)
    none = ~labelled.any(-1, keepdim=True)
    d = torch.where(none[..., None], outside, points[..., :2] - truth[..., :2])
    variance = (2 * torch.tensor(sigmas, dtype=d.dtype, device=d.device)) ** 2
    similarity = (-d.square().sum(-1) / (2 * variance * areas[..., None])).exp()
    counted = labelled | none
    return (similarity * counted).sum(-1) / counted.sum(-1)


def coco_ap(images, kind="bbox", sigmas=SIGMAS):
    """COCO's AP and AR as pycocotools has them: dict of fractions, -1 where there is no truth.

    images: iterable of (truth, found), a pair an image; each an object or item of readers with
      truth  boxes (K, 4) x0 y0 x1 y1, areas (K,) of the masks, crowd (K,) bool
      found  scores (M,); boxes (M, 4) if kind is "bbox"
      both   labels (K,), (M,) int64, without them all are of one class; of kind "segm" masks
             (n, H, W) bool, or a list of n run lengths as pycocotools encodes them; of kind
             "keypoints" points (n, P, 3), v of the found ones is not used
    Images are taken one at a time and kept as run lengths: a generator saves memory.
    """
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ValueError("COCO's AP is computed by pycocotools: pip install pycocotools") from None

    def shape(of, k):
        if kind == "segm" and isinstance(of.masks, list):
            return {"segmentation": of.masks[k]}
        if kind == "segm":                  # uint8, columns first, is what the encoder reads
            return {"segmentation": mask.encode(np.asfortranarray(of.masks[k].cpu().byte()))}
        if kind == "keypoints":
            return {"keypoints": of.points[k].flatten().tolist()}
        return {"bbox": corner_and_size(of.boxes[k])}

    def corner_and_size(box):
        x0, y0, x1, y1 = box.double().tolist()
        return [x0, y0, x1 - x0, y1 - y0]

    def label(of, k):
        return int(of.labels[k]) if hasattr(of, "labels") else 0

    truths, results, sizes = [], [], []
    for number, (truth, found) in enumerate(images):
        sizes.append({"id": number, "height": 0, "width": 0})       # not looked at, but asked for
        for k in range(len(truth.boxes)):   # an id of 0 would mean: matched to nobody
            truths.append({
                "id": len(truths) + 1, "image_id": number, "category_id": label(truth, k),
                "bbox": corner_and_size(truth.boxes[k]), "area": float(truth.areas[k]),
                "iscrowd": int(truth.crowd[k]), **shape(truth, k)})
            if kind == "keypoints":
                truths[-1]["num_keypoints"] = int((truth.points[k][:, 2] > 0).sum())
        results += [{"image_id": number, "category_id": label(found, k),
                     "score": float(found.scores[k]), **shape(found, k)}
                    for k in range(len(found.scores))]
    with contextlib.redirect_stdout(io.StringIO()):                 # it tells of every step
        truth, found = COCO(), COCO()
        truth.dataset = {"images": sizes, "annotations": truths, "categories": [
            {"id": c} for c in sorted({a["category_id"] for a in truths + results})]}
        truth.createIndex()
        found.dataset = truth.dataset | {"annotations": []}
        found.createIndex()                 # loadRes takes no empty list
        evaluation = COCOeval(truth, truth.loadRes(results) if results else found, kind)
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP AP50 AP75 APm APl AR AR50 AR75 ARm ARl" if kind == "keypoints" else
             "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl").split()
    return dict(zip(names, map(float, evaluation.stats)))
