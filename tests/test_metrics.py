"""Metrics against brute-force loops, scikit-learn, and numbers worked out by hand."""
import itertools
import math

import pytest
import torch

import metrics


def on_circle(similarities):
    """Unit vectors whose dot product with (1, 0) is the given number."""
    s = torch.tensor(similarities, dtype=torch.float64)
    return torch.stack([s, (1 - s * s).sqrt()], 1)


def slow_ap(scores, relevant):
    """Precision at each relevant item, counted by comparing scores: the definition."""
    hits = [i for i, r in enumerate(relevant) if r]
    total = 0.0
    for i in hits:
        level = [j for j, s in enumerate(scores) if s >= scores[i]]
        total += sum(relevant[j] for j in level) / len(level)
    return total / len(hits) if hits else math.nan


# --------------------------------------------------------------------------- nearest neighbours

def test_three_votes_lose_against_one_close_neighbour():
    similarity = torch.tensor([[0.9, 0.8, 0.79, 0.78]], dtype=torch.float64)
    votes = metrics.votes(similarity, torch.tensor([[0, 1, 1, 1]]), 2) * math.exp(0.9 / 0.07)
    assert votes.round().tolist() == [[383518, 240655]]
    bank, query = on_circle([.9, .8, .79, .78, .1]), on_circle([1.0])
    labels = torch.tensor([0, 1, 1, 1, 0])
    assert metrics.knn(bank, labels, query, k=(4,))[4].tolist() == [0]
    # negative control: with a flat temperature the majority wins
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


def test_knn_survives_a_tiny_temperature():
    bank, labels = on_circle([.9, .8]).float(), torch.tensor([1, 0])
    assert metrics.knn(bank, labels, on_circle([1.0]).float(), k=(2,), tau=1e-3)[2].tolist() == [1]


# --------------------------------------------------------------------------- accuracy

def test_accuracy_counts_the_top_n_and_copes_with_three_classes():
    scores = torch.tensor([[.1, .7, .2], [.5, .3, .2], [.2, .3, .5], [.1, .2, .7]])
    labels = torch.tensor([1, 1, 2, 0])
    assert metrics.accuracy(scores, labels, top=(1, 2, 5)) == [50.0, 75.0, 100.0]


# --------------------------------------------------------------------------- average precision

@pytest.mark.parametrize("scores, relevant, expected", [
    ([6, 5, 4, 3, 2, 1], [1, 0, 1, 0, 0, 1], (1 + 2 / 3 + 3 / 6) / 3),
    ([.9, .5, .5, .5], [1, 0, 0, 1], 0.75),                  # a three-way tie is one step
    ([.5, .5, .5, .9], [0, 1, 0, 1], 0.75),                  # ... in whatever order it comes
    ([2, 1], [0, 1], 0.5),
    ([1, 1, 1], [1, 0, 0], 1 / 3),
])
def test_average_precision_worked_out_by_hand(scores, relevant, expected):
    scores = torch.tensor([scores], dtype=torch.float32)
    ap = metrics.average_precision(scores, torch.tensor([relevant]) > 0)
    assert ap.item() == pytest.approx(expected, abs=1e-12)


def many_lists():
    g = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 12, (40, 30), generator=g).float()      # 12 levels: many ties
    scores[20:] = torch.rand(20, 30, generator=g)
    relevant = torch.rand(40, 30, generator=g) < 0.3
    relevant[3] = False
    return scores, relevant


def test_average_precision_equals_a_loop_with_and_without_ties():
    scores, relevant = many_lists()
    ap = metrics.average_precision(scores, relevant)
    expected = [slow_ap(s.tolist(), r.tolist()) for s, r in zip(scores, relevant)]
    assert ap.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert ap[3].isnan() and not ap[:3].isnan().any()                 # none relevant: no AP
    # negative control: breaking ties by position gives other numbers
    tilted = metrics.average_precision(scores - 1e-3 * torch.arange(30), relevant)
    assert (tilted[:20] - ap[:20]).abs().nan_to_num().max() > 0.01


def test_average_precision_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, relevant = many_lists()
    ap = metrics.average_precision(scores, relevant)
    for i in set(range(40)) - {3}:
        expected = sklearn.average_precision_score(relevant[i], scores[i])
        assert ap[i].item() == pytest.approx(expected, abs=1e-9)


def test_retrieval_leaves_the_query_out_and_does_not_depend_on_the_block():
    g = torch.Generator().manual_seed(2)
    features = torch.randn(50, 6, generator=g).double()
    labels = torch.randint(0, 4, (50,), generator=g)
    features[1] = features[0]                                         # identical: a tie at the top
    labels[-1] = 9                                                    # nobody shares this class
    ap = metrics.retrieval(features, labels)
    unit = features / features.norm(dim=1, keepdim=True)
    for i in range(50):
        others = [j for j in range(50) if j != i]
        same = labels[others] == labels[i]
        expected = slow_ap((unit[others] @ unit[i]).tolist(), same.tolist())
        assert ap[i].item() == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert torch.allclose(metrics.retrieval(features, labels, block=7), ap, equal_nan=True)
    # negative control: with itself in the list, a query's AP is flattered
    with_self = metrics.average_precision(unit @ unit.T, labels[:, None] == labels)
    assert (with_self - ap)[:-1].mean() > 0.05


def test_perfect_clusters_give_ap_one():
    labels = torch.arange(30) % 3
    noise = torch.randn(30, 3, generator=torch.Generator().manual_seed(3))
    features = torch.eye(3)[labels] + 0.01 * noise
    assert metrics.retrieval(features, labels).tolist() == [1.0] * 30


def test_chance_is_the_mean_over_all_orders():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    expected = []
    for i in range(7):
        relevant = (labels[torch.arange(7) != i] == labels[i]).tolist()
        orders = list(itertools.permutations(relevant))
        scores = torch.arange(6, 0, -1.0).expand(len(orders), 6)
        expected.append(metrics.average_precision(scores, torch.tensor(orders)).mean().item())
    assert metrics.chance(labels).tolist() == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_class_means_weigh_classes_equally_and_skip_nan():
    values = torch.tensor([1.0, 3.0, math.nan, 10.0])
    assert metrics.class_means(values, torch.tensor([0, 0, 0, 4])).tolist() == [2.0, 10.0]
