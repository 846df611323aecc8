"""Cost of a HESpotEx epoch and its peak memory, beside one step of the algorithm as originally published.

    python benchmarks/scaling.py                 # 1k, 4k, 16k, 64k spots x 1,000 genes
    python benchmarks/scaling.py --sizes 1000    # a quick look

Every measurement runs in a process of its own, so that peak memory is its own: that of the whole fit. An epoch is timed
between two steps of the optimiser, so that set-up is left out, and counts all members of the ensemble.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

N_GENES, N_FEATURES, LATENT = 1000, 512, 64
RESULTS = Path(__file__).parent / "results"
# Images per second of the published encoder (ViT-B/32) are measured on this many tiles.
ENCODER_TILES = 64


def lattice(n: int) -> tuple[np.ndarray, object]:
    """A square lattice of n spots, 200 µm apart, and its symmetric 4-neighbour graph."""
    from scipy import sparse

    side = int(np.ceil(np.sqrt(n)))
    row, column = np.divmod(np.arange(n), side)
    right = np.flatnonzero((column + 1 < side) & (np.arange(n) + 1 < n))
    down = np.flatnonzero(np.arange(n) + side < n)
    start, stop = np.concatenate([right, down]), np.concatenate([right + 1, down + side])
    upper = sparse.coo_array((np.ones(len(start)), (start, stop)), shape=(n, n))
    return np.column_stack([column, row]) * 200.0, sparse.csr_array(upper + upper.T)


def section(n: int):
    from scipy import sparse

    from hespotex.data import Section, Targets

    rng = np.random.default_rng(0)
    xy, edges = lattice(n)
    features = rng.normal(size=(n, N_FEATURES)).astype(np.float32)
    counts = sparse.random_array(
        (n, N_GENES), density=0.2, format="csr", rng=rng, data_sampler=lambda size: rng.poisson(2, size) + 1
    )
    library = np.asarray(counts.sum(axis=1)).ravel() * 3.0
    return Section(
        name="s",
        ids=np.arange(n).astype(str),
        features=features,
        coordinates=xy,
        edges=edges,
        targets=Targets(counts, library, tuple(f"g{i}" for i in range(N_GENES))),
        extras={"pixel": xy / 0.5, "n_nuclei": rng.poisson(12, n) * 1.0, "n_nuclei_window": rng.poisson(12, n) + 1.0},
    )


def epoch_seconds(one, preset: str, epochs: int, precision: str | None) -> float:
    """Median time of an epoch of the image stream, which takes one optimiser step per section."""
    import torch

    from hespotex.models import Run, create

    # Timed alone: the expression stream and the choice of the number of epochs are stages of their own.
    model = create("hespotex", preset=preset, epochs=epochs, stopping="fixed", gate_epochs=1)
    one = replace(one, targets=one.targets.in_unit(model.config.unit))
    ends: list[float] = []
    step = torch.optim.AdamW.step

    def timed(self, *arguments, **options):
        result = step(self, *arguments, **options)
        ends.append(time.perf_counter())
        return result

    torch.optim.AdamW.step = timed
    try:
        model.fit([one], Run(device="cpu", precision=precision))
    finally:
        torch.optim.AdamW.step = step
    return float(np.median(np.diff(ends)))


def measure(kind: str, n: int) -> dict[str, float]:
    one = section(n)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "original":
        from original import OriginalEpoch

        target = one.targets[:]
        latent = np.random.default_rng(1).normal(size=(n, LATENT)).astype(np.float32)
        epoch = OriginalEpoch(np.asarray(one.features), one.extras["pixel"].astype(int), target, latent)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            epoch.step()
            seconds.append(time.perf_counter() - start)
        seconds = float(np.median(seconds))
    else:
        preset, _, precision = kind.partition(" ")
        epochs = 9 if preset == "default" and n <= 16000 else 4
        seconds = epoch_seconds(one, preset, epochs, precision or None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"kind": kind, "spots": n, "seconds": seconds, "peak_gib": peak / 2**20, "baseline_gib": baseline / 2**20}


def encoder_rate() -> dict[str, float]:
    """Tiles per second of the published image encoder at random weights, as the original runs it in every epoch."""
    import torch

    from hespotex._optional import optional_import

    open_clip = optional_import("open_clip", feature="the encoder's rate", extra="encoders")
    model, _, _ = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained=None)
    model.eval()
    tiles = torch.rand(ENCODER_TILES, 3, 224, 224)
    with torch.inference_mode():
        model.encode_image(tiles[:8])
        start = time.perf_counter()
        model.encode_image(tiles)
    return {"tiles_per_second": ENCODER_TILES / (time.perf_counter() - start)}


def run_apart(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000, 64000])
    parser.add_argument("--original-sizes", type=int, nargs="*", default=[1000, 4000])
    parser.add_argument("--paper-sizes", type=int, nargs="*", default=[1000, 4000])
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SPOTS"), help=argparse.SUPPRESS)
    parser.add_argument("--encoder", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    if options.encoder:
        print(json.dumps(encoder_rate()))
        return

    plan = [("default", n) for n in options.sizes]
    plan += [(kind, n) for kind in ("paper", "paper bf16-mixed") for n in options.paper_sizes]
    plan += [("original", n) for n in options.original_sizes]
    rows = [run_apart("--one", kind, str(n)) for kind, n in plan]
    rate = run_apart("--encoder")["tiles_per_second"]
    original = {row["spots"]: row["seconds"] for row in rows if row["kind"] == "original"}
    print("| algorithm | spots | s/epoch | µs/spot | peak GiB | original / this | with re-encoding |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        n, seconds = row["spots"], row["seconds"]
        ratio = encoded = ""
        if n in original and row["kind"] != "original":
            row["ratio"] = original[n] / seconds
            row["ratio_encoding"] = (original[n] + n / rate) / seconds
            ratio, encoded = f"{row['ratio']:.1f} x", f"{row['ratio_encoding']:.0f} x"
        print(
            f"| {row['kind']} | {n} | {seconds:.3f} | {1e6 * seconds / n:.0f} | {row['peak_gib']:.2f} | {ratio} | {encoded} |"
        )
    print(f"\nPublished encoder (ViT-B/32, random weights): {rate:.0f} tiles/s; re-encoding extrapolated from it.")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scaling.json").write_text(json.dumps({"rows": rows, "tiles_per_second": rate}, indent=1))


if __name__ == "__main__":
    main()
