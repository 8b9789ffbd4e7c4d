"""From tokens to the text that a reader may see while it is written."""


class TextStream:
    """Decodes token by token and ends before the first stop string.

    Text that may turn out to be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, decoder, stop_strings=()):
        self._decoder = decoder
        self._stop_strings = stop_strings
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is now certain."""
        return self._show(self._decoder.push(token_id), final=False)

    def finish(self) -> str:
        """Says that no token follows; returns what was held back."""
        return self._show(self._decoder.finish(), final=True)

    def _show(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        pending = self._held + piece
        found = [i for s in self._stop_strings if (i := pending.find(s)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(pending) - (0 if final else self._possible_start(pending))
        shown, self._held = pending[:keep], "" if found else pending[keep:]
        self.text += shown
        return shown

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stop_strings:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
