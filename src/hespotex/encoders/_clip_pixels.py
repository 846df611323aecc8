"""How the pixels of open_clip's models are normalised: by a configuration, else by what open_clip lists."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from .._optional import optional_import
from ..errors import CheckpointError, HespotexWarning, MissingWeightsError
from ._hub import hub_file
from ._network import triple
from ._published import OPENAI, Pixels

__all__ = ["CONFIG", "by_name", "of_config"]

CONFIG = "open_clip_config.json"


def of_config(config: Mapping[str, Any]) -> Pixels:
    """The normalisation a configuration states; open_clip's default is that of OpenAI's CLIP."""
    pixels = config.get("preprocess_cfg") or {}
    return triple(pixels.get("mean"), OPENAI[0]), triple(pixels.get("std"), OPENAI[1])


def by_name(encoder: str, architecture: str, hub_id: str, revision: str | None) -> tuple[Pixels, bool]:
    """The normalisation of weights of an architecture, and whether the architecture alone tells that it is CLIP's.

    Parameters
    ----------
    encoder
        Name of the encoder.
    architecture
        Name in open_clip.
    hub_id, revision
        Model of the hub that the weights are of, whose configuration is followed; ``""`` if of none.

    Raises
    ------
    CheckpointError
        If the hub's configuration is none of open_clip.

    Warns
    -----
    HespotexWarning
        If nothing says which of several it is; CLIP's is taken then.
    """
    listed = _listed(architecture)
    on_hub = _on_hub(encoder, hub_id, revision) if hub_id else None
    if on_hub is None and len(listed) > 1:
        ways = "; ".join(f"mean={mean}, std={std} for {', '.join(tags)}" for (mean, std), tags in listed.items())
        warnings.warn(
            f"{encoder}: weights of this architecture are normalised in several ways: {ways}. The first is taken; if "
            f"yours are others, pass mean= and std=",
            HespotexWarning,
            stacklevel=4,
        )
    pixels = on_hub or next(iter(listed), OPENAI)
    return pixels, pixels == OPENAI and not listed.keys() - {OPENAI}


def _on_hub(encoder: str, hub_id: str, revision: str | None) -> Pixels | None:
    """What stands beside weights on the hub; ``None`` if that cannot be had."""
    try:
        return of_config(json.loads(hub_file(hub_id, (CONFIG,), revision, encoder).read_text(encoding="utf-8")))
    except MissingWeightsError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG!r} is no configuration of an open_clip model: {error!r}") from error


def _listed(architecture: str) -> dict[Pixels, list[str]]:
    """Tags of the weights that open_clip lists for an architecture, by their normalisation; CLIP's comes first."""
    open_clip = optional_import("open_clip", feature="encoders of open_clip", extra="encoders")
    listed: dict[Pixels, list[str]] = {}
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        pixels = of_config({"preprocess_cfg": open_clip.get_pretrained_cfg(architecture, tag)})
        listed.setdefault(pixels, []).append(tag)
    return dict(sorted(listed.items(), key=lambda entry: entry[0] != OPENAI))
