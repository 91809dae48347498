"""Where a model is cut, how a batch is, and what is refused before any rank starts."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import accelx as ax
from accelx import _torch
from accelx.cut import rows_in
from accelx.engines import stages
from accelx.engines.stage_homes import balanced, holders, homes, owner, weights_in
from accelx.engines.stage_parts import legal, microbatches
from accelx.engines.stage_route import ran, sketched
from accelx.engines.stage_shapes import costed
from accelx.errors import PlacementError
from accelx.rows import Rows, mark, rows_of, stamp
from accelx.saves.spread import Absent, ours
from tests.laws import training as t

ENV = ax.Env(world=4, axes=(ax.Axis("data", 2), ax.Axis("stage", 2)))


def test_modules_go_with_the_stage_under_way():
    """In the order in which they are registered; what has no weights is of all."""
    found = homes(t.made()(), ["layers.1", "layers.3"])
    stages = {"embed": 0, "layers.0": 0, "layers.1": 1, "layers.2": 1, "layers.3": 2}
    assert found.units == {**stages, "head": 2}
    assert found.count == 3
    assert found.of("layers.1.norm") == 1
    assert found.of("layers") is None
    assert found.of("") is None


def test_stages_that_greet_in_another_dtype_are_refused(monkeypatch):
    """Those of torch 2.9, which gloo would abort, and a mesh that cannot be cut."""
    monkeypatch.setattr(stages._torch_stages, "greets", lambda: False)
    with pytest.raises(PlacementError, match=re.escape(torch.__version__)):
        stages._possible(None, None)
    with pytest.raises(PlacementError, match=re.escape(torch.__version__)):
        _torch.copies_mesh(object())


def test_a_list_in_one_stage_is_no_part():
    """Its modules are, since it is not called itself."""
    found = homes(t.made()(), ["head"])
    first = dict.fromkeys(["embed", *(f"layers.{i}" for i in range(4))], 0)
    assert found.units == {**first, "head": 1}
    assert found.of("layers") is None


def test_modules_that_ran_go_by_when_they_did():
    """A sample moves what is registered late; what did not run stays."""
    model = t.made()()
    ran = ["head", "embed", "layers.0", "layers.1", "layers.2"]
    found = homes(model, ["layers.1"], ran)
    assert found.units["head"] == 0
    assert found.units["layers.3"] == 1


class Odd(nn.Module):
    """A weight and a buffer of its own beside blocks."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(4))
        self.register_buffer("table", torch.zeros(4))
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def test_who_holds_what():
    """A stage's weights one rank, tied ones several, what no stage has all of them."""
    model = Odd()
    cut = homes(model, ["blocks.1"])
    assert cut.units == {"blocks.0": 0, "blocks.1": 1, "blocks.2": 1}
    held = holders(model, cut, lambda stage: stage)
    assert held[id(model.place)] == held[id(model.table)] == ()
    assert held[id(model.blocks[0].weight)] == (0,)
    assert held[id(model.blocks[2].weight)] == (1,)
    model.blocks[2].weight = model.blocks[0].weight
    held = holders(model, cut, lambda stage: stage)
    assert held[id(model.blocks[0].weight)] == (0, 1)


def chain_of(*widths):
    """Blocks of so many weights each."""
    blocks = [nn.Linear(width, 1, bias=False) for width in widths]
    return nn.Sequential(nn.ModuleList(blocks))


@pytest.mark.parametrize(
    ("widths", "count", "starts"),
    [
        ((1, 1, 1, 1), 2, [2]),
        ((9, 1, 1, 1), 2, [1]),
        ((1, 1, 1, 9), 2, [3]),
        ((2, 2, 2, 2, 2, 2), 3, [2, 4]),
        ((1, 5, 1, 5, 1, 5), 3, [2, 4]),
        ((1, 1), 2, [1]),
    ],
)
def test_balanced_makes_the_heaviest_stage_light(widths, count, starts):
    """By numbers of weights; the first of equals is taken."""
    model = chain_of(*widths)
    assert balanced(model, count, weights_in(model)) == [f"0.{i}" for i in starts]


def test_balanced_counts_what_stands_before_and_after():
    """A heavy embedding has fewer blocks beside it."""
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(100, 4),
            "blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(4)),
            "head": nn.Linear(4, 2),
        }
    )
    assert balanced(model, 2, weights_in(model)) == ["blocks.1"]


def test_balanced_wants_a_list_of_blocks():
    """The error says what to name."""
    model = chain_of(1, 1)
    with pytest.raises(ax.PlacementError, match=r"at least 3 blocks.*name the first"):
        balanced(model, 3, weights_in(model))


def test_experts_cost_what_they_do_though_a_shape_chooses_none():
    """As torch counts the operations of each block where numbers choose."""
    tf = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 9}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**size, **heads))
    given, starts = {"input_ids": torch.ones(2, 5).long()}, ["model.layers.1"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.config._experts_implementation = "eager"
        model(**given)
    counts = counter.get_flop_counts()
    wanted = sum(counts["MixtralForCausalLM.model.layers.1"].values())
    model.model.config._experts_implementation = "grouped_mm"
    sketch = sketched(model, homes(model, starts), "cpu")
    costed(sketch.model)
    assert ran(sketch, lambda m: m(**given))["model.layers.1"] == wanted > 0


def test_what_asks_for_numbers_has_no_cost_by_shapes():
    """And is told to be cut by names."""

    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x[x.sum(-1) > 0])

    model = nn.Sequential(nn.Linear(2, 2), Asks(2, 2))
    sketch = sketched(model, homes(model, ["1"]), "cpu")
    with pytest.raises(ax.PlacementError, match=r"runs the model's forward on shapes"):
        ran(sketch, lambda m: m(torch.ones(3, 2)))


def test_stages_lie_in_turn_or_to_and_fro():
    """zbv has the first and the last stage on one rank."""
    assert [owner(s, 2, "interleaved") for s in range(4)] == [0, 1, 0, 1]
    assert [owner(s, 2, "zbv") for s in range(4)] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("schedule", "least", "count"),
    [
        ("gpipe", 1, 1),
        ("1f1b", 1, 2),
        ("1f1b", 5, 5),
        ("interleaved", 3, 3),
        ("interleaved", 5, 6),
        ("zero_bubble", 7, 8),
        ("looped_bfs", 5, 5),
        ("zbv", 5, 5),
    ],
)
def test_schedules_take_as_many_microbatches_as_they_can(schedule, least, count):
    """On two ranks: at least as many as there are, in rounds of one size."""
    assert legal(schedule, 2, 2)(least) == count


@pytest.mark.parametrize(
    ("rows", "n", "sizes", "real"),
    [
        (8, 4, 2, [2, 2, 2, 2]),
        (8, 3, 2, [2, 2, 2, 2]),
        (7, 2, 1, [1] * 7),
        (2, 4, 1, [1, 1, 0, 0]),
        (6, 6, 1, [1] * 6),
    ],
)
def test_microbatches_have_one_size_and_each_row_once(rows, n, sizes, real):
    """And what fills up counts for nothing."""
    x = torch.arange(rows)
    parts = microbatches((x,), n, Rows(rows, 9), lambda groups: groups)
    assert [len(part) for (part,) in parts] == [sizes] * len(real)
    marks = [rows_of(part) for part in parts]
    assert [one.rows for one in marks] == real
    assert {one.total for one in marks} == {9}
    kept = [part[0][: one.rows] for part, one in zip(parts, marks, strict=True)]
    assert torch.equal(torch.cat(kept), x)


def test_a_placeholder_and_rows_that_pad_are_no_rows():
    """Microbatches of a rank without rows, and of a batch of static shape."""
    none = mark((torch.zeros(1, 3),), 0, 5)
    parts = microbatches(none, 2, rows_in(none, 2), lambda groups: groups)
    assert [rows_of(part).rows for part in parts] == [0, 0]
    padded = stamp((torch.zeros(4, 3),), Rows(3, 7, padded=True))
    parts = microbatches(padded, 2, rows_in(padded, 2), lambda groups: groups)
    assert [rows_of(part) for part in parts] == [Rows(2, 7, True), Rows(1, 7, True)]


def test_batches_without_rows_and_with_others_are_refused():
    """With what came."""
    with pytest.raises(ax.DataError, match="batch with rows to cut"):
        microbatches((torch.tensor(1.0),), 2, Rows(1, 1), lambda groups: groups)
    with pytest.raises(ax.DataError, match="has 5 rows here, but its tensors have 4"):
        microbatches((torch.zeros(4),), 2, Rows(5, 5), lambda groups: groups)
    with pytest.raises(ax.DataError, match="got tensors of 0 rows"):
        microbatches((torch.zeros(0, 4),), 2, Rows(0, 5), lambda groups: groups)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 0}, "at least 1, got 0"),
        ({"n": True}, "got True"),
        ({"schedule": "2f2b"}, "'gpipe', '1f1b'.*got '2f2b'"),
        ({"split": []}, "names of modules"),
        ({"split": [3]}, "names of modules"),
    ],
)
def test_settings_are_checked_when_they_are_written(given, words):
    """Before there is a model."""
    with pytest.raises(ValueError, match=words):
        ax.shard_stages(ENV, **{"split": "a", "n": 2, **given})


def test_it_prints_as_it_is_written():
    """A sample is no part of what is compared."""
    one = ax.shard_stages(ENV, ["a", "b"], 4, sample=(torch.zeros(1),))
    assert one.brief() == "shard_stages(env, ('a', 'b'), 4)"
    assert one == ax.shard_stages(ENV, ("a", "b"), 4)


def test_what_is_not_put_together_is_refused_when_the_chain_is_made():
    """Ranks that train apart."""
    one = ax.shard_stages(ENV, "a", 2)
    with pytest.raises(ax.OrderError, match="cannot be combined"):
        ax.chain(one, ax.with_local_sgd(ENV, 2))


def test_without_a_placed_model_there_are_no_stages():
    """The error says what to add."""
    with pytest.raises(ax.PlacementError, match=r"no shard_model.*add shard_model"):
        ax.init(ax.shard_stages(ENV, "a", 2), nn.Linear(1, 1))


def test_on_one_rank_it_accumulates():
    """The same microbatches as accumulate(n) makes, the same losses."""

    def losses(cut):
        tx = ax.chain(cut, ax.shard_model(ax.Env()))
        return t.train(
            ax.chain(tx, ax.clip(t.LIMIT), ax.with_schedule(t.curve)),
            *(ax.Env(), t.made()(), t.masked, t.grouped, t.batches()),
        )

    cut, plain = ax.shard_stages(ax.Env(), "layers.2", 2), ax.accumulate(2)
    assert t.apart(losses(plain), losses(cut)) == 0


def test_an_absent_weight_says_so_where_it_is_used():
    """Also in a copy; shape and dtype can be asked for."""
    one = Absent("embed.weight", torch.Size([2, 3]), torch.float32, torch.device("cpu"))
    one = copy.deepcopy(one)
    assert one.shape == (2, 3)
    for use in (lambda: torch.ones(1, 3) @ one, lambda: nn.functional.linear(one, one)):
        with pytest.raises(ax.PlacementError, match=r"embed\.weight is a weight of"):
            use()


def test_a_group_of_weights_may_be_empty_on_a_stage():
    """Where another stage has them; a glob that takes none anywhere is refused."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    del model["b"].weight
    dtype, device = torch.float32, torch.device("cpu")
    model["b"].weight = Absent("b.weight", torch.Size([1, 1]), dtype, device)
    groups = ax.param_groups(model, {"b.weight": {"lr": 1.0}, "**": {}})
    assert [len(group["params"]) for group in groups] == [0, 3]
    with pytest.raises(ValueError, match="take no parameter"):
        ax.param_groups(model, {"c.weight": {}, "**": {}})


def test_what_others_hold_is_left_out_of_what_is_read():
    """By name, at any depth."""
    raw = {"taken": 3, "weights": {"a.w": {"$": "tensor"}, "b.w": {"$": "tensor"}}}
    assert ours(raw, frozenset(["b.w"])) == {
        "taken": 3,
        "weights": {"a.w": {"$": "tensor"}},
    }
