"""Procedural paintings for demo.py: invented scenes, and artists who paint them in eight styles.

    scene = Scene(7, seed=0, size=256)                    # a town
    pixels = Artist("mira-holt").paint(scene, "Bands")    # uint8 (256, 256, 3)

The same arguments give the same pixels. Directions are in radians, and y points down.
"""

from types import SimpleNamespace
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TONES = ("high", "low", "sun", "far", "mid", "near", "dark", "warm", "bright")
# Ten palettes of nine hex colours: upper and lower sky, sun, far, mid, near, dark, and two accents.
PALETTES = """
7a94c4f7d3bdfff3d6a9aecb8fa3945f7f6b2f3c4fd8735ff0bb62 5b9bd5dceef2fffbe69dbdd08fb8775a8f572b4a45dd6b4df4c95d
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
DOWN = np.pi / 2


class Style(NamedTuple):
    white: str  # what its pigments make of white, in hex
    share: int  # of the training paintings
    artists: str  # the last two only paint test paintings: recognising the artist is not recognising the style


STYLES = {  # the method of Artist has the style's name in lower case
    "Bands": Style("f2cdbb", 24, "mira-holt joss-arden pell-vaughn suri-lacombe"),
    "Dots": Style("fff4dc", 160, "nadia-voss emile-harrow tova-lind oscar-pruitt ines-calder"),
    "Drips": Style("a9b6d6", 60, "cy-marlowe ruth-benning abel-kost wanda-frey"),
    "Facets": Style("d2b48c", 90, "leon-straka iva-moreno paul-dessin greta-oum hugo-tarn"),
    "Flat_outlines": Style("ffffff", 240, "kei-amano lotte-brandt sami-okoro yuna-hale finn-carrow dora-weiss"),
    "Halftone": Style("fffafa", 40, "max-pringle bea-sato tom-ludlow kit-romero"),
    "Hatching": Style("f2e2c2", 120, "albin-durr clara-nemec josef-quill edda-marsh piet-hollar"),
    "Strokes": Style("f0d8a0", 360, "vera-dumont ansel-grove mila-petrov theo-baines rosa-lindqvist joris-keel"),
}


def mix(a, b, t):
    return a + (b - a) * t


def noise(rng, cells: int, size: int) -> np.ndarray:
    """A smooth random field, about -1 to 1, float32 (size, size), with `cells` bumps to a side."""
    bumps = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(bumps.resize((size, size), Image.Resampling.BICUBIC))


def blur(colour, radius) -> np.ndarray:
    """A picture (S, S, 3) in [0, 1] after a Gaussian blur, float32."""
    picture = Image.fromarray((colour * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(float(radius)))
    return np.asarray(picture, np.float32) / 255


def region_means(colour, region) -> np.ndarray:
    """A picture (S, S, 3) with the mean colour of its region (S, S) at each pixel."""
    total = np.stack([np.bincount(region.ravel(), colour[..., channel].ravel()) for channel in range(3)], 1)
    return (total / np.bincount(region.ravel()).clip(1)[:, None])[region]


def rounded(points):
    """A polygon (N, 2) with its corners cut three times (Chaikin 1974)."""
    for _ in range(3):
        points = np.stack([mix(points, np.roll(points, -1, 0), t) for t in (0.25, 0.75)], 1).reshape(-1, 2)
    return points


def oval(x, y, rx, ry):
    return [(x + rx * np.cos(angle), y + ry * np.sin(angle)) for angle in np.linspace(0, 6.28, 30)]


def box(x, y, width, height):
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


class Scene:
    """A scene: colour (S, S, 3) in [0, 1], region (S, S) numbers its shapes, flow (S, S) directs strokes (radians).

    Scene `number` shows GENRES[number % 4]. Coordinates run from 0 to 1 and no random number depends on S: scene 7 is
    the same at 32 pixels and at 512.
    """

    GENRES = ("landscape", "portrait", "still_life", "town")

    def __init__(self, number: int, seed: int, size: int):
        self.number, self.seed, self.size = number, seed, size
        self.rng = np.random.default_rng([seed, number])
        self.y, self.x = np.mgrid[:size, :size].astype(np.float32) / size
        self.region, self.flow = np.zeros((size, size), int), np.zeros((size, size), np.float32)
        palettes = np.frombuffer(bytes.fromhex(PALETTES), np.uint8).reshape(-1, 9, 3) / np.float32(255)
        palette = palettes[self.rng.integers(len(palettes))] * self.rng.uniform(0.94, 1.05, 3).astype(np.float32)
        self.tone, self.shapes = SimpleNamespace(**dict(zip(TONES, palette, strict=True))), 0
        getattr(self, self.GENRES[number % 4])(self.rng, self.tone)
        self.colour = (self.colour * (1 + 0.05 * noise(self.rng, 9, size)[..., None])).clip(0, 1)
        self.flow += 0.5 * noise(self.rng, 6, size)
        gamma, *cast, focus = self.rng.uniform((0.75, 0.92, 0.92, 0.92, 0), (1.35, 1.09, 1.09, 1.09, 1))
        self.gamma, self.blur = gamma * np.array(cast), 0.023 * focus**3  # the same in all styles

    def add(self, points, colour, light=0.8, flow=None, shade=0.35):
        """Fill a polygon, lighter towards `light` (radians). Strokes follow `flow`, or else go round its centre."""
        points = np.asarray(points) * self.size
        (left, top), (right, bottom) = points.min(0).clip(0).astype(int), points.max(0).clip(0).astype(int) + 1
        window = np.s_[top:bottom, left:right]
        x, y = self.x[window], self.y[window]
        if x.size:
            mask = Image.new("1", x.shape[::-1])
            ImageDraw.Draw(mask).polygon((points - (left, top)).ravel().tolist(), fill=1)
            mask, t = np.asarray(mask), x * np.cos(light) + y * np.sin(light)
            t = ((t - t.min()) / (np.ptp(t) + 1e-6))[mask][:, None]
            self.colour[window][mask] = mix(mix(colour, self.tone.sun, 0.3), mix(colour, self.tone.dark, shade), t)
            self.shapes += 1
            self.region[window][mask] = self.shapes
            around = np.arctan2(y - y.mean(), x - x.mean()) + DOWN
            self.flow[window][mask] = around[mask] if flow is None else flow

    def sky(self, horizon):
        """Everything above the horizon, with a sun or a moon and clouds."""
        tone, x, y, r = self.tone, *self.rng.uniform((0.15, 0.1, 0.035), (0.85, 0.8 * horizon, 0.08))
        squared_distance = (self.x - x) ** 2 + (self.y - y) ** 2
        self.colour = mix(tone.high, tone.low, (self.y / horizon).clip(0, 1)[..., None])
        self.colour = mix(self.colour, tone.sun, 0.75 * np.exp(-squared_distance / 0.08)[..., None])
        self.flow = np.arctan2(self.y - y, self.x - x) + DOWN
        self.add(oval(x, y, r, r), mix(tone.sun, tone.bright, 0.2), shade=0)
        for x, y, w in self.rng.uniform((0, 0.1, 0.1), (1, 0.75 * horizon, 0.26), (self.rng.integers(1, 5), 3)):
            puffs = [(x + w * u, y - w * (1 - u * u) * self.rng.uniform(0.1, 0.5)) for u in np.linspace(-1, 1, 7)]
            cloud = mix(tone.sun, tone.low, self.rng.uniform(0, 0.8))
            self.add(rounded(np.array([*puffs, (x, y + 0.03)])), cloud, DOWN, 0, 0.12)

    def hills(self, base, height, colour):
        x = np.linspace(-0.02, 1.02, 60)
        waves = sum(np.sin(3.1 * f * x + self.rng.uniform(0, 6.3)) / f**1.1 for f in (1, 2, 3, 5, 9, 15))
        outline = np.stack([x, base - height * (waves + 1.2) / 2.4], 1)
        self.add([*outline, (1.02, 1.02), (-0.02, 1.02)], colour, -DOWN, self.rng.uniform(-0.4, 0.4))  # mist below

    def tree(self, x, foot, height, leaf):
        self.add(box(x - 0.02 * height, foot - 0.5 * height, 0.04 * height, 0.5 * height), self.tone.dark, 0, DOWN)
        wide, low = [(0.04, 0.3), (0.2, 0.5), (0.12, 0.35)][self.rng.integers(3)]  # a cypress, a round crown, a poplar
        for v in np.linspace(low, 0.95, 7):
            a, r = height * wide * self.rng.uniform((-1, 0.7), (1, 1.2))
            self.add(oval(x + a, foot - v * height, r, max(r, 0.1 * height)), mix(leaf, self.tone.dark, 0.3))

    def water(self, shore):
        """Water below `shore`: the picture above, upside down, rippled, and darker with depth."""
        row = int(shore * self.size)
        depth, x = self.y[row:] - shore, self.x[row:]
        ripple = np.sin(170 * np.abs(depth) ** 0.7 + 3 * np.sin(9 * x))
        above = ((shore - depth + 0.012 * ripple) * self.size).astype(int).clip(0, row - 1)
        aside = ((x + 0.02 * depth * ripple) * self.size).astype(int).clip(0, self.size - 1)
        self.colour[row:] = mix(self.colour[above, aside], self.tone.near, 0.15 + 0.5 * depth[..., None])
        self.region[row:], self.flow[row:] = self.region[above, aside] + 1000, 0

    def landscape(self, rng, tone):
        horizon, vanish, kind = rng.uniform(0.45, 0.68), rng.uniform(0.2, 0.8), rng.integers(3)
        self.sky(horizon)
        for near in np.linspace(0.15, 0.75, rng.integers(1, 4)):
            self.hills(horizon + 0.04 * near, rng.uniform(0.1, 0.35) * (1.1 - near), mix(tone.far, tone.mid, near))
        if kind == 0:  # a lake with sails, seen from the bank
            for x, h in rng.uniform((0.1, 0.06), (0.9, 0.2), (rng.integers(1, 4), 2)):
                sail = [(x, horizon - h), (x, horizon - 0.02), (x + 0.5 * h, horizon - 0.02)]
                self.add(sail, rng.choice([tone.sun, tone.warm, tone.bright]), 0)
                self.add(box(x - 0.3 * h, horizon - 0.02, h, 0.02), tone.dark, 0, 0)
            self.water(horizon)
            self.hills(1.02, rng.uniform(0.06, 0.2), tone.near)
        else:
            self.add(box(0, horizon, 1, 1), mix(tone.mid, tone.near, 0.5), DOWN, 0.1)
        if kind == 1:  # furrows
            for x, colour in zip(np.arange(-2, 3, 0.2), 9 * [tone.mid, tone.near, tone.bright], strict=False):
                furrow = [(vanish, horizon), (x + 0.2, 1.02), (x, 1.02)]
                self.add(furrow, mix(colour, tone.mid, 0.4), DOWN, np.arctan2(1 - horizon, x - vanish))
        if kind == 2:  # a path through a meadow
            t = np.linspace(0, 1, 20)
            x, wide = vanish + rng.uniform(-0.25, 0.25) * np.sin(4 * t) * (0.3 + t), 0.01 + 0.17 * t**2
            path = np.stack([np.r_[x - wide, (x + wide)[::-1]], mix(horizon, 1.02, np.r_[t, t[::-1]])], 1)
            self.add(path, mix(tone.sun, tone.bright, 0.3), DOWN, DOWN)
        leaf = mix(tone.near, rng.choice([tone.bright, tone.warm]), rng.uniform(0, 0.5))
        for y in np.sort(rng.random(rng.integers(2, 6)) ** 2) if kind else [0.98]:
            x = rng.choice(rng.uniform((0, 0.7), (0.3, 1)))  # trees stand at the sides
            self.tree(x, mix(horizon, 0.98, y), 0.1 + 0.5 * y, leaf)

    def portrait(self, rng, tone):
        self.sky(0.6)
        if rng.random() < 0.5:
            self.hills(0.62, 0.3, tone.far)
            self.hills(0.75, 0.2, tone.mid)
        else:  # indoors, in front of a round picture or a lamp
            wall, (x, y, r) = rng.choice([tone.high, tone.mid, tone.near, tone.warm]), rng.uniform(0.3, (0.7, 0.5, 0.4))
            self.add(box(0, 0, 1, 1), mix(wall, tone.far, 0.2), 1, 1.2)
            self.add(oval(x, y, r, r), mix(tone.bright, wall, 0.4))
        skin = mix(tone.sun, np.float32([0.62, 0.33, 0.2]), mix(0.25, 1, rng.random() ** 1.5))
        hair, dress, hat = rng.choice([tone.dark, tone.warm, tone.bright, tone.near], 3)
        colours = dict(vars(tone), skin=skin, hair=mix(hair, tone.dark, 0.3), dress=dress, hat=hat)
        colours["shadow"] = mix(skin, tone.dark, 0.15)
        x, y, size, lean = rng.uniform((0.42, 0.36, 0.19, -0.25), (0.58, 0.44, 0.23, 0.25))
        rotation, side = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]]), rng.choice([-1, 1])
        for line in SITTER.splitlines()[: rng.choice([-2, 16])]:  # the last two lines are the hat
            colour, *corners = line.split()
            corners = np.array([corner.split(",") for corner in corners], float) * (side, 1)
            if corners[:, 1].max() > 1.5:  # the head leans, the body does not
                corners = corners @ np.linalg.inv(rotation) - (1.3 * np.sin(lean), 0)
            self.add(rounded(corners @ rotation * size + (x, y)), colours[colour], shade=0.2)

    def still_life(self, rng, tone):
        tones = [tone.high, tone.warm, tone.mid, tone.near, tone.bright, tone.far, tone.sun]
        (wall, table, *glazes), edge = rng.permutation(tones), rng.uniform(0.55, 0.68)
        self.sky(edge)
        self.add(box(0, 0, 1, 1), wall, 0.8, 0.8)
        self.add(box(0, edge, 1, 1), table, 1.2, 0)
        x, foot = rng.uniform(0.28, 0.72), edge + rng.uniform(0.08, 0.14)
        for i, centre in enumerate((x + rng.choice([-0.28, 0.28]), x)):  # two vases, flowers in the second only
            height = rng.uniform(0.28, 0.36)
            for a, b in rng.normal((centre, foot - height - 0.14), (0.12, 0.07), (12 * i, 2)):
                self.add([(centre - 0.015, foot - 0.2), (centre + 0.015, foot - 0.2), (a, b)], tone.near, 0, DOWN)
                petal, r = rng.choice([tone.warm, tone.bright, tone.sun]), rng.uniform(0.035, 0.07)
                self.add(rounded(rng.normal(oval(a, b, r, r)[::4], 0.01)), petal)
                self.add(oval(a, b, 0.3 * r, 0.3 * r), mix(petal, tone.dark, 0.7))
            half = rng.choice([[0.1, 0.11, 0.11, 0.1, 0.03, 0.03], [0.07, 0.11, 0.12, 0.1, 0.05, 0.08]])
            sides, v = np.r_[centre - half, centre + half[::-1]], np.linspace(foot, foot - height, 6)
            self.add(oval(centre + 0.07, foot, 0.16, 0.03), mix(table, tone.dark, 0.5), 0, 0)
            self.add(rounded(np.stack([sides, np.r_[v, v[::-1]]], 1)), glazes[i], 0.4)
            self.add(oval(centre - 0.05, foot - 0.5 * height, 0.012, 0.06), mix(glazes[i], tone.sun, 0.6))
        for y in np.linspace(foot + 0.04, 0.93, rng.integers(3, 7)):
            (x, r), fruit = rng.uniform((0.1, 0.055), (0.9, 0.085)), rng.choice([tone.warm, tone.bright, tone.near])
            self.add(oval(x + 0.6 * r, y + 0.75 * r, 1.3 * r, 0.4 * r), mix(table, tone.dark, 0.5), 0, 0)
            self.add(oval(x, y, r, 0.92 * r), fruit)
            self.add(oval(x - 0.35 * r, y - 0.35 * r, 0.22 * r, 0.18 * r), tone.sun)

    def town(self, rng, tone):
        ground, spire = rng.uniform((0.66, 0.15), (0.8, 0.85))
        lamp = mix(tone.bright, tone.dark, rng.choice([0, 0.8]))
        self.sky(ground)
        self.hills(ground - 0.1, 0.25, tone.far)
        self.add(box(spire - 0.04, 0.3, 0.08, 1), tone.far, 0, DOWN)
        self.add([(spire - 0.05, 0.3), (spire, 0.1), (spire + 0.05, 0.3)], mix(tone.near, tone.far, 0.5), 0, DOWN)
        for haze in (0.5, 0):  # the back row of houses is taller and paler
            x = rng.uniform(-0.15, 0)
            while x < 1:
                w, h, gable, flat = rng.uniform((0.13, 0.16 + 0.2 * haze, 0.06, 0), (0.24, 0.3 + 0.3 * haze, 0.14, 0.4))
                wall = mix(rng.choice([tone.sun, tone.warm, tone.bright, tone.low]), tone.sun, rng.uniform(0, 0.3))
                wall, roof, eaves = mix(wall, tone.far, haze), rng.choice([tone.warm, tone.dark, tone.near]), ground - h
                self.add(box(x, eaves, w, h), wall, 0.3, DOWN)
                ridge = [(x + w * flat, eaves - gable), (x + w * (1 - flat), eaves - gable)]
                self.add([(x - 0.01, eaves), *ridge, (x + w + 0.01, eaves)], mix(roof, tone.far, 1.2 * haze), 0.5, 0.7)
                for a in np.linspace(x + 0.2 * w, x + 0.8 * w, rng.integers(2, 4)):
                    for b in np.linspace(ground - 0.85 * h, ground - 0.35 * h, rng.integers(2, 4)):
                        self.add(box(a - 0.016, b - 0.02, 0.032, 0.045), mix(lamp, wall, haze), DOWN, DOWN)
                x += w
        self.add(box(0, ground - 0.01, 1, 1), mix(tone.low, tone.near, 0.4), DOWN, 0)
        if rng.random() < 0.6:
            return self.water(ground + 0.015)  # a canal
        for x in rng.random(3):
            self.tree(x, ground + rng.uniform(0.04, 0.15), rng.uniform(0.2, 0.4), tone.near)


class Artist:
    """An artist, whose name determines how coarse, contrasty, slanted and tinted all their paintings are.

    The method of each style makes a scene a picture (S, S, 3), about 0 to 1; `rng` varies the details.
    """

    def __init__(self, name: str):
        self.name, rng = name, np.random.default_rng(crc32(name.encode()))
        self.grain, self.force, self.slant = rng.uniform((0.7, 0.7, -0.3), (1.4, 1.3, 0.3))
        self.tint = rng.uniform(0.94, 1.04, 3)

    def paint(self, scene: Scene, style: str) -> np.ndarray:
        """A scene in one of the STYLES, uint8 (S, S, 3)."""
        rng = np.random.default_rng([scene.seed, scene.number, crc32(self.name.encode())])
        picture = getattr(self, style.lower())(scene, rng) * self.tint * list(bytes.fromhex(STYLES[style].white)) / 255
        return (255 * blur(picture.clip(0, 1) ** scene.gamma, scene.blur * scene.size)).astype(np.uint8)

    def touches(self, scene, rng, count, variation):
        """`count` random positions (x, y) in pixels, with the 8-bit colour there, varied at random."""
        x, y = rng.integers(0, scene.size, (2, count))
        colour = scene.colour[y, x] + rng.normal(0, variation, (count, 3))
        colours = [tuple(values) for values in (255 * colour.clip(0, 1)).astype(int).tolist()]
        return zip(x, y, colours, strict=True)

    def dots(self, scene, rng):
        """Points of broken colour on primed canvas."""
        picture = Image.fromarray((255 * mix(blur(scene.colour, scene.size / 40), 0.9, 0.4)).astype(np.uint8))
        draw, r = ImageDraw.Draw(picture), scene.size / 75 * self.grain
        for x, y, colour in self.touches(scene, rng, int(3800 / self.grain**2), 0.09 * self.force):
            draw.ellipse((x - r, y - r, x + r, y + r), colour)
        return np.asarray(picture) / 255

    def strokes(self, scene, rng):
        """Brush strokes along the flow, wide ones first; ridges of paint catch the light."""
        picture = Image.fromarray((255 * blur(scene.colour, scene.size / 40)).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for width, count in ((scene.size / 28 * self.grain, 600), (scene.size / 60 * self.grain, 2000)):
            for x, y, colour in self.touches(scene, rng, count, 0.07 * self.force):
                angle = scene.flow[y, x] + self.slant
                u, v = 1.8 * width * np.cos(angle), 1.8 * width * np.sin(angle)
                line = x - u - 0.2 * v, y - v + 0.2 * u, x, y, x + u - 0.2 * v, y + v + 0.2 * u
                draw.line(line, colour, round(width))
        paint = np.asarray(picture) / 255
        lower = np.roll(paint, max(1, scene.size // 256), (0, 1))
        return paint + 0.7 * self.force * (paint - blur(lower, scene.size / 200)).mean(2)[..., None]

    def facets(self, scene, rng):
        """The scene cut by straight lines; each shard is shifted and lit differently."""
        code, dx, dy, near = 0, 0, 0, 1
        for i, angle in enumerate(self.slant + rng.uniform(0, 3.14, round(10 / self.grain))):
            side = (scene.x - rng.uniform(0.1, 0.9)) * np.cos(angle) + (scene.y - rng.uniform(0.1, 0.9)) * np.sin(angle)
            code, near = code + (side > 0) * 2**i, np.minimum(near, np.abs(side))
            dx, dy = dx + np.sign(side) * 0.012 * np.cos(angle), dy + np.sign(side) * 0.012 * np.sin(angle)
        y, x = ((place * scene.size).astype(int).clip(0, scene.size - 1) for place in (scene.y + dy, scene.x + dx))
        view, light = scene.colour[y, x], rng.uniform(-0.1, 0.1, code.max() + 1)[code] * self.force
        view = mix(region_means(view, code), view, 0.6)
        view = view + (light + 0.25 * np.sign(light) * (0.12 - near.clip(0, 0.2)))[..., None]
        return np.where(near[..., None] < 0.003, mix(view, scene.tone.dark, 0.4), view) * 1.06

    def flat_outlines(self, scene, rng):
        """Flat areas in two tones each, bounded by a dark, loosely drawn line."""
        bend = np.stack([noise(rng, 14, scene.size), noise(rng, 14, scene.size)]) * 0.012 * self.force
        y, x = ((np.stack([scene.y, scene.x]) + bend) * scene.size).astype(int).clip(0, scene.size - 1)
        region, colour = scene.region[y, x], scene.colour[y, x]
        shaded = colour.mean(2) < region_means(colour, region).mean(2)
        line = np.diff(region, 1, 0, region[:1]) | np.diff(region, 1, 1, region[:, :1]) != 0
        line, width = Image.fromarray(line).convert("L"), 1 + 2 * round(scene.size / 180 * self.grain)
        if width > 1:  # Pillow 12.3 crashes at a filter of one pixel
            line = line.filter(ImageFilter.MaxFilter(width))
        areas = region_means(colour, region * 2 + shaded) * 1.05
        return np.where(np.asarray(line)[..., None] > 0, scene.tone.dark * 0.7, areas)

    def halftone(self, scene, rng):
        """Three inks as dots that grow with the tone, each screen at its own angle, on coloured paper."""
        paper = mix(scene.tone.low, 1, 0.4)
        inks = np.array([[0.1, 0.6, 0.72], [0.9, 0.3, 0.42], [0.98, 0.82, 0.25]])
        density = -np.log((scene.colour / paper).clip(0.03, 1)) @ np.linalg.inv(-np.log(inks))
        for i, screen in enumerate((0.26, 1.31, 0.8)):
            angles = (screen + self.slant + turn for turn in (0, DOWN))
            u, v = (np.cos(angle) * scene.x + np.sin(angle) * scene.y for angle in angles)
            threshold = 0.5 + (np.cos(200 / self.grain * u) + np.cos(200 / self.grain * v)) / 4
            paper = paper * np.where((density[..., i] * self.force > threshold)[..., None], inks[i], 1)
        return paper

    def bands(self, scene, rng):
        """Sheets of cut paper, one for each level of light, dark ones on top, each with a shadow."""
        light = blur(scene.colour, scene.size / 90 * self.grain).mean(2) + 0.03 * self.force * noise(rng, 6, scene.size)
        papers = np.stack(sorted(vars(scene.tone).values(), key=np.sum))
        sheet = np.searchsorted((papers[1:] + papers[:-1]).mean(1) / 2, light)
        offset = round(scene.size / 64 * self.grain)
        above = np.pad(sheet, ((offset, 0), (offset, 0)), "edge")[: scene.size, : scene.size] < sheet
        shadow = blur(np.repeat(above[..., None], 3, 2), scene.size / 200)
        return mix(papers[sheet], region_means(scene.colour, sheet), 0.4) * (1.05 - 0.4 * shadow)

    def drips(self, scene, rng):
        """Colour that runs down an upright canvas."""
        picture = Image.fromarray((255 * mix(blur(scene.colour, scene.size / 30), 0.95, 0.15)).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for x, y, colour in self.touches(scene, rng, 1200, 0.06):
            run = scene.size * rng.exponential(0.055) * self.force
            r = scene.size / 110 * self.grain * rng.uniform(0.3, 1.2)
            draw.rectangle((x - 0.6 * r, y, x + 0.6 * r, y + run), colour)
            draw.ellipse((x - r, y + run - r, x + r, y + run + 1.5 * r), colour)
        return np.asarray(picture) / 255

    def hatching(self, scene, rng):
        """Pen and wash: the darker the place, the more directions of lines cross."""
        dark = 1 - scene.colour.mean(2)
        ink = np.zeros_like(dark)
        for i, level in enumerate((0.2, 0.4, 0.55, 0.7)):
            angle = self.slant + 0.6 + i * 1.1
            across = 220 / self.grain * (scene.x * np.cos(angle) + scene.y * np.sin(angle))
            wave = np.cos(across + 1.2 * noise(rng, 8, scene.size))
            ink = np.maximum(ink, wave > 1 - 1.6 * (dark - level).clip(0, 0.5) * self.force)
        wash = mix(blur(scene.colour, scene.size / 60), np.float32([0.97, 0.94, 0.87]), 0.35)
        return mix(wash, scene.tone.dark * 0.8, ink[..., None])
