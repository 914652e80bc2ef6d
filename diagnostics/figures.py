"""Figures: how the diagnostics of analysis.py are drawn, and how each is to be read.

    numbers of each model -> FIGURES[name].draw -> NAME.png, one below the other in index.html
                             title above, what to expect below

A result is what one diagnostic found in one model: `model`, its `numbers`, for pictures the rows of
tiles to `show`; and the colour and the marker of that model, the same in every figure. Colours are
those of Okabe and Ito, which the colour-blind tell apart, as they do the shades of cividis.
matplotlib is handed in: the rest works without it.
"""
import html
import math
import textwrap
from dataclasses import dataclass
from types import SimpleNamespace

import torch

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
MARKERS = "osD^vP*X"             # one more than colours: together they tell 56 models apart
QUERY = COLOURS[1], COLOURS[0]   # of the first and the second query, in the image and in its maps
PINK = COLOURS[3]


@dataclass
class Figure:
    title: str
    reading: str                 # what to expect, under the figure; "the paper" is Park et al.
    draw: callable               # (matplotlib.pyplot, results) -> figure


# ---- curves: an axes is drawn by a function of (axes, results) -----------------------------------


def style(number):
    """Of the model with this number."""
    return dict(colour=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
                hatch="/" * (number // len(COLOURS)))


def curve(x, y, across, up, level=None):
    """A line for each model: its numbers y over x; dashed, those of its decoder or with the mean
    token taken off; dotted, a curve or a level that they are compared with."""
    def draw(ax, results):
        for r in (r for r in results if y in r.numbers):
            look = dict(color=r.colour, markersize=4,
                        marker=r.marker if len(r.numbers[x]) <= 40 else None)
            ax.plot(r.numbers[x], r.numbers[y], label=r.model.name, **look)
            for other in ("decoder", "centred"):
                if f"{other}_{y}" in r.numbers:
                    ax.plot(r.numbers.get(f"{other}_{x}", r.numbers[x]), r.numbers[f"{other}_{y}"],
                            linestyle="--", label=f"{r.model.name}, {other}", **look)
            if f"reference_{y}" in r.numbers:
                ax.plot(r.numbers[f"reference_{x}"], r.numbers[f"reference_{y}"], ":", linewidth=2,
                        color="black" if len(results) == 1 else r.colour,
                        label="default run" if len(results) == 1 else None)
        for value in sorted({round(r.numbers[level], 1) for r in results if level}):
            ax.axhline(value, color="0.5", linestyle=":", label=f"{level}, {value} px")
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])            # room for the topmost mark
        if x in ("block", "depth") or x.endswith("count"):
            ax.xaxis.get_major_locator().set_params(integer=True)
        ups = dict.fromkeys(up.format(**r.numbers) for r in results)        # ranks go by the width
        ax.set(xlabel=across, ylabel=" /\n".join(ups))
    return draw


def depths(x, y, across, up):
    """Of one model, a line for each depth."""
    def draw(ax, results):
        from matplotlib import colormaps
        [r] = results
        last = max(len(r.numbers[y]) - 1, 1)
        for depth, line in enumerate(r.numbers[y]):
            ax.plot(r.numbers[x], line, color=colormaps["cividis"](depth / last), linewidth=1.2)
        ax.set(xlabel=across, ylabel=up, title=f"depth 0 (dark) to {last} (light)")
    return draw


def bars(across, up):
    """Grouped bars, one in each group for each model."""
    def draw(ax, results):
        names, width = list(dict.fromkeys(n for r in results for n in r.numbers["bars"])), 0.8
        for i, r in enumerate(results):
            ax.bar([j + (i + 0.5) * width / len(results) - width / 2 for j in range(len(names))],
                   [r.numbers["bars"].get(name, math.nan) for name in names],
                   0.9 * width / len(results), color=r.colour, hatch=r.hatch, label=r.model.name)
        names = ["\n".join(textwrap.wrap(name, 18)) for name in names]
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if len(names) > 4 else 0)
        ax.set(xlabel=across, ylabel=up)
    return draw


def losses(ax, results):
    """Of one run, over the default run's, and how far it is from that."""
    curve("step", "loss", "step", "loss")(ax, results)
    if "relative_distance" in results[0].numbers:
        ax.set_title("{relative_distance:.1%} from the default run".format(**results[0].numbers))


def heads(ax, results):
    """Density of the heads of one block, and on the axis a mark for each."""
    curve("density_at", "density", "normalised MI of a head", "density")(ax, results)
    for r in results:
        ax.plot(r.numbers["density_of"], [0] * r.numbers["heads"], r.marker, color=r.colour,
                markersize=5, alpha=0.7, clip_on=False)
    ax.set_ylim(0)


def plane(ax, results):
    """Tokens of two images before and after a layer, and their centres."""
    for side, colour, cross in zip(results[0].numbers["plane"], COLOURS, "+x"):
        for points, marker in zip(side[..., :2], "o^"):
            ax.scatter(*points.T, s=6, color=colour, marker=marker, alpha=0.45, linewidths=0)
            ax.scatter(*points.mean(0), s=70, color="black", marker=cross)
    ax.set(xlabel="component 1", ylabel="component 2", title="blue before, orange after")
    ax.axis("equal")


def islands(ax, results):
    """Tokens where t-SNE puts them, a colour for each class, or image if there are no classes."""
    from matplotlib import colormaps
    numbers = results[0].numbers
    labels = numbers["label"].unique()
    for i, label in enumerate(labels):
        colour = COLOURS[i] if len(labels) <= len(COLOURS) else colormaps["turbo"](i / len(labels))
        ax.scatter(*numbers["position"][numbers["label"] == label].T, s=3, color=colour,
                   linewidths=0)
    title = "neighbours of same image {purity_image:.0%}"
    title += ", class {purity_class:.0%}" if "purity_class" in numbers else ""
    ax.set(xticks=[], yticks=[], title=title.format(**numbers))


def densities(ax, results):
    """Cosines of pairs of patches, within and across objects."""
    numbers = results[0].numbers
    for line, name, colour in zip(numbers["densities"], ("same object", "different"), COLOURS):
        ax.fill_between(numbers["cosine"], line, color=colour, alpha=0.45, label=name, linewidth=0)
    ax.set(xlabel="cosine of two patches", ylabel="density",
           title="O {overlap:.2f}, intra {intra:.2f}, inter {inter:.2f}".format(**numbers))


def panels(*shared, each=None, alike=True):
    """A figure of axes: one for each model, drawn by `each`, to one scale if `alike`; then those
    that all models share."""
    def draw(plt, results):
        parts = [(each, [r]) for r in results if each] + [(part, results) for part in shared]
        wide, down = min(4, len(parts)), -(-len(parts) // 4)
        fig, axes = plt.subplots(down, wide, squeeze=False, layout="constrained",
                                 figsize=(3.5 * wide + 1.6, 3.4 * down + 0.5))
        for ax, (part, chosen) in zip(axes.flat, parts):
            if part is each and alike:
                ax.sharey(axes[0, 0])
            part(ax, chosen)
            ax.grid(alpha=0.25)
            if part is each:
                title = f"{chosen[0].model.name}\n{ax.get_title()}"
                ax.set_title(title, fontsize=9, color=chosen[0].colour)
        for ax in axes.flat[len(parts):]:
            ax.set_axis_off()
        found = {label: line for ax in axes.flat
                 for line, label in zip(*ax.get_legend_handles_labels())}
        if found:
            fig.legend(found.values(), found, loc="outside right upper", fontsize=8, frameon=False)
        return fig
    return draw


# ---- pictures: rows of tiles ---------------------------------------------------------------------


def row(label, tiles, once=False):
    """A row of a picture grid; once: the same for all models, so drawn for the first alone."""
    return SimpleNamespace(label=label, tiles=tiles, once=once)


def tile(image, title="", **marks):
    """image: (S, S, 3) array, (g, g) numbers drawn as colours with limits=(low, high), or None for
    a gap. marks: star (x, y), boxes [(x, y, side, colour)], outlines [((S, S) bool, colour)]."""
    image = image.cpu().numpy() if torch.is_tensor(image) else image
    return SimpleNamespace(**{"image": image, "title": title, "star": None, "boxes": (),
                              "outlines": (), "limits": (None, None)} | marks)


def pictures(width=1.4, height=1.4, scale=None):
    """A figure of the rows of tiles each model shows. scale: what the colours of the last mean."""
    def draw(plt, results):
        rows = [(r, one) for i, r in enumerate(results) for one in r.show if not (i and one.once)]
        wide = max(len(one.tiles) for _, one in rows)
        fig, axes = plt.subplots(len(rows), wide, squeeze=False, layout="constrained",
                                 figsize=(width * wide + 1.6, height * len(rows) + 0.9))
        for line, (r, one) in zip(axes, rows):
            for ax in line:
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            name = one.label if one.once else f"{r.model.name} {one.label}"
            line[0].set_ylabel("\n".join(textwrap.wrap(name, 14)), fontsize=8, rotation=0,
                               ha="right", va="center", color="black" if one.once else r.colour)
            for ax, t in zip(line, one.tiles):
                if t.image is None:
                    continue
                low, high = t.limits
                drawn = ax.imshow(t.image, cmap="cividis", vmin=low, vmax=high)
                ax.set_title(t.title, fontsize=8)
                for x, y, length, colour in t.boxes:
                    for edge, thick in (("white", 2.2), (colour, 1.2)):
                        ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), length, length, fill=False,
                                                   edgecolor=edge, linewidth=thick))
                for mask, colour in t.outlines:
                    if mask.any() and not mask.all():
                        ax.contour(mask, [0.5], colors=colour, linewidths=1.2)
                if t.star:
                    ax.plot(t.star[0] - 0.5, t.star[1] - 0.5, "*", color=COLOURS[1], markersize=8)
        if scale:
            fig.colorbar(drawn, ax=axes, shrink=0.6, label=scale)
        return fig
    return draw


# ---- all of them ---------------------------------------------------------------------------------


HIGHEST = curve("depth", "highest", "depth (blocks)",
                "\u0394 log amplitude, at {highest_at:.2f} \u03c0")
SPECTRUM = (curve("depth", "at_first", "depth (blocks)", "\u0394 log singular value {ranks[0]}"),
            curve("depth", "at_second", "depth (blocks)", "\u0394 log singular value {ranks[1]}"))
RANKS = depths("rank", "delta", "rank", "\u0394 log singular value")
FIGURES = {
    "attention_distance": Figure(
        "Attention distance",
        "Mean distance from a query to where it looks. Low: local; on the dotted line: everywhere "
        "alike. The paper finds contrastive models above masked ones, most of all late.",
        panels(curve("block", "pixels", "block", "distance (px of the input)", level="uniform"))),
    "nmi": Figure(
        "Mutual information of query and key",
        "Low: all queries look at the same place. The paper: contrastive models fall to 0 late, "
        "masked ones stay above. Second: do heads differ? Third: heads of block 3, or the last, "
        "each a mark. Last: attention that goes to the class token, of models that have one; where "
        "it is near 1, NMI is too low.",
        panels(curve("block", "nmi", "block", "normalised MI"),
               curve("block", "spread", "block", "standard deviation over heads"), heads,
               curve("block", "class_mass", "block", "attention to the class token"))),
    "head_similarity": Figure(
        "Similarity of heads",
        "High: heads say the same. The paper: contrastive above masked, late.",
        panels(curve("block", "similarity", "block", "cosine of two heads"))),
    "depth_similarity": Figure(
        "Similarity before and after attention",
        "High: attention changes little. The paper: contrastive above masked, late.",
        panels(curve("block", "similarity", "block", "cosine before, after"))),
    "token_similarity": Figure(
        "Similarity of tokens of one image",
        "High: tokens are alike. The paper: contrastive models rise late, above masked ones.",
        panels(curve("block", "after_attention", "block, after attention", "cosine of two tokens"),
               curve("depth", "after_block", "depth (blocks; 0: embedding)",
                     "cosine of two tokens"))),
    "token_transform": Figure(
        "How attention moves tokens",
        "1: tokens of an image move together, as the paper shows for contrastive models; masked "
        "ones move each their own way. Dots: the last block of every model (the paper: MoCo's "
        "last, SimMIM's first), two images (circles, triangles); crosses: their centres (+ before, "
        "x after).",
        panels(curve("block", "common", "block", "share of movement in common"), each=plane,
               alike=False)),
    "sv_tokens": Figure(
        "Spectrum of tokens within images",
        "Covariance of tokens, against its second singular value. Rising with depth: tokens fill "
        "more volume (masked, until the last blocks); flat or falling: contrastive. Only models of "
        "one grid and width compare.",
        panels(*SPECTRUM, each=RANKS)),
    "sv_images": Figure(
        "Spectrum over images",
        "The same for the mean tokens of many images. Rising with depth: images spread apart, "
        "strongly in contrastive models, hardly in masked ones. Only models of one grid and width "
        "compare.",
        panels(*SPECTRUM, each=RANKS)),
    "fourier": Figure(
        "High frequencies in feature maps",
        "Near 0: texture is kept; low: shape. The paper finds masked models above contrastive "
        "ones; the last blocks of both lose high frequencies. Only models of one grid and width "
        "compare.",
        panels(HIGHEST,
               each=depths("frequency", "delta", "frequency (\u03c0)", "\u0394 log amplitude"))),
    "decoder": Figure(
        "What MAE's decoder takes over",
        "Dashed: decoder, given all patches. The paper: its maps have low frequencies and its NMI "
        "is high, so that late blocks of the encoder need not paint.",
        panels(HIGHEST, curve("block", "nmi", "block", "normalised MI"),
               curve("block", "pixels", "block", "attention distance (px)"))),
    "adjacent_count": Figure(
        "Neighbours that are alike",
        "How many of a patch's eight neighbours have a cosine of at least 0.95, by features of "
        "--threshold. By labels SelfPatch reports 4.3 on COCO; they are the same for all models "
        "of one grid. Late contrastive tokens should be alike.",
        panels(curve("count", "features_share", "alike, by features", "share of patches"),
               curve("count", "labels_share", "alike, by labels", "share of patches"),
               curve("depth", "at_depth", "depth (blocks)", "mean count, by features"))),
    "intra_inter": Figure(
        "Patches of one object and of different ones",
        "O: overlap of the densities; 0: objects can be told apart, 1: not at all. MMC reports .55 "
        "for itself, .56 iBOT, .66 DINO, .76 MAE.",
        panels(each=densities, alike=False)),
    "attention_maps": Figure(
        "Attention of two queries, and of the class token",
        "Do the maps of the two queries (framed) differ? Contrastive, late: hardly, and they show "
        "the object. Masked: a spot around the query. Mean of heads; each map to its own scale.",
        pictures()),
    "pca": Figure(
        "Principal components of patch tokens",
        "The first three of all these images as red, green, blue: like colours, like tokens. One "
        "colour for a part in several images: the model knows the part. The same gradient across "
        "all of them: it knows the place.",
        pictures()),
    "kmeans": Figure(
        "k-means segments of patch tokens",
        "k = 3, each image for itself, largest segment dark. Segments that follow the object show "
        "that its patches are alike.",
        pictures()),
    "prompt_heatmap": Figure(
        "Which patches are like the prompt?",
        "Cosine with the patch at the star. Good: light inside the blue outline, dark outside. "
        "Pink: above the best of ten thresholds. IoU: at that threshold, mean over all prompts "
        "(each class in each image); the whole picture taken is the floor. Order: how often a "
        "point inside is lighter than one outside; chance is 0.5.",
        pictures(scale="cosine")),
    "patch_retrieval": Figure(
        "Which crops are like the query?",
        "Framed: the query; then the nearest crops of other images. The part-aware study: encoded, "
        "the same part; projected, other parts of the same kind of object.",
        pictures(width=14, height=0.6)),
    "layer_reconstruction": Figure(
        "Which block paints?",
        "Tokens of a block sent straight to the painting head; below, what each block changes, to "
        "one scale for a model. MMC: its block 10 of 12 fills the hidden patches, 11 and 12 "
        "refine.",
        pictures()),
    "tsne": Figure(
        "t-SNE of patch tokens",
        "18 images of 3 classes (colours; of images, where there are no classes). Contrastive: "
        "islands by image and class; masked: mixed. Neighbours: the ten nearest before t-SNE; of "
        "the same class: in other images.",
        panels(each=islands, alike=False)),
    "feature_variance": Figure(
        "Variance under crops and hidden patches",
        "Over the features' mean square. Low: stable. MMC reports raw variance, lowest for MAE "
        "(crops) and itself (hidden patches); raw values go with the scale of the features.",
        panels(bars("", "relative variance"))),
    "views": Figure(
        "What pretext tasks see",
        "One image as patches, masked, with noise or another image in the hidden part, and two "
        "crops. No network takes part.",
        pictures()),
    "loss": Figure(
        "Is my loss normal?",
        "Dotted: the default run of the method on toy (seed 0), if this run is on toy, too. With "
        "its settings and its seed a line lies on the dots. Another seed on toy: ASL and MMC 0.6 "
        "to 1 % apart on average, up to 6 % at the first line, kNN up to 17 points. Losses of "
        "different methods do not compare; kNN does, and rises.",
        panels(curve("knn_step", "knn", "step", "kNN, class token (%)"),
               each=losses, alike=False)),
    "layerwise": Figure(
        "Linear probe of every block",
        "The paper: contrastive models rise to the end, masked ones are ahead early and have their "
        "best block before the end.",
        panels(curve("block", "top1", "block", "top-1 (%)"))),
    "frequency_noise": Figure(
        "Accuracy under noise of one frequency",
        "Compare models at the same frequency. The paper: at high ones masked models lose more.",
        panels(curve("frequency", "change", "frequency (\u03c0)", "change of top-1 (points)"))),
    "shape_bias": Figure(
        "Shape or texture?",
        "High: decides by shape. The paper: contrastive above supervised above masked.",
        panels(bars("shape", "decisions for the shape (%)"))),
    "reinit": Figure(
        "Fine-tuning with blocks drawn anew",
        "The paper: masked models suffer more from new early blocks, contrastive ones from new "
        "late blocks.",
        panels(curve("first_count", "first_change", "first blocks anew", "change (points)"),
               curve("last_count", "last_change", "last blocks anew", "change (points)"))),
    "knn": Figure(
        "kNN by class token, by patch mean",
        "MMC: its patches classify as well as its class token, other models' do not.",
        panels(bars("feature", "top-1 (%)"))),
    "accuracy_similarity": Figure(
        "Accuracy and similarity of tokens",
        "ASL, fig. 1: models with both objectives have the higher accuracy and the more similar "
        "tokens.",
        panels(curve("linear", "similarity", "linear probe, top-1 (%)", "cosine of two tokens"))),
}


# ---- files ---------------------------------------------------------------------------------------


def save(plt, path, name, results):
    fig, wanted = FIGURES[name].draw(plt, results), FIGURES[name]
    fig.suptitle(wanted.title, fontsize=12, x=0.01, ha="left")
    reading = textwrap.wrap(wanted.reading, int(13 * fig.get_size_inches()[0]))
    fig.supxlabel("\n".join(reading), fontsize=8, color="0.3")
    fig.savefig(path, dpi=130)
    plt.close(fig)


PAGE = """<!doctype html><meta charset="utf-8"><title>What did it learn?</title>
<style>body {{ font: 16px/1.45 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} h2 {{ margin-top: 2.5em }} p.r {{ color: #444 }}</style>
<h1>Diagnostics</h1><p>{head}</p>{body}"""


def page(path, head, names, notes, drawn):
    """index.html: every diagnostic, one below the other; drawn: there are PNGs to show."""
    links = " &middot; ".join(f'<a href="#{name}">{FIGURES[name].title}</a>' for name in names)
    body = [f"<p>{links}</p>"]
    for name in names:
        title, reading = html.escape(FIGURES[name].title), html.escape(FIGURES[name].reading)
        image = f'<img src="{name}.png" alt="{title}">' if drawn else ""
        body.append(f'<h2 id="{name}">{title}</h2>{image}<p class="r">{reading} Numbers: '
                    f'<a href="{name}.json">JSON</a>, <a href="{name}.csv">CSV</a></p>')
    body += [f"<p>note: {html.escape(note)}</p>" for note in notes]
    path.write_text(PAGE.format(head=html.escape(head), body="\n".join(body)), "utf-8")
