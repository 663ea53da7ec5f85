"""Train a classifier from scratch: the style of a painting, or its artist or genre.

    python train.py                                             # settings from config.json
    python train.py -c settings/cpu.json --epochs 40            # smaller settings for a machine without a GPU
    python train.py --target artist --min-images 50             # predict the artist
    python train.py --model resnet18                            # a classifier of torchvision.models, to compare with
    python train.py -c settings/mlp.json --run runs/demo/mlp    # the baseline that test.py compares with
    torchrun --nproc-per-node=2 -- train.py                     # several GPUs: the same result, up to rounding

A tenth of the training paintings is held out for validation, half of them with all paintings of their artists, where
these are known. They show how well the network does, and how far its probabilities can be trusted. Test paintings are
never used. A training that was interrupted resumes after its last finished epoch when the same command is run again;
--restart starts anew. Writes into the run folder: classifier.pt (classifier.partial.pt until training has finished),
classifier.jsonl with one line per epoch, curves.png (every few epochs), classes.png and facts.json.
"""

import copy
from collections import Counter
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F

from common import figures
from common.config import Setting, configure
from common.crops import colour_cast, predict_probabilities, random_crops
from common.errors import UserError
from common.layers import parameter_count
from common.losses import class_log_prior
from common.metrics import (
    balanced_accuracy,
    class_balanced_mean,
    fit_temperature,
    negative_log_likelihood,
    seen_unseen_accuracy,
)
from common.names import artist_and_title, count, display_name, listed
from common.optim import MovingAverage, Optimizers
from common.run import (
    LARGEST_SCALE,
    LARGEST_SIDE,
    SMALLEST_SCALE,
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
    to_device,
)
from wikiart import MODELS, BalancedSampler, Classifier, WikiArt, channel_statistics, make_model

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "validation", "min_images", "processes")
SHARED += ("restart", "tensorboard", "compile")
SETTINGS = {
    "model": Setting(str, None, "CNN, MLP (the baseline), or a classifier of torchvision.models such as resnet18"),
    "target": Setting(str, ("style", "artist", "genre"), "what to predict; unknown and rare ones are left out"),
    "epochs": Setting(int, "[1, inf)", "passes over the training set"),
    "batch_size": Setting(int, "[2, inf)", "images per step, over all processes"),
    "lr": Setting(float, "(0, inf)", "peak learning rate of AdamW; Muon's is ten times as high"),
    "crop": Setting(int, f"[16, {LARGEST_SIDE}]", "side of the network's input, in pixels"),
    "width": Setting(int, "[1, inf)", "channels of the first layer (CNN), or hidden units (MLP)"),
    "depth": Setting(int, "[1, inf)", "residual blocks at each of the CNN's three scales"),
    "stem": Setting(
        str,
        ("patch", "convolution"),
        "how the CNN quarters the image's size: in patches, or by overlapping convolutions",
    ),
    "pooling": Setting(
        str, ("mean", "mean_std", "covariance"), "statistics of the feature maps that the CNN's last layer sees"
    ),
    "dropout": Setting(float, "[0, 1)", "probability of dropping each feature before the CNN's last layer"),
    "optimizer": Setting(str, ("muon", "adamw"), "Muon for convolutions and AdamW for the rest, or AdamW for all"),
    "weight_decay": Setting(float, "[0, inf)", "weight decay of both optimizers"),
    "label_smoothing": Setting(float, "[0, 1]", "fraction of the target spread over all classes"),
    "aux_weight": Setting(float, "[0, inf)", "weight of the auxiliary losses, for predicting artist and genre (CNN)"),
    "min_crop_area": Setting(float, "(0, 1]", "area of the smallest training crop, as a fraction of the image"),
    "colour_cast": Setting(float, "[0, 1]", "how much the contrast and exposure of each colour vary between crops"),
    "ema_decay": Setting(float, "[0, 1)", "decay of the exponential moving average of weights; 0: no averaging"),
    "balance": Setting(
        str,
        ("none", "resample", "sampler", "weights", "logit"),
        "class imbalance: resample every class to --per-class, draw by inverse frequency (sampler), class weights or "
        "logit adjustment in the loss",
    ),
    "per_class": Setting(int, "[0, inf)", "images of each class per epoch of resample; 0: the mean class size"),
    "tta_scales": Setting(
        list[float],
        f"[{SMALLEST_SCALE}, {LARGEST_SCALE}]",
        "test-time views that are averaged: 1 is the whole image, 0.7 a grid of 3 x 3 crops of 0.7 times its side, 1.5 "
        "the whole image enlarged",
    ),
    "holdout": Setting(
        str,
        None,
        "artists: split so that train and test have no common artist; a style: train without it, so that test.py shows "
        "how unsure the network is of it; or none",
    ),
}
DATA_SETTINGS = ("size", "resize", "split_seed", "target", "min_images", "holdout")  # that the data set depends on
CNN_SETTINGS = ("width", "depth", "stem", "pooling", "dropout")  # that its constructor takes
TAU = 0.9  # strength of the logit adjustment; 1 in theory
CURVE_EPOCHS = 4  # between two drawings of the curves


def main(argv=None):
    config = configure("train", __doc__, SETTINGS, SHARED, argv)
    device = join_processes(pick_device(config.device))
    reuse_freed_memory()
    run, lock = Path(config.run), claim(config.run, "classifier") if rank() == 0 else None

    settings = {key: getattr(config, key) for key in DATA_SETTINGS}
    data = WikiArt(config.data, "train", processes=config.processes, **settings)
    training, validation = data.split_off(config.validation, config.split_seed)
    check_settings(config, training, validation)
    if rank() == 0:
        print_classes(training, new_sampler(training, config), validation)
    state = fit(config, training, validation, device)
    if rank() == 0:
        state = publishable(state)
        probabilities = Classifier(state, device).predict_dataset(validation, calibrated=False)
        state["temperature"] = fit_temperature(probabilities, validation.labels)
        report(run, state, training, validation, probabilities)
        path = finish(run, "classifier", state)
        lock.close()
        print(f"{path}: trained on {count(len(training), 'painting')}")
    leave_processes()


def fit(config, training: WikiArt, validation: WikiArt, device) -> dict:
    """Train a network, with its progress in classifier.partial.pt; returns its checkpoint.

    The weights are the averaged ones of the last epoch, where the learning rate has fallen to zero. The epoch that is
    best on validation paintings would be an early one by chance, where rare styles have few of them.
    """
    training.move_to(device)
    sampler = new_sampler(training, config)
    criterion = ClassifierLoss(training, config, device)
    arguments = model_arguments(config, training, criterion.aux_classes)
    model = new_model(config, arguments).to(device, memory_format=torch.channels_last)  # a fifth faster on CPUs
    ema = MovingAverage(model, config.ema_decay)
    steps = config.epochs * (len(sampler) // config.batch_size)
    optimizers = Optimizers(model, config.lr, config.weight_decay, steps, muon=config.optimizer == "muon")
    state = {
        "model": config.model,
        "arguments": arguments,
        "classes": training.classes,
        "data": {key: getattr(config, key) for key in DATA_SETTINGS} | {"holdout": training.holdout},
        "crop": config.crop,
        "tta_scales": config.tta_scales,
        "config": fixed_settings(config),
        "fingerprint": training.fingerprint,
        "largest_class": int(training.counts().argmax()),
        "artists": sorted({str(artist) for artist in training.artists} - {""}),
        "history": [],
    }
    parts = {"model": model, "averaged": ema, "optimizers": optimizers}
    state = resume(config, "classifier", state, parts)
    if rank() == 0 and len(state["history"]) < config.epochs:
        print(f"{config.model}: {parameter_count(model) / 1e6:.2f} million parameters on {device}")

    parallel = data_parallel(model, config.compile)
    with interruptible(state):
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            timer = Timer()
            record = train_epoch(parallel, ema, training, sampler, criterion, optimizers, epoch, config, device)
            if rank() == 0:
                record |= evaluate(ema.module, validation, config, device) | timer.seconds()
                save_and_show(config, state, {"epoch": epoch} | record, parts)
    return state | {"weights": {name: value.cpu() for name, value in ema.module.state_dict().items()}}


# Settings, data and model ---------------------------------------------------------------------------------------------


def check_settings(config, training: WikiArt, validation: WikiArt) -> None:
    """Raise UserError for settings that do not fit together; lower --batch-size where there are few paintings."""
    if len(training.classes) < 2:
        raise UserError(f"{config.data} has one class only, {training.classes[0]}: a classifier needs two or more")
    fit_batch_size(config, len(new_sampler(training, config)), validation)
    if config.model in MODELS and config.model not in ("CNN", "MLP"):
        raise UserError(f"--model {config.model} is no classifier: give CNN, MLP or a classifier of torchvision.models")
    if not config.tta_scales:
        raise UserError("--tta-scales needs at least one number")
    if config.model == "MLP" and max(config.tta_scales) > 1:
        raise UserError("the MLP takes images of one size only: train it with -c settings/mlp.json")


def new_sampler(training: WikiArt, config) -> BalancedSampler:
    return BalancedSampler(training.labels, config.balance, config.per_class, config.seed)


def model_arguments(config, training: WikiArt, aux_classes: int) -> dict:
    """The constructor arguments of the network, which also go into the checkpoint."""
    mean, std = channel_statistics(training)
    arguments = {"classes": len(training.classes), "mean": mean, "std": std}
    if config.model == "CNN":
        arguments |= {key: getattr(config, key) for key in CNN_SETTINGS}
        arguments["aux_classes"] = aux_classes
    elif config.model == "MLP":
        arguments |= {"width": config.width, "crop": config.crop}
    return arguments


def new_model(config, arguments: dict):
    """A network with the weights of --seed. Raises UserError for a torchvision model that does not fit the settings."""
    torch.manual_seed(config.seed)  # here: building the pixel cache draws random numbers, loading it does not
    model = make_model(config.model, arguments)
    if config.model not in MODELS:
        try:
            logits = copy.deepcopy(model)(torch.zeros(2, 3, config.crop, config.crop))
        except (ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"--model {config.model} with --crop {config.crop}: {error}") from None
        if not torch.is_tensor(logits):
            raise UserError(f"--model {config.model} returns several outputs in training: give another")
        check_sizes(model, config)
    return model


def check_sizes(model, config) -> None:
    """Raise UserError if a network does not take the enlarged views of --tta-scales, as some transformers do not.

    On "meta" there are sizes without numbers, so that this takes no time.
    """
    network = copy.deepcopy(model).to("meta").eval()
    for side in sorted({round(config.crop * scale) for scale in config.tta_scales if scale > 1}):
        try:
            network(torch.zeros(2, 3, side, side, device="meta"))
        except NotImplementedError:  # an operation that "meta" lacks
            return
        except (ValueError, AssertionError, RuntimeError):
            sizes = f"takes images of one size only, --crop {config.crop}, and not of {side}"
            raise UserError(f"--model {config.model} {sizes}: give --tta-scales 1.0") from None


def publishable(state: dict) -> dict:
    """The checkpoint in half precision, and without the outputs for artists and genres, which only training needs."""
    weights, arguments = half_precision(state["weights"]), state["arguments"]
    if arguments.get("aux_classes"):
        for name in ("out.weight", "out.bias"):
            weights[name] = weights[name][: len(state["classes"])].clone()
        arguments = arguments | {"aux_classes": 0}
    return state | {"weights": weights, "arguments": arguments}


# The loss -------------------------------------------------------------------------------------------------------------


class ClassifierLoss:
    """Cross-entropy of the class, balanced by --balance, and auxiliary cross-entropies of artist and genre.

    The auxiliary outputs are dropped after training.
    """

    def __init__(self, data: WikiArt, config, device="cpu"):
        log_prior = class_log_prior(data.labels, len(data.classes)).to(device)
        # Logit adjustment (Menon et al. 2021): the loss sees logits plus log-prior, so that the network itself learns
        # the evidence for a class beyond its frequency.
        self.prior = TAU * log_prior if config.balance == "logit" else None
        self.weights = 1 / (log_prior.exp() * len(data.classes)) if config.balance == "weights" else None
        self.smoothing, self.classes = config.label_smoothing, len(data.classes)
        self.auxiliary = []  # (first output, end, weight, label of each painting with -1 for unknown)
        self.aux_classes = 0
        if config.model == "CNN":
            self.add_auxiliary(data.artists, config.aux_weight if config.target != "artist" else 0)
            self.add_auxiliary(data.genres, config.aux_weight if config.target != "genre" else 0)

    def add_auxiliary(self, names, weight: float) -> None:
        """Add outputs for the known ones among the `names` (N,) of all training paintings; "" is unknown."""
        known_names = sorted(set(names) - {""})
        if weight and len(known_names) > 1:
            label_of = {name: label for label, name in enumerate(known_names)}
            start = self.classes + self.aux_classes
            labels = torch.tensor([label_of.get(name, -1) for name in names])
            self.auxiliary.append((start, start + len(known_names), weight, labels))
            self.aux_classes += len(known_names)

    def __call__(self, outputs, labels, items):
        """The mean loss of a batch: outputs (B, classes + aux_classes), labels (B,), items (B,) of the training set."""
        logits = outputs[:, : self.classes].float()
        if self.prior is not None:
            logits = logits + self.prior
        losses = F.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="none")
        if self.weights is not None:  # not cross_entropy's own `weight`, which would weight the smoothed target as well
            losses = losses * self.weights[labels]
        loss = losses.mean()
        for start, end, weight, all_labels in self.auxiliary:
            aux_labels = to_device(all_labels[items], logits.device)
            aux_logits = outputs[:, start:end].float()
            aux_losses = F.cross_entropy(
                aux_logits, aux_labels, ignore_index=-1, reduction="sum", label_smoothing=self.smoothing
            )
            loss = loss + weight * aux_losses / len(items)
        return loss


# Training and evaluation ----------------------------------------------------------------------------------------------


def train_epoch(model, ema, data, sampler, criterion, optimizers, epoch, config, device) -> dict:
    """One pass over the training set.

    Returns means over its crops: `loss` is the objective, `train_loss` the class-balanced cross-entropy without
    smoothing, prior and auxiliary tasks, comparable with `val_loss`.
    """
    model.train()
    sampler.set_epoch(epoch)
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # for each epoch, so that a resumed training draws the same
    batches = torch.tensor(list(sampler)).split(config.batch_size)
    batches = [batch for batch in batches if len(batch) == config.batch_size]  # so that processes have equal shares
    batches = [batch[local_share()] for batch in batches]
    steps, scores = Steps(data.batches(batches, device), len(batches), epoch, config.epochs), []
    for items, pixels, labels in steps:
        random = torch.rand(13, config.batch_size)[:, local_share()]
        images = random_crops(pixels, config.crop, random[:7], config.min_crop_area)
        images = colour_cast(images, random[7:], config.colour_cast)
        with autocast(device, cpu=True):
            outputs = model(images.contiguous(memory_format=torch.channels_last))
        loss = criterion(outputs, labels, items)
        steps.record(loss)
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        ema.update_parameters(model)

        logits = outputs.detach()[:, : len(data.classes)].float()
        cross_entropy = F.cross_entropy(logits, labels, reduction="none")
        correct = (logits.argmax(1) == labels).float()
        scores.append(torch.stack([torch.ones_like(correct), loss.detach().expand_as(correct), cross_entropy, correct]))
    sums = torch.zeros(4, len(data.classes), dtype=torch.float64)  # images, loss, cross-entropy, correct: by class
    sums = sums.index_add(1, data.labels[torch.cat(batches)], torch.cat(scores, 1).cpu().double())
    sums = sum_over_processes(sums)
    count, loss, _, correct = sums.sum(1).tolist()
    present = sums[0] > 0
    train_loss = (sums[2] / sums[0])[present].mean().item()
    return {"loss": loss / count, "train_loss": train_loss, "accuracy": correct / count}


def evaluate(model, data: WikiArt, config, device) -> dict:
    """Scores on whole images, without test-time augmentation: class-balanced loss, accuracy, balanced accuracy."""
    model.eval()
    batches = torch.arange(len(data)).split(config.batch_size)
    images = (data.batch(items, device)[0] for items in batches)
    probabilities = torch.cat([predict_probabilities(model, batch, config.crop).cpu() for batch in images])
    predictions = probabilities.argmax(1)
    val_loss = class_balanced_mean(negative_log_likelihood(probabilities, data.labels), data.labels)
    if not np.isfinite(val_loss):
        raise UserError(f"the validation loss is not finite: {Steps.ADVICE}")
    return {
        "val_loss": val_loss,
        "val_accuracy": (predictions == data.labels).float().mean().item(),
        "val_balanced_accuracy": balanced_accuracy(data.labels, predictions),
    }


def save_and_show(config, state: dict, record: dict, parts: dict) -> None:
    """Save an epoch, print its line, and every few epochs draw the curves."""
    scores = f"loss {record['loss']:.3f}, validation balanced accuracy {record['val_balanced_accuracy']:.1%}"
    save_epoch(config, "classifier", state, record, parts, scores)
    if record["epoch"] % CURVE_EPOCHS == 0:
        plot_curves(config.run, state)


# Report ---------------------------------------------------------------------------------------------------------------


def draws_per_class(sampler: BalancedSampler) -> np.ndarray:
    """How many images of each class an epoch has, int64 (classes,)."""
    return np.bincount(sampler.labels[list(sampler)], minlength=int(sampler.labels.max()) + 1)


def print_classes(training: WikiArt, sampler: BalancedSampler, validation: WikiArt) -> None:
    """The paintings of each class, and what could not be held out for validation."""
    classes, counts, held, drawn = training.classes, training.counts(), validation.counts(), draws_per_class(sampler)
    print(f"\n{'class':30} {'paintings':>9} {'per epoch':>9} {'validation':>10}")
    for label in np.argsort(-counts, kind="stable"):
        print(f"{classes[label]:30} {counts[label]:9} {drawn[label]:9} {held[label]:10}")
    print(f"{'total':30} {counts.sum():9} {drawn.sum():9} {held.sum():10}\n")
    print(not_held_out(training, validation), end="")


def not_held_out(training: WikiArt, validation: WikiArt) -> str:
    """One line for each kind of class of which validation has no painting by an artist who is not in training."""
    if not any(training.artists):
        return "no artists are known: validation paintings may be by artists of training\n\n"
    classes, absent, lines = np.array(training.classes), validation.counts() == 0, ""
    by_others = np.isin(np.arange(len(classes)), validation.labels[held_out(training, validation)])
    if absent.any():
        lines += f"no painting could be held out of {listed(classes[absent], 10)}\n\n"
    if not (absent | by_others).all():
        lines += f"no artist could be held out of {listed(classes[~absent & ~by_others], 10)}: "
        lines += "validation paintings there are by artists of training, or by unknown ones\n\n"
    return lines


def held_out(training: WikiArt, validation: WikiArt) -> np.ndarray:
    """Which validation paintings are by known artists who have none in training, bool (N,)."""
    return ~np.isin(validation.artists, training.artists) & (validation.artists != "")


def plot_curves(run, state: dict) -> None:
    """curves.png: loss and accuracy of the epochs so far."""
    panels = {
        "class-balanced cross-entropy": {"training crops": "train_loss", "validation": "val_loss"},
        "accuracy": {
            "training crops": "accuracy",
            "validation": "val_accuracy",
            "validation, balanced": "val_balanced_accuracy",
        },
    }
    figures.curves(Path(run) / "curves.png", state["history"], panels)


def report(run, state: dict, training: WikiArt, validation: WikiArt, probabilities) -> None:
    """Write curves.png, classes.png and the facts of a finished training; `probabilities` of validation paintings."""
    plot_curves(run, state)
    sampler = BalancedSampler(training.labels, *(state["config"][key] for key in ("balance", "per_class", "seed")))
    plot_classes(run / "classes.png", state, training, draws_per_class(sampler))
    facts = training_facts(state, training, validation) | validation_facts(training, validation, probabilities)
    add_facts(run, "train", facts, outdated=("test", "test_train", "test_all", "cluster"))


def plot_classes(path, state: dict, training: WikiArt, drawn) -> None:
    """Bars: paintings per class, and how many of them an epoch draws."""
    config, counts = state["config"], training.counts()
    bars = {"paintings": counts}
    if (drawn != counts).any():
        bars[f"drawn in an epoch by {config['balance']}"] = drawn
    if config["balance"] not in ("resample", "sampler"):  # these change the loss; show what resampling would draw
        resampler = BalancedSampler(training.labels, "resample", config["per_class"], config["seed"])
        bars["would be drawn by resample"] = draws_per_class(resampler)
    largest_first = np.argsort(-counts, kind="stable")
    bars = {name: heights[largest_first] for name, heights in bars.items()}
    names = [display_name(state["classes"][label]) for label in largest_first]
    figures.bars(path, bars, names, f"Training paintings per {config['target']}", "paintings", values=True)


def training_facts(state: dict, training: WikiArt, validation: WikiArt) -> dict:
    history, config, counts = state["history"], state["config"], training.counts()
    return {
        "model": state["model"],
        "epochs": len(history),
        "parameters": parameter_count(make_model(state["model"], state["arguments"])),
        "left_out": training.left_out,
        "training_images": len(training),
        "validation_images": len(validation),
        "classes": len(state["classes"]),
        "largest_class": int(counts.max()),
        "smallest_class": int(counts.min()),
        "class_sizes": dict(zip(state["classes"], counts.tolist(), strict=True)),
        "validation_sizes": dict(zip(state["classes"], validation.counts().tolist(), strict=True)),
        "frequent_artists": {name: frequent_artists(training, label) for label, name in enumerate(state["classes"])},
        "val_accuracy": history[-1]["val_accuracy"],
        "val_balanced_accuracy": history[-1]["val_balanced_accuracy"],
        "temperature": state["temperature"],
        "cpu_minutes": sum(record["cpu_seconds"] for record in history) / 60,
        "minutes": sum(record["seconds"] for record in history) / 60,
        **{key: config[key] for key in ("crop", "size", "batch_size", "balance", "per_class", "seed")},
    }


def validation_facts(training: WikiArt, validation: WikiArt, probabilities) -> dict:
    """Scores of validation paintings, with test-time augmentation, by artists who are in training and who are not."""
    scores = seen_unseen_accuracy(training.artists, validation, probabilities.argmax(1).numpy())
    held = held_out(training, validation)
    facts = {"held_out_paintings": int(held.sum()), "held_out_classes": len(validation.labels[held].unique())}
    return facts | {f"val_{name}": score for name, score in scores.items()}


def frequent_artists(training: WikiArt, label: int, most: int = 3) -> str:
    """Those with the most training paintings of a class: "Claude Monet 12, Alfred Sisley 9"."""
    artists = Counter(str(artist) for artist in training.artists[training.labels == label] if artist)
    return ", ".join(f"{artist_and_title(artist, '')[0]} {number}" for artist, number in artists.most_common(most))


if __name__ == "__main__":
    run_script(main)
