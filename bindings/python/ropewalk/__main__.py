"""`python -m ropewalk` is the `ropewalk` command.

`python -m ropewalk --cmake-prefix` prints where the C and C++ side of the package lies: headers in include/, the
library and the files for CMake and pkg-config in lib/.
"""

# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    if sys.argv[1:] == ["--cmake-prefix"]:
        print(Path(__file__).resolve().parent)
        return
    beside = Path(sysconfig.get_path("scripts")) / "ropewalk"
    command = str(beside) if beside.exists() else shutil.which("ropewalk")
    if command is None:
        sys.exit("python -m ropewalk: the ropewalk command is not installed with this Python")
    os.execv(command, [command, *sys.argv[1:]])


if __name__ == "__main__":
    main()
