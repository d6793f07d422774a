"""A workbench for editing language models with MEND: edit, look inside, undo."""

from workbench.data import EditExample, Statement
from workbench.edit import Edit
from workbench.editors import EditRequest, FineTune, FineTuneConfig, Mend, MendConfig
from workbench.errors import (
    DataError,
    EditError,
    EditorError,
    FigureError,
    FileError,
    ModelError,
    OutOfMemory,
    WorkbenchError,
)
from workbench.memory import MemoryEstimate, estimate_memory
from workbench.models import LanguageModel, open_model
from workbench.overlay import EditStack, overlay
from workbench.probes import Probe
from workbench.report import ProbeReport, ProbeResult
from workbench.results import Comparison, EditTrace, LayerTrace, Overlap, PromptComparison
from workbench.session import Workbench
from workbench.updates import LayerUpdate, Update

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "DataError",
    "Edit",
    "EditError",
    "EditExample",
    "EditRequest",
    "EditStack",
    "EditTrace",
    "EditorError",
    "FigureError",
    "FileError",
    "FineTune",
    "FineTuneConfig",
    "LanguageModel",
    "LayerTrace",
    "LayerUpdate",
    "MemoryEstimate",
    "Mend",
    "MendConfig",
    "ModelError",
    "OutOfMemory",
    "Overlap",
    "Probe",
    "ProbeReport",
    "ProbeResult",
    "PromptComparison",
    "Statement",
    "Update",
    "Workbench",
    "WorkbenchError",
    "estimate_memory",
    "open_model",
    "overlay",
]
