"""What a machine's devices can do, by probes of torch that a test stands in for."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import accelx as ax
from accelx import _xla, rng_device
from accelx.env_device import Hardware, has_float64, kind_of, probe, set_device, widest
from accelx.errors import MissingExtraError, PlacementError
from accelx.records import Env

MACHINES = {  # what torch.accelerator says: kind, count -> what is found
    "none": (None, 0, Hardware()),
    "gpus": ("cuda", 8, Hardware("cuda", 8)),
    "a package for TPUs": ("tpu", 4, Hardware("tpu", 4)),
    "mps": ("mps", 1, Hardware("mps", 1)),
    "xpu": ("xpu", 2, Hardware("xpu", 2)),
    "a build for gpus without one": ("cuda", 0, Hardware()),
}


@pytest.mark.parametrize(("kind", "count", "wanted"), MACHINES.values(), ids=MACHINES)
def test_the_machine_is_probed_by_torch_alone(monkeypatch, kind, count, wanted):
    """A kind counts if devices of it work, whatever packages are installed."""
    found = SimpleNamespace(type=kind) if kind else None

    def current(check_available):
        assert check_available  # a build may name a device that is not there
        return found

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch, "tpu", ModuleType("tpu"), raising=False)
    assert probe() == wanted


@pytest.mark.parametrize(
    ("device", "wanted"),
    [("cuda:3", [3]), ("xpu:1", [1]), ("tpu:2", [2]), ("mps", []), ("cpu", [])],
)
def test_a_numbered_device_becomes_the_current_one(monkeypatch, device, wanted):
    """Of any kind, by the one function that torch has for all."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    set_device(Env(device=device))
    assert chosen == wanted


ABLE = {  # float64, host memory that copies want pinned, whether ranks have one each
    "cpu": (True, False, True),
    "cuda:0": (True, True, True),
    "xpu:0": (True, True, True),
    "tpu:0": (False, False, True),
    "mps": (False, False, False),
    "xla": (True, False, False),
    "npu:0": (True, False, True),
}


@pytest.mark.parametrize(("device", "wanted"), ABLE.items(), ids=ABLE)
def test_what_a_kind_can_do(device, wanted):
    """One table; nothing else asks for a device by its name."""
    kind = kind_of(device)
    assert (kind.float64, kind.pinned, not kind.shared) == wanted


@pytest.mark.parametrize("able", [True, False])
def test_an_xpu_is_asked_whether_it_has_float64(monkeypatch, able):
    """Of Intel's GPUs some do; no other device is asked."""
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(has_fp64=able)

    monkeypatch.setattr(torch.xpu, "get_device_properties", properties)
    assert has_float64(f"xpu:{90 + able}") == able
    assert has_float64("cpu")
    assert not has_float64("mps")
    assert (widest("cuda:1"), widest("mps")) == (torch.float64, torch.float32)
    assert asked == [f"xpu:{90 + able}"]


def generator(takes_device):
    """A module with a generator, as torch.cuda and torch.mps have it."""
    held = [torch.arange(16, dtype=torch.uint8)]
    if not takes_device:
        return SimpleNamespace(
            get_rng_state=lambda: held[0],
            set_rng_state=lambda state: held.__setitem__(0, state),
        )
    return SimpleNamespace(
        get_rng_state=lambda device: held[0],
        set_rng_state=lambda state, device: held.__setitem__(0, state),
    )


@pytest.mark.parametrize(
    ("device", "takes_device"), [("cuda:1", True), ("tpu:0", True), ("mps", False)]
)
def test_random_numbers_of_a_device_are_kept(monkeypatch, device, takes_device):
    """Read and set as the device's own module wants it; another kind's are left."""
    module = generator(takes_device)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    first = rng_device.state(device)
    assert first == bytes(range(16))
    rng_device.restore(device, bytes(16))
    assert rng_device.state(device) == bytes(16)
    rng_device.restore(device, b"12345678")  # of XLA
    assert rng_device.state(device) == bytes(16)


def test_a_device_without_a_generator_to_be_read_has_no_state(monkeypatch):
    """Nothing is saved of it, and nothing set."""
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace())
    assert rng_device.state("npu:0") == b""
    rng_device.restore("npu:0", b"1234")
    assert rng_device.state("cpu") == b""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named"), "not installed.*accelx\\[xla\\]"),
        (
            ImportError("undefined symbol: _ZN5"),
            "built for, 2.9, got torch.*environment",
        ),
    ],
)
def test_without_torch_xla_the_extra_is_named(monkeypatch, error, words):
    """Not installed, or beside another torch than its own."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "torch_xla":
                raise error

    for name in [n for n in sys.modules if n.partition(".")[0] == "torch_xla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(MissingExtraError, match=words):
        set_device(Env(device="xla"))


def runtime(devices=1, processes=1):
    """A runtime of torch_xla, that notes whether it was told to spread tensors."""
    told = SimpleNamespace(spmd=False)
    return told, SimpleNamespace(
        process_count=lambda: processes,
        addressable_runtime_device_count=lambda: devices,
        is_spmd=lambda: told.spmd,
        use_spmd=lambda: setattr(told, "spmd", True),
    )


@pytest.mark.parametrize("devices", [1, 4])
def test_several_xla_devices_are_all_taken(monkeypatch, devices):
    """One is a replica; with several, tensors lie over all."""
    told, fake = runtime(devices)
    monkeypatch.setattr(_xla, "_runtime", lambda: fake)
    set_device(Env(device="xla"))
    assert told.spmd == (devices > 1)


def test_devices_that_would_stand_idle_are_refused(monkeypatch):
    """An Env written by hand started no runtime over all of them."""
    monkeypatch.setattr(_xla, "_runtime", lambda: runtime(2)[1])
    placing = ax.shard_model(Env(device="xla"), "xla")
    with pytest.raises(PlacementError, match="has 2 XLA devices, but uses one"):
        placing(torch.nn.Linear(2, 2))


def test_several_xla_hosts_are_refused(monkeypatch):
    """What was never tried is not left to hang."""
    monkeypatch.setattr(_xla, "_runtime", lambda: runtime(4, processes=2)[1])
    with pytest.raises(PlacementError, match="one host, but the runtime has 2"):
        set_device(Env(device="xla"))


@pytest.mark.parametrize(
    ("devices", "shape", "wanted"),
    [
        (2, (4, 3), 0),  # the first that the devices divide
        (2, (3, 4), 1),
        (4, (11, 6), 0),  # or the longest, the last slice shorter
        (4, (5, 13), 1),
        (4, (6, 6), None),  # 2, 2, 2 and nothing
        (4, (3,), None),
        (2, (), None),
        (2, (0,), None),
    ],
)
def test_a_weight_is_sliced_where_each_device_gets_a_part(
    monkeypatch, devices, shape, wanted
):
    """A weight that would leave one without is whole on each."""
    monkeypatch.setattr(_xla, "_runtime", lambda: runtime(devices)[1])
    assert _xla.slice_dim(shape) == wanted
