"""Helpers of the diagnostics tests: a tiny model, options, the folder of an MAE run."""
from dataclasses import replace
from types import SimpleNamespace

import torch

import analysis
import mae
import vit
from lib import augment, checkpoints, config
from probes.common import Model

TINY = dict(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=3)        # 8 x 8 patches
TINY_FLAGS = "--img-size 32 --patch-size 4 --embed-dim 24 --depth 3 --num-heads 3".split()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_model(path=None, **config):
    torch.manual_seed(0)
    encoder = vit.ViT(**{**TINY, **config}).eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return make_model(encoder, path)


def make_model(encoder, path=None):
    encoder.source = SimpleNamespace(path=path and str(path), method=None, branch="base", step=1,
                                     data=None, heads={})
    return Model("tiny", encoder, 32, augment.MEAN, augment.STD, "bicubic", encoder.source,
                 torch.device("cpu"), "fp32")


def options(*flags):
    opt = analysis.parse([*flags, "--device", "cpu", "--workers", "0"])
    return replace(opt, data=opt.data or "toy")


def save_mae(folder):
    """A run's folder with MAE's encoder.pt, full.pt and config.yaml -> model, MAE's network."""
    decoder = "--decoder-embed-dim 16 --decoder-depth 2 --decoder-num-heads 2".split()
    cfg = config.parse(mae.Config, [*TINY_FLAGS, *decoder])
    torch.manual_seed(0)
    net = mae.Network(cfg).eval()
    folder.mkdir(parents=True)
    checkpoints.save_encoder(folder / "encoder.pt", net.encoder, method="mae", data="toy",
                             branch="base", step=3)
    torch.save(dict(model=checkpoints.mae_names(net), num_heads=3), folder / "full.pt")
    (folder / "config.yaml").write_text(
        "decoder_num_heads: 2\nmask_ratio: 0.75\nnorm_pix_loss: false\n")
    return make_model(net.encoder, folder / "encoder.pt"), net
