"""Public splits: an unkeyed hash of the NIH patient number, the same for everybody.

RSNA's images are a part of NIH ChestX-ray14, so a patient is in the same split in `nih-v1` and in
`rsna-v1`: a model trained on NIH's train may be tested on RSNA's test. The salt was chosen once, as
the best balanced of 64 on the metadata of all 26,684 studies of RSNA; docs/benchmark.md has the
counts.
"""

import hashlib
import re

from pneumo.errors import SourceError

NAMED_SPLITS = ("rsna-v1", "nih-v1")
SALT = 3
VAL_FRACTION = TEST_FRACTION = 0.15


def assign_patient(name: str, patient: str | None, salt: int = SALT) -> str:
    """The split of an NIH patient number of eight digits. Raises SourceError for another format."""
    if patient is None or re.fullmatch(r"\d{8}", patient) is None:
        raise SourceError(
            f"--split.named {name}: a patient that is not an NIH number of eight digits; it needs "
            "the mapping file, or a table of patients with those numbers"
        )
    digest = hashlib.sha256(f"pneumo/nih-patient/{salt}/{patient}".encode()).digest()
    uniform = int.from_bytes(digest[:8], "big") / 2**64
    if uniform < VAL_FRACTION:
        return "val"
    return "test" if uniform < VAL_FRACTION + TEST_FRACTION else "train"
