"""docs/: the commands and the script of a page do what it says."""

import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT, TINY, TINY_TRAIN, picture, script

import test as evaluation
import train
from common.run import load_checkpoint
from wikiart import WikiArt

PAGE = (ROOT / "docs" / "extend.md").read_text()


def test_the_script_on_top_of_wikiart(trained, demo, tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    assert len([line for line in code.partition("import sys")[2].splitlines() if line.strip()]) <= 30
    (tmp_path / "genre.py").write_text(code)
    command = [sys.executable, tmp_path / "genre.py", demo, trained / "classifier.pt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    genres, share, images = re.search(r"(\d+) genres; ([\d.]+)% of (\d+) test", done.stdout).groups()
    test = WikiArt(demo, "test", size=32, target="genre", min_images=1, processes=1)
    assert (int(genres), int(images)) == (len(test.classes), len(test))
    assert float(share) / 100 > test.counts().max() / len(test)  # better than the largest genre always


def test_a_ninth_style_is_a_folder(demo, tmp_path):
    root, run = tmp_path / "nine", tmp_path / "run"
    shutil.copytree(demo, root, ignore=shutil.ignore_patterns(".cache"))
    for number in range(12):
        picture(root / ("test" if number % 4 == 0 else "train") / "Symbolism" / f"artist-{number}_work.png", number)
    flags = [*TINY, "--data", str(root), "--run", str(run)]
    train.main([*TINY_TRAIN, *flags, "--epochs", "1"])
    evaluation.main(flags)
    assert len(load_checkpoint(run / "classifier.pt")["classes"]) == 9
    assert "Symbolism" in (run / "report.csv").read_text()


def test_an_old_checkpoint_leaves_the_ninth_out_and_says_so(demo, trained, tmp_path, capsys):
    shutil.copytree(demo / "test", tmp_path / "nine" / "test")
    picture(tmp_path / "nine/test/Symbolism/a_b.png")
    flags = [*TINY, "--data", str(tmp_path / "nine"), "--run", str(tmp_path)]
    evaluation.main([*flags, "--checkpoint", str(trained / "classifier.pt")])
    assert "left out: 1 of 33 paintings" in capsys.readouterr().err


def test_what_a_gpu_server_needs_is_counted_from_the_code():
    assert script("report/count_gpu.py", "--check").returncode == 0
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert "counted, not measured" in page
    commands = re.findall(r"^\| `python (?:report/)?(\w+\.py)", page, re.M)
    assert commands[0] == "download.py" and commands[-1] == "build.py"
    for needs, script_before in (("test.py", "train.py"), ("cluster.py", "train_autoencoder.py")):
        assert commands.index(script_before) < commands.index(needs)
