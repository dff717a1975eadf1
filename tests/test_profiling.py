"""Time by named scope: of a program that is known, and of chunk programs."""

import jax
import jax.numpy as jnp
import pytest
import toy_engine

from tlt_jax import profiling


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("jit(chunk)/rollout/while/body/verify/ffn/dot_general", "ffn"),
        ("jit(chunk)/rollout/while/body/verify/attention/attention_scores/dot", "attention_scores"),
        ("jit(chunk)/rollout/while/body/draft/attention/attention_scores/dot", "draft"),
        ("jit(chunk)/rollout/while/cond/reduce_or", "other"),
    ],
)
def test_the_outermost_phase_or_else_the_narrowest_scope_counts(path, scope):
    assert profiling.scope_of_path(path) == scope


def test_an_unnamed_instruction_belongs_where_its_operands_do():
    text = """
  %query = f32[2]{0} multiply(%a, %b), metadata={op_name="jit(f)/verify/attention_scores/mul"}
  %cast = f32[2]{0} convert(%c), metadata={op_name="jit(f)/while/convert"}
  ROOT %scores = f32[2]{0} fusion(%cast, %query), kind=kCustom, calls=%fused
  %lost = f32[2]{0} add(%cast, %cast)
"""
    scopes = profiling.scopes_of(text)
    assert scopes["scores"] == "attention_scores"
    assert scopes["lost"] == scopes["cast"] == "other"


def test_time_goes_to_the_scope_that_spends_it():
    def work(x):
        def body(_, x):
            with jax.named_scope("ffn"):
                x = jnp.tanh(x @ x)
            with jax.named_scope("commit"):
                return x + 1.0

        return jax.lax.fori_loop(0, 4, body, x)

    x = jnp.eye(384)
    program = jax.jit(work).lower(x).compile()
    seconds = profiling.seconds_by_scope(program, lambda: (x,))
    assert seconds["ffn"] > sum(seconds.values()) / 2 > 0


def test_a_round_of_every_row_bucket_is_profiled():
    programs = toy_engine.engine("plain")
    target = toy_engine.place(programs, toy_engine.random_policy())
    found = profiling.round_profile(programs, target, None)
    assert [entry["rows"] for entry in found] == list(programs.rollout.row_buckets)
    for entry in found:
        assert entry["strategy"] == "plain"
        assert entry["milliseconds"]["ffn"] > 0 and entry["milliseconds"]["attention"] > 0
