"""The errors a user can meet. Each message names the node, parameter or argument and says what to do."""

MAX_FIRST_LINE = 300  # characters


class ThresherError(Exception):
    """Base of every error that Thresher raises on purpose."""


class CaptureError(ThresherError):
    """The model could not be captured as a graph."""


class ProgramError(ThresherError):
    """A program is not well-formed: a defect of the pass that made it."""


class PassError(ThresherError):
    """A pass is unknown, badly configured or out of order."""


class InputError(ThresherError, ValueError):
    """An argument of a compiled model has the wrong shape, dtype, device or structure."""


class BackendError(ThresherError):
    """A program cannot be lowered to the target that was asked for."""


class OperatorError(ThresherError, RuntimeError):
    """A compiled model was called with values for which an operator raises in torch, too: a singular matrix, an index out of range."""


class ValidationError(ThresherError):
    """A compiled result differs from the eager model by more than is allowed."""


class MemoryLimitError(ThresherError, MemoryError):
    """A build would need more memory than there is."""


class ArtifactError(ThresherError):
    """An artifact is damaged, foreign, newer than this library, or built for another machine."""


class RecordsError(ThresherError):
    """A file of tuning records cannot be read or written."""


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's message, or the name of its class where it has none: for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_FIRST_LINE]
