"""The nouns of the project: a folder of paintings as a data set, the class-balancing sampler, and the networks.

    data = WikiArt("/scratch/wikiart", "train", size=128)
    data.classes                   # ['Baroque', 'Cubism', ...], the sorted folder names of train/
    pixels, label = data[0]        # uint8 (3, 128, 128), int

Pictures travel as uint8 (N, 3, S, S) until they are on the device; there `random_crops` or `views` of windows.py
turns one batch into floats between 0 and 1. The networks take those floats and normalise them themselves.
"""

import copy
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, Sampler

from folder import (
    DataError,
    artist_of,
    cache_folder,
    hold_out,
    join,
    name_of,
    painter_and_title,
    pixel_cache,
    read_metadata,
)
from layers import BatchNorm, Block, Dropout, Film, Normalise, Up, texture, trunk

# The data set ---------------------------------------------------------------------------------------------------------


class WikiArt(Dataset):
    """A folder of paintings, one sub-folder a style, in the manner of torchvision's ImageFolder.

    `root` holds train/ and test/ with style folders, or style folders alone, which are then split 80/20 by
    `split_seed`. With `holdout="artists"` all paintings are split so, and no artist is in both parts. The label is the
    `target`: style, artist or genre. Paintings without one, or (artist, genre) of a class with fewer than
    `min_images`, are left out and counted. For a trained model give the checkpoint's `classes`; else they are the
    sorted folder names of train/ (or the sorted names of artists or genres).

    pixels: uint8 (M, 3, size, size), mapped from the cache; rows: int64 (N,), which of them are in this set;
    labels: int64 (N,); paths (below `root`), styles, artists, genres, years, groups (equal for copies): N each.

    Raises DataError for a missing or empty folder, a class without a picture, and a test class that train/ lacks.
    """

    PER_PAINTING = ("rows", "paths", "styles", "artists", "genres", "years", "groups", "labels")

    def __init__(self, root, split="train", *, size=128, resize="squash", split_seed=0, holdout="none",
                 target="style", min_images=1, classes=None, processes=0):  # fmt: skip
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"no folder {root}: give the folder that holds train/ and test/ with --data")
        bare = not (root / "train").is_dir()  # style folders alone
        pooled = bare or holdout == "artists"
        folder = root if pooled else root / split
        if not folder.is_dir():
            raise DataError(f"{root} has a folder train/ but no {split}/")
        known = [entry.name for entry in sorted((root if bare else root / "train").iterdir())
                 if entry.is_dir() and not entry.name.startswith(".")]  # fmt: skip
        odd = [name for name in known if name.lower() in ("train", "test", "val", "valid", "validation")]
        if not known or odd:
            raise DataError(f"{root} holds {'a folder ' + odd[0] if odd else 'no style folders'}: expected "
                            "train/<Style>/*, test/<Style>/*, or <Style>/* alone")  # fmt: skip
        for style in [] if bare or not (root / "test").is_dir() else sorted((root / "test").iterdir()):
            if style.is_dir() and not style.name.startswith(".") and style.name not in known:
                raise DataError(f"{style} is not one of the styles of train: {', '.join(known)}")

        self.pixels, index = pixel_cache(folder, cache_folder(root), size, resize, processes)
        level = int(pooled and not bare)  # where a path names the style
        good = [(row, path) for row, path in enumerate(index["files"])
                if path not in index["broken"] and path.count("/") > level]  # fmt: skip
        if not good:
            raise DataError(f"{folder} holds no picture")
        self.root, self.split, self.pooled, self.fingerprint = root, split, pooled, index["fingerprint"]
        self.rows = np.array([row for row, _ in good])
        self.paths = np.array([path if pooled else f"{split}/{path}" for _, path in good])
        self.styles = np.array([path.split("/")[level] for _, path in good])
        self.artists = np.array([artist_of(path) for path in self.paths])
        metadata = read_metadata(root / "metadata.csv")
        if metadata:
            self.fingerprint += "-" + hashlib.sha256((root / "metadata.csv").read_bytes()).hexdigest()[:8]
        self.genres = np.array([metadata.get(path, {}).get("genre", "") for path in self.paths])
        self.years = np.array([metadata.get(path, {}).get("year", "") for path in self.paths])
        names = [f"{style}/{name_of(path)}" for style, path in zip(self.styles, self.paths, strict=True)]
        same = [names, [index["hashes"][row] for row in self.rows]]
        self.groups = join(*same, self.artists) if holdout == "artists" else join(*same)

        for style in known if split == "train" or pooled else ():
            if style not in self.styles:
                raise DataError(f"{folder / style} holds no picture: fill the folder or remove it")

        self.labels = torch.tensor([known.index(style) for style in self.styles])
        if pooled:
            held_out = hold_out(self.labels.numpy(), self.groups, 0.2, split_seed)
            self.keep(held_out if split == "test" else ~held_out)
        values = {"style": self.styles, "artist": self.artists, "genre": self.genres}[target]
        if not classes:
            names, counts = np.unique(values[values != ""], return_counts=True)
            classes = known if target == "style" else names[counts >= min_images].tolist()
        self.classes = list(classes)
        if not np.isin(values, self.classes).any():
            raise DataError(f"no painting in {folder} has a known {target} with --min-images {min_images}")
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([number.get(value, -1) for value in values])
        self.left_out = int((self.labels < 0).sum())
        if self.left_out:
            print(f"{self.left_out} of {len(self)} paintings in {folder} are of no {target} to learn: left out",
                  file=sys.stderr)  # fmt: skip
            self.keep((self.labels >= 0).numpy())
        self.on_device = None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        return torch.from_numpy(self.pixels[self.rows[item]].copy()), int(self.labels[item])

    def keep(self, chosen) -> None:
        """Drop the paintings that are not `chosen`, a boolean mask or indices."""
        for name in self.PER_PAINTING:
            setattr(self, name, getattr(self, name)[chosen])

    def subset(self, chosen) -> "WikiArt":
        """The same pixels with fewer paintings; `chosen` is a boolean mask or indices."""
        part = copy.copy(self)
        part.keep(chosen)
        return part

    def named(self, items) -> str:
        """Painters and titles of some paintings, for a caption."""
        items = np.asarray(items)
        named = map(painter_and_title, self.artists[items], self.paths[items])
        return "; ".join(": ".join(filter(None, pair)) for pair in named)

    def set_apart(self, share: float, seed: int) -> tuple["WikiArt", "WikiArt"]:
        """Training and validation part; the second holds about `share` of each class. Copies stay together."""
        held_out = hold_out(self.labels.numpy(), self.groups, share, seed)
        return self.subset(~held_out), self.subset(held_out)

    def move_to(self, device) -> None:
        """Hold all pixels, as bytes, in a GPU's memory, where they take less than half of what is free."""
        needed = len(self) * self.pixels[0].nbytes
        if device.type == "cuda" and needed < torch.cuda.mem_get_info(device)[0] / 2:
            self.on_device = torch.from_numpy(self.pixels[self.rows]).to(device)

    def batch(self, items, device):
        """Pictures uint8 (B, 3, S, S) and labels (B,) of the given paintings (B,), on the device."""
        if self.on_device is not None:
            held = self.on_device.device
            return self.on_device[items.to(held)].to(device), self.labels[items].to(device)
        pixels = torch.from_numpy(self.pixels[self.rows[items.numpy()]])
        return pixels.to(device, non_blocking=True), self.labels[items].to(device)

    def counts(self) -> np.ndarray:
        """Paintings per class, int64 (classes,)."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def fit_to_show(self, hide: list[str]) -> np.ndarray:
        """Which paintings may appear in figures, a mask (N,): none of a hidden genre or with a hidden piece of path."""
        pairs = zip(self.genres, self.paths, strict=True)
        return np.array([not any(word == genre or word in path for word in hide) for genre, path in pairs])


def channel_statistics(data: WikiArt) -> tuple[list[float], list[float]]:
    """Mean and deviation of each colour channel, in [0, 1], over some 500 of the pictures."""
    moments = []
    for row in data.rows[:: -(-len(data) // 500)]:
        picture = data.pixels[row].reshape(3, -1) / np.float32(255)
        moments.append((picture.mean(1), (picture**2).mean(1)))
    mean, square = np.mean(moments, 0)
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 1e-4)).tolist()


class BalancedSampler(Sampler):
    """Which paintings an epoch shows, in random order; for training only.

    `resample` brings every class to `per_class` draws by dropping and repeating, anew each epoch; within an epoch no
    painting of a class comes more than once oftener than another; 0 stands for the mean size of the classes, so that
    an epoch is as long as without balancing. `sampler` draws as many as there are, each class
    with the same chance. Anything else shows every painting once. The draws depend on (seed, epoch) alone, so that a
    resumed run goes on as if it had never stopped.
    """

    def __init__(self, labels: torch.Tensor, balance: str = "resample", per_class: int = 400, seed: int = 0):
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
            chances = 1 / torch.bincount(self.labels)[self.labels]
            return iter(torch.multinomial(chances, len(self), replacement=True, generator=generator).tolist())
        drawn = torch.arange(len(self))
        if self.balance == "resample":
            drawn = torch.cat([self.bring(members, generator) for members in self.members])
        return iter(drawn[torch.randperm(len(drawn), generator=generator)].tolist())

    def bring(self, members, generator):
        """`per_class` draws of one class's members: all of them as often as they go in, and a random rest."""
        whole, rest = divmod(self.per_class, len(members))
        return torch.cat([members.repeat(whole), members[torch.randperm(len(members), generator=generator)[:rest]]])


# Networks -------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """The baseline: one hidden layer on the bare pixels. Images (B, 3, crop, crop) in [0, 1] to logits (B, classes)."""

    def __init__(self, classes: int, crop: int, width: int = 256, **normalisation):
        super().__init__()
        self.normalise = Normalise(**normalisation)
        self.hidden = nn.Linear(3 * crop * crop, width)
        self.out = nn.Linear(width, classes)

    def forward(self, images):
        return self.out(F.relu(self.hidden(self.normalise(images).flatten(1))))


class CNN(nn.Module):
    """Our classifier: a small residual net. Images (B, 3, any, any) in [0, 1] to logits (B, classes).

    In training the logits of `extra` more classes follow (the artists and genres that training names too).
    """

    def __init__(self, classes, width=48, depth=1, pooling="mean-deviation", dropout=0.0, extra=0, **normalisation):
        super().__init__()
        self.classes, self.deviation = classes, "deviation" in pooling
        self.normalise = Normalise(**normalisation)
        self.body = trunk(width, depth)
        pooled = 4 * width * (1 + self.deviation)
        self.norm = BatchNorm(pooled)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(pooled, classes + extra)

    def features(self, images):
        """What the last layer sees, (B, 8 * width): the statistics of the maps as a texture."""
        return self.pool(self.body(self.normalise(images)))

    def pool(self, maps):
        return self.norm(texture(maps, self.deviation)).flatten(1)

    def forward(self, images):
        logits = self.out(self.dropout(self.features(images)))
        return logits if self.training else logits[:, : self.classes]

    @torch.no_grad()
    def evidence(self, image, label: int):
        """How far each region of one picture (1, 3, any, any) in [0, 1] spoke for a class, float (h, w).

        A class activation map (Zhou et al. 2016), measured against the mean of all classes and against the average
        painting. A region's part in the deviation of a map is what it adds to the variance, over the deviation; so
        the regions add up to the logit, but for its bias.
        """
        maps = self.body(self.normalise(image))[0]  # (C, h, w)
        weights = self.out.weight[: self.classes]
        slopes = (weights[label] - weights.mean(0)) * self.norm.weight
        slopes = (slopes / (self.norm.running_var + self.norm.eps).sqrt())[:, None, None]
        parts = maps
        if self.deviation:
            squares = (maps - maps.mean((1, 2), keepdim=True)).square()
            parts = torch.cat([maps, squares / (squares.mean((1, 2), keepdim=True) + 1e-5).sqrt()])
        return ((parts - self.norm.running_mean[:, None, None]) * slopes).sum(0).div(maps[0].numel())


class Autoencoder(nn.Module):
    """Images (B, 3, crop, crop) in [0, 1] to codes (B, code), and back; `crop` is a multiple of 16.

    A straight path through the code is PCA, of pictures at half the size; nets beside it add what is not linear. So
    training starts where PCA ends.
    """

    def __init__(self, crop: int = 64, code: int = 256, width: int = 48, points: int = 0, **normalisation):
        super().__init__()
        deep, side, self.half = 4 * width, crop // 16, crop // 2
        self.normalise = Normalise(**normalisation)
        self.register_buffer("components", torch.zeros(code, 3 * self.half**2))
        self.register_buffer("scales", torch.ones(code))
        self.body = trunk(width)
        self.add = nn.Linear(deep * side**2, code)
        self.fine = nn.Sequential(nn.Conv2d(3, width, 4, stride=4, bias=False), BatchNorm(width), nn.ReLU())
        self.coarse = Block(width, 2 * width, 2)
        self.spread = nn.Sequential(
            nn.Linear(code, 2 * width * side**2), nn.Unflatten(1, (2 * width, side, side)), Up()
        )
        self.join = nn.Sequential(Block(2 * width, 2 * width), Up(), Block(2 * width, width))
        self.paint = nn.Sequential(
            Block(width, width), Block(width, width), nn.Conv2d(width, 3 * 4 * 4, 3, padding=1), nn.PixelShuffle(4)
        )
        self.films = nn.ModuleList()  # what a style does to each step of the decoder: see StyleAutoencoder
        if points:  # a texture to a point, where two windows of one painting shall meet; only training needs it
            layers = [BatchNorm(2 * deep), nn.Conv2d(2 * deep, 256, 1, bias=False), BatchNorm(256), nn.ReLU()]
            self.head = nn.Sequential(*layers, nn.Conv2d(256, points, 1))
        for last in (self.add, self.paint[-2]):  # to begin with, they add nothing
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def start_as_pca(self, batches) -> None:
        """Set the straight path, so that codes have deviation 1; batches of images (B, 3, crop, crop)."""
        rows = torch.cat([self.shrink(self.normalise(images)) for images in batches])
        _, spreads, components = torch.pca_lowrank(rows, min(len(self.scales) + 16, *rows.shape), center=False, niter=4)
        found = min(len(self.scales), len(spreads))
        self.components[:found] = components.T[:found]
        self.scales[:found] = spreads[:found] / len(rows) ** 0.5

    def shrink(self, pictures):
        return F.avg_pool2d(pictures, 2).flatten(1)

    def encode(self, images):
        return self.code(self.normalise(images))[0]

    def code(self, pictures):
        maps = self.body(pictures)
        return self.shrink(pictures) @ self.components.T / self.scales + self.add(maps.flatten(1)), maps

    def decode(self, codes, style=None):
        films = iter(self.films)

        def tint(maps):
            return maps if style is None else next(films)(maps, style)

        codes = tint(codes)
        sketch = (codes * self.scales @ self.components).view(-1, 3, self.half, self.half)
        sketch = F.interpolate(sketch, scale_factor=2, mode="bilinear")
        fine = tint(self.fine(sketch))
        coarse = tint(self.coarse(fine) + self.spread(codes))
        inner, up, outer = self.join
        maps = tint(fine + outer(up(tint(inner(coarse)))))
        first, second, *_ = self.paint
        maps = tint(second(tint(first(maps))))
        return self.normalise.restore(sketch + self.detail(maps, tint))

    def detail(self, maps, tint):
        """What the last maps add to the sketch, in tiles of 4 x 4 pixels."""
        return self.paint[2:](maps)

    def forward(self, images, glimpses=None):
        """What comes back; with other windows of the same paintings, also both textures' points (2 * B, points)."""
        codes, maps = self.code(self.normalise(images))
        if glimpses is None:
            return self.decode(codes)
        textures = [texture(maps), texture(self.body(self.normalise(glimpses)))]
        return self.decode(codes), self.head(torch.cat(textures)).flatten(1)

    def features(self, images):
        """Manner without layout, (B, 8 * width): the statistics of the encoder's maps as a texture."""
        return texture(self.body(self.normalise(images))).flatten(1)


class StyleAutoencoder(Autoencoder):
    """An autoencoder whose decoder is told the style to paint in: each of its steps is scaled and shifted by it (FiLM).

    Styles are given as shares (B, styles) of all styles, mostly 1 for one of them: mixtures and half strengths are as
    good. With `relative` the decoder is told the way from the painting's own style to the one asked for, else only the
    latter. What an embedding is: learned, or made from `given` (styles, numbers), a classifier's mean features.
    """

    def __init__(self, styles: int, embedding: int = 64, given: int = 0, relative: bool = True, **plain):
        super().__init__(**plain)
        code, width = plain["code"], plain["width"]
        self.relative = relative
        steps = (code, width, 2 * width, 2 * width, width, width, width, width)
        self.films.extend(Film(embedding, channels) for channels in steps)
        if given:
            self.register_buffer("given", torch.zeros(styles, given))
        self.embedding = nn.Linear(given or styles, embedding, bias=False)
        self.paint = self.paint[:2]
        self.strokes = nn.Sequential(Up(), nn.Conv2d(width, width, 3, padding=1))
        self.pixels = nn.Sequential(nn.ReLU(), Up(), nn.Conv2d(width, 3, 5, padding=2))
        nn.init.zeros_(self.pixels[-1].weight)
        nn.init.zeros_(self.pixels[-1].bias)
        self.reader = nn.Linear(8 * width, styles)  # names the style of a painting, so that its own can be kept

    def embed(self, shares):
        return self.embedding(shares @ self.given if hasattr(self, "given") else shares)

    def decode(self, codes, wanted, own):
        """Images (B, 3, crop, crop) of the content (B, code) in the styles wanted, out of its own; (B, styles) both."""
        return super().decode(codes, self.embed(wanted - own if self.relative else wanted))

    def detail(self, maps, tint):
        """Enlarged step by step: where styles want contrasts, the seams of tiles would show (Odena et al. 2016)."""
        return self.pixels(tint(self.strokes(maps)))

    def forward(self, images, own, wanted, kept: int):
        """For training: contents, the first `kept` of the pictures in their own styles, all in the styles wanted, and
        logits of the styles that it reads."""
        codes, maps = self.code(self.normalise(images))
        both = torch.cat([own[:kept], wanted]), torch.cat([own[:kept], own])
        painted = self.decode(torch.cat([codes[:kept], codes]), *both)
        same, other = painted.split([kept, len(images)])
        return codes, same, other, self.reader(texture(maps).flatten(1).detach())

    def own_style(self, images):
        """The shares (B, styles) of styles in the images, as far as the encoder can tell."""
        return self.reader(self.features(images)).softmax(1)


class Pretrained(nn.Module):
    """A backbone of timm, and a head on its features. Images (B, 3, any, any) in [0, 1] to logits (B, classes).

    The features are the backbone's own, then mean and deviation of the maps of its last `stages`. They are brought to
    mean 0 and deviation 1 over the training paintings, for the head weighs them all alike.
    """

    def __init__(self, classes, backbone, size, features, stages=0, hidden=0, dropout=0.0, **normalisation):
        super().__init__()
        try:
            import timm  # an extra, that only this needs
        except ImportError:
            raise OSError("no timm here, which has the backbones: pip install -r requirements-embed.txt") from None

        self.normalise = Normalise(**normalisation)
        self.backbone = timm.create_model(backbone, num_classes=0)  # empty: its weights come with the checkpoint
        self.size, self.stages = size, stages
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.head = head(features, classes, hidden, dropout)

    def features(self, images):
        """What the backbone makes of the images, scaled to the size that it is made for: (B, features)."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        images = self.normalise(images)
        if not self.stages:
            return self.backbone(images).float()
        last, maps = self.backbone.forward_intermediates(images, indices=self.stages)
        own = self.backbone.forward_head(last, pre_logits=True)
        return torch.cat([own.float(), *(texture(each.float()).flatten(1) for each in maps)], 1)

    def forward(self, images):
        return self.head((self.features(images) - self.centre) / self.spread)

    def train(self, mode: bool = True):
        """The backbone stays as in evaluation: a few paintings are too few for its batch norms."""
        super().train(mode)
        self.backbone.eval()
        return self


def head(features: int, classes: int, hidden: int = 0, dropout: float = 0.0) -> nn.Module:
    """From features to logits: one linear layer, or a small MLP that drops features as well as hidden units."""
    if not hidden:
        return nn.Linear(features, classes)
    first, last = nn.Linear(features, hidden), nn.Linear(hidden, classes)
    return nn.Sequential(nn.Dropout(dropout), first, nn.GELU(), nn.Dropout(dropout), last)


MODELS = {
    "MLP": MLP,
    "CNN": CNN,
    "Autoencoder": Autoencoder,
    "StyleAutoencoder": StyleAutoencoder,
    "Pretrained": Pretrained,
}


def make_model(name: str, arguments: dict) -> nn.Module:
    """A network with fresh weights: one of ours, or a classifier of torchvision.models by its name there."""
    if name in MODELS:
        return MODELS[name](**arguments)
    from torchvision import models  # takes seconds, and only this needs it

    if name not in models.list_models(models):
        raise ValueError(f"no model {name}: give {', '.join(MODELS)} or a classifier of torchvision.models")
    normalise = Normalise(arguments["mean"], arguments["std"])
    return nn.Sequential(normalise, models.get_model(name, weights=None, num_classes=arguments["classes"]))


def build_model(checkpoint: dict) -> nn.Module:
    """The trained network that a checkpoint describes, in evaluation mode, on the CPU."""
    model = make_model(checkpoint["model"], checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    return model.eval()
