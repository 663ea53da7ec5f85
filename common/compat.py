"""Old names, so that settings files, checkpoints and facts written by earlier versions can still be read."""

SETTINGS = {  # (section, key): (section, key) today
    ("train", "smallest"): ("train", "min_crop_area"),
    ("train", "windows"): ("train", "tta_scales"),
    ("train", "average"): ("train", "ema_decay"),
    ("train", "validation"): ("", "validation"),
    ("train", "min_images"): ("", "min_images"),
    ("train_autoencoder", "smallest"): ("train_autoencoder", "min_crop_area"),
    ("train_autoencoder", "manner_weight"): ("train_autoencoder", "contrastive_weight"),
    ("train_autoencoder", "validation"): ("", "validation"),
    ("train_autoencoder", "guide"): ("train_style", "features"),
    ("train_autoencoder", "told"): ("train_style", "condition"),
    ("embed", "validation"): ("", "validation"),
    ("embed", "min_images"): ("", "min_images"),
    ("lora", "heldout"): ("lora", "eval_images"),
}
VALUES = {"mean-deviation": "mean_std"}  # of train.pooling, and in checkpoints
CHECKPOINT = {"windows": "tta_scales", "extra": "aux_classes", "points": "projection_dim"}
WEIGHTS = {  # by model: beginnings of names in the state dict
    "Autoencoder": {"spread.": "expand.", "head.": "projection_head."},
    "Pretrained": {"centre": "feature_mean", "spread": "feature_std"},
}
FACTS = {
    "manner": "contrastive",
    "manner_weight": "contrastive_weight",
    "told": "condition",
    "val_hits": "val_hit_rate",
    "no_names": "no_aux",
    "no_deviation": "no_std",
    "no_views": "no_tta",
    "no_average": "no_ema",
}


def rename_settings(settings: dict) -> dict:
    """Settings {key or section: value or {key: value}} under today's names."""
    renamed = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for (section, key), (new_section, new_key) in SETTINGS.items():
        if isinstance(renamed.get(section), dict) and key in renamed[section]:
            target = renamed.setdefault(new_section, {}) if new_section else renamed
            target[new_key] = renamed[section].pop(key)
    train = renamed.get("train")
    if isinstance(train, dict) and train.get("pooling") in VALUES:
        train["pooling"] = VALUES[train["pooling"]]
    return renamed


def rename_checkpoint(checkpoint: dict) -> dict:
    """A checkpoint under today's names; one that has them already stays as it is."""
    checkpoint = {CHECKPOINT.get(key, key): value for key, value in checkpoint.items()}
    if "arguments" in checkpoint:
        arguments = {CHECKPOINT.get(key, key): value for key, value in checkpoint["arguments"].items()}
        if "pooling" in arguments:
            arguments["pooling"] = VALUES.get(arguments["pooling"], arguments["pooling"])
        checkpoint["arguments"] = arguments
    for old, new in WEIGHTS.get(checkpoint.get("model"), {}).items():
        weights = checkpoint.get("weights", {})
        checkpoint["weights"] = {rename_weight(name, old, new): value for name, value in weights.items()}
    return checkpoint


def rename_weight(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def rename_facts(facts: dict) -> dict:
    """Facts, and facts within facts, under today's names."""
    return {
        FACTS.get(key, key): rename_facts(value) if isinstance(value, dict) else value for key, value in facts.items()
    }
