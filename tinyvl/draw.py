"""The drawn set: pictures of shapes with captions in English and German.

A scene is one object at a place ("a small red circle on the left of a grey picture") or two ("a big
black star above a small red ring in a pink picture"). A caption is a function of its scene, and
everything it says can be seen at 64 x 64 pixels, so a model that has learnt the set captions new
renders exactly. Each picture also has a question ("what colour is the star?") with a short answer.

Training never shows the `WITHHELD` pairs of shape and colour. The held-out part has new renders of
scenes that training shows (``"combination": "seen"``) and, one in five, scenes with a withheld pair
(``"unseen"``). No two held-out scenes share a caption.

Everything is a pure function of the seed. The shapes are inequalities on a supersampled grid and
not Pillow's, so that the pixels do not depend on the version of a rasteriser.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyvl import UserError

SIDE = 64  # pixels
SUPERSAMPLE = 4  # sub-pixels per pixel and axis

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 32, 36), "green": (32, 148, 60), "blue": (36, 70, 205),
    "yellow": (246, 226, 34), "purple": (126, 40, 152), "orange": (243, 130, 20),
    "white": (252, 252, 252), "black": (18, 18, 20),
}  # fmt: skip
SIZES = {"small": (7.5, 8.5), "big": (12.5, 13.5)}  # radius in pixels, from and to
PLACES = {  # of one object: its centre in pixels
    "left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48), "middle": (32, 32),
}  # fmt: skip
RELATIONS = {  # of two objects: the centres of the first and of the second
    "left of": ((16, 32), (48, 32)), "above": ((32, 16), (32, 48)),
}  # fmt: skip
BACKGROUNDS = {"grey": (140, 140, 142), "beige": (222, 206, 170), "pink": (238, 178, 196)}
WITHHELD = {  # shape: the colour it never has in training
    "circle": "yellow", "square": "purple", "triangle": "white",
    "star": "blue", "cross": "orange", "ring": "green",
}  # fmt: skip
LANGUAGES = ("en", "de")

ENGLISH_PLACE = {
    "left": "on the left of", "right": "on the right of", "top": "at the top of",
    "bottom": "at the bottom of", "middle": "in the middle of",
}  # fmt: skip
GERMAN = {
    "small": "klein", "big": "groß", "red": "rot", "green": "grün", "blue": "blau",
    "yellow": "gelb", "purple": "violett", "orange": "orangefarben", "white": "weiß",
    "black": "schwarz", "circle": "Kreis", "square": "Quadrat", "triangle": "Dreieck",
    "star": "Stern", "cross": "Kreuz", "ring": "Ring", "left": "links", "right": "rechts",
    "top": "oben", "bottom": "unten", "middle": "in der Mitte", "left of": "links neben",
    "above": "über", "grey": "grauem", "beige": "beigem", "pink": "rosa",
}  # fmt: skip
GERMAN_ALONE = {"grey": "grau", "beige": "beige", "pink": "rosa"}
ENGLISH_QUESTIONS = {
    "colour": "what colour is {the} {shape}?", "shape": "what shape is {colour}?",
    "size": "how big is {the} {shape}?", "background": "what colour is the background?",
    "place": "where is {the} {shape}?", "relation": "what is {place} the {shape}?",
}  # fmt: skip
GERMAN_QUESTIONS = {
    "colour": "welche Farbe hat {the} {shape}?", "shape": "welche Form ist {colour}?",
    "size": "wie groß ist {the} {shape}?", "background": "welche Farbe hat der Grund?",
    "place": "wo ist {the} {shape}?", "relation": "was ist {place} dem {shape}?",
}  # fmt: skip
MASCULINE = {"circle", "star", "ring"}  # in German; the other shapes are neuter


@dataclass(frozen=True)
class Thing:
    """One object: a shape with a colour and a size."""

    shape: str
    colour: str
    size: str

    def english(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    def german(self, *, dative: bool = False) -> str:
        article, ending = ("einem", "en") if dative else ("ein", "es")
        if self.shape in MASCULINE and not dative:
            ending = "er"
        adjectives = f"{GERMAN[self.size]}{ending} {GERMAN[self.colour]}{ending}"
        return f"{article} {adjectives} {GERMAN[self.shape]}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    first: Thing
    second: Thing | None
    place: str  # one of `PLACES`, or with a second object of `RELATIONS`
    background: str

    @property
    def things(self) -> list[Thing]:
        return [thing for thing in (self.first, self.second) if thing]

    @property
    def unseen(self) -> bool:
        """Whether an object has a pair of shape and colour that training never shows."""
        return any(WITHHELD[thing.shape] == thing.colour for thing in self.things)

    def caption(self, lang: str = "en") -> str:
        """The one caption of this scene in English (``"en"``) or German (``"de"``)."""
        if lang == "de":
            other = f" {self.second.german(dative=True)}" if self.second else ""
            ground = GERMAN[self.background]
            return f"{self.first.german()} {GERMAN[self.place]}{other} auf {ground} Grund"
        where = ENGLISH_PLACE.get(self.place)
        if self.second:
            where = f"{self.place} {self.second.english()} in"
        return f"{self.first.english()} {where} a {self.background} picture"

    def question(self, lang: str, number: int) -> tuple[str, str]:
        """One of the questions that the picture answers, and its answer."""
        ask = ENGLISH_QUESTIONS if lang == "en" else GERMAN_QUESTIONS

        def say(word: str) -> str:
            return word if lang == "en" else GERMAN_ALONE.get(word) or GERMAN[word]

        def named(thing: Thing) -> dict[str, str]:
            the = "the" if lang == "en" else "der" if thing.shape in MASCULINE else "das"
            return {"the": the} | {name: say(word) for name, word in asdict(thing).items()}

        things = list(map(named, self.things))
        first, last, place = things[0], things[-1], say(self.place)
        asked = [(ask[kind].format(**t), t[kind]) for t in things for kind in asdict(self.first)]
        asked.append((ask["background"], say(self.background)))
        if self.second:
            asked.append((ask["relation"].format(place=place, **last), first["shape"]))
        else:
            asked.append((ask["place"].format(**first), place))
        return asked[number % len(asked)]

    def labels(self) -> dict[str, str | None]:
        """The attributes by name, to fit an image encoder; the second object's end in 2."""
        second = asdict(self.second) if self.second else dict.fromkeys(asdict(self.first))
        own = {"place": self.place, "background": self.background}
        return asdict(self.first) | own | {f"{name}2": value for name, value in second.items()}

    def fields(self) -> dict[str, str | None]:
        """What a record says of the scene: its labels, and whether training shows such pairs."""
        return {"combination": "unseen" if self.unseen else "seen", **self.labels()}


def draw_images(
    folder: str | Path, train: int = 2000, held_out: int = 300, seed: int = 0
) -> list[dict]:
    """Draw the set into ``folder``: ``drawn.jsonl`` and ``images/*.png`` (64 x 64, RGB).

    Each picture has two records, one a language, in the record format of `tinyvl.data` with
    ``split`` (``"train"`` or ``"test"``), ``lang``, ``combination`` and the scene's labels. An
    earlier drawing in the folder is replaced.

    Returns the records as written. Raises UserError if the folder has files that tinyvl did not
    draw, or the held-out part asks for more distinct scenes than the training part has.
    """
    parts = []
    for index, (scene, split) in enumerate(scenes(train, held_out, seed)):
        rng = np.random.Generator(np.random.PCG64([seed, 2, index]))
        number = int(rng.integers(2**31))
        parts.append((scene, split, [scene.question(lang, number) for lang in LANGUAGES]))

    def write(path: Path, scene: Scene, seed: int, index: int) -> None:
        Image.fromarray(render(scene, seed, index)).save(path)

    return write_set(folder, "image", "images", "png", parts, write, seed)


def write_set(
    folder: str | Path, modality: str, name: str, suffix: str,
    parts: list[tuple[Any, str, list[tuple[str, str]]]], write: Callable[..., None], seed: int,
) -> list[dict]:  # fmt: skip
    """Write ``drawn.jsonl`` and the files ``name/*.suffix``; -> the records, one a language.

    A part is what a file shows, its split, and a question with its answer in each language.
    ``write(path, what it shows, seed, index)`` draws the file.
    """
    files, listing = Path(folder) / name, Path(folder) / "drawn.jsonl"
    if files.is_dir() and any(files.iterdir()) and not listing.exists():
        raise UserError(f"{files} holds files that tinyvl did not draw; name an empty folder", 2)
    if listing.exists() and not files.is_dir():
        raise UserError(f"{listing} lists no files in {files}; name an empty folder", 2)
    records = []
    for index, (shown, split, asked) in enumerate(parts):
        for lang, (question, answer) in zip(LANGUAGES, asked, strict=False):
            record = {modality: f"{name}/{index:04d}.{suffix}", "captions": [shown.caption(lang)]}
            record |= {"question": question, "answers": [answer], "id": f"{index:04d}"}
            records.append(record | {"split": split, "lang": lang, **shown.fields()})
    files.mkdir(parents=True, exist_ok=True)
    for old in files.glob(f"[0-9]*.{suffix}"):
        old.unlink()
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    listing.write_text("".join(lines), encoding="utf-8", newline="\n")
    for index, (shown, _, _) in enumerate(parts):
        write(files / f"{index:04d}.{suffix}", shown, seed, index)
    return records


def scenes(train: int, held_out: int, seed: int) -> list[tuple[Scene, str]]:
    """The scenes of both parts with their split: first ``"train"``, then ``"test"``.

    Raises UserError if the held-out part needs more distinct scenes than the training part shows.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 0]))
    shown = [_invent(rng, unseen=False) for _ in range(train)]
    distinct = list(dict.fromkeys(shown))
    seen = held_out - held_out // 5
    if seen > len(distinct):
        need = f"{held_out} held-out pictures need {seen} distinct training scenes"
        have = f"{train} training pictures show {len(distinct)}"
        raise UserError(f"{need} and {have}: ask for more of these or fewer of those", 2)
    held = [distinct[i] for i in rng.permutation(len(distinct))[:seen]]
    new: dict[Scene, None] = {}  # an ordered set
    while len(new) < held_out // 5:
        new[_invent(rng, unseen=True)] = None
    return [(scene, "train") for scene in shown] + [(scene, "test") for scene in [*held, *new]]


def render(scene: Scene, seed: int, index: int) -> np.ndarray:
    """Paint a scene with the jitter of picture ``index``: (64, 64, 3), uint8.

    Place, size, tilt, hue and background vary between renders, less than any word of the caption.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 1, index]))
    ramp = np.linspace(-1, 1, SIDE)
    slope = rng.uniform(-8, 8, 2)
    # A slope and a coarse mottle: noise to a model, yet a PNG of about 1 kB.
    mottle = np.kron(rng.uniform(-4, 4, (8, 8)), np.ones((SIDE // 8, SIDE // 8)))
    light = slope[0] * ramp[:, None] + slope[1] * ramp + mottle  # (64, 64)
    canvas = np.array(BACKGROUNDS[scene.background]) + rng.uniform(-6, 6, 3) + light[..., None]
    centres = RELATIONS[scene.place] if scene.second else [PLACES[scene.place]]
    for thing, (x, y) in zip(scene.things, centres, strict=True):
        dx, dy = rng.uniform(-1, 1, 2)
        radius, tilt = rng.uniform(*SIZES[thing.size]), rng.uniform(-0.06, 0.06)
        paint = np.array(COLOURS[thing.colour]) + rng.uniform(-10, 10, 3)
        alpha = coverage(thing.shape, x + dx, y + dy, radius, tilt)[..., None]
        canvas = canvas * (1 - alpha) + paint * alpha
    return canvas.round().clip(0, 255).astype(np.uint8)


def _invent(rng: np.random.Generator, *, unseen: bool) -> Scene:
    """A random scene, one object or two, that has a withheld pair or has none."""

    def pick(options: Iterable[str]) -> str:
        options = list(options)
        return options[rng.integers(len(options))]

    while True:
        first, second = (Thing(pick(SHAPES), pick(COLOURS), pick(SIZES)) for _ in range(2))
        if rng.random() < 0.5:
            scene = Scene(first, None, pick(PLACES), pick(BACKGROUNDS))
        elif first.shape != second.shape and first.colour != second.colour:
            scene = Scene(first, second, pick(RELATIONS), pick(BACKGROUNDS))
        else:
            continue
        if scene.unseen == unseen:
            return scene


def coverage(shape: str, x: float, y: float, radius: float, tilt: float) -> np.ndarray:
    """The share of each pixel that a shape covers, (64, 64); pixels, and radians of tilt."""

    def span(centre: float) -> tuple[slice, np.ndarray]:
        """The pixels that the shape can reach on one axis, and their sub-pixels in radii."""
        low = max(0, int(centre - 1.2 * radius))
        high = min(SIDE, int(centre + 1.2 * radius) + 1)
        grid = (np.arange(low * SUPERSAMPLE, high * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
        return slice(low, high), (grid - centre) / radius

    (columns, right), (rows, down) = span(x), span(y)
    down = down[:, None]
    u = np.cos(tilt) * right + np.sin(tilt) * down  # the shape's own frame, in radii
    v = np.cos(tilt) * down - np.sin(tilt) * right
    if shape == "circle":
        inside = u**2 + v**2 < 0.95**2
    elif shape == "ring":
        inside = (u**2 + v**2 < 1) & (u**2 + v**2 > 0.5**2)
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) < 0.87
    elif shape == "cross":
        inside = (np.maximum(abs(u), abs(v)) < 1) & (np.minimum(abs(u), abs(v)) < 0.3)
    elif shape == "triangle":
        inside = (v < 0.75) & (v > 1.85 * abs(u) - 1.05)
    else:  # star: fold the plane into one tenth, where its edge is a straight line
        tip, notch, tenth = 1.1, 0.42, np.pi / 5
        angle = abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)  # from the nearest tip
        distance = np.hypot(u, v)
        along, across = distance * np.cos(angle), distance * np.sin(angle)
        rise, run = notch * np.sin(tenth), tip - notch * np.cos(tenth)
        inside = (along - tip) * rise + across * run < 0
    covered = np.zeros((SIDE, SIDE))
    blocks = inside.reshape(len(down) // SUPERSAMPLE, SUPERSAMPLE, -1, SUPERSAMPLE)
    covered[rows, columns] = blocks.mean(axis=(1, 3))
    return covered  # (64, 64)
