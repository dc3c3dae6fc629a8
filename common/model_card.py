"""A model card of what a checkpoint says of itself.

in   a `Checkpoint` of ours, a published one, anybody's: its tensors' names and its metadata
out  Markdown (Mitchell et al. 2019, arXiv 1810.03993): what it is, what it was trained on, from
     which weights, what its validation gave, what it is for. What the file does not say is "not
     recorded", and nothing is guessed

A header may say anything, so every value is checked for its type and written on one line.
"""

import json
import math
from collections import Counter

from common.rights import LISTED

# of a header, beside the configuration; a Lightning file has the last two
KEYS = (
    "step",
    "date",
    "seconds",
    "torch",
    "args",
    "commit",
    "started_from",
    "data",
    "metrics",
    "epoch",
    "global_step",
)
NOT_RECORDED = "not recorded"
LONGEST = 300  # characters of a value
DEEPEST = 4  # weights that began with weights that began with ...

# beginnings of tensors' names, of which a network has all; the first that fits
KINDS = (
    (
        ("model.diffusion_model.", "first_stage_model."),
        "`ldm.LDM`, stage 2 of Diff-Foley: the latent diffusion model of mel spectrograms, with "
        "its conditioner and the autoencoder that it was trained on",
    ),
    (
        ("model.input_blocks.", "cond_model."),
        "`align.Alignment`, the classifier of double guidance: whether sound and picture belong "
        "together",
    ),
    (
        ("video_project_head.",),
        "`cavp.CAVP`, stage 1 of Diff-Foley: a video and a sound tower, contrastively trained",
    ),
    (
        ("tower.", "head."),
        "`metrics.judge.Judge`, which names the material of hits; for `evaluate.py` alone",
    ),
    (
        ("near.", "wide.", "before.", "after.", "odds."),
        "`finder.Finder`, which finds hits in how the picture moves",
    ),
    (
        ("encoder.", "decoder.", "quant_conv."),
        "`vae.AutoencoderKL`, the autoencoder of mel spectrograms",
    ),
)

USE = """\
Sound effects for silent video, research and teaching. What a network has not been trained on it
does not know: a small set gives a narrow model. Not for anything that is presented as a recording
or as evidence; a model trained on clips of people can reproduce what they sound like. The figures
above, where there are any, are of held-out clips of the same kind as the training data and say
nothing of others.
"""


def render(file) -> str:
    """The card of a `Checkpoint`."""
    metadata = file.metadata
    sections = (
        f"# Model card: {plain(file.path.name)}\n\n{kind_of(file)}\n\n{sizes_of(file)}",
        f"## Configuration\n\n{configuration(file.config)}",
        f"## Training\n\n{training(metadata)}",
        f"## Training data\n\n{data_section(metadata)}",
        f"## Metrics\n\n{metrics(metadata.get('metrics'))}",
        f"## Intended use and limits\n\n{USE}",
        f"## License of the weights\n\n{license_section(metadata)}",
    )
    return "\n\n".join(section.strip() for section in sections) + "\n"


# ---- values ------------------------------------------------------------------------------------


def plain(value) -> str:
    """Any value on one line, of which Markdown makes nothing."""
    if isinstance(value, list):
        value = " ".join(item if isinstance(item, str) else json.dumps(item) for item in value)
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = text[:LONGEST] + "..."
    for special in "\\|<>`*[]":
        text = text.replace(special, f"\\{special}")
    return text


def number(value, digits=0):
    """A finite number with its thousands apart, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        return None
    return f"{value:,.{digits}f}"


def share(value):
    """0.25 -> "25 %", or None; what is not all of it never reads so."""
    if number(value) is None:
        return None
    if 0 < value < 0.01 or 0.99 < value < 1:
        return f"{100 * value:.2g} %" if value < 0.5 else f"{100 * value:.2f} %"
    return f"{100 * value:.0f} %"


def listing(facts: dict) -> str:
    """A line each; None is said to be not recorded."""
    lines = []
    for name, value in facts.items():
        lines.append(f"- {plain(name)}: {NOT_RECORDED if value is None else value}")
    return "\n".join(lines)


def dictionary(value) -> dict:
    """A value of the metadata that should be a dict; anything else is an empty one."""
    return value if isinstance(value, dict) else {}


# ---- sections ----------------------------------------------------------------------------------


def kind_of(file) -> str:
    for beginnings, what in KINDS:
        if all(any(name.startswith(start) for name in file) for start in beginnings):
            return what[0].upper() + what[1:] + "."
    return "A network that is not of this project, or not known to it."


def sizes_of(file) -> str:
    entries = file.entries.values()
    count = sum(math.prod(entry.size) for entry in entries)
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries)
    names = ", ".join(name for name, _ in dtypes.most_common())
    size = file.path.stat().st_size / 1e6
    return f"{count / 1e6:.1f} M numbers in {len(file)} tensors ({names}); {size:.1f} MB."


def configuration(config) -> str:
    if not isinstance(config, dict):
        return f"{NOT_RECORDED.capitalize()}; our loaders then take the published sizes."
    facts = {}
    for name, value in config.items():
        if isinstance(value, dict):
            inner = (f"{plain(key)} {plain(item)}" for key, item in value.items())
            facts[name] = ", ".join(inner)
        else:
            facts[name] = plain(value)
    return listing(facts)


def training(metadata) -> str:
    args = dictionary(metadata.get("args"))
    started = metadata.get("started_from")
    sums = [
        f"{plain(flag)} (SHA-256 {plain(total)})" for flag, total in dictionary(started).items()
    ]
    given = {}
    for name, value in args.items():
        # switches that are off, and what nobody set
        if value is not None and value is not False and value != [] and name != "note":
            given[name] = value
    seconds = number(metadata.get("seconds"))
    facts = {
        "finished": metadata.get("date") and plain(metadata["date"]),
        "code (commit)": metadata.get("commit") and plain(metadata["commit"]),
        "torch": metadata.get("torch") and plain(metadata["torch"]),
        "steps": number(metadata.get("step", metadata.get("global_step"))),
        "seconds": seconds,
        "started from": ", ".join(sums) or ("random weights" if started == {} else None),
        "arguments": ", ".join(f"{plain(k)} {plain(v)}" for k, v in given.items()) or None,
    }
    if "epoch" in metadata:
        facts["epoch"] = plain(metadata["epoch"])
    if args.get("note"):
        facts["note"] = plain(args["note"])
    return listing(facts)


def data_section(metadata) -> str:
    data = metadata.get("data")
    if not isinstance(data, dict):
        note = dictionary(metadata.get("args")).get("note")
        more = f" The note above names a set: {plain(note)}." if note else ""
        return f"{NOT_RECORDED.capitalize()}: neither clips nor their licenses.{more}"
    return describe(data)


def describe(data: dict, depth: int = 0) -> str:
    """One summary (`rights.summarize`), and those of the weights that it began with."""
    clips = number(data.get("clips"))
    seconds = data.get("seconds")
    of_sound = f", {length(seconds)} of sound" if number(seconds) else ""
    noun = "clip" if clips == "1" else "clips"
    lines = [f"{clips or 'An unknown number of'} {noun}{of_sound}.", ""]
    without = data.get("without_license")
    if without == 1:
        lines.append("No license is recorded for any of them.")
    else:
        lines += [
            f"Without a license: {share(without) or NOT_RECORDED}. "
            f"With a word on consent: {number(data.get('consent')) or NOT_RECORDED}. "
            f"With somebody to be named: {number(data.get('attribution')) or NOT_RECORDED} (the "
            "names are in the set's `licences.csv`).",
            "",
            *table("license", data.get("licenses"), data.get("other_licenses")),
        ]
    if data.get("without_source") != 1:
        lines += ["", *table("source", data.get("sources"), data.get("other_sources"))]
    earlier = dictionary(data.get("earlier"))
    for flag, before in earlier.items() if depth < DEEPEST else ():
        name = flag if flag.startswith("until") else f"the weights of --{flag}"
        lines += ["", f"Before that, {plain(name)}:", ""]
        if isinstance(before, dict):
            lines.append(describe(before, depth + 1))
        else:
            lines.append(f"{NOT_RECORDED.capitalize()}.")
    return "\n".join(lines)


def length(seconds) -> str:
    """Hours, or seconds where hours in two decimals would say nothing."""
    if seconds < 360:
        return f"{number(seconds)} seconds"
    return f"{number(seconds / 3600, 2)} hours"


def table(name, counts, others) -> list:
    """Lines of a table of {value: clips}."""
    rows = [f"| {name} | clips |", "|---|---|"]
    for value, clips in list(dictionary(counts).items())[:LISTED]:
        rows.append(f"| {plain(value)} | {number(clips) or NOT_RECORDED} |")
    if others:
        rows.append(f"| {number(others) or 'some'} others | |")
    return rows


def metrics(found) -> str:
    if not dictionary(found):
        return f"{NOT_RECORDED.capitalize()}."
    facts = {}
    for name, value in found.items():
        if name.startswith("val_"):
            facts[name] = plain(f"{value:.4g}" if number(value) else value)
    step = number(found.get("step")) or "an unknown number of"
    return f"Of the last validation, after {step} steps, on held-out clips:\n\n{listing(facts)}"


def license_section(metadata) -> str:
    if metadata.get("commit"):
        return (
            f"{NOT_RECORDED.capitalize()} in the file. The weights that come with this code are "
            "under MIT; of others, whoever trained them says it. Ask whether the licenses of the "
            "training data allow what you want to do: some forbid commercial use, some ask that "
            "somebody be named."
        )
    return (
        f"{NOT_RECORDED.capitalize()} in the file. The weights that the authors of Diff-Foley "
        "published are theirs, under MIT; of other files ask where they come from."
    )
