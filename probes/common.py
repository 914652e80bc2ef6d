"""Features of a frozen encoder, in one pass over a data set: what evaluate.py starts from.

    found, labels, classes = features(model, args, "train", ["cls", "pat"])    # {"cls": (n, D), ..}

model: a row of the table, with name, encoder (a ViT; None: raw pixels), size, mean, std and
interpolation. args: the flags of evaluate.py.

Of several processes each encodes its share of the batches, and all get the features of all images,
in the order and with the bits of one process:

    batches  0 1 2 3 4 ..   process 0: 0 2 4 ..  ──┐
                            process 1: 1 3 ..    ──┴─ all_gather ── 0 1 2 3 4 ..  in both

What follows, a vote, a ranking or a head, they all compute alike: to wait for one would take as
long, and nothing has to be sent around.
"""
import functools
import sys
import time
from itertools import islice, zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from lib import checkpoints, datasets, distributed, rng
from probes import annotations

# B images, N tokens, D width, S pixels a side, C classes

# ---- of a batch ----------------------------------------------------------------------------------


def pooled(encoder, x):
    """(B, 3, S, S) -> three features of a picture, after the final norm: {name: (B, D or 2D)}.

    cls: class token. pat: mean of the patch tokens. hyber: both, each brought to length 1 first, as
    the shorter one would hardly count otherwise (the name is MMC's, the scaling our choice; for
    iBOT's see `joint`).
    """
    return pool(encoder, encoder(x))


def pool(encoder, tokens):
    cls, patches = encoder.split(tokens)
    pat = patches.float().mean(1)
    cls = pat if cls is None else cls.float()            # no class token: the mean stands in for it
    return {"cls": cls, "pat": pat, "hyber": torch.cat([F.normalize(cls), F.normalize(pat)], 1)}


def joint(encoder, x):
    """`pooled` with iBOT's hyber: both as they are, brought to length 1 together."""
    found = pooled(encoder, x)
    return found | {"hyber": F.normalize(torch.cat([found["cls"], found["pat"]], 1))}


projector = functools.lru_cache(maxsize=1)(checkpoints.projector)  # of the model at hand: once


def projected(encoder, x):
    """`pooled`, and what the projection head in the checkpoint, if any, makes of the class token.

    The part-aware study compares the two: encoded features know parts, projected ones objects.
    """
    tokens, head = encoder(x), projector(encoder)
    found = pool(encoder, tokens)
    if head:
        with torch.autocast(x.device.type, enabled=False):
            found["projected"] = head(tokens.float())
    return found


def block_means(encoder, x):
    """Class token and patch mean of every block's output, without the final norm."""
    outputs, _ = encoder.layers(x, norm=False)
    found = {}
    for number, tokens in enumerate(outputs, 1):
        z = pool(encoder, tokens)
        found |= {f"block {number} {name}": z[name] for name in ("cls", "pat")}
    return found


def all_tokens(encoder, x):
    """All tokens after the final norm (B, N, D), in 16 bits: there are many."""
    return {"tokens": encoder(x).half()}


def last_blocks(encoder, x):
    """What DINO's linear probe sees, after the final norm. Narrow models (ViT-S): class tokens of
    the last four blocks. Wide ones (ViT-B): class token and patch mean of the last block."""
    if encoder.embed_dim >= 768:
        z = pooled(encoder, x)
        return {"cls+pat": torch.cat([z["cls"], z["pat"]], 1)}
    outputs, _ = encoder.layers(x, range(max(0, encoder.depth - 4), encoder.depth))
    split = [encoder.split(tokens) for tokens in outputs]
    return {"4 x cls": torch.cat([pat.mean(1) if cls is None else cls for cls, pat in split], 1)}


def pixels(_, x):
    """The floor below every encoder: the picture itself, as means over a 32 x 32 grid at most."""
    x = F.interpolate(x, (32, 32), mode="area") if x.shape[-1] > 32 else x
    return {"pixels": x.flatten(1)}


def wanted(args, *protocol):
    """The features that a probe looks at, and the function that makes them."""
    names = [args.feature] if args.feature else list(protocol)
    if args.hyber_norm == "joint" and "hyber" in names:
        return names, joint
    return names, projected if "projected" in names else pooled


@torch.no_grad()
def extract(model, batches, args, names=("cls", "pat", "hyber"), tokens=pooled, total=None,
            key=None):
    """One pass over (x (B, 3, S, S), numbers (B,)) -> {name: (n, ...)}, numbers (n,).

    batches: of several processes this one's share, see `share`; what comes back is of all. numbers:
    what goes with the images, such as labels or their place in the data set. names: the features to
    keep; of a model that has none of them (pixels have no class token) all it has. total: number of
    images, for the progress bar. key: what the images are, in words; with --cache they are encoded
    only once.
    """
    tokens, path = tokens if model.encoder else pixels, stored(model, args, tokens, key)
    if all(each(bool(path) and path.is_file())):
        content = torch.load(path, map_location=args.device, weights_only=True)
        return choose(model, content["features"], names), content["numbers"]
    found, error = {}, None
    bar = tqdm(total=total, unit="img", desc=f"{model.name}: encoding", delay=5, leave=False,
               dynamic_ncols=True,                       # silent if fast, or not on a terminal
               disable=distributed.rank() > 0 or None)
    try:
        for x, number in batches:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z = tokens(model.encoder, x)
            for name, value in (z if path else choose(model, z, names)).items():
                found.setdefault(name, []).append(value if name == "tokens" else value.float())
            found.setdefault("numbers", []).append(number.to(x.device))
            bar.update(len(x) * distributed.world_size())
    except (ValueError, FileNotFoundError) as e:         # a damaged file in this share
        error = e
    bar.close()
    for problem in filter(None, each(error)):            # or the others would wait for this one
        raise problem
    found = gather(found, args.device)
    if not found:
        raise ValueError(f"{args.task}: nothing to look at; raise --limit or change --data")
    numbers = found.pop("numbers")
    if not all(z.isfinite().all() for z in found.values()):
        raise ValueError(f"{model.name}: its features are not finite; try --precision fp32, or an "
                         f"earlier checkpoint")
    if path and distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = dict(features={name: z.cpu() for name, z in found.items()}, numbers=numbers.cpu())
        checkpoints.write_atomic(path, lambda file: torch.save(content, file))
    return choose(model, found, names), numbers


def share(items):
    """This process's part of things in order: every world-th, from the rank-th on."""
    return islice(items, distributed.rank(), None, distributed.world_size())


def each(word):
    """What every process says, in the order of ranks."""
    words = [word] * distributed.world_size()
    if len(words) > 1:
        dist.all_gather_object(words, word)
    return words


def gather(found, device):
    """{name: [(b, ...), ..] batches of this process} -> {name: (n, ...)} of all, in turn."""
    like = {name: ([len(z) for z in batches], batches[0].shape[1:], batches[0].dtype)
            for name, batches in found.items()}
    said, rows = each(like), {}
    for name, (_, shape, dtype) in {k: v for some in said for k, v in some.items()}.items():
        sizes = [some[name][0] if name in some else [] for some in said]
        z = torch.cat(found.pop(name, [torch.empty(0, *shape, dtype=dtype, device=device)]))
        if len(said) > 1:                                # what is gathered has to be of one length
            pad = z.new_zeros(max(map(sum, sizes)) - len(z), *shape)
            parts = distributed.all_gather(torch.cat([z, pad])).chunk(len(said))
            parts = [part[:sum(size)].split(size) for part, size in zip(parts, sizes)]
            z = torch.cat([z for turn in zip_longest(*parts) for z in turn if z is not None])
        rows[name] = z
    return rows


def choose(model, found, names):
    """Those of the features that are asked for, or all if there is none of these."""
    if list(names) == ["projected"] and "projected" not in found and model.encoder:
        raise ValueError(f"{model.name} has no projection head in its checkpoint; take a file with "
                         f"one (MoCo v3; DINO and iBOT: the full checkpoint), or another --feature")
    return {name: z for name, z in found.items() if name in names} or found


def stored(model, args, tokens, key):
    """Where --cache keeps these features; None: nowhere.

    The name holds a hash of all that they depend on. The data are taken to stay as they are: if
    not, delete the folder.
    """
    if not args.cache or key is None:
        return None
    places = [str(Path(place).resolve()) for place in (args.data, datasets.root_of(args.data_root))]
    what = (tokens.__name__, *places, args.limit, args.precision, key)
    name = f"{model.name}-{Path(args.data).name}-{code(model, args, what)}.pt"
    return Path(args.out) / "features" / name


def code(model, args, what):
    """16 hexadecimal digits of a model and what is asked of it. A checkpoint counts as the same as
    long as its size and time are."""
    path = model.source.path
    who = (path and (str(Path(path).resolve()), *(getattr(Path(path).stat(), of)
                     for of in ("st_size", "st_mtime_ns"))), model.source.branch,
           path or (model.name, args.seed, model.encoder and sorted(model.encoder.config.items())),
           model.size, model.mean, model.std, model.interpolation)
    return f"{rng.key(str((who, what))) % 2**64:016x}"


class Progress:
    """The steps of a probe that trains, and how far it has come: killed, the same command goes on.

        progress = Progress(model, args, net, opt)
        for step, batch in progress.steps(batches_from(progress.step), total):
            ...
        progress.done()                                  # nothing is left to be lost

    step: how many lie behind, 0 in a new run. curve: a list, for what else is to be kept. Every
    five minutes the first process writes all of it to a file in --out/progress, whose name holds a
    hash of what decides the result. ValueError: a file that does not fit.
    """

    MINUTES = 5
    NO_MATTER = {"checkpoint", "baseline", "json", "out", "device", "workers", "cache", "reference",
                 "show"}

    def __init__(self, model, args, net, opt):
        what = sorted((k, v) for k, v in vars(args).items() if k not in self.NO_MATTER)
        name = f"{args.task}-{model.name}-{Path(args.data).name}-{code(model, args, what)}.pt"
        self.path, self.name = Path(args.out) / "progress" / name, model.name
        self.net, self.opt, self.step, self.curve = net, opt, 0, []
        if self.path.is_file():
            try:
                state = checkpoints.read_file(self.path)
                net.load_state_dict(state["net"]), opt.load_state_dict(state["opt"])
                self.step, self.curve = state["step"], state["curve"]
            except (ValueError, KeyError, RuntimeError):
                raise ValueError(f"{self.path} is damaged or of another version: delete it, and "
                                 f"{args.task} starts anew") from None
            if distributed.rank() == 0:
                print(f"{self.path}: goes on after step {self.step:,}", flush=True)

    def steps(self, batches, total):
        """Yields step, batch: a progress bar runs, and what is trained is kept."""
        self.first, self.total, self.begin = self.step, total, time.monotonic()
        self.bar = tqdm(total=total, initial=self.step, desc=self.name, delay=5, leave=False,
                        dynamic_ncols=True, disable=distributed.rank() > 0 or None)
        saved = self.begin
        for step, batch in zip(range(self.step, total), batches):
            yield step, batch
            self.step = step + 1
            self.bar.update()
            due = time.monotonic() - (self.begin if self.step == total else saved)
            if due > 60 * self.MINUTES and distributed.rank() == 0:
                self.save()
                saved = time.monotonic()
        self.bar.close()

    def eta(self, step):
        """Of the end of the last step, in words, at the end of this one."""
        took = (time.monotonic() - self.begin) / (step + 1 - self.first)
        return tqdm.format_interval(took * (self.total - step - 1))

    def save(self):
        """A disk that is full is told, and no reason to stop."""
        state = dict(net=self.net.state_dict(), opt=self.opt.state_dict(), step=self.step,
                     curve=self.curve)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.write_atomic(self.path, lambda file: torch.save(state, file))
        except OSError as error:
            print(error, file=sys.stderr)

    def done(self):
        if distributed.rank() == 0:
            self.path.unlink(missing_ok=True)


@functools.lru_cache                                     # several models look at the same images
def load(name, root, split, size, limit, device):
    return datasets.load_images(name, root, split, size, limit, device, apart=True)


def labelled(model, args, split):
    """A split whose images have labels, and the number of classes.

    Labels count the classes of each split by itself: what is learned of train's says nothing of
    test's if these are others. few_shot, which learns nothing, never asks for train.
    """
    if args.data in annotations.LAYOUT and args.data not in datasets.NAMES:
        raise ValueError(f"{args.task} needs pictures of one class each, and {args.data} has none: "
                         f"choose --data {', '.join(datasets.NAMES)} or a folder")
    images = load(args.data, args.data_root, split, model.size, args.limit, args.device)
    if images.labels is None:
        raise ValueError(f"this data set has no labels ({args.data}), and {args.task} needs them: "
                         f"choose another --data, or give each class a sub-folder of its own")
    if split == "train":
        tests = load(args.data, args.data_root, "test", model.size, args.limit, args.device)
        if tests.labels is not None and tests.classes != images.classes:
            n, m = (len(some.classes or []) for some in (images, tests))
            raise ValueError(f"the training and the test images of {args.data} have other classes "
                             f"({n} and {m}), and {args.task} needs the same ones in both")
    return images, len(images.classes or range(int(images.labels.max()) + 1))


def features(model, args, split, names=("cls", "pat", "hyber"), tokens=pooled, mirror=False,
             change=None, whole=False):
    """One pass over a split in the standard test view -> {name: (n, D)}, labels (n,), classes C.

    mirror: encode the mirror image of every picture, too -> {name: (n, 2, D)}. change: what is done
    to each batch first, a function of x and the numbers of the images. whole: nothing is cut off.
    """
    images, classes = labelled(model, args, split)
    batches = data.batches(images, model.size, args.batch_size, args.device, mean=model.mean,
                           std=model.std, workers=args.workers, interpolation=model.interpolation,
                           resize=model.size if whole else None, rank=distributed.rank(),
                           world=distributed.world_size())
    if mirror:
        batches = ((torch.cat([x, x.flip(-1)]), index.repeat(2)) for x, index in batches)
    if change:
        batches = ((change(x, index), index) for x, index in batches)
    found, index = extract(model, batches, args, names, tokens, len(images) * (1 + mirror),
                           None if change else (split, mirror, whole))
    if mirror:                                           # an image's two rows become neighbours
        order = index.argsort(stable=True)
        found = {name: z[order].unflatten(0, (-1, 2)) for name, z in found.items()}
        index = index[order][::2]
    return found, images.labels.to(index.device)[index], classes


def view(model, args, whole=False):
    """The standard test view in words: files lose their rim, small resident sets are seen whole.

    The latter is our choice: CIFAR might as well go the way of files, 32 -> 256 -> 224 px, and lose
    a rim. whole: of files nothing is cut off either.
    """
    files = not whole and load(args.data, args.data_root, "test", model.size, args.limit,
                               args.device).paths
    rim = f"centre of short side {model.size * 256 // 224}" if files else "whole picture"
    return f"{rim} at {model.size} px"


def settings_of(args, recipes):
    """The settings of --recipe, or the first. ValueError if the task has none of that name."""
    args.recipe = args.recipe or next(iter(recipes))
    if args.recipe not in recipes:
        raise ValueError(f"{args.task} has no recipe {args.recipe}; choose --recipe "
                         f"{', '.join(recipes)}")
    return recipes[args.recipe]
