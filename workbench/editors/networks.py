"""MEND's networks: one for each shape of layer, from gradient factors to pseudofactors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from workbench.editors.statistics import RunningStatistics
from workbench.errors import EditorError
from workbench.factors import Factors

if TYPE_CHECKING:
    from workbench.editors.mend import MendConfig


class _ResidualBlock(nn.Module):
    """`x + clamp(s * (U V x + b) + o, min=0)`, with s and o of each row's layer (equation 4)."""

    def __init__(self, width: int, modes: int, config: MendConfig) -> None:
        super().__init__()
        rank = min(config.rank, width)
        self.identity = config.identity
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.V = nn.Parameter(torch.empty(rank, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.offset = nn.Parameter(torch.zeros(modes, width))
        if config.unit_v:
            nn.init.normal_(self.V)
        else:
            nn.init.xavier_uniform_(self.V)
        if not config.identity:
            nn.init.xavier_uniform_(self.U, gain=nn.init.calculate_gain("relu"))

    def forward(self, x: Tensor) -> Tensor:
        # x: (modes, rows, width). clamp, not relu: its gradient at 0 is 1, so U = 0 can learn.
        scale, offset = self.scale.unsqueeze(1), self.offset.unsqueeze(1)
        shift = torch.addcmul(offset, scale, self.bias)
        inner = torch.addcmul(shift, scale, (x @ self.V.T) @ self.U.T).clamp(min=0)
        return x + inner if self.identity else inner


class EditorNetwork(nn.Module):
    """g of one shape: normalises and transforms `(u, delta)` rows of its layers.

    Args:
        in_features: Width of u.
        out_features: Width of delta.
        modes: How many layers it serves.
        config: The editor's settings.
    """

    def __init__(self, in_features: int, out_features: int, modes: int, config: MendConfig) -> None:
        super().__init__()
        self.widths = (in_features, out_features)
        self.normalized = config.normalize
        smaller = "activation" if in_features <= out_features else "delta"
        self.inputs = smaller if config.inputs == "smaller" else config.inputs
        seen = {"both": sum(self.widths), "activation": in_features, "delta": out_features}
        width = seen[self.inputs]
        self.blocks = nn.Sequential(*(_ResidualBlock(width, modes, config) for _ in range(2)))
        self.activation_stats = RunningStatistics(in_features)
        self.delta_stats = RunningStatistics(out_features)

    @property
    def rows_seen(self) -> int:
        """Rows that the running statistics have taken in."""
        return int(self.activation_stats.count)

    def gather(self, activation: Tensor, delta: Tensor, live: Tensor) -> None:
        """Merge the live rows into the running statistics (training only)."""
        self.activation_stats.merge(activation[live])
        self.delta_stats.merge(delta[live])

    def forward(self, activation: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """`(modes, rows, in)` and `(modes, rows, out)` -> pseudoactivations and pseudodeltas."""
        if self.normalized:
            if self.rows_seen < 2:
                raise EditorError(
                    "This editor has no running statistics yet: it was never trained. Train it "
                    "(python -m workbench train), open a trained one, or use editor='ft'."
                )
            activation = self.activation_stats.normalize(activation)
            delta = self.delta_stats.normalize(delta)
        if self.inputs == "activation":
            return self.blocks(activation), delta
        if self.inputs == "delta":
            return activation, self.blocks(delta)
        joint = self.blocks(torch.cat((activation, delta), -1))
        return tuple(joint.split(self.widths, -1))  # type: ignore[return-value]

    def transform(self, parts: Sequence[Factors], gather: bool) -> list[Factors]:
        """Pseudofactors of each layer, in the layers' order; see `Mend.transform`."""
        # An encoder and a decoder read different numbers of tokens: zero rows fill up. The layers
        # of a split model lie on several devices.
        device = self.activation_stats.mean.device
        activation, delta = (
            pad_sequence([rows.flatten(0, 1).to(device) for rows in side], True).float()
            for side in ([p.activation for p in parts], [p.delta for p in parts])
        )
        live = Factors(activation, delta).live()
        if gather:
            self.gather(activation, delta, live)
        # A token without gradient in any of the layers need not pass the network.
        kept = live.any(0).nonzero().squeeze(1)
        mask = live[:, kept].unsqueeze(-1)
        found = []
        pseudo = (rows * mask for rows in self(activation[:, kept], delta[:, kept]))
        for part, *sides in zip(parts, *(rows.unbind() for rows in pseudo), strict=True):
            shape = part.activation.shape[:2]
            whole = (
                rows.new_zeros(live.shape[1], rows.shape[-1]).index_copy(0, kept, rows)
                for rows in sides
            )
            found.append(Factors(*(w[: shape.numel()].unflatten(0, shape) for w in whole)))
        return found
