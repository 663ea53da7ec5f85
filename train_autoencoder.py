"""Train an autoencoder: every painting to a short code, and back; or one that is told the style to paint in.

    python train_autoencoder.py                           # settings from config.json
    python train_autoencoder.py --model StyleAutoencoder  # starts from autoencoder.pt, guided by classifier.pt
    python train_autoencoder.py -c cpu.json --code 64     # a shorter code, on a machine without a GPU
    python train_autoencoder.py --manner-weight 0.15 --run runs/demo/manner    # also learns manner, for cluster.py
    python train_autoencoder.py --resume                  # go on after Ctrl-C, a kill or a power cut
    torchrun --nproc-per-node=2 -- train_autoencoder.py   # several GPUs: the same result, sooner

A validation part of the training paintings chooses the checkpoint; of a StyleAutoencoder the last one is kept. The
result is held against three that need no network: the mean painting, each painting's own mean colour, and PCA with as
many components as the code has numbers. Writes into the run folder: autoencoder.pt (when finished;
autoencoder.partial.pt until then), autoencoder.jsonl with a line an epoch, autoencoder_curves.png, reconstructions.png
(renewed as training goes on) and facts.json; of a StyleAutoencoder style.pt, style.jsonl, style_curves.png and
repaintings.png.
"""

import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from tqdm import tqdm

import figures
import runs
from losses import Copy, Repaint
from wikiart import WikiArt, build_model, channel_statistics, make_model
from windows import one_window, random_crops, views

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes", "hide")
HELP = {
    "model": ("the plain one, or one that is told the style to paint in", ("Autoencoder", "StyleAutoencoder")),
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
    "start": "the plain autoencoder that a StyleAutoencoder starts from",
    "guide": "the classifier that says what a style looks like",
    "embedding": "numbers that a style is told in",
    "embed": ("what these are: learned, or made from the classifier's mean features of a style", ("learned", "means")),
    "told": ("what the decoder is told: the way from the own style to the one asked for, or the latter alone",
             ("change", "style")),
    "hit_weight": "weight of the guide's naming the style asked for, in the loss; 0: off",
    "texture_weight": "weight of maps with the statistics of a painting of that style; 0: off",
    "critic_weight": "weight of a critic of maps; 0: off",
    "layout_weight": "weight of keeping what is light and what is dark; 0: off",
    "spy_weight": "weight of keeping the style out of the content; 0: off",
    "validation": "share of the training paintings that chooses the checkpoint",
    "pca_images": "training pictures, each also mirrored, for the PCA to start from and to be held against, at most",
    "show": "paintings in reconstructions.png",
    "resume": "go on from autoencoder.partial.pt in the run folder",
}  # fmt: skip
# What may change when a run is resumed.
FREE = ("data", "run", "device", "processes", "config", "resume", "hide", "show")


def main(argv=None):
    config = runs.configure("train_autoencoder", __doc__, SHARED, HELP, argv)
    device = runs.join_processes(runs.pick_device(config.device))
    runs.keep_memory()
    first = runs.rank() == 0
    run = Path(config.run)
    style = config.model == "StyleAutoencoder"
    stem = "style" if style else "autoencoder"
    partial, final = run / f"{stem}.partial.pt", run / f"{stem}.pt"
    lock = runs.claim(run, stem) if first else None
    if config.crop % 16:
        raise runs.Problem(f"--crop {config.crop} must be a multiple of 16")
    if config.batch_size % runs.world():
        raise runs.Problem(f"--batch-size must be a multiple of the {runs.world()} processes")

    shape = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    data = WikiArt(config.data, "train", processes=config.processes, **shape)
    test = WikiArt(config.data, "test", classes=data.classes, processes=config.processes, **shape)
    training, validation = data.set_apart(config.validation, config.split_seed)
    if not len(validation) or config.batch_size > len(training):
        raise runs.Problem(f"{len(training)} paintings to train on and {len(validation)} to validate with are too few: "
                           "add paintings, raise --validation or lower --batch-size")  # fmt: skip
    training.move_to(device)

    torch.manual_seed(config.seed)
    if style:
        objective, arguments = begin_style(training, config, device)
    else:
        objective, arguments = begin_plain(training, config, start=not partial.exists())
    model = objective.to(device, memory_format=torch.channels_last).model
    optimizers = runs.Optimizers(objective, config, config.epochs * (len(training) // config.batch_size))
    state = {
        "model": config.model,
        "arguments": arguments,
        "classes": data.classes,
        "data": shape,
        "crop": config.crop,
        "config": {key: value for key, value in vars(config).items() if key not in FREE},
        "fingerprint": data.fingerprint,
        "history": [],
    }
    parts = {"objective": objective, "optimizers": optimizers}
    state = runs.resume(config.resume, partial, state, parts)
    if first:
        print(f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters on {device}")
    trained = runs.parallel(objective, device)
    pca = fit_pca(training, config) if first and not style else None
    levels = baselines(pca, validation, config) if pca else {}
    kept = len(state["history"])  # epochs in the checkpoint
    try:
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            if config.patience and epoch - best_epoch(state["history"], style) > config.patience:
                break
            started, cpu = time.perf_counter(), time.process_time()
            error = train_epoch(trained, training, optimizers, epoch, config, device)
            spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
            val_error = mean_error(model, validation, config, device)  # by all, so that all know when to end
            record = {"epoch": epoch, "mse": error, "val_mse": val_error} | spent
            record |= {"psnr": psnr(error), "val_psnr": psnr(val_error)}
            if style:
                record["val_hits"] = hits(objective, validation, config, device)
            state["history"].append({key: round(value, 6) for key, value in record.items()})
            if not first:
                continue
            print(json.dumps(state["history"][-1]), flush=True)
            if best_epoch(state["history"], style) == epoch:
                state |= {"epoch": epoch, "weights": copy.deepcopy(model).cpu().state_dict()}
            state["resume"] = {name: part.state_dict() for name, part in parts.items()}
            runs.save_checkpoint(partial, state)
            kept = epoch
            runs.write_text(run / f"{stem}.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))
            if epoch < 3 or epoch % 5 == 0:
                look(run, state, model, validation, levels, pca, config, device, f"after epoch {epoch}")
    except KeyboardInterrupt:
        advice = f"{kept} finished epochs are kept: go on with --resume" if kept else "no epoch was finished"
        raise KeyboardInterrupt(advice if first else "") from None

    if first:
        del state["resume"]
        state["weights"] = runs.halved(state["weights"])
        model.load_state_dict(state["weights"])
        look(run, state, model, test, levels, pca, config, device, "of test paintings")
        report(run, state, model, training, validation, test, pca, config, device)
        runs.save_checkpoint(final, state)
        partial.unlink(missing_ok=True)
        lock.close()
        print(f"{final}: epoch {state['epoch']} kept")
    runs.leave_processes()


def begin_plain(training, config, start: bool):
    """What is trained, with a plain Autoencoder inside that starts as PCA; its arguments.

    This PCA sees windows of the paintings, too, as training does: it generalises better than that of whole ones alone.
    """
    mean, std = channel_statistics(training)
    arguments = {"crop": config.crop, "code": config.code, "width": config.width, "mean": mean, "std": std}
    arguments["points"] = 128 if config.manner_weight else 0
    model = make_model("Autoencoder", arguments)
    if start:  # a resumed one has started before
        model.start_as_pca(with_mirrors(training, config, windows=3))
    return Copy(model, config, float(np.mean(np.square(std)))), arguments


def begin_style(training, config, device):
    """The same with a StyleAutoencoder that starts as a trained plain one, and a classifier to guide it."""
    plain = runs.load_checkpoint(runs.find_checkpoint(config.run, config.start), "Autoencoder")
    guide = runs.load_checkpoint(runs.find_checkpoint(config.run, config.guide), "CNN")
    if guide["classes"] != training.classes:
        raise runs.Problem(f"{config.guide} knows other styles than these paintings have: train it on them")
    if len(training.classes) < 2:
        raise runs.Problem("one style only: there is no other to paint in")
    if plain["crop"] != config.crop:
        raise runs.Problem(f"{config.start} was trained with --crop {plain['crop']}: give that here too")
    arguments = plain["arguments"] | {"styles": len(training.classes), "embedding": config.embedding, "points": 0}
    arguments["relative"] = config.told == "change"
    network, features = build_model(guide), None
    if config.embed == "means":
        features = mean_features(network, training, guide["crop"], config)
        arguments["given"] = features.shape[1]
    model = make_model("StyleAutoencoder", arguments)
    weights = plain["weights"] if features is None else plain["weights"] | {"given": features}
    model.load_state_dict(weights, strict=False)  # what styles need is new, what tells manners apart is left out
    network = network.to(device, memory_format=torch.channels_last)
    return Repaint(model, network, config, float(np.mean(np.square(arguments["std"])))), arguments


@torch.no_grad()
def mean_features(network, data, crop: int, config):
    """What a classifier's last layer sees of each style on average, (styles, numbers), scaled to deviation 1."""
    features = torch.cat([network.features(views(data.batch(items, torch.device("cpu"))[0], crop)[0])
                          for items in torch.arange(len(data)).split(config.batch_size)])  # fmt: skip
    means = torch.stack([features[data.labels == style].mean(0) for style in range(len(data.classes))])
    return (means - means.mean(0)) / means.std()


def train_epoch(trained, data, optimizers, epoch, config, device) -> float:
    """One pass; returns the mean squared error on the training crops."""
    trained.train()
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # anew for each epoch: see runs.resume
    mine = slice(runs.rank(), None, runs.world())  # every process takes its share of each batch
    batches = torch.randperm(len(data))[: len(data) // config.batch_size * config.batch_size].split(config.batch_size)
    members = [torch.nonzero(data.labels == label).flatten() for label in range(len(data.classes))]
    total = torch.zeros(1, dtype=torch.float64)
    for step, batch in enumerate(tqdm(batches, f"epoch {epoch}/{config.epochs}", leave=False, disable=runs.rank() > 0)):
        window, numbers = torch.rand(5), torch.rand(7, len(batch))
        pixels, labels = data.batch(batch[mine], device)
        images = one_window(pixels, config.crop, window, config.smallest)
        inputs = [images.contiguous(memory_format=torch.channels_last)]
        if config.model == "StyleAutoencoder":
            styles = len(data.classes)
            others = (data.labels[batch] + 1 + (numbers[0] * (styles - 1)).long()) % styles
            reals = torch.stack([members[other][int(number * len(members[other]))]
                                 for other, number in zip(others, numbers[1], strict=True)])  # fmt: skip
            aims = one_window(data.batch(reals[mine], device)[0], config.crop, torch.rand(5), config.smallest)
            inputs += [labels, others[mine].to(device), aims, torch.rand(6)]
        elif config.manner_weight:
            glimpses = random_crops(pixels, config.crop, numbers[:, mine], config.glimpse)
            inputs.append(glimpses.contiguous(memory_format=torch.channels_last))
        with runs.autocast(device):
            loss, error = trained(*inputs)
        if not torch.isfinite(loss):
            raise runs.Problem(
                f"the loss is {loss.item()} at step {step + 1} of epoch {epoch}: lower the learning rates"
            )
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        total += error.item() * len(batch[mine])
    return runs.sum_over_processes(total).item() / (len(batches) * config.batch_size)


@torch.no_grad()
def reconstruct(model, data, items, config, device):
    """The whole pictures, and what comes back, both float (B, 3, crop, crop) in [0, 1]."""
    model.eval()
    images = views(data.batch(items, device)[0], config.crop)[0]
    images = images.contiguous(memory_format=torch.channels_last)
    with runs.autocast(device):
        codes = model.encode(images)
        if config.model == "StyleAutoencoder":
            own = own_styles(data, items, device)
            painted = model.decode(codes, own, own)
        else:
            painted = model.decode(codes)
    return images, painted.float().clamp(0, 1)


def own_styles(data, items, device):
    """The styles of paintings, (B, styles) with a 1 for each."""
    return F.one_hot(data.labels[items], len(data.classes)).float().to(device)


@torch.no_grad()
def hits(objective, data, config, device) -> float:
    """How often the guide sees the style that a painting was painted in: each in one of the other styles."""
    model, styles, hit = objective.model.eval(), len(data.classes), 0
    for items in torch.arange(len(data)).split(config.batch_size):
        others = (data.labels[items] + 1 + items % (styles - 1)) % styles
        images = views(data.batch(items, device)[0], config.crop)[0].contiguous(memory_format=torch.channels_last)
        with runs.autocast(device):
            wanted = F.one_hot(others, styles).float().to(device)
            painted = model.decode(model.encode(images), wanted, own_styles(data, items, device))
            _, logits = objective.look(painted)
        hit += int((logits.argmax(1).cpu() == others).sum())
    return hit / len(data)


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


def best_epoch(history: list[dict], last: bool) -> int:
    """The epoch with the lowest error on the validation part, or the last; 0 before there is one.

    Styles come true at the expense of that error, so it cannot choose an epoch for them.
    """
    if last:
        return len(history)
    return min(history, key=lambda record: record["val_mse"], default={"epoch": 0})["epoch"]


# What needs no network ------------------------------------------------------------------------------------------------


def with_mirrors(data, config, windows: int = 0):
    """Batches of pictures (B, 3, crop, crop) in [0, 1] for PCA: whole ones, random windows, and the mirror images of
    both; of more than --pca-images paintings an even choice."""
    chosen, cpu = torch.arange(len(data))[:: -(-len(data) // config.pca_images)], torch.device("cpu")
    for items in chosen.split(config.batch_size):
        pixels, _ = data.batch(items, cpu)
        yield from views(pixels, config.crop)
        for _ in range(windows):
            window = one_window(pixels, config.crop, torch.rand(5), config.smallest)
            yield from (window, window.flip(3))


def fit_pca(data, config) -> PCA:
    rows = torch.cat([images.flatten(1) for images in with_mirrors(data, config)]).numpy()
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


def chosen_to_show(data, config):
    """--show paintings, spread over the data set."""
    fit = np.flatnonzero(data.fit_to_show(config.hide))
    if not len(fit):
        raise runs.Problem("--hide leaves no painting to show")
    return torch.tensor(fit[np.linspace(0, len(fit) - 1, min(config.show, len(fit))).round().astype(int)])


def look(run, state, model, data, levels, pca, config, device, when: str) -> None:
    """The curves so far, with the baselines' `levels` to beat, and some paintings above what is made of them."""
    if config.model == "StyleAutoencoder":
        panels = {"PSNR, dB": {"training crops": "psnr", "validation": "val_psnr"},
                  "share in the style asked for": {"the guide says, validation": "val_hits"}}  # fmt: skip
        figures.curves(run / "style_curves.png", state["history"], panels)
        show_styles(run, model, data, config, device, when)
        return
    names = level_names(config, pca)
    panels = {"mean squared error": {"training crops": "mse", "validation": "val_mse"},
              "PSNR, dB": {"training crops": "psnr", "validation": "val_psnr"}}  # fmt: skip
    lines = {
        "mean squared error": {name: levels[key] for key, name in names.items()},
        "PSNR, dB": {names["pca"]: psnr(levels["pca"])},
    }  # the nearest alone, so that one sees the difference
    path = run / "autoencoder_curves.png"
    figures.curves(path, state["history"], panels, state["epoch"], lines, logarithmic=("mean squared error",))
    show(run, model, data, config, device, when, pca)


def level_names(config, pca) -> dict[str, str]:
    return {
        "pca": f"PCA, {pca.n_components_} numbers",
        "mean_colour": "own mean colour",
        "mean_image": "the mean painting",
    }


def show(run, model, data, config, device, when: str, pca) -> None:
    """reconstructions.png: originals above what comes back from the code, and from PCA."""
    items = chosen_to_show(data, config)
    images, painted = (pictures.cpu() for pictures in reconstruct(model, data, items, config, device))
    back = pca.inverse_transform(pca.transform(images.flatten(1).numpy()))
    back = torch.from_numpy(back).float().view_as(images).clamp(0, 1)
    rows = {"original": images, f"from {config.code} numbers": painted, "PCA, as many": back}
    draw(run / "reconstructions.png", rows, data, items, f"Reconstructions {when}")


@torch.no_grad()
def show_styles(run, model, data, config, device, when: str) -> None:
    """repaintings.png: originals above what comes back in the own style, and in others."""
    items = chosen_to_show(data, config)
    images, painted = reconstruct(model, data, items, config, device)
    rows, codes = {"original": images.cpu(), "own style": painted.cpu()}, model.encode(images)
    for style, name in list(enumerate(data.classes))[:8]:
        wanted = torch.eye(len(data.classes), device=device)[[style]].expand(len(items), -1)
        rows[figures.plain(name)] = model.decode(codes, wanted, own_styles(data, items, device)).clamp(0, 1).cpu()
    draw(run / "repaintings.png", rows, data, items, f"Repaintings {when}")


def draw(path, rows: dict, data, items, title: str) -> None:
    pictures = np.stack([(255 * each).round().byte().numpy() for each in rows.values()])
    titles = [figures.plain(data.classes[label]) for label in data.labels[items]]
    figures.grid(path, pictures, titles, list(rows), title)


def report(run, state, model, training, validation, test, pca, config, device) -> None:
    history, best = state["history"], state["history"][state["epoch"] - 1]
    error = mean_error(model, test, config, device)
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
        "cpu_minutes": sum(record["cpu_seconds"] for record in history) / 60,
        "minutes": sum(record["seconds"] for record in history) / 60,
        **{key: state["config"][key] for key in ("crop", "batch_size", "seed")},
        "code": state["arguments"]["code"],
        "shown": test.named(chosen_to_show(test, config)),
    }
    print(f"test paintings: {facts['psnr']:.2f} dB")
    if config.model == "StyleAutoencoder":
        facts |= {"val_hits": best["val_hits"], "embed": config.embed, "told": config.told}
        facts |= {key: getattr(config, key) for key in Repaint.WEIGHTS}
    else:
        tested, names = baselines(pca, test, config), level_names(config, pca)
        facts |= {f"{key}_psnr": psnr(value) for key, value in tested.items()}
        facts |= {"gain_over_pca": psnr(error) - psnr(tested["pca"]), "manner_weight": config.manner_weight}
        print(*(f"{name}: {psnr(tested[key]):.2f} dB" for key, name in names.items()), sep=", ")
    name, outdated = ("train_style", "style_transfer") if "val_hits" in facts else ("train_autoencoder", "cluster")
    rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in facts.items()}
    runs.add_facts(run, name, rounded, outdated=(outdated,))


if __name__ == "__main__":
    runs.start(main)
