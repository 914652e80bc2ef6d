"""The code against its golden traces, and a run's log against the curves of the default runs."""
import importlib
import json
from types import SimpleNamespace

import golden
import pytest

import analysis
from lib import config, toy
from lib.run import param_groups

TRACES = config.read_yaml(golden.TRACES)
SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in golden.METHODS if m != "mae"]


def off(method, found):
    """Largest relative distance of a trace from the golden one."""
    assert found.keys() == TRACES[method].keys()
    return max(abs(x - y) / abs(y) for name, values in TRACES[method].items()
               for x, y in zip(found[name], values, strict=True))


@pytest.mark.parametrize("method", ["mae", *SLOW])
def test_losses_are_the_golden_ones(method, tmp_path):
    assert off(method, golden.trace(method, tmp_path)) < golden.ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [["--seed", 1], ["--tau", 0.21], ["--momentum", 0.98],
                                   ["--weight-decay", 0.55]], ids=str)
def test_a_small_mistake_is_seen(wrong, tmp_path):
    assert off("moco_v3", golden.trace("moco_v3", tmp_path, *wrong)) > golden.ROUNDING


@pytest.mark.slow
def test_decay_of_biases_is_seen(tmp_path, monkeypatch):
    right = param_groups
    monkeypatch.setattr("mae.param_groups", lambda module, decay: [
        {**group, "weight_decay": decay} for group in right(module, decay)])
    assert off("mae", golden.trace("mae", tmp_path)) > golden.ROUNDING


# ---- curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", golden.METHODS)
def test_curves_are_those_of_todays_default_runs(method):
    """As long, at least: a changed number of epochs or of images a step leaves the curve behind."""
    cfg = config.parse(importlib.import_module(method).Config, [])
    curve = config.read_yaml(golden.CURVES)[method]
    assert curve["step"][-1] == curve["knn_step"][-1] == round(
        cfg.epochs * (toy.NUM_IMAGES["train"] // cfg.batch_size))
    assert len(curve["step"]) == len(curve["loss"]) and len(curve["knn"]) == cfg.evals


def logged(folder, data="toy", tail=""):
    lines = [dict(step=10, loss=4.0), dict(step=20, loss=2.2, knn=30.0), dict(step=25, loss=9.0),
             dict(step=30, loss=0.9, knn=35.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + tail)
    return SimpleNamespace(source=SimpleNamespace(path=folder / "encoder.pt", method="mae",
                                                  data=data))


def test_a_log_is_laid_over_that_of_the_default_run(tmp_path, monkeypatch):
    ours = dict(step=[10, 20, 30], loss=[5.0, 2.0, 1.0], knn_step=[30], knn=[40.0])
    monkeypatch.setattr(config, "read_yaml", lambda path: dict(mae=dict(ours, seed=0)))
    own = dict(step=[10, 20, 25, 30], loss=[4.0, 2.2, 9.0, 0.9], knn_step=[20, 30],
               knn=[30.0, 35.0])
    found = analysis.loss_numbers(logged(tmp_path, tail='{"step": 4'), None, None)
    distance = found.pop("relative_distance")                # 1/5, 0.2/2, 0.1/1; 25: not there
    assert distance == pytest.approx((0.2 + 0.1 + 0.1) / 3)
    assert found == own | {f"reference_{name}": values for name, values in ours.items()}
    assert analysis.loss_numbers(logged(tmp_path, "toy-scenes"), None, None) == own    # control
    (tmp_path / "metrics.jsonl").unlink()
    model = SimpleNamespace(source=SimpleNamespace(path=tmp_path / "encoder.pt"))
    with pytest.raises(analysis.Missing, match="metrics.jsonl"):
        analysis.loss_numbers(model, None, None)


def test_a_run_that_is_not_the_default_gives_no_curve(tmp_path):
    cfg = vars(config.parse(importlib.import_module("mae").Config, []))
    cfg = {name: x for name, x in cfg.items() if name not in ("origin", "resume", "config")}

    def write(**more):
        (tmp_path / "config.yaml").write_text(json.dumps(cfg | more))

    logged(tmp_path), write(seed=3, out="elsewhere")
    method, found = golden.curve(tmp_path)
    assert method == "mae" and found["run"]["seed"] == 3 and found["loss"] == [4.0, 2.2, 9.0, 0.9]
    assert found["knn_step"] == [20, 30] and found["knn"] == [30.0, 35.0]
    write(lr=1e-9)
    with pytest.raises(ValueError, match="no default run: lr is 1e-09, not 0.004"):
        golden.curve(tmp_path)
