"""Repaint pictures in other styles, and measure how well that works.

    python style_transfer.py --image my.jpg --style ukiyo-e                # the style of the picture is found out
    python style_transfer.py --image my.jpg --style Ukiyo_e=0.7 Fauvism=0.3 --strength 0.8
    python style_transfer.py --image my.jpg                                # in every style
    python style_transfer.py --image my.jpg --style Rococo Cubism --steps 7    # from one style to the other
    python style_transfer.py --image holiday/ --style Pointillism --from-style Impressionism
    python style_transfer.py                                               # test paintings x styles, and the scores
    python style_transfer.py --method adain                                # a method to compare with
    python style_transfer.py --split validation                            # scores on paintings held out of training

Needs style.pt of train_style.py and classifier.pt of train.py; --method autoencoder needs conditional/autoencoder.pt of
train_autoencoder.py --conditional. With --image, <name>_<style>.png go to --out, at the picture's own size up to
--longest pixels; styles with weights are mixed, others are painted one by one. Without, test paintings are repainted at
the training size; scores go into facts.json, and style_grid.png into the run folder, with style_row.png,
style_strength.png and style_triptych.png in more/ (for another method style_grid_adain.png and style_row_adain.png
alone, in more/); where the same scenes exist in every style, as in the demo, style_truth.png compares with them.
"""

import os
import time
from functools import partial
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from common import figures
from common.baselines import Conditional, Magenta, Transplant
from common.config import ROOT, Setting, configure
from common.crops import views
from common.errors import UserError
from common.images import files_below, named_errors, reason_of
from common.metrics import (
    balanced_accuracy,
    frechet_distance,
    layout,
    mean_interval,
    position_deviation,
    principal_directions,
    psnr,
    ssim,
)
from common.names import count, display_name, file_part, find_style, fit_name, listed, printable
from common.repaint import Repainter, check_model, common_scenes, open_picture, read_mixture, read_picture, true_pairs
from common.run import (
    add_facts,
    atomic_write,
    checkpoint_path,
    claim,
    file_hash,
    load_checkpoint,
    pick_device,
    run_script,
)
from wikiart import Classifier, WikiArt, build_model, check_split, hash_of_files

SHARED = ("data", "run", "device", "seed", "processes", "hide")
SETTINGS = {
    "checkpoint": Setting(
        str, None, "the model of train_style.py, with classifier.pt beside it: a file of the run folder, or a path"
    ),
    "method": Setting(
        str, ("model", "adain", "wct", "magenta", "autoencoder"), "the trained model, or one to compare it with"
    ),
    "image": Setting(str, None, "a picture, or a folder of them, to repaint; none: the test paintings, with scores"),
    "style": Setting(list[str], None, "target styles, or one mixture: Ukiyo_e=0.7 Fauvism=0.3; none: all"),
    "from_style": Setting(str, None, "the style that the pictures are in; none: what the classifier says"),
    "strength": Setting(float, "[0, 2]", "0: the picture's own style, 1: the target style; above 1: exaggerated"),
    "steps": Setting(int, "[0, inf)", "pictures on the way from the first of two styles to the second; 0: none"),
    "longest": Setting(int, "[32, inf)", "pixels of the longer side of the results, at most"),
    "out": Setting(str, None, "folder for the results of --image"),
    "judges": Setting(list[str], None, "one or two classifiers for the scores, which had no part in training"),
    "split": Setting(str, ("test", "validation"), "paintings to repaint and score"),
    "paintings": Setting(int, "[2, inf)", "paintings to repaint and score, at most"),
    "name": Setting(
        str, None, "name of these scores in facts and figures; none: method and split, where they are not the defaults"
    ),
}
BATCH_SIZE = 16
GALLERY = 500  # test paintings among which `source_found` looks for the source
PRINTED = ("hit_rate", "second_hit_rate", "originals_rate", "fid_ratio", "ssim", "source_found", "position", "own_psnr")
TRIPTYCH_SIDE = 576  # pixels of the longer side
COMMITTED = ROOT / "report" / "style.pt"  # with its classifier beside it
DIRECTIONS = 64  # of the second judge's features for the Fréchet distance: a style has only 100 to 200 test paintings


def main(argv=None):
    config = configure("style_transfer", __doc__, SETTINGS, SHARED, argv)
    if not config.image and (config.steps or config.from_style):
        raise UserError("--steps and --from-style need --image")
    if config.image and config.method != "model":
        raise UserError(f"--method {config.method} is for the scores of test paintings: it takes no --image")
    device = pick_device(config.device)
    path = checkpoint_path(config.run, config.checkpoint)
    if config.image and config.checkpoint == COMMITTED.name and not path.exists():
        advice = f"train one with train_style.py, or take the project's own: --checkpoint {os.path.relpath(COMMITTED)}"
        raise UserError(f"no checkpoint {path}: {advice}")
    checkpoint = load_checkpoint(path, "StyleAutoencoder")
    check_model(checkpoint, path)
    known = config.image and config.from_style
    classifier_path = path.parent / "classifier.pt"
    classifier = None if known else Classifier.load(classifier_path, device)
    repainter = Repainter(build_model(checkpoint, path), checkpoint["classes"], classifier, device)
    if config.image:
        repaint_files(repainter, classifier_path, config)
    else:
        parts = ("" if config.method == "model" else config.method, "" if config.split == "test" else config.split)
        config.name = config.name or "_".join(filter(None, parts))
        lock = claim(config.run, f"style_transfer_{config.name or 'model'}")
        evaluate(repainter, checkpoint, path, config)
        lock.close()


# Image files ----------------------------------------------------------------------------------------------------------


def repaint_files(repainter: Repainter, classifier_path: Path, config) -> None:
    """Write each picture of --image in each target; the classifier says which style it is in, without --from-style."""
    source, classes = Path(config.image), repainter.classes
    files, targets = list_images(source), target_styles(config, classes)
    own = {find_style(config.from_style, classes): 1.0} if config.from_style else None
    out, ending = Path(config.out), "" if config.strength == 1 else f"_strength-{config.strength:g}"
    made, reduced, broken = [], [], []
    make_folder(out, source)
    for path in tqdm(files, "pictures", leave=False, disable=len(files) < 2):
        try:
            image, full = read_picture(path, config.longest)
        except Exception as error:  # Pillow's decoders raise almost anything on damaged files
            broken.append(str(error) if isinstance(error, UserError) else f"{path}: {reason_of(error)}")
            continue
        if max(full) > max(image.size):
            reduced.append(full)
        # In a folder, a.jpg and a.png may lie side by side.
        below, stem = (path.relative_to(source).parent, path.name) if source.is_dir() else ("", path.stem)
        styles = own or dict(zip(classes, repainter.source(image).tolist(), strict=True))
        if not own:
            likeliest = max(styles, key=styles.get)
            taken = f"{classifier_path} says that its own style is {likeliest} ({styles[likeliest]:.0%})"
            tqdm.write(f"{printable(path.name)}: {taken}; if that is wrong, give --from-style")
        for name, target in targets.items():
            made.append(out / below / fit_name(f"{stem}_{file_part(name)}{ending}", ".png"))
            with atomic_write(made[-1]) as temporary:
                repainter.repaint(image, target, styles, config.strength).save(temporary)
    if broken:
        done = len(files) - len(broken)
        counts = f"{done} of {count(len(files), 'file')} repainted; not " if len(files) > 1 else ""
        raise UserError(f"{counts}{listed(broken, 3, '; ')}")
    print(describe(made, image.size, reduced, len(files), out))


def describe(made: list[Path], size: tuple[int, int], reduced: list[tuple], files: int, out: Path) -> str:
    """What was made of so many files; reduced: the width and height before of those that --longest made smaller."""
    words = f"{len(made)} pictures in {out}"
    if len(made) == 1:
        words = f"{printable(str(made[0]))}: {size[0]} x {size[1]} pixels"
    if reduced and files == 1:
        return f"{words}, reduced from {reduced[0][0]} x {reduced[0][1]} by --longest"
    return f"{words}; {len(reduced)} of {files} files reduced by --longest" if reduced else words


def make_folder(out: Path, source: Path) -> None:
    """Make the folder of the results. Raises UserError."""
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} is inside {source}: the next run would repaint the results as well")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder --out {out}: {error.strerror}") from None


def list_images(source: Path) -> list[Path]:
    if not source.exists():
        raise UserError(f"no file and no folder {source}")
    files = [source] if source.is_file() else [source / path for path in files_below(source)]
    files = [path for path in files if path.is_file()]  # no pipes
    if not files:
        raise UserError(f"{source} holds no image")
    return files


def target_styles(config, classes: list[str]) -> dict[str, dict[str, float]]:
    """What each picture is repainted in, {name: {style: weight}}: styles, a mixture, or --steps between two styles."""
    mixture, weighted = read_mixture(config.style or classes, classes), any("=" in text for text in config.style)
    if config.steps:
        if len(mixture) != 2 or weighted or config.steps < 2:
            raise UserError("--steps needs two styles without weights, and 2 or more: --style Rococo Cubism --steps 5")
        first, second = mixture
        shares = np.linspace(0, 1, config.steps).tolist()
        return {
            f"{first}_to_{second}_{step}": {first: 1 - share, second: share} for step, share in enumerate(shares, 1)
        }
    if weighted:
        return {"_".join(f"{style}-{share:.2g}" for style, share in mixture.items()): mixture}
    return {style: {style: 1.0} for style in mixture}


# Scores ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(repainter: Repainter, checkpoint: dict, path: Path, config) -> None:
    """Repaint test or validation paintings in every style; score and plot the results."""
    run, classes = Path(config.run), repainter.classes
    judges = load_judges(config, classes, repainter.device)
    training, test = load_paintings(checkpoint, path, judges, config)
    if any("=" in style for style in config.style):
        raise UserError("mixtures of styles need --image")
    config.style = [find_style(style, classes) for style in config.style] or classes[:8]
    method = load_method(repainter, training, config)
    data, eye = test.subset(choose(test, config.paintings)), torch.eye(len(classes))
    originals, source = all_images(data), eye[data.labels]

    def repaint(target, source=source, images=originals):
        """Images in the target instead of the source styles, (N, styles)."""
        batches = zip(*(rows.split(BATCH_SIZE) for rows in (images, target, source)), strict=True)
        return torch.cat([method.paint(*batch) for batch in batches])

    started = time.perf_counter()
    repainted = [repaint(row.expand_as(source)) for row in tqdm(eye, "styles", leave=False)]
    megapixels = len(classes) * len(data) * originals.shape[-1] * originals.shape[-2] / 1e6
    facts = {"checkpoint": file_hash(path)[:12], "paintings": len(data)}
    facts["seconds_per_megapixel"] = (time.perf_counter() - started) / megapixels
    reconstructed, labels = repaint(source), data.labels

    def predict(images):
        return judges[0].predict(to_bytes(images), calibrated=False).argmax(1)

    facts |= judge_facts(predict, "", data, originals, reconstructed, repainted)
    facts |= picture_facts(test, data, originals, reconstructed, repainted)
    pairs = true_pairs(data)
    facts |= true_image_facts(pairs, originals, repainted)
    if len(judges) > 1:
        before, own, *after = (features_of(judges[1], images) for images in (originals, reconstructed, *repainted))
        facts |= judge_facts(partial(predict_from, judges[1]), "second_", data, before, own, after)
        facts |= distance_facts(features_of(judges[1], all_images(test)), test.labels, before, after, labels, classes)
    if config.method == "model":
        facts |= source_facts(repainter.classifier, repaint, predict, originals, labels, eye)
    rows = rows_to_show(data, config.hide)
    facts["shown"] = data.captions(rows)
    add_facts(run, "style_transfer", {config.name: facts} if config.name else facts, merge=True)
    plot(run, f"_{config.name}" if config.name else "", data, rows, originals, repainted, pairs, repainter, config)
    print(", ".join(f"{name} {facts[name]:.3f}" for name in PRINTED if name in facts))


def load_paintings(checkpoint: dict, path: Path, judges: list[Classifier], config) -> tuple[WikiArt, WikiArt]:
    """The paintings in train/, without those of --split validation, and the paintings of --split. Raises UserError."""
    settings = checkpoint["data"] | {"classes": checkpoint["classes"], "processes": config.processes}
    training = WikiArt(config.data, "train", **settings)
    check_split(training, checkpoint, path)
    for judge, name in zip(judges, config.judges, strict=True):
        check_split(training, judge.checkpoint, name)
    if config.split == "test":
        return training, WikiArt(config.data, "test", **settings)
    if hash_of_files(training.fingerprint) != hash_of_files(checkpoint["fingerprint"]):
        print(f"files of train/, or their times, have changed since {path} was trained: it may have seen some of these")
    training, held_out = training.split_off(checkpoint["config"]["validation"], checkpoint["data"]["split_seed"])
    for judge, name in zip(judges, config.judges, strict=True):
        known, split = judge.checkpoint, judge.checkpoint["config"]
        data = WikiArt(config.data, "train", processes=config.processes, **known["data"])
        seen, _ = data.split_off(split["validation"], split["split_seed"])
        # embed.py fits to all of train/.
        if known["model"] == "Pretrained" or np.isin(held_out.paths, seen.paths).any():
            raise UserError(f"{name} has seen validation paintings: give --judges of train.py with the same split")
    return training, held_out


def choose(data: WikiArt, count: int) -> np.ndarray:
    """Indices of at most `count` paintings: whole scenes that exist in every style, as in the demo, or else evenly."""
    scenes = common_scenes(data)[: count // len(data.classes)]
    if scenes:
        return np.sort(np.concatenate(scenes))
    return np.arange(min(count, len(data))) * len(data) // min(count, len(data))


def source_facts(classifier: Classifier, repaint, predict, originals, labels, eye) -> dict:
    """How well the classifier predicts source styles, and the hit rate from its predictions, on up to 100 paintings."""
    few = slice(None, None, -(-len(labels) // 100))
    guessed = classifier.predict(to_bytes(originals))
    unknown = [repaint(row.expand_as(guessed)[few], guessed[few], originals[few]) for row in eye]
    hits = [predict(images) == style for style, images in enumerate(unknown)]
    return {
        "classifier": classifier.hash[:12],
        "source_balanced_accuracy": balanced_accuracy(labels, guessed.argmax(1)),
        "source_majority": 1 / len(eye),
        "unknown_source_hit_rate": mean_over_pairs(hits, labels[few]),
    }


def load_method(repainter: Repainter, training: WikiArt, config):
    """What repaints: the trained model, or a method to compare it with."""
    if config.method == "model":
        return repainter
    if config.method == "magenta":
        return Magenta(training, config.seed)
    if config.method == "autoencoder":
        path = Path(config.run) / "conditional" / "autoencoder.pt"
        saved = load_checkpoint(path, "Autoencoder")
        if not saved["arguments"].get("styles") or saved["classes"] != repainter.classes:
            raise UserError(f"{path} has no embeddings of these styles: train it with --conditional")
        check_split(training, saved, path)
        return Conditional(build_model(saved, path), saved["crop"], repainter.device)
    return Transplant(repainter.model, training, config.method, repainter.device)


def load_judges(config, classes: list[str], device) -> list[Classifier]:
    if len(config.judges) not in (1, 2):
        raise UserError("--judges needs one or two classifiers: distances are measured in features of the second")
    judges = [Classifier.load(checkpoint_path(config.run, name), device) for name in config.judges]
    for judge, name in zip(judges, config.judges, strict=True):
        if judge.classes != classes:
            raise UserError(f"{name} has other styles than the model: train it on the same paintings")
    if len(judges) > 1 and not hasattr(judges[1].model, "classify"):
        raise UserError(f"{config.judges[1]} has no features to compare: give a CNN, or a classifier of embed.py")
    return judges


def all_images(data: WikiArt):
    """All paintings of a data set, float (N, 3, size, size) in [0, 1], on the CPU."""
    return torch.from_numpy(data.pixels[data.rows]).float() / 255


def to_bytes(images):
    return (255 * images).round().byte()


def mean_over_pairs(values, labels) -> float:
    """The mean of values, (N,) for each target style, over the paintings of other styles."""
    return float(torch.cat([row[labels != style] for style, row in enumerate(values)]).float().mean())


def judge_facts(predict, prefix: str, data: WikiArt, originals, reconstructed, repainted) -> dict:
    """How often a judge predicts the target style for repainted images, and the own style for the others.

    predict: images, or features of them, to styles (N,). The 95 % interval is over artists.
    """
    before, labels = predict(originals), data.labels
    hits = [predict(images) == style for style, images in enumerate(repainted)]
    other = F.one_hot(labels, len(hits)).T == 0
    low, high = mean_interval((torch.stack(hits) & other).sum(0) / other.sum(0), data.artists)
    triples = zip(data.classes, hits, other, strict=True)
    return {
        f"{prefix}hit_rate": mean_over_pairs(hits, labels),
        f"{prefix}hit_rate_low": low,
        f"{prefix}hit_rate_high": high,
        f"{prefix}target_rates": {name: hit[of].float().mean() for name, hit, of in triples if of.any()},
        f"{prefix}judge_accuracy": (before == labels).float().mean(),
        f"{prefix}originals_rate": mean_over_pairs([before == style for style in range(len(hits))], labels),
        f"{prefix}own_kept": (predict(reconstructed) == labels).float().mean(),
    }


def predict_from(judge: Classifier, features):
    """The styles (N,) that a judge predicts from features."""
    return judge.model.classify(features.to(judge.device)).argmax(1).cpu()


def features_of(judge: Classifier, images):
    """The judge's features (N, D) of float images (N, 3, S, S) in [0, 1]."""
    batches = (views(judge.prepare(to_bytes(batch)), judge.crop)[0] for batch in images.split(BATCH_SIZE))
    return torch.cat([judge.model.features(batch).float().cpu() for batch in batches])


def distance_facts(real, real_labels, before, after, labels, classes: list[str]) -> dict:
    """Distances in a judge's features: real paintings (M, D), originals (N, D), repainted images [(N, D), ...].

    The Fréchet distance is the mean over styles with two real paintings or more; where there is none, it is no fact.
    """
    mean, directions = principal_directions(real, DIRECTIONS)
    distances, halves = {}, []
    for style, features in enumerate(after):
        if min((real_labels == style).sum(), (labels != style).sum()) < 2:
            continue
        target = (real[real_labels == style] - mean) @ directions
        pair = (x[labels != style] for x in (features, before))
        distances[style] = [frechet_distance((x - mean) @ directions, target) for x in pair]
        if len(target) >= 4:
            halves.append(frechet_distance(target[::2], target[1::2]))
    if not distances:
        return {}
    fid, fid_originals = np.mean(list(distances.values()), 0)
    facts = {
        "directions": DIRECTIONS,
        "fid": fid,
        "fid_originals": fid_originals,
        "fid_ratio": fid / fid_originals,
        "fid_ratios": {classes[style]: pair[0] / pair[1] for style, pair in distances.items()},
    }
    if halves:  # of real paintings of the style
        facts["fid_halves_ratio"] = np.mean(halves) / fid_originals
    return facts


def picture_facts(test: WikiArt, data: WikiArt, originals, reconstructed, repainted) -> dict:
    """How much of the source is left in repainted images, and whether a style puts the same colours anywhere."""
    labels, others = data.labels, np.setdiff1d(test.rows, data.rows)[: max(0, GALLERY - len(data))]
    gallery = torch.cat([layout(originals), layout(torch.from_numpy(test.pixels[others]).float() / 255)])
    found = [(layout(images) @ gallery.T).argmax(1) == torch.arange(len(data)) for images in repainted]
    positions = [position_deviation(images[labels != k], originals[labels != k]) for k, images in enumerate(repainted)]
    return {
        "own_psnr": psnr(F.mse_loss(reconstructed, originals).item()),
        "ssim": mean_over_pairs([ssim(originals, images) for images in repainted], labels),
        "source_found": mean_over_pairs(found, labels),
        "position": np.mean(positions),
    }


def true_image_facts(pairs, originals, repainted) -> dict:
    """How much nearer to the true image in the target style repaintings are than their sources, for `true_pairs`."""
    if not pairs:
        return {}
    before = np.array([F.mse_loss(originals[row], originals[true]).item() for row, true, _ in pairs])
    after = np.array([F.mse_loss(repainted[style][row], originals[true]).item() for row, true, style in pairs])
    return {
        "truth_pairs": len(pairs),
        "truth_gain_db": 10 * np.log10(before.mean() / after.mean()),
        "truth_gain_median_db": np.median(10 * np.log10(before / after)),
        "truth_nearer": (after < before).mean(),
    }


# Figures --------------------------------------------------------------------------------------------------------------


def rows_to_show(data: WikiArt, hide: list[str]) -> list[int]:
    """Eight paintings that figures may show, of as many different styles as possible, sorted by style."""
    rows, labels = np.flatnonzero(data.showable(hide)), data.labels
    if not len(rows):
        raise UserError("--hide leaves no painting to show")
    occurrence = {row: int((labels[rows[:place]] == labels[row]).sum()) for place, row in enumerate(rows)}
    chosen = sorted(rows, key=lambda row: (occurrence[row], labels[row]))[:8]
    return sorted(chosen, key=lambda row: labels[row])


def plot(run: Path, suffix: str, data: WikiArt, rows, originals, repainted, pairs, repainter, config) -> None:
    """Write style_grid.png, or more/style_grid_<name>.png; of the trained model the other figures, too."""
    names, labels = [display_name(name) for name in data.classes], data.labels[rows]
    columns = [data.classes.index(style) for style in config.style]
    cells = to_bytes(torch.stack([originals[rows], *(repainted[column][rows] for column in columns)], 1)).numpy()
    titles, row_titles = ["original", *(names[column] for column in columns)], [names[label] for label in labels]
    title = f"{config.split.capitalize()} paintings, repainted in each style"
    more = run / "more"
    figures.painting_grid((more if suffix else run) / f"style_grid{suffix}.png", cells, titles, row_titles, title)
    row, title = (len(rows) - 1) // 2, f"One painting in {len(columns)} styles"
    path = more / f"style_row{suffix}.png"
    captions = [f"{row_titles[row]} (original)", *titles[1:]]
    figures.contact_sheet(path, cells[row], captions, min(5, -(-len(captions) // 2)), title)
    if not suffix:
        plot_strengths(more / "style_strength.png", names, labels[:5], originals[rows[:5]], repainter)
        with named_errors(data.root / data.paths[rows[row]]):
            image = open_picture(data.root / data.paths[rows[row]], TRIPTYCH_SIDE)
        image = ImageOps.contain(image, (TRIPTYCH_SIDE, TRIPTYCH_SIDE), Image.Resampling.LANCZOS)  # enlarges, too
        plot_triptych(more / "style_triptych.png", image, labels[row].item(), repainter)
        if pairs:
            plot_truth(run / "style_truth.png", pairs, originals, repainted, names, data.labels)


def plot_truth(path, pairs, originals, repainted, names: list[str], labels) -> None:
    """For each style, the source, the repainting and the true image of the scene in which its marks show most."""
    detail = (originals - F.avg_pool2d(originals, 5, 1, 2)).square().mean((1, 2, 3))  # of marks, not of the scene
    chosen = [[pair for pair in pairs if pair[2] == style] for style in range(len(names))]
    chosen = [max(of_style, key=lambda pair: detail[pair[1]].item()) for of_style in chosen]
    cells = [torch.stack([originals[row], repainted[style][row], originals[true]]) for row, true, style in chosen]
    rows = [f"{names[labels[row]]} to {names[style]}" for row, _, style in chosen]
    columns = ["source", "repainted", "true"]
    figures.painting_grid(
        path, to_bytes(torch.stack(cells)).numpy(), columns, rows, "The true picture beside a repainting"
    )


def plot_strengths(path, names: list[str], labels, originals, repainter) -> None:
    """Paintings on their way from their own style to the next one."""
    strengths, eye = (0.0, 0.25, 0.5, 0.75, 1.0), torch.eye(len(names))
    targets = (labels + 1) % len(names)
    source = eye[labels]
    steps = [repainter.paint(originals, source + strength * (eye[targets] - source), source) for strength in strengths]
    steps.insert(0, originals)
    rows = [f"{names[start]} to {names[end]}" for start, end in zip(labels, targets, strict=True)]
    columns = ["original", *(f"strength {strength:.0%}" for strength in strengths)]
    figures.painting_grid(
        path, to_bytes(torch.stack(steps, 1)).numpy(), columns, rows, "From one style to another", 224
    )


def plot_triptych(path, image, label: int, repainter) -> None:
    """A painting, and itself in two other styles, at TRIPTYCH_SIDE pixels."""
    classes, own = repainter.classes, {repainter.classes[label]: 1.0}
    targets = [name for name in classes if name not in own][-2:]
    images = [image, *(repainter.repaint(image, {target: 1.0}, own) for target in targets)]
    cells = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])[None]
    titles = ["original", *(display_name(target) for target in targets)]
    figures.painting_grid(path, cells, titles, [display_name(classes[label])], "In two other styles", TRIPTYCH_SIDE)


if __name__ == "__main__":
    run_script(main)
