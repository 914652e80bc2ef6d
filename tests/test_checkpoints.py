"""lib/checkpoints.py: damaged and malicious files, our files. Official files are in
test_checkpoint_layouts.py."""
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from test_checkpoint_layouts import load, official, put
from test_vit import BEIT, build, images

from lib import checkpoints


@pytest.fixture(scope="module")
def files():
    return official()


# ---------------------------------------------------------------------------------- untrusted files

class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_rejected_and_not_run(zipped, files, tmp_path):
    proof = tmp_path / "executed"
    path = put(tmp_path, {**files["dino full"][3], "args": Attack(proof)},
               _use_new_zipfile_serialization=zipped)
    for call in (checkpoints.read_file, checkpoints.load_encoder):
        with pytest.raises(ValueError, match=r"not plain data \(\w+\.mkdir\)") as error:
            call(path)
        assert "\n" not in str(error.value)
    assert not proof.exists()
    torch.load(path, weights_only=False)                      # without the check it runs
    assert proof.exists()


def test_pickled_arrays_in_an_npz_are_rejected_and_not_run(tmp_path):
    proof = tmp_path / "executed"
    np.savez(tmp_path / "a.npz", **{"embedding/kernel": np.array([Attack(proof)], dtype=object)})
    with pytest.raises(ValueError, match="Python objects that are not plain data"):
        checkpoints.read_file(tmp_path / "a.npz")
    assert not proof.exists()


def test_yacs_config_of_simmim_is_read_without_yacs(files, tmp_path, monkeypatch):
    class CfgNode(dict):
        """Pickles like yacs' class: a nested dict with attributes of its own."""
        def __init__(self, *args):
            super().__init__(*args)
            self.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={})

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    fake = types.ModuleType("yacs.config")
    fake.CfgNode = CfgNode
    content = {**files["simmim"][3], "config": CfgNode({"MODEL": CfgNode({"TYPE": "vit"})})}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", fake)
        paths = [put(tmp_path, content, f"{zipped}.pth", _use_new_zipfile_serialization=zipped)
                 for zipped in (True, False)]
    for path in paths:
        assert checkpoints.read_file(path)["config"] == {"MODEL": {"TYPE": "vit"}}
        net = load(path, files["simmim"][2])
        assert torch.equal(net(images()), files["simmim"][2](images()))


def test_classes_are_allowed_during_one_call_only(files, tmp_path):
    checkpoints.read_file(put(tmp_path, files["dino full"][3]))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pth", weights_only=True)


def test_errors_of_damaged_files_are_one_sentence(files, tmp_path):
    path = put(tmp_path, files["dino"][3])
    data = path.read_bytes()
    for bad in (data[:len(data) // 2], data[:100], b"", b"hello", b"\x80\x02]q\x00", data[5000:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged, truncated or not a PyTorch file") as error:
            checkpoints.load_encoder(path)
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchS")
def test_what_is_not_damage_is_not_called_damage(tmp_path, monkeypatch):
    program = torch._C.PyTorchFileWriter(str(tmp_path / "program.pt"))
    program.write_record("constants.pkl", b"", 0)
    program.write_end_of_file()
    with pytest.raises(ValueError, match="is a TorchScript program"):
        checkpoints.read_file(tmp_path / "program.pt")
    path = put(tmp_path, {"args": types.SimpleNamespace(lr=1)})
    with pytest.raises(ValueError, match=r"not plain data \(types.SimpleNamespace\)"):
        checkpoints.read_file(path)

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", deny)
    with pytest.raises(OSError, match=r"cannot read .*file.pth \(Permission denied\)"):
        checkpoints.read_file(path)


# ------------------------------------------------------------------------------------ our files

@pytest.mark.parametrize("more", [
    {}, BEIT, {"class_token": False, "pos": "sincos_row"}, {"num_heads": 12},
    {"registers": 2, "swiglu": True, "resize": "antialias"},
    {"rel_pos": "block", "final_norm": False, "drop_path": 0.1}])
def test_a_saved_encoder_is_loaded_unchanged(more, tmp_path):
    model, heads = build(**more), {"head": {"weight": torch.randn(3, 4)}}
    path = tmp_path / "encoder.pt"
    checkpoints.save_encoder(path, model, branch="student", method="dino", data="toy", step=70,
                             heads=heads, mean=(0.5,) * 3, epochs=3)
    again = checkpoints.load_encoder(path, quiet=True)
    assert torch.equal(again(images()), model(images())) and again.config == model.config
    source = again.source
    assert (source.layout, source.branch, source.method, source.data, source.step, source.mean) == (
        "ours", "student", "dino", "toy", 70, (0.5,) * 3)
    assert torch.equal(source.heads["head"]["weight"], heads["head"]["weight"])
    raw = checkpoints.read_file(path)
    assert raw["epochs"] == 3 and raw["format"] == "encoder/1"
    assert os.listdir(tmp_path) == ["encoder.pt"]
    with pytest.raises(ValueError, match="has no teacher, only student"):
        checkpoints.load_encoder(path, branch="teacher")
    heads = model.config["num_heads"]
    same = checkpoints.load_encoder(path, num_heads=heads, normalization="0.5", quiet=True)
    assert torch.equal(same(images()), model(images()))
    with pytest.raises(ValueError, match=f"has {heads} heads, not {heads + 1}: leave out --num-h"):
        checkpoints.load_encoder(path, num_heads=heads + 1)
    with pytest.raises(ValueError, match="contains the mean of its input, .*: leave out --norm"):
        checkpoints.load_encoder(path, normalization="imagenet")


def test_equal_content_gives_equal_bytes_for_any_file_name(tmp_path):
    paths = [tmp_path / "a.pt", tmp_path / "another.pt", tmp_path / "c.pt"]
    for path, seed in zip(paths, (0, 0, 1)):
        checkpoints.save_encoder(path, build(seed), method="mae")
    a, b, c = (path.read_bytes() for path in paths)
    assert a == b and a != c


def test_a_failed_save_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "encoder.pt"
    checkpoints.save_encoder(path, build(), step=1)
    before = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        checkpoints.save_encoder(path, build(1), step=2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("message, kind, expected", [
    ("PytorchStreamWriter failed writing file data/0", OSError, "free some space"),
    ("CUDA error: an illegal memory access", RuntimeError, "illegal memory access")])
def test_only_errors_of_the_disk_are_reported_as_such(tmp_path, message, kind, expected):
    def write(_):
        raise RuntimeError(message)

    with pytest.raises(kind, match=expected):
        checkpoints.write_atomic(tmp_path / "x.pt", write)
    assert not list(tmp_path.iterdir())


def test_only_plain_data_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\['step'\] is a float64"):
        checkpoints.save_encoder(tmp_path / "encoder.pt", build(), step=np.float64(3))
    assert os.listdir(tmp_path) == []


def test_our_files_that_are_not_encoders_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="is a training state; use encoder.pt of the same"):
        checkpoints.load_encoder(put(tmp_path, {"format": "training/1", "model": {}}, "last.pt"))
    checkpoints.save_encoder(tmp_path / "encoder.pt", build())
    good = checkpoints.read_file(tmp_path / "encoder.pt")
    for change, message in (
            ({"format": "encoder/2"}, "encoder/2"), ({"model": None}, "unknown format"),
            ({"config": {**good["config"], "color": 1}}, "does not describe a ViT"),
            ({"config": {**good["config"], "depth": 3}}, "missing: blocks.2")):
        with pytest.raises(ValueError, match=message):
            checkpoints.load_encoder(put(tmp_path, {**good, **change}))


def test_another_image_size_and_the_step_are_printed(tmp_path, capsys):
    checkpoints.save_encoder(tmp_path / "encoder.pt", build())
    checkpoints.load_encoder(tmp_path / "encoder.pt", img_size=48)
    assert "grid 4 interpolated to 6" in capsys.readouterr().out
    checkpoints.load_encoder(tmp_path / "encoder.pt", img_size=32)
    printed = capsys.readouterr().out
    assert "interpolated" not in printed and "after step" not in printed
    checkpoints.save_encoder(tmp_path / "encoder.pt", build(), step=300)
    checkpoints.load_encoder(tmp_path / "encoder.pt")
    assert "ours, untrained after step 300; " in capsys.readouterr().out
    with pytest.raises(ValueError, match="image size 50 is not a multiple of patch size 8"):
        checkpoints.load_encoder(tmp_path / "encoder.pt", img_size=50)
