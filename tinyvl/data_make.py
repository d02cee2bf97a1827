"""Questions and answers made from captions, for `tinyvl data questions`.

What several captions of one picture agree on is taken as known: the animal, vehicle, sport, food or
room that they name, how many, of what colour, what somebody does. It is by Ren, Kiros and Zemel's
idea (COCO-QA, https://arxiv.org/abs/1505.02074), with patterns in place of a parser. In English.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tinyvl.data_records import Record

# The words of a kind, each with =plural where that is not the word and an s, and what else it is
# called.
KINDS = {
    "animal": "dog puppy,cat kitten,horse pony,cow calf cattle bull,sheep=sheep lamb,bird seagull "
    "pigeon parrot duck goose,elephant,zebra,giraffe,bear,monkey,goat,rabbit,fish=fish,deer=deer",
    "vehicle": "car,bus=buses,train,truck,motorcycle motorbike,bicycle bike,airplane plane jet "
    "airliner,boat sailboat,ship,van,tractor,helicopter",
    "sport": "tennis,baseball,soccer football,basketball,skateboarding skateboarder,surfing surfer "
    "surfboard,skiing skier,snowboarding snowboarder,golf,volleyball,frisbee",
    "food": "pizza,cake,sandwich=sandwiches,salad,hot_dog,donut doughnut,banana,apple,orange,soup,"
    "broccoli,pasta spaghetti,burger hamburger,coffee,bread,fruit,vegetables vegetable",
    "room": "kitchen,bathroom toilet,bedroom bed,living_room,office,dining_room,classroom",
    "thing": "umbrella,kite,clock,laptop,computer,phone,book,bench=benches,chair,table,bottle,cup,"
    "vase,sign,fire_hydrant,traffic_light,stop_sign,ball,hat,helmet,bag,building,tree,flower",
    "person": "man=men guy,woman=women lady,boy,girl,child=children kid toddler,baby=babies infant",
}
NUMBERS = ["one", "two", "three", "four", "five", "six"]
COLOURS = "red|blue|green|yellow|white|black|brown|orange|pink|purple|gray|grey"
ASKS = {  # what may be asked about a kind
    "animal": ("what animal is this?", "what animal is in the picture?", "which animal is it?"),
    "vehicle": ("what vehicle is this?", "what kind of vehicle is in the picture?"),
    "sport": ("what sport is this?", "what sport are they playing?", "what are they doing?"),
    "food": ("what food is this?", "what is on the plate?", "what kind of food is it?"),
    "room": ("what room is this?", "which room is it?", "where is this?"),
    "thing": ("what is this?", "what is in the picture?"),
    "person": ("who is in the picture?", "who is this?"),
}
DOING = re.compile(
    r"\b(?P<who>man|woman|boy|girl|child|person|people|men|women|dog|cat) (?:is |are )?"
    r"(?P<what>(?!evening|morning)\w{2,}ing(?: (?:on|in|at|through|with|over|into|down|up|off))?"
    r"(?: (?:a|an|the|his|her|its|their|some))? (?!next|top|front|around|out|inside|back|side)\w+)"
)


def words_of(kind: str) -> dict[str, list[str]]:
    """A kind's names, each with all that a caption may call it: itself, its plural, the others."""
    out = {}
    for entry in KINDS[kind].split(","):
        first, *others = entry.split()
        name, _, plural = first.partition("=")
        forms = [name, plural or f"{name}s", *(f for word in others for f in (word, f"{word}s"))]
        out[name.replace("_", " ")] = [form.replace("_", " ") for form in forms]
    return out


WORDS = {"hot dog", "fire hydrant", "traffic light", "stop sign", "living room", "dining room"}
WORDS = {kind: words_of(kind) for kind in KINDS}
FINDERS = {
    kind: {name: re.compile(rf"\b(?:{'|'.join(forms)})\b") for name, forms in names.items()}
    for kind, names in WORDS.items()
}


def named(captions: list[str], kind: str) -> Counter:
    """How many captions name each member of a kind."""
    found = {n: sum(bool(p.search(c)) for c in captions) for n, p in FINDERS[kind].items()}
    return Counter({name: count for name, count in found.items() if count})


def questions_of(captions: list[str], key: str) -> Iterator[tuple[str, list[str]]]:
    """(question, answers) of one picture; ``key`` picks the wording, the same each time."""
    captions = [re.sub(r"[^a-z' ]", "", c.lower()) for c in captions]
    enough = max(1, (len(captions) + 1) // 2)
    draw = zlib.crc32(key.encode("utf-8", "replace"))
    seen = {kind: named(captions, kind) for kind in KINDS}
    for turn, (kind, counts) in enumerate(seen.items()):
        sure = [name for name, count in counts.items() if count >= enough]
        if len(sure) == 1 and (kind != "thing" or not (seen["animal"] or seen["vehicle"])):
            asks = ASKS[kind]
            yield asks[(draw >> turn) % len(asks)], [sure[0]]
        if kind in ("animal", "vehicle", "person"):
            for name in sure:
                yield from counted(captions, WORDS[kind][name][:2], draw % 8 == turn)
        if kind != "sport" and kind != "room":
            for name in sure:
                yield from coloured(captions, name)
    kinds = ("animal", "vehicle")
    absent = [n for k in kinds for n in WORDS[k] if not seen[k][n]]
    present = [n for k in kinds for n, count in seen[k].items() if count >= enough]
    if present and draw % 2:
        yield f"is there {article(present[0])} in the picture?", ["yes"]
    elif not draw % 4:
        yield f"is there {article(absent[draw % len(absent)])} in the picture?", ["no"]
    done = [match for match in map(DOING.search, captions) if match]
    if len(done) >= 2:
        who = Counter(match["who"] for match in done).most_common(1)[0][0]
        verb = "are" if who in ("people", "men", "women") else "is"
        yield f"what {verb} the {who} doing?", [m["what"] for m in done if m["who"] == who]


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def counted(captions: list[str], forms: list[str], rare: bool) -> Iterator[tuple[str, list[str]]]:
    """One is asked for only if ``rare``: most things in pictures are one."""
    one, several = forms
    found: Counter = Counter()
    for caption in captions:
        if match := re.search(rf"\b({'|'.join(NUMBERS)}) (?:\w+ )?{several}\b", caption):
            found[match[1]] += 1
        elif one != several and re.search(rf"\b(?:a|an|one|single) (?:\w+ )?{one}\b", caption):
            found["one"] += 1
    if len(found) == 1 and found.total() >= 2 and (rare or "one" not in found):
        yield f"how many {several} are there?", [*found]


def coloured(captions: list[str], name: str) -> Iterator[tuple[str, list[str]]]:
    found = Counter(
        colour for caption in captions for colour in re.findall(rf"\b({COLOURS}) {name}\b", caption)
    )
    if len(found) == 1 and found.total() >= 2:
        yield f"what color is the {name}?", ["gray" if "grey" in found else next(iter(found))]


def make(records: list[Record]) -> list[Record]:
    """Records of questions about pictures that have captions, in the order of these."""
    return [
        Record(
            record.image, split=record.split, video=record.video, audio=record.audio,
            question=question, answers=answers,
        )
        for record in records
        for question, answers in questions_of(record.captions, Path(record.path).name)
    ]  # fmt: skip
