"""Ranks that part are told so at once, each of them, with every side's line."""

import inspect
import os
import signal
import threading
import time
from functools import cache

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed as dist
from torch import nn

import accelx as ax
from accelx import _torch
from accelx.comm_ring import ring
from accelx.doctors import hang
from accelx.testing import RankError, run

pytestmark = pytest.mark.multi
WORLD = 3
SOON = 2.0  # seconds that a rank may be late


def line_of(fn, text):
    """`test_lockstep.py:41`, of the one line of a function that has this text."""
    lines, first = inspect.getsourcelines(fn)
    at = [first + i for i, line in enumerate(lines) if text in line]
    assert len(at) == 1, (text, at)
    return f"{__file__}:{at[0]}"


def net():
    """A model that is the same on each rank."""
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def mean(model, batch):
    """A loss."""
    return model(batch["x"]).mean()


def other_mean(model, batch):
    """Another loss of the same value."""
    return mean(model, batch)


def stepping(env, loss=mean, timeout=30.0):
    """A state, and its step in lockstep."""
    tx = ax.chain(ax.with_lockstep(timeout), ax.shard_model(env))
    state = ax.init(tx, net, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    return state, ax.step(tx, loss)


def batch(env, **more):
    """Rows of this rank: their number is its own."""
    return {"x": torch.ones(1 + env.rank, 3), **more}


def other_collective(env):
    """Rank 1 gathers where the others reduce."""
    if env.rank == 1:
        ax.gather(env, torch.ones(2))  # gathers
    ax.reduce(env, torch.ones(2))  # reduces


def other_line(env):
    """The same collective, in two branches."""
    if env.main:
        return ax.reduce(env, 1, "sum")  # main's
    return ax.reduce(env, 1, "sum")  # the others'


def other_shape(env):
    """Rank 2 brings another shape."""
    ax.reduce(env, {"a": torch.ones(2 + (env.rank == 2))})


def other_keys(env):
    """Rank 0 has one more metric."""
    ax.reduce(env, {"a": 1.0} | ({"b": 1.0} if env.main else {}))


def skipped_step(env):
    """Rank 1 leaves out a step."""
    state, step = stepping(env)
    for i in range(3):
        if (env.rank, i) != (1, 1):
            state, _ = step(state, batch(env))  # steps
    ax.barrier(env)  # waits


def other_step(env):
    """Rank 2 has made a step more when the others make their first."""
    state, step = stepping(env)
    state, _ = step(state, batch(env))
    if env.rank == 2:
        object.__setattr__(state, "step", 7)  # as if it were loaded from elsewhere
    step(state, batch(env))


def other_loss(env):
    """Rank 1 has another loss function."""
    state, step = stepping(env, other_mean if env.rank == 1 else mean)
    step(state, batch(env))


def other_batch(env):
    """Rank 0's batch has a mask."""
    state, step = stepping(env)
    step(state, batch(env, **({"mask": torch.ones(1)} if env.main else {})))


def other_dtype(env):
    """Rank 1's labels are of another dtype."""
    state, step = stepping(env)
    dtype = torch.int32 if env.rank == 1 else torch.int64
    step(state, batch(env, y=torch.ones(1, dtype=dtype)))


def stays_away(env):
    """Rank 1 is in code of the program's own for longer than it may be late."""
    ax.reduce(env, 1)  # the last
    ring().check.__self__.timeout = SOON  # not before: a busy machine is late as well
    store = _torch.prefixed("stays away", _torch.default_store())
    if env.rank == 1:
        store.wait(["0", "2"])
    try:
        ax.reduce(env, torch.ones(2))  # not met
    finally:
        store.set(str(env.rank), "")


def leaves(env):
    """Rank 1 is done before the others are."""
    ax.reduce(env, 1)  # the last
    if env.rank == 1:
        ax.close(env)
        return
    ax.reduce(env, torch.ones(2))  # not met


def told(env, fn):
    """What a rank raises."""
    try:
        fn(env)
    except ax.CollectiveError as error:
        return str(error)
    return None


PARTING = [
    *(other_collective, other_line, other_shape, other_keys, skipped_step),
    *(other_step, other_loss, other_batch, other_dtype, stays_away, leaves),
]


@cache
def all_told():
    """What each rank says of each way to part, in one launch; the last one leaves."""

    def each(env):
        ax.with_lockstep(30)(env)
        found = {}
        for fn in PARTING[:-1]:
            found[fn.__name__] = told(env, fn)
            ax.with_lockstep(30)(env)  # anew, at the same place on all ranks
        found["leaves"] = told(env, leaves)
        return found

    return run(WORLD, timeout=90)(each)()


def says(fn):
    """The one text that all ranks raise; none of them has waited for a timeout."""
    texts = [rank[fn.__name__] for rank in all_told()]
    raised = [text for text in texts if text is not None]
    assert len(raised) == (2 if fn is leaves else 3)
    assert len(set(raised)) == 1, raised
    assert ("has not come" in raised[0]) == (fn is stays_away)
    assert raised[0].startswith("with_lockstep wants every rank ")
    return raised[0]


def test_different_collectives_are_named_with_both_lines():
    """Who is where, and what to look for."""
    text = says(other_collective)
    reduces, gathers = (
        line_of(other_collective, name) for name in ("# reduces", "# gathers")
    )
    assert f'reduce(op="mean") at {reduces} on ranks 0, 2' in text
    assert f"gather at {gathers} on rank 1" in text
    assert "look for a branch on the rank" in text


def test_one_collective_in_two_branches_is_two():
    """Ranks would meet, but not in the same line."""
    text = says(other_line)
    assert f"at {line_of(other_line, '# main')} on rank 0" in text
    assert f"at {line_of(other_line, '# the others')} on ranks 1, 2" in text


def test_trees_that_differ_are_shown_with_the_line():
    """The first leaf in which they do, and what each rank brings."""
    text = says(other_shape)
    assert "tree['a'] is float32 (2,) on ranks 0, 1, float32 (3,) on rank 2" in text
    assert f"at {line_of(other_shape, 'ax.reduce')} " in text
    assert "tree['b'] is float 1.0 on rank 0, missing on ranks 1, 2" in says(other_keys)


def test_a_step_that_a_rank_leaves_out_is_seen_at_once():
    """The others are in it, the rank is at what comes after, and all learn it."""
    text = says(skipped_step)
    steps, waits = (line_of(skipped_step, name) for name in ("# steps", "# waits"))
    assert f"step at {steps} on ranks 0, 2, barrier at {waits} on rank 1" in text
    assert f"the last that all did was step at {steps}" in text


@pytest.mark.parametrize(
    ("fn", "meaning"),
    [
        (other_step, "number of the step is 1 on ranks 0, 1, 7 on rank 2"),
        (other_loss, "loss function is"),
        (other_batch, "batch, at args[0]['mask'], is float32 (1,) on rank 0, missing"),
        (other_dtype, "is int64 (1,) on ranks 0, 2, int32 (1,) on rank 1"),
    ],
)
def test_steps_that_differ_are_told_apart(fn, meaning):
    """By their number, their loss, the keys and the dtypes of the batch."""
    assert meaning in says(fn)
    assert "bring the same on every rank" in says(fn)


def test_a_rank_that_does_not_come_is_named():
    """After the time that it may be late, to the others; to itself when it comes."""
    text = says(stays_away)
    assert f"at {line_of(stays_away, '# not met')}, but rank 1 has not come" in text
    assert f"after {SOON:g} s" in text
    assert f'did was reduce(op="mean") at {line_of(stays_away, "# the last")}' in text
    assert "give it more time, with_lockstep(timeout=...)" in text


def test_a_rank_that_has_left_is_named():
    """A connection that broke says who is missing, and what it did last."""
    text = says(leaves)
    assert "but rank 1 has left the run" in text
    assert f"at {line_of(leaves, '# the last')}" in text


def test_ranks_in_lockstep_are_let_be():
    """Rows, padding and lists of samples may differ; every operation passes."""

    def alike(env):
        state, step = stepping(env)
        texts = [torch.ones(env.rank + i) for i in range(1 + env.rank)]
        ragged = torch.ones(1 + env.rank, 5 + env.rank)
        for _ in range(3):
            state, out = step(state, batch(env, texts=texts, ragged=ragged))
            ax.gather(env, torch.ones(1 + env.rank, 2))
            ax.gather_objects(env, env.rank)
            with ax.main_first(env):
                pass
            ax.broadcast(env, float(out.loss) if env.main else None)
            ax.barrier(env)
        assert ax.measure(ax.identity, lambda m, b: m(b["x"]).mean())
        check = ring().check
        dist.destroy_process_group()  # by the program itself, which knows of no mark
        ax.barrier(env := ax.connect(env))
        assert ring().check is None
        ring().check = check  # as if `connect` had not seen it
        ax.barrier(env)
        assert ring().check is None
        return state.step

    assert run(WORLD)(alike)() == [3] * WORLD


def test_control_without_it_ranks_hang_and_leave_where_they_stand(tmp_path):
    """Nothing ends them for longer than they may be quiet; each has written by then."""

    def quiet(rank, mark):
        at = line_of(hangs, mark).rpartition(":")[2]
        return f"line {at} in hangs" in (tmp_path / f"rank-{rank}.stack").read_text()

    def watch(enough):
        while not (quiet(0, "# not met") and quiet(1, "# away")):
            time.sleep(0.05)
        enough.set()

    def hangs(env):
        env = ax.connect(env, device="cpu", timeout=SOON, reports=str(tmp_path))
        os.kill(os.getpid(), signal.SIGQUIT)  # the first stack; no end of the rank
        ax.reduce(env, 1)  # the last
        if env.rank == 1:
            enough = threading.Event()
            threading.Thread(target=watch, args=[enough], daemon=True).start()
            enough.wait()  # away
            raise ValueError("enough")
        ax.reduce(env, torch.ones(2))  # not met

    with pytest.raises(RankError, match=r"rank 1 of 2 failed:(.|\n)*enough"):
        run(2)(hangs)()
    asked = hang.looked(str(tmp_path))
    away, last, not_met = (
        line_of(hangs, f"# {mark}") for mark in ("away", "the last", "not met")
    )
    assert asked["odd"] == [1]
    assert asked["verdict"].startswith(f"rank 1 is not in a collective: {away}, in ")
    assert f'after reduce(op="mean") at {last} (#1); the other ' in asked["verdict"]
    assert asked["verdict"].endswith(f'in reduce(op="mean") at {not_met} (#2)')


def test_one_rank_has_nobody_to_compare_with():
    """It starts no group; what is no Env is refused, and so is a timeout of nothing."""
    env = ax.Env()
    assert ax.with_lockstep()(env) is env
    with pytest.raises(TypeError, match="with_lockstep wants an Env first"):
        ax.with_lockstep()(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="more than 0, got 0; write with_lockstep"):
        ax.with_lockstep(0)
