"""Pre-trained backbones of timm: their weights, and the features that they make of paintings.

They are written as they are made: a stopped extraction goes on where it was.

    model, source, arguments = load("tf_efficientnet_lite0", "lite0.pth", config)    # "" for weights: from the hub
    features, speed = extract(model, path, source, {"train": ..., "test": ...}, config, device)
"""

import copy
import hashlib
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import UserError
from common.images import decode_in_processes, open_rgb
from common.layers import Normalise, mean_std
from common.run import atomic_write, autocast, reuse_freed_memory, write_text

try:
    import timm
except ImportError:  # an extra: embed.py says how to get it
    timm = None


class Pretrained(nn.Module):
    """A backbone of timm and a classification head. Images (B, 3, any, any) in [0, 1] to logits (B, classes).

    Features are the backbone's pooled features, then mean and standard deviation of the maps of its last `stages`. The
    head sees them standardised over the training paintings.
    """

    def __init__(self, classes, backbone, size, features, stages=0, hidden=0, dropout=0.0, **normalisation):
        super().__init__()
        if timm is None:
            raise UserError("this needs timm: pip install -r requirements/embed.txt")
        self.normalise = Normalise(**normalisation)
        self.backbone = timm.create_model(backbone, num_classes=0)  # its weights come with the checkpoint
        self.size, self.stages = size, stages
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.head = head(features, classes, hidden, dropout)

    def features(self, images):
        """Features (B, features) of images, resized to the backbone's input size."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        images = self.normalise(images)
        if not self.stages:
            return self.backbone(images).float()
        last, stages = self.backbone.forward_intermediates(images, indices=self.stages)
        pooled = self.backbone.forward_head(last, pre_logits=True)
        return torch.cat([pooled.float(), *(mean_std(maps.float()).flatten(1) for maps in stages)], 1)

    def forward(self, images):
        return self.head((self.features(images) - self.feature_mean) / self.feature_std)

    def train(self, mode: bool = True):
        """Set the head to training mode; the backbone's batch norms keep their pre-trained statistics."""
        super().train(mode)
        self.backbone.eval()
        return self


def head(features: int, classes: int, hidden: int = 0, dropout: float = 0.0) -> nn.Module:
    """Features to logits: a linear layer, or an MLP with one hidden layer and dropout on both."""
    if not hidden:
        return nn.Linear(features, classes)
    first, last = nn.Linear(features, hidden), nn.Linear(hidden, classes)
    return nn.Sequential(nn.Dropout(dropout), first, nn.GELU(), nn.Dropout(dropout), last)


def load(name: str, weights: str, config) -> tuple[Pretrained, str, dict]:
    """A network around the trained backbone, which weights it has, and the arguments that rebuild it.

    A file's weights must fit strictly; where only their names differ, they are taken in their order.
    """
    try:
        backbone = timm.create_model(name, pretrained=not weights)
        if weights:
            found, own = read_weights(weights), backbone.state_dict()
            ends = [[key.rpartition(".")[2] for key in keys] for keys in (found, own)]
            if found.keys() != own.keys() and ends[0] == ends[1]:
                found = dict(zip(own, found.values(), strict=True))
            backbone.load_state_dict(found)
    except RuntimeError as error:
        said = "; ".join(line.strip() for line in str(error).splitlines())
        raise UserError(f"--backbone {name}{weights and f' with --weights {weights}'}: {said[:300]}") from None
    except OSError as error:
        raise UserError(f"could not get the weights of {name}: {weights or 'check the network, or give --weights'} "
                           f"({type(error).__name__})") from None  # fmt: skip
    key = hashlib.sha256()
    for value in backbone.state_dict().values():
        key.update(value.reshape(-1).view(torch.uint8).numpy())
    backbone.reset_classifier(0)  # ImageNet's classes are not ours
    settings = timm.data.resolve_model_data_config(backbone)
    arguments = {"backbone": name, "size": settings["input_size"][-1], "features": 1,
                 "stages": min(config.stages, len(backbone.feature_info)),
                 "mean": list(settings["mean"]), "std": list(settings["std"])}  # fmt: skip
    model = Pretrained(1, **arguments).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    with torch.inference_mode():
        arguments["features"] = model.features(torch.zeros(1, 3, model.size, model.size)).shape[1]
    model.feature_mean = torch.zeros(arguments["features"])  # extract sets it
    return model, f"{Path(weights).name or 'hub'} {key.hexdigest()[:16]}", arguments


def read_weights(path: str) -> dict:
    try:
        return timm.models.load_state_dict(path, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no file of weights {path}") from None
    except Exception as error:  # torch and safetensors raise many kinds here
        raise UserError(f"{path} is no file of weights ({type(error).__name__})") from None


def with_parts(model, **parts):
    """A network that shares all but these parts with `model`."""
    model = copy.copy(model)
    model._modules = model._modules | parts
    return model


class Paintings(Dataset):
    """Files of pictures as uint8 (3, size, size), by the backbone's own transform; for processes that decode."""

    def __init__(self, files: list[Path], size: int, shrink: int, transform):
        self.files, self.size, self.shrink, self.transform = files, size, shrink, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        image = open_rgb(self.files[item], 2 * self.size)
        if self.shrink:
            image = image.resize((self.shrink, self.shrink), Image.Resampling.BICUBIC)
        return self.transform(image).numpy()


def extract(model, path: Path, source: str, sets: dict, config, device) -> tuple[np.ndarray, dict]:
    """Features of all training, then all test paintings, float32 (N, features) mapped from disk; and how fast that was.

    They are appended to a file, batch by batch, so that memory does not grow with their number. A restart goes on
    after the last full batch; other weights, paintings or settings start anew. Sets the network's centre and spread.
    """
    flat, note, table = (path.with_name(f"{path.name}.{ending}") for ending in ("float32", "json", "npz"))
    files = [data.root / painting for data in sets.values() for painting in data.paths]
    width = len(model.feature_mean)
    identity = {"weights": source.split()[-1], "size": model.size, "stages": model.stages, "resize": config.resize,
                "shrink": config.shrink,
                "paintings": [data.fingerprint for data in sets.values()]}  # fmt: skip
    known = json.loads(note.read_text()) if note.exists() else {}
    if known.get("made_from") != identity:
        known = {"made_from": identity, "speed": {}}
        flat.unlink(missing_ok=True)
        write_text(note, json.dumps(known))
    with open(flat, "ab") as target:
        done = target.tell() // (4 * width)
        done -= done % config.batch_size if done < len(files) else 0
        if done == len(files) and not known["speed"]:  # killed before it could be noted
            done = max(0, done - config.batch_size)
        if done < len(files):
            target.truncate(4 * width * done)
            table.unlink(missing_ok=True)
            known["speed"] = append(target, model, files[done:], config, device)
            write_text(note, json.dumps(known))
    features = np.memmap(flat, np.float32, "r", shape=(len(files), width))

    first, moments = len(sets["train"]), np.zeros((2, width))
    for part in np.array_split(features[:first], -(-first // 1024)):
        moments += [part.sum(0, dtype=np.float64), (part.astype(np.float64) ** 2).sum(0)]
    mean, square = moments / first
    model.feature_mean = torch.tensor(mean, dtype=torch.float32, device=device)
    model.feature_std = torch.tensor(np.maximum(square - mean**2, 1e-8) ** 0.5, dtype=torch.float32, device=device)
    if not table.exists():  # what cluster.py reads
        codes = {"train": features[:first], "test": features[first:], "classes": np.array(sets["train"].classes)}
        for split, data in sets.items():
            codes |= {f"{split}_labels": data.labels.numpy(), f"{split}_artists": data.artists,
                      f"{split}_paths": data.paths}  # fmt: skip
        with atomic_write(table) as temporary:
            np.savez(temporary, **codes, made_from=json.dumps(identity))
    return features, known["speed"]


def fused(backbone):
    """A copy with every batch norm folded into the convolution before it: a third faster on a CPU."""
    backbone = copy.deepcopy(backbone)
    for module in list(backbone.modules()):
        for (name, layer), (after, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(layer, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.utils.fuse_conv_bn_eval(layer, norm))
                setattr(module, after, getattr(norm, "act", torch.nn.Identity()))  # timm's norms hold what follows
    return backbone


def append(target, model, files, config, device) -> dict:
    """Write the features of these pictures to an open file as they are made; returns how fast that was."""
    faster = with_parts(model, backbone=fused(model.backbone))
    noise = torch.rand(2, 3, model.size, model.size).to(device)
    with torch.inference_mode():
        if torch.allclose(faster.features(noise), model.features(noise), rtol=1e-3, atol=1e-3):
            model = faster  # else this backbone does not call its layers in their order
    settings = timm.data.resolve_model_data_config(model.backbone)
    # The backbone's own size and interpolation, but all of the painting: its edges belong to it.
    settings |= {"crop_pct": 1.0, "crop_mode": "squash" if config.resize == "squash" else "center"}
    transform = timm.data.create_transform(**settings, use_prefetcher=True)  # to bytes: the network normalises
    paintings = Paintings(files, model.size, config.shrink, transform)
    reuse_freed_memory()
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    bar = tqdm(total=len(files), desc="features", unit="picture")
    with torch.inference_mode(), bar, decode_in_processes(paintings, config.batch_size, config.processes, np.stack) as batches:
        for pixels in batches:
            images = torch.from_numpy(pixels).to(device).to(memory_format=torch.channels_last) / 255
            with autocast(device):
                features = model.features(images)
            if not torch.isfinite(features).all():
                raise UserError("the backbone makes numbers that are not finite: are these its weights?")
            target.write(features.cpu().numpy())
            target.flush()  # a kill leaves what is done
            bar.update(len(pixels))
    seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu  # the decoding processes have ended
    return {"images_per_second": round(len(files) / seconds, 2), "images_per_cpu_second": round(len(files) / cpu, 2)}
