"""The plan of a chain is a table that starts nothing."""

from torch.utils.data import DataLoader

import accelx as ax

TX = ax.chain(
    ax.shard_model(ax.Env(world=8), "fsdp2", blocks="layers.*"),
    ax.with_precision("fp16"),
    ax.accumulate(4),
    ax.clip(1.0),
)


def test_each_pass_has_a_row_in_order():
    """Also the loss scale, which comes with a precision."""
    names = [row[0] for row in ax.explain(TX).rows]
    assert names == [
        "shard_model",
        "with_precision",
        "loss_scale",
        "accumulate",
        "clip",
    ]


def test_a_row_says_when_how_neutral_and_with_what():
    """The arrows, the claim, and the settings as code."""
    rows = {row[0]: row for row in ax.explain(TX).rows}
    started = ("accumulate", "start, backward", "yes", "accumulate(4)")
    assert rows["accumulate"] == started
    assert rows["clip"] == ("clip", "before", "no", "clip(1.0)")
    assert rows["with_precision"][1] == "place, start, forward"
    assert "blocks='layers.*'" in rows["shard_model"][3]


def test_the_table_has_columns():
    """Every line is as wide in its first columns."""
    lines = repr(ax.explain(TX)).splitlines()
    assert len(lines) == 6
    column = lines[0].index("settings")
    assert all(line[column - 1] == " " for line in lines)
    assert lines[4][column:] == "accumulate(4)"


def test_ranks_that_are_not_there_can_be_explained():
    """An Env of eight ranks is data: nothing is connected."""
    assert repr(ax.explain(ax.shard_model(ax.Env(world=8))))
    assert ax.explain(ax.identity).rows == ()


def test_how_the_data_goes_on_is_said():
    """By arithmetic, or by walking over a sampler of the user's own."""
    tx = ax.shard_loader(ax.Env(), seed=1)
    exact = ax.explain(tx, DataLoader(range(9), 2, shuffle=True))
    assert exact.data.startswith("exact (any step")
    assert repr(exact).splitlines()[-1] == f"data: {exact.data}"
    walked = ax.explain(tx, DataLoader(range(9), 2, sampler=[1, 2]))
    assert walked.data.startswith("replay (")
    assert "data:" not in repr(ax.explain(tx))
