"""A checkpoint that somebody made to do harm is refused, in words, and does nothing."""

import builtins
import marshal
import os
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from accelx.errors import CheckpointError
from accelx.saves.commit import found, latest
from accelx.saves.streams import FORM, SIZE, WORDS
from tests import forged, fuzzing

MEMORY = 4 << 20  # bytes that a refusal may take; the checkpoint has 15,000
HUGE = 2**50


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The files of a checkpoint that is what it should be."""
    return forged.saved(tmp_path_factory.mktemp("sound"))


CODE = (
    (builtins, ("eval", "exec", "compile")),
    (pickle, ("load", "loads", "Unpickler")),
    (marshal, ("load", "loads")),
    (torch, ("load",)),
    (os, ("system", "fork")),
    (subprocess, ("Popen",)),
)


@contextmanager
def inert():
    """No text becomes code, nothing is unpickled or imported, no program starts."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a checkpoint was about to run code")

    modules = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for module, names in CODE:
            for name in names:
                patch.setattr(module, name, forbidden)
        yield
    assert set(sys.modules) == modules, "a checkpoint had a module imported"


@pytest.fixture
def asked(monkeypatch):
    """Bytes of each tensor that was made by its shape."""
    made, empty = [], torch.empty

    def counted(*args, **kwargs):
        shape = empty(*args, **{**kwargs, "device": "meta"})
        made.append(shape.numel() * shape.element_size())
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", counted)
    return made


def entry(raw, name):
    """The record of a tensor in a manifest."""
    return next(one for one in raw["tensors"] if one[0] == name)


def at(*path, to):
    """An edit: what stands at the path becomes `to`."""

    def edit(raw):
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = to

    return edit


def tensor(field, to, name="model.first.weight"):
    """An edit of a tensor's name, dtype, shape or layout: 0 to 3."""

    def edit(raw):
        entry(raw, name)[field] = to

    return edit


def both(*edits):
    def edit(raw):
        for one in edits:
            one(raw)

    return edit


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def twice(raw):
    raw["tensors"].append(list(raw["tensors"][0]))


def vast(raw):
    """A tensor, and a file, of a quadrillion elements, without a byte of it."""
    entry(raw, "model.first.weight")[2:] = [[HUGE, 3], len(raw["layouts"])]
    raw["layouts"].append([[0, 0, HUGE, 3, 0]])


OPTIM = ("values", "optim.0.groups")
STATE = ("values", "optim.0.state")
GROUP = (*OPTIM, "groups", 0)
SLOT = ("values", "slots.memory")
PART = ("parts", 0)
LAYOUT = ("layouts", 1)  # of the weights of shape (2, 3)

ESCAPES = (
    "../x",
    "..",
    "/etc/passwd",
    "a/b",
    "",
    "\0",
    "x\0",
    "x" * 5000,
    ".x",
    5,
    None,
)
MANIFESTS = {
    # names of files
    **{f"file-{e!r:.12}": (at(*PART, 0, to=e), "file name") for e in ESCAPES},
    **{f"index-{e!r:.12}": (at(*PART, 2, to=e), "file name") for e in ESCAPES},
    "one-file-twice": (at(*PART, 2, to="rank-00000.safetensors"), "two places"),
    "no-such-file": (at(*PART, 0, to="rank-00007.safetensors"), "got nothing"),
    # sizes and places
    "size-negative": (at(*PART, 1, to=-1), "number -1"),
    "size-float": (at(*PART, 1, to=11712.0), "number 11712.0"),
    "size-bool": (at(*PART, 1, to=True), "number True"),
    "size-huge": (at(*PART, 1, to=HUGE), f"wants to have {HUGE} bytes"),
    "index-size-huge": (at(*PART, 3, to=HUGE), f"wants to have {HUGE} bytes"),
    "size-overflow": (at(*PART, 1, to=2**63), "number 9223372036854775808"),
    "digest-short": (at(*PART, 4, to="ab"), "digest 'ab'"),
    "part-list": (at(*PART, to=[]), "in place of 5 values"),
    "part-number": (at(*PART, to=7), "in place of 5 values"),
    "chunk-zero": (at("chunk", to=0), "chunks of 0 bytes"),
    "chunk-huge": (at("chunk", to=HUGE), "chunks of"),
    "chunk-bool": (at("chunk", to=True), "chunk=True"),
    # shapes and slices
    "shape-absurd": (tensor(2, [HUGE, 3]), "do not fit"),
    "shape-vast": (vast, "which has 11712"),
    "shape-overflow": (tensor(2, [2**40, 2**40]), "a tensor of shape"),
    "shape-negative": (tensor(2, [-2, -3]), "number -2"),
    "shape-float": (tensor(2, [2.0, 3]), "number 2.0"),
    "shape-bool": (tensor(2, [True, 3]), "number True"),
    "shape-text": (tensor(2, "23"), "the shape"),
    "shape-deep": (tensor(2, [1] * 65), "the shape"),
    "shape-other": (tensor(2, [3, 2]), "do not fit"),
    "dtype-unknown": (tensor(1, "float7"), "dtype 'float7'"),
    "dtype-code": (tensor(1, "load"), "dtype 'load'"),
    "dtype-list": (tensor(1, []), "dtype"),
    "dtype-other": (tensor(1, "float64"), "which has 11712|float64"),
    "layout-none": (tensor(3, 99), "layout 99"),
    "layout-negative": (tensor(3, -1), "number -1"),
    "slice-missing": (at(*LAYOUT, to=[[0, 0, 1, 3, 0]]), "hold 3 of 6 elements"),
    "slice-none": (at(*LAYOUT, to=[]), "hold 0 of 6 elements"),
    "slice-twice": (at(*LAYOUT, to=[[0, 0, 2, 3, 0]] * 2), "overlap"),
    "slice-overlaps": (
        at(*LAYOUT, to=[[0, 0, 2, 2, 0], [0, 1, 2, 3, 0]]),
        "overlap",
    ),
    "slice-outside": (at(*LAYOUT, to=[[0, 0, 2, 4, 0]]), "empty or outside"),
    "slice-backwards": (at(*LAYOUT, to=[[2, 3, 0, 0, 0]]), "empty or outside"),
    "slice-of-no-part": (at(*LAYOUT, to=[[0, 0, 2, 3, 1]]), "part 1 of 1"),
    "slice-even": (at(*LAYOUT, to=[[0, 0, 2, 3]]), "the slice"),
    "slice-text": (at(*LAYOUT, to=["00230"]), "the slice"),
    "slice-float": (at(*LAYOUT, to=[[0, 0, 2, 3.0, 0]]), "number 3.0"),
    # names
    "tensor-twice": (twice, "twice"),
    "tensor-empty": (tensor(0, ""), "the name ''"),
    "tensor-long": (tensor(0, "x" * 5000), "the name 'xxx"),
    "tensor-number": (tensor(0, 7), "the name '7'"),
    "tensor-short": (at("tensors", 0, to=["a"]), "in place of 4 values"),
    "alias-of-nothing": (at("aliases", "model.x", to="model.y"), "alias"),
    "alias-of-itself": (at("aliases", "model.x", to="model.x"), "alias"),
    "alias-of-alias": (
        at("aliases", to={"model.x": "model.y", "model.y": "model.x"}),
        "alias",
    ),
    "alias-of-list": (at("aliases", "model.x", to=[]), "alias"),
    "alias-hides": (at("aliases", "model.scale", to="random"), "alias"),
    "base-short": (at("base", "x", to=["float32"]), "in place of 3 values"),
    "base-unnamed": (at("base", "", to=["float32", [1], "0" * 32]), "the name ''"),
    "base-digest": (at("base", "x", to=["float32", [1], 5]), "the digest"),
    # counters
    "step-negative": (at("values", "step", to=-1), "number -1"),
    "step-text": (at("values", "step", to="1"), "number 1"),
    "step-float": (at("values", "step", to=1.0), "number 1.0"),
    "step-bool": (at("values", "step", to=True), "number True"),
    "step-huge": (at("values", "step", to=2**63), "number 922"),
    "step-none": (at("values", "skipped", to=None), "number None"),
    "world-zero": (at("about", "world", to=0), "no rank"),
    "world-text": (at("about", "world", to="1"), "number 1"),
    "world-other": (at("about", "world", to=2), "random streams of shape"),
    "position-list": (at("about", "position", to=[]), r"number \[\]"),
    "version-newer": (at("accelx", to=2), "install a newer accelx"),
    "version-zero": (at("accelx", to=0), "format 0"),
    "version-text": (at("accelx", to="1"), "accelx=1"),
    **{
        f"no-{field}": (at(field, to=None), f"{field}=None")
        for field in ("about", "parts", "layouts", "tensors", "aliases", "values")
    },
    # optimizers
    "groups-list": (at(*OPTIM, to=[]), "in place of an object"),
    "groups-number": (at(*OPTIM, to=5), "in place of an object"),
    "groups-empty": (at(*OPTIM, to={}), "class=None"),
    "groups-dict": (at(*OPTIM, "groups", to={}), "groups={}"),
    "group-text": (at(*GROUP, to="x"), "in place of an object"),
    "params-numbers": (at(*GROUP, "params", to=[0, 1]), "the name '0'"),
    "params-text": (at(*GROUP, "params", to="first.weight"), "params=first"),
    "params-lists": (at(*GROUP, "params", to=[[]]), "the name"),
    "params-others": (at(*GROUP, "params", to=["x"]), "does not move x"),
    "options-list": (at(*GROUP, "options", to=[]), r"options=\[\]"),
    "options-tuple": (
        at(*GROUP, "options", to={"$": "tuple", "v": []}),
        "a tuple in place of a dict",
    ),
    "class-other": (at(*OPTIM, "class", to="SGD"), "was a SGD"),
    "state-list": (at(*STATE, to=[]), "in place of an object"),
    "state-of-list": (at(*STATE, "state", "first.bias", to=[]), "in place of a dict"),
    "state-of-text": (at(*STATE, "state", "first.bias", to="x"), "in place of a dict"),
    "state-nowhere": (
        at(*STATE, "state", "first.bias", "x", to={"$": "tensor"}),
        "wants to have a tensor optim.0.state.first.bias.x",
    ),
    "optimizer-second": (at("values", "optim.1.state", to={}), "optim.1.state is in"),
    # slots and extra state
    "kind-unknown": (at(*SLOT, to={"$": "exec", "v": "1"}), "got 'exec'"),
    "kind-list": (at(*SLOT, to={"$": [], "v": "1"}), "got '\\[\\]'"),
    "kind-dict": (at(*SLOT, to={"$": {}, "v": "1"}), "got '{}'"),
    "kind-number": (at(*SLOT, to={"$": 5}), "got '5'"),
    "record-list": (at(*SLOT, "v", to=[]), "got 'record'"),
    "record-other": (
        at("values", "slots.cursor", to={"$": "record", "v": {}}),
        "Cursor",
    ),
    "field-unknown-kind": (at(*SLOT, "v", "count", to={"$": "x"}), "got 'x'"),
    "tuple-dict": (at(*SLOT, "v", "count", to={"$": "tuple", "v": {}}), "got 'tuple'"),
    "float-text": (at(*SLOT, "v", "best", "v", to="1_0"), "the float '1_0'"),
    "int-text": (at(*SLOT, "v", "count", to={"$": "int", "v": "x"}), "the int 'x'"),
    "dtype-name": (at(*SLOT, "v", "kind", "v", to="load"), "the dtype 'load'"),
    "dtype-dotted": (at(*SLOT, "v", "kind", "v", to="_dynamo"), "the dtype '_dynamo'"),
    "bytes-odd": (at(*SLOT, "v", "count", to={"$": "bytes", "v": "?"}), "the bytes"),
    "pairs-single": (at(*SLOT, "v", "table", "v", to=[[1]]), "a key and a value"),
    "pairs-numbers": (at(*SLOT, "v", "table", "v", to=[1, 2]), "a key and a value"),
    "key-list": (at(*SLOT, "v", "table", "v", to=[[[], 1]]), "a key and a value"),
    "tensor-in-two": (
        at(*SLOT, "v", "table", "v", to=[["x", {"$": "tensor"}]] * 2),
        "table.x",
    ),
    "object-here-none": (
        at(*SLOT, "v", "count", to={"$": "object", "v": {}}),
        "here it is int",
    ),
    "object-list": (at("values", "slots.cursor", "v", to=[]), "raised TypeError"),
    "object-empty": (at("values", "slots.cursor", "v", to={}), "raised KeyError"),
    "extra-state": (
        at("values", "model.counting._extra_state", to="x"),
        "raised TypeError",
    ),
    "random-of-no-rank": (
        both(
            tensor(2, [0, 10152], "random"),
            at("layouts", 3, to=[]),
        ),
        "random streams of shape",
    ),
    "random-flat": (tensor(3, 2, "random"), "do not fit"),
    "random-other-dtype": (tensor(1, "int8", "random"), "int8|random"),
    # JSON
    "deep": (at(*SLOT, to=nested(100)), "nesting"),
    "integer-huge": (at(*SLOT, to=10**4000), "integer of 4001 digits"),
}
INDICES = {
    "header-huge": (at("header", 0, to=HUGE), "where"),
    "header-empty": (at("header", 0, to=0), "slice at byte"),
    "header-negative": (at("header", 0, to=-8), "number -8"),
    "header-short": (at("header", to=[]), "in place of 2 values"),
    "slice-twice": (lambda raw: raw["slices"].append(raw["slices"][0]), "twice"),
    "slice-gone": (lambda raw: raw["slices"].pop(), "of 16 slices"),
    "slice-none": (at("slices", to=[]), "0 of 16 slices"),
    "tensor-none": (at("slices", 0, 0, to=99), "tensor 99 of 16"),
    "tensor-bool": (at("slices", 0, 0, to=False), "number False"),
    "piece-none": (at("slices", 0, 1, to=1), "a slice 1 of tensor 0"),
    "offset-outside": (at("slices", 0, 2, to=HUGE), "where"),
    "offset-negative": (at("slices", 0, 2, to=-4), "number -4"),
    "offset-overlaps": (at("slices", 1, 2, to=1376), "where"),
    "digest-none": (at("slices", 0, 3, to=""), "in place of 1"),
    "digest-two": (at("slices", 0, 3, to="0" * 64), "in place of 1"),
    "digest-letters": (at("slices", 0, 3, to="g" * 32), "the digest"),
    "digest-list": (at("slices", 0, 3, to=[1] * 32), "in place of 1"),
    "slice-text": (at("slices", 0, to="abcd"), "in place of 4 values"),
    "version": (at("accelx", to=True), "accelx=True"),
}
COMMITS = {
    "step-negative": at("step", to=-1),
    "step-text": at("step", to="1"),
    "time-text": at("time", to="noon"),
    "time-none": at("time", to=None),
    "metrics-list": at("metrics", to=[]),
    "metric-text": at("metrics", "loss", to="low"),
    "metric-bool": at("metrics", "loss", to=True),
    "size-float": at("manifest_size", to=2343.0),
    "digest-path": at("manifest_digest", to="../../../../etc/passwd/././././."),
    "field-unknown": at("hook", to="os.system"),
    "version-text": at("accelx", to="1"),
    "deep": at("metrics", "loss", to=nested(100)),
}


def edited(raw, edit):
    edit(raw)
    return raw


def refused(run, text, **wish):
    """The load raises, in words that match `text`, and takes next to no memory."""
    state = forged.fresh()
    tracemalloc.start()
    try:
        with inert(), pytest.raises(CheckpointError, match=text) as caught:
            forged.load(run, state, **wish)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("verify", ["touched", "full", "off"])
def test_control_what_is_signed_again_without_an_edit_is_read(sound, tmp_path, verify):
    """The forger's own digests and sizes are right: edits are what is refused below."""
    same = {name: forged.json_of(sound, name) for name in ("manifest", "index")}
    data = {"data": sound["rank-00000.safetensors"]}
    for number, changed in enumerate(({}, *({k: v} for k, v in same.items()), data)):
        forged.write(tmp_path / str(number), forged.signed(sound, **changed))
        loaded = forged.load(tmp_path / str(number), verify=verify)
        assert loaded.slots["load_state"].step == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused(sound, tmp_path, asked, name):
    """Whatever one field says, digests in order: an error with words, and no memory."""
    edit, text = MANIFESTS[name]
    raw = edited(forged.json_of(sound, "manifest"), edit)
    forged.write(tmp_path, forged.signed(sound, manifest=raw))
    refused(tmp_path, text)
    assert sum(asked) < MEMORY


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies_is_refused(sound, tmp_path, asked, name):
    """Also one whose digest the manifest vouches for."""
    edit, text = INDICES[name]
    raw = edited(forged.json_of(sound, "index"), edit)
    forged.write(tmp_path, forged.signed(sound, index=raw))
    refused(tmp_path, text)
    refused(tmp_path, text, verify="full")
    assert sum(asked) < MEMORY


@pytest.mark.parametrize("name", COMMITS)
def test_a_commit_that_lies_makes_no_checkpoint(sound, tmp_path, name):
    """Listings give it with a reason, and `latest` passes it over."""
    raw = edited(forged.json_of(sound, "commit"), COMMITS[name])
    forged.write(tmp_path, sound)
    forged.write(tmp_path, forged.signed(sound, commit=raw), "step-0000000002-00000000")
    bad = found(str(tmp_path))[-1]
    assert bad.commit is None
    assert "commit" in bad.why
    newest = latest(str(tmp_path))
    assert newest.name == forged.FOLDER
    assert [one.why for one in newest.skipped] == [bad.why]


BYTES = {
    "empty": (lambda data: b"", "JSON"),
    "half": (lambda data: data[: len(data) // 2], "JSON"),
    "no-text": (lambda data: b"\xff\xfe" + data, "utf-8"),
    "name-twice": (lambda data: b'{"accelx":1,' + data[1:], "the name 'accelx' twice"),
    "nan": (lambda data: data.replace(b'"skipped":0', b'"skipped":NaN'), "number NaN"),
    "infinite": (lambda data: data.replace(b"0.9,", b"-Infinity,"), "-Infinity"),
    "too-large": (lambda data: data.replace(b"0.9,", b"1e999,"), "number 1e999"),
    "bottomless": (lambda data: b"[" * 100_000 + b"]" * 100_000, "nesting"),
    "deep-inside": (
        lambda data: data.replace(b"true", b"[" * 10**5 + b"]" * 10**5, 1),
        "nesting",
    ),
    "digits": (lambda data: data.replace(b"true", b"9" * 10**6, 1), "1000000 digits"),
    "text-huge": (
        lambda data: data.replace(b'"one"', b'"' + b"x" * 10**6 + b'"')[:-1],
        "JSON",
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_manifest_that_is_no_json_of_ours_is_refused(sound, tmp_path, name):
    """Bad syntax, a name twice, numbers that are none, bottomless nesting."""
    change, text = BYTES[name]
    data = change(sound["manifest.json"])
    assert data != sound["manifest.json"]
    forged.write(tmp_path, forged.signed(sound, manifest=data))
    refused(tmp_path, re.escape(text))


@pytest.mark.parametrize("which", ["python", "numpy", "torch"])
def test_places_outside_a_random_generator_are_refused(sound, tmp_path, which):
    """NumPy would read there, and the process die of it, if nobody looked first."""
    index = forged.json_of(sound, "index")
    start = next(at for number, _, at, _ in index["slices"] if number == 15)
    data = bytearray(sound["rank-00000.safetensors"])
    fields = list(FORM.unpack(data[start : start + SIZE]))
    if which == "torch":
        fields[-3] = fields[-3][:16] + (2**20).to_bytes(8, "little") + fields[-3][24:]
    else:
        fields[{"python": WORDS, "numpy": 2 * WORDS + 4}[which]] = 2**20
    data[start : start + SIZE] = FORM.pack(*fields)
    forged.write(tmp_path, forged.signed(sound, data=bytes(data)))
    refused(tmp_path, "places in 624 words, got .*1048576")


@settings(max_examples=1000)
@given(seed=st.integers(0, 2**63))  # drawing each choice by itself takes three times
def test_any_other_lie_is_read_or_refused(sound, lies, seed):
    """Only errors about checkpoints come out, whatever the file says."""
    what, end = fuzzing.tried(random.Random(seed), sound, lies)
    assert end in ("read", "CheckpointError", "DamagedError"), what


def test_most_lies_are_refused(sound, lies):
    """The control: forgeries are seen for what they are, and some do no harm."""
    ends = [fuzzing.tried(random.Random(k), sound, lies)[1] for k in range(200)]
    assert 100 < sum(end != "read" for end in ends) < 200


@pytest.fixture(scope="module")
def lies(tmp_path_factory) -> Path:
    """Where one forgery after the other is written."""
    return tmp_path_factory.mktemp("lies")
