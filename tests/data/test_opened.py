"""A DataModule is opened for what it is asked for; other data is what it is."""

from __future__ import annotations

from typing import Any

import pytest

from loopwright.data import DataModule, opened
from loopwright.errors import DataError, SettingError
from loopwright.parallel import Single


class Notes(DataModule):
    def __init__(self) -> None:
        self.did: list[str] = []

    def prepare_data(self) -> None:
        self.did.append("prepared")

    def setup(self) -> None:
        self.did.append("set up")

    def train_data(self) -> Any:
        return [1, 2]


def test_a_module_is_prepared_and_set_up_before_its_data_is_asked_for() -> None:
    module = Notes()
    assert opened(module, "train", Single()) == [1, 2]
    assert module.did == ["prepared", "set up"]
    assert opened(module, "valid", Single()) is None
    with pytest.raises(DataError, match=r"^Notes\.test_data\(\) gave None; define it"):
        opened(module, "test", Single())


def test_other_data_passes_as_it_is() -> None:
    data = [1, 2]
    assert opened(data, "train", Single()) is data


def test_a_method_that_asks_for_what_it_is_not_given_is_told_how_to_be_written() -> None:
    class Staged(Notes):
        def setup(self, stage: str) -> None:  # type: ignore[override]
            self.did.append(stage)

    module = Staged()
    with pytest.raises(SettingError) as caught:
        opened(module, "train", Single())
    assert str(caught.value) == (
        "Staged.setup() is called without arguments: missing a required argument: 'stage'; write: def setup(self)"
    )
    assert module.did == []
