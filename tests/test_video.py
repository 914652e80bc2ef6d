"""Video object segmentation: a planted video is followed to the pixel, and propagation equals dense
arithmetic."""
import json
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import make_encoder, make_model, make_options, unpack_real

import evaluate
from lib import augment, metrics, progress
from probes import annotations, patches, video


@pytest.fixture(autouse=True)
def seeded_without_gradient():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def small_model(**changes):
    return make_model(make_encoder(embed_dim=24), **changes)


def moving_square(n_frames=12):
    """A video of a square that moves, and of one that does not."""
    masks = torch.zeros(n_frames, 80, 96, dtype=torch.uint8)
    for t in range(n_frames):
        masks[t, 16 + 8 * (t % 3):40 + 8 * (t % 3), 4 * t // 8 * 8:4 * t // 8 * 8 + 24] = 1
    masks[:, 64:, 80:] = 2
    return SimpleNamespace(name="square", frames=masks[:, None].expand(-1, 3, -1, -1),
                           masks=masks, objects=2)


def test_settings_are_those_of_dinos_script():
    assert (video.MEMORY, video.RADIUS, video.NEIGHBORS, video.TEMPERATURE) == (7, 12, 5, 0.1)
    assert video.DAVIS_STD == (0.228, 0.224, 0.225)


def test_a_planted_video_is_followed_to_the_pixel():
    """Patches of one pixel, as larger ones lose corners when their maps are upsampled."""
    item, g = moving_square(), torch.Generator().manual_seed(0)
    item.frames, item.masks = item.frames[..., ::8, ::8], item.masks[:, ::8, ::8]

    def encode(image):                                       # a direction for every object
        return F.one_hot(image[0].long(), 3).float()

    def noise(image):
        return F.normalize(torch.randn(10, 12, 16, generator=g), dim=2)

    j = []
    for features in (encode, noise):
        masks = torch.stack([item.masks[0], *video.propagate_masks(item, features, 1, 4)])
        j.append(metrics.score_video(masks, item.masks)[0].mean().item())
    assert j[0] == 1 and j[1] < 0.6


def test_propagation_equals_the_published_dense_arithmetic():
    rows, columns, D, n_frames, C, radius = 6, 7, 5, 3, 3, 2
    tokens, known = (F.normalize(torch.randn(n, rows, columns, D), dim=3) for n in (1, n_frames))
    labels = torch.rand(n_frames, rows, columns, C)
    y, x = (v.flatten() for v in torch.meshgrid(torch.arange(rows), torch.arange(columns),
                                                indexing="ij"))
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    weight = (known.flatten(0, 2) @ tokens.flatten(0, 2).T / 0.1).exp() * near.repeat(n_frames, 1)
    weight[weight < weight.topk(5, 0).values[-1:]] = 0       # of all frames together
    expected = ((weight / weight.sum(0)).T @ labels.flatten(0, 2)).view(rows, columns, C)
    found = video.propagate_labels(tokens[0], known, labels, radius)
    torch.testing.assert_close(found, expected)


def test_the_first_frame_and_the_last_seven_are_kept_with_their_predicted_labels(monkeypatch):
    item, frames, maps = moving_square(12), [], []

    def encode(image):                                       # the number of the frame
        frames.append(len(frames))
        return torch.full((10, 12, 1), float(frames[-1]))

    def propagate(tokens, known_tokens, known_labels, radius):
        now = int(tokens[0, 0, 0])
        kept = [0, *range(max(1, now - 7), now)]
        assert known_tokens[:, 0, 0, 0].tolist() == kept
        assert known_labels.equal(torch.stack([maps[t] for t in kept]))
        maps.append(F.normalize(torch.rand(10, 12, 3), p=1, dim=2))          # kept as soft labels
        return maps[-1]

    maps.append(F.one_hot(patches.resize_labels(item.masks[0], (10, 12)).long(), 3).float())
    monkeypatch.setattr(video, "propagate_labels", propagate)
    masks = list(video.propagate_masks(item, encode, 8, 4))
    assert frames == list(range(12)) and len(masks) == len(maps) - 1 == 11


def test_patches_are_compared_by_cosine_and_davis_has_its_own_standard_deviation(monkeypatch):
    inputs, mix = [], 0.01 * torch.randn(192, 8)             # exp(dot / 0.1) stays finite
    frames, masks = torch.randint(256, (4, 3, 64, 64)).byte(), torch.zeros(4, 64, 64).byte()
    masks[:, 16:48, 16:48] = 1
    item = SimpleNamespace(name="noise", frames=frames, masks=masks, objects=1)
    monkeypatch.setattr(annotations, "videos", lambda *_: [item])

    def row(lengths, std=augment.STD):
        def extract_patches(model, x):
            inputs.append(x[0])
            return lengths * (F.pixel_unshuffle(x, 8).permute(0, 2, 3, 1) @ mix)

        monkeypatch.setattr(video, "extract_patches", extract_patches)
        opt = make_options("video", "--data", "davis", "--img-size", "64")
        [row] = video.video(small_model(std=std), opt).rows.values()
        return row

    found = row(1)
    assert 0 < found["J&F"] < 100 and row(torch.tensor([1.0, 4] * 4)[:, None, None]) == found
    row(1, (0.5, 0.5, 0.5))                                  # that of an encoder
    stds = torch.tensor([(0.228, 0.224, 0.225)] * 2 + [(0.5, 0.5, 0.5)])[:, None, :, None, None]
    expected = (frames / 255 - torch.tensor(augment.MEAN)[:, None, None]) / stds
    torch.testing.assert_close(torch.stack(inputs), expected.flatten(0, 1))


def test_channels_are_stretched_before_the_argmax():
    soft = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])          # else all would be background
    assert video.labels_to_mask(soft, 1, (1, 2)).tolist() == [[0, 1]]
    constant = torch.tensor([[[0.5, 0.0], [0.5, 0.0]]])      # 0/0 in the published code
    assert video.labels_to_mask(constant, 1, (1, 2)).tolist() == [[0, 0]]


def test_frames_are_480_by_a_multiple_of_64():
    assert video.frame_shape((480, 854), 480, 16) == [480, 832]
    assert video.frame_shape((854, 480), 480, 16) == [832, 480]
    assert video.frame_shape((128, 128), 128, 8) == [128, 128]
    assert video.frame_shape((480, 854), 476, 14) == [476, 840]          # 14 does not divide 64
    assert video.frame_shape((854, 480), 476, 14) == [840, 476]


def test_a_video_with_an_unreadable_frame_is_left_out_and_listed(monkeypatch, tmp_path, capsys):
    (tmp_path / "3.png").write_bytes(b"not an image")
    good = moving_square(5)
    bad = moving_square(5)
    bad.name, bad.frames = "damaged", annotations.Frames([str(tmp_path / "3.png")] * 5)
    for items, count in (([good], 1), ([bad, good], 1)):
        monkeypatch.setattr(annotations, "videos", lambda *_, items=items: iter(items))
        report = video.video(small_model(), make_options("video", "--img-size", "32"))
        assert report.images == dict(videos=count, frames=5, objects=2)
    assert "left out 1 of 2 videos of toy that cannot be read: damaged" in capsys.readouterr().err


def test_the_standard_error_is_that_over_objects(monkeypatch):
    values = iter([(torch.tensor([[.2, .4], [.6, .6]]), torch.tensor([[.2, .4], [.6, .8]])),
                   (torch.tensor([[.9, .9]]), torch.tensor([[.7, .7]]))])
    monkeypatch.setattr(video.metrics, "score_video", lambda *_: next(values))
    monkeypatch.setattr(annotations, "videos", lambda *_: iter([moving_square(4)] * 2))
    report = video.video(small_model(), make_options("video", "--img-size", "32"))
    objects = numpy.array([30, 65, 80])                          # J&F of each, by hand
    error = objects.std(ddof=1) / 3 ** 0.5
    assert report.images["objects"] == 3 and report.rows["patches"]["J&F"] == pytest.approx(
        objects.mean())
    assert report.notes[0].endswith(f": {error:.1f}")


def test_pixels_are_refused():
    with pytest.raises(ValueError, match="video needs tokens, and pixels have none"):
        video.video(make_model(None, name="pixels"), make_options("video"))


def test_it_runs_on_toy_and_counts_the_frames(tmp_path, monkeypatch):
    bars, bar = [], progress.bar
    monkeypatch.setattr(progress, "bar", lambda items=None, desc="", total=None, *rest, **more: (
        bars.append((total, *rest)), bar(items, desc, total, *rest, **more))[1])
    evaluate.main(["--task", "video", "--baseline", "untrained", "--out", str(tmp_path), "--device",
                   "cpu", "--data", "toy-scenes", "--limit", "1", "--img-size", "64", "--show"])
    [line] = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert all(0 <= row["J&F"] <= 100 for row in line["metrics"].values())
    assert line["images"] == {"videos": 1, "frames": 24, "objects": 3} and line["protocol"]
    assert list(tmp_path.glob("video-toy*.png")) and (23, "frames") in bars


def test_saved_masks_are_png_files_with_the_palette_of_davis(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video, "propagate_masks",        # object 1 everywhere
                        lambda item, *_: (torch.ones_like(mask) for mask in item.masks[1:]))
    video.video(small_model(), make_options("video", "--limit", "1", "--img-size", "32", "--save",
                                            "--out", str(tmp_path)))
    [folder] = (tmp_path / "video-toy-small").iterdir()
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{t:05}.png" for t in range(24)]
    [item] = annotations.videos("toy", None, "test", 1, 32)
    with Image.open(files[0]) as image:                  # of the first frame: the given masks
        assert image.mode == "P"
        assert (numpy.array(image) == item.masks[0].numpy()).all() and item.masks[0].any()
        colors = [image.getpalette()[3 * n:3 * n + 3] for n in (0, 1, 2, 3, 4, 8, 255)]
    assert colors == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [64, 0, 0],
                      [224, 224, 192]]
    with Image.open(files[-1]) as image:
        assert (numpy.array(image) == 1).all()
    flags = "--limit", "1", "--img-size", "32", "--save", "--out", str(tmp_path)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(video, "save_masks", fail)
    report = video.video(small_model(), make_options("video", *flags))
    assert report.rows and "are not saved: No space left" in report.notes[0]
    assert len(list((tmp_path / "video-toy-small.1" / folder.name).iterdir())) == 24
    assert "is kept as" in capsys.readouterr().out


def test_the_real_davis(tmp_path):
    root = unpack_real("davis_subset", tmp_path / "davis")
    opt = make_options("video", "--data", "davis", "--data-root", str(root), "--img-size", "128")
    report = video.video(small_model(), opt)
    assert report.images == {"videos": 1, "frames": 40, "objects": 1}
    assert 0 < report.rows["patches"]["J&F"] < 100
