"""Files that are replaced in one stroke."""

import os

import pytest

from tinyvl import UserError
from tinyvl.files import write_text


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\udcff")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "none/file.txt", "new")
