"""Paint the demo data set: invented scenes in the manners of eight procedural painters.

    python demo.py
    python demo.py --data data/small --train-images 200

Makes train/<Style>/<artist>_<title>.jpg, test/..., metadata.csv, and demo.png to look at. The title holds the scene's
number: `town-0007` shows the same town in every style, in the same light and focus, so that a repainting can be held
against the truth. Left to chance are details of the brushwork and the artist; each style has pigments of its own.
"""

import csv
import json
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

import figures
import runs

COLUMNS = ("path", "split", "style", "artist", "genre", "title", "year")
TONES = ("high", "low", "sun", "far", "mid", "near", "dark", "warm", "bright")
HELP = {
    "train_images": "training pictures in all; the styles share them unevenly, as on WikiArt",
    "test_scenes": "test scenes; each is painted once in every style",
    "picture": "width and height of a picture in pixels",
}
# Ten moods of nine hex colours: upper and lower sky, sun, far, mid, near, dark, and two accents.
MOODS = """7a94c4f7d3bdfff3d6a9aecb8fa3945f7f6b2f3c4fd8735ff0bb62 5b9bd5dceef2fffbe69dbdd08fb8775a8f572b4a45dd6b4df4c95d
4a4a8af49d6effdc8c8570a07d5a7a4b3a60241f42e4585ffbc65a 22305e7f95c4fdf3c84a64983c5a80274060121c38d98a5bf2d06b
8fb0c0f3e2c0fff5dab9a58cc98a4b96572f3f2a26b8432fedb13f a9bfd6eef1f0fffaf0c3ccd8d9dfe29aaab53d4a5cb5655ae3c07f
3fa0c8fbe6b8fff6d89fb4a8d8b45a7f9a4a3a4430d4603cf7cf4f 4fb0b8d8f0e4fff8e086c0c04f9aa02f748016404ef0805ff6d27a
b58bb0fbd9d3fff2eac7a4bdb07f967f55733d2b47d9566ef3c08a a9c0a8f0ecd2fffbe4a3b59a7f9a6a4f704824382fc8743fe6c65f"""
# A sitter from back to front: the colour, then the corners in half face widths from the bridge of the nose.
SITTER = """hair -.5,-1.15 .5,-1.15 1,-.6 .95,.2 .9,1.3 -.9,1.3 -.95,.2 -1,-.6
dress -2.7,3.2 -2.1,2.1 -.5,1.6 .5,1.6 2.1,2.1 2.7,3.2
skin -.45,.4 .45,.4 .5,1.7 .7,1.8 0,2.4 -.7,1.8 -.5,1.7
skin -.35,-.95 .35,-.95 .76,-.5 .72,.25 .36,.95 .1,1.08 -.1,1.08 -.36,.95 -.72,.25 -.76,-.5
shadow .1,-.9 .4,-.9 .72,-.45 .68,.25 .34,.9 .08,1 .3,.5 .26,.1
sun -.54,-.07 -.35,-.21 -.15,-.07 -.35,.01
sun .12,-.07 .3,-.21 .5,-.07 .3,.01
dark -.4,-.16 -.27,-.19 -.22,-.06 -.29,.01 -.4,-.02
dark .26,-.16 .39,-.19 .43,-.06 .36,.01 .26,-.02
hair -.6,-.26 -.36,-.42 -.1,-.28 -.36,-.36
hair .08,-.28 .3,-.42 .56,-.26 .3,-.36
shadow -.02,-.2 .05,-.2 .16,.28 .04,.36 -.1,.32 .03,.25
warm -.26,.6 -.05,.53 .03,.57 .1,.53 .28,.6 .02,.73
hair .1,-1.12 .6,-1.1 .95,-.5 .85,.3 .74,.3 .62,-.4 .1,-.75 -.62,-.4 -.74,.3 -.85,.3 -.95,-.5 -.6,-1.1
hat -.75,-.6 -.75,-1.2 -.35,-1.55 .35,-1.55 .75,-1.2 .75,-.6
hat -1.4,-.68 -.8,-.88 .8,-.88 1.4,-.68 .8,-.48 -.8,-.48"""
DOWN = np.pi / 2  # directions are in radians, and y points down


def mix(a, b, t):
    return a + (b - a) * t


def field(rng, cells, size):
    """A smooth random field, about -1 to 1, float32 (size, size), with `cells` bumps to a side."""
    bumps = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(bumps.resize((size, size), Image.Resampling.BICUBIC))


def smooth(points):
    """A polygon (N, 2) with its corners cut three times (Chaikin 1974)."""
    for _ in range(3):
        points = np.stack([mix(points, np.roll(points, -1, 0), t) for t in (0.25, 0.75)], 1).reshape(-1, 2)
    return points


def oval(x, y, rx, ry):
    return [(x + rx * np.cos(turn), y + ry * np.sin(turn)) for turn in np.linspace(0, 6.28, 30)]


def box(x, y, width, height):
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


class Scene:
    """What all painters look at: colour (S, S, 3) in 0..1, region (S, S) numbered, flow (S, S) in radians.

    Places run from 0 to 1 and no random number depends on S: scene 7 is the same at 32 pixels and at 512.
    """

    def __init__(self, number, seed, size):
        self.rng, self.size = np.random.default_rng([seed, number]), size
        self.y, self.x = np.mgrid[:size, :size].astype(np.float32) / size
        self.region, self.flow = np.zeros((size, size), int), np.zeros((size, size), np.float32)
        moods = np.frombuffer(bytes.fromhex(MOODS), np.uint8).reshape(-1, 9, 3) / np.float32(255)
        mood = moods[self.rng.integers(len(moods))] * self.rng.uniform(0.94, 1.05, 3).astype(np.float32)
        tones = zip(TONES, mood, strict=True)
        self.tone, self.parts = SimpleNamespace(**dict(tones)), 0
        KINDS[number % 4](self, self.rng, self.tone)
        self.colour = (self.colour * (1 + 0.05 * field(self.rng, 9, size)[..., None])).clip(0, 1)
        self.flow += 0.5 * field(self.rng, 6, size)
        gamma, *cast, focus = self.rng.uniform((0.75, 0.92, 0.92, 0.92, 0), (1.35, 1.09, 1.09, 1.09, 1))
        self.light, self.blur = gamma * np.array(cast), 0.023 * focus**3  # alike in all styles

    def add(self, points, colour, lit=0.8, flow=None, deep=0.35):
        """Fill a polygon, lighter where `lit` (radians) comes from. Strokes follow `flow`, else go round its middle."""
        points = np.asarray(points) * self.size
        (left, top), (right, bottom) = points.min(0).clip(0).astype(int), points.max(0).clip(0).astype(int) + 1
        here = np.s_[top:bottom, left:right]
        x, y = self.x[here], self.y[here]
        if x.size:
            mask = Image.new("1", x.shape[::-1])
            ImageDraw.Draw(mask).polygon((points - (left, top)).ravel().tolist(), fill=1)
            mask, t = np.asarray(mask), x * np.cos(lit) + y * np.sin(lit)
            t = ((t - t.min()) / (np.ptp(t) + 1e-6))[mask][:, None]
            self.colour[here][mask] = mix(mix(colour, self.tone.sun, 0.3), mix(colour, self.tone.dark, deep), t)
            self.parts += 1
            self.region[here][mask] = self.parts
            self.flow[here][mask] = (np.arctan2(y - y.mean(), x - x.mean()) + DOWN)[mask] if flow is None else flow

    def sky(self, level):
        """All there is above `level`, with a sun or a moon and clouds."""
        tone, x, y, r = self.tone, *self.rng.uniform((0.15, 0.1, 0.035), (0.85, 0.8 * level, 0.08))
        away = (self.x - x) ** 2 + (self.y - y) ** 2
        self.colour = mix(tone.high, tone.low, (self.y / level).clip(0, 1)[..., None])
        self.colour = mix(self.colour, tone.sun, 0.75 * np.exp(-away / 0.08)[..., None])
        self.flow = np.arctan2(self.y - y, self.x - x) + DOWN
        self.add(oval(x, y, r, r), mix(tone.sun, tone.bright, 0.2), deep=0)
        for x, y, w in self.rng.uniform((0, 0.1, 0.1), (1, 0.75 * level, 0.26), (self.rng.integers(1, 5), 3)):
            puffs = [(x + w * u, y - w * (1 - u * u) * self.rng.uniform(0.1, 0.5)) for u in np.linspace(-1, 1, 7)]
            cloud = mix(tone.sun, tone.low, self.rng.uniform(0, 0.8))
            self.add(smooth(np.array([*puffs, (x, y + 0.03)])), cloud, DOWN, 0, 0.12)

    def hills(self, base, height, colour):
        x = np.linspace(-0.02, 1.02, 60)
        rough = sum(np.sin(3.1 * f * x + self.rng.uniform(0, 6.3)) / f**1.1 for f in (1, 2, 3, 5, 9, 15))
        outline = np.stack([x, base - height * (rough + 1.2) / 2.4], 1)
        self.add([*outline, (1.02, 1.02), (-0.02, 1.02)], colour, -DOWN, self.rng.uniform(-0.4, 0.4))  # mist below

    def tree(self, x, foot, height, leaf):
        self.add(box(x - 0.02 * height, foot - 0.5 * height, 0.04 * height, 0.5 * height), self.tone.dark, 0, DOWN)
        wide, low = [(0.04, 0.3), (0.2, 0.5), (0.12, 0.35)][self.rng.integers(3)]  # a cypress, a round crown, a poplar
        for v in np.linspace(low, 0.95, 7):
            a, r = height * wide * self.rng.uniform((-1, 0.7), (1, 1.2))
            self.add(oval(x + a, foot - v * height, r, max(r, 0.1 * height)), mix(leaf, self.tone.dark, 0.3))

    def mirror(self, level):
        """Below `level` lies water: the picture above, upside down, rippled, and dimmer with depth."""
        shore = int(level * self.size)
        depth, x = self.y[shore:] - level, self.x[shore:]
        ripple = np.sin(170 * np.abs(depth) ** 0.7 + 3 * np.sin(9 * x))
        above = ((level - depth + 0.012 * ripple) * self.size).astype(int).clip(0, shore - 1)
        aside = ((x + 0.02 * depth * ripple) * self.size).astype(int).clip(0, self.size - 1)
        self.colour[shore:] = mix(self.colour[above, aside], self.tone.near, 0.15 + 0.5 * depth[..., None])
        self.region[shore:], self.flow[shore:] = self.region[above, aside] + 1000, 0


def landscape(scene, rng, tone):
    level, vanish, form = rng.uniform(0.45, 0.68), rng.uniform(0.2, 0.8), rng.integers(3)
    scene.sky(level)
    for near in np.linspace(0.15, 0.75, rng.integers(1, 4)):
        scene.hills(level + 0.04 * near, rng.uniform(0.1, 0.35) * (1.1 - near), mix(tone.far, tone.mid, near))
    if form == 0:  # a lake with sails, seen from the bank
        for x, h in rng.uniform((0.1, 0.06), (0.9, 0.2), (rng.integers(1, 4), 2)):
            sail = [(x, level - h), (x, level - 0.02), (x + 0.5 * h, level - 0.02)]
            scene.add(sail, rng.choice([tone.sun, tone.warm, tone.bright]), 0)
            scene.add(box(x - 0.3 * h, level - 0.02, h, 0.02), tone.dark, 0, 0)
        scene.mirror(level)
        scene.hills(1.02, rng.uniform(0.06, 0.2), tone.near)
    else:
        scene.add(box(0, level, 1, 1), mix(tone.mid, tone.near, 0.5), DOWN, 0.1)
    if form == 1:  # furrows
        for x, colour in zip(np.arange(-2, 3, 0.2), 9 * [tone.mid, tone.near, tone.bright], strict=False):
            furrow = [(vanish, level), (x + 0.2, 1.02), (x, 1.02)]
            scene.add(furrow, mix(colour, tone.mid, 0.4), DOWN, np.arctan2(1 - level, x - vanish))
    if form == 2:  # a path through a meadow
        t = np.linspace(0, 1, 20)
        x, wide = vanish + rng.uniform(-0.25, 0.25) * np.sin(4 * t) * (0.3 + t), 0.01 + 0.17 * t**2
        path = np.stack([np.r_[x - wide, (x + wide)[::-1]], mix(level, 1.02, np.r_[t, t[::-1]])], 1)
        scene.add(path, mix(tone.sun, tone.bright, 0.3), DOWN, DOWN)
    leaf = mix(tone.near, rng.choice([tone.bright, tone.warm]), rng.uniform(0, 0.5))
    for y in np.sort(rng.random(rng.integers(2, 6)) ** 2) if form else [0.98]:
        x = rng.choice(rng.uniform((0, 0.7), (0.3, 1)))  # trees keep to the sides
        scene.tree(x, mix(level, 0.98, y), 0.1 + 0.5 * y, leaf)


def portrait(scene, rng, tone):
    scene.sky(0.6)
    if rng.random() < 0.5:
        scene.hills(0.62, 0.3, tone.far)
        scene.hills(0.75, 0.2, tone.mid)
    else:  # indoors, before a round picture or a lamp
        wall, (x, y, r) = rng.choice([tone.high, tone.mid, tone.near, tone.warm]), rng.uniform(0.3, (0.7, 0.5, 0.4))
        scene.add(box(0, 0, 1, 1), mix(wall, tone.far, 0.2), 1, 1.2)
        scene.add(oval(x, y, r, r), mix(tone.bright, wall, 0.4))
    skin = mix(tone.sun, np.float32([0.62, 0.33, 0.2]), mix(0.25, 1, rng.random() ** 1.5))
    hair, dress, hat = rng.choice([tone.dark, tone.warm, tone.bright, tone.near], 3)
    colours = dict(vars(tone), skin=skin, hair=mix(hair, tone.dark, 0.3), dress=dress, hat=hat)
    colours["shadow"] = mix(skin, tone.dark, 0.15)
    x, y, size, lean = rng.uniform((0.42, 0.36, 0.19, -0.25), (0.58, 0.44, 0.23, 0.25))
    turn, side = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]]), rng.choice([-1, 1])
    for line in SITTER.splitlines()[: rng.choice([-2, 16])]:  # the last two lines are the hat
        colour, *corners = line.split()
        corners = np.array([corner.split(",") for corner in corners], float) * (side, 1)
        if corners[:, 1].max() > 1.5:  # the head leans, the body does not
            corners = corners @ np.linalg.inv(turn) - (1.3 * np.sin(lean), 0)
        scene.add(smooth(corners @ turn * size + (x, y)), colours[colour], deep=0.2)


def still_life(scene, rng, tone):
    wall, table, *glazes = rng.permutation([tone.high, tone.warm, tone.mid, tone.near, tone.bright, tone.far, tone.sun])
    edge = rng.uniform(0.55, 0.68)
    scene.sky(edge)
    scene.add(box(0, 0, 1, 1), wall, 0.8, 0.8)
    scene.add(box(0, edge, 1, 1), table, 1.2, 0)
    x, foot = rng.uniform(0.28, 0.72), edge + rng.uniform(0.08, 0.14)
    for i, at in enumerate((x + rng.choice([-0.28, 0.28]), x)):
        height = rng.uniform(0.28, 0.36)
        for a, b in rng.normal((at, foot - height - 0.14), (0.12, 0.07), (12 * i, 2)):  # flowers, in the second only
            scene.add([(at - 0.015, foot - 0.2), (at + 0.015, foot - 0.2), (a, b)], tone.near, 0, DOWN)
            petal, r = rng.choice([tone.warm, tone.bright, tone.sun]), rng.uniform(0.035, 0.07)
            scene.add(smooth(rng.normal(oval(a, b, r, r)[::4], 0.01)), petal)
            scene.add(oval(a, b, 0.3 * r, 0.3 * r), mix(petal, tone.dark, 0.7))
        half = rng.choice([[0.1, 0.11, 0.11, 0.1, 0.03, 0.03], [0.07, 0.11, 0.12, 0.1, 0.05, 0.08]])
        sides, v = np.r_[at - half, at + half[::-1]], np.linspace(foot, foot - height, 6)
        scene.add(oval(at + 0.07, foot, 0.16, 0.03), mix(table, tone.dark, 0.5), 0, 0)
        scene.add(smooth(np.stack([sides, np.r_[v, v[::-1]]], 1)), glazes[i], 0.4)
        scene.add(oval(at - 0.05, foot - 0.5 * height, 0.012, 0.06), mix(glazes[i], tone.sun, 0.6))
    for y in np.linspace(foot + 0.04, 0.93, rng.integers(3, 7)):
        (x, r), fruit = rng.uniform((0.1, 0.055), (0.9, 0.085)), rng.choice([tone.warm, tone.bright, tone.near])
        scene.add(oval(x + 0.6 * r, y + 0.75 * r, 1.3 * r, 0.4 * r), mix(table, tone.dark, 0.5), 0, 0)
        scene.add(oval(x, y, r, 0.92 * r), fruit)
        scene.add(oval(x - 0.35 * r, y - 0.35 * r, 0.22 * r, 0.18 * r), tone.sun)


def town(scene, rng, tone):
    (ground, spire), lamp = rng.uniform((0.66, 0.15), (0.8, 0.85)), mix(tone.bright, tone.dark, rng.choice([0, 0.8]))
    scene.sky(ground)
    scene.hills(ground - 0.1, 0.25, tone.far)
    scene.add(box(spire - 0.04, 0.3, 0.08, 1), tone.far, 0, DOWN)
    scene.add([(spire - 0.05, 0.3), (spire, 0.1), (spire + 0.05, 0.3)], mix(tone.near, tone.far, 0.5), 0, DOWN)
    for haze in (0.5, 0):  # the back row of houses is taller and paler
        x = rng.uniform(-0.15, 0)
        while x < 1:
            w, h, gable, flat = rng.uniform((0.13, 0.16 + 0.2 * haze, 0.06, 0), (0.24, 0.3 + 0.3 * haze, 0.14, 0.4))
            wall = mix(rng.choice([tone.sun, tone.warm, tone.bright, tone.low]), tone.sun, rng.uniform(0, 0.3))
            wall, roof, eaves = mix(wall, tone.far, haze), rng.choice([tone.warm, tone.dark, tone.near]), ground - h
            scene.add(box(x, eaves, w, h), wall, 0.3, DOWN)
            ridge = [(x + w * flat, eaves - gable), (x + w * (1 - flat), eaves - gable)]
            scene.add([(x - 0.01, eaves), *ridge, (x + w + 0.01, eaves)], mix(roof, tone.far, 1.2 * haze), 0.5, 0.7)
            for a in np.linspace(x + 0.2 * w, x + 0.8 * w, rng.integers(2, 4)):
                for b in np.linspace(ground - 0.85 * h, ground - 0.35 * h, rng.integers(2, 4)):
                    scene.add(box(a - 0.016, b - 0.02, 0.032, 0.045), mix(lamp, wall, haze), DOWN, DOWN)
            x += w
    scene.add(box(0, ground - 0.01, 1, 1), mix(tone.low, tone.near, 0.4), DOWN, 0)
    if rng.random() < 0.6:
        return scene.mirror(ground + 0.015)  # a canal
    for x in rng.random(3):
        scene.tree(x, ground + rng.uniform(0.04, 0.15), rng.uniform(0.2, 0.4), tone.near)


KINDS = [landscape, portrait, still_life, town]  # scene n shows KINDS[n % 4]


def soft(colour, radius):
    picture = Image.fromarray((colour * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(float(radius)))
    return np.asarray(picture, np.float32) / 255


def means(colour, part):
    """The mean colour of each part of the picture, where that part lies."""
    total = np.stack([np.bincount(part.ravel(), colour[..., c].ravel()) for c in range(3)], 1)
    return (total / np.bincount(part.ravel()).clip(1)[:, None])[part]


def touches(scene, rng, count, vary):
    """`count` random places (x, y) in pixels, with the colour there, each varied by a touch; 8 bit."""
    x, y = rng.integers(0, scene.size, (2, count))
    colour = scene.colour[y, x] + rng.normal(0, vary, (count, 3))
    return x, y, [tuple(c) for c in (255 * colour.clip(0, 1)).astype(int).tolist()]


def dots(scene, hand, rng):
    """Points of broken colour on primed canvas, which mix in the eye only."""
    picture = Image.fromarray((255 * mix(soft(scene.colour, scene.size / 40), 0.9, 0.4)).astype(np.uint8))
    draw, r = ImageDraw.Draw(picture), scene.size / 75 * hand.grain
    for x, y, colour in zip(*touches(scene, rng, int(3800 / hand.grain**2), 0.09 * hand.force), strict=True):
        draw.ellipse((x - r, y - r, x + r, y + r), colour)
    return np.asarray(picture) / 255


def strokes(scene, hand, rng):
    """Loaded brush strokes that follow the forms, wide ones first; the ridges of the paint catch the light."""
    picture = Image.fromarray((255 * soft(scene.colour, scene.size / 40)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for width, count in ((scene.size / 28 * hand.grain, 600), (scene.size / 60 * hand.grain, 2000)):
        for x, y, colour in zip(*touches(scene, rng, count, 0.07 * hand.force), strict=True):
            turn = scene.flow[y, x] + hand.turn
            u, v = 1.8 * width * np.cos(turn), 1.8 * width * np.sin(turn)
            draw.line((x - u - 0.2 * v, y - v + 0.2 * u, x, y, x + u - 0.2 * v, y + v + 0.2 * u), colour, round(width))
    paint = np.asarray(picture) / 255
    lower = np.roll(paint, max(1, scene.size // 256), (0, 1))
    return paint + 0.7 * hand.force * (paint - soft(lower, scene.size / 200)).mean(2)[..., None]


def facets(scene, hand, rng):
    """The scene broken by straight cuts; every shard has its own point of view and a little light of its own."""
    code, dx, dy, near = 0, 0, 0, 1
    for i, turn in enumerate(hand.turn + rng.uniform(0, 3.14, round(10 / hand.grain))):
        side = (scene.x - rng.uniform(0.1, 0.9)) * np.cos(turn) + (scene.y - rng.uniform(0.1, 0.9)) * np.sin(turn)
        code, near = code + (side > 0) * 2**i, np.minimum(near, np.abs(side))
        dx, dy = dx + np.sign(side) * 0.012 * np.cos(turn), dy + np.sign(side) * 0.012 * np.sin(turn)
    y, x = ((place * scene.size).astype(int).clip(0, scene.size - 1) for place in (scene.y + dy, scene.x + dx))
    view, light = scene.colour[y, x], rng.uniform(-0.1, 0.1, code.max() + 1)[code] * hand.force
    view = mix(means(view, code), view, 0.6) + (light + 0.25 * np.sign(light) * (0.12 - near.clip(0, 0.2)))[..., None]
    return np.where(near[..., None] < 0.003, mix(view, scene.tone.dark, 0.4), view) * 1.06


def outlines(scene, hand, rng):
    """Flat areas in two tones each, bound by a dark line drawn with a loose wrist."""
    bend = np.stack([field(rng, 14, scene.size), field(rng, 14, scene.size)]) * 0.012 * hand.force
    y, x = ((np.stack([scene.y, scene.x]) + bend) * scene.size).astype(int).clip(0, scene.size - 1)
    region, colour = scene.region[y, x], scene.colour[y, x]
    shaded = colour.mean(2) < means(colour, region).mean(2)
    line = np.diff(region, 1, 0, region[:1]) | np.diff(region, 1, 1, region[:, :1]) != 0
    width = 1 + 2 * round(scene.size / 180 * hand.grain)
    line = Image.fromarray(line).convert("L")
    if width > 1:  # Pillow 12.3, which Gradio asks for, crashes at a filter of one pixel
        line = line.filter(ImageFilter.MaxFilter(width))
    return np.where(np.asarray(line)[..., None] > 0, scene.tone.dark * 0.7, means(colour, region * 2 + shaded) * 1.05)


def halftone(scene, hand, rng):
    """Three inks printed as dots that grow with the tone, each screen at its own angle, on coloured paper."""
    paper = mix(scene.tone.low, 1, 0.4)
    inks = np.array([[0.1, 0.6, 0.72], [0.9, 0.3, 0.42], [0.98, 0.82, 0.25]])
    density = -np.log((scene.colour / paper).clip(0.03, 1)) @ np.linalg.inv(-np.log(inks))
    for i, turn in enumerate((0.26, 1.31, 0.8)):
        u, v = (np.cos(turn + hand.turn + q) * scene.x + np.sin(turn + hand.turn + q) * scene.y for q in (0, DOWN))
        screen = 0.5 + (np.cos(200 / hand.grain * u) + np.cos(200 / hand.grain * v)) / 4
        paper = paper * np.where((density[..., i] * hand.force > screen)[..., None], inks[i], 1)
    return paper


def bands(scene, hand, rng):
    """Sheets of cut paper, one for each level of light, dark ones on top; each throws a shadow on the next."""
    light = soft(scene.colour, scene.size / 90 * hand.grain).mean(2) + 0.03 * hand.force * field(rng, 6, scene.size)
    papers = np.stack(sorted(vars(scene.tone).values(), key=np.sum))
    sheet = np.searchsorted((papers[1:] + papers[:-1]).mean(1) / 2, light)
    fall = round(scene.size / 64 * hand.grain)
    above = np.pad(sheet, ((fall, 0), (fall, 0)), "edge")[: scene.size, : scene.size] < sheet
    shadow = soft(np.repeat(above[..., None], 3, 2), scene.size / 200)
    return mix(papers[sheet], means(scene.colour, sheet), 0.4) * (1.05 - 0.4 * shadow)


def drips(scene, hand, rng):
    """Colour poured down an upright canvas, which runs, beads, and spatters."""
    picture = Image.fromarray((255 * mix(soft(scene.colour, scene.size / 30), 0.95, 0.15)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for x, y, colour in zip(*touches(scene, rng, 1200, 0.06), strict=True):
        run, r = scene.size * rng.exponential(0.055) * hand.force, scene.size / 110 * hand.grain * rng.uniform(0.3, 1.2)
        draw.rectangle((x - 0.6 * r, y, x + 0.6 * r, y + run), colour)
        draw.ellipse((x - r, y + run - r, x + r, y + run + 1.5 * r), colour)
    return np.asarray(picture) / 255


def hatching(scene, hand, rng):
    """Pen and wash: the darker the place, the more directions of lines cross there."""
    dark = 1 - scene.colour.mean(2)
    ink = np.zeros_like(dark)
    for i, level in enumerate((0.2, 0.4, 0.55, 0.7)):
        turn = hand.turn + 0.6 + i * 1.1
        across = 220 / hand.grain * (scene.x * np.cos(turn) + scene.y * np.sin(turn))
        wave = np.cos(across + 1.2 * field(rng, 8, scene.size))
        ink = np.maximum(ink, wave > 1 - 1.6 * (dark - level).clip(0, 0.5) * hand.force)
    wash = mix(soft(scene.colour, scene.size / 60), np.float32([0.97, 0.94, 0.87]), 0.35)
    return mix(wash, scene.tone.dark * 0.8, ink[..., None])


# Each style: its painter, what its pigments make of white, its share of the training pictures, its artists. Each one's
# last two artists occur in test only, so that recognising the artist cannot pass for recognising the style.
STYLES = {
    "Bands": (bands, "f2cdbb", 24, "mira-holt joss-arden pell-vaughn suri-lacombe"),
    "Dots": (dots, "fff4dc", 160, "nadia-voss emile-harrow tova-lind oscar-pruitt ines-calder"),
    "Drips": (drips, "a9b6d6", 60, "cy-marlowe ruth-benning abel-kost wanda-frey"),
    "Facets": (facets, "d2b48c", 90, "leon-straka iva-moreno paul-dessin greta-oum hugo-tarn"),
    "Flat_outlines": (outlines, "ffffff", 240, "kei-amano lotte-brandt sami-okoro yuna-hale finn-carrow dora-weiss"),
    "Halftone": (halftone, "fffafa", 40, "max-pringle bea-sato tom-ludlow kit-romero"),
    "Hatching": (hatching, "f2e2c2", 120, "albin-durr clara-nemec josef-quill edda-marsh piet-hollar"),
    "Strokes": (strokes, "f0d8a0", 360, "vera-dumont ansel-grove mila-petrov theo-baines rosa-lindqvist joris-keel"),
}


def hand_of(artist):
    """What an artist does in their own way: how coarse, how bold, on what slant, with what tint."""
    rng = np.random.default_rng(crc32(artist.encode()))
    grain, force, turn = rng.uniform((0.7, 0.7, -0.3), (1.4, 1.3, 0.3))
    return SimpleNamespace(grain=grain, force=force, turn=turn, tint=rng.uniform(0.94, 1.04, 3))


def plan(config):
    """A row of metadata.csv for each picture. Styles draw their train scenes from one pool, so they share many."""
    rng, rows, whole = np.random.default_rng(config.seed), [], sum(share for *_, share, _ in STYLES.values())
    counts = [max(2, round(config.train_images * share / whole)) for *_, share, _ in STYLES.values()]
    for s, (style, (*_, names)) in enumerate(STYLES.items()):
        seen, unseen = names.split()[:-2][: counts[s]], names.split()[-2:]
        scenes = config.test_scenes + rng.choice(max(counts), counts[s], replace=False)
        works = [("train", scene, seen[i % len(seen)]) for i, scene in enumerate(scenes)]
        for scene in range(config.test_scenes):  # half of every kind of scene goes to unseen artists
            works.append(("test", scene, str(rng.choice(unseen if (scene + scene // 4 + s) % 2 else seen))))
        for split, scene, artist in works:
            genre = KINDS[scene % 4].__name__
            title, year = f"{genre}-{scene:04d}", 1880 + crc32(artist.encode()) % 90 + rng.integers(30)
            genre *= rng.random() < 0.9  # a tenth have none, as on WikiArt
            row = f"{split}/{style}/{artist}_{title}.jpg", split, style, artist, genre, title, year
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def paint(folder, config, rows):
    """Draw a scene, and let each artist who has it among the rows paint it."""
    number = int(rows[0]["title"].split("-")[1])
    scene = Scene(number, config.seed, 2 * config.picture)  # drawn at twice the size: reduced, edges come out smooth
    for row in rows:
        hand, rng = hand_of(row["artist"]), np.random.default_rng([config.seed, number, crc32(row["artist"].encode())])
        painter, pigments, *_ = STYLES[row["style"]]
        picture = painter(scene, hand, rng) * hand.tint * list(bytes.fromhex(pigments)) / 255
        picture = 255 * soft(picture.clip(0, 1) ** scene.light, scene.blur * scene.size)
        Image.fromarray(picture.astype(np.uint8)).reduce(2).save(folder / row["path"], quality=92, subsampling=0)


def draw_sheet(folder, config, rows):
    """The first test scenes in every style, as one figure."""
    scenes = range(min(5, config.test_scenes))
    found = {(row["style"], int(row["title"][-4:])): folder / row["path"] for row in rows if row["split"] == "test"}
    pictures = np.stack([[np.asarray(Image.open(found[style, scene])) for style in STYLES] for scene in scenes])
    titles = [figures.plain(style) for style in STYLES]
    figures.grid(
        folder / "demo.png", pictures.transpose(0, 1, 4, 2, 3), titles, title="One scene a row, in eight manners"
    )


def main(argv=None):
    config = runs.configure("demo", __doc__, ("data", "seed", "processes"), HELP, argv)
    data, settings = Path(config.data), json.dumps({key: getattr(config, key) for key in ("seed", *HELP)})
    if (data / "demo.json").exists() and (data / "demo.json").read_text() == settings:
        return print(f"{data} is already there, made with the same settings")
    if data.exists() and (data.is_file() or any(data.iterdir())):
        made = "made by demo.py with other settings" if (data / "demo.json").exists() else "not made by demo.py"
        raise runs.Problem(f"{data} is there already, {made}: remove it, or name another --data")
    rows, scenes = plan(config), defaultdict(list)
    for row in rows:
        scenes[row["title"]].append(row)
    data.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=data.parent) as scratch:
        folder = Path(scratch, "demo")
        for row in rows:
            (folder / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(config.processes or None) as pool:
            painted = pool.map(partial(paint, folder, config), scenes.values())
            list(tqdm(painted, total=len(scenes), desc="painting", unit="scene"))
        with open(folder / "metadata.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        draw_sheet(folder, config, rows)
        (folder / "demo.json").write_text(settings)
        folder.rename(data)  # all or nothing: an interrupted run leaves no half data set
    print(f"painted {len(rows)} pictures of {len(scenes)} scenes into {data}")


if __name__ == "__main__":
    runs.start(main)
