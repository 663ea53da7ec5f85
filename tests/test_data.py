"""The data set: formats, bad input, the cache, classes, splits and the sampler."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common import images, names
from common.errors import DataError, UserError
from common.images import read_image
from common.splits import connected_groups, hold_out
from wikiart import BalancedSampler, WikiArt, hash_of_files

RED = (200, 30, 40)


def load(root, split="train", **options):
    return WikiArt(root, split, **{"size": 16, "processes": 1} | options)


# Reading pictures


def solid(mode, color):
    return Image.new(mode, (40, 30), color)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", solid("L", 90), (90, 90, 90)),
        ("bilevel.png", solid("1", 1), (255, 255, 255)),
        ("palette.gif", solid("RGB", RED).quantize(4), RED),
        ("rgba.png", solid("RGBA", (*RED, 255)), RED),
        ("transparent.png", solid("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
        ("grey-alpha.png", solid("LA", (0, 0)), (255, 255, 255)),
        ("cmyk.jpg", solid("RGB", RED).convert("CMYK"), RED),
        ("sixteen.png", Image.fromarray(np.full((30, 40), 90 * 257, np.uint16)), (90, 90, 90)),
        ("sixteen.tif", Image.fromarray(np.full((30, 40), 90 * 257, np.uint16)), (90, 90, 90)),
        ("thirtytwo.tif", Image.fromarray(np.full((30, 40), 90, np.int32)), (90, 90, 90)),
        ("float.tif", Image.fromarray(np.full((30, 40), 0.5, np.float32)), (127, 127, 127)),
        ("plain.webp", solid("RGB", RED), RED),
    ],
)
def test_odd_formats_become_rgb(tmp_path, name, image, expected):
    image.save(tmp_path / name)
    pixels = read_image(tmp_path / name, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.reshape(3, -1).mean(1) - expected).max() < 4


def test_palette_with_transparency_lies_on_white(tmp_path):
    solid("RGB", RED).quantize(4).save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png", 8).min() == 255


def test_the_first_frame_of_an_animation(tmp_path):
    solid("RGB", RED).save(tmp_path / "a.gif", save_all=True, append_images=[solid("RGB", "blue")])
    assert np.abs(read_image(tmp_path / "a.gif", 8).mean((1, 2)) - RED).max() < 4


def test_exif_rotation_is_undone(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255  # white above black ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... to be turned clockwise: black left, white right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    turned = read_image(tmp_path / "a.jpg", 16)
    assert turned[:, :, :6].max() < 30
    assert turned[:, :, 10:].min() > 225


def test_squash_keeps_the_borders_and_crop_the_proportions(tmp_path):
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", 16, "squash")[0, 8, 0] == 0
    assert read_image(tmp_path / "wide.png", 16, "crop").min() > 200


# Bad input


def test_broken_files_are_left_out_and_named(folder, capsys):
    style = folder / "train" / "Cubism"
    (style / "a_text.jpg").write_text("not a picture")
    (style / "a_empty.png").write_bytes(b"")
    whole = picture(style / "a_whole.jpg", 99, (200, 200)).read_bytes()
    (style / "a_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20_000, 20_000)).save(style / "a_bomb.png")
    (style / ".hidden").write_text("ignored")
    (folder / "train" / "README.txt").write_text("beside the styles: ignored")
    data = load(folder)
    assert data.counts().tolist() == [4, 7, 2]
    message = capsys.readouterr().err
    assert "4 of 17 files" in message
    listed = open(message.split("see ")[1].strip()).read()
    for name in ("a_text.jpg", "a_empty.png", "a_truncated.jpg", "a_bomb.png"):
        assert f"Cubism/{name}" in listed
    assert "DecompressionBomb" in listed
    load(folder)
    assert "4 of 17 files" in capsys.readouterr().err  # said again when nothing is decoded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root), "no folder"),
        (lambda root: (shutil.rmtree(root), root.mkdir()), "no style folders"),
        (lambda root: (root / "train" / "Empty").mkdir(), "Empty holds no image"),
        (lambda root: shutil.rmtree(root / "train" / "Cubism"), "Cubism is not one of the styles"),
        (lambda root: shutil.rmtree(root / "test"), "no test/"),
        (lambda root: shutil.rmtree(root / "train"), "has no train/, only test/"),
        (lambda root: (shutil.rmtree(root / "train"), (root / "A").mkdir()), "holds a folder test"),
        (lambda root: (root / "metadata.csv").write_text("file,genre\n"), "column path"),
        (lambda root: (root / "metadata.csv").write_bytes(b"path,genre\n\xe9,a\n"), "must be UTF-8"),
    ],
)
def test_bad_folders_get_one_clear_line(folder, change, message):
    change(folder)
    if (folder / "metadata.csv").exists():
        (folder / "metadata.csv").open("a").write("train/Cubism/x.png,a\n")
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
        load(folder, "test")
    assert "\n" not in str(caught.value)


def test_links_pipes_and_names_that_are_not_utf8(folder):
    style = folder / "train" / "Cubism"
    os.symlink("nowhere", style / "a_broken-link.png")
    os.symlink("..", style / "loop")
    os.mkfifo(style / "a_pipe.png")
    named = os.fsencode(style) + b"/a_caf\xe9.png"
    shutil.copy(next(style.glob("painter*.png")), named)
    (style / "deeper").mkdir()
    picture(style / "deeper" / "a_nested.png", 55)
    data = load(folder)
    assert data.counts().tolist() == [4, 8, 2]
    listed = next((folder / ".cache").glob("train*/left_out.txt")).read_text(errors="surrogateescape")
    assert "a_broken-link.png" in listed
    assert "a_pipe.png" in listed


def test_a_decoder_that_dies_gets_one_clear_line(folder, monkeypatch):
    monkeypatch.setattr(images, "read_image", lambda *_: os._exit(9))
    with pytest.raises(DataError, match="decoding process died"):
        load(folder)
    assert not list((folder / ".cache").glob("*train-*"))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_decoder_that_dies_while_it_sends_is_not_a_full_disk(folder, monkeypatch, error):
    def broken_pipe(*_):
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", broken_pipe)
    with pytest.raises(DataError, match="decoding process died"):
        load(folder)


def test_a_full_disk_gets_one_clear_line(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "build_cache", full)
    with pytest.raises(DataError, match="could not write the pixel cache .* No space left"):
        load(folder)


# Classes, labels, paths


def test_classes_are_the_sorted_folders_of_train(folder):
    shutil.rmtree(folder / "test" / "Baroque")
    training, test = load(folder), load(folder, "test")
    assert training.classes == test.classes == ["Baroque", "Cubism", "Fauvism"]
    for data in (training, test):
        for path, label in zip(data.paths, data.labels, strict=True):
            assert path.split("/")[1] == data.classes[label]
    assert test.counts().tolist() == [0, 1, 1]


def test_styles_that_a_checkpoint_does_not_know_are_left_out_and_counted(folder, capsys):
    data = load(folder, "test", classes=["Baroque", "Fauvism"])
    assert set(data.styles) == {"Baroque", "Fauvism"}
    assert data.left_out == 1
    assert "left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="no painting .* has one of the styles Rococo"):
        load(folder, "test", classes=["Rococo"])


def test_the_size_of_the_cache_is_said_and_it_can_be_removed(folder, capsys):
    other = folder / ".cache" / "hub" / "note.txt"
    other.parent.mkdir(parents=True)
    other.touch()
    load(folder)
    said = capsys.readouterr().out
    assert f"decoding 12 files of {folder / 'train'} once, into {folder / '.cache'}: 1 MB" in said
    load(folder)
    assert "decoding" not in capsys.readouterr().out
    done = subprocess.run(
        ["make", f"PY={sys.executable}", f"WIKIART={folder}", "clean-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert "1 cache, 1 MB" in done.stdout and other.exists() and not list(folder.glob(".cache/*/pixels.uint8"))
    assert [images.file_size(size) for size in (4.56e9, 1.2e8)] == ["4.6 GB", "120 MB"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "'=a", "''-b", "plain", "'quoted", "", "a=b"])
def test_no_cell_is_a_formula_and_all_come_back(text):
    cell = names.safe_cell(text)
    assert cell[:1] not in tuple("=+-@") and names.cell_text(cell) == text


def test_a_root_may_have_test_alone_for_a_trained_model(folder):
    shutil.rmtree(folder / "train")
    (folder / "test" / "Cubism").rename(folder / "test" / "CUBISM")
    data = load(folder, "test", classes=["Baroque", "Cubism", "Rococo"])
    assert data.styles.tolist() == ["Baroque", "Cubism"] and data.left_out == 1
    assert data.labels.tolist() == [0, 1]


def test_all_is_train_and_test_together(folder):
    parts = [load(folder, split, classes=["Baroque", "Cubism", "Fauvism"]) for split in ("train", "test")]
    data = load(folder, "all")
    assert sorted(data.paths) == sorted([*parts[0].paths, *parts[1].paths])
    assert data.counts().tolist() == [5, 7, 3]
    item, same = data.paths.tolist().index(parts[1].paths[0]), parts[1][0]
    assert torch.equal(data[item][0], same[0]) and data[item][1] == same[1]


def test_styles_match_without_case_accents_hyphens_and_underscores(folder):
    (folder / "test" / "Cubism").rename(folder / "test" / "cubism")
    (folder / "train" / "Fauvism").rename(folder / "train" / "Naïve_Art")
    (folder / "test" / "Fauvism").rename(folder / "test" / "naive-art")
    data = load(folder, "test", holdout="naive art")
    assert (data.classes, data.holdout) == (["Baroque", "Cubism"], "Naïve_Art")
    assert data.styles.tolist() == ["Baroque", "Cubism"]
    assert load(folder, "test").classes == ["Baroque", "Cubism", "Naïve_Art"]
    twins = ["Op-Art", "Op_Art"]  # two folders of one plain name stay two classes
    assert [names.match_style(name, twins) for name in (*twins, "op art")] == ["Op-Art", "Op_Art", None]


def test_new_metadata_makes_another_fingerprint(folder):
    before = load(folder)
    (folder / "metadata.csv").write_text(f"path,genre\n{before.paths[0]},landscape\n")
    assert load(folder).fingerprint != before.fingerprint


def test_the_hash_of_the_files_is_that_of_the_files_alone(folder):
    before = load(folder)
    (folder / "metadata.csv").write_text(f"path,genre\n{before.paths[0]},landscape\n")
    same = [load(folder), WikiArt(folder, "train", size=32, processes=1)]
    assert {hash_of_files(data.fingerprint) for data in same} == {hash_of_files(before.fingerprint)}
    picture(folder / "train" / "Cubism" / "painter_new.png", 99)
    assert hash_of_files(load(folder).fingerprint) != hash_of_files(before.fingerprint)
    assert hash_of_files("train-squash-224-de37f468d95c2b5b-a4e0ed01") == "de37f468d95c2b5b"  # report/classifier.pt


def test_the_classes_of_a_checkpoint_keep_their_order(folder):
    data = load(folder, "test", classes=["Fauvism", "Cubism", "Baroque"])
    labels = {path.split("/")[1]: int(label) for path, label in zip(data.paths, data.labels, strict=True)}
    assert labels == {"Fauvism": 0, "Cubism": 1, "Baroque": 2}


def test_pixels_belong_to_their_paths(folder):
    data = load(folder)
    for item in range(len(data)):
        pixels, label = data[item]
        assert np.array_equal(pixels, read_image(folder / data.paths[item], 16))
        assert label == data.labels[item]


def test_same_name_in_two_styles_is_two_paintings(tmp_path):
    picture(tmp_path / "train" / "A" / "x_same.png", 1)
    picture(tmp_path / "train" / "B" / "x_same.png", 2)
    data = load(tmp_path)
    assert len(data) == 2
    assert not torch.equal(data[0][0], data[1][0])


def test_artists_titles_and_metadata(folder):
    path = load(folder).paths[0]
    (folder / "metadata.csv").write_text(f"path,genre,year\n{path},landscape,1899\n")
    data = load(folder)
    assert (data.genres[0], data.years[0], data.genres[1]) == ("landscape", "1899", "")
    assert data.artists[0].startswith("painter-")
    assert names.artist_of("train/A/noname.jpg") == ""
    assert names.stem_of("A/claude-monet_water-lilies_jpg.rf.0a1b.jpg") == "claude-monet_water-lilies"
    assert names.title_of("A/claude-monet_water-lilies_jpg.rf.0a1b.jpg") == "water lilies"
    assert names.title_of("A/claude-monet_water-lilies-1907(2).jpg") == "water lilies 1907"
    for year, caption in (
        ("1907", "Water lilies by Claude Monet, Ukiyo-e, 1907"),
        ("", "Water lilies 1907 by Claude Monet, Ukiyo-e"),
    ):
        assert names.caption_of("claude-monet", "A/claude-monet_water-lilies-1907(2).jpg", "Ukiyo_e", year) == caption
    assert names.caption_of("", "A/noname.jpg", "Cubism") == "Painting by unknown, Cubism"
    odd = b"A/am\xe9lie_le-caf\xe9.jpg".decode(errors="surrogateescape")  # Latin-1
    artist, title = names.artist_and_title(names.artist_of(odd), odd)
    assert (artist + title).encode() and artist[:2] + title[:6] == "AmLe caf"


def test_twenty_seven_styles_some_missing_from_test(tmp_path):
    for number in range(27):
        picture(tmp_path / "train" / f"Style_{number:02}" / "a_b.png", number)
        if number % 4:
            picture(tmp_path / "test" / f"Style_{number:02}" / "a_c.png", 100 + number)
    assert len(load(tmp_path).classes) == 27
    assert (load(tmp_path, "test").counts() == 0).sum() == 7


# The cache


def test_the_second_start_decodes_nothing_and_a_change_rebuilds(folder, monkeypatch):
    before = load(folder)
    built = []
    build = images.build_cache
    monkeypatch.setattr(images, "build_cache", lambda *a: (built.append(a), build(*a)))
    load(folder)
    assert not built
    added = picture(folder / "train" / "Cubism" / "new_one.png", 77)
    assert len(load(folder)) == len(before) + 1
    picture(added, 78)
    os.utime(added, ns=(1, 1))
    data = load(folder)
    assert np.array_equal(data[list(data.paths).index("train/Cubism/new_one.png")][0], read_image(added, 16))
    load(folder, size=24)
    load(folder, resize="crop")
    assert len(built) == 4
    assert len(list((folder / ".cache").glob("train-squash-16-*"))) == 1  # the old ones are gone


def test_a_read_only_folder_puts_the_cache_elsewhere(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder.chmod(0o555)
    try:
        assert len(load(folder)) == 12
    finally:
        folder.chmod(0o755)
    assert not (folder / ".cache").exists()
    assert list((tmp_path / "home" / "wikiart").glob("*/train-*"))


LOAD = """
import sys
from wikiart import WikiArt
data = WikiArt(sys.argv[1], size=64, processes=2)
print(len(data), data.pixels.sum())
"""


def start_loading(root):
    return subprocess.Popen([sys.executable, "-c", LOAD, str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def many(tmp_path):
    for number in range(300):
        picture(tmp_path / "root" / "train" / f"S{number % 3}" / f"a_{number}.png", number, (300, 300))
    return tmp_path / "root"


def test_two_programs_at_once_both_get_a_good_cache(many):
    first, second = start_loading(many), start_loading(many)
    out = {process.communicate(timeout=120)[0].splitlines()[-1] for process in (first, second)}
    assert len(out) == 1
    assert out.pop().split()[0] == "300"
    assert len(list((many / ".cache").glob("*train-*"))) == 1


def test_kill_9_during_a_build_leaves_nothing_behind(many):
    victim = start_loading(many)
    deadline = time.monotonic() + 60
    while not list((many / ".cache").glob("building-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    assert not list((many / ".cache").glob("train-*"))  # it was killed in time
    data = WikiArt(many, size=64, processes=1)
    assert np.array_equal(data[0][0], read_image(many / data.paths[0], 64))
    assert len(list((many / ".cache").glob("*train-*"))) == 1


# Splits


def test_style_folders_alone_are_split(tmp_path):
    for style in "AB":
        for number in range(20):
            picture(tmp_path / style / f"x_{number}.png", number + 100 * ord(style))
    training, test = load(tmp_path), load(tmp_path, "test")
    assert test.counts().tolist() == [4, 4]
    assert set(training.paths) | set(test.paths) == {f"{s}/x_{n}.png" for s in "AB" for n in range(20)}
    assert not set(training.paths) & set(test.paths)
    assert set(load(tmp_path, "test", split_seed=1).paths) != set(test.paths)


def test_copies_are_found():
    paths = ["A/m_x_jpg.rf.11.jpg", "A/m_x_jpg.rf.22.jpg", "A/m_y.jpg", "B/m_z.jpg", "B/m_y.png"]
    groups = connected_groups([names.stem_of(path) for path in paths], ["1", "2", "3", "3", "4"])
    assert groups[0] == groups[1]
    assert groups[2] == groups[3] == groups[4]
    assert groups[0] != groups[2]


def test_joining_is_transitive_and_empty_values_join_nothing():
    assert connected_groups(["a", "b", "", ""], ["1", "1", "2", "3"], ["x", "y", "y", ""]).tolist() == [0, 0, 0, 3]


labelled = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=120)


@given(labelled, st.floats(0.05, 0.9), st.integers(0, 5))
def test_holding_out_divides_no_group_and_empties_no_class(items, fraction, seed):
    labels = np.array([label for label, _ in items])
    groups = np.array([label * 100 + group for label, group in items])
    held_out = hold_out(labels, groups, fraction, seed)
    assert np.array_equal(held_out, hold_out(labels, groups, fraction, seed))
    for group in np.unique(groups):
        assert len(set(held_out[groups == group])) == 1
    for label in np.unique(labels):
        own = held_out[labels == label]
        sizes = np.unique(groups[labels == label], return_counts=True)[1]
        assert not own.all()
        assert own.any() == (len(sizes) > 1)
        assert own.sum() <= max(fraction * len(own) + 1e-9, sizes.min())


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=60), st.integers(0, 3))
def test_groups_across_classes_stay_whole_and_empty_no_class(items, seed):
    labels, groups = np.array(items).T
    held_out = hold_out(labels, groups, 0.3, seed)
    assert all(len(set(held_out[groups == group])) == 1 for group in groups)
    assert all((~held_out[labels == label]).any() for label in labels)


# The sampler


def test_no_number_per_class_keeps_an_epoch_as_long_as_it_was():
    labels = torch.tensor([0] * 9 + [1] * 2 + [2])
    drawn = labels[list(BalancedSampler(labels, "resample", 0))]
    assert torch.bincount(drawn).tolist() == [4, 4, 4]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(1, 40), st.integers(0, 9))
def test_the_resampler_brings_every_class_to_the_same_count(labels, per_class, epoch):
    labels = torch.tensor(labels)
    sampler = BalancedSampler(labels, "resample", per_class, seed=1)
    sampler.set_epoch(epoch)
    drawn = torch.tensor(list(sampler))
    assert len(drawn) == len(sampler) == per_class * len(labels.unique())
    for label in labels.unique():
        assert (labels[drawn] == label).sum() == per_class
        times = torch.bincount(drawn, minlength=len(labels))[labels == label]
        assert times.max() - times.min() <= 1
    assert drawn.tolist() == list(sampler)


def test_draws_are_new_each_epoch_and_none_shows_everything_once():
    labels = torch.tensor([0] * 30 + [1] * 3)
    sampler = BalancedSampler(labels, "resample", 10)
    first = sorted(sampler)
    sampler.set_epoch(1)
    assert sorted(sampler) != first
    assert sorted(BalancedSampler(labels, "none", 0)) == list(range(33))


def test_drawing_at_inverse_frequency_gives_every_class_the_same_chance():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    sampler = BalancedSampler(labels, "sampler", 0)
    drawn = labels[list(sampler)]
    assert len(drawn) == 1000
    assert torch.bincount(drawn).sub(1000 / 3).abs().max() < 75  # five standard deviations


# Other labels, other splits


@pytest.fixture
def labelled_folder(tmp_path):
    """Two styles, three artists; one genre is known only of some."""
    rows = []
    paintings = """train A ann portrait
        train A ann portrait
        train A bob landscape
        train B cyd -
        train B ann portrait
        test A ann landscape
        test B cyd still_life
        test B dan portrait"""
    for seed, line in enumerate(paintings.splitlines()):
        split, style, artist, genre = line.split()
        path = picture(tmp_path / split / style / f"{artist}_{seed}.png", seed).relative_to(tmp_path)
        rows.append(f"{path},{genre.strip('-')}")
    (tmp_path / "metadata.csv").write_text("\n".join(["path,genre", *rows]))
    return tmp_path


def test_artists_as_labels_leave_out_the_rare_ones(labelled_folder, capsys):
    data = load(labelled_folder, target="artist", min_images=2)
    assert (data.classes, len(data), data.left_out) == (["ann"], 3, 2)
    assert "2 of 5 paintings" in capsys.readouterr().err
    test = load(labelled_folder, "test", target="artist", min_images=1, classes=["ann", "cyd"])
    assert test.labels.tolist() == [0, 1]
    assert test.left_out == 1  # dan is nobody that was learned


def test_genres_as_labels_leave_out_the_unknown(labelled_folder):
    data = load(labelled_folder, target="genre", min_images=1)
    assert data.classes == ["landscape", "portrait"]
    assert data.labels.tolist() == [1, 1, 0, 1]
    assert data.left_out == 1
    with pytest.raises(DataError, match="known genre"):
        load(labelled_folder, target="genre", min_images=99)


def test_holding_out_artists_shares_none(tmp_path):
    for number in range(60):
        split = "train" if number % 3 else "test"
        picture(tmp_path / split / f"S{number % 2}" / f"artist-{number % 14}_{number}.png", number)
    training, test = (load(tmp_path, split, holdout="artists") for split in ("train", "test"))
    assert len(training) + len(test) == 60
    assert not set(training.artists) & set(test.artists)
    assert {path.split("/")[0] for path in (*training.paths, *test.paths)} == {"train", "test"}
    assert all(test.counts() > 0)


def test_half_of_the_validation_paintings_are_by_artists_whom_training_lacks(tmp_path):
    for number in range(200):
        picture(tmp_path / "train" / f"S{number % 2}" / f"artist-{number % 50}_{number}.png", number)
    picture(tmp_path / "test" / "S0" / "artist-1_x.png", 999)
    training, validation = load(tmp_path).split_off(0.2, 0)
    unseen = ~np.isin(validation.artists, training.artists)
    assert 36 <= len(validation) <= 40
    assert 16 <= unseen.sum() <= 20
    assert set(validation.labels[unseen].tolist()) == {0, 1}
    assert len(training) + len(validation) == 200
    assert not set(training.paths) & set(validation.paths)


@pytest.mark.parametrize("artist", ["only-one_", ""])
def test_without_artists_to_hold_out_validation_is_split_by_painting(tmp_path, artist):
    for number in range(40):
        picture(tmp_path / "train" / f"S{number % 2}" / f"{artist}{number}.png", number)
    picture(tmp_path / "test" / "S0" / "x.png", 999)
    training, validation = load(tmp_path).split_off(0.2, 0)
    assert all(training.counts() > 0)
    assert all(validation.counts() > 0)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_style_can_be_left_out(tmp_path, pooled):
    for number in range(60):
        split = "" if pooled else "test" if number % 4 == 0 else "train"
        picture(tmp_path / split / f"S{number % 3}" / f"{number}.png", number)
    whole, part = load(tmp_path, "test"), load(tmp_path, "test", holdout="S1")
    assert load(tmp_path, holdout="S1").classes == part.classes == ["S0", "S2"]
    assert part.paths.tolist() == whole.paths[whole.styles != "S1"].tolist()
    with pytest.raises(UserError, match="give none, artists, or one of S0, S1, S2"):
        load(tmp_path, holdout="S3")
    assert load(tmp_path, "test", holdout="S3", classes=["S0", "S1", "S2"]).holdout == "none"  # another root lacks it


def test_holding_out_artists_ignores_folders_beside_train_and_test(tmp_path):
    for number in range(40):
        picture(tmp_path / ("test" if number % 4 == 0 else "train") / "S" / f"artist-{number % 9}_{number}.png", number)
    picture(tmp_path / "extra" / "T" / "artist-1_x.png", 99)
    picture(tmp_path / "extra" / "S" / "artist-1_y.png", 98)
    paintings = [path for split in ("train", "test") for path in load(tmp_path, split, holdout="artists").paths]
    assert len(paintings) == 40
    assert {path.split("/")[0] for path in paintings} == {"train", "test"}


def test_figures_hide_genres_and_the_parts_of_file_names_in_text_files(tmp_path):
    genres, paths = ["portrait", "landscape", "landscape"], ["A/x_a.jpg", "A/x_a-portrait.jpg", "A/y_the-bath.jpg"]
    assert names.showable(genres, paths, ["portrait"]).tolist() == [False, True, True]
    (tmp_path / "parts.txt").write_text("the-bath\n\n")
    assert names.showable(genres, paths, [str(tmp_path / "parts.txt")]).tolist() == [True, True, False]
    with pytest.raises(DataError, match="no file missing.txt"):
        names.showable(genres, paths, ["missing.txt"])


def test_a_batch_comes_to_the_device_that_is_asked_for(folder):
    data = WikiArt(folder, "train", size=8, processes=1)
    data.on_device = torch.zeros(len(data), 3, 8, 8, device="meta")  # stands for a GPU that holds all pixels
    assert data.batch(torch.tensor([1, 0]), torch.device("meta"))[0].device.type == "meta"
    data.on_device = data.on_device.new_zeros(data.on_device.shape, device="cpu")
    assert data.batch(torch.tensor([1, 0]), torch.device("meta"))[0].device.type == "meta"
    assert data.batch(torch.tensor([1, 0]), torch.device("cpu"))[0].device.type == "cpu"


def test_a_subset_has_its_own_pixels_on_the_device(folder):
    data = load(folder)
    data.on_device = torch.from_numpy(data.pixels[data.rows])  # as move_to() leaves it on a GPU
    part = data.subset(torch.tensor([7, 2]))
    for item in range(2):
        assert torch.equal(part.batch(torch.tensor([item]), torch.device("cpu"))[0][0], part[item][0])
    mask = (data.labels == 1).numpy()
    assert torch.equal(data.subset(mask).on_device, data.on_device[torch.from_numpy(mask)])
