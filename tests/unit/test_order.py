"""An illegal order is refused with the reason and an order that works."""

import pytest

import accelx as ax


def keep(state, out):
    """An arrow that does nothing."""
    return state, out


def one(name, *rules):
    """A pass with rules."""
    return ax.transform(name, before=keep, rules=rules)


AFTER_B = ax.Rules(after=("b",), why="b makes what a needs")
NO_C = ax.Rules(excludes=("c",), why="both would")
ONCE = ax.Rules(once=True, why="one is enough")


def refusal(*parts):
    """The message of a chain that is refused."""
    with pytest.raises(ax.OrderError) as error:
        ax.chain(*parts)
    return str(error.value)


def test_after_holds_at_any_distance():
    """What lies between does not matter."""
    a, b, c = one("a", AFTER_B), one("b"), one("c")
    assert len(ax.chain(b, c, a)) == 3
    text = refusal(a, c, b)
    assert text.startswith("a must come after b, because b makes what a needs.")
    works = text.partition("works:")[2]
    assert works.index("'b'") < works.index("'a'")
    assert "'c'" in works


def test_a_rule_about_an_absent_pass_says_nothing():
    """after is no demand that the other be there."""
    assert len(ax.chain(one("a", AFTER_B, NO_C))) == 1


@pytest.mark.parametrize("flip", [False, True])
def test_exclusion_holds_in_both_orders(flip):
    """Also where the other is far away."""
    parts = [one("a", NO_C), one("b"), one("c")]
    text = refusal(*parts[::-1] if flip else parts)
    assert "a cannot be combined with c, because both would" in text


def test_once_counts_by_name():
    """Twice with other settings is twice."""
    a, b = one("a", ONCE), one("b")
    assert "only once, because one is enough" in refusal(a, b, a)
    assert len(ax.chain(b, b)) == 2


def test_of_a_circle_of_rules_one_is_left_out():
    """Where no order of all works, the suggestion is still one that does."""
    after_a = ax.Rules(after=("a",), why="so")
    text = refusal(one("a", AFTER_B), one("b", after_a))
    works = text.partition("works:")[2]
    assert works.count("transform(") == 1


def test_the_first_reason_in_the_chain_is_the_one_given():
    """With several rules broken the message is about one."""
    text = refusal(one("a", AFTER_B), one("b"), one("d", ONCE), one("d", ONCE))
    assert text.startswith("a must")
    assert text.partition("works:")[2].count("'d'") == 1


def test_the_order_is_never_sorted_silently():
    """A legal chain stays as written, whatever order it has."""
    parts = [one(name) for name in "zmab"]
    assert [p.name for p in ax.chain(*parts)] == list("zmab")


def test_the_factories_orders():
    """loss_scale comes before clip, clip before clip_value; the rest is free."""
    ax.chain(ax.with_precision("fp16"), ax.clip(1.0), ax.clip_value(1.0))
    ax.chain(ax.clip(1.0), ax.with_precision("bf16"))  # has no scale
    assert "before any clipping" in refusal(ax.clip_value(1.0), ax.clip(1.0))
    assert "judged before" in refusal(ax.clip(1.0), ax.with_precision("fp16"))
