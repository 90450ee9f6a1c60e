"""Compresses a real pre-trained transformer, saves it, and runs it small in a new process.

    python examples/minilm.py
    python examples/minilm.py --only int8-g64 --json rows.json

The model is all-MiniLM-L6-v2, a sentence encoder of 22.6 million float32 weights, written in Flax
Linen. Each entry of `RULES` below is one way to compress it. For each, the table shows

- the file in MB, the same entropy-coded, and how many times smaller that is than the float32 file
  (the JSON has the bytes in memory as well: about those of the file that is not coded);
- the cosine of its embeddings to the float32 ones over the 50 Lee documents (mean, least);
- two public benchmarks: the Pearson correlation with human judgement on the Lee documents, and the
  Spearman correlation with it on WordSim-353;
- the time to compile, and the median time of a batch of ten documents, compressed and dense in
  turn in one process.

The first run downloads the weights and the texts (112 MB, see `assets.py`). The files stay in
`out/minilm`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from assets import AssetError, fetch
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from scipy.stats import pearsonr, spearmanr

import jaxcompress as jc

INT8 = jc.Quantize("int8", group_size=64)
INT4 = jc.Quantize("int4", group_size=64, convention="full")
UINT4 = jc.Quantize("uint4", group_size=32, symmetric=False)
# Under one percent of the weights, but every token meets them.
POSITIONS = {"**/position/embedding": INT8, "**/token_type/embedding": INT8}

RULES: dict[str, Mapping[str, jc.Spec | None]] = {
    "int8-g64": {"**/kernel": INT8, "**/embedding": INT8},
    # Smaller groups where an error costs most, and the two rows that meet every token left dense.
    "int8-mixed": {
        "**/token_type/embedding": None,
        "**/attention/*/kernel": jc.Quantize("int8", group_size=32),
        "**/kernel": INT8,
        "**/embedding": INT8,
    },
    "uint4-g32": {**POSITIONS, "**/kernel": UINT4, "**/embedding": UINT4},
    "int4-g64": {**POSITIONS, "**/kernel": INT4, "**/embedding": INT4},
    # These kernels are nearly of full rank, so that a low rank costs more here than it saves.
    "low-rank": {
        "**/mlp/down/kernel": jc.chain(jc.LowRank(256), INT8),
        "**/kernel": INT8,
        "**/embedding": INT8,
    },
    "codebook": {"**/kernel": jc.Codebook(bits=6, iterations=20), "**/embedding": INT8},
}

BATCH = 10


def shrink(rules: Mapping[str, jc.Spec | None], file: Path) -> None:
    """Compresses the published weights by rules and writes them to a file."""
    params = load_params(fetch("minilm"))
    small = jc.compress(params, rules)
    jc.save(file, small)
    jc.save(_coded(file), small, coded=True)


def _coded(file: Path) -> Path:
    """The same leaves, entropy-coded; it is this file that is run."""
    return file.with_suffix(".coded.safetensors")


def embed(file: Path, texts: list[str]) -> jax.Array:
    """Loads a file and embeds texts with it; the weights stay small."""
    tokens, mask = tokenize(load_tokenizer(fetch("minilm")), texts)
    small = jc.load(file)
    apply = jax.jit(jc.compressed(MiniLM().apply))
    return apply({"params": small}, tokens, mask)


class Benchmarks:
    """The Lee documents and WordSim-353, each with human judgement of similarity."""

    def __init__(self) -> None:
        folder = fetch("similarity")
        self.documents = (folder / "lee.cor").read_text("latin-1").splitlines()
        self.document_scores = np.loadtxt(folder / "similarities0-1.txt")
        lines = (folder / "wordsim353.tsv").read_text("latin-1").splitlines()
        pairs = [line.split("\t") for line in lines if not line.startswith("#")]
        self.words = sorted({word for *pair, _ in pairs for word in pair})
        where = {word: i for i, word in enumerate(self.words)}
        self.pairs = np.array([[where[a], where[b]] for a, b, _ in pairs])
        self.pair_scores = np.array([float(score) for *_, score in pairs])

    def lee(self, documents: np.ndarray) -> float:
        """Pearson correlation of cosine and judgement over all pairs of documents."""
        pairs = np.triu_indices(len(documents), k=1)
        return float(pearsonr((documents @ documents.T)[pairs], self.document_scores[pairs])[0])

    def wordsim(self, words: np.ndarray) -> float:
        """Spearman correlation of cosine and judgement over the pairs of words."""
        first, second = words[self.pairs[:, 0]], words[self.pairs[:, 1]]
        return float(spearmanr(np.sum(first * second, axis=-1), self.pair_scores)[0])


def evaluate(file: Path) -> dict[str, float]:
    """Runs the model in a file on the benchmarks; the embeddings are written beside it.

    It is the whole of what a process that uses the model does, and happens in one of its own.
    """
    benchmarks, tokenizer, model = Benchmarks(), load_tokenizer(fetch("minilm")), MiniLM()
    params = {"params": jc.load(_coded(file))}
    tokens, mask = tokenize(tokenizer, benchmarks.documents)
    batches = [(tokens[i : i + BATCH], mask[i : i + BATCH]) for i in range(0, len(tokens), BATCH)]

    start = time.perf_counter()
    apply = jax.jit(jc.compressed(model.apply)).lower(params, *batches[0]).compile()
    compile_s = time.perf_counter() - start
    # The yardstick: the same values dense, in the same process and in turn.
    dense_params = jc.decompress(params)
    dense = jax.jit(model.apply).lower(dense_params, *batches[0]).compile()

    documents, times, dense_times = [], [], []
    for batch in batches:
        out, seconds = _timed(apply, params, *batch)
        documents.append(out)
        times.append(seconds)
        dense_times.append(_timed(dense, dense_params, *batch)[1])
    words = jax.jit(jc.compressed(model.apply))(params, *tokenize(tokenizer, benchmarks.words))
    np.savez(file.with_suffix(".npz"), documents=np.concatenate(documents), words=words)
    return {
        "memory_bytes": jc.nbytes(params),
        "compile_s": compile_s,
        "batch_s": float(np.median(times)),
        "dense_batch_s": float(np.median(dense_times)),
    }


def _timed(fn: Any, *args: Any) -> tuple[jax.Array, float]:
    start = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return out, time.perf_counter() - start


def evaluate_in_new_process(file: Path) -> dict[str, Any]:
    """What `evaluate` measures, and the scores of the embeddings it left."""
    done = subprocess.run([sys.executable, __file__, "eval", file], stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"the process that ran {file} failed; its message is above")
    benchmarks = Benchmarks()
    with np.load(file.with_suffix(".npz")) as found:
        documents, words = found["documents"], found["words"]
    return {
        "file_bytes": file.stat().st_size,
        "coded_bytes": _coded(file).stat().st_size,
        **json.loads(done.stdout),
        "documents": documents,
        "lee_pearson": benchmarks.lee(documents),
        "wordsim_spearman": benchmarks.wordsim(words),
    }


def compare(names: Iterable[str], folder: Path, console: Console) -> list[dict[str, Any]]:
    """Runs float32 and the named rules, showing the table as it grows; returns its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    table, rows = _table(), []
    with Live(table, console=console, refresh_per_second=2) as live:
        for name, rules in {"float32": {}, **{name: RULES[name] for name in names}}.items():
            file = folder / f"{name}.safetensors"
            start = time.perf_counter()
            shrink(rules, file)
            shrink_s = time.perf_counter() - start
            live.console.print(f"{file} written in {shrink_s:.1f} s; running it in a new process")
            measured = evaluate_in_new_process(file)
            documents = measured.pop("documents")
            if not rows:
                reference, full_size = documents, measured["file_bytes"]
            cosine = np.sum(documents * reference, axis=-1)
            row = {
                "name": name,
                "rules": {pattern: repr(spec) for pattern, spec in rules.items()},
                "ratio": full_size / measured["coded_bytes"],
                "cosine_mean": float(cosine.mean()),
                "cosine_min": float(cosine.min()),
                "shrink_s": shrink_s,
                **measured,
            }
            rows.append(row)
            table.add_row(*_cells(row))
    return rows


def _table() -> Table:
    title = f"all-MiniLM-L6-v2 on {jax.default_backend()}, {BATCH} documents a batch"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("rules\n", no_wrap=True)
    for name in (
        "file\nMB", "coded\nMB", "\nratio", "cosine\nmean", "\nmin", "Lee\nr",
        "WordSim\nrho",
        "compile\ns", "batch\nms", "dense\nms",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{row['file_bytes'] / 1e6:.2f}",
        f"{row['coded_bytes'] / 1e6:.2f}",
        f"{row['ratio']:.2f}",
        f"{row['cosine_mean']:.4f}",
        f"{row['cosine_min']:.4f}",
        f"{row['lee_pearson']:.3f}",
        f"{row['wordsim_spearman']:.3f}",
        f"{row['compile_s']:.1f}",
        f"{1e3 * row['batch_s']:.0f}",
        f"{1e3 * row['dense_batch_s']:.0f}",
    ]


def main() -> None:
    """Compares all rules, or with `eval FILE` runs one file, for the process that does."""
    if sys.argv[1:2] == ["eval"]:
        print(json.dumps(evaluate(Path(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RULES, metavar="NAME", default=list(RULES),
                        help=f"run these alone, of: {', '.join(RULES)}")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    parser.add_argument("--out", type=Path, default=Path("out/minilm"), help="where the files go")
    args = parser.parse_args()
    try:
        fetch("minilm"), fetch("similarity")
    except AssetError as error:
        raise SystemExit(str(error)) from None
    console = Console()
    rows = compare(args.only, args.out, console)
    if not console.is_terminal:
        console.print()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
