"""Evaluate a trained classifier on test paintings: tables, confusion matrix, ROC curves, its most confident mistakes.

    python test.py                          # classifier.pt of the run folder, on the test paintings
    python test.py --checkpoint report/classifier.pt --run runs/report    # the weights that the report describes
    python test.py --split train            # on all training paintings, validation paintings included
    python test.py --split all              # on the paintings of train and test
    python test.py --data exhibition        # a root may have test/<Style>/* alone
    python test.py --run runs/wikiart --data /scratch/wikiart

Writes into the run folder: report.txt and report.csv (scores of each class), samples.png (paintings of each class),
confusion.png, mistakes.png, more/regions.png (evidence for the class), more/roc.png, predictions.csv and facts.json.
With --split train or all the names end in _train or _all.
"""

import copy
import csv
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import auc, precision_recall_fscore_support, roc_auc_score, roc_curve

from common import figures
from common.config import Setting, configure
from common.errors import UserError
from common.images import highlight
from common.metrics import (
    LOW_CONFIDENCE,
    METRICS,
    artist_groups,
    bootstrap_scores,
    calibrate,
    calibration_error,
    classification_scores,
    confusion_counts,
    low_confidence,
    mean_interval,
    seen_unseen_accuracy,
)
from common.names import artist_and_title, count, display_name, match_style, printable, safe_cell, stem_of
from common.run import Timer, add_facts, atomic_write, checkpoint_path, claim, pick_device, run_script, write_text
from wikiart import Classifier, WikiArt, check_split

SHARED = ("data", "run", "device", "seed", "processes", "hide")
SETTINGS = {
    "split": Setting(str, ("test", "train", "all"), "which paintings; all: of train and test"),
    "checkpoint": Setting(str, None, "classifier: a file of the run folder, or a path such as report/classifier.pt"),
}
BASELINE = "mlp"  # folder in the run folder whose classifier is the baseline
CONFIDENCE_BANDS = ((90, 101), (75, 90), (50, 75), (0, 50))  # per cent; the last is LOW_CONFIDENCE
MISTAKES = 12  # on the contact sheet
PAINTINGS = {"test": "test painting", "train": "training painting", "all": "training and test painting"}


def main(argv=None):
    config = configure("test", __doc__, SETTINGS, SHARED, argv)
    device, run = pick_device(config.device), Path(config.run)
    suffix = "" if config.split == "test" else f"_{config.split}"
    lock = claim(run, f"test{suffix}")
    classifier = Classifier.load(checkpoint_path(run, config.checkpoint), device)
    data = load_paintings(classifier, config)
    truth = data.labels.numpy()

    timer = Timer()
    raw = classifier.predict_dataset(data, calibrated=False)
    cpu_seconds = timer.seconds()["cpu_seconds"]
    probabilities = calibrate(raw, classifier.temperature).numpy()
    predictions = probabilities.argmax(1)
    facts = {"checkpoint": classifier.hash[:12], "images": len(data), "classes": len(data.classes)}
    facts |= {"left_out": data.left_out, "images_per_cpu_second": len(data) / cpu_seconds}
    facts |= bootstrap_scores(data, predictions, classifier.target, config.seed)
    facts |= compare(classifier, data, config)
    facts["temperature"] = classifier.temperature
    facts["ece_before"] = calibration_error(truth, raw.numpy())
    facts["ece_after"] = calibration_error(truth, probabilities)
    facts |= seen_unseen_accuracy(classifier.checkpoint["artists"], data, predictions)
    facts |= artist_intervals(classifier.checkpoint["artists"], data, predictions, config.seed)
    facts |= without_tta(classifier, data)
    unsure = low_confidence(torch.from_numpy(probabilities)).numpy()
    facts |= confidence_facts(predictions == truth, probabilities.max(1))
    facts |= unknown_style(classifier, probabilities, config)

    facts["roc_auc"] = plot_scores(run, suffix, data, probabilities)
    plot_paintings(run, suffix, data, probabilities, classifier, config)
    scores = class_scores(truth, predictions, data.classes)
    table = write_tables(run, suffix, data, probabilities, unsure, scores)
    facts |= recall_facts(scores)
    add_facts(run, "test" + suffix, facts)
    print("\n" + table)
    print_summary(facts, run, suffix, config.split)
    write_text(run / f"report{suffix}.txt", table)  # last, because make takes this file as the sign of success
    lock.close()


def load_paintings(classifier: Classifier, config) -> WikiArt:
    """The paintings of --split, as the classifier was trained on them. Raises UserError."""
    checkpoint = classifier.checkpoint
    split, processes = config.split, config.processes
    data = WikiArt(config.data, split, classes=classifier.classes, processes=processes, **checkpoint["data"])
    if split != "all":
        check_split(data, checkpoint, config.checkpoint)
    return data


# Scores ---------------------------------------------------------------------------------------------------------------


def compare(classifier: Classifier, data: WikiArt, config) -> dict:
    """Scores of two simpler classifiers: always the largest class of training, and the baseline if it is trained."""
    classes, largest_class = data.classes, classifier.checkpoint["largest_class"]
    predictions = {"majority": np.full(len(data), largest_class)}
    path = checkpoint_path(config.run, BASELINE)
    baseline = Classifier.load(path, classifier.device) if path.exists() else None
    if baseline and baseline.classes == classes:
        predictions["baseline"] = predict_baseline(baseline, classifier, data, config).argmax(1).numpy()
    else:
        command = f"python train.py -c settings/mlp.json --data {config.data} --run {path.parent}"
        print(f"no baseline for these classes in {path.parent}: {command} trains one")
    facts = {"majority_class": classes[largest_class]}
    for name, labels in predictions.items():
        scores = bootstrap_scores(data, labels, classifier.target, config.seed)
        facts |= {f"{name}_{key}": value for key, value in scores.items()}
    return facts


def predict_baseline(baseline: Classifier, classifier: Classifier, data: WikiArt, config):
    """The baseline's class probabilities (N, classes) of the same paintings, at its own image size."""
    if baseline.checkpoint["data"] != classifier.checkpoint["data"]:
        paths = data.paths
        data = load_paintings(baseline, config)
        if list(data.paths) != list(paths):
            raise UserError("the baseline was trained with another split than the classifier: train it again")
    return baseline.predict_dataset(data)


def artist_intervals(known_artists, data: WikiArt, predictions, seed: int) -> dict:
    """95 % intervals of the accuracies that seen_unseen_accuracy() returns, as <name>_low and <name>_high."""
    right, facts = predictions == data.labels.numpy(), {}
    for name, mask in artist_groups(known_artists, data.artists).items():
        low, high = mean_interval(right[mask], data.artists[mask], seed)
        facts |= {f"{name}_artists_accuracy_low": low, f"{name}_artists_accuracy_high": high}
    return facts


def without_tta(classifier: Classifier, data: WikiArt) -> dict:
    """Scores without test-time augmentation, if there is any: on the whole image and its mirror image alone."""
    if classifier.tta_scales == [1.0]:
        return {}
    plain = copy.copy(classifier)
    plain.tta_scales = [1.0]
    predictions = plain.predict_dataset(data, calibrated=False).argmax(1).numpy()
    facts = dict(zip(METRICS, classification_scores(data.labels.numpy(), predictions, len(data.classes)), strict=True))
    facts |= seen_unseen_accuracy(classifier.checkpoint["artists"], data, predictions)
    return {f"without_tta_{name}": value for name, value in facts.items()}


def unknown_style(classifier: Classifier, probabilities, config) -> dict:
    """How unsure the classifier is of paintings of the style of train.py's --holdout, if there is one.

    The area under the ROC curve is the probability that it is surer of a painting of a known style than of one of
    these.
    """
    settings = classifier.checkpoint["data"]
    style = settings.get("holdout", "none")
    if style in ("none", "artists"):
        return {}
    data = WikiArt(config.data, config.split, processes=config.processes, **settings | {"holdout": "none"})
    data = data.subset(np.array([match_style(name, [style]) == style for name in data.styles]))
    if not len(data):
        return {}
    unknown = classifier.predict_dataset(data)
    scores = np.concatenate([probabilities.max(1), unknown.amax(1).numpy()])
    auroc = roc_auc_score(np.arange(len(scores)) < len(probabilities), scores)
    median = unknown.amax(1).median().item()
    share = low_confidence(unknown).float().mean().item()
    print(f"{style}, which it never saw: {share:.0%} unsure; AUROC {auroc:.2f}, median confidence {median:.0%}")
    return {"unknown_auroc": auroc, "unknown_unsure": share, "unknown_confidence": median}


def confidence_facts(right, confidence) -> dict:
    """How many predictions are unsure, and shares of those that are `right` (bool (N,)), by confidence (N,)."""
    sure = confidence >= LOW_CONFIDENCE
    facts = {"unsure": 1 - sure.mean()} | ({"sure_accuracy": right[sure].mean()} if sure.any() else {})
    bands = {f"from_{low}": (confidence >= low / 100) & (confidence < high / 100) for low, high in CONFIDENCE_BANDS}
    bands = {name: right[band] for name, band in bands.items() if band.any()}
    return facts | {"by_confidence": {name: {"images": len(r), "accuracy": r.mean()} for name, r in bands.items()}}


def class_scores(truth, predictions, classes: list[str]) -> list[tuple]:
    """(class, precision, recall, F1, images) of each class."""
    labels = np.arange(len(classes))
    columns = precision_recall_fscore_support(truth, predictions, labels=labels, zero_division=0)
    return [(name, *values) for name, *values in zip(classes, *columns, strict=True)]


def recall_facts(scores: list[tuple]) -> dict:
    """Recalls, precisions and sizes of the classes, and which classes are recognised best and worst."""
    recalls = {name: float(recall) for name, _, recall, _, images in scores if images}
    best, worst = max(recalls, key=recalls.get), min(recalls, key=recalls.get)
    return {
        "best_class": display_name(best),
        "best_recall": recalls[best],
        "worst_class": display_name(worst),
        "worst_recall": recalls[worst],
        "recalls": recalls,
        "precisions": {name: float(precision) for name, precision, *_, images in scores if images},
        "class_sizes": {name: int(images) for name, *_, images in scores},
    }


def write_tables(run, suffix: str, data: WikiArt, probabilities, unsure, scores: list[tuple]) -> str:
    """Write the scores of each class and every prediction as CSV; returns the scores as text."""
    lines = [f"{'class':28} {'precision':>9} {'recall':>9} {'F1':>9} {'images':>9}"]
    lines += [f"{name:28} {p:9.3f} {r:9.3f} {f1:9.3f} {images:9}" for name, p, r, f1, images in scores]
    write_csv(run / f"report{suffix}.csv", ("class", "precision", "recall", "f1", "pictures"), scores)
    rows = [
        (path, data.classes[label], data.classes[row.argmax()], float(row.max()), "unsure" if doubt else "")
        for path, label, row, doubt in zip(data.paths, data.labels, probabilities, unsure, strict=True)
    ]
    write_csv(run / f"predictions{suffix}.csv", ("path", "class", "predicted", "probability", "unsure"), rows)
    return "\n".join(lines) + "\n"


def write_csv(path, header, rows) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)  # file names need not be UTF-8
        writer.writerow(header)
        writer.writerows(
            [f"{cell:.4f}" if isinstance(cell, float) else safe_cell(str(cell)) for cell in row] for row in rows
        )


# Figures --------------------------------------------------------------------------------------------------------------


def plot_scores(run, suffix: str, data: WikiArt, probabilities) -> float:
    """Write the confusion matrix and ROC curves; returns the mean area under the curves."""
    truth, classes = data.labels.numpy(), data.classes
    counts = confusion_counts(truth, probabilities.argmax(1), len(classes))
    title = count(len(data), PAINTINGS[data.split])
    figures.confusion(run / f"confusion{suffix}.png", counts, classes, f"Confusion in %: {title}")

    curves = {}
    for label, name in enumerate(classes):
        if 0 < (truth == label).sum() < len(truth):  # a class without images has no curve
            false_positives, true_positives, _ = roc_curve(truth == label, probabilities[:, label])
            curves[name] = false_positives, true_positives, auc(false_positives, true_positives)
    figures.roc(run / f"more/roc{suffix}.png", curves, f"One class against the others: {PAINTINGS[data.split]}s")
    return float(np.mean([area for *_, area in curves.values()])) if curves else 0.0


def plot_paintings(run, suffix: str, data: WikiArt, probabilities, classifier: Classifier, config) -> None:
    """Write contact sheets: samples of each class, the evidence in some of them, the most confident mistakes."""
    classes, truth = [display_name(name) for name in data.classes], data.labels.numpy()
    predictions, confidence = probabilities.argmax(1), probabilities.max(1)
    showable = data.showable(config.hide)
    shuffled = np.random.default_rng(config.seed).permutation(len(truth))
    by_class = [[row for row in shuffled if truth[row] == label and showable[row]] for label in range(len(classes))]

    def predicted(row):
        return f"predicted {classes[predictions[row]]} {confidence[row]:.0%}"

    per_class = 2 if len(classes) < 12 else 1
    rows = [row for members in by_class for row in members[:per_class]]
    captions = [f"{artist_over_title(data, row)}\n{classes[truth[row]]}" for row in rows]
    sheet = run / f"samples{suffix}.png"
    figures.contact_sheet(sheet, data.pixels[data.rows[rows]], captions, 4, f"Random {PAINTINGS[data.split]}s")

    wrong = [row for row in np.argsort(-confidence, kind="stable") if predictions[row] != truth[row] and showable[row]]
    rows = wrong[:MISTAKES]
    captions = [f"{artist_over_title(data, row)}\nis {classes[truth[row]]}\n{predicted(row)}" for row in rows]
    title = f"The most confident mistakes on {PAINTINGS[data.split]}s" if rows else "No mistakes to show"
    figures.contact_sheet(run / f"mistakes{suffix}.png", data.pixels[data.rows[rows]], captions, 4, title)

    rows = [members[0] for members in by_class[:12] if members]
    images, captions = [], []
    for row in rows:
        pixels = data.pixels[data.rows[row]]
        evidence = classifier.evidence(torch.from_numpy(pixels[None].copy()), truth[row])
        highlighted = highlight(Image.fromarray(pixels.transpose(1, 2, 0)), evidence)
        images += [pixels, np.asarray(highlighted).transpose(2, 0, 1)]
        captions += [artist_over_title(data, row), f"evidence: {classes[truth[row]]}\n{predicted(row)}"]
    title = "Orange: evidence for the painting's class"
    figures.contact_sheet(run / f"more/regions{suffix}.png", images, captions, 4, title)


def artist_over_title(data: WikiArt, row: int) -> str:
    artist, title = artist_and_title(data.artists[row], data.paths[row])
    names = (artist, title or printable(stem_of(data.paths[row])))
    return "\n".join(name if len(name) < 120 else name[:119] + "…" for name in names if name)


def print_summary(facts: dict, run, suffix: str, split: str) -> None:
    print(f"{'':28} {'accuracy':>24} {'balanced accuracy':>24} {'macro-F1':>24}")
    rows = {"classifier": "", "baseline": "baseline_", f"always {facts['majority_class']}": "majority_"}
    for name, prefix in rows.items():
        if prefix + "accuracy" in facts:
            cells = []
            for metric in METRICS:
                value, low, high = (facts[prefix + metric + end] for end in ("", "_low", "_high"))
                cells.append(f"{f'{value:.1%} ({low:.1%} to {high:.1%})':>24}")
            print(f"{name:28} " + " ".join(cells))
    for name in ("seen", "unseen"):
        if f"{name}_artists_accuracy" in facts:
            accuracy, images = facts[f"{name}_artists_accuracy"], facts[f"{name}_artists_images"]
            print(f"artists {name} in training: {accuracy:.1%} of {count(images, 'image')}")
    print(f"expected calibration error {facts['ece_before']:.3f}, with temperature {facts['temperature']:.2f} ", end="")
    print(f"(fitted on validation paintings) {facts['ece_after']:.3f}")
    others = f"; accuracy on the others {facts['sure_accuracy']:.1%}" if "sure_accuracy" in facts else ""
    print(f"unsure of {facts['unsure']:.0%} of the images{others}")
    print(f"\naccuracy {facts['accuracy']:.1%} on {PAINTINGS[split]}s; tables and figures are in {run}/ ", end="")
    print(f"(confusion{suffix}.png, mistakes{suffix}.png, more/roc{suffix}.png, report{suffix}.txt)")


if __name__ == "__main__":
    run_script(main)
