"""One HTML file of a command's JSON Lines: captions, answers, searches and classes with pictures.

All is inside: thumbnails, frames of videos, sounds, the style (``page.html``) and the script
(``page.js``); nothing is fetched, and the file's own policy forbids it. All text is escaped, and
only the one script may run, so that neither a caption nor a file's name can do anything.
"""

import base64
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tinyvl import UserError, files
from tinyvl.media_workers import cores
from tinyvl.page_media import Shown, heat, look
from tinyvl.progress import bar

PATHS = ("path", "image", "video", "audio")  # fields that name the file of a line
Line = dict[str, Any]


# ------------------------------------------------------------------------------------- the lines


def read(name: str) -> list[Line]:
    """The lines of a file, of a folder that `tinyvl eval -o` made, or of standard input ("-").

    Each says under ``path`` where its file is. UserError: they are no JSON Lines.
    """
    if name == "-":
        content, home = files.decode(sys.stdin.buffer.read(), "standard input"), ""
    else:
        file = Path(name).expanduser()
        file = file / "predictions.jsonl" if file.is_dir() else file
        content, home = files.read_text(file, "surrogateescape"), str(file.parent)
    lines = []
    for number, text in enumerate(content.split("\n"), 1):
        if not (text := text.removeprefix("\ufeff").strip()):
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            advice = "tinyvl's commands print JSON Lines with --json"
            raise UserError(f"{name}, line {number}: no JSON object; {advice}.", 2)
        path = next((line[key] for key in PATHS if isinstance(line.get(key), str)), None)
        if path is not None:
            beside = os.path.join(home, path)
            line["path"] = beside if not os.path.exists(path) and os.path.exists(beside) else path
        lines.append(line)
    if not lines:
        raise UserError(f"{name}: there are no lines.", 2)
    return lines


def add_references(lines: list[Line], data: str) -> None:
    """Gives each caption or answer its ``references`` and ``metrics`` against a data set's records.

    CIDEr is relative to the pictures that are shown. UserError: the set lacks one of them.
    """
    from tinyvl import evaluate, metrics
    from tinyvl.evaluate_predictions import finder
    from tinyvl.metrics_captions import caption_scores

    said = [line for line in lines if "caption" in line or "answer" in line]
    if not said:
        raise UserError("--data is for captions and answers; there are none here.", 2)
    kind = "vqa" if "answer" in said[0] else "caption"
    task = evaluate.task_of(kind)
    rows, _ = evaluate.read(evaluate.Source(data), opened=False)
    records = {record.id: record for record in task.prepare(rows)}
    find = finder(list(records.values()), {row.id: row.path for row in rows})
    own = {}
    for number, line in enumerate(said):
        own[str(number)] = records[find(data, line)]
        line["references"] = getattr(own[str(number)], task.truth)
    if kind == "vqa":
        for number, line in enumerate(said):
            known = own[str(number)].answers
            score = metrics.vqa_accuracy if len(known) > 1 else metrics.strict_accuracy
            line["metrics"] = {"accuracy": score(line["answer"], known)} if known else {}
        return
    scored = {name: record.captions for name, record in own.items() if record.captions}
    texts = {name: said[int(name)]["caption"] for name in scored}
    items = caption_scores(scored, texts, metrics=["CIDEr", "ROUGE-L"]).items if scored else {}
    for name in scored:
        found = {metric: float(each[name]) for metric, each in items.items()}
        said[int(name)]["metrics"] = found


# ------------------------------------------------------------------------------------- the cards


@dataclass
class Card:
    """A file and what is said of it."""

    path: str | None
    body: str  # HTML
    alt: str
    group: str = ""  # its heading
    key: tuple = ()  # what it is about: two runs' cards of one key stand side by side
    sort: dict[str, float] = field(default_factory=dict)
    box: list[float] | None = None  # of heat maps: left, top, right, bottom, from 0 to 1


def clean(value: Any) -> str:
    """A value as text of a page: escaped; of a name that is no Unicode an escape."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(text.encode("utf-8", "backslashreplace").decode())


def cards_of(lines: list[Line]) -> list[Card]:
    """A card a line; the labels of a picture are one card."""
    cards: list[Card] = []
    labels: dict[str, list[Line]] = {}
    for line in lines:
        if "label" in line and "probability" in line:
            if line.get("path") in labels:
                labels[line["path"]].append(line)
                continue
            labels[line["path"]] = [line]
        cards.append(card_of(line))
    for card in cards:
        if card.key[:1] == ("label",) and card.path is not None:
            found = labels[card.path]
            card.body = bars({line["label"]: line["probability"] for line in found})
            card.alt = found[0]["label"]
    return cards


def card_of(line: Line) -> Card:
    path = line.get("path")
    numbers = {name: line[name] for name in ("score", "probability", "rank") if name in line}
    numbers |= line.get("metrics", {}) if "metrics" in line and "task" not in line else {}
    card = Card(path, "", os.path.basename(path or ""), sort=numbers)
    card.key = (path or line.get("id"), line.get("question"))
    if "error" in line:
        why = line["error"].removeprefix(f"{path}: ")
        card.body = f'<p class="error">{clean(why)}</p>'
    elif "words" in line:
        explained(card, line)
    elif "query" in line:
        card.group, card.key = line["query"], (line["query"], path)
        text = line.get("caption")
        card.alt = text or f"{card.alt}, result {line.get('rank', '')} for {line['query']}"
        card.body = f"<p>{clean(text)}</p>" if text else ""
    elif "probability" in line:
        card.key = ("label", path)
    elif "answer" in line:
        card.body = f'<p class="question">{clean(line.get("question", ""))}</p>'
        card.body += f"<p>{clean(line['answer'])}</p>" + bars(line.get("choices", {}))
        card.alt = f"{line.get('question', '')} {line['answer']}"
    elif "caption" in line:
        card.alt, card.body = line["caption"], f"<p>{clean(line['caption'])}</p>"
    else:
        card.body = table({name: value for name, value in line.items() if name != "path"})
    if references := line.get("references"):
        counted = dict.fromkeys(references)
        card.body += f"<ul>{''.join(f'<li>{clean(text)}</li>' for text in counted)}</ul>"
    shown = [name for name in ("score", "CIDEr", "ROUGE-L", "accuracy") if name in card.sort]
    if shown:
        facts = " · ".join(f"{name} {card.sort[name]:.3f}" for name in shown)
        card.body += f'<p class="small">{facts}</p>'
    return card


def bars(chances: dict[str, float]) -> str:
    rows = (
        f'<div class="bar"><span>{clean(name)}</span><meter value="{float(value):.4f}"></meter>'
        f"<b>{float(value):.1%}</b></div>"
        for name, value in sorted(chances.items(), key=lambda pair: -pair[1])
    )
    return "".join(rows)


def table(fields: dict[str, Any]) -> str:
    """Any other object: its fields, those of objects in it too."""
    rows: list[str] = []
    for name, value in fields.items():
        inside = value.items() if isinstance(value, dict) else [("", value)]
        for key, each in inside:
            rows.append(f"<dt>{clean(f'{name} {key}'.strip())}</dt><dd>{clean(each)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def explained(card: Card, line: Line) -> None:
    """A text whose words show their heat maps, or what else they have to say."""
    card.alt = next((line[name] for name in ("caption", "answer", "text") if name in line), "")
    card.box = line.get("box")
    words = []
    for word in line["words"]:
        data = f' data-map="{heat(word["map"])}"' if word.get("map") else ""
        note = clean(word.get("note", ""))
        words.append(
            f'<span class="word" tabindex="0" data-note="{note}" title="{note}"{data}>'
            f"{clean(word['word'])}</span>"
        )
    asked = f'<p class="question">{clean(line["question"])}</p>' if "question" in line else ""
    card.body = f"{asked}<p>{' '.join(words)}</p>"
    if any(word.get("note") for word in line["words"]):
        card.body += '<p class="small note"></p>'


def compared(names: tuple[str, str], both: tuple[list[Card], list[Card]]) -> list[Card]:
    """Two runs side by side: cards of one key as one, those that differ first; searches as rows."""
    if any(card.group for card in (*both[0], *both[1])):
        for name, cards in zip(names, both, strict=True):
            for card in cards:
                card.group = f"{card.group} · {name}"
        return sorted((*both[0], *both[1]), key=lambda card: card.group)
    first, second = ({card.key: card for card in cards} for cards in both)
    out = []
    for key in dict.fromkeys((*first, *second)):
        a, b = first.get(key), second.get(key)
        one = a or b
        assert one is not None
        sides = "".join(
            f"<div><b>{clean(name)}</b>{card.body if card else '<p>&ndash;</p>'}</div>"
            for name, card in zip(names, (a, b), strict=True)
        )
        sort = {}
        if a and b:
            shared = [name for name in a.sort if name in b.sort and name != "rank"]
            sort = {f"{name}, B less A": b.sort[name] - a.sort[name] for name in shared}
        alt = " | ".join(card.alt for card in (a, b) if card)
        body = f'<div class="pair">{sides}</div>'
        out.append(Card(one.path, body, alt, key=key, sort=sort, box=one.box))
    same = {key for key in first.keys() & second.keys() if first[key].alt == second[key].alt}
    return sorted(out, key=lambda card: card.key in same)


# -------------------------------------------------------------------------------------- the page


def page(
    cards: list[Card], title: str, home: Path | None, *, worst: str | None = None,
    quiet: bool = False,
) -> str:  # fmt: skip
    """The whole page.

    Args:
        home: the folder that it will be in, for links to the files; None: no links.
        worst: the number by which the cards are sorted at first, lowest first.
    """
    paths = list(dict.fromkeys(card.path for card in cards if card.path))
    shown: dict[str, Shown] = {}
    with bar("pictures", len(paths), quiet) as advance, ThreadPoolExecutor(cores()) as pool:
        for path, found in zip(paths, pool.map(look, paths), strict=True):
            shown[path] = found
            advance(1)
    groups: dict[str, list[str]] = {}
    for card in cards:
        groups.setdefault(card.group, []).append(article(card, shown.get(card.path or ""), home))
    layout = "row" if len(groups) > 1 else "wall"
    if any("<meter" in card.body or 'class="pair"' in card.body for card in cards):
        layout += " wide"
    sections = []
    for name, articles in groups.items():
        heading = f"<h2>{clean(name)}</h2>" if name else ""
        inside = "\n".join(articles)
        sections.append(
            f'<section data-name="{clean(name)}">{heading}<div class="{layout}">{inside}</div>'
            "</section>"
        )
    missing = sum(bool(each.error) for each in shown.values())
    failed = sum('class="error"' in card.body for card in cards)
    counts = [f"{len(paths):,} file{'s' * (len(paths) != 1)}"]
    counts += [f"{failed:,} failed"] if failed else []
    counts += [f"{missing - failed:,} cannot be shown"] if missing > failed else []
    ways = sorts(cards, worst)
    form = (
        '<form role="search"><input id="filter" type="search" placeholder="Filter  ( / )" '
        'aria-label="Filter" title="/ comes here, Escape clears; arrow keys go about">'
        f'<select id="sort" aria-label="Sort">{ways}</select></form>'
    )
    return document(title, ", ".join(counts), "\n".join(sections), form)


def document(title: str, summary: str, body: str, form: str = "") -> str:
    """The whole file around HTML; with a ``form`` the script that it works by."""
    script = files.read_text(Path(__file__).with_name("page.js")) if form else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "hash": digest, "title": clean(title), "summary": clean(summary), "form": form,
        "body": body, "script": script,
    }  # fmt: skip
    template = files.read_text(Path(__file__).with_name("page.html"))
    pieces = template.split("{{")
    return pieces[0] + "".join(
        parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:])
    )


def sorts(cards: list[Card], worst: str | None) -> str:
    """The ways to sort, as options."""
    numbers = dict.fromkeys(name for card in cards for name in card.sort)
    ways = {"+": "as they came", "+name": "by name"}
    for name in numbers:
        ways |= {f"+{name}": f"{name}, lowest first", f"-{name}": f"{name}, highest first"}
    first = f"+{worst}" if worst in numbers else "+"
    return "".join(
        f'<option value="{clean(value)}"{" selected" * (value == first)}>{clean(text)}</option>'
        for value, text in ways.items()
    )


def article(card: Card, shown: Shown | None, home: Path | None) -> str:
    keys = json.dumps({"name": card.path or ""} | card.sort)
    picture = "" if shown is None or card.path is None else figure(card, shown, home)
    file = f'<p class="small name">{clean(os.path.basename(card.path))}</p>' if card.path else ""
    return (
        f'<article data-sort="{escape(keys)}" title="{clean(card.path or "")}">{picture}'
        f'<div class="body">{card.body}{file}</div></article>'
    )


def figure(card: Card, shown: Shown, home: Path | None) -> str:
    """The file of a card: a picture, frames or a player, linked to the file itself."""
    assert card.path is not None
    alt = clean(card.alt)
    if shown.error:
        return f'<div class="shown" tabindex="0"><span>{clean(shown.error)}</span></div>'
    if shown.kind == "audio":
        return f'<audio controls preload="none" src="{shown.data[0]}" aria-label="{alt}"></audio>'
    alts = [alt, *[""] * (len(shown.data) - 1)]  # the frames of a video are one picture
    images = "".join(
        f'<img src="{data}" alt="{text}" width="{width}" height="{height}" loading="lazy">'
        for data, text, (width, height) in zip(shown.data, alts, shown.sizes, strict=True)
    )
    if len(shown.data) > 1:
        images = f'<div class="frames">{images}</div>'
    if card.box is not None:
        left, top, right, bottom = (100 * float(edge) for edge in card.box)
        images += (
            f'<img class="map" alt="" hidden style="left:{left:.2f}%;top:{top:.2f}%;'
            f'width:{right - left:.2f}%;height:{bottom - top:.2f}%">'
        )
    if home is None:
        return f'<div class="shown" tabindex="0">{images}</div>'
    link = quote(os.fsencode(os.path.relpath(card.path, home)))  # a colon, too: no scheme
    return f'<a class="shown" href="{escape(link)}" target="_blank" rel="noopener">{images}</a>'


def make(
    names: Iterable[str], *, compare: bool = False, data: str | None = None,
    out: Path | None = None, title: str | None = None, quiet: bool = False,
) -> str:  # fmt: skip
    """The page of some files of JSON Lines, one after another, or two of them side by side.

    ``data``: a data set with references. UserError: as `read` and `add_references`.
    """
    named = list(names)
    runs = [read(name) for name in named]
    if data is not None:
        for lines in runs:
            add_references(lines, data)
    everything = [line for lines in runs for line in lines]
    metrics = [name for line in everything for name in line.get("metrics", {})]
    worst = next(iter(metrics), None) if data is not None else None
    if compare:
        a, b = labels(named)
        cards = compared((a, b), (cards_of(runs[0]), cards_of(runs[1])))
        worst = worst and f"{worst}, B less A"
        title = title or f"{a} and {b}"
    else:
        cards = cards_of(everything)
    shown = "standard input" if named[0] == "-" else Path(named[0]).name
    home = None if out is None else out.absolute().parent
    return page(cards, title or f"tinyvl: {shown}", home, worst=worst, quiet=quiet)


def labels(names: list[str]) -> tuple[str, str]:
    """Two names as short as tells them apart."""
    short = [Path(name).name for name in names]
    a, b = short if short[0] != short[1] else names
    return a, b
