"""Progress off a terminal: which line is printed, and that nothing stays open."""
import io
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import make_encoder, make_model, make_options
from tqdm import tqdm

import data
from lib import config, distributed, progress
from probes import common


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def no_thread(monkeypatch):
    monkeypatch.setattr(progress, "start_printer", lambda: None)
    monkeypatch.setattr(progress, "running", [])
    monkeypatch.setattr(progress, "last_line", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """Sets the seconds that the clock shows."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, seconds)


@pytest.fixture
def terminal(monkeypatch):
    """stderr as a terminal: its content. Not by sys.stderr, which pytest sets before the test."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, stdout=sys.stdout))
    return stream


def printed(capsys):
    """What the thread prints now."""
    progress.print_line_if_due()
    return capsys.readouterr().err


def test_a_line_names_the_innermost_work_and_its_state(clock, capsys):
    with progress.activity("mae: knn"):                  # begins at 0
        clock(100)
        items = iter(progress.bar(iter(range(40)), "mae: encoding", total=40, unit="img"))
        for _ in range(11):                              # ten are done
            next(items)
        progress.running[-1].set_postfix(loss=0.5)
        clock(130)
        assert printed(capsys) == (
            "mae: encoding: 10 of 40 img, after 00:30, 01:30 left, loss 0.5\n")
        items.close()
        clock(145)
        assert printed(capsys) == "mae: knn: after 02:25\n"
    clock(160)
    assert printed(capsys) == ""


def test_a_line_is_printed_after_ten_seconds_without_one(clock, capsys):
    clock(1000)
    with progress.activity("a"):
        clock(1009)
        assert printed(capsys) == ""                     # quick work leaves no trace
        clock(1010)
        assert printed(capsys) == "a: after 00:10\n"
        clock(1019)
        assert printed(capsys) == ""
        progress.write("step 10", sys.stdout)            # the program prints its own line
        clock(1028)
        assert printed(capsys) == ""
        with progress.activity("b"):                     # many short ones are not silent
            clock(1029)
            assert printed(capsys) == "b: after 00:01\n"


def test_nothing_stays_open_after_an_error():
    with pytest.raises(Stop), progress.activity("a"):
        progress.bar(desc="b", total=3)                  # updated by hand, not closed
        for _ in progress.bar([1, 2], "c"):
            raise Stop
    assert progress.running == []


@pytest.mark.parametrize("opened", ["activity", "bar"])
def test_on_a_terminal_the_thread_draws_what_lasts_longer(terminal, clock, opened):
    with (progress.activity("mae: knn") if opened == "activity" else
          progress.bar(total=3, desc="mae: knn")):
        clock(4)
        progress.draw_bars()
        assert "mae" not in terminal.getvalue()          # quick work leaves no trace
        clock(6)
        progress.draw_bars()
        assert "mae: knn" in terminal.getvalue()         # also without a step
        progress.print_line_if_due()
        assert "after" not in terminal.getvalue()        # no line next to the bar
    assert progress.running == [] and terminal.getvalue().endswith("\r")      # erased


def test_on_a_terminal_nothing_stays_open_after_an_error(terminal):
    with pytest.raises(Stop), progress.activity("a"):
        assert isinstance(progress.bar(desc="b", total=3), progress.Bar)
        for _ in progress.bar([1, 2], "c"):
            raise Stop
    assert progress.running == []


def test_of_several_processes_one_shows_progress(terminal):
    with progress.activity("a", shown=False):
        assert list(progress.bar([1, 2], "b", shown=False)) == [1, 2]
        assert progress.running == []


@pytest.mark.slow
def test_a_step_of_minutes_is_not_silent():
    """The thread itself, in a process whose only step takes longer than the interval."""
    code = ("import time; from lib import progress; progress.INTERVAL = 1\n"
            "for _ in progress.bar([1], 'slow'): time.sleep(3)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert "slow: 0 of 1 it, after 00:0" in done.stderr, done


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


# ---- worker processes ----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_a_worker_prints_although_the_main_process_held_the_lock_when_it_was_forked():
    is_held, may_end = threading.Event(), threading.Event()

    def hold():                                          # as the thread that draws the bars
        with tqdm.get_lock():
            is_held.set()
            may_end.wait()

    def work():
        distributed.start_worker(0)
        progress.write("a line")

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    worker.join(20)
    ended = worker.exitcode
    worker.kill()
    may_end.set()
    thread.join()
    assert ended == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_workers_are_forked_whatever_the_default():
    """Only a forked worker can be given a lambda."""
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)       # Python 3.14's
    try:
        assert list(data.in_workers(lambda x: x + 1, [1, 2], 2, torch.device("cpu"))) == [2, 3]
    finally:
        multiprocessing.set_start_method(default, force=True)
