"""Folders of images as people have them: which files are images, which folders are splits, which
are classes, and what is passed over. docs/datasets.md has the rules in a table.

    paths, passed = list_images("/data/photos")          # sorted; {reason: Counter of names}
    describe_passed(passed)                              # "other files: .txt (3), .zip (1)"
    splits, notes = find_splits(relative_paths)          # {"train": Split, "test": Split}
    splits["train"].paths, splits["train"].labels, splits["train"].classes
    images, label_maps = pair_label_maps(relative_paths)       # {"train/7": "train/images/7.jpg"}
"""
import functools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

from PIL import Image

from lib import distributed, progress

# Endings of image files; those that Pillow does not read here are passed over.
SUFFIXES = """.jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm
.pnm .tga .pcx .qoi .avif .jp2 .j2k .jpf .jpx .heic .heif .hif .jxl .dng .cr2 .cr3 .nef .arw .raf
.orf .rw2 .svg""".split()
SYSTEM_FOLDERS = {"@eadir", "@tmp", "#recycle", "@recycle", "__macosx", "$recycle.bin",
                  "system volume information", "lost+found", "__pycache__"}
RUN_FILES = {"metrics.jsonl", "encoder.pt", "last.pt", "results.jsonl"}    # in a run's folder
# Names of split folders, in any case. Of several for testing the first one is used.
TRAIN = ("train", "training", "train_set", "training_set")
TEST = ("val", "valid", "validation", "validate", "dev", "eval", "val_set", "validation_set",
        "test", "testing", "test_set")
# Folders of images beside folders of their label maps, in any case.
IMAGES = ("images", "image", "img", "imgs", "img_dir", "jpegimages")
LABELS = ("labels", "label", "masks", "mask", "annotations", "annotation", "ann", "ann_dir",
          "annot", "segmentationclass")


# --------------------------------------------------------------------------------------------------
# Files


@functools.cache
def readable_suffixes():
    """The endings of image files that Pillow reads here."""
    kinds = Image.registered_extensions()                # imports all of Pillow's plugins
    return frozenset(s for s in SUFFIXES if kinds.get(s) in {*Image.OPEN, "MPO"})


def list_images(folder, only=None):
    """The images in a folder and its subfolders, each once -> sorted paths, what is passed over.

    The latter is {reason: Counter of endings or names}: hidden and system folders, output of runs,
    files that are no images, and links to what is listed already. `only`: names of the subfolders
    that are read, instead of everything.

    Of an image that can be reached in two ways, the path in a split folder is listed, else that
    without a link. Linked folders are read last, each folder once, so that links that lead back
    end."""
    passed = defaultdict(Counter)
    folders, linked_folders, linked_files = [(folder, os.path.realpath(folder))], [], []
    seen, found = set(), {}                              # folders; {path without links: path}
    bar = progress.bar(desc=f"listing {folder}", unit="files", shown=distributed.rank() == 0)
    while folders or linked_folders:
        here, real = folders.pop() if folders else linked_folders.pop(0)
        if real in seen:
            passed["links to what is listed already"][os.path.basename(here)] += 1
            continue
        seen.add(real)
        try:
            with os.scandir(here) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            passed["folders that cannot be opened"][os.path.relpath(here, folder)] += 1
            continue
        if here != folder and is_output(here, {entry.name for entry in entries}):
            passed["output of runs"][os.path.relpath(here, folder)] += 1
            continue
        bar.update(len(entries))
        for entry in entries:
            if here == folder and only is not None and entry.name not in only:
                if entry.is_dir():
                    passed["folders of other classes"][entry.name] += 1
                continue
            kind, suffix = kind_of(entry), os.path.splitext(entry.name)[1].lower()
            if kind == "folder" and is_hidden(entry.name):
                passed["hidden or system folders"][entry.name] += 1
            elif kind == "folder" and entry.is_symlink():
                linked_folders.append((entry.path, os.path.realpath(entry.path)))
            elif kind == "folder":
                folders.append((entry.path, os.path.join(real, entry.name)))
            elif entry.name.startswith("."):
                passed["hidden files"]["._*" if entry.name.startswith("._") else entry.name] += 1
            elif kind is None:
                passed["broken links and special files"][suffix or "no ending"] += 1
            elif suffix not in readable_suffixes():
                reason = ("images that cannot be read here, convert them to JPEG or PNG"
                          if suffix in SUFFIXES else "other files")
                passed[reason][suffix or "no ending"] += 1
            elif entry.is_symlink():
                linked_files.append(entry.path)
            else:
                found[f"{real}{os.sep}{entry.name}"] = entry.path
    bar.close()
    for path in sorted(linked_files):
        real = os.path.realpath(path)
        if real not in found or in_split(path, folder) and not in_split(found[real], folder):
            found[real] = path
        else:
            passed["links to what is listed already"][os.path.basename(path)] += 1
    return sorted(found.values()), dict(passed)


def in_split(path, root):
    return any(name.lower() in TRAIN + TEST for name in folders_of(os.path.relpath(path, root)))


def folders_of(path):
    """The folders on a relative path. A backslash separates them too: archives made on Windows are
    sometimes unpacked to files with names like train\\cat\\1.jpg."""
    return tuple(path.replace("\\", os.sep).split(os.sep)[:-1])


def kind_of(entry):
    """"folder", "file", or None for a broken link, a link to itself or a special file."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError:
        return None


def is_hidden(name):
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS


def is_output(folder, names):
    """Whether a folder with files and folders of these names is that of a run, or is called `out`
    and contains that of a run."""
    return not RUN_FILES.isdisjoint(names) or os.path.basename(folder) == "out" and any(
        os.path.exists(os.path.join(folder, name, file)) for name in names for file in RUN_FILES)


def describe_passed(passed):
    """What `list_images` passed over, in words; "" if nothing."""
    return "; ".join(f"{reason}: {list_counts(names)}" for reason, names in sorted(passed.items()))


def list_counts(counts):
    rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    return list_names([f"{name} ({n:,})" for name, n in rows])


def list_names(names, most=10):
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


# --------------------------------------------------------------------------------------------------
# Splits and classes


@dataclass
class Split:
    """Images of a split. labels: indices of `classes`, -1 for an image in no class folder; both are
    None if there are fewer than two classes."""
    paths: list
    labels: list | None = None
    classes: list | None = None


def find_splits(paths):
    """Relative paths of a folder's images -> {"train": Split, "test": Split} or {"all": Split}, and
    sentences that describe them. ValueError: two folders for training.

    If there are split folders for one of them only and no others (see `group_splits`), the class of
    an image is the folder below these; else it is the first folder of its path.
    """
    members, notes = group_splits(paths)
    splits, more = label_splits(members)
    counts = ", ".join(f"{len(split.paths):,} images" + f" in {name}/" * (name != "all")
                       for name, split in splits.items())
    names = ("train", "test") if len(splits) == 2 else ("all",)
    return (dict(zip(names, splits.values())),
            [counts + describe_classes(splits), *more, *notes])


def group_splits(paths):
    """Relative paths -> {name of the split's folder: [(path,) or (path, folder below it), ...]}:
    the folder for training and the one for testing, or "all"; and notes. ValueError: two folders
    for training.

    Folders that contain nothing but one subfolder are skipped. There are two splits if there is a
    folder for each.
    """
    folders = skip_shared([folders_of(path) for path in paths])
    tops = {folder[0] for folder in folders if folder}
    train = sorted(name for name in tops if name.lower() in TRAIN)
    test = sorted((name for name in tops if name.lower() in TEST),
                  key=lambda name: (TEST.index(name.lower()), name))
    if not (train and test):
        start = int(bool(tops) and tops == {*train, *test})
        folders = skip_shared([folder[start:] for folder in folders])
        return ({"all": [(path, *folder[:1]) for path, folder in zip(paths, folders)]},
                describe_unused_splits(folders))
    if len(train) > 1:
        raise ValueError(f"{' and '.join(train)} are both folders of training images: merge them "
                         f"or rename one")
    members, used, beside = {train[0]: [], test[0]: []}, [], Counter()
    for path, folder in zip(paths, folders):
        if folder and folder[0] in members:
            used.append((path, folder))
        else:
            beside[f"{folder[0]}/" if folder else os.path.basename(path)] += 1
    below = skip_shared([folder[1:] for _, folder in used])
    for (path, folder), rest in zip(used, below):
        members[folder[0]].append((path, *rest[:1]))
    notes = [f"not used, as they are beside {train[0]}/ and {test[0]}/: images in "
             f"{list_counts(beside)}"] * bool(beside)
    return members, notes


def describe_unused_splits(folders):
    """Notes on what looks like splits and is not used as such. folders: of each image."""
    tops, below = {folder[0] for folder in folders if folder}, defaultdict(set)
    for folder in folders:
        if len(folder) > 1:
            below[folder[0]].add(folder[1])
    words = {name: re.split(r"[^a-z]+", name.lower()) for name in tops}
    if tops and all(not {*TRAIN, *TEST}.isdisjoint(words[name]) for name in tops):
        return [f"{list_names(sorted(tops))} are read as classes: if they are splits, rename them "
                f"to train and val"]
    nested = sorted(top for top, names in below.items() if all(
        any(name.lower() in split for name in names) for split in (TRAIN, TEST)))
    if nested:
        return [f"folders for training and testing in {list_names([f'{top}/' for top in nested])} "
                f"are not used, as there are others beside: give the folder that contains them "
                f"alone, above those of the classes"]
    return []


def skip_shared(folders):
    """Tuples of folder names without the names that all of them begin with."""
    shared = len(os.path.commonprefix(folders))
    return [folder[shared:] for folder in folders]


def label_splits(members):
    """{name: [(path,) or (path, class), ...]} -> {name: Split}, and notes on what is unusual.

    The splits have the same list of classes if they have a class in common. Names that differ only
    in Unicode composition are one class; names that differ in case are one if neither split has
    both.
    """
    names = {split: {unicode_name(row[1]) for row in rows if len(row) > 1}
             for split, rows in members.items()}
    notes, alias = [], {}
    first, last = next(iter(names)), next(reversed(names))
    folded = defaultdict(list)
    for name in names[first] ^ names[last]:
        folded[name.casefold()].append(name)
    for name in sorted(names[last] - names[first]):
        same = [other for other in folded[name.casefold()] if other != name]
        if len(same) == 1 and same[0] in names[first]:
            alias[name] = same[0]
            notes.append(f"{last}/{name} has the class of {first}/{same[0]}")
    names[last] = {alias.get(name, name) for name in names[last]}
    if names[first] & names[last]:
        for split, other in ((first, last), (last, first)):
            if missing := sorted(names[other] - names[split]):
                notes.append(f"classes without images in {split}/: {list_names(missing)}")
        names = dict.fromkeys(names, names[first] | names[last])
    elif names[first] and names[last]:
        notes.append(f"{first}/ and {last}/ have no class in common")
    elif len(names[first] | names[last]) > 1:
        notes.append(f"no class folders in {last if names[first] else first}/, so its images have "
                     f"no labels")
    splits = {}
    for split, rows in members.items():
        classes = sorted(names[split]) if len(names[split]) > 1 else None
        labels, paths = None, [row[0] for row in rows]
        if classes:
            index = {name: i for i, name in enumerate(classes)} | {
                name: classes.index(other) for name, other in alias.items() if other in classes}
            labels = [index[unicode_name(row[1])] if len(row) > 1 else -1 for row in rows]
            if alone := [path for path, label in zip(paths, labels) if label < 0]:
                notes.append(f"images in no class folder, which kNN and probes leave out: "
                             f"{list_names(alone, 3)}")
        splits[split] = Split(paths, labels, classes)
    return splits, notes


def unicode_name(folder):
    """A folder's name in the composed form (NFC): macOS decomposes letters with accents."""
    return unicodedata.normalize("NFC", folder)


def describe_classes(splits):
    classes = {tuple(split.classes) for split in splits.values() if split.classes}
    if not classes:
        return ("; no labels, as there are fewer than two class folders (kNN and most probes need "
                "labels)")
    return "; " + "; ".join(f"{len(names):,} classes: {list_names(names)}"
                            for names in sorted(classes))


# --------------------------------------------------------------------------------------------------
# Images and their label maps


def pair_label_maps(paths):
    """Relative paths -> {key: path} of images, {key: path} of label maps. Keys: see `find_key`.
    Label maps may have longer names (7_P.png), all with the same addition."""
    images, labels = {}, {}
    for path in paths:
        key, is_label = find_key(path)
        (labels if is_label else images)[key] = path
    if labels and not images.keys() & labels.keys():
        first = min(labels)
        additions = [first[len(key):] for key in images if first.startswith(key)]
        if additions:
            addition = min(additions, key=len)
            labels = {key.removesuffix(addition): path for key, path in labels.items()}
    return images, labels


def find_key(path):
    """Relative path -> what an image and its label map have in common, and whether this is the
    label map.

    A label map is in a folder of LABELS or in one like train_labels or trainannot. The key is the
    path without the folders of IMAGES and LABELS and without ending: images/train/7.jpg and
    labels/train/7.png, train/images/7.jpg and train/labels/7.png, and train/7.png and
    trainannot/7.png have the key train/7.
    """
    *folders, name = path.split(os.sep)
    rest = [find_label_folder(folder) for folder in folders]
    kept = [folder if other is None else other for folder, other in zip(folders, rest)]
    kept = [folder for folder in kept if folder and folder.lower() not in IMAGES]
    return os.path.join(*kept, os.path.splitext(name)[0]), rest != [None] * len(rest)


def find_label_folder(folder):
    """What a folder's name is without the word for label maps: "" for labels, "train" for
    train_labels; None if it has no such word."""
    name = folder.lower()
    if name in LABELS:
        return ""
    for word in LABELS:
        rest = name.removesuffix(word).rstrip("_-")
        if name.endswith(word) and rest in (*TRAIN, *TEST):
            return folder[:len(rest)]
    return None
