"""Names of places: URLs are named as paths are, and never opened as such."""

from __future__ import annotations

import os
import pickle
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.errors import UsageError
from starmerge_models.storage import RemotePlace, place_of, relative, without_secrets

PARTS = st.lists(st.from_regex(r"[a-z0-9_-][a-z0-9._-]{0,8}", fullmatch=True), max_size=4)


@given(PARTS)
def test_urls_are_named_as_paths_are(parts: list[str]) -> None:
    place, path = place_of("/".join(["s3://bucket", *parts])), PurePosixPath("/bucket", *parts)
    assert isinstance(place, RemotePlace)
    assert str(place) == f"s3:/{path}"
    assert (place.name, place.suffix, place.stem) == (path.name, path.suffix, path.stem)
    assert [str(own) for own in place.parents] == [f"s3:/{own}" for own in path.parents][:-1]
    assert str(place / "x/y") == f"s3:/{path / 'x/y'}"
    assert relative(place / "x/y", place) == "x/y"
    if parts:
        assert str(place.with_name("x")) == f"s3:/{path.with_name('x')}"
    # What the command line makes a path of loses a slash.
    assert place_of(Path(str(place))) == place
    assert pickle.loads(pickle.dumps(place)) == place
    assert hash(place) == hash(place_of(str(place) + "/"))


def test_places_cannot_be_opened() -> None:
    assert not isinstance(place_of("s3://bucket/model"), os.PathLike)


def test_paths_stay_paths() -> None:
    for text in ("model", "./a=b", "/tmp/x", "https://host/model", "C:/x", "org/name"):
        assert place_of(text) == Path(text)
    assert place_of("~/x") == Path.home() / "x"


@pytest.mark.parametrize("url", ["s3://", "gs:///", "hf://org", "s3://bucket/../x"])
def test_urls_that_name_nothing(url: str) -> None:
    with pytest.raises(UsageError):
        place_of(url)


@pytest.mark.parametrize(
    "url", ["s3://KEY:hidden@bucket/x", "az://c/x?sig=hidden", "hf://org/name?token=hidden"]
)
def test_secrets_in_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="carries credentials") as caught:
        place_of(url)
    assert "hidden" not in str(caught.value)


def test_texts_without_secrets() -> None:
    text = "GET https://me:pw@host/a?X-Amz-Signature=abc failed, see https://host/b"
    assert without_secrets(text) == "GET https://…@host/a?… failed, see https://host/b"


@pytest.mark.parametrize("url", ["s3://bucket/a\tb", "gs://bucket/a\nb", "s3://bucket/a\udcff"])
def test_urls_with_characters_that_no_key_has(url: str) -> None:
    with pytest.raises(UsageError, match="control character"):
        place_of(url)
