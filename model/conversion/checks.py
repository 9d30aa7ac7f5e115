"""All that is wrong with a set of tensors, in one message, before a byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from model.conversion.sources import listed
from model.conversion.tensors import CASTABLE, TensorInfo
from model.errors import UserError

MODEL_DTYPES = ("float32", "bfloat16")


def check_tensors(
    place: str, found: dict[str, TensorInfo], expected: dict[str, list[tuple[int, ...]]], dtype: str | None
) -> str:
    """The dtype of the output, once every expected tensor is there with one of its allowed shapes and nothing else is.

    `dtype` None keeps the stored one, which all tensors must then share. Raises one `UserError` with all problems.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshaped = [
        f"{name}: {list(found[name].shape)} instead of {' or '.join(str(list(one)) for one in shapes)}"
        for name, shapes in expected.items()
        if name in found and found[name].shape not in shapes
    ]
    known = [name for name in expected if name in found]
    wrong, kept = check_dtypes(known, found, dtype)
    groups = {"missing": missing, "not known": extra, "misshaped": misshaped, "wrong dtype": wrong}
    problems = [f"{len(names)} {label}: {listed(names)}" for label, names in groups.items() if names]
    if problems:
        raise UserError(
            "the tensors do not fit",
            where=place,
            expected=f"{len(expected)} tensors",
            got="\n            ".join([f"{len(found)} tensors", *problems]),
            fix="name the right model and layout"
            + (", or add dtype=bfloat16 or dtype=float32" if wrong else "")
            + (", or leave keys out with ignore=[PATTERN]" if extra else ""),
        )
    return kept


def check_dtypes(names: Iterable[str], found: dict[str, TensorInfo], dtype: str | None) -> tuple[list[str], str]:
    """What cannot be stored as `dtype` (None: as the dtype that most tensors have), and that dtype."""
    names = list(names)
    counts = Counter(found[name].dtype for name in names)
    kept = dtype or (counts.most_common(1)[0][0] if counts else MODEL_DTYPES[0])
    if dtype is None:
        return [
            f"{name} {found[name].dtype}" for name in names if found[name].dtype != kept or kept not in MODEL_DTYPES
        ], kept
    return [f"{name} {found[name].dtype}" for name in names if found[name].dtype not in CASTABLE], kept
