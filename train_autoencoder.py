"""Train an autoencoder: every painting to a short code, and back.

    python train_autoencoder.py                         # settings from config.json
    python train_autoencoder.py -c cpu.json --code 64   # a shorter code, on a machine without a GPU
    python train_autoencoder.py --resume                # go on after Ctrl-C, a kill or a power cut
    torchrun --nproc-per-node=2 -- train_autoencoder.py # several GPUs: the same result, sooner

A validation part of the training paintings chooses the checkpoint. The result is held against three that need no
network: the mean painting, each painting's own mean colour, and PCA with as many components as the code has numbers.
Writes into the run folder: autoencoder.pt (when finished; autoencoder.partial.pt until then), autoencoder.jsonl with a
line an epoch, autoencoder_curves.png, reconstructions.png (renewed as training goes on) and facts.json.
"""

import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

import figures
import runs
from wikiart import WikiArt, channel_statistics, make_model, one_window, random_crops, views

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes", "hide")
HELP = {
    "crop": "side of the pictures that are coded, in pixels; a multiple of 16",
    "code": "numbers a painting is coded in",
    "width": "channels at the finest scale",
    "epochs": "passes over the training set, at most",
    "patience": "epochs without progress on the validation part after which training ends; 0: never",
    "batch_size": "pictures a step, over all processes",
    "optimizer": ("Muon for the convolutions and AdamW for the rest, or AdamW for all", ("muon", "adamw")),
    "lr": "peak learning rate of AdamW; all rates rise for a fifth of the run, then fall to 0",
    "muon_lr": "peak learning rate of Muon",
    "weight_decay": "weight decay of both; 0: none",
    "smallest": "share of a picture's area that the smallest training crops show; 1: nearly all of it",
    "manner_weight": "weight of telling windows of one painting from others, by their textures, in the loss; 0: off",
    "glimpse": "share of a picture's area that the smallest of those windows show",
    "validation": "share of the training paintings that chooses the checkpoint",
    "pca_images": "training pictures that the PCA to compare with is fitted on, at most",
    "show": "paintings in reconstructions.png",
    "resume": "go on from autoencoder.partial.pt in the run folder",
}
# What may change when a run is resumed.
FREE = ("data", "run", "device", "processes", "config", "resume", "hide", "show", "pca_images")


def main(argv=None):
    config = runs.configure("train_autoencoder", __doc__, SHARED, HELP, argv)
    device = runs.join_processes(runs.pick_device(config.device))
    first = runs.rank() == 0
    run = Path(config.run)
    partial, final = run / "autoencoder.partial.pt", run / "autoencoder.pt"
    lock = runs.claim(run, "autoencoder") if first else None
    if config.crop % 16:
        raise runs.Problem(f"--crop {config.crop} must be a multiple of 16")
    if config.batch_size % runs.world():
        raise runs.Problem(f"--batch-size must be a multiple of the {runs.world()} processes")

    shape = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    data = WikiArt(config.data, "train", processes=config.processes, **shape)
    training, validation = data.set_apart(config.validation, config.split_seed)
    if not len(validation) or config.batch_size > len(training):
        raise runs.Problem(f"{len(training)} paintings to train on and {len(validation)} to validate with are too few: "
                           "add paintings, raise --validation or lower --batch-size")  # fmt: skip
    training.move_to(device)

    mean, std = channel_statistics(training)
    variance = float(np.mean(np.square(std)))  # an error of 1 is that of guessing the mean
    arguments = {"crop": config.crop, "code": config.code, "width": config.width, "mean": mean, "std": std}
    arguments["points"] = 128 if config.manner_weight else 0
    torch.manual_seed(config.seed)
    model = make_model("Autoencoder", arguments)
    if not partial.exists():
        pictures = flat(training, config, config.pca_images)
        model.start_as_pca(torch.from_numpy(pictures).view(-1, 3, config.crop, config.crop))
    model = model.to(device, memory_format=torch.channels_last)
    optimizers = runs.Optimizers(model, config, config.epochs * (len(training) // config.batch_size))
    state = {
        "model": "Autoencoder",
        "arguments": arguments,
        "classes": data.classes,
        "data": shape,
        "crop": config.crop,
        "config": {key: value for key, value in vars(config).items() if key not in FREE},
        "fingerprint": data.fingerprint,
        "history": [],
    }
    parts = {"model": model, "optimizers": optimizers}
    state = runs.resume(config.resume, partial, state, parts)
    if first:
        print(f"Autoencoder: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters on {device}")
    trained = runs.parallel(model, device)
    kept = len(state["history"])  # epochs in the checkpoint
    try:
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            if config.patience and epoch - best_epoch(state["history"]) > config.patience:
                break
            started, cpu = time.perf_counter(), time.process_time()
            error = train_epoch(trained, training, variance, optimizers, epoch, config, device)
            spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
            val_error = mean_error(model, validation, config, device)  # by all, so that all know when to end
            record = {"epoch": epoch, "mse": error, "val_mse": val_error} | spent
            record |= {"psnr": psnr(error), "val_psnr": psnr(val_error)}
            state["history"].append({key: round(value, 6) for key, value in record.items()})
            if not first:
                continue
            print(json.dumps(state["history"][-1]), flush=True)
            if best_epoch(state["history"]) == epoch:
                state |= {"epoch": epoch, "weights": copy.deepcopy(model).cpu().state_dict()}
            state["resume"] = {name: part.state_dict() for name, part in parts.items()}
            runs.save_checkpoint(partial, state)
            kept = epoch
            runs.write_text(run / "autoencoder.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))
            if epoch & (epoch - 1) == 0:  # a look at epochs 1, 2, 4, 8, ...
                show(run, model, None, validation, config, device, f"after epoch {epoch}")
    except KeyboardInterrupt:
        advice = f"{kept} finished epochs are kept: go on with --resume" if kept else "no epoch was finished"
        raise KeyboardInterrupt(advice if first else "") from None

    if first:
        del state["resume"]
        state["weights"] = runs.halved(state["weights"])
        model.load_state_dict(state["weights"])
        report(run, state, model, training, validation, config, device)
        runs.save_checkpoint(final, state)
        partial.unlink(missing_ok=True)
        lock.close()
        print(f"{final}: epoch {state['epoch']} kept, the best on {len(validation)} validation paintings")
    runs.leave_processes()


def train_epoch(model, data, variance, optimizers, epoch, config, device) -> float:
    """One pass; returns the mean squared error on the training crops."""
    model.train()
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # anew for each epoch: see runs.resume
    mine = slice(runs.rank(), None, runs.world())  # every process takes its share of each batch
    batches = torch.randperm(len(data))[: len(data) // config.batch_size * config.batch_size].split(config.batch_size)
    total = torch.zeros(1, dtype=torch.float64)
    for step, batch in enumerate(tqdm(batches, f"epoch {epoch}/{config.epochs}", leave=False, disable=runs.rank() > 0)):
        window, numbers = torch.rand(5), torch.rand(7, len(batch))[:, mine]
        pixels, _ = data.batch(batch[mine], device)
        images = one_window(pixels, config.crop, window, config.smallest)
        images = images.contiguous(memory_format=torch.channels_last)
        glimpses = None
        if config.manner_weight:
            glimpses = random_crops(pixels, config.crop, numbers, config.glimpse)
            glimpses = glimpses.contiguous(memory_format=torch.channels_last)
        with runs.autocast(device):
            painted = model(images, glimpses)
        painted, points = painted if config.manner_weight else (painted, None)
        error = F.mse_loss(painted.float(), images)
        loss = error / variance
        if config.manner_weight:
            loss = loss + config.manner_weight * contrast(points.float().view(2, len(images), -1))
        if not torch.isfinite(loss):
            raise runs.Problem(
                f"the loss is {loss.item()} at step {step + 1} of epoch {epoch}: lower the learning rates"
            )
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        total += error.item() * len(batch[mine])
    return runs.sum_over_processes(total).item() / (len(batches) * config.batch_size)


def contrast(points, temperature: float = 0.2):
    """NT-Xent (Chen et al. 2020): of all windows, the other one of its painting shall be each one's nearest.

    points (2, B, D): of two windows of each painting; those of all processes count.
    """
    if dist.is_initialized():
        points = torch.cat(all_gather(points.contiguous()), 1)
    points = F.normalize(points.flatten(0, 1), dim=1)
    likeness = (points @ points.T / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(len(points), device=points.device).roll(len(points) // 2)
    return F.cross_entropy(likeness, other)


@torch.no_grad()
def reconstruct(model, data, items, config, device):
    """The whole pictures, and what comes back, both float (B, 3, crop, crop) in [0, 1]."""
    model.eval()
    images = views(data.batch(items, device)[0], config.crop)[0]
    with runs.autocast(device):
        return images, model(images.contiguous(memory_format=torch.channels_last)).float().clamp(0, 1)


def mean_error(model, data, config, device) -> float:
    """Mean squared error over a data set's whole pictures."""
    total = 0.0
    for items in torch.arange(len(data)).split(config.batch_size):
        images, painted = reconstruct(model, data, items, config, device)
        total += (painted - images).square().sum().item()
    return total / (len(data) * 3 * config.crop**2)


def psnr(error: float) -> float:
    """Mean squared error of pixels in [0, 1] as peak signal-to-noise ratio, in decibels; 3 more are half of it."""
    return float(-10 * np.log10(max(error, 1e-12)))


def best_epoch(history: list[dict]) -> int:
    """The epoch with the lowest error on the validation part; 0 before there is one."""
    return min(history, key=lambda record: record["val_mse"], default={"epoch": 0})["epoch"]


# What needs no network ------------------------------------------------------------------------------------------------


def flat(data, config, most: int | None = None) -> np.ndarray:
    """Whole pictures as rows, float32 (N, 3 * crop * crop) in [0, 1]; of more than `most` an even choice."""
    chosen = torch.arange(len(data))[:: max(1, -(-len(data) // most)) if most else 1]
    cpu = torch.device("cpu")
    return np.concatenate([views(data.batch(items, cpu)[0], config.crop)[0].flatten(1).numpy()
                           for items in chosen.split(config.batch_size)])  # fmt: skip


def fit_pca(training, config) -> PCA:
    rows = flat(training, config, config.pca_images)
    return PCA(min(config.code, *rows.shape), svd_solver="randomized", random_state=config.seed).fit(rows)


def baselines(pca, data, config) -> dict[str, float]:
    """Mean squared errors of the mean painting, of each painting's own mean colour and of PCA, in batches."""
    errors, cpu = np.zeros(3), torch.device("cpu")
    for items in torch.arange(len(data)).split(config.batch_size):
        images = views(data.batch(items, cpu)[0], config.crop)[0]
        rows = images.flatten(1).numpy()
        guesses = (pca.mean_, images.mean((2, 3), keepdim=True).expand_as(images).flatten(1).numpy(),
                   pca.inverse_transform(pca.transform(rows)).clip(0, 1))  # fmt: skip
        errors += [((guess - rows) ** 2).sum() for guess in guesses]
    errors /= len(data) * 3 * config.crop**2
    return dict(zip(("mean_image", "mean_colour", "pca"), errors.tolist(), strict=True))


# Figures and facts ----------------------------------------------------------------------------------------------------


def show(run, model, pca, data, config, device, when: str) -> None:
    """reconstructions.png: originals above what comes back from the code, and from PCA where it is given."""
    fit = np.flatnonzero(data.fit_to_show(config.hide))
    items = torch.tensor(fit[np.linspace(0, len(fit) - 1, min(config.show, len(fit))).round().astype(int)])
    images, painted = (pictures.cpu() for pictures in reconstruct(model, data, items, config, device))
    rows = {"original": images, f"from {config.code} numbers": painted}
    if pca is not None:
        back = pca.inverse_transform(pca.transform(images.flatten(1).numpy()))
        rows["PCA, as many"] = torch.from_numpy(back).float().view_as(images).clamp(0, 1)
    pictures = np.stack([(255 * each).round().byte().numpy() for each in rows.values()])
    titles = [figures.plain(data.classes[label]) for label in data.labels[items]]
    figures.grid(run / "reconstructions.png", pictures, titles, list(rows), f"Reconstructions {when}")


def report(run, state, model, training, validation, config, device) -> None:
    history, best = state["history"], state["history"][state["epoch"] - 1]
    test = WikiArt(config.data, "test", classes=state["classes"], processes=config.processes, **state["data"])
    pca = fit_pca(training, config)
    levels = baselines(pca, validation, config)
    names = {
        "mean_image": "the mean painting",
        "mean_colour": "own mean colour",
        "pca": f"PCA, {config.code} numbers",
    }
    figures.curves(
        run / "autoencoder_curves.png",
        history,
        {"mean squared error": {"training crops": "mse", "validation": "val_mse"},
         "PSNR, dB": {"training crops": "psnr", "validation": "val_psnr"}},
        state["epoch"],
        {"mean squared error": {names[key]: value for key, value in levels.items()},
         "PSNR, dB": {names[key]: psnr(value) for key, value in levels.items()}},
    )  # fmt: skip
    show(run, model, pca, test, config, device, "of test paintings")
    error, tested = mean_error(model, test, config, device), baselines(pca, test, config)
    facts = {
        "epochs": len(history),
        "epoch_kept": state["epoch"],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training_images": len(training),
        "validation_images": len(validation),
        "test_images": len(test),
        "val_mse": best["val_mse"],
        "val_psnr": best["val_psnr"],
        "mse": error,
        "psnr": psnr(error),
        **{f"{key}_psnr": psnr(value) for key, value in tested.items()},
        "gain_over_pca": psnr(error) - psnr(tested["pca"]),
        "cpu_minutes": sum(record["cpu_seconds"] for record in history) / 60,
        **{key: state["config"][key] for key in ("crop", "code", "width", "batch_size", "seed")},
    }
    rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in facts.items()}
    runs.add_facts(run, "train_autoencoder", rounded, outdated=("cluster",))
    compared = ", ".join(f"{name} {psnr(tested[key]):.2f} dB" for key, name in names.items())
    print(f"test paintings: {facts['psnr']:.2f} dB; {compared}")


if __name__ == "__main__":
    runs.start(main)
