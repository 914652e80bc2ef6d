"""Probes of what a linear classifier on frozen features relies on: shape, texture, frequencies.

    python evaluate.py --task shape_bias --show                              # on toy, offline
    python evaluate.py --task shape_bias --data imagenet --data-root /data
    python evaluate.py --task frequency_noise --eps 0.7
"""
import math
from pathlib import Path

import torch

import data
from lib import distributed, metrics, rng
from probes import annotations
from probes.annotation_files import load_image
from probes.common import (
    Model,
    Options,
    Report,
    describe_view,
    encode_batches,
    extract_features,
    load_labeled,
)
from probes.figures import FigureRows, save_image_grid
from probes.heads import (
    choose_linear_recipe,
    describe_selection,
    linear_features,
    train_linear_classifier,
)

# B images, S image side

# The 16 categories of the cue-conflict set: which of ImageNet's 1,000 classes, in sorted order,
# belong to each
IMAGENET_CLASSES = {name: [n for part in text.split() for low, _, high in [part.partition("-")]
                           for n in range(int(low), int(high or low) + 1)] for name, text in {
    "airplane": "404", "bear": "294-297", "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914", "bottle": "440 720 737 898 899 901 907", "car": "436 511 817",
    "cat": "281-286", "chair": "423 559 765 857", "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385 386", "keyboard": "508 878", "knife": "499", "oven": "766",
    "truck": "555 569 656 675 717 734 864 867"}.items()}


def shape_bias(model: Model, opt: Options) -> Report:
    """Fraction of decisions by shape rather than by texture, on cue-conflict images.

    Park et al., figure 8a: on "Stylized ImageNet", which we take to be its authors' cue-conflict
    images, the 1,200 whose shape and texture disagree (a cat with the skin of an elephant). The
    classifier is the linear probe, trained on ImageNet (--data imagenet). A category's probability
    is the mean over its ImageNet classes. The shape bias is the fraction of decisions for the shape
    among those for either cue, mean over the 16 shapes; a supervised ResNet-50 has about 21%.
    Recipe park, see `linear`. Not implemented: a fine-tuned classifier (Park et al., F.2), and
    accuracy on Stylized-ImageNet.

    toy, our synthetic substitute: the classifier is trained on toy, where the shape determines the
    class, and nine of ten creatures wear its typical pattern, the texture. The test images are
    drawn with the pattern of another class, and the prediction is one of the 16 classes, which are
    the categories. Random predictions have a shape bias of 50%, and 12.5% (two of 16) are either.

    ValueError: other data than toy and ImageNet, or not all classes of ImageNet.
    """
    recipe_name, recipe = choose_linear_recipe(opt, "park")
    stimuli = annotations.cue_conflict(opt.data, opt.data_root, opt.limit, model.img_size)
    on_toy = opt.data == "toy"
    if not on_toy and (num_classes := load_labeled(model, opt, "train")[1]) != 1000:
        raise ValueError(f"shape_bias needs all 1,000 classes of ImageNet, and this folder has "
                         f"{num_classes:,}: get the others, or choose another --data-root")
    names, encode = linear_features(opt, recipe_name)
    _, head, num_train = train_linear_classifier(model, opt, names, encode, recipe)
    images = stimuli.images
    batches = data.batches(images, model.img_size, opt.batch_size, model.device, mean=model.mean,
                           std=model.std, workers=opt.workers, interpolation=model.interpolation,
                           resize=model.img_size if opt.no_crop else None, rank=distributed.rank(),
                           world=distributed.world_size())
    features, index = encode_batches(model, opt, batches, names, encode, len(images),
                                     ("cue-conflict", opt.no_crop))
    [(name, z)] = features.items()
    scores, index = head.scores(z), index.cpu()
    predicted = scores.argmax(1) if on_toy else predict_category(scores, stimuli.classes)
    predicted = predicted.cpu()
    shapes, textures = stimuli.shapes[index], stimuli.textures[index]
    conflict = shapes != textures
    bias, either = metrics.shape_bias(predicted[conflict], shapes[conflict], textures[conflict])
    values = torch.tensor(list(bias.values()), dtype=torch.float64)
    mean, undecided = values.nanmean().item(), int(values.isnan().sum())
    notes = [f"{undecided} of {len(bias)} shapes have no decision for shape or texture and are not "
             f"in the mean"] * bool(undecided)
    row = {"shape bias": 100 * mean, "either": 100 * either}
    row |= {stimuli.classes[c]: 100 * value for c, value in bias.items()}
    if opt.show:
        save_decisions(stimuli, index[conflict], predicted[conflict],
                       Path(opt.out) / f"shape_bias-{opt.data}-{model.name}.png")
    decision = ("class with the highest score" if on_toy else
                "mean probability of each category's classes")
    return Report({name: row}, f"linear head, recipe {recipe_name} ({head.training}); "
                  f"{describe_selection(recipe)}; {describe_view(model, opt, opt.no_crop)}; "
                  f"{decision}; mean over shapes of shape / (shape or texture)",
                  dict(train=num_train, test=int(conflict.sum())),
                  [f"{model.name}: {note}" for note in [*head.notes, *notes]])


def predict_category(scores, categories):
    """(B, 1000) scores -> (B,) the category with the largest mean probability of its classes."""
    p = scores.softmax(1)
    return torch.stack([p[:, IMAGENET_CLASSES[name]].mean(1) for name in categories], 1).argmax(1)


def save_decisions(stimuli, index, predicted, path):
    """Writes a figure of up to eight images (of `index`), each with its shape, its texture and the
    predicted category."""
    figure, names = FigureRows(8), stimuli.classes
    for i, decision in zip(index.tolist(), predicted.tolist()):
        shape, texture = stimuli.shapes[i].item(), stimuli.textures[i].item()
        figure.add({shape, texture}, (i, f"shape {names[shape]}, texture {names[texture]}, "
                                         f"decision {names[decision]}"))
    images = stimuli.images
    rows = [[images.pixels[i] if images.paths is None else load_image(images.paths[i])]
            for i, _ in figure.rows()]
    save_image_grid(rows, path, names=[name for _, name in figure.rows()])


def frequency_noise(model: Model, opt: Options) -> Report:
    """Accuracy that a linear classifier loses under noise in a band of frequencies.

    Low frequencies are outlines, high ones texture. Park et al., figure 8b, a curve without
    numbers: contrastive models lose less at high frequencies. The head of the linear probe, on the
    test images of the data set; the noise is added to the normalized image and is the same for all
    models. Our choice, as the paper states only a window of 0.1 pi: strength 0.7 with random signs,
    bands 0.1 pi wide around f = 0, 0.1 pi ... pi, where f is the larger of |f_x| and |f_y|, not
    clipped. At 224 px the energy of a band rises with f, except that the last one, like the first,
    is half as wide (it ends at pi) and has about half the energy of the one before. Small images
    have few frequencies, and the energies go up and down (--equal-energy: the same in all bands).
    Recipe park, see `linear`. Not implemented: fine-tuned models (F.2).
    """
    recipe_name, recipe = choose_linear_recipe(opt, "park")
    names, encode = linear_features(opt, recipe_name)
    name, head, num_train = train_linear_classifier(model, opt, names, encode, recipe)

    def top1(change):
        tests, truth, _ = extract_features(model, opt, "test", names, encode, change=change)
        return metrics.accuracy(head.scores(*tests.values()), truth)["top-1"], len(truth)

    clean, num_test = top1(None)
    drops, sizes, notes = {}, [], []
    for tenth in range(11):
        frequency = tenth / 10 * math.pi
        if size := int(frequency_band(model.img_size, frequency).sum()):
            def add_noise(x, index, frequency=frequency):
                return x + band_noise(index, x.shape[-1], frequency, opt.eps, opt.seed,
                                      opt.equal_energy)
            drops[f"{tenth / 10:g} pi"] = clean - top1(add_noise)[0]
        else:
            notes.append(f"images of {model.img_size} px have no frequency in the band around "
                         f"{tenth / 10:g} pi")
        sizes.append(size)
    if not opt.equal_energy and sizes[:-1] != sorted(sizes[:-1]):
        notes.append(f"at {model.img_size} px the numbers of frequencies in the bands, and with "
                     f"them the energies of the noise, do not rise steadily "
                     f"({' '.join(map(str, sizes))}): --equal-energy for a comparison of bands")
    mean = sum(drops.values()) / len(drops)
    return Report({name: {"mean drop": mean, "clean": clean, **drops}},
                  f"percentage points of top-1 lost to noise of strength {opt.eps:g} in a band 0.1 "
                  f"pi wide around a frequency" + ", equal energy" * opt.equal_energy +
                  f"; linear head, recipe {recipe_name} ({head.training}); "
                  f"{describe_selection(recipe)}; {describe_view(model, opt)}",
                  dict(train=num_train, test=num_test),
                  [f"{model.name}: {note}" for note in [*head.notes, *notes]])


def frequency_band(size, frequency, half=0.05 * math.pi):
    """(S, S) bool: the coefficients of fft2 whose larger frequency lies in [frequency - half,
    frequency + half).

    With every frequency its negative is in the band, so the filtered noise is real (our choice).
    The band in the authors' code is the difference of two squares with even sides around 0. Their
    rows and columns of the most negative frequencies have no positive counterpart (9% of a band at
    224 px); the real part that their code takes halves these and adds the counterpart, also halved.
    """
    w = 2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64).abs()
    w = torch.maximum(w[:, None], w) + 1e-9              # edges do not depend on rounding
    return (w >= frequency - half) & (w < frequency + half)


def band_noise(index, size, frequency, eps, seed=0, equal_energy=False):
    """(B,) image indices -> (B, 3, S, S): random signs times eps, limited to a frequency band."""
    noise = eps * rng.normal(index, (3, size, size), seed, "noise").sign()
    keep = frequency_band(size, frequency).to(index.device)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * keep).real
    if equal_energy:                                     # as if a tenth of `keep` were true
        noise = noise * (0.1 / keep.double().mean().clamp(min=1e-9).item()) ** 0.5
    return noise
