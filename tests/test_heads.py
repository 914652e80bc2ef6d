"""Linear and attentive heads against torch.nn, torch.optim and scikit-learn; how settings are
chosen."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib import metrics, rng
from probes import heads
from probes.heads import LINEAR_RECIPES, AttentiveHeads, train_classifier, train_heads


def make_clusters(n=400, width=6, classes=3):
    """x (n, 2, width): two views of images of three classes that are linearly separable, (n,)."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=g)
    return torch.randn(n, 2, width, generator=g) + 3 * torch.eye(width)[y][:, None], y


# ---- linear --------------------------------------------------------------------------------------


def test_recipes_have_the_published_settings():
    columns = ("lr", "batch", "epochs", "warmup", "lars", "standardize")
    recipes = {name: dict(recipe) for name, recipe in LINEAR_RECIPES.items()}
    assert recipes.pop("logreg") == dict(logreg=True, standardize=True)
    assert {name: tuple(r.pop(c) for c in columns) for name, r in recipes.items()} == {
        "mae": (0.1, 16384, 90, 10, True, True), "dino": (1e-3, 1024, 100, 0, False, False),
        "park": (0.1, 1024, 50, 0, False, True), "park paper": (1, 1024, 50, 0, False, True),
        "cae": (0.0125, 8192, 90, 10, False, False), "part": (0.1, 1024, 90, 0, False, False),
        "part attentive": (0.01, 1024, 90, 0, False, False)}
    assert recipes.pop("park paper") == dict(weight_decay=0.05, literal=True)
    assert not any(recipes.values())
    assert (heads.C_VALUES[0], heads.C_VALUES[-1]) == (1e-6, 1e5)           # DINOv2's range


@pytest.mark.parametrize("paper", [False, True])
def test_a_head_trains_as_with_torch_optim(paper):
    (x, y), epochs = make_clusters(360), 7
    recipe = dict(LINEAR_RECIPES["dino"], lr=0.5, warmup=20)              # 20 of 100 epochs
    if paper:                                                             # lr 1, weight decay 0.05
        recipe = dict(LINEAR_RECIPES["park paper"], warmup=10)            # 10 of 50 epochs
    head = train_heads(x, y, 3, recipe, [1.0 if paper else 0.5], epochs, seed=3)
    weight, bias = (p[0].squeeze(1) for p in head.params)

    g = rng.generator(3, "linear")                                        # the same draws, in order
    layer = nn.Linear(6, 3)
    layer.weight.data, layer.bias.data = 0.01 * torch.randn(3, 6, generator=g), torch.zeros(3)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05 * paper)
    peak = 1.0 if paper else 0.5 * (360 // 32) / 256
    step, batch = 0, 360 // 32
    total = epochs * -(-360 // batch)
    warmup = total * 20 // 100
    for _ in range(epochs):
        for index in torch.randperm(360, generator=g).split(batch):
            view = torch.randint(2, (len(index),), generator=g)
            angle = torch.tensor((step - warmup) / (total - warmup) * torch.pi)
            factor = step / warmup if step < warmup else (1 + angle.cos().item()) / 2
            # torch's momentum does not contain lr, as in train_heads: exact for a changing lr
            opt.param_groups[0]["lr"] = peak * factor
            opt.zero_grad()
            F.cross_entropy(layer(x[index, view]), y[index]).backward()
            opt.step()
            step += 1
    assert torch.allclose(weight, layer.weight, atol=1e-5)
    assert torch.allclose(bias, layer.bias, atol=1e-5)


def test_heads_of_several_learning_rates_are_independent():
    (x, y), recipe = make_clusters(), LINEAR_RECIPES["mae"]
    together = train_heads(x, y, 3, recipe, [0.1, 3.0, 1e9], 5, seed=0)  # the last one diverges
    for number, lr in enumerate((0.1, 3.0)):
        alone = train_heads(x, y, 3, recipe, [lr], 5, seed=0)
        for a, b in zip(together.params, alone.params):
            assert torch.allclose(a[number], b[0], atol=1e-5)


def test_lars_follows_its_formula_and_leaves_out_biases():
    g = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 1, generator=g)
    weight[1] = 0                                                         # norm 0: no scaling
    grads = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 1, generator=g)
    momenta = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 1, generator=g)
    lrs = torch.tensor([0.3, 2.0])
    results = {}
    for lars in (True, False):
        p, m = [weight.clone(), bias.clone()], [v.clone() for v in momenta]
        heads.sgd_step(p, grads, m, lrs, lars)
        results[lars] = p
    for head in range(2):
        w, grad = weight[head], grads[0][head]
        q = 0.001 * w.norm() / grad.norm() if head == 0 else 1.0
        step = 0.9 * momenta[0][head] + q * grad
        assert torch.allclose(results[True][0][head], w - lrs[head] * step, atol=1e-6)
        step = 0.9 * momenta[1][head] + grads[1][head]
        assert torch.allclose(results[True][1][head], bias[head] - lrs[head] * step, atol=1e-6)
    assert not torch.allclose(results[True][0][0], results[False][0][0], atol=1e-3)


def test_a_linear_classifier_separates_clusters_and_finds_nothing_in_noise(monkeypatch):
    monkeypatch.setattr(heads, "LR_FACTORS", (300.0,))
    monkeypatch.setattr(heads, "C_VALUES", (1e-3, 1e-2, 1e-1))
    for signal, low, high in ((1, 85, 100), (0, 0, 60)):
        x, y = make_clusters(600)
        x = x if signal else torch.randn(600, 2, 6, generator=torch.Generator().manual_seed(9))
        for recipe in ("mae", "logreg"):
            head = train_classifier(x[:400], y[:400], 3, LINEAR_RECIPES[recipe], 10, seed=0)
            assert low <= head.evaluate(x[400:, 0], y[400:])["top-1"] <= high


def test_the_scale_of_the_features_does_not_matter_where_the_recipe_standardizes(monkeypatch):
    x, y = make_clusters()
    scale, shift = torch.tensor([1e-2, 1, 5, 100, 2e3, 7]), torch.tensor([0., 3, -8, 40, -1e3, 2])
    monkeypatch.setattr(heads, "LR_FACTORS", (1.0,))
    monkeypatch.setattr(heads, "C_VALUES", (1e-2,))
    for name, same in (("mae", True), ("logreg", True), ("dino", False)):   # dino: the control
        one, two = (train_classifier(z, y, 3, LINEAR_RECIPES[name], 3, seed=0).scores(z[:, 0])
                    for z in (x, x * scale + shift))
        assert torch.allclose(one, two, atol=1e-2 * one.std().item()) == same


# ---- logistic regression -------------------------------------------------------------------------


def test_logistic_regressions_are_at_the_minimum_of_their_formula():
    """The gradient of C * sum of cross-entropies + |w|^2 / 2, written out, is 0 for every C."""
    x, y = make_clusters(300, width=8)
    x, values = x[:, 0], (1e-3, 1e-1, 10.0)
    found = heads.fit_logistic_regressions(x, y, 3, values)
    for c, weight, bias in zip(values, *found.params):
        wrong = (x @ weight.T + bias[:, 0]).softmax(1) - F.one_hot(y, 3)
        sums = wrong.T @ x
        assert (sums + weight / c).abs().max() < 0.01 and wrong.sum(0).abs().max() < 0.01
        assert sums.abs().max() > 0.05                   # it is not 0 for the loss alone


def test_logistic_regressions_equal_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", exc_type=ImportError)
    x, y = make_clusters(200, width=20)
    x, values = x[:, 0], (1e-4, 1e-2, 1.0)
    found = heads.fit_logistic_regressions(x, y, 3, values)
    for number, c in enumerate(values):
        reference = linear_model.LogisticRegression(C=c, tol=1e-8, max_iter=2000).fit(x, y)
        p = found(x)[:, number].softmax(1)
        assert abs(p.numpy() - reference.predict_proba(x)).max() < 2e-3
        other = linear_model.LogisticRegression(C=3 * c, tol=1e-8, max_iter=2000).fit(x, y)
        assert abs(p.numpy() - other.predict_proba(x)).max() > 1e-2          # the control


def test_c_is_chosen_by_approximate_solutions_and_the_head_is_the_exact_one(monkeypatch):
    (x, y), calls, fit = make_clusters(60, width=8), [], heads.fit_logistic_regressions

    def record(x, labels, num_classes, c_values, **more):
        calls.append((c_values, more))
        return fit(x, labels, num_classes, c_values, **more)

    monkeypatch.setattr(heads, "fit_logistic_regressions", record)
    found = heads.train_classifier(x, y, 3, dict(logreg=True, standardize=False), None, seed=0)
    assert calls[:-1] == 5 * [(heads.C_VALUES, dict(max_iter=100, tolerance=1e-4))]
    [c], more = calls[-1]
    assert more == {} and found.setting == f"C {c:g}"
    assert torch.equal(found.head.params[0], fit(x[:, 0], y, 3, [c]).params[0])


# ---- choice of the setting -----------------------------------------------------------------------


def test_every_image_is_held_out_once_and_no_head_has_seen_it():
    y = torch.arange(90) % 9                             # ten images of each class
    x, trained = torch.arange(90.)[:, None, None], []

    def fit(rows, values):
        trained.append(rows.tolist())
        seen = torch.zeros(90)
        seen[rows] = 1
        return lambda z: F.one_hot(torch.stack(            # right if it has seen the image
            [torch.where(seen[z[:, 0].long()] > 0, y[z[:, 0].long()], 9)] * len(values), 1), 10)

    correct, how = heads.cross_validate(fit, x, y, (1, 2, 3), seed=0)
    assert correct.shape == (90, 3) and not correct.any()
    assert how == "5 folds of the training images"
    assert len(trained) == 5 and all(len(set(rows)) == 72 for rows in trained)
    assert all(y[rows].bincount().tolist() == [8] * 9 for rows in trained)   # of every class
    held_out = [i for rows in trained for i in set(range(90)) - set(rows)]
    assert sorted(held_out) == list(range(90))


def test_of_many_images_a_tenth_is_held_out(monkeypatch):
    monkeypatch.setattr(heads, "LARGE_SET", 200)
    (x, y), calls = make_clusters(200), []

    def fit(rows, values):
        calls.append(len(rows))
        return heads.fit_logistic_regressions(x[rows, 0], y[rows], 3, values)

    correct, how = heads.cross_validate(fit, x, y, (1e-2, 1.0), seed=0)
    assert calls == [180] and correct.shape == (20, 2) and how == "20 held-out training images"


def test_the_choice_is_the_middle_of_the_best_and_has_a_standard_error():
    names = ["lr 1", "lr 3", "lr 10", "lr 30", "lr 100"]
    percent = torch.tensor([40, 80, 80, 80, 79])
    correct = torch.arange(100)[:, None] < percent
    number, [note] = heads.choose_candidate(correct, names, "5 folds")
    assert number == 2                                   # of 1, 2, 3, which are equally good
    assert note == ("lr 10: 80.0 +- 4.0% (standard error) in 5 folds; 3 of 4 other values are "
                    "within one standard error")
    _, [note] = heads.choose_candidate(torch.zeros(9, 5).bool(), names, "5 folds")
    assert note.startswith("lr 10: 0.0 +- 0.0%") and "; 4 of 4 other values" in note


@pytest.mark.parametrize("best, edge", [(0, True), (1, False), (2, True)])
def test_a_choice_at_the_edge_of_the_range_gets_a_note(best, edge):
    correct = torch.arange(10)[:, None] < torch.tensor([5, 5, 5]) + 3 * F.one_hot(
        torch.tensor(best), 3)
    number, notes = heads.choose_candidate(correct, ["C 1", "C 2", "C 3"], "a tenth")
    assert number == best and len(notes) == 1 + edge
    if edge:
        assert notes[1] == (f"C {best + 1} is at the edge of the range C 1 to C 3: a better value "
                            f"may be outside")


def test_the_setting_is_chosen_after_the_last_epoch_and_trained_on_all_images(monkeypatch):
    """The first candidate is best in the first epoch only: with one epoch it is chosen, with two
    the other one."""
    (x, y), calls = make_clusters(100), []

    def train(x, y, num_classes, recipe, lrs, epochs, seed, make_heads):
        calls.append((len(x), [float(f"{lr:.3g}") for lr in lrs]))
        right = F.one_hot(y, 3)
        good = (lrs[0] < 0.02) == (epochs == 1)
        found = heads.LinearHeads(len(lrs), 6, 3, torch.Generator(), "cpu")
        quality = [good, not good] if len(lrs) == 2 else [good]
        weight = torch.stack([(right.T.float() @ x[:, 0]) * (1 if q else -1) for q in quality])
        found.params = [weight, torch.zeros(len(lrs), 3, 1)]
        return found

    monkeypatch.setattr(heads, "train_heads", train)
    monkeypatch.setattr(heads, "LR_FACTORS", (10, 100))
    for epochs, lr in ((1, 0.01), (2, 0.1)):
        calls.clear()
        found = train_classifier(x, y, 3, LINEAR_RECIPES["dino"], epochs, seed=0)
        assert calls == [(80, [0.01, 0.1])] * 5 + [(100, [lr])]
        assert found.setting == f"lr {lr:g} at batch 256"
        assert found.notes[0].startswith(f"{found.setting}: ") and "edge" in found.notes[1]
        assert found.training == f"SGD, {epochs} epochs"


def test_a_recipe_that_leaves_nothing_open_chooses_nothing(monkeypatch):
    monkeypatch.setattr(heads, "cross_validate", lambda *_: pytest.fail("a choice"))
    x, y = make_clusters(40)
    found = train_classifier(x, y, 3, LINEAR_RECIPES["park paper"], 1, seed=0)
    assert found.setting == "lr 1" and not found.notes


def test_fewer_than_ten_images_are_an_error():
    x, y = torch.zeros(9, 1, 2), torch.zeros(9).long()
    for recipe in ("mae", "logreg"):
        with pytest.raises(ValueError, match="9 are too few; raise --limit"):
            train_classifier(x, y, 2, LINEAR_RECIPES[recipe], 1, seed=0)


# ---- attentive -----------------------------------------------------------------------------------


class Attentive(nn.Module):
    """The attentive head as in the released code, for one learning rate."""

    def __init__(self, width, classes, num_heads):
        super().__init__()
        self.num_heads, self.query = num_heads, nn.Parameter(torch.zeros(width))
        self.q_norm, self.k_norm, self.v_norm = (nn.LayerNorm(width, 1e-6) for _ in range(3))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.bn, self.fc = nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes)

    def forward(self, x):
        def split(z):
            return z.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        query = self.query.expand(len(x), 1, -1)
        q, k, v = (split(layer(norm(z))) for layer, norm, z in (
            (self.q, self.q_norm, query), (self.k, self.k_norm, x), (self.v, self.v_norm, x)))
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]
        return self.fc(self.bn(self.proj(z)))

    def ordered_params(self):
        return [self.query, self.q_norm.weight, self.q_norm.bias, self.k_norm.weight,
                self.v_norm.weight, self.v_norm.bias, self.q.weight, self.q.bias, self.k.weight,
                self.v.weight, self.v.bias, self.proj.weight, self.proj.bias, self.fc.weight,
                self.fc.bias]

    def copy_from(self, attentive_heads, number):
        with torch.no_grad():
            for p, values in zip(self.ordered_params(), attentive_heads.params):
                p.copy_(values[number])


def test_attentive_heads_train_as_the_plain_module():
    g = torch.Generator().manual_seed(7)
    both = AttentiveHeads(2, 128, 3, g, "cpu")
    assert 0.015 < both.params[8].std() < 0.025 and both.params[13].std() < 0.012
    for p in both.params:                                 # away from ones and zeros, heads differ
        p.add_(0.1 * torch.randn(p.shape, generator=g))
    plain = [Attentive(128, 3, 2) for _ in range(2)]
    for i, module in enumerate(plain):
        module.copy_from(both, i)
        module.k_norm.bias.data.normal_(generator=g)      # no effect: cancels in the softmax
    lrs, momenta = torch.tensor([0.1, 0.03]), [torch.zeros_like(p) for p in both.params]
    opts = [torch.optim.SGD(m.parameters(), lr, 0.9) for m, lr in zip(plain, lrs.tolist())]
    for _ in range(3):
        x, y = torch.randn(16, 9, 128, generator=g), torch.randint(3, (16,), generator=g)
        for p in both.params:
            p.requires_grad_()
        scores = both(x, training=True)
        loss = sum(F.cross_entropy(scores[:, i], y) for i in range(2))
        grads = torch.autograd.grad(loss, both.params)
        with torch.no_grad():
            heads.sgd_step(both.params, grads, momenta, lrs, lars=False)
        for i, (module, opt) in enumerate(zip(plain, opts)):
            opt.zero_grad()
            out = module(x)
            F.cross_entropy(out, y).backward()
            opt.step()
            assert torch.allclose(scores[:, i], out, atol=1e-3)
    for p, *expected in zip(both.params, *(m.ordered_params() for m in plain)):
        assert torch.allclose(p, torch.stack(expected), atol=2e-4)
    assert not torch.allclose(both.params[13][0], both.params[13][1], atol=1e-2)


def test_attentive_heads_use_running_statistics_at_test_time():
    g = torch.Generator().manual_seed(8)
    one, module = AttentiveHeads(1, 64, 3, g, "cpu"), Attentive(64, 3, 1)
    module.copy_from(one, 0)
    x = torch.randn(12, 5, 64, generator=g)
    one(x, training=True)
    module(x)
    module.eval()
    assert torch.allclose(one(x)[:, 0], module(x), atol=1e-4)
    assert torch.allclose(one(x)[:1], one(x[:1]), atol=1e-5)         # the batch does not matter


def test_attentive_heads_use_the_statistics_of_the_test_batch_with_bn_batch():
    g = torch.Generator().manual_seed(8)
    module = Attentive(64, 3, 1)                         # in training mode: statistics of the batch
    both = AttentiveHeads(1, 64, 3, g, "cpu", bn="batch")
    module.copy_from(both, 0)
    both(torch.randn(12, 5, 64, generator=g), training=True)
    x, before = torch.randn(12, 5, 64, generator=g), both.state[0].clone()
    assert torch.allclose(both(x)[:, 0], module(x), atol=1e-4) and both.state[0].equal(before)
    assert not torch.allclose(both(x)[:6], both(x[:6]), atol=1e-3)   # the batch matters


def test_a_width_that_is_no_multiple_of_64_has_fewer_attention_heads():
    g = torch.Generator().manual_seed(8)
    one, module = AttentiveHeads(1, 200, 3, g, "cpu"), Attentive(200, 3, 2)      # 200 / 64 = 3.1
    module.copy_from(one, 0)
    x = torch.randn(12, 5, 200, generator=g)
    one(x, training=True)
    module(x)
    module.eval()
    assert torch.allclose(one(x)[:, 0], module(x), atol=1e-4)


def test_no_batch_of_the_attentive_head_is_a_single_image():
    """With --bn batch its features, minus their own mean, would be 0."""
    g = torch.Generator().manual_seed(8)
    head = AttentiveHeads(1, 64, 3, g, "cpu", bn="batch")
    scores = heads.Classifier(head, 0, 1, "", [], "").scores(torch.randn(257, 2, 64, generator=g))
    assert scores.shape == (257, 3) and scores.abs().amin(1).min() > 0


@pytest.mark.slow
def test_the_attentive_head_finds_a_class_that_only_one_token_contains():
    g = torch.Generator().manual_seed(9)
    y = torch.randint(2, (400,), generator=g)
    x, place = torch.randn(400, 6, 64, generator=g), torch.randint(6, (400,), generator=g)
    x[torch.arange(400), place, :2] += 12 * F.one_hot(y, 2)          # one salient token of six
    recipe = LINEAR_RECIPES["part attentive"]
    head, control = (train_classifier(x[:300, None], labels, 2, recipe, 6, 0, AttentiveHeads)
                     for labels in (y[:300], y[:300].roll(1)))       # control: shuffled labels
    assert head.evaluate(x[300:], y[300:])["top-1"] > 90
    assert control.evaluate(x[300:], y[300:])["top-1"] < 75


def test_the_attentive_head_learns_from_few_images():
    g = torch.Generator().manual_seed(10)
    y = torch.arange(400) % 2
    x = torch.randn(400, 6, 64, generator=g) + 3 * F.one_hot(y, 64)[:, None]
    for n, expected in ((54, {16, 6}), (49, {16})):      # 49 = 3 x 16 + 1
        sizes = set()

        class Counting(AttentiveHeads):
            def __call__(self, x, training=False, sizes=sizes):
                sizes.update([len(x)] * training)
                return super().__call__(x, training)

        found = train_heads(x[:n, None], y[:n], 2, LINEAR_RECIPES["cae"], [0.4], 10, 0, Counting)
        assert sizes == expected                         # no batch of a single image
        assert metrics.accuracy(found(x[n:])[:, 0], y[n:])["top-1"] > 90
