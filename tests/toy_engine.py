"""Toy policies with known behaviour, rollouts of them, and a sampler that shares no loop with them.

`one_by_one` decodes with the packed forward pass over the whole prefix: no cache, no chunk, no
draft, no slice. What the engine makes of the same prompts and key has to be the same tokens.
"""

import contextlib
import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import chunk, drafter, policy, rollout, sampling, setup, sharding, spot_training
from tlt_jax.config import DrafterConfig, MeshConfig, PolicyConfig, RolloutConfig
from tlt_jax.controller import FRESH
from tlt_jax.programs import RolloutPrograms
from tlt_jax.rollout import Carry
from tlt_jax.sharding import ParamSpec

BOS, STOP = 1, 2
NEVER = 99
"""A stop token outside the vocabulary: rows end at their limit."""
NEAR_TIE = 1e-4
"""Noisy logits nearer than this may change places when row counts change the rounding."""

# One shape for all policies, so that one compiled program serves them all. Square, because the
# tokens of `counting` are unit vectors; with biases, a feed-forward as wide as the drafter's and a
# pair of dimensions that RoPE leaves alone, because `mirrored` needs them.
SHAPE = PolicyConfig(
    vocab_size=32,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    ffn_width=24,
    rope_theta=1e12,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)
DRAFTER = DrafterConfig(
    ffn_width=24,
    learning_rate=1e-2,
    buffer_megabytes=0.027,  # 4 rows
    row_length=48,
    microbatch_rows=2,
    microbatch_tokens=24,
    train_depth=1,
    rounds_per_microbatch=(2, 1),
)
# The same policy with features of two layers, for a drafter that reads both.
FUSED = dataclasses.replace(SHAPE, feature_layers=(0,))
FUSED_DRAFTER = dataclasses.replace(DRAFTER, objective="eagle3", train_depth=2)
# Two row buckets with a depth each, and two length buckets.
ROLLOUT = RolloutConfig(
    prompts_per_step=2,
    group_size=4,
    max_prompt_length=6,
    max_response_length=34,
    row_buckets=(4, 1),
    strategies=("chain-2", "chain-4"),
    length_buckets=(24, 48),
    chunk_tokens=12,
)


def draw(specs, seed):
    """Parameters none of which is a plain zero or one, and logits of a spread of about one."""
    rng = np.random.default_rng(seed)

    def one(spec):
        centre, scale = (1.0, 0.3) if spec.scale is None else (0.0, max(spec.scale, 0.3))
        return jnp.asarray(centre + scale * rng.standard_normal(spec.shape), jnp.float32)

    return jax.tree.map(one, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


@functools.cache
def random_policy(seed=0):
    """A policy that listens to its whole prefix and stops after some ten tokens, or many."""
    params = draw(policy.param_specs(SHAPE), seed)
    return params | {"head": params["head"].at[:, STOP].multiply(2.0)}


@functools.cache
def random_drafter(seed=1):
    """A drafter that knows nothing of the policy; shared noise still makes some guesses right."""
    return draw(drafter.param_specs(SHAPE, DRAFTER), seed)


def fused(draft, *, part=1, matrix=None):
    """The drafter for features of two layers, which reads nothing but one part of them."""
    size = SHAPE.width
    matrix = jnp.eye(size) if matrix is None else matrix
    return draft | {
        "read_norm": jnp.ones((2, size)),
        "read": jnp.zeros((2, size, size)).at[part].set(matrix),
    }


@functools.cache
def counting():
    """(policy, drafter) of the rule "next token = token + 1, and 0 after the last".

    A token is a unit vector. The policy's head moves it on by one. The drafter looks at the
    feature alone, the last token but one, and moves it on by one: its head adds the second step.
    """
    size = SHAPE.width
    onward = jnp.roll(jnp.eye(size), 1, axis=1)  # unit vector t -> unit vector t + 1
    target, draft = random_policy(), random_drafter()
    target = target | {
        "embed": size**0.5 * jnp.eye(size),
        "layers": tuple(_silent(layer) for layer in target["layers"]),
        "norm": jnp.ones(size),
        "head": 10 * onward,
    }
    draft = draft | {
        "feature_norm": jnp.ones(size),
        "fuse": jnp.stack([onward, jnp.zeros_like(onward)]),
        "layer": _silent(draft["layer"]),
        "norm": jnp.ones(size),
    }
    return target, draft


def _silent(layer):
    """The layer with nothing added to the residual stream."""
    return layer | {"out": jnp.zeros_like(layer["out"]), "down": jnp.zeros_like(layer["down"])}


@functools.cache
def mirrored():
    """(policy, drafter) whose logits are equal for every sequence that begins with its only BOS.

    One layer of the policy speaks, and the drafter is that layer, fed with embeddings alone. It
    starts at the second token, so it has no key of the first; hence nobody may attend to BOS.
    Dimension 0 of the embedding marks BOS and turns into a huge negative score with a constant part
    of every query, in the pair of dimensions that `rope_theta` leaves unrotated. All else is
    relative, so counting positions from the second token changes nothing.
    """
    group, width = SHAPE.group, SHAPE.width
    params = random_policy()
    embed = params["embed"].at[:, 0].set(0.0).at[BOS].set(jnp.eye(width)[0])
    embed = embed / jnp.sqrt(jnp.mean(embed**2, axis=1, keepdims=True))
    speaking, other = params["layers"]
    qkv, bias = speaking["qkv"], speaking["qkv_bias"]
    for fixed in (1, 3):
        qkv = qkv.at[:, :, : group + 1, fixed].set(0.0)
        bias = bias.at[:, : group + 1, fixed].set(0.0)
    speaking = speaking | {
        "attention_norm": jnp.ones(width),
        "qkv": qkv.at[0, :, group, 1].set(-1e3),
        "qkv_bias": bias.at[:, :group, 1].set(1.0),
    }
    target = params | {"embed": embed, "layers": (speaking, _silent(other))}
    draft = {
        "feature_norm": jnp.ones(width),
        "token_norm": jnp.ones(width),
        "fuse": jnp.stack([jnp.zeros((width, width)), jnp.eye(width)]),
        "layer": speaking,
        "norm": params["norm"],
    }
    return target, draft


def prompts(count, seed=0):
    """`count` prompts of 2 to 6 tokens, each beginning with its only BOS, none with STOP."""
    rng = np.random.default_rng(seed)
    return [
        np.array([BOS, *rng.integers(3, SHAPE.vocab_size, rng.integers(1, 6))], np.int32)
        for _ in range(count)
    ]


def counting_prompts(*lengths):
    """Prompts of two consecutive tokens, counting from which STOP comes as the n-th token."""
    size = SHAPE.vocab_size
    return [np.array([(STOP - n - 1) % size, (STOP - n) % size], np.int32) for n in lengths]


def counted(prompt, count):
    """The prompt and `count` further tokens of `counting`."""
    return [*prompt, *((prompt[-1] + 1 + np.arange(count)) % SHAPE.vocab_size)]


def stored(buffers):
    """Token lists of the sequences in each slice's data buffer."""
    buffers = jax.device_get(buffers)
    found = []
    for rows, ids in zip(buffers.tokens, buffers.segment_ids, strict=True):
        found.append([])
        for row, segments in zip(rows, ids, strict=True):
            held = sorted(set(segments.tolist()) - {-1})
            found[-1] += [row[segments == segment].tolist() for segment in held]
    return found


@dataclasses.dataclass(frozen=True)
class Engine(RolloutPrograms):
    """Programs that note how many warming up compiled, and which kinds of chunk they ran."""

    warmed_up: int = 0
    kinds: list = dataclasses.field(default_factory=list)

    def chunk_program(self, kind, arguments):
        self.kinds.append(kind)
        return super().chunk_program(kind, arguments)

    def having(self, *, drafter=None, **changes):
        """Same compiled programs, other settings that are data; `kinds` begins anew."""
        return dataclasses.replace(
            self,
            rollout=dataclasses.replace(self.rollout, **changes),
            drafter=self.drafter if drafter is None else drafter,
            kinds=[],
        )


def _engine(
    *, slices=2, tensor=1, drafting=True, training=True, policy=SHAPE, drafter=DRAFTER, **changes
):
    return Engine(
        mesh=sharding.make_mesh(MeshConfig(slices=slices, tensor=tensor)),
        policy=policy,
        rollout=dataclasses.replace(ROLLOUT, **changes),
        drafter=drafter,
        drafting=drafting,
        training=training,
    )


_one_bucket = {"row_buckets": (4,), "length_buckets": (48,)}
_filtered = _one_bucket | {"slices": 1, "row_buckets": (8,), "training": False}
_filtered |= {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
_KINDS = {
    "main": {},
    "plain": {"drafting": False, "training": False, "speculate": False},
    "one slice": _one_bucket | {"slices": 1, "row_buckets": (8,), "strategies": ("chain-2",)},
    "four slices": _one_bucket | {"slices": 4, "row_buckets": (2,), "strategies": ("chain-4",)},
    "tensor": _one_bucket | {"tensor": 2, "strategies": ("chain-2",)},
    "plain, then chains": {
        "length_buckets": (48,),
        "strategies": ("plain", "chain-4"),
        "training": False,
    },
    "trees": {
        "length_buckets": (40, 64),
        "strategies": ("tree-3-2-6", "tree-2-3-13"),
        "training": False,
    },
    "ngram": {
        "length_buckets": (48,),
        "strategies": ("ngram-3-2-6", "chain-4"),
        "training": False,
        "library_texts": 8,
    },
    "bandit": {
        "length_buckets": (48,),
        "strategies": ("plain chain-2", "plain ngram-3 chain-4"),
        "training": False,
        "library_texts": 8,
    },
    "fused": {
        **{"policy": FUSED, "drafter": FUSED_DRAFTER, "row_buckets": (2,), "length_buckets": (48,)},
        **{"strategies": ("chain-2",)},
    },
    "queue": {"row_buckets": (2,), "strategies": ("chain-2",)},
    "plain queue": {
        **{"slices": 1, "row_buckets": (6,), "strategies": ("plain",), "length_buckets": (48,)},
        **{"drafting": False, "training": False, "speculate": False},
    },
    "ngram queue on tensor": {
        **{"tensor": 2, "row_buckets": (2,), "length_buckets": (48,), "training": False},
        **{"strategies": ("ngram-3-2-6",), "library_texts": 8},
    },
    "one bandit": _one_bucket | {"strategies": ("plain chain-2",), "training": False},
    "one bandit on tensor": _one_bucket
    | {"tensor": 2, "strategies": ("plain chain-2",), "training": False},
    "ngram chain": _one_bucket | {"strategies": ("ngram-4",), "training": False},
    "tree on tensor": _one_bucket | {"tensor": 2, "strategies": ("tree-3-2-5",), "training": False},
    "filtered": _filtered | {"strategies": ("chain-2",)},
    "filtered tree": _filtered | {"strategies": ("tree-3-2-6",)},
}


@functools.cache
def engine(name):
    """One of the engines that all test modules share, warmed up once."""
    made = _engine(**_KINDS[name])
    draft = fused(random_drafter()) if name == "fused" else random_drafter()
    target, draft = place(made, random_policy()), drafter_state(made, draft)
    if "filtered" not in name:  # they take two stop tokens, and warming up is for one
        made.warm_up(target, draft, buffers(made), made.empty_library())
    return dataclasses.replace(made, warmed_up=made.pool.compiled)


def measured(name):
    """An engine with its programs and no constant prices of microbatches."""
    programs = engine(name)
    return programs.having(drafter=dataclasses.replace(programs.drafter, rounds_per_microbatch=()))


def place(programs, params):
    """Policy parameters in rollout layout, copied: what a rollout donates is never the test's."""
    specs = policy.param_specs(programs.policy)
    held = sharding.tree_shardings(specs, programs.mesh, sharding.ROLLOUT_RULES)
    return jax.device_put(jax.tree.map(jnp.copy, params), held)


def drafter_state(programs, draft):
    """Version 0 of a drafter on every device, None without drafting."""
    if not programs.drafting:
        return None
    return setup.drafter_state(spot_training.optimizer(programs.drafter), programs.mesh, draft)


def buffers(programs):
    """Empty data buffers, None without training."""
    if not programs.training:
        return None
    return chunk.empty_buffers(programs.mesh, programs.policy, programs.drafter)


def carry(programs, draft, controller=FRESH):
    """What a first rollout begins with."""
    arrays = drafter_state(programs, draft), buffers(programs), programs.empty_library()
    return Carry(*arrays, controller)


def roll(programs, models, asked, *, seed=0, stop_tokens=(STOP,), learn=True, **options):
    """One rollout of (policy, drafter) parameters from a fresh drafter state and buffer.

    Without `learn` the drafter stays as it is, in the same programs.
    """
    target, draft = models
    programs = programs if learn else dataclasses.replace(programs, training=False)
    begun = {name: options.pop(name) for name in ("library", "controller") if name in options}
    return rollout.run(
        programs,
        place(programs, target),
        dataclasses.replace(carry(programs, draft), **begun),
        asked,
        jax.random.key(seed),
        stop_tokens=stop_tokens,
        **options,
    )


@jax.jit
def _next(params, tokens, lengths, key, sampler):
    """Processed logits and noise, both [B, V], of the token at `lengths` [B] of `tokens` [B, W]."""
    count, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), (count, width))
    hidden, _ = policy.packed_forward(params, SHAPE, tokens, positions, jnp.zeros_like(tokens))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    processed = sampling.process_logits(policy.logits(params, last), sampler)
    ids = jnp.arange(count)
    noise = sampling.position_noise(key, ids, lengths, count=1, vocab_size=SHAPE.vocab_size)
    return processed, noise[:, 0]


def sampling_params(settings):
    return sampling.make_params(
        settings.temperature, settings.top_k, settings.top_p, filtered=settings.filtered
    )


def one_by_one(params, settings, asked, *, seed=0, stop_tokens=(STOP,)):
    """(tokens, log-probabilities) of each sequence, decoded a token at a time without a cache."""
    sampler, key = sampling_params(settings), jax.random.key(seed)
    tokens = np.zeros((len(asked), settings.length_buckets[-1]), np.int32)
    log_probs = np.zeros(tokens.shape, np.float32)
    for row, prompt in enumerate(asked):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in asked])
    limits = lengths + settings.max_response_length
    live = np.ones(len(asked), bool)
    while live.any():
        processed, noise = _next(params, tokens, lengths, key, sampler)
        taken = sampling.pick(processed, noise, sampler)
        scores = np.asarray(sampling.log_probs(processed, taken, sampler))
        for row in np.flatnonzero(live):
            tokens[row, lengths[row]] = taken[row]
            log_probs[row, lengths[row]] = scores[row]
            lengths[row] += 1
            live[row] = int(taken[row]) not in stop_tokens and lengths[row] < limits[row]
    return [(tokens[row, :count], log_probs[row, :count]) for row, count in enumerate(lengths)]


def unexplained(got, wanted, params, settings, *, seed=0):
    """Indices of the sequences that differ, and not by a near-tie where they first do.

    The two tokens at the first difference must be the two best of the noisy logits there, and
    these nearer than `NEAR_TIE`. A sequence that merely ends elsewhere is never explained.
    """
    sampler, key, wrong = sampling_params(settings), jax.random.key(seed), []
    for sequence, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if np.array_equal(a, b):
            continue
        shared = min(len(a), len(b))
        first = int(np.argmax(np.append(a[:shared] != b[:shared], True)))
        if first == shared:
            wrong.append(sequence)
            continue
        tokens = np.zeros((len(got), settings.length_buckets[-1]), np.int32)
        tokens[sequence, :first] = a[:first]
        lengths = np.full(len(got), max(first, 1))
        processed, noise = _next(params, tokens, lengths, key, sampler)
        noisy = np.asarray(processed + sampler.temperature * noise)[sequence]
        best = np.argsort(-noisy)[:2]
        if {int(a[first]), int(b[first])} != set(best.tolist()) or (
            noisy[best[0]] - noisy[best[1]] > NEAR_TIE
        ):
            wrong.append(sequence)
    return wrong


@functools.cache
def tailed(name="random"):
    """(seed, prompts, tokens one by one) of the first seed whose rollout has a tail.

    That is, with two slices one row of each is left for longer than a chunk, even if drafts make
    that row faster. `name` is "random" or "mirrored", the policy.
    """
    params = random_policy() if name == "random" else mirrored()[0]
    for seed in range(100):
        asked = prompts(8, seed=seed)
        made = [tokens for tokens, _ in one_by_one(params, ROLLOUT, asked, seed=seed)]
        lengths = [len(x) - len(prompt) for x, prompt in zip(made, asked, strict=True)]
        second = max(sorted(lengths[slice_::2])[-2] for slice_ in range(2))
        if max(lengths) >= 2 * second + 12:
            return seed, asked, made
    raise AssertionError("no rollout of this policy has a tail")


def tokens_of(result):
    """Token arrays of a rollout's responses, by sequence."""
    return [response.tokens for response in result.responses]


@contextlib.contextmanager
def compilations():
    """Messages of what JAX compiles inside the block."""
    found, handler, logger = [], logging.Handler(), logging.getLogger("jax")
    handler.emit = lambda record: found.append(record.getMessage())
    handler.addFilter(lambda record: "ompiling" in record.getMessage())
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)


def assert_same_on_all_devices(tree):
    """Every device's copy of every leaf is bitwise the first one's."""
    for leaf in jax.tree.leaves(tree):
        first, *others = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        for other in others:
            np.testing.assert_array_equal(other, first)
