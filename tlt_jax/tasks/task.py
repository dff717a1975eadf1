"""What a reasoning task is, and the table of the tasks that exist.

A new task is one file, shaped like `pairs.py`, and one line in `_MODULES`.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable

from tlt_jax.tasks.builder import TaskBuilder
from tlt_jax.tasks.tokenizer import Tokenizer
from tlt_jax.types import UserError

_MODULES = {
    "countdown": "tlt_jax.tasks.countdown",
    "pairs": "tlt_jax.tasks.pairs",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A dataset of prompts, demonstrations of them, and a rule that rewards a response."""

    name: str
    tokenizer: Tokenizer
    builder_cls: type[TaskBuilder]
    reward_fn: Callable[[str, str], float]  # (prompt text, response text) -> 0.0 or 1.0
    max_prompt_tokens: int  # tokens, the leading bos included, over all mixes


def get_task(name: str) -> Task:
    """Returns the task called `name`, importing its module on first use.

    Raises:
      UserError: there is no such task.
    """
    if name not in _MODULES:
        raise UserError(unknown_name("task", name, _MODULES))
    return importlib.import_module(_MODULES[name]).TASK


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence that names the nearest of the `known` names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"there is no {kind} {name!r}; did you mean {near[0]!r}? Known: {', '.join(known)}."
