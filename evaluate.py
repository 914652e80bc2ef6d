"""Measures what a checkpoint, ours or an official one, has learned: one task, several, or all.

    python evaluate.py                                        # kNN of the newest run in out/
    python evaluate.py --task knn linear --checkpoint out/mmc-toy mae_pretrain_vit_base.pth
    python evaluate.py --task part_retrieval --baseline pixels untrained --show
    python evaluate.py --task all --checkpoint out/mmc-toy out/mae-toy --reference

Prints a table with a row for each model and feature, and appends a line for each task and model to
results.jsonl next to the checkpoint. Several tasks encode their common images once. The tasks are
functions in probes/, the flags are in probes/common.py.

torchrun --nproc_per_node=8 evaluate.py ...: the processes share the encoding of images and the
training of finetune, segmentation and detection. The dense tasks (linear_segmentation,
zero_shot_segmentation, video, pose) run in the first process only.
"""
import contextlib
import functools
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lib import checkpoints, config, distributed, progress
from lib.flags import parse_flags, refuse_unused
from lib.folder import finite
from probes import (
    annotations,
    classification,
    detection,
    finetune,
    frozen_segmentation,
    plan,
    pose,
    retrieval,
    robustness,
    segmentation,
    video,
)
from probes.common import (
    DENSE,
    Model,
    Options,
    Report,
    default_data,
    gather_objects,
    is_toy,
    keep_in_memory,
    load_labeled,
    load_models,
    require_tokens,
    require_vit,
)

TASKS = {
    "knn": classification.knn,
    "classify": classification.classify,
    "few_shot": classification.few_shot,
    "linear": classification.linear,
    "layerwise": classification.layerwise,
    "attentive": classification.attentive,
    "finetune": finetune.finetune,
    "segmentation": segmentation.segmentation,
    "detection": detection.detection,
    "object_retrieval": retrieval.object_retrieval,
    "part_retrieval": retrieval.part_retrieval,
    "part_classification": retrieval.part_classification,
    "landmark_retrieval": retrieval.landmark_retrieval,
    "shape_bias": robustness.shape_bias,
    "frequency_noise": robustness.frequency_noise,
    "linear_segmentation": frozen_segmentation.linear_segmentation,
    "zero_shot_segmentation": frozen_segmentation.zero_shot_segmentation,
    "video": video.video,
    "pose": pose.pose,
}
END_TO_END = {"finetune", "segmentation", "detection"}             # these also train the encoder
FROZEN = [task for task in TASKS if task not in {*END_TO_END, "classify"}]        # --task all
FIRST_PROCESS = set(DENSE)                                         # not shared by processes
# What a task needs, to be checked before any work: patch tokens; images with one class each, of
# these splits; a kind of annotation.
NEEDS_TOKENS = {"attentive", "finetune", "segmentation", "detection", *DENSE}
NEEDS_CLASSES = {"few_shot": ["test"], "classify": ["test"], "object_retrieval": ["test"],
                 **dict.fromkeys(("knn", "linear", "layerwise", "attentive", "finetune",
                                  "frequency_noise", "shape_bias"), ["test", "train"])}
NEEDS_ANNOTATIONS = {
    "part_classification": "keypoints", "pose": "keypoints",
    "linear_segmentation": "segmentation", "segmentation": "segmentation",
    "zero_shot_segmentation": "segmentation", "video": "videos", "detection": "masks"}
TRAINED_ON_ANNOTATIONS = {"part_classification", "pose", "linear_segmentation", "segmentation",
                          "detection"}
# --task all takes minutes. Unless the flags are given: logistic regressions, else fewer epochs of
# heads; fewer iterations; fewer images of toy's splits (except for the dense tasks, which have a
# smaller limit of their own there) and of annotated sets.
ALL_EPOCHS, ALL_ITERS, ALL_IMAGES = 10, 20, 2000
# Of linear_segmentation: few iterations need larger learning rates, and 16 crops of 512 px with
# the logits of 150 classes would take half a minute and more, for each iteration.
ALL_LRS, ALL_CROP, ALL_CROPS = (2e-3, 1e-2, 5e-2), 256, 4
ALL_LIMITS = dict(linear_segmentation=50, zero_shot_segmentation=100, pose=50, video=3,
                  part_retrieval=500, part_classification=500)
LOGREG = ("linear", "layerwise", "part_classification", "frequency_noise", "shape_bias")
LONG_MINUTES = 30                        # from here on the plan states how to shorten it


@dataclass
class Result:
    task: str
    model: str                           # its name
    report: Report


def parse(argv=None) -> Options:
    lines = [f"  {name:<24}{task.__doc__.splitlines()[0]}" for name, task in TASKS.items()]
    lines.append(f"  {'all':<24}All tasks with a frozen encoder that fit the model and the data.")
    lines.append(f"{'':<26}Linear heads are logistic regressions, other training is short "
                 f"({ALL_EPOCHS} epochs,\n{'':<26}{ALL_ITERS} iterations), and fewer images are "
                 f"used, unless the flags are given\n{'':<26}(not in the dense tasks on toy).")
    opt = parse_flags(Options, argv, description=__doc__, epilog="\n".join(["tasks:", *lines]))
    for task in opt.task:
        if task not in (*TASKS, "all"):
            raise ValueError(f"unknown task {task!r}{config.nearest(task, TASKS)}")
    if "all" in opt.task and len(opt.task) > 1:
        raise ValueError("--task all runs every task that fits: leave out the other names")
    return replace(opt, task=tuple(dict.fromkeys(opt.task)))


def refuse_ineffective(opt):
    """ValueError for a flag that has no effect because of another one. Only for a single task: with
    several a flag may be meant for some of them."""
    task, = opt.task
    if opt.recipe == "logreg" and opt.epochs:
        raise ValueError("recipe logreg has no epochs: leave out --epochs, or choose another "
                         "--recipe")
    if task == "part_classification":
        if opt.head == "attentive" and opt.recipe:
            raise ValueError("the attentive head has no recipes: leave out --recipe, or choose "
                             "--head linear")
        if opt.head == "attentive" and (opt.feature or opt.hyber_norm == "joint"):
            raise ValueError("the attentive head takes all tokens: leave out --feature and "
                             "--hyber-norm, or choose --head linear")
        if opt.head != "attentive" and opt.bn == "batch":
            raise ValueError("--bn is for the attentive head: add --head attentive, or leave it "
                             "out")
    if task == "detection" and opt.epochs and opt.iters:
        raise ValueError("--epochs and --iters both give the length of the training: leave out one")
    uses_hyber = opt.feature == "hyber" or (task == "knn" and not opt.feature)
    if opt.hyber_norm == "joint" and not uses_hyber:
        raise ValueError("--hyber-norm is for the feature hyber only: add --feature hyber, or "
                         "leave it out")


def main(argv=None):
    opt, begin = parse(argv), time.perf_counter()
    is_first = os.environ.get("RANK", "0") == "0"
    tasks = list_tasks(opt)
    if opt.task != ("all",):
        refuse_unused(opt, tasks)
        if len(tasks) == 1:
            refuse_ineffective(opt)
    if not FIRST_PROCESS.issuperset(tasks):
        distributed.init_distributed(distributed.pick_device(opt.device))
    elif not is_first:
        return
    if not is_first:                                     # only the first process prints
        sys.stdout = open(os.devnull, "w", errors="replace")
    distributed.keep_memory()
    note = distributed.choose_threads(distributed.pick_device(opt.device))
    with progress.activity("loading the models", is_first):
        models = load_models(opt)
    opt = replace(opt, data=opt.data or default_data(models), show=opt.show and is_first)
    print(f"{', '.join(opt.task)} on {opt.data}: {', '.join(model.name for model in models)}; "
          f"{models[0].precision} on {distributed.device_name(models[0].device)}")
    if note:
        print(note)
    with keep_in_memory() if len(tasks) > 1 else contextlib.nullcontext():
        results, skipped, paths, error = run_tasks(opt, models, is_first)
    if error and not is_first:
        time.sleep(10)       # the first process prints what is done; an error here would end it
    if error and not (is_first and results):
        raise error
    if not error and not any(gather_objects(bool(results))):
        raise ValueError("; ".join(skipped))
    if not is_first:
        return
    print_results(opt, models, results, skipped)
    seconds = time.perf_counter() - begin
    print(f"{seconds:.1f} s, results appended to {', '.join(paths)}", flush=True)
    if error:                                            # after the table of the earlier models
        raise error


# ---- running the tasks ---------------------------------------------------------------------------


def list_tasks(opt):
    return FROZEN if opt.task == ("all",) else list(opt.task)


def run_tasks(opt, models, is_first):
    """Runs the tasks on each model.

    -> list of Result, notes on tasks that were skipped, files that were written, the first error
    (or None). A task that finds an error in its model or data does not stop the others, except one
    that several processes share; with --task all it is skipped.
    """
    run_all, tasks = opt.task == ("all",), list_tasks(opt)
    results, skipped, written, failure = [], {}, {}, None
    jobs = []
    for model, path in zip(models, result_files(opt, models)):
        for task in tasks:
            try:
                with progress.activity(f"{task}: checking the data", is_first):
                    if run_all and task == "pose" and opt.data == "coco" and not opt.iters:
                        raise ValueError(f"pose trains with batches of 512 boxes, {ALL_ITERS} of "
                                         f"which are too few and take too long for --task all: "
                                         f"run --task pose alone, or give --iters")
                    check_fit(task, model, options_for_task(opt, task))
                jobs.append((task, model, path))
            except (ValueError, FileNotFoundError) as error:
                if not run_all:
                    raise
                skipped.setdefault((model.name, why_skipped(task, error)), []).append(task)
    if is_first:                                         # before any work
        for path in dict.fromkeys(path for _, _, path in jobs):
            append(path, "")
        if opt.show or opt.save:
            checkpoints.make_folder(opt.out)
    if run_all and jobs:
        print_plan(opt, jobs)
    # The first process runs some tasks alone: they come last, and the others wait at the end.
    wait = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if len(tasks) > 1 and (
        distributed.world_size() > 1) else None
    for task, model, path in sorted(jobs, key=lambda job: job[0] in FIRST_PROCESS):
        if task in FIRST_PROCESS and not is_first:
            continue
        task_opt, begin = options_for_task(opt, task), time.perf_counter()
        try:
            with progress.activity(f"{model.name}: {task}", is_first):
                report = TASKS[task](model, task_opt)
        except KeyboardInterrupt as interrupt:
            failure = KeyboardInterrupt(
                f"interrupted during {task} of {model.name}: {len(results)} of {len(jobs)} "
                f"tasks are done{', and their results are above' * bool(results)}"
                f"{f'; {interrupt}' * bool(str(interrupt))}")
            break
        except Exception as error:
            is_user_error = isinstance(error, (ValueError, FileNotFoundError))
            # A named task is expected to fit: the error is perhaps in this process only, and the
            # others wait for it.
            shared = distributed.world_size() > 1 and task not in FIRST_PROCESS
            if not is_user_error or shared and not run_all:
                failure = error
                break
            if run_all:
                skipped.setdefault((model.name, why_skipped(task, error)), []).append(task)
            else:
                failure = failure or error
                if len(jobs) > 1:
                    print(f"{model.name}: {task} failed: {error}", flush=True)
            continue
        add_notes(report, task, model, task_opt)
        seconds = time.perf_counter() - begin
        results.append(Result(task, model.name, report))
        if len(jobs) > 1:
            print(f"{model.name}: {task}, {seconds:.1f} s; {headline(report)}", flush=True)
        if is_first:
            try:
                append(path, json_line(report, model, task_opt, seconds))
            except OSError as error:                     # the results are printed nevertheless
                failure = error
                break
            written[str(path)] = True                    # each file once, in order
    if wait and not failure:
        dist.barrier(wait)
    notes = [f"{name}: skipped {', '.join(names)}: {why}" for (name, why), names in skipped.items()]
    return results, notes, list(written), failure


def why_skipped(task, error):
    """The error without the name of the task, to group tasks, and without its advice."""
    return re.split("[:;,] (?:choose|leave out) ", str(error))[0].removeprefix(f"{task} ")


def options_for_task(opt, task):
    """The options of one task. --task all: it trains briefly."""
    if opt.task != ("all",):
        return replace(opt, task=task)
    changes = dict(task=task)
    attentive = task == "attentive" or task == "part_classification" and opt.head == "attentive"
    if not (opt.epochs or opt.recipe or opt.paper_lr or attentive) and task in LOGREG:
        changes["recipe"] = "logreg"
    else:
        changes["epochs"] = opt.epochs or ALL_EPOCHS
    if is_toy(opt.data):
        limit = None if task in DENSE else ALL_LIMITS.get(task, ALL_IMAGES)
    else:
        limit = ALL_LIMITS.get(task)
        changes["iters"] = opt.iters or ALL_ITERS
        if task == "linear_segmentation":
            changes.update(lr=opt.lr or ALL_LRS, img_size=opt.img_size or ALL_CROP,
                           train_batch_size=opt.train_batch_size or ALL_CROPS)
    return replace(opt, limit=opt.limit or limit, **changes)


def check_fit(task, model, opt):
    """ValueError or FileNotFoundError if a task does not fit the model or the data. Quick: no image
    is encoded. What it does not notice, the task reports itself."""
    if task in NEEDS_TOKENS:
        require_tokens(model, task)
    if task == "linear_segmentation":
        require_vit(model, task)
    if task == "pose":
        pose.require_areas(opt)
    if task == "detection":
        detection.require_whole_attention(model, opt)
    if task == "shape_bias":
        annotations.cue_conflict(opt.data, opt.data_root, limit=1)
    if task in ("part_retrieval", "part_classification"):
        retrieval.choose_parts(opt)                      # the data has keypoints, and these parts
    kind = NEEDS_ANNOTATIONS.get(task)
    if task == "object_retrieval" and annotations.objects_are_boxes(opt.data):
        kind = "boxes"
    elif task == "detection" and not annotations.has("masks", opt.data):
        kind = "boxes"                                   # Faster R-CNN
    elif task == "landmark_retrieval" and not is_toy(opt.data):
        retrieval.read_landmarks(opt)
    elif not is_toy(opt.data):                           # which has classes, and takes time to draw
        for split in NEEDS_CLASSES.get(task, ()):
            load_labeled(model, opt, split)
    for split in ("test", "train")[:1 + (task in TRAINED_ON_ANNOTATIONS)] if kind else ():
        level = dict(level=opt.level) if kind == "segmentation" else {}
        read = getattr(annotations, kind)
        next(iter(read(opt.data, opt.data_root, split, limit=1, **level)), None)


def print_plan(opt, jobs):
    """Prints the tasks of every model with their estimated minutes."""
    total, by_model = 0.0, {}
    for task, model, _ in jobs:
        if model.name not in by_model:
            time_image = functools.cache(functools.partial(plan.seconds_per_image, model))
            by_model[model.name] = []
        with progress.activity("estimating how long it will take"):
            seconds = plan.estimate_seconds(task, model, options_for_task(opt, task), time_image)
        by_model[model.name].append(f"{task} {seconds / 60:.1f}")
        total += seconds / 60
    for name, tasks in by_model.items():
        print(f"{name} on {opt.data}, estimated minutes: {', '.join(tasks)}")
    hint = "; --limit shortens it, --task NAME runs one task alone"
    print(f"{len(jobs)} tasks, about {max(1, round(total))} minutes in all"
          f"{hint * (total > LONG_MINUTES)}", flush=True)


def add_notes(report, task, model, opt):
    if opt.hyber_norm == "joint" and "hyber" in report.rows:
        report.protocol += "; hyber: cls and patch concatenated, then L2-normalized"
    if not model.encoder:
        report.notes.append("pixels: the image averaged to at most 32 x 32, no encoder")
    elif not model.encoder.num_prefix and task not in DENSE:
        report.notes.append(f"{model.name} has no class token: cls is its mean patch token")
    elif report.rows.keys() == {"cls"} and model.source.method in ("simmim", "beit", "cae") and (
            model.source.layout in ("ours", "BEiT", "BEiT 1k", "CAE", "SimMIM")):
        report.notes.append(f"{model.name}: the loss of its pretraining does not use the class "
                            f"token: compare the mean patch token (--feature patch)")
    if window := model.encoder and model.encoder.config.get("window"):
        report.protocol += f"; attention within {window} x {window} patches"


def result_files(opt, models):
    """The file for the results of each model; that of a baseline: of the checkpoint before it."""
    files, folder = [], Path(opt.out)
    for model in models:
        if model.source.path:
            folder = Path(model.source.path).parent
        files.append(Path(opt.json or folder / "results.jsonl"))
    return files


def append(path, line):
    """Writes a line at the end of a file of results. Its last line may be incomplete, if a process
    was killed while it wrote. OSError if that fails, ValueError for a file of something else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size:       # not a pipe
            with open(path, "rb") as file:
                if file.read(1) not in b"{\n":
                    raise ValueError(f"{path} is not a file of results: name another one with "
                                     f"--json")
                file.seek(-1, os.SEEK_END)
                line = "\n" * (bool(line) and file.read(1) != b"\n") + line
        with open(path, "a") as file:
            file.write(line)
    except OSError as e:
        raise OSError(f"cannot write {path} ({e.strerror}); name a file with --json") from None


def json_line(report: Report, model: Model, opt: Options, seconds):
    """A line of results.jsonl: all that is printed, and all settings."""
    source = model.source
    settings = {**asdict(opt), "device": str(model.device), "precision": model.precision}
    rows = {feature: finite(row) for feature, row in report.rows.items()}
    return json.dumps(dict(
        task=opt.task, model=model.name, checkpoint=source.path, method=source.method,
        branch=source.branch, step=source.step, data=opt.data, images=report.images,
        metrics=rows, protocol=report.protocol, notes=report.notes,
        seconds=round(seconds, 1), torch=torch.__version__, settings=settings)) + "\n"


# ---- printing ------------------------------------------------------------------------------------


def print_results(opt, models, results, skipped):
    """Protocols, tables, notes, the papers' numbers, and, except with --task all, a line for each
    task and model."""
    run_all, tasks = opt.task == ("all",), list(dict.fromkeys(r.task for r in results))
    for task in tasks:
        mine = [r for r in results if r.task == task]
        images = [", ".join(f"{n:,} {role}" for role, n in r.report.images.items()) for r in mine]
        if len(set(images)) > 1:                         # some targets are too small for a model
            images = ["; ".join(f"{r.model}: {numbers}" for r, numbers in zip(mine, images))]
        print(f"\n{task} on {opt.data} ({images[0]}), {models[0].precision}, "
              f"{models[0].device.type}; percent")
        for protocol in dict.fromkeys(r.report.protocol for r in mine):     # input sizes may differ
            names = [r.model for r in mine if r.report.protocol == protocol]
            print(f"{', '.join(names)}: {protocol}")
        if not run_all:
            print_table(mine)
    if run_all:
        print()
        print_summary(results)
        print("note: most with shorter training and fewer images than the tasks alone (see the "
              "protocols above): not comparable with those")
    notes = [f"{r.task}: {note}" if len(tasks) > 1 else note
             for r in results for note in r.report.notes]
    for note in dict.fromkeys(notes + skipped):
        print(f"note: {note}")
    if opt.reference:
        for task in tasks:
            published = paper_results(task, opt.data)
            if not published:
                print(f"\n{task}: no numbers in the papers")
                continue
            found = any(r.model.endswith(f"; {opt.data})") for r in published)
            print(f"\n{task}: numbers of the papers, not measured here"
                  + f"; none for {opt.data}, these are for other data sets" * (not found))
            print_table(published)
    if not run_all:
        for r in results:
            print(f"{r.model}: {r.task}, {headline(r.report)}")


def headline(report):
    """The first column of every feature in words."""
    column = next(iter(next(iter(report.rows.values()))))
    numbers = [f"{feature} {row[column]:.1f}" for feature, row in report.rows.items()
               if column in row]
    return f"{column} ({'points' if column == 'mean drop' else '%'}): {', '.join(numbers)}"


def print_table(results):
    """A row for each model and feature, a column for each number."""
    columns = list(dict.fromkeys(
        column for r in results for row in r.report.rows.values() for column in row))
    lines = [("model", "feature", *columns)]
    for r in results:
        for i, (feature, row) in enumerate(r.report.rows.items()):
            numbers = [f"{row[column]:.1f}" if column in row else "" for column in columns]
            lines.append(("" if i else r.model, feature, *numbers))
    print_aligned(lines, 2)


def print_summary(results):
    """The first number of each feature of each task, a column for each model."""
    models = list(dict.fromkeys(r.model for r in results))
    rows = {}                                        # (task, feature, column) -> {model: number}
    for r in results:
        for feature, row in r.report.rows.items():
            column, number = next(iter(row.items()))
            rows.setdefault((r.task, feature, column), {})[r.model] = number
    lines, previous = [("task", "feature", "number", *models)], None
    for (task, feature, column), row in rows.items():
        numbers = [f"{row[model]:.1f}" if model in row else "" for model in models]
        lines.append(("" if task == previous else task, feature, column, *numbers))
        previous = task
    print_aligned(lines, 3)


def print_aligned(lines, left):
    """Prints lines of cells in columns: the first `left` ones left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [cell.ljust(width) if i < left else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(line, widths))]
        print(*cells, sep="  ")


def paper_results(task, name):
    """The papers' results (probes/papers.yaml) for the data set; if there are none, for all."""
    tables = config.read_yaml(Path(__file__).parent / "probes/papers.yaml").get(task, [])
    results = []
    for table in [table for table in tables if table["data"] == name] or tables:
        columns = [column.split("/") for column in table["columns"]]
        for model, numbers in table["rows"].items():
            rows = {}
            for (feature, column), number in zip(columns, numbers):
                if number is not None:
                    rows.setdefault(feature, {})[column] = number
            label = f"{model} ({table['where']}; {table['data']})"
            results.append(Result(task, label, Report(rows, "")))
    return results


if __name__ == "__main__":
    config.main(main)
