"""How results are drawn: line plots, bars, scatter plots, grids of images.

The colors of Okabe and Ito and the color map cividis suit color-blind readers. matplotlib.pyplot is
an argument, so everything else works without matplotlib.

plot_... functions draw into an axes. line_plot, depth_plot, bar_plot, axes_figure and image_figure
return a function that draws.
"""
import math
import textwrap
from dataclasses import dataclass

import torch

from probes.common import Model

COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
MARKERS = "osD^vP*X"                        # one more than colors: 56 different pairs
QUERY_COLORS = COLORS[1], COLORS[0]         # of the first and the second query
PINK = COLORS[3]
STATE_COLORS = "0.5", "#882255", "#999933"     # of states and classes: no model has them


@dataclass
class Result:
    """The result of one diagnostic for one model."""
    model: Model
    numbers: dict                           # {name: number, nested lists or tensor}
    position: int = 0                       # index of the model; sets its style in all figures

    @property
    def color(self):
        return COLORS[self.position % len(COLORS)]

    @property
    def marker(self):
        return MARKERS[self.position % len(MARKERS)]

    @property
    def hatch(self):
        return "/" * (self.position // len(COLORS))

    @property
    def label(self):
        """The model's name for a legend, which leaves out names that begin with "_"; and its
        number of heads, where numbers depend on it."""
        heads = f", {self.numbers['heads']} heads" if "heads" in self.numbers else ""
        return "\u200b" * self.model.name.startswith("_") + self.model.name + heads


# ---- content of one axes: functions (axes, results) ----------------------------------------------


def line_plot(x, y, xlabel, ylabel, level=None, at_least=None):
    """A function that draws a line for each model: numbers y over x. Dashed: those of its decoder,
    or without the mean token. Dotted: a reference curve, or a reference level. at_least: (low,
    high), a range that the y axis contains."""
    def draw(ax, results):
        for r in (r for r in results if y in r.numbers):
            style = dict(color=r.color, markersize=4,
                         marker=r.marker if len(r.numbers[x]) <= 40 else None)
            ax.plot(r.numbers[x], r.numbers[y], label=r.label, **style)
            for variant in ("decoder", "centered"):
                if f"{variant}_{y}" in r.numbers:
                    ax.plot(r.numbers.get(f"{variant}_{x}", r.numbers[x]),
                            r.numbers[f"{variant}_{y}"], linestyle="--",
                            label=f"{r.label}, {variant}", **style)
            if f"reference_{y}" in r.numbers:
                ax.plot(r.numbers[f"reference_{x}"], r.numbers[f"reference_{y}"], ":", linewidth=2,
                        color="black" if len(results) == 1 else r.color,
                        label="default run" if len(results) == 1 else None)
        levels = {}                                      # value: names of the models
        for r in results if level else ():
            levels.setdefault(round(r.numbers[level], 1), []).append(r.model.name)
        for value, names in sorted(levels.items()):
            of = f" ({', '.join(names)})" * (len(levels) > 1)
            ax.axhline(value, color="0.5", linestyle=":", label=f"{level}, {value} px{of}")
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])            # space for the topmost marker
        if at_least:
            low, high = ax.get_ylim()
            ax.set_ylim(min(low, at_least[0]), max(high, at_least[1]))
        if x in ("block", "depth") or x.endswith(("count", "window")):
            ax.xaxis.get_major_locator().set_params(integer=True)
        labels = dict.fromkeys(ylabel.format(**r.numbers) for r in results)  # ranks vary with width
        ax.set(xlabel=xlabel, ylabel=" /\n".join(labels))
    draw.needs = y
    return draw


def depth_plot(x, y, xlabel, ylabel):
    """A function that draws a line for each depth of one model."""
    def draw(ax, results):
        from matplotlib import colormaps
        [r] = results
        last = max(len(r.numbers[y]) - 1, 1)
        for depth, line in enumerate(r.numbers[y]):
            ax.plot(r.numbers[x], line, color=colormaps["cividis"](depth / last), linewidth=1.2)
        ax.set(xlabel=xlabel, ylabel=ylabel, title=f"depth 0 (dark) to {last} (light)")
    return draw


def bar_plot(xlabel, ylabel):
    """A function that draws grouped bars, in each group one for each model."""
    def draw(ax, results):
        names, width = list(dict.fromkeys(n for r in results for n in r.numbers["bars"])), 0.8
        for i, r in enumerate(results):
            ax.bar([j + (i + 0.5) * width / len(results) - width / 2 for j in range(len(names))],
                   [r.numbers["bars"].get(name, math.nan) for name in names],
                   0.9 * width / len(results), color=r.color, hatch=r.hatch, label=r.label)
        names = ["\n".join(textwrap.wrap(name, 18)) for name in names]
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if len(names) > 4 else 0)
        ax.set(xlabel=xlabel, ylabel=ylabel)
    return draw


def plot_shape_bias(ax, results):
    """Shape bias by class of the shape; dashed: mean over the classes."""
    bar_plot("class of the shape", "decisions for the shape (%)")(ax, results)
    for r in (r for r in results if r.numbers["shape_bias"] is not None):
        ax.axhline(r.numbers["shape_bias"], color=r.color, linestyle="--", linewidth=1, label=(
            f"{r.label}: {r.numbers['shape_bias']:.0f}%, decided {r.numbers['either']:.0f}%"))
    ax.axhline(50, color="0.5", linestyle=":", label="random, 50%")


def plot_loss(ax, results):
    """Loss of one run and of the default run, and the mean relative difference."""
    line_plot("step", "loss", "step", "loss")(ax, results)
    if "relative_distance" in results[0].numbers:
        ax.set_title("mean difference from the default run: {relative_distance:.1%}".format(
            **results[0].numbers))


def plot_head_density(ax, results):
    """Density over the heads of one block, and a marker on the axis for each head."""
    line_plot("density_at", "density", "NMI of a head", "density")(ax, results)
    for r in results:
        ax.plot(r.numbers["density_of"], [0] * r.numbers["heads"], r.marker, color=r.color,
                markersize=5, alpha=0.7, clip_on=False)
    ax.set_ylim(0)


def plot_token_plane(ax, results):
    """Tokens of two images before and after a layer, and their centers."""
    for side, name, color, cross in zip(results[0].numbers["plane"], ("before", "after"),
                                        STATE_COLORS, "+x"):
        for points, marker in zip(side[..., :2], "o^"):
            ax.scatter(*points.T, s=6, color=color, marker=marker, alpha=0.6, linewidths=0,
                       label=f"{name}, image {'o^'.index(marker) + 1}")
            ax.scatter(*points.mean(0), s=70, color="black", marker=cross)
    ax.set(xlabel="component 1", ylabel="component 2")
    ax.axis("equal")


def plot_tsne(ax, results):
    """Tokens at their t-SNE positions: a color for each class, or for each image if there are
    none."""
    from matplotlib import colormaps
    numbers = results[0].numbers
    labels = numbers["label"].unique()
    for i, label in enumerate(labels):
        color = (STATE_COLORS[i] if len(labels) <= len(STATE_COLORS) else
                 colormaps["turbo"](i / len(labels)))
        ax.scatter(*numbers["position"][numbers["label"] == label].T, s=6, color=color,
                   linewidths=0)
    title = "neighbors: same image {purity_image:.0%}"
    title += ", same class {purity_class:.0%}" if "purity_class" in numbers else ""
    ax.set(xticks=[], yticks=[], title=title.format(**numbers))


def plot_pair_densities(ax, results):
    """Cosines of pairs of patches of the same object and of different objects."""
    numbers = results[0].numbers
    names = "same object", "different objects"
    for line, name, color in zip(numbers["densities"], names, STATE_COLORS):
        ax.fill_between(numbers["cosine"], line, color=color, alpha=0.45, label=name, linewidth=0)
    ax.set(xlabel="cosine of two patches", ylabel="density",
           title="overlap {overlap:.2f}; means {intra:.2f}, {inter:.2f}\n"
                 "{pairs[0]:,.0f} and {pairs[1]:,.0f} pairs".format(**numbers))


# ---- whole figures: functions (pyplot, results) -> figure ----------------------------------------


def axes_figure(*shared, each=None, same_scale=True):
    """A function that makes a figure of axes: first one for each model, drawn by `each`, with one
    scale if `same_scale`; then the `shared` ones, which show all models."""
    def draw(plt, results):
        parts = [(each, [r]) for r in results if each] + [
            (part, results) for part in shared if not hasattr(part, "needs") or any(
                part.needs in r.numbers for r in results)]
        columns = 2 if len(parts) == 4 else min(4, len(parts))
        rows = -(-len(parts) // columns)
        fig, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                 figsize=(3.5 * columns + 1.6, 3.4 * rows + 0.5))
        for ax, (part, chosen) in zip(axes.flat, parts):
            if part is each and same_scale:
                ax.sharey(axes[0, 0])
            part(ax, chosen)
            ax.grid(alpha=0.25)
            if part is each:
                title = f"{chosen[0].model.name}\n{ax.get_title()}"
                ax.set_title(title, fontsize=9, color=chosen[0].color)
        for ax in axes.flat[len(parts):]:
            ax.set_axis_off()
        legend = {}
        for ax in axes.flat:
            for line, label in zip(*ax.get_legend_handles_labels()):
                legend.setdefault("\n".join(textwrap.wrap(label, 28)), line)
        if legend:
            fig.legend(legend.values(), legend, loc="outside right center", frameon=False,
                       fontsize=8 if len(legend) <= 16 else 5)
        return fig
    return draw


class Tile:
    """One image of a figure, with frames, outlines and a star.

    image: (S, S, 3) array, (g, g) numbers drawn in colors with limits=(low, high), or None for a
    gap. star: (x, y). boxes: [(x, y, side, color)]. outlines: [((S, S) bool, color)].
    """

    def __init__(self, image, title="", *, star=None, boxes=(), outlines=(), limits=(None, None)):
        self.image = image.cpu().numpy() if torch.is_tensor(image) else image
        self.title, self.star, self.boxes, self.limits = title, star, boxes, limits
        self.outlines = list(outlines)

    def draw(self, plt, ax):
        low, high = self.limits
        drawn = ax.imshow(self.image, cmap="cividis", vmin=low, vmax=high)
        ax.set_title(self.title, fontsize=8)
        for x, y, side, color in self.boxes:
            for edge, width in (("white", 2.2), (color, 1.2)):
                ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), side, side, fill=False,
                                           edgecolor=edge, linewidth=width))
        for mask, color in self.outlines:
            if mask.any() and not mask.all():
                ax.contour(mask, [0.5], colors=color, linewidths=1.2)
        if self.star:
            ax.plot(self.star[0] - 0.5, self.star[1] - 0.5, "*", color=COLORS[1], markersize=8)
        return drawn


@dataclass
class ImageRow:
    """A row of tiles in a figure."""
    label: str
    tiles: list[Tile]
    once: bool = False                      # same for all models: drawn only for the first one


def image_figure(width=1.4, height=1.4, colorbar=None):
    """A function that makes a figure of the `image_rows` of each model. colorbar: label of the
    color scale, if any; lower values have its lowest color."""
    def draw(plt, results):
        rows = [(r, row) for i, r in enumerate(results) for row in r.numbers["image_rows"]
                if not (i and row.once)]
        columns = max(len(row.tiles) for _, row in rows)
        fig, axes = plt.subplots(len(rows), columns, squeeze=False, layout="constrained",
                                 figsize=(width * columns + 1.6, height * len(rows) + 0.9))
        for line, (r, row) in zip(axes, rows):
            for ax in line:
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            name = row.label if row.once else f"{r.model.name} {row.label}"
            line[0].set_ylabel("\n".join(textwrap.wrap(name, 14)), fontsize=8, rotation=0,
                               ha="right", va="center", color="black" if row.once else r.color)
            for ax, tile in zip(line, row.tiles):
                if tile.image is not None:
                    drawn = tile.draw(plt, ax)
        if colorbar:
            fig.colorbar(drawn, ax=axes, shrink=0.6, label=colorbar, extend="min")
        return fig
    return draw
