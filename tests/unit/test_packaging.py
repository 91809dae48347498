"""The pins that the scripts install fit the ranges that the package declares."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.source import ROOT, imports

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(file):
    """name -> version of a requirements file and of those it includes."""
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r ").strip())
        elif line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


def declared(*extras):
    """The requirements of the package and of some extras, extras of extras included."""
    todo = [*PROJECT["dependencies"], *(line for e in extras for line in EXTRAS[e])]
    for line in todo:
        requirement = Requirement(line)
        if requirement.name == "accelx":
            yield from declared(*requirement.extras)
        else:
            yield requirement


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("requirements.txt", []),
        ("requirements-test.txt", ["test"]),
        ("requirements-check.txt", ["check"]),
    ],
)
def test_pins_are_within_the_declared_ranges(file, extras):
    """Every declared requirement is pinned, to a version that it allows."""
    pinned = pins(file)
    for requirement in declared(*extras):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{file} does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{file}: {requirement}"


def test_the_test_extra_is_what_the_tests_import():
    """Whoever installs accelx[test] can run every test and every example."""
    files = [p for f in ("tests", "examples") for p in (ROOT / f).rglob("*.py")]
    names = {
        name.partition(".")[0]
        for path in files
        for _, name in imports(ast.parse(path.read_text()), path.name)
    }
    installed = {canonicalize_name(r.name).replace("-", "_") for r in declared("test")}
    installed |= {"torch_xla"}  # of tests that are skipped without it
    installed |= {"sklearn"} if "scikit_learn" in installed else set()
    installed |= {"yaml"} if "pyyaml" in installed else set()
    here = {"accelx", "tests", *(path.stem for path in files)}
    here |= {"ray", "sagemaker"}  # of a cluster; what needs them is skipped without
    assert not names - {*sys.stdlib_module_names, *installed, *here}


def test_every_extra_of_the_design_is_there():
    """Each optional backend, store and sink has an extra of its own."""
    wanted = "deepspeed xla tpu s3 gcs quant trackers test docs bench"
    assert set(wanted.split()) <= set(EXTRAS)


def test_no_package_index_is_named():
    """Where packages come from is the machine's setting, not the repository's."""
    files = [*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml"]
    scripts = ("_env", "_env-xla", "demo", "test", "test-xla", "check")
    files += [ROOT / "scripts" / name for name in scripts]
    for path in files:
        assert not re.search(r"https?://|index-url|find-links", path.read_text()), path


def test_xla_is_pinned_with_its_own_torch_and_else_as_everywhere():
    """scripts/test-xla installs the extra, and all else as the other scripts do."""
    found, usual = pins("requirements-xla.txt"), pins("requirements-check.txt")
    for requirement in declared("xla"):
        version = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    other = {n for n in found.keys() & usual.keys() if found[n] != usual[n]}
    assert other == {"torch"}


@pytest.mark.parametrize(
    "script",
    ["scripts/demo", "scripts/test", "scripts/test-xla", "scripts/check", ".ci/run"],
)
def test_a_script_is_executable_and_parses(script):
    """A script can be started by its name, and is valid shell."""
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_two_halves_of_the_suite_are_all_of_it():
    """`scripts/test` without a word runs each folder of tests once."""
    spec = importlib.util.spec_from_file_location("halves", ROOT / "scripts/_halves.py")
    halves = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(halves)
    parts = [*halves.FIRST, *halves.SECOND]
    ranks = [f"tests/multi/{p.name}" for p in (ROOT / "tests/multi").glob("test_*.py")]
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    paths = [p for p in tool["pytest"]["ini_options"]["testpaths"] if "multi" not in p]
    assert sorted(parts) == sorted([*paths, *ranks])
