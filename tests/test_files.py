"""Writing files: whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

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
