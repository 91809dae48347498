"""What shard_model refuses on data alone, and how its settings print."""

import attrs
import pytest
from hypothesis import given, strategies as st

import accelx as ax
from accelx.engines.options import KINDS, PowerSGD, copies, laid_out, shards

FLAT = ax.Env(world=4, axes=(ax.Axis("data", 4),))
MESH = ax.Env(world=4, axes=(ax.Axis("replicate", 2), ax.Axis("shard", 2)))
TURNED = ax.Env(world=4, axes=(ax.Axis("shard", 2), ax.Axis("replicate", 2)))
LONG = ax.Env(world=8, axes=(*MESH.axes, ax.Axis("sequence", 2)))
AHEAD = ax.Env(world=8, axes=(ax.Axis("sequence", 2), *MESH.axes))
CUBE = ax.Env(world=4, axes=(*MESH.axes, ax.Axis("more", 1)))
NAMED = {
    "FLAT": FLAT,
    "MESH": MESH,
    "Env": ax.Env,
    "Axis": ax.Axis,
    "shard_model": ax.shard_model,
    "PowerSGD": PowerSGD,
}
HYBRID = r'got|but.*write env = ax.connect\(axes="replicate=2,shard=-1"\), or "fsdp2"'

WRONG = [  # env, kind, options, what the error says
    (FLAT, "fsdp", {}, r"got 'fsdp'; write 'fsdp2'"),
    (FLAT, "zero", {}, r"wants one of 'ddp', 'fsdp2', 'hsdp', .*got 'zero'"),
    (FLAT, "hsdp", {}, HYBRID),
    (TURNED, "hsdp", {}, r"\(shard=2, replicate=2\); write"),
    (CUBE, "hsdp", {}, r"more=1\); write"),
    (AHEAD, "hsdp", {}, r'the outermost.*write.*"replicate=2,shard=-1,sequence=2"'),
    (LONG, "hsdp", {"reshard_after_forward": 3}, r"cut in 4.*write 2 or 4"),
    (ax.Env(world=3), "hsdp", {}, r"ranks are \(none\); write.*replicate=1,shard=-1"),
    (FLAT, "ddp", {"unused": "maybe"}, r"unused=.*got 'maybe'; write"),
    (FLAT, "ddp", {"offload": True}, r"option of fsdp2 and hsdp and deepspeed.*'ddp'"),
    (FLAT, "fsdp2", {"stage": 1}, r"stage is an option of deepspeed, got stage=1"),
    (FLAT, "deepspeed", {"ignored": "a"}, r"ignored is an option of fsdp2 and hsdp"),
    (FLAT, "ddp", {"ignored": "a"}, r"ddp keeps every weight whole"),
    (FLAT, "ddp", {"prefetch": 1}, r"or write 'fsdp2' or 'hsdp'"),
    (FLAT, "ddp", {"reshard_after_forward": False}, r"got reshard_after_forward=False"),
    (FLAT, "fsdp2", {"hook": "bf16"}, r"with_precision\(Precision\(reduce='bf16'\)\)"),
    (MESH, "hsdp", {"static_graph": True}, r"option of ddp, got static_graph=True"),
    (MESH, "hsdp", {"bucket_mb": 3}, r"or write 'ddp'"),
    (FLAT, "ddp", {"hook": "bf"}, r"got 'bf'; write 'bf16'"),
    (FLAT, "ddp", {"hook": "zip"}, r"one of 'bf16', 'fp16', 'powersgd', got 'zip'"),
    (FLAT, "ddp", {"bucket_mb": 0}, r"positive number of MiB, got 0.0; write"),
    (FLAT, "ddp", {"static_graph": 1}, r"True or False, got 1; write"),
    (FLAT, "fsdp2", {"offload": "gpu"}, r"got 'gpu'; write offload=True"),
    (FLAT, "fsdp2", {"prefetch": -1}, r"at least 0, got -1; write"),
    (FLAT, "fsdp2", {"prefetch": 1}, r'got none; write blocks="layers.\*"'),
    (FLAT, "fsdp2", {"reshard_after_forward": 1}, r"at least 2, got 1; write"),
    (FLAT, "fsdp2", {"reshard_after_forward": "yes"}, r"True, False or.*got 'yes'"),
    (FLAT, "fsdp2", {"reshard_after_forward": 3}, r"cut in 4.*write 2 or 4"),
    (MESH, "hsdp", {"reshard_after_forward": 4}, r"cut in 2.*write 2"),
    (FLAT, "ddp", {"methods": "a b"}, r"names of methods, got \('a b',\); write"),
    (FLAT, "ddp", {"methods": [3]}, r"names of methods, got \(3,\); write"),
]


@pytest.mark.parametrize(("env", "kind", "options", "wanted"), WRONG)
def test_what_is_refused_says_what_came_and_what_to_write(env, kind, options, wanted):
    """When the transform is made: no model, no rank, nothing allocated."""
    with pytest.raises(ax.PlacementError, match=wanted):
        ax.shard_model(env, kind, **options)


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        (MESH, r'has \(replicate=2, shard=2\); write "hsdp"'),
        (TURNED, r"write ax.connect\(\) without axes"),
        (LONG, r'sequence=2\); write "hsdp"'),
    ],
)
def test_fsdp2_refuses_two_axes(env, wanted):
    """Before a model is made."""
    with pytest.raises(ax.PlacementError, match=wanted):
        laid_out(env, "fsdp2")


def test_hsdp_names_the_axes_that_stay():
    """Stages are beside copies and slices, and not in place of them."""
    env = attrs.evolve(FLAT, axes=(ax.Axis("data", 2), ax.Axis("stage", 2)))
    wanted = r'4 ranks are \(data=2, stage=2\).*axes="replicate=2,shard=-1,stage=2"'
    with pytest.raises(ax.PlacementError, match=wanted):
        ax.shard_model(env, "hsdp")


XLA = ax.Env(device="xla")
MISFITS = [
    (FLAT, "xla", r"one process.*4 ranks; start one, without torchrun"),
    (ax.Env(), "xla", r'got .xla. on cpu; write connect\(device="xla"\)'),
    (XLA, "ddp", r'got .ddp. on xla; write shard_model\(env, "xla"\)'),
    (attrs.evolve(XLA, device="xla:0"), "fsdp2", r'write shard_model\(env, "xla"\)'),
]


@pytest.mark.parametrize(("env", "kind", "wanted"), MISFITS)
def test_xla_is_one_process_with_a_kind_of_its_own(env, kind, wanted):
    """Devices and kind are held to each other, without torch_xla."""
    with pytest.raises(ax.PlacementError, match=wanted):
        ax.shard_model(env, kind)


@pytest.mark.parametrize("other", [ax.compile(), ax.remat("layers.*")])
def test_xla_compiles_for_itself(other):
    """What another compiler or another plan of memory would do is refused."""
    one = ax.shard_model(XLA, "xla")
    with pytest.raises(ax.OrderError, match="because XLA compiles the whole step"):
        ax.chain(one, other)
    ax.chain(ax.shard_model(ax.Env()), other)  # the control: elsewhere it is fine


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_asks_for_no_axes(kind):
    """The same program runs on one process, whatever its axes are."""
    for axes in ((), FLAT.axes[:0], (ax.Axis("replicate", 1), ax.Axis("shard", 1))):
        device = "xla" if kind == "xla" else "cpu"
        ax.shard_model(ax.Env(device=device, axes=axes), kind, unused="allow")
    assert ax.shard_model(ax.Env(), "hsdp").find("shard_model").engine.name == "plain"


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("rank", 1.0), ("rank", True), ("start", 1), ("start", "2")],
)
def test_powersgd_refuses_what_torch_cannot_do(field, value):
    """A rank of 1 and a start of 2 are the least."""
    with pytest.raises(ax.PlacementError, match=f"at least .*got {value!r}; write"):
        PowerSGD(**{field: value})


def some(kind):
    """Options that a kind takes."""
    glob = st.sampled_from([None, "a.*", "**.bias"])
    shared = {
        "blocks": st.sampled_from(["layers.*", ("a", "b")]),
        "unused": st.sampled_from(["error", "allow"]),
        "methods": st.sampled_from([(), "encode", ("encode", "a.encode")]),
    }
    ours = {
        "hook": st.sampled_from([None, "bf16", "fp16", "powersgd", PowerSGD(3)]),
        "static_graph": st.booleans(),
        "bucket_mb": st.sampled_from([None, 1, 2.5]),
    }
    theirs = {
        "reshard_after_forward": st.sampled_from([True, False, 2]),
        "offload": st.sampled_from([False, True, "cpu"]),
        "ignored": glob,
        "prefetch": st.integers(0, 3),
    }
    zeros = {
        "offload": st.sampled_from([False, True]),
        "stage": st.sampled_from([None, 1, 3]),
        "config": st.sampled_from([None, {"zero_optimization": {"stage": 1}}]),
    }
    more = {"ddp": ours, "deepspeed": zeros, "xla": {}}.get(kind, theirs)
    return (
        st.fixed_dictionaries({}, optional={**shared, "blocks": shared["blocks"]})
        .map(lambda found: {"blocks": "layers.*", **found})
        .flatmap(
            lambda found: st.fixed_dictionaries({}, optional=more).map(
                lambda rest: {**found, **rest}
            )
        )
    )


@given(st.data(), st.sampled_from(KINDS))
def test_settings_print_as_the_code_that_makes_them(data, kind):
    """And compare by value (L9)."""
    env = {"hsdp": MESH, "xla": XLA}.get(kind, FLAT)
    one, other = (ax.shard_model(env, kind, **data.draw(some(kind))) for _ in range(2))
    again = eval(repr(one), dict(NAMED))
    assert again == one
    assert repr(again) == repr(one)
    assert (one == other) == (repr(one) == repr(other))
    assert one.find("shard_model").engine.name == kind


def test_slices_times_copies_are_the_ranks():
    """Of each kind that has them."""
    assert (shards(FLAT, "fsdp2"), copies(FLAT, "fsdp2")) == (4, 1)
    assert (shards(MESH, "hsdp"), copies(MESH, "hsdp")) == (2, 2)
    assert (shards(LONG, "hsdp"), copies(LONG, "hsdp")) == (4, 2)
    assert (shards(ax.Env(), "hsdp"), copies(ax.Env(), "hsdp")) == (1, 1)
