"""Settings: their sources and bounds, and the messages and exit codes of errors."""
import dataclasses
import math
import sys

import pytest
import torch

import mae
import mmc
import selfpatch
from lib import config, distributed
from lib.config import Fraction, Size


@dataclasses.dataclass
class Bounded(config.Settings):
    mask_ratio: Fraction = 0.5
    size: Size = 1
    n: int = 0
    lr: float = 0.1


def test_precedence_is_dataclass_then_section_then_file_then_flags(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 2e-3\ntemperature: 0.3\n")
    cfg = config.parse(mmc.Config, ["--config", str(file), "--temperature", "0.4"])
    assert (cfg.min_lr, cfg.img_size, cfg.lr, cfg.temperature) == (1e-6, 48, 2e-3, 0.4)
    assert "min_lr" not in cfg.origin and cfg.origin["img_size"] == "configs/mmc.yaml [toy]"
    assert cfg.origin["lr"] == str(file) and cfg.origin["temperature"] == "flags"
    assert config.parse(mmc.Config, ["--data", "imagenet"]).img_size == 224


def test_a_section_can_be_chosen_and_is_kept_by_resume(tmp_path):
    def parse(*flags):
        return config.parse(mmc.Config, ["--data", "some/photos", "--out", str(tmp_path), *flags])

    assert config.parse(mmc.Config, ["--data", "photos"]).section == "imagenet100"   # a folder
    cfg = parse("--section", "photos")
    assert (parse().section, cfg.section) == ("imagenet100", "photos")
    assert (parse().img_size, cfg.img_size) == (224, 96)
    assert cfg.origin["img_size"] == "configs/mmc.yaml [photos]"
    (tmp_path / "config.yaml").write_text("section: photos\n")
    assert (parse("--resume").img_size, parse().img_size) == (96, 224)
    assert parse("--resume", "--section", "toy").img_size == 48
    with pytest.raises(ValueError, match="configs/mmc.yaml has no section 'foto'; did you mean "
                                         "photos"):
        parse("--section", "foto")


def test_a_file_with_sections(tmp_path):
    """The section is that of the run, also of a resumed one. Nothing in the file is ignored."""
    def parse(*flags):
        return config.parse(mmc.Config, ["--config", str(file), "--out", str(tmp_path), *flags])

    file = tmp_path / "mine.yaml"
    file.write_text("toy: {lr: 2e-3}\nphotos: {lr: 3e-3}\ncifar10:\n")
    assert (parse().lr, parse("--section", "photos").lr) == (2e-3, 3e-3)
    assert parse("--data", "cifar10").lr == config.parse(mmc.Config, ["--data", "cifar10"]).lr
    (tmp_path / "config.yaml").write_text("section: photos\n")
    assert parse("--resume").lr == 3e-3
    with pytest.raises(ValueError, match="mine.yaml has no section imagenet, only toy, photos, "
                                         "cifar10: add it, or choose one with --section"):
        parse("--data", "imagenet")
    file.write_text("toy: {lr: 2e-3}\nseed: 3\n")
    with pytest.raises(ValueError, match="mine.yaml: 'seed' is no section of configs/mmc.yaml; "):
        parse()


@pytest.mark.parametrize("text, message", [
    ("true: 1\n", "should contain lines of the form name: value"),
    ("toy: 3\n", "section toy should contain lines of the form name: value"),
    ("toy:\n  - lr: 1\n", "section toy should contain lines"),
    ("log_every: yes\n", "--log-every must be a whole number, not True"),
    ("method: mae\nlr: 1\n", "has the settings of a run of mae, not of mmc")])
def test_files_that_are_no_settings_of_this_method_are_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        config.parse(mmc.Config, ["--config", str(tmp_path / "mine.yaml")])


def test_the_length_of_a_run_is_given_once(tmp_path):
    def parse(*flags):
        return config.parse(mmc.Config, ["--out", str(tmp_path), *flags])

    with pytest.raises(ValueError, match="--steps and --epochs both give the length of the run"):
        parse("--steps", "6", "--epochs", "3")
    (tmp_path / "config.yaml").write_text("steps: 6\n")
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    for given in (["--epochs", "3"], ["--config", str(tmp_path / "mine.yaml")]):
        cfg = parse("--resume", *given)                  # else the run would be complete
        assert (cfg.steps, cfg.epochs) == (0, 3) and "steps" not in cfg.origin
    assert parse("--resume").steps == 6
    assert parse("--config", str(tmp_path / "mine.yaml"), "--steps", "2").steps == 2


def test_settings_below_a_choice_count_only_with_it(tmp_path):
    def parse(*flags):
        return config.parse(selfpatch.Config, ["--data", "coco", "--out", str(tmp_path), *flags])

    cfg, moby = parse(), parse("--base", "moby")
    assert (cfg.drop_path, moby.drop_path) == (0.1, 0.2)
    assert moby.origin["drop_path"] == "configs/selfpatch.yaml [coco], base moby"
    assert parse("--base", "moby", "--drop-path", "0.3").drop_path == 0.3
    file = tmp_path / "mine.yaml"
    file.write_text("base: moby\nlr: 2e-3\nbase dino: {seed: 1}\nbase moby: {seed: 2}\n")
    cfg = parse("--config", str(file))
    assert (cfg.drop_path, cfg.lr, cfg.seed) == (0.2, 2e-3, 2)
    assert parse("--config", str(file), "--base", "dino").drop_path == 0.1
    (tmp_path / "config.yaml").write_text("base: moby\n")
    assert (parse("--resume").drop_path, parse().drop_path) == (0.2, 0.1)
    file.write_text("bass moby: {lr: 1}\n")
    with pytest.raises(ValueError, match="unknown key 'bass moby'"):
        parse("--config", str(file))
    file.write_text("base moby: {drop_pth: 1}\nbase: moby\n")
    with pytest.raises(ValueError, match="unknown key 'drop_pth'.*did you mean drop_path"):
        parse("--config", str(file))


def test_a_flag_that_other_settings_replace_is_refused():
    cfg = config.parse(selfpatch.Config, ["--backbone", "swin_micro"])
    assert (cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads) == (12, 128, 6, 4)
    for name, value in (("embed_dim", "64"), ("depth", "4"), ("pos", "sincos_row")):
        with pytest.raises(ValueError, match=f"{config.flag(name)} {value} does not go with"):
            config.parse(selfpatch.Config, ["--backbone", "swin_micro", config.flag(name), value])
    config.parse(selfpatch.Config, ["--backbone", "swin_micro", "--embed-dim", "128"])
    config.parse(selfpatch.Config, ["--embed-dim", "48"])


def test_home_is_expanded_where_the_shell_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    file = tmp_path / "own.yaml"
    file.write_text("data: ~/photos")
    for argv in (["--data=~/photos"], ["--config", str(file)]):
        assert config.parse(mmc.Config, argv).data == "/home/ada/photos"
    assert config.parse(mmc.Config, ["--data=photos~/x"]).data == "photos~/x"


def test_every_setting_has_a_comment_for_the_help():
    assert all(text for _, _, text in config.fields(config.Settings).values())


def test_unknown_keys_flags_and_wrong_types_are_one_sentence(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("momentum_techer: 0.9\n")
    with pytest.raises(ValueError, match="did you mean momentum_teacher"):
        config.parse(mmc.Config, ["--config", str(file)])
    (tmp_path / "config.yaml").write_text("former: 1\n")            # of an older version
    with pytest.raises(ValueError, match="unknown key 'former' in the run to resume"):
        config.parse(mmc.Config, ["--out", str(tmp_path), "--resume"])
    (tmp_path / "config.yaml").write_text("method: mae\n")
    with pytest.raises(ValueError, match="is the folder of another method's run"):
        config.parse(mmc.Config, ["--out", str(tmp_path), "--resume"])
    with pytest.raises(SystemExit):
        config.parse(mmc.Config, ["--bach-size", "8"])
    assert "did you mean --batch-size?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        config.parse(mmc.Config, ["out/mmc-toy"])
    assert "'out/mmc-toy' does not belong to a flag" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--epochs must be above 0"):
        config.parse(mmc.Config, ["--epochs", "0"])
    with pytest.raises(ValueError, match="--depth must be a whole number, not 'six'"):
        config.parse(mmc.Config, ["--depth", "six"])
    with pytest.raises(ValueError, match="--batch-size must be 1 or more"):
        config.parse(mmc.Config, ["--batch-size", "0"])


def test_settings_of_an_earlier_run_count_only_if_it_is_resumed(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("seed: 7\n")
    file = tmp_path / "mine.yaml"
    for text, flags, seed in (("", ["--resume"], 7), ("", ["--resume", "false"], 0), ("", [], 0),
                              ("resume: true", [], 7), ("toy:\n  resume: true", [], 7)):
        file.write_text(text)
        cfg = config.parse(mmc.Config, ["--out", str(out), "--config", str(file), *flags])
        assert cfg.seed == seed, (text, flags)


def test_full_memory_and_killed_workers_are_one_line_and_other_errors_are_not_hidden(
        capsys, monkeypatch):
    def failing(error):
        def function():
            raise error
        config.main(function)

    for error, message in ((torch.OutOfMemoryError("CUDA out of memory."), "smaller --batch-size"),
                           (RuntimeError("DataLoader worker (pid 7) is killed"), "--workers")):
        with pytest.raises(SystemExit) as end:
            failing(error)
        assert end.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        failing(RuntimeError("a bug"))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    with pytest.raises(RuntimeError, match="closed by peer"):                # a single process
        failing(lost)
    monkeypatch.setattr(config.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(config.os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        failing(lost)
    error = capsys.readouterr().err
    assert error.startswith("error: the connection to another process was lost") and (
        error.count("\n") == 1)


def test_one_gpu_is_not_for_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.pick_device("cuda:1").index == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.pick_device("cuda").index == 1
    with pytest.raises(ValueError, match="one GPU for all processes of torchrun: leave it out"):
        distributed.pick_device("cuda:1")


@pytest.mark.parametrize("value, sentence", [
    (0.5, None), (0.0, None), (1.0, None), (1.5, "--mask-ratio must be 0 or more and at most 1"),
    (-0.1, "--mask-ratio must be 0 or more"), (math.nan, "not nan")])
def test_bounds_are_those_of_the_type(value, sentence):
    cfg = Bounded(mask_ratio=value)
    if sentence is None:
        return config.check_bounds(cfg)
    with pytest.raises(ValueError, match=sentence):
        config.check_bounds(cfg)


def test_sizes_begin_at_1_and_other_numbers_at_0():
    config.check_bounds(Bounded(n=0, lr=1e9, size=1))
    for wrong in (dict(size=0), dict(n=-1), dict(lr=-1e-9)):
        with pytest.raises(ValueError, match=f"--{list(wrong)[0]} must be [01] or more"):
            config.check_bounds(Bounded(**wrong))


@pytest.mark.parametrize("method, flags, message", [
    (mae, "--patch-size 7", "--img-size 48 must be a multiple of --patch-size 7"),
    (mae, "--patch-size 96", "--img-size 48 must be a multiple of --patch-size 96"),
    (mae, "--embed-dim 100", "--embed-dim 100 must be a multiple of --num-heads 3"),
    (mae, "--decoder-num-heads 5", "--decoder-embed-dim 48 must be a multiple of --decoder-num-he"),
    (mae, "--decoder-embed-dim 50", "--decoder-embed-dim 50 must be a multiple of 4, for the sine"),
    (mmc, "--embed-dim 90", "--embed-dim 90 must be a multiple of 4"),
    (mae, "--beta2 1", "--beta2 must be below 1"),
    (mae, "--normalization 0.5", "--normalization is of the network of --init-from: leave it out"),
    (mmc, "--drop-path 1", "--drop-path must be below 1")])
def test_settings_that_do_not_fit_are_refused_before_any_data_is_read(method, flags, message):
    with pytest.raises(ValueError, match=message):
        config.parse(method.Config, flags.split())
    learned = config.parse(mmc.Config, "--embed-dim 90 --pos learned".split())       # control
    assert learned.embed_dim == 90


@pytest.mark.parametrize("flag, end", [
    ("--arch", "unknown flag --arch (--help lists all)"),
    ("--momentum", "did you mean --momentum-teacher?"), ("--lrr", "did you mean --lr?")])
def test_only_a_similar_flag_is_suggested(flag, end, capsys):
    with pytest.raises(SystemExit):
        config.parse(mmc.Config, [flag, "1"])
    assert end in capsys.readouterr().err


def test_an_error_names_the_file_that_it_is_in(tmp_path):
    file = tmp_path / "mine.yaml"
    for content, message in ((b"steps: two\n", "--steps must be a whole number, not 'two' .from .*"
                                               "mine.yaml"),
                             (b"\x80", "mine.yaml is not a text file in UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            config.parse(mmc.Config, ["--config", str(file)])


def test_resume_takes_no_folder():
    with pytest.raises(ValueError, match="--resume must be true or false, not 'out/run'; name the "
                                         "run's folder with --out"):
        config.parse(mmc.Config, ["--resume", "out/run"])
