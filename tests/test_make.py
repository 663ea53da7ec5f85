"""The pipeline: what is up to date is not made again, what is outdated is. Python is a stub that records its calls."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from common import stamp

STUB = f"""#!/bin/bash
case $1 in
  -m) exec {sys.executable} "$@";;  # common.stamp is run
  -c) [[ $2 == *accelerator* ]] && exit 1  # there is none
    echo "$2" >> calls; exit;;
esac
echo "$@" >> calls
while [ $# -gt 0 ]; do
  case $1 in --run) run=$2;; --name|--method|--split) name=$2;; --shrink) shrunk=_$2;; --backbone) backbone=$2;; esac
  script=${{script:-$1}}; shift
done
case $script in
  train.py) mkdir -p $run; touch $run/facts.json; echo "$run" > $run/classifier.pt;;
  test.py) touch $run/report.txt;;
  train_autoencoder.py) mkdir -p $run; touch $run/autoencoder.pt;;
  train_style.py) mkdir -p $run; touch $run/style.pt;;
  style_transfer.py) mkdir -p $run/more; touch $run/${{name:+more/}}style_grid${{name:+_$name}}.png;;
  embed.py) case $backbone$shrunk in tf_efficientnet_lite0) backbone=tf_efficientnet_lite2;; esac
    touch $run/embed_${{backbone:-convnext}}$shrunk.pt;;
  tune.py) mkdir -p $run/$name/none; cd $run/$name
    echo $name | tee none/{{facts.json,report.txt,classifier.pt}} > ../$name.md;;
  lora.py) touch $run/lora_grid.png $run/lora_compare.png;;
  benchmark.py) touch $run/benchmark.md;;
  cluster.py) touch $run/clusters.md;;
  demo.py) mkdir -p data/demo/train/Dots data/demo/train/Facets; touch data/demo/{{metadata.csv,demo.png}};;
esac
"""
REPAINT = 3 * ["style_transfer.py"]
STAGES = [
    *["train.py", "train.py", "test.py", "train_autoencoder.py", "train_autoencoder.py", "cluster.py"],
    *["train_style.py", "train.py", *REPAINT],
]
BUILD = "report/build.py"
BASES = "from common.tiny_diffusion import train_bases; train_bases"


@pytest.fixture
def project(tmp_path):
    for name in (*(path.name for path in ROOT.glob("*.py")), "config.json", "requirements.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("common", "serve", "settings", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "report").mkdir()
    for name in ("ablation.json", "settings.json", "report.mk"):
        shutil.copy(ROOT / "report" / name, tmp_path / "report")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text(STUB)
    (tmp_path / "venv/bin/python").chmod(0o755)
    for name in ("ready", "ready-embed", "ready-label", "ready-lora", "ready-magenta"):
        (tmp_path / "venv" / name).touch()
    (tmp_path / "paintings/train/A").mkdir(parents=True)
    (tmp_path / "others/train/A").mkdir(parents=True)
    return tmp_path


def make(project, *arguments):
    """Run make; returns the scripts that it ran, in order, and the whole output."""
    (project / "calls").unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    options = {"cwd": project, "capture_output": True, "text": True, "env": environment, "check": False}
    process = subprocess.run(["make", "VENV=venv", *arguments], **options)
    scripts = [call.split()[0] for call in calls(project)] if process.returncode == 0 else []
    return scripts, process.stdout + process.stderr


def calls(project, script="") -> list[str]:
    """The command lines of the last make, all of them or those of one script."""
    path = project / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(script)]


def set_default(project, section, key, value):
    path = project / "config.json"
    config = json.loads(path.read_text())
    config[section][key] = value
    path.write_text(json.dumps(config))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_demo_runs_every_stage_once(project):
    scripts, output = make(project)
    assert scripts == ["demo.py", *STAGES, BUILD]
    assert "no GPU here, so settings/cpu.json overrides config.json" in output
    contrastive = [call for call in calls(project, "train_autoencoder.py") if "--contrastive-weight 0.15" in call]
    assert len(contrastive) == 1 and contrastive[0].count("--run runs/demo/contrastive") == 1
    for stage in ("classifier", "autoencoder", "style", "test", "clusters", "repaint"):
        assert "seed = 0" in (project / "runs/demo/stamps" / stage).read_text(), stage  # shared settings count, too
    assert make(project)[0] == [BUILD]


def test_changed_folders_settings_and_code_are_noticed(project):
    everything = [*STAGES, BUILD]
    arguments = (f"WIKIART={project}/paintings",)
    assert make(project, *arguments)[0] == everything
    assert make(project, *arguments)[0] == [BUILD]
    (project / "paintings/train/B").mkdir()
    assert make(project, *arguments)[0] == everything
    (project / "paintings/train/B/new.png").touch()
    assert make(project, *arguments)[0] == everything
    (project / "paintings/train/B/new.png").write_text("another picture")
    assert make(project, *arguments)[0] == everything
    (project / "paintings/metadata.csv").touch()
    assert make(project, *arguments)[0] == everything
    edit(project / "test.py", "MISTAKES = 12", "MISTAKES = 13")
    assert make(project, *arguments)[0] == ["test.py", BUILD]
    edit(project / "common/layers.py", "bias=False", "bias=True")
    assert make(project, *arguments)[0] == everything
    assert make(project, f"WIKIART={project}/others")[0] == everything  # a run folder of its own
    assert make(project, *arguments)[0] == [BUILD]


def test_what_changes_no_result_trains_nothing(project):
    make(project)
    set_default(project, "label", "port", 7861)
    assert make(project)[0] == [BUILD]
    for name in ("train.py", "wikiart.py", "common/layers.py", "common/painter.py", "common/baselines.py"):
        path = project / name
        text = path.read_text()
        docstring = text.index('"""', 3)
        path.write_text(f"{text[:docstring]}One more sentence.\n{text[docstring:]}\n\n# a comment\n")
    edit(project / "train.py", '"passes over the training set"', '"a new help text"')
    assert make(project)[0] == [BUILD]
    with open(project / "common/figures.py", "a") as file:
        file.write('\nCOLOUR = "#123456"\n')
    assert make(project)[0] == ["test.py", "cluster.py", *REPAINT, BUILD]  # the figures are drawn again
    with open(project / "common/repaint.py", "a") as file:
        file.write("\nSMALLEST = 48\n")
    assert make(project)[0] == [*REPAINT, BUILD]
    assert make(project)[0] == [BUILD]


def test_a_changed_learning_rate_trains_the_classifier_and_what_depends_on_it(project):
    make(project)
    set_default(project, "train", "lr", 0.001)
    dependent = ["train.py", "test.py", "cluster.py", "train_style.py", "train.py", *REPAINT, BUILD]
    assert make(project)[0] == dependent  # not the baseline, which has a learning rate of its own
    assert [call for call in calls(project, "train.py") if "mlp" in call] == []
    assert make(project)[0] == [BUILD]
    set_default(project, "train_autoencoder", "lr", 0.001)
    autoencoders = 2 * ["train_autoencoder.py"]
    assert make(project)[0] == [*autoencoders, "cluster.py", BUILD]


LEFT_OUT = {
    "config": "the values of settings are in the stamp",
    "errors": "it has the types of errors only",
    "figures": "the Makefile has it as a prerequisite of what is drawn",
    "files": "how a file is written does not change what is in it",
    "packages": "it says what is not installed",
    "stamp": "it computes no result",
}


def test_what_the_stamps_leave_out():
    assert set(stamp.LEFT_OUT) == set(LEFT_OUT)
    run = stamp.module("common.run")
    assert all(name in run.definitions for name in stamp.OF_RUN)


def test_all_that_common_run_computes_with_is_in_the_stamps_of_trainings():
    hashes = stamp.code_hashes("train.py")
    assert {f"common.run.{name}" for name in ("autocast", "fit_batch_size", "MIN_STEPS", "world_size")} <= set(hashes)
    assert not {"common.run.claim", "common.run.save_checkpoint"} & set(hashes)


def test_a_definition_brings_what_it_uses_however_that_is_defined(tmp_path, monkeypatch):
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    (tmp_path / "common").mkdir()
    (tmp_path / "common/a.py").write_text(
        "import os\nfrom common.b import late as early\nA, B = 1, 2\nC = D = 4\nE: int = 5\nE += 1\n"
        "try:\n    def f(x=A):\n        return early.g(x)\nexcept OSError:\n    f = None\n"
        "for number in (1, 2):\n    H = number\nos.nice(0)\nUNUSED = 3\n"
        "if __name__ == '__main__':\n    print(UNUSED)\n"
    )
    (tmp_path / "common/b.py").write_text("from common.c import K\nlate = K\ndef other():\n    return late\n")
    (tmp_path / "common/c.py").write_text("K = 1\n")
    stamp.module.cache_clear(), stamp.code_hashes.cache_clear()
    (tmp_path / "s.py").write_text("from common import a\nprint(a.f, a.D, a.H, a.E)\n")
    try:
        found = set(stamp.code_hashes("s.py"))
        assert found == {
            "s.py",
            *(f"common.{name}" for name in ("a.f", "a.A", "a.D", "a.H", "a.number", "a.E", "a.", "b.late", "c.K")),
        }
        assert stamp.code_hashes("common.a.B").keys() == {"common.a.B", "common.a."}
    finally:
        stamp.module.cache_clear(), stamp.code_hashes.cache_clear()


def test_imports_are_of_the_kind_that_stamps_follow():
    for path in (*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.names[0].name != "*", path
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names} - {"common.packages"}
                assert not [name for name in names if name.startswith(("common", "wikiart"))], path


def test_only_code_that_a_stage_uses_repeats_it(project):
    make(project)
    with open(project / "common/metrics.py", "a") as file:
        file.write("\n\ndef unused():\n    return 1\n")
    assert make(project)[0] == [BUILD]
    edit(project / "common/metrics.py", "0.299, 0.587", "0.3, 0.587")  # layout() is in the losses of the style model
    assert make(project)[0] == ["train_style.py", *REPAINT, BUILD]
    assert "cluster.kmeans" not in stamp.code_hashes("cluster.make_encoder")  # which is in the key of cached codes
    edit(project / "common/descriptors.py", "EPSILON = ", "EPSILON = 2 * ")
    assert make(project)[0] == ["cluster.py", BUILD]
    edit(project / "common/run.py", "else contextlib.nullcontext()", "else contextlib.ExitStack()")  # autocast
    assert make(project)[0] == [*STAGES, BUILD]


def test_other_measures_of_reconstructions_train_the_autoencoders(project):
    make(project)
    edit(project / "common/reconstruction.py", "clamp(0, 1)", "clamp(0, 2)")
    assert make(project)[0] == [*2 * ["train_autoencoder.py"], "cluster.py", BUILD]
    assert make(project)[0] == [BUILD]


def test_a_changed_demo_is_drawn_again(project):
    make(project)
    set_default(project, "demo", "picture", 64)
    assert make(project)[0] == ["demo.py", *STAGES, BUILD]


def test_an_interrupted_training_resumes_unless_it_is_outdated(project):
    make(project)
    partial = project / "runs/demo/classifier.partial.pt"
    for lr, restarts in ((0.001, False), (0.003, True)):
        (project / "runs/demo/classifier.pt").unlink()
        partial.touch()
        time.sleep(0.05)  # a file system's clock ticks every few milliseconds
        if restarts:
            set_default(project, "train", "lr", lr)
        make(project)
        of_classifier = [call for call in calls(project, "train.py") if "mlp" not in call and "judge" not in call]
        assert ["--restart" in call for call in of_classifier] == [restarts]
        assert "--resume" not in of_classifier[0]


def test_a_clock_that_was_set_back(project):
    """What was made before lies in the future: nothing is made again but what has changed."""
    arguments = (f"WIKIART={project}/paintings",)
    make(project, *arguments)
    for path in (project / "runs").rglob("*"):
        os.utime(path, (path.stat().st_mtime + 1e6, path.stat().st_mtime + 1e6))
    set_default(project, "train", "lr", 0.001)
    scripts, output = make(project, *arguments)
    assert scripts == ["train.py", "test.py", "cluster.py", "train_style.py", "train.py", *REPAINT, BUILD]
    assert output.count("the clock was set back") == 1 and "skew" not in output
    assert make(project, *arguments)[0] == [BUILD]


def test_a_full_disk_leaves_the_list_of_paintings(project, monkeypatch):
    """It would count as changed, and everything would be trained again."""
    arguments = (f"WIKIART={project}/paintings",)
    make(project, *arguments)
    (project / "sort").write_text("#!/bin/bash\necho sort: write failed: No space left on device >&2; exit 2\n")
    (project / "sort").chmod(0o755)
    path = project / "runs/paintings/paintings.txt"
    before = path.read_text()
    monkeypatch.setenv("PATH", f"{project}:{os.environ['PATH']}")
    assert "No space left" in make(project, *arguments)[1]
    assert path.read_text() == before
    monkeypatch.undo()
    assert make(project, *arguments)[0] == [BUILD]


def test_wrong_settings_give_one_clear_line(project):
    make(project)
    (project / "settings/cpu.json").write_text('{"train": {"lrate": 1}}')
    assert "stamp: settings/cpu.json sets train.lrate, which config.json does not have" in make(project)[1]


def test_lora_comes_with_the_judge_and_only_on_demand(project):
    assert make(project, "lora")[0] == ["demo.py", "lora.py", "train.py", "train.py", "lora.py"]
    of_lora = calls(project, "lora.py")
    assert [call.split()[1] for call in of_lora] == ["train", "grid"]
    assert all("-c settings/tiny.json" in call for call in of_lora)
    assert make(project, "lora")[0] == []
    for flags in ("--per-style", "-c settings/tiny.json --prompts 'a town'"):
        assert make(project, "lora", f"LORA={flags}")[0] == ["lora.py", "lora.py"]
        assert flags.replace("'", "") in "\n".join(calls(project))
        assert make(project, "lora", f"LORA={flags}")[0] == []
    stopped = project / "runs/demo/lora_Dots.partial.pt"
    for flags, resumed in (("-c settings/tiny.json --prompts 'a town'", True), ("--per-style", False)):
        stopped.touch()
        time.sleep(0.05)
        (project / "runs/demo/lora/trained").unlink()
        make(project, "lora", f"LORA={flags}")
        assert ("--restart" in calls(project, "lora.py train")[0]) != resumed
    make(project, "lora", f"WIKIART={project}/paintings", "LORA=--style Cubism")
    assert "--style Cubism" in "\n".join(calls(project))
    assert "tiny.json" not in "\n".join(calls(project))


def test_ci_fails_without_a_browser_instead_of_skipping_its_tests(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    for name, status in (("make", 0), ("python3", 0), ("curl", 0), ("apt-get", 1)):
        (tmp_path / name).write_text(f"#!/bin/bash\necho {name} $@ >> {tmp_path}/calls\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    command = [shutil.which("bash"), ROOT / ".ci/run"]
    assert subprocess.run(command, env={"PATH": str(tmp_path)}, check=False).returncode != 0
    assert "make test" not in (tmp_path / "calls").read_text()
    (tmp_path / "chromium").symlink_to(tmp_path / "curl")
    assert subprocess.run(command, env={"PATH": str(tmp_path)}, check=False).returncode == 0
    assert "make test" in (tmp_path / "calls").read_text()


def test_a_folder_is_labelled_without_a_run(project):
    assert make(project, "label", "FOLDER=my pictures")[0] == ["label.py"]
    assert calls(project) == ["label.py my pictures --run runs/demo"]
    assert make(project, "label", "FOLDER=others", "OUT=others.csv")[0][-1:] == ["label.py"]
    assert calls(project)[-1] == "label.py others --run runs/demo --out others.csv"
    assert "give FOLDER=my_folder" in make(project, "label")[1]


def test_spaces_in_paths_get_one_clear_line(project):
    assert "paths without spaces" in make(project, "WIKIART=/a b")[1]


@pytest.mark.parametrize("before", ["all", "embed"])
def test_a_report_after_other_stages_has_the_codes_and_judges_that_it_speaks_of(project, before):
    paintings = f"WIKIART={project}/paintings"
    make(project, before, paintings)
    scripts, _ = make(project, "report", paintings)
    assert scripts[:2] == ["embed.py", "embed.py"]
    of_paintings = [call for call in calls(project) if "/demo" not in call and "data/demo" not in call]
    scripts = [call.split()[0] for call in of_paintings]
    other = [call for call in of_paintings if "/clusters_1" in call]
    assert [call.split()[0] for call in other] == ["train_autoencoder.py", "cluster.py"]
    assert all(call.endswith("--seed 1") for call in other)
    assert "/clusters_1/contrastive --contrastive-weight 0.15" in other[0]
    assert scripts.count("cluster.py") == 2
    assert scripts.count("style_transfer.py") == 3 + 5  # of the pipeline, and rows
    scored = [call for call in of_paintings if call.startswith("style_transfer.py")]
    (validation,) = [call for call in scored if "--split validation" in call]
    assert validation.endswith("--judges judge")  # the second one has seen these paintings
    assert all("embed_tf_efficientnet_lite2_224.pt" in call for call in scored)


def test_the_style_models_to_compare_with_have_a_classifier_beside_them(project):
    make(project, "report", f"WIKIART={project}/paintings", "LITES=0.pth 1.pth 2.pth")
    (backbone,) = (call for call in calls(project, "train_style.py") if "style_backbone" in call)
    assert "--features tf_efficientnet_lite0 --weights 0.pth" in backbone
    assert (project / "runs/paintings/style_backbone/classifier.pt").exists()
    (scored,) = (call for call in calls(project, "style_transfer.py") if "--name backbone" in call)
    assert "--checkpoint runs/paintings/style_backbone/style.pt" in scored
    (conditional,) = (call for call in calls(project, "train_autoencoder.py") if "--conditional" in call)
    assert "--run runs/paintings/conditional" in conditional
    judge = [call for call in calls(project, "embed.py") if "--shrink 224" in call]
    assert len(judge) == 1 and "--backbone tf_efficientnet_lite2 --weights 2.pth" in judge[0]


def test_a_benchmark_makes_nothing_out_of_date(project):
    make(project)
    assert make(project, "benchmark")[0] == ["benchmark.py"]
    assert make(project)[0] == [BUILD]


def test_the_report_is_only_published_from_real_paintings(project):
    assert "give WIKIART=" in make(project, "report")[1]
    wanted = ("report", f"WIKIART={project}/paintings")
    scripts, _ = make(project, *wanted)
    rows = ["train_autoencoder.py", "style_transfer.py", "train_style.py", *4 * ["style_transfer.py"]]
    rest = [*STAGES, BUILD, *5 * ["tune.py"], "train_autoencoder.py", "cluster.py", "test.py", *rows]
    demo = ["demo.py", *STAGES, BUILD, *2 * ["train.py"], *3 * ["lora.py"], "tune.py"]
    assert scripts == ["embed.py", "embed.py", *rest, "from", *demo, "benchmark.py", BUILD]
    assert calls(project, "from") == [f'{BASES}("runs/paintings/demo/tiny_base")']
    (unknown,) = [call for call in calls(project, "tune.py") if "/demo " in f"{call} " and "--name unknown" in call]
    assert unknown.startswith('tune.py {"holdout": ["Dots", "Facets"]}') and "--epochs" not in unknown
    assert (project / "runs/paintings/demo/lora_grid.png").exists()
    of_paintings = [call for call in calls(project, "test.py") if "demo" not in call]
    assert all("-c report/settings.json" in call for call in of_paintings)  # what no figure of the report shows
    assert (project / "runs/paintings/demo/stamps/test").read_text().count("report/hide.txt") == 0
    bases = (project / "runs/paintings/stamps/bases").read_text()  # which report/build.py reads
    assert "common.painter.Scene " in bases
    assert "demo.py " in (project / "runs/paintings/demo/stamps/demo").read_text()
    for row, made in (
        ("seeds/0", "runs/paintings"),
        ("balance/logit", "runs/paintings"),
        ("ablation_0/no_balance", "balance"),
    ):
        assert (project / "runs/paintings" / row / "classifier.pt").read_text() == f"{made}\n"  # not trained again
    (project / "common/figures.py").touch()  # drawn again, not trained again
    assert not [script for script in make(project, *wanted)[0] if script.startswith("train")]
    old = project / "runs/paintings/seeds/1/classifier.pt"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.touch()
    assert make(project, *wanted)[0] == 3 * [BUILD]  # the run's, the demo's, and the published one
    assert old.exists()
    (project / "paintings/train/B").mkdir()  # other paintings: the comparisons' trainings are out of date too
    assert make(project, *wanted)[0].count("tune.py") == 5
    assert not old.exists()
