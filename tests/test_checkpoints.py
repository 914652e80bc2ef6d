"""lib/checkpoints.py: files in the published layouts, damaged and malicious files, our files."""
import argparse
import os
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from test_vit import BEIT, build, close, images

import vit
from lib import checkpoints, positions

# -------------------------------------------------------------------------------- official layouts

def split_names(state):
    """Our parameter names -> those of BEiT, CAE and SimMIM."""
    return {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
            for key, value in state.items()}


def add_prefix(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def norm_layer(name, affine=True):
    out = {f"{name}.running_mean": torch.randn(8), f"{name}.running_var": torch.rand(8),
           f"{name}.num_batches_tracked": torch.tensor(3)}
    return {**out, **({f"{name}.weight": torch.randn(8), f"{name}.bias": torch.randn(8)}
                      if affine else {})}


def projector():
    return {"0.weight": torch.randn(8, 192), **norm_layer("1"), "3.weight": torch.randn(8, 8),
            **norm_layer("4"), "6.weight": torch.randn(8, 8), **norm_layer("7", affine=False)}


def predictor():
    return {"0.weight": torch.randn(8, 8), **norm_layer("1"), "3.weight": torch.randn(8, 8),
            **norm_layer("4", affine=False)}


def dino_head():
    out = {f"mlp.{n}.{kind}": torch.randn(8, 8) if kind == "weight" else torch.randn(8)
           for n in (0, 2, 4) for kind in ("weight", "bias")}
    weights = {"last_layer.weight_g": torch.ones(9, 1), "last_layer.weight_v": torch.randn(9, 8)}
    return {**out, **weights}


def ibot_head():
    head = dino_head()
    return {**head, **{key.replace("last_layer.", "last_layer2."): value.clone()
                       for key, value in head.items() if "last_layer" in key}}


ARGS = argparse.Namespace(arch="vit_small", output_dir=pathlib.PosixPath("/data"), lr=np.float64(1))
OPTIMIZER = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
TWELVE = dict(num_heads=12)


def fine_tuned(model):
    return {"model": {**split_names(model.state_dict()), "fc_norm.weight": torch.ones(192),
                      "fc_norm.bias": torch.zeros(192), "head.weight": torch.zeros(10, 192)}}


def official():
    """{name: (layout, branch, source model, content of the file with the published keys)}."""
    plain = build(seed=1, resize="size")
    dino, other = build(seed=2), build(seed=3)
    moco, momentum = (build(seed=s, pos="sincos_row", resize="size", **TWELVE) for s in (4, 5))
    mae = build(seed=6, pos="sincos_col", resize="size")
    beit, beit1k = build(seed=7, **BEIT), build(seed=8, qkv_bias="split", resize="size")
    cae = build(seed=9, pos="sincos_row", layer_scale=0.1, qkv_bias="split", resize="size",
                **TWELVE)
    head = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    mask, lm_head = {"mask_token": torch.randn(1, 1, 192)}, {"lm_head.weight": torch.zeros(9, 192),
                                                            "lm_head.bias": torch.zeros(9)}
    index = {"rel_pos_bias.relative_position_index": positions.relative_index((4, 4))}
    moco_file = {
        "epoch": 300, "arch": "vit_base", "optimizer": OPTIMIZER, "scaler": {}, "state_dict": {
            **add_prefix("module.base_encoder.", moco.state_dict()),
            **add_prefix("module.base_encoder.head.", projector()),
            **add_prefix("module.momentum_encoder.", momentum.state_dict()),
            **add_prefix("module.momentum_encoder.head.", projector()),
            **add_prefix("module.predictor.", predictor())}}

    def pair(head, loss):
        student = {**add_prefix("module.backbone.", other.state_dict()),
                   **add_prefix("module.head.", head())}
        if loss == "ibot_loss":
            student["module.backbone.masked_embed"] = torch.zeros(1, 192)
        teacher = {**add_prefix("backbone.", dino.state_dict()), **add_prefix("head.", head())}
        return {"student": student, "teacher": teacher, "optimizer": OPTIMIZER, "epoch": 400,
                "args": ARGS, loss: {"center": torch.zeros(1, 9)}, "fp16_scaler": {"scale": 1.0}}

    dino_file, ibot_file = pair(dino_head, "dino_loss"), pair(ibot_head, "ibot_loss")
    decoder = {"embed.weight": torch.ones(64, 192), "pos_embed": torch.ones(1), "pred.bias":
               torch.ones(3), **add_prefix("blocks.0.", vit.Block(64, 2).state_dict())}
    rest_of_cae = {
        **mask, **add_prefix("alignment_encoder.", cae.state_dict()),
        **{key: torch.ones(2) for key in (
            "rd_pos_embed", "encoder_to_regresser.weight", "regresser.blocks.0.norm1.weight",
            "pretext_neck.norm.weight", "decoder.blocks.0.norm1.weight")}}
    return {
        "deit": ("DeiT", None, plain, {"model": {**plain.state_dict(), **head}}),
        "moco": ("MoCo v3", "base", moco, moco_file),
        "moco momentum": ("MoCo v3", "momentum", momentum, moco_file),
        "dino": ("DINO backbone", "teacher", dino, dict(dino.state_dict())),
        "dino full": ("DINO full", "teacher", dino, dino_file),
        "dino student": ("DINO full", "student", other, dino_file),
        "ibot": ("iBOT backbone", "teacher", dino, {"state_dict": dino.state_dict()}),
        "ibot full": ("iBOT full", "teacher", dino, ibot_file),
        "ibot student": ("iBOT full", "student", other, ibot_file),
        "mae": ("MAE", None, mae, {"model": mae.state_dict()}),
        "mae full": ("MAE", None, mae, {"model": {
            **mae.state_dict(), **mask, **add_prefix("decoder_", decoder)}}),
        "beit": ("BEiT 22k", None, beit, {"model": {
            **split_names(beit.state_dict()), **mask, **lm_head, **index}}),
        "beit 1k": ("BEiT 1k", None, beit1k, {"model": {
            **split_names(beit1k.state_dict()), **mask, **lm_head}}),
        "cae": ("CAE", None, cae, {
            "optimizer": OPTIMIZER, "epoch": 1, "scaler": {}, "args": ARGS, "model": {
                **add_prefix("encoder.", split_names(cae.state_dict())), **rest_of_cae}}),
        "simmim": ("SimMIM", None, beit, {
            "optimizer": OPTIMIZER, "lr_scheduler": {"t": 1}, "max_accuracy": np.float64(0),
            "epoch": 799, "amp": {}, "model": {
                **add_prefix("encoder.", {**split_names(beit.state_dict()), **mask, **index}),
                "decoder.0.weight": torch.ones(192, 192, 1, 1), "decoder.0.bias": torch.ones(1)}}),
        "augreg": ("timm augreg", None, plain, {**plain.state_dict(), **head}),
    }


@pytest.fixture(scope="module")
def files():
    return official()


def put(tmp_path, content, name="file.pth", **how):
    torch.save(content, tmp_path / name, **how)
    return tmp_path / name


NAMES = ["deit", "moco", "moco momentum", "dino", "dino full", "dino student", "ibot", "ibot full",
         "ibot student", "mae", "mae full", "beit", "beit 1k", "cae", "simmim", "augreg"]


METHOD_AND_INIT = {
    "DeiT": ("deit", "trunc"), "MoCo v3": ("moco_v3", "moco"), "DINO backbone": ("dino", "trunc"),
    "DINO full": ("dino", "trunc"), "iBOT backbone": ("ibot", "trunc"),
    "iBOT full": ("ibot", "trunc"), "MAE": ("mae", "mae"), "BEiT 22k": ("beit", "beit"),
    "BEiT 1k": ("beit", "beit"), "CAE": ("cae", "cae"), "SimMIM": ("simmim", "beit"),
    "timm augreg": ("augreg", "trunc")}


@pytest.mark.parametrize("name", NAMES)
def test_official_files_load_bit_for_bit(name, files, tmp_path, capsys):
    layout, branch, source, content = files[name]
    path = put(tmp_path, content)
    model = checkpoints.load_encoder(path, branch=branch)
    assert not model.training and model.source.layout == layout
    assert torch.equal(model(images()), source(images()))
    assert torch.equal(model(images(size=48)), source(images(size=48)))            # the resize rule
    assert model.config["num_heads"] == source.config["num_heads"]
    half = layout in ("BEiT 22k", "timm augreg")
    assert (model.source.mean, model.source.std) == (
        ((0.5,) * 3, (0.5,) * 3) if half else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert (model.source.method, model.config["init"]) == METHOD_AND_INIT[layout]
    assert model.source.interpolation == ("bilinear" if layout == "MoCo v3" else "bicubic")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and layout in printed and "heads" in printed
    path = put(tmp_path, content, "legacy.pth", _use_new_zipfile_serialization=False)
    legacy = checkpoints.load_encoder(path, branch=branch, quiet=True)
    assert torch.equal(legacy(images()), model(images()))
    assert capsys.readouterr().out == ""


def test_default_branch_is_the_one_to_evaluate(files, tmp_path):
    for name, branch in (("moco", "base"), ("dino full", "teacher"), ("ibot full", "teacher"),
                         ("dino", "teacher"), ("mae", "base")):
        path = put(tmp_path, files[name][3])
        model = checkpoints.load_encoder(path, quiet=True)
        assert model.source.branch == branch
        assert torch.equal(model(images()), files[name][2](images()))
    with pytest.raises(ValueError, match="has no student, only base"):
        checkpoints.load_encoder(path, branch="student")


def test_heads_are_kept_in_source(files, tmp_path):
    def heads(name, branch=None, **change):
        path = put(tmp_path, {**files[name][3], **change})
        return checkpoints.load_encoder(path, branch, quiet=True).source.heads

    moco = files["moco"][3]["state_dict"]
    found = heads("moco")
    assert set(found) == {"projector", "predictor"}
    assert set(heads("moco", "momentum")) == {"projector"}
    assert len(found["projector"]) == 16 and len(found["predictor"]) == 10
    assert torch.equal(found["projector"]["6.weight"], moco["module.base_encoder.head.6.weight"])
    assert torch.equal(heads("moco", "momentum")["projector"]["6.weight"],
                       moco["module.momentum_encoder.head.6.weight"])
    assert set(heads("dino full")["head"]) == set(dino_head())
    assert set(heads("ibot full", "student")["head"]) == set(dino_head())     # twins: one is kept
    unshared = {**files["ibot full"][3]["teacher"], "head.last_layer2.weight_v": torch.ones(9, 8)}
    assert set(heads("ibot full", teacher=unshared)["head"]) == set(ibot_head())
    assert "blocks.0.norm1.weight" in heads("mae full")["decoder"] and heads("mae") == {}


def test_number_of_heads_follows_the_layout_because_a_wrong_one_would_run(files, tmp_path):
    content = files["moco"][3]["state_dict"]
    state = {key[20:]: value for key, value in content.items()
             if key.startswith("module.base_encoder.") and ".head." not in key}
    moco = checkpoints.load_encoder(put(tmp_path, files["moco"][3]), quiet=True)
    wrong = vit.ViT(**{**moco.config, "num_heads": 3}).eval()
    wrong.load_state_dict(state)
    assert moco.config["num_heads"] == 12
    assert (wrong(images()) - moco(images())).abs().max() > 0.01
    with pytest.raises(ValueError, match="keys of DINO backbone, but its positions are not lear"):
        checkpoints.load_encoder(put(tmp_path, state))            # MoCo v3's, without its prefix


def test_swapped_halves_of_the_sincos_table_change_features(files, tmp_path):
    layout, _, source, content = files["mae"]
    state = dict(content["model"])
    state["pos_embed"] = state["pos_embed"].roll(96, 2)
    swapped = checkpoints.load_encoder(put(tmp_path, {"model": state}), quiet=True)
    assert (swapped(images()) - source(images())).abs().max() > 0.01


def test_half_precision_files_become_fp32(files, tmp_path):
    halved = {key: value.half() for key, value in files["dino"][3].items()}
    model = checkpoints.load_encoder(put(tmp_path, halved), quiet=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    close(model.cls_token, files["dino"][2].cls_token, 1e-3)


def test_augreg_npz_loads_bit_for_bit(files, tmp_path):
    source = files["augreg"][2]
    arrays = {"cls": source.cls_token,
              "head/kernel": torch.zeros(192, 10), "head/bias": torch.zeros(10),
              "pre_logits/kernel": torch.zeros(192, 192), "pre_logits/bias": torch.zeros(192),
              "Transformer/posembed_input/pos_embedding": source.pos_embed,
              "embedding/kernel": source.patch_embed.proj.weight.permute(2, 3, 1, 0),
              "embedding/bias": source.patch_embed.proj.bias,
              "Transformer/encoder_norm/scale": source.norm.weight,
              "Transformer/encoder_norm/bias": source.norm.bias}
    for i, block in enumerate(source.blocks):
        root = f"Transformer/encoderblock_{i}"
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            arrays |= {f"{root}/{name}/scale": norm.weight, f"{root}/{name}/bias": norm.bias}
        for name, fc in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            arrays |= {f"{root}/MlpBlock_3/{name}/kernel": fc.weight.T,
                       f"{root}/MlpBlock_3/{name}/bias": fc.bias}
        attn = f"{root}/MultiHeadDotProductAttention_1"
        for j, name in enumerate(("query", "key", "value")):
            rows = slice(192 * j, 192 * (j + 1))
            arrays[f"{attn}/{name}/kernel"] = block.attn.qkv.weight[rows].T.reshape(192, 3, 64)
            arrays[f"{attn}/{name}/bias"] = block.attn.qkv.bias[rows].reshape(3, 64)
        arrays |= {f"{attn}/out/kernel": block.attn.proj.weight.T.reshape(3, 64, 192),
                   f"{attn}/out/bias": block.attn.proj.bias}
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez(tmp_path / "B_16.npz", **arrays)
    model = checkpoints.load_encoder(tmp_path / "B_16.npz", quiet=True)
    assert model.source.layout == "timm augreg" and model.source.mean == (0.5, 0.5, 0.5)
    assert torch.equal(model(images()), source(images()))
    del arrays["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"]
    np.savez(tmp_path / "B_16.npz", **arrays)
    with pytest.raises(ValueError, match="missing: blocks.1.attn.qkv.weight"):
        checkpoints.load_encoder(tmp_path / "B_16.npz")


@pytest.mark.parametrize("name", ["mae", "dino full", "cae", "augreg"])
def test_missing_unexpected_and_misshapen_keys_are_listed(name, files, tmp_path):
    _, branch, _, content = files[name]
    inner = {"dino full": "teacher", "augreg": None}.get(name, "model")
    prefix = {"dino full": "backbone.", "cae": "encoder."}.get(name, "")

    def error_after(change):
        state = dict(content[inner] if inner else content)
        change(state)
        with pytest.raises(ValueError) as error:
            checkpoints.load_encoder(put(tmp_path, {**content, inner: state} if inner else state))
        assert "\n" not in str(error.value) and "Known layouts: DeiT, MoCo v3" in str(error.value)
        return str(error.value)

    key = f"{prefix}blocks.1.mlp.fc2.weight"
    assert "1 missing: blocks.1.mlp.fc2.weight" in error_after(lambda state: state.pop(key))
    assert "missing: patch_embed.proj.weight" in error_after(
        lambda state: state.pop(f"{prefix}patch_embed.proj.weight"))
    assert "1 unexpected: blocks.1.extra" in error_after(
        lambda state: state.update({f"{prefix}blocks.1.extra": torch.ones(1)}))
    assert "of another shape: norm.weight (7,) for (192,)" in error_after(
        lambda state: state.update({f"{prefix}norm.weight": torch.ones(7)}))
    assert "of another shape: patch_embed.proj.weight (192, 192)" in error_after(
        lambda state: state.update({f"{prefix}patch_embed.proj.weight": torch.ones(192, 192)}))
    assert "missing: blocks.0.norm1" in error_after(lambda state: [
        state.pop(key) for key in list(state) if ".0.norm1" in key])
    assert "1 unexpected" in error_after(lambda state: state.update({f"{prefix}note": "a string"}))


def test_errors_of_unknown_layouts_list_the_keys_and_the_known_layouts(tmp_path):
    one = torch.ones(1)
    for content in ({"layer1.conv.weight": one}, {"model": {"stem.weight": one}}, {},
                    {"student": {"a": one}, "teacher": {"b": one}}, {"state_dict": {"conv": 3}}):
        with pytest.raises(ValueError, match="unknown layout with .* known are DeiT, MoCo v3, "):
            checkpoints.load_encoder(put(tmp_path, content))
    with pytest.raises(ValueError, match="contains a list"):
        checkpoints.load_encoder(put(tmp_path, [1, 2]))
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        checkpoints.load_encoder(tmp_path / "nothing.pth")


def test_unsupported_models_are_rejected_with_a_reason(files, tmp_path):
    plain = files["deit"][3]["model"]
    distilled = {**plain, "dist_token": torch.zeros(1, 1, 192), "head_dist.bias": torch.zeros(10)}
    third = {**plain, "pos_embed": plain["pos_embed"][:, 1:]}
    learned = files["dino"][3]
    for content, message in (
            ({"model": distilled}, "distilled DeiT"), ({"model": third}, "DeiT III"),
            (third, "DeiT III"), (fine_tuned(files["beit 1k"][2]), "fine-tuned"),
            (fine_tuned(build(rel_pos="block", pos="none")), "fine-tuned"),
            ({"model": learned}, "keys of MAE, but its positions are not sin")):
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.load_encoder(put(tmp_path, content))
        assert "\n" not in str(error.value)


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
    with pytest.raises(ValueError, match="damaged"):
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
        net = checkpoints.load_encoder(path, quiet=True)
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


# ------------------------------------------------------------------------------------ our files

@pytest.mark.parametrize("more", [{}, BEIT, {"class_token": False, "pos": "sincos_row"}, TWELVE,
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


def test_another_image_size_is_printed(tmp_path, capsys):
    checkpoints.save_encoder(tmp_path / "encoder.pt", build())
    checkpoints.load_encoder(tmp_path / "encoder.pt", img_size=48)
    assert "grid 4 interpolated to 6" in capsys.readouterr().out
    checkpoints.load_encoder(tmp_path / "encoder.pt", img_size=32)
    assert "interpolated" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="image size 50 is not a multiple of patch size 8"):
        checkpoints.load_encoder(tmp_path / "encoder.pt", img_size=50)
