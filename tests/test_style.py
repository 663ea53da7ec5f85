"""The style-conditioned autoencoder: the style reaches the picture, scores are right, files are repainted whole."""

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_TRAIN, clear_line, picture, script, stop_in_epoch_2
from PIL import Image
from test_autoencoder import ADAMW_SCRIPT, GREY, TINY_CODES

import style_transfer
import train
import train_autoencoder
import train_style
import wikiart
from common import baselines, crops, losses, metrics
from common.errors import UserError
from common.names import title_of
from common.optim import Optimizers
from common.run import load_checkpoint

TINY_STYLE = [*TINY, "--size", "32", "--batch-size", "16"]


@pytest.fixture(scope="module")
def styled(demo, trained, tmp_path_factory):
    """A run folder with classifier, judge, plain and style-conditioned autoencoder, and the scores."""
    run = tmp_path_factory.mktemp("styled")
    (run / "classifier.pt").write_bytes((trained / "classifier.pt").read_bytes())
    shared = ["--data", str(demo), "--run", str(run)]
    train.main([*TINY_TRAIN, *shared[:2], "--run", str(run / "judge"), "--seed", "1", "--epochs", "1"])
    train_autoencoder.main([*TINY_CODES, *shared])
    train_style.main([*TINY_STYLE, *shared, "--adversary-weight", "0.1", "--epochs", "4"])
    style_transfer.main([*TINY, *shared, "--judges", "judge", "classifier.pt"])
    return run


def test_two_processes_train_like_one(styled, demo, tmp_path, monkeypatch):
    start = ["--start", str(styled / "autoencoder.pt"), "--features", str(styled / "classifier.pt")]
    flags = [*TINY_STYLE, *start, "--epochs", "1", "--data", str(demo)]
    file = tmp_path / "adamw.py"  # Muon amplifies rounding errors
    file.write_text(ADAMW_SCRIPT.replace("train_autoencoder", "train_style"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [*torchrun, file, *flags, "--run", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(train_style, "Optimizers", partial(Optimizers, muon=False))
    train_style.main([*flags, "--run", str(tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / "facts.json").read_text())["train_style"] for name in ("one", "two"))
    for key in ("mse", "val_mse"):
        assert one[key] == pytest.approx(two[key], rel=1e-2), key


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = wikiart.StyleAutoencoder(3, embedding=4, crop=32, code=8, width=8, **GREY)
    for film in model.films:
        torch.nn.init.normal_(film.to_gamma_beta.weight)
    model.start_as_pca([torch.rand(40, 3, 32, 32)])
    torch.nn.init.normal_(model.pixels[-1].weight)
    torch.nn.init.normal_(model.add.weight)
    return model


def test_the_style_reaches_the_picture_and_every_weight_gets_a_gradient(model):
    images, shares = torch.rand(4, 3, 32, 32), torch.eye(3)[[0, 1, 2, 0]]
    codes, own, other, read = model(images, shares, shares.roll(1, 1), 2)
    assert own.shape == (2, 3, 32, 32)
    assert other.shape == (4, 3, 32, 32)
    (own.square().mean() + other.square().mean() + read.square().mean()).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    model.eval()
    with torch.no_grad():
        one, two = (model.decode(codes, torch.eye(3)[[style] * 4], shares) for style in (0, 1))
    assert (one - two).abs().mean() > 0.01


def test_a_style_changes_nothing_before_training():
    model = wikiart.StyleAutoencoder(3, crop=32, code=8, width=8, **GREY).eval()
    codes = torch.rand(2, 8)
    wanted, own = torch.eye(3)[:2], torch.eye(3)[1:]
    assert torch.equal(model.decode(codes, wanted, own), wikiart.Autoencoder.decode(model, codes))


def test_training_starts_from_the_plain_autoencoder_and_everything_is_in_the_checkpoint(styled, demo):
    checkpoint = load_checkpoint(styled / "style.pt", "StyleAutoencoder")
    model = wikiart.build_model(checkpoint)
    assert set(checkpoint["weights"]) == set(model.state_dict())
    plain = load_checkpoint(styled / "autoencoder.pt")["weights"]
    assert torch.equal(checkpoint["weights"]["components"], plain["components"])
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    images = crops.views(torch.from_numpy(data.pixels[data.rows]), 32)[0]
    with torch.no_grad():
        codes = model.encode(images)
        styles = torch.eye(8)[data.labels]
        own = model.decode(codes, styles, styles)
        other = model.decode(codes, styles.roll(1, 1), styles)
    assert (own - images).square().mean() < (images.mean((2, 3), keepdim=True) - images).square().mean()
    assert (own - other).abs().mean() > 1e-4


def test_a_stopped_training_ends_with_the_weights_of_an_uninterrupted_one(styled, demo, tmp_path, monkeypatch):
    parts = ["--start", str(styled / "autoencoder.pt"), "--features", str(styled / "classifier.pt")]
    command = [*TINY_STYLE, "--data", str(demo), *parts, "--epochs", "2", "--run"]
    train_style.main([*command, str(tmp_path / "whole")])
    stop_in_epoch_2(train_style, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="1 finished epochs"):
        train_style.main([*command, str(tmp_path / "parts")])
    monkeypatch.undo()
    train_style.main([*command, str(tmp_path / "parts")])
    one, two = (load_checkpoint(tmp_path / name / "style.pt")["weights"] for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_scores_and_figures(styled):
    facts = json.loads((styled / "facts.json").read_text())
    scores = facts["style_transfer"]
    for key in ("hit_rate", "originals_rate", "judge_accuracy", "source_found"):
        assert 0 <= scores[key] <= 1
    for key in ("second_judge_hit_rate", "own_unknown_hit_rate"):
        assert 0 <= scores[key] <= 1
    assert scores["truth_pairs"] == 32 * 7  # every test scene is there in every style
    assert scores["reconstruction_ratio"] > 0
    assert set(scores["hits"]) == set(load_checkpoint(styled / "style.pt")["classes"])
    assert facts["train_style"]["epochs"] == 4
    for name in ("style_grid", "style_hits", "style_curves", "repaintings"):
        assert np.asarray(Image.open(styled / f"{name}.png").convert("L")).std() > 5


@pytest.mark.parametrize("method", ["adain", "wct"])
def test_transplanted_statistics(method):
    torch.manual_seed(0)
    transplant = baselines.Transplant(method)
    maps = torch.randn(6, 3, 8, 8) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)
    weights = torch.eye(2)[[0, 0, 0, 1, 1, 1]]
    maps[3:] = maps[3:] * 2 + 5
    transplant(maps, weights)
    transplant.gathering = False
    assert torch.allclose(transplant(maps, torch.zeros(6, 2)), maps, atol=1e-2)  # no weight: the maps' own
    moved = transplant(maps, weights.flip(1)).flatten(2)
    wanted = maps.flatten(2).roll(3, 0)
    assert torch.allclose(moved.mean(2)[:3].mean(0), wanted.mean(2)[:3].mean(0), atol=1e-3)
    one, two = (baselines.covariance(flat)[:3].mean(0) for flat in (moved, wanted))
    assert torch.allclose(one.diagonal(), two.diagonal(), rtol=0.05)
    if method == "wct":
        assert torch.allclose(one, two, atol=0.05)


def test_a_net_of_others_goes_through_the_same_scores(styled, demo):
    style_transfer.main([*TINY, "--data", str(demo), "--run", str(styled), "--method", "magenta", "--paintings", "1"])
    facts = json.loads((styled / "facts.json").read_text())["style_transfer"]
    assert facts["magenta"]["paintings"] == 1
    assert 0 < facts["magenta"]["ssim"] < 1
    assert facts["magenta"]["own_mse"] == 0
    assert "hit_rate" in facts


def test_ssim_and_layout():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 32, 32)
    assert torch.allclose(metrics.ssim(images, images), torch.ones(5))
    assert metrics.ssim(images, images.roll(1, 0)).max() < 0.5
    likeness = metrics.layout(images) @ metrics.layout(images * 0.5 + 0.2).T  # lighter and flatter, the same layout
    assert (likeness.argmax(1) == torch.arange(5)).all()
    assert torch.allclose(likeness.diagonal(), torch.ones(5), atol=1e-2)


def test_a_reversed_gradient():
    values = torch.ones(3, requires_grad=True)
    losses.GradientReversal.apply(values, 0.5).sum().backward()
    assert torch.equal(values.grad, torch.full((3,), -0.5))


def test_the_feature_network_stays_as_it_is_and_is_no_part_of_the_checkpoint(model):
    network = wikiart.CNN(3, width=8, depth=1, pooling="mean_std", dropout=0.0, **GREY).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = dict.fromkeys(losses.StyleLoss.WEIGHTS, 0.1)
    criterion = losses.StyleLoss(model, network, SimpleNamespace(**weights), 0.1)
    assert {name.split(".")[0] for name in criterion.state_dict()} == {"model", "critic", "adversary"}
    criterion.train()
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    loss, _ = criterion(images, labels, (labels + 1) % 3, images.flip(0), torch.rand(6))
    loss.backward()
    assert all(weight.grad is not None for weight in criterion.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_picture_a_folder_and_the_way_between_two_styles(styled, demo, tmp_path):
    arguments = [*TINY, "--data", "nowhere", "--run", str(styled), "--out", str(tmp_path / "out")]
    source = picture(tmp_path / "in" / "wide.png", size=(60, 30))
    style_transfer.main([*arguments, "--image", str(source), "--style", "Dots", "--strength", "0.7"])
    assert Image.open(tmp_path / "out/wide_Dots.png").size == (60, 30)
    style_transfer.main([*arguments, "--image", str(source)])
    assert len(list((tmp_path / "out").glob("wide_*.png"))) == 8
    style_transfer.main([*arguments, "--image", str(source), "--style", "Dots", "Bands", "--steps", "3"])
    ways = [np.asarray(Image.open(tmp_path / f"out/wide_Dots_to_Bands_{step}.png")) for step in (1, 2, 3)]
    style_transfer.main([*arguments, "--image", str(source), "--style", "Dots"])
    assert np.array_equal(ways[0], np.asarray(Image.open(tmp_path / "out/wide_Dots.png")))
    picture(tmp_path / "in" / "deeper" / "wide.jpg", seed=1)
    (tmp_path / "in" / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"2 of 3 files repainted; not .*text.jpg"):
        style_transfer.main([*arguments, "--image", str(tmp_path / "in"), "--style", "Dots", "--detail"])
    assert (tmp_path / "out/wide.png_Dots.png").exists()
    assert (tmp_path / "out/deeper/wide.jpg_Dots.png").exists()


def test_strength_0_is_the_own_style(styled, demo):
    config = SimpleNamespace(method="model", run=styled, checkpoint="", style=[])
    repainter = style_transfer.Repainter(config, torch.device("cpu"))
    pixels = torch.from_numpy(wikiart.WikiArt(demo, "test", size=32, processes=1).pixels[:4].copy())
    source, target = torch.eye(8)[[0, 1, 2, 3]], torch.eye(8)[[4, 4, 4, 4]]
    kept = repainter.repaint(pixels, source, target, 0.0)
    assert torch.equal(kept, repainter.repaint(pixels, source, source, 1.0))
    assert not torch.equal(kept, repainter.repaint(pixels, source, target, 0.5))


def test_mistakes_get_one_clear_line(styled, tmp_path):
    arguments = ["--run", styled, "--out", tmp_path]
    good = picture(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("no picture")
    for more, message in (
        (("--image", good, "--style", "Dada"), "no style Dada"),
        (("--image", tmp_path / "bad.jpg"), "bad.jpg"),
        (("--image", tmp_path / "nowhere.jpg"), "no file and no folder"),
        (("--checkpoint", styled / "autoencoder.pt", "--image", good), "a StyleAutoencoder is needed"),
    ):
        assert message in clear_line(script("style_transfer.py", *TINY, *arguments, *more))
    with pytest.raises(UserError, match="two styles"):
        style_transfer.main([*TINY, *map(str, arguments), "--steps", "3", "--style", "Dots"])
    with pytest.raises(UserError, match=r"strength is 1.5, but must be in \[0, 1\]"):
        style_transfer.main([*TINY, *map(str, arguments), "--strength", "1.5"])


def test_style_training_needs_a_classifier_of_the_same_styles(styled, demo, folder, tmp_path):
    (tmp_path / "autoencoder.pt").write_bytes((styled / "autoencoder.pt").read_bytes())
    arguments = [*TINY_STYLE, "--run", str(tmp_path)]
    with pytest.raises(UserError, match="no checkpoint .*classifier.pt"):
        train_style.main([*arguments, "--data", str(demo)])
    (tmp_path / "classifier.pt").write_bytes((styled / "classifier.pt").read_bytes())
    with pytest.raises(UserError, match="other styles"):
        train_style.main([*arguments, "--data", str(folder), "--batch-size", "4"])


def test_style_embeddings_from_the_classifiers_mean_features(styled, demo, tmp_path):
    for name in ("autoencoder.pt", "classifier.pt"):
        (tmp_path / name).write_bytes((styled / name).read_bytes())
    arguments = ["--embed", "means", "--epochs", "1", "--data", str(demo), "--run", str(tmp_path)]
    train_style.main([*TINY_STYLE, *arguments])
    features = load_checkpoint(tmp_path / "style.pt")["weights"]["style_features"].float()
    assert features.shape == (8, 64)
    assert torch.allclose(features.mean(0), torch.zeros(64), atol=1e-2)


def test_a_true_image_is_known_of_scenes_alone():
    """One painting of each style without a title, or with a title that comes twice, are no scene."""
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])

    def pairs(*names):
        titles = [title_of(f"Cubism/{name}.jpg") for name in names]
        return style_transfer.true_image_facts(titles, labels, images, [images, images]).get("truth_pairs", 0)

    assert pairs("me_a-town", "you_a-town", "me_b", "you_c") == 2
    assert pairs("001", "002", "003", "004") == 0
    assert pairs("me_self", "you_self", "her_self", "him_b") == 0
