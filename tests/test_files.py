import pytest

from danceopd.files import write_bytes, write_text


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "new" / "f.txt"
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"half")
    assert [file.name for file in path.parent.iterdir()] == ["f.txt"]
    assert path.read_bytes() == "é".encode()
