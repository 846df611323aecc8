"""Everything hespotex raises on purpose.

One root, :class:`HespotexError`, so that a pipeline can catch all of it; each class is also the
built-in a caller expects (``ValueError``, ``KeyError``, ``TypeError``, ``ImportError``). A message
names the argument, what was found, what is possible and, where a step was skipped, the call that does it.
"""

from __future__ import annotations

__all__ = [
    "AmbiguousKeyError",
    "CheckpointError",
    "CountsError",
    "DataTypeError",
    "DataValueError",
    "DeviceMemoryError",
    "GeometryError",
    "HespotexError",
    "HespotexWarning",
    "ImageFormatError",
    "LeakageError",
    "MissingDependencyError",
    "MissingKeyError",
    "MissingWeightsError",
    "ModelMismatchError",
    "OutputError",
    "ScaleError",
    "WorkerError",
]


class HespotexError(Exception):
    """Root of all errors raised by hespotex."""


class HespotexWarning(UserWarning):
    """Root of all warnings about the user's data."""


class DataValueError(HespotexError, ValueError):
    """A value that cannot be used."""


class DataTypeError(HespotexError, TypeError):
    """An object of the wrong type."""


class MissingKeyError(HespotexError, KeyError):
    """Something that should be stored in the object is not there."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument, which garbles sentences
        return str(self.args[0]) if self.args else ""


class AmbiguousKeyError(MissingKeyError):
    """Several candidates and no choice made."""


class ImageFormatError(DataValueError):
    """An image that is damaged, of an unknown format, or not 8-bit RGB."""


class ScaleError(DataValueError):
    """The physical pixel size is unknown, anisotropic or unfit for what was asked."""


class GeometryError(DataValueError):
    """Elements that do not lie where they should."""


class CountsError(DataValueError):
    """A count matrix that does not hold raw counts."""


class ModelMismatchError(DataValueError):
    """A model and the data given to it do not belong together."""


class LeakageError(DataValueError):
    """A split that would let test data into training."""


class CheckpointError(DataValueError):
    """A saved model that cannot be trusted or read."""


class MissingWeightsError(HespotexError, FileNotFoundError):
    """Pretrained weights that are neither given, cached nor downloadable."""


class MissingDependencyError(HespotexError, ImportError):
    """An optional package that is not installed."""


class OutputError(HespotexError, OSError):
    """A place that results cannot be written to: a full disk, a read-only folder."""


class WorkerError(HespotexError, RuntimeError):
    """Workers of a cluster that died, or a cluster that is gone."""


class DeviceMemoryError(HespotexError, MemoryError):
    """A device whose memory cannot hold the least that has to be computed at once."""
