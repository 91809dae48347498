"""A small checkpoint that is saved once, and copies of it that say something else.

    pristine = forged.saved(tmp_path)                    # name -> bytes of its files
    raw = forged.json_of(pristine, "manifest")
    raw["tensors"][0][2] = [2**60]
    forged.write(tmp_path / "run", forged.signed(pristine, manifest=raw))
    forged.load(tmp_path / "run")

What `signed` makes carries digests and sizes that fit, up to the commit, as somebody
would make it who knows the format: only what a file says can give it away.
"""

import json
import random
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

import accelx as ax
from accelx.saves.choose import Wish, restored
from accelx.saves.strict import digest
from accelx.state import with_slot

FOLDER = "step-0000000001-0a1b2c3d"
FILES = {
    "manifest": "manifest.json",
    "index": "rank-00000.json",
    "commit": "commit.json",
    "data": "rank-00000.safetensors",
}


class Counting(nn.Module):
    """A module with extra state."""

    calls = 3

    def get_extra_state(self):
        return {"calls": self.calls, "seen": torch.ones(2)}

    def set_extra_state(self, state):
        self.calls = state["calls"] + 0
        self.seen = state["seen"] * 1


class Net(nn.Module):
    """Tied weights, a buffer, extra state."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.counting = Counting()
        self.register_buffer("scale", torch.ones(()))


class Cursor:
    """An object of a user's, with state."""

    def __init__(self):
        self.at = {"row": 5, "words": ("a", b"b")}

    def state_dict(self):
        return dict(self.at)

    def load_state_dict(self, state):
        self.at = {"row": state["row"] + 0, "words": state["words"]}


@attrs.frozen
class Memory:
    """A record, as a pass keeps it in its slot."""

    mean: Any
    count: int = 2
    best: float = float("inf")
    kind: torch.dtype = torch.bfloat16
    table: Any = attrs.field(factory=lambda: {1: "one", None: [True, -1.5]})


def fresh():
    """A state that everything of the checkpoint has a place in."""
    torch.manual_seed(3)
    state = ax.init(
        ax.identity, Net, lambda model: torch.optim.AdamW(model.parameters())
    )
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optim.step()
    state.optim.zero_grad()
    state = with_slot(state, "memory", Memory(torch.zeros(2)))
    state = with_slot(state, "cursor", Cursor())
    return attrs.evolve(state, step=1)


def saved(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint of `fresh()`."""
    made = Path(ax.save_state(ax.Env(), folder)(fresh()).removeprefix("file://"))
    return {file.name: file.read_bytes() for file in made.iterdir()}


def write(run: Path, files: dict[str, bytes], folder=FOLDER):
    """Put the files where a run would have saved them, and nothing else."""
    place = run / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (place / name).unlink(missing_ok=True)  # ext4 syncs a file that is overwritten
        (place / name).write_bytes(data)


def load(run, state=None, **wish):
    """The state with what lies in `run`, and the random streams as they were before."""
    before = random.getstate(), torch.get_rng_state()
    try:
        return restored(ax.Env(), state or fresh(), str(run), Wish(**wish))
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])


def json_of(files, what):
    """What one of the files says."""
    return json.loads(files[FILES[what]])


def dumped(value) -> bytes:
    """As accelx writes it; bytes as they are."""
    if isinstance(value, bytes):
        return value
    return json.dumps(value, separators=(",", ":")).encode()


def signed(files, **changed):
    """The files with some of them changed, and digests above them that fit.

    `changed` are bytes or JSON, by the names in FILES. Where the file above does not
    have the form in which a digest could be put, it stays as it is.
    """
    files = files | {FILES[what]: dumped(value) for what, value in changed.items()}
    if "data" in changed:
        index = json_of(files, "index")
        _sign_data(index, files[FILES["data"]])
        files[FILES["index"]] = dumped(index)
    if "index" in changed or "data" in changed:
        manifest, data = json_of(files, "manifest"), files[FILES["index"]]
        manifest["parts"][0][3:] = [len(data), digest(data)]
        files[FILES["manifest"]] = dumped(manifest)
    return files | {FILES["commit"]: _commit(files, changed.get("commit"))}


def _sign_data(index, data):
    """Digests of a file whose slices are shorter than a chunk."""
    index["header"][1] = digest(data[: index["header"][0]])
    ends = sorted([one[2] for one in index["slices"]] + [len(data)])
    for one in index["slices"]:
        stop = ends[ends.index(one[2]) + 1]
        one[3] = digest(data[one[2] : stop])


def _commit(files, changed) -> bytes:
    if isinstance(changed, bytes):
        return changed
    commit, manifest = json_of(files, "commit"), files[FILES["manifest"]]
    if not isinstance(commit, dict):
        return dumped(commit)
    if not changed:
        commit |= {"manifest_size": len(manifest), "manifest_digest": digest(manifest)}
    commit = {k: v for k, v in commit.items() if k != "check"}
    own = json.dumps(commit, separators=(",", ":"), sort_keys=True).encode()
    commit["check"] = digest(own)
    return json.dumps(commit, separators=(",", ":"), sort_keys=True).encode()
