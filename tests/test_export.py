"""export.py: files that predict what Classifier.predict does, and say how to prepare an image."""

import json
import sys

import pytest
import torch

import export
import wikiart
from common.errors import UserError
from common.run import load_checkpoint, save_checkpoint

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",), "torch-export": ()}


@pytest.mark.parametrize("to", export.FORMATS)
@pytest.mark.parametrize("model", ["classifier.pt", "mlp/classifier.pt"])
def test_a_file_predicts_what_the_classifier_does_and_describes_itself(trained, demo, tmp_path, capsys, to, model):
    for package in NEEDED[to]:
        pytest.importorskip(package, reason="an extra: pip install -r requirements/export.txt")
    checkpoint, target = load_checkpoint(trained / model), tmp_path / f"styles{export.ENDINGS[to]}"
    if model == "classifier.pt":  # the views of the default settings, and a temperature that shows
        checkpoint |= {"tta_scales": [1.0, 1.5, 0.7, 0.5], "temperature": 0.4}
    save_checkpoint(tmp_path / "classifier.pt", checkpoint)
    export.main([str(tmp_path / "classifier.pt"), str(target), "--to", to])
    assert f"{target}: 8 classes" in capsys.readouterr().out
    classifier = wikiart.Classifier.load(tmp_path / "classifier.pt", "cpu")
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    images = torch.stack([data[item][0] for item in range(32)])
    predict, described = export.FORMATS[to][1](target)
    graph, bf16 = export.Graph(classifier).eval(), 0.02  # what Classifier.predict differs by at most, where it takes it
    with torch.no_grad():
        torch.testing.assert_close(predict(images), graph(images), atol=1e-4, rtol=0)
        torch.testing.assert_close(predict(images[:1]), graph(images[:1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(predict(images), classifier.predict(images), atol=bf16, rtol=0)
    assert json.loads(described["classes"]) == classifier.classes
    assert (described["size"], described["resize"]) == ("32", "squash")


def test_a_head_is_exported_with_what_rebuilds_it(trained, tmp_path):
    """With another network in place of its backbone's weights."""
    pytest.importorskip("safetensors")
    checkpoint = load_checkpoint(trained / "classifier.pt") | {"backbone": "a", "backbone_weights": "b 1"}
    save_checkpoint(tmp_path / "head.pt", checkpoint)
    export.main([str(tmp_path / "head.pt"), str(tmp_path / "head.safetensors"), "--to", "safetensors"])
    _, described = export.from_safetensors(tmp_path / "head.safetensors")
    assert (described["backbone"], described["backbone_weights"]) == ('"a"', '"b 1"')


def test_a_file_that_predicts_something_else_is_not_kept(trained, tmp_path, monkeypatch):
    def wrong(path):
        return lambda images: torch.zeros(3, 8), {}

    monkeypatch.setitem(export.FORMATS, "safetensors", (export.to_safetensors, wrong))
    with pytest.raises(UserError, match="is not written: its probabilities differ"):
        export.main([str(trained / "classifier.pt"), str(tmp_path / "a.safetensors"), "--to", "safetensors"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"), [([], "give a checkpoint"), (["nowhere/a.pt"], "no checkpoint"), (["a", "b", "c"], "give a")]
)
def test_a_mistake_gets_one_clear_line(words, message):
    with pytest.raises(UserError, match=message):
        export.main(words)


def test_without_the_extra_there_is_one_clear_line(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"needs .*: pip install -r requirements/export\.txt"):
        export.main([str(trained / "classifier.pt"), str(tmp_path / "a.safetensors"), "--to", "safetensors"])
    assert not list(tmp_path.iterdir())
