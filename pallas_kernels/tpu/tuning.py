"""The numbers that were chosen by measurement, in one row for each generation of TPU.

What was measured are static cycles of the compiler's schedules (``benchmarks/tpu_scan.py``,
``benchmarks/results/tpu_scan.md``): nothing has run on a TPU yet. A number is to be changed together with
``tests/kernels/cycle_budgets.json``, which holds what the present ones give.
"""

import dataclasses

FEW_STATES = 2  # N up to which the backward pass goes token by token: ``backward.py`` has a schedule for each side


@dataclasses.dataclass(frozen=True)
class Turns:
    """Tokens of one turn of each loop of a kernel; a turn is straight code, which the compiler schedules as a whole.

    Attributes:
        project: of the loops without an order: time steps, and their gradient's way back.
        forward: of the recurrence.
        again: of the recurrence that the backward pass repeats.
        back: of the way from the last token to the first.
    """

    project: int
    forward: int
    again: int
    back: int


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A row of the table.

    Attributes:
        keep_decays: with more than ``FEW_STATES``, whether the backward pass keeps the decays of its recomputation.
            That takes two stores a cycle, which v6e and later have: 4 to 11 % less there, on v5e it costs. With few
            states they are kept on every TPU (v5e: VMamba-T stage 2 0.868 to 0.847 ms).
        channels, channels_few: channels of a block at most, with more than 4 states and with up to 4. Larger blocks
            read B and C less often, and leave fewer states in VMEM to the backward pass.
        states_in_flight: registers of state that the recurrence holds at once; 8 hide the latency of the exponential
            and leave the other 56 to what a token needs.
        pixels_a_product: tokens whose time steps one product of the matrix unit makes, at most.
        product_side: the side of a matrix unit, which limits the tokens of one product further in the forward pass. On
            v6e 256 instead of 128: VMamba-T stage 2 forward 0.229 to 0.226 ms, and 12 spills instead of 92. The
            backward pass stays with 128, for both sides of its weights are streamed: 0.751 against 0.764 ms.
        project_forward, project_backward: channels times pixels of one turn of the loops without an order. Half as many
            leave the latency of the matrix unit open: VMamba-T stage 2 0.263 and 0.848 instead of 0.254 and 0.811 ms.
        many: turns with 8 states or more (``project`` apart): EfficientVMamba-T stage 2 on v5e fills 95 % of the slots
            of the vector units forward, 91 % backward.
        few: tokens times tiles of such turns with fewer states: forward VMamba-T takes 5 to 7 % less with turns of 56
            than with turns of 28; on the way back more than 16 spill.
        fixed: turns that replace all of these.
    """

    keep_decays: bool
    channels: int = 16
    channels_few: int = 32
    states_in_flight: int = 8
    pixels_a_product: int = 16
    product_side: int = 128
    project_forward: int = 7168
    project_backward: int = 3584
    many: Turns = Turns(project=0, forward=14, again=8, back=3)
    few: Turns = Turns(project=0, forward=56, again=56, back=16)
    fixed: Turns | None = None

    def turns(self, *, state: int, channels: int, tiles: int, gradient: bool) -> Turns:
        """Return the turns of a kernel with N states, blocks of ``channels``, and ``tiles`` of 8 channels in flight."""
        if self.fixed:
            return self.fixed
        project = max(8, (self.project_backward if gradient else self.project_forward) // channels)
        if state >= 8:
            return dataclasses.replace(self.many, project=project)
        return Turns(
            project, max(8, self.few.forward // tiles), max(8, self.few.again // tiles), max(2, self.few.back // tiles)
        )


# By the number of the generation as Pallas knows it: 4 is v4; 5 is v5e and v5p; 6 is v6e; 7 is tpu7x.
GENERATIONS = {
    4: Tuning(keep_decays=False),
    5: Tuning(keep_decays=False),
    6: Tuning(keep_decays=True, product_side=256),
    7: Tuning(keep_decays=True, product_side=256),
}
# XLA compiles an interpreted kernel for a CPU: long turns take it long, and gain nothing.
INTERPRETED = Tuning(keep_decays=False, pixels_a_product=3, fixed=Turns(project=4, forward=3, again=3, back=2))


def of_generation(number: int) -> Tuning:
    """Return the row of a generation; of one that is not known yet, the newest row."""
    return GENERATIONS[min(max(number, min(GENERATIONS)), max(GENERATIONS))]
