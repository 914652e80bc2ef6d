"""Shared by the probes that train: shuffled batches, parameter groups, copies of encoders, and
runs that are resumed after they were killed."""
import signal
from types import SimpleNamespace

import pytest
import torch
from small_models import make_encoder, make_model, make_options

import vit
from lib import checkpoints, rng, swin
from probes import detection, finetune, frozen_segmentation, pose, segmentation, training

BEIT = dict(pos="none", rel_pos="shared", layer_scale=0.1, qkv_bias="split", init="beit")
PROBES = dict(finetune=finetune.finetune, segmentation=segmentation.segmentation,
              linear_segmentation=frozen_segmentation.linear_segmentation, pose=pose.pose,
              detection=detection.detection)


# ---- batches -------------------------------------------------------------------------------------


def test_items_are_shuffled_and_none_is_lost(monkeypatch):
    def read():
        return (SimpleNamespace(image=torch.zeros(10, dtype=torch.uint8), id=i) for i in range(12))

    def first_ids(count):
        stream = training.shuffle_items(read, rng.generator(0))
        return [next(stream).id for _ in range(count)]

    ids = first_ids(24)                                      # all fit: whole epochs
    assert sorted(ids[:12]) == sorted(ids[12:]) == list(range(12)) and ids[:12] != ids[12:]
    monkeypatch.setattr(training, "SHUFFLE_BYTES", 50)       # a pool of five
    ids = first_ids(240)
    assert set(ids) == set(range(12)) and ids[:12] != sorted(ids[:12])
    assert max(map(ids.count, range(12))) - min(map(ids.count, range(12))) <= 8


# ---- parameter groups ----------------------------------------------------------------------------


def settings_by_name(net):
    """{name of a parameter: (factor, weight decay)}"""
    names = {id(p): name for name, p in net.named_parameters()}
    groups = training.layer_decay_groups(net.named_parameters(), net.encoder.depth, 0.65, 0.05)
    found = [(names[id(p)], (group["factor"], group["weight_decay"]))
             for group in groups for p in group["params"]]
    assert len(found) == len(names)                          # each parameter once
    return dict(found)


def with_head(encoder):
    net = torch.nn.Module()
    net.encoder, net.head = encoder, torch.nn.Linear(2, 2)
    return net


@pytest.mark.parametrize("names, pairs", [
    ("l_eye r_eye nose", [1, 0, 2]), ("eye-l nose eye-R", [2, 1, 0]),
    ("LeftHand RightHand", [1, 0]),
    ("cat: leye|cat: reye|cat: tail", [1, 0, 2]), ("lip rip", [0, 1]), ("left_eye nose", [0, 1])])
def test_left_and_right_change_in_a_mirrored_image(names, pairs):
    names = names.split("|" if "|" in names else None)
    assert training.flip_table(names)[:len(names)].tolist() == pairs


def test_register_tokens_are_in_layer_0_without_weight_decay():
    found = settings_by_name(with_head(make_encoder(registers=2)))
    assert found["encoder.register_tokens"] == found["encoder.cls_token"] == (0.65 ** 4, 0)


def test_layer_decay_of_twelve_blocks_is_the_published_one():
    net = with_head(make_encoder(depth=12))
    found = settings_by_name(net)
    for name, value in {"head.weight": 1, "head.bias": 1,
                        "encoder.blocks.11.norm1.weight": 0.65,
                        "encoder.blocks.11.mlp.fc2.weight": 0.65,
                        "encoder.blocks.0.attn.qkv.weight": 0.0057, "encoder.pos_embed": 0.0037,
                        "encoder.cls_token": 0.0037, "encoder.patch_embed.proj.bias": 0.0037,
                        }.items():
        assert found[name][0] == pytest.approx(value, abs=5e-5)
    assert found["encoder.norm.weight"] == (1, 0)


def test_matrices_have_weight_decay_but_not_vectors_class_token_and_positions():
    net = with_head(training.copy_encoder(make_encoder(**BEIT), 0.1))
    decayed = {name for name, (_, decay) in settings_by_name(net).items() if decay}
    assert decayed == {"head.weight", "encoder.patch_embed.proj.weight"} | {
        f"encoder.blocks.{i}.{name}" for i in range(3) for name in (
            "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
            "attn.relative_position_bias_table")}
    net = with_head(training.copy_encoder(make_encoder(pos="sincos_col"), 0.1))
    assert settings_by_name(net)["encoder.pos_embed"][1] == 0    # fixed before, trained here


# ---- copies of encoders --------------------------------------------------------------------------


def test_a_copy_gives_the_same_tokens_and_shares_no_memory():
    x = torch.randn(2, 3, 32, 32)
    for config in (BEIT, dict(pos="sincos_col"), dict(class_token=False)):
        net = make_encoder(0.1, **config)
        copy = training.copy_encoder(net, 0.1, final_norm=True).eval()
        torch.testing.assert_close(copy(x), net(x))
        memory = {p.data_ptr() for p in net.parameters()}
        assert not memory & {p.data_ptr() for p in copy.parameters()}
        assert all(p.requires_grad for p in copy.parameters())
        assert copy.config["drop_path"] == 0.1
    larger = torch.randn(2, 3, 48, 48)                       # tables are also resized
    net = make_encoder(0.1, **BEIT)
    copy = training.copy_encoder(net, 0.1, final_norm=True).eval()
    torch.testing.assert_close(copy(larger), net(larger))


def test_a_shared_position_table_becomes_one_for_each_block():
    net = make_encoder(0.1, **BEIT)
    tables = [block.attn.relative_position_bias_table
              for block in training.copy_encoder(net, 0.1).blocks]
    shared = net.rel_pos_bias.relative_position_bias_table
    assert all(torch.equal(table, shared) for table in tables)
    tables[0].data.zero_()
    assert torch.equal(tables[1], shared) and shared.any()


@pytest.mark.parametrize("reinit", [{0, 1}, {2}, set()])
@pytest.mark.parametrize("config", [{}, BEIT])
def test_reinit_initializes_these_blocks_and_no_others(reinit, config):
    net = make_encoder(0.1, **config)
    torch.manual_seed(5)
    fresh = vit.ViT(**{**net.config, "rel_pos": config and "block" or None}).state_dict()
    torch.manual_seed(5)
    copy = training.copy_encoder(net, 0.1, reinit, final_norm=True)
    kept = training.copy_encoder(net, 0.1, final_norm=True).state_dict()
    for name, x in copy.state_dict().items():
        initialized = name.startswith(tuple(f"blocks.{i}." for i in reinit))
        assert torch.equal(x, (fresh if initialized else kept)[name]), name
        assert not torch.equal(fresh[name], kept[name]) or name == "pos_embed"


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, dict(pos="sincos_col", resize="size"), BEIT,
                                    dict(registers=2, resize="antialias")])
def test_positions_are_resampled_once(config):
    net, x = make_encoder(0.1, **config), torch.randn(2, 3, 48, 48)
    copy = training.copy_encoder(net, 0.1, img_size=48, final_norm=True).eval()
    torch.testing.assert_close(copy(x), net(x), rtol=1e-4, atol=1e-4)
    assert copy.grid == (6, 6) and net.grid == (4, 4)
    same_size = dict(training.copy_encoder(net, 0.1).named_parameters())
    names = [name for name, p in copy.named_parameters()
             if p.shape != same_size.get(name, p).shape]
    assert names == ([f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)]
                     if config == BEIT else ["pos_embed"])


def test_an_official_encoder_knows_its_initialization(tmp_path):
    net = make_encoder(pos="sincos_col", init="mae", num_heads=1, resize="size")
    state = {**net.state_dict(), "mask_token": torch.zeros(1, 1, 8),
             "decoder_pred.weight": torch.zeros(4, 8)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    loaded = checkpoints.load_encoder(tmp_path / "mae.pth", num_heads=1)
    assert loaded.config["init"] == "mae"


# ---- resumed runs --------------------------------------------------------------------------------


class Killed(Exception):
    pass


def run_probe(task, folder, *argv):
    opt = make_options(task, "--data", "toy", "--limit", "16", "--out", str(folder), *argv)
    return PROBES[task](make_model(make_encoder()), opt)


@pytest.mark.parametrize("task", ["finetune", "segmentation", "linear_segmentation", "pose",
                                  pytest.param("detection", marks=pytest.mark.slow)])
def test_a_probe_that_was_killed_is_resumed(task, monkeypatch, tmp_path, capsys):
    if task == "detection":
        pytest.importorskip("pycocotools")
    length = ["--epochs", "4"] if task == "finetune" else ["--iters", "4"]   # 4 steps
    monkeypatch.setattr(training.Progress, "MINUTES", 0)                     # saved at every step
    step, steps_left, betas = torch.optim.AdamW.step, [9], set()

    def counting_step(self, *args):
        if not steps_left[0]:
            raise Killed
        steps_left[0] -= 1
        betas.update(group["betas"] for group in self.param_groups)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", counting_step)
    whole, folder = run_probe(task, tmp_path / "whole", *length), tmp_path / "killed"
    assert steps_left == [5] and not any((tmp_path / "whole" / "progress").iterdir())
    assert betas == {(0.9, 0.999)}
    steps_left[0] = 3
    with pytest.raises(Killed):
        run_probe(task, folder, *length)
    [file] = (folder / "progress").iterdir()
    capsys.readouterr()
    steps_left[0] = 9
    run_probe(task, folder, *length, "--seed", "1")          # other settings: from the start
    assert steps_left == [5] and "resumed" not in capsys.readouterr().out
    keys, generator = [], rng.generator
    monkeypatch.setattr(rng, "generator", lambda *key: (keys.append(key), generator(*key))[1])
    report = run_probe(task, folder, *length, *["--save"] * (task == "finetune"))   # no matter
    assert steps_left == [4] and f"{file}: resumed after step 3" in capsys.readouterr().out
    assert not file.exists()
    # finetune: in the epoch of the kill, of one step; detection: two, after a first look at the
    # data; the others: in a new order.
    first_steps = [key[2] for key in keys if key[1] == "order"]
    assert first_steps[task == "detection"] == (1 if task == "detection" else 3)
    if task == "finetune":                                   # the others see other images then
        assert report.rows == whole.rows and report.notes == whole.notes


@pytest.fixture
def interruptible():
    """Tests that were started in the background inherit that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_the_same_command_continues(monkeypatch, tmp_path, capsys, interruptible):
    whole, before = run_probe("finetune", tmp_path / "whole", "--epochs", "4"), signal.getsignal(
        signal.SIGINT)
    step, calls = torch.optim.AdamW.step, []

    def interrupted_step(self, *args):
        calls.append(step(self, *args))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)           # the step is completed
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt, match="saved after step 2 of 4: the same command"):
        run_probe("finetune", tmp_path, "--epochs", "4")
    assert signal.getsignal(signal.SIGINT) is before
    assert run_probe("finetune", tmp_path, "--epochs", "4").rows == whole.rows and len(calls) == 4
    assert "resumed after step 2" in capsys.readouterr().out

    def impatient_step(self, *args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)               # the second one ends it at once
    monkeypatch.setattr(torch.optim.AdamW, "step", impatient_step)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        run_probe("finetune", tmp_path, "--epochs", "3")


def test_progress_that_cannot_be_written_or_read_is_reported_in_one_sentence(monkeypatch, tmp_path,
                                                                           capsys):
    monkeypatch.setattr(training.Progress, "MINUTES", 0)

    def fail(path, write):
        raise OSError(f"cannot write {path} (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_atomic", fail)
        assert run_probe("finetune", tmp_path, "--epochs", "1").rows         # it continues
    assert "No space left" in capsys.readouterr().err
    monkeypatch.setattr(training.Progress, "delete", lambda self: None)
    run_probe("finetune", tmp_path, "--epochs", "1")
    [file] = (tmp_path / "progress").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="delete it to start finetune from scratch"):
        run_probe("finetune", tmp_path, "--epochs", "1")


# ---- Swin ----------------------------------------------------------------------------------------


def small_swin():
    torch.manual_seed(0)
    return swin.Swin(32, 2, 16, (2, 1, 2), (1, 2, 4), drop_path=0.3).eval()


def test_a_copy_of_a_swin_gives_the_same_tokens_without_the_norm_and_shares_no_memory():
    encoder, x = small_swin(), torch.randn(2, 3, 48, 48)
    copy = training.copy_encoder(encoder, 0.1, img_size=48).eval()
    assert copy.config == {**encoder.config, "drop_path": 0.1, "final_norm": False}
    assert torch.equal(copy(x), encoder.layers(x, [2], norm=False)[0][0])
    assert torch.equal(training.copy_encoder(encoder, 0.1, final_norm=True).eval()(x), encoder(x))
    for p in copy.parameters():
        p.data.zero_()
    assert encoder(x).abs().sum() > 0
    with pytest.raises(ValueError, match="this encoder is a Swin"):
        training.copy_encoder(encoder, 0.1, reinit=[0])


def test_layers_of_a_swin_are_its_stages():
    net = torch.nn.ModuleDict(dict(encoder=small_swin(), head=torch.nn.Linear(64, 3)))
    groups = training.layer_decay_groups(net.named_parameters(), 3, 0.5, 0.05)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {names[id(p)]: (group["factor"], group["weight_decay"])
             for group in groups for p in group["params"]}
    assert len(found) == len(names)
    for name, factor in {"features.0.0.weight": 1 / 16, "features.1.1.mlp.0.weight": 1 / 8,
                         "features.2.reduction.weight": 1 / 4,
                         "features.5.0.mlp.0.weight": 1 / 2}.items():
        assert found[f"encoder.{name}"] == (factor, 0.05), name
    assert found["encoder.norm.bias"] == (1, 0) and found["head.weight"] == (1, 0.05)
    assert found["encoder.features.0.2.weight"] == (1 / 16, 0)
