"""The pipeline: what is up to date is not done again, what is stale is. Python is a stub that notes its calls."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

STUB = """#!/bin/bash
echo "$@" >> calls
while [ $# -gt 0 ]; do
  case $1 in --run) run=$2;; --name|--method) name=$2;; --model) model=style;; --shrink) small=_64;;
    --backbone) backbone=$2;; esac
  script=${script:-$1}; shift
done
case $script in
  train.py) mkdir -p $run; touch $run/classifier.pt;;
  test.py) touch $run/report.txt;;
  train_autoencoder.py) mkdir -p $run; touch $run/${model:-autoencoder}.pt;;
  style_transfer.py) touch $run/style_grid${name:+_$name}.png;;
  embed.py) case $backbone$small in tf_efficientnet_lite0) backbone=tf_efficientnet_lite2;; esac
    touch $run/embed_${backbone:-convnext}$small.pt;;
  tune.py) touch $run/$name.md;;
  lora.py) touch $run/lora_grid.png;;
  benchmark.py) touch $run/benchmark.md;;
  cluster.py) touch $run/clusters.md;;
  demo.py) mkdir -p data/demo; touch data/demo/metadata.csv;;
  -c) exit 1;;  # no accelerator
esac
"""


STAGES = ["train.py", "train.py", "test.py", "train_autoencoder.py", "train_autoencoder.py", "cluster.py",
          "train_autoencoder.py", "train.py", *3 * ["style_transfer.py"]]  # fmt: skip


@pytest.fixture
def project(tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.json"), *ROOT.glob("requirements*.txt"), ROOT / "Makefile"):
        shutil.copy(path, tmp_path)
    (tmp_path / "report").mkdir()
    shutil.copy(ROOT / "report/ablation.json", tmp_path / "report")
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
    done = subprocess.run(["make", "VENV=venv", *arguments], cwd=project, capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip
    calls = [line.split() for line in (project / "calls").read_text().splitlines()] if done.returncode == 0 else []
    return [call[0] for call in calls if call[0] != "-c"], done.stdout + done.stderr


def test_the_demo_runs_every_stage_once(project):
    ran, said = make(project)
    assert ran == ["demo.py", *STAGES, "report/build.py"]
    assert "no GPU here, so cpu.json is laid over config.json" in said
    assert make(project)[0] == ["report/build.py"]


def test_changed_folders_settings_and_code_are_noticed(project):
    everything = [*STAGES, "report/build.py"]
    arguments = (f"WIKIART={project}/paintings",)
    assert make(project, *arguments)[0] == everything
    assert make(project, *arguments)[0] == ["report/build.py"]
    (project / "paintings/train/B").mkdir()
    assert make(project, *arguments)[0] == everything
    (project / "paintings/train/B/new.png").touch()
    assert make(project, *arguments)[0] == everything
    (project / "test.py").touch()
    assert make(project, *arguments)[0] == ["test.py", "report/build.py"]
    assert make(project, f"WIKIART={project}/others")[0] == everything  # a run folder of its own
    assert make(project, *arguments)[0] == ["report/build.py"]


def test_a_stopped_training_goes_on(project):
    make(project)
    (project / "runs/demo/classifier.partial.pt").touch()
    (project / "train.py").touch()
    make(project)
    trainings = [line for line in (project / "calls").read_text().splitlines() if line.startswith("train.py")]
    assert ["--resume" in line for line in trainings] == [True, False, False]


def test_lora_comes_with_the_judge_and_only_on_demand(project):
    assert make(project, "lora")[0] == ["demo.py", "lora.py", "train.py", "lora.py"]
    calls = [line for line in (project / "calls").read_text().splitlines() if line.startswith("lora.py")]
    assert [call.split()[1] for call in calls] == ["train", "grid"]
    assert all("-c tiny.json" in call for call in calls)
    assert make(project, "lora")[0] == []
    for flags in ("--per-style", "-c tiny.json --prompts 'a town'"):
        assert make(project, "lora", f"LORA={flags}")[0] == ["lora.py", "lora.py"]
        assert flags.replace("'", "") in (project / "calls").read_text()
        assert make(project, "lora", f"LORA={flags}")[0] == []
    stopped = project / "runs/demo/lora_Dots.partial.pt"
    for flags, resumed in (("-c tiny.json --prompts 'a town'", True), ("--per-style", False)):
        stopped.touch()
        (project / "runs/demo/lora/trained").unlink()
        make(project, "lora", f"LORA={flags}")
        assert ("--resume" in (project / "calls").read_text()) == resumed
    make(project, "lora", f"WIKIART={project}/paintings", "LORA=--styles Cubism")
    assert "--styles Cubism" in (project / "calls").read_text()
    assert "tiny.json" not in (project / "calls").read_text()


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


def test_spaces_in_paths_get_one_clear_line(project):
    assert "paths without spaces" in make(project, "WIKIART=/a b")[1]


@pytest.mark.parametrize("before", ["all", "embed"])
def test_a_report_after_other_stages_has_the_codes_and_judges_that_it_speaks_of(project, before):
    paintings = f"WIKIART={project}/paintings"
    make(project, before, paintings)
    ran, _ = make(project, "report", paintings)
    assert ran[:2] == ["embed.py", "embed.py"]
    calls = (project / "calls").read_text().splitlines()
    own = [line.split()[0] for line in calls if "/demo" not in line and "data/demo" not in line]
    assert own.count("cluster.py") == 1
    assert own.count("style_transfer.py") == 3 + 8 + 1
    scored = [line for line in calls if line.startswith("style_transfer.py") and "/demo" not in line]
    assert all("embed_tf_efficientnet_lite0_64.pt" in line for line in scored)


def test_a_benchmark_makes_nothing_out_of_date(project):
    make(project)
    assert make(project, "benchmark")[0] == ["benchmark.py"]
    assert make(project)[0] == ["report/build.py"]


def test_the_report_is_only_published_from_real_paintings(project):
    assert "give WIKIART=" in make(project, "report")[1]
    wanted = ("report", f"WIKIART={project}/paintings")
    ran, _ = make(project, *wanted)
    variants = 8 * ["train_autoencoder.py", "style_transfer.py"]
    rest = [*STAGES, "report/build.py", *3 * ["tune.py"], *variants, "style_transfer.py"]
    demo = ["demo.py", *STAGES, "report/build.py", "lora.py", "lora.py"]
    assert ran == ["embed.py", "embed.py", *rest, *demo, "label.py", "benchmark.py", "report/build.py"]
    assert (project / "runs/paintings/demo/lora_grid.png").exists()
    (project / "figures.py").touch()  # drawn again, not trained again
    assert not {"train.py", "train_autoencoder.py"} & set(make(project, *wanted)[0])
    old = project / "runs/paintings/seeds/0/classifier.pt"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.touch()
    assert make(project, *wanted)[0] == ["report/build.py"] * 3  # the run's, the demo's, and the published one
    assert old.exists()
    (project / "paintings/train/B").mkdir()  # other paintings: the comparisons' trainings are out of date too
    assert make(project, *wanted)[0].count("tune.py") == 3
    assert not old.exists()
