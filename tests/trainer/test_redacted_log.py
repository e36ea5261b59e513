"""What a process prints reaches its file without credentials, and it never waits for the file."""

import os
import subprocess
import sys
import time

import pytest
from longspan.trainer.redacted_log import RedactedLog

KEY = "hunter2-hunter2-hunter2"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("STORE_TOKEN", KEY)


def printed(tmp_path, code, target=None) -> str:
    path = tmp_path / "log"
    log = RedactedLog(os.open(path, os.O_WRONLY | os.O_CREAT) if target is None else target)
    process = subprocess.Popen([sys.executable, "-c", code, KEY], stdout=log.fileno(), stderr=2)
    log.start()
    assert process.wait(timeout=20) == 0
    log.close()
    return path.read_text() if path.exists() else ""


def test_every_line_is_kept_and_no_key(tmp_path):
    code = "import sys; [print(n, sys.argv[1]) for n in range(20000)]; print('end', end='')"
    lines = printed(tmp_path, code).split("\n")
    assert lines == [*(f"{number} ***" for number in range(20000)), "end"]


def test_a_key_that_comes_in_two_parts_is_hidden(tmp_path):
    code = ("import os, sys, time; k = sys.argv[1].encode(); os.write(1, k[:5]); time.sleep(0.3);"
            " os.write(1, k[5:] + b'\\n')")  # fmt: skip
    assert printed(tmp_path, code) == "***\n"


def test_a_key_of_several_lines_is_hidden_whenever_they_come(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_LOGIN", "first-line-1\nsecond-line-2")
    monkeypatch.setenv("LONGSPAN_HIDDEN", "OTHER,MY_LOGIN")
    code = ("import os, time; k = os.environ['MY_LOGIN'].encode(); os.write(1, k[:15]);"
            " time.sleep(0.3); os.write(1, k[15:] + b'\\n')")  # fmt: skip
    assert printed(tmp_path, code) == "***\n***\n"


def test_a_line_without_end_is_kept_in_parts(tmp_path):
    assert printed(tmp_path, "print('a' * 500_000, end='')") == "a" * 500_000


def test_what_is_no_text_is_kept_as_far_as_it_is(tmp_path):
    code = "import os; os.write(1, bytes([0xff, 10, 65, 10]))"
    assert printed(tmp_path, code) == "\ufffd\nA\n"


def test_a_file_that_cannot_be_written_holds_nobody_up(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    begun = time.monotonic()
    assert printed(tmp_path, "print('a\\n' * 500_000)", full) == ""
    assert time.monotonic() - begun < 10


def test_a_child_that_keeps_the_pipe_delays_the_end_only_a_little(tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.trainer.redacted_log._LATE_S", 0.2)
    child = "import time; time.sleep(5)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); print(1)"
    begun = time.monotonic()
    assert printed(tmp_path, code) == "1\n"
    assert time.monotonic() - begun < 4
