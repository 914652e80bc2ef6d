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
from lib import config, toy


def write_log(folder, tail=""):
    lines = [dict(step=10, loss=4.0), dict(step=20, loss=2.2, knn=30.0), dict(step=25, loss=9.0),
             dict(step=30, loss=0.9, knn=35.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + tail)


def write_config(folder, **changes):
    cfg = vars(config.parse(importlib.import_module("mae").Config, []))
    cfg = {name: x for name, x in cfg.items() if name not in ("origin", "resume", "config")}
    (folder / "config.yaml").write_text(json.dumps(cfg | changes))


@pytest.mark.parametrize("method", METHODS)
def test_curves_have_the_length_of_the_default_runs(method):
    """They are out of date after a change of the number of epochs or of images a step."""
    cfg = config.parse(importlib.import_module(method).Config, [])
    curve = config.read_yaml(curves.CURVES)[method]
    assert curve["step"][-1] == curve["knn_step"][-1] == round(
        cfg.epochs * (toy.NUM_IMAGES["train"] // cfg.batch_size))
    assert len(curve["step"]) == len(curve["loss"]) and len(curve["knn"]) == cfg.evals


def test_the_loss_diagnostic_compares_a_run_with_the_default_run(tmp_path, monkeypatch):
    def load(data="toy", tail=""):
        write_log(tmp_path, tail)
        return SimpleNamespace(source=SimpleNamespace(path=tmp_path / "encoder.pt", method="mae",
                                                      data=data))

    reference = dict(step=[10, 20, 30], loss=[5.0, 2.0, 1.0], knn_step=[30], knn=[40.0])
    monkeypatch.setattr(config, "read_yaml", lambda path: dict(mae=dict(reference, seed=0)))
    own = dict(step=[10, 20, 25, 30], loss=[4.0, 2.2, 9.0, 0.9], knn_step=[20, 30],
               knn=[30.0, 35.0])
    found = recorded.read_loss(load(tail='{"step": 4'), None)
    distance = found.pop("relative_distance")      # 1/5, 0.2/2, 0.1/1; step 25: no reference
    assert distance == pytest.approx((0.2 + 0.1 + 0.1) / 3)
    assert found == own | {f"reference_{name}": values for name, values in reference.items()}
    assert recorded.read_loss(load("toy-scenes"), None) == own             # control
    monkeypatch.setattr(config, "read_yaml", lambda path: dict(
        mae=dict(reference, seed=0), base="moby"))       # selfpatch.py --base moby: another loss
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
    write_log(tmp_path)
    write_config(tmp_path, out="elsewhere")
    method, curve = curves.read_curve(tmp_path)
    assert method == "mae" and curve["run"]["seed"] == 0 and curve["loss"] == [4.0, 2.2, 9.0, 0.9]
    assert curve["knn_step"] == [20, 30] and curve["knn"] == [30.0, 35.0]
    for setting, message in ((dict(lr=1e-9), "lr is 1e-09, not 0.004"),
                             (dict(seed=3), "seed is 3, not 0")):
        write_config(tmp_path, **setting)
        with pytest.raises(ValueError, match=f"not a default run: {message}"):
            curves.read_curve(tmp_path)


def test_curves_of_other_methods_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "curves.yaml"
    file.write_text("mae: {loss: [1.0]}\ndino: {loss: [2.0]}\n")
    monkeypatch.setattr(curves, "CURVES", file)
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path)])
    write_log(tmp_path)
    write_config(tmp_path)
    curves.main()
    written = yaml.safe_load(file.read_text())
    assert written["dino"] == {"loss": [2.0]} and written["mae"]["loss"] == [4.0, 2.2, 9.0, 0.9]
