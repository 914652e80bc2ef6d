"""Numbers that training and evaluate.py recorded: the log of a run, and results.jsonl next to a
checkpoint. No model is run here."""
from dataclasses import fields
from pathlib import Path

from diagnostics.inputs import MissingInput
from lib import config
from lib.folder import read_lines
from probes.common import WITHOUT_EFFECT, Options, complete_settings

RESULT_KEYS = "task data checkpoint branch step settings metrics".split()


def read_loss(model, opt):
    """Loss and kNN accuracy from the log of the run. For a run on toy or CIFAR-10 also those of its
    method's default run, from curves.yaml, and relative_distance: the mean of |loss - default| /
    default over the steps that both have (our choice)."""
    log = Path(model.source.path).with_name("metrics.jsonl") if model.source.path else None
    lines = [line for line in read_lines(log) if isinstance(line.get("loss"), float)]
    if not lines:
        raise MissingInput("no losses found: it needs metrics.jsonl of the run next to encoder.pt")
    evals = [line for line in lines if "knn" in line]
    out = dict(step=[line["step"] for line in lines], loss=[line["loss"] for line in lines],
               knn_step=[line["step"] for line in evals], knn=[line["knn"] for line in evals])
    curves, settings = Path(__file__).with_name("curves.yaml"), log.with_name("config.yaml")
    curves, settings = (config.read_yaml(file) if file.is_file() else {}
                        for file in (curves, settings))
    on_default = settings.get("base", "dino") == "dino"      # of selfpatch.py: the same loss
    default = curves.get(model.source.data, {}).get(model.source.method)
    if default and on_default:
        out |= {f"reference_{name}": default[name] for name in out}
        losses = dict(zip(default["step"], default["loss"]))
        distances = [abs(loss - losses[step]) / losses[step]
                     for step, loss in zip(out["step"], out["loss"]) if step in losses]
        if distances:
            out["relative_distance"] = sum(distances) / len(distances)
    return out


def read_results(model, opt, task, more_flags="", any_window=False):
    """Lines of results.jsonl next to the checkpoint whose file, branch, step, task, data set and
    --window match, the latest last; each with `settings_compared`, in which the models of a figure
    should agree. MissingInput if there is none."""
    if not model.source.path:
        raise MissingInput("results of evaluate.py are read next to a checkpoint, which this model "
                           "does not have")
    path = Path(model.source.path)
    weights = model.source.branch, model.source.step
    file = path.with_name("results.jsonl")
    lines = [line | dict(settings=complete_settings(line["settings"]))
             for line in read_lines(file, RESULT_KEYS)
             if line["task"] == task and line["data"] == opt.data
             and line["checkpoint"] and Path(line["checkpoint"]).name == path.name
             and (line["branch"], line["step"]) == weights]
    lines = [line for line in lines if any_window or line["settings"]["window"] == opt.window]
    if not lines:
        raise MissingInput(f"no result on {opt.data} yet: run python evaluate.py --task "
                           f"{task}{more_flags} --data {opt.data}"
                           f"{f' --window {opt.window}' if opt.window else ''}"
                           f" --checkpoint {path}")
    of_others = {field.name for field in fields(Options) if field.metadata["only_for"]
                 and task not in field.metadata["only_for"]}
    return [line | dict(settings_compared={
        name: value for name, value in line["settings"].items()
        if name not in {*WITHOUT_EFFECT, *of_others, "branch"}}) for line in lines]


def read_latest(model, opt, task):
    """The metrics {feature: {name: value}} of the latest result, and its settings_compared."""
    line = read_results(model, opt, task)[-1]
    return line["metrics"], line["settings_compared"]


def read_layerwise(model, opt):
    metrics, settings = read_latest(model, opt, "layerwise")
    top1 = {int(name.split()[1]): scores["top-1"]                            # "block 3 patch"
            for name, scores in metrics.items()}
    blocks = sorted(top1)
    return dict(block=blocks, top1=[top1[block] for block in blocks], settings_compared=settings)


def read_frequency_noise(model, opt):
    """Accuracy with noise in a frequency band minus accuracy without."""
    metrics, settings = read_latest(model, opt, "frequency_noise")
    [scores] = metrics.values()
    drop = {float(name.split()[0]): x for name, x in scores.items() if name.endswith(" pi")}
    frequencies = sorted(drop)
    return dict(frequency=frequencies, change=[-drop[f] for f in frequencies],
                settings_compared=settings)


def read_shape_bias(model, opt):
    metrics, settings = read_latest(model, opt, "shape_bias")
    [scores] = metrics.values()
    bars = {name: x for name, x in scores.items()        # null: no decision for either cue
            if name not in ("shape bias", "either") and x is not None}
    return dict(bars=bars, shape_bias=scores["shape bias"], either=scores["either"],
                settings_compared=settings)


def read_knn(model, opt):
    metrics, settings = read_latest(model, opt, "knn")
    return dict(bars={feature: next(iter(scores.values()))                   # the smallest k
                      for feature, scores in metrics.items()}, settings_compared=settings)


def read_accuracy_similarity(model, opt, shared):
    """ASL, fig. 1, which gives no formula: here the similarity of patch tokens after the final
    norm.
    """
    metrics, settings = read_latest(model, opt, "linear")
    [scores] = metrics.values()
    return dict(linear=[scores["top-1"]], similarity=shared.means["final_similarity"],
                settings_compared=settings)


def read_linear_finetune(model, opt):
    """Accuracy of a linear probe and after fine-tuning, a point for each model (Park et al.,
    fig. 1, 12a)."""
    linear = read_results(model, opt, "linear")[-1]
    finetuned = [line for line in read_results(model, opt, "finetune")
                 if (line["settings"]["reinit"] or "first:0").endswith(":0")]
    if not finetuned:
        raise MissingInput("all results of finetune are with --reinit: run it without")
    accuracies = [next(iter(line["metrics"].values())) for line in (linear, finetuned[-1])]
    return dict(linear=[accuracies[0]["top-1"]], finetuned=[accuracies[1]["last epoch"]],
                settings_compared=join_settings(linear, finetuned[-1]))


def join_settings(linear, finetuned):
    """settings_compared of two lines together."""
    one, other = linear["settings_compared"], finetuned["settings_compared"]
    return {key: (one.get(key), other.get(key)) for key in one | other}


def read_local_attention(model, opt):
    """Accuracy of a linear probe and of fine-tuning with attention within windows (Park et al.,
    fig. D.1), for each --window that has a result. Only runs with the settings of the latest run of
    their task are compared. Our choice: the windows are not used in pretraining; attention without
    a window is drawn at 2g - 1 patches, which is the same, g: patches on a side."""
    out, settings = {}, {}
    for task, metric in (("linear", "top-1"), ("finetune", "last epoch")):
        try:
            lines = read_results(model, opt, task, any_window=True)
        except MissingInput:
            continue
        windows = [line["settings_compared"].pop("window") for line in lines]
        latest = lines[-1]["settings_compared"]
        found = {window: next(iter(line["metrics"].values()))[metric]
                 for window, line in zip(windows, lines) if line["settings_compared"] == latest}
        if None in found and len(found) > 1:
            side = latest["img_size"] or model.source.img_size
            full = 2 * (side // model.encoder.patch_size) - 1
            found = dict(sorted((min(window or full, full), x) for window, x in found.items()))
            out |= {f"{task}_window": list(found), task: list(found.values())}
            settings |= {f"{key} of {task}": value for key, value in latest.items()}
    if out:
        out["settings_compared"] = settings
    else:
        raise MissingInput("run evaluate.py --task linear, or finetune, with --window 3, 5 ... and "
                           "without it, all with the settings of the latest run")
    return out


def read_reinit(model, opt):
    """Accuracy after fine-tuning with the first or last m blocks re-initialized, minus the accuracy
    for m = 0 (a run without --reinit counts as m = 0), for each m that has a result. Only runs with
    the settings of the latest run are compared."""
    lines = read_results(model, opt, "finetune", " --reinit first:0 (then first:1, last:1, ...)")
    for line in lines:
        del line["settings_compared"]["reinit"]
    settings = lines[-1]["settings_compared"]
    accuracy = {}                                        # (end, m): of the last epoch
    for line in (line for line in lines if line["settings_compared"] == settings):
        end, m = (line["settings"]["reinit"] or "first:0").split(":")
        [scores] = line["metrics"].values()
        accuracy[end if int(m) else "none", int(m)] = scores["last epoch"]
    baseline = accuracy.pop(("none", 0), None)
    if baseline is None or not accuracy:
        raise MissingInput("run evaluate.py --task finetune with --reinit first:0 and with other "
                           "numbers of blocks, all with the settings of the latest run")
    out = dict(settings_compared=settings)
    for end in ("first", "last"):
        change = {0: 0.0} | {m: x - baseline for (part, m), x in accuracy.items() if part == end}
        change = dict(sorted(change.items()))
        out |= {f"{end}_count": list(change), f"{end}_change": list(change.values())}
    return out
