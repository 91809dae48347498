"""L9: a transform equals its equal and prints as the code that makes it."""

import pytest
from hypothesis import given, strategies as st

import accelx as ax
from tests.laws.chains import ENV, chains, evaluated, factor, keep, single


@given(chains)
def test_what_is_printed_makes_an_equal(tx):
    """eval(repr(tx)) == tx, and prints the same."""
    again = evaluated(repr(tx))
    assert again == tx
    assert hash(again) == hash(tx)
    assert repr(again) == repr(tx)


@given(st.data())
def test_equal_calls_make_equal_transforms(data):
    """The same factory with the same settings compares and hashes equal, others not."""
    one, two = data.draw(single), data.draw(single)
    assert (one == two) == (repr(one) == repr(two))
    if one == two:
        assert hash(one) == hash(two)


CALLS = [
    lambda: ax.accumulate(4),
    lambda: ax.clip(0.5),
    lambda: ax.clip_value(0.5),
    lambda: ax.shard_model(ENV, "fsdp2", blocks=["a.*", "b"], unused="allow"),
    lambda: ax.shard_loader(ENV, seed=3, ragged=True),
    lambda: ax.with_precision("bf16"),
    lambda: ax.with_precision("fp16"),
    lambda: ax.with_precision(ax.Precision(compute="bf16")),
    lambda: ax.with_schedule(factor),
    lambda: ax.with_schedule(ax.warmup_cosine(2, 9)),
    lambda: ax.transform(
        "mine", before=keep, rules=ax.Rules(after=("clip",), why="so")
    ),
]


@pytest.mark.parametrize("call", CALLS)
def test_two_calls_of_a_factory_are_equal(call):
    """A new object, the same value, the same key of a dict."""
    one, two = call(), call()
    assert one is not two
    assert one == two
    assert {one: 1}[two] == 1
    assert evaluated(repr(one)) == one


@pytest.mark.parametrize(
    "record",
    [
        ax.Axis("shard", 2),
        ax.Env(),
        ENV,
        ax.Precision(),
        ax.Precision("fp32", compute="bf16"),
        ax.Rules(after=("clip",), why="so"),
        ax.warmup_cosine(2, 9),
        ax.warmup_linear(1, 3, 0.5),
    ],
)
def test_records_print_as_code(record):
    """So do the records that stand inside transforms."""
    assert evaluated(repr(record)) == record


def test_control_other_settings_are_another_transform():
    """What differs in one setting is not equal."""
    assert ax.clip(0.5) != ax.clip(0.6)
    assert ax.shard_model(ENV) != ax.shard_model(ax.Env())
    assert ax.transform("mine", before=keep) != ax.transform("mine", after=keep)


def test_a_chain_prints_its_short_form():
    """Settings that are as by default are left out."""
    tx = ax.chain(ax.shard_model(ax.Env()), ax.accumulate(4), ax.clip(1.0))
    assert repr(tx) == "chain(shard_model(Env()), accumulate(4), clip(1.0))"
    assert repr(ax.identity) == "identity"
