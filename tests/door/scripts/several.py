"""Run programs one after the other in the same ranks: several.py 'gan.py 60' ...

Each is announced by a line `== program`. Starting ranks costs more than what they run.
"""

import runpy
import shlex
import sys

import torch

import accelx as ax

env = ax.connect()
for command in sys.argv[1:]:
    path, *words = shlex.split(command)
    sys.argv = [path, *words]
    if env.main:
        print(f"== {path}", flush=True)
    ax.barrier(env)
    runpy.run_path(path, run_name="__main__")
    torch.set_default_dtype(torch.float32)
    sys.stdout.flush()
    ax.barrier(env)
