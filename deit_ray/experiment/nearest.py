"""The key that a person means who writes one that does not exist."""

import difflib

# names that other programs use, and the last part of ours
SYNONYMS = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "max_lr": "lr",
    "lr_min": "min_lr",
    "eta_min": "min_lr",
    "min_learning_rate": "min_lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "warmup": "warmup_epochs",
    "grad_clip": "clip_grad",
    "gradient_clip": "clip_grad",
    "clip_grad_norm": "clip_grad",
    "max_grad_norm": "clip_grad",
    "ema": "ema_decay",
    "model_ema_decay": "ema_decay",
    "model_ema_warmup": "ema_warmup",
    "opt": "optim.kind",
    "bce_loss": "label_loss",
    "init_values": "layer_scale",
    "smoothing": "label_smoothing",
    "bs": "batch_size",
    "batch": "batch_size",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "max_epochs": "epochs",
    "num_workers": "workers",
    "world_size": "workers",
    "gpus": "workers",
    "num_gpus": "workers",
    "amp": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "dtype": "precision",
    "img_size": "image_size",
    "input_size": "image_size",
    "resolution": "image_size",
    "size": "image_size",
    "val_split": "holdout",
    "validation_split": "holdout",
    "val_fraction": "holdout",
    "dataset": "data.uri",
    "data_dir": "data.uri",
    "data_path": "data.uri",
    "root": "data.uri",
    "path": "uri",
    "dir": "uri",
    "url": "uri",
    "output": "results.uri",
    "output_dir": "results.uri",
    "out": "results.uri",
    "hflip": "flip",
    "horizontal_flip": "flip",
    "reprob": "random_erasing",
    "repeated_aug": "views",
    "arch": "student.model",
    "architecture": "student.model",
    "embed_dim": "width",
    "hidden_size": "width",
    "dim": "width",
    "layers": "depth",
    "num_layers": "depth",
    "num_heads": "heads",
    "patch": "patch_size",
    "pretrained": "student.init",
    "drop_path_rate": "drop_path",
    "stochastic_depth": "drop_path",
    "alpha": "distillation.weight",
    "tau": "temperature",
    "checkpoint": "weights",
    "n_trials": "trials",
    "num_trials": "trials",
    "num_samples": "trials",
    "max_trials": "trials",
    "pruner": "scheduler",
    "grace_period": "grace_epochs",
    "objective": "metric",
    "experiment_name": "tracking.experiment",
    "mlflow": "tracking.uri",
    "random_seed": "seed",
    "base": "extends",
    "_base_": "extends",
    "include": "extends",
    "inherits": "extends",
    "parent": "extends",
}


def nearest_key(key: str, keys: list[str]) -> str | None:
    """The existing key that is meant by one that does not exist; None if none is near.

    By its last part, which may be another program's name or have a letter wrong, in the same section first;
    then by its whole.

    Args:
        keys: all dotted keys.
    """
    section, _, last = key.lower().replace("-", "_").rpartition(".")
    wanted = SYNONYMS.get(last, last)
    exact = [known for known in keys if known == wanted or known.endswith("." + wanted)]
    if exact:
        return max(exact, key=lambda known: difflib.SequenceMatcher(None, section, known).ratio())
    siblings = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == section}
    for names in (siblings, {known.rpartition(".")[2]: known for known in keys}):
        if near := difflib.get_close_matches(last, names, n=1, cutoff=0.7):
            return names[near[0]]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
    return near[0] if near else None
