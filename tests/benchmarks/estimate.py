"""What editing and training a model of some shape will take, from its outline: nothing is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from tests.benchmarks.timing import Figures
from workbench import LanguageModel, Mend, MendConfig
from workbench.divergence import rows_held
from workbench.encoding import Tokens, passes
from workbench.layers import linear_shape
from workbench.memory import size
from workbench.training import EditTexts, TrainingConfig
from workbench.views import Trunk

_FOUR_BIT = 0.5 + 4 / 64  # bytes of a weight, with its share of a float32 scale
_FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part.

    Args:
        weights: The model.
        editor: Its networks and running statistics.
        edit: What one edit holds at most beside these.
        optimizer: Gradients and Adam's moments.
        activations: What a training step holds at most: the graph of the blocks and of the
            editor, logits, factors.
        cache: What the trunk cache keeps of one batch.
    """

    weights: int
    editor: int
    edit: int
    optimizer: int
    activations: int
    cache: int

    @property
    def editing(self) -> int:
        """At most, in an edit."""
        return self.weights + self.editor + self.edit

    @property
    def training(self) -> int:
        """At most, in a training step."""
        return self.weights + self.editor + self.optimizer + self.activations + self.cache

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(count)}" for name, count in asdict(self).items())
        return f"{size(self.editing)} to edit, {size(self.training)} to train ({parts})"

    def figures(self) -> Figures:
        """In MiB."""
        mib = {name: round(count / 2**20, 1) for name, count in asdict(self).items()}
        return mib | {
            "editing": round(self.editing / 2**20, 1),
            "training": round(self.training / 2**20, 1),
        }


def estimate(
    lm: LanguageModel,
    config: MendConfig,
    edits: Sequence[EditTexts],
    training: TrainingConfig,
    device: torch.device,
) -> Estimate:
    """Estimate from an outline (`shapes.outline`).

    Args:
        lm: Over the outline; its weights take no memory.
        config: The editor's.
        edits: A batch of training as tokens; the first is also the edit that is made.
        training: Settings of training.
        device: Where both will run: it decides how many texts run through the model together.
    """
    with torch.device("meta"):
        editor = Mend(lm, config)
    learned = sum(p.numel() for p in editor.parameters())
    one, batch = _Work(editor, edits[:1]), _Work(editor, edits[: training.chunk])
    everything = _Work(editor, edits)
    cache = min(everything.cached(), int(training.cache_gb * 2**30))
    return Estimate(
        weights=sum(_held(parameter) for parameter in lm.model.parameters()),
        editor=_FLOAT * (learned + sum(b.numel() for b in editor.buffers())),
        edit=one.run([one.edits[0].edit]) + one.factors() + one.networks(graph=False),
        optimizer=3 * _FLOAT * learned,
        activations=batch.networks(graph=True)
        + 3 * everything.factors()
        + max(everything.run(texts, device) for texts in everything.batches(device)),
        cache=cache,
    )


class _Work:
    """Counts what edits of some texts hold.

    Args:
        editor: Over an outline.
        edits: The texts.
    """

    def __init__(self, editor: Mend, edits: Sequence[EditTexts]) -> None:
        self.editor, self.edits, self.lm = editor, edits, editor.lm
        self.each = self.lm.dtype.itemsize
        self.start = Trunk(self.lm, editor.layers).start
        self.terms = max(len(edit.edit.ids) for edit in edits)
        self.width = self.lm.model.get_input_embeddings().get_parameter("weight").shape[1]

    def batches(self, device: torch.device) -> Iterator[list[Tokens]]:
        """The texts that run through the model together."""
        texts = [text for edit in self.edits for text in (*edit.equivalents, *edit.locality)]
        for places in passes(self.lm, texts, device):
            yield [texts[place] for place in places]

    def run(self, texts: Sequence[Tokens], scored_on: torch.device | None = None) -> int:
        """Of a forward and a backward pass: the blocks above the cut, and logits at the targets.

        Args:
            texts: That run together.
            scored_on: Where training scores them under an overlay; None: an edit's own pass.
        """
        count, read, written = len(texts), *_lengths(self.lm, texts)
        held = scratch = 0
        for stack in self.lm.stacks:
            length = written if stack.name == "decoder" and self.lm.kind == "seq2seq" else read
            for index, block in enumerate(stack.blocks):
                passed = sum(sum(shape) for shape in _linears(block))
                # Norms are computed in float32.
                taken = count * length * (passed * self.each + 4 * self.width * _FLOAT)
                scratch = max(scratch, taken)
                held += taken if stack is not self.lm.stacks[0] or index >= self.start else 0
        if scored_on:  # inputs and changes in float32; a copy of each text's own edit, its gradient
            rows = count * (read + 2 * self.terms)
            held += rows * _FLOAT * sum(x.in_features + x.out_features for x in self.editor.layers)
        targets = sum(len(text.targets) for text in texts)
        vocabulary = self.lm.model.config.get_text_config().vocab_size
        logits = targets * vocabulary * (2 * self.each + 4 * _FLOAT)
        if scored_on:  # a few rows' at a time; on the CPU even fewer distributions
            floats = 0 if scored_on.type == "cpu" else 4
            some = min(targets, rows_held(scored_on))
            logits = some * vocabulary * (3 * self.each + floats * _FLOAT)
        return held + scratch + logits + self._unpacked()

    def factors(self) -> int:
        """Activations and deltas of every edited layer, in float32."""
        widths = sum(layer.in_features + layer.out_features for layer in self.editor.layers)
        return len(self.edits) * self.terms * widths * _FLOAT

    def networks(self, graph: bool) -> int:
        """The editor's own activations: of all its blocks where the graph is kept, else of one."""
        rows, taken = sum(len(edit.edit.ids) for edit in self.edits), []
        for group in self.editor.groups.values():
            width = group[0].in_features + group[0].out_features
            rank = min(self.editor.config.rank, width)
            inner = (rank + 5 * width) * rows * len(group) * _FLOAT
            taken.append(2 * inner if graph else inner)
        return sum(taken) if graph else max(taken)

    def cached(self) -> int:
        """Hidden states where the edited blocks begin, last ones, factors of the edits."""
        texts = {t for e in self.edits for t in (e.edit, *e.equivalents, *e.locality)}
        kept = {t for e in self.edits for t in e.locality}
        rows = sum(len(text.ids) for text in texts) if self.start else 0
        rows += sum(len(text.targets) for text in kept)
        return int(rows * self.width * self.each) + self.factors()

    def _unpacked(self) -> int:
        """The largest quantised matrix, which is made dense to be used."""
        packed = [p.numel() for p in self.lm.model.parameters() if _is_packed(p)]
        return max(packed, default=0) * self.each


def _lengths(lm: LanguageModel, texts: Sequence[Tokens]) -> tuple[int, int]:
    """Padded tokens read by the first stack, and by a decoder that has an encoder."""
    return max(len(text.ids) for text in texts), max(len(text.targets) for text in texts)


def _linears(block: nn.Module) -> list[tuple[int, int]]:
    return [shape for module in block.modules() if (shape := linear_shape(module))]


def _is_packed(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "quant_type")


def _held(parameter: nn.Parameter) -> int:
    each = _FOUR_BIT if _is_packed(parameter) else parameter.itemsize
    return int(parameter.numel() * each)
