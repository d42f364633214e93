"""Production clients, one module each: how their users transcribe with an artifact as it is.

A module names its ``CLIENT``, the ``TARGET`` whose artifacts it loads, and has ``open(path, threads)``, which returns a function
from samples and their language to the text and raises :class:`UnavailableError` where the client isn't installed. Clients that
cannot be installed beside this project are run where a person has them (:mod:`parity.clients._elsewhere`).
"""

from importlib import metadata

from asr_core.errors import UnavailableError


def require(package: str) -> None:
    """Raise :class:`UnavailableError`, with the line that installs it, where a client's package is missing."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UnavailableError(f"the witness {package} is not installed: pip install {package}") from None
