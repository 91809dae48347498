"""Where the settings file is, and how it is read."""

from __future__ import annotations

from pathlib import Path

from accelx.errors import SpawnError
from accelx.launch.settings import File

NAME = "accelx.toml"


def read(path: str | None) -> File | None:
    """The file at `path`; without one, `accelx.toml` of this folder if it is there.

    Raises SpawnError for a file that is asked for and missing, or that is no TOML.
    """
    if path is None and not Path(NAME).is_file():
        return None
    import tomllib

    name = path or NAME
    try:
        return File(name, tomllib.loads(Path(name).read_text()))
    except OSError as error:
        raise SpawnError(
            f"--config wants a file of settings, got {name!r} ({error.strerror}); "
            f"write --config {NAME}, or leave it out"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpawnError(
            f"{name} is to be TOML, and is not ({error}); write one setting a line, "
            "such as num_ranks = 2"
        ) from error
