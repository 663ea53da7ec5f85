"""The nouns of the project: a folder of paintings as a data set, the class-balancing sampler, and the networks.

    data = WikiArt("/scratch/wikiart", "train", size=128)
    data.classes                   # ['Baroque', 'Cubism', ...], the sorted folder names of train/
    pixels, label = data[0]        # uint8 (3, 128, 128), int

Pictures travel as uint8 (N, 3, S, S) until they are on the device; there `random_crops` or `views` turns one batch
into floats between 0 and 1. The networks take those floats and normalise them themselves.
"""

import copy
import csv
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm


class DataError(OSError):
    """The folder of paintings is not what it should be; the message is one line that says what to do."""


# Reading pictures -----------------------------------------------------------------------------------------------------


def read_picture(path, size: int, resize: str = "squash") -> np.ndarray:
    """Any file that Pillow reads, as uint8 (3, size, size) RGB.

    The whole picture is squashed into the square, or its centre is cropped out. Raises OSError, ValueError and
    others for what is no picture, and Image.DecompressionBombError for more than 179 million pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # big scans and odd metadata only warn; what can't be read still raises
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # JPEGs decode at an eighth to the whole of their size
            image = as_rgb(ImageOps.exif_transpose(image))
    if resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def as_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and 16-bit pictures as RGB; transparent ones on white; of animations the first frame."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# The pixel cache ------------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> dict[str, os.stat_result]:
    """Every file below the style folders of `folder`, by its path `<Style>/<name>`, sorted; hidden ones left out."""
    files = {}
    for directory, names, leaves in os.walk(folder, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".")]
        if Path(directory) == folder:
            continue  # files beside the style folders (a README, say) are not paintings
        for leaf in leaves:
            path = Path(directory, leaf)
            if not leaf.startswith(".") and path.exists():
                files[path.relative_to(folder).as_posix()] = path.stat()
    return dict(sorted(files.items()))


def cache_folder(root: Path) -> Path:
    """`<root>/.cache`, or a folder in the user's own cache where `root` may not be written to."""
    # A folder without any write bit is meant to stay as it is, even for root, whom os.access always lets through.
    if root.stat().st_mode & 0o222 and os.access(root, os.W_OK):
        return root / ".cache"
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "wikiart" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]


def pixel_cache(folder: Path, where: Path, size: int, resize: str, processes: int = 0) -> tuple[np.ndarray, dict]:
    """Decode every file below `folder` once; from then on map the pixels from disk.

    Returns the pixels, uint8 (N, 3, size, size), and an index: `files` (N paths), `hashes` (of each one's pixels),
    `broken` (path to reason) and `fingerprint`. The cache is named after the files' names, sizes and times of change,
    so that a changed folder gets a new one. It is built in a temporary folder under a lock, then renamed: a second
    program waits and finds it whole, and what a killed build left behind goes. Raises DataError where it cannot be
    written.
    """
    files = list_files(folder)
    key = hashlib.sha256()
    for path, stat in files.items():
        key.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    prefix = f"{folder.name}-{resize}-{size}-"
    ready = where / (prefix + key.hexdigest()[:16])
    try:
        where.mkdir(parents=True, exist_ok=True)
        with open(where / "lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # not flock, which forked children would go on holding
            if not ready.exists():
                for stale in where.glob(f"*{prefix}*"):
                    shutil.rmtree(stale, ignore_errors=True)
                building = where / f"building-{prefix}"
                building.mkdir()
                build_cache(folder, list(files), building, size, resize, processes)
                building.rename(ready)
    except OSError as error:
        raise DataError(f"could not write the pixel cache in {where}: {error.strerror or error}") from None
    index = json.loads((ready / "index.json").read_text()) | {"fingerprint": ready.name}
    if index["broken"]:
        names = ready / "left_out.txt"
        print(f"{len(index['broken'])} of {len(files)} files in {folder} are left out: see {names}", file=sys.stderr)
    if not files:
        return np.empty((0, 3, size, size), np.uint8), index
    return np.memmap(ready / "pixels.uint8", np.uint8, "r", shape=(len(files), 3, size, size)), index


def build_cache(folder: Path, files: list[str], target: Path, size: int, resize: str, processes: int) -> None:
    """Decode `files`, in several processes, into target/pixels.uint8, and write index.json and left_out.txt there."""
    hashes, broken = [], {}
    loader = DataLoader(
        Decoder(folder, files, size, resize),
        batch_size=32,
        num_workers=processes or torch.get_num_threads(),
        collate_fn=list,  # lists of arrays come through a pipe; tensors would need a large /dev/shm
        multiprocessing_context="fork",  # children that start at once: all they need is Pillow and numpy
    )
    with open(target / "pixels.uint8", "wb") as file, tqdm(total=len(files), desc=f"decoding {folder.name}") as bar:
        for path, (picture, reason) in zip(files, itertools.chain.from_iterable(loader), strict=True):
            if reason:
                broken[path] = reason
                picture = np.zeros((3, size, size), np.uint8)
            hashes.append(hashlib.sha256(picture).hexdigest()[:16])
            file.write(picture)
            bar.update()
    (target / "left_out.txt").write_text("".join(f"{path}\t{reason}\n" for path, reason in broken.items()))
    (target / "index.json").write_text(json.dumps({"files": files, "hashes": hashes, "broken": broken}))


class Decoder(Dataset):
    """The files as (pixels, None), or (None, the reason) where a file cannot be read."""

    def __init__(self, folder: Path, files: list[str], size: int, resize: str):
        self.folder, self.files, self.size, self.resize = folder, files, size, resize

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        try:
            picture = read_picture(self.folder / self.files[row], self.size, self.resize)
            return np.ascontiguousarray(picture), None
        except Exception as error:  # Pillow's readers raise almost anything on damaged files
            return None, f"{type(error).__name__}: {error}".replace("\n", " ")


# The data set ---------------------------------------------------------------------------------------------------------


class WikiArt(Dataset):
    """A folder of paintings, one sub-folder a style, in the manner of torchvision's ImageFolder.

    `root` holds train/ and test/ with style folders, or style folders alone, which are then split 80/20 by
    `split_seed`. `classes` are the sorted folder names of train/; for a trained model give the checkpoint's.

    pixels: uint8 (M, 3, size, size), mapped from the cache; rows: int64 (N,), which of them are in this set;
    labels: int64 (N,); paths (below `root`), artists, groups (equal for copies of one painting), genres, years: N each.

    Raises DataError for a missing or empty folder, a class without a picture, and a test class that train/ lacks.
    """

    def __init__(self, root, split="train", size=128, resize="squash", split_seed=0, classes=None, processes=0):
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"no folder {root}: give the folder that holds train/ and test/ with --data")
        whole = not (root / "train").is_dir()  # style folders alone
        folder = root if whole else root / split
        if not folder.is_dir():
            raise DataError(f"{root} has a folder train/ but no {split}/")
        known = [entry.name for entry in sorted((root if whole else root / "train").iterdir())
                 if entry.is_dir() and not entry.name.startswith(".")]  # fmt: skip
        if not known:
            raise DataError(f"{root} holds no style folders: expected train/<Style>/*, test/<Style>/* or <Style>/*")
        self.classes = list(classes or known)

        self.pixels, index = pixel_cache(folder, cache_folder(root), size, resize, processes)
        files = [(row, path) for row, path in enumerate(index["files"]) if path not in index["broken"]]
        for _, path in files:
            if path.split("/")[0] not in self.classes:
                raise DataError(f"{folder / path.split('/')[0]} is not one of the styles trained on: "
                                f"{', '.join(self.classes)}")  # fmt: skip
        styles = [path.split("/")[0] for _, path in files]
        if split == "train" or whole:
            for style in known:
                if style not in styles:
                    raise DataError(f"{folder / style} holds no picture: fill the folder or remove it")
        if not files:
            raise DataError(f"{folder} holds no picture")

        self.root, self.split, self.size, self.fingerprint = root, split, size, index["fingerprint"]
        self.rows = np.array([row for row, _ in files])
        self.paths = np.array([path if whole else f"{split}/{path}" for _, path in files])
        self.labels = torch.tensor([self.classes.index(style) for style in styles])
        self.artists = np.array([artist_of(path) for path in self.paths])
        self.groups = find_copies(self.paths, [index["hashes"][row] for row in self.rows])
        metadata = read_metadata(root / "metadata.csv")
        self.genres = np.array([metadata.get(path, {}).get("genre", "") for path in self.paths])
        self.years = np.array([metadata.get(path, {}).get("year", "") for path in self.paths])
        if whole:
            held_out = hold_out(self.labels.numpy(), self.groups, 0.2, split_seed)
            vars(self).update(vars(self.subset(held_out if split == "test" else ~held_out)))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        return torch.from_numpy(self.pixels[self.rows[item]].copy()), int(self.labels[item])

    def subset(self, chosen) -> "WikiArt":
        """The same pixels with fewer rows; `chosen` is a boolean mask or indices."""
        part = copy.copy(self)
        part.labels = self.labels[torch.as_tensor(chosen)]
        for name in ("rows", "paths", "artists", "groups", "genres", "years"):
            setattr(part, name, getattr(self, name)[chosen])
        return part

    def counts(self) -> np.ndarray:
        """Paintings per class, int64 (classes,)."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def fit_to_show(self, hide: list[str]) -> np.ndarray:
        """Which paintings may appear in figures, a mask (N,): none of a hidden genre or with a hidden part of a name."""
        pairs = zip(self.genres, self.paths, strict=True)
        return np.array([not any(word == genre or word in path for word in hide) for genre, path in pairs])

    def batches(self, order, batch_size: int, device):
        """Pictures uint8 (B, 3, S, S) and labels (B,) in the given order, on the device."""
        order = torch.as_tensor(order)
        for chosen in order.split(batch_size):
            pixels = torch.from_numpy(self.pixels[self.rows[chosen]])
            yield pixels.to(device, non_blocking=True), self.labels[chosen].to(device)


def artist_of(path: str) -> str:
    """WikiArt names its files <artist>_<title>.jpg; "" where a name has no "_"."""
    artist, underscore, _ = Path(path).name.partition("_")
    return artist if underscore else ""


def title_of(path: str) -> str:
    """The title in a file name, in plain words."""
    return Path(path).stem.partition("_jpg.rf.")[0].partition("_")[2].replace("-", " ")


def read_metadata(path: Path) -> dict[str, dict]:
    """The rows of metadata.csv by their column `path`; nothing where there is no such file."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def find_copies(paths, hashes) -> np.ndarray:
    """Number the paintings, int64 (N,), so that copies of one get the same number.

    Copies have the same pixels, or the same name; Roboflow's augmented copies are named <name>_jpg.rf.<hash>.jpg.
    """
    number = list(range(len(paths)))

    def first(item):  # follows a chain of copies to its first member
        while number[item] != item:
            item = number[item]
        return item

    seen = {}
    for item, (path, pixels) in enumerate(zip(paths, hashes, strict=True)):
        for key in (("name", Path(path).stem.partition("_jpg.rf.")[0]), ("pixels", pixels)):
            other = first(seen.setdefault(key, item))
            number[max(first(item), other)] = min(first(item), other)
    return np.array([first(item) for item in range(len(paths))])


def hold_out(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose about `fraction` of every class, as a mask (N,), without dividing a group.

    A group counts as its first member's class. Of every class with two groups or more some are chosen and some are
    not; one with a single group stays where it is (in training).
    """
    shuffled = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    _, leaders, group = np.unique(groups, return_index=True, return_inverse=True)
    sizes = np.bincount(group)
    for label in np.unique(labels[leaders]):
        own = shuffled.permutation(np.flatnonzero(labels[leaders] == label))
        wanted, chosen = fraction * sizes[own].sum(), []
        for candidate in own:
            if sizes[chosen].sum() + sizes[candidate] <= wanted:
                chosen.append(candidate)
        if not chosen and len(own) > 1 and fraction > 0:
            chosen = [own[np.argmin(sizes[own])]]
        held_out |= np.isin(group, chosen)
    return held_out


class BalancedSampler(Sampler):
    """Which paintings an epoch shows, in random order; for training only.

    `resample` brings every class to `per_class` draws by dropping and repeating, anew each epoch; within an epoch no
    painting of a class comes more than once oftener than another. `none` shows every painting once. The draws depend
    on (seed, epoch) alone, so that a resumed run goes on as if it had never stopped.
    """

    def __init__(self, labels: torch.Tensor, balance: str = "resample", per_class: int = 400, seed: int = 0):
        self.members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        self.balance, self.per_class, self.seed, self.epoch = balance, per_class, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self):
        if self.balance == "none":
            return sum(len(members) for members in self.members)
        return self.per_class * len(self.members)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn = []
        for members in self.members:
            whole, rest = divmod(len(members) if self.balance == "none" else self.per_class, len(members))
            some = members[torch.randperm(len(members), generator=generator)[:rest]]
            drawn.append(torch.cat([members.repeat(whole), some]))
        drawn = torch.cat(drawn)
        return iter(drawn[torch.randperm(len(drawn), generator=generator)].tolist())


# From pixels to the network's input -----------------------------------------------------------------------------------


def random_crops(images, crop: int, smallest: float = 0.4, generator=None) -> torch.Tensor:
    """Training: of each picture another window, mirrored half of the time.

    uint8 (B, 3, S, S) to float (B, 3, crop, crop) in [0, 1]. A window covers between `smallest` and all of the
    picture's area. Colours and brushwork are left alone: they are what tells the styles apart.
    """
    count = len(images)
    random = torch.rand(4, count, generator=generator)  # on the CPU: the same numbers whatever the device
    side = (smallest + (1 - smallest) * random[0]).sqrt()
    across, down = (2 * random[1:3] - 1) * (1 - side)  # the window's centre, in affine_grid's [-1, 1]
    flip = torch.where(random[3] < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    theta = torch.stack([side * flip, zero, across, zero, side, down], dim=1).view(count, 2, 3).to(images.device)
    grid = F.affine_grid(theta, (count, 3, crop, crop), align_corners=False)
    return F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)


def views(images, crop: int) -> list[torch.Tensor]:
    """Evaluation: the whole picture and its mirror image, float (B, 3, crop, crop) in [0, 1] each."""
    whole = images.float() / 255
    if whole.shape[-1] != crop:
        whole = F.interpolate(whole, (crop, crop), mode="bilinear", antialias=True, align_corners=False)
    return [whole, whole.flip(3)]


@torch.no_grad()
def predict(model: nn.Module, images, crop: int) -> torch.Tensor:
    """Class probabilities (B, classes) of uint8 pictures, averaged over their views; call model.eval() first."""
    return torch.stack([model(view).float().softmax(1) for view in views(images, crop)]).mean(0)


# Networks -------------------------------------------------------------------------------------------------------------


class Normalise(nn.Module):
    """Pixels in [0, 1] to mean 0 and deviation 1 per channel, by statistics that are stored with the weights."""

    def __init__(self, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.std


class MLP(nn.Module):
    """The baseline: one hidden layer on the bare pixels. Images (B, 3, crop, crop) in [0, 1] to logits (B, classes)."""

    def __init__(self, classes: int, crop: int, width: int = 256, **normalisation):
        super().__init__()
        self.normalise = Normalise(**normalisation)
        self.hidden = nn.Linear(3 * crop * crop, width)
        self.out = nn.Linear(width, classes)

    def forward(self, images):
        return self.out(F.relu(self.hidden(self.normalise(images).flatten(1))))


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016); stride 2 halves the picture."""

    def __init__(self, before: int, after: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity()
        if stride > 1 or before != after:
            pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
            self.shortcut = nn.Sequential(pool, nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class CNN(nn.Module):
    """Our classifier: a small residual net. Images (B, 3, any, any) in [0, 1] to logits (B, classes)."""

    def __init__(self, classes: int, width: int = 48, **normalisation):
        super().__init__()
        self.normalise = Normalise(**normalisation)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            Block(width, width),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 4 * width, stride=2),
            Block(4 * width, 6 * width, stride=2),
        )
        self.out = nn.Linear(6 * width, classes)

    def features(self, images):
        """What the last layer sees: the mean over all places, (B, 6 * width)."""
        return self.blocks(self.stem(self.normalise(images))).mean((2, 3))

    def forward(self, images):
        return self.out(self.features(images))


MODELS = {"MLP": MLP, "CNN": CNN}


def build_model(checkpoint: dict) -> nn.Module:
    """The trained network that a checkpoint describes, in evaluation mode, on the CPU."""
    model = MODELS[checkpoint["model"]](**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    return model.eval()
