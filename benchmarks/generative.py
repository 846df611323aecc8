"""What generative models of the spot keep that regression loses, and what they cost.

    python benchmarks/generative.py models --data DIR    # hisdiff, stem's condition, bleep and ridge: r, variance, co-expression
    python benchmarks/generative.py samplers --data DIR  # 20 steps against 1,000 from the same fit
    python benchmarks/generative.py paper                # seconds per step at the published size, 64 spots
    python benchmarks/generative.py table                # Markdown of what was run

DIR is the folder of ``her2st``; HESPOTEX_DATA by default. her2st: adjacent sections of one tumour, each predicted from the
others; synthetic: patients, each predicted from the others. Scores are per gene within a section, of log1p of counts per
10,000. Co-expression is that of a section's genes; ``halves`` are two halves of the counts, what no prediction need exceed.
Finished runs are kept in ``benchmarks/results/generative``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from accuracy import her2st, synthetic

import hespotex as hx
from hespotex.metrics import coexpression_score, pearson, rmse, variance_ratio

RESULTS = Path(__file__).parent / "results" / "generative"
N_GENES, N_SAMPLES, N_PATIENTS, COMPARED = 250, 20, 4, 4
MODELS = {
    "ridge": {"name": "ridge"},
    "bleep": {"name": "bleep"},
    "hisdiff (small)": {"name": "hisdiff", "preset": "small"},
    "hisdiff (small), spot alone": {"name": "hisdiff", "preset": "small", "condition": "spot"},
}


def sections_of(task: str, data: Path) -> dict:
    if task == "her2st":
        return {name: her2st(name, data) for name in ("C2", "C3", "C4", "C5")}
    return {f"P{patient}": synthetic(patient) for patient in range(N_PATIENTS)}


def once(name: str, run) -> None:
    path = RESULTS / f"{name}.json"
    if path.exists():
        print("there already:", name, flush=True)
        return
    print("running:", name, flush=True)
    rows = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(rows))
    path.with_suffix(".part").rename(path)
    print(pd.DataFrame(rows).to_string(index=False), flush=True)


def fitted(sections: dict, held_out: str, options: dict):
    """A model of all other sections, and seconds."""
    start = time.perf_counter()
    model = hx.tl.train(
        [table for name, table in sections.items() if name != held_out],
        hx.models.create(**options),
        unit="log1p_cp10k",
        gene_selection="high_mean",
        n_top_genes=N_GENES,
        embedding_key="X_morphology",
        seed=0,
    )
    return model, time.perf_counter() - start


def measured(table, genes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """log1p CP10k of spots with counts, and which spots these are."""
    library = np.asarray(table.X.sum(axis=1)).ravel()
    used = library >= 1
    counts = table[used, genes].X
    counts = counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)
    return np.log1p(counts / library[used, None] * 1e4), used


def score(truth: np.ndarray, guess: np.ndarray) -> dict:
    together = coexpression_score(truth, guess)
    return {
        "r": float(np.nanmean(pearson(truth, guess))),
        "rmse": float(np.nanmean(rmse(truth, guess))),
        "variance_ratio": float(np.nanmedian(variance_ratio(truth, guess))),
        "coexpression_r": together.pearson,
        "coexpression_error": together.mae,
        "coexpression_bias": together.bias,
    }


def predicted(model, table, **options) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Mean (n, G), samples (n, G, s) of generative models, and seconds."""
    model = model.with_options(**options) if options else model
    start = time.perf_counter()
    hx.tl.predict(table, model, key_added="p")
    seconds = time.perf_counter() - start
    mean = np.asarray(hx.get.prediction(table, "p").X)
    return mean, table.obsm.pop("p_samples", None), seconds


def run_models(task: str, sections: dict, held_out: str, label: str) -> list[dict]:
    table = sections[held_out].copy()
    model, fit_s = fitted(sections, held_out, MODELS[label])
    generative = model.info.name == "hisdiff"
    options = {"n_samples": N_SAMPLES, "keep_samples": True} if generative else {}
    mean, samples, seconds = predicted(model, table, **options)
    truth, used = measured(table, list(model.genes))
    rows = [{"model": label, "of": "mean" if generative else "prediction", **score(truth, mean[used])}]
    if samples is not None:
        each = [score(truth, samples[used][:, :, draw]) for draw in range(samples.shape[2])]
        rows.append({"model": label, "of": "one sample", **pd.DataFrame(each).mean().to_dict()})
    if label == "ridge":
        rows.append({"model": "halves of the counts", "of": "", **halves(table, list(model.genes), used)})
    return [{"task": task, "section": held_out, **row, "seconds_fit": fit_s, "seconds": seconds} for row in rows]


def halves(table, genes: list[str], used: np.ndarray) -> dict:
    """Two halves of the counts against each other."""
    counts = table[used].X.toarray().astype(np.int64)
    one = np.random.default_rng(0).binomial(counts, 0.5)
    columns = table.var_names.get_indexer(genes)
    a, b = (
        np.log1p(half[:, columns] / np.maximum(half.sum(axis=1, keepdims=True), 1) * 1e4)
        for half in (one, counts - one)
    )
    return score(a, b)


def run_samplers(sections: dict, held_out: str) -> list[dict]:
    """The same fit and the same noise, in 20 steps and in 1,000."""
    table = sections[held_out].copy()
    model, fit_s = fitted(sections, held_out, MODELS["hisdiff (small)"])
    rows = []
    for sampler, steps in (("dpm++", 20), ("ddim", 50), ("ddim", 1000), ("ddpm", 1000)):
        mean, samples, seconds = predicted(
            model, table, sampler=sampler, steps=steps, n_samples=COMPARED, keep_samples=True
        )
        truth, used = measured(table, list(model.genes))
        single = pd.DataFrame([score(truth, samples[used][:, :, draw]) for draw in range(COMPARED)]).mean()
        rows.append(
            {
                "section": held_out,
                "sampler": sampler,
                "steps": steps,
                "r": score(truth, mean[used])["r"],
                "variance_ratio": single["variance_ratio"],
                "coexpression_error": single["coexpression_error"],
                "seconds": seconds,
                "seconds_fit": fit_s,
            }
        )
    return rows


def run_paper() -> list[dict]:
    """Time of a step of training and of sampling at the published size, 64 spots, 200 genes, embeddings 1,024 wide."""
    import torch

    from hespotex.data.section import Section, Targets

    n, genes = 64, 200
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2) * 200.0
    counts = rng.poisson(5, size=(n, genes)).astype(np.float32)
    names = tuple(f"G{i}" for i in range(genes))
    targets = Targets(counts, counts.sum(axis=1).astype(float), names, unit="log2_counts")
    section = Section("s", np.arange(n).astype(str), rng.normal(size=(n, 1024)).astype(np.float32), xy, targets=targets)
    rows = []
    for preset in ("paper", "stem", "default"):
        times = {}
        for epochs in (1, 3):
            options = {"stopping": "fixed"} if preset == "default" else {}
            model = hx.models.create("hisdiff", preset=preset, epochs=epochs, **options)
            start = time.perf_counter()
            model.fit([section])
            times[epochs] = time.perf_counter() - start
        train = (times[3] - times[1]) / 2
        sampling = {}
        for steps in (2, 6):
            start = time.perf_counter()
            model.with_options(n_samples=1, steps=steps, sampler="ddim", paired=False).predict(section)
            sampling[steps] = time.perf_counter() - start
        draw = (sampling[6] - sampling[2]) / 4
        published = {"paper": 2000, "stem": 4000, "default": 1000}[preset]
        rows.append(
            {
                "preset": preset,
                "s/training step of 64 spots": train,
                "s/sampling step of 64 spots": draw,
                "fit of 2,000 spots, extrapolated, h": train * published * 2000 / 64 / 3600,
                "one sample of 2,000 spots, extrapolated, h": draw
                * (20 if preset == "default" else 1000)
                * 2000
                / 64
                / 3600,
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def print_tables() -> None:
    found: dict[str, list[pd.DataFrame]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        found.setdefault(path.stem.split("--")[0], []).append(pd.DataFrame(json.loads(path.read_text())))
    for kind, by in (("models", ["task", "model", "of"]), ("samplers", ["sampler", "steps"]), ("paper", ["preset"])):
        if kind not in found:
            continue
        table = pd.concat(found[kind])
        mean = table.groupby(by, sort=False).mean(numeric_only=True).reset_index()
        if kind == "samplers":
            slow = mean.loc[(mean["sampler"] == "ddim") & (mean["steps"] == 1000), "seconds"].iloc[0]
            mean["times faster than ddim 1000"] = slow / mean["seconds"]
        print(f"\n## {kind}\n")
        print(mean.round(3).to_markdown(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["models", "samplers", "paper", "table"])
    parser.add_argument("--data", type=Path, default=os.environ.get("HESPOTEX_DATA"))
    parser.add_argument("--tasks", nargs="+", choices=["her2st", "synthetic"], default=["her2st", "synthetic"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=hx.errors.HespotexWarning)
    hx.settings.progress_bar = False
    if options.what == "paper":
        once("paper", run_paper)
    elif options.what != "table":
        for task in options.tasks:
            if task == "her2st" and options.data is None:
                parser.error("--data: name the folder that holds her2st, or set HESPOTEX_DATA")
            sections = sections_of(task, Path(options.data or "."))
            if options.what == "samplers":
                held_out = next(iter(sections))
                once(f"samplers--{task}", lambda s=sections, h=held_out: run_samplers(s, h))
                continue
            for held_out in sections:
                for label in MODELS:
                    stem = label.replace(" ", "_").replace("(", "").replace(")", "").replace(",", "")
                    once(
                        f"models--{task}--{held_out}--{stem}",
                        lambda t=task, s=sections, h=held_out, m=label: run_models(t, s, h, m),
                    )
    print_tables()


if __name__ == "__main__":
    main()
