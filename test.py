"""Evaluate a trained classifier on test paintings: tables, confusion matrix, ROC curves, its surest mistakes.

    python test.py                       # classifier.pt of the run folder on the test paintings
    python test.py --split train         # on training paintings: how much is learned by heart?
    python test.py --run runs/wikiart --data /scratch/wikiart

Writes into the run folder: report.txt and report.csv (per style), confusion.png, confusion_counts.png, roc.png,
mistakes.png, predictions.csv and facts.json; with --split train the names end in _train.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import auc, precision_recall_fscore_support, roc_curve
from tqdm import tqdm

import figures
import runs
from wikiart import WikiArt, build_model, predict, title_of

HELP = {
    "split": ("which paintings", ("test", "train")),
    "checkpoint": "checkpoint to evaluate, in the run folder",
    "baseline": "folder inside the run folder whose classifier.pt is the baseline (train.py --model MLP)",
    "batch_size": "pictures at a time",
    "bootstrap": "resamples behind each 95 % interval",
    "mistakes": "pictures on the contact sheet of mistakes",
}


def main(argv=None):
    config = runs.configure("test", __doc__, HELP, argv)
    device = runs.pick_device(config.device)
    run = Path(config.run)
    checkpoint = runs.load_checkpoint(run / config.checkpoint)
    classes = checkpoint["classes"]
    data = WikiArt(config.data, config.split, classes=classes, processes=config.processes, **checkpoint["data"])
    truth = data.labels.numpy()
    probabilities = classify(checkpoint, data, config, device)

    facts = {"images": len(data), "classes": len(classes)}
    facts |= scores(truth, probabilities.argmax(1), len(classes), config.bootstrap, config.seed)
    # Always the class that training has most of: what a classifier must beat.
    largest = checkpoint["largest_class"]
    facts |= {"majority_class": classes[largest], "majority_accuracy": (truth == largest).mean()}
    baseline = run / config.baseline / "classifier.pt"
    if baseline.exists():
        other = runs.load_checkpoint(baseline)
        if other["classes"] != classes:
            raise runs.Problem(f"{baseline} knows other styles than {run / config.checkpoint}: train it again")
        if other["data"] != checkpoint["data"]:
            data = WikiArt(config.data, config.split, classes=classes, processes=config.processes, **other["data"])
        guesses = classify(other, data, config, device).argmax(1)
        named = scores(truth, guesses, len(classes), config.bootstrap, config.seed)
        facts |= {f"baseline_{name}": value for name, value in named.items()}

    suffix = "" if config.split == "test" else "_train"
    facts |= write_tables(run, suffix, data, truth, probabilities, classes)
    facts |= draw_figures(run, suffix, data, truth, probabilities, classes, config)
    runs.add_facts(run, "test" + suffix, {k: round(v, 5) if isinstance(v, float) else v for k, v in facts.items()})
    print_summary(facts, run, suffix, config.split)


def classify(checkpoint, data, config, device) -> np.ndarray:
    """Class probabilities, float (N, classes), of every painting as it is: not resampled, not augmented."""
    model = build_model(checkpoint).to(device)
    outputs = []
    with tqdm(total=len(data), desc=f"{checkpoint['model']} on {data.split}", unit="picture") as bar:
        for pixels, _ in data.batches(np.arange(len(data)), config.batch_size, device):
            with runs.autocast(device):
                outputs.append(predict(model, pixels, checkpoint["crop"]).float().cpu())
            bar.update(len(pixels))
    return torch.cat(outputs).numpy()


def scores(truth, guesses, classes: int, resamples: int, seed: int) -> dict:
    """Accuracy, balanced accuracy and macro-F1, each with its 95 % bootstrap interval (percentiles)."""
    random = np.random.default_rng(seed)
    facts = dict(zip(MEASURES, measures(truth, guesses, classes), strict=True))
    drawn = random.integers(len(truth), size=(resamples, len(truth)))
    table = np.array([measures(truth[rows], guesses[rows], classes) for rows in drawn])
    for name, low, high in zip(MEASURES, *np.percentile(table, (2.5, 97.5), axis=0), strict=True):
        facts |= {f"{name}_low": low, f"{name}_high": high}
    return {name: float(value) for name, value in facts.items()}


MEASURES = ("accuracy", "balanced_accuracy", "macro_f1")


def measures(truth, guesses, classes: int) -> tuple[float, float, float]:
    """The three of MEASURES; means over classes take those that occur in the truth."""
    counts = count_pairs(truth, guesses, classes)
    hits, true, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    there = true > 0
    recall = hits[there] / true[there]
    f1 = 2 * hits[there] / (true[there] + said[there])
    return hits.sum() / len(truth), recall.mean(), f1.mean()


def count_pairs(truth, guesses, classes: int) -> np.ndarray:
    """Confusion matrix, int64 (true, predicted)."""
    return np.bincount(truth * classes + guesses, minlength=classes**2).reshape(classes, classes)


def write_tables(run, suffix, data, truth, probabilities, classes) -> dict:
    """Precision, recall and F1 per class as text and CSV, and every prediction; returns the best and worst class."""
    guesses = probabilities.argmax(1)
    labels = np.arange(len(classes))
    columns = precision_recall_fscore_support(truth, guesses, labels=labels, zero_division=0)
    rows = [(name, *values) for name, *values in zip(classes, *columns, strict=True)]
    lines = [f"{'style':28} {'precision':>9} {'recall':>9} {'F1':>9} {'pictures':>9}"]
    lines += [f"{name:28} {p:9.3f} {r:9.3f} {f:9.3f} {n:9}" for name, p, r, f, n in rows]
    runs.write_text(run / f"report{suffix}.txt", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + "\n")
    with runs.replacing(run / f"report{suffix}.csv") as path, open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("style", "precision", "recall", "f1", "pictures"))
        writer.writerows((name, f"{p:.4f}", f"{r:.4f}", f"{f:.4f}", n) for name, p, r, f, n in rows)
    with runs.replacing(run / f"predictions{suffix}.csv") as path, open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "style", "predicted", "probability"))
        for path, label, guess, row in zip(data.paths, truth, guesses, probabilities, strict=True):
            writer.writerow((path, classes[label], classes[guess], f"{row[guess]:.4f}"))
    there = [row for row in rows if row[4]]
    best, worst = max(there, key=lambda row: row[2]), min(there, key=lambda row: row[2])
    return {
        "best_class": best[0],
        "best_recall": float(best[2]),
        "worst_class": worst[0],
        "worst_recall": float(worst[2]),
    }


def draw_figures(run, suffix, data, truth, probabilities, classes, config) -> dict:
    """Confusion matrices, ROC curves and the surest mistakes; returns the mean area under the ROC curves."""
    guesses = probabilities.argmax(1)
    counts = count_pairs(truth, guesses, len(classes))
    title = f"{config.split} paintings, {len(data)} in all"
    figures.confusion(run / f"confusion{suffix}.png", counts, classes, f"Confusion in %: {title}", True)
    figures.confusion(run / f"confusion_counts{suffix}.png", counts, classes, f"Confusion: {title}", False)

    lines = {}
    for label, name in enumerate(classes):
        if 0 < (truth == label).sum() < len(truth):  # a class without pictures has no curve
            false, true, _ = roc_curve(truth == label, probabilities[:, label])
            lines[name] = false, true, auc(false, true)
    figures.roc(run / f"roc{suffix}.png", lines, f"One style against the rest: {config.split} paintings")

    sure = probabilities[np.arange(len(truth)), guesses]
    shown = (guesses != truth) & data.fit_to_show(config.hide)
    chosen = [row for row in np.argsort(-sure, kind="stable") if shown[row]][: config.mistakes]
    captions = [
        f"{data.artists[row].replace('-', ' ')[:26]}\n{title_of(data.paths[row])[:26]}\n"
        f"is {figures.plain(classes[truth[row]])}\nsaid {figures.plain(classes[guesses[row]])} {sure[row]:.0%}"
        for row in chosen
    ]
    if chosen:
        pictures = data.pixels[data.rows[chosen]]
        title = f"The surest mistakes on {config.split} paintings"
        figures.contact_sheet(run / f"mistakes{suffix}.png", pictures, captions, 6, title)
    return {"roc_auc": float(np.mean([area for *_, area in lines.values()])) if lines else 0.0}


def print_summary(facts, run, suffix, split) -> None:
    print(f"{'':18} {'accuracy':>24} {'balanced accuracy':>24} {'macro-F1':>24}")
    for name, prefix in (("classifier", ""), ("baseline", "baseline_")):
        if prefix + "accuracy" in facts:
            cells = [
                "{:.1%} ({:.1%} to {:.1%})".format(*(facts[f"{prefix}{key}{end}"] for end in ("", "_low", "_high")))
                for key in MEASURES
            ]
            print(f"{name:18} " + " ".join(f"{cell:>24}" for cell in cells))
    print(f"{'always ' + facts['majority_class']:18} {facts['majority_accuracy']:24.1%}")
    print(f"\n{split} accuracy {facts['accuracy']:.1%}; tables and figures are in {run}/ (confusion{suffix}.png, "
          f"roc{suffix}.png, mistakes{suffix}.png, report{suffix}.txt)")  # fmt: skip


if __name__ == "__main__":
    runs.start(main)
