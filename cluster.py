"""Cluster codes of paintings without their labels, and compare the clusters with styles.

    python cluster.py                                  # codes of autoencoder.pt in the run folder
    python cluster.py --codes descriptors              # without a network
    python cluster.py --codes all                      # every source that the run folder has, in one table

Sources: autoencoder, contrastive and classifier, with checkpoints in the run folder; pixels (PCA of the images),
colours, textures and words (see common/descriptors.py); descriptors, which are these three together, and combined,
which are contrastive, textures and words; each backbone that embed.py has run. Codes are computed once, and again when
their checkpoint, their code or the paintings have changed. They are reduced to principal components, and clustered by
k-means, five times: the run with the smallest inertia counts. Components of features and descriptors are whitened and
scaled to length 1; those of pixels and of the autoencoder, whose distances are about those of images, are not.

Writes into the run folder: codes/<source>.npz (see common/codes.py), clusters.md (the table) and facts.json; of the
autoencoder and the combined codes map_<source>.png (paintings by likeness) and tsne_<source>.png; and in more/ these of
the others, clusters_<source>.png (clusters of each style), centroids_<source>.png (the paintings nearest to each
centre) and centroids_<source>.txt, which names these.
"""

import re
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from tqdm import tqdm

from common import descriptors, figures
from common.codes import SPLITS, code_files, codes_path, read_codes, write_codes
from common.config import Setting, configure
from common.crops import FEATURE_SCALES, mean_over_views, views
from common.errors import UserError
from common.metrics import bootstrap_samples
from common.names import display_name
from common.run import (
    add_facts,
    autocast,
    claim,
    file_hash,
    load_checkpoint,
    pick_device,
    read_facts,
    run_script,
    write_text,
)
from common.stamp import code_key
from wikiart import Classifier, WikiArt, build_model, check_split

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes", "hide")
SETTINGS = {
    "codes": Setting(list[str], None, "sources of codes (autoencoder, combined, ...; see above), or all"),
    "split": Setting(str, ("test", "train"), "paintings to cluster"),
    "clusters": Setting(int, "[0, inf)", "number of clusters; 0: the number of styles"),
}
CHECKPOINTS = {  # of each source: model, file in the run folder
    "autoencoder": ("Autoencoder", "autoencoder.pt"),
    "contrastive": ("Autoencoder", "contrastive/autoencoder.pt"),
    "classifier": ("CNN", "classifier.pt"),
}
DESCRIPTORS = ("colours", "textures", "words")
COMPUTED = (*CHECKPOINTS, "pixels", *DESCRIPTORS)  # other sources are written by embed.py
THUMBNAIL = 64  # side of the images behind pixels and colours
COMPONENTS = 40  # principal components of each source, and of all together, at most
IMAGE_CODES = ("autoencoder", "pixels")  # in the units of images, so that distances between codes have a meaning
JOINED = {"descriptors": DESCRIPTORS, "combined": ("contrastive", "textures", "words")}  # sources of several parts
SHOWN = ("autoencoder", "combined")  # whose t-SNE and map are at the top of the run folder
TSNE_IMAGES, MAP_IMAGES = 5000, 480  # paintings in a t-SNE figure and in a map, at most
BATCH_SIZE = 256
RUNS = 5  # of k-means, each the best of ten starts
AGREEMENT = {
    "nmi": metrics.normalized_mutual_info_score,
    "ami": metrics.adjusted_mutual_info_score,
    "ari": metrics.adjusted_rand_score,
}


def main(argv=None):
    config = configure("cluster", __doc__, SETTINGS, SHARED, argv)
    device, run = pick_device(config.device), Path(config.run)
    lock, results = claim(run, "cluster"), {}
    for source in find_sources(run) if config.codes == ["all"] else config.codes:
        try:
            table, data = codes_of(source, config, device)
        except UserError as error:
            if source in (*COMPUTED, "descriptors") or config.codes != ["all"]:
                raise
            print(f"left out: {error}")
            continue
        print(f"{source}: {table['train'].shape[1]} numbers per painting", flush=True)
        results[re.sub(r"\W", "_", source)] = evaluate(source, table, data, config)
        add_facts(run, "cluster", results, merge=True)
    if not results:
        raise UserError("--codes needs a source, or all")
    settings = {facts["setting"] for facts in results.values()}
    all_facts = read_facts(run)["cluster"]
    comparable = {name: facts for name, facts in all_facts.items() if facts.get("setting") in settings}
    write_table(run / "clusters.md", comparable)
    lock.close()


# Codes ----------------------------------------------------------------------------------------------------------------


def find_sources(run: Path) -> list[str]:
    """All sources that a run folder has, and those that need no checkpoint."""
    weights = {source: run / name for source, (_, name) in CHECKPOINTS.items()}
    existing = [source for source, path in weights.items() if path.exists()]
    trained = [source for source in existing if load_checkpoint(weights[source])["model"] == CHECKPOINTS[source][0]]
    embedded = [path.stem for path in code_files(run) if path.stem not in COMPUTED]
    joined = [source for source, parts in JOINED.items() if set(parts) <= {*trained, *DESCRIPTORS}]
    return [*trained, "pixels", *DESCRIPTORS, *joined, *embedded]


def codes_of(source: str, config, device) -> tuple[dict, WikiArt]:
    """The codes of one source, see common/codes.py, and the paintings to cluster. Raises UserError.

    The table has one more entry, `parts`: {name: how many numbers it has} of the source's parts.
    """
    names = JOINED.get(source, (source,))
    tables, data = zip(*(codes_of_part(name, config, device) for name in names), strict=True)
    if any(list(part.paths) != list(data[0].paths) for part in data):
        raise UserError(f"the codes of {', '.join(names)} are of other paintings: train with the same settings")
    joined = {split: np.concatenate([table[split] for table in tables], 1) for split in SPLITS}
    parts = {name: table["train"].shape[1] for name, table in zip(names, tables, strict=True)}
    return tables[0] | joined | {"parts": parts}, data[0]


def codes_of_part(source: str, config, device) -> tuple[dict, WikiArt]:
    """The codes of one source, or of one part of it, and the paintings to cluster.

    Computes codes that are missing, or were made from another checkpoint, code or paintings. Raises UserError.
    """
    run, path = Path(config.run), codes_path(config.run, source)
    settings = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    checkpoint, identity = None, f"{settings} {config.seed}"
    if source in CHECKPOINTS:
        model, name = CHECKPOINTS[source]
        weights = run / name
        checkpoint, identity = load_checkpoint(weights, model), file_hash(weights)
        settings = {key: checkpoint["data"][key] for key in settings}
        if checkpoint["data"].get("holdout", "none") != "none":
            raise UserError(f"{weights} was trained with --holdout, on some test paintings: train it without")
    elif source not in COMPUTED and not path.exists():
        raise UserError(f"no codes {path}: give {', '.join((*COMPUTED, *JOINED))}, or run embed.py first")

    sets = {split: WikiArt(config.data, split, processes=config.processes, **settings) for split in SPLITS}
    if checkpoint:
        check_split(sets["test"], checkpoint, weights)
    code = code_key("cluster.make_encoder", "cluster.encode_dataset")
    made_from = " ".join([identity, code, *(data.fingerprint for data in sets.values())])
    table = read_codes(path) if path.exists() else {}
    if source in COMPUTED and table.get("made_from") != made_from:
        encode = make_encoder(source, checkpoint, sets["train"], config.seed, device)
        write_codes(path, {split: encode_dataset(encode, sets[split], device) for split in SPLITS}, sets, made_from)
        table = read_codes(path)
    data = sets[config.split]
    if list(table[f"{config.split}_paths"]) != list(data.paths):
        raise UserError(f"{path} was made from other paintings: run embed.py again")
    if not all(np.isfinite(table[split]).all() for split in SPLITS):
        raise UserError(f"{path} holds numbers that are not finite: train again with lower learning rates")
    return table, data


def make_encoder(source: str, checkpoint, training: WikiArt, seed: int, device):
    """A function from images uint8 (B, 3, S, S) to codes (B, D)."""
    if source == "pixels":
        pca = IncrementalPCA(min(256, len(training)))
        for items in torch.arange(len(training)).chunk(max(1, len(training) // 256)):
            pca.partial_fit(thumbnails(training.batch(items, torch.device("cpu"))[0]).flatten(1).numpy())
        return lambda images: torch.from_numpy(pca.transform(thumbnails(images).flatten(1).numpy()))
    if source == "colours":
        return lambda images: descriptors.colour_histogram(thumbnails(images))
    if source == "textures":
        return lambda images: descriptors.texture_statistics(images.float() / 255)
    if source == "words":
        words = descriptors.VisualWords(training, seed)
        return lambda images: words(images.float() / 255)
    if source == "classifier":
        return Classifier(checkpoint, device).features
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    crop = checkpoint["crop"]
    if source == "contrastive":
        return lambda images: mean_over_views(model.features, images.to(device), crop, FEATURE_SCALES)
    # Codes of one view: the mean of two codes is the code of no image. Times the scales, it is in units of pixels.
    return lambda images: model.encode(views(images.to(device), crop)[0]) * model.scales


@torch.no_grad()
def encode_dataset(encode, data: WikiArt, device) -> np.ndarray:
    """Codes of all paintings, float32 (N, D)."""
    batches = []
    for items in tqdm(torch.arange(len(data)).split(BATCH_SIZE), f"encoding {data.split}", leave=False):
        with autocast(device):
            batches.append(encode(data.batch(items, torch.device("cpu"))[0]).float().cpu().numpy())
    return np.concatenate(batches)


def thumbnails(images):
    """Images uint8 (B, 3, S, S) as float (B, 3, 64, 64) in [0, 1]."""
    return views(images, THUMBNAIL)[0]


# Clusters and scores --------------------------------------------------------------------------------------------------


def evaluate(source: str, table: dict, data: WikiArt, config) -> dict:
    """Cluster the codes of one source, write its figures and return its scores."""
    classes, labels = table["classes"].tolist(), table[f"{config.split}_labels"]
    count = config.clusters or len(classes)
    if len(classes) < 2:
        raise UserError("one style only: there is nothing to compare clusters with")
    if count < 2 or table["train"].shape[1] < 2:
        raise UserError("--clusters, and the numbers of a code, must be 2 or more")
    if len(labels) < count:
        raise UserError(f"--clusters {count} is more than the {len(labels)} paintings: lower it")
    reduce = fit_reduction(table, config.seed)
    codes = reduce.transform(table[config.split])
    clusters, *others = kmeans(codes, count, config.seed)
    nmi = [AGREEMENT["nmi"](labels, found) for found in (clusters, *others)]
    facts = {
        "setting": f"KMeans, {count} clusters requested, {len(labels)} {config.split} paintings, "
        f"up to {COMPONENTS} components, seed {config.seed}",
        "clusters": len(np.unique(clusters)),
        "numbers": table["train"].shape[1],
        **scores(labels, clusters, codes, config.seed),
        **dict(zip(("nmi_low", "nmi_high"), nmi_interval(labels, clusters, data.artists, config.seed), strict=True)),
        "nmi_runs_low": min(nmi),
        "nmi_runs_high": max(nmi),
    }
    if config.split == "test":
        facts |= probes(table, reduce)
    plot(source, codes, labels, clusters, classes, data, config)
    return facts


def fit_reduction(table: dict, seed: int):
    """Codes (N, D) to principal components (N, at most COMPONENTS), fitted to the training codes.

    IMAGE_CODES are not scaled, so distances stay about those of images. Of others each part is reduced and whitened by
    itself, so that no part, and none of the components kept, drowns the others; PCA then keeps what the parts have in
    common, and codes are scaled to length 1.
    """
    parts, end, most = [], 0, min(COMPONENTS, len(table["train"]) - 1)
    for name, width in table["parts"].items():
        part, end = slice(end, end + width), end + width
        codes = table["train"][:, part]
        values = np.linalg.svd(codes - codes.mean(0), compute_uv=False)
        count = int((values > 1e-5 * values[0]).sum())  # the other directions hold rounding errors only
        pca = PCA(max(1, min(most, count)), whiten=name not in IMAGE_CODES, random_state=seed)
        parts.append((str(end), pca, part))
    if set(table["parts"]) <= set(IMAGE_CODES):
        return ColumnTransformer(parts).fit(table["train"])
    joint = PCA(min(most, sum(pca.n_components for _, pca, _ in parts)), random_state=seed)
    return make_pipeline(ColumnTransformer(parts), joint, Normalizer()).fit(table["train"])


def kmeans(codes, count: int, seed: int) -> list[np.ndarray]:
    """A cluster number for each of the codes (N, D), by RUNS runs, the one with the smallest inertia first."""
    runs = [KMeans(count, n_init=10, random_state=seed + start).fit(codes) for start in range(RUNS)]
    return [run.labels_ for run in sorted(runs, key=lambda run: run.inertia_)]


def scores(labels, clusters, codes, seed: int) -> dict[str, float]:
    """Agreement of clusters with labels, the same for shuffled labels, and the silhouette of at most 5,000 codes."""
    facts, random = agreement(labels, clusters), np.random.default_rng(seed)
    shuffled = [agreement(random.permutation(labels), clusters) for _ in range(10)]
    facts |= {f"shuffled_{key}": np.mean([chance[key] for chance in shuffled]) for key in facts}
    try:
        sample = min(5000, len(codes))
        silhouette = metrics.silhouette_score(codes, clusters, sample_size=sample, random_state=seed)
    except ValueError:  # one cluster, or as many as codes: not defined
        silhouette = 0.0
    return facts | {"silhouette": silhouette}


def nmi_interval(labels, clusters, artists, seed: int) -> tuple[float, float]:
    """The NMI's 95 % interval by a bootstrap over artists.

    NMI is higher in samples with repetitions, so the interval is around the estimate, as wide as the bootstrap's.
    """
    score, every = AGREEMENT["nmi"], np.arange(len(labels))
    samples = (np.repeat(every, drawn) for drawn in bootstrap_samples(artists, seed))
    margin = 1.96 * np.std([score(labels[rows], clusters[rows]) for rows in samples])
    nmi = score(labels, clusters)
    return nmi - margin, nmi + margin


def agreement(labels, clusters) -> dict[str, float]:
    """NMI, AMI, ARI and purity are 1 at best; 0 is chance for ARI and AMI."""
    counts = contingency(labels, clusters, labels.max() + 1)
    facts = {name: score(labels, clusters) for name, score in AGREEMENT.items()}
    return facts | {"purity": counts.max(0).sum() / counts.sum()}


def contingency(labels, clusters, classes: int) -> np.ndarray:
    """Paintings of each class in each cluster, int64 (classes, clusters); classes may have no paintings."""
    numbers = np.unique(clusters, return_inverse=True)[1]
    counts = np.zeros((classes, numbers.max() + 1), int)
    np.add.at(counts, (labels, numbers), 1)
    return counts


def probes(table: dict, reduce) -> dict[str, float]:
    """Test accuracy of classifiers fitted to the training codes: a linear one (probe), and five nearest neighbours."""
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000))
    linear.fit(table["train"], table["train_labels"])
    neighbours = KNeighborsClassifier(min(5, len(table["train"])))
    neighbours.fit(reduce.transform(table["train"]), table["train_labels"])
    return {
        "probe": linear.score(table["test"], table["test_labels"]),
        "neighbours": neighbours.score(reduce.transform(table["test"]), table["test_labels"]),
    }


# Figures and the table ------------------------------------------------------------------------------------------------


def plot(source: str, codes, labels, clusters, classes: list[str], data: WikiArt, config) -> None:
    """Write the figures of one source: its reduced codes (N, D), their labels and clusters."""
    counts, more = contingency(labels, clusters, len(classes)), Path(config.run) / "more"
    top = Path(config.run) if source in SHOWN else more
    order = diagonal_order(counts)
    clusters = np.argsort(order)[np.unique(clusters, return_inverse=True)[1]]
    numbers = [f"cluster {number}" for number in range(1, len(order) + 1)]
    most = [display_name(classes[label]) for label in counts[:, order].argmax(0)]
    shares = counts[:, order].max(0) / counts[:, order].sum(0)
    names = [f"{number}: {style} {share:.0%}" for number, style, share in zip(numbers, most, shares, strict=True)]

    rows = np.arange(len(codes))
    if len(rows) > TSNE_IMAGES:
        rows = np.sort(np.random.default_rng(config.seed).choice(rows, TSNE_IMAGES, replace=False))
    points = TSNE(perplexity=min(30, (len(rows) - 1) / 3), random_state=config.seed).fit_transform(codes[rows])
    panels = {"by style": (points, labels[rows], classes), "by KMeans": (points, clusters[rows], numbers)}
    title = f"t-SNE of {source} codes, {len(rows)} of {len(codes)} {config.split} paintings"
    figures.scatter(top / f"tsne_{source}.png", panels, title)
    plot_map(top / f"map_{source}.png", source, rows, points, data, config)

    percent, path = 100 * counts[:, order] / counts.sum(1, keepdims=True).clip(1), more / f"clusters_{source}.png"
    figures.heat(path, percent, classes, names, f"KMeans on {source} codes: clusters of each style", "% of style")
    plot_centroids(more / f"centroids_{source}.png", source, codes, clusters, names, data, config)


def plot_map(path: Path, source: str, rows, points, data: WikiArt, config) -> None:
    """A map of paintings: each in the free cell of a grid that is near its t-SNE point (N, 2); `rows` (N,) of data."""
    shown = np.flatnonzero(data.showable(config.hide)[rows])
    if not len(shown):
        print("no map: --hide leaves no painting to show")
        return
    shown = shown[np.linspace(0, len(shown) - 1, min(MAP_IMAGES, len(shown))).astype(int)]
    columns = int(np.ceil((1.2 * len(shown)) ** 0.5))
    cells = np.arange(columns * -(-len(shown) // columns))
    grid = np.stack([cells % columns, cells // columns], 1) / columns
    span = np.ptp(points[shown], 0).clip(1e-9)
    places = (points[shown] - points[shown].min(0)) / span * grid.max(0)
    near = linear_sum_assignment(((places[:, None] - grid) ** 2).sum(2))[1]
    items = rows[shown]
    title = f"{len(shown)} {config.split} paintings by likeness of their {source} codes"
    labels = data.labels.numpy()[items]
    figures.thumbnails(path, data.pixels[data.rows[items]], near, columns, labels, data.classes, title)


def plot_centroids(path: Path, source: str, codes, clusters, names: list[str], data: WikiArt, config) -> None:
    """The paintings nearest to the centre of each cluster, and a file with their painters and titles."""
    showable, images, captions = data.showable(config.hide), [], []
    for number, name in enumerate(names):
        centre = codes[clusters == number].mean(0)
        members = np.flatnonzero((clusters == number) & showable)
        nearest = members[np.argsort(((codes[members] - centre) ** 2).sum(1))][:8]
        blank = np.full((8 - len(nearest), *data.pixels.shape[1:]), 255, np.uint8)
        images.append(np.concatenate([data.pixels[data.rows[nearest]], blank]))
        captions.append(f"{name}: {data.captions(nearest)}")
    figures.grid(path, np.stack(images), [""] * 8, names, f"KMeans on {source} codes: nearest to each centre")
    write_text(path.with_suffix(".txt"), "\n\n".join(captions) + "\n")


def diagonal_order(counts: np.ndarray) -> np.ndarray:
    """The order of clusters (columns) in which as many paintings as possible are on the diagonal."""
    styles, clusters = linear_sum_assignment(-counts)
    return np.concatenate([clusters[np.argsort(styles)], np.setdiff1d(np.arange(counts.shape[1]), clusters)])


def write_table(path: Path, results: dict) -> None:
    """Write the scores {source: facts} as a table in Markdown, best NMI first, and print it."""
    measures = (*AGREEMENT, "purity")
    header = ["codes", "NMI", "AMI", "ARI", "purity", "silhouette", "probe", "neighbours"]
    setting = next(iter(results.values()))["setting"]
    lines = [f"{setting}; in brackets the same with shuffled labels, and for NMI a 95 % interval.", ""]
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for source, facts in sorted(results.items(), key=lambda result: -result[1]["nmi"]):
        cells = [f"{facts[key]:.3f} ({facts[f'shuffled_{key}']:.3f})" for key in measures]
        cells[0] += f", {facts['nmi_low']:.3f} to {facts['nmi_high']:.3f}"
        cells = [source, *cells, f"{facts['silhouette']:.3f}"]
        cells += [f"{facts[key]:.1%}" if key in facts else "" for key in ("probe", "neighbours")]
        lines.append(f"| {' | '.join(cells)} |")
    write_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
