"""--init-from: files in the published layouts start every method, or are refused with the flags to
pass. The reference is the encoder in the file itself: same images, same tokens."""
import importlib
import subprocess
from types import SimpleNamespace

import pytest
import torch
from test_checkpoint_layouts import official
from test_methods import METHODS, ROOT, apart, few, flags, run  # noqa: F401 (few, run: fixtures)
from test_vit import BEIT, build, close

import vit
from lib import augment, checkpoints, config
from lib.distributed import unwrap
from lib.init_from import InitialWeights, absorb_normalization
from lib.run import Run


class Started(Exception):
    """Raised instead of training."""


@pytest.fixture
def start(run, few, monkeypatch):  # noqa: F811
    """start(method, *flags): its networks after their initialization, {"student": ..., ...}."""
    state = {}

    def stop(self, **given):
        state.update(given)
        raise Started

    def main(method, *more, **settings):
        with monkeypatch.context() as patch, pytest.raises(Started):
            patch.setattr(Run, "restore", stop)
            run(method, *more, **settings)
        return state

    return main


def save(path, content):
    torch.save(content, path)
    return path


def normalized(pixels, mean, std):
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def initial_weights(path, **settings):
    """InitialWeights of a file, for the settings of the models in official()."""
    sizes = dict(embed_dim=192, depth=2, num_heads=3, patch_size=8)
    return InitialWeights(SimpleNamespace(**{**sizes, "init_from": path, "normalization": "auto",
                                            **settings}))


# ---- the encoder ---------------------------------------------------------------------------------


SPLIT = dict(qkv_bias="split", resize="size")
# the encoders of the methods, by the files in official() that they can start from
CASES = [(file, target) for file in ("deit", "dino full", "mae", "beit 1k", "timm")
         for target in ({}, dict(pos="sincos_row"), dict(SPLIT, layer_scale=0.1, pos="sincos_row"),
                        dict(SPLIT, rel_pos="shared"))]
CASES += [(file, target) for file in ("moco", "cae")
          for target in ({}, dict(SPLIT, layer_scale=0.1), dict(pos="sincos_col"))]
CASES += [(file, BEIT) for file in ("beit", "simmim")]


@pytest.fixture(scope="module")
def files():
    return official()


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("file, target", CASES, ids=str)
def test_the_encoder_computes_what_that_in_the_file_computes(file, target, size, files, tmp_path):
    """Also with other images, for which the positions of the file are interpolated."""
    layout, _, source, content = files[file]
    num_heads = source.config["num_heads"]
    initial = initial_weights(save(tmp_path / "file.pth", content), num_heads=num_heads)
    encoder = build(20, scramble=False, img_size=size, **{**target, "num_heads": num_heads})
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    theirs = normalized(pixels, initial.encoder.source.mean, initial.encoder.source.std)
    ours = normalized(pixels, augment.MEAN, augment.STD)
    before = encoder(ours)
    with torch.no_grad():
        first, *_ = initial.load(encoder, encoder)
        close(encoder(ours), source(theirs), 1e-4)
        assert (before - source(theirs)).abs().max() > 0.1                   # control
    assert layout in first


def test_what_is_assumed_about_the_file_is_printed(files, tmp_path):
    content, source = files["timm"][3], build(20)
    lines = initial_weights(save(tmp_path / "file.pth", content)).load(source, source)
    assert any("mean 0.5 is assumed; timm's models other than augreg" in line for line in lines)
    assert "the file does not contain its number of attention heads, 3 is assumed" in str(lines)
    stated = initial_weights(save(tmp_path / "file.pth", {"model": content, "num_heads": 3}))
    assert "its number of attention heads" not in str(stated.load(source, source))


def test_the_normalization_of_the_input_can_be_given(files, tmp_path):
    """Where a file does not contain it: of the same weights, other first layers."""
    path, found = save(tmp_path / "file.pth", files["timm"][3]), {}
    for name in "auto", "0.5", "imagenet":
        net = build(20)
        lines = initial_weights(path, normalization=name).load(net, net)
        found[name] = net.patch_embed.proj.weight
        assert ("is assumed; timm's" in str(lines)) == (name == "auto")
        assert ("patch embedding is adapted" in str(lines)) == (name != "imagenet")
    assert torch.equal(found["auto"], found["0.5"])
    assert not torch.equal(found["0.5"], found["imagenet"])


def test_weights_that_are_not_finite_are_refused(files, tmp_path):
    content = dict(files["timm"][3])
    content["norm.weight"] = content["norm.weight"] * torch.nan
    with pytest.raises(ValueError, match="file.pth: its weights are not finite: use another file"):
        initial_weights(save(tmp_path / "file.pth", content))


def test_without_a_class_token_or_a_final_norm_the_rest_is_loaded(files, tmp_path):
    """SelfPatch's backbone from DINO's, and the other way."""
    path, source = save(tmp_path / "dino.pth", files["dino"][3]), files["dino"][2]
    patches = build(20, class_token=False, final_norm=False, img_size=48)
    lines = initial_weights(path).load(patches, patches)
    assert lines[0].endswith("27 of 27 tensors of the encoder")
    unused = "in the file, not used: encoder, 3 tensors (cls_token, norm.bias, norm.weight)"
    assert unused in lines
    own = source.state_dict()
    resized = vit.positions.resize_positions(own["pos_embed"], (4, 4), (6, 6))[:, 1:]
    assert torch.equal(patches.pos_embed, resized)
    assert torch.equal(patches.blocks[1].mlp.fc2.weight, own["blocks.1.mlp.fc2.weight"])

    checkpoints.save_encoder(tmp_path / "encoder.pt", patches)
    whole = build(21)
    before = {name: x.clone() for name, x in whole.state_dict().items()}
    lines = initial_weights(tmp_path / "encoder.pt").load(whole, whole)
    assert "from scratch: 3 tensors (cls_token, norm.bias, norm.weight)" in lines
    assert torch.equal(whole.cls_token, before["cls_token"])
    assert torch.equal(whole.pos_embed[:, :1], before["pos_embed"][:, :1])
    assert not torch.equal(whole.pos_embed[:, 1:], before["pos_embed"][:, 1:])


def test_another_normalization_becomes_a_part_of_the_patch_embedding():
    net, mean, std = build(0), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    pixels, state = torch.rand(2, 3, 32, 32), net.state_dict()
    expected = net.patch_embed(normalized(pixels, mean, std))
    absorb_normalization(state, mean, std)
    found = net.patch_embed(normalized(pixels, augment.MEAN, augment.STD))
    assert (found - expected).abs().max() > 0.1                              # control
    net.load_state_dict(state)
    close(net.patch_embed(normalized(pixels, augment.MEAN, augment.STD)), expected)


# ---- decoders ------------------------------------------------------------------------------------

TINY = """--img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 3
          --decoder-embed-dim 16 --decoder-depth 2 --decoder-num-heads 2""".split()


def network(method, *more):
    """A network of mae.py or simmim.py whose parameters are all random."""
    module = importlib.import_module(method)
    known = config.fields(module.Config)
    pairs = [f"{name}={value}" for name, value in zip(TINY[::2], TINY[1::2])
             if name[2:].replace("-", "_") in known]
    if method == "simmim":
        pairs += ["--pos=none", "--init=beit", "--layer-scale=0.1"]      # as published
    cfg = config.parse(module.Config, [*pairs, *more])
    torch.manual_seed(0)
    net = module.Network(cfg).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return net, pairs


@pytest.mark.parametrize("method, names", [("mae", checkpoints.mae_names),
                                           ("simmim", checkpoints.simmim_names)])
def test_published_files_with_decoder_load_back_completely(method, names, start, tmp_path, capsys):
    """In the published layout, with an index table and the optimizer's state, in half precision."""
    net, pairs = network(method)
    content = {name: x.half() for name, x in names(net).items()}
    if method == "simmim":
        content["encoder.rel_pos_bias.relative_position_index"] = torch.ones(17, 17).long()
    path = save(tmp_path / "full.pth", {
        "model": content, "optimizer": {"state": {}}, "epoch": 799, "num_heads": 3})
    state = start(method, *pairs, "--mask-patch-size=16" * (method == "simmim") or "--seed=0",
                  "--init-from", path, "--out", tmp_path / "run")
    for name, x in names(state["model"]).items():
        assert torch.equal(x, content[name].float()), name
    own = len(encoder_of(net).state_dict())
    rest = len(net.state_dict()) - own
    out = capsys.readouterr().out
    assert (f"{own} of {own} tensors of the encoder, {rest} of {rest} of decoder and mask "
            f"token\n") in out
    assert "from scratch: 0 tensors\n" in out and "not used" not in out


def test_positions_of_the_decoder_are_interpolated_to_another_image_size(start, tmp_path, capsys):
    net, pairs = network("mae")
    path = save(tmp_path / "full.pth", {"model": checkpoints.mae_names(net), "num_heads": 3})
    large = start("mae", *pairs, "--img-size", 64, "--init-from", path,
                  "--out", tmp_path / "run")["model"]
    for name in ("encoder", "decoder"):
        old, new = (getattr(model, name).pos_embed for model in (net, large))
        expected = vit.positions.resize_positions(old, (4, 4), (8, 8), rule="size")
        assert torch.equal(new, expected) and new.shape[1] == 65
    assert torch.equal(large.decoder.mask_token, net.decoder.mask_token)
    assert "positions are interpolated from 4x4 to 8x8" in capsys.readouterr().out


def test_without_a_decoder_in_the_file_it_is_from_scratch(start, tmp_path, capsys):
    net, pairs = network("mae")
    state = net.encoder.state_dict()
    for content in (state, {**state, "mask_token": torch.ones(1, 1, 16)}):   # BEiT's, as wide
        path = save(tmp_path / "encoder.pth", {"model": content, "num_heads": 3})
        model = start("mae", *pairs, "--init-from", path, "--out", tmp_path / "run")["model"]
        assert torch.equal(model.encoder.norm.bias, net.encoder.norm.bias)
        assert not (model.decoder.mask_token == 1).any()
        rest = len(net.decoder.state_dict())
        out = capsys.readouterr().out
        assert f"0 of {rest} of decoder and mask token" in out
        assert f"from scratch: {rest} tensors (decoder.blocks.0.attn.proj.bias, " in out


def test_asl_starts_from_a_file_of_mae_and_the_other_way(start, tmp_path, capsys):
    net, pairs = network("mae")
    path = save(tmp_path / "mae.pth", {"model": checkpoints.mae_names(net), "num_heads": 3})
    asl = start("asl", *pairs, "--init-from", path, "--out", tmp_path / "run")["model"]
    assert torch.equal(asl.decoder.pred.weight, net.decoder.pred.weight)
    out = capsys.readouterr().out
    assert "from scratch: 12 tensors (aug_block.attn.proj.bias, " in out and "not used" not in out
    path = save(tmp_path / "asl.pth", {"model": checkpoints.mae_names(asl), "num_heads": 3})
    start("mae", *pairs, "--init-from", path, "--out", tmp_path / "run")
    out = capsys.readouterr().out
    assert "from scratch: 0 tensors" in out
    assert "in the file, not used: aug_block, 12 tensors (attn.proj.bias, " in out


# ---- every method --------------------------------------------------------------------------------

TINY_VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
SOURCES = dict(**dict.fromkeys(("simmim", "hybrid"), dict(BEIT, pos="sincos_row")),
               selfpatch=dict(class_token=False, final_norm=False))


def encoder_of(net):
    return net.encoder if hasattr(net, "encoder") else net.backbone


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_an_encoder_and_its_teacher_too(method, start, tmp_path, capsys):
    source = build(7, **TINY_VIT, **SOURCES.get(method, {}))
    checkpoints.save_encoder(tmp_path / "encoder.pt", source)
    scratch = dict(start(method, "--out", tmp_path / "run"))
    found = dict(start(method, "--init-from", tmp_path / "encoder.pt", "--out", tmp_path / "run"))
    kinds = [kind for kind in ("model", "student", "teacher") if kind in found]
    x = torch.randn(2, 3, 16, 16)
    for kind in kinds:
        net, other = (unwrap(state[kind]).eval() for state in (found, scratch))
        encoder = encoder_of(net)
        close(encoder(x), source(x))
        assert (encoder_of(other)(x) - source(x)).abs().max() > 0.1          # control
        own = {y.data_ptr() for y in encoder.state_dict().values()}
        rest = {name: y for name, y in net.state_dict().items() if y.data_ptr() not in own}
        for name, y in rest.items():                     # as without the flag
            assert torch.equal(y, other.state_dict()[name]), name
        if kind != "teacher":
            count, total = len(rest), len(own)
    assert len(kinds) == (1 if "model" in kinds else 2)
    if "teacher" in kinds:
        student = found["student"].state_dict()
        assert all(torch.equal(y, student[key]) for key, y in found["teacher"].state_dict().items())
    out = capsys.readouterr().out
    assert f": {total} of {total} tensors of the encoder" in out
    assert f"from scratch: {count} tensors" in out


# ---- what is refused, resumed and recorded -------------------------------------------------------


@pytest.mark.parametrize("method, source, sentence", [
    ("dino", dict(embed_dim=32, depth=3, num_heads=4),
     "another size than this run's; to start from it, pass --embed-dim 32 --depth 3 --num-heads 4"),
    ("mae", dict(patch_size=8), "pass --patch-size 8$"),
    ("dino", BEIT, "its encoder has relative positions, this run's has absolute ones; use a file "
                   "of a similar method"),
    ("beit", BEIT, "pass --pos none --rel-pos-bias$"),
    ("hybrid --pos none", {}, "its encoder has absolute positions, this run's has relative ones; "
                              "pass --pos sincos_row"),
    ("simmim", BEIT, "this run's has absolute and relative ones; pass --pos none$"),
    ("simmim --pos none", {}, "pass --pos sincos_row"),
    ("mmc", dict(mlp_ratio=2.0), "its encoder has mlp_ratio 2.0, this run's 4.0: use another file"),
    ("mmc", dict(in_chans=1), "use another file"),
    ("dino", dict(registers=2), "its encoder has registers 2, this run's 0: use another file"),
    ("dino", dict(swiglu=True), "its encoder has swiglu True, this run's False"),
    ("simmim --pos none", {**BEIT, "rel_pos": "block"}, r"its encoder has relative "
     r"\(a table for each block\) positions, this run's has relative ones; use a file of a "
     "similar method")])
def test_another_encoder_is_refused_with_the_flags_to_pass(
        method, source, sentence, run, tmp_path):  # noqa: F811
    checkpoints.save_encoder(tmp_path / "encoder.pt", build(7, **{**TINY_VIT, **source}))
    with pytest.raises(ValueError, match=sentence):
        method, *more = method.split()
        run(method, *more, "--init-from", tmp_path / "encoder.pt", "--out", tmp_path / "run")


def test_another_decoder_is_refused_with_the_flags_to_pass(start, tmp_path):
    net, pairs = network("mae")
    path = save(tmp_path / "full.pt", {"model": checkpoints.mae_names(net), "num_heads": 3,
                                       "decoder_num_heads": 4})
    flags = ["--decoder-embed-dim", 32, "--decoder-depth", 1]
    given = [*pairs, "--init-from", path, "--out", tmp_path / "run"]
    with pytest.raises(ValueError, match="pass --decoder-embed-dim 16 --decoder-depth 2 "
                                         "--decoder-num-heads 4$"):
        start("mae", *given, *flags)
    start("mae", *given, "--decoder-num-heads", 4)
    save(path, {"model": {**checkpoints.mae_names(net), "decoder_pred.bias": torch.ones(3)}})
    with pytest.raises(ValueError, match=r"decoder_pred.bias has shape \(3,\), in this run \(192"):
        start("mae", *given, "--decoder-num-heads", 4, "--num-heads", 1)


@pytest.mark.parametrize("name, sentence", [
    ("missing.pt", "no checkpoint file .*missing.pt"), ("", "is a folder: name a file"),
    ("last.pt", "is a training state; use encoder.pt"), ("other.pt", "unknown layout"),
    ("text.pt", "damaged, truncated or not a PyTorch file")])
def test_other_files_are_refused_before_anything_is_written(name, sentence, start, tmp_path):
    save(tmp_path / "last.pt", {"format": "training/1"})
    save(tmp_path / "other.pt", {"weight": torch.ones(3)})
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises((ValueError, OSError), match=sentence):
        start("dino", "--init-from", tmp_path / name, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_file_is_recorded_and_not_read_again_by_a_resumed_run(
        run, few, tmp_path, capsys):  # noqa: F811
    path, out = tmp_path / "encoder.pt", tmp_path / "run"
    checkpoints.save_encoder(path, build(7, **TINY_VIT, pos="sincos_col", resize="size"))
    run("mae", "--init-from", path, "--out", out, lr=0)
    assert config.read_yaml(out / "config.yaml")["init_from"] == str(path)
    trained, start = (checkpoints.load_encoder(file, quiet=True)
                      for file in (out / "encoder.pt", path))
    x = torch.randn(2, 3, 16, 16)
    close(trained(x), start(x))                           # with lr 0 it is the file's encoder
    path.unlink()
    capsys.readouterr()
    run("mae", "--out", out, "--resume", "--steps", 6)
    text = capsys.readouterr().out
    assert f"--init-from {path} is not read: the run continues from its own last.pt" in text
    assert "initial weights" not in text and "resumed from" in text
    assert config.read_yaml(out / "config.yaml")["init_from"] == str(path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "dino"])
def test_two_processes_start_from_the_same_weights_as_one(
        method, run, tmp_path, torchrun):  # noqa: F811
    encoder = build(7, **TINY_VIT, **(dict(pos="sincos_col") if method == "mae" else {}))
    checkpoints.save_encoder(tmp_path / "encoder.pt", encoder)
    given = ["--init-from", tmp_path / "encoder.pt", "--out"]
    done = subprocess.run([*torchrun, f"{method}.py", *flags(method, *given, tmp_path / "two")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("initial weights from") == 1
    run(method, *given, tmp_path / "one")
    run(method, "--out", tmp_path / "scratch")
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5
    assert apart(tmp_path / "scratch", tmp_path / "one") > 0.1               # control
