"""Where an answer stops."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexctl.serving import Stops, Token


def said(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    guard: Stops[Token] = Stops(stops)
    out: list[Token] = []
    for piece in pieces:
        out += guard.add(Token(text=piece, id=0))
        # What is out already can never be part of a stop that comes later.
        assert not any(stop in "".join(token.text for token in out) for stop in stops)
        if guard.found:
            return "".join(token.text for token in out), True
    out += guard.rest()
    return "".join(token.text for token in out), False


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_an_answer_is_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    # Stops that come with one and the same piece count together, as a reader of the stream would see them.
    text, seen = "", ""
    for piece in pieces:
        seen += piece
        ends = [seen.index(stop) for stop in stops if stop in seen]
        if ends:
            text = seen[: min(ends)]
            assert said(pieces, tuple(stops)) == (text, True)
            return
    assert said(pieces, tuple(stops)) == (seen, False)


def test_pieces_that_cannot_be_part_of_a_stop_are_not_held() -> None:
    guard: Stops[Token] = Stops(("abc",))
    assert [token.text for token in guard.add(Token(text="xx", id=1))] == ["xx"]
    assert guard.add(Token(text="xab", id=2)) == []
    assert [(token.text, token.id) for token in guard.add(Token(text="d", id=3))] == [("xab", 2), ("d", 3)]
    assert guard.add(Token(text="ya", id=4)) == []
    assert [(token.text, token.id) for token in guard.add(Token(text="bcz", id=5))] == [("y", 4)]
    assert guard.found
