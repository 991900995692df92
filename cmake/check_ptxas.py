"""Fails when the log of a CUDA build shows a register spill or a serialized wgmma.

    cmake --build build/cuda --target dilated_cuda | tee build/cuda.log
    python cmake/check_ptxas.py build/cuda.log

The log is nvcc's with -Xptxas=-v (DILATED_CUDA_CHECK=ON). Both findings cost a kernel much of its
speed and appear in no test: spilled registers travel through memory, and ptxas makes wgmma
instructions wait for each other (notes C7510 to C7518) when it can't prove what they touch.
"""

import re
import sys
from pathlib import Path

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
SERIALIZED = re.compile(r"\bC751[0-8]\b")


def check(log: str) -> tuple[int, list[str]]:
    """How many kernels the log reports, and what is wrong with them."""
    kernel = "before the first kernel"
    kernels = 0
    findings = []
    for line in log.splitlines():
        if match := COMPILING.search(line):
            kernels += 1
            kernel = f"{match[1]} for {match[2]}"
        elif match := SPILL.search(line):
            if match[1] != "0" or match[2] != "0":
                findings.append(f"{kernel}: {match[0]}")
        elif SERIALIZED.search(line):
            findings.append(line.strip())  # ptxas names the function itself
    return kernels, findings


def main() -> int:
    kernels, findings = check(Path(sys.argv[1]).read_text())
    if kernels == 0:
        findings.append("no kernel in this log: was it built with -Xptxas=-v, from nothing?")
    for finding in findings:
        print(finding)
    print(f"{kernels} kernels, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
