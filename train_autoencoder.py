"""Train an autoencoder, which encodes each painting in a short code and reconstructs it.

    python train_autoencoder.py                                     # settings from config.json
    python train_autoencoder.py -c settings/cpu.json --code 64      # a shorter code, on a machine without a GPU
    python train_autoencoder.py --contrastive-weight 0.15 --run runs/demo/contrastive    # a source of cluster.py
    python train_autoencoder.py --conditional --run runs/demo/conditional    # styles have embeddings: style_transfer.py
    torchrun --nproc-per-node=2 -- train_autoencoder.py             # several GPUs: the same result, sooner

The epoch with the lowest error on validation paintings is kept. Baselines are PCA with as many components as the code
has numbers, the network's own linear path, each painting's mean colour, and the mean painting. A training that was
interrupted resumes after its last finished epoch when the same command is run again; --restart starts anew. Writes into
the run folder: autoencoder.pt (autoencoder.partial.pt until training has finished), autoencoder.jsonl with one line per
epoch, reconstructions.png and more/autoencoder_curves.png (every few epochs) and facts.json.
"""

import copy
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from common import figures
from common.config import Setting, configure
from common.crops import batch_crop, random_crops, views
from common.errors import UserError
from common.layers import parameter_count
from common.losses import ReconstructionLoss
from common.metrics import psnr
from common.names import count
from common.optim import Optimizers
from common.reconstruction import mean_squared_error, plot_reconstructions
from common.run import (
    Steps,
    Timer,
    add_facts,
    autocast,
    claim,
    data_parallel,
    finish,
    fit_batch_size,
    fixed_settings,
    half_precision,
    interruptible,
    join_processes,
    leave_processes,
    local_share,
    pick_device,
    rank,
    resume,
    reuse_freed_memory,
    run_script,
    save_epoch,
    sum_over_processes,
    world_size,
)
from wikiart import WikiArt, channel_statistics, make_model

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "validation", "processes", "hide", "restart")
SHARED += ("tensorboard", "compile")
SETTINGS = {
    "crop": Setting(int, "[16, inf)", "side of the images that are encoded, in pixels; a multiple of 16"),
    "code": Setting(int, "[1, inf)", "numbers in the code of a painting"),
    "width": Setting(int, "[1, inf)", "channels at the finest scale"),
    "epochs": Setting(int, "[1, inf)", "passes over the training set, at most"),
    "batch_size": Setting(int, "[2, inf)", "images per step, over all processes"),
    "lr": Setting(float, "(0, inf)", "peak learning rate of AdamW; Muon's is ten times as high"),
    "min_crop_area": Setting(float, "(0, 1]", "area of the smallest training crop, as a fraction of the image"),
    "contrastive_weight": Setting(float, "[0, inf)", "weight of the contrastive loss; 0: off"),
    "conditional": Setting(bool, None, "add a trained embedding of the style to the code before it is decoded"),
}
CONTRASTIVE_MIN_AREA = 0.1  # of the smallest second crop of the contrastive loss, as a fraction of the image
PATIENCE = 20  # epochs without a lower validation error after which training ends
PCA_IMAGES = 5000  # training paintings that PCA is fitted to, at most
PROJECTION_DIM = 128  # of the contrastive loss
BASELINES = ("pca", "linear", "mean_colour", "mean_image")  # as facts.json names them
LINEAR = "the linear path alone"


def main(argv=None):
    config = configure("train_autoencoder", __doc__, SETTINGS, SHARED, argv)
    device = join_processes(pick_device(config.device))
    reuse_freed_memory()
    lock = claim(config.run, "autoencoder") if rank() == 0 else None

    # Data
    data_settings = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    data = WikiArt(config.data, "train", processes=config.processes, **data_settings)
    test = WikiArt(config.data, "test", classes=data.classes, processes=config.processes, **data_settings)
    training, validation = data.split_off(config.validation, config.split_seed)
    check_settings(config, training, validation)
    training.move_to(device)

    # Model, loss and optimizers
    model, arguments = new_model(config, training, device)
    criterion = ReconstructionLoss(model, config.contrastive_weight, float(np.mean(np.square(arguments["std"]))))
    steps = config.epochs * (len(training) // config.batch_size)
    optimizers = Optimizers(model, config.lr, weight_decay=0.0, steps=steps)
    state = {"model": "Autoencoder", "arguments": arguments, "classes": data.classes, "data": data_settings}
    state |= {"crop": config.crop, "config": fixed_settings(config), "fingerprint": data.fingerprint, "history": []}
    parts = {"model": model, "optimizers": optimizers}
    state = resume(config, "autoencoder", state, parts)
    if rank() == 0:
        print(f"Autoencoder: {parameter_count(model) / 1e6:.2f} million parameters on {device}")
        baselines = fit_baselines(config, training, model)
        baseline_mse = {
            label: mean_error(function, validation, config, device) for label, function in baselines.items()
        }

    # Train, evaluate, save
    parallel = data_parallel(criterion, config.compile)
    with interruptible(state):
        for epoch in remaining_epochs(state["history"], config.epochs):
            timer = Timer()
            record = train_epoch(parallel, training, optimizers, epoch, config, device) | timer.seconds()
            if rank() == 0:
                val_mse = mean_error(reconstruction(model, config, data.classes), validation, config, device)
                record |= {"val_mse": val_mse, "val_psnr": psnr(val_mse)}
                if all(val_mse < earlier["val_mse"] for earlier in state["history"]):
                    state |= {"epoch": epoch, "weights": copy.deepcopy(model).cpu().state_dict()}
                scores = f"loss {record['mse']:.4f}, validation {record['val_psnr']:.2f} dB"
                save_epoch(config, "autoencoder", state, {"epoch": epoch} | record, parts, scores)
                if epoch < 3 or epoch % 5 == 0:
                    plot(model, state, validation, baselines, baseline_mse, config, device, f"after epoch {epoch}")
    if rank() == 0:
        model.load_state_dict(half_precision(state["weights"]))  # as they are saved
        plot(model, state, test, baselines, baseline_mse, config, device, "of test paintings")
        report(model, state, training, validation, test, baselines, config, device)
        path = finish(config.run, "autoencoder", state)
        lock.close()
        print(f"{path}: epoch {state['epoch']} kept, the best on {count(len(validation), 'validation painting')}")
    leave_processes()


# Settings and model ---------------------------------------------------------------------------------------------------


def check_settings(config, training: WikiArt, validation: WikiArt) -> None:
    """Raise UserError for settings that do not fit together; lower --batch-size where there are few paintings."""
    fit_batch_size(config, len(training), validation)
    if config.crop % 16:
        raise UserError(f"--crop {config.crop} must be a multiple of 16")


def new_model(config, training: WikiArt, device):
    """An Autoencoder with the weights of --seed on the device, and its constructor arguments.

    Its linear path starts as PCA of whole images and random crops, which generalises better than that of whole images.
    """
    mean, std = channel_statistics(training)
    arguments = {"crop": config.crop, "code": config.code, "width": config.width, "mean": mean, "std": std}
    arguments["projection_dim"] = PROJECTION_DIM if config.contrastive_weight else 0
    arguments["styles"] = len(training.classes) if config.conditional else 0
    torch.manual_seed(config.seed)
    model = make_model("Autoencoder", arguments)
    model.start_as_pca(pca_batches(config, training, crops=3))
    return model.to(device, memory_format=torch.channels_last), arguments


def pca_batches(config, data: WikiArt, crops: int):
    """Yield images for PCA, float (B, 3, crop, crop): whole ones, random crops, and the mirror images of both."""
    chosen = torch.arange(len(data))[:: -(-len(data) // PCA_IMAGES)]
    for items in chosen.split(config.batch_size):
        pixels, _ = data.batch(items, torch.device("cpu"))
        yield from views(pixels, config.crop)
        for _ in range(crops):
            images = batch_crop(pixels, config.crop, torch.rand(5), config.min_crop_area)
            yield from (images, images.flip(3))


def fit_baselines(config, training: WikiArt, model) -> dict:
    """The BASELINES, {label: function(images, labels)}; each takes and returns float (B, 3, crop, crop)."""
    rows = torch.cat([images.flatten(1) for images in pca_batches(config, training, crops=0)]).numpy()
    pca = PCA(min(config.code, *rows.shape), svd_solver="randomized", random_state=config.seed).fit(rows)
    mean_image = torch.from_numpy(pca.mean_).view(3, config.crop, config.crop)

    def from_components(images, _):
        pixels = pca.inverse_transform(pca.transform(images.cpu().flatten(1).numpy()))
        return torch.from_numpy(pixels).view(images.shape).to(images)

    return {
        f"PCA, {pca.n_components_} numbers": from_components,
        LINEAR: lambda images, _: model.reconstruct_linearly(images),
        "own mean colour": lambda images, _: images.mean((2, 3), keepdim=True).expand_as(images),
        "the mean painting": lambda images, _: mean_image.to(images).expand_as(images),
    }


# Training and evaluation ----------------------------------------------------------------------------------------------


def train_epoch(criterion, data: WikiArt, optimizers, epoch: int, config, device) -> dict:
    """One pass over the training set; returns mean squared error and PSNR on its crops."""
    criterion.train()
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # for each epoch, so that a resumed training draws the same
    count = len(data) // config.batch_size
    batches = torch.randperm(len(data))[: count * config.batch_size].split(config.batch_size)
    batches = [batch[local_share()] for batch in batches]
    steps, errors = Steps(data.batches(batches, device), count, epoch, config.epochs), []
    for _, pixels, labels in steps:
        random, second_random = torch.rand(5), torch.rand(7, config.batch_size)[:, local_share()]
        crops = [batch_crop(pixels, config.crop, random, config.min_crop_area)]
        if config.contrastive_weight:
            crops.append(random_crops(pixels, config.crop, second_random, CONTRASTIVE_MIN_AREA))
        crops = [images.contiguous(memory_format=torch.channels_last) for images in crops]
        styles = F.one_hot(labels, len(data.classes)).float() if config.conditional else None
        with autocast(device, cpu=True):
            loss, mse = criterion(*crops, styles=styles)
        steps.record(loss)
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        errors.append(mse.detach())
    mse = sum_over_processes(torch.stack(errors).cpu().double().mean()).item() / world_size()
    return {"mse": mse, "psnr": psnr(mse)}


def reconstruction(model, config, classes: list[str]):
    """The model in evaluation mode, as a function of images and labels."""
    model.eval()
    if config.conditional:
        return lambda images, labels: model(images, F.one_hot(labels, len(classes)).float())
    return lambda images, _: model(images)


def mean_error(reconstruct, data: WikiArt, config, device) -> float:
    """Mean squared error of reconstructions of a data set's whole images."""
    return mean_squared_error(reconstruct, data, config.crop, config.batch_size, device)


def remaining_epochs(history: list[dict], epochs: int):
    """Yield the epochs after those of the history, until the lowest validation error was PATIENCE epochs ago."""
    for epoch in range(len(history) + 1, epochs + 1):
        best = min(history, key=lambda record: record["val_mse"], default={"epoch": 0})["epoch"]
        stop = rank() == 0 and epoch - best > PATIENCE  # only the first process has the whole history
        if sum_over_processes(torch.tensor([int(stop)])):
            return
        yield epoch


# Report ---------------------------------------------------------------------------------------------------------------


def plot(model, state: dict, data: WikiArt, baselines: dict, baseline_mse: dict, config, device, caption: str) -> None:
    """Write more/autoencoder_curves.png, with the baselines' validation errors, and reconstructions.png."""
    pca = next(iter(baselines))
    errors = {label: error for label, error in baseline_mse.items() if label != LINEAR}  # its line would hide PCA's
    panels = {
        "mean squared error": {"training crops": "mse", "validation": "val_mse"},
        "PSNR, dB": {"training crops": "psnr", "validation": "val_psnr"},
    }
    lines = {"mean squared error": errors, "PSNR, dB": {pca: psnr(baseline_mse[pca])}}  # others are far below
    path = Path(config.run) / "more" / "autoencoder_curves.png"
    figures.curves(path, state["history"], panels, state["epoch"], lines, logarithmic=("mean squared error",))

    rows = {f"from {config.code} numbers": reconstruction(model, config, data.classes), pca: baselines[pca]}
    path = Path(config.run) / "reconstructions.png"
    plot_reconstructions(path, rows, data, config.hide, config.crop, device, f"Reconstructions {caption}")


def report(model, state: dict, training, validation, test, baselines: dict, config, device) -> None:
    """Evaluate the model and the baselines on test paintings; print the scores and write facts.json."""
    history, best = state["history"], state["history"][state["epoch"] - 1]
    mse = mean_error(reconstruction(model, config, test.classes), test, config, device)
    scores = {label: psnr(mean_error(function, test, config, device)) for label, function in baselines.items()}
    facts = {
        "epochs": len(history),
        "epoch_kept": state["epoch"],
        "parameters": parameter_count(model),
        "training_images": len(training),
        "validation_images": len(validation),
        "test_images": len(test),
        "val_mse": best["val_mse"],
        "val_psnr": best["val_psnr"],
        "mse": mse,
        "psnr": psnr(mse),
        "cpu_minutes": sum(record["cpu_seconds"] for record in history) / 60,
        "minutes": sum(record["seconds"] for record in history) / 60,
        **{key: getattr(config, key) for key in ("crop", "batch_size", "seed", "code", "contrastive_weight")},
        **{f"{name}_psnr": score for name, score in zip(BASELINES, scores.values(), strict=True)},
    }
    facts["gain_over_pca"] = facts["psnr"] - facts["pca_psnr"]
    add_facts(config.run, "train_autoencoder", facts, outdated=("cluster",))
    print(f"test paintings: {facts['psnr']:.2f} dB")
    print(*(f"{label}: {score:.2f} dB" for label, score in scores.items()), sep=", ")


if __name__ == "__main__":
    run_script(main)
