"""Reference curves: those of diagnostics/curves.yaml, benchmarks/curves.py that writes them, and
`analysis.py --what loss` that draws them over a run's own."""
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import METHODS, curves
from diagnostics import inputs, recorded
from lib import config


def write_log(folder, tail="", steps=30):
    lines = [dict(step=10, loss=4.0), dict(step=20, loss=2.2, knn=30.0), dict(step=25, loss=9.0),
             dict(step=steps, loss=0.9, knn=35.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + tail)


def write_config(folder, data="toy", **changes):
    cfg = vars(config.parse(importlib.import_module("mae").Config, ["--data", data]))
    cfg = {name: x for name, x in cfg.items() if name not in ("origin", "resume", "config")}
    (folder / "config.yaml").write_text(json.dumps(cfg | changes))


CURVES = config.read_yaml(curves.CURVES)


def test_every_method_has_a_curve_on_toy():
    assert CURVES["toy"].keys() == METHODS.keys() and CURVES.keys() <= curves.IMAGES.keys()


@pytest.mark.parametrize("data, method", [(d, m) for d in CURVES for m in CURVES[d]])
def test_curves_have_the_length_of_the_default_runs(data, method):
    """They are out of date after a change of the number of epochs or of images a step."""
    cfg = config.parse(importlib.import_module(method).Config, ["--data", data])
    curve = CURVES[data][method]
    assert curve["step"][-1] == curve["knn_step"][-1] == pytest.approx(
        cfg.epochs * (curves.IMAGES[data] // cfg.batch_size), rel=0.01 * (data == "cifar10"), abs=1)
    assert len(curve["step"]) == len(curve["loss"]) <= curves.LINES + 1
    assert len(curve["knn"]) == cfg.evals


def test_the_loss_diagnostic_compares_a_run_with_the_default_run(tmp_path, monkeypatch):
    def load(data="toy", tail=""):
        write_log(tmp_path, tail)
        return SimpleNamespace(source=SimpleNamespace(path=tmp_path / "encoder.pt", method="mae",
                                                      data=data))

    reference = dict(step=[10, 20, 30], loss=[5.0, 2.0, 1.0], knn_step=[30], knn=[40.0])
    monkeypatch.setattr(config, "read_yaml", lambda path: dict(toy=dict(
        mae=dict(reference, seed=0))))
    own = dict(step=[10, 20, 25, 30], loss=[4.0, 2.2, 9.0, 0.9], knn_step=[20, 30],
               knn=[30.0, 35.0])
    found = recorded.read_loss(load(tail='{"step": 4'), None)
    distance = found.pop("relative_distance")      # 1/5, 0.2/2, 0.1/1; step 25: no reference
    assert distance == pytest.approx((0.2 + 0.1 + 0.1) / 3)
    assert found == own | {f"reference_{name}": values for name, values in reference.items()}
    for other in "toy-scenes", "cifar10":                                  # control
        assert recorded.read_loss(load(other), None) == own
    monkeypatch.setattr(config, "read_yaml", lambda path: dict(
        toy=dict(mae=dict(reference, seed=0)), base="moby"))   # selfpatch.py: another loss
    (tmp_path / "config.yaml").touch()
    assert recorded.read_loss(load(), None) == own
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "accuracy": 3.0}\n{"step": 2, "loss": '
                                            'null}\n')
    model = SimpleNamespace(source=SimpleNamespace(path=tmp_path / "encoder.pt"))
    with pytest.raises(inputs.MissingInput, match="no losses found"):
        recorded.read_loss(model, None)
    (tmp_path / "metrics.jsonl").unlink()
    model = SimpleNamespace(source=SimpleNamespace(path=tmp_path / "encoder.pt"))
    with pytest.raises(inputs.MissingInput, match="metrics.jsonl"):
        recorded.read_loss(model, None)


def test_a_curve_is_read_from_a_default_run_only(tmp_path):
    write_log(tmp_path, steps=6864)
    write_config(tmp_path, out="elsewhere")
    data, method, curve = curves.read_curve(tmp_path)
    assert (data, method, curve["run"]["seed"]) == ("toy", "mae", 0)
    assert curve["loss"] == [4.0, 2.2, 9.0, 0.9] and curve["step"] == [10, 20, 25, 6864]
    assert curve["knn_step"] == [20, 6864] and curve["knn"] == [30.0, 35.0]
    for setting, message in ((dict(lr=1e-9), "lr is 1e-09, not 0.004"),
                             (dict(seed=3), "seed is 3, not 0"),
                             (dict(epochs=20), "epochs is 20, not 22"),
                             (dict(data="toy-scenes"), "data is toy-scenes, not toy or cifar10")):
        write_config(tmp_path, **setting)
        with pytest.raises(ValueError, match=f"not a default run: {message}"):
            curves.read_curve(tmp_path)


def test_of_cifar10_a_part_may_be_used_for_more_epochs(tmp_path):
    write_config(tmp_path, "cifar10", data_root="elsewhere", epochs=50.0, warmup_epochs=2.5)
    write_log(tmp_path, steps=7790)                      # full data set: 20 epochs of 390 steps
    data, method, curve = curves.read_curve(tmp_path)
    assert (data, method, curve["run"]["epochs"]) == ("cifar10", "mae", 50)
    write_log(tmp_path, steps=7700)
    with pytest.raises(ValueError, match="it has 7700 steps, not 7800"):
        curves.read_curve(tmp_path)


def test_of_a_long_log_some_lines_are_kept(tmp_path):
    write_config(tmp_path)
    lines = [dict(step=step, loss=float(step)) for step in range(10, 6861, 10)]
    lines.append(dict(step=6864, loss=1.0, knn=30.0))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, _, curve = curves.read_curve(tmp_path)
    assert curve["step"][:3] == curve["loss"][:3] == [50, 100, 150]
    assert curve["step"][-2:] == [6850, 6864] and len(curve["step"]) == 138


def test_curves_of_other_methods_and_data_sets_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "curves.yaml"
    file.write_text("cifar10: {mae: {loss: [3.0]}}\ntoy: {mae: {loss: [1.0]}, dino: {loss: [2.0]}}")
    monkeypatch.setattr(curves, "CURVES", file)
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path)])
    write_log(tmp_path, steps=6864)
    write_config(tmp_path)
    curves.main()
    written = yaml.safe_load(file.read_text())
    assert list(written) == ["toy", "cifar10"] and list(written["toy"]) == ["dino", "mae"]
    assert written["cifar10"]["mae"]["loss"] == [3.0]
    assert written["toy"]["dino"]["loss"] == [2.0]
    assert written["toy"]["mae"]["loss"] == [4.0, 2.2, 9.0, 0.9]
