"""benchmarks/results.py: what it runs, what it keeps in results.yaml, and the table it prints."""
import argparse
import dataclasses
import json
import sys

import pytest
import yaml

from benchmarks import results
from probes.common import Options


def result_line(task, metrics, data="toy", checkpoint="encoder.pt", step=20, **settings):
    """A line of results.jsonl; settings: those that are not the defaults."""
    settings = dataclasses.asdict(Options()) | dict(precision="bf16") | settings
    return json.dumps(dict(task=task, data=data, settings=settings, checkpoint=checkpoint,
                           step=step, metrics=metrics))


def write_finished_run(folder, knn):
    """The files of a trained and evaluated run; results.jsonl also has lines to be ignored."""
    (folder / "analysis").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    (folder / "results.log").write_text(
        "20 steps of 4 images, 0.4 M parameters, fp32 on 1 x CPU (1 thread), torch 2.11.0+cpu\n"
        "step 20/20\ndone after 20 steps\nkNN\n")
    lines = [result_line("knn", {"cls": {"k=10": 1.0}, "patch": {"k=10": 2.0}}),    # an older one
             result_line("knn", {"cls": {"k=10": knn}, "patch": {"k=10": 30.04}}),
             result_line("knn", {"cls": {"k=10": 99.0}}, limit=10),
             result_line("knn", {"cls": {"k=10": 99.0}}, data="cifar10"),
             result_line("knn", {"cls": {"k=10": 99.0}}, checkpoint=None),          # a baseline
             result_line("knn", {"cls": {"k=10": 99.0}}, step=10),                  # unfinished run
             result_line("knn", {"cls": {"k=1": 99.0}}, k=[1]),
             result_line("linear", {"cls": {"top-1": 50.0}}),
             result_line("linear", {"cls": {"top-1": 99.0}}, recipe="logreg"),
             result_line("linear", {"cls": {"top-1": 99.0}}, branch="student"),
             result_line("linear", {"patch": {"top-1": 51.0}}, feature="patch"),
             result_line("finetune", {"patch": {"last epoch": 70.0}}, limit=2000, recipe="light",
                         epochs=10),
             result_line("finetune", {"patch": {"last epoch": 99.0}}, recipe="light", epochs=10),
             result_line("part_retrieval", {"cls": {"AP": 40.0}}),
             result_line("linear_segmentation", {"patch": {"mIoU": 12.0}}, level="object"),
             result_line("linear_segmentation", {"patch": {"mIoU": 14.0}}, level="part"),
             result_line("zero_shot_segmentation", {"patch": {"Opt": 45.0}}),
             result_line("video", {"patch": {"J&F": 55.0}})]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    for name, key, last in (("attention_distance", "pixels", 16.26), ("nmi", "nmi", 0.274)):
        (folder / "analysis" / f"{name}.json").write_text(
            json.dumps({"models": [{"numbers": {key: [1.0, last]}}]}))


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """results.main() with flags; runs are under tmp_path, and so is results.yaml."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.yaml")

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["results.py", "--out", str(tmp_path), *flags])
        results.main()
    return main


@pytest.fixture
def scripts(monkeypatch):
    """Names of the scripts that would have been run; nothing is run."""
    names = []
    monkeypatch.setattr(results, "run_script", lambda log, script, *flags: names.append(script))
    return names


def test_finished_runs_are_kept_and_averaged(run_main, scripts, tmp_path, capsys):
    write_finished_run(tmp_path / "mae-toy", 60.0)
    write_finished_run(tmp_path / "mae-toy-seed1", 50.0)
    run_main("--methods", "mae", "--seeds", "0", "1")
    assert scripts == []                                  # everything is done
    kept = yaml.safe_load((tmp_path / "results.yaml").read_text())["toy"]["mae"]
    assert kept[0]["kNN, class token"] == 60.0 and kept[1]["kNN, class token"] == 50.0
    assert [kept[0][name] for name in ("steps", "precision", "torch")] == [20, "fp32", "2.11.0"]
    row = ("| MAE | 2 | 55.0 ± 7.1 | 30.0 ± 0.0 | 50.0 ± 0.0 | 51.0 ± 0.0 | 70.0 ± 0.0 | "
           "40.0 ± 0.0 | 12.0 ± 0.0 | 14.0 ± 0.0 | 45.0 ± 0.0 | 55.0 ± 0.0 | 16.3 ± 0.0 | "
           "0.27 ± 0.00 |")
    assert row in capsys.readouterr().out


def test_seeds_of_an_earlier_day_are_kept_when_one_is_added(run_main, scripts, tmp_path, capsys):
    (tmp_path / "results.yaml").write_text(
        "toy: {mae: {0: {linear probe: 70.0}}, dino: {0: {video J&F: 3}}}")
    write_finished_run(tmp_path / "mae-toy-seed2", 40.0)
    run_main("--methods", "mae", "--seeds", "2")
    capsys.readouterr()
    run_main("--table")
    table = capsys.readouterr().out
    assert "| MAE | 2 | 40.0 | 30.0 | 60.0 ± 14.1 |" in table and "| DINO | 1 |" in table


def test_baselines_have_rows_of_their_own(run_main, scripts, tmp_path, capsys):
    """The supervised and the untrained network are probed like the methods; pixels only where no
    patch tokens are needed, and their lines have no checkpoint."""
    for name in "supervised", "untrained":
        write_finished_run(tmp_path / f"{name}-toy", 60.0)
    (tmp_path / "pixels-toy").mkdir()
    lines = [result_line(task, {"pixels": {metric: 16.0}}, checkpoint=None, step=None, img_size=48)
             for task, metric in (("knn", "k=10"), ("linear", "top-1"), ("part_retrieval", "AP"))]
    (tmp_path / "pixels-toy" / "results.jsonl").write_text("\n".join(lines))
    run_main("--methods", *results.BASELINES, "--seeds", "0")
    assert scripts == []
    rows = capsys.readouterr().out
    assert "| raw pixels | 1 | 16.0 | - | 16.0 | - | - | 16.0 | - | - | - | - | - | - |" in rows
    assert "| supervised | 1 | 60.0 |" in rows and "| untrained (MMC's) | 1 | 60.0 |" in rows


def test_cifar10_has_a_table_without_the_columns_of_toy(run_main, scripts, tmp_path, capsys):
    write_finished_run(tmp_path / "mae-cifar10", 1.0)
    file = tmp_path / "mae-cifar10" / "results.jsonl"
    file.write_text(file.read_text().replace('"cifar10"', '"other"').replace('"toy"', '"cifar10"'))
    run_main("--methods", "mae", "--seeds", "0", "--data", "cifar10")
    assert scripts == []
    header, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert "linear probe, mean patch token | attention distance" in header
    assert row == "| MAE | 1 | 1.0 | 30.0 | 50.0 | 51.0 | 16.3 | 0.27 |"


def test_commands_that_train(tmp_path):
    def command(method, data="toy", root=None, flags=()):
        args = argparse.Namespace(data=data, data_root=root, flags=list(flags))
        return " ".join(results.train_command(args, method, 2, tmp_path))

    rest = f"--seed 2 --out {tmp_path}"
    assert command("supervised") == f"-m benchmarks.supervised --data toy {rest}"
    assert command("selfpatch_moby") == f"selfpatch.py --base moby --data toy {rest}"
    assert command("mmc_cls_rec") == f"mmc.py --lambda-patch 0 --data toy {rest}"
    assert command("untrained").startswith("mmc.py ") and "--steps 1 --lr 0" in command("untrained")
    assert (command("mae", "cifar10", "folder", ["--epochs", "3"]) ==
            f"mae.py --data cifar10 --data-root folder {rest} --epochs 3")


def test_only_missing_diagnostics_are_run(run_main, scripts, tmp_path):
    write_finished_run(tmp_path / "mae-toy", 60.0)
    (tmp_path / "mae-toy" / "analysis" / "nmi.json").unlink()
    with pytest.raises(FileNotFoundError):                # analysis.py is not really run here
        run_main("--methods", "mae", "--seeds", "0")
    assert scripts == ["analysis.py"] and not (tmp_path / "results.yaml").exists()


def test_only_missing_probes_are_run(run_main, scripts, tmp_path):
    write_finished_run(tmp_path / "mae-toy", 60.0)
    file = tmp_path / "mae-toy" / "results.jsonl"
    lines = [line for line in file.read_text().splitlines() if '"video"' not in line]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(TypeError):                        # evaluate.py is not really run here
        run_main("--methods", "mae", "--seeds", "0")
    assert scripts == ["evaluate.py"] and not (tmp_path / "results.yaml").exists()


def test_an_unfinished_run_is_resumed_if_it_has_a_checkpoint(run_main, tmp_path, monkeypatch):
    write_finished_run(tmp_path / "mae-toy", 60.0)
    write_finished_run(tmp_path / "dino-toy", 40.0)
    for name in "mae-toy", "dino-toy":
        (tmp_path / name / "results.log").write_text("fp32 on 1 x CPU, torch 2.11.0\nstep 10/20\n")
    (tmp_path / "mae-toy" / "last.pt").touch()
    called = {}

    def train(log, script, *flags):
        called[script] = flags
        log.write_text(log.read_text() + "done after 20 steps\n")

    monkeypatch.setattr(results, "run_script", train)
    run_main("--methods", "mae", "dino", "--seeds", "0")
    assert "--resume" in called["mae.py"] and "--resume" not in called["dino.py"]
    kept = yaml.safe_load((tmp_path / "results.yaml").read_text())["toy"]
    cls = "kNN, class token"
    assert kept["mae"][0][cls] == 60.0 and kept["dino"][0][cls] == 40.0


def test_a_stopped_training_is_not_evaluated_and_the_other_runs_continue(
        run_main, tmp_path, monkeypatch, capsys):
    called = []

    def train_and_stop(log, script, *flags):
        called.append(script)
        log.write_text("step 1/9\nstopped by SIGTERM\n")

    monkeypatch.setattr(results, "run_script", train_and_stop)
    with pytest.raises(SystemExit, match="run the same command again"):
        run_main("--methods", "mae", "dino", "asl", "--seeds", "0")
    assert sorted(called) == ["asl.py", "dino.py", "mae.py"]
    assert "dino-toy was stopped" in capsys.readouterr().out


@pytest.mark.parametrize("data, methods", [
    ("toy", list(results.ROWS)), ("toy", [*results.ABLATIONS, "mmc"]),
    ("toy-scenes", list(results.ROWS)), ("cifar10", list(results.ROWS))],
    ids=["toy", "ablation", "scenes", "cifar10"])
def test_docs_show_the_tables_of_results_yaml(data, methods, monkeypatch, capsys):
    seeds = ["--seeds", "0"] * (methods[0] in results.ABLATIONS)
    monkeypatch.setattr(sys, "argv", ["results.py", "--table", "--data", data,
                                      "--methods", *methods, *seeds])
    results.main()
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2 + len(results.read_results()[data].keys() & set(methods))
    assert table in (results.ROOT / "docs" / "results.md").read_text()


def test_a_line_that_is_older_than_a_flag_counts(tmp_path):
    write_finished_run(tmp_path / "mae-toy", 60.0)
    file = tmp_path / "mae-toy" / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["settings"]["window"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert results.read_metrics(tmp_path / "mae-toy", "toy", "knn")["cls"] == {"k=10": 60.0}
    file.write_text("".join(json.dumps({**line, "settings": {**line["settings"], "window": 3}})
                            + "\n" for line in lines))
    assert results.read_metrics(tmp_path / "mae-toy", "toy", "knn") is None
