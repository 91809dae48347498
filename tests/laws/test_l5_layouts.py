"""L5: a checkpoint that goes from hand to hand, over every way to cut a model.

From one process to two ranks, from there to four, and back to one: the same state to
the bit, and from each the next losses of a loop by hand. What ZeRO saves:
tests/multi/test_deepspeed.py; odd sizes, dtypes and slots: test_l5_restore.py.
"""

import tempfile
from functools import cache

import pytest
import torch

import accelx as ax
from accelx import testing
from accelx.env_part import rows_env
from tests.laws import odd, training as t
from tests.multi import test_pairs as pairs

pytestmark = [pytest.mark.multi, t.quiet_views]
WAYS = {  # ranks -> (axes, kind, the pass beside)
    2: [
        ("data=2", "ddp", None),
        ("data=2", "fsdp2", None),
        ("tensor=2", "ddp", "shard_tensors"),
        ("stage=2", "ddp", "shard_stages"),
        ("expert=2", "ddp", "shard_experts"),
        ("sequence=2", "fsdp2", "shard_sequence"),
    ],
    4: [
        ("sequence=2,tensor=2", "fsdp2", "shard_tensors"),
        ("replicate=2,shard=2", "hsdp", None),
        ("data=2,stage=2", "fsdp2", "shard_stages"),
        ("data=2,expert=2", "fsdp2", "shard_experts"),
        ("data=4", "ddp", None),
        ("data=2,tensor=2", "fsdp2", "shard_tensors"),
    ],
}
MAKE = pairs.made(True)
DATA = pairs.batches()
BEFORE = 1  # steps before the first save


def chain(env, way, *more):
    """The chain of a way, with an average and a schedule to keep."""
    axes, kind, beside = way
    passes = [] if beside is None else [pairs.PASSES[beside](env)]
    if "sequence" in axes and beside != "shard_sequence":
        passes.append(pairs.PASSES["shard_sequence"](env))
    kept = ax.clip(t.LIMIT), ax.with_schedule(t.curve), ax.with_ema(pairs.DECAY)
    return ax.chain(ax.shard_model(env, kind), *passes, *kept, *more)


def go_on(env, tx, state, data):
    """The state after `data`, and its losses and norms."""
    step, seen = ax.step(tx, pairs.loss), []
    for batch in data:
        state, out = step(state, t.part(rows_env(env), batch))
        seen += [float(out.loss), float(out.norm)]
    return state, seen


ALONE = ("", "ddp", None)


def first(env, folder):
    """Where one process saved, and all that it had then."""
    tx = chain(env, ALONE)
    state, _ = go_on(env, tx, ax.init(tx, MAKE, t.grouped), DATA[:BEFORE])
    return ax.save_state(env, f"{folder}/first")(state), odd.described(state)


def handed(env, urls, folder):
    """Each way loads a checkpoint, saves it as its own, goes on: (URL, losses)."""
    found = []
    for way, url in zip(WAYS[env.world], urls, strict=True):
        here = ax.connect(env, axes=way[0])
        tx = chain(here, way, ax.load_state(here, url))
        torch.manual_seed(8)
        state = ax.init(tx, pairs.Net(True).double(), t.grouped)
        made = ax.save_state(here, f"{folder}/{env.world}-{len(found)}")(state)
        found.append((made, go_on(here, tx, state, DATA[BEFORE:])[1]))
    return found


def last(env, urls):
    """All that one process has of each checkpoint."""
    states = [
        ax.init(chain(env, ALONE, ax.load_state(env, url)), MAKE, t.grouped)
        for url in urls
    ]
    return [odd.described(state) for state in states]


@cache
def passed_on():
    """What was there at first, at the end, and what each way on its way went on to."""
    with tempfile.TemporaryDirectory() as folder:
        url, wanted = testing.run(1)(first)(folder)[0]
        urls, losses = [url] * len(WAYS[2]), []
        for ranks in WAYS:
            found = testing.run(ranks, timeout=200)(handed)(urls, folder)[0]
            urls = [made for made, _ in found]
            losses += [seen for _, seen in found]
        return wanted, testing.run(1)(last)(urls)[0], losses


def test_it_comes_back_to_the_bit():
    """Weights, buffers, moments, options, the average, the schedule and the counts."""
    wanted, ends, _ = passed_on()
    assert {"step", "slots.with_ema", "slots.with_schedule"} <= {*wanted}
    assert any(name.startswith("optim.0.layers") for name in wanted)
    for way, end in zip(WAYS[4], ends, strict=True):
        assert not odd.differing(wanted, end), way


def test_from_each_way_the_next_losses_are_those_of_one_process():
    """And the norms; the control is the loop from another place."""
    judge = t.by_hand(MAKE, pairs.loss, t.grouped, DATA)
    wanted = [x for s in judge[BEFORE:] for x in (s.loss, s.norm)]
    ways = [way for each in WAYS.values() for way in each]
    for way, losses in zip(ways, passed_on()[2], strict=True):
        assert losses == pytest.approx(wanted, rel=1e-10), way
    fresh = t.by_hand(MAKE, pairs.loss, t.grouped, DATA[BEFORE:])
    assert [x for s in fresh for x in (s.loss, s.norm)] != pytest.approx(wanted, 1e-3)
