"""The handle of a request: its slot, and which of the slot's requests it is."""


class Slot(int):
    """A slot number that knows the request it was given out for.

    Equal to its number and usable wherever an integer is; but where the manager gets a Slot whose request has ended, it
    raises ValueError instead of taking the slot's next request for it, and so it does for a Slot of another manager. A
    plain integer, or what numpy makes of a Slot (`np.full(n, slot)`), means whatever request the slot holds: give
    `plan_step` the Slot itself, or a list of them.
    """

    generation: int  # how many requests the slot had held before this one
    table: int  # of the manager that gave it out, within this process; 0 where that is not known

    def __new__(cls, number: int, generation: int, table: int = 0) -> "Slot":
        """The request of `number` that followed `generation` others."""
        slot = super().__new__(cls, number)
        slot.generation, slot.table = generation, table
        return slot

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return Slot, (int(self), self.generation)
