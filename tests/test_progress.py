"""Progress off a terminal: which line is printed, and that nothing stays open."""
import sys
from types import SimpleNamespace

import pytest
import torch
from small_models import make_encoder, make_model, make_options

from lib import config, progress
from probes import common


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def no_thread(monkeypatch):
    monkeypatch.setattr(progress, "start_printer", lambda: None)
    monkeypatch.setattr(progress, "running", [])


def print_once(monkeypatch, capsys):
    """What the thread prints after its first wait, which must be ten seconds."""
    waits = iter([None])

    def sleep(seconds):
        assert seconds == 10
        for _ in waits:
            return
        raise Stop

    monkeypatch.setattr(progress, "time", SimpleNamespace(sleep=sleep,
                                                          monotonic=progress.time.monotonic))
    with pytest.raises(Stop):
        progress.print_lines()
    return capsys.readouterr().err


def test_a_line_names_the_innermost_work_and_its_state(monkeypatch, capsys):
    clock = iter([0.0, 100.0, 130.0])
    with monkeypatch.context() as patch:
        patch.setattr(progress.time, "monotonic", lambda: next(clock))
        with progress.activity("mae: knn"):              # begins at 0
            items = iter(progress.bar(iter(range(40)), "mae: encoding", total=40, unit="img"))
            for _ in range(11):                          # begins at 100; ten are done
                next(items)
            progress.running[-1].set_postfix(loss=0.5)
            patch.undo()
            monkeypatch.setattr(progress.time, "monotonic", lambda: 130.0)
            assert print_once(monkeypatch, capsys) == (
                "mae: encoding: 10 of 40 img, after 00:30, 01:30 left, loss 0.5\n")
            items.close()
            assert print_once(monkeypatch, capsys) == "mae: knn: after 02:10\n"
    assert print_once(monkeypatch, capsys) == ""


def test_nothing_stays_open_after_an_error():
    with pytest.raises(Stop), progress.activity("a"):
        progress.bar(desc="b", total=3)                  # updated by hand, not closed
        for _ in progress.bar([1, 2], "c"):
            raise Stop
    assert progress.running == []


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.activity("a"):
        assert list(progress.bar([1, 2], "b")) == [1, 2] and progress.running == []
    assert not isinstance(progress.bar([1], "b", shown=False), progress.Lines)


def test_encoding_shows_how_many_images_are_done():
    model, states = make_model(make_encoder()), []

    def batches():
        for _ in range(3):
            yield torch.zeros(4, 3, 32, 32), torch.arange(4)
            states.extend(line.n for line in progress.running)

    common.encode_batches(model, make_options("knn"), batches(), ["cls"], total=12)
    assert states == [4, 8, 12] and progress.running == []


@pytest.mark.parametrize("text, expected", [("", "interrupted\n"), ("3 of 5", "3 of 5\n")])
def test_ctrl_c_is_one_sentence(capsys, text, expected):
    def interrupted():
        raise KeyboardInterrupt(*[text] * bool(text))

    with pytest.raises(SystemExit) as stop:
        config.main(interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err == expected
