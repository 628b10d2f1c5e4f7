"""An interpreter of PTX: it runs the programs of one warp that XLA makes of our GPU kernels, slowly, on any machine.

Only what our kernels use is here, and anything else is refused. All threads must take the same branches; to read or
write outside of the arrays, or of shared memory, is an error. Names and meanings are those of NVIDIA's "PTX ISA".
"""

import operator
import re

import numpy as np

THREAD = np.arange(32)
SHARED = 1 << 16  # bytes
MARGIN = 1 << 12  # bytes between two arrays, which belong to neither

COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMPARISONS["num"] = lambda x, y: ~(np.isnan(x) | np.isnan(y))
COMPARISONS["nan"] = lambda x, y: np.isnan(x) | np.isnan(y)
FLOATS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.fmax,
    "min": np.fmin,
    "abs": np.abs,
    "neg": np.negative,
    "fma": lambda x, y, z: x.astype(np.float64) * y + z,
    "ex2": lambda x: np.exp2(x.astype(np.float64)),
    "rcp": lambda x: 1 / x.astype(np.float64),
}
INTEGERS = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "shl": np.left_shift,
    "shr": np.right_shift,
}


class Program:
    """A kernel; a register of its 32 threads is an array of 32 uint64, whose upper bits are zeros.

    Args:
        text: PTX of one entry.

    Raises:
        NotImplementedError: it is not of one warp, or has an instruction that is not known here.
    """

    def __init__(self, text):
        self.name, parameters, bounds, body = re.search(
            r"\.visible \.entry (\w+)\((.*?)\)(.*?)\{(.*)\n\}", text, re.DOTALL
        ).groups()
        if ".reqntid 32, 1, 1" not in bounds:
            raise NotImplementedError(f"{self.name} is not of one warp: {bounds.strip()}")
        self.parameters = re.findall(r"\w+_param_\d+", parameters)
        self.registers, self.labels, self.source = {}, {}, []
        for line in re.sub(r"//.*", "", body).splitlines():
            if label := re.match(r"(\$L\w+):", line):
                self.labels[label[1]] = len(self.source)
                continue
            if re.match(r"\s*\{\s*\.reg", line):  # a block with registers of its own
                line = line.replace("{", "", 1).rstrip().removesuffix("}")
            statements = map(str.strip, line.split(";"))
            self.source += [s for s in statements if s and not s.startswith((".reg", ".pragma"))]
        self.steps = [self._step(statement) for statement in self.source]

    def run(self, arrays, outputs, aliases, programs):
        """Run all programs of the grid, one after the other, and return the outputs.

        Args:
            arrays: the first parameters.
            outputs: (shape, dtype) of the others; what is not written is made of bytes 0xFF.
            aliases: {number of an array: number of the output that is in the same memory}.
            programs: how many.
        """
        blank = [np.frombuffer(b"\xff" * int(np.prod(s) * np.dtype(d).itemsize), d).reshape(s) for s, d in outputs]
        for i, number in aliases.items():
            blank[number] = arrays[i]
        parameters = [*arrays, *blank]
        places = np.cumsum([MARGIN, *(-(-array.nbytes // MARGIN) * MARGIN + MARGIN for array in parameters)]).tolist()
        self.memory, self.exists = np.full(places[-1], 0xFF, np.uint8), np.zeros(places[-1], bool)
        for place, array in zip(places, parameters, strict=False):
            self.memory[place : place + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
            self.exists[place : place + array.nbytes] = True
        for i, number in aliases.items():
            places[i] = places[len(arrays) + number]
        self.addresses = dict(zip(self.parameters, places[:-1], strict=True))
        for self.number in range(programs):
            self.shared = np.full(SHARED, 0xFF, np.uint8)
            self.registers.clear()
            at = 0
            while at < len(self.steps):
                try:
                    with np.errstate(all="ignore"):
                        to = self.steps[at]()
                except (AssertionError, KeyError, IndexError) as error:
                    raise RuntimeError(f"{self.name}, program {self.number}: {self.source[at]}") from error
                at = at + 1 if to is None else to
        return [
            np.frombuffer(self.memory[place : place + array.nbytes].tobytes(), array.dtype).reshape(array.shape)
            for place, array in zip(places[len(arrays) :], blank, strict=False)
        ]

    def _step(self, statement):
        """Return a function that executes a statement, and returns where to go on if that is not the next."""
        guard, name, rest = re.match(r"(?:@(!?%?\w+)\s+)?([\w.:]+)\s*(.*)", statement).groups()
        kind, *modifiers = name.split(".")
        operands = [operand.strip() for operand in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\[\]{}])+", rest)]

        def active():
            if guard is None:
                return np.ones(32, bool)
            value = self.registers[guard.lstrip("!")].astype(bool)
            return ~value if guard.startswith("!") else value

        if kind == "bra":
            return lambda: self._branch(active(), operands[0])
        if kind == "ret":
            return lambda: len(self.steps)
        if kind in ("bar", "griddepcontrol"):
            return lambda: None
        if kind in ("ld", "st") and modifiers[0] != "param":
            return self._access(kind, modifiers, operands, active)
        if kind in ("ldmatrix", "stmatrix") and "trans" not in modifiers:
            return self._matrices(kind, operands)
        if kind == "mma" and modifiers[2] == "m16n8k8" and modifiers[-2] == "tf32":
            return self._multiply(operands)
        function = self._function(kind, modifiers, operands)
        if function is None:
            raise NotImplementedError(statement)
        target, *sources = operands
        sources = [] if kind == "ld" else list(map(self._operand, sources))

        def step():
            value = function(*(source() for source in sources))
            old = self.registers.get(target, np.zeros(32, np.uint64))
            self.registers[target] = value if guard is None else np.where(active(), value, old)

        return step

    def _operand(self, text):
        """Return a function that returns the values of an operand."""
        if text in ("%tid.x", "%laneid"):
            return lambda: THREAD.astype(np.uint64)
        if text == "%ctaid.x":
            return lambda: np.full(32, self.number, np.uint64)
        if re.match(r"[%a-z]", text) and text != "global_smem":
            return lambda: self.registers[text]
        text = {"global_smem": "0"}.get(text, text).rstrip("U").replace("0f", "0x")
        constant = np.full(32, int(text, 0) % (1 << 64), np.uint64)
        return lambda: constant

    def _branch(self, active, label):
        assert active.all() or not active.any(), "threads part"
        return self.labels[label] if active.all() else None

    def _address(self, text):
        base, offset = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+)\s*)?\]", text).groups()
        base = self._operand(base)
        return lambda: base().astype(np.int64) + int(offset or 0)

    def _access(self, kind, modifiers, operands, active):
        memory, size = modifiers[0], int(modifiers[-1][1:]) // 8
        address = self._address(operands[kind == "ld"])
        registers = operands[kind == "st"].strip("{} ").replace(" ", "").split(",")
        values = None if kind == "ld" else list(map(self._operand, registers))

        def step():
            there, first = active(), address()
            for j, register in enumerate(registers):
                at = (first + j * size)[there, None] + np.arange(size)
                data = self.shared if memory == "shared" else self.memory
                assert ((at >= 0) & (at < len(data))).all(), "outside of memory"
                assert memory == "shared" or self.exists[at].all(), "outside of the arrays"
                if kind == "st":
                    data[at] = _bytes(values[j](), size)[there]
                else:
                    full = _bytes(self.registers.get(register, np.zeros(32, np.uint64)), 8)
                    full[there, :size], full[there, size:] = data[at], 0
                    self.registers[register] = full.view(np.uint64)[:, 0].copy()

        return step

    def _matrices(self, kind, operands):
        """8 x 8 matrices of 16 bits: two neighbours of row i // 4 in thread i; thread 8 j + r has row r of matrix j."""
        address = self._address(operands[kind == "ldmatrix"])
        registers = operands[kind == "stmatrix"].strip("{} ").replace(" ", "").split(",")

        def step():
            for j, register in enumerate(registers):
                at = (address()[8 * j + THREAD // 4] + THREAD % 4 * 4)[:, None] + np.arange(4)
                if kind == "stmatrix":
                    self.shared[at] = _bytes(self.registers[register], 4)
                else:
                    self.registers[register] = self.shared[at].view(np.uint32)[:, 0].astype(np.uint64)

        return step

    def _multiply(self, operands):
        """mma.m16n8k8: D = A B + C, of A and B the upper 19 bits."""
        targets, *factors = (operand.strip("{} ").replace(" ", "").split(",") for operand in operands)
        group, member = THREAD // 4, THREAD % 4
        a = [(group, member), (group + 8, member), (group, member + 4), (group + 8, member + 4)]
        b = [(member, group), (member + 4, group)]
        c = [(group + 8 * (i // 2), 2 * member + i % 2) for i in range(4)]

        def matrix(shape, places, registers, mask):
            result = np.zeros(shape)
            for place, register in zip(places, registers, strict=True):
                result[place] = _float(self._operand(register)() & np.uint64(mask))
            return result

        def step():
            left, right = matrix((16, 8), a, factors[0], 0xFFFFE000), matrix((8, 8), b, factors[1], 0xFFFFE000)
            result = left @ right + matrix((16, 8), c, factors[2], 0xFFFFFFFF)
            for place, register in zip(c, targets, strict=True):
                self.registers[register] = _bits(result[place])

        return step

    def _function(self, kind, modifiers, operands):
        """Return what an instruction makes of the values of its sources, or None if it is not known."""
        of = modifiers[-1] if modifiers else ""
        bits = 1 if of == "pred" else int(re.sub(r"\D", "", of) or 0)
        whole = _whole(bits)
        number = {"f": _float, "s": _signed(bits)}.get(of[:1], whole)
        if kind == "ld":
            return lambda: np.full(32, self.addresses[operands[1].strip("[] ")], np.uint64)
        if kind in ("mov", "cvta"):
            return whole
        if kind == "selp":
            return lambda x, y, which: np.where(which.astype(bool), x, y)
        if kind == "setp":
            return lambda x, y: COMPARISONS[modifiers[0]](number(x), number(y)).astype(np.uint64)
        if kind == "shfl" and modifiers[1] in ("bfly", "idx"):
            return lambda x, to, *_: x[THREAD ^ to.astype(int) if modifiers[1] == "bfly" else to.astype(int)]
        if kind == "cvt":
            return _conversion(*modifiers)
        if kind == "prmt":
            return _permuted
        if kind == "bfe":
            return lambda x, at, size: whole(_signed_of(x >> at, size) if of[:1] == "s" else _below(x >> at, size))
        if of[:1] == "f":
            return (lambda *xs: _bits(FLOATS[kind](*map(_float, xs)))) if kind in FLOATS else None
        if kind in ("mul", "mad"):
            shift, width = (bits if modifiers[0] == "hi" else 0), (2 * bits if modifiers[0] == "wide" else bits)

            def product(x, y, z=0):
                return _whole(width)((number(x) * number(y) >> shift).astype(np.uint64) + np.uint64(z))

            return product
        if kind in ("shl", "shr"):
            return lambda x, by: whole(INTEGERS[kind](number(x), by.astype(number(x).dtype)))
        return (lambda *xs: whole(INTEGERS[kind](*map(number, xs)))) if kind in INTEGERS else None


def _bytes(x, size):
    return x.astype(np.uint64)[:, None].view(np.uint8)[:, :size].copy()


def _whole(bits):
    """Return what puts a number of so many bits in a register."""
    return lambda x: x.astype(np.uint64) & np.uint64((1 << bits) - 1)


def _signed(bits):
    return lambda x: _signed_of(x, np.uint64(bits))


def _signed_of(x, bits):
    shift = np.uint64(64) - bits
    return (x.astype(np.uint64) << shift).view(np.int64) >> shift.astype(np.int64)


def _below(x, bits):
    return x & ((np.uint64(1) << bits) - np.uint64(1))


def _float(x):
    return x.astype(np.uint32).view(np.float32)


def _bits(x):
    return np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)


def _conversion(*modifiers):
    *_, to, of = modifiers
    if to == "tf32":  # rounded half away from zero
        return lambda x: (x + np.uint64(1 << 12)) & np.uint64(0xFFFFE000)
    if (to, of) == ("f32", "bf16"):
        return lambda x: x << np.uint64(16)
    if (to, of) == ("bf16", "f32"):
        return _bfloat16
    if (to, of) == ("bf16x2", "f32"):
        return lambda x, y: _bfloat16(x) << np.uint64(16) | _bfloat16(y)
    if "f" in to + of:
        return None
    return lambda x: _whole(int(to[1:]))(_signed(int(of[1:]))(x) if of[0] == "s" else _whole(int(of[1:]))(x))


def _bfloat16(x):
    """Round to the nearest, half to even."""
    return (x + np.uint64(0x7FFF) + (x >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)


def _permuted(x, y, selector):
    choice = np.concatenate([_bytes(x, 4), _bytes(y, 4)], 1)
    nibbles = selector[:, None].astype(int) >> (4 * np.arange(4)) & 15
    picked = np.take_along_axis(choice, nibbles & 7, 1)
    picked = np.where(nibbles & 8, np.where(picked & 128, 255, 0), picked).astype(np.uint8)
    return picked.view(np.uint32)[:, 0].astype(np.uint64)
