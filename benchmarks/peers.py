"""The other frameworks' runs of the digits benchmark, each written the way its own documentation writes it.

Each returns a contender for ``measure.race``: the model, the optimizer and the data loader are made before the clock
starts, the framework's trainer after it. A framework that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable

import torch
from torch import nn

Parts = Callable[[], tuple[nn.Module, torch.optim.Optimizer, object]]  # fresh module, optimizer, loader; same seed


def quiet() -> None:
    """No warnings and no log lines: a benchmark measures training, not complaints about how short it is."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "ignite", "accelerate", "skorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def lightning(parts: Parts, level: str):
    import pytorch_lightning as pl
    from torchmetrics.classification import MulticlassAccuracy

    class Digits(pl.LightningModule):
        def __init__(self, module, optimizer):
            super().__init__()
            self.module, self.loss, self.optimizer = module, nn.CrossEntropyLoss(), optimizer
            if level == "metric":
                self.accuracy = MulticlassAccuracy(10, average="micro")

        def training_step(self, batch, index):
            inputs, target = batch
            logits = self.module(inputs)
            loss = self.loss(logits, target)
            if level == "metric":
                self.accuracy(logits, target)
                self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
                self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return self.optimizer

    class Lap(pl.Callback):
        def __init__(self, end_of_epoch):
            self.end_of_epoch = end_of_epoch

        def on_train_epoch_end(self, trainer, task):
            self.end_of_epoch()

    bare = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)

    def prepare(epochs, end_of_epoch):
        module, optimizer, loader = parts()
        task, folder = Digits(module, optimizer), tempfile.mkdtemp()

        def go():
            options = bare if level == "bare" else {}
            trainer = pl.Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                devices=1,
                default_root_dir=folder,
                callbacks=[Lap(end_of_epoch)],
                **options,
            )
            trainer.fit(task, loader)
            return module

        return go

    return prepare


def ignite(parts: Parts):
    from ignite.engine import Events, create_supervised_trainer

    def prepare(epochs, end_of_epoch):
        module, optimizer, loader = parts()

        def go():
            trainer = create_supervised_trainer(module, optimizer, nn.CrossEntropyLoss())
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: end_of_epoch())
            trainer.run(loader, max_epochs=epochs)
            return module

        return go

    return prepare


def skorch(parts: Parts):
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback

    class Lap(Callback):
        def __init__(self, end_of_epoch):
            self.end_of_epoch = end_of_epoch

        def on_epoch_end(self, net, **arguments):
            self.end_of_epoch()

    def prepare(epochs, end_of_epoch):
        module, optimizer, loader = parts()
        inputs, target = loader.dataset.tensors

        def go():
            net = NeuralNetClassifier(
                module, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=optimizer.param_groups[0]["lr"],
                optimizer__momentum=optimizer.param_groups[0]["momentum"], batch_size=loader.batch_size,
                iterator_train__shuffle=True, max_epochs=epochs, train_split=None, verbose=0,
                callbacks=[Lap(end_of_epoch)],
            )  # fmt: skip
            net.set_params(callbacks__epoch_timer=None, callbacks__train_loss=None, callbacks__print_log=None)
            net.fit(inputs, target)
            return module

        return go

    return prepare


def accelerate(parts: Parts):
    from accelerate import Accelerator

    def prepare(epochs, end_of_epoch):
        module, optimizer, loader = parts()

        def go():
            accelerator, loss_of = Accelerator(cpu=True), nn.CrossEntropyLoss()
            wrapped, opt, batches = accelerator.prepare(module, optimizer, loader)
            for _ in range(epochs):
                for inputs, target in batches:
                    opt.zero_grad()
                    accelerator.backward(loss_of(wrapped(inputs), target))
                    opt.step()
                end_of_epoch()
            return module

        return go

    return prepare


def installed(parts: Parts) -> dict[str, Callable]:
    """The peers that can be imported here, by the name of their row."""
    rows = {
        "Ignite (create_supervised_trainer)": ("ignite", lambda: ignite(parts)),
        "skorch (callbacks off)": ("skorch", lambda: skorch(parts)),
        "Accelerate (hand-written loop)": ("accelerate", lambda: accelerate(parts)),
        "Lightning, all off": ("pytorch_lightning", lambda: lightning(parts, "bare")),
        "Lightning defaults": ("pytorch_lightning", lambda: lightning(parts, "defaults")),
        "Lightning defaults + metric + log": ("pytorch_lightning", lambda: lightning(parts, "metric")),
    }
    return {name: make() for name, (package, make) in rows.items() if importlib.util.find_spec(package)}
