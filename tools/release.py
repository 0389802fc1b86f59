"""Builds the wheel of the commit, checks it, and runs the demo from it in a bare environment: ``make release``.

Leaves the wheel in dist/; publishes nothing.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
SHIPPED = ("flexctl/", "templates/")


def run(*command: str | Path, folder: Path = ROOT) -> bytes:
    """Return what a command says; a command that fails ends the release."""
    sys.stderr.write(f"$ {' '.join(map(str, command))}\n")
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE).stdout


def build(folder: Path) -> Path:
    """Return the wheel of the commit, made of what is committed and nothing else."""
    if run("git", "status", "--porcelain"):
        raise SystemExit("there are changes that are not committed")
    with tarfile.open(fileobj=io.BytesIO(run("git", "archive", "HEAD"))) as archive:
        archive.extractall(folder, filter="data")
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", DIST, folder)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def check(wheel: Path, source: Path) -> None:
    """Refuse a wheel that lacks a file of the package or the templates, or has anything else."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    expected = {name.replace("templates/", "flexctl/templates/", 1) for name in files if name.startswith(SHIPPED)}
    if inside != expected:
        raise SystemExit(f"{wheel.name}: missing {sorted(expected - inside)}, extra {sorted(inside - expected)}")


def try_out(wheel: Path, folder: Path) -> None:
    """Install the wheel where nothing else is, and go through an expert's life with it."""
    venv.create(folder / "bare", with_pip=True)
    programs = folder / "bare" / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    for line in ("--version", "demo", "list", "verify merged --absent licenses"):
        place = folder if line in ("--version", "demo") else folder / "demo"
        sys.stdout.buffer.write(run(programs / "flexctl", *line.split(), folder=place))


def main() -> None:
    """Build, check, try out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder / "source")
        check(wheel, folder / "source")
        try_out(wheel, folder)
    sys.stdout.write(f"{wheel.relative_to(ROOT)} is ready\n")


if __name__ == "__main__":
    main()
