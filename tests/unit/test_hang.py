"""What is read out of what hanging ranks have left, the ring that they write it in."""

import json
import mmap
import os
import signal
import threading
import time

import attrs
import pytest
import torch

from accelx import comm_hang, comm_site
from accelx.comm_hang import Left, forget, leave, read
from accelx.comm_ring import (
    ENDED,
    FAILED,
    HEAD,
    LENGTH,
    OPEN,
    SLOTS,
    Operation,
    Ring,
    forget_ring,
    operations,
    ring,
)
from accelx.comm_wire import Spec
from accelx.doctors import door, hang
from accelx.records import Env
from tests.unit.saves.test_disk_faults import PAGE, room, small_disk

ENV = Env(rank=1, world=2)


def op(number, name="reduce", line=44, state=ENDED, at=None):
    """An operation of train.py; it takes a second."""
    begun = float(number) if at is None else at
    ended = 0.0 if state == OPEN else begun + 1
    return Operation(number, name, "/run/train.py", line, "", state, begun, ended)


def left(rank, *each, world=2, stack="", **more):
    """What a rank has left: some operations, and where its main thread stands."""
    seen = {"stack": stack, "looked": 99.0} | more
    return Left(rank, world, host="node7", operations=each, **seen)


def stack(file, line, name="main"):
    """As faulthandler writes it: another thread, and then the main one."""
    other = 'Thread 0x01 (most recent call first):\n  File "x.py", line 1 in other\n'
    main = f'  File "{comm_site.LIBRARY[0]}/ssl.py", line 9 in read\n'
    main += f'  File "{file}", line {line} in {name}\n'
    return f"{other}\nCurrent thread 0x02 (most recent call first):\n{main}"


def verdict(*each):
    """The one sentence, and the odd ranks."""
    data = hang.merged(each)
    return data["verdict"], data["odd"]


def test_ranks_in_different_collectives_are_told_apart():
    """The one is named first, then the others, each with line and number."""
    odd = left(1, op(16), op(17, "gather", 41, OPEN), world=3)
    others = [left(r, op(16), op(17, state=OPEN), world=3) for r in (0, 2)]
    text = "rank 1 is in gather at /run/train.py:41 (#17); the others are in reduce"
    assert verdict(odd, *others) == (f"{text} at /run/train.py:44 (#17)", [1])


def test_who_is_in_no_collective_is_odd_wherever_it_stands():
    """Of two ranks it is not the one that waits."""
    waits = left(1, op(16), op(17, state=OPEN))
    away = left(0, op(16), stack=stack("data.py", 12, "read"))
    text, odd = verdict(away, waits)
    assert odd == [0]
    assert text == (
        "rank 0 is not in a collective: data.py:12, in read, after reduce at "
        "/run/train.py:44 (#16); the other is in reduce at /run/train.py:44 (#17)"
    )
    assert verdict(left(0, op(1, state=OPEN)), left(1))[1] == [1]
    assert "after none" in verdict(left(0, op(1, state=OPEN)), left(1))[0]
    old = attrs.evolve(away, looked=16.5)  # before it left the last one
    assert "data.py" not in verdict(old, waits)[0]
    assert "data.py" in verdict(attrs.evolve(old, ahead=-1.0), waits)[0]


def test_the_rank_that_is_behind_is_odd():
    """Where each stands in a place of its own, it is the one with the fewest."""
    behind = left(1, op(16, state=OPEN))
    assert verdict(left(0, op(17, state=OPEN)), behind)[1] == [1]


def test_a_rank_that_left_nothing_or_has_ended_is_odd():
    """It never connected, or it went before the others."""
    waits = [left(r, op(17, state=OPEN), world=3) for r in (0, 2)]
    text, odd = verdict(*waits)
    assert odd == [1]
    assert text.startswith("rank 1 has left nothing here: it has not connected")
    text, odd = verdict(*waits, left(1, op(16), world=3, ended=True))
    assert odd == [1]
    assert text.startswith("rank 1 has ended; the others are in reduce")


def test_an_operation_that_failed_is_where_a_rank_was():
    """Until another has ended after it."""
    failed = left(0, op(16), op(17, state=FAILED), ended=True)
    assert (
        "rank 0 failed in reduce at /run/train.py:44 (#17)"
        in verdict(failed, left(1, op(16), op(17, "gather", state=FAILED)))[0]
    )
    outer = op(17, "step", 40, FAILED, at=17.0)
    nested = left(0, outer, op(18, at=17.5, state=FAILED))
    assert "failed in reduce" in verdict(nested)[0]
    went_on = left(0, op(17, state=FAILED), op(18))
    text = verdict(went_on, left(1))[0]
    assert "the other is not in a collective, after reduce" in text


def test_the_innermost_operation_counts():
    """A step has collectives of its own."""
    step = op(17, "step", 40, OPEN)
    assert "in reduce at" in verdict(left(0, step, op(18, state=OPEN)))[0]
    assert "in step at" in verdict(left(0, step, op(18)))[0]


def test_ranks_at_one_place_are_none_of_them_odd():
    """A run that is well, as far as this tells."""
    text, odd = verdict(*(left(r, op(17, state=OPEN)) for r in (0, 1)))
    assert odd == []
    assert text == "all 2 ranks are in reduce at /run/train.py:44 (#17): none is odd"


def test_where_ways_parted_is_found():
    """The first operation that was not the same, folders aside, of those all have."""
    one = [op(n) for n in range(1, 20)]
    other = [attrs.evolve(o, file="/elsewhere/train.py") for o in one]
    other[11] = attrs.evolve(other[11], name="gather", line=30)
    parted = hang.merged([left(0, *one[5:]), left(1, *other)])["parted"]
    assert parted == (
        "their ways part at #12: rank 0 did reduce at train.py:44, rank 1 did gather "
        "at train.py:30"
    )
    assert hang.merged([left(0, *one), left(1, *one[:15])])["parted"] == ""


def test_the_text_has_each_rank_and_the_last_operations():
    """A table of ranks, and what the odd one and another did last; JSON can hold it."""
    flight = json.dumps(
        {"entries": [{"profiling_name": "gloo:all_reduce", "collective_seq_id": 34}]}
    )
    odd = left(0, *(op(n) for n in range(9, 17)), stack=stack("data.py", 12))
    waits = left(1, op(16), op(17, state=OPEN), flight=flight)
    data = hang.merged([odd, waits])
    lines = hang.lines(data)
    assert lines[0] == "2 ranks"
    table = [line.split() for line in lines]
    assert next(r for r in table if r[:1] == ["0"])[:3] == ["0", "node7", "after"]
    assert next(r for r in table if r[:1] == ["1"])[-2:] == ["gloo:all_reduce", "34"]
    assert sum(r[:1] == ["#16"] for r in table) == 2
    assert not any(r[:1] == ["#11"] for r in table)
    json.dumps(data)
    assert (
        hang.merged([attrs.evolve(waits, flight='{"entr')])["ranks"][1]["torch"] == ""
    )


def work(ring, count, **more):
    """So many operations of this line."""
    for _ in range(count):
        with ring.begin(ENV, "reduce", **more):
            pass


def test_a_ring_keeps_the_last_operations_with_their_lines():
    """In order, also when it has gone round; the line is the program's."""
    ring = Ring()
    work(ring, SLOTS + 3)
    with pytest.raises(ValueError, match="x"), ring.begin(ENV, "step", 12):
        raise ValueError("x")
    entry = ring.begin(ENV, "gather", {"": 1, "a": 2})
    each = operations(ring.memory)
    assert [one.number for one in each] == list(range(6, SLOTS + 6))
    assert [one.state for one in each[-3:]] == [ENDED, FAILED, OPEN]
    assert [one.brings for one in each[-3:]] == ["", "update 12", ""]
    assert {one.file for one in each} == {__file__[-comm_site.FILE :]}
    lines = __import__("pathlib").Path(__file__).read_text().splitlines()
    assert 'ring.begin(ENV, "gather"' in lines[each[-1].line - 1]
    assert each[-2].ended >= each[-2].begun > 0
    entry.__exit__(None, None, None)
    assert operations(ring.memory)[-1].state == ENDED


def test_a_lost_connection_says_what_the_rank_was_in():
    """On torch's own error; what the program raises by itself is left as it is."""
    ring = Ring()
    for text, notes in (("Timed out waiting 3000ms", 1), ("shapes differ", 0)):
        with pytest.raises(RuntimeError) as caught, ring.begin(ENV, "gather"):
            raise RuntimeError(text)
        assert len(getattr(caught.value, "__notes__", [])) == notes
    ring = Ring()
    with pytest.raises(RuntimeError) as caught, ring.begin(ENV, "step", 3):
        raise RuntimeError("Connection closed by peer")
    assert caught.value.__notes__[0].startswith(
        f"this rank was in step of update 3 at {__file__[-comm_site.FILE :]}:"
    )


def test_a_ring_goes_on_in_a_file():
    """What was begun before is there too, and who it is stays as it is written."""
    ring, memory = Ring(), mmap.mmap(-1, LENGTH)
    memory[:HEAD] = b"x" * HEAD
    work(ring, 2)
    ring.move(memory)
    work(ring, 1)
    assert [one.number for one in operations(memory)] == [1, 2, 3]
    assert memory[:HEAD] == b"x" * HEAD


@pytest.fixture
def group():
    """A ring as of an open group."""
    forget_ring()
    yield ring()
    forget_ring()


def test_a_quiet_rank_writes_its_stacks_once(tmp_path, group):
    """After nearly as long as a collective may take, and again only after another."""
    gone = comm_hang.Path(tmp_path, "rank-5.ops")
    gone.write_bytes(b"of a larger run")
    work(group, 1)  # before: a busy machine may take its time between the two
    leave(ENV_MAIN, str(tmp_path), 0.3)
    leave(ENV_MAIN, str(tmp_path), 0.3)  # as once
    assert not gone.exists()
    file = tmp_path / "rank-0.stack"
    for many in (1, 2):
        until = time.monotonic() + 60
        while file.read_text().count("in test_a_quiet_rank") < many:
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.5)
        assert file.read_text().count("in test_a_quiet_rank") == many
        work(group, 1)
    assert not read(tmp_path)[0].ended
    forget_ring()
    (one,) = read(tmp_path)
    assert (one.rank, one.world, one.ended, len(one.operations)) == (0, 2, True, 3)
    assert "accelx-hang" not in {thread.name for thread in threading.enumerate()}
    forget(tmp_path, range(1))
    assert read(tmp_path) == []


def test_a_killed_process_leaves_what_it_was_in(tmp_path, group):
    """kill -9 lets it write nothing more; the kernel has what it wrote."""
    pid = os.fork()
    if not pid:
        try:
            leave(ENV_MAIN, str(tmp_path), 60.0)
            work(group, SLOTS)
            group.begin(ENV, "gather", {"a": Spec(torch.float32, (2, 3), True), "b": 1})
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (one,) = read(tmp_path)
    *each, last = one.operations
    assert (one.pid, one.ended) == (pid, False)
    assert {(op.name, op.state) for op in each} == {("reduce", ENDED)}
    assert (last.number, last.name, last.state) == (SLOTS + 1, "gather", OPEN)
    assert last.brings == "2 leaves, float32 (2, 3)"


def test_a_new_start_does_not_cut_the_file_of_an_old_one(tmp_path, group):
    """Which may not have ended, and would at its next operation, by a SIGBUS."""
    leave(ENV_MAIN, str(tmp_path), 60.0)
    work(group, 1)
    forget_ring()
    memory = group.memory
    before = memory[:]
    leave(ENV_MAIN, str(tmp_path), 60.0)
    assert memory[:] == before


def test_a_full_disk_is_told_when_the_rank_connects(tmp_path, group):
    """Not by a SIGBUS, where an operation first comes to a page that has no room."""
    with small_disk(tmp_path / "disk", 64 * PAGE) as folder:
        room(folder, LENGTH // PAGE)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with pytest.raises(ValueError, match="No space left"):
                    leave(ENV_MAIN, str(folder), 60.0)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


ENV_MAIN = Env(rank=0, world=2)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, group):
    """With the folder, and what to write."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"a folder that can be written, got .*file"):
        leave(ENV, str(file / "logs"), 1.0)


def test_the_door_wants_a_folder_with_something_in_it(tmp_path, capsys):
    """2 for wrong use; a damaged file is a rank that left nothing."""
    assert door.main(["hang", str(tmp_path)]) == 2
    assert "which has none" in capsys.readouterr().err
    assert door.main(["hang", str(tmp_path / "no")]) == 2
    (tmp_path / "rank-0.ops").write_bytes(b"half")
    assert door.main(["--json", "hang", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["world"] == 1
