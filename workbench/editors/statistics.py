"""Running statistics of the rows that an editor sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench import parallel


class RunningStatistics(nn.Module):
    """Mean and standard deviation of each dimension over all rows seen (parallel variance).

    Args:
        width: Of a row.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def merge(self, rows: Tensor) -> None:
        """Take `(n, width)` rows in, of all processes: Chan et al. 1979, one merge a batch."""
        rows = rows.double()
        n = parallel.add_up(self.count.new_tensor(len(rows)))
        if n == 0:
            return
        mean = parallel.add_up(rows.sum(0)) / n
        squares = parallel.add_up((rows - mean).square().sum(0))
        total, shift = self.count + n, mean - self.mean
        self.squares += squares + shift.square() * self.count * n / total
        self.mean += shift * n / total
        self.count.copy_(total)

    def std(self) -> Tensor:
        """Of each dimension, `(width,)`; a sample's, not a population's."""
        return (self.squares / (self.count - 1)).sqrt()

    def normalize(self, x: Tensor) -> Tensor:
        """Rows less the mean, in standard deviations, `(..., width)`."""
        return (x - self.mean.to(x.dtype)) / (self.std().to(x.dtype) + 1e-7)
