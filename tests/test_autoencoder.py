"""Autoencoder: it learns more than the mean colour, resumes exactly, and keeps pixels on one scale."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, clear_line, script, stop_in_epoch_2
from PIL import Image

import layers
import losses
import runs
import train_autoencoder
import wikiart
import windows

TINY_CODES = [
    *TINY,
    "--size",
    "32",
    "--crop",
    "32",
    "--width",
    "8",
    "--code",
    "48",
    "--epochs",
    "3",
    "--batch-size",
    "16",
]


def weights_of(path):
    return runs.load_checkpoint(path)["weights"]


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def coded(demo, tmp_path_factory):
    """A run folder with an autoencoder, trained on the tiny demo for longer than the rest."""
    run = tmp_path_factory.mktemp("codes")
    train_autoencoder.main([*TINY_CODES, "--data", str(demo), "--run", str(run), "--epochs", "6"])
    return run


def test_it_learns_more_than_the_mean_colour_and_says_what_it_is_held_against(coded):
    facts = json.loads((coded / "facts.json").read_text())["train_autoencoder"]
    assert facts["psnr"] > facts["pca_psnr"] + 0.1  # where it started
    assert facts["psnr"] > facts["mean_colour_psnr"] > facts["mean_image_psnr"]
    assert facts["pca_psnr"] > facts["mean_colour_psnr"]
    assert facts["psnr"] == pytest.approx(-10 * np.log10(facts["mse"]), abs=0.02)
    for name in ("autoencoder_curves.png", "reconstructions.png"):
        assert np.asarray(Image.open(coded / name).convert("L")).std() > 5
    assert not (coded / "autoencoder.partial.pt").exists()


def test_the_checkpoint_alone_gives_the_network_back(coded, demo):
    model = wikiart.build_model(runs.load_checkpoint(coded / "autoencoder.pt"))
    images = windows.views(torch.from_numpy(wikiart.WikiArt(demo, "test", size=32, processes=1).pixels[:6].copy()), 32)[
        0
    ]
    with torch.no_grad():
        codes = model.encode(images)
        painted = model.decode(codes)
        one_by_one = torch.cat([model.encode(image[None]) for image in images])
    assert codes.shape == (6, 48)
    assert torch.allclose(codes, one_by_one, atol=1e-4)  # whatever the batch
    assert painted.shape == images.shape
    assert torch.equal(painted, model(images).detach())
    assert (painted - images).square().mean() < (images.mean((0, 2, 3), keepdim=True) - images).square().mean()


def test_restoring_undoes_the_normalisation():
    normalise = layers.Normalise((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    images = torch.rand(2, 3, 4, 4)
    assert torch.allclose(normalise.restore(normalise(images)), images, atol=1e-6)


def test_every_weight_gets_a_gradient():
    model = wikiart.Autoencoder(crop=32, code=8, width=8, points=16)
    images = torch.rand(40, 3, 32, 32)
    model.start_as_pca([images])
    for last in (model.add, model.paint[-2]):  # zero to begin with, which stops gradients
        torch.nn.init.normal_(last.weight)
    painted, points = model(images[:4], images[4:8])
    assert points.shape == (8, 16)
    (painted.square().mean() + points.square().mean()).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_it_starts_where_pca_ends():
    torch.manual_seed(0)
    images = torch.rand(60, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)  # 48 numbers say all
    for code, most in ((48, 1e-6), (24, 0.05)):
        model = wikiart.Autoencoder(crop=32, code=code, width=8).eval()
        model.start_as_pca([images])
        with torch.no_grad():
            painted, codes = model(images), model.encode(images)
        smooth = torch.nn.functional.interpolate(
            torch.nn.functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear"
        )
        assert (painted - smooth).square().mean() < most
        assert codes.square().mean() == pytest.approx(1, rel=0.05)


def test_windows_of_one_painting_are_told_from_others():
    near = torch.eye(4).expand(2, 4, 4)
    assert losses.contrast(near) < losses.contrast(torch.stack([near[0], near[0].roll(1, 0)]))
    points = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, 1]]])
    expected = -np.log(np.exp(5) / (np.exp(5) + 2))  # cosine 1 with its twin, 0 with two others, over 0.2
    assert losses.contrast(points).item() == pytest.approx(expected, abs=1e-5)


def test_resuming_ends_with_the_weights_of_an_uninterrupted_run(demo, tmp_path, monkeypatch):
    arguments = [*TINY_CODES, "--data", str(demo), "--manner-weight", "0.15"]
    train_autoencoder.main([*arguments, "--run", str(tmp_path / "whole")])
    stop_in_epoch_2(train_autoencoder, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="1 finished epochs .* --resume"):
        train_autoencoder.main([*arguments, "--run", str(tmp_path / "parts")])
    monkeypatch.undo()
    with pytest.raises(runs.Problem, match="unfinished training"):
        train_autoencoder.main([*arguments, "--run", str(tmp_path / "parts")])
    train_autoencoder.main([*arguments, "--run", str(tmp_path / "parts"), "--resume"])
    assert same_weights(*(weights_of(tmp_path / name / "autoencoder.pt") for name in ("whole", "parts")))


def test_two_processes_train_like_one(demo, tmp_path):
    plain = ["--optimizer", "adamw", "--manner-weight", "0.15", "--data", str(demo)]  # Muon blows rounding up
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [*torchrun, ROOT / "train_autoencoder.py", *TINY_CODES, *plain, "--run", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    train_autoencoder.main([*TINY_CODES, *plain, "--run", str(tmp_path / "one")])
    one, two = (
        json.loads((tmp_path / name / "facts.json").read_text())["train_autoencoder"] for name in ("one", "two")
    )
    for key in ("mse", "val_mse", "pca_psnr"):
        assert one[key] == pytest.approx(two[key], rel=2e-3), key


def test_training_ends_when_nothing_improves(demo, tmp_path, monkeypatch):
    errors = iter([0.5, 0.4, 0.45, 0.45, 0.45, 0.1, 0.1, 0.1, 0.1])  # after the third without progress it ends
    monkeypatch.setattr(train_autoencoder, "mean_error", lambda *_: next(errors))
    train_autoencoder.main(
        [*TINY_CODES, "--data", str(demo), "--run", str(tmp_path), "--epochs", "9", "--patience", "3"]
    )
    facts = json.loads((tmp_path / "facts.json").read_text())["train_autoencoder"]
    assert (facts["epochs"], facts["epoch_kept"]) == (5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--crop", "40"), "multiple of 16"),
        (("--batch-size", "4000"), "too few"),
        (("--lr", "1e30"), "is not finite|the loss is"),
    ],
)
def test_a_mistake_gets_one_clear_line(demo, tmp_path, arguments, message):
    with pytest.raises(runs.Problem, match=message):
        train_autoencoder.main([*TINY_CODES, "--data", str(demo), "--run", str(tmp_path), *arguments])


def test_a_classifier_is_no_autoencoder(trained, demo, tmp_path):
    (tmp_path / "autoencoder.pt").write_bytes((trained / "classifier.pt").read_bytes())
    done = script("cluster.py", *TINY, "--data", demo, "--run", tmp_path)
    assert "holds a CNN" in clear_line(done)
