"""What the scans are compared with: loops over tokens in NumPy, float64, forward and backward written by hand.

Nothing here uses JAX or the code under test; ``test_oracle.py`` proves the gradients by finite differences.
"""

import numpy as np


def softplus(x):
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def scan(problem, *, softplus_delta=False, reverse=False, dy=None, d_state=None):
    """Return (y, final state) and, with cotangents, also the gradient of every array in ``problem``.

    ``problem`` holds u, delta (B, L, D), A (D, N), B, C (B, L, G, N) and, as wished, D, delta_bias (D,) and
    initial_state (B, D, N), under these names.
    """
    p = {name: np.asarray(a, np.float64) for name, a in problem.items()}
    u, A = p["u"], p["A"]
    batch, length, channels = u.shape
    share = channels // p["B"].shape[2]
    B, C = (np.repeat(p[name], share, axis=2) for name in "BC")
    raw = p["delta"] + p.get("delta_bias", 0.0)
    dt = softplus(raw) if softplus_delta else raw
    skip = p.get("D", np.zeros(channels))
    tokens = range(length)[::-1] if reverse else range(length)

    before, decay = np.zeros((length, batch, channels, A.shape[1])), np.zeros((length, batch, channels, A.shape[1]))
    y = np.zeros_like(u)
    state = p.get("initial_state", np.zeros((batch, channels, A.shape[1])))
    for t in tokens:
        before[t], decay[t] = state, np.exp(dt[:, t, :, None] * A)
        state = decay[t] * state + (dt[:, t] * u[:, t])[..., None] * B[:, t]
        y[:, t] = (C[:, t] * state).sum(-1) + skip * u[:, t]
    if dy is None:
        return y, state

    dy = np.asarray(dy, np.float64)
    g = np.zeros_like(state) if d_state is None else np.asarray(d_state, np.float64)
    d_u, d_dt = skip * dy, np.zeros_like(u)
    d_A, d_B, d_C = np.zeros_like(A), np.zeros_like(B), np.zeros_like(C)
    for t in reversed(tokens):
        after = decay[t] * before[t] + (dt[:, t] * u[:, t])[..., None] * B[:, t]
        d_C[:, t] = after * dy[:, t, :, None]
        g = g + C[:, t] * dy[:, t, :, None]
        d_A += (g * dt[:, t, :, None] * decay[t] * before[t]).sum(0)
        d_B[:, t] = g * (dt[:, t] * u[:, t])[..., None]
        d_dt[:, t] = (g * (A * decay[t] * before[t] + B[:, t] * u[:, t, :, None])).sum(-1)
        d_u[:, t] += dt[:, t] * (g * B[:, t]).sum(-1)
        g = decay[t] * g
    d_raw = d_dt * np.where(raw > 20, 1.0, 1 / (1 + np.exp(-raw))) if softplus_delta else d_dt

    def by_group(x):
        return x.reshape(batch, length, -1, share, A.shape[1]).sum(3)

    grads = {
        "u": d_u,
        "delta": d_raw,
        "A": d_A,
        "B": by_group(d_B),
        "C": by_group(d_C),
        "D": (dy * u).sum((0, 1)),
        "delta_bias": d_raw.sum((0, 1)),
        "initial_state": g,
    }
    return y, state, {name: grads[name] for name in problem}


def scan2d(problem, indices, dy):
    """Return y (B, H, W, E) and the gradient of every array of ``problem``, the arguments of the tested ``scan2d``.

    ``indices`` gives, for each order, the flat pixel of each token, -1 where it is padding.
    """
    p = {name: np.asarray(a, np.float64) for name, a in problem.items()}
    batch, height, width, channels = p["x"].shape
    pixels = height * width
    rank, state = p["dt_weight"].shape[1], p["A"].shape[2]
    # One more pixel, of zeros, stands for the padding.
    x = np.concatenate([p["x"].reshape(batch, pixels, channels), np.zeros((batch, 1, channels))], 1)
    dy = np.concatenate(
        [np.asarray(dy, np.float64).reshape(batch, pixels, channels), np.zeros((batch, 1, channels))], 1
    )
    y = np.zeros_like(x)
    grads = {name: np.zeros_like(a) for name, a in p.items()} | {"x": np.zeros_like(x)}
    for k, order in enumerate(indices):
        dt, B, C = np.split(x[:, order] @ p["x_weight"][k], [rank, rank + state], -1)
        one = {
            "u": x[:, order],
            "delta": dt @ p["dt_weight"][k],
            "A": p["A"][k],
            "B": B[:, :, None],
            "C": C[:, :, None],
            "D": p["D"][k],
            "delta_bias": p["dt_bias"][k],
        }
        y_k, _, d = scan(one, softplus_delta=True, dy=dy[:, order])
        d_dbl = np.concatenate([d["delta"] @ p["dt_weight"][k].T, d["B"][:, :, 0], d["C"][:, :, 0]], -1)
        for t, pixel in enumerate(order):
            y[:, pixel] += y_k[:, t]
            grads["x"][:, pixel] += d["u"][:, t] + d_dbl[:, t] @ p["x_weight"][k].T
        grads["x_weight"][k] = np.einsum("ble,blc->ec", x[:, order], d_dbl)
        grads["dt_weight"][k] = np.einsum("blr,ble->re", dt, d["delta"])
        grads["dt_bias"][k], grads["A"][k], grads["D"][k] = d["delta_bias"], d["A"], d["D"]
    grads["x"] = grads["x"][:, :pixels].reshape(p["x"].shape)
    return y[:, :pixels].reshape(p["x"].shape), grads


def make_scan(seed, *, length, state, groups, batch=2, share=3, optional=(), softplus=True):
    """Return float64 arguments of ``selective_scan`` with steps of 0.01 to 1 or so; ``optional`` names the rest."""
    rng = np.random.default_rng(seed)
    channels = groups * share
    delta = rng.normal(-2, 1, (batch, length, channels))
    problem = {
        "u": rng.normal(size=(batch, length, channels)),
        "delta": delta if softplus else np.exp(delta),
        "A": -np.exp(rng.normal(size=(channels, state))),
        "B": rng.normal(size=(batch, length, groups, state)),
        "C": rng.normal(size=(batch, length, groups, state)),
        "D": rng.normal(size=channels),
        "delta_bias": np.abs(rng.normal(0, 0.3, channels)),
        "initial_state": rng.normal(size=(batch, channels, state)),
    }
    return {name: a for name, a in problem.items() if name in ("u", "delta", "A", "B", "C", *optional)}


def make_scan2d(seed, *, height, width, orders, state, rank, batch=2, channels=5):
    """Return float64 arguments of ``scan2d`` for that many orders."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(batch, height, width, channels)),
        "x_weight": rng.normal(size=(orders, channels, rank + 2 * state)) / channels**0.5,
        "dt_weight": rng.normal(size=(orders, rank, channels)) / rank,
        "dt_bias": rng.normal(-2, 1, (orders, channels)),
        "A": -np.exp(rng.normal(size=(orders, channels, state))),
        "D": rng.normal(size=(orders, channels)),
    }
