"""Train a style classifier from scratch.

    python train.py                             # settings from config.json
    python train.py -c cpu.json --epochs 40     # the smaller ones for a machine without a GPU
    python train.py --model MLP --run runs/mlp  # the baseline
    python train.py --resume                    # go on after Ctrl-C, a kill or a power cut

A validation part of the training paintings chooses the checkpoint; test paintings are never looked at. Writes into
the run folder: classifier.pt (when finished; classifier.partial.pt until then), train.jsonl with a line an epoch,
curves.png, classes.png and facts.json.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import figures
import runs
from wikiart import MODELS, BalancedSampler, WikiArt, hold_out, predict, random_crops

HELP = {
    "model": ("network: CNN is ours, MLP the baseline", tuple(MODELS)),
    "crop": "side of the network's input, in pixels",
    "width": "channels of the first layer (CNN), or hidden units (MLP)",
    "epochs": "passes over the balanced training set",
    "batch_size": "pictures a step",
    "lr": "peak learning rate of AdamW; rises for a tenth of the run, then falls to 0",
    "weight_decay": "weight decay of AdamW",
    "label_smoothing": "share of the target spread over all classes",
    "balance": ("none: as they come; resample: every class to --per-class, anew each epoch", ("none", "resample")),
    "per_class": "pictures of each class in an epoch of --balance resample",
    "validation": "share of the training paintings that chooses the checkpoint",
    "resume": "go on from classifier.partial.pt in the run folder",
}


def main(argv=None):
    config = runs.configure("train", __doc__, HELP, argv)
    device = runs.pick_device(config.device)
    run = Path(config.run)
    partial, final = run / "classifier.partial.pt", run / "classifier.pt"
    lock = runs.claim(run)

    data = WikiArt(config.data, "train", config.size, config.resize, config.split_seed, processes=config.processes)
    held_out = hold_out(data.labels.numpy(), data.groups, config.validation, config.split_seed)
    training, validation = data.subset(~held_out), data.subset(held_out)
    order = BalancedSampler(training.labels, config.balance, config.per_class, config.seed)
    drawn = np.bincount(training.labels[list(order)], minlength=len(data.classes))
    print_classes(data.classes, training.counts(), drawn, validation.counts())

    sample = training.pixels[training.rows[:: max(1, len(training) // 2000)]].reshape(-1, 3, config.size**2) / 255
    arguments = {
        "classes": len(data.classes),
        "width": config.width,
        "mean": sample.mean((0, 2)).tolist(),
        "std": sample.std((0, 2)).tolist(),
    } | ({"crop": config.crop} if config.model == "MLP" else {})
    torch.manual_seed(config.seed)  # only now: building the cache draws random numbers, a second start does not
    model = MODELS[config.model](**arguments).to(device, memory_format=torch.channels_last)  # a fifth faster, measured
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    steps = -(-len(order) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.epochs * steps, pct_start=0.1)

    state = {
        "model": config.model,
        "arguments": arguments,
        "classes": data.classes,
        "data": {"size": config.size, "resize": config.resize, "split_seed": config.split_seed},
        "crop": config.crop,
        "config": {key: value for key, value in vars(config).items() if key not in ("config", "resume")},
        "fingerprint": data.fingerprint,
        "largest_class": int(data.counts().argmax()),
        "history": [],
    }
    if config.resume and partial.exists():
        state = resume(partial, state, model, optimizer, schedule)
    elif config.resume:
        raise runs.Problem(f"nothing to resume: {partial} is not there (a finished run leaves only {final.name})")

    print(f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters on {device}")
    try:
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            order.set_epoch(epoch)
            started, cpu = time.perf_counter(), time.process_time()
            loss, accuracy = train_epoch(model, training, order, optimizer, schedule, epoch, config, device)
            scores = evaluate(model, validation, config, device)
            record = {"epoch": epoch, "loss": loss, "accuracy": accuracy, **scores, "lr": schedule.get_last_lr()[0],
                      "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}  # fmt: skip
            state["history"].append({key: round(value, 5) for key, value in record.items()})
            print(json.dumps(state["history"][-1]), flush=True)
            best = best_epoch(state["history"])
            if best == epoch:
                state |= {"epoch": epoch, "weights": {k: v.cpu().clone() for k, v in model.state_dict().items()}}
            state["resume"] = {
                "weights": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            runs.save_checkpoint(partial, state)
            runs.write_text(run / "train.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(state['history'])} finished epochs are kept: go on with --resume") from None

    del state["resume"]
    report(run, state, training, validation, drawn)
    runs.save_checkpoint(final, state)
    partial.unlink(missing_ok=True)
    lock.close()
    print(f"{final}: epoch {state['epoch']} kept, the best on {len(validation)} validation paintings")


def train_epoch(model, data, order, optimizer, schedule, epoch, config, device):
    """One pass; returns the mean loss and the accuracy on the (augmented) training pictures."""
    model.train()
    random = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)  # its own for each epoch: see resume()
    loss_sum = correct = 0.0
    bar = tqdm(total=len(order), desc=f"epoch {epoch}/{config.epochs}", unit="picture", leave=False)
    for step, (pixels, labels) in enumerate(data.batches(list(order), config.batch_size, device), start=1):
        images = random_crops(pixels, config.crop, generator=random)
        with runs.autocast(device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        if not torch.isfinite(loss):
            raise runs.Problem(f"the loss is {loss.item()} at step {step} of epoch {epoch}: lower --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        bar.update(len(labels))
    bar.close()
    return loss_sum / len(order), correct / len(order)


def evaluate(model, data, config, device) -> dict:
    """Loss, accuracy and balanced accuracy (the mean over classes) on pictures as they are."""
    model.eval()
    order = np.arange(len(data))
    outputs = [
        predict(model, pixels, config.crop).cpu() for pixels, _ in data.batches(order, config.batch_size, device)
    ]
    probabilities = torch.cat(outputs)
    correct = (probabilities.argmax(1) == data.labels).float()
    balanced = torch.stack([correct[data.labels == label].mean() for label in data.labels.unique()]).mean()
    return {
        "val_loss": F.nll_loss(probabilities.clamp_min(1e-9).log(), data.labels).item(),
        "val_accuracy": correct.mean().item(),
        "val_balanced_accuracy": balanced.item(),
    }


def best_epoch(history: list[dict]) -> int:
    """The epoch with the best balanced accuracy on the validation part; of equals the last."""
    return max(history, key=lambda record: (record["val_balanced_accuracy"], record["epoch"]))["epoch"]


def resume(partial, fresh: dict, model, optimizer, schedule) -> dict:
    """Load what a stopped run left; it must have had the same settings and paintings.

    Draws and augmentation depend on (seed, epoch) alone, so the weights end as those of an uninterrupted run.
    """
    state = runs.load_checkpoint(partial)
    for key, value in state["config"].items():
        if key not in ("data", "run", "device", "processes") and fresh["config"].get(key) != value:
            raise runs.Problem(f"{partial} was trained with {key} = {value}, now it is {fresh['config'].get(key)}: "
                               f"give the old setting, or delete the file to train anew")  # fmt: skip
    if state["fingerprint"] != fresh["fingerprint"]:
        raise runs.Problem(f"the paintings have changed since {partial} was written: delete it to train anew")
    model.load_state_dict(state["resume"]["weights"])
    optimizer.load_state_dict(state["resume"]["optimizer"])
    schedule.load_state_dict(state["resume"]["schedule"])
    print(f"resuming after epoch {len(state['history'])}")
    return state


def print_classes(classes, before, after, validation) -> None:
    print(f"\n{'class':30} {'paintings':>9} {'an epoch':>9} {'validation':>10}")
    for label in np.argsort(-before, kind="stable"):
        print(f"{classes[label]:30} {before[label]:9} {after[label]:9} {validation[label]:10}")
    print(f"{'all':30} {before.sum():9} {after.sum():9} {validation.sum():10}\n", flush=True)


def report(run, state, training, validation, drawn) -> None:
    history = state["history"]
    best = history[state["epoch"] - 1]
    figures.curves(
        run / "curves.png",
        history,
        {
            "loss": {"training": "loss", "validation": "val_loss"},
            "accuracy": {"training": "accuracy", "validation": "val_accuracy",
                         "validation, balanced": "val_balanced_accuracy"},
        },
        state["epoch"],
    )  # fmt: skip
    counts = {"paintings": training.counts(), "drawn in an epoch": drawn}
    figures.class_bars(run / "classes.png", counts, state["classes"], "Training paintings per style", "paintings")
    facts = {
        "model": state["model"],
        "epochs": len(history),
        "epoch_kept": state["epoch"],
        "parameters": sum(weight.numel() for weight in state["weights"].values()),
        "training_images": len(training),
        "validation_images": len(validation),
        "classes": len(state["classes"]),
        "largest_class": int(training.counts().max()),
        "smallest_class": int(training.counts().min()),
        "val_accuracy": best["val_accuracy"],
        "val_balanced_accuracy": best["val_balanced_accuracy"],
        "cpu_minutes": round(sum(record["cpu_seconds"] for record in history) / 60, 2),
        "minutes": round(sum(record["seconds"] for record in history) / 60, 2),
        **{key: state["config"][key] for key in ("crop", "size", "batch_size", "balance", "per_class", "seed")},
    }
    runs.add_facts(run, "train", facts)


if __name__ == "__main__":
    runs.start(main)
