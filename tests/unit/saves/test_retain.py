"""Which checkpoints may go: laws over any listing."""

import attrs
import pytest
from hypothesis import given, strategies as st

import accelx as ax
from accelx.saves.commit import Commit, Found, folder_name, step_of
from accelx.saves.retain import retain

NAN = float("nan")
LOSSES = st.sampled_from([0.5, 1.0, -2.0, NAN, float("inf"), None])


def entry(number, step, whole, loss, time):
    """One checkpoint of a listing."""
    metrics = {} if loss is None else {"loss": loss}
    commit = Commit(step, step, time, 1, 9, 9, 9, "0" * 32, metrics) if whole else None
    name = f"step-{step:010d}-{number:08x}"
    return Found(f"mem/{name}", name, step, commit, "" if whole else "it has no commit")


@st.composite
def listings(draw):
    """Checkpoints of steps 9, 10, 100 and others, equal ones too, whole or not."""
    steps = st.one_of(st.sampled_from([0, 9, 10, 100]), st.integers(0, 30))
    rows = draw(st.lists(st.tuples(steps, st.booleans(), LOSSES), max_size=12))
    return [entry(i, *row, time=float(i)) for i, row in enumerate(rows)]


POLICIES = st.builds(
    retain,
    st.integers(1, 4),
    st.none() | st.integers(1, 10),
    st.none() | st.tuples(st.just("loss"), st.sampled_from(["min", "max"])),
)


def whole(listing):
    """Those that are committed, oldest first."""
    done = [one for one in listing if one.commit]
    return sorted(done, key=lambda one: (one.step, one.commit.time))


@given(listings(), POLICIES)
def test_the_newest_and_what_was_asked_for_stay(listing, policy):
    """The last ones by step, each that `every` divides, and the best by its metric."""
    gone = {one.name for one in policy(listing)}
    done = whole(listing)
    for one in done[-policy.last :]:
        assert one.name not in gone
    for one in done:
        if policy.every and one.step % policy.every == 0:
            assert one.name not in gone
    scores = [one.commit.metrics.get("loss", NAN) for one in done]
    finite = [x for x in scores if abs(x) < float("inf")]
    if policy.best and finite:
        best = min(finite) if policy.best[1] == "min" else max(finite)
        left = [o for o in done if o.name not in gone]
        assert any(o.commit.metrics.get("loss") == best for o in left)


@given(listings(), POLICIES)
def test_what_is_under_way_stays(listing, policy):
    """One without a commit goes only when a whole one is as new; never without one."""
    gone = policy(listing)
    done = whole(listing)
    for one in listing:
        if one.commit is None:
            assert (one in gone) == bool(done and one.step <= done[-1].step)
    assert done or not gone


@given(listings(), POLICIES)
def test_no_more_stays_than_was_asked_for(listing, policy):
    """Besides the last, the multiples and one best, nothing whole is left."""
    left = [one for one in whole(listing) if one not in policy(listing)]
    extra = [
        one
        for one in left[: -policy.last]
        if not (policy.every and one.step % policy.every == 0)
    ]
    assert len(extra) <= (policy.best is not None)


@given(listings(), POLICIES, st.randoms())
def test_removing_is_done_once_and_in_any_order_of_the_listing(listing, policy, order):
    """A second call has nothing left to remove; the order of a listing is nothing."""
    gone = policy(listing)
    mixed = list(listing)
    order.shuffle(mixed)
    assert policy(mixed) == gone
    assert policy([one for one in listing if one not in gone]) == ()
    assert list(gone) == sorted(gone, key=lambda one: one.step)


def test_steps_are_numbers_not_text():
    """100 is newer than 9, and of two saves of one step the later stays."""
    nine, hundred = entry(0, 9, True, None, 1.0), entry(1, 100, True, None, 0.0)
    again = entry(2, 100, True, None, 5.0)
    assert retain(1)([hundred, nine]) == (nine,)
    assert retain(1)([again, nine, hundred]) == (nine, hundred)


def test_folders_of_others_have_no_step():
    """Only names as accelx makes them are checkpoints; they sort by step."""
    names = [folder_name(step) for step in (9, 10, 100, 10**12)]
    assert sorted(names) == names
    assert [step_of(n) for n in names] == [9, 10, 100, 10**12]
    for other in ("step-9", "step-0000000009", "runs", "step-0000000009-XYZ", ".tmp"):
        assert step_of(other) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"last": 0}, "last.*at least 1, got 0"),
        ({"every": -5}, "every.*got -5"),
        ({"last": True}, "last.*got True"),
        ({"best": ("loss", "low")}, '"min" or "max"'),
        ({"best": ("loss",)}, "best"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(wrong, words):
    """With the value, and what to write."""
    with pytest.raises(ValueError, match=words):
        ax.retain(**wrong)


def test_a_policy_prints_as_the_code_that_makes_it():
    """And equals its equal."""
    policy = ax.retain(2, every=10, best=("loss", "min"))
    assert eval(repr(policy), {"retain": ax.retain}) == policy
    assert attrs.evolve(policy, last=3) != policy
