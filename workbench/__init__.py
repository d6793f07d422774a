"""A workbench for editing language models with MEND: edit, look inside, undo."""

import lazy_loader

__version__ = "0.1.0"

# What `__init__.pyi` lists is loaded when it is first asked for, and torch with it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
