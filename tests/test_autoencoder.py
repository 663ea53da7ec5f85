"""Autoencoder: it learns more than the mean colour, resumes exactly, and keeps pixels on one scale."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, clear_line, script, stop_in_epoch_2
from PIL import Image

import train_autoencoder
import wikiart
from common import crops, layers, losses
from common.errors import UserError
from common.optim import Optimizers
from common.run import load_checkpoint

TINY_FLAGS = "--size 32 --crop 32 --width 8 --code 48 --epochs 3 --batch-size 16"
TINY_CODES = [*TINY, *TINY_FLAGS.split()]
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
ADAMW_SCRIPT = f"""
import sys
from functools import partial
sys.path.insert(0, {str(ROOT)!r})
import train_autoencoder
train_autoencoder.Optimizers = partial(train_autoencoder.Optimizers, muon=False)
train_autoencoder.main()
"""


def facts_of(run):
    return json.loads((run / "facts.json").read_text())["train_autoencoder"]


def weights_of(path):
    return load_checkpoint(path)["weights"]


def same_weights(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="session")
def coded(demo, tmp_path_factory):
    """A run folder with an autoencoder, trained on the tiny demo for longer than the rest."""
    run = tmp_path_factory.mktemp("codes")
    train_autoencoder.main([*TINY_CODES, "--data", str(demo), "--run", str(run), "--epochs", "6"])
    return run


def test_it_learns_more_than_the_mean_colour_and_says_what_it_is_held_against(coded):
    facts = facts_of(coded)
    assert facts["psnr"] > facts["pca_psnr"] + 0.1  # where it started
    assert facts["psnr"] > facts["mean_colour_psnr"] > facts["mean_image_psnr"]
    assert facts["pca_psnr"] > facts["mean_colour_psnr"]
    assert facts["psnr"] == pytest.approx(-10 * np.log10(facts["mse"]), abs=0.02)
    for name in ("more/autoencoder_curves.png", "reconstructions.png"):
        assert np.asarray(Image.open(coded / name).convert("L")).std() > 5
    assert not (coded / "autoencoder.partial.pt").exists()


def test_the_checkpoint_alone_gives_the_network_back(coded, demo):
    model = wikiart.build_model(load_checkpoint(coded / "autoencoder.pt"))
    pixels = torch.from_numpy(wikiart.WikiArt(demo, "test", size=32, processes=1).pixels[:6].copy())
    images = crops.views(pixels, 32)[0]
    with torch.no_grad():
        codes = model.encode(images)
        reconstructions = model.decode(codes)
        one_by_one = torch.cat([model.encode(image[None]) for image in images])
    assert codes.shape == (6, 48)
    assert torch.allclose(codes, one_by_one, atol=1e-4)  # whatever the batch
    assert reconstructions.shape == images.shape
    assert torch.equal(reconstructions, model(images).detach())
    error, mean_colour_error = reconstructions - images, images.mean((0, 2, 3), keepdim=True) - images
    assert error.square().mean() < mean_colour_error.square().mean()


def test_the_inverse_undoes_the_normalisation():
    normalise = layers.Normalise((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    images = torch.rand(2, 3, 4, 4)
    assert torch.allclose(normalise.inverse(normalise(images)), images, atol=1e-6)


def test_every_weight_gets_a_gradient():
    model = wikiart.Autoencoder(crop=32, code=8, width=8, projection_dim=16, styles=3, **GREY)
    images = torch.rand(40, 3, 32, 32)
    model.start_as_pca([images])
    for layer in (model.add, model.paint[-2]):  # zero to begin with, which stops gradients
        torch.nn.init.normal_(layer.weight)
    assert model.project(model.encode_with_maps(images[:4])[1], images[4:8]).shape == (8, 16)
    criterion = losses.ReconstructionLoss(model, 0.15, 0.06)
    criterion(images[:4], images[4:8], torch.eye(3)[[0, 1, 2, 0]])[0].backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_it_starts_where_pca_ends():
    torch.manual_seed(0)
    images = torch.rand(60, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)  # 48 numbers determine an image
    for code, largest_error in ((48, 1e-6), (24, 0.05)):
        model = wikiart.Autoencoder(crop=32, code=code, width=8, **GREY).eval()
        model.start_as_pca([images])
        with torch.no_grad():
            reconstructions, codes = model(images), model.encode(images)
        smooth = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        assert (reconstructions - smooth).square().mean() < largest_error
        assert codes.square().mean() == pytest.approx(1, rel=0.05)


def test_crops_of_one_painting_are_distinguished_from_others():
    near = torch.eye(4).expand(2, 4, 4)
    assert losses.nt_xent(near) < losses.nt_xent(torch.stack([near[0], near[0].roll(1, 0)]))
    projections = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, 1]]])
    expected = -np.log(np.exp(5) / (np.exp(5) + 2))  # cosine 1 with its positive, 0 with two negatives, over 0.2
    assert losses.nt_xent(projections).item() == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_the_error_over_the_variance_and_the_weighted_contrastive_loss():
    torch.manual_seed(0)
    model, images, others = (
        wikiart.Autoencoder(32, 8, 8, projection_dim=16, **GREY).eval(),
        *torch.rand(2, 4, 3, 32, 32),
    )
    projections = model.project(model.encode_with_maps(images)[1], others)
    error, contrastive = F.mse_loss(model(images), images), losses.nt_xent(projections.view(2, 4, -1))
    loss, mse = losses.ReconstructionLoss(model, 0.5, 0.1)(images, others)
    assert mse.item() == pytest.approx(error.item())
    assert loss.item() == pytest.approx((error / 0.1 + 0.5 * contrastive).item(), rel=1e-5)
    assert losses.ReconstructionLoss(model, 0.0, 0.1)(images)[0].item() == pytest.approx(error.item() / 0.1, rel=1e-5)


def test_the_embedding_of_a_style_changes_what_is_decoded():
    model = wikiart.Autoencoder(32, 8, 8, styles=2, **GREY).eval()
    model.start_as_pca([torch.rand(20, 3, 32, 32)])
    codes, eye = torch.randn(1, 8), torch.eye(2)
    assert not torch.allclose(model.decode(codes, eye[[0]]), model.decode(codes, eye[[1]]))
    shifted = codes + model.embedding.weight.T[[1]]
    assert torch.allclose(model.decode(codes, eye[[1]]), model.decode(shifted))


def test_resuming_ends_with_the_weights_of_an_uninterrupted_run(demo, tmp_path, monkeypatch, capsys):
    arguments = [*TINY_CODES, "--data", str(demo), "--contrastive-weight", "0.15"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_autoencoder.main([*arguments, "--run", str(whole)])
    stop_in_epoch_2(train_autoencoder, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="1 finished epoch .* same command"):
        train_autoencoder.main([*arguments, "--run", str(parts)])
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished training .* lr = .* --restart"):
        train_autoencoder.main([*arguments, "--run", str(parts), "--lr", "0.001"])
    train_autoencoder.main([*arguments, "--run", str(parts)])
    assert "resuming after epoch 1" in capsys.readouterr().out
    assert same_weights(*(weights_of(run / "autoencoder.pt") for run in (whole, parts)))


def test_two_processes_train_like_one(demo, tmp_path, monkeypatch):
    arguments = [*TINY_CODES, "--contrastive-weight", "0.15", "--data", str(demo)]
    with_adamw = tmp_path / "with_adamw.py"  # Muon amplifies rounding errors
    with_adamw.write_text(ADAMW_SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [*torchrun, with_adamw, *arguments, "--run", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(train_autoencoder, "Optimizers", partial(Optimizers, muon=False))
    train_autoencoder.main([*arguments, "--run", str(tmp_path / "one")])
    one, two = facts_of(tmp_path / "one"), facts_of(tmp_path / "two")
    for key in ("mse", "val_mse", "pca_psnr"):
        assert one[key] == pytest.approx(two[key], rel=2e-3), key


def test_nt_xent_is_in_float32_under_autocast():
    """In bfloat16 the similarities of these projections, all near 1, would be one number."""
    projections = 1 + 0.02 * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.nt_xent(projections)
    assert loss.item() == pytest.approx(losses.nt_xent(projections).item(), abs=1e-6)
    low = F.normalize(projections.flatten(0, 1).bfloat16(), dim=1)
    assert (low @ low.T).unique().numel() < 5


def test_training_ends_when_nothing_improves(demo, tmp_path, monkeypatch):
    errors = [0.5, 0.4, 0.45, 0.45, 0.45]  # after the third without progress it ends
    values = iter([0.2] * 4 + errors + [0.1] * 5)  # four baselines before, and after it on test paintings
    monkeypatch.setattr(train_autoencoder, "mean_error", lambda *_: next(values))
    monkeypatch.setattr(train_autoencoder, "PATIENCE", 3)
    train_autoencoder.main([*TINY_CODES, "--data", str(demo), "--run", str(tmp_path), "--epochs", "9"])
    facts = facts_of(tmp_path)
    assert (facts["epochs"], facts["epoch_kept"]) == (5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--crop", "40"), "multiple of 16"),
        (("--lr", "1e30"), "is not finite|the loss is"),
    ],
)
def test_a_mistake_gets_one_clear_line(demo, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        train_autoencoder.main([*TINY_CODES, "--data", str(demo), "--run", str(tmp_path), *arguments])


def test_a_classifier_is_no_autoencoder(trained, demo, tmp_path):
    (tmp_path / "autoencoder.pt").write_bytes((trained / "classifier.pt").read_bytes())
    done = script("cluster.py", *TINY, "--data", demo, "--run", tmp_path)
    assert "holds a CNN" in clear_line(done)
