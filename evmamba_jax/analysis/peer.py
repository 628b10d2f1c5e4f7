"""The process that measures PyTorch models, in an environment of its own: it needs torch, and timm for timm's models.

It is started by its path, and imports nothing of this library. A request is a line of JSON on its input, the reply a
line on its output; what else is printed is lost. A reply with ``error`` says in one line what failed, and ``kind`` is
then "environment", "name", "memory" or "run".

- ``{"do": "hello", "threads": 2, "device": "cpu"}``: ``versions`` of Python, torch and timm, and ``device``.
- ``{"do": "check", "model": "timm:convnext_tiny"}``: nothing, or which names are near.
- ``{"do": "load", "model": ..., "batch": 8, "size": 224, "dtype": "float32", "mode": "inference"}``: makes a step, and
  tells ``parameters`` and, on a GPU, ``bytes`` at the peak. Other models that were loaded before stay.
- ``{"do": "time", "model": ..., "steps": 3}``: ``seconds`` of a step, the mean.
- ``{"do": "cost", "model": ..., "steps": 3}``: ``seconds`` of the processor a step, over all threads, and ``bytes`` of
  this process's memory at the peak of these steps.
- ``{"do": "drop"}``: all models go.
"""

import argparse
import contextlib
import difflib
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MARK = "_official"  # of the modules of an official repository, and of what stands in for others
_FUNCTIONS = {"vim": "vim/models_mamba.py", "mambavision": "mambavision/models/mamba_vision.py"}
DROP_PATH, LEARNING_RATE, DECAY, CLIP, AVERAGE = 0.1, 1e-7, 0.04, 1.0, 0.9999  # as our own step has them


def cost_of(run: Callable[[], Any], steps: int) -> dict[str, float]:
    """Run something several times: "seconds" of the processor a time, and "bytes" of this process at the peak.

    The peak is the resident memory since this call began where Linux says it, else since the process began.
    """
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    with contextlib.suppress(OSError):
        clear.write_text("5")  # the peak begins anew
    began = time.process_time()
    for _ in range(steps):
        run()
    seconds = (time.process_time() - began) / steps
    if status.exists():
        return {"seconds": seconds, "bytes": 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])}
    resource = importlib.import_module("resource")  # which Windows has not
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "bytes": peak if sys.platform == "darwin" else 1024 * peak}


class Failure(Exception):
    """What a reply says in place of an answer: its kind, and words."""


class Loaded:
    """A model with its images, which makes steps.

    Args:
        torch: the module.
        model: takes (B, 3, H, W).
        device: "cpu" or "cuda".
        batch: images a step.
        size: side of the images, pixels.
        dtype: "float32", or "bfloat16" by autocast: parameters are float32 either way.
        mode: "inference", or "training": cross-entropy with soft targets, clipping, AdamW, moving average.
    """

    def __init__(self, torch: Any, model: Any, device: str, batch: int, size: int, dtype: str, mode: str):
        self.torch, self.device, self.model = torch, device, model.to(device)
        self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
        torch.manual_seed(0)
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.step = self.infer if mode == "inference" else self.train
        self.model.train(mode == "training")
        if mode == "training":
            parameters = list(self.model.parameters())
            groups = [[p for p in parameters if (p.ndim > 1) == decayed] for decayed in (True, False)]
            self.adamw = torch.optim.AdamW(
                [{"params": g, "weight_decay": d} for g, d in zip(groups, (DECAY, 0.0)) if g],  # noqa: B905
                lr=LEARNING_RATE,
            )
            self.now = [x for x in self.model.state_dict().values() if x.is_floating_point()]
            self.averages = [x.clone() for x in self.now]
            with torch.no_grad():
                classes = self.logits().shape[1]
            self.targets = torch.rand(batch, classes, device=device).softmax(1)

    def logits(self) -> Any:
        """Return what the model makes of the images."""
        with self.autocast():
            return self.model(self.images)

    def infer(self) -> None:
        """Make one step of inference."""
        with self.torch.inference_mode():
            self.logits()

    def train(self) -> None:
        """Make one update."""
        torch = self.torch
        loss = torch.nn.functional.cross_entropy(self.logits().float(), self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.now, 1 - AVERAGE)

    def seconds(self, steps: int) -> float:
        """Return the mean seconds of so many steps."""
        wait = self.torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait()
        return (time.perf_counter() - began) / steps


class Scan:
    """Plain PyTorch in the place of CUDA kernels that are missing, under the names that the official code calls.

    Args:
        torch: the module.
    """

    def __init__(self, torch: Any):
        self.torch, self.functional = torch, torch.nn.functional

    def fused(self, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, *_, z=None, **__):
        """Return the selective scan of u, delta (B, D, L), A (D, N), B, C (B, G, N, L) or (B, N, L), D and bias (D,).

        The recurrence is in float32; states are kept for all tokens, tokens first: (L, B, G, N, D / G).
        """
        torch, dtype = self.torch, u.dtype
        B, C = (x if x.ndim == 4 else x.unsqueeze(1) for x in (B, C))
        u, delta, A, B, C = (x.float() for x in (u, delta, A, B, C))
        delta = delta if delta_bias is None else delta + delta_bias[:, None]
        groups = B.shape[1]
        tokens = lambda x: x.unflatten(1, (groups, -1)).permute(3, 0, 1, 2)  # noqa: E731
        step = tokens(self.functional.softplus(delta) if delta_softplus else delta)
        decay = torch.exp(step.unsqueeze(-2) * A.unflatten(0, (groups, -1)).mT)
        given = (step * tokens(u)).unsqueeze(-2) * B.permute(3, 0, 1, 2).unsqueeze(-1)
        # Apart, as the gradient of a token taken out of all would be as large as all.
        given, decay = given.unbind(), decay.unbind()
        states = [given[0]]
        for t in range(1, len(given)):
            states.append(torch.addcmul(given[t], decay[t], states[-1]))
        y = (torch.stack(states) * C.permute(3, 0, 1, 2).unsqueeze(-1)).sum(-2).permute(1, 2, 3, 0).flatten(1, 2)
        y = y if D is None else y + D[:, None] * u
        return (y if z is None else y * self.functional.silu(z)).to(dtype)

    def mamba(self, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        """Return the same with the arguments of mamba-ssm's ``selective_scan_fn``."""
        return self.fused(u, delta, A, B, C, D, delta_bias, delta_softplus, z=z)

    def inner(self, xz, conv, conv_bias, x_proj, dt_proj, A, B, C, D, delta_bias=None, delta_softplus=True):
        """Return what Vim's ``mamba_inner_fn_no_out_proj`` makes of xz (B, 2 D, L)."""
        x, z = xz.chunk(2, 1)
        x = self.functional.conv1d(x, conv, conv_bias, padding=conv.shape[-1] - 1, groups=len(conv))[..., : x.shape[-1]]
        x = self.functional.silu(x)
        parts = self.functional.linear(x.transpose(1, 2), x_proj).split([dt_proj.shape[1], A.shape[1], A.shape[1]], -1)
        delta, B, C = (part.transpose(1, 2) for part in (parts[0] @ dt_proj.T, *parts[1:]))
        return self.fused(x, delta, A, B, C, D, delta_bias, delta_softplus, z=z)

    def norms(self) -> dict[str, Any]:
        """Return mamba-ssm's norms, which add the residual first."""
        torch = self.torch

        class RMSNorm(torch.nn.Module):
            def __init__(self, size: int, eps: float = 1e-5, **_: Any):
                super().__init__()
                self.eps, self.bias, self.weight = eps, None, torch.nn.Parameter(torch.ones(size))

        def rms_norm_fn(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, **_):
            residual = x if residual is None else x + residual
            residual = residual.float() if residual_in_fp32 else residual
            y = (residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
            return (y, residual) if prenorm else y

        return {"RMSNorm": RMSNorm, "rms_norm_fn": rms_norm_fn, "layer_norm_fn": None}


class Official:
    """The authors' code of one of the five families, in a folder that is a clone of its repository.

    VMamba, EfficientVMamba and MSVMamba build a model by the name of a file of ``classification/configs``, Vim and
    MambaVision by the name of a function that they register.

    Args:
        torch: the module.
        folder: the clone.
    """

    def __init__(self, torch: Any, folder: Path):
        self.torch, self.folder, self.scan = torch, folder, Scan(torch)
        self.family, self.known = "", {}
        for family, file in _FUNCTIONS.items():
            if (folder / file).is_file():
                found = re.findall(r"^@register(?:_pip)?_model\ndef (\w+)", (folder / file).read_text(), re.MULTILINE)
                self.family, self.known = family, dict.fromkeys(found, file)
        if (folder / "classification/models/vmamba.py").is_file():
            self.family = "vmamba"
            self.known = {path.stem: str(path) for path in (folder / "classification/configs").rglob("*.yaml")}
        if not self.known:
            repositories = (
                "MzeroMiko/VMamba, TerryPei/EfficientVMamba, YuHengsss/MSVMamba, hustvl/Vim, NVlabs/MambaVision"
            )
            raise Failure("name", f"{folder} is no clone of any of {repositories}")

    def build(self, name: str, size: int, drop_path: float) -> Any:
        """Return a model with its initial values; what its CUDA kernels do is done by plain PyTorch if they miss."""
        for other in [other for other, module in sys.modules.items() if self._is_official(module)]:
            del sys.modules[other]  # modules of several repositories have the same names
        self._stand_ins()
        kept = list(sys.path)
        sys.path[:0] = [str(self.folder / part) for part in ("classification", "vim", "mambavision", ".")]
        try:
            return getattr(self, f"_{self.family}")(name, size, drop_path)
        except ImportError as error:
            missing = f"; pip install {error.name} may help there" if error.name else ""
            raise Failure("run", f"the official code cannot be imported: {error}{missing}") from error
        finally:
            sys.path[:] = kept
            for module in [*sys.modules.values()]:
                if self._is_inside(module):
                    vars(module)[_MARK] = True

    @staticmethod
    def _is_official(module: Any) -> bool:
        return _MARK in getattr(module, "__dict__", ())

    def _is_inside(self, module: Any) -> bool:
        return str(getattr(module, "__file__", None) or "").startswith(f"{self.folder}{os.sep}")

    def _vmamba(self, name: str, size: int, drop_path: float) -> Any:
        options = argparse.Namespace(cfg=self.known[name], opts=["MODEL.DROP_PATH_RATE", drop_path], local_rank=0)
        place = "utils.config" if (self.folder / "classification/utils/config.py").is_file() else "config"
        config = importlib.import_module(place).get_config(options)
        model = importlib.import_module("models").build_model(config)
        for module in [*sys.modules.values()]:
            if self._is_inside(module) and hasattr(module, "SelectiveScan") and not self._has_kernels():
                vars(module)["SelectiveScan"] = types.SimpleNamespace(apply=self.scan.fused)
        return model

    def _vim(self, name: str, size: int, drop_path: float) -> Any:
        return getattr(importlib.import_module("models_mamba"), name)(img_size=size, drop_path_rate=drop_path)

    def _mambavision(self, name: str, size: int, drop_path: float) -> Any:
        module = importlib.import_module("models.mamba_vision")
        return getattr(module, name)(resolution=size, drop_path_rate=drop_path)

    def _has_kernels(self) -> bool:
        names = ("selective_scan_cuda_core", "selective_scan_cuda_oflex", "selective_scan_cuda")
        return self.torch.cuda.is_available() and any(map(importlib.util.find_spec, names))

    def _stand_ins(self) -> None:
        """Put modules in the place of those that are missing and that are kernels, counters of FLOPs, or have moved."""
        empty: dict[str, Any] = {}
        _stand_in("timm.models.layers", _names("timm.layers"))
        _stand_in("timm.models.registry", _names("timm.models"))
        counters = ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count")
        _stand_in("fvcore", empty)
        _stand_in("fvcore.nn", dict.fromkeys(counters))
        if importlib.util.find_spec("selective_scan_cuda_core"):
            # EfficientVMamba imports it from a folder that its author had.
            core = {"selective_scan_cuda_core": importlib.import_module("selective_scan_cuda_core")}
            _stand_in("selective_scan_vmamba_pt202", core)
        if self._has_kernels():
            return
        if not self.torch.cuda.is_available():
            self.torch.cuda.device = contextlib.nullcontext  # what chooses a GPU, in VMamba's code for CPUs too
        if self.family == "vmamba" and not (self.folder / "classification/models/csms6s.py").is_file():
            # VMamba itself does without; the two that began with its code take either of these for granted.
            core = types.ModuleType("selective_scan_cuda_core")
            _stand_in("selective_scan_cuda_core", empty)
            _stand_in("selective_scan_vmamba_pt202", {"selective_scan_cuda_core": core})
        if self.family == "vmamba":
            return
        interface = {"selective_scan_fn": self.scan.mamba, "mamba_inner_fn_no_out_proj": self.scan.inner}
        _stand_in("causal_conv1d", dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_update")))
        _stand_in("mamba_ssm", {"__path__": []})
        for part in ("ops", "ops.triton", "utils"):
            _stand_in(f"mamba_ssm.{part}", {"__path__": []})
        unused = dict.fromkeys(("mamba_inner_fn", "bimamba_inner_fn"))
        _stand_in("mamba_ssm.ops.selective_scan_interface", interface | unused)
        _stand_in("mamba_ssm.ops.triton.layer_norm", self.scan.norms())
        _stand_in("mamba_ssm.modules", {"__path__": [str(self.folder / "mamba-1p1p1/mamba_ssm/modules")]})
        _stand_in("mamba_ssm.utils.generation", {"GenerationMixin": object})
        _stand_in("mamba_ssm.utils.hf", dict.fromkeys(("load_config_hf", "load_state_dict_hf")))


def _names(module: str) -> dict[str, Any]:
    return dict(vars(importlib.import_module(module)))


def _stand_in(name: str, contents: dict[str, Any]) -> None:
    """Let a module that cannot be imported have these contents."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        vars(module).update({key: value for key, value in contents.items() if key not in ("__name__", "__spec__")})
        vars(module)[_MARK] = True
        sys.modules[name] = module


class Peer:
    """What answers the requests; each method but those that begin with an underscore answers one kind."""

    def __init__(self) -> None:
        self.loaded: dict[str, Loaded] = {}
        self.device = "cpu"
        self.torch: Any = None

    def hello(self, threads: int, device: str) -> dict[str, Any]:
        """Import torch."""
        try:
            self.torch = importlib.import_module("torch")
        except ImportError as error:
            raise Failure("environment", f"torch cannot be imported there: {error}") from error
        if device == "cuda" and not self.torch.cuda.is_available():
            raise Failure("environment", "its torch sees no GPU, and our side computes on one")
        self.device = device
        self.torch.set_num_threads(threads)
        self.torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA has it; nothing on a CPU
        self.torch.backends.cudnn.benchmark = True  # as the official trainers have it
        found = {"Python": platform.python_version()}
        for package in ("torch", "timm"):
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        name = self.torch.cuda.get_device_name() if device == "cuda" else "cpu"
        return {"versions": found, "device": name}

    def check(self, model: str) -> dict[str, Any]:
        """Look a name up."""
        kind, _, name = model.partition(":")
        timm = self._timm()
        if kind == "timm":
            place, known = "timm", timm.list_models()
        else:
            place, _, name = name.rpartition(":")
            known = list(Official(self.torch, Path(place).resolve()).known)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise Failure("name", f"{place} has no model {name!r}{'; near: ' + ', '.join(near) if near else ''}")
        return {}

    def load(self, model: str, batch: int, size: int, dtype: str, mode: str) -> dict[str, Any]:
        """Build a model with its initial values."""
        self.loaded.pop(model, None)
        gc.collect()
        cuda = self.torch.cuda if self.device == "cuda" else None
        if cuda:
            cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated() if cuda else 0
        kind, _, name = model.partition(":")
        drop_path = DROP_PATH if mode == "training" else 0.0
        if kind == "timm":
            built = self._create(self._timm(), name, {"img_size": size, "drop_path_rate": drop_path})
        else:
            place, _, name = name.rpartition(":")
            built = Official(self.torch, Path(place).resolve()).build(name, size, drop_path)
        self.loaded[model] = Loaded(self.torch, built, self.device, batch, size, dtype, mode)
        self.loaded[model].seconds(1)
        peak = cuda.max_memory_allocated() - before if cuda else None
        return {"parameters": sum(p.numel() for p in built.parameters()), "bytes": peak}

    def time(self, model: str, steps: int) -> dict[str, Any]:
        """Make steps."""
        return {"seconds": self.loaded[model].seconds(steps)}

    def cost(self, model: str, steps: int) -> dict[str, Any]:
        """Make steps, and tell what they cost the processor and the memory."""
        return cost_of(self.loaded[model].step, steps)

    def drop(self) -> dict[str, Any]:
        """Forget all models."""
        self.loaded.clear()
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
        return {}

    def _timm(self) -> Any:
        try:
            return importlib.import_module("timm")
        except ImportError as error:
            raise Failure("environment", f"timm cannot be imported there: {error}") from error

    @staticmethod
    def _create(timm: Any, name: str, options: dict[str, Any]) -> Any:
        """Build a model with those of the options that it has."""
        while True:
            try:
                return timm.create_model(name, pretrained=False, **options)
            except TypeError as error:  # "... got an unexpected keyword argument 'img_size'"
                unknown = [option for option in options if repr(option) in str(error)]
                if not unknown:
                    raise
                options = {option: value for option, value in options.items() if option not in unknown}


def reply(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a request."""
    do = request.pop("do")
    try:
        return getattr(peer, do)(**request)
    except Failure as failure:
        kind, text = failure.args
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        is_memory = isinstance(error, MemoryError) or "out of memory" in text.lower() or "alloc" in text.lower()
        kind = "memory" if is_memory else "run"
    return {"error": text, "kind": kind}


def main() -> None:
    """Answer requests until the input ends."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]  # its neighbours are nobody's modules
    warnings.simplefilter("ignore")  # of names that have moved
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends this process
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    peer = Peer()
    for line in sys.stdin:
        print(json.dumps(reply(peer, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
