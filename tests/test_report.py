"""The committed report and README are what the templates and the committed facts make; links and commands are right."""

import importlib
import json
import re
import shlex
import shutil

import pytest
import torch
from conftest import ROOT, clear_line, picture, script

from common.config import read_settings
from common.names import hidden_parts
from common.stamp import current_hash

DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "report/README.md", *DOCS]


def test_the_committed_documents_are_up_to_date():
    process = script("report/build.py", "--check")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_resolve(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"""(?:\]\(|src=")(?!https:)([^)#"]+)[)"]""", text)
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    assert all(alternative for alternative in re.findall(r"!\[([^\]]*)\]", text))


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10_000
    assert set(re.findall(r"\]\((docs/[^)#]+)\)", text)) == set(DOCS)


@pytest.mark.parametrize("page", [*PAGES, "Makefile", "report/report.mk"])
def test_commands_have_known_flags_and_files(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    text = re.sub(r"\$\(call variant,\w+\)", "train_style.py", text)
    commands = re.findall(r"(?:python|--|\(PY\)|=) (\w+\.py\b[^`#\n]*)", re.sub(r"`([^`]*)`", r"`\1`\n", text))
    commands += re.findall(r"`python (\w+\.py\b[^`]*)`", text)
    assert commands or page in DOCS
    for command in commands:
        if command.startswith("genre.py"):  # the script that docs/extend.md shows; test_docs.py runs it
            continue
        name, *arguments = shlex.split(command.replace("\n", " ").replace("$(", "").replace(")", ""))
        check_flags(name.removesuffix(".py"), arguments, command)


def check_flags(name, arguments, command):
    assert (ROOT / f"{name}.py").exists(), command
    if name == "tune" and "--" in arguments:  # the rest is for train.py
        separator = arguments.index("--")
        check_flags("train", arguments[separator + 1 :], command)
        arguments = arguments[:separator]
    module = importlib.import_module(name)
    flags = {f"--{key.replace('_', '-')}" for key in (*module.SHARED, *module.SETTINGS)}
    flags |= {f"--no-{key.replace('_', '-')}" for key, setting in module.SETTINGS.items() if setting.type is bool}
    assert {argument for argument in arguments if argument.startswith("--")} <= flags, command
    for flag, value in zip(arguments, arguments[1:], strict=False):
        assert flag != "-c" or (ROOT / value).exists(), command


def test_the_four_lines_of_the_readme_use_the_committed_classifier(tmp_path):
    (code,) = re.findall(r"```python\n(from wikiart import Classifier\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) == 4
    for name in ("a.jpg", "b.jpg"):
        code = code.replace(name, str(picture(tmp_path / name, size=(300, 200))))
    code = code.replace("report/", f"{ROOT}/report/")
    code, names = code.replace("classifier.top", "likeliest = classifier.top"), {}
    exec(code, names)
    assert names["likeliest"][0][1] == names["probabilities"][0].max()
    assert names["probabilities"].shape == (2, 8)
    assert torch.allclose(names["probabilities"].sum(1), torch.ones(2))


def test_pictures_are_small_enough_for_a_page():
    for figure in (ROOT / "report").rglob("*.png"):  # in true colours, those of many paintings the largest
        limit = 5_000_000 if figure.name.startswith(("style_", "map_", "lora_")) else 1_500_000
        assert figure.stat().st_size <= limit, figure.name


def test_weights_are_small_enough_for_a_repository():
    for weights in (ROOT / "report").glob("*.pt"):
        assert weights.stat().st_size <= 8_000_000, weights.name


def test_no_number_in_the_results_was_typed_by_hand():
    bare = re.sub(r"\{[^{}]*\}|`[^`]*`", "", (ROOT / "report/results.md").read_text())
    assert not re.search(r"\d", re.sub("F1|EfficientNet-Lite2|ResNet-18", "", bare))


def test_the_committed_facts_have_every_row_of_the_ablation():
    facts = json.loads((ROOT / "report/facts.json").read_text())
    rows = set(json.loads((ROOT / "report/ablation.json").read_text()))
    assert set(facts["ablation_0"]) >= rows
    assert set(facts["ablation_1"]) >= rows
    assert set(facts["seeds"]) >= {"0", "1", "2"}


def test_the_readme_names_the_painting_of_its_picture():
    shown = json.loads((ROOT / "report/facts.json").read_text())["style_transfer"]["shown"].split("; ")
    assert shown[(len(shown) - 1) // 2].split(":")[0] in (ROOT / "README.md").read_text()


def test_the_report_hides_more_than_the_default(monkeypatch):
    monkeypatch.chdir(ROOT)
    hide = read_settings(["report/settings.json"])["hide"]
    assert hide[:-1] == read_settings()["hide"] == ["nude_painting", "nude"]
    assert len(hidden_parts(hide)) == 33


def test_a_report_of_ones_own_run_and_a_missing_fact(tmp_path):
    facts = json.loads((ROOT / "report/facts.json").read_text())
    facts["test"]["accuracy"] = 0.123456
    for figure in (ROOT / "report").glob("*.png"):
        shutil.copy(figure, tmp_path)
    for name in ("classes.png", "roc.png"):  # which the committed report does not show
        shutil.copy(ROOT / "report/confusion.png", tmp_path / name)
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
    shutil.copy(ROOT / "README.md", tmp_path)
    for name in ("common", "report"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    run, report = tmp_path / "run", tmp_path / "report"
    shutil.copytree(report, run)
    (run / "demo/stamps").mkdir(parents=True)
    code = current_hash("wikiart.CNN")
    (run / "demo/stamps/mlp").write_text(
        f"train.py -c x\nepochs = 3\ncommon.optim.Muon {'0' * 12}\nwikiart.CNN {code}\n"
    )
    shutil.copy(ROOT / "wikiart.py", tmp_path)
    for name in ("demo.png", "style_truth.png", "lora_grid.png", "lora_compare.png"):
        (run / name).rename(run / "demo" / name)
    (run / "demo/demo.png").write_bytes(b"drawn anew")
    (run / "demo/tiny_base/knows-all/unet").mkdir(parents=True)
    (run / "demo/tiny_base/knows-all/unet/config.json").write_text("of this run")
    facts = json.loads((run / "facts.json").read_text())
    facts["test"]["accuracy"] = 0.987654
    (run / "facts.json").write_text(json.dumps(facts))
    (run / "centroids_combined.txt").write_text("cluster 1: a painter: a title")
    (run / "more").mkdir()
    (run / "regions.png").rename(run / "away.png")
    before = {path: path.read_bytes() for path in report.iterdir() if path.is_file()}
    publish = (tmp_path / "report/build.py", "--run", run, "--publish")
    assert "regions.png" in clear_line(script(*publish))
    assert {path: path.read_bytes() for path in report.iterdir() if path.is_file()} == before
    (run / "away.png").rename(run / "more/regions.png")
    (run / "classifier.pt").rename(run / "away.pt")
    (run / "classifier.pt").write_bytes(b"of another training")
    assert "of another network than" in clear_line(script(*publish))
    assert {path: path.read_bytes() for path in report.iterdir() if path.is_file()} == before
    (run / "away.pt").replace(run / "classifier.pt")
    assert script(*publish).returncode == 0
    assert "98.8%" in (report / "README.md").read_text()
    assert "98.8%" in (tmp_path / "README.md").read_text()
    assert (report / "centroids_combined.txt").read_text().startswith("cluster 1")
    assert (report / "demo.png").read_bytes() == b"drawn anew"
    assert (report / "tiny_base/knows-all/unet/config.json").read_text() == "of this run"
    check = script(tmp_path / "report/build.py", "--check")
    assert check.returncode == 0
    changed, unknown = check.stderr.splitlines()
    assert changed == "build.py: common.optim.Muon has changed since it made the results of demo/mlp"
    assert "not known which code made the results of classifier, " in unknown
