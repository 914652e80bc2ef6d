"""Metrics: pure functions of tensors, features in, numbers out. They know no model and no data set.

Letters: Q queries, M items they are compared with, D width, C classes.
"""
import torch
import torch.nn.functional as F


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


def retrieval(features, labels, block=1024, queries=None):
    """Every item asks for the others of its class, by cosine similarity -> AP of each, (M,).

    features: (M, D), labels: (M,). The query is not in its own list. nan: nobody shares its class.
    queries: (Q,) numbers of the items that ask -> (Q,); default: all. At most `block` of them, and
    about a gigabyte of working memory, at a time.
    """
    features = F.normalize(features, dim=1)
    block = max(1, min(block, 2**24 // len(features)))
    aps = []
    asking = torch.arange(len(features)) if queries is None else queries
    for index in asking.to(features.device).split(block):
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
