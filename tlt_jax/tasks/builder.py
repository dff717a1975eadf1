"""The TensorFlow Datasets builder that all tasks share; TensorFlow itself is not needed.

A task supplies two pure functions, `draw_prompt` and `demonstrate`. The builder draws prompts of
mixed difficulty from them, keeps the test prompts out of the training split, and writes
(prompt, demonstration) pairs as array records, which can be read in any order.
"""

import abc
import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

NUM_TRAIN = 20_000
NUM_TEST = 1_000

_SEED = 2511
_TEST_ONE_IN = 16


@dataclasses.dataclass(eq=False, kw_only=True)
class MixConfig(tfds.core.BuilderConfig):
    """A difficulty mix: how often each problem size is drawn, and how many examples are made."""

    sizes: dict[int, float]  # numbers in the problem -> weight; weights sum to 1
    num_train: int = NUM_TRAIN
    num_test: int = NUM_TEST

    def resized(self, *, num_train: int, num_test: int) -> "MixConfig":
        """The same mix with other split sizes, under a name (and so a directory) of its own."""
        if (num_train, num_test) == (self.num_train, self.num_test):
            return self
        name = f"{self.name}-{num_train}-{num_test}"
        return MixConfig(name=name, sizes=self.sizes, num_train=num_train, num_test=num_test)


class TaskBuilder(tfds.core.GeneratorBasedBuilder):
    """Generates one task's examples: {"prompt": text, "demonstration": text}.

    Everything is a function of the mix and a fixed seed, so two machines make the same data.
    Raise VERSION in the subclass whenever the generated text changes.
    """

    BUILDER_CONFIGS: list[MixConfig]

    @staticmethod
    @abc.abstractmethod
    def draw_prompt(rng: np.random.Generator, size: int) -> str:
        """Draws the prompt of a random problem with `size` numbers."""

    @staticmethod
    @abc.abstractmethod
    def demonstrate(rng: np.random.Generator, prompt: str) -> str:
        """Writes a response to `prompt` as the task's imperfect author would."""

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Synthetic reasoning task {self.name!r}.",
            features=tfds.features.FeaturesDict({"prompt": text, "demonstration": text}),
            disable_shuffling=True,  # examples are independent draws; readers shuffle
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        config = self.builder_config
        return {
            "train": self._generate_examples(test=False, count=config.num_train),
            "test": self._generate_examples(test=True, count=config.num_test),
        }

    def _generate_examples(self, *, test: bool, count: int) -> Iterator[tuple[int, dict[str, str]]]:
        rng = np.random.default_rng([_SEED, test])
        sizes = list(self.builder_config.sizes)
        thresholds = np.cumsum([self.builder_config.sizes[size] for size in sizes])
        made = 0
        while made < count:
            size = sizes[int(np.searchsorted(thresholds[:-1], rng.random(), side="right"))]
            prompt = self.draw_prompt(rng, size)
            if _is_test_prompt(prompt) != test:
                continue
            yield made, {"prompt": prompt, "demonstration": self.demonstrate(rng, prompt)}
            made += 1


def _is_test_prompt(prompt: str) -> bool:
    """Splits the space of all prompts by a hash, so that no prompt is in both splits.

    The words are sorted first: the same numbers in another order are the same problem.
    """
    problem = " ".join(sorted(prompt.split(" ")))
    return zlib.crc32(problem.encode()) % _TEST_ONE_IN == 0
