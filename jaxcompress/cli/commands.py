"""What each command does; each returns an exit code."""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax

from jaxcompress.arrays.base import is_compressed
from jaxcompress.checkpoint.export import export
from jaxcompress.checkpoint.file import load_shapes, save, stored_plan
from jaxcompress.checkpoint.sources import SEPARATOR, Source, open_source
from jaxcompress.compress import Hit, compress, nbytes, plan_rules, smaller
from jaxcompress.errors import FileError, ValuesNeededError
from jaxcompress.progress import progress_bar
from jaxcompress.pruning.structure.plans import Plan
from jaxcompress.recipes import PRESETS, Recipe
from jaxcompress.report.contents import contents
from jaxcompress.report.difference import diff
from jaxcompress.rules import flatten
from jaxcompress.tables import size_text


def compress_file(args: Namespace) -> int:
    """`jaxcompress compress`."""
    recipe = Recipe.read(args.recipe)
    source = open_source(vars(args)["in"])
    if args.dry_run:
        return _dry_run(args, recipe, source)
    out = _target(args, source)
    start = time.perf_counter()
    plan = _plan(args)
    small = compress(source.tree, recipe, lazy=True, plan=plan)
    first = stored_plan(source.files[0]) if source.kind == "jaxcompress" else None
    total = first if plan is None else plan if first is None else first.then(plan)
    metadata = {SEPARATOR: source.separator} if source.separator else {}
    show = _progress(args)
    coded = not args.uncoded
    save(out, small, metadata, coded=coded, recipe=recipe, plan=total, progress=show)
    before = sum(nbytes(leaf) for _, leaf in flatten(source.tree)[0])
    _tell(args, before, out, time.perf_counter() - start)
    return 0


def _plan(args: Namespace) -> Plan | None:
    """The channels that are removed first: a file with the JSON of a plan."""
    if args.plan is None:
        return None
    try:
        return Plan.from_json(Path(args.plan).read_text("utf-8"))
    except (FileError, UnicodeDecodeError) as error:
        raise FileError(f"{args.plan}: {error}") from None


def _target(args: Namespace, source: Source) -> Path:
    out, given = Path(args.out), Path(vars(args)["in"])
    if out.is_dir():
        raise FileError(f"{out} is a folder; write the name of a file in it")
    if out.exists() and any(out.samefile(file) for file in source.files):
        raise FileError(f"{out} is the input; write another name, so that nothing is lost")
    if not out.parent.is_dir():
        raise FileError(f"{out.parent} is no folder; make it first")
    if given.is_dir() and out.resolve().is_relative_to(given.resolve()):
        raise FileError(f"{out} lies in the folder {given}, which is the input; write elsewhere")
    return out


def _progress(args: Namespace) -> bool:
    return sys.stderr.isatty() and not args.quiet


def _tell(args: Namespace, before: int, out: Path, seconds: float) -> None:
    after = out.stat().st_size
    if args.json:
        ratio = before / after
        _print_json({"out": str(out), "before": before, "after": after, "ratio": ratio,
                     "seconds": seconds})  # fmt: skip
    elif not args.quiet:
        print(
            f"{out}: {size_text(before)} -> {size_text(after)}, {before / after:.2f}x smaller, "
            f"{seconds:.1f} s"
        )


def _print_json(value: Any) -> None:
    """JSON that every reader takes: what is no number becomes null."""
    print(json.dumps(_finite(value), indent=1))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    return [_finite(child) for child in value] if isinstance(value, (list, tuple)) else value


def _dry_run(args: Namespace, recipe: Recipe, source: Source) -> int:
    ours = source.kind == "jaxcompress"
    leaves = flatten(load_shapes(source.files[0]) if ours else source.tree)[0]
    whole = [leaf for _, leaf in leaves]
    leaves = smaller(leaves, recipe, _plan(args))
    hits = plan_rules(leaves, recipe, {})
    rows = []
    for (path, leaf), first, hit in zip(leaves, whole, hits):
        before = nbytes(first)
        rows.append(
            {
                "path": path,
                "shape": list(getattr(leaf, "shape", ())),
                "rule": hit.pattern if hit else None,
                "spec": repr(hit.spec) if hit else "dense",
                "before": before,
                # Before entropy coding; None where it depends on the values.
                "after": _expected(leaf, hit, recipe) if hit else nbytes(leaf),
            }
        )
    if args.json:
        _print_json({"recipe": recipe.name, "rows": rows})
    elif not args.quiet:
        _print_dry_run(rows)
    return 0


def _expected(leaf: Any, hit: Hit, recipe: Recipe) -> int | None:
    struct = leaf if is_compressed(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    try:
        return nbytes(jax.eval_shape(lambda x: hit.spec(x, hit.context(recipe.key(), 0)), struct))
    except ValuesNeededError:  # a rank by energy, a count of zeros
        return None


def _print_dry_run(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("leaf", "shape", "spec"):
        table.add_column(name, overflow="fold")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        after = "by values" if row["after"] is None else size_text(row["after"])
        table.add_row(Text(row["path"]), shape, Text(row["spec"]), size_text(row["before"]), after)
    known = [row for row in rows if row["after"] is not None]
    before, after = (sum(row[name] for row in known) for name in ("before", "after"))
    table.add_section()
    which = "" if len(known) == len(rows) else f" of {len(known)} of {len(rows)} leaves"
    table.add_row(f"total before coding{which}", "", "", size_text(before), size_text(after),
                  style="bold")  # fmt: skip
    _print(table)


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no width, and names should not be broken
    console.print(table)


def decompress_file(args: Namespace) -> int:
    """`jaxcompress decompress`."""
    source = open_source(vars(args)["in"])
    out = _target(args, source)
    start = time.perf_counter()
    export(out, source.tree, source.separator or ".", args.dtype)
    seconds = time.perf_counter() - start
    if args.json:
        _print_json({"out": str(out), "bytes": out.stat().st_size, "seconds": seconds})
    elif not args.quiet:
        print(f"{out}: {size_text(out.stat().st_size)}, {seconds:.1f} s")
    return 0


def inspect_file(args: Namespace) -> int:
    """`jaxcompress inspect`."""
    found = contents(args.file)
    if args.png:
        from jaxcompress.report.plots import draw_contents

        draw_contents(found, args.png)
    if args.json:
        _print_json(found.as_json())
    else:
        _print(found.tree() if args.tree else found)
    return 0


def diff_files(args: Namespace) -> int:
    """`jaxcompress diff`."""
    first, second = (open_source(path).tree for path in (args.a, args.b))
    show = sys.stderr.isatty() and not args.json
    with progress_bar(show, "comparing", len(flatten(first)[0])) as advance:
        found = diff(first, second, done=advance)
    if args.json:
        _print_json(
            {
                "rows": [{**row, "shape": list(row["shape"])} for row in found.rows],
                "only_first": found.only_first,
                "only_second": found.only_second,
            }
        )
    else:
        _print(found)
    within = args.max_relative is None or found.relative <= args.max_relative
    return 0 if within else 3


def show_recipe(args: Namespace) -> int:
    """`jaxcompress recipe show`."""
    if args.recipe is None:
        print(json.dumps(list(PRESETS)) if args.json else "\n".join(PRESETS))
        return 0
    text = Recipe.read(args.recipe).to_yaml()
    print(json.dumps({"yaml": text}) if args.json else text, end="\n" if args.json else "")
    return 0


def validate_recipe(args: Namespace) -> int:
    """`jaxcompress recipe validate`."""
    recipe = Recipe.read(args.recipe)
    told = {"recipe": args.recipe, "rules": len(recipe.rules)}
    if args.on:
        hits = plan_rules(flatten(open_source(args.on).tree)[0], recipe, {})
        told |= {"leaves": len(hits), "compressed": sum(hit is not None for hit in hits)}
    if args.json:
        _print_json(told)
    else:
        fits = f"; {told['compressed']} of {told['leaves']} leaves" if args.on else ""
        print(f"{args.recipe}: sound, {told['rules']} rules{fits}")
    return 0
