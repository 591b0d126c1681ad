"""How much memory the assembly and the check of a set take at 10,000 and at 200,000 records.

Baseline: the peak of all processes together at 10,000 records. The images are tiny, so that the
records, the journals and the near-duplicate search are what is measured.

    python tests/benchmarks/bench_memory.py [few] [many]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from measuring import run_watched, save_result

WORKERS = 2
ASSEMBLE = """
import sys
from rorem_lib.data.assembly import assemble_sets
from rorem_lib.sources.upstream import UpstreamSource
if __name__ == "__main__":
    result = assemble_sets(UpstreamSource(sys.argv[1]), sys.argv[2], workers=int(sys.argv[3]))
    print(sum(result.counts.values()))
"""
CHECK = """
import sys
from rorem_lib.data.writer import check_set
if __name__ == "__main__":
    assert check_set(sys.argv[2] + "/labelled", workers=int(sys.argv[3])) == []
"""


def write_raw(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for part in ("source", "mask", "GT"):
        (folder / part).mkdir(parents=True)
    mask = np.zeros((24, 24), np.uint8)
    mask[8:16, 8:16] = 255
    cv2.imwrite(str(folder / "mask" / "m.png"), mask)
    with open(folder / "meta.json", "w") as stream:
        for number in range(count):
            name = f"{number:06d}.png"
            source = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (24, 24))
            gt = source.copy()
            gt[mask > 0] = 255 - gt[mask > 0]
            cv2.imwrite(str(folder / "source" / name), source)
            cv2.imwrite(str(folder / "GT" / name), gt)
            stream.write(
                json.dumps(
                    {
                        "source": f"source/{name}",
                        "mask": "mask/m.png",
                        "GT": f"GT/{name}",
                        "group": f"scene {number // 4}",
                    }
                )
                + "\n"
            )


def measure_peak(code: str, raw: Path, out: Path) -> dict:
    """Peak MB of the process and its workers together, and seconds."""
    script = raw.parent / "job.py"
    script.write_text(code)
    found = run_watched([sys.executable, script, raw, out, WORKERS], raw.parent / "job.log")
    return {name: round(found[name]) for name in ("peak_mb", "main_process_mb", "seconds")}


def main(few: int = 10_000, many: int = 200_000) -> None:
    found: dict[str, dict] = {"assemble": {}, "check": {}}
    for count in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            raw, out = Path(folder) / "raw", Path(folder) / "out"
            write_raw(raw, count)
            found["assemble"][str(count)] = measure_peak(ASSEMBLE, raw, out)
            found["check"][str(count)] = measure_peak(CHECK, raw, out)
    ratios = {
        job: round(sizes[str(many)]["peak_mb"] / sizes[str(few)]["peak_mb"], 3)
        for job, sizes in found.items()
    }
    save_result(
        "memory",
        {"workers": WORKERS, **found, "ratio_of_peaks": ratios},
        "numpy",
        "opencv-python-headless",
        "ijson",
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
