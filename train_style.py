"""Train an autoencoder whose decoder is conditioned on style, for style_transfer.py.

    python train_style.py                                      # settings from config.json
    python train_style.py -c settings/cpu.json --epochs 5      # smaller settings for a machine without a GPU
    torchrun --nproc-per-node=2 -- train_style.py              # several GPUs: the same result

Starts from the autoencoder of train_autoencoder.py; the classifier of train.py provides the losses for the target
style. The last epoch is kept. A training that was interrupted resumes after its last finished epoch when the same
command is run again; --restart starts anew. Writes into the run folder: style.pt (style.partial.pt until training has
finished), style.jsonl with one line per epoch, style_curves.png, repaintings.png and facts.json.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import figures
from common.config import Setting, configure
from common.crops import batch_crop, views
from common.errors import UserError
from common.layers import parameter_count
from common.losses import StyleLoss
from common.metrics import psnr
from common.names import display_name
from common.optim import Optimizers
from common.reconstruction import items_to_show, mean_squared_error, plot_reconstructions, whole_images
from common.run import (
    Timer,
    add_facts,
    autocast,
    check_batch_size,
    check_finite,
    checkpoint_path,
    claim,
    data_parallel,
    finish,
    fixed_settings,
    half_precision,
    interruptible,
    join_processes,
    leave_processes,
    load_checkpoint,
    local_share,
    pick_device,
    rank,
    resume,
    reuse_freed_memory,
    run_script,
    save_epoch,
    sum_over_processes,
)
from wikiart import WikiArt, build_model, make_model

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "validation", "processes", "hide", "restart")
SETTINGS = {
    "start": Setting(str, None, "the autoencoder to start from: a file of the run folder, or a path"),
    "features": Setting(str, None, "the classifier that the losses use, a CNN: a file of the run folder, or a path"),
    "epochs": Setting(int, "[1, inf)", "passes over the training set"),
    "batch_size": Setting(int, "[2, inf)", "images per step, over all processes"),
    "lr": Setting(float, "(0, inf)", "peak learning rate of AdamW; Muon's is ten times as high"),
    "embed": Setting(str, ("learned", "means"), "style embeddings: learned, or from the classifier's mean features"),
    "condition": Setting(
        str, ("change", "style"), "what the decoder is conditioned on: target minus source style, or the target alone"
    ),
    "style_ce_weight": Setting(float, "[0, inf)", "weight of the classifier's cross-entropy for the target style"),
    "style_stat_weight": Setting(float, "[0, inf)", "weight of the statistics of feature maps"),
    "critic_weight": Setting(float, "[0, inf)", "weight of the critic of feature maps and pixels"),
    "layout_weight": Setting(float, "[0, inf)", "weight of keeping the coarse luminance"),
    "adversary_weight": Setting(float, "[0, inf)", "weight of the adversary that predicts the source style from codes"),
}
EMBEDDING = 64  # dimensions of a style embedding
MIN_CROP_AREA = 0.5  # of training crops, as a fraction of the image


def main(argv=None):
    config = configure("train_style", __doc__, SETTINGS, SHARED, argv)
    device = join_processes(pick_device(config.device))
    reuse_freed_memory()
    lock = claim(config.run, "style") if rank() == 0 else None

    # Data
    data_settings = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    data = WikiArt(config.data, "train", processes=config.processes, **data_settings)
    test = WikiArt(config.data, "test", classes=data.classes, processes=config.processes, **data_settings)
    training, validation = data.split_off(config.validation, config.split_seed)
    check_batch_size(config.batch_size, training, validation)
    training.move_to(device)

    # Model, loss and optimizers
    criterion, arguments = new_model_and_loss(config, training, device)
    model = criterion.to(device, memory_format=torch.channels_last).model
    optimizers = Optimizers(criterion, config.lr, 0.0, config.epochs * (len(training) // config.batch_size))
    state = {
        "model": "StyleAutoencoder",
        "arguments": arguments,
        "classes": data.classes,
        "data": data_settings,
        "crop": arguments["crop"],
        "config": fixed_settings(config),
        "fingerprint": data.fingerprint,
        "history": [],
    }
    parts = {"criterion": criterion, "optimizers": optimizers}
    state = resume(config, "style", state, parts)
    if rank() == 0:
        print(f"StyleAutoencoder: {parameter_count(model) / 1e6:.2f} million parameters on {device}")

    # Train, evaluate, save
    parallel = data_parallel(criterion)
    with interruptible(state):
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            timer = Timer()
            mse = train_epoch(parallel, training, optimizers, epoch, config, arguments["crop"], device)
            if rank() == 0:
                record = {"mse": mse, "psnr": psnr(mse)} | timer.seconds()
                record |= evaluate(criterion, validation, config, arguments["crop"], device)
                save_epoch(config.run, "style", state, {"epoch": epoch} | record, parts)
                if epoch < 3 or epoch % 5 == 0:
                    plot(Path(config.run), state, model, validation, config, device, f"after epoch {epoch}")
    if rank() == 0:
        state["weights"] = half_precision(model.state_dict())
        model.load_state_dict(state["weights"])
        report(Path(config.run), state, model, (training, validation, test), config, device)
        print(f"{finish(config.run, 'style', state)}: epoch {config.epochs} kept")
        lock.close()
    leave_processes()


# Model and loss -------------------------------------------------------------------------------------------------------


def new_model_and_loss(config, training: WikiArt, device) -> tuple[StyleLoss, dict]:
    """The loss, with a StyleAutoencoder inside that starts as --start, and the model's arguments. Raises UserError."""
    start = load_checkpoint(checkpoint_path(config.run, config.start), "Autoencoder")
    checkpoint = load_checkpoint(checkpoint_path(config.run, config.features), "CNN")
    if checkpoint["classes"] != training.classes:
        raise UserError(f"{config.features} has other styles than these paintings: train it on them")
    if len(training.classes) < 2:
        raise UserError("the paintings have one style only: there is no other to repaint them in")
    torch.manual_seed(config.seed)  # here, because building the pixel cache draws random numbers
    feature_net = build_model(checkpoint)
    sizes = {"styles": len(training.classes), "embedding": EMBEDDING, "projection_dim": 0}
    arguments = start["arguments"] | sizes | {"relative": config.condition == "change"}
    weights = start["weights"]
    if config.embed == "means":
        weights = weights | {"style_features": mean_features(feature_net, training, checkpoint["crop"], config)}
        arguments["style_features"] = weights["style_features"].shape[1]
    model = make_model("StyleAutoencoder", arguments)
    model.load_state_dict(weights, strict=False)  # layers for styles are new, a projection head is left out
    feature_net = feature_net.to(device, memory_format=torch.channels_last)
    return StyleLoss(model, feature_net, config, float(np.mean(np.square(arguments["std"])))), arguments


@torch.no_grad()
def mean_features(feature_net, data: WikiArt, crop: int, config):
    """Mean features of each style, (styles, features), with mean 0 and standard deviation 1."""
    batches = (data.batch(items, torch.device("cpu"))[0] for items in torch.arange(len(data)).split(config.batch_size))
    features = torch.cat([feature_net.features(views(pixels, crop)[0]) for pixels in batches])
    means = torch.stack([features[data.labels == style].mean(0) for style in range(len(data.classes))])
    return (means - means.mean(0)) / means.std()


# Training and evaluation ----------------------------------------------------------------------------------------------


def train_epoch(criterion, data: WikiArt, optimizers, epoch: int, config, crop: int, device) -> float:
    """One pass over the training set; returns the mean squared error of reconstructions of its crops."""
    criterion.train()
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # for each epoch, so that a resumed training draws the same
    batches = torch.randperm(len(data))[: len(data) // config.batch_size * config.batch_size].split(config.batch_size)
    styles = len(data.classes)
    members = [torch.nonzero(data.labels == label).flatten() for label in range(styles)]
    total = torch.zeros(1, dtype=torch.float64)
    for step, batch in enumerate(tqdm(batches, f"epoch {epoch}/{config.epochs}", leave=False, disable=rank() > 0)):
        random_crop, random = torch.rand(5), torch.rand(7, len(batch))
        targets = (data.labels[batch] + 1 + (random[0] * (styles - 1)).long()) % styles
        pairs = zip(targets, random[1], strict=True)
        style_items = torch.stack([members[style][int(number * len(members[style]))] for style, number in pairs])
        pixels, labels = data.batch(batch[local_share()], device)
        images = batch_crop(pixels, crop, random_crop, MIN_CROP_AREA).contiguous(memory_format=torch.channels_last)
        style_pixels, targets = data.batch(style_items[local_share()], device)
        style_images = batch_crop(style_pixels, crop, torch.rand(5), MIN_CROP_AREA)
        with autocast(device):
            loss, mse = criterion(images, labels, targets, style_images, torch.rand(6))
        check_finite(loss, step, epoch)
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        total += mse.item() * len(labels)
    return sum_over_processes(total).item() / (len(batches) * config.batch_size)


def repaint(model, images, labels, targets=None):
    """Images (B, 3, crop, crop) of styles `labels` (B,), repainted in `targets`: (B,), one for all, or their own."""
    targets = labels if targets is None else targets.expand_as(labels)
    source, target = (F.one_hot(styles, model.style_head.out_features).float() for styles in (labels, targets))
    return model.decode(model.encode(images), target, source)


def evaluate(criterion, data: WikiArt, config, crop: int, device) -> dict:
    """Error in the own style, and how often the classifier predicts the target style, on whole validation paintings."""
    model = criterion.eval().model
    mse = mean_squared_error(partial(repaint, model), data, crop, config.batch_size, device)
    hits, styles = 0, len(data.classes)
    for items in torch.arange(len(data)).split(config.batch_size):
        images, labels = whole_images(data, items, crop, device)
        targets = (labels + 1 + items.to(device) % (styles - 1)) % styles  # one other style for each painting
        with torch.no_grad(), autocast(device):
            _, logits = criterion.feature_maps(repaint(model, images, labels, targets))
        hits += (logits.argmax(1) == targets).sum().item()
    return {"val_mse": mse, "val_psnr": psnr(mse), "val_hit_rate": hits / len(data)}


# Report ---------------------------------------------------------------------------------------------------------------


def plot(run: Path, state: dict, model, data: WikiArt, config, device, when: str) -> None:
    """Write style_curves.png, and repaintings.png with paintings above what the model makes of them."""
    panels = {
        "PSNR, dB": {"training crops": "psnr", "validation": "val_psnr"},
        "fraction in the target style": {"predicted by the classifier, validation": "val_hit_rate"},
    }
    figures.curves(run / "style_curves.png", state["history"], panels)
    model.eval()
    functions = {"own style": partial(repaint, model)}
    for style, name in enumerate(data.classes[:8]):
        functions[display_name(name)] = partial(repaint, model, targets=torch.tensor(style, device=device))
    path, title = run / "repaintings.png", f"Repaintings {when}"
    plot_reconstructions(path, functions, data, config.hide, state["crop"], device, title)


def report(run: Path, state: dict, model, splits: tuple[WikiArt, ...], config, device) -> None:
    """Write the figures and facts of a finished training."""
    training, validation, test = splits
    plot(run, state, model, test, config, device, "of test paintings")
    mse = mean_squared_error(partial(repaint, model), test, state["crop"], config.batch_size, device)
    history = state["history"]
    facts = {
        "epochs": len(history),
        "epoch_kept": len(history),
        "parameters": parameter_count(model),
        "training_images": len(training),
        "validation_images": len(validation),
        "test_images": len(test),
        **{key: history[-1][key] for key in ("val_mse", "val_psnr", "val_hit_rate")},
        "mse": mse,
        "psnr": psnr(mse),
        "cpu_minutes": sum(record["cpu_seconds"] for record in history) / 60,
        "minutes": sum(record["seconds"] for record in history) / 60,
        **{key: state["arguments"][key] for key in ("crop", "code")},
        **{key: getattr(config, key) for key in ("batch_size", "seed", "embed", "condition", *StyleLoss.WEIGHTS)},
        "shown": test.captions(items_to_show(test, config.hide)),
    }
    add_facts(run, "train_style", facts, outdated=("style_transfer",))
    print(f"test paintings: {facts['psnr']:.2f} dB")


if __name__ == "__main__":
    run_script(main)
