"""The mask of an edit's loss, to be looked at: which tokens are read, and which are to be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from workbench.encoding import collate, label_names, tokenize
from workbench.models import LanguageModel

Role = Literal["prompt", "target", "padding"]
_COLUMNS = ("", "id", "token", "role")
_STYLE = {
    "prompt": "",
    "target": "font-weight: bold; background: rgba(255, 190, 60, .35)",
    "padding": "opacity: .5",
}


@dataclass(frozen=True)
class ShownToken:
    """One token of an edit's text.

    Args:
        position: Where it stands, from 0; an encoder's prompt and a decoder's target each begin
            anew.
        id: In the vocabulary; of a classifier's target, the label's index.
        text: What it spells.
        role: "prompt": read. "target": to be said; its loss counts. "padding": neither.
    """

    position: int
    id: int
    text: str
    role: Role


@dataclass(frozen=True)
class TokenTable:
    """Texts of edits, token by token, as one batch holds them; printed as a table.

    Args:
        texts: One row of tokens for each edit.
    """

    texts: tuple[tuple[ShownToken, ...], ...]

    def of_role(self, role: Role) -> tuple[ShownToken, ...]:
        """The tokens of one role, in order."""
        return tuple(token for text in self.texts for token in text if token.role == role)

    def __str__(self) -> str:
        cells = [[_COLUMNS, *map(_cells, text)] for text in self.texts]
        widths = [max(len(row[i]) for rows in cells for row in rows) for i in range(len(_COLUMNS))]
        return "\n\n".join(
            "\n".join(
                f"{row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}"
                for row in rows
            )
            for rows in cells
        )

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
        bodies = (
            "".join(
                f'<tr style="{_STYLE[token.role]}">'
                f"{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(token))}</tr>"
                for token in text
            )
            for text in self.texts
        )
        return "".join(
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" for body in bodies
        )


def token_table(lm: LanguageModel, requests: Sequence[tuple[str, str]]) -> TokenTable:
    """Texts of edits as a batch gives them to the model, read off its masks.

    Args:
        lm: The model.
        requests: Pairs (prompt, target), at least one.

    Raises:
        EditError: As `tokenize` does.
    """
    batch = collate(lm, [tokenize(lm, prompt, target) for prompt, target in requests])
    read, mask = (batch.inputs[name].tolist() for name in ("input_ids", "attention_mask"))
    table = []
    for row, (ids, live) in enumerate(zip(read, mask, strict=True)):
        own = batch.rows == row
        roles: list[Role] = ["prompt" if on else "padding" for on in live]
        tokens = list(zip(range(len(ids)), ids, roles, strict=True))
        # A decoder reads its targets, each one place after that which predicts it; its last one
        # is read no more. Other models have them apart.
        causal = lm.kind == "causal"
        first = int(batch.columns[own][0]) + 1 if causal else 0
        said = [(first + i, id, "target") for i, id in enumerate(batch.targets[own].tolist())]
        end = first + len(said)
        tokens = [*tokens[:first], *said, *tokens[end:]] if causal else [*tokens, *said]
        table.append(tuple(_shown(lm, *token) for token in tokens))
    return TokenTable(tuple(table))


def _shown(lm: LanguageModel, position: int, id: int, role: Role) -> ShownToken:
    if lm.kind == "classifier" and role == "target":
        return ShownToken(position, id, label_names(lm)[id], role)
    return ShownToken(position, id, str(lm.tokenizer.decode([id])), role)


def _cells(token: ShownToken) -> tuple[str, ...]:
    """A token as text: its spelling quoted, so that blanks and line ends are seen."""
    return str(token.position), str(token.id), repr(token.text), token.role
