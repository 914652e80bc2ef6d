"""evaluate.py: flags, tables, files, --task all, user errors, and every task of classification,
retrieval and robustness once from the command line."""
import ast
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from small_models import make_encoder, make_model

import evaluate
import mmc
import moco_v3
import vit
from lib import augment, checkpoints, config, datasets, flags, metrics, toy
from probes import annotations, common, heads, plan
from probes.common import UNTRAINED, Options, Report, extract_features

ROOT = Path(evaluate.__file__).parent
EPOCHS = next(f.metadata["only_for"] for f in dataclasses.fields(Options) if f.name == "epochs")


def save_run(folder, name, mtime, **info):
    """A run's folder with an encoder of random weights, written at a given time."""
    (folder / name).mkdir(parents=True)
    path = folder / name / "encoder.pt"
    info = {"method": name, "data": "toy", "branch": "teacher", **info}
    checkpoints.save_encoder(path, make_encoder(depth=5), **info)
    os.utime(path, (mtime, mtime))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's folder: MoCo v3's network with random weights, and its heads."""
    torch.manual_seed(0)
    flags = ("--data imagenet --img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 2 "
             "--mlp-dim 32 --out-dim 16")
    cfg = config.parse(moco_v3.Config, flags.split())
    network, path = moco_v3.Network(cfg).eval(), tmp_path_factory.mktemp("run") / "encoder.pt"
    heads = {name: getattr(network, name).state_dict() for name in ("projector", "predictor")}
    checkpoints.save_encoder(path, network.backbone, branch="base", method="moco_v3", data="toy",
                             heads=heads)
    return path


def run(tmp_path, *flags):
    """The lines that `python evaluate.py --limit 30 ...` appends to its JSON file."""
    evaluate.main(["--limit", "30", "--device", "cpu", "--out", str(tmp_path), *flags])
    return [json.loads(line) for file in tmp_path.rglob("*.jsonl") for line in file.open()]


def run_checkpoint(out, paths, *flags):
    """The same of these checkpoints, with one epoch of training, into one file."""
    trains = {"all", *EPOCHS} & {*flags}
    evaluate.main(["--device", "cpu", "--out", str(out), "--workers", "0", "--limit", "40",
                   *["--epochs", "1"] * bool(trains), "--json", str(out / "all.jsonl"),
                   "--precision", "fp32", "--checkpoint", *map(str, paths), *flags])
    return [json.loads(line) for line in (out / "all.jsonl").open()]


def error_of(capsys, *flags):
    """The line that a user error prints to stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(list(flags)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ---- flags ---------------------------------------------------------------------------------------


def test_every_flag_is_for_all_tasks_or_for_some_that_exist():
    for_all = {f.name for f in dataclasses.fields(Options) if not f.metadata["only_for"]}
    assert for_all == set("""task checkpoint baseline branch num_heads normalization data data_root
                          img_size limit out json seed device precision batch_size workers cache
                          reference window""".split())
    for f in dataclasses.fields(Options):
        assert set(f.metadata["only_for"]) <= set(evaluate.TASKS)


def test_flags_become_a_frozen_dataclass():
    @dataclasses.dataclass(frozen=True)
    class Few:
        n: int | None = flags.flag(None, "a number", at_least=1)
        names: tuple[str, ...] = flags.flag((), "several")
        rate: tuple[float, ...] = flags.flag((0.5,), "several", only_for=("a", "b"))
        kind_of: str = flags.flag("x", "a choice of 100 %", choices=("x", "y"), group="more")
        show: bool = flags.flag(False, "a switch")

    assert flags.parse_flags(Few, []) == Few(None, (), (0.5,), "x", False)
    argv = ["--n", "3", "--names", "p_q", "r", "--rate", "1e-3", "--kind_of=y", "--show"]
    opt = flags.parse_flags(Few, argv)
    assert opt == Few(3, ("p_q", "r"), (0.001,), "y", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        opt.n = 4
    flags.refuse_unused(opt, ["a"])
    flags.refuse_unused(opt, ["c", "a"])
    with pytest.raises(ValueError, match="c does not use --rate: leave it out"):
        flags.refuse_unused(opt, ["c"])
    with pytest.raises(ValueError, match="c and d do not use --rate: leave it out"):
        flags.refuse_unused(opt, ["c", "d"])


def test_help_names_the_tasks_that_use_a_flag(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--k K [K ...] knn: numbers of neighbors [10 20]" in text
    assert "knn k-nearest-neighbor classification" in text and "--img-size" in text


# ---- one task ------------------------------------------------------------------------------------


def test_without_a_run_an_untrained_model_is_evaluated(tmp_path, capsys):
    [line] = run(tmp_path)
    text = capsys.readouterr().out
    assert "no run in" in text and "python mmc.py" in text
    assert line["model"] == "untrained" and line["checkpoint"] is None and line["task"] == "knn"
    assert set(line["metrics"]) == {"cls", "patch", "hyber"}
    assert set(line["metrics"]["cls"]) == {"k=10", "k=20"}
    assert line["images"] == {"train": 30, "test": 30} and line["settings"]["limit"] == 30
    for words in ("cosine", "0.07", "last block", "final norm", "48 px", "whole image"):
        assert words in line["protocol"] and words in text


@pytest.mark.parametrize("task", ["knn", "part_retrieval", "zero_shot_segmentation"])
def test_attention_within_windows_is_in_the_protocol_of_every_task(tmp_path, task):
    baselines = ["--baseline", "untrained", *["pixels"] * (task == "knn")]
    whole = run(tmp_path / "whole", "--task", task, *baselines)
    for line in whole + run(tmp_path / "window", "--task", task, "--window", "1", *baselines):
        windowed = line["settings"]["window"] == 1 and line["model"] == "untrained"
        assert windowed == ("attention within 1 x 1 patches" in line["protocol"])


def test_attention_within_windows_changes_features():
    models = [common.load_models(Options(baseline=("untrained",), window=window, device="cpu"))[0]
              for window in (None, 1)]
    x = torch.randn(2, 3, 48, 48)
    assert not torch.allclose(*(model.encoder(x) for model in models), atol=1e-3)


def test_the_newest_run_is_evaluated_and_results_are_written_next_to_it(tmp_path):
    save_run(tmp_path, "old", 1000)
    save_run(tmp_path, "new", 2000)
    [line] = run(tmp_path)
    assert line["model"] == line["method"] == "new" and line["branch"] == "teacher"
    assert (tmp_path / "new" / "results.jsonl").exists()
    assert "32 px" in line["protocol"]                                    # its own image size
    assert line["settings"]["data"] == "toy" and line["settings"]["device"] == "cpu"
    assert line["settings"]["precision"] in ("bf16", "fp32")              # not auto


def test_the_last_line_names_each_file_once(tmp_path, capsys):
    files = [save_run(tmp_path, name, 1000).parent / "results.jsonl" for name in "ab"]
    run(tmp_path, "--checkpoint", *(str(file.parent) for file in files), "--baseline", "pixels")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f" s, results appended to {files[0]}, {files[1]}")


def test_checkpoints_and_baselines_are_rows_of_one_table(tmp_path, capsys):
    a, b = (save_run(tmp_path, name, 1000) for name in "ab")
    file = tmp_path / "all.jsonl"
    lines = run(tmp_path, "--checkpoint", str(a.parent), str(b), "--json", str(file),
                "--baseline", "pixels", "untrained", "--k", "3", "900")
    assert [line["model"] for line in lines] == ["a", "b", "pixels", "untrained"]
    assert set(lines[2]["metrics"]) == {"pixels"} and "k=30" in lines[0]["metrics"]["patch"]
    assert lines[0]["metrics"] == lines[1]["metrics"]                     # equal weights
    text = capsys.readouterr().out
    assert "note: k is at most 30, the number of training images" in text
    table = text[text.index("\nmodel"):].splitlines()[1:12]
    assert len({len(row) for row in table}) == 1                          # aligned
    assert [row.split()[0] for row in table[1:]] == [
        "a", "patch", "hyber", "b", "patch", "hyber", "pixels", "untrained", "patch", "hyber"]


def test_the_untrained_network_is_that_of_mmc_on_toy():
    cfg = config.parse(mmc.Config, [])
    assert UNTRAINED == {name: getattr(cfg, name) for name in UNTRAINED}


def test_knn_in_the_results_is_knn_of_the_features(tmp_path):
    [line] = run(tmp_path, "--precision", "fp32", "--seed", "5", "--k", "7")
    torch.manual_seed(5)
    encoder = vit.ViT(**UNTRAINED).eval()
    splits = [toy.draw(torch.arange(30), split, 48) for split in ("train", "test")]
    with torch.no_grad():
        bank, queries = (encoder(augment.normalize(s["image"].float() / 255))[:, 0]
                         for s in splits)
    found = metrics.knn(bank, splits[0]["label"], queries, k=(7,))[7]
    accuracy = 100 * (found == splits[1]["label"]).double().mean().item()
    assert line["metrics"]["cls"]["k=7"] == pytest.approx(accuracy)


@pytest.mark.parametrize("recipe, feature", [("mae", "cls"), ("dino", "3 x cls"),
                                             ("park", "patch"), ("logreg", "cls")])
def test_linear_runs_with_every_recipe_and_is_deterministic(tmp_path, monkeypatch, recipe, feature):
    monkeypatch.setattr(heads, "C_VALUES", (1e-2, 1.0))
    flags = ["--task", "linear", "--recipe", recipe, *["--epochs", "2"] * (recipe != "logreg")]
    one, two = run(tmp_path, *flags) and run(tmp_path, *flags)
    assert one["metrics"] == two["metrics"] and set(one["metrics"]) == {feature}
    assert set(one["metrics"][feature]) == {"top-1", "top-5"}
    assert "chosen by 5 folds of the training images" in one["protocol"]
    assert ("untrained: C " if recipe == "logreg" else " at batch 256: ") in one["notes"][0]
    assert "% (standard error) in 5 folds" in one["notes"][0]


@pytest.mark.parametrize("crop", ["code", pytest.param("paper", marks=pytest.mark.slow)])
def test_part_retrieval_runs_and_writes_its_crops(tmp_path, crop):
    [line] = run(tmp_path, "--task", "part_retrieval", "--show", "--crop", crop)
    assert set(line["metrics"]) == {"cls", "patch"} and line["images"]["crops"] > 10
    grid = Image.open(tmp_path / "part_crops-toy.png")
    assert grid.width > 16 * 48 and grid.height > 4 * 48


@pytest.mark.parametrize("task, flags, features", [
    ("layerwise", ["--paper-lr"], {"block 1 patch", "block 2 patch"}),
    ("attentive", ["--bn", "batch"], {"tokens"}),
    ("object_retrieval", [], {"cls", "patch", "projected"}),
    ("object_retrieval", ["--data", "toy-scenes", "--limit", "20"], {"cls", "patch", "projected"}),
    ("part_retrieval", ["--limit", "12"], {"cls", "patch", "projected"}),
    ("part_classification", ["--limit", "15"], {"cls", "patch", "projected"}),
    ("part_classification", ["--limit", "15", "--head", "attentive"], {"tokens"}),
    ("landmark_retrieval", ["--img-size", "32", "--limit", "6"], {"cls"}),
    ("landmark_retrieval", ["--data", "toy-scenes", "--limit", "4", "--multiscale"],
     {"multiscale"}),
    ("frequency_noise", [], {"patch"}),
    ("knn", ["--feature", "projected"], {"projected"}),
])
def test_every_task_runs_offline(tmp_path, checkpoint, task, flags, features):
    [line] = run_checkpoint(tmp_path, [checkpoint], "--task", task, *flags)
    assert set(line["metrics"]) == features and line["task"] == task
    for row in line["metrics"].values():
        assert all(-100 <= value <= 100 for value in row.values())


def test_few_shot_runs_on_toy_offline(tmp_path, checkpoint):
    [line] = run_checkpoint(tmp_path, [checkpoint], "--task", "few_shot", "--limit", "600",
                            "--episodes", "30")
    assert set(line["metrics"]["cls"]) >= {"accuracy", "+-", "F1", "T x 100", "F1 0.1", "F1 0.9"}


def test_a_model_without_class_token_gets_a_note(tmp_path):
    (tmp_path / "r").mkdir()
    checkpoints.save_encoder(tmp_path / "r" / "encoder.pt", make_encoder(class_token=False),
                             data="toy")
    [line] = run(tmp_path)
    assert line["notes"] == ["r has no class token: cls is its mean patch token"]
    assert line["metrics"]["cls"] == line["metrics"]["patch"]
    *_, line = run(tmp_path, "--task", "video", "--limit", "1")          # uses patches only
    assert line["task"] == "video" and not any("class token" in note for note in line["notes"])


def test_joint_normalization_of_hyber_is_in_the_protocol(tmp_path, monkeypatch):
    flags = ["--k", "3", "--json", str(tmp_path / "all.jsonl"), "--hyber-norm"]
    *_, separate = run(tmp_path, *flags, "separate")
    *_, joint = run(tmp_path, *flags, "joint")
    assert joint["protocol"] == (
        separate["protocol"] + "; hyber: cls and patch concatenated, then L2-normalized")
    monkeypatch.setattr(evaluate, "FROZEN", ["knn"])      # --task all does not refuse the flag
    *_, cls = run(tmp_path, *flags, "joint", "--feature", "cls", "--task", "all")
    assert cls["protocol"] == separate["protocol"]       # no hyber in it


def test_a_task_is_a_function_and_a_line(tmp_path, monkeypatch):
    def brightness(model, opt):
        """Fraction of bright images."""
        found, _, _ = extract_features(model, opt, "test", ["patch"])
        fraction = (found["patch"].mean(1) > 0).double().mean().item()
        return Report({"patch": {"bright": 100 * fraction}}, "mean above 0", dict(test=30))

    monkeypatch.setitem(evaluate.TASKS, "brightness", brightness)
    [line] = run(tmp_path, "--task", "brightness")
    assert 0 <= line["metrics"]["patch"]["bright"] <= 100 and line["protocol"] == "mean above 0"


def test_numbers_that_are_not_finite_are_null_in_the_results(tmp_path, monkeypatch):
    def undefined(model, opt):
        """No query has a positive."""
        return Report({"cls": {"mAP": math.nan, "mP@10": 50.0}}, "no positives", dict(test=30))

    monkeypatch.setitem(evaluate.TASKS, "undefined", undefined)
    [line] = run(tmp_path, "--task", "undefined")
    assert line["metrics"] == {"cls": {"mAP": None, "mP@10": 50.0}}
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()


def test_the_name_of_a_model_can_be_printed_whatever_its_folder_is_called(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    save_run(tmp_path, name, 0)
    [line] = run(tmp_path, "--task", "knn", "--workers", "0")
    assert line["model"] == "caf\\udce9" and line["checkpoint"].endswith(f"{name}/encoder.pt")


# ---- cache ---------------------------------------------------------------------------------------


def test_cached_features_are_those_that_were_encoded(tmp_path, checkpoint, monkeypatch):
    [plain] = run_checkpoint(tmp_path, [checkpoint], "--task", "knn")
    *_, first = run_checkpoint(tmp_path, [checkpoint], "--task", "knn", "--cache")
    files = sorted((tmp_path / "features").iterdir())
    assert len(files) == 2 and first["metrics"] == plain["metrics"]    # train and test
    with monkeypatch.context() as patched:
        patched.setattr(vit.ViT, "forward", lambda *a: pytest.fail("encoded again"))
        *_, again = run_checkpoint(tmp_path, [checkpoint], "--task", "knn", "--cache")
        assert again["metrics"] == plain["metrics"]
    run_checkpoint(tmp_path, [checkpoint], "--task", "knn", "--cache", "--limit", "30")
    assert len(list((tmp_path / "features").iterdir())) == 4           # other images


def test_the_cache_distinguishes_the_seed_of_the_crops_of_toy_landmarks(tmp_path, checkpoint):
    flags = "--task", "landmark_retrieval", "--img-size", "32", "--limit", "4", "--seed"
    for more in ("0", "--cache"), ("1", "--cache"), ("1",):
        run_checkpoint(tmp_path, [checkpoint], *flags, *more)
    first, cached, plain = (json.loads(line)["metrics"] for line in (tmp_path / "all.jsonl").open())
    assert cached == plain != first


# ---- all tasks -----------------------------------------------------------------------------------


def record_limits(monkeypatch, task):
    """Replaces a task by one that only records its --limit."""
    limits = []

    def record(model, opt):
        """Records --limit."""
        limits.append(opt.limit)
        return Report({"cls": {"k=10": 1.0}}, "")

    monkeypatch.setitem(evaluate.TASKS, task, record)
    return limits


def test_all_limits_the_images_of_toy_and_of_no_folder_named_similarly():
    limits = [evaluate.options_for_task(Options(task=("all",), data=name), "knn").limit
              for name in ("toys", "toy-scenes")]
    assert limits == [None, evaluate.ALL_IMAGES]


def test_limits_of_all_on_toy(tmp_path, checkpoint, monkeypatch):
    limits = record_limits(monkeypatch, "part_retrieval")
    monkeypatch.setattr(evaluate, "FROZEN", ["part_retrieval", "knn"])
    monkeypatch.setattr(evaluate, "ALL_IMAGES", 40)
    flags = ["--device", "cpu", "--out", str(tmp_path), "--workers", "0", "--checkpoint",
             str(checkpoint), "--json", str(tmp_path / "all.jsonl"), "--task"]
    for task in ("part_retrieval", "all"):
        evaluate.main([*flags, task])
    evaluate.main([*flags, "all", "--limit", "30"])
    assert limits == [None, evaluate.ALL_LIMITS["part_retrieval"], 30]
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").open()]
    assert [line["images"] for line in lines if line["task"] == "knn"] == [
        dict(train=40, test=40), dict(train=30, test=30)]


def test_all_prints_its_plan_first_and_each_task_when_it_is_finished(tmp_path, checkpoint, capsys,
                                                                     monkeypatch):
    monkeypatch.setattr(evaluate, "FROZEN", ["knn", "attentive", "object_retrieval"])
    printed, knn = [], evaluate.TASKS["knn"]

    def record(model, opt):
        """knn, and what was printed before it."""
        printed.append(capsys.readouterr().out)
        return knn(model, opt)

    monkeypatch.setitem(evaluate.TASKS, "knn", record)
    run_checkpoint(tmp_path, [checkpoint], "--task", "all", "--baseline", "pixels")
    name = checkpoint.parent.name
    for model, tasks in ((name, "knn attentive object_retrieval"),
                         ("pixels", "knn object_retrieval")):
        [plan] = [line for line in printed[0].splitlines() if line.startswith(f"{model} on toy")]
        assert [part.split()[0] for part in plan.split(": ")[1].split(", ")] == tasks.split()
        assert all(float(part.split()[1]) < 1 for part in plan.split(": ")[1].split(", "))
    assert "5 tasks, about 1 minutes in all\n" in printed[0]
    assert f"{name}: knn, " in printed[1] and " s; k=10 (%): cls " in printed[1]


def test_all_prints_no_plan_of_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "FROZEN", ["attentive"])
    with pytest.raises(ValueError, match="pixels have none"):
        evaluate.main(["--task", "all", "--baseline", "pixels", "--device", "cpu", "--data", "toy",
                       "--out", str(tmp_path)])
    assert "minutes" not in capsys.readouterr().out


def test_ctrl_c_leaves_the_finished_tasks_of_all(tmp_path, checkpoint, capsys, monkeypatch):
    def interrupted(model, opt):
        """Is interrupted by Ctrl-C."""
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "FROZEN", ["knn", "few_shot", "object_retrieval"])
    monkeypatch.setitem(evaluate.TASKS, "few_shot", interrupted)
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: run_checkpoint(tmp_path, [checkpoint], "--task", "all"))
    out, err = capsys.readouterr()
    name = checkpoint.parent.name
    assert stop.value.code == 130
    assert err == (f"interrupted during few_shot of {name}: 1 of 3 tasks are done, and their "
                   f"results are above\n")
    assert "\ntask  feature" in out and "knn" in out.split("\ntask  feature")[1]
    assert [json.loads(line)["task"] for line in (tmp_path / "all.jsonl").open()] == ["knn"]


def test_pose_of_cub_is_refused_before_any_work():
    model, opt = make_model(make_encoder()), evaluate.parse(["--task", "pose", "--data", "cub"])
    with pytest.raises(ValueError, match="pose needs keypoints and object areas, and cub does"):
        evaluate.check_fit("pose", model, opt)


def no_result(model, opt):
    """Nothing."""
    return Report({"patches": {"AP": 1.0}}, "")


def test_pose_on_coco_is_left_out_of_all_and_runs_alone(monkeypatch, tmp_path):
    """--iters 20 is also what --task all would take."""
    monkeypatch.setattr(annotations, "keypoints", lambda *_, **__: iter(()))
    monkeypatch.setattr(evaluate, "FROZEN", ["pose"])
    monkeypatch.setitem(evaluate.TASKS, "pose", no_result)
    monkeypatch.setattr(evaluate, "print_plan", lambda *_: None)
    models = [make_model(make_encoder())]

    def run(*flags):
        opt = evaluate.parse(["--data", "coco", "--json", str(tmp_path / "all.jsonl"), *flags])
        results, notes, _, failure = evaluate.run_tasks(opt, models, True)
        return len(results), " ".join(notes), failure

    assert run("--task", "pose", "--iters", "20") == (1, "", None)
    assert run("--task", "all", "--iters", "20") == (1, "", None)
    left_out, notes, _ = run("--task", "all")
    assert left_out == 0 and "too long for --task all: run --task pose alone, or give" in notes


def test_all_uses_logistic_regressions_and_short_training(monkeypatch):
    def options(task, *flags, data="imagenet"):
        return evaluate.options_for_task(evaluate.parse(["--task", "all", "--data", data, *flags]),
                                         task)

    for task in evaluate.LOGREG:
        assert options(task).recipe == "logreg" and options(task).epochs is None
        assert options(task, "--epochs", "3").recipe is None
        assert options(task, "--recipe", "dino").recipe == "dino"
    assert options("attentive").epochs == evaluate.ALL_EPOCHS
    assert options("part_classification", "--head", "attentive").recipe is None

    def dense(*flags, data="coco"):
        opt = options("linear_segmentation", *flags, data=data)
        return opt.iters, opt.limit, opt.lr, opt.img_size, opt.train_batch_size

    assert dense() == (20, 50, (2e-3, 1e-2, 5e-2), 256, 4)
    assert dense("--iters", "7", "--limit", "9", "--lr", "1", "--img-size", "96",
                 "--train-batch-size", "2") == (7, 9, (1.0,), 96, 2)
    assert dense(data="toy") == (None, None, (), None, None)
    assert options("knn").limit is None


def test_the_estimate_grows_with_images_and_size(monkeypatch):
    monkeypatch.setattr(plan, "load_split", lambda *_: range(1000))
    model = make_model(make_encoder())
    opt = evaluate.parse(["--task", "all", "--data", "pets", "--iters", "10", "--limit", "20"])
    time_image = {32: 0.09, 480: 0.59}.get               # and 0.01 to read a file
    for name, seconds in (("pets", 0.1), ("cifar10", 0.09)):                     # in memory
        assert plan.estimate_seconds("knn", model, dataclasses.replace(opt, data=name),
                                     time_image) == pytest.approx(2000 * seconds)
    assert plan.estimate_seconds("linear_segmentation", model, opt, time_image) == pytest.approx(
        (16 * 10 + 3 * 20) * 0.6 + 16 * 10 * 480**2 * 50 * 5e-8)       # with the logits
    assert plan.estimate_seconds("few_shot", model, opt, time_image) == 0
    monkeypatch.setattr(plan, "head_flops", lambda *_: 0)
    for name, seconds in (("toy", 1000 * 0.09), ("imagenet", 1280 * 0.1)):   # cue-conflict images
        found = plan.estimate_seconds("shape_bias", model, dataclasses.replace(opt, data=name),
                                      time_image)
        assert found == pytest.approx(seconds)
    assert plan.seconds_per_image(model, 64) > 0 == plan.seconds_per_image(make_model(None), 64)


def test_tasks_of_all_share_features_and_give_the_results_of_the_tasks_alone(
        tmp_path, checkpoint, monkeypatch):
    tasks = "knn linear object_retrieval shape_bias frequency_noise".split()
    monkeypatch.setattr(evaluate, "FROZEN", tasks)
    monkeypatch.setattr(heads, "C_VALUES", (1e-2, 1.0))
    passes, original = {}, common.encode_once

    def record(model, opt, *rest):
        passes[opt.task] = passes.get(opt.task, 0) + 1
        return original(model, opt, *rest)

    monkeypatch.setattr(common, "encode_once", record)

    def results(task, *flags):
        run(tmp_path / task, "--checkpoint", str(checkpoint), "--json", f"{tmp_path}/{task}.jsonl",
            "--task", task, *flags)
        lines = [json.loads(line) for line in (tmp_path / f"{task}.jsonl").open()]
        return {line["task"]: line["metrics"] for line in lines}

    together = results("all")
    # train and test; projected features of test; cue-conflict images; eleven bands of noise
    assert passes == dict(knn=2, object_retrieval=1, shape_bias=1, frequency_noise=11)
    for task in tasks:
        alone = results(task, *["--recipe", "logreg"] * (task in evaluate.LOGREG))
        assert alone == {task: together[task]}


def test_several_tasks_encode_common_images_once_and_print_a_table_each(
        tmp_path, checkpoint, capsys, monkeypatch):
    passes, original = [], common.encode_once

    def record(model, opt, *rest):
        passes.append(opt.task)
        return original(model, opt, *rest)

    monkeypatch.setattr(common, "encode_once", record)
    tasks = "knn", "linear", "knn", "object_retrieval", "zero_shot_segmentation"
    lines = run_checkpoint(tmp_path, [checkpoint], "--task", *tasks, "--recipe", "logreg")
    assert [line["task"] for line in lines] == ["knn", "linear", "object_retrieval",
                                                "zero_shot_segmentation"]
    assert {line["settings"]["task"] for line in lines} == {line["task"] for line in lines}
    assert passes == ["knn", "knn", "object_retrieval"]    # train and test; the projected features
    text = capsys.readouterr().out
    assert text.count("\nmodel ") == 4 and "estimated minutes" not in text
    assert all(f"{checkpoint.parent.name}: {task}, " in text for task in tasks)


def test_only_the_attentive_tasks_of_all_are_not_logistic_regressions():
    opt = evaluate.parse(["--task", "all", "--head", "attentive"])
    recipes = {task: evaluate.options_for_task(opt, task).recipe for task in evaluate.LOGREG}
    assert recipes.pop("part_classification") is None and set(recipes.values()) == {"logreg"}


def test_all_files_of_results_are_opened_before_any_work(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setitem(evaluate.TASKS, "knn", Mock(side_effect=AssertionError("work")))
    monkeypatch.setattr(evaluate, "result_files", lambda *_: [tmp_path / "a", Path("/dev/null/b")])
    with pytest.raises(OSError, match="cannot write /dev/null/b"):
        evaluate.main(["--device", "cpu", "--checkpoint", str(checkpoint), "--baseline", "pixels",
                       "--task", "knn", "--out", str(tmp_path)])


def test_test_images_of_classes_without_training_images_are_counted(tmp_path, capsys):
    datasets.print_once.cache_clear()
    for path in ("train/a/1", "train/b/1", "val/a/2", "val/b/2", "val/b/3", "val/c/2"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), path[-3] == "a" and "red" or "blue").save(tmp_path / f"{path}.png")
    run(tmp_path / "out", "--data", str(tmp_path), "--baseline", "pixels", "--workers", "0")
    assert "note: 1 of 4 test images are of classes without a training image, and cannot be right" \
        in capsys.readouterr().out


@pytest.mark.parametrize("error, done", [(ValueError("no shots"), ["knn", "object_retrieval"]),
                                         (RuntimeError("a bug"), ["knn"])])
def test_an_error_in_one_of_several_tasks_keeps_what_is_done(
        tmp_path, checkpoint, capsys, monkeypatch, error, done):
    """A user error does not stop the other tasks. All others end the run."""
    monkeypatch.setitem(evaluate.TASKS, "few_shot", Mock(side_effect=error))
    with pytest.raises(type(error), match=str(error)) as caught:
        run_checkpoint(tmp_path, [checkpoint], "--task", "knn", "few_shot", "object_retrieval")
    assert "run_tasks" in {entry.name for entry in caught.traceback}     # where it was raised
    text = capsys.readouterr().out
    assert text.count("\nmodel ") == len(done)
    assert f"{checkpoint.parent.name}: few_shot failed: no shots" in text or len(done) == 1
    lines = map(json.loads, next(tmp_path.glob("*.jsonl")).read_text().splitlines())
    assert [line["task"] for line in lines] == done


def test_numbers_of_images_that_differ_are_given_for_each_model(capsys):
    models = [SimpleNamespace(precision="fp32", device=torch.device("cpu"))]
    for numbers, words in (((9, 9), "9 targets"), ((9, 8), "a: 9 targets; b: 8 targets")):
        reports = [Report({"cls": {"k": 1.0}}, "", {"targets": n}) for n in numbers]
        results = [evaluate.Result("knn", *pair) for pair in zip("ab", reports)]
        evaluate.print_results(Options(task=("knn",), data="toy"), models, results, [])
        assert f"knn on toy ({words}), fp32" in capsys.readouterr().out


def test_results_follow_an_incomplete_line_on_a_line_of_their_own(tmp_path, checkpoint):
    file = tmp_path / "all.jsonl"
    file.write_text('{"task": "kn')                      # its process was killed
    flags = [checkpoint], "--task", "knn"
    with pytest.raises(json.JSONDecodeError):            # of this line
        run_checkpoint(tmp_path, *flags)
    broken, line = file.read_text().splitlines()
    assert broken == '{"task": "kn' and json.loads(line)["task"] == "knn"


def test_results_can_be_written_into_a_pipe():
    read, write = os.pipe()
    evaluate.append(Path(f"/dev/fd/{write}"), '{"task": "knn"}\n')
    os.close(write)
    with open(read) as file:
        assert json.load(file) == {"task": "knn"}


def test_results_are_not_appended_to_other_files(tmp_path, checkpoint):
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="encoder.pt is not a file of results: name another"):
        evaluate.main(["--checkpoint", str(checkpoint), "--json", str(checkpoint), "--device",
                       "cpu", "--out", str(tmp_path)])
    assert checkpoint.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is of Linux")
def test_on_a_full_disk_the_results_are_printed(tmp_path, capsys):
    flags = "--task knn --limit 30 --baseline pixels --device cpu --json /dev/full --out"
    with pytest.raises(OSError, match=r"write /dev/full \(No space left on device\); name a file"):
        evaluate.main([*flags.split(), str(tmp_path)])       # not out/, where a user has runs
    assert "\npixels " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--show", "--task", "part_retrieval"),
                                   ("--save", "--task", "finetune")])
def test_an_output_folder_that_is_read_only_is_refused_before_any_work(
        tmp_path, checkpoint, monkeypatch, flags):
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))      # as not root
    monkeypatch.setitem(evaluate.TASKS, flags[-1], Mock())
    with pytest.raises(OSError, match="cannot write to .*Permission denied.; choose another --out"):
        evaluate.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--out", str(tmp_path),
                       "--json", str(tmp_path / "a.jsonl"), *flags])
    evaluate.TASKS[flags[-1]].assert_not_called()


def test_a_broken_checkpoint_does_not_stop_the_comparison_with_others(
        tmp_path, checkpoint, capsys):
    broken = tmp_path / "broken" / "encoder.pt"
    broken.parent.mkdir()
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["norm.weight"][0] = math.nan
    torch.save(content, broken)
    with pytest.raises(ValueError, match="broken: its weights are not finite: leave it out"):
        run_checkpoint(tmp_path, [broken, checkpoint], "--task", "knn")
    [line] = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert line["model"] == checkpoint.parent.name and "\nmodel " in capsys.readouterr().out


def test_the_folder_of_a_run_has_a_name_also_from_within(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    [line] = run_checkpoint(tmp_path, ["."], "--task", "knn")
    assert line["model"] == checkpoint.parent.name


def test_all_caches_files_only_if_asked(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "FROZEN", ["knn", "attentive"])
    run_checkpoint(tmp_path, [checkpoint], "--task", "all")
    assert not (tmp_path / "features").exists()
    run_checkpoint(tmp_path, [checkpoint], "--task", "all", "--cache")
    assert len(list((tmp_path / "features").iterdir())) == 4               # train and test


@pytest.mark.parametrize("task", ["knn", "linear", "part_retrieval", "part_classification",
                                  "attentive", "zero_shot_segmentation", "video"])
def test_protocols_tell_whether_a_norm_follows_the_last_block(tmp_path, task):
    """An encoder without one, as SelfPatch's, is used as it is."""
    for final_norm, words in ((True, "after the final norm"), (False, "without final norm")):
        folder = tmp_path / str(final_norm)
        folder.mkdir()
        encoder = make_encoder(img_size=48, final_norm=final_norm)
        checkpoints.save_encoder(folder / "encoder.pt", encoder, method="mae", data="toy")
        [line] = run_checkpoint(folder, [folder / "encoder.pt"], "--task", task, "--limit", "2",
                                *["--limit", "40"] * (task in EPOCHS or task == "knn"))
        assert words in line["protocol"]


@pytest.mark.parametrize("method, noted", [("simmim", True), ("beit", True), ("cae", True),
                                           ("mae", False), ("dino", False)])
def test_a_class_token_that_no_loss_used_is_noted(tmp_path, method, noted):
    checkpoints.save_encoder(tmp_path / "encoder.pt", make_encoder(img_size=48), method=method,
                             data="toy")
    flags = [tmp_path / "encoder.pt"], "--task", "linear", "--recipe"
    *_, line = run_checkpoint(tmp_path, *flags, "mae")
    assert noted == any("does not use the class token" in note for note in line["notes"])
    *_, line = run_checkpoint(tmp_path, *flags, "mae", "--feature", "patch")
    assert not any("does not use the class token" in note for note in line["notes"])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_bilinear_resizing_is_in_the_protocol(tmp_path, interpolation):
    checkpoints.save_encoder(tmp_path / "encoder.pt", make_encoder(img_size=48), data="toy",
                             interpolation=interpolation)
    [line] = run_checkpoint(tmp_path, [tmp_path / "encoder.pt"])
    assert ("bilinear" in line["protocol"]) == (interpolation == "bilinear")


def test_all_prints_one_table_and_why_tasks_were_skipped(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "FROZEN", ["knn", "object_retrieval", "attentive", "classify"])
    lines = run_checkpoint(tmp_path, [checkpoint], "--task", "all", "--baseline", "pixels",
                           "--reference")
    text = capsys.readouterr().out
    assert [line["task"] for line in lines] == ["knn", "object_retrieval", "attentive", "knn",
                                                "object_retrieval"]
    name = checkpoint.parent.name
    assert f"note: {name}: skipped classify: {name} contains no classifier" in text
    assert "note: pixels: skipped attentive: needs tokens, and pixels have none\n" in text
    head = next(line for line in text.splitlines() if line.startswith("task"))
    assert head.split() == ["task", "feature", "number", name, "pixels"]
    assert ("knn: numbers of the papers, not measured here; none for toy, these are for other data "
            "sets\n") in text
    assert "last block, after the final norm" in lines[0]["protocol"]
    assert "norm" not in lines[3]["protocol"]                              # pixels
    assert "DINO (MMC, table 11; imagenet100)" in text


def test_all_has_shape_bias_on_toy_and_skips_it_on_toy_scenes(tmp_path, checkpoint, capsys,
                                                              monkeypatch):
    assert "shape_bias" in evaluate.FROZEN
    monkeypatch.setattr(evaluate, "FROZEN", ["knn", "shape_bias"])
    flags = "--task", "all", "--recipe", "logreg", "--data"
    lines = run_checkpoint(tmp_path / "a", [checkpoint], *flags, "toy")
    assert [line["task"] for line in lines] == ["knn", "shape_bias"]
    assert "skipped" not in capsys.readouterr().out
    [line] = run_checkpoint(tmp_path / "b", [checkpoint], *flags, "toy-scenes")
    assert line["task"] == "knn"
    text = capsys.readouterr().out
    assert "skipped shape_bias: no cue-conflict images of 'toy-scenes' here" in text
    assert "\n1 tasks, about" in text                      # known before any work


def test_the_last_line_has_every_feature_and_does_not_choose_one(capsys, tmp_path):
    rows = {"cls": {"k=10": 20.0, "k=20": 1.0}, "patch": {"k=10": 30.0}}
    drops = {"patch": {"mean drop": 3.25, "clean": 60.0}}
    models = [SimpleNamespace(precision="fp32", device=torch.device("cpu"))]
    for task, row, line in (("knn", rows, "m: knn, k=10 (%): cls 20.0, patch 30.0\n"),
                            ("frequency_noise", drops,
                             "m: frequency_noise, mean drop (points): patch 3.2\n")):
        opt = Options(task=(task,), data="toy", out=str(tmp_path))
        evaluate.print_results(opt, models, [evaluate.Result(task, "m", Report(row, ""))], [])
        assert capsys.readouterr().out.endswith(line)


def test_numbers_of_the_papers_for_the_data_set_come_alone(capsys):
    opt = Options(task=("knn",), data="cifar10", reference=True)
    models = [SimpleNamespace(precision="fp32", device=torch.device("cpu"))]
    evaluate.print_results(opt, models, [evaluate.Result("knn", "m", Report({"cls": {"k=10": 1.}},
                                                                            ""))], [])
    text = capsys.readouterr().out
    assert "not measured here\n" in text and "MMC (MMC, table 6; cifar10)" in text
    assert "imagenet100" not in text


def test_two_checkpoints_with_one_name_are_two_columns(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "FROZEN", ["knn"])
    other = tmp_path / checkpoint.parent.name / "encoder.pt"
    other.parent.mkdir()
    encoder = checkpoints.load_encoder(checkpoint, quiet=True)
    encoder.blocks[0].mlp.fc2.weight.data.add_(torch.randn(24, 96))
    checkpoints.save_encoder(other, encoder, data="toy")
    lines = run_checkpoint(tmp_path, [checkpoint, other], "--task", "all")
    name = checkpoint.parent.name
    assert [line["model"] for line in lines] == [name, f"{name} (2)"]
    table = capsys.readouterr().out.split("\ntask ")[1].splitlines()
    assert table[0].split() == ["feature", "number", name, name, "(2)"]
    numbers = [f"{line['metrics']['patch']['k=10']:.1f}" for line in lines]
    assert next(row for row in table if "patch" in row).split()[-2:] == numbers


def test_papers_have_numbers_for_all_tasks_and_data_sets(monkeypatch):
    monkeypatch.setattr(config, "read_yaml", functools.cache(config.read_yaml))
    papers = config.read_yaml(ROOT / "probes/papers.yaml")
    only_figures = {"layerwise", "shape_bias", "frequency_noise"}          # without a number
    assert set(papers) == set(evaluate.TASKS) - only_figures
    for task, tables in papers.items():
        for t in tables:
            for name, numbers in t["rows"].items():
                assert len(numbers) == len(t["columns"]), (task, name)
                assert all(n is None or 0 < n <= 100 for n in numbers), (task, name)
            found = {r.model.split("; ")[1] for r in evaluate.paper_results(task, t["data"])}
            assert found == {f"{t['data']})"}

    def rows(task, data, name):
        return [r.report.rows for r in evaluate.paper_results(task, data)
                if r.model.startswith(name)]

    assert rows("few_shot", "pets", "MMC (") == [{"cls": {"accuracy": 69.7, "F1": 62.1}}]
    assert rows("finetune", "imagenet100", "ASL, 4000") == [{"-": {"top-1": 94.2}}]
    assert rows("landmark_retrieval", "rparis6k", "DINO (") == [
        {"cls": {"medium mAP": 60.4, "hard mAP": 34.2}}]
    assert rows("object_retrieval", "coco", "MAE") == [{"encoded": {"AP": 13.8}}]     # no projected


# ---- user errors ---------------------------------------------------------------------------------


def test_an_error_at_a_later_model_leaves_the_table_of_the_earlier_ones(tmp_path, capsys,
                                                                        monkeypatch):
    save_run(tmp_path, "a", 1000)
    knn = evaluate.TASKS["knn"]

    def fail_on_pixels(model, opt):
        """knn, but not of pixels."""
        if not model.encoder:
            raise ValueError("the disk is full")
        return knn(model, opt)

    monkeypatch.setitem(evaluate.TASKS, "knn", fail_on_pixels)
    flags = ["--limit", "30", "--out", str(tmp_path), "--device", "cpu", "--checkpoint",
             str(tmp_path / "a"), "--baseline", "pixels"]
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(flags))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err == "error: the disk is full\n"
    assert "\nmodel  feature" in out and "\na: knn, k=10 (%): cls " in out
    assert f"appended to {tmp_path}/a/results.jsonl" in out


@pytest.mark.parametrize("task", ["attentive", "linear_segmentation", "pose", "finetune"])
def test_impossible_combinations_are_refused_before_any_work(tmp_path, capsys, monkeypatch, task):
    def begin(*_):
        """Must not be called."""
        pytest.fail("work has begun")

    monkeypatch.setitem(evaluate.TASKS, task, begin)
    error = error_of(capsys, "--task", task, "--baseline", "untrained", "pixels", "--out",
                     str(tmp_path), "--limit", "20", "--device", "cpu")
    assert f"{task} needs tokens, and pixels have none: leave out that --baseline" in error
    assert not (tmp_path / "results.jsonl").exists()


def test_a_folder_of_runs_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "mae-toy").mkdir()
    (tmp_path / "mae-toy/encoder.pt").touch()
    error = error_of(capsys, "--checkpoint", str(tmp_path), "--device", "cpu")
    assert f"is a folder of runs: choose one of them, such as {tmp_path / 'mae-toy'}" in error


def test_tasks_that_no_own_folder_can_serve_name_their_data_sets(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    error = error_of(capsys, "--task", "video", "--data", str(tmp_path), "--baseline", "untrained",
                     "--device", "cpu")
    assert "no videos are read from own folders: choose " in error and "davis" in error


@pytest.mark.parametrize("flags, expected", [
    (["--task", "lineer"], "unknown task 'lineer'; did you mean linear?"),
    (["--task", "knn", "linaer"], "unknown task 'linaer'; did you mean linear?"),
    (["--task", "all", "knn"], "--task all runs every task that fits: leave out the other names"),
    (["--task", "knn", "linear", "--iters", "9"], "knn and linear do not use --iters: leave it"),
    (["--chekpoint", "x"], "unknown flag --chekpoint; did you mean --checkpoint?"),
    (["--checkpoint", "nowhere.pt"], "no checkpoint file nowhere.pt"),
    (["--workers", "-1"], "expected an integer of at least 0, not '-1'"),
    (["--limit", "0"], "expected an integer of at least 1, not '0'"),
    (["--data", "toyy"], "did you mean 'toy'?"),
    (["--data", "synthetic"], "knn needs labels, and synthetic has none"),
    (["--json", "/dev/null/x.jsonl"], "cannot write /dev/null/x.jsonl ("),
    (["--img-size", "60"], "is not a multiple of patch size 8"),
    (["--window", "4"], "the window must be an odd number of patches, not 4"),
    (["--task", "detection", "--recipe", "vitdet", "--window", "3"],
     "recipe vitdet has windows of its own: leave out --window"),
    (["--task", "part_retrieval", "--data", "stl10"], "no keypoints in stl10; choose --data toy"),
    (["--task", "part_retrieval", "--parts", "hed"], "toy has no part 'hed'; did you mean head?"),
    (["--task", "part_retrieval", "--parts", "tail"], "tail is the only one: name two or more"),
    (["--task", "object_retrieval", "--data", "toy-scenes", "--limit", "2", "--min-side", "999"],
     "no box has sides of at least 999 px and at most 1.2 : 1: lower --min-side"),
    (["--task", "linear", "--limit", "9"], "9 are too few; raise --limit"),
    (["--task", "linear", "--paper-lr"], "add --recipe park"),
    (["--task", "linear", "--recipe", "simmim"], "choose --recipe mae, dino, park, logreg\n"),
    (["--task", "linear", "--recipe", "logreg", "--epochs", "5"], "recipe logreg has no epochs"),
    (["--task", "part_classification", "--head", "attentive", "--recipe", "logreg"],
     "the attentive head has no recipes: leave out --recipe"),
    (["--data", "voc"], "knn needs images with one class each, and voc has none"),
    (["--data", "voc", "--task", "few_shot"], "few_shot needs images with one class each, and voc"),
    (["--data", "voc", "--task", "attentive"], "attentive needs images with one class each, and"),
    (["--task", "finetune", "--lr", "1e-3", "1e-4"], "finetune takes one --lr at a time"),
    (["--task", "finetune", "--iters", "9"], "finetune does not use --iters: leave it out"),
    (["--task", "video", "--lr", "1e-3"], "video does not use --lr: leave it out"),
    (["--task", "segmentation", "--epochs", "9"], "segmentation does not use --epochs"),
    (["--task", "attentive", "--feature", "patch"], "attentive does not use --feature"),
    (["--task", "layerwise", "--recipe", "mae"], "layerwise has no recipe mae; choose --recipe"),
    (["--task", "linear", "--head", "attentive"], "linear does not use --head"),
    (["--task", "linear", "--reinit", "last:2"], "linear does not use --reinit"),
    (["--task", "linear", "--k", "5"], "linear does not use --k"),
    (["--paper-lr"], "knn does not use --paper-lr: leave it out"),
    (["--show"], "knn does not use --show: leave it out"),
    (["--task", "video", "--max-items", "9"], "video does not use --max-items: leave it out"),
    (["--feature", "cls", "--hyber-norm", "joint"], "--hyber-norm is for the feature hyber only"),
    (["--task", "linear", "--hyber-norm", "joint"], "--hyber-norm is for the feature hyber only"),
    (["--task", "part_classification", "--head", "attentive", "--feature", "cls"],
     "the attentive head takes all tokens: leave out --feature"),
    (["--task", "part_classification", "--bn", "batch"], "--bn is for the attentive head"),
    (["--task", "landmark_retrieval", "--crop-queries"], "queries of toy have no boxes"),
    (["--task", "landmark_retrieval", "--data", "roxford5k", "--limit", "9"],
     "roxford5k is always used as a whole: leave out --limit"),
    (["--task", "shape_bias", "--data", "toy-scenes"],
     "no cue-conflict images of 'toy-scenes' here, which shape_bias needs: choose --data toy, or"),
    (["--data", "toyy", "--task", "all"], "skipped knn, few_shot, linear"),
    (["--data", "davis", "--data-root", "x", "--task", "all"],
     "skipped knn, few_shot, linear, layerwise, attentive, object_retrieval, frequency_noise: "
     "needs images with one class each, and davis has none; untrained: skipped part_retrieval, "
     "part_classification: finds no keypoints in davis; untrained: skipped landmark"),
    (["--task", "part_retrieval", "--data", "cub", "--data-root", "x"], "No cub under x: expected"),
])
def test_user_errors_are_one_sentence(tmp_path, capsys, flags, expected):
    assert expected in error_of(capsys, "--out", str(tmp_path), "--device", "cpu", *flags)


def test_different_classes_in_train_and_test_are_an_error_of_all_that_train(tmp_path, capsys):
    for i, folder in enumerate(["train/a", "train/b", "train/c", "val/d", "val/e"]):
        (tmp_path / folder).mkdir(parents=True)
        image = torch.full((32, 32, 3), 40 * i, dtype=torch.uint8).numpy()
        Image.fromarray(image).save(tmp_path / folder / "0.png")
    flags = ["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--device", "cpu"]
    for task in ("knn", "linear", "layerwise", "attentive", "finetune"):
        error = error_of(capsys, "--task", task, *flags)
        assert f"{task} needs the same classes in both splits, and " in error
        assert "have different ones (3 and 2)" in error


def test_a_damaged_checkpoint_is_one_sentence(tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    assert "bad.pt is damaged" in error_of(capsys, "--checkpoint", str(tmp_path / "bad.pt"))


def test_no_method_is_imported():
    methods = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    files = [ROOT / "evaluate.py", *(ROOT / "probes").glob("*.py")]
    names = {a.name for file in files for node in ast.walk(ast.parse(file.read_text()))
             if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for file in files for node in ast.walk(ast.parse(file.read_text()))
              if isinstance(node, ast.ImportFrom)}
    assert len(methods) > 8 and {"data", "vit"} < names and not methods & names


# ---- several processes ---------------------------------------------------------------------------

SCRIPT = """
import sys, torch
import evaluate
import mmc
from lib import config, distributed
from probes import common

def single_batch(model, opt):
    "The second process has no batch."
    batches = common.own_items([(torch.ones(3, 3, 64, 64), torch.arange(3))])
    _, numbers = common.encode_batches(model, opt, batches, key="single_batch")
    return common.Report({"cls": {"n": float(len(numbers))}}, "three images")

def damaged(model, opt):
    "The last process cannot read an image: all must raise the error and continue."
    def batches():
        yield torch.ones(1, 3, 64, 64), torch.zeros(1)
        if distributed.rank() == distributed.world_size() - 1:
            raise ValueError("cannot read a.jpg")
    common.encode_batches(model, opt, batches())

def first_only(model, opt):
    "Runs in the first process only, as the dense tasks do."
    assert distributed.rank() == 0
    return common.Report({"patches": {"n": 1.0}}, "dense")

evaluate.TASKS |= {"single_batch": single_batch, "damaged": damaged, "first_only": first_only}
evaluate.FIRST_PROCESS.add("first_only")
evaluate.FROZEN = sys.argv.pop(1).split(",")
config.main(lambda: evaluate.main(sys.argv[1:]))
"""


def launch_all(out, launch, tasks):
    """`evaluate.py --task all` with these tasks, also those of SCRIPT, started by `launch`."""
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [*launch, str(script), tasks, "--task", "all", "--baseline", "untrained", "--limit", "50",
         "--batch-size", "12", "--epochs", "2", "--device", "cpu", "--workers", "0", "--cache",
         "--out", str(out)],
        text=True, capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_two_processes_have_the_features_and_numbers_of_one(tmp_path, torchrun):
    for name, launch in (("1", [sys.executable]), ("2", torchrun)):
        done = launch_all(tmp_path / name, launch,
                          "first_only,knn,damaged,linear,part_retrieval,single_batch")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("skipped damaged: cannot read a.jpg") == 1
        assert done.stdout.count("untrained: knn") == 1
    one, two = ([json.loads(line) for line in open(tmp_path / n / "results.jsonl")] for n in "12")
    assert [line["task"] for line in two] == ["knn", "linear", "part_retrieval", "single_batch",
                                              "first_only"]
    assert [line["metrics"] for line in two] == [line["metrics"] for line in one]
    cached = sorted((tmp_path / "1" / "features").iterdir())
    assert len(cached) == 5                              # knn 2, linear 1 more, crops, single_batch
    for path in cached:
        a, b = (torch.load(tmp_path / n / "features" / path.name) for n in "12")
        assert a["numbers"].equal(b["numbers"]) and a["features"].keys() == b["features"].keys()
        assert all(z.equal(b["features"][name]) for name, z in a["features"].items())


@pytest.mark.slow
def test_results_of_the_first_process_alone_are_no_error_in_the_others(tmp_path, torchrun):
    done = launch_all(tmp_path / "both", torchrun, "damaged,first_only")
    assert done.returncode == 0, done.stderr
    [line] = (tmp_path / "both" / "results.jsonl").open()
    assert json.loads(line)["task"] == "first_only"
    assert "skipped damaged: cannot read a.jpg" in done.stdout
    done = launch_all(tmp_path / "none", torchrun, "damaged")     # no process has a result
    assert done.returncode and "error: untrained: skipped damaged: cannot read a.jpg" in done.stderr
