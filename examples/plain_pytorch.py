"""MeZO in a plain PyTorch loop, on a module that is no transformer: an LSTM learns to echo its first token.

    python examples/plain_pytorch.py

No Lightning, no transformers, no gradients; at the end the weights are rebuilt from the log of steps alone.
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from mezo_lightning import CentralDifference, Copy, Header, MeZO, Trajectory, replay


class Echo(nn.Module):
    """Reads three tokens and says which one came first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 5] for tokens [batch, 3]."""
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


def main(steps: int = 800) -> None:
    """Tune, and replay."""
    torch.manual_seed(0)
    model = Echo()
    base = copy.deepcopy(model)

    optimizer = MeZO(model.named_parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    evaluator = Copy(optimizer.space)
    estimator = CentralDifference(epsilon=1e-2, num_queries=8)
    log = Path(tempfile.mkdtemp()) / "trajectory.bin"
    optimizer.trajectory = Trajectory.create(log, Header.of(optimizer.space))
    for step in range(steps):
        tokens = torch.randint(0, 5, (32, 3))
        objective = lambda tokens=tokens: nn.functional.cross_entropy(model(tokens), tokens[:, 0], reduction="none")  # noqa: E731
        estimate = estimator.estimate(evaluator(objective), seed=step)
        optimizer.step(estimate=estimate)
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            assert estimate.evaluation is not None
            print(f"step {step:4d}   loss {estimate.evaluation.means[0]:.3f}")

    optimizer.trajectory.close()
    with Trajectory.open(log) as trajectory:
        replay(base, trajectory)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    print(f"replayed {log.stat().st_size} bytes of log: weights are {'identical' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
