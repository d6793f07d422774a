"""What an editor is: whatever turns a model and edit requests into an update."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from workbench.cancel import checkpoint
from workbench.cards import model_card
from workbench.checks import path_of
from workbench.editors.proposals import CapturedEdits, EditRequest, Proposal
from workbench.errors import EditError, EditorError, FileError
from workbench.files import MALFORMED, read_metadata, read_tensors, write_tensors, write_text
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.sharing import ABOUT, CARD, TENSORS, is_id, known_as, locate_editor, upload
from workbench.updates import Update

# What a saved editor must say of itself.
_ABOUT = {
    "editor": str,
    "settings": dict,
    "layers": list,
    "base_model": str,
    "base_fingerprint": str,
    "card": dict,
}


@runtime_checkable
class Editor(Protocol):
    """Turns edit requests into an update of a frozen model.

    `name` is the editor's name in commands and files; `layers` what it edits.
    """

    name: ClassVar[str]
    lm: LanguageModel
    layers: tuple[EditableLayer, ...]

    @classmethod
    def from_settings(cls, lm: LanguageModel, settings: Mapping[str, Any]) -> Self:
        """Make an editor from its settings as JSON values."""
        ...

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values."""
        ...

    def propose(self, requests: Sequence[EditRequest]) -> Proposal:
        """Make one update that carries out all requests; the model is left as it is."""
        ...


def descend(
    optimizer: torch.optim.Optimizer, steps: int, look: Callable[[], tuple[Tensor, bool]]
) -> None:
    """Take steps down a loss until it is low enough, or steps run out.

    Args:
        optimizer: Over what is learned; nothing else may require gradient.
        steps: Most steps taken.
        look: Computes the loss, 0-d, and says whether that is enough.

    Raises:
        EditError: The loss is not finite.
        Cancelled: See `cancellable`.
    """
    for _ in range(steps):
        checkpoint()
        with torch.enable_grad():
            loss, done = look()
        if not torch.isfinite(loss):
            raise EditError("The edit diverged: lower lr. Nothing was changed.")
        if done:
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


class TrainableEditor(nn.Module, ABC):
    """An editor with parameters of its own, kept in `editor.safetensors`.

    Args:
        lm: The model that its edits change.
        layers: Those of that model that they change.
        config: The editor's settings.
        original: The model before the editor's own training; None: that training leaves it alone.

    Attributes:
        config_class: Dataclass of its settings.
        training_defaults: Settings of training that do for it where `TrainingConfig`'s do not.
        second_order: Training differentiates through the gradient that an edit is made from.
        edit_lrs: The layers' step sizes, learned.
        card: What it was trained on and how it did, as JSON values.
        source: What it was opened from, a whole path or `owner/name@commit`; None if it was made in
            memory.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    training_defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        lm: LanguageModel,
        layers: tuple[EditableLayer, ...],
        config: Any,
        original: LanguageModel | None = None,
    ) -> None:
        super().__init__()
        self.lm, self.layers, self.config, self.original = lm, layers, config, original or lm
        self.second_order = False
        self.edit_lrs = nn.Parameter(
            torch.full((len(layers),), float(config.edit_lr), device=lm.device)
        )
        self.card: Mapping[str, Any] = {}
        self.source: str | None = None

    @classmethod
    def from_settings(cls, lm: LanguageModel, settings: Mapping[str, Any]) -> Self:
        """Make an untrained editor from its settings as JSON values."""
        return cls(lm, cls.config_class(**settings))  # type: ignore[call-arg]

    def _settle(self) -> None:
        """Go to the model's device, unless this is an outline, which holds no numbers."""
        if torch.get_default_device().type != "meta":
            self.to(self.lm.device)

    @property
    def trained(self) -> bool:
        """Whether it has learnt anything; the edits of one that has not are noise."""
        return True

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self.config)

    @property
    def scoped(self) -> bool:
        """Whether an edit acts only in texts about its subject, which it then asks for."""
        return False

    @property
    def trains_base(self) -> bool:
        """Whether edits are made over a trained base, other than the original model."""
        return self.original is not self.lm

    @abstractmethod
    def edit_batch(self, edits: CapturedEdits, *, gather: bool = False) -> Update:
        """One change for each edit of a batch, differentiable in the editor's parameters.

        Args:
            edits: What they are made from.
            gather: Take them into running statistics first, as training does.

        Returns:
            `(batch, rank, width)` factors in every layer; padding has terms that are zero.
        """

    @abstractmethod
    def learned(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, by the setting of `TrainingConfig` that is their learning rate."""

    def reset_statistics(self) -> None:
        """Forget what training has gathered to normalise by: an editor's buffers."""
        for buffer in self.buffers():
            buffer.zero_()

    @abstractmethod
    def propose(self, requests: Sequence[EditRequest]) -> Proposal:
        """Make one update that carries out all requests; the model is left as it is."""

    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> Path:
        """Write the editor into a folder: `editor.safetensors`, settings and card inside.

        That file is complete or the old one stays; `editor.json` repeats settings and card to be
        read.

        Args:
            folder: Made if it is not there.
            half: Store its matrices in float16, at half the size; they compute in float32 as
                before.

        Raises:
            FileError: The folder cannot be written, or the disk is full.
        """
        folder = path_of(folder, FileError)
        about = {
            "editor": self.name,
            "settings": self.settings(),
            "layers": [layer.name for layer in self.layers],
            "base_model": known_as(self.lm.source),
            "base_fingerprint": self.original.fingerprint(),
            "card": dict(self.card),
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        tensors = {
            name: (tensor.half() if half and tensor.dim() > 1 else tensor).contiguous()
            for name, tensor in self.state_dict().items()
        }
        write_tensors(folder / TENSORS, tensors, {"about": text})
        write_text(folder / ABOUT, text + "\n")
        return folder

    @classmethod
    def from_pretrained(cls, source: str | Path, lm: LanguageModel) -> Self:
        """Open a saved editor, over the model it was trained for.

        Warns with `UserWarning` where the base weights are others than those it was trained on.

        Args:
            source: Folder with `editor.safetensors`, or hub id, `owner/name` or
                `owner/name@revision`; see `locate_editor`.
            lm: The base model.

        Returns:
            An editor of the kind that was saved, which must be this class or one made from it.

        Raises:
            EditorError: No readable editor there, it is of another kind, or it does not fit the
                model's layers.
        """
        known, folder = locate_editor(source)
        tensors, metadata = read_tensors(folder / TENSORS, EditorError)
        about = _about(folder, metadata)
        kind = editor_class(about["editor"])
        base, fingerprint = about["base_model"], about["base_fingerprint"]
        if not issubclass(kind, TrainableEditor):
            raise EditorError(
                f"{source} names {kind.name!r}, an editor without parameters to load. Open it by "
                f"its name: editor={kind.name!r}."
            )
        if not issubclass(kind, cls):
            raise EditorError(
                f"{source} holds a {kind.name!r} editor: open it by {kind.__name__}."
                f"from_pretrained, or whatever it holds by TrainableEditor.from_pretrained."
            )
        try:
            with torch.device("meta"):  # settings may ask for any size: none is allocated yet
                outline = kind.from_settings(lm, about["settings"])
            found = [layer.name for layer in outline.layers]
            if found != (layers := about["layers"]):
                raise EditorError(f"it edits {layers!r:.80}, this model has {found!r:.80}")
            outline.load_state_dict(tensors, assign=True)  # refuses other names and shapes
            editor = kind.from_settings(lm, about["settings"])
            editor.load_state_dict(tensors)
        except Exception as error:  # settings of a damaged file can end an editor anywhere
            raise EditorError(
                f"The editor in {source} was trained for {base} and does not fit {lm.source}: "
                f"{error}"
            ) from None
        # The same weights held in another precision have other bits, which tell nothing.
        held_alike = fingerprint.partition(":")[0] == lm.precision
        of_others = fingerprint != lm.fingerprint() if held_alike else base != known_as(lm.source)
        if of_others:
            warnings.warn(
                f"The editor in {source} was trained over {base} with weights {fingerprint}; the "
                f"model that is open, {lm.source}, has weights {lm.fingerprint()}. Its edits can "
                f"fail or spread: train an editor for these weights, or use editor='ft'.",
                stacklevel=2,
            )
        editor.card, editor.source = about["card"], known
        return editor.eval()

    def push_to_hub(self, name: str, *, half: bool = False, private: bool | None = None) -> str:
        """Save the editor into a repository of the hub; see `push_editor`."""
        with TemporaryDirectory() as folder:
            return push_editor(self.save_pretrained(folder, half=half), name, private=private)


def with_chat(editor: Editor, chat: bool) -> Editor:
    """The same editor, for prompts that go through the model's chat template or stand as they are.

    What it has learned is shared with the other, not copied.

    Args:
        editor: Of any kind.
        chat: As of `LanguageModel`.

    Raises:
        ModelError: The model has no chat template.
    """
    if editor.lm.chat == chat:
        return editor
    twin = copy(editor)
    twin.lm = replace(editor.lm, chat=chat)
    if isinstance(editor, TrainableEditor) and isinstance(twin, TrainableEditor):
        own = editor.trains_base
        twin.original = replace(editor.original, chat=chat) if own else twin.lm
    return twin


_REGISTRY: dict[str, type] = {}
AnyEditor = TypeVar("AnyEditor", bound=type)


def register(editor: AnyEditor) -> AnyEditor:
    """Make an editor known by its `name` (class decorator)."""
    _REGISTRY[editor.name] = editor
    return editor


def editor_class(name: str) -> type:
    """The editor class of that name.

    Raises:
        EditorError: No editor has that name; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise EditorError(f"There is no editor {name!r}. Editors: {', '.join(editor_names())}.")
    return _REGISTRY[name]


def editor_names() -> list[str]:
    """Names of all editors, sorted."""
    return sorted(_REGISTRY)


def push_editor(folder: str | Path, name: str, *, private: bool | None = None) -> str:
    """Put a saved editor into a repository of the hub, in one commit.

    The model card is the folder's `README.md`; where it has none, the one that the repository has,
    or one made of what is known. The token is $HF_TOKEN, or that of `hf auth login`.

    Args:
        folder: Of the editor.
        name: Of the repository, `owner/name`; it is made if it is not there.
        private: Of a repository that is made; None: as its owner's account has it. True is refused
            where the repository is there and public.

    Returns:
        The repository's address.

    Raises:
        EditorError: No readable editor there, or one that says where its base model lay; no
            token; the repository is public against `private`, or holds something else; or the hub
            refuses or cannot be reached.
    """
    folder = Path(folder)
    about = _about(folder, read_metadata(folder / TENSORS, EditorError))
    base = about["base_model"]
    if not is_id(base) and base != Path(base).name:
        raise EditorError(
            f"{folder} names its base model by where it lay, {base}: open it, and save it anew "
            f"with save_pretrained, before others see it."
        )
    try:
        text = json.dumps(about, indent=2, ensure_ascii=False)
        card = model_card(about, name).encode()
        files = {TENSORS: folder / TENSORS, ABOUT: f"{text}\n".encode()}
    except MALFORMED as error:
        raise EditorError(
            f"No model card can be made of {folder} ({error!r}): save the editor anew with "
            f"save_pretrained."
        ) from None
    if (written := folder / CARD).is_file():
        files[CARD] = written
    return upload(name, files, private=private, card=card)


def _about(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a saved editor says of itself."""
    try:
        about = dict(json.loads(metadata["about"]))
        for key, kind in _ABOUT.items():
            if not isinstance(about[key], kind):
                raise TypeError(f"{key} is {about[key]!r:.80}")
        return about
    except MALFORMED as error:
        raise EditorError(
            f"{folder / TENSORS} holds no editor that this version can read ({error!r}). "
            f"Give a folder written by training or by save_pretrained."
        ) from None
