import errno

import pytest

from callbacks.run import directory
from callbacks.run.directory import replace_folder, replaced_atomically


def folder(path, content):
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(directory, "_exchanged", lambda first, second: False)
    replace_folder(folder(tmp_path / "new", "1"), tmp_path / "out")
    replace_folder(folder(tmp_path / "new", "2"), tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder_whole(tmp_path, monkeypatch):
    """The process ends at the first deletion: by then the new one is in place, and never half of the old."""
    folder(tmp_path / "out", "old")
    seen = []

    def die(path, *args, **kwargs):
        seen.append((tmp_path / "out" / "file").read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(directory.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder(tmp_path / "new", "new"), tmp_path / "out")
    assert seen == ["new"]


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path):
    (tmp_path / "table.csv").write_text("old")

    def write():
        with replaced_atomically(tmp_path / "table.csv") as unfinished:
            unfinished.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"table\.csv") as raised:
        write()
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / "table.csv").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
