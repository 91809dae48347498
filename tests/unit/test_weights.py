"""Weights of any origin: what a file may say, what goes where, how it leaves again."""

import json
import struct
from functools import partial

import pytest
import safetensors
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save, save_file
from torch import nn

import accelx as ax
from accelx import storage
from accelx.saves import meeting, shards
from accelx.saves.foreign import LENGTH, read_header
from tests import faulty, saving
from tests.laws import training as t

ENV = ax.Env()
SOUND = {"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
DATA = struct.pack("4f", 1, 2, 3, 4)


def framed(header, data=DATA, length=None):
    """A safetensors file, or what only looks like one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def but(**fields):
    """The sound header with fields of its tensor changed."""
    return {"weight": {**SOUND["weight"], **fields}}


def linear():
    """A model of one weight, 2 by 2, all sevens."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.constant_(model.weight, 7.0)
    return model


def load(path, model, **options):
    """`load_weights` alone."""
    return ax.load_weights(path, **options)(model)


def net(seed=1, dtype=torch.float64):
    """The model of the laws: tied weights, buffers of both kinds."""
    return t.made(dtype, seed)()


def stored(model):
    """Weights and persistent buffers by first names, as a file has them."""
    named = model.state_dict(keep_vars=True)
    first = {id(v): n for n, v in reversed(named.items())}
    return {n: v.detach().clone() for n, v in named.items() if first[id(v)] == n}


def equal(model, wanted):
    """Whether a model holds exactly the tensors of `wanted`."""
    held = stored(model)
    return held.keys() == wanted.keys() and t.same(held, wanted)


# What a header may say.

A = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "no length": (b"", "0 bytes"),
    "half a length": (b"\0\0\0", "3 bytes"),
    "a header longer than the file": (framed(SOUND, length=10**6), "a header of"),
    "a header of all memory": (framed(SOUND, length=2**63), "a header of"),
    "no header": (framed(b"", b"", 0), "a header of 0"),
    "a header cut short": (framed(json.dumps(SOUND).encode()[:-3]), "JSON"),
    "a list": (framed(b"[]", b""), "a list"),
    "no text": (framed(b"\xff\xfe\xff", b""), "JSON"),
    "a name twice": (framed(b'{"a":1,"a":2}', b""), "JSON"),
    "nesting without end": (framed(b"[" * 9000, b""), "JSON"),
    "a number for a tensor": (framed({"weight": 3}), "3 for 'weight'"),
    "a field too few": (framed({"weight": {"dtype": "F32"}}), "for 'weight'"),
    "a field too many": (framed(but(extra=1)), "for 'weight'"),
    "no name": (framed({"": SOUND["weight"]}), "the name"),
    "an unknown dtype": (framed(but(dtype="Q7")), "Q7"),
    "a dtype that is no text": (framed(but(dtype=["F32"])), "wants dtypes"),
    "a negative size": (framed(but(shape=[-2, -2])), "the numbers"),
    "a size that is true": (framed(but(shape=[True, 4])), "the numbers"),
    "a size with a fraction": (framed(but(shape=[2.0, 2])), "the numbers"),
    "a shape that is text": (framed(but(shape="22")), "the numbers"),
    "a thousand dims": (framed(but(shape=[1] * 1000 + [4])), "the numbers"),
    "a shape that overflows": (framed(but(shape=[2**62, 2**62, 0])), "bytes 0 to 16"),
    "a shape larger than its bytes": (framed(but(shape=[3, 2])), "bytes 0 to 16"),
    "three offsets": (framed(but(data_offsets=[0, 16, 16])), "the numbers"),
    "offsets backwards": (framed(but(data_offsets=[16, 0])), "bytes 16 to 0"),
    "offsets behind the file": (framed(but(data_offsets=[8, 24])), "a tensor at byte"),
    "a gap before": (framed(but(data_offsets=[4, 20]), DATA + b"four"), "at byte"),
    "bytes left over": (framed(SOUND, DATA + b"more"), "up to byte"),
    "bytes missing": (framed(SOUND, DATA[:-1]), "up to byte"),
    "two tensors in one place": (framed({"a": A, "b": A}, DATA[:4]), "at byte"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_before_memory_is_made_for_it(case, tmp_path):
    """The error names the file and what it says; the model is as it was."""
    data, words = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    model = linear()
    with pytest.raises(ax.CheckpointError, match=r"model\.safetensors") as raised:
        load(tmp_path, model)
    assert words in str(raised.value)
    assert (model.weight == 7).all()


def test_control_the_sound_file_that_the_hostile_ones_vary_is_read(tmp_path):
    """The builder of the cases makes a file that ours and its own library read."""
    (tmp_path / "model.safetensors").write_bytes(framed(SOUND))
    assert load(tmp_path, linear()).weight.tolist() == [[1, 2], [3, 4]]
    assert safetensors.deserialize(framed(SOUND))[0][0] == "weight"


FILE = save({"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(3).bool()})


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_what_the_formats_own_library_refuses_is_refused(data):
    """Files with bytes changed, cut off or put in: never more lenient, no crash."""
    changed = bytearray(FILE)
    for _ in range(data.draw(st.integers(1, 3))):
        end = data.draw(st.sampled_from([LENGTH, len(changed)]))
        at = data.draw(st.integers(0, max(0, min(end, len(changed)) - 1)))
        put = data.draw(st.sampled_from([b"", b"0", b"9", b'"', b"}", b"[1]", b"\x00"]))
        changed[at : at + data.draw(st.integers(0, 2))] = put
    changed = bytes(changed)
    length = int.from_bytes(changed[:LENGTH], "little")
    try:
        theirs = dict(safetensors.deserialize(changed))
    except safetensors.SafetensorError:
        theirs = None
    try:
        assert 2 <= length <= len(changed) - LENGTH  # as whoever reads it looks
        ours = read_header(changed[: LENGTH + length], len(changed), "it")
    except (ax.CheckpointError, AssertionError):
        return
    assert theirs is not None
    assert {n: list(h.shape) for n, h in ours.items()} == {
        n: one["shape"] for n, one in theirs.items()
    }


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"no json", "JSON"),
        ({"weight_map": ["weight"]}, "weight_map"),
        ({"weight_map": {"weight": "../secret.safetensors"}}, "secret"),
        ({"weight_map": {"weight": "/etc/passwd"}}, "passwd"),
        ({"weight_map": {"weight": "gone.safetensors"}}, "gone.safetensors"),
        ({"weight_map": {"other": "a.safetensors"}}, "no such tensor"),
    ],
)
def test_a_hostile_index_is_refused(index, words, tmp_path):
    """It may name files beside it, which must hold what it says."""
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    (tmp_path / "a.safetensors").write_bytes(framed(SOUND))
    with pytest.raises(ax.CheckpointError, match=words):
        load(tmp_path, linear())


# What goes where.


def places(tmp_path, held):
    """The same weights as one file, a folder, in shards by hand, and far away."""
    save_file(held, tmp_path / "odd name.safetensors")
    (tmp_path / "one").mkdir()
    save_file(held, tmp_path / "one/model.safetensors")
    (tmp_path / "two").mkdir()
    names = list(held)
    homes = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(homes.values()):
        part = {n: held[n] for n in names if homes[n] == file}
        save_file(part, tmp_path / "two" / file)
    index = tmp_path / "two/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    data = save(held)
    storage.write(storage.at("memory://far"), "model.safetensors", [data], len(data))
    storage.write(storage.at("memory://"), "top.safetensors", [data], len(data))
    return [
        *(tmp_path / "odd name.safetensors", tmp_path / "one", f"{tmp_path}/two/"),
        *(index, "memory://far", "memory://top.safetensors"),
    ]


def test_weights_are_read_from_wherever_they_lie(tmp_path):
    """A file, a folder, shards, a store: the model holds what was saved, to the bit."""
    wanted = stored(net(1))
    for place in places(tmp_path, wanted):
        model = net(2)
        assert not equal(model, wanted)
        assert load(place, model) is model
        assert equal(model, wanted), place
    storage.remove_folder(storage.at("memory://far"))


def test_weights_are_read_from_a_checkpoint(tmp_path):
    """The run's folder means its newest; a module's extra state is left alone."""

    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"seen": torch.ones(2)}

        def set_extra_state(self, state):
            raise AssertionError

    model = Noted(3, 3)
    state = ax.init(ax.identity, model)
    url = ax.save_state(ENV, tmp_path)(state)
    for place in (tmp_path, url):
        other = load(place, Noted(3, 3))
        assert t.same(t.weights(other), t.weights(model))
    other = load(tmp_path, nn.Linear(3, 3))
    assert torch.equal(other.weight, model.weight)


def test_a_damaged_checkpoint_is_no_source(tmp_path):
    """Digests are looked at where there are any."""
    url = ax.save_state(ENV, tmp_path)(ax.init(ax.identity, net(1)))
    file = next((tmp_path / url.rpartition("/")[2]).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ax.DamagedError, match="another digest"):
        load(tmp_path, net(2))


@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_cast_as_torch_casts_them(here, there, tmp_path):
    """Rounded to nearest into the dtype of the model, which keeps it."""
    torch.manual_seed(0)
    weight = torch.randn(37, 5).to(there)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    model = load(tmp_path, nn.Linear(5, 37, bias=False).to(here))
    assert model.weight.dtype == here
    assert torch.equal(model.weight, weight.to(here))
    assert not torch.equal(model.weight, weight.to(torch.float16).to(here) * 1.01)


def test_a_weight_that_does_not_lie_row_by_row_is_filled(tmp_path):
    """Whatever the strides here, elements go to their own indices."""
    weight = torch.arange(12.0).reshape(3, 4)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(torch.zeros(4, 3).T)
    assert torch.equal(load(tmp_path, model).weight, weight)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (torch.int32, torch.int64),
        (torch.int64, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float32, torch.complex64),
    ],
)
def test_other_dtypes_are_not_cast(there, here, tmp_path):
    """A code is no number, and float8 none without its scale."""
    save_file({"b": torch.ones(3).to(there)}, tmp_path / "model.safetensors")
    model = nn.Module()
    model.register_buffer("b", torch.zeros(3, dtype=here))
    with pytest.raises(ax.CheckpointError, match=r"b is \w+ \[3\] in it and \w+ \[3\]"):
        load(tmp_path, model)


def test_every_name_that_does_not_fit_is_said_at_once(tmp_path):
    """Missing, left over and reshaped ones; nothing has been filled by then."""
    held = stored(net(1))
    held["late"] = held.pop("head.bias")
    held["layers.0.norm.weight"] = torch.ones(2, 3)
    save_file(held, tmp_path / "model.safetensors")
    model = net(2)
    with pytest.raises(ax.CheckpointError) as raised:
        load(tmp_path, model)
    for words in (
        "head.bias is not in it",
        "late is in it and not here",
        "layers.0.norm.weight is float32 [2, 3] in it and float64 [6] here",
        "strict=False",
    ):
        assert words in str(raised.value)
    assert equal(model, stored(net(2)))


@pytest.mark.parametrize("prefix", ["body.", ""])
def test_a_prefix_in_the_way_is_named(prefix, tmp_path):
    """The error has the renaming that works, in both directions."""
    inner = nn.Sequential(nn.Linear(2, 2))
    outer = nn.ModuleDict({"body": inner})
    source, target = (outer, inner) if prefix else (inner, outer)
    save_file(stored(source), tmp_path / "model.safetensors")
    with pytest.raises(ax.CheckpointError) as raised:
        load(tmp_path, target)
    hint = str(raised.value).partition("rename=")[2].partition(" for names")[0]
    assert "body." in hint
    load(tmp_path, target, rename=eval(hint))


def test_names_are_mapped(tmp_path):
    """By a mapping or a function, from the file's to the model's; each once."""
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for rename in ({"w": "weight"}, lambda name: name + "eight"):
        assert (load(tmp_path, linear(), rename=rename).weight == 1).all()
    save_file({"w": torch.ones(1), "v": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ax.CheckpointError, match="both become 'x'"):
        load(tmp_path, linear(), rename=lambda name: "x")


def test_a_part_is_loaded(tmp_path):
    """What `only` does not take stays, and need not be in the file."""
    save_file({"1.weight": torch.ones(2, 2), "x": DATA_}, tmp_path / "a.safetensors")
    for only in ("1.*", ("1.weight",), ["1.**"], lambda name, _: name == "1.weight"):
        model = nn.Sequential(linear(), linear())
        load(tmp_path / "a.safetensors", model, only=only)
        assert [w.weight.mean().item() for w in model] == [7, 1]


DATA_ = torch.zeros(1)


def test_a_loose_load_says_what_was_left(tmp_path):
    """In the slot of the pass; if nothing fits at all, it is an error."""
    save_file({"1.weight": torch.ones(2, 2), "x": DATA_}, tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    tx = ax.load_weights(path, strict=False)
    state = ax.init(tx, nn.Sequential(linear(), linear()))
    loaded = state.slots["load_weights"]
    assert (loaded.missing, loaded.unexpected) == (("0.weight",), ("x",))
    assert loaded.read == 16
    assert [w.weight.mean().item() for w in state.model] == [7, 1]
    with pytest.raises(ax.CheckpointError, match="none of its 2 names"):
        load(path, linear(), strict=False)


def test_any_name_of_a_tied_weight_will_do(tmp_path):
    """As files of transformers leave all but one out; equal copies do no harm."""
    wanted = stored(net(1))
    assert "head.weight" not in wanted
    other = {**wanted, "head.weight": wanted["embed.weight"]}
    del other["embed.weight"]
    both = {**wanted, "head.weight": wanted["embed.weight"].clone()}
    for held in (wanted, other, both):
        save_file(held, tmp_path / "model.safetensors")
        model = load(tmp_path, net(2))
        assert equal(model, wanted)
        assert model.head.weight is model.embed.weight
    both["head.weight"][0, 0] += 1
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(
        ax.CheckpointError, match=r"embed\.weight .* several that differ"
    ):
        load(tmp_path, net(2))


def test_no_weights_and_two_kinds_of_weights_are_refused(tmp_path):
    """The error says what was looked for, or which of them to name."""
    for place in (tmp_path, tmp_path / "none", tmp_path / "none.safetensors"):
        with pytest.raises(ax.CheckpointError, match="found no"):
            load(place, linear())
    ax.save_state(ENV, tmp_path)(ax.init(ax.identity, linear()))
    load(tmp_path, linear())
    save_file(stored(linear()), tmp_path / "model.safetensors")
    with pytest.raises(ax.CheckpointError, match="in one form"):
        load(tmp_path, linear())


def test_what_is_no_module_is_refused(tmp_path):
    """Alone, a function or a state has no weights to fill."""
    with pytest.raises(TypeError, match=r"load_weights\(url\)\(Net"):
        load(tmp_path, linear)


def test_the_pass_stands_behind_the_placing_and_once():
    """By rules on data alone, each with its reason; it prints as its code."""
    one = ax.load_weights("a")
    for wrong in (ax.shard_model(ENV), ax.with_precision("bf16"), one):
        with pytest.raises(ax.OrderError, match="load_weights"):
            ax.chain(one, wrong)
    assert ax.chain(ax.shard_model(ENV), one) == ax.chain(
        ax.shard_model(ENV), ax.load_weights("a")
    )
    assert repr(ax.load_weights("a", only=["x"], strict=False)) == (
        "load_weights('a', only=('x',), strict=False)"
    )


# Models without memory.


def on_meta(seed=2):
    """The model of the laws on the meta device, all but its lasting-less buffers."""
    with torch.device("meta"):
        model = net(seed)
    for layer in model.layers:
        layer.shift = torch.linspace(-0.1, 0.1, t.WIDTH).double()
    return model


PLAIN = {"chain": ax.identity, "placed": ax.shard_model(ENV, "fsdp2", "layers.*")}


@pytest.mark.parametrize("given", ["function", "module"])
@pytest.mark.parametrize("place", PLAIN)
def test_a_model_on_meta_gets_memory_and_numbers(place, given, tmp_path):
    """Ties, frozen weights and the run that follows are those of the whole model."""
    save_file(stored(net(1)), tmp_path / "model.safetensors")
    tx = ax.chain(PLAIN[place], ax.load_weights(tmp_path), ax.clip(t.LIMIT))
    model = on_meta if given == "function" else on_meta()
    run = t.train(tx, ENV, model, t.masked, t.grouped, t.batches())
    judge = t.by_hand(t.made(), t.masked, t.grouped, t.batches(), factor=lambda k: 1)
    assert t.apart(judge, run) < 1e-12
    other = t.by_hand(t.made(seed=2), t.masked, t.grouped, t.batches())
    assert t.apart(other, run) > 1e-3


def test_a_model_on_meta_goes_on_from_a_checkpoint(tmp_path):
    """load_state, which fills or raises, is enough; with "fresh" it is not."""
    state, _ = saving.train(saving.chain(ENV, "ddp"), 2)
    ax.save_state(ENV, tmp_path)(state)
    for place in (ax.identity, ax.shard_model(ENV)):
        tx = ax.chain(place, ax.load_state(ENV, tmp_path, only=("model.**", "step")))
        again = ax.init(tx, on_meta(), t.grouped)
        assert equal(again.model, stored(state.model))
        tx = ax.chain(place, ax.load_state(ENV, tmp_path, "fresh"))
        with pytest.raises(ax.PlacementError, match="on the meta device"):
            ax.init(tx, on_meta(), t.grouped)


def test_what_no_file_can_fill_may_not_be_on_meta(tmp_path):
    """Buffers that are not saved, and weights that are not taken, by name."""
    save_file(stored(net(1)), tmp_path / "model.safetensors")
    with torch.device("meta"):
        hollow = net(2)
    init = partial(ax.init, model=hollow, optim=t.grouped)
    with pytest.raises(ax.PlacementError, match=r"layers\.0\.shift.*give the function"):
        init(ax.load_weights(tmp_path))
    for options in ({"strict": False}, {"only": "layers.**"}):
        with pytest.raises(ax.PlacementError, match=r"embed\.weight"):
            ax.init(ax.load_weights(tmp_path, **options), on_meta(), t.grouped)
    with pytest.raises(ax.PlacementError, match=r"ax\.init\(ax\.load_weights"):
        load(tmp_path, on_meta())


# How weights leave.


def exported(place):
    """All that an export wrote, as safetensors' own library reads it; the sizes."""
    files = sorted(place.glob("*.safetensors"))
    held = {}
    for file in files:
        part = load_file(file)
        assert not held.keys() & part.keys()
        held |= part
    return held, {file.name: file.stat().st_size for file in files}


def mixed():
    """A model of several dtypes, a scalar and an empty buffer; two names are tied."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(7, 5))
    model[2].weight = model[1].weight
    model.register_buffer("flags", torch.tensor([True, False, True]))
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("short", torch.randn(3, 2).half())
    model.register_buffer("none", torch.zeros(0, 4))
    model.register_buffer("hidden", torch.ones(2), persistent=False)
    return model


def sources(tmp_path, model):
    """A checkpoint of the model, a file, and the run itself."""
    state = ax.init(ax.identity, model)
    save_file(stored(model), tmp_path / "a.safetensors")
    url = ax.save_state(ENV, tmp_path / "run")(state)
    return {"checkpoint": url, "file": tmp_path / "a.safetensors", "run": (ENV, state)}


@pytest.mark.parametrize("size", ["5GB", 100])
@pytest.mark.parametrize("kind", ["checkpoint", "file", "run"])
def test_an_export_holds_the_weights(kind, size, tmp_path):
    """Read by safetensors, to the bit, in files of at most that size; ties once."""
    model = mixed()
    source = sources(tmp_path, model)[kind]
    assert ax.export(source, tmp_path / "out", max_shard_size=size).endswith("/out")
    held, files = exported(tmp_path / "out")
    wanted = stored(model)
    assert held.keys() == wanted.keys()
    assert t.same(held, wanted)
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.exists() == (size == 100)
    if size == 100:
        said = json.loads(index.read_text())
        total = sum(v.numel() * v.element_size() for v in wanted.values())
        assert said["metadata"]["total_size"] == total
        n = len(files)
        assert n > 3
        assert list(files) == [
            f"model-{k:05d}-of-{n:05d}.safetensors" for k in range(1, n + 1)
        ]
        for name, file in said["weight_map"].items():
            assert torch.equal(load_file(tmp_path / "out" / file)[name], wanted[name])
    fresh = load(tmp_path / "out", mixed())
    assert equal(fresh, wanted)


def test_a_file_of_an_export_lies_as_the_format_wants(tmp_path):
    """Each tensor at a multiple of its width, and transformers' mark in the header."""
    ax.export((ENV, ax.init(ax.identity, mixed())), tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    widths = {"F32": 4, "I64": 8, "F16": 2, "BOOL": 1}
    assert length % 8 == 0
    assert all(
        one["data_offsets"][0] % widths[one["dtype"]] == 0 for one in header.values()
    )


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
@pytest.mark.parametrize("kind", ["checkpoint", "run"])
def test_an_export_casts_floats_and_takes_a_part(kind, dtype, tmp_path):
    """Integers stay; names that `only` does not take are not there."""
    model = mixed()
    source = sources(tmp_path, model)[kind]
    ax.export(source, tmp_path / "out", dtype=dtype, only=("0.*", "count", "short"))
    held, _ = exported(tmp_path / "out")
    assert held.keys() == {"0.weight", "0.bias", "count", "short"}
    for name, tensor in held.items():
        wanted = model.state_dict()[name]
        wanted = wanted.bfloat16() if wanted.is_floating_point() else wanted
        assert torch.equal(tensor, wanted)


def test_an_export_goes_to_a_store(tmp_path):
    """Any URL will do, for both ends."""
    state = ax.init(ax.identity, net(1))
    ax.export((ENV, state), "memory://out/one", max_shard_size=300)
    ax.export("memory://out/one", "memory://out/two")
    assert equal(load("memory://out/two", net(2)), stored(state.model))
    storage.remove_folder(storage.at("memory://out"))


@pytest.mark.parametrize("fail", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", ["file", "run"])
def test_an_export_that_fails_leaves_nothing(kind, fail, tmp_path):
    """Whichever write fails, the folder is as it was and the next export works."""
    source = sources(tmp_path, mixed())[kind]
    with faulty.use(tmp_path / "store", fail_write=fail) as faults:
        with pytest.raises(OSError, match="told to fail"):
            ax.export(source, "faulty://out", max_shard_size=100)
        assert not storage.sizes(storage.at("faulty://out"))
        faults.fail_write = 0
        ax.export(source, "faulty://out", max_shard_size=100)
        assert equal(load("faulty://out", mixed()), stored(mixed()))


def test_an_export_is_refused_before_anything_is_written(tmp_path):
    """Weights in the way, weights that are not there, a part that is empty."""
    state = ax.init(ax.identity, mixed())
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        save_file({"a": DATA_}, tmp_path / name)
        with pytest.raises(ax.CheckpointError, match=name):
            ax.export((ENV, state), tmp_path)
        (tmp_path / name).unlink()
    run = tmp_path / "run"
    state.model[0].requires_grad_(False)
    state = ax.init(ax.identity, mixed().requires_grad_(False))
    state.model[1].requires_grad_(True)
    url = ax.save_state(ENV, run, select="trainable")(state)
    with pytest.raises(ax.CheckpointError, match="a folder without weights"):
        ax.export((ENV, state), run)
    with pytest.raises(ax.CheckpointError, match=r"does not hold: 0\.weight"):
        ax.export(url, tmp_path)
    with pytest.raises(ax.CheckpointError, match="saved on top"):
        load(url, mixed())
    with pytest.raises(ax.CheckpointError, match="takes none"):
        ax.export((ENV, state), tmp_path, only="x.*")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    ax.export(url, tmp_path, only=("1.*", "flags"))
    assert exported(tmp_path)[0].keys() == {"1.weight", "1.bias", "flags"}


def test_settings_of_an_export_are_looked_at():
    """Sizes as the field writes them; dtypes that floats can have."""
    sizes = {"5GB": 5 * 10**9, "2 GiB": 2**31, "1.5MB": 1500000, "7B": 7, 9: 9}
    for text, size in sizes.items():
        assert shards.size_of(text) == size
    state = ax.init(ax.identity, linear())
    for wrong in ("5", "5XB", "-1GB", 0, -3, True, 1.5, None):
        with pytest.raises(ValueError, match="max_shard_size"):
            ax.export((ENV, state), "memory://x", max_shard_size=wrong)
    with pytest.raises(ValueError, match="dtype"):
        ax.export((ENV, state), "memory://x", dtype="int8")
    with pytest.raises(TypeError, match="wants an Env"):
        ax.export((state, ENV), "memory://x")
    odd = shards.Item("a", "complex128", (1,))
    with pytest.raises(ax.CheckpointError, match="a is complex128"):
        shards.cut([odd], 10)


# One at a time.


def test_weights_stream_on_one_process():
    """All of them, in the model's order, under the first of tied names."""
    state = ax.init(ax.identity, net(1))
    streamed = dict(ax.stream_weights(ENV, state))
    assert list(streamed) == list(stored(net(1)))
    assert t.same(streamed, stored(net(1)))
    assert not any(v.requires_grad for v in streamed.values())
    assert state.spent is None


def test_a_stream_asks_for_a_state_and_seconds():
    """At the call, not at the first weight."""
    state = ax.init(ax.identity, linear())
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            ax.stream_weights(ENV, state, timeout=wrong)
    with pytest.raises(TypeError, match="wants a State"):
        ax.stream_weights(ENV, linear())
    with pytest.raises(ax.CollectiveError, match="alone"):
        ax.on_main(ENV, ax.stream_weights, state)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([b"go", b"left"], "rank 1 left at 'a'"),
        ([None, b"go"], "rank 0 took more than 5 s at 'a'"),
        ([b"left", None], "rank 0 left at 'a' and rank 1 took more than 5 s"),
        ([b"go", b"go"], "go"),
    ],
)
def test_the_verdict_names_who_left_and_who_is_late(told, words):
    """And the weight that was out when it did."""
    room = meeting.Room(ax.Env(world=2), None, ("a", "b"), 5.0)
    assert words in meeting._verdict(room, 1, told)
    if b"go" not in told or None in told:
        assert "before the first" in meeting._verdict(room, 0, told)
