"""The code against its golden traces."""
import golden
import pytest

from lib import config
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
@pytest.mark.parametrize("wrong", [["--seed", 1], ["--temperature", 0.21], ["--weight-decay", 0.55],
                                   ["--momentum-teacher", 0.98]], ids=str)
def test_a_small_mistake_is_seen(wrong, tmp_path):
    assert off("moco_v3", golden.trace("moco_v3", tmp_path, *wrong)) > golden.ROUNDING


@pytest.mark.slow
def test_decay_of_biases_is_seen(tmp_path, monkeypatch):
    right = param_groups
    monkeypatch.setattr("mae.param_groups", lambda module, decay: [
        {**group, "weight_decay": decay} for group in right(module, decay)])
    assert off("mae", golden.trace("mae", tmp_path)) > golden.ROUNDING
