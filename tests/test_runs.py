"""Settings, facts, and files that are complete or absent."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import embed
import train
from common import config, run
from common.errors import UserError

SCRIPTS = [key for key, value in json.loads((ROOT / "config.json").read_text()).items() if isinstance(value, dict)]


def test_help_has_the_common_flags_first_and_no_long_default(capsys):
    with pytest.raises(SystemExit):
        config.configure("embed", "doc", embed.SETTINGS, embed.SHARED, ["--help"])
    text = capsys.readouterr().out
    places = [text.index(part) for part in ("common flags:", "--epochs", "more flags of embed.py:", "--shrink")]
    assert places == sorted(places) and places[-1] < text.index("shared flags:") < text.index("--size")
    assert "eva02_base" not in text and "see config.json" in text and "(default: 20)" in text


def configure(*argv):
    return config.configure("train", "doc", train.SETTINGS, train.SHARED, list(argv))


def test_flags_lie_over_files_over_defaults(tmp_path):
    over = tmp_path / "over.json"
    over.write_text('{"size": 64, "train": {"epochs": 7, "lr": 1}}')
    settings = configure("-c", str(over), "--epochs", "9")
    assert (settings.size, settings.epochs, settings.lr) == (64, 9, 1.0)
    assert isinstance(settings.lr, float)


def test_later_files_lie_over_earlier_ones(tmp_path):
    for name, size in (("a", 64), ("b", 32)):
        (tmp_path / name).write_text(json.dumps({"size": size}))
    assert configure("-c", str(tmp_path / "a"), "-c", str(tmp_path / "b")).size == 32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sizes": 3}', "sets sizes, which config.json does not have"),
        ('{"train": {"epoch": 3}}', r"sets train\.epoch, which"),
        ('{"size": "big"}', "size to 'big', but config.json has a int"),
        ('{"size": 1.5}', "has a int"),
        ('{"train": 3}', "has a dict"),
        ('{"train": {"tta_scales": [1, "a"]}}', "has a list of float"),
        ('{"train": {"dropout": 1}}', r"dropout is 1\.0, but must be in \[0, 1\)"),
        ('{"resize": "stretch"}', "must be one of squash, crop"),
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_a_wrong_settings_file_is_named(tmp_path, content, message):
    (tmp_path / "wrong.json").write_text(content)
    with pytest.raises(UserError, match=message):
        configure("-c", str(tmp_path / "wrong.json"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        line.split()
        for line in (
            "--batch-size 0",
            "--epochs -1",
            "--lr nan",
            "--validation 1.5",
            "--size 0",
            "--seed -1",
            "--tta-scales 0",
            "--lr 0",
            "--dropout 1",
            "--ema-decay 1",
        )
    ],
)
def test_a_number_that_makes_no_sense_is_named(flag, value):
    name = flag.strip("-").replace("-", "_")
    with pytest.raises(UserError, match=f"{name} is "):
        configure(flag, value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_key_is_explained(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as done:
        module.main(["--help"])
    assert done.value.code == 0
    assert f"    python {name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "settings").glob("*.json")), ids=lambda path: path.stem)
def test_the_settings_files_are_valid(path):
    configure("-c", str(path))


def test_there_are_at_most_120_settings_and_every_one_belongs_to_a_script():
    settings = json.loads((ROOT / "config.json").read_text())
    assert sum(len(value) if isinstance(value, dict) else 1 for value in settings.values()) <= 120
    shared = set()
    for name in SCRIPTS:
        module = importlib.import_module(name)
        assert set(module.SETTINGS) == set(settings[name]), name
        shared |= set(module.SHARED)
    assert shared == set(settings) - set(SCRIPTS)


def test_the_top_level_stays_small():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert len(top) <= 30
    assert sum(name.endswith(".py") for name in top) <= 15


def test_facts_of_scripts_stand_side_by_side(tmp_path):
    run.add_facts(tmp_path, "train", {"a": 1})
    run.add_facts(tmp_path, "test", {"b": 2})
    run.add_facts(tmp_path, "train", {"c": 3})
    assert json.loads((tmp_path / "facts.json").read_text()) == {"train": {"c": 3}, "test": {"b": 2}}


def test_two_programs_adding_facts_lose_none(tmp_path):
    code = "import sys; from common.run import add_facts\n"
    code += "for n in range(40): add_facts(sys.argv[1], f'{sys.argv[2]}{n}', {'n': n})"
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path, name], cwd=ROOT) for name in "ab"]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(json.loads((tmp_path / "facts.json").read_text())) == 80


def test_two_programs_changing_the_same_facts_lose_nothing(tmp_path):
    code = "import sys; from common.run import change_facts\n"
    code += "for n in range(40): change_facts(sys.argv[1], 'a', lambda earlier: {'n': earlier.get('n', 0) + 1})"
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert json.loads((tmp_path / "facts.json").read_text()) == {"a": {"n": 80}}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), run.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_kill_9_during_a_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "classifier.pt"
    run.save_checkpoint(path, {"model": "old", "weights": torch.zeros(3)})
    code = (
        "import sys, torch; from common import run\n"
        "while True: run.save_checkpoint(sys.argv[1], {'model': 'new', 'weights': torch.ones(8_000_000)})"
    )
    for delay in (0.0, 0.02, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT)
        deadline = time.monotonic() + 60
        while len(os.listdir(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)  # until the temporary file is there
        assert time.monotonic() < deadline
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        checkpoint = run.load_checkpoint(path)
        assert checkpoint["weights"].unique().numel() == 1
        for leftover in tmp_path.glob(".*"):
            leftover.unlink()


def test_a_full_disk_gets_one_clear_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk full"):
        run.save_checkpoint(tmp_path / "a.pt", {})
    assert not os.listdir(tmp_path)
