"""Downloading, from a small Parquet data set with the columns of huggan/wikiart; nothing here needs the network."""

import csv
import io
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, clear_line, script
from PIL import Image

import download
import wikiart
from common.errors import UserError
from common.names import artist_of

datasets = pytest.importorskip("datasets")
STYLES = ["Abstract_Expressionism", "Baroque", "Cubism", "Fauvism", "New_Realism", "Pop_Art", "Rococo", "Ukiyo_e"]
ARTISTS = ["Unknown Artist", "claude-monet", "m.c.-escher", "joaquã\xadn-sorolla"]
GENRES = ["landscape", "still_life", "Unknown Genre"]
FEATURES = datasets.Features(
    image=datasets.Image(),
    artist=datasets.ClassLabel(names=ARTISTS),
    genre=datasets.ClassLabel(names=GENRES),
    style=datasets.ClassLabel(names=STYLES),
)


def encoded(seed, size=(40, 30), kind="JPEG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, kind)
    return file.getvalue()


def parquet(folder, images, styles, **others):
    """Two Parquet files with groups of 10 rows."""
    number = np.arange(len(images))
    columns = {"artist": number % 4, "genre": number % 3, "style": styles} | others
    rows = {"image": [{"bytes": image, "path": None} for image in images]} | columns
    table = datasets.Dataset.from_dict(rows, features=FEATURES)
    folder.mkdir()
    half = len(images) // 2
    for part, chosen in enumerate((range(half), range(half, len(images)))):
        table.select(chosen).to_parquet(folder / f"train-0000{part}-of-00002.parquet", batch_size=10)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def images():
    return [encoded(seed) for seed in range(96)]


@pytest.fixture(scope="module")
def source(images, tmp_path_factory):
    """8 styles of 12 paintings, mixed."""
    return parquet(tmp_path_factory.mktemp("hub") / "wikiart", images, np.random.default_rng(0).permutation(96) % 8)


@pytest.fixture(autouse=True)
def _saved_often(monkeypatch):
    monkeypatch.setattr(download, "SAVE_EVERY", 7)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An uninterrupted download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "SAVE_EVERY", 7)
        return fetch(source, tmp_path_factory.mktemp("whole") / "data")


def fetch(source, data, *flags):
    download.main(["--source", str(source), "--data", str(data), *map(str, flags)])
    return data


def table(data):
    with open(data / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(data):
    """Every file with its bytes, but for WikiArt's cache."""
    found = {str(path.relative_to(data)): path for path in data.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".cache")}


def test_layout_names_and_metadata(whole, source, images):
    rows = table(whole)
    assert list(rows[0]) == list(download.COLUMNS)
    assert sorted(row["path"] for row in rows) == sorted(path for path in files(whole) if path.startswith("t"))
    original = list(datasets.load_dataset(str(source), split="train", streaming=True).remove_columns("image"))
    assert [row["title"] for row in rows] == [str(number) for number in range(96)]
    for number, (row, labels) in enumerate(zip(rows, original, strict=True)):
        assert (whole / row["path"]).read_bytes() == images[number]
        assert row["style"] == STYLES[labels["style"]]
        assert row["artist"] == ["", "claude-monet", "m.c.-escher", "joaquin-sorolla"][labels["artist"]]
        assert row["genre"] == ["landscape", "still_life", ""][labels["genre"]]
        assert row["path"].startswith(f"{row['split']}/{row['style']}/")
        assert artist_of(row["path"]) == row["artist"]


def test_the_split_is_stratified_and_by_seed(whole, source, tmp_path):
    rows = table(whole)
    for style in STYLES:
        splits = [row["split"] for row in rows if row["style"] == style]
        assert splits[:5].count("test") == splits[5:10].count("test") == 1
    other = table(fetch(source, tmp_path / "data", "--seed", 1))
    assert [row["split"] for row in rows] != [row["split"] for row in other]


@pytest.mark.parametrize("share", [0.2, 0.1, 0.3, 0.5])
def test_the_share_of_test_paintings(share, monkeypatch):
    monkeypatch.setattr(download, "TEST_SHARE", share)
    splits = [download.choose_split(0, "Cubism", number) for number in range(4000)]
    assert splits[0] == "train"
    assert abs(splits.count("test") / 4000 - share) < 0.03


def test_wikiart_reads_it(whole):
    train, test = (wikiart.WikiArt(whole, split, size=16, processes=1) for split in ("train", "test"))
    assert train.classes == test.classes == STYLES
    assert len(train) + len(test) == 96
    assert set(train.artists) == {"", "claude-monet", "m.c.-escher", "joaquin-sorolla"}
    assert set(train.genres) == {"", "landscape", "still_life"}


@pytest.mark.parametrize("after", [0, 1, 6, 7, 8, 33, 47, 48, 95])
def test_interrupted_and_resumed(whole, source, tmp_path, monkeypatch, after):
    """Ctrl-C at any moment: what is there stays, at most SAVE_EVERY rows come again, and the end is the same."""
    encode, calls = download.encode, []

    def stop(*arguments):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(None)
        return encode(*arguments)

    monkeypatch.setattr(download, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(source, tmp_path / "data")
    begun = files(tmp_path / "data")
    assert sum(path.startswith("t") for path in begun) == after
    again = []
    monkeypatch.setattr(download, "encode", lambda *arguments: again.append(None) or encode(*arguments))
    fetch(source, tmp_path / "data")
    assert len(again) == 96 - after // 7 * 7
    assert files(tmp_path / "data") == files(whole)


def test_killed_and_resumed(whole, source, tmp_path, monkeypatch):
    """kill -9 in the middle of writing a picture, twice."""
    code = """
import os, pathlib, signal, sys, download
download.SAVE_EVERY, write, left = 7, pathlib.Path.write_bytes, [int(sys.argv.pop(1))]
def kill(path, content):
    left[0] -= 1
    if not left[0]:
        write(path, content[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
pathlib.Path.write_bytes = kill
download.main()
"""
    for after in (20, 31):
        command = [sys.executable, "-c", code, str(after), "--source", source, "--data", tmp_path / "data"]
        assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
        assert list(tmp_path.glob("data/t*/*/.*"))
    fetch(source, tmp_path / "data")
    assert files(tmp_path / "data") == files(whole)


def test_a_lost_connection(whole, source, tmp_path, monkeypatch):
    def broken(stream, source, read=download.read_rows):
        def rows():
            for number, row in enumerate(stream):
                if number == 40:
                    raise ConnectionError("Server Disconnected")
                yield row

        return read(rows(), source)

    with monkeypatch.context() as patch:
        patch.setattr(download, "read_rows", broken)
        with pytest.raises(UserError, match="broke off: run the same command again.*Server Disconnected"):
            fetch(source, tmp_path / "data")
    fetch(source, tmp_path / "data")
    assert files(tmp_path / "data") == files(whole)


def test_a_full_disk(whole, source, tmp_path):
    """A limit on the size of files stands for it: metadata.csv and the pictures are cut off."""
    code = """
import resource, sys, download
from common.run import run_script
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.argv[0] = "download.py"
run_script(download.main)
"""
    command = [sys.executable, "-c", code, "--source", source, "--data", tmp_path / "data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "could not write into" in done.stderr
    assert "run the same command again" in done.stderr
    fetch(source, tmp_path / "data")
    assert files(tmp_path / "data") == files(whole)


def test_done_is_done(whole, source, capsys):
    before = files(whole)
    fetch(source, whole)
    assert "already there, made with the same settings" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with --seed 0: use these again, or give another --data"):
        fetch(source, whole, "--seed", 1)
    assert files(whole) == before


def test_per_style_stops_when_all_styles_are_full(source, tmp_path, whole):
    rows = table(fetch(source, tmp_path / "data", "--per-style", 3))
    assert Counter(row["style"] for row in rows) == dict.fromkeys(STYLES, 3)
    everything = table(whole)
    assert all(row in everything for row in rows)  # the same pictures on the same side
    assert max(int(row["title"]) for row in rows) == int(rows[-1]["title"]) < 95
    assert f'"row": {int(rows[-1]["title"]) + 1},' in (tmp_path / "data" / "download.json").read_text()


def test_size_reduces_and_never_enlarges(tmp_path):
    images = [encoded(0, (100, 60)), encoded(1, (60, 100), "PNG"), encoded(2, (30, 20)), encoded(3, (31, 19), "PNG")]
    data = fetch(parquet(tmp_path / "source", images, [1] * 4), tmp_path / "data", "--size", 32)
    sizes = [Image.open(data / row["path"]).size for row in table(data)]
    assert sizes == [(53, 32), (32, 53), (30, 20), (31, 19)]
    assert [row["path"][-4:] for row in table(data)] == [".jpg", ".jpg", ".jpg", ".png"]
    assert (data / table(data)[2]["path"]).read_bytes() == images[2]


def test_broken_pictures_are_named(tmp_path, capsys):
    images = [encoded(seed) for seed in range(12)]
    images[3], images[5] = b"not a picture", images[5][:300]
    styles = [1] * 12
    styles[8] = None
    data = fetch(parquet(tmp_path / "source", images, styles), tmp_path / "data")
    assert "left out: 3 images without a style, or not readable: rows 3, 5, 8" in capsys.readouterr().out
    assert [int(row["title"]) for row in table(data)] == [0, 1, 2, 4, 6, 7, 9, 10, 11]


def test_copies_stay_on_one_side(tmp_path):
    """WikiArt has paintings in two styles; here all of the second style are copies of the first one's."""
    images = [encoded(seed % 30) for seed in range(60)]
    data = fetch(parquet(tmp_path / "source", images, [1] * 30 + [2] * 30), tmp_path / "data")
    splits = [row["split"] for row in table(data)]
    assert splits[:30] == splits[30:]
    assert splits[:30].count("test") == 6


def test_a_folder_that_download_did_not_write(source, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="exists and was not written by download.py: give another --data"):
        fetch(source, tmp_path)
    assert files(tmp_path) == {"mine.txt": b"precious"}


def test_no_such_source(tmp_path):
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = script("download.py", "--source", "nobody/nothing", "--data", tmp_path / "data", env=offline)
    assert "cannot open nobody/nothing: check the name and the network" in clear_line(done)
    with pytest.raises(UserError, match="cannot open no/such/folder: give a data set on the hub, or a folder"):
        fetch("no/such/folder", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_one_download_at_a_time(source, tmp_path):
    code = f"import fcntl, time; lock = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); "
    command = [sys.executable, "-c", code + "print('held', flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another download is writing"):
            fetch(source, tmp_path)
        other.kill()


def test_other_columns(tmp_path):
    datasets.Dataset.from_dict({"image": ["x"], "style": ["y"]}).to_parquet(tmp_path / "source" / "a.parquet")
    with pytest.raises(UserError, match="has no column artist, genre"):
        fetch(tmp_path / "source", tmp_path / "data")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install -r requirements/download.txt"):
        fetch("huggan/wikiart", tmp_path / "data")


def test_a_gated_data_set(tmp_path, monkeypatch):
    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit ...")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(UserError, match="accept its terms at https://huggingface.co/datasets/a/b"):
        fetch("a/b", tmp_path / "data")
