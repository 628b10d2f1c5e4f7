"""The scans of PyTorch beside which ours stand, timed in an environment that has torch and mamba-ssm.

``lib/gpu_scans.py`` has the shapes. The program is started by its path with one argument, JSON: ``what``, "alone" or
"chain", the sizes, the runs, and the device, "cuda" (or "cpu", where mamba-ssm's own plain PyTorch runs and the clock
is the wall's). It imports nothing of this library, and prints a line of JSON: ms forward and backward, or what is
missing.
"""

import importlib.util
import json
import statistics
import sys
import time


def milliseconds(torch, function, runs):
    """Return the median of the times of a function, after three runs that are not timed."""
    times = []
    for _ in range(runs + 3):
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def alone(torch, scan, make, *, batch, height, width, sets, channels, state, length, **_):
    """Return mamba-ssm's scan of all sets of channels, and its inputs."""

    def run(u, delta, A, B, C, D, bias):
        return scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)

    rows = [make(batch, sets * channels, length) for _ in range(2)]
    few = [make(batch, sets, state, length) for _ in range(2)]
    A = -make(sets * channels, state, dtype=torch.float32).exp()
    D, bias = (make(sets * channels, dtype=torch.float32) for _ in range(2))
    return run, (*rows, A, *few, D, bias - 4)


def chain(torch, scan, make, *, batch, height, width, sets, channels, state, rank, **_):
    """Return VMamba's SS2D (section 4.3): four sequences, projected, scanned, and summed where they came from."""

    def run(x, x_weight, dt_weight, bias, A, D):
        b, c, h, w = x.shape
        two = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
        xs = torch.cat([two, two.flip(-1)], 1)
        projected = torch.einsum("bkdl,kdc->bkcl", xs, x_weight)
        dt, B, C = projected.split([rank, state, state], 2)
        dts = torch.einsum("bkrl,krd->bkdl", dt, dt_weight)
        one = (t.reshape(b, 4 * c, -1).contiguous() for t in (xs, dts))
        ys = scan(
            *one, A.flatten(0, 1), B.contiguous(), C.contiguous(), D.flatten(), delta_bias=bias.flatten(),
            delta_softplus=True,
        ).view(b, 4, c, -1)  # fmt: skip
        ys = ys[:, :2] + ys[:, 2:].flip(-1)
        return ys[:, 0] + ys[:, 1].view(b, c, w, h).transpose(2, 3).flatten(2)

    weights = make(sets, channels, rank + 2 * state) / channels**0.5, make(sets, rank, channels) / rank
    A = -make(sets, channels, state, dtype=torch.float32).exp()
    D, bias = (make(sets, channels, dtype=torch.float32) for _ in range(2))
    return run, (make(batch, channels, height, width), *weights, bias - 4, A, D)


def measure(what, runs, device, **sizes):
    """Return the facts of a request."""
    for module, package in {"torch": "torch", "mamba_ssm": "mamba-ssm"}.items():
        if importlib.util.find_spec(module) is None:
            return {"missing": f"{package} is not installed for {sys.executable}"}
    import torch
    from mamba_ssm.ops import selective_scan_interface

    scan = getattr(selective_scan_interface, "selective_scan_fn" if device == "cuda" else "selective_scan_ref")

    def make(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device=device).to(dtype)

    torch.manual_seed(0)
    run, given = {"alone": alone, "chain": chain}[what](torch, scan, make, **sizes)
    given = [x.detach().requires_grad_() for x in given]
    y = run(*given)
    return {
        "forward": milliseconds(torch, lambda: run(*given), runs),
        "backward": milliseconds(torch, lambda: torch.autograd.grad(y, given, y.detach(), retain_graph=True), runs),
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
