"""The figure of each diagnostic: its title, how to read it, how it is drawn; and index.html.

    numbers of each model -> FIGURES[name].draw -> NAME.png, all of them in index.html
"""
import html
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from diagnostics.plots import (
    axes_figure,
    bar_plot,
    depth_plot,
    image_figure,
    line_plot,
    plot_head_density,
    plot_loss,
    plot_pair_densities,
    plot_shape_bias,
    plot_token_plane,
    plot_tsne,
)


@dataclass
class Figure:
    title: str
    reading: str                 # text below the figure: what is shown and what to expect
    draw: Callable               # (matplotlib.pyplot, results) -> figure


HIGHEST = line_plot("depth", "highest", "depth (blocks)",
                     "\u0394 log amplitude at {highest_at:.2f} \u03c0")
SPECTRUM = (
    line_plot("depth", "at_first", "depth (blocks)", "\u0394 log singular value {ranks[0]}"),
    line_plot("depth", "at_second", "depth (blocks)", "\u0394 log singular value {ranks[1]}"),
    line_plot("depth", "log_second_value", "depth (blocks)", "log singular value 2"))
RANKS = depth_plot("rank", "delta", "rank", "\u0394 log singular value")
COMPARABLE = "Only models with the same grid and width are comparable."
DEPTH_LINES = ("The first plots, one for each model, have a line for each depth, from the "
               "embedding (dark) to the last block (light).")
SPECTRUM_CURVES = ("The next two plots show two of these ranks over depth, the last plot the "
                   "second value itself.")

FIGURES = {
    "attention_distance": Figure(
        "Attention distance",
        "The curve is the mean distance between a query and its keys, weighted by attention. A low "
        "value means local attention. The dotted line is the value of uniform attention. Models "
        "with inputs of different sizes are comparable only relative to their own dotted line. "
        "Park et al. report higher values for contrastive models than for MIM models, most of all "
        "in late blocks.",
        axes_figure(line_plot("block", "pixels", "block", "distance (pixels of the input)",
                             level="uniform"))),
    "nmi": Figure(
        "Normalized mutual information (NMI) of query and key",
        "The NMI is 0 if all queries have the same attention map. Park et al. report that "
        "contrastive models fall to 0 in late blocks and MIM models do not. The second plot shows "
        "the standard deviation over heads. The third shows the density over the heads of block 3 "
        "(of the last block in a shallower model), with a marker for each head. The fourth shows "
        "the fraction of attention that goes to the class token and registers, for models that "
        "have them; where it is near 1, the NMI is too low.",
        axes_figure(line_plot("block", "nmi", "block", "NMI", at_least=(0, 0.6)),
                  line_plot("block", "std_over_heads", "block", "standard deviation over heads"),
                  plot_head_density,
                  line_plot("block", "class_token_attention", "block",
                             "attention to class token, registers"))),
    "head_similarity": Figure(
        "Similarity of heads",
        "The curve is the mean cosine of the outputs of two heads for the same token. A high value "
        "means that heads are redundant. Park et al. report higher values for contrastive models "
        "than for MIM models in late blocks.",
        axes_figure(line_plot("block", "similarity", "block", "cosine of two heads"))),
    "depth_similarity": Figure(
        "Similarity before and after attention",
        "The curve is the mean cosine of a token before and after the attention layer. A high "
        "value means that attention changes the token little. Park et al. report higher values for "
        "contrastive models than for MIM models in late blocks.",
        axes_figure(line_plot("block", "similarity", "block", "cosine, before and after"))),
    "token_similarity": Figure(
        "Similarity of tokens of one image",
        "The curves are the mean cosine of two patch tokens of an image, after attention (first "
        "plot) and after each block (second plot). Park et al. report that it rises in late blocks "
        "of contrastive models, above that of MIM models. Dashed lines (with --subtract-mean) are "
        "computed after the mean token of all images is subtracted.",
        axes_figure(line_plot("block", "after_attention", "block, after attention",
                             "cosine of two tokens"),
                  line_plot("depth", "after_block", "depth (blocks; 0: embedding)",
                             "cosine of two tokens"))),
    "token_transform": Figure(
        "How attention changes tokens",
        "The scatter plots show the tokens of two images (circles, triangles) before and after "
        "the attention of the last block, with their centers (+ before, x after). Park et al. show "
        "the last block of MoCo v3 and the first of SimMIM. The curves are the fraction of the "
        "change that is common to all tokens of an image. Park et al. report that contrastive "
        "models change all tokens alike (near 1) and MIM models change each token differently.",
        axes_figure(line_plot("block", "common", "block", "common fraction of the change"),
                  each=plot_token_plane, same_scale=False)),
    "sv_tokens": Figure(
        "Spectrum of tokens within images",
        "The values are log singular values of the covariance of the tokens of one image, minus "
        f"the second one. {DEPTH_LINES} {SPECTRUM_CURVES} If they rise with depth, tokens span a "
        "larger volume. Park et al. report this for MIM models, except in the last blocks, and "
        f"flat or falling curves for contrastive models. {COMPARABLE}",
        axes_figure(*SPECTRUM, each=RANKS)),
    "sv_images": Figure(
        "Spectrum over images",
        "The values are log singular values of the covariance of the mean patch tokens of many "
        f"images, minus the second one. {DEPTH_LINES} {SPECTRUM_CURVES} If they rise with depth, "
        "images are separated further. Park et al. report a strong rise for contrastive models and "
        f"a small one for MIM models. {COMPARABLE}",
        axes_figure(*SPECTRUM, each=RANKS)),
    "fourier": Figure(
        "High frequencies in feature maps",
        f"The values are log amplitudes minus that at frequency 0. {DEPTH_LINES} The last plot "
        "shows the highest frequency over depth. A value near 0 means that texture is kept, a low "
        "value that only shape is kept. Park et al. report higher values for MIM models than for "
        "contrastive models, and that the last blocks of both lose high frequencies. "
        f"{COMPARABLE}",
        axes_figure(HIGHEST, each=depth_plot("frequency", "delta", "frequency (\u03c0)",
                                            "\u0394 log amplitude"))),
    "decoder": Figure(
        "MAE's encoder and decoder",
        "Solid lines are the encoder, dashed lines the decoder with all patches as input. Park et "
        "al. report that the decoder's feature maps have low frequencies and its NMI is high, so "
        "that late blocks of the encoder need not reconstruct pixels.",
        axes_figure(HIGHEST, line_plot("block", "nmi", "block", "NMI"),
                  line_plot("block", "pixels", "block", "attention distance (pixels)"))),
    "adjacent_count": Figure(
        "Similar neighboring patches",
        "The count is the number of the eight neighbors of a patch that are similar to it. By "
        "features, similar means a cosine of at least --threshold; by labels, a cosine of label "
        "vectors of at least 0.95. SelfPatch reports a mean of 4.3 by labels on COCO; counts by "
        "labels are equal for all models with the same grid. In late blocks of contrastive models "
        "neighbors should be similar.",
        axes_figure(line_plot("count", "features_fraction", "similar neighbors, by features",
                             "fraction of patches"),
                  line_plot("count", "labels_fraction", "similar neighbors, by labels",
                             "fraction of patches"),
                  line_plot("depth", "at_depth", "depth (blocks)", "mean count, by features"))),
    "intra_inter": Figure(
        "Patches of the same object and of different objects",
        "The plots show the densities of the cosine of two patches. Their overlap is 0 if the "
        "cosine separates objects and 1 if it does not separate them at all. MMC reports 0.55 for "
        "itself, 0.56 for iBOT, 0.66 for DINO, 0.76 for MAE. From few pairs the overlap is too "
        "low: raise --limit until there are 100,000 of each kind.",
        axes_figure(each=plot_pair_densities, same_scale=False)),
    "attention_maps": Figure(
        "Attention maps of two queries and of the class token",
        "Compare the maps of the two queries (framed). Park et al. report that in late blocks of "
        "contrastive models they are nearly equal and show the object, and that in MIM models each "
        "shows a spot around its query. "
        "Maps of queries are means over heads. Each map has its own color scale.",
        image_figure()),
    "pca": Figure(
        "Principal components of patch tokens",
        "The first three components over all these images are drawn as red, green and blue. "
        "Similar colors mean similar tokens. If a part has the same color in several images, the "
        "features represent the part. If all images have the same gradient, the features represent "
        "position. Percentages: variance of each component; also one with little variance is drawn "
        "at full contrast. Colors of different models are not comparable.",
        image_figure()),
    "kmeans": Figure(
        "k-means segments of patch tokens",
        "Each image is clustered separately with k = 3; the largest segment has the darkest color. "
        "Segments that follow an object show that its patches are similar.",
        image_figure()),
    "prompt_heatmap": Figure(
        "Similarity to a prompt patch",
        "The map is the cosine with the patch at the star. On data with masks, it should be high "
        "(light) inside the blue outline and low outside. The pink outline is the region above the "
        "best of ten thresholds. The IoU is that at this threshold, mean over all prompts (one for "
        "each class in each image, without objects that cover less than half of a patch, so that "
        "models with large patches have other prompts); its baselines are the IoU of the whole "
        "image and that of the prompt alone. The AUC is the "
        "probability that a point of the object has a higher cosine than a point outside; 0.5 is "
        "chance level.",
        image_figure(colorbar="cosine")),
    "patch_retrieval": Figure(
        "Nearest crops of other images",
        "Each row shows the query crop (framed), then its nearest crops. Zhu et al. (2023) report "
        "that encoded features retrieve the same part, and projected features retrieve other parts "
        "of the same kind of object.",
        image_figure(width=14, height=0.6)),
    "layer_reconstruction": Figure(
        "Reconstruction from each block",
        "The first row shows what the decoder or head of pretraining (for MAE and ASL the whole "
        "decoder) reconstructs from the tokens of each block. The second row shows the change from "
        "block to block, with one color scale for each model. MMC reports that its block 10 of 12 "
        "fills the masked patches, and blocks 11 and 12 refine them.",
        image_figure()),
    "tsne": Figure(
        "t-SNE of patch tokens",
        "The plots show the patches of 18 images of 3 classes, with a color for each class, or for "
        "each image if the data set has no classes. Park et al. show that contrastive models form "
        "clusters by image and class, and MIM models do not. The percentages are fractions of the "
        "ten nearest neighbors before t-SNE; for the same class, of the ten nearest neighbors in "
        "other images.",
        axes_figure(each=plot_tsne, same_scale=False)),
    "feature_variance": Figure(
        "Variance over crops and masked views",
        "The bars show the variance of features over views of an image, divided by their mean "
        "square. A low value means stable features. MMC reports the undivided variance, which "
        "depends on the scale of the features; it is lowest for MAE (crops) and for MMC (masked "
        "patches).",
        axes_figure(bar_plot("", "relative variance"))),
    "views": Figure(
        "Inputs of the pretext tasks",
        "The figure shows one image as patches, masked, with noise or another image in the masked "
        "part, and two crops of it. No network is involved.",
        image_figure()),
    "loss": Figure(
        "Loss and kNN accuracy of the run",
        "Dotted lines show the default run of the method on the same data set (seed 0; on toy for "
        "all methods, on CIFAR-10 for most, trained with 20,000 of the images). A run with the "
        "same settings, seed, images and number of threads on the same kind of CPU has the same "
        "curve. With another seed losses on toy differ by 0.7 (MAE) to 11% (SelfPatch) on average, "
        "and kNN accuracies by up to 23 points. Losses of different methods are not comparable; "
        "kNN accuracies are, and should rise.",
        axes_figure(line_plot("knn_step", "knn", "step", "kNN accuracy, class token (%)"),
                  each=plot_loss, same_scale=False)),
    "layerwise": Figure(
        "Linear probe of every block",
        "The curve is the accuracy of a linear probe of each block. Park et al. report that "
        "contrastive models improve up to the last block, and that MIM models are better in early "
        "blocks and have their best block before the last.",
        axes_figure(line_plot("block", "top1", "block", "top-1 (%)"))),
    "frequency_noise": Figure(
        "Accuracy under noise of one frequency band",
        "The curve is the accuracy with noise minus the accuracy without. Compare models at the "
        "same frequency. Park et al. report that MIM models lose more at high frequencies.",
        axes_figure(line_plot("frequency", "change", "frequency (\u03c0)",
                             "change of top-1 (points)"))),
    "shape_bias": Figure(
        "Shape bias",
        "A high value means that the model decides by shape rather than by texture. Park et al. "
        "report the highest values for contrastive models, then supervised, then MIM models. "
        "On toy the texture is the pattern of the coat. Random predictions have 50%. Dashed lines: "
        "means over the classes. Decided: percentage of the images whose prediction is the class "
        "of the shape or that of the texture. Where it is low, the bias rests on few images.",
        axes_figure(plot_shape_bias)),
    "reinit": Figure(
        "Fine-tuning with re-initialized blocks",
        "The curves show the accuracy minus that without re-initialized blocks. Park et al. report "
        "that MIM models lose more when early blocks are re-initialized, and contrastive models "
        "when late blocks are.",
        axes_figure(line_plot("first_count", "first_change", "re-initialized first blocks",
                             "change of top-1 (points)"),
                  line_plot("last_count", "last_change", "re-initialized last blocks",
                             "change of top-1 (points)"))),
    "linear_finetune": Figure(
        "Linear probe and fine-tuning",
        "Each point is a model. Park et al. report that contrastive models are ahead by a linear "
        "probe, MIM models after fine-tuning, and models with both losses in both.",
        axes_figure(line_plot("linear", "finetuned", "linear probe, top-1 (%)",
                             "fine-tuned, top-1 (%)"))),
    "local_attention": Figure(
        "Attention within windows",
        "The last point of a curve is attention to all patches. Park et al. report for MoCo v3 "
        "that smaller windows lower the accuracy of the linear probe and raise that of "
        "fine-tuning; they do not state whether windows were also used in pretraining, here they "
        "were not.",
        axes_figure(line_plot("linear_window", "linear", "window (patches)",
                             "linear probe, top-1 (%)"),
                  line_plot("finetune_window", "finetune", "window (patches)",
                             "fine-tuned, top-1 (%)"))),
    "knn": Figure(
        "kNN accuracy of class token and mean patch token",
        "MMC reports that its mean patch token classifies as well as its class token, and that "
        "this does not hold for other models.",
        axes_figure(bar_plot("feature", "top-1 (%)"))),
    "accuracy_similarity": Figure(
        "Accuracy and similarity of tokens",
        "Each point is a model. In ASL, fig. 1, models with both objectives have a higher accuracy "
        "and more similar tokens.",
        axes_figure(line_plot("linear", "similarity", "linear probe, top-1 (%)",
                             "cosine of two tokens"))),
}


# ---- files ---------------------------------------------------------------------------------------


def count_images(results):
    """Text with the number of images that the numbers are a mean of, if it is the same for all.
    Empty if evaluate.py recorded some of the numbers, from other images."""
    counts = {r.numbers.get("images") for r in results if "settings_compared" not in r.numbers}
    return f", {counts.pop():,} images" if len(counts) == 1 and None not in counts else ""


def describe_differences(results):
    """Text: the settings of evaluate.py in which the recorded results of the models differ; empty
    if there are none."""
    used = {r.model.name: r.numbers["settings_compared"] for r in results
            if "settings_compared" in r.numbers}
    differences = [f"--{key.replace('_', '-')} " + ", ".join(
                       f"{settings.get(key)} ({name})" for name, settings in used.items())
                   for key in dict.fromkeys(key for settings in used.values() for key in settings)
                   if len({str(settings.get(key)) for settings in used.values()}) > 1]
    return f"measured with different settings: {', '.join(differences)}" if differences else ""


def save_figure(plt, path, name, results):
    figure = FIGURES[name]
    fig = figure.draw(plt, results)
    title = figure.title + count_images(results)
    fig.suptitle(textwrap.fill(title, int(10 * fig.get_size_inches()[0])), fontsize=12, x=0.01,
                 ha="left")
    width, difference = int(13 * fig.get_size_inches()[0]), describe_differences(results)
    below = textwrap.wrap(f"note: {difference}", width) * bool(difference) + textwrap.wrap(
        figure.reading, width)
    fig.supxlabel("\n".join(below), fontsize=8, color="0.3")
    fig.savefig(path, dpi=130)
    plt.close(fig)


PAGE = """<!doctype html><meta charset="utf-8"><title>Diagnostics</title>
<style>body {{ font: 16px/1.45 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} h2 {{ margin-top: 2.5em }} p.r {{ color: #444 }}</style>
<h1>Diagnostics</h1><p>{head}</p>
<p>MIM: masked image modeling (MAE, SimMIM). Park et al.: "What Do Self-Supervised Vision
Transformers Learn?" (2023).</p>{body}"""


def write_page(path, head, results, notes, with_images):
    """Writes index.html: all diagnostics, one below the other. results: {name: [Result]};
    with_images: the PNG files exist."""
    links = " &middot; ".join(f'<a href="#{name}">{FIGURES[name].title}</a>' for name in results)
    body = [f"<p>{links}</p>"]
    for name in results:
        title = html.escape(FIGURES[name].title + count_images(results[name]))
        reading = html.escape(FIGURES[name].reading)
        image = f'<img src="{name}.png" alt="{title}">' if with_images else ""
        body.append(f'<h2 id="{name}">{title}</h2>{image}<p class="r">{reading} Numbers: '
                    f'<a href="{name}.json">JSON</a>, <a href="{name}.csv">CSV</a></p>')
    body += [f"<p>note: {html.escape(note)}</p>" for note in notes]
    path.write_text(PAGE.format(head=html.escape(head), body="\n".join(body)), "utf-8",
                    "backslashreplace")
