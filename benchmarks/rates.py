"""Embedding of a whole slide against what the encoder and the decoder could do by themselves.

Run: ``python benchmarks/rates.py [--size 8000] [--data DIR]``; ``python benchmarks/rates.py table`` prints the last results.
A slide of that size is written first (``benchmarks/slides.py``). For each encoder, each in a process of its own, all on the
same tiles:

forward   the encoder alone, on tiles that are in memory (``morphology``: on a slide that is in memory, decoded)
decode    reading the tiles and nothing else
embed     ``hx.pp.embed`` from the file; the encoder has every source tile decoded at most once (asserted), the
          fingerprint looks at some places once more (counted)
loop      ``openslide.read_region`` for each tile and the same encoder, in batches
lazyslide ``lazyslide.tl.feature_extraction`` with the same network on the same tiles

Each is run several times, in turns, and the fastest counts, as other load only ever slows one down. With ``HESPOTEX_DATA`` set, MobileNet has its
ImageNet weights; other networks have random ones, which changes no rate. On a machine with a GPU, ``--gpu`` measures ViT-B/32, ViT-L/16, ViT-H/14 and
ViT-g/14 in bfloat16 on it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(os.environ.get("HESPOTEX_BENCHMARKS", Path(__file__).parent / "results"))
RESULTS = FOLDER / "rates.json"
SIZE = 8000
TILE_UM = 112.0
BATCH = 64
CASES = {
    "mean of a tile": ("mean", "float32"),
    "morphology": ("morphology", "float32"),
    "MobileNet": ("timm:mobilenetv1_100", "float32"),
    "MobileNet, bf16": ("timm:mobilenetv1_100", "bfloat16"),
    "ViT-B/32": ("open_clip:ViT-B-32", "float32"),
    "ViT-B/32, bf16": ("open_clip:ViT-B-32", "bfloat16"),
    "ViT-S/16": ("timm:vit_small_patch16_224", "float32"),
    "ViT-S/16, bf16": ("timm:vit_small_patch16_224", "bfloat16"),
}
GPU_CASES = {
    "ViT-B/32, bf16": ("open_clip:ViT-B-32", "bfloat16"),
    "ViT-L/16, bf16": ("timm:vit_large_patch16_224", "bfloat16"),
    "ViT-H/14, bf16": ("timm:vit_huge_patch14_224", "bfloat16"),
    "ViT-g/14, bf16": ("timm:vit_giant_patch14_224", "bfloat16"),
}
FEW_TILES = {"ViT-B/32": 320, "ViT-S/16": 320}  # of networks that take a minute for more


def weights_of(name: str, folder: Path, data: Path | None) -> dict[str, Any]:
    """Options of an encoder with weights: a file of random ones where there are no others."""
    from safetensors.torch import save_file

    from hespotex._optional import ensure_torchvision

    ensure_torchvision()
    if ":" not in name:
        return {}
    family, architecture = name.split(":")
    known = {} if data is None else {"mobilenetv1_100": data / "encoders_timm" / "mobilenetv1_100_rot180.safetensors"}
    file = known.get(architecture, folder / f"{architecture}.safetensors")
    if not file.exists():
        if family == "timm":
            import timm

            state = timm.create_model(architecture, pretrained=False, num_classes=0).state_dict()
        else:
            import open_clip

            model = open_clip.create_model(architecture, pretrained=None)
            state = {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}
        save_file({key: value.contiguous().clone() for key, value in state.items()}, file)
    return {"weights": file}


def mean_colour(tiles: np.ndarray) -> np.ndarray:
    """The cheapest of encoders: what it costs is to read."""
    return tiles[:, ::8, ::8].mean(axis=(1, 2))


def fastest(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each function; they take turns, so that all meet the same load."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(each) for name, each in times.items()}


def measure(path: Path, case: str, folder: Path, data: Path | None, repeats: int, device: str) -> dict[str, Any]:
    from slides import decoded_tiles

    import hespotex as hx
    from hespotex.data.geometry import resolve_slide, shape_centres
    from hespotex.image.stream import iter_tiles

    hx.settings.progress_bar = False
    name, dtype = (CASES | GPU_CASES)[case]
    sdata = hx.io.read_wsi(path)
    hx.pp.detect_tissue(sdata)
    hx.pp.make_tiles(sdata, diameter_um=TILE_UM, pitch_um=TILE_UM)
    few = FEW_TILES.get(case.split(",")[0]) if device == "cpu" else None
    if few is not None:
        sdata["tiles"] = sdata["tiles"].iloc[:few]
    slide = resolve_slide(sdata)
    centres = shape_centres(sdata, "tiles", slide)
    options = {"tile_um": TILE_UM, "dtype": dtype, **weights_of(name, folder, data)} if ":" in name else {}
    if name == "mean":
        encoder = hx.encoders.from_module(mean_colour, tile_um=TILE_UM, tile_px=224, name="mean")
    else:
        encoder = hx.encoders.create(name, **options)
    row: dict[str, Any] = {"tiles": len(centres), "source_mpx": float(np.prod(slide.shape)) / 1e6}

    def embed() -> None:
        hx.pp.embed(sdata, encoder, batch_size=BATCH, device=device, copy=True)

    with decoded_tiles() as counts:
        for rows, _ in encoder.embed(slide, centres, batch_size=BATCH, device=device, progress_bar=False):
            del rows
    row["decoded"], row["most_often"] = len(counts), max(counts.values())
    assert row["most_often"] == 1, counts
    with decoded_tiles() as counts:
        embed()
    row["decoded_again"] = sum(counts.values()) - len(counts)

    if name == "morphology":
        from dataclasses import replace

        import dask.array as da

        levels = tuple(
            replace(level, array=da.from_array(level.array.compute(), chunks=level.array.chunksize))
            for level in slide.levels
        )
        inside = replace(slide, levels=levels)

        def forward() -> None:
            for _ in encoder.embed(inside, centres, batch_size=BATCH, device=device, progress_bar=False):
                pass

        def decode() -> None:
            from hespotex.image.stream import iter_blocks, working_grid

            grid = working_grid(slide, encoder.mpp)
            for _ in iter_blocks(slide, mpp=grid.mpp, progress_bar=False):
                pass

    else:
        reading = {"tile_um": TILE_UM, "tile_px": encoder.tile_px, "batch_size": BATCH, "progress_bar": False}
        batches = [batch.pixels for batch in iter_tiles(slide, centres, **reading)]

        def forward() -> None:
            for pixels in batches:
                encoder.encode(pixels, device)

        def decode() -> None:
            for _ in iter_tiles(slide, centres, **reading):
                pass

    forward()  # wakes what compiles or allocates at first use
    seconds = fastest({"forward": forward, "decode": decode, "embed": embed}, repeats)
    row |= {name: len(centres) / each for name, each in seconds.items()}
    if name != "morphology":
        row["loop"] = loop(path, centres, slide.mpp, encoder, device)
        if dtype == "float32" and ":" in name:
            row["lazyslide"] = lazyslide(path, sdata, encoder, device)
    if device != "cpu":
        row |= peak_share(encoder, row["forward"])
    return row


def loop(path: Path, centres: np.ndarray, mpp: float, encoder: Any, device: str) -> float:
    """Tiles per second of what a script does: a region, a resize, a batch, the encoder."""
    import openslide
    from PIL import Image

    side = round(TILE_UM / mpp)
    some = centres[:512]
    start = time.perf_counter()
    with openslide.OpenSlide(path) as slide:
        for first in range(0, len(some), BATCH):
            tiles = []
            for x, y in some[first : first + BATCH]:
                region = slide.read_region((round(x - side / 2), round(y - side / 2)), 0, (side, side)).convert("RGB")
                tiles.append(np.asarray(region.resize((encoder.tile_px, encoder.tile_px), Image.Resampling.BICUBIC)))
            encoder.encode(np.stack(tiles), device)
    return len(some) / (time.perf_counter() - start)


def lazyslide(path: Path, sdata: Any, encoder: Any, device: str) -> float | None:
    """Tiles per second of LazySlide with the same network, on tiles of the same size."""
    import warnings

    import lazyslide as zs
    import torch
    from wsidata import open_wsi

    own = encoder._network
    network = own._network

    def transform(tile: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tile).permute(2, 0, 1) * own._scale + own._shift

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wsi = open_wsi(str(path), store=None)
        zs.pp.find_tissues(wsi)
        zs.pp.tile_tissues(wsi, encoder.tile_px, mpp=encoder.mpp)
        if len(wsi["tiles"]) > len(sdata["tiles"]):
            wsi["tiles"] = wsi["tiles"].iloc[: len(sdata["tiles"])]
        start = time.perf_counter()
        zs.tl.feature_extraction(
            wsi,
            model=network,
            model_name="same",
            transform=transform,
            device=device,
            batch_size=BATCH,
            pbar=False,
            amp=False,
        )
        return len(wsi["tiles"]) / (time.perf_counter() - start)


def peak_share(encoder: Any, rate: float) -> dict[str, float]:
    """TFLOP/s of the forward passes, and of a large matrix product in the same type on the same device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        encoder.encode(np.zeros((1, encoder.tile_px, encoder.tile_px, 3), np.uint8), "cuda")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    (a @ a).sum().item()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    peak = 20 * 2 * 8192**3 / (time.perf_counter() - start)
    return {"tflops": counter.get_total_flops() * rate / 1e12, "peak_tflops": peak / 1e12}


def table() -> None:
    stored = json.loads(RESULTS.read_text())
    print(f"Slide of {SIZE:,} x {SIZE:,} px if not said, {stored['threads']} threads, tiles of {TILE_UM:g} µm.\n")
    print(
        "| encoder | tiles | forward, tiles/s | decode, tiles/s | embed, tiles/s | embed / min | loop | embed / loop | LazySlide | embed / LazySlide | tiles decoded | of these again |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case, row in stored["cases"].items():
        bound = min(row["forward"], row["decode"])
        shown = [f"{row[key]:.0f}" if row.get(key) else "–" for key in ("forward", "decode", "embed")]
        others = []
        for key in ("loop", "lazyslide"):
            value = row.get(key)
            others += [f"{value:.0f}", f"{row['embed'] / value:.2f}"] if value else ["–", "–"]
        print(
            f"| {case} | {row['tiles']:,} | {' | '.join(shown)} | {row['embed'] / bound:.2f} | {' | '.join(others)} | {row.get('decoded')} | {row.get('decoded_again')} |"
        )
        if "tflops" in row:
            print(
                f"\n{case}: {row['tflops']:.0f} TFLOP/s, {row['tflops'] / row['peak_tflops']:.0%} of a matrix product's"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "table"], default="run")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the slide in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=os.environ.get("HESPOTEX_DATA"))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", nargs="*", help="cases to measure; the others keep their last numbers")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "table":
        table()
        return
    data = None if args.data is None else Path(args.data)
    path = FOLDER / f"slide_{args.size}.tif"
    if args.case:
        device = "cuda" if args.gpu else "cpu"
        print(json.dumps(measure(path, args.case, args.folder, data, args.repeats, device)))
        return

    from slides import write_slide

    FOLDER.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_slide(path, args.size)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    stored |= {"threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
    cases = GPU_CASES if args.gpu else CASES
    with tempfile.TemporaryDirectory() as folder:
        for case in args.only or cases:
            command = [sys.executable, __file__, "--case", case, "--folder", folder, "--size", str(args.size)]
            command += ["--repeats", str(args.repeats), *(["--gpu"] if args.gpu else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{case}: failed", file=sys.stderr)
                continue
            name = case if args.size == SIZE else f"{case}, {args.size:,} px"
            stored["cases"][name] = json.loads(done.stdout.splitlines()[-1])
            RESULTS.write_text(json.dumps(stored, indent=1))
            print(name, stored["cases"][name], flush=True)
    table()


if __name__ == "__main__":
    main()
