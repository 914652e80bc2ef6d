"""Linear and attentive heads against torch.nn and torch.optim; what the held-out images choose."""
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
    assert {name: tuple(r[c] for c in columns) for name, r in LINEAR_RECIPES.items()} == {
        "mae": (0.1, 16384, 90, 10, True, True), "dino": (1e-3, 1024, 100, 0, False, False),
        "park": (0.1, 1024, 50, 0, False, True), "park paper": (1, 1024, 50, 0, False, True),
        "cae": (0.0125, 8192, 90, 10, False, False), "part": (0.1, 1024, 90, 0, False, False),
        "part attentive": (0.01, 1024, 90, 0, False, False)}
    others = {name: {key: r[key] for key in r.keys() - set(columns)}
              for name, r in LINEAR_RECIPES.items()}
    assert others.pop("park paper") == dict(weight_decay=0.05, literal=True)
    assert not any(others.values())


@pytest.mark.parametrize("paper", [False, True])
def test_a_head_trains_as_with_torch_optim(monkeypatch, paper):
    (x, y), epochs = make_clusters(), 7
    recipe = dict(LINEAR_RECIPES["dino"], lr=0.5, warmup=20)              # 20 of 100 epochs
    if paper:                                                             # lr 1, weight decay 0.05
        recipe = dict(LINEAR_RECIPES["park paper"], warmup=10)            # 10 of 50 epochs
    else:
        monkeypatch.setattr(heads, "LR_FACTORS", (1.0,))
    _, last, lr, _ = train_heads(x, y, 3, recipe, epochs, seed=3)
    weight, bias = (p[0].squeeze(1) for p in last.params)

    g = rng.generator(3, "linear")                                        # the same draws, in order
    train = torch.randperm(400, generator=g)[40:]
    layer = nn.Linear(6, 3)
    layer.weight.data, layer.bias.data = 0.01 * torch.randn(3, 6, generator=g), torch.zeros(3)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05 * paper)
    peak = 1.0 if paper else 0.5 * (360 // 32) / 256
    step, batch = 0, 360 // 32
    total = epochs * -(-360 // batch)
    warmup = total * 20 // 100
    for _ in range(epochs):
        for index in train[torch.randperm(360, generator=g)].split(batch):
            view = torch.randint(2, (len(index),), generator=g)
            angle = torch.tensor((step - warmup) / (total - warmup) * torch.pi)
            factor = step / warmup if step < warmup else (1 + angle.cos().item()) / 2
            # torch's momentum does not contain lr, as in train_heads: exact for a changing lr
            opt.param_groups[0]["lr"] = peak * factor
            opt.zero_grad()
            F.cross_entropy(layer(x[index, view]), y[index]).backward()
            opt.step()
            step += 1
    assert lr == (1.0 if paper else 0.5)
    assert torch.allclose(weight, layer.weight, atol=1e-5)
    assert torch.allclose(bias, layer.bias, atol=1e-5)


def test_lr_and_epoch_are_chosen_on_images_without_training(monkeypatch):
    """If these are labeled wrong, the best head is the one that has learned least."""
    monkeypatch.setattr(heads, "LR_FACTORS", (1.0, 1e-3))
    (x, y), recipe = make_clusters(width=60), dict(LINEAR_RECIPES["dino"], lr=1.0)
    held_out = torch.randperm(400, generator=rng.generator(0, "linear"))[:40]
    for shift, chosen in ((0, 1.0), (1, 1e-3)):          # without a shift: the control
        y[held_out] = (y[held_out] + shift) % 3
        head = train_classifier(x, y, 3, recipe, 5, seed=0)
        best, last = (
            100 * (head.scores(x[held_out, 0], of).argmax(1) == y[held_out]).double().mean().item()
            for of in (head.best, head.last))
        row = head.evaluate(x[held_out, 0], y[held_out])
        assert (row["top-1"], row["last epoch"]) == pytest.approx((best, last))
        assert head.lr == chosen and best >= last
    assert head.epoch == 1 and best > last + 10


def test_heads_of_the_sweep_are_independent(monkeypatch):
    (x, y), recipe = make_clusters(), LINEAR_RECIPES["mae"]
    best, last, lr, epoch = train_heads(x, y, 3, recipe, 5, seed=0)
    monkeypatch.setattr(heads, "LR_FACTORS", (lr / recipe["lr"],))
    alone, alone_last, same_lr, same_epoch = train_heads(x, y, 3, recipe, 5, seed=0)
    assert (lr, epoch) == (same_lr, same_epoch)
    for a, b in zip(best.params + last.params, alone.params + alone_last.params):
        assert torch.allclose(a, b, atol=1e-5)


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


def test_a_linear_classifier_separates_clusters_and_finds_nothing_in_noise():
    for signal, low, high in ((1, 85, 100), (0, 0, 60)):
        x, y = make_clusters(600)
        x = x if signal else torch.randn(600, 2, 6, generator=torch.Generator().manual_seed(9))
        best, *_ = train_heads(x[:400], y[:400], 3, LINEAR_RECIPES["mae"], 20, seed=0)
        assert low <= metrics.accuracy(best(x[400:, 0])[:, 0], y[400:])[0] <= high


def test_the_scale_of_the_features_does_not_matter_where_the_recipe_standardizes():
    x, y = make_clusters()
    scale, shift = torch.tensor([1e-2, 1, 5, 100, 2e3, 7]), torch.tensor([0., 3, -8, 40, -1e3, 2])
    for name, same in (("mae", True), ("park", True), ("dino", False)):     # dino: the control
        one, two = (train_classifier(z, y, 3, LINEAR_RECIPES[name], 3, seed=0).scores(z[:, 0])
                    for z in (x, x * scale + shift))
        assert torch.allclose(one, two, atol=1e-2 * one.std().item()) == same


def test_fewer_than_ten_images_are_an_error():
    with pytest.raises(ValueError, match="9 are too few"):
        x, y = torch.zeros(9, 1, 2), torch.zeros(9).long()
        train_heads(x, y, 2, LINEAR_RECIPES["mae"], 1, seed=0)


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
    head = heads.copy_head(both, 0)
    assert torch.allclose(head(x)[:, 0], module(x), atol=1e-4) and both.state[0].equal(before)
    assert not torch.allclose(head(x)[:6], head(x[:6]), atol=1e-3)   # the batch matters


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


@pytest.mark.parametrize("n", [60, 54])                  # 54 to train on; 49 = 3 x 16 + 1
def test_the_attentive_head_learns_from_few_images(n):
    g = torch.Generator().manual_seed(10)
    y = torch.arange(400) % 2
    x = torch.randn(400, 6, 64, generator=g) + 3 * F.one_hot(y, 64)[:, None]
    sizes = set()

    class Counting(AttentiveHeads):
        def __call__(self, x, training=False):
            sizes.update([len(x)] * training)
            return super().__call__(x, training)

    head = train_classifier(x[:n, None], y[:n], 2, LINEAR_RECIPES["cae"], 10, 0, Counting)
    assert sizes == ({16, 6} if n == 60 else {16})       # no batch of a single image
    assert head.evaluate(x[n:], y[n:])["top-1"] > 90
