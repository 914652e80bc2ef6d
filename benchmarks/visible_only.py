"""What does MAE save by an encoder that sees the visible patches only? A step (forward, backward,
AdamW) of mae.py's network, and of the same network whose encoder runs on all patches, a mask token
in place of each removed one (the paper's Table 1c: 3.3 times the FLOPs with ViT-L).

    python -m benchmarks.visible_only          # a minute on two CPU cores; exit code 1 below 1.8
"""
import statistics
import sys
import time

import torch
from torch import nn

import mae
from lib import config, distributed
from lib.run import param_groups


class MaskTokens(mae.Network):
    """Mask tokens enter before the encoder instead of before the decoder."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim))

    def forward(self, x, noise):
        mask = mae.random_masking(noise, self.mask_ratio)[2]
        tokens = self.encoder(x, mask=mask, mask_token=self.mask_token)      # (B, 1+N, D)
        in_order = torch.arange(noise.shape[1], device=x.device).expand_as(noise)
        return self.decoder(tokens, in_order)[:, 1:], mask


def seconds(cfg, batch_size, device, rounds=7):
    """Median seconds of a step of either network; they take turns, so that both meet the same
    machine. The first round warms up."""
    nets = [network(cfg).to(device) for network in (mae.Network, MaskTokens)]
    opts = [torch.optim.AdamW(param_groups(net, 0.05), fused=True) for net in nets]
    bf16 = distributed.pick_precision("auto", device) == "bf16"
    x = torch.randn(batch_size, 3, cfg.img_size, cfg.img_size, device=device)
    noise = torch.rand(batch_size, (cfg.img_size // cfg.patch_size)**2, device=device)
    target, times = mae.targets(x, cfg.patch_size, cfg.norm_pix), ([], [])
    for _ in range(rounds + 1):
        for net, opt, taken in zip(nets, opts, times):
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                pred, mask = net(x, noise)
            loss = mae.mae_loss(pred, target, mask)
            loss.backward()
            opt.step(), opt.zero_grad()
            opt.param_groups[0]["params"][0].sum().item()                    # a GPU has to be done
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in times]


if __name__ == "__main__":
    distributed.keep_memory()
    device, ratios = distributed.pick_device(), []
    for name, batch_size in (("toy", 64), ("imagenet100", 8), ("imagenet", 4)):
        cfg = config.parse(mae.Config, ["--data", name])
        visible, everything = seconds(cfg, batch_size, device)
        ratios.append(everything / visible)
        print(f"{name}: {cfg.embed_dim} x {cfg.depth}, decoder {cfg.decoder_embed_dim} x "
              f"{cfg.decoder_depth}, batch {batch_size}: {1e3 * visible:.0f} ms a step, "
              f"with mask tokens in the encoder {1e3 * everything:.0f} ms: {ratios[-1]:.1f} x")
    sys.exit(min(ratios) < 1.8)
