"""Drafts without a model: what followed the last time that the newest tokens stood in the text (prompt lookup)."""

from collections.abc import Sequence

LONGEST_NGRAM = 3


class PromptLookup:
    """The n-grams of one text, n up to LONGEST_NGRAM, with where each was last followed by something.

    Growing by a token and proposing a token cost O(1), whatever the length of the text.
    """

    def __init__(self, ids: Sequence[int]):
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """The text grows."""
        for token in ids:
            end = len(self._ids)
            for n in range(1, min(LONGEST_NGRAM, end) + 1):
                self._follows[tuple(self._ids[end - n :])] = end
            self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow, from the longest n-gram found; none where there is none."""
        size = len(self._ids)
        for n in range(min(LONGEST_NGRAM, size), 0, -1):
            start = self._follows.get(tuple(self._ids[size - n :]))
            if start is not None:
                draft: list[int] = []
                for i in range(start, start + most):  # past the end, the draft continues from itself
                    draft.append(self._ids[i] if i < size else draft[i - size])
                return draft
        return []
