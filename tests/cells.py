"""A notebook's cells run in this process: as in a kernel, without the seconds that one takes.

Kernels, kills and papermill itself have tests of their own; this is for what the cells compute.
"""

import json
import logging
import os
from unittest import mock

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output


class CellFailed(RuntimeError):
    """A cell raised; `cell` is its number among the code cells."""

    def __init__(self, error: BaseException, cell: int):
        super().__init__(f"{type(error).__name__}: {error}")
        self.cell = cell


def run_cells(notebook, output, parameters: dict) -> None:
    """Run all cells as `rorem run` does and write the notebook with what they show to `output`.

    Args:
        notebook: path of the notebook.
        output: path of the executed copy, written as far as the cells came.
        parameters: replace those of the cell tagged `parameters`.

    Raises:
        CellFailed: from the error of the cell that raised.
    """
    executed = nbformat.read(notebook, 4)
    logger = logging.getLogger("rorem_lib")
    before = list(logger.handlers), logger.level, logger.propagate
    logger.handlers = []  # the stage's own handler writes to this run's output
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(history_length=0)
    try:
        with mock.patch.dict(os.environ, ROREM_BATCH="1", ROREM_LAUNCHER=str(os.getpid())):
            for number, cell in enumerate(c for c in executed.cells if c.cell_type == "code"):
                _run_cell(shell, cell, number)
                if "parameters" in cell.metadata.get("tags", []):
                    shell.user_ns.update(json.loads(json.dumps(parameters)))
    finally:
        nbformat.write(executed, output)
        logger.handlers, logger.level, logger.propagate = before
        InteractiveShell.clear_instance()


def _run_cell(shell, cell, number: int) -> None:
    shown = []

    def show(value):
        if value is not None:
            shown.append(shell.display_formatter.format(value)[0])

    shell.display_trap.hook = show  # what a cell's last expression is worth
    with capture_output() as captured:
        result = shell.run_cell(cell.source, silent=False, store_history=False)
    shown += [output.data for output in captured.outputs]
    cell.outputs = [nbformat.v4.new_output("display_data", data=data) for data in shown]
    if captured.stdout:
        cell.outputs.append(nbformat.v4.new_output("stream", text=captured.stdout))
    if error := result.error_before_exec or result.error_in_exec:
        cell.outputs.append(
            nbformat.v4.new_output(
                "error", ename=type(error).__name__, evalue=str(error), traceback=[]
            )
        )
        raise CellFailed(error, number) from error
