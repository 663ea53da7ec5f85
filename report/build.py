"""Fill the report's templates with the facts of a run.

    python report/build.py --run runs/demo                # writes runs/demo/report.md
    python report/build.py --run runs/wikiart --publish   # renews report/, its weights, and the README's results
    python report/build.py --check                        # exits with 1 if the documents are not up to date with the
                                                          # facts; names results that may be older than the code

A template holds {script.fact} or {script.fact:format}, e.g. {test.accuracy:.1%}, for every number; a fact that the run
does not have is an error. {mlp.train.epochs} is a fact of the run in the run's folder mlp/. Figures have the names of
files in the run folder.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

REPORT = Path(__file__).resolve().parent
ROOT = REPORT.parent
sys.path.insert(0, str(ROOT))

from common.files import atomic_write, write_text  # noqa: E402
from common.stamp import current_hash  # noqa: E402

README = ROOT / "README.md"
RESULTS = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)
PLACEHOLDER = re.compile(r"\{([a-z]\w*(?:\.\w+)+)(?::([^{}]*))?\}")
FIGURE = re.compile(r"""(?:\]\(|src=")(?:more/)?([^)"/]+\.(?:png|txt))""")  # .txt: painters and titles of a sheet
OF_OTHERS = ("style_row.png", "demo.png")  # shown by the README and docs/
OF_DEMO = ("demo.png", "style_truth.png", "lora_grid.png", "lora_compare.png")  # of the demo alone
STAGES = ("classifier", "mlp", "test", "autoencoder", "contrastive", "contrastive_1", "conditional", "clusters")
STAGES += ("clusters_1", "judge", "style", "style_backbone", "repaint", "embed", "embed_224", "benchmark", "bases")
WEIGHTS = ("classifier.pt", "autoencoder.pt", "style.pt", "head_tf_efficientnet_lite0.pt")  # which the numbers describe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder (runs/demo)")
    parser.add_argument("--publish", action="store_true", help="copy facts and figures to report/, write the documents")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the committed documents are out of date")
    options = parser.parse_args()
    if options.check:
        for line in changed_code(read_facts(REPORT).get("code", {})):
            print(f"build.py: {line}", file=sys.stderr)
        outdated = [path.name for path, text in documents(read_facts(REPORT)).items() if path.read_text() != text]
        sys.exit(f"build.py: out of date: {', '.join(outdated)}; run make report" if outdated else 0)

    facts = read_facts(options.run)
    for script in ("train", "test"):
        if script not in facts:
            sys.exit(f"build.py: {options.run} has no facts of {script}.py yet: run it first")
    text = fill(REPORT / ("template.md" if options.publish else "run.md"), facts)
    figures = find_figures(text, OF_OTHERS if options.publish else (), options.run)
    if options.publish:
        publish(options.run, facts, figures)
        print(f"renewed: {REPORT / 'README.md'}, {README}")
    else:
        path = options.run / "report.md"
        write_text(path, text)
        print(f"test accuracy {facts['test']['accuracy']:.1%}; the report is {path}, its figures are beside it")


def read_facts(folder: Path) -> dict:
    """A run's facts, with those of the runs in its folders under the folders' names."""
    path = folder / "facts.json"
    if not path.exists():
        sys.exit(f"build.py: no {path}: run make first, or give another --run")
    parts = {part.parent.name: json.loads(part.read_text()) for part in sorted(folder.glob("*/facts.json"))}
    return parts | json.loads(path.read_text())


def fill(template: Path, facts: dict) -> str:
    """The template's text with every placeholder replaced; exits naming the facts that are missing."""
    missing = []

    def value(match):
        try:
            return format(look_up(facts, match[1]), match[2] or "")
        except (LookupError, TypeError):  # TypeError: it was measured, but not reached
            missing.append(match[1])
            return ""

    text = PLACEHOLDER.sub(value, template.read_text())
    if missing:
        sys.exit(f"build.py: {template.name} needs facts that the run does not have: {', '.join(sorted(set(missing)))}")
    return text


def look_up(facts: dict, name: str):
    """The fact "test.accuracy", for example. Raises LookupError."""
    for part in name.split("."):
        facts = facts[part] if isinstance(facts, dict) else {}[part]
    return facts


def find_figures(text: str, others: tuple, run: Path) -> dict[str, Path]:
    """The files of the run that a report shows, and `others`, by their names; exits if one is missing."""
    names = (*FIGURE.findall(text), *others)
    figures = {}
    for name in names:
        folder = run / ("demo" if name in OF_DEMO else "")
        path = folder / "more" / name  # first, for it may also lie at the top of a run folder that is older
        path = path if path.exists() else folder / name
        if not path.exists():
            sys.exit(f"build.py: the report shows {name}, which {run} does not have")
        figures[name] = path
    return figures


def documents(facts: dict, weights: Path = REPORT) -> dict[Path, str]:
    """The committed documents as the committed templates, these facts and the weights in a folder make them."""
    sizes = {Path(name).stem: (weights / name).stat().st_size / 1e6 for name in WEIGHTS}
    sizes["tiny_base"] = sum(path.stat().st_size for path in (REPORT / "tiny_base").rglob("*") if path.is_file()) / 1e6
    facts = facts | {"megabytes": sizes, "seconds_per_picture": {}}
    for name, fact in (("classifier", "test.images_per_cpu_second"), ("head", "head.test.images_per_cpu_second")):
        with suppress(LookupError):  # a missing fact is named by fill
            facts["seconds_per_picture"][name] = 1 / look_up(facts, fact)
    results, report = (fill(REPORT / name, facts) for name in ("results.md", "template.md"))
    check_checkpoints(facts, weights)
    readme = RESULTS.sub(lambda marks: marks[1] + results + marks[2], README.read_text())
    return {REPORT / "README.md": report, README: readme}


def check_checkpoints(facts: dict, weights: Path) -> None:
    """Exit where facts are of other networks than those in the folder."""
    names = {"test.checkpoint": WEIGHTS[0], "style_transfer.classifier": WEIGHTS[0], "head.test.checkpoint": WEIGHTS[3]}
    rows = ("", "adain.", "wct.", "magenta.", "fewer.", "validation.", "autoencoder.")
    names |= {f"style_transfer.{row}checkpoint": WEIGHTS[2] for row in rows}
    for fact, name in names.items():
        try:
            used = look_up(facts, fact)
        except LookupError:
            sys.exit(f"build.py: no fact {fact}: run make report")
        if not hashlib.sha256((weights / name).read_bytes()).hexdigest().startswith(used):
            sys.exit(f"build.py: {fact} is of another network than {weights / name}: run make report")


def code_of(run: Path) -> dict[str, dict[str, str]]:
    """{stage: {name: hash}}: the code that made each stage of a run, as its stamps have it (common/stamp.py)."""
    stages = {str(path.relative_to(run)).replace("stamps/", ""): path for path in sorted(run.rglob("stamps/*"))}
    return {
        stage: dict(re.findall(r"^(\S+) ([0-9a-f]{12})$", path.read_text(), re.M)) for stage, path in stages.items()
    }


def changed_code(stages: dict[str, dict[str, str]]) -> list[str]:
    """A line for each script or definition that has changed since it made results, and for stages without a stamp.

    Their results may be older than the code.
    """
    made_by = {}
    for stage, hashes in stages.items():
        for name, hashed in hashes.items():
            if hashed != current_hash(name):
                made_by.setdefault(name, []).append(stage)
    lines = [f"{name} has changed since it made the results of {', '.join(made_by[name])}" for name in sorted(made_by)]
    unknown = [stage for stage in STAGES if stage not in stages]
    return lines + [f"it is not known which code made the results of {', '.join(unknown)}"] * bool(unknown)


def publish(run: Path, facts: dict, figures: dict[str, Path]) -> None:
    facts = facts | {"code": code_of(run)}
    texts = documents(facts, run)  # first: a missing fact ends the program before anything is overwritten
    for name, path in figures.items():
        copy(path, REPORT / name)
    write_text(REPORT / "facts.json", json.dumps(facts, indent=2) + "\n")
    for name in WEIGHTS:
        copy(run / name, REPORT / name)
    base = run / "demo/tiny_base"  # of lora.py
    for path in filter(Path.is_file, base.glob("knows-*/**/*")):
        copy(path, REPORT / "tiny_base" / path.relative_to(base))
    for path, text in texts.items():
        write_text(path, text)


def copy(source: Path, target: Path) -> None:
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"build.py: {error}")
