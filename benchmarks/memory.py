"""Working memory of the steps on slides from 5,000 to 40,000 px a side.

Run: ``python benchmarks/memory.py [--sizes 5000 10000 20000 40000]``; ``python benchmarks/memory.py table`` prints the last
results. Slides are written first (``benchmarks/slides.py``; the largest takes about ten minutes and a gigabyte) and kept.
Each step of each slide runs in a process of its own, on what the steps before it left in a store. Reported is the largest
resident memory above that at the start of the step, and what the result itself takes, which may grow with the slide.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(os.environ.get("HESPOTEX_BENCHMARKS", Path(__file__).parent / "results"))
RESULTS = FOLDER / "memory.json"
STEPS = ("tissue", "nuclei", "embed", "predict")
N_GENES = 200


class Peak:
    """Largest resident memory in MiB above that at the start, sampled every few milliseconds."""

    def __enter__(self) -> Peak:
        self.base = self.top = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    @staticmethod
    def now() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.top = max(self.top, self.now())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.top = max(self.top, self.now())


def warm_up() -> None:
    """Load and compile what the first call of each step does, on a small slide."""
    import hespotex as hx

    small = hx.datasets.synthetic(size_px=800, pitch_um=40.0, diameter_um=40.0, n_genes=N_GENES, seed=1)
    hx.pp.detect_tissue(small, min_area_um2=1000)
    hx.pp.segment_nuclei(small)
    hx.pp.embed(small, "morphology")
    model = hx.tl.train(small, "ridge")
    model.save(FOLDER / "memory.hx", overwrite=True)
    hx.tl.predict(small, model)


def measure(path: Path, step: str) -> dict[str, float]:
    import shutil

    import spatialdata

    import hespotex as hx

    hx.settings.progress_bar = False
    hx.settings.cache_dir = FOLDER / "cache"
    warm_up()
    slide = hx.io.read_wsi(path)
    tiles = FOLDER / f"{path.stem}-tiles.zarr"
    if step != "tissue":
        stored = spatialdata.read_zarr(tiles)
        for name in ("tissue", "tiles"):
            slide[name] = stored[name]
        if step == "predict":
            slide["morphology_tiles"] = stored["morphology_tiles"]
    result = FOLDER / f"{path.stem}-{step}.zarr"
    shutil.rmtree(result, ignore_errors=True)
    with Peak() as memory:
        start = time.process_time()
        if step == "tissue":
            hx.pp.detect_tissue(slide)
            hx.pp.make_tiles(slide, diameter_um=112.0, pitch_um=112.0)
        elif step == "nuclei":
            hx.pp.segment_nuclei(slide, target=result)
        elif step == "embed":
            hx.pp.embed(slide, "morphology")
        else:
            hx.tl.predict(slide, FOLDER / "memory.hx", target=result)
        seconds = time.process_time() - start
    row = {"mib": memory.top - memory.base, "seconds": seconds, "result_mib": 0.0}
    if step in ("tissue", "embed"):
        shutil.rmtree(tiles, ignore_errors=True)
        del slide["image"]
        slide.write(tiles)
    if step == "embed":
        table = slide["morphology_tiles"]
        row |= {"places": table.n_obs, "result_mib": table.obsm["X_morphology"].nbytes / 2**20}
    elif step == "tissue":
        row["places"] = len(slide["tiles"])
    else:
        table = next(iter(spatialdata.read_zarr(result, selection=("tables",)).tables.values()))
        row["places"] = table.n_obs
        shutil.rmtree(result, ignore_errors=True)
    return row


def table() -> None:
    stored = json.loads(RESULTS.read_text())
    print("| slide, px | step | places | MiB over the start | MiB of the result in memory | working MiB | core s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for key, row in stored.items():
        size, step = key.split()
        print(
            f"| {int(size):,} | {step} | {row['places']:,} | {row['mib']:.0f} | {row['result_mib']:.0f} | "
            f"{row['mib'] - row['result_mib']:.0f} | {row['seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "table", "step"], default="run")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 10_000, 20_000, 40_000])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    args = parser.parse_args()
    if args.what == "table":
        table()
        return
    if args.what == "step":
        print(json.dumps(measure(FOLDER / f"slide_{args.sizes[0]}.tif", args.steps[0])))
        return

    from slides import write_slide

    FOLDER.mkdir(parents=True, exist_ok=True)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for size in args.sizes:
        path = FOLDER / f"slide_{size}.tif"
        if not path.exists():
            write_slide(path, size)
        for step in args.steps:
            command = [sys.executable, __file__, "step", "--sizes", str(size), "--steps", step]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{size} {step}: failed", file=sys.stderr)
                continue
            stored[f"{size} {step}"] = json.loads(done.stdout.splitlines()[-1])
            RESULTS.write_text(json.dumps(stored, indent=1))
            print(size, step, stored[f"{size} {step}"], flush=True)
    table()


if __name__ == "__main__":
    main()
