"""`notebook.py FILE`: runs a notebook in a kernel of its own; its outputs as JSON.

A line `interrupt me` in a cell's output interrupts the kernel, as the button does.
"""

import asyncio
import json
import sys

import nbformat
from nbclient import NotebookClient


class Client(NotebookClient):
    """A client whose user presses the button when told to."""

    def process_message(self, msg, cell, cell_index):
        """Look at what a cell says while it says it."""
        if "interrupt me" in msg["content"].get("text", ""):
            self.pressed = asyncio.ensure_future(self.press())
        return super().process_message(msg, cell, cell_index)

    async def press(self):
        """Once."""
        if not hasattr(self, "done"):
            self.done = True
            await self.km.interrupt_kernel()


def said(output):
    """(kind, text): what of an output a reader sees."""
    if output.output_type == "error":
        return "error", [output.ename, output.evalue, "\n".join(output.traceback)]
    if output.output_type == "stream":
        return output.name, output.text
    return "result", output.data["text/plain"]


notebook = nbformat.read(sys.argv[1], as_version=4)
patience = {"timeout": 150, "startup_timeout": 150}
Client(notebook, **patience, allow_errors=True, kernel_name="python3").execute()
cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
print(json.dumps([[said(output) for output in cell.outputs] for cell in cells]))
