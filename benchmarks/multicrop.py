"""How much faster is a step of dino.py than the plain way of writing it? The plain way: a forward
for each crop, fp32, a loop over pairs of crops, loops over tensors for clipping, AdamW and EMA.
Third comes what was not kept: crops of both sizes in one packed sequence, split for attention.

    python -m benchmarks.multicrop             # two minutes on two CPU cores; exit code 1 below 1.2
"""
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import dino
import vit
from lib import config, distributed
from lib.run import ema_update, param_groups


def ours(student, teacher, center, opt, global_crops, local_crops, autocast):
    with autocast:
        x = torch.cat(global_crops)
        with torch.no_grad():
            t = teacher(x)
        s = student(x, torch.cat(local_crops))
    t, s = t.float().unflatten(0, (2, -1)), s.float().unflatten(0, (2 + len(local_crops), -1))
    dino.cls_loss(s, dino.assign(t, center.center, 0.04), 0.1).backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]     # as Run.backward
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((3.0 / (norms + 1e-6)).clamp(max=1)))
    opt.step(), opt.zero_grad()
    ema_update(teacher, student, 0.99)
    center.update([t.mean((0, 1))])


def plain(student, teacher, center, opt, global_crops, local_crops, autocast):
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
    opt.step(), opt.zero_grad()
    with torch.no_grad():
        for p, q in zip(teacher.parameters(), student.parameters()):
            p.copy_(0.99 * p + 0.01 * q)
        center.center.copy_(0.9 * center.center + 0.1 * torch.cat(t).mean(0))


class Packed(dino.Network):
    """Linear layers and norms see the tokens of all crops as one sequence."""

    def forward(self, x, crops=None):
        if crops is None:
            return super().forward(x)
        sizes = [self.backbone.embed(z)[0] for z in (x, crops)]
        ends = [len(z.flatten(0, 1)) for z in sizes]
        z = torch.cat([y.flatten(0, 1) for y in sizes])
        for block in self.backbone.blocks:
            qkv, parts = block.attn.qkv(block.norm1(z)).split(ends), []
            for y, like in zip(qkv, sizes):
                y = y.unflatten(0, like.shape[:2]).unflatten(2, (3, block.attn.num_heads, -1))
                y = vit.attend(*y.permute(2, 0, 3, 1, 4))
                parts.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
            z = z + block.attn.proj(torch.cat(parts))
            z = z + block.mlp(block.norm2(z))
        z = [y.unflatten(0, like.shape[:2])[:, 0] for y, like in zip(z.split(ends), sizes)]
        return self.head(self.backbone.norm(torch.cat(z)))


def seconds(cfg, batch_size, device, rounds=5):
    """Median seconds of a step each way; they take turns, so that all meet the same machine."""
    bf16 = distributed.pick_precision("auto", device) == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    ways, times = [(ours, dino.Network), (plain, dino.Network), (ours, Packed)], ([], [], [])
    crops = [[torch.randn(batch_size, 3, size, size, device=device) for _ in range(n)]
             for size, n in ((cfg.img_size, 2), (cfg.local_size, 8))]
    states = []
    for step, network in ways:
        torch.manual_seed(0)
        student, teacher = (network(cfg, teacher=True).to(device) for _ in range(2))
        ema_update(teacher.requires_grad_(False), student, 0.0)
        opt = torch.optim.AdamW(param_groups(student, 0.04), lr=1e-4,
                                **(dict(fused=True) if step is ours else dict(foreach=False)))
        states.append((student, teacher, dino.Center(cfg.out_dim, 0.9).to(device), opt))
    one, other = (state[0](*map(torch.cat, crops)) for state in states[::2])
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    for _ in range(rounds + 1):                                              # the first warms up
        for (step, _), state, taken in zip(ways, states, times):
            begin = time.perf_counter()
            step(*state, *crops, autocast)
            state[2].center.sum().item()                                     # a GPU has to be done
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in times]


if __name__ == "__main__":
    distributed.keep_memory()
    device, ratios = distributed.pick_device(), []
    for name, batch_size in (("toy", 32), ("imagenet100", 2)):
        cfg = config.parse(dino.Config, ["--data", name, "--bn-in-head", "false"])
        fast, slow, packed = seconds(cfg, batch_size, device)
        ratios.append(slow / fast)
        print(f"{name}: {cfg.embed_dim} x {cfg.depth}, 2 + 8 crops, batch {batch_size}: "
              f"{1e3 * fast:.0f} ms a step; the plain way {1e3 * slow:.0f} ms: "
              f"{ratios[-1]:.2f} x; packed {1e3 * packed:.0f} ms")
    sys.exit(min(ratios) < 1.2)
