"""Blind listening: which of two sounds fits the picture? The page for it, and what the answers say.

in   videos with sounds by several makers; later the ratings that the page saves
out  OUT/listen.html and OUT/listen/, which are all that a rater needs, from disk and offline;
     OUT/listen-key.json, which says what is what and stays with whoever asks; later, of each kind
     of pair, how often ours was preferred

    python evaluate.py --data held-out --clips 20 --page --out test
    python evaluate.py --out test --ratings ratings-*.json

Every pair is ours against another sound for the same picture. Order, sides and file names are
random. A rater must hear both before an answer counts.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

from common import media
from common.audio import SAMPLE_RATE
from common.files import UserError, make_folder, write_bytes
from film.page import fill, link

KEY = "listen-key.json"
# what an answer is worth for the sound on its side
CHOICES = {"a": {"a": 1.0, "b": 0.0}, "b": {"a": 0.0, "b": 1.0}, "same": {"a": 0.5, "b": 0.5}}
NORMAL = 1.959964  # the normal distribution's quantile for 95 %


class RatingsError(UserError):
    """A file of ratings, or the key to them, that cannot be used."""


# ---- the page ----------------------------------------------------------------------------------


def check_free(out):
    """Raise RatingsError where a test lies already: without its key nobody could read answers."""
    path = Path(out) / KEY
    if path.exists():
        raise RatingsError(
            f"{path}: is there already, and answers to its test need it; give another --out"
        )


def write_test(out, videos, sounds, seed=0):
    """Writes listen.html, listen/ and the key into the folder `out`.

    sounds: {maker: [(wav (n,), its tags) of each video]}, "ours" and one or more others. A sound
    is cut or padded to its picture.
    """
    rng = np.random.default_rng([seed, len(videos)])
    folder = make_folder(Path(out) / "listen")
    digest = hashlib.sha256()

    def new_name():
        return rng.bytes(8).hex()

    def write_sound(wav, tags, samples):
        path = folder / f"{new_name()}.wav"
        padded = torch.nn.functional.pad(wav[:samples], (0, max(0, samples - len(wav))))
        media.write_wav(path, padded, tags)
        digest.update(path.read_bytes())
        return {"url": link(path, out), "offset": 0}

    pairs = []
    key = {}
    for k, video in enumerate(videos):
        about = media.probe(video)
        samples = round(about.duration * SAMPLE_RATE)
        # the picture alone, once for all its pairs; its own sound would be among the answers
        suffix = ".webm" if Path(video).suffix.lower() == ".webm" else ".mp4"
        picture = folder / f"{new_name()}{suffix}"
        media.write_video(video, torch.zeros(samples), picture)
        for other in sounds:
            if other == "ours":
                continue
            makers = ["ours", other]
            rng.shuffle(makers)
            pair = {
                "id": new_name(),
                "picture": {"url": link(picture, out), "offset": 0},
                "seconds": about.duration,
                "aspect": about.width / about.height,
                "sounds": [write_sound(*sounds[maker][k], samples) for maker in makers],
            }
            pairs.append(pair)
            key[pair["id"]] = {"clip": Path(video).name, "a": makers[0], "b": makers[1]}
    rng.shuffle(pairs)

    # answers are of these very sounds and no others
    test = digest.hexdigest()[:16]
    content = {"test": test, "seed": seed, "pairs": key}
    write_bytes(Path(out) / KEY, f"{json.dumps(content, indent=1)}\n".encode())
    write_bytes(Path(out) / "listen.html", fill("listen.html", {"test": test, "pairs": pairs}))


# ---- the answers -------------------------------------------------------------------------------


def read_json(path):
    """The object in a JSON file. Raises RatingsError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RatingsError(f"{path}: cannot be read ({error.strerror}); give another") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RatingsError(f"{path}: not a JSON object; give what listen.html saved")
    return content


def read_ratings(paths, key_path):
    """-> the key's pairs {id: {"clip", "a", "b"}}, and {rater: {id: "a", "b" or "same"}}.

    Raises RatingsError for files that are none, of another test, or of one rater twice.
    """
    if not Path(key_path).exists():
        raise RatingsError(f"{key_path}: is not there; give the --out that --page wrote into")
    key = read_json(key_path)
    pairs = key.get("pairs")
    if not isinstance(pairs, dict):
        raise RatingsError(f"{key_path}: not the key to a listening test; give the --out of --page")
    raters = {}
    files = {}
    for path in paths:
        rating = read_json(path)
        rater = str(rating.get("rater"))
        answers = rating.get("answers")
        if not isinstance(answers, dict) or "rater" not in rating:
            raise RatingsError(f"{path}: no ratings; give what listen.html saved")
        if rating.get("test") != key.get("test"):
            raise RatingsError(
                f"{path}: of another test than {key_path}; give the --out of its own"
            )
        if rater in raters:
            raise RatingsError(f"{path}: of the same rater as {files[rater]}; give the later alone")
        for pair, choice in answers.items():
            if pair not in pairs or choice not in tuple(CHOICES):
                raise RatingsError(
                    f"{path}: the answer {pair!r:.40} is not of this test; correct it"
                )
        raters[rater] = answers
        files[rater] = path
    return pairs, raters


def wilson(share, count):
    """Wilson's score interval of 95 % of a share that was found in `count` trials."""
    spread = NORMAL**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = NORMAL * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def tally(pairs, raters):
    """{other maker: what the answers say of ours against it}, in the order of the key.

    "share": of the clips, of each the mean over its raters, no difference counting one half;
    "interval": 95 % of it, by Wilson over the clips, since raters of one clip are not independent;
    "clips"; "answers": {"ours", "same", "other": numbers}; "raters": {rater: share}.
    """
    results = {}
    for pair, sides in pairs.items():
        ours = "a" if sides["a"] == "ours" else "b"
        other = sides["b" if ours == "a" else "a"]
        result = results.setdefault(other, {"by_clip": {}, "by_rater": {}, "answers": [0, 0, 0]})
        for rater, answers in raters.items():
            if pair in answers:
                worth = CHOICES[answers[pair]][ours]
                result["by_clip"].setdefault(sides["clip"], []).append(worth)
                result["by_rater"].setdefault(rater, []).append(worth)
                result["answers"][(1.0, 0.5, 0.0).index(worth)] += 1
    # shares of them
    scores = {}
    for other, result in results.items():
        clips = [np.mean(worths) for worths in result["by_clip"].values()]
        if clips:
            share = float(np.mean(clips))
            scores[other] = {
                "share": share,
                "interval": wilson(share, len(clips)),
                "clips": len(clips),
                "answers": dict(zip(("ours", "same", "other"), result["answers"], strict=True)),
                "raters": {rater: float(np.mean(w)) for rater, w in result["by_rater"].items()},
            }
    return scores


def report(scores):
    """The tally as text: a line for each kind of pair; where there are several, each rater's."""
    if not scores:
        return "no answers"
    lines = ["ours against    preferred  95 %            clips  answers: ours, same, other"]
    for other, score in scores.items():
        low, high = score["interval"]
        counts = ", ".join(map(str, score["answers"].values()))
        interval = f"{low:.3f} to {high:.3f}"
        lines.append(f"{other:<16}{score['share']:<11.3f}{interval:<16}{score['clips']:<7}{counts}")
        if len(score["raters"]) > 1:
            for rater, share in score["raters"].items():
                lines.append(f"  {rater:<14}{share:.3f}")
    return "\n".join(lines)
