"""A workbench for editing language models with MEND: edit, look inside, undo."""

import logging

import lazy_loader

__version__ = "0.1.0"

# On some CPUs bitsandbytes warns, wherever it is loaded, of an optional kernel that it lacks.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# What `__init__.pyi` lists is loaded when it is first asked for, and torch with it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
