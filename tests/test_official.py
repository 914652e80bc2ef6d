"""benchmarks/official.py: steps in turns, missing clones, a clone of stand-ins for MAE's code."""
import json

import pytest
from test_methods import flags

import mae
from benchmarks import official
from lib.run import Run

# What benchmarks/official.py uses of MAE's repository: these names and arguments, the outdated
# imports, and a step that costs nothing.
STAND_INS = {"models_mae": """
from timm.models.vision_transformer import Block
import numpy as np
import torch
class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim,
                 decoder_depth, decoder_num_heads, norm_layer, norm_pix_loss):
        super().__init__()
        self.block = Block(embed_dim, num_heads, 4.0, qkv_bias=True, qk_scale=None,
                           norm_layer=norm_layer)
        self.sizes, self.width = (img_size, patch_size, depth), np.ones(1, np.float).sum() * 8
    def forward(self, x, mask_ratio):
        assert x.shape == (4, 3, 16, 16) and self.sizes == (16, 8, 1) and mask_ratio == 0.75
        loss = self.block(torch.ones(1, 1, int(self.width))).square().mean()
        return loss / loss.detach() * 7, None, None
""", "util/misc": """
from torch._six import inf
def get_grad_norm_(parameters):
    assert any(p.grad is not None for p in parameters)
"""}
SIZES = "--img-size 16 --patch-size 8 --embed-dim 8 --depth 1 --num-heads 2 --batch-size 4".split()


def run_main(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["official.py", *map(str, argv)])
    official.main()


@pytest.mark.slow
def test_a_clone_is_measured_with_the_sizes_of_the_flags(monkeypatch, tmp_path, capfd):
    pytest.importorskip("timm")
    for name, text in STAND_INS.items():
        file = tmp_path / "mae" / f"{name}.py"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    run_main(monkeypatch, tmp_path, "mae", "--rounds", 1, "--", *SIZES)
    *_, row, _, setting = capfd.readouterr().out.splitlines()
    name, ours, theirs, ratio, _, _, loss, their_loss = row.strip("| ").split(" | ")
    assert name == "MAE" and float(ours) < float(theirs) and float(ratio) < 1
    assert 0.5 < float(loss) < 5 and float(their_loss) == 7
    assert setting == "fp32, batch 4, CPU (1 thread)"


def test_the_two_take_turns_on_the_same_batch(monkeypatch, tmp_path):
    turns, file = [], tmp_path / "found.json"

    def build(cfg, run, batch):
        return lambda: turns.append(("official", batch.views[0].data_ptr())) or 2.0

    targets = mae.targets
    monkeypatch.setattr(mae, "targets", lambda x, *rest: (
        turns.append(("ours", x.data_ptr())), targets(x, *rest))[1])
    monkeypatch.setattr(Run, "steps", official.in_turns(build, 2, file))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["mae.py", *flags("mae", "--data", "synthetic",
                                                      "--out", tmp_path / "run")])
    mae.main()
    assert [name for name, _ in turns] == 3 * ["ours", "official"]
    assert len({pixels for _, pixels in turns}) == 1
    found = json.loads(file.read_text())
    assert found["losses"][1] == 2 and found["gflops"][0] > found["gflops"][1] == 0


def test_a_missing_clone_is_named_and_the_others_run(monkeypatch, tmp_path, capsys):
    found = dict(speeds=[3.0, 2.0], losses=[1.0, 1.1], gflops=[37.2, 37.2], setting="fp32")
    monkeypatch.setattr(official, "measure", lambda *_: found)
    (tmp_path / "moco-v3").mkdir()
    run_main(monkeypatch, tmp_path, "moco_v3", "ibot")
    printed = capsys.readouterr()
    assert "\n| MoCo v3 | 3 | 2 | 1.50 | 37.2 | 37.2 | 1 | 1.1 |\n" in printed.out
    assert printed.err == (f"iBOT: no {tmp_path}/ibot; git clone https://github.com/bytedance/ibot "
                           f"{tmp_path}/ibot\n")


def test_a_method_that_failed_is_an_error_and_so_is_nothing_measured(monkeypatch, tmp_path, capsys):
    found = dict(speeds=[3.0, 2.0], losses=[1.0, 1.1], gflops=[37.2, 37.2], setting="fp32")
    monkeypatch.setattr(official, "measure", lambda method, *_: found if method == "ibot" else None)
    with pytest.raises(SystemExit, match="all methods not measured: see above"):
        run_main(monkeypatch, tmp_path, "mae")
    assert "git clone" in capsys.readouterr().err
    for name in ("mae", "ibot"):
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match="MAE not measured: see above"):
        run_main(monkeypatch, tmp_path, "mae", "ibot")
    assert "| iBOT | 3 | 2 | 1.50 |" in capsys.readouterr().out


def test_an_unknown_method_is_an_error(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path, "beit")
    assert "no official code of beit; choose from mae" in capsys.readouterr().err
