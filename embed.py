"""Train classifiers of style, genre and artist on features of frozen, pre-trained backbones of timm.

    python embed.py                                     # three backbones x style, genre, artist; weights from the hub
    python embed.py --backbone convnextv2_base.fcmae_ft_in22k_in1k --target style
    python embed.py --backbone tf_efficientnet_lite0 --weights lite0.pth    # weights from a file: nothing is fetched
    python embed.py --finetune last                     # also train the last stage (or all) of each backbone
    python cluster.py --codes all                       # afterwards: cluster the features like other codes

Needs timm: pip install -r requirements/embed.txt. Features are extracted once; an extraction that was interrupted
continues when the same command is run again. Validation paintings choose the weight decay of the linear classifier, the
epoch of the MLP and the classifier that is kept; test paintings are never used for that. Writes into the run folder:
codes/<backbone>.npz (and .float32, .json, see common/backbones.py), embed_<backbone>.pt (the style classifier, a
checkpoint like classifier.pt), head_<backbone>.pt (the linear one without its backbone: some sixty kilobytes), embed.md
(the table), embed/ (scores of each classifier by class) and facts.json.
"""

import copy
import itertools
import re
import time
from pathlib import Path

import common.packages  # noqa: F401

import torch
import torch.nn.functional as F
from sklearn.metrics import classification_report

from common.backbones import Pretrained, extract, head, import_timm, load, replace_modules
from common.config import Setting, configure
from common.crops import predict_probabilities, random_crops
from common.errors import DataError, UserError
from common.losses import class_log_prior
from common.metrics import (
    METRICS,
    balanced_accuracy,
    bootstrap_scores,
    fit_temperature,
    seen_unseen_accuracy,
)
from common.optim import Optimizers
from common.run import (
    Steps,
    add_facts,
    autocast,
    claim,
    fixed_settings,
    half_precision,
    pick_device,
    read_facts,
    run_script,
    save_checkpoint,
    to_device,
    write_text,
)
from wikiart import WikiArt

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "validation", "min_images", "processes")
SETTINGS = {
    "backbone": Setting(list[str], None, "models of timm, by name"),
    "weights": Setting(list[str], None, "a weights file for each; none: those of a package, or timm fetches them"),
    "target": Setting(list[str], None, "what to predict: style, genre, artist; unknown and rare ones are left out"),
    "shrink": Setting(int, "[0, inf)", "resize images to this side before extracting features; 0: off"),
    "stages": Setting(int, "[0, inf)", "last stages whose maps' means and deviations are features as well"),
    "batch_size": Setting(int, "[1, inf)", "images per step"),
    "balance": Setting(str, ("none", "weights", "logit"), "class weights or logit adjustment (strength 1) in the loss"),
    "epochs": Setting(int, "[1, inf)", "passes of the MLP over the features, at most"),
    "finetune": Setting(str, ("none", "last", "all"), "also train the backbone: its last stage, or all of it"),
}
DATA_SETTINGS = ("size", "resize", "split_seed")  # of WikiArt
TARGETS = ("style", "genre", "artist")
SCORES = ("temperature", "unseen_artists_accuracy")  # that a checkpoint holds
WEIGHT_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the linear classifier
HIDDEN, MLP_LR = 512, 1e-3
DROPOUT = 0.5  # of features too: without, the MLP was behind the linear classifier in cross-validation
FINETUNE_EPOCHS, FINETUNE_LR = 10, 1e-4
WEIGHT_DECAY, LABEL_SMOOTHING, PATIENCE = 0.05, 0.1, 10  # of MLP and fine-tuning


def main(argv=None):
    config = configure("embed", __doc__, SETTINGS, SHARED, argv)
    import_timm()  # an error now rather than after decoding
    if len(config.weights) not in (0, len(config.backbone)):
        raise UserError(f"{len(config.weights)} --weights for {len(config.backbone)} --backbone: give one for each")
    device, run = pick_device(config.device), Path(config.run)
    targets = load_targets(config)
    sets = {split: load_paintings(config, split) for split in ("train", "test")}
    rows = {path: row for row, path in enumerate(path for data in sets.values() for path in data.paths)}

    for name, weights in itertools.zip_longest(config.backbone, config.weights, fillvalue=""):
        stem = re.sub(r"[^\w.-]", "_", name)  # names on the hub may hold slashes
        stem = f"{stem}_{config.shrink}" if config.shrink else stem
        lock = claim(run, f"embed_{stem}")
        model, weights_id, arguments = load(name, weights, config.stages)
        model.to(device, memory_format=torch.channels_last)
        features, speed = extract(model, run / "codes" / stem, weights_id, sets, config, device)
        facts = {}
        for target, (train, test) in targets.items():
            task = Task(target, train, test, model, features, rows, config, device)
            models, scores = fit_classifiers(task, run / "embed" / stem, config)
            facts[target] = scores | speed
            if target == "style":
                described = arguments, weights_id, config
                save_checkpoint(run / f"embed_{stem}.pt", checkpoint(models[scores["kept"]], task, scores, *described))
                linear = checkpoint(models["linear"], task, scores["linear"], *described)
                save_checkpoint(run / f"head_{stem}.pt", without_backbone(linear))
        add_facts(run, "embed", {re.sub(r"\W", "_", stem): facts}, merge=True)
        lock.close()
    write_table(run / "embed.md", read_facts(run))


def load_targets(config) -> dict:
    """Training and test paintings of each target; targets that no painting has are left out. Raises UserError."""
    if not set(config.target) <= set(TARGETS):
        raise UserError(f"--target {' '.join(config.target)}: give some of {', '.join(TARGETS)}")
    targets = {}
    for target in config.target:
        try:
            train = load_paintings(config, "train", target=target, min_images=config.min_images)
            targets[target] = train, load_paintings(config, "test", target=target, classes=train.classes)
        except DataError as error:
            if config.target == [target]:
                raise
            print(f"no classifier of {target}: {error}")
    return targets


def load_paintings(config, split: str, **target) -> WikiArt:
    settings = {key: getattr(config, key) for key in DATA_SETTINGS}
    return WikiArt(config.data, split, processes=config.processes, **settings, **target)


# Classifiers ----------------------------------------------------------------------------------------------------------


class Task:
    """One target on one backbone: its paintings, their features, and the loss that balances its classes.

    splits: the paintings by name: training and validation (disjoint), all (both), test. model: the network with the
    backbone; fit_linear puts the head in place from which fine-tuning starts.
    """

    def __init__(self, target: str, train: WikiArt, test: WikiArt, model, features, rows: dict, config, device):
        training, validation = train.split_off(config.validation, config.split_seed)
        if not len(validation) or len(train.classes) < 2:
            raise UserError(f"{len(train)} paintings of {len(train.classes)} classes are too few to learn {target}")
        self.target, self.model, self.features, self.device = target, model, features, device
        self.splits = {"all": train, "training": training, "validation": validation, "test": test}
        self.rows = {name: torch.tensor([rows[path] for path in data.paths]) for name, data in self.splits.items()}
        log_prior = class_log_prior(train.labels, len(train.classes)).to(device)
        self.prior, self.weights = torch.zeros_like(log_prior), torch.ones_like(log_prior)
        if config.balance == "logit":  # see ClassifierLoss in train.py; strength 1 here, 0.9 there
            self.prior = log_prior
        elif config.balance == "weights":
            self.weights = 1 / (log_prior.exp() * len(log_prior))

    def head(self, hidden: int = 0, dropout: float = 0.0):
        """A new head for this target's classes."""
        return head(self.features.shape[1], len(self.prior), hidden, dropout).to(self.device)

    def inputs(self, rows):
        """Standardised features (B, features) of the paintings in these rows."""
        return self.model.standardise(to_device(torch.from_numpy(self.features[rows.numpy()]), self.device))

    def batches(self, split: str):
        for rows, labels in zip(self.rows[split].split(2048), self.splits[split].labels.split(2048), strict=True):
            yield self.inputs(rows), to_device(labels, self.device)

    def losses(self, logits, labels, smoothing: float = 0.0):
        losses = F.cross_entropy(logits.float() + self.prior, labels, label_smoothing=smoothing, reduction="none")
        return losses * self.weights[labels]

    @torch.no_grad()
    def predict(self, layers, split: str) -> torch.Tensor:
        """Class probabilities (N, classes), by a head on the features."""
        layers.eval()
        return torch.cat([layers(inputs).float().softmax(1).cpu() for inputs, _ in self.batches(split)])

    def predict_test(self, layers):
        """The likeliest classes, int64 (N,), of the test paintings."""
        return self.predict(layers, "test").argmax(1).numpy()

    def score(self, probabilities) -> float:
        """Balanced accuracy of probabilities (N, classes) of the validation paintings."""
        return balanced_accuracy(self.splits["validation"].labels, probabilities.argmax(1))

    def temperature(self, probabilities) -> float:
        """The temperature that fits probabilities (N, classes) of the validation paintings."""
        return fit_temperature(probabilities, self.splits["validation"].labels)


def fit_classifiers(task: Task, path: Path, config) -> tuple[dict, dict]:
    """Fit the classifiers of one target and evaluate them on the test paintings.

    Returns their networks by name; and the scores of the best one on validation paintings, followed by those of each.
    """
    training, test = task.splits["all"], task.splits["test"]
    truth, classes = test.labels.numpy(), training.classes
    fits = {"linear": fit_linear, "mlp": fit_mlp, "neighbours": predict_neighbours}
    fits |= {"finetuned": finetune} if config.finetune != "none" else {}
    models, facts = {}, {}
    for name, fit in fits.items():
        torch.manual_seed(config.seed)
        start = time.perf_counter()
        models[name], predictions, scores = fit(task, config)
        scores["fit_seconds"] = time.perf_counter() - start
        scores |= bootstrap_scores(test, predictions, task.target, config.seed)
        facts[name] = scores | seen_unseen_accuracy(training.artists, test, predictions)
        labels = range(len(classes))
        text = classification_report(truth, predictions, labels=labels, target_names=classes, zero_division=0)
        write_text(f"{path}_{task.target}_{name}.txt", text)
        print(f"{path.name}: {task.target}, {name}: {scores['accuracy']:.1%} of {len(test)} correct", flush=True)
    kept = max(facts, key=lambda name: facts[name].get("val_balanced_accuracy", -1.0))
    counts = {"images": len(test), "left_out": test.left_out, "training_images": len(training)}
    counts |= {"training_left_out": training.left_out, "classes": len(classes)}
    return models, counts | {"kept": kept} | facts[kept] | facts


def fit_linear(task: Task, config):
    """Logistic regression with the best of WEIGHT_DECAYS on validation paintings, fitted again to all paintings."""
    layer, best = task.head(), {"val_balanced_accuracy": -1.0}
    for weight_decay in WEIGHT_DECAYS:
        fit_logistic_regression(task, layer, "training", weight_decay)
        probabilities = task.predict(layer, "validation")
        score = task.score(probabilities)
        if score > best["val_balanced_accuracy"]:
            best = {"strength": weight_decay, "val_balanced_accuracy": score}
            best["temperature"] = task.temperature(probabilities)
            task.model = replace_modules(task.model, head=copy.deepcopy(layer))
    fit_logistic_regression(task, layer, "all", best["strength"])
    return replace_modules(task.model, head=layer), task.predict_test(layer), best


def fit_logistic_regression(task: Task, layer, split: str, weight_decay: float) -> None:
    """Minimise mean loss + weight_decay / 2 * squared weights by L-BFGS, with all paintings in every step."""
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = weight_decay / 2 * layer.weight.square().sum()
        total.backward()
        for inputs, labels in task.batches(split):
            loss = task.losses(layer(inputs), labels).sum() / len(task.rows[split])
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(closure)


def fit_mlp(task: Task, config):
    """An MLP on the features."""
    layers, rows = task.head(HIDDEN, DROPOUT), task.rows["training"]
    recipe = {"epochs": config.epochs, "batch_size": 128, "lr": MLP_LR}
    facts = train_network(task, layers, lambda items: task.inputs(rows[items]), task.predict, **recipe)
    return replace_modules(task.model, head=layers), task.predict_test(layers), facts


def finetune(task: Task, config):
    """Train the backbone and the linear classifier on random crops of the cached images."""
    model, training = copy.deepcopy(task.model), task.splits["training"]
    names = [name for name, _ in model.backbone.named_parameters()]
    last_stage = model.backbone.feature_info[-1]["module"]  # of a transformer its last block
    first = next(number for number, name in enumerate(names) if name.startswith(last_stage))
    for number, weight in enumerate(model.backbone.parameters()):
        weight.requires_grad = number >= first or config.finetune == "all"

    def crops(items):
        images = training.batch(items, task.device)[0]
        images = random_crops(images, model.size, torch.rand(7, len(items)), 0.5)
        return images.contiguous(memory_format=torch.channels_last)

    def predict(model, split):
        model.eval()
        batches = torch.arange(len(task.splits[split])).split(config.batch_size)
        images = (task.splits[split].batch(items, task.device)[0] for items in batches)
        return torch.cat([predict_probabilities(model, batch, model.size).cpu() for batch in images])

    recipe = {"epochs": FINETUNE_EPOCHS, "batch_size": config.batch_size, "lr": FINETUNE_LR}
    facts = train_network(task, model, crops, predict, **recipe)
    return model, predict(model, "test").argmax(1).numpy(), facts


def train_network(task: Task, model, inputs, predict, epochs: int, batch_size: int, lr: float) -> dict:
    """Train by AdamW on inputs(items), and keep the weights of the best epoch on validation paintings.

    Training ends after PATIENCE epochs without progress.
    """
    labels, best = task.splits["training"].labels, {"val_balanced_accuracy": -1.0, "epoch": 0}
    optimizers = Optimizers(model, lr, WEIGHT_DECAY, epochs * -(-len(labels) // batch_size), muon=False)
    for epoch in range(1, epochs + 1):
        model.train()
        batches = torch.randperm(len(labels)).split(batch_size)
        steps = Steps(batches, len(batches), epoch, epochs, "give another --backbone or --weights")
        for items in steps:
            with autocast(task.device):
                logits = model(inputs(items))
            loss = task.losses(logits, to_device(labels[items], task.device), LABEL_SMOOTHING).mean()
            steps.record(loss)
            optimizers.zero_grad()
            loss.backward()
            optimizers.step()
        probabilities = predict(model, "validation")
        score = task.score(probabilities)
        if score >= best["val_balanced_accuracy"]:
            best = {"val_balanced_accuracy": score, "epoch": epoch}
            weights, best_probabilities = copy.deepcopy(model.state_dict()), probabilities
        elif epoch - best["epoch"] >= PATIENCE:
            break
    model.load_state_dict(weights)
    return best | {"temperature": task.temperature(best_probabilities)}


@torch.no_grad()
def predict_neighbours(task: Task, config):
    """The commonest class of the five training paintings with the highest cosine similarity; there is no network."""
    predictions = []
    for inputs, _ in task.batches("test"):
        similarity = inputs.new_empty(len(inputs), 0)
        classes = torch.empty(len(inputs), 0, dtype=torch.long, device=task.device)
        for train_inputs, labels in task.batches("all"):  # so that memory does not grow with the paintings
            similarity = torch.cat([similarity, F.normalize(inputs) @ F.normalize(train_inputs).T], 1)
            similarity, nearest = similarity.topk(min(5, similarity.shape[1]))
            classes = torch.cat([classes, labels.expand(len(inputs), -1)], 1).gather(1, nearest)
        predictions.append(classes.mode(1).values.cpu())
    return None, torch.cat(predictions).numpy(), {}


# The checkpoint and the table -----------------------------------------------------------------------------------------


def checkpoint(model: Pretrained, task: Task, scores: dict, arguments: dict, weights_id: str, config) -> dict:
    """The classifier as a checkpoint for Classifier.load, with weights in half precision."""
    data = task.splits["all"]
    hidden = 0 if isinstance(model.head, torch.nn.Linear) else HIDDEN
    settings = {key: getattr(config, key) for key in (*DATA_SETTINGS, "min_images")}
    return {
        "model": "Pretrained",
        "arguments": arguments | {"classes": len(data.classes), "hidden": hidden, "dropout": DROPOUT},
        "weights": half_precision({name: value.cpu() for name, value in model.state_dict().items()}),
        "backbone": arguments["backbone"],
        "backbone_weights": weights_id,
        "classes": data.classes,
        "data": settings | {"size": config.shrink or model.size, "target": task.target, "holdout": "none"},
        "crop": config.shrink or model.size,
        "tta_scales": [1.0],
        **{key: float(scores[key]) for key in SCORES if key in scores},
        "config": fixed_settings(config) | {"weights": [Path(path).name for path in config.weights]},
        "fingerprint": data.fingerprint,
        "largest_class": int(data.counts().argmax()),
        "artists": sorted({str(artist) for artist in data.artists} - {""}),
    }


def without_backbone(state: dict) -> dict:
    """A checkpoint whose backbone build_model() takes from elsewhere, see backbone_weights()."""
    weights = {name: value for name, value in state["weights"].items() if not name.startswith("backbone.")}
    return state | {"weights": weights}


def write_table(path: Path, facts: dict) -> None:
    """Write all classifiers, and test.py's scores where its classes are the same styles, as a table in Markdown."""
    columns = ["target", "backbone", "classifier", "accuracy", "balanced accuracy", "macro-F1", "seen artists"]
    columns += ["unseen artists", "images / s", "fit, s"]
    rows, scratch = [], facts.get("test", {})
    for backbone, targets in facts["embed"].items():
        for target, best in targets.items():
            speed = f"{best['images_per_second']:.1f}"
            names = [name for name in ("linear", "mlp", "neighbours", "finetuned") if name in best]
            labels = [f"**{name}**" if name == best["kept"] else name for name in names]
            rows += [(target, backbone, label, best[name], speed) for name, label in zip(names, labels, strict=True)]
            if target == "style" and scratch.get("classes") == best["classes"]:
                rows.append((target, "none", "train.py, from scratch", scratch, ""))
                scratch = {}
    rows.sort(key=lambda row: (TARGETS.index(row[0]), -row[3]["accuracy"]))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for *names, scores, speed in rows:
        cells = []
        for metric, form in zip(METRICS, (".1%", ".1%", ".3f"), strict=True):
            value, low, high = (format(scores[metric + end], form) for end in ("", "_low", "_high"))
            cells.append(f"{value} ({low} to {high})")
        artists = ("seen_artists_accuracy", "unseen_artists_accuracy")
        cells += [f"{scores[key]:.1%}" if key in scores else "" for key in artists]
        cells += [speed, f"{scores['fit_seconds']:.1f}" if "fit_seconds" in scores else ""]
        lines.append(f"| {' | '.join([*names, *cells])} |")
    lines += ["", "In brackets 95 % intervals. Bold: the best on validation paintings, which is kept."]
    write_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
