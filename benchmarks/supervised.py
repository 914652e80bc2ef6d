"""Is the built-in data set fair? A ViT of the default size that is trained with labels for the
duration of a default run should classify the images well; the ten nearest neighbors by raw pixels
should not.

    python -m benchmarks.supervised            # about five minutes on two CPU cores
"""
import argparse
import time

import torch
import torch.nn.functional as F

import data
import mmc
import vit
from lib import config, datasets, distributed, metrics
from lib.run import cosine, set_lr


def score_pixel_knn(train, test):
    """Prints the accuracy of 10 nearest neighbors by raw pixels, for two metrics."""
    x, y = (images.pixels.flatten(1).float() for images in (train, test))
    mean = x.mean(0)
    nearest = torch.cat([torch.cdist(q, x).topk(10, largest=False)[1] for q in y.split(250)])
    by_distance = train.labels[nearest].mode(1)[0]
    by_cosine = metrics.knn(x - mean, train.labels, y - mean, k=(10,))[10]
    for name, predicted in (("Euclidean distance, majority vote", by_distance),
                            ("cosine after subtraction of the mean image, weighted vote",
                             by_cosine)):
        accuracy = 100 * (predicted == test.labels).float().mean()
        print(f"10-NN on pixels, {name}: {accuracy:.1f}%")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", nargs="?", type=float, default=4.5,
                        help="minutes of training [4.5]")
    minutes, batch_size, peak_lr = parser.parse_args().minutes, 64, 1e-3
    distributed.keep_memory()
    torch.manual_seed(0)
    cfg = config.parse(mmc.Config, [])
    device = distributed.pick_device()
    bf16 = distributed.pick_precision("auto", device) == "bf16"
    train, test = (datasets.load_images("toy", None, split, cfg.img_size)
                   for split in ("train", "test"))
    score_pixel_knn(train, test)

    net = vit.ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
                  pos=cfg.pos, init=cfg.init)
    head = torch.nn.Linear(cfg.embed_dim, len(train.classes))
    net, head = net.to(device), head.to(device)
    opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], weight_decay=0.05, fused=True)
    loader = data.Loader(train, [data.View(cfg.img_size, scale=(0.6, 1.0))], batch_size)
    begin = time.time()
    for batch in loader.batches():
        done = (time.time() - begin) / (60 * minutes)
        if done >= 1:
            break
        set_lr(opt, cosine(done, 1.0, peak_lr, 0.0, warmup=0.05))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = head(net.split(net(batch.views[0]))[1].mean(1))
        F.cross_entropy(logits.float(), batch.label).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 3.0)
        opt.step()
        opt.zero_grad()
    net.eval()
    correct = 0
    with torch.no_grad():
        for x, index in data.batches(test, cfg.img_size):
            logits = head(net.split(net(x))[1].mean(1))
            correct += (logits.argmax(1) == test.labels[index]).sum().item()
    print(f"supervised ViT, width {cfg.embed_dim}, {cfg.depth} blocks: test accuracy "
          f"{100 * correct / len(test):.1f}%, after {batch.step * batch_size:,} images and "
          f"{minutes} minutes")


if __name__ == "__main__":
    main()
