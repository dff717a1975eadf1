"""Checks that the parts of a configuration fit together; they need no device."""

import math
from collections.abc import Iterable

from tlt_jax.config import MeshConfig, PolicyConfig, RolloutConfig, RunConfig, nearest
from tlt_jax.types import Strategy, UserError

OBJECTIVES = ("eagle", "hass", "eagle3")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def validate(config: RunConfig) -> RunConfig:
    """Returns `config` if its parts fit together; compiles nothing.

    Raises:
      UserError: the first impossible combination found.
    """
    _validate_policy(config.policy, config.mesh)
    _validate_rollout(config.rollout, config.mesh, config.policy)
    _validate_training(config)
    return config


def _validate_policy(policy: PolicyConfig, mesh: MeshConfig) -> None:
    sizes = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_size")
    for name in (*sizes, "ffn_width"):
        value = getattr(policy, name)
        _require(value > 0, f"config.policy.{name} is {value}; it must be at least 1.")
    _require(
        policy.num_heads % policy.num_kv_heads == 0,
        f"config.policy.num_heads={policy.num_heads} must be a multiple of "
        f"config.policy.num_kv_heads={policy.num_kv_heads}.",
    )
    _require(
        policy.attention_backend in ("reference", "tpu"),
        f"config.policy.attention_backend is '{policy.attention_backend}'; it must be 'reference' "
        "or 'tpu'.",
    )
    _require(policy.head_size % 2 == 0, "config.policy.head_size must be even (RoPE pairs).")
    _require(
        policy.dtype in ("float32", "bfloat16"),
        f"config.policy.dtype is '{policy.dtype}'; it must be 'float32' or 'bfloat16'.",
    )
    for axis in ("slices", "tensor"):
        size = getattr(mesh, axis)
        _require(size >= 1, f"config.mesh.{axis} is {size}; it must be at least 1.")
    for name in ("num_kv_heads", "ffn_width", "vocab_size"):
        _require(
            getattr(policy, name) % mesh.tensor == 0,
            f"config.policy.{name}={getattr(policy, name)} must be a multiple of "
            f"config.mesh.tensor={mesh.tensor}, the axis it is sharded over.",
        )
    _require(
        policy.width % mesh.slices == 0,
        f"config.policy.width={policy.width} must be a multiple of config.mesh.slices="
        f"{mesh.slices}: training shards parameters over both axes.",
    )


def _validate_rollout(rollout: RolloutConfig, mesh: MeshConfig, policy: PolicyConfig) -> None:
    for name in ("prompts_per_step", "max_prompt_length", "max_response_length"):
        value = getattr(rollout, name)
        _require(value >= 1, f"config.rollout.{name} is {value}; it must be at least 1.")
    _require(
        rollout.num_sequences % mesh.slices == 0,
        f"config.rollout has {rollout.prompts_per_step} x {rollout.group_size} = "
        f"{rollout.num_sequences} sequences; they must be a multiple of config.mesh.slices="
        f"{mesh.slices}.",
    )
    _require(rollout.group_size >= 2, "config.rollout.group_size must be at least 2 (GRPO groups).")
    buckets = rollout.row_buckets
    _require(
        list(buckets) == sorted(set(buckets), reverse=True) and bool(buckets) and buckets[-1] >= 1,
        f"config.rollout.row_buckets is {buckets}; it must fall strictly and end at 1 or more.",
    )
    _require(
        len(rollout.strategies) == len(buckets),
        f"config.rollout.strategies is {rollout.strategies}; it must hold one strategy, or several "
        f"with blanks between, for each of the {len(buckets)} row buckets.",
    )
    for texts in rollout.strategies:
        _require(bool(texts.split()), "config.rollout.strategies has an empty entry; name one.")
        _check_strategies("config.rollout.strategies", texts.split(), policy)
        arms = [Strategy.parse(text) for text in texts.split()]
        _require(
            len(set(arms)) == len(arms),
            f"config.rollout.strategies has an entry '{texts}' that names a strategy twice.",
        )
    _validate_choice(rollout)
    _require(
        not rollout.uses_ngram or rollout.library_texts >= rollout.num_sequences,
        f"config.rollout.library_texts is {rollout.library_texts}; it must hold the sequences of a "
        f"step, {rollout.num_sequences}.",
    )
    lengths = rollout.length_buckets
    slack = rollout.slack
    _require(
        bool(lengths) and list(lengths) == sorted(set(lengths)),
        f"config.rollout.length_buckets is {lengths}; it must rise strictly.",
    )
    _require(
        lengths[-1] >= rollout.max_length + slack,
        f"config.rollout.length_buckets ends at {lengths[-1]} tokens; prompt and response "
        f"({rollout.max_length}) and the drafts beyond them need {rollout.max_length + slack}.",
    )
    _require(
        lengths[0] >= rollout.max_prompt_length + 2 * slack,
        f"config.rollout.length_buckets starts at {lengths[0]} tokens, which leaves a prompt of "
        f"{rollout.max_prompt_length} no room to grow.",
    )
    _require(rollout.temperature >= 0, "config.rollout.temperature must be 0 (greedy) or more.")
    _require(0 < rollout.top_p <= 1, f"config.rollout.top_p is {rollout.top_p}; use (0, 1].")
    _require(rollout.top_k >= 0, "config.rollout.top_k must be 0 (off) or more.")
    _require(
        rollout.chunk_tokens > rollout.deepest,
        f"config.rollout.chunk_tokens is {rollout.chunk_tokens}; one round of the deepest strategy "
        f"can add {rollout.deepest + 1} tokens.",
    )


def _validate_choice(rollout: RolloutConfig) -> None:
    _require(
        rollout.verification in ("coupled", "rejection"),
        f"config.rollout.verification is '{rollout.verification}'; use 'coupled' or 'rejection'.",
    )
    _require(
        rollout.shared_noise or not rollout.rejection,
        "config.rollout.shared_noise is False, but rejection sampling draws its drafts with noise "
        "of their own; leave it True, or use config.rollout.verification=coupled.",
    )
    for arm in rollout.all_arms if rollout.rejection else ():
        _require(
            arm.verify_tokens == 1 + arm.candidates,
            f"config.rollout.strategies has {arm}, but rejection sampling must verify whole trees; "
            f"let it verify {1 + arm.candidates} tokens.",
        )
    _require(0 <= rollout.epsilon <= 1, f"config.rollout.epsilon is {rollout.epsilon}; use [0, 1].")
    _require(
        rollout.free_tokens > 0,
        f"config.rollout.free_tokens is {rollout.free_tokens}; it must be above 0.",
    )
    _require(rollout.threshold >= 0, "config.rollout.threshold must be 0 (off) or more live rows.")
    for rows in rollout.row_buckets if rollout.threshold and rollout.speculate else ():
        drafting = [not arm.is_plain for arm in rollout.arms(rows)]
        _require(
            any(drafting) and not all(drafting),
            f"config.rollout.threshold is {rollout.threshold}, so config.rollout.strategies must "
            f"hold plain and another strategy in each bucket; the one of {rows} rows has "
            f"'{' '.join(map(str, rollout.arms(rows)))}'.",
        )


def validate_benchmark(config: RunConfig) -> None:
    """Further checks for the benchmark, which drafts deeper than a run may.

    Raises:
      UserError: the first impossible combination found.
    """
    benchmark, rollout = config.benchmark, config.rollout
    for name in ("strategies", "grid_strategies", "draft_strategies"):
        named = getattr(benchmark, name)
        _check_strategies(f"config.benchmark.{name}", named, config.policy)
        arms = {Strategy.parse(text) for text in named}
        _require(
            bool(arms) and len(arms) == len(named) and Strategy() not in arms,
            f"config.benchmark.{name} is {named}; name one or more, none of them twice, and leave "
            "out plain, which always runs.",
        )
    for name, least in (("repeats", 1), ("min_tokens", 4), ("small_batch", 1)):
        value = getattr(benchmark, name)
        _require(value >= least, f"config.benchmark.{name} is {value}; it must be {least} or more.")
    _require(
        min(benchmark.grid_rows, default=0) >= 1,
        f"config.benchmark.grid_rows is {benchmark.grid_rows}; name one or more numbers of rows.",
    )
    _require(
        min(benchmark.temperatures, default=-1.0) >= 0,
        f"config.benchmark.temperatures is {benchmark.temperatures}; name one or more, 0 or above.",
    )
    for arm in map(Strategy.parse, benchmark.draft_strategies):
        _require(
            not arm.ngram and arm.verify_tokens == 1 + arm.candidates > 1,
            f"config.benchmark.draft_strategies has {arm}; it must be a chain or a whole tree of "
            "the trained drafter, for rejection sampling verifies no others.",
        )
    every = (*benchmark.strategies, *benchmark.grid_strategies, *benchmark.draft_strategies)
    deepest = max(Strategy.parse(text).depth for text in every)
    for name, tokens, depth in (
        ("rollout.chunk_tokens", rollout.chunk_tokens, deepest),
        ("benchmark.other_chunk_tokens", benchmark.other_chunk_tokens, rollout.deepest),
    ):
        _require(
            tokens > depth,
            f"config.{name} is {tokens}; the benchmark drafts {depth} deep in such chunks, and a "
            f"round of that can add {depth + 1} tokens.",
        )


def _check_strategies(where: str, strategies: Iterable[str], policy: PolicyConfig) -> None:
    for text in strategies:
        try:
            strategy = Strategy.parse(text)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        _require(
            strategy.top_k <= policy.vocab_size,
            f"{where}: {text} asks for {strategy.top_k} different tokens, but config.policy."
            f"vocab_size is {policy.vocab_size}.",
        )


def _validate_training(config: RunConfig) -> None:
    learner, drafter = config.learner, config.drafter
    longest = config.rollout.max_length
    for where, length in (("learner", learner.row_length), ("drafter", drafter.row_length)):
        _require(
            length >= longest,
            f"config.{where}.row_length={length} must hold the longest sequence, {longest} tokens.",
        )
    for name in ("microbatch_rows", "updates_per_step"):
        value = getattr(learner, name)
        _require(value >= 1, f"config.learner.{name} is {value}; it must be at least 1.")
    _require(
        config.warm_start.batch_rows % config.mesh.slices == 0,
        f"config.warm_start.batch_rows={config.warm_start.batch_rows} must be a multiple of "
        f"config.mesh.slices={config.mesh.slices}.",
    )
    _require(
        learner.microbatch_rows % config.mesh.slices == 0,
        f"config.learner.microbatch_rows={learner.microbatch_rows} must be a multiple of "
        f"config.mesh.slices={config.mesh.slices}.",
    )
    _require(
        learner.aggregation in ("token", "sequence"),
        f"config.learner.aggregation is '{learner.aggregation}'; use 'token' or 'sequence'.",
    )
    _require(
        learner.decay in ("constant", "cosine", "linear"),
        f"config.learner.decay is '{learner.decay}'; use 'constant', 'cosine' or 'linear'.",
    )
    prices, buckets = drafter.rounds_per_microbatch, config.rollout.row_buckets
    _require(
        not prices or (len(prices) == len(buckets) and min(prices) >= 1),
        f"config.drafter.rounds_per_microbatch is {prices}; it must hold 1 or more for each of the "
        f"{len(buckets)} row buckets, or nothing, which has prices measured.",
    )
    for rows, price in zip(buckets, prices, strict=bool(prices)):
        rounds = min(config.rollout.rounds(arm) for arm in config.rollout.arms(rows))
        _require(
            not drafter.train or config.mesh.slices == 1 or price <= rounds,
            f"config.drafter.rounds_per_microbatch is {price} for {rows} rows, but a chunk of "
            f"config.rollout.chunk_tokens={config.rollout.chunk_tokens} has {rounds} rounds: no "
            "idle slice would ever train.",
        )
    _require(
        drafter.microbatch_tokens >= 1 and drafter.row_length % drafter.microbatch_tokens == 0,
        f"config.drafter.microbatch_tokens is {drafter.microbatch_tokens}; it must be a divisor of "
        f"config.drafter.row_length={drafter.row_length}.",
    )
    for name in ("microbatch_rows", "train_depth", "ffn_width"):
        value = getattr(drafter, name)
        _require(value >= 1, f"config.drafter.{name} is {value}; it must be at least 1.")
    row = drafter.row_megabytes(config.policy)
    _require(
        drafter.buffer_rows(config.policy) >= 1,
        f"config.drafter.buffer_megabytes is {drafter.buffer_megabytes}; a row of "
        f"config.drafter.row_length={drafter.row_length} tokens takes {row:.4g}: give a multiple.",
    )
    _validate_objective(config)
    for name in ("every", "drafter_every", "keep"):
        value = getattr(config.checkpoint, name)
        _require(value >= 1, f"config.checkpoint.{name} is {value}; it must be at least 1.")


def _validate_objective(config: RunConfig) -> None:
    drafter, layers = config.drafter, config.policy.feature_layers
    _require(
        drafter.objective in OBJECTIVES,
        f"config.drafter.objective is '{drafter.objective}': "
        f"{nearest(drafter.objective, OBJECTIVES)}",
    )
    depths = {"eagle": (1, 1), "hass": (2, math.inf)}
    least, most = depths.get(drafter.objective, (1, math.inf))
    _require(
        least <= drafter.train_depth <= most,
        f"config.drafter.train_depth is {drafter.train_depth}, but the objective "
        f"'{drafter.objective}' trains at depth {'1 alone' if most == 1 else '2 or more'}; with "
        f"config.drafter.objective={'hass' if most == 1 else 'eagle'} it fits.",
    )
    _require(
        drafter.objective != "eagle3" or bool(layers),
        "config.drafter.objective is 'eagle3', which reads several hidden states; name a low and a "
        "middle layer, --config.policy.feature_layers='(2, 24)'.",
    )
    last = config.policy.num_layers - 1
    _require(
        len(set(layers)) == len(layers) and all(0 <= layer <= last for layer in layers),
        f"config.policy.feature_layers is {layers}; name layers from 0 to {last}, none twice.",
    )
