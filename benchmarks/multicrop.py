"""How much faster is a step of dino.py than a plain implementation? The plain one: a forward for
each crop, fp32, a loop over pairs of crops, loops over tensors for clipping, AdamW and EMA. A third
variant was not adopted: the crops of both sizes in one packed sequence, split for attention only.

    python -m benchmarks.multicrop             # two minutes on two CPU cores; exit code 1 below 1.2
"""
import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import dino
import vit
from lib import config, distributed
from lib.run import ema_update, param_groups


def step_ours(student, teacher, center, opt, global_crops, local_crops, autocast):
    with autocast:
        x = torch.cat(global_crops)
        with torch.no_grad():
            t = teacher(x)
        s = student(x, torch.cat(local_crops))
    t, s = t.float().unflatten(0, (2, -1)), s.float().unflatten(0, (2 + len(local_crops), -1))
    dino.cls_loss(s, dino.assign(t, center.center, 0.04), 0.1).backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]     # as dino.py clips them
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((3.0 / (norms + 1e-6)).clamp(max=1)))
    opt.step()
    opt.zero_grad()
    ema_update(teacher, student, 0.99)
    center.update([t.mean((0, 1))])


def step_plain(student, teacher, center, opt, global_crops, local_crops, autocast):
    with torch.no_grad():
        t = [teacher(x) for x in global_crops]
    s, loss = [student(x) for x in global_crops + local_crops], 0
    for g in range(2):
        for v in range(len(s)):
            if v != g:
                P = F.softmax((t[g] - center.center) / 0.04, -1)
                loss += -(P * F.log_softmax(s[v] / 0.1, -1)).sum(-1).mean()
    (loss / (2 * len(s) - 2)).backward()
    for p in student.parameters():
        if p.grad is not None and p.grad.norm().item() > 3.0:
            p.grad.mul_(3.0 / p.grad.norm().item())
    opt.step()
    opt.zero_grad()
    with torch.no_grad():
        for p, q in zip(teacher.parameters(), student.parameters()):
            p.copy_(0.99 * p + 0.01 * q)
        center.center.copy_(0.9 * center.center + 0.1 * torch.cat(t).mean(0))


class PackedNetwork(dino.Network):
    """Linear layers and norms process the tokens of all crops as one sequence."""

    def forward(self, x, crops=None):
        if crops is None:
            return super().forward(x)
        tokens = [self.backbone.embed(z)[0] for z in (x, crops)]             # (2B, L, D), ...
        lengths = [len(z.flatten(0, 1)) for z in tokens]
        z = torch.cat([y.flatten(0, 1) for y in tokens])
        for block in self.backbone.blocks:
            qkv, attended = block.attn.qkv(block.norm1(z)).split(lengths), []
            for y, like in zip(qkv, tokens):
                y = y.unflatten(0, like.shape[:2]).unflatten(2, (3, block.attn.num_heads, -1))
                y = vit.attend(*y.permute(2, 0, 3, 1, 4))
                attended.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
            z = z + block.attn.proj(torch.cat(attended))
            z = z + block.mlp(block.norm2(z))
        z = [y.unflatten(0, like.shape[:2])[:, 0] for y, like in zip(z.split(lengths), tokens)]
        return self.head(self.backbone.norm(torch.cat(z)))


def measure_steps(cfg, batch_size, device, rounds=5):
    """Median seconds of a step of each variant. They take turns, so that a change of the machine's
    speed affects all of them."""
    bf16 = distributed.pick_precision("auto", device) == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    variants = [(step_ours, dino.Network), (step_plain, dino.Network), (step_ours, PackedNetwork)]
    crops = [[torch.randn(batch_size, 3, size, size, device=device) for _ in range(n)]
             for size, n in ((cfg.img_size, 2), (cfg.local_crops_size, 8))]
    states, times = [], ([], [], [])
    for step, network in variants:
        torch.manual_seed(0)
        student, teacher = (network(cfg, teacher=True).to(device) for _ in range(2))
        ema_update(teacher.requires_grad_(False), student, 0.0)
        opt = torch.optim.AdamW(param_groups(student, 0.04), lr=1e-4,
                                **(dict(fused=True) if step is step_ours else dict(foreach=False)))
        states.append((student, teacher, dino.Center(cfg.out_dim, 0.9).to(device), opt))
    separate, packed = (state[0](*map(torch.cat, crops)) for state in states[::2])
    torch.testing.assert_close(separate, packed, atol=1e-4, rtol=0)
    for _ in range(rounds + 1):                                              # the first warms up
        for (step, _), state, taken in zip(variants, states, times):
            begin = time.perf_counter()
            step(*state, *crops, autocast)
            state[2].center.sum().item()                                     # waits for the GPU
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in times]


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    distributed.keep_memory()
    device, ratios = distributed.pick_device(), []
    for name, batch_size in (("toy", 32), ("imagenet100", 2)):
        cfg = config.parse(dino.Config, ["--data", name, "--use-bn-in-head", "false"])
        ours, plain, packed = measure_steps(cfg, batch_size, device)
        ratios.append(plain / ours)
        print(f"{name}: width {cfg.embed_dim}, {cfg.depth} blocks, 2 + 8 crops, batch "
              f"{batch_size}: {1e3 * ours:.0f} ms per step; plain implementation "
              f"{1e3 * plain:.0f} ms, ratio {ratios[-1]:.2f}; packed {1e3 * packed:.0f} ms",
              flush=True)
    sys.exit(min(ratios) < 1.2)


if __name__ == "__main__":
    main()
