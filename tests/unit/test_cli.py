import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from asr_core import errors
from asr_export.cli import handle_errors

COMMANDS = ["compress", "export", "parity", "transcribe"]


def run(failure: BaseException):
    @click.command()
    @handle_errors
    def command() -> None:
        raise failure

    return CliRunner().invoke(command)


@pytest.mark.parametrize("kind", errors.AsrExportError.__subclasses__())
def test_our_errors_are_a_sentence_and_an_exit_code(kind):
    result = run(kind("the thing is broken. Mend it."))
    assert (result.stderr, result.stdout, result.exit_code) == ("Error: the thing is broken. Mend it.\n", "", kind.exit_code)


def test_exit_codes_differ():
    codes = {kind.exit_code for kind in errors.AsrExportError.__subclasses__()}
    assert len(codes) == len(errors.AsrExportError.__subclasses__())


def test_interruption():
    result = run(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def test_a_full_disk_is_a_sentence():
    result = run(OSError(28, "No space left on device", "report.json"))
    assert (result.exit_code, result.stderr) == (9, "Error: report.json: No space left on device.\n")


@pytest.mark.parametrize("failure", [ZeroDivisionError(), OSError(111, "Connection refused")])
def test_a_defect_keeps_its_traceback(failure):
    assert run(failure).exception is failure


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command):
    """What --help imports decides how fast it answers; a machine's load does not."""
    code = f"""
import sys
from asr_export.{command} import main
try:
    main(["--help"])
except SystemExit:
    heavy = {{"av", "numpy", "onnx", "onnxruntime", "openvino", "pydantic", "rich", "tokenizers", "torch", "transformers"}}
    print("HEAVY", sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage:")
    assert done.stdout.splitlines()[-1] == "HEAVY []"
