"""The TPU kernels in a form that Pallas's interpreter compiles fast."""

import dataclasses

from pallas_kernels.tpu import tuning
from pallas_kernels.tpu.tuning import Turns


def one_token_a_turn(monkeypatch) -> None:
    """Have the loops of the kernels handle one token a turn: a third of the code, and nothing else changes."""
    turns = Turns(project=1, forward=1, again=1, back=1)
    monkeypatch.setattr(tuning, "INTERPRETED", dataclasses.replace(tuning.INTERPRETED, fixed=turns))
