"""The check after the suite sees what is left behind, and nothing else."""

import importlib.util
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.source import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def load():
    """The module that scripts/test asks."""
    spec = importlib.util.spec_from_file_location("leaks", ROOT / "scripts/_leaks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def leaks():
    """A new one each time."""
    return load()


def test_a_process_that_is_left_is_named(leaks):
    """By its number and words; not one without the mark, nor one that has ended."""
    before = leaks.shared()
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours = subprocess.Popen(words, env={**os.environ, leaks.MARK: "planted"})
    other = subprocess.Popen(words, env={**os.environ, leaks.MARK: "another"})
    try:
        environ = Path(f"/proc/{ours.pid}/environ")
        while leaks.MARK.encode() not in environ.read_bytes():
            time.sleep(0.01)
        (said,) = leaks.left("planted", before)
        assert said.startswith(f"process {ours.pid} is left: ")
        assert "time.sleep(60)" in said
    finally:
        for one in (ours, other):
            one.kill()
            one.wait()
    assert leaks.left("planted", before) == []


def test_shared_memory_that_nobody_uses_is_named(leaks):
    """While a process has it mapped it is in use, by us or by others."""
    before, path = leaks.shared(), leaks.SHARED / f"accelx-planted-{os.getpid()}"
    path.write_bytes(b"0" * 4096)
    try:
        assert f"{path} is left" in leaks.left("nobody", before)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
            assert f"{path} is left" not in leaks.left("nobody", before)
    finally:
        path.unlink()
    assert f"{path} is left" not in leaks.left("nobody", before)
