"""Real tasks with several objectives, DCGAN and actor-critic: the bits of the loops that people write by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, softplus
from torch.optim.lr_scheduler import ExponentialLR, LinearLR

import loopwright as lw
from every_step import Experiment, resumed_at_every_step
from tiny import bits, line, pairs, same, seed_all, trainer

# -------------------------------------------------------------------------------------------------------------- DCGAN


def digits(n: int = 150) -> Any:
    """Real images [n, 1, 8, 8] in [-1, 1], in batches of 16."""
    images = torch.from_numpy(load_digits().images[:n]).float()[:, None] / 8 - 1
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 16, shuffle=True)


class DCGAN(lw.Task):
    """Radford et al. 2016 (arXiv:1511.06434) at 8x8: strided convolutions, batch norm, no pooling."""

    def __init__(self, every: Any = 1) -> None:
        super().__init__()
        seed_all(4)
        self.every = every
        self.gen = nn.Sequential(
            nn.ConvTranspose2d(16, 16, 2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.disc = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 2), nn.Flatten(0),
        )  # fmt: skip

    def drawn(self, like: Tensor) -> Tensor:
        out: Tensor = self.gen(torch.randn(len(like), 16, 1, 1))
        return out

    def disc_step(self, batch: Any) -> Tensor:
        (real,) = batch
        return softplus(-self.disc(real)).mean() + softplus(self.disc(self.drawn(real).detach())).mean()

    def gen_step(self, batch: Any) -> Tensor:
        return softplus(-self.disc(self.drawn(batch[0]))).mean()

    def configure_optimizers(self) -> Any:
        return {n: torch.optim.Adam(getattr(self, n).parameters(), 2e-3, betas=(0.5, 0.9)) for n in ("disc", "gen")}

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("disc", self.disc_step, optimizers="disc", clip_norm=0.5,
                     schedule=lambda o: ExponentialLR(o, 0.7)),
            lw.Phase("gen", self.gen_step, optimizers="gen", every=self.every, clip_norm=2.0,
                     schedule=lambda o: lw.per_step(LinearLR(o, 0.5, total_iters=9))),  # by its own steps
        ]  # fmt: skip


def dcgan_by_hand(every: Callable[[int, float], bool], accumulate: int, autocast: bool, epochs: int) -> list[Any]:
    """Two models, two optimizers: clipped, accumulated, under bf16, with a schedule by steps and one by epochs."""
    task = DCGAN()
    disc, gen = task.configure_optimizers().values()
    disc_schedule, gen_schedule = ExponentialLR(disc, 0.7), LinearLR(gen, 0.5, total_iters=9)
    data, step, disc_loss, before = digits(), 0, 1.0, 1.0
    for _ in range(epochs):
        batches = iter(data)
        while window := list(islice(batches, accumulate)):
            total = sum(len(x) for (x,) in window)
            for name, optimizer, clip in (("disc", disc, 0.5), ("gen", gen, 2.0)):
                if name == "gen" and not every(step, before):
                    continue
                if name == "disc":
                    before, disc_loss = disc_loss, 0.0
                optimizer.zero_grad()
                for batch in window:
                    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                        loss = getattr(task, f"{name}_step")(batch)
                    (loss * (len(batch[0]) / total)).backward()
                    if name == "disc":
                        disc_loss = disc_loss + loss.detach() * (len(batch[0]) / total)
                nn.utils.clip_grad_norm_(getattr(task, name).parameters(), clip)
                optimizer.step()
                if name == "gen":
                    gen_schedule.step()
            step += 1
        disc_schedule.step()
    return bits(task.gen, task.disc, gen, disc)


def rarely(run: lw.Run) -> bool:
    return float(run.latest.get("disc/loss", 1.0)) < 1.3  # in bf16 1.3 would be 1.296875


EVERY = {
    "each step": (1, lambda step, before: True),
    "every second": (2, lambda step, before: (step + 1) % 2 == 0),
    "by a loss": (rarely, lambda step, before: float(before) < 1.3),
}


@pytest.mark.capability("B-11", "IG-17", "PL-16", "PL-17", "SK-21")
@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_a_dcgan_on_digits_has_the_bits_of_the_loop_by_hand(every: str, accumulate: int, precision: str) -> None:
    """DCGAN in two phases, each with its clipping, schedule and frequency, accumulated, under bf16: bit for bit."""
    given, rule = EVERY[every]
    expected = dcgan_by_hand(rule, accumulate, precision == "bf16", 2)
    task = DCGAN(given)
    run = trainer(epochs=2, accumulate=accumulate, precision=precision).fit(task, digits())
    assert same(bits(task.gen, task.disc, run.optimizers["gen"], run.optimizers["disc"]), expected)
    moved = run.progress.phase_steps
    assert moved["disc"] == run.progress.step
    assert (moved["gen"] < moved["disc"]) is (every != "each step")


# ---------------------------------------------------------------------------------------------------- semi-supervised


class MeanTeacher(lw.Task):
    """Tarvainen & Valpola 2017 (arXiv:1703.01780): class -1 is no label, and the teacher follows the student."""

    def __init__(self) -> None:
        super().__init__()
        seed_all(6)
        self.student, self.teacher = nn.Linear(64, 10), nn.Linear(64, 10).requires_grad_(False)

    def learn(self, batch: Any) -> Tensor:
        x, y = batch
        preds = self.student(x + 0.1 * torch.randn_like(x))
        known = cross_entropy(preds, y, ignore_index=-1, reduction="sum") / (y >= 0).sum().clamp(min=1)
        return known + mse_loss(preds.softmax(1), self.teacher(x + 0.1 * torch.randn_like(x)).softmax(1))

    @torch.no_grad()
    def follow(self, batch: Any) -> None:
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 0.1)

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("learn", self.learn), lw.Phase("follow", self.follow, optimizers=())]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.student.parameters(), 0.01)


def half_labelled() -> lw.Loader:
    data = load_digits()
    x, y = torch.from_numpy(data.data[:90]).float() / 16, torch.from_numpy(data.target[:90])
    return lw.Loader((x, torch.where(torch.arange(90) % 2 == 0, y, -1)), 16, shuffle=True, seed=1)


@pytest.mark.capability("SK-21")
def test_a_semi_supervised_method_is_a_task_of_a_few_lines(tmp_path: Path) -> None:
    """A mean teacher in 20 lines, two phases of which one moves no optimizer: the bits of the loop by hand."""
    task = MeanTeacher()
    optimizer = task.configure_optimizers()
    for epoch in range(2):
        for batch in half_labelled().at(epoch, 0):
            optimizer.zero_grad()
            task.learn(batch).backward()
            optimizer.step()
            task.follow(batch)
    expected = bits(task, optimizer)
    task = MeanTeacher()
    run = trainer(epochs=2).fit(task, half_labelled())
    assert same(bits(task, run.optimizers["main"]), expected)
    resumed_at_every_step(lambda: Experiment(MeanTeacher(), half_labelled(), settings={"epochs": 1}), tmp_path)


# -------------------------------------------------------------------------------------------------------------- rules


class Ruled(lw.Task):
    """Two nets; the second moves when ``rule`` says so."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.a, self.b, self.rule = line(), line(), rule

    def configure_optimizers(self) -> Any:
        return {n: torch.optim.SGD(getattr(self, n).parameters(), 0.1, momentum=0.9) for n in "ab"}

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("a", lambda batch: mse_loss(self.a(batch[0]), batch[0] + torch.rand(1)), optimizers="a"),
            lw.Phase("b", lambda batch: mse_loss(self.b(batch[0]), batch[0]), optimizers="b", every=self.rule),
        ]


RULES: dict[str, Any] = {
    "progress": lambda run: run.progress.step < 2 or run.progress.step % 3 == 0,
    "the latest loss": lambda run: run.latest.get("a/loss", 1.0) > 0.3,
    "the latest record": lambda run: run.metrics.get("train/a/loss", 1.0) > 0.3,
}


@pytest.mark.parametrize("rule", RULES)
def test_a_phase_that_runs_by_a_rule_resumes_exactly(rule: str, tmp_path: Path) -> None:
    def make() -> Experiment:
        return Experiment(Ruled(RULES[rule]), pairs([1], [2, 0.5], [0.1], [0.4], [1.5]), settings={"epochs": 3})

    run = resumed_at_every_step(make, tmp_path)
    assert 0 < run.progress.phase_steps["b"] < run.progress.phase_steps["a"] == 15


def test_what_a_rule_reads_is_the_latest_value_of_each_name() -> None:
    seen: list[dict[str, float]] = []

    def rule(run: lw.Run) -> bool:
        seen.append({k: round(float(v), 3) for k, v in run.latest.items()})
        return len(seen) == 2

    class Counting(Ruled):
        def phases(self) -> list[lw.Phase]:
            return [
                lw.Phase("a", lambda batch: self.a(batch[0]).mean() * 0 + batch[0].mean(), optimizers="a"),
                lw.Phase("b", lambda batch: self.b(batch[0]).mean() * 0 - batch[0].mean(), optimizers="b", every=rule),
            ]

    trainer(epochs=1).fit(Counting(None), pairs([1], [2], [3], [4]))
    assert seen == [{}, {"a/loss": 1.0}, {"a/loss": 2.0, "b/loss": -2.0}, {"a/loss": 3.0, "b/loss": -2.0}]


@pytest.mark.parametrize("every", [0, 2.5, "2", True, int])
def test_a_frequency_that_is_none_is_refused(every: Any) -> None:
    with pytest.raises(lw.SettingError, match="expected a whole number of steps, from 1, or a function of the run"):
        lw.Phase("p", print, every=every)


# ------------------------------------------------------------------------------------------------------- actor-critic


class ActorCritic(lw.Task):
    """Plays an episode of CartPole a step; the actor learns by the critic's advantage, the critic by the returns."""

    def __init__(self) -> None:
        super().__init__()
        seed_all(5)
        self.actor = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))
        self.env = gymnasium.make("CartPole-v1")

    def play(self, batch: Tensor) -> None:
        states, actions = [torch.from_numpy(self.env.reset(seed=int(batch))[0])], []
        done = False
        while not done:
            with torch.no_grad():
                actions.append(torch.distributions.Categorical(logits=self.actor(states[-1])).sample())
            state, _, ended, cut, _ = self.env.step(int(actions[-1]))
            done = ended or cut
            states.append(torch.from_numpy(state))
        self.states, self.actions = torch.stack(states[:-1]), torch.stack(actions)
        rewards = 0.99 ** torch.arange(len(actions))
        self.returns = rewards.flip(0).cumsum(0).flip(0) / rewards

    def actor_step(self, batch: Tensor) -> dict[str, Any]:
        advantage = (self.returns - self.critic(self.states)).detach()
        loss = (cross_entropy(self.actor(self.states), self.actions, reduction="none") * advantage).mean()
        return {"loss": loss, "length": len(self.actions)}

    def critic_step(self, batch: Tensor) -> Tensor:
        return mse_loss(self.critic(self.states), self.returns)

    def configure_optimizers(self) -> Any:
        rates = {"actor": 0.01, "critic": 0.02}
        return {name: torch.optim.Adam(getattr(self, name).parameters(), lr) for name, lr in rates.items()}

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("play", self.play, optimizers=()),
            lw.Phase("actor", self.actor_step, optimizers="actor", clip_norm=1.0),
            lw.Phase("critic", self.critic_step, optimizers="critic", every=2),
        ]


@pytest.mark.capability("IG-17")
def test_an_actor_critic_has_the_bits_of_the_loop_by_hand() -> None:
    """An actor-critic that plays an episode a step, three phases of which one moves nothing: the bits of the loop."""
    task = ActorCritic()
    actor, critic = task.configure_optimizers().values()
    for step, seed in enumerate(torch.arange(12), 1):
        task.play(seed)
        actor.zero_grad()
        task.actor_step(seed)["loss"].backward()
        nn.utils.clip_grad_norm_(task.actor.parameters(), 1.0)
        actor.step()
        if step % 2 == 0:
            critic.zero_grad()
            task.critic_step(seed).backward()
            critic.step()
    expected = bits(task, actor, critic)

    task = ActorCritic()
    episodes = lw.Loader(torch.arange(12), 1)
    run = trainer(epochs=1).fit(task, episodes)
    assert same(bits(task, run.optimizers["actor"], run.optimizers["critic"]), expected)
    assert run.progress.phase_steps == {"play": 12, "actor": 12, "critic": 6}
    assert run.metrics["train/actor/length"] > 8


def test_episodes_resume_exactly(tmp_path: Path) -> None:
    resumed_at_every_step(
        lambda: Experiment(ActorCritic(), lw.Loader(torch.arange(6), 1), settings={"epochs": 1}), tmp_path
    )
