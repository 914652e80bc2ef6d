"""analysis.py: options, the files of the report, the figures."""
import csv
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from diagnostics_helpers import save_mae

import analysis
from diagnostics import figures, plots


def make_report(tmp_path, *flags):
    save_mae(tmp_path / "out/mae-toy")
    analysis.main(["--out", str(tmp_path / "out"), "--limit", "8", "--workers", "0",
                   "--device", "cpu", *flags])
    return tmp_path / "out/analysis"


def test_report_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = make_report(tmp_path, "--what", "nmi", "fourier", "layerwise", "--baseline",
                         "untrained")
    out = capsys.readouterr().out
    assert "pip install matplotlib" in out and "--task layerwise" in out
    assert {f.name for f in folder.iterdir()} == {
        "nmi.json", "nmi.csv", "fourier.json", "fourier.csv", "index.html"}
    assert (folder / "index.html").read_text().count("<h2") == 2
    content = json.loads((folder / "nmi.json").read_text())
    found, path = content["models"], str(tmp_path / "out/mae-toy/encoder.pt")
    assert [m["model"] for m in found] == ["mae-toy", "untrained"]
    assert (found[0]["checkpoint"], found[0]["step"], found[0]["img_size"]) == (path, 3, 32)
    assert (content["what"], content["data"], content["settings"]["limit"]) == ("nmi", "toy", "8")
    with open(folder / "nmi.csv") as file:
        rows = [row for row in csv.DictReader(file)
                if row["quantity"] == "nmi" and row["model"] == "mae-toy"]
    assert [float(row["value"]) for row in rows] == found[0]["numbers"]["nmi"]


def test_csv_rows_of_nested_numbers():
    rows = list(analysis.csv_rows({"a": [[1, 2], [3]], "b": {"c": 4}}))
    assert rows == [["a", 0, 0, "", "", 1], ["a", 0, 1, "", "", 2], ["a", 1, 0, "", "", 3],
                    ["b", "c", "", "", "", 4]]


def test_numbers_that_are_not_finite_are_null_in_json():
    numbers = dict(x=torch.tensor([1, math.nan, -math.inf]), y=(math.nan, 2), image_rows="tiles")
    assert analysis.to_json_data(numbers) == dict(x=[1, None, None], y=[None, 2])


def test_every_diagnostic_has_a_figure():
    assert list(analysis.DIAGNOSTICS) == list(figures.FIGURES)
    assert analysis.parse(["--what", "all"]).what == tuple(analysis.DIAGNOSTICS)
    assert analysis.parse([]).what == analysis.STANDARD


def test_wrong_options_are_refused_before_anything_is_computed(capsys):
    with pytest.raises(ValueError, match="did you mean fourier"):
        analysis.parse(["--what", "furier"])
    with pytest.raises(SystemExit):
        analysis.parse(["--copies", "1"])
    assert "--copies" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        analysis.parse(["--image", "-1"])
    assert "--image" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nmi does not use --copies: leave it out"):
        analysis.main(["--what", "nmi", "--copies", "5"])
    with pytest.raises(ValueError, match="--copies is for feature_variance only: leave it out"):
        analysis.main(["--copies", "5"])                 # with the standard report


def test_weights_that_are_not_finite_are_refused_before_anything_is_computed(tmp_path):
    model, _ = save_mae(tmp_path / "broken")
    content = torch.load(model.source.path, weights_only=True)
    content["model"]["norm.weight"][0] = math.nan
    torch.save(content, model.source.path)
    with pytest.raises(ValueError, match="broken: its weights are not finite: leave it out"):
        analysis.main(["--out", str(tmp_path), "--device", "cpu", "--what", "nmi",
                       "--checkpoint", str(tmp_path / "broken")])


def test_without_any_result_the_report_is_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="no diagnostic could be run: the notes above"):
        analysis.main(["--out", str(tmp_path), "--device", "cpu", "--what", "loss", "--baseline",
                       "untrained"])
    assert "note: loss left out (untrained): no losses found" in capsys.readouterr().out


def test_results_with_different_settings_get_a_note(tmp_path, capsys, monkeypatch):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    folders = []
    for name, top1, limit, k in (("a", 30.0, None, [10]), ("b", 40.0, 2000, [10])):
        model, _ = save_mae(tmp_path / name)
        folders.append(str(tmp_path / name))
        (tmp_path / name / "results.jsonl").write_text(json.dumps(dict(
            task="knn", data="toy", checkpoint=model.source.path, branch="base", step=3,
            metrics={"cls": {"k=10": top1}}, settings=dict(limit=limit, k=k, device="cpu"))) + "\n")
    flags = ["--out", str(tmp_path), "--device", "cpu", "--what", "knn", "--checkpoint"]
    drawn = []
    monkeypatch.setattr(Figure, "supxlabel", lambda figure, text, **_: drawn.append(text))
    analysis.main([*flags, *folders])
    note = "knn: measured with different settings: --limit None (a), 2000 (b)"
    assert f"note: {note}\n" in capsys.readouterr().out
    page = (tmp_path / "analysis/index.html").read_text()
    assert f"note: {note}</p>" in page
    analysis.main([*flags, *folders[:1]])
    assert "different settings" not in capsys.readouterr().out           # control
    assert ["note: measured" in text for text in drawn] == [True, False]     # and in the figures


# ---- figures -------------------------------------------------------------------------------------


def make_results(*numbers):
    model = SimpleNamespace(name="tiny")
    return [plots.Result(model, n, position) for position, n in enumerate(numbers)]


def test_models_of_different_width_have_both_ranks_in_the_label():
    def label(*numbers):
        found = {}
        ax = SimpleNamespace(plot=lambda *_, **__: None, set=found.update)
        plots.line_plot("x", "y", "xlabel", "rank {ranks[0]}")(ax, make_results(*numbers))
        return found["ylabel"]

    narrow, wide = (dict(x=[1], y=[1], ranks=[rank]) for rank in (32, 64))
    assert label(narrow, wide) == "rank 32 /\nrank 64" and label(narrow, narrow) == "rank 32"


def test_styles_of_56_models_differ():
    results = make_results(*[{}] * 56)
    assert len({(r.color, r.marker) for r in results}) == 56
    assert len({(r.color, r.hatch) for r in results}) == 56


@pytest.mark.parametrize("count", [3, 18])                   # classes, images
def test_every_class_of_tsne_has_its_own_color(count):
    pytest.importorskip("matplotlib")
    colors, label = [], torch.arange(count).repeat(2)
    ax = SimpleNamespace(scatter=lambda *_, color, **__: colors.append(color),
                         set=lambda **_: None)
    plots.plot_tsne(ax, make_results(dict(
        label=label, position=torch.zeros(len(label), 2), purity_image=1)))
    assert len(set(colors)) == len(colors) == count


def test_titles_have_the_number_of_images_where_it_is_the_same_for_all_numbers():
    count = figures.count_images
    assert count(make_results(dict(images=1256), dict(images=1256))) == ", 1,256 images"
    assert count(make_results(dict(images=8), dict(images=9))) == ""
    assert count(make_results(dict(prompts=8))) == ""
    assert count(make_results(dict(images=8, settings_compared={}))) == ""   # partly recorded


def test_the_axis_of_the_nmi_shows_that_small_values_are_small():
    plt = pytest.importorskip("matplotlib.pyplot")
    for values, high in (([0.01, 0.02], 0.6), ([0.5, 0.9], 0.9)):
        fig = figures.FIGURES["nmi"].draw(plt, make_results(dict(
            block=[1, 2], nmi=values, std_over_heads=values, heads=4, density_at=[0, 1],
            density=[1, 1], density_of=torch.tensor([0.1] * 4))))
        low, top = fig.axes[0].get_ylim()
        assert low <= 0 and high <= top < 1.2 * high
        assert fig.legends[0].get_texts()[0].get_text().endswith(", 4 heads")
        plt.close(fig)


def test_the_mean_shape_bias_is_a_line_beside_the_bars_of_the_classes():
    plt = pytest.importorskip("matplotlib.pyplot")
    fig = figures.FIGURES["shape_bias"].draw(plt, make_results(
        dict(bars={"cat": 80.0, "dog": 60.0}, shape_bias=70.0, either=40.0),
        dict(bars={}, shape_bias=None, either=0.0)))
    ax = fig.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "dog"]
    assert [line.get_ydata()[0] for line in ax.lines] == [70, 50]
    assert ", decided 40%" in " ".join(t.get_text().replace("\n", " ")
                                        for t in fig.legends[0].get_texts())
    plt.close(fig)


@pytest.mark.slow
def test_figures_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    what = ("decoder token_transform sv_tokens intra_inter attention_maps patch_retrieval "
            "layer_reconstruction").split()
    folder = make_report(tmp_path, "--baseline", "untrained", "--what", *what)
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in what)
    assert (folder / "index.html").read_text().count("<img") == len(what)
