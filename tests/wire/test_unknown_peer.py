"""The specification of the return path is enough for a source that knows nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import SourceFile
from tests.system.remote import kinds
from tests.system.service import PAGE, Service, until, word

PROGRAM = str(Path(__file__).with_name("unknown_source_peer.py"))


def start(path: Path, endpoint: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, PROGRAM, str(path), endpoint], stdout=subprocess.PIPE, text=True)


def test_a_source_written_from_the_specification(runtime_dir: Path, source_file: SourceFile) -> None:
    """Every byte, killed and started again; it learns what is complete."""
    path, endpoint = source_file((1 << 20) + 77), f"ipc://{runtime_dir}/peer"
    source = start(path, endpoint)
    try:
        with Service(runtime_dir, f"ram0={endpoint}/ram0", background_rate="0", source_timeout="1") as service:
            client = service.client()
            assert client.do("words(b, [0, 200])") == [word(0), word(200 * PAGE)]
            source.kill()
            source.communicate()
            source = start(path, endpoint)
            assert client.do(f"check(b, {str(path)!r}, 'random', 65536)", 30) == -1
            assert service.client("ram0", "shared").do(f"check(b, {str(path)!r})", 30) == -1
            until(lambda: service.block()["complete"], "the block is whole")
            assert kinds(service, "source-nonsense", "source-refused", "bug") == []
            assert source.stdout is not None and source.stdout.readline() == "complete\n"
    finally:
        source.kill()
        source.communicate()
        (runtime_dir / "peer").unlink(missing_ok=True)
