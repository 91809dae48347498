"""What a state holds is counted once, by part, and the process and device with it."""

import json

import attrs
import pytest
import torch
from torch import nn

import accelx as ax
from accelx.doctors import look
from accelx.memory import memory_report
from accelx.state import with_slot
from accelx.testing import run

WIDE = 64  # a square weight of as many rows: 16 KiB in float32
SQUARE = WIDE * WIDE * 4


def net():
    """Two square weights, one of which is used twice, a small one, and a buffer."""
    model = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(3)))
    model[2].weight = model[0].weight
    model.register_buffer("kept", torch.zeros(10))
    return model


def trained(env=None, kind="ddp"):
    """A state after one update by AdamW, with gradients of the next."""
    env = env or ax.Env()
    tx = ax.shard_model(env, kind) if env.world > 1 else ax.identity
    state = ax.init(tx, net, lambda m: torch.optim.AdamW(m.parameters(), 0.1))
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    state, _ = ax.step(tx, loss)(state, torch.ones(4, WIDE))
    state, _ = ax.grads(tx, loss)(state, torch.ones(4, WIDE))
    return state


def test_each_part_is_counted_once():
    """Tied weights once; AdamW keeps two more of each, and a number; 4 bytes each."""
    report = memory_report(ax.Env(), trained())
    assert report.of("parameters") == 2 * SQUARE
    assert report.of("buffers") == 40
    assert report.of("gradients") == 2 * SQUARE
    assert report.of("optimizer state") == 4 * SQUARE + 2 * 4
    assert {held.what: held.num_tensors for held in report.held} == {
        "parameters": 2,
        "buffers": 1,
        "gradients": 2,
        "optimizer state": 6,
    }


def test_a_slot_is_counted_without_what_others_hold():
    """Averages of weights are a slot's own; a view of a weight is the weight's."""
    state = trained()
    kept = {"mean": torch.zeros(1000), "view": state.model[0].weight.detach()[:3]}
    report = memory_report(ax.Env(), with_slot(state, "with_mean", kept))
    assert report.of("slot with_mean") == 4000


def test_the_largest_are_named():
    """By the names of the model; a moment by its weight's."""
    report = memory_report(ax.Env(), trained())
    names = [name for name, _, _ in report.largest]
    assert len(names) == 5
    assert "0.weight" in names
    assert "0.weight.grad" in names
    assert any("exp_avg" in name for name in names)
    sizes = [count for _, _, count in report.largest]
    assert sizes == sorted(sizes, reverse=True)


def test_without_a_state_it_is_process_and_device():
    """This process is resident, and no more than its peak and the machine."""
    report = memory_report(ax.Env())
    assert report.held == ()
    assert 0 < report.process <= report.host
    assert report.process_peak > 10 * 2**20
    assert (report.allocated, report.capacity, report.other) == (None, None, None)


def test_it_reads_as_a_table_and_as_data():
    """Each part has its line; JSON takes the data."""
    report = memory_report(ax.Env(), trained())
    lines = repr(report).splitlines()
    assert lines[0] == "rank 0 on cpu"
    assert any(
        line.split() == ["parameters", "cpu", "2", "32.8", "kB"] for line in lines
    )
    assert lines[-1].startswith("host    ")
    assert json.loads(json.dumps(report.data))["held"][0]["what"] == "parameters"


def test_a_device_has_its_own_line():
    """What tensors hold there beside the state is what a forward left."""
    report = attrs.evolve(
        memory_report(ax.Env(), trained()),
        device="cuda:0",
        allocated=10**9,
        allocated_peak=2 * 10**9,
        reserved=3 * 10**9,
        capacity=80 * 10**9,
    )
    assert report.other == 10**9  # the state is on the CPU
    assert "1.00 GB in tensors, peak 2.00 GB, 3.00 GB reserved" in repr(report)
    assert "activations and others" in repr(report)


def test_wrong_arguments_are_told():
    """An Env first, and a state that is not spent."""
    with pytest.raises(TypeError, match="wants an Env first"):
        memory_report(trained())
    state = trained()
    ax.apply(ax.identity)(state, ax.Out(0.0, 1))
    with pytest.raises(ax.SpentStateError):
        memory_report(ax.Env(), state)


@pytest.mark.multi
def test_a_rank_counts_its_own_slices():
    """On two ranks fsdp2 halves weights, gradients and moments; ddp does not."""

    def held(env):
        found = {}
        for kind in ("ddp", "fsdp2"):
            report = memory_report(env, trained(env, kind))
            parts = ("parameters", "gradients", "optimizer state")
            found[kind] = [report.of(part) for part in parts]
        return found

    for found in run(2)(held)():
        moments = found["ddp"][2] - 8
        weights, gradients, _ = found["ddp"]
        assert weights == 2 * SQUARE
        assert 0 <= gradients - 2 * SQUARE <= 8  # the bucket takes the loss along
        assert moments == 4 * SQUARE
        assert found["fsdp2"] == [SQUARE, SQUARE, 2 * SQUARE + 8]


def built(model, optim):
    """A state of one process, before a step."""
    return ax.init(ax.identity, model, optim)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float64, 8), (torch.bfloat16, 2), (torch.float32, 4)]
)
def test_bytes_follow_the_dtype(dtype, width):
    """As torch lays numbers out."""
    state = built(lambda: net().to(dtype), lambda m: torch.optim.SGD(m.parameters(), 1))
    report = memory_report(ax.Env(), state)
    assert report.of("parameters") == 2 * WIDE * WIDE * width
    assert report.of("gradients") == report.of("optimizer state") == 0


def test_several_optimizers_are_added():
    """Momentum of one and two moments of the other."""

    def pair(model):
        one, two = model[0].weight, model[1].weight
        return [
            torch.optim.SGD([one], 0.1, momentum=0.9),
            torch.optim.Adam([two], 0.1),
        ]

    state = built(net, pair)
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    state, _ = ax.step(ax.identity, loss)(state, torch.ones(4, WIDE))
    assert memory_report(ax.Env(), state).of("optimizer state") == 3 * SQUARE + 4


def test_frozen_weights_are_parameters_without_the_rest():
    """They hold memory, and neither gradients nor moments."""

    def half():
        model = net()
        model[1].weight.requires_grad_(False)
        return model

    trainable = lambda m: [p for p in m.parameters() if p.requires_grad]  # noqa: E731
    state = built(half, lambda m: torch.optim.AdamW(trainable(m)))
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    state, _ = ax.step(ax.identity, loss)(state, torch.ones(4, WIDE))
    report = memory_report(ax.Env(), state)
    assert report.of("parameters") == 2 * SQUARE
    assert report.of("optimizer state") == 2 * SQUARE + 4


def test_a_view_holds_its_whole_storage():
    """A buffer that shows ten numbers of a large tensor keeps all of it."""

    def holding():
        model = nn.Linear(2, 2)
        model.register_buffer("few", torch.zeros(100_000)[:10])
        return model

    state = built(holding, lambda m: torch.optim.SGD(m.parameters(), 1))
    report = memory_report(ax.Env(), state)
    assert report.of("buffers") == 400_000
    assert report.largest[0] == ("few", "cpu", 400_000)


def test_memory_that_is_taken_is_seen():
    """The process grows by what a tensor takes, and its peak stays."""
    before = memory_report(ax.Env())
    taken = torch.ones(64 * 2**20)  # 256 MiB
    during = memory_report(ax.Env())
    assert during.process - before.process > 200 * 2**20
    del taken
    after = memory_report(ax.Env())
    assert after.process_peak >= during.process - 2**20
    assert after.process < during.process


def test_the_host_is_the_container_where_that_is_less(monkeypatch):
    """What the system kills by."""
    known = {"total": 10**10, "available": 10**9, "limit": 10**9, "used": 5}
    monkeypatch.setattr(look, "memory", lambda: known)
    assert memory_report(ax.Env()).host == 10**9
    monkeypatch.setattr(look, "memory", lambda: {**known, "limit": None})
    assert memory_report(ax.Env()).host == 10**10
    none = dict.fromkeys(known)
    monkeypatch.setattr(look, "memory", lambda: none)
    report = memory_report(ax.Env())
    assert report.host is None
    assert repr(report).endswith("of unknown")


def test_reports_are_equal_by_value_and_hold_no_tensor():
    """A report may be kept: it keeps nothing alive."""
    state = trained()
    report = memory_report(ax.Env(), state)
    assert report == attrs.evolve(report)
    assert report != attrs.evolve(report, rank=1)
    leaves = json.dumps(attrs.asdict(report))
    assert "tensor" not in leaves.replace("num_tensors", "")
