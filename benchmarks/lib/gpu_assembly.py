"""What ptxas makes of PTX: registers, spills, and the instructions of its longest loop. Nothing runs.

It takes the wheels of ``.[preflight-cuda]``, and for loops ``nvidia-cuda-nvdisasm``.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Assembled(NamedTuple):
    """A kernel's machine code.

    Attributes:
        registers: of a thread.
        spilled: bytes written to memory for want of more, counted once for each place.
        filled: bytes read back.
        text: of the instructions; empty where it was not asked for.
    """

    registers: int
    spilled: int
    filled: int
    text: str

    @property
    def longest_loop(self) -> int:
        """The instructions of a turn of the longest loop."""
        places: dict[str, int] = {}
        count, longest = 0, 0
        for line in self.text.splitlines():
            if label := re.match(r"\s*\.(L_x_\d+):", line):
                places[label[1]] = count
            elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s", line):
                count += 1
                back = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
                longest = max(longest, count - places.get(back[1], count) if back else 0)
        return longest


def assemble(text: str, *, disassemble: bool = False) -> Assembled:
    """Return what ptxas says of PTX, for the architecture that it names."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ptx").write_text(text)
        architecture = re.search(r"\.target (\w+)", text)[1]
        said = run("ptxas", "-v", f"-arch={architecture}", "ptx", "-o", "cubin", folder=folder).stderr
        code = run("nvdisasm", "-c", "cubin", folder=folder).stdout if disassemble else ""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return Assembled(int(re.search(r"Used (\d+) registers", said)[1]), int(spills[1]), int(spills[2]), code)


def run(program: str, *arguments: str, folder: str) -> subprocess.CompletedProcess:
    """Run one of CUDA's programs that came as a wheel."""
    paths = list(Path(sys.prefix).glob(f"lib/python3*/site-packages/nvidia/*/bin/{program}"))
    if len(paths) != 1:
        wheels = f"{len(paths)} of NVIDIA's wheels in {sys.prefix} have it, and one must"
        sys.exit(f"{program}: {wheels}; install what the benchmark's first lines name")
    return subprocess.run([paths[0], *arguments], check=True, capture_output=True, text=True, cwd=folder)
