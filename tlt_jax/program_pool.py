"""All compiled programs of a run, made from one place so that none is compiled by surprise."""

import concurrent.futures
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, to compile for without holding data."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class ProgramPool:
    """Programs by key, each compiled once.

    `compiled` counts compilations; a step that raises it after warm-up had a surprise.
    """

    def __init__(self) -> None:
        self._programs: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self.compiled = 0

    def get(self, key: Hashable, build: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        """The program of `key`; `build()` gives a jitted function to compile for `arguments`."""
        with self._lock:
            program = self._programs.get(key)
        if program is None:
            program = build().lower(*abstract(arguments)).compile()
            with self._lock:
                self._programs[key] = program
                self.compiled += 1
        return program

    def warm_up(self, jobs: Iterable[Callable[[], Any]]) -> None:
        """Runs jobs that each call `get`, on as many threads as there are cores."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            for done in [threads.submit(job) for job in jobs]:
                done.result()

    def clear(self) -> None:
        """Forgets all programs; a process on CPU may hold only so many."""
        with self._lock:
            self._programs.clear()

    def __len__(self) -> int:
        return len(self._programs)
