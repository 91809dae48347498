"""What README.md and docs/ show is run: each page's Python as one program, in order.

A block opened by ```python belongs to its page's program. One opened by
```python no-run: REASON is compiled only. Commands in ```console blocks must name files
and modules that exist.
"""

import importlib.util
import json
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


# Runs each program it is told of in a fork, as `python FILE` would: importing torch
# and accelx costs more than most pages do. It answers with the exit code.
RUNNER = """
import json, os, runpy, sys
import accelx as ax

[getattr(ax, name) for name in ax.__all__]
for line in sys.stdin:
    folder, script, out = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(folder)
for number, name in enumerate((os.devnull, out, out)):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
sys.argv, sys.path[0] = [script], folder
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def run():
    """Run a script in its folder: its exit code and what it wrote."""

    def one(script):
        out = script.with_suffix(".out")
        job = json.dumps([str(script.parent), str(script), str(out)])
        runner.stdin.write(f"{job}\n")
        runner.stdin.flush()
        return int(runner.stdout.readline()), out.read_text()

    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as runner:
        yield one
        runner.stdin.close()


@pytest.mark.door
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page, tmp_path, run):
    """The Python of a page runs top to bottom, in a folder of its own."""
    source = program((ROOT / page).read_text(), lambda info: info == "python")
    if not source.strip():
        pytest.skip("the page shows no Python")
    script = tmp_path / Path(page).with_suffix(".py").name
    script.write_text(source)
    code, said = run(script)
    assert code == 0, f"{page}, by line number:\n{said}"


@pytest.mark.door
@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("x = 1\n1 / 0\n", 1, r'page\.py", line 2, in <module>.*ZeroDivisionError'),
        ("import sys\nsys.exit(3)\n", 3, ""),
        ("import atexit, os\natexit.register(print, __name__, os.getcwd())", 0, "main"),
    ],
)
def test_control_a_program_that_fails_is_seen(tmp_path, run, source, code, said):
    """Its exit code, its line and what it wrote last, as Python itself would say."""
    script = tmp_path / "page.py"
    script.write_text(source)
    found = run(script)
    assert found[0] == code
    assert re.search(said, found[1], re.DOTALL), found[1]


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
