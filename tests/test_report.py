"""The committed report and README are what the templates and the committed facts make; their links resolve."""

import json
import re
import shutil

import pytest
from conftest import ROOT, clear_line, script

PAGES = ["README.md", "report/README.md"]


def test_the_committed_documents_are_up_to_date():
    done = script("report/build.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_resolve(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    assert all(alternative for alternative in re.findall(r"!\[([^\]]*)\]", text))


def test_pictures_are_small_enough_for_a_page():
    for picture in (ROOT / "report").rglob("*.png"):
        assert picture.stat().st_size <= 500_000, picture.name


def test_weights_are_small_enough_for_a_repository():
    for weights in (ROOT / "report").glob("*.pt"):
        assert weights.stat().st_size <= 8_000_000, weights.name


def test_no_number_in_the_results_was_typed_by_hand():
    bare = re.sub(r"\{[^{}]*\}", "", (ROOT / "report/results.md").read_text())
    assert not re.search(r"\d", bare.replace("F1", ""))


def test_a_report_of_ones_own_run_and_a_missing_fact(tmp_path):
    facts = json.loads((ROOT / "report/facts.json").read_text())
    facts["test"]["accuracy"] = 0.123456
    for picture in (ROOT / "report").glob("*.png"):
        shutil.copy(picture, tmp_path)
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    assert script("report/build.py", "--run", tmp_path).returncode == 0
    assert "12.3%" in (tmp_path / "report.md").read_text()
    del facts["test"]["accuracy"]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    assert "test.accuracy" in clear_line(script("report/build.py", "--run", tmp_path))
    (tmp_path / "facts.json").unlink()
    assert "run make first" in clear_line(script("report/build.py", "--run", tmp_path))


def test_publishing_renews_everything_or_nothing(tmp_path):
    """In a copy of the project, from a run folder that has what the committed report shows."""
    for name in ("README.md", "figures.py", "report"):
        (shutil.copytree if name == "report" else shutil.copy)(ROOT / name, tmp_path / name)
    run, report = tmp_path / "run", tmp_path / "report"
    shutil.copytree(report, run)
    (run / "demo").mkdir()
    for name in ("demo.png", "lora_grid.png"):
        (run / name).rename(run / "demo" / name)
    facts = json.loads((run / "facts.json").read_text())
    facts["test"]["accuracy"] = 0.987654
    (run / "facts.json").write_text(json.dumps(facts))
    (run / "centroids_manner.txt").write_text("cluster 1: a painter: a title")
    (run / "roc.png").rename(run / "away.png")
    before = {path: path.read_bytes() for path in report.iterdir()}
    publish = (tmp_path / "report/build.py", "--run", run, "--publish")
    assert "roc.png" in clear_line(script(*publish))
    assert {path: path.read_bytes() for path in report.iterdir()} == before
    (run / "away.png").rename(run / "roc.png")
    assert script(*publish).returncode == 0
    assert "98.8%" in (report / "README.md").read_text()
    assert "98.8%" in (tmp_path / "README.md").read_text()
    assert (report / "centroids_manner.txt").read_text().startswith("cluster 1")
    assert script(tmp_path / "report/build.py", "--check").returncode == 0


def test_one_training_in_two_tables_has_one_figure():
    facts = json.loads((ROOT / "report/facts.json").read_text())
    assert facts["balance"]["logit"] == facts["ablation"]["everything"]
