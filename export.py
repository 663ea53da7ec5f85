"""Export a classifier, with its preprocessing and class names, for programs that do not have this project.

    python export.py report/classifier.pt --to onnx                # report/classifier.onnx, for ONNX Runtime and others
    python export.py report/classifier.pt --to torch-export        # report/classifier.pt2, for torch.export.load
    python export.py report/classifier.pt --to safetensors         # the weights, and how to build the network for them
    python export.py classifier.pt my/styles.onnx --run runs/wikiart    # a checkpoint of a run, to a file of that name

ONNX and torch.export files hold the whole prediction as a graph: uint8 RGB images (N, 3, size, size) to calibrated
probabilities (N, classes), for any N; crops, normalisation, the average over views and the temperature are inside. All
files have metadata: the classes, how an image becomes a square of `size` pixels (`resize`: squash, or crop its centre),
and what the input and output are. The new file is checked against the network before it is kept. Needs
requirements/export.txt.
"""

import io
import json
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
import torch
from torch import nn

from common.config import Setting, configure
from common.crops import predict_probabilities
from common.errors import UserError
from common.metrics import calibrate
from common.run import atomic_write, checkpoint_path, load_checkpoint, pick_device, run_script
from wikiart import Classifier

SHARED = ("run",)
SETTINGS = {"to": Setting(str, ("onnx", "safetensors", "torch-export"), "format of the file")}
ENDINGS = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2"}
TOLERANCE = 1e-4  # of a probability
METADATA = "metadata.json"  # in a file of torch.export
REBUILD = ("model", "arguments", "data", "crop", "tta_scales", "temperature", "classes")
REBUILD += ("backbone", "backbone_weights")


def main(argv=None):
    config = configure("export", __doc__, SETTINGS, SHARED, argv, words=True)
    words = config.words
    if len(words) not in (1, 2):
        raise UserError("give a checkpoint, and a file if you like: python export.py report/classifier.pt --to onnx")
    path = checkpoint_path(config.run, words[0])
    classifier = Classifier.load(path, pick_device("cpu"))
    target = Path((words[1:] or [path.with_suffix(ENDINGS[config.to])])[0])
    write, read = FORMATS[config.to]
    images = torch.randint(256, (3, 3, classifier.size, classifier.size), dtype=torch.uint8)
    print(f"{config.to} of {path}: this may take minutes", flush=True)
    with atomic_write(target) as temporary:
        try:
            write(classifier, path, temporary)
            predict, _ = read(temporary)
        except ImportError as error:
            raise UserError(f"--to {config.to} needs {error.name}: pip install -r requirements/export.txt") from None
        with torch.no_grad():  # in float32, as the file computes: Classifier.predict takes bf16 where that is faster
            difference = (predict(images) - Graph(classifier).eval()(images)).abs().max().item()
        if not difference < TOLERANCE:
            raise UserError(f"{target} is not written: its probabilities differ by {difference:.2g} from ours")
    print(f"{target}: {len(classifier.classes)} classes, probabilities within {difference:.0e} of the network's")


class Graph(nn.Module):
    """A classifier's prediction: images uint8 (N, 3, size, size) to calibrated probabilities, float (N, classes)."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.model, self.crop, self.scales = classifier.model, classifier.crop, tuple(classifier.tta_scales)
        self.temperature = classifier.temperature

    def forward(self, images):
        return calibrate(predict_probabilities(self.model, images, self.crop, self.scales), self.temperature)


def metadata(classifier: Classifier) -> dict[str, str]:
    """What a user of the file needs to know, as text."""
    return {
        "classes": json.dumps(classifier.classes),
        "target": classifier.target,
        "size": str(classifier.size),
        "resize": classifier.resize,
        "input": "uint8 RGB images (N, 3, size, size)",
        "output": "calibrated probabilities of the classes, float32 (N, classes)",
    }


def graph_arguments(classifier: Classifier) -> dict:
    """The arguments of torch.export.export and torch.onnx.export; the number of images is free."""
    example = torch.zeros(2, 3, classifier.size, classifier.size, dtype=torch.uint8)
    return {"args": (example,), "dynamic_shapes": ({0: torch.export.Dim("images", min=1, max=65535)},)}


# The formats ----------------------------------------------------------------------------------------------------------


def to_onnx(classifier: Classifier, _, target: Path) -> None:
    names = {"input_names": ["images"], "output_names": ["probabilities"]}
    options = graph_arguments(classifier) | names | {"dynamo": True, "verbose": False}
    program = torch.onnx.export(Graph(classifier).eval(), **options)
    program.model.metadata_props.update(metadata(classifier))
    program.save(target)


def from_onnx(path: Path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    predict = lambda images: torch.from_numpy(session.run(None, {"images": np.asarray(images)})[0])  # noqa: E731
    return predict, session.get_modelmeta().custom_metadata_map


def to_program(classifier: Classifier, _, target: Path) -> None:
    program = torch.export.export(Graph(classifier).eval(), **graph_arguments(classifier))
    content = io.BytesIO()  # on a full disk, torch's own writing would abort the process
    torch.export.save(program, content, extra_files={METADATA: json.dumps(metadata(classifier))})
    target.write_bytes(content.getbuffer())


def from_program(path: Path):
    extra = {METADATA: ""}
    return torch.export.load(path, extra_files=extra).module(), json.loads(extra[METADATA])


def to_safetensors(classifier: Classifier, path: Path, target: Path) -> None:
    from safetensors.torch import save

    checkpoint = load_checkpoint(path)
    weights = {name: value.contiguous() for name, value in checkpoint["weights"].items()}
    rebuild = {key: json.dumps(checkpoint[key]) for key in REBUILD if key in checkpoint}
    target.write_bytes(save(weights, metadata(classifier) | rebuild))


def from_safetensors(path: Path):
    """This format has no graph: the network is built by this project, or by another program from its metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        described, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    checkpoint = {key: json.loads(described[key]) for key in REBUILD if key in described}
    graph = Graph(Classifier(checkpoint | {"weights": weights}, torch.device("cpu"))).eval()
    return torch.no_grad()(graph), described


FORMATS = {  # functions that write a file, and that read one and return (predict, metadata)
    "onnx": (to_onnx, from_onnx),
    "torch-export": (to_program, from_program),
    "safetensors": (to_safetensors, from_safetensors),
}


if __name__ == "__main__":
    run_script(main)
