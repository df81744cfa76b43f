"""What the data of training was made of: kept in checkpoints, and compared with what a model is given later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loopwright.data.named import Columns, check_columns, columns_of, without_names
from loopwright.data.schema import Schema
from loopwright.errors import CheckpointError
from loopwright.state import Run
from loopwright.written import warn

__all__ = ["TrainedOn"]

_SHOWN = 20  # names of columns that a warning lists
_NAME = "_trained_on"  # of what a module remembers; plain data, so that it can be pickled and read without this package


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """``schema`` of the batches (None if no batch was read) and ``columns`` of the tables that they came from."""

    schema: Schema | None = None
    columns: Mapping[str, Columns] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> TrainedOn:
        """What ``run`` trains on."""
        return cls(run.schema, columns_of(run.stages[0].source) if run.stages else {})

    @classmethod
    def remembered(cls, modules: Iterable[Any]) -> TrainedOn | None:
        """What the first of ``modules`` that remembers it was trained on; None if none does."""
        kept = next((vars(one)[_NAME] for one in modules if _NAME in vars(one)), None)
        return None if kept is None else cls.from_dict(kept)

    @staticmethod
    def forget(modules: Iterable[Any]) -> None:
        """Let ``modules`` be trained on other data."""
        for one in modules:
            vars(one).pop(_NAME, None)

    @classmethod
    def leave(cls, run: Run) -> None:
        """Let the module that ``run`` has trained remember it: a copy of it, pickled too, and another task around it.

        It is the one that ``load_weights`` fills from a whole checkpoint; of several named otherwise, it is the task.
        """
        models = run.models
        one = models["model"] if "model" in models else next(iter(models.values())) if len(models) == 1 else run.task
        if isinstance(run.task, nn.Module):  # else a step did all the work, with batches of its own kind
            cls.of(run).remember(one)

    def remember(self, module: nn.Module) -> None:
        """Note it on ``module``, whose weights come from there."""
        vars(module)[_NAME] = self.as_dict()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": None if self.schema is None else self.schema.as_dict(), "columns": dict(self.columns)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TrainedOn:
        """What ``as_dict`` described, and ``data`` in the state of a checkpoint, which may be older than columns.

        Raises CheckpointError if it is none.
        """
        try:
            schema = None if saved["schema"] is None else Schema.from_dict(saved["schema"])
            tables = saved.get("columns", {}).items()
            columns = {path: [(name, str(kind)) for name, kind in one] for path, one in tables}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"what the checkpoint says of the data of its training cannot be read ({type(error).__name__}: {error})"
            ) from error
        return cls(schema, columns)

    def check(self, data: Any, kind: str) -> None:
        """Raise DataError if the tables in ``data`` have other columns; batches are compared as they are read.

        Columns that had names in training, and have none here, are a warning.
        """
        check_columns(self.columns, data, kind)
        for where, names in without_names(self.columns, data).items():
            listed = ", ".join(map(str, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)
            warn(f"the columns of the {kind} data{where} have no names; taken in the order of training: {listed}")
