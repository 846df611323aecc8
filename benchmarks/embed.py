"""Speed and memory of ``morphology`` on a whole her2st section, JPEG decoding apart.

Run: ``python benchmarks/embed.py --data DIR`` where DIR holds ``her2st`` (default: the environment variable HESPOTEX_DATA).
Prints Markdown, and writes ``benchmarks/results/embed.json``. Each row is measured in a process of its own, on one thread
per library; "per core" counts the processor time of all threads, so that other load on the machine does not flatter it.
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

RESULTS = Path(__file__).parent / "results" / "embed.json"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
CASES = {
    "spots of the section": {"centres": "spots"},
    "whole slide, every 100 µm": {"centres": 100.0},
    "whole slide, every 8 µm": {"centres": 8.0},
    "whole slide, every 100 µm, 1 µm/px": {"centres": 100.0, "mpp": 1.0},
}


def resident() -> float:
    """Memory of this process in MiB, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Peak:
    """Largest resident memory above that at the start, sampled every few milliseconds."""

    def __enter__(self) -> Peak:
        self.base = self.top = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.top = max(self.top, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(data: Path, section: str, case: dict[str, object]) -> dict[str, float]:
    import dask
    import numpy as np

    import hespotex as hx
    from hespotex.data.geometry import resolve_slide, shape_centres

    dask.config.set(scheduler="synchronous")
    sdata = hx.datasets.her2st(section, path=data / "her2st")
    slide = resolve_slide(sdata)
    height, width = slide.shape
    options = {"mpp": case["mpp"]} if "mpp" in case else {}
    encoder = hx.encoders.create("morphology", **options)
    if case["centres"] == "spots":
        centres = shape_centres(sdata, "spots", slide)
    else:
        step = float(case["centres"]) / slide.mpp
        x, y = np.meshgrid(np.arange(step / 2, width, step), np.arange(step / 2, height, step))
        centres = np.column_stack([x.ravel(), y.ravel()])

    with Peak() as memory:
        wall, core = time.perf_counter(), time.process_time()
        for _rows, _features in encoder.embed(slide, centres, batch_size=4096, device="cpu", progress_bar=False):
            pass
        wall, core = time.perf_counter() - wall, time.process_time() - core
    megapixels = height * width / 1e6
    return {
        "megapixels": megapixels,
        "centres": len(centres),
        "features": encoder.n_features,
        "core_s": core,
        "wall_s": wall,
        "mpx_per_core_s": megapixels / core,
        "peak_mib": memory.top - memory.base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HESPOTEX_DATA"), help="folder that holds her2st")
    parser.add_argument("--section", default="C3")
    parser.add_argument("--case", choices=CASES, help="measure this one here and print JSON")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data is needed where HESPOTEX_DATA is not set")
    if args.case:
        print(json.dumps(measure(args.data, args.section, CASES[args.case])))
        return

    environment = os.environ | dict.fromkeys(THREADS, "1")
    command = [sys.executable, __file__, "--data", str(args.data), "--section", args.section]
    results = {}
    prepare = "import sys, hespotex as hx; hx.datasets.her2st(sys.argv[1], path=sys.argv[2])"  # decodes into the cache
    subprocess.run([sys.executable, "-c", prepare, args.section, str(args.data / "her2st")], check=True)
    for case in CASES:
        done = subprocess.run([*command, "--case", case], env=environment, check=True, capture_output=True, text=True)
        results[case] = json.loads(done.stdout.splitlines()[-1])

    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"section": args.section, "cases": results}, indent=2))
    print("| case | centres | core s | wall s | source Mpx/s per core | peak MiB over baseline |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case, row in results.items():
        print(
            f"| {case} | {row['centres']:,} | {row['core_s']:.1f} | {row['wall_s']:.1f} | "
            f"{row['mpx_per_core_s']:.1f} | {row['peak_mib']:.0f} |"
        )


if __name__ == "__main__":
    main()
