"""L1, L2, L3: chain has a neutral element, is associative and keeps order."""

from hypothesis import given, strategies as st

import accelx as ax
from accelx.explain import ARROWS
from tests.laws.chains import chains, evaluated, single


def attempt(*transforms):
    """The chain, or the error that it raises."""
    try:
        return ax.chain(*transforms)
    except ax.OrderError as error:
        return error


def nested(parts, cuts):
    """The chain of `parts` grouped as `cuts` says, or None where it raises."""
    parts = list(parts)
    for cut in cuts:
        if len(parts) < 2:
            break
        i = cut % (len(parts) - 1)
        joined = attempt(parts[i], parts[i + 1])
        if isinstance(joined, ax.OrderError):
            return None
        parts[i : i + 2] = [joined]
    whole = attempt(*parts)
    return None if isinstance(whole, ax.OrderError) else whole


@given(chains)
def test_identity_changes_nothing_on_either_side(tx):
    """L1, also by hash and in the table that a person reads."""
    for same in (ax.chain(tx, ax.identity), ax.chain(ax.identity, tx), ax.chain(tx)):
        assert same == tx
        assert hash(same) == hash(tx)
        assert ax.explain(same) == ax.explain(tx)


def test_the_empty_chain_is_the_identity():
    """chain() has no pass, and neither has identity."""
    assert ax.chain() == ax.identity == ax.Transform()


@given(st.lists(single, max_size=6), st.lists(st.integers(0, 9), max_size=6))
def test_every_grouping_is_the_same_chain_or_raises(parts, cuts):
    """L2: parentheses change neither the chain nor whether it is refused."""
    flat = attempt(*parts)
    grouped = nested(parts, cuts)
    if isinstance(flat, ax.OrderError):
        assert grouped is None
    else:
        assert grouped == flat
        assert repr(grouped) == repr(flat)


@given(chains, chains, chains)
def test_three_legal_chains_associate(a, b, c):
    """L2 as it is usually written."""
    left, right = attempt(a, b), attempt(b, c)
    raised = isinstance(left, ax.OrderError), isinstance(right, ax.OrderError)
    whole = attempt(a, b, c)
    if any(raised):
        assert isinstance(whole, ax.OrderError)
    else:
        assert str(attempt(left, c)) == str(attempt(a, right)) == str(whole)


@given(chains, chains)
def test_each_stage_of_a_chain_is_of_the_first_then_of_the_second(a, b):
    """L3, arrow by arrow."""
    whole = attempt(a, b)
    if isinstance(whole, ax.OrderError):
        return
    for arrow in ARROWS:
        ours = [getattr(p, arrow) for p in whole if getattr(p, arrow)]
        theirs = [getattr(p, arrow) for t in (a, b) for p in t if getattr(p, arrow)]
        assert ours == theirs


def test_control_the_order_of_a_chain_is_part_of_it():
    """Two passes in two orders are two chains, by value and in print."""
    one, two = ax.accumulate(2), ax.clip(1.0)
    assert ax.chain(one, two) != ax.chain(two, one)
    assert repr(ax.chain(one, two)) != repr(ax.chain(two, one))


@given(st.lists(single, min_size=2, max_size=5))
def test_a_refused_order_comes_with_one_that_works(parts):
    """The suggestion is made of the same passes, and chain takes it as printed."""
    error = attempt(*parts)
    if not isinstance(error, ax.OrderError):
        return
    assert "because" in str(error)
    written, works = [
        next(line for line in str(error).splitlines() if line.startswith(head))
        for head in ("  written: ", "  works:   ")
    ]
    whole = ax.Transform(tuple(p for one in parts for p in one))
    assert written.removeprefix("  written: ") == whole.brief()
    again = evaluated(works.removeprefix("  works:   "))  # raises if it is not legal
    assert {p.name for p in again} <= {p.name for one in parts for p in one}
    assert len(again) > 0
