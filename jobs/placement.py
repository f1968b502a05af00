"""Which machine holds which part of an index: parts go where memory is."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine has for parts of an index.

    Attributes:
        name: As Ray knows it.
        num_bytes: Of memory.
        num_slots: How many parts it can hold, one per CPU.
    """

    name: str
    num_bytes: float
    num_slots: int


def place(sizes: Sequence[float], machines: Sequence[Machine]) -> list[str]:
    """Returns the name of each part's machine: the largest first, each where most memory is left; empty where no slot is.

    Args:
        sizes: Of the parts, in bytes.
        machines: To choose from.
    """
    left = {machine.name: machine.num_bytes for machine in machines}
    slots = {machine.name: machine.num_slots for machine in machines}
    chosen = [""] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda own: -sizes[own]):
        name = max((own for own in left if slots[own]), key=left.__getitem__, default="")
        if not name:
            break
        chosen[number] = name
        left[name] -= sizes[number]
        slots[name] -= 1
    return chosen
