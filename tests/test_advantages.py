"""Group-relative advantages by hand, and what leaves them unchanged."""

import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import advantages

REWARDS = jnp.array([[1.0, 0.0, 0.0, 1.0], [4.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])


def test_without_division_by_hand():
    found = advantages.group_relative(REWARDS, normalize=False)
    expected = [[0.5, -0.5, -0.5, 0.5], [3.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_with_division_by_hand():
    # Standard deviations are 0.5, sqrt(3) = 1.7320508 and 0; 1e-4 is added to each.
    found = advantages.group_relative(REWARDS, normalize=True)
    expected = [
        [0.9998, -0.9998, -0.9998, 0.9998],
        [1.7319508, -0.5773169, -0.5773169, -0.5773169],
        [0.0, 0.0, 0.0, 0.0],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_shifts_and_other_groups_change_nothing(normalize):
    base = advantages.group_relative(REWARDS, normalize=normalize)
    shifted = advantages.group_relative(REWARDS + 2.0, normalize=normalize)
    np.testing.assert_allclose(shifted, base, atol=1e-6)
    alone = advantages.group_relative(REWARDS[1:2], normalize=normalize)
    np.testing.assert_array_equal(alone, base[1:2])
    np.testing.assert_allclose(jnp.sum(base, axis=1), np.zeros(3), atol=1e-6)


def test_scale_is_kept_or_divided_out():
    kept = advantages.group_relative(8 * REWARDS, normalize=False)
    np.testing.assert_allclose(kept, 8 * advantages.group_relative(REWARDS, normalize=False))
    divided = advantages.group_relative(8 * REWARDS, normalize=True)
    np.testing.assert_allclose(
        divided, advantages.group_relative(REWARDS, normalize=True), rtol=1e-3
    )
