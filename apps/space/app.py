"""The app as a hosted Gradio Space: what it writes lies beside this file, in the folder `data`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr

DATA = Path(__file__).resolve().parent / "data"
# Each is read when the library that it belongs to is imported.
PLACES = {
    "WORKBENCH_CACHE": "workbench",
    "HF_HOME": "hub",
    "GRADIO_TEMP_DIR": "gradio",
    "TMPDIR": "temporary",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


def interface() -> gr.Blocks:
    """The app over the default model; visitors open no models, and train none."""
    for name, place in PLACES.items():
        (DATA / place).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(DATA / place)
    tempfile.tempdir = None  # look again
    from apps.editor_app import build
    from workbench import Workbench

    return build(Workbench.open(progress=False), locked=True)


def main() -> None:
    """Serve where the Space says: $GRADIO_SERVER_NAME, $GRADIO_SERVER_PORT."""
    app = interface()
    from apps.editor_app import launch

    launch(app)


if __name__ == "__main__":
    main()
