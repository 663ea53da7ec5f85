"""The style-conditioned autoencoder: the style reaches the picture, scores are right, files are repainted whole."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_TRAIN, clear_line, picture, script, stop_in_epoch_2
from PIL import Image
from test_autoencoder import TINY_CODES

import baselines
import losses
import runs
import scores
import style_transfer
import train
import train_autoencoder
import wikiart
import windows


@pytest.fixture(scope="module")
def styled(demo, trained, tmp_path_factory):
    """A run folder with classifier, judge, plain and style-conditioned autoencoder, and the scores."""
    run = tmp_path_factory.mktemp("styled")
    (run / "classifier.pt").write_bytes((trained / "classifier.pt").read_bytes())
    shared = ["--data", str(demo), "--run", str(run)]
    train.main([*TINY_TRAIN, *shared[:2], "--run", str(run / "judge"), "--seed", "1", "--epochs", "1"])
    train_autoencoder.main([*TINY_CODES, *shared])
    style = ["--model", "StyleAutoencoder", "--spy-weight", "0.1"]
    train_autoencoder.main([*TINY_CODES, *shared, *style, "--epochs", "4"])
    style_transfer.main([*TINY, *shared, "--judges", "judge", "classifier.pt"])
    return run


def test_two_processes_train_like_one(styled, demo, tmp_path):
    flags = [*TINY_CODES, "--model", "StyleAutoencoder", "--optimizer", "adamw", "--epochs", "1", "--data", str(demo),
             "--start", str(styled / "autoencoder.pt"), "--guide", str(styled / "classifier.pt")]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [*torchrun, ROOT / "train_autoencoder.py", *flags, "--run", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    train_autoencoder.main([*flags, "--run", str(tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / "facts.json").read_text())["train_style"] for name in ("one", "two"))
    for key in ("mse", "val_mse"):
        assert one[key] == pytest.approx(two[key], rel=1e-2), key


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = wikiart.StyleAutoencoder(3, embedding=4, crop=32, code=8, width=8)
    for film in model.films:
        torch.nn.init.normal_(film.ask.weight)
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
    model = wikiart.StyleAutoencoder(3, crop=32, code=8, width=8).eval()
    codes = torch.rand(2, 8)
    wanted, own = torch.eye(3)[:2], torch.eye(3)[1:]
    assert torch.equal(model.decode(codes, wanted, own), wikiart.Autoencoder.decode(model, codes))


def test_training_starts_from_the_plain_autoencoder_and_everything_is_in_the_checkpoint(styled, demo):
    checkpoint = runs.load_checkpoint(styled / "style.pt", "StyleAutoencoder")
    model = wikiart.build_model(checkpoint)
    assert set(checkpoint["weights"]) == set(model.state_dict())
    plain = runs.load_checkpoint(styled / "autoencoder.pt")["weights"]
    assert torch.equal(checkpoint["weights"]["components"], plain["components"])
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    images = windows.views(torch.from_numpy(data.pixels[data.rows]), 32)[0]
    with torch.no_grad():
        codes = model.encode(images)
        styles = torch.eye(8)[data.labels]
        own = model.decode(codes, styles, styles)
        other = model.decode(codes, styles.roll(1, 1), styles)
    assert (own - images).square().mean() < (images.mean((2, 3), keepdim=True) - images).square().mean()
    assert (own - other).abs().mean() > 1e-4


def test_a_stopped_training_ends_with_the_weights_of_an_uninterrupted_one(styled, demo, tmp_path, monkeypatch):
    parts = ["--start", str(styled / "autoencoder.pt"), "--guide", str(styled / "classifier.pt")]
    command = [*TINY_CODES, "--data", str(demo), "--model", "StyleAutoencoder", *parts, "--epochs", "2", "--run"]
    train_autoencoder.main([*command, str(tmp_path / "whole")])
    stop_in_epoch_2(train_autoencoder, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="1 finished epochs"):
        train_autoencoder.main([*command, str(tmp_path / "parts")])
    monkeypatch.undo()
    train_autoencoder.main([*command, str(tmp_path / "parts"), "--resume"])
    one, two = (runs.load_checkpoint(tmp_path / name / "style.pt")["weights"] for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_scores_and_figures(styled):
    facts = json.loads((styled / "facts.json").read_text())
    found = facts["style_transfer"]
    for key in ("hit_rate", "originals_rate", "judge_accuracy", "source_found", "second_judge_hit_rate",
                "own_unknown_hit_rate"):  # fmt: skip
        assert 0 <= found[key] <= 1
    assert found["truth_pairs"] == 32 * 7  # every test scene is there in every style
    assert found["reconstruction_ratio"] > 0
    assert set(found["hits"]) == set(runs.load_checkpoint(styled / "style.pt")["classes"])
    assert facts["train_style"]["epochs"] == 4
    for name in ("style_grid", "style_hits", "style_curves", "repaintings"):
        assert np.asarray(Image.open(styled / f"{name}.png").convert("L")).std() > 5


@pytest.mark.parametrize("method", ["adain", "wct"])
def test_transplanted_statistics(method):
    torch.manual_seed(0)
    film = baselines.Transplant(method)
    maps = torch.randn(6, 3, 8, 8) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)
    shares = torch.eye(2)[[0, 0, 0, 1, 1, 1]]
    maps[3:] = maps[3:] * 2 + 5
    film(maps, shares)
    film.gathering = False
    assert torch.allclose(film(maps, torch.zeros(6, 2)), maps, atol=1e-2)  # no share: the painting's own
    moved = film(maps, shares.flip(1)).flatten(2)
    wanted = maps.flatten(2).roll(3, 0)
    assert torch.allclose(moved.mean(2)[:3].mean(0), wanted.mean(2)[:3].mean(0), atol=1e-3)
    spread = baselines.covariance(moved)[:3].mean(0), baselines.covariance(wanted)[:3].mean(0)
    assert torch.allclose(spread[0].diagonal(), spread[1].diagonal(), rtol=0.05)
    if method == "wct":
        assert torch.allclose(*spread, atol=0.05)


def test_a_net_of_others_goes_through_the_same_scores(styled, demo):
    style_transfer.main([*TINY, "--data", str(demo), "--run", str(styled), "--method", "magenta", "--paintings", "1"])
    facts = json.loads((styled / "facts.json").read_text())["style_transfer"]
    assert facts["magenta"]["paintings"] == 1
    assert 0 < facts["magenta"]["ssim"] < 1
    assert facts["magenta"]["own_mse"] == 0
    assert "hit_rate" in facts


def test_measures_of_pictures():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 32, 32)
    assert torch.allclose(scores.similarity(images, images), torch.ones(5))
    assert scores.similarity(images, images.roll(1, 0)).max() < 0.5
    likeness = losses.layout(images) @ losses.layout(images * 0.5 + 0.2).T  # lighter and flatter, the same layout
    assert (likeness.argmax(1) == torch.arange(5)).all()
    assert torch.allclose(likeness.diagonal(), torch.ones(5), atol=1e-2)


def test_a_reversed_gradient():
    values = torch.ones(3, requires_grad=True)
    losses.Reverse.apply(values, 0.5).sum().backward()
    assert torch.equal(values.grad, torch.full((3,), -0.5))


def test_the_guide_stays_as_it_is_and_is_no_part_of_the_checkpoint(model):
    guide = wikiart.CNN(3, width=8).eval()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    weights = dict.fromkeys(losses.Repaint.WEIGHTS, 0.1)
    objective = losses.Repaint(model, guide, type("Config", (), weights), 0.1)
    assert not any(name.startswith("guide") for name in objective.state_dict())
    objective.train()
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    loss, _ = objective(images, labels, (labels + 1) % 3, images.flip(0), torch.rand(6))
    loss.backward()
    assert all(weight.grad is not None for weight in objective.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


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
    with pytest.raises(runs.Problem, match=r"2 of 3 files repainted; not .*text.jpg"):
        style_transfer.main([*arguments, "--image", str(tmp_path / "in"), "--style", "Dots", "--detail"])
    assert (tmp_path / "out/wide.png_Dots.png").exists()
    assert (tmp_path / "out/deeper/wide.jpg_Dots.png").exists()


def test_strength_0_is_the_own_style(styled, demo):
    model = wikiart.build_model(runs.load_checkpoint(styled / "style.pt"))
    pixels = torch.from_numpy(wikiart.WikiArt(demo, "test", size=32, processes=1).pixels[:4].copy())
    own, wanted = torch.eye(8)[[0, 1, 2, 3]], torch.eye(8)[[4, 4, 4, 4]]
    kept = style_transfer.repaint(model, pixels, own, wanted, 0.0, 32)
    assert torch.equal(kept, style_transfer.repaint(model, pixels, own, own, 1.0, 32))
    assert not torch.equal(kept, style_transfer.repaint(model, pixels, own, wanted, 0.5, 32))


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
    with pytest.raises(runs.Problem, match="two styles"):
        style_transfer.main([*TINY, *map(str, arguments), "--steps", "3", "--style", "Dots"])
    with pytest.raises(runs.Problem, match="more than 1"):
        style_transfer.main([*TINY, *map(str, arguments), "--strength", "1.5"])


def test_style_training_needs_a_classifier_of_the_same_styles(styled, demo, folder, tmp_path):
    (tmp_path / "autoencoder.pt").write_bytes((styled / "autoencoder.pt").read_bytes())
    arguments = [*TINY_CODES, "--model", "StyleAutoencoder", "--run", str(tmp_path)]
    with pytest.raises(runs.Problem, match="no checkpoint .*classifier.pt"):
        train_autoencoder.main([*arguments, "--data", str(demo)])
    (tmp_path / "classifier.pt").write_bytes((styled / "classifier.pt").read_bytes())
    with pytest.raises(runs.Problem, match="other styles"):
        train_autoencoder.main([*arguments, "--data", str(folder), "--batch-size", "4"])


def test_styles_told_by_the_classifiers_means(styled, demo, tmp_path):
    for name in ("autoencoder.pt", "classifier.pt"):
        (tmp_path / name).write_bytes((styled / name).read_bytes())
    train_autoencoder.main([*TINY_CODES, "--model", "StyleAutoencoder", "--embed", "means", "--epochs", "1",
                            "--data", str(demo), "--run", str(tmp_path)])  # fmt: skip
    given = runs.load_checkpoint(tmp_path / "style.pt")["weights"]["given"].float()
    assert given.shape == (8, 64)
    assert torch.allclose(given.mean(0), torch.zeros(64), atol=1e-2)


def test_a_truth_is_known_of_scenes_alone():
    """One painting of each style without a title, or with a title that comes twice, are no scene."""
    pixels = torch.rand(4, 3, 8, 8)

    def found(*names):
        data = SimpleNamespace(paths=[f"{'ABAB'[row]}/{name}.jpg" for row, name in enumerate(names)],
                               labels=torch.tensor([0, 1, 0, 1])[: len(names)])  # fmt: skip
        return style_transfer.truth(data, range(len(names)), pixels, [pixels, pixels]).get("truth_pairs", 0)

    assert found("me_a-town", "you_a-town", "me_b", "you_c") == 2
    assert found("001", "002", "003", "004") == 0
    assert found("me_self", "you_self", "her_self", "him_b") == 0
