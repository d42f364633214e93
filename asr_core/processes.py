"""Which processes are still there."""

from __future__ import annotations

import os


def alive(pid: int) -> bool:
    """Whether a process runs, as far as this one may know."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
