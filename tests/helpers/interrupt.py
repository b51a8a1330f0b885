"""Ctrl-C at a chosen place, as Python hears it between two bytecodes, or another exception there."""

import dis
import functools
import sys

# Where the interpreter looks for signals (`CHECK_EVAL_BREAKER` in CPython's ceval.c): where a function begins or goes
# on, at the end of a call, and where a loop jumps back. Nothing is heard between two others.
_HEARING = ("RESUME", "CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD")


def hears(instruction):
    """Whether Python looks for signals at the end of this instruction."""
    name = instruction.opname
    return name.startswith(_HEARING) and not name.startswith(("CALL_INTRINSIC", "JUMP_BACKWARD_NO_INTERRUPT"))


@functools.cache
def _hearing(code):
    """Offset -> name of the instructions of a function at whose end a signal is heard."""
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code) if hears(instruction)}


class Interrupt:
    """Raises KeyboardInterrupt at the n-th moment in a folder's functions at which Python hears signals.

    Without n counts the moments and keeps their places (file, function, line, bytecode).
    """

    def __init__(self, folder, at=None, error=KeyboardInterrupt):
        self.folder, self.at, self.error, self.count, self.places = str(folder), at, error, 0, []
        self._returned_to = None  # the frame to which a function of the folder has just returned

    def _moment(self, frame):
        self.count += 1
        if self.at is None:
            code = frame.f_code
            self.places.append((code.co_filename, code.co_name, frame.f_lineno, frame.f_lasti))
        elif self.count == self.at:
            sys.settrace(None)
            raise self.error

    def __call__(self, frame, event, arg):
        """Begins to follow a function, or a generator that goes on."""
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        hearing, heard = _hearing(frame.f_code), "RESUME"
        self._returned_to = None

        def follow(frame, event, arg):
            nonlocal heard
            if event == "opcode":
                # The plain call of a Python function ends without another look: it ran in the same loop.
                if heard and (self._returned_to is not frame or heard == "CALL_FUNCTION_EX"):
                    self._moment(frame)
                self._returned_to = None
                heard = hearing.get(frame.f_lasti)
            elif event == "return":
                # What `__new__` and its like return, C has called.
                self._returned_to = None if frame.f_code.co_name.startswith("__") else frame.f_back
            return follow

        return follow

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
