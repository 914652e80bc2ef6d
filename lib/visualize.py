"""TODO visualize"""

import torch


def heat_map(x):
    """(n, H, W) in [0, 1] -> (n, 3, H, W) uint8, dark blue to yellow: safe for the colour-blind."""
    ramp = torch.tensor([[25, 20, 80], [35, 95, 140], [40, 160, 135], [150, 210, 70],
                         [253, 231, 37]])
    at = x.cpu().float().clamp(0, 1) * (len(ramp) - 1)
    low = at.long().clamp(max=len(ramp) - 2)
    colour = ramp[low] + (ramp[low + 1] - ramp[low]) * (at - low)[..., None]
    return colour.permute(0, 3, 1, 2).to(torch.uint8)

