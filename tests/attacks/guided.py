"""Coverage-guided fuzzing of one reader: ``python -m attacks.guided NAME FOLDER RUNS``, with atheris.

atheris keeps what reaches new code, and changes that further. It ends the process: with 0 after so many runs, with
another code and the input that did it where anything but a ``FlexctlError`` is raised.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flexctl"]):
    from attacks.readers import readers

    from flexctl.errors import FlexctlError


def main(name: str, folder: Path, runs: str) -> None:
    """Fuzz one reader."""
    reader = readers(folder / "readers")[name]
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "valid").write_bytes(reader.valid)

    def once(data: bytes) -> None:
        with suppress(FlexctlError):
            reader(data)

    options = [f"-runs={runs}", "-max_len=20000", "-timeout=10", "-rss_limit_mb=2500", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], str(seeds), *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
