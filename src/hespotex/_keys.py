"""Every name under which hespotex stores something.

No other module spells a key out, so a rename is one edit. ``sanitize`` turns any text into a legal
SpatialData key, and ``check_key`` refuses one of the user's that is not.
"""

from __future__ import annotations

import re
from typing import Final

from .errors import DataTypeError, DataValueError


class Keys:
    """Default keys of the storage contract."""

    NAMESPACE: Final = "hespotex"  # uns["hespotex"], sdata.attrs["hespotex"]
    STAIN: Final = "stain"  # attrs["hespotex"]["stain"]: how images were normalised
    QC: Final = "qc"  # beginning of columns, and key of the record
    TABLE_ROLE: Final = "table"  # uns["hespotex"]["table"] of a table of our making: what it is for

    # coordinate systems
    MICRONS: Final = "microns"
    RASTER: Final = "_raster"  # after the name of a table: the image of its prediction

    # elements
    IMAGE: Final = "image"
    WSI: Final = "wsi"  # the slide of a WSIData, whose pixels are not among its images; wsidata's own name for it
    SPOTS: Final = "spots"
    BINS: Final = "bins"  # of Visium HD
    CELLS: Final = "cell_boundaries"  # Xenium's names, which sopa and spatialdata-io keep
    XENIUM_NUCLEI: Final = "nucleus_boundaries"
    TABLE: Final = "table"
    TISSUE: Final = "tissue"
    TISSUE_MASK_SUFFIX: Final = "_tissue"  # squidpy: labels["<image>_tissue"]
    TISSUE_LAZYSLIDE: Final = "tissues"
    NORMALIZED_SUFFIX: Final = "_normalized"  # squidpy: images["<image>_normalized"]
    TILES: Final = "tiles"
    SUPERPIXELS: Final = "superpixels"
    DENSE_SPOTS: Final = "dense_spots"
    NUCLEI: Final = "nuclei"
    NUCLEI_LABELS: Final = "nuclei_labels"
    NUCLEI_TABLE: Final = "nuclei_features"

    # columns
    REGION: Final = "region"
    INSTANCE: Final = "spot_id"
    TILE_ID: Final = "tile_id"
    PART_ID: Final = "part_id"
    SUPERPIXEL_ID: Final = "superpixel_id"
    GRID_ROW: Final = "row"  # of a superpixel on its grid
    GRID_COL: Final = "col"
    SIZE_UM: Final = "size_um"
    POSITION_ID: Final = "position_id"  # of a measured or unmeasured spot of a denser lattice
    NUCLEUS_ID: Final = "nucleus_id"
    LABEL: Final = "label"  # of a nucleus in the label image, where its id is no number
    CLASSIFICATION: Final = "classification"  # of a nucleus, by who outlined it
    ARRAY_ROW: Final = "array_row"
    ARRAY_COL: Final = "array_col"
    PATIENT: Final = "patient"
    IN_TISSUE: Final = "in_tissue"
    N_NUCLEI: Final = "n_nuclei"
    N_NUCLEI_WINDOW: Final = "n_nuclei_window"
    TARGET: Final = "hespotex_target"

    # arrays
    COLOUR: Final = "X_rgb"
    MORPHOMETRICS: Final = "X_morphometrics"
    SPATIAL: Final = "spatial"
    CONNECTIVITIES: Final = "spatial_connectivities"
    DISTANCES: Final = "spatial_distances"
    MEASURED: Final = "measured"

    @staticmethod
    def embedding(encoder: str) -> str:
        """``obsm`` key of an embedding."""
        return f"X_{sanitize(encoder)}"

    @staticmethod
    def embedding_table(encoder: str, shapes_key: str) -> str:
        """Table that holds an embedding of shapes that have no table of their own."""
        return f"{sanitize(encoder)}_{sanitize(shapes_key)}"

    @staticmethod
    def nuclei_table(shapes_key: str) -> str:
        """Table of what is known of each nucleus."""
        return Keys.NUCLEI_TABLE if shapes_key == Keys.NUCLEI else Keys.derived(shapes_key, "features")

    @staticmethod
    def padded(encoder: str) -> str:
        """``obs`` flag of observations whose tile reached beyond the image."""
        return f"{sanitize(encoder)}_padded"

    @staticmethod
    def prediction_table(key: str, shapes_key: str) -> str:
        """Table of a prediction for shapes that carry no measurement."""
        return f"{sanitize(key)}_{sanitize(shapes_key)}"

    @staticmethod
    def derived(key: str, what: str) -> str:
        """Companion of a prediction: ``std``, ``lower``, ``upper``, ``samples``, ``ood``, ``fold``, or a score."""
        return f"{key}_{what}"


def check_key(key: str, argument: str = "key_added") -> None:
    """Raise unless SpatialData can write something named `key`, which it would say no sooner than on writing.

    Raises
    ------
    DataTypeError, DataValueError
        Naming the rule and a key like it that is legal.
    """
    if not isinstance(key, str):
        raise DataTypeError(f"{argument} must be a string, got {type(key).__name__}")
    if not re.fullmatch(r"[\w.-]+", key) or key.startswith("__") or key in {".", "..", "_index"}:
        raise DataValueError(
            f"{argument}={key!r} cannot be stored: a key holds letters, digits and _ . - only and does not begin with "
            f"__; take {sanitize(key)!r}, for instance"
        )


def sanitize(text: str) -> str:
    """Turn `text` into a legal SpatialData key: letters, digits, ``_ . -``, no leading ``__``."""
    key = re.sub(r"[^\w.-]+", "_", text, flags=re.UNICODE).strip("_")
    return key if key.strip(".") else "unnamed"
