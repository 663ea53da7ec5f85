"""Paint the demo data set: invented scenes in the styles of eight procedural painters.

    python demo.py
    python demo.py --data data/small --train-images 200

Writes train/<Style>/<artist>_<title>.jpg, test/..., metadata.csv, and demo.png, an overview. The title holds the
scene's number: `town-0007` shows the same town in every style, in the same light and focus, so that a repainting can
be compared with the truth. The artist and details of the brushwork are random; each style has its own pigments.
"""

import csv
import glob
import json
import os
import shutil
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from zlib import crc32

import common.packages  # noqa: F401

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import figures
from common.config import Setting, configure
from common.errors import UserError
from common.images import end_with
from common.names import display_name
from common.painter import STYLES, Artist, Scene
from common.run import claim, run_script

SHARED = ("data", "seed", "processes")
SETTINGS = {
    "train_images": Setting(int, "[1, inf)", "training pictures; the styles share them unevenly, as on WikiArt"),
    "test_scenes": Setting(int, "[1, inf)", "test scenes; each is painted once in every style"),
    "picture": Setting(int, "[16, inf)", "width and height of a picture in pixels"),
}


def main(argv=None):
    config = configure("demo", __doc__, SETTINGS, SHARED, argv)
    data, settings = Path(config.data), json.dumps({key: getattr(config, key) for key in ("seed", *SETTINGS)})
    if (data / "demo.json").exists() and (data / "demo.json").read_text() == settings:
        print(f"{data} is already there, made with the same settings")
        return
    if data.exists() and (data.is_file() or any(data.iterdir())):
        origin = "was written with other settings" if (data / "demo.json").exists() else "was not written by demo.py"
        raise UserError(f"{data} exists and {origin}: remove it, or give another --data")

    paintings, scenes = plan(config), defaultdict(list)
    for painting in paintings:
        scenes[painting["title"]].append(painting)
    lock = claim(data.parent, data.name, "--data")
    for leftover in data.parent.glob(f".{glob.escape(data.name)}-*/"):  # of a run that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f".{data.name}-", dir=data.parent) as scratch:
        folder = Path(scratch, "demo")
        for painting in paintings:
            (folder / painting["path"]).parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(config.processes or None, None, end_with, [os.getpid()]) as pool:
            finished = pool.map(partial(paint, folder, config), scenes.values())
            list(tqdm(finished, total=len(scenes), desc="painting", unit="scene"))
        with open(folder / "metadata.csv", "w", newline="") as file:
            table = csv.DictWriter(file, paintings[0])
            table.writeheader()
            table.writerows(paintings)
        plot_overview(folder, config.test_scenes, paintings)
        (folder / "demo.json").write_text(settings)
        folder.rename(data)  # last, so that an interrupted run leaves no incomplete data set
    lock.close()
    print(f"painted {len(paintings)} pictures of {len(scenes)} scenes into {data}")


def plan(config) -> list[dict]:
    """The row of metadata.csv of each painting. All test scenes and the first training scenes are in every style."""
    rng, rows, shares = np.random.default_rng(config.seed), [], sum(style.share for style in STYLES.values())
    counts = [max(2, round(config.train_images * style.share / shares)) for style in STYLES.values()]
    for number, (name, style) in enumerate(STYLES.items()):
        seen, unseen = style.artists.split()[:-2][: counts[number]], style.artists.split()[-2:]
        others = min(counts) + rng.permutation(max(counts) - min(counts))  # of one pool, so that styles share many
        scenes = config.test_scenes + np.array([*range(min(counts)), *others][: counts[number]])
        works = [("train", scene, seen[i % len(seen)]) for i, scene in enumerate(scenes)]
        for scene in range(config.test_scenes):  # half of every genre's scenes go to unseen artists
            works.append(("test", scene, str(rng.choice(unseen if (scene + scene // 4 + number) % 2 else seen))))
        for split, scene, artist in works:
            genre = Scene.GENRES[scene % 4]
            title, year = f"{genre}-{scene:04d}", 1880 + crc32(artist.encode()) % 90 + rng.integers(30)
            row = {"path": f"{split}/{name}/{artist}_{title}.jpg", "split": split, "style": name, "artist": artist}
            genre = genre if rng.random() < 0.9 else ""  # a tenth have none, as on WikiArt
            rows.append(row | {"genre": genre, "title": title, "year": year})
    return rows


def paint(folder: Path, config, paintings: list[dict]) -> None:
    """Write the paintings of one scene, each by its artist."""
    number = int(paintings[0]["title"].split("-")[1])
    scene = Scene(number, config.seed, 2 * config.picture)  # at twice the size, then reduced: smooth edges
    for painting in paintings:
        picture = Image.fromarray(Artist(painting["artist"]).paint(scene, painting["style"]))
        picture.reduce(2).save(folder / painting["path"], quality=92, subsampling=0)


def plot_overview(folder: Path, test_scenes: int, paintings: list[dict]) -> None:
    """The first test scenes in every style, as one figure."""
    test = [painting for painting in paintings if painting["split"] == "test"]
    files = {(painting["style"], int(painting["title"][-4:])): folder / painting["path"] for painting in test}
    rows = [[np.asarray(Image.open(files[style, scene])) for style in STYLES] for scene in range(min(5, test_scenes))]
    names = [display_name(style) for style in STYLES]
    pictures = np.array(rows).transpose(0, 1, 4, 2, 3)
    figures.grid(folder / "demo.png", pictures, names, title="The same scene in eight styles, one scene a row")


if __name__ == "__main__":
    run_script(main)
