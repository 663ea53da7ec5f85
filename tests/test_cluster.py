"""Clusters: scores on planted ones, codes that are stale or broken, figures that are there."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from test_autoencoder import TINY_CODES

import cluster
import runs
import train_autoencoder
import wikiart
import windows


def planted(classes=5, each=30, seed=0):
    """Codes around well separated centres, and which centre each is of."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return 10 * random.normal(size=(classes, 8))[labels] + random.normal(size=(classes * each, 8)), labels


@pytest.mark.parametrize("method", list(cluster.METHODS))
def test_planted_clusters_are_found(method):
    codes, labels = planted()
    found = cluster.group(codes, method, 5, seed=0)
    facts = cluster.scores(labels, found, codes, seed=0)
    for key in ("nmi", "ami", "ari", "homogeneity", "completeness", "purity"):
        assert facts[key] == pytest.approx(1, abs=0.02), key
    assert facts["silhouette"] > 0.5
    assert abs(facts["shuffled_ari"]) < 0.05
    assert abs(facts["shuffled_ami"]) < 0.05


def test_scores_of_random_clusters_are_near_zero():
    codes, labels = planted()
    random = np.random.default_rng(1).integers(5, size=len(labels))
    facts = cluster.scores(labels, random, codes, seed=0)
    assert abs(facts["ari"]) < 0.05
    assert abs(facts["ami"]) < 0.05


def test_the_table_counts_paintings_of_each_style_in_each_cluster():
    table = cluster.contingency(np.array([0, 0, 1, 1, 2]), np.array([-1, -1, 3, -1, 3]))
    assert table.tolist() == [[2, 0], [1, 1], [0, 1]]


def test_a_colour_histogram_counts_shares():
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0, 0] = 1.0  # one red pixel of four, the rest black
    codes = cluster.colours(images)
    assert codes.shape == (1, 64)
    assert codes[0, 3 * 16] == 0.5
    assert codes[0, 0] == pytest.approx(0.75**0.5)


@pytest.fixture(scope="module")
def studied(demo, trained, tmp_path_factory):
    """A run folder with an autoencoder and a classifier, all sources clustered."""
    run = tmp_path_factory.mktemp("studied")
    for folder, weight in ((run, "0"), (run / "manner", "0.15")):
        train_autoencoder.main([*TINY_CODES, "--data", str(demo), "--run", str(folder), "--manner-weight", weight])
    (run / "classifier.pt").write_bytes((trained / "classifier.pt").read_bytes())
    cluster.main([*TINY, "--size", "32", "--data", str(demo), "--run", str(run), "--codes", "all"])
    return run


def test_every_source_that_is_there_gets_scores_figures_and_codes(studied):
    facts = json.loads((studied / "facts.json").read_text())
    assert {"autoencoder", "manner", "classifier", "pixels", "colours"} <= set(facts["cluster"])
    for source, found in facts["cluster"].items():
        assert -1 <= found["ari"] <= 1
        assert 0 <= found["probe"] <= 1
        for kind in ("tsne", "pca", "clusters", "centroids", "map", "k"):
            assert np.asarray(Image.open(studied / f"{kind}_{source}.png").convert("L")).std() > 5, (kind, source)
        with np.load(studied / "codes" / f"{source}.npz") as table:
            assert len(table["test"]) == len(table["test_labels"]) == len(table["test_paths"]) == 32
            assert len(table["train"]) == len(table["train_artists"])
    named = (studied / "centroids_manner.txt").read_text().strip().split("\n\n")
    assert len(named) == facts["cluster"]["manner"]["clusters"]
    assert named[0].startswith("cluster 1: ")
    assert named[0].count(": ") == 1 + min(8, 1 + named[0].count("; "))  # painter: title, of eight at most
    assert 1 < len((studied / "map_manner.txt").read_text().splitlines()) <= 32
    assert "| autoencoder |" in (studied / "clusters.md").read_text()
    assert "train_autoencoder" in facts  # nothing else was lost


def test_codes_do_not_depend_on_the_batch_size(studied, demo, tmp_path):
    (tmp_path / "autoencoder.pt").write_bytes((studied / "autoencoder.pt").read_bytes())
    arguments = [*TINY, "--size", "32", "--data", str(demo), "--run", str(tmp_path), "--batch-size", "7"]
    cluster.main([*arguments, "--codes", "autoencoder", "pixels"])
    for source in ("autoencoder", "pixels"):
        one, other = (np.load(run / f"codes/{source}.npz") for run in (studied, tmp_path))
        assert np.allclose(one["test"], other["test"], atol=1e-3)
        assert (one["test_paths"] == other["test_paths"]).all()


def test_codes_are_those_of_the_autoencoder(studied, demo):
    model = wikiart.build_model(runs.load_checkpoint(studied / "autoencoder.pt"))
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    images = windows.views(torch.from_numpy(data.pixels[data.rows]), 32)[0]
    with torch.no_grad(), np.load(studied / "codes/autoencoder.npz") as table:
        assert torch.allclose(model.encode(images), torch.from_numpy(table["test"]), atol=1e-4)


def test_rows_of_one_table_were_made_alike(studied, demo, tmp_path):
    for name in ("autoencoder.pt", "facts.json"):
        (tmp_path / name).write_bytes((studied / name).read_bytes())
    arguments = [*TINY, "--size", "32", "--data", str(demo), "--run", str(tmp_path)]
    cluster.main([*arguments, "--method", "hdbscan"])
    table = (tmp_path / "clusters.md").read_text()
    assert "HDBSCAN" in table
    assert "| autoencoder |" in table
    assert "| colours |" not in table


def test_a_file_that_holds_no_codes_gets_one_clear_line(demo, tmp_path):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/colours.npz").write_text("no codes")
    with pytest.raises(runs.Problem, match="not a file of codes"):
        cluster.main([*TINY, "--data", str(demo), "--run", str(tmp_path), "--codes", "colours"])


def test_stale_codes_are_refused_until_they_are_renewed(studied, demo, tmp_path):
    (tmp_path / "codes").mkdir()
    arguments = [*TINY, "--data", str(demo), "--run", str(tmp_path)]
    (tmp_path / "codes/autoencoder.npz").write_bytes((studied / "codes/autoencoder.npz").read_bytes())
    checkpoint = runs.load_checkpoint(studied / "autoencoder.pt")
    runs.save_checkpoint(tmp_path / "autoencoder.pt", checkpoint | {"epoch": 77})
    with pytest.raises(runs.Problem, match=r"another checkpoint .* --renew"):
        cluster.main(arguments)
    cluster.main([*arguments, "--renew"])
    cluster.main(arguments)


def test_codes_that_are_not_finite_get_one_clear_line(studied, demo, tmp_path):
    (tmp_path / "autoencoder.pt").write_bytes((studied / "autoencoder.pt").read_bytes())
    (tmp_path / "codes").mkdir()
    table = dict(np.load(studied / "codes/autoencoder.npz"))
    table["train"][3, 4] = np.nan
    np.savez(tmp_path / "codes/autoencoder.npz", **table)
    with pytest.raises(runs.Problem, match="not finite"):
        cluster.main([*TINY, "--data", str(demo), "--run", str(tmp_path)])


def test_too_few_paintings_or_styles_get_one_clear_line(studied, demo, folder, tmp_path):
    arguments = [*TINY, "--size", "32", "--codes", "colours", "--run", str(tmp_path)]
    with pytest.raises(runs.Problem, match="fewer than 33 clusters"):
        cluster.main([*arguments, "--data", str(demo), "--clusters", "33"])
    for style in ("Cubism", "Fauvism"):
        for split in ("train", "test"):
            for path in (folder / split / style).iterdir():
                path.unlink()
            (folder / split / style).rmdir()
    with pytest.raises(runs.Problem, match="one style only"):
        cluster.main([*arguments, "--data", str(folder), "--renew"])
    with pytest.raises(runs.Problem, match="no codes .*embed.py"):
        cluster.main([*TINY, "--codes", "convnext", "--data", str(demo), "--run", str(tmp_path)])
