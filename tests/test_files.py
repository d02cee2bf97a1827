"""Files that are replaced in one stroke."""

import os

import pytest

from tinyvl import UserError
from tinyvl.files import write_text


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, there):
    (tmp_path / "far").mkdir()
    if there:
        (tmp_path / "far/target.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to("far/target.txt")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "far/target.txt").read_text() == "new"
    assert os.listdir(tmp_path / "far") == ["target.txt"]
    assert sorted(os.listdir(tmp_path)) == ["far", "link.txt"]


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\udcff")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "none/file.txt", "new")
