"""python recover.py MODEL PRUNED DATA LENGTH MINUTES OUT REPORT: our recovery, on all of the text."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from calibration.config import Recovery
from calibration.data.windows import windows
from calibration.recovery.recover import recover

model, pruned, data, length, minutes, out, written = sys.argv[1:]
text = windows(data, Path(model), int(length))
config = Recovery(minutes=float(minutes))
report = recover(Path(model), Path(pruned), text.tokens, config, Path(out), Path(f"{out}.work"), lambda *_: None)
Path(written).write_text(json.dumps({**asdict(report), "documents": len(set(text.documents)), "sha256": text.sha256}))
