"""The handle of a request: its slot, and which of the slot's requests it is."""


class Slot(int):
    """A slot number that knows the request it was given out for.

    Equal to its number and usable wherever an integer is; but where the manager gets a Slot whose request has ended, it
    raises ValueError instead of taking the slot's next request for it. A plain integer, or what numpy makes of a Slot,
    means whatever request the slot holds.
    """

    generation: int  # how many requests the slot had held before this one

    def __new__(cls, number: int, generation: int) -> "Slot":
        """The request of `number` that followed `generation` others."""
        slot = super().__new__(cls, number)
        slot.generation = generation
        return slot

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return Slot, (int(self), self.generation)
