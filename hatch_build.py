"""Compiles the twin of the fault loop: for a wheel, as a build hook of hatchling, or into the source tree.

A wheel is pure unless POSTCOPY_COMPILE=1; then it needs Cython and a C compiler, and is one for this Python and this
machine. ``python hatch_build.py`` compiles beside the source, for a checkout: ``scripts/install`` calls it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import source_hash
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
FOLDER = ROOT / "workers" / "postcopy_workers"
SOURCE, TYPES, TWIN = FOLDER / "fault_loop.py", FOLDER / "fault_loop.pxd", "compiled_fault_loop"
STAND_IN = "from . import cython_stand_in as cython"
DIRECTIVES = (
    "language_level=3",
    "infer_types=True",
    "boundscheck=False",
    "wraparound=False",
    "cdivision=True",
    "annotation_typing=False",
)


class CannotCompile(Exception):
    """Why, in one line."""


def compile_twin(folder: Path) -> Path:
    """Compile the twin into ``folder``; the path of the extension module."""
    target = folder / (TWIN + str(sysconfig.get_config_var("EXT_SUFFIX")))
    with tempfile.TemporaryDirectory(prefix="postcopy-twin-") as name:
        package = Path(name) / FOLDER.name
        package.mkdir()
        (package / "__init__.py").touch()
        text = SOURCE.read_text("utf-8")
        if STAND_IN not in text:
            raise CannotCompile(f"{SOURCE.name} does not import the stand-in of Cython any more")
        text = text.replace(STAND_IN, "import cython") + f'\nHASH_OF_SOURCE = "{_hash()}"\n'
        (package / f"{TWIN}.py").write_text(text, "utf-8")
        (package / f"{TWIN}.pxd").write_bytes(TYPES.read_bytes())
        options = [word for directive in DIRECTIVES for word in ("-X", directive)]
        _run([sys.executable, "-m", "cython", *options, f"{FOLDER.name}/{TWIN}.py"], name)
        include = sysconfig.get_path("include")
        compiler = shlex.split(os.environ.get("CC") or "cc")
        flags = ["-O2", "-fPIC", "-shared", "-fno-semantic-interposition", f"-I{include}"]
        _run([*compiler, *flags, f"{FOLDER.name}/{TWIN}.c", "-o", "twin.so"], name)
        # In one step, so that a process that imports it now has the old one or the new one.
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        fresh.write_bytes((Path(name) / "twin.so").read_bytes())
        fresh.chmod(0o755)
        fresh.replace(target)
    return target


def _hash() -> str:
    """As ``postcopy_workers.twin`` finds it."""
    return source_hash(SOURCE.read_bytes() + TYPES.read_bytes()).hex()


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{command[0]}: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        if _asked_for():
            sys.stderr.write(done.stderr)
        raise CannotCompile(f"{' '.join(command[:3])}: {lines[-1].strip()}")


def _asked_for() -> bool:
    return os.environ.get("POSTCOPY_COMPILE") == "1"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the twin into a wheel if POSTCOPY_COMPILE=1."""

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def dependencies(self) -> list[str]:
        return ["cython>=3.1"] if _asked_for() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or not _asked_for():
            return
        self._folder = tempfile.TemporaryDirectory(prefix="postcopy-twin-")
        twin = compile_twin(Path(self._folder.name))
        build_data["force_include"][str(twin)] = f"{FOLDER.name}/{twin.name}"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def main() -> int:
    try:
        compile_twin(FOLDER)
    except CannotCompile as error:
        print(f"the fault loop is not compiled: {error}; workers run its Python source", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
