"""python -m benchmarks.pruning.scripts.recover_twofour MODEL PRUNED DATA LENGTH MINUTES OUT REPORT

Recovers a pruned model on all of the text, and writes what that took to REPORT.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from calibration.config import Recovery
from calibration.data.windows import windows
from calibration.recovery.recover import recover
from plugins.common.progress import silent


def main(model: str, pruned: str, data: str, length: str, minutes: str, out: str, report: str) -> None:
    text, work = windows(data, Path(model), int(length)), Path(f"{out}.work")
    config = Recovery(minutes=float(minutes))
    recovered = recover(Path(model), Path(pruned), text.tokens, config, Path(out), work, silent)
    measured = {**asdict(recovered), "documents": len(set(text.documents)), "sha256": text.sha256}
    Path(report).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
