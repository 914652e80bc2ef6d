"""Probes of image classes: a frozen encoder, and nearest neighbors, a small trained head, or the
checkpoint's own classifier.

    python evaluate.py --task knn --k 10 20
    python evaluate.py --task linear --recipe dino
    python evaluate.py --task few_shot --episodes 600
    python evaluate.py --task classify --checkpoint deit_base_patch16_224-b5f2ef4d.pth

The heads and their training are in probes/heads.py.
"""
import contextlib
import functools

import torch
import torch.nn.functional as F

from lib import checkpoint_heads, datasets, metrics, rng
from probes.common import (
    Model,
    Options,
    Report,
    all_tokens,
    block_features,
    describe_norm,
    describe_output,
    describe_view,
    extract_features,
    load_labeled,
    load_split,
    require_tokens,
    select_features,
)
from probes.heads import (
    LINEAR_RECIPES,
    AttentiveHeads,
    choose_linear_recipe,
    describe_training,
    linear_features,
    train_classifier,
    train_linear_classifier,
    uses_mirror,
)

# B images, D width, C classes; n images of a data set


def knn(model: Model, opt: Options) -> Report:
    """k-nearest-neighbor classification by cosine similarity; no training.

    The nearest training images vote for the class of a test image. Our choice, here and in all
    probes of classes: images of CIFAR are not cropped, see `describe_view`.
    """
    names, encode = select_features(opt, "cls", "patch", "hyber")
    bank, labels, num_classes = extract_features(model, opt, "train", names, encode)
    queries, truth, _ = extract_features(model, opt, "test", names, encode)
    k = sorted({min(n, len(labels)) for n in opt.k})
    rows = {}
    for name, z in bank.items():
        predicted = metrics.knn(z, labels, queries[name], k, tau=0.07, classes=num_classes)
        rows[name] = {f"k={n}": 100 * (predicted[n] == truth).double().mean().item() for n in k}
    clipped = [f"k is at most {len(labels)}, the number of training images"] * (max(opt.k) > k[-1])
    return Report(rows, "top-1; votes of the k nearest neighbors by cosine, weighted by "
                  f"exp(cosine / 0.07); {describe_output(model)}{describe_view(model, opt)}",
                  dict(train=len(labels), test=len(truth)), clipped)


def classify(model: Model, opt: Options) -> Report:
    """Accuracy of the checkpoint's own classifier (fine-tuned, supervised); no training.

    Its top-1 on ImageNet is known, so this checks a whole pipeline: weights, normalization, crops,
    labels. Class i of the classifier must be class i of the data set: ImageNet's folders (WordNet
    ids) in alphabetical order, as in all published files; those of another folder likewise.
    ValueError: no classifier in the file, or for another number of classes.
    """
    head = model.encoder and checkpoint_heads.classifier(model.encoder)
    if not head:
        raise ValueError(f"{model.name} contains no classifier: take a fine-tuned or supervised "
                         f"checkpoint, or train one with --task finetune --save")
    _, num_classes = load_labeled(model, opt, "test")
    if num_classes != head.num_classes:
        raise ValueError(f"the classifier of {model.name} has {head.num_classes:,} classes, and "
                         f"{opt.data} has {num_classes:,}: choose --data with the classes that it "
                         f"was trained on")

    def classifier_scores(encoder, x):
        tokens = encoder(x)
        with torch.autocast(x.device.type, enabled=False):
            return {"classifier": head(tokens.float())}

    scores, truth, _ = extract_features(model, opt, "test", ["classifier"], classifier_scores)
    feature = "class token" if head.fc_norm is None else "mean patch token"
    trained_on = model.source.data
    notes = [f"{model.name} was trained on {trained_on}: its classes must be those of {opt.data}, "
             f"in the same order"] * (trained_on not in (None, opt.data))
    return Report({"classifier": metrics.accuracy(scores["classifier"], truth)},
                  f"the classifier in the checkpoint, of the {feature}; {num_classes:,} classes in "
                  f"the order of {opt.data}; {describe_view(model, opt)}", dict(test=len(truth)),
                  notes)


def linear(model: Model, opt: Options) -> Report:
    """Linear classifier on frozen features.

    The papers encode a new random crop of every image in every epoch. Our choice: the test view and
    its mirror image are encoded once, and each epoch draws one of the two: one pass instead of 90.
    How much lower the result is than with the papers' protocol, and whether equally for all models,
    was not measured. Also our choice: a batch of at most 1/32 of the images, so that a small set
    gets enough steps; standardization by all training features, to which the recipes' BatchNorm
    without affine parameters converges; a cosine schedule per step; a sweep of 13 learning
    rates. The released code reports the best lr and epoch on the test images. Here lr is chosen by
    cross-validation on the training images, see `heads.train_classifier`; the result is that of the
    last epoch, and the test images are evaluated once.

    --recipe logreg is a logistic regression, as in iBOT and DINOv2, of the test view alone: no
    schedule, no batches, no seed; only C is chosen.

    --recipe park --paper-lr uses lr 1 (at any batch; the table calls it a base rate) and weight
    decay 0.05 of Park et al., table A.1, without a sweep. It is not the default because each step
    shrinks the weights by 5%, with momentum by ten times that: a head keeps little of what it
    learned.
    """
    recipe_name, recipe = choose_linear_recipe(opt)
    names, encode = linear_features(opt, recipe_name)
    name, head, num_train = train_linear_classifier(model, opt, names, encode, recipe)
    tests, truth, _ = extract_features(model, opt, "test", names, encode)
    return Report({name: head.evaluate(*tests.values(), truth)},
                  f"linear head, recipe {recipe_name} ({head.training}){describe_norm(model)}; "
                  f"{describe_view(model, opt)}"
                  f"{describe_training(recipe)}", dict(train=num_train, test=len(truth)),
                  [f"{model.name}: {note}" for note in head.notes])


def layerwise(model: Model, opt: Options) -> Report:
    """Linear classifier on the output of every block.

    Park et al., figure 11, a curve without numbers: the accuracy of masked models is highest before
    the last blocks, that of contrastive ones rises to the end. Recipe park (default) or logreg, as
    in `linear`: its settings, one pass over the images and its choice of lr or C. Also our choice:
    the mean patch token (--feature cls for the class token) without the final norm, each dimension
    standardized, as the scales of the blocks differ. All blocks come from one pass, so n x 2 x
    depth x D numbers must fit in memory. --paper-lr: the lr and weight decay of Park et al., see
    `linear`.
    """
    feature, depth = opt.feature or "patch", model.encoder.depth if model.encoder else 0
    if feature not in ("cls", "patch"):
        raise ValueError("layerwise takes --feature cls or patch")
    recipe_name, recipe = choose_linear_recipe(opt, "park", ("park", "logreg"))
    names = [f"block {number} {feature}" for number in range(1, depth + 1)]
    features, labels, num_classes = extract_features(model, opt, "train", names, block_features,
                                                     mirror=uses_mirror(recipe))
    tests, truth, _ = extract_features(model, opt, "test", names, block_features)
    heads = {name: train_classifier(x if uses_mirror(recipe) else x[:, None], labels, num_classes,
                                    recipe, opt.epochs, opt.seed) for name, x in features.items()}
    rows = {name: head.evaluate(tests[name], truth) for name, head in heads.items()}
    training = next(iter(heads.values())).training
    return Report(rows, f"linear head, recipe {recipe_name} ({training}), of every block, before "
                  f"the final norm; {describe_view(model, opt)}{describe_training(recipe)}",
                  dict(train=len(labels), test=len(truth)),
                  [f"{model.name}, {name}: {note}" for name, head in heads.items()
                   for note in head.notes])


def attentive(model: Model, opt: Options) -> Report:
    """Classifier with one learned query that attends to all tokens (CAE's attentive probe).

    For models without a trained class token. Zhu et al. (2023), table 1, with CAE's head and
    recipe: the query attends once to all tokens, including the class token, after the final norm.
    Our choice, as in `linear`: the test view and its mirror image instead of random crops, encoded
    once; small batches; a sweep of 13 learning rates, of which one is chosen by
    cross-validation; the result of the last epoch. Also our choice: lr ends at 0 (CAE: 1e-6); the
    last layer is initialized with standard deviation 0.01, as in the code of Zhu et al. for parts
    (CAE: 0.02, times 0.001); running statistics of the batch norm at test time. The published code
    uses those of the test batch, so that a prediction depends on the other images in it: --bn
    batch, with batches of 256 to 511 in the order of the data set. All tokens are kept in memory,
    in 16 bits, by each process, and twice while they are sorted or divided into folds. ValueError:
    pixels as a baseline; tokens that do not fit.
    """
    require_tokens(model, opt.task)
    features, labels, num_classes = extract_features(model, opt, "train", ["tokens"], all_tokens,
                                                     mirror=True)
    tests, truth, _ = extract_features(model, opt, "test", ["tokens"], all_tokens)
    recipe = LINEAR_RECIPES["cae"]
    head = train_classifier(features["tokens"], labels, num_classes, recipe, opt.epochs, opt.seed,
                            functools.partial(AttentiveHeads, bn=opt.bn))
    return Report({"tokens": head.evaluate(tests["tokens"], truth)},
                  f"one query attends to all tokens{describe_norm(model)}, batch norm"
                  f"{' of the test batch' * (opt.bn == 'batch')}, linear; recipe cae "
                  f"({head.training}); {describe_view(model, opt)}{describe_training(recipe)}",
                  dict(train=len(labels), test=len(truth)),
                  [f"{model.name}: {note}" for note in head.notes])


def few_shot(model: Model, opt: Options) -> Report:
    """5-way 1-shot classification by cosine similarity; no training.

    MMC, table 8: the class token. Accuracy: the prediction is the most similar of five images, one
    of each class. F1: two images are predicted to have the same class if their similarity exceeds a
    threshold T; the best T of 0.1, 0.2 ... 0.9, chosen on the evaluated pairs themselves. Our
    choice, as the paper does not state them: 600 episodes with 15 queries of each class, from the
    test split; accuracy with its 95% interval; F1 over the pairs of all episodes together; square
    images are not cropped. At chance level accuracy is 20%; predicting "same" for all pairs gives
    an F1 of 33.3%.
    """
    ways, queries, thresholds = 5, 15, [t / 10 for t in range(1, 10)]
    names, encode = select_features(opt, "cls")
    load_labeled(model, opt, "test")                     # first, for its error messages
    whole = images_are_square(model, opt)
    features, labels, num_classes = extract_features(model, opt, "test", names, encode, whole=whole)
    members = [(labels == c).nonzero()[:, 0] for c in range(num_classes)]
    members = [rows for rows in members if len(rows) > queries]
    if len(members) < ways:
        raise ValueError(f"few_shot needs {ways} classes with {queries + 1} test images each; "
                         f"{opt.data} has {len(members)}: raise --limit or change --data")
    g = rng.generator(opt.seed, "few_shot")

    def draw_images(rows):
        return rows[torch.randperm(len(rows), generator=g)[:queries + 1].to(rows.device)]

    def draw_episode():
        classes = torch.randperm(len(members), generator=g)[:ways].tolist()
        return torch.stack([draw_images(members[c]) for c in classes])      # (5, 1 + 15)

    episodes = torch.stack([draw_episode() for _ in range(opt.episodes)])
    truth = torch.arange(ways, device=labels.device).repeat_interleave(queries)        # (75,)
    rows = {}
    for name, z in features.items():
        z = F.normalize(z, dim=1)
        similarity = torch.cat([                                             # (episodes, 75, 5)
            z[part[:, :, 1:].flatten(1)] @ z[part[:, :, 0]].mT for part in episodes.split(64)])
        accuracy = (similarity.argmax(2) == truth).double().mean(1)          # (episodes,)
        same = (truth[:, None] == torch.arange(ways, device=truth.device)).expand_as(similarity)
        f1 = metrics.f1_sweep(similarity, same, thresholds)
        interval = 1.96 * accuracy.std().item() / opt.episodes ** 0.5
        rows[name] = {"accuracy": 100 * accuracy.mean().item(), "+-": 100 * interval,
                      "F1": 100 * f1.max().item(), "T x 100": 100 * thresholds[int(f1.argmax())],
                      **{f"F1 {t}": 100 * value for t, value in zip(thresholds, f1.tolist())}}
    return Report(rows, f"5-way 1-shot, {opt.episodes} episodes, 15 queries of each class, "
                  f"cosine; {describe_output(model)}{describe_view(model, opt, whole)}; accuracy "
                  f"+- 95% interval; F1 of predicting the same class above T, at the best T on "
                  f"these pairs; chance level 20.0 and 33.3", dict(test=len(labels)),
                  [f"{len(members)} classes of {opt.data}, test split"])


def images_are_square(model, opt):
    """Whether the first image file that can be read is square. Then all are taken to be, and none
    is cropped."""
    paths = load_split(opt.data, opt.data_root, "test", model.img_size, opt.limit,
                       model.device).paths
    for path in paths or ():
        with contextlib.suppress(Exception):             # a damaged file can raise any exception
            return len(set(datasets.read_image(path).size)) == 1
    return False
