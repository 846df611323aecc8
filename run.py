#!/usr/bin/env python3
"""Make an environment for hespotex in `.venv` and run something in it.

    python3 run.py demo        install, then run `hespotex demo`
    python3 run.py test        install with everything optional, then run the tests
    python3 run.py lint        ruff check and format check, and mypy
    python3 run.py docs        build the documentation, warnings are errors
    python3 run.py install     install and stop
    python3 run.py <command>   any other command of the `hespotex` program, in the folder it is called from

Needs Python 3.11 or newer and nothing else. Packages come through uv, and through pip where uv cannot be
had. Set HESPOTEX_VENV to put the environment elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("HESPOTEX_VENV", ROOT / ".venv")).absolute()
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
RECORD = VENV / "hespotex-install.json"

CPU_TORCH = "https://download.pytorch.org/whl/cpu"

# What each command needs: (extras, dependency groups).
NEEDS = {
    "test": (("all",), ("test",)),
    "lint": ((), ("test", "typecheck")),
    "docs": ((), ("doc",)),
}


def main(arguments: list[str]) -> int:
    """Install what the command needs, run it, return its exit code."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__)
        return 0
    if sys.version_info < (3, 11):  # noqa: UP036  this file meets any Python
        print(f"hespotex needs Python 3.11 or newer; this is {sys.version.split()[0]}", file=sys.stderr)
        return 1
    command, *rest = arguments
    try:
        install(*NEEDS.get(command, ((), ())))
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    where = ROOT if command in NEEDS else Path.cwd()  # paths given to the program are the caller's
    codes = [run(step, check=False, cwd=where) for step in steps(command, rest)]
    return next((exit_code(code) for code in codes if code), 0)


def steps(command: str, rest: list[str]) -> list[list[str]]:
    """The programs that `command` stands for."""
    python = str(PYTHON)
    if command == "test":
        workers = min(os.cpu_count() or 1, 4)  # each worker holds about a gigabyte
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):  # numba sets torch's number of threads, too
            os.environ.setdefault(name, "1")
        return [[python, "-m", "pytest", "-n", str(workers), *rest]]
    if command == "lint":
        ruff = [python, "-m", "ruff"]
        return [[*ruff, "check", *rest], [*ruff, "format", "--check"], [python, "-m", "mypy"]]
    if command == "docs":
        return [[python, "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html", *rest]]
    if command == "install":
        return []
    return [[python, "-m", "hespotex", command, *rest]]


class InstallError(RuntimeError):
    """The environment could not be made."""


def install(extras: tuple[str, ...], groups: tuple[str, ...]) -> None:
    """Install the package, its `extras` and dependency `groups` unless an earlier call did."""
    digest = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")))
    done = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if done.get("digest") != digest.hexdigest():
        done = {"digest": digest.hexdigest(), "extras": [], "groups": []}
    elif set(extras) <= set(done["extras"]) and set(groups) <= set(done["groups"]):
        return
    done["extras"] = sorted({*done["extras"], *extras})
    done["groups"] = sorted({*done["groups"], *groups})

    uv = shutil.which("uv")
    if not PYTHON.exists():
        say(f"making an environment in {VENV}")
        make_venv(uv)
    uv = uv or install_uv()
    package = ".[" + ",".join(done["extras"]) + "]" if done["extras"] else "."
    wanted = ["-c", "constraints.txt", "-e", package]
    wanted += [word for group in done["groups"] for word in ("--group", group)]
    cpu = wants_cpu_torch()
    say("installing hespotex and what it needs (about 2 GB, some minutes the first time)")
    done_by_uv = False
    if uv is not None:
        backend = ["--torch-backend", "cpu"] if cpu else []
        command = [uv, "pip", "install", "--python", str(PYTHON), *backend, *wanted]
        done_by_uv = run(command, check=False, env=uv_environment()) == 0
    if not done_by_uv:
        pip = [str(PYTHON), "-m", "pip", "install"]
        run([*pip, "--upgrade", "pip>=25.1"])  # the first that knows --group
        run([*pip, *(["--extra-index-url", CPU_TORCH] if cpu else []), *wanted])
    RECORD.write_text(json.dumps(done, indent=1))


def make_venv(uv: str | None) -> None:
    """An empty environment of this Python."""
    if uv is not None:
        run([uv, "venv", "--seed", "--python", sys.executable, str(VENV)], env=uv_environment())
    elif run([sys.executable, "-m", "venv", str(VENV)], check=False) != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        raise InstallError(
            "This Python cannot make an environment. On Debian and Ubuntu: apt install python3-venv. "
            "Or install uv (https://docs.astral.sh/uv), which needs no such package."
        )


def install_uv() -> str | None:
    """Path of a uv inside the environment; it installs ten times faster than pip. None where there is none."""
    uv = BIN / ("uv.exe" if os.name == "nt" else "uv")
    if not uv.exists():
        run([str(PYTHON), "-m", "pip", "install", "--quiet", "uv"], check=False)
    return str(uv) if uv.exists() else None


def uv_environment() -> dict[str, str]:
    """The environment, with pip's words for package sources said again in uv's, which does not read them."""
    same = {"PIP_FIND_LINKS": "UV_FIND_LINKS", "PIP_INDEX_URL": "UV_DEFAULT_INDEX", "PIP_EXTRA_INDEX_URL": "UV_INDEX"}
    environment = dict(os.environ)
    for pip, uv in same.items():
        if pip in environment:
            environment.setdefault(uv, environment[pip])
    return environment


def wants_cpu_torch() -> bool:
    """Whether torch should come from its index of CPU builds.

    Only Linux needs it: there the common index carries CUDA builds, 4 GB of no use without an NVIDIA GPU.
    """
    if sys.platform != "linux" or has_nvidia_gpu() or os.environ.get("PIP_FIND_LINKS"):
        return False
    try:
        with urllib.request.urlopen(f"{CPU_TORCH}/torch/", timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        say(f"{CPU_TORCH} cannot be reached: torch comes from the common index")
        return False


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver answers."""
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True, check=False).returncode == 0


def exit_code(code: int) -> int:
    """The exit code of a step, with that of the shell where a signal killed it."""
    return 128 - code if code < 0 else code


def run(command: list[str], *, check: bool = True, env: dict[str, str] | None = None, cwd: Path = ROOT) -> int:
    """Run a program, in the repository unless `cwd` is given, and return its exit code."""
    code = subprocess.run(command, cwd=cwd, env=env, check=False).returncode
    if check and code != 0:
        raise InstallError(f"failed with exit code {code}: {' '.join(command)}")
    return code


def say(text: str) -> None:
    """One line to the person who waits."""
    print(f"run.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
