"""Whether a drafter that trains is still good: it must not fall behind its own last good version.

After a rollout both draft at the newest tokens of all slices' buffers: sequences that have just
ended, of which training has seen little or nothing yet. Where the drafter that training left is
accepted far less often there than the last good one, or is not even a number, that one takes its
place, with an optimizer that begins anew; else it is the last good one from then on. The same
policy judges both, so a policy that has become harder to guess is no reason.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tlt_jax import buffer as buffer_lib
from tlt_jax import objectives, row_programs, sharding, spot_training
from tlt_jax.buffer import DrafterBuffer
from tlt_jax.config import DrafterConfig, PolicyConfig
from tlt_jax.sharding import SLICE
from tlt_jax.spot_training import DrafterState
from tlt_jax.types import SamplingParams

WORSE = 0.75
"""A drafter is bad if it is accepted less often than this share of what the last good one is."""
ROWS = 2  # of each slice's buffer
TOKENS = 128  # of each row; all of them would hold up a step by some percent
LEAST_EVIDENCE = 64  # places


@struct.dataclass
class GoodDrafter:
    """The last version that was found good."""

    params: Any  # float32, equal on all slices
    version: jax.Array  # [] int32


@struct.dataclass
class Verdict:
    """How likely the first draft is to be accepted, and what followed from it."""

    acceptance: jax.Array  # [] float32, of the drafter that training left; NaN without evidence
    of_good: jax.Array  # [] float32, of the last good version
    version: jax.Array  # [] int32
    good_version: jax.Array  # [] int32
    replaced: jax.Array  # [] bool


def begin(state: DrafterState) -> GoodDrafter:
    """What a run begins with is good."""
    return jax.tree.map(jnp.copy, GoodDrafter(state.params, state.version))


def check_program(mesh: Mesh, config: PolicyConfig, drafter_config: DrafterConfig) -> Any:
    """Program `(target, DrafterState, GoodDrafter, buffer, SamplingParams) -> (DrafterState,
    GoodDrafter, Verdict)`; drafter state and good drafter are donated."""

    def check(target, state, good, buffer, sampling_params):
        own = jax.tree.map(lambda x: x[0], buffer)
        acceptance, of_good = (
            _acceptance(params, target, config, drafter_config, own, sampling_params)
            for params in (state.params, good.params)
        )
        return _judged(drafter_config, state, good, acceptance, of_good)

    specs = P(), P(), P(), P(SLICE), P()
    return jax.jit(
        row_programs.slice_program(check, mesh, specs, P()),
        donate_argnums=(1, 2),
        out_shardings=sharding.replicated(mesh),
    )


def _acceptance(
    params: Any,
    target: Any,
    config: PolicyConfig,
    drafter_config: DrafterConfig,
    buffer: DrafterBuffer,
    sampling_params: SamplingParams,
) -> jax.Array:
    """At depth 1, the mean over the newest tokens of all slices; NaN without evidence."""
    tokens = min(TOKENS, drafter_config.row_length)
    accepted, counted = jax.lax.psum(
        objectives.acceptance_sums(
            params,
            target,
            config,
            dataclasses.replace(drafter_config, microbatch_tokens=tokens),
            sampling_params,
            buffer_lib.newest(buffer, rows=ROWS, tokens=tokens),
            depth=1,
        ),
        SLICE,
    )
    return jnp.where(counted[0] >= LEAST_EVIDENCE, accepted[0] / counted[0], jnp.nan)


def _judged(
    config: DrafterConfig,
    state: DrafterState,
    good: GoodDrafter,
    acceptance: jax.Array,
    of_good: jax.Array,
) -> tuple[DrafterState, GoodDrafter, Verdict]:
    # A broken drafter's acceptance is NaN, which is not at least anything.
    bad = jnp.isfinite(of_good) & ~(acceptance >= WORSE * of_good)
    anew = spot_training.init_state(spot_training.optimizer(config), good.params)
    verdict = Verdict(acceptance, of_good, state.version, good.version, bad)

    def choose(if_bad: Any, if_good: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(bad, a, b), if_bad, if_good)

    return (
        choose(dataclasses.replace(anew, version=state.version), state),
        choose(good, GoodDrafter(state.params, state.version)),
        verdict,
    )


def sentence(verdict: Verdict) -> str:
    """What happened, if a drafter was replaced; else nothing."""
    if not verdict.replaced:
        return ""
    return (
        f"drafter version {verdict.version} went bad: of the newest sequences' tokens it guesses "
        f"{verdict.acceptance:.0%}, version {verdict.good_version} {verdict.of_good:.0%}; the "
        "latter takes its place"
    )
