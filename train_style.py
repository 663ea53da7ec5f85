"""Train an autoencoder that repaints paintings in other styles, for style_transfer.py.

    python train_style.py                                    # settings from config.json; needs <run>/classifier.pt
    python train_style.py -c settings/cpu.json --epochs 40   # smaller settings for a machine without a GPU
    python train_style.py --features tf_efficientnet_lite0 --weights lite0.pth    # features of timm, an extra
    torchrun --nproc-per-node=2 -- train_style.py            # several GPUs: the same result, with an even share each

In its own style a painting has to come back, in pixels and in the feature maps of a frozen network; in another, these
maps have to look like those of real paintings of that style, to statistics and to a critic, while the composition
stays. The moving average of the weights is kept. A training that was interrupted resumes after its last finished epoch
when the same command is run again; --restart starts anew. Writes into the run folder: style.pt (style.partial.pt until
training has finished), style.jsonl with one line per epoch, more/style_samples.png and more/style_curves.png, renewed
every few epochs, and facts.json.
"""

import copy
from pathlib import Path

import common.packages  # noqa: F401

import torch
import torch.nn.functional as F
from torch import nn

from common import backbones, figures, losses
from common.config import Setting, configure
from common.crops import resize, windows
from common.errors import UserError
from common.layers import parameter_count
from common.metrics import psnr
from common.names import display_name
from common.optim import MovingAverage, Optimizers
from common.run import (
    Steps,
    Timer,
    add_facts,
    autocast,
    average_gradients,
    checkpoint_path,
    claim,
    finish,
    fit_batch_size,
    fixed_settings,
    interruptible,
    join_processes,
    leave_processes,
    local_share,
    pick_device,
    rank,
    resume,
    reuse_freed_memory,
    run_script,
    save_epoch,
    sum_over_processes,
    world_size,
)
from wikiart import BalancedSampler, Classifier, StyleAutoencoder, WikiArt, channel_statistics

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "validation", "processes", "hide", "restart")
SHARED += ("tensorboard", "compile")
SETTINGS = {
    "features": Setting(str, None, "frozen network of the losses: a classifier of train.py, or a backbone of timm"),
    "weights": Setting(str, None, "file with the weights of a backbone of timm; none: from the hub"),
    "epochs": Setting(int, "[1, inf)", "epochs of --per-class paintings of each style"),
    "per_class": Setting(int, "[1, inf)", "paintings of each style per epoch"),
    "batch_size": Setting(int, "[2, inf)", "paintings per step, over all processes"),
    "crop": Setting(int, "[64, inf)", "side of the training crops in pixels, a multiple of 4"),
    "width": Setting(int, "[4, inf)", "channels at a quarter of the image's side, a multiple of 4"),
    "lr": Setting(float, "(0, inf)", "peak learning rate of AdamW; Muon's is ten times as high"),
    "condition": Setting(
        str, ("change", "style"), "what the decoder is conditioned on: target minus source style, or the target alone"
    ),
}
WEIGHTS = {
    "mse": 3.0,  # in the own style
    "range": 1.0,
    "style_stat": 10.0,
    "palette": 1.0,
    "critic": 2.5,
    "style_ce": 0.4,
    "feature": 1.0,  # in the own style
    "content": 0.05,
    "layout": 0.3,
}
PIXEL_VARIANCE = 0.06  # of paintings
CANDIDATES = 4  # real paintings, of which the nearest is the target of a repainting
EMA_DECAY = 0.99
BETAS = (0.5, 0.99)  # of AdamW: networks that train against each other need a short memory (Radford et al. 2016)
SAMPLE_EPOCHS = 4  # between two sheets of samples, and drawings of the curves


def main(argv=None):
    config = configure("train_style", __doc__, SETTINGS, SHARED, argv)
    device = join_processes(pick_device(config.device))
    reuse_freed_memory()
    lock = claim(config.run, "style") if rank() == 0 else None

    # Data
    data_settings = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    data = WikiArt(config.data, "train", processes=config.processes, **data_settings)
    training, validation = data.split_off(config.validation, config.split_seed)
    check_settings(config, training, validation)
    sampler = BalancedSampler(training.labels, "resample", config.per_class, config.seed)
    training.move_to(device)

    # Networks, losses and optimizers
    features = load_features(config, training, device)
    steps = config.epochs * (len(sampler) // config.batch_size)
    arguments, parts = new_networks(features, training, steps, config, device)
    state = {
        "model": "StyleAutoencoder",
        "arguments": arguments,
        "classes": data.classes,
        "data": data_settings,
        "config": fixed_settings(config),
        "fingerprint": data.fingerprint,
        "history": [],
    }
    state = resume(config, "style", state, parts)
    averaged = parts["averaged"].module
    if rank() == 0:
        print(f"StyleAutoencoder: {parameter_count(averaged) / 1e6:.2f} million parameters, {steps} steps on {device}")

    # Train, evaluate, save
    with interruptible(state):
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            timer = Timer()
            record = train_epoch(parts, features, training, sampler, epoch, config, device)
            if rank() == 0:
                record |= evaluate(averaged, features, validation, config, device) | timer.seconds()
                state["weights"] = copy.deepcopy(averaged).cpu().state_dict()
                scores = f"loss {record['loss']:.3f}, validation {record['val_psnr']:.2f} dB in the own style"
                save_epoch(config, "style", state, {"epoch": epoch} | record, parts, scores)
                if epoch % SAMPLE_EPOCHS == 0 and epoch < config.epochs:
                    plot_curves(config.run, state["history"])
                    plot_samples(averaged, validation, config, device)
    if rank() == 0:
        plot_curves(config.run, state["history"])
        plot_samples(averaged, validation, config, device)
        report(Path(config.run), state, steps, len(training), config)
        print(f"{finish(config.run, 'style', state)}: epoch {config.epochs} kept")
        lock.close()
    leave_processes()


# Settings, data and networks ------------------------------------------------------------------------------------------


def check_settings(config, training: WikiArt, validation: WikiArt) -> None:
    """Raise UserError for settings that do not fit together; lower --batch-size where an epoch has few paintings."""
    if len(training.classes) < 2:
        raise UserError("the paintings have one style only: there is no other to repaint them in")
    if config.crop % StyleAutoencoder.STRIDE or config.crop > config.size or config.width % 4:
        raise UserError(f"--crop {config.crop} must be a multiple of 4, at most --size; --width a multiple of 4")
    fit_batch_size(config, config.per_class * len(training.classes), validation)


def load_features(config, training: WikiArt, device) -> losses.FeatureMaps:
    """The frozen network that shows in which features styles differ. Raises UserError."""
    if config.features.endswith(".pt"):
        classifier = Classifier.load(checkpoint_path(config.run, config.features), device)
        if classifier.model_name != "CNN":
            raise UserError(f"{config.features} holds a {classifier.model_name}, but a CNN is needed here")
        if classifier.classes != training.classes:
            raise UserError(f"{config.features} has other styles than these paintings: train it on them")
        network = classifier.model
    else:
        network = backbones.load(config.features, config.weights, 0)[0].to(device)
    items = torch.linspace(0, len(training) - 1, min(96, len(training))).long()
    images = centre_crops(training, items, config.crop, device)[0]
    try:
        features = losses.FeatureMaps(network, images)
        side = min(maps.shape[-1] for maps in features(view(images, 0.0, 0.0, 0.0))[0])
    except AssertionError:
        raise UserError(f"{config.features} takes images of one size only: give a convolutional network") from None
    if side < 3:  # the kernel of the critic
        raise UserError(f"--crop {config.crop} is too small for {config.features}: its maps have a side of {side}")
    return features


def centre_crops(data: WikiArt, items, crop: int, device):
    """The centres of paintings, (B, 3, crop, crop) in [0, 1], and their labels."""
    pixels, labels = data.batch(items, device)
    return windows(pixels, crop, (0.5, 0.5), torch.full((2, len(items)), 0.5)), labels


def new_networks(features, training: WikiArt, steps: int, config, device) -> tuple[dict, dict]:
    """The model's arguments, and all that training changes: {name: network, moving average, queue or optimizers}."""
    torch.manual_seed(config.seed)
    styles, (mean, std) = len(training.classes), channel_statistics(training)
    relative = config.condition == "change"
    arguments = {"styles": styles, "width": config.width, "relative": relative}
    arguments |= {"mean": mean, "std": std}
    model = StyleAutoencoder(**arguments).to(device, memory_format=torch.channels_last)
    critic = losses.Critic(features.channels, styles).to(device, memory_format=torch.channels_last)
    parts = {
        "model": model,
        "critic": critic,
        "style_stat": losses.StyleStatLoss(styles, features.channels).to(device),
        "palette": losses.PaletteLoss(styles, config.crop).to(device),
        "averaged": MovingAverage(model, EMA_DECAY),
        "optimizers": Optimizers(model, config.lr, 0.0, steps, betas=BETAS),
        "critic_optimizers": Optimizers(critic, config.lr, 1e-3, steps, betas=BETAS, momentum=0.5),
    }
    if config.compile:  # last: the moving average is a copy of the model
        model.encode, model.decode = torch.compile(model.encode), torch.compile(model.decode)
        critic.compile()
        features.compile()
    return arguments, parts


# Training -------------------------------------------------------------------------------------------------------------


def train_epoch(parts: dict, features, data: WikiArt, sampler, epoch: int, config, device) -> dict:
    """One pass over --per-class paintings of each style, each in another style; returns the mean losses."""
    parts["model"].train()
    sampler.set_epoch(epoch)
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # for each epoch, so that a resumed training draws the same
    members = [torch.nonzero(data.labels == label).flatten() for label in range(len(data.classes))]
    batches = torch.tensor(list(sampler)).split(config.batch_size)
    batches = [batch for batch in batches if len(batch) == config.batch_size]  # so that processes have equal shares
    steps, values, share = Steps(batches, len(batches), epoch, config.epochs), [], local_share()
    for items in steps:
        sources = data.labels[items]
        targets = (sources + torch.randint(1, len(members), sources.shape)) % len(members)
        style_items = torch.stack([members[target][torch.randint(len(members[target]), ())] for target in targets])
        scales, places, picks = torch.rand(2, 2), torch.rand(2, 2, len(items)), torch.rand(len(items), CANDIDATES)
        random = torch.rand(3).tolist()
        pixels, sources = data.batch(items[share], device)
        images = windows(pixels, config.crop, scales[0], places[0][:, share])
        pixels, targets = data.batch(style_items[share], device)
        style_images = windows(pixels, config.crop, scales[1], places[1][:, share])
        record = train_step(parts, features, images, style_images, sources, targets, picks[share], random)
        steps.record(record["loss"])
        values.append(torch.stack(list(record.values())))
    means = sum_over_processes(torch.stack(values).cpu().double().mean(0)) / world_size()
    return dict(zip(record, means.tolist(), strict=True))


def train_step(parts: dict, features, images, style_images, sources, targets, picks, random) -> dict:
    """One step of the model, then one of the critic; returns the losses.

    images (B, 3, crop, crop) of the styles `sources` (B,); style_images: real paintings of the styles `targets` (B,);
    picks (B, CANDIDATES) and random (3,) are uniform numbers in [0, 1).
    """
    model, critic, half = parts["model"], parts["critic"], -(-len(images) // 2)
    source, target = (F.one_hot(labels, model.styles).float() for labels in (sources, targets))
    with autocast(images.device, cpu=True):
        codes = model.encode(images)
        codes = torch.cat([codes[:half], codes])  # half of the images in their own style, too
        decoded = model.decode(codes, torch.cat([source[:half], target]), torch.cat([source[:half], source]))
    same, repainted = decoded.split([half, len(images)])

    seen, style_seen, original_seen = (view(batch, *random) for batch in (repainted, style_images, images))
    with autocast(images.device, cpu=True):
        maps, logits = features(seen)
        with torch.no_grad():
            style_maps, original_maps = features(style_seen)[0], features(original_seen)[0]
        same_maps = features(view(same, *random))[0]
        critic.requires_grad_(False)
        scores = critic(seen, maps, target)
    statistics, style_statistics = losses.style_statistics(seen, maps), losses.style_statistics(style_seen, style_maps)
    middle = len(maps) // 2  # of our classifier a map of a quarter of the side, of a backbone of an eighth or so
    terms = {
        "mse": F.mse_loss(same, images[:half]) / PIXEL_VARIANCE,
        "feature": losses.feature_loss(same_maps, [values[:half] for values in original_maps]),
        "range": losses.range_loss(repainted),
        "style_stat": parts["style_stat"](statistics, style_statistics, targets, picks),
        "palette": parts["palette"](repainted, style_images, targets, picks),
        "critic": losses.generator_loss(scores),
        "content": losses.content_loss(maps[middle], original_maps[middle]),
        "layout": losses.layout_loss(repainted, images),
    }
    if logits is not None:
        terms["style_ce"] = F.cross_entropy(logits, targets, label_smoothing=0.1)
    loss = sum(WEIGHTS[name] * term for name, term in terms.items())
    update(model, parts["optimizers"], loss, max_norm=5.0)
    parts["averaged"].update_parameters(model)

    critic.requires_grad_(True)
    with autocast(images.device, cpu=True):
        real, mismatched = critic(style_seen, style_maps, target), critic(original_seen, original_maps, target)
        fake = critic(seen.detach(), [values.detach() for values in maps], target)
    critic_error = losses.critic_loss(real, fake, mismatched)
    update(critic, parts["critic_optimizers"], critic_error)
    return {"loss": loss.detach(), "critic_error": critic_error.detach()} | {k: v.detach() for k, v in terms.items()}


def view(images, zoom: float, top: float, left: float):
    """The part of images (B, 3, crop, crop) that losses see; zoom, top and left are uniform numbers in [0, 1).

    Edges, near which the networks see reflections, are cut off. Shifts and scales vary: with a fixed view, the model
    learns reliefs of 4 pixels, the stride of the classifier's stem, and patterns that fool this network and no other.
    """
    if zoom < 0.5:
        images = resize(images, max(64, 4 * round(images.shape[-1] * (0.75 + 1.2 * zoom) / 4)))
    top, left = 6 + int(4 * top), 6 + int(4 * left)
    return images[:, :, top : top - 16, left : left - 16]


def update(network, optimizers, loss, max_norm: float = torch.inf) -> None:
    optimizers.zero_grad()
    loss.backward()
    average_gradients(network)
    nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    optimizers.step()


# Evaluation and report ------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, features, data: WikiArt, config, device) -> dict:
    """On up to 64 validation paintings: PSNR in the own style, and how often the classifier predicts another target.

    Training fools that classifier, so its hit rate says little: style_transfer.py asks others.
    """
    model.eval()
    items = torch.linspace(0, len(data) - 1, min(64, len(data))).long()
    errors, hits = [], []
    for batch in items.split(config.batch_size):
        images, labels = centre_crops(data, batch, config.crop, device)
        targets = (labels + 1 + torch.arange(len(batch), device=device) % (model.styles - 1)) % model.styles
        source, target = (F.one_hot(styles, model.styles).float() for styles in (labels, targets))
        with autocast(device, cpu=True):
            same, repainted = (model(images, style, source).clamp(0, 1) for style in (source, target))
            logits = features(repainted)[1]
        errors.append((same - images).square().mean((1, 2, 3)))
        if logits is not None:
            hits.append(logits.argmax(1) == targets)
    facts = {"val_psnr": psnr(torch.cat(errors).mean().item())}
    return facts | ({"val_hit_rate": torch.cat(hits).float().mean().item()} if hits else {})


@torch.no_grad()
def plot_samples(model, data: WikiArt, config, device) -> None:
    """more/style_samples.png: a validation painting of each of the first eight styles, in each of these."""
    model.eval()
    shown = torch.from_numpy(data.showable(config.hide)).nonzero().flatten()
    if not len(shown):
        return
    items = torch.stack([shown[data.labels[shown] == label][0] for label in data.labels[shown].unique()[:8]])
    pixels, labels = data.batch(items, device)
    eye, images = torch.eye(model.styles, device=device), pixels.float() / 255
    columns = [images]
    for target in eye[:8]:
        with autocast(device, cpu=True):
            columns.append(model(images, target.expand_as(eye[labels]), eye[labels]).clamp(0, 1))
    names = [display_name(name) for name in data.classes]
    cells = (255 * torch.stack(columns, 1)).round().byte().cpu().numpy()
    path, title = Path(config.run) / "more/style_samples.png", "Validation paintings, repainted in each style"
    figures.painting_grid(path, cells, ["original", *names[:8]], [names[label] for label in labels.tolist()], title)


def plot_curves(run, history: list[dict]) -> None:
    """more/style_curves.png: the losses of the epochs so far."""
    panels = {
        "PSNR in the own style, dB": {"validation": "val_psnr"},
        "losses in another style": {
            name.replace("_", " "): name for name in ("style_stat", "palette", "content", "layout")
        },
    }
    figures.curves(Path(run) / "more/style_curves.png", history, panels)


def report(run: Path, state: dict, steps: int, images: int, config) -> None:
    """Write the facts of a finished training."""
    history = state["history"]
    facts = {
        "epochs": len(history),
        "steps": steps,
        "training_images": images,
        "parameters": parameter_count(StyleAutoencoder(**state["arguments"])),
        "cpu_minutes": sum(record["cpu_seconds"] for record in history) / 60,
        "minutes": sum(record["seconds"] for record in history) / 60,
        **{key: value for key, value in history[-1].items() if key.startswith("val_")},
        **{key: getattr(config, key) for key in SETTINGS if key not in ("weights", "epochs")},
        "seed": config.seed,
    }
    add_facts(run, "train_style", facts, outdated=("style_transfer",))


if __name__ == "__main__":
    run_script(main)
