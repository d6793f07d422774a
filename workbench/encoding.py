"""From texts to the tensors a model takes, and back to logits at the positions that matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from workbench.checks import check_text
from workbench.errors import EditError
from workbench.models import LanguageModel


@dataclass(frozen=True)
class Tokens:
    """One text as tokens: what is read, and which tokens are to be predicted.

    Args:
        ids: Token ids the model reads, without the last target token (nothing is predicted
            from it). For encoder-decoder models and classifiers: the prompt alone.
        targets: Ids to be predicted; for a classifier one class index.
        subject: Where the first and the last token stand of what the text is about, for editors
            that ask; None: not told.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    subject: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Several `Tokens` as right-padded tensors.

    Args:
        inputs: What the model's forward takes.
        rows: Sequence of each target position, `(n,)`.
        columns: Position whose logits predict the target, `(n,)`.
        targets: Target ids, `(n,)`.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    targets: Tensor

    @property
    def size(self) -> int:
        return self.inputs["input_ids"].shape[0]


def tokenize(lm: LanguageModel, prompt: str, target: str) -> Tokens:
    """Tokenise a prompt and the target that should follow it.

    Args:
        lm: The model whose tokenizer is used.
        prompt: Text that is read, in a chat a user's turn. For decoders a space joins it to the
            target where neither brings white space of its own, nor the template none.
        target: Text to be predicted; for a classifier the label's name.

    Raises:
        EditError: The prompt is blank, the target has no tokens or is no label of the
            classifier, or the text is longer than the model reads.
    """
    check_text(target, "target")
    check_text(prompt, "prompt")
    if not target.strip():
        raise EditError("The target is empty. Say what the model should answer, e.g. 'Lyon'.")
    if not prompt.strip():
        raise EditError("The prompt is empty. Give the text that the target should follow.")
    tokenizer = lm.tokenizer
    if lm.kind == "classifier":
        label = _label(lm, target)
        if label is None:
            raise EditError(
                f"{target!r} is no label of this classifier. Its labels: "
                f"{', '.join(label_names(lm))}."
            )
        tokens = Tokens(tuple(tokenizer(prompt)["input_ids"]), (label,))
    elif lm.kind == "seq2seq":
        answer = tokenizer(text_target=target)["input_ids"]
        tokens = Tokens(tuple(tokenizer(prompt)["input_ids"]), tuple(answer))
    else:
        read = as_read(lm, prompt)
        apart = not (read[-1].isspace() or target[0].isspace() or _at_once(lm, prompt, target))
        joined = f"{read} {target}" if apart else read + target
        encoded = encode(lm, joined, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        # Byte-level tokens own the space before them: a token is the target's if it ends in it.
        owned = [i for i, (start, end) in enumerate(spans) if end > max(start, len(read))]
        tokens = Tokens(tuple(ids[:-1]), tuple(ids[max(owned[0], 1) :] if owned else ()))
    if not tokens.targets:
        raise EditError(f"The tokenizer finds no token of its own in the target {target!r}.")
    limit = reads_at_most(lm)
    longest = max(len(tokens.ids), len(tokens.targets))
    if limit and longest > limit:
        raise EditError(
            f"The text has {longest} tokens; this model reads at most {limit}. Shorten it."
        )
    return tokens


def as_read(lm: LanguageModel, prompt: str) -> str:
    """A prompt as the model reads it: as it stands, or as a chat up to where the answer begins."""
    return _conversation(lm, prompt) if lm.chat else prompt


def encode(lm: LanguageModel, text: str | list[str], **options: Any) -> Any:
    """The tokenizer's encoding of texts as read; a chat template brings its special tokens."""
    return lm.tokenizer(text, add_special_tokens=not lm.chat, **options)


def span_of(lm: LanguageModel, prompt: str, part: str) -> tuple[int, int]:
    """Where the first and the last token of a part of a prompt stand; of its last occurrence."""
    read, text = as_read(lm, prompt), prompt.strip()  # as a chat template would
    begin = read.rindex(text) + text.rindex(part)
    spans = encode(lm, read, return_offsets_mapping=True)["offset_mapping"]
    inside = [
        place
        for place, (start, stop) in enumerate(spans)
        if max(start, begin) < min(stop, begin + len(part))
    ]
    return inside[0], inside[-1]


def _conversation(lm: LanguageModel, prompt: str, answer: str | None = None) -> str:
    turns = [{"role": "user", "content": prompt}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return cast(
        str,
        lm.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None
        ),
    )


def _at_once(lm: LanguageModel, prompt: str, target: str) -> bool:
    """Whether a chat's answers follow what opens them without a space."""
    return lm.chat and _conversation(lm, prompt, target).startswith(as_read(lm, prompt) + target)


def reads_at_most(lm: LanguageModel) -> int | None:
    """How many tokens the model has positions for; None: any number."""
    return getattr(lm.model.config, "max_position_embeddings", None)


def first_token(lm: LanguageModel, prompt: str, target: str) -> Tokens:
    """Tokenise a prompt and of its target the first token alone: what a model makes of the prompt
    before it has read any of the target."""
    text = tokenize(lm, prompt, target)
    cut = len(text.targets) - 1 if lm.kind == "causal" else 0
    return Tokens(text.ids[: len(text.ids) - cut], text.targets[:1])


def tokenize_text(lm: LanguageModel, text: str, max_tokens: int = 32) -> Tokens:
    """Tokenise a plain text of which every token after the first is to be predicted."""
    ids = lm.tokenizer(text)["input_ids"][: max_tokens + 1]
    if len(ids) < 2:
        raise EditError(f"A text needs at least two tokens; {text!r} has {len(ids)}.")
    return Tokens(tuple(ids[:-1]), tuple(ids[1:]))


def label_names(lm: LanguageModel) -> list[str]:
    """A classifier's labels, in order."""
    named: dict[Any, Any] = lm.model.config.id2label or {}
    return [str(named[index]) for index in sorted(named)]


def has_label(lm: LanguageModel, target: str) -> bool:
    """Whether a classifier has a label of that name, or of the same verdict."""
    return _label(lm, target) is not None


def _label(lm: LanguageModel, target: str) -> int | None:
    wanted = _verdict(target)
    return next((i for i, name in enumerate(label_names(lm)) if _verdict(name) == wanted), None)


def _verdict(name: str) -> str:
    """Fact checkers name their labels in two ways."""
    name = name.strip().lower()
    return {"supports": "true", "supported": "true", "refutes": "false", "refuted": "false"}.get(
        name, name
    )


def collate(lm: LanguageModel, texts: Sequence[Tokens]) -> Batch:
    """Pad texts on the right into one batch on the model's device."""
    pad = cast(int, lm.tokenizer.pad_token_id)
    input_ids, mask = padded([text.ids for text in texts], pad)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if lm.kind == "causal":
        columns = [range(len(t.ids) - len(t.targets), len(t.ids)) for t in texts]
    else:
        columns = [range(len(t.targets)) for t in texts]
    if lm.kind == "seq2seq":
        start = lm.model.config.decoder_start_token_id
        inputs["decoder_input_ids"], _ = padded([(start, *t.targets[:-1]) for t in texts], pad)
    rows = [row for row, text in enumerate(texts) for _ in text.targets]
    flat = [column for span in columns for column in span]
    targets = [target for text in texts for target in text.targets]
    device = lm.device
    return Batch(
        {name: tensor.to(device) for name, tensor in inputs.items()},
        *(torch.tensor(values, device=device) for values in (rows, flat, targets)),
    )


def passes(
    lm: LanguageModel, texts: Sequence[Tokens], device: torch.device | None = None
) -> list[list[int]]:
    """Split texts into batches, by index: those that a device runs through fastest.

    Args:
        lm: The model.
        texts: At least one.
        device: None: the model's.
    """
    return length_groups(texts, 96 if (device or lm.device).type == "cpu" else 4096)


def length_groups(texts: Sequence[Tokens], overhead: int) -> list[list[int]]:
    """Split texts into batches of like lengths, so that little padding is computed.

    Args:
        texts: At least one.
        overhead: What one more forward pass costs, in tokens.

    Returns:
        Indices of each batch's texts; the cheapest split, by padded tokens and passes.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    ends = [  # a batch of the best split ends where a length does
        end
        for end in range(1, len(order) + 1)
        if end == len(order) or len(texts[order[end]].ids) > len(texts[order[end - 1]].ids)
    ]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for end in ends:
        longest = len(texts[order[end - 1]].ids)
        best[end] = min(
            (cost + (end - start) * longest + overhead, [*cuts, end])
            for start, (cost, cuts) in best.items()
        )
    cuts = [0, *best[len(order)][1]]
    return [order[start:end] for start, end in pairwise(cuts)]


def padded(
    sequences: Sequence[Sequence[int]], pad: int, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Pad token ids into one tensor, and say where they are.

    A fast tokenizer holds how it pads and cuts as state, which threads that share it would change
    under one another: tokenizers are called without, and padding is done here.

    Args:
        sequences: At least one.
        pad: Id that fills.
        left: Whether the filling comes first.

    Returns:
        Ids and their mask (1: a text's own), `(sequences, longest)` each, int64, on the CPU.
    """
    side = "left" if left else "right"
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
    return pad_sequence(ids, True, pad, side), mask


def sequence_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of each sequence's target tokens, `(batch,)`.

    Args:
        logits: At the batch's target positions, `(n, vocabulary)`.
        batch: Where they belong.
    """
    losses = cross_entropy(logits.float(), batch.targets, reduction="none")
    return per_sequence_mean(losses, batch)


def per_sequence_sum(values: Tensor, batch: Batch) -> Tensor:
    """Sum values at target positions, `(n,)`, over each sequence, `(batch,)`."""
    return values.new_zeros(batch.size).index_add(0, batch.rows, values)


def per_sequence_mean(values: Tensor, batch: Batch) -> Tensor:
    """Average values at target positions, `(n,)`, over each sequence, `(batch,)`."""
    sums = per_sequence_sum(values, batch)
    counts = per_sequence_sum(torch.ones_like(values), batch)
    return sums / counts.clamp(min=1)
