"""Frozen dataclasses that configure a run.

A `ConfigDict` from the command line becomes a `RunConfig` through `from_mapping`; nothing below
the command lines sees a `ConfigDict`. `validation` checks that its parts fit together. Lengths are
tokens, widths are array sizes.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from tlt_jax.types import Strategy, UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3 frequency scaling; `factor` 1 leaves RoPE as it is."""

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Shape of a decoder: Qwen2/2.5 has `qkv_bias`, Qwen3 `qk_norm`, Llama 3 `rope_scaling`.

    A token's features, which the drafter reads, are its final hidden state, and before it those
    after `feature_layers` (EAGLE-3 reads a low and a middle one).
    """

    vocab_size: int = 128
    num_layers: int = 16
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    ffn_width: int = 384
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    qkv_bias: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    dtype: str = "float32"
    attention_backend: str = "reference"
    feature_layers: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def feature_width(self) -> int:
        """Numbers in a token's features."""
        return self.width * (1 + len(self.feature_layers))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Mesh axes. `one_core_per_slice` gives every CPU device a single XLA thread."""

    slices: int = 2
    tensor: int = 1
    one_core_per_slice: bool = True


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which prompts; `mix` is a difficulty mix of the task, `data_dir` where TFDS keeps it."""

    name: str = "pairs"
    mix: str = "mixed"
    data_dir: str = "~/.cache/tlt_jax/data"


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """One rollout: `prompts_per_step` x `group_size` sequences spread over the slices.

    `verification` is "coupled", where drafts change no token, or "rejection", where they leave the
    distribution of the tokens as it is. Without `shared_noise` the drafter ranks tokens without the
    noise they are sampled with, as in EAGLE: its guesses are the most likely tokens.

    `row_buckets` are rows per slice, falling; `strategies` gives the ways of decoding in each of
    them, in the written form of `types.Strategy` and with blanks between. Where there are several,
    a bandit chooses (`bandit`), which explores in a share `epsilon` of its choices and believes at
    first that `free_tokens` tokens more make a target pass twice as long; or, with a `threshold`
    above 0, a slice's live rows do: plain decoding while there are more, then the first other one
    (TLT's elastic activation). As rows shrink, lengths grow: the k-th row bucket
    in use has caches of the k-th length bucket or longer. A sequence gains at most `chunk_tokens`
    tokens in a chunk, so a chunk of draft depth d runs up to `chunk_tokens // (d + 1)` rounds. The
    n-gram drafter looks things up in the last `library_texts` finished sequences.

    The smallest row bucket that holds a slice's share of the sequences gives its slots; if none
    does, the largest one does, and further sequences wait for a slot that falls free between two
    chunks (with `refill`) or for all of them (without). With `deal_by_length` prompts are spread
    over the slices, and wait, by how long the last responses to them were: the longest first.
    """

    prompts_per_step: int = 4
    group_size: int = 8
    max_prompt_length: int = 16
    max_response_length: int = 432
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    speculate: bool = True
    verification: str = "coupled"
    row_buckets: tuple[int, ...] = (16, 8, 4, 2, 1)
    strategies: tuple[str, ...] = ("chain-4",) * 5
    length_buckets: tuple[int, ...] = (144, 512)
    chunk_tokens: int = 72
    library_texts: int = 256
    epsilon: float = 0.05
    free_tokens: float = 8.0
    threshold: int = 0
    shared_noise: bool = True
    deal_by_length: bool = True
    refill: bool = True

    @property
    def num_sequences(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def max_length(self) -> int:
        """Longest sequence, prompt and response together."""
        return self.max_prompt_length + self.max_response_length

    @property
    def filtered(self) -> bool:
        """Whether top-k or top-p filtering is part of the programs."""
        return self.top_k > 0 or self.top_p < 1.0

    def slots(self, slices: int) -> int:
        """Rows per slice that a rollout starts with."""
        per_slice = -(-self.num_sequences // slices)
        return min((b for b in self.row_buckets if b >= per_slice), default=self.row_buckets[0])

    def arms(self, rows: int) -> tuple[Strategy, ...]:
        """Strategies of the bucket of `rows` rows per slice."""
        if not self.speculate:
            return (Strategy(),)
        return tuple(map(Strategy.parse, self.strategies[self.row_buckets.index(rows)].split()))

    @property
    def all_arms(self) -> tuple[Strategy, ...]:
        """Strategies of all buckets, whether or not anything is drafted."""
        return tuple(Strategy.parse(text) for texts in self.strategies for text in texts.split())

    def rounds(self, strategy: Strategy) -> int:
        """Most rounds of a chunk."""
        return self.chunk_tokens // strategy.most_committed

    @property
    def slack(self) -> int:
        """Cache positions that a round may write beyond the longest sequence."""
        return max(arm.written_slots for arm in self.all_arms)

    @property
    def rejection(self) -> bool:
        """Whether drafts are verified by rejection sampling."""
        return self.verification == "rejection"

    @property
    def uses_ngram(self) -> bool:
        """Whether any strategy drafts with the n-gram drafter."""
        return any(arm.ngram for arm in self.all_arms)

    @property
    def deepest(self) -> int:
        """Greatest draft depth."""
        return max(arm.depth for arm in self.all_arms)


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """The drafter, its data buffer and its training on idle slices.

    `objective` is what it learns at draft depths 1 .. `train_depth`, in inference's own attention
    pattern (see `objectives.loss_sum`): "eagle" (at depth 1) and "hass" the target's
    distribution and features, "eagle3" the distribution alone.

    A microbatch is `microbatch_tokens` tokens of each of `microbatch_rows` packed rows.
    The buffer takes up to `buffer_megabytes` (10^6 bytes) of each slice. Without `store_features`
    it holds tokens alone: a microbatch then begins with a pass of the policy over its rows, and is
    worth more rounds.
    `rounds_per_microbatch` is its price in each row bucket: an idle slice takes one while the
    others run that many rounds. These are constants, not clock readings, so that a run repeated
    from the same seed gives the same bits. () has prices measured as the run goes (`budget`), for
    any policy on any machine. `between_steps_budget` applies with one slice, which is
    never idle: the share of a step's rounds spent on training after the rollout.
    """

    ffn_width: int = 256
    train: bool = True
    objective: str = "eagle"
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    feature_loss_weight: float = 0.5
    buffer_megabytes: float = 4.3
    store_features: bool = True
    row_length: int = 512
    microbatch_rows: int = 1
    microbatch_tokens: int = 64
    train_depth: int = 1
    rounds_per_microbatch: tuple[int, ...] = (1, 1, 2, 2, 5)
    between_steps_budget: float = 0.03

    def on_whole_rows(self, row_length: int) -> "DrafterConfig":
        """The same with microbatches of whole rows of this length."""
        return dataclasses.replace(self, microbatch_tokens=row_length)

    def row_megabytes(self, policy: PolicyConfig) -> float:
        """What a row of the buffer takes: features, and three 32-bit numbers for each token."""
        features = policy.feature_width * {"float32": 4, "bfloat16": 2}[policy.dtype]
        return self.row_length * (features * self.store_features + 3 * 4) / 1e6

    def buffer_rows(self, policy: PolicyConfig) -> int:
        """Packed rows that the buffer of a slice has room for."""
        return int(self.buffer_megabytes / self.row_megabytes(policy))


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """GRPO (DeepSeekMath, arXiv 2402.03300) and AdamW."""

    learning_rate: float = 1e-4
    warmup_steps: int = 5
    decay: str = "constant"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.001
    aggregation: str = "token"
    normalize_advantages: bool = True
    importance_cap: float = 0.0
    updates_per_step: int = 1
    row_length: int = 512
    microbatch_rows: int = 2


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps, and the drafter alone every `drafter_every`.

    The newest `keep` of either are kept.
    """

    every: int = 20
    drafter_every: int = 5
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised warm start of the policy and the drafter (`python -m tlt_jax.warm_start`).

    `python -m tlt_jax.pretrain_drafter` takes `drafter_steps` on `responses` of the policy instead.
    """

    responses: int = 512
    policy_steps: int = 600
    drafter_steps: int = 200
    batch_rows: int = 8
    row_length: int = 512
    learning_rate: float = 2e-3
    drafter_learning_rate: float = 2e-3


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Comparison of rollout modes (`python -m tlt_jax.benchmark`), in `parts`.

    Batches are drawn until plain decoding has made `min_tokens` tokens. `small_batch` sequences
    make the workload of the tail. `grid_strategies` run with `grid_rows` rows live per slice,
    `draft_strategies` at each of the `temperatures`, in a fourth of the tokens each. `near_tie` is
    the largest gap between the two best noisy logits that rounding may decide differently in two
    modes.
    """

    parts: tuple[str, ...] = ("batch", "tail", "training")
    repeats: int = 5
    min_tokens: int = 20_000
    small_batch: int = 4
    strategies: tuple[str, ...] = ("chain-2", "chain-4", "chain-8")
    other_slices: tuple[int, ...] = (1, 4)
    grid_rows: tuple[int, ...] = (16, 4, 1)
    grid_strategies: tuple[str, ...] = (
        *("chain-2", "chain-4", "chain-8", "ngram-4"),
        *("tree-4-2-8", "tree-4-2-12", "tree-8-2-16", "tree-8-4-16"),
    )
    draft_strategies: tuple[str, ...] = ("chain-4", "tree-4-2-15")
    temperatures: tuple[float, ...] = (1.0, 0.6)
    other_chunk_tokens: int = 24
    near_tie: float = 1e-4


@dataclasses.dataclass(frozen=True)
class StalenessConfig:
    """The experiment `drafter_staleness` (`python -m tlt_jax.ablate`).

    There is one RL run for each of the policy's `learning_rates`, which make it drift, and `seeds`.
    In all of them `drafters` draft chains of `depth`: "frozen", or OBJECTIVE-TOKENS, trained after
    each step on so many tokens of the newest sequences.
    """

    learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    seeds: tuple[int, ...] = (0, 1, 2)
    drafters: tuple[str, ...] = ("frozen", "hass-512", "hass-4096")
    depth: int = 8


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a command line needs.

    `warm_start_dir` "" starts from random parameters. `replay` is the `decisions.jsonl` of a run
    whose choices (strategies, and what idle slices train) are made again, "" chooses anew.
    """

    seed: int = 0
    num_steps: int = 100
    warm_start_dir: str = ""
    replay: str = ""
    policy: PolicyConfig = PolicyConfig()
    mesh: MeshConfig = MeshConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    drafter: DrafterConfig = DrafterConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    staleness: StalenessConfig = StalenessConfig()


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Sentence part naming the known word nearest to a misspelt one."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}."


def from_mapping(cls: type, values: Mapping[str, Any], *, where: str = "config") -> Any:
    """Builds the frozen dataclass `cls` from nested mappings.

    Raises:
      UserError: an unknown key (the nearest known one is named), an unset placeholder, or a
        value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"unknown key '{where}.{key}': {nearest(key, hints)}")
    arguments = {
        key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()
    }
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {value!r}; it must be a group of keys.")
        return from_mapping(typing.cast(type, hint), value, where=where)
    if value is None:
        raise UserError(f"{where} has no value; set it with --{where}=VALUE.")
    if isinstance(hint, types.GenericAlias) and hint.__origin__ is tuple:
        if isinstance(value, str) or not isinstance(value, typing.Iterable):
            raise UserError(f"{where} is {value!r}; it must be a tuple, for example (8, 4, 1).")
        return tuple(_convert(hint.__args__[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} is {value!r}; it must be of type {hint.__name__}.")
    return value
