"""How much time does MAE save by encoding the visible patches only? A step (forward, backward,
AdamW) of mae.py's network against the same network with an encoder of all patches and a mask token
in place of each masked one (MAE's Table 1c: 3.3 times the FLOPs with ViT-L).

    python -m benchmarks.visible_only          # a minute on two CPU cores; exit code 1 below 1.8
"""
import argparse
import statistics
import sys
import time

import torch
from torch import nn

import mae
from lib import config, distributed
from lib.run import param_groups


class MaskTokensInEncoder(mae.Network):
    """Mask tokens enter before the encoder instead of before the decoder."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim))

    def forward(self, x, noise):
        mask = mae.random_masking(noise, self.mask_ratio)[2]
        tokens = self.encoder(x, mask=mask, mask_token=self.mask_token)      # (B, L, D)
        in_order = torch.arange(noise.shape[1], device=x.device).expand_as(noise)
        return self.decoder(tokens, in_order)[:, 1:], mask


def measure_steps(cfg, batch_size, device, rounds=7):
    """Median seconds of a step of either network. They take turns, so that a change of the
    machine's speed affects both. The first round warms up."""
    nets = [network(cfg).to(device) for network in (mae.Network, MaskTokensInEncoder)]
    opts = [torch.optim.AdamW(param_groups(net, 0.05), fused=True) for net in nets]
    bf16 = distributed.pick_precision("auto", device) == "bf16"
    x = torch.randn(batch_size, 3, cfg.img_size, cfg.img_size, device=device)
    noise = torch.rand(batch_size, (cfg.img_size // cfg.patch_size)**2, device=device)
    target, times = mae.targets(x, cfg.patch_size, cfg.norm_pix_loss), ([], [])
    for _ in range(rounds + 1):
        for net, opt, taken in zip(nets, opts, times):
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                pred, mask = net(x, noise)
            loss = mae.mae_loss(pred, target, mask)
            loss.backward()
            opt.step()
            opt.zero_grad()
            opt.param_groups[0]["params"][0].sum().item()            # waits for the GPU
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in times]


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    distributed.keep_memory()
    device, ratios = distributed.pick_device(), []
    for name, batch_size in (("toy", 64), ("imagenet100", 8), ("imagenet", 4)):
        cfg = config.parse(mae.Config, ["--data", name])
        visible, everything = measure_steps(cfg, batch_size, device)
        ratios.append(everything / visible)
        print(f"{name}: width {cfg.embed_dim}, {cfg.depth} blocks; decoder "
              f"{cfg.decoder_embed_dim}, {cfg.decoder_depth} blocks; batch {batch_size}: "
              f"{1e3 * visible:.0f} ms per step, with mask tokens in the encoder "
              f"{1e3 * everything:.0f} ms, ratio {ratios[-1]:.1f}", flush=True)
    sys.exit(min(ratios) < 1.8)


if __name__ == "__main__":
    main()
