"""Scripts, probes and diagnostics on a simulated GPU (gpu.py): they do not mix devices, and a
training step does not wait for the GPU."""
import dataclasses

import gpu
import pytest
import torch
from test_methods import METHODS, few, run  # noqa: F401 (fixtures)

import analysis
import evaluate
from lib.run import Run
from probes import common
from probes.common import Options

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(),
                                reason="this torch is built without CUDA")


def test_the_stand_in_fails_where_devices_are_mixed_and_counts_waits():
    with gpu.stand_in() as waits:
        x = torch.ones(4, 3, device="cuda")
        for mixed in (lambda: x @ torch.ones(3), lambda: torch.ones(4)[x[:, 0].long()],
                      lambda: torch.cat([x, torch.ones(1, 3)]), lambda: x.where(x.cpu() > 0, 0)):
            with pytest.raises((RuntimeError, AssertionError), match="device|CPU"):
                mixed()
        waits.clear()
        assert (x * torch.tensor(2.0)).device == x[torch.arange(2)].device == x.device
        x[x > 0] = 1.0
        torch.ones(3).to("cuda", non_blocking=True)
        assert not waits
        for waiting in (x.cpu, x.sum().item, lambda: x[x > 0], lambda: torch.ones(3).to("cuda"),
                        lambda: torch.tensor(1, device="cuda"), lambda: bool(x.any())):
            waiting()
        assert waits.total() == 6


def test_backward_passes_are_those_of_torch_and_mix_no_devices():
    net = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.BatchNorm1d(5),
                              torch.nn.GELU(), torch.nn.Linear(5, 6))
    weights = list(net.parameters())
    x = torch.randn(8, 6)
    loss = net(net(x)).square().mean() + weights[0].sum()        # weights are used several times
    with torch.no_grad():
        found = gpu.gradients(loss)
    for p, expected in zip(weights, torch.autograd.grad(loss, weights)):
        torch.testing.assert_close(found[id(p)][1], expected)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 2

        @staticmethod
        def backward(context, gradient):
            return gradient.cpu()

    with gpu.stand_in(), gpu.backward_passes():
        x = torch.ones(3, device="cuda", requires_grad=True)
        (x * 2).sum().backward()
        assert x.grad.shape == x.shape and x.grad.device.type == "cuda"
        with pytest.raises(RuntimeError, match="a gradient on device cpu, expected on cuda"):
            Wrong.apply(x).sum().backward()


def test_the_chosen_gpu_is_the_current_one():
    with gpu.stand_in():
        common.load_models(Options(baseline=("untrained",), device="cuda"))
        torch.cuda.set_device.assert_called_once_with(torch.device("cuda", 0))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_step_mixes_no_devices_and_waits_only_where_a_mask_selects(
        method, run, few, tmp_path, monkeypatch):  # noqa: F811
    """A mask that selects patches makes the host wait for their number: three times in iBOT, twice
    in BEiT. Waits are counted in the second of three steps, including its data and log; kNN and the
    visualization after the third do wait."""
    steps, seen = Run.steps, []

    def counting(self, loader):
        for step, batch in steps(self, loader):
            self.save_due = False
            yield step, batch
            seen.append(waits.copy())
            waits.clear()

    monkeypatch.setattr(Run, "steps", counting)
    with gpu.stand_in() as waits, gpu.backward_passes():
        run(method, "--out", tmp_path / "run", "--data", "toy", "--steps", 3, "--evals", 1,
            "--log-every", 9, "--device", "cuda", "--precision", "auto")
    _, second, third = seen
    assert all("[mask]" in line for line in second), second
    assert second.total() == dict(ibot=3, beit=2).get(method, 0)
    assert third.total() > 3 and (tmp_path / "run" / "visualization.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(
    evaluate.TASKS.keys() - {"classify", "detection", "landmark_retrieval", "video"}))
def test_probes_mix_no_devices(task, tmp_path):
    """Except for classify, which needs a classifier, detection, where values decide which boxes are
    kept, and those that would take minutes."""
    users = {field.name: field.metadata["only_for"] for field in dataclasses.fields(Options)}
    short = [x for flag, n in (("epochs", "1"), ("iters", "2"))
             if task in users[flag] for x in (f"--{flag}", n)]
    with gpu.stand_in() as waits, gpu.backward_passes():
        evaluate.main(["--task", task, "--baseline", "untrained", "--data", "toy", "--limit", "32",
                       "--device", "cuda", "--out", str(tmp_path), *short])
    assert waits and (tmp_path / "results.jsonl").exists()


@pytest.mark.slow
def test_diagnostics_mix_no_devices(tmp_path):
    """Except for those whose loops depend on values, those that train, and those that read recorded
    numbers."""
    names = {*analysis.STANDARD, "token_transform", "sv_images", "adjacent_count",
             "patch_retrieval", "feature_variance", "views"} - {"prompt_heatmap"}
    with gpu.stand_in() as waits:
        analysis.main(["--what", *names, "--baseline", "untrained", "--data", "toy", "--limit",
                       "8", "--device", "cuda", "--out", str(tmp_path)])
    assert waits and len(list((tmp_path / "analysis").glob("*.json"))) == len(names)
