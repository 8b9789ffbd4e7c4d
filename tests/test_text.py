"""Stop strings and what may be shown while a text is written."""

from hypothesis import given
from hypothesis import strategies as st

from pyllm.runtime.text import TextStream


class Letters:
    """A decoder whose tokens are characters."""

    def push(self, token):
        return chr(token)

    def finish(self):
        return ""


def run(text, stops):
    stream = TextStream(Letters(), stops)
    pieces = []
    for c in text:
        pieces.append(stream.push(ord(c)))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_ends_before_the_first_stop_string(text, stops):
    pieces, stream = run(text, tuple(stops))
    # The first stop string to be complete ends the text; of two complete at once, the longer.
    ends = {s: text.find(s) + len(s) for s in stops if s in text}
    expected = text
    if ends:
        complete = min(ends.values())
        expected = text[: min(end - len(s) for s, end in ends.items() if end == complete)]
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == bool(ends)


def test_holds_back_only_what_may_become_a_stop_string():
    pieces, _ = run("hello </s", ("</s>",))
    assert pieces[:6] == list("hello ")
    assert pieces[6:] == ["", "", "", "</s"]
