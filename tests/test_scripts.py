"""Every script end to end on the tiny demo set, and what happens when something is wrong or stops halfway."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_TRAIN, clear_line, picture, script, stop_in_epoch_2
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

import cluster
import style_transfer
import test as evaluation
import train
import wikiart
from common import crops, figures, names, packages, run
from common.errors import UserError
from common.metrics import METRICS, bootstrap_scores, classification_scores, mean_interval, seen_unseen_accuracy
from common.names import title_of
from common.run import load_checkpoint


def weights_of(path):
    return torch.load(path, weights_only=True)["weights"]


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# demo.py


def test_the_demo_is_deterministic_and_says_when_it_is_there(demo, tmp_path):
    again = tmp_path / "again"
    settings = ("--train-images", 80, "--test-scenes", 4, "--picture", 32)
    script("demo.py", "--data", again, *settings, "--processes", 1)
    files = sorted(path.relative_to(demo) for path in demo.rglob("*.jpg"))
    assert len(files) >= 80 + 8 * 4
    assert files == sorted(path.relative_to(again) for path in again.rglob("*.jpg"))
    assert all((demo / path).read_bytes() == (again / path).read_bytes() for path in files)
    assert script("demo.py", "--data", again, *settings).returncode == 0
    assert "other settings" in clear_line(script("demo.py", "--data", again, "--seed", 9, *settings))


def test_the_demo_leaves_foreign_folders_alone(folder):
    before = sorted(folder.rglob("*"))
    assert str(folder) in clear_line(script("demo.py", "--data", folder))
    assert sorted(folder.rglob("*")) == before


def test_the_demo_paints_the_same_test_scenes_in_every_style_and_imbalances_training(demo):
    data = wikiart.WikiArt(demo, "train", size=16, processes=1)
    test = wikiart.WikiArt(demo, "test", size=16, processes=1)
    assert len(data.classes) == 8
    assert data.counts().max() >= 5 * data.counts().min()
    scenes = [{title_of(path) for path in test.paths[test.labels == label]} for label in range(8)]
    assert all(scene == scenes[0] for scene in scenes)
    assert not scenes[0] & {title_of(path) for path in data.paths}
    unseen = ~np.isin(test.artists, data.artists)
    assert [unseen[test.labels == label].sum() for label in range(8)] == [2] * 8


# train.py


def test_training_writes_everything(trained, demo):
    for name in ("curves.png", "classes.png"):
        assert np.asarray(Image.open(trained / name).convert("L")).std() > 5  # not blank
    lines = [json.loads(line) for line in (trained / "classifier.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    facts = json.loads((trained / "facts.json").read_text())["train"]
    assert facts["model"] == "CNN"
    assert facts["training_images"] + facts["validation_images"] == len(list((demo / "train").rglob("*.jpg")))
    assert not (trained / "classifier.partial.pt").exists()


def test_a_checkpoint_is_tensors_and_primitives_and_rebuilds_the_model(trained, demo):
    checkpoint = torch.load(trained / "classifier.pt", weights_only=True)
    assert checkpoint["classes"] == sorted(folder.name for folder in (demo / "train").iterdir())
    model = wikiart.build_model(checkpoint)
    assert set(model.state_dict()) == set(checkpoint["weights"])
    pixels = torch.from_numpy(wikiart.WikiArt(demo, "test", size=32, processes=1).pixels[:5].copy())
    probabilities = crops.predict_probabilities(model, pixels, checkpoint["crop"])
    assert torch.allclose(probabilities.sum(1), torch.ones(5), atol=1e-5)
    one_by_one = torch.cat(
        [crops.predict_probabilities(model, picture[None], checkpoint["crop"]) for picture in pixels]
    )
    assert torch.allclose(probabilities, one_by_one, atol=1e-5)


def test_same_command_same_numbers_and_a_readable_line_for_each_epoch(trained, demo, tmp_path, capsys):
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    records = [json.loads(line) for line in (tmp_path / "classifier.jsonl").read_text().splitlines()]
    for line, record in zip(lines, records, strict=True):
        scores = f"loss {record['loss']:.3f}, validation balanced accuracy {record['val_balanced_accuracy']:.1%}"
        assert re.fullmatch(rf"epoch {record['epoch']}/2: {scores}, \d+ (s|min) left", line)
    assert lines[-1].endswith(", 0 s left")
    assert same_weights(weights_of(trained / "classifier.pt"), weights_of(tmp_path / "classifier.pt"))


def test_resuming_ends_with_the_weights_of_an_uninterrupted_run(trained, demo, tmp_path, monkeypatch):
    arguments = [*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path)]
    stop_in_epoch_2(train, monkeypatch, place=6)
    with pytest.raises(KeyboardInterrupt, match="1 finished epoch .* run the same command again"):
        train.main(arguments)
    monkeypatch.undo()
    assert not (tmp_path / "classifier.pt").exists()
    with pytest.raises(UserError, match=r"unfinished training with lr = .* now it is 0\.5: .* --restart"):
        train.main([*arguments, "--lr", "0.5"])
    train.main(arguments)
    assert same_weights(weights_of(trained / "classifier.pt"), weights_of(tmp_path / "classifier.pt"))
    logs = [(folder / "classifier.jsonl").read_text().splitlines() for folder in (trained, tmp_path)]
    lines = [[json.loads(line) for line in log] for log in logs]
    for whole_line, line in zip(*lines, strict=True):  # the second epoch too, if the first was kept
        assert [whole_line[key] for key in ("loss", "val_loss")] == [line[key] for key in ("loss", "val_loss")]


def test_resuming_on_changed_paintings_is_refused(demo, trained, tmp_path):
    checkpoint = torch.load(trained / "classifier.pt", weights_only=True)
    checkpoint |= {"fingerprint": "other", "resume": {}}
    torch.save(checkpoint, tmp_path / "classifier.partial.pt")
    with pytest.raises(UserError, match="unfinished training on other paintings"):
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path)])


def test_a_loss_that_is_not_finite_stops_with_the_step(demo, tmp_path):
    advice = "the same command resumes after the last finished epoch; if it happens again, lower --lr and add --restart"
    with pytest.raises(UserError, match=rf"loss is (nan|inf) at step \d+ of epoch 1: {advice}$"):
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--lr", "1e30"])


def test_sigterm_keeps_the_finished_epochs_and_says_how_to_go_on(demo, tmp_path):
    command = [sys.executable, ROOT / "train.py", *TINY_TRAIN, "--data", demo, "--run", tmp_path, "--epochs", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "classifier.partial.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in stderr
    assert "Traceback" not in stderr
    assert run.load_checkpoint(tmp_path / "classifier.partial.pt")["history"]


def test_curves_are_drawn_every_few_epochs(demo, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "CURVE_EPOCHS", 2)
    monkeypatch.setattr(train.figures, "curves", lambda path, history, *_: drawn.append(len(history)))
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--epochs", "5"])
    assert drawn == [2, 4, 5]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.6, "60 s"), (721, "12 min"), (11100, "3 h 05 min")])
def test_durations_and_counts_are_words(seconds, text):
    assert run.duration(seconds) == text
    assert [names.count(number, "picture") for number in (0, 1, 2)] == ["0 pictures", "1 picture", "2 pictures"]


def test_tensorboard_has_the_record_of_each_epoch(demo, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="an extra: pip install -r requirements/tensorboard.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard/classifier")).Reload()
    records = [json.loads(line) for line in (tmp_path / "classifier.jsonl").read_text().splitlines()]
    for name in ("loss", "val_balanced_accuracy"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(record["epoch"], pytest.approx(record[name])) for record in records]


def test_without_tensorboard_nothing_is_trained_before_the_clear_line(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/tensorboard\.txt"):
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--tensorboard"])
    assert not (tmp_path / "classifier.partial.pt").exists()


# test.py


def test_evaluation_writes_tables_and_figures(trained, demo):
    evaluation.main([*TINY, "--data", str(demo), "--run", str(trained)])
    for name in ("confusion.png", "more/roc.png", "mistakes.png", "samples.png", "more/regions.png"):
        assert np.asarray(Image.open(trained / name).convert("L")).std() > 5
    rows = list(csv.DictReader((trained / "predictions.csv").open()))
    facts = json.loads((trained / "facts.json").read_text())["test"]
    hits = [row["class"] == row["predicted"] for row in rows]
    assert facts["images"] == len(rows) == 32
    assert facts["accuracy"] == pytest.approx(np.mean(hits), abs=1e-4)
    for name in METRICS:
        assert facts[f"{name}_low"] <= facts[name] <= facts[f"{name}_high"]
    assert all(len(row["probability"]) == len("0.1234") for row in rows)
    assert facts["majority_accuracy"] == pytest.approx(1 / 8)
    assert facts["seen_artists_images"] + facts["unseen_artists_images"] == 32
    both = [facts[f"{who}_artists_accuracy"] * facts[f"{who}_artists_images"] for who in ("seen", "unseen")]
    assert sum(both) == pytest.approx(sum(hits), abs=0.01)
    assert "baseline_accuracy" in facts
    assert [row["unsure"] for row in rows] == ["unsure" * (float(row["probability"]) < 0.5) for row in rows]
    assert facts["unsure"] == pytest.approx(np.mean([row["unsure"] == "unsure" for row in rows]))
    bands = facts["by_confidence"].values()
    assert sum(band["images"] for band in bands) == 32
    assert sum(band["images"] * band["accuracy"] for band in bands) == pytest.approx(sum(hits), abs=0.01)
    assert len((trained / "report.csv").read_text().splitlines()) == 9


def test_accuracy_by_confidence():
    right, confidence = np.array([1, 0, 1, 1, 0], bool), np.array([0.4, 0.3, 0.5, 0.95, 1.0])
    facts = evaluation.confidence_facts(right, confidence)
    assert (facts["unsure"], facts["sure_accuracy"]) == pytest.approx((0.4, 2 / 3))
    shares = {name: (band["images"], band["accuracy"]) for name, band in facts["by_confidence"].items()}
    assert shares == {"from_90": (2, 0.5), "from_50": (1, 1), "from_0": (2, 0.5)}
    facts = evaluation.confidence_facts(right, confidence / 3)
    assert facts["unsure"] == 1 and "sure_accuracy" not in facts


def test_a_style_that_was_left_out_is_scored_as_unknown(demo, tmp_path, capsys):
    flags = [*TINY, "--data", str(demo), "--run", str(tmp_path)]
    train.main([*TINY_TRAIN, *flags, "--holdout", "dots"])
    evaluation.main(flags)
    facts = json.loads((tmp_path / "facts.json").read_text())["test"]
    classifier = wikiart.Classifier.load(tmp_path / "classifier.pt", "cpu")
    assert "Dots" not in classifier.classes
    assert facts["images"] == 28
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    probabilities, left_out = classifier.predict_dataset(data), data.styles == "Dots"
    scores = probabilities.amax(1).numpy()
    pairs = [(a > b) + (a == b) / 2 for a in scores[~left_out] for b in scores[left_out]]
    assert facts["unknown_auroc"] == pytest.approx(np.mean(pairs), abs=1e-3)
    share = (probabilities[left_out].amax(1) < 0.5).float().mean().item()
    assert facts["unknown_unsure"] == pytest.approx(share, abs=1e-4)
    assert facts["unknown_confidence"] == pytest.approx(probabilities[left_out].amax(1).median().item(), abs=1e-4)
    assert "Dots, which it never saw" in capsys.readouterr().out


def test_a_checkpoint_from_elsewhere_gives_the_same_table(trained, demo, tmp_path):
    small = ["--data", str(demo)]
    evaluation.main([*TINY, *small, "--run", str(trained)])
    evaluation.main([*TINY, *small, "--run", str(tmp_path / "new"), "--checkpoint", str(trained / "classifier.pt")])
    assert (trained / "predictions.csv").read_text() == (tmp_path / "new/predictions.csv").read_text()


def test_evaluation_on_training_paintings_has_files_of_its_own(trained, demo):
    evaluation.main([*TINY, "--data", str(demo), "--run", str(trained), "--split", "train"])
    assert (trained / "confusion_train.png").exists()
    assert json.loads((trained / "facts.json").read_text())["test_train"]["images"] >= 80


def test_evaluation_on_all_paintings_and_on_a_root_with_test_alone(trained, demo, tmp_path):
    exhibition = tmp_path / "exhibition"
    shutil.copytree(demo / "test", exhibition / "test")
    arguments = [*TINY, "--checkpoint", str(trained / "classifier.pt"), "--run", str(tmp_path)]
    evaluation.main([*arguments, "--data", str(exhibition)])
    evaluation.main([*arguments, "--data", str(exhibition), "--split", "all"])
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["test"]["accuracy"] == facts["test_all"]["accuracy"] and facts["test_all"]["images"] == 32
    evaluation.main([*arguments, "--data", str(demo), "--split", "all"])
    count = len(list(demo.rglob("*.jpg")))
    assert json.loads((tmp_path / "facts.json").read_text())["test_all"]["images"] == count
    assert len((tmp_path / "predictions_all.csv").read_text().splitlines()) == count + 1
    assert (tmp_path / "confusion_all.png").exists()


def test_measures_agree_with_scikit_learn():
    random = np.random.default_rng(0)
    truth, guesses = random.integers(5, size=200), random.integers(5, size=200)
    accuracy, balanced, f1 = classification_scores(truth, guesses, 5)
    assert accuracy == pytest.approx((truth == guesses).mean())
    assert balanced == pytest.approx(balanced_accuracy_score(truth, guesses))
    assert f1 == pytest.approx(f1_score(truth, guesses, average="macro"))


def test_a_class_missing_from_the_truth_counts_for_nothing():
    truth, guesses = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    assert classification_scores(truth, guesses, 3) == pytest.approx((0.75, 0.75, (2 / 3 + 1) / 2))


def test_the_bootstrap_draws_artists_unless_they_are_few_or_the_classes():
    """Of 40 artists, each is always right or always wrong: 10 paintings by one say no more than a single one."""
    right = np.arange(40) % 4 > 0
    truth, predictions = np.repeat(np.arange(40) % 2, 10), np.repeat(np.where(right, 0, 1) ^ np.arange(40) % 2, 10)
    artists = np.repeat(np.arange(40), 10).astype(str)

    def width(artists, target="style"):
        data = SimpleNamespace(labels=torch.from_numpy(truth), classes=["a", "b"], artists=artists)
        scores = bootstrap_scores(data, predictions, target, seed=0)
        assert scores["accuracy_low"] < scores["accuracy"] == 0.75 < scores["accuracy_high"]
        return scores["accuracy_high"] - scores["accuracy_low"]

    single = 2 * 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert width(artists) == pytest.approx(single * np.sqrt(10), rel=0.15)
    assert width(artists, "artist") == pytest.approx(single, rel=0.15)
    assert width(np.full(400, "")) == pytest.approx(single, rel=0.15)
    assert width(np.full(400, "img")) == pytest.approx(single, rel=0.15)
    assert width((np.arange(400) % 9).astype(str)) == pytest.approx(single, rel=0.15)
    assert width(artists, "genre") == width(artists)
    ten = SimpleNamespace(labels=torch.from_numpy(truth), classes=["a", "b"], artists=(np.arange(400) % 10).astype(str))
    ten.artists = np.sort(ten.artists)  # each with three quarters of 40 right
    assert bootstrap_scores(ten, predictions, "style", seed=0)["accuracy_low"] == 0.75


def test_the_interval_of_a_mean_is_over_artists():
    right = np.repeat(np.arange(40) % 4 > 0, 10)
    (low, high), (near, far) = (
        mean_interval(right, artists) for artists in (np.repeat(np.arange(40), 10).astype(str), np.full(400, ""))
    )
    assert low < near < 0.75 < far < high
    assert (high - low) / (far - near) == pytest.approx(np.sqrt(10), rel=0.15)


def test_scores_without_test_time_augmentation(trained, demo):
    classifier = wikiart.Classifier.load(trained / "classifier.pt", "cpu")
    data = wikiart.WikiArt(demo, "test", size=classifier.size, classes=classifier.classes)
    facts, scales = evaluation.without_tta(classifier, data), classifier.tta_scales
    assert scales != [1.0] and "without_tta_macro_f1" in facts
    classifier.tta_scales = [1.0]
    predictions = classifier.predict_dataset(data).argmax(1)
    assert facts["without_tta_accuracy"] == (predictions == data.labels).float().mean()
    assert evaluation.without_tta(classifier, data) == {}


def test_unknown_artists_are_neither_seen_nor_unseen():
    artists = np.array(["monet", "", "", "klee"])
    data = SimpleNamespace(labels=torch.tensor([0, 0, 1, 1]), artists=artists)
    scores = seen_unseen_accuracy(["", "monet"], data, np.array([0, 1, 0, 0]))
    assert (scores["seen_artists_images"], scores["seen_artists_accuracy"]) == (1, 1)
    assert (scores["unseen_artists_images"], scores["unseen_artists_accuracy"]) == (1, 0)
    data = SimpleNamespace(labels=data.labels, artists=np.array([""] * 4))
    assert seen_unseen_accuracy([""], data, np.array([0, 1, 0, 0])) == {}


def test_figures_are_readable_at_27_classes(tmp_path):
    random = np.random.default_rng(0)
    classes = [f"Style_number_{number}" for number in range(27)]
    data = wikiart.WikiArt.__new__(wikiart.WikiArt)
    data.paths, data.artists = np.array(["test/a/b_c.jpg"] * 300), np.array(["b"] * 300)
    data.genres, data.rows = np.array(["nude"] * 300), np.arange(300)
    data.pixels = random.integers(0, 256, (300, 3, 8, 8), dtype=np.uint8)
    data.split, data.classes = "test", classes
    data.labels = torch.from_numpy(random.integers(26, size=300))  # the last class is missing
    config = SimpleNamespace(hide=["nude"], seed=0)
    probabilities = random.dirichlet(np.ones(27), 300)
    evaluation.plot_scores(tmp_path, "", data, probabilities)
    assert min(Image.open(tmp_path / "confusion.png").size) > 1000
    evaluation.plot_paintings(tmp_path, "", data, probabilities, None, config)
    for name in ("samples", "mistakes"):
        assert (tmp_path / f"{name}.png").stat().st_size < 20_000  # every picture has a genre that is not to be shown


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.py", "--data", "nowhere"), "no folder nowhere"),
        (("train.py", "--epochz", "3"), "unrecognized arguments: --epochz"),
        (("train.py", "--epochs", "many"), "invalid int value"),
        (("train.py", "-c", "missing.json"), "no settings file missing.json"),
        (("train.py", "--epoch", "3"), "unrecognized arguments: --epoch"),
        (("train.py", "--device", "cuda:99"), "the device 'cuda:99' is not available"),
        (("test.py", "--run", "nowhere"), "no checkpoint nowhere/classifier.pt"),
    ],
)
def test_a_mistake_gets_one_clear_line(tmp_path, arguments, message):
    process = script(*arguments, cwd=tmp_path)
    assert process.returncode != 0
    assert "Traceback" not in process.stderr
    assert message in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 half a zip"])
def test_a_damaged_checkpoint_gets_one_clear_line(tmp_path, content):
    (tmp_path / "classifier.pt").write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        run.load_checkpoint(tmp_path / "classifier.pt")


def test_loading_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"model": Evil()}, tmp_path / "classifier.pt")
    with pytest.raises(UserError):
        run.load_checkpoint(tmp_path / "classifier.pt")
    assert not (tmp_path / "owned").exists()


def test_two_trainings_in_one_run_folder(demo, tmp_path):
    code = "import sys, time; from common.run import claim; lock = claim(sys.argv[1], 'classifier'); "
    code += "print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another program is writing"):
            train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path)])
        other.kill()


def test_one_picture_left_over_at_evaluation(trained, demo):
    classifier = wikiart.Classifier.load(trained / "classifier.pt", "cpu")
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    in_one_batch = classifier.predict_dataset(data)
    assert torch.allclose(in_one_batch, classifier.predict_dataset(data, batch_size=31), atol=1e-5)


def test_an_unfinished_training_of_other_settings_is_kept_until_restart(trained, demo, tmp_path, monkeypatch):
    arguments = [*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path)]
    stop_in_epoch_2(train, monkeypatch, place=6)
    with pytest.raises(KeyboardInterrupt):
        train.main([*arguments, "--lr", "0.5"])
    monkeypatch.undo()
    partial = (tmp_path / "classifier.partial.pt").read_bytes()
    with pytest.raises(UserError, match="unfinished training with lr = 0.5, now it is 0.002: .* --restart"):
        train.main(arguments)
    assert (tmp_path / "classifier.partial.pt").read_bytes() == partial
    train.main([*arguments, "--restart"])
    assert same_weights(weights_of(trained / "classifier.pt"), weights_of(tmp_path / "classifier.pt"))


def test_a_finished_checkpoint_is_no_unfinished_training(trained, demo, tmp_path):
    (tmp_path / "classifier.partial.pt").write_bytes((trained / "classifier.pt").read_bytes())
    with pytest.raises(UserError, match="not an unfinished training"):
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path)])


def small_root(root, styles, paintings):
    for number in range(paintings):
        picture(root / f"S{number % styles}" / f"artist-{number % 7}_{number}.png", number)
    return root


def test_200_paintings_of_27_styles_train_with_the_default_batch_size(tmp_path, capsys):
    root = small_root(tmp_path / "root", 27, 200)
    flags = [*TINY, "--data", str(root), "--run", str(tmp_path / "run"), "--size", "32", "--crop", "32", "--width", "8"]
    train.main([*flags, "--epochs", "2"])
    checkpoint = run.load_checkpoint(tmp_path / "run/classifier.pt")
    facts = json.loads((tmp_path / "run/facts.json").read_text())["train"]
    validation = facts["validation_images"]
    images = facts["training_images"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "instead of 256" in line]
    batches = f"an epoch has {images} images, so batches of 32 instead of 256; for validation: {validation} paintings"
    assert len(lines) == 1 and lines[0].startswith(batches)
    assert checkpoint["config"]["batch_size"] == facts["batch_size"] == 32
    assert validation >= 27 and images >= 4 * 32


@pytest.mark.parametrize(
    ("styles", "paintings", "message"),
    [(1, 20, "one class only, S0: a classifier needs two"), (4, 8, "none is left for validation")],
)
def test_what_no_classifier_can_learn_from_is_refused(tmp_path, styles, paintings, message):
    root = small_root(tmp_path / "root", styles, paintings)
    with pytest.raises(UserError, match=message):
        train.main([*TINY_TRAIN, "--data", str(root), "--run", str(tmp_path / "run")])


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_of_a_root_is_not_a_root(demo, tmp_path, monkeypatch, part):
    monkeypatch.chdir(demo)
    with pytest.raises(UserError, match=r"did you mean --data \.\?"):
        train.main([*TINY_TRAIN, "--data", part, "--run", str(tmp_path)])


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.py") if path.name != "wikiart.py"))
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(name):
    done = subprocess.run([sys.executable, "-S", ROOT / name, "--help"], capture_output=True, text=True, check=False)
    assert "torch, torchvision" in clear_line(done) and ".venv" in done.stderr


def test_a_virtual_environment_that_is_there_is_named(tmp_path, monkeypatch):
    assert "run `make .venv/ready`" in packages.advice("train.py", ["torch"], tmp_path)
    (tmp_path / "ready").touch()
    assert "run it with .venv/bin/python" in packages.advice("train.py", ["torch"], tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert "run `make .venv/ready`" in packages.advice("train.py", ["torch"], tmp_path)


@pytest.mark.parametrize("genre", ["", "portrait"])
def test_a_split_that_has_moved_is_noticed(tmp_path, genre):
    """Style folders alone: with another picture the test part is drawn anew, and may hold what was trained on."""
    for number in range(60):
        picture(tmp_path / "root" / f"S{number % 2}" / f"a_{number}.png", number)
    if genre:
        (tmp_path / "root" / "metadata.csv").write_text(f"path,genre\nS0/a_0.png,{genre}\n")
    arguments = ["--data", str(tmp_path / "root"), "--run", str(tmp_path / "run")]
    train.main([*TINY_TRAIN, *arguments, "--epochs", "1"])
    evaluation.main([*TINY, *arguments])
    new = picture(tmp_path / "root" / "S0" / "a_new.png", 99)
    checkpoint = load_checkpoint(tmp_path / "run" / "classifier.pt")
    repaint = partial(style_transfer.load_paintings, checkpoint, "style.pt", [])
    for score in (
        partial(evaluation.main, [*TINY, *arguments]),
        partial(cluster.main, [*TINY, *arguments, "--codes", "classifier"]),
        partial(repaint, SimpleNamespace(data=tmp_path / "root", processes=1, split="test")),
    ):
        with pytest.raises(UserError, match="paintings have changed since .* was trained"):
            score()
    new.unlink()
    (tmp_path / "root" / "metadata.csv").write_text("path,genre\nS0/a_0.png,landscape\n")  # moves no painting
    evaluation.main([*TINY, *arguments])


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    figures.contact_sheet(tmp_path / "a.png", np.zeros((1, 3, 8, 8), np.uint8), [r"$x^ \\frac$"], 2, "a $ title")
    figures.confusion(tmp_path / "b.png", np.eye(2, dtype=int), ["$a^", "$b_{"], "title")
