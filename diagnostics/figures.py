"""The figure of each diagnostic: its title, how to read it, how it is drawn; and index.html.

    numbers of each model -> FIGURES[name].draw -> NAME.png, all of them in index.html
"""
import html
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from diagnostics.plots import (
    draw_axes,
    draw_images,
    plot_bars,
    plot_depths,
    plot_head_density,
    plot_lines,
    plot_loss,
    plot_pair_densities,
    plot_token_plane,
    plot_tsne,
)


@dataclass
class Figure:
    title: str
    reading: str                 # what is shown and what to expect; printed below the figure
    draw: Callable               # (matplotlib.pyplot, results) -> figure


HIGHEST = plot_lines("depth", "highest", "depth (blocks)",
                     "\u0394 log amplitude at {highest_at:.2f} \u03c0")
SPECTRUM = (
    plot_lines("depth", "at_first", "depth (blocks)", "\u0394 log singular value {ranks[0]}"),
    plot_lines("depth", "at_second", "depth (blocks)", "\u0394 log singular value {ranks[1]}"))
RANKS = plot_depths("rank", "delta", "rank", "\u0394 log singular value")
COMPARABLE = "Only models with the same grid and width are comparable."

FIGURES = {
    "attention_distance": Figure(
        "Attention distance",
        "Mean distance between a query and its keys, weighted by attention. Low: attention is "
        "local. Dotted line: uniform attention. Park et al.: contrastive models have higher values "
        "than MIM models, most of all in late blocks.",
        draw_axes(plot_lines("block", "pixels", "block", "distance (pixels of the input)",
                             level="uniform"))),
    "nmi": Figure(
        "Normalized mutual information (NMI) of query and key",
        "0: all queries have the same attention map. Park et al.: contrastive models fall to 0 in "
        "late blocks, MIM models do not. Second plot: standard deviation over heads. Third: "
        "density over the heads of block 3 (of the last block in a shallower model), with a mark "
        "for each head. Fourth: fraction of attention that goes to the class token, in models that "
        "have one; where it is near 1, the NMI is too low.",
        draw_axes(plot_lines("block", "nmi", "block", "NMI"),
                  plot_lines("block", "std_over_heads", "block", "standard deviation over heads"),
                  plot_head_density,
                  plot_lines("block", "class_token_attention", "block",
                             "attention to the class token"))),
    "head_similarity": Figure(
        "Similarity of heads",
        "Cosine of the outputs of two heads for the same token. High: heads are redundant. Park et "
        "al.: contrastive models have higher values than MIM models in late blocks.",
        draw_axes(plot_lines("block", "similarity", "block", "cosine of two heads"))),
    "depth_similarity": Figure(
        "Similarity before and after attention",
        "Cosine of a token before and after the attention layer. High: attention changes it "
        "little. Park et al.: contrastive models have higher values than MIM models in late "
        "blocks.",
        draw_axes(plot_lines("block", "similarity", "block", "cosine, before and after"))),
    "token_similarity": Figure(
        "Similarity of tokens of one image",
        "Mean cosine of two patch tokens of an image. Park et al.: in contrastive models it rises "
        "in late blocks, above that of MIM models. Dashed (with --center): without the mean token "
        "of all images.",
        draw_axes(plot_lines("block", "after_attention", "block, after attention",
                             "cosine of two tokens"),
                  plot_lines("depth", "after_block", "depth (blocks; 0: embedding)",
                             "cosine of two tokens"))),
    "token_transform": Figure(
        "How attention changes tokens",
        "Curves: the part of the change that is common to all tokens of an image. Park et al.: "
        "contrastive models change all tokens alike (near 1), MIM models change each token "
        "differently. Scatter plots: tokens of two images (circles, triangles) before and after "
        "the attention of the last block, with their centers (+ before, x after). Park et al. show "
        "the last block of MoCo v3 and the first of SimMIM.",
        draw_axes(plot_lines("block", "common", "block", "common fraction of the change"),
                  each=plot_token_plane, same_scale=False)),
    "sv_tokens": Figure(
        "Spectrum of tokens within images",
        "Log singular values of the covariance of an image's tokens, minus the second one. Rising "
        "with depth: tokens span a larger volume (Park et al.: MIM models, except in the last "
        f"blocks). Flat or falling: contrastive models. {COMPARABLE}",
        draw_axes(*SPECTRUM, each=RANKS)),
    "sv_images": Figure(
        "Spectrum over images",
        "As above, for the mean patch tokens of many images. Rising with depth: images are "
        f"separated further, strongly in contrastive models, little in MIM models. {COMPARABLE}",
        draw_axes(*SPECTRUM, each=RANKS)),
    "fourier": Figure(
        "High frequencies in feature maps",
        "Log amplitude at the highest frequency minus that at 0. Near 0: texture is kept. Low: "
        "only shape is kept. Park et al.: MIM models have higher values than contrastive models; "
        f"the last blocks of both lose high frequencies. {COMPARABLE}",
        draw_axes(HIGHEST, each=plot_depths("frequency", "delta", "frequency (\u03c0)",
                                            "\u0394 log amplitude"))),
    "decoder": Figure(
        "MAE's encoder and decoder",
        "Dashed: decoder, with all patches as input. Park et al.: its feature maps have low "
        "frequencies and its NMI is high, so late blocks of the encoder need not reconstruct "
        "pixels.",
        draw_axes(HIGHEST, plot_lines("block", "nmi", "block", "NMI"),
                  plot_lines("block", "pixels", "block", "attention distance (pixels)"))),
    "adjacent_count": Figure(
        "Similar neighboring patches",
        "How many of the eight neighbors of a patch are similar to it: a cosine of features of at "
        "least --threshold, or of label vectors of at least 0.95. SelfPatch reports 4.3 for labels "
        "on COCO; label counts are equal for all models with the same grid. In late blocks of "
        "contrastive models neighbors should be similar.",
        draw_axes(plot_lines("count", "features_fraction", "similar neighbors, by features",
                             "fraction of patches"),
                  plot_lines("count", "labels_fraction", "similar neighbors, by labels",
                             "fraction of patches"),
                  plot_lines("depth", "at_depth", "depth (blocks)", "mean count, by features"))),
    "intra_inter": Figure(
        "Patches of the same object and of different objects",
        "Overlap of the two densities: 0 if the cosine separates objects, 1 if not at all. MMC "
        "reports 0.55 for itself, 0.56 for iBOT, 0.66 for DINO, 0.76 for MAE.",
        draw_axes(each=plot_pair_densities, same_scale=False)),
    "attention_maps": Figure(
        "Attention maps of two queries and of the class token",
        "Compare the maps of the two queries (framed). Contrastive models, late blocks: nearly "
        "equal, and they show the object. MIM models: a spot around the query. Maps of queries are "
        "means over heads; each map has its own color scale.",
        draw_images()),
    "pca": Figure(
        "Principal components of patch tokens",
        "The first three components over all these images as red, green and blue: similar colors "
        "mean similar tokens. If a part has the same color in several images, the features "
        "represent the part. If all images have the same gradient, they represent position.",
        draw_images()),
    "kmeans": Figure(
        "k-means segments of patch tokens",
        "k = 3 for each image separately, the largest segment in the darkest color. Segments that "
        "follow an object show that its patches are similar.",
        draw_images()),
    "prompt_heatmap": Figure(
        "Similarity to a prompt patch",
        "Cosine with the patch at the star. Good: high (light) inside the blue outline, low "
        "outside. Pink: above the best of ten thresholds. IoU: at that threshold, mean over all "
        "prompts (one for each class in each image). Baseline: the IoU of the whole image. AUC: "
        "probability that a point of the object has a higher cosine than a point outside; 0.5 is "
        "chance level.",
        draw_images(colorbar="cosine")),
    "patch_retrieval": Figure(
        "Nearest crops of other images",
        "Framed: the query crop; then its nearest crops. The part-aware study: encoded features "
        "retrieve the same part, projected features other parts of the same kind of object.",
        draw_images(width=14, height=0.6)),
    "layer_reconstruction": Figure(
        "Reconstruction from each block",
        "Tokens of a block passed directly to the reconstruction head; below, the change from "
        "block to block, with one color scale for each model. MMC: its block 10 of 12 fills the "
        "masked patches, 11 and 12 refine.",
        draw_images()),
    "tsne": Figure(
        "t-SNE of patch tokens",
        "18 images of 3 classes; a color for each class, or for each image if there are no "
        "classes. Contrastive models: clusters by image and class; MIM models: mixed. Percentages "
        "are of the ten nearest neighbors before t-SNE; same class: of those in other images.",
        draw_axes(each=plot_tsne, same_scale=False)),
    "feature_variance": Figure(
        "Variance over crops and masked views",
        "Variance of features over views of an image, divided by their mean square. Low: stable. "
        "MMC reports the undivided variance, lowest for MAE (crops) and for MMC (masked patches); "
        "that value depends on the scale of the features.",
        draw_axes(plot_bars("", "relative variance"))),
    "views": Figure(
        "Inputs of the pretext tasks",
        "One image as patches, masked, with noise or another image in the masked part, and two "
        "crops. No network is involved.",
        draw_images()),
    "loss": Figure(
        "Loss and kNN accuracy of the run",
        "Dotted: the default run of the method on toy (seed 0), if this run is on toy. A run with "
        "its settings and seed has the same curve. With another seed on toy, ASL and MMC differ by "
        "0.6 to 1 % on average, by up to 6 % at the first line, and in kNN by up to 17 points. "
        "Losses of different methods are not comparable; kNN accuracies are, and should rise.",
        draw_axes(plot_lines("knn_step", "knn", "step", "kNN accuracy, class token (%)"),
                  each=plot_loss, same_scale=False)),
    "layerwise": Figure(
        "Linear probe of every block",
        "Park et al.: contrastive models improve up to the last block; MIM models are better in "
        "early blocks, and their best block is before the last.",
        draw_axes(plot_lines("block", "top1", "block", "top-1 (%)"))),
    "frequency_noise": Figure(
        "Accuracy under noise of one frequency band",
        "Compare models at the same frequency. Park et al.: at high frequencies MIM models lose "
        "more.",
        draw_axes(plot_lines("frequency", "change", "frequency (\u03c0)",
                             "change of top-1 (points)"))),
    "shape_bias": Figure(
        "Shape bias",
        "High: decides by shape rather than texture. Park et al.: contrastive above supervised "
        "above MIM models.",
        draw_axes(plot_bars("shape", "decisions for the shape (%)"))),
    "reinit": Figure(
        "Fine-tuning with re-initialized blocks",
        "Park et al.: MIM models lose more when early blocks are re-initialized, contrastive "
        "models when late blocks are.",
        draw_axes(plot_lines("first_count", "first_change", "re-initialized first blocks",
                             "change of top-1 (points)"),
                  plot_lines("last_count", "last_change", "re-initialized last blocks",
                             "change of top-1 (points)"))),
    "knn": Figure(
        "kNN accuracy of class token and mean patch token",
        "MMC reports that its mean patch token classifies as well as its class token, unlike that "
        "of other models.",
        draw_axes(plot_bars("feature", "top-1 (%)"))),
    "accuracy_similarity": Figure(
        "Accuracy and similarity of tokens",
        "ASL, fig. 1: models with both objectives have a higher accuracy and more similar tokens.",
        draw_axes(plot_lines("linear", "similarity", "linear probe, top-1 (%)",
                             "cosine of two tokens"))),
}


# ---- files ---------------------------------------------------------------------------------------


def save_figure(plt, path, name, results):
    figure = FIGURES[name]
    fig = figure.draw(plt, results)
    fig.suptitle(figure.title, fontsize=12, x=0.01, ha="left")
    reading = textwrap.wrap(figure.reading, int(13 * fig.get_size_inches()[0]))
    fig.supxlabel("\n".join(reading), fontsize=8, color="0.3")
    fig.savefig(path, dpi=130)
    plt.close(fig)


PAGE = """<!doctype html><meta charset="utf-8"><title>Diagnostics</title>
<style>body {{ font: 16px/1.45 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} h2 {{ margin-top: 2.5em }} p.r {{ color: #444 }}</style>
<h1>Diagnostics</h1><p>{head}</p>
<p>MIM: masked image modeling (MAE, SimMIM). Park et al.: "What Do Self-Supervised Vision
Transformers Learn?" (2023).</p>{body}"""


def write_page(path, head, names, notes, with_images):
    """index.html: all diagnostics, one below the other; with_images: the PNG files exist."""
    links = " &middot; ".join(f'<a href="#{name}">{FIGURES[name].title}</a>' for name in names)
    body = [f"<p>{links}</p>"]
    for name in names:
        title, reading = html.escape(FIGURES[name].title), html.escape(FIGURES[name].reading)
        image = f'<img src="{name}.png" alt="{title}">' if with_images else ""
        body.append(f'<h2 id="{name}">{title}</h2>{image}<p class="r">{reading} Numbers: '
                    f'<a href="{name}.json">JSON</a>, <a href="{name}.csv">CSV</a></p>')
    body += [f"<p>note: {html.escape(note)}</p>" for note in notes]
    path.write_text(PAGE.format(head=html.escape(head), body="\n".join(body)), "utf-8")
