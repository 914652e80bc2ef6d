"""Linear and attentive classifiers on frozen features; several learning rates are trained at once.

    names, encode = linear_features(opt, "mae")
    name, classifier, num_train = train_linear_classifier(model, opt, names, encode, recipe)
    classifier.scores(x), classifier.evaluate(x, labels)

The learning rate and the epoch are chosen on a held-out tenth of the training images.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib import metrics, rng
from lib.run import cosine
from probes.common import choose_recipe, dino_features, extract_features, select_features

# B images, L tokens, D width, H attention heads, C classes; n images of a data set, n_lr learning
# rates

# lr: at batch 256, scaled linearly with the batch. mae, dino: as in their released code. park:
# batch and epochs of Park et al., table A.1; its lr 1 with weight decay 0.05 ("park paper";
# literal: the same lr at any batch, no sweep) would shrink the weights by 5% per step, so lr is
# our choice. cae: CAE's attentive probe, lr 0.4 at batch 8192. part: part_classification, lr 0.4
# (linear) and 0.04 (attentive) at batch 1024.
LINEAR_RECIPES = {
    "mae":  dict(lr=0.1,   batch=16384, epochs=90,  warmup=10, lars=True,  standardize=True),
    "dino": dict(lr=0.001, batch=1024,  epochs=100, warmup=0,  lars=False, standardize=False),
    "park": dict(lr=0.1,   batch=1024,  epochs=50,  warmup=0,  lars=False, standardize=True),
    "park paper": dict(lr=1.0, batch=1024, epochs=50, warmup=0, lars=False, standardize=True,
                       weight_decay=0.05, literal=True),
    "cae":  dict(lr=0.0125, batch=8192, epochs=90,  warmup=10, lars=False, standardize=False),
    "part": dict(lr=0.1,   batch=1024,  epochs=90,  warmup=0,  lars=False, standardize=False),
    "part attentive":
            dict(lr=0.01,  batch=1024,  epochs=90,  warmup=0,  lars=False, standardize=False)}
LR_FACTORS = (0.3, 1, 3, 10, 30, 100, 300)     # times the recipe's lr; a head is trained with each

# ---- heads ---------------------------------------------------------------------------------------


class LinearHeads:
    """n_lr linear classifiers: features (B, D) -> scores (B, n_lr, C)."""
    min_batch = 1

    def __init__(self, n_lr, width, num_classes, g, device):
        weight = 0.01 * torch.randn(num_classes, width, generator=g).to(device).repeat(n_lr, 1, 1)
        self.params = [weight, torch.zeros(n_lr, num_classes, 1, device=device)]
        self.state = []                                  # tensors that change without a gradient

    def __call__(self, x, training=False):
        weight, bias = self.params                                     # (n_lr, C, D), (n_lr, C, 1)
        return (x @ weight.flatten(0, 1).T + bias.flatten()).unflatten(1, bias.shape[:2])


class AttentiveHeads:
    """n_lr attentive classifiers: tokens (B, L, D) -> scores (B, n_lr, C). No residual, no MLP.

    A learned query attends to all tokens, with D/64 attention heads and a LayerNorm each for query,
    key and value; then a projection, batch norm without affine parameters, and a linear classifier.
    As there is one query, no token is projected: q . (W_k x) = (W_k^T q) . x, and the weighted mean
    of W_v x is W_v times that of x. So n_lr heads cost hardly more than one. The shift of the key's
    LayerNorm is left out: it cancels in the softmax. bn: statistics of the batch norm at test time,
    "running" or those of the "batch".
    """
    min_batch = 16                                       # for the statistics of the batch norm

    def __init__(self, n_lr, width, num_classes, g, device, bn="running"):
        def draw(*shape, std=0.02):
            x = torch.empty(shape)
            return torch.nn.init.trunc_normal_(x, std=std, generator=g).to(device)

        one, zero = torch.ones(width, device=device), torch.zeros(width, device=device)
        params = [draw(width), one, zero, one, one, zero,            # query; LayerNorms: q, k, v
                  draw(width, width), zero, draw(width, width),      # W_q, b_q, W_k
                  draw(width, width), zero, draw(width, width), zero,       # W_v, b_v, W_o, b_o
                  draw(num_classes, width, std=0.01), torch.zeros(num_classes, device=device)]
        self.params = [p.repeat(n_lr, *[1] * p.ndim) for p in params]
        self.state = [zero.repeat(n_lr, 1), one.repeat(n_lr, 1)]            # running mean, variance
        self.bn = bn

    def __call__(self, x, training=False):
        (query, q_gain, q_shift, k_gain, v_gain, v_shift, w_q, b_q, w_k, w_v, b_v, w_o, b_o,
         weight, bias) = self.params
        D = x.shape[2]
        H = max(1, D // 64)
        if D % H:
            raise ValueError(f"the attentive head needs a width that is a multiple of 64, not {D}")
        x = F.layer_norm(x.float(), [D], eps=1e-6)                          # gain, shift: below
        q = F.layer_norm(query, [D], eps=1e-6) * q_gain + q_shift
        q = torch.einsum("roi,ri->ro", w_q, q) + b_q                        # r: learning rates
        q = q.unflatten(1, (H, -1)) * (D // H) ** -0.5                      # (n_lr, H, D/H)
        keys = torch.einsum("rhd,rhdi->rhi", q, w_k.unflatten(1, (H, -1))) * k_gain[:, None]
        attention = (x @ keys.flatten(0, 1).T).softmax(1)                   # (B, L, n_lr*H)
        v = (attention.mT @ x).unflatten(1, q.shape[:2])                    # (B, n_lr, H, D)
        v = v * v_gain[:, None] + v_shift[:, None]
        v = torch.einsum("brhi,rhdi->brhd", v, w_v.unflatten(1, (H, -1))).flatten(2) + b_v
        z = torch.einsum("bri,roi->bro", v, w_o) + b_o                      # (B, n_lr, D)
        mean, var = self.state
        if training or self.bn == "batch":
            mean, var = z.mean(0), z.var(0, correction=0)
        if training:
            with torch.no_grad():
                n = len(z)
                self.state[0].lerp_(mean, 0.1)
                self.state[1].lerp_(var * (n / max(n - 1, 1)), 0.1)
        z = (z - mean) * (var + 1e-5).rsqrt()
        return torch.einsum("bri,rci->brc", z, weight) + bias


# ---- training ------------------------------------------------------------------------------------


@dataclass
class Classifier:
    """A trained head and the standardization of its input."""
    best: LinearHeads | AttentiveHeads   # one head, of the best epoch on the held-out images
    last: LinearHeads | AttentiveHeads   # the same head after the last epoch
    mean: torch.Tensor | float
    scale: torch.Tensor | float
    lr: float                            # at batch 256
    epoch: int                           # the best one, counted from 1
    epochs: int

    def scores(self, x, head=None):
        """x (n, ...) -> (n, C); head: `best` or `last`."""
        head = head or self.best
        return torch.cat([head((part - self.mean) * self.scale)[:, 0] for part in x.split(256)])

    def evaluate(self, x, labels):
        """x (n, ...), labels (n,) -> accuracies in percent, a row of a Report."""
        top1, top5 = metrics.accuracy(self.scores(x), labels)
        last_top1 = metrics.accuracy(self.scores(x, self.last), labels)[0]
        return {"top-1": top1, "top-5": top5, "last epoch": last_top1}


def train_classifier(x, labels, num_classes, recipe, epochs, seed, make_heads=LinearHeads):
    """x (n, views, ...): frozen features of several views of each image, labels (n,) -> Classifier.

    epochs: None for the recipe's. make_heads: LinearHeads or AttentiveHeads.
    """
    mean, scale = 0.0, 1.0
    if recipe["standardize"]:
        var, mean = torch.var_mean(x, dim=(0, 1))
        scale = (var + 1e-6).rsqrt()
        x = (x - mean) * scale
    epochs = epochs or recipe["epochs"]
    best, last, lr, epoch = train_heads(x, labels, num_classes, recipe, epochs, seed, make_heads)
    return Classifier(best, last, mean, scale, lr, epoch, epochs)


@torch.enable_grad()
def train_heads(x, labels, num_classes, recipe, epochs, seed, make_heads=LinearHeads):
    """Trains a head for each of LR_FACTORS (literal: one head) on the same batches.

    x: (n, views, ...), labels: (n,). Returns the head of the epoch with the best accuracy on a
    held-out tenth of the images, the same head after the last epoch, its lr at batch 256, and that
    epoch (counted from 1). ValueError: fewer than 10 images.
    """
    (n, views), g = x.shape[:2], rng.generator(seed, "linear")
    if n < 10:
        raise ValueError(f"a tenth of the training images is held out: {n} are too few; raise "
                         f"--limit or change --data")
    held_out, train = torch.randperm(n, generator=g).to(x.device).tensor_split([n // 10])
    factors = (1.0,) if recipe.get("literal") else LR_FACTORS
    heads = make_heads(len(factors), x.shape[-1], num_classes, g, x.device)
    batch = min(len(train), max(heads.min_batch, min(recipe["batch"], len(train) // 32)))
    alone = len(train) % batch == 1 < heads.min_batch    # batch norm maps a single image to 0
    used = len(train) - alone
    total = epochs * -(-used // batch)
    warmup = total * recipe["warmup"] // recipe["epochs"]
    lr_scale = 1.0 if recipe.get("literal") else batch / 256
    lrs = torch.tensor(factors, device=x.device) * recipe["lr"] * lr_scale
    momenta = [torch.zeros_like(p) for p in heads.params]
    for p in heads.params:
        p.requires_grad_()

    step, best_correct = 0, -1
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train), generator=g)[:used].to(x.device)
        for index in train[order].split(batch):
            view = torch.randint(views, (len(index),), generator=g).to(x.device)
            scores = heads(x[index, view], training=True)                   # (B, n_lr, C)
            targets = labels[index, None].expand(-1, len(factors))
            loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")
            grads = torch.autograd.grad(loss / len(index), heads.params)    # a mean for each head
            with torch.no_grad():
                lr = lrs * cosine(step, total, 1.0, 0.0, warmup)
                sgd_step(heads.params, grads, momenta, lr, recipe["lars"],
                         recipe.get("weight_decay", 0))
            step += 1
        with torch.no_grad():
            correct = sum((heads(x[index, 0]).argmax(2) == labels[index, None]).sum(0)
                          for index in held_out.split(256))                 # (n_lr,)
        if correct.max() > best_correct:
            best_correct, number, best_epoch = correct.max(), int(correct.argmax()), epoch
            best = copy_head(heads, number)
    return best, copy_head(heads, number), factors[number] * recipe["lr"], best_epoch


def copy_head(heads, number):
    """One of the heads, detached and with its current weights."""
    head = copy.copy(heads)
    head.params, head.state = ([p.detach()[number:number + 1].clone() for p in tensors]
                               for tensors in (heads.params, heads.state))
    return head


def sgd_step(params, grads, momenta, lrs, lars, weight_decay=0.0, trust=0.001):
    """A step of SGD with momentum 0.9, in place: params (n_lr, ...), lrs (n_lr,).

    weight_decay: of weights and biases, added to the gradient as in torch.optim.SGD. lars (You et
    al., 2017; as in MAE): the gradient of a weight is first scaled to `trust` times the norm of the
    weight, so that lr is a relative step at any scale of the loss. Biases (last axis 1) are not
    scaled.
    """
    for p, grad, m in zip(params, grads, momenta):
        per_head = (-1, *[1] * (p.ndim - 1))                                # (n_lr, 1, ...)
        grad = grad + weight_decay * p
        if lars and p.shape[-1] > 1:
            p_norm, grad_norm = p.flatten(1).norm(dim=1), grad.flatten(1).norm(dim=1)
            both = (p_norm > 0) & (grad_norm > 0)
            scale = torch.where(both, trust * p_norm / grad_norm, 1.0)
            grad = grad * scale.view(per_head)
        m.mul_(0.9).add_(grad)
        p.sub_(lrs.view(per_head) * m)


# ---- the linear probe, also used by shape_bias and frequency_noise -------------------------------


def choose_linear_recipe(opt, default="mae"):
    """Name and settings of --recipe for a linear classifier; with --paper-lr those of Park et al.,
    table A.1, as printed."""
    names = dict.fromkeys([default, "mae", "dino", "park"])
    name, recipe = choose_recipe(opt, {name: LINEAR_RECIPES[name] for name in names})
    if opt.paper_lr and name != "park":
        raise ValueError("--paper-lr is for recipe park only: add --recipe park")
    return name, LINEAR_RECIPES["park paper"] if opt.paper_lr else recipe


def linear_features(opt, recipe_name):
    """Names and function of the features of a recipe. mae: class token; park: mean patch token, as
    SimMIM trains no class token; dino: see dino_features, which names its only feature itself."""
    name = opt.feature or ("patch" if recipe_name == "park" else "cls")
    if recipe_name == "dino" and not opt.feature:
        return [name], dino_features
    return select_features(opt, name)


def train_linear_classifier(model, opt, names, encode, recipe):
    """-> name of the feature, Classifier, number of training images."""
    features, labels, num_classes = extract_features(model, opt, "train", names, encode,
                                                     mirror=True)
    [(name, x)] = features.items()                                          # (n, 2, D)
    return name, train_classifier(x, labels, num_classes, recipe, opt.epochs, opt.seed), len(labels)


def describe_selection(recipe):
    """What is chosen on the held-out images, for the protocol."""
    return (f"lr {recipe['lr']:g} and weight decay {recipe['weight_decay']:g} as printed, epoch"
            if recipe.get("literal") else "lr and epoch") + " chosen on a held-out tenth"
