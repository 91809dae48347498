"""A load runs no pickle, and neither does a save; ranks tell each other by theirs."""

import marshal
import pickle
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.distributed

import accelx as ax
from accelx import testing
from tests import forged, saving
from tests.laws.training import quiet_views

pytestmark = [pytest.mark.multi, quiet_views]
READERS = (
    (pickle, ("load", "loads", "Unpickler", "_loads", "_load", "_Unpickler")),
    (marshal, ("load", "loads")),
    (torch, ("load",)),
)
BETWEEN_RANKS = ("accelx/comm_wire.py", "torch/distributed/distributed_c10d.py")
IMPORTS = "<frozen importlib._bootstrap_external>"  # marshal is how modules are cached
c10d = sys.modules["torch.distributed.distributed_c10d"]


class PickledError(Exception):
    """Something was about to be unpickled."""


@contextmanager
def refusing(allowed=()):
    """Whoever reads a pickle raises, but for callers in the files `allowed`."""
    count = [0]

    def guarded(real):
        def reader(*args, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if caller != IMPORTS:
                if not any(map(caller.endswith, allowed)):
                    raise PickledError(caller)
                count[0] += 1
            return real(*args, **kwargs)

        return reader

    with pytest.MonkeyPatch.context() as patch:
        for module, names in READERS:
            for name in names:
                patch.setattr(module, name, guarded(getattr(module, name)))
        patch.setattr(c10d, "_unpickler", guarded(c10d._unpickler))
        yield count


def trip(env, folder, kind, allowed=()):
    """Save and load a run; how many pickles were read, and whether it goes on alike."""
    url = str(folder / kind)
    with refusing(allowed) as count:
        save = ax.save_state(env, url, every=1, keep=1, wait=kind == "ddp")
        state, _ = saving.train(saving.chain(env, kind, save), 2)
        state.slots["save_state"].background.join()
        resume = saving.chain(env, kind, ax.load_state(env, url, verify="full"))
        resumed, _ = saving.train(resume, 3)
        read = count[0]
    whole, _ = saving.train(saving.chain(env, kind), 3)
    pairs = zip(
        saving.weights(whole).values(), saving.weights(resumed).values(), strict=True
    )
    return read, all(torch.equal(a, b) for a, b in pairs)


def everything(env, folder):
    """Save and load a state with records, objects, extra state and ties."""
    with refusing():
        ax.save_state(env, folder)(forged.fresh())
        return forged.load(folder, verify="full").step


def test_one_process_reads_no_pickle(tmp_path):
    """A run's state, and one with each kind of value that a slot can hold."""
    assert testing.run(1)(everything)(tmp_path / "everything") == [1]
    assert testing.run(1)(trip)(tmp_path, "ddp") == [(0, True)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_read_only_what_they_send_each_other(tmp_path, kind):
    """Pickles pass between processes of the run, and none comes from the store."""
    for read, same in testing.run(2)(trip)(tmp_path, kind, BETWEEN_RANKS):
        assert read > 0
        assert same


def test_control_a_pickle_is_seen(tmp_path):
    """The guard sees torch.load, and pickle itself."""
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    for read in (
        lambda: torch.load(tmp_path / "a.pt"),
        lambda: pickle.loads(pickle.dumps(5)),
    ):
        with refusing(), pytest.raises(PickledError, match="test_unpickled"):
            read()
        read()
