"""How a user says what to train: a Task to subclass, or Supervised around a plain module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loopwright.data import chunked
from loopwright.errors import SettingError, StepOutputError, choose, elsewhere
from loopwright.events import describe
from loopwright.given import not_callable_with
from loopwright.metrics.check import check_metrics
from loopwright.state import Phase, has_state
from loopwright.text import with_article
from loopwright.written import caller, warn

__all__ = ["StepTask", "Supervised", "Task"]

_ELEMENTWISE = (  # losses of torch in which an output is compared with one target
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
    nn.functional.mse_loss, nn.functional.l1_loss, nn.functional.smooth_l1_loss, nn.functional.huber_loss,
    nn.functional.binary_cross_entropy, nn.functional.binary_cross_entropy_with_logits,
)  # fmt: skip
Select = str | int | Sequence[str | int] | Callable[[Any], Any] | None


class Task(nn.Module):
    """What to train, in one readable class: an ``nn.Module`` whose methods say what happens to a batch.

    Steps return the loss, or a dict: ``loss`` is what is trained on, other scalars are logged, and tensors such as
    ``preds`` and ``target`` feed metrics and callbacks. A step knows nothing of devices, precision or logging.

    >>> class Line(Task):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.Linear(1, 1)
    ...     def training_step(self, batch):
    ...         x, y = batch
    ...         return nn.functional.mse_loss(self.net(x), y)
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """

    truncate: int | None = None
    """Steps of a sequence through which gradients go back: truncated back-propagation through time.

    Each batch is cut into pieces of so many steps along dimension 1, and each piece is an optimizer step of its own.
    ``training_step(self, batch, carry=None)`` returns ``{"loss": ..., "carry": h}``; ``carry`` is that of the piece
    before, detached, or None where a sequence begins. Validation sees whole sequences.
    """

    recorded: Mapping[str, str] = {}
    """Where the values that steps return are to be seen, for those that are not to be seen everywhere.

    Unless something else is said, each is in the records of the steps, as the mean since the last one, in the record
    of its epoch, as the mean over it, and in the progress bar as far as there is room. ``{"kl": "epoch",
    "noise": "step", "accuracy": "step epoch bar"}`` says where alone it is; with "bar" it is shown while an epoch goes
    on as well.
    """

    def chunks(self, batch: Any) -> Iterable[Any]:
        """The pieces of a batch under ``truncate``; override it for data whose time is not dimension 1."""
        assert self.truncate is not None
        return chunked(batch, self.truncate)

    def training_step(self, batch: Any) -> Any:
        """The loss of a batch, or a dict with ``loss``; required unless ``phases`` is overridden."""
        raise SettingError(
            f"{type(self).__name__} has no training_step; write: def training_step(self, batch): ... return loss"
        )

    def validation_step(self, batch: Any) -> Any:
        """What to measure on a batch of validation; by default the training step."""
        return self.training_step(batch)

    def test_step(self, batch: Any) -> Any:
        """What to measure on a batch of a test; by default the validation step."""
        return self.validation_step(batch)

    def predict_step(self, batch: Any) -> Any:
        """The predictions for a batch; by default ``forward``."""
        return self(batch)

    def configure_optimizers(self) -> Any:
        """An optimizer, ``(optimizer, schedule)``, or a dict of name to either."""
        raise SettingError(
            f"{type(self).__name__} has no configure_optimizers; write: def configure_optimizers(self): "
            "return torch.optim.AdamW(self.parameters(), lr=1e-3)"
        )

    def configure_metrics(self) -> dict[str, Any]:
        """Metrics by name; each is made anew for training, validation and test."""
        return {}

    def phases(self) -> list[Phase]:
        """The objectives of an optimizer step; override it for several, such as a GAN's two."""
        return [Phase("main", self.training_step)]

    def models(self) -> dict[str, nn.Module]:
        """The modules whose weights a checkpoint holds, by name."""
        return {"model": self}

    def __getstate__(self) -> dict[str, Any]:
        # the run that trained this task stays behind, and its compiled steps: a copy is another task, which starts anew
        return {name: value for name, value in self.__dict__.items() if name not in ("_run", "_compiled", "_compared")}

    def replace(self, name: str, obj: Any) -> None:
        """Put ``obj`` in the place of the child ``name``, as ``run.replace("model.<name>", obj)`` asks for."""
        if name in ("model", "loss") and not hasattr(self, name):
            raise SettingError(
                f"{type(self).__name__} has no {name!r} of its own; name the child to replace, such as "
                f"run.replace('model.{next((n for n, _ in self.named_children()), 'net')}', new)"
            )
        setattr(self, name, obj)


class Supervised(Task):
    """A plain module, a loss and an optimizer as a task.

    ``loss(preds, target)`` returns a scalar, or a dict of ``loss`` and other scalars to log, whose names it has as
    ``terms`` (see ``lw.losses.Weighted``); without one, the module's own ``loss`` output is taken, else cross
    entropy for integer targets and mean squared error for floating ones. ``optimizer`` is an instance or a factory
    ``params -> Optimizer``; ``schedule`` a torch scheduler, a factory ``optimizer -> scheduler``, or
    ``lw.per_step(...)``. A batch is ``(input, ..., target)``; ``inputs`` and ``targets`` choose otherwise, by key, by
    position, by a list of these (keys are passed as keywords), or by a function of the batch. With ``targets`` alone,
    by key or position, the rest of the batch is the input.

    ``truncate=10`` is truncated back-propagation through time (``Task.truncate``): the module is called as
    ``module(input, carry)`` and returns ``(preds, carry)``, as torch's RNN, LSTM and GRU do with ``batch_first``.

    A step's output holds ``loss``, ``preds`` (what the module returned) and ``target``.

    >>> net = nn.Linear(4, 2)
    >>> task = Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    >>> sorted(task.training_step((torch.zeros(3, 4), torch.tensor([0, 1, 1]))))
    ['loss', 'preds', 'target']
    """

    @elsewhere(criterion="loss", loss_fn="loss", lr_scheduler="schedule", scheduler="schedule")
    def __init__(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor] | None = None,
        optimizer: Any = None,
        *,
        schedule: Any = None,
        metrics: Mapping[str, Any] | None = None,
        inputs: Select = None,
        targets: Select = None,
        truncate: int | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise SettingError(f"Supervised needs an nn.Module; got {describe(module)}")
        if loss is not None and not callable(loss):
            raise SettingError(
                f"loss={loss!r} cannot be called; pass a function or module, such as nn.CrossEntropyLoss()"
            )
        if isinstance(loss, type):
            raise SettingError(f"loss={loss.__name__} is a class; make an instance: {loss.__name__}()")
        super().__init__()
        self.truncate = truncate
        self.module = module
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        if metrics is not None and not callable(getattr(metrics, "keys", None)):  # of a metric it is no method
            check_metrics(metrics)  # raises: a dict is needed
        self.metrics = dict(metrics or {})
        self.inputs, self.targets = inputs, targets
        self._made_at = caller()  # for problems that are found later

    def training_step(self, batch: Any, carry: Any = None) -> dict[str, Any]:
        """Loss, predictions and target of a batch; with ``truncate`` what is to be carried as well."""
        own = self.__dict__  # looked up directly: nn.Module's own look-up costs half a microsecond each time
        modules = own["_modules"]
        loss_of = modules["loss"] if "loss" in modules else own["loss"]
        chosen = own["inputs"] is not None or own["targets"] is not None or own["truncate"] is not None
        if chosen or loss_of is None or type(batch) not in (list, tuple) or len(batch) != 2:
            return self._any_step(batch, loss_of, carry)
        inputs, target = batch
        preds = modules["module"](inputs)
        loss = loss_of(preds, target) if "_compared" in own else self._first_loss(loss_of, preds, target)
        if type(loss) is dict:
            return {**loss, "preds": preds, "target": target}
        return {"loss": loss, "preds": preds, "target": target}

    def _any_step(self, batch: Any, loss_of: Callable[..., Tensor] | None, carry: Any) -> dict[str, Any]:
        pick = _picker(self.inputs, "inputs")
        if pick is None and loss_of is not None and isinstance(self.targets, (str, int)):
            args, kwargs = _arguments(_without(batch, self.targets), None, has_target=False)
        else:
            args, kwargs = _arguments(batch, pick, has_target=self.targets is None)
        more = {}
        if self.truncate is None:
            preds = self.module(*args, **kwargs)
        else:
            preds, more["carry"] = self._with_carry(args, kwargs, carry)
        loss = _own_loss(preds) if loss_of is None else None
        pick_target = _picker(self.targets, "targets")
        target = _target(batch, needed=loss is None) if pick_target is None else pick_target(batch)
        if loss is None:
            loss = self._first_loss(loss_of or pick_loss(preds, target), preds, target)
        found = loss if type(loss) is dict else {"loss": loss}
        return {**found, "preds": preds, "target": target, **more}

    def _first_loss(self, loss_of: Callable[..., Any], preds: Any, target: Any) -> Any:
        """The loss; of the first batch, that it compares each of the predictions with its own target."""
        if "_compared" in self.__dict__ or torch.compiler.is_compiling():
            return loss_of(preds, target)
        self.__dict__["_compared"] = True
        told = _crossed(preds, target)
        if told is None:
            return loss_of(preds, target)
        if loss_of in _ELEMENTWISE or type(loss_of) in _ELEMENTWISE:
            raise SettingError(told)
        with _Comparing(preds, target) as comparing:
            loss = loss_of(preds, target)
        if comparing.crossed:
            warn(f"{told}. If that is meant, all is well")
        return loss

    def _with_carry(self, args: tuple[Any, ...], kwargs: dict[str, Any], carry: Any) -> tuple[Any, Any]:
        returned = self.module(*args, carry, **kwargs)
        if isinstance(returned, tuple) and len(returned) == 2:
            return returned[0], returned[1]
        raise StepOutputError(
            f"with truncate= a module returns (preds, carry), as torch's RNN, LSTM and GRU do; "
            f"{type(self.module).__name__} returned {describe(returned)}"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self.module(*args, **kwargs)

    def predict_step(self, batch: Any) -> Any:
        """The module's output for a batch of inputs, or of inputs and targets (which are left out)."""
        paired = isinstance(batch, (list, tuple)) and len(batch) > 1
        args, kwargs = _arguments(batch, _picker(self.inputs, "inputs"), has_target=paired)
        return self.module(*args, **kwargs) if self.truncate is None else self._with_carry(args, kwargs, None)[0]

    def configure_optimizers(self) -> Any:
        if self.optimizer is None:
            raise SettingError(
                "Supervised has no optimizer to train with; pass one: "
                "optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3)"
            )
        return (self.optimizer, self.schedule)

    def configure_metrics(self) -> dict[str, Any]:
        return self.metrics

    def models(self) -> dict[str, nn.Module]:
        loss = self.loss
        has_state = isinstance(loss, nn.Module) and bool(loss.state_dict())
        return {"model": self.module, "loss": loss} if has_state else {"model": self.module}  # type: ignore[dict-item]

    def replace(self, name: str, obj: Any) -> None:
        if name not in ("model", "module", "loss"):
            raise SettingError(f"Supervised has no {name!r} to replace. {choose(name, ['model', 'loss'])}")
        name = "loss" if name == "loss" else "module"
        delattr(self, name)  # a module can take the place of a function, and a function that of a module
        setattr(self, name, obj)


def pick_loss(preds: Any, target: Any) -> Callable[[Any, Any], Tensor]:
    """Cross entropy for integer class targets, mean squared error for floating targets of the same shape.

    Raises SettingError where neither fits.

    >>> pick_loss(torch.zeros(3, 2), torch.tensor([0, 1, 1])).__name__
    'cross_entropy'
    """
    if isinstance(preds, Tensor) and isinstance(target, Tensor):
        if not target.is_floating_point() and preds.dim() == target.dim() + 1:
            return nn.functional.cross_entropy
        if target.is_floating_point() and preds.shape == target.shape:
            return nn.functional.mse_loss
    raise SettingError(
        f"no loss was given, and none can be chosen for preds {describe(preds)} and target {describe(target)}; "
        "pass loss=..., a function of (preds, target)"
    )


def _crossed(preds: Any, target: Any) -> str | None:
    """What to say where one is a column and the other is not, so that each of one would meet all of the other.

    >>> _crossed(torch.zeros(3, 1), torch.zeros(3, 1)) is _crossed(torch.zeros(3, 2), torch.zeros(3)) is None
    True
    """
    if not (isinstance(preds, Tensor) and isinstance(target, Tensor)) or preds.numel() < 2:
        return None
    column, n = (preds, preds.numel()) if preds.dim() == 2 else (target, target.numel())
    if {tuple(preds.shape), tuple(target.shape)} != {(n, 1), (n,)}:
        return None
    change = "preds.squeeze(1), target" if column is preds else "preds, target.squeeze(1)"
    return (
        f"outputs {list(preds.shape)} and targets {list(target.shape)} are broadcast to [{n}, {n}], each output "
        f"compared with every target; write loss=lambda preds, target: your_loss({change})"
    )


class _Comparing(TorchFunctionMode):
    """Looks whether one operation of torch takes both tensors as they are, and makes a square of them."""

    def __init__(self, preds: Tensor, target: Tensor) -> None:
        super().__init__()
        self.both, self.crossed = (preds, target), False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, n = (*args, *(kwargs or {}).values()), len(self.both[0])
        found = func(*args, **(kwargs or {}))
        if all(any(one is wanted for one in given) for wanted in self.both):
            self.crossed |= func in _ELEMENTWISE or tuple(getattr(found, "shape", ())) == (n, n)
        return found


def _own_loss(preds: Any) -> Any:
    return preds.get("loss") if isinstance(preds, Mapping) else getattr(preds, "loss", None)


def _picker(select: Select, name: str) -> Callable[[Any], Any] | None:
    if select is None or callable(select):
        return select
    if isinstance(select, (str, int)):
        return lambda batch: _get(batch, select, name)
    keys = list(select)
    if all(isinstance(key, str) for key in keys):
        return lambda batch: {key: _get(batch, key, name) for key in keys}
    return lambda batch: tuple(_get(batch, key, name) for key in keys)


def _get(batch: Any, key: str | int, name: str) -> Any:
    _check_named(batch, key, name)
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        known = batch.keys() if isinstance(batch, Mapping) else range(len(batch)) if hasattr(batch, "__len__") else ()
        raise StepOutputError(f"{name}={key!r} is not in the batch {describe(batch)}. {choose(key, known)}") from None


def _check_named(batch: Any, key: str | int, name: str) -> None:
    if isinstance(key, str) and isinstance(batch, (Tensor, list, tuple)):
        raise StepOutputError(
            f"{name}={key!r} asks for a part by its name, and the batch {describe(batch)} has none: names of columns "
            "do not come with it. Give arrays as a tuple, (X, y), of a data frame (frame.drop(columns=['y']), "
            "frame['y']); or as a dict, {'x': X, 'y': y}, with inputs='x', targets='y'; or choose by a function of the "
            "batch"
        )


def _arguments(
    batch: Any, pick: Callable[[Any], Any] | None, *, has_target: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the module is called with."""
    if pick is not None:
        picked = pick(batch)
        if isinstance(picked, dict):
            return (), picked
        return (picked if isinstance(picked, tuple) else (picked,)), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (list, tuple)):
        return tuple(batch[:-1] if has_target and len(batch) > 1 else batch), {}
    return (batch,), {}


def _without(batch: Any, key: str | int) -> Any:
    """The batch but for its target; a batch that is nothing else stays whole."""
    _check_named(batch, key, "targets")
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != key} or batch
    if isinstance(batch, (list, tuple)) and isinstance(key, int) and len(batch) > 1:
        return [value for i, value in enumerate(batch) if i != key % len(batch)]
    return batch


def _target(batch: Any, *, needed: bool) -> Any:
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        return batch[-1]
    if isinstance(batch, Mapping):
        return next((batch[key] for key in ("labels", "label", "target", "y") if key in batch), None)
    if not needed:
        return None
    raise StepOutputError(
        f"a batch {describe(batch)} has no target; Supervised expects (input, target). Choose with inputs= and "
        "targets=, such as targets=lambda batch: batch for an autoencoder. A list is ready batches; arrays go as a "
        "tuple: (X, y)"
    )


class StepTask:
    """A function ``step(run, batch)`` as a task: what ``Trainer.run`` trains. It moves its optimizers itself.

    ``state`` holds the objects that checkpoints keep: anything with ``state_dict`` and ``load_state_dict``, or a pair
    ``(get, set)`` of functions. Raises SettingError for anything else.

    >>> StepTask(lambda run, batch: None, {"net": nn.Linear(1, 1)}).models()
    {'net': Linear(in_features=1, out_features=1, bias=True)}
    """

    def __init__(self, step: Callable[[Any, Any], Any], state: Mapping[str, Any] | None = None) -> None:
        if isinstance(step, Task):
            raise SettingError(
                f"{type(step).__name__} is a task, and no function step(run, batch); call trainer.fit(task, ...)"
            )
        if not callable(step):
            raise SettingError(f"step={step!r} cannot be called; pass a function step(run, batch)")
        name = getattr(step, "__name__", type(step).__name__)
        if (why := not_callable_with(step, "run", "batch")) is not None:
            raise SettingError(f"step={name}{why}. Write: def step(run, batch): ...")
        if state is not None and not isinstance(state, Mapping):
            raise SettingError(
                f"state={describe(state)}: expected a dict of the objects that checkpoints keep, by name, such as "
                'state={"net": net, "opt": opt}'
            )
        self.step, self.given, self.state = step, state, dict(state or {})
        unnamed = (
            "state= was not given, so that a checkpoint holds nothing of what the step function changes: name it, "
            'trainer.run(step, data, state={"net": net, "opt": opt}), or say that there is nothing, state={}'
        )
        self.inexact = [unnamed] if state is None else []
        self.run: Any = None
        for name, obj in self.state.items():
            pair = isinstance(obj, tuple) and len(obj) == 2 and all(callable(part) for part in obj)
            if not pair and not has_state(obj):
                raise SettingError(
                    f"state[{name!r}] is {with_article(type(obj).__name__)}, which has no state_dict; pass a pair "
                    f"of functions instead: state={{{name!r}: (get, set)}}, where set(get()) puts the object back"
                )

    def validation_step(self, batch: Any) -> Any:
        raise SettingError("Trainer.run has no validation of its own; call trainer.validate(...) in a handler")

    def phases(self) -> list[Phase]:
        """One phase without optimizers: the step does all the work."""
        step, task = self.step, self

        def call(batch: Any) -> Any:
            return step(task.run, batch)

        call.__qualname__ = getattr(step, "__qualname__", type(step).__name__)  # by which explain tells it
        return [Phase("main", call, optimizers=())]

    def models(self) -> dict[str, nn.Module]:
        """The modules among the state."""
        return {name: obj for name, obj in self.state.items() if isinstance(obj, nn.Module)}

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers among the state; the loop only reads their learning rates and saves them."""
        return {name: obj for name, obj in self.state.items() if isinstance(obj, torch.optim.Optimizer)}

    def configure_metrics(self) -> dict[str, Any]:
        return {}
