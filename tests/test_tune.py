"""A list of settings becomes trainings, one table, one figure and facts; finished ones are not trained again."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_TRAIN

import tune
from common.errors import UserError
from common.run import claim


def test_settings_are_combined_and_named():
    assert tune.read_grid('{"seed": [0, 1]}') == {"0": {"seed": 0}, "1": {"seed": 1}}
    grid = tune.read_grid('{"seed": [0, 1], "lr": [0.1]}')
    assert list(grid) == ["seed-0_lr-0.1", "seed-1_lr-0.1"]
    assert tune.read_grid('{"base": {}, "no_mirror": {"flip": 0}}') == {"base": {}, "no_mirror": {"flip": 0}}
    listed = tune.read_grid('[{}, {"tta_scales": [1.0, 0.5]}, {"aux_weight": 0}]')
    assert list(listed) == ["as-is", "tta_scales-1.0-0.5", "aux_weight-0"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"seed": 1}', "missing.json"])
def test_settings_that_are_none_get_one_clear_line(text):
    with pytest.raises(UserError):
        tune.read_grid(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"seed": [0, 1, 0]}', "0"),
        ('[{"seed": 0, "lr": 0.1}, {"seed": 0, "lr": 0.1}]', "seed-0_lr-0.1"),
        ('[{"tta_scales": [1.0, 0.5]}, {"tta_scales": "1.0-0.5"}]', "1.0-0.5"),
        ('{"base": {"seed": 0}, "base": {"seed": 1}}', "base"),
    ],
)
def test_settings_of_the_same_name_are_not_merged(text, name):
    with pytest.raises(UserError, match=f"^{name} is given twice"):
        tune.read_grid(text)


def test_a_list_of_settings_is_trained_evaluated_and_tabled_once(demo, tmp_path, capsys):
    flags = ["--name", "balance", "--jobs", "2", "--device", "cpu", "--data", str(demo), "--run", str(tmp_path)]
    arguments = ['{"balance": ["none", "logit"]}', *flags, "--", *TINY_TRAIN]
    tune.main(arguments)
    assert "| logit |" in capsys.readouterr().out
    assert (tmp_path / "more/balance.png").exists()
    facts = json.loads((tmp_path / "facts.json").read_text())["balance"]
    assert facts["balanced_accuracy"] == [facts[name]["balanced_accuracy"] for name in ("none", "logit")]
    written = (tmp_path / "balance/none/classifier.pt").stat().st_mtime_ns
    tune.main(arguments)
    assert (tmp_path / "balance/none/classifier.pt").stat().st_mtime_ns == written


def test_the_test_of_an_earlier_training_does_not_count(tmp_path, monkeypatch):
    """Also where a kill came between training and test."""
    run, called = tmp_path / "0", []
    run.mkdir()
    (run / "report.txt").touch()

    def stopped(script, run, _):
        called.append(script)
        if script == "train.py":
            (run / "classifier.pt").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(tune, "call", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune.train_and_test(tmp_path, {"0": {"seed": 0}}, [], [], "0")
    tune.train_and_test(tmp_path, {"0": {"seed": 0}}, [], [], "0")
    assert called == ["train.py", "test.py"]


def test_recalls_are_drawn_where_the_classes_are_the_same(tmp_path):
    facts = {name: {"train": {"class_sizes": {"A": 5, name: 3}}, "test": {"recalls": {"A": 0.5}}} for name in "BC"}
    tune.plot_recalls(tmp_path / "holdout.png", facts, "holdout")
    assert not (tmp_path / "holdout.png").exists()
    tune.plot_recalls(tmp_path / "seed.png", {"0": facts["B"], "1": facts["B"]}, "seed")
    assert (tmp_path / "seed.png").exists()


def test_a_setting_that_fails_is_named(demo, tmp_path):
    arguments = ['[{"model": "resnet19"}]', "--data", str(demo), "--run", str(tmp_path), "--", *TINY_TRAIN]
    with pytest.raises(UserError, match=r"train.py failed in .*no model resnet19"):
        tune.main(arguments)


def test_names_and_folders_are_ones_own(demo, tmp_path):
    arguments = ['{"seed": [0]}', "--data", str(demo), "--run", str(tmp_path)]
    with pytest.raises(UserError, match="another script"):
        tune.main([*arguments, "--name", "train"])
    with claim(tmp_path / "seeds", "tune"), open(tmp_path / "log", "w") as log:
        command = [sys.executable, ROOT / "tune.py", *arguments, "--name", "seeds"]
        assert subprocess.run(command, stderr=log, check=False).returncode == 1
    assert "another program is writing tune" in (tmp_path / "log").read_text()
