"""What users confirm on the page: kept whatever happens, and exported as a folder to train with."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from conftest import ROOT, TINY_TRAIN, picture

import label
import train
import wikiart
from common.run import load_checkpoint
from serve import corrections


def test_a_correction_is_there_after_kill_9(tmp_path):
    """A process that says a correction is saved, and is killed at once: again and again, none is lost."""
    code = (
        "import sys\n"
        "from serve import corrections\n"
        "store, number = corrections.Corrections(sys.argv[1]), 0\n"
        "while True:\n"
        "    store.add('a_b.png', b'%d' % number, 'model', 'Cubism', 0.5, 'Rococo')\n"
        "    print(number, flush=True)\n"
        "    number += 1\n"
    )
    for turn in range(3):
        path, saved = tmp_path / f"{turn}.sqlite", -1
        with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
            for line in process.stdout:
                saved = int(line)
                if saved == 3 + turn:
                    process.kill()
                    break
            rest = process.stdout.read().split()
        saved = int(rest[-1]) if rest else saved
        with sqlite3.connect(path) as base:
            assert base.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            kept = base.execute("SELECT picture FROM corrections JOIN pictures USING (hash) ORDER BY number").fetchall()
        assert len(kept) >= saved + 1
        assert [int(content) for (content,) in kept] == list(range(len(kept)))


def test_two_threads_correct_at_once(tmp_path):
    store = corrections.Corrections(tmp_path / "corrections.sqlite")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.add("a.png", b"%d" % number, "m", "Cubism", 0.5, "Rococo"), range(64)))
    assert sorted(int(data) for _, _, data, _ in store.latest()) == list(range(64))


def test_the_export_is_an_image_folder_that_train_takes(demo, tmp_path):
    run, target = tmp_path / "run", tmp_path / "exported"
    store = corrections.Corrections(run / "corrections.sqlite")
    files = sorted((demo / "train").rglob("*.jpg"))
    for path in files:
        store.add(path.name, path.read_bytes(), "model", "Wrong", 0.4, path.parent.name)
    first, other = files[0], next(path.parent.name for path in files if path.parent != files[0].parent)
    flags = ["export", str(target), "--run", str(run)]
    label.main(flags)
    exported = {path.read_bytes(): path for path in target.rglob("*.jpg")}
    assert all(exported[path.read_bytes()].parent.name == path.parent.name for path in files)
    before = exported[first.read_bytes()]
    assert before.name.startswith(first.stem)

    store.add(first.name, first.read_bytes(), "model", "Wrong", 0.4, other)  # thought better of it
    label.main(flags)
    assert not before.exists()
    assert [path.parent.name for path in target.rglob(f"{first.stem}-*")] == [other]
    data = wikiart.WikiArt(target, "train", size=32, processes=1)
    assert set(data.artists) <= {path.name.partition("_")[0] for path in files}
    train.main([*TINY_TRAIN, "--data", str(target), "--run", str(run), "--epochs", "1"])
    assert load_checkpoint(run / "classifier.pt")["classes"] == sorted({path.parent.name for path in files})


def test_pictures_of_no_style_are_kept_but_not_exported(tmp_path, capsys):
    """Also where they had a style in an earlier export; a label that is taken back leaves the one before."""
    store, target = corrections.Corrections(tmp_path / "corrections.sqlite"), tmp_path / "exported"
    data = [picture(tmp_path / f"{number}.png", number).read_bytes() for number in range(3)]
    for number, choice in enumerate(("Dots", "Dots", "(none)")):
        store.add(f"a_{number}.png", data[number], "m", "Dots", 0.5, choice)
    corrections.export(store, target)
    assert {path.read_bytes() for path in target.rglob("*.png")} == {data[0], data[1]}
    last = [store.add(f"a_{n}.png", data[n], "m", "Dots", 0.5, list(corrections.NO_CLASS)[n]) for n in range(2)]
    corrections.export(store, target)
    assert list(target.rglob("*.png")) == []
    assert "3 that are of none of the styles, or no paintings" in capsys.readouterr().out
    store.remove(last[0])
    corrections.export(store, target)
    assert {path.parent.name: path.read_bytes() for path in target.rglob("*.png")} == {"Dots": data[0]}
    for number in range(1, 6):
        store.remove(number)
    assert list(store.latest()) == []


def test_test_paintings_are_not_exported_into_training(demo, tmp_path, capsys):
    store = corrections.Corrections(tmp_path / "corrections.sqlite")
    tested, other = tmp_path / "data/test/Dots/one.png", tmp_path / "other.png"
    for number, path in enumerate((picture(tested, 1), picture(other, 2))):
        store.add(f"new-{number}.png", path.read_bytes(), "m", "Dots", 0.5, "Dots")
    corrections.export(store, tmp_path / "data/train")
    assert [path.read_bytes() for path in (tmp_path / "data/train").rglob("*.png")] == [other.read_bytes()]
    assert "new-0.png is a test painting" in capsys.readouterr().err


def test_names_of_uploads_lead_nowhere_else(tmp_path):
    store = corrections.Corrections(tmp_path / "corrections.sqlite")
    names = ["../../evil.png", "/etc/passwd", "..", ".", "", "a/b\\c.png", "x" * 300 + ".png", "\x00\n.png"]
    for number, name in enumerate(names):
        picture(tmp_path / "a.png", number)
        store.add(name, (tmp_path / "a.png").read_bytes(), "m", "Cubism", 0.5, "Cubism")
    (tmp_path / "a.png").unlink()
    corrections.export(store, tmp_path / "exported")
    assert len(list((tmp_path / "exported/Cubism").glob("*.png"))) == len(names)
    assert not [path for path in tmp_path.rglob("*.png") if path.parent != tmp_path / "exported/Cubism"]
