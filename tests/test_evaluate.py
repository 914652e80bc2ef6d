"""Probes: features against one-by-one forwards, training against torch.optim, crops against
hand-made pictures, and the command line as a user meets it."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import vit
from lib import augment, checkpoints, config, datasets, distributed, metrics, rng, toy
from probes import annotations

ROOT = Path(evaluate.__file__).parent
SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=5, num_heads=2)


def model(**config):
    torch.manual_seed(0)
    encoder = vit.ViT(**{**SMALL, **config}).eval()
    return SimpleNamespace(name="small", encoder=encoder, size=32, mean=augment.MEAN, std=augment.STD,
                           interpolation="bicubic")


def settings(*flags):
    args = evaluate.parse([*flags, "--device", "cpu", "--precision", "fp32", "--workers", "0"])
    args.data = args.data or "toy"
    return args


def checkpoint(folder, name, mtime, **info):
    """A run's folder with an encoder of random weights, written at a given time."""
    (folder / name).mkdir(parents=True)
    path = folder / name / "encoder.pt"
    info = {"method": name, "data": "toy", "branch": "teacher", **info}
    checkpoints.save_encoder(path, model().encoder, **info)
    os.utime(path, (mtime, mtime))
    return path


def run(tmp_path, *flags):
    """What `python evaluate.py --limit 30 ...` appends to its JSON file."""
    evaluate.main(["--limit", "30", "--device", "cpu", "--out", str(tmp_path), *flags])
    return [json.loads(line) for file in tmp_path.rglob("*.jsonl") for line in file.open()]


def message(capsys, *flags):
    """The one line that a mistake earns on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(list(flags)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ---- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False])
def test_features_equal_one_forward_per_image_in_the_order_of_the_labels(class_token):
    m, args = model(class_token=class_token), settings("--limit", "9", "--batch-size", "4")
    found, labels, classes = evaluate.features(m, args, "test")
    drawn = toy.draw(torch.arange(9), "test", 32)
    assert labels.tolist() == drawn["label"].tolist() and classes == len(toy.CLASSES)
    for i in range(9):
        x = augment.normalize(drawn["image"][i:i + 1].float() / 255, augment.MEAN, augment.STD)
        tokens = m.encoder(x)[0].detach()
        pat = tokens[int(class_token):].mean(0)
        cls = tokens[0] if class_token else pat
        assert torch.allclose(found["cls"][i], cls, atol=1e-5)
        assert torch.allclose(found["pat"][i], pat, atol=1e-5)
        halves = torch.cat([cls / cls.norm(), pat / pat.norm()])
        assert torch.allclose(found["hyber"][i], halves, atol=1e-5)
    assert not torch.allclose(found["pat"][0], found["pat"][1], atol=1e-3)     # they do differ


def test_the_mirror_image_stands_beside_its_picture():
    m, args = model(), settings("--limit", "10", "--batch-size", "4")
    both, labels, _ = evaluate.features(m, args, "test", ["cls"], mirror=True)
    plain, same, _ = evaluate.features(m, args, "test", ["cls"])
    x = augment.normalize(toy.draw(torch.arange(10), "test", 32)["image"].float() / 255)
    mirrored = m.encoder(x.flip(-1))[:, 0].detach()
    assert torch.allclose(both["cls"][:, 0], plain["cls"], atol=1e-5) and labels.equal(same)
    assert torch.allclose(both["cls"][:, 1], mirrored, atol=1e-5)


def test_dino_probes_see_four_blocks_of_a_narrow_and_two_parts_of_a_wide_model():
    x = torch.randn(2, 3, 32, 32)
    m = model().encoder
    found = evaluate.last_blocks(m, x)["4 x cls"]
    hidden = []
    hooks = [block.register_forward_hook(lambda *a: hidden.append(a[2])) for block in m.blocks]
    m(x)
    [hook.remove() for hook in hooks]
    assert torch.allclose(found, torch.cat([m.norm(h)[:, 0] for h in hidden[-4:]], 1), atol=1e-5)
    wide = model(embed_dim=768, depth=1, num_heads=2).encoder
    tokens = wide(x)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    assert torch.allclose(evaluate.last_blocks(wide, x)["cls+pat"], expected, atol=1e-5)


def test_hyber_is_scaled_by_halves_or_jointly():
    x = torch.randn(3, 3, 32, 32)
    encoder = model().encoder.requires_grad_(False)
    z = evaluate.pooled(encoder, x)
    for flags, ratio in (([], torch.ones(3)),                                # halves of length 1
                         (["--hyber-norm", "joint"], z["cls"].norm(dim=1) / z["pat"].norm(dim=1))):
        names, tokens = evaluate.wanted(settings(*flags), "cls", "hyber")
        found = tokens(encoder, x)
        cls, pat = found["hyber"].split(16, 1)
        assert torch.allclose(cls.norm(dim=1) / pat.norm(dim=1), ratio) and "hyber" in names
        assert torch.allclose(F.normalize(cls), F.normalize(z["cls"]), atol=1e-6)
        assert torch.allclose(F.normalize(pat), F.normalize(z["pat"]), atol=1e-6)
        assert found["cls"].equal(z["cls"])
    assert (ratio - 1).abs().min() > 0.1 and torch.allclose(found["hyber"].norm(dim=1),
                                                            torch.ones(3))


def test_not_finite_features_are_an_error_and_not_a_number():
    m = model()
    m.encoder.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="small: its features are not finite"):
        evaluate.features(m, settings("--limit", "4"), "test")


def test_a_folder_without_splits_gives_every_fifth_image_to_the_test(tmp_path, capsys):
    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        picture = torch.full((40, 40, 3), 10 * i, dtype=torch.uint8).numpy()
        Image.fromarray(picture).save(tmp_path / "ab"[i % 2] / f"{i:02}.png")
    args = settings("--data", str(tmp_path))
    assert evaluate.squares(model(), args)
    train, y, _ = evaluate.features(model(), args, "train", ["pat"])
    test, truth, _ = evaluate.features(model(), args, "test", ["pat"])
    assert (len(y), len(truth)) == (16, 4) and truth.tolist() == [0, 0, 1, 1]
    assert torch.cdist(test["pat"], train["pat"]).min() > 1e-4            # nobody is in both
    said = capsys.readouterr().err.splitlines()          # each once, and of nothing else
    assert [line.split(": ")[2] for line in said] == [
        "for probes 4 of its 20 images are test", "for probes 16 of its 20 images are train"]
    args.limit = 3                                                        # of each, evenly spread
    few, _, _ = evaluate.features(model(), args, "train", ["pat"])
    torch.testing.assert_close(few["pat"], train["pat"][[0, 5, 10]])
    few, _, _ = evaluate.features(model(), args, "test", ["pat"])
    torch.testing.assert_close(few["pat"], test["pat"][[0, 1, 2]])


def test_other_classes_to_train_on_are_an_error_and_not_a_number(tmp_path, monkeypatch, capsys):
    for i, folder in enumerate(["train/a", "train/b", "train/c", "val/a", "val/c"]):
        (tmp_path / folder).mkdir(parents=True)
        for n in range(16):
            picture = torch.full((32, 32, 3), 40 * i + n, dtype=torch.uint8).numpy()
            Image.fromarray(picture).save(tmp_path / folder / f"{n}.png")
    flags = ["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--device", "cpu"]
    for task in ("knn", "linear", "layerwise", "attentive", "finetune"):
        error = message(capsys, "--task", task, *flags)
        assert f"other classes (3 and 2), and {task} needs the same ones in both" in error
    args = settings("--data", str(tmp_path), "--task", "few_shot")         # learns from neither
    assert evaluate.features(model(), args, "test", ["cls"])[2] == 2
    [path.rename(tmp_path / "val/a" / f"{path.stem}b.png") for path in tmp_path.glob("val/c/*")]
    (tmp_path / "val/c").rmdir()                         # a flat val, in the eyes of datasets.load_images
    evaluate.load.cache_clear()
    assert "has no labels" in message(capsys, "--task", "knn", *flags)


# ---- several processes ---------------------------------------------------------------------------


def test_processes_share_the_batches_and_touch_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    args, m = settings("--batch-size", "4"), model()
    drawn = toy.draw(torch.arange(26), "test", 32)["image"]
    crops = [(image, number) for number, image in enumerate(drawn)]
    paths = [tmp_path / f"{number}.png" for number in range(26)]
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own = [n for start in (0, 4, 8, 12, 16, 20, 24)[rank::3] for n in range(start, start + 4)
               if n < 26]
        whole, files = datasets.Images("x", "test", pixels=drawn), datasets.Images("x", "test", paths=paths)
        for n in own:
            Image.fromarray(drawn[n].permute(1, 2, 0).numpy()).save(paths[n])
        sources = [
            data.batches(whole, 32, 4, rank=rank, world=3),
            data.batches(files, 32, 4, rank=rank, world=3, resize=32, workers=0),
            evaluate.crop_batches(crops, m, args)]
        for source in sources:
            found = list(source)
            assert torch.cat([index for _, index in found]).tolist() == own
            x = augment.normalize(drawn[own].float() / 255)
            assert torch.allclose(torch.cat([x for x, _ in found]), x, atol=1e-6)
        [path.unlink() for path in paths if path.exists()]
        Image.new("RGB", (32, 32)).save(paths[rank])     # those of the others are not there
        some = list(evaluate.landmark_views(paths[:3], None, 32, m, args))
        assert [number.tolist() for _, number in some] == [[rank]]
    few = datasets.Images("x", "test", pixels=drawn[:4])
    assert list(data.batches(few, 32, 4, rank=1, world=3)) == []


def test_every_flag_is_of_all_tasks_or_of_some():
    for tasks in evaluate.READ_BY.values():
        assert set(tasks.split()) <= set(evaluate.TASKS)
    of_all = """task checkpoint baseline branch data data-root size limit out json seed device
                precision batch-size workers cache reference""".split()
    assert sorted([*of_all, *evaluate.READ_BY]) == sorted(evaluate.FLAGS)


TWO = """
import sys, torch, evaluate, training
from lib.metrics import report

def lone(model, args):
    "One batch: the second process has none."
    batches = evaluate.share([(torch.ones(3, 3, 64, 64), torch.arange(3))])
    found, numbers = evaluate.extract(model, batches, args, key="lone")
    return report({"cls": {"n": float(len(numbers))}}, "three")

def damaged(model, args):
    "Only the last process meets the bad file; all must say so, and go on."
    def batches():
        yield torch.ones(1, 3, 64, 64), torch.zeros(1)
        if distributed.rank() == distributed.world_size() - 1:
            raise ValueError("cannot read a.jpg")
    evaluate.extract(model, batches(), args)

def alone(model, args):
    "As a probe of dense.py: in the first process."
    assert distributed.rank() == 0
    return report({"patches": {"n": 1.0}}, "dense")

evaluate.TASKS |= {"lone": lone, "damaged": damaged, "alone": alone}
evaluate.DENSE["alone"] = alone
evaluate.FROZEN = sys.argv.pop(1).split(",")
config.main(lambda: evaluate.main(sys.argv[1:]))
"""


def asked(out, launch, tasks):
    """`evaluate.py --task all` of these tasks, among them those of TWO, so launched."""
    script = out.parent / "two.py"
    script.write_text(TWO)
    return subprocess.run(
        [*launch, str(script), tasks, "--task", "all", "--baseline", "untrained", "--limit", "50",
         "--batch-size", "12", "--epochs", "2", "--device", "cpu", "--workers", "0", "--out",
         str(out)],
        text=True, capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_two_processes_find_the_features_and_numbers_of_one(tmp_path, torchrun):
    for name, launch in (("1", [sys.executable]), ("2", torchrun)):
        done = asked(tmp_path / name, launch, "alone,knn,damaged,linear,part_retrieval,lone")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("no damaged: cannot read a.jpg") == 1
        assert done.stdout.count("untrained: knn") == 1
    one, two = ([json.loads(line) for line in open(tmp_path / n / "results.jsonl")] for n in "12")
    assert [line["task"] for line in two] == ["knn", "linear", "part_retrieval", "lone", "alone"]
    assert [line["metrics"] for line in two] == [line["metrics"] for line in one]
    kept = sorted((tmp_path / "1" / "features").iterdir())
    assert len(kept) == 5                                # of knn 2, linear 1 more, crops, lone
    for path in kept:
        a, b = (torch.load(tmp_path / n / "features" / path.name) for n in "12")
        assert a["numbers"].equal(b["numbers"]) and a["features"].keys() == b["features"].keys()
        assert all(z.equal(b["features"][name]) for name, z in a["features"].items())


@pytest.mark.slow
def test_what_the_first_process_alone_can_measure_is_no_error_of_the_others(tmp_path, torchrun):
    done = asked(tmp_path / "both", torchrun, "damaged,alone")
    assert done.returncode == 0, done.stderr
    [line] = (tmp_path / "both" / "results.jsonl").open()
    assert json.loads(line)["task"] == "alone" and "no damaged: cannot read a.jpg" in done.stdout
    done = asked(tmp_path / "none", torchrun, "damaged")  # nobody has anything: an error
    assert done.returncode and "error: untrained: no damaged: cannot read a.jpg" in done.stderr


# ---- linear --------------------------------------------------------------------------------------


def test_recipes_are_those_of_the_sheet():
    columns = ("lr", "batch", "epochs", "warmup", "lars", "standardise")
    assert {name: tuple(r[c] for c in columns) for name, r in evaluate.RECIPES.items()} == {
        "mae": (0.1, 16384, 90, 10, True, True), "dino": (1e-3, 1024, 100, 0, False, False),
        "park": (0.1, 1024, 50, 0, False, True), "park paper": (1, 1024, 50, 0, False, True),
        "cae": (pytest.approx(0.4 * 256 / 8192), 8192, 90, 10, False, False),
        "part": (pytest.approx(0.4 * 256 / 1024), 1024, 90, 0, False, False),
        "part attentive": (pytest.approx(0.04 * 256 / 1024), 1024, 90, 0, False, False)}
    more = {name: {key: r[key] for key in r.keys() - {*columns}}
            for name, r in evaluate.RECIPES.items()}
    assert more.pop("park paper") == dict(decay=0.05, literal=True) and not any(more.values())


@pytest.mark.parametrize("task, feature", [("linear", "cls"), ("frequency_noise", "pat"),
                                           ("shape_bias", "pat")])
def test_recipe_park_looks_at_the_patch_mean_and_is_that_of_its_paper(monkeypatch, task, feature):
    asked = []

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "labelled", lambda *_: (None, 1000))
    monkeypatch.setattr(annotations, "cue_conflict", stop if task != "shape_bias" else lambda _: None)
    monkeypatch.setattr(evaluate, "features", lambda m, a, split, names, *_, **__: (
        asked.append((a.recipe, names)) or stop()))
    expected = {"cls": ("mae", ["cls"]), "pat": ("park", ["pat"])}[feature]
    for flags, found in (([], expected), (["--recipe", "park"], ("park", ["pat"])),
                         (["--recipe", "park", "--feature", "cls"], ("park", ["cls"])),
                         (["--recipe", "mae"], ("mae", ["cls"]))):
        with pytest.raises(KeyboardInterrupt):
            evaluate.TASKS[task](model(), settings("--task", task, "--data", "imagenet", *flags))
        assert asked.pop() == found and not asked


def cloud(n=400, width=6, classes=3):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=g)
    return torch.randn(n, 2, width, generator=g) + 3 * torch.eye(width)[y][:, None], y


@pytest.mark.parametrize("task, flags", [("linear", ["--recipe", "park"]), ("layerwise", []),
                                         ("attentive", [])])
def test_classifiers_learn_from_train_and_are_scored_on_test(monkeypatch, task, flags):
    """Every fourth test image looks like another class: 75 % are right, of train's all."""
    labels = {"train": torch.arange(64) % 4, "test": torch.arange(48) % 4}
    looks = labels | {"test": torch.where(torch.arange(48) // 4 % 4 == 0, 3 - labels["test"],
                                          labels["test"])}

    def answer(model, args, split, names, *_, mirror=False):
        z = torch.eye(16)[looks[split]]
        z = z[:, None].expand(-1, 3, -1) if names == ["tokens"] else z
        return {name: torch.stack([z, z], 1) if mirror else z for name in names}, labels[split], 4

    monkeypatch.setattr(evaluate, "features", answer)
    args = settings("--task", task, "--limit", "4", "--epochs", "2", *flags)
    result = evaluate.TASKS[task](model(depth=2), args)
    assert len(result.rows) == (2 if task == "layerwise" else 1)          # every block
    assert all((row["top-1"], row["last epoch"]) == (75, 75) for row in result.rows.values())
    assert result.images == {"train": 64, "test": 48}


@pytest.mark.parametrize("paper", [False, True])
def test_a_head_trains_as_torch_optim_would(monkeypatch, paper):
    (x, y), epochs = cloud(), 7
    recipe = dict(evaluate.RECIPES["dino"], lr=0.5, warmup=20)            # 20 of 100 epochs
    if paper:                                                             # lr 1, decay 0.05
        recipe = dict(evaluate.RECIPES["park paper"], warmup=10)          # 10 of 50 epochs
    else:
        monkeypatch.setattr(evaluate, "SWEEP", (1.0,))
    _, last, lr, _ = evaluate.train_heads(x, y, 3, recipe, epochs, seed=3)
    weight, bias = (p[0].squeeze(1) for p in last.params)

    g = rng.generator(3, "linear")                                        # the same draws, in order
    train = torch.randperm(400, generator=g)[40:]
    head = torch.nn.Linear(6, 3)
    head.weight.data, head.bias.data = 0.01 * torch.randn(3, 6, generator=g), torch.zeros(3)
    opt = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05 * paper)
    peak = 1.0 if paper else 0.5 * (360 // 32) / 256
    step, batch = 0, 360 // 32
    total = epochs * -(-360 // batch)
    warm = total * 20 // 100
    for _ in range(epochs):
        for index in train[torch.randperm(360, generator=g)].split(batch):
            view = torch.randint(2, (len(index),), generator=g)
            angle = torch.tensor((step - warm) / (total - warm) * torch.pi)
            factor = step / warm if step < warm else (1 + angle.cos().item()) / 2
            # torch keeps the momentum without lr, as train_heads does: a changing lr is exact
            opt.param_groups[0]["lr"] = peak * factor
            opt.zero_grad()
            F.cross_entropy(head(x[index, view]), y[index]).backward()
            opt.step()
            step += 1
    assert lr == (1.0 if paper else 0.5)
    assert torch.allclose(weight, head.weight, atol=1e-5)
    assert torch.allclose(bias, head.bias, atol=1e-5)


def test_lr_and_epoch_are_chosen_on_images_that_are_not_trained_on(monkeypatch):
    """If these are labelled wrong, the best head is the one that has learned least."""
    monkeypatch.setattr(evaluate, "SWEEP", (1.0, 1e-3))
    (x, y), recipe = cloud(width=60), dict(evaluate.RECIPES["dino"], lr=1.0)
    held = torch.randperm(400, generator=rng.generator(0, "linear"))[:40]
    for turn, chosen in ((0, 1.0), (1, 1e-3)):           # without: the control
        y[held] = (y[held] + turn) % 3
        head = evaluate.classifier(x, y, 3, recipe, settings("--epochs", "5"))
        best, last = (100 * (score(x[held, 0]).argmax(1) == y[held]).double().mean().item()
                      for score in (head.scores, head.last))
        row = head.score(x[held, 0], y[held])
        assert (row["top-1"], row["last epoch"]) == pytest.approx((best, last))
        assert head.lr == chosen and best >= last
    assert head.epoch == 1 and best > last + 10


def test_heads_of_the_sweep_do_not_see_each_other(monkeypatch):
    (x, y), recipe = cloud(), evaluate.RECIPES["mae"]
    best, last, lr, epoch = evaluate.train_heads(x, y, 3, recipe, 5, seed=0)
    monkeypatch.setattr(evaluate, "SWEEP", (lr / recipe["lr"],))
    alone, end, same_lr, same_epoch = evaluate.train_heads(x, y, 3, recipe, 5, seed=0)
    assert (lr, epoch) == (same_lr, same_epoch)
    for a, b in zip(best.params + last.params, alone.params + end.params):
        assert torch.allclose(a, b, atol=1e-5)


def test_lars_follows_its_formula_and_spares_the_biases():
    g = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 1, generator=g)
    weight[1] = 0                                                         # no length: no scaling
    grads = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 1, generator=g)
    momenta = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 1, generator=g)
    lrs = torch.tensor([0.3, 2.0])
    results = {}
    for lars in (True, False):
        p, m = [weight.clone(), bias.clone()], [v.clone() for v in momenta]
        evaluate.descend(p, grads, m, lrs, lars)
        results[lars] = p
    for head in range(2):
        w, grad = weight[head], grads[0][head]
        q = 0.001 * w.norm() / grad.norm() if head == 0 else 1.0
        step = 0.9 * momenta[0][head] + q * grad
        assert torch.allclose(results[True][0][head], w - lrs[head] * step, atol=1e-6)
        step = 0.9 * momenta[1][head] + grads[1][head]
        assert torch.allclose(results[True][1][head], bias[head] - lrs[head] * step, atol=1e-6)
    assert not torch.allclose(results[True][0][0], results[False][0][0], atol=1e-3)


def test_the_probe_finds_what_is_linear_and_nothing_in_noise():
    for signal, low, high in ((1, 85, 100), (0, 0, 60)):
        x, y = cloud(600)
        x = x if signal else torch.randn(600, 2, 6, generator=torch.Generator().manual_seed(9))
        best, *_ = evaluate.train_heads(x[:400], y[:400], 3, evaluate.RECIPES["mae"], 20, seed=0)
        assert low <= metrics.accuracy(best(x[400:, 0])[:, 0], y[400:])[0] <= high


def test_the_scale_of_the_features_does_not_matter_where_the_recipe_standardises():
    (x, y), args = cloud(), settings("--epochs", "3")
    scale, shift = torch.tensor([1e-2, 1, 5, 100, 2e3, 7]), torch.tensor([0., 3, -8, 40, -1e3, 2])
    for name, same in (("mae", True), ("park", True), ("dino", False)):     # dino: the control
        one, two = (evaluate.classifier(z, y, 3, evaluate.RECIPES[name], args).scores(z[:, 0])
                    for z in (x, x * scale + shift))
        assert torch.allclose(one, two, atol=1e-2 * one.std().item()) == same


def test_too_few_images_to_hold_out_a_tenth():
    with pytest.raises(ValueError, match="9 are too few"):
        x, y = torch.zeros(9, 1, 2), torch.zeros(9).long()
        evaluate.train_heads(x, y, 2, evaluate.RECIPES["mae"], 1, seed=0)


# ---- part retrieval ------------------------------------------------------------------------------


def picture():
    """300 x 200, every pixel another colour: (row, column mod 256, 7)."""
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(300), indexing="ij")
    return torch.stack([rows, columns % 256, torch.full_like(rows, 7)]).to(torch.uint8)


def crops(*objects, parts, size=50, rule="code"):
    """part_crops of one picture with these objects, (P, 3) each."""
    item = SimpleNamespace(image=picture(), points=torch.stack(objects))
    return list(evaluate.part_crops([item], NAMES, parts, size, rule))


NAMES = ["eye", "leg", "wing", "belly"]
POINTS = torch.tensor([[100., 60, 2], [200, 60, 2], [100, 130, 1], [130, 60, 2]])


def test_crops_have_the_side_and_place_of_the_released_code():
    # eye and leg are 100 apart: side 2 * 25. The wing is hidden, and the belly is not asked for.
    eye, leg = crops(POINTS, parts=("leg", "eye", "wing"))
    assert (eye[1], leg[1]) == (1, 0)                     # places in the given order
    assert eye[0].equal(picture()[:, 35:85, 75:125])              # 50 pixels: resize is exact
    assert leg[0].equal(picture()[:, 35:85, 175:225])


def test_crops_of_the_paper_are_as_wide_as_the_distance_to_any_key_point():
    # The belly is 30 from the eye (dropped: 15 px), 70 from the leg; black beyond the right edge.
    shifted = POINTS + torch.tensor([75., 0, 0])
    [(crop, label)] = crops(shifted, parts=("leg", "eye"), size=70, rule="paper")
    assert label == 0 and crop[:, :, 60:].max() == 0
    assert crop[:, :, :60].equal(picture()[:, 25:95, 240:])


def test_a_part_without_a_partner_or_with_a_twin_in_its_place_is_dropped():
    alone = torch.tensor([[100., 60, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    twins = torch.tensor([[100., 60, 2], [100, 60, 2], [0, 0, 0], [0, 0, 0]])
    for points in (alone, twins):
        assert crops(points, parts=NAMES) == []


def test_parts_without_a_crop_are_named():
    assert evaluate.without_crops(("eye", "leg", "tail"), torch.tensor([1, 1])) == [
        "no crop of eye, tail is large enough"]
    assert evaluate.without_crops(("eye", "leg"), torch.tensor([1, 0])) == []


def test_other_objects_count_in_the_paper_and_not_in_the_code():
    # Two eyes 100 apart: of one object each, so by the code both are alone. A leg 60 below the
    # first gives it a crop of side 30 by the code and 60 by the paper; the other is far from all.
    one, two = torch.zeros(4, 3), torch.zeros(4, 3)
    one[0], two[0] = torch.tensor([100., 60, 2]), torch.tensor([200., 60, 2])
    assert crops(one, two, parts=("eye", "leg")) == []
    assert [c.shape for c, _ in crops(one, two, parts=("eye",), rule="paper")] == [(3, 50, 50)] * 2
    one[1] = torch.tensor([100., 120, 2])
    eye, leg = crops(one, two, parts=("eye", "leg"), size=30)
    assert (eye[1], leg[1]) == (0, 1) and eye[0].equal(picture()[:, 45:75, 85:115])
    sizes = [crops(one, two, parts=("eye", "leg"), size=60, rule="paper")[i][0] for i in range(3)]
    assert sizes[0].equal(picture()[:, 30:90, 70:130])


def test_part_retrieval_is_perfect_for_an_oracle_and_chance_for_noise(monkeypatch):
    args = settings("--task", "part_retrieval", "--limit", "60")
    answers = torch.tensor([label for _, label in evaluate.part_crops(
        annotations.keypoints("toy", limit=60), toy.PARTS, evaluate.KEYPOINTS["toy"][2], 8)])
    noise = torch.randn(len(answers), 16, generator=torch.Generator().manual_seed(0))
    for known, features in ((True, torch.eye(4)[answers]), (False, noise)):
        monkeypatch.setattr(evaluate, "extract", lambda *a, **b: ({"cls": features}, answers))  # noqa: B023
        row = evaluate.part_retrieval(model(), args).rows["cls"]
        if known:
            assert row["AP"] == pytest.approx(100) and row["AP by part"] == pytest.approx(100)
        else:
            assert row["AP"] == pytest.approx(row["chance"], abs=2.5) and row["AP by part"] < 40


# ---- the command ---------------------------------------------------------------------------------


def test_without_a_run_an_untrained_model_is_evaluated_and_the_next_command_named(tmp_path, capsys):
    [line] = run(tmp_path)
    text = capsys.readouterr().out
    assert "no run in" in text and "python mmc.py" in text
    assert line["model"] == "untrained" and line["checkpoint"] is None and line["task"] == "knn"
    assert set(line["metrics"]) == {"cls", "pat", "hyber"}
    assert set(line["metrics"]["cls"]) == {"k=10", "k=20"}
    assert line["images"] == {"train": 30, "test": 30} and line["settings"]["limit"] == 30
    for word in ("cosine", "0.07", "last block", "final norm", "64 px", "whole picture"):
        assert word in line["protocol"] and word in text


def test_the_newest_run_is_taken_and_results_lie_beside_it(tmp_path):
    checkpoint(tmp_path, "old", 1000)
    checkpoint(tmp_path, "new", 2000)
    [line] = run(tmp_path)
    assert line["model"] == line["method"] == "new" and line["branch"] == "teacher"
    assert (tmp_path / "new" / "results.jsonl").exists()
    assert "32 px" in line["protocol"]                                    # its own size


def test_the_files_that_were_written_are_named_each_once(tmp_path, capsys):
    files = [checkpoint(tmp_path, name, 1000).parent / "results.jsonl" for name in "ab"]
    run(tmp_path, "--checkpoint", *(str(file.parent) for file in files), "--baseline", "pixels")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f" s, appended to {files[0]}, {files[1]}")


def test_checkpoints_and_baselines_are_rows_of_one_table(tmp_path, capsys):
    a, b = (checkpoint(tmp_path, name, 1000) for name in "ab")
    file = tmp_path / "all.jsonl"
    lines = run(tmp_path, "--checkpoint", str(a.parent), str(b), "--json", str(file),
                "--baseline", "pixels", "untrained", "--k", "3", "900")
    assert [line["model"] for line in lines] == ["a", "b", "pixels", "untrained"]
    assert set(lines[2]["metrics"]) == {"pixels"} and "k=30" in lines[0]["metrics"]["pat"]
    assert lines[0]["metrics"] == lines[1]["metrics"]                     # equal weights
    text = capsys.readouterr().out
    assert "note: the bank has 30 images: k ends there" in text
    table = text[text.index("\nmodel"):].splitlines()[1:12]
    assert len({len(row) for row in table}) == 1                          # aligned
    assert [row.split()[0] for row in table[1:]] == [
        "a", "pat", "hyber", "b", "pat", "hyber", "pixels", "untrained", "pat", "hyber"]


def test_knn_in_the_table_is_knn_of_the_features(tmp_path):
    [line] = run(tmp_path, "--precision", "fp32", "--seed", "5", "--k", "7")
    torch.manual_seed(5)
    encoder = vit.ViT(**evaluate.SHAPE).eval()
    sets = [toy.draw(torch.arange(30), split, 64) for split in ("train", "test")]
    with torch.no_grad():
        bank, queries = (encoder(augment.normalize(s["image"].float() / 255))[:, 0] for s in sets)
    found = metrics.knn(bank, sets[0]["label"], queries, k=(7,))[7]
    right = 100 * (found == sets[1]["label"]).double().mean().item()
    assert line["metrics"]["cls"]["k=7"] == pytest.approx(right)


@pytest.mark.parametrize("recipe, feature", [("mae", "cls"), ("dino", "4 x cls"), ("park", "pat")])
def test_linear_runs_by_every_recipe_and_again_with_equal_numbers(tmp_path, recipe, feature):
    flags = ["--task", "linear", "--recipe", recipe, "--epochs", "2"]
    one, two = run(tmp_path, *flags) and run(tmp_path, *flags)
    assert one["metrics"] == two["metrics"] and set(one["metrics"]) == {feature}
    assert set(one["metrics"][feature]) == {"top-1", "top-5", "last epoch"}
    assert "held-out tenth" in one["protocol"] and "base lr" in one["notes"][0]


@pytest.mark.parametrize("crop", ["code", pytest.param("paper", marks=pytest.mark.slow)])
def test_part_retrieval_runs_and_shows_its_crops(tmp_path, crop):
    [line] = run(tmp_path, "--task", "part_retrieval", "--show", "--crop", crop)
    assert set(line["metrics"]) == {"cls", "pat"} and line["images"]["crops"] > 10
    sheet = Image.open(tmp_path / "part_crops-toy.png")
    assert sheet.width > 16 * 64 and sheet.height > 4 * 64


def test_a_model_without_class_token_says_so(tmp_path):
    (tmp_path / "r").mkdir()
    checkpoints.save_encoder(tmp_path / "r" / "encoder.pt", model(class_token=False).encoder, data="toy")
    [line] = run(tmp_path)
    assert line["notes"] == ["r has no class token: its patch mean stands in"]
    assert line["metrics"]["cls"] == line["metrics"]["pat"]
    *_, line = run(tmp_path, "--task", "video", "--limit", "1")              # of patches alone
    assert line["task"] == "video" and not any("class token" in note for note in line["notes"])


def test_an_error_at_a_later_model_leaves_the_table_of_the_earlier_ones(tmp_path, capsys):
    checkpoint(tmp_path, "a", 1000)
    flags = ["--task", "attentive", "--epochs", "1", "--limit", "30", "--out", str(tmp_path),
             "--device", "cpu", "--checkpoint", str(tmp_path / "a"), "--baseline", "pixels"]
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: evaluate.main(flags))
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.startswith("error: attentive needs tokens, and pixels")
    assert "\nmodel  feature" in said.out and "\na: attentive " in said.out
    assert f"appended to {tmp_path}/a/results.jsonl" in said.out


def test_hyber_of_iBOT_is_named_in_the_protocol(tmp_path):
    flags = ["--k", "3", "--json", str(tmp_path / "all.jsonl"), "--hyber-norm"]
    *_, halves = run(tmp_path, *flags, "halves")
    *_, joint = run(tmp_path, *flags, "joint")
    assert joint["protocol"] == (
        halves["protocol"] + "; hyber: cls and pat brought to length 1 together")
    *_, plain = run(tmp_path, *flags, "joint", "--feature", "cls")
    assert plain["protocol"] == halves["protocol"]       # which has no hyber


def test_a_folder_that_is_named_like_toy_is_no_toy(tmp_path, monkeypatch):
    limits = []

    def look(model, args):
        """How many may it look at?"""
        limits.append(args.limit)
        return evaluate.report({"cls": {"k=10": 1.0}}, "")

    monkeypatch.setattr(evaluate, "FROZEN", ["knn"])
    monkeypatch.setitem(evaluate.TASKS, "knn", look)
    for name in ("toys", "toy-scenes"):
        evaluate.main(["--task", "all", "--data", name, "--baseline", "pixels", "--device", "cpu",
                       "--out", str(tmp_path)])
    assert limits == [None, evaluate.ALL_IMAGES]


def test_a_task_is_a_function_and_a_line(tmp_path, monkeypatch):
    def brightness(model, args):
        """How often a picture is bright."""
        found, _, _ = evaluate.features(model, args, "test", ["pat"])
        share = (found["pat"].mean(1) > 0).double().mean().item()
        return evaluate.report({"pat": {"bright": 100 * share}}, "mean above 0", test=30)

    monkeypatch.setitem(evaluate.TASKS, "brightness", brightness)
    [line] = run(tmp_path, "--task", "brightness")
    assert 0 <= line["metrics"]["pat"]["bright"] <= 100 and line["protocol"] == "mean above 0"


@pytest.mark.parametrize("flags, expected", [
    (["--task", "lineer"], "unknown task 'lineer'; did you mean linear?"),
    (["--chekpoint", "x"], "unknown flag --chekpoint; did you mean --checkpoint?"),
    (["--checkpoint", "nowhere.pt"], "no checkpoint file nowhere.pt"),
    (["--limit", "0"], "expected a whole number of at least 1, not '0'"),
    (["--data", "toyy"], "did you mean 'toy'?"),
    (["--data", "synthetic"], "this data set has no labels (synthetic), and knn needs them"),
    (["--json", "/dev/null/x.jsonl"], "cannot write /dev/null/x.jsonl ("),
    (["--size", "60"], "is not a multiple of patch size 8"),
    (["--task", "part_retrieval", "--data", "stl10"], "no key-points of stl10; choose --data toy"),
    (["--task", "part_retrieval", "--parts", "hed"], "toy has no part 'hed'; did you mean head?"),
    (["--task", "part_retrieval", "--parts", "tail"], "and tail is alone: name two or more"),
    (["--task", "object_retrieval", "--data", "toy-scenes", "--limit", "2", "--min-side", "999"],
     "nothing to look at; raise"),
    (["--task", "linear", "--limit", "9"], "9 are too few; raise --limit"),
    (["--task", "linear", "--paper"], "add --recipe park"),
    (["--task", "linear", "--recipe", "simmim"], "choose --recipe mae, dino, park\n"),
    (["--data", "cub"], "knn needs pictures of one class each, and cub has none"),
    (["--data", "cub", "--task", "few_shot"], "few_shot needs pictures of one class each, and cub"),
    (["--data", "cub", "--task", "attentive"], "attentive needs pictures of one class each, and"),
    (["--task", "finetune", "--lr", "1e-3"], "finetune does not read --lr: leave it out"),
    (["--task", "finetune", "--iters", "9"], "finetune does not read --iters: leave it out"),
    (["--task", "detection", "--lr", "1e-3"], "detection does not read --lr: leave it out"),
    (["--task", "segmentation", "--epochs", "9"], "segmentation does not read --epochs"),
    (["--task", "attentive", "--feature", "pat"], "attentive does not read --feature"),
    (["--task", "layerwise", "--recipe", "mae"], "layerwise does not read --recipe"),
    (["--task", "linear", "--head", "attentive"], "linear does not read --head"),
    (["--task", "linear", "--reinit", "last:2"], "linear does not read --reinit"),
    (["--task", "linear", "--k", "5"], "linear does not read --k"),
    (["--paper"], "knn does not read --paper: leave it out"),
    (["--show"], "knn does not read --show: leave it out"),
    (["--task", "video", "--max-items", "9"], "video does not read --max-items: leave it out"),
    (["--data", "toyy", "--task", "all"], "no knn, few_shot, linear"),
    (["--task", "part_retrieval", "--data", "cub", "--data-root", "x"], "No cub under x: expected"),
])
def test_mistakes_get_one_sentence(tmp_path, capsys, flags, expected):
    assert expected in message(capsys, "--out", str(tmp_path), "--device", "cpu", *flags)


def test_a_broken_checkpoint_gets_one_sentence(tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    assert "bad.pt is damaged" in message(capsys, "--checkpoint", str(tmp_path / "bad.pt"))


def test_no_method_is_imported():
    tree = ast.parse(open(evaluate.__file__).read())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    methods = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert len(methods) > 8 and {"data", "vit"} < set(names) and not methods & set(names)
