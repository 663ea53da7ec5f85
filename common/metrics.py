"""How good a result is: the measures that several scripts share. Classes are numbers; guesses and truth int64 (N,)."""

import numpy as np
import torch
import torch.nn.functional as F

from losses import luminance

MEASURES = ("accuracy", "balanced_accuracy", "macro_f1")


def with_intervals(truth, guesses, classes: int, resamples: int, seed: int) -> dict:
    """Accuracy, balanced accuracy and macro-F1, each with its 95 % bootstrap interval (percentiles)."""
    random = np.random.default_rng(seed)
    facts = dict(zip(MEASURES, measures(truth, guesses, classes), strict=True))
    drawn = random.integers(len(truth), size=(resamples, len(truth)))
    table = np.array([measures(truth[rows], guesses[rows], classes) for rows in drawn])
    for name, low, high in zip(MEASURES, *np.percentile(table, (2.5, 97.5), axis=0), strict=True):
        facts |= {f"{name}_low": low, f"{name}_high": high}
    return {name: float(value) for name, value in facts.items()}


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


def seen_and_unseen(known, data, guesses) -> dict:
    """Accuracy on paintings by the artists that training knows (`known`), and by artists that it does not.

    The first may be painter recognition in part, the second cannot be. The two groups hold different paintings.
    """
    facts, right = {}, guesses == data.labels.numpy()
    seen = np.isin(data.artists, known)
    for name, chosen in (("seen", seen), ("unseen", ~seen & (data.artists != ""))):
        if chosen.any():
            recalls = [right[chosen & (data.labels.numpy() == label)] for label in np.unique(data.labels[chosen])]
            facts[f"{name}_artists_images"] = int(chosen.sum())
            facts[f"{name}_artists_accuracy"] = float(right[chosen].mean())
            facts[f"{name}_artists_balanced_accuracy"] = float(np.mean([recall.mean() for recall in recalls]))
    return facts


def calibration_error(truth, probabilities, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): how far the share that is right lies from the probability that was
    given, as a mean over paintings in bins of like probability."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == truth
    number = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = np.bincount(number, right - sure, bins)  # of each bin, times its paintings
    return float(np.abs(gaps).sum() / len(truth))


def similarity(one, other):
    """Structural similarity (Wang et al. 2004) of luminances, (N,): 1 for equal pictures (N, 3, S, S)."""
    places = torch.arange(11) - 5
    bell = torch.exp(-(places**2) / (2 * 1.5**2))
    kernel = (bell[:, None] * bell / bell.sum() ** 2).view(1, 1, 11, 11)
    x, y = luminance(one), luminance(other)
    mx, my, xx, yy, xy = (F.conv2d(each, kernel) for each in (x, y, x * x, y * y, x * y))
    contrast = (2 * (xy - mx * my) + 0.03**2) / (xx - mx**2 + yy - my**2 + 0.03**2)
    return (contrast * (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)).mean((1, 2, 3))
