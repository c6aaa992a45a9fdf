import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from kmem.config import UserError
from kmem.files import AtomicFile, atomic_folder, atomic_write


def content(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_file_is_the_old_one_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, "old")

    def fail():
        with AtomicFile(path) as file:
            file.stream.write(b"half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert content(tmp_path) == {"a": "old"}
    atomic_write(path, "größer")
    assert content(tmp_path) == {"a": "größer"}


def test_a_file_that_the_disk_does_not_take_leaves_nothing(tmp_path):
    os.symlink("/dev/full", tmp_path / "a.partial")
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        atomic_write(tmp_path / "a", "x")
    assert os.listdir(tmp_path) == []


def test_a_folder_may_hold_links_to_what_is_elsewhere(tmp_path):
    """And waits for none of it: such a file may lie where nothing can be flushed."""
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "link").symlink_to("/elsewhere/file")
    assert os.readlink(tmp_path / "a" / "link") == "/elsewhere/file"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a"
    (tmp_path / "deep" / "a.partial" / "sub").mkdir(parents=True)  # by a process that was killed
    (tmp_path / "deep" / "a.partial" / "sub" / "left").touch()
    path.mkdir()

    def write(text, error=None, **choice):
        with atomic_folder(path, **choice) as folder:
            assert list(folder.glob("[!.]*")) == []
            (folder / "sub").mkdir()
            (folder / "sub" / text).write_text(text)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt())
    assert os.listdir(path.parent) == ["a"]
    write("one")
    assert content(path.parent) == {"a/sub/one": "one"}
    with pytest.raises(UserError, match="a: exists and is not an empty folder"):
        write("two")
    with pytest.raises(UserError, match=r"a: cannot be written: .*No space left on device; make room"):
        write("two", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), replace=True)
    assert content(path.parent) == {"a/sub/one": "one"}
    write("two", replace=True)
    assert content(path.parent) == {"a/sub/two": "two"}
    assert os.listdir(path.parent) == ["a"]


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("first")
        with pytest.raises(UserError, match="another process is writing it"), atomic_folder(tmp_path / "a"):
            pass
    assert content(tmp_path) == {"a/x": "first"}


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
    assert content(tmp_path) == {"a/x": "x"}


def test_a_place_that_cannot_be_written_is_a_user_error():
    with pytest.raises(UserError, match="/dev/null/a: cannot be written"), atomic_folder(Path("/dev/null/a")):
        pass


def test_a_full_disk_is_one_error_whoever_writes(tmp_path):
    """Libraries written in Rust, such as tokenizers, raise no OSError."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")):
        refusal = pytest.raises(UserError, match=r"a: cannot be written: .* No space left .*; make room")
        with refusal, atomic_folder(tmp_path / "a"):
            raise error
    with pytest.raises(RuntimeError, match="another"), atomic_folder(tmp_path / "a"):
        raise RuntimeError("another")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_are_those_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "a") as folder:
            atomic_write(folder / "x", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "a" / "x").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("replace", [False, True])
def test_of_writers_at_once_none_gets_a_half_folder(tmp_path, replace):
    """Each either writes all its files or is refused."""
    wrong = []

    def write(path, writer):
        draw = random.Random(writer)
        for _ in range(5):
            try:
                with atomic_folder(path, replace) as partial:
                    for number in range(4):
                        (partial / str(number)).write_text(str(writer))
                        time.sleep(draw.random() / 500)
            except UserError as error:
                if "another process" not in str(error) and "not an empty folder" not in str(error):
                    wrong.append(error)

    for attempt in range(6):
        path = tmp_path / str(attempt)
        writers = [threading.Thread(target=write, args=(path, writer)) for writer in range(6)]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
        found = content(path)
        assert found.keys() == {"0", "1", "2", "3"}
        assert len(set(found.values())) == 1
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(f"{attempt}.")] == []
    assert not wrong
