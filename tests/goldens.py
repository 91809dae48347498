"""Checkpoints of this version, which must load for ever: `python -m tests.goldens`.

Writes tests/golden/accelx-VERSION with what each state was, as digests of its parts. A
version that has been written is never written again: a new format adds a folder.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

import accelx as ax
from accelx import testing
from tests.laws import odd
from tests.laws.test_l5_restore import trained

GOLDEN = Path(__file__).parent / "golden"
CASES = ((1, "plain", "adamw"), (1, "plain", "adafactor"), (2, "fsdp2", "several"))


def spelled(value):
    """A value as text that has its types and every bit, and no word of torch's."""
    if isinstance(value, torch.Tensor):
        data = bytes(odd.bits(value).tolist()).hex()
        return f"{value.dtype}{tuple(value.shape)}{data}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {spelled(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(spelled, value))})"
    return repr(value)


def digests(described):
    """name -> a digest of what was there."""
    return {
        name: hashlib.sha256(spelled(value).encode()).hexdigest()[:16]
        for name, value in described.items()
    }


def write(env, kind, name, folder):
    """Save one case; what it was, by name."""
    torch.set_default_dtype(torch.float64)
    state = trained(env, kind, name)
    ax.save_state(env, folder)(state)
    return digests(odd.described(state))


def main():
    """Write every case of this version."""
    top = GOLDEN / f"accelx-{ax.__version__}"
    if top.exists():
        sys.exit(f"{top} is there, and what is golden stays as it is")
    for world, kind, name in CASES:
        folder = top / f"{world}-{kind}-{name}"
        found = testing.run(world)(write)(kind, name, str(folder))[0]
        (folder / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
