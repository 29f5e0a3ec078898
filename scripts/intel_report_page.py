"""The page of docs/results/ on the Intel GPU kernel, from what intel_report printed and from its table.

python scripts/intel_report_page.py REPORT.txt REPORT.csv > PAGE.md

SPDX-License-Identifier: Apache-2.0
"""

import csv
import sys
from pathlib import Path

text, table = Path(sys.argv[1]), Path(sys.argv[2])
with table.open() as file:
    rows = list(csv.DictReader(file))
columns = ["device", "kernel", "simd", "registers", "spilled_bytes", "instructions", "loads", "stores"]
print(f"""# What Intel's compiler makes of the SPIR-V kernel

By `make intel-report`: `spirv-opt` sets the specialisation constants, `ocloc` 22.43 with IGC 1.0.12504 (Debian 12)
compiles with `-ze-opt-greater-than-4GB-buffer-required`, `iga64` disassembles. As few variants as hold every pair of
choices; `--all` compiles all. Nothing of this ran on a GPU.

```
{text.read_text().strip()}
```

Loads and stores are messages to memory, by the bytes that each lane moves; `block`: one block or one value for all
lanes (such as the kernel's parameters). 16 bytes a lane are full vectors of rows on pvc; dg2 has registers half as
large and takes 8.

What the models of `models/` need, and every eighth of the rest; all rows are in the file of the same name that ends
in `.csv`.

| {" | ".join(columns)} |
|{"---|" * len(columns)}""")
for i, row in enumerate(rows):
    if "/" in row["case"] or i % 8 == 0:
        print(f"| {' | '.join(row[column] for column in columns)} |")
