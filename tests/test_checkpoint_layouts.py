"""lib/checkpoint_layouts.py: files with the keys of each published layout, against the network that
they were made from, timm, or the formula written out."""
import argparse
import functools
import importlib
import pathlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_vit import BEIT, build, close, images
from torch import nn

import selfpatch
import vit
from lib import checkpoint_heads, checkpoint_layouts, checkpoints, positions

# -------------------------------------------------------------------------------- official layouts

def split_names(state):
    """Our parameter names -> those of BEiT, CAE, SimMIM and DeiT III."""
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


def dino_head(width=192):
    out = {f"mlp.{n}.{kind}": torch.randn(8, 8 if n else width) if kind == "weight" else
           torch.randn(8) for n in (0, 2, 4) for kind in ("weight", "bias")}
    weights = {"last_layer.weight_g": torch.ones(9, 1), "last_layer.weight_v": torch.randn(9, 8)}
    return {**out, **weights}


def dino_head_with_batch_norm():
    out = {"mlp.0.weight": torch.randn(8, 192), **norm_layer("mlp.1"),
           "mlp.3.weight": torch.randn(8, 8), **norm_layer("mlp.4"), "mlp.6.weight":
           torch.randn(8, 8), "mlp.6.bias": torch.randn(8)}
    return {**out, "last_layer.weight_g": torch.ones(9, 1), "last_layer.weight_v":
            torch.randn(9, 8)}


def ibot_head():
    head = dino_head()
    return {**head, **{key.replace("last_layer.", "last_layer2."): value.clone()
                       for key, value in head.items() if "last_layer" in key}}


def class_attention():
    """SelfPatch's ca_head under the names of its code."""
    block = {"attn.q": (192, 192), "attn.k": (192, 192), "attn.v": (192, 192),
             "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768),
             "norm1": (192,), "norm2": (192,)}
    out = {"cls_token": torch.randn(1, 1, 192), "norm.weight": torch.randn(192),
           "norm.bias": torch.randn(192)}
    for i in (0, 1):
        for name, shape in block.items():
            out[f"cls_blocks.{i}.{name}.weight"] = torch.randn(shape) * 0.05
            out[f"cls_blocks.{i}.{name}.bias"] = torch.randn(shape[0]) * 0.05
    return out


ARGS = argparse.Namespace(arch="vit_small", output_dir=pathlib.PosixPath("/data"), lr=np.float64(1))
OPTIMIZER = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
TWELVE = dict(num_heads=12)


@functools.cache                                     # also for tests/test_init_from.py
def official():
    """{name: (layout, branch, source model, content of the file with the published keys)}."""
    plain = build(seed=1, resize="size")
    dino, other = build(seed=2), build(seed=3)
    moco, momentum = (build(seed=s, pos="sincos_row", resize="size", **TWELVE) for s in (4, 5))
    mae = build(seed=6, pos="sincos_col", resize="size")
    beit, beit1k = build(seed=7, **BEIT), build(seed=8, qkv_bias="split", resize="size")
    cae = build(seed=9, pos="sincos_row", layer_scale=0.1, qkv_bias="split", resize="size",
                **TWELVE)
    patch = build(seed=10, class_token=False, final_norm=False)
    third = build(seed=11, layer_scale=0.1, resize="size")
    third.pos_embed.data[:, 0] = 0
    tuned = build(seed=12, final_norm=False, resize="size")
    tuned_beit = build(seed=13, final_norm=False, **{**BEIT, "rel_pos": "block"})
    tuned_cae = build(seed=14, final_norm=False, pos="sincos_row", rel_pos="block", resize="size",
                      layer_scale=0.1, qkv_bias="split", **TWELVE)
    dino2 = build(seed=15, layer_scale=0.1)
    registers = build(seed=16, layer_scale=0.1, registers=4, resize="antialias")
    head = {"head.weight": torch.randn(10, 192), "head.bias": torch.randn(10)}
    fc_norm = {"fc_norm.weight": torch.randn(192), "fc_norm.bias": torch.randn(192), **head}
    mask, lm_head = {"mask_token": torch.randn(1, 1, 192)}, {"lm_head.weight": torch.zeros(9, 192),
                                                            "lm_head.bias": torch.zeros(9)}
    relative = positions.relative_index((4, 4))
    index = {"rel_pos_bias.relative_position_index": relative}
    indices = {f"blocks.{i}.attn.relative_position_index": relative for i in (0, 1)}
    moco_file = {
        "epoch": 300, "arch": "vit_base", "optimizer": OPTIMIZER, "scaler": {}, "state_dict": {
            **add_prefix("module.base_encoder.", moco.state_dict()),
            **add_prefix("module.base_encoder.head.", projector()),
            **add_prefix("module.momentum_encoder.", momentum.state_dict()),
            **add_prefix("module.momentum_encoder.head.", projector()),
            **add_prefix("module.predictor.", predictor())}}

    def pair(head, loss, teacher=dino, student=other):
        student = {**add_prefix("module.backbone.", student.state_dict()),
                   **add_prefix("module.", head())}
        if loss == "ibot_loss":
            student["module.backbone.masked_embed"] = torch.zeros(1, 192)
        teacher = {**add_prefix("backbone.", teacher.state_dict()), **head()}
        return {"student": student, "teacher": teacher, "optimizer": OPTIMIZER, "epoch": 400,
                "args": ARGS, loss: {"center": torch.zeros(1, 9)}, "fp16_scaler": {"scale": 1.0}}

    dino_file = pair(lambda: add_prefix("head.", dino_head()), "dino_loss")
    ibot_file = pair(lambda: add_prefix("head.", ibot_head()), "ibot_loss")
    selfpatch_file = pair(lambda: {
        **add_prefix("ca_head.", class_attention()), **add_prefix("c_head.", dino_head()),
        **add_prefix("p_head.", dino_head())}, "dino_loss", patch, build(seed=17, class_token=False,
                                                                        final_norm=False))
    batch_norm = {"teacher": add_prefix("module.", {
        **add_prefix("backbone.", dino.state_dict()),
        **add_prefix("head.", dino_head_with_batch_norm())})}
    decoder = {"embed.weight": torch.ones(64, 192), "pos_embed": torch.ones(1), "pred.bias":
               torch.ones(3), **add_prefix("blocks.0.", vit.Block(64, 2).state_dict())}
    rest_of_cae = {
        **mask, **add_prefix("alignment_encoder.", cae.state_dict()),
        **{key: torch.ones(2) for key in (
            "rd_pos_embed", "encoder_to_regresser.weight", "regresser.blocks.0.norm1.weight",
            "pretext_neck.norm.weight", "decoder.blocks.0.norm1.weight")}}
    cae_file = {"optimizer": OPTIMIZER, "epoch": 1, "scaler": {}, "args": ARGS, "model": {
        **add_prefix("encoder.", split_names(cae.state_dict())), **rest_of_cae}}
    narrow = {"mask_token": torch.ones(1, 1, 64), "rd_pos_embed": torch.ones(1, 17, 64), **{
        f"encoder_to_regresser{kind}": torch.ones(64, 192)[:, 0 if "norm" in kind else ...]
        for kind in (".weight", ".bias", "_norm.weight", "_norm.bias")},
        "regresser.regressor_blocks.0.q_bias": torch.ones(64), "decoder.head.bias": torch.ones(9)}
    simmim = {"optimizer": OPTIMIZER, "lr_scheduler": {"t": 1}, "max_accuracy": np.float64(0),
              "epoch": 799, "amp": {}}
    beit_file = {**split_names(beit.state_dict()), **mask, **lm_head, **index}
    cls_layers = add_prefix("cls_pt_layers.0.", split_names(beit.blocks[0].state_dict()))
    beit_tuned_file = {**split_names(tuned_beit.state_dict()), **indices, **fc_norm}
    dinov2_file = {**dino2.state_dict(), "mask_token": torch.zeros(1, 192)}
    chunked = {key.replace("blocks.", "blocks.0."): x for key, x in dinov2_file.items()}
    third_state = {**third.state_dict(), "pos_embed": third.pos_embed[:, 1:]}
    return {
        "deit": ("DeiT", "base", plain, {"model": {**plain.state_dict(), **head}}),
        "deit training": ("DeiT", "base", plain, {
            "model": {**plain.state_dict(), **head}, "model_ema": {**other.state_dict(), **head},
            "optimizer": OPTIMIZER, "lr_scheduler": {}, "epoch": 3, "scaler": {}, "args": ARGS}),
        "deit ema": ("DeiT", "ema", build(seed=3, resize="size"), {
            "model": {**plain.state_dict(), **head}, "model_ema": {**other.state_dict(), **head}}),
        "deit3": ("DeiT III", "base", third, {"model": {**split_names(third_state), **head}}),
        "deit3 timm": ("DeiT III", "base", third, {**third_state, **head}),
        "moco": ("MoCo v3", "base", moco, moco_file),
        "moco momentum": ("MoCo v3", "momentum", momentum, moco_file),
        "moco to deit": ("MoCo v3", "base", moco, {"model": moco.state_dict()}),
        "moco linear probe": ("MoCo v3", "base", moco, {
            "epoch": 90, "arch": "vit_base", "best_acc1": 1.0,
            "state_dict": add_prefix("module.", {**moco.state_dict(), **head})}),
        "dino": ("DINO", "teacher", dino, dict(dino.state_dict())),
        "dino full": ("DINO", "teacher", dino, dino_file),
        "dino student": ("DINO", "student", other, dino_file),
        "dino slimmed": ("DINO", "teacher", dino, {"teacher": dino_file["teacher"]}),
        "dino fork": ("DINO", "teacher", dino, {
            key: value for key, value in dino_file.items() if key != "dino_loss"}),
        "dino batch norm": ("DINO", "teacher", dino, batch_norm),
        "dino compiled": ("DINO", "teacher", dino, {
            "teacher": add_prefix("_orig_mod.backbone.", dino.state_dict())}),
        "dino in a module": ("DINO", "teacher", dino, add_prefix("module.backbone.",
                                                               dino.state_dict())),
        "unknown encoder": ("plain ViT", "base", plain, {"model": add_prefix(
            "encoder.", plain.state_dict())}),
        "ibot": ("iBOT", "teacher", dino, {"state_dict": dino.state_dict()}),
        "ibot flat student": ("iBOT", "student", other, {
            "state_dict": {**other.state_dict(), "masked_embed": torch.zeros(1, 192)}}),
        "ibot full": ("iBOT", "teacher", dino, ibot_file),
        "ibot student": ("iBOT", "student", other, ibot_file),
        "selfpatch": ("SelfPatch", "teacher", patch, dict(patch.state_dict())),
        "selfpatch full": ("SelfPatch", "teacher", patch, selfpatch_file),
        "dinov2": ("DINOv2", "teacher", dino2, dinov2_file),
        "dinov2 training": ("DINOv2", "teacher", dino2, {"teacher": {
            **add_prefix("backbone.", chunked), **add_prefix("dino_head.", dino_head()),
            **add_prefix("ibot_head.", dino_head())}}),
        "dinov2 registers": ("DINOv2", "teacher", registers, {
            **registers.state_dict(), "mask_token": torch.zeros(1, 192)}),
        "mae": ("MAE", "base", mae, {"model": mae.state_dict()}),
        "mae full": ("MAE", "base", mae, {"model": {
            **mae.state_dict(), **mask, **add_prefix("decoder_", decoder)}}),
        "mae fine-tuned": ("fine-tuned MAE", "base", tuned, {
            "model": {**tuned.state_dict(), **fc_norm}, "args": ARGS}),
        "mae linear probe": ("MAE", "base", mae, {"model": {
            **mae.state_dict(), "head.0.running_mean": torch.randn(192), "head.0.running_var":
            torch.rand(192), "head.0.num_batches_tracked": torch.tensor(2),
            **{key.replace("head.", "head.1."): x for key, x in head.items()}}}),
        "beit": ("BEiT", "base", beit, {"model": beit_file}),
        "beit v2": ("BEiT v2", "base", beit, {"model": {**beit_file, **cls_layers}}),
        "beit 1k": ("BEiT 1k", "base", beit1k, {"model": {
            **split_names(beit1k.state_dict()), **mask, **lm_head}}),
        "beit stripped": ("BEiT or SimMIM", "base", beit, split_names(beit.state_dict())),
        "beit fine-tuned": ("fine-tuned BEiT", "base", tuned_beit, {"model": beit_tuned_file}),
        "cae": ("CAE", "base", cae, cae_file),
        "cae narrow decoder": ("CAE", "base", cae, {"model": {
            **add_prefix("encoder.", split_names(cae.state_dict())), **narrow,
            **add_prefix("alignment_encoder.", split_names(cae.state_dict()))}}),
        "cae stripped": ("CAE", "base", cae, {"model": split_names(cae.state_dict())}),
        "cae fine-tuned": ("CAE", "base", tuned_cae, {
            "model": {**split_names(tuned_cae.state_dict()), **indices, **fc_norm}}),
        "cae attentive": ("CAE", "base", cae, {"model": {
            **split_names(cae.state_dict()), **head, "query_token": torch.ones(1, 1, 192),
            "fc_norm.running_mean": torch.ones(192),
            "attentive_blocks.0.cross_attn.q.weight": torch.ones(192, 192)}}),
        "simmim": ("SimMIM", "base", beit, {**simmim, "model": {
            **add_prefix("encoder.", {**split_names(beit.state_dict()), **mask, **index}),
            "decoder.0.weight": torch.ones(192, 192, 1, 1), "decoder.0.bias": torch.ones(1)}}),
        "simmim fine-tuned": ("SimMIM", "base", tuned_beit, {**simmim, "model": beit_tuned_file}),
        "timm": ("timm", "base", build(seed=1, resize="antialias"), {**plain.state_dict(), **head}),
    }


NAMES = """deit, deit training, deit ema, deit3, deit3 timm, moco, moco momentum, moco to deit,
    moco linear probe, dino, dino full, dino student, dino slimmed, dino fork, dino batch norm,
    dino compiled, dino in a module, unknown encoder, ibot, ibot flat student, ibot full,
    ibot student, selfpatch, selfpatch full, dinov2, dinov2 training, dinov2 registers, mae,
    mae full, mae fine-tuned, mae linear probe, beit, beit v2, beit 1k, beit stripped,
    beit fine-tuned, cae, cae narrow decoder, cae stripped, cae fine-tuned, cae attentive, simmim,
    simmim fine-tuned, timm""".replace("\n   ", "").split(", ")


@pytest.fixture(scope="module")
def files():
    return official()


def put(tmp_path, content, name="file.pth", **how):
    torch.save(content, tmp_path / name, **how)
    return tmp_path / name


def load(path, source, **arguments):
    """load_encoder of a file that was made from `source`. The small networks were not published, so
    their number of heads is given unless the file contains it."""
    if source.config["rel_pos"] is None:
        arguments = dict(num_heads=source.config["num_heads"]) | arguments
    return checkpoints.load_encoder(path, **dict(quiet=True) | arguments)


METHOD_AND_INIT = {
    "DeiT": ("deit", "trunc"), "DeiT III": ("deit3", "trunc"), "MoCo v3": ("moco_v3", "moco"),
    "DINO": ("dino", "trunc"), "iBOT": ("ibot", "trunc"), "SelfPatch": ("selfpatch", "trunc"),
    "DINOv2": ("dinov2", "trunc"), "MAE": ("mae", "mae"), "fine-tuned MAE": ("mae", "mae"),
    "BEiT": ("beit", "beit"), "BEiT v2": ("beit", "beit"), "BEiT 1k": ("beit", "beit"),
    "BEiT or SimMIM": ("beit", "beit"), "fine-tuned BEiT": ("beit", "beit"),
    "CAE": ("cae", "cae"), "SimMIM": ("simmim", "beit"), "timm": ("augreg", "trunc"),
    "plain ViT": (None, "trunc")}
HALF = {"BEiT", "BEiT or SimMIM", "fine-tuned BEiT", "timm"}             # mean 0.5


def test_all_files_are_tested(files):
    assert list(files) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_official_files_load_bit_for_bit(name, files, tmp_path, capsys):
    layout, branch, source, content = files[name]
    path = put(tmp_path, content)
    model = load(path, source, branch=branch, quiet=False)
    assert not model.training and model.source.layout == layout and model.source.branch == branch
    assert torch.equal(model(images()), source(images()))
    assert torch.equal(model(images(size=48)), source(images(size=48)))            # the resize rule
    assert model.config["num_heads"] == source.config["num_heads"]
    assert (model.source.mean, model.source.std) == (
        ((0.5,) * 3, (0.5,) * 3) if layout in HALF else ((0.485, 0.456, 0.406),
                                                         (0.229, 0.224, 0.225)))
    assert (model.source.method, model.config["init"]) == METHOD_AND_INIT[layout]
    assert model.source.interpolation == ("bilinear" if layout == "MoCo v3" else "bicubic")
    assert model.source.img_size == (224 if layout == "DINOv2" else 32)
    first, *notes = capsys.readouterr().out.splitlines()
    assert f"file.pth: {layout}, {branch}" in first and f"heads {model.config['num_heads']} (" in (
        first)
    assert len(notes) == (layout in {"BEiT 1k", "BEiT or SimMIM", "fine-tuned BEiT", "timm", "DeiT",
                                     "plain ViT"} or (
        layout in {"DINO", "iBOT"} and "teacher" not in content))


@pytest.mark.parametrize("name", ["moco", "dino full", "beit", "simmim", "dinov2 registers"])
def test_files_in_the_legacy_format_load_without_printing(name, files, tmp_path, capsys):
    _, branch, source, content = files[name]
    path = put(tmp_path, content, "legacy.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load(path, source, branch=branch)(images()), source(images()))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["dinov2 registers", "deit3 timm", "dino"])
def test_safetensors_load_bit_for_bit(name, files, tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    _, _, source, content = files[name]
    path = tmp_path / "model.safetensors"
    safetensors.save_file({key: x.detach().clone() for key, x in content.items()}, path)
    assert torch.equal(load(path, source)(images()), source(images()))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged, truncated"):
        checkpoints.load_encoder(path)


def test_a_missing_package_is_not_called_damage(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        checkpoints.load_encoder(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------------------------- branches

def test_default_branch_is_the_one_to_evaluate_and_others_are_printed(files, tmp_path, capsys):
    for name, branch, others in (
            ("moco", "base", "momentum"), ("dino full", "teacher", "student"),
            ("ibot full", "teacher", "student"), ("deit training", "base", "ema"),
            ("dino", "teacher", ""), ("mae", "base", ""), ("cae", "base", "alignment_encoder")):
        source = files[name][2]
        model = load(put(tmp_path, files[name][3]), source, quiet=False)
        assert model.source.branch == branch
        assert torch.equal(model(images()), source(images()))
        assert (f"(also in the file: {others})" in capsys.readouterr().out) == bool(others)
    with pytest.raises(ValueError, match="has no student, only base, alignment_encoder"):
        checkpoints.load_encoder(tmp_path / "file.pth", branch="student")


def test_keys_beside_the_encoder_of_a_fork_are_left_out_and_counted(files, tmp_path, capsys):
    source, other = files["dino"][2], files["dino student"][2]
    state = {**add_prefix("teacher.backbone.", source.state_dict()), "queue": torch.ones(2),
             **add_prefix("student.backbone.", other.state_dict()), "extra.bias": torch.ones(2)}
    path = put(tmp_path, {"state_dict": state, "epoch": 3})
    for branch, net in ((None, source), ("student", other)):
        model = load(path, net, branch=branch, quiet=False)
        assert torch.equal(model(images()), net(images()))
        number = len(net.state_dict()) + 2
        assert f"{number} keys beside the encoder are left out: " in capsys.readouterr().out
    path = put(tmp_path, {"net": source.state_dict(), "net_ema": other.state_dict(), "epoch": 3})
    for branch, net in ((None, source), ("ema", other)):          # entries with any other name
        model = load(path, net, branch=branch, quiet=False)
        close(model(images()), net(images()))
        assert "plain ViT, " in (printed := capsys.readouterr().out) and "is assumed" in printed
    both = {"model": source.state_dict(), "state_dict": other.state_dict()}
    path = put(tmp_path, both)
    assert torch.equal(load(path, other, branch="state_dict")(images()), other(images()))


def test_heads_are_kept_in_source(files, tmp_path):
    def heads(name, branch=None, **change):
        path = put(tmp_path, {**files[name][3], **change})
        return load(path, files[name][2], branch=branch).source.heads

    moco = files["moco"][3]["state_dict"]
    found = heads("moco")
    assert set(found) == {"projector", "predictor"}
    assert len(found["projector"]) == 16 and len(found["predictor"]) == 10
    assert torch.equal(found["projector"]["6.weight"], moco["module.base_encoder.head.6.weight"])
    assert torch.equal(heads("moco", "momentum")["projector"]["6.weight"],
                       moco["module.momentum_encoder.head.6.weight"])
    assert set(heads("dino full")["head"]) == set(dino_head())
    assert set(heads("ibot full", "student")["head"]) == set(dino_head())     # twins: one is kept
    unshared = {**files["ibot full"][3]["teacher"], "head.last_layer2.weight_v": torch.ones(9, 8)}
    assert set(heads("ibot full", teacher=unshared)["head"]) == set(ibot_head())
    assert set(heads("selfpatch full")) == {"ca_head", "c_head", "p_head"}
    assert "blocks.0.norm1.weight" in heads("mae full")["decoder"] and heads("mae") == {}
    assert set(heads("moco linear probe")) == set(heads("beit fine-tuned")) == {"classifier"}


def test_projection_head_of_selfpatchs_official_file(files, tmp_path):
    """Against the modules of selfpatch.py, which has tests of its own."""
    source, content = files["selfpatch full"][2:]
    model = load(put(tmp_path, content), source)
    cfg = argparse.Namespace(embed_dim=192, num_heads=3, init="trunc")
    pooling = selfpatch.Aggregation(cfg)
    teacher = content["teacher"]
    names = {key: key.replace("attn.", "").replace("fc1", "0").replace("fc2", "2")
             for key in class_attention()}
    pooling.load_state_dict({ours: teacher[f"ca_head.{key}"] for key, ours in names.items()})
    z = pooling(model(images()))[:, 0]
    for n in (0, 2, 4):
        z = F.linear(z, teacher[f"c_head.mlp.{n}.weight"], teacher[f"c_head.mlp.{n}.bias"])
        z = F.gelu(z) if n < 4 else F.normalize(z, dim=-1)
    expected = z @ F.normalize(teacher["c_head.last_layer.weight_v"], dim=1).T
    close(checkpoint_heads.projector(model, narrow=False)(model(images())), expected)


def test_projection_head_with_batch_norm(files, tmp_path):
    source, content = files["dino batch norm"][2:]
    model, state = load(put(tmp_path, content), source), content["teacher"]
    z = model(images())[:, 0]
    for n in (0, 3):
        norm = {key: state[f"module.head.mlp.{n + 1}.{key}"] for key in (
            "running_mean", "running_var", "weight", "bias")}
        z = F.gelu(F.batch_norm(z @ state[f"module.head.mlp.{n}.weight"].T, **norm))
    z = F.linear(z, state["module.head.mlp.6.weight"], state["module.head.mlp.6.bias"])
    expected = F.normalize(z, dim=-1) @ F.normalize(
        state["module.head.last_layer.weight_v"], dim=1).T
    close(checkpoint_heads.projector(model, narrow=False)(model(images())), expected)


# --------------------------------------------------------------------------------- number of heads

def heads_of(layout, width, depth, given=None, raw=(), state=()):
    return checkpoint_layouts.choose_num_heads(
        "file.pth", layout, dict(embed_dim=width, depth=depth), dict(raw), dict(state), given)


@pytest.mark.parametrize("name, layout", [
    ("vit_tiny_patch16_224", "timm"), ("vit_small_patch16_224", "DINO"),
    ("deit3_medium_patch16_224", "DeiT III"), ("vit_base_patch16_224", "MAE"),
    ("vit_large_patch16_224", "MAE"), ("vit_huge_patch14_224", "MAE"),
    *(pytest.param(f"vit_{size}_patch14_224", "timm", marks=pytest.mark.slow)
      for size in ("giant", "gigantic")),
    ("vit_giant_patch14_dinov2", "DINOv2"), ("vit_small_patch14_reg4_dinov2", "DINOv2")])
def test_published_numbers_of_heads_are_timms(name, layout):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model(name)
    assert heads_of(layout, net.embed_dim, len(net.blocks)) == (
        net.blocks[0].attn.num_heads, "as published")


def test_moco_v3_and_cae_have_twelve_heads_and_unpublished_sizes_are_refused():
    assert heads_of("CAE", 192, 12) == (12, "as published")
    for layout in ("MoCo v3", "CAE"):
        assert heads_of(layout, 384, 12) == (12, "as published")
        assert heads_of(layout, 384, 12, given=6) == (6, "--num-heads")
    assert heads_of("DINO", 384, 12) == (6, "as published")
    for layout, width, depth in (("timm", 768, 8), ("MAE", 512, 8), ("MoCo v3", 192, 12)):
        with pytest.raises(ValueError, match=f"no {layout} of width {width} and depth {depth} was "
                                             "published: give it with --num-heads"):
            heads_of(layout, width, depth)
        assert heads_of(layout, width, depth, given=8) == (8, "--num-heads")


def test_number_of_heads_in_the_file_comes_first(files, tmp_path):
    assert heads_of("MAE", 192, 4, raw={"num_heads": 4}) == (4, "in the file")       # our full.pt
    for given in (5, 0, -3):
        with pytest.raises(ValueError, match=f"not a multiple of {given} attention heads: choose"):
            heads_of("MAE", 192, 12, given=given)
    with pytest.raises(ValueError, match="has 4 heads, not 3: leave out --num-heads"):
        heads_of("MAE", 192, 12, given=3, raw={"num_heads": 4})
    wide = build(seed=3, num_heads=6, **{**BEIT, "rel_pos": "block"}, final_norm=False)
    content = {**split_names(wide.state_dict()), "fc_norm.weight": torch.ones(192),
               "fc_norm.bias": torch.ones(192)}
    model = checkpoints.load_encoder(put(tmp_path, {"model": content}), quiet=True)
    assert model.config["num_heads"] == 6 and torch.equal(model(images()), wide(images()))


def test_number_of_heads_of_a_published_file_because_a_wrong_one_would_run(
        files, tmp_path, capsys, monkeypatch):
    """MoCo v3's ViT-S after its own converter to DeiT: only the order of its position table shows
    that it is not MAE's, and that it has 12 heads. As if the small networks were published."""
    monkeypatch.setitem(checkpoint_layouts.MOCO_HEADS, (192, 2), 12)
    monkeypatch.setitem(checkpoint_layouts.LAYOUTS["MAE"].num_heads, (192, 2), 3)
    for name, heads in (("moco to deit", 12), ("mae", 3)):
        layout, _, source, content = files[name]
        path = put(tmp_path, content)
        model = checkpoints.load_encoder(path)
        assert f"{layout}, base; " in (printed := capsys.readouterr().out)
        assert f"heads {heads} (as published)" in printed
        assert torch.equal(model(images()), source(images()))
        wrong = checkpoints.load_encoder(path, num_heads=6, quiet=True)
        assert (wrong(images()) - model(images())).norm() / model(images()).norm() > 0.05


def test_swapped_halves_of_the_sincos_table_change_features(files, tmp_path):
    source, content = files["mae"][2:]
    state = dict(content["model"])
    state["pos_embed"] = state["pos_embed"].roll(96, 2)
    swapped = load(put(tmp_path, {"model": state}), source)
    assert swapped.source.layout == "MoCo v3"
    assert (swapped(images()) - source(images())).abs().max() > 0.01


# ----------------------------------------------------------------------------------- normalization

def test_normalization_is_that_of_the_files_arguments(files, tmp_path, capsys):
    def mean(name, normalization=None, **args):
        content = {**files[name][3], **({"args": argparse.Namespace(**args)} if args else {})}
        model = load(put(tmp_path, content), files[name][2], normalization=normalization,
                     quiet=False)
        return model.source.mean[0], "is assumed" in capsys.readouterr().out

    for name in ("beit", "beit v2", "beit fine-tuned", "cae", "cae fine-tuned"):
        assert mean(name, imagenet_default_mean_and_std=True) == (0.485, False)
        assert mean(name, imagenet_default_mean_and_std=False) == (0.5, False)
    assert mean("beit") == (0.5, False) and mean("beit v2") == (0.485, False)
    assert mean("beit fine-tuned") == (0.5, True) and mean("timm") == (0.5, True)
    assert mean("unknown encoder") == (0.485, True)
    assert mean("simmim fine-tuned") == (0.485, False)
    assert mean("dino") == (0.485, True) and mean("dino full") == (0.485, False)
    assert mean("timm", "imagenet") == (0.485, False) and mean("mae", "0.5") == (0.5, False)


# -------------------------------------------------------------------------- timm as the reference

def timm_vit(**arguments):
    module = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    net = module.VisionTransformer(**dict(img_size=32, patch_size=8, embed_dim=192, depth=2,
                                          num_heads=3, num_classes=0) | arguments).eval()
    for p in net.parameters():
        p.data += torch.randn_like(p) * 0.05
    return net


DINOV2 = dict(img_size=56, patch_size=14, init_values=0.1)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_features_of_official_dinov2_files_equal_timms(registers, swiglu, tmp_path):
    """timm converts the same official file with its own code, then both encode the same images."""
    module = pytest.importorskip("timm.models.vision_transformer")
    more = dict(mlp_ratio=16 / 3, mlp_layer=importlib.import_module("timm.layers").SwiGLUPacked,
                act_layer=nn.SiLU) if swiglu else {}
    theirs = timm_vit(**DINOV2, **more, reg_tokens=registers, no_embed_class=bool(registers))
    state = {**theirs.state_dict(), "mask_token": torch.zeros(1, 192)}
    if swiglu:
        state = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): x
                 for key, x in state.items()}
    if registers:
        cls_row = torch.randn(1, 1, 192)
        state["pos_embed"] = torch.cat([cls_row, state["pos_embed"]], 1)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = torch.randn(1, 1, 192)
    assert not swiglu or state["blocks.0.mlp.w12.weight"].shape == (1024, 192)
    path = put(tmp_path, state)
    theirs.load_state_dict(module._convert_dinov2(dict(state), theirs))
    ours = checkpoints.load_encoder(path, num_heads=3, quiet=True)
    assert ours.source.layout == "DINOv2" and ours.source.img_size == 224
    assert ours.num_prefix == 1 + registers and ours.config["swiglu"] == swiglu
    x = images(size=56)
    close(ours(x), theirs.forward_features(x))
    for i, (patches, cls) in enumerate(theirs.get_intermediate_layers(
            x, [0, 1], return_prefix_tokens=True)):
        tokens = ours.layers(x, [i], norm=False)[0][0]
        close(ours.split(tokens)[1], patches)
        close(tokens[:, :1 + registers], cls)
    if not registers and not swiglu:                      # timm's own file of the same network
        again = load(put(tmp_path, theirs.state_dict()), ours)
        assert torch.equal(again(x), ours(x))
    if registers:
        again = load(put(tmp_path, theirs.state_dict()), ours)
        close(again(x), ours(x))
        without = vit.ViT(**{**ours.config, "registers": 0}).eval()
        without.load_state_dict({key: p for key, p in ours.state_dict().items()
                                 if key != "register_tokens"})
        assert (without(x)[:, 0] - ours(x)[:, 0]).abs().max() > 0.01       # registers do matter


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_resizes_positions_as_its_code(registers, files, tmp_path):
    """Without registers by a scale factor with an offset of 0.1, with them by size, antialiased."""
    source, content = files["dinov2 registers" if registers else "dinov2"][2:]
    model = load(put(tmp_path, content), source)
    table = model.pos_embed[:, 1:].view(1, 4, 4, 192).permute(0, 3, 1, 2)
    how = dict(size=(3, 3), antialias=True) if registers else dict(scale_factor=(3.1 / 4, 3.1 / 4))
    resized = F.interpolate(table, mode="bicubic", **how)
    x = images(size=24)
    tokens, _ = model.embed(x)
    close(tokens[:, 1 + registers:],
          model.patch_embed(x) + resized.flatten(2).transpose(1, 2))
    plain = F.interpolate(table, mode="bicubic", size=(3, 3))
    assert (plain - resized).abs().max() > 0.001
    assert torch.equal(tokens[:, 1:1 + registers],
                       model.register_tokens.expand(2, -1, -1) if registers else tokens[:, :0])


def logits(path, **arguments):
    model = checkpoints.load_encoder(path, quiet=True, **arguments)
    return model, checkpoint_heads.classifier(model)(model(images()))


@pytest.mark.parametrize("kind", ["DeiT", "DeiT III", "fine-tuned MAE"])
def test_features_and_logits_equal_timms(kind, tmp_path):
    theirs = timm_vit(num_classes=10, **{
        "DeiT": {}, "DeiT III": dict(no_embed_class=True, init_values=0.1),
        "fine-tuned MAE": dict(global_pool="avg")}[kind])
    names = split_names if kind == "DeiT III" else dict
    model, ours = logits(put(tmp_path, {"model": names(theirs.state_dict())}), num_heads=3)
    assert model.source.layout == kind
    close(model(images()), theirs.forward_features(images()))
    close(ours, theirs(images()))


def test_features_and_logits_of_fine_tuned_beit_equal_timms(tmp_path):
    beit = pytest.importorskip("timm.models.beit")
    torch.manual_seed(0)
    theirs = beit.Beit(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3,
                       init_values=0.1, num_classes=10, use_abs_pos_emb=False,
                       use_rel_pos_bias=True).eval()
    for p in theirs.parameters():
        p.data += torch.randn_like(p) * 0.05
    model, ours = logits(put(tmp_path, {"model": theirs.state_dict()}))
    assert model.source.layout == "fine-tuned BEiT" and model.config["num_heads"] == 3
    close(model(images()), theirs.forward_features(images()))
    close(ours, theirs(images()))


@pytest.mark.parametrize("name", ["mae linear probe", "cae fine-tuned", "simmim fine-tuned",
                                  "moco linear probe"])
def test_classifiers_written_out(name, files, tmp_path):
    _, _, source, content = files[name]
    model, state = load(put(tmp_path, content), source), (
        content.get("model") or {key.removeprefix("module."): x
                                 for key, x in content["state_dict"].items()})
    tokens = source(images())
    if "fc_norm.weight" in state:
        z = F.layer_norm(tokens[:, 1:].mean(1), (192,), state["fc_norm.weight"],
                         state["fc_norm.bias"], 1e-6)
    elif "head.0.running_mean" in state:
        z = (tokens[:, 0] - state["head.0.running_mean"]) / (
            state["head.0.running_var"] + 1e-6).sqrt()
    else:
        z = tokens[:, 0]
    head = "head.1" if "head.1.weight" in state else "head"
    close(checkpoint_heads.classifier(model)(model(images())),
          z @ state[f"{head}.weight"].T + state[f"{head}.bias"], 1e-4)


def test_without_a_class_token_the_mean_patch_token_is_classified(tmp_path):
    """As timm's vit_medium_patch16_gap_240, whose classifier follows the norm and the mean."""
    gap = build(seed=20, class_token=False, resize="antialias")
    head = {"head.weight": torch.randn(10, 192), "head.bias": torch.randn(10)}
    model = load(put(tmp_path, {**gap.state_dict(), **head}), gap)
    assert model.source.layout == "timm"                 # not SelfPatch, which has no norm either
    z = model(images())
    close(checkpoint_heads.classifier(model)(z),
          z.mean(1) @ head["head.weight"].T + head["head.bias"], 1e-5)


def test_full_pt_is_that_of_mae_also_with_learned_positions(files, tmp_path):
    """As of a run that started from another method's encoder (--init-from)."""
    source, content = files["mae"][2:]
    state = {**content["model"], "decoder_embed.weight": torch.ones(64, 192),
             "pos_embed": torch.randn_like(content["model"]["pos_embed"])}
    assert checkpoints.load_encoder(put(tmp_path, {"model": state}), quiet=True,
                                    num_heads=source.config["num_heads"]).source.layout == "MAE"


def test_heads_are_known_only_for_sizes_that_were_published_with_the_layout():
    for name, width in (("MAE", 192), ("MAE", 384), ("DINO", 1536), ("DINO", 1024)):
        assert width not in {size[0] for size in checkpoint_layouts.LAYOUTS[name].num_heads}
    assert checkpoint_layouts.LAYOUTS["DINOv2"].num_heads[1536, 40] == 24


def test_encoders_without_a_classifier_and_with_an_unknown_one(files, tmp_path):
    assert checkpoint_heads.classifier(build()) is None
    mae = load(put(tmp_path, files["mae"][3]), files["mae"][2])
    assert checkpoint_heads.classifier(mae) is None
    source, content = files["cae attentive"][2:]
    with pytest.raises(ValueError, match="cannot rebuild the classifier with the keys head.weight"):
        checkpoint_heads.classifier(load(put(tmp_path, content), source))
    wide = {**files["timm"][3], "head.weight": torch.zeros(10, 384)}
    with pytest.raises(ValueError, match="cannot rebuild the classifier"):
        checkpoint_heads.classifier(load(put(tmp_path, wide), files["timm"][2]))


# ---------------------------------------------------------------------------------- other contents

def test_half_precision_files_become_fp32(files, tmp_path):
    for name, content in (("dino", files["dino"][3]),
                          ("moco to deit", files["moco to deit"][3]["model"])):
        for kind in (torch.float16, torch.bfloat16):     # the latter rounds the positions more
            halved = {key: value.to(kind) for key, value in content.items()}
            model = load(put(tmp_path, halved), files[name][2])
            assert model.config["pos"] == files[name][2].config["pos"]
            assert model.source.layout == files[name][0]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        close(model.cls_token, files[name][2].cls_token, 1e-3)


def test_augreg_npz_loads_bit_for_bit(files, tmp_path, capsys):
    source = build(seed=1, num_heads=6)                                     # width / 64 is 3
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
            arrays[f"{attn}/{name}/kernel"] = block.attn.qkv.weight[rows].T.reshape(192, 6, 32)
            arrays[f"{attn}/{name}/bias"] = block.attn.qkv.bias[rows].reshape(6, 32)
        arrays |= {f"{attn}/out/kernel": block.attn.proj.weight.T.reshape(6, 32, 192),
                   f"{attn}/out/bias": block.attn.proj.bias}
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez(tmp_path / "B_16.npz", **arrays)
    model = checkpoints.load_encoder(tmp_path / "B_16.npz")
    assert "heads 6 (in the file)" in (printed := capsys.readouterr().out) and "note" not in printed
    assert model.source.layout == "timm" and model.source.mean == (0.5, 0.5, 0.5)
    assert torch.equal(model(images()), source(images()))
    del arrays["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"]
    arrays["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"] = np.ones(192, np.float32)
    np.savez(tmp_path / "B_16.npz", **arrays)
    with pytest.raises(ValueError, match="of another shape: blocks.0.mlp.fc1.weight"):
        checkpoints.load_encoder(tmp_path / "B_16.npz")


@pytest.mark.parametrize("name", ["mae", "dino full", "cae", "timm", "dinov2 registers"])
def test_missing_unexpected_and_misshapen_keys_are_listed(name, files, tmp_path):
    _, branch, source, content = files[name]
    inner = {"dino full": "teacher", "timm": None, "dinov2 registers": None}.get(name, "model")
    prefix = {"dino full": "backbone.", "cae": "encoder."}.get(name, "")

    def error_after(change):
        state = dict(content[inner] if inner else content)
        change(state)
        with pytest.raises(ValueError) as error:
            load(put(tmp_path, {**content, inner: state} if inner else state), source,
                 branch=branch)
        assert "\n" not in str(error.value) and "Known layouts: DeiT, DeiT III" in str(error.value)
        return str(error.value)

    key = f"{prefix}blocks.1.mlp.fc2.weight"
    assert "1 missing: blocks.1.mlp.fc2.weight" in error_after(lambda state: state.pop(key))
    assert "1 unexpected: blocks.1.extra" in error_after(
        lambda state: state.update({f"{prefix}blocks.1.extra": torch.ones(1)}))
    assert "of another shape: norm.bias (7,) for (192,)" in error_after(
        lambda state: state.update({f"{prefix}norm.bias": torch.ones(7)}))
    assert "of another shape: patch_embed.proj.weight (192, 192)" in error_after(
        lambda state: state.update({f"{prefix}patch_embed.proj.weight": torch.ones(192, 192)}))
    flat = {key: x[0, 0] for key, x in source.state_dict().items() if key == "pos_embed"}
    assert "of another shape: pos_embed (192,)" in error_after(
        lambda state: state.update(add_prefix(prefix, flat)))
    assert "missing: blocks.0.norm1" in error_after(lambda state: [
        state.pop(key) for key in list(state) if ".0.norm1" in key])
    assert "1 unexpected" in error_after(lambda state: state.update({f"{prefix}note": "a string"}))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("key, value", [
    ("blocks.0.mlp.fc1.weight", torch.ones(768, 192, dtype=torch.int8)),           # quantized
    ("norm.weight", torch.ones(192, dtype=torch.complex64)),
    ("norm.weight", torch.ones(192).to_sparse()), ("head.weight", "a string"),
    ("patch_embed.proj.weight", torch.ones(0, 3, 8, 8)), ("register_tokens", torch.tensor(1.0))],
    ids=("int8", "complex", "sparse", "string", "empty", "scalar"))
def test_values_that_are_no_weights_are_errors(key, value, files, tmp_path):
    path = put(tmp_path, {**files["dinov2"][3], key: value})
    with pytest.raises(ValueError, match=f"keys do not match; .*{key}"):
        checkpoints.load_encoder(path, num_heads=3)


def test_errors_of_unknown_layouts_list_the_keys_and_the_known_layouts(files, tmp_path):
    one = torch.ones(1)
    without_patches = {key: x for key, x in files["dino"][3].items() if "patch_embed" not in key}
    for content in ({"layer1.conv.weight": one}, {"model": {"stem.weight": one}}, {},
                    {"student": {"a": one}, "teacher": {"b": one}}, {"state_dict": {"conv": 3}},
                    without_patches, {"patch_embed.proj.weight": one}):
        with pytest.raises(ValueError, match="unknown layout with .* known are DeiT, DeiT III"):
            checkpoints.load_encoder(put(tmp_path, content))
    with pytest.raises(ValueError, match="contains a list"):
        checkpoints.load_encoder(put(tmp_path, [1, 2]))
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        checkpoints.load_encoder(tmp_path / "nothing.pth")


def test_unsupported_models_are_rejected_with_a_reason(files, tmp_path):
    plain = files["deit"][3]["model"]
    distilled = {**plain, "dist_token": torch.zeros(1, 1, 192), "head_dist.bias": torch.zeros(10)}
    rotary = {key: x for key, x in files["dinov2"][3].items() if key != "pos_embed"}
    dinov3 = {**rotary, "storage_tokens": torch.zeros(1, 4, 192),
              "rope_embed.periods": torch.zeros(16),
              "blocks.0.attn.qkv.bias_mask": torch.zeros(576)}
    aerial = {**plain, "patch_embed.proj.weight": torch.zeros(192, 5, 8, 8)}
    for content, message in (
            ({"model": distilled}, "distilled DeiT"), (dinov3, "DINOv3 .* use DINOv2"),
            (add_prefix("module.", dinov3), "DINOv3"),
            ({**rotary, "reg_token": torch.zeros(1, 4, 192)}, "DINOv3"),      # timm's
            ({"model": {"vit.encoder.layer.0.output.dense.weight": torch.ones(1)}}, "transformers"),
            ({"model": aerial}, "images with 5 channels, and all data sets here have 3"),
            ({"teacher": add_prefix("backbone.", aerial)}, "images with 5 channels")):
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.load_encoder(put(tmp_path, content))
        assert "\n" not in str(error.value)
