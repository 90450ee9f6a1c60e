"""The command line: arguments, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

import shtab

from jaxcompress._version import __version__
from jaxcompress.checkpoint.export import FORMATS
from jaxcompress.cli import commands
from jaxcompress.errors import CompressError
from jaxcompress.recipes import PRESETS

EXIT_CODES = """\
exit codes:
  0  done
  1  the input, the recipe or the disk is at fault; one line on standard error says what to do
  2  the command line is wrong
  3  diff: the files differ by more than was allowed
  130  interrupted; nothing was left half written
"""
_INPUT = (
    "a safetensors file, a Hugging Face folder or index, .npz, Flax .msgpack, an Orbax folder, or "
    "a file of jaxcompress"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not have all letters of a name
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        for name in args.imports:
            importlib.import_module(name)
        return int(args.run(args))
    except RecursionError:
        print("jaxcompress: the tree is nested too deeply", file=sys.stderr)
        return 1
    except (CompressError, ImportError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"jaxcompress: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxcompress: interrupted", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="jaxcompress",
        description="Compress the weights of neural networks, and look into compressed files. "
        "Works on weights alone: the code of the model is never needed.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxcompress {__version__}")
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script")
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="import a Python module first, for the leaf types and specs that it registers",
    )  # fmt: skip
    subs = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compress(subs)
    _add_decompress(subs)
    _add_inspect(subs)
    _add_diff(subs)
    _add_recipe(subs)
    return parser


def _path(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    action = parser.add_argument(name, metavar=name.upper(), help=text)
    action.complete = shtab.FILE  # type: ignore[attr-defined]


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")


def _add_compress(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subs.add_parser(
        "compress", help="make weights smaller by a recipe",
        description="Compresses weights leaf by leaf, so that a file larger than memory will do.",
    )  # fmt: skip
    _path(parser, "in", _INPUT)
    _path(parser, "out", "the file to write; it is a safetensors file with a checked header")
    action = parser.add_argument(
        "--recipe", "-r", required=True, metavar="FILE|PRESET",
        help=f"a YAML file, a file that a recipe made, or one of {', '.join(PRESETS)}",
    )  # fmt: skip
    action.complete = shtab.FILE  # type: ignore[attr-defined]
    action = parser.add_argument(
        "--plan", metavar="FILE",
        help="channels to remove first: a plan as its to_json() in Python writes it",
    )  # fmt: skip
    action.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument("--uncoded", action="store_true",
                        help="no entropy coding: a larger file that loads faster")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="only say what would be done to which leaf")  # fmt: skip
    parser.add_argument("--quiet", "-q", action="store_true", help="print nothing")
    _common(parser)
    parser.set_defaults(run=commands.compress_file)


def _add_decompress(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subs.add_parser("decompress", help="write dense weights for other tools")
    _path(parser, "in", "a file of jaxcompress, or anything that compress takes")
    _path(parser, "out", f"the file to write; its suffix says the format: {', '.join(FORMATS)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="cast floating leaves")  # fmt: skip
    parser.add_argument("--quiet", "-q", action="store_true", help="print nothing")
    _common(parser)
    parser.set_defaults(run=commands.decompress_file)


def _add_inspect(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subs.add_parser("inspect", help="show what is in a file, and where its bytes are")
    _path(parser, "file", _INPUT)
    parser.add_argument("--tree", action="store_true", help="as a tree, with sums by branch")
    parser.add_argument("--png", metavar="OUT", help="draw it as well (needs matplotlib)")
    _common(parser)
    parser.set_defaults(run=commands.inspect_file)


def _add_diff(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subs.add_parser("diff", help="compare two files leaf by leaf")
    _path(parser, "a", "the original")
    _path(parser, "b", "what became of it")
    parser.add_argument(
        "--max-relative", type=float, metavar="X",
        help="exit with 3 if a leaf is missing or its relative error is above X",
    )  # fmt: skip
    _common(parser)
    parser.set_defaults(run=commands.diff_files)


def _add_recipe(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subs.add_parser("recipe", help="show or check a recipe")
    inner = parser.add_subparsers(required=True, metavar="COMMAND")
    show = inner.add_parser("show", help="print a recipe as YAML; without a name, list the presets")
    show.add_argument("recipe", nargs="?", metavar="FILE|PRESET",
                      help="a YAML file, a file that a recipe made, or a preset")  # fmt: skip
    _common(show)
    show.set_defaults(run=commands.show_recipe)
    validate = inner.add_parser("validate", help="say whether a recipe is sound")
    validate.add_argument("recipe", metavar="FILE|PRESET", help="a YAML file or a preset")
    validate.add_argument("--on", metavar="WEIGHTS", help="and whether it fits these weights")
    _common(validate)
    validate.set_defaults(run=commands.validate_recipe)
