"""Evaluate a trained classifier on test paintings: tables, confusion matrix, ROC curves, its surest mistakes.

    python test.py                       # classifier.pt of the run folder on the test paintings
    python test.py --checkpoint report/classifier.pt --run runs/report    # the weights that the report speaks of
    python test.py --split train         # on all training paintings, the validation part among them
    python test.py --run runs/wikiart --data /scratch/wikiart

Writes into the run folder: report.txt and report.csv (per style), samples.png (paintings of each style), regions.png
(what spoke for their style), confusion.png, confusion_counts.png, roc.png, mistakes.png, predictions.csv and
facts.json; with --split train the names end in _train.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import auc, precision_recall_fscore_support, roc_curve
from tqdm import tqdm

import figures
import runs
from folder import name_of, painter_and_title, readable
from scores import MEASURES, calibration_error, count_pairs, seen_and_unseen, with_intervals
from wikiart import WikiArt, build_model
from windows import calibrate, predict, views

SHARED = ("data", "run", "device", "seed", "processes", "hide")
HELP = {
    "split": ("which paintings", ("test", "train")),
    "checkpoint": "checkpoint to evaluate: a file in the run folder, or a path such as report/classifier.pt",
    "baseline": "folder inside the run folder whose classifier.pt is the baseline (train.py -c mlp.json)",
    "batch_size": "pictures at a time",
    "bootstrap": "resamples behind each 95 % interval",
    "mistakes": "pictures on the contact sheet of mistakes; 0: none",
}


def main(argv=None):
    config = runs.configure("test", __doc__, SHARED, HELP, argv)
    device = runs.pick_device(config.device)
    run = Path(config.run)
    checkpoint = load_classifier(runs.find_checkpoint(run, config.checkpoint))
    classes = checkpoint["classes"]
    data = WikiArt(config.data, config.split, classes=classes, processes=config.processes, **checkpoint["data"])
    if data.pooled and data.fingerprint != checkpoint["fingerprint"]:
        raise runs.Problem("the paintings have changed since training, so that its test part is no longer known: "
                           "train again")  # fmt: skip
    truth = data.labels.numpy()
    raw = classify(checkpoint, data, config, device)
    temperature = checkpoint.get("temperature", 1.0)  # older checkpoints have none
    probabilities = calibrate(torch.from_numpy(raw), temperature).numpy()

    def score(guesses):
        return with_intervals(truth, guesses, len(classes), config.bootstrap, config.seed)

    facts = {"images": len(data), "classes": len(classes), "left_out": data.left_out} | score(probabilities.argmax(1))
    # What a classifier must beat: always naming the class that training has most of, and the baseline.
    largest = checkpoint["largest_class"]
    others = {"majority": score(np.full(len(truth), largest))}
    facts["majority_class"] = classes[largest]
    baseline = run / config.baseline / "classifier.pt"
    fits = baseline.exists() and load_classifier(baseline)["classes"] == classes
    if fits:
        others["baseline"] = score(judge_baseline(baseline, checkpoint, data, config, device).argmax(1))
    else:
        command = f"python train.py -c mlp.json --data {config.data} --run {baseline.parent}"
        print(f"no baseline for these classes in {baseline.parent}: {command} trains one")
    facts |= {f"{who}_{name}": value for who, named in others.items() for name, value in named.items()}
    facts |= {"temperature": temperature, "ece_before": calibration_error(truth, raw),
              "ece_after": calibration_error(truth, probabilities)}  # fmt: skip
    facts |= seen_and_unseen(checkpoint["artists"], data, probabilities.argmax(1))

    suffix = "" if config.split == "test" else "_train"
    facts |= draw_figures(run, suffix, data, truth, probabilities, classes, config)
    draw_paintings(run, suffix, data, truth, probabilities, checkpoint, config)
    lines, best_and_worst = write_tables(run, suffix, data, truth, probabilities, classes)
    facts = {
        key: round(value, 5) if isinstance(value, float) else value for key, value in (facts | best_and_worst).items()
    }
    runs.add_facts(run, "test" + suffix, facts)
    print_summary(facts, lines, run, suffix, config.split)
    runs.write_text(run / f"report{suffix}.txt", "\n".join(lines) + "\n")  # last: it tells make that all is there


def load_classifier(path) -> dict:
    checkpoint = runs.load_checkpoint(path)
    if "windows" not in checkpoint:
        raise runs.Problem(f"{path} holds a {checkpoint['model']}, not a classifier of train.py")
    return checkpoint


def judge_baseline(path, checkpoint, data, config, device) -> np.ndarray:
    """The baseline's class probabilities on the same paintings."""
    other = load_classifier(path)
    if other["data"] != checkpoint["data"]:
        same = WikiArt(config.data, config.split, classes=other["classes"], processes=config.processes, **other["data"])
        if list(same.paths) != list(data.paths):
            raise runs.Problem(f"{path} was trained with another split than the classifier: train it again")
        data = same
    return classify(other, data, config, device)


def classify(checkpoint, data, config, device) -> np.ndarray:
    """Class probabilities, float (N, classes), of every painting as it is: not resampled, not augmented."""
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    outputs = []
    with tqdm(total=len(data), desc=f"{checkpoint['model']} on {data.split}", unit="picture") as bar:
        for items in torch.arange(len(data)).split(config.batch_size):
            with runs.autocast(device):
                pixels, _ = data.batch(items, device)
                outputs.append(predict(model, pixels, checkpoint["crop"], checkpoint["windows"]).float().cpu())
            bar.update(len(items))
    return torch.cat(outputs).numpy()


def write_tables(run, suffix, data, truth, probabilities, classes) -> tuple[list[str], dict]:
    """Scores per class and every prediction, as CSV; returns the first as lines, and its best and worst class."""
    guesses = probabilities.argmax(1)
    columns = precision_recall_fscore_support(truth, guesses, labels=np.arange(len(classes)), zero_division=0)
    rows = [(name, *values) for name, *values in zip(classes, *columns, strict=True)]
    lines = [f"{'class':28} {'precision':>9} {'recall':>9} {'F1':>9} {'pictures':>9}"]
    lines += [f"{name:28} {p:9.3f} {r:9.3f} {f:9.3f} {n:9}" for name, p, r, f, n in rows]
    with runs.replacing(run / f"report{suffix}.csv") as path:
        write_csv(path, ("class", "precision", "recall", "f1", "pictures"), rows)
    said = ((classes[label], classes[guess], row[guess]) for label, guess, row in
            zip(truth, guesses, probabilities, strict=True))  # fmt: skip
    with runs.replacing(run / f"predictions{suffix}.csv") as path:
        named = ((file, *rest) for file, rest in zip(data.paths, said, strict=True))
        write_csv(path, ("path", "class", "predicted", "probability"), named)
    there = [(figures.plain(name), recall) for name, _, recall, _, number in rows if number]
    best, worst = (chosen(there, key=lambda row: row[1]) for chosen in (max, min))
    recalls = {name: round(float(recall), 4) for name, _, recall, _, number in rows if number}
    extremes = {"best_class": best[0], "best_recall": best[1], "worst_class": worst[0], "worst_recall": worst[1]}
    extremes = {key: value if isinstance(value, str) else float(value) for key, value in extremes.items()}
    numbers = {name: int(number) for name, *_, number in rows}
    return lines, extremes | {"recalls": recalls, "class_sizes": numbers}


def write_csv(path, header, rows) -> None:
    with open(path, "w", newline="", errors="surrogateescape") as file:  # file names need not be UTF-8
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows)


def draw_figures(run, suffix, data, truth, probabilities, classes, config) -> dict:
    """Confusion matrices and ROC curves; returns the mean area under the ROC curves."""
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

    return {"roc_auc": float(np.mean([area for *_, area in lines.values()])) if lines else 0.0}


def draw_paintings(run, suffix, data, truth, probabilities, checkpoint, config) -> None:
    """Contact sheets: some paintings of each class, what spoke for their class in one of them, the surest mistakes."""
    classes, guesses = [figures.plain(name) for name in checkpoint["classes"]], probabilities.argmax(1)
    sure, fit = probabilities[np.arange(len(truth)), guesses], data.fit_to_show(config.hide)
    drawn = np.random.default_rng(config.seed).permutation(len(truth))  # neither the best nor the most beautiful
    each = [[row for row in drawn if truth[row] == label and fit[row]] for label in range(len(classes))]

    def sheet(name, pictures, captions, columns, title):
        figures.contact_sheet(run / f"{name}{suffix}.png", pictures, captions, columns, title)

    def told(row):
        return f"said {classes[guesses[row]]} {sure[row]:.0%}"

    rows = [row for own in each for row in own[: 2 if len(classes) < 12 else 1]]
    captions = [f"{name_and_title(data, row)}\n{classes[truth[row]]}" for row in rows]
    sheet("samples", data.pixels[data.rows[rows]], captions, 4, f"Some of the {config.split} paintings")

    wrong = [row for row in np.argsort(-sure, kind="stable") if guesses[row] != truth[row] and fit[row]]
    wrong = wrong[: config.mistakes]
    captions = [f"{name_and_title(data, row)}\nis {classes[truth[row]]}\n{told(row)}" for row in wrong]
    title = f"The surest mistakes on {config.split} paintings" if wrong else "No mistakes to show"
    sheet("mistakes", data.pixels[data.rows[wrong]], captions, 4, title)

    if checkpoint["model"] == "CNN":
        model, pictures, captions = build_model(checkpoint), [], []
        for row in (own[0] for own in each[:12] if own):
            pixels = data.pixels[data.rows[row]]
            view = views(torch.from_numpy(pixels[None].copy()), checkpoint["crop"])[0]
            evidence = model.evidence(view, truth[row]).numpy()
            lit = figures.highlight(Image.fromarray(pixels.transpose(1, 2, 0)), evidence)
            pictures += [pixels, np.asarray(lit).transpose(2, 0, 1)]
            captions += [name_and_title(data, row), f"for {classes[truth[row]]}\n{told(row)}"]
        sheet("regions", pictures, captions, 4, "Orange: what spoke for the painting's own style")


def name_and_title(data, row: int) -> str:
    painter, title = painter_and_title(data.artists[row], data.paths[row])
    return f"{short(painter)}\n{short(title or readable(name_of(data.paths[row])))}"


def short(text: str) -> str:
    return text if len(text) < 28 else text[:26].rstrip() + "…"


def print_summary(facts, lines, run, suffix, split) -> None:
    print("\n" + "\n".join(lines) + "\n")
    print(f"{'':28} {'accuracy':>24} {'balanced accuracy':>24} {'macro-F1':>24}")
    rows = {"classifier": "", "baseline": "baseline_", f"always {facts['majority_class']}": "majority_"}
    for name, prefix in rows.items():
        if prefix + "accuracy" in facts:
            cells = [
                "{:.1%} ({:.1%} to {:.1%})".format(*(facts[f"{prefix}{key}{end}"] for end in ("", "_low", "_high")))
                for key in MEASURES
            ]
            print(f"{name:28} " + " ".join(f"{cell:>24}" for cell in cells))
    for name in ("seen", "unseen"):
        if f"{name}_artists_accuracy" in facts:
            print(f"artists {name} in training: {facts[f'{name}_artists_accuracy']:.1%} of "
                  f"{facts[f'{name}_artists_images']} pictures")  # fmt: skip
    print(f"probabilities are off by {facts['ece_before']:.3f} on average (expected calibration error); with the "
          f"temperature {facts['temperature']:.2f} of the validation part by {facts['ece_after']:.3f}")  # fmt: skip
    print(f"\n{split} accuracy {facts['accuracy']:.1%}; tables and figures are in {run}/ (confusion{suffix}.png, "
          f"roc{suffix}.png, mistakes{suffix}.png, report{suffix}.txt)")  # fmt: skip


if __name__ == "__main__":
    runs.start(main)
