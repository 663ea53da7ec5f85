"""How far do pre-trained features go? Frozen backbones of timm, and classifiers of style, genre and artist on them.

    python embed.py                                     # three backbones x style, genre, artist; weights from the hub
    python embed.py --backbone convnextv2_base.fcmae_ft_in22k_in1k --target style
    python embed.py --backbone tf_efficientnet_lite0 --weights lite0.pth    # weights from a file: nothing is fetched
    python embed.py --finetune last                     # train the last stage (or all) of each backbone, too
    python cluster.py --codes all                       # afterwards: features cluster like any other codes

Needs timm: pip install -r requirements-embed.txt. Features are written as they are made: a stopped extraction goes on
where it was, a finished one is not done again. A validation part of the training paintings chooses the strength of the
linear classifier, the epoch of the MLP and the one that is kept; test paintings choose nothing. Writes into the run
folder: codes/<backbone>.npz (and .float32, .json: what it grows in), embed_<backbone>.pt (the style classifier, a
checkpoint like classifier.pt), embed.md (the table), embed/ (a report for each classifier) and facts.json.
"""

import copy
import itertools
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import classification_report
from tqdm import tqdm

import backbones
import runs
from backbones import with_parts
from folder import DataError
from scores import seen_and_unseen, with_intervals
from wikiart import WikiArt, head
from windows import fit_temperature, predict, random_crops

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes")
HELP = {
    "backbone": "models of timm, by name",
    "weights": "files with their weights, one for each: safetensors or .pt; none: timm fetches them from the hub",
    "target": "what to name: style, genre, artist; those that are unknown or rare are left out",
    "min_images": "training paintings that an artist or genre needs to count as a class",
    "shrink": "side that pictures are scaled to first, for a judge of pictures that small (style_transfer.py); 0: none",
    "stages": "last stages of a backbone whose maps' means and deviations are features beside its own; 0: none",
    "batch_size": "pictures at a time",
    "balance": ("as in train.py: none, class-weighted or logit-adjusted loss", ("none", "weights", "logit")),
    "tau": "strength of --balance logit: 1 as the theory has it",
    "strengths": "weight decays of the linear classifier to choose from",
    "hidden": "hidden units of the MLP",
    "dropout": "share of the features and of the hidden units that are dropped at random in its training; 0: none",
    "label_smoothing": "share of the MLP's target spread over all classes; 0: none",
    "lr": "peak learning rate of the MLP; it rises for a fifth of the run, then falls to 0",
    "weight_decay": "weight decay of MLP and fine-tuning; 0: none",
    "epochs": "passes of the MLP over the features, at most",
    "patience": "epochs without progress on the validation part after which a training ends",
    "validation": "share of the training paintings that chooses",
    "bootstrap": "resamples behind each 95 % interval",
    "finetune": ("also train the backbone: its last stage, or all of it", ("none", "last", "all")),
    "finetune_epochs": "passes of fine-tuning over the paintings, at most",
    "finetune_lr": "peak learning rate of fine-tuning",
}
TARGETS = ("style", "genre", "artist")


def main(argv=None):
    config = runs.configure("embed", __doc__, SHARED, HELP, argv)
    if backbones.timm is None:
        raise runs.Problem("no timm here, which has the backbones: pip install -r requirements-embed.txt")
    if not set(config.target) <= set(TARGETS):
        raise runs.Problem(f"--target {' '.join(config.target)}: give some of {', '.join(TARGETS)}")
    if len(config.weights) not in (0, len(config.backbone)):
        raise runs.Problem(f"{len(config.weights)} --weights for {len(config.backbone)} --backbone: give one for each")
    device, run = runs.pick_device(config.device), Path(config.run)
    shape = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}

    def paintings(split, **target):
        return WikiArt(config.data, split, processes=config.processes, **shape, **target)

    whole = {split: paintings(split) for split in ("train", "test")}
    tasks = {}
    for target in config.target:
        try:
            train = paintings("train", target=target, min_images=config.min_images)
            tasks[target] = train, paintings("test", target=target, classes=train.classes)
        except DataError as error:
            if config.target == [target]:
                raise
            print(f"no classifier of {target}: {error}")
    for name, weights in itertools.zip_longest(config.backbone, config.weights, fillvalue=""):
        file = re.sub(r"[^\w.-]", "_", name)  # names on the hub may hold slashes
        file += f"_{config.shrink}" * bool(config.shrink)
        lock = runs.claim(run, f"embed_{file}")
        model, source, arguments = backbones.load(name, weights, config)
        model.to(device, memory_format=torch.channels_last)
        features, speed = backbones.extract(model, run / "codes" / file, source, whole, config, device)
        rows = {path: row for row, path in enumerate([path for data in whole.values() for path in data.paths])}
        facts = {}
        for target, (train, test) in tasks.items():
            task = Task(target, train, test, model, features, rows, config, device)
            facts[target] = study(task, run / "embed" / file, config) | speed
            if target == "style":
                hidden = 0 if isinstance(task.model.head, torch.nn.Linear) else config.hidden
                arguments |= {"classes": len(train.classes), "hidden": hidden, "dropout": config.dropout}
                temperature = facts[target]["temperature"]
                save(task, temperature, run / f"embed_{file}.pt", arguments, source, shape, config)
        runs.add_facts(run, "embed", {re.sub(r"\W", "_", file): facts}, merge=True)
        lock.close()
    write_table(run / "embed.md", json.loads((run / "facts.json").read_text()))


# Classifiers ----------------------------------------------------------------------------------------------------------


class Task:
    """One target on one backbone: its paintings, their features, and the loss that balances its classes."""

    def __init__(self, target, train, test, model, features, rows, config, device):
        training, validation = train.set_apart(config.validation, config.split_seed)
        if not len(validation) or len(train.classes) < 2:
            raise runs.Problem(f"{len(train)} paintings of {len(train.classes)} classes are too few to learn {target}")
        self.target, self.model, self.features, self.device = target, model, features, device
        self.parts = {"all": train, "training": training, "validation": validation, "test": test}
        self.rows = {name: torch.tensor([rows[path] for path in part.paths]) for name, part in self.parts.items()}
        frequency = (torch.bincount(train.labels, minlength=len(train.classes)) / len(train)).to(device)
        # As in train.py: the loss sees logits plus log-frequency (Menon et al. 2021), or weighs rare classes more.
        self.prior = config.tau * frequency.log() if config.balance == "logit" else torch.zeros_like(frequency)
        self.weights = 1 / (frequency * len(frequency)) if config.balance == "weights" else torch.ones_like(frequency)

    def inputs(self, rows):
        """Standardised features (B, features) of the paintings in these rows."""
        return (torch.from_numpy(self.features[rows.numpy()]).to(self.device) - self.model.centre) / self.model.spread

    def batches(self, part: str):
        for rows, labels in zip(self.rows[part].split(2048), self.parts[part].labels.split(2048), strict=True):
            yield self.inputs(rows), labels.to(self.device)

    def losses(self, logits, labels, smoothing=0.0):
        losses = F.cross_entropy(logits.float() + self.prior, labels, label_smoothing=smoothing, reduction="none")
        return losses * self.weights[labels]

    @torch.no_grad()
    def judge(self, layers, part: str) -> torch.Tensor:
        """Class probabilities (N, classes)."""
        layers.eval()
        return torch.cat([layers(inputs).float().softmax(1).cpu() for inputs, _ in self.batches(part)])

    def guesses(self, layers) -> np.ndarray:
        """The likeliest classes (N,) of the test paintings."""
        return self.judge(layers, "test").argmax(1).numpy()

    def score(self, probabilities) -> float:
        """Balanced accuracy on the validation part: the mean over its classes."""
        guesses, truth = probabilities.argmax(1), self.parts["validation"].labels
        return float(np.mean([(guesses[truth == label] == label).float().mean() for label in truth.unique()]))

    def temperature(self, probabilities) -> float:
        return fit_temperature(probabilities, self.parts["validation"].labels)


def study(task: Task, path: Path, config) -> dict:
    """Fit the classifiers of one target and hold them against the test paintings.

    The best on the validation part stays in `task.model`, and its facts stand on top of those returned.
    """
    train, test = task.parts["all"], task.parts["test"]
    fits = {"linear": fit_linear, "mlp": fit_mlp, "neighbours": nearest, "finetuned": finetune}
    found, models, truth, count = {}, {}, test.labels.numpy(), len(train.classes)
    for name in list(fits)[: 3 + (config.finetune != "none")]:
        torch.manual_seed(config.seed)
        started = time.perf_counter()
        model, guesses, facts = fits[name](task, config)
        facts |= {"fit_seconds": time.perf_counter() - started} | with_intervals(
            truth, guesses, count, config.bootstrap, config.seed
        )
        facts |= seen_and_unseen(train.artists, test, guesses)
        found[name] = {key: round(value, 5) if isinstance(value, float) else value for key, value in facts.items()}
        models |= {name: model} if model else {}
        text = classification_report(truth, guesses, labels=range(count), target_names=train.classes, zero_division=0)
        runs.write_text(f"{path}_{task.target}_{name}.txt", text)
        print(f"{path.name}: {task.target}, {name}: {facts['accuracy']:.1%} of {len(test)} right", flush=True)
    kept = max(models, key=lambda name: found[name]["val_balanced_accuracy"])
    task.model = models[kept]
    images = {"images": len(test), "left_out": test.left_out, "training_images": len(train),
              "training_left_out": train.left_out}  # fmt: skip
    return images | {"classes": count, "kept": kept} | found[kept] | found


def fit_linear(task: Task, config):
    """Logistic regression from the strongest weight decay to the weakest; the best one again, on all paintings."""
    layer, tried = head(len(task.model.centre), len(task.prior)).to(task.device), {}
    for strength in sorted(config.strengths, reverse=True):
        descend(task, layer, "training", strength)
        said = task.judge(layer, "validation")
        tried[strength] = task.score(said)
        if strength == max(tried, key=tried.get):
            task.model = with_parts(task.model, head=copy.deepcopy(layer))  # where fine-tuning starts
            temperature = task.temperature(said)  # while it has not seen the validation part
    strength = max(tried, key=tried.get)
    descend(task, layer, "all", strength)
    facts = {"strength": strength, "val_balanced_accuracy": tried[strength], "temperature": temperature}
    return with_parts(task.model, head=layer), task.guesses(layer), facts


def descend(task: Task, layer, part: str, strength: float) -> None:
    """The minimum of mean loss + strength / 2 * squared weights by L-BFGS, with all paintings in every step."""
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=60, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        total = strength / 2 * layer.weight.square().sum()
        total.backward()
        for inputs, labels in task.batches(part):
            share = task.losses(layer(inputs), labels).sum() / len(task.rows[part])
            share.backward()
            total = total.detach() + share.detach()
        return total

    solver.step(loss)


def fit_mlp(task: Task, config):
    """Half of its inputs are dropped too: without, it stayed behind the linear classifier in cross-validation."""
    layers = head(len(task.model.centre), len(task.prior), config.hidden, config.dropout).to(task.device)
    settings = SimpleNamespace(epochs=config.epochs, batch=128, lr=config.lr)
    rows = task.rows["training"]
    facts = train_on(task, layers, lambda items: task.inputs(rows[items]), task.judge, settings, config)
    return with_parts(task.model, head=layers), task.guesses(layers), facts


def finetune(task: Task, config):
    """Train the backbone, from the linear classifier on, on windows of the cached pictures, as train.py does."""
    model, training = copy.deepcopy(task.model), task.parts["training"]
    names = [name for name, _ in model.backbone.named_parameters()]
    last = model.backbone.feature_info[-1]["module"]  # of a transformer its last block
    first = next(place for place, name in enumerate(names) if name.startswith(last))
    for place, weight in enumerate(model.backbone.parameters()):
        weight.requires_grad = place >= first or config.finetune == "all"

    def windows(items):
        crops = random_crops(training.batch(items, task.device)[0], model.size, torch.rand(7, len(items)), 0.5)
        return crops.contiguous(memory_format=torch.channels_last)

    def judge(model, part):
        model.eval()
        chunks = torch.arange(len(task.parts[part])).split(config.batch_size)
        pixels = (task.parts[part].batch(chunk, task.device)[0] for chunk in chunks)
        return torch.cat([predict(model, each, model.size).cpu() for each in pixels])

    settings = SimpleNamespace(epochs=config.finetune_epochs, batch=config.batch_size, lr=config.finetune_lr)
    facts = train_on(task, model, windows, judge, settings, config)
    return model, judge(model, "test").argmax(1).numpy(), facts


def train_on(task: Task, model, inputs, judge, settings, config) -> dict:
    """Train by AdamW until the validation part sees no progress for a while; leaves the best weights in `model`."""
    labels, best = task.parts["training"].labels, {"val_balanced_accuracy": -1.0, "epoch": 0}
    rates = SimpleNamespace(optimizer="adamw", lr=settings.lr, weight_decay=config.weight_decay)
    optimizers = runs.Optimizers(model, rates, settings.epochs * -(-len(labels) // settings.batch))
    for epoch in tqdm(range(1, settings.epochs + 1), "epochs", leave=False):
        model.train()
        for items in torch.randperm(len(labels)).split(settings.batch):
            with runs.autocast(task.device):
                logits = model(inputs(items))
            loss = task.losses(logits, labels[items].to(task.device), config.label_smoothing).mean()
            if not torch.isfinite(loss):
                raise runs.Problem(f"the loss is {loss.item()} in epoch {epoch}: lower --lr or --finetune-lr")
            optimizers.zero_grad()
            loss.backward()
            optimizers.step()
        said = judge(model, "validation")
        score = task.score(said)
        if score >= best["val_balanced_accuracy"]:
            best = {"val_balanced_accuracy": score, "epoch": epoch}
            weights, kept = copy.deepcopy(model.state_dict()), said
        elif epoch - best["epoch"] >= config.patience:
            break
    model.load_state_dict(weights)
    return best | {"temperature": task.temperature(kept)}


@torch.no_grad()
def nearest(task: Task, config):
    """What most of the five training paintings at the smallest angles are; there is nothing to keep."""
    guesses = []
    for inputs, _ in task.batches("test"):
        best = inputs.new_empty(len(inputs), 0)
        names = torch.empty(len(inputs), 0, dtype=torch.long, device=task.device)
        for others, labels in task.batches("all"):  # block by block, so that memory does not grow with the paintings
            likeness = torch.cat([best, F.normalize(inputs) @ F.normalize(others).T], 1)
            best, places = likeness.topk(min(5, likeness.shape[1]))
            names = torch.cat([names, labels.expand(len(inputs), -1)], 1).gather(1, places)
        guesses.append(names.mode(1).values.cpu())
    return None, torch.cat(guesses).numpy(), {}


# The checkpoint, the table ------------------------------------------------------------------------------------


def save(task: Task, temperature: float, path: Path, arguments: dict, source: str, shape: dict, config) -> None:
    """The classifier as a checkpoint that build_model and test.py take like any other.

    It holds the backbone's weights, in half precision, to be used without hub or file; `source` names them.
    """
    data = task.parts["all"]
    state = {
        "model": "Pretrained",
        "arguments": arguments,
        "weights": runs.halved({name: value.cpu() for name, value in task.model.state_dict().items()}),
        "backbone": arguments["backbone"],
        "backbone_weights": source,
        "classes": data.classes,
        "data": shape
        | {"target": task.target, "min_images": config.min_images, "holdout": "none"}
        | ({"size": config.shrink} if config.shrink else {}),
        "crop": config.shrink or task.model.size,
        "windows": [1.0],
        "temperature": temperature,
        "config": {key: value for key, value in vars(config).items() if key != "config"},
        "fingerprint": data.fingerprint,
        "largest_class": int(data.counts().argmax()),
        "artists": sorted({str(artist) for artist in data.artists} - {""}),
    }
    runs.save_checkpoint(path, state)


def write_table(path: Path, facts: dict) -> None:
    """Every classifier, and the network of train.py beside those of style where test.py has been run."""
    header = ["target", "backbone", "classifier", "accuracy", "balanced accuracy", "macro-F1", "seen artists",
              "unseen artists", "pictures / s", "fit, s"]  # fmt: skip
    ours, styles = (
        facts.get("test", {}),
        {found["style"]["classes"] for found in facts["embed"].values() if "style" in found},
    )
    rows = [("style", "none", "train.py, from scratch", ours, {})] if ours.get("classes") in styles else []
    for backbone, found in facts["embed"].items():
        for target, whole in found.items():
            for name in (name for name in ("linear", "mlp", "neighbours", "finetuned") if name in whole):
                rows.append((target, backbone, f"**{name}**" if name == whole["kept"] else name, whole[name], whole))
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for *names, scored, whole in sorted(rows, key=lambda row: (TARGETS.index(row[0]), -row[3]["accuracy"])):
        shown = {"accuracy": ".1%", "balanced_accuracy": ".1%", "macro_f1": ".3f"}
        cells = ["{0:{3}} ({1:{3}} to {2:{3}})".format(*(scored[key + end] for end in ("", "_low", "_high")), form)
                 for key, form in shown.items()]  # fmt: skip
        cells += [f"{scored[key]:.1%}" if key in scored else "" for key in
                  ("seen_artists_accuracy", "unseen_artists_accuracy")]  # fmt: skip
        speeds = (whole.get("images_per_second"), scored.get("fit_seconds"))
        cells += ["" if speed is None else f"{speed:.1f}" for speed in speeds]
        lines.append(f"| {' | '.join([*names, *cells])} |")
    lines += ["", "In brackets 95 % intervals. Bold: the best on the validation part, which is kept."]
    runs.write_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    runs.start(main)
