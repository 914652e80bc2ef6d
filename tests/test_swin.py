"""Swin backbones against torchvision's models."""
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.swin_transformer import SwinTransformer, swin_t

from lib import swin


def make(drop_path=0.0, scramble=0.1, **more):
    """swin_micro for 32 px; its parameters are noisy, so that none is 0 or 1."""
    torch.manual_seed(0)
    net = swin.make_swin("swin_micro", 32, drop_path=drop_path, **more).eval()
    for p in net.parameters():
        p.data += scramble * torch.randn_like(p)
    return net


def test_swin_tiny_is_torchvisions_and_has_the_published_size():
    with torch.device("meta"):
        net, whole = swin.make_swin("swin_tiny", 224), swin_t()
    assert sum(p.numel() for p in net.parameters()) == 27_519_354
    shapes, expected = ({k: v.shape for k, v in n.state_dict().items()} for n in (net, whole))
    computed = "head.", "relative_position_index"
    assert shapes == {k: v for k, v in expected.items() if not any(x in k for x in computed)}
    assert (net.embed_dim, net.patch_size, net.grid, net.depth) == (768, 32, (7, 7), 4)
    assert (net.widths, net.strides) == ([96, 192, 384, 768], [4, 8, 16, 32])
    blocks = [m for m in whole.modules() if type(m).__name__ == "SwinTransformerBlock"]
    own = [m for m in net.modules() if type(m).__name__ == "SwinTransformerBlock"]
    for a, b in zip(own, blocks, strict=True):
        assert (a.attn.window_size, a.attn.shift_size, a.attn.num_heads) == (
            b.attn.window_size, b.attn.shift_size, b.attn.num_heads)
    rates = torch.tensor([m.stochastic_depth.p for m in blocks])             # torchvision: 0.2
    own = swin.make_swin("swin_micro", 32, drop_path=0.2).drop_rates
    assert torch.allclose(rates, torch.linspace(0, 0.2, 12)) and len(own) == 12
    assert torch.allclose(own[::2], torch.linspace(0, 0.2, 6)) and own[::2].equal(own[1::2])


@pytest.mark.parametrize("size", [32, 48])               # 48: windows do not divide the grid
def test_tokens_are_torchvisions_bit_for_bit(size):
    net = make()
    whole = SwinTransformer([2, 2], 32, [2, 2, 2], [1, 2, 4], [4, 4], num_classes=5).eval()
    missing, unexpected = whole.load_state_dict(net.state_dict(), strict=False)
    assert {key.split(".")[-1] for key in missing} == {"weight", "bias", "relative_position_index"}
    assert not unexpected
    x = torch.randn(3, 3, size, size)
    tokens = net(x)
    assert tokens.shape == (3, (size // 8)**2, 128)
    assert torch.equal(tokens, whole.norm(whole.features(x)).flatten(1, 2))
    cls, patches = net.split(tokens)
    assert cls is None
    assert torch.allclose(whole(x), whole.head(patches.mean(1)), atol=1e-5)
    stages, _ = net.layers(x, norm=False)
    for i, z in enumerate(stages):
        assert torch.equal(z, whole.features[:2 * i + 2](x).flatten(1, 2))
        assert z.shape == (3, (size // net.strides[i])**2, net.widths[i])
    assert torch.equal(net.layers(x, [0, 2])[0][1], tokens)
    assert torch.equal(make(final_norm=False).layers(x, [2])[0][0], stages[2])
    assert not torch.allclose(stages[2], tokens, atol=0.1)                   # control: the norm


def test_windows_limit_what_a_token_depends_on():
    """Of the first stage: 16 x 16 patches, windows of 4, two blocks, one of them shifted."""
    net, x = make(), torch.randn(1, 3, 32, 32)
    other = x.clone()
    other[..., :2, :2] += 1                                                  # patch 0
    z, y = (net.layers(image, [0])[0][0].unflatten(1, (16, 16)) for image in (x, other))
    changed = (z != y).any(3)[0]
    assert changed[:6, :6].all() and not changed[6:14].any() and not changed[:, 6:14].any()


def test_drop_path_is_by_the_given_numbers_and_scaled():
    net, x = make(drop_path=0.5).train(), torch.randn(4, 3, 32, 32)
    keep, drop = torch.ones(4, 12), torch.zeros(4, 12)
    assert torch.equal(net(x, keep), net(x, keep)) and not torch.equal(net(x), net(x))
    mixed = net(x, torch.cat([keep[:2], drop[2:]]))
    assert torch.allclose(mixed[:2], net(x, keep)[:2], atol=1e-5)
    assert not torch.allclose(mixed[2:], net(x, keep)[2:], atol=1e-2)
    assert torch.equal(net.drop_factors(1, keep[:1])[0], 1 / (1 - net.drop_rates))
    assert (net.drop_factors(1, drop[:1])[0] == 0).sum() == 10               # rate 0 in block 0
    assert torch.equal(net.eval()(x, drop), make()(x))                       # eval: nothing dropped


def test_config_builds_the_same_network():
    net, x = make(drop_path=0.1, final_norm=False), torch.randn(2, 3, 32, 32)
    copy = swin.Swin(**net.config).eval()
    copy.load_state_dict(net.state_dict())
    assert torch.equal(copy(x), net(x)) and copy.config == net.config


def test_bf16_changes_little_and_the_residual_stays_fp32():
    net, x = make(scramble=0), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = net.layers(x, norm=False)
    assert all(z.dtype == torch.float32 for z in outputs)
    exact = net.layers(x, norm=False)[0]
    for z, y in zip(outputs, exact):
        assert F.cosine_similarity(z.flatten(), y.flatten(), 0) > 0.999 and not torch.equal(z, y)


@pytest.mark.parametrize("call, sentence", [
    (lambda: swin.make_swin("swin_tiny", 64 + 4), "68 is not a multiple of 32"),
    (lambda: make().layers(torch.zeros(1, 3, 32, 32), attention=[2]), "attends within windows"),
    (lambda: make().layers(torch.zeros(1, 3, 32, 32), [3]), "stages must be 0 to 2"),
    (lambda: make()(torch.zeros(1, 3, 32, 36)), "32x36 is not a multiple of patch size 8")])
def test_what_cannot_be_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
