from .data import EditExample, Statement
from .edit import Edit
from .editors import EditRequest, FineTune, FineTuneConfig, Mend, MendConfig
from .errors import (
    DataError,
    EditError,
    EditorError,
    FigureError,
    FileError,
    ModelError,
    OutOfMemory,
    WorkbenchError,
)
from .memory import MemoryEstimate, estimate_memory
from .models import LanguageModel, open_model
from .overlay import EditStack
from .probes import Probe
from .report import ProbeReport, ProbeResult
from .results import Comparison, EditTrace, LayerTrace, Overlap, PromptComparison
from .session import Workbench
from .updates import LayerUpdate, Update

__version__: str

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
]
