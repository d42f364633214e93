"""Every failure that a person can cause or cure, each with an exit code and the next thing to do.

The exit codes are part of the command line's contract (README, "Exit codes"); 2 is click's own for wrong usage.
"""

import errno

# The file system's own refusals; any other OSError is a defect and keeps its traceback.
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}


class AsrExportError(Exception):
    """A failure with a sentence for the user: what was wrong, where, and what to do next."""

    exit_code = 1


class GateError(AsrExportError):
    """An artifact does not say what PyTorch says."""

    exit_code = 1


class UsageError(AsrExportError):
    """The command line asked for something that does not exist."""

    exit_code = 2


class RegressionError(AsrExportError):
    """Every artifact passes, yet one got worse than this machine's own past."""

    exit_code = 3


class CheckpointError(AsrExportError):
    """The source checkpoint cannot be used; the message lists every reason at once."""

    exit_code = 4


class UnavailableError(AsrExportError):
    """A target cannot run on this machine (package, platform or hardware missing)."""

    exit_code = 5


class ArtifactError(AsrExportError):
    """An artifact folder is missing, incomplete or altered."""

    exit_code = 6


class ExportError(AsrExportError):
    """A converter failed or its process died."""

    exit_code = 7


class AudioError(AsrExportError):
    """An audio file cannot be read or used."""

    exit_code = 8


class StorageError(AsrExportError):
    """The file system refused (no permission, disk full)."""

    exit_code = 9


class UndecidedError(AsrExportError):
    """Nothing fails, but the data set is too small to tell whether an artifact passes."""

    exit_code = 10
