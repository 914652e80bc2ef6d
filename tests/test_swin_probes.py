"""Probes and diagnostics of a Swin: those that need nothing that it lacks run, the others refuse in
one sentence."""
import json

import pytest
import torch

import analysis
import evaluate
from lib import checkpoints, swin


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with encoder.pt of an untrained swin_micro for 32 px."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("swin")
    checkpoints.save_encoder(folder / "encoder.pt", swin.make_swin("swin_micro", 32), data="toy")
    return folder


def flags(folder, *more):
    return ["--checkpoint", str(folder), "--out", str(folder / "out"), "--limit", "32", "--device",
            "cpu", "--precision", "fp32", "--workers", "0", *more]


def evaluate_task(folder, *task):
    evaluate.main([*flags(folder), "--task", *task])
    return json.loads((folder / "results.jsonl").read_text().splitlines()[-1])


def test_a_file_gives_the_same_swin(run):
    net = checkpoints.load_encoder(run / "encoder.pt", quiet=True)
    torch.manual_seed(0)
    expected, x = swin.make_swin("swin_micro", 32).eval(), torch.randn(2, 3, 32, 32)
    assert isinstance(net, swin.Swin) and torch.equal(net(x), expected(x))
    assert checkpoints.projector(net) is None


def test_knn_of_a_swin_uses_the_mean_patch_token(run):
    line = evaluate_task(run, "knn", "--baseline", "untrained")
    assert line["metrics"]["cls"] == line["metrics"]["patch"]
    assert "has no class token" in line["notes"][0]


@pytest.mark.slow
@pytest.mark.parametrize("task", [
    "few_shot", "linear", "attentive", "layerwise", "finetune", "object_retrieval",
    "part_retrieval", "part_classification", "zero_shot_segmentation", "segmentation", "video",
    "pose"])
def test_tasks_run_with_a_swin(run, task):
    epoch, two_steps = ["--epochs", "1"], ["--iters", "2"]
    short = {"few_shot": ["--limit", "400", "--episodes", "5"], "segmentation": two_steps,
             "pose": two_steps, **dict.fromkeys(("linear", "attentive", "layerwise", "finetune",
                                                 "part_classification"), epoch)}
    assert evaluate_task(run, task, *short.get(task, []))["task"] == task


@pytest.mark.parametrize("task", ["linear_segmentation", "detection"])
def test_tasks_that_need_a_vit_refuse_in_one_sentence(run, task):
    with pytest.raises(ValueError, match=f"{task} needs a ViT.*is a Swin") as error:
        evaluate.main([*flags(run), "--task", task])
    assert "\n" not in str(error.value)


def test_analysis_refuses_in_one_sentence(run):
    with pytest.raises(ValueError, match="analysis.py needs a ViT"):
        analysis.main([*flags(run), "--what", "nmi"])
