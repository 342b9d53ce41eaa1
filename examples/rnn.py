"""A recurrent language model tuned by what it writes: a GRU learns to let its stories end well.

    python examples/rnn.py

No transformer, no Lightning: the optimizer in a loop of its own. The model is pre-trained by backpropagation on made-up
stories, of which as many end sadly as happily. Then MeZO tunes it against a score that has no gradient: it writes on,
word by word, and the words of feelings are looked up in two lists. All probes of a step share the noise of sampling.
At the end the weights are rebuilt from the log of steps alone.
"""

from __future__ import annotations

import copy
import itertools
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from stories import stories
from story_words import WORDS
from torch import Tensor, nn

from mezo_lightning import CentralDifference, Copy, Header, MeZO, Trajectory, replay

LENGTH = 28  # words that are read: the end of a story
WRITTEN = 10  # words that are written
HAPPY, SAD = (frozenset(str(word) for word in WORDS[name]) for name in ("glad", "sad"))


def ends_of_stories(seed: str, count: int) -> list[list[str]]:
    """The last words of so many stories."""
    texts = itertools.islice(stories(seed), count)
    return [re.findall(r"\w+|[^\w\s]", story.text)[-LENGTH:] for story in texts]


class Writer(nn.Module):
    """A GRU that predicts the next word.

    Args:
        words: Its vocabulary.
    """

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = list(words)
        self.ids = {word: place for place, word in enumerate(words)}
        self.embed = nn.Embedding(len(words), 48)
        self.gru = nn.GRU(48, 96, batch_first=True)
        self.head = nn.Linear(96, len(words))

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [batch, length, words] for tokens [batch, length], and the state after them."""
        hidden, after = self.gru(self.embed(tokens), state)
        return self.head(hidden), after

    def encode(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Token ids [texts, length] of texts of one length."""
        return torch.tensor([[self.ids[word] for word in text] for text in texts])

    @torch.no_grad()
    def write(self, prompts: Tensor, seed: int) -> list[list[str]]:
        """Sample on from prompts [batch, length]; the same seed gives the same noise."""
        noise = torch.Generator().manual_seed(seed)
        logits, state = self(prompts)
        written = []
        for _ in range(WRITTEN):
            uniform = torch.rand(len(prompts), len(self.words), generator=noise)
            token = (logits[:, -1] - (-uniform.log()).log()).argmax(-1, keepdim=True)  # a draw from the softmax
            written.append(token)
            logits, state = self(token, state)
        return [[self.words[token] for token in row] for row in torch.cat(written, 1).tolist()]


def score(text: Sequence[str]) -> float:
    """Feelings in a text: happy ones less sad ones."""
    return float(sum(word in HAPPY for word in text) - sum(word in SAD for word in text))


def pretrain(model: Writer, tokens: Tensor, steps: int) -> None:
    """Backpropagation, for the model to have something to write."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (64,))]
        logits, _ = model(batch[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(pretraining: int = 150, steps: int = 60) -> None:
    """Pre-train, tune, and replay."""
    torch.manual_seed(0)
    texts = ends_of_stories("training", 3000)
    model = Writer(sorted({word for text in texts for word in text} | HAPPY | SAD))
    pretrain(model, model.encode([text for text in texts if len(text) == LENGTH]), pretraining)
    base = copy.deepcopy(model)
    prompts = model.encode([text[: LENGTH - WRITTEN] for text in texts])
    held_out = [text for text in ends_of_stories("held out", 300) if set(text) <= model.ids.keys()]
    held_out_prompts = model.encode([text[: LENGTH - WRITTEN] for text in held_out])

    def report(step: int) -> None:
        written = model.write(held_out_prompts, seed=0)
        mean = sum(map(score, written)) / len(written)
        print(f"step {step:4d}   held-out score {mean:+.3f}   ... {' '.join(written[0])}", flush=True)

    optimizer = MeZO(model.named_parameters(), lr=2e-2)
    evaluator = Copy(optimizer.space)
    estimator = CentralDifference(epsilon=3e-2, num_queries=4)
    log = Path(tempfile.mkdtemp()) / "trajectory.bin"
    optimizer.trajectory = Trajectory.create(log, Header.of(optimizer.space))
    for step in range(steps):
        if step % 20 == 0:
            report(step)
        batch = prompts[torch.randint(len(prompts), (64,))]

        def objective(batch: Tensor = batch, step: int = step) -> Tensor:
            return torch.tensor([-score(text) for text in model.write(batch, seed=step)])

        optimizer.step(estimate=estimator.estimate(evaluator(objective), seed=step))
    report(steps)

    optimizer.trajectory.close()
    with Trajectory.open(log) as trajectory:
        replay(base, trajectory)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    print(f"replayed {log.stat().st_size} bytes of log: weights are {'identical' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
