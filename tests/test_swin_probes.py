"""Probes and diagnostics of a Swin: those that need nothing that it lacks run, the others refuse in
one sentence."""
import json

import pytest
import torch
from small_models import make_model, make_options

import analysis
import evaluate
import moby
from lib import checkpoint_heads, checkpoints, config, swin
from lib.init_from import InitialWeights
from probes import detection


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
    assert checkpoint_heads.projector(net) is None


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
    with pytest.raises(ValueError, match=f"^{task}.* needs a ViT.*is a Swin") as error:
        evaluate.main([*flags(run), "--task", task])
    assert "\n" not in str(error.value)


def test_a_window_is_refused(run):
    with pytest.raises(ValueError, match="is a Swin, which has windows of its own"):
        evaluate.main([*flags(run), "--task", "knn", "--window", "3"])


def test_linear_segmentation_of_a_swin_is_refused_before_any_work(run, monkeypatch):
    def begin(*_):
        """Must not be called."""
        pytest.fail("work has begun")

    monkeypatch.setitem(evaluate.TASKS, "knn", begin)
    with pytest.raises(ValueError, match="^linear_segmentation needs a ViT"):
        evaluate.main([*flags(run), "--task", "knn", "linear_segmentation"])


def test_detection_takes_the_four_stages_of_a_swin_as_they_are():
    torch.manual_seed(0)
    encoder = swin.Swin(64, 2, 16, (2, 1, 1, 1), (1, 2, 4, 8)).eval()
    recipe = detection.DETECTOR | detection.DETECTION_RECIPES["1x"] | detection.TOY_DETECTION
    net = detection.make_mask_rcnn(make_model(encoder, img_size=64), 3, recipe, 64).eval()
    pyramid, x = net.backbone, torch.randn(2, 3, 64, 64)
    assert pyramid.blocks == [0, 1, 2, 3] and not list(pyramid.scales.parameters())
    found, maps = pyramid(x), []
    pyramid.fpn.forward = lambda x: (maps.extend(x.values()), x)[1]
    pyramid(x)
    for z, tokens in zip(maps, encoder.layers(x, norm=False)[0], strict=True):
        assert torch.equal(z.flatten(2).mT, tokens)
    assert [z.shape[2] for z in found.values()] == [32, 16, 8, 4, 2]
    assert net.roi_heads.box_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    assert [sizes[0] for sizes in net.rpn.anchor_generator.sizes] == [16, 32, 64, 128, 256]
    assert net.transform.size_divisible == 32
    del pyramid.fpn.forward
    groups = detection.parameter_groups(net, recipe)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    [predicted, _] = net(list(torch.rand(2, 3, 64, 64)))
    assert {"boxes", "labels", "scores", "masks"} <= predicted.keys()
    for changes in (dict(recipe="vitdet"), dict(recipe="100ep")):
        opt = make_options("detection", "--recipe", changes["recipe"], data="toy-scenes")
        with pytest.raises(ValueError, match="^detection .*needs a ViT"):
            detection.detection(make_model(encoder), opt)


def test_a_run_does_not_start_from_a_swin(run):
    cfg = config.parse(moby.Config, ["--init-from", str(run / "encoder.pt")])
    with pytest.raises(ValueError, match="the file has a Swin"):
        InitialWeights(cfg)


def test_analysis_refuses_in_one_sentence(run):
    with pytest.raises(ValueError, match="analysis.py needs a ViT"):
        analysis.main([*flags(run), "--what", "nmi"])
