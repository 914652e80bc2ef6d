"""Linear and attentive classifiers on frozen features.

    names, encode = linear_features(opt, "mae")
    name, classifier, num_train = train_linear_classifier(model, opt, names, encode, recipe)
    classifier.scores(x), classifier.evaluate(x, labels)

A recipe leaves one number open: the learning rate of SGD, or C of a logistic regression.

    training images -> five folds -> a head for each candidate, trained without one fold
                                  -> accuracy of each candidate on the images it has not seen
                    -> one head with the best candidate, trained on all of them
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib import distributed, metrics, progress, rng
from lib.run import cosine
from probes.common import choose_recipe, dino_features, extract_features, select_features

# B images, L tokens, D width, H attention heads, C classes; n images of a data set, n_lr candidates
# for the learning rate (or for the C of a logistic regression)

# lr: at batch 256, scaled linearly with the batch. mae, dino: as in their released code. park:
# batch and epochs of Park et al., table A.1; its lr 1 with weight decay 0.05 ("park paper";
# literal: the same lr at any batch, no sweep) would shrink the weights by 5% per step, so lr is
# our choice. logreg: a logistic regression, which has no schedule; the standardization is our
# choice. cae: CAE's attentive probe, lr 0.4 at batch 8192. part: part_classification, lr 0.4
# (linear) and 0.04 (attentive) at batch 1024.
LINEAR_RECIPES = {
    "mae":  dict(lr=0.1,   batch=16384, epochs=90,  warmup=10, lars=True,  standardize=True),
    "dino": dict(lr=0.001, batch=1024,  epochs=100, warmup=0,  lars=False, standardize=False),
    "park": dict(lr=0.1,   batch=1024,  epochs=50,  warmup=0,  lars=False, standardize=True),
    "park paper": dict(lr=1.0, batch=1024, epochs=50, warmup=0, lars=False, standardize=True,
                       weight_decay=0.05, literal=True),
    "logreg": dict(logreg=True, standardize=True),
    "cae":  dict(lr=0.0125, batch=8192, epochs=90,  warmup=10, lars=False, standardize=False),
    "part": dict(lr=0.1,   batch=1024,  epochs=90,  warmup=0,  lars=False, standardize=False),
    "part attentive":
            dict(lr=0.01,  batch=1024,  epochs=90,  warmup=0,  lars=False, standardize=False)}
# Candidates: times the recipe's lr. The range is wide because lr is scaled down with the batch of a
# small set.
LR_FACTORS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
# Candidates for C of a logistic regression, as in DINOv2, which has 45 values in the same range.
C_VALUES = tuple(10.0**power for power in range(-6, 6))
FOLDS = 5
LARGE_SET = 20_000       # from here on a single tenth is held out: its 2,000 images are enough
MAX_ITERS = 1000         # of L-BFGS, as in DINOv2; it stops earlier
COMPARE = dict(max_iter=100, tolerance=1e-4)      # scikit-learn's defaults, to choose C: it takes
                                                  # a third of the time

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

    A learned query attends to all tokens, with D/64 attention heads (our choice: rounded down to a
    divisor of D) and a LayerNorm each for query, key and value; then a projection, batch norm
    without affine parameters, and a linear classifier. As there is one query, no token is
    projected: q . (W_k x) = (W_k^T q) . x, and the weighted mean of W_v x is W_v times that of x.
    So n_lr heads cost hardly more than one. The shift of the key's LayerNorm is left out: it
    cancels in the softmax. bn: statistics of the batch norm at test time, "running" or those of the
    "batch".
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
        H = next(h for h in range(max(1, D // 64), 0, -1) if D % h == 0)
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
    """A trained head, the standardization of its input, and how its setting was chosen."""
    head: LinearHeads | AttentiveHeads   # one head, trained on all images
    mean: torch.Tensor | float
    scale: torch.Tensor | float
    setting: str                         # such as "lr 0.3 at batch 256"
    notes: list[str]                     # how it was chosen; whether the range was too narrow
    training: str                        # such as "LARS, standardized, 90 epochs"

    def scores(self, x):
        """x (n, ...) -> (n, C)."""
        parts = x.tensor_split(max(1, len(x) // 256))    # none of one image: --bn batch
        return torch.cat([self.head((part - self.mean) * self.scale)[:, 0] for part in parts])

    def evaluate(self, x, labels):
        """x (n, ...), labels (n,) -> accuracies in percent, a row of a Report."""
        return metrics.accuracy(self.scores(x), labels)


def train_classifier(x, labels, num_classes, recipe, epochs, seed, make_heads=LinearHeads):
    """x (n, views, ...): frozen features of several views of each image, labels (n,) -> Classifier.

    epochs: None for the recipe's. make_heads: LinearHeads or AttentiveHeads. The candidate is
    chosen by the accuracy after the last epoch, on images that the head has not seen; the head is
    then trained on all images. ValueError: fewer than 10 images.
    """
    mean, scale = 0.0, 1.0
    if recipe["standardize"]:
        var, mean = torch.var_mean(x, dim=(0, 1))
        scale = (var + 1e-6).rsqrt()
        x = (x - mean) * scale
    training = ", standardized" * recipe["standardize"]
    if recipe.get("logreg"):
        candidates, setting, training = C_VALUES, "C {:g}", "L-BFGS" + training

        def fit(rows, values):
            stopping = COMPARE if len(values) > 1 else {}
            return fit_logistic_regressions(x[rows, 0], labels[rows], num_classes, values,
                                            **stopping)
    else:
        epochs = epochs or recipe["epochs"]
        factors = (1.0,) if recipe.get("literal") else LR_FACTORS
        candidates = [factor * recipe["lr"] for factor in factors]
        setting = "lr {:,g}"
        training = f"{'LARS' if recipe['lars'] else 'SGD'}{training}, {epochs} epochs"
        setting += " at batch 256" * (not recipe.get("literal"))

        def fit(rows, values):
            return train_heads(x[rows], labels[rows], num_classes, recipe, values, epochs, seed,
                               make_heads)

    number, notes = 0, []
    if len(candidates) > 1:
        correct, how = cross_validate(fit, x, labels, candidates, seed)
        number, notes = choose_candidate(correct, [setting.format(c) for c in candidates], how)
    head = fit(torch.arange(len(x), device=x.device), [candidates[number]])
    return Classifier(head, mean, scale, setting.format(candidates[number]), notes, training)


@torch.no_grad()
def cross_validate(fit, x, labels, candidates, seed):
    """-> correct (m, n_lr) bool: whether each candidate is right about images it was not trained
    on; and which images these are, in words.

    fit: (rows, candidates) -> heads trained on these rows of x. All images are held out once, in
    FOLDS parts with equal fractions of every class; of a LARGE_SET only a tenth. They are
    classified from their first view.
    """
    n = len(labels)
    if n < 10:
        raise ValueError(f"a part of the training images is held out to choose a setting: {n} are "
                         f"too few; raise --limit or change --data")
    parts, held_out_parts = (10, 1) if n >= LARGE_SET else (FOLDS, FOLDS)
    order = torch.randperm(n, generator=rng.generator(seed, "folds")).to(labels.device)
    order = order[labels[order].argsort(stable=True)]    # by class, at random within each
    part = torch.empty_like(order)
    part[order] = torch.arange(n, device=labels.device) % parts
    correct = []
    for number in progress.bar(range(held_out_parts), "heads", unit="folds",
                               shown=distributed.rank() == 0):
        held_out = (part == number).nonzero()[:, 0]
        heads = fit((part != number).nonzero()[:, 0], candidates)
        correct += [heads(x[rows, 0]).argmax(2) == labels[rows, None]
                    for rows in held_out.tensor_split(max(1, len(held_out) // 256))]
    correct = torch.cat(correct)
    how = f"{FOLDS} folds of the" if held_out_parts > 1 else f"{len(correct):,} held-out"
    return correct, f"{how} training images"


def choose_candidate(correct, names, how):
    """correct (m, n_lr) bool -> index of the candidate with the best accuracy, notes.

    Of several that are equally good, the one in their middle: it is the farthest from those that
    are worse.
    """
    accuracy = correct.double().mean(0)
    best = (accuracy == accuracy.max()).nonzero()[:, 0].tolist()
    number = best[len(best) // 2]
    percent, m = 100 * accuracy[number].item(), len(correct)
    error = 100 * (accuracy[number] * (1 - accuracy[number]) / m).sqrt().item()
    close = int((100 * accuracy >= percent - error).sum()) - 1
    notes = [f"{names[number]}: {percent:.1f} +- {error:.1f}% (standard error) in {how}; "
             f"{close} of {len(names) - 1} other values are within one standard error"]
    if number in (0, len(names) - 1):
        notes.append(f"{names[number]} is at the edge of the range {names[0]} to {names[-1]}: a "
                     f"better value may be outside")
    return number, notes


@torch.enable_grad()
def train_heads(x, labels, num_classes, recipe, lrs, epochs, seed, make_heads=LinearHeads):
    """Trains a head for each learning rate `lrs` (at batch 256) on the same batches -> heads.

    x: (n, views, ...), labels: (n,).
    """
    (n, views), g = x.shape[:2], rng.generator(seed, "linear")
    heads = make_heads(len(lrs), x.shape[-1], num_classes, g, x.device)
    batch = min(n, max(heads.min_batch, min(recipe["batch"], n // 32)))
    alone = n % batch == 1 < heads.min_batch             # batch norm maps a single image to 0
    used = n - alone
    total = epochs * -(-used // batch)
    warmup = total * recipe["warmup"] // recipe["epochs"]
    lr_scale = 1.0 if recipe.get("literal") else batch / 256
    peaks = torch.tensor(lrs, device=x.device) * lr_scale
    momenta = [torch.zeros_like(p) for p in heads.params]
    for p in heads.params:
        p.requires_grad_()

    step = 0
    for _ in range(epochs):
        order = torch.randperm(n, generator=g)[:used].to(x.device)
        for index in order.split(batch):
            view = torch.randint(views, (len(index),), generator=g).to(x.device)
            scores = heads(x[index, view], training=True)                   # (B, n_lr, C)
            targets = labels[index, None].expand(-1, len(lrs))
            loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")
            grads = torch.autograd.grad(loss / len(index), heads.params)    # a mean for each head
            with torch.no_grad():
                lr = peaks * cosine(step, total, 1.0, 0.0, warmup)
                sgd_step(heads.params, grads, momenta, lr, recipe["lars"],
                         recipe.get("weight_decay", 0))
            step += 1
    for p in heads.params:
        p.requires_grad_(False)
    return heads


@torch.no_grad()
def fit_logistic_regressions(x, labels, num_classes, c_values, max_iter=MAX_ITERS, tolerance=1e-5):
    """Multinomial logistic regressions by L-BFGS, one for each C -> LinearHeads without randomness.

    x: (n, D), labels: (n,). Minimizes C * sum of the cross-entropies + |weight|^2 / 2 (the bias is
    not regularized), as in scikit-learn, here divided by C * n. Each starts from the solution of
    the one before: from strong to weak regularization few steps are needed. It ends after max_iter
    steps, or when the largest gradient is below `tolerance`. In float64, because the line search
    compares losses that differ by less than float32 resolves.
    """
    x, n = x.double(), len(x)
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    weights, biases = [], []
    for c in c_values:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, tolerance_grad=tolerance,
                                      tolerance_change=1e-9, line_search_fn="strong_wolfe",
                                      history_size=10)   # 100, its default, takes longer

        def closure(c=c):
            """The loss. Its gradients by hand: autograd takes twice as long."""
            loss = weight.square().sum() / (2 * c * n)
            weight.grad, bias.grad = weight / (c * n), torch.zeros_like(bias)
            for part, y in zip(x.split(2**16), labels[:, None].split(2**16)):   # to save memory
                log_p = F.linear(part, weight, bias).log_softmax(1)
                loss -= log_p.gather(1, y).sum() / n
                error = log_p.exp().scatter_add_(1, y, -torch.ones_like(y, dtype=x.dtype)) / n
                weight.grad += error.T @ part
                bias.grad += error.sum(0)
            return loss

        optimizer.step(closure)
        weights.append(weight.float())
        biases.append(bias.float()[:, None])
    heads = LinearHeads(len(c_values), x.shape[1], num_classes, torch.Generator(), x.device)
    heads.params = [torch.stack(weights), torch.stack(biases)]
    return heads


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


def choose_linear_recipe(opt, default="mae", names=("mae", "dino", "park", "logreg")):
    """Name and settings of --recipe for a linear classifier; with --paper-lr those of Park et al.,
    table A.1, as printed. names: the recipes that the task has."""
    names = dict.fromkeys([default, *names])
    name, recipe = choose_recipe(opt, {name: LINEAR_RECIPES[name] for name in names})
    if opt.paper_lr and name != "park":
        raise ValueError("--paper-lr is for recipe park only: add --recipe park")
    return name, LINEAR_RECIPES["park paper"] if opt.paper_lr else recipe


def linear_features(opt, recipe_name):
    """Names and function of the features of a recipe. mae: class token; park: mean patch token, as
    SimMIM trains no class token; logreg: that of the task's default recipe; dino: see
    dino_features, which names its only feature itself."""
    patch = recipe_name == "park" or recipe_name == "logreg" and opt.task != "linear"
    name = opt.feature or ("patch" if patch else "cls")
    if recipe_name == "dino" and not opt.feature:
        return [name], dino_features
    return select_features(opt, name)


def train_linear_classifier(model, opt, names, encode, recipe):
    """-> name of the feature, Classifier, number of training images."""
    features, labels, num_classes = extract_features(model, opt, "train", names, encode,
                                                     mirror=uses_mirror(recipe))
    [(name, x)] = features.items()
    x = x if uses_mirror(recipe) else x[:, None]                            # (n, views, D)
    return name, train_classifier(x, labels, num_classes, recipe, opt.epochs, opt.seed), len(labels)


def uses_mirror(recipe):
    """Whether the mirror image of each training image is also used. SGD draws one of the two."""
    return not recipe.get("logreg")


def describe_training(recipe):
    """What follows the view of the images in a protocol: views in training, choice of the
    setting."""
    mirror = " and its mirror image, no random crops" * uses_mirror(recipe)
    return f"{mirror}; {describe_selection(recipe)}"


def describe_selection(recipe):
    """How the setting was chosen, for a protocol."""
    if recipe.get("literal"):
        return (f"lr {recipe['lr']:g} and weight decay {recipe['weight_decay']:g} as printed, "
                f"last epoch")
    if recipe.get("logreg"):
        return describe_choice("C")
    return f"{describe_choice()}, last epoch"


def describe_choice(setting="lr"):
    return (f"{setting} chosen by {FOLDS} folds of the training images (of {LARGE_SET:,} or more "
            f"by a tenth), then trained on all of them")
