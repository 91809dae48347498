"""A run that is killed at any instant loses nothing that it had saved."""

from functools import cache
from itertools import product

import attrs
import pytest

from tests import crashing, faulty
from tests.laws.training import quiet_views

pytestmark = [pytest.mark.multi, quiet_views]
KILLS = {1: 8, 2: 4}  # with each way to save; benchmarks/crash.py does more


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """(world, wait) -> what each killed run left, and what it had lost.

    All go on in the same ranks: new ones for each would cost more than the runs.
    """
    quiet = cache(crashing.whole_run)

    @cache
    def ended(world, wait):
        folder = tmp_path_factory.mktemp("killed")
        seconds = crashing.duration(str(folder / "timed"), world, wait)
        crashes = [*crashing.crashes(world * 2 + wait, KILLS[world], world, wait)]
        kills = [
            crashing.killed(folder / str(number), crash, seconds)
            for number, crash in enumerate(crashes)
        ]
        found = [crashing.look(*kill, dict) for kill in kills]
        weights = crashing.resumed([url for url, _ in kills], world, wait)
        found = map(lambda one, w: attrs.evolve(one, weights=w), found, weights)
        pairs = zip(found, crashes, strict=True)
        return [(one, crashing.faults(one, c, quiet(world))) for one, c in pairs]

    return ended


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("world", KILLS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(left, world, wait):
    """What was reported is there, without a fault; the weights end the same."""
    assert [faults for _, faults in left(world, wait)] == [[]] * KILLS[world]


def test_kills_come_at_different_times(left):
    """Some of them during a save, and before and after different steps."""
    every = [one for way in product(KILLS, (True, False)) for one, _ in left(*way)]
    assert any(one.cut for one in every)
    assert len({one.step for one in every}) > 2


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    """A run that ended by itself, as a crash after its last step would leave it."""
    url = tmp_path_factory.mktemp("run") / "run"
    crash = crashing.Crash(1, True, (None,))
    crashing.duration(str(url), 1, True)
    return url, crash, crashing.whole_run(1)


def hurt(url, suffix):
    """Turn the last byte of a file of the newest checkpoint."""
    faulty.flip(max(max(url.iterdir()).glob(f"*{suffix}")), -1)


def test_control_each_broken_promise_is_seen(survived):
    """A lost checkpoint, a turned byte, too many that are kept, and other weights."""
    url, crash, weights = survived

    def look():
        return crashing.look(str(url), crashing.STEPS, lambda: weights)

    left = look()
    assert not crashing.faults(left, crash, weights)
    other = {name: tensor + 1 for name, tensor in weights.items()}
    assert len(crashing.faults(left, crash, other)) == len(weights)
    more = attrs.evolve(left, kept=crashing.KEEP + 2)
    assert "are kept" in crashing.faults(more, crash, weights)[0]
    hurt(url, ".safetensors")
    assert "another digest" in crashing.faults(look(), crash, weights)[0]
    hurt(url, "commit.json")
    assert "step 4 was reported" in crashing.faults(look(), crash, weights)[0]
