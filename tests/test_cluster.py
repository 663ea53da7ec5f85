"""Clusters: scores on planted ones, codes that are stale or broken, figures that exist."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY, flags
from PIL import Image

import cluster
import train_autoencoder
import wikiart
from common import descriptors
from common.crops import views
from common.errors import UserError
from common.run import load_checkpoint, save_checkpoint

TINY_CODES = [*TINY, *flags(size=32, crop=32, width=8, code=48, epochs=3, batch_size=16)]


def planted(classes=5, each=30, seed=0):
    """Codes around well separated centres, and the centre of each."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return 10 * random.normal(size=(classes, 8))[labels] + random.normal(size=(classes * each, 8)), labels


def test_planted_clusters_are_found():
    codes, labels = planted()
    facts = cluster.scores(labels, cluster.kmeans(codes, 5, seed=0)[0], codes, seed=0)
    for key in ("nmi", "ami", "ari", "purity"):
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


def test_the_interval_covers_the_nmi_of_other_samples():
    """Of clusters of which a fifth are others than the labels."""
    random = np.random.default_rng(0)

    def draw(paintings):
        labels = np.repeat(np.arange(3), paintings // 3)
        return labels, np.where(random.random(paintings) < 0.2, random.integers(0, 3, paintings), labels)

    few, many = (cluster.nmi_interval(*draw(size), np.full(size, ""), seed=0) for size in (60, 240))
    found = [cluster.AGREEMENT["nmi"](*draw(240)) for _ in range(20)]
    inside = [many[0] <= nmi <= many[1] for nmi in found]
    assert np.mean(inside) >= 0.6  # the interval's centre varies, too
    widths = [high - low for low, high in (few, many)]
    assert 1.4 < widths[0] / widths[1] < 2.8  # about the root of the ratio of the numbers


def test_paintings_by_one_artist_widen_the_interval_of_the_nmi():
    labels, clusters = np.repeat(np.arange(4), 60), np.repeat(np.arange(48) % 4 * (np.arange(48) % 5 > 0), 5)
    clusters = np.where(np.repeat(np.arange(48) % 3 > 0, 5), labels, clusters)
    by_artist, single = (
        np.ptp(cluster.nmi_interval(labels, clusters, artists, seed=0))
        for artists in (np.repeat(np.arange(48), 5).astype(str), np.full(240, ""))
    )
    assert by_artist > 1.5 * single


def test_the_run_of_kmeans_with_the_smallest_inertia_comes_first():
    codes = np.random.default_rng(0).normal(size=(60, 4))
    inertias = [
        sum(((codes[found == k] - codes[found == k].mean(0)) ** 2).sum() for k in range(9))
        for found in cluster.kmeans(codes, 9, seed=0)
    ]
    assert len(inertias) == cluster.RUNS and inertias == pytest.approx(sorted(inertias), rel=1e-9)


def test_codes_are_computed_again_when_their_code_has_changed(clustered, demo, monkeypatch):
    computed, encode = [], cluster.encode_dataset
    monkeypatch.setattr(cluster, "encode_dataset", lambda *arguments: computed.append(1) or encode(*arguments))
    command = [*TINY, "--size", "32", "--data", str(demo), "--run", str(clustered), "--codes", "colours"]
    cluster.main(command)
    assert not computed
    monkeypatch.setattr(cluster, "code_key", lambda *_: "other")
    cluster.main(command)
    assert computed


def test_the_table_counts_paintings_of_each_style_in_each_cluster():
    table = cluster.contingency(np.array([0, 0, 1, 1, 2]), np.array([-1, -1, 3, -1, 3]), classes=3)
    assert table.tolist() == [[2, 0], [1, 1], [0, 1]]


def test_a_class_without_paintings_has_a_row():
    table = cluster.contingency(np.array([0, 1, 1]), np.array([1, 0, 0]), classes=3)
    assert table.tolist() == [[0, 1], [2, 0], [0, 0]]
    assert cluster.diagonal_order(table).tolist() == [1, 0]


def test_a_colour_histogram_counts_shares():
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0, 0] = 1.0  # one red pixel of four, the rest black
    codes = descriptors.colour_histogram(images)
    assert codes.shape == (1, 64)
    assert codes[0, 3 * 16] == 0.5
    assert codes[0, 0] == pytest.approx(0.75**0.5)


def stripes(width=4):
    """Vertical stripes, the same horizontally, and the vertical ones fainter; (3, 3, 32, 32)."""
    vertical = (torch.arange(32) // width % 2).float().expand(3, 32, 32)
    return torch.stack([vertical, vertical.mT, 0.4 + 0.2 * vertical])


def test_textures_are_directions_and_strength():
    codes = descriptors.texture_statistics(stripes())
    assert codes.shape == (3, 57)
    directions = codes[:, 11:19]  # of edges at the finest scale
    assert directions.sum(1).allclose(torch.ones(3), atol=1e-3)
    assert directions[0].argmax() == directions[2].argmax() != directions[1].argmax()
    assert codes[0, :11].allclose(codes[1, :11], atol=1e-4) and (codes[2, 3:11] < codes[0, 3:11]).any()


def test_visual_words_tell_brushwork_and_not_brightness(demo):
    words = descriptors.VisualWords(wikiart.WikiArt(demo, "train", size=32, processes=1))
    codes = words(torch.cat([stripes(4), stripes(4)[:1] * 0.5 + 0.4]))
    assert codes.shape == (4, descriptors.WORDS)
    assert codes.square().sum(1).allclose(torch.ones(4))
    across, fainter = (codes[0] - codes[1]).norm(), (codes[0] - codes[3]).norm()
    assert across > 3 * fainter


def test_no_part_of_a_code_drowns_another():
    random = np.random.default_rng(0)
    parts = [random.normal(size=(60, width)) @ random.normal(size=(width, width)) for width in (5, 9)]
    distances = []
    for scale in (1, 1000):
        codes = np.concatenate([parts[0], scale * parts[1]], 1)
        reduced = cluster.fit_reduction({"train": codes, "parts": {"textures": 5, "words": 9}}, seed=0).transform(codes)
        assert np.allclose(np.square(reduced).sum(1), 1)
        distances.append(reduced @ reduced.T)
    assert np.allclose(*distances, atol=1e-6)


def test_codes_of_images_keep_their_distances():
    """Whitened, a large difference and a small one would count alike; so would standardised numbers."""
    codes = np.random.default_rng(0).normal(size=(60, 3)) * [100, 1, 0.01]
    for name in cluster.IMAGE_CODES:
        reduced = cluster.fit_reduction({"train": codes, "parts": {name: 3}}, seed=0).transform(codes)
        before, after = (np.linalg.norm(rows[:, None] - rows, axis=2) for rows in (codes, reduced))
        assert np.allclose(before, after)


def test_rounding_errors_are_no_part_of_a_code():
    """Shares that sum to 1 leave a direction that holds nothing else; whitened, it would count as much as any."""
    shares = np.random.default_rng(0).random((60, 6)).astype(np.float32)
    shares /= shares.sum(1, keepdims=True)
    reduce = cluster.fit_reduction({"train": shares, "parts": {"colours": 6}}, seed=0)
    assert reduce.transform(shares).shape[1] == 5


@pytest.fixture(scope="module")
def clustered(demo, trained, tmp_path_factory):
    """A run folder with two autoencoders and a classifier, all sources clustered."""
    run = tmp_path_factory.mktemp("clustered")
    for folder, weight in ((run, "0"), (run / "contrastive", "0.15")):
        flags = ["--data", str(demo), "--run", str(folder), "--contrastive-weight", weight]
        train_autoencoder.main([*TINY_CODES, *flags])
    (run / "classifier.pt").write_bytes((trained / "classifier.pt").read_bytes())
    cluster.main([*TINY, "--size", "32", "--data", str(demo), "--run", str(run), "--codes", "all"])
    return run


def test_every_source_of_the_run_folder_gets_scores_figures_and_codes(clustered):
    facts = json.loads((clustered / "facts.json").read_text())
    sources = {"autoencoder", "contrastive", "classifier", "pixels", "colours", "textures", "words", "descriptors"}
    sources |= {"combined"}
    assert sources == set(facts["cluster"])
    for source, scores in facts["cluster"].items():
        assert scores["nmi_low"] < scores["nmi"] < scores["nmi_high"]
        assert scores["nmi_runs_low"] <= scores["nmi"] <= scores["nmi_runs_high"]
        assert -1 <= scores["ari"] <= 1
        assert 0 <= scores["probe"] <= 1
        for kind in ("map", "tsne", "clusters", "centroids"):
            top = source in ("autoencoder", "combined") and kind in ("map", "tsne")
            folder = clustered if top else clustered / "more"
            assert np.asarray(Image.open(folder / f"{kind}_{source}.png").convert("L")).std() > 5, (kind, source)
    for source in sources - {"descriptors", "combined"}:
        with np.load(clustered / "codes" / f"{source}.npz") as table:
            assert len(table["test"]) == len(table["test_labels"]) == len(table["test_paths"]) == 32
            assert len(table["train"]) == len(table["train_artists"])
    captions = (clustered / "more/centroids_contrastive.txt").read_text().strip().split("\n\n")
    assert len(captions) == facts["cluster"]["contrastive"]["clusters"]
    assert re.match(r"cluster 1: \w+( \w+)? \d+%: ", captions[0])
    assert captions[0].count(": ") == 2 + min(8, 1 + captions[0].count("; "))  # artist: title, of eight at most
    assert "| autoencoder |" in (clustered / "clusters.md").read_text()
    assert "train_autoencoder" in facts  # nothing else was lost


def test_codes_do_not_depend_on_the_batch_size(clustered, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "BATCH_SIZE", 7)
    (tmp_path / "autoencoder.pt").write_bytes((clustered / "autoencoder.pt").read_bytes())
    arguments = [*TINY, "--size", "32", "--data", str(demo), "--run", str(tmp_path)]
    cluster.main([*arguments, "--codes", "autoencoder", "pixels"])
    for source in ("autoencoder", "pixels"):
        one, other = (np.load(run / f"codes/{source}.npz") for run in (clustered, tmp_path))
        assert np.allclose(one["test"], other["test"], atol=1e-3)
        assert (one["test_paths"] == other["test_paths"]).all()


def test_codes_are_those_of_the_autoencoder(clustered, demo):
    model = wikiart.build_model(load_checkpoint(clustered / "autoencoder.pt"))
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    images = views(torch.from_numpy(data.pixels[data.rows]), 32)[0]
    with torch.no_grad(), np.load(clustered / "codes/autoencoder.npz") as table:
        assert torch.allclose(model.encode(images) * model.scales, torch.from_numpy(table["test"]), atol=1e-3)


def test_rows_of_one_table_were_made_alike(clustered, demo, tmp_path):
    for name in ("autoencoder.pt", "facts.json"):
        (tmp_path / name).write_bytes((clustered / name).read_bytes())
    arguments = [*TINY, "--size", "32", "--data", str(demo), "--run", str(tmp_path)]
    cluster.main([*arguments, "--clusters", "3"])
    table = (tmp_path / "clusters.md").read_text()
    assert "KMeans, 3 clusters" in table
    assert "| autoencoder |" in table
    assert "| colours |" not in table


def test_a_file_that_holds_no_codes_gets_one_clear_line(demo, tmp_path):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/colours.npz").write_text("no codes")
    with pytest.raises(UserError, match="not a file of codes"):
        cluster.main([*TINY, "--data", str(demo), "--run", str(tmp_path), "--codes", "colours"])


def test_codes_of_another_checkpoint_are_made_again(clustered, demo, tmp_path):
    (tmp_path / "codes").mkdir()
    codes = tmp_path / "codes/autoencoder.npz"
    codes.write_bytes((clustered / "codes/autoencoder.npz").read_bytes())
    checkpoint = load_checkpoint(clustered / "autoencoder.pt")
    checkpoint["weights"]["add.bias"] += 1
    save_checkpoint(tmp_path / "autoencoder.pt", checkpoint)
    arguments = [*TINY, "--data", str(demo), "--run", str(tmp_path)]
    cluster.main(arguments)
    with np.load(codes) as table, np.load(clustered / "codes/autoencoder.npz") as stale:
        scales = checkpoint["weights"]["scales"].numpy()
        assert np.allclose(table["test"], stale["test"] + scales, rtol=1e-3, atol=1e-3 * scales.max())
        assert table["made_from"] != stale["made_from"]
    written = codes.stat().st_mtime_ns
    cluster.main(arguments)
    assert codes.stat().st_mtime_ns == written  # the same checkpoint: computed once


def test_all_codes_are_clustered_where_none_has_a_checkpoint_and_all_are_stale(clustered, demo, tmp_path):
    (tmp_path / "codes").mkdir()
    for source in ("pixels", "colours"):
        with np.load(clustered / f"codes/{source}.npz") as table:
            np.savez(tmp_path / f"codes/{source}.npz", **dict(table) | {"made_from": "other paintings"})
    cluster.main([*TINY, "--size", "32", "--data", str(demo), "--run", str(tmp_path), "--codes", "all"])
    facts = [json.loads((run / "facts.json").read_text())["cluster"] for run in (tmp_path, clustered)]
    computed = ("pixels", "colours", "textures", "words", "descriptors")
    assert facts[0] == {source: facts[1][source] for source in computed}


def test_codes_of_other_paintings_that_embed_wrote_are_left_out_of_all(clustered, demo, tmp_path, capsys):
    (tmp_path / "codes").mkdir()
    with np.load(clustered / "codes/pixels.npz") as table:
        np.savez(tmp_path / "codes/convnext.npz", **dict(table) | {"test_paths": table["test_paths"][::-1]})
    arguments = [*TINY, "--size", "32", "--data", str(demo), "--run", str(tmp_path), "--codes"]
    cluster.main([*arguments, "all"])
    assert "left out: " in capsys.readouterr().out
    assert "convnext" not in (tmp_path / "clusters.md").read_text()
    with pytest.raises(UserError, match="other paintings: run embed.py again"):
        cluster.main([*arguments, "convnext"])


def test_codes_that_are_not_finite_get_one_clear_line(clustered, demo, tmp_path):
    (tmp_path / "autoencoder.pt").write_bytes((clustered / "autoencoder.pt").read_bytes())
    (tmp_path / "codes").mkdir()
    table = dict(np.load(clustered / "codes/autoencoder.npz"))
    table["train"][3, 4] = np.nan
    np.savez(tmp_path / "codes/autoencoder.npz", **table)
    with pytest.raises(UserError, match="not finite"):
        cluster.main([*TINY, "--data", str(demo), "--run", str(tmp_path)])


def test_too_few_paintings_or_styles_get_one_clear_line(clustered, demo, folder, tmp_path):
    arguments = [*TINY, "--size", "32", "--codes", "colours", "--run", str(tmp_path)]
    with pytest.raises(UserError, match="--clusters 33 is more than the 32 paintings"):
        cluster.main([*arguments, "--data", str(demo), "--clusters", "33"])
    for style in ("Cubism", "Fauvism"):
        for split in ("train", "test"):
            for path in (folder / split / style).iterdir():
                path.unlink()
            (folder / split / style).rmdir()
    with pytest.raises(UserError, match="one style only"):
        cluster.main([*arguments, "--data", str(folder)])
    with pytest.raises(UserError, match="no codes .*embed.py"):
        cluster.main([*TINY, "--codes", "convnext", "--data", str(demo), "--run", str(tmp_path)])
