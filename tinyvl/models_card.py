"""The model card: a ``README.md`` that says what a checkpoint is made of, and under which licences.

Its head is YAML for the model hub. Each value is written as JSON, which YAML reads as it is.
"""

import re
from pathlib import Path
from typing import Any

from tinyvl import hub
from tinyvl.files import dump

# A card that has this sentence is renewed; one that a person wrote instead is left as it is.
MADE = "A tinyvl checkpoint: only the trained modules; the frozen backbones are fetched by name."
TAGS = {"caption": "captioning", "vqa": "question-answering", "retrieve": "text-retrieval"}
PIPELINES = {  # the hub's own word for a task, by modality and task
    ("image", "caption"): "image-to-text", ("image", "vqa"): "visual-question-answering",
    ("image", "retrieve"): "zero-shot-image-classification",
    ("video", "caption"): "video-text-to-text", ("video", "vqa"): "video-text-to-text",
    ("audio", "caption"): "audio-text-to-text", ("audio", "vqa"): "audio-text-to-text",
}  # fmt: skip
BY_NC = "CC BY-NC 4.0 (non-commercial)"  # TimeSformer's, whatever its folder is called
LICENCES = {  # the hub's word for a licence, the strictest first
    BY_NC: "cc-by-nc-4.0", "BSD-3-Clause": "bsd-3-clause",
    "Apache-2.0": "apache-2.0", "MIT": "mit",
}  # fmt: skip
ELSEWHERE = "see its own card"


def is_path(text: str) -> bool:
    """Whether a text names a file or a folder of this machine, not a model of the hub."""
    if re.match(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]", text):
        return True
    try:
        return ("/" in text or "\\" in text) and Path(text).exists()
    except (OSError, ValueError):
        return False


def nameless(value: Any) -> Any:
    """JSON whose paths are file names; of an option "--data=a/b" what follows the sign."""
    if isinstance(value, dict):
        return {key: nameless(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [nameless(inner) for inner in value]
    if not isinstance(value, str):
        return value
    before, sign, text = value.rpartition("=") if value.startswith("--") else ("", "", value)
    return before + sign + (re.split(r"[/\\]", text.rstrip("/\\"))[-1] if is_path(text) else text)


def published(config: dict[str, Any]) -> dict[str, Any]:
    """A ``config.json`` for others: without the paths of this machine."""
    own = {"training": nameless(config["training"])} if "training" in config else {}
    sides = [key for key, part in config.items() if isinstance(part, dict) and "sha256" in part]
    return config | {side: nameless(config[side]) for side in sides} | own


def licence_of(part: dict[str, Any]) -> str:
    """The licence of a backbone, as far as its name or its kind tells it."""
    if part["config"].get("model_type") == "timesformer":
        return BY_NC
    known = hub.find(part["name"])
    return known.licence if known else ELSEWHERE


def licence(parts: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The head's licence: that of the strictest backbone; "other" where one is not known."""
    found = {licence_of(part) for part in parts.values()}
    if BY_NC in found:
        return {"license": "cc-by-nc-4.0"}
    if odd := sorted(found - {*LICENCES, ELSEWHERE}):
        slug = re.sub("[^a-z0-9]+", "-", odd[0].lower()).strip("-")
        return {"license": "other", "license_name": slug}
    if ELSEWHERE in found:
        return {"license": "other"}
    return {"license": next(slug for name, slug in LICENCES.items() if name in found)}


def repository(part: dict[str, Any]) -> str | None:
    """A backbone's name on the model hub; None: it is a folder."""
    name = part["name"]
    if known := hub.find(name):
        return known.hub
    if is_path(name):
        return None
    return name if "/" in name else f"timm/{name}" if "architecture" in part["config"] else None


def model_index(name: str, task: str, evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of reports (`tinyvl eval -o`) as the model hub's cards have them."""
    results = []
    for report in evaluations:
        data = Path(str(report.get("data", ""))).name
        split = report.get("split")
        metrics = [
            {"type": metric.lower(), "name": metric, "value": value}
            for metric, value in report["metrics"].items()
            if isinstance(value, int | float)
        ]
        dataset = {"type": data, "name": data} | ({"split": split} if split else {})
        results.append({"task": {"type": task}, "dataset": dataset, "metrics": metrics})
    return [{"name": name, "results": results}]


def card(
    config: dict[str, Any], parts: dict[str, dict[str, Any]], modality: str, task: str, *,
    summary: dict[str, Any], command: str, evaluations: list[dict[str, Any]] | None = None,
    name: str = "",
) -> str:  # fmt: skip
    """The text of a card.

    Args:
        parts: the backbones by what the config calls them.
        summary: steps, loss and the like.
        command: that made the model; "" where it is not known.
        evaluations: reports of `tinyvl eval -o`.
        name: of the model, in its metrics.
    """
    training = config.get("training", {})
    recipe, data = training.get("recipe", {}), training.get("data")
    title = f"{config['method']} on {' with '.join(Path(p['name']).name for p in parts.values())}"
    pipeline = PIPELINES.get((modality, task), "image-to-text")
    head: dict[str, Any] = {"library_name": "tinyvl"} | licence(parts)
    head |= {"pipeline_tag": pipeline, "tags": [f"{modality}-{TAGS[task]}", config["method"]]}
    if bases := [base for part in parts.values() if (base := repository(part))]:
        head |= {"base_model": bases, "base_model_relation": "adapter"}
    if data:
        head["datasets"] = [Path(data).name]
    if evaluations:
        head["model-index"] = model_index(name or title, pipeline, evaluations)
    lines = ["---", *(f"{key}: {dump(value)}" for key, value in head.items()), "---"]
    lines += [f"# {title}", "", MADE, ""]
    for side, part in parts.items():
        shown, own = Path(part["name"]).name if is_path(part["name"]) else part["name"], part
        lines.append(f"- {side}: {shown} (licence: {licence_of(own)}; SHA-256 {own['sha256']})")
    if data:
        lines.append(f"- data: {Path(data).name}")
    lines.append("")
    for part in parts.values():
        if "non-commercial" in (terms := licence_of(part)):
            kind = "TimeSformer" if terms == BY_NC else part["name"]
            whole = "are for non-commercial use only, and with them this model as a whole"
            lines += [f"The weights of {kind} ({terms.partition(' (')[0]}) {whole}.", ""]
    lines += ["The head's licence is the strictest backbone's; the data may ask for more.", ""]
    for remark in config.get("converted", {}).get("remarks", []):
        lines += [remark, ""]
    lines += ["```", command, "```", ""] if command else []
    if evaluations:
        lines += ["| data | metric | |", "|---|---|---|"]
        for result in head["model-index"][0]["results"]:
            where = " ".join(value for key, value in result["dataset"].items() if key != "type")
            lines += [f"| {where} | {m['name']} | {m['value']:.4g} |" for m in result["metrics"]]
        lines.append("")
    table = {key: value for key, value in {**summary, **recipe}.items() if value is not None}
    if table:
        lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in table.items())]
    return "\n".join(lines).rstrip() + "\n"


def command_in(text: str) -> str:
    """The command that a card says it was made by; "" where it says none."""
    found = re.search(r"^```\n(tinyvl .*)\n```$", text, re.MULTILINE)
    return found[1] if found else ""
