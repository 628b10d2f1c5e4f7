"""What every test process needs before JAX starts: eight virtual CPU devices, and programs compiled once a session.

Also the order of the files: the first worker begins with the first half, the second with the other, and who is done
takes over some of the other's last tests; so most files stay with one worker, which alone makes what their tests share.
And at the end a table of the minutes that each folder took, all processes together.
"""

import collections
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# The tests spend most of their time in the compiler of XLA, and run most programs once: unoptimised, they compile up to
# six times as fast. Each process has one core: splitting a program for several threads only adds work.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=0"
)
# XLA's older emitters, which 0.12 has no more, compile up to four times as fast.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
# The worker processes inherit it: large pages for large arrays, as training commands take them.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# The controlling process makes the folder; the worker processes, and the commands that tests start, inherit its name.
_OWN = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _OWN:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# NumPy's threads would wait for work in a loop, on the core of the other worker.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Tracing makes millions of objects that stay; looking through them for cycles took up to a tenth of the time.
gc.set_threshold(100_000, 50, 50)

_HERE = Path(__file__).parent
# Files with single tests of a minute or more: begun last, one of them would leave the other worker idle at the end.
_LONG = ("kernels/test_tpu_compile.py", "training/test_processes.py", "training/test_end_to_end.py", "test_docs.py")


def pytest_addoption(parser):
    """Add what the suite can do beyond what it always does."""
    parser.addoption("--every-scan", action="store_true", help="compile every scan of every model for every TPU: hours")


def pytest_collection_modifyitems(items):
    """Put the long files first."""
    rank = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(_HERE).as_posix(), len(rank)))


# What JAX reports the seconds of, by the column of the table that adds them up. A program traced inside another counts
# in both.
_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_COLUMNS = ("wall", "CPU", *_EVENTS.values())
_spent = collections.Counter()  # seconds in this process, its children included
_folders = collections.defaultdict(collections.Counter)  # seconds by folder, in the process that reports


def pytest_configure(config):
    """Listen to JAX where tests run: in the workers, or here if there are none."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: _spent.update({_EVENTS[event]: seconds} if event in _EVENTS else {})
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add to a report what was spent since the one before it."""
    report = yield
    cpu = sum(os.times()[:4])
    report.user_properties.append(("spent", {**_spent, "wall": call.duration, "CPU": cpu - _spent["so far"]}))
    _spent.clear()
    _spent["so far"] = cpu
    return report


def pytest_runtest_logreport(report):
    """Add a report, which a worker may have sent, to its folder."""
    for name, spent in report.user_properties:  # none for a test with which its worker crashed
        if name == "spent":
            _folders["/".join(report.nodeid.split("::")[0].split("/")[:-1])].update(spent)


def pytest_terminal_summary(terminalreporter):
    """Print the minutes of each folder."""
    terminalreporter.section("minutes by folder, all processes together")
    for folder, spent in [*sorted(_folders.items()), ("all", sum(_folders.values(), collections.Counter()))]:
        figures = "  ".join(f"{name} {spent[name] / 60:5.1f}" for name in _COLUMNS)
        terminalreporter.write_line(f"{folder:16} {figures}")


def pytest_unconfigure(config):
    """Remove the folder at the end of the session."""
    if _OWN:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
