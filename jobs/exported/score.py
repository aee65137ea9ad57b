"""python score.py FILE.dcm: a score for research use only, never of a diagnostic device."""

import json
import sys
from pathlib import Path

import onnxruntime
from preprocessing import RefusedError, read_picture

path = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
rule = json.loads(Path(__file__).with_name("preprocessing.json").read_text())
session = onnxruntime.InferenceSession(Path(__file__).with_name("model.onnx"))
try:
    pixels = read_picture(path, rule)
except RefusedError as refused:
    sys.exit(f"no score: {refused}. {rule['notice']}")
probability, logit = (float(values[0]) for values in session.run(None, {"pixels": pixels}))
found = {"logit": logit, "probability": probability, "decision": logit >= rule["threshold_logit"]}
print(json.dumps(found | {"notice": rule["notice"]}, allow_nan=False))
