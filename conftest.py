"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import jax
import pytest

# The first example compiles; how long that takes is no property of the code.
hypothesis.settings.register_profile("jaxcompress", deadline=None)
hypothesis.settings.load_profile("jaxcompress")

# Tests compile thousands of small programs, the same ones each time: each is compiled once, and
# read from a folder by other workers, later runs, and processes that tests start.
_KEPT = {
    "jax_compilation_cache_dir": str(Path(__file__).parent / ".cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for _name, _value in _KEPT.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)

_MAPS = Path("/proc/self/maps")
# Linux allows a process 65,530 mappings, and each compiled program takes a few: beyond that, XLA
# cannot compile any more and the process dies.
_MOST, _EVERY = 20_000, 20
_count = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Forgets compiled programs before there are too many of them."""
    global _count
    _count += 1
    if _count % _EVERY == 0 and _MAPS.exists():
        with _MAPS.open("rb") as maps:
            many = sum(1 for _ in maps) > _MOST
        if many:
            jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `thin(n)`, `make test` runs every n-th case that is not slow anyway."""
    seen: dict[str, int] = {}
    for item in items:
        mark = item.get_closest_marker("thin")
        if mark is None or item.get_closest_marker("slow"):
            continue
        name = item.nodeid.partition("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if seen[name] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
