"""Count what the full WikiArt needs on one GPU, for docs/gpu.md: memory, disk and hours of each command.

    python report/count_gpu.py            # writes the table into docs/gpu.md
    python report/count_gpu.py --check    # exits with 1 if that table is out of date

Nothing is measured on a GPU. Operations are those of one training step with the settings of config.json, counted by
torch on its meta device, which has shapes but no numbers; so are the bytes that a step keeps for its backward pass.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

REPORT = Path(__file__).resolve().parent
ROOT = REPORT.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train_autoencoder  # noqa: E402
import train_style  # noqa: E402
from common.config import read_settings  # noqa: E402
from common.crops import predict_probabilities  # noqa: E402
from common.layers import parameter_count  # noqa: E402
from common.losses import FeatureMaps, ReconstructionLoss  # noqa: E402
from common.optim import Optimizers  # noqa: E402
from common.run import run_script, write_text  # noqa: E402
from train import CNN_SETTINGS  # noqa: E402
from wikiart import make_model  # noqa: E402

PAGE, COUNTED = ROOT / "docs/gpu.md", re.compile(r"(<!-- counted: .*? -->\n).*?(<!-- end of counted -->)", re.DOTALL)
WIKIART = 81_444  # paintings
GPU_TFLOPS, GPU_SHARE = 312.0, 0.15  # assumed: bf16 peak of an A100, and the share of it that training reaches
STYLES, ARTISTS_AND_GENRES = 27, 1119 + 11  # of WikiArt
TRAIN = round(0.8 * WIKIART)  # a fifth is for testing
BANDWIDTH = 1.5e12  # assumed: bytes per second that the kernels move in the GPU's memory; an A100's peak is 2.0e12
PASSES = 4  # over each byte kept: written and read in the forward pass, read and its gradient written in the backward
LINK = 20e9  # assumed: bytes per second from the host to the GPU
SIDE = 512  # of the downloaded paintings, the shorter one
BITS_PER_PIXEL, ASPECT = 2.5, 4 / 3  # assumed: of JPEGs of paintings
META = torch.device("meta")


class Paintings:
    """Stands for a data set of all styles, of which networks only ask for the classes and the mean colour."""

    classes, rows = list(range(STYLES)), np.arange(1)
    pixels = np.full((1, 3, 2, 2), 127, np.uint8)

    def __len__(self):
        return 1


def settings(script: str, *files: str) -> SimpleNamespace:
    """All settings of a script, with the shared ones."""
    sections = read_settings([str(ROOT / file) for file in files])
    return SimpleNamespace(**sections | sections[script])


def count(step) -> tuple[float, float]:
    """Operations of step(), and the bytes that it keeps in float32 for backward passes."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # referred to, so that no later one has the same address
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, saved:
        step()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def classifier_step(config, model: str):
    """A training step of train.py, without the optimizer of a network of torchvision; and its network."""
    arguments = {"classes": STYLES, "mean": [0.5] * 3, "std": [0.25] * 3}
    if model == "CNN":
        arguments |= {key: getattr(config, key) for key in CNN_SETTINGS}
        arguments["aux_classes"] = ARTISTS_AND_GENRES
    elif model == "MLP":
        arguments |= {"width": config.width, "crop": config.crop}
    network = make_model(model, arguments).to(META)
    optimizers = Optimizers(network, config.lr, config.weight_decay, 100)

    def step():
        network(torch.zeros(config.batch_size, 3, config.crop, config.crop, device=META)).sum().backward()
        optimizers.step()

    return step, network


def autoencoder_step(config):
    arguments = {"crop": config.crop, "code": config.code, "width": config.width}
    arguments["projection_dim"] = train_autoencoder.PROJECTION_DIM if config.contrastive_weight else 0
    network = make_model("Autoencoder", arguments).to(META)
    criterion = ReconstructionLoss(network, config.contrastive_weight, 0.06)
    optimizers = Optimizers(network, config.lr, 0.0, 100)
    crops = [torch.zeros(config.batch_size, 3, config.crop, config.crop, device=META)] * (
        2 if config.contrastive_weight else 1
    )

    def step():
        criterion(*crops)[0].backward()
        optimizers.step()

    return step, network


def style_step(config):
    classifier = classifier_step(settings("train"), "CNN")[1]
    images = torch.zeros(config.batch_size, 3, config.crop, config.crop, device=META)
    features, labels = FeatureMaps(classifier, images), torch.arange(config.batch_size, device=META) % STYLES
    _, parts = train_style.new_networks(features, Paintings(), 100, config, META)
    picks, random = torch.rand(config.batch_size, train_style.CANDIDATES), [0.75, 0.5, 0.5]

    def step():
        train_style.train_step(parts, features, images, images, labels, labels, picks, random)

    return step, torch.nn.ModuleList([parts["model"], parts["averaged"], parts["critic"], classifier])


def training(command: str, config, step, network, images_per_epoch: float) -> dict:
    """The row of a training: operations, GPU memory in GB, hours."""
    operations, kept = count(step)
    steps = config.epochs * (images_per_epoch // config.batch_size)
    weights = 4 * 5 * parameter_count(network)  # weights, their average, gradients, two moments
    hours = max(operations / (GPU_TFLOPS * 1e12 * GPU_SHARE), PASSES * kept / 2 / BANDWIDTH) * steps / 3600  # bf16
    pixels = TRAIN * (1 - config.validation) * 3 * config.size**2
    row = {"command": command, "operations": operations * steps, "hours": hours, "size": config.size}
    return row | {"memory": (pixels + weights + kept) / 1e9}


def forward(command: str, config) -> dict:
    """The row of test.py: the views of all test paintings."""
    network = classifier_step(config, "CNN")[1].eval()
    batch = torch.zeros(64, 3, config.size, config.size, dtype=torch.uint8, device=META)
    operations, _ = count(lambda: predict_probabilities(network, batch, config.crop, config.tta_scales))
    operations *= (WIKIART - TRAIN) / 64
    hours = operations / (GPU_TFLOPS * 1e12 * GPU_SHARE) / 3600
    return {"command": command, "operations": operations, "memory": 0, "hours": hours, "size": config.size}


def trainings() -> list[dict]:
    """The rows that use the GPU, in the order in which a user types them."""
    paths, inner = "--data /scratch/wikiart --run runs/wikiart", TRAIN * (1 - settings("train").validation)
    cnn, mlp, judge = (
        settings("train"),
        settings("train", "settings/mlp.json"),
        settings("train", "settings/judge.json"),
    )
    plain, contrastive, style = settings("train_autoencoder"), settings("train_autoencoder"), settings("train_style")
    contrastive.contrastive_weight = 0.15
    return [
        training(f"train.py {paths}", cnn, *classifier_step(cnn, cnn.model), inner),
        training(f"train.py -c settings/mlp.json {paths}/mlp", mlp, *classifier_step(mlp, mlp.model), inner),
        forward(f"test.py {paths}", cnn),
        training(f"train_autoencoder.py {paths}", plain, *autoencoder_step(plain), inner),
        training(
            f"train_autoencoder.py {paths}/contrastive --contrastive-weight 0.15",
            *(contrastive, *autoencoder_step(contrastive), inner),
        ),
        training(f"train_style.py {paths}", style, *style_step(style), STYLES * style.per_class),
        training(f"train.py -c settings/judge.json {paths}/judge", judge, *classifier_step(judge, judge.model), inner),
    ]


def table(rows: list[dict]) -> str:
    """The table of docs/gpu.md, in Markdown."""
    jpegs = WIKIART * SIDE**2 * ASPECT * BITS_PER_PIXEL / 8 / 1e9
    lines = ["| command | operations | GPU memory | disk | hours |", "|---|---|---|---|---|"]
    lines.append(f"| `python download.py --data /scratch/wikiart --size {SIDE}` | | | {jpegs:.0f} GB | the network's |")
    cached = set()
    for row in rows:
        disk = f"{WIKIART * 3 * row['size'] ** 2 / 1e9:.0f} GB, the cached pixels" if row["size"] not in cached else ""
        cached.add(row["size"])
        memory = f"{row['memory']:.0f} GB" if row["memory"] else "as above"
        cells = [f"`python {row['command']}`", f"{row['operations']:.1e}", memory, disk, f"{row['hours']:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    for command in ("cluster.py --codes all", "style_transfer.py"):
        lines.append(f"| `python {command} --data /scratch/wikiart --run runs/wikiart` | not counted | | | |")
    return "\n".join([*lines, "| `python report/build.py --run runs/wikiart` | none | | | |"])


def summary(rows: list[dict], config) -> str:
    """The sentences below the table."""
    facts = json.loads((REPORT / "facts.json").read_text())["benchmark"]
    each, megapixels, total = facts["cache_ours"], facts["megapixels"], sum(row["hours"] for row in rows)
    pixels = TRAIN * (1 - config.validation) * 3 * config.size**2
    return f"""
Together {total:.1f} hours of the GPU. Decoding the {WIKIART:,} paintings once takes {each * WIKIART / 60_000:.0f}
CPU-minutes, which all cores share: {each:.1f} ms each, measured on a CPU with JPEGs of {megapixels} megapixels.

The {pixels / 1e9:.0f} GB of training pixels stay on a GPU with twice as much free memory. On a smaller one they are
sent batch by batch, {pixels / LINK:.1f} s an epoch at an assumed {LINK / 1e9:.0f} GB/s, while it computes.
"""


def counted() -> str:
    """What stands between the marks of docs/gpu.md."""
    rows, config = trainings(), settings("train")
    return table(rows) + "\n" + summary(rows, config)


def main() -> None:
    page = PAGE.read_text()
    text = COUNTED.sub(lambda marks: marks[1] + counted() + marks[2], page)
    if "--check" in sys.argv[1:]:
        sys.exit("count_gpu.py: docs/gpu.md is out of date: run python report/count_gpu.py" if text != page else 0)
    write_text(PAGE, text)
    print(f"renewed: {PAGE}")


if __name__ == "__main__":
    run_script(main)
