"""Features of the probes against one forward pass per image, the cache, and several processes."""
import dataclasses
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import make_encoder, make_model, make_options
from torch import nn

import data
import dino
import hybrid
import ibot
import mmc
import moby
import moco_v3
import selfpatch
import vit
from lib import augment, checkpoint_heads, checkpoints, config, datasets, distributed, toy
from probes import classification, common, retrieval

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
NET = "--data imagenet --img-size 32 --patch-size 8 --embed-dim 24 --depth 2 --num-heads 2".split()


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def perturb(network):
    """Moves weights and statistics away from the initial zeros and ones, which hide mistakes."""
    for p in network.parameters():
        p.add_(0.3 * torch.randn_like(p))
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.add_(0.3 * torch.rand_like(buffer))
    return network.eval()


# ---- features of a batch -------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False])
def test_features_equal_one_forward_pass_per_image_in_the_order_of_the_labels(class_token):
    model = make_model(make_encoder(class_token=class_token))
    opt = make_options("knn", "--limit", "9", "--batch-size", "4")
    found, labels, num_classes = common.extract_features(model, opt, "test")
    drawn = toy.draw(torch.arange(9), "test", 32)
    assert labels.tolist() == drawn["label"].tolist() and num_classes == len(toy.CLASSES)
    for i in range(9):
        x = augment.normalize(drawn["image"][i:i + 1].float() / 255, augment.MEAN, augment.STD)
        tokens = model.encoder(x)[0]
        patch = tokens[int(class_token):].mean(0)
        cls = tokens[0] if class_token else patch
        assert torch.allclose(found["cls"][i], cls, atol=1e-5)
        assert torch.allclose(found["patch"][i], patch, atol=1e-5)
        hyber = torch.cat([cls / cls.norm(), patch / patch.norm()])
        assert torch.allclose(found["hyber"][i], hyber, atol=1e-5)
    assert not torch.allclose(found["patch"][0], found["patch"][1], atol=1e-3)    # they do differ


def test_the_mirror_image_is_next_to_its_image():
    model = make_model(make_encoder())
    opt = make_options("knn", "--limit", "10", "--batch-size", "4")
    both, labels, _ = common.extract_features(model, opt, "test", ["cls"], mirror=True)
    plain, same, _ = common.extract_features(model, opt, "test", ["cls"])
    x = augment.normalize(toy.draw(torch.arange(10), "test", 32)["image"].float() / 255)
    mirrored = model.encoder(x.flip(-1))[:, 0]
    assert torch.allclose(both["cls"][:, 0], plain["cls"], atol=1e-5) and labels.equal(same)
    assert torch.allclose(both["cls"][:, 1], mirrored, atol=1e-5)


def test_dino_features_are_four_class_tokens_or_class_token_and_patch_mean():
    x, encoder = torch.randn(2, 3, 32, 32), make_encoder(depth=5)
    found = common.dino_features(encoder, x)["4 x cls"]
    outputs = []
    hooks = [block.register_forward_hook(lambda *a: outputs.append(a[2]))
             for block in encoder.blocks]
    encoder(x)
    for hook in hooks:
        hook.remove()
    expected = torch.cat([encoder.norm(z)[:, 0] for z in outputs[-4:]], 1)
    assert torch.allclose(found, expected, atol=1e-5)
    wide = make_encoder(embed_dim=768, depth=1, num_heads=2)
    tokens = wide(x)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    assert torch.allclose(common.dino_features(wide, x)["cls+patch"], expected, atol=1e-5)


def test_hyber_is_normalized_separately_or_jointly():
    x, encoder = torch.randn(3, 3, 32, 32), make_encoder()
    z = common.pooled_features(encoder, x)
    for flags, ratio in (([], torch.ones(3)),                          # separately: both of norm 1
                         (["--hyber-norm", "joint"],
                          z["cls"].norm(dim=1) / z["patch"].norm(dim=1))):
        names, encode = common.select_features(make_options("knn", *flags), "cls", "hyber")
        found = encode(encoder, x)
        cls, patch = found["hyber"].split(32, 1)
        assert torch.allclose(cls.norm(dim=1) / patch.norm(dim=1), ratio) and "hyber" in names
        assert torch.allclose(F.normalize(cls), F.normalize(z["cls"]), atol=1e-6)
        assert torch.allclose(F.normalize(patch), F.normalize(z["patch"]), atol=1e-6)
        assert found["cls"].equal(z["cls"])
    assert (ratio - 1).abs().min() > 0.1
    assert torch.allclose(found["hyber"].norm(dim=1), torch.ones(3))


def test_block_features_are_taken_before_the_final_norm():
    encoder, x, outputs = make_encoder(), torch.randn(2, 3, 32, 32), []
    hooks = [block.register_forward_hook(lambda *a: outputs.append(a[2]))
             for block in encoder.blocks]
    found = common.block_features(encoder, x)
    for hook in hooks:
        hook.remove()
    assert list(found) == [f"block {n} {name}" for n in (1, 2, 3) for name in ("cls", "patch")]
    for n in (1, 2, 3):
        patch_mean = outputs[n - 1][:, 1:].mean(1)
        assert torch.allclose(found[f"block {n} patch"], patch_mean, atol=1e-6)
        assert torch.allclose(found[f"block {n} cls"], outputs[n - 1][:, 0], atol=1e-6)
    assert not torch.allclose(found["block 3 cls"], encoder(x)[:, 0], atol=1e-2)


# ---- projected features --------------------------------------------------------------------------


def method_networks():
    """Method, flags, function: network -> its heads as saved, and tokens (B, L, D) -> projected."""
    def moco_v3_head(n):
        return dict(projector=n.projector, predictor=n.predictor), lambda t: n.projector(t[:, 0])

    def moby_swin_head(n):
        return dict(projector=n.projector, predictor=n.predictor), lambda t: n.projector(t.mean(1))

    def dino_head(n):
        return dict(head=n.head), lambda t: n.head(t[:, 0])

    def mmc_head(n):
        return dict(cls=n.head_cls, patch=n.head_patch), lambda t: n.head_cls(t[:, 0])

    def selfpatch_head(n):
        return (dict(ca_head=n.ca_head, c_head=n.c_head, p_head=n.p_head),
                lambda t: n.c_head(n.aggregate(t)[:, 0]))

    def selfpatch_on_moby_head(n):
        return (dict(ca_head=n.ca_head, projector=n.c_head.projector, p_head=n.p_head),
                lambda t: n.c_head.projector(n.aggregate(t)[:, 0]))

    def hybrid_head(n):
        return (dict(decoder=n.decoder, projector=n.projector, predictor=n.predictor),
                lambda t: n.projector(t[:, 0]))

    mlp, swin = "--mlp-dim 32 --out-dim 16", "--backbone swin_micro"
    logits = "--head-hidden-dim 32 --bottleneck-dim 12 --out-dim 40"
    return [(moco_v3, mlp, moco_v3_head), (moby, mlp, moco_v3_head), (dino, logits, dino_head),
            (dino, f"{logits} --use-bn-in-head true", dino_head), (ibot, logits, dino_head),
            (ibot, f"{logits} --shared-head false", dino_head), (mmc, mlp, mmc_head),
            (selfpatch, f"{logits} --out-dim-selfpatch 8", selfpatch_head),
            (selfpatch, f"--base moby {mlp} --out-dim-selfpatch 8", selfpatch_on_moby_head),
            (selfpatch, f"--base moby {mlp} --out-dim-selfpatch 8 {swin}", selfpatch_on_moby_head),
            (moby, f"{mlp} {swin}", moby_swin_head),
            (hybrid, f"{mlp} --mask-patch-size 16", hybrid_head)]


@pytest.mark.parametrize("method, flags, heads_of", method_networks())
def test_projected_features_are_those_of_the_methods_own_network(tmp_path, method, flags, heads_of):
    sizes = NET[:4] if "swin" in flags else NET
    cfg = config.parse(method.Config, [*sizes, *flags.split()])
    teacher = {} if method is mmc else {"teacher": method is selfpatch}
    network = perturb(method.Network(cfg, **teacher))
    heads, project = heads_of(network)
    path = tmp_path / "encoder.pt"
    checkpoints.save_encoder(path, network.backbone,
                             heads={name: head.state_dict() for name, head in heads.items()})
    encoder, x = checkpoints.load_encoder(path, quiet=True), torch.randn(5, 3, 32, 32)
    z, tokens = common.projected_features(encoder, x), encoder(x)
    expected = project(tokens)
    whole = checkpoint_heads.projector(encoder, narrow=False)(tokens)
    assert torch.allclose(whole, expected, atol=1e-5, rtol=1e-4)
    assert torch.allclose(z["projected"] @ z["projected"].T, expected @ expected.T, rtol=1e-4,
                          atol=1e-4)                      # narrow or not: the same inner products
    assert z["projected"].shape[1] == (16 if expected.shape[1] == 16 else 12)
    assert not torch.allclose(whole[0], whole[1], rtol=1e-2)               # images do differ
    assert z["cls"].equal(common.pooled_features(encoder, x)["cls"])
    name = next(name for name in ("projector", "head", "cls", "c_head") if name in heads)
    key = next(key for key in heads[name].state_dict() if key.endswith("weight"))
    encoder.source.heads[name][key] *= -1                 # control: the first layer matters
    other = checkpoint_heads.projector(encoder, narrow=False)(tokens)
    assert not torch.allclose(other, expected, rtol=1e-2)


def official_backbone(prefix, **config):
    network = perturb(vit.ViT(**{**SMALL, **config}))
    if config.get("pos", "").startswith("sincos"):        # fixed positions
        network.pos_embed.copy_(vit.ViT(**{**SMALL, **config}).pos_embed)
    return {f"{prefix}{key}": value for key, value in network.state_dict().items()}


def test_projector_of_the_official_moco_v3_file(tmp_path):
    def batch_norm(x, n, affine=True):
        scale = (head[f"{n}.running_var"] + 1e-5).rsqrt()
        x = (x - head[f"{n}.running_mean"]) * scale
        return x * head[f"{n}.weight"] + head[f"{n}.bias"] if affine else x

    widths, head = {0: (24, 40), 3: (40, 40), 6: (40, 16)}, {}
    for n, (i, o) in widths.items():
        head[f"{n}.weight"] = torch.randn(o, i)
        head |= {f"{n + 1}.running_mean": torch.randn(o), f"{n + 1}.running_var": torch.rand(o) + 1,
                 f"{n + 1}.num_batches_tracked": torch.tensor(7)}
        if n < 6:
            head |= {f"{n + 1}.weight": torch.randn(o), f"{n + 1}.bias": torch.randn(o)}
    state = official_backbone("module.base_encoder.", pos="sincos_row", num_heads=12)
    state |= {f"module.base_encoder.head.{key}": value for key, value in head.items()}
    state |= {f"module.predictor.{n}.weight": torch.randn(8, 8) for n in (0, 3)}
    torch.save({"state_dict": state}, tmp_path / "vit-b-300ep.pth.tar")
    encoder = checkpoints.load_encoder(tmp_path / "vit-b-300ep.pth.tar", quiet=True, num_heads=12)
    x = torch.randn(4, 3, 32, 32)
    z = encoder(x)[:, 0]
    for n in (0, 3, 6):
        z = batch_norm(z @ head[f"{n}.weight"].T, n + 1, n < 6)
        z = z.clamp(min=0) if n < 6 else z
    found = common.projected_features(encoder, x)["projected"]
    assert torch.allclose(found, z, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("loss", ["dino_loss", "ibot_loss"])
@pytest.mark.parametrize("form", ["weight norm", "parametrization", "plain"])
def test_heads_of_the_official_dino_and_ibot_files(tmp_path, loss, form):
    last = nn.Linear(6, 50, bias=False)
    if form == "weight norm":
        last = nn.utils.weight_norm(last)                 # deprecated, but the official code's
        last.weight_g.mul_(torch.rand(50, 1) + 0.5)
    if form == "parametrization":
        last = nn.utils.parametrizations.weight_norm(last)
    mlp = nn.Sequential(nn.Linear(24, 10), nn.GELU(), nn.Linear(10, 10), nn.GELU(),
                        nn.Linear(10, 6))
    head = {f"mlp.{key}": value for key, value in mlp.state_dict().items()}
    head |= {f"last_layer.{key}": value for key, value in last.state_dict().items()}
    if loss == "ibot_loss":                               # a shared head is listed twice
        head |= {key.replace("layer.", "layer2."): x for key, x in head.items() if "last" in key}
    raw = {loss: {}, "epoch": 100}
    for branch, prefix in (("teacher", ""), ("student", "module.")):
        raw[branch] = official_backbone(f"{prefix}backbone.", num_heads=1)
        raw[branch] |= {f"{prefix}head.{key}": value for key, value in head.items()}
    torch.save(raw, tmp_path / "full.pth")
    encoder = checkpoints.load_encoder(tmp_path / "full.pth", quiet=True, num_heads=1)
    x = torch.randn(4, 3, 32, 32)
    expected = last(F.normalize(mlp(encoder(x)[:, 0]), dim=1))              # (4, 50) logits
    found = checkpoint_heads.projector(encoder, narrow=False)(encoder(x))
    assert torch.allclose(found, expected, atol=1e-5)
    narrow = common.projected_features(encoder, x)["projected"]
    assert narrow.shape == (4, 6)
    assert torch.allclose(torch.cdist(narrow, narrow), torch.cdist(expected, expected), atol=1e-4)


def test_a_missing_head_gives_none_and_an_unknown_one_an_error_with_its_keys():
    encoder, x = make_encoder(), torch.randn(1, 3, 32, 32)
    encoder.source = SimpleNamespace(path="x.pt", heads={"decoder": {"weight": torch.ones(1)}})
    assert checkpoint_heads.projector(encoder) is None
    assert "projected" not in common.projected_features(encoder, x)
    encoder.source.heads = {"head": {"mlp.weight": torch.ones(2, 2)}}
    with pytest.raises(ValueError, match="x.pt: cannot rebuild the head with the keys mlp.weight"):
        checkpoint_heads.projector(encoder)


def test_projected_features_without_a_projection_head_are_an_error():
    model, opt = make_model(make_encoder()), make_options("knn", "--feature", "projected")
    with pytest.raises(ValueError, match="small has no projection head in its checkpoint"):
        classification.knn(model, dataclasses.replace(opt, limit=10))


# ---- data sets -----------------------------------------------------------------------------------


def test_features_that_are_not_finite_are_an_error():
    model = make_model(make_encoder())
    model.encoder.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="small: its weights are not finite: leave it out"):
        common.extract_features(model, make_options("knn", "--limit", "4"), "test")
    model.encoder.norm.weight[0] = 3e38                  # finite, and too large
    model.encoder.norm.bias[0] = 3e38
    with pytest.raises(ValueError, match="small: its features are not finite; try --precision"):
        common.extract_features(model, make_options("knn", "--limit", "4"), "test")


def test_every_fifth_image_of_a_folder_without_splits_is_a_test_image(tmp_path, capsys):
    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        image = torch.full((40, 40, 3), 10 * i, dtype=torch.uint8).numpy()
        Image.fromarray(image).save(tmp_path / "ab"[i % 2] / f"{i:02}.png")
    model, opt = make_model(make_encoder()), make_options("knn", "--data", str(tmp_path))
    assert classification.images_are_square(model, opt)
    train, labels, _ = common.extract_features(model, opt, "train", ["patch"])
    test, truth, _ = common.extract_features(model, opt, "test", ["patch"])
    assert (len(labels), len(truth)) == (16, 4) and truth.tolist() == [0, 0, 1, 1]
    assert torch.cdist(test["patch"], train["patch"]).min() > 1e-4        # no image is in both
    notes = capsys.readouterr().out.splitlines()         # each split once, and nothing else
    assert len(notes) == 2 and "20 images; 2 classes: a, b" in notes[0]
    assert "learn from 16 and are tested on 4" in notes[1]
    opt = dataclasses.replace(opt, limit=3)                               # of each, evenly spaced
    subset, _, _ = common.extract_features(model, opt, "train", ["patch"])
    torch.testing.assert_close(subset["patch"], train["patch"][[0, 5, 10]])
    subset, _, _ = common.extract_features(model, opt, "test", ["patch"])
    torch.testing.assert_close(subset["patch"], test["patch"][[0, 1, 2]])


def test_training_and_test_images_need_classes_in_common(tmp_path):
    for i, folder in enumerate(["train/a", "train/b", "train/c", "val/a", "val/c"]):
        (tmp_path / folder).mkdir(parents=True)
        for n in range(16):
            image = torch.full((32, 32, 3), 40 * i + n, dtype=torch.uint8).numpy()
            Image.fromarray(image).save(tmp_path / folder / f"{n}.png")
    model, opt = make_model(make_encoder()), make_options("linear", "--data", str(tmp_path))
    for split, labels in (("train", [0, 1, 2]), ("test", [0, 2])):   # b has no test images
        images, num_classes = common.load_labeled(model, opt, split)
        assert images.labels.unique().tolist() == labels and num_classes == 3
    for name in "ac":
        (tmp_path / "val" / name).rename(tmp_path / "val" / f"other {name}")
    common.load_split.cache_clear()
    with pytest.raises(ValueError, match=r"linear needs the same .* different ones \(3 and 2\)"):
        common.load_labeled(model, opt, "train")
    opt = make_options("few_shot", "--data", str(tmp_path))     # uses the test split only
    assert common.extract_features(model, opt, "test", ["cls"])[2] == 2
    for path in tmp_path.glob("val/*/*"):
        path.rename(tmp_path / "val" / f"{path.parent.name}-{path.name}")
    common.load_split.cache_clear()
    with pytest.raises(ValueError, match="few_shot needs labels, and .* has none"):
        common.load_labeled(model, opt, "test")


# ---- cache ---------------------------------------------------------------------------------------


def save_images(folder, count=5):
    """`count` random images, not square, of each of two classes, in a folder."""
    for c in "ab":
        (folder / c).mkdir(parents=True)
        for n in range(count):                           # one of five is a test image
            image = torch.randint(256, (40, 80, 3), dtype=torch.uint8)
            Image.fromarray(image.numpy()).save(folder / c / f"{n}.png")
    return str(folder)


def test_kept_features_are_found_by_everything_that_they_depend_on(tmp_path):
    folder, other = save_images(tmp_path / "data"), save_images(tmp_path / "other")
    # changes of the model, of the options, of the call
    cases = [({}, {}, {}), (dict(img_size=40), {}, {}), (dict(mean=augment.STD), {}, {}),
             (dict(std=augment.MEAN), {}, {}), (dict(interpolation="bilinear"), {}, {}),
             (dict(precision="bf16"), {}, {}), (dict(encoder=make_encoder(0.1)), {}, {}),
             (dict(encoder=make_encoder(num_heads=4)), {}, {}), ({}, dict(limit=1), {}),
             ({}, dict(data=other), {}), ({}, {}, dict(whole=True)),
             ({}, {}, dict(mirror=True)), ({}, {}, dict(split="train")),
             ({}, {}, dict(encode=common.jointly_normalized))]
    found, model = {}, make_model(make_encoder())

    def extract(number, cache):
        of_model, of_options, of_call = cases[number]
        opt = make_options("knn", "--data", folder, "--out", f"{tmp_path}/out")
        opt = dataclasses.replace(opt, cache=cache, **of_options)
        changed = dataclasses.replace(model, **of_model)
        return common.extract_features(changed, opt, **dict(split="test") | of_call)[0]["hyber"]

    for cache in (False, True, True):
        with common.keep_in_memory():
            for number in [*range(len(cases)), *range(len(cases))]:
                z = extract(number, cache)
                assert z.equal(found.setdefault(number, z)), cases[number]
            assert len(common.kept) == len(cases)
    assert not any(found[a].equal(found[b]) for a in found for b in range(a))
    assert len(list((tmp_path / "out/features").iterdir())) == len(cases)


def test_what_only_other_images_would_show_is_in_the_name_of_kept_features(monkeypatch):
    encoder, key = make_encoder(), ("test", False)
    model, head = make_model(encoder), {"projector": {"weight": torch.zeros(2, 2)}}
    opt = make_options("knn", "--data", "cifar10")
    changes = [(model, opt, key), (model, opt, ("test", True)),
               (model, dataclasses.replace(opt, batch_size=2), key),
               (model, dataclasses.replace(opt, data_root="elsewhere"), key),
               (make_model(encoder, device=torch.device("meta")), opt, key),
               *[(make_model(encoder, source=SimpleNamespace(heads=heads)), opt, key) for heads in
                 (head, {"projector": {"weight": torch.ones(2, 2)}})]]
    names = [common.feature_name(*change[:2], common.pooled_features, change[2])
             for change in changes]
    monkeypatch.setenv("DATA_ROOT", "elsewhere")         # the same as --data-root
    assert common.feature_name(model, opt, common.pooled_features, key) == names[3]
    names.append(common.feature_name(model, opt, common.projected_features, key))
    assert len({*names}) == len(names)


def test_a_damaged_cache_is_computed_again(tmp_path, capsys):
    model = make_model(make_encoder())
    opt = make_options("knn", "--limit", "4", "--cache", "--out", str(tmp_path))
    features = [common.extract_features(model, opt, "test")[0]["cls"]]
    [path] = (tmp_path / "features").iterdir()
    for damaged in (path.read_bytes()[:500], b"text"):
        path.write_bytes(damaged)
        features += [common.extract_features(model, opt, "test")[0]["cls"]]
    torch.save({"other": torch.zeros(2)}, path)
    features += [common.extract_features(model, opt, "test")[0]["cls"] for _ in range(2)]
    assert all(z.equal(features[0]) for z in features)
    out = capsys.readouterr().out
    assert f"{path} is damaged: its features are computed again" in out
    assert f"small: stored features, {path}" in out


def test_cached_features_are_those_of_the_loaded_weights_and_of_the_present_files(tmp_path):
    folder, path = save_images(tmp_path / "data"), tmp_path / "encoder.pt"
    opt = make_options("knn", "--data", folder, "--out", str(tmp_path), "--cache", "--checkpoint",
                       str(path))

    def load(encoder):
        checkpoints.save_encoder(path, encoder)
        return common.load_models(opt)[0]

    old = load(make_encoder())
    new = load(make_encoder(0.1))                        # a training run has replaced the file
    features = [common.extract_features(model, opt, "test")[0]["cls"] for model in (old, new)]
    assert not torch.equal(*features)
    plain = dataclasses.replace(opt, cache=False)
    assert features[1].equal(common.extract_features(new, plain, "test")[0]["cls"])
    for name in ("a/5.png", "a/6.png"):                  # of ten images 0 and 5 are tests, now 0, 5
        Image.new("RGB", (40, 80)).save(f"{folder}/{name}")              # and 10
    common.load_split.cache_clear()                      # of an earlier call
    assert len(features[1]) == 2 and len(common.extract_features(new, opt, "test")[1]) == 3


def test_a_newer_run_without_an_encoder_is_named(tmp_path, capsys):
    """It has just begun, or was killed: the newest of the others is evaluated."""
    for name, time in (("old", 1000), ("saved", 2000), ("begun", 3000)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "config.yaml"
        file.write_text("method: mae\n")
        if name == "saved":
            file = tmp_path / name / "encoder.pt"
            checkpoints.save_encoder(file, make_encoder(), data="toy")
        os.utime(file, (time, time))
    [model] = common.load_models(make_options("knn", "--out", str(tmp_path)))
    out = capsys.readouterr().out
    assert model.name == "saved" and f"note: {tmp_path}/begun is newer and has no encoder" in out
    assert f"{tmp_path}/old" not in out


def test_a_run_without_a_checkpoint_is_told_when_there_is_one(tmp_path):
    (tmp_path / "config.yaml").write_text("method: mae\n")
    with pytest.raises(FileNotFoundError, match="no encoder.pt yet: a run writes it every"):
        common.load_models(make_options("knn", "--checkpoint", str(tmp_path)))


def test_baselines_get_the_images_of_the_first_checkpoint(tmp_path):
    half = [0.5, 0.5, 0.5]
    checkpoints.save_encoder(tmp_path / "encoder.pt", make_encoder(img_size=48), data="toy",
                             interpolation="bilinear", mean=half, std=half)
    flags = "--device", "cpu", "--baseline", "untrained", "pixels"
    models = common.load_models(make_options("knn", *flags, "--checkpoint", str(tmp_path)))
    assert [model.name for model in models[1:]] == ["untrained", "pixels"]
    for model in models:
        assert (model.img_size, model.interpolation) == (48, "bilinear")
        assert list(model.mean) == list(model.std) == half
    [alone] = common.load_models(make_options("knn", *flags[:-1], "--out", str(tmp_path / "none")))
    assert (alone.interpolation, alone.mean) == ("bicubic", augment.MEAN)


def test_kept_features_take_a_bounded_memory_and_end_with_the_call(monkeypatch):
    model, passes = make_model(make_encoder()), []
    original = common.encode_once
    monkeypatch.setattr(common, "encode_once", lambda *a: passes.append(0) or original(*a))

    def count(*limits, encode=common.pooled_features, whole=False):
        """Number of passes over the first images of toy."""
        passes.clear()
        for limit in limits:
            common.extract_features(model, make_options("knn", "--limit", str(limit)), "test",
                                    encode=encode, whole=whole)
        return len(passes)

    size = 4 * 4 * 32                                    # cls, patch, hyber: 4 x 32 float32
    assert count(10, 10) == 2                            # outside of --task all
    monkeypatch.setattr(common, "KEPT_BYTES", 25 * size)
    with common.keep_in_memory():
        assert count(10, 12, 10, 12) == 2
        assert count(11, 12, 11) == 1 and count(10) == 1             # 10 was the oldest
        assert count(30, 30) == 2 and common.kept == {}              # too large
        assert count(5, 5, encode=common.all_tokens) == 2 and common.kept == {}
        assert count(5, 5, encode=common.block_features) == 2 and common.kept == {}
        assert count(5, 5) == 1 and count(5, whole=True) == 0        # toy is never cropped
    assert common.kept is None and count(5) == 1


def test_features_that_will_not_fit_are_refused_after_the_first_batch(monkeypatch):
    """Of 48 bytes for the class token and 8 for the number of an image, twice."""
    model, encoded = make_model(make_encoder()), []

    def encode(encoder, x):
        encoded.append(len(x))
        return {"cls": torch.zeros(len(x), 12)}

    def run(total, memory):
        encoded.clear()
        monkeypatch.setattr(distributed, "total_memory", lambda _: memory / 2**30)
        batches = ((torch.zeros(4, 3, 8, 8), torch.arange(4)) for _ in range(5))
        common.encode_batches(model, make_options("knn"), batches, ["cls"], encode, total)

    run(20, 20 * 112)
    with pytest.raises(ValueError, match="20 images .*: use fewer images .--limit"):
        run(20, 20 * 112 - 1)
    assert len(encoded) == 1
    with pytest.raises(ValueError, match="12 images"):   # of crops the number is not known before
        run(None, 12 * 112 - 1)
    assert len(encoded) == 3


def test_most_images_of_all_processes_must_be_readable():
    """Each process lists its own; the number is judged once, for all."""
    def run(total):
        batches = [(torch.zeros(4, 3, 8, 8), torch.arange(4))]
        common.encode_batches(make_model(make_encoder()), make_options("knn", data="toy"), batches,
                              ["cls"], lambda _, x: {"cls": torch.zeros(len(x), 2)}, total)

    run(8)
    with pytest.raises(datasets.UnreadableImage, match="5 of 9 images of toy cannot be read, see"):
        run(9)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_the_memory_of_this_machine():
    with open("/proc/meminfo") as file:
        kib = int(file.readline().split()[1])
    assert distributed.total_memory(torch.device("cpu")) == pytest.approx(kib / 2**20, rel=1e-3)


# ---- several processes ---------------------------------------------------------------------------


def test_each_process_reads_its_own_batches_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    model, drawn = make_model(make_encoder()), toy.draw(torch.arange(26), "test", 32)["image"]
    crops = [(image, number) for number, image in enumerate(drawn)]
    paths = [tmp_path / f"{number}.png" for number in range(26)]
    pixels = datasets.Images("x", "test", pixels=drawn)
    files = datasets.Images("x", "test", paths=paths)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own = [n for start in (0, 4, 8, 12, 16, 20, 24)[rank::3] for n in range(start, start + 4)
               if n < 26]
        for n in own:
            Image.fromarray(drawn[n].permute(1, 2, 0).numpy()).save(paths[n])
        sources = [
            data.batches(pixels, 32, 4, rank=rank, world=3),
            data.batches(files, 32, 4, rank=rank, world=3, resize=32, workers=0),
            retrieval.batch_crops(crops, model, 4)]
        for source in sources:
            found = list(source)
            assert torch.cat([index for _, index in found]).tolist() == own
            x = augment.normalize(drawn[own].float() / 255)
            assert torch.allclose(torch.cat([x for x, _ in found]), x, atol=1e-6)
        for path in paths:
            path.unlink(missing_ok=True)
        Image.new("RGB", (32, 32)).save(paths[rank])     # the files of the others do not exist
        images = list(retrieval.landmark_images(paths[:3], None, 32, model))
        assert [number.tolist() for _, number in images] == [[rank]]
    few = datasets.Images("x", "test", pixels=drawn[:4])
    assert list(data.batches(few, 32, 4, rank=1, world=3)) == []
