"""What several test modules share."""

import os
import subprocess
import sys
from pathlib import Path


def run_command(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the console scripts as a user would."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1200, env=os.environ | {"COLUMNS": "250"} | environment
    )
