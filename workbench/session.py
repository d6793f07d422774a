"""The workbench: what a user holds. Edit, inspect, undo, compare, save; it knows no screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import torch

from workbench.adapters import export_peft, import_peft
from workbench.aggregate import Aggregation, propose_together
from workbench.checks import check_list, check_text
from workbench.compare import compare_prompts, generate_texts
from workbench.edit import Edit
from workbench.editors import Editor, EditRequest, Proposal, open_editor, with_chat
from workbench.errors import EditError
from workbench.history import History
from workbench.masks import TokenTable, token_table
from workbench.models import LanguageModel, Quantization, open_model
from workbench.overlay import overlay
from workbench.probes import Probe, suggest
from workbench.probing import probe_requests
from workbench.report import ProbeReport
from workbench.results import Comparison, EditTrace, Overlap, overlap_of
from workbench.sessionfile import SavedEdit, read_session, write_session
from workbench.shortage import memory_errors
from workbench.updates import Update

_PAIRS = "pairs of prompt and target, e.g. [('The capital of France is', 'Lyon')]"


class Workbench(History):
    """A frozen model, an editor, and one user's live edits.

    Args:
        lm: The model; may be shared with other workbenches. What is edited is the editor's own,
            which over a trained base (ENN) is a view of it.
        editor: Turns requests into updates; may be shared too.
        most_bytes: Of edits that are kept: beyond, undo forgets the oldest actions, and an edit
            that does not fit beside the live ones is refused.
    """

    def __init__(self, lm: LanguageModel, editor: Editor, most_bytes: float = inf) -> None:
        super().__init__(most_bytes)
        self.lm, self.editor = editor.lm, editor

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        *,
        editor: str | Path | None = None,
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        quantize: Quantization | None = None,
        device_map: str | dict[str, Any] | None = None,
        chat: bool = False,
        progress: bool = True,
    ) -> Workbench:
        """Open a model and an editor.

        Args:
            model: Hub id, folder or GGUF file; None: the embedded default.
            editor: A trained editor's folder, or its hub id, "owner/name" or
                "owner/name@revision"; or the name of one that needs no training: "ft", "ft_kl",
                "rome", "lora"; None: the default model's trained editor, or
                fine-tuning for other models.
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
            dtype: Of the weights; None: float32 on CPU, bfloat16 on CUDA.
            quantize: None, "8bit" or "4bit" (bitsandbytes).
            device_map: "auto" spreads a large model over several devices; see `open_model`.
            chat: Prompts are a user's turns, read through the model's chat template, and targets
                what the assistant should say.
            progress: Show a bar while the default model is unpacked for the first time.

        Raises:
            ModelError: The model cannot be opened or edited, or has no chat template.
            EditorError: The editor cannot be opened or does not fit the model.
        """
        lm = open_model(
            model,
            device=device,
            dtype=dtype,
            quantize=quantize,
            device_map=device_map,
            chat=chat,
            progress=progress,
        )
        return cls(lm, open_editor(editor, lm))

    def fork(self, *, edits: bool = False, chat: bool | None = None) -> Workbench:
        """Another workbench over the same model and editor.

        Args:
            edits: With this one's edits and history, which then go separate ways.
            chat: Whether it reads prompts through the chat template; None: as this one does.

        Raises:
            ModelError: The model has no chat template.
        """
        editor = self.editor if chat is None else with_chat(self.editor, chat)
        bench = Workbench(editor.lm, editor, self.most_bytes)
        if edits:
            bench._take_after(self)
        return bench

    def __repr__(self) -> str:
        live = sum(entry.enabled for entry in self.history)
        return f"Workbench({self.lm.source}, editor={self.editor.name}, live edits={live})"

    # Making edits

    def edit(self, prompt: str, target: str, subject: str | None = None) -> Edit:
        """Make the model say `target` after `prompt`; the edit acts at once.

        Args:
            prompt: What the model reads, e.g. "The capital of France is".
            target: What it should say next, e.g. "Lyon".
            subject: What the prompt is about, a part of it, e.g. "France", for editors that ask
                (the default one, ROME); None: guessed.

        Raises:
            EditError: The request cannot be carried out; nothing has changed.
        """
        return self.edit_many([EditRequest(prompt, target, subject)])

    @memory_errors()
    def edit_many(
        self,
        requests: Sequence[tuple[str, str] | EditRequest],
        aggregation: Aggregation = "sum",
        damping: float = 0.003,
    ) -> Edit:
        """Carry out several requests in one update (the paper's batched edits).

        Args:
            requests: Pairs (prompt, target), at least one.
            aggregation: "sum" (the paper), "ridge" or "sequence"; see `propose_together`.
            damping: Of "ridge".

        Raises:
            EditError: A request cannot be carried out; nothing has changed.
            OutOfMemory: It takes more memory than there is; nothing has changed.
        """
        asked = tuple(map(_request, check_list(requests, _PAIRS)))
        start = time.perf_counter()
        proposal = propose_together(self.editor, asked, aggregation, damping)
        seconds = time.perf_counter() - start
        if not proposal.update.is_finite():
            raise EditError(
                "The editor gave numbers that are not finite; nothing was changed. The editor may "
                "not fit this model: open the one trained for it, or use editor='ft'."
            )
        return self._push(asked, proposal.update, seconds, proposal)

    @memory_errors()
    def add_peft(self, folder: str | Path) -> Edit:
        """Take a PEFT LoRA adapter folder in as an edit.

        Raises:
            EditError: No adapter that can be read there, or it does not fit the model.
            OutOfMemory: It takes more memory than there is; nothing has changed.
        """
        start = time.perf_counter()
        update = import_peft(folder, self.lm)
        return self._push((), update, time.perf_counter() - start, None)

    def _push(
        self,
        requests: tuple[EditRequest, ...],
        update: Update,
        seconds: float,
        origin: Proposal | EditTrace | None,
    ) -> Edit:
        update = update.to(self.lm.device)  # of a model on several, layers lie elsewhere
        edit = Edit(self._next_id, requests, update, seconds, self.lm, origin)
        self._add(edit)
        return edit

    # Looking

    @contextmanager
    def applied(self) -> Iterator[torch.nn.Module]:
        """The edited model, inside a `with`: any transformers code may run it, in this thread."""
        with overlay(self.lm.model, self.update):
            yield self.lm.model

    def inspect(self, edit: Edit | int) -> EditTrace:
        """Why an edit does what it does: factors before and after the editor, layer by layer.

        Raises:
            EditError: The edit is unknown, or an imported adapter, which has no factors.
        """
        found = edit if isinstance(edit, Edit) else self.get(edit)
        if found.trace is None:
            raise EditError(f"Edit {found.id} was imported as an adapter: it has no factors.")
        return found.trace

    @memory_errors()
    def overlap(self) -> Overlap:
        """How far the live edits write in each other's direction, whether on or off."""
        return overlap_of({f"{edit.id} · {edit.title}": edit.update for edit in self.edits})

    @memory_errors()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        edited: bool = True,
        max_new_tokens: int = 16,
        **options: Any,
    ) -> list[str]:
        """Continue prompts, greedily unless options say otherwise.

        Args:
            prompts: One or several.
            edited: With all live edits; False: the base model.
            max_new_tokens: Length of the continuation.
            options: For transformers' `generate`: sampling, beams, stops, a `generation_config`.

        Returns:
            The continuations, without the prompts: `num_return_sequences` of each.

        Raises:
            EditError: A prompt or an option cannot be taken, or the model generates no text.
            OutOfMemory: It takes more memory than there is.
        """
        texts = [prompts] if isinstance(prompts, str) else check_list(prompts, "texts to continue")
        with overlay(self.lm.model, self.update if edited else None):
            return generate_texts(self.lm, texts, max_new_tokens, **options)

    @memory_errors()
    def compare(
        self,
        prompts: str | Sequence[str | Probe],
        *,
        target: str | None = None,
        max_new_tokens: int = 12,
        watch: Callable[[Comparison], object] | None = None,
    ) -> Comparison:
        """Base and edited text, and the target's probability under both, in one pass for both.

        Args:
            prompts: Texts, or probes, which bring their own kind and target.
            target: Whose probability to give for plain texts; None: the last edit's target.
            max_new_tokens: Length of the continuations.
            watch: Called with the rows so far, as their texts grow token by token.

        Raises:
            EditError: A prompt cannot be read, or is too long with its continuation.
            OutOfMemory: It takes more memory than there is.
        """
        wanted = "texts or probes to compare"
        listed = [prompts] if isinstance(prompts, str) else check_list(prompts, wanted)
        if target is None:
            requests = [r for edit in self.edits for r in edit.requests]
            target = requests[-1].target if requests else None
        probes = [p if isinstance(p, Probe) else Probe(p, "other", target) for p in listed]
        return compare_prompts(self.lm, self.update, probes, max_new_tokens, watch)

    def tokens(self, prompt: str, target: str) -> TokenTable:
        """What an edit's text is to the model: each token, and whether its loss would count.

        Raises:
            EditError: No edit can be made of them; nothing has changed.
        """
        return token_table(self.lm, [(prompt, target)])

    def suggest(self, prompt: str, target: str) -> tuple[Probe, ...]:
        """Prompts to look at for an edit: itself, equivalents, neighbours, unrelated ones.

        Raises:
            EditError: Prompt or target is no text.
        """
        return suggest(prompt, target)

    @memory_errors()
    def probe(
        self,
        edits: Edit | int | Sequence[Edit | int],
        *,
        max_new_tokens: int = 8,
        watch: Callable[[int, int], object] | None = None,
    ) -> ProbeReport:
        """How far one edit or several reach, and how far they should: some 40 probes for each.

        Runs with all live edits, those in question among them.

        Args:
            edits: One or several, or their ids; each request of theirs is probed.
            max_new_tokens: Length of the continuations.
            watch: Called with how many probes are done, and of how many.

        Raises:
            EditError: An edit is unknown, or an imported adapter, which names no prompt.
        """
        wanted = "edits or their ids"
        asked = [edits] if isinstance(edits, Edit | int) else check_list(edits, wanted)
        found = [edit if isinstance(edit, Edit) else self.get(edit) for edit in asked]
        for edit in found:
            if not edit.requests:
                raise EditError(f"Edit {edit.id} was imported as an adapter: it names no prompt.")
        requests = [request for edit in found for request in edit.requests]
        return probe_requests(self.lm, self.update, requests, max_new_tokens, watch)

    # Files

    def save(self, folder: str | Path) -> Path:
        """Write the session into a folder: its live edits and their updates.

        Raises:
            FileError: The folder cannot be written, or the disk is full.
        """
        edits = [
            SavedEdit(
                edit.requests, edit.update, edit.trace, edit.seconds, entry.enabled, entry.strength
            )
            for edit, entry in zip(self.edits, self.history, strict=True)
        ]
        return write_session(folder, self.lm, self.editor, edits)

    @classmethod
    @memory_errors()
    def load(
        cls, folder: str | Path, *, workbench: Workbench | None = None, **options: Any
    ) -> Workbench:
        """Open a saved session.

        Args:
            folder: Written by `save`.
            workbench: Take model and editor from this one, instead of opening them anew; prompts
                are read as the session's were, whatever this one does.
            options: For `open_model`; without any, precision and chat are those of the session.

        Raises:
            EditError: No readable session there, or it was made over another model.
            ModelError: It is a chat's, and the model has no chat template.
            OutOfMemory: It takes more memory than there is.
        """
        saved = read_session(folder)
        chat = saved.chat
        if workbench is None:
            opened = open_model(saved.model, **saved.opening | options)
            workbench, chat = cls(opened, saved.open_editor(opened)), opened.chat
        saved.check(workbench.lm)
        bench = workbench.fork(chat=chat)
        for item in saved.edits:
            edit = bench._push(item.requests, item.update, item.seconds, item.trace)
            if not item.enabled:
                bench.toggle(edit.id)
            if item.strength != 1.0:
                bench.strength(edit.id, item.strength)
        return bench

    @memory_errors()
    def to_peft(self, folder: str | Path) -> Path:
        """Write the edits that are on, each at its strength, as one PEFT LoRA adapter folder.

        Raises:
            EditError: There is none, or one that no adapter can carry.
            FileError: The folder cannot be written, or the disk is full.
        """
        if not self.update:
            raise EditError("There is no live edit to export: make one, or switch one on.")
        titles = [entry.title for entry in self.history if entry.enabled]
        return export_peft(self.update, self.lm, folder, titles)


def _request(given: object) -> EditRequest:
    """One request, from itself or from its parts."""
    if isinstance(given, tuple | list) and len(given) in (2, 3):
        given = EditRequest(*given)
    if not isinstance(given, EditRequest):
        raise EditError(f"Give {_PAIRS}; among them is {given!r:.80}.")
    check_text(given.prompt, "prompt")
    check_text(given.target, "target")
    if given.subject is not None:
        check_text(given.subject, "subject")
    return given
