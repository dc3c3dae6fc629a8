"""compat/hub.py against a server that answers as the hub does: a file is whole and the published
one, or one line says why not."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bounds import PATIENCE

from compat import hub

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef" * 2 + "01234567"
FILES = {name: name.encode() * 10_000 for name in hub.OFFICIAL}
FIRST = hub.OFFICIAL[0]
FILES[FIRST] *= 80
BREAK = 12_000_000  # of 12,800,000; the library keeps what it has in blocks of 10 MiB
SUMS = {name: hashlib.sha256(body).hexdigest() for name, body in FILES.items()}

optional = pytest.mark.optional  # each of these asks for huggingface_hub


class Hub:
    """The hub's description of a file redirects to a store, which has the bytes and knows Range.

    served    name -> bytes that the store has, where they are not the published ones
    breaks    names whose next download breaks off after BREAK bytes
    describe  whether size and sum are given, as the hub does for large files
    """

    def __init__(self):
        self.served = dict(FILES)
        self.breaks = set()
        self.describe = True
        self.requests = []  # (method, path, Range, Authorization) of each
        hub_server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                told = self.headers["Range"], self.headers["Authorization"]
                hub_server.requests.append((self.command, self.path, *told))
                name = self.path.rsplit("/", 1)[-1]
                if name not in FILES:
                    self.head(404, {"Content-Length": "0"})
                elif self.path.startswith("/store/"):
                    self.send_file(name)
                else:
                    self.redirect(name)

            def redirect(self, name):
                headers = {"Location": f"{hub_server.store}/{name}", "Content-Length": "0"}
                headers["X-Repo-Commit"] = COMMIT
                if hub_server.describe:
                    headers["X-Linked-Size"] = str(len(FILES[name]))
                    headers["X-Linked-ETag"] = f'"{SUMS[name]}"'
                else:
                    headers["ETag"] = f'"{COMMIT}"'
                self.head(302, headers)

            def send_file(self, name):
                body = hub_server.served[name]
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
                at = int(wanted[1]) if wanted else 0
                headers = {"Content-Length": str(len(body) - at), "ETag": '"store"'}
                if wanted:
                    headers["Content-Range"] = f"bytes {at}-{len(body) - 1}/{len(body)}"
                self.head(206 if wanted else 200, headers)
                if name in hub_server.breaks:
                    hub_server.breaks.remove(name)
                    body = body[:BREAK]
                if self.command == "GET":
                    self.wfile.write(body[at:])

            def head(self, status, headers):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.store = f"http://localhost:{self.http.server_port}/store"  # another host, as it is
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def downloads(self, name):
        """The Range of every request for the file's bytes."""
        return [r[2] for r in self.requests if r[:2] == ("GET", f"/store/{name}")]


@pytest.fixture
def server():
    pytest.importorskip("huggingface_hub")
    server = Hub()
    yield server
    server.close()


def command(folder, url="http://127.0.0.1:9", **more):
    """`python -m compat.hub` with its cache in `folder` -> exit status, stdout, end of stderr"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"DIFF_FOLEY_CACHE": str(folder), "HF_ENDPOINT": url, "HF_HOME": f"{folder}.hf"}
    env |= {"no_proxy": "*", **more}
    done = subprocess.run(
        [sys.executable, "-m", "compat.hub"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout, done.stderr.rstrip("\n").split("\n")[-1]


def left(folder):
    """What lies in the folder, but for the lock, which stays."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def expected(folder):
    return "".join(f"{SUMS[name]}  {folder / name}\n" for name in hub.OFFICIAL)


@optional
def test_fetched_once_and_offline_afterwards(server, tmp_path):
    assert command(tmp_path, server.url, HF_TOKEN="hf_secret")[:2] == (0, expected(tmp_path))
    assert all(authorization is None for *_, authorization in server.requests)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == FILES
    assert left(tmp_path) == {*FILES, *(f"{name}.json" for name in FILES)}
    assert all(server.downloads(name) == [None] for name in FILES)
    before = len(server.requests)
    assert command(tmp_path, server.url) == (0, expected(tmp_path), "")
    assert len(server.requests) == before


@optional
def test_a_connection_that_breaks_is_resumed(server, tmp_path):
    server.breaks.add(FIRST)
    assert command(tmp_path, server.url)[:2] == (0, expected(tmp_path))
    assert server.downloads(FIRST) == [None, f"bytes={10 * 2**20}-"]
    assert (tmp_path / FIRST).read_bytes() == FILES[FIRST]


@optional
@pytest.mark.parametrize("change", ["short", "long", "other"])
def test_a_wrong_file_is_refused_and_deleted(server, tmp_path, change):
    body = FILES[FIRST]
    server.served[FIRST] = {"short": body[:-5], "long": body + b"more", "other": body[::-1]}[change]
    status, out, error = command(tmp_path, server.url)
    assert status == 1 and not out and error.startswith("compat.hub: ")
    assert FIRST in error and "give their folder as weights" in error
    assert ("SHA-256" if change == "other" else "size") in error
    assert left(tmp_path) == set()


@optional
def test_a_server_that_publishes_no_sum_is_refused(server, tmp_path):
    server.describe = False
    status, out, error = command(tmp_path, server.url)
    assert status == 1 and not out and "gives no size and SHA-256" in error
    assert not any(server.downloads(name) for name in FILES)


@optional
def test_files_put_there_by_hand(server, tmp_path):
    """The published one is recognized without a download; another is refused, and stays there."""
    (tmp_path / FIRST).write_bytes(FILES[FIRST])
    assert command(tmp_path, server.url)[:2] == (0, expected(tmp_path))
    assert not server.downloads(FIRST)
    (tmp_path / FIRST).write_bytes(FILES[FIRST][:BREAK])
    status, out, error = command(tmp_path, server.url)
    assert status == 1 and not out and "move it away" in error
    assert (tmp_path / FIRST).stat().st_size == BREAK


@optional
def test_two_at_once_download_once(server, tmp_path):
    done = []
    both = [
        threading.Thread(target=lambda: done.append(command(tmp_path, server.url)[:2]))
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert done == [(0, expected(tmp_path))] * 2
    assert all(server.downloads(name) == [None] for name in FILES)


@optional
def test_without_a_network(tmp_path):
    pytest.importorskip("huggingface_hub")
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        status, out, error = command(tmp_path, **more)
        assert status == 1 and not out and error.startswith(f"compat.hub: {tmp_path / FIRST}: ")
        assert "; try again later, or download" in error and "give their folder as weights" in error


@optional
def test_a_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").touch()
    status, out, error = command(tmp_path / "file" / "cache", server.url)
    assert status == 1 and not out and "another folder in DIFF_FOLEY_CACHE" in error


# ------------------------------------------------------------------------------------------------
# without the library


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("DIFF_FOLEY_CACHE", str(tmp_path))


def test_without_the_library_one_line(no_library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compat.hub"])
    assert hub.main() == 1
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1
    assert error.startswith(f"compat.hub: {tmp_path / FIRST}: ")
    assert "pip install huggingface_hub, or download" in error
    assert all(name in error for name in hub.OFFICIAL) and "give their folder as weights" in error
    assert left(tmp_path) == set()


def test_complete_files_need_no_library(no_library, tmp_path):
    for name, body in FILES.items():
        (tmp_path / name).write_bytes(body)
        record = {"size": len(body), "sha256": SUMS[name]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert hub.official() == tmp_path


@pytest.mark.parametrize("record", ["", "[]", "{", '{"size": 4}', '{"size": 5, "sha256": "x"}'])
def test_a_record_that_says_nothing(tmp_path, record):
    (tmp_path / FIRST).write_bytes(b"four")
    (tmp_path / f"{FIRST}.json").write_text(record)
    assert hub.recorded_sum(tmp_path / FIRST) is None


def test_where_the_files_lie(monkeypatch):
    monkeypatch.delenv("DIFF_FOLEY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert hub.cache_folder() == Path("/cache/diff-foley")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_folder() == Path.home() / ".cache" / "diff-foley"
    monkeypatch.setenv("DIFF_FOLEY_CACHE", "~/weights")
    assert hub.cache_folder() == Path.home() / "weights"
