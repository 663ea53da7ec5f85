"""The palette, and the pieces of figures that scripts share."""

import itertools

import numpy as np
from PIL import Image

from common import figures
from common.images import highlight

# What protanopes, deuteranopes and tritanopes see, as maps of linear RGB (Machado, Oliveira and Fernandes 2009).
SIGHTS = [
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def in_lab(colour: str) -> np.ndarray:
    """A colour as each of the SIGHTS sees it, in CIELAB (4, 3), where distances are as large as they look."""
    channels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(((np.array(SIGHTS) @ linear).clip(0, 1) @ XYZ.T) / [0.95047, 1, 1.08883]).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def difference(first: str, second: str) -> float:
    return np.linalg.norm(in_lab(first) - in_lab(second), axis=1).min()


def test_27_classes_are_distinguishable_with_colour_vision_deficiency():
    styles = [figures.class_style(number) for number in range(27)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 27
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 27
    for first, second in itertools.combinations(styles[:9], 2):
        distance = difference(first["color"], second["color"])
        assert distance > (33 if first["marker"] == second["marker"] else 20), (first, second, distance)


def test_evidence_is_tinted_and_the_rest_is_grey():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    evidence = np.full((2, 2), -1.0)
    evidence[0, 0] = 1
    lit = np.asarray(highlight(picture, evidence)).astype(int)
    assert np.ptp(lit[-4:, -4:], axis=2).max() == 0
    assert (lit[:8, :8, 0] > lit[:8, :8, 2] + 40).all()


def test_file_names_break_at_hyphens_and_underscores():
    lines = figures.fit_lines("adriaen-van-de-velde_view-in-amsterdam.jpg", 224, 20).split("\n")
    assert "".join(lines) == "adriaen-van-de-velde_view-in-amsterdam.jpg"
    assert len(lines) > 1 and all(line.endswith(("-", "_")) for line in lines[:-1])
