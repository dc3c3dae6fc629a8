"""Weights: which files are meant, and the published ones from the Hugging Face hub.

in   "mini", "official" or a folder; SimianLuo/Diff-Foley (MIT) on the hub, or on the server that
     HF_ENDPOINT names
out  paths; the published files in DIFF_FOLEY_CACHE (default: ~/.cache/diff-foley), size and SHA-256
     in NAME.json

    python -m compat.hub                     ahead of time, for a machine that will be offline
    python -m compat.hub | sha256sum -c      reads the files through and compares

The hub publishes the size and the SHA-256 of each file. A download that has both gets its name and
is used from then on without the network; one that has not is deleted. `huggingface_hub` is imported
only where a file is missing. It goes on where a connection breaks, but a process that is stopped
begins its file again.
"""

import fnmatch
import json
import os
import re
import shutil
import sys
from pathlib import Path

from common import cli, files
from common.files import UserError

REPO = "SimianLuo/Diff-Foley"
SUBFOLDER = "diff_foley_ckpt"
OFFICIAL = ("cavp_epoch66.ckpt", "ldm_epoch240.ckpt", "double_guidance_classifier.ckpt")
MINI = Path(__file__).parent.parent / "weights" / "mini"
BY_HAND = f"or download {', '.join(OFFICIAL)} yourself and give their folder as weights"


class HubError(UserError):
    """One line for the user: the file, what is wrong and the remedy."""


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DIFF_FOLEY_CACHE") or f"{base}/diff-foley").expanduser()


def recorded_sum(path):
    """The SHA-256 on record, for a file of the size on record; None for any other."""
    try:
        record = json.loads(Path(f"{path}.json").read_text())
        return record["sha256"] if path.stat().st_size == record["size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check(path, size, sha256, remedy):
    """Refuse a file that is not the published one."""
    if path.stat().st_size != size:
        raise HubError(f"{path}: has {path.stat().st_size} bytes, published are {size}; {remedy}")
    digest = files.sha256(path)
    if digest != sha256:
        raise HubError(f"{path}: has SHA-256 {digest}, published is {sha256}; {remedy}")


def obtain(target):
    """Download `target`, or recognize what was put there by hand, and write its record."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    # token=False: the files are public, so the user's token stays here.
    url = hf_hub_url(REPO, target.name, subfolder=SUBFOLDER)
    published = get_hf_file_metadata(url, token=False)
    size, sha256, revision = published.size, published.etag, published.commit_hash
    if size is None or not re.fullmatch("[0-9a-f]{64}", sha256 or ""):
        raise HubError(f"{url}: the server gives no size and SHA-256; see HF_ENDPOINT, {BY_HAND}")
    if target.exists():
        check(target, size, sha256, "move it away and try again")
    else:
        # Beside the target, so that it moves in one step. What a killed process left goes first.
        staging = target.parent / ".download"
        shutil.rmtree(staging, ignore_errors=True)
        file = f"{SUBFOLDER}/{target.name}"
        try:
            hf_hub_download(REPO, file, revision=revision, local_dir=staging, token=False)
            check(staging / file, size, sha256, f"it is deleted; try again later, {BY_HAND}")
            os.replace(staging / file, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    Path(f"{target}.json").write_text(json.dumps({"size": size, "sha256": sha256}) + "\n")


def fetch(target):
    """One published file to its place; without any request where it is complete."""
    if recorded_sum(target):
        return
    try:
        from huggingface_hub.utils import WeakFileLock

        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(target.parent / ".lock"):
            if not recorded_sum(target):  # another process may have fetched it meanwhile
                obtain(target)
    except HubError:
        raise
    except ImportError as e:
        raise HubError(f"{target}: {e}; pip install huggingface_hub, {BY_HAND}") from None
    except Exception as e:  # the disk's, the hub's, and those of the library's HTTP client
        remedy = f"try again later, {BY_HAND}"
        if isinstance(e, OSError) and e.errno:  # the disk's
            remedy = "free some space, or name another folder in DIFF_FOLEY_CACHE"
        reason = " ".join(str(e).split()) or type(e).__name__
        raise HubError(f"{target}: {reason}; {remedy}") from None


def official():
    """The published checkpoints -> the folder that holds them."""
    folder = cache_folder()
    for name in OFFICIAL:
        fetch(folder / name)
    return folder


def find_checkpoint(folder, *patterns):
    """The one file of a folder that fits the first pattern that any fits, or None.

    A broken link counts as a file, so that opening it reports it.
    """
    # glob(pattern) would skip a broken link if the pattern has no wildcard
    files = sorted(folder.glob("*"))
    for pattern in patterns:
        paths = [path for path in files if fnmatch.fnmatchcase(path.name, pattern)]
        if len(paths) > 1:
            raise HubError(
                f"{folder}: {paths[0].name} and {paths[1].name} both fit {pattern}; leave only one"
            )
        if paths:
            return paths[0]
    return None


def find_weights(weights: str | Path) -> dict[str, Path | None]:
    """The checkpoints of cavp, ldm, align and finder; align may be None.

    weights: "mini", which is in the repository; "official", downloaded once; or a folder with our
    files or the published ones. A folder without a finder has that of "mini", which fits all.
    Raises HubError.
    """
    if weights == "official":
        folder = official()
    elif weights == "mini":
        folder = MINI
    else:
        folder = Path(weights)
    if not folder.is_dir():
        raise HubError(
            f"{folder}: no such folder of weights; give mini, official, or a folder that has them"
        )
    paths = {
        "cavp": find_checkpoint(folder, "cavp.safetensors", "cavp*.ckpt"),
        "ldm": find_checkpoint(folder, "ldm.safetensors", "ldm*.ckpt"),
        "align": find_checkpoint(folder, "align.safetensors", "double_guidance_classifier.ckpt"),
        "finder": find_checkpoint(folder, "finder.safetensors") or MINI / "finder.safetensors",
    }
    for name in ("cavp", "ldm"):
        if paths[name] is None:
            raise HubError(
                f"{folder}: no {name}.safetensors and no {name}*.ckpt; "
                "add it, or give another folder of weights"
            )
    return paths


def main():
    cli.Parser("python -m compat.hub", __doc__).parse_args()
    try:
        folder = official()
    except HubError as e:
        print(f"compat.hub: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compat.hub: stopped; the files that are complete are kept", file=sys.stderr)
        return 130
    for name in OFFICIAL:
        print(f"{recorded_sum(folder / name)}  {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
