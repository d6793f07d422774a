"""What every test may use: an offline environment, the public data, the default model."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# A busy machine is no fault of the code: no time is asserted, here or elsewhere.
# And a run repeats; "search" looks for new examples.
settings.register_profile("workbench", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("workbench")

# Set before any test module imports transformers, huggingface_hub or gradio, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

if TYPE_CHECKING:
    from workbench.models import LanguageModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the public data sets, which are not part of the repository."""
    data = Path(os.environ.get("WORKBENCH_SHARED", ROOT.parent / "shared")) / "data"
    if not data.is_dir():
        pytest.skip(f"no folder {data}: put the data there, or its parent in $WORKBENCH_SHARED")
    return data


@pytest.fixture(scope="session")
def default_model() -> LanguageModel:
    """The embedded default model, opened once per process; tests must leave it unedited."""
    from workbench.models import open_model

    return open_model(device="cpu", progress=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with one token a character, for commands that open a model."""
    from families import FAMILIES, tiny_tokenizer

    folder = tmp_path_factory.mktemp("model")
    longer = {"max_position_embeddings": 512}
    partial(FAMILIES["llama"], **longer)().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def free_port() -> int:
    """A port that nothing listens on. (Left to look for one, gradio leaks sockets of busy ones.)"""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
