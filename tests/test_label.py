"""label.py: the table of a folder, what the API answers, and what it turns away."""

import csv
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY, TINY_TRAIN, clear_line, picture, script, served
from gradio_client import Client, handle_file
from PIL import Image
from test_uploads import TURNED_AWAY, Trap

import embed
import label
import serve
import test as evaluation
import train
import wikiart
from common import backbones, crops, images, layers, metrics
from common.errors import UserError
from common.run import file_hash, load_checkpoint, save_checkpoint
from serve import collection, corrections, page, panels, uploads

CPU = ["--device", "cpu", "--processes", "1"]


@pytest.fixture(scope="module")
def run(trained, demo, tmp_path_factory):
    """A run folder of our own, with the classifier alone, at a temperature at which it is unsure of about half."""
    run = tmp_path_factory.mktemp("label")
    checkpoint = load_checkpoint(trained / "classifier.pt")
    classifier = wikiart.Classifier(checkpoint, torch.device("cpu"))
    shown = classifier.predict(sorted((demo / "test").rglob("*.jpg"))[:12], calibrated=False)
    temperatures = torch.logspace(-3, 1, 200).tolist()
    checkpoint["temperature"] = next(t for t in temperatures if metrics.calibrate(shown, t).amax(1).median() < 0.5)
    save_checkpoint(run / "classifier.pt", checkpoint)
    return run


@pytest.fixture(scope="module")
def classifier(run):
    return wikiart.Classifier.load(run / "classifier.pt", "cpu")


def page_caller(classifier, run, demo, artist_classifier=None):
    """Calls a function of the page, by its name, with the content of an upload; without a server."""
    upload_store = uploads.Uploads()
    config = SimpleNamespace(run=str(run), data=str(demo), hide=[])
    store = corrections.Corrections(run / "corrections.sqlite")
    blocks = page.Page(classifier, artist_classifier, store, upload_store, config).blocks()
    functions = {function.name: function.fn for function in blocks.fns.values()}
    return lambda name, data: functions[name]({"path": upload_store.put("a.png", data)})


@pytest.fixture(scope="module")
def call_page(classifier, run, demo):
    return page_caller(classifier, run, demo)


@pytest.fixture
def folder(demo, tmp_path):
    """Twelve paintings, some of them in folders below, two files that are none, and one without its end."""
    folder = tmp_path / "paintings"
    for number, path in enumerate(sorted((demo / "test").rglob("*.jpg"))[:12]):
        target = folder / ("below" if number % 3 == 0 else "") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no picture")
    (folder / "half.jpg").write_bytes(next(folder.glob("*.jpg")).read_bytes()[:200])
    picture(folder / ".hidden.png")
    return folder


def table(path):
    with open(path, newline="", errors="surrogateescape") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(label, "BATCH_SIZE", 4)


def run_label(folder, run, out, *flags):
    label.main([str(folder), "--run", str(run), "--out", str(out), *CPU, *flags])
    return table(out)


# The command


def test_the_table_says_what_the_network_says(folder, run, classifier, tmp_path):
    rows = run_label(folder, run, tmp_path / "labels.csv")
    assert sorted(rows) == sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".hidden.png"
    )
    for path, row in rows.items():
        if row["problem"]:
            assert path in ("empty.jpg", "text.png", "half.jpg")
            assert not row["style_1"]
            continue
        pixels = uploads.read_upload((folder / path).read_bytes(), classifier.size, classifier.resize)
        truth = classifier.predict(torch.from_numpy(pixels)[None])[0].numpy()
        three = [(row[f"style_{place}"], float(row[f"style_{place}_probability"])) for place in (1, 2, 3)]
        order = np.argsort(-truth)[:3]
        assert [share for _, share in three] == pytest.approx(truth[order], abs=1e-3)
        assert three[0][0] in classifier.classes
        assert row["unsure"] == "unsure" * bool(truth.max() < 0.5)
    assert {row["unsure"] for row in rows.values() if not row["problem"]} == {"unsure", ""}
    assert sum(bool(row["problem"]) for row in rows.values()) == 3
    assert rows["text.png"]["problem"] == rows["empty.jpg"]["problem"] == "not an image, or of an unknown format"
    assert rows["half.jpg"]["problem"] == "incomplete: the file ends too early"


def test_it_goes_on_where_it_was_killed(folder, run, tmp_path, monkeypatch, capsys):
    out, batches, predict = tmp_path / "labels.csv", [], wikiart.Classifier.predict
    complete = run_label(folder, run, tmp_path / "complete.csv")

    def stopped(self, images):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(images))
        return predict(self, images)

    monkeypatch.setattr(wikiart.Classifier, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_label(folder, run, out)
    kept = table(out)
    assert len(kept) == 8
    with open(out, "ab") as file:
        file.write(b'"half a row, with a quote, Cubi')
    monkeypatch.setattr(wikiart.Classifier, "predict", predict)
    assert run_label(folder, run, out) == complete
    assert "already: 8 of 15 files" in capsys.readouterr().out
    before = out.read_bytes()
    run_label(folder, run, out)
    assert out.read_bytes() == before


@pytest.fixture
def strips(monkeypatch):
    """Predictions by the brightness of strips: the network of one epoch says almost the same of every picture."""

    def predict(self, images):
        return (images.float().view(len(images), len(self.classes), -1).mean(2) / 20).softmax(1)

    monkeypatch.setattr(wikiart.Classifier, "predict", predict)


def killed(*_):
    raise KeyboardInterrupt


def turn_over(path):
    """Give a file other content, after the clock tick of the file system in which something was written last."""
    time.sleep(0.05)
    Image.open(path).convert("RGB").transpose(Image.Transpose.ROTATE_180).point(lambda x: 255 - x).save(path)


@pytest.mark.usefixtures("strips")
def test_a_file_that_has_changed_is_labelled_again(folder, run, tmp_path, monkeypatch, capsys):
    """Its row and its copy are replaced; after a kill in between, too."""
    out, sorted_by_style, flags = tmp_path / "labels.csv", tmp_path / "sorted", ("--sort", str(tmp_path / "sorted"))
    before = run_label(folder, run, out, *flags)
    sheet = (tmp_path / "labels.png").read_bytes()
    changed = [path for path, row in before.items() if not row["problem"]][:2]
    for path in changed:
        turn_over(folder / path)
    (folder / "text.png").write_bytes((folder / changed[0]).read_bytes())  # repaired
    moved = next((sorted_by_style / before[changed[0]]["style_1"]).rglob(Path(changed[0]).name))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(wikiart.Classifier, "predict", killed)
        run_label(folder, run, out, *flags)
    assert set(before) - set(table(out)) == {*changed, "text.png"}
    assert not moved.exists() and (tmp_path / "labels.png").read_bytes() == sheet
    capsys.readouterr()
    after = run_label(folder, run, out, *flags)
    assert "already: 12 of 15 files" in capsys.readouterr().out
    assert after == run_label(folder, run, tmp_path / "new.csv")
    assert all(after[path] != before[path] for path in changed) and not after["text.png"]["problem"]
    assert len(out.read_bytes().splitlines()) == len(after) + 1  # no row twice
    copies = {path.relative_to(sorted_by_style).as_posix() for path in sorted_by_style.rglob("*.*")}
    assert copies == {f"{row['style_1']}/{path}" for path, row in after.items() if not row["problem"]}
    for path in changed:
        assert (sorted_by_style / after[path]["style_1"] / path).read_bytes() == (folder / path).read_bytes()
    assert (tmp_path / "labels.png").read_bytes() != sheet
    last = out.read_bytes()
    run_label(folder, run, out, *flags)
    assert out.read_bytes() == last
    (folder / changed[0]).unlink()
    assert run_label(folder, run, out, *flags) == after  # rows of files that are gone stay


@pytest.mark.usefixtures("strips")
def test_a_kill_before_the_table_is_replaced_leaves_it_as_it_was(folder, run, tmp_path, monkeypatch):
    """The old copies are gone by then, and the next run is right."""
    out, flags = tmp_path / "labels.csv", ("--sort", str(tmp_path / "sorted"))
    before = run_label(folder, run, out, *flags)
    path = next(path for path, row in before.items() if not row["problem"])
    turn_over(folder / path)
    table_before, copy = out.read_bytes(), tmp_path / "sorted" / before[path]["style_1"] / path
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(label.os, "replace", killed)
        run_label(folder, run, out, *flags)
    assert out.read_bytes() == table_before and not copy.exists()
    after = run_label(folder, run, out, *flags)
    assert after == run_label(folder, run, tmp_path / "new.csv") and after[path] != before[path]
    assert (tmp_path / "sorted" / after[path]["style_1"] / path).read_bytes() == (folder / path).read_bytes()


def test_files_with_other_times_or_links_have_not_changed(folder, run, tmp_path, capsys):
    """As after chmod, a hard link, rsync -a or a restored backup."""
    before = run_label(folder, run, tmp_path / "labels.csv")
    first, second, third, *_ = sorted(folder.glob("*.jpg"))
    time.sleep(0.05)
    first.chmod(0o600)
    os.link(second, tmp_path / "link.jpg")
    shutil.copy2(third, tmp_path / "backup.jpg")
    (tmp_path / "backup.jpg").replace(third)
    capsys.readouterr()
    assert run_label(folder, run, tmp_path / "labels.csv") == before
    assert "already: 15 of 15 files" in capsys.readouterr().out


def test_the_table_is_locked_from_the_removal_to_the_last_row(folder, run, tmp_path, monkeypatch):
    """Another program can open neither the old table nor the new one."""
    out, replace, locked = tmp_path / "labels.csv", os.replace, []
    paths = set(run_label(folder, run, out))
    turn_over(next(folder.glob("below/*.jpg")))
    program = f"import fcntl; fcntl.lockf(open({str(out)!r}, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def note():
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        locked.append(b"BlockingIOError" in other.stderr)

    def replace_and_note(*arguments):
        note()
        replace(*arguments)
        note()

    monkeypatch.setattr(label.os, "replace", replace_and_note)
    with open(out, newline="") as file:
        header, first, *_ = csv.reader(file)
    with label.open_table(out, header, first[-1], folder, paths) as (_, kept):
        note()
    note()
    assert len(kept) == 14 and locked == [True, True, True, False]


@pytest.mark.usefixtures("strips")
def test_one_file_is_labelled_and_its_row_printed(folder, run, tmp_path, capsys):
    out = tmp_path / "labels.csv"
    first, second = sorted(path.name for path in folder.glob("*.jpg") if path.stat().st_size > 200)[:2]
    rows = run_label(folder / first, run, out)
    assert list(rows) == [first]
    assert f"{first}: {rows[first]['style_1'].replace('_', ' ')} " in capsys.readouterr().out
    assert sorted(run_label(folder / second, run, out)) == [first, second]
    assert f"\n{second}: " in capsys.readouterr().out
    turn_over(folder / first)
    assert run_label(folder / first, run, out)[first] != rows[first]
    assert "labelled again: 1 file" in capsys.readouterr().out
    for _ in range(2):  # what could not be read is said again
        run_label(folder / "text.png", run, out)
        assert "text.png: could not be read: not an image, or of an unknown format\n" in capsys.readouterr().out


@pytest.mark.usefixtures("strips")
def test_one_file_is_refused_where_the_changes_of_others_would_be_hidden(folder, run, tmp_path):
    out = tmp_path / "labels.csv"
    before = run_label(folder, run, out)
    first, second = sorted(path.name for path in folder.glob("*.jpg") if path.stat().st_size > 200)[:2]
    turn_over(folder / first)
    turn_over(folder / second)
    table_before = out.read_bytes()
    with pytest.raises(UserError, match=f"csv was written: {second}; label the folder first, or give another --out"):
        run_label(folder / first, run, out)
    assert out.read_bytes() == table_before
    after = run_label(folder, run, out)
    assert {path for path in after if after[path] != before[path]} == {first, second}


@pytest.mark.usefixtures("strips")
def test_a_kill_while_one_file_is_labelled_loses_no_other_row(folder, run, tmp_path, monkeypatch):
    out = tmp_path / "labels.csv"
    before = run_label(folder, run, out)
    path = next(path for path, row in before.items() if not row["problem"])
    turn_over(folder / path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(wikiart.Classifier, "predict", killed)
        run_label(folder / path, run, out)
    assert table(out) == {name: row for name, row in before.items() if name != path}
    assert run_label(folder, run, out) == run_label(folder, run, tmp_path / "new.csv")


def test_a_row_of_elsewhere_removes_no_file(folder, run, tmp_path):
    out, flags = tmp_path / "labels.csv", ("--sort", str(tmp_path / "sorted"))
    rows = run_label(folder, run, out, *flags)
    path = next(path for path, row in rows.items() if not row["problem"])
    outside = tmp_path / "sorted" / "x", tmp_path / "x"
    out.write_bytes(out.read_bytes().replace(f"{path},".encode(), b"../x,"))
    time.sleep(0.05)
    for file in outside:  # where the row's copy would be, and the file that it names
        file.write_text("mine")
    turn_over(folder / next(other for other, row in rows.items() if not row["problem"] and other != path))
    with pytest.raises(UserError, match=r"the path \.\./x, which is not below"):
        run_label(folder, run, out, *flags)
    assert [file.read_text() for file in outside] == ["mine", "mine"]


def test_a_copy_that_is_older_than_its_picture_is_made_again(folder, run, tmp_path):
    rows = run_label(folder, run, tmp_path / "labels.csv", "--sort", str(tmp_path / "sorted"))
    path = next(path for path, row in rows.items() if not row["problem"])
    copy = tmp_path / "sorted" / rows[path]["style_1"] / path
    copy.write_bytes(bytes(copy.stat().st_size))
    run_label(folder, run, tmp_path / "labels.csv", "--sort", str(tmp_path / "sorted"))
    assert not any(copy.read_bytes())  # as large and no older: left alone
    os.utime(copy, (1e9, 1e9))
    run_label(folder, run, tmp_path / "labels.csv", "--sort", str(tmp_path / "sorted"))
    assert copy.read_bytes() == (folder / path).read_bytes()


def test_the_contact_sheet_says_in_which_folder_a_file_is(run, tmp_path, monkeypatch):
    captions, long = [], "d" * 20 + "/" + "e" * 20
    for number, path in enumerate(("a.png", "below/a.png", f"{long}/{'f' * 70}-1.png")):
        picture(tmp_path / "in" / path, number)
    monkeypatch.setattr(label.figures, "contact_sheet", lambda *arguments: captions.extend(arguments[2]))
    run_label(tmp_path / "in", run, tmp_path / "labels.csv")
    names = [caption.rpartition("%")[0].rsplit("\n", 1)[0] for caption in captions]
    assert names == ["a.png", "below/\na.png", f"…dd/{'e' * 20}/\n{'f' * 29}…{'f' * 23}-1.png"]


def test_a_killed_decoder_loses_nothing(folder, run, tmp_path, monkeypatch):
    out, whole = tmp_path / "labels.csv", images.read_image
    complete = run_label(folder, run, tmp_path / "complete.csv")
    last, lines = sorted(complete)[-1], (tmp_path / "complete.csv").read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:6]))  # what was done before

    def killed(path, *rest):
        if path == folder / last:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, *rest)

    monkeypatch.setattr(images, "read_image", killed)
    with pytest.raises(UserError, match="a decoding process died, .*try --processes 1"):
        run_label(folder, run, out)
    assert 5 <= len(table(out)) < len(complete)
    monkeypatch.undo()
    assert run_label(folder, run, out) == complete


def test_broken_links_and_pipes_are_listed(run, tmp_path):
    odd = tmp_path / "odd"
    picture(odd / "fine.png")
    (odd / "link.png").symlink_to("fine.png")
    (odd / "gone.png").symlink_to("nowhere.png")
    (odd / "loop.png").symlink_to("loop.png")
    os.mkfifo(odd / "pipe.png")
    rows = run_label(odd, run, tmp_path / "labels.csv")
    assert {path for path, row in rows.items() if row["problem"]} == {"gone.png", "loop.png", "pipe.png"}
    assert {path for path, row in rows.items() if row["style_1"]} == {"fine.png", "link.png"}


def test_odd_names_come_back(run, tmp_path):
    names = [
        "a,b.png",
        'quo"te.png',
        "line\nbreak.png",
        "ümlaut.png",
        b"latin-\xe9.png".decode(errors="surrogateescape"),
    ]
    for number, name in enumerate(names):
        picture(tmp_path / "odd" / name, number)
    assert sorted(run_label(tmp_path / "odd", run, tmp_path / "labels.csv")) == sorted(names)
    before = (tmp_path / "labels.csv").read_bytes()
    run_label(tmp_path / "odd", run, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_bytes() == before


def test_the_table_has_no_formulas_and_no_absolute_paths(run, tmp_path):
    names = ["=1+1.png", "-a.png", "+b.png", "@c.png", "'=d.png"]
    for number, name in enumerate(names):
        picture(tmp_path / "odd" / name, number)
    flags = ("--sort", str(tmp_path / "sorted"))
    rows = run_label(tmp_path / "odd", run, tmp_path / "labels.csv", *flags)
    assert sorted(rows) == sorted(["'=1+1.png", "'-a.png", "'+b.png", "'@c.png", "''=d.png"])
    text = (tmp_path / "labels.csv").read_text()
    assert "/" not in text
    assert sorted(path.name for path in (tmp_path / "sorted").rglob("*.png")) == sorted(names)
    run_label(tmp_path / "odd", run, tmp_path / "labels.csv", *flags)  # nothing is labelled twice
    assert (tmp_path / "labels.csv").read_text() == text


def test_copies_are_sorted_by_style(folder, run, tmp_path):
    rows = run_label(folder, run, tmp_path / "labels.csv", "--sort", str(tmp_path / "sorted"))
    copies = {path.relative_to(tmp_path / "sorted").as_posix() for path in (tmp_path / "sorted").rglob("*.jpg")}
    assert copies == {f"{row['style_1']}/{path}" for path, row in rows.items() if not row["problem"]}
    for copy in copies:
        source = folder / copy.partition("/")[2]
        assert (tmp_path / "sorted" / copy).read_bytes() == source.read_bytes()
    with pytest.raises(UserError, match="is inside"):
        run_label(folder, run, tmp_path / "labels.csv", "--sort", str(folder / "sorted"))


def test_an_artist_is_guessed_where_a_model_is_given(demo, folder, run, tmp_path):
    train.main(
        [
            *TINY_TRAIN,
            "--data",
            str(demo),
            "--run",
            str(tmp_path),
            "--target",
            "artist",
            "--min-images",
            "1",
            "--epochs",
            "1",
        ]
    )
    artists = load_checkpoint(tmp_path / "classifier.pt")["classes"]
    rows = run_label(folder, run, tmp_path / "labels.csv", "--artist-checkpoint", str(tmp_path / "classifier.pt"))
    assert all((row["artist"] in artists) != bool(row["problem"]) for row in rows.values())


def test_another_checkpoint_does_not_go_on_with_the_table(folder, run, trained, tmp_path):
    run_label(folder, run, tmp_path / "labels.csv")
    with pytest.raises(UserError, match="holds labels of another folder or checkpoint"):
        run_label(folder, trained, tmp_path / "labels.csv", "--checkpoint", str(trained / "mlp/classifier.pt"))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)  # files of the same names, but not the same files
    with pytest.raises(UserError, match="of another folder"):
        run_label(elsewhere, run, tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("my own notes")
    with pytest.raises(UserError, match="not a table"):
        run_label(folder, run, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text() == "my own notes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one folder of pictures, or one picture, or a command: "),
        (["serve", "paintings"], "give one folder of pictures, or one picture, or a command: "),
        (["one", "two"], "give one folder of pictures, or one picture, or a command: "),
        (["measure"], "give one folder of pictures, or one picture, or a command: "),
        (["nowhere"], "no file and no folder nowhere"),
        (["measure", "classifier.pt"], "classifier.pt is no folder"),
        (["export", "somewhere"], "no label was confirmed on the page yet"),
        (["nowhere", "--checkpoint", "missing.pt"], "no checkpoint"),
    ],
)
def test_a_mistake_gets_one_clear_line(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match=message):
        label.main([*flags, "--run", str(run), "--device", "cpu"])


def test_flags_may_come_before_the_folder(folder, run, tmp_path):
    out = tmp_path / "labels.csv"
    label.main(["--run", str(run), "--device", "cpu", "--processes", "1", "--no-sheet", "--out", str(out), str(folder)])
    assert len(table(out)) == 15


def test_a_user_sees_that_line():
    assert "no file and no folder nowhere" in clear_line(
        script("label.py", "nowhere", "--device", "cpu", "--checkpoint", ROOT / "report/classifier.pt")
    )


def test_without_gradio_there_is_one_clear_line(run, monkeypatch):
    monkeypatch.delattr(serve, "page")
    monkeypatch.delitem(sys.modules, "serve.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs gradio: pip install -r requirements/label\.txt"):
        label.main(["serve", "--run", str(run), "--device", "cpu"])


# Before anything is trained


@pytest.mark.parametrize("installed", [True, False])
def test_it_works_right_after_set_up_and_says_what_it_knows(folder, tmp_path, capsys, monkeypatch, installed):
    """With the backbone's package the head on it is taken; without, the network from scratch, and a line says so."""
    if not installed:
        monkeypatch.setattr(label, "installed_weights", lambda _: None)
    rows = run_label(folder, tmp_path / "empty_run", tmp_path / "labels.csv")
    path = label.HEAD if installed else label.COMMITTED
    taken = wikiart.Classifier.load(path, "cpu")
    read = {name: row for name, row in rows.items() if not row["problem"]}
    predicted = taken.predict([folder / name for name in read])
    assert [row["style_1"] for row in read.values()] == [taken.top(each, 1)[0][0] for each in predicted]
    scratch = json.loads((ROOT / "report/facts.json").read_text())["test"]["unseen_artists_accuracy"]
    better = load_checkpoint(label.HEAD)["unseen_artists_accuracy"]
    assert better > scratch + 0.05
    lines = [line for line in capsys.readouterr().out.splitlines() if "right for" in line]
    assert f"report/{path.name}: 8 styles (" in lines[0] and "Ukiyo-e" in lines[0]
    accuracy = better if installed else scratch
    assert f"right for {accuracy:.0%} of test paintings by artists that it never saw" in lines[0]
    assert [f"right for {better:.0%} of them" in line and "embed.txt" in line for line in lines[1:]] == [True] * (
        not installed
    )


def test_the_classifier_of_the_demo_labels_paintings_only_when_it_is_named(folder, run, tmp_path, capsys, monkeypatch):
    """After `make`, in the default run folder."""
    monkeypatch.setattr(label, "read_settings", lambda: {"run": str(run)})
    monkeypatch.setattr(label, "installed_weights", lambda _: None)
    run_label(folder, run, tmp_path / "a.csv")
    printed = capsys.readouterr().out
    assert f"{run}/classifier.pt knows the styles of the demo" in printed
    assert "report/classifier.pt: 8 styles (Baroque" in printed
    run_label(folder, run, tmp_path / "b.csv", "--checkpoint", str(run / "classifier.pt"))
    assert "8 styles (Bands" in capsys.readouterr().out


def test_tensors_are_cropped_as_files_are(trained, tmp_path):
    checkpoint = load_checkpoint(trained / "classifier.pt")
    checkpoint["data"] |= {"resize": "crop"}
    classifier = wikiart.Classifier(checkpoint, torch.device("cpu"))
    path = picture(tmp_path / "wide.png", size=(120, 40))
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).copy())[None]
    cropped = classifier.prepare([path]).float()
    assert (cropped - classifier.prepare(pixels).float()).abs().mean() < 10
    classifier.resize = "squash"
    assert (cropped - classifier.prepare(pixels).float()).abs().mean() > 10


def test_the_committed_head_is_small_and_has_the_styles_of_the_committed_network():
    head = load_checkpoint(label.HEAD, "Pretrained")
    assert label.HEAD.stat().st_size < 100_000
    assert head["classes"] == load_checkpoint(label.COMMITTED)["classes"]
    assert not [name for name in head["weights"] if name.startswith("backbone.")]


def test_the_run_s_own_checkpoint_comes_first_with_its_own_accuracy(folder, run, tmp_path, capsys):
    shutil.copy(run / "classifier.pt", tmp_path)
    run_label(folder, tmp_path, tmp_path / "labels.csv")
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path}/classifier.pt: ") and "not yet tested" in shown
    facts = {"unseen_artists_accuracy": 0.25, "checkpoint": file_hash(tmp_path / "classifier.pt")[:12]}
    for hash, said in ((facts["checkpoint"], "right for 25% of"), ("another", "not yet tested")):
        (tmp_path / "facts.json").write_text(json.dumps({"test": facts | {"checkpoint": hash}}))
        run_label(folder, tmp_path, tmp_path / "labels.csv")
        assert said in capsys.readouterr().out


def test_the_contact_sheet_shows_the_pictures_that_could_be_read(folder, run, monkeypatch):
    """Beside the table, also where that is among the pictures, which it is not itself."""
    shown = []
    monkeypatch.setattr(label.figures, "contact_sheet", lambda *arguments: shown.append(arguments))
    for _ in range(2):
        rows = run_label(folder, run, folder / "labels.csv")
        (folder / "labels.png").touch()
    path, images, captions, columns, title = shown[-1]
    read = [row for row in rows.values() if not row["problem"]]
    assert (path, columns, title) == (folder / "labels.png", 6, "12 pictures") and len(images) == len(read) == 12
    assert all(image.dtype == np.uint8 and image.shape[0] == 3 and max(image.shape) <= 256 for image in images)
    for row, caption in zip(read, captions, strict=True):
        assert label.display_name(row["style_1"]) in caption and caption.endswith("unsure") == bool(row["unsure"])
    monkeypatch.setattr(label, "SHEET", 5)
    run_label(folder, run, folder / "labels.csv", "--no-sheet")
    assert len(shown) == 2
    run_label(folder, run, folder / "labels.csv")
    assert len(shown[-1][1]) == 4 and shown[-1][4] == "4 of 12 pictures"


# Calibration


def test_the_temperature_undoes_a_wrong_one():
    """Labels drawn from known probabilities: made surer by a factor, they are brought back by it."""
    random = np.random.default_rng(0)
    true = torch.from_numpy(random.dirichlet(np.ones(5), 20000))
    labels = torch.from_numpy(np.array([random.choice(5, p=row) for row in true.numpy()]))
    for factor in (0.4, 2.5):
        shown = metrics.calibrate(true, factor)
        temperature = metrics.fit_temperature(shown, labels)
        assert temperature == pytest.approx(1 / factor, rel=0.06)
        back = metrics.calibrate(shown, temperature)
        before = metrics.calibration_error(labels.numpy(), shown.numpy())
        assert metrics.calibration_error(labels.numpy(), back.numpy()) < 0.02 < 0.1 < before
        assert torch.equal(shown.argmax(1), true.argmax(1))


def test_a_network_without_mistakes_is_not_made_sure_without_end():
    """On 50 paintings, all of them right: as sure as 50 paintings allow, and surer with 5000."""
    sure = []
    for count in (50, 5000):
        labels = torch.arange(count) % 5
        shown = torch.full((count, 5), 0.1).scatter_(1, labels[:, None], 0.6)
        sure.append(float(metrics.calibrate(shown, metrics.fit_temperature(shown, labels)).max()))
    assert 0.95 < sure[0] < 0.99 < 0.999 < sure[1] < 1


def test_the_calibration_error_worked_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
    # 0.9: one of two right, 0.4 off; 0.6: right, 0.4 off; 0.55: wrong, 0.55 off; each in a bin of its own
    assert metrics.calibration_error(np.array([0, 1, 1, 0]), probabilities, 20) == pytest.approx(
        (2 * 0.4 + 0.4 + 0.55) / 4
    )


def test_the_checkpoint_has_a_temperature_and_older_ones_have_1(
    trained, demo, run, classifier, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(metrics, "BOOTSTRAP", 5)
    assert load_checkpoint(trained / "classifier.pt")["temperature"] > 0
    checkpoint = load_checkpoint(run / "classifier.pt")
    assert classifier.temperature == checkpoint.pop("temperature")
    torch.save(checkpoint, tmp_path / "old.pt")
    assert "calibrated" not in capsys.readouterr().err
    assert wikiart.Classifier.load(tmp_path / "old.pt", "cpu").temperature == 1
    assert "its probabilities are not calibrated" in capsys.readouterr().err
    for name, same in (("old.pt", True), (str(run / "classifier.pt"), classifier.temperature == 1)):
        evaluation.main(
            ["--device", "cpu", "--processes", "1", "--data", str(demo), "--run", str(tmp_path), "--checkpoint", name]
        )
        facts = json.loads((tmp_path / "facts.json").read_text())["test"]
        assert (facts["ece_before"] == pytest.approx(facts["ece_after"], abs=1e-4)) == same
        assert 0 <= facts["ece_after"] <= 1


# Why


def test_the_regions_add_up_to_the_logit(classifier):
    """The evidence of all regions is the logit above the mean of all, but for what does not depend on the picture."""
    torch.manual_seed(0)
    model, left = classifier.model, []
    for number in range(3):
        pixels = torch.from_numpy(np.random.default_rng(number).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8))
        pixels[..., : 8 * number] //= 4
        image = crops.views(pixels, classifier.crop, max(1.0, *classifier.tta_scales))[0]
        with torch.no_grad():
            logits = model(image)[0]
        left.append(float(logits[2] - logits.mean()) - classifier.evidence(pixels, 2).sum())
    assert left == pytest.approx([left[0]] * 3, abs=1e-3)


@pytest.fixture(scope="module")
def frozen(demo, tmp_path_factory):
    """A run folder with a classifier on a frozen backbone, with random weights, and its features of the paintings."""
    run, weights = tmp_path_factory.mktemp("frozen"), tmp_path_factory.mktemp("weights") / "small.pt"
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("test_efficientnet").state_dict()}, weights)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WEIGHT_DECAYS": (0.3,), "HIDDEN": 16}.items():
            patch.setattr(embed, name, value)
        patch.setattr(metrics, "BOOTSTRAP", 20)
        flags = ["--backbone", "test_efficientnet", "--weights", str(weights), "--target", "style", "--epochs", "1"]
        embed.main([*TINY, "--size", "64", *flags, "--data", str(demo), "--run", str(run)])
    return run, wikiart.Classifier.load(run / "embed_test_efficientnet.pt", "cpu")


def test_a_frozen_backbone_s_regions_add_up_to_the_logit(frozen):
    """With a linear head, up to a constant: what they leave of the logit hardly differs between pictures."""
    model, logits, left = frozen[1].model, [], []
    torch.manual_seed(0)
    model = backbones.replace_modules(model, head=torch.nn.Linear(len(model.feature_mean), 4))
    for dark in (1, 2, 4, 8):
        view = torch.rand(1, 3, 64, 64)
        view[..., :32] /= dark
        with torch.no_grad():
            logits.append(float(model(view)[0, 2] - model(view)[0].mean()))
        left.append(logits[-1] - float(model.evidence(view, 2).sum()))
    assert np.ptp(left) < 0.05 * np.ptp(logits)


def test_a_transformer_has_regions_of_its_patches():
    arguments = {"backbone": "test_vit", "size": 160, "features": 64 + 2 * 64, "stages": 1}
    model = wikiart.make_model("Pretrained", {"classes": 3, **arguments, "mean": [0.5] * 3, "std": [0.25] * 3}).eval()
    regions = model.evidence(torch.rand(1, 3, 160, 160), 1)
    assert regions.shape == (10, 10)
    assert torch.isfinite(regions).all()
    assert regions.std() > 0


def torchvision_classifier(name: str) -> wikiart.Classifier:
    """One with random weights, for 64 pixels."""
    torch.manual_seed(0)
    arguments = {"classes": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    state = {"model": name, "arguments": arguments, "weights": wikiart.make_model(name, arguments).state_dict()}
    state |= {"classes": ["A", "B", "C"], "data": {"size": 64, "resize": "squash"}, "crop": 64, "tta_scales": [1.0]}
    return wikiart.Classifier(state, torch.device("cpu"))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_network_of_torchvision_has_regions_of_its_last_maps(name):
    """Those of ResNet, which has a linear head, add up to the logit but for its bias."""
    classifier, left = torchvision_classifier(name), []
    for number in range(3):
        pixels = torch.from_numpy(np.random.default_rng(number).integers(0, 256, (1, 3, 64, 64), dtype=np.uint8))
        regions = classifier.evidence(pixels, 1)
        assert regions.shape == (2, 2) and regions.std() > 0
        with torch.no_grad():
            logits = classifier.model(crops.views(pixels, 64)[0])[0]
        left.append(float(logits[1] - logits.mean()) - regions.sum())
    assert name != "resnet18" or left == pytest.approx([left[0]] * 3, abs=1e-4)


def test_the_regions_are_those_of_one_s_own_picture(monkeypatch):
    """Another request runs through the same network in another thread, after the first one has its maps."""
    classifier = torchvision_classifier("resnet18")
    own, other = (torch.full((1, 3, 64, 64), value, dtype=torch.uint8) for value in (10, 250))
    own[..., :32] = 200
    expected, head = classifier.evidence(own, 1), classifier.model[1].fc
    forward = head.forward

    def interrupted(features):
        monkeypatch.setattr(head, "forward", forward)
        thread = threading.Thread(target=classifier.predict, args=(other,))
        thread.start()
        thread.join()
        return forward(features)

    monkeypatch.setattr(head, "forward", interrupted)
    assert np.array_equal(classifier.evidence(own, 1), expected)


def test_regions_are_covered_where_a_network_has_no_maps(trained):
    """An MLP. A network that sees brightness in one corner alone has its evidence there."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64), dtype=np.uint8))
    regions = wikiart.Classifier.load(trained / "mlp/classifier.pt", "cpu").evidence(pixels, 1)
    assert regions.shape == (7, 7) and regions.std() > 0

    def bright_corner(images):
        return torch.stack([images[:, :, :8, -8:].mean((1, 2, 3)), torch.zeros(len(images))], 1)

    image = torch.zeros(1, 3, 56, 56)
    image[:, :, :8, -8:] = 1
    regions = layers.occlusion_evidence(bright_corner, image, 0)
    assert regions[0, 6] > 0.4 and regions.abs().sum() == regions[0, 6]


def test_the_nearest_paintings_of_a_frozen_backbone(frozen, demo):
    """Of a painting of the collection, itself; not with features of another backbone, or one that was fine-tuned."""
    run, classifier = frozen
    config = SimpleNamespace(run=str(run), data=str(demo), hide=[])
    path = panels.own_codes(classifier, run)
    assert path == run / "codes/test_efficientnet.npz"
    assert panels.code_command(classifier) == "embed.py --backbone test_efficientnet --stages 4"
    nearest = panels.NearestPaintings(classifier, path, config)
    for file in sorted((demo / "train").rglob("*.jpg"))[::20]:
        image = torch.from_numpy(uploads.read_upload(file.read_bytes(), classifier.size, classifier.resize))[None]
        similarity = nearest.codes @ nearest.normalise(nearest.features(image))[0]
        assert nearest.paths[similarity.argmax()] == file.relative_to(demo).as_posix()
    other = SimpleNamespace(model_name="Pretrained", model=classifier.model, resize="squash", checkpoint={})
    for change in ({"backbone_weights": "hub 0123"}, {"config": classifier.checkpoint["config"] | {"finetune": "all"}}):
        other.checkpoint = classifier.checkpoint | change
        assert panels.own_codes(other, run) is None


# Which decoders see an upload


def test_no_other_decoder_sees_an_upload(call_page, paintings, tmp_path):
    picture(tmp_path / "a.png")
    with Trap() as trap:
        Image.open(tmp_path / "a.png").close()
        assert len(trap.shown) == 1
        for name in ("classify", "label"):
            call_page(name, paintings[0])
        store = corrections.Corrections(tmp_path / "corrections.sqlite")
        store.add("a.png", paintings[0], "m", "Cubism", 0.5, "Rococo")
        corrections.export(store, tmp_path / "exported")
        for name, (data, message) in TURNED_AWAY.items():
            assert message in call_page("classify", data)[0]["value"]
            assert len(trap.shown) == 1, name


def test_a_stylist_sees_uploads_of_the_same_formats(paintings, tmp_path):
    predict = lambda pixels: torch.tensor([[0.7, 0.3]])  # noqa: E731
    classifier = SimpleNamespace(classes=["A", "B"], device=torch.device("cpu"), predict=predict, resize="squash")
    arguments = {"styles": 2, "width": 8}
    save_checkpoint(
        tmp_path / "style.pt",
        {
            "model": "StyleAutoencoder",
            "arguments": arguments,
            "classes": ["A", "B"],
            "data": {"size": 32, "resize": "squash"},
            "weights": wikiart.make_model("StyleAutoencoder", arguments).state_dict(),
        },
    )
    with Trap() as trap:
        assert "<img" in panels.repaint_html(panels.load_repainter(tmp_path, classifier), paintings[0], "a", "B", 1.0)
    assert not trap.shown


# The API


@pytest.fixture(scope="module")
def server(run, demo):
    with served(run, "--data", demo) as process:
        yield process


@pytest.fixture(scope="module")
def paintings(demo):
    return [path.read_bytes() for path in sorted((demo / "test").rglob("*.jpg"))]


def predicted(classifier, data):
    pixels = uploads.read_upload(data, classifier.size, classifier.resize)
    return classifier.predict(torch.from_numpy(pixels)[None])[0]


def truth(classifier, data):
    return [name for name, _ in classifier.top(predicted(classifier, data))]


def still_right(server, classifier, data):
    with httpx.Client(timeout=60) as client:
        answer = page.request_label(client, server.address, data)
    assert [style["name"] for style in answer["styles"]] == truth(classifier, data)


def test_gradio_client_gets_one_answer_and_many(server, classifier, paintings, demo, tmp_path):
    client = Client(server.address, verbose=False, analytics_enabled=False)
    files = sorted((demo / "test").rglob("*.jpg"))[:3]
    one = client.predict(handle_file(files[0]), api_name="/label")
    assert [style["name"] for style in one["styles"]] == truth(classifier, paintings[0])
    (tmp_path / "text.png").write_text("no picture")
    many = client.predict(
        [handle_file(path) for path in (files[1], tmp_path / "text.png", files[2])], api_name="/label_batch"
    )
    assert [[style["name"] for style in answer.get("styles", [])] for answer in many] == [
        truth(classifier, paintings[1]),
        [],
        truth(classifier, paintings[2]),
    ]
    assert "not a picture" in many[1]["error"]
    files = sorted((demo / "test").rglob("*.jpg"))[:12]
    answers = client.predict([handle_file(path) for path in files], api_name="/label_batch")
    doubts = [predicted(classifier, path.read_bytes()).max().item() < 0.5 for path in files]
    assert [answer["unsure"] for answer in answers] == doubts and len(set(doubts)) == 2
    with pytest.raises(Exception, match=f"1 to {page.MAX_BATCH} files"):
        client.predict([handle_file(files[0])] * (page.MAX_BATCH + 1), api_name="/label_batch")


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here: apt-get install curl, as .ci/run does")
def test_curl_as_the_page_on_labelling_has_it(server, classifier, paintings, demo):
    text = (ROOT / "docs/labelling.md").read_text().partition("## API")[2].partition("\n## ")[0]
    command = text.partition("```sh\n")[2].partition("```")[0]
    assert command.count("curl") == 2
    command = command.replace("http://127.0.0.1:7860/", server.address)
    command = command.replace("my.jpg", str(min((demo / "test").rglob("*.jpg"))))
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, check=True, timeout=60)
    styles = json.loads(done.stdout)["data"][0]["styles"]
    assert [style["name"] for style in styles] == truth(classifier, paintings[0])


def test_the_python_of_the_page_on_labelling(server, demo):
    text = (ROOT / "docs/labelling.md").read_text().partition("## API")[2].partition("\n## ")[0]
    code = text.partition("```python\n")[2].partition("```")[0]
    for name, path in zip(("my.jpg", "other.jpg"), sorted((demo / "test").rglob("*.jpg")), strict=False):
        code = code.replace(name, str(path))
    names = {}
    exec(code.replace("http://127.0.0.1:7860/", server.address), names)
    assert set(names["one"]) == {"model", "classes", "styles", "unsure"}
    assert [set(answer) for answer in names["many"]] == 2 * [set(names["one"])]


def test_an_upload_is_good_for_one_answer(server, paintings):
    with httpx.Client(timeout=60) as client:
        token = client.post(f"{server.address}gradio_api/upload", files={"files": paintings[0]}).json()[0]
        file = {"path": token, "meta": {"_type": "gradio.FileData"}}
        replies = [client.post(f"{server.address}gradio_api/run/label", json={"data": [file]}) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 500]
    assert "upload the picture first" in replies[1].json()["error"]


def test_artists_are_answered_where_there_is_a_model_of_them(classifier, run, demo, paintings):
    answer = page_caller(classifier, run, demo, artist_classifier=classifier)("label", paintings[0])
    assert answer["artists"] == answer["styles"]


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_a_bad_upload_is_an_error_of_its_request_only(server, classifier, paintings, name):
    data, message = TURNED_AWAY[name]
    with httpx.Client(timeout=60) as client, pytest.raises(httpx.HTTPStatusError) as error:
        page.request_label(client, server.address, data)
    assert message in error.value.response.json()["error"]
    still_right(server, classifier, paintings[0])


def announced(server, endpoint, length):
    """The status of a request that says it has so many bytes, and sends none of them."""
    connection = http.client.HTTPConnection(server.address.split("/")[2], timeout=30)
    connection.putrequest("POST", f"/gradio_api/{endpoint}")
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_what_is_too_large_is_turned_away_before_it_is_read(server, classifier, paintings):
    with httpx.Client(timeout=60) as client:
        for endpoint in ("upload", "run/label"):
            assert announced(server, endpoint, uploads.MAX_REQUEST + 1) == 413
        endless = client.post(f"{server.address}gradio_api/upload", content=iter([b"a"] * 9))
        assert endless.status_code == 411
        both = {"Content-Length": "5", "Transfer-Encoding": "chunked"}  # the second is the one that would count
        assert (
            client.post(f"{server.address}gradio_api/upload", content=iter([b"a"] * 9), headers=both).status_code == 411
        )
    still_right(server, classifier, paintings[0])


SECRET = "nobody else may read this"


@pytest.mark.parametrize(
    "how",
    [
        "file=",
        "file/",
        "proxy=",
        "file=%2e%2e/",
        "../",
        "stream/",
        "component_server/",
        "custom_component/",
        "static/",
        "assets/../../",
        "svelte/..%2f..%2f",
        "run/../file=",
        "upload/..%2ffile=",
    ],
)
def test_no_file_is_served(server, tmp_path, how):
    (tmp_path / "secret.txt").write_text(SECRET)
    for path in (tmp_path / "secret.txt", "/etc/passwd", "config.json", "classifier.pt"):
        for prefix in ("", "gradio_api/"):
            line = http.client.HTTPConnection(server.address.split("/")[2], timeout=30)
            line.request("GET", f"/{prefix}{how}{path}")  # as it is: httpx would tidy the path up
            content = line.getresponse().read()
            line.close()
            for secret in (SECRET.encode(), b"root:", b'"train_autoencoder"', b"PK\x03\x04"):
                assert secret not in content


def test_no_path_is_opened_for_an_api_request(server, classifier, paintings, demo):
    """A path, a URL, another's token: only what this client was given by the upload is looked at."""
    own = str(min((demo / "test").rglob("*.jpg")))
    file = {"meta": {"_type": "gradio.FileData"}}
    with httpx.Client(timeout=60) as client:
        token = client.post(f"{server.address}gradio_api/upload", files={"files": paintings[0]}).json()[0]
        for path in (
            own,
            "/etc/passwd",
            f"{token}/../../../../etc/passwd",
            f"file://{own}",
            f"{server.address}config",
            str(Path(token).parent),
            "",
            token[:-1],
        ):
            for data in ({**file, "path": path}, {**file, "path": token[:-1], "url": path}, path, None):
                for name, sent in (("label", data), ("label_batch", [data])):
                    reply = client.post(f"{server.address}gradio_api/run/{name}", json={"data": [sent]})
                    assert "styles" not in reply.text
                    assert "root:" not in reply.text
    still_right(server, classifier, paintings[0])


def test_a_client_that_hangs_up_leaves_the_service_as_it_was(server, classifier, paintings):
    with httpx.Client(timeout=60) as client:
        token = client.post(f"{server.address}gradio_api/upload", files={"files": paintings[0]}).json()[0]
    host, port = server.address.split("//")[1].strip("/").split(":")
    body = json.dumps({"data": [{"path": token, "meta": {"_type": "gradio.FileData"}}]}).encode()
    head = f"POST /gradio_api/run/label HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for sent, length in ((body, len(body)), (body[:20], len(body)), (b"", 10**6)):
        with socket.create_connection((host, int(port))) as line:
            line.sendall(head.encode() + f"Content-Length: {length}\r\n\r\n".encode() + sent)
    still_right(server, classifier, paintings[0])


@pytest.mark.parametrize("part", ["head", "middle", "end"])
def test_a_client_that_hangs_up_in_the_middle_of_an_upload_is_forgotten(server, classifier, paintings, part):
    host, port = server.address.split("//")[1].strip("/").split(":")
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + paintings[0]
    sent = {"head": body[:20], "middle": body[: len(body) // 2], "end": body}[part]
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body) + 9}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    log = Path(server.log.name)
    before = log.read_text().count("Traceback")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.encode() + sent)
    still_right(server, classifier, paintings[0])
    assert log.read_text().count("Traceback") == before


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"[" * 10**6),
        ("application/json", b'{"data": [{"path": "' + b"a" * 10**6 + b'"}]}'),
        ("application/json", b'{"data": [{"path": ["a"], "meta": {"_type": "gradio.FileData"}}]}'),
        ("application/json", b'{"data": []}'),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=" + b"a" * 10**6),
        ("multipart/form-data", b"no boundary"),
        (
            "multipart/form-data; boundary=x",
            1100 * b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n\r\n' + b"--x--\r\n",
        ),
    ],
    ids=["nested", "long path", "odd path", "no file", "long header", "no boundary", "1100 files"],
)
def test_odd_requests_are_errors_of_their_own_only(server, classifier, paintings, kind, body):
    where = "upload" if kind.startswith("multipart") else "run/label"
    with httpx.Client(timeout=60) as client:
        reply = client.post(f"{server.address}gradio_api/{where}", content=body, headers={"Content-Type": kind})
    assert 400 <= reply.status_code < 600
    assert "Traceback" not in reply.text
    still_right(server, classifier, paintings[0])


def test_a_busy_port_is_one_line_that_names_the_flag(server, run):
    port = server.address.strip("/").rpartition(":")[2]
    with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}: .* give another --port.*in range[^.]*$"):
        label.main(["serve", "--run", str(run), "--port", port, "--device", "cpu"])


def test_it_listens_on_loopback_alone(server):
    port = int(server.address.strip("/").rpartition(":")[2])
    lines = Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines()
    listening = [line.split()[1] for line in lines if f":{port:04X} " in line and line.split()[3] == "0A"]
    assert [address.partition(":")[0] for address in listening] == ["0100007F"]


# How fast


def test_measuring_gives_the_facts(demo, run):
    label.main(["measure", str(demo / "test"), "--run", str(run), *CPU, "--port", "0"])
    facts = json.loads((run / "facts.json").read_text())["label"]
    assert facts["folder_share"] > 0
    assert facts["api_ratio"] == pytest.approx(facts["api_ms"] / facts["alone_ms"], rel=0.01)
    assert (facts["pictures"], facts["requests"]) == (32, 31)


# The collection


def test_the_collection_is_a_table_of_years(demo, run, trained):
    shutil.copy(trained / "facts.json", run)
    shown = collection.Collection(SimpleNamespace(run=str(run), data=str(demo), hide=[]), None).html()
    sizes = json.loads((trained / "facts.json").read_text())["train"]["class_sizes"]
    for name, size in sizes.items():
        assert f"{name.replace('_', ' ')}: <b>{size}</b>" in shown
    rows = [{"path": f"train/A/{number}.jpg", "year": year} for number, year in enumerate((1601, "c. 1622", "", 1910))]
    table = collection.years_html({row["path"]: row | {"year": str(row["year"])} for row in rows})
    assert "1600 to<br>1649" in table
    assert ">2<" in table
    assert collection.years_html({}) == ""
