"""The plumbing: settings, averages, processes, and survival of kills, signals and bad input."""

import contextlib
import errno
import fcntl
import importlib
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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import mmc
from lib import augment, checkpoints, config, datasets
from lib import run as run_module
from lib.run import Run, cosine, ema_update, param_groups

ROOT = Path(__file__).parent.parent
TINY = ("--data synthetic --img-size 16 --patch-size 4 --embed-dim 16 --depth 2 --num-heads 2 "
        "--hidden 16 --out-dim 8 --group 4 --batch-size 16 --workers 0 --evals 0 --log-every 1 "
        "--precision fp32 --device cpu").split()


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


# ---- settings ------------------------------------------------------------------------------------


def test_precedence_is_dataclass_then_section_then_file_then_flags(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 2e-3\ntau: 0.3\n")
    cfg = config.parse(mmc.Config, ["--config", str(file), "--tau", "0.4"])
    assert (cfg.min_lr, cfg.img_size, cfg.lr, cfg.tau) == (1e-6, 64, 2e-3, 0.4)
    assert "min_lr" not in cfg.origin and cfg.origin["img_size"] == "section toy"
    assert cfg.origin["lr"] == str(file) and cfg.origin["tau"] == "flags"
    assert config.parse(mmc.Config, ["--data", "imagenet"]).img_size == 224


def test_every_setting_has_a_comment_for_the_help():
    assert all(text for _, _, text in config.fields(config.Settings).values())


def test_unknown_keys_flags_and_wrong_types_are_one_sentence(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("momentun: 0.9\n")
    with pytest.raises(ValueError, match="did you mean momentum"):
        config.parse(mmc.Config, ["--config", str(file)])
    (tmp_path / "config.yaml").write_text("former: 1\n")            # of an older version
    with pytest.raises(ValueError, match="unknown key 'former' in the run to resume"):
        config.parse(mmc.Config, ["--out", str(tmp_path), "--resume"])
    with pytest.raises(SystemExit):
        config.parse(mmc.Config, ["--bach-size", "8"])
    assert "did you mean --batch-size?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="depth is 'six', but should be of type int"):
        config.parse(mmc.Config, ["--depth", "six"])
    with pytest.raises(ValueError, match="--batch-size must be 1 or more"):
        config.parse(mmc.Config, ["--batch-size", "0"])


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
    decay, keep = param_groups(net, 0.04, spare=("0.weight",))
    assert decay["params"] == [] and len(keep["params"]) == 5


# ---- the vote ------------------------------------------------------------------------------------


class Looks(nn.Module):
    """A picture is known by its brightness: class token and patches are its rows of two tables."""

    def __init__(self, cls, patches):
        super().__init__()
        self.cls, self.patches = cls, patches

    def forward(self, x):
        assert not self.training                                             # no drop path
        return augment.denormalize(x)[:, 0, 0, 0].long()

    def split(self, number):
        return self.cls[number], self.patches[number]


def test_knn_votes_between_two_splits_of_the_same_classes_and_not_else():
    """Ten class tokens vote: the nearest alone is wrong. Patches of queries say the opposite."""
    cfg = SimpleNamespace(workers=0)
    run = SimpleNamespace(device=torch.device("cpu"), cfg=cfg, autocast=contextlib.nullcontext,
                          looking=contextlib.nullcontext, _mean=float)
    look = torch.tensor([0] * 6 + [1] * 6 + [0, 0, 1, 1])                    # the last 4: queries
    labels = look.clone()
    labels[0], cls = 1, 3 * F.one_hot(look, 4).float()
    cls[1:6, 2] = 0.3                           # a little apart from image 0 and from the queries
    net = Looks(cls, F.one_hot(torch.cat([look[:12], 1 - look[12:]]), 4)[:, None].expand(-1, 2, -1))
    pixels = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 3, 16, 16)
    bank = datasets.Images("x", "train", ["a", "b"], labels[:12], pixels[:12])
    tests = replace(bank, split="test", labels=labels[12:], pixels=pixels[12:])
    found = Run.knn(run, net, bank, tests, 16)
    assert (found["knn"], found["knn_pat"]) == (100, 0)
    unit = cls[:12] / cls[:12].square().sum(1, keepdim=True).sqrt()
    variance = (unit - unit.mean(0)).square().sum(0) / 11
    assert found["spread"].item() == pytest.approx(2 * variance.sqrt().mean().item())   # sqrt(D)
    for known, asked in ((bank, bank), (replace(bank, labels=None, classes=None), tests),
                         (bank, replace(tests, labels=None)),  # a flat val/
                         (bank, replace(tests, classes=["a", "c"]))):
        assert set(Run.knn(run, net, known, asked, 16)) == {"spread"}
    assert net.training
    run._mean = lambda x: x / 2                 # another process found nothing: it could not read
    assert Run.knn(run, net, bank, tests, 16) == {}


def test_what_is_looked_at_is_due_at_the_end_of_each_part_of_a_run():
    def due(times):
        return [step for step in range(10)
                if Run.due(SimpleNamespace(total=10, step=step), times)]

    assert (due(0), due(1), due(2), due(3)) == ([], [9], [4, 9], [3, 6, 9])


def test_a_folder_without_splits_is_trained_on_whole_and_asked_in_two_parts(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    cfg = SimpleNamespace(data=str(tmp_path), data_root="", img_size=8, batch_size=2, seed=0,
                          workers=0)
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), rank=0, world=1)
    loader, bank, queries = Run.data(run, [data.View(8)])
    assert len(loader.images) == 10 and (len(bank), len(queries)) == (8, 2)
    assert not set(bank.paths) & set(queries.paths)
    assert bank.classes == queries.classes and bank.split != queries.split        # as knn asks


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_compiled_networks_learn_the_same(method, monkeypatch, tmp_path):
    """By torch's backend that compiles nothing, but goes the same way."""
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


def test_what_was_said_of_a_run_counts_only_if_it_is_resumed(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("seed: 7\n")
    file = tmp_path / "mine.yaml"
    for text, flags, seed in (("", ["--resume"], 7), ("", ["--resume", "false"], 0), ("", [], 0),
                              ("resume: true", [], 7), ("toy:\n  resume: true", [], 7)):
        file.write_text(text)
        cfg = config.parse(mmc.Config, ["--out", str(out), "--config", str(file), *flags])
        assert cfg.seed == seed, (text, flags)


# ---- time ----------------------------------------------------------------------------------------


def test_a_save_is_due_after_so_many_minutes(monkeypatch):
    run = SimpleNamespace(_last_save=1000.0, cfg=SimpleNamespace(save_every=5), world=1, step=0,
                          total=10, _signalled=False)
    for now, due in ((1299.0, False), (1301.0, True)):
        monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda now=now: now))
        assert Run.save_due(run) == due


def test_speed_and_mfu_count_the_work_and_time_of_training_alone(monkeypatch, tmp_path):
    """Steps of 2 seconds by this clock, after each one 10 that do not count."""
    now = [0.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = Run(config.parse(mmc.Config, [
        *TINY, "--steps", "4", "--log-every", "2", "--out", str(tmp_path)]))
    loader = data.Loader(datasets.Images("x", "train", pixels=torch.zeros(
        16, 3, 16, 16, dtype=torch.uint8)), [data.View(16)], 16)
    net = run.place(nn.Linear(768, 10, bias=False))
    opt = torch.optim.SGD(net.parameters())
    run.restore(net=net, opt=opt)
    for _, batch in run.steps(loader):
        run.backward(net(batch.views[0].flatten(1)).mean(), opt)
        now[0] += 2
        with run.pause():
            now[0] += 10
        run.log(loss=0.0)
    flops = 2 * 2 * 768 * 10            # of an image: product and sum, forward and weight gradient
    for line in records(tmp_path):
        assert line["images_per_s"] == 8 and line["mfu"] == pytest.approx(flops * 8 / 1e12)


# ---- kills and pre-emption -----------------------------------------------------------------------

LONG = ["--log-every", 3, "--steps", 30, "--save-every", 0, "--warmup-epochs", 0,
        "--drop-path", 0.1]


FORKS = """
import os, sys, torch._dynamo, mmc, training        # AdamW would import dynamo: two seconds
distributed.measure_peak = lambda *_: 1e12
print("ready", flush=True)
for line in sys.stdin:                              # a run each, which is at once under way
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
    """SIGKILL at 20 random instants, spread over resumed runs, then SIGTERM once."""
    whole, out, steps, dice = tmp_path / "whole", tmp_path / "killed", [], random.Random(0)
    forks = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, text=True, bufsize=1,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ended(folder, seconds=60):
        """Whether a run came to its end in this time; if not, it is killed."""
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
        if ended(out, dice.uniform(0, seconds)):                # begin anew
            for file in out.iterdir():
                file.unlink()
        elif saved or (out / "last.pt").exists():               # once there, always readable
            steps.append(torch.load(out / "last.pt", weights_only=True)["step"])
    forks.stdin.close(), forks.wait()
    assert min(steps) > 0 and len(set(steps)) > 4, steps
    process = run(*LONG, "--out", out, "--resume")
    assert "resumed from" in process.stdout.readline() + process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    finish(process)
    finish(run(*LONG, "--out", out, "--resume"))
    assert (out / "encoder.pt").read_bytes() == (whole / "encoder.pt").read_bytes()
    timeless = ("images_per_s", "mfu", "data_share", "memory_gib")
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
    assert "told to stop" in finish(process, code=0)
    assert torch.load(tmp_path / "last.pt")["step"] == records(tmp_path)[-1]["step"] > 0
    assert checkpoints.load_encoder(tmp_path / "encoder.pt", quiet=True).source.branch == "teacher"


# ---- bad input: a sentence, exit code not 0 ------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.slow
def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path):
    out = tmp_path / "bad"
    out.mkdir()
    (out / "last.pt").write_bytes(pickle.dumps(Malicious()))
    assert "no checkpoint that can be resumed" in finish(run("--resume", "--out", out), code=2)
    assert not (ROOT / "hacked").exists()


@pytest.mark.slow
def test_an_earlier_run_is_kept(tmp_path):
    out = tmp_path / "run"
    finish(run("--steps", 1, "--out", out))
    first = (out / "encoder.pt").read_bytes()
    assert "is kept as" in finish(run("--steps", 1, "--seed", 3, "--out", out))
    assert (tmp_path / "run.1" / "encoder.pt").read_bytes() == first
    assert (out / "encoder.pt").read_bytes() != first


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_called_bad(tmp_path, monkeypatch):
    (tmp_path / "last.pt").write_bytes(b"")

    def stale(*_, **__):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(torch, "load", stale)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = Run(config.parse(mmc.Config, [*TINY, "--resume", "--out", str(tmp_path)]))
    with pytest.raises(OSError, match="Stale file handle.*nothing is lost: try again"):
        run.restore()


def test_a_folder_with_other_things_is_not_moved_away(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(b"")
    opened(tmp_path, resume=False)._lock.close()                             # beside it
    (tmp_path / "encoder.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="holds other things, too"):         # somebody's encoder
        opened(tmp_path, resume=False)
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds other things, too"):         # where we stand
        opened(tmp_path, resume=False)
    assert (tmp_path / "weights.pt").exists()


@pytest.mark.parametrize("flags, sentence", [
    ("--batch-size 4096", "choose 1 to 2048"),
    ("--batch-size 1 --group 1", "MMC contrasts an image with others"),
    ("--batch-size 18", "divisor of the 18 images"),
    ("--accumulate 2", "micro-batches would change the result"),
    ("--noise-share 0.9", "0.8 of the area is the most"),
    ("--data cifr10", "did you mean 'cifar10'"),
    ("--device abacus", "cuda, cuda:1, cpu or auto"),
    ("--lr nan", "--lr must be 0 or more"),
    ("--rec 0 --cls 0 --pat 0", "nothing to learn"),
    ("--lr 1e30 --warmup-epochs 0 --clip 0 --steps 9", "not finite")])
def test_settings_that_cannot_be(tmp_path, flags, sentence, monkeypatch, capsys):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    argv = ["mmc.py", *TINY, "--steps", "1", "--out", str(tmp_path), *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        config.main(mmc.main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and sentence in lines[0]


@pytest.mark.slow
def test_folders_without_images(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("not an image")
    said = finish(run("--data", tmp_path / "texts", "--out", tmp_path / "o"), code=2)
    assert "No images under" in said


@pytest.mark.slow
def test_out_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    said = finish(run("--steps", 1, "--out", tmp_path / "file" / "run"), code=2)
    assert "cannot write to" in said and "--out" in said


@pytest.mark.slow
def test_a_full_disk_during_save_leaves_the_last_good_checkpoint(tmp_path):
    finish(run("--steps", 1, "--out", tmp_path))
    good = (tmp_path / "last.pt").read_bytes()

    def small_disk():  # files may not grow beyond 20 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    said = finish(run("--steps", 3, "--out", tmp_path, "--resume", preexec_fn=small_disk), code=2)
    assert "cannot write" in said and "Traceback" not in said
    assert (tmp_path / "last.pt").read_bytes() == good
    assert not list(tmp_path.glob("*.tmp"))
    finish(run("--steps", 3, "--out", tmp_path, "--resume"))


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, split", [("cifar10", "train"), ("stl10", "unlabeled")])
def test_a_run_learns_from_its_images_and_asks_labelled_ones(monkeypatch, name, split):
    def load(name, root, split, size, limit, device, apart):
        return datasets.Images(split, (size, limit), pixels=torch.zeros(9, 3, 8, 8, dtype=torch.uint8))

    monkeypatch.setattr(datasets, "load_images", load)
    cfg = config.parse(mmc.Config, ["--data", name, "--batch-size", "8", "--group", "2"])
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), rank=1, world=2)
    loader, bank, queries = Run.data(run, mmc.views(cfg))
    assert [(x.name, x.split[1]) for x in (loader.images, bank, queries)] == [
        (split, None), ("train", 2000), ("test", 500)]
    assert (loader.batch_size, loader.rank, loader.world) == (8, 1, 2)


# ---- one run a folder ----------------------------------------------------------------------------


def opened(folder, resume=True):
    """A run's folder as Run opens it, without the run."""
    bare = SimpleNamespace(out=folder, cfg=SimpleNamespace(resume=resume, tensorboard=False),
                           _write_config=lambda: None)
    Run._open_folder(bare)
    return bare


OTHER = """
import os, sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from test_training import opened
run = opened(Path(sys.argv[1]))
if os.fork():
    print("locked", flush=True)
time.sleep(30)                           # the child is a decoder, which outlives its run
"""


def test_a_folder_is_locked_until_its_run_ends_whatever_the_decoders_do(tmp_path):
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


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def failing(number):
        def lockf(*_):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(fcntl, "lockf", lockf)

    failing(errno.ENOLCK)
    opened(tmp_path)
    failing(errno.EIO)
    with pytest.raises(OSError, match="cannot write to"):
        opened(tmp_path)


def test_full_memory_and_dead_decoders_are_one_sentence_and_other_errors_are_not_hidden(capsys):
    def failing(error):
        def function():
            raise error
        config.main(function)

    for error, said in ((torch.OutOfMemoryError("CUDA out of memory."), "smaller --batch-size"),
                        (RuntimeError("DataLoader worker (pid 7) is killed"), "fewer --workers")):
        with pytest.raises(SystemExit) as end:
            failing(error)
        assert end.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        failing(RuntimeError("a bug"))


@pytest.mark.slow
def test_an_error_in_a_decoder_is_one_sentence_and_ends_the_run(tmp_path):
    """Decoders ignore SIGTERM, by which Python would end them at exit, and would wait for ever."""
    for n in range(20):
        Image.new("RGB", (20, 20), (n, 0, 0)).save(tmp_path / f"{n}.png")
    script = ("import mmc\nfrom lib import config, datasets\n"
              "def resize(*_): raise ValueError('odd view')\n"
              "datasets.resize = resize\n"
              "config.main(mmc.main)")
    flags = [*TINY, "--data", tmp_path, "--workers", 2, "--steps", 3, "--out", tmp_path / "out"]
    said = finish(subprocess.Popen([sys.executable, "-c", script, *map(str, flags)], cwd=ROOT,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
                  code=2)
    assert said.strip().splitlines()[-1] == "error: ValueError: odd view"


@pytest.mark.slow
def test_told_to_stop_is_one_of_two_processes_and_both_do(tmp_path, torchrun):
    command = [*torchrun, "mmc.py", *TINY, "--steps", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while "step 2/" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "told to stop" in out, out
    assert torch.load(tmp_path / "last.pt")["step"] == records(tmp_path)[-1]["step"]
