"""Stand-ins for the CUDA libraries that torch links to: python cuda_stubs.py DIR

DIR is the site-packages folder that torch was installed into without its dependencies.
The wheel of PyPI loads only where libcublas and the like are found, 6 GB of them; on a
machine without a GPU nothing ever calls one. Each stand-in has the versioned symbols
that torch's own libraries ask of it, and every one of them returns 1, an error. The
CUDA runtime is called, and is not replaced: install nvidia-cuda-runtime-cu12.
Needs gcc and readelf. Takes torch's metadata as it is, less what is replaced here.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

CUDA = re.compile(r"lib(cu|nccl|nv)\w*\.so\.\d+")
REAL = {"libcudart.so.12", "libcuda.so.1"}  # the runtime's own; the driver's


Wanted = dict[str, dict[str, set[str]]]  # library -> version -> symbols


def asked(library: Path) -> Wanted:
    """The CUDA libraries that `library` links to, and what it wants of each."""
    found: Wanted = {
        name: {}
        for name in re.findall(r"NEEDED.*\[(.*)\]", _readelf("-d", library))
        if CUDA.fullmatch(name) and name not in REAL
    }
    homes, name = dict[str, str](), ""
    for line in _readelf("--version-info", library).splitlines():
        if " File: " in line:
            name = line.split(" File: ")[1].split()[0]
        elif " Name: " in line and name in found:
            homes[line.split(" Name: ")[1].split()[0]] = name
    symbols = _readelf("--dyn-syms", library)
    for symbol, version in re.findall(r" UND (\w+)(?:@(\S+))?", symbols):
        home = homes.get(version) if version else _named(symbol, found)
        if home:
            found[home].setdefault(version, set()).add(symbol)
    return found


def _named(symbol: str, libraries: Wanted) -> str | None:
    """The library that a symbol without a version is called after: libcufile, say."""
    fits = [
        n for n in libraries if symbol.lower().startswith(n[3:].split(".")[0].lower())
    ]
    return max(fits, key=len, default=None)


def build(name: str, versions: dict[str, set[str]], folder: Path) -> None:
    """Compile a library called `name` with those symbols into `folder`."""
    symbols = sorted(set[str]().union(*versions.values()))
    lines = [f"int {symbol}(void) {{ return 1; }}" for symbol in symbols]
    named = {v: sorted(s) for v, s in versions.items() if v}
    nodes = [f"{v} {{ {'; '.join(s)}; }};" for v, s in named.items()]
    with tempfile.TemporaryDirectory() as made:
        source, script = Path(made, "stub.c"), Path(made, "stub.map")
        source.write_text("\n".join([*lines, "static int nothing;"]))
        script.write_text("\n".join(nodes))
        options = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}"]
        options += [f"-Wl,--version-script={script}"] if nodes else []
        subprocess.run(["gcc", *options, "-o", folder / name, source], check=True)


def main(site: Path) -> None:
    """Put a stand-in beside torch's libraries for each that they ask for."""
    folder = site / "torch" / "lib"
    wanted: Wanted = {}
    for library in sorted(folder.glob("libtorch*.so")):
        for name, versions in asked(library).items():
            ours = wanted.setdefault(name, {})
            for version, symbols in versions.items():
                ours[version] = ours.get(version, set()) | symbols
    for name, versions in wanted.items():
        build(name, versions, folder)
    for said in site.glob("torch-*.dist-info/METADATA"):
        # or the next install would fetch them after all
        text = said.read_text()
        said.write_text(re.sub(r"(?m)^Requires-Dist: (nvidia|triton).*\n", "", text))


def _readelf(option: str, library: Path) -> str:
    command = ["readelf", "--wide", option, library]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
