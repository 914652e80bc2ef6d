"""Evaluation during a run: accuracy of two classifiers, statistics that reveal a collapse,
warnings, and visualization.png, a grid of images and heat maps.

Methods call these functions in the steps where `run.eval_due` is true. None of them changes a
weight.
"""
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data
from lib import augment, checkpoints, distributed, metrics, progress

# B images, N = h x w patches, H heads, K prototypes, S image side

# --------------------------------------------------------------------------------------------------
# Evaluation during training


def evaluate(run, encoder, bank, queries, interpolation="bicubic"):
    """Accuracies in percent of two classifiers on frozen features, and feat_std.

    bank and queries: datasets.Images, in a run 2,000 and 500. Returns {"knn": weighted 10 nearest
    neighbors (metrics.knn) by class token, "linear": a linear classifier in closed form
    (metrics.ridge) on the class token, "knn_patch", "linear_patch": the same with the mean patch
    token}, if the two sets have the same classes and are different splits; and {"feat_std":
    standard deviation of the bank's L2-normalized class tokens times sqrt(D): 1 if they are spread
    over the sphere, 0 if they are all equal}. In a model without a class token the mean patch token
    takes its place. If only some of the processes can read all images, {} is returned in all of
    them. At the first evaluation of a run the accuracies of raw pixels and of an untrained network
    are printed."""
    found = {}
    with run.evaluation(encoder):
        known = embed(run, encoder, bank, interpolation)
        if known[0].shape[1] > 1:                        # one image has no standard deviation
            tokens = known[0][0]
            found["feat_std"] = F.normalize(tokens, dim=-1).std(0).mean() * tokens.shape[1]**0.5
        labeled = bank.labels is not None and queries.labels is not None
        if labeled and bank.classes == queries.classes and bank.split != queries.split:
            found |= accuracies(known, embed(run, encoder, queries, interpolation))
            if run.step * run.cfg.evals // run.total == 0:       # no evaluation before this one
                print_baselines(run, encoder, bank, queries, interpolation)
    # All processes must log the same names, or they would wait for each other forever. If only some
    # of them can read all images, the numbers of values differ: their variance is not 0.
    n = distributed.all_mean(torch.tensor([len(found), len(found)**2.0], device=run.device))
    return found if n[1] == n[0]**2 else {}


def embed(run, encoder, images, interpolation="bicubic"):
    """Class tokens and mean patch tokens (2, n, D) of the images that can be read, and their labels
    (n,), None if there are none. The mean patch token replaces a missing class token."""
    tokens, numbers = [], []
    with progress.bar(desc=f"encoding {images.split}", total=len(images), unit="images",
                      shown=distributed.rank() == 0) as bar:
        for x, index in data.batches(images, run.cfg.img_size, device=run.device,
                                     workers=run.cfg.workers, interpolation=interpolation):
            with run.autocast():
                cls, patches = encoder.split(encoder(x))
            patch = patches.float().mean(1)
            tokens.append(torch.stack([patch if cls is None else cls.float(), patch]))
            numbers.append(index)
            bar.update(len(x))
    labels = images.labels
    return torch.cat(tokens, 1), None if labels is None else labels.to(run.device)[
        torch.cat(numbers)]


def accuracies(bank, queries):
    """bank and queries: results of `embed` -> {"knn", "linear", "knn_patch", "linear_patch":
    accuracy in percent}."""
    (tokens, labels), (query_tokens, truth) = bank, queries
    found = {}
    for suffix, x, q in zip(("", "_patch"), tokens, query_tokens):
        for name, predicted in (("knn", metrics.knn(x, labels, q, k=(10,))[10]),
                                ("linear", metrics.ridge(x, labels, q))):
            found[name + suffix] = 100 * (predicted == truth).float().mean()
    return found


class Pixels(torch.nn.Module):
    """An encoder whose only token is the image itself, at 32 x 32 pixels."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 32).flatten(1)                       # (B, 3072)

    def split(self, x):
        return None, x[:, None]


def print_baselines(run, encoder, bank, queries, interpolation):
    """Prints the accuracies of raw pixels and of an untrained network with the settings of
    `encoder`."""
    untrained = type(encoder)(**encoder.config).to(run.device).eval()
    for name, baseline in (("raw pixels", Pixels()), ("an untrained network", untrained)):
        found = accuracies(*(embed(run, baseline, x, interpolation) for x in (bank, queries)))
        if name == "raw pixels":
            found = {key: x for key, x in found.items() if not key.endswith("_patch")}
        run.print0(f"for comparison, {name}: " +
                   "  ".join(f"{key} {x:.1f}%" for key, x in found.items()))


class AssignmentStats:
    """Two statistics in nats that reveal a collapse of assignments to K prototypes, see compute().
    They cover everything that was added, in all processes."""

    def __init__(self):
        self.rows, self.entropy, self.total = 0, 0, 0

    def add(self, P):
        """P: (..., K) assignments, each row a distribution."""
        P = P.flatten(0, -2)
        self.rows += P.new_full((), len(P))
        self.entropy += torch.special.entr(P).sum()
        self.total += P.sum(0)

    def compute(self):
        """Returns entropy, the mean entropy of an assignment, and mi, the mutual information of
        image (or patch) and prototype: the entropy of the mean assignment minus `entropy`. To be
        called in all processes."""
        rows = distributed.all_mean(self.rows).clamp(min=1)
        entropy = distributed.all_mean(self.entropy) / rows
        mean = distributed.all_mean(self.total) / rows                   # (K,)
        return entropy, torch.special.entr(mean).sum() - entropy


# The losses that warn_of_* get are those of the last micro-batch; only process 0 prints.


def warn_of_equal_assignments(run, what, entropy, mi, K):
    """Prints a warning when all images (or patches) get the same assignment to K prototypes."""
    if mi > 0.05:
        return
    kind, cure = (("uniform", "a lower --teacher-temp (during its warmup --warmup-teacher-temp; "
                   "for the patches of iBOT --teacher-patch-temp), or --use-bn-in-head")
                  if entropy > math.log(K) / 2 else
                  ("one-hot", "a lower --center-momentum"))
    run.print0(f"collapsed: all {what} get the same assignment, {kind} (entropy {entropy:.2f}, "
               f"ln K {math.log(K):.2f}); try {cure}")


def warn_of_equal_tokens(run, feat_std, name, loss, chance):
    """Prints a warning when all class tokens are nearly equal and the contrastive loss, logged as
    `name`, is near or above `chance`. Nearly equal tokens alone are not a collapse: batch norms in
    the heads can amplify small differences, and then the loss is lower."""
    if feat_std < 0.05 and loss > 0.98 * chance:
        run.print0(f"collapsed: all class tokens are nearly equal (feat_std near 0), and {name} is "
                   f"at chance level ({chance:.2f}); try a lower --lr or more --warmup-epochs")


def warn_of_flat_reconstruction(run, loss, flat, name="loss"):
    """Prints a warning when the reconstruction is hardly better than the mean of each patch. `flat`
    is the loss of that mean (MAE, ASL)."""
    if loss > 0.98 * flat:
        run.print0(f"the reconstruction is still flat in every patch ({name} not clearly below "
                   f"{flat:.2f}): expected early in training; otherwise try another --lr or a "
                   f"lower --mask-ratio")


def warn_of_mean_color(run, loss, mean_color, name, cure):
    """Prints a warning when the reconstruction is worse than the mean color of the visible pixels,
    predicted for all masked ones (SimMIM, hybrid). mean_color: the loss of that prediction."""
    if loss > mean_color:
        run.print0(f"the reconstruction is no better than the mean color of what is visible "
                   f"({name} above loss_mean_color): expected early in training; otherwise try "
                   f"{cure}")


def warn_of_token_frequencies(run, loss, token_entropy, name="loss"):
    """Prints a warning when masked tokens are predicted worse than by their frequencies, which
    would give the loss token_entropy (BEiT, CAE)."""
    if loss > token_entropy:
        run.print0(f"masked tokens are predicted no better than by their frequencies ({name} above "
                   f"token_entropy): expected early in training; otherwise try another --lr")


# --------------------------------------------------------------------------------------------------
# Images


def heat_map(x):
    """(n, h, w) in [0, 1] -> (n, 3, h, w) uint8, dark blue to yellow (safe for color blindness)."""
    ramp = torch.tensor([[25, 20, 80], [35, 95, 140], [40, 160, 135], [150, 210, 70],
                         [253, 231, 37]])
    place = x.cpu().float().clamp(0, 1) * (len(ramp) - 1)
    low = place.long().clamp(max=len(ramp) - 2)
    color = ramp[low] + (ramp[low + 1] - ramp[low]) * (place - low)[..., None]
    return color.permute(0, 3, 1, 2).to(torch.uint8)


def scaled_heat_map(x, size):
    """Maps (n, h, w) of values >= 0 -> heat maps (n, 3, size, size), the maximum of each yellow."""
    x = x / x.amax((1, 2), keepdim=True).clamp(min=1e-9)
    return heat_map(F.interpolate(x[:, None], size)[:, 0])


def last_attention(run, backbone, x):
    """Attention weights (B, H, L, L) of the last block of a ViT."""
    last = backbone.depth - 1
    with run.autocast():
        _, maps = backbone.layers(x, [last], attention=[last])
    return maps[last]


def attention_map(weights, size):
    """Attention of the class token to the patches, averaged over the heads, as heat maps.
    weights: (n, H, N+1, N+1) of a block, or (n, H, N). Returns (n, 3, size, size) uint8."""
    weights = weights[:, :, 0, 1:] if weights.ndim == 4 else weights
    weights = weights.float().mean(1)                                    # (n, N)
    side = math.isqrt(weights.shape[1])
    return scaled_heat_map(weights.unflatten(1, (side, side)), size)


def assignment_map(P, Q, size):
    """Bars of assignments P and Q, both (n, K), to the 16 prototypes that P uses most: P above, Q
    below. Returns (n, 3, size, size) uint8."""
    top = P.sum(0).topk(min(16, P.shape[1])).indices
    return scaled_heat_map(torch.stack([P, Q], 1)[:, :, top], size)


def save_self_distillation(run, crops, attention, P=None, Q=None, extra=None, n=8):
    """Writes visualization.png of DINO, iBOT and SelfPatch. Its columns are crops after the
    augmentations; the attention in the first one, of the teacher (SelfPatch on MoBY: of the
    student); and, with P and Q, assignments to the 16 most used prototypes, of the first crop by
    the teacher (upper bars) and of the second by the student (lower bars).

    crops: views (B, 3, S, S), global ones first; attention: see attention_map; P, Q: (B, K);
    extra: more columns {title: (n, 3, S, S) uint8}."""
    size = run.cfg.img_size
    g1, g2, *local = (view[:n] for view in crops)
    columns = {"global 1": g1, "global 2": g2}
    if local:
        columns["local"] = F.interpolate(local[0], size)
    columns = {title: augment.denormalize(x) for title, x in columns.items()}
    columns["attention"] = attention_map(attention[:n], size)
    if P is not None:
        columns["assignment"] = assignment_map(P[:n], Q[:n], size)
    save_grid(run, columns | (extra or {}))


def token_columns(x, mask, ids, predicted, tokenizer):
    """Columns of save_grid for BEiT and CAE: images x (n, 3, S, S), their visible patches, and the
    tokenizer's reconstructions from the true tokens `ids` (n, N) and from `predicted` ones (n, N).
    mask: (n, N) bool, True: masked."""
    size, side = x.shape[3], math.isqrt(mask.shape[1])
    pixel_mask = F.interpolate(mask.view(-1, 1, side, side).float(), size) > 0
    columns = {"image": augment.denormalize(x), "visible": augment.denormalize(x * ~pixel_mask)}
    for title, tokens in (("true tokens", ids), ("predicted tokens", predicted)):
        decoded = F.interpolate(tokenizer.decode(tokens), size)
        columns[title] = decoded.mul(255).round().to(torch.uint8)
    return columns


def prototype_map(ids, size):
    """Indices of prototypes (n, h, w) -> (n, 3, size, size) uint8, a color per prototype; -1 is
    dark."""
    values = torch.where(ids < 0, 0, 0.2 + ids * 0.618 % 0.8)
    return heat_map(F.interpolate(values[:, None], size)[:, 0])


def fill_patches(patches, mask, values):
    """Patches (B, N, 3pp), the channel fastest, put together to images (B, 3, S, S); those where
    `mask` (B, N) is True are replaced by `values`, a number or (B, N, 3pp)."""
    values = torch.as_tensor(values, dtype=patches.dtype, device=patches.device)
    x = torch.where(mask[:, :, None], values, patches)
    side, p = math.isqrt(x.shape[1]), math.isqrt(x.shape[2] // 3)
    x = x.unflatten(2, (p, p, 3)).unflatten(1, (side, side))             # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def save_grid(run, columns):
    """Writes visualization.png, with a column for each {title: (n, 3, S, S) uint8} and a row for
    each image. Small images are enlarged to 96 px or more, so that titles fit above them."""
    if run.rank > 0:
        return
    widest = max(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(title) for title in columns)
    size = run.cfg.img_size                              # 4 px between two columns
    scale = math.ceil(max(96 / size, widest / (size + 4)))
    rows = torch.cat([F.pad(x.cpu(), (0, 4, 0, 4), value=255) for x in columns.values()], 3)
    grid = Image.fromarray(torch.cat(list(rows), 1).permute(1, 2, 0).numpy())
    page = Image.new("RGB", (grid.width * scale, grid.height * scale + 16), "white")
    page.paste(grid.resize((page.width, page.height - 16), Image.NEAREST), (0, 16))
    for i, title in enumerate(columns):
        ImageDraw.Draw(page).text((i * page.width // len(columns), 2), title, fill="black")
    checkpoints.write_atomic(run.out / "visualization.png", lambda f: page.save(f, "PNG"))
