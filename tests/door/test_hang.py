"""A run that hangs says which rank is the odd one, when it is asked."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.door.spawning import LONG, SCRIPTS, begun, environment

pytestmark = pytest.mark.door
MORE = "accelx.spawn: more: python -m accelx.doctor hang {}\n"
SCRIPT = SCRIPTS / "hangs.py"


def line_of(mark):
    """`hangs.py:25`, of the one line of the script with this mark."""
    lines = SCRIPT.read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines, 1) if f"# {mark}" in line]
    return f"hangs.py:{at}"


def seen(process, logs, place):
    """What SIGQUIT to the launcher shows, less its last line.

    Asked until one of the ranks is at the place: it may be on its way still.
    """
    said, last = "", MORE.format(logs)
    while place not in said:
        process.send_signal(signal.SIGQUIT)
        said = "".join(iter(process.stderr.readline, last))
    return said


def doctor(*words):
    """The doctor's `hang` in the folder of scripts."""
    return subprocess.run(
        [sys.executable, "-m", "accelx.doctor", "hang", *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONG,
    )


@pytest.fixture
def script(tmp_path):
    """The script in a folder of its own, where a file lets its ranks go on."""
    path = tmp_path / "hangs.py"
    path.write_text(SCRIPT.read_text())
    return path


def test_ctrl_backslash_shows_where_ranks_stand_and_the_run_goes_on(script):
    """SIGQUIT to the launcher: one names the user's line, the other the collective."""
    logs = script.with_name("logs")
    words = ("-n", 2, "--logs", logs, script, "user")
    with begun(*words, lines=1) as (process, lines):
        assert lines == ["reading"]
        says, reads, meets = map(line_of, ("says", "reads", "meets"))
        said = seen(process, logs, str(script.with_name(meets)))
        assert "rank 1 is not in a collective: " in said
        # it may not have left the line that told the test to go on
        (line,) = re.findall(r"(hangs\.py:\d+), in read, after reduce", said)
        assert says <= line <= reads
        assert f"the other is in barrier at {script.with_name(meets)} (#2)" in said
        stack = (logs / "rank-1.stack").read_text()
        assert "in _watch" in stack  # another thread's
        assert re.search(r'hangs\.py", line \d+ in read', stack)
        asked = doctor("--json", logs)
        assert asked.returncode == 1
        assert json.loads(asked.stdout)["odd"] == [1]
        script.with_name("user-on").touch()
        _, errors = process.communicate(timeout=LONG)
        assert (process.returncode, errors) == (0, "")
    assert sorted(path.name for path in logs.iterdir()) == ["rank-0.log", "rank-1.log"]


def test_the_step_that_a_rank_left_out_is_named(script):
    """The launcher and the doctor say where the ranks' ways parted."""
    logs = script.with_name("logs")
    steps, meets = line_of("steps"), line_of("meets")
    parted = (
        f"their ways part at #4: rank 0 did step at {steps}, rank 1 did barrier at "
    )
    with begun("-n", 2, "--logs", logs, script, "step", lines=1) as (process, lines):
        assert lines == ["out"]
        said = seen(process, logs, parted)
        assert f"{parted}{meets}\n" in said
        asked = doctor(logs)
    assert asked.returncode == 1
    text = (
        f"rank 0 is in step at {script.with_name(steps)} (#4); the other is in barrier"
    )
    assert text in asked.stdout
    assert parted in asked.stdout
    assert "update 2" in asked.stdout  # where rank 1 is at its barrier


def test_a_folder_without_reports_is_wrong_use(tmp_path):
    """With what to write instead."""
    asked = doctor(Path(tmp_path))
    assert asked.returncode == 2
    assert "accelx.spawn --logs" in asked.stderr
