"""Probes of retrieval: are features of the same class, part or landmark similar?

    python evaluate.py --task object_retrieval --data toy-scenes
    python evaluate.py --task part_retrieval --show --baseline pixels untrained
    python evaluate.py --task landmark_retrieval --data roxford5k --img-size 512 --multiscale

The retrieval tasks train nothing: items are ranked by the cosine similarity to a query.
part_classification trains a head on the crops of part_retrieval.
"""
import functools
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import ImageFile
from PIL.Image import Resampling
from torchvision.transforms.v2 import functional as TF

from lib import augment, config, datasets, distributed, metrics, progress, rng, toy, tree
from probes import annotations
from probes.annotation_files import check_inside, load_image
from probes.common import (
    Model,
    Options,
    Report,
    all_tokens,
    choose_recipe,
    describe_norm,
    describe_output,
    describe_view,
    encode_batches,
    extract_features,
    is_toy,
    own_items,
    pooled_features,
    require_tokens,
    select_features,
)
from probes.figures import save_image_grid
from probes.heads import (
    LINEAR_RECIPES,
    AttentiveHeads,
    LinearHeads,
    describe_choice,
    train_classifier,
)

# B images, D width, S image side

# ---- objects -------------------------------------------------------------------------------------


def object_retrieval(model: Model, opt: Options) -> Report:
    """Average precision of retrieving the images (or boxes) of the same class.

    Zhu et al. (2023), table 2: every image is a query for all others of its class, with encoded and
    with projected features; CIFAR-10, and boxes of COCO that are "approximately square". Our
    choice, as they state no more: the test split, and boxes (not crowds) of at least 64 px and at
    most 1.2 times as long as wide, clipped to the image and resized to a square without keeping the
    aspect ratio; the query is not in its own list. The chance level is about the fraction of items
    of the query's class. Not implemented: retrieval in the training split.
    """
    names, encode = select_features(opt, "cls", "patch", "projected")
    if annotations.objects_are_boxes(opt.data):
        items = annotations.boxes(opt.data, opt.data_root, "test", opt.limit)
        crops = crop_boxes(items, model.img_size, opt.max_aspect, opt.min_side)
        features, labels = encode_batches(
            model, opt, batch_crops(crops, model, opt.batch_size), names, encode,
            key=("boxes", opt.max_aspect, opt.min_side))
        view = (f"boxes with sides of at least {opt.min_side} px and at most {opt.max_aspect:g} : "
                f"1, resized to a square of {model.img_size} px")
    else:
        if (opt.max_aspect, opt.min_side) != (Options.max_aspect, Options.min_side):
            raise ValueError(f"--max-aspect and --min-side choose boxes, and {opt.data} has none: "
                             f"leave them out")
        features, labels, _ = extract_features(model, opt, "test", names, encode)
        view = describe_view(model, opt)
    features, labels = draw_subset(features, labels, opt.max_items, opt.seed)
    rows, notes = score_retrieval(features, labels, "class")
    return Report(rows, f"average precision by cosine, query left out; {describe_output(model)}"
                  f"{view}", dict(items=len(labels)), notes)


def crop_boxes(items, size, max_aspect, min_side):
    """Yields (box (3, size, size) uint8, its label): the boxes of annotations.boxes that are large
    enough and nearly square, clipped to the image and resized to a square. ValueError: none."""
    found = False
    for item in items:
        height, width = item.image.shape[1:]
        for box, label, crowd in zip(item.boxes, item.labels, item.crowd):
            x0, y0 = (max(0, round(v)) for v in box[:2].tolist())
            x1, y1 = (min(limit, round(v)) for v, limit in zip(box[2:].tolist(), (width, height)))
            short, long = sorted((x1 - x0, y1 - y0))
            if not crowd and short >= max(1, min_side) and long <= max_aspect * short:
                crop, found = item.image[:, y0:y1, x0:x1], True
                yield TF.resize(crop, [size, size], TF.InterpolationMode.BICUBIC,
                                antialias=True), int(label)
    if not found:
        raise ValueError(f"no box has sides of at least {min_side} px and at most {max_aspect:g} : "
                         f"1: lower --min-side, raise --max-aspect or --limit")


def batch_crops(crops, model, batch_size):
    """(crop (3, S, S) uint8, label) one by one -> batches (B, 3, S, S) normalized, labels (B,).

    Every process cuts all crops, as an image may have several, and keeps its own batches."""
    crops = iter(crops)
    for batch in own_items(iter(lambda: list(islice(crops, batch_size)), [])):
        x, labels = zip(*batch)
        x = torch.stack(x).to(model.device).float() / 255
        yield augment.normalize(x, model.mean, model.std), torch.tensor(labels)


def draw_subset(features, labels, max_items, seed):
    """At most max_items rows, drawn at random; None: all."""
    rows = torch.randperm(len(labels), generator=rng.generator(seed, "subset"))
    rows = rows[:max_items].sort().values.to(labels.device)
    return {name: z[rows] for name, z in features.items()}, labels[rows]


def score_retrieval(features, labels, kind):
    """Each item is a query for the others with its label -> rows of a Report, notes.

    kind: what a label stands for, "class" or "part". ValueError: every label is unique.
    """
    rows, chance = {}, metrics.chance(labels)
    for name, z in features.items():
        show = functools.partial(progress.bar, desc=f"ranking by {name}", unit="blocks",
                                 shown=distributed.rank() == 0)
        ap = metrics.retrieval(z, labels, show=show)
        rows[name] = {}
        for column, values in ("AP", ap), ("chance", chance):
            by_class = metrics.class_means(values, labels).nanmean().item()
            rows[name] |= {column: 100 * values.nanmean().item(),
                           f"{column} by {kind}": 100 * by_class}
    alone = int(ap.isnan().sum())
    if alone == len(labels):
        raise ValueError(f"no two items have the same {kind}, so nothing can be retrieved: raise "
                         f"--limit or change --data")
    note = f"{alone} items are the only one of their {kind} and are not used as queries"
    return rows, [note] * (alone > 0)


# ---- parts ---------------------------------------------------------------------------------------

KEYPOINT_DATA = {  # data set: split, images at most, parts of Zhu et al., source in the protocol
    "toy": ("test", 1000, ("head", "leg", "wing", "tail"), "test creatures drawn at 256 px"),
    "toy-scenes": ("test", 1000, ("head", "leg", "wing", "tail"), "test scenes drawn at 256 px"),
    "cub": (None, None, ("right_eye", "right_leg", "left_wing", "tail"), "CUB, train and test"),
    "coco": ("train", None, ("nose", "right_wrist", "left_ankle"), "persons of COCO train2017")}


FIGURE_IMAGES = 64       # images of files whose crops are in the figure, evenly spaced over the set


def part_retrieval(model: Model, opt: Options) -> Report:
    """Average precision of retrieving crops of the same object part.

    Zhu et al. (2023), table 4 (left): every crop around a visible keypoint is a query for all
    others of its part, in other poses and species.
    """
    known, parts, (split, default_limit, _, source) = choose_parts(opt)
    limit = opt.limit or default_limit

    def crops(limit=limit):
        items = annotations.keypoints(opt.data, opt.data_root, split, limit)
        return crop_parts(items, known, parts, model.img_size, opt.crop)

    names, encode = select_features(opt, "cls", "patch", "projected")
    features, labels = encode_batches(
        model, opt, batch_crops(crops(), model, opt.batch_size), names, encode,
        key=("parts", split, limit, model.img_size, opt.crop, tuple(parts)))
    missing = note_missing_parts(parts, labels)          # of all crops, before --max-items
    features, labels = draw_subset(features, labels, opt.max_items, opt.seed)
    if opt.show:
        path = Path(opt.out) / f"part_crops-{Path(opt.data).name}.png"
        rows = group_crops(crops(min(limit or FIGURE_IMAGES, FIGURE_IMAGES)), parts)
        save_image_grid(rows, path, model.img_size, names=parts)
    rows, notes = score_retrieval(features, labels, "part")
    side = {"code": "2 round(d/4), d to the nearest of these on the same object",
            "paper": "d to the nearest of all keypoints"}
    return Report(rows, f"average precision by cosine, query left out; {describe_output(model)}"
                  f"visible {', '.join(parts)} of {source}; squares, side {side[opt.crop]}, "
                  f"kept if 20 < d/2 < 1000 px, resized to {model.img_size} px",
                  dict(crops=len(labels)), notes + missing)


def part_classification(model: Model, opt: Options) -> Report:
    """Linear or attentive classifier (--head) of the part that a crop shows.

    Zhu et al. (2023), table 4 (right), on the crops of part_retrieval, with a frozen encoder. As in
    their released code, training crops are enlarged by 256/224 and their border is cut off, test
    crops are used whole; no augmentation. Our choice, as in `linear`: small batches; 13
    learning rates, 0.1 to 100,000 times theirs, of which one is chosen by cross-validation; the
    result of the last epoch (their code: the best epoch on the test crops); --recipe logreg.
    """
    head = opt.head or "linear"
    if head not in ("linear", "attentive"):
        raise ValueError(f"part_classification has no head {head}; choose --head linear, attentive")
    known, parts, _ = choose_parts(opt)
    if head == "attentive":
        require_tokens(model, "part_classification --head attentive")
        names, encode, recipe = ["tokens"], all_tokens, LINEAR_RECIPES["part attentive"]
        make_heads = functools.partial(AttentiveHeads, bn=opt.bn)
    else:
        names, encode = select_features(opt, "cls", "patch", "projected")
        _, recipe = choose_recipe(opt, {name: LINEAR_RECIPES[name] for name in ("part", "logreg")})
        make_heads = LinearHeads

    def crops(split, side):
        border = round((side - model.img_size) / 2)
        inner = slice(border, border + model.img_size)
        items = annotations.keypoints(opt.data, opt.data_root, split, opt.limit)
        for crop, label in crop_parts(items, known, parts, side, opt.crop):
            yield crop[:, inner, inner], label

    # On toy with --limit, the test crops have the key of part_retrieval's: they are the same crops.
    (features, labels), (tests, truth) = (
        encode_batches(model, opt, batch_crops(crops(split, side), model, opt.batch_size), names,
                       encode, key=("parts", split, opt.limit, side, opt.crop, tuple(parts)))
        for split, side in (("train", model.img_size * 256 // 224), ("test", model.img_size)))
    heads = {name: train_classifier(x[:, None], labels, len(parts), recipe, opt.epochs, opt.seed,
                                    make_heads) for name, x in features.items()}
    rows = {name: heads[name].evaluate(tests[name], truth) for name in heads}
    training = next(iter(heads.values())).training
    batch_norm = " with batch norm of the test batch" * (head == "attentive" and opt.bn == "batch")
    return Report(rows, f"{head} head{batch_norm} ({training}){describe_norm(model)}; "
                  f"{', '.join(parts)} of {opt.data}; squares as in the study's {opt.crop}, "
                  f"without their border in training; "
                  f"{describe_choice('C' if recipe.get('logreg') else 'lr')}",
                  dict(train=len(labels), test=len(truth)),
                  [f"{model.name}, {name}: {note}" for name, trained in heads.items()
                   for note in trained.notes]
                  + note_missing_parts(parts, labels))


def choose_parts(opt):
    """Names of all keypoints of the data set, the parts to use, and its entry of KEYPOINT_DATA."""
    if not annotations.has("keypoints", opt.data):
        raise ValueError(f"{opt.task} finds no keypoints in {opt.data}; choose --data "
                         f"{' or '.join(KEYPOINT_DATA)} or a folder (docs/own-data.md)")
    known = annotations.part_names(opt.data)
    own = None, None, tuple(known), f"{opt.data}, train and test"
    entry = KEYPOINT_DATA.get(opt.data, own)
    if opt.data == "coco" and annotations.find_coco_split(opt.data_root) == "test":
        entry = "test", *entry[1:3], "persons of COCO val2017, as train2017 is not there"
    parts = known if opt.parts == ("all",) else tuple(dict.fromkeys(opt.parts)) or entry[2]
    for part in parts:
        if part not in known:
            raise ValueError(f"{opt.data} has no part {part!r}{config.nearest(part, known)}")
    if len(parts) < 2 and opt.crop == "code":
        raise ValueError(f"--crop code measures the distance between two --parts, and {parts[0]} "
                         f"is the only one: name two or more, or choose --crop paper")
    return known, parts, entry


def note_missing_parts(parts, labels):
    """Notes for the table. With --crop paper hardly any eye or nose is kept, as other keypoints are
    too close."""
    missing = [part for i, part in enumerate(parts) if not (labels == i).any()]
    return [f"no crop of {', '.join(missing)} is large enough"] * bool(missing)


def crop_parts(items, names, parts, size, rule="code"):
    """Yields (square around a part (3, size, size) uint8, index of the part in `parts`).

    items: as from annotations.keypoints, names: of their keypoints; only v = 2 counts as visible.
    The numbers of Zhu et al. were made with their released code ("code"): d is the smallest
    non-zero distance to another *chosen* visible part of the same object, the side 2 round(d/4); so
    an object needs two of them. Their text ("paper"): side d, over all visible keypoints of the
    image. Both: kept if 20 < d/2 < 1000 px of the original; pixels outside the image are black.
    """
    chosen = torch.tensor([name in parts for name in names])
    for item in items:
        visible = item.points[..., 2] == 2                                  # (objects, keypoints)
        for k, i in (visible & chosen).nonzero().tolist():
            point = item.points[k, i, :2]
            others = (item.points[k, visible[k] & chosen] if rule == "code" else
                      item.points[visible])[:, :2]
            distances = (others - point).norm(dim=1)
            d = min(distances[distances > 0].tolist(), default=0)           # 0: not kept
            if 20 < d / 2 < 1000:
                side = 2 * round(d / 4) if rule == "code" else round(d)
                x, y = (point - side / 2).round().int().tolist()
                crop = TF.crop(item.image, y, x, side, side)                # pads with black
                crop = TF.resize(crop, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
                yield crop, parts.index(names[i])


def group_crops(crops, parts, count=16):
    """The first crops of each part as rows of an image, filled up with white."""
    rows = [[] for _ in parts]
    for crop, label in crops:
        rows[label].append(crop)
        if min(map(len, rows)) == count:
            break
    return [(row + [torch.full_like(crop, 255)] * count)[:count] for row in rows]


# ---- landmarks -----------------------------------------------------------------------------------


def landmark_retrieval(model: Model, opt: Options) -> Report:
    """Retrieval of other views of a landmark by class token (revisited Oxford and Paris).

    MMC, table 9: mean AP of the medium (easy and hard views) and the hard setting; no whitening, no
    query expansion. Our choice, DINO's default: longer side 224 (DINO's better setting:
    --img-size 512 --multiscale), whole query images although the benchmark gives boxes
    (--crop-queries). Images keep their aspect ratio; sides are cut to multiples of the patch.

    toy and toy-scenes, our synthetic substitute: 40 videos of 16 frames, each frame cropped to a
    random square around a point on a creature, with half of the side of the image or more; the
    query is the ninth frame of each video, and the other frames of the video are to be retrieved.
    Those within 4 frames of it are easy, the others hard, and junk are those of which less than a
    fifth shows a creature; distractors are the frames of all other videos. Creatures do not turn in
    depth, so viewpoints differ less than on Oxford: compare with --baseline pixels untrained.
    """
    synthetic = is_toy(opt.data)
    if opt.crop_queries and synthetic:
        raise ValueError(f"queries of {opt.data} have no boxes: leave out --crop-queries")
    side = opt.img_size or (model.img_size if synthetic else 224)
    landmarks = (draw_toy_landmarks(opt.data, side, opt.limit, opt.seed) if synthetic else
                 read_landmarks(opt))
    names, encode = select_features(opt, "cls")
    if opt.multiscale:
        if opt.feature not in (None, "cls"):
            raise ValueError(f"--multiscale averages class tokens: leave out --feature "
                             f"{opt.feature}, or --multiscale")
        names, encode = ["multiscale"], multiscale_features
    boxes = landmarks.boxes if opt.crop_queries else None
    seed = (opt.seed,) * synthetic                       # frames of toy are cropped at random
    (database, numbers), (queries, query_numbers) = (
        encode_batches(model, opt, landmark_images(items, crop, side, model), names, encode,
                       len(items), (role, side, crop is not None, *seed))
        for role, items, crop in (("database", landmarks.database, None),
                                  ("queries", landmarks.queries, boxes)))
    rows = {}
    for name, z in database.items():
        similarity = F.normalize(queries[name], dim=1) @ F.normalize(z, dim=1).T
        ranking = numbers[similarity.argsort(dim=1, descending=True, stable=True)].cpu()
        rows[name] = {}
        for setting, positive, ignored in (("medium", ("easy", "hard"), ("junk",)),
                                           ("hard", ("hard",), ("junk", "easy")),
                                           ("easy", ("easy",), ("junk", "hard"))):
            scores = [metrics.revisited(order, list_images(landmarks, positive, query),
                                        list_images(landmarks, ignored, query))
                      for query, order in zip(query_numbers.tolist(), ranking)]
            ap = torch.tensor([ap for ap, _ in scores], dtype=torch.float64)
            precision = torch.tensor([p for _, p in scores], dtype=torch.float64)   # at 1, 5, 10
            rows[name][f"{setting} mAP"] = 100 * ap.nanmean().item()
            rows[name][f"{setting[0]} mP@10"] = 100 * precision[:, 2].nanmean().item()
    view = "whole queries" if boxes is None else "queries cropped to their boxes"
    if synthetic:
        view = "queries are frames of videos"
    return Report(rows, f"revisited protocol, {view}; cosine; {describe_output(model)}"
                  f"longer side {side} px" +
                  ", 3 scales averaged" * (opt.multiscale and bool(model.encoder)),
                  dict(database=len(numbers), queries=len(query_numbers)))


def read_landmarks(opt):
    if opt.limit and opt.data in ("roxford5k", "rparis6k"):
        raise ValueError(f"{opt.data} is always used as a whole: leave out --limit")
    return annotations.landmarks(opt.data, opt.data_root)


def list_images(landmarks, kinds, query):
    """Indices of the database images of some kinds (easy, hard, junk) for a query."""
    return torch.cat([torch.as_tensor(getattr(landmarks, kind)[query], dtype=torch.long)
                      for kind in kinds])


def multiscale_features(encoder, x):
    """Mean of the class tokens of the image at 1, 1/sqrt(2) and 1/2 of its size."""
    p, total = encoder.patch_size, 0
    for scale in (1, 2 ** -0.5, 0.5):
        h, w = (max(p, int(side * scale) // p * p) for side in x.shape[2:])
        size = [int(side * scale) for side in x.shape[2:]]
        z = x if scale == 1 else F.interpolate(x, size, mode="bilinear", align_corners=False)
        z = z[:, :, :h, :w] if min(z.shape[2:]) >= p else F.interpolate(x, (h, w), mode="bilinear")
        total = total + pooled_features(encoder, z)["cls"]
    return {"multiscale": total / 3}


def landmark_images(items, boxes, side, model):
    """Paths or images (3, H, W) uint8 -> (x (1, 3, h, w) normalized, index (1,)), one by one.

    boxes: to crop the images to, or None. The longer side is resized to `side`, but never enlarged;
    h and w are multiples of the patch. Files that cannot be read are left out and listed at the
    end; truncated ones, of which these sets have some, are used as far as they go.
    """
    p, bad, truncated = model.encoder.patch_size if model.encoder else 1, {}, []
    for index, item in own_items(enumerate(items)):
        try:
            image = TF.to_pil_image(item if torch.is_tensor(item) else load_image(item))
        except datasets.UnreadableImage as error:
            image = load_truncated_image(item)
            if image is None:
                bad[item] = str(error.__cause__)
                continue
            truncated.append(str(item))
        if boxes is not None:
            box = [float(v) for v in boxes[index]]
            check_inside(item, *image.size, *box[2:])
            image = image.crop([round(v) for v in box])
        image.thumbnail((side, side), Resampling.LANCZOS)
        x = TF.pil_to_tensor(image)
        x = x[:, :max(p, x.shape[1] // p * p), :max(p, x.shape[2] // p * p)]
        x = F.pad(x, (0, max(0, p - x.shape[2]), 0, max(0, p - x.shape[1])))    # less than a patch
        x = x[None].to(model.device).float() / 255
        yield augment.normalize(x, model.mean, model.std), torch.tensor([index])
    if truncated:
        datasets.print_once(f"{len(truncated)} of {len(items)} images of the landmarks are "
                            f"truncated: {tree.list_names(truncated, 100)}")
    datasets.report_unreadable("the landmarks", bad, len(items))
    datasets.check_readable("the landmarks", bad, len(items))


def load_truncated_image(path):
    """-> Pillow image whose missing rows are gray; None if nothing can be read."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        return TF.to_pil_image(load_image(path))
    except datasets.UnreadableImage:
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def draw_toy_landmarks(name, side, limit, seed, n_videos=40, n_frames=16, query=8, near=4):
    """Landmarks of toy or toy-scenes, in the form of annotations.landmarks.

    limit: number of videos, at most n_videos. query: index of the frame that is the query; near:
    the largest distance of an easy frame from it.
    """
    n_videos, size = min(n_videos, limit or n_videos), 2 * side
    video = toy.video(torch.arange(n_videos), n_frames, size=size, scenes=name == "toy-scenes")
    u = rng.uniform(torch.arange(n_videos * n_frames), 2, seed, "photographer")
    views, shows_creature = [], []
    for image, mask, (zoom, spot) in zip(video["image"].flatten(0, 1),
                                         video["instances"].flatten(0, 1) > 0, u.tolist()):
        length, pixels = round(size * (0.5 + 0.5 * zoom)), mask.nonzero()
        target = pixels[int(spot * len(pixels))].tolist() if len(pixels) else (side, side)
        y, x = (min(max(0, center - length // 2), size - length) for center in target)
        views.append(TF.resize(image[:, y:y + length, x:x + length], [side, side],
                               TF.InterpolationMode.BICUBIC, antialias=True))
        shows_creature.append(mask[y:y + length, x:x + length].double().mean().item() >= 0.2)
    others = [t for t in range(n_frames) if t != query]
    lists = {kind: [[] for _ in range(n_videos)] for kind in ("easy", "hard", "junk")}
    for v in range(n_videos):
        for place, t in enumerate(others):
            kind = "easy" if abs(t - query) <= near else "hard"
            kind = kind if shows_creature[v * n_frames + t] else "junk"
            lists[kind][v].append(v * len(others) + place)
    database = [views[v * n_frames + t] for v in range(n_videos) for t in others]
    return SimpleNamespace(database=database, queries=views[query::n_frames], boxes=None, **lists)
