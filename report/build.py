"""Fill the report's templates with what a run measured.

    python report/build.py --run runs/demo                # writes runs/demo/report.md
    python report/build.py --run runs/wikiart --publish   # renews report/, its weights, and the README's results
    python report/build.py --check                        # are they what the templates and report/facts.json give?

A template holds {script.fact} or {script.fact:format}, e.g. {test.accuracy:.1%}, for every number; a fact that the
run does not have is an error. {mlp.train.epochs} is a fact of the run in the run's folder mlp/. Figures are named as
they stand in the run folder.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

REPORT = Path(__file__).resolve().parent
README = REPORT.parent / "README.md"
RESULTS = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)
PLACEHOLDER = re.compile(r"\{([a-z]\w*(?:\.\w+)+)(?::([^{}]*))?\}")
FIGURE = re.compile(r"\]\(([^)/]+\.(?:png|txt))\)")  # .txt: painters and titles of a sheet of paintings
OF_DEMO = ("demo.png", "lora_grid.png")  # the small text-to-image model is taught on the demo
FRONT = {
    "How often is each style recognised?": "confusion.png",
    "What is left of a painting in a few numbers?": "reconstructions.png",
    "Do paintings of a style lie together?": "tsne_manner.png",
    "The same painting in another style": "style_grid.png",
}


def fill(template: Path, facts: dict) -> str:
    """The template's text with every placeholder replaced; exits naming the facts that are missing."""
    missing = []

    def value(match):
        found = facts
        for part in match[1].split("."):
            if not isinstance(found, dict) or part not in found:
                missing.append(match[1])
                return ""
            found = found[part]
        return format(found, match[2] or "")

    text = PLACEHOLDER.sub(value, template.read_text())
    if missing:
        sys.exit(f"build.py: {template.name} asks for what the run did not measure: {', '.join(sorted(set(missing)))}")
    return text


def documents(facts: dict) -> dict[Path, str]:
    """The committed documents as the committed templates and these facts make them."""
    results = fill(REPORT / "results.md", facts)
    readme = RESULTS.sub(lambda marks: marks[1] + results + marks[2], README.read_text())
    return {REPORT / "README.md": fill(REPORT / "template.md", facts), README: readme}


def read_facts(folder: Path) -> dict:
    """A run's facts, with those of the runs in its folders under their names."""
    path = folder / "facts.json"
    if not path.exists():
        sys.exit(f"build.py: no {path}: run make first, or give another --run")
    parts = {each.parent.name: json.loads(each.read_text()) for each in sorted(folder.glob("*/facts.json"))}
    return parts | json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder (runs/demo)")
    parser.add_argument("--publish", action="store_true", help="copy facts and figures to report/, write the documents")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the committed documents are out of date")
    options = parser.parse_args()

    if options.check:
        stale = [path.name for path, text in documents(read_facts(REPORT)).items() if path.read_text() != text]
        sys.exit(f"build.py: out of date: {', '.join(stale)}; run make report" if stale else 0)

    facts = read_facts(options.run)
    for script in ("train", "test"):
        if script not in facts:
            sys.exit(f"build.py: {options.run} has no facts of {script}.py yet: run it first")
    text = fill(REPORT / ("template.md" if options.publish else "run.md"), facts)
    renewed = documents(facts) if options.publish else {}  # all is there before anything is overwritten
    shown = {figure: options.run / ("demo" if figure in OF_DEMO else "") / figure for figure in FIGURE.findall(text)}
    for figure, path in shown.items():
        if not path.exists():
            sys.exit(f"build.py: the report shows {figure}, which {options.run} does not have")
    if options.publish:
        for figure, path in shown.items():
            shutil.copyfile(path, REPORT / figure)
        sys.path.insert(0, str(REPORT.parent))
        from figures import front  # not needed, nor matplotlib, for the documents alone

        front(REPORT / "front.png", {title: options.run / figure for title, figure in FRONT.items()})
        (REPORT / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
        for weights in ("classifier.pt", "autoencoder.pt", "style.pt"):  # which the numbers speak of
            shutil.copyfile(options.run / weights, REPORT / weights)
        for path, filled in renewed.items():
            path.write_text(filled)
        print(f"renewed: {REPORT / 'README.md'}, {README}")
    else:
        (options.run / "report.md").write_text(text)
        print(f"test accuracy {facts['test']['accuracy']:.1%}; the report is {options.run / 'report.md'}, "
              f"its figures are beside it")  # fmt: skip


if __name__ == "__main__":
    main()
