"""How long ranks take to start, meet once and end: `python benchmarks/launch.py`.

Wall times of whole processes, from the command line to the exit code. The launchers
take turns within a round, so that a slow minute of the machine hits all of them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import compare

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
MEET = """
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
dist.destroy_process_group()
"""
FAIL = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    os._exit(1)
dist.barrier()
dist.destroy_process_group()
"""
RANKS = (1, 2, 4, 8)
GOALS = {
    "2 ranks: accelx.spawn": "at most 0.45",
    "8 ranks: accelx.spawn": "at most 0.30",
    "import torch, accelx": "at most 1.02",
    "accelx.spawn --help": "under 0.2 s",
}


def launchers(ranks, script):
    """The same script under each launcher."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    commands = {
        f"{ranks} ranks: torchrun": [PYTHON, *torchrun, script],
        f"{ranks} ranks: accelx.spawn": [
            PYTHON,
            "-m",
            "accelx.spawn",
            "-n",
            str(ranks),
            script,
        ],
    }
    if find_spec("accelerate") and ranks > 1:  # of one it refuses --multi_gpu
        words = ["--multi_gpu", f"--num_processes={ranks}", "--num_machines=1"]
        words += ["--mixed_precision=no", "--dynamo_backend=no", script]
        name = f"{ranks} ranks: accelerate {version('accelerate')}"
        commands[name] = [PYTHON, "-m", "accelerate.commands.launch", *words]
    if find_spec("lightning_fabric"):
        words = ["--accelerator=cpu", f"--devices={ranks}", script]
        name = f"{ranks} ranks: fabric {version('lightning-fabric')}"
        commands[name] = [PYTHON, "-m", "lightning_fabric.cli", *words]
    return commands


def restarts(script):
    """A rank that fails at once, and a second attempt that ends well.

    torchrun has the setting without which a second attempt may meet ranks of the first.
    """
    cure = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ours = ["-m", "accelx.spawn", "-n", "2", "--restarts", "1", script]
    return {
        "a restart: torchrun": [
            "env",
            cure,
            PYTHON,
            *torchrun,
            "--max-restarts=1",
            script,
        ],
        "a restart: accelx.spawn": [PYTHON, *ours],
    }


def groups(script, failing):
    """Commands to compare; the first of each group is what the others are held to."""
    return [
        *(launchers(ranks, script) for ranks in RANKS),
        restarts(failing),
        {
            "import torch": [PYTHON, "-c", "import torch"],
            "import torch, accelx": [PYTHON, "-c", "import torch, accelx"],
        },
        {
            "python -c pass": [PYTHON, "-c", "pass"],
            "accelx.spawn --help": [PYTHON, "-m", "accelx.spawn", "--help"],
        },
    ]


def run(command):
    """One start; one that fails stops the benchmark."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def main():
    """Measure every group, write the figures and their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        script, failing = Path(folder) / "meet.py", Path(folder) / "fail.py"
        script.write_text(MEET)
        failing.write_text(FAIL)
        for commands in groups(str(script), str(failing)):
            runs = {
                name: lambda words=words: run(words) for name, words in commands.items()
            }
            found |= compare.ratios(compare.interleaved(runs, rounds))
    title = "Start, one barrier, and end"
    compare.write("launch", title, GOALS, found, unit="ms", per=1e3, rounds=rounds)


if __name__ == "__main__":
    main()
