"""What others build on stays as it is recorded: order of events, records, files; what was written once, still runs.

The public names and signatures are in ``tests/api.txt`` (test_package.py), checkpoints of each release in
``tests/golden`` (test_migrations.py), and what is called otherwise in ``loopwright.renamed`` (test_upgrade.py).
"""

from __future__ import annotations

import ast
import enum
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright as lw
from api import public, surface
from loopwright.loggers import read_jsonl
from loopwright.renamed import RENAMED
from tiny import classifier, loader, recorder, trainer

ROOT = Path(__file__).parent.parent
CONTRACT = ROOT / "tests" / "contract.txt"
KEPT = sorted((ROOT / "tests" / "golden").glob("*/examples/*.py"))


class Two(lw.Task):
    """Two phases with an optimizer each, and a value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def training_step(self, batch: Any) -> Any:
        logits = self.net(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        return {"loss": loss, "margin": logits.detach().amax(), "preds": logits, "target": batch[1]}

    def configure_optimizers(self) -> Any:
        body, head = self.net[0], self.net[2]
        rate = lw.schedules.cosine(0.1, 0.0)
        return {
            "body": (torch.optim.SGD(body.parameters(), lr=0.1, weight_decay=0.1), {"lr": rate, "weight_decay": 0.2}),
            "head": torch.optim.SGD(head.parameters(), lr=0.2),
        }

    def configure_metrics(self) -> Any:
        return {"accuracy": lw.metrics.Accuracy(), "f1": lw.metrics.F1(3, average=None)}

    def phases(self) -> Any:
        return [lw.Phase("a", self.training_step, optimizers="body"), lw.Phase("b", self.training_step, "head")]


def one() -> lw.Supervised:
    net = classifier()
    return lw.Supervised(
        net, torch.nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1),
        metrics={"accuracy": lw.metrics.Accuracy()},
    )  # fmt: skip


def contract(folder: Path) -> Iterator[str]:
    """One line for each thing that others may rely on."""
    seen: list[str] = []
    data = loader(12, batch_size=4)
    test = lw.Trainer(folder=None, progress=False, callbacks=[recorder(seen)])
    user = lw.Trainer(
        folder=folder, name="one", progress=False, accumulate=2, log_every="1 epoch",
        callbacks=[recorder(seen), lw.Throughput(1)], checkpoint=lw.Checkpoint(monitor="valid/loss"),
    )  # fmt: skip
    task = one()
    run = user.fit(task, data, data, stages=[lw.Stage("first", "1 epoch"), lw.Stage("second", "1 step")])
    yield from told("events of a fit with two stages, accumulation and validation", seen)
    test.test(task, data)
    yield from told("events of a test", seen)
    test.predict(task, data)
    yield from told("events of a prediction", seen)
    with pytest.warns(lw.errors.LoopwrightWarning, match="map_loss is never called"), pytest.raises(ZeroDivisionError):
        trainer(epochs=1, callbacks=[recorder(seen)]).run(lambda run, batch: 1 / 0, [1])
    yield from told("events of a step that raises", seen)
    trainer(steps=1, callbacks=[recorder(seen)]).fit(Two(), data)
    yield from told("events of a step with two phases", seen)
    yield from records("one phase, two stages, a rate from a callback", run)
    later = lw.Trainer(steps=4, folder=folder, name="two", progress=False, log_every=2, checkpoint=False)
    later.on(lw.Event.STEP_END)(lambda run: run.log({"mine": 1.0}))
    yield from records("two phases, two sets, a value logged", later.fit(Two(), data, {"x": data, "y": data}))
    assert run.folder is not None
    yield "files of a run"
    for path in sorted(path for path in run.folder.rglob("*") if path.is_file()):
        name = path.relative_to(run.folder).as_posix()
        yield f"    {name}"
        if name in ("run.json", "checkpoints/index.json") or name.endswith("manifest.json"):
            yield from (f"        {line}" for line in shape(json.loads(path.read_text(encoding="utf-8"))))


def told(title: str, seen: list[str]) -> Iterator[str]:
    yield title
    yield from (f"    {name}" for name in seen)
    seen.clear()


def records(title: str, run: lw.Run) -> Iterator[str]:
    """Names and types of each kind of record, in a file and in the history."""
    assert run.folder is not None
    kinds: dict[str, dict[str, str]] = {}
    for record in read_jsonl(run.folder / "metrics.jsonl"):
        kinds.setdefault(f"metrics.jsonl, {record['kind']}", {}).update(
            {k: type(v).__name__ for k, v in record.items()}
        )
    for record in run.history:
        kinds.setdefault("run.history", {}).update({k: type(v).__name__ for k, v in record.items()})
    kinds["run.metrics"] = {k: type(v).__name__ for k, v in run.metrics.items()}
    kinds["run.history.losses"] = {k: type(v).__name__ for k, v in run.history.losses.items()}
    yield f"records: {title}"
    for kind, names in kinds.items():
        yield f"    {kind}: " + ", ".join(f"{name} {of}" for name, of in names.items())


def types(values: Any) -> dict[str, str]:
    return {name: type(value).__name__ for name, value in values.items()}


def shape(value: Any) -> Iterator[str]:
    """Keys and types of a JSON object; what depends on the machine only as the type that it has."""
    for key, held in value.items():
        name = re.sub(r"[0-9a-f]{8,}", "...", key)
        if isinstance(held, dict) and key in ("progress", "metrics", "files", "others"):
            yield f"{name}: " + ", ".join(sorted(map(str, held)))
        elif key in ("git", "source", "seed", "identity"):  # which there may be or not
            yield name
        else:
            yield f"{name}: {type(held).__name__}"


@pytest.mark.capability("B-29")
def test_events_records_and_files_are_the_recorded_ones(tmp_path: Path) -> None:
    """The order of events, the names and types in each kind of record, and the files of a run are recorded."""
    now = [line.rstrip() for line in contract(tmp_path)]
    if os.environ.get("LW_UPDATE_API"):
        CONTRACT.write_text("\n".join(now) + "\n", encoding="utf-8")
    recorded = CONTRACT.read_text(encoding="utf-8").splitlines() if CONTRACT.exists() else []
    assert now == recorded, (
        "what others build on has changed: say so in CHANGELOG.md, then record it with "
        "`LW_UPDATE_API=1 pytest tests/test_contract.py`"
    )


@pytest.mark.capability("B-29")
@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.parent.name}/{path.stem}")
def test_an_example_of_an_older_release_still_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples of each release, kept as they were, run without a warning."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(f"kept_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(epochs=1)
    assert capsys.readouterr().out


def test_each_release_keeps_its_examples() -> None:
    releases = {
        path.name for path in (ROOT / "tests" / "golden").iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
    }
    assert {path.parent.parent.name for path in KEPT} == releases == {path.parent.name for path in SURFACES}


# the surface of 0.1.0 is that of the commit before the first name in loopwright.renamed was called otherwise
SURFACES = sorted((ROOT / "tests" / "golden").glob("*/api.txt"))


def promised(lines: Iterable[str]) -> dict[str, set[str]]:
    """Every public name and member that ``tools/api.py`` has recorded, with its arguments."""
    found: dict[str, set[str]] = {}
    owner = ""
    for line in lines:
        inside, name, sign, rest = re.fullmatch(r"( *)(?:class )?([\w.]+)(\(|: )(.*)", line).groups()  # type: ignore[union-attr]
        owner = owner if inside else name
        found[f"{owner}.{name}" if inside else name] = arguments(rest) if sign == "(" else set()
    return found


def arguments(text: str) -> set[str]:
    """Names of the arguments in a signature, which begins after its first bracket."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return {re.split("[:=]", part)[0].strip(" *") for part in parts} - {"", "/", "..."}


def test_what_a_signature_takes_is_read() -> None:
    now = promised(surface(lw))
    for name, thing in public(lw):
        if callable(thing) and not (inspect.isclass(thing) and issubclass(thing, (enum.Enum, BaseException))):
            assert now[name] == {*inspect.signature(thing).parameters}
    assert now["Trainer.run"] == {"self", "step", "data", "state", "weight", "resume"}
    assert "Event.STEP_END" in now


@pytest.mark.capability("B-29")
@pytest.mark.parametrize("path", SURFACES, ids=lambda path: path.parent.name)
def test_every_public_name_of_an_older_release_is_there(path: Path) -> None:
    """All that was public in an older release, names, members and arguments, is there or told where it is now."""
    now = promised(surface(lw))
    for name, wanted in promised(path.read_text(encoding="utf-8").splitlines()).items():
        old = next((old for old in RENAMED if f"{name}.".startswith(f"{old}.")), "")
        current = RENAMED[old].to + name.removeprefix(old) if old else name
        assert current in now, f"{name} is gone: CONTRIBUTING.md says how to call it otherwise"
        assert wanted <= now[current], f"{name} has lost {wanted - now[current]}"


def deprecated(text: str) -> Iterator[str]:
    """Names of the functions and classes of a module that warn of a deprecation."""
    for node in ast.walk(ast.parse(text)) if "eprecat" in text else ():
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            calls = [ast.unparse(n) for n in ast.walk(node) if isinstance(n, ast.Call)]
            if any(re.match(r"(\w+\.)*(warn\(.*Deprecat|deprecated\()", call, re.DOTALL) for call in calls):
                yield node.name


def test_a_deprecation_is_found() -> None:
    warns = "def old():\n    warnings.warn('use new', DeprecationWarning, stacklevel=2)\n"
    assert list(deprecated(warns)) == ["old"]
    assert list(deprecated("@deprecated('use new')\nclass Old: ...\n")) == ["Old"]


@pytest.mark.capability("B-29")
def test_each_deprecation_ships_with_a_codemod() -> None:
    """Nothing is deprecated but by the table of loopwright.renamed, by which `loopwright upgrade` rewrites code."""
    names = {name for path in (ROOT / "src").rglob("*.py") for name in deprecated(path.read_text(encoding="utf-8"))}
    assert names == set()
