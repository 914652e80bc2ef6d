"""Figures of the probes: colors, chosen rows, the layout of the grid."""
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from lib import toy
from lib.colors import class_colors, to_lab
from probes.figures import FigureRows, save_image_grid


def test_forty_colors_can_be_told_apart_and_255_do_not_repeat():
    colors = class_colors()
    assert len(colors.unique(dim=0)) == 256 and colors[0].tolist() == [0, 0, 0]
    lab = to_lab(colors[1:41] / 255)
    distances = torch.cdist(lab, lab)[torch.triu(torch.ones(40, 40), 1).bool()]
    assert distances.min() > 20                            # 2 is just noticeable side by side
    hues = torch.stack([torch.arange(40) * 0.382 % 1, *torch.ones(2, 40)], -1)
    lab = to_lab(toy.hsv_color(hues))                      # control: 40 hues are too similar
    assert torch.cdist(lab, lab)[torch.triu(torch.ones(40, 40), 1).bool()].min() < 20


def test_lab_has_known_values():
    rgb = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 1]])
    expected = torch.tensor([[53.24, 80.09, 67.20], [100, 0, 0], [32.30, 79.19, -107.86]])
    torch.testing.assert_close(to_lab(rgb), expected, atol=0.1, rtol=0)


def test_rows_of_a_figure_show_many_classes():
    stream = [({0}, i) for i in range(8)] + [({0, 1}, 8), ({0}, 9), ({2}, 10), ({1, 3}, 11)]
    figure = FigureRows(3)
    for classes, row in stream:
        if figure.wants(classes):
            figure.add(classes, row)
    assert figure.classes() == {0, 1, 2, 3} and len(figure.rows()) == 3
    assert {10, 11} <= set(figure.rows())
    assert not FigureRows(0).wants({1})
    best = max(len(set().union(*(classes for classes, _ in rows)))
               for rows in itertools.combinations(stream, 3))
    assert len(figure.classes()) == best                   # as good as the best choice of three


@pytest.mark.parametrize("titles, names, legend", [
    ((), (), ()), (("left", "right"), ("a row", "b"), [(1, "cat"), (40, "a name of a class")] * 9)])
def test_text_is_added_around_the_images(tmp_path, titles, names, legend):
    rows = [[torch.full((3, 20, 30), 200, dtype=torch.uint8)] * 2,
            [torch.full((3, 20, 10), 100, dtype=torch.uint8)] * 2]
    save_image_grid(rows, tmp_path / "a/b.png", 20, titles, names, legend)
    image = Image.open(tmp_path / "a/b.png")
    assert (image.size == (64, 44)) == (not titles)
    pixels = [tuple(p) for p in np.asarray(image).reshape(-1, 3).tolist()]
    assert pixels.count((200, 200, 200)) >= 2 * 20 * 30
    assert pixels.count((100, 100, 100)) >= 2 * 20 * 10
    for index, _ in legend:
        assert pixels.count(tuple(class_colors()[index].tolist())) >= 100
