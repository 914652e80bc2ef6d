"""benchmarks/speed.py: what counts as the rest of a step."""
from types import SimpleNamespace

import pytest
from test_methods import flags

import mae
from benchmarks import speed
from lib import distributed
from lib.run import Run


@pytest.mark.parametrize("device, expected", [("cpu", 0.5), ("cuda", 0.75)])
def test_rest_is_the_time_outside_of_products_and_attention(device, expected):
    events = [SimpleNamespace(key=key, self_cpu_time_total=1e4 * t, self_device_time_total=5e3 * t)
              for key, t in (("aten::addmm", 20), ("aten::_softmax", 10), ("aten::add", 40),
                             ("aten::_scaled_dot_product_flash_attention_for_cpu", 20),
                             ("flash_attention_kernel", 99))]     # of an operation that was counted
    assert speed.rest_fraction(events, 1.0, device) == pytest.approx(expected)


def test_a_run_is_profiled_after_the_measured_steps(monkeypatch, tmp_path):
    file, profiled_at = tmp_path / "rest", []
    fraction = speed.rest_fraction
    monkeypatch.setattr(speed, "STEPS", 2)
    monkeypatch.setattr(speed, "PROFILED", 1)
    monkeypatch.setattr(speed, "rest_fraction", lambda events, *args: (
        profiled_at.append(sum(e.count for e in events if "AdamW.step" in e.key)),
        fraction(events, *args))[1])
    monkeypatch.setattr(Run, "steps", speed.profiled(Run.steps, file))
    monkeypatch.setattr(distributed, "measure_peak", lambda *_: 1.0)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["mae.py", *flags("mae", "--data", "synthetic", "--steps", 4,
                                                      "--out", tmp_path / "run")])
    mae.main()
    assert profiled_at == [1] and 0 < float(file.read_text()) < 1
