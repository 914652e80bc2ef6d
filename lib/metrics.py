"""Metrics: pure functions of tensors, independent of models and data sets.

    predicted = metrics.knn(bank, bank_labels, queries, k=(20,))[20]      # (queries,) class labels
    ap = metrics.retrieval(features, labels)                              # (items,), nan: no match

Shapes: D width of a feature, C classes; other dimensions are written as words.
"""
import contextlib
import io
import math

import numpy as np
import torch
import torch.nn.functional as F


def sum_votes(similarity, labels, classes, tau=0.07):
    """Class scores from the k nearest neighbors: each adds exp(similarity / tau) to its class.

    This is not a majority vote: one close neighbor can outweigh several that are slightly farther.
    similarity, labels: (queries, k) -> (queries, C). Each row is divided by its largest weight,
    which does not change any decision and prevents overflow for a small tau.
    Source: Wu et al. 2018, section 3.4; DINO's kNN evaluation uses the same rule.
    """
    weights = ((similarity - similarity.amax(1, keepdim=True)) / tau).exp()
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)


def knn(bank, bank_labels, queries, k=(10, 20), tau=0.07, classes=None, chunk=256):
    """Weighted k-nearest-neighbor classification by cosine similarity.

    bank: (items, D), bank_labels: (items,) int64, queries: (queries, D) -> {k: predicted labels
    (queries,)}. A k above the number of items is clipped to it. classes: number of classes;
    default: largest label + 1. Memory is proportional to chunk * items, not to queries * items.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = classes or int(bank_labels.max()) + 1
    predicted = {n: [] for n in k}
    for q in queries.split(chunk):
        similarity, nearest = (q @ bank.T).topk(min(max(k), len(bank)), dim=1)    # best first
        for n in k:
            score = sum_votes(similarity[:, :n], bank_labels[nearest[:, :n]], classes, tau)
            predicted[n].append(score.argmax(1))
    return {n: torch.cat(p) for n, p in predicted.items()}


def ridge(bank, bank_labels, queries):
    """Linear classification in closed form: ridge regression of one-hot labels.

    The features are standardized. The regularization is the one of 15 strengths with the smallest
    squared leave-one-out error on the bank, which has a closed form too (PRESS, Allen 1974).
    bank: (items, D), bank_labels: (items,) int64, queries: (queries, D) -> predicted labels
    (queries,). Computed in float64.
    """
    x, q = bank.double(), queries.double()
    x, q = x - x.mean(0), q - x.mean(0)
    std = x.square().mean(0).sqrt()
    varies = std > 1e-6 * std.max()
    x, q = (z[:, varies] / std[varies] for z in (x, q))
    y = F.one_hot(bank_labels).double()
    frequency = y.mean(0)                                           # (C,)
    if not varies.any():
        return frequency.argmax().expand(len(q))
    # x = U diag(s) V'. From the smaller of x'x and xx', since both have the eigenvalues s^2.
    if x.shape[1] < len(x):
        s, V = torch.linalg.eigh(x.T @ x)
        s = s.clamp(min=1e-9 * len(x)).sqrt()
        U = x @ V / s
    else:
        s, U = torch.linalg.eigh(x @ x.T)
        s, U = s[1:].clamp(min=1e-9 * len(x)).sqrt(), U[:, 1:]      # the mean is 0: one s is 0
        V = x.T @ U / s
    target = U.T @ (y - frequency)                                  # (rank, C)
    best = math.inf
    for strength in s.square().mean() * torch.logspace(-4, 3, 15, dtype=s.dtype, device=s.device):
        shrink = s.square() / (s.square() + strength)
        leverage = (U.square() * shrink).sum(1, keepdim=True) + 1 / len(x)
        residual = (y - frequency - U @ (shrink[:, None] * target)) / (1 - leverage)
        if (error := residual.square().sum()) < best:
            best, weight = error, V @ (target * (shrink / s)[:, None])       # (D, C)
    return (q @ weight + frequency).argmax(1)


def accuracy(scores, labels, top=(1, 5)):
    """Top-n accuracies {"top-1": percent ...}, for each n in `top`. Without those that are 100 for
    any scores, of n >= C, except top-1.

    scores: (queries, C), labels: (queries,).
    """
    top = [n for n in top if n == 1 or n < scores.shape[1]]
    best = scores.topk(max(top), dim=1).indices == labels[:, None]
    return {f"top-{n}": 100 * best[:, :n].any(1).double().mean().item() for n in top}


def average_precision(scores, relevant):
    """AP of ranked lists: the mean, over a query's relevant items, of the precision at their rank.

    scores: (queries, items), higher is better; relevant: same shape, bool -> (queries,) float64,
    nan for a query without a relevant item. Items of equal score form one group, and the precision
    is taken after the whole group: the result does not depend on the order of the items.
    """
    scores, order = scores.sort(dim=1)                            # ascending
    relevant = relevant.gather(1, order)
    first = torch.searchsorted(scores, scores)                    # start of each item's group
    hits = relevant.flip(1).cumsum(1).flip(1).gather(1, first)    # relevant, score equal or higher
    precision = hits / (scores.shape[1] - first).double()         # hits / all, equal or higher
    return (precision * relevant).sum(1) / relevant.sum(1)


def retrieval(features, labels, block=1024, show=list):
    """Average precision of each item as a query for the other items of its class, by cosine.

    features: (items, D), labels: (items,) -> (items,) float64, nan if there is no other item of the
    class. A query is not in its own ranking. At most `block` queries are processed at a time, and
    fewer for many items, so that the working memory stays near one gigabyte. show: wraps the list
    of blocks, such as in a progress bar.
    """
    features = F.normalize(features, dim=1)
    block = max(1, min(block, 2**24 // len(features)))
    aps = []
    for index in show(torch.arange(len(features), device=features.device).split(block)):
        scores = features[index] @ features.T                     # (block, items)
        relevant = labels[index, None] == labels
        row = torch.arange(len(index), device=index.device)
        scores[row, index] = -torch.inf                           # the query itself is ranked last
        relevant[row, index] = False                              # and not relevant: no effect
        aps.append(average_precision(scores, relevant))
    return torch.cat(aps)


def class_means(values, labels):
    """Mean of values (items,) over each class, nan left out -> (number of classes present,)."""
    return torch.stack([values[labels == c].nanmean() for c in labels.unique()])


def chance(labels):
    """Expected value of `retrieval` for a random ranking: (items,) float64.

    Let R of the n = items - 1 others be relevant. The first r ranks, up to and with a relevant
    item, hold 1 + (r - 1) p relevant items on average, with p = (R - 1)/(n - 1). Averaged over r,
    the precision is p + (1 - p) h_n / n, where h_n is the n-th harmonic number.
    """
    n = len(labels) - 1
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).sum().item()
    _, inverse, count = labels.unique(return_inverse=True, return_counts=True)
    relevant = count[inverse].double() - 1                        # R of each item
    p = (relevant - 1) / max(n - 1, 1)
    return torch.where(relevant > 0, p + (1 - p) * harmonic / max(n, 1), torch.nan)


def f1_sweep(similarity, same, thresholds):
    """F1 of the classifier "same class if similarity > t", for each threshold t, over all pairs.

    similarity, same (bool): of the same shape -> (number of thresholds,) float64. F1 = 2 TP / (2 TP
    + FP + FN). Predicting "same" for every pair gives 2 p / (1 + p), p being the fraction of pairs
    that are the same.
    """
    scores = []
    for t in thresholds:
        positive = similarity > t
        hits = (positive & same).sum().double()                   # TP
        errors = (positive != same).sum().double()                # FP + FN
        scores.append(2 * hits / (2 * hits + errors).clamp(min=1))
    return torch.stack(scores)


def revisited(ranking, positives, junk, ks=(1, 5, 10)):
    """AP and precision at k of one query, as in the revisited Oxford and Paris benchmarks.

    ranking: (items,) item indices, the most similar first; positives, junk: 1-d item indices. Junk
    is removed from the ranking. AP is the area under the precision-recall curve by the trapezoid
    rule; positives that are not in the ranking have precision 0. In precision at k, k is at most
    the rank of the last positive. Returns AP, [precision at k]; nan if there is no positive.
    """
    ranking = ranking[~torch.isin(ranking, junk)]
    ranks = torch.isin(ranking, positives).nonzero()[:, 0].double()     # from 0
    if not len(positives) or not len(ranks):
        return (0.0, [0.0] * len(ks)) if len(positives) else (torch.nan, [torch.nan] * len(ks))
    hits = torch.arange(len(ranks), dtype=torch.float64, device=ranks.device)
    before = torch.where(ranks == 0, 1.0, hits / ranks)            # precision just before each hit
    ap = ((before + (hits + 1) / (ranks + 1)) / 2).sum() / len(positives)
    clipped = [min(k, int(ranks[-1]) + 1) for k in ks]
    return ap.item(), [(ranks < k).sum().item() / k for k in clipped]


def shape_bias(predicted, shapes, textures):
    """Shape bias of the predictions for cue-conflict images, by shape category.

    predicted, shapes, textures: (images,) categories -> {shape category: of the predictions that
    are the shape or the texture of the image, the fraction that are the shape (nan: there are
    none)}, and the fraction of all predictions that are the shape or the texture.
    """
    shape, texture = predicted == shapes, predicted == textures
    bias = {}
    for c in shapes.unique().tolist():
        by_shape, by_texture = (x[shapes == c].sum().item() for x in (shape, texture))
        bias[c] = by_shape / (by_shape + by_texture) if by_shape + by_texture else torch.nan
    return bias, (shape | texture).double().mean().item()


# ---- a class for every pixel ---------------------------------------------------------------------


def confusion(predicted, labels, classes):
    """Confusion matrix: pixels by label (row) and prediction (column), (C, C) int64.

    predicted, labels: integer tensors with the shape of the image. Pixels of label 255 are ignored.
    Sum the matrices over a data set, because the scores are ratios of sums. ValueError: shapes
    differ, or a value is not a class.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)}: "
                         "resize the predictions to the size of the labels")
    counted = labels != 255
    labels, predicted = labels[counted].long(), predicted[counted].long()
    for what, x in (("label", labels), ("prediction", predicted)):
        if len(x) and not 0 <= x.min() <= x.max() < classes:
            raise ValueError(f"there are {classes} classes, 0 to {classes - 1}, but {what}s are "
                             f"from {x.min()} to {x.max()}")
    return (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)


def segmentation_scores(counts):
    """Sum of `confusion` over all images -> dict of fractions: miou, macc, aacc (all pixels).

    Also iou, acc: (C,) float64, nan where 0/0; the means ignore nan. A class that is predicted but
    never occurs has IoU 0, which enters the mean, and accuracy nan. Source: Long et al., 2015.
    """
    hit, label, predicted = counts.diag().double(), counts.sum(1).double(), counts.sum(0).double()
    iou, acc = hit / (label + predicted - hit), hit / label
    return {"miou": iou.nanmean().item(), "macc": acc.nanmean().item(),
            "aacc": (hit.sum() / label.sum()).item(), "iou": iou, "acc": acc}


# ---- masks of objects in videos ------------------------------------------------------------------


def jaccard(a, b):
    """J, region similarity: IoU of masks (..., height, width) bool -> (...) float64.

    Two empty masks have IoU 1.
    """
    union = (a | b).sum((-2, -1)).double()
    return torch.where(union > 0, (a & b).sum((-2, -1)) / union, 1.0)


def find_boundary(mask):
    """Pixels where a mask (..., height, width) bool differs from the right, lower or lower-right
    neighbor. Neighbors outside the image are ignored: a full mask has no boundary."""
    out = torch.zeros_like(mask)
    out[..., :-1] |= mask[..., :-1] ^ mask[..., 1:]
    out[..., :-1, :] |= mask[..., :-1, :] ^ mask[..., 1:, :]
    out[..., :-1, :-1] |= mask[..., :-1, :-1] ^ mask[..., 1:, 1:]
    return out


def dilate(mask, radius):
    """(height, width) bool -> the pixels at most `radius` pixels from the mask."""
    wide = F.pad(mask, (radius,) * 4)
    dy, dx = torch.cartesian_prod(*[torch.arange(-radius, radius + 1, device=mask.device)] * 2).T
    disk = (dy * wide.shape[1] + dx)[dy**2 + dx**2 <= radius**2]
    out = torch.zeros_like(wide).flatten()
    out[(wide.flatten().nonzero() + disk).flatten()] = True       # (pixels of mask, pixels of disk)
    return out.view_as(wide)[radius:-radius, radius:-radius]


def contour_accuracy(predicted, truth, tolerance=0.008):
    """F, the contour accuracy of a mask (height, width) bool -> float.

    A boundary pixel is correct if the other boundary is at most ceil(tolerance * diagonal of the
    image) pixels away. F is the harmonic mean of the fractions of correct pixels (precision and
    recall). F is 1 if neither mask has a boundary, 0 if only one has one.
    """
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    edges = [find_boundary(predicted), find_boundary(truth)]
    sizes = [edge.sum().item() for edge in edges]
    if not all(sizes):
        return float(not any(sizes))
    precision, recall = ((edge & dilate(other, radius)).sum().item() / size
                         for edge, other, size in zip(edges, edges[::-1], sizes))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def score_video(predicted, truth):
    """J and F of each object and frame of a video, two (objects, frames - 2) float64 tensors.

    predicted, truth: (frames, height, width) integers, 0 = background. The first and the last frame
    are not scored. The objects are 1 ... the largest number in truth[0]; 255 (void) counts as
    background. ValueError: fewer than three frames, shapes that differ, a predicted object that
    does not exist. Source: the DAVIS-2017 semi-supervised evaluation.
    """
    truth = truth.where(truth != 255, 0)
    n_objects = int(truth[0].max())
    if predicted.shape != truth.shape or len(truth) < 3:
        raise ValueError(f"predictions {tuple(predicted.shape)} and truth {tuple(truth.shape)}: "
                         "both must be (frames, height, width), with 3 or more frames")
    if predicted.max() > n_objects:
        raise ValueError(f"object {predicted.max()} is predicted, but there are only {n_objects}")
    pairs = [(predicted[1:-1] == k, truth[1:-1] == k) for k in range(1, n_objects + 1)]
    j = [jaccard(*pair).cpu() for pair in pairs]
    f = [torch.tensor([contour_accuracy(*frame) for frame in zip(*pair)], dtype=torch.float64)
         for pair in pairs]
    none = torch.zeros(0, len(truth) - 2, dtype=torch.float64)
    return (torch.stack(j), torch.stack(f)) if n_objects else (none, none)


def quarter_bounds(n):
    """The five bounds of the quarters of n frames, from 0: linspace(1, n, 5) rounded half up, minus
    1.
    """
    return [(i * (n - 1) + 2) // 4 for i in range(5)]


def decay(values):
    """Mean over the first quarter of the frames minus mean over the last. Bounds are in both
    quarters that they separate."""
    bounds = quarter_bounds(len(values))
    return values[:bounds[1] + 1].mean() - values[bounds[3]:].mean()


def video_scores(videos):
    """[(J, F) of each video] -> dict of fractions, each a mean over the objects of all videos.

    j, f: mean over frames; j&f: mean of the two. j_recall, f_recall: fraction of frames above 0.5.
    j_decay, f_decay: see `decay`.
    """
    statistics = {"": torch.mean, "_recall": lambda x: (x > 0.5).double().mean(), "_decay": decay}
    scores = {}
    for name, measure in zip("jf", zip(*videos)):
        objects = [values for video in measure for values in video]             # (frames - 2,) each
        for suffix, statistic in statistics.items():
            scores[name + suffix] = torch.stack([statistic(x) for x in objects]).mean().item()
    return {"j&f": (scores["j"] + scores["f"]) / 2} | scores


# ---- COCO's average precision --------------------------------------------------------------------

SIGMAS = [sigma / 1000 for sigma in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87,
                                     89, 89)]    # of COCO's 17 joints: spread between annotators


def oks(points, truth, boxes, areas, sigmas=SIGMAS):
    """Object keypoint similarity: mean of exp(-d^2 / (2 area (2 sigma)^2)) over labeled keypoints.

    points (..., keypoints, 2 or 3), truth (..., keypoints, 3) with v > 0 where labeled; boxes
    (..., 4) x0 y0 x1 y1 and areas (...) of the truth. They broadcast -> (...). If no keypoint is
    labeled, the mean is over all keypoints, and d is the distance of a point to the box enlarged by
    its width and height on all sides (0 inside).
    """
    labeled = truth[..., 2] > 0
    size = boxes[..., 2:] - boxes[..., :2]
    low, high = (boxes[..., :2] - size)[..., None, :], (boxes[..., 2:] + size)[..., None, :]
    outside = (low - points[..., :2]).clamp(min=0) + (points[..., :2] - high).clamp(min=0)
    none = ~labeled.any(-1, keepdim=True)
    d = torch.where(none[..., None], outside, points[..., :2] - truth[..., :2])
    variance = (2 * torch.tensor(sigmas, dtype=d.dtype, device=d.device)) ** 2
    similarity = (-d.square().sum(-1) / (2 * variance * areas[..., None])).exp()
    counted = labeled | none
    return (similarity * counted).sum(-1) / counted.sum(-1)


def coco_ap(images, kind="bbox", sigmas=SIGMAS):
    """COCO's AP and AR, computed by pycocotools: dict of fractions, -1 if there is no ground truth.

    images: iterable of pairs (truth, found), one for each image; both have attributes, for n
    objects or detections:
      truth  boxes (n, 4) x0 y0 x1 y1, areas (n,) of the masks, crowd (n,) bool
      found  scores (n,); boxes (n, 4) if kind is "bbox"
      both   labels (n,) int64 (optional; default: a single class); if kind is "segm", masks
             (n, height, width) bool or a list of n run-length encodings of pycocotools; if kind is
             "keypoints", points (n, keypoints, 3), where v of a detection is ignored
    Masks are run-length encoded one image at a time, so a generator saves memory. ValueError if
    pycocotools is not installed.
    """
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ValueError("COCO's AP is computed by pycocotools: pip install pycocotools") from None

    def annotation(item, k):
        if kind == "segm" and isinstance(item.masks, list):
            return {"segmentation": item.masks[k]}
        if kind == "segm":                  # the encoder reads uint8 in column-major order
            return {"segmentation": mask.encode(np.asfortranarray(item.masks[k].cpu().byte()))}
        if kind == "keypoints":
            return {"keypoints": item.points[k].flatten().tolist()}
        return {"bbox": corner_and_size(item.boxes[k])}

    def corner_and_size(box):
        x0, y0, x1, y1 = box.double().tolist()
        return [x0, y0, x1 - x0, y1 - y0]

    def label(item, k):
        return int(item.labels[k]) if hasattr(item, "labels") else 0

    truths, results, sizes = [], [], []
    for image_id, (truth, found) in enumerate(images):
        sizes.append({"id": image_id, "height": 0, "width": 0})       # required, but not used
        for k in range(len(truth.boxes)):   # ids start at 1: 0 means "not matched"
            truths.append({
                "id": len(truths) + 1, "image_id": image_id, "category_id": label(truth, k),
                "bbox": corner_and_size(truth.boxes[k]), "area": float(truth.areas[k]),
                "iscrowd": int(truth.crowd[k]), **annotation(truth, k)})
            if kind == "keypoints":
                truths[-1]["num_keypoints"] = int((truth.points[k][:, 2] > 0).sum())
        results += [{"image_id": image_id, "category_id": label(found, k),
                     "score": float(found.scores[k]), **annotation(found, k)}
                    for k in range(len(found.scores))]
    with contextlib.redirect_stdout(io.StringIO()):                 # pycocotools prints each step
        truth, found = COCO(), COCO()
        truth.dataset = {"images": sizes, "annotations": truths, "categories": [
            {"id": c} for c in sorted({a["category_id"] for a in truths + results})]}
        truth.createIndex()
        found.dataset = truth.dataset | {"annotations": []}
        found.createIndex()                 # loadRes fails for an empty list
        evaluation = COCOeval(truth, truth.loadRes(results) if results else found, kind)
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP AP50 AP75 APm APl AR AR50 AR75 ARm ARl" if kind == "keypoints" else
             "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl").split()
    return dict(zip(names, map(float, evaluation.stats)))
