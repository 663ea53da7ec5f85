"""Repainting: any size, identity without a change of style, resumed and parallel training, scores, clear messages."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_TRAIN, clear_line, picture, script, stop_in_epoch_2
from PIL import Image

import style_transfer
import train
import train_style
import wikiart
from common import baselines, losses, metrics
from common.errors import UserError
from common.repaint import Repainter, open_picture, read_mixture
from common.run import load_checkpoint

TINY_STYLE = [*TINY, "--size", "64", "--crop", "64", "--width", "8", "--code", "12", "--batch-size", "8"]
TINY_STYLE += ["--per-class", "4", "--epochs", "2", "--validation", "0.2"]


@pytest.fixture(scope="module")
def styled(demo, trained, tmp_path_factory):
    """A run folder with classifier, judge, model, and the scores."""
    run = tmp_path_factory.mktemp("styled")
    (run / "classifier.pt").write_bytes((trained / "classifier.pt").read_bytes())
    shared = ["--data", str(demo), "--run", str(run)]
    train.main([*TINY_TRAIN, *shared[:2], "--run", str(run / "judge"), "--seed", "1", "--epochs", "1"])
    train_style.main([*TINY_STYLE, *shared])
    style_transfer.main([*TINY, *shared, "--judges", "judge", "classifier.pt", "--paintings", "32"])
    return run


@pytest.fixture
def model():
    """A network with random weights whose decoder heeds the style."""
    torch.manual_seed(0)
    model = wikiart.StyleAutoencoder(3, code=48, width=8)
    model.start_as_pca(torch.rand(8, 3, 32, 32))
    for module in model.modules():
        if hasattr(module, "to_gamma_beta"):
            torch.nn.init.normal_(module.to_gamma_beta.weight)
    torch.nn.init.normal_(model.to_pixels.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize("size", [(32, 32), (61, 75), (33, 200)])
def test_any_size_comes_back_at_that_size(model, size):
    images, change = torch.rand(1, 3, *size), torch.tensor([[-1.0, 0, 1]])
    assert model(images, change).shape == images.shape
    assert (model(images, change) - model(images, -change)).abs().mean() > 0.001


def test_training_starts_where_pca_ends():
    model = wikiart.StyleAutoencoder(3, code=48, width=8).eval()
    images = torch.rand(4, 3, 40, 40)
    model.start_as_pca(images)
    with torch.no_grad():
        assert torch.allclose(model(images, torch.eye(3)[[0, 1, 2, 0]]), images, atol=1e-3)  # all 48 directions


def test_every_weight_gets_a_gradient(model):
    model.train()(torch.rand(2, 3, 32, 32), torch.eye(3)[:2]).square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_tiles_have_no_seams(model):
    repainter = Repainter(model, ["a", "b", "c"], None, torch.device("cpu"))
    images, change = torch.rand(1, 3, 300, 330), torch.tensor([[-1.0, 0, 1]])
    whole, tiled = repainter.paint(images, change), repainter.paint(images, change, tile=128)
    assert torch.allclose(whole, tiled, atol=1e-4 if not torch.cpu._is_avx512_bf16_supported() else 0.02)


def test_no_change_and_no_strength_are_the_same(model):
    repainter = Repainter(model, ["a", "b", "c"], None, torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    kept, none = repainter.repaint(image, {"a": 1}, {"a": 1}), repainter.repaint(image, {"b": 1}, {"a": 1}, strength=0)
    assert np.array_equal(np.asarray(kept), np.asarray(none))
    other = repainter.repaint(image, {"b": 1}, {"c": 1})  # a wrong source style changes the result
    assert not np.array_equal(np.asarray(repainter.repaint(image, {"b": 1}, {"a": 1})), np.asarray(other))


def test_style_names_and_mixtures():
    classes = ["Naive_Art_Primitivism", "Ukiyo_e"]
    assert read_mixture(["ukiyo-e=3", "naïve art primitivism=1"], classes) == {
        "Ukiyo_e": 0.75,
        "Naive_Art_Primitivism": 0.25,
    }
    for wrong in ("Dada", "Ukiyo_e=-1", "Ukiyo_e=much"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            read_mixture([wrong], classes)


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(styled, demo, tmp_path, monkeypatch):
    features = ["--features", str(styled / "classifier.pt")]
    command = [*TINY_STYLE, "--data", str(demo), *features, "--run"]
    train_style.main([*command, str(tmp_path / "whole")])
    stop_in_epoch_2(train_style, monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt, match="1 finished epochs"):
        train_style.main([*command, str(tmp_path / "parts")])
    monkeypatch.undo()
    train_style.main([*command, str(tmp_path / "parts")])
    one, two = (load_checkpoint(tmp_path / name / "style.pt")["weights"] for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_train_like_one(styled, demo, tmp_path):
    flags = [*TINY_STYLE, "--epochs", "1", "--data", str(demo), "--features", str(styled / "classifier.pt")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [*torchrun, ROOT / "train_style.py", *flags, "--run", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    train_style.main([*flags, "--run", str(tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / "facts.json").read_text())["train_style"] for name in ("one", "two"))
    for key in ("texture", "critic_error", "content"):
        assert one[key] == pytest.approx(two[key], rel=5e-2), key


def test_scores_and_figures(styled):
    facts = json.loads((styled / "facts.json").read_text())
    scores = facts["style_transfer"]
    for key in ("hit_rate", "second_hit_rate", "own_kept", "source_found", "source_balanced_accuracy"):
        assert 0 <= scores[key] <= 1, key
    assert scores["fid"] > 0 < scores["fid_originals"]
    assert scores["own_psnr"] > 20
    assert scores["truth_pairs"] == 32 / 8 * 56  # every test scene is there in every style
    assert facts["train_style"]["epochs"] == 2
    for name in ("style_grid", "style_strength", "style_triptych", "style_samples", "style_curves"):
        assert np.asarray(Image.open(styled / f"{name}.png").convert("L")).std() > 5


@pytest.mark.parametrize("method", ["adain", "wct"])
def test_methods_to_compare_with(styled, demo, method):
    shared = ["--data", str(demo), "--run", str(styled), "--judges", "judge", "classifier.pt", "--paintings", "16"]
    style_transfer.main([*TINY, *shared, "--method", method])
    assert 0 < json.loads((styled / "facts.json").read_text())["style_transfer"][method]["ssim"] < 1


def test_transplanted_covariances():
    torch.manual_seed(0)
    maps = torch.randn(6, 3, 8, 8) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)
    mean, cov = baselines.moments(maps)
    assert torch.allclose(baselines.power(cov, 0.5) @ baselines.power(cov, 0.5), cov, atol=1e-3)
    assert torch.allclose(mean, maps.mean((2, 3)))


def test_measures_of_pictures():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 32, 32)
    assert torch.allclose(metrics.ssim(images, images), torch.ones(5))
    corner = torch.zeros(3, 32, 32)
    corner[:, :8, :8] = 0.5
    assert metrics.position_deviation(images + 0.1, images) == pytest.approx(0, abs=1e-6)
    assert metrics.position_deviation(images + corner, images) > 0.02
    x = torch.randn(500, 4)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(x + 2, x) == pytest.approx(16, abs=1e-6)


def test_textures_move_as_the_styles_differ():
    torch.manual_seed(0)
    calm, wild = torch.randn(5000, 3), 5 + 2 * torch.randn(5000, 3)
    loss = losses.TextureLoss([calm, wild], [1, 1, 1])
    loss.SPREAD = 1.0
    x = torch.randn(4, 3)
    assert loss(5 + 2 * x, x, torch.zeros(4).long(), torch.ones(4).long()) < 1e-3
    assert loss(x, x, torch.ones(4).long(), torch.ones(4).long()) < 1e-6
    assert loss(x, x, torch.zeros(4).long(), torch.ones(4).long()) > 1


def test_the_nearest_palette_counts():
    torch.manual_seed(0)
    loss, reals = losses.PaletteLoss(2, 16), torch.rand(6, 3, 16, 16)
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert loss(reals, reals, labels) == 0
    assert loss(reals[:1], reals[:1], torch.tensor([1])) == 0  # taken in first
    assert loss(reals[:1].flip(3), reals[1:2], torch.tensor([0])) > 0  # the oldest is gone
    mirrored = reals[1:2].unflatten(3, (4, 4)).flip(3).flatten(3)
    assert loss(mirrored, reals[1:2], torch.tensor([0])) < 1e-6  # where colours are does not count


def test_the_features_stay_as_they_are(model):
    network = wikiart.CNN(3, width=8, depth=1, pooling="mean_std")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    features = losses.FeatureMaps(network, torch.rand(4, 3, 32, 32)).train()
    maps, logits = features(torch.rand(2, 3, 32, 32))
    assert [each.shape[1] for each in maps] == features.channels == [8, 8, 16, 32]
    assert logits.shape == (2, 3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_pictures_folders_and_the_way_between_two_styles(styled, tmp_path):
    arguments = [*TINY, "--data", "nowhere", "--run", str(styled), "--out", str(tmp_path / "out")]
    source = picture(tmp_path / "in" / "wide.png", size=(60, 40))
    style_transfer.main([*arguments, "--image", str(source), "--style", "dots", "--strength", "0.7"])
    assert Image.open(tmp_path / "out/wide_Dots.png").size == (60, 40)
    style_transfer.main([*arguments, "--image", str(source)])
    assert len(list((tmp_path / "out").glob("wide_*.png"))) == 8
    style_transfer.main([*arguments, "--image", str(source), "--style", "Dots=0.7", "Bands=0.3"])
    assert (tmp_path / "out/wide_Dots_Bands.png").exists()
    style_transfer.main([*arguments, "--image", str(source), "--style", "Dots", "Bands", "--steps", "3"])
    first = np.asarray(Image.open(tmp_path / "out/wide_Dots_to_Bands_1.png"))
    style_transfer.main([*arguments, "--image", str(source), "--style", "Dots"])
    assert np.array_equal(first, np.asarray(Image.open(tmp_path / "out/wide_Dots.png")))
    picture(tmp_path / "in" / "deeper" / "wide.jpg", seed=1, size=(60, 40))
    (tmp_path / "in" / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"2 of 3 files repainted; not .*text.jpg"):
        style_transfer.main([*arguments, "--image", str(tmp_path / "in"), "--style", "Dots", "--from-style", "bands"])
    assert (tmp_path / "out/wide.png_Dots.png").exists()
    assert (tmp_path / "out/deeper/wide.jpg_Dots.png").exists()


def test_mistakes_get_one_clear_line(styled, demo, tmp_path, monkeypatch):
    arguments = ["--run", styled, "--out", tmp_path]
    good, small = picture(tmp_path / "good.png", size=(40, 40)), picture(tmp_path / "small.png", size=(40, 20))
    old = load_checkpoint(styled / "style.pt")
    torch.save(old | {"arguments": old["arguments"] | {"crop": 64}}, tmp_path / "old.pt")
    for more, message in (
        (("--image", good, "--style", "Dada"), "no style Dada"),
        (("--image", good, "--from-style", "Dada"), "no style Dada"),
        (("--image", small), "32"),
        (("--image", tmp_path / "nowhere.jpg"), "no file and no folder"),
        (("--checkpoint", tmp_path / "old.pt", "--image", good), "earlier version"),
        (("--checkpoint", styled / "classifier.pt", "--image", good), "a StyleAutoencoder is needed"),
    ):
        assert message in clear_line(script("style_transfer.py", *TINY, *arguments, *more))
    monkeypatch.setattr(Image, "open", lambda *_, **__: Image.new("1", (20_000, 20_000)))
    with pytest.raises(UserError, match="megapixels"):
        open_picture("huge.png", 1024)
    monkeypatch.undo()
    with pytest.raises(UserError, match="two styles"):
        style_transfer.main([*TINY, *map(str, arguments), "--steps", "3", "--style", "Dots"])
    with pytest.raises(UserError, match="multiple of 8"):
        train_style.main([*TINY_STYLE, "--data", str(demo), "--run", str(styled), "--size", "80", "--crop", "76"])


def test_training_needs_a_classifier_of_the_same_styles(styled, folder, tmp_path):
    arguments = [*TINY_STYLE, "--data", str(folder), "--validation", "0.5", "--batch-size", "4", "--run", str(tmp_path)]
    with pytest.raises(UserError, match="no checkpoint .*classifier.pt"):
        train_style.main(arguments)
    (tmp_path / "classifier.pt").write_bytes((styled / "classifier.pt").read_bytes())
    with pytest.raises(UserError, match="the styles"):
        train_style.main(arguments)
