"""Training steps of MAE, DINO, MoCo v3, iBOT and SimMIM: ours against the official code, in turns.

    for name in facebookresearch/{mae,dino,moco-v3} bytedance/ibot microsoft/SimMIM; do
        git -C path/to/official clone https://github.com/$name; done
    pip install -r requirements-dev.txt                  # has timm, which the official code needs
    OMP_NUM_THREADS=1 python -m benchmarks.official path/to/official      # minutes on one core
    python -m benchmarks.official path/to/official mae dino -- --batch-size 64 --precision bf16

What follows -- are flags of our scripts; the official networks get the same sizes. Default:
ViT-S/16 (MoCo v3's has 12 heads), 8 images of 224 px, fp32, all else as for ImageNet.

Ours is a step of METHOD.py's loop, with what it logs. The official step calls the networks, losses
and functions of the clone in the order of its training script: forward, loss, backward, clipping,
AdamW, moving average. Both get the same pixels, without loading, and for SimMIM and iBOT the same
masks, which on our side are drawn in the step. The loss is that of the first step, where both have
random weights of their own, so it should differ little. One thread on a CPU is measured in
processor time, which other programs on the machine lengthen less. FLOPs are torch's count, which
leaves out a CPU's fused attention.

Not in the official step: DDP, the gradient scaler of fp16 (with --precision bf16 both use bf16),
logging. In its favor: it shares our process, where freed memory is kept (distributed.keep_memory),
and its blocks of MAE and MoCo v3 are today's timm's, with fused attention. Replaced, because
today's libraries lack it: torch._six, np.float, timm.models.layers.helpers, qk_scale of timm's
Block, num_tokens of its VisionTransformer; without a GPU Tensor.cuda(); for iBOT two imports that
its logging needs.
"""
import argparse
import importlib
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import METHODS, split_argv
from lib import config, distributed
from lib.run import Run

REPOSITORIES = {"mae": "facebookresearch/mae", "dino": "facebookresearch/dino",
                "moco_v3": "facebookresearch/moco-v3", "ibot": "bytedance/ibot",
                "simmim": "microsoft/SimMIM"}
VIT_S = {"mae": "--embed-dim 384 --num-heads 6", "moco_v3": "--embed-dim 384",
         "simmim": "--embed-dim 384 --num-heads 6"}              # DINO and iBOT: by default
HEADER = ("| method | images/s, ours | official | ratio | GFLOP per image, ours | official | "
          "loss, ours | official |\n|---|---|---|---|---|---|---|---|")
LR = 1e-6                                   # of the official optimizers; ours is in its warmup


# ---- Official steps ------------------------------------------------------------------------------
# Each function builds the networks and returns a step, a function that returns the loss.


def training_step(run, opt, forward, clip=lambda: None, update_teacher=lambda: None):
    def step():
        with run.autocast():
            loss = forward()
        value = loss.item()                                              # checked or logged by all
        opt.zero_grad()
        loss.backward()
        clip()
        opt.step()
        update_teacher()
        return value
    return step


def vit_size(cfg):
    return dict(img_size=cfg.img_size, patch_size=cfg.patch_size, embed_dim=cfg.embed_dim,
                depth=cfg.depth, num_heads=cfg.num_heads,
                norm_layer=partial(nn.LayerNorm, eps=1e-6))


def mae(cfg, run, batch):
    from models_mae import MaskedAutoencoderViT
    from timm.optim import param_groups_weight_decay
    from util.misc import get_grad_norm_

    model = MaskedAutoencoderViT(
        **vit_size(cfg), decoder_embed_dim=cfg.decoder_embed_dim, decoder_depth=cfg.decoder_depth,
        decoder_num_heads=cfg.decoder_num_heads, norm_pix_loss=cfg.norm_pix_loss).to(run.device)
    groups = param_groups_weight_decay(model, cfg.weight_decay)
    return training_step(run, torch.optim.AdamW(groups, LR, betas=(0.9, cfg.beta2)),
                         lambda: model(batch.views[0], cfg.mask_ratio)[0],
                         lambda: get_grad_norm_(model.parameters()))


def simmim(cfg, run, batch):
    from models.simmim import SimMIM, VisionTransformerForSimMIM
    from optimizer import get_pretrain_param_groups

    draw_mask = importlib.import_module("simmim").draw_mask              # ours
    mask = draw_mask(batch.index, cfg, cfg.seed, batch.epoch).long()     # (B, h, w)
    encoder = VisionTransformerForSimMIM(
        **vit_size(cfg), num_classes=0, qkv_bias=True, drop_path_rate=cfg.drop_path,
        init_values=cfg.layer_scale or None, use_abs_pos_emb=False, use_shared_rel_pos_bias=True,
        use_mean_pooling=False)
    model = SimMIM(encoder, cfg.patch_size).to(run.device)
    groups = get_pretrain_param_groups(model, logging.getLogger(), model.no_weight_decay(),
                                       model.no_weight_decay_keywords())
    return training_step(
        run, torch.optim.AdamW(groups, LR, weight_decay=cfg.weight_decay),
        lambda: model(batch.views[0], mask),
        lambda: nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf))


def moco_v3(cfg, run, batch):
    from moco.builder import MoCo_ViT
    from vits import VisionTransformerMoCo

    encoder = partial(VisionTransformerMoCo, **vit_size(cfg), qkv_bias=True,
                      stop_grad_conv1=cfg.stop_grad_conv1)
    model = MoCo_ViT(encoder, cfg.out_dim, cfg.mlp_dim, cfg.temperature).to(run.device)
    return training_step(
        run, torch.optim.AdamW(model.parameters(), LR, weight_decay=cfg.weight_decay),
        lambda: model(*batch.views, cfg.momentum_teacher))       # which updates the teacher first


def dino(cfg, run, batch):
    from main_dino import DINOLoss
    from utils import MultiCropWrapper
    from vision_transformer import DINOHead, VisionTransformer

    def network(drop_path):
        backbone = VisionTransformer(**vit_size(cfg) | dict(img_size=[cfg.img_size]),
                                     qkv_bias=True, drop_path_rate=drop_path)
        head = DINOHead(cfg.embed_dim, cfg.out_dim, cfg.use_bn_in_head, cfg.norm_last_layer,
                        hidden_dim=cfg.head_hidden_dim, bottleneck_dim=cfg.bottleneck_dim)
        return MultiCropWrapper(backbone, head).to(run.device)

    student, teacher = network(cfg.drop_path), network(0.0)
    loss = DINOLoss(cfg.out_dim, 2 + cfg.local_crops_number, cfg.warmup_teacher_temp,
                    cfg.teacher_temp, cfg.warmup_teacher_temp_epochs, int(cfg.epochs))
    loss.to(run.device)

    def forward():
        t = teacher(batch.views[:2])
        return loss(student(batch.views), t, 0)                              # 0: epoch
    return distillation_step(cfg, run, student, teacher, forward)


def ibot(cfg, run, batch):
    from main_ibot import iBOTLoss
    from models.head import iBOTHead
    from models.vision_transformer import VisionTransformer
    from utils import MultiCropWrapper

    sample_masks = importlib.import_module("ibot").sample_masks          # ours
    masks = sample_masks(batch.index, cfg, cfg.seed, batch.epoch)        # (2B, N)
    masks = list(masks.unflatten(1, (cfg.img_size // cfg.patch_size, -1)).chunk(2))

    def network(**more):
        backbone = VisionTransformer(**vit_size(cfg) | dict(img_size=[cfg.img_size]),
                                     qkv_bias=True, return_all_tokens=True, **more)
        head = iBOTHead(cfg.embed_dim, cfg.out_dim, patch_out_dim=cfg.out_dim,
                        norm="bn" if cfg.use_bn_in_head else None, hidden_dim=cfg.head_hidden_dim,
                        bottleneck_dim=cfg.bottleneck_dim, norm_last_layer=cfg.norm_last_layer,
                        shared_head=cfg.shared_head)
        return MultiCropWrapper(backbone, head).to(run.device)

    student, teacher = network(drop_path_rate=cfg.drop_path, masked_im_modeling=True), network()
    loss = iBOTLoss(cfg.out_dim, cfg.out_dim, 2, cfg.local_crops_number, cfg.warmup_teacher_temp,
                    cfg.teacher_temp, cfg.warmup_teacher_temp, cfg.teacher_patch_temp,
                    cfg.warmup_teacher_temp_epochs, int(cfg.epochs), lambda1=cfg.lambda1,
                    lambda2=cfg.lambda2).to(run.device)

    def forward():
        x, crops = batch.views[:2], batch.views[2:]
        t, s = teacher(x), student(x, mask=masks)
        student.backbone.masked_im_modeling = False
        local = student(crops)[0] if crops else None
        student.backbone.masked_im_modeling = True
        return loss(s, t, local, masks, 0)["loss"]                           # 0: epoch
    return distillation_step(cfg, run, student, teacher, forward)


def distillation_step(cfg, run, student, teacher, forward):
    """The step of DINO and of iBOT, whose `utils` differ but have these functions."""
    import utils

    teacher.load_state_dict(student.state_dict(), strict=False)          # iBOT's has no mask token
    teacher.requires_grad_(False)
    source, m = dict(student.named_parameters()), cfg.momentum_teacher

    def clip():
        utils.clip_gradients(student, cfg.clip_grad)
        utils.cancel_gradients_last_layer(0, student, cfg.freeze_last_layer)

    @torch.no_grad()
    def update_teacher():
        for name, p in teacher.named_parameters():
            p.mul_(m).add_((1 - m) * source[name])

    groups = utils.get_params_groups(student)
    return training_step(run, torch.optim.AdamW(groups, LR, weight_decay=cfg.weight_decay),
                         forward, clip, update_teacher)


def support_old_imports(method):
    """What the official code imports and today's libraries lack: see the top of this file."""
    def add_module(name, **content):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)

    warnings.filterwarnings("ignore")
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_, **__: self
    add_module("torch._six", inf=math.inf)
    np.float = float
    if method == "ibot":
        add_module("tensorboardX", SummaryWriter=None)
        for name in ("evaluation", "evaluation.unsupervised", "evaluation.unsupervised.unsup_cls"):
            add_module(name, eval_pred=None)
    if method in ("mae", "moco_v3"):
        from timm.layers import to_2tuple
        from timm.models import vision_transformer as timm_vit
        add_module("timm.models.layers.helpers", to_2tuple=to_2tuple)
        timm_vit.VisionTransformer.num_tokens = 1                        # the class token
        block = timm_vit.Block
        timm_vit.Block = lambda *args, qk_scale=None, **more: block(*args, **more)


# ---- In turns ------------------------------------------------------------------------------------


def in_turns(build, rounds, file):
    """Run.steps that alternates a step of the script's loop and one of the official code, with the
    first batch, and writes what it measured to a file. The first round, in which FLOPs are counted,
    is not timed."""
    def steps(self, loader):
        def now():
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            one_thread = self.device.type == "cpu" and torch.get_num_threads() == 1
            return time.process_time() if one_thread else time.perf_counter()

        batch, B, times = next(loader.batches()), self.cfg.batch_size, ([], [])
        official = build(self.cfg, self, batch)
        with FlopCounterMode(display=False) as ours:
            yield 0, batch
        total, count = self.sums["loss"]
        with FlopCounterMode(display=False) as theirs:
            losses = float(total / count), official()
        for step in range(1, 1 + rounds):
            begin = now()
            yield step, batch
            between = now()
            official()
            times[0].append(between - begin)
            times[1].append(now() - between)
        file.write_text(json.dumps(dict(
            setting=f"{self.precision}, batch {B}, {distributed.device_name(self.device)}",
            speeds=[B / statistics.median(taken) for taken in times], losses=losses,
            gflops=[counter.get_total_flops() / 1e9 / B for counter in (ours, theirs)])))
    return steps


def run_method(method, clone, rounds, argv, file):
    """METHOD.py with the flags argv, in turns with the official code. In a process of its own:
    modules of different repositories have the same names."""
    script = importlib.import_module(method)             # before the path has the clone
    sys.argv, sys.stdout = [f"{method}.py", *argv], open(os.devnull, "w")
    sys.path.insert(0, str(clone))
    config.FALLBACK_SECTIONS["synthetic"] = "imagenet"
    Run.steps = in_turns(globals()[method], rounds, file)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def main():
        script.main()
        dist.destroy_process_group()

    try:
        support_old_imports(method)
        config.main(main)
    except ImportError as e:
        sys.exit(f"error: {e}; the official code needs: pip install -r requirements-dev.txt")


def measure(method, clone, rounds, flags):
    """-> what in_turns() wrote; None if the process failed."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--data", "synthetic", "--precision", "fp32", "--batch-size", "8",
                *VIT_S.get(method, "").split(), *flags, "--out", f"{folder}/run"]
        file = Path(folder) / "found.json"
        process = multiprocessing.get_context("spawn").Process(
            target=run_method, args=(method, clone, rounds, argv, file))
        process.start()
        process.join()
        return json.loads(file.read_text()) if file.exists() else None


def table_row(name, found):
    (ours, theirs), losses, gflops = found["speeds"], found["losses"], found["gflops"]
    numbers = f"{ours:.3g}", f"{theirs:.3g}", f"{ours / theirs:.2f}"
    return "| " + " | ".join([name, *numbers, *(f"{x:.3g}" for x in gflops + losses)]) + " |"


def main():
    argv, flags = split_argv(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OFFICIAL_FOLDER", help="holds the clones")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(REPOSITORIES))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of either side [5]")
    args = parser.parse_args(argv)
    if unknown := set(args.methods) - set(REPOSITORIES):
        parser.error(f"no official code of {' '.join(sorted(unknown))}; choose from "
                     f"{' '.join(REPOSITORIES)}")
    settings, failed = set(), []
    for method in args.methods or REPOSITORIES:
        repository, name = REPOSITORIES[method], METHODS[method]
        clone = args.folder / Path(repository).name
        if not clone.is_dir():
            print(f"{name}: no {clone}; git clone https://github.com/{repository} {clone}",
                  file=sys.stderr)
        elif found := measure(method, clone, args.rounds, flags):
            print("\n".join([*([] if settings else [HEADER]), table_row(name, found)]), flush=True)
            settings.add(found["setting"])
        else:
            failed.append(name)
    if settings:
        print("\n" + "; ".join(settings))
    if failed or not settings:
        sys.exit(f"{', '.join(failed) or 'all methods'} not measured: see above")


if __name__ == "__main__":
    main()
