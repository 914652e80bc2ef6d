"""What holds for every method: one process equals two, a run that was killed equals one that was
not, micro-batches change nothing or are refused, user errors are one sentence."""
import gc
import importlib
import json
import math
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mmc
import vit
from lib import checkpoints, config, datasets, tokenizer, toy, visualize
from lib.run import Run, cosine

ROOT = Path(__file__).parent.parent
METHODS = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
SECTIONS = ["toy", "cifar10", "imagenet100", "imagenet", "coco"]
TINY = dict(                                  # whichever of these a method has
    img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, drop_path=0.2, mlp_dim=16,
    head_hidden_dim=16, bottleneck_dim=8, out_dim=8, queue_size=32, group_size=4,
    local_crops_number=2, local_crops_size=8, mask_patch_size=8, decoder_embed_dim=16,
    decoder_depth=1, decoder_num_heads=2, warmup_epochs=0, freeze_last_layer=0, num_mask_patches=8,
    min_mask_patches_per_block=2, second_input_size=16, vocab_size=16, tokenizer_steps=3,
    layer_scale=4)
SWIN = dict(                                  # instead of TINY
    backbone="swin_micro", img_size=16, drop_path=0.2, mlp_dim=16, head_hidden_dim=16,
    bottleneck_dim=8, out_dim=8, queue_size=32, warmup_epochs=0, freeze_last_layer=0)
PUBLISHED = dict(momentum_teacher=0.99, temperature=0.2)                     # MoBY's
OWN = dict(hybrid=dict(layer_scale=64),       # else a batch norm magnifies the rounding of class
           #                                    tokens that hardly differ
           # not equally many masked patches in every image: 5 to 10
           beit=dict(num_mask_patches=10, min_mask_patches_per_block=6))
COMMON = ("--data synthetic --batch-size 16 --workers 0 --evals 0 --log-every 1 --steps 5 "
          "--precision fp32 --device cpu --save-every 0").split()


def flags(method, *more, **settings):
    known = config.fields(importlib.import_module(method).Config)
    sizes = {} if "backbone" in settings else TINY           # a Swin has its own
    given = {**sizes, **OWN.get(method, {}), **settings}
    own = {k: v for k, v in given.items() if k in known}
    return [*COMMON, *(f"--{k}={v}" for k, v in own.items()), *map(str, more)]


@pytest.fixture
def run(monkeypatch, quick_collect):
    """run(method, *flags): the script's main in this process, with this process's signals kept."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def main(method, *more, **settings):
        gc.collect()                          # the lock of a folder goes with its run
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *flags(method, *more, **settings)])
        importlib.import_module(method).main()

    yield main
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def few(monkeypatch):
    """Data sets are their first 32 images, for one test."""
    load = datasets.load_images
    monkeypatch.setattr(datasets, "load_images", lambda *given: load(*given[:4], 32, *given[5:]))


# The heads in a method's encoder.pt, and where they stand in the network of its branch.
HEADS = dict(
    dino=dict(head="head"), ibot=dict(head="head"), mmc=dict(cls="head_cls", patch="head_patch"),
    selfpatch=dict(ca_head="ca_head", c_head="c_head", p_head="p_head"),
    moco_v3=dict(projector="projector", predictor="predictor"),
    moby=dict(projector="projector", predictor="predictor"),
    hybrid=dict(projector="projector", predictor="predictor", decoder="decoder"))


def records(out):
    timed = ("images_per_s", "mfu", "data_time", "memory_gib")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


DINOS = r"head\.mlp\.([03]\.bias|[14]\.running_mean)$|"
MOBYS = r"(projector|predictor)\.(0\.bias|1\.running_mean)|projector\.3\.bias|"
TAKEN_AWAY = dict(                            # by a batch norm right behind: shifts of its input
    moco_v3=r"backbone\.norm\.bias|projector\.1\.running_mean",
    moby=MOBYS + r"backbone\.norm\.bias",
    dino=DINOS + r"backbone\.norm\.bias", ibot=DINOS + r"backbone\.norm\.bias",
    selfpatch=DINOS + MOBYS + r"ca_head\.norm\.bias|\.k\.bias")


def weights(out):
    """What a checkpoint holds, but for the optimizers' state and what the loss does not see: biases
    of keys, which cancel in the softmax, and shifts that a batch norm takes away. Their gradient is
    rounding noise, and Adam blows noise up to full steps."""
    found, saved = {}, torch.load(out / "last.pt")
    unseen = TAKEN_AWAY.get(saved["method"], "$^")
    for name, state in saved["state"].items():
        for key, v in state.items() if "param_groups" not in state else ():
            if torch.is_tensor(v) and v.is_floating_point() and not re.search(unseen, key):
                if key.endswith("qkv.bias"):
                    v.view(3, -1)[1] = 0
                found[f"{name}.{key}"] = v
    return found


def apart(a, b):
    """Relative distance of two runs' weights."""
    a, b = (torch.cat([v.flatten().double() for v in weights(out).values()]) for out in (a, b))
    return ((a - b).norm() / b.norm()).item()


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_field_is_explained_and_every_section_can_be_had(method):
    module = importlib.import_module(method)
    own = config.fields(module.Config)
    for name, (_, _, text) in own.items():
        assert text and text.count("(") == text.count(")") and text.count('"') % 2 == 0, name
    more = {"photos"} if method in ("mae", "dino", "mmc") else set()
    assert set(config.read_yaml(ROOT / "configs" / f"{method}.yaml")) == {*SECTIONS, *more}
    for section in SECTIONS:
        cfg = config.parse(module.Config, ["--data", section])
        assert (cfg.method, cfg.data) == (method, section)
        section = config.read_yaml(ROOT / "configs" / f"{method}.yaml")[section] or {}
        for key in (key for key in section if " " in key):         # such as "base moby"
            name, choice = key.split()
            assert choice in typing.get_args(own[name][0])
            config.parse(module.Config, ["--data", cfg.data, f"--{name}", choice])
    paper = config.parse(module.Config, ["--data", "imagenet"])
    assert (paper.img_size, paper.patch_size, paper.depth) == (224, 16, 12)
    assert config.parse(module.Config, []).img_size <= 64                    # toy


@pytest.mark.parametrize("method", METHODS)
def test_help_is_quick_and_lists_every_field(method, capsys):
    begin, module = time.process_time(), importlib.import_module(method)
    with pytest.raises(SystemExit) as stop:
        config.parse(module.Config, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and time.process_time() - begin < 2
    assert all(f"--{name.replace('_', '-')}" in text for name in config.fields(module.Config))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_file_stands_alone(method):
    """It imports none of the other methods, and names neither torch.distributed nor a rank 0."""
    text = (ROOT / f"{method}.py").read_text()
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M))
    assert not imported & (set(METHODS) | {"evaluate", "analysis"})
    assert "torch.distributed" not in text and "rank == 0" not in text


TEMPERATURES = [(flag, "must be above 0") for flag in
                ("--student-temp 0", "--warmup-teacher-temp 0", "--teacher-temp 0")]
DISTILLATION = [*TEMPERATURES, ("--local-crops-number -1", "0 or more"),
                ("--out-dim 1", "2 or more"),
                ("--local-crops-size 10", "a multiple of --patch-size"),
                ("--global-crops-scale 0.6 0.5", "the smaller one first"),
                ("--local-crops-scale 0.05", "two fractions"),
                ("--use-bn-in-head --accum-iter 2", "--use-bn-in-head false")]
REFUSED = dict(
    dino=[*DISTILLATION, ("--color-jitter 0.3", "four numbers")],
    ibot=[*DISTILLATION, ("--teacher-patch-temp 0", "must be above 0"),
          ("--mask-prob 1.1", "at most 1"), ("--pred-ratio-var 0.6", "from 0 to 1"),
          ("--pred-ratio 0.9", "from 0 to 1"), ("--pred-shape ring", "block or rand")],
    selfpatch=[*DISTILLATION, ("--out-dim-selfpatch 1", "2 or more"),
               ("--num-positives 0", "of the 8 neighbors"),
               ("--num-positives 9", "of the 8 neighbors"),
               ("--borders none", "official or correct")],
    mmc=[("--accum-iter 2", "leave out --accum-iter"), ("--group-size 1", "2 or more"),
         ("--group-size 3", "must divide the 16 images"), ("--noise-ratio 0.9", "at most 0.8"),
         ("--paste-ratio 0.9", "at most 0.8"), ("--drop-align 0", "a sixth of --img-size"),
         ("--drop-align 3", "a sixth of --img-size"), ("--local-crops-number -1", "0 or more"),
         ("--local-crops-size 10", "a multiple of --patch-size"), ("--paste-prob 35", "at most 1"),
         ("--noise-ratio -0.5", "0 or more"), ("--momentum-teacher 1.5", "at most 1"),
         ("--temperature 0", "must be above 0"),
         ("--lambda-rec 0 --lambda-cls 0 --lambda-patch 0", "there is no loss")],
    mae=[("--mask-ratio -1", "0 or more"), ("--mask-ratio nan", "0 or more")],
    moco_v3=[("--temperature 0", "must be above 0")],
    moby=[("--temperature 0", "must be above 0"), ("--queue-size 15", "at least --batch-size 16")],
    hybrid=[("--temperature 0", "must be above 0")],
    beit=[("--pos none", "add --rel-pos-bias"), ("--clip-grad -1", "0 or more"),
          ("--depth 0", "1 or more"), ("--crop-min nan", "at most 1")])


@pytest.mark.parametrize("method, flags, sentence", [
    (method, *refusal) for method, refusals in REFUSED.items() for refusal in refusals])
def test_impossible_settings_are_refused(method, flags, sentence, run, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        run(method, "--out", tmp_path / "run", "--steps", 1, *flags.split())


# ---- losses --------------------------------------------------------------------------------------


def loss_examples():
    """{method.loss: (the loss as a function of its float64 predictions, their shapes)}."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=g, dtype=torch.float64)

    def load(method):
        return importlib.import_module(method)

    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])       # (B, N)
    pixel_mask, x = rand(2, 4, 4) < 0.5, rand(2, 3, 4, 4)
    target, ids, keys = rand(2, 4, 3), torch.tensor([1, 0, 2, 2]), rand(4, 5)
    found = {
        "mae.mae_loss": (lambda y: load("mae").mae_loss(y, target, mask), (2, 4, 3)),
        "asl.mae_loss": (lambda y: load("asl").mae_loss(y, target, mask), (2, 4, 3)),
        "beit.token_loss": (lambda y: load("beit").token_loss(y, ids, 3), (4, 5)),
        "cae.token_loss": (lambda y: load("cae").token_loss(y, ids.view(2, 2)), (2, 2, 5)),
        "cae.align_loss": (lambda y: load("cae").align_loss(y, target), (2, 4, 3)),
        "ibot.patch_loss": (lambda w: load("ibot").patch_loss(w, keys.softmax(1), mask, 0.1),
                            (4, 5)),
        "selfpatch.patch_loss": (lambda w: load("selfpatch").patch_loss(
            [w], [target.softmax(2)], 0.1), (2, 4, 3)),
        "mmc.cls_loss": (lambda q: load("mmc").cls_loss(q, keys.expand(2, -1, -1), 0.2),
                         (3, 4, 5)),
        "mmc.patch_loss": (lambda Q: load("mmc").patch_loss(Q, keys.expand(2, -1, -1), 0.2, 2),
                           (2, 4, 5))}
    for method in ("simmim", "hybrid", "mmc"):
        found[f"{method}.rec_loss"] = (
            lambda y, method=method: load(method).rec_loss(y, x, pixel_mask), (2, 3, 4, 4))
    for method in ("moco_v3", "hybrid"):
        found[f"{method}.contrastive_loss"] = (
            lambda q, method=method: load(method).contrastive_loss(q, keys, 0.2), (4, 5))
    found["moby.contrastive_loss"] = (lambda q: load("moby").contrastive_loss(
        q, keys, keys.flip(1), 0.2), (4, 5))
    for method in ("dino", "ibot", "selfpatch"):
        found[f"{method}.cls_loss"] = (lambda s, method=method: load(method).cls_loss(
            s, load(method).assign(keys.expand(2, -1, -1), 0.1, 0.04), 0.1), (3, 4, 5))
    return found


@pytest.mark.parametrize("name", loss_examples())
def test_losses_keep_float64_so_that_gradients_can_be_checked_numerically(name):
    loss, shape = loss_examples()[name]
    prediction = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(loss, prediction)
    with pytest.raises(RuntimeError, match="does not require|Jacobian mismatch"):     # control
        torch.autograd.gradcheck(lambda y: loss(y.float().double()), prediction)


@pytest.mark.parametrize("use_cosine", [False, True])
def test_the_alignment_of_asl_keeps_float64(use_cosine):
    """Its value counts each distance twice, its gradient once: half the difference quotient."""
    asl = importlib.import_module("asl")
    a, b, step = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    low, high = (asl.sem_loss(a + 1e-6 * sign * step, b, mask, use_cosine) for sign in (-1, 1))
    a.requires_grad_()
    asl.sem_loss(a, b, mask, use_cosine).backward()
    along_step = (a.grad * step).sum().item()
    assert (high - low).item() / 4e-6 == pytest.approx(along_step, rel=1e-7)
    low, high = (asl.sem_loss((a + 1e-6 * sign * step).float(), b.float(), mask, use_cosine)
                 for sign in (-1, 1))
    assert (high - low).item() / 4e-6 != pytest.approx(along_step, rel=1e-7)     # control


def test_a_mean_over_masked_patches_keeps_float64():
    """iBOT's weights 1 / (masked patches of the crop): a third has no exact value in float32."""
    ibot = importlib.import_module("ibot")
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    loss = ibot.patch_loss(torch.zeros(3, 4).double(), torch.full((3, 4), 0.25).double(), mask, 1.0)
    assert loss.item() == pytest.approx(math.log(4) / 2, rel=1e-14)


# ---- what a run logs -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_increases_during_warmup(method, run, few, tmp_path):
    """Three steps of it; those of DINO's family reach the peak in its last step already, MoBY never
    does: it goes on where a cosine without a warmup would be."""
    run(method, "--out", tmp_path / "run", warmup_epochs=1.5, warmup_lr=0, min_lr=0)
    lr = [line["lr"] for line in records(tmp_path / "run")]
    rise = 2 if method in ("dino", "ibot", "selfpatch") else 3
    peak = lr[3] / (cosine(3, 5, 1, 0) if method == "moby" else 1)
    assert lr[:3] == pytest.approx([cosine(step, 5, peak, 0, rise) for step in range(3)])
    assert lr[3] > 0


@pytest.mark.parametrize("method", ["beit", "cae"])
def test_a_warmup_that_ends_later_than_the_published_one_is_named(method):
    """Their code: linspace(0, peak, warmup), which includes both ends, then a cosine from the peak;
    so it has the peak twice."""
    total, warmup, peak, end = 50, 10, 1.5e-3, 1e-5
    angles = math.pi * torch.arange(total - warmup).double() / (total - warmup)
    published = [*torch.linspace(0, peak, warmup, dtype=torch.float64).tolist(),
                 *(end + (peak - end) * (1 + angles.cos()) / 2).tolist()]
    ours = [cosine(step, total, peak, end, warmup) for step in range(total)]
    assert published[warmup - 1] == published[warmup] == ours[warmup] == peak
    assert ours[warmup:] == pytest.approx(published[warmup:])
    assert ours[1:warmup] == pytest.approx([lr * 0.9 for lr in published[1:warmup]])
    text = " ".join(importlib.import_module(method).__doc__.split())
    assert "end the warmup one step later" in text


def test_a_run_that_ends_within_its_warmup_gets_a_warning(run, few, tmp_path, capsys):
    for epochs, warning in ((3, True), (2, False)):                             # 6, 4 of 5 steps
        run("simmim", "--out", tmp_path / "run", warmup_epochs=epochs)
        assert ("ends within its warmup of 6 steps" in capsys.readouterr().out) == warning


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bf16_costs_a_little_precision_and_nothing_else(method, run, few, tmp_path):
    """What GPUs run by default. Losses are taken in fp32: in bf16 they would have three digits."""
    losses = []
    for precision in ("fp32", "bf16"):
        run(method, "--data", "toy", "--steps", 2, "--evals", 1, "--out", tmp_path / precision,
            "--precision", precision)
        losses += [[line["loss"] for line in records(tmp_path / precision)]]
    exact, rounded = losses
    assert rounded == pytest.approx(exact, rel=0.03) and rounded != exact
    assert all(x != torch.tensor(x).bfloat16().item() for x in rounded)
    assert (tmp_path / "bf16" / "visualization.png").exists()


@pytest.fixture
def columns(monkeypatch):
    """The columns of the visualization that a run writes last."""
    found = {}
    monkeypatch.setattr(visualize, "save_grid", lambda _, columns: found.update(columns))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method, seen, titles", [
    ("asl", "visible", ["reconstruction", "reconstruction b"]),
    ("hybrid", "visible", ["reconstruction"]),
    ("simmim", "visible", ["reconstruction"]), ("mmc", "corrupted", ["reconstruction"])])
def test_visualizations_show_the_mask_and_the_reconstruction(
        method, seen, titles, run, few, columns, tmp_path, monkeypatch):
    regions, corruption = [], mmc.corruption
    monkeypatch.setattr(mmc, "corruption", lambda *args: (
        found := corruption(*args), regions.append(found[0]))[0])
    run(method, "--data", "toy", "--steps", 1, "--evals", 1, "--out", tmp_path / "run",
        img_size=32, mask_patch_size=8)
    image = columns["intact" if method == "mmc" else "image"]
    assert torch.equal(image, toy.draw(torch.arange(len(image)), "test", 32)["image"])
    masked = (columns[seen] != image).any(1, keepdim=True).expand_as(image)
    if method == "mmc":                  # a pixel of another image may have the same color
        region = regions[-1][:, None].expand_as(image)
        assert (region | ~masked).all() and masked[region].float().mean() > 0.9
        masked = region
    assert 0.1 < masked.float().mean() < 0.9
    if method != "mmc":                                                      # noise, other images
        assert len(columns[seen].movedim(1, -1)[masked[:, 0]].unique(dim=0)) == 1
    for title in titles:
        x = columns[title]
        assert torch.equal(x[~masked], image[~masked]) and (x != columns[seen])[masked].any()
    assert len(titles) == 1 or not torch.equal(*(columns[title] for title in titles))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["beit", "cae"])
def test_visualizations_show_true_and_predicted_tokens(
        method, run, few, columns, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer.Tokenizer, "decode", lambda _, ids: F.interpolate(
        ids.view(-1, 1, 4, 4).expand(-1, 3, -1, -1) / 255, 16))              # a token, a color
    run(method, "--data", "toy", "--steps", 1, "--evals", 1, "--out", tmp_path / "run")
    seen = columns["visible"]
    masked = (columns["image"] != seen).any(1, keepdim=True).expand_as(seen)
    true, named = columns["true tokens"], columns["predicted tokens"]
    assert torch.equal(true[~masked], named[~masked]) and (true != named)[masked].any()
    assert true.max() < 16


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ibot", "selfpatch"])
def test_a_prototype_has_one_color_in_the_whole_visualization(method, run, few, columns, tmp_path):
    run(method, "--data", "toy", "--steps", 1, "--evals", 1, "--out", tmp_path / "run")
    known = F.pad(0.2 + torch.arange(256) * 0.618 % 0.8, (1, 0))             # 0: not masked

    def colors(image):                                                       # (n, 3, h, w)
        return {tuple(pixel) for pixel in image.movedim(1, -1).flatten(0, 2).tolist()}

    for title in ("teacher", "student"):
        used = colors(columns[title])
        assert len(used) > 1 and used <= colors(visualize.heat_map(known[None, None]))


@pytest.mark.slow
@pytest.mark.parametrize("method, name, sentence", [
    ("mae", "forward", "still flat in every patch"),
    ("asl", "forward", "still flat in every patch"),
    ("simmim", "forward", "no better than the mean color"),
    ("beit", "token_loss", "no better than by their frequencies"),
    ("cae", "token_loss", "no better than by their frequencies")])
@pytest.mark.parametrize("learned", [True, False])
def test_a_network_that_learned_nothing_gives_a_warning(
        method, name, sentence, learned, run, few, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(method)
    if name == "token_loss":                   # the entropy of 16 tokens is 2.77 at most
        monkeypatch.setattr(module, name, lambda logits, *_: (
            0 * logits.sum() + (0.5 if learned else 2.78)))
    else:
        forward = module.Network.forward

        def answer(net, x, *given):
            found = forward(net, x, *given)
            if method == "simmim":
                return 0 * found + (x if learned else 5)
            right = module.targets(x, 4, True) * learned
            return *(torch.cat([0 * z[:, :z.shape[1] - 16], right + 0 * z[:, -16:]], 1)
                     for z in found[:-1]), found[-1]

        monkeypatch.setattr(module.Network, "forward", answer)
    run(method, "--data", "toy", "--steps", 1, "--evals", 1, "--out", tmp_path / "run")
    assert (sentence in capsys.readouterr().out) != learned


# ---- what a run saves ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [
    pytest.param(method, marks=[pytest.mark.slow] * (method not in HEADS)) for method in METHODS])
def test_the_evaluated_network_is_saved_with_its_own_heads(
        method, run, few, tmp_path, monkeypatch):
    """Of two networks the same one, in kNN, encoder.pt and its heads."""
    looked, resizes = [], []

    def evaluate(run, encoder, bank, queries, interpolation="bicubic"):
        looked.append({key: x.clone() for key, x in encoder.state_dict().items()})
        resizes.append(interpolation)
        return {}

    monkeypatch.setattr(visualize, "evaluate", evaluate)
    run(method, "--out", tmp_path, "--steps", 1, "--evals", 1, "--lr", 0.1)
    net = checkpoints.load_encoder(tmp_path / "encoder.pt", quiet=True)
    own = torch.load(tmp_path / "last.pt")["state"]
    own = own["teacher"] if net.source.branch == "teacher" else own.get("student") or own["model"]
    assert (net.source.branch == "teacher") == (method in ("dino", "ibot", "mmc", "selfpatch"))
    assert net.source.method == method and len(looked) == 1
    for key, x in net.state_dict().items():
        assert torch.equal(x, looked[0][key]), key
        assert torch.equal(x, own.get(f"backbone.{key}", own.get(f"encoder.{key}"))), key
    assert net.source.heads.keys() == HEADS.get(method, {}).keys()
    for name, head in net.source.heads.items():
        for key, x in head.items():
            assert torch.equal(x, own[f"{HEADS[method][name]}.{key}"]), (name, key)
    assert [net.source.interpolation] == resizes == [
        "bilinear" if method in ("moco_v3", "moby") else "bicubic"]


def test_a_resumed_run_uses_the_current_weight_decay(run, few, tmp_path):
    for steps, resumed in ((1, []), (2, ["--resume", "--weight-decay", 0.3])):
        run("simmim", "--out", tmp_path, "--steps", steps, *resumed)
    groups = torch.load(tmp_path / "last.pt")["state"]["opt"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0]


def test_resuming_a_complete_run_changes_nothing_and_says_so(run, few, tmp_path, capsys):
    run("mae", "--out", tmp_path, "--steps", 1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    run("mae", "--out", tmp_path, "--steps", 1, "--resume", "--lr", 0.3)
    assert "already complete (1 of 1 steps)" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    run("mae", "--out", tmp_path, "--resume", "--lr", 0.3, "--steps", 2)             # control
    assert "lr: 0.3" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("method", ["dino", "ibot", "selfpatch"])
def test_a_figure_of_micro_batches_of_few_images(method, run, few, tmp_path):
    """The figure shows up to 8 images of the last micro-batch, which has 4."""
    run(method, "--out", tmp_path, "--steps", 1, "--evals", 1, "--accum-iter", 4,
        "--use-bn-in-head", "false")
    rows = Image.open(tmp_path / "visualization.png").height - 16            # 16 px: the titles
    assert rows == 4 * (16 + 4) * 6                      # 4 images of 16 px, enlarged 6 times


# ---- the same run, in other ways -----------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("method, settings", [
    *((method, {}) for method in METHODS),
    # with a lower momentum or temperature, more of the noise in the projector's last bias would
    # enter the keys
    ("selfpatch", dict(PUBLISHED, base="moby", local_crops_number=0)),
    ("moby", SWIN | PUBLISHED),
    ("selfpatch", dict(SWIN | PUBLISHED, base="moby", num_positives=2))])
def test_a_run_is_the_same_in_two_processes_after_a_kill_and_in_micro_batches(
        method, settings, run, tmp_path, torchrun, monkeypatch):
    """Loss parts, gradient norm and all weights after five steps; another seed is the control."""
    names = "whole", "two", "killed", "other", "micro", "plain"
    whole, two, killed, other, micro, plain = (tmp_path / name for name in names)
    both = ["--accum-iter", 2] * (method == "mae")        # of one method both at once
    command = [*torchrun, f"{method}.py", *flags(method, "--out", two, *both, **settings)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    run(method, "--out", whole, **settings)
    run(method, "--out", other, "--seed", 1, **settings)

    save = Run.save
    with monkeypatch.context() as patch:

        def save_and_die(self):
            save(self)
            if self.step == 2:
                raise Killed

        patch.setattr(Run, "save", save_and_die)
        with pytest.raises(Killed):
            run(method, "--out", killed, **settings)
    run(method, "--out", killed, "--resume", **settings)
    assert (killed / "encoder.pt").read_bytes() == (whole / "encoder.pt").read_bytes()
    assert records(killed) == records(whole) and len(records(whole)) == 5

    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    for one, both in zip(records(whole), records(two), strict=True):
        assert one.keys() == both.keys()
        for key in one:
            rel = 1e-4 if key == "grad_norm" else 1e-5    # batch norms magnify rounding: see OWN
            assert both[key] == pytest.approx(one[key], rel=rel, abs=1e-7), (key, one["step"])
    assert apart(two, whole) < 1e-5
    assert apart(other, whole) > 1e-2

    def in_micro_batches(whole, **more):
        run(method, "--out", micro, "--accum-iter", 2, **settings, **more)
        assert apart(micro, whole) < 1e-5

    sentence = dict(
        hybrid="the hybrid contrasts", mmc="MMC contrasts", moco_v3="MoCo v3 contrasts",
        moby="MoBY's batch norms",
        **dict.fromkeys(("dino", "ibot", "selfpatch"), "or --use-bn-in-head false")).get(method)
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            in_micro_batches(whole)
    else:
        in_micro_batches(whole)
    if method in ("dino", "ibot", "selfpatch") and not settings:  # without batch norms: exact
        run(method, "--out", plain, use_bn_in_head=False)
        in_micro_batches(plain, use_bn_in_head=False)


@pytest.mark.slow
@pytest.mark.parametrize("method, name, std", [
    ("mae", "Network", 0.02), ("asl", "Network", 0.02), ("simmim", "Network", 0.0108),
    ("hybrid", "Network", 0.0108), ("beit", "Network", 0.0108), ("cae", "Network", 0.0108)])
def test_mask_tokens_are_initialized_as_published(method, name, std):
    module, drawn = importlib.import_module(method), []       # 0.0108: 0.02, truncated at 1 sigma
    less = dict(depth=1, decoder_depth=1, regressor_depth=1, mlp_dim=16)
    cfg = module.Config(**{k: v for k, v in less.items() if k in config.fields(module.Config)})
    for seed in range(4):
        torch.manual_seed(seed)
        net = getattr(module, name)(cfg, *[16] * (method in ("beit", "cae")))
        drawn += [x for key, x in net.named_parameters() if key.endswith("mask_token")]
    assert len(drawn) == 4 and torch.cat(drawn).std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_positions_are_resized_by_the_rule_of_the_published_backbone(method):
    """DINO's rule for its family, by the size for all others; MMC's is our choice."""
    module = importlib.import_module(method)
    cfg = config.parse(module.Config, flags(method))
    net = module.Network(cfg, *[16] * (method in ("beit", "cae")))
    encoder = next(part for part in net.modules() if isinstance(part, vit.ViT))
    by_dino = method in ("dino", "ibot", "selfpatch", "mmc")
    assert encoder.config["resize"] == ("dino" if by_dino else "size")


@pytest.mark.parametrize("method, name", [("beit", "Network"), ("cae", "Network"),
                                          ("hybrid", "Network"), ("simmim", "Network")])
def test_layer_scale_0_is_no_layer_scale(method, name):
    module = importlib.import_module(method)
    vocabulary = [16] * (method in ("beit", "cae"))
    for scale in (0, 0.1):
        cfg = config.parse(module.Config, flags(method, layer_scale=scale))
        net = getattr(module, name)(cfg, *vocabulary)
        names = [key for key, _ in net.named_parameters()]
        assert any(".ls2." in key for key in names) == (scale > 0)


@pytest.mark.parametrize("method", ["beit", "cae"])
def test_impossible_settings_are_refused_before_a_tokenizer_is_trained(
        method, run, few, tmp_path, monkeypatch):
    def trained(*_):
        raise AssertionError("too late")

    monkeypatch.setattr(tokenizer, "train_tokenizer", trained)
    for sentence, more, settings in (
            ("must be a multiple of --num-heads 3", [], dict(num_heads=3)),
            ("must be a multiple of --patch-size", [], dict(img_size=18)),
            ("nothing to resume", ["--resume"], {})):
        with pytest.raises(ValueError, match=sentence):
            run(method, "--out", tmp_path, *more, **settings)
    module, before = importlib.import_module(method), torch.get_rng_state()
    with torch.device("meta"):                # which draws no random number: weights stay the same
        module.Network(config.parse(module.Config, flags(method)), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_changes_nothing_that_is_saved(method, run, few, tmp_path):
    looked, not_looked = (tmp_path / name for name in ("looked", "not_looked"))
    for out, times in ((looked, 2), (not_looked, 0)):
        run(method, "--data", "toy", "--steps", 2, "--evals", times, "--out", out)
    net = checkpoints.load_encoder(looked / "encoder.pt", quiet=True)
    by_class_token = ["knn"] * net.num_prefix
    for line in records(looked):
        assert {"knn_patch", "feat_std", *by_class_token} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
    assert (looked / "visualization.png").exists()
    assert not (not_looked / "visualization.png").exists()
    one, other = (torch.load(out / "last.pt")["state"] for out in (looked, not_looked))
    for name in one.keys() - {"opt", "tokenizer"}:                           # also running means
        assert one[name].keys() == other[name].keys()
        assert all(torch.equal(x, other[name][key]) for key, x in one[name].items()), name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_user_errors_are_one_sentence(method, run, tmp_path):
    def refused(sentence, *more, **settings):
        with pytest.raises(ValueError, match=sentence) as error:
            run(method, *more, **settings)
        assert "\n" not in str(error.value)

    refused("--patch-size must be 1 or more", patch_size=0)
    refused("nothing to resume", "--resume", "--out", tmp_path / "none")
    refused("not finite", "--out", tmp_path / "lr", "--lr", 1e30, clip_grad=0)
    assert math.isfinite(records(tmp_path / "lr")[-1]["loss"])
    run(method, "--steps", 1, "--out", tmp_path / "run")
    refused("does not fit .settings: .*--embed-dim 32, not 16", "--out", tmp_path / "run",
            "--resume", embed_dim=32)
    saved = torch.load(tmp_path / "run" / "last.pt")
    torch.save({**saved, "method": "other"}, tmp_path / "run" / "last.pt")
    refused(f"is of method other, not {method}", "--out", tmp_path / "run", "--resume")
