"""Files that are replaced in one stroke."""

import os

import pytest

from tinyvl import UserError, files
from tinyvl.files import building, replace_file, write_text


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError):
        replace_file(file, lambda part: part.write_text("half") // 0)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "none/file.txt", "new")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "below" / "made"
    half = building(target)
    (half.__enter__() / "a").write_text("half")
    assert not half.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert os.listdir(target.parent) == []
    with building(target) as new:
        (new / "a").write_text("whole")
        (new / "a").chmod(0o600)  # as safetensors writes
        (new / "inner").mkdir()
        assert not target.exists()
    assert sorted(os.listdir(target)) == ["a", "inner"]
    assert (target / "a").stat().st_mode & 0o777 == 0o644
    for name, left in (("a", ["a", "inner"]), ("b", ["b"])):  # another process was first
        with building(target) as new:
            (new / name).write_text("again")
        assert sorted(os.listdir(target)) == left  # whole: its; else ours
    with (
        pytest.raises(UserError, match=r"Cannot write to the cache \(.*\); free some space"),
        building(target / "b" / "c", "the cache"),
    ):
        raise AssertionError


def test_a_files_state_changes_with_its_size_and_time(tmp_path):
    file = tmp_path / "a"
    assert files.stat(file) == (-1, 0)
    file.write_bytes(b"abc")
    os.utime(file, ns=(5, 7_000_000_000))
    assert files.stat(file) == (3, 7_000_000_000)
