"""The data set of paintings, the class-balancing sampler, the networks, and the trained classifier.

    data = WikiArt("/scratch/wikiart", "train", size=128)
    data.classes                   # ['Baroque', 'Cubism', ...], the sorted folder names of train/
    pixels, label = data[0]        # uint8 (3, 128, 128), int

    classifier = Classifier.load("report/classifier.pt")
    probabilities = classifier.predict(["a.jpg", "b.jpg"])    # float (2, classes)

Images are uint8 (N, 3, S, S) until they are on the device; there common/crops.py turns a batch into floats in [0, 1].
The networks take those floats and normalise them themselves.
"""

import contextlib
import copy
import hashlib
import os
import re
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from common.backbones import Pretrained, backbone_weights
from common.crops import FEATURE_SCALES, center_crop, mean_over_views, predict_probabilities, resize, views
from common.errors import DataError, UserError
from common.images import cache_folder, pixel_cache, read_image
from common.layers import (
    BatchNorm,
    Block,
    ConvNorm,
    Dropout,
    FiLMBlock,
    Normalise,
    Upsample,
    backbone,
    covariances,
    map_evidence,
    mean_std,
    occlusion_evidence,
)
from common.metrics import calibrate
from common.names import artist_and_title, artist_of, count, match_style, printable, read_metadata, showable, stem_of
from common.run import autocast, check_entries, file_hash, find_device, load_checkpoint, to_device
from common.splits import connected_groups, hold_out

# The data set ---------------------------------------------------------------------------------------------------------


SPLITS = ("train/", "test/")


class WikiArt(Dataset):
    """A folder of paintings with one sub-folder per style, like torchvision's ImageFolder.

    `root` holds train/ and test/ with style folders, or style folders alone, which are then split 80/20 by
    `split_seed`. `split` is "train", "test", which needs no train/, or "all". With `holdout="artists"`, all paintings
    are split so that no artist is in both parts; with a style's name, its paintings are left out. The label is the
    `target`: style, artist or genre; paintings without one, or of an artist or genre with fewer than `min_images`
    paintings, are left out and counted. `classes` of a trained model keep its order; otherwise they are the sorted
    folders of train/, or the sorted names of artists or genres. Case, accents, hyphens and underscores of styles do not
    matter.

    pixels: uint8 (M, 3, size, size), mapped from the cache; rows: int64 (N,), which of them are in this set;
    labels: int64 (N,); paths (below `root`), styles, artists, genres, years, groups (equal for duplicates): N each.

    Raises DataError for a missing or empty folder, a class without an image, and a test class that train/ lacks.
    """

    PER_PAINTING = ("rows", "paths", "styles", "artists", "genres", "years", "groups", "labels")

    def __init__(
        self,
        root,
        split: str = "train",
        *,
        size: int,
        resize: str = "squash",
        split_seed: int = 0,
        holdout: str = "none",
        target: str = "style",
        min_images: int = 20,
        classes: list[str] | None = None,
        processes: int = 0,
    ):
        self.root, self.split, self.on_device = Path(root), split, None
        has_splits, styles = find_styles(self.root)
        self.pooled = not has_splits or holdout == "artists" or split == "all"  # train and test are in one cache
        folder = self.root if self.pooled else self.root / split
        if not folder.is_dir():
            raise DataError(f"{root} has no {split}/, only {'train/' if split == 'test' else 'test/'}")

        self.pixels, index = pixel_cache(folder, cache_folder(self.root), size, resize, processes)
        level = 1 if self.pooled and has_splits else 0  # of the style's name in a path
        self.read_paintings(index, folder, level, by_artist=holdout == "artists")
        self.styles = match_styles(self.styles, styles)
        for style in styles if split == "train" or (self.pooled and split != "all") else ():
            if style not in self.styles:
                raise DataError(f"{folder / style} holds no image: fill the folder or remove it")
        self.holdout = match_style(holdout, ["none", "artists", *styles])
        if self.holdout is None and classes:
            self.holdout = "none"  # a trained network meets paintings of other styles: there is nothing to leave out
        if self.holdout is None:
            raise UserError(f"--holdout {holdout}: give none, artists, or one of {', '.join(styles)}")
        self.labels = torch.tensor([styles.index(style) for style in self.styles])
        if self.pooled and split != "all":
            test = hold_out(self.labels.numpy(), self.groups, 0.2, split_seed)
            self.keep(test if split == "test" else ~test)
        self.keep(self.styles != self.holdout)
        styles = [style for style in styles if style != self.holdout]
        self.set_labels(target, min_images, classes or (styles if target == "style" else None), folder)

    def read_paintings(self, index: dict, folder: Path, level: int, by_artist: bool) -> None:
        """Fill the attributes of each painting from the cache's index, file names and metadata.csv."""
        paintings = [
            (row, path)
            for row, path in enumerate(index["files"])
            if path not in index["broken"] and path.count("/") > level and (not level or path.startswith(SPLITS))
        ]
        if not paintings:
            raise DataError(f"{folder} holds no image")
        self.rows = np.array([row for row, _ in paintings])
        self.paths = np.array([path if self.pooled else f"{self.split}/{path}" for _, path in paintings])
        self.styles = np.array([path.split("/")[level] for _, path in paintings])
        self.artists = np.array([artist_of(path) for path in self.paths])
        table = self.root / "metadata.csv"
        metadata = read_metadata(table)
        self.genres = np.array([metadata.get(path, {}).get("genre", "") for path in self.paths])
        self.years = np.array([metadata.get(path, {}).get("year", "") for path in self.paths])
        self.fingerprint = index["fingerprint"]
        if metadata:
            self.fingerprint += "-" + hashlib.sha256(table.read_bytes()).hexdigest()[:8]
        names = [f"{style}/{stem_of(path)}" for style, path in zip(self.styles, self.paths, strict=True)]
        keys = [names, [index["hashes"][row] for row in self.rows]]
        self.groups = connected_groups(*keys, self.artists) if by_artist else connected_groups(*keys)

    def set_labels(self, target: str, min_images: int, classes, folder: Path) -> None:
        """Set `classes` and `labels` by the target; drop the paintings that have none."""
        if target == "style" and classes:
            self.styles = match_styles(self.styles, classes)
        values = {"style": self.styles, "artist": self.artists, "genre": self.genres}[target]
        if not classes:
            names, counts = np.unique(values[values != ""], return_counts=True)
            classes = names[counts >= min_images].tolist()
        self.classes = list(classes)
        if not np.isin(values, self.classes).any():
            known = f"one of the styles {', '.join(self.classes)}"
            known = known if target == "style" else f"a known {target} with --min-images {min_images}"
            raise DataError(f"no painting in {folder} has {known}")
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([label_of.get(value, -1) for value in values])
        self.left_out = int((self.labels < 0).sum())
        if self.left_out:
            counts = f"{self.left_out} of {count(len(self), 'painting')} in {folder}"
            print(f"left out: {counts}, of none of the classes of {target}", file=sys.stderr)
            self.keep((self.labels >= 0).numpy())

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        return torch.from_numpy(self.pixels[self.rows[item]].copy()), int(self.labels[item])

    def keep(self, chosen) -> None:
        """Drop the paintings that are not `chosen`, a boolean mask or indices."""
        for name in self.PER_PAINTING:
            setattr(self, name, getattr(self, name)[chosen])
        if self.on_device is not None:
            self.on_device = self.on_device[torch.as_tensor(chosen, device=self.on_device.device)]

    def subset(self, chosen) -> "WikiArt":
        """A data set of the chosen paintings (a boolean mask or indices), with the same pixels."""
        part = copy.copy(self)
        part.keep(chosen)
        return part

    def split_off(self, fraction: float, seed: int) -> tuple["WikiArt", "WikiArt"]:
        """Training and validation set; the second has about `fraction` of each class, or half of it in a class whose
        artists are all too large to be held out. Duplicates stay together.

        Where artists are known, half of the validation paintings are by artists who are not in the training set:
        other paintings of an artist show less of how a network does on artists that it never saw.
        """
        labels, by_artist = self.labels.numpy(), connected_groups(self.groups, self.artists)
        chosen = hold_out(labels, by_artist, fraction / 2, seed, at_least_one=False)
        rest = np.flatnonzero(~chosen)
        count = fraction / 2 / (1 - fraction / 2)  # of the rest, as much as was chosen of all
        chosen[rest] = hold_out(labels[rest], self.groups[rest], count, seed)
        return self.subset(~chosen), self.subset(chosen)

    def move_to(self, device) -> None:
        """Keep all pixels, as bytes, in a GPU's memory, if they need less than half of what is free."""
        needed = len(self) * self.pixels[0].nbytes
        if device.type == "cuda" and needed < torch.cuda.mem_get_info(device)[0] / 2:
            self.on_device = torch.from_numpy(self.pixels[self.rows]).to(device)

    def batch(self, items, device):
        """Images uint8 (B, 3, S, S) and labels (B,) of the given items (B,), on the device."""
        labels = to_device(self.labels[items], device)
        if self.on_device is not None:
            return self.on_device[to_device(items, self.on_device.device)].to(device), labels
        return to_device(self.read(items), device), labels

    def read(self, items) -> torch.Tensor:
        """Images uint8 (B, 3, S, S) of the given items (B,), from the cache."""
        return torch.from_numpy(self.pixels[self.rows[items.numpy()]])

    def batches(self, batches: list, device):
        """Yield each batch of items with what `batch` returns for it: items, images, labels.

        Where a GPU gets its pixels from the cache, a thread reads the next two batches meanwhile.
        """
        if device.type != "cuda" or self.on_device is not None:
            for items in batches:
                yield items, *self.batch(items, device)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(self.read, items) for items in batches[:2])
            for number, items in enumerate(batches):
                pixels = ahead.popleft().result()
                ahead.extend(reader.submit(self.read, later) for later in batches[number + 2 : number + 3])
                yield items, to_device(pixels, device), to_device(self.labels[items], device)

    def counts(self) -> np.ndarray:
        """Paintings per class, int64 (classes,)."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def showable(self, hide: list[str]) -> np.ndarray:
        """Which paintings figures may show, a mask (N,): see the setting `hide`."""
        return showable(self.genres, self.paths, hide)

    def captions(self, items) -> str:
        """Artists and titles of some paintings, "Claude Monet: Water lilies; ..."."""
        pairs = [artist_and_title(self.artists[item], self.paths[item]) for item in items]
        return "; ".join(": ".join(part for part in pair if part) for pair in pairs)


def hash_of_files(fingerprint: str) -> str:
    """The part of a fingerprint that tells a folder's files apart, without size and metadata.csv."""
    found = re.fullmatch(r".*-([0-9a-f]{16})(-[0-9a-f]{8})?", fingerprint, re.DOTALL)
    return found[1] if found else fingerprint


def check_split(data: WikiArt, checkpoint: dict, path) -> None:
    """Raise UserError where the paintings may be split otherwise than when a checkpoint was trained.

    That is where train/ and test/ are drawn from style folders: the split then depends on the files. metadata.csv may
    differ: it adds genres and years.
    """
    if data.pooled and hash_of_files(data.fingerprint) != hash_of_files(checkpoint["fingerprint"]):
        reason = "so it may have seen those that are held out now: train again"
        raise UserError(f"the paintings have changed since {path} was trained, {reason}")


def match_styles(names, classes: list[str]) -> np.ndarray:
    """Names of styles (N,) as `classes` spells them; others stay as they are."""
    spelled = {name: match_style(name, classes) or name for name in np.unique(names).tolist()}
    return np.array([spelled[name] for name in names])


def find_styles(root: Path) -> tuple[bool, list[str]]:
    """Whether a root has a folder train/, or test/ alone, and its sorted style names. Raises DataError."""
    if not root.is_dir():
        raise DataError(f"no folder {root}: give the folder that holds train/ and test/ with --data")
    parent, name = root.resolve().parent, root.resolve().name
    other = {"train": "test", "test": "train"}.get(name)
    if other and (parent / other).is_dir() and not (root / "train").is_dir():
        raise DataError(f"{root} is the folder {name}/ beside {other}/: did you mean --data {os.path.relpath(parent)}?")
    split = "train" if (root / "train").is_dir() else "test" if subfolders(root) == ["test"] else ""
    has_splits, styles = bool(split), subfolders(root / split)
    for style in (*styles, *(subfolders(root / "test") if has_splits and (root / "test").is_dir() else ())):
        if printable(style) != style:
            raise DataError(f"{root} has a style folder named {printable(style)}, which cannot be shown: rename it")
    splits = [name for name in styles if name.lower() in ("train", "test", "val", "valid", "validation")]
    if not styles or splits:
        problem = f"a folder {splits[0]}" if splits else "no style folders"
        raise DataError(f"{root} holds {problem}: expected train/<Style>/*, test/<Style>/*, or <Style>/* alone")
    for style in subfolders(root / "test") if has_splits and (root / "test").is_dir() else ():
        if not match_style(style, styles):
            raise DataError(f"{root / 'test' / style} is not one of the styles of train: {', '.join(styles)}")
    return has_splits, styles


def subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def channel_statistics(data: WikiArt) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each colour channel, in [0, 1], over about 500 of the images."""
    moments = []
    for row in data.rows[:: -(-len(data) // 500)]:
        pixels = data.pixels[row].reshape(3, -1) / np.float32(255)
        moments.append((pixels.mean(1), (pixels**2).mean(1)))
    mean, square = np.mean(moments, 0)
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 1e-4)).tolist()


class BalancedSampler(Sampler):
    """The paintings of an epoch, in random order; for training only.

    balance="resample" draws `per_class` paintings of every class, by repeating and dropping, anew each epoch; each
    painting of a class is drawn n or n + 1 times. per_class=0 stands for the mean class size, which keeps the epoch as
    long as without balancing. "sampler" draws len(labels) paintings with replacement, each class with the same
    probability. Any other value draws every painting once. The draws depend on (seed, epoch) alone, so that a resumed
    training continues as if it had not been interrupted.
    """

    def __init__(self, labels: torch.Tensor, balance: str, per_class: int, seed: int = 0):
        self.labels, self.balance, self.seed, self.epoch = labels, balance, seed, 0
        self.members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        self.per_class = per_class or round(len(labels) / len(self.members))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self):
        return self.per_class * len(self.members) if self.balance == "resample" else len(self.labels)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.balance == "sampler":
            weights = 1 / torch.bincount(self.labels)[self.labels]
            return iter(torch.multinomial(weights, len(self), replacement=True, generator=generator).tolist())
        items = torch.arange(len(self))
        if self.balance == "resample":
            items = torch.cat([self.resample(members, generator) for members in self.members])
        return iter(items[torch.randperm(len(items), generator=generator)].tolist())

    def resample(self, members, generator):
        """`per_class` of one class's members: whole repetitions of all of them, and a random remainder."""
        repeats, remainder = divmod(self.per_class, len(members))
        return torch.cat(
            [members.repeat(repeats), members[torch.randperm(len(members), generator=generator)[:remainder]]]
        )


# Networks -------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """The baseline: one hidden layer on the pixels. Images (B, 3, crop, crop) in [0, 1] to logits (B, classes)."""

    def __init__(self, classes: int, crop: int, width: int, **normalisation):
        super().__init__()
        self.normalise = Normalise(**normalisation)
        self.hidden = nn.Linear(3 * crop * crop, width)
        self.out = nn.Linear(width, classes)

    def forward(self, images):
        return self.out(F.relu(self.hidden(self.normalise(images).flatten(1))))


class CNN(nn.Module):
    """The classifier: a small residual network. Images (B, 3, any, any) in [0, 1] to logits (B, classes).

    The last layer sees the mean of each map of features, with pooling="mean_std" also its standard deviation, and with
    "covariance" also the covariances of PROJECTED mixtures of maps. In training, logits of `aux_classes` follow: of
    artists and genres, which the network predicts as auxiliary tasks.
    """

    PROJECTED = 32

    def __init__(self, classes, width, depth, pooling, dropout, aux_classes=0, stem="patch", **normalisation):
        super().__init__()
        self.classes, self.std, self.project = classes, pooling != "mean", None
        self.normalise = Normalise(**normalisation)
        self.body = backbone(width, depth, stem)
        features = 8 * width if self.std else 4 * width
        if pooling == "covariance":
            self.project = nn.Conv2d(4 * width, self.PROJECTED, 1, bias=False)
            features += self.PROJECTED * (self.PROJECTED + 1) // 2
        self.norm = BatchNorm(features)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(features, classes + aux_classes)

    def features(self, images):
        """The input of the last layer, (B, features)."""
        return self.pool(self.body(self.normalise(images)))

    def pool(self, maps):
        statistics = [mean_std(maps, self.std)]
        if self.project:
            statistics.append(covariances(self.project(maps)))
        return self.norm(torch.cat(statistics, 1)).flatten(1)

    def classify(self, features):
        """Logits of features."""
        logits = self.out(self.dropout(features))
        return logits if self.training else logits[:, : self.classes]

    def forward(self, images):
        return self.classify(self.features(images))

    @torch.no_grad()
    def evidence(self, image, label: int):
        """How much each region of one image (1, 3, any, any) in [0, 1] contributed to a class's logit, float (h, w).

        A class activation map (Zhou et al. 2016), relative to the mean of all classes and to the average painting.
        Standard deviations and covariances are distributed over positions by the squared deviations and products that
        they are means of, so that regions sum to the logit minus its bias.
        """
        maps = self.body(self.normalise(image))[0]  # (C, h, w)
        weights = self.out.weight[: self.classes]
        slopes = (weights[label] - weights.mean(0)) * self.norm.weight
        slopes = (slopes / (self.norm.running_var + self.norm.eps).sqrt())[:, None, None]
        parts = [maps]
        if self.std:
            squares = (maps - maps.mean((1, 2), keepdim=True)).square()
            parts.append(squares / (squares.mean((1, 2), keepdim=True) + 1e-5).sqrt())
        if self.project:
            mixed = self.project(maps[None])[0]
            mixed = mixed - mixed.mean((1, 2), keepdim=True)
            first, second = torch.triu_indices(len(mixed), len(mixed))
            products = mixed[first] * mixed[second]
            parts.append(products / (products.mean((1, 2), keepdim=True).abs() + 1e-3).sqrt())
        parts = torch.cat(parts)
        return ((parts - self.norm.running_mean[:, None, None]) * slopes).sum(0).div(maps[0].numel())


class Autoencoder(nn.Module):
    """Images (B, 3, crop, crop) in [0, 1] to codes (B, code), and back; `crop` is a multiple of 16.

    A linear path through the code is PCA of images at half the size; networks beside it add what is not linear. So
    training starts where PCA ends. With `styles`, a trained embedding of the style is added to the code before it is
    decoded.
    """

    def __init__(self, crop: int, code: int, width: int, projection_dim: int = 0, styles: int = 0, **normalisation):
        super().__init__()
        deep, side, self.half = 4 * width, crop // 16, crop // 2
        self.normalise = Normalise(**normalisation)
        self.register_buffer("components", torch.zeros(code, 3 * self.half**2))
        self.register_buffer("scales", torch.ones(code))
        self.body = backbone(width)
        self.add = nn.Linear(deep * side**2, code)
        self.fine = nn.Sequential(nn.Conv2d(3, width, 4, stride=4, bias=False), BatchNorm(width), nn.ReLU())
        self.coarse = Block(width, 2 * width, 2)
        unflatten = nn.Unflatten(1, (2 * width, side, side))
        self.expand = nn.Sequential(nn.Linear(code, 2 * width * side**2), unflatten, Upsample())
        self.join = nn.Sequential(Block(2 * width, 2 * width), Upsample(), Block(2 * width, width))
        blocks, to_pixels = (Block(width, width), Block(width, width)), nn.Conv2d(width, 3 * 4 * 4, 3, padding=1)
        self.paint = nn.Sequential(*blocks, to_pixels, nn.PixelShuffle(4))
        if projection_dim:  # only for the contrastive loss in training
            layers = [BatchNorm(2 * deep), nn.Conv2d(2 * deep, 256, 1, bias=False), BatchNorm(256), nn.ReLU()]
            self.projection_head = nn.Sequential(*layers, nn.Conv2d(256, projection_dim, 1))
        if styles:
            self.embedding = nn.Linear(styles, code, bias=False)
        for layer in (self.add, to_pixels):  # the nonlinear paths start at zero
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def start_as_pca(self, batches) -> None:
        """Fit the linear path to batches of images (B, 3, crop, crop), so that codes have standard deviation 1."""
        rows = torch.cat([self.reduce(self.normalise(images)) for images in batches])
        rank = min(len(self.scales) + 16, *rows.shape)
        _, singular_values, components = torch.pca_lowrank(rows, rank, center=False, niter=4)
        count = min(len(self.scales), len(singular_values))
        self.components[:count] = components.T[:count]
        self.scales[:count] = singular_values[:count] / len(rows) ** 0.5

    def reduce(self, images):
        return F.avg_pool2d(images, 2).flatten(1)

    def encode(self, images):
        return self.encode_with_maps(images)[0]

    def encode_with_maps(self, images):
        """Codes (B, code) and the encoder's maps (B, 4 * width, crop / 16, crop / 16)."""
        images = self.normalise(images)
        maps = self.body(images)
        return self.reduce(images) @ self.components.T / self.scales + self.add(maps.flatten(1)), maps

    def decode(self, codes, styles=None):
        """Images (B, 3, crop, crop) of codes (B, code), in styles (B, styles), one-hot or mixtures."""
        if styles is not None:
            codes = codes + self.embedding(styles)
        linear = self.linear(codes)
        fine = self.fine(linear)
        maps = fine + self.join(self.coarse(fine) + self.expand(codes))
        return self.normalise.inverse(linear + self.paint(maps))

    def linear(self, codes):
        """The linear path's normalised images (B, 3, crop, crop)."""
        images = (codes * self.scales @ self.components).view(-1, 3, self.half, self.half)
        return F.interpolate(images, scale_factor=2, mode="bilinear")

    def reconstruct_linearly(self, images):
        """Reconstructions by the linear path alone, which is PCA at half the size: what training starts from."""
        codes = self.reduce(self.normalise(images)) @ self.components.T / self.scales
        return self.normalise.inverse(self.linear(codes))

    def forward(self, images, styles=None):
        return self.decode(self.encode(images), styles)

    def project(self, maps, second_crops):
        """Projections (2 * B, projection_dim) of the encoder's maps, and of other crops of the same paintings."""
        statistics = [mean_std(maps), mean_std(self.body(self.normalise(second_crops)))]
        return self.projection_head(torch.cat(statistics)).flatten(1)

    def features(self, images):
        """The contrastive code, (B, 8 * width): mean and standard deviation of the encoder's maps, without layout."""
        return mean_std(self.body(self.normalise(images))).flatten(1)


class StyleAutoencoder(nn.Module):
    """Repaints images (B, 3, H, W) of any size, in their own or another style, through codes (B, code, H / 4, W / 4).

    Every layer is a convolution, so that none can learn where in the picture it is. FiLM conditions each layer of the
    decoder on the change of style, target minus source, which is zero where a picture keeps its style; with
    `relative` false, on the target style alone. Styles are weights (B, styles), one-hot or mixtures.
    """

    STRIDE = 4  # pixels per position of the code map
    MARGIN = 16  # pixels of reflection around an image, so that its own pixels are far from edges

    def __init__(self, styles: int, width: int, code: int = 48, embedding: int = 64, relative=True, **normalisation):
        super().__init__()
        half, quarter = width // 2, width // 4
        self.styles, self.relative = styles, relative
        self.normalise = Normalise(**normalisation)
        self.encoder = nn.Sequential(
            *(ConvNorm(3, quarter, 5), nn.ReLU()),
            *(ConvNorm(quarter, half, 4, stride=2), nn.ReLU()),
            *(ConvNorm(half, width, 4, stride=2), nn.ReLU()),
            *(ConvNorm(width, width), nn.ReLU()),
            *(ConvNorm(width, width), nn.ReLU()),
            ConvNorm(width, code, 1),
        )
        self.embedding = nn.Linear(styles, embedding, bias=False)
        self.from_code = ConvNorm(code, width, 1, embedding=embedding)
        self.blocks = nn.ModuleList(FiLMBlock(width, embedding) for _ in range(4))
        self.middle = ConvNorm(width, half, embedding=embedding)
        self.fine = ConvNorm(half, quarter, embedding=embedding)
        self.to_pixels = nn.Conv2d(quarter, 3, 7, padding=3, padding_mode="reflect")

    def encode(self, images):
        """Code maps (B, code, H / 4, W / 4) of images whose H and W are multiples of STRIDE."""
        return self.encoder(self.normalise(images))

    def decode(self, codes, target, source):
        """Images (B, 3, H, W), about in [0, 1], of codes and the target and source styles (B, styles)."""
        embedding = self.embedding(target - source if self.relative else target)
        maps = F.relu(self.from_code(codes, embedding))
        for block in self.blocks:
            maps = block(maps, embedding)
        # Resized, then convolved: transposed convolutions and pixel shuffle leave grids (Odena et al. 2016).
        for layer in (self.middle, self.fine):
            maps = F.relu(layer(F.interpolate(maps, scale_factor=2, mode="nearest"), embedding))
        return self.normalise.inverse(self.to_pixels(maps).float())

    def forward(self, images, target, source):
        """Images (B, 3, H, W) of any size, repainted at that size."""
        height, width = images.shape[-2:]
        right, bottom = (self.MARGIN + -length % self.STRIDE for length in (width, height))
        padded = F.pad(images, (self.MARGIN, right, self.MARGIN, bottom), mode="reflect")
        repainted = self.decode(self.encode(padded), target, source)
        return repainted[:, :, self.MARGIN : self.MARGIN + height, self.MARGIN : self.MARGIN + width]


MODELS = {
    "MLP": MLP,
    "CNN": CNN,
    "Autoencoder": Autoencoder,
    "StyleAutoencoder": StyleAutoencoder,
    "Pretrained": Pretrained,
}


def make_model(name: str, arguments: dict) -> nn.Module:
    """A network with new weights: a class of this project, or a classifier of torchvision.models. Raises UserError."""
    if name in MODELS:
        return MODELS[name](**arguments)
    from torchvision import models  # takes seconds to import, and only this needs it

    if name not in models.list_models(models):
        raise UserError(f"no model {name}: give CNN, MLP or a classifier of torchvision.models")
    normalise = Normalise(arguments["mean"], arguments["std"])
    return nn.Sequential(normalise, models.get_model(name, weights=None, num_classes=arguments["classes"]))


def build_model(checkpoint: dict, path="the checkpoint") -> nn.Module:
    """The trained network of a checkpoint, in evaluation mode, on the CPU. Raises UserError.

    The network is built without memory first, so that a damaged file cannot ask for more than it holds itself. RegNet
    cannot be: torchvision computes its sizes with tensors, which hold no numbers on "meta".
    """
    check_entries(checkpoint, path, ("model", "arguments", "weights"))
    name, arguments, weights = (checkpoint[key] for key in ("model", "arguments", "weights"))
    if not isinstance(weights, dict):
        raise UserError(f"{path} is damaged: its weights are no state dict: train again")
    if name == "Pretrained" and not any(key.startswith("backbone.") for key in weights):
        check_entries(checkpoint, path, ("backbone", "backbone_weights"))
        weights = weights | backbone_weights(checkpoint)
    try:
        check_arguments(arguments, weights)
        with contextlib.suppress(NotImplementedError), torch.device("meta"):
            make_model(name, arguments).load_state_dict({key: value.to("meta") for key, value in weights.items()})
        model = make_model(name, arguments)
        model.load_state_dict(weights)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path} does not fit a {name}, it is damaged or of another version ({reason})") from None
    return model.eval()


def check_arguments(arguments: dict, weights: dict) -> None:
    """Raise ValueError for a number among a network's arguments that is too large for these weights."""
    numbers = sum(value.numel() for value in weights.values())
    for key, value in arguments.items():
        if isinstance(value, int) and value > (len(weights) if key == "depth" else numbers):
            raise ValueError(f"{key} is {value}")


# A trained classifier -------------------------------------------------------------------------------------------------


class Classifier:
    """A trained network with all that its predictions need: image size, crop, test-time scales, temperature, classes.

        classifier = Classifier.load("report/classifier.pt")
        classifier.top(classifier.predict(["my.jpg"])[0])    # [("Cubism", 0.62), ("Fauvism", 0.11), ...]

    classes: names, in the order of the probabilities; size, resize: of the square images it was trained on;
    temperature: of its calibrated probabilities; hash: of its file.
    """

    def __init__(self, checkpoint: dict, device, hash: str = "", path="the checkpoint"):
        check_entries(checkpoint, path, ("model", "arguments", "weights", "classes", "data", "crop", "tta_scales"))
        check_entries(checkpoint["data"], path, ("size", "resize"))
        if checkpoint["arguments"].get("classes") != len(checkpoint["classes"]):
            raise UserError(f"{path} is damaged: the number of its classes is not that of its network: train again")
        self.model = build_model(checkpoint, path).to(device, memory_format=torch.channels_last)
        self.device, self.model_name, self.classes = device, checkpoint["model"], checkpoint["classes"]
        self.target = checkpoint["data"].get("target", "style")
        self.size, self.resize = checkpoint["data"]["size"], checkpoint["data"]["resize"]
        self.crop, self.tta_scales = checkpoint["crop"], checkpoint["tta_scales"]
        self.calibrated, self.temperature = "temperature" in checkpoint, checkpoint.get("temperature", 1.0)
        self.checkpoint = {key: value for key, value in checkpoint.items() if key != "weights"}
        self.hash = hash

    @classmethod
    def load(cls, path, device="auto") -> "Classifier":
        """A classifier of train.py or embed.py. Raises UserError."""
        checkpoint = load_checkpoint(path)
        if "tta_scales" not in checkpoint:
            raise UserError(f"{path} holds a {checkpoint['model']}, not a classifier of train.py")
        if "temperature" not in checkpoint:
            print(f"{path} has no temperature: its probabilities are not calibrated", file=sys.stderr)
        check_entries(checkpoint, path, ("artists", "largest_class", "fingerprint"))
        return cls(checkpoint, find_device(device) if isinstance(device, str) else device, file_hash(path), path)

    def predict(self, images, calibrated: bool = True, batch_size: int = 64) -> torch.Tensor:
        """Class probabilities, float (N, classes) on the CPU, of uint8 images (N, 3, any, any) or of N image files.

        Raises TypeError for other images, floats for example.
        """
        if isinstance(images, str) or (torch.is_tensor(images) and images.dtype != torch.uint8):
            raise TypeError("images must be a uint8 tensor (N, 3, height, width) or a list of files")
        starts = range(0, len(images), batch_size)
        batches = [self.predict_batch(images[start : start + batch_size], calibrated) for start in starts]
        return torch.cat(batches) if batches else torch.zeros(0, len(self.classes))

    def predict_dataset(self, data: WikiArt, calibrated: bool = True, batch_size: int = 256) -> torch.Tensor:
        """Class probabilities, float (N, classes), of a data set with this classifier's image size."""
        batches = []
        with tqdm(total=len(data), desc=f"{self.model_name} on {data.split}", unit="image", leave=False) as bar:
            for items in torch.arange(len(data)).split(batch_size):
                batches.append(self.predict_batch(data.batch(items, self.device)[0], calibrated))
                bar.update(len(items))
        return torch.cat(batches)

    def predict_batch(self, images, calibrated: bool) -> torch.Tensor:
        with autocast(self.device, cpu=True):
            images = self.prepare(images)
            probabilities = predict_probabilities(self.model, images, self.crop, self.tta_scales).float().cpu()
        return calibrate(probabilities, self.temperature) if calibrated else probabilities

    def prepare(self, images) -> torch.Tensor:
        """Files, or uint8 images of any size, as uint8 (N, 3, size, size) on the device."""
        if not torch.is_tensor(images):
            images = torch.from_numpy(np.stack([read_image(path, self.size, self.resize) for path in images]))
        images = to_device(images, self.device)
        if self.resize == "crop":
            images = center_crop(images)
        if images.shape[-2:] != (self.size, self.size):
            images = resize(images.float(), self.size).clamp(0, 255).round().byte()
        return images

    def top(self, probabilities, k: int = 3) -> list[tuple[str, float]]:
        """The k likeliest classes of one image's probabilities (classes,), likeliest first."""
        order = np.argsort(-np.asarray(probabilities), kind="stable")[:k]
        return [(self.classes[label], float(probabilities[label])) for label in order]

    def features(self, images) -> torch.Tensor:
        """Features (N, D) of images, averaged over views; as cluster.py compares them."""
        return mean_over_views(self.model.features, self.prepare(images), self.crop, FEATURE_SCALES).cpu()

    def evidence(self, image, label: int) -> np.ndarray:
        """How much each region of one image (1, 3, any, any) spoke for a class, float (h, w)."""
        view = views(self.prepare(image), self.crop, max(1.0, *self.tta_scales))[0]
        if self.model_name == "MLP" or self.model_name.startswith("vit_") or getattr(self.model, "stages", 1) == 0:
            evidence = occlusion_evidence(self.model, view, label)  # there are no maps whose means are the features
        elif hasattr(self.model, "evidence"):
            evidence = self.model.evidence(view, label)
        else:
            evidence = map_evidence(self.model, view, label)
        return evidence.cpu().numpy()
