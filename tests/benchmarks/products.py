"""A layer's float32 product by torch's own routine and by oneDNN, on the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn.functional import linear

from tests.benchmarks.setting import Setting
from tests.benchmarks.timing import Figures, in_turn
from workbench.products import OneDnnProducts, available

_ROWS = 1100  # tokens of a group of texts in a training step of 64


def products(setting: Setting, rounds: int) -> Figures:
    """A matrix of the first edited layer's shape; on a machine without oneDNN both are torch's."""
    layer, cpu = setting.editor.layers[0], torch.device("cpu")
    inputs = torch.randn(_ROWS, layer.in_features)
    weight = torch.randn(layer.out_features, layer.in_features)

    def onednn() -> None:
        with OneDnnProducts() if available() else nullcontext():
            linear(inputs, weight)

    times = in_turn(cpu, 5 * rounds, {"torch": lambda: linear(inputs, weight), "onednn": onednn})
    billions = 2 * _ROWS * weight.numel() / 1e9
    return {
        "ms": times.milliseconds(),
        "gflop_per_second": {
            name: {key: round(billions * value, 4) for key, value in times.rate(name, 1).items()}
            for name in ("torch", "onednn")
        },
        "torch_over_onednn": times.ratio("torch", "onednn"),
    }
