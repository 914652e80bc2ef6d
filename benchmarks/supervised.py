"""The supervised baseline of the tables: the default ViT of a small data set, trained with labels
(on toy for as long as a default run takes), and saved so that evaluate.py probes it like a
pretrained one.

    python -m benchmarks.supervised                    # out/supervised-toy, about as long as mmc.py
    python -m benchmarks.supervised --data cifar10 --data-root FOLDER
    python evaluate.py --task linear --checkpoint out/supervised-toy
"""
import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import nn

import data
import mmc
import vit
from lib import checkpoints, config, datasets, distributed, progress
from lib.run import cosine, grad_norm, param_groups, set_lr

BATCH, PEAK_LR, WEIGHT_DECAY = 64, 1e-3, 0.05            # 2e-3: 3 points less, 4e-3: 19 less


def train(steps, seed, out, name="toy", root=None):
    """Trains on a data set for `steps` steps of 64 images, writes the encoder to the folder `out`,
    and returns the accuracy on the test images in percent and the seconds of training."""
    distributed.keep_memory()
    torch.manual_seed(seed)
    cfg = config.parse(mmc.Config, ["--data", name])     # its section: the network of all methods
    device = distributed.pick_device()
    precision = distributed.pick_precision("auto", device)
    images, tests = (datasets.load_images(name, root, split, cfg.img_size, device=device)
                     for split in ("train", "test"))
    encoder = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
                      pos=cfg.pos, init=cfg.init)
    net = nn.ModuleDict(dict(encoder=encoder, head=nn.Linear(cfg.embed_dim, len(images.classes))))
    net = net.to(device)
    opt = torch.optim.AdamW(param_groups(net, WEIGHT_DECAY), fused=True)
    view = data.View(cfg.img_size, scale=cfg.global_crops_scale)
    loader = data.Loader(images, [view], BATCH, seed, device)

    def logits(x):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return net["head"](encoder.split(encoder(x))[1].mean(1)).float()    # mean patch token

    print(f"{precision} on 1 x {distributed.device_name(device)}, torch {torch.__version__}")
    begin = time.perf_counter()
    for step, batch in zip(progress.bar(range(steps), "training", unit="steps"), loader.batches()):
        set_lr(opt, cosine(step, steps, PEAK_LR, 0.0, warmup=0.05 * steps))
        F.cross_entropy(logits(batch.views[0]), batch.label).backward()
        torch.nn.utils.clip_grads_with_norm_(net.parameters(), 3.0, grad_norm(net))
        opt.step()
        opt.zero_grad()
    seconds = time.perf_counter() - begin

    net.eval()
    with torch.no_grad():
        correct = sum((logits(x).argmax(1).cpu() == tests.labels[index.cpu()]).sum().item()
                      for x, index in data.batches(tests, cfg.img_size, device=device))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.save_encoder(out / "encoder.pt", encoder, branch="base", method="supervised",
                             data=name, step=steps)
    (out / "config.yaml").write_text(yaml.dump(dict(precision=precision, seed=seed)))
    accuracy = 100 * correct / len(tests)
    (out / "metrics.jsonl").write_text(json.dumps(dict(step=steps, accuracy=accuracy)) + "\n")
    return accuracy, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="steps of 64 images [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="toy", choices=("toy", "cifar10"), help="[%(default)s]")
    parser.add_argument("--data-root", help="folder of the data set")
    parser.add_argument("--out", help="[out/supervised-DATA]")
    args = parser.parse_args()
    args.out = args.out or f"out/supervised-{args.data}"
    accuracy, seconds = train(args.steps, args.seed, args.out, args.data, args.data_root)
    print(f"supervised ViT: test accuracy {accuracy:.1f}% after {BATCH * args.steps:,} images in "
          f"{seconds:.0f} s; wrote {args.out}\ndone after {args.steps} steps")


if __name__ == "__main__":
    main()
