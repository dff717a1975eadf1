"""Fixtures of the task tests."""

import numpy as np
import pytest


@pytest.fixture
def draw_batch():
    """Function (task, mix, count) -> lengths [count] in tokens incl. eos, rewards [count]."""

    def draw(task, mix, count):
        (config,) = (c for c in task.builder_cls.BUILDER_CONFIGS if c.name == mix)
        rng = np.random.default_rng(7)
        sizes = rng.choice(list(config.sizes), p=list(config.sizes.values()), size=count)
        prompts = [task.builder_cls.draw_prompt(rng, int(size)) for size in sizes]
        responses = [task.builder_cls.demonstrate(rng, prompt) for prompt in prompts]
        lengths = [len(task.tokenizer.encode(response)) + 1 for response in responses]
        return np.array(lengths), np.array(list(map(task.reward_fn, prompts, responses)))

    return draw
