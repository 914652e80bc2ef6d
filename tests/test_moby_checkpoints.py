"""lib/checkpoints.py: files in the layouts of the official MoBY (Transformer-SSL), with DeiT and
with Swin, and the refusal of damaged ones."""
import pytest
import torch
import torch.nn.functional as F
from test_checkpoint_layouts import OPTIMIZER, add_prefix, put
from test_vit import build, images

from lib import checkpoint_heads, checkpoint_layouts, checkpoints, swin


def head(n, out):
    """The official names of a head's tensors."""
    return {"linear_hidden.1.weight": torch.randn(12, n), "linear_hidden.1.bias": torch.randn(12),
            "linear_hidden.2.weight": torch.randn(12), "linear_hidden.2.bias": torch.randn(12),
            "linear_hidden.2.running_mean": torch.randn(12),
            "linear_hidden.2.running_var": torch.rand(12) + 0.5,
            "linear_hidden.2.num_batches_tracked": torch.tensor(3),
            "linear_out.weight": torch.randn(out, 12), "linear_out.bias": torch.randn(out)}


def small_swin(seed):
    torch.manual_seed(seed)
    net = swin.Swin(64, 2, 16, (2, 1, 2, 1), (1, 2, 4, 8)).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


def official_names(net):
    """The state dict of a Swin under the names of the official class, with its mask buffers."""
    state = {}
    for i, stage in enumerate(net.features):
        for key, x in stage.state_dict().items():
            if i == 0:
                key = key.replace("0.", "patch_embed.proj.").replace("2.", "patch_embed.norm.")
            elif i % 2:
                key = f"layers.{i // 2}.blocks.{key}"
                key = key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            else:
                key = f"layers.{i // 2 - 1}.downsample.{key}"
            state[key] = x
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16).long()
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 16, 16)
    return state | {f"norm.{key}": x for key, x in net.norm.state_dict().items()}


def content(base, momentum, width):
    return {"optimizer": OPTIMIZER, "lr_scheduler": {}, "max_accuracy": 0.0, "epoch": 299,
            "model": {**add_prefix("encoder.", base), **add_prefix("encoder_k.", momentum),
                      **add_prefix("projector.", head(width, 8)),
                      **add_prefix("projector_k.", head(width, 8)),
                      **add_prefix("predictor.", head(8, 8)), "queue1": torch.randn(8, 16),
                      "queue2": torch.randn(8, 16), "queue_ptr": torch.zeros(1).long()}}


@pytest.fixture(params=["DeiT", "Swin"])
def file(request):
    """Both networks, content of the file."""
    torch.manual_seed(0)
    if request.param == "DeiT":
        nets = [build(seed=seed, resize="size", depth=12) for seed in (1, 2)]
        return *nets, content(*(net.state_dict() for net in nets), 192)
    nets = small_swin(1), small_swin(2)
    return *nets, content(*map(official_names, nets), 128)


def test_official_files_load_bit_for_bit(file, tmp_path):
    base, momentum, raw = file
    path, x = put(tmp_path, raw), images(size=64)
    for branch, expected in ((None, base), ("base", base), ("momentum", momentum)):
        net = checkpoints.load_encoder(path, branch=branch, quiet=True)
        assert torch.equal(net(x), expected(x)) and type(net) is type(expected)
        assert (net.source.method, net.source.branch) == ("moby", branch or "base")
        assert net.source.layout == "MoBY" + " momentum" * (branch == "momentum")
        assert not net.source.notes
        assert net.source.interpolation == "bilinear"
        assert set(net.source.heads) == {"projector", *(["predictor"] * (branch != "momentum"))}
        assert net.config["num_heads"] == expected.config["num_heads"]
    assert not torch.equal(base(x), momentum(x))                             # control


def test_the_projector_is_the_official_one(file, tmp_path):
    _, _, raw = file
    net, x = checkpoints.load_encoder(put(tmp_path, raw), quiet=True), images(size=64)
    tokens, h = net(x), raw["model"]
    z = tokens[:, 0] if net.num_prefix else tokens.mean(1)
    z = F.linear(z, h["projector.linear_hidden.1.weight"], h["projector.linear_hidden.1.bias"])
    z = F.batch_norm(z, *(h[f"projector.linear_hidden.2.{name}"] for name in (
        "running_mean", "running_var", "weight", "bias")))
    z = F.linear(z.relu(), h["projector.linear_out.weight"], h["projector.linear_out.bias"])
    found = checkpoint_heads.projector(net)(tokens)
    assert torch.allclose(found, z, atol=1e-5, rtol=1e-4)


def test_swin_tiny_has_the_official_sizes():
    with torch.device("meta"):
        net = swin.make_swin("swin_tiny", 224)
        state = official_names(net)
    _, config = checkpoint_layouts.convert_swin("file", "MoBY", state, [])
    assert config == net.config


@pytest.mark.parametrize("change, sentence", [
    (lambda m: m.pop("encoder.norm.bias"), "1 missing: norm.bias"),
    (lambda m: m.update({"encoder.x": torch.ones(1)}), "1 unexpected: x"),
    (lambda m: m.update({"encoder.norm.bias": torch.ones(3)}), "1 of another shape: norm.bias")])
def test_damaged_files_are_refused(file, tmp_path, change, sentence):
    change(file[2]["model"])
    with pytest.raises(ValueError, match=sentence):
        checkpoints.load_encoder(put(tmp_path, file[2]), quiet=True)


def test_a_swin_without_its_tables_is_refused(tmp_path):
    raw = content(official_names(small_swin(1)), official_names(small_swin(2)), 128)
    del raw["model"]["encoder.layers.2.blocks.0.attn.relative_position_bias_table"]
    with pytest.raises(ValueError, match=r"1 missing: features.5.0.attn.relative_position_bias"):
        checkpoints.load_encoder(put(tmp_path, raw), quiet=True)
