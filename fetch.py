"""The published checkpoints of Diff-Foley, fetched once and checked: what `--weights official` calls.

in   the Hugging Face hub, SimianLuo/Diff-Foley (MIT), or a mirror of that folder at the address in DIFF_FOLEY_URL
out  the files in DIFF_FOLEY_CACHE (default: ~/.cache/diff-foley), the size and SHA-256 of each in NAME.json beside it

    python fetch.py                     ahead of time, for a machine that will be offline; prints the sums
    python fetch.py | sha256sum -c      reads the files through and compares

Until size and sum are right a file is NAME.part, and an interrupted one goes on from there. The hub publishes both;
from a server without sums the first one seen is kept, and any later download must have it. What is complete is used
without asking the network, and so is a file put there by hand.
"""

import argparse
import email.utils
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows; there, run one at a time
    fcntl = None

HUB = "https://huggingface.co/SimianLuo/Diff-Foley/resolve/main/diff_foley_ckpt"
OFFICIAL = ("cavp_epoch66.ckpt", "ldm_epoch240.ckpt", "double_guidance_classifier.ckpt")
BY_HAND = "or put the files into a folder yourself and give --weights DIR"
TRIES = 6  # requests in a row that bring nothing new, then we give up
BACKOFF, LONGEST = (
    1.0,
    300,
)  # seconds before the second of them, doubling; seconds that a server may ask for
TIMEOUT = 30.0  # seconds of silence that make a lost connection


class FetchError(Exception):
    """One line for the user: what is wrong and the remedy."""


class Again(Exception):
    """Another request may help, after the seconds that the server asks for; fresh: without the bytes we have."""

    def __init__(self, why, wait=0, fresh=False):
        super().__init__(why)
        self.wait, self.fresh = wait, fresh


def say(line):
    tqdm.write(line, file=sys.stderr)  # above the bar, not through it


class Redirects(urllib.request.HTTPRedirectHandler):
    """Never out of https; keeps the headers, for the hub describes a file only where it redirects to its store."""

    headers = ()

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not re.match("https:" if req.type == "https" else "https?:", newurl):
            raise FetchError(
                f"{req.full_url}: redirects to unsafe {newurl}; try another network, {BY_HAND}"
            )
        self.headers += (headers,)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def retry_after(value):
    """The header, which is seconds or a date -> seconds from now; 0 where it is neither."""
    try:
        return (
            int(value)
            if value.isdecimal()
            else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        )
    except (AttributeError, ValueError):
        return 0


def ask(url, at, told):
    """Requests all from byte `at` on. -> response, the headers of every answer on the way to it"""
    headers = {"User-Agent": "diff-foley"}
    if at:
        headers |= {"Range": f"bytes={at}-"} | ({"If-Range": told["etag"]} if told["etag"] else {})
    redirects = Redirects()
    try:
        if not re.match("https?://", url):
            raise ValueError("not a web address")
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416:
            raise Again(f"the server has no more than {at} bytes", fresh=True) from None
        if e.code in (408, 429) or e.code >= 500:
            raise Again(
                f"the server answers {e.code}", retry_after(e.headers["Retry-After"])
            ) from None
        raise FetchError(
            f"{url}: the server answers {e.code}; see that the address is right, {BY_HAND}"
        ) from None
    except (ValueError, http.client.InvalidURL) as e:
        raise FetchError(
            f"{url}: {e}; give DIFF_FOLEY_URL an address that begins with https://"
        ) from None
    except (OSError, http.client.HTTPException) as e:
        raise Again(f"no connection ({getattr(e, 'reason', e)})") from None
    return response, (*redirects.headers, response.headers)


def describe(url, response, answers):
    """-> the first byte that it holds, {size, etag, sha256} of the whole file"""
    # The hub's own tag is a SHA-256. The store's ETag may look like one and is not; a weak one proves too little.
    size, tag = (
        next((h[key] for h in answers if h[key]), "") for key in ("X-Linked-Size", "X-Linked-ETag")
    )
    sha256 = re.fullmatch('"?([0-9a-f]{64})"?', tag.lower())
    first, length, etag = 0, response.headers["Content-Length"], response.headers["ETag"]
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
        if not found:
            raise Again("the server does not say which bytes it sends", fresh=True)
        first, length = int(found[1]), found[2]
    size = size or length or ""
    if not size.isdecimal() or response.headers.get_content_type() == "text/html":
        raise FetchError(
            f"{url}: the server sends a page, not a file; try another network, {BY_HAND}"
        )
    if length not in (None, size):
        raise Again(f"the hub has {size} bytes and the server sends {length}", fresh=True)
    etag = None if etag and etag.startswith("W/") else etag
    return first, {"size": int(size), "etag": etag, "sha256": sha256 and sha256[1]}


def read_note(path):
    """-> what is written down of a file, {size, sha256, ...}; {} where nothing is"""
    try:
        return json.loads(Path(f"{path}.json").read_text())
    except (OSError, ValueError):
        return {}


def write_note(path, **note):
    Path(f"{path}.json.new").write_text(json.dumps(note) + "\n")
    os.replace(f"{path}.json.new", f"{path}.json")  # never half of one


class Part:
    """NAME.part: the bytes so far and their running sum; in NAME.part.json, what the server told of the whole."""

    def __init__(self, path):
        self.path, self.told, self.file = path, read_note(path), open(path, "a+b")
        self.file.seek(0)
        self.sum = hashlib.file_digest(self.file, "sha256")
        self.at = self.file.tell()

    def restart(self, **told):
        self.file.truncate(0)
        self.at, self.sum, self.told = 0, hashlib.sha256(), told
        write_note(self.path, **told)

    def transfer(self, url, bar):
        """One request: for what is missing, or for all where the server cannot, or must not, go on."""
        if self.at > self.told.get("size", 0) or not (
            self.told.get("etag") or self.told.get("sha256")
        ):
            self.restart()  # nothing would show that the rest belongs to this
        response, answers = ask(url, self.at, self.told)
        with response:
            first, told = describe(url, response, answers)
            if first == 0:
                self.restart(**told)
            elif (first, told) != (self.at, self.told):
                raise Again("the file has changed", fresh=True)
            missing, free = told["size"] - self.at, shutil.disk_usage(self.path.parent).free
            if missing > free:
                raise OSError(
                    errno.ENOSPC, f"{missing / 1e9:.2f} GB to come and {free / 1e9:.2f} GB free"
                )
            bar.reset(told["size"])
            bar.initial = bar.n = self.at
            while self.at < told["size"]:
                try:  # read1: what is there, so that a stall loses nothing
                    block = response.read1(min(1 << 20, told["size"] - self.at))
                except (OSError, http.client.HTTPException) as e:
                    raise Again(f"connection lost ({e})") from None
                if not block:
                    raise Again(f"connection closed after {self.at} of {told['size']} bytes")
                self.file.write(block)
                self.sum.update(block)
                self.at += len(block)
                bar.update(len(block))

    def complete(self, url, bar):
        """As many requests as it takes, until size and published sum are right."""
        best, failures, restarts = self.at, 0, 0
        while True:
            try:
                if self.at != self.told.get("size"):
                    self.transfer(url, bar)
                if self.told.get("sha256") not in (None, self.sum.hexdigest()):
                    raise Again("the bytes do not have the published SHA-256", fresh=True)
                return self.sum.hexdigest()
            except Again as e:
                failures, best = 1 if self.at > best else failures + 1, max(best, self.at)
                if e.fresh:
                    self.restart()
                    restarts += 1
                if failures == TRIES or restarts == 2:
                    raise FetchError(f"{url}: {e}; try again later, {BY_HAND}") from None
                wait = max(BACKOFF * 2 ** (failures - 1), min(e.wait, LONGEST))
                say(f"{url}: {e}; again in {wait:.0f} s")
                time.sleep(wait)


def obtain(url, target, progress):
    """`target` and its note: by a download, or of what was put there by hand."""
    known = read_note(target)
    if target.exists() and not known:
        with open(target, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        write_note(target, size=target.stat().st_size, sha256=sha256)
        return say(f"{target}: taken as it lies here; its SHA-256 is now on record: {sha256}")
    if target.exists():
        say(f"{target}: not of the size that is on record; fetching it anew")
    part = Part(target.with_name(f"{target.name}.part"))
    try:
        with (
            part.file,
            tqdm(
                desc=target.name, unit="B", unit_scale=True, disable=None if progress else True
            ) as bar,
        ):
            sha256 = part.complete(url, bar)
            if sha256 != known.get("sha256", sha256):
                part.restart()
                raise FetchError(
                    f"{url}: has SHA-256 {sha256}, and the one fetched before {known['sha256']}; "
                    f"if that is meant to be, delete {target}.json"
                )
            part.file.flush()
            os.fsync(part.file.fileno())
        if not (part.told.get("sha256") or known):
            say(f"{target}: the server publishes no sum; this SHA-256 is now on record: {sha256}")
        write_note(
            target, size=part.at, sha256=sha256
        )  # first: without it the file would pass as put there by hand
        os.replace(part.path, target)
        part.at = 0
    finally:
        if part.at == 0:  # nothing to go on from
            part.path.unlink(missing_ok=True)
            Path(f"{part.path}.json").unlink(missing_ok=True)


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DIFF_FOLEY_CACHE") or f"{base}/diff-foley").expanduser()


def is_whole(path):
    return path.is_file() and path.stat().st_size == read_note(path).get("size")


def fetch(name, folder=None, url=None, progress=True):
    """One file -> its path; where it is complete, without any request. url: of the folder that has it"""
    target = Path(folder or cache_folder()) / name
    url = f"{(url or os.environ.get('DIFF_FOLEY_URL') or HUB).rstrip('/')}/{name}"
    try:
        if is_whole(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(
            target.with_name(".fetch.lock"), "a"
        ) as lock:  # stays: all must lock the same one
            if fcntl:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say(f"{target.parent}: waiting for another process that fetches")
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_whole(target):  # the other one may have left nothing to do
                obtain(url, target, progress)
    except OSError as e:  # of the disk; those of the network have become Again
        raise FetchError(
            f"{e.filename or target}: {e.strerror or e}; free some space, or name another folder in "
            "DIFF_FOLEY_CACHE"
        ) from None
    return target


def official(names=OFFICIAL, folder=None, url=None, progress=True):
    """The published checkpoints -> the folder that holds them."""
    for name in names:
        path = fetch(name, folder, url, progress)
    return path.parent


def main(argv=None):
    p = argparse.ArgumentParser(
        "fetch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--eval", action="store_true", help="eval_classifier.ckpt too, which only scoring needs"
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="put them there; then give --weights DIR"
    )
    args = p.parse_args(argv)
    names = OFFICIAL + ("eval_classifier.ckpt",) * args.eval
    try:
        folder = official(names, args.out)
    except FetchError as e:
        print(f"fetch.py: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for name in names:
        print(f"{read_note(folder / name)['sha256']}  {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
