"""Weights of any origin into slices of ranks, and out of them again."""

import contextlib
import ctypes
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import accelx as ax
from accelx import _torch, deferred, testing
from tests import faulty
from tests.laws import training as t

pytestmark = [pytest.mark.multi, t.quiet_views]
MiB = 1 << 20


def net():
    """The model that ranks make: other numbers than the file has."""
    return t.made(seed=2)()


def on_meta():
    """The same without memory, but for buffers that no file has."""
    with torch.device("meta"):
        model = net()
    for layer in model.layers:
        layer.shift = torch.linspace(-0.1, 0.1, t.WIDTH).double()
    return model


GIVEN = {
    "module": net,
    "function": lambda: net,
    "meta": on_meta,
    "meta function": lambda: on_meta,
}
CASES = [(kind, given) for kind in ("ddp", "fsdp2") for given in GIVEN]


def first_names(model):
    """Weights and persistent buffers in full, each once; a collective under fsdp2."""
    named = model.state_dict(keep_vars=True)
    first = {id(v): n for n, v in reversed(named.items())}
    return {n: t.whole(v).clone() for n, v in named.items() if first[id(v)] == n}


def size_of(held):
    """Bytes of all tensors of a mapping."""
    return sum(v.numel() * v.element_size() for v in held.values())


@contextlib.contextmanager
def counted():
    """How many weights a function's recorder makes again."""
    names, real = [], deferred.Recorder.full
    deferred.Recorder.full = lambda self, x: (
        names.append(tuple(x.shape)) or real(self, x)
    )
    try:
        yield names
    finally:
        deferred.Recorder.full = real


def raised(do, kind=ax.AccelxError):
    """What `do` raises, as text; None where it does not."""
    try:
        do()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return None


def loading(env, folder, case):
    """A model that is loaded and trained: the run, what was read, weights made."""
    kind, given = case
    place = t.placing(env, kind)
    tx = ax.chain(place, ax.load_weights(folder / "file"), ax.clip(t.LIMIT))
    with counted() as made:
        state = ax.init(tx, GIVEN[given](), t.grouped)
    held = first_names(state.model)
    loaded = state.slots["load_weights"].read
    run = t.train(tx, env, GIVEN[given](), t.masked, t.grouped, t.batches())
    return held, loaded, len(made), run


def refused(env, folder):
    """What each rank raises where only one of them finds a fault."""
    init = lambda url: ax.init(  # noqa: E731
        ax.chain(t.placing(env, "fsdp2"), ax.load_weights(url)), net()
    )
    return {
        "damaged": raised(lambda: init(folder / "damaged")),
        "none": raised(lambda: init(folder / "none")),
        "names": raised(lambda: init(folder / "other")),
        "hidden": raised(lambda: ax.init(_all_meta(env, folder), _hollow())),
    }


def _all_meta(env, folder):
    return ax.chain(t.placing(env, "fsdp2"), ax.load_weights(folder / "file"))


def _hollow():
    with torch.device("meta"):
        return net()


def resumed(env, folder, kind):
    """A meta model that goes on from a checkpoint of two ranks."""
    tx = ax.chain(t.placing(env, kind), ax.load_state(env, folder / "saved"))
    return first_names(ax.init(tx, on_meta(), t.grouped).model)


def alone(env, folder):
    """A placed module that is filled by itself, and what the other kind of it reads."""
    model = ax.shard_model(env, "fsdp2", "layers.*")(net())
    return first_names(ax.load_weights(folder / "saved")(model))


def damage(folder):
    """Flip a bit in what rank 1 wrote of the newest checkpoint in `folder`."""
    (file,) = Path(folder).glob("step-*/rank-00001.safetensors")
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    at = header["model.embed.weight"]["data_offsets"][0]
    data[start + at] ^= 4
    file.write_bytes(data)


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """Everything that two ranks load, in two launches: (wanted, judge, results)."""
    folder = tmp_path_factory.mktemp("loads")
    source = t.made(seed=1)()
    wanted = first_names(source)
    for name in ("file", "other"):
        (folder / name).mkdir()
    save_file(wanted, folder / "file/model.safetensors")
    other = {**wanted, "late": torch.ones(1)}
    save_file(other, folder / "other/model.safetensors")

    def save(env):
        state = ax.init(t.placing(env, "fsdp2"), t.made(seed=1), t.grouped)
        for name in ("saved", "damaged"):
            ax.save_state(env, folder / name)(state)

    testing.run(2)(save)()
    damage(folder / "damaged")

    def rank(env):
        found = {case: loading(env, folder, case) for case in CASES}
        found |= {kind: resumed(env, folder, kind) for kind in ("ddp", "fsdp2")}
        return {**found, "alone": alone(env, folder), **refused(env, folder)}

    results = testing.run(2, timeout=120)(rank)()
    judge = t.by_hand(t.made(), t.masked, t.grouped, t.batches(), factor=lambda k: 1)
    return wanted, judge, results


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ranks_start_from_the_file(case, loads):
    """To the bit, however the model is given; the run is that of the file's weights."""
    wanted, judge, results = loads
    for rank, result in enumerate(results):
        held, _read, _made, run = result[case]
        assert held.keys() == wanted.keys()
        assert t.same(held, wanted)
        assert t.apart(judge, run, rank, 2) < 1e-12
    other = t.by_hand(t.made(seed=2), t.masked, t.grouped, t.batches())
    assert t.apart(other, results[0][case][3], 0, 2) > 1e-3


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_rank_reads_the_bytes_of_its_slices(case, loads):
    """Under fsdp2 all ranks together read each weight once, under ddp each rank."""
    wanted, _, results = loads
    read = [result[case][1] for result in results]
    if case[0] == "ddp":
        assert read == [size_of(wanted)] * 2
    else:
        buffers = size_of({n: v for n, v in wanted.items() if n.endswith(".share")})
        assert sum(read) == size_of(wanted) + buffers
        assert max(read) < 0.7 * size_of(wanted)


def test_initial_weights_that_are_overwritten_are_not_made(loads):
    """Of a function only the buffers that no file has, on the rank that sends them."""
    _, _, results = loads
    made = [result["fsdp2", "function"][2] for result in results]
    assert made == [len(net().layers), 0]

    def control(env):
        with counted() as made:
            ax.init(t.placing(env, "fsdp2"), net, t.grouped)
        return len(made)

    assert testing.run(2)(control)()[0] > 10


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "alone"])
def test_a_checkpoint_of_ranks_is_a_source(case, loads):
    """For a model on meta by load_state, and for a placed module by itself."""
    wanted, _, results = loads
    for result in results:
        assert t.same(result[case], wanted)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("damaged", r"DamagedError: rank 1: .*rank-00001\.safetensors.*another digest"),
        ("none", "CheckpointError: rank 0: .*found no"),
        ("names", "CheckpointError: rank 0: .*late is in it and not here"),
        ("hidden", r"PlacementError: layers\.0\.shift"),
    ],
)
def test_what_fails_on_one_rank_raises_on_all(case, words, loads):
    """In the same words, which say on which rank."""
    errors = [result[case] for result in loads[2]]
    assert errors[0] == errors[1]
    assert re.match(words, errors[0], re.DOTALL), errors[0]


# Peak memory.

WIDTH = 1024
M_MMAP_THRESHOLD = -3  # malloc.h


def wide():
    """96 MiB of weights, in 24 layers."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(24)])


def peak():
    """The most memory that this process has had since `forget_peak`, in bytes."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def forget_peak():
    """Begin to count anew; what is in use now, in bytes.

    From here on, what is freed goes back to the system at once: by itself glibc keeps
    as much again, more or less of it from run to run.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the kernel counts it"
)


@linux
def test_no_rank_holds_the_whole_model(tmp_path):
    """From meta into slices, then out again: below a whole model at every moment."""
    with torch.no_grad():
        source = wide()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    whole = size_of(source.state_dict())

    def rank(env):
        warm = ax.init(
            ax.shard_model(env, "fsdp2", "*"), lambda: nn.Sequential(nn.Linear(4, 4))
        )
        dict(ax.stream_weights(env, warm))
        before = forget_peak()
        with torch.device("meta"):
            model = wide()
        tx = ax.chain(ax.shard_model(env, "fsdp2", "*"), ax.load_weights(tmp_path))
        state = ax.init(tx, model)
        loaded = peak() - before
        before = forget_peak()
        ax.export((env, state), tmp_path / "out", max_shard_size=30 * MiB)
        exported = peak() - before
        before = forget_peak()
        kept = [p.clone() for p in wide().parameters()]
        return loaded, exported, peak() - before, len(kept)

    for loaded, exported, control, _ in testing.run(2, timeout=120)(rank)():
        assert loaded < 0.6 * whole  # its half, and what reading takes
        assert exported < 0.3 * whole  # one weight of 4 MiB in its copies, and a block
        assert control > 0.95 * whole
    held = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        held |= load_file(file)
    assert t.same(held, source.state_dict())


@linux
def test_a_checkpoint_is_exported_in_small_memory(tmp_path):
    """By one process, of 96 MiB in shards of 8: two blocks, however large it is."""
    source = wide().requires_grad_(False)
    state = ax.init(ax.identity, source)
    url = ax.save_state(ax.Env(), tmp_path / "run")(state)

    def one(env):
        with torch.no_grad():
            ax.export(url, tmp_path / "warm", only="0.*")
        before = forget_peak()
        ax.export(url, tmp_path / "out", dtype="bf16", max_shard_size="8MiB")
        return peak() - before

    (used,) = testing.run(1)(one)()
    assert used < 36 * MiB  # two blocks of 16 and what the allocator keeps
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 6


# Streams.


class OddError(Exception):
    """An exception of the user's own."""


def consume(env, state, who, how, timeout=None):
    """Take weights until one rank does `how` at the third; what each rank met."""
    taken, store = [], _torch.default_store()
    try:
        for name, tensor in ax.stream_weights(env, state, timeout):
            taken.append((name, tensor.clone()))
            if len(taken) == 3 and env.rank in who:
                if how == "raise":
                    raise OddError
                if how == "break":
                    break
                if how == "sleep":  # until the other rank has given up
                    store.wait([f"{how}{who}"])
    except (OddError, ax.CollectiveError) as error:
        store.set(f"{how}{who}", "")
        return len(taken), f"{type(error).__name__}: {error}"
    return len(taken), taken


LATE = 1.5  # seconds that a consumer may need for one weight
STREAMS = {
    "fine": ((), ""),
    "raise on 0": ((0,), "raise"),
    "raise on 1": ((1,), "raise"),
    "raise on both": ((0, 1), "raise"),
    "break on 1": ((1,), "break"),
    "break on both": ((0, 1), "break"),
    "slow on 0": ((0,), "sleep"),
    "slow on 1": ((1,), "sleep"),
    "fine again": ((), ""),
}


def never_begun(env, state):
    """A stream that rank 0 closes before its first weight."""
    stream = ax.stream_weights(env, state)
    if env.main:
        stream.close()
        return "closed"
    return raised(lambda: next(stream))


def left_at_the_end(env, state):
    """An exception of rank 1 at the last weight."""
    stream = ax.stream_weights(env, state)
    with contextlib.closing(stream):
        for name, _ in stream:
            if env.rank == 1 and name == "head.bias":
                return "left"
    return "all"


def not_written(env, state, folder):
    """Exports that fail on rank 0: at the first file, and because of what is there."""
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full/model.safetensors").write_text("in the way")
    errors = [raised(lambda: ax.export((env, state), folder / "full"))]
    for number in (1, 3):
        with faulty.use(folder / "store", fail_write=number):
            kinds = OSError, ax.CollectiveError
            errors.append(raised(lambda: _export_small(env, state), kinds))
    return errors


def _export_small(env, state):
    ax.export((env, state), "faulty://out", max_shard_size=300)


@cache
def streams(folder):
    """Every case in one launch, one after the other; whatever happened, the next works.

    Also a training step at the end, which needs the process group whole.
    """

    def rank(env):
        tx = t.placing(env, "fsdp2")
        state = ax.init(tx, t.made(), t.grouped)
        found = {}
        for name, (who, how) in STREAMS.items():
            limit = LATE if how == "sleep" else None
            found[name] = consume(env, state, who, how, limit)
        found["never begun"] = never_begun(env, state)
        found["at the end"] = raised(lambda: left_at_the_end(env, state))
        found["not written"] = not_written(env, state, folder)
        copies = ax.init(ax.shard_model(env, "ddp"), t.made(), t.grouped)
        found["ddp"] = consume(env, copies, (), "")
        found["other"] = raised(lambda: _differing(env))
        found["unplaced"] = raised(
            lambda: ax.stream_weights(env, ax.init(ax.identity, net()))
        )
        state, out = ax.step(t.placing(env, "fsdp2"), t.masked)(
            state, t.part(env, t.batches()[0])
        )
        found["stepped"] = out.stepped
        return found

    return testing.run(2, timeout=120)(rank)()


def _differing(env):
    """A stream of models of two kinds."""
    from accelx.saves.stream import streamed

    streamed(env, {"a": torch.ones(2 + env.rank), "b": torch.ones(1)}, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the streams' exports go."""
    return tmp_path_factory.mktemp("streams")


@pytest.mark.parametrize("case", ["fine", "fine again", "ddp"])
def test_a_stream_gives_every_weight_on_every_rank(case, folder):
    """Whole, in one order, ties once; before and after others were broken off."""
    wanted = first_names(t.made()())
    for result in streams(folder):
        count, taken = result[case]
        assert count == len(wanted)
        assert [name for name, _ in taken] == list(wanted)
        assert t.same(dict(taken), wanted)
    assert all(result["stepped"] for result in streams(folder))


@pytest.mark.parametrize("case", ["raise on 0", "raise on 1", "break on 1"])
def test_a_rank_that_leaves_ends_the_stream_on_the_other(case, folder):
    """The other raises, with rank and weight; its own exception stays its own."""
    who = int(case[-1])
    results = [result[case] for result in streams(folder)]
    third = list(first_names(t.made()()))[2]
    count, error = results[1 - who]
    assert count == 3
    assert error.startswith("CollectiveError")
    assert f"rank {who} left at {third!r}" in error
    count, own = results[who]
    assert count == 3
    assert own == "OddError: " if case.startswith("raise") else len(own) == 3


@pytest.mark.parametrize("case", ["raise on both", "break on both"])
def test_ranks_may_leave_together(case, folder):
    """Nobody waits, so nobody else's error is raised."""
    for result in streams(folder):
        count, own = result[case]
        assert count == 3
        assert own == "OddError: " if case.startswith("raise") else len(own) == 3


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_too_slow_ends_the_stream_on_all(who, folder):
    """Also on itself, in the same words."""
    results = [result[f"slow on {who}"] for result in streams(folder)]
    third = list(first_names(t.made()()))[2]
    assert results[0] == results[1]
    assert results[0][0] == 3
    assert f"rank {who} took more than {LATE:g} s at {third!r}" in results[0][1]


def test_a_rank_that_leaves_before_the_first_or_after_the_last_is_missed(folder):
    """At both ends the other rank learns of it."""
    first, second = streams(folder)
    assert first["never begun"] == "closed"
    assert "rank 0 left before the first" in second["never begun"]
    assert "rank 1 left at 'head.bias'" in first["at the end"]
    assert second["at the end"] is None


def test_an_export_that_fails_on_rank_0_raises_on_all(folder):
    """Rank 0 keeps what the store said; others learn who left, or what is there."""
    (full, first, third), others = (r["not written"] for r in streams(folder))
    assert full == others[0]
    assert "has model.safetensors" in full
    assert "told to fail" in first
    assert "told to fail" in third
    assert others[1].startswith("CollectiveError")
    assert "rank 0 left at 'embed.weight'" in others[1]
    assert "rank 0 left at 'layers." in others[2]


def test_models_that_are_not_one_do_not_stream(folder):
    """Other shapes, or no placing at all, by name and on all ranks."""
    for result in streams(folder):
        assert "they differ in a;" in result["other"]
        assert "add shard_model" in result["unplaced"]


# Models of transformers.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two models, a step of each on two ranks: what a rank has, and where it is."""
    pytest.importorskip("transformers")
    from tests.multi import test_transformers as models

    folder = tmp_path_factory.mktemp("transformers")

    def rank(env):
        found = {}
        for name in ("llama", "gpt2"):
            blocks = models.MODELS[name].glob
            tx = ax.shard_model(env, "fsdp2", blocks)
            state = ax.init(tx, models.made(name, torch.float32), models.optim)
            batch = t.part(env, models.batches(name)[0])
            state, _ = ax.step(tx, models.loss)(state, batch)
            ax.save_state(env, folder / name / "saved")(state)
            ax.export((env, state), folder / name / "live", max_shard_size=2000)
            with ax.evaluating(state) as model:
                logits = model(input_ids=models.batches(name)[0][0]).logits
            found[name] = first_names(state.model), logits.clone()
        return found

    return folder, testing.run(2, timeout=120)(rank)()[0]


@pytest.mark.parametrize("way", ["live", "saved"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_from_pretrained_reads_what_was_trained(name, way, trained):
    """Weights to the bit and the same logits, of shards by ranks or of a checkpoint."""
    import transformers as tf

    from tests.multi import test_transformers as models

    folder, found = trained
    wanted, logits = found[name]
    out = folder / name / "live"
    if way == "saved":
        out = folder / name / "exported"
        ax.export(folder / name / "saved", out, max_shard_size=2000)
    fresh = models.made(name, torch.float32)()
    fresh.config.save_pretrained(out)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    model = tf.AutoModelForCausalLM.from_pretrained(out).eval()
    held = first_names(model)
    assert held.keys() == wanted.keys()
    assert t.same(held, wanted)
    with torch.no_grad():
        ours = model(input_ids=models.batches(name)[0][0]).logits
        other = fresh.eval()(input_ids=models.batches(name)[0][0]).logits
    assert torch.allclose(ours, logits, atol=1e-6)
    assert not torch.allclose(other, logits, atol=1e-4)


def test_what_transformers_writes_is_read_into_slices(trained, tmp_path):
    """Shards of save_pretrained, ties left out, on two ranks from the meta device."""
    from tests.multi import test_transformers as models

    source = models.made("gpt2", torch.float32)()
    source.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()

    def rank(env):
        tx = ax.chain(
            ax.shard_model(env, "fsdp2", "transformer.h.*"), ax.load_weights(tmp_path)
        )
        with torch.random.fork_rng():
            torch.manual_seed(99)
            state = ax.init(tx, lambda: models.gpt2(True))
        return first_names(state.model)

    for held in testing.run(2)(rank)():
        assert t.same(held, first_names(source))
