"""A cohort of slides that is killed, runs out of disk, and is shared out to workers: the results are always the same.

    python benchmarks/cohort.py kills      # 12 slides, 3 of them broken; SIGKILL at 10 random moments; full disks
    python benchmarks/cohort.py workers    # here, on 1 and 2 worker processes, on a cluster started from the command line

Slides are synthetic and written as tiled TIFF; the model is ridge on ``morphology``. Prints Markdown, and writes
``benchmarks/results/cohort_<what>.json``. Results are compared by SHA-256 of every array and outline in them.

Partial embeddings are kept after ten seconds, and a part of a slide is 11 x 22 mm; here they are kept at once, and parts
are made small, so that kills meet all of it on slides of a few megapixels.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
MPP = 0.5
N_KILLS = 10
FINE_PX = (1500, 1800, 2100, 2400, 2700, 3000, 1500, 2000, 3000)
HIGH = 3  # times as high as wide, for several parts
BROKEN = {"10_truncated.tif": "ImageFormatError", "11_empty.tif": "ImageFormatError", "12_text.svs": "ImageFormatError"}
FILE_LIMIT = 20_000  # bytes
DISK_MB = 4


def slides(folder: Path, sizes: tuple[int, ...], *, high: int) -> None:
    """Tiled TIFFs of `sizes` pixels wide and `high` times as high, out of one synthetic slide."""
    import tifffile

    import hespotex as hx
    from hespotex.data.geometry import resolve_slide

    folder.mkdir(parents=True)
    sdata = hx.datasets.synthetic(size_px=3000, with_expression=False, first_patient=7, seed=7)
    source = np.ascontiguousarray(resolve_slide(sdata).levels[0].array.compute().transpose(1, 2, 0))
    for number, size in enumerate(sizes, start=1):
        turned = np.rot90(source, number)[:size, :size]
        pixels = np.tile(turned, (high, 1, 1))
        tifffile.imwrite(
            folder / f"{number:02d}_fine.tif",
            np.ascontiguousarray(pixels),
            photometric="rgb",
            tile=(256, 256),
            compression="deflate",
            resolution=(1e4 / MPP, 1e4 / MPP),
            resolutionunit="CENTIMETER",
        )


def model(path: Path) -> None:
    import hespotex as hx

    section = hx.datasets.synthetic(size_px=1600, pitch_um=60, diameter_um=50, n_genes=80, seed=1)
    hx.pp.embed(section, progress_bar=False)
    hx.tl.train(section, "ridge", n_top_genes=50, progress_bar=False).save(path)


def digest(result: Path) -> str:
    """SHA-256 of the arrays and outlines of a result."""
    import spatialdata as sd

    sdata = sd.read_zarr(result)
    state = hashlib.sha256()
    for name in sorted(sdata.tables):
        table = sdata.tables[name]
        state.update(f"{name} {table.shape} {[*table.obs_names, *table.var_names]}".encode())
        for array in (table.X, *(table.obsm[key] for key in sorted(table.obsm))):
            state.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    for name in sorted(sdata.shapes):
        state.update(name.encode() + b"".join(sdata.shapes[name].geometry.to_wkb()))
    return state.hexdigest()


def digests(out: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(out.glob("*.zarr"))}


def remains(out: Path) -> list[str]:
    """Whatever is neither a result, nor the manifest, nor the lock, nor kept to go on with."""
    parts = [path for path in out.rglob("*") if path.name.endswith(".part") or path.parent.name == "staging"]
    others = [path for path in out.iterdir() if path.suffix not in (".zarr", ".parquet") and path.name[0] != "."]
    return sorted(str(path.relative_to(out)) for path in (*parts, *others))


# One run of the program, in a process of its own


def run_here(slides_at: Path, model_at: Path, out: Path, counted: Path, limit: int | None) -> None:
    """The program on the cohort, with small parts that are kept at once; a line in `counted` for each part embedded."""
    import hespotex as hx
    import hespotex.tl  # what is imported now does not shift the moments of the kills
    from hespotex.cli import main
    from hespotex.data import partial
    from hespotex.encoders import morphology

    partial._KEEP_AFTER_S = 0.0
    morphology._PART_PX = 300
    write = partial.PartialRows.write

    def counting(self, rows, values):
        write(self, rows, values)
        with counted.open("a") as file:
            file.write(f"{len(rows)}\n")

    partial.PartialRows.write = counting
    hx.settings.cache_dir = counted.parent / "cache"
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    sys.argv = ["hespotex", "predict", str(slides_at), "-m", str(model_at), "-o", str(out)]
    print("begun", flush=True)
    main()


def start(work: Path, out: Path, counted: str, limit: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "run", str(work), str(out), counted, *([str(limit)] if limit else [])]
    environment = os.environ | dict.fromkeys(THREADS, "1")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate()
    return process.returncode, said


# Kills and full disks


def kills(work: Path, seed: int) -> dict[str, object]:
    import pandas as pd

    slides(work / "slides", FINE_PX, high=HIGH)
    model(work / "model")
    whole = (work / "slides" / "01_fine.tif").read_bytes()
    (work / "slides" / "10_truncated.tif").write_bytes(whole[: len(whole) // 2])
    (work / "slides" / "11_empty.tif").write_bytes(b"")
    (work / "slides" / "12_text.svs").write_text("this is not an image\n" * 100)

    begun = time.perf_counter()
    code, said = finish(start(work, work / "undisturbed", "undisturbed"))
    took = time.perf_counter() - begun
    expected = digests(work / "undisturbed")
    listed = statuses(pd.read_parquet(work / "undisturbed" / "manifest.parquet"))
    assert code == 3, said
    assert len(expected) == len(FINE_PX), said
    assert listed == {name: "" for name in listed if "fine" in name} | BROKEN, listed
    rows = [("undisturbed", code, len(expected), len(BROKEN), True, parts(work, "undisturbed"), f"{took:.0f} s")]

    rng = np.random.default_rng(seed)
    out = work / "killed"
    moments = []
    for number in range(N_KILLS):
        process = start(work, out, "killed")
        moment = float(rng.uniform(0, 2 * took / (N_KILLS + 1)))
        time.sleep(moment)
        over = process.poll() is not None
        os.killpg(process.pid, signal.SIGKILL) if not over else None
        process.communicate()
        found = digests(out) if out.exists() else {}
        same = all(expected[name] == value for name, value in found.items())
        assert same, f"kill {number}: {found}"
        moments.append({"after_s": moment, "done": len(found), "whole": same, "had_ended": over})
    code, said = finish(start(work, out, "killed"))
    found = digests(out)
    failed = statuses(pd.read_parquet(out / "manifest.parquet"))
    rows.append((f"SIGKILL × {N_KILLS}", code, *judged(found, failed, expected, out), parts(work, "killed"), ""))

    rows += [
        full_disk(work, expected, "files of at most 20 kB", work / "limited", limit=FILE_LIMIT),
        *small_disk(work, expected),
    ]
    print("| run | exit code | results | failures listed | identical, nothing left over | parts embedded | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row) + " |")
    return {"rows": rows, "kills": moments, "seconds": took}


def judged(found: dict[str, str], failed: dict[str, str], expected: dict[str, str], out: Path) -> tuple[int, int, bool]:
    wrong = sum(failed.get(name) == error for name, error in BROKEN.items())
    return len(found), wrong, found == expected and not remains(out)


def statuses(manifest) -> dict[str, str]:
    return {Path(slide).name: error for slide, error in zip(manifest["slide"], manifest["error"], strict=True)}


def parts(work: Path, counted: str) -> int:
    return len((work / "counts" / counted).read_text().splitlines())


def full_disk(work: Path, expected: dict[str, str], what: str, out: Path, limit: int | None = None, room=None) -> tuple:
    """A run that meets a full disk, and one that goes on when there is room."""
    import pandas as pd

    name = out.name if limit else "disk"
    first, said = finish(start(work, out, name, limit))
    assert first == 1, (first, said)
    assert "Error:" in said.splitlines()[-1], said
    assert all(expected[key] == value for key, value in digests(out).items())
    assert not remains(out), remains(out)
    n_then = len(digests(out))
    if room is not None:
        room()
    code, _ = finish(start(work, out, name))
    failed = statuses(pd.read_parquet(out / "manifest.parquet"))
    found = digests(out)
    return (what, f"{first}, then {code}", *judged(found, failed, expected, out), parts(work, name), f"{n_then} before")


def small_disk(work: Path, expected: dict[str, str]) -> Iterator[tuple]:
    """The same on a disk of a few megabytes, where this user may mount one."""
    disk = work / "tmpfs"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        print("a tmpfs cannot be mounted here: left out\n", file=sys.stderr)
        return
    try:

        def room() -> None:
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)

        yield full_disk(work, expected, f"disk of {DISK_MB} MB", disk / "out", room=room)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


# Workers


def workers(work: Path) -> dict[str, object]:
    import hespotex as hx

    slides(work / "slides", (2400,) * 6, high=1)
    slides(work / "large", (3000,), high=4)
    model(work / "model")
    rows: dict[str, dict[str, dict[str, object]]] = {}
    for name, cluster in CLUSTERS.items():
        with cluster() as client:
            if client is not None:
                client.run(_warm)
            rows[name] = {}
            for what, task in TASKS.items():
                begun = time.perf_counter()
                value = task(work, name, client)
                rows[name][what] = {"seconds": time.perf_counter() - begun, "digest": value}
    first = rows[next(iter(rows))]
    names = list(first)
    print(f"hespotex {hx.__version__}, {os.cpu_count()} CPUs\n")
    print("| where | " + " | ".join(f"{name}, s | same" for name in names) + " |")
    print("| --- " * (1 + 2 * len(names)) + "|")
    for where, row in rows.items():
        cells = [f"{row[n]['seconds']:.1f} | {row[n]['digest'] == first[n]['digest']}" for n in names]
        print(f"| {where} | " + " | ".join(cells) + " |")
    return rows


def _warm() -> None:
    import hespotex.tl  # noqa: F401


def _here() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _local(n_workers: int):
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            host="127.0.0.1",
            memory_limit=0,
            env=dict.fromkeys(THREADS, "1") | {"HESPOTEX_N_JOBS": "1"},
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@contextlib.contextmanager
def _from_the_command_line():
    """``dask scheduler`` and two ``dask worker``, each a process of its own."""
    import distributed

    environment = os.environ | dict.fromkeys(THREADS, "1") | {"HESPOTEX_N_JOBS": "1"}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def process(*words: str) -> None:
            command = [sys.executable, "-m", "dask", *words]
            log = stack.enter_context((Path(folder) / "log").open("a"))
            started = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
            stack.callback(started.wait)
            stack.callback(started.terminate)

        about = str(Path(folder) / "scheduler.json")
        process(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0", "--scheduler-file", about
        )
        for _ in range(2):
            process(
                *("worker", "--scheduler-file", about, "--nthreads", "1", "--memory-limit", "0"),
                *("--host", "127.0.0.1", "--no-dashboard"),
            )
        with distributed.Client(scheduler_file=about, timeout="60s") as client:
            client.wait_for_workers(2, timeout=120)
            yield client


CLUSTERS = {
    "this process": _here,
    "1 worker process": lambda: _local(1),
    "2 worker processes": lambda: _local(2),
    "dask scheduler + 2 dask workers": _from_the_command_line,
}


def _large(work: Path):
    import hespotex as hx

    return hx.io.read_wsi(work / "large" / "01_fine.tif")


def _sha(*arrays: np.ndarray) -> str:
    state = hashlib.sha256()
    for array in arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def embed(work: Path, name: str, client) -> str:
    import hespotex as hx
    from hespotex.encoders import morphology

    slide = _large(work)
    hx.pp.detect_tissue(slide)
    hx.pp.make_tiles(slide, diameter_um=50, pitch_um=60)
    usual = morphology._PART_PX
    try:
        morphology._PART_PX = 600  # parts for all workers, also of a slide of 36 megapixels
        return _sha(hx.pp.embed(slide, shapes_key="tiles", copy=True, client=client))
    finally:
        morphology._PART_PX = usual  # sums of other parts are rounded otherwise, and the cohort's are the workers' own


def network(work: Path, name: str, client) -> str:
    import hespotex as hx

    weights = work / "resnet18.safetensors"
    if not weights.exists():
        from hespotex._optional import ensure_torchvision

        ensure_torchvision()
        import timm
        from safetensors.torch import save_file

        save_file(timm.create_model("resnet18", num_classes=0).state_dict(), weights)
    slide = _large(work)
    hx.pp.detect_tissue(slide)
    hx.pp.make_tiles(slide, diameter_um=112, pitch_um=80)
    return _sha(hx.pp.embed(slide, "timm:resnet18", weights=weights, tile_um=112, copy=True, client=client))


def tissue(work: Path, name: str, client) -> str:
    import hespotex as hx

    outlines = hx.pp.detect_tissue(_large(work), copy=True, client=client)
    return hashlib.sha256(b"".join(outlines.geometry.to_wkb())).hexdigest()


def nuclei(work: Path, name: str, client) -> str:
    import hespotex as hx

    outlines = hx.pp.segment_nuclei(_large(work), copy=True, client=client)
    return hashlib.sha256(b"".join(outlines.geometry.to_wkb())).hexdigest()


def cohort(work: Path, name: str, client) -> str:
    import hespotex as hx

    out = work / f"out {name}"
    frame = hx.tl.predict_cohort(work / "slides", work / "model", out, client=client)
    assert (frame["status"] == "done").all(), frame
    return json.dumps(digests(out))


TASKS = {"tissue": tissue, "morphology": embed, "resnet18": network, "nuclei": nuclei, "cohort": cohort}


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        work, out, counted = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
        (work / "counts").mkdir(exist_ok=True)
        limit = int(sys.argv[5]) if len(sys.argv) > 5 else None
        run_here(work / "slides", work / "model", out, work / "counts" / counted, limit)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "workers"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for slides and results; a temporary one by default")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import hespotex as hx

    hx.settings.progress_bar = False
    work = Path(tempfile.mkdtemp(prefix="hespotex-cohort-", dir=args.work))
    try:
        hx.settings.cache_dir = work / "cache"
        found = kills(work, args.seed) if args.what == "kills" else workers(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"cohort_{args.what}.json").write_text(json.dumps(found, indent=2, default=str))


if __name__ == "__main__":
    main()
