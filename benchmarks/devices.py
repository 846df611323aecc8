"""Loss curves and seconds of one process, one that accumulates gradients, and several processes on one machine.

    python benchmarks/devices.py                            # two processes on the CPU
    python benchmarks/devices.py --device cuda --devices 4  # four GPUs
    python benchmarks/devices.py --models bleep --spots 1000  # a quick look

The first column of seconds is a whole call of ``Model.fit``, including the start of the processes; the second is the same
fit with twice the epochs less the first: what as many epochs take once the processes run. Several processes share the
cores that one has for itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
N_FEATURES, N_GENES = 512, 500
# Fits of a given number of epochs, so that twice as many are twice as much work.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "bleep": ("max_epochs", {"stopping": "fixed", "batch": 128}),
    "hespotex": ("epochs", {"stopping": "fixed", "nuclei": "none", "gate_epochs": 1}),
}


def section(number: int, n: int):
    """Spots on a square lattice whose expression follows from their features."""
    from scipy import sparse

    from hespotex.data import Section, Targets

    rng = np.random.default_rng(number)
    side = int(np.ceil(np.sqrt(n)))
    row, column = np.divmod(np.arange(n), side)
    right = np.flatnonzero((column + 1 < side) & (np.arange(n) + 1 < n))
    down = np.flatnonzero(np.arange(n) + side < n)
    start, stop = np.concatenate([right, down]), np.concatenate([right + 1, down + side])
    upper = sparse.coo_array((np.ones(len(start)), (start, stop)), shape=(n, n))
    features = rng.normal(size=(n, N_FEATURES)).astype(np.float32)
    level = np.random.default_rng(100).normal(scale=0.05, size=(N_FEATURES, N_GENES))
    counts = sparse.csr_array(rng.poisson(np.exp(features @ level - 1)))
    xy = np.column_stack([column, row]) * 200.0
    return Section(
        name=f"s{number}",
        ids=np.arange(n).astype(str),
        features=features,
        coordinates=xy,
        edges=sparse.csr_array(upper + upper.T),
        targets=Targets(counts, np.asarray(counts.sum(axis=1)).ravel(), tuple(f"g{i}" for i in range(N_GENES))),
        extras={"pixel": xy / 0.5},
    )


def fitted(name: str, epochs: int, sections, run) -> tuple[Any, float]:
    """The model, and the seconds its fit took."""
    from hespotex.models import create

    key, options = OPTIONS[name]
    model = create(name, **{key: epochs}, **options)
    start = time.perf_counter()
    model.fit(sections, run)
    return model, time.perf_counter() - start


def difference(one, other) -> float:
    """Largest difference of two loss curves, relative to their values."""
    pairs = [
        (mine[key], theirs[key])
        for mine, theirs in zip(one.history, other.history, strict=True)
        for key in mine
        if key != "epoch"
    ]
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--spots", type=int, default=4000, help="per section, of which there are four")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    arguments = parser.parse_args()

    import torch

    from hespotex.models import Run

    common = {"device": arguments.device, "precision": "32-true"}
    runs = {
        "1 process": Run(**common),
        f"1 process, accumulation {arguments.devices}": Run(**common, accumulate_grad_batches=arguments.devices),
        f"{arguments.devices} processes": Run(**common, devices=arguments.devices),
    }
    sections = [section(number, arguments.spots) for number in range(4)]
    rows = []
    for name in arguments.models:
        fitted(name, 1, sections, Run(**common))  # imports and warms up
        found = {}
        for label, run in runs.items():
            model, seconds = fitted(name, arguments.epochs, sections, run)
            longer = fitted(name, 2 * arguments.epochs, sections, run)[1]
            found[label] = model, seconds, longer - seconds
        reference = found[list(runs)[1]][0]
        for label, (model, seconds, more) in found.items():
            curve = difference(reference, model)
            mean = float(np.abs(reference.predict(sections[0]).mean - model.predict(sections[0]).mean).max())
            rows.append(
                {"model": name, "run": label, "seconds": seconds, "epochs": more, "curve": curve, "prediction": mean}
            )
            print(
                f"{name:10} {label:28} {seconds:7.1f} s, {arguments.epochs} epochs {more:7.1f} s, from accumulation: "
                f"curve {curve:.1e}, prediction {mean:.1e}",
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    about = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    settings = {key: value for key, value in vars(arguments).items() if key != "models"}
    result = {**about, **settings, "n_features": N_FEATURES, "n_genes": N_GENES, "rows": rows}
    (RESULTS / "devices.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
