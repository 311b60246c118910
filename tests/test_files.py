"""Writing files: whole or not at all."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from fusedadapt import files
from fusedadapt.files import atomic_open, check_writable, write_text


def test_a_device_or_pipe_is_written_not_replaced(tmp_path: Path):
    """`--json /dev/stdout` by root would otherwise put a file in the place of the device."""
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "words")
    check_writable(tmp_path / "pipe")
    reader.join(10)
    assert got == ["words"] and (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_the_name_of_an_open_file_is_written_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`--json /dev/stdout > log`: what the name leads to is an ordinary file then. What was said before and is said after stays, in order."""
    with open(tmp_path / "log", "w") as log:
        (tmp_path / "stdout").symlink_to(tmp_path / "log")
        assert files._OPEN == {"/dev/stdout": 1, "/dev/stderr": 2}
        monkeypatch.setattr(files, "_OPEN", {str(tmp_path / "stdout"): log.fileno()})
        monkeypatch.setattr(sys, "stdout", log)
        print("before")
        check_writable(tmp_path / "stdout")
        write_text(tmp_path / "stdout", "words\n")
        print("after")
        with pytest.raises(FileExistsError), atomic_open(tmp_path / "stdout"):
            pass
    assert (tmp_path / "log").read_text() == "before\nwords\nafter\n"
    assert (tmp_path / "stdout").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), atomic_open(tmp_path / "a") as file:
        file.write(b"half of the n")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    stale = tmp_path / f".a.{2**22 + 1}.tmp"  # no process has that number
    stale.write_text("half")
    write_text(tmp_path / "a", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
