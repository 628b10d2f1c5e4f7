"""The oracle's gradients against finite differences of its own forward loop."""

import numpy as np
import pytest
import scan_oracle


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_gradients_of_the_oracle(softplus, reverse):
    optional = ("D", "delta_bias", "initial_state")
    problem = scan_oracle.make_scan(0, length=6, state=3, groups=2, optional=optional, softplus=softplus)
    options = {"softplus_delta": softplus, "reverse": reverse}
    rng = np.random.default_rng(1)
    dy, d_state = (rng.normal(size=a.shape) for a in scan_oracle.scan(problem, **options))
    grads = scan_oracle.scan(problem, **options, dy=dy, d_state=d_state)[2]

    def loss(problem):
        y, state = scan_oracle.scan(problem, **options)
        return (y * dy).sum() + (state * d_state).sum()

    for name, value in problem.items():
        direction = rng.normal(size=value.shape)
        high, low = (loss(problem | {name: value + step * direction}) for step in (1e-6, -1e-6))
        np.testing.assert_allclose((grads[name] * direction).sum(), (high - low) / 2e-6, rtol=1e-7, err_msg=name)
