"""ASL against its equations and against MAE, which it contains, with negative controls."""
import inspect
import signal
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import asl
import mae
import vit
from lib import checkpoints, config, rng, visualize
from lib.run import Run, param_groups, set_lr

SMALL = ("--img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 3 --decoder-embed-dim "
         "16 --decoder-depth 2 --decoder-num-heads 2").split()


def network(*flags, method=asl, seed=0):
    torch.manual_seed(seed)
    return method.Network(config.parse(method.Config, [*SMALL, *flags]))


def batch(B=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, 32, 32, generator=g), torch.rand(B, 16, generator=g)


def outputs(net, drop=None):
    """a, b, target, mask of a batch."""
    x, noise = batch()
    a, b, mask = net(x, noise, drop)
    return a, b, asl.targets(x, 8, True), mask


def gradients(net, loss):
    """{name: gradient, or None if the loss does not depend on it} of the trained parameters."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
    return dict(zip(named, found))


def patches(seed=0):
    """Two random predictions (B, N, P) and a random mask (B, N)."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 16, 192, generator=g)
    return a, b, torch.rand(3, 16, generator=g) < 0.75


# ---- the loss ------------------------------------------------------------------------------------


def test_L_SEM_is_twice_the_mean_absolute_difference_over_the_removed_patches():
    a, b, mask = patches()
    expected = sum((a[n, i] - b[n, i]).abs().mean() for n, i in mask.nonzero()) / mask.sum()
    assert asl.sem_loss(a, b, mask).item() == pytest.approx(2 * expected.item(), rel=1e-5)
    assert asl.sem_loss(a, a + 0.3, mask).item() == pytest.approx(0.6, rel=1e-4)
    assert asl.sem_loss(a, a, mask) == 0


def test_gradient_of_L_SEM_equals_that_without_stop_gradients():
    a, b, mask = patches()
    a, b = a.requires_grad_(), b.requires_grad_()
    found = torch.autograd.grad(asl.sem_loss(a, b, mask), (a, b))
    expected = torch.autograd.grad(asl.masked_mean((a - b).abs().mean(-1), mask), (a, b))
    for g, h in zip(found, expected):
        assert torch.equal(g, h)
        assert (g[~mask] == 0).all() and (g[mask] != 0).all()          # visible patches: 0


def test_L_SEM_ignores_visible_patches():
    a, b, mask = patches()
    other = torch.where(mask[:, :, None], b, torch.randn_like(b))
    assert asl.sem_loss(a, b, mask) == asl.sem_loss(a, other, mask) != asl.sem_loss(a, b, ~mask)


def test_cosine_alignment_is_independent_of_scale_and_L1_is_not():
    a, b, mask = patches()
    scaled = asl.sem_loss(a, 3 * b, mask, use_cosine=True)
    assert torch.allclose(asl.sem_loss(a, b, mask, use_cosine=True), scaled)
    assert not torch.allclose(asl.sem_loss(a, b, mask), asl.sem_loss(a, 3 * b, mask))
    assert asl.sem_loss(a, 2 * a, mask, use_cosine=True).abs() < 1e-6
    assert asl.sem_loss(a, -a, mask, use_cosine=True).item() == pytest.approx(4)


def test_cosine_alignment_is_of_patches_and_class_token():
    a, b, mask = patches()
    target, one = torch.zeros_like(a[:, 1:]), torch.ones_like(mask[:, :1])
    loss_sem = asl.asl_losses(a, b, target, mask[:, 1:], use_cosine=True, align_cls=True)[1]
    parts = [asl.sem_loss(a[:, i], b[:, i], m, use_cosine=True)
             for i, m in ((slice(1, None), mask[:, 1:]), (slice(0, 1), one))]
    assert torch.allclose(loss_sem, sum(parts))


# ---- MAE inside ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "random_masking", "Decoder", "patchify", "patch_stats", "targets", "masked_mean", "mae_loss"])
def test_code_repeated_from_mae_is_identical(name):
    assert inspect.getsource(getattr(asl, name)) == inspect.getsource(getattr(mae, name))


def test_first_version_is_mae_and_with_an_identity_block_the_second_one_equals_it():
    ours, theirs = network(), network(method=mae)                      # equal weights; T is last
    x, noise = batch()
    pred, mask = theirs(x, noise)
    a, b, same = ours(x, noise)
    assert a.shape == b.shape == (3, 17, 192) and torch.equal(mask, same)
    assert torch.allclose(a[:, 1:], pred, atol=1e-6)
    assert not torch.allclose(a, b, atol=1e-2)
    ours.aug_block = nn.Identity()
    a, b, target, mask = outputs(ours)
    loss_mae, loss_sem = asl.asl_losses(a, b, target, mask)
    assert torch.allclose(a, b, atol=1e-6) and loss_sem < 1e-6
    assert loss_mae.item() == pytest.approx(mae.mae_loss(pred, target, mask).item(), rel=1e-6)


def test_weights_are_those_of_mae_and_of_the_block():
    def names(net):
        return set(checkpoints.mae_names(net)), {name for name, _ in net.named_buffers()}

    (ours, buffers), (theirs, same) = names(network()), names(network(method=mae))
    assert buffers == same
    extra = {f"aug_block.{name}" for name in vit.Block(8, 2).state_dict()}
    assert ours == theirs | extra and len(extra) == 12
    assert names(network("--dle")) == names(network(method=mae))


# ---- where gradients go --------------------------------------------------------------------------


def test_each_term_of_L_SEM_has_a_gradient_to_one_side_only():
    net = network()
    a, b, _, mask = outputs(net)
    to_a = gradients(net, asl.sem_loss(a[:, 1:], b[:, 1:].detach(), mask))
    assert all(g is None or (g == 0).all() for name, g in to_a.items() if "aug_block" in name)
    assert to_a["encoder.norm.weight"].abs().sum() > 0
    to_b = asl.sem_loss(a[:, 1:].detach(), b[:, 1:], mask)
    assert gradients(net, to_b)["aug_block.norm1.weight"].abs().sum() > 0
    from_a, = torch.autograd.grad(to_b, a, allow_unused=True, retain_graph=True)
    assert from_a is None or (from_a == 0).all()
    net.aug_block = StopGradient()                     # cuts the only path from b to the encoder
    a, b, _, mask = outputs(net)
    found = gradients(net, asl.sem_loss(a[:, 1:].detach(), b[:, 1:] + 1, mask))
    assert found["encoder.norm.weight"] is None or (found["encoder.norm.weight"] == 0).all()
    assert found["decoder.pred.weight"].abs().sum() > 0


class StopGradient(nn.Module):
    def forward(self, x):
        return x.detach()


def test_block_is_initialized_as_the_blocks_of_mae():
    for name, p in network().aug_block.named_parameters():
        if p.ndim == 1:
            assert (p == float("norm" in name and name.endswith("weight"))).all(), name
        else:
            bound = (6 / sum(p.shape))**0.5                            # q, k, v: one matrix
            assert 0.97 * bound < p.abs().max() <= bound * (1 + 1e-6), name


def test_block_gets_a_gradient_from_L_SEM_only_without_mae_both():
    net = network()
    found = outputs(net)

    def total(part, **how):
        grads = gradients(net, asl.asl_losses(*found, **how)[part])
        return sum(0 if g is None else g.abs().sum().item()
                   for name, g in grads.items() if name.startswith("aug_block"))

    assert total(0) == 0 < total(1)
    assert total(0, mae_both=True) > 0


def test_mae_both_is_the_mean_of_both_versions():
    a, b, target, mask = outputs(network())
    both = asl.asl_losses(a, b, target, mask, mae_both=True)[0]
    first, second = (asl.asl_losses(x, x, target, mask)[0] for x in (a, b))
    assert torch.allclose(both, (first + second) / 2) and not torch.allclose(first, second)


@pytest.mark.parametrize("align_cls", [False, True])
def test_class_token_has_a_loss_with_align_cls_only(align_cls):
    a, b, target, mask = outputs(network())
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    loss_mae, loss_sem = asl.asl_losses(a, b, target, mask, align_cls=align_cls, mae_both=True)
    for g in torch.autograd.grad(loss_mae + loss_sem, (a, b)):
        assert (g[:, 0] != 0).any() == align_cls
    plain = asl.sem_loss(a[:, 1:], b[:, 1:], mask)
    extra = 2 * (a[:, 0] - b[:, 0]).abs().mean() if align_cls else 0
    assert torch.allclose(loss_sem, plain + extra)


def test_removed_pixels_affect_L_MAE_only():
    net, (x, noise) = network(), batch()
    mask = asl.random_masking(noise, 0.75)[2]
    removed = visualize.fill_patches(torch.zeros(len(x), 16, 192), mask, 1).bool()
    other = torch.where(removed, torch.randn_like(x), x)
    (mae1, sem1), (mae2, sem2) = (
        asl.asl_losses(*net(z, noise)[:2], asl.targets(z, 8, True), mask) for z in (x, other))
    assert sem1 == sem2 and mae1 != mae2
    a, b, _ = net(torch.where(removed, x, torch.randn_like(x)), noise)     # negative control
    assert asl.sem_loss(a[:, 1:], b[:, 1:], mask) != sem1


# ---- the second version --------------------------------------------------------------------------


def test_dle_gives_two_versions_and_without_dropout_both_are_mae():
    net, drop = network("--dle"), torch.rand(3, 2, 5, 24)
    x, noise = batch()
    a, b, _ = net(x, noise)
    assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(a[:, 1:], network(method=mae)(x, noise)[0], atol=1e-6)
    first, second, _ = net(x, noise, drop)
    assert not torch.allclose(first, second, atol=1e-2) and not torch.allclose(first, a, atol=1e-2)
    swapped = net(x, noise, drop.flip(1))
    assert torch.allclose(swapped[0], second, atol=1e-6)
    equal = net(x, noise, drop[:, :1].expand(-1, 2, -1, -1))           # the same dropout twice
    assert torch.allclose(equal[0], equal[1], atol=1e-6)


def test_dropout_has_its_rate_and_keeps_the_mean(monkeypatch):
    net, inputs = network("--dle", "--dropout", "0.25"), []
    embed = net.encoder.embed
    monkeypatch.setattr(net.encoder, "embed", lambda *args: (torch.ones_like(embed(*args)[0]), 0))
    net.encoder.blocks[0].register_forward_hook(lambda module, x, y: inputs.append(x[0]))
    x, noise = batch(64)
    net(x, noise, torch.rand(64, 2, 5, 24))
    tokens, = inputs
    assert tokens.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (tokens == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(tokens[:64], tokens[64:])


@pytest.mark.parametrize("dle, cost", [("false", 1.59), ("true", 2.0)])
def test_flops_of_vit_b_relative_to_mae_are_the_papers(dle, cost):
    def flops(method, *flags):
        cfg = config.parse(method.Config, ["--data", "imagenet", *flags])
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            method.Network(cfg)(torch.empty(1, 3, 224, 224), torch.empty(1, 196))
        return counter.get_total_flops()

    base = flops(mae)
    assert base / 2e9 == pytest.approx(4.3 + 5.4, abs=0.2)             # multiply-adds
    assert flops(asl, "--dle", dle) / base == pytest.approx(cost, abs=0.02)


# ---- the run -------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """run(out, *flags): one step in this process, whose signal handlers stay unchanged."""
    def main(out, *flags):
        monkeypatch.setattr(sys, "argv", [
            "asl.py", *SMALL, "--data", "synthetic", "--steps", "1", "--batch-size", "8",
            "--device", "cpu", "--out", str(out), *flags])
        asl.main()

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return main


@pytest.mark.parametrize("flags", [
    "", "--dle", "--cosine", "--lambda-sem 0.5 --align-cls --mae-both"])
def test_steps_of_a_run_equal_those_written_out(flags, run, tmp_path, monkeypatch):
    """Two steps: mask and dropout by seed, epoch and image; eq. 11; AdamW."""
    parts, micro_batches = [], Run.micro_batches

    def spy(self, batch):
        for part in micro_batches(self, batch):
            parts.append(part)
            yield part

    monkeypatch.setattr(Run, "micro_batches", spy)
    run(tmp_path, *"--steps 2 --warmup-epochs 0 --lr 0.3 --precision fp32 --evals 0".split(),
        *flags.split())
    net, ablation = network(*flags.split()), "--lambda-sem" in flags
    opt = torch.optim.AdamW(param_groups(net, 0.05), betas=(0.9, 0.95))
    for part, factor in zip(parts, (1, 0.5), strict=True):
        set_lr(opt, factor * 0.3 * 8 / 256)
        noise, drop = (rng.uniform(part.index, shape, 0, part.epoch, what)
                       for shape, what in ((16, "mask"), ((2, 5, 24), "dropout")))
        a, b, mask = net(part.views[0], noise, drop)
        target = asl.targets(part.views[0], 8, True)
        loss_mae, loss_sem = asl.asl_losses(a, b, target, mask, use_cosine="--cosine" in flags,
                                            align_cls=ablation, mae_both=ablation)
        opt.zero_grad()
        (loss_mae + (0.5 if ablation else 1) * loss_sem).backward()
        opt.step()
    found = torch.load(tmp_path / "last.pt", weights_only=True)["state"]["model"]
    for name, x in net.state_dict().items():
        if not name.endswith("qkv.bias"):                              # key bias: rounding noise
            assert (found[name] - x).norm() < 1e-4 * x.norm(), name


def test_block_is_in_full_pt_and_not_in_encoder_pt(run, tmp_path):
    run(tmp_path)
    encoder, full = (checkpoints.load_encoder(tmp_path / name, quiet=True)
                     for name in ("encoder.pt", "full.pt"))
    raw = checkpoints.read_file(tmp_path / "encoder.pt")
    assert not any("aug_block" in name for name in raw["model"])
    assert set(full.source.heads) == {"decoder", "aug_block"} and full.source.method == "asl"
    x = batch()[0]
    assert torch.equal(encoder(x), full(x))
    vit.Block(24, 3).load_state_dict(full.source.heads["aug_block"])


@pytest.mark.parametrize("flags, warns", [                # a dropout rate of 1e-9 drops nothing
    ("--dropout 0.75", False), ("--dropout 1e-9", True),
    ("--dropout 1e-9 --lambda-sem 0 --mae-both", False)])
def test_equal_predictions_get_a_warning_if_they_are_aligned(
        flags, warns, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "evaluate", lambda *_: {})
    monkeypatch.setattr(asl, "save_visualization", lambda *_: None)
    run(tmp_path, "--dle", *flags.split())
    assert ("the two predictions are nearly identical" in capsys.readouterr().out) == warns


@pytest.mark.parametrize("flags, sentence", [
    ("--dle --dropout 0", "must be above 0 and below 1"),
    ("--dle --dropout 1", "must be above 0 and below 1"),
    ("--lambda-sem 0", "the second version has no loss"),
    ("--mask-ratio 1", "at least one must be removed"),
    ("--decoder-depth 0", "must be 1 or more"),      # patches could not depend on each other
])
def test_impossible_settings_are_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        network(*flags.split())


def test_settings_are_those_of_mae_where_the_paper_states_no_others():
    for name in ("toy", "cifar10", "imagenet100", "coco"):
        ours, theirs = (config.parse(method.Config, ["--data", name]) for method in (asl, mae))
        epochs = 16 if name == "toy" else theirs.epochs                 # as long as MAE's run
        assert {k: v for k, v in vars(ours).items() if k in vars(theirs)} == {
            **vars(theirs), "method": "asl", "out": f"out/asl-{name}", "origin": ours.origin,
            "epochs": epochs, "sections": ours.sections}
    cfg = config.parse(asl.Config, ["--data", "imagenet"])
    assert (cfg.lambda_sem, cfg.dle, cfg.align_cls, cfg.mae_both, cfg.norm_pix_loss) == (
        1.0, False, False, False, True)
