"""All compiled programs of a run, made from one place so that none is compiled by surprise."""

import concurrent.futures
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from typing import Any

import jax


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, to compile for without holding data."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a program is made: `build()` gives the jitted function to compile for `arguments`."""

    key: Hashable
    build: Callable[[], Any]
    arguments: tuple[Any, ...]  # arrays, or what `abstract` makes of them

    def compile(self) -> Any:
        return self.build().lower(*abstract(self.arguments)).compile()


class ProgramPool:
    """Programs by key, each compiled once: ordered ahead of need, or when asked for.

    What is ordered is compiled in the background, in the order given, on as many threads as there
    are cores. `compiled` counts compilations; `surprises` those that nobody had ordered; `waited`
    is seconds that `get` took for programs that were not there yet.
    """

    def __init__(self) -> None:
        self._programs: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()
        self.compiled = 0
        self.surprises = 0
        self.waited = 0.0

    def order(self, recipes: Iterable[Recipe]) -> None:
        """Has programs compiled in the background, those that are here or ordered left out."""
        threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        with self._lock:
            for recipe in recipes:
                if recipe.key not in self._programs:
                    kept = dataclasses.replace(recipe, arguments=abstract(recipe.arguments))
                    self._programs[recipe.key] = threads.submit(self._make, kept)
        threads.shutdown(wait=False)  # they end with the last program

    def get(self, recipe: Recipe) -> Any:
        """The program of a recipe, compiled here and now unless somebody has begun with it."""
        with self._lock:
            begun = self._programs.get(recipe.key)
            self.surprises += begun is None
            if begun is not None and begun.cancel():
                del self._programs[recipe.key]
                begun = None
        if begun is not None and begun.done():
            return begun.result()
        start = time.monotonic()
        try:
            return begun.result() if begun is not None else self._make_here(recipe)
        finally:
            self.waited += time.monotonic() - start

    def clock(self) -> float:
        """Monotonic seconds, without those that were waited for programs."""
        return time.monotonic() - self.waited

    def wait(self) -> None:
        """Returns when all that was ordered is compiled; raises what a compilation raised."""
        for future in list(self._programs.values()):
            future.result()

    @property
    def busy(self) -> bool:
        """Whether anything that was ordered is not compiled yet."""
        return not all(future.done() for future in list(self._programs.values()))

    def cancel(self) -> None:
        """Leaves what was ordered and nobody has begun to compile; it may be ordered again."""
        with self._lock:
            kept = {key: made for key, made in self._programs.items() if not made.cancel()}
            self._programs = kept

    def clear(self) -> None:
        """Forgets all programs, ordered ones too; a process on CPU may hold only so many."""
        self.cancel()
        self._programs = {}

    def __len__(self) -> int:
        return len(self._programs)

    def _make_here(self, recipe: Recipe) -> Any:
        made: Future[Any] = Future()
        made.set_result(self._make(recipe))
        with self._lock:
            self._programs[recipe.key] = made
        return made.result()

    def _make(self, recipe: Recipe) -> Any:
        program = recipe.compile()
        with self._lock:
            self.compiled += 1
        return program
