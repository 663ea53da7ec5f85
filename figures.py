"""How results look: one style for every figure, colours for 27 classes, and the handful of plots that scripts share."""

import matplotlib

matplotlib.use("Agg")  # files only: GPU servers have no screen

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "text.parse_math": False,  # a "$" in a title is a dollar
        "figure.facecolor": "white",  # an opaque ground reads on light and on dark pages
        "savefig.bbox": "tight",
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "0.9",
        "legend.frameon": False,
    }
)

# Nine hues of Paul Tol's "bright" and "muted" schemes, told apart by colour-blind readers too; past nine classes the
# same hues come back with another marker and line, so that 27 classes are 9 colours x 3 markers.
HUES = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#999933", "#332288", "#555555"]
MARKERS = ["o", "^", "s"]
LINES = ["-", "--", ":"]


def look(number: int) -> dict:
    """Colour, marker and line style of class `number`."""
    turn = number // len(HUES) % len(MARKERS)
    return {"color": HUES[number % len(HUES)], "marker": MARKERS[turn], "linestyle": LINES[turn]}


def plain(name: str) -> str:
    """A folder's name as people write it."""
    return name.replace("Ukiyo_e", "Ukiyo-e").replace("_", " ")


def save(figure, path) -> None:
    """Write a PNG beside `path` and rename it, so that a reader never sees half a figure."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    if temporary.stat().st_size > 450_000:  # many paintings: 256 colours make a third of the size for a web page
        with Image.open(temporary) as picture:
            picture.convert("RGB").quantize(256).save(temporary, format="png", optimize=True)
    temporary.replace(path)


def curves(path, history: list[dict], panels: dict[str, dict[str, str]], best: int | None = None) -> None:
    """One panel a measure, over epochs: panels = {"loss": {"training": "loss", "validation": "val_loss"}, ...}."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.8), squeeze=False)
    epochs = [record["epoch"] for record in history]
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for number, (label, key) in enumerate(lines.items()):
            axis.plot(epochs, [record[key] for record in history], label=label, color=HUES[number], lw=2,
                      marker="o" if len(epochs) < 3 else None)  # fmt: skip
        if best is not None:
            axis.axvline(best, color="0.6", lw=1, ls=":", label="checkpoint kept")
        axis.set(title=title, xlabel="epoch", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    save(figure, path)


def confusion(path, counts: np.ndarray, classes: list[str], title: str, normalise: bool) -> None:
    """Confusion matrix (true x predicted); normalised rows are shares of the true class, in per cent."""
    shown = 100 * counts / counts.sum(1, keepdims=True).clip(1) if normalise else counts
    side = max(5.5, 0.42 * len(classes) + 2.5)
    figure, axis = plt.subplots(figsize=(side, side))
    image = axis.imshow(shown, cmap="Blues", vmin=0, vmax=100 if normalise else None)
    names = [plain(name) for name in classes]
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), [f"{name} ({total})" for name, total in zip(names, counts.sum(1), strict=True)])
    axis.set(xlabel="predicted", ylabel="true (pictures)", title=title)
    axis.grid(False)
    for row, column in np.ndindex(shown.shape):
        if shown[row, column] > 0.5:
            dark = shown[row, column] > 0.6 * image.get_clim()[1]
            axis.text(column, row, f"{shown[row, column]:.0f}", ha="center", va="center",
                      fontsize=10 if len(names) < 15 else 8, color="white" if dark else "0.2")  # fmt: skip
    label = "% of the true class" if normalise else "pictures"
    figure.colorbar(image, ax=axis, label=label, fraction=0.046, pad=0.03)
    save(figure, path)


def roc(path, lines: dict[str, tuple[np.ndarray, np.ndarray, float]], title: str) -> None:
    """One-against-the-rest ROC curves: {class: (false positive rate, true positive rate, area)}."""
    figure, axis = plt.subplots(figsize=(6, 5))
    axis.plot([0, 1], [0, 1], color="0.7", lw=1, ls=":", label="guessing 0.500")
    for number, (name, (false, true, area)) in enumerate(lines.items()):
        style = look(number) | {"marker": None}
        axis.plot(false, true, lw=1.8, label=f"{plain(name)} {area:.3f}", **style)
    axis.set(xlabel="false positive rate", ylabel="true positive rate", title=title, aspect="equal")
    axis.legend(title="area under the curve", loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9,
                ncols=1 + len(lines) // 20)  # fmt: skip
    save(figure, path)


def bars(path, groups: dict[str, list], labels: list[str], title: str, ylabel: str, values: bool = False) -> None:
    """Bars side by side: for each label one of every group, {"before": (labels,), "after": (labels,)}."""
    figure, axis = plt.subplots(figsize=(max(7.5, 0.3 * len(labels) * min(len(groups), 4)), 4))
    width = 0.8 / len(groups)
    for number, (name, heights) in enumerate(groups.items()):
        places = np.arange(len(labels)) + (number - (len(groups) - 1) / 2) * width
        drawn = axis.bar(places, heights, width, label=plain(name), color=HUES[number % len(HUES)])
        if values:
            axis.bar_label(drawn, fmt="%d", fontsize=8, rotation=90, padding=2)
    axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axis.set(title=title, ylabel=ylabel)
    axis.margins(x=0.01, y=0.18 if values else 0.05)
    axis.grid(False, axis="x")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def contact_sheet(path, images: np.ndarray, captions: list[str], columns: int, title: str) -> None:
    """Pictures uint8 (N, 3, S, S) in rows, a caption of a few lines below each."""
    rows = max(1, -(-len(images) // columns))
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, (2 + 0.19 * lines) * rows + 0.4),
                                squeeze=False, layout="constrained")  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(np.asarray(image).transpose(1, 2, 0), interpolation="lanczos")
        axis.set_title(caption, y=0, va="top", fontsize=8, pad=-4)
    figure.suptitle(title)
    save(figure, path)


def grid(path, pictures: np.ndarray, columns: list[str], rows: list[str] | None = None, title: str = "") -> None:
    """A table of pictures uint8 (rows, columns, 3, S, S) with column titles, and row titles where given."""
    height, width = pictures.shape[:2]
    figure, axes = plt.subplots(height, width, figsize=(1.25 * width, 1.25 * height + 0.7), squeeze=False,
                                layout="constrained")  # fmt: skip
    for (row, column), axis in np.ndenumerate(axes):
        axis.imshow(pictures[row, column].transpose(1, 2, 0), interpolation="lanczos")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if row == 0:
            axis.set_title(columns[column], fontsize=10)
        if column == 0 and rows:
            axis.set_ylabel(rows[row], fontsize=10)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure.suptitle(title)
    save(figure, path)
