"""The page of docs/results/ on the Intel GPU kernel, from what intel_report printed and from its table.

python scripts/intel_report_page.py REPORT.txt REPORT.csv > PAGE.md

SPDX-License-Identifier: Apache-2.0
"""

import csv
import sys
from pathlib import Path

text, table = Path(sys.argv[1]), Path(sys.argv[2])
with table.open() as file:
    kernel = file.readline().removeprefix("# kernel ").strip()
    rows = list(csv.DictReader(file))
columns = ["device", "kernel", "simd", "registers", "spilled_bytes", "instructions", "loads", "stores"]
print(f"""# What Intel's compiler makes of the SPIR-V kernel

By `make intel-report`: `spirv-opt` sets the specialisation constants, `ocloc` compiles with
`-ze-opt-greater-than-4GB-buffer-required`, `iga64` disassembles. Nothing of this ran on a GPU. The SPIR-V modules have
the digest `{kernel}`; `make test` holds this report to it.

```
{text.read_text().strip()}
```

Loads and stores are messages to memory, by the bytes that each lane moves; `block`: one block or one value for all
lanes (such as the kernel's parameters). 16 bytes a lane are full vectors of rows on pvc; dg2 has registers half as
large and takes 8. A variant is bad if it spills, has less than 16 lanes or more than 128 registers, or if it is aligned
and moves anything of a row by less than its vectors.

What the models of `models/` need, and every sixtieth of the rest.

| {" | ".join(columns)} |
|{"---|" * len(columns)}""")
for i, row in enumerate(rows):
    if "/" in row["case"] or i % 60 == 0:
        print(f"| {' | '.join(row[column] for column in columns)} |")
