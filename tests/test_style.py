"""Repainting: any size, identity without a change of style, resumed and parallel training, scores, clear messages."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY, TINY_TRAIN, clear_line, flags, picture, script, stop_in_epoch_2
from PIL import Image
from test_uploads import bomb

import style_transfer
import train
import train_autoencoder
import train_style
import wikiart
from common import baselines, layers, losses, metrics, repaint
from common.errors import UserError
from common.repaint import Repainter, open_picture, read_mixture
from common.run import file_hash, load_checkpoint, save_checkpoint

TINY_STYLE = [*TINY, *flags(size=64, crop=64, width=8, batch_size=8, per_class=4, epochs=2, validation=0.2)]
CPU = torch.device("cpu")
CLASSES = ["Naive_Art_Primitivism", "Rococo", "Ukiyo_e"]
SGD_SCRIPT = f"""
import sys
from contextlib import nullcontext
sys.path.insert(0, {str(ROOT)!r})
import torch
import train_style
train_style.Optimizers = lambda model, lr, *_, **__: torch.optim.SGD(model.parameters(), lr)
train_style.autocast = lambda *_, **__: nullcontext()
train_style.main()
"""  # half precision, Muon and AdamW amplify rounding errors


@pytest.fixture(scope="module")
def styled(demo, tmp_path_factory):
    """A run folder with classifier, judge, model, and the scores."""
    run = tmp_path_factory.mktemp("styled")
    shared = ["--data", str(demo), "--run", str(run)]
    train.main([*TINY_TRAIN, *shared, "--epochs", "15", "--ema-decay", "0.9"])
    judge = ["--run", str(run / "judge"), "--seed", "1", "--epochs", "1", "--validation", "0.2"]
    train.main([*TINY_TRAIN, *shared[:2], *judge])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_style, "EMA_DECAY", 0.5)  # or the average would hardly differ from the beginning
        train_style.main([*TINY_STYLE, *shared, "--epochs", "4"])
    style_transfer.main([*TINY, *shared, "--judges", "judge", "classifier.pt", "--paintings", "32"])
    return run


@pytest.fixture
def model():
    """A network with random weights whose decoder heeds the style."""
    torch.manual_seed(0)
    model = wikiart.StyleAutoencoder(3, width=8)
    for module in model.modules():
        if isinstance(module, layers.FiLM):
            torch.nn.init.normal_(module.to_gamma_beta.weight, std=0.3)
        if isinstance(module, layers.BatchNorm):
            module.momentum = None  # the mean of all batches, here of one
    with torch.no_grad():
        model(torch.rand(8, 3, 64, 64), torch.rand(8, 3).softmax(1), torch.rand(8, 3).softmax(1))
    return model.eval()


@pytest.fixture
def repainter(model, monkeypatch):
    monkeypatch.setattr(repaint, "autocast", lambda *_, **__: nullcontext())
    return Repainter(model, CLASSES, None, CPU)


def facts_of(run, name):
    return json.loads((run / "facts.json").read_text())[name]


def style(*weights):
    return torch.tensor([weights], dtype=torch.float32)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(first, second):
    return np.array_equal(np.asarray(first), np.asarray(second))


# The network


@pytest.mark.parametrize("size", [(32, 32), (61, 75), (33, 200), (34, 35)])
def test_any_size_comes_back_at_that_size(model, size):
    images = torch.rand(1, 3, *size)
    assert model(images, style(0, 0, 1), style(1, 0, 0)).shape == images.shape


def test_the_style_reaches_every_film(model):
    films = [module.to_gamma_beta for module in model.modules() if isinstance(module, layers.FiLM)]
    decoder = (model.from_code, model.blocks, model.middle, model.fine)
    norms = [module for part in decoder for module in part.modules() if isinstance(module, layers.BatchNorm)]
    assert len(films) == len(norms) == 11
    images, weights = torch.rand(1, 3, 32, 32), [film.weight.clone() for film in films]
    for chosen, weight in zip(films, weights, strict=True):
        with torch.no_grad():
            for film in films:
                film.weight.zero_()
            assert torch.equal(*(model(images, target, style(1, 0, 0)) for target in (style(0, 1, 0), style(0, 0, 1))))
            chosen.weight.copy_(weight)
            first, second = (model(images, target, style(1, 0, 0)) for target in (style(0, 1, 0), style(0, 0, 1)))
        assert (first - second).abs().mean() > 1e-3


def test_every_weight_gets_a_gradient(model):
    images = torch.rand(2, 3, 32, 32)
    model.train()(images, torch.eye(3)[:2], torch.eye(3)[1:]).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize("size", [(300, 330), (257, 259), (128, 386)])
def test_tiles_have_no_seams(repainter, size):
    images = torch.rand(1, 3, *size)
    styles = style(0, 0, 1), style(1, 0, 0)
    whole, tiled = repainter.paint(images, *styles), repainter.paint(images, *styles, tile=128)
    assert whole.std() > 0.02
    assert torch.allclose(whole, tiled, atol=1e-4)
    beyond = images.clone()  # and none that a thinner margin would leave
    beyond[:, :, :, 128 + repaint.MARGIN :] = 0
    assert torch.equal(repainter.paint(beyond, *styles)[..., :128], whole[..., :128])


# Repainting a picture


def test_no_change_of_style_is_strength_0(repainter):
    image = noise(50, 41)
    kept = repainter.repaint(image, {"Rococo": 1}, {"Rococo": 1})
    assert same(kept, repainter.repaint(image, {"Ukiyo_e": 1}, {"Rococo": 1}, strength=0))
    assert same(kept, repainter.repaint(image, {"Ukiyo_e": 1}, {"Ukiyo_e": 1}))
    changed = [repainter.repaint(image, {"Ukiyo_e": 1}, {"Rococo": 1}, strength) for strength in (0.5, 1, 1.5)]
    distances = [np.abs(np.asarray(each, int) - np.asarray(kept, int)).mean() for each in changed]
    assert 0.5 < distances[0] < distances[1] < distances[2]


def test_a_wrong_source_style_changes_the_result(repainter):
    image = noise(40, 40)
    right, wrong = (repainter.repaint(image, {"Ukiyo_e": 1}, {source: 1}) for source in CLASSES[:2])
    assert not same(right, wrong)


def test_a_model_conditioned_on_the_target_alone_ignores_the_source(model, repainter):
    model.relative = False
    image = noise(40, 40)
    results = [repainter.repaint(image, {"Ukiyo_e": 1}, {source: 1}) for source in CLASSES]
    assert same(results[0], results[1])
    assert not same(results[0], repainter.repaint(image, {"Rococo": 1}, {"Rococo": 1}))


def test_the_source_style_is_what_the_classifier_says(styled, demo):
    checkpoint = load_checkpoint(styled / "style.pt")
    classifier = wikiart.Classifier.load(styled / "classifier.pt", "cpu")
    repainter = Repainter(wikiart.build_model(checkpoint), checkpoint["classes"], classifier, CPU)
    image = Image.open(min((demo / "test/Dots").iterdir()))
    own = repainter.source(image)
    assert torch.allclose(own, classifier.predict(repaint.to_tensor(image))[0])
    assert own.sum() == pytest.approx(1, abs=1e-4)
    guessed = dict(zip(classifier.classes, own.tolist(), strict=True))
    assert same(repainter.repaint(image, {"Bands": 1}), repainter.repaint(image, {"Bands": 1}, guessed))
    classifier.resize = "crop"
    sides = noise(60, 20), noise(60, 20).crop((20, 0, 40, 20))
    assert torch.allclose(*(repainter.source(side) for side in sides), atol=1e-3)
    scores = facts_of(styled, "style_transfer")
    assert scores["source_balanced_accuracy"] > scores["source_majority"] == 1 / 8


def test_style_names_and_mixtures():
    for name in ("ukiyo-e=3", "UKIYO_E=3", "Ukiyo e=3", "ukiyoe=3"):
        mixture = read_mixture([name, "naïve art (primitivism)=1"], CLASSES)
        assert mixture == {"Ukiyo_e": 0.75, "Naive_Art_Primitivism": 0.25}
    assert read_mixture(["rococo", "Rococo=1"], CLASSES) == {"Rococo": 1}
    for wrong in ("Dada", "Ukiyo_e=-1", "Ukiyo_e=much", "Ukiyo_e=nan", "Ukiyo_e=0", "=1"):
        with pytest.raises(UserError, match=f"^no style {wrong[:-2]}|^{wrong}"):
            read_mixture([wrong], CLASSES)


@pytest.mark.parametrize(("name", "options"), [("a.jpg", {}), ("a.png", {}), ("b.png", {"mode": "LA"}), ("c.webp", {})])
def test_pictures_are_opened_at_no_more_than_the_longest_side(tmp_path, name, options):
    path = picture(tmp_path / name, size=(300, 201), **options)
    for source in (path, path.read_bytes()):
        assert (open_picture(source, 1024).size, open_picture(source, 1024).mode) == ((300, 201), "RGB")
        assert open_picture(source, 100).size == (100, 67)


def test_pictures_folders_and_the_way_between_two_styles(styled, tmp_path):
    out = tmp_path / "out"
    source = picture(tmp_path / "in" / "wide.png", size=(60, 41))

    def repainted(name, *more):
        arguments = [*TINY, "--data", "nowhere", "--run", str(styled), "--out", str(out)]
        style_transfer.main([*arguments, "--image", str(source), *more])
        return Image.open(out / f"wide_{name}.png")

    dots = repainted("Dots", "--style", "dots")
    assert dots.size == (60, 41)
    assert repainted("Dots", "--style", "Dots", "--longest", "50").size == (50, 34)
    every = repainted("Flat_outlines")
    assert len(list(out.iterdir())) == 8
    mixture = repainted("Flat_outlines-0.7_Dots-0.3", "--style", "flat-outlines=0.7", "DOTS=0.3")
    assert not same(mixture, dots)
    assert not same(mixture, every)
    assert not same(dots, repainted("Dots_strength-2", "--style", "Dots", "--strength", "2"))
    assert not same(dots, repainted("Dots", "--style", "Dots", "--from-style", "Flat Outlines"))
    own = repainted("Dots", "--style", "Dots", "--from-style", "Dots")
    assert same(own, repainted("Bands_strength-0", "--style", "Bands", "--from-style", "Dots", "--strength", "0"))
    last = repainted("Flat_outlines_to_Dots_3", "--style", "Flat_outlines", "Dots", "--steps", "3")
    steps = [Image.open(out / f"wide_Flat_outlines_to_Dots_{number}.png") for number in (1, 2, 3)]
    assert same(last, dots)
    assert same(steps[0], every)
    assert not same(steps[1], steps[0])
    assert not same(steps[1], steps[2])


def test_a_folder_with_broken_files(styled, tmp_path):
    picture(tmp_path / "in/wide.png", size=(60, 40))
    picture(tmp_path / "in/deeper/wide.jpg", seed=1, size=(40, 60))
    picture(tmp_path / "in/small.png", size=(40, 20))
    (tmp_path / "in/text.jpg").write_text("no picture")
    half = picture(tmp_path / "in/half.jpg", size=(60, 40)).read_bytes()
    (tmp_path / "in/half.jpg").write_bytes(half[:400])
    out, source = tmp_path / "out", str(tmp_path / "in")
    arguments = [*TINY, "--run", str(styled), "--out", str(out), "--image", source, "--style", "Dots"]
    reasons = (
        "half.jpg: incomplete: the file ends too early; .*small.png.*text.jpg: not an image, or of an unknown format"
    )
    with pytest.raises(UserError, match=f"2 of 5 files repainted; not .*{reasons}$") as error:
        style_transfer.main(arguments)
    assert "\n" not in str(error.value)
    made = {path.relative_to(out).as_posix(): Image.open(path).size for path in out.rglob("*.png")}
    assert made == {"wide.png_Dots.png": (60, 40), "deeper/wide.jpg_Dots.png": (40, 60)}


def test_it_says_what_it_wrote_and_by_which_classifier(styled, tmp_path, capsys):
    def said(name, *more):
        flags = [*TINY, "--run", str(styled), "--out", str(tmp_path / "out"), "--image", str(tmp_path / name)]
        style_transfer.main([*flags, *more])
        return capsys.readouterr().out

    picture(tmp_path / "a.png", size=(90, 60))
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter
    picture(tmp_path / "turned.jpg", size=(90, 60), exif=turned)
    assert f"{tmp_path}/out/a_Dots.png: 90 x 60 pixels\n" in said("a.png", "--style", "Dots")
    smaller = said("turned.jpg", "--style", "Dots", "--longest", "60", "--from-style", "Bands")
    assert smaller == f"{tmp_path}/out/turned_Dots.png: 40 x 60 pixels, reduced from 60 x 90 by --longest\n"
    every = said("a.png", "--longest", "60")
    assert f"a.png: {styled}/classifier.pt says that its own style is " in every
    assert f"8 pictures in {tmp_path}/out, reduced from 90 x 60 by --longest\n" in every
    picture(tmp_path / "in/small.png", size=(40, 40))
    shutil.copy(tmp_path / "a.png", tmp_path / "in")
    folder = said("in", "--longest", "60", "--style", "Dots")
    assert f"2 pictures in {tmp_path}/out; 1 of 2 files reduced by --longest\n" in folder


# Training


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(styled, demo, tmp_path, monkeypatch):
    command = [*TINY_STYLE, "--data", str(demo), "--features", str(styled / "classifier.pt"), "--run"]
    train_style.main([*command, str(tmp_path / "whole")])
    stop_in_epoch_2(train_style, monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt, match="1 finished epoch"):
        train_style.main([*command, str(tmp_path / "parts")])
    monkeypatch.undo()
    partial_state = load_checkpoint(tmp_path / "parts/style.partial.pt")["resume"]
    assert partial_state["style_stat"]["queue.counts"].sum() == partial_state["palette"]["queue.counts"].sum() == 32
    train_style.main([*command, str(tmp_path / "parts")])
    one, two = (load_checkpoint(tmp_path / name / "style.pt") for name in ("whole", "parts"))
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    for first, second in zip(one["history"], two["history"], strict=True):
        assert {k: v for k, v in first.items() if "seconds" not in k} == {
            k: v for k, v in second.items() if "seconds" not in k
        }


def test_two_processes_train_like_one(styled, demo, tmp_path, monkeypatch):
    arguments = [*TINY_STYLE, *flags(epochs=1, lr=0.002, data=demo, features=styled / "classifier.pt")]
    with_sgd = tmp_path / "with_sgd.py"
    with_sgd.write_text(SGD_SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [*torchrun, with_sgd, *arguments, "--run", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    sgd = lambda model, lr, *_, **__: torch.optim.SGD(model.parameters(), lr)  # noqa: E731
    monkeypatch.setattr(train_style, "Optimizers", sgd)
    monkeypatch.setattr(train_style, "autocast", lambda *_, **__: nullcontext())
    train_style.main([*arguments, "--run", str(tmp_path / "one")])
    one, two = (load_checkpoint(tmp_path / name / "style.pt")["history"][0] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in ("loss", "critic_error", "mse", "style_stat", "palette", "content", "layout", "val_psnr"):
        assert one[key] == pytest.approx(two[key], rel=5e-3), key


def test_a_queue_keeps_the_last_rows_of_each_style(monkeypatch):
    queue = losses.StyleQueue(3, 2, 1)
    queue.add(torch.tensor([[1.0], [2], [3]]), torch.tensor([0, 0, 1]))
    queue.add(torch.tensor([[4.0], [5]]), torch.tensor([0, 0]))
    drawn = queue.sample(torch.tensor([0, 1]), torch.tensor([[0.0, 0.49, 0.5, 0.99]] * 2))[:, :, 0]
    assert sorted(drawn[0].tolist()) == [4, 4, 5, 5]
    assert set(drawn[1].tolist()) == {3}  # none of the places that are still empty
    restored = losses.StyleQueue(3, 2, 1)
    restored.load_state_dict(queue.state_dict())
    for each in (queue, restored):
        each.add(torch.tensor([[6.0]]), torch.tensor([0]))
        assert sorted(each.rows[0, :, 0].tolist()) == [5, 6]


def test_queues_of_two_processes_have_the_order_of_one(monkeypatch):
    rows, labels = torch.arange(8.0)[:, None], torch.tensor([0, 1, 0, 0, 1, 0, 0, 0])
    one, two = losses.StyleQueue(2, 3, 1), losses.StyleQueue(2, 3, 1)
    one.add(rows, labels)
    whole = {2: rows, 1: labels}
    monkeypatch.setattr(losses, "gather", lambda part: torch.cat([whole[part.ndim][0::2], whole[part.ndim][1::2]]))
    two.add(rows[0::2], labels[0::2])
    assert torch.equal(one.rows, two.rows)
    assert torch.equal(one.counts, two.counts)
    for label in (0, 1):  # as if they had come one after the other
        kept = rows[labels == label][-3:].flatten().tolist()
        assert sorted(one.rows[label].flatten().tolist()) == sorted([0.0] * (3 - len(kept)) + kept)


def test_the_nearest_real_painting_is_the_target():
    statistics = torch.tensor([[0.0] * 13, [5.0] * 13, [9.0] * 13])
    loss = losses.StyleStatLoss(2, [2])
    assert loss.sizes == [4, 9]
    pick = torch.tensor([[0.0, 0.99]] * 3)
    loss(statistics, statistics, torch.tensor([0, 0, 1]), pick)  # fills the queues
    near, far = (
        loss(x[None], statistics[2:], torch.tensor([1]), pick[:1]) for x in (statistics[2] + 0.1, statistics[0])
    )
    assert near < 0.01 < far
    other = loss(statistics[1:2] + 0.1, statistics[2:], torch.tensor([0]), torch.tensor([[0.0, 0.5]]))
    assert other < 0.01  # 5, not 0 or their mean


def test_the_nearest_palette_counts():
    torch.manual_seed(0)
    loss, reals = losses.PaletteLoss(2, 16), torch.rand(6, 3, 16, 16)
    labels, pick = torch.tensor([0, 0, 0, 0, 1, 1]), (torch.arange(4) / 4).expand(6, 4)
    assert loss(reals, reals, labels, pick) < 1e-6
    assert loss(reals[:1], reals[4:5], torch.tensor([1]), pick[:1]) > 1e-3  # it is of another style
    mirrored = reals[1:2].unflatten(3, (4, 4)).flip(3).flatten(3)
    assert loss(mirrored, reals[1:2], torch.tensor([0]), pick[:1]) < 1e-6  # where colours are does not count


def test_losses_of_composition_ignore_style_and_notice_the_rest():
    torch.manual_seed(0)
    maps, images = torch.rand(2, 5, 8, 8), torch.rand(2, 3, 32, 32)
    scale = torch.rand(1, 5, 1, 1) + 0.5
    assert losses.content_loss(scale * maps + 3, maps) < 1e-3 < losses.content_loss(maps.flip(3), maps)
    assert losses.layout_loss(0.5 * images + 0.2, images) < 1e-3 < losses.layout_loss(images.flip(3), images)
    assert losses.range_loss(images) == 0 < losses.range_loss(images + 0.5)


def test_the_critic_tells_styles_apart_and_the_features_stay_as_they_are():
    torch.manual_seed(0)
    network = wikiart.CNN(3, width=8, depth=1, pooling="mean_std", dropout=0.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    features = losses.FeatureMaps(network, torch.rand(4, 3, 64, 64))
    images = torch.rand(2, 3, 64, 64)
    maps, logits = features(images)
    assert [each.shape[1] for each in maps] == features.channels == [8, 8, 16, 32]
    assert logits.shape == (2, 3)
    critic = losses.Critic(features.channels, 3)
    first, second = (critic(images, maps, torch.eye(3)[rows]) for rows in ([0, 1], [1, 0]))
    assert len(first) == 5
    assert all(not torch.allclose(x, y) for x, y in zip(first, second, strict=True))
    losses.generator_loss(first).backward()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())
    assert losses.critic_loss([torch.ones(2)], [-torch.ones(2)], [-torch.ones(2)]) == 0
    assert losses.critic_loss([torch.ones(2)], [-torch.ones(2)], [torch.ones(2)]) > 0  # real, but of another style


def test_a_decoder_that_is_conditioned_on_the_target_alone(demo, styled, tmp_path, monkeypatch):
    monkeypatch.setattr(train_style, "EMA_DECAY", 0.5)
    shutil.copy(styled / "classifier.pt", tmp_path)
    shared = ["--data", str(demo), "--run", str(tmp_path)]
    train_style.main([*TINY_STYLE, *shared, "--condition", "style", "--lr", "0.02"])
    assert facts_of(tmp_path, "train_style")["condition"] == "style"
    image = str(min((demo / "test/Dots").iterdir()))
    results = {}
    for source, target in (("Dots", "Bands"), ("Facets", "Bands"), ("Dots", "Dots")):
        out = tmp_path / source
        command = ["--image", image, "--style", target, "--from-style", source, "--out", str(out)]
        style_transfer.main([*TINY, *shared, *command])
        results[source, target] = Image.open(next(out.glob(f"*_{target}.png")))
    assert same(results["Dots", "Bands"], results["Facets", "Bands"])
    assert not same(results["Dots", "Bands"], results["Dots", "Dots"])


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_a_backbone_of_timm_as_the_network_of_features(demo, tmp_path, name):
    torch.manual_seed(0)
    weights = tmp_path / "small.pt"
    torch.save({"state_dict": timm.create_model(name).state_dict()}, weights)
    command = [*TINY_STYLE, "--data", str(demo), "--run", str(tmp_path), "--epochs", "1"]
    train_style.main([*command, "--features", name, "--weights", str(weights)])
    record = load_checkpoint(tmp_path / "style.pt")["history"][0]
    assert np.isfinite(record["loss"])
    assert record["style_stat"] > 0
    assert "style_ce" not in record
    assert "val_hit_rate" not in record


# Scores


def test_scores_and_figures(styled):
    facts = json.loads((styled / "facts.json").read_text())
    scores = facts["style_transfer"]
    for name in ("hit_rate", "own_kept", "judge_accuracy", "originals_rate"):
        assert 0 <= scores[name] <= 1
        assert 0 <= scores[f"second_{name}"] <= 1
    for name in ("source_found", "source_balanced_accuracy", "unknown_source_hit_rate", "truth_nearer"):
        assert 0 <= scores[name] <= 1, name
    assert scores["fid"] > 0 < scores["fid_originals"]
    assert scores["fid_ratio"] == pytest.approx(scores["fid"] / scores["fid_originals"], rel=1e-3)
    assert 0 < scores["ssim"] < 1
    assert 0 <= scores["position"] < 0.2
    assert 5 < scores["own_psnr"] < 60
    assert scores["seconds_per_megapixel"] > 0
    assert (scores["paintings"], scores["directions"]) == (32, 64)
    assert scores["truth_pairs"] == 4 * 8 * 7  # every test scene is there in every style
    assert -20 < scores["truth_gain_db"] < 20
    assert scores["checkpoint"] == file_hash(styled / "style.pt")[:12]
    assert scores["hit_rate_low"] <= scores["hit_rate"] <= scores["hit_rate_high"]
    assert facts["train_style"]["epochs"] == 4
    assert facts["train_style"]["steps"] == 16


@pytest.mark.parametrize(
    ("name", "columns", "rows", "cell"),
    [
        ("style_grid", 9, 8, 160),
        ("more/style_row", 5, 2, 224),
        ("more/style_strength", 6, 5, 224),
        ("more/style_triptych", 3, 1, 512),
        ("style_truth", 3, 8, 160),
        ("more/style_samples", 9, 8, 160),
    ],
)
def test_pictures_have_true_colours_and_large_cells(styled, name, columns, rows, cell):
    with Image.open(styled / f"{name}.png") as image:
        assert image.mode == "RGB"
        assert image.width >= columns * cell
        assert image.height >= rows * cell
        assert np.asarray(image).std() > 5


@pytest.mark.parametrize("method", ["adain", "wct"])
def test_methods_to_compare_with(styled, demo, method):
    before = facts_of(styled, "style_transfer")
    shared = ["--data", str(demo), "--run", str(styled), "--judges", "judge", "classifier.pt", "--paintings", "16"]
    style_transfer.main([*TINY, *shared, "--method", method])
    facts = facts_of(styled, "style_transfer")
    assert 0 < facts[method]["ssim"] < 1
    assert facts["fid"] == before["fid"]  # the model's facts stay
    assert (styled / f"more/style_grid_{method}.png").exists()


def test_scores_on_validation_paintings(styled, demo, monkeypatch):
    """Of the paintings that the model was not trained on, by judges that were not trained on them either."""
    before, repainted = facts_of(styled, "style_transfer"), []
    paint = Repainter.paint
    monkeypatch.setattr(Repainter, "paint", lambda self, *batch: repainted.append(batch[0]) or paint(self, *batch))
    command = [*TINY, "--data", str(demo), "--run", str(styled), "--split", "validation"]
    style_transfer.main([*command, "--judges", "judge"])
    facts = facts_of(styled, "style_transfer")
    checkpoint = load_checkpoint(styled / "style.pt")
    data = wikiart.WikiArt(demo, "train", classes=checkpoint["classes"], **checkpoint["data"])
    _, held_out = data.split_off(checkpoint["config"]["validation"], checkpoint["data"]["split_seed"])
    assert facts["validation"]["paintings"] == len(held_out)
    first = held_out.pixels[held_out.rows[: len(repainted[0])]]
    assert torch.equal(repainted[0], torch.from_numpy(first) / 255)
    assert facts["hit_rate"] == before["hit_rate"]  # the scores on test paintings stay
    saved = load_checkpoint(styled / "judge/classifier.pt")
    save_checkpoint(styled / "other.pt", saved | {"config": saved["config"] | {"split_seed": 7}})
    with pytest.raises(UserError, match="other.pt has seen validation paintings"):
        style_transfer.main([*command, "--judges", "other.pt"])


def test_an_autoencoder_with_styles_as_a_method(styled, demo):
    shared, folder = ["--data", str(demo), "--run", str(styled)], styled / "conditional"
    sizes = ["--size", "32", "--crop", "32", "--width", "8", "--code", "16", "--epochs", "1", "--batch-size", "16"]
    judges = ["--judges", "judge", "classifier.pt", "--paintings", "16"]
    command = [*TINY, *shared, *judges, "--method", "autoencoder"]
    train_autoencoder.main([*TINY, *shared, *sizes, "--run", str(folder)])
    with pytest.raises(UserError, match="no embeddings of these styles: train it with --conditional"):
        style_transfer.main(command)
    train_autoencoder.main([*TINY, *shared, *sizes, "--run", str(folder), "--conditional"])
    style_transfer.main(command)
    assert 0 < facts_of(styled, "style_transfer")["autoencoder"]["ssim"] < 1
    assert load_checkpoint(folder / "autoencoder.pt")["arguments"]["styles"] == 8


def test_the_true_pictures_are_those_with_the_most_visible_marks(monkeypatch):
    """Of two scenes in two styles: 0 is marked in the first scene, 1 in the second."""
    originals = torch.full((4, 3, 8, 8), 0.5)
    originals[0, :, ::2] = originals[3, :, ::2] = 1
    pairs, drawn = [(1, 0, 0), (0, 1, 1), (3, 2, 0), (2, 3, 1)], []
    monkeypatch.setattr(style_transfer.figures, "painting_grid", lambda _, cells, *__: drawn.append(cells))
    style_transfer.plot_truth("a.png", pairs, originals, [originals, originals], ["A", "B"], [0, 1, 0, 1])
    assert (drawn[0][:, 2].std((1, 2, 3)) > 0).all()


class Codes(torch.nn.Module):
    """A network whose codes are images at a quarter of the size, and the other way round."""

    STRIDE = 4

    def encode(self, images):
        return torch.nn.functional.avg_pool2d(images, 4)

    def decode(self, codes, target, source):
        return codes.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("method", ["adain", "wct"])
def test_transplanted_codes_have_the_statistics_of_the_style(demo, method):
    data = wikiart.WikiArt(demo, "train", size=32, processes=1)
    transplant = baselines.Transplant(Codes(), data, method, CPU)
    label = data.classes.index("Bands")
    rows = torch.from_numpy(data.pixels[data.rows[(data.labels == label).numpy()]]) / 255
    mean, cov = (values.mean(0) for values in baselines.moments(Codes().encode(rows)))
    assert torch.allclose(transplant.means[label], mean, atol=1e-4)
    assert torch.allclose(transplant.covariances[label], cov, atol=1e-4)
    mean = torch.tensor([0.4, 0.5, 0.6])  # so that no pixel leaves [0, 1]
    cov = torch.tensor([[0.004, 0.002, 0], [0.002, 0.003, 0.001], [0, 0.001, 0.005]])
    transplant.means[label], transplant.covariances[label] = mean, cov
    images, target = torch.rand(2, 3, 34, 30), torch.eye(len(data.classes))[[label, label]]
    painted = transplant.paint(images, target, target)
    assert painted.shape == images.shape
    made_mean, made_cov = baselines.moments(painted[:, :, ::4, ::4])
    assert torch.allclose(made_mean, mean.expand(2, 3), atol=0.01)
    diagonals = [each.diagonal(dim1=1, dim2=2) for each in (made_cov, cov.expand(2, 3, 3))]
    assert torch.allclose(*diagonals, rtol=0.15)
    assert torch.allclose(made_cov, cov.expand(2, 3, 3), atol=5e-4) == (method == "wct")


def test_measures_of_pictures():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 32, 32)
    assert torch.allclose(metrics.ssim(images, images), torch.ones(5))
    assert (metrics.ssim(images, images.flip(3)) < 0.5).all()
    corner = torch.zeros(3, 32, 32)
    corner[:, :8, :8] = 0.5
    assert metrics.position_deviation(images + 0.1, images) == pytest.approx(0, abs=1e-6)
    assert metrics.position_deviation(images + corner, images) > 0.02
    x = torch.randn(500, 4)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(x + 2, x) == pytest.approx(16, abs=1e-4)
    assert 0.5 < metrics.frechet_distance(2 * x, x) < metrics.frechet_distance(3 * x, x)


def test_true_images_of_scenes_that_occur_in_every_style():
    def data(*titles):
        paths = [f"test/{style}/painter_{title}.jpg" for style, title in zip("ABABA", titles, strict=True)]
        return SimpleNamespace(paths=paths, labels=torch.tensor([0, 1, 0, 1, 0]), classes=["A", "B"])

    originals = torch.rand(5, 3, 8, 8)
    true = [originals[[0, 0, 2, 2, 4]], originals[[1, 1, 3, 3, 4]]]  # perfect repaintings
    half = [(originals + each) / 2 for each in true]
    pairs = style_transfer.true_pairs(data("a", "a", "b", "b", "only-once"))
    assert sorted(pairs) == [(0, 1, 1), (1, 0, 0), (2, 3, 1), (3, 2, 0)]
    facts = style_transfer.true_image_facts(pairs, originals, half)
    assert facts["truth_pairs"] == 4
    assert facts["truth_gain_db"] == pytest.approx(6.02, abs=0.01)  # a quarter of the squared error
    assert facts["truth_gain_median_db"] == pytest.approx(6.02, abs=0.01)
    assert facts["truth_nearer"] == 1
    kept = style_transfer.true_image_facts(pairs, originals, [originals, originals])
    assert (kept["truth_gain_db"], kept["truth_nearer"]) == (0, 0)
    assert style_transfer.true_pairs(data("a", "a", "a", "b", "c")) == []  # twice in one style
    assert style_transfer.true_image_facts([], originals, half) == {}


def test_styles_without_test_paintings_and_few_paintings_are_fine(styled, demo, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(demo, data, ignore=shutil.ignore_patterns(".cache"))
    shutil.rmtree(data / "test/Bands")
    for path in sorted((data / "test/Dots").iterdir())[1:]:
        path.unlink()
    run.mkdir()
    for name in ("classifier.pt", "style.pt"):
        shutil.copy(styled / name, run)
    shared = ["--data", str(data), "--run", str(run), "--judges", "classifier.pt", "classifier.pt"]
    style_transfer.main([*TINY, *shared, "--paintings", "6"])
    facts = facts_of(run, "style_transfer")
    assert np.isfinite([facts[name] for name in ("hit_rate", "fid", "fid_ratio", "position", "ssim")]).all()
    assert len(facts["fid_ratios"]) == 6


def test_without_two_real_paintings_of_a_style_there_is_no_frechet_distance(styled, demo, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(demo / "train", data / "train")
    for style in (demo / "test").iterdir():
        (data / "test" / style.name).mkdir(parents=True)
        shutil.copy(min(style.iterdir()), data / "test" / style.name)
    run.mkdir()
    for name in ("classifier.pt", "style.pt"):
        shutil.copy(styled / name, run)
    shared = ["--data", str(data), "--run", str(run), "--judges", "classifier.pt", "classifier.pt"]
    style_transfer.main([*TINY, *shared])
    facts = facts_of(run, "style_transfer")
    assert not [name for name in facts if name.startswith("fid") or name == "directions"]
    assert np.isfinite(facts["hit_rate"])


def test_of_many_paintings_whole_scenes_are_chosen(demo):
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    rows = style_transfer.choose(data, 20)
    assert len(rows) == len(set(rows)) == 16
    assert len(style_transfer.true_pairs(data.subset(rows))) == 2 * 8 * 7
    assert len(style_transfer.choose(data, 6)) == 6
    assert style_transfer.choose(data, 500).tolist() == list(range(32))


# Mistakes


def test_pictures_that_are_too_large_take_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("the picture was decoded"))
    for side in (10_100, 20_000):
        (tmp_path / "large.png").write_bytes(bomb(side))
        for source in (tmp_path / "large.png", bomb(side)):
            with pytest.raises(UserError, match="more than 100 megapixels"):
                open_picture(source, 1024)


def test_mistakes_get_one_clear_line(styled, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(Repainter, "paint", lambda *_: pytest.fail("repainted for nothing"))
    good, small = picture(tmp_path / "good.png", size=(40, 40)), picture(tmp_path / "small.png", size=(40, 20))
    narrow = picture(tmp_path / "folder/narrow.png", size=(2048, 40))
    (tmp_path / "large.png").write_bytes(bomb(11_000))
    (tmp_path / "empty").mkdir()
    old, alone = load_checkpoint(styled / "style.pt"), tmp_path / "alone" / "style.pt"
    save_checkpoint(tmp_path / "old.pt", old | {"arguments": old["arguments"] | {"crop": 64}})
    save_checkpoint(alone, old)
    save_checkpoint(tmp_path / "classes" / "style.pt", old | {"classes": [*old["classes"][:-1], "Zen"]})
    shutil.copy(styled / "classifier.pt", tmp_path / "classes")
    arguments = [*TINY, "--run", str(styled), "--out", str(tmp_path / "out")]
    for more, message in (
        (("--image", good, "--style", "Dada"), "no style Dada: give one of Bands, "),
        (("--image", good, "--style", "Dots", "Dada=0.3"), "no style Dada"),
        (("--image", good, "--from-style", "Dada"), "no style Dada"),
        (("--image", small), "small.png is too small: 40 x 20 pixels, 32 a side are needed"),
        (("--image", tmp_path / "nowhere.jpg"), "no file and no folder .*nowhere.jpg"),
        (("--image", tmp_path / "empty"), "empty holds no image"),
        (("--image", good, "--style", "Dots", "--steps", "3"), "--steps needs two styles"),
        (("--image", good, "--style", "Dots", "dots", "--steps", "3"), "--steps needs two styles"),
        (("--image", good, "--style", "Dots=0.3", "Bands", "--steps", "3"), "--steps needs two styles without weights"),
        (("--image", good, "--style", "Dots", "Bands", "--steps", "1"), "and 2 or more"),
        (("--image", good, "--method", "adain"), "--method adain is for the scores of test paintings"),
        (("--image", good, "--out", small), "cannot make the folder --out .*small.png"),
        (("--image", tmp_path / "folder", "--out", tmp_path / "folder/out"), "the next run would repaint the results"),
        (("--image", narrow), "too narrow: reduced to 1024 x 20 pixels; raise --longest"),
        (("--data", demo, "--judges", "classifier.pt", "--style", "Dots=0.3"), "mixtures of styles need --image"),
        (("--steps", "3", "--style", "Dots", "Bands"), "need --image"),
        (("--data", demo, "--judges", "judge", "--style", "Dada"), "no style Dada"),
        (("--checkpoint", tmp_path / "old.pt", "--image", good), "old.pt holds .* earlier version: train again"),
        (("--image", good, "--run", tmp_path / "new"), r"new/style.pt: .* --checkpoint (\.\./)*.*report/style\.pt$"),
        (("--run", tmp_path / "new"), r"new/style.pt: run the script that trains it"),
        (("--checkpoint", alone, "--image", good), "no checkpoint .*alone/classifier.pt"),
        (("--checkpoint", tmp_path / "classes/style.pt", "--image", good), "the classifier knows other styles"),
        (("--checkpoint", styled / "classifier.pt", "--image", good), "a StyleAutoencoder is needed"),
    ):
        with pytest.raises(UserError, match=message) as error:
            style_transfer.main([*arguments, *map(str, more)])
        assert "\n" not in str(error.value)
    monkeypatch.undo()
    line = clear_line(script("style_transfer.py", *arguments, "--image", tmp_path / "large.png", "--style", "Dots"))
    assert "large.png has more than 100 megapixels" in line
    style_transfer.main([*arguments, "--checkpoint", str(alone), "--image", str(good), "--from-style", "Dots"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--crop", "66", "--size", "80"), "multiple of 4"),
        (("--crop", "80"), "at most --size"),
        (("--width", "10"), "multiple of 4"),
        (("--features", "missing.pt"), "no checkpoint .*missing.pt"),
        (("--features", "mlp/classifier.pt"), "a CNN is needed"),
        (("--features", "nosuchnet", "--weights", "classifier.pt"), "Unknown model"),
        (("--features", "test_vit3"), "test_vit3 takes images of one size only"),
        (("--features", "test_convnext"), "--crop 64 is too small for test_convnext"),
        (("--lr", "1e30"), "the loss is .* at step .* of epoch .*: the same command resumes .* lower --lr"),
    ],
)
def test_wrong_settings_of_training_get_one_clear_line(trained, demo, tmp_path, arguments, message):
    shutil.copy(trained / "classifier.pt", tmp_path)
    if arguments[1].startswith("mlp"):
        arguments = ("--features", str(trained / arguments[1]))
    if arguments[1].startswith("test_"):
        torch.save(timm.create_model(arguments[1]).state_dict(), tmp_path / "small.pt")
        arguments = (*arguments, "--weights", str(tmp_path / "small.pt"))
    with pytest.raises(UserError, match=message) as error:
        train_style.main([*TINY_STYLE, "--data", str(demo), "--run", str(tmp_path), *arguments])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "style.pt").exists()


def test_training_needs_a_classifier_of_the_same_styles(styled, folder, tmp_path):
    shutil.copy(styled / "classifier.pt", tmp_path)
    arguments = ["--data", str(folder), "--validation", "0.5", "--batch-size", "4", "--run", str(tmp_path)]
    with pytest.raises(UserError, match="other styles"):
        train_style.main([*TINY_STYLE, *arguments])
