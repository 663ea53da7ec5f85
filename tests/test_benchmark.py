"""The measures run, on tiny sizes, and say what they should; how fast anything is, no test asks."""

import json
import math
import os
from functools import partial

import pytest
from conftest import clear_line, script

import benchmark
from common import benchmarks
from common.config import configure
from common.errors import UserError
from wikiart import WikiArt, make_model

TINY = {
    "size": 32,
    "validation": 0.3,
    "train": {"width": 8, "depth": 1, "crop": 32, "batch_size": 16, "per_class": 12},
    "benchmark": {"turns": 1},
}
TINY_CONSTANTS = {
    "IMAGES": 48,
    "SIDE": 32,
    "BACKBONE": "test_efficientnet",
    "BACKBONE_SIDE": 64,
    "WIDTH": 180,
    "HEIGHT": 120,
    "BATCH_SIZE": 16,
    "MEMORY_IMAGES": 200,
    "FEW": 40,
    "MANY": 200,
    "EPOCHS": 1,
}
QUICK = ["batches", "batches_jitter", "memory", "cache", "extraction", "growth"]


@pytest.fixture(scope="module", autouse=True)
def _tiny_constants():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY_CONSTANTS.items():
            patch.setattr(benchmark, name, value)
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return ["-c", str(path)]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """A run folder with what takes no training."""
    run = tmp_path_factory.mktemp("benchmark")
    benchmark.main([*flags, "--run", str(run), "--measures", *QUICK])
    return run


@pytest.fixture
def bench(flags, demo, tmp_path):
    """What a single measure needs."""
    argv = [*flags, "--data", str(demo), "--run", str(tmp_path)]
    config = configure("benchmark", "", benchmark.SETTINGS, benchmark.SHARED, argv)
    return benchmark.Bench(config, tmp_path)


def facts_of(run):
    return json.loads((run / "facts.json").read_text())["benchmark"]


def test_every_measure_gives_a_number_and_a_row(run):
    facts = facts_of(run)
    lines = (run / "benchmark.md").read_text().splitlines()
    assert len(lines) == 2 + len(QUICK)
    for name in QUICK:
        for key in (name, f"{name}_ours", f"{name}_theirs"):
            assert math.isfinite(facts[key])
            assert facts[key] > 0
        assert facts.get(f"{name}_low", 0) <= facts.get(f"{name}_high", 0)
        assert any(benchmark.MEASURES[name].ours in line for line in lines)
    assert not list(run.glob(".benchmark.*/"))  # the images are gone


def test_figures_of_other_measures_are_kept(run, flags, monkeypatch):
    before = facts_of(run)
    monkeypatch.setattr(benchmark, "IMAGES", 8)
    benchmark.main([*flags, "--run", str(run), "--measures", "cache"])
    after = facts_of(run)
    changed = {key for key in before if before[key] != after[key]}
    assert "cache_ours" in changed
    assert all(key.startswith("cache") for key in changed)
    assert len((run / "benchmark.md").read_text().splitlines()) == 2 + len(QUICK)


def test_facts_measured_under_other_conditions_are_not_kept(tmp_path):
    benchmark.merge_facts(tmp_path, {"cache": 1.5}, turns=5)
    assert benchmark.merge_facts(tmp_path, {"memory": 0.5}, turns=5)["cache"] == 1.5
    facts = benchmark.merge_facts(tmp_path, {"memory": 0.5}, turns=1)
    assert "cache" not in facts
    assert facts["turns"] == 1


def test_memory_is_below_that_of_a_list_of_float_images(tmp_path):
    root = benchmarks.write_images(tmp_path / "many", 1200, 48, 48, seed=0)
    assert len(benchmark.open_cached(root)) == 1200  # decoded before
    floats = 1200 * 3 * 64**2 * 4 / 1e6
    paths = [str(path) for path in root.rglob("*.jpg")]
    assert 0.95 * floats < benchmarks.peak_memory(benchmarks.load_as_floats, paths, 64) < 1.5 * floats
    assert benchmarks.peak_memory(epoch, root) < floats / 2


def epoch(root):
    benchmark.cached_epoch(WikiArt(root, size=64, processes=1), benchmark.common_crop, unmap=True)


def test_peak_memory_is_that_of_a_process_of_its_own():
    before = benchmarks.memory_now("VmRSS")
    assert benchmarks.peak_memory(ones, 200) == pytest.approx(200, abs=15)
    assert benchmarks.memory_now("VmRSS") - before < 40
    with pytest.raises(UserError, match="leave memory out of --measures"):
        benchmarks.peak_memory(os._exit, 1)  # as the kernel ends one that is too large


def ones(megabytes):
    assert len(b"1" * (megabytes * 1_000_000))  # let go at once: the peak counts


def test_cpu_time_counts_children():
    before = benchmarks.cpu_time()
    benchmarks.call(["-c", "import time\nwhile time.process_time() < 0.3: pass"])
    assert benchmarks.cpu_time() - before >= 0.3


def test_the_time_until_resnet18_is_reached(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "train_reference", lambda *_: [(0.1, 30.0), (0.0, 100.0)])
    facts = benchmark.resnet18_time(bench)
    assert 0 < facts["resnet18_time"] == pytest.approx(30 / (facts["resnet18_time_ours"] * 60))
    assert 0 <= facts["resnet18_our_balanced_accuracy"] <= 1
    benchmark.merge_facts(tmp_path, facts, 1)
    monkeypatch.setattr(benchmarks, "train_reference", lambda *_: [(1.1, 100.0)])
    monkeypatch.setattr(benchmark, "train_cnn", lambda *_: [{"cpu_seconds": 1.0, "val_balanced_accuracy": 0.5}])
    facts = benchmark.merge_facts(tmp_path, benchmark.resnet18_time(bench), 1)
    assert facts["resnet18_time"] is None  # the old one is not left
    assert facts["resnet18_our_balanced_accuracy"] == 0.5


def test_resnet18_trains(demo):
    parts = WikiArt(demo, "train", size=32, processes=1).split_off(0.3, 0)
    model = make_model("resnet18", {"classes": 8, "mean": [0.5] * 3, "std": [0.25] * 3})
    records = benchmarks.train_reference(model, *parts, crop=32, batch_size=16, epochs=2)
    assert all(0 <= accuracy <= 1 for accuracy, _ in records)
    assert 0 < records[0][1] < records[1][1]


def test_labelling(bench):
    assert math.isfinite(benchmark.labelling(bench)["labelling"])


@pytest.mark.parametrize(
    ("flags", "message"), [(["--measures"], "no measure given"), (["--turns", "0"], "turns is 0, but must be in")]
)
def test_a_mistake_is_explained(flags, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(flags)


def test_an_unknown_measure_gets_one_clear_line():
    line = clear_line(script("benchmark.py", "--measures", "batches", "speed"))
    assert "no measure speed: give some of batches," in line


def test_a_failing_script_is_named(bench):
    bench.config.data = "nowhere"
    with pytest.raises(UserError, match="train.py: no folder"):
        benchmark.train_cnn(bench, bench.scratch / "cnn")


def test_functions_take_turns():
    calls = []
    functions = {name: partial(calls.append, name) for name in "ab"}
    spent = benchmarks.in_turns(2, functions)
    assert calls == list("ab" * 3)  # the first round warms up
    assert [len(seconds) for seconds in spent.values()] == [2, 2]


def test_a_measure_that_did_not_reach_resnet18_has_no_row(tmp_path, monkeypatch):
    results = {
        "memory": {"memory": 0.005, "memory_ours": 1.0, "memory_theirs": 200.0},
        "resnet18_time": {"resnet18_time": None, "resnet18_time_theirs": 9.0},
    }
    for name, facts in results.items():
        replaced = benchmark.MEASURES[name]._replace(function=lambda bench, facts=facts: facts)
        monkeypatch.setitem(benchmark.MEASURES, name, replaced)
    benchmark.main(["--measures", *results, "--run", str(tmp_path)])
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    assert lines[2:] == ["| memory for batches | list of float images | 0.0050 |  | 1 | 200 | MB |"]
