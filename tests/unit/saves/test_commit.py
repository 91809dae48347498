"""Which folders are checkpoints: by their commits, whole or not at all."""

import attrs
import pytest
from hypothesis import given, strategies as st

import accelx as ax
from accelx.errors import CheckpointError, DamagedError
from accelx.saves.commit import (
    COMMIT,
    VERSION,
    Commit,
    folder_name,
    found,
    read_commit,
    resolve,
    write_commit,
)
from accelx.saves.strict import digest, dumps, loads

ONE = Commit(7, 9, 1.5, 4, 100, 3, 50, "0" * 32, {"loss": 0.25})
NUMBERS = st.integers(0, 2**53)


@given(
    st.builds(
        Commit,
        *[NUMBERS] * 2,
        st.floats(0, 1e12),
        *[NUMBERS] * 4,
        st.just("a" * 32),
        st.dictionaries(st.text(max_size=5), st.floats(-9, 9), max_size=3),
    )
)
def test_a_commit_comes_back(commit):
    """All its numbers and metrics."""
    assert read_commit(write_commit(commit), "a test") == commit


def test_any_changed_byte_makes_it_none():
    """Each byte in turn, and each end cut off: it carries its own digest."""
    data = write_commit(ONE)
    for at in range(len(data)):
        other = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        for wrong in (other, data[:at]):
            with pytest.raises(DamagedError, match="a test"):
                read_commit(wrong, "a test")


def test_a_newer_format_says_what_to_install():
    """It is no damage: another accelx reads it."""
    raw = loads(write_commit(ONE), "a test")
    del raw["check"]
    raw["accelx"] = VERSION + 1
    data = dumps({**raw, "check": digest(dumps(raw))})
    with pytest.raises(CheckpointError, match="install a newer accelx") as error:
        read_commit(data, "a test")
    assert not isinstance(error.value, DamagedError)


def folders(root, *steps):
    """A folder for each step, with a commit; their names."""
    names = []
    for time, step in enumerate(steps):
        names.append(folder_name(step))
        (root / names[-1]).mkdir()
        commit = attrs.evolve(ONE, step=step, time=float(time))
        (root / names[-1] / COMMIT).write_bytes(write_commit(commit))
    return names


def test_a_listing_is_by_step_and_then_by_time(tmp_path):
    """Steps are numbers; strangers are passed over; half a commit is none."""
    names = folders(tmp_path, 100, 9, 10, 9)
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-0000000011-0123abcd").mkdir()
    (tmp_path / names[2] / COMMIT).write_bytes(write_commit(ONE)[:40])
    listing = found(str(tmp_path))
    assert [one.step for one in listing] == [9, 9, 10, 11, 100]
    assert [one.name for one in listing][:2] == [names[1], names[3]]
    assert [one.commit is None for one in listing] == [False, False, True, True, False]
    assert listing[3].why == "it has no commit"
    assert "JSON" in listing[2].why
    assert found(str(tmp_path / "nowhere")) == []


def test_the_latest_has_all_its_files(tmp_path):
    """A commit whose manifest is missing is passed over, and said to be."""
    folders(tmp_path, 3)
    assert ax.latest(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match=r"none that is whole.*missing=\"fresh\""):
        resolve(str(tmp_path))
    empty = tmp_path / folder_name(4)
    empty.mkdir()
    with pytest.raises(DamagedError, match="it has no commit"):
        resolve(str(empty))


def test_two_saves_of_one_step_do_not_meet():
    """Folder names of one step differ, so that neither writes into the other."""
    assert len({folder_name(5) for _ in range(50)}) == 50
