"""Errors a user can act on: messages say what was given, what is expected, how to fix it."""


class WorkbenchError(Exception):
    """Base of every error the workbench raises on purpose."""


class ModelError(WorkbenchError):
    """A model cannot be opened, or has nothing that can be edited."""


class DataError(WorkbenchError):
    """A data file or record cannot be read."""


class EditorError(WorkbenchError):
    """An editor cannot be opened, trained or applied to this model."""


class Cancelled(WorkbenchError):
    """The one who asked for something has called it off; nothing has been changed."""


class EditError(WorkbenchError):
    """An edit request cannot be carried out; nothing has been changed."""


class FigureError(WorkbenchError):
    """A figure cannot be written as asked."""
