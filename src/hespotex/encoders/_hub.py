"""Where the weights of an encoder lie: a file of the user's, one used before, the hub's cache, or the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .._logging import logger
from .._optional import optional_import
from ..errors import DataValueError, MissingWeightsError
from ._weights import identify, known_as, recall, remember_as

__all__ = [
    "HUB",
    "Described",
    "Weights",
    "cached_file",
    "find_described",
    "find_weights",
    "hub_file",
    "is_cached",
    "missing_weights",
]

HUB = "hf-hub:"
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")  # preferred first: it can hold no code
_PASS = "pass the file: weights='<file>'"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Weights:
    """A weights file, and what identifies it."""

    path: Path
    name: str
    sha256: str
    given_for: str = ""  # name of an encoder that is to find this file without being told again

    def remember(self) -> None:
        """Note the file under the name of the encoder it was given for; to be called when it is known to fit."""
        if self.given_for:
            remember_as(self.given_for, self.path)


@dataclass(frozen=True)
class Described:
    """A model that says itself what it is, by a configuration beside its weights."""

    config: Path
    hub_id: str = ""
    place: Path | None = None  # on this machine: its folder, or the weights file in it


def find_described(family: str, text: str, file: str, revision: str | None) -> Described | None:
    """The model of the hub, or in a folder, that ``"<family>:<text>"`` means; ``None`` if `text` is an architecture.

    `file` is the name of its configuration.

    Raises
    ------
    MissingWeightsError
        If the hub does not give the configuration, or the folder holds none.
    """
    if text.startswith(HUB):
        hub_id = text.removeprefix(HUB)
        instead = f"put it into a folder, the weights beside it, and write '{family}:<folder>'"
        return Described(hub_file(hub_id, (file,), revision, f"{family}:{text}", instead=instead), hub_id)
    place = Path(text).expanduser()
    if not (place.is_file() or place.is_dir()):
        return None
    config = (place.parent if place.is_file() else place) / file
    if not config.is_file():
        raise MissingWeightsError(
            f"{text!r} has no {file} beside it that names its architecture; write '{family}:<architecture>' and pass the "
            f"file: weights={text!r}"
        )
    return Described(config, place=place)


def find_weights(
    encoder: str,
    weights: str | Path | None,
    *,
    files: Sequence[str] = TIMM_FILES,
    hub_id: str = "",
    revision: str | None = None,
    name: str | None = None,
    sha256: str | None = None,
) -> Weights:
    """The weights of an encoder.

    Parameters
    ----------
    encoder
        Name of the encoder.
    weights
        A file, a folder that holds one of `files`, or ``"hf-hub:<owner>/<model>"``. ``None``: a file with `sha256` that
        was used before; else, for encoders with a `hub_id`, the file in the hub's cache, the file given for this encoder
        before, or a download.
    files
        Names on the hub, preferred first.
    hub_id
        ``"owner/model"`` where the encoder's weights are published.
    revision
        Commit, tag or branch of the hub's model.
    name, sha256
        Identity that is expected.

    Raises
    ------
    MissingWeightsError
        If there are none; says how to get them.
    ModelMismatchError
        If they are not those of `sha256`.
    DataValueError
        If the model of the hub cannot be called so.
    """
    if weights is None and sha256 is not None and (path := recall(sha256)) is not None:
        return Weights(path, name or path.name, sha256)
    given = weights is not None
    if weights is None and sha256 is not None and name is not None and name.startswith(HUB):
        weights = name  # it came from there, and its hash will tell
    if weights is None and hub_id:
        # With a hash, the file given before is not the one, or it would have been found by it.
        is_free = sha256 is None and revision is None and cached_file(hub_id, files) is None
        known = known_as(encoder) if is_free else None
        weights = known or f"{HUB}{hub_id}"
        if known:
            logger.info("encoder %r: weights are %s, as given before", encoder, known)
    if weights is None:
        raise missing_weights(encoder, name=name, sha256=sha256)
    if isinstance(weights, str) and weights.startswith(HUB):
        path, digest = identify(hub_file(weights.removeprefix(HUB), files, revision, encoder), expected=sha256)
        return Weights(path, name or weights, digest)
    path = _in_folder(Path(weights).expanduser(), files)
    if not path.exists() and _HUB_ID.fullmatch(str(weights)) and path.suffix not in _SUFFIXES:
        raise MissingWeightsError(
            f"weights={weights!r} is not a file; if a model of the hub is meant: '{HUB}{weights}'"
        )
    path, digest = identify(path, expected=sha256)
    return Weights(path, name or path.name, digest, given_for=encoder if given and hub_id else "")


def _in_folder(path: Path, files: Sequence[str]) -> Path:
    """A file of a downloaded snapshot; a file itself."""
    if not path.is_dir():
        return path
    for file in files:
        if (path / file).is_file():
            return path / file
    raise MissingWeightsError(f"weights={str(path)!r} is a folder that holds none of {list(files)}")


def cached_file(hub_id: str, files: Sequence[str] = TIMM_FILES, revision: str | None = None) -> Path | None:
    """The first of `files` that lies in the hub's cache; the network is not asked.

    Raises
    ------
    DataValueError
        If no model of the hub can be called `hub_id`.
    """
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    for file in files:
        try:
            found = try_to_load_from_cache(hub_id, file, revision=revision)
        except ValueError as error:  # what it raises for names has no class of its own in all versions
            place, _, commit = hub_id.partition("@")
            hint = f"; for one state of it pass revision={commit!r} beside '{HUB}{place}'" if commit else ""
            raise DataValueError(f"'{HUB}{hub_id}' is no model of the hub, '{HUB}<owner>/<model>'{hint}") from error
        if isinstance(found, str):
            return Path(found)
    return None


def is_cached(encoder: str, hub_id: str, files: Sequence[str] = TIMM_FILES) -> bool:
    """Whether `encoder` finds weights without the network."""
    return (bool(hub_id) and cached_file(hub_id, files) is not None) or known_as(encoder) is not None


def hub_file(hub_id: str, files: Sequence[str], revision: str | None, encoder: str, *, instead: str = _PASS) -> Path:
    """The first of `files` that the hub's model holds, from the cache or downloaded.

    `instead` is what to do with a file that was downloaded by hand.

    Raises
    ------
    MissingWeightsError
        If there is none of them, no network, or no access.
    DataValueError
        If no model of the hub can be called `hub_id`.
    """
    feature = f"downloading the encoder {encoder!r}"
    hub = optional_import("huggingface_hub", feature=feature, extra="encoders")
    errors = optional_import("huggingface_hub.errors", feature=feature, extra="encoders")
    if (path := cached_file(hub_id, files, revision)) is not None:
        return path
    for file in files:
        try:
            return Path(hub.hf_hub_download(hub_id, file, revision=revision))
        except errors.LocalEntryNotFoundError as error:
            raise _unavailable(hub_id, files, encoder, error, instead) from error
        except errors.EntryNotFoundError:
            continue
        except (errors.HfHubHTTPError, errors.RevisionResolutionError, OSError, ValueError) as error:
            raise _unavailable(hub_id, files, encoder, error, instead) from error
    raise MissingWeightsError(
        f"encoder {encoder!r}: {hub_id} on the hub holds none of {list(files)}; if you have it, {instead}"
    )


def _unavailable(
    hub_id: str, files: Sequence[str], encoder: str, error: Exception, instead: str
) -> MissingWeightsError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return MissingWeightsError(
        f"encoder {encoder!r}: {' or '.join(files)} could not be taken from the hub ({reason}). "
        f"{how_to_get(hub_id, files, instead)}"
    )


def how_to_get(hub_id: str, files: Sequence[str], instead: str = _PASS) -> str:
    """What to do where the hub does not give a file."""
    return (
        f"Either go online; if access is restricted, accept the terms at https://huggingface.co/{hub_id} and log in with: "
        f"hf auth login. Or download {' or '.join(files)} there by hand and {instead}"
    )


def missing_weights(encoder: str, *, name: str | None = None, sha256: str | None = None) -> MissingWeightsError:
    """The error for an encoder that is published nowhere we know of, and was given no weights."""
    which = f" {name!r} with SHA-256 {sha256}" if sha256 else ""
    return MissingWeightsError(
        f"encoder {encoder!r} needs its weights{which}; pass weights='<file>' or weights='hf-hub:<owner>/<model>', for "
        f"instance hx.pp.embed(sdata, {encoder!r}, weights='model.safetensors')"
    )
