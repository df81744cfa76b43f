"""What arguments of a Trainer are called in other libraries: by their names, what to write here."""

from __future__ import annotations

__all__ = ["EVAL_NAMES", "FIT_NAMES", "RUN_NAMES", "TRAINER_NAMES"]

EVAL_NAMES = {"dataloaders": "data", "loader": "data", "model": "task", "test_data": "data", "x": "data"}
FIT_NAMES = {
    "train_dataloaders": "train", "train_dataset": "train", "train_data": "train", "val": "valid",
    "val_dataloaders": "valid", "validation_data": "valid", "eval_dataset": "valid", "datamodule": "train",
    "model": "task", "ckpt_path": "resume", "resume_from_checkpoint": "resume", "sample_weight": "weight",
    "train_loader": "train", "train_dataloader": "train", "val_loader": "valid", "valid_loader": "valid",
    "val_data": "valid", "val_dataset": "valid", "valid_dataset": "valid",
}  # fmt: skip
RUN_NAMES = {"train": "data", "model": "step", "ckpt_path": "resume"}
# and what belongs elsewhere, with what to write there
_LR = "torch.optim.AdamW(net.parameters(), lr=...)"
_OF_TASK = {name: f"lw.Supervised(net, {name}=...)" for name in ("loss", "optimizer", "schedule", "metrics")}
_OF_DATA = {"batch_size": "DataLoader(dataset, batch_size=...)", "num_workers": "DataLoader(dataset, num_workers=...)"}
_OF_TRAINER = {
    name: f"lw.Trainer({name}=...)" for name in (
        "epochs", "steps", "accumulate", "callbacks", "checkpoint", "clip_norm", "debug", "device", "devices", "folder",
        "loggers", "precision", "progress", "seed", "validate_every",
    )
} | {"max_epochs": "lw.Trainer(epochs=...)", "verbose": "lw.Trainer(progress=...)"}  # fmt: skip
FIT_NAMES |= _OF_TRAINER | _OF_TASK | _OF_DATA | {
    "lr": _LR, "dry": "trainer.plan(task, ...)", "dry_run": "trainer.plan(task, ...)",
    "loaders": "fit(task, train=loaders['train'], valid=loaders['valid'])",
}  # fmt: skip
RUN_NAMES |= _OF_TRAINER
TRAINER_NAMES = _OF_TASK | _OF_DATA | {
    "max_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps", "max_time": "time", "accelerator": "device",
    "accumulate_grad_batches": "accumulate", "gradient_accumulation_steps": "accumulate", "default_root_dir": "folder",
    "gradient_clip_val": "clip_norm", "max_grad_norm": "clip_norm", "logger": "loggers", "output_dir": "folder",
    "logdir": "folder", "enable_progress_bar": "progress", "verbose": "progress", "enable_checkpointing": "checkpoint",
    "check_val_every_n_epoch": "validate_every='2 epochs'", "val_check_interval": "validate_every='500 steps'",
    "log_every_n_steps": "log_every", "fast_dev_run": "debug=lw.Debug(dev_run=2)",
    "overfit_batches": "debug=lw.Debug(overfit=1)", "limit_train_batches": "debug=lw.Debug(train=...)",
    "train_percent_check": "debug=lw.Debug(train=...)", "limit_val_batches": "debug=lw.Debug(valid=...)",
    "detect_anomaly": "debug=lw.Debug(anomaly=True)", "profiler": "debug=lw.Debug(profile=True)",
    "sync_batchnorm": "strategy=lw.DDP(sync_batch_norm=True)",
    "gpus": "devices", "lr": _LR, "learning_rate": _LR, "model": "fit(task, ...)",
    "resume": "fit(task, ..., resume=...)", "resume_from_checkpoint": "fit(task, ..., resume=...)",
    "train": "fit(task, train=...)", "valid": "fit(task, ..., valid=...)",
}  # fmt: skip
