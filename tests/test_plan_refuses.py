"""The plan refuses what cannot work, with file and line, before a batch is read; and refuses nothing that works."""

from __future__ import annotations

import re
import runpy
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch.optim import lr_scheduler as sched

import loopwright as lw
from tiny import line, pairs, sgd_task, trainer

HEAD = """
import copy, functools
import torch
from torch import nn
from torch.optim import lr_scheduler as sched
from torch.utils.checkpoint import checkpoint
import loopwright as lw

reads = []
class Read(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        reads.append(i)
        return torch.ones(2), torch.tensor(i % 2)

data = torch.utils.data.DataLoader(Read(), batch_size=2)
valid = [(torch.ones(2, 2), torch.tensor([0, 1]))]
net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
quiet = dict(folder=None, progress=False)
ce = nn.functional.cross_entropy

def rises(*names):
    return [lw.EarlyStopping(name, mode="max", patience=9) for name in names]

def fit(task, valid=None, stages=None, callbacks=(), handlers=(), **settings):
    if stages is None:
        settings.setdefault("epochs", 2)
    trainer = lw.Trainer(callbacks=callbacks, **quiet, **settings)
    for event, handler in handlers:
        trainer.on(event)(handler)
    return trainer.fit(task, data, valid, stages=stages)

def make(schedule=None, optimizer=None, loss=None, **more):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1) if optimizer is None else optimizer
    return lw.Supervised(net, loss or nn.CrossEntropyLoss(), optimizer, schedule=schedule, **more)

class Own(lw.Task):
    def __init__(self):
        super().__init__()
        self.net = net
    def training_step(self, batch):
        return {"loss": ce(self.net(batch[0]), batch[1])}
    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)
"""

# what is written below HEAD, the line that is to be named marked by "# here"; a part of what is told, the fix in it
MISTAKES = {
    "monitored: a metric of training that reads nothing of what the step returns": ("""
class Bare(Own):
    def configure_metrics(self):
        return {"accuracy": lw.metrics.Accuracy()}

trainer = lw.Trainer(epochs=1, callbacks=[lw.EarlyStopping("train/accuracy")], **quiet)  # here
trainer.fit(Bare(), data)
""", "EarlyStopping monitors 'train/accuracy', which nothing produces. Known: 'train/loss'."),
    "monitored: a validation that another stage has": ("""
stages = [
    lw.Stage("a", ["2 epochs", lw.Plateau("valid/loss")]),  # here
    lw.Stage("b", "1 epoch", valid=valid),
]
lw.Trainer(**quiet).fit(make(), data, stages=stages)
""", "Plateau monitors 'valid/loss', but there is no validation; pass fit(..., valid=loader) or monitor 'train/loss'"),
    "monitored: the rate of an optimizer that does not exist": ("""
trainer = lw.Trainer(epochs=1, callbacks=[lw.EarlyStopping("lr/gen", mode="min")], **quiet)  # here
trainer.fit(make(), data)
""", "EarlyStopping monitors 'lr/gen', which is no learning rate. Known: 'lr'."),
    "schedule: a place beyond the end": ("""
sgd = torch.optim.SGD(net.parameters(), lr=0.1)
warm = lw.schedules.warmup(lw.schedules.cosine(0.1, 0.0), "500 steps")
job = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=warm)  # here
lw.Trainer(epochs=2, **quiet).fit(job, data)
""", "'500 steps' is longer than the whole in which it lies; make it shorter, or give a fraction"),
    "schedule: one for steps within another": ("""
def both(o):
    return sched.SequentialLR(o, [sched.LinearLR(o, 0.1, total_iters=2), sched.CosineAnnealingLR(o, T_max=6)], [2])

sgd = torch.optim.SGD(net.parameters(), lr=0.1)
job = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=both)  # here
lw.Trainer(epochs=2, **quiet).fit(job, data)
""", "SequentialLR was made for 8 in all, the steps of this run, but is stepped once an epoch; wrap it, "
     "lw.per_step(scheduler), or make it for 2"),
    "schedule: one for batches where a step takes several": ("""
sgd = torch.optim.SGD(net.parameters(), lr=0.1)
cycle = lambda o: sched.OneCycleLR(o, 0.1, epochs=2, steps_per_epoch=4)
job = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=cycle)  # here
lw.Trainer(epochs=2, accumulate=2, **quiet).fit(job, data)
""", "OneCycleLR was made for total_steps=8, the batches of this run, but is stepped with the optimizers: 4 times with "
     "accumulate=2. Make it with total_steps=4"),
    "schedule: one that ends before the last of its stages": ("""
sgd = torch.optim.SGD(net.parameters(), lr=0.1)
cycle = lambda o: sched.OneCycleLR(o, 0.1, total_steps=8)
job = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=cycle)  # here
lw.Trainer(**quiet).fit(job, data, stages=[lw.Stage("a", "2 epochs"), lw.Stage("b", "1 epoch")])
""", "OneCycleLR was made for 8 steps, and goes through 2 stages that take 12; make it with total_steps=12"),
    "parameters: an optimizer of a stage beside the one of fit": ("""
class Named(Own):
    def configure_optimizers(self):
        return {"sgd": torch.optim.SGD(self.net.parameters(), lr=0.1)}

stages = [
    lw.Stage("a", "1 epoch", optimizer=torch.optim.Adam(net.parameters())),  # here
]
lw.Trainer(**quiet).fit(Named(), data, stages=stages)
""", "net.0.weight is moved by two optimizers in stage 'a'; give each parameter to one of them, or let the one of the "
     "stage take another's place by its name: optimizer={'sgd': ...}"),
    "parameters: a generator in the optimizer of its critic": ("""
class Gan(lw.Task):
    def __init__(self):
        super().__init__()
        self.g, self.d = nn.Linear(2, 2), nn.Linear(2, 1)
    def step(self, batch):
        return self.d(self.g(batch[0])).mean()
    def phases(self):
        return [lw.Phase("d", self.step, optimizers="d"), lw.Phase("g", self.step, optimizers="g")]
    def configure_optimizers(self):  # here
        return {"d": torch.optim.Adam(self.parameters()), "g": torch.optim.Adam(self.g.parameters())}

lw.Trainer(epochs=1, **quiet).fit(Gan(), data)
""", "g.weight is moved by two optimizers in stage 'main'; give each parameter to one of them"),
    "callbacks: a key that is read before it is written": ("""
class Reads(lw.Callback):
    def map_output(self, run, output, batch, phase):  # here
        return output | {"twice": 2 * output["entropy"]}

class Writes(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return output | {"entropy": output["loss"].detach()}

lw.Trainer(epochs=1, callbacks=[Reads(), Writes()], **quiet).fit(make(), data)
""", "reads 'entropy' of the output, which Writes.map_output (train.py:{other}) puts there later; put Reads after "
     "Writes in the list"),
    "callbacks: a key that two of them write": ("""
class First(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return output | {"size": 1.0}

class Writes(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return {**output, "scale": 1.0}

class Last(lw.Callback):
    def map_output(self, run, output, batch, phase):  # here
        output["scale"] = 2.0
        return output

lw.Trainer(epochs=1, callbacks=[First(), Writes(), Last()], **quiet).fit(make(), data)
""", "puts 'scale' in the output, where Writes.map_output (train.py:{other}) has put one of its own, which is lost; "
     "give one of them another name"),
    "monitored: a name that is spelt wrong": ("""
trainer = lw.Trainer(epochs=1, callbacks=[lw.EarlyStopping("valid/accuarcy", mode="max")], **quiet)  # here
trainer.fit(make(metrics={"accuracy": lw.metrics.Accuracy()}), data, valid)
""", "EarlyStopping monitors 'valid/accuarcy', which nothing produces. Known: 'valid/accuracy', 'valid/loss'. "
     "Did you mean 'valid/accuracy'?"),
    "parameters: a layer that no optimizer has": ("""
sgd = torch.optim.SGD(net[0].parameters(), lr=0.1)
job = lw.Supervised(net, nn.CrossEntropyLoss(), sgd)  # here
lw.Trainer(epochs=1, **quiet).fit(job, data)
""", "2 trainable parameters are in no optimizer (module.2.weight, module.2.bias); add them to one, or say that "
     "they are not to be trained: parameter.requires_grad_(False)"),
    "signatures: a function that is a metric": ("""
def top(preds):
    return preds.max()

job = make(metrics={"top": lw.metrics.Function(top)})  # here
""", "Function(top): (preds) cannot be called with (preds, target): too many positional arguments. Write: def "
     "top(preds, target): ..."),
    "signatures: a step that asks for what it is not passed": ("""
class Indexed(Own):
    def training_step(self, batch, batch_idx):  # here
        return ce(self.net(batch[0]), batch[1])

lw.Trainer(epochs=1, **quiet).fit(Indexed(), data)
""", "Indexed.training_step(batch, batch_idx) cannot be called with (batch): missing a required argument: 'batch_idx'. "
     "Write: def training_step(self, batch): ...; run.progress.batch counts the batches"),
    "signatures: a step of validation": ("""
class Indexed(Own):
    def validation_step(self, batch, batch_idx):  # here
        return self.training_step(batch)

lw.Trainer(epochs=1, **quiet).fit(Indexed(), data, valid)
""", "Indexed.validation_step(batch, batch_idx) cannot be called with (batch): missing a required argument: "
     "'batch_idx'."),
    "signatures: what makes the optimizers": ("""
class Counted(Own):
    def configure_optimizers(self, steps):  # here
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

lw.Trainer(epochs=1, **quiet).fit(Counted(), data)
""", "Counted.configure_optimizers(steps) cannot be called with (): missing a required argument: 'steps'. Write: def "
     "configure_optimizers(self): ..."),
    "signatures: a weight": ("""
lw.Trainer(epochs=1, **quiet).fit(make(), data, weight=lambda run, batch: 2)  # here
""", "weight=<lambda>(run, batch) cannot be called with (batch): missing a required argument: 'batch'. Write: "
     "weight=lambda batch: ..."),
    "signatures: a rule of a phase": ("""
class Ruled(Own):
    def phases(self):
        return [lw.Phase("main", self.training_step, every=lambda: True)]  # here

lw.Trainer(epochs=1, **quiet).fit(Ruled(), data)
""", "every=Ruled.phases.<locals>.<lambda>() cannot be called with (run): too many positional arguments. Write: "
     "every=lambda run: ..."),
    "signatures: a rule of accumulation": ("""
trainer = lw.Trainer(epochs=1, accumulate=lambda run, progress: 2, **quiet)  # here
""", "accumulate=<lambda>(run, progress) cannot be called with (progress): missing a required argument: 'progress'. "
     "Write: def accumulate(progress): ..."),
    "signatures: a loop": ("""
stages = [lw.Stage("a", "1 epoch", loop=lambda run: None)]  # here
""", "loop=<lambda>(run) cannot be called with (run, stage): too many positional arguments. Write: def "
     "loop(run, stage): ..."),
    "signatures: a transform of batches": ("""
trainer = lw.Trainer(epochs=1, callbacks=[lw.BatchTransform(lambda: None)], **quiet)  # here
""", "fn=<lambda>() cannot be called with (batch): too many positional arguments. Write: fn=lambda batch: ..."),
}  # fmt: skip


CORRECT = {
    "hooks that are no methods of an object, and keys that are written again after a look": """
class Shared(lw.Callback):
    seen = 0
    @classmethod
    def on_step_end(cls, run, result):
        cls.seen += 1
    @staticmethod
    def on_epoch_start(run):
        pass

class Puts(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return {**output, "scale": 1.0}

class Doubles(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return {**output, "scale": 2 * output["scale"]}

class Sometimes(lw.Callback):
    def map_output(self, run, output, batch, phase):
        if run.progress.step:
            output["scale"] = 0.0
        return output

fit(make(), callbacks=[Shared(), Puts(), Doubles(), Sometimes()])
assert Shared.seen == 8
""",
    "keys under other names": """
class Aliased(Own):
    def training_step(self, batch):
        out = logs = super().training_step(batch)
        logs["a"] = 1.0
        return out

class AtOnce(Own):
    def training_step(self, batch):
        out = {"loss": ce(self.net(batch[0]), batch[1])}
        out["b"], out["a"] = 1.0, 2.0
        return out

class Called(Own):
    def training_step(self, batch):
        out = {"loss": ce(self.net(batch[0]), batch[1])}
        out.__setitem__("a", 1.0)
        return out

class Matched(Own):
    def training_step(self, batch):
        out = {"loss": ce(self.net(batch[0]), batch[1])}
        match {**out, "a": 1.0}:
            case {**out}:
                return out

class Counted(Own):
    def training_step(self, batch):
        out = {"loss": ce(self.net(batch[0]), batch[1]), **dict.fromkeys(["a"], 0.0)}
        out["a"] += 1.0
        return out

class Made(Own):
    names = ("a", "b")
    def training_step(self, batch):
        parts = {name: 1.0 for name in self.names}
        return {"loss": ce(self.net(batch[0]), batch[1])} | parts

for kind in (Aliased, AtOnce, Called, Matched, Counted, Made):
    fit(kind(), callbacks=rises("train/a"))
""",
    "what a module or a function of torch returns": """
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 2)
    def forward(self, x):
        loss = self.out(x).square().mean()
        return {"loss": loss, "a": loss.detach()}

class One(lw.Task):
    def __init__(self):
        super().__init__()
        self.net = Head()
    def training_step(self, batch):
        return self.net(batch[0])
    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

class Stacked(One):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), Head())

class Kept(One):
    def training_step(self, batch):
        return checkpoint(self.net, batch[0], use_reentrant=False)

class Compiled(One):
    def training_step(self, batch):
        return torch.compile(self.net, backend="eager")(batch[0])

class Wrapped(One):
    def __init__(self):
        super().__init__()
        self.fast = nn.DataParallel(self.net)
    def training_step(self, batch):
        return self.fast(batch[0])

class Hooked(One):
    def __init__(self):
        super().__init__()
        self.net.register_forward_hook(lambda module, given, out: out | {"hooked": 1.0})

for kind in (Stacked, Kept, Compiled, Wrapped):
    fit(kind(), callbacks=rises("train/a"))
fit(Hooked(), callbacks=rises("train/a", "train/hooked"))
""",
    "the names of the loss of a stage": """
both = lw.losses.Weighted({"ce": nn.CrossEntropyLoss(), "again": nn.CrossEntropyLoss()})
last = lw.Stage("b", "1 epoch", loss=both, callbacks=rises("valid/again"))
fit(make(), valid, stages=[lw.Stage("a", "1 epoch"), last])
""",
    "metrics of training": """
accuracy = {"accuracy": lw.metrics.Accuracy()}

class Named(Own):
    def training_step(self, batch):
        logits = self.net(batch[0])
        return {"loss": ce(logits, batch[1]), "logits": logits, "y": batch[1]}
    def configure_metrics(self):
        return {"accuracy": lw.metrics.Accuracy(preds="logits", target="y"), "p": torch.exp(lw.metrics.Mean("loss"))}

fit(make(metrics=accuracy), callbacks=rises("train/accuracy"))
fit(Named(), callbacks=rises("train/accuracy", "train/p"))
""",
    "what is logged by hand": """
def by_hand(run):
    run.log({"valid/score": 0.5, "score": 0.5})

best = lw.Checkpoint("1 epoch", monitor="valid/score", folder="kept")
lower = lambda o: lw.Scheduler(sched.ReduceLROnPlateau(o, mode="max"), monitor="valid/score")
fit(make(lower), handlers=[(lw.Event.STEP_END, by_hand)], callbacks=rises("train/score"), checkpoint=best)
more = lw.Checkpoint(monitor="valid/score", folder="more")
fit(make(), valid, handlers=[(lw.Event.STEP_END, by_hand)], checkpoint=more)
""",
    "a loss that is to rise": """
class Rises(Own):
    def training_step(self, batch):
        return -ce(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, maximize=True)

fit(Rises(), callbacks=rises("train/loss"))
""",
    "callbacks that only look, choose, or are called alike": """
class Counts(lw.Callback):
    seen = 0
    def map_batch(self, run, batch):
        self.seen += len(batch[0])
        return batch

class Filters(lw.Callback):
    def map_batch(self, run, batch):
        if batch[0].isnan().any():
            raise lw.SkipBatch
        return batch

class Synthetic(lw.Callback):
    def map_batch(self, run, batch):
        return [torch.rand(2, 2), torch.tensor([0, 1])]

class Pauses(lw.Callback):
    monitor, restore = "cpu", "always"

class Waits(Pauses):
    monitor = "gpu"

class Bar:
    progress = 0

def show(run, bar):
    bar.progress = run.progress.step

trainer = lw.Trainer(epochs=2, callbacks=[Filters(), Counts(), Pauses(), Waits()], **quiet)
trainer.on(lw.Event.STEP_END, bar=Bar())(show)
trainer.fit(make(), data)
fit(make(), callbacks=[Filters(), Synthetic()])
""",
    "keys that an earlier hook, or the step, or a condition provides": """
class Adds(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return output | {"a": 1.0}

class Reads(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return output | {"b": output["a"] + output["preds"].mean().detach()}

class May(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return output | {"c": output["d"]} if "d" in output else output

class Last(lw.Callback):
    def map_output(self, run, output, batch, phase):
        return output | {"d": 1.0}

fit(make(), callbacks=[Adds(), Reads(), May(), Last(), *rises("train/b", "train/d")])
""",
    "parameters that are chosen while training goes on": """
class Unfreezes(lw.Callback):
    def on_fit_start(self, run):
        run.task.module[0].requires_grad_(False)
    def on_epoch_start(self, run):
        if run.progress.epoch == 1:
            body = run.task.module[0].requires_grad_(True)
            run.optimizers["main"].add_param_group({"params": list(body.parameters())})

class Gan(lw.Task):
    def __init__(self):
        super().__init__()
        self.g, self.d = nn.Linear(2, 2), nn.Linear(2, 1)
    def d_step(self, batch):
        self.d.requires_grad_(True)
        return self.d(self.g(batch[0]).detach()).mean()
    def g_step(self, batch):
        self.d.requires_grad_(False)
        return -self.d(self.g(batch[0])).mean()
    def phases(self):
        return [lw.Phase("d", self.d_step, optimizers="d"), lw.Phase("g", self.g_step, optimizers="g")]
    def configure_optimizers(self):
        return {"d": torch.optim.Adam(self.d.parameters()), "g": torch.optim.Adam(self.g.parameters())}

fit(make(optimizer=torch.optim.SGD(net[2].parameters(), 0.1)), callbacks=[Unfreezes()])
gan = Gan()
fit(gan, epochs=1)
fit(gan, epochs=2)  # goes on, with the critic as its last step has left it
""",
    "parameters of two optimizers that take turns, of none, and tensors that are trained": """
class Turns(Own):
    def phases(self):
        even, odd = (lambda run, k=k: run.progress.step % 2 == k for k in (0, 1))
        return [lw.Phase("a", self.training_step, "a", every=even), lw.Phase("b", self.training_step, "b", every=odd)]
    def configure_optimizers(self):
        return {"a": torch.optim.SGD(self.net.parameters(), 0.1), "b": torch.optim.Adam(self.net.parameters())}

class Style(lw.Task):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2).requires_grad_(False)
        self.image = torch.zeros(2, 2, requires_grad=True)
    def training_step(self, batch):
        return (self.net(self.image) - batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam([self.image], lr=0.1)

class Distils(Own):
    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(net).requires_grad_(False)
    def training_step(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), self.teacher(batch[0]))
    def models(self):
        return {"net": self.net}

for kind in (Turns, Style, Distils):
    fit(kind())
tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
tied[1].weight = tied[0].weight
fit(lw.Supervised(tied, nn.CrossEntropyLoss(), torch.optim.SGD(tied.parameters(), 0.1)))
""",
    "decorators that take other arguments": """
def with_more(fn):
    @functools.wraps(fn)
    def call(first, second):
        return fn(first, second, 3)
    return call

def with_store(fn):
    return functools.wraps(fn)(lambda run: fn(run, []))

class Indexed(Own):
    @with_more
    def training_step(self, batch, batch_idx):
        return ce(self.net(batch[0]), batch[1])

@with_store
def look(run, store):
    store.append(run)

@with_more
def step(run, batch, more):
    return {"loss": 1.0}

fit(Indexed(), valid, handlers=[(lw.Event.EPOCH_END, look), (lw.Event.FIT_END, lambda *args: None)])
lw.Trainer(epochs=1, **quiet).run(step, data, state={})
lw.Trainer(epochs=1, **quiet).fit(make(), data, weight=len)
""",
    "methods of a task's own, called by what only its code tells": """
class Mine(Own):
    def training_step(self, batch):
        return self.train_step(batch) + getattr(self, "forward_step")(batch)
    def train_step(self, batch):
        return ce(self.net(batch[0]), batch[1])
    def forward_step(self, batch):
        return 0.0
    def prediction_step(self, batch):
        return self.net(batch[0])
    def sample(self, batch):
        return self.prediction_step(batch)
    def pretraining_step(self, batch):
        return self.train_step(batch)
    def validation_steps(self):
        return 3
    def on_policy_loss(self):
        return 0.0
    def eval_step(self, batch):
        return self.train_step(batch)
    @property
    def val_step(self):
        return 1

class Phased(Own):
    training_step = None
    def train_step(self, batch):
        return ce(self.net(batch[0]), batch[1])

class Heard(lw.Supervised, lw.Callback):
    def on_epoch_end(self, run):
        pass

def outside(run):
    run.task.eval_step(valid[0])

mine, phased = Mine(), Phased()
fit(mine, handlers=[(lw.Event.EPOCH_END, outside)])
fit(phased, epochs=None, stages=[lw.Stage("a", "1 epoch", phases=[lw.Phase("main", phased.train_step)])])
heard = Heard(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
fit(heard, callbacks=[heard])
""",
    "layers in lists that are held elsewhere, or not to be trained": """
class Lists(Own):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)
        self.all, self.loose = [self.extra, nn.ReLU()], [nn.Linear(2, 2)]
        self.teacher = [nn.Linear(2, 2).requires_grad_(False)]
    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), *self.loose[0].parameters()], lr=0.1)

fit(Lists())
""",
    "states that nothing would save, and those of a base that puts them back": """
class Said(lw.Callback):
    def state_dict(self):
        return {"n": 1}

class Stops(lw.EarlyStopping):
    def state_dict(self):
        return {**super().state_dict()}

fit(make(), callbacks=[Said()])
fit(make(), callbacks=[Stops("train/loss")], checkpoint=lw.Checkpoint(folder="kept"))
""",
    "iterators that are read once, or may have no end": """
def batches():
    while True:
        yield from data

class Short(lw.Callback):
    def on_step_end(self, run, result):
        if run.progress.batch == 2:
            raise lw.StopEpoch

class Again:
    def __iter__(self):
        self.left = 2
        return self
    def __next__(self):
        self.left -= 1
        if self.left < 0:
            raise StopIteration
        return valid[0]

lw.Trainer(epochs=2, steps=3, **quiet).fit(make(), batches())
lw.Trainer(epochs=2, **quiet).fit(make(), lambda: iter(valid))
lw.Trainer(epochs=2, callbacks=[Short()], **quiet).fit(make(), batches())
lw.Trainer(epochs=2, **quiet).fit(make(), lw.data.epoch_length(batches(), 3))
lw.Trainer(epochs=2, **quiet).fit(make(), Again(), Again())
lw.Trainer(epochs=1, **quiet).fit(make(), iter(data), iter(valid))
lw.Trainer(epochs=2, validate_every="2 epochs", **quiet).fit(make(), data, iter(valid))
""",
    "schedules of all kinds": """
for one in (
    lambda o: sched.StepLR(o, 1), lambda o: lw.per_step(sched.CosineAnnealingLR(o, T_max=8)),
    lambda o: sched.OneCycleLR(o, 0.1, total_steps=8), lambda o: sched.ReduceLROnPlateau(o),
    lambda o: sched.SequentialLR(o, [sched.ConstantLR(o, 0.5, 1), sched.CosineAnnealingLR(o, T_max=1)], [1]),
    {"lr": lambda f: 0.1 * (1 - f), "weight_decay": 0.01}, lw.schedules.warmup(0.1, "2 steps"),
):
    fit(make(one), valid)
fit(make(lambda o: sched.OneCycleLR(o, 0.1, total_steps=400)), steps=6, epochs=None)
fit(make(lambda o: sched.OneCycleLR(o, 0.1, total_steps=4)), accumulate=2)
fit(make(lambda o: sched.OneCycleLR(o, 0.1, total_steps=8)), stages=[lw.Stage(name, "1 epoch") for name in "ab"])
ends = ["9 epochs", lw.Plateau("train/loss", patience=1, min_delta=9.0)]  # after two epochs
fit(make(lambda o: sched.OneCycleLR(o, 0.1, total_steps=36)), stages=[lw.Stage("a", ends), lw.Stage("b", "1 epoch")])
""",
}


def ran(folder: Path, text: str) -> dict[str, Any]:
    (folder / "train.py").write_text(text, encoding="utf-8")
    return runpy.run_path("train.py")


@pytest.mark.capability("B-06")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_with_its_line_before_a_batch_is_read(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each seeded mistake is an error with its fix and its line, in fit and in plan, and not one batch was read."""
    body, problem = MISTAKES[mistake]
    text = HEAD.replace("reads.append(i)", 'raise AssertionError("a batch was read")') + body
    places = {
        word: i
        for i, one in enumerate(text.splitlines(), 1)
        for word, mark in (("here", "# here"), ("other", "class Writes"))
        if mark in one
    }
    problem = problem.replace("{other}", str(places.get("other", 0) + 1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lw.SettingError, match=re.escape(problem)) as caught:
        ran(tmp_path, text)
    error = "".join(traceback.format_exception(caught.value))
    told = re.findall(r"train\.py:(\d+)", error.partition(problem)[2])
    lines = [one.lineno for one in traceback.extract_tb(caught.value.__traceback__) if one.filename == "train.py"]
    assert str(places["here"]) == (told[-1] if told else str(lines[-1]))
    if ".fit(" in body:
        plan = ran(tmp_path, re.sub(r"(?m)^(\w.*)\.fit\(", r"plan = \1.plan(", text))["plan"]
        (told_too,) = (one for one in plan.problems if problem in one)
        assert plan.places[told_too] == f"train.py:{places['here']}"


@pytest.mark.capability("B-06")
@pytest.mark.parametrize("program", CORRECT)
def test_a_program_that_works_is_not_refused(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a look at the source may take for a mistake trains to its end, without an error and without a warning."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lw.LoopwrightWarning)
        assert len(ran(tmp_path, HEAD + CORRECT[program])["reads"]) > 0


def test_a_schedule_that_may_be_meant_so_is_a_warning() -> None:
    """One that a quick look never comes to, and one made for epochs that goes by the steps."""

    def told(schedule: Any, **settings: Any) -> list[str]:
        task = sgd_task(line(), schedule=schedule)
        plan = trainer(**settings).plan(task, pairs([1.0], [2.0], [3.0], [4.0]))
        assert plan.problems == []
        assert all(re.search(r"\.py:\d+$", plan.places[one]) for one in plan.warnings)
        return plan.warnings

    assert told(lambda o: sched.StepLR(o, 1), epochs=0.5) == [
        "StepLR is stepped once an epoch, and never is in this run, which ends inside of its first"
    ]
    assert told(lambda o: lw.per_step(sched.CosineAnnealingLR(o, T_max=2)), epochs=2) == [
        "CosineAnnealingLR was made for T_max=2, the epochs of this run, but is stepped with the optimizers, 8 times: "
        "the rate rises again. Leave lw.per_step out, or make it with T_max=8"
    ]


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (lambda o: sched.MultiStepLR(o, [300, 600]), "MultiStepLR was made for milestones=[300, 600], and is stepped "
         "once an epoch, 4 times in this run, where it changes nothing. Give less than 4, or step it with the "
         "optimizers: lw.per_step(scheduler)"),
        (lambda o: sched.StepLR(o, 5), "StepLR was made for step_size=5, and is stepped once an epoch, 4 times in this "
         "run, where it changes nothing. Give less than 4, or step it with the optimizers: lw.per_step(scheduler)"),
        (lambda o: lw.per_step(sched.StepLR(o, 1000)), "StepLR was made for step_size=1000, and is stepped with the "
         "optimizers, 16 times in this run, where it changes nothing. Give less than 16"),
        (lambda o: sched.LinearLR(o, total_iters=500), "LinearLR was made for total_iters=500, and is stepped once an "
         "epoch, 4 times in this run, where it changes little. Give total_iters=4, or step it with the optimizers: "
         "lw.per_step(scheduler)"),
        (lambda o: sched.CosineAnnealingLR(o, T_max=500), "CosineAnnealingLR was made for T_max=500, and is stepped "
         "once an epoch, 4 times in this run, where it changes little. Give T_max=4, or step it with the optimizers: "
         "lw.per_step(scheduler)"),
        (lambda o: sched.StepLR(o, 4), None),
        (lambda o: sched.MultiStepLR(o, [3, 600]), None),
        (lambda o: sched.CosineAnnealingLR(o, T_max=30), None),
        (lambda o: lw.per_step(sched.LinearLR(o, total_iters=100)), None),
    ],
)  # fmt: skip
def test_a_schedule_that_never_comes_to_anything_is_a_warning(schedule: Any, told: str | None) -> None:
    data = pairs([1.0], [2.0], [3.0], [4.0])
    assert trainer(epochs=4).plan(sgd_task(line(), schedule=schedule), data).warnings == ([told] if told else [])
    assert trainer(epochs=1).plan(sgd_task(line(), schedule=schedule), data[:1]).warnings == []  # a quick look
