"""Checkpoints of Accelerate and of torch.distributed.checkpoint go on as accelx's."""

import os
import pickle
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import accelx as ax
from accelx import storage
from accelx.passes.with_precision import LossScale
from accelx.passes.with_schedule import Schedule
from accelx.saves import convert_write
from accelx.saves.commit import open_manifest, resolve
from accelx.saves.convert_deepspeed import _loaded
from accelx.saves.dtypes import KINDS
from accelx.saves.typed import encode
from tests.importing import (
    GOLDEN,
    SAVED,
    Tiny,
    batch,
    by_hand,
    grouped,
    halving,
    loss,
    make,
    momentum,
    single,
)

# torch says it of every save by one process
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)
ACCELERATE = GOLDEN / "accelerate-1.15"
STORED = {"model.embed.weight", "model.inner.weight", "model.inner.bias"}
WEIGHTS = ("model.**", "optim.**", "step", "skipped")


def goes_on(url, optim, schedule=(), only=None, count=4):
    """The losses of a run that starts from `url`."""
    passes = [ax.with_schedule(one) for one in schedule]
    tx = ax.chain(*passes, ax.load_state(ax.Env(), str(url), only=only))
    state = ax.init(tx, make, optim)
    step, losses = ax.step(tx, loss), []
    for k in range(SAVED, SAVED + count):
        state, out = step(state, batch(k))
        losses.append(float(out.loss))
    return losses


def values(url):
    return open_manifest(resolve(str(url)))[1].values


def written(url):
    """Every tensor of a checkpoint, as the safetensors package reads its files."""
    folder = Path(resolve(str(url)).url.removeprefix("file://"))
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for one in files for name, tensor in one.items()}


def trained(optim, updates=SAVED, schedule=None):
    model = make()
    optimizer = optim(model)
    scheduler = schedule(optimizer) if schedule else None
    by_hand(model, optimizer, scheduler, 0, updates)
    return model, optimizer, scheduler


def accelerate_by_hand(folder, optim, schedule):
    """The judge: files of Accelerate into torch's own objects, with torch alone."""
    model = make()
    if (folder / "model.safetensors").exists():
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    else:
        model.load_state_dict(torch.load(next(folder.glob("pytorch_model*.bin"))))
    optimizer = optim(model)
    state = torch.load(folder / "optimizer.bin")
    if isinstance(state["param_groups"][0]["params"][0], str):
        set_optimizer_state_dict(model, optimizer, state)
    else:
        optimizer.load_state_dict(state)
    scheduler = schedule(optimizer) if schedule else None
    if scheduler is not None:
        scheduler.load_state_dict(torch.load(folder / "scheduler.bin"))
        for group, rate in zip(
            optimizer.param_groups, scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate
    return by_hand(model, optimizer, scheduler, SAVED)


@pytest.mark.parametrize(
    ("name", "optim", "schedule"),
    [
        ("plain", grouped, halving),
        ("bin", grouped, None),
        ("ddp", grouped, None),
        ("fsdp-full", single, halving),
    ],
)
def test_a_run_of_accelerate_goes_on_as_torch_alone_does(
    tmp_path, name, optim, schedule
):
    """Imported weights, optimizer and schedule give torch's own next losses."""
    report = ax.import_state(str(ACCELERATE / name), str(tmp_path), make, optim)
    assert report.step == SAVED
    wanted = accelerate_by_hand(ACCELERATE / name, optim, schedule)
    only = None if schedule else WEIGHTS
    got = goes_on(report.url, optim, [schedule] if schedule else [], only)
    assert got == pytest.approx(wanted, abs=1e-6)
    control = goes_on(report.url, optim, only="model.**")  # a fresh optimizer
    assert control != pytest.approx(wanted, abs=1e-6)


def test_what_is_not_carried_over_is_listed(tmp_path):
    """Every file of the folder is either in the checkpoint or named with a reason."""
    folder = tmp_path / "in"
    shutil.copytree(ACCELERATE / "plain", folder)
    more = ["sampler.bin", "dl_state_dict_1.bin", "model_1.safetensors", "notes.txt"]
    for name in more:
        (folder / name).write_bytes(b"not opened")
    report = ax.import_state(str(folder), str(tmp_path / "out"), make, grouped)
    left = dict(report.left_out)
    used = {"model.safetensors", "optimizer.bin", "scheduler.bin"}
    assert set(left) == {p.name for p in folder.iterdir()} - used
    assert all(left.values())
    assert "ax.seed" in left["random_states_0.pkl"]


def test_a_schedule_that_moved_once_a_process_is_left_out(tmp_path):
    """Two processes step a schedule twice an update, which is another schedule here."""
    report = ax.import_state(str(ACCELERATE / "ddp"), str(tmp_path), make, grouped)
    assert dict(report.left_out).keys() == {"scheduler.bin"}
    assert "6 times in 3 updates" in report.left_out[0][1]
    assert "slots.with_schedule" not in values(report.url)


def named(options=None):
    return lambda m, o: get_optimizer_state_dict(m, o, options=options)


FORMS = {
    "by position": lambda m, o: o.state_dict(),
    "by name": named(),
    "flattened": named(StateDictOptions(flatten_optimizer_state_dict=True)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optim", [grouped, momentum])
def test_a_dcp_folder_goes_on_as_torch_alone_does(tmp_path, form, optim):
    """However the optimizer was saved, the next losses are those of dcp.load."""
    model, optimizer, _ = trained(optim)
    saved = {"model": model.state_dict(), "optim": FORMS[form](model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path / "in")
    report = ax.import_state(
        str(tmp_path / "in"), str(tmp_path), make, optim, trust=True, step=SAVED
    )
    judge = make()
    other = optim(judge)
    by_hand(judge, other, None, 0, 1)  # so that there is state to load into
    other.zero_grad()
    into = {"model": judge.state_dict(), "optim": FORMS[form](judge, other)}
    dcp.load(into, checkpoint_id=tmp_path / "in")
    judge.load_state_dict(into["model"])
    if form == "by position":
        other.load_state_dict(into["optim"])
    else:
        flat = StateDictOptions(flatten_optimizer_state_dict=form == "flattened")
        set_optimizer_state_dict(judge, other, into["optim"], options=flat)
    wanted = by_hand(judge, other, None, SAVED)
    assert goes_on(report.url, optim) == pytest.approx(wanted, abs=1e-6)
    control = goes_on(report.url, optim, only="model.**")
    assert control != pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("wrap", "keys"),
    [
        (lambda m, o: {"app": {"model": m, "optim": o}}, None),
        (lambda m, o: {"net": m, "opt": o}, {"model": "net", "optim": ["opt"]}),
        (lambda m, o: {**m, "opt": o}, {"model": "", "optim": "opt"}),
    ],
)
def test_keys_say_what_is_what(tmp_path, wrap, keys):
    """The tutorial's nested form is found; other words are told by keys=."""
    model, optimizer, _ = trained(single)
    saved = wrap(model.state_dict(), optimizer.state_dict())
    dcp.save(saved, checkpoint_id=tmp_path / "in")
    report = ax.import_state(
        str(tmp_path / "in"), str(tmp_path), make, single, keys=keys, trust=True
    )
    wanted = by_hand(model, optimizer, None, SAVED)
    assert goes_on(report.url, single) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_names_of_wrappers_are_taken_off(tmp_path, prefix):
    """Weights saved through DistributedDataParallel or compile keep their own names."""
    state = {f"{prefix}{n}": t for n, t in make().state_dict().items()}
    dcp.save(state, checkpoint_id=tmp_path / "in")
    ax.import_state(str(tmp_path / "in"), str(tmp_path / "out"), make, trust=True)
    got = written(tmp_path / "out")
    assert got.keys() == STORED
    assert torch.equal(got["model.inner.weight"], make().inner.weight)


def test_safetensors_need_no_trust(tmp_path):
    """What HuggingFaceStorageWriter wrote is read without opening a pickle."""
    state = {n: t for n, t in make().state_dict().items() if n != "head.weight"}
    writer = HuggingFaceStorageWriter(str(tmp_path / "in"))
    dcp.save(state, storage_writer=writer)
    report = ax.import_state(str(tmp_path / "in"), str(tmp_path / "out"), make)
    assert (report.step, report.tensors, report.left_out) == (0, 3, ())
    got = written(tmp_path / "out")
    assert all(torch.equal(got[f"model.{n}"], t) for n, t in state.items())


def test_every_dtype_and_shape_arrives(tmp_path):
    """Whatever torch.save holds, scalars and empty tensors too, is there to the bit."""
    draw = torch.Generator().manual_seed(3)
    state = {
        f"{name}.{k}": torch.randint(0, 200, shape, generator=draw)
        for name in KINDS
        if name not in ("float4_e2m1fn_x2", "complex32")  # cannot be cast to
        for k, shape in enumerate([(), (0, 3), (3, 2)])
    }
    cast = {n: t.to(getattr(torch, n[:-2])) for n, t in state.items()}
    dcp.save(cast, checkpoint_id=tmp_path / "in")
    report = ax.import_state(str(tmp_path / "in"), str(tmp_path / "out"), trust=True)
    manifest = open_manifest(resolve(report.url))[1]
    for name, tensor in cast.items():
        entry = manifest.tensors[f"model.{name}"]
        assert (entry.dtype, entry.shape) == (name[:-2], tuple(tensor.shape))
    got = written(report.url)
    for name, tensor in cast.items():
        if tensor.numel() and KINDS[name[:-2]].codes == 1:
            there, here = got[f"model.{name}"].flatten(), tensor.flatten()
            assert torch.equal(there.view(torch.uint8), here.view(torch.uint8)), name


SCHEDULES = {
    "steps": halving,
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 30]),
    "in turn": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 9)],
        [2],
    ),
    "at once": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_is_written_as_a_run_saves_it(tmp_path, name):
    """The slot equals what encoding the live scheduler gives, and torch goes on so."""
    model, optimizer, scheduler = trained(single, schedule=SCHEDULES[name])
    saved = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "lr_scheduler": scheduler.state_dict(),
    }
    dcp.save(saved, checkpoint_id=tmp_path / "in")
    report = ax.import_state(
        str(tmp_path / "in"), str(tmp_path), make, single, trust=True
    )
    live = encode(Schedule((), (scheduler,)), "slots.with_schedule", lambda *_: None)
    assert values(report.url)["slots.with_schedule"] == live
    wanted = by_hand(model, optimizer, scheduler, SAVED)
    got = goes_on(report.url, single, [SCHEDULES[name]])
    assert got == pytest.approx(wanted, abs=1e-6)


def test_the_loss_scale_is_carried_over(tmp_path):
    """GradScaler's state is the slot of with_precision; other factors are left out."""
    folder = tmp_path / "in"
    shutil.copytree(ACCELERATE / "plain", folder)
    scaler = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    scaler |= {"growth_interval": 500, "_growth_tracker": 7}
    torch.save(scaler, folder / "scaler.pt")
    report = ax.import_state(str(folder), str(tmp_path / "out"), make, grouped)
    live = encode(LossScale(1024.0, 7, 500), "slots.loss_scale", lambda *_: None)
    assert values(report.url)["slots.loss_scale"] == live
    torch.save({**scaler, "growth_factor": 3.0}, folder / "scaler.pt")
    report = ax.import_state(str(folder), str(tmp_path / "other"), make, grouped)
    assert "scaler.pt" in dict(report.left_out)


class Counting(Tiny):
    """Keeps a number and a tensor beside its weights."""

    seen = (3, torch.ones(2))

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_a_modules_extra_state_arrives(tmp_path):
    """What get_extra_state gave is what set_extra_state gets."""
    dcp.save(Counting().state_dict(), checkpoint_id=tmp_path / "in")
    report = ax.import_state(str(tmp_path / "in"), str(tmp_path), Counting, trust=True)
    model = Counting()
    model.seen = None
    ax.init(ax.load_state(ax.Env(), report.url), model)
    assert model.seen[0] == 3
    assert torch.equal(model.seen[1], torch.ones(2))


def test_memory_is_bounded_by_parts(tmp_path, monkeypatch):
    """Tensors are read a part at a time; the parts hold what one part would."""
    monkeypatch.setattr(convert_write, "PART", 100)
    made = []

    def recorded(store, number, slabs):
        made.append(sum(slab.size for slab in slabs))
        return write_part(store, number, slabs)

    write_part = convert_write.write_part
    monkeypatch.setattr(convert_write, "write_part", recorded)
    report = ax.import_state(str(ACCELERATE / "plain"), str(tmp_path), make, grouped)
    assert len(made) > 3
    assert max(made) <= 100
    wanted = accelerate_by_hand(ACCELERATE / "plain", grouped, halving)
    assert goes_on(report.url, grouped, [halving]) == pytest.approx(wanted, abs=1e-6)


def test_both_places_may_be_urls(tmp_path):
    """A folder of an object store is imported into another, without a disk."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(ACCELERATE / "fsdp"), "/import/in", recursive=True)
    report = ax.import_state(
        "memory://import/in", "memory://import/out", make, single, trust=True
    )
    local = ax.import_state(
        str(ACCELERATE / "fsdp"), str(tmp_path), make, single, trust=True
    )
    got = goes_on(report.url, single, [halving])
    assert got == goes_on(local.url, single, [halving])
    memory.rm("/import", recursive=True)


def test_only_takes_a_part(tmp_path):
    """Weights alone need no model, and what stays behind is listed."""
    report = ax.import_state(str(ACCELERATE / "plain"), str(tmp_path), only="model.**")
    left = dict(report.left_out)
    assert "only=" in left["optimizer.bin"]
    assert "only=" in left["scheduler.bin"]
    assert written(report.url).keys() == STORED


@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_counters_lie_where_the_optimizer_wants_them(tmp_path, option):
    """A fused optimizer's counters go to the device, all others' to the CPU."""
    model, optimizer, _ = trained(single)
    state = optimizer.state_dict()
    for on in (False, True):
        state["param_groups"][0][option] = on
        saved = {"model": model.state_dict(), "optim": state}
        folder = tmp_path / str(on)
        dcp.save(saved, checkpoint_id=folder)
        ax.import_state(str(folder), str(folder / "out"), make, single, trust=True)
        held = values(folder / "out")["optim.0.state"]["state"]
        assert {one["step"]["cpu"] for one in held.values()} == {not on}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_payload_works(tmp_path):
    """The control of the tests below: an ordinary unpickling does run it."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_a_metadata_file_runs_nothing(tmp_path, trust):
    """A pickle that calls a function is refused before the call, trusted or not."""
    folder = tmp_path / "in"
    dcp.save(make().state_dict(), checkpoint_id=folder)
    meta = pickle.loads((folder / ".metadata").read_bytes())
    meta.planner_data = Evil(tmp_path / "ran")
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
    with pytest.raises(ax.CheckpointError, match=r"mkdir" if trust else r"trust=True"):
        ax.import_state(str(folder), str(tmp_path / "out"), make, trust=trust)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


class ByName:
    """Is pickled as an attribute of something, as enumerations were once."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def by_name(member, protocol):
    return getattr, (type(member), member.name)


def test_a_member_by_name_is_read_and_no_other_attribute(tmp_path, monkeypatch):
    """Python 3.11.0 to 3.11.3 write memory formats so, and later ones a value."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    dcp.save(make().state_dict(), checkpoint_id=tmp_path / "in")
    meta = pickle.loads((tmp_path / "in/.metadata").read_bytes())
    ax.import_state(str(tmp_path / "in"), str(tmp_path / "out"), trust=True)
    found, wanted = written(tmp_path / "out"), make().state_dict()
    assert {*found} == {f"model.{name}" for name in wanted}
    assert all(torch.equal(found[f"model.{n}"], w) for n, w in wanted.items())
    meta.planner_data = ByName(type(meta), "mro")
    (tmp_path / "in/.metadata").write_bytes(pickle.dumps(meta))
    with pytest.raises(ax.CheckpointError, match=r"getattr of .*Metadata"):
        ax.import_state(str(tmp_path / "in"), str(tmp_path / "no"), trust=True)


def test_a_stage_by_name_is_read_and_no_other_attribute(tmp_path, monkeypatch):
    """The same Pythons write DeepSpeed's stages so."""
    place = "deepspeed.runtime.zero.config"
    module = ModuleType(place)
    module.ZeroStageEnum = type("ZeroStageEnum", (int,), {"__module__": place})
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, place, module)
    for name in ("gradients", "from_bytes"):
        torch.save({"stage": ByName(module.ZeroStageEnum, name)}, tmp_path / name)
    store = storage.at(str(tmp_path))
    assert _loaded(store, "gradients") == {"stage": 2}
    with pytest.raises(ax.CheckpointError, match=r"from_bytes wants .* refuses"):
        _loaded(store, "from_bytes")


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "scaler.pt"])
def test_what_is_opened_runs_nothing(tmp_path, name, trust):
    """A pickle in a file that is carried over is refused by torch.load."""
    folder = tmp_path / "in"
    shutil.copytree(ACCELERATE / "plain", folder)
    torch.save({"state": Evil(tmp_path / "ran"), "param_groups": []}, folder / name)
    with pytest.raises(ax.CheckpointError, match="refuses"):
        ax.import_state(str(folder), str(tmp_path / "out"), make, grouped, trust=trust)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", ["random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_what_is_left_out_is_not_opened(tmp_path, name, trust):
    """A pickle that nothing is taken from cannot run anything."""
    folder = tmp_path / "in"
    shutil.copytree(ACCELERATE / "plain", folder)
    torch.save(Evil(tmp_path / "ran"), folder / name)
    ax.import_state(str(folder), str(tmp_path / "out"), make, grouped, trust=trust)
    assert not (tmp_path / "ran").exists()


def test_a_value_of_a_dcp_folder_runs_nothing(tmp_path):
    """Options of an optimizer are read with weights_only, as tensors are."""
    model, optimizer, _ = trained(single)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = Evil(tmp_path / "ran")
    saved = {"model": model.state_dict(), "optim": state}
    dcp.save(saved, checkpoint_id=tmp_path / "in")
    with pytest.raises(ax.CheckpointError, match="refuses"):
        ax.import_state(str(tmp_path / "in"), str(tmp_path), make, single, trust=True)
    assert not (tmp_path / "ran").exists()


def cut(meta):
    """Leave out the second rank's half of a weight."""
    del meta.state_dict_metadata["model.inner.weight"].chunks[1]


def doubled(meta):
    """Let two chunks hold the same row."""
    one = meta.state_dict_metadata["model.inner.weight"].chunks[1]
    one.offsets, one.sizes = torch.Size([1, 0]), torch.Size([3, 4])
    held = {(i.fqn, i.offset): at for i, at in meta.storage_data.items()}
    index = dcp.metadata.MetadataIndex("model.inner.weight", one.offsets)
    meta.storage_data[index] = held["model.inner.weight", torch.Size([2, 0])]


def far(meta):
    """Point behind the end of a file."""
    next(iter(meta.storage_data.values())).offset += 10**6


def bare(meta):
    """Leave out where the bytes are."""
    meta.storage_data.clear()


@pytest.mark.parametrize(
    ("damage", "said"),
    [(cut, "8 of 16"), (doubled, "overlap"), (far, "bytes"), (bare, "describe")],
)
def test_chunks_that_do_not_cover_are_an_error(tmp_path, damage, said):
    """A tensor with a hole, an overlap or bytes nowhere is refused, nothing written."""
    folder = tmp_path / "in"
    shutil.copytree(GOLDEN / "dcp" / "fsdp2", folder)
    arguments = (str(folder), str(tmp_path / "out"), make, momentum)
    ax.import_state(*arguments, trust=True, step=SAVED)  # the control
    shutil.rmtree(tmp_path / "out")
    meta = pickle.loads((folder / ".metadata").read_bytes())
    damage(meta)
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
    with pytest.raises(ax.DamagedError, match=said):
        ax.import_state(*arguments, trust=True, step=SAVED)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [".metadata", "model.safetensors"])
def test_a_byte_of_another_value_is_no_accident(tmp_path, name):
    """Whatever damaged descriptions say, errors are accelx's; most are refused."""
    golden = GOLDEN / "dcp" / "fsdp2" if name == ".metadata" else ACCELERATE / "plain"
    optim = momentum if name == ".metadata" else grouped
    sound = (golden / name).read_bytes()
    end = len(sound) if name == ".metadata" else 8 + int.from_bytes(sound[:8], "little")
    said = []
    for seed in range(60):
        folder, draw = tmp_path / f"in-{seed}", random.Random(seed)
        shutil.copytree(golden, folder)
        data = bytearray(sound)
        for _ in range(3):
            data[draw.randrange(end)] = draw.randrange(256)
        (folder / name).write_bytes(data)
        out = str(tmp_path / f"out-{seed}")
        try:
            ax.import_state(str(folder), out, make, optim, trust=True, step=SAVED)
        except ax.AccelxError as error:
            said.append(str(error))
    assert 30 < len(said) <= 60
    assert all(said)


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_half_a_file_is_an_error(tmp_path, name, share):
    """A file that was cut off is refused before anything is written."""
    folder = tmp_path / "in"
    shutil.copytree(ACCELERATE / "plain", folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ax.DamagedError, match=name):
        ax.import_state(str(folder), str(tmp_path / "out"), make, grouped)
    assert not (tmp_path / "out").exists()


def test_a_sharded_model_is_read_by_its_index(tmp_path):
    """Files of an index are one model; one that is missing is an error."""
    folder = tmp_path / "in"
    shutil.copytree(ACCELERATE / "plain", folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {n: f"model-0000{i}-of-00003.safetensors" for i, n in enumerate(state, 1)}
    for name, file in files.items():
        save_file({name: state[name]}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(str({"weight_map": files}).replace("'", '"'))
    report = ax.import_state(str(folder), str(tmp_path / "out"), make, grouped)
    got = written(report.url)
    assert all(torch.equal(got[f"model.{n}"], t) for n, t in state.items())
    assert not [n for n, _ in report.left_out if n.startswith("model")]
    (folder / file).unlink()
    with pytest.raises(ax.DamagedError, match=file):
        ax.import_state(str(folder), str(tmp_path / "out"), make, grouped)


def test_torch_itself_does_not_see_the_hole(tmp_path):
    """The control: dcp.load takes a folder that lacks half of a weight."""
    folder = tmp_path / "in"
    shutil.copytree(GOLDEN / "dcp" / "fsdp2", folder)
    meta = pickle.loads((folder / ".metadata").read_bytes())
    cut(meta)
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
    into = {"model": {"inner.weight": torch.full((4, 4), 77.0)}}
    dcp.load(into, checkpoint_id=folder)
    assert (into["model"]["inner.weight"][2:] == 77).all()


def test_other_files_of_a_folder_are_listed(tmp_path):
    """What lies beside the tensors is named, whichever tool wrote them."""
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    report = ax.import_state(str(tmp_path), str(tmp_path / "out"))
    assert [name for name, _ in report.left_out] == ["config.json"]
    folder = tmp_path / "dcp"
    dcp.save(make().state_dict(), checkpoint_id=folder)
    (folder / "notes.txt").touch()
    report = ax.import_state(str(folder), str(tmp_path / "out"), trust=True)
    assert [name for name, _ in report.left_out] == ["notes.txt"]


@pytest.mark.parametrize("count", [float("nan"), 2.5, -1.0])
def test_a_count_that_is_none_is_asked_for(tmp_path, count):
    """A damaged counter of updates is not taken for their number."""
    model, optimizer, _ = trained(single)
    for words in optimizer.state.values():
        words["step"].fill_(count)
    saved = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=tmp_path / "in")
    with pytest.raises(ax.CheckpointError, match=r"step=\.\.\."):
        ax.import_state(str(tmp_path / "in"), str(tmp_path), make, single, trust=True)


def reversed_groups(model):
    return torch.optim.AdamW(
        [{"params": [p]} for p in reversed(list(model.parameters()))]
    )


def one_more(model):
    return [grouped(model), momentum(nn.Linear(1, 1))]


WRONG = {
    "no optimizer": ((make,), {}, "only="),
    "no model": ((None, grouped), {}, "make_model"),
    "an object": ((make, grouped(make())), {}, "function"),
    "another class": ((make, lambda m: type("Lion", (), {})), {}, "Lion"),
    "other options": (
        (make, lambda m: torch.optim.SGD(grouped(m).param_groups, 0.1)),
        {},
        "SGD",
    ),
    "Adam": ((make, lambda m: torch.optim.Adam(grouped(m).param_groups)), {}, "Adam;"),
    "other groups": ((make, single), {}, "2 groups.*makes 1"),
    "two optimizers": ((make, one_more), {}, "1 optimizers.*makes 2"),
    "three groups": ((make, reversed_groups), {}, "2 groups.*makes 3"),
    "another model": ((lambda: nn.Linear(4, 4), single), {}, "embed.weight is in it"),
    "keys": ((make, grouped), {"keys": {"model": "net"}}, "names of their own"),
    "nothing": ((make, grouped), {"only": "slots.none"}, "takes nothing"),
    "a step": ((make, grouped), {"step": -1}, "step=1000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path, name):
    """Each misuse of an Accelerate folder is an error with what to write instead."""
    arguments, options, said = WRONG[name]
    with pytest.raises((ax.CheckpointError, ValueError), match=f"(?s){said}"):
        ax.import_state(
            str(ACCELERATE / "plain"), str(tmp_path / "out"), *arguments, **options
        )
    assert not (tmp_path / "out").exists()


def swapped(model):
    """The order of two weights of one size count is another."""
    embed, weight, bias = model.parameters()
    return torch.optim.AdamW([weight, embed, bias])


def apart(model):
    return torch.optim.AdamW([{"params": [p]} for p in model.parameters()])


def untied():
    model = make()
    model.head.weight = nn.Parameter(model.head.weight.detach() + 1)
    return model


def test_positions_of_another_order_are_refused(tmp_path):
    """Moments that do not have their weight's shape are in another order."""
    model, optimizer, _ = trained(single)
    saved = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=tmp_path / "in")
    with pytest.raises(ax.CheckpointError, match="another order"):
        ax.import_state(str(tmp_path / "in"), str(tmp_path), make, swapped, trust=True)


def test_groups_may_be_cut_and_not_mixed(tmp_path):
    """By name, parameters of one group may be in several here; the reverse may not."""
    for optim, other, fits in ((single, apart, True), (grouped, single, False)):
        model, optimizer, _ = trained(optim)
        state = get_optimizer_state_dict(model, optimizer)
        folder = tmp_path / str(fits)
        saved = {"model": model.state_dict(), "optim": state}
        dcp.save(saved, checkpoint_id=folder)
        arguments = (str(folder), str(tmp_path), make, other)
        if fits:
            report = ax.import_state(*arguments, trust=True)
            wanted = by_hand(model, optimizer, None, SAVED)
            assert goes_on(report.url, other) == pytest.approx(wanted, abs=1e-6)
        else:
            with pytest.raises(ax.CheckpointError, match="different options"):
                ax.import_state(*arguments, trust=True)


def test_tied_weights_that_differ_are_refused(tmp_path):
    """Two tensors are not made one because the model here has one."""
    dcp.save(untied().state_dict(), checkpoint_id=tmp_path / "in")
    with pytest.raises(ax.CheckpointError, match=r"embed\.weight.*differ"):
        ax.import_state(str(tmp_path / "in"), str(tmp_path), make, trust=True)
    ax.import_state(str(tmp_path / "in"), str(tmp_path), untied, trust=True)


@pytest.mark.parametrize(
    ("saved", "options", "said"),
    [
        ({"net": {"w": {"x": torch.ones(1)}}}, {}, r"got net.*keys="),
        ({"net": {"w": torch.ones(1)}}, {"keys": {"model": "n"}}, "there is net"),
        ({"net": {"w": torch.ones(1)}}, {"keys": {"ema": "net"}}, "model, optim"),
        ({"model": {"w": 3}}, {}, "wants to be a tensor"),
        ({"model": {"w": torch.ones(1)}, "optim": {"lr": 1}}, {}, "state_dict"),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path, saved, options, said):
    """A DCP folder of other words says which there are."""
    dcp.save(saved, checkpoint_id=tmp_path / "in")
    with pytest.raises(ax.CheckpointError, match=said):
        ax.import_state(str(tmp_path / "in"), str(tmp_path), trust=True, **options)


def test_an_optimizer_that_does_not_count_wants_a_step(tmp_path):
    """SGD's state says nothing of its updates, so their number is asked for."""
    arguments = (str(GOLDEN / "dcp" / "fsdp2"), str(tmp_path), make, momentum)
    with pytest.raises(ax.CheckpointError, match=r"step=\.\.\."):
        ax.import_state(*arguments, trust=True)
    report = ax.import_state(*arguments, trust=True, step=SAVED)
    assert report.step == SAVED
    assert dict(report.left_out).keys() == {"epoch"}


def test_a_folder_of_nobody_is_refused(tmp_path):
    """What no tool wrote is named with what lies there."""
    with pytest.raises(ax.CheckpointError, match="got nothing"):
        ax.import_state(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ax.CheckpointError, match=r"weights\.npz"):
        ax.import_state(str(tmp_path), str(tmp_path / "out"))
