"""The driver of the table of results: what it keeps, and what it prints of it."""
import json
import sys

import pytest
import yaml

from benchmarks import results


def line(task, metrics, data="toy", checkpoint="encoder.pt", level="object", limit=None):
    settings = dict(limit=limit, level=level)
    return json.dumps(dict(task=task, data=data, settings=settings, checkpoint=checkpoint,
                           metrics=metrics))


def finished(folder, knn):
    """A folder as training and probes leave it; the answers that count stand among others."""
    (folder / "analysis").mkdir(parents=True)
    (folder / "config.yaml").write_text("precision: fp32\n")
    (folder / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    (folder / "results.log").write_text("step 20/20\ndone after 20 steps\nkNN\n")
    lines = [line("knn", {"cls": {"k=10": 1.0}, "pat": {"k=10": 2.0}}),      # an older answer
             line("knn", {"cls": {"k=10": knn}, "pat": {"k=10": 30.04}}),
             line("knn", {"cls": {"k=10": 99.0}}, limit=10),
             line("knn", {"cls": {"k=10": 99.0}}, data="cifar10"),
             line("knn", {"cls": {"k=10": 99.0}}, checkpoint=None),          # a baseline
             line("linear", {"pat": {"top-1": 50.0}}),                       # no class token
             line("part_retrieval", {"cls": {"AP": 40.0}}),
             line("linear_segmentation", {"patch": {"mIoU": 12.0}}),
             line("linear_segmentation", {"patch": {"mIoU": 14.0}}, level="part"),
             line("zero_shot_segmentation", {"patch": {"Opt": 45.0}}),
             line("video", {"patch": {"J&F": 55.0}})]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    for name, key, last in (("attention_distance", "pixels", 16.26), ("nmi", "nmi", 0.274)):
        (folder / "analysis" / f"{name}.json").write_text(
            json.dumps({"models": [{"numbers": {key: [1.0, last]}}]}))


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """main() with flags, in which no script is run, and which keeps its results in tmp_path."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.yaml")

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["results.py", "--out", str(tmp_path), *flags])
        results.main()
    return main


@pytest.fixture
def calls(monkeypatch):
    names = []
    monkeypatch.setattr(results, "call", lambda log, script, *flags: names.append(script))
    return names


def test_answers_of_finished_runs_are_kept_and_averaged(driver, calls, tmp_path, capsys):
    finished(tmp_path / "mae-toy", 60.0), finished(tmp_path / "mae-toy-seed1", 50.0)
    driver("--methods", "mae", "--seeds", "0", "1")
    assert calls == []                                    # all is done
    kept = yaml.safe_load((tmp_path / "results.yaml").read_text())["toy"]["mae"]
    assert kept[0]["kNN cls"] == 60.0 and kept[1]["kNN cls"] == 50.0
    assert (kept[0]["steps"], kept[0]["precision"]) == (20, "fp32")
    table = capsys.readouterr().out
    assert ("| mae | 2 | 55.0 ± 7.1 | 30.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 0.0 | 12.0 ± 0.0 | "
            "14.0 ± 0.0 | 45.0 ± 0.0 | 55.0 ± 0.0 | 16.3 ± 0.0 | 0.27 ± 0.00 |") in table


def test_seeds_of_another_day_stay_when_one_is_added(driver, calls, tmp_path, capsys):
    (tmp_path / "results.yaml").write_text("toy: {mae: {0: {linear: 70.0}}, dino: {0: {video: 3}}}")
    finished(tmp_path / "mae-toy-seed2", 40.0)
    driver("--methods", "mae", "--seeds", "2")
    capsys.readouterr()
    driver("--table")
    table = capsys.readouterr().out
    assert "| mae | 2 | 40.0 | 30.0 | 60.0 ± 14.1 |" in table and "| dino | 1 |" in table


def test_what_was_not_asked_is_asked(driver, calls, tmp_path):
    finished(tmp_path / "mae-toy", 60.0)
    (tmp_path / "mae-toy" / "analysis" / "nmi.json").unlink()
    with pytest.raises(FileNotFoundError):                # as nothing is really run here
        driver("--methods", "mae", "--seeds", "0")
    assert calls == ["analysis.py"] and not (tmp_path / "results.yaml").exists()


def test_a_run_that_is_not_done_is_gone_on_with(driver, tmp_path, monkeypatch):
    finished(tmp_path / "mae-toy", 60.0), finished(tmp_path / "dino-toy", 40.0)
    for name in "mae-toy", "dino-toy":                    # killed: with a checkpoint, before one
        (tmp_path / name / "results.log").write_text("step 10/20\n")
    (tmp_path / "mae-toy" / "last.pt").touch()
    called = {}

    def train(log, script, *flags):
        called[script] = flags
        log.write_text(log.read_text() + "done after 20 steps\n")

    monkeypatch.setattr(results, "call", train)
    driver("--methods", "mae", "dino", "--seeds", "0")
    assert "--resume" in called["mae.py"] and "--resume" not in called["dino.py"]
    kept = yaml.safe_load((tmp_path / "results.yaml").read_text())["toy"]
    assert kept["mae"][0]["kNN cls"] == 60.0 and kept["dino"][0]["kNN cls"] == 40.0


def test_a_training_that_was_told_to_stop_is_asked_nothing_and_stops_no_other(
        driver, tmp_path, monkeypatch, capsys):
    called = []

    def stopped(log, script, *flags):
        called.append(script)
        log.write_text("step 1/9\ntold to stop: saved after step 1; --resume goes on from there\n")

    monkeypatch.setattr(results, "call", stopped)
    with pytest.raises(SystemExit, match="the same command goes on"):
        driver("--methods", "mae", "dino", "asl", "--seeds", "0")
    assert sorted(called) == ["asl.py", "dino.py", "mae.py"]
    assert "dino-toy was stopped" in capsys.readouterr().out
