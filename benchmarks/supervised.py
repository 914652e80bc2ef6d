"""Is the toy world fair? A supervised ViT of the default size should tell the creatures apart in
the default job's time; a vote of the ten nearest neighbours in raw pixels should not.

    python -m benchmarks.supervised            # about five minutes on two CPU cores
"""
import sys
import time

import torch
import torch.nn.functional as F

import data
import mmc
import vit
from lib import config, datasets, distributed, metrics
from lib.run import cosine, set_lr


def main(minutes=4.5, batch_size=64, peak=1e-3):
    distributed.keep_memory()
    torch.manual_seed(0)
    cfg = config.parse(mmc.Config, [])
    device = distributed.pick_device()
    bf16 = distributed.pick_precision("auto", device) == "bf16"
    images, test = (datasets.load_images("toy", None, split, cfg.img_size) for split in ("train", "test"))
    x, y = (i.pixels.flatten(1).float() for i in (images, test))
    near = torch.cat([torch.cdist(q, x).topk(10, largest=False)[1] for q in y.split(250)])
    mean = x.mean(0)
    vote = metrics.knn(x - mean, images.labels, y - mean, k=(10,))[10]
    for name, found in (("Euclid, majority", images.labels[near].mode(1)[0]),
                        ("cosine about the mean, weighted", vote)):
        print(f"10-NN on pixels, {name}: {100 * (found == test.labels).float().mean():.1f} %")

    net = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
                  pos=cfg.pos, init=cfg.init)
    head = torch.nn.Linear(cfg.embed_dim, len(images.classes))
    net, head = net.to(device), head.to(device)
    opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], weight_decay=0.05, fused=True)
    loader = data.Loader(images, [data.View(cfg.img_size, scale=(0.6, 1.0))], batch_size)
    begin = time.time()
    for batch in loader.batches():
        done = (time.time() - begin) / (60 * minutes)
        if done >= 1:
            break
        set_lr(opt, cosine(done, 1.0, peak, 0.0, warmup=0.05))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            scores = head(net.split(net(batch.views[0]))[1].mean(1))
        F.cross_entropy(scores.float(), batch.label).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 3.0)
        opt.step(), opt.zero_grad()
    net.eval()
    right = 0
    with torch.no_grad():
        for x, index in data.batches(test, cfg.img_size):
            scores = head(net.split(net(x))[1].mean(1))
            right += (scores.argmax(1) == test.labels[index]).sum().item()
    print(f"supervised ViT, {cfg.embed_dim} x {cfg.depth}: {100 * right / len(test):.1f} %"
          f" of test images right, after {batch.step * batch_size:,} images and {minutes} minutes")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
