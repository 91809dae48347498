"""The self-test of an installation passes here, and fails where something is broken."""

import json
import subprocess
import sys
import tempfile

import pytest
import torch
import torch._dynamo  # optimizers import it when first made
import torch.distributed.fsdp  # ranks are forked: once here, not once in each

from accelx import comm
from accelx.doctors import checks, selftest
from accelx.testing import run
from tests.door.spawning import environment

pytestmark = pytest.mark.multi


def test_the_door_says_that_all_is_well():
    """Every check is run on two ranks in less than a minute, and the exit code is 0."""
    done = subprocess.run(
        [sys.executable, "-m", "accelx.test", "-n", "2", "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(done.stdout)
    assert data["sound"]
    assert (data["ranks"], data["backend"]) == (2, "gloo")
    assert [row["check"] for row in data["checks"]] == list(checks.CHECKS)
    said = done.stderr.splitlines()
    # torch 2.9 says of each rank how many it is connected to, at times in pieces
    assert not [s for s in said if s and "[Gloo]" not in s and "peer ranks" not in s]


def test_nothing_is_left_of_the_checkpoint(tmp_path, monkeypatch):
    """The folder that was saved into is gone on every rank."""
    made, real = tmp_path / "made", tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def noted(*args, **named):
        made.touch()
        return real(*args, **named)

    def rank(env):
        monkeypatch.setattr(tempfile, "mkdtemp", noted)
        checks.checkpoints(env)

    run(2)(rank)()
    assert list(tmp_path.iterdir()) == [made]  # it was there, and none is left


def broken(env, name, monkeypatch):
    """What a check says in ranks where something is broken on purpose."""
    breaks = {
        "collectives": lambda: monkeypatch.setattr(
            comm, "reduce", lambda e, t, o="": t
        ),
        "ddp equals one process": lambda: monkeypatch.setattr(
            checks, "_loss", lambda model, batch: model(batch[0]).sum() * (env.rank + 1)
        ),
        "save and load": lambda: monkeypatch.setattr(
            checks, "load_state", lambda env, url: lambda state: state
        ),
    }
    breaks[name]()
    try:
        checks.CHECKS[name](env)
    except AssertionError as error:
        return str(error)
    except Exception as error:
        return f"other: {error}"
    return "passed"


def test_control_each_check_sees_what_is_broken(monkeypatch):
    """Ranks that do not reduce, a loss by rank, data that is lacking, a lost load."""
    names = ("collectives", "ddp equals one process", "save and load")
    for name in names:
        each = run(2)(lambda env, name=name: broken(env, name, monkeypatch))()
        assert any(told.startswith("wanted ") for told in each), (name, each)

    def lost(env):
        data = torch.utils.data.TensorDataset(torch.arange(checks.ITEMS) // 2)
        monkeypatch.setattr(checks, "TensorDataset", lambda *a: data)
        with pytest.raises(AssertionError, match="each sample once"):
            checks.loader(env)
        return True

    assert run(2)(lost)() == [True, True]


def row(name, error="", when=0.0, seconds=1.0):
    """What a rank reports of one check."""
    return {
        "check": name,
        "seconds": seconds,
        "error": error,
        "traceback": error,
        "time": when,
        "device": "cpu",
        "backend": "gloo",
    }


def test_the_root_cause_is_told_and_what_was_not_run():
    """An echo of another rank's end is not the cause, though it may come first."""
    first, second, *rest = checks.CHECKS
    echo = "RuntimeError: Connection closed by peer"
    each = [
        [row(first), row(second, echo, 1.0)],
        [row(first, seconds=3.0), row(second, "AssertionError: wanted 1", 2.0)],
    ]
    made = selftest.merged(each)
    assert [m["result"] for m in made] == ["ok", "FAILED", *["not run"] * len(rest)]
    assert made[0]["seconds"] == 3.0
    assert (made[1]["rank"], made[1]["error"]) == (1, "AssertionError: wanted 1")
    data = {"ranks": 2, "device": "cpu", "backend": "gloo", "checks": made}
    text = "\n".join(selftest.lines({**data, "sound": False}))
    assert "rank 1: AssertionError" in text
    assert text.endswith("NOT well: see python -m accelx.doctor")


def test_words_that_mean_nothing_end_in_code_2(capsys):
    """Wrong use is told before a rank starts."""
    assert selftest.main(["-n", "none"]) == 2
    assert "whole number" in capsys.readouterr().err


def test_a_rank_that_does_not_come_is_code_1(capsys):
    """What does not end in time is told as a failure."""
    assert selftest.main(["-n", "2", "--timeout", "0.01"]) == 1
    assert "accelx.test: " in capsys.readouterr().err


@pytest.mark.parametrize("world", [1, 3])
def test_all_checks_pass_on_other_numbers_of_ranks(world):
    """One process, and a number that divides neither rows nor samples."""

    def rank(env):
        for check in checks.CHECKS.values():
            check(env)
        return env.device

    assert run(world)(rank)() == ["cpu"] * world


def test_control_a_loader_that_forgets_where_it_was_is_seen(monkeypatch):
    """From step 2 on the batches are those of the whole epoch, or it is told."""
    real = checks.feed

    def forgetful(tx, made, start):
        return real(tx, made, 0)

    def rank(env):
        monkeypatch.setattr(checks, "feed", forgetful)
        with pytest.raises(AssertionError, match="the same batches from step 2"):
            checks.loader(env)
        return True

    assert run(2)(rank)() == [True, True]


def test_control_an_order_that_is_none_is_seen(monkeypatch):
    """A loader that does not shuffle where it should."""

    def rank(env):
        plain = torch.utils.data.DataLoader
        monkeypatch.setattr(
            checks,
            "DataLoader",
            lambda data, batch_size, shuffle: plain(data, batch_size),
        )
        with pytest.raises(AssertionError, match="another order"):
            checks.loader(env)
        return True

    assert run(1)(rank)() == [True]


def test_a_rank_stops_at_its_first_failure_and_tells_it(monkeypatch):
    """Checks that other ranks would wait in are not begun."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = []

    def broken(env):
        raise ValueError("broken on purpose")

    fine = seen.append
    some = {"fine": fine, "broken": broken, "later": fine}
    monkeypatch.setattr(checks, "CHECKS", some)
    first, second = selftest.ran("cpu", 10.0)
    assert (first["check"], first["error"]) == ("fine", "")
    assert second["error"] == "ValueError: broken on purpose"
    assert "in broken" in second["traceback"]
    assert len(seen) == 1
    [_, row_, later] = selftest.merged([[first, second]])
    assert (row_["result"], row_["rank"], later["result"]) == ("FAILED", 0, "not run")


def test_a_check_says_what_it_wanted_and_what_came():
    """In the words of an error, not as a bare assertion."""
    checks.wanted("one", True, 1)
    with pytest.raises(AssertionError, match="wanted one, got 2"):
        checks.wanted("one", False, 2)


def test_a_table_of_one_process_has_no_backend():
    """And all that is well is told in the last line."""
    names = list(checks.CHECKS)
    made = selftest.merged([[row(name) for name in names]])
    data = {"ranks": 1, "device": "cpu", "backend": None, "checks": made, "sound": True}
    lines = selftest.lines(data)
    assert lines[0] == "1 ranks on cpu"
    assert lines[-1] == "all is well"
    assert [line.split()[-1] for line in lines[3:9]] == ["ok"] * 6
