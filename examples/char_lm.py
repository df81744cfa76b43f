"""A language model that learns to write like Python's own documentation, one character at a time.

The text, 465,000 characters, comes with Python (``pydoc_data.topics``), so that nothing is downloaded.
Run: python examples/char_lm.py [--steps 1000]
"""

from __future__ import annotations

import argparse
import math
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loopwright as lw

LENGTH = 64  # characters that are read at once
CHARS = "".join(map(chr, [10, *range(32, 127)]))  # a new line and what can be typed


def encode(text: str) -> Tensor:
    """Characters as int64 indices into CHARS; others become a question mark."""
    index = {char: i for i, char in enumerate(CHARS)}
    return torch.tensor([index.get(char, index["?"]) for char in text])


class CharLM(lw.Task):
    """An embedding, a GRU, and a score for each character that may come next."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARS), 64)
        self.gru = nn.GRU(64, width, batch_first=True)
        self.scores = nn.Linear(width, len(CHARS))

    def training_step(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden, _ = self.gru(self.embedding(tokens[:, :-1]))
        loss = F.cross_entropy(self.scores(hidden).flatten(0, 1), tokens[:, 1:].flatten())
        return {"loss": loss, "bits": loss.detach() / math.log(2)}  # bits a character

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=4e-3)
        return optimizer, lw.per_step(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998))

    @torch.no_grad()
    def write(self, start: str, length: int, temperature: float = 0.6) -> str:
        """``start`` and ``length`` characters more, each drawn from what the model expects."""
        text, tokens, state = start, encode(start), None
        for _ in range(length):
            hidden, state = self.gru(self.embedding(tokens.to(self.scores.weight.device)), state)
            chances = (self.scores(hidden[-1]) / temperature).softmax(dim=0)
            tokens = chances.multinomial(1)
            text += CHARS[int(tokens)]
        return text


def main(steps: int = 1000) -> tuple[dict[str, float], str]:
    """Train, write a few lines, and return what was measured on topics never read, and the lines."""
    pages = [topics[name] for name in sorted(topics)]
    train, valid = (encode("\n".join(part)) for part in (pages[: -len(pages) // 10], pages[-len(pages) // 10 :]))
    blocks = [text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH) for text in (train, valid)]

    torch.manual_seed(0)
    task = CharLM()
    trainer = lw.Trainer(steps=steps, seed=0, name="char_lm", clip_norm=1.0, validate_every="250 steps")
    loaders = [lw.Loader(part, batch_size=32, shuffle=part is blocks[0]) for part in blocks]
    run = trainer.fit(task, *loaders)

    text = task.write('The "for" statement', 400)
    print(text, f"\n--\n{run.metrics['valid/bits']:.2f} bits a character on {len(valid):,} characters never read")
    return run.metrics, text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    main(**vars(parser.parse_args()))
