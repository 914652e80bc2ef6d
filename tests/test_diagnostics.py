"""The diagnostics: which layer, which images, which part of an image each of them measures."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diagnostics_helpers import options, save_mae, tiny_model
from PIL import Image

import analysis
from diagnostics import (
    attention,
    decoders,
    formulas,
    images,
    inputs,
    patches,
    recorded,
    representations,
)
from diagnostics.inputs import MissingInput
from diagnostics.shared_pass import SharedPass, run_shared_pass
from lib import augment, datasets, toy
from probes import annotations, common


def shared_pass(**means):
    """A SharedPass of two images with these means."""
    means = {name: torch.tensor(x).double() for name, x in means.items()}
    return SharedPass(means, decoder=None, grid=(8, 8), num_images=2)


# ---- images --------------------------------------------------------------------------------------


def test_labels_belong_to_the_images():
    model, opt = tiny_model(), options("--limit", "5", "--batch-size", "3")
    found = list(inputs.iterate_images(model, opt, 5, pixel_labels=True))
    x, index, labels = (torch.cat(parts) for parts in zip(*found))
    expected = toy.draw(index, "test", 32, annotate=True)
    assert index.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(labels, expected["semantic"].long())
    without_labels = list(inputs.iterate_images(model, opt, 5))
    assert torch.allclose(x, torch.cat([x for x, *_ in without_labels]), atol=1e-6)
    assert all(labels is None for *_, labels in without_labels)


def write_voc(root):
    """VOC's layout: two dark images with a bright square, an aeroplane, whose border is void."""
    top = root / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (top / name).mkdir(parents=True)
    image, labels = np.full((2, 80, 120, 3), 20, np.uint8), np.zeros((2, 80, 120), np.uint8)
    image[:, 20:60, 40:80], labels[:, 18:62, 38:82], labels[:, 20:60, 40:80] = 230, 255, 1
    for part in ("train", "val"):
        (top / f"ImageSets/Segmentation/{part}.txt").write_text("a\nb\n")
    for i, name in enumerate("ab"):
        Image.fromarray(image[i]).save(top / f"JPEGImages/{name}.jpg", quality=95)
        Image.fromarray(labels[i]).save(top / f"SegmentationClass/{name}.png")
    return ["--data", "voc", "--data-root", str(root)]


def test_images_and_labels_of_files_are_cropped_alike(tmp_path):
    model, opt = tiny_model(), options("--limit", "4", *write_voc(tmp_path))
    [(x, _, labels)] = inputs.iterate_images(model, opt, 4, pixel_labels=True)
    assert x.shape == (2, 3, 32, 32) and set(labels.unique().tolist()) == {-1, 0, 1}
    bright = x.mean(1) > 0
    assert (bright[labels == 1]).all() and not bright[labels == 0].any()


def test_classes_of_a_data_set_without_background_start_at_1(monkeypatch):
    labels = torch.tensor([[0, 255]] * 2, dtype=torch.uint8)
    labels = labels.repeat_interleave(18, 0).repeat_interleave(18, 1)
    items = [SimpleNamespace(image=torch.zeros(3, 36, 36, dtype=torch.uint8), labels=labels)]
    monkeypatch.setattr(annotations, "segmentation", lambda *_: iter(items))
    found = inputs.iterate_annotated_images(tiny_model(), options("--data", "cityscapes"), 1)
    [(*_, labels)] = found
    assert labels.unique().tolist() == [-1, 1]


def test_a_data_set_without_pixel_labels_names_those_that_have_them():
    assert "choose --data toy or" in inputs.why_no_pixel_labels("cifar10", None)
    assert inputs.why_no_pixel_labels("toy", None) is None


def test_all_models_get_the_same_images(tmp_path):
    """With bicubic resizing, also of methods whose images evaluate.py resizes bilinearly."""
    write_voc(tmp_path)
    for i in range(10):
        noise = np.random.default_rng(i).integers(256, size=(60, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    model = tiny_model()
    for flags in (("--data", str(tmp_path)), ("--data", "voc", "--data-root", str(tmp_path))):
        x, other = (next(inputs.iterate_images(m, options(*flags), 2))[0]
                    for m in (model, replace(model, interpolation="bilinear")))
        assert torch.equal(x, other) and x.std() > 0.1


def test_number_of_images_is_the_limit_or_the_default_of_the_diagnostic(monkeypatch):
    class Limit(Exception):
        pass

    def iterate_images(model, opt, limit, *_, **__):
        raise Limit(limit)

    monkeypatch.setattr(inputs, "iterate_images", iterate_images)
    small, wide = tiny_model(), tiny_model(embed_dim=600, depth=1)       # wide: 4 D above 2048
    for name, function, model, default in (
            ("shared pass", lambda *given: run_shared_pass(*given, {"nmi"}), small, 256),
            ("sv_images", representations.measure_sv_images, small, 2048),
            ("sv_images", representations.measure_sv_images, wide, 2400),
            ("patch_retrieval", patches.show_patch_retrieval, small, 1000),
            ("feature_variance", representations.measure_feature_variance, small, 64),
            ("prompt_heatmap", patches.show_prompt_heatmap, small, 256)):
        for flags, expected in (((), default), (("--limit", "9"), 9)):
            with pytest.raises(Limit) as limit:
                function(model, options(*flags))
            assert limit.value.args == (expected,), name


def test_at_the_end_of_toy_there_are_fewer_images():
    model = tiny_model()
    assert len(inputs.load_first_images(model, options("--image", "1999"), 2)) == 1
    with pytest.raises(inputs.MissingInput, match="beyond the end"):
        inputs.load_first_images(model, options("--image", "2000"), 1)


def test_image_beyond_the_limit_and_beyond_the_data_set(tmp_path):
    what = "kmeans patch_retrieval prompt_heatmap nmi".split()
    model = tiny_model()
    flags = ["--limit", "4", "--what", *what]
    found, missing = analysis.run_diagnostics(model, options("--image", "4", *flags))
    queries = found["patch_retrieval"]["queries"]            # toy has more images than the limit
    assert not missing and queries == [49 * i + 24 for i in (4, 5, 6)]
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "train/0.png").touch()                       # not read
    for i in range(5):
        Image.new("RGB", (40, 40), (50 * i, 0, 0)).save(tmp_path / f"val/{i}.png")
    flags += ["--data", str(tmp_path)]
    found, missing = analysis.run_diagnostics(model, options("--image", "4", *flags))
    assert not missing and found["patch_retrieval"]["queries"] == [4 * 49 + 24]
    found, missing = analysis.run_diagnostics(model, options("--image", "100", *flags))
    assert set(found) == {"nmi"} and set(missing) == {*what} - {"nmi"}
    assert all(reason.startswith("--image 100 is beyond the end of the data set")
               for reason in missing.values())


def test_diagnostics_run_on_a_data_set_of_annotated_files(tmp_path):
    what = "intra_inter prompt_heatmap adjacent_count attention_distance tsne".split()
    model, opt = tiny_model(), options("--limit", "4", *write_voc(tmp_path), "--what", *what)
    found, missing = analysis.run_diagnostics(model, opt)
    assert not missing and found["intra_inter"]["pairs"][0] > 0
    assert found["prompt_heatmap"]["prompts"] == 2
    tile = found["prompt_heatmap"]["image_rows"][0].tiles[0]
    (target, _), (above_threshold, _) = tile.outlines
    place = int(tile.star[1]), int(tile.star[0])
    assert target[place] and above_threshold[place]


# ---- attention -----------------------------------------------------------------------------------


def test_attention_distance_of_each_block():
    found = attention.measure_attention_distance(
        tiny_model(), options(), shared_pass(attention_distance=[[0, 4], [8, 8], [4, 8]]))
    assert found["pixels"].tolist() == [2, 8, 6] and found["patches"].tolist() == [0.5, 2, 1.5]
    assert found["uniform"] == pytest.approx(16.5459, rel=1e-5)


def test_nmi_of_each_block_and_density_of_block_3():
    found = attention.measure_nmi(tiny_model(), options(), shared_pass(
        nmi=[[0, 0], [0, 1], [1, 1]], class_token_attention=[[0, 4], [8, 8], [4, 8]]))
    assert found["nmi"].tolist() == [0, 0.5, 1] and found["std_over_heads"].tolist() == [0, 0.5, 0]
    assert found["density_at"][found["density"].argmax()] == pytest.approx(1, abs=0.01)
    assert found["density_of"].tolist() == [1, 1]
    assert found["class_token_attention"].tolist() == [2, 8, 6]


def test_attention_to_the_class_token_needs_a_class_token():
    for class_token in (True, False):
        model, opt = tiny_model(class_token=class_token), options("--limit", "2", "--what", "nmi")
        found = analysis.run_diagnostics(model, opt)[0]["nmi"]
        assert ("class_token_attention" in found) == class_token


def test_attention_maps_are_those_of_the_queries(monkeypatch):
    model, opt = tiny_model(), options("--limit", "1")
    own, uniform = torch.eye(65).expand(1, 3, 65, 65), torch.full((1, 3, 65, 65), 1 / 65)
    weights = {0: own, 1: uniform, 2: uniform}
    monkeypatch.setattr(model.encoder, "layers", lambda *_, **__: (None, weights))
    found = attention.show_attention_maps(model, opt)
    assert found["blocks"] == [1, 2, 3] and found["queries"] == [(4, 4), (2, 1)]
    maps = found["maps"]                                     # (queries x blocks, 8, 8)
    assert torch.allclose(maps.sum((1, 2)), torch.ones(6))
    assert maps[0, 4, 4] > 0.999 and maps[3, 2, 1] > 0.999   # block 1: each attends to itself
    assert torch.allclose(maps[[1, 2, 4, 5]], torch.full((4, 8, 8), 1 / 64))
    image, *tiles = found["image_rows"][0].tiles
    assert [box[:3] for box in image.boxes] == [(16, 16, 4), (4, 8, 4)]          # in pixels
    assert tiles[0].boxes[0][:3] == (4, 4, 1) and tiles[3].boxes[0][:3] == (1, 2, 1)
    assert abs(int(found["class_token_60_percent_on"][0]) - 39) <= 1     # of 64 equal weights


# ---- representations -----------------------------------------------------------------------------


def test_curves_over_depth_use_the_states_after_blocks():
    model, opt = tiny_model(), options()
    states = [[i, i, 3 * i] for i in range(7)]               # z_0, u_1, z_1, ... z_3
    found = representations.measure_fourier(model, opt, shared_pass(fourier=states))
    assert found["highest"].tolist() == [0, 4, 8, 12]
    found = representations.measure_token_similarity(
        model, opt, shared_pass(token_similarity=range(7)))
    assert found["after_attention"].tolist() == [1, 3, 5]
    assert found["after_block"].tolist() == [0, 2, 4, 6]
    found = representations.measure_token_transform(
        model, opt, shared_pass(common_update=[[0.25, 4]] * 3))
    assert found["common"].tolist() == [0.25] * 3 and found["variance_ratio"].tolist() == [4] * 3


def test_spectra_are_relative_to_the_second_value():
    states = [[9 + i, -i, -2 * i, -4 * i, -5 * i, -6 * i] for i in range(7)]
    shared = replace(shared_pass(sv_tokens=states), grid=(2, 3))
    found = representations.measure_sv_tokens(tiny_model(), options(), shared)
    assert found["ranks"] == [2, 4]
    assert formulas.plotted_ranks(36, 35) == (12, 24) and formulas.plotted_ranks(4, 3) == (1, 2)
    assert formulas.plotted_ranks(129, 128) == formulas.plotted_ranks(196, 195) == (64, 128)
    assert formulas.plotted_ranks(196, 95) == (31, 63)       # a narrow network
    assert found["at_first"].tolist() == [0] * 4             # rank 2: the one that is subtracted
    assert found["at_second"].tolist() == [0, -6, -12, -18]
    assert found["log_second_value"].tolist() == [0, -2, -4, -6]


def test_centered_similarity_is_added_with_the_flag():
    model, flags = tiny_model(), ["--limit", "8", "--what", "token_similarity"]
    centered, plain = (analysis.run_diagnostics(model, options(*more, *flags))[0][flags[-1]]
                       for more in (["--subtract-mean"], []))
    assert len(centered["centered_after_block"]) == 4 and "centered_after_block" not in plain
    assert torch.equal(plain["after_block"], centered["after_block"])


@torch.no_grad()
def test_spectrum_over_images_is_of_mean_patches():
    model, opt = tiny_model(), options("--limit", "40")
    [(x, *_)] = inputs.iterate_images(model, opt, 40)
    z = model.encoder.layers(x, [1], norm=False)[0][0]
    z = model.encoder.split(z)[1].mean(1).double()
    expected = formulas.relative_to_second(torch.linalg.eigvalsh(z.T.cov()).flip(0).log())
    found = representations.measure_sv_images(model, opt)["delta"]
    assert torch.allclose(found[2], expected, atol=1e-3)


def test_curves_continue_through_the_decoder():
    def curves(depth, slope, nmi):
        return shared_pass(fourier=[[i, (slope + 1) * i] for i in range(2 * depth + 1)],
                           nmi=[[0, nmi]] * depth, attention_distance=[[nmi, 2 * nmi]] * depth)
    shared = curves(3, 1, 1)
    shared.decoder = curves(2, 3, 4).means
    found = representations.measure_decoder(tiny_model(), options(), shared)
    assert found["depth"] == [0, 1, 2, 3] and found["decoder_depth"] == [3, 4, 5]
    assert found["block"] == [1, 2, 3] and found["decoder_block"] == [4, 5]
    assert found["highest"].tolist() == [0, 2, 4, 6]
    assert found["decoder_highest"].tolist() == [0, 6, 12]
    assert found["nmi"].tolist() == [0.5] * 3 and found["decoder_nmi"].tolist() == [2, 2]
    assert found["pixels"].tolist() == [1.5] * 3 and found["decoder_pixels"].tolist() == [6, 6]


def test_token_transform_uses_the_window():
    """With a window of one patch and no class token the last block transforms each token alone."""
    model, opt = tiny_model(class_token=False, window=1), options("--limit", "2")
    shared = run_shared_pass(model, opt, {"common_update"})
    found = representations.measure_token_transform(model, opt, shared)
    for block in model.encoder.blocks:                       # each patch attends to itself
        block.attn.forward = lambda x, *_, own=block.attn: own.proj(
            F.linear(x, own.qkv.weight, own.qkv.bias).chunk(3, 2)[2])
    alone = representations.measure_token_transform(model, opt, shared)
    torch.testing.assert_close(found["plane"], alone["plane"], atol=1e-4, rtol=1e-4)
    assert found["center_ratio"] == pytest.approx(alone["center_ratio"], rel=1e-4)
    control = representations.measure_token_transform(tiny_model(class_token=False), opt, shared)
    assert control["center_ratio"] != pytest.approx(alone["center_ratio"], rel=1e-2)


def test_center_ratio_is_the_distance_of_images_after_attention_over_before():
    model, opt = tiny_model(), options("--limit", "2")
    shared, last = run_shared_pass(model, opt, {"common_update"}), model.encoder.blocks[2]
    last.norm1, attn = torch.nn.Identity(), last.attn
    for factor, expected in ((0, 1), (1, 2)):                # attention adds nothing, the token
        attn.forward = lambda x, *_, factor=factor: factor * x + 0 * attn.proj(x)
        found = representations.measure_token_transform(model, opt, shared)
        assert found["center_ratio"] == pytest.approx(expected)


def test_feature_variance_views_are_crops_and_half_masked_images(monkeypatch):
    model, opt, seen = tiny_model(), options("--limit", "1", "--copies", "6"), []

    def layers(x, *_, **__):
        seen.append(x)
        return [torch.zeros(len(x), 65, 24)], {}

    monkeypatch.setattr(model.encoder, "layers", layers)
    representations.measure_feature_variance(model, opt)
    [(x, *_)] = inputs.iterate_images(model, opt, 1)
    crops, masked = seen
    hidden = F.interpolate((masked != x).all(1, keepdim=True).float(), (8, 8)).flatten(1) > 0
    assert torch.equal(hidden, inputs.sample_block_masks(6, 8, opt.seed, 0))
    assert (masked == x).all(1).float().mean((1, 2)).tolist() == [0.5] * 6
    assert not torch.equal(masked[0] == x[0], masked[1] == x[0])         # not the same half
    assert all((crop != other).any() for crop, other in zip(crops, crops[1:]))
    assert crops.std((2, 3)).mean() > 0.6 * x.std((2, 3)).mean()         # large parts of the image


def test_masks_are_blocks_and_even_over_the_grid():
    for g in (1, 3, 8, 14):
        masks = inputs.sample_block_masks(2000, g, 0)
        assert masks.shape == (2000, g * g) and (masks.sum(1) == g * g // 2).all()
    mask = masks.view(-1, 14, 14)
    assert (mask.float().mean(0) - 0.5).abs().max() < 0.06               # also at the border
    edges = (mask[:, :, 1:] != mask[:, :, :-1]).float().mean()
    shuffled = masks[:, torch.randperm(196, generator=torch.Generator().manual_seed(0))]
    shuffled = shuffled.view(-1, 14, 14)
    assert edges < 0.25 and (shuffled[:, :, 1:] != shuffled[:, :, :-1]).float().mean() > 0.4


def test_feature_variance_uses_all_images_and_names_the_token():
    opt = options("--limit", "66", "--copies", "2")
    for model, token in ((tiny_model(), "class token"),
                         (tiny_model(class_token=False), "mean patch token")):
        found = representations.measure_feature_variance(model, opt)
        assert found["images"] == 66 and list(found["bars"])[0] == f"{token}, random crops"


# ---- patches -------------------------------------------------------------------------------------


def test_mean_and_standard_deviation_of_neighbor_counts():
    fractions = [[0.5, 0, 0, 0, 0.5, 0, 0, 0, 0]]
    found = patches.measure_adjacent_count(tiny_model(), options(), shared_pass(
        similar_neighbors=fractions, similar_neighbors_by_state=range(7)))
    assert found["features_mean"] == 2 and found["features_std"] == 2


def test_only_patches_with_a_label_have_neighbors_with_the_same_label(monkeypatch):
    """Three images of 8 x 8 patches: one class; lower half unknown; everything unknown."""
    labels = torch.zeros(3, 32, 32, dtype=torch.long)
    labels[1, 16:], labels[2] = -1, -1
    monkeypatch.setattr(inputs, "iterate_images", lambda *_, **__: (
        (torch.zeros(n, 3, 32, 32), None, part) for n, part in ((2, labels[:2]), (1, labels[2:]))))
    model, opt = tiny_model(), options("--limit", "3", "--what", "adjacent_count")
    found = analysis.run_diagnostics(model, opt)[0]["adjacent_count"]
    # 8 x 8: 420 of 512; 4 x 8: 4 corners with 3 neighbors, 16 border patches with 5, 12 with 8
    assert found["labels_mean"] == pytest.approx((420 / 64 + (4 * 3 + 16 * 5 + 12 * 8) / 32) / 2)
    assert found["labels_fraction"].sum() == pytest.approx(1) and found["labels_fraction"][0] == 0
    labels[:] = -1
    found = analysis.run_diagnostics(model, opt)[0]["adjacent_count"]
    assert np.isnan(found["labels_mean"])


def test_pair_histograms_become_densities_and_means():
    pairs = torch.zeros(1, 2, 201)                           # means of two images
    pairs[0, 0, 150], pairs[0, 0, -1], pairs[0, 1, 100], pairs[0, 1, -1] = 10, 5, 20, 2
    found = patches.measure_intra_inter(tiny_model(), options(), shared_pass(pairs=pairs.tolist()))
    assert (found["intra"], found["inter"]) == (0.5, pytest.approx(0.1))
    assert found["pairs"] == [20, 40]
    assert (0.01 * found["densities"].sum(1)).tolist() == pytest.approx([1, 1])      # areas


@torch.no_grad()
def test_kmeans_and_pca_are_of_normalized_patches_after_the_norm():
    model, opt = tiny_model(), options("--limit", "6")
    x = inputs.load_first_images(model, opt, 6)
    z = F.normalize(model.encoder.split(model.encoder(x))[1], dim=-1)
    segments = patches.show_kmeans(model, opt)["segments"]
    assert torch.equal(segments[0].flatten(), formulas.kmeans(z[0], seed=0)[0])
    rgb = torch.tensor(patches.show_pca(model, opt)["image_rows"][1].tiles[0].image)
    v, _ = formulas.principal_components(z.flatten(0, 1).double())
    for color, component in zip(rgb.flatten(0, 1).T, (z[0].double() @ v.T).T):
        assert torch.corrcoef(torch.stack([color, component]))[0, 1] > 0.9


def test_prompt_scores_of_equal_tokens_are_those_of_the_whole_image(tmp_path, monkeypatch):
    model, opt = tiny_model(), options("--limit", "2", *write_voc(tmp_path))

    def scores(z):
        monkeypatch.setattr(inputs, "encode_patches", lambda *_: z)
        return patches.show_prompt_heatmap(model, opt)

    found = scores(torch.ones(1, 64, 4).expand(2, 64, 4) / 2)
    assert found["best"] == pytest.approx(found["whole_image"]) and found["auc"] == 0.5
    alone = scores(torch.eye(64).expand(2, 64, 64))
    assert alone["auc"] == 0.5                           # the prompt is left out
    assert alone["best"] == pytest.approx(alone["prompt_alone"])
    [(*_, labels)] = inputs.iterate_images(model, opt, 2, pixel_labels=True)
    expected = (labels[0] == 1).sum() / (labels[0] >= 0).sum()           # void does not count
    assert found["whole_image"] == pytest.approx(expected.item())
    assert found["prompt_alone"] == pytest.approx(4 * 4 / (labels[0] == 1).sum().item())
    cover = F.avg_pool2d((labels == 1).float(), 4).flatten(1)            # (2, 64)
    perfect = F.normalize(torch.stack([cover, 1 - cover], 2), dim=2)
    found = scores(perfect)                                              # control
    assert found["auc"] > 0.95 and found["best"] > found["whole_image"] + 0.3


def test_an_object_that_covers_less_than_half_of_its_deepest_patch_has_no_prompt(monkeypatch):
    model = tiny_model(img_size=224, patch_size=16)
    labels, x = torch.zeros(2, 224, 224, dtype=torch.long), torch.zeros(2, 3, 224, 224)
    labels[:, 97:103, 97:103] = 1                            # between the centers of patches
    labels[1, 160:192, 160:165] = 2                          # covers a third of its patches
    labels[1, 32:41, 32:48] = 3                              # and more than half of one
    labels[1, 64:77, 64:74] = 4                              # as does this one, a little smaller
    monkeypatch.setattr(inputs, "iterate_images", lambda *_, **__: [(x, torch.arange(2), labels)])
    monkeypatch.setattr(inputs, "encode_patches", lambda *_: torch.eye(196).expand(2, 196, 196))
    found = patches.show_prompt_heatmap(model, options("--image", "1"))
    assert (found["prompts"], found["skipped"]) == (2, 3)
    [image, heatmap] = found["image_rows"][0].tiles
    assert image.star == (40, 40) and (image.outlines[0][0] == (labels[1] == 3)).all()
    assert heatmap.image.flatten().argmax() == 2 * 14 + 2
    found = patches.show_prompt_heatmap(model, options("--image", "0"))
    assert found["image_rows"][0].tiles[0].star == (40, 40)  # the first image has no prompt
    labels[1] = 0
    with pytest.raises(MissingInput, match="no image from there on has an object"):
        patches.show_prompt_heatmap(model, options())


def test_without_pixel_labels_only_the_images_shown_are_encoded(monkeypatch):
    seen, opt = [], options("--data", "synthetic", "--batch-size", "2")

    def encode_patches(model, x, batch_size):
        seen.append(len(x))
        return torch.eye(64).expand(2, 64, 64)

    monkeypatch.setattr(inputs, "encode_patches", encode_patches)
    [row] = patches.show_prompt_heatmap(tiny_model(), opt)["image_rows"]
    assert seen == [2, 2] and len(row.tiles) == 8            # four images and their heat maps


@torch.no_grad()
def test_retrieved_crops_are_the_nearest_of_other_images():
    model, opt = tiny_model(), options("--limit", "6")
    found = patches.show_patch_retrieval(model, opt)
    assert found["queries"] == [24, 49 + 24, 98 + 24]        # the centers of the first three
    images = augment.denormalize(inputs.load_first_images(model, opt, 6))
    crops = augment.normalize(formulas.extract_windows(images))
    crops = model.encoder.split(model.encoder(crops))[1].mean(1)
    owner = torch.arange(6 * 49) // 49
    for query, rows, similarity in zip(
            *(found[key] for key in ("queries", "encoded_crop", "encoded_similarity"))):
        cosine = F.cosine_similarity(crops[query], crops)
        assert (owner[rows] != owner[query]).all()
        assert torch.allclose(similarity, cosine[rows], atol=2e-3)
        largest = cosine[owner != owner[query]].max().item()
        assert similarity[0] == pytest.approx(largest, abs=2e-3)


@torch.no_grad()
def test_tsne_is_of_the_last_block_before_the_norm(monkeypatch):
    model, opt, calls = tiny_model(), options(), []
    layers = model.encoder.layers

    def record(x, *args, **settings):
        calls.append((args, settings))
        return layers(x, *args, **settings)

    monkeypatch.setattr(formulas, "tsne", lambda z, **_: z[:, :2])
    monkeypatch.setattr(model.encoder, "layers", record)
    found = patches.measure_tsne(model, opt)
    assert calls == [(([2],), dict(norm=False))] and found["position"].shape == (18 * 64, 2)


def test_tsne_reads_six_images_of_three_classes_of_all_files(tmp_path, monkeypatch):
    """With an evenly spread limit of 1000 of the 1500 files, a class would keep four of its six."""
    model, opt = tiny_model(), options("--data", str(tmp_path))
    for c in range(250):
        (tmp_path / f"val/{c:03}").mkdir(parents=True)
        for i in range(6 if c > 1 else 5):
            (tmp_path / f"val/{c:03}/{i}.png").touch()
    (tmp_path / "train/000").mkdir(parents=True)
    (tmp_path / "train/000/0.png").touch()
    read = []

    def read_image(path):
        read.append(path)
        return Image.new("RGB", (40, 40), (9 * int(path[-7:-6]), 0, 0))      # color by class

    monkeypatch.setattr(datasets, "read_image", read_image)
    monkeypatch.setattr(formulas, "tsne", lambda z, **_: z[:, :2])
    found = patches.measure_tsne(model, opt)
    assert [path[-9:] for path in read] == [
        f"{c:03}/{i}.png" for c in (2, 3, 4) for i in range(6)]
    assert found["label"].tolist() == [c for c in (2, 3, 4) for _ in range(6 * 64)]
    assert found["purity_class"] > 0.9
    for c in range(4, 250):
        (tmp_path / f"val/{c:03}/0.png").unlink()
    common.load_split.cache_clear()
    with pytest.raises(MissingInput, match="3 classes with 6 test images"):
        patches.measure_tsne(model, opt)


# ---- images of the pretext tasks -----------------------------------------------------------------


def test_views_show_the_fraction_that_their_title_states():
    found = images.show_views(tiny_model(), options("--limit", "6"))
    tiles = {tile.title: tile.image for tile in found["image_rows"][0].tiles}
    for name, fraction in (("masked, 75%", 0.75), ("visible, 25%", 0.25)):
        same = (tiles[name] == tiles["image"]).all(-1).mean()
        assert same == pytest.approx(fraction, abs=0.02), name
    for name, ratio in (("75% noise", 0.75), ("30% of another image", 0.3)):   # in rectangles, of
        changed = (tiles[name] != tiles["image"]).any(-1).mean()               # which the last one
        assert ratio - 0.05 < changed < ratio + 0.09, name                     # may exceed it


def test_reconstruction_error_is_of_masked_pixels_in_colors_of_0_to_1(monkeypatch):
    model, opt = tiny_model(), options("--limit", "1")
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :8] = True
    monkeypatch.setattr(decoders, "mask_and_reconstruct", lambda model, x, seed: (
        mask, x, lambda block: x - (block + 1) ** 2 * mask))             # 1, 4, 9 too dark
    found = images.show_layer_reconstruction(model, opt)
    std = sum(model.std) / 3
    assert found["error_masked"].tolist() == pytest.approx([std, 4 * std, 9 * std])
    assert found["change"].tolist() == pytest.approx([3 * std / 4, 5 * std / 4])


# ---- recorded numbers ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A model and write(lines), which writes results.jsonl next to its checkpoint."""
    model, _ = save_mae(tmp_path / "mae")

    def write(lines):
        own = dict(data="toy", checkpoint=model.source.path, branch="base", step=1, settings={})
        text = "".join(json.dumps(own | line) + "\n" for line in lines)
        (tmp_path / "mae/results.jsonl").write_text(text)
    return model, write


def test_layerwise_reads_the_result_of_this_data_set_and_these_weights(run):
    model, write = run
    metrics = {"block 2 patch": {"top-1": 7.0}, "block 1 patch": {"top-1": 5.0}}
    other = dict(task="layerwise", metrics={"block 1 patch": {"top-1": 99.0}})
    write([dict(task="layerwise", metrics=metrics), other | dict(data="cifar10"),
           other | dict(step=2), other | dict(branch="teacher")])
    found = recorded.read_layerwise(model, options())
    assert (found["block"], found["top1"]) == ([1, 2], [5.0, 7.0])
    model.source.path = model.source.path.replace("encoder.pt", "other.pt")          # control
    with pytest.raises(MissingInput, match="--task layerwise"):
        recorded.read_layerwise(model, options())


def test_frequency_noise_and_shape_bias_of_results(run):
    model, write = run
    write([dict(task="frequency_noise",
                metrics={"cls": {"clean": 50.0, "0.1 pi": 3.0, "1 pi": 8.0}}),
           dict(task="shape_bias",
                metrics={"cls": {"shape bias": 60.0, "either": 50.0, "cat": 70.0, "dog": None}})])
    found = recorded.read_frequency_noise(model, options())
    assert (found["frequency"], found["change"]) == ([0.1, 1.0], [-3.0, -8.0])
    found = recorded.read_shape_bias(model, options())
    assert found["bars"] == {"cat": 70.0} and (found["shape_bias"], found["either"]) == (60, 50)


def test_knn_of_results_is_that_of_the_smallest_k_and_of_no_baseline(run):
    model, write = run
    line = dict(task="knn", metrics={"cls": {"k=10": 30.0, "k=20": 20.0}})
    write([line | dict(checkpoint=None)])                    # a baseline, evaluated together
    with pytest.raises(MissingInput, match="--task knn"):
        recorded.read_knn(model, options())
    write([line])
    assert recorded.read_knn(model, options())["bars"] == {"cls": 30}


def test_linear_and_fine_tuned_accuracies_are_of_the_latest_results(run):
    model, write = run
    lines = [dict(task="linear", metrics={"cls": {"top-1": 40.0}}, settings=dict(recipe="mae")),
             dict(task="linear", metrics={"cls": {"top-1": 50.0}}, settings=dict(recipe="dino"))]
    write(lines)
    with pytest.raises(MissingInput, match="--task finetune"):
        recorded.read_linear_finetune(model, options())
    tuned = [dict(task="finetune", metrics={"patch": {"top-1": 80.0, "last epoch": x}},
                  settings=dict(recipe="light", reinit=reinit))
             for x, reinit in ((70.0, None), (10.0, "last:2"))]
    write([*lines, tuned[1]])
    with pytest.raises(MissingInput, match="with --reinit"):
        recorded.read_linear_finetune(model, options())
    write([*lines, *tuned])
    found = recorded.read_linear_finetune(model, options())
    assert (found["linear"], found["finetuned"]) == ([50.0], [70.0])
    assert found["settings_compared"]["recipe"] == ("dino", "light")
    assert "reinit" in found["settings_compared"]            # a flag of finetune only


def test_local_attention_compares_windows_with_the_settings_of_the_latest(run):
    model, write = run                                       # tiny_model: 8 x 8 patches

    def line(top1, task="linear", metric="top-1", **settings):
        return dict(task=task, metrics={"cls": {metric: top1}},
                    settings=dict(epochs=None, img_size=32, workers=2) | settings)

    for lines in ([line(60.0), line(50.0, "finetune", "last epoch")],
                  [line(60.0, window=3), line(50.0, window=5)]):         # none without a window
        write(lines)
        with pytest.raises(MissingInput, match="--window 3, 5"):
            recorded.read_local_attention(model, options())
    write([line(10.0, epochs=1, window=7), line(61.0), line(40.0, window=3), line(60.0, workers=4),
           line(50.0, "finetune", "last epoch")])
    found = recorded.read_local_attention(model, options())
    assert found["linear_window"] == [3, 15] and found["linear"] == [40, 60]     # 60: the latest
    assert "finetune" not in found and found["settings_compared"]["img_size of linear"] == 32
    write([line(x, "finetune", "last epoch", img_size=64, window=w)
           for w, x in ((None, 70.0), (5, 80.0))])
    found = recorded.read_local_attention(model, options())
    assert found["finetune_window"] == [5, 31] and found["finetune"] == [80, 70]
    write([line(60.0, k=[5]), line(40.0, window=3)])         # --k is a flag of other tasks
    assert recorded.read_local_attention(model, options())["linear"] == [40, 60]


def test_results_of_another_window_are_left_out(run):
    model, write = run
    lines = [dict(task="knn", metrics={"cls": {"k=10": x}}, settings=settings) for x, settings in (
        (30.0, {}), (20.0, {"window": 3}))]              # the first line is older than --window
    write(lines)
    assert recorded.read_knn(model, options())["bars"] == {"cls": 30}
    assert recorded.read_knn(model, options("--window", "3"))["bars"] == {"cls": 20}
    with pytest.raises(MissingInput, match="--task knn --data toy --window 5"):
        recorded.read_knn(model, options("--window", "5"))


def test_reinit_compares_runs_with_the_settings_of_the_latest(run):
    model, write = run

    def line(top1, **settings):                          # top-1: of the best epoch
        return dict(task="finetune", metrics={"patch": {"top-1": 99.0, "last epoch": top1}},
                    settings=dict(reinit=None, lr=[], workers=2) | settings)

    lines = [line(60.0), line(40.0, reinit="last:2")]
    write(lines)
    found = recorded.read_reinit(model, options())
    assert found["last_change"] == [0, -20] and found["first_change"] == [0]
    lines.append(line(90.0, epochs=50))
    write(lines)
    with pytest.raises(MissingInput, match="settings of the latest"):
        recorded.read_reinit(model, options())
    lines.append(line(90.0, epochs=50, reinit="first:1", lr=[1e-3]))
    write(lines)
    with pytest.raises(MissingInput, match="settings of the latest"):
        recorded.read_reinit(model, options())
    lines.append(line(90.0, epochs=50, reinit="first:1", workers=4))         # without effect
    write(lines)
    found = recorded.read_reinit(model, options())
    assert found["last_change"] == [0] and found["first_change"] == [0, 0]


def test_accuracy_similarity_is_of_the_last_tokens(run):
    model, write = run
    write([dict(task="linear", metrics={"cls": {"top-1": 40.0}})])
    found = recorded.read_accuracy_similarity(model, options(), shared_pass(
        final_similarity=[0.25]))
    assert found["linear"] == [40.0] and found["similarity"].tolist() == [0.25]
