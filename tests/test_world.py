"""benchmarks/world.py and supervised.py: what is measured of the built-in data set."""
import torch

from benchmarks import results, supervised, world
from lib import checkpoints, datasets


def colored_images(n, seed, split):
    """Two classes, red and blue noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    pixels = torch.randint(0, 100, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(n), 2 * labels] += 20
    return datasets.Images("colors", split, ["red", "blue"], labels, pixels)


def test_pixel_baselines_find_classes_of_color_and_none_in_noise():
    train, test = colored_images(200, 0, "train"), colored_images(40, 1, "test")
    rows = world.score_pixels(train, test)
    assert rows["mean color, Euclidean distance"]["kNN"] == 100
    assert rows["pixels, cosine about the mean image"]["kNN"] > 90
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    shuffled = datasets.Images("colors", "train", train.classes, train.labels, train.pixels[order])
    for row in world.score_pixels(shuffled, test).values():                    # negative control
        assert 20 < row["kNN"] < 80


def test_the_supervised_network_is_saved_like_a_run(tmp_path, monkeypatch, capsys):
    load = datasets.load_images
    monkeypatch.setattr(datasets, "load_images", lambda *given, **k: load(*given, limit=128, **k))
    accuracy, seconds = supervised.train(3, 0, tmp_path)
    assert 0 <= accuracy <= 100 and seconds > 0
    encoder = checkpoints.load_encoder(tmp_path / "encoder.pt", quiet=True)
    assert encoder.source.method == "supervised" and encoder.source.step == 3
    (tmp_path / "results.log").write_text(capsys.readouterr().out)
    described = results.describe_run(tmp_path)                       # its row of the tables
    assert described["steps"] == 3 and described["precision"] in ("bf16", "fp32")


def test_a_classifier_is_learned(tmp_path, monkeypatch):
    """40 steps on two classes of color: far above chance; with lr 0, not."""
    monkeypatch.setattr(datasets, "load_images", lambda name, root, split, *a, **k:
                        colored_images(128, int(split == "test"), split))
    monkeypatch.setattr(supervised, "PEAK_LR", 1e-2)
    assert supervised.train(40, 0, tmp_path)[0] > 90
    monkeypatch.setattr(supervised, "PEAK_LR", 0.0)
    assert supervised.train(2, 0, tmp_path)[0] < 90
