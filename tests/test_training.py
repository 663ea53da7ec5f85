"""What training computes: balancing, auxiliary labels, Muon, crops and views, several processes, other networks."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_TRAIN

import runs
import train
import wikiart
import windows

SETTINGS = {"model": "CNN", "target": "style", "balance": "none", "label_smoothing": 0.0,
            "artist_weight": 0.0, "genre_weight": 0.0, "tau": 1.0}  # fmt: skip


class Eight:
    """Six paintings of class 0 and two of class 1, by two artists; of one the genre is unknown."""

    classes, labels = ["a", "b"], torch.tensor([0] * 6 + [1] * 2)
    artists, genres = ["x"] * 4 + ["y"] * 4, ["g", "h", "", "g", "g", "h", "h", "h"]

    def __len__(self):
        return 8


def names(**settings):
    return train.Names(Eight(), SimpleNamespace(**SETTINGS | settings))


LOGITS, LABELS, ITEMS = torch.tensor([[1.0, 0.0], [0.5, 2.0]]), torch.tensor([0, 1]), torch.tensor([0, 7])


def test_the_plain_loss_is_the_cross_entropy():
    loss, own = names().loss(LOGITS, LABELS, ITEMS)
    assert loss == own == F.cross_entropy(LOGITS, LABELS)


def test_the_logit_adjusted_loss_adds_the_log_frequencies():
    loss, _ = names(balance="logit").loss(LOGITS, LABELS, ITEMS)
    # softmax of (1 + log 3/4, 0 + log 1/4) and (0.5 + log 3/4, 2 + log 1/4), worked by hand
    first = torch.tensor(3 * 2.718281828 / (3 * 2.718281828 + 1)).log()
    second = torch.tensor(7.3890561 / (7.3890561 + 3 * 1.6487213)).log()
    assert loss.item() == pytest.approx(-(first + second).item() / 2, abs=1e-6)


def test_the_weighted_loss_counts_rare_classes_more():
    loss, _ = names(balance="weights").loss(LOGITS, LABELS, ITEMS)
    each = F.cross_entropy(LOGITS, LABELS, reduction="none")
    assert loss.item() == pytest.approx((each[0] * 8 / (2 * 6) + each[1] * 8 / (2 * 2)).item() / 2, abs=1e-6)


def test_smoothing_spreads_alike_whatever_the_weights():
    """At the loss's minimum a painting's probabilities are its smoothed target, not one that leans to rare classes."""
    weighted = names(balance="weights", label_smoothing=0.2)

    def loss(*probabilities):
        return weighted.loss(torch.tensor([probabilities]).log(), LABELS[:1], ITEMS[:1])[0]

    assert loss(0.9, 0.1) < min(loss(0.8, 0.2), loss(0.95, 0.05))


def test_artists_and_genres_are_named_beside_the_class():
    both = names(artist_weight=0.5, genre_weight=0.25)
    assert both.extra == 4
    outputs = torch.cat([LOGITS, torch.tensor([[1.0, 0, 0, 0], [0, 0, 3.0, 1.0]])], 1)
    loss, own = both.loss(outputs, LABELS, torch.tensor([2, 7]))  # painting 2 has no genre
    artist = F.cross_entropy(outputs[:, 2:4], torch.tensor([0, 1]))
    genre = F.cross_entropy(outputs[1:, 4:6], torch.tensor([1]), reduction="sum") / 2
    assert own == F.cross_entropy(LOGITS, LABELS)
    assert loss.item() == pytest.approx((own + 0.5 * artist + 0.25 * genre).item(), abs=1e-6)


def test_the_extra_outputs_are_for_training_only():
    model = wikiart.CNN(3, width=8, dropout=0.5, extra=5)
    images = torch.rand(2, 3, 40, 40)
    assert model.train()(images).shape == (2, 8)
    assert model.eval()(images).shape == (2, 3)


def test_muon_makes_updates_orthogonal():
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        singular = torch.linalg.svdvals(runs.orthogonal(torch.randn(shape)))
        assert 0.5 < singular.min() < singular.max() < 1.5


def test_the_learning_rates_rise_and_fall_to_zero():
    model = wikiart.CNN(2, width=8)
    config = SimpleNamespace(optimizer="muon", lr=1.0, muon_lr=2.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers, seen = runs.Optimizers(model, config, 10), []
    for _ in range(10):
        seen.append([part.param_groups[0]["lr"] for part in optimizers.parts[:2]])
        optimizers.step()
    assert seen[1] == [1.0, 2.0]
    assert seen[0] == [0.5, 1.0]
    assert seen[-1][0] == pytest.approx(0.125)
    assert optimizers.parts[0].param_groups[0]["lr"] == 0


# Crops and views


def test_a_crop_of_everything_is_the_picture():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    still = torch.full((7, 2), 0.5)
    still[0] = 0.999999
    assert torch.allclose(windows.random_crops(images, 32, still), images / 255, atol=1e-3)
    still[4] = 0.1
    assert torch.allclose(windows.random_crops(images, 32, still), images.flip(3) / 255, atol=1e-3)


def test_crops_stay_inside_and_differ_between_pictures():
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(16, 3, 64, 64).contiguous()
    numbers = torch.rand(7, 16)
    numbers[5:] = 0.5
    crops = windows.random_crops(ramp, 24, numbers, smallest=0.2)
    assert crops.min() >= 0
    assert crops.max() <= 1
    spans = (crops[:, 0, 12, -1] - crops[:, 0, 12, 0]).abs()
    assert spans.min() > 0.3  # a fifth of the area is over two fifths of the side
    assert spans.unique().numel() > 8


def test_large_windows_are_averaged_not_skipped():
    checks = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    checks[..., ::2] = 254  # one-pixel stripes: grid_sample alone would give black, white or moire
    numbers = torch.full((7, 1), 0.5)
    numbers[0] = 0.999
    assert windows.random_crops(checks, 16, numbers).std() < 0.02


def test_a_gpu_sees_the_same_windows():
    noise = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(noise, (64, 64), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    numbers = torch.rand(7, 8, generator=torch.Generator().manual_seed(1))
    numbers[5:] = 0.5  # neither exposure nor contrast
    area, stretch = 0.2 + 0.8 * numbers[0], torch.exp(0.3 * (numbers[1] - 0.5))
    width, height = ((64 * area.sqrt() * ratio).round().clamp(max=64) for ratio in (stretch, 1 / stretch))
    left, top = (numbers[2] * (65 - width)).floor(), (numbers[3] * (65 - height)).floor()
    width = torch.where(numbers[4] < 0.5, -width, width)
    other = windows.windows_at_once(images, 32, left, top, width, height)
    assert (windows.random_crops(images, 32, numbers) - other).abs().mean() < 0.01


def test_one_window_is_scaled_as_views_are():
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    whole = torch.tensor([0.5, 0.5, 0.3, 0.3, 0.9])
    step = 1.2 / 255  # bytes are rounded, across and then down
    assert torch.allclose(windows.one_window(images, 24, whole, smallest=1), windows.views(images, 24)[0], atol=step)
    whole[4] = 0.1
    assert torch.allclose(windows.one_window(images, 24, whole, smallest=1), windows.views(images, 24)[1], atol=step)
    for seed in range(20):
        numbers = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        assert windows.one_window(images, 16, numbers, smallest=0.1).shape == (3, 3, 16, 16)


def test_views_show_the_whole_and_the_corners():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    whole = windows.views(images, 32)
    assert len(whole) == 2
    assert torch.allclose(whole[0], images / 255, atol=1e-3)
    assert torch.equal(whole[1], whole[0].flip(3))
    quarters = windows.views(images, 16, 0.5)
    assert len(quarters) == 8
    assert torch.allclose(quarters[6], images[:, :, 16:, 16:] / 255, atol=1e-3)


# Several processes


def test_two_processes_train_like_one(demo, tmp_path):
    """Same global batch, same draws, same statistics: the weights agree to float tolerance."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    plain = ["--average", "0", "--optimizer", "adamw"]  # nothing that would hide or blow up a difference
    command = [*torchrun, ROOT / "train.py", *TINY_TRAIN, *plain, "--data", demo, "--run", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    train.main([*TINY_TRAIN, *plain, "--data", str(demo), "--run", str(tmp_path / "one")])
    one, two = ((tmp_path / name / "train.jsonl").read_text().splitlines() for name in ("one", "two"))
    for line, other in zip(one, two, strict=True):
        assert json.loads(line)["loss"] == pytest.approx(json.loads(other)["loss"], rel=1e-3)
    first, second = (runs.load_checkpoint(tmp_path / name / "classifier.pt") for name in ("one", "two"))
    assert first["epoch"] == second["epoch"]
    for name, weight in first["weights"].items():
        assert torch.allclose(weight.float(), second["weights"][name].float(), rtol=2e-3, atol=2e-3), name


# Other networks and labels


def test_a_network_of_torchvision(demo, tmp_path):
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--model", "resnet18", "--epochs", "1"])
    model = wikiart.build_model(runs.load_checkpoint(tmp_path / "classifier.pt"))
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 8)
    with pytest.raises(runs.Problem, match="no model resnet19"):
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--model", "resnet19"])


@pytest.mark.parametrize("target", ["artist", "genre"])
def test_other_targets(demo, tmp_path, target):
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--target", target, "--min-images", "3",
                "--epochs", "1"])  # fmt: skip
    checkpoint = runs.load_checkpoint(tmp_path / "classifier.pt")
    assert checkpoint["data"]["target"] == target
    if target == "genre":
        assert checkpoint["classes"] == ["landscape", "portrait", "still_life", "town"]


def test_every_balancing_method_trains(demo, tmp_path):
    for method in ("none", "sampler", "weights", "resample"):
        run = tmp_path / method
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(run), "--balance", method, "--epochs", "1"])
        assert json.loads((run / "facts.json").read_text())["train"]["balance"] == method
