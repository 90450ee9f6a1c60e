"""The command line; see `jaxcompress --help`."""

from jaxcompress.cli.main import main

__all__ = ["main"]
