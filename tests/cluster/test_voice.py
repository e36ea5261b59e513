"""What a driver says reaches the user; what Ray says in its process reaches a file, cleaned."""

import os
import stat
import subprocess
import sys

KEY = "hunter2-hunter2-hunter2"
CODE = """
import os, sys
from pathlib import Path
from longspan.cluster.voice import Voice
key = os.environ["STORE_TOKEN"]
voice = Voice()
voice.say(f"before {key}")
voice.hush(Path(sys.argv[1]))
os.write(2, f"its core says {key[:9]}".encode())
os.write(2, f"{key[9:]}\\n".encode())
print(f"Ray says {key}, and does not end its line", end="")
voice.say(f"after {key}")
voice.complain("a complaint")
voice.close()
voice.close()
print("as ever", flush=True)
os._exit(0)
"""


def test_ray_log_is_complete_clean_and_the_users_own(tmp_path):
    old = tmp_path / "ray.log"
    old.write_text("an older launch\n")
    old.chmod(0o644)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "STORE_TOKEN": KEY}, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "before ***\nafter ***\nas ever\n" and done.stderr == "a complaint\n"
    lines = old.read_text().splitlines()
    assert lines[0] == "an older launch"
    assert lines[1:] == ["its core says ***", "Ray says ***, and does not end its line"]
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
