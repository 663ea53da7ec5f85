"""Metrics. Classes are numbers; `truth` and `predictions` are int64 arrays (N,)."""

import numpy as np
import torch
import torch.nn.functional as F

from common.splits import connected_groups

METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
LOW_CONFIDENCE = 0.5
BOOTSTRAP = 1000  # resamples behind each 95 % interval
FEW_ARTISTS = 10  # fewer are too few to resample; of files named img_1.jpg, img_2.jpg, the artist would be "img"

# Classification -------------------------------------------------------------------------------------------------------


def confusion_counts(truth, predictions, classes: int) -> np.ndarray:
    """Confusion matrix, int64 (true class, predicted class)."""
    return np.bincount(truth * classes + predictions, minlength=classes**2).reshape(classes, classes)


def classification_scores(truth, predictions, classes: int) -> tuple[float, float, float]:
    """The three METRICS; means over classes take those that occur in the truth."""
    return scores_of_counts(confusion_counts(truth, predictions, classes))


def scores_of_counts(counts) -> tuple[float, float, float]:
    """The three METRICS of a confusion matrix (true class, predicted class)."""
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    present = true > 0
    recall = hits[present] / true[present]
    f1 = 2 * hits[present] / (true[present] + predicted[present])
    return hits.sum() / counts.sum(), recall.mean(), f1.mean()


def balanced_accuracy(truth, predictions) -> float:
    """The mean over classes of the fraction of each class that is predicted correctly; tensors or arrays (N,)."""
    truth, predictions = np.asarray(truth), np.asarray(predictions)
    return float(classification_scores(truth, predictions, int(max(truth.max(), predictions.max())) + 1)[1])


def class_balanced_mean(values, labels) -> float:
    """The mean over classes of the mean of each class's values; tensors or arrays (N,)."""
    values, labels = np.asarray(values, np.float64), np.asarray(labels)
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def bootstrap_samples(artists, seed: int):
    """Yield BOOTSTRAP times how often each painting is drawn, int64 (N,), for 95 % intervals.

    Paintings by one artist are alike, so whole artists (N,) are drawn (cluster bootstrap, Davison and Hinkley 1997);
    but single paintings where artists are unknown, "", or fewer than FEW_ARTISTS.
    """
    _, group = np.unique(connected_groups(artists), return_inverse=True)
    if group.max() + 1 < FEW_ARTISTS:
        group = np.arange(len(group))
    groups = group.max() + 1
    for drawn in np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), BOOTSTRAP):
        yield drawn[group]


def bootstrap_scores(data, predictions, target: str, seed: int) -> dict:
    """The three METRICS, each with its 95 % bootstrap interval as <metric>_low and <metric>_high (percentiles).

    Single paintings are drawn where artists are the classes, the `target`. Where a class has one or two artists, it is
    missing from many samples, and the intervals of means over classes say little.
    """
    truth, classes = data.labels.numpy(), len(data.classes)
    artists = np.full(len(truth), "") if target == "artist" else data.artists
    facts = dict(zip(METRICS, classification_scores(truth, predictions, classes), strict=True))
    cells, scores = truth * classes + predictions, []
    for drawn in bootstrap_samples(artists, seed):
        counts = np.bincount(cells, drawn, classes**2).reshape(classes, classes)
        scores.append(scores_of_counts(counts))
    for name, low, high in zip(METRICS, *np.percentile(scores, (2.5, 97.5), axis=0), strict=True):
        facts |= {f"{name}_low": low, f"{name}_high": high}
    return facts


def mean_interval(values, artists, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval (percentiles) of the mean of `values` (N,) of paintings by `artists` (N,)."""
    means = [np.average(values, weights=drawn) for drawn in bootstrap_samples(artists, seed)]
    return tuple(np.percentile(means, (2.5, 97.5)))


def artist_groups(known_artists, artists) -> dict[str, np.ndarray]:
    """Masks of paintings by artists (N,) who are in the training set, "seen", and by artists who are not, "unseen".

    The first may be recognised by their hand, the second cannot be. Unknown artists, "", are in neither; a group
    without paintings is left out.
    """
    seen, known = np.isin(artists, known_artists), artists != ""
    groups = {"seen": seen & known, "unseen": ~seen & known}
    return {name: mask for name, mask in groups.items() if mask.any()}


def seen_unseen_accuracy(known_artists, data, predictions) -> dict:
    """Accuracy on paintings of either of the artist_groups."""
    truth, facts = data.labels.numpy(), {}
    for name, mask in artist_groups(known_artists, data.artists).items():
        facts[f"{name}_artists_images"] = int(mask.sum())
        facts[f"{name}_artists_accuracy"] = (predictions == truth)[mask].mean()
        facts[f"{name}_artists_balanced_accuracy"] = balanced_accuracy(truth[mask], predictions[mask])
    return facts


# Calibration ----------------------------------------------------------------------------------------------------------


def calibration_error(truth, probabilities, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): the gap between confidence and accuracy, in bins."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == truth
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(number, correct - confidence, bins)  # summed over the paintings of each bin
    return float(np.abs(gaps).sum() / len(truth))


def log_probabilities(probabilities):
    return probabilities.float().clamp_min(1e-9).log()


def calibrate(probabilities, temperature: float):
    """Probabilities (B, classes), sharper at temperatures below 1, flatter above (Guo et al. 2017); the order stays."""
    return (log_probabilities(probabilities) / temperature).softmax(1)


def fit_temperature(probabilities, labels) -> float:
    """The temperature at which validation probabilities (N, classes) fit their labels (N,) best, by class-balanced NLL.

    Labels are smoothed by 1 / (N + 2) (Platt 1999): without this, the best temperature of a network
    without mistakes is 0.
    """
    logs, weights = log_probabilities(probabilities), 1 / torch.bincount(labels)[labels]

    def loss(temperature):
        logits, smoothing = logs / temperature, 1 / (len(labels) + 2)
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return (weights * losses).sum().item()

    return min(torch.logspace(-2, 1, 301).tolist(), key=loss)


def low_confidence(probabilities):
    """Where the likeliest class has less than half of the calibrated probability (N, classes), bool (N,).

    It is then more likely wrong than right. Pictures of none of the classes may get a higher one.
    """
    return probabilities.amax(1) < LOW_CONFIDENCE


def negative_log_likelihood(probabilities, labels):
    """-log of the probability (N, classes) of each label (N,), at most 21."""
    return F.nll_loss(log_probabilities(probabilities), labels, reduction="none")


# Images, float (N, 3, S, S) in [0, 1] ---------------------------------------------------------------------------------


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB, of a mean squared error of pixels in [0, 1]; 3 dB more are half the error."""
    return float(-10 * np.log10(max(mse, 1e-12)))


def luminance(images):
    """Luminance (N, 1, S, S), by the weights of ITU-R BT.601."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def layout(images, side: int = 16):
    """Coarse luminance as unit vectors (N, side * side): the dot product of two is their correlation."""
    coarse = F.adaptive_avg_pool2d(luminance(images), side).flatten(1)
    coarse = coarse - coarse.mean(1, keepdim=True)
    return coarse / (coarse.norm(dim=1, keepdim=True) + 1e-4)


def ssim(x, y):
    """Structural similarity of luminance (Wang et al. 2004), (N,): 1 for equal images."""
    offsets = torch.arange(11) - 5
    gaussian = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = (gaussian[:, None] * gaussian / gaussian.sum() ** 2).view(1, 1, 11, 11)
    x, y = luminance(x), luminance(y)
    mean_x, mean_y, xx, yy, xy = (F.conv2d(maps, kernel) for maps in (x, y, x * x, y * y, x * y))
    contrast = (2 * (xy - mean_x * mean_y) + 0.03**2) / (xx - mean_x**2 + yy - mean_y**2 + 0.03**2)
    return (contrast * (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)).mean((1, 2, 3))


def position_deviation(images, originals, side: int = 8) -> float:
    """Do images of one style have the same colours in the same places? The mean over positions of a coarse grid of how
    far the mean change there, over all images, is from the mean change anywhere; in [0, 1]."""
    change = F.adaptive_avg_pool2d(images - originals, side).mean(0)
    return (change - change.mean((1, 2), keepdim=True)).abs().mean().item()


def principal_directions(features, count: int = 64):
    """Mean (D,) and the `count` directions (D, count) of largest variance of features (N, D)."""
    mean = features.mean(0)
    _, vectors = torch.linalg.eigh((features - mean).T.double() @ (features - mean).double())
    return mean, vectors[:, -count:].to(features.dtype)


def frechet_distance(x, y) -> float:
    """Fréchet distance of Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017)."""
    x, y = x.double(), y.double()
    cov_x, cov_y = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()
