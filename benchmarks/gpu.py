"""Loopwright next to loops by hand on a CUDA machine: a network so small that only the loop shows, and a GPT.

``make gpu`` runs the tests marked ``gpu``, then this, which writes docs/benchmarks-gpu.md. It needs Python 3.11 or
newer with torch, numpy, safetensors, PyYAML and scikit-learn, and no network; its tests need pytest 9, pytest-timeout
and hypothesis besides. Where CUDA is absent it says so and ends with status 2. The digits are timed eager, compiled
and with the whole step (forward, backward, optimizer) as a CUDA graph, for which 0.25 times the eager loop by hand is
the goal. Images of 224 x 224 in pinned memory are trained on by a small convolutional net, with and without the copy
of the next batch during a step. The GPT is that of nanoGPT in size (12 layers of width 768, 1,024 tokens), by hand
and ours in bfloat16 with the model or step compiled, AdamW fused, gradients clipped.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset, TensorDataset

import loopwright as lw
from loopwright.data import ahead

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks-gpu.md"


@dataclass(frozen=True)
class Size:
    """Of a GPT. The defaults are those of nanoGPT's 124 million parameters."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    vocabulary: int = 50304
    batch: int = 16


class Block(nn.Module):
    """Attention and a feed-forward part, each added to what comes in."""

    def __init__(self, size: Size):
        super().__init__()
        self.heads, width = size.heads, size.width
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape  # batch, tokens, width
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, C))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder whose embedding and head share their weights."""

    def __init__(self, size: Size):
        super().__init__()
        self.token, self.place = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width, bias=False), nn.Linear(size.width, size.vocabulary, bias=False)
        self.token.weight = self.head.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), target.flatten())


class Clock(lw.Callback):
    """Seconds of the steps after the first ``skip``, measured where the device has done its work."""

    def __init__(self, device: torch.device, skip: int):
        self.device, self.skip, self.seconds, self.began = device, skip, 0.0, 0.0

    def on_step_end(self, run, result):
        if run.progress.step == self.skip:
            self.began = now(self.device)

    def on_fit_end(self, run):
        self.seconds = now(self.device) - self.began


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------------------------------------- a GPT, tokens a second


def gpt_parts(size: Size, device: torch.device, steps: int):
    torch.manual_seed(0)
    net = GPT(size).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(size.vocabulary, (steps * size.batch, size.context + 1))
    return net, optimizer, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gpt_by_hand(size: Size, device: torch.device, steps: int, skip: int, compile: dict[str, Any]) -> float:
    """Tokens a second of the loop that nanoGPT has: pinned batches ahead, autocast, clipping, fused AdamW."""
    net, optimizer, inputs, target = gpt_parts(size, device, steps)
    model = torch.compile(net, **compile)

    def get(i: int) -> list[Tensor]:
        rows = slice(i * size.batch, (i + 1) * size.batch)
        pair = [inputs[rows], target[rows]]
        if device.type == "cuda":
            pair = [tensor.pin_memory().to(device, non_blocking=True) for tensor in pair]
        return pair

    x, y = get(0)
    began = 0.0
    for i in range(steps):
        if i == skip:
            began = now(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(model(x), y)
        if i + 1 < steps:
            x, y = get(i + 1)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (steps - skip) * size.batch * size.context / (now(device) - began)


def gpt_ours(size: Size, device: torch.device, steps: int, skip: int, compile: Any) -> float:
    """Tokens a second of ``fit`` with its defaults, in the same precision and with the same optimizer."""
    net, optimizer, inputs, target = gpt_parts(size, device, steps)
    loader = DataLoader(TensorDataset(inputs, target), size.batch, pin_memory=device.type == "cuda")
    clock = Clock(device, skip)
    trainer = lw.Trainer(
        epochs=1, device=device, precision="bf16", compile=compile, clip_norm=1.0, callbacks=[clock], folder=None
    )
    trainer.fit(lw.Supervised(net, loss_of, optimizer), loader)
    return (steps - skip) * size.batch * size.context / clock.seconds


# ------------------------------------------------------------------------------------- digits, microseconds a step


def digits_parts(device: torch.device):
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    inputs, target = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(target))
    return net, optimizer, DataLoader(data, 64, shuffle=True, drop_last=True)


def digits_by_hand(device: torch.device, epochs: int) -> float:
    """Microseconds a step of the eager loop that people write; the first epoch is left out."""
    net, optimizer, loader = digits_parts(device)
    began = 0.0
    for epoch in range(epochs + 1):
        if epoch == 1:
            began = now(device)
        for inputs, target in loader:
            inputs, target = inputs.to(device), target.to(device)
            optimizer.zero_grad()
            cross_entropy(net(inputs), target).backward()
            optimizer.step()
    return (now(device) - began) / (epochs * len(loader)) * 1e6


def digits_ours(device: torch.device, epochs: int, **settings: Any) -> float:
    """Microseconds a step of ``fit``; the first epoch is left out."""
    net, optimizer, loader = digits_parts(device)
    clock = Clock(device, len(loader))
    lw.Trainer(epochs=epochs + 1, device=device, callbacks=[clock], folder=None, progress=False, **settings).fit(
        lw.Supervised(net, cross_entropy, optimizer), loader
    )
    return clock.seconds / (epochs * len(loader)) * 1e6


# ---------------------------------------------------------------------------------------------- images, a second


class Pictures(Dataset):
    """Ready batches in memory that workers share with the main process: to read one takes no time."""

    def __init__(self, steps: int, batch: int, side: int):
        self.steps, self.pair = steps, (torch.rand(batch, 3, side, side), torch.arange(batch) % 10)
        for tensor in self.pair:
            tensor.share_memory_()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.pair


def image_parts(device: torch.device, steps: int, batch: int, side: int):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loader = DataLoader(Pictures(steps, batch, side), None, num_workers=2, pin_memory=device.type == "cuda")
    return net, optimizer, loader


def images_by_hand(device: torch.device, steps: int, skip: int, batch: int = 64, side: int = 224) -> float:
    """Images a second of the loop that people write, with copies that do not block."""
    net, optimizer, loader = image_parts(device, steps, batch, side)
    began = 0.0
    for i, (inputs, target) in enumerate(loader):
        if i == skip:
            began = now(device)
        inputs, target = inputs.to(device, non_blocking=True), target.to(device, non_blocking=True)
        optimizer.zero_grad()
        cross_entropy(net(inputs), target).backward()
        optimizer.step()
    return (steps - skip) * batch / (now(device) - began)


def images_ours(
    device: torch.device, steps: int, skip: int, batch: int = 64, side: int = 224, *, early: bool, **settings: Any
) -> float:
    """Images a second of ``fit``; ``early``: with the copy of the next batch during a step, as on CUDA always."""
    net, optimizer, loader = image_parts(device, steps, batch, side)
    clock, least = Clock(device, skip), ahead._LEAST
    trainer = lw.Trainer(epochs=1, device=device, callbacks=[clock], folder=None, progress=False, **settings)
    ahead._LEAST = least if early else math.inf
    try:
        trainer.fit(lw.Supervised(net, cross_entropy, optimizer), loader)
    finally:
        ahead._LEAST = least
    return (steps - skip) * batch / clock.seconds


# ------------------------------------------------------------------------------------------------------- the page


def rounds(count: int, *contenders: Callable[[], float]) -> list[float]:
    """The median of each contender over ``count`` rounds, in which they take turns."""
    found = [[contender() for contender in contenders] for _ in range(count)]
    return [statistics.median(column) for column in zip(*found, strict=True)]


def row(what: str, hand: float, ours: float, goal: str = "") -> str:
    return f"| {what} | {hand:,.0f} | {ours:,.0f} | {ours / hand:.3f} | {goal} |"


def report(device: torch.device, *, quick: bool = False) -> str:
    count, steps, skip, epochs = (1, 30, 10, 5) if quick else (5, 120, 20, 40)
    size, static = Size(), {"dynamic": False}
    hand, ours = rounds(
        count,
        lambda: gpt_by_hand(size, device, steps, skip, static),
        lambda: gpt_ours(size, device, steps, skip, static),
    )
    by_hand, eager, plain, compiled, graphs, checked = rounds(
        count,
        lambda: digits_by_hand(device, epochs),
        lambda: digits_ours(device, epochs),
        lambda: digits_ours(device, epochs, nonfinite=None),
        lambda: digits_ours(device, epochs, nonfinite=None, compile=static),
        lambda: digits_ours(device, epochs, nonfinite=None, cuda_graphs=device.type == "cuda"),
        lambda: digits_ours(device, epochs, cuda_graphs=device.type == "cuda"),
    )
    pictures, late, early, unchecked = rounds(
        count,
        lambda: images_by_hand(device, steps, skip),
        lambda: images_ours(device, steps, skip, early=False),
        lambda: images_ours(device, steps, skip, early=True),
        lambda: images_ours(device, steps, skip, early=True, nonfinite=None),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    lines = [
        "# Benchmarks on a GPU",
        "",
        f"{name}, Python {platform.python_version()}, torch {torch.__version__}; the median of {count} rounds. Written "
        "by `make gpu`.",
        "",
        "| what | by hand | Loopwright | ratio | goal |",
        "|---|---|---|---|---|",
        row("GPT, 124M parameters, bf16, compiled: tokens a second", hand, ours, ">= 1.0"),
        row("digits, us a step: defaults", by_hand, eager),
        row("digits, us a step: nonfinite=None", by_hand, plain),
        row("digits, us a step: nonfinite=None, compiled", by_hand, compiled),
        row("digits, us a step: nonfinite=None, cuda_graphs=True", by_hand, graphs, "<= 0.25"),
        row("digits, us a step: cuda_graphs=True, with the check", by_hand, checked),
        row("images a second: each batch copied before its step", pictures, late),
        row("images a second: copied during the step before it", pictures, early, ">= 1.0"),
        row("images a second: the same, nonfinite=None", pictures, unchecked),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that all works")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"no CUDA device was found by torch {torch.__version__}; run `make gpu` on a machine that has one "
            "(PYTHON=... names a Python that has torch with CUDA)",
            file=sys.stderr,
        )
        return 2
    if options.check:
        print(torch.cuda.get_device_name())
        return 0
    page = report(torch.device("cuda"), quick=options.quick)
    print(page)
    if options.write:
        PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
