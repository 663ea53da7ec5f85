"""Do art styles cluster? Group the codes of paintings without their labels, then compare the groups with the styles.

    python cluster.py                                   # the codes of autoencoder.pt in the run folder
    python cluster.py --codes classifier                # or: pixels, colours, features made by embed.py, and manner
    python train_autoencoder.py --manner-weight 0.15 --run runs/demo/manner    # what manner needs
    python cluster.py --codes all                       # every source that is there, in one table: the answer
    python cluster.py --method hdbscan                  # kmeans, agglomerative, gaussian or hdbscan

Codes are standardised, reduced by PCA and grouped into as many clusters as there are styles. Writes into the run
folder: codes/<source>.npz (codes, labels, artists and paths of the training and test paintings), clusters.md (the
table) and facts.json; of each source tsne_<source>.png, pca_<source>.png, clusters_<source>.png (style by cluster),
centroids_<source>.png (the paintings nearest to each centre), map_<source>.png and k_<source>.png. Beside the sheets of
paintings stand painters and titles, in centroids_<source>.txt and map_<source>.txt, in the order in which one reads.
"""

import hashlib
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA, IncrementalPCA, TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    completeness_score,
    homogeneity_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import figures
import runs
from wikiart import WikiArt, build_model
from windows import over_views, views

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes", "hide")
METHODS = {"kmeans": "KMeans", "agglomerative": "Ward", "gaussian": "Gaussian mixture", "hdbscan": "HDBSCAN"}
HELP = {
    "codes": "sources: autoencoder, manner, classifier, pixels, colours, or a backbone of embed.py; all: what is there",
    "split": ("paintings to cluster", ("test", "train")),
    "method": ("how to cluster", tuple(METHODS)),
    "clusters": "number of clusters; 0: as many as there are styles",
    "components": "principal components that are clustered and drawn",
    "tsne_images": "paintings that t-SNE lays out, at most; of more a random choice",
    "batch_size": "pictures at a time",
    "renew": "make the codes again, even where they are there",
}
CHECKPOINTS = {  # in the run folder: the file, what it holds, and the method that makes codes of images
    "autoencoder": ("autoencoder.pt", "Autoencoder", "encode"),
    "manner": ("manner/autoencoder.pt", "Autoencoder", "features"),
    "classifier": ("classifier.pt", "CNN", "features"),
}
PIXELS = 64  # side of the pictures that pixels and colours are taken from


def main(argv=None):
    config = runs.configure("cluster", __doc__, SHARED, HELP, argv)
    device = runs.pick_device(config.device)
    run = Path(config.run)
    sources, made = config.codes, []
    if sources == ["all"]:
        there = [source for source, (name, model, _) in CHECKPOINTS.items()
                 if (run / name).exists() and runs.load_checkpoint(run / name)["model"] == model]  # fmt: skip
        made = sorted(path.stem for path in (run / "codes").glob("*.npz") if path.stem not in CHECKPOINTS)
        sources = list(dict.fromkeys([*there, "pixels", "colours", *made]))
    if not sources:
        raise runs.Problem("--codes needs a source, or all")
    for source in sources:
        try:
            table, data = codes_of(source, config, device)
        except runs.Problem as problem:
            if source not in made:  # these only embed.py can make again
                raise
            print(f"left out: {problem}")
            continue
        print(f"{source}: {table['train'].shape[1]} numbers a painting", flush=True)
        facts = study(source, table, data, config)
        runs.add_facts(run, "cluster", {re.sub(r"\W", "_", source): facts}, merge=True)
    setting, known = facts["setting"], json.loads((run / "facts.json").read_text())["cluster"]
    alike = {source: found for source, found in known.items() if found.get("setting") == setting}
    write_table(run / "clusters.md", alike)


# Codes ----------------------------------------------------------------------------------------------------------------


def codes_of(source: str, config, device) -> tuple[dict, WikiArt]:
    """The codes of one source, made where they are not there yet, and the paintings that are clustered.

    {"train": (N, D), "test": (M, D), "train_labels": (N,), "test_labels": (M,), ...artists, ...paths, "classes",
    "made_from": what the codes depend on}.
    """
    path = Path(config.run) / "codes" / f"{source}.npz"
    settings = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    checkpoint, identity = None, f"{settings}"
    if source in CHECKPOINTS:
        weights = Path(config.run) / CHECKPOINTS[source][0]
        checkpoint = runs.load_checkpoint(weights, CHECKPOINTS[source][1])
        identity = hashlib.sha256(weights.read_bytes()).hexdigest()
        settings = {key: checkpoint["data"][key] for key in settings}
        if checkpoint["data"].get("holdout", "none") != "none":
            raise runs.Problem(
                f"{weights} was trained with --holdout, on a part of the test folder too: train it without"
            )
    elif source not in ("pixels", "colours") and not path.exists():
        raise runs.Problem(f"no codes {path}: give {', '.join(CHECKPOINTS)}, pixels, colours, or run embed.py first")
    sets = {split: WikiArt(config.data, split, processes=config.processes, **settings) for split in ("train", "test")}
    made_from = " ".join([identity, *(data.fingerprint for data in sets.values())])
    if path.exists() and not (config.renew and source in (*CHECKPOINTS, "pixels", "colours")):
        try:
            with np.load(path) as file:
                table = dict(file)
            table["made_from"], table["train_labels"], table["test_labels"]  # noqa: B018
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise runs.Problem(f"{path} is not a file of codes: remove it, and make it again") from None
        if source in (*CHECKPOINTS, "pixels", "colours") and table["made_from"] != made_from:
            raise runs.Problem(
                f"{path} was made from another checkpoint or other paintings: make it again with --renew"
            )
    else:
        table = {"classes": np.array(sets["train"].classes), "made_from": made_from}
        encode = encoder(source, checkpoint, sets["train"], config, device)
        for split, data in sets.items():
            table[split] = in_batches(encode, data, config, device)
            table |= {f"{split}_labels": data.labels.numpy(), f"{split}_artists": data.artists,
                      f"{split}_paths": data.paths}  # fmt: skip
        with runs.replacing(path) as temporary:
            np.savez(temporary, **table)
    data = sets[config.split]
    if list(table[f"{config.split}_paths"]) != list(data.paths):
        raise runs.Problem(f"{path} was made from other paintings: remove it, and make it again")
    for split in sets:
        if not np.isfinite(table[split]).all():
            raise runs.Problem(f"{path} holds numbers that are not finite: train again with lower learning rates")
    return table, data


def encoder(source, checkpoint, training, config, device):
    """A function from pixels uint8 (B, 3, S, S) to codes (B, D)."""
    if source == "pixels":
        pca = IncrementalPCA(min(256, len(training)))
        for items in torch.arange(len(training)).chunk(max(1, len(training) // 256)):
            pca.partial_fit(small(training.batch(items, torch.device("cpu"))[0]).flatten(1).numpy())
        return lambda pixels: torch.from_numpy(pca.transform(small(pixels).flatten(1).numpy()))
    if source == "colours":
        return lambda pixels: colours(small(pixels))
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    code, crop = getattr(model, CHECKPOINTS[source][2]), checkpoint["crop"]
    if source == "autoencoder":  # a code is of one picture: the mean of two decodes to neither
        return lambda pixels: code(views(pixels.to(device), crop)[0])
    return lambda pixels: over_views(code, pixels.to(device), crop, [1.0, 0.7])


@torch.no_grad()
def in_batches(encode, data, config, device) -> np.ndarray:
    """Codes of all paintings, float32 (N, D); only they grow with the number of paintings."""
    codes = None
    for items in tqdm(torch.arange(len(data)).split(config.batch_size), f"coding {data.split}", leave=False):
        with runs.autocast(device):
            part = encode(data.batch(items, torch.device("cpu"))[0]).float().cpu().numpy()
        codes = np.empty((len(data), part.shape[1]), np.float32) if codes is None else codes
        codes[items.numpy()] = part
    return codes


def small(pixels):
    """Whole pictures as float (B, 3, 64, 64)."""
    return views(pixels, PIXELS)[0]


def colours(images):
    """Colour histogram: the square roots of the shares of 4 x 4 x 4 bins of red, green and blue, (B, 64)."""
    bins = (images * 4).long().clamp(0, 3)
    number = (bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2]).flatten(1)
    return torch.stack([torch.bincount(each, minlength=64) for each in number]).div(number.shape[1]).sqrt()


# Clusters and scores --------------------------------------------------------------------------------------------------


def study(source, table, data, config) -> dict:
    """Cluster, score and draw one source of codes; returns its facts."""
    classes, labels = table["classes"].tolist(), table[f"{config.split}_labels"]
    count = config.clusters or len(classes)
    if len(classes) < 2:
        raise runs.Problem("one style only: there is nothing to compare clusters with")
    if min(count, config.components, config.tsne_images, table["train"].shape[1]) < 2:
        raise runs.Problem("--clusters, --components, --tsne-images and the numbers of a code must be 2 or more")
    if len(labels) < count:
        raise runs.Problem(f"{len(labels)} paintings are fewer than {count} clusters: lower --clusters")
    most = min(config.components, *table["train"].shape, len(table["train"]) - 1)
    reduce = make_pipeline(StandardScaler(), PCA(max(most, 1), random_state=config.seed)).fit(table["train"])
    codes = reduce.transform(table[config.split])
    clusters = group(codes, config.method, count, config.seed)
    setting = (f"{METHODS[config.method]}, {count} clusters asked for, {len(labels)} {config.split} paintings, "
               f"{config.components} components, seed {config.seed}")  # fmt: skip
    found = len(np.unique(clusters[clusters >= 0]))
    facts = {"setting": setting, "clusters": found, "numbers": table["train"].shape[1]}
    facts |= scores(labels, clusters, codes, config.seed)
    if config.split == "test":
        facts |= probes(table, reduce, config)
    draw(source, codes, table[config.split], labels, clusters, classes, data, config)
    return {key: round(float(value), 5) if isinstance(value, float) else value for key, value in facts.items()}


def group(codes, method: str, count: int, seed: int) -> np.ndarray:
    """A cluster number for each of the codes (N, D); -1 for what HDBSCAN takes for noise."""
    if method == "agglomerative":
        return AgglomerativeClustering(count).fit_predict(codes)
    if method == "gaussian":
        return GaussianMixture(count, covariance_type="diag", random_state=seed).fit_predict(codes)
    if method == "hdbscan":  # finds the number of clusters itself
        return HDBSCAN(min_cluster_size=max(5, len(codes) // 100), copy=True).fit_predict(codes)
    return KMeans(count, init="k-means++", n_init=10, random_state=seed).fit_predict(codes)


def scores(labels, clusters, codes, seed: int) -> dict[str, float]:
    """How well clusters agree with labels, the same for shuffled labels, and how well clusters stand apart.

    NMI, AMI, homogeneity, completeness and purity lie between 0 and 1, ARI and silhouette between -1 and 1.
    """
    facts = agreement(labels, clusters)
    random = np.random.default_rng(seed)
    shuffled = [agreement(random.permutation(labels), clusters) for _ in range(10)]
    facts |= {f"shuffled_{key}": float(np.mean([each[key] for each in shuffled])) for key in facts}
    return facts | {"silhouette": apart(codes, clusters, seed)}


def apart(codes, clusters, seed: int) -> float:
    """Silhouette: how well clusters stand apart, on 5,000 of the codes at most; 0 where it is not defined."""
    try:
        return float(silhouette_score(codes, clusters, sample_size=min(5000, len(codes)), random_state=seed))
    except ValueError:  # one cluster, or as many as codes
        return 0.0


def agreement(labels, clusters) -> dict[str, float]:
    table = contingency(labels, clusters)
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "homogeneity": float(homogeneity_score(labels, clusters)),
        "completeness": float(completeness_score(labels, clusters)),
        "purity": float(table.max(0).sum() / table.sum()),
    }


def contingency(labels, clusters) -> np.ndarray:
    """Paintings of each style in each cluster, int64 (styles, clusters)."""
    numbers = np.unique(clusters, return_inverse=True)[1]
    table = np.zeros((labels.max() + 1, numbers.max() + 1), int)
    np.add.at(table, (labels, numbers), 1)
    return table


def probes(table, reduce, config) -> dict[str, float]:
    """What the codes know of style when labels may be used: accuracy of a linear classifier and of five neighbours."""
    if len(np.unique(table["train_labels"])) < 2:
        return {}
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000))
    linear.fit(table["train"], table["train_labels"])
    near = KNeighborsClassifier(min(5, len(table["train"])))
    near.fit(reduce.transform(table["train"]), table["train_labels"])
    return {
        "probe": float(linear.score(table["test"], table["test_labels"])),
        "neighbours": float(near.score(reduce.transform(table["test"]), table["test_labels"])),
    }


# Figures and the table ------------------------------------------------------------------------------------------------


def draw(source, codes, raw, labels, clusters, classes, data, config) -> None:
    """All figures of one source: its standardised, reduced codes (N, D), the raw ones (N, E), and their clusters."""
    run, random = Path(config.run), np.random.default_rng(config.seed)
    counts = contingency(labels, clusters)
    styles, columns = linear_sum_assignment(-counts)  # each cluster beside the style that it holds most of
    rest = np.setdiff1d(np.arange(counts.shape[1]), columns)
    order = np.concatenate([columns[np.argsort(styles)], rest])
    noise = np.unique(clusters)[order] < 0
    clusters = np.argsort(order)[np.unique(clusters, return_inverse=True)[1]]
    names = ["noise" if noise[number] else f"cluster {number + 1}" for number in range(len(order))]
    method = METHODS[config.method]
    title = f"{method} on {source} codes"

    chosen = np.arange(len(codes))
    if len(chosen) > config.tsne_images:
        chosen = np.sort(random.choice(chosen, config.tsne_images, replace=False))
    some = f"{len(chosen)} of {len(codes)} {config.split} paintings"
    places = TSNE(perplexity=min(30, (len(chosen) - 1) / 3), random_state=config.seed).fit_transform(codes[chosen])
    painted = {"by style": (places, labels[chosen], classes), f"by {method}": (places, clusters[chosen], names)}
    figures.scatter(run / f"tsne_{source}.png", painted, f"t-SNE of {source} codes, {some}")
    svd = TruncatedSVD(2, random_state=config.seed).fit_transform(raw)
    flat = {"PCA, by style": PCA(2).fit_transform(codes), "SVD of the codes as they are, by style": svd}
    painted = {name: (points[chosen], labels[chosen], classes) for name, points in flat.items()}
    figures.scatter(run / f"pca_{source}.png", painted, f"Principal components of {source} codes, {some}")

    shares = 100 * counts[:, order] / counts.sum(1, keepdims=True).clip(1)
    figures.heat(
        run / f"clusters_{source}.png", shares, classes, names, f"{title}: where each style goes", "% of style"
    )

    fit = data.fit_to_show(config.hide)
    centres = np.stack([codes[clusters == number].mean(0) for number in range(len(order))])
    nearest, captions = [], []
    for number, centre in enumerate(centres):
        own = np.flatnonzero((clusters == number) & fit)
        own = own[np.argsort(((codes[own] - centre) ** 2).sum(1))][:8]
        pictures = np.full((8, *data.pixels.shape[1:]), 255, np.uint8)
        pictures[: len(own)] = data.pixels[data.rows[own]]
        nearest.append(pictures)
        captions.append(f"{names[number]}: {data.named(own)}")
    sheet = run / f"centroids_{source}.png"
    figures.grid(sheet, np.stack(nearest), [""] * 8, names, f"{title}: nearest to each centre")
    runs.write_text(sheet.with_suffix(".txt"), "\n\n".join(captions) + "\n")
    shown = np.flatnonzero(fit[chosen])
    if not len(shown):
        raise runs.Problem("--hide leaves no painting to show")
    pictures = [data.pixels[row] for row in data.rows[chosen[shown]]]
    sheet = run / f"map_{source}.png"
    drawn = figures.thumbnails(sheet, places[shown], pictures, f"{source} codes laid out by t-SNE")
    captions = [data.named([item]) for item in chosen[shown[drawn]]]
    runs.write_text(sheet.with_suffix(".txt"), "\n".join(captions) + "\n")

    ks = list(range(2, min(2 * len(classes) + 1, len(codes) - 1)))
    tried = [KMeans(k, n_init=3, random_state=config.seed).fit(codes) for k in ks]
    panels = {"inertia": {"KMeans": [each.inertia_ for each in tried]},
              "silhouette": {"KMeans": [apart(codes, each.labels_, config.seed) for each in tried]}}  # fmt: skip
    if ks:
        figures.lines(run / f"k_{source}.png", ks, panels, "number of clusters", (len(classes), "number of styles"))


def write_table(path: Path, facts: dict) -> None:
    setting = next(iter(facts.values()))["setting"]
    lines = [f"{setting}; in brackets the same with shuffled labels.", "",
             "| codes | NMI | AMI | ARI | homogeneity | completeness | purity | silhouette | probe | neighbours |",
             "|---" * 10 + "|"]  # fmt: skip
    for source, found in sorted(facts.items(), key=lambda each: -each[1]["nmi"]):
        measures = ("nmi", "ami", "ari", "homogeneity", "completeness", "purity")
        cells = [f"{found[key]:.3f} ({found[f'shuffled_{key}']:.3f})" for key in measures]
        probes = [f"{found[key]:.1%}" if key in found else "" for key in ("probe", "neighbours")]
        cells = [source, *cells, f"{found['silhouette']:.3f}", *probes]
        lines.append(f"| {' | '.join(cells)} |")
    runs.write_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    runs.start(main)
