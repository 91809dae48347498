"""A store fails at any write of a save: nothing is lost, and the run goes on."""

from functools import cache

import attrs
import pytest

import accelx as ax
from accelx import storage_retry, testing
from accelx.errors import CheckpointError
from accelx.saves.commit import found, open_manifest
from accelx.saves.verify import problems
from tests import faulty, saving
from tests.laws.training import grouped, made, masked, quiet_views, same

pytestmark = [pytest.mark.multi, quiet_views]
URL = "faulty://run"
WORLDS = {1: "ddp", 2: "fsdp2"}
WRITES = {
    0: 4,
    1: 2,
}  # of a rank: slices, index; and of rank 0 the manifest, the commit
FAULTS = {  # beside the number of the write
    "fails": lambda n: {"fail_write": n},
    "leaves-half": lambda n: {"fail_write": n, "leave_half": True},
    "dies": lambda n: {"fail_write": n, "once": False, "leave_half": True},
    "keeps-half": lambda n: {"short_write": n},
}


def cases(world):
    """(fault, rank that it befalls, number of its write)."""
    return [
        (fault, rank, number)
        for fault in (FAULTS if world == 1 else ("dies", "keeps-half"))
        for rank in range(world)
        for number in range(1, WRITES[rank] + 1)
    ]


def trained(env, save):
    """Weights after three steps, with `save` called on the state after each."""
    tx = saving.chain(env, WORLDS[env.world])
    state = ax.init(tx, made(), grouped)
    step = ax.step(tx, masked)
    for batch in ax.feed(tx, saving.loader(), stop=3):
        state, _ = step(state, batch)
        save(state)
    return saving.weights(state)


@attrs.frozen
class Told:
    """What a rank saw of a save that failed."""

    error: str  # of the save
    writes: int  # of this rank, of a good save
    newest: tuple  # step of the newest checkpoint after each save
    bad: list  # problems in it, of all
    weights: dict


def newest(bad):
    """The step of the newest checkpoint; its problems go to `bad`."""
    one = ax.latest(URL)
    bad += problems(*open_manifest(one))
    return one.step


def suffer(env, folder, fault, victim, number):
    """Train and save, where the second save meets the fault."""
    place = folder / f"{fault}-{victim}-{number}"
    errors, steps, bad, counts = [], [], [], []
    with faulty.use(place) as faults:

        def save(state):
            before = faults.writes
            if state.step == 2 and env.rank == victim:
                for name, value in FAULTS[fault](before + number).items():
                    setattr(faults, name, value)
            try:
                ax.save_state(env, URL)(state)
                counts.append(faults.writes - before)
            except CheckpointError as error:
                errors.append(str(error))
            faults.dead = False
            ax.barrier(env)  # a rank may look before another has mended its store
            steps.append(newest(bad))
            ax.barrier(env)

        weights = trained(env, save)
    (error,) = errors
    assert set(counts) == {WRITES[env.rank]}
    return Told(error, counts[0], tuple(steps), bad, weights)


@cache
def judge(world):
    """The weights of a run that nothing is saved of."""
    return testing.run(world)(trained)(lambda state: None)[0]


@pytest.fixture(scope="module", params=WORLDS)
def suffered(request, tmp_path_factory):
    """(world, {case: what each rank saw}), in one launch."""
    world, folder = request.param, tmp_path_factory.mktemp("faults")

    def rank(env):
        storage_retry.FIRST_WAIT = storage_retry.LONGEST_WAIT = 0.001
        return {case: suffer(env, folder, *case) for case in cases(world)}

    ranks = testing.run(world, timeout=100)(rank)()
    return world, {case: [told[case] for told in ranks] for case in cases(world)}


def test_every_rank_hears_of_it(suffered):
    """The save raises CheckpointError on all of them, with the rank that failed."""
    _, every = suffered
    for (fault, victim, _), ranks in every.items():
        assert len({told.error for told in ranks}) == 1
        assert f"rank {victim} failed" in ranks[0].error
        assert "Nothing was committed" in ranks[0].error
        said = "the store has" if fault == "keeps-half" else "told to fail"
        assert said in ranks[0].error


def test_what_was_saved_before_stays_and_the_next_save_works(suffered):
    """The newest is the one before, then the one after: each without a fault in it."""
    _, every = suffered
    for case, ranks in every.items():
        for told in ranks:
            assert told.newest == (1, 1, 3), case
            assert not told.bad, case


def test_the_run_goes_on_as_if_nothing_had_been(suffered):
    """To the bit, with the state that could not be saved."""
    world, every = suffered
    assert len(every) == {1: 16, 2: 12}[world]
    for case, ranks in every.items():
        for told in ranks:
            assert same(told.weights, judge(world)), case


def in_chain(env, folder, wait, victim, number):
    """A run that saves each step and dies of a failed write, and its next start."""
    with faulty.use(folder / f"{victim}-{number}") as faults:

        def start():
            save = ax.save_state(env, URL, every=1, keep=2, wait=wait)
            tx = saving.chain(env, WORLDS[env.world], save)
            resume = ax.load_state(env, URL, missing="fresh")
            state, _ = saving.train(ax.chain(tx, resume), 4)
            state.slots["save_state"].background.join()
            return saving.weights(state)

        if env.rank == victim:
            faults.fail_write = 2 * WRITES[victim] + number
        with pytest.raises(CheckpointError, match="told to fail"):
            start()
        bad = []
        left = [newest(bad)] if ax.latest(URL) else []
        ax.barrier(env)
        return left, bad, start(), newest(bad)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("world", WORLDS)
def test_a_run_that_dies_of_it_starts_again_where_it_was_saved(world, wait, tmp_path):
    """Wherever the third save fails, on either rank: the same weights in the end."""

    def rank(env):
        each = [(rank, n) for rank in range(world) for n in range(1, WRITES[rank] + 1)]
        return [in_chain(env, tmp_path, wait, *one) for one in each[::world]]

    def wanted(env):
        return saving.weights(saving.train(saving.chain(env, WORLDS[world]), 4)[0])

    weights = testing.run(world)(wanted)()[0]
    for ends in testing.run(world, timeout=100)(rank)():
        for left, bad, ended, last in ends:
            assert (left, bad, last) == ([2], [], 4)
            assert same(ended, weights)


def each_write(fn):
    """`fn` for each write of a save, by number, in one launch."""
    (told,) = testing.run(1)(
        lambda env: [fn(env, n) for n in range(1, WRITES[0] + 1)]
    )()
    return told


def dropped(env, folder, number):
    """A run of which one write is answered by a dropped connection."""
    storage_retry.FIRST_WAIT = storage_retry.LONGEST_WAIT = 0.001
    settings = {"fail_write": number, "error": faulty.dropped}
    with faulty.use(folder / str(number), **settings) as faults:
        weights = trained(env, ax.save_state(env, URL))
        bad = []
        return newest(bad), bad, weights, faults.writes


def test_what_passes_by_itself_is_tried_again(tmp_path):
    """A dropped connection costs one more write, and nobody hears of it."""
    for told in each_write(lambda env, number: dropped(env, tmp_path, number)):
        assert told[:2] == (3, [])
        assert told[3] == 3 * WRITES[0] + 1
        assert same(told[2], judge(1))


def flipped(env, folder, number):
    """A store that keeps one bit turned, and what a look and a load say of it."""
    with faulty.use(folder / str(number)) as faults:

        def save(state):
            if state.step == 2:
                faults.flip_write = faults.writes + number
            if state.step <= 2:
                ax.save_state(env, URL)(state)

        trained(env, save)
        whole = [one for one in found(URL) if one.commit is not None]
        texts = []
        for one in whole:
            try:
                texts.append(list(problems(*open_manifest(one))))
            except CheckpointError as error:
                texts.append([str(error)])
        return [bool(text) for text in texts]


def test_what_a_store_keeps_wrongly_is_seen_later(tmp_path):
    """No save can know; a look can: of slices, index and manifest, and of a commit."""
    *parts, commit = each_write(lambda env, number: flipped(env, tmp_path, number))
    assert parts == [[False, True]] * (WRITES[0] - 1)
    assert commit == [False]  # no checkpoint
