"""How models are referred to: places, adapters on models, stacked layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.checkpoints.references import (
    Cut,
    Piece,
    map_reference,
    name_of,
    parse_reference,
    spell,
)
from starmerge_models.errors import UsageError


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("org/a", [Piece(("org/a",))]),
        ("org/a@v1.2", [Piece(("org/a@v1.2",))]),
        ("org/a+org/b@v2", [Piece(("org/a", "org/b@v2"))]),
        ("a+b+c", [Piece(("a", "b", "c"))]),
        ("a[0:24],b+c[8:32]", [Piece(("a",), Cut(0, 24)), Piece(("b", "c"), Cut(8, 32))]),
        (
            "t5[encoder 0:6],t5[decoder 2:4]",
            [Piece(("t5",), Cut(0, 6, "encoder")), Piece(("t5",), Cut(2, 4, "decoder"))],
        ),
        ("x,y[0:1]", [Piece(("x,y",), Cut(0, 1))]),
    ],
)
def test_references_are_read_and_spelled(text, pieces):
    assert parse_reference(text, lambda place: False) == tuple(pieces)
    assert spell(pieces) == text


@pytest.mark.parametrize("folder", ["c++", "a+b", "a[0:2]", "x[0:1],y[1:2]", "b+"])
def test_a_folder_of_such_a_name_is_taken_for_the_folder(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_reference(folder) == (Piece((folder,)),)


@pytest.mark.parametrize("folder", ["c++", "a+b", "b+"])
def test_a_plus_in_a_folders_name_separates_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_reference(f"{folder}+org/lora") == (Piece((folder, "org/lora")),)
    assert parse_reference(f"org/model+{folder}") == (Piece(("org/model", folder)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a[3:3]", r"\[3:3\] holds no layer"),
        ("a[0:4],b", "'b' says no layers"),
        ("a+", "nothing stands beside a '.'"),
        ("+a", "nothing stands beside a '.'"),
    ],
)
def test_what_is_no_reference_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_reference(text)


def test_places_are_replaced_wherever_they_stand():
    found = map_reference("a+b[0:2],c[1:3]", str.upper, lambda place: False)
    assert found == "A+B[0:2],C[1:3]"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/a@v1", "a"),
        ("folder/a/", "a"),
        ("org/a+my/b@x", "a+b"),
        ("org/a[0:2],org/b[1:3]", "a[0:2],b[1:3]"),
    ],
)
def test_a_model_is_called_after_the_last_parts(text, name):
    assert name_of(text) == name


places = st.from_regex(r"[a-z]{1,5}/[a-z0-9._-]{1,8}", fullmatch=True)
cuts = st.builds(
    lambda start, size, part: Cut(start, start + size, part),
    st.integers(0, 90),
    st.integers(1, 40),
    st.sampled_from(["", "encoder", "vision"]),
)
cut_pieces = st.builds(Piece, st.lists(places, min_size=1, max_size=3).map(tuple), cuts)
whole = st.builds(Piece, st.lists(places, min_size=1, max_size=3).map(tuple))


@given(st.one_of(whole.map(lambda piece: [piece]), st.lists(cut_pieces, min_size=1, max_size=4)))
def test_what_is_spelled_is_read_back(pieces):
    assert parse_reference(spell(pieces), lambda place: False) == tuple(pieces)
