"""Diagnostics: how do the representations of encoders differ? Curves and images; no training.

    python analysis.py                                        # the standard report, newest run
    python analysis.py --checkpoint out/mae-toy out/dino-toy --what attention_distance nmi fourier
    python analysis.py --what all --data coco --data-root /data

    images -> z_0 -> [ attention A_l, heads o_l -> u_l -> MLP -> z_l ] x depth -> norm -> features
                       |                           |             |                        |
                       distance, NMI               similarities, spectra, Fourier         images

z_0 is the embedding; u_l and z_l are the residual stream after the attention and after the MLP of
block l, before the final norm. Curves are measured on whole images and on patch tokens.
Exceptions: layer_reconstruction, feature_variance and views mask images; nmi, attention_maps,
feature_variance and knn also use the class token.

One function computes the numbers of a diagnostic: measure_... (curves), show_... (images) or
read_... (recorded by training and evaluate.py), in diagnostics/. DIAGNOSTICS lists them. Formulas
are in diagnostics/formulas.py, titles and how to read a figure in diagnostics/figures.py. Each
diagnostic writes NAME.json, NAME.csv and, with matplotlib, NAME.png; index.html shows all.
"""
import csv
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from diagnostics import attention, figures, images, patches, recorded, representations
from diagnostics.inputs import MissingInput
from diagnostics.plots import Result
from diagnostics.shared_pass import run_shared_pass
from lib import checkpoints, config, distributed, progress
from lib.flags import flag, parse_flags, refuse_unused
from probes.common import CommonOptions, default_data, load_models, require_vit

# ---- the diagnostics -----------------------------------------------------------------------------

# name: function of (model, opt) -> {name: numbers}, and "". With names of shared_pass.STATISTICS,
# or "decoder", as the second entry: function of (model, opt, the SharedPass that measures these).
DIAGNOSTICS = {
    "attention_distance": (attention.measure_attention_distance, "attention_distance"),
    "nmi": (attention.measure_nmi, "nmi class_token_attention"),
    "head_similarity": (attention.measure_head_similarity, "head_similarity"),
    "depth_similarity": (representations.measure_depth_similarity, "depth_similarity"),
    "token_similarity": (representations.measure_token_similarity, "token_similarity"),
    "token_transform": (representations.measure_token_transform, "common_update"),
    "sv_tokens": (representations.measure_sv_tokens, "sv_tokens"),
    "sv_images": (representations.measure_sv_images, ""),
    "fourier": (representations.measure_fourier, "fourier"),
    "decoder": (representations.measure_decoder, "decoder attention_distance nmi fourier"),
    "adjacent_count": (patches.measure_adjacent_count, "similar_neighbors "
                       "similar_label_neighbors similar_neighbors_by_state"),
    "intra_inter": (patches.measure_intra_inter, "pairs"),
    "attention_maps": (attention.show_attention_maps, ""),
    "pca": (patches.show_pca, ""),
    "kmeans": (patches.show_kmeans, ""),
    "prompt_heatmap": (patches.show_prompt_heatmap, ""),
    "patch_retrieval": (patches.show_patch_retrieval, ""),
    "layer_reconstruction": (images.show_layer_reconstruction, ""),
    "tsne": (patches.measure_tsne, ""),
    "feature_variance": (representations.measure_feature_variance, ""),
    "views": (images.show_views, ""),
    "loss": (recorded.read_loss, ""),
    "layerwise": (recorded.read_layerwise, ""),
    "frequency_noise": (recorded.read_frequency_noise, ""),
    "shape_bias": (recorded.read_shape_bias, ""),
    "reinit": (recorded.read_reinit, ""),
    "linear_finetune": (recorded.read_linear_finetune, ""),
    "local_attention": (recorded.read_local_attention, ""),
    "knn": (recorded.read_knn, ""),
    "accuracy_similarity": (recorded.read_accuracy_similarity, "final_similarity"),
}
# Those that --image affects.
FIGURES_OF_IMAGES = tuple("""attention_maps pca kmeans prompt_heatmap patch_retrieval
layer_reconstruction tsne views token_transform""".split())
STANDARD = tuple("""attention_distance nmi head_similarity depth_similarity token_similarity
sv_tokens fourier attention_maps pca kmeans prompt_heatmap""".split())


@torch.no_grad()
def run_diagnostics(model, opt):
    """Runs opt.what on one model -> {name: numbers}, {name: why it could not be run}."""
    statistics = {name for what in opt.what for name in DIAGNOSTICS[what][1].split()}
    if opt.subtract_mean and "token_similarity" in statistics:
        statistics.add("centered_similarity")
    with progress.activity(f"{model.name}: {', '.join(sorted(statistics))}"):
        shared = run_shared_pass(model, opt, statistics) if statistics else None
    results, missing = {}, {}
    for name in opt.what:
        function, needed = DIAGNOSTICS[name]
        try:
            with progress.activity(f"{model.name}: {name}"):
                results[name] = (function(model, opt, shared) | dict(images=shared.num_images)
                                 if needed else function(model, opt))
        except MissingInput as error:
            missing[name] = str(error)
    return results, missing


# ---- options -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options(CommonOptions):
    """The flags of analysis.py."""
    what: tuple[str, ...] = flag(
        (), "diagnostics to run (see the list below), or all; default: the standard report")
    baseline: tuple[str, ...] = flag(
        (), "also analyze a ViT with random weights", choices=("untrained",), group="models")
    img_size: int | None = flag(
        None, "side of the input images in pixels; default: as in pretraining", at_least=1,
        group="models")
    precision: str = flag("fp32", "precision of the encoder; sums over images are always float64",
                          choices=("auto", "bf16", "fp32"), group="models")
    limit: int | None = flag(
        None, "number of test images; default: 256; for sv_images 2048, or 4 x width if that is "
        "more; for patch_retrieval 1000; for feature_variance 64", at_least=1, group="data")
    batch_size: int = flag(64, "images per forward pass", at_least=1, group="data")
    image: int = flag(
        0, "index of the first image in the figures; of image files, --limit evenly spaced ones "
        "are taken, so another --limit gives another file", at_least=0, group="data",
        only_for=FIGURES_OF_IMAGES)
    seed: int = flag(0, "random seed of masks, crops, k-means, t-SNE and untrained weights",
                     group="models")
    subtract_mean: bool = flag(
        False, "measure it also after the mean token of all images is subtracted",
        group="settings of a diagnostic", only_for=("token_similarity",))
    copies: int = flag(128, "number of views per image", at_least=2,
                       group="settings of a diagnostic", only_for=("feature_variance",))
    threshold: float = flag(0.95, "smallest cosine of similar neighbors",
                            group="settings of a diagnostic", only_for=("adjacent_count",))


def parse(argv=None):
    """Options from the command line. ValueError: unknown diagnostics, values out of range."""
    listed = "\n".join(f"  {name:<22}{figure.title}{' *' * (name in STANDARD)}"
                       for name, figure in figures.FIGURES.items())
    opt = parse_flags(Options, argv, description=__doc__,
                      epilog=f"diagnostics (*: standard report):\n{listed}")
    what = tuple(DIAGNOSTICS) if opt.what == ("all",) else tuple(dict.fromkeys(opt.what))
    for name in what:
        if name not in DIAGNOSTICS:
            raise ValueError(f"unknown diagnostic {name!r}{config.nearest(name, DIAGNOSTICS)}")
    return dataclasses.replace(opt, what=what or STANDARD)


# ---- report --------------------------------------------------------------------------------------


def to_json_data(x):
    """Tensors become lists, numbers that are not finite None; images of figures are left out."""
    if torch.is_tensor(x):
        return to_json_data(x.tolist())
    if isinstance(x, dict):
        return {name: to_json_data(value) for name, value in x.items() if name != "image_rows"}
    if isinstance(x, (list, tuple)):
        return [to_json_data(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def csv_rows(x, *keys):
    """Nested numbers -> rows of CSV: name, up to four indices, value."""
    for key, value in x.items() if isinstance(x, dict) else enumerate(x):
        if isinstance(value, (dict, list)):
            yield from csv_rows(value, *keys, key)
        else:
            yield [*keys, key, *[""] * (4 - len(keys)), value]


def write_numbers(folder, name, results, opt):
    """NAME.json, and NAME.csv with a row for each number and its indices in the nested list."""
    content = dict(
        what=name, title=figures.FIGURES[name].title, reading=figures.FIGURES[name].reading,
        data=opt.data, settings={key: str(value) for key, value in vars(opt).items()},
        torch=torch.__version__,
        models=[dict(model=r.model.name, checkpoint=r.model.source.path, step=r.model.source.step,
                     img_size=r.model.img_size, numbers=to_json_data(r.numbers))
                for r in results])
    text = json.dumps(content).encode()
    checkpoints.write_atomic(folder / f"{name}.json", lambda file: file.write(text))
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8",
              errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow("model quantity i j k l value".split())
        for r in results:
            writer.writerows([r.model.name, *row] for row in csv_rows(to_json_data(r.numbers)))


def import_pyplot():
    """matplotlib.pyplot; None if it is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        return pyplot
    except ImportError:
        return None


def print_numbers(name, result):
    """Prints one line: the numbers of a diagnostic, of a curve the first and the last."""
    texts = []
    for key, x in to_json_data(result.numbers).items():
        if key.startswith(("density", "cosine", "reference")):       # of a figure's axes
            continue
        if isinstance(x, (int, float)):
            texts.append(f"{key} {x:.4g}")
        elif isinstance(x, list) and x and all(isinstance(value, float) for value in x):
            texts.append(f"{key} {x[0]:.4g} ... {x[-1]:.4g}")
    print(f"{name:<22}{result.model.name}{': ' * bool(texts)}{', '.join(texts)}")


def main(argv=None):
    opt = parse(argv)
    refuse_unused(opt, opt.what)
    begin = time.perf_counter()
    distributed.keep_memory()
    note = distributed.choose_threads(distributed.pick_device(opt.device))
    folder = checkpoints.make_folder(Path(opt.out) / "analysis")
    with progress.activity("loading the models"):
        models = load_models(opt)
    for model in models:
        require_vit(model, "analysis.py")
        if not all(p.isfinite().all() for p in model.encoder.parameters()):
            raise ValueError(f"{model.name}: its weights are not finite: leave it out, or take an "
                             f"earlier checkpoint")
    opt = dataclasses.replace(opt, data=opt.data or default_data(models))
    names = ", ".join(model.name for model in models)
    window = f"attention within {opt.window} x {opt.window} patches; " if opt.window else ""
    head = f"{names}; test images of {opt.data}; {window}{models[0].precision}"
    print(f"{head} on {distributed.device_name(models[0].device)}")
    if note:
        print(note)
    with progress.activity("loading matplotlib"):        # its first import lists all fonts
        plt = import_pyplot()
    results, missing = {name: [] for name in opt.what}, {}
    for position, model in enumerate(models):
        measured, left_out = run_diagnostics(model, opt)
        for name, numbers in measured.items():
            results[name].append(Result(model, numbers, position))
        for name, reason in left_out.items():
            missing.setdefault((name, reason), []).append(model.name)
        seconds = time.perf_counter() - begin
        print(f"{model.name}: {len(measured)} diagnostics, after {seconds:.0f} s")
    results = {name: model_results for name, model_results in results.items() if model_results}
    for name, model_results in progress.bar(results.items(), "writing figures", unit="figures"):
        write_numbers(folder, name, model_results, opt)
        if plt:
            figures.save_figure(plt, folder / f"{name}.png", name, model_results)
        for result in model_results:
            print_numbers(name, result)
    notes = [f"{name} left out ({', '.join(model_names)}): {reason}"
             for (name, reason), model_names in missing.items()]
    notes += [f"{name}: {difference}" for name, model_results in results.items()
              if (difference := figures.describe_differences(model_results))]
    figures.write_page(folder / "index.html", head, results, notes, bool(plt))
    for note in notes:
        print(f"note: {note}")
    if not results:
        raise ValueError("no diagnostic could be run: the notes above list what is missing")
    if not plt:
        print("figures need matplotlib: pip install matplotlib; the numbers are complete")
    print(f"{time.perf_counter() - begin:.1f} s; {folder}/index.html; a .json, .csv"
          f"{', .png' * bool(plt)} for each diagnostic")


if __name__ == "__main__":
    config.main(main)
