"""A number for a tensor that no cut changes and any other content does."""

import pytest
import torch
from hypothesis import given, strategies as st

import accelx as ax
from accelx import comm, testing
from accelx.saves.fingerprint import fingerprint, fingerprints
from tests.laws import odd

ENV = ax.Env()
DTYPES = (*odd.REAL, *odd.EIGHT, *odd.INTEGERS, *odd.COMPLEX)
SHAPES = ((7, 3), (1,), (), (0, 2), (2, 2, 2), (6,))


def tensors():
    """One of each dtype and of each shape."""
    torch.manual_seed(0)
    shaped = {f"{s}": torch.randn(s, dtype=torch.float64) for s in SHAPES}
    return {str(d): odd.drawn(d, (5, 3)) for d in DTYPES} | shaped


def taken(env):
    """The digits of the same tensors in slices of dim 0, of dim 1, and whole."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, every = comm.mesh(env), []
    for place in (Shard(0), Shard(1), Replicate()):
        cut = {
            name: distribute_tensor(t, mesh, [place], src_data_rank=None)
            for name, t in tensors().items()
            if t.dim() > getattr(place, "dim", -1)
        }
        every.append(fingerprints(env, cut))
    return [fingerprints(env, tensors()), *every]


@pytest.mark.multi
@pytest.mark.parametrize("world", [2, 3])
def test_no_cut_changes_it(world):
    """Whole on one process, or on every rank, or in slices along either dim."""
    wanted = fingerprints(ENV, tensors())
    for every in testing.run(world)(taken)():
        for found in every:
            assert found == {name: wanted[name] for name in found}
            assert len(found) > len(DTYPES)


def digits(tensor):
    """The digits of one tensor."""
    return fingerprints(ENV, {"x": tensor})["x"][2]


@given(st.sampled_from(DTYPES), st.integers(0, 14), st.integers(1, 14))
def test_one_changed_or_two_swapped_elements_change_it(dtype, at, step):
    """The place of an element counts as much as its bits."""
    torch.manual_seed(0)
    one = odd.drawn(dtype, (5, 3))
    other, width = one.clone(), one.element_size()
    odd.bits(other)[at * width] ^= 1
    assert digits(other) != digits(one)
    assert fingerprint(other) != fingerprint(one)
    swapped, to = one.clone(), (at + step) % 15
    rows = odd.bits(swapped).view(15, width)
    rows[[at, to]] = rows[[to, at]].clone()
    changed = not torch.equal(odd.bits(swapped), odd.bits(one))
    assert (digits(swapped) != digits(one)) == changed


def test_shape_and_dtype_are_told_beside_it():
    """The same bytes under another shape or dtype are another entry."""
    flat = torch.zeros(6)
    found = fingerprints(
        ENV, {"a": flat, "b": flat.view(2, 3), "c": flat.view(torch.int32)}
    )
    assert found["a"][:2] == ("float32", (6,))
    assert len(set(found.values())) == 3


def test_many_blocks_are_one_tensor(monkeypatch):
    """Longer tensors are taken in blocks, which leave the number as it is."""
    monkeypatch.setattr("accelx.saves.fingerprint.BLOCK", 4)
    small = fingerprints(ENV, tensors())
    monkeypatch.undo()
    assert small == fingerprints(ENV, tensors())


def test_a_view_is_what_it_shows():
    """A transposed, a conjugated and a negated view count as their elements do."""
    z = torch.randn(3, 2, dtype=torch.complex64)
    for view in (z.T, z.conj(), z.conj().imag, z[1:]):
        plain = torch.tensor(view.tolist(), dtype=view.dtype)
        assert digits(view) == digits(plain)
        assert fingerprint(view) == fingerprint(plain)
