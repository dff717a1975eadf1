"""The config: what a mapping may hold, and which combinations are refused before any device is."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
import toy_run

from tlt_jax import config as config_lib
from tlt_jax import validation
from tlt_jax.config import (
    DrafterConfig,
    LearnerConfig,
    MeshConfig,
    PolicyConfig,
    RolloutConfig,
    RopeScaling,
    RunConfig,
)
from tlt_jax.types import Strategy, UserError

REPO = pathlib.Path(__file__).resolve().parent.parent


# Whatever the limits below are measured from; better defaults leave the tests as they are.
BASE = RunConfig(
    policy=PolicyConfig(
        vocab_size=64, width=128, num_heads=4, num_kv_heads=2, head_size=32, ffn_width=384
    ),
    mesh=MeshConfig(slices=2, tensor=1),
    rollout=RolloutConfig(
        prompts_per_step=4,
        group_size=8,
        max_prompt_length=24,
        max_response_length=424,
        row_buckets=(16, 8, 4, 2, 1),
        strategies=("chain-2", "chain-2", "chain-4", "chain-4", "chain-4"),
        length_buckets=(128, 256, 512),
        chunk_tokens=64,
    ),
    drafter=DrafterConfig(row_length=512),
    learner=LearnerConfig(row_length=512, microbatch_rows=2),
)


def _built(values):
    return config_lib.from_mapping(RunConfig, values)


def _changed(**groups):
    return toy_run.changed(BASE, **groups)


def test_a_config_survives_the_round_trip():
    config = _changed(
        seed=7,
        policy={"rope_scaling": RopeScaling(factor=8.0), "qkv_bias": True},
        rollout={"row_buckets": (16, 1), "strategies": ("plain", "chain-3"), "temperature": 0.5},
    )
    assert _built(dataclasses.asdict(config)) == config


def test_absent_keys_keep_their_defaults():
    config = _built({"rollout": {"top_k": 3}})
    assert config == RunConfig(rollout=RolloutConfig(top_k=3))


def test_whole_numbers_and_lists_are_taken_for_floats_and_tuples():
    config = _built({"rollout": {"temperature": 1, "length_buckets": [100, 200, 512]}})
    assert isinstance(config.rollout.temperature, float)
    assert config.rollout.length_buckets == (100, 200, 512)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sede": 1}, "unknown key 'config.sede': did you mean 'seed'?"),
        (
            {"rolout": {"temperature": 1.0}},
            "unknown key 'config.rolout': did you mean 'rollout'?",
        ),
        (
            {"rollout": {"temperatur": 1.0}},
            "unknown key 'config.rollout.temperatur': did you mean 'temperature'?",
        ),
        (
            {"policy": {"rope_scaling": {"facter": 1.0}}},
            "unknown key 'config.policy.rope_scaling.facter': did you mean 'factor'?",
        ),
        (
            {"checkpoint": {"xyz": 1}},
            "unknown key 'config.checkpoint.xyz': known: drafter_every, every, keep.",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(values, sentence):
    with pytest.raises(UserError) as raised:
        _built(values)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"seed": None}, "config.seed has no value; set it with --config.seed=VALUE."),
        (
            {"policy": {"rope_scaling": {"factor": None}}},
            "config.policy.rope_scaling.factor has no value; "
            "set it with --config.policy.rope_scaling.factor=VALUE.",
        ),
        (
            {"rollout": {"length_buckets": None}},
            "config.rollout.length_buckets has no value; set it with "
            "--config.rollout.length_buckets=VALUE.",
        ),
    ],
)
def test_an_unset_placeholder_says_how_to_set_it(values, sentence):
    with pytest.raises(UserError) as raised:
        _built(values)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"seed": 1.5}, "config.seed is 1.5; it must be of type int."),
        ({"seed": True}, "config.seed is True; it must be of type int."),
        ({"seed": "1"}, "config.seed is '1'; it must be of type int."),
        ({"warm_start_dir": 3}, "config.warm_start_dir is 3; it must be of type str."),
        ({"rollout": {"speculate": 1}}, "config.rollout.speculate is 1; it must be of type bool."),
        (
            {"rollout": {"temperature": True}},
            "config.rollout.temperature is True; it must be of type float.",
        ),
        (
            {"rollout": {"temperature": "hot"}},
            "config.rollout.temperature is 'hot'; it must be of type float.",
        ),
        (
            {"rollout": {"length_buckets": 4}},
            "config.rollout.length_buckets is 4; it must be a tuple, for example (8, 4, 1).",
        ),
        (
            {"rollout": {"length_buckets": "44"}},
            "config.rollout.length_buckets is '44'; it must be a tuple, for example (8, 4, 1).",
        ),
        (
            {"rollout": {"length_buckets": (4, 2.5)}},
            "config.rollout.length_buckets is 2.5; it must be of type int.",
        ),
        ({"policy": 3}, "config.policy is 3; it must be a group of keys."),
        ({"policy": None}, "config.policy is None; it must be a group of keys."),
    ],
)
def test_a_value_of_the_wrong_type_is_named(values, sentence):
    with pytest.raises(UserError) as raised:
        _built(values)
    assert str(raised.value) == sentence


def test_the_default_and_other_sound_configs_are_returned():
    for config in (
        RunConfig(),
        BASE,
        _changed(rollout={"top_k": 5, "top_p": 0.9}, mesh={"slices": 2, "tensor": 2}),
        _changed(rollout={"temperature": 0.0}),  # greedy
        _changed(
            rollout={"row_buckets": (16,), "strategies": ("plain",)},
            drafter={"rounds_per_microbatch": (3,)},
        ),
        _changed(drafter={"rounds_per_microbatch": ()}),  # measured
    ):
        assert validation.validate(config) is config


IMPOSSIBLE = [
    ("config.policy.num_layers", {"policy": {"num_layers": 0}}),
    ("config.policy.width", {"policy": {"width": 0}}),
    ("config.policy.num_heads", {"policy": {"num_heads": 0}}),
    ("config.policy.num_kv_heads", {"policy": {"num_kv_heads": -1}}),
    ("config.policy.head_size", {"policy": {"head_size": 0}}),
    ("config.policy.head_size", {"policy": {"head_size": 31}}),
    ("config.policy.ffn_width", {"policy": {"ffn_width": 0}}),
    ("config.policy.num_kv_heads=3", {"policy": {"num_kv_heads": 3}}),
    ("config.policy.dtype", {"policy": {"dtype": "float16"}}),
    ("config.mesh.slices", {"mesh": {"slices": 0}}),
    ("config.mesh.tensor", {"mesh": {"tensor": 0}}),
    ("config.policy.num_kv_heads=2", {"mesh": {"tensor": 4}}),
    ("config.policy.ffn_width=385", {"policy": {"ffn_width": 385}, "mesh": {"tensor": 2}}),
    ("config.policy.vocab_size=65", {"policy": {"vocab_size": 65}, "mesh": {"tensor": 2}}),
    ("config.policy.width=129", {"policy": {"width": 129}}),
    ("config.mesh.slices=3", {"mesh": {"slices": 3}, "policy": {"width": 129}}),
    ("config.rollout.group_size", {"rollout": {"group_size": 1}}),
    ("config.rollout.row_buckets", {"rollout": {"row_buckets": ()}}),
    ("config.rollout.row_buckets", {"rollout": {"row_buckets": (16, 16, 4, 2, 1)}}),
    ("config.rollout.row_buckets", {"rollout": {"row_buckets": (1, 2, 4, 8, 16)}}),
    ("config.rollout.row_buckets", {"rollout": {"row_buckets": (16, 8, 4, 2, 0)}}),
    ("config.rollout.strategies is ('plain',)", {"rollout": {"strategies": ("plain",)}}),
    (
        "config.rollout.strategies: there is no strategy 'chain'",
        {"rollout": {"strategies": ("plain",) * 4 + ("chain",)}},
    ),
    (
        "config.rollout.strategies: tree-2-65-70 asks for 65 different tokens",
        {"rollout": {"strategies": ("plain",) * 4 + ("tree-2-65-70",)}},
    ),
    (
        "config.rollout.strategies: there is no strategy 'chian-2'",
        {"rollout": {"strategies": ("plain",) * 4 + ("plain chian-2",)}},
    ),
    (
        "config.rollout.strategies has an entry 'chain-3 tree-3-1-4' that names a strategy twice",
        {"rollout": {"strategies": ("plain",) * 4 + ("chain-3 tree-3-1-4",)}},
    ),
    (
        "config.rollout.strategies has an empty entry",
        {"rollout": {"strategies": ("plain",) * 4 + (" ",)}},
    ),
    (
        "config.rollout.library_texts is 31; it must hold the sequences of a step, 32",
        {"rollout": {"strategies": ("plain ngram-4",) * 5, "library_texts": 31}},
    ),
    ("config.rollout.verification is 'exact'", {"rollout": {"verification": "exact"}}),
    (
        "has tree-2-2-5, but rejection sampling must verify whole trees; let it verify 7 tokens",
        {"rollout": {"verification": "rejection", "strategies": ("tree-2-2-5",) * 5}},
    ),
    ("config.rollout.epsilon is 1.5", {"rollout": {"epsilon": 1.5}}),
    ("config.rollout.free_tokens is 0.0", {"rollout": {"free_tokens": 0.0}}),
    ("config.rollout.threshold must be", {"rollout": {"threshold": -1}}),
    (
        "hold plain and another strategy in each bucket; the one of 16 rows has 'chain-2'",
        {"rollout": {"threshold": 4}},
    ),
    ("config.rollout.length_buckets", {"rollout": {"length_buckets": ()}}),
    ("config.rollout.length_buckets", {"rollout": {"length_buckets": (256, 128, 512)}}),
    ("config.rollout.length_buckets ends at 448", {"rollout": {"length_buckets": (128, 448)}}),
    ("config.rollout.length_buckets starts at 33", {"rollout": {"length_buckets": (33, 512)}}),
    ("config.rollout.temperature", {"rollout": {"temperature": -0.1}}),
    ("config.rollout.temperature", {"rollout": {"temperature": float("nan")}}),
    ("config.rollout.top_p", {"rollout": {"top_p": 0.0}}),
    ("config.rollout.top_p", {"rollout": {"top_p": 1.1}}),
    ("config.rollout.top_k", {"rollout": {"top_k": -1}}),
    ("config.rollout.chunk_tokens", {"rollout": {"chunk_tokens": 4}}),
    ("config.learner.row_length=447", {"learner": {"row_length": 447}}),
    ("config.drafter.row_length=447", {"drafter": {"row_length": 447}}),
    ("config.learner.microbatch_rows=3", {"learner": {"microbatch_rows": 3}}),
    ("config.learner.aggregation", {"learner": {"aggregation": "mean"}}),
    ("config.learner.decay", {"learner": {"decay": "exponential"}}),
    ("config.drafter.rounds_per_microbatch", {"drafter": {"rounds_per_microbatch": (1, 2, 3, 0)}}),
    (
        "is (1, 2); it must hold 1 or more for each of the 5 row buckets, or nothing",
        {"drafter": {"rounds_per_microbatch": (1, 2)}},
    ),
    (
        "config.drafter.rounds_per_microbatch is 13 for 1 rows",
        {"rollout": {"chunk_tokens": 60}, "drafter": {"rounds_per_microbatch": (1, 2, 3, 4, 13)}},
    ),
    ("config.drafter.microbatch_tokens", {"drafter": {"microbatch_tokens": 100}}),
    ("config.drafter.microbatch_tokens", {"drafter": {"microbatch_tokens": 0}}),
    ("row_length=512 tokens takes 0.2683", {"drafter": {"buffer_megabytes": 0.2}}),
    ("config.drafter.microbatch_rows", {"drafter": {"microbatch_rows": 0}}),
    ("config.drafter.ffn_width", {"drafter": {"ffn_width": 0}}),
    ("config.drafter.train_depth", {"drafter": {"train_depth": 0}}),
    ("config.drafter.train_depth is 2, but", {"drafter": {"train_depth": 2}}),
    ("config.drafter.train_depth is 1, but", {"drafter": {"objective": "hass"}}),
    ("did you mean 'eagle3'", {"drafter": {"objective": "eagel3"}}),
    ("config.drafter.objective is 'eagle3', which", {"drafter": {"objective": "eagle3"}}),
    ("config.policy.feature_layers is (1, 16)", {"policy": {"feature_layers": (1, 16)}}),
    ("config.policy.feature_layers is (3, 3)", {"policy": {"feature_layers": (3, 3)}}),
    ("config.checkpoint.every", {"checkpoint": {"every": 0}}),
    ("config.checkpoint.drafter_every", {"checkpoint": {"drafter_every": 0}}),
    ("config.checkpoint.keep", {"checkpoint": {"keep": 0}}),
    ("config.policy.vocab_size", {"policy": {"vocab_size": 0}}),
    ("config.policy.attention_backend", {"policy": {"attention_backend": "refrence"}}),
    ("config.rollout.prompts_per_step", {"rollout": {"prompts_per_step": 0}}),
    ("config.rollout.max_prompt_length", {"rollout": {"max_prompt_length": 0}}),
    ("config.rollout.max_response_length", {"rollout": {"max_response_length": 0}}),
    ("config.learner.microbatch_rows", {"learner": {"microbatch_rows": 0}}),
    ("config.learner.updates_per_step", {"learner": {"updates_per_step": 0}}),
    ("config.warm_start.batch_rows", {"warm_start": {"batch_rows": 3}}),
]


@pytest.mark.parametrize(
    ("sentence", "changes"),
    [
        (
            "config.rollout.chunk_tokens is 64; the benchmark drafts 72 deep",
            {"benchmark": {"strategies": ("chain-2", "chain-72")}},
        ),
        (
            "config.benchmark.other_chunk_tokens is 4; the benchmark drafts 4 deep",
            {"benchmark": {"other_chunk_tokens": 4}},
        ),
        ("config.benchmark.strategies is", {"benchmark": {"strategies": ()}}),
        ("name one or more", {"benchmark": {"grid_strategies": ("plain", "chain-2")}}),
        ("none of them twice", {"benchmark": {"strategies": ("chain-3", "tree-3-1-4")}}),
        ("config.benchmark.repeats is 0", {"benchmark": {"repeats": 0}}),
        ("config.benchmark.min_tokens is 3", {"benchmark": {"min_tokens": 3}}),
        ("config.benchmark.small_batch is 0", {"benchmark": {"small_batch": 0}}),
        ("config.benchmark.grid_rows is", {"benchmark": {"grid_rows": (4, 0)}}),
        ("config.benchmark.temperatures is", {"benchmark": {"temperatures": ()}}),
        ("has tree-2-2-5; it must be", {"benchmark": {"draft_strategies": ("tree-2-2-5",)}}),
        ("has ngram-2; it must be", {"benchmark": {"draft_strategies": ("ngram-2",)}}),
        (
            "config.benchmark.strategies: strategy verifies 99 tokens",
            {"benchmark": {"strategies": ("tree-2-2-99",)}},
        ),
    ],
)
def test_the_benchmark_refuses_what_a_run_need_not(sentence, changes):
    config = validation.validate(_changed(**changes))
    with pytest.raises(UserError, match=sentence):
        validation.validate_benchmark(config)


@pytest.mark.parametrize(("key", "changes"), IMPOSSIBLE, ids=[str(c) for _, c in IMPOSSIBLE])
def test_an_impossible_combination_names_its_key(key, changes):
    with pytest.raises(UserError) as raised:
        validation.validate(_changed(**changes))
    assert key in str(raised.value)


def test_what_just_fits_is_not_refused():
    validation.validate(
        _changed(learner={"row_length": 448}, drafter={"row_length": 448, "microbatch_tokens": 64})
    )
    validation.validate(_changed(rollout={"length_buckets": (34, 453)}))
    prices = {"rounds_per_microbatch": (1, 1, 1, 1, 1)}
    validation.validate(_changed(rollout={"chunk_tokens": 5}, drafter=prices))
    prices = {"rounds_per_microbatch": (1, 1, 1, 1, 12)}
    validation.validate(_changed(rollout={"chunk_tokens": 60}, drafter=prices))


def test_checks_touch_no_device():
    """With a platform that does not exist, whatever needs a device fails."""
    script = (
        "import jax\n"
        "from tlt_jax import config, validation\n"
        "validation.validate(config.from_mapping(config.RunConfig, {'rollout': {'top_k': 3}}))\n"
        "try:\n"
        "    jax.devices()\n"
        "except RuntimeError:\n"
        "    print('no device was there to be used')\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "no device was there to be used\n", done.stderr


def test_rollout_figures_by_hand():
    rollout = _changed(
        rollout={
            "prompts_per_step": 3,
            "group_size": 5,
            "max_prompt_length": 10,
            "max_response_length": 90,
            "row_buckets": (8, 2),
            "strategies": ("plain chain-3", "chain-3"),
            "chunk_tokens": 18,
        }
    ).rollout
    assert (rollout.num_sequences, rollout.max_length, rollout.slack) == (15, 100, 4)
    assert [rollout.arms(rows) for rows in (8, 2)] == [(Strategy(0), Strategy(3)), (Strategy(3),)]
    assert [rollout.rounds(Strategy(depth)) for depth in (0, 3)] == [18, 4]
    plain = dataclasses.replace(rollout, speculate=False)
    assert plain.arms(2) == (Strategy(0),)


@pytest.mark.parametrize(
    ("top_k", "top_p", "filtered"), [(0, 1.0, False), (1, 1.0, True), (0, 0.9, True)]
)
def test_filters_are_part_of_the_programs_only_where_asked_for(top_k, top_p, filtered):
    assert _changed(rollout={"top_k": top_k, "top_p": top_p}).rollout.filtered == filtered
