"""Files that several machines fill, in pieces, in an S3-compatible store of this machine."""

from __future__ import annotations

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from starmerge_models.checkpoints.writer import OutputTensor, ShardWriter
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.storage import parts, pieces
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.pieces import (
    PieceFolder,
    PiecesOfFile,
    StagedFolder,
    delete_pieces,
    files_in,
    pieces_left,
    pieces_of,
)
from starmerge_models.storage.places import RemotePlace
from starmerge_models.storage.scratch import Scratch
from starmerge_models.storage.storage import ShortFileError
from tests.storage.object_server import Request
from tests.storage.test_objects import World, server, world

__all__ = ["server", "world"]  # fixtures

OUTPUT = "out"


def folder_of(world: World, tmp_path: Path) -> PieceFolder:
    output = RemotePlace("s3", world.bucket, OUTPUT)
    home = tmp_path / "home"
    home.mkdir()
    staged = StagedFolder(home, pieces=pieces_of(output, "abc"))
    shared = staged.shared()
    assert isinstance(shared, PieceFolder)
    return shared


@pytest.mark.parametrize("seed", range(3))
def test_a_file_is_what_was_written_whoever_wrote_it_in_whatever_order(
    seed: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of three machines write tensors panel by panel; some of them are written twice."""
    monkeypatch.setattr(pieces, "PIECE", 1000)
    draw = random.Random(seed)
    content = draw.randbytes(draw.randrange(4000, 12_000))
    ends = sorted(draw.sample(range(1, len(content)), 8))
    tensors = list(zip([0, *ends], [*ends, len(content)], strict=True))
    shared = folder_of(world, tmp_path)
    machines = [pickle.loads(pickle.dumps(shared)).open("w", len(content)) for _ in range(3)]

    def write(start: int, stop: int) -> None:
        file = draw.choice(machines)
        height = draw.randrange(50, 2500)
        for begin in range(start, stop, height):
            panel = memoryview(content)[begin : min(begin + height, stop)]
            file.write(panel, begin, more=begin + height < stop)

    work = tensors + draw.sample(tensors, 3)
    draw.shuffle(work)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda own: write(*own), work):
            pass
    start = draw.randrange(len(content))
    length = draw.randrange(len(content) - start)
    for file in machines:  # whichever wrote it, and before any is closed
        assert file.read(0, len(content)) == content
        assert file.read(start, length) == content[start : start + length]
    assert shared.names() == ["w"]
    assert shared.place("w").read_bytes() == content
    (found,) = files_in(shared.pieces).values()
    assert b"".join(found.contents()) == content
    assert max(piece.length for piece in found.pieces) <= 1000
    found.send(RemotePlace("s3", world.bucket, "out/w"))
    assert world.files("out") == {"w": content}


def test_large_files_are_put_together_in_parts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART", 5 * 2**20)
    monkeypatch.setattr(pieces, "PIECE", 2**20)
    content = random.Random(0).randbytes(21 * 2**20 + 7)
    source = tmp_path / "source"
    source.write_bytes(b"12345" + content)
    shared = folder_of(world, tmp_path)
    shared.open("folder/w", len(content)).copy(source, 5, len(content), 0)
    (found,) = files_in(shared.pieces).values()
    assert len(found.pieces) == 22
    target = RemotePlace("s3", world.bucket, "out/folder/w")
    found.send(target)
    assert world.proxy.count("PUT", "partNumber=4") == 1
    assert world.files("out") == {"folder/w": content}
    with pytest.raises(ShortFileError, match="ends early"):
        shared.open("x", 10).copy(source, len(content), 10, 0)


def test_what_nobody_has_written_is_neither_read_nor_sent(world: World, tmp_path: Path) -> None:
    shared = folder_of(world, tmp_path)
    file = shared.open("w", 10)
    for start in range(10):
        with pytest.raises(ShortFileError, match="lacks pieces of w"):
            file.read(start, 1)
    file.write(memoryview(b"abc"), 0)
    file.write(memoryview(b"xyz"), 7)
    assert (file.read(0, 3), file.read(8, 2)) == (b"abc", b"yz")
    for start, length in ((0, 4), (5, 1), (6, 2), (0, 10), (7, 4)):
        with pytest.raises(ShortFileError, match="lacks pieces of w"):
            file.read(start, length)
    (found,) = files_in(shared.pieces).values()
    with pytest.raises(StarmergeError, match="lacks pieces of w"):
        found.send(RemotePlace("s3", world.bucket, "out/w"))
    with pytest.raises(StarmergeError, match="lacks pieces of v"):
        PiecesOfFile("v", 1, ()).check()
    assert world.files("out") == {}


def test_what_is_held_back_of_an_unfinished_tensor_is_not_sent(
    world: World, tmp_path: Path
) -> None:
    shared = folder_of(world, tmp_path)
    file = shared.open("w", 10)
    file.write(memoryview(b"abc"), 0, more=True)
    assert files_in(shared.pieces) == {}
    file.write(memoryview(b"de"), 5)  # of another tensor
    assert (file.read(0, 3), file.read(5, 2)) == (b"abc", b"de")
    file.write(memoryview(b"fgh"), 7, more=True)
    file.close()
    (found,) = files_in(shared.pieces).values()
    assert [(piece.start, piece.length) for piece in found.pieces] == [(0, 3), (5, 2)]


def test_files_of_one_output_are_apart(world: World, tmp_path: Path) -> None:
    shared = folder_of(world, tmp_path)
    for name in ("a/w", "a/b/w", "ab/w", "w"):
        shared.open(name, 1).write(memoryview(name[0].encode()), 0)
    shared.put("own.json", b"{}")
    assert shared.names() == ["a/b/w", "a/w", "ab/w", "own.json", "w"]
    assert LocalFolder(shared.place("a")).names() == ["b/w", "w"]
    shared.delete("a")
    assert shared.names() == ["ab/w", "own.json", "w"]
    # A later run writes the file anew, and the one that was brought here is of this run.
    assert shared.place("w").read_bytes() == b"w"
    shared.open("w", 1).write(memoryview(b"v"), 0)
    assert shared.place("w").read_bytes() == b"v"


def test_leftovers_name_the_run_that_still_goes_on(world: World, tmp_path: Path) -> None:
    output = RemotePlace("s3", world.bucket, OUTPUT)
    shared = folder_of(world, tmp_path)
    assert pieces_left(output) == []
    shared.open("w", 3).write(memoryview(b"abc"), 0)
    other = PieceFolder(pieces_of(RemotePlace("s3", world.bucket, "out2"), "abc"))
    other.open("w", 1).write(memoryview(b"x"), 0)
    like = RemotePlace("s3", world.bucket, "out.partial-2")
    PieceFolder(pieces_of(like, "abc")).open("w", 1).write(memoryview(b"x"), 0)
    (left,) = pieces_left(output)
    assert (left.path, left.nbytes, left.is_in_work()) == (shared.pieces, 3, False)
    assert left.written > 1.7e9
    with Scratch(output).staged("abc", lambda folder: None) as folder:
        (left,) = pieces_left(output)
        assert left.is_in_work()
        with pytest.raises(UsageError, match="still runs"):
            left.delete()
        (folder.path / "w").touch()
    delete_pieces(shared.pieces)
    assert pieces_left(output) == []
    assert len(files_in(other.pieces)) == 1
    assert len(pieces_left(like)) == 1


def test_nothing_is_listed_for_what_this_machine_has(world: World, tmp_path: Path) -> None:
    shared = folder_of(world, tmp_path)
    shared.put("own.json", b"{}")
    lists: list[Request] = []
    world.proxy.plan = lists.append
    assert shared.place("own.json").read_bytes() == b"{}"
    shared.append("journal.jsonl", b"line")
    assert lists == []


def test_the_panels_of_a_tensor_are_one_piece(world: World, tmp_path: Path) -> None:
    shared = folder_of(world, tmp_path)
    tensor = torch.arange(40, dtype=torch.float32)
    layout = [OutputTensor("t", torch.float32, (40,), 160)]
    with ShardWriter(shared, layout) as writer:
        for start in range(0, 40, 10):
            writer.write("t", tensor[start : start + 10], start)
        assert writer.digest("t") == blake3(tensor.numpy().tobytes()).hexdigest()
    (found,) = files_in(shared.pieces).values()
    assert [piece.length for piece in found.pieces][1:] == [160]  # after the header
