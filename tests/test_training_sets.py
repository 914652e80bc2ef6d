"""The images that a run trains on and those that it is evaluated with."""
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import mmc
from lib import config, datasets


def test_a_folder_without_splits_is_trained_on_whole_and_evaluated_in_two_parts(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    cfg = SimpleNamespace(data=str(tmp_path), data_root="", img_size=8, batch_size=2, seed=0,
                          workers=0)
    lines = []
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), rank=0, world=1,
                          print0=lines.append)
    loader, bank, queries = data.training_sets(run, [data.View(8)])
    assert lines == [f"{tmp_path}: 10 images; 2 classes: a, b",
                     f"{tmp_path}: no folders for both train and val, so every fifth image is a "
                     f"test image: kNN and probes learn from 8 and are tested on 2; pretraining, "
                     f"which uses no labels, uses all. If images are frames of videos or bursts, "
                     f"make folders train and val"]
    assert len(loader.images) == 10 and (len(bank), len(queries)) == (8, 2)
    assert not set(bank.paths) & set(queries.paths)
    assert bank.classes == queries.classes and bank.split != queries.split        # as kNN needs


@pytest.mark.parametrize("n, world, group, flags", [
    (40, 1, None, "--batch-size 32"), (40, 1, 48, "--batch-size 32 --group-size 32"),
    (200, 1, 48, "--batch-size 192"), (200, 4, 48, "--batch-size 192"),
    (100, 4, 48, "--batch-size 64 --group-size 16"), (1, 2, None, None), (1, 1, 48, "")])
def test_with_fewer_images_than_a_batch_all_flags_are_proposed_at_once(n, world, group, flags):
    found = data.propose_batch_size(SimpleNamespace(accum_iter=1, **dict(
        [("group_size", group)] if group else [])), n, world)
    assert found == (f"try {flags}" if flags else "add images" + (
        ", or use fewer processes or a smaller --accum-iter" if flags is None else ""))
    if flags:                                    # and a run accepts them
        cfg = config.parse(mmc.Config, [*flags.split(), "--data", "synthetic"])
        size = cfg.group_size if group else 1
        assert cfg.batch_size <= n and cfg.batch_size % (world * size) == 0


@pytest.mark.parametrize("name, split", [("cifar10", "train"), ("stl10", "unlabeled")])
def test_a_run_trains_on_its_images_and_is_evaluated_on_labeled_ones(monkeypatch, name, split):
    def load(name, root, split, size, limit, device, hold_out):
        pixels = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
        return datasets.Images(split, (size, limit), pixels=pixels)

    monkeypatch.setattr(datasets, "load_images", load)
    cfg = config.parse(mmc.Config, ["--data", name, "--batch-size", "8", "--group-size", "2"])
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), rank=1, world=2)
    loader, bank, queries = data.training_sets(run, mmc.views(cfg))
    assert [(x.name, x.split[1]) for x in (loader.images, bank, queries)] == [
        (split, None), ("train", 2000), ("test", 500)]
    assert (loader.batch_size, loader.rank, loader.world) == (8, 1, 2)
