"""Which of our C++ files a first call from C enters: scripts/first_call.py [--verify] [cpu|cuda [CASE]].

One case of `ropewalk check` of build/dev runs under valgrind's callgrind, from ropewalk_rope on. A function counts for
the file that it was compiled from, so that headers count for the files that include them; what is not ours, such as a
template of the standard library, for none. --verify: fails unless the row of the backend in docs/design.md names the
same files. For CUDA without a GPU set the variables at the end of docs/cuda.md, with an empty ROPEWALK_CACHE_DIR.

SPDX-License-Identifier: Apache-2.0
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/dev"
OBJECTS = BUILD / "CMakeFiles/ropewalk_objects.dir"
words = [word for word in sys.argv[1:] if word != "--verify"]
backend = words[0] if words else "cpu"
case = words[1] if words[1:] else "rope.bf16.neox.d128.freq.rms.packed.pos-arange-i64.nhd16-bf16.slots-i32.t23"

sources: dict[str, set[str]] = {}
for path in OBJECTS.rglob("*.o"):
    listed = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    for name in re.findall(r"^\S+ [tTwW] (\S*ropewalk\S*)$", listed, re.MULTILINE):
        sources.setdefault(name, set()).add(str(path.relative_to(OBJECTS))[:-2])

with tempfile.NamedTemporaryFile() as out:
    command = ["valgrind", "--tool=callgrind", "--demangle=no", "--toggle-collect=ropewalk_rope"]
    command += ["--compress-strings=no", f"--callgrind-out-file={out.name}"]
    command += [str(BUILD / "bin/ropewalk"), "check", "--backend", backend, "--case", case]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    profile = Path(out.name).read_text()
if ran.returncode != 0:
    sys.exit(ran.stdout + ran.stderr)

met = set(re.findall(r"^c?fn=(\S+?)(?:'\d+)?$", profile, re.MULTILINE))
entered = {next(iter(sources[name])) for name in met if len(sources.get(name, ())) == 1}
print(f"{backend}, {case}: {len(entered)} files")
print("\n".join(f"  {file}" for file in sorted(entered, key=lambda file: (file.startswith("backends"), file))))
if "--verify" in sys.argv:
    row = re.search(rf"^\| {backend} \|.*$", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`([\w/]+\.cc)`", row[0])) if row else set()
    if named != entered:
        sys.exit(f"docs/design.md: not named {sorted(entered - named)}, not entered {sorted(named - entered)}")
