"""Execute one notebook with papermill, in a kernel of this very Python that dies with the runner.

Importing this module imports papermill and Jupyter's client, which takes a second: the runner does
so when there is something to run.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import papermill
import zmq
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets import default

from rorem_lib.files import ROOT

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# The tie to the runner comes first: a runner killed while the kernel starts takes it along too.
_START = (
    "from rorem_lib.runner.launch import die_with_parent; die_with_parent(); "
    "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"
)


class NotebookFailed(RuntimeError):
    """A cell raised, or the kernel died.

    Attributes:
        cell: the cell's number as `In [n]` in the executed notebook; None where the kernel died.
        source: the cell's source.
        name: the exception's class name.
    """

    def __init__(self, name: str, message: str, *, cell: int | None = None, source: str = ""):
        super().__init__(f"{name}: {message}" if message else name)
        self.name, self.cell, self.source = name, cell, source


class StageKernelManager(AsyncKernelManager):
    """Starts the kernel with `sys.executable`, whatever kernel specs this machine's user has."""

    @default("transport_encryption")
    def _choose_encryption(self) -> str:
        """Other users of the machine can't read along, and the kernel has nothing to warn of."""
        return "auto" if zmq.has("curve") else "disabled"

    @property
    def kernel_spec(self) -> KernelSpec:
        above = os.environ.get("PYTHONPATH")
        return KernelSpec(
            argv=[sys.executable, "-c", _START, "-f", "{connection_file}"],
            display_name="Python 3 (ipykernel)",
            language="python",
            metadata={"supported_encryption": ["curve"]},  # as in ipykernel's own
            env={
                "ROREM_BATCH": "1",
                "ROREM_LAUNCHER": str(os.getpid()),
                "PYTHONPATH": f"{ROOT}{os.pathsep}{above}" if above else str(ROOT),
                "TQDM_DISABLE": "1",  # log lines in the place of bars
                "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            },
        )  # or the debugger warns at each start


class LineWriter:
    """A text stream that hands on whole lines; of a line redrawn with carriage returns, the last
    state."""

    def __init__(self, say):
        self.say, self.waiting = say, ""

    def write(self, text: str) -> None:
        *lines, self.waiting = (self.waiting + text).split("\n")
        for line in lines:
            if shown := line.rstrip("\r").rpartition("\r")[2].rstrip():
                self.say(shown)

    def flush(self) -> None:
        """Papermill flushes after every message, which may end within a line."""


def execute_notebook(notebook: Path, output: Path, parameters: dict, *, say) -> None:
    """Execute a notebook; the output is saved after each cell, so a failed one shows how far it
    came.

    Args:
        notebook: its path.
        output: path of the executed copy.
        parameters: checked parameters, plain Python values.
        say: called with each line the cells print.

    Raises:
        NotebookFailed: a cell raised, or the kernel died.
        OSError: the output can't be written.
    """
    try:
        papermill.execute_notebook(
            str(notebook).replace("{", "{{").replace("}", "}}"),
            str(output),
            parameters,
            kernel_name="python3",
            language="python",
            cwd=str(ROOT),
            progress_bar=False,
            stdout_file=LineWriter(say),
            kernel_manager_class=StageKernelManager,
            start_timeout=300,
            iopub_timeout=60,  # a busy machine is no failure
            shutdown_kernel="immediate",
        )  # what matters is on disk, and waiting costs a second
    except PapermillExecutionError as error:
        raise NotebookFailed(
            error.ename, _COLOUR.sub("", error.evalue), cell=error.exec_count, source=error.source
        ) from error
    except DeadKernelError as error:
        raise NotebookFailed(
            "DeadKernelError", "the kernel died: it was killed, most often because memory ran out"
        ) from error
    except OSError:
        raise
    except Exception as error:  # the kernel did not start, the notebook is no valid notebook, …
        raise NotebookFailed(type(error).__name__, str(error)) from error
