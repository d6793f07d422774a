"""ROME: a fact as a rank-1 change of one MLP (Meng et al. 2022, arXiv 2202.05262, 3.1)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from workbench.cancel import checkpoint
from workbench.copies import shallow
from workbench.corpus import SENTENCES, facts
from workbench.editors.base import descend, register
from workbench.editors.proposals import EditRequest, Proposal, gradient_factors
from workbench.encoding import (
    Batch,
    Tokens,
    as_read,
    collate,
    encode,
    sequence_nll,
    span_of,
    tokenize,
    tokenize_text,
)
from workbench.errors import EditorError, ModelError
from workbench.files import read_tensors, write_tensors
from workbench.layers import EditableLayer
from workbench.models import LanguageModel, cache_folder
from workbench.updates import LayerUpdate, Update
from workbench.views import LayerInputs, Trunk


@dataclass(frozen=True, kw_only=True)
class RomeConfig:
    """Settings of ROME.

    Args:
        block: The block whose MLP is changed, negative ones count from the top; None: the one a
            fifth of the way up (in the paper 5 of 28 for GPT-J, 17 of 48 for GPT-2 XL).
        prefixes: Beginnings of sentences put before the prompt, one at a time, so that key and
            value hold in any context.
        prefix_words: Words of each.
        lr: Adam's learning rate for the value, in root mean squares of what the layer writes.
        max_steps: Most steps taken for the value.
        enough: Loss of the target, nats a token, at which they end.
        c_essence: Weight of the KL that keeps what the model says after "SUBJECT is a".
        c_norm: Weight of the value's change over the square of what the layer writes (lengths).
        clamp: Longest change of the value, in lengths of what the layer writes.
        texts: Built-in texts from which the covariance of the layer's inputs is gathered.
        ridge: Added to its diagonal, in medians of the diagonal.
        seed: Draws the prefixes and the texts.
    """

    block: int | None = None
    prefixes: int = 3
    prefix_words: int = 5
    lr: float = 0.5
    max_steps: int = 25
    enough: float = 0.1
    c_essence: float = 0.0625
    c_norm: float = 0.5
    clamp: float = 4.0
    texts: int = 1000
    ridge: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_steps", "texts", "prefix_words")
        positive = ("lr", "clamp", "ridge")
        if (
            min(getattr(self, n) for n in counts) < 1
            or min(getattr(self, n) for n in positive) <= 0
        ):
            raise EditorError(
                f"{', '.join(counts)} must be at least 1, {', '.join(positive)} positive; got "
                f"{self}."
            )
        if not 0 <= self.prefixes <= len(SENTENCES):
            raise EditorError(f"prefixes must be 0 to {len(SENTENCES)}; got {self.prefixes}.")


@register
class Rome:
    """Rank-one model editing: the MLP as a memory in which a subject's key gets another value.

    The update is `dW = (v* - W k) (C^-1 k*)^T / (k^T C^-1 k*)` (equation 2): of all changes that
    send a key to the value v*, the one that moves other inputs least, C being their uncentred
    covariance. As in the published code k* is the mean over contexts, and k the key in the bare
    prompt, which so gets v* exactly. Several requests are solved for together, each key k a
    constraint of its own: `dW = D^T (K* C^-1 K^T)^-1 K* C^-1`, the keys and the changes of value
    D as rows.

    Args:
        lm: The frozen model, a decoder.
        config: Settings; None: the defaults.

    Raises:
        EditorError: The model is no decoder, or the block's MLP has no down projection of its own.
    """

    name: ClassVar[str] = "rome"

    def __init__(self, lm: LanguageModel, config: RomeConfig | None = None) -> None:
        self.lm, self.config = lm, config or RomeConfig()
        self.layer = _down_projection(lm, self.config.block)
        self.layers: tuple[EditableLayer, ...] = (self.layer,)
        self._inputs = LayerInputs(lm, self.layer)

    @classmethod
    def from_settings(cls, lm: LanguageModel, settings: Mapping[str, Any]) -> Self:
        """Make the editor from its configuration as JSON values."""
        return cls(lm, RomeConfig(**settings))

    def settings(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return asdict(self.config)

    def propose(self, requests: Sequence[EditRequest]) -> Proposal:
        """Find each request's key and value, and the least change that joins them.

        Raises:
            EditError: A value's loss is not finite.
            Cancelled: See `cancellable`.
        """
        tokens, factors = gradient_factors(self.lm, self.layers, requests)
        found = [self._solve(request) for request in requests]
        own, keys, changes = (torch.stack(side).double() for side in zip(*found, strict=True))
        whitened = torch.cholesky_solve(keys.mT, self._cholesky).mT
        # Keys too alike to be told apart share the mean of their changes.
        rows = torch.linalg.pinv(whitened @ own.mT, rtol=1e-4) @ whitened
        update = Update({self.layer.name: LayerUpdate(rows.float(), changes.float())})
        return Proposal(update, self.layers, tokens, factors)

    def _solve(self, request: EditRequest) -> tuple[Tensor, Tensor, Tensor]:
        """The keys k and k*, `(in,)` (equation 3), and the change of value v* - W k, `(out,)`."""
        subject, lm = find_subject(request), self.lm
        prompts = [start + request.prompt for start in self._starts(request)]
        essence = f"{subject} is a"
        texts = [tokenize(lm, prompt, request.target) for prompt in prompts]
        texts.append(Tokens(tuple(encode(lm, as_read(lm, essence))["input_ids"]), (0,)))
        batch = collate(lm, texts)
        columns = [span_of(lm, text, subject)[1] for text in (*prompts, essence)]
        inputs = self._inputs(batch)
        places = torch.zeros(*inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        places[range(len(texts)), columns] = True
        keys = inputs[places].float()
        return keys[0], keys[:-1].mean(0), self._change(batch, places, keys[:1].to(inputs))

    def _starts(self, request: EditRequest) -> list[str]:
        """What is put before the prompt: nothing, then the prefixes."""
        chooser = random.Random(f"{self.config.seed}:{request.prompt}")
        drawn = chooser.sample(SENTENCES, self.config.prefixes)
        return ["", *(" ".join(text.split()[: self.config.prefix_words]) + ". " for text in drawn)]

    def _change(self, batch: Batch, places: Tensor, key: Tensor) -> Tensor:
        """What to add to the layer's output at the subject (equation 4), `(out,)`.

        Args:
            batch: The request after each prefix, then the essence prompt.
            places: Each sequence's subject, `(batch, tokens)` bool.
            key: The layer's input at the first sequence's subject, `(1, in)`.
        """
        config, layer = self.config, self.layer
        with torch.no_grad():
            length = layer.module(key).float().norm()
        free = torch.zeros(layer.out_features, device=places.device, requires_grad=True)
        shifted = _Shifted(layer.module, places)
        view = shallow(self.lm.model, {layer.name: shifted})
        trunk = Trunk(replace(self.lm, model=view), self.layers)
        hidden = trunk.hidden(batch)

        def change() -> Tensor:
            return free * (config.clamp * length / free.detach().norm()).clamp(max=1)

        def logits() -> Tensor:
            shifted.shift = change()
            return trunk.logits(batch, hidden).float()

        with torch.no_grad():
            essence = log_softmax(logits()[-1], -1)

        def look() -> tuple[Tensor, bool]:
            found = logits()
            nll = sequence_nll(found, batch)[:-1].mean()
            now = log_softmax(found[-1], -1)
            drift = kl_div(essence, now, reduction="sum", log_target=True)
            loss = nll + config.c_essence * drift + config.c_norm * change().norm() / length**2
            return loss, bool(nll < config.enough)

        lr = config.lr * float(length) * layer.out_features**-0.5
        descend(torch.optim.Adam([free], lr=lr), config.max_steps, look)
        return change().detach()

    @cached_property
    def _cholesky(self) -> Tensor:
        """The factor of C, with its ridge, `(in, in)` float64."""
        moment = input_moment(self._inputs, self.config.texts, self.config.seed).double()
        moment.diagonal().add_(self.config.ridge * moment.diagonal().median())
        return torch.linalg.cholesky(moment)


class _Shifted(nn.Module):
    """A layer with a shift added to its output at some tokens, `(batch, tokens)` bool."""

    shift: Tensor

    def __init__(self, layer: nn.Module, places: Tensor) -> None:
        super().__init__()
        self.layer, self.places = layer, places.unsqueeze(-1)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.layer(inputs)
        return output + (self.places * self.shift).view_as(output).to(output.dtype)


def input_moment(inputs: LayerInputs, texts: int, seed: int) -> Tensor:
    """C, the uncentred covariance of what a layer reads of built-in sentences and facts.

    Kept in the user's cache folder, by the weights' fingerprint and what was read.

    Args:
        inputs: Gives what the layer reads.
        texts: How many texts; every token counts.
        seed: Draws the facts.

    Returns:
        `(in, in)`, float32.

    Raises:
        Cancelled: See `cancellable`.
    """
    read = _texts(inputs.lm, texts, seed)
    digest = sha256(str([text.ids for text in read]).encode()).hexdigest()[:12]
    name = f"{inputs.lm.fingerprint()}-{inputs.layer.name}-{digest}".replace(":", "-")
    file = cache_folder() / "moments" / f"{name}.safetensors"
    if not file.is_file():
        write_tensors(file, {"moment": _gather(inputs, read)}, {})
    return read_tensors(file, EditorError)[0]["moment"].to(inputs.lm.device)


def _texts(lm: LanguageModel, count: int, seed: int) -> list[Tokens]:
    told = [f"{fact.prompt} {fact.target_true}" for fact in facts() if fact.split == "train"]
    drawn = random.Random(seed).sample(told, min(max(0, count - len(SENTENCES)), len(told)))
    return [tokenize_text(lm, text) for text in (*SENTENCES, *drawn)[:count]]


def _gather(inputs: LayerInputs, texts: Sequence[Tokens], size: int = 32) -> Tensor:
    """The mean of `k k^T` over all tokens of the texts."""
    width, count = inputs.layer.in_features, 0
    moment = torch.zeros(width, width, device=inputs.lm.device)
    texts = sorted(texts, key=lambda text: len(text.ids))
    for start in range(0, len(texts), size):
        checkpoint()
        batch = collate(inputs.lm, texts[start : start + size])
        rows = inputs(batch)[batch.inputs["attention_mask"].bool()].float()
        moment.addmm_(rows.mT, rows)
        count += len(rows)
    return moment / count


def find_subject(request: EditRequest) -> str:
    """What a prompt is about, as it stands there.

    The request's own subject where the prompt holds it, in whatever case; else a guess: the
    longest run of capitalised words (the first word by itself only where there is no other), or
    the last word where there is none.
    """
    given = re.escape((request.subject or "").strip())
    if given and (found := re.findall(given, request.prompt, re.IGNORECASE)):
        return found[-1]
    words = list(re.finditer(r"\w[\w'-]*", request.prompt))
    grouped = [list(run) for _, run in groupby(words, lambda word: word[0][0].isupper())]
    runs = [request.prompt[run[0].start() : run[-1].end()] for run in grouped]
    named = [run for run in runs if run[0].isupper()]
    later = [run for run in named if " " in run or not request.prompt.startswith(run)]
    last = words[-1][0] if words else request.prompt.strip()
    return max(later or named, key=len, default=last)


def _down_projection(lm: LanguageModel, block: int | None) -> EditableLayer:
    """The layer through which a block's MLP writes to the residual stream."""
    if lm.kind != "causal":
        raise EditorError(
            f"ROME changes what a decoder recalls at a subject's last token before it goes on; "
            f"{lm.source} is a {lm.kind} model. Use editor='ft', 'ft_kl', 'lora' or 'mend'."
        )
    width = lm.model.config.get_text_config().hidden_size
    block = len(lm.stacks[-1].blocks) // 5 if block is None else block
    try:
        found = [layer for layer in lm.layers([block], "mlp") if layer.out_features == width]
        return found[-1]
    except (ModelError, IndexError) as error:
        raise EditorError(
            f"ROME changes the down projection of a block's MLP, and block {block} of {lm.source} "
            f"has none of its own ({error}). Choose another block, or use editor='ft'."
        ) from None
