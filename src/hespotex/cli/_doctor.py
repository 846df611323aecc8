"""What is installed here, what runs on it, and what is missing; nothing is downloaded."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from .._settings import settings
from .._version import __version__
from ..errors import DataValueError

__all__ = ["Finding", "examine"]

_NAME = "hespotex"
_ESSENTIAL = ("torch", "spatialdata")  # imported to see whether they can be; the others would take a minute
_GB = 1e9


@dataclass
class Finding:
    """A part of the report.

    Parameters
    ----------
    title
        What it is about.
    lines
        What there is.
    problems
        What keeps hespotex from working, with the remedy.
    """

    title: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def examine() -> Iterator[Finding]:
    """The parts of the report, one by one."""
    yield _packages()
    yield _extras()
    yield _device()
    yield _disk()
    yield _weights()
    yield _nuclei()
    yield Finding("Settings", repr(settings).splitlines())


def _packages() -> Finding:
    finding = Finding("Packages")
    finding.lines.append(f"hespotex {__version__}, Python {platform.python_version()}, {platform.platform()}")
    found = []
    for requirement in _requirements():
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        wrong, there = _missing(requirement)
        found.append(there)
        if wrong:
            finding.problems.append(f"{wrong}; pip install -U '{requirement}'")
    finding.lines.append(", ".join(sorted(filter(None, found), key=str.lower)))
    for name in _ESSENTIAL:
        try:
            import_module(name)
        except Exception as error:  # noqa: BLE001  a broken package may raise anything
            finding.problems.append(f"{name} cannot be imported ({type(error).__name__}: {error}); install it again")
    return finding


def _extras() -> Finding:
    finding = Finding("Extras")
    for extra in metadata(_NAME).get_all("Provides-Extra") or []:
        if extra == "all":
            continue
        wanted = [r for r in _requirements() if r.marker is not None and r.marker.evaluate({"extra": extra})]
        checked = [_missing(requirement) for requirement in wanted]
        there = ", ".join(name for wrong, name in checked if not wrong)
        wrong = "; ".join(wrong for wrong, _ in checked if wrong)
        remedy = f"{wrong}: pip install 'hespotex[{extra}]'" if wrong else ""
        finding.lines.append(f"{extra}: {'; '.join(filter(None, (there, remedy)))}")
    return finding


def _requirements() -> list[Any]:
    """What the installed package declares, those of extras with their marker."""
    from packaging.requirements import Requirement

    return [Requirement(text) for text in requires(_NAME) or []]


def _missing(requirement: Any) -> tuple[str, str]:
    """What is wrong with the installed version, if anything, and name and version."""
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed", ""
    if not requirement.specifier.contains(installed, prereleases=True):
        return f"{requirement.name} {installed} is not {requirement.specifier}", f"{requirement.name} {installed}"
    return "", f"{requirement.name} {installed}"


def _device() -> Finding:
    from .._device import resolve_device
    from ..data.blockwise import available_bytes

    finding = Finding("Device")
    free = available_bytes()
    memory = "" if free is None else f", {free / _GB:.1f} GB of memory free"
    try:
        import torch

        device = resolve_device()
    except ImportError:
        return finding  # said above
    except DataValueError as error:
        finding.problems.append(f"settings: {error}")
        return finding
    finding.lines.append(f"{device.type} is used ({settings.device!r} is set)")
    finding.lines.append(f"CPU: {settings.n_jobs} cores, torch on {torch.get_num_threads()} threads{memory}")
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            there, total = torch.cuda.mem_get_info(number)
            finding.lines.append(
                f"cuda:{number}: {torch.cuda.get_device_name(number)}, {there / _GB:.1f} of {total / _GB:.1f} GB free"
            )
    finding.lines.append(f"bf16: {'fast' if _has_bf16(torch, device) else 'not in hardware, slow'}")
    return finding


def _has_bf16(torch: Any, device: Any) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = {"amx_bf16", "avx512_bf16", "bf16"}  # as Linux names them on Intel and AMD, and on ARM
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has it
        return device.type == "mps"
    return any(flags & set(line.split()) for line in lines if line.startswith(("flags", "Features")))


def _disk() -> Finding:
    finding = Finding("Cache")
    folder = settings.cache_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        finding.problems.append(f"cache_dir {folder} cannot be written to ({error}); set HESPOTEX_CACHE_DIR")
        return finding
    finding.lines.append(f"{folder}, {free / _GB:.1f} GB free")
    return finding


def _weights() -> Finding:
    from ..encoders import available

    table = available()
    cached = table["cached"].fillna(False).astype(bool)
    families = table.index.str.contains(":")
    return Finding(
        "Encoders",
        [
            f"ready: {', '.join(table.index[cached & ~families]) or 'none'}",
            f"weights are gated and not here: {', '.join(table.index[~cached & table['gated'].astype(bool)]) or 'none'}",
            f"weights are free and not here: {', '.join(table.index[~cached & ~table['gated'].astype(bool) & ~families]) or 'none'}",
        ],
    )


def _nuclei() -> Finding:
    """Weights of the networks that find nuclei, where their packages keep them."""
    from ..errors import MissingWeightsError
    from ..segmentation import cellpose, instanseg

    try:
        found = str(cellpose.find_weights())
    except MissingWeightsError:
        found = "weights are not here"
    lines = ["watershed: needs none", f"cellpose: {found}"]
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        lines.append("instanseg: weights are not here, nor huggingface-hub, which keeps them")
    else:
        file = try_to_load_from_cache(instanseg._HUB_ID, instanseg._HUB_FILE)
        lines.append(f"instanseg: {file if isinstance(file, str) else 'weights are not here'}")
    return Finding("Nuclei", lines)
