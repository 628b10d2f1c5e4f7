"""CPU seconds of our models beside the authors' code and models of timm, one thread each, in turns.

A case is inference of 1 or of 8 images, or an update (forward, backward, clipping, AdamW, moving average) with 8, in
float32 without augmentation. Every side of a case is a process of its own, which computes on one thread. The official
code runs its scan in plain PyTorch, as it must on a CPU. Seconds are CPU seconds, so that other work on the machine
disturbs them little. Each round divides the peer's seconds by ours, measured one after the other; the median over the
rounds is the ratio.

    python -m venv peers && peers/bin/python -m pip install torch torchvision timm einops yacs
    git clone https://github.com/MzeroMiko/VMamba
    python benchmarks/cpu_models.py --torch peers/bin/python --official VMamba [--only vmamba_t] [--out FILE]

Clones of TerryPei/EfficientVMamba, hustvl/Vim, YuHengsss/MSVMamba and NVlabs/MambaVision are further ``--official``
folders. A side that fails is a row that says why.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

from evmamba_jax.analysis import speed
from evmamba_jax.analysis.peer import cost_of
from evmamba_jax.analysis.peers import Peers
from evmamba_jax.errors import UserError
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.measuring.rounds import spread
from evmamba_jax.measuring.servers import Server, answer


class Beside(NamedTuple):
    """What a model of ours is measured beside.

    Attributes:
        marks: a file that only the clone of its authors has.
        official: its name there.
        timm: models of timm.
    """

    marks: str
    official: str
    timm: tuple[str, ...] = ()


MODELS = {
    "evmamba_t": Beside(
        "classification/configs/vssm/vssm_efficient_tiny.yaml",
        "vssm_efficient_tiny",
        ("mobilenetv3_large_100", "efficientvit_b1"),
    ),
    "vmamba_t": Beside(
        "classification/configs/vssm/vmambav2v_tiny_224.yaml", "vmambav2v_tiny_224", ("swin_tiny_patch4_window7_224",)
    ),
    "vim_t": Beside(
        "vim/models_mamba.py", "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    ),
    "msvmamba_t": Beside("classification/configs/ms_vssm/vssm_tiny_224_ms.yaml", "vssm_tiny_224_ms"),
    "mambavision_t": Beside("mambavision/models/mamba_vision.py", "mamba_vision_T"),
}
ROOT = Path(__file__).parent.parent
CASES = (("inference", 1), ("inference", 8), ("training", 8))
_GIB = 2**30
# One thread: XLA takes a thread for each core that it may run on.
_ONE = {"PJRT_NPROC": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}


def serve(name: str, mode: str, batch: int) -> None:
    """Answer requests for the cost of so many steps of one of our models."""
    if mode == "inference":
        program = speed.prepare(name, batch=batch, mode=mode)
    else:
        config = speed.training_config(name, batch, 224, "float32")
        data = config.data
        data.auto_augment, data.mixup, data.cutmix, data.random_erasing, data.hflip = "", 0.0, 0.0, 0.0, 0.0
        program = speed.train_step(config)
    answer(lambda request: cost_of(lambda: program.measure(1), request["steps"]))


class Ours:
    """One of our models in a process of its own; arguments as for :func:`serve`."""

    def __init__(self, name: str, mode: str, batch: int):
        command = [sys.executable, os.path.abspath(__file__), "--serve", name, mode, str(batch)]
        self._server = Server(command, os.environ | _ONE | {"PYTHONPATH": str(ROOT)})

    def cost(self) -> dict[str, float]:
        """Return what a step costs."""
        return self._server.ask(steps=1)

    def close(self) -> None:
        """End the process."""
        self._server.close()


class Theirs:
    """A model of PyTorch in a process of its own.

    Args:
        python: the interpreter of its environment.
        model: as :class:`evmamba_jax.analysis.peers.Peers` takes it.
        mode: "inference" or "training".
        batch: images a step.
    """

    def __init__(self, python: str, model: str, mode: str, batch: int):
        self._model = model
        self._peers = Peers(python, [model], threads=1, device="cpu")
        try:
            self._peers.load(model, batch=batch, size=224, dtype="float32", mode=mode)
        except UserError:
            self.close()
            raise

    def cost(self) -> dict[str, float]:
        """Return what a step costs."""
        return self._peers.cost(self._model, 1)

    def close(self) -> None:
        """End the process."""
        self._peers.close()


def rows(sides: dict[str, Callable[[], Any]], rounds: int) -> list[list[Any]]:
    """Measure the sides in turns after a step of each to warm up, the first beside all others.

    Args:
        sides: by name, each what opens it.
        rounds: how often each is measured.

    Returns:
        A row for each side: its name, seconds, ratio to the first with its quartiles, GiB at the peak; or its name and
        what failed.
    """
    opened: dict[str, Any] = {}
    failed: dict[str, str] = {}
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for turn in range(rounds + 2):
            for name, begin in sides.items():
                if name in failed:
                    continue
                try:
                    if not turn:
                        opened[name] = begin()
                    else:
                        costs[name].append(opened[name].cost())
                except UserError as error:
                    failed[name] = str(error)
    finally:
        for side in opened.values():
            side.close()
    first = next(iter(sides))
    made: list[list[Any]] = []
    for name in sides:
        if name in failed:
            made.append([name, failed[name]])
            continue
        measured = costs[name][1:]  # the first warms up
        ratio = quartiles = None
        if name != first and first not in failed:
            pairs = zip(measured, costs[first][1:], strict=True)
            ratios = spread([one["seconds"] / own["seconds"] for one, own in pairs])
            ratio, quartiles = ratios.median, [ratios.low, ratios.high]
        seconds = spread([one["seconds"] for one in measured]).median
        made.append([name, seconds, ratio, quartiles, max(one["bytes"] for one in measured) / _GIB])
    return made


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", metavar="PYTHON", help="interpreter of an environment with torch and timm")
    parser.add_argument("--official", nargs="*", type=Path, default=[], metavar="FOLDER", help="clones of the authors")
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS, help="models; all where not given")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each side (default 3)")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, mode, batch = options.serve
        serve(name, mode, int(batch))
        return
    if options.official and not options.torch:
        parser.error("--official needs --torch")
    for path in options.official:
        if not any((path / beside.marks).is_file() for beside in MODELS.values()):
            parser.error(f"--official {path} is no clone of one of the five families' repositories")
    versions = machine.versions("Python", "jax", "jaxlib")
    if options.torch:
        try:
            process = Peers(options.torch, [], threads=1, device="cpu")
        except UserError as error:
            parser.error(str(error).replace("--peer-python", "--torch"))  # its name in other commands
        versions |= {f"{package} of the peers": number for package, number in process.versions.items()}
        process.close()
    report = Report("Models on a CPU", options.out, machine=machine.cpu(), versions=versions, date=machine.today())
    report.text(
        "Seconds of the processor a step, float32, images of 224x224, one thread; the official code with its scan in "
        f"plain PyTorch. Median of {options.rounds} rounds in which all sides take turns. Ratio: the peer's seconds "
        "over ours, median and quartiles of the rounds; above 1 ours is faster. Memory: of the process at the peak."
    )
    report.table(
        "model",
        "case",
        "side",
        ("CPU s", "{:.3f}"),
        ("ratio", "{:.2f}"),
        ("its quartiles", "{:.2f} to {:.2f}"),
        ("memory, GiB", "{:.2f}"),
    )
    for name in options.only:
        beside = MODELS[name]
        clones = [f"official:{path}:{beside.official}" for path in options.official if (path / beside.marks).is_file()]
        peers = {"official": clones[0]} if clones else {}
        peers |= {model: f"timm:{model}" for model in beside.timm}
        for mode, batch in CASES:
            sides: dict[str, Callable[[], Any]] = {"ours": functools.partial(Ours, name, mode, batch)}
            if options.torch:
                sides |= {
                    label: functools.partial(Theirs, options.torch, peer, mode, batch) for label, peer in peers.items()
                }
            for row in rows(sides, options.rounds):
                report.row(name, f"{mode}, {batch}", *row)


if __name__ == "__main__":
    main()
