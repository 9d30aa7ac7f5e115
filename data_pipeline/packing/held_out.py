"""Which documents are kept out of the rows, for validation sets with a name: by a share or by a list of their ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.storage.permutation import derive_key, keyed_hash
from model.durable import fingerprint_of
from model.errors import Problems, UserError

FOLDER_NAME = "held_out"  # below the packed folder; one folder of rows a set
MAX_SETS = 254  # the sets of a pool are numbered in a byte
REFUSED_NAMES = (".", "..")


@dataclass(frozen=True)
class HeldOutSet:
    """A document belongs to the set when its id is listed, or when a hash of the set's name and its id says so.

    The share decides over each document by itself: the same ones are held out whatever else is packed, in whichever
    order, however often.
    """

    share: float = 0.0  # of all documents
    documents: frozenset[int] = frozenset()  # ids

    def takes(self, name: str, ids: np.ndarray) -> np.ndarray:
        """bool [n] of document ids uint64 [n]."""
        listed = np.isin(ids, np.array(sorted(self.documents), np.uint64))
        return listed | (keyed_hash(ids, derive_key("held_out", name)) < np.uint64(int(self.share * 2**64)))

    def describe(self) -> dict[str, Any]:
        return {"share": self.share, "documents": fingerprint_of(sorted(self.documents)) if self.documents else None}


def validate(sets: Mapping[str, HeldOutSet], problems: Problems) -> None:
    problems.check(len(sets) <= MAX_SETS, FOLDER_NAME, f"at most {MAX_SETS} sets, got {len(sets)}")
    for name, one in sets.items():
        key = f"{FOLDER_NAME}.{name}"
        named = re.fullmatch(r"[\w.-]+", name) is not None and name not in REFUSED_NAMES
        problems.check(named, key, "cannot name a folder")
        problems.check(0 <= one.share < 1, f"{key}.share", f"must be in [0, 1), got {one.share}", f"{key}.share=0.001")
        some = one.share > 0 or bool(one.documents)
        problems.check(some, key, "holds nothing out", f"{key}.share=0.001 or {key}.documents=FILE")


def sets_of(sets: Mapping[str, HeldOutSet], ids: np.ndarray) -> np.ndarray:
    """Number of the set that each document belongs to, in the order of their names from 1 on; 0 for none. uint8 [n].

    The first set that takes a document has it.
    """
    numbers = np.zeros(len(ids), np.uint8)
    for number, name in enumerate(sorted(sets), 1):
        numbers[(numbers == 0) & sets[name].takes(name, ids)] = number
    return numbers


def check_kept_apart(training: Mapping[str, Mapping[str, Any]], held_out: Mapping[str, Any], where: str | Path) -> None:
    """Raise `UserError` when rows that are trained on were packed from a set's token files without holding it out.

    training: name -> manifest (`dataset.json`) of each dataset; held_out: that of the set. Rows that were not packed as
    a held-out set (`held_out_as`) say nothing of it, and are taken.
    """
    rule = held_out.get("held_out_as")
    if rule is None:
        return
    described = {key: value for key, value in rule.items() if key != "name"}
    inputs = _checksums(held_out["inputs"])
    for name, manifest in training.items():
        known = dict(manifest.get("held_out", {}).get(rule["name"], {}))
        known.pop("num_documents", None)
        if inputs & _checksums(manifest["inputs"]) and known != described:
            raise UserError(
                f"dataset {name!r} is trained on documents that the validation set holds",
                where=str(where),
                expected=f"rows packed with {FOLDER_NAME}.{rule['name']}: {described}",
                got=str(known or "rows that hold nothing out under this name"),
                fix=f"pack the dataset again with the same {FOLDER_NAME}.{rule['name']}, or leave the set out of stage.validation",
            )


def _checksums(inputs: Sequence[Mapping[str, str]]) -> set[str]:
    return {entry["checksum"] for entry in inputs}
