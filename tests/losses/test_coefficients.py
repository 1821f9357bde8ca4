import functools

import jax
import numpy as np

from jaxrl_llm import losses

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


def test_the_entropy_coefficient_follows_the_rule_of_skywork():
    state = losses.init_entropy_coef(0.01)
    assert losses.applied_entropy_coef(state) == 0  # No entropy has been seen.
    history = []
    for entropy in (0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.1):
        state = losses.update_entropy_coef(state, entropy, entropy_coef_max=0.018)
        history.append((state.coef, losses.applied_entropy_coef(state)))
    coefs = [0.015, 0.018, 0.013, 0.008, 0.003, 0.0, 0.005]
    close([x for x, _ in history], coefs, atol=1e-9)
    close([x for _, x in history], [0.015, 0.018, 0, 0, 0, 0, 0.005], atol=1e-9)


def test_the_kl_coefficient_moves_by_a_clipped_error():
    state = losses.init_kl_coef(0.2)
    options = {"kl_target": 6.0, "horizon": 10_000}
    for kl, error in ((6.6, 0.1), (60.0, 0.2), (0.0, -0.2), (6.0, 0.0)):
        close(losses.update_kl_coef(state, kl, 256, **options).kl_coef, 0.2 * (1 + error * 256 / 10_000))


def test_coefficients_may_be_carried_by_a_scan():
    def step(states, entropy):
        kl, bonus = states
        return (losses.update_kl_coef(kl, entropy, 5000), losses.update_entropy_coef(bonus, entropy)), bonus.coef

    start = losses.init_kl_coef(0.2), losses.init_entropy_coef()
    (kl, bonus), _ = jax.lax.scan(step, start, np.array([9.0, 9.0, 0.1], np.float32))
    close(kl.kl_coef, 0.2 * 1.1 * 1.1 * 0.9)
    close(bonus.coef, 0.005)
    close(bonus.entropy, 0.1)
