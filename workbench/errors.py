"""Errors a user can act on: messages say what was given, what is expected, how to fix it."""


class WorkbenchError(Exception):
    """Base of every error the workbench raises on purpose.

    What to do: read its message; catch this class to catch them all.
    """


class ModelError(WorkbenchError):
    """A model cannot be opened, or has nothing that can be edited.

    What to do: look at the source that the message names, a hub id, a folder or a file, and at
    what is installed; `estimate_memory` says beforehand whether a model fits.
    """


class DataError(WorkbenchError):
    """A data file or record cannot be read.

    What to do: mend the record that the message names, or leave bad ones out with `--skip-bad`.
    """


class EditorError(WorkbenchError):
    """An editor cannot be opened, trained or applied to this model.

    What to do: take the editor that was trained for this model, or one that needs no training,
    such as `ft`; in training, change the setting that the message names.
    """


class Cancelled(WorkbenchError):
    """The one who asked for something has called it off; nothing has been changed.

    What to do: nothing, or ask again.
    """


class EditError(WorkbenchError):
    """An edit request cannot be carried out; nothing has been changed.

    What to do: change the prompt, the target or the number that the message names.
    """


class FileError(WorkbenchError):
    """A file cannot be written; what stood there before is as it was.

    What to do: make room, or give a folder that can be written.
    """


class OutOfMemory(WorkbenchError):
    """The device or the machine has no more memory; nothing has been changed.

    What to do: ask for less at once, or hold the model in fewer bytes, as the message says.
    """


class FigureError(WorkbenchError):
    """A figure cannot be written as asked.

    What to do: choose another ending, or install what the message names.
    """
