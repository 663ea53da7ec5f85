"""Hostile input to the scripts: checkpoints, metadata.csv, names, pipes, devices, links, pictures that change.

docs/reliability.md lists the cases. A case gets one clear line, or is left out and named; nothing else is lost.
"""

import contextlib
import io
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, clear_line, picture, script
from torch.utils.data import Dataset

import label
import style_transfer
import wikiart
from common import images, names, run
from common.errors import DataError, UserError
from common.images import read_image
from serve.corrections import Corrections, export

STYLES = ["Baroque", "Cubism", "Fauvism"]
SHAPE = {"classes": 3, "width": 8, "depth": 1, "pooling": "mean", "dropout": 0.0, "mean": [0.5] * 3, "std": [0.25] * 3}
ODD = ['qu"o,te.png', "line\nbreak.png", "esc\x1b[2J\a.png", "turned\u202egnp.png", "caf\udce9.png", "é" * 122 + ".png"]


def load(root, split="train", **settings):
    return wikiart.WikiArt(root, split, size=16, processes=1, **settings)


def checkpoint(**changes) -> dict:
    """A checkpoint of a CNN with random weights."""
    state = {
        "model": "CNN",
        "arguments": SHAPE,
        "classes": STYLES,
        "data": {"size": 32, "resize": "squash"},
        "crop": 32,
        "tta_scales": [1.0],
        "temperature": 1.0,
        "artists": [],
        "largest_class": 0,
        "fingerprint": "",
        "history": [],
        "weights": wikiart.make_model("CNN", SHAPE).state_dict(),
    }
    return state | changes


def saved(folder, **changes):
    path = folder / "classifier.pt"
    torch.save(checkpoint(**changes), path)
    return path


def weights(**changes) -> dict:
    return {"weights": checkpoint()["weights"] | changes}


@contextlib.contextmanager
def nobody():
    """Without root's right to read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder(tmp_path):
    """A folder that everyone may enter, by paths that everyone may."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path != path.parent:
            path.chmod(path.stat().st_mode | 0o711)
    tmp_path.chmod(0o777)
    return tmp_path


# Checkpoints


def test_the_checkpoint_of_these_tests_is_good(tmp_path):
    assert wikiart.Classifier.load(saved(tmp_path), "cpu").classes == STYLES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *((lambda key=key: {key: None}, f"its {key} is not of type") for key in ("arguments", "classes", "data")),
        (lambda: {"weights": None}, "its weights are no state dict"),
        (lambda: {"weights": {"out.weight": [1.0]}}, "its weights are not tensors"),
        (lambda: {"classes": [*STYLES[:2], "esc\x1b[2J"]}, "not different printable names"),
        (lambda: {"classes": [1, 2, 3]}, "not different printable names"),
        (lambda: {"classes": STYLES[:1] * 3}, "not different printable names"),
        (lambda: {"classes": [*STYLES, "Rococo"]}, "number of its classes is not that of its network"),
        (lambda: {"data": {"size": 10**9, "resize": "squash"}}, "must be 1 to 4096 pixels"),
        (lambda: {"data": {"resize": "squash"}}, "has no size"),
        (lambda: {"data": {"size": 32, "resize": "../x"}}, "must be squash or crop"),
        (lambda: {"crop": 10**9}, "must be 1 to 4096 pixels"),
        (lambda: {"tta_scales": [1e9]}, "tta_scales must be numbers from 0.25 to 8"),
        (lambda: {"tta_scales": []}, "tta_scales must be numbers from 0.25 to 8"),
        (lambda: {"arguments": SHAPE | {"width": 10**12}}, "does not fit a CNN.*width is"),
        (lambda: {"arguments": SHAPE | {"width": 5000}}, "does not fit a CNN.*size mismatch"),
        (lambda: {"arguments": SHAPE | {"depth": 10**9}}, "does not fit a CNN.*depth is"),
        (lambda: {"arguments": SHAPE | {"owned": "a"}}, "does not fit a CNN.*owned"),
        (lambda: {"model": "StyleAutoencoder"}, "does not fit a StyleAutoencoder"),
        (lambda: {"model": "os.system"}, "no model os.system"),
        (lambda: {"model": ["CNN"]}, "its model is not of type str"),
        (lambda: {"weights": {}}, "does not fit a CNN"),
        (lambda: weights(**{"out.bias": torch.tensor([1, float("nan"), 1])}), "not finite"),
        (lambda: weights(**{"out.weight": torch.zeros(1, 1).expand(10**6, 10**6)}), "unpacks to more|share memory"),
    ],
)
def test_a_hostile_checkpoint_gets_one_clear_line(tmp_path, changes, message):
    path = saved(tmp_path, **changes())
    with pytest.raises(UserError, match=message) as caught:
        wikiart.Classifier.load(path, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(checkpoint().keys() - {"temperature", "history"}))
def test_an_entry_that_is_missing_is_named(tmp_path, key):
    state = checkpoint()
    del state[key]
    torch.save(state, tmp_path / "classifier.pt")
    with pytest.raises(UserError, match=f"has no {key}|holds no model|not a classifier"):
        wikiart.Classifier.load(tmp_path / "classifier.pt", "cpu")


def deflated(path) -> None:
    """Replace a checkpoint by a compressed one, in which its own zeros take almost no room."""
    torch.save(checkpoint(more=torch.zeros(10**6)), path)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(checkpoint(more=bytearray(8)), path), "not a checkpoint of this project"),
        (lambda path: torch.save(checkpoint(), path, _use_new_zipfile_serialization=False), "not a checkpoint of this"),
        (deflated, "not a checkpoint of this project"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_not_read(tmp_path, write, message):
    write(tmp_path / "classifier.pt")
    with pytest.raises(UserError, match=message):
        wikiart.Classifier.load(tmp_path / "classifier.pt", "cpu")


def test_an_unfinished_training_that_does_not_fit_names_restart(tmp_path):
    config = Namespace(run=str(tmp_path), tensorboard=False, restart=False)
    state = checkpoint(config={}, resume={"model": {"weight": torch.zeros(2, 2)}})
    for broken in (state, state | {"resume": {}}, state | {"resume": {"model": 3}}):
        torch.save(broken, tmp_path / "classifier.partial.pt")
        with pytest.raises(UserError, match="does not fit this training .*--restart") as caught:
            run.resume(config, "classifier", state, {"model": torch.nn.Linear(3, 3)})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"test": 1}', "\0"])
def test_damaged_facts_are_named_and_kept(tmp_path, text):
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(UserError, match="facts.json .*repair or remove it"):
        run.add_facts(tmp_path, "train", {"a": 1})
    assert (tmp_path / "facts.json").read_text() == text


# metadata.csv


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (os.mkfifo, "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "not a regular file"),
        (
            lambda path: path.write_text('path,genre\n"a,b\nc,d\n'),
            "must be UTF-8 text with a column path .*end of data",
        ),
        (lambda path: path.write_text("path,genre\na," + "b" * 200_000), "must be UTF-8 text with a column path"),
        (lambda path: path.write_text("path,genre\na,b\n", encoding="utf-16"), "must be UTF-8 text"),
    ],
)
def test_a_hostile_table_gets_one_clear_line(folder, write, message):
    write(folder / "metadata.csv")
    with pytest.raises(DataError, match=message):
        load(folder)


def test_odd_rows_of_the_table_harm_nothing(folder):
    first, second, third, *_ = load(folder).paths
    rows = [
        f'{first},"land\nscape\x1b[2J",=1899',
        f"{second},portrait",
        f"{third},a,b,c,d,e",
        "../../etc/passwd,a,b",
        ",,",
        f"{second},still life,1900",  # of several rows the last counts
    ]
    (folder / "metadata.csv").write_text("path,genre,year\n" + "\n".join(rows) + "\n")
    data = load(folder)
    assert data.genres[:4].tolist() == ["land\\nscape\\x1b[2J", "still life", "a", ""]
    assert data.years[:4].tolist() == ["=1899", "1900", "b", ""]


# Names


def test_odd_names_of_files_are_paintings_like_any_other(folder, capsys):
    style = folder / "train" / "Cubism"
    for number, name in enumerate(ODD):
        picture(style / f"a_{name}", 100 + number)
        (style / f"text-{name}").write_text("no picture")
    data = load(folder)
    assert data.counts().tolist() == [4, 6 + len(ODD), 2]
    assert {f"train/Cubism/a_{name}" for name in ODD} <= set(data.paths)
    listed = next((folder / ".cache").glob("train*/left_out.txt")).read_text()
    assert len(listed.splitlines()) == len(ODD) and "text-line\\nbreak.png" in listed
    shown = capsys.readouterr()
    for text in (listed.replace("\n", "").replace("\t", ""), data.captions(range(len(data))), *data.artists):
        assert names.printable(text) == text
    assert "\x1b" not in shown.out + shown.err


@pytest.mark.parametrize("name", ["esc\x1b[2J", "two\nlines", b"caf\xe9".decode(errors="surrogateescape"), "a\u202eb"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_style_that_cannot_be_shown_is_to_be_renamed(folder, name, split):
    picture(folder / split / name / "a_b.png")
    with pytest.raises(DataError, match="cannot be shown: rename it") as caught:
        load(folder)
    assert names.printable(str(caught.value)) == str(caught.value)


def test_the_longest_names_of_folders(tmp_path):
    root = tmp_path / ("r" * 255)
    for number, style in enumerate(("é" * 127, "s" * 255)):
        for copy in range(5):
            picture(root / style / f"{copy}_{'n' * 249}.png", 10 * number + copy)
    assert len(load(root)) + len(load(root, "test")) == 10
    assert list((root / ".cache").glob("r*"))


def test_a_user_sees_one_line_without_control_characters(folder, tmp_path):
    saved(tmp_path)
    (folder / "train" / "esc\x1b]0;owned\a\nRococo").mkdir()
    line = clear_line(script("test.py", *TINY, "--data", folder, "--run", tmp_path))
    assert "esc\\x1b]0;owned\\x07\\nRococo, which cannot be shown" in line and "\x1b" not in line


def run_label(folder, tmp_path, *flags):
    if not (tmp_path / "classifier.pt").exists():
        saved(tmp_path)
    out = str(tmp_path / "labels.csv")
    label.main([str(folder), "--run", str(tmp_path), "--out", out, "--device", "cpu", "--processes", "1", *flags])
    return label.read_rows(tmp_path / "labels.csv")


def test_no_name_of_a_class_leads_out_of_a_folder(tmp_path):
    picture(tmp_path / "in" / "a.png")
    classes = ["../../owned", "/etc", ".."]
    saved(tmp_path, classes=classes)
    out, target = str(tmp_path / "labels.csv"), tmp_path / "below" / "sorted"
    flags = ["--run", str(tmp_path), "--device", "cpu", "--processes", "1", "--sort", str(target), "--no-sheet"]
    label.main([str(tmp_path / "in"), "--out", out, *flags])
    assert [path.name for path in target.rglob("*.png")] == ["a.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "classifier.pt", "in", "labels.csv"]
    store, exported = Corrections(tmp_path / "corrections.sqlite"), tmp_path / "below" / "a" / "exported"
    for number, choice in enumerate(["../../../owned", f"{tmp_path}/owned", ".."]):
        data = picture(tmp_path / "in" / "a.png", number).read_bytes()
        store.add("b.png", data, "m", choice, 0.5, choice)
    export(store, exported)
    folders = ["_", "__.._.._owned", f"{tmp_path}/owned".replace("/", "_")]
    assert sorted(path.name for path in exported.iterdir()) == sorted(folders)
    assert not (tmp_path / "owned").exists() and len(list(tmp_path.rglob("b-*.png"))) == 3
    assert [names.file_part(name) for name in (*classes, "", "Cubism")] == ["__.._owned", "_etc", "_", "_", "Cubism"]


def test_a_table_with_paths_of_elsewhere_is_not_sorted(tmp_path):
    picture(tmp_path / "in" / "a.png")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    run_label(tmp_path / "in", tmp_path, "--no-sheet")
    table = tmp_path / "labels.csv"
    table.write_bytes(table.read_bytes().replace(b"a.png", b"../secret"))
    with pytest.raises(UserError, match="path ../secret, which is not below"):
        run_label(tmp_path / "in", tmp_path, "--no-sheet", "--sort", str(tmp_path / "sorted"))
    assert not (tmp_path / "sorted").exists()


def test_odd_names_are_labelled_and_said_in_one_line(tmp_path, capsys):
    for number, name in enumerate(ODD):
        picture(tmp_path / "in" / name, number)
        (tmp_path / "in" / f"a{name[:2]}\n\x1b.png").write_text("no picture")
    rows = run_label(tmp_path / "in", tmp_path)
    assert {row[0] for row in rows if row[1]} == set(ODD) and len(rows) == 2 * len(ODD)
    shown = capsys.readouterr()
    line = next(line for line in shown.err.splitlines() if "could not be read" in line)
    assert line.startswith(f"{len(ODD)} could not") and "\\n\\x1b.png" in line
    assert "\x1b" not in shown.out + line
    assert (tmp_path / "labels.png").exists()


def test_odd_names_are_repainted(tmp_path):
    shape = {"styles": 3, "width": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    state = checkpoint(model="StyleAutoencoder", arguments=shape)
    state["weights"] = wikiart.make_model("StyleAutoencoder", shape).state_dict()
    torch.save(state, tmp_path / "style.pt")
    long = ["n" * 248 + "1.jpg", "n" * 248 + "2.jpg"]  # the same beginning
    for number, name in enumerate([*ODD, *long]):
        picture(tmp_path / "in" / name, number, (32, 32))
    flags = ["--run", str(tmp_path), "--image", str(tmp_path / "in"), "--style", "Cubism", "--from-style", "Baroque"]
    style_transfer.main([*TINY, *flags, "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").iterdir())) == len(ODD) + 2
    os.mkfifo(tmp_path / "in" / "esc\x1b-pipe.png")
    (tmp_path / "in" / "text\n.png").write_text("no picture")
    with pytest.raises(UserError, match="8 of 9 files repainted; not .*text"):
        style_transfer.main([*TINY, *flags, "--out", str(tmp_path / "out")])


# Pipes, devices, links, rights


def test_what_is_no_regular_file_is_left_out(folder):
    style = folder / "train" / "Cubism"
    os.symlink("/dev/zero", style / "a_zero.png")
    os.symlink("/etc/passwd", style / "a_passwd.png")
    os.symlink("a_itself.png", style / "a_itself.png")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(style):
        server.bind("a_socket.png")
        assert load(folder).counts().tolist() == [4, 6, 2]
    listed = next((folder / ".cache").glob("train*/left_out.txt")).read_text()
    assert [line.split("\t")[0].split("a_")[1] for line in listed.splitlines()] == [
        "itself.png",
        "passwd.png",
        "socket.png",
        "zero.png",
    ]
    assert "a_zero.png\tOSError: not a regular file" in listed


def test_loops_of_links_end(folder, tmp_path):
    os.symlink(folder / "train", folder / "train" / "Cubism" / "up")
    os.symlink("../Baroque", folder / "train" / "Cubism" / "across")
    os.symlink("../Cubism", folder / "train" / "Baroque" / "across")
    data = load(folder)
    assert data.counts().tolist() == [4, 6, 2] and not any("across" in path or "up" in path for path in data.paths)
    assert [path[-4:] for path in images.files_below(folder / "train" / "Cubism")] == [".png"] * 6
    os.symlink("root2", tmp_path / "root2")
    with pytest.raises(DataError, match="no folder"):
        load(tmp_path / "root2")


def test_an_unreadable_folder_is_named(open_folder):
    for style in ("A", "B"):
        picture(open_folder / "in" / "train" / style / "a_b.png")
    (open_folder / "in").chmod(0o777)
    (open_folder / "in" / "train" / "B").chmod(0)
    with nobody():
        for read in (load, images.files_below):
            with pytest.raises(DataError, match="cannot read the folder .*train/B: Permission denied"):
                read(open_folder / "in")


def test_a_file_that_was_unreadable_is_read_once_it_can_be(open_folder, capsys):
    root = open_folder / "in"
    for number in range(3):
        picture(root / "train" / "A" / f"a_{number}.png", number)
    root.chmod(0o777)
    (root / "train" / "A" / "a_1.png").chmod(0)
    with nobody():
        assert len(load(root)) == 2
        assert "1 of 3 files" in capsys.readouterr().err
        assert len(load(root)) == 2
    (root / "train" / "A" / "a_1.png").chmod(0o644)
    with nobody():
        assert len(load(root)) == 3


# Pictures that change or vanish


def test_pictures_that_change_between_scan_and_decoding(folder, monkeypatch, capsys):
    style, build = folder / "train" / "Cubism", images.build_cache
    vanishing, piped, cut, new = sorted(style.glob("*.png"))[:4]
    whole = cut.read_bytes()

    def change_and_build(*arguments):
        for path in (vanishing, piped, cut):
            path.unlink()
        os.mkfifo(piped)
        cut.write_bytes(whole[:300])
        picture(new, 999)
        build(*arguments)

    monkeypatch.setattr(images, "build_cache", change_and_build)
    data = load(folder)
    assert data.counts().tolist() == [4, 3, 2] and "3 of 12 files" in capsys.readouterr().err
    at = data.paths.tolist().index(f"train/Cubism/{new.name}")
    assert np.array_equal(data[at][0], read_image(new, 16))
    monkeypatch.undo()
    piped.unlink()
    cut.write_bytes(whole)
    assert load(folder).counts().tolist() == [4, 4, 2] and "left out" not in capsys.readouterr().err


def test_a_damaged_cache_is_named(folder):
    load(folder)
    cache = next((folder / ".cache").glob("train-*"))
    os.truncate(cache / "pixels.uint8", 10)
    with pytest.raises(DataError, match="the pixel cache .* is damaged: remove that folder"):
        load(folder)
    shutil.rmtree(cache)
    assert len(load(folder)) == 12


def test_a_picture_that_vanishes_while_labelling(tmp_path, monkeypatch, capsys):
    for number in range(4):
        picture(tmp_path / "in" / f"{number}.png", number)
    listing, sheet = label.list_files, label.plot_sheet

    def list_and_remove(*arguments):
        files = listing(*arguments)
        (tmp_path / "in" / "1.png").unlink()
        return files

    def damage_and_plot(*arguments):
        (tmp_path / "in" / "2.png").write_text("no picture")
        sheet(*arguments)

    monkeypatch.setattr(label, "list_files", list_and_remove)
    monkeypatch.setattr(label, "plot_sheet", damage_and_plot)
    rows = run_label(tmp_path / "in", tmp_path)
    assert [row[0] for row in rows if not row[1]] == ["1.png"] and len(rows) == 4
    assert "not on the contact sheet: 2.png" in capsys.readouterr().err
    assert (tmp_path / "labels.png").exists()


class Vanishing(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, item):
        with images.named_errors("a\nb.png"):
            return read_image("nowhere.png", 16)


def test_a_picture_that_vanishes_while_features_are_extracted_is_one_line():
    with pytest.raises(DataError) as caught, images.decode_in_processes(Vanishing(), 1, 1) as batches:
        list(batches)
    assert str(caught.value).startswith("a\nb.png could be read before") and "Traceback" not in str(caught.value)
    assert "No such file" in str(caught.value)
    assert not multiprocessing.active_children()  # although `caught` holds the traceback, and that the loader


STUCK = """
import time
from common import images

class Stuck(images.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, item):
        while item:
            time.sleep(1)

with images.decode_in_processes(Stuck(), 1, 2) as batches:
    next(batches)
"""


def test_a_worker_that_is_stuck_does_not_outlive_its_work():
    """As after a fork while another thread held a lock. Workers ignore SIGTERM: the script would wait for ever."""
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0


# Threads


def write_stat(path, idle) -> None:
    """A file like /proc/stat of cores that were idle for so many of 100 ticks."""
    cores = sorted(os.sched_getaffinity(0))
    idle = (idle + [0] * len(cores))[: len(cores)]
    lines = [f"cpu{core} {100 - ticks} 0 0 {ticks} 0 0 0 0 0 0" for core, ticks in zip(cores, idle, strict=True)]
    path.write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "intr 5", ""]))


def test_busy_cores_and_the_share_of_a_container_count(tmp_path, monkeypatch):
    stat, quota, cores = tmp_path / "stat", tmp_path / "cpu.max", len(os.sched_getaffinity(0))

    def free(idle):
        """Free cores where each is idle for a share of the moment."""
        stat.write_text("\n".join(f"cpu{core} 0 0 0 0 0 0 0 0" for core in os.sched_getaffinity(0)))
        monkeypatch.setattr(run.time, "sleep", lambda _: write_stat(stat, idle))
        return run.free_cores(stat, quota)

    assert free([100] * cores) == cores
    assert free([100] * (cores - 1) + [3]) == max(1, cores - 1)
    assert free([0] * cores) == 1
    quota.write_text("max 100000\n")
    assert free([96] * cores) == max(1, round(0.96 * cores))
    quota.write_text("100000 100000\n")
    assert free([100] * cores) == 1
    quota.write_text("nonsense")
    assert free([100] * cores) == cores
    assert run.free_cores(tmp_path / "none", tmp_path / "none") == cores


def test_a_program_that_loads_a_classifier_keeps_its_threads_and_precision(tmp_path, monkeypatch, capsys):
    path, changed = saved(tmp_path), []
    monkeypatch.delenv("OMP_NUM_THREADS")
    run.use_free_cores.cache_clear()
    monkeypatch.setattr(run, "free_cores", lambda: 1)
    monkeypatch.setattr(run.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(run.torch, "set_num_threads", changed.append)
    monkeypatch.setattr(run.torch, "set_float32_matmul_precision", changed.append)
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    assert wikiart.Classifier.load(path, "cpu").device.type == "cpu"
    assert not changed and not capsys.readouterr().out
    run.pick_device("cpu")
    assert changed == ["high", 1]
    run.use_free_cores.cache_clear()


def test_the_number_of_threads_is_said_once_and_the_user_s_comes_first(monkeypatch, capsys):
    threads = []
    monkeypatch.setattr(run, "free_cores", lambda: 2)
    monkeypatch.setattr(run.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(run.torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    run.use_free_cores.cache_clear()
    for _ in range(3):
        assert run.pick_device("cpu").type == "cpu"
    assert threads == [2]
    assert capsys.readouterr().out.count("2 threads instead of 8: other programs use the cores") == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    run.use_free_cores.cache_clear()
    run.pick_device("cpu")
    assert threads == [2]
