"""Figures of the probes (--show): which images they show, column titles, and a legend of colors."""
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from lib.colors import class_colors

GAP, MARGIN = 2, 4                                       # pixels between images, around text


class FigureRows:
    """At most `count` rows of a figure, chosen from a stream so that they show many classes: when
    it is full, an item with a new class takes the place of one whose classes others show too."""

    def __init__(self, count):
        self.count = count
        self.items = []                                  # (set of classes, row)

    def wants(self, classes):
        """Whether `add` would keep an item with these classes."""
        return len(self.items) < self.count or (
            bool(set(classes) - self.classes()) and self.find_redundant() is not None)

    def add(self, classes, row):
        if not self.wants(classes):
            return
        if len(self.items) == self.count:
            self.items.pop(self.find_redundant())
        self.items.append((set(classes), row))

    def classes(self):
        return set().union(*(classes for classes, _ in self.items))

    def rows(self):
        return [row for _, row in self.items]

    def find_redundant(self):
        """Index of the last item whose classes other items show; None: there is none."""
        for i in range(len(self.items) - 1, -1, -1):
            others = set().union(*(classes for k, (classes, _) in enumerate(self.items) if k != i))
            if self.items[i][0] <= others:
                return i
        return None


def save_image_grid(rows, path, height=128, titles=(), names=(), legend=()):
    """Writes rows of images (3, H, W) uint8, each resized to `height` pixels, as one PNG.

    titles: of the columns; names: of the rows; legend: (index in class_colors, name) pairs."""
    font = ImageFont.load_default(13)
    line = 13 + 2 * MARGIN                               # height of a line of text

    def text_width(text):
        return round(font.getlength(text)) + 2 * MARGIN

    cells = [[F.interpolate(x[None].float(), (height, max(1, round(height * x.shape[2] /
                                                                   x.shape[1]))),
                            mode="bilinear")[0].round().clamp(0, 255).to(torch.uint8) for x in row]
             for row in rows]
    n_columns = max(map(len, cells))
    widths = [max(row[i].shape[2] for row in cells if i < len(row)) + GAP
              for i in range(n_columns)]
    widths = [max(width, text_width(title)) for width, title in
              zip(widths, [*titles, *[""] * n_columns])]
    left = max(map(text_width, names), default=0)
    total, top = left + sum(widths), line * bool(titles)
    lines, used = [[]] if legend else [], 0              # entries of the legend, line by line
    for index, name in legend:
        width = line + text_width(name)
        if lines[-1] and used + width > max(total, width):
            lines.append([])
            used = 0
        lines[-1].append((used, index, name))
        used += width
    size = max(total, max((line + text_width(name) for _, name in legend), default=0))
    bottom = top + len(rows) * (height + GAP)
    sheet = Image.new("RGB", (size, bottom + line * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles[:n_columns]):
        pen.text((left + sum(widths[:i]) + MARGIN, MARGIN), title, fill="black", font=font)
    for r, row in enumerate(cells):
        y = top + r * (height + GAP)
        if names:
            pen.text((MARGIN, y + height // 2 - 8), names[r], fill="black", font=font)
        for i, cell in enumerate(row):
            tile = Image.fromarray(cell.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(tile, (left + sum(widths[:i]), y))
    for i, entries in enumerate(lines):
        for x, index, name in entries:
            y = bottom + i * line
            pen.rectangle((x + MARGIN, y + MARGIN, x + line - MARGIN, y + line - MARGIN),
                          fill=tuple(class_colors()[index].tolist()))
            pen.text((x + line, y + MARGIN - 1), name, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")
