"""What README.md and docs/ show is run: each page's Python as one program, in order.

A block opened by ```python belongs to its page's program. One opened by
```python no-run: REASON is compiled only. Commands in ```console blocks must name files
and modules that exist.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.exists()
]
FENCE = re.compile(r"^( *)(`{3,})(.*)$")


def blocks(text):
    """(info, first line's number, lines) of each fenced block of a page."""
    found, fence, ticks = [], None, ""
    for number, line in enumerate(text.splitlines(), 1):
        match = FENCE.match(line)
        if fence is None and match:
            fence, ticks = (match[3].strip(), number + 1, []), match[2]
            found.append(fence)
        elif fence is not None and match and match[2] == ticks and not match[3].strip():
            fence = None
        elif fence is not None:
            fence[2].append(line)
    return found


def program(text, wanted):
    """The page with all but the wanted blocks blanked: line numbers are the page's."""
    lines = [""] * len(text.splitlines())
    for info, start, body in blocks(text):
        if wanted(info):
            lines[start - 1 : start - 1 + len(body)] = body
    return "\n".join(lines)


def commands(text):
    """Each line of a console block that a reader would type."""
    return [
        line.removeprefix("$ ").strip()
        for info, _, body in blocks(text)
        if info.split()[:1] == ["console"]
        for line in body
        if line.startswith("$ ")
    ]


@pytest.mark.door
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page, tmp_path):
    """The Python of a page runs top to bottom, in a folder of its own."""
    source = program((ROOT / page).read_text(), lambda info: info == "python")
    if not source.strip():
        pytest.skip("the page shows no Python")
    script = tmp_path / Path(page).with_suffix(".py").name
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{page}, by line number:\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_a_block_that_is_not_run_says_why_and_compiles(page):
    """Python that needs what a test has not is still Python, and gives its reason."""
    text = (ROOT / page).read_text()
    for info, start, body in blocks(text):
        if info.startswith("python") and info != "python":
            assert re.fullmatch(r"python no-run: \S.*", info), f"{page}:{start - 1}"
            compile("\n" * (start - 1) + "\n".join(body), page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_a_command_names_what_exists(page):
    """Scripts and accelx modules in a page's commands are in the repository."""
    for command in commands((ROOT / page).read_text()):
        for module in re.findall(r"-m (accelx\.\S+)", command):
            assert importlib.util.find_spec(module), f"{page}: {command}"
        for path in re.findall(r"\b((?:scripts|examples|benchmarks)/\S+)", command):
            assert (ROOT / path).exists(), f"{page}: {command}"


PAGE = """\
Text.
```python
x = 1
```
```python no-run: needs a bucket
open("s3://bucket")
```
```console
$ python -m accelx.spawn -n 2 train.py
output
```
```python
assert x == 2
```
"""


def test_blocks_share_names_and_keep_line_numbers():
    """A later block sees an earlier one's names, and fails on the page's own line."""
    source = program(PAGE, lambda info: info == "python")
    with pytest.raises(AssertionError) as failed:
        exec(compile(source, "page", "exec"), {})
    line = failed.traceback[-1].lineno  # counted from 0
    assert PAGE.splitlines()[line] == "assert x == 2"


def test_commands_are_the_lines_after_a_prompt():
    """Of a console block, the output is not taken for a command."""
    assert commands(PAGE) == ["python -m accelx.spawn -n 2 train.py"]
