"""The flags of sample.py.

in   nothing: defaults of what is drawn come from `sample.Settings`
out  a parser
"""

from pathlib import Path

from common import cli
from common.controls import FINDERS
from diffusion import SAMPLERS, SCHEDULES
from film import level
from film.redo import add_redo

GUIDANCE = ("double", "distilled")
PAPER = {"steps": 25, "sampler": "dpm"}
# where guidance is distilled (docs/acceleration.md)
FEW = {"steps": 6, "sampler": "unipc"}
TRIES = 4  # of a window (film/tries.py)
MOST_TRIES = 64


def make_parser(script: str, description: str):
    """All of them, without the defaults of what is drawn."""
    p = cli.Parser(script, description)
    p.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="videos, folders, 'patterns/**/*.mov', @LIST (a text file with one of these a line); "
        "after -- names may begin with a dash",
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="make nothing, but say of each INPUT (wav too) whether its sound is ours; "
        "exit status 3 where one is not",
    )
    p.add_argument(
        "--pick",
        action="store_true",
        help="draw nothing, but give each video the candidate that was picked: INPUT is the "
        "picks.json that the page of --keep-all --page saves; --out as when they were drawn",
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="write there; default: beside each input"
    )
    p.add_argument(
        "--weights",
        default="mini",
        metavar="mini|official|DIR",
        help="the model shipped here; the published one (4.3 GB, downloaded once); or a folder "
        "with the checkpoints cavp, ldm and align: ours or the published ones",
    )
    add_sampling_arguments(
        p.add_argument_group("sampling; steps and sampler are the paper's by default")
    )
    add_input_arguments(p.add_argument_group("input"))
    level.add_arguments(p.add_argument_group("level, mix and format"))
    add_run_arguments(p.add_argument_group("run"))
    return p


def add_sampling_arguments(g):
    g.add_argument(
        "--steps",
        type=int,
        help="of the sampler; default: 25, as in the paper, or 6 where guidance is distilled and "
        "steps of unipc or dpm lie evenly",
    )
    g.add_argument(
        "--guidance",
        choices=GUIDANCE,
        help="double: the paper's, two calls of the U-Net a step and one of the classifier; "
        "distilled: one call, for weights that learned it (distill.py; default where they did)",
    )
    g.add_argument(
        "--cfg",
        type=float,
        help="classifier-free guidance scale; 1: off; default: what suits the weights "
        "(published: 4.5, as in the paper; mini: 3.5)",
    )
    g.add_argument(
        "--cg",
        type=float,
        help="classifier guidance scale; 0: off; default: what suits the weights' own classifier "
        "(published: 50, as in the paper; mini: 15)",
    )
    g.add_argument(
        "--sampler", choices=list(SAMPLERS), help="DPM-Solver++ 2M, UniPC, DEIS, DDIM or PLMS"
    )
    g.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="where the steps of the first three samplers lie",
    )
    add_deep_every(g)
    g.add_argument("--seed", type=int, help="same seed, same sound")
    g.add_argument(
        "--as-official",
        action="store_true",
        help="what the official demo does with the published weights, quirk for "
        "quirk: windows end to end, pitch at 0.73, the first 8.2 s (see compat/official.py)",
    )
    add_directions(g)
    g.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="draw N and keep the one that the classifier rates best",
    )
    g.add_argument(
        "--keep-all", action="store_true", help="write every candidate too, as NAME.foley.K.wav"
    )
    add_tries(g)
    add_redo(g)


def add_tries(g):
    g.add_argument(
        "--tries",
        type=int,
        metavar="N",
        default=TRIES,
        help="draw 8 seconds of sound up to N times, until every hit is heard and no other; the "
        f"best is kept (default: {TRIES}; 1: draw once)",
    )


def add_deep_every(g):
    g.add_argument(
        "--deep-every",
        type=int,
        metavar="N",
        default=1,
        help="the deep half of the U-Net in every N-th step alone (DeepCache): with 2, sampling is "
        "1.2 to 1.4 times as fast, and the sound nearly the same",
    )


def add_directions(g):
    g.add_argument(
        "--onsets",
        metavar="|".join((*FINDERS, "FILE", "DIR")),
        help="who finds the hits: the model, by what it sees; the flow of the picture; both "
        "(default); none: nobody, as published; or play those of FILE and no others: a label "
        "track of Audacity, or a CSV of time, strength and material; of many inputs "
        "DIR/NAME.onsets.txt",
    )
    g.add_argument(
        "--find-rest",
        action="store_true",
        help="--onsets FILE has only the first hits, two or more; find those that follow, by what "
        "these look like",
    )
    add_material(g)
    g.add_argument(
        "--write-onsets",
        action="store_true",
        help="NAME.onsets.txt: the hits, to be edited and given back by --onsets",
    )


def add_material(g):
    g.add_argument(
        "--material",
        type=lambda text: tuple(name.strip().lower() for name in text.split(",")),
        default=(),
        metavar="NAME[,NAME]",
        help="what is heard, unless a hit of --onsets FILE has its own: wood, metal, glass, ...",
    )


def add_input_arguments(g):
    g.add_argument(
        "--start",
        type=cli.number(float, 0),
        default=0.0,
        metavar="S",
        help="seconds into the picture",
    )
    g.add_argument(
        "--duration",
        type=cli.number(float, 1e-3),
        metavar="S",
        help="seconds of picture; default: the rest",
    )
    g.add_argument(
        "--keep-audio",
        type=cli.number(float, -100, 100),
        nargs="?",
        const=0.0,
        metavar="dB",
        help="mix the clip's own sound in, at this gain (0 if none is given); the mix is written",
    )
    g.add_argument(
        "--keep-tracks",
        action="store_true",
        help="the clip's own sound tracks stay, as they are, as further tracks of the video",
    )


def add_run_arguments(g):
    g.add_argument(
        "--overwrite",
        action="store_true",
        help="draw again what is there already, finished with the same settings or edited since",
    )
    g.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    g.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 for networks of the published size, on a GPU and on a CPU that "
        "computes in it; else float32",
    )
    g.add_argument(
        "--kernels",
        choices=("auto", "triton", "torch"),
        default="auto",
        help="fused kernels for NVIDIA GPUs; auto: where they can run",
    )
    g.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="say which kernels run, what had to be done without, and what else lies in a folder",
    )
    g.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="windows in one network call, of any clips; default: 1 on a CPU, 16 on a GPU",
    )
    g.add_argument(
        "--plot",
        action="store_true",
        help="NAME.foley.png: frames, onsets, spectrogram, waveform on one time axis",
    )
    g.add_argument(
        "--profile",
        action="store_true",
        help="print seconds and peak memory of each stage; total: since the output before",
    )
    g.add_argument(
        "--page",
        action="store_true",
        help="index.html in --out, or beside the first output: pick by ear, in a browser",
    )
    g.add_argument(
        "--sign",
        nargs=2,
        type=Path,
        metavar=("CERT", "KEY"),
        help="Content Credentials by this certificate and its key, both PEM (needs c2pa-python)",
    )
    g.add_argument("--json", action="store_true", help="print one line of JSON for each input")


def usual_sampling(settings, guidance):
    """-> steps and sampler: those that are given, else what suits `guidance` and the schedule."""
    is_few = guidance == "distilled" and not (settings.redo or settings.as_official)
    sampler = settings.sampler or (FEW if is_few else PAPER)["sampler"]
    # redoing takes DDIM's steps, twice (film/redo.py)
    if settings.redo:
        sampler = "ddim"
    # of the others, or on another schedule, so few steps give noise or a level that is off
    is_few &= sampler in ("unipc", "dpm") and settings.schedule == "uniform"
    return settings.steps or (FEW if is_few else PAPER)["steps"], sampler


def check_settings(settings):
    """Raises ValueError, in one line, for what `sample.Settings` cannot have."""
    sampler = settings.sampler
    if sampler not in (None, *SAMPLERS):
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler {cli.quoted(sampler)}: not one of {known}")
    if settings.guidance not in (None, *GUIDANCE):
        known = ", ".join(GUIDANCE)
        raise ValueError(f"guidance {cli.quoted(settings.guidance)}: not one of {known}")
    # DDIM and PLMS step between 1000 whole times, and from the last one there is no step left
    is_solver = sampler not in ("ddim", "plms")
    most = 1000 if is_solver and not settings.redo else 999
    check_schedule(settings.schedule, is_solver and not (settings.redo or settings.as_official))
    cli.check_number("seed", settings.seed, 0, 2**40, whole=True)
    cli.check_number("candidates", settings.candidates, 1, 1000, whole=True)
    cli.check_number("tries", settings.tries, 1, MOST_TRIES, whole=True)
    cli.check_number("deep_every", settings.deep_every, 1, 1000, whole=True)
    if settings.deep_every > 1 and settings.as_official:
        raise ValueError("deep-every: not of the official demo; leave it out")
    # None: what suits the weights or the device
    optional = {"steps": (1, most, True), "batch": (1, 4096, True), "keep_audio": (-100, 100)}
    optional |= {"cfg": (0,), "cg": (0,)}
    for name, limits in optional.items():
        if getattr(settings, name) is not None:
            cli.check_number(name, getattr(settings, name), *limits)
    # a mere string would be read letter by letter
    cli.check_type("material", settings.material, tuple)
    if settings.onsets is not None and not isinstance(settings.onsets, str | Path | tuple):
        raise ValueError(f"onsets {cli.quoted(settings.onsets)}: give a tuple of Hit, or a file")
    cli.check_type("find_rest", settings.find_rest, bool)
    if settings.find_rest and (settings.onsets is None or settings.onsets in FINDERS):
        raise ValueError(
            "find-rest: needs the first hits of the clip; give them with --onsets FILE"
        )


def check_schedule(schedule, is_solver):
    """Raises ValueError for what is no schedule, or not of a sampler that has its own times."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ValueError(f"schedule {cli.quoted(schedule)}: not one of {known}")
    elif len(schedule) < 2 or not all(0 <= t <= 999 for t in schedule):
        raise ValueError("schedule: give two times or more, from 0 to 999")
    if schedule != "uniform" and not is_solver:
        raise ValueError(
            "schedule: --sampler ddim and plms, --redo and --as-official have their own; leave it "
            "out"
        )
