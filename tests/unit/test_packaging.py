"""The wheel, built here without network: it contains the wings, and needs few packages."""

from __future__ import annotations

import email
import email.message
import json
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from postcopy.commands.service_files import ALERTS, DASHBOARD, UNITS, text_of

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WINGS = [Path(package) for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    done = subprocess.run(build, cwd=ROOT, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_what_the_tests_need_is_installed_by_name() -> None:
    """This .venv is complete, so nothing is done; a wrong option is refused."""
    install = ROOT / "scripts" / "install"
    done = subprocess.run([install, "--test"], timeout=300, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    done = subprocess.run([install, "--tests"], timeout=60, capture_output=True, text=True)
    assert done.returncode == 2 and "--test | --no-dev" in done.stderr


def test_the_wheel_is_for_every_machine(wheel: Path) -> None:
    assert wheel.name == f"postcopy-{PROJECT['project']['version']}-py3-none-any.whl"


def test_top_level_names_are_ours(names: set[str]) -> None:
    version = PROJECT["project"]["version"]
    tops = {name.partition("/")[0] for name in names}
    assert tops == {wing.name for wing in WINGS} | {f"postcopy-{version}.dist-info"}
    assert all(top.startswith("postcopy") for top in tops)


def test_every_wing_in_the_checkout_is_packed(names: set[str]) -> None:
    # A wing is a top-level folder with a package of our name; one that is missing in pyproject.toml fails here.
    wings = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/postcopy*/__init__.py")}
    assert wings == set(WINGS)
    for wing in WINGS:
        modules = {
            str(path.relative_to(ROOT / wing.parent))
            for path in (ROOT / wing).rglob("*.py")
            if "__pycache__" not in path.parts
        }
        assert modules <= names


def test_only_source_is_packed(names: set[str]) -> None:
    endings = {Path(name).suffix for name in names if ".dist-info/" not in name}
    assert endings <= {".py", ".pxd", ".typed", ".md", ".html", ".css", ".js", ".service", ".json", ".yaml"}


def test_what_an_operator_installs_is_packed(names: set[str]) -> None:
    """And the commands that print it find it."""
    assert {f"postcopy/service_files/{name}" for name in (*UNITS.values(), DASHBOARD, ALERTS)} <= names
    assert (
        "[Service]" in text_of(UNITS["firecracker"]) and "groups:" in text_of(ALERTS) and json.loads(text_of(DASHBOARD))
    )


def test_every_place_that_lists_the_wings_agrees() -> None:
    folders = [wing.parent.name for wing in WINGS]
    tool = PROJECT["tool"]
    assert tool["hatch"]["build"]["dev-mode-dirs"] == folders
    assert set(folders) <= set(tool["pytest"]["ini_options"]["pythonpath"])
    assert set(folders) <= set(tool["mypy"]["mypy_path"])
    assert set(folders) <= set(tool["mypy"]["files"])
    assert set(folders) <= set(tool["ruff"]["src"])


def test_neither_client_nor_daemon_needs_a_compiler(metadata: email.message.Message) -> None:
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(Requirement(line).name for line in needed) == ["msgpack", "pyzmq", "rich", "typer"]
    prctl = [line for line in metadata.get_all("Requires-Dist", []) if line.startswith("python-prctl")]
    assert prctl
    assert all("extra == 'prctl'" in line for line in prctl), "python-prctl has no wheel"


def needed_by(requirements: list[str]) -> set[str]:
    """Names of the distributions that ``requirements`` install here, with all that these require."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if (one.marker is None or one.marker.evaluate({"extra": ""})) and name not in found:
            found.add(name)
            waiting += [Requirement(line) for line in requires(name) or ()]
    return found


def test_a_client_installs_few_packages(metadata: email.message.Message) -> None:
    """typer 0.29 would bring pydantic; its bound in pyproject.toml and the pinned version keep it out."""
    base = needed_by(metadata.get_all("Requires-Dist", []))
    assert not base & {"pydantic", "pydantic-core", "numpy", "click", "cffi"}
    assert base == {"annotated-doc", "markdown-it-py", "mdurl", "msgpack", "pygments", "pyzmq", "rich", "shellingham",
                    "typer"}  # fmt: skip
    newest = Requirement(next(line for line in PROJECT["project"]["dependencies"] if line.startswith("typer")))
    assert "0.28.0" in newest.specifier and "0.29.0" not in newest.specifier


def test_every_package_is_typed(names: set[str]) -> None:
    assert {f"{wing.name}/py.typed" for wing in WINGS} <= names


def test_licence_and_command(metadata: email.message.Message, wheel: Path) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "postcopy = postcopy.__main__:main" in archive.read(entry).decode()
        (licence,) = (name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_constraints_pin_and_name_no_place() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        name, equals, version = pin.partition("==")
        assert name
        assert equals
        assert version[:1].isdigit()
        assert not set(pin) & set("/:@ ")
