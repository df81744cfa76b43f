"""Each seeded mistake of a script is told before a batch is read, by name, with the line on which it was written."""

from __future__ import annotations

import re
import runpy
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from tiny import acts, line, pairs, sgd_task, trainer

GOLDEN = Path(__file__).parent / "golden" / "0.1.0" / "step-00000008"
HEAD = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import loopwright as lw

class Unread(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        raise AssertionError("a batch was read")

data = DataLoader(Unread(), batch_size=2)
net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
settings = dict(epochs=1, folder=None, progress=False)

def task(**more):
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1), **more)

class Own(lw.Task):
    def __init__(self):
        super().__init__()
        self.net = net
    def training_step(self, batch):
        return self.net(batch).mean()
"""

# what is written below HEAD, with the line that is to be named marked by "# here"; what is told, word for word
MISTAKES = {
    "a monitored name that nothing produces": ("""
trainer = lw.Trainer(callbacks=[lw.EarlyStopping("train/losses")], **settings)  # here
trainer.fit(task(), data)
""", "EarlyStopping monitors 'train/losses', which nothing produces. Known: 'train/loss'. Did you mean 'train/loss'?"),
    "a monitored name that no step of a task of one's own returns": ("""
class Kl(Own):
    def configure_optimizers(self):
        return torch.optim.SGD(net.parameters(), lr=0.1)
    def training_step(self, batch):
        loss = nn.functional.mse_loss(self.net(batch), batch)
        return {"loss": loss, "kl": self.distance(batch)}
    def validation_step(self, batch):
        return {**self.training_step(batch), "error": self.distance(batch)}
    def distance(self, batch):
        return self.net(batch).mean()

trainer = lw.Trainer(callbacks=[lw.EarlyStopping("valid/eror", mode="min")], **settings)  # here
trainer.fit(Kl(), data, data)
""", "EarlyStopping monitors 'valid/eror', which nothing produces. Known: 'valid/error', 'valid/kl', 'valid/loss'. Did "
     "you mean 'valid/error'?"),
    "a monitored name that is not in the type of what a step returns": ("""
from typing import TypedDict

class Losses(TypedDict):
    loss: torch.Tensor
    kl: torch.Tensor

class Said(Own):
    def configure_optimizers(self):
        return torch.optim.SGD(net.parameters(), lr=0.1)
    def training_step(self, batch) -> Losses:
        return self.net.losses(batch)

saver = lw.Checkpoint(monitor="valid/kld", mode="min", folder="elsewhere")
trainer = lw.Trainer(checkpoint=saver, **settings)  # here
trainer.fit(Said(), data, data)
""", "Checkpoint monitors 'valid/kld', which nothing produces. Known: 'valid/kl', 'valid/loss'. Did you mean "
     "'valid/kl'?"),
    "a loss that is trained on as a tensor, under another name": ("""
class Plain(Own):
    def configure_optimizers(self):
        return torch.optim.SGD(net.parameters(), lr=0.1)

best = lw.EarlyStopping("train/total_loss")
trainer = lw.Trainer(callbacks=[best], **settings)  # here
trainer.fit(Plain(), data)
""", "EarlyStopping monitors 'train/total_loss', which nothing produces. Known: 'train/loss'. Did you mean "
     "'train/loss'?"),
    "the loss of a task of two phases": ("""
class Gan(lw.Task):
    def __init__(self):
        super().__init__()
        self.g, self.d = nn.Linear(2, 2), nn.Linear(2, 1)
    def configure_optimizers(self):
        return {"g": torch.optim.SGD(self.g.parameters(), lr=0.1), "d": torch.optim.SGD(self.d.parameters(), lr=0.1)}
    def phases(self):
        return [lw.Phase("disc", self.judge, "d"), lw.Phase("gen", lambda batch: self.d(self.g(batch)).mean(), "g")]
    def judge(self, batch):
        return {"loss": self.d(batch).mean(), "hits": 1.0}

trainer = lw.Trainer(callbacks=[lw.EarlyStopping("train/loss")], **settings)  # here

@trainer.on(lw.Event.EPOCH_END)
def look(run):
    run.log({"more": 1.0})

trainer.fit(Gan(), data)
""", "EarlyStopping monitors 'train/loss', which nothing produces. Known: 'train/disc/hits', 'train/disc/loss', "
     "'train/gen/loss'. Did you mean 'train/gen/loss'?"),
    "a name of one of two validations": ("""
trainer = lw.Trainer(callbacks=[lw.EarlyStopping("valid/loss")], **settings)  # here
trainer.fit(task(), data, {"near": data, "far": data})
""", "EarlyStopping monitors 'valid/loss', which nothing produces. Known: 'valid/far/loss', 'valid/near/loss'. Did you "
     "mean 'valid/far/loss'?"),
    "a name that nothing puts into the values of a validation": ("""
class Reads(lw.Callback):
    def on_validation_end(self, run, values):
        print(values["valid/loss"], dict(values))

trainer = lw.Trainer(callbacks=[Reads(), lw.EarlyStopping("valid/gain", mode="max")], **settings)  # here
trainer.on(lw.Event.VALIDATION_END)(lambda run: None)

@trainer.on(lw.Event.LOADER_END)
def look(run, values):
    run.log({"far": 1.0 - values["loss"]})

trainer.fit(task(), data, data)
""", "EarlyStopping monitors 'valid/gain', which nothing produces. Known: 'valid/loss'."),
    "a loss that is to rise": ("""
trainer = lw.Trainer(callbacks=[lw.EarlyStopping("valid/loss", mode="max")], **settings)  # here
trainer.fit(task(), data, data)
""", "EarlyStopping monitors 'valid/loss' with mode='max', and training makes the loss smaller: the worst would be "
     "taken for the best; leave mode out"),
    "a plateau that waits for the wrong side": ("""
lower = torch.optim.lr_scheduler.ReduceLROnPlateau
each = lambda sgd: lw.Scheduler(lower(sgd), monitor="valid/accuracy")
job = task(schedule=each, metrics={"accuracy": lw.metrics.Accuracy()})
trainer = lw.Trainer(**settings)
job = lw.Supervised(net, nn.CrossEntropyLoss(), job.optimizer, schedule=each, metrics=job.metrics)  # here
trainer.fit(job, data, data)
""", "ReduceLROnPlateau monitors 'valid/accuracy' with mode='min', and its name tells the other way; make it with "
     "mode='max'"),
    "a plateau that waits for the loss to rise": ("""
lower = lambda sgd: torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, mode="max")
trainer = lw.Trainer(**settings)
job = lw.Supervised(net, nn.MSELoss(), task().optimizer, schedule=lower)  # here
trainer.fit(job, data, data)
""", "ReduceLROnPlateau monitors 'valid/loss' with mode='max', and training makes the loss smaller: the worst would be "
     "taken for the best; make it with mode='min', or say what it is to monitor: lw.Scheduler(plateau, "
     "monitor='valid/accuracy')"),
    "a plateau that is not told at which data to look": ("""
lower = torch.optim.lr_scheduler.ReduceLROnPlateau
trainer = lw.Trainer(**settings)
job = lw.Supervised(net, nn.MSELoss(), task().optimizer, schedule=lower)  # here
trainer.fit(job, data, {"seen": data, "new": data})
""", "ReduceLROnPlateau monitors 'valid/seen/loss', the first of 2 validation sets, as nothing says which; say it: "
     "lw.Scheduler(plateau, monitor='valid/new/loss')"),
    "pieces of sequences for what carries nothing on": ("""
job = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1), truncate=2)  # here
lw.Trainer(**settings).fit(job, data)
""", "truncate=2 calls Sequential as module(input, carry), and its forward takes one argument; train what carries "
     "something on, as nn.LSTM does, or leave truncate out"),
    "pieces of sequences for a step that takes no carry": ("""
class Cut(Own):
    truncate = 2
    def configure_optimizers(self):  # here
        return torch.optim.SGD(net.parameters(), lr=0.1)

lw.Trainer(**settings).fit(Cut(), data)
""", "truncate=2 calls Cut.training_step with a carry as well; write: def training_step(self, batch, carry=None): ... "
     'return {"loss": loss, "carry": h}, or leave truncate out'),
    "a pattern of a stage that matches nothing": ("""
stages = [
    lw.Stage("head", "1 epoch", train="1.*"),  # here
]
lw.Trainer(folder=None, progress=False).fit(task(), data, stages=stages)
""", "the pattern '1.*' matches no parameter. Known: 'module.0.*', 'module.1.*'. Did you mean 'module.1.*'?"),
    "a schedule of another unit": ("""
cycle = torch.optim.lr_scheduler.OneCycleLR
trainer = lw.Trainer(steps=4, folder=None, progress=False)
sgd = torch.optim.SGD(net.parameters(), lr=0.1)
each = lambda o: lw.Scheduler(cycle(o, 0.1, total_steps=4), every="epoch")
job = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=each)  # here
trainer.fit(job, data)
""", "OneCycleLR is stepped once an epoch here, but the run counts steps; wrap it: lw.per_step(scheduler)"),
    "parameters of two optimizers": ("""
class Two(Own):
    def configure_optimizers(self):  # here
        return {"all": torch.optim.SGD(net.parameters(), lr=0.1), "last": torch.optim.SGD(net[1].parameters(), lr=0.1)}

lw.Trainer(**settings).fit(Two(), data)
""", "net.1.weight is moved by two optimizers in stage 'main'; give each parameter to one of them"),
    "parameters of no optimizer": ("""
class Half(Own):
    def configure_optimizers(self):  # here
        return torch.optim.SGD(net[0].parameters(), lr=0.1)

lw.Trainer(**settings).fit(Half(), data)
""", "2 trainable parameters are in no optimizer (net.1.weight, net.1.bias); add them to one, or say that they are not "
     "to be trained: parameter.requires_grad_(False)"),
    "an optimizer of no phase": ("""
class Idle(Own):
    def configure_optimizers(self):  # here
        return {"main": torch.optim.SGD(net.parameters(), lr=0.1), "more": torch.optim.SGD(net.parameters(), lr=0.2)}
    def phases(self):
        return [lw.Phase("main", self.training_step, optimizers="main")]

lw.Trainer(**settings).fit(Idle(), data)
""", "the optimizer 'more' is moved by no phase; name it in Phase(optimizers=...), or leave it out"),
    "a unit that nobody counts": ("""
trainer = lw.Trainer(log_every="100 tokens", **settings)  # here
trainer.fit(task(), data)
""", "log_every: '100 tokens' counts tokens, and nothing says how many a batch has; pass fit(..., "
     "weight=lambda batch: ...)"),
    "a setting that cannot apply": ("""
trainer = lw.Trainer(validate_every="2 steps", **settings)  # here
trainer.fit(task(), data)
""", "validate_every='2 steps', but there is no validation data; pass fit(..., valid=loader)"),
    "a key that nobody uses": ("""
config = {"epochs": 1, "folder": None, "clip": 1.0}
trainer = lw.Trainer(**config)  # here
""", "clip=1.0: there is no such argument. Known: 'accumulate', 'callbacks', 'capsule', 'checkpoint', 'clip_norm', "
     "'compile', 'cuda_graphs', 'debug', 'deterministic', 'device', 'devices', 'epochs', 'folder', 'log_every', "
     "'loggers', 'name', 'nodes', 'nonfinite', 'precision', 'progress', 'seed', 'steps', 'strategy', 'time', "
     "'validate_every'. Did you mean 'clip_norm'?"),
    "a key of a schedule that nobody uses": ("""
trainer = lw.Trainer(**settings)
sgd = torch.optim.SGD(net.parameters(), lr=0.1)
job = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule={"lr": 0.1, "momentun": 0.9})  # here
trainer.fit(job, data)
""", "SGD has no 'momentun' to schedule. Known: 'dampening', 'lr', 'momentum', 'weight_decay'. Did you mean "
     "'momentum'?"),
    "work that is lost": ("""
class Doubled(lw.Callback):
    def map_loss(self, run, loss, output, batch, phase):  # other
        return 2 * loss

class Fresh(lw.Callback):
    def map_loss(self, run, loss, output, batch, phase):  # here
        return output["preds"].mean()

lw.Trainer(callbacks=[Doubled(), Fresh()], **settings).fit(task(), data)
""", "Fresh.map_loss (train.py:{here}) makes a loss of its own and does not look at the one that it is given, so "
     "that what Doubled.map_loss (train.py:{other}) has returned before is lost; go on from 'loss' there, or leave "
     "one of the two out"),
    "a rate that a schedule sets anew": ("""
class Slower(lw.Callback):
    def on_epoch_end(self, run):  # here
        for group in run.optimizers["main"].param_groups:
            group["lr"] *= 0.5

job = task(schedule=lw.schedules.cosine(0.1, 0.0))
lw.Trainer(callbacks=[Slower()], **settings).fit(job, data)
""", "Slower.on_epoch_end (train.py:{here}) sets 'lr' of an optimizer, and its schedule sets that anew before every "
     "step, so that it is lost; make it a part of the schedule, or leave the schedule out"),
    "a rate of a handler that a schedule sets anew": ("""
trainer = lw.Trainer(**settings)

def warm(run, to):  # here
    run.optimizers["main"].param_groups[0]["lr"] = to

trainer.on(lw.Event.FIT_START, to=0.1)(warm)
trainer.fit(task(schedule={"lr": lw.schedules.cosine(0.1, 0.0)}), data)
""", "handler warm (train.py:{here}) sets 'lr' of an optimizer, and its schedule sets that anew before every step, so "
     "that it is lost; make it a part of the schedule, or leave the schedule out"),
    "a look at the batch before another changes it": ("""
class Looks(lw.Callback):
    def map_batch(self, run, batch):  # here
        print(len(batch))
        return batch

class Changes(lw.Callback):
    def map_batch(self, run, batch):  # other
        return [batch[0] * 2, batch[1]]

lw.Trainer(callbacks=[Looks(), Changes()], **settings).fit(task(), data)
""", "Looks.map_batch (train.py:{here}) looks at the batch before Changes.map_batch (train.py:{other}) changes it, and "
     "does not see what is trained on; put Looks after Changes in the list, or look in on_batch_start, which comes "
     "before both, or in on_backward_end, which is passed what is trained on"),
    "a look at the loss before another changes it": ("""
class Looks(lw.Callback):
    def map_loss(self, run, loss, output, batch, phase):  # here
        self.last = float(loss)
        return loss

class Changes(lw.Callback):
    def map_loss(self, run, loss, output, batch, phase):  # other
        return 2 * loss

lw.Trainer(callbacks=[Looks(), Changes()], **settings).fit(task(), data)
""", "Looks.map_loss (train.py:{here}) looks at the loss before Changes.map_loss (train.py:{other}) changes it, and "
     "does not see what is trained on; put Looks after Changes in the list, or look in map_output, which comes before "
     "both, or in on_backward_end, which is passed what is trained on"),
    "a look at the gradients before another changes them": ("""
class Looks(lw.Callback):
    def on_grads_ready(self, run, phase, grad_norm):  # here
        self.norm = sum(p.grad.norm() for p in phase.parameters())

class Changes(lw.Callback):
    def on_grads_ready(self, run, phase, grad_norm):  # other
        for p in phase.parameters():
            p.grad.mul_(0.5)

lw.Trainer(callbacks=[Looks(), Changes()], **settings).fit(task(), data)
""", "Looks.on_grads_ready (train.py:{here}) looks at the gradients before Changes.on_grads_ready (train.py:{other}) "
     "changes them, and does not see what is trained on; put Looks after Changes in the list"),
    "weights put back twice": ("""
best = lw.Checkpoint(monitor="valid/loss", restore="best", folder="elsewhere")
stop = lw.EarlyStopping("train/loss", restore="best")
lw.Trainer(checkpoint=best, callbacks=[stop], **settings).fit(task(), data, data)  # here
""", "Checkpoint(monitor='valid/loss') and EarlyStopping(monitor='train/loss') both put weights back after the fit; "
     "leave restore='best' to one of them"),
    "a state that no checkpoint holds": ("""
class Keeps(lw.Callback):
    def state_dict(self):  # here
        return {"tools": {"loss": print}}
    def load_state_dict(self, state):
        pass

saver = lw.Checkpoint(folder="elsewhere")
trainer = lw.Trainer(callbacks=[Keeps()], checkpoint=saver, **settings)
trainer.fit(task(), data)
""", "Keeps.state_dict()['tools']['loss'] is a builtin"),
    "a checkpoint that is not there": ("""
trainer = lw.Trainer(**settings)
trainer.fit(task(), data, resume="runs/gone")  # here
""", "runs/gone is not a checkpoint: it does not exist. Give the folder of a run or of a checkpoint"),
    "a checkpoint of another network": (f"""
trainer = lw.Trainer(**settings)
trainer.fit(task(), data, resume={str(GOLDEN)!r})  # here
""", "  - model, unexpected: "),
    "a checkpoint that is damaged": (f"""
import pathlib, shutil
kept = shutil.copytree({str(GOLDEN)!r}, "step-00000008", dirs_exist_ok=True)
pathlib.Path(kept, "model.safetensors").write_bytes(bytes(380))
lw.Trainer(**settings).fit(task(), data, resume=kept)  # here
""", "model.safetensors is damaged: its "),
    "models() that leaves parameters out": ("""
class Hides(Own):
    def models(self):  # here
        return {"model": net[0]}
    def configure_optimizers(self):
        return torch.optim.SGD(net.parameters(), lr=0.1)

lw.Trainer(**settings).fit(Hides(), data)
""", "Hides.models() leaves out 2 parameters (net.1.weight, net.1.bias), which no checkpoint would hold; add their "
     "module to the dict that models() returns"),
    "a module without shapes": ("""
lazy = nn.LazyLinear(1)
job = lw.Supervised(lazy, nn.MSELoss(), torch.optim.SGD(lazy.parameters(), lr=0.1))  # here
lw.Trainer(**settings).fit(job, data)
""", "module.weight, module.bias of a lazy module has no shape yet; call the module once with a batch before its "
     "optimizer is made"),
    "an optimizer of another module": ("""
other = nn.Linear(1, 1)
job = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(other.parameters(), lr=0.1))  # here
lw.Trainer(**settings).fit(job, data)
""", "the optimizer 'main' moves no parameter of the task; make it from the task's own: SGD(net.parameters(), ...), "
     "where net is the very module that is trained"),
    "an optimizer that holds nothing": ("""
job = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD([{"params": []}], lr=0.1))  # here
lw.Trainer(**settings).fit(job, data)
""", "the optimizer 'main' holds no parameter; make it from the task's own: SGD(net.parameters(), ...)"),
    "an optimizer of a stage that is of another module": ("""
other = nn.Linear(1, 1)
stages = [
    lw.Stage("all", "1 epoch"),
    lw.Stage("more", "1 epoch", optimizer=torch.optim.SGD(other.parameters(), lr=0.1)),  # here
]
lw.Trainer(folder=None, progress=False).fit(task(), data, stages=stages)
""", "the optimizer 'more.main' moves no parameter of the task; make it from the task's own: SGD(net.parameters(), "
     "...), where net is the very module that is trained"),
    "a stage that trains nothing": ("""
stages = [
    lw.Stage("all", "1 epoch"),
    lw.Stage("none", "1 epoch", freeze="*"),  # here
]
lw.Trainer(folder=None, progress=False).fit(task(), data, stages=stages)
""", "stage 'none' freezes every parameter that it could move; leave some of them out of freeze='*'"),
    "a stage that ends at a part of what has no length": ("""
stages = [
    lw.Stage("half", "0.5 epochs"),  # here
]
lw.Trainer(folder=None, progress=False).fit(task(), lambda: iter([]), stages=stages)
""", "until: '0.5 epochs' needs data with a known number of batches; count steps instead"),
    "a stage that accumulates what nobody counts": ("""
stages = [
    lw.Stage("tokens", "1 epoch", accumulate="64 tokens"),  # here
]
lw.Trainer(folder=None, progress=False).fit(task(), data, stages=stages)
""", "accumulate counts tokens, and nothing says how many a batch has; pass fit(..., weight=lambda batch: ...)"),
    "a rate of a stage that its optimizer does not have": ("""
stages = [
    lw.Stage("a", "1 epoch", schedule={"momentun": 0.9}),  # here
]
lw.Trainer(folder=None, progress=False).fit(task(), data, stages=stages)
""", "SGD has no 'momentun' to schedule. Known: 'dampening', 'lr', 'momentum', 'weight_decay'. Did you mean "
     "'momentum'?"),
    "a loss of a stage that no checkpoint would hold": ("""
stages = [
    lw.Stage("a", "1 epoch", loss=nn.Bilinear(1, 1, 1)),  # here
]
lw.Trainer(folder=None, progress=False).fit(task(), data, stages=stages)
""", "the loss of stage 'a' has parameters, which no checkpoint would hold; make it part of the task"),
    "a callback of a stage that cannot work there": ("""
stages = [
    lw.Stage("a", "1 epoch", callbacks=[lw.Watch("gradients")]),  # here
]
lw.Trainer(folder=None, progress=False).fit(task(), data, stages=stages)
""", "Watch belongs among the callbacks of the Trainer, not of a stage; at=... says when it looks"),
    "a callback that cannot work": ("""
trainer = lw.Trainer(callbacks=[lw.Profiler(sync=True)], device="cpu", **settings)  # here
trainer.fit(task(), data)
""", "Profiler(sync=True) has nothing to wait for on cpu; leave it out"),
    "a handler whose moment nobody knows": ("""
trainer = lw.Trainer(**settings)

@trainer.on(lw.Event.STEP_END(every="100 tokens"))  # here
def look(run):
    pass

trainer.fit(task(), data)
""", "handler look: '100 tokens' counts tokens, and nothing says how many a batch has; pass fit(..., "
     "weight=lambda batch: ...)"),
    "a phase whose optimizer does not exist": ("""
class Wrong(Own):
    def configure_optimizers(self):
        return torch.optim.SGD(net.parameters(), lr=0.1)
    def phases(self):  # here
        return [lw.Phase("main", self.training_step, optimizers="man")]

lw.Trainer(**settings).fit(Wrong(), data)
""", "phase 'main' moves the optimizer 'man', which does not exist. Known: 'main'. Did you mean 'main'?"),
    "a task without an optimizer": ("""
job = lw.Supervised(net, nn.MSELoss())  # here
lw.Trainer(**settings).fit(job, data)
""", "Supervised has no optimizer to train with; pass one: optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3)"),
    "a factory that makes no optimizer": ("""
job = lw.Supervised(net, nn.MSELoss(), lambda params: list(params))  # here
lw.Trainer(**settings).fit(job, data)
""", "the factory of optimizer 'main' returned list; it must return a torch optimizer"),
    "weights that came in float16": ("""
half = nn.Linear(2, 2).half()
job = lw.Supervised(half, nn.MSELoss(), torch.optim.SGD(half.parameters(), lr=0.1))
trainer = lw.Trainer(precision="fp16", **settings)  # here
trainer.fit(job, data)
""", "precision='fp16' computes in float16 and keeps the weights in float32, but weight, bias of the model came in "
     "float16; call net.float() before the optimizer is made"),
    "a step that is not to be compiled": ("""
trainer = lw.Trainer(compile=True, **settings)  # here
trainer.run(lambda run, batch: None, [1])
""", "compile=True cannot apply to a step that does all the work; call torch.compile on what it calls itself"),
    "validation without a step": ("""
class Blind(lw.Task):
    def __init__(self):
        super().__init__()
        self.net = net
    def phases(self):
        return [lw.Phase("main", lambda batch: self.net(batch).mean())]
    def configure_optimizers(self):  # here
        return torch.optim.SGD(net.parameters(), lr=0.1)

lw.Trainer(**settings).fit(Blind(), data, data)
""", "Blind has neither validation_step nor training_step, but validation data was given; write one"),
    "clipping for an optimizer that calls back": ("""
job = lw.Supervised(net, nn.MSELoss(), torch.optim.LBFGS(net.parameters()))
trainer = lw.Trainer(clip_norm=1.0, **settings)  # here
trainer.fit(job, data)
""", "clip_norm=1.0 cannot apply to LBFGS, which calls the step back as often as it needs; leave it out"),
    "a step by another name": ("""
class Theirs(lw.Task):
    def __init__(self):
        super().__init__()
        self.net = net
    def train_step(self, batch):
        return self.net(batch[0]).mean()
    def configure_optimizers(self):  # here
        return torch.optim.SGD(net.parameters(), lr=0.1)

lw.Trainer(**settings).fit(Theirs(), data)
""", "Theirs has no training_step; write: def training_step(self, batch): ... return loss, in the place of train_step"),
    "a state that nothing puts back": ("""
class Counts(lw.Callback):
    def state_dict(self):  # here
        return {"n": 1}

trainer = lw.Trainer(callbacks=[Counts()], checkpoint=lw.Checkpoint(folder="elsewhere"), **settings)
trainer.fit(task(), data)
""", "Counts has a state_dict and no load_state_dict, so that a resume would begin without its state; write: def "
     "load_state_dict(self, state): ..., which takes back what state_dict returns"),
    "a logger whose state nothing puts back": ("""
class Log:
    def log(self, progress, values, kind):
        pass
    def state_dict(self):  # here
        return {"n": 1}

trainer = lw.Trainer(loggers=[Log()], checkpoint=lw.Checkpoint(folder="elsewhere"), **settings)
trainer.fit(task(), data)
""", "Log has a state_dict and no load_state_dict"),
    "an iterator to train on twice": ("""
settings["epochs"] = 2
lw.Trainer(**settings).fit(task(), (batch for batch in data))  # here
""", "the training data is an iterator (generator), which can be read once, and this run reads it again; pass a list, "
     "a DataLoader, or a generator function: batches, not batches()"),
    "an iterator to train on in two stages": ("""
settings.pop("epochs")
stages = [lw.Stage("a", "1 epoch"), lw.Stage("b", "1 epoch")]
lw.Trainer(**settings).fit(task(), iter(data), stages=stages)  # here
""", "the training data is an iterator (_SingleProcessDataLoaderIter), which can be read once"),
    "an iterator to validate on twice": ("""
trainer = lw.Trainer(validate_every="2 steps", **settings)
trainer.fit(task(), data, map(tuple, data))  # here
""", "the validation data is an iterator (map), which can be read once"),
    "a validation by another name": ("""
class Theirs(lw.Supervised):
    def val_step(self, batch):  # here
        return self.training_step(batch)

sgd = torch.optim.SGD(net.parameters(), lr=0.1)
lw.Trainer(**settings).fit(Theirs(net, nn.CrossEntropyLoss(), sgd), data)
""", "Theirs.val_step is never called: did you mean validation_step?"),
    "a slip in the name of a method": ("""
class Slips(lw.Supervised):
    def configure_metric(self):  # here
        return {}

sgd = torch.optim.SGD(net.parameters(), lr=0.1)
lw.Trainer(**settings).fit(Slips(net, nn.CrossEntropyLoss(), sgd), data)
""", "Slips.configure_metric is never called: did you mean configure_metrics?"),
    "a hook of a task": ("""
class Hooked(lw.Supervised):
    def on_train_epoch_end(self):  # here
        print(self.module)

sgd = torch.optim.SGD(net.parameters(), lr=0.1)
lw.Trainer(**settings).fit(Hooked(net, nn.CrossEntropyLoss(), sgd), data)
""", "Hooked.on_train_epoch_end is never called: a task has no hooks. Put it in a callback: class Own(lw.Callback): "
     "def on_epoch_end(self, run): ..."),
    "the end of a validation in a task": ("""
class Ends(lw.Supervised):
    def validation_epoch_end(self, outputs):  # here
        print(outputs)

sgd = torch.optim.SGD(net.parameters(), lr=0.1)
lw.Trainer(**settings).fit(Ends(net, nn.CrossEntropyLoss(), sgd), data)
""", "Ends.validation_epoch_end is never called: a task has no hooks. Make it a handler: "
     "@trainer.on(lw.Event.VALIDATION_END)"),
    "layers in a list": ("""
class Deep(nn.Module):
    def __init__(self):  # here
        super().__init__()
        self.last, self.layers = nn.Linear(2, 2), [nn.Linear(2, 2)]

deep = Deep()
job = lw.Supervised(deep, nn.CrossEntropyLoss(), torch.optim.SGD(deep.parameters(), lr=0.1))
lw.Trainer(**settings).fit(job, data)
""", "Deep.layers is a list that holds 1 module whose parameters no optimizer moves; write nn.ModuleList([...]), or "
     "requires_grad_(False) on what is not to be trained"),
    "layers in a dict": ("""
class Deep(Own):
    def __init__(self):  # here
        super().__init__()
        self.heads = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

lw.Trainer(**settings).fit(Deep(), data)
""", "Deep.heads is a dict that holds 2 modules whose parameters no optimizer moves; write nn.ModuleDict({...})"),
    "a scheduler that the task was not given": ("""
sgd = torch.optim.SGD(net.parameters(), lr=0.1)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=1)
job = lw.Supervised(net, nn.CrossEntropyLoss(), sgd)  # here
lw.Trainer(**settings).fit(job, data)
""", "CosineAnnealingLR was made for SGD, and nothing in this run steps it; write lw.Supervised(..., "
     "schedule=scheduler), which steps it once an epoch"),
    "a scheduler that configure_optimizers keeps": ("""
class Keeps(Own):
    def configure_optimizers(self):  # here
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.StepLR(sgd, 5)
        self.schedule.state_dict()  # by now it has a __dict__ of its own
        return sgd

lw.Trainer(**settings).fit(Keeps(), data)
""", "StepLR was made for SGD, and nothing in this run steps it; return (optimizer, scheduler) from "
     "configure_optimizers"),
}  # fmt: skip


ODD = [  # may be meant: warnings
    "a validation by another name", "a slip in the name of a method", "a hook of a task",
    "the end of a validation in a task", "layers in a list", "layers in a dict",
    "a scheduler that the task was not given", "a scheduler that configure_optimizers keeps",
    "a look at the batch before another changes it", "a look at the loss before another changes it",
    "a look at the gradients before another changes them", "a rate that a schedule sets anew",
    "a rate of a handler that a schedule sets anew", "a plateau that waits for the wrong side",
    "a plateau that is not told at which data to look",
]  # fmt: skip


@pytest.mark.parametrize("oddity", ODD)
def test_what_may_be_meant_is_warned_of_with_its_line(
    oddity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, problem = MISTAKES[oddity]
    text = re.sub(r"(?m)^(.*)\.fit\(", r"plan = \1.plan(", HEAD + body)
    places = {word: i for i, one in enumerate(text.splitlines(), 1) for word in ("here", "other") if one.endswith(word)}
    for word, at in places.items():
        problem = problem.replace(f"{{{word}}}", str(at))
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    plan = runpy.run_path("train.py")["plan"]
    assert plan.problems == []
    (told,) = (one for one in plan.warnings if problem in one)
    assert plan.places[told] == f"train.py:{places['here']}"


FINE = """
class Filters(lw.Callback):
    def map_batch(self, run, batch):
        if batch[0].isnan().any():
            raise lw.SkipBatch
        return batch

class Shifts(lw.Callback):
    def map_batch(self, run, batch):
        x, y = batch
        x.add_(1.0)
        return batch

class Counts(lw.Callback):
    def map_batch(self, run, batch):
        self.last = len(batch)
        return batch

class Changes(lw.Callback):
    def map_batch(self, run, batch):
        return [batch[0] * 2, batch[1]]

class Pauses(lw.Callback):
    restore, monitor = True, "cpu"

class Steps(lw.Callback):
    def on_epoch_end(self, run):
        own.step()

two = [lw.Stage("a", "1 epoch", callbacks=[Counts()]), lw.Stage("b", "1 epoch", callbacks=[Changes()])]
by_hand, given = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(net.parameters(), lr=0.1)
own, theirs = (torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in (by_hand, given))
stepped = lw.Supervised(net, nn.CrossEntropyLoss(), by_hand)
scheduled = lw.Supervised(net, nn.CrossEntropyLoss(), given, schedule=theirs)
settings.pop("epochs")
plans = [
    lw.Trainer(epochs=1, callbacks=[Filters(), Shifts(), Pauses(), Changes()], **settings).plan(task(), data),
    lw.Trainer(**settings).plan(task(), data, stages=two),
    lw.Trainer(epochs=2, callbacks=[Steps()], **settings).plan(stepped, data),
    lw.Trainer(epochs=2, **settings).plan(scheduled, data),
]
"""


@pytest.mark.capability("B-06")
def test_what_is_fine_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter, an edit under another name, callbacks of two stages, what a class of one's own calls monitor, and
    schedulers that are stepped."""
    (tmp_path / "train.py").write_text(HEAD + FINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert [(plan.problems, plan.warnings) for plan in runpy.run_path("train.py")["plans"]] == [([], [])] * 4


@pytest.mark.capability("B-06")
@pytest.mark.parametrize("mistake", [one for one in MISTAKES if one not in ODD])
def test_each_mistake_is_named_with_its_line_before_a_batch_is_read(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each seeded mistake, of every kind named here, is an error with its line, in fit and plan, before any batch."""
    body, problem = MISTAKES[mistake]
    text = HEAD + body
    lines = text.splitlines()
    here = next(i for i, one in enumerate(lines, 1) if one.endswith("# here"))
    other = next((i for i, one in enumerate(lines, 1) if one.endswith("# other")), 0)
    problem = problem.replace("{here}", str(here)).replace("{other}", str(other))
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((lw.SettingError, lw.CheckpointError, TypeError)) as caught:
        runpy.run_path("train.py")
    assert problem in str(caught.value)
    printed = traceback.format_exception(caught.value)
    named = (
        re.findall(r'train\.py(?:", line |:)(\d+)', "".join(printed).partition(problem)[2])
        or [
            str(frame.lineno)
            for frame in traceback.extract_tb(caught.value.__traceback__)
            if frame.filename == "train.py"
        ][-1:]
    )  # said with the problem, or the line that Python itself shows last
    assert named[-1] == str(here)
    assert not (tmp_path / "elsewhere").exists()

    if ".fit(" in body:  # the same by a look at it
        looks = re.sub(r"(?m)^(.*)\.fit\(", r"plan = \1.plan(", text)
        (tmp_path / "train.py").write_text(looks, encoding="utf-8")
        plan = runpy.run_path("train.py")["plan"]
        (told,) = (one for one in plan.problems if problem in one)
        assert plan.places[told] == f"train.py:{here}"


COMPARES = """
class Looks(lw.Callback):
    def map_loss(self, run, loss, output, batch, phase):
        self.last = float(loss)
        return loss

class Changes(lw.Callback):
    def map_loss(self, run, loss, output, batch, phase):
        return 2 * loss

turned = lw.Trainer(callbacks=[Changes(), Looks()], **settings).plan(task(), data)
compares = lw.Trainer(callbacks=[Looks(), Changes(), Looks()], **settings).plan(task(), data)
"""


def test_one_that_looks_after_another_has_changed_or_before_and_after_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text(HEAD + COMPARES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ran = runpy.run_path("train.py")
    assert ran["turned"].warnings == ran["compares"].warnings == []


def test_a_rate_that_is_set_twice_is_warned_of() -> None:
    class Rates(lw.Callback):
        changes = ("rates",)

    plan = trainer(epochs=1, callbacks=[Rates()]).plan(
        sgd_task(line(), schedule=lw.schedules.cosine(0.1, 0.0)), pairs([1.0])
    )
    assert plan.warnings == ["Rates says that it changes rates, and the schedule of SGD sets lr before every step"]


class SetsRates(lw.Callback):
    """In a step, after the schedule; a value that no schedule has; and a dict of its own."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def on_step_start(self, run: lw.Run) -> None:
        for group in run.optimizers["main"].param_groups:
            group["lr"] *= 0.5

    def on_epoch_end(self, run: lw.Run) -> None:
        run.optimizers["main"].param_groups[0]["weight_decay"] = 0.1
        self.seen["lr"] = run.lr or 0.0


def test_rates_that_are_not_lost_are_not_told() -> None:
    for schedule in (lw.schedules.cosine(0.1, 0.0), None):
        plan = trainer(epochs=2, callbacks=[SetsRates()]).plan(sgd_task(line(), schedule=schedule), pairs([1.0]))
        assert plan.problems == []


class Mends(lw.Callback):
    def _mend(self, batch: Any) -> None:
        batch[0].mul_(2)

    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        self._mend(batch)
        return batch


class Halves(lw.Callback):
    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        return [batch[0] / 2, batch[1]]


class Skips(lw.Callback):
    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        if len(batch[0]) > 100:
            raise lw.SkipBatch
        return (batch[0] + 1, batch[1])


@pytest.mark.parametrize("first", [Mends(), Halves(), Skips(), acts(map_batch=lambda run, batch: batch)])
@pytest.mark.parametrize("second", [Mends(), Halves(), Skips(), acts(map_batch=lambda run, batch: batch)])
def test_those_that_may_go_together_are_not_warned_of(first: Any, second: Any) -> None:
    """Nothing is said of what changes the batch by a method of its own, or whose source does not tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = trainer(epochs=1, callbacks=[first, second]).fit(sgd_task(line()), pairs([1.0]))
    assert run.status == "done"


class SetsProgress(lw.Callback):
    def on_step_end(self, run: lw.Run, result: lw.state.StepResult) -> None:
        run.progress = run.progress._replace(step=0)


def sets_progress(r: lw.Run) -> None:
    r.progress = r.progress._replace(epoch=100)


class SkipsLate(lw.Callback):
    def map_output(self, run: lw.Run, output: Any, batch: Any, phase: lw.Phase) -> Any:
        if len(batch[0]) > 100:
            raise lw.SkipBatch
        return output

    def on_step_end(self, run: lw.Run, result: lw.state.StepResult) -> None:
        raise lw.SkipBatch()


def test_a_hook_that_sets_the_progress_is_told_what_ends_training() -> None:
    user = trainer(epochs=1, callbacks=[SetsProgress()])
    user.on(lw.Event.EPOCH_END)(sets_progress)
    problems = user.plan(sgd_task(line()), pairs([1.0])).problems
    assert [one.partition(" (")[0] for one in problems] == ["SetsProgress.on_step_end", "handler sets_progress"]
    assert all(
        one.endswith(
            ") sets run.progress, which the loop alone counts; to end training or a stage, call "
            "run.request_stop(reason) or run.end_stage(), or raise lw.StopEpoch"
        )
        for one in problems
    )


def test_a_batch_that_is_skipped_where_that_is_too_late_is_told_with_the_hooks_that_may() -> None:
    problems = trainer(epochs=1, callbacks=[SkipsLate()]).plan(sgd_task(line()), pairs([1.0])).problems
    assert [one.partition(" (")[0] for one in problems] == ["SkipsLate.map_output", "SkipsLate.on_step_end"]
    assert all(
        one.endswith(
            ") raises SkipBatch, which leaves a batch out only from on_batch_start and map_batch; raise it there, or "
            "drop a step by lw.SkipStep, before the optimizers move"
        )
        for one in problems
    )
