"""A run: its steps, log and checkpoints; killed processes, signals and bad input."""

import errno
import fcntl
import importlib
import io
import json
import math
import os
import pickle
import random
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import data
import dino
import mmc
from lib import checkpoints, config, datasets, distributed
from lib import run as run_module
from lib.folder import RunFolder
from lib.run import Run, cosine, ema_update, param_groups

ROOT = Path(__file__).parent.parent
TINY = ("--data synthetic --img-size 16 --patch-size 4 --embed-dim 16 --depth 2 --num-heads 2 "
        "--mlp-dim 16 --out-dim 8 --group-size 4 --batch-size 16 --workers 0 --evals 0 "
        "--log-every 1 --precision fp32 --device cpu").split()


def run(*flags, **popen):
    """A tiny MMC run in a process of its own."""
    command = [sys.executable, "mmc.py", *TINY, *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **popen)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out + err


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# ---- schedules and averages ----------------------------------------------------------------------


def test_cosine_against_the_closed_form():
    assert cosine(0, 100, 1.0, 0.1, warmup=10) == 0
    assert cosine(5, 100, 1.0, 0.1, warmup=10) == 0.5
    assert cosine(10, 100, 1.0, 0.1, warmup=10) == 1.0
    assert abs(cosine(55, 100, 1.0, 0.1, warmup=10) - 0.55) < 1e-12
    assert abs(cosine(100, 100, 1.0, 0.1, warmup=10) - 0.1) < 1e-12
    momentum = 1 - (1 - 0.996) * (1 + math.cos(math.pi * 30 / 100)) / 2  # the paper's
    assert abs(cosine(30, 100, 0.996, 1.0) - momentum) < 1e-12


def test_ema_averages_parameters_not_buffers_and_zero_copies():
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(student.weight), nn.init.normal_(student.running_mean)
    old = teacher.weight.detach().clone()
    ema_update(teacher, student, 0.9)
    assert torch.allclose(teacher.weight, 0.9 * old + 0.1 * student.weight, atol=1e-7)
    assert torch.equal(teacher.running_mean, torch.zeros(3))
    ema_update(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)


def test_decay_groups_leave_out_vectors_and_frozen_parameters():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    net[2].weight.requires_grad_(False)
    decay, keep = param_groups(net, 0.04)
    assert decay["weight_decay"] == 0.04 and decay["params"] == [net[0].weight]
    assert keep["weight_decay"] == 0 and len(keep["params"]) == 4
    decay, keep = param_groups(net, 0.04, no_decay=("0.weight",))
    assert decay["params"] == [] and len(keep["params"]) == 5


class Linear(nn.Linear):
    """torch 2.11 does not compile a network whose only forward is torch's own."""

    def forward(self, x):
        return super().forward(x)


def small_run(monkeypatch, out, *flags):
    """A Run, a loader of one batch an epoch, a linear network and its optimizer."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = Run(config.parse(mmc.Config, [*TINY, "--out", str(out), *map(str, flags)]))
    loader = data.Loader(datasets.Images("x", "train", pixels=torch.zeros(
        16, 3, 16, 16, dtype=torch.uint8)), [data.View(16)], 16)
    net = run.place(Linear(768, 10, bias=False))
    opt = torch.optim.SGD(net.parameters())
    run.restore(net=net, opt=opt)
    return run, loader, net


@pytest.mark.parametrize("evals, due", [(0, []), (1, [9]), (2, [4, 9]), (3, [3, 6, 9])])
def test_evaluations_are_due_at_the_end_of_each_part_of_a_run(evals, due, monkeypatch, tmp_path):
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 10, "--evals", evals)
    assert [step for step, _ in run.steps(loader) if run.eval_due] == due


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_compiled_networks_learn_the_same(method, monkeypatch, tmp_path):
    """With torch's backend "eager", which takes the same path but compiles nothing."""
    script, found = importlib.import_module(method), {}
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: (
        found.update(compiled=True), real(net, backend="eager")))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name, flag in (("plain", "false"), ("compiled", "true")):
        monkeypatch.setattr(sys, "argv", [
            "", *"--data synthetic --img-size 16 --patch-size 4 --embed-dim 16 --depth 2 "
            "--num-heads 2 --batch-size 8 --workers 0 --evals 0 --log-every 1 --precision fp32 "
            "--steps 3".split(), "--compile", flag, "--out", str(tmp_path / name)])
        script.main()
    assert found == {"compiled": True}
    plain, compiled = ([line["loss"] for line in records(tmp_path / name)]
                       for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_without_a_compiler_the_error_is_one_sentence(monkeypatch, tmp_path, capsys):
    """A C++ compiler is not installed everywhere."""
    def no_compiler(*_):
        raise RuntimeError("No working C++ compiler found\nin (None, 'g++')")

    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: real(net, backend=no_compiler))
    run, loader, net = small_run(monkeypatch, tmp_path, "--steps", 3, "--compile", "--evals", 0)

    def train():
        for _, batch in run.steps(loader):
            net(batch.views[0].flatten(1))

    with pytest.raises(SystemExit) as stop:
        config.main(train)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "compiling the networks: the next steps can take minutes" in out
    error, = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "No working C++ compiler found in (None, 'g++')); it needs a C++ compiler" in error


@pytest.mark.parametrize("start", [0, 4])
def test_flops_are_counted_before_networks_are_compiled(start, monkeypatch, tmp_path):
    """Steps 4 and 9 have an evaluation, in which they are not counted."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(run.flops))
    run, loader, net = small_run(monkeypatch, tmp_path, "--steps", 10, "--evals", 2, "--compile")
    run.step, steps = start, 0
    for step, batch in run.steps(loader):
        assert bool(compiled) == (step > start + (start == 4))
        net(batch.views[0].flatten(1)).mean().backward()
        steps += 1
    assert compiled == [2 * 2 * 768 * 10] and steps == 10 - start


# ---- evaluation ----------------------------------------------------------------------------------


def test_an_unreadable_image_ends_the_evaluation_and_other_errors_end_the_run(
        monkeypatch, tmp_path, capsys):
    run, _, net = small_run(monkeypatch, tmp_path)
    with run.evaluation(net):                                            # also before steps()
        assert not net.training and not torch.is_grad_enabled()
        raise datasets.UnreadableImage("Cannot read x.jpg")
    assert "evaluation skipped: Cannot read x.jpg" in capsys.readouterr().out and net.training
    with pytest.raises(ValueError, match="a bug"):
        with run.evaluation(net):
            raise ValueError("a bug")


def test_an_evaluation_does_not_begin_after_a_loss_that_is_not_finite(monkeypatch, tmp_path):
    run, _, net = small_run(monkeypatch, tmp_path)
    monkeypatch.setattr(run, "device", torch.device("cuda"))             # log() does not look there
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run.log(loss=1.0, grad_norm=1.0)
    with run.evaluation(net):
        pass
    run.log(loss=math.nan, grad_norm=1.0)
    with pytest.raises(ValueError, match="the loss or the gradient norm is not finite"):
        with run.evaluation(net):
            raise AssertionError("evaluated")


def test_a_run_that_was_not_restored_cannot_be_saved(monkeypatch, tmp_path):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = Run(config.parse(mmc.Config, [*TINY, "--out", str(tmp_path)]))
    with pytest.raises(RuntimeError, match=r"call run.restore\(...\) first"):
        run.save()


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path):
    folder = RunFolder(SimpleNamespace(out=tmp_path))
    folder.append_log(dict(step=1, loss=0.5, feat_std=math.nan, mi=math.inf))

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == dict(step=1, loss=0.5, feat_std=None, mi=None)
    with pytest.raises(ValueError, match="NaN is not JSON"):             # control
        json.loads(json.dumps(dict(feat_std=math.nan)), parse_constant=refuse)


def test_paths_that_the_terminal_cannot_print_do_not_end_a_run(monkeypatch):
    def main():
        print("photos/caf\xe9/\udcff.jpg")

    for encoding in ("ascii", "utf-8"):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding))
        with pytest.raises(UnicodeEncodeError):                          # control
            main(), sys.stdout.flush()
        config.main(main)
        sys.stdout.flush()
        assert rb"\udcff.jpg" in buffer.getvalue()


@pytest.fixture
def set_machine(monkeypatch):
    """Sets what a process finds: cores, those in use, threads and OMP_NUM_THREADS. Returns [number
    of threads]."""
    def set_to(cores, used, threads, given=""):
        now = [threads]
        monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
        monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
        monkeypatch.setattr(distributed, "allowed_cores", lambda: set(range(cores)))
        monkeypatch.setattr(distributed, "used_cores", lambda: used)
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        return now
    return set_to


@pytest.mark.parametrize("used, cores, usual, given, threads", [
    (0.1, 2, 2, "", 2), (0.2, 8, 8, "", 8),              # a core is hardly used
    (0.5, 2, 2, "", 1), (1.0, 2, 2, "", 1), (1.2, 8, 8, "", 7), (2.6, 8, 8, "", 5),
    (8.0, 16, 8, "", 8), (10.0, 16, 8, "", 6),           # with hyper-threading
    (2.0, 2, 2, "", 1), (9.0, 8, 8, "", 1),              # at least one
    (1.0, 2, 2, "2", 2)])                                # as the user wants
def test_busy_cores_are_left_to_other_processes(monkeypatch, tmp_path, capsys, set_machine,
                                                used, cores, usual, given, threads):
    now = set_machine(cores, used, usual, given)
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 1)
    assert len(list(run.steps(loader))) == 1 and now == [threads]
    out = capsys.readouterr().out
    assert f" on 1 x CPU ({threads} thread{'s' * (threads > 1)}), torch" in out
    assert (f"other processes use {used:.1f} of" in out) == (threads < usual)


@pytest.mark.parametrize("used, cores, given, threads, advice", [
    (0.0, 4, "", 3, False), (2.0, 4, "", 3, False),      # as before
    (0.0, 4, "4", 4, True), (0.0, 4, "3", 3, False),     # as the user wants
    (0.0, 2, "", 2, True)])                              # on a smaller machine
def test_a_resumed_run_has_as_many_threads_as_before(monkeypatch, tmp_path, capsys, set_machine,
                                                     used, cores, given, threads, advice):
    set_machine(cores=4, used=1.0, threads=4)            # three are left
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 1)
    for _ in run.steps(loader):
        run.save()
    run.folder.lock.close()
    now = set_machine(cores, used, int(given or cores), given)
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 2, "--resume")
    assert now == [threads]
    found = "OMP_NUM_THREADS=3 in front of the command prevents this" in capsys.readouterr().out
    assert found == advice
    for _ in run.steps(loader):
        run.save()
    assert torch.load(tmp_path / "last.pt")["threads"] == threads


def test_used_cores_are_the_ticks_between_two_looks(monkeypatch, tmp_path):
    stat, looks = tmp_path / "stat", iter([
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 0 500 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n"
        "cpu2 0 0 0 0 0 0 0 0 0 0\nintr 1 2 3\n",
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 110 2 3 510 5 0 0 0 0 0\ncpu1 10 0 0 0 0 0 0 20 0 0\n"
        "cpu2 30 0 0 0 0 0 0 0 0 0\nintr 1 2 3\n"])
    stat.write_text(next(looks))
    monkeypatch.setattr(distributed.time, "sleep", lambda _: stat.write_text(next(looks)))
    monkeypatch.setattr(distributed, "allowed_cores", lambda: {0, 1})
    assert distributed.used_cores(stat=stat) == pytest.approx(15 / 30 + 30 / 30)
    assert distributed.used_cores(stat=tmp_path / "none") == 0         # not Linux


# ---- messages ------------------------------------------------------------------------------------


def test_a_loss_that_does_not_fall_is_reported_with_a_cause():
    def describe(*losses, lr):
        log = [dict(step=1, knn=3.0), *(dict(loss=loss, lr=lr) for loss in losses)]
        return run_module.describe_flat_loss(log)

    assert describe(1.0, 1.2, 0.98, lr=1e-5) is None and describe(1.0, lr=1e-5) is None
    low, high = describe(1.0, 0.8, 1.0, lr=1e-5), describe(1.0, 1.01, lr=2e-3)
    assert low == ("the loss did not fall: 1.000 at first, 1.000 at the end; likely cause: a "
                   "learning rate of at most 1.0e-05: raise --lr")
    assert high.endswith("1.010 at the end; likely cause: too few steps, or too high a learning "
                         "rate (up to 2.0e-03)")


@pytest.mark.slow
def test_a_run_without_learning_reports_it_and_one_that_learns_does_not(tmp_path):
    frozen = finish(run("--steps", 3, "--lr", 0, "--min-lr", 0, "--out", tmp_path / "a"))
    learned = finish(run("--steps", 9, "--lr", 0.05, "--warmup-epochs", 0,
                         "--momentum-teacher", 0.99, "--out", tmp_path / "b"))
    assert "the loss did not fall" in frozen and "the loss did not fall" not in learned


def test_settings_for_a_cpu_are_pointed_out_on_a_folder_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def opening(*flags):
        Run(config.parse(mmc.Config, ["--device", "cpu", "--out", str(tmp_path), *flags]))
        return capsys.readouterr().out

    (tmp_path / "photos").mkdir()
    photos = str(tmp_path / "photos")
    assert "--section photos has some for a CPU" in opening("--data", photos)
    for flags in (["--data", photos, "--section", "photos"], [], ["--data", "imagenet"]):
        assert "--section photos" not in opening(*flags)
    with pytest.raises(ValueError, match="did you mean 'toy'"):
        opening("--data", "toyy")
    assert not capsys.readouterr().out                   # no line about settings for it


# ---- time ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_due_after_so_many_minutes_and_at_the_end(monkeypatch, tmp_path):
    now, due = [0.0], []
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 5, "--save-every", 5)
    for _, seconds in zip(run.steps(loader), (299, 2, 10, 10, 10)):     # after each step
        now[0] += seconds
        due.append(run.save_due)
        if run.save_due:
            run.save()
    assert due == [False, False, True, False, True]


def test_after_a_signal_the_current_step_and_one_more_are_completed(monkeypatch, tmp_path, capsys):
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 10, "--save-every", 999)
    due = []
    with pytest.raises(SystemExit) as end:
        for step, _ in run.steps(loader):
            due.append(run.save_due)
            if run.save_due:
                run.save()
            if step == 2:
                run._on_signal(signal.SIGUSR1, None)
    assert due == [False, False, False, True] and end.value.code == 0
    assert "received SIGUSR1: saved after step 4" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.pt")["step"] == 4


def test_speed_and_mfu_count_the_work_and_time_of_training_alone(monkeypatch, tmp_path):
    """Steps of 2 seconds by this clock, after each one 10 that do not count."""
    now = [0.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    run, loader, net = small_run(monkeypatch, tmp_path, "--steps", 4, "--log-every", 2)
    for _, batch in run.steps(loader):
        net(batch.views[0].flatten(1)).mean().backward()
        now[0] += 2
        with run.paused():
            now[0] += 10
        run.log(loss=0.0)
    flops = 2 * 2 * 768 * 10            # of an image: product and sum, forward and weight gradient
    for line in records(tmp_path):
        assert line["images_per_s"] == 8 and line["mfu"] == pytest.approx(flops * 8 / 1e12)


# ---- killed and preempted runs -------------------------------------------------------------------

LONG = ["--log-every", 3, "--steps", 30, "--save-every", 0, "--warmup-epochs", 0,
        "--drop-path", 0.1]


FORKS = """
import os, sys, torch._dynamo, mmc                  # AdamW would import dynamo: two seconds
from lib import config, distributed
distributed.measure_peak = lambda *_: 1e12
print("ready", flush=True)
for line in sys.stdin:                              # each line starts a run at once
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["mmc.py", *line.split()]
        config.main(mmc.main)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_byte_identical(tmp_path):
    """SIGKILL at 20 random instants of resumed runs, then SIGTERM once."""
    whole, out, steps, dice = tmp_path / "whole", tmp_path / "killed", [], random.Random(0)
    forks = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, text=True, bufsize=1,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ended(folder, seconds=60):
        """Whether a run ended within this time; if not, it is killed."""
        resume = ["--resume"] * (folder / "last.pt").exists()
        print(*TINY, *LONG, "--out", folder, *resume, file=forks.stdin)
        child = int(forks.stdout.readline())
        over, _, _ = select.select([forks.stdout], [], [], seconds)
        if not over:
            os.kill(child, signal.SIGKILL)
        status = int(forks.stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status == 0

    assert forks.stdout.readline() == "ready\n"
    start = time.time()
    assert ended(whole)
    seconds = (time.time() - start) / 2
    while len(steps) < 20:
        saved = (out / "last.pt").exists()
        if ended(out, dice.uniform(0, seconds)):                # start from scratch
            for file in out.iterdir():
                file.unlink()
        elif saved or (out / "last.pt").exists():               # if it exists, it is readable
            steps.append(torch.load(out / "last.pt", weights_only=True)["step"])
    forks.stdin.close(), forks.wait()
    assert min(steps) > 0 and len(set(steps)) > 4, steps
    process = run(*LONG, "--out", out, "--resume")
    assert "resumed from" in process.stdout.readline() + process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    finish(process)
    finish(run(*LONG, "--out", out, "--resume"))
    assert (out / "encoder.pt").read_bytes() == (whole / "encoder.pt").read_bytes()
    timeless = ("images_per_s", "mfu", "data_time", "memory_gib")
    strip = [[{k: v for k, v in r.items() if k not in timeless} for r in records(x)]
             for x in (whole, out)]
    assert strip[0] == strip[1] and len(strip[0]) == 10


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_saves_and_exits_with_zero(tmp_path, number):
    process = run("--steps", 10**6, "--save-every", 999, "--out", tmp_path)
    while "step 2/" not in process.stdout.readline():
        pass
    process.send_signal(number)
    assert "received SIG" in finish(process, code=0)
    assert torch.load(tmp_path / "last.pt")["step"] == records(tmp_path)[-1]["step"] > 0
    assert checkpoints.load_encoder(tmp_path / "encoder.pt", quiet=True).source.branch == "teacher"


# ---- bad input: a readable message, exit code 2 --------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.slow
def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path):
    out = tmp_path / "bad"
    out.mkdir()
    (out / "last.pt").write_bytes(pickle.dumps(Malicious()))
    output = finish(run("--resume", "--out", out), code=2)
    assert "is not a checkpoint that can be resumed" in output
    assert not (ROOT / "hacked").exists()


@pytest.mark.slow
def test_an_earlier_run_is_kept(tmp_path):
    out = tmp_path / "run"
    finish(run("--steps", 1, "--out", out))
    first = (out / "encoder.pt").read_bytes()
    assert "is kept as" in finish(run("--steps", 1, "--seed", 3, "--out", out))
    assert (tmp_path / "run.1" / "encoder.pt").read_bytes() == first
    assert (out / "encoder.pt").read_bytes() != first


def write_run(folder):
    folder.mkdir()
    for name in ("encoder.pt", "config.yaml"):
        (folder / name).write_text("")


def test_a_linked_folder_stays_a_link_when_the_earlier_run_is_renamed(tmp_path):
    write_run(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    opened(tmp_path / "link", resume=False).lock.close()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk.1/encoder.pt").exists()
    assert not (tmp_path / "disk/encoder.pt").exists()


def test_initial_weights_of_the_run_that_is_renamed_are_named_by_their_new_path(tmp_path):
    for file in ("run/encoder.pt", "other.pt"):
        write_run(tmp_path / "run")
        folder = opened(tmp_path / "run", resume=False, init_from=str(tmp_path / file))
        folder.lock.close()
        (tmp_path / "run/.lock").unlink()
        (tmp_path / "run").rmdir()
        kept = file.replace("run/", "run.1/")
        assert folder.cfg.init_from == str(tmp_path / kept)


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_invalid(tmp_path, monkeypatch):
    (tmp_path / "last.pt").write_bytes(b"")

    def stale(*_, **__):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(torch, "load", stale)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = Run(config.parse(mmc.Config, [*TINY, "--resume", "--out", str(tmp_path)]))
    with pytest.raises(OSError, match="Stale file handle.*nothing is lost: try again"):
        run.restore()


@pytest.mark.parametrize("length", [0, 1000, 5000, 20000])          # torch raises EINVAL and others
def test_a_truncated_checkpoint_is_called_so(length, tmp_path, monkeypatch):
    torch.save({"x": torch.randn(100, 100)}, tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:length])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = Run(config.parse(mmc.Config, [*TINY, "--resume", "--out", str(tmp_path)]))
    with pytest.raises(ValueError, match="is not a checkpoint that can be resumed .*start again"):
        run.restore()
    with pytest.raises(ValueError, match="damaged, truncated or not a PyTorch file"):
        checkpoints.load_encoder(tmp_path / "last.pt")


def test_damaged_lines_of_a_log_are_left_out_and_counted(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 10}\n\0\0{"step": 20}\n{"step": 30}\n{}\n{"step": 40}\n{"step": 5')
    folder = RunFolder(config.parse(mmc.Config, [*TINY, "--out", str(tmp_path)]))
    assert [line["step"] for line in folder.read_log()] == [10, 30, 40]
    assert "metrics.jsonl: 2 damaged lines left out" in capsys.readouterr().err
    folder.trim_log(30)
    assert log.read_text() == '{"step": 10}\n{"step": 30}\n'
    capsys.readouterr()
    log.write_bytes(b'{"step": 10}\n{"step": 5')          # of a killed process: nothing unusual
    assert folder.read_log() == [{"step": 10}] and not capsys.readouterr().err


def test_a_run_that_ends_before_its_schedules_says_so(monkeypatch, tmp_path, capsys):
    for flags, notes in (("--freeze-last-layer 10 --warmup-teacher-temp-epochs 30", 2),
                         ("--freeze-last-layer 1 --warmup-teacher-temp-epochs 2", 0)):
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        run = Run(config.parse(dino.Config, ["--out", str(tmp_path), "--warmup-epochs", "0",
                                             *flags.split()]))
        run.total = 3
        run._print_settings(per_epoch=1)
        assert capsys.readouterr().out.count("the run is too short") == notes


def test_a_run_is_not_resumed_with_settings_that_nothing_else_would_notice(tmp_path, monkeypatch,
                                                                           capsys):
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 2)
    for _ in run.steps(loader):
        if run.save_due:
            run.save()
    run.folder.lock.close()
    before = (tmp_path / "last.pt").read_bytes()
    for name, now, was in (("batch-size", 8, 16), ("seed", 5, 0), ("num-heads", 1, 2)):
        with pytest.raises(ValueError, match=f"--{name} {now} cannot resume the run in .*: use "
                                             f"--{name} {was}, or start again"):
            small_run(monkeypatch, tmp_path, "--steps", 4, "--resume", f"--{name}", now)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("\nseed: 0\n", "\nseed: 5\n"))
    with pytest.raises(ValueError, match="--seed 5 cannot resume"):          # edited by hand
        small_run(monkeypatch, tmp_path, "--steps", 4, "--resume")
    (tmp_path / "config.yaml").write_text(text)
    assert (tmp_path / "last.pt").read_bytes() == before
    old = torch.load(tmp_path / "last.pt")               # of an earlier version: without settings
    torch.save({key: x for key, x in old.items() if key not in ("settings", "images")},
               tmp_path / "last.pt")
    with pytest.raises(ValueError, match="--batch-size 8 cannot resume"):
        small_run(monkeypatch, tmp_path, "--steps", 4, "--resume", "--batch-size", 8)
    (tmp_path / "last.pt").write_bytes(before)
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 4, "--resume")
    printed = capsys.readouterr().out
    assert "after step 2; changed: steps 4 (was 2)\n" in printed
    assert [step for step, _ in run.steps(loader)] == [2, 3]
    assert "the data set has changed" not in printed + capsys.readouterr().out
    run.folder.lock.close()
    run, loader, _ = small_run(monkeypatch, tmp_path, "--steps", 4, "--resume")
    loader.images.pixels = loader.images.pixels.repeat(2, 1, 1, 1)
    assert next(run.steps(loader))[0] == 2
    assert "it has 32 images now and had 16; order" in capsys.readouterr().out


def test_a_folder_of_images_is_not_the_folder_of_a_run(tmp_path):
    (tmp_path / "photos/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/cat/a.jpg")
    for folder in ("photos", "photos/cat"):
        with pytest.raises(ValueError, match="contains images, such as .*a.jpg, and .* with --out"):
            opened(tmp_path / folder, resume=False)
    assert not list(tmp_path.rglob(".lock"))
    opened(tmp_path / "photos/cat/mine", resume=False).lock.close()
    earlier = tmp_path / "earlier"                         # ended after its first visualization
    earlier.mkdir()
    (earlier / "config.yaml").write_text("")
    (earlier / ".lock").touch()
    Image.new("RGB", (8, 8)).save(earlier / "visualization.png")
    opened(earlier, resume=False).lock.close()


def test_the_files_of_another_program_are_not_replaced(tmp_path):
    for name in ("metrics.jsonl", "config.yaml"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("of another program")
        with pytest.raises(ValueError, match=f"contains {name}, but is not a run's folder; choose"):
            opened(folder, resume=False)
        assert (folder / name).read_text() == "of another program"
        assert not (folder / ".lock").exists()


def test_tensorboard_hides_the_steps_after_the_one_that_is_resumed(tmp_path, monkeypatch):
    writer = SimpleNamespace(SummaryWriter=lambda path, purge_step: (path, purge_step))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    assert opened(tmp_path, resume=False).tensorboard(7) == (tmp_path, 8)


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    for name in ("last.pt.123.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    opened(tmp_path, resume=False).lock.close()
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "notes.tmp"}


def test_a_folder_with_other_files_is_not_moved_away(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(b"")
    opened(tmp_path, resume=False).lock.close()                             # next to it
    (tmp_path / "encoder.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="but no config.yaml, so it is not a run's folder"):
        opened(tmp_path, resume=False)
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the current directory is inside .* cannot be renamed"):
        opened(tmp_path, resume=False)
    assert (tmp_path / "weights.pt").exists()


@pytest.mark.parametrize("flags, message", [
    ("--batch-size 4096", "more than the 2048 training images of synthetic: try --batch-size 2048"),
    ("--group-size 1", "--group-size must be 2 or more"),
    ("--batch-size 18", "must divide the 18 images per process: try --group-size 2"),
    ("--accum-iter 2", "micro-batches would change the result"),
    ("--noise-ratio 0.9", "at most 0.8"),
    ("--data cifr10", "did you mean 'cifar10'"),
    ("--device abacus", "cuda, cuda:1, cpu or auto"),
    ("--lr nan", "--lr must be 0 or more"),
    ("--lambda-rec 0 --lambda-cls 0 --lambda-patch 0", "there is no loss"),
    ("--lr 1e30 --warmup-epochs 0 --clip-grad 0 --steps 9", "not finite")])
def test_impossible_settings_are_errors_of_one_line(tmp_path, flags, message, monkeypatch, capsys):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    argv = ["mmc.py", *TINY, "--steps", "1", "--out", str(tmp_path), *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        config.main(mmc.main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.slow
def test_folders_without_images(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("not an image")
    output = finish(run("--data", tmp_path / "texts", "--out", tmp_path / "o"), code=2)
    assert "No images under" in output


@pytest.mark.slow
def test_out_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    output = finish(run("--steps", 1, "--out", tmp_path / "file" / "run"), code=2)
    assert "cannot write to" in output and "--out" in output


@pytest.mark.slow
def test_a_full_disk_during_save_leaves_the_last_good_checkpoint(tmp_path):
    finish(run("--steps", 1, "--out", tmp_path))
    good = (tmp_path / "last.pt").read_bytes()

    def small_disk():  # files may not grow beyond 20 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    output = finish(run("--steps", 3, "--out", tmp_path, "--resume", preexec_fn=small_disk), code=2)
    assert "cannot write" in output and "Traceback" not in output
    assert (tmp_path / "last.pt").read_bytes() == good
    assert not list(tmp_path.glob("*.tmp"))
    finish(run("--steps", 3, "--out", tmp_path, "--resume"))


# ---- one run per folder --------------------------------------------------------------------------


def opened(folder, resume=True, init_from=""):
    """A RunFolder, opened as Run does it."""
    run_folder = RunFolder(SimpleNamespace(out=folder, init_from=init_from))
    run_folder.open(resume)
    return run_folder


OTHER = """
import os, sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from test_run import opened
run = opened(Path(sys.argv[1]))
if os.fork():
    print("locked", flush=True)
time.sleep(30)                           # the child: like a worker that outlives its run
"""


@pytest.mark.slow
def test_a_folder_is_locked_until_its_run_ends_even_if_workers_live_on(tmp_path):
    with subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, start_new_session=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(ValueError, match="another run is writing"):
                opened(tmp_path)
            other.kill(), other.wait()
            opened(tmp_path)
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_accepted(tmp_path, monkeypatch):
    def failing(number):
        def lockf(*_):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(fcntl, "lockf", lockf)

    failing(errno.ENOLCK)
    opened(tmp_path)
    failing(errno.EIO)
    with pytest.raises(OSError, match="cannot write to"):
        opened(tmp_path)


@pytest.mark.slow
def test_an_error_in_a_worker_is_one_line_and_ends_the_run(tmp_path):
    """Workers ignore SIGTERM, with which Python ends them at exit: it would wait forever."""
    for n in range(20):
        Image.new("RGB", (20, 20), (n, 0, 0)).save(tmp_path / f"{n}.png")
    script = ("import mmc\nfrom lib import config, datasets\n"
              "def resize(*_): raise ValueError('odd view')\n"
              "datasets.resize = resize\n"
              "config.main(mmc.main)")
    flags = [*TINY, "--data", tmp_path, "--workers", 2, "--steps", 3, "--out", tmp_path / "out"]
    output = finish(subprocess.Popen([sys.executable, "-c", script, *map(str, flags)], cwd=ROOT,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
                  code=2)
    assert output.strip().splitlines()[-1] == "error: ValueError: odd view"


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path, torchrun):
    command = [*torchrun, "mmc.py", *TINY, "--steps", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while "step 2/" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "received SIGTERM" in out, out
    assert torch.load(tmp_path / "last.pt")["step"] == records(tmp_path)[-1]["step"]
