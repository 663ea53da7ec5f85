"""Train a classifier from scratch: the style of a painting, or its artist or genre.

    python train.py                                     # settings from config.json
    python train.py -c cpu.json --epochs 40             # the smaller ones for a machine without a GPU
    python train.py --target artist --min-images 50     # who painted it?
    python train.py --model resnet18                    # any classifier of torchvision.models, for comparison
    python train.py -c mlp.json --run runs/demo/mlp     # the baseline that test.py holds the classifier against
    python train.py --resume                            # go on after Ctrl-C, a kill or a power cut
    torchrun --nproc-per-node=2 -- train.py             # several GPUs: the same result with CNN and MLP, sooner

A validation part of the training paintings chooses the checkpoint; test paintings are never looked at. Writes into
the run folder: classifier.pt (when finished; classifier.partial.pt until then), train.jsonl with a line an epoch,
curves.png, classes.png and facts.json.
"""

import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import figures
import runs
from wikiart import BalancedSampler, WikiArt, build_model, channel_statistics, make_model
from windows import fit_temperature, predict, random_crops

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes")
HELP = {
    "target": ("what to name; artists and genres that are unknown or rare are left out", ("style", "artist", "genre")),
    "min_images": "training paintings that an artist or genre needs to count as a class",
    "holdout": ("artists: instead of the folders train and test, a split without common artists", ("none", "artists")),
    "model": "CNN (ours), MLP (the baseline), or a classifier of torchvision.models such as resnet18",
    "crop": "side of the network's input, in pixels",
    "width": "channels of the first layer (CNN), or hidden units (MLP)",
    "depth": "residual blocks at each of the CNN's three scales",
    "pooling": ("what the CNN's last layer sees of each feature map", ("mean", "mean-deviation")),
    "dropout": "share of the CNN's features that are dropped at random in training; 0: none",
    "epochs": "passes over the training set",
    "batch_size": "pictures a step, over all processes",
    "optimizer": ("Muon for the convolutions and AdamW for the rest, or AdamW for all", ("muon", "adamw")),
    "lr": "peak learning rate of AdamW; all rates rise for a fifth of the run, then fall to 0",
    "muon_lr": "peak learning rate of Muon",
    "weight_decay": "weight decay of both; 0: none",
    "label_smoothing": "share of the target spread over all classes; 0: none",
    "artist_weight": "weight of also naming the artist, in the loss (CNN); 0: off",
    "genre_weight": "weight of also naming the genre, in the loss (CNN); 0: off",
    "smallest": "share of a picture's area that the smallest training crops show; 1: nearly all of it",
    "windows": "what is averaged at test time: 1 the whole picture, 0.7 four windows of that share of its side, "
    "1.5 the whole picture larger",
    "average": "share of the averaged weights that each step keeps; 0: no averaging",
    "balance": (
        "none: as they come; resample: every class to --per-class; sampler: draws at inverse frequency; "
        "weights: class-weighted loss; logit: logit-adjusted loss",
        ("none", "resample", "sampler", "weights", "logit"),
    ),
    "tau": "strength of --balance logit: 1 as the theory has it",
    "per_class": "pictures of each class in an epoch of --balance resample; 0: the mean size of the classes",
    "validation": "share of the training paintings that chooses the checkpoint",
    "resume": "go on from classifier.partial.pt in the run folder",
}
FREE = ("data", "run", "device", "processes", "config", "resume")  # may change when a run is resumed


def main(argv=None):
    config = runs.configure("train", __doc__, SHARED, HELP, argv)
    device = runs.join_processes(runs.pick_device(config.device))
    runs.keep_memory()
    first = runs.rank() == 0
    run = Path(config.run)
    partial, final = run / "classifier.partial.pt", run / "classifier.pt"
    lock = runs.claim(run, "classifier") if first else None

    shape = {key: getattr(config, key) for key in ("size", "resize", "split_seed", "target", "min_images", "holdout")}
    data = WikiArt(config.data, "train", processes=config.processes, **shape)
    training, validation = data.set_apart(config.validation, config.split_seed)
    if not len(validation) or config.batch_size > len(training):
        raise runs.Problem(f"{len(training)} paintings to train on and {len(validation)} to validate with are too few: "
                           "add paintings, raise --validation or lower --batch-size")  # fmt: skip
    if config.batch_size % runs.world():
        raise runs.Problem(f"--batch-size must be a multiple of the {runs.world()} processes")
    order = BalancedSampler(training.labels, config.balance, config.per_class, config.seed)
    if config.batch_size > len(order):
        raise runs.Problem(f"an epoch of {len(order)} pictures is less than a batch: raise --per-class or lower "
                           "--batch-size")  # fmt: skip
    drawn = np.bincount(training.labels[list(order)], minlength=len(data.classes))
    if first:
        print_classes(data.classes, training.counts(), drawn, validation.counts())
    if not config.windows:
        raise runs.Problem("--windows needs at least one number")
    if config.model == "MLP" and max(config.windows) > 1:
        raise runs.Problem("the MLP knows pictures of one size only: train it with -c mlp.json")
    training.move_to(device)
    names = Names(training, config)

    mean, std = channel_statistics(training)
    arguments = {"classes": len(data.classes), "mean": mean, "std": std}
    if config.model == "CNN":
        arguments |= {key: getattr(config, key) for key in ("width", "depth", "pooling", "dropout")}
        arguments["extra"] = names.extra
    elif config.model == "MLP":
        arguments |= {"width": config.width, "crop": config.crop}
    torch.manual_seed(config.seed)  # only now: building the cache draws random numbers, a second start does not
    try:
        model = make_model(config.model, arguments).to(device, memory_format=torch.channels_last)  # a fifth faster here
        copy.deepcopy(model)(torch.zeros(2, 3, config.crop, config.crop, device=device)).shape  # noqa: B018
    except (ValueError, AssertionError, RuntimeError, AttributeError) as error:
        raise runs.Problem(f"--model {config.model} with --crop {config.crop}: {error}") from None
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.average), use_buffers=True)
    optimizers = runs.Optimizers(model, config, config.epochs * (len(order) // config.batch_size))

    state = {
        "model": config.model,
        "arguments": arguments,
        "classes": data.classes,
        "data": shape,
        "crop": config.crop,
        "windows": config.windows,
        "config": {key: value for key, value in vars(config).items() if key not in FREE},
        "fingerprint": data.fingerprint,
        "largest_class": int(data.counts().argmax()),
        "artists": sorted({str(artist) for artist in data.artists} - {""}),
        "history": [],
    }
    parts = {"model": model, "averaged": averaged, "optimizers": optimizers}
    state = runs.resume(config.resume, partial, state, parts)
    if first:
        print(f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters on {device}")
    trained = runs.parallel(model, device)
    kept = len(state["history"])  # epochs in the checkpoint
    try:
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            order.set_epoch(epoch)
            started, cpu = time.perf_counter(), time.process_time()
            loss, accuracy = train_epoch(trained, averaged, training, order, names, optimizers, epoch, config, device)
            if not first:
                continue
            record = {
                "epoch": epoch,
                "loss": loss,
                "accuracy": accuracy,
                **evaluate(averaged.module, validation, config, device),
            }
            spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
            if not np.isfinite(record["val_loss"]):
                raise runs.Problem(f"the validation loss is not finite after epoch {epoch}: lower the learning rates")
            state["history"].append({key: round(value, 5) for key, value in (record | spent).items()})
            print(json.dumps(state["history"][-1]), flush=True)
            if best_epoch(state["history"]) == epoch:
                state |= {"epoch": epoch, "weights": copy.deepcopy(averaged.module).cpu().state_dict()}
            state["resume"] = {name: part.state_dict() for name, part in parts.items()}
            runs.save_checkpoint(partial, state)
            kept = epoch
            runs.write_text(run / "train.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))
    except KeyboardInterrupt:
        advice = f"{kept} finished epochs are kept: go on with --resume" if kept else "no epoch was finished"
        raise KeyboardInterrupt(advice if first else "") from None

    if first:
        del state["resume"]
        state["weights"] = runs.halved(state["weights"])
        kept = build_model(state).to(device, memory_format=torch.channels_last)
        probabilities = judge(kept, validation, config, device, config.windows)
        state["temperature"] = fit_temperature(probabilities, validation.labels)
        report(run, state, model, training, validation, drawn)
        runs.save_checkpoint(final, state)
        partial.unlink(missing_ok=True)  # last, so that a full disk loses nothing
        lock.close()
        print(f"{final}: epoch {state['epoch']} kept, the best on {len(validation)} validation paintings")
    runs.leave_processes()


class Names:
    """What training asks the network to name: the class and, beside it, the artist and the genre.

    The last two cost nothing and keep the features from learning only what separates the styles; they are dropped
    after training.
    """

    def __init__(self, data: WikiArt, config):
        frequency = torch.bincount(data.labels, minlength=len(data.classes)) / len(data)
        # Logit adjustment (Menon et al. 2021): the loss sees the logits plus log-frequency, so that the network
        # itself learns what speaks for a class beyond its being common.
        self.prior = config.tau * frequency.log() if config.balance == "logit" else None
        self.weights = 1 / (frequency * len(data.classes)) if config.balance == "weights" else None
        self.smoothing, self.classes = config.label_smoothing, len(data.classes)
        self.beside = []  # (first output, end, weight, label of each painting with -1 for unknown)
        named = {"artist": (data.artists, config.artist_weight), "genre": (data.genres, config.genre_weight)}
        for kind, (values, weight) in named.items():
            known = sorted(set(values) - {""})
            if config.model == "CNN" and kind != config.target and weight and len(known) > 1:
                numbers = {name: number for number, name in enumerate(known)}
                start = self.beside[-1][1] if self.beside else self.classes
                labels = torch.tensor([numbers.get(value, -1) for value in values])
                self.beside.append((start, start + len(known), weight, labels))
        self.extra = self.beside[-1][1] - self.classes if self.beside else 0

    def loss(self, outputs, labels, items):
        """The loss to minimise, and its part for the classes alone, both means over a batch.

        outputs (B, classes + extra), labels (B,), items (B,) the paintings' numbers in the training set.
        """
        logits = outputs[:, : self.classes].float()
        if self.prior is not None:
            logits = logits + self.prior.to(logits.device)
        losses = F.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="none")
        if self.weights is not None:  # not cross_entropy's own, which would weigh the smoothed target as well
            losses = losses * self.weights.to(logits.device)[labels]
        loss = own = losses.mean()
        for start, end, weight, known in self.beside:
            named = known[items].to(logits.device)
            beside = F.cross_entropy(outputs[:, start:end].float(), named, ignore_index=-1, reduction="sum",
                                     label_smoothing=self.smoothing)  # fmt: skip
            loss = loss + weight * beside / len(items)
        return loss, own.detach()


def train_epoch(model, averaged, data, order, names, optimizers, epoch, config, device):
    """One pass; returns the mean loss and the accuracy on the (augmented) training pictures."""
    model.train()
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # anew for each epoch: see runs.resume
    mine = slice(runs.rank(), None, runs.world())  # every process takes its share of each batch
    batches = torch.tensor(list(order)).split(config.batch_size)
    batches = [batch for batch in batches if len(batch) == config.batch_size]  # equal ones, for equal shares
    total = torch.zeros(2, dtype=torch.float64)
    for step, batch in enumerate(tqdm(batches, f"epoch {epoch}/{config.epochs}", leave=False, disable=runs.rank() > 0)):
        numbers = torch.rand(7, len(batch))[:, mine]
        pixels, labels = data.batch(batch[mine], device)
        images = random_crops(pixels, config.crop, numbers, config.smallest)
        with runs.autocast(device):
            outputs = model(images.contiguous(memory_format=torch.channels_last))
        loss, own = names.loss(outputs, labels, batch[mine])
        if not torch.isfinite(loss):
            raise runs.Problem(
                f"the loss is {loss.item()} at step {step + 1} of epoch {epoch}: lower the learning rates"
            )
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        averaged.update_parameters(model)
        right = outputs[:, : names.classes].argmax(1) == labels
        total += torch.stack([own * len(labels), right.sum()]).cpu()
    return (runs.sum_over_processes(total) / (len(batches) * config.batch_size)).tolist()


def evaluate(model, data, config, device) -> dict:
    """Balanced loss, accuracy and balanced accuracy on whole pictures; balanced: the mean over classes."""
    model.eval()
    probabilities = judge(model, data, config, device)
    correct = (probabilities.argmax(1) == data.labels).float()
    return {
        "val_loss": balanced(log_loss(probabilities, data.labels), data.labels),
        "val_accuracy": correct.mean().item(),
        "val_balanced_accuracy": balanced(correct, data.labels),
    }


def judge(model, data, config, device, windows=(1.0,)):
    """Class probabilities (N, classes) of all paintings, averaged over the views of these windows."""
    chunks = torch.arange(len(data)).split(config.batch_size)
    return torch.cat([predict(model, data.batch(chunk, device)[0], config.crop, windows).cpu() for chunk in chunks])


def log_loss(probabilities, labels):
    return F.nll_loss(probabilities.clamp_min(1e-9).log(), labels, reduction="none")


def balanced(values, labels) -> float:
    """The mean over classes of the mean of each one's values (N,)."""
    return torch.stack([values[labels == label].mean() for label in labels.unique()]).mean().item()


def best_epoch(history: list[dict]) -> int:
    """The epoch with the best balanced accuracy on the validation part; of equals the last.

    The lowest loss would pick an earlier one, for a net that grows surer is punished hard for its mistakes while it
    still makes fewer of them.
    """
    return max(history, key=lambda record: (record["val_balanced_accuracy"], record["epoch"]))["epoch"]


def print_classes(classes, before, after, validation) -> None:
    print(f"\n{'class':30} {'paintings':>9} {'an epoch':>9} {'validation':>10}")
    for label in np.argsort(-before, kind="stable"):
        print(f"{classes[label]:30} {before[label]:9} {after[label]:9} {validation[label]:10}")
    print(f"{'all':30} {before.sum():9} {after.sum():9} {validation.sum():10}\n", flush=True)


def report(run, state, model, training, validation, drawn) -> None:
    history = state["history"]
    best = history[state["epoch"] - 1]
    figures.curves(
        run / "curves.png",
        history,
        {
            "loss": {"training": "loss", "validation": "val_loss"},
            "accuracy": {"training": "accuracy", "validation": "val_accuracy",
                         "validation, balanced": "val_balanced_accuracy"},
        },
        state["epoch"],
    )  # fmt: skip
    largest_first = np.argsort(-training.counts(), kind="stable")
    counts, config = {"paintings": training.counts()}, state["config"]
    counts[f"drawn in an epoch by {config['balance']}"] = drawn
    if config["balance"] not in ("resample", "sampler"):  # which change the loss: what drawing them alike would do
        order = BalancedSampler(training.labels, "resample", config["per_class"], config["seed"])
        counts["drawn by resample"] = np.bincount(training.labels[list(order)], minlength=len(drawn))
    counts = {name: each[largest_first] for name, each in counts.items()}
    names = [figures.plain(state["classes"][label]) for label in largest_first]
    title = f"Training paintings per {config['target']}"
    figures.bars(run / "classes.png", counts, names, title, "paintings", values=True)
    facts = {
        "model": state["model"],
        "epochs": len(history),
        "epoch_kept": state["epoch"],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "left_out": training.left_out,
        "training_images": len(training),
        "validation_images": len(validation),
        "classes": len(state["classes"]),
        "largest_class": int(training.counts().max()),
        "smallest_class": int(training.counts().min()),
        "class_sizes": dict(zip(state["classes"], training.counts().tolist(), strict=True)),
        "val_accuracy": best["val_accuracy"],
        "val_balanced_accuracy": best["val_balanced_accuracy"],
        "temperature": round(state["temperature"], 4),
        "cpu_minutes": round(sum(record["cpu_seconds"] for record in history) / 60, 2),
        "minutes": round(sum(record["seconds"] for record in history) / 60, 2),
        **{key: config[key] for key in ("crop", "size", "batch_size", "balance", "per_class", "seed")},
    }
    runs.add_facts(run, "train", facts, outdated=("test", "test_train", "cluster"))


if __name__ == "__main__":
    runs.start(main)
