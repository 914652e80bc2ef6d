"""Projection heads against the networks that made them, heads against torch.nn, probes against
oracles and chance, and every task once from the command line."""
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dino
import evaluate
import hybrid
import ibot
import mmc
import moco_v3
import selfpatch
import vit
from lib import augment, checkpoints, config, metrics, rng, toy
from probes import annotations, common

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
NET = "--data imagenet --img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 2".split()


@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def model(**config):
    torch.manual_seed(0)
    encoder = vit.ViT(**{**SMALL, **config}).eval()
    source = SimpleNamespace(path=None, branch=None, heads={})
    return SimpleNamespace(name="small", encoder=encoder, size=32, mean=augment.MEAN, std=augment.STD,
                           interpolation="bicubic", source=source)


def settings(*flags):
    args = evaluate.parse([*flags, "--device", "cpu", "--precision", "fp32", "--workers", "0"])
    args.data = args.data or "toy"
    return args


def shaken(network):
    """Away from the initial weights and statistics, which hide mistakes: zeros, ones, 0.02."""
    for p in network.parameters():
        p.add_(0.3 * torch.randn_like(p))
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.add_(0.3 * torch.rand_like(buffer))
    return network.eval()


# ---- projected features --------------------------------------------------------------------------


def networks():
    """Method, flags -> the network, its heads as saved, and what they make of tokens (B, L, D)."""
    def moco(n):
        return (dict(projector=n.projector, predictor=n.predictor), lambda t: n.projector(t[:, 0]))

    def head(n):
        return dict(head=n.head), lambda t: n.head(t[:, 0])

    def of_mmc(n):
        return dict(cls=n.head_cls, pat=n.head_pat), lambda t: n.head_cls(t[:, 0])

    def patches(n):
        return (dict(ca_head=n.ca_head, c_head=n.c_head, p_head=n.p_head),
                lambda t: n.c_head(n.aggregate(t)[:, 0]))

    def both(n):
        return (dict(decoder=n.decoder, projector=n.projector, predictor=n.predictor),
                lambda t: n.projector(t[:, 0]))

    mlp = "--hidden 32 --out-dim 16"
    logits = "--hidden 32 --bottleneck 12 --out-dim 40"
    own = f"{logits} --shared-head false"
    return [(moco_v3, mlp, moco), (dino, logits, head), (dino, f"{logits} --bn-in-head true", head),
            (ibot, logits, head), (ibot, own, head), (mmc, mlp, of_mmc),
            (selfpatch, f"{logits} --out-dim-pat 8", patches),
            (hybrid, f"{mlp} --mask-block 16", both)]


@pytest.mark.parametrize("method, flags, parts", networks())
def test_projected_features_are_those_of_the_methods_own_network(tmp_path, method, flags, parts):
    cfg = config.parse(method.Config, [*NET, *flags.split()])
    teacher = {} if method is mmc else {"teacher": method is selfpatch}
    network = shaken(method.Network(cfg, **teacher))
    heads, expected = parts(network)
    path = tmp_path / "encoder.pt"
    checkpoints.save_encoder(path, network.backbone,
                     heads={name: head.state_dict() for name, head in heads.items()})
    encoder, x = checkpoints.load_encoder(path, quiet=True), torch.randn(5, 3, 32, 32)
    z, tokens = common.projected(encoder, x), encoder(x)
    expected = expected(tokens)
    whole = checkpoints.projector(encoder, narrow=False)(tokens)
    assert torch.allclose(whole, expected, atol=1e-5, rtol=1e-4)
    assert torch.allclose(z["projected"] @ z["projected"].T, expected @ expected.T, rtol=1e-4,
                          atol=1e-4)                      # narrow or not: the same geometry
    assert z["projected"].shape[1] == (16 if expected.shape[1] == 16 else 12)
    assert not torch.allclose(whole[0], whole[1], rtol=1e-2)               # images do differ
    assert z["cls"].equal(evaluate.pooled(encoder, x)["cls"])
    name = next(name for name in ("projector", "head", "cls", "c_head") if name in heads)
    key = next(key for key in heads[name].state_dict() if key.endswith("weight"))
    encoder.source.heads[name][key] *= -1                 # control: the first layer matters
    other = checkpoints.projector(encoder, narrow=False)(tokens)
    assert not torch.allclose(other, expected, rtol=1e-2)


def official_backbone(prefix, **config):
    network = shaken(vit.ViT(**{**SMALL, **config}))
    for name, p in network.named_parameters():
        if name == "pos_embed" and config.get("pos", "").startswith("sincos"):
            p.copy_(vit.ViT(**{**SMALL, **config}).pos_embed)
    return {f"{prefix}{key}": value for key, value in network.state_dict().items()}


def test_projector_of_the_official_moco_v3_file(tmp_path):
    def norm(x, n, affine=True):
        scale = (head[f"{n}.running_var"] + 1e-5).rsqrt()
        x = (x - head[f"{n}.running_mean"]) * scale
        return x * head[f"{n}.weight"] + head[f"{n}.bias"] if affine else x

    widths, head = {0: (24, 40), 3: (40, 40), 6: (40, 16)}, {}
    for n, (i, o) in widths.items():
        head[f"{n}.weight"] = torch.randn(o, i)
        head |= {f"{n + 1}.running_mean": torch.randn(o), f"{n + 1}.running_var": torch.rand(o) + 1,
                 f"{n + 1}.num_batches_tracked": torch.tensor(7)}
        if n < 6:
            head |= {f"{n + 1}.weight": torch.randn(o), f"{n + 1}.bias": torch.randn(o)}
    state = official_backbone("module.base_encoder.", pos="sincos_row", num_heads=12)
    state |= {f"module.base_encoder.head.{key}": value for key, value in head.items()}
    state |= {f"module.predictor.{n}.weight": torch.randn(8, 8) for n in (0, 3)}
    torch.save({"state_dict": state}, tmp_path / "vit-b-300ep.pth.tar")
    encoder = checkpoints.load_encoder(tmp_path / "vit-b-300ep.pth.tar", quiet=True)
    x = torch.randn(4, 3, 32, 32)
    z = encoder(x)[:, 0]
    for n in (0, 3, 6):
        z = norm(z @ head[f"{n}.weight"].T, n + 1, n < 6)
        z = z.clamp(min=0) if n < 6 else z
    assert torch.allclose(common.projected(encoder, x)["projected"], z, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("loss", ["dino_loss", "ibot_loss"])
@pytest.mark.parametrize("form", ["weight norm", "parametrization", "plain"])
def test_heads_of_the_official_dino_and_ibot_files(tmp_path, loss, form):
    last = nn.Linear(6, 50, bias=False)
    if form == "weight norm":
        last = nn.utils.weight_norm(last)                 # as the official code, deprecated or not
        last.weight_g.mul_(torch.rand(50, 1) + 0.5)
    if form == "parametrization":
        last = nn.utils.parametrizations.weight_norm(last)
    mlp = nn.Sequential(nn.Linear(24, 10), nn.GELU(), nn.Linear(10, 10), nn.GELU(),
                        nn.Linear(10, 6))
    head = {f"mlp.{key}": value for key, value in mlp.state_dict().items()}
    head |= {f"last_layer.{key}": value for key, value in last.state_dict().items()}
    if loss == "ibot_loss":                               # a shared head is listed twice
        head |= {key.replace("layer.", "layer2."): x for key, x in head.items() if "last" in key}
    raw = {loss: {}, "epoch": 100}
    for branch, prefix in (("teacher", ""), ("student", "module.")):
        raw[branch] = official_backbone(f"{prefix}backbone.", num_heads=1)
        raw[branch] |= {f"{prefix}head.{key}": value for key, value in head.items()}
    torch.save(raw, tmp_path / "full.pth")
    encoder, x = checkpoints.load_encoder(tmp_path / "full.pth", quiet=True), torch.randn(4, 3, 32, 32)
    expected = last(F.normalize(mlp(encoder(x)[:, 0]), dim=1))              # (4, 50) logits
    found = checkpoints.projector(encoder, narrow=False)(encoder(x))
    assert torch.allclose(found, expected, atol=1e-5)
    narrow = common.projected(encoder, x)["projected"]                    # (4, 6)
    assert narrow.shape == (4, 6)
    assert torch.allclose(torch.cdist(narrow, narrow), torch.cdist(expected, expected), atol=1e-4)


def test_no_head_is_none_and_an_odd_one_an_error_with_its_keys():
    m = model()
    assert checkpoints.projector(m.encoder) is None               # never saved
    m.encoder.source = SimpleNamespace(path="x.pt", heads={"decoder": {"weight": torch.ones(1)}})
    assert checkpoints.projector(m.encoder) is None and "projected" not in common.projected(
        m.encoder, torch.randn(1, 3, 32, 32))
    m.encoder.source.heads = {"head": {"mlp.weight": torch.ones(2, 2)}}
    with pytest.raises(ValueError, match="x.pt: cannot rebuild the head with the keys mlp.weight"):
        checkpoints.projector(m.encoder)


def test_asking_for_projected_features_that_are_not_there_is_an_error():
    with pytest.raises(ValueError, match="small has no projection head in its checkpoint"):
        evaluate.knn(model(), settings("--feature", "projected", "--limit", "10"))


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives, junk, ap, at", [
    ([0, 1], [3], 0.791667, [1, 2 / 3, 2 / 3]),
    ([5, 4], [], 0.216667, [0, 0.2, 1 / 3]),
    ([9], [3], 0.0, [0, 0, 0]),                           # never found
])
def test_revisited_ap_has_the_values_of_the_official_tool(positives, junk, ap, at):
    ranking = torch.tensor([3, 0, 5, 1, 2, 4])
    found, precision = metrics.revisited(ranking, torch.tensor(positives), torch.tensor(junk))
    assert found == pytest.approx(ap, abs=1e-6) and precision == pytest.approx(at)
    kept, _ = metrics.revisited(ranking, torch.tensor(positives), torch.tensor([]))
    assert (kept < found - 0.1) == (junk == [3] and ap > 0)         # control: junk does count


def test_revisited_ap_without_a_positive_is_left_out_of_the_mean():
    ap, at = metrics.revisited(torch.arange(4), torch.tensor([]), torch.tensor([1]))
    assert math.isnan(ap) and all(map(math.isnan, at))


def test_revisited_ap_is_the_area_under_the_trapezoids():
    g = torch.Generator().manual_seed(4)
    for _ in range(10):
        ranking, positives = torch.randperm(30, generator=g), torch.randperm(30, generator=g)[:6]
        area, recall, hits = 0.0, 0.0, 0
        for n, item in enumerate(ranking.tolist(), 1):    # walk down the list
            hits += item in positives
            if item in positives:
                left = 1.0 if n == 1 else (hits - 1) / (n - 1)
                area += (hits / 6 - recall) * (left + hits / n) / 2
                recall = hits / 6
        found, _ = metrics.revisited(ranking, positives, torch.tensor([]))
        assert found == pytest.approx(area, abs=1e-12)


def test_f1_equals_scikit_learn_and_the_floor_of_always_yes():
    g = torch.Generator().manual_seed(5)
    same = torch.rand(400, generator=g) < 0.3
    similarity = torch.rand(400, generator=g) * 0.6 + 0.3 * same
    thresholds = [0.1, 0.35, 0.5, 0.95]
    found = metrics.f1_sweep(similarity, same, thresholds)
    for t, f1 in zip(thresholds, found.tolist()):
        said, tp = similarity > t, ((similarity > t) & same).sum().item()
        expected = 2 * tp / max(1, said.sum().item() + same.sum().item())
        assert f1 == pytest.approx(expected, abs=1e-12)
    share = torch.tensor([True] + [False] * 4).repeat(30)
    assert metrics.f1_sweep(torch.ones(150), share, [0.5]).item() == pytest.approx(1 / 3)
    sklearn = pytest.importorskip("sklearn.metrics")
    for t, f1 in zip(thresholds, found.tolist()):
        assert f1 == pytest.approx(sklearn.f1_score(same, similarity > t, zero_division=0))


def test_mean_ap_of_retrieval_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(6)
    z, y = torch.randn(60, 5, generator=g).double(), torch.randint(0, 4, (60,), generator=g)
    unit = z / z.norm(dim=1, keepdim=True)
    expected = [sklearn.average_precision_score(
        (y[others] == y[i]).numpy(), (unit[others] @ unit[i]).numpy())
        for i in range(60) for others in [torch.arange(60) != i]]
    assert metrics.retrieval(z, y).mean().item() == pytest.approx(sum(expected) / 60, abs=1e-9)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.slow
def test_retrieval_among_6000_never_holds_the_whole_matrix():
    z, y = torch.randn(6000, 8), torch.arange(6000) % 10
    with Largest() as largest:
        ap = metrics.retrieval(z, y, block=10**9)
    assert len(ap) == 6000 and largest.elements <= 2**24            # all of it: 3.6e7
    assert ap.mean().item() == pytest.approx(metrics.chance(y)[0].item(), abs=0.01)


def test_shape_bias_counts_only_decisions_for_one_of_the_two():
    shapes, textures = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 2, 0, 2, 0])
    decided = torch.tensor([0, 1, 1, 0, 1, 1])
    bias, either = metrics.shape_bias(decided, shapes, textures)
    assert bias[0] == 0.5 and bias[1] == 0.5 and math.isnan(bias[2])
    assert either == pytest.approx(4 / 6)


# ---- heads ---------------------------------------------------------------------------------------


class Attentive(nn.Module):
    """The attentive head as the released code builds it, for one learning rate."""

    def __init__(self, width, classes, heads):
        super().__init__()
        self.heads, self.query = heads, nn.Parameter(torch.zeros(width))
        self.q_norm, self.k_norm, self.v_norm = (nn.LayerNorm(width, 1e-6) for _ in range(3))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.bn, self.fc = nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes)

    def forward(self, x):
        def split(z):
            return z.unflatten(2, (self.heads, -1)).transpose(1, 2)

        query = self.query.expand(len(x), 1, -1)
        q, k, v = (split(layer(norm(z))) for layer, norm, z in (
            (self.q, self.q_norm, query), (self.k, self.k_norm, x), (self.v, self.v_norm, x)))
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]
        return self.fc(self.bn(self.proj(z)))

    def ordered(self):
        return [self.query, self.q_norm.weight, self.q_norm.bias, self.k_norm.weight,
                self.v_norm.weight, self.v_norm.bias, self.q.weight, self.q.bias, self.k.weight,
                self.v.weight, self.v.bias, self.proj.weight, self.proj.bias, self.fc.weight,
                self.fc.bias]


def test_attentive_heads_train_as_the_plain_module_would():
    g = torch.Generator().manual_seed(7)
    heads = evaluate.AttentiveHeads(2, 128, 3, g, "cpu")
    assert 0.015 < heads.params[8].std() < 0.025 and heads.params[13].std() < 0.012
    for p in heads.params:                                # away from ones and zeros, heads unequal
        p.add_(0.1 * torch.randn(p.shape, generator=g))
    plain = [Attentive(128, 3, 2) for _ in range(2)]
    for i, module in enumerate(plain):
        for p, values in zip(module.ordered(), heads.params):
            p.copy_(values[i])
        module.k_norm.bias.normal_(generator=g)           # has no effect: the softmax cancels it
    lrs, momenta = torch.tensor([0.1, 0.03]), [torch.zeros_like(p) for p in heads.params]
    opts = [torch.optim.SGD(m.parameters(), lr, 0.9) for m, lr in zip(plain, lrs.tolist())]
    with torch.enable_grad():
        for _ in range(3):
            x, y = torch.randn(16, 9, 128, generator=g), torch.randint(3, (16,), generator=g)
            for p in heads.params:
                p.requires_grad_()
            scores = heads(x, training=True)
            loss = sum(F.cross_entropy(scores[:, i], y) for i in range(2))
            grads = torch.autograd.grad(loss, heads.params)
            with torch.no_grad():
                evaluate.descend(heads.params, grads, momenta, lrs, lars=False)
            for i, (module, opt) in enumerate(zip(plain, opts)):
                opt.zero_grad()
                out = module(x)
                F.cross_entropy(out, y).backward()
                opt.step()
                assert torch.allclose(scores[:, i], out, atol=1e-3)
    for p, *each in zip(heads.params, *(m.ordered() for m in plain)):
        assert torch.allclose(p, torch.stack(each), atol=2e-4)
    assert not torch.allclose(heads.params[13][0], heads.params[13][1], atol=1e-2)


def test_attentive_heads_use_running_statistics_at_test():
    g = torch.Generator().manual_seed(8)
    heads, bn = evaluate.AttentiveHeads(1, 64, 3, g, "cpu"), nn.BatchNorm1d(64, affine=False)
    module = Attentive(64, 3, 1)
    for p, values in zip(module.ordered(), heads.params):
        p.copy_(values[0])
    module.bn = bn
    x = torch.randn(12, 5, 64, generator=g)
    heads(x, training=True), module(x)
    module.eval()
    assert torch.allclose(heads(x)[:, 0], module(x), atol=1e-4)
    assert torch.allclose(heads(x)[:1], heads(x[:1]), atol=1e-5)     # the batch does not matter


def test_attentive_heads_use_the_test_batchs_statistics_if_told_so():
    g = torch.Generator().manual_seed(8)
    module = Attentive(64, 3, 1)                                     # stays in training: batch norm
    heads = evaluate.AttentiveHeads(1, 64, 3, g, "cpu", bn="batch")  # of the batch, at test, too
    for p, values in zip(module.ordered(), heads.params):
        p.copy_(values[0])
    heads(torch.randn(12, 5, 64, generator=g), training=True)
    x, before = torch.randn(12, 5, 64, generator=g), heads.state[0].clone()
    alone = evaluate.one_head(heads, 0)
    assert torch.allclose(alone(x)[:, 0], module(x), atol=1e-4) and heads.state[0].equal(before)
    assert not torch.allclose(alone(x)[:6], alone(x[:6]), atol=1e-3)   # the batch does matter


@pytest.mark.slow
def test_only_the_attentive_head_finds_what_one_token_says():
    g = torch.Generator().manual_seed(9)
    y = torch.randint(2, (400,), generator=g)
    x, place = torch.randn(400, 6, 64, generator=g), torch.randint(6, (400,), generator=g)
    x[torch.arange(400), place, :2] += 12 * F.one_hot(y, 2)          # one loud token of six
    args, recipe = settings("--epochs", "6"), evaluate.RECIPES["part attentive"]
    with torch.enable_grad():
        head = evaluate.classifier(x[:300, None], y[:300], 2, recipe, args, evaluate.AttentiveHeads)
        wrong = evaluate.classifier(x[:300, None], y[:300].roll(1), 2, recipe, args,
                                    evaluate.AttentiveHeads)
    assert head.score(x[300:], y[300:])["top-1"] > 90
    assert wrong.score(x[300:], y[300:])["top-1"] < 75               # control: shuffled labels


@pytest.mark.parametrize("n", [60, 54])                  # 54 to train on; 49, and 49 = 3 x 16 + 1
def test_the_attentive_head_learns_from_few_images(n):
    g = torch.Generator().manual_seed(10)
    y = torch.arange(400) % 2
    x = torch.randn(400, 6, 64, generator=g) + 3 * F.one_hot(y, 64)[:, None]
    sizes = set()

    class Counting(evaluate.AttentiveHeads):
        def __call__(self, x, training=False):
            sizes.update([len(x)] * training)
            return super().__call__(x, training)

    with torch.enable_grad():
        head = evaluate.classifier(x[:n, None], y[:n], 2, evaluate.RECIPES["cae"],
                                   settings("--epochs", "10"), Counting)
    assert sizes == ({16, 6} if n == 60 else {16})
    assert head.score(x[n:], y[n:])["top-1"] > 90


# ---- probes --------------------------------------------------------------------------------------


def test_attentive_says_how_much_memory_it_would_need(monkeypatch):
    many = type("Many", (), {"__len__": lambda self: 20_000_000})()         # 30 GiB, and again
    monkeypatch.setattr(evaluate, "labelled", lambda *_: (many, 2))
    with pytest.raises(ValueError, match="the tokens of 20,000,000 images, 61 GiB: take fewer"):
        evaluate.attentive(model(), settings("--task", "attentive"))


def test_block_means_are_taken_before_the_final_norm():
    m, x, hidden = model(), torch.randn(2, 3, 32, 32), []
    hooks = [block.register_forward_hook(lambda *a: hidden.append(a[2])) for block in
             m.encoder.blocks]
    found = evaluate.block_means(m.encoder, x)
    [hook.remove() for hook in hooks]
    assert list(found) == [f"block {n} {name}" for n in (1, 2, 3) for name in ("cls", "pat")]
    for n in (1, 2, 3):
        assert torch.allclose(found[f"block {n} pat"], hidden[n - 1][:, 1:].mean(1), atol=1e-6)
        assert torch.allclose(found[f"block {n} cls"], hidden[n - 1][:, 0], atol=1e-6)
    assert not torch.allclose(found["block 3 cls"], m.encoder(x)[:, 0], atol=1e-2)


def answering(monkeypatch, features, labels, classes):
    """Features and labels of the test split, and no other."""
    monkeypatch.setattr(evaluate, "features", lambda m, a, split, *_, **__: {
        "test": ({"cls": features}, labels, classes)}[split])


def test_knn_weighs_by_a_temperature_of_007(monkeypatch):
    def at(*cosines):                                    # unit vectors around (1, 0)
        return torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines])

    # One of class 0 in the same place, two of class 1 farther off: with 2 exp(s / tau) these win
    # for tau above 0.058 if s is 0.96, above 0.087 if it is 0.94.
    args = settings("--limit", "3", "--k", "3", "--feature", "cls")
    for s, first in ((0.96, 1), (0.94, 0)):
        sets = {"train": ({"cls": at(1.0, s, s)}, torch.tensor([0, 1, 1]), 2),
                "test": ({"cls": at(1.0)}, torch.tensor([first]), 2)}
        monkeypatch.setattr(evaluate, "features", lambda m, a, split, *_, sets=sets: sets[split])
        row = evaluate.knn(model(), args).rows["cls"]
        assert row == {"k=3": 100}


def test_few_shot_is_perfect_for_an_oracle_chance_for_noise_and_33_for_one_point(monkeypatch):
    labels, args = torch.arange(400) % 8, settings("--limit", "8", "--episodes", "300")
    g = torch.Generator().manual_seed(0)
    for z, accuracy, f1 in ((torch.eye(8)[labels], 100, 100),
                            (torch.randn(400, 64, generator=g), 20, 20.6),   # see below
                            (torch.ones(400, 4), None, 100 / 3)):
        answering(monkeypatch, z, labels, 8)
        row = evaluate.few_shot(model(), args).rows["cls"]
        if accuracy:
            assert row["accuracy"] == pytest.approx(accuracy, abs=1.5)
        # Cosines of noise have a deviation of 1/8: 21.2 % are above T = 0.1, and a fifth of them
        # of the same class; F1 = 2 * 20 * 21.2 / (20 + 21.2).
        assert row["F1"] == pytest.approx(f1, abs=1 if accuracy == 20 else 0.1)
        assert row["F1"] == max(row[f"F1 {t / 10}"] for t in range(1, 10))


def test_few_shot_equals_a_loop_over_episodes(monkeypatch):
    g = torch.Generator().manual_seed(1)
    labels, z = torch.arange(120) % 6, torch.randn(120, 5, generator=g)
    z[:, :3] += 1.5 * torch.eye(6)[labels][:, :3]
    answering(monkeypatch, z, labels, 6)
    args = settings("--limit", "8", "--episodes", "20", "--seed", "3")
    row = evaluate.few_shot(model(), args).rows["cls"]
    g, unit, right = rng.generator(3, "few_shot"), z / z.norm(dim=1, keepdim=True), []
    for _ in range(20):                                   # the same draws, in order
        chosen = [(labels == c).nonzero()[:, 0][torch.randperm(20, generator=g)[:16]]
                  for c in torch.randperm(6, generator=g)[:5].tolist()]
        support = torch.stack([unit[rows[0]] for rows in chosen])
        hits = [int((support @ unit[q]).argmax()) == c for c, rows in enumerate(chosen)
                for q in rows[1:].tolist()]
        right.append(sum(hits) / 75)
    right = torch.tensor(right, dtype=torch.float64)
    assert row["accuracy"] == pytest.approx(100 * right.mean().item())
    assert row["+-"] == pytest.approx(196 * right.std().item() / 20 ** 0.5)


def test_few_shot_needs_enough_pictures_of_five_classes():
    with pytest.raises(ValueError, match="needs 5 classes with 16 test images each; toy has 0"):
        evaluate.few_shot(model(), settings("--limit", "20"))


def test_few_shot_sees_square_pictures_whole_and_cuts_others(tmp_path, monkeypatch):
    """Whether they are is said, and each is encoded that way."""
    for kind, (width, height) in (("square", (40, 40)), ("wide", (80, 40))):
        for c in range(5):
            (tmp_path / kind / str(c)).mkdir(parents=True)
            for n in range(80):                          # every fifth is a test image: 16
                picture = torch.randint(256, (height, width, 3), dtype=torch.uint8)
                Image.fromarray(picture.numpy()).save(tmp_path / kind / str(c) / f"{n:02}.png")
    seen, batches = [], data.batches
    monkeypatch.setattr(data, "batches", lambda *a, **b: (seen.append(b["resize"]),
                                                          batches(*a, **b))[1])
    for kind, resize, how in (("square", 32, "; whole picture at 32 px;"),
                              ("wide", None, "; centre of short side 36 at 32 px;")):
        args = settings("--task", "few_shot", "--episodes", "5", "--data", str(tmp_path / kind))
        assert how in evaluate.few_shot(model(), args).protocol
        assert seen.pop() == resize and not seen


def test_boxes_are_clipped_and_must_be_square_enough_large_enough_and_no_crowd():
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(120), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    boxes = torch.tensor([[10., 20, 60, 70], [-9, -9, 50, 50], [0, 0, 61, 50], [0, 0, 60, 50],
                          [0, 0, 49, 49], [10, 20, 60, 70]])
    item = SimpleNamespace(image=image, boxes=boxes, labels=torch.arange(6),
                           crowd=torch.tensor([0, 0, 0, 0, 0, 1]).bool())
    found = list(evaluate.box_crops([item], 50, 1.2, 50))
    assert [label for _, label in found] == [0, 1, 3]
    assert found[0][0].equal(image[:, 20:70, 10:60]) and found[1][0].equal(image[:, :50, :50])
    assert len(list(evaluate.box_crops([item], 50, 2, 10))) == 5


def test_object_retrieval_is_perfect_for_an_oracle_and_chance_for_noise(monkeypatch):
    labels, args = torch.arange(300) % 5, settings("--limit", "8")
    g = torch.Generator().manual_seed(2)
    for z, good in ((torch.eye(5)[labels], True), (torch.randn(300, 16, generator=g), False)):
        answering(monkeypatch, z, labels, 5)
        row = evaluate.object_retrieval(model(), args).rows["cls"]
        assert row["AP"] == pytest.approx(100 if good else row["chance"], abs=1)
    answering(monkeypatch, torch.randn(4, 3), torch.arange(4), 4)
    with pytest.raises(ValueError, match="no two items share a class"):
        evaluate.object_retrieval(model(), args)
    answering(monkeypatch, torch.randn(3, 3), torch.tensor([0, 0, 1]), 2)
    assert "1 items are the only one" in evaluate.object_retrieval(model(), args).notes[0]


def test_max_items_draws_so_many_and_always_the_same():
    found, labels = {"cls": torch.arange(50.)[:, None]}, torch.arange(50)
    some, kept = evaluate.subset(found, labels, settings("--max-items", "7"))
    again, _ = evaluate.subset(found, labels, settings("--max-items", "7"))
    assert len(kept) == 7 and some["cls"][:, 0].tolist() == kept.tolist()
    assert some["cls"].equal(again["cls"])
    assert evaluate.subset(found, labels, settings())[1].equal(labels)


def test_part_retrieval_ranks_no_more_than_max_items(monkeypatch):
    found = {"cls": torch.randn(50, 4)}, (torch.arange(50) % 10).clamp(max=3)
    monkeypatch.setattr(evaluate, "extract", lambda *a, **b: found)
    args = settings("--max-items", "9")
    result, (some, labels) = evaluate.part_retrieval(model(), args), evaluate.subset(*found, args)
    assert result.images == {"crops": 9} and set(labels.tolist()) == {0, 3}
    assert result.rows == evaluate.ranked(some, labels, "part")[0]
    assert not any("large enough" in note for note in result.notes)     # 1 and 2 have crops


def test_all_and_part_retrieval_alone_look_at_as_many_pictures(tmp_path, checkpoint, monkeypatch):
    limits = []

    def look(model, args):
        """How many may it look at?"""
        limits.append(args.limit)
        return metrics.report({"cls": {"AP": 1.0}}, "")

    monkeypatch.setattr(evaluate, "FROZEN", ["part_retrieval", "knn"])
    monkeypatch.setattr(evaluate, "ALL_IMAGES", 40)
    monkeypatch.setitem(evaluate.TASKS, "part_retrieval", look)
    flags = ["--device", "cpu", "--out", str(tmp_path), "--workers", "0", "--checkpoint",
             str(checkpoint), "--json", str(tmp_path / "all.jsonl"), "--task"]
    for task in ("part_retrieval", "all"):
        evaluate.main([*flags, task])
    evaluate.main([*flags, "all", "--limit", "30"])
    assert limits == [None, None, 30]
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").open()]
    assert [line["images"] for line in lines if line["task"] == "knn"] == [
        dict(train=40, test=40), dict(train=30, test=30)]


def test_the_training_crops_of_part_classification_lose_their_rim(monkeypatch):
    seen, splits = [], []

    def batches(crops, *_):
        crops = list(crops)
        seen.append(torch.stack([crop for crop, _ in crops]))
        return iter([(torch.zeros(len(crops), 3, 32, 32), torch.tensor([y for _, y in crops]))])

    monkeypatch.setattr(evaluate, "crop_batches", batches)
    args, m = settings("--limit", "12", "--epochs", "1"), model()
    monkeypatch.setattr(annotations, "keypoints", with_one_split(annotations.keypoints, splits))
    with torch.enable_grad():
        result = evaluate.part_classification(m, args)
    train, test = seen
    assert splits == ["train", "test"] and "head, leg, wing, tail of toy;" in result.protocol
    assert train.shape == test.shape == (len(train), 3, 32, 32)
    wide = F.interpolate(test.float(), (36, 36), mode="bicubic")[:, :, 2:-2, 2:-2]
    close, far = ((a - train).abs().mean().item() for a in (wide, test.float()))
    assert close < far / 2


def with_one_split(keypoints, asked):
    """The same pictures of either split; notes which was asked for."""
    return lambda name, root, split, limit: (asked.append(split),
                                             keypoints(name, root, "test", limit))[1]


def test_toy_landmarks_are_near_far_and_hidden_frames_of_the_querys_film(monkeypatch):
    image = torch.arange(64, dtype=torch.uint8).view(4, 16, 1, 1, 1).expand(4, 16, 3, 64, 64)
    there = torch.ones(4, 16, 64, 64, dtype=torch.uint8)
    there[2, [0, 9]] = 0                                  # nobody in two frames of film 2
    monkeypatch.setattr(toy, "video", lambda *a, **b: {"image": image, "instances": there})
    world = evaluate.toy_landmarks(32, settings(), films=4)
    assert len(world.database) == 60 and world.database[0].shape == (3, 32, 32)
    assert [int(x.max()) for x in world.queries] == [8, 24, 40, 56]
    for film in range(4):
        frames = {kind: [int(world.database[n].min()) - 16 * film for n in getattr(world, kind)
                         [film]] for kind in ("easy", "hard", "junk")}
        assert frames["junk"] == ([0, 9] if film == 2 else [])
        assert set(frames["easy"]) == {4, 5, 6, 7, 9, 10, 11, 12} - set(frames["junk"])
        assert set(frames["hard"]) == {0, 1, 2, 3, 13, 14, 15} - set(frames["junk"])


def test_landmarks_are_scored_as_medium_hard_and_easy(monkeypatch):
    order = torch.tensor([3, 0, 5, 1, 2, 4])              # the ranking of the check values
    database = torch.empty(6, 2)
    database[order] = torch.stack([torch.tensor(a) for a in ((10., k) for k in range(6))])
    world = SimpleNamespace(database=[0] * 6, queries=[0, 0], boxes=None, easy=[[0], []],
                            hard=[torch.tensor([1]), []], junk=[[3], []])
    monkeypatch.setattr(annotations, "landmarks", lambda name, root: world)
    found = iter([({"cls": database}, None), ({"cls": torch.tensor([[1., 0], [1, 0]])}, None)])
    monkeypatch.setattr(evaluate, "extract", lambda *a, **b: next(found))
    row = evaluate.landmark_retrieval(model(), settings("--data", "roxford5k")).rows["cls"]
    assert row["medium mAP"] == pytest.approx(79.1667, abs=1e-3)   # the second query is left out
    assert row["hard mAP"] == pytest.approx(25) and row["easy mAP"] == pytest.approx(100)
    assert row["m mP@10"] == pytest.approx(200 / 3) and row["h mP@10"] == pytest.approx(50)


@pytest.mark.parametrize("flags", [[], ["--crop-queries"]])
def test_queries_alone_are_cut_and_only_if_asked(monkeypatch, flags):
    image, seen = torch.randint(256, (3, 40, 40), dtype=torch.uint8), []
    boxes = torch.tensor([[0., 0, 20, 30], [9, 9, 40, 40]])
    world = SimpleNamespace(database=[image] * 3, queries=[image] * 2, boxes=boxes, easy=[[0], [1]],
                            hard=[[1], [2]], junk=[[], []])
    monkeypatch.setattr(annotations, "landmarks", lambda *_: world)
    views = evaluate.landmark_views
    monkeypatch.setattr(evaluate, "landmark_views",
                        lambda *a: (seen.append((len(a[0]), a[1])), views(*a))[1])
    found = evaluate.landmark_retrieval(model(), settings("--data", "roxford5k", *flags))
    assert [(n, cut is boxes) for n, cut in seen] == [(3, False), (2, bool(flags))]
    assert seen[0][1] is None and (seen[1][1] is None) == (not flags)
    assert ("queries cut to their boxes" if flags else "whole queries") in found.protocol
    toys = evaluate.landmark_retrieval(model(), settings("--limit", "2", *flags))
    assert "a frame asks for the rest of its film" in toys.protocol        # toy has no boxes


def test_the_cache_knows_that_the_seed_cuts_the_frames_of_toy(tmp_path, checkpoint):
    flags = "--task", "landmark_retrieval", "--imsize", "32", "--limit", "4", "--seed"
    for more in ("0", "--cache"), ("1", "--cache"), ("1",):
        run(tmp_path, [checkpoint], *flags, *more)
    first, cached, plain = (json.loads(line)["metrics"] for line in (tmp_path / "all.jsonl").open())
    assert cached == plain != first


def test_several_sizes_average_class_tokens_alone():
    args = settings("--multiscale", "--feature", "pat", "--limit", "1")
    with pytest.raises(ValueError, match="averages class tokens: leave out --feature pat"):
        evaluate.landmark_retrieval(model(), args)


def test_landmark_views_keep_their_shape_and_fill_patches():
    args, m = settings(), model()
    tall = torch.randint(256, (3, 100, 41), dtype=torch.uint8)
    [(x, number)] = evaluate.landmark_views([tall], None, 50, m, args)
    assert x.shape == (1, 3, 48, 16) and number.item() == 0        # 50 x 20 or 21, less the rest
    [(x, _)] = evaluate.landmark_views([tall], None, 200, m, args)
    assert x.shape == (1, 3, 96, 40)                               # never enlarged
    exact = augment.normalize(tall[None, :, :96, :40].float() / 255)
    assert torch.allclose(x, exact, atol=1e-6)
    [(x, _)] = evaluate.landmark_views([tall], [[8, 16, 32, 48]], 200, m, args)
    assert torch.allclose(x, augment.normalize(tall[None, :, 16:48, 8:32].float() / 255), atol=1e-6)


def test_multiscale_is_the_mean_of_three_sizes():
    encoder, x = model().encoder, torch.randn(2, 3, 64, 64)
    expected = encoder(x)[:, 0]
    for side in (45, 32):
        small = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        expected = expected + encoder(small[:, :, :side // 8 * 8, :side // 8 * 8])[:, 0]
    found = evaluate.multiscale(encoder, x)["multiscale"]
    assert torch.allclose(found, expected / 3, atol=1e-5)


# ---- robustness ----------------------------------------------------------------------------------


def test_the_members_of_the_sixteen_categories():
    assert len(evaluate.MEMBERS) == 16
    assert len(evaluate.MEMBERS["bird"]) == 49 and len(evaluate.MEMBERS["dog"]) == 109
    assert not {7, 9, 17, 21, 84, 85, 86, 97, 134} & set(evaluate.MEMBERS["bird"])
    everyone = sum(evaluate.MEMBERS.values(), [])
    assert len(set(everyone)) == len(everyone) and max(everyone) < 1000


def test_a_category_is_the_mean_of_its_members_and_not_their_sum():
    p = torch.full((1, 1000), 1e-5)
    p[0, evaluate.MEMBERS["dog"]] = 0.004                # 109 of them: 0.44 in sum
    p[0, 404] = 0.3                                      # airplane: a single class
    names = list(evaluate.MEMBERS)
    assert names[evaluate.sixteen(p.log(), names).item()] == "airplane"
    total = torch.stack([p[:, m].sum(1) for m in evaluate.MEMBERS.values()], 1)
    assert names[total.argmax().item()] == "dog"         # control


def test_shape_bias_from_pictures_to_numbers(tmp_path, monkeypatch):
    names = sorted(evaluate.MEMBERS)
    pairs = [("cat", "dog"), ("cat", "dog"), ("dog", "cat"), ("car", "car"), ("oven", "knife")]
    paths = []
    for number, _ in enumerate(pairs):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (40, 40), (50 * number, 0, 0)).save(paths[-1])
    shapes, textures = torch.tensor([[names.index(w) for w in pair] for pair in pairs]).unbind(1)
    world = SimpleNamespace(paths=paths, shapes=shapes, textures=textures, classes=names)
    monkeypatch.setattr(annotations, "cue_conflict", lambda root: world)
    says = ["cat", "dog", "dog", "knife", "bird"]        # shape, texture, shape, -, neither
    scores = torch.zeros(5, 1000)
    for row, word in enumerate(says):
        scores[row, evaluate.MEMBERS[word]] = 20
    head = SimpleNamespace(scores=lambda z: scores, epochs=3)
    monkeypatch.setattr(evaluate, "trained", lambda *a: ("pat", head, 7))
    monkeypatch.setattr(evaluate, "labelled", lambda *a: (None, 1000))
    monkeypatch.setattr(common, "load", lambda *a: world)                  # of files
    sides, batches = [], data.batches
    monkeypatch.setattr(data, "batches", lambda *a, **b: (sides.append(b["resize"]),
                                                          batches(*a, **b))[1])
    for flags, view, how in (
            (["--no-crop"], "whole picture at", "lr and epoch chosen"),
            (["--paper", "--recipe", "park"], "centre of short side 36 at", "lr 1 and decay 0.05")):
        args = settings("--data", "imagenet", *flags)
        result = evaluate.shape_bias(model(), args)
        row = result.rows["pat"]
        assert f"; {view} 32 px; " in result.protocol
        assert f"recipe park (3 epochs), {how}" in result.protocol
    assert sides == [32, None]                           # whole; the standard view
    assert row["cat"] == 50 and row["dog"] == 100 and row["shape bias"] == 75
    assert math.isnan(row["oven"]) and row["either"] == 75 and "car" not in row
    with pytest.raises(ValueError, match="needs a classifier of ImageNet"):
        evaluate.shape_bias(model(), settings())
    monkeypatch.setattr(evaluate, "labelled", lambda *a: (None, 999))
    with pytest.raises(ValueError, match="all 1,000 classes of ImageNet, and this tree has 999"):
        evaluate.shape_bias(model(), args)


def test_rings_tile_the_spectrum():
    counts = [int(evaluate.ring(224, t / 10 * math.pi).sum()) for t in range(11)]
    assert counts == [121, 968, 1936, 3216, 3960, 4928, 5896, 6864, 8592, 8888, 4807]
    assert sum(evaluate.ring(64, t / 10 * math.pi).int() for t in range(11)).eq(1).all()
    keep = evaluate.ring(64, 0.5 * math.pi)
    assert keep.roll((-1, -1), (0, 1)).flip(0, 1).equal(keep)      # -w for w: the inverse is real


def test_noise_stays_in_its_band_and_has_the_energy_of_its_ring():
    args, index = settings(), torch.arange(40)
    whole = 0
    for tenth in range(11):
        f = tenth / 10 * math.pi
        noise, keep = evaluate.band_noise(index, 64, f, args), evaluate.ring(64, f)
        energy = torch.fft.fft2(noise.double()).abs().square()
        assert (energy * ~keep).sum() < 1e-10 * energy.sum()
        share = keep.double().mean().item()
        assert noise.square().mean().item() == pytest.approx(0.49 * share, rel=0.1)
        whole = whole + noise
        even = evaluate.band_noise(index, 64, f, settings("--equal-energy"))
        assert even.square().mean().item() == pytest.approx(0.049, rel=0.1)
    assert torch.allclose(whole.abs(), torch.tensor(0.7), atol=1e-4)   # all bands: the signs again
    alone = evaluate.band_noise(index[7:8], 64, 1.0, args)
    assert alone.equal(evaluate.band_noise(index, 64, 1.0, args)[7:8])  # whatever the batch


def test_a_drop_is_what_the_noise_of_one_band_costs(monkeypatch):
    labels, head = torch.arange(8) % 4, SimpleNamespace(scores=lambda z: z, epochs=3)
    clean, noisy = torch.eye(4)[labels], torch.eye(4)[labels.clamp(max=2)]   # a quarter is wrong
    x, sensitive = torch.randn(8, 3, 32, 32), evaluate.ring(32, 0.3 * math.pi)

    def answer(model, args, split, names, tokens, change):
        """Minds noise of 0.3 pi alone."""
        assert split == "test"
        noise = change(x, torch.arange(8)) - x if change else torch.zeros_like(x)
        minds = (torch.fft.fft2(noise).abs() * sensitive).mean() > 1e-3
        return {"cls": noisy if minds else clean}, labels, 4

    monkeypatch.setattr(evaluate, "trained", lambda *a: ("cls", head, 7))
    monkeypatch.setattr(evaluate, "features", answer)
    result = evaluate.frequency_noise(model(), settings("--limit", "8"))
    row = result.rows["cls"]
    drops = {f"{tenth / 10:g} pi": 25 * (tenth == 3) for tenth in range(11)}
    assert row == {"clean": 100, "mean drop": pytest.approx(25 / 11), **drops}
    assert "recipe park (3 epochs), lr and epoch chosen" in result.protocol
    args = settings("--limit", "8", "--recipe", "park", "--paper")
    assert "lr 1 and decay 0.05 as printed" in evaluate.frequency_noise(model(), args).protocol


def test_the_cache_does_not_take_noise_away(tmp_path):
    flags = "--limit 20 --epochs 1 --eps 50 --out".split()
    with torch.enable_grad():
        plain, cached = (evaluate.frequency_noise(model(), settings(
            *flags, str(tmp_path), *more)).rows["pat"] for more in ([], ["--cache"]))
    assert plain == cached and any(plain[name] for name in plain if name.endswith(" pi"))


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's folder: MoCo v3's network with random weights."""
    torch.manual_seed(0)
    cfg = config.parse(moco_v3.Config, [*NET, *"--hidden 32 --out-dim 16".split()])
    network, path = moco_v3.Network(cfg).eval(), tmp_path_factory.mktemp("run") / "encoder.pt"
    heads = {name: getattr(network, name).state_dict() for name in ("projector", "predictor")}
    checkpoints.save_encoder(path, network.backbone, branch="base", method="moco_v3", data="toy",
                     heads=heads)
    return path


def run(out, checkpoint, *flags):
    trains = {"all", *evaluate.READ_BY["epochs"].split()} & {*flags}
    with torch.enable_grad():
        evaluate.main(["--device", "cpu", "--out", str(out), "--workers", "0", "--limit", "40",
                       *["--epochs", "1"] * bool(trains), "--json", str(out / "all.jsonl"),
                       "--precision", "fp32", "--checkpoint", *map(str, checkpoint), *flags])
    return [json.loads(line) for line in (out / "all.jsonl").open()]


@pytest.mark.parametrize("task, flags, columns", [
    ("layerwise", ["--paper"], {"block 1 pat", "block 2 pat"}),
    ("attentive", ["--bn", "batch"], {"tokens"}),
    ("object_retrieval", [], {"cls", "pat", "projected"}),
    ("object_retrieval", ["--data", "toy-scenes", "--limit", "20"], {"cls", "pat", "projected"}),
    ("part_retrieval", ["--limit", "12"], {"cls", "pat", "projected"}),
    ("part_classification", ["--limit", "15"], {"cls", "pat", "projected"}),
    ("part_classification", ["--limit", "15", "--head", "attentive"], {"tokens"}),
    ("landmark_retrieval", ["--imsize", "32", "--limit", "6"], {"cls"}),
    ("landmark_retrieval", ["--data", "toy-scenes", "--limit", "4", "--multiscale"],
     {"multiscale"}),
    ("frequency_noise", [], {"pat"}),
    ("knn", ["--feature", "projected"], {"projected"}),
])
def test_every_task_runs_offline(tmp_path, checkpoint, task, flags, columns):
    [line] = run(tmp_path, [checkpoint], "--task", task, *flags)
    assert set(line["metrics"]) == columns and line["task"] == task
    for row in line["metrics"].values():
        assert all(-100 <= value <= 100 for value in row.values())


def test_few_shot_runs_on_toy_offline(tmp_path, checkpoint):
    [line] = run(tmp_path, [checkpoint], "--task", "few_shot", "--limit", "600",
                 "--episodes", "30")
    assert set(line["metrics"]["cls"]) >= {"accuracy", "+-", "F1", "T x 100", "F1 0.1", "F1 0.9"}


def test_cached_features_are_those_that_were_encoded(tmp_path, checkpoint, monkeypatch):
    [plain] = run(tmp_path, [checkpoint], "--task", "knn")
    *_, first = run(tmp_path, [checkpoint], "--task", "knn", "--cache")
    files = sorted((tmp_path / "features").iterdir())
    assert len(files) == 2 and first["metrics"] == plain["metrics"]    # train and test
    with monkeypatch.context() as blind:
        blind.setattr(vit.ViT, "forward", lambda *a: pytest.fail("encoded again"))
        *_, again = run(tmp_path, [checkpoint], "--task", "knn", "--cache")
        assert again["metrics"] == plain["metrics"]
    run(tmp_path, [checkpoint], "--task", "knn", "--cache", "--limit", "30")
    assert len(list((tmp_path / "features").iterdir())) == 4           # other images
    stamp = checkpoint.stat()
    checkpoint.touch()                                                 # another checkpoint
    run(tmp_path, [checkpoint], "--task", "knn", "--cache")
    assert checkpoint.stat().st_mtime_ns != stamp.st_mtime_ns
    assert len(list((tmp_path / "features").iterdir())) == 6


def test_the_cache_tells_all_that_features_depend_on_apart(tmp_path, monkeypatch):
    for c in "ab":
        (tmp_path / "data" / c).mkdir(parents=True)
        for n in range(5):                               # one of each is a test image
            picture = torch.randint(256, (40, 80, 3), dtype=torch.uint8)
            Image.fromarray(picture.numpy()).save(tmp_path / "data" / c / f"{n}.png")
    kinds = [({}, {}, {}), (dict(size=40), {}, {}), (dict(mean=augment.STD), {}, {}),
             (dict(std=augment.MEAN), {}, {}), (dict(interpolation="bilinear"), {}, {}),
             ({}, dict(precision="bf16"), {}), ({}, dict(limit=1), {}), ({}, {}, dict(whole=True)),
             ({}, {}, dict(mirror=True)), ({}, {}, dict(split="train")),
             ({}, {}, dict(tokens=common.joint))]
    found, m = {}, model()
    for cache in ([], ["--cache"]):
        for number, (of_model, flags, how) in enumerate(kinds):
            args = settings("--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out", *cache)
            vars(args).update(flags)
            network = SimpleNamespace(**vars(m) | of_model)
            z, _, _ = evaluate.features(network, args, **dict(split="test") | how)
            assert z["hyber"].equal(found.setdefault(number, z["hyber"])), kinds[number]
    assert not any(found[a].equal(found[b]) for a in found for b in range(a))
    assert len(list((tmp_path / "out/features").iterdir())) == len(kinds)
    names, args = set(), settings("--data", "cifar10", "--cache")
    for root in "ab":                                    # without --data-root
        monkeypatch.setenv("DATA_ROOT", root)
        names.add(common.stored(m, args, common.pooled, "test"))
    assert len(names) == 2


def test_all_does_not_write_tokens_that_nobody_reads(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "FROZEN", ["attentive"])
    run(tmp_path, [checkpoint], "--task", "all")
    assert not (tmp_path / "features").exists()
    run(tmp_path, [checkpoint], "--task", "all", "--cache")
    assert len(list((tmp_path / "features").iterdir())) == 2               # train and test


def test_protocols_of_part_classification_differ_where_the_numbers_do(monkeypatch):
    labels, head = torch.arange(20) % 4, dict(lr=1.0, epoch=1)
    monkeypatch.setattr(evaluate, "extract", lambda *a, **b: ({"tokens": torch.zeros(20, 3)},
                                                              labels))
    monkeypatch.setattr(evaluate, "classifier", lambda *a: SimpleNamespace(
        score=lambda *_: {"top-1": 1.0, "top-5": 1.0}, **head))
    said = [evaluate.part_classification(model(), settings(*flags.split())).protocol
            for flags in ("", "--crop paper", "--head attentive", "--head attentive --bn batch")]
    assert len(set(said)) == 4 and "squares by the study's paper" in said[1]
    assert "attentive head with batch norm of the test batch (SGD" in said[3]


def test_all_prints_one_table_and_says_what_was_left_out(tmp_path, checkpoint, capsys, monkeypatch):
    some = ["knn", "object_retrieval", "attentive", "shape_bias"]
    monkeypatch.setattr(evaluate, "FROZEN", some)
    lines = run(tmp_path, [checkpoint], "--task", "all", "--baseline", "pixels", "--reference")
    text = capsys.readouterr().out
    assert [line["task"] for line in lines] == ["knn", "object_retrieval", "attentive", "knn",
                                                "object_retrieval"]
    name = checkpoint.parent.name
    assert f"note: {name}: no shape_bias: shape_bias needs a classifier of ImageNet" in text
    assert "note: pixels: no attentive: attentive needs tokens, and pixels have none" in text
    head = next(line for line in text.splitlines() if line.startswith("task"))
    assert head.split() == ["task", "feature", "number", name, "pixels"]
    assert "knn: the papers' numbers, not measured here" in text
    assert "DINO (MMC, table 11; imagenet100)" in text


def test_two_checkpoints_of_one_name_are_two_columns(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "FROZEN", ["knn"])
    other = tmp_path / checkpoint.parent.name / "encoder.pt"
    other.parent.mkdir()
    encoder = checkpoints.load_encoder(checkpoint, quiet=True)
    encoder.blocks[0].mlp.fc2.weight.add_(torch.randn(24, 96))
    checkpoints.save_encoder(other, encoder, data="toy")
    lines = run(tmp_path, [checkpoint, other], "--task", "all")
    name = checkpoint.parent.name
    assert [line["model"] for line in lines] == [name, f"{name} (2)"]
    table = capsys.readouterr().out.split("\ntask ")[1].splitlines()
    assert table[0].split() == ["feature", "number", name, name, "(2)"]
    numbers = [f"{line['metrics']['pat']['k=10']:.1f}" for line in lines]
    assert next(row for row in table if "pat" in row).split()[-2:] == numbers


def test_reference_rows_are_those_of_the_data(monkeypatch):
    monkeypatch.setattr(config, "read_yaml", functools.cache(config.read_yaml))
    papers = config.read_yaml(Path(evaluate.__file__).parent / "probes/papers.yaml")
    figures = {"layerwise", "shape_bias", "frequency_noise"}               # without a number
    assert set(papers) == set(evaluate.TASKS) - figures
    for task, tables in papers.items():
        for t in tables:
            for name, numbers in t["rows"].items():
                assert len(numbers) == len(t["columns"]), (task, name)
                assert all(n is None or 0 < n <= 100 for n in numbers), (task, name)
            found = {m.name.split("; ")[1] for m, _ in evaluate.reference(task, t["data"])}
            assert found == {f"{t['data']})"}
    [mmc_row] = [r for m, r in evaluate.reference("few_shot", "pets") if m.name.startswith("MMC (")]
    assert mmc_row.rows == {"cls": {"accuracy": 69.7, "F1": 62.1}}
    asl = [r.rows for m, r in evaluate.reference("finetune", "imagenet100")
           if m.name.startswith("ASL, 4000")]
    assert asl == [{"-": {"top-1": 94.2}}]
    [row] = [r for m, r in evaluate.reference("landmark_retrieval", "rparis6k")
             if m.name.startswith("DINO (")]
    assert row.rows == {"cls": {"medium mAP": 60.4, "hard mAP": 34.2}}
    maes = [r.rows for m, r in evaluate.reference("object_retrieval", "coco") if "MAE" in m.name]
    assert maes == [{"encoded": {"AP": 13.8}}]           # no projected column
