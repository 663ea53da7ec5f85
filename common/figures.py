"""The plots that scripts share, and their matplotlib style and class colours."""

import re
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: GPU servers have no screen

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from common.names import display_name  # noqa: E402
from common.run import atomic_write  # noqa: E402

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

# Nine hues of the schemes of Tol, and of Okabe and Ito, which colour-blind readers distinguish: tests/test_figures.py.
# Past nine classes the same hues come back with another marker and line, so that all of 27 classes differ.
HUES = ["#4477AA", "#E69F00", "#1B1B1B", "#EE6677", "#332288", "#88CCEE", "#997700", "#882255", "#DDCC77"]
MARKERS = ["o", "^", "s", "D", "v", "P"]
LINES = ["-", "--", ":"]


def class_style(number: int) -> dict:
    """Colour, marker and line style of class `number`."""
    turn = number // len(HUES)
    marker = MARKERS[(number + turn) % len(MARKERS)]  # neighbours differ in marker, too
    return {"color": HUES[number % len(HUES)], "marker": marker, "linestyle": LINES[turn % len(LINES)]}


def save(figure, path) -> None:
    """Write a PNG, completely or not at all, and close the figure; makes its folder."""
    Path(path).parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
        plt.close(figure)
        with Image.open(temporary) as picture:
            picture = picture.convert("RGB")
        picture.save(temporary, format="png", optimize=True)  # packed better than by matplotlib


def save_picture(picture: Image.Image, path) -> None:
    """Write a PNG, completely or not at all; makes its folder."""
    Path(path).parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="png", optimize=True)


def curves(path, history: list[dict], panels: dict, best=None, levels=None, logarithmic=()) -> None:
    """One panel per measure, over epochs: panels = {"loss": {"training": "loss", "validation": "val_loss"}, ...}.

    history: a record per epoch; best: the epoch whose checkpoint was kept, a dotted line; levels: dashed lines to
    compare with, {"loss": {"guessing": 2.1}}; logarithmic: titles of panels.
    """
    epochs = [record["epoch"] for record in history]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (title, keys) in zip(axes[0], panels.items(), strict=True):
        for number, (label, key) in enumerate(keys.items()):
            values, marker = [record[key] for record in history], "o" if len(epochs) < 3 else None
            axis.plot(epochs, values, label=label, color=HUES[number], lw=2, marker=marker)
        for number, (label, height) in enumerate((levels or {}).get(title, {}).items(), len(keys)):
            axis.axhline(height, color=HUES[number], lw=1.5, ls="--", label=label)
        if best is not None:
            axis.axvline(best, color="0.6", lw=1, ls=":", label="checkpoint kept")
        axis.set(title=title, xlabel="epoch", ylabel=title, yscale="log" if title in logarithmic else "linear")
        if title in logarithmic:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")  # the usual ones are formulas, which are off
            axis.yaxis.set_minor_formatter("")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    save(figure, path)


def confusion(path, counts: np.ndarray, classes: list[str], title: str) -> None:
    """Confusion matrix from counts (true, predicted); each row is shown in per cent of its true class."""
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    names = [display_name(name) for name in classes]
    rows = [f"{name} ({total})" for name, total in zip(names, counts.sum(1), strict=True)]
    heat(path, percent, rows, names, title, "% of the true class", ("predicted", "true (pictures)"))


def heat(path, table: np.ndarray, rows: list[str], columns: list[str], title: str, unit: str, axes=("", "")) -> None:
    """A table of numbers (rows, columns) as a heat map; a `unit` that starts with % fixes the scale at 0 to 100."""
    width, height = (max(5.5, 0.42 * len(names) + 2.5) for names in (columns, rows))
    figure, axis = plt.subplots(figsize=(width, height))
    image = axis.imshow(table, cmap="Blues", vmin=0, vmax=100 if unit.startswith("%") else None)
    axis.set_xticks(range(len(columns)), [display_name(name) for name in columns], rotation=90)
    axis.set_yticks(range(len(rows)), [display_name(name) for name in rows])
    axis.set(xlabel=axes[0], ylabel=axes[1], title=title)
    axis.grid(False)
    size = 10 if len(columns) < 15 else 8
    for row, column in np.ndindex(table.shape):
        if table[row, column] > 0.5:
            color = "white" if table[row, column] > 0.6 * image.get_clim()[1] else "0.2"
            axis.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=size, color=color)
    figure.colorbar(image, ax=axis, label=unit, fraction=0.046, pad=0.03)
    save(figure, path)


def scatter(path, panels: dict[str, tuple[np.ndarray, np.ndarray, list[str]]], title: str) -> None:
    """Points in the plane, in panels: {name: (places (N, 2), numbers (N,), names of the numbers)}."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 6.8), squeeze=False, layout="constrained")
    for axis, (name, (places, numbers, names)) in zip(axes.flat, panels.items(), strict=True):
        for number, label in enumerate(names):
            members = places[numbers == number]
            style = class_style(number)
            size = max(4, min(24, 3e4 / len(places)))
            looks = {"color": style["color"], "marker": style["marker"], "linewidths": 0, "alpha": 0.75}
            axis.scatter(*members.T, s=size, label=display_name(label), **looks)
        axis.set(title=name, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(False)
        columns = 2 if len(names) < 12 else 3
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": columns, "columnspacing": 0.8}
        legend = axis.legend(**place, markerscale=1.6, fontsize=11 if columns == 2 else 8, handletextpad=0.2)
        for handle in legend.legend_handles:
            handle.set_alpha(1)
    figure.suptitle(title)
    save(figure, path)


def roc(path, lines: dict[str, tuple[np.ndarray, np.ndarray, float]], title: str) -> None:
    """One-against-the-rest ROC curves: {class: (false positive rate, true positive rate, area)}."""
    figure, axis = plt.subplots(figsize=(6, 5))
    axis.plot([0, 1], [0, 1], color="0.7", lw=1, ls=":", label="guessing 0.500")
    for number, (name, (false, true, area)) in enumerate(lines.items()):
        style = class_style(number) | {"marker": None}
        axis.plot(false, true, lw=1.8, label=f"{display_name(name)} {area:.3f}", **style)
    axis.set(xlabel="false positive rate", ylabel="true positive rate", title=title, aspect="equal")
    columns = 1 + len(lines) // 20
    axis.legend(title="area under the curve", loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9, ncols=columns)
    save(figure, path)


def bars(path, groups: dict, labels: list[str], title: str, ylabel: str, values: bool = False) -> None:
    """Bars side by side: for each label one of every group, {"before": (labels,), "after": (labels,)}.

    With their `values` written above them, where that is asked for.
    """
    figure, axis = plt.subplots(figsize=(max(7.5, 0.3 * len(labels) * min(len(groups), 4)), 4))
    width = 0.8 / len(groups)
    for number, (name, heights) in enumerate(groups.items()):
        places = np.arange(len(labels)) + (number - (len(groups) - 1) / 2) * width
        drawn = axis.bar(places, heights, width, label=display_name(name), color=HUES[number % len(HUES)])
        if values:
            axis.bar_label(drawn, fmt="%d", fontsize=8, rotation=90, padding=2)
    axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axis.set(ylabel=ylabel)
    columns = min(5, len(groups))
    axis.set_title(title, pad=16 + 18 * -(-len(groups) // columns))  # above the legend
    axis.margins(x=0.01, y=0.18 if values else 0.05)
    axis.grid(False, axis="x")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=9, columnspacing=1.2)
    save(figure, path)


def grid(path, pictures: np.ndarray, columns: list[str], rows: list[str] | None = None, title: str = "") -> None:
    """A table of pictures uint8 (rows, columns, 3, S, S) with column titles, and row titles where given."""
    height, width = pictures.shape[:2]
    side, step = 128, 132
    canvas = np.full((height * step - 4, width * step - 4, 3), 255, np.uint8)
    for row, column in np.ndindex(height, width):
        top, left = row * step, column * step
        picture = Image.fromarray(pictures[row, column].transpose(1, 2, 0))
        canvas[top : top + side, left : left + side] = picture.resize((side, side), Image.Resampling.BICUBIC)
    figure, axis = plt.subplots(figsize=(1.25 * width + 1, 1.25 * height + 0.7))
    axis.imshow(canvas)
    axis.xaxis.tick_top()
    long = max((len(name) for name in columns), default=0) > 12
    rotation, alignment = (30, "left") if long else (0, "center")
    axis.set_xticks(np.arange(width) * step + side / 2, columns, fontsize=10, rotation=rotation, ha=alignment)
    axis.set_yticks(np.arange(height) * step + side / 2, rows or [""] * height, fontsize=10)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    axis.set_title(title, pad=10)
    save(figure, path)


def painting_grid(path, pictures: np.ndarray, columns: list[str], rows: list[str], title: str, side: int = 160) -> None:
    """A table of pictures uint8 (rows, columns, 3, H, W) in true colours and real pixels, at most `side` a cell."""
    width, height = cell_size(pictures, side)
    size = text_size(len(columns) * width, width)
    columns, rows = [
        [fit_lines(name, room, size) for name in names] for names, room in ((columns, width), (rows, height))
    ]
    gap, line = 4, round(1.25 * size)
    top, left = 2 * line + line * lines_of(columns) + gap, line * lines_of(rows) + gap
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    write(canvas, (canvas.width / 2, line), title, size)
    for column, name in enumerate(columns):
        write(canvas, (left + column * (width + gap) + width / 2, top - gap - line * lines_of(columns) / 2), name, size)
    for row, name in enumerate(rows):
        label = Image.new("RGB", (height, left), "white")
        write(label, (height / 2, left / 2), name, size)
        canvas.paste(label.rotate(90, expand=True), (0, top + row * (height + gap)))
        for column, picture in enumerate(pictures[row]):
            canvas.paste(cell_of(picture, width, height), (left + column * (width + gap), top + row * (height + gap)))
    save_picture(canvas, path)


def contact_sheet(path, pictures, captions: list[str], columns: int, title: str, side: int = 224) -> None:
    """Pictures, uint8 (3, H, W) each, in rows of `columns` square cells, each above its caption of a few lines."""
    size = min(20, text_size(columns * side, side))
    captions = [fit_lines(caption, side, size) for caption in captions]
    title = fit_lines(title, columns * side, size)
    gap, line = 8, round(1.25 * size)
    top, step = line * (lines_of([title]) + 1), side + line * lines_of(captions) + 2 * gap
    canvas = Image.new("RGB", (columns * (side + gap) - gap, top + -(-len(pictures) // columns) * step), "white")
    write(canvas, (canvas.width / 2, top / 2), title, size)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = number % columns * (side + gap), top + number // columns * step
        cell = cell_of(picture, *cell_size(picture, side))
        canvas.paste(cell, (x + (side - cell.width) // 2, y + (side - cell.height) // 2))
        write(canvas, (x + side / 2, y + side + gap / 2), caption, size, "ma")
    save_picture(canvas, path)


def cell_size(pictures, side: int) -> tuple[int, int]:
    """Width and height of pictures (..., H, W), the longer one `side`."""
    height, width = np.shape(pictures)[-2:]
    return max(1, round(width * side / max(height, width))), max(1, round(height * side / max(height, width)))


def cell_of(picture, width: int, height: int) -> Image.Image:
    """A picture, uint8 (3, H, W), at another size."""
    return Image.fromarray(np.asarray(picture).transpose(1, 2, 0)).resize((width, height), Image.Resampling.LANCZOS)


def text_size(width: int, cell: int) -> int:
    """Height of letters, in pixels, that can be read where a picture is shown smaller, as on a phone."""
    return max(13, min(width // 45, cell // 8))


def fit_lines(text: str, width: int, size: int) -> str:
    """Text in lines that fit into `width` pixels; its own line breaks stay."""
    return "\n".join(part for line in text.split("\n") for part in break_line(line, width, size))


def break_line(text: str, width: int, size: int) -> list[str]:
    """Text in lines that end at spaces, hyphens and underscores."""
    lines = [""]
    for word in re.split("(?<=[-_ ])", text):
        if font(size).getlength((lines[-1] + word).rstrip()) <= width:
            lines[-1] += word
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font(size).getlength(lines[-1] + letter.rstrip()) > width:  # a word longer than a line
                lines.append("")
            lines[-1] += letter
    return [line.rstrip() for line in lines]


def lines_of(texts: list[str]) -> int:
    return max((text.count("\n") + 1 for text in texts), default=0)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own, which has the letters of more scripts than Pillow's."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def write(
    canvas: Image.Image, place: tuple[float, float], text: str, size: int, anchor: str = "mm", fill="black"
) -> None:
    ImageDraw.Draw(canvas).text(place, text, fill, font(size), anchor=anchor, align="center")


def thumbnails(path, pictures, cells, columns: int, labels, classes: list[str], title: str, side: int = 48) -> None:
    """Pictures uint8 (N, 3, S, S) in the cells (N,) of a grid; up to nine classes have frames of their own colours."""
    gap, frame = 2, 3
    step, rows = side + 2 * frame + gap, 1 + max(cells) // columns
    size = max(13, columns * step // 50)
    classes = classes if len(classes) <= len(HUES) else []
    longest = max((len(display_name(name)) for name in classes), default=0)
    in_row = max(1, min(5, int(columns * step / (0.6 * size * (longest + 3)))))  # names of the legend
    title, line = fit_lines(title, columns * step, size), round(1.5 * size)
    top, bottom = line * lines_of([title]), -(-len(classes) // in_row) * line
    canvas = Image.new("RGB", (columns * step, top + rows * step + bottom), "white")
    draw = ImageDraw.Draw(canvas)
    write(canvas, (canvas.width / 2, top / 2), title, size)
    for picture, cell, label in zip(pictures, cells, labels, strict=True):
        x, y = cell % columns * step, top + cell // columns * step
        if classes:
            draw.rectangle((x, y, x + step - gap - 1, y + step - gap - 1), class_style(label)["color"])
        canvas.paste(cell_of(picture, side, side), (x + frame, y + frame))
    for number, name in enumerate(classes):
        x, y = number % in_row * canvas.width // in_row, canvas.height - bottom + number // in_row * line + line // 2
        draw.rectangle((x, y - size // 2, x + size, y + size // 2), class_style(number)["color"])
        write(canvas, (x + 1.4 * size, y), display_name(name), size, "lm")
    save_picture(canvas, path)


def pair_grid(path, rows: list, columns: list[str], names: list[str], side: int = 128) -> None:
    """Rows (example (3, S, S), pairs (columns, 2, 3, S, S)), uint8: without and with, side by side under each title."""
    gap, space, size = 2, 14, 20
    pair, top, left = 2 * side + gap + space, 4 * size, round(1.5 * size)
    canvas = Image.new("RGB", (left + side + space + len(columns) * pair, top + len(rows) * (side + 6)), "white")
    write(canvas, (left + side / 2, size), "learned from", size)
    for number, title in enumerate(columns):
        x = left + side + space + number * pair
        write(canvas, (x + side, size), title, size)
        for place, word in enumerate(("without", "with LoRA")):
            write(canvas, (x + place * (side + gap) + side / 2, 2.8 * size), word, size, fill=("grey", "black")[place])
    for number, (name, (example, pairs)) in enumerate(zip(names, rows, strict=True)):
        y = top + number * (side + 6)
        label = Image.new("RGB", (side, left), "white")
        write(label, (side / 2, left / 2), name, size)
        canvas.paste(label.rotate(90, expand=True), (0, y))
        places = [(left, example)]
        for column, both in enumerate(pairs):
            x = left + side + space + column * pair
            places += [(x, both[0]), (x + side + gap, both[1])]
        for x, picture in places:
            canvas.paste(cell_of(picture, side, side), (x, y))
    save_picture(canvas, path)
