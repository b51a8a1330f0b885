"""The handle of a request: its slot, and which of the slot's requests it is."""


class Slot(int):
    """A slot number that knows the request it was given out for.

    Equal to its number and usable wherever an integer is; but where the manager gets a Slot whose request has ended, it
    raises ValueError instead of taking the slot's next request for it, and so it does for a Slot of another manager. A
    plain integer, or what numpy makes of a Slot (`np.full(n, slot)`), means whatever request the slot holds. Slots are
    given out in the order in which they became free, so an old number means no request, which is an error, until as
    many requests were admitted as slots were free; and positions that do not go on where the slot's request stands are
    an error. What is left, a new request in the old slot at the very position, passes unseen: give `plan_step` the Slot
    itself (`plan_step(slot, positions)`), or a list of them.
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
