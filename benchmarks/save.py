"""Saving and loading a model with its AdamW on a local disk, beside the peers.

    python benchmarks/save.py [--rounds 5] [--mib 840] [--ranks 2] [--width 1024]

One rank (plain) and two (fsdp2). The same tensors go through each way; the first row of
each table is the limit: `dd` of as many bytes. "synced" counts until the disk has them,
"cached" until the kernel has. Every round writes anew and removes what it wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
import compare
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
import torch.distributed.fsdp
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from xxhash import xxh3_128_hexdigest

import accelx as ax
from accelx.saves.manifest import CHUNK
from accelx.testing import run

torch.set_num_threads(1)
GOALS = {
    "1 rank, synced: accelx": "at most 1.11",
    "1 rank, cached: accelx": "below every peer",
    "2 ranks, synced: accelx": "at most 1.11",
    "2 ranks, cached: accelx": "below every peer",
    "1 rank, load: accelx": "at most 1.11",
    "1 rank: step stalls, wait=False": "at most 1.2",
    "2 ranks: step stalls, wait=False": "at most 1.2",
}


def made(env, mib, width=1024):
    """A state of about `mib` MiB after one step: weights and AdamW's two moments."""
    layers = max(2, mib * 2**20 // (3 * 4 * width * width))
    tx = ax.shard_model(env, "fsdp2", blocks="*")
    state = ax.init(
        tx,
        lambda: nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))),
        lambda m: torch.optim.AdamW(m.parameters()),
    )
    step = ax.step(tx, lambda m, x: m(x).square().mean())
    return step(state, torch.ones(4, width))[0]


def tensors(state):
    """Everything by name, as torch's own functions give it; locals of DTensors."""
    own = dsd.StateDictOptions(flatten_optimizer_state_dict=True)
    model, optim = dsd.get_state_dict(state.model, state.optimizers, options=own)
    every = {**model, **{f"optim.{k}": v for k, v in optim.items()}}
    return {k: v for k, v in every.items() if isinstance(v, torch.Tensor)}


def locals_of(every):
    """What this rank holds, as plain contiguous tensors."""
    one = {k: v.to_local() if hasattr(v, "to_local") else v for k, v in every.items()}
    return {k: v.detach() for k, v in one.items()}


def sync(folder):
    """Have the disk take all that was written into `folder`."""
    for path in sorted(Path(folder).rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextlib.contextmanager
def unsynced():
    """accelx without its syncing, to compare with peers that do none."""
    with mock.patch("os.fsync", return_value=None):
        yield


def savers(env, state, folder, accelerator):
    """name -> a function that writes into `folder`, which is new."""
    every = tensors(state)
    own, size = locals_of(every), 0
    size = sum(t.numel() * t.element_size() for t in own.values()) * env.world

    def dd():
        if env.main:
            words = [f"of={folder}/dd", "if=/dev/zero", "bs=4M", "iflag=fullblock"]
            count = ["iflag=count_bytes", f"count={size}", "status=none"]
            subprocess.run(["dd", *words, *count], check=True)

    def accelx():
        ax.save_state(env, folder)(state)

    def raw():
        path = Path(folder) / f"{env.rank}.safetensors"
        safetensors.torch.save_file(own, path)

    def planned(writer):
        return lambda: dcp.save(dict(every), storage_writer=writer())

    def accelerate():
        accelerator.save_state(f"{folder}/accelerate")

    found = {
        "dd": dd,
        "accelx": accelx,
        "safetensors save_file": raw,
        "torch.save": lambda: torch.save(own, f"{folder}/{env.rank}.pt"),
        "DCP FileSystemWriter": planned(
            lambda: dcp.FileSystemWriter(f"{folder}/dcp", sync_files=False)
        ),
        "DCP HuggingFaceStorageWriter": planned(
            lambda: dcp.HuggingFaceStorageWriter(f"{folder}/hf", save_distributed=True)
        ),
        "DCP FsspecWriter": planned(
            lambda: FsspecWriter(f"{folder}/fsspec", sync_files=False)
        ),
    }
    if accelerator is not None:
        found[f"accelerate {version('accelerate')}"] = accelerate
    return found


def accelerated(env, state):
    """An Accelerator that holds the same model and optimizer; on one rank only."""
    if env.world > 1 or not find_spec("accelerate"):
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(state.model, state.optim)
    return accelerator


def fresh(env, folder):
    """What stands between two rounds: nothing dirty, nothing left, all ranks there."""
    if env.world > 1:
        dist.barrier()
    if env.main:
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
        os.sync()
    if env.world > 1:
        dist.barrier()


def timed(env, variants, rounds, meet):
    """The slowest rank's seconds of each round."""
    times = compare.interleaved(variants, rounds, meet)
    return {k: ax.reduce(env, v, "max") for k, v in times.items()}


def saving(env, rounds, mib, width, folder):
    """Seconds of each way, synced and cached."""
    state = made(env, mib, width)
    ways = savers(env, state, folder, accelerated(env, state))

    def synced(name, way):
        def do():
            way()
            if name != "accelx" and (env.main or name in RANKED):
                sync(folder)
            if env.world > 1:
                dist.barrier()

        return do

    def cached(way):
        def do():
            with unsynced():
                way()
            if env.world > 1:
                dist.barrier()

        return do

    def meet():
        fresh(env, folder)

    at = f"{env.world} rank{'s' * (env.world > 1)}"
    first = {f"{at}, synced: {k}": synced(k, v) for k, v in ways.items()}
    second = {f"{at}, cached: {k}": cached(v) for k, v in ways.items()}
    return [timed(env, each, rounds, meet) for each in (first, second)]


RANKED = {"safetensors save_file", "torch.save"}


def stalls(env, rounds, mib, width, folder):
    """How long a step waits for wait=False, beside one copy of what is saved."""
    state = made(env, mib, width)
    own = list(locals_of(tensors(state)).values())
    size = sum(t.numel() * t.element_size() for t in own)
    buffer = torch.empty(size, dtype=torch.uint8)
    from accelx.saves.saver import Saver

    saver = Saver(env, folder, wait=False)

    def copy():
        at = 0
        for t in own:
            flat = t.reshape(-1).view(torch.uint8)
            buffer[at : at + flat.numel()].copy_(flat)
            at += flat.numel()

    def meet():
        saver.background.join()
        fresh(env, folder)

    at = f"{env.world} rank{'s' * (env.world > 1)}"
    both = {
        f"{at}: one copy of the state": copy,
        f"{at}: step stalls, wait=False": lambda: saver.save(state, {}, wait=False),
    }
    found = timed(env, both, rounds, meet)
    saver.background.join()
    return [found]


def loading(env, rounds, mib, width, folder):
    """Seconds until everything is back in place, from the kernel's cache."""
    state = made(env, mib, width)
    held = {"state": state}
    every = tensors(state)
    own = locals_of(every)
    fresh(env, folder)
    ax.save_state(env, f"{folder}/ax")(state)
    raw = f"{folder}/{env.rank}.safetensors"
    safetensors.torch.save_file(own, raw)
    torch.save(own, f"{folder}/{env.rank}.pt")
    dcp.save(dict(every), storage_writer=dcp.FileSystemWriter(f"{folder}/dcp"))
    dcp.save(dict(every), storage_writer=FsspecWriter(f"{folder}/fsspec"))
    accelerator = accelerated(env, state)
    if accelerator is not None:
        accelerator.save_state(f"{folder}/accelerate")

    def mapped():
        with safetensors.safe_open(raw, "pt") as file:
            for name, tensor in own.items():
                tensor.copy_(file.get_tensor(name))

    def digested():
        mapped()
        for tensor in own.values():
            flat = tensor.view(-1).view(torch.uint8)
            for at in range(0, flat.numel(), CHUNK):
                xxh3_128_hexdigest(memoryview(flat[at : at + CHUNK].numpy()))

    def accelx():
        held["state"] = ax.load_state(env, f"{folder}/ax")(held["state"])

    def pickled():
        read = torch.load(f"{folder}/{env.rank}.pt", weights_only=True)
        for name, tensor in own.items():
            tensor.copy_(read[name])

    at = f"{env.world} rank{'s' * (env.world > 1)}, load"
    ways = {
        f"{at}: safetensors safe_open, copied": mapped,
        f"{at}: the same, and a digest of all": digested,
        f"{at}: accelx": accelx,
        f"{at}: torch.load": pickled,
        f"{at}: DCP FileSystemReader": lambda: dcp.load(
            dict(every), storage_reader=dcp.FileSystemReader(f"{folder}/dcp")
        ),
        f"{at}: DCP FsspecReader": lambda: dcp.load(
            dict(every), storage_reader=FsspecReader(f"{folder}/fsspec")
        ),
    }
    if accelerator is not None:
        ways[f"{at}: accelerate {version('accelerate')}"] = lambda: (
            accelerator.load_state(f"{folder}/accelerate")
        )
    barrier = dist.barrier if env.world > 1 else None
    return [timed(env, ways, rounds, barrier)]


def main():
    """Measure every group, write the figures and their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=840)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--only", default="saving,stalls,loading")
    parser.add_argument("--ranks", default="1")
    args = parser.parse_args()
    found = {}
    kinds = {"saving": saving, "stalls": stalls, "loading": loading}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        where = f"{Path(folder).resolve()}/out"
        for ranks in map(int, args.ranks.split(",")):
            for kind in args.only.split(","):
                each = run(ranks, timeout=3000)(kinds[kind])
                for times in each(args.rounds, args.mib, args.width, where)[0]:
                    found |= compare.ratios(times)
                    for k, v in found.items():
                        print(f"{k:50} {v['ratio']:.3f} {v['seconds']:.3f}", flush=True)
    title = f"Saving and loading {args.mib} MiB of weights and AdamW, local disk"
    name = "save" if args.ranks == "1" else f"save_{args.ranks.replace(',', '_')}"
    name += f"_{args.mib}" if args.mib != 840 else ""
    compare.write(name, title, GOALS, found, unit="ms", per=1e3, rounds=args.rounds)


if __name__ == "__main__":
    main()
