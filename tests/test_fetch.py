"""fetch.py against a server of every bad habit: what is fetched is whole and checked, or one line says why not."""

import contextlib
import email.utils
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import fetch
from bounds import PATIENCE
from fetch import FetchError

ROOT = Path(__file__).resolve().parent.parent
NAME = "cavp_epoch66.ckpt"
BODY = bytes(i * i % 251 for i in range(300_000))
OTHER = BODY[::-1]
SUM = hashlib.sha256(BODY).hexdigest()
HALF = len(BODY) // 2


class Server:
    """Serves `body` well, but for requests named in `script`: {number of the request from 0, or "all": what it does}.

    status, headers  answered instead, or added         drop, stall   after that many bytes it hangs up, or says no more
    whole            Range is ignored                   length        Content-Length as claimed
    shift            a range begins that much later     total         the file's length as Content-Range claims it
    pause            seconds between blocks of 8 KB     hold          an event to wait for in the middle
    """

    def __init__(self):
        self.body, self.etag, self.script = BODY, '"one"', {}
        self.requests, self.served = [], 0  # the headers of each; bytes of bodies sent
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                number, at = len(server.requests), 0
                server.requests.append(self.headers)
                how = {**server.script.get("all", {}), **server.script.get(number, {})}
                extra = dict(how.get("headers", {}))
                if "status" in how:
                    return self.head(how["status"], {"Content-Length": "0"} | extra)
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
                fits = self.headers["If-Range"] in (None, server.etag)
                status, headers = 200, {"Content-Length": str(how.get("length", len(server.body)))}
                if wanted and fits and not how.get("whole"):
                    at, status = int(wanted[1]) + how.get("shift", 0), 206
                    if at >= len(server.body):
                        return self.head(
                            416,
                            {"Content-Range": f"bytes */{len(server.body)}", "Content-Length": "0"},
                        )
                    total = how.get("total", len(server.body))
                    headers = {
                        "Content-Length": str(len(server.body) - at),
                        "Content-Range": f"bytes {at}-{len(server.body) - 1}/{total}",
                    }
                self.head(status, headers | ({"ETag": server.etag} if server.etag else {}) | extra)
                self.send(server.body[at:][: how.get("drop", how.get("stall"))], how)

            def head(self, status, headers):
                self.send_response(status)
                for key, value in headers.items():
                    if value is not None:
                        self.send_header(key, value)
                self.end_headers()

            def send(self, body, how):
                try:
                    for at in range(0, len(body), 8192):
                        if how.get("hold") and at >= len(body) // 2:
                            how["hold"].wait(PATIENCE)
                        self.wfile.write(body[at : at + 8192])
                        server.served += len(body[at : at + 8192])
                        time.sleep(how.get("pause", 0))
                    if "stall" in how:
                        server.released.wait(PATIENCE)
                except OSError:  # the client has gone
                    pass

            def log_message(self, *_):
                pass

        self.released = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def publish(self, body=BODY, **more):
        """What the hub says, on every answer."""
        tag = hashlib.sha256(body).hexdigest()
        return {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{tag}"', **more}

    def close(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.002)
    monkeypatch.setenv("no_proxy", "*")
    for key in ("DIFF_FOLEY_CACHE", "DIFF_FOLEY_URL", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)


def get(server, folder, **more):
    return fetch.fetch(NAME, folder, server.url, progress=False, **more)


def refusal(server, folder):
    """The one line that it ends in."""
    with pytest.raises(FetchError) as caught:
        get(server, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sleep_by(monkeypatch, do):
    """fetch.py waits by calling `do`; the server's own clock runs on."""
    monkeypatch.setattr(fetch, "time", SimpleNamespace(sleep=do, time=time.time))


def left(folder):
    """What lies there, but for the lock."""
    return {path.name for path in folder.iterdir()} - {".fetch.lock"}


def ranges(server):
    return [headers["Range"] for headers in server.requests]


DONE, HALFWAY = {NAME, f"{NAME}.json"}, {f"{NAME}.part", f"{NAME}.part.json"}


# ---------------------------------------------------------------------------------------------------------------------
# as it should be


def test_plain(server, tmp_path, capsys):
    server.script = {"all": {"headers": server.publish()}}
    path = get(server, tmp_path / "a" / "b")  # folders that are not there yet
    assert path == tmp_path / "a" / "b" / NAME and path.read_bytes() == BODY
    assert left(path.parent) == DONE and len(server.requests) == 1
    assert json.loads(Path(f"{path}.json").read_text()) == {"size": len(BODY), "sha256": SUM}
    assert capsys.readouterr() == ("", "") and server.requests[0]["Accept-Encoding"] == "identity"


def test_offline_afterwards(server, tmp_path):
    fetch.official(folder=tmp_path, url=server.url, progress=False)
    assert left(tmp_path) == {f"{name}{end}" for name in fetch.OFFICIAL for end in ("", ".json")}
    server.close()
    server.requests.clear()
    (tmp_path / ".fetch.lock").unlink()
    assert fetch.official(folder=tmp_path, url=server.url, progress=False) == tmp_path
    assert (
        not server.requests and not (tmp_path / ".fetch.lock").exists()
    )  # a folder that cannot be written will do


def test_bytes_are_on_the_disk_before_they_have_the_name(server, tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        fetch.os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size) or fsync(fd)
    )
    monkeypatch.setattr(
        fetch.os, "replace", lambda a, b: calls.append(Path(b).name) or replace(a, b)
    )
    get(server, tmp_path)
    assert calls[-3:] == [len(BODY), f"{NAME}.json", NAME]


def test_nothing_is_asked_though_the_server_is_there(server, tmp_path):
    get(server, tmp_path)
    server.body = OTHER
    assert get(server, tmp_path).read_bytes() == BODY and len(server.requests) == 1


def test_where_it_goes_and_comes_from(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / ".cache" / "diff-foley"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert fetch.cache_folder() == tmp_path / "x" / "diff-foley"
    monkeypatch.setenv("DIFF_FOLEY_CACHE", str(tmp_path / "y"))
    assert fetch.cache_folder() == tmp_path / "y"
    monkeypatch.setenv("DIFF_FOLEY_URL", f"{server.url}/")
    assert fetch.fetch(NAME, progress=False) == tmp_path / "y" / NAME
    assert fetch.HUB == "https://huggingface.co/SimianLuo/Diff-Foley/resolve/main/diff_foley_ckpt"


def test_redirect_tells_size_and_sum(server, tmp_path):
    """As the hub does it: its tag on the redirect; the store's ETag is of the same form and another sum."""
    server.etag = f'"{hashlib.sha256(b"a hash of the store").hexdigest()}"'
    there = server.publish(Location=f"{server.url}/store", **{"ETag": None})
    server.script = {
        0: {"status": 302, "headers": there},
        1: {"drop": HALF},
        2: {"status": 302, "headers": there},
    }
    assert get(server, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, None, f"bytes={HALF}-", f"bytes={HALF}-"]
    assert server.requests[3]["If-Range"] == server.etag and server.served == len(BODY)


def test_redirect_with_another_sum_is_believed(server, tmp_path):
    there = server.publish(OTHER, Location=f"{server.url}/store")
    server.script = {0: {"status": 302, "headers": there}, 2: {"status": 302, "headers": there}}
    assert "published SHA-256" in refusal(server, tmp_path)
    assert left(tmp_path) == set() and len(server.requests) == 4


def test_store_s_own_etag_is_not_taken_for_a_sum(server, tmp_path):
    server.etag = f'"{"0" * 64}"'
    assert get(server, tmp_path).read_bytes() == BODY


def test_command_line(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFF_FOLEY_URL", server.url)
    assert fetch.main(["--eval", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{SUM}  {tmp_path / name}" for name in (*fetch.OFFICIAL, "eval_classifier.ckpt")
    ]
    server.script = {"all": {"status": 404}}
    assert fetch.main(["--out", str(tmp_path / "new")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fetch.py: ") and err.count("\n") == 1


def test_imports_fast():
    code = "import sys, fetch; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'data')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# broken downloads go on


@pytest.mark.parametrize("published", [True, False])
def test_resumes_where_the_connection_dropped(server, tmp_path, published):
    server.script = {
        "all": {"headers": server.publish() if published else {}},
        0: {"drop": HALF},
        1: {"drop": 40_000},
    }
    server.script[0] |= server.script["all"]
    server.script[1] |= server.script["all"]
    assert get(server, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, f"bytes={HALF}-", f"bytes={HALF + 40_000}-"]
    assert server.requests[1]["If-Range"] == '"one"' and server.served == len(BODY)
    assert left(tmp_path) == DONE


def test_resumes_after_silence(server, tmp_path, monkeypatch):
    """The first connection falls silent and is given up; the second has all the time that a busy machine takes."""
    monkeypatch.setattr(fetch, "TIMEOUT", 2.0)
    sleep_by(monkeypatch, lambda _: monkeypatch.setattr(fetch, "TIMEOUT", PATIENCE))
    server.script = {0: {"stall": HALF}}
    assert get(server, tmp_path).read_bytes() == BODY
    assert ranges(server) == [
        None,
        f"bytes={HALF}-",
    ]  # not a byte of what came before the silence is lost


def test_any_progress_counts(server, tmp_path):
    """Far more failures than TRIES, each a little further on."""
    server.script = {k: {"drop": 20_000} for k in range(14)}
    assert (
        get(server, tmp_path).read_bytes() == BODY and len(server.requests) == 15 > 2 * fetch.TRIES
    )


def test_no_progress_ends(server, tmp_path):
    server.script = {0: {"drop": HALF}} | {k: {"drop": 0} for k in range(1, 50)}
    assert f"after {HALF} of {len(BODY)} bytes" in refusal(server, tmp_path)
    assert len(server.requests) == 1 + fetch.TRIES - 1 and left(tmp_path) == HALFWAY
    server.script = {}
    assert get(server, tmp_path).read_bytes() == BODY and ranges(server)[-1] == f"bytes={HALF}-"


def test_starting_over_and_over_is_no_progress(server, tmp_path):
    server.script = {k: {"whole": True, "drop": HALF - 1000 * (k % 2)} for k in range(50)}
    assert "connection closed" in refusal(server, tmp_path) and len(server.requests) == fetch.TRIES


def test_file_shorter_than_the_part(server, tmp_path):
    get_half(server, tmp_path)
    server.body = OTHER[:1000]
    assert get(server, tmp_path).read_bytes() == OTHER[:1000] and ranges(server) == [
        None,
        f"bytes={HALF}-",
        None,
    ]


def test_range_ignored(server, tmp_path):
    server.script = {0: {"drop": HALF}, 1: {"whole": True}}
    assert get(server, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, f"bytes={HALF}-"] and server.served == HALF + len(BODY)


def test_file_changed_between_attempts(server, tmp_path, monkeypatch):
    server.script = {0: {"drop": HALF}}

    def change(_):
        server.body, server.etag = OTHER, '"two"'

    sleep_by(monkeypatch, change)
    assert get(server, tmp_path).read_bytes() == OTHER
    assert server.requests[1]["If-Range"] == '"one"' and len(server.requests) == 2


def test_file_changed_and_the_server_does_not_know_if_range(server, tmp_path):
    """It continues with bytes of another file: its ETag gives it away."""
    get_half(server, tmp_path)
    server.body, server.script = OTHER, {1: {"headers": {"ETag": '"two"'}}}
    assert get(server, tmp_path).read_bytes() == OTHER
    assert ranges(server) == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize(
    "habit",
    [
        {"shift": 1},
        {"shift": -1},
        {"shift": -HALF},
        {"total": 300_001},
        {"headers": {"Content-Range": "?"}},
    ],
)
def test_continuation_that_does_not_fit_is_never_spliced(server, tmp_path, habit):
    get_half(server, tmp_path)
    server.script = {1: habit}
    assert get(server, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, f"bytes={HALF}-"] + [None] * (habit != {"shift": -HALF})


@pytest.mark.parametrize("etag", [None, 'W/"one"'])
def test_without_a_strong_tag_or_a_sum_it_starts_over(server, tmp_path, etag):
    server.etag, server.script = etag, {0: {"drop": HALF}}
    if etag is None:  # nor in a later run
        get_half(server, tmp_path)
    assert get(server, tmp_path).read_bytes() == BODY and ranges(server)[-1] is None


def test_published_sum_alone_is_enough_to_go_on(server, tmp_path):
    server.etag, server.script = None, {"all": {"headers": server.publish()}, 0: {"drop": HALF}}
    assert get(server, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, f"bytes={HALF}-"] and server.requests[1]["If-Range"] is None


def test_published_sum_changed_between_attempts(server, tmp_path):
    server.etag = None
    get_half(server, tmp_path, server.publish())
    server.body, server.script = OTHER, {"all": {"headers": server.publish(OTHER)}}
    assert get(server, tmp_path).read_bytes() == OTHER and ranges(server) == [
        None,
        f"bytes={HALF}-",
        None,
    ]


def get_half(server, folder, headers=None):
    """An earlier run that gave up halfway."""
    server.script = {0: {"drop": HALF, "headers": headers or {}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "TRIES", 1)
        refusal(server, folder)
    assert left(folder) == HALFWAY and (folder / f"{NAME}.part").stat().st_size == HALF


def test_part_that_is_complete_already(server, tmp_path):
    """Killed between the last byte and the new name: checked, and nothing is fetched again."""
    (tmp_path / f"{NAME}.part").write_bytes(BODY)
    note = {"size": len(BODY), "etag": None, "sha256": SUM}
    (tmp_path / f"{NAME}.part.json").write_text(json.dumps(note))
    assert (
        get(server, tmp_path).read_bytes() == BODY
        and not server.requests
        and left(tmp_path) == DONE
    )


@pytest.mark.parametrize("note", ["", "{}", '{"size": 5, "etag": "\\"one\\"", "sha256": null}'])
def test_part_of_unknown_origin_is_dropped(server, tmp_path, note):
    (tmp_path / f"{NAME}.part").write_bytes(OTHER[:1000])
    (tmp_path / f"{NAME}.part.json").write_text(note)
    assert get(server, tmp_path).read_bytes() == BODY and ranges(server) == [None]


# ---------------------------------------------------------------------------------------------------------------------
# sizes and sums that contradict each other


def test_length_too_large(server, tmp_path):
    server.script = {"all": {"length": len(BODY) + 1000}}
    refusal(server, tmp_path)
    assert NAME not in left(tmp_path) and len(server.requests) <= fetch.TRIES


@pytest.mark.parametrize("known", ["size", "sum"])
def test_length_too_small(server, tmp_path, known):
    told = server.publish()
    told.pop("X-Linked-ETag" if known == "size" else "X-Linked-Size")
    server.script = {"all": {"length": HALF, "headers": told}}
    line = refusal(server, tmp_path)
    assert ("published SHA-256" if known == "sum" else f"hub has {len(BODY)} bytes") in line
    assert left(tmp_path) == set() and len(server.requests) == 2


def test_hub_s_size_contradicts(server, tmp_path):
    server.script = {"all": {"headers": server.publish() | {"X-Linked-Size": str(len(BODY) + 1)}}}
    assert f"hub has {len(BODY) + 1} bytes" in refusal(server, tmp_path)
    assert left(tmp_path) == set() and len(server.requests) == 2 and server.served < 2 * len(BODY)


def test_unknown_length(server, tmp_path):
    server.script = {"all": {"headers": {"Content-Length": None}}}
    assert "not a file" in refusal(server, tmp_path) and left(tmp_path) == set()


def test_web_page_is_not_a_checkpoint(server, tmp_path):
    server.script = {"all": {"headers": {"Content-Type": "text/html; charset=utf-8"}}}
    assert "a page" in refusal(server, tmp_path) and left(tmp_path) == set()


def test_published_sum_differs(server, tmp_path):
    server.script = {"all": {"headers": server.publish(OTHER)}}
    line = refusal(server, tmp_path)
    assert "published SHA-256" in line and "--weights DIR" in line
    assert left(tmp_path) == set() and ranges(server) == [None, None]  # one fresh retry


def test_damaged_once(server, tmp_path, monkeypatch, capsys):
    server.body, server.script = OTHER, {"all": {"headers": server.publish()}}

    def mend(_):
        server.body = BODY

    sleep_by(monkeypatch, mend)
    assert get(server, tmp_path).read_bytes() == BODY
    assert left(tmp_path) == DONE and capsys.readouterr().err.count("\n") == 1


def test_damaged_part_is_found_by_the_sum(server, tmp_path):
    """The bytes of an earlier run are hashed too."""
    server.script = {"all": {"headers": server.publish()}}
    (tmp_path / f"{NAME}.part").write_bytes(b"x" + BODY[1:HALF])
    note = {"size": len(BODY), "etag": '"one"', "sha256": SUM}
    (tmp_path / f"{NAME}.part.json").write_text(json.dumps(note))
    assert get(server, tmp_path).read_bytes() == BODY and ranges(server) == [f"bytes={HALF}-", None]


def test_no_published_sum_is_recorded_and_said(server, tmp_path, capsys):
    path = get(server, tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "publishes no sum" in err and SUM in err
    assert json.loads(Path(f"{path}.json").read_text())["sha256"] == SUM


@pytest.mark.parametrize("published", [True, False])
def test_recorded_sum_differs(server, tmp_path, published, capsys):
    get(server, tmp_path).unlink()
    server.body, server.etag = OTHER, '"two"'
    server.script = {"all": {"headers": server.publish(OTHER) if published else {}}}
    line = refusal(server, tmp_path)
    assert (
        SUM in line
        and f"delete {tmp_path / NAME}.json" in line
        and left(tmp_path) == {f"{NAME}.json"}
    )
    (tmp_path / f"{NAME}.json").unlink()  # the remedy works
    assert get(server, tmp_path).read_bytes() == OTHER


@pytest.mark.parametrize("now", [BODY[:1000], b"", BODY + b"more"])
def test_cached_file_of_another_size_is_fetched_anew(server, tmp_path, now, capsys):
    get(server, tmp_path).write_bytes(now)
    capsys.readouterr()
    assert (
        get(server, tmp_path).read_bytes() == BODY
        and len(server.requests) == 2
        and left(tmp_path) == DONE
    )
    err = capsys.readouterr().err
    assert "fetching it anew" in err and err.count("\n") == 1


def test_bar(server, tmp_path):
    """On a terminal: bytes, from where it goes on, to the end."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    get_half(server, tmp_path)
    server.script = {1: {"pause": 0.02}}
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 120))
    with start(server, tmp_path, stderr=its) as process:
        os.close(its)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while block := os.read(ours, 4096):
                shown += block
    os.close(ours)
    shares = [int(share) for share in re.findall(rb"(\d+)%", shown)]
    assert (
        process.returncode == 0
        and shares[-1] == 100
        and min(share for share in shares if share) >= 50
    )
    assert b"300k/300k" in shown and NAME.encode() in shown


def test_file_put_there_by_hand(server, tmp_path, capsys):
    (tmp_path / NAME).write_bytes(OTHER)
    assert get(server, tmp_path).read_bytes() == OTHER and not server.requests
    err = capsys.readouterr().err
    assert (
        "as it lies here" in err
        and hashlib.sha256(OTHER).hexdigest() in err
        and left(tmp_path) == DONE
    )
    get(server, tmp_path)
    assert capsys.readouterr().err == ""  # said once


# ---------------------------------------------------------------------------------------------------------------------
# servers and networks that refuse


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refused_at_once(server, tmp_path, status):
    server.script = {"all": {"status": status}}
    line = refusal(server, tmp_path)
    assert f"{server.url}/{NAME}" in line and str(status) in line and "--weights DIR" in line
    assert len(server.requests) == 1 and left(tmp_path) == set()


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_too_many_requests(server, tmp_path, form, monkeypatch):
    waits = []
    sleep_by(monkeypatch, waits.append)
    later = email.utils.formatdate(time.time() + 20, usegmt=True)
    server.script = {
        0: {"status": 429, "headers": {"Retry-After": "20" if form == "seconds" else later}}
    }
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(waits) == 1 and 18 < waits[0] <= 20


@pytest.mark.parametrize(
    "value", [None, "soon", "", "-5", "²", "9" * 5000, "Mon, 01 Jan 1990 00:00:00 GMT"]
)
def test_odd_retry_after(value):
    assert fetch.retry_after(value) <= 0


def test_unavailable_for_ever(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(fetch, "BACKOFF", 1.0)
    sleep_by(monkeypatch, waits.append)
    server.script = {
        "all": {"status": 503},
        3: {"status": 503, "headers": {"Retry-After": "86400"}},
    }
    line = refusal(server, tmp_path)
    assert "503" in line and "--weights DIR" in line and left(tmp_path) == set()
    assert len(server.requests) == fetch.TRIES and waits == [1, 2, 4, fetch.LONGEST, 16]


def test_no_network(tmp_path):
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(FetchError, match="no connection.*refused.*--weights DIR") as caught:
            fetch.fetch(NAME, tmp_path, url, progress=False)
    assert "\n" not in str(caught.value) and left(tmp_path) == set()


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/x", "file:///etc", "here", "http://[", "http://a:b/", "http://a b/"]
)
def test_only_web_addresses(tmp_path, url):
    with pytest.raises(FetchError, match="DIFF_FOLEY_URL an address that begins with https://"):
        fetch.fetch(NAME, tmp_path, url, progress=False)
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    "old, new, fine",
    [
        ("https://a/x", "https://b/x", True),
        ("http://a/x", "http://b/x", True),
        ("http://a/x", "https://b/x", True),
        ("https://a/x", "http://b/x", False),
        ("http://a/x", "ftp://b/x", False),
        ("http://a/x", "file:///etc/x", False),
    ],
)
def test_redirects_stay_safe(old, new, fine):
    def redirect():
        request = urllib.request.Request(old, headers={"Range": "bytes=5-"})
        return fetch.Redirects().redirect_request(request, None, 302, "", {}, new)

    if fine:
        assert redirect().full_url == new and redirect().headers["Range"] == "bytes=5-"
    else:
        with pytest.raises(FetchError, match="unsafe"):
            redirect()


def test_unsafe_redirect_ends_in_one_line(server, tmp_path):
    server.script = {"all": {"status": 302, "headers": {"Location": "ftp://127.0.0.1/x"}}}
    assert "unsafe" in refusal(server, tmp_path) and left(tmp_path) == set()


def test_redirects_in_circles(server, tmp_path):
    server.script = {"all": {"status": 302, "headers": {"Location": f"{server.url}/{NAME}"}}}
    assert "302" in refusal(server, tmp_path) and left(tmp_path) == set()


# ---------------------------------------------------------------------------------------------------------------------
# disks


def test_too_little_space(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage(10**6, 10**6, len(BODY) - 1))
    assert "free some space" in refusal(server, tmp_path) and left(tmp_path) == set()
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage(10**6, 10**6, len(BODY)))
    assert get(server, tmp_path).read_bytes() == BODY


def test_disk_full_in_the_middle(server, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, hard))
    try:
        line = refusal(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free some space" in line and left(tmp_path) == HALFWAY
    assert get(server, tmp_path).read_bytes() == BODY and ranges(server) == [None, f"bytes={HALF}-"]


def test_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    line = refusal(server, tmp_path / "file")
    assert "DIFF_FOLEY_CACHE" in line and "[Errno" not in line and not server.requests


# ---------------------------------------------------------------------------------------------------------------------
# processes


def start(server, folder, stderr=subprocess.PIPE):
    """`python fetch.py` for one file in a process of its own."""
    code = f"import sys, fetch; fetch.OFFICIAL = ({NAME!r},); sys.exit(fetch.main(['--out', sys.argv[1]]))"
    env = {**os.environ, "DIFF_FOLEY_URL": server.url}
    # whatever started the tests in the background may have left Ctrl-C ignored, which children inherit
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(what):
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted(server, tmp_path, sent):
    server.script = {0: {"stall": HALF}}  # so that it cannot be done before it is stopped
    part, final = tmp_path / f"{NAME}.part", tmp_path / NAME
    with start(server, tmp_path) as process:
        wait_for(lambda: part.exists() and part.stat().st_size > 50_000)
        assert not final.exists()
        process.send_signal(sent)
        out, err = process.communicate(timeout=PATIENCE)
    assert out == "" and left(tmp_path) == HALFWAY
    if sent == signal.SIGINT:
        assert (
            process.returncode == 130
            and err == "fetch.py: stopped; the same command goes on from here\n"
        )
    size = part.stat().st_size
    assert 50_000 < size < len(BODY)
    assert get(server, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, f"bytes={size}-"] and left(tmp_path) == DONE


def test_two_at_once(server, tmp_path):
    pytest.importorskip("fcntl")
    hold = threading.Event()
    server.script = {0: {"hold": hold}}
    with start(server, tmp_path) as first:
        wait_for(lambda: server.served)
        with start(server, tmp_path) as second:
            assert "waiting for another process" in second.stderr.readline()
            assert not (tmp_path / NAME).exists()
            hold.set()
            assert second.wait(PATIENCE) == 0 and first.wait(PATIENCE) == 0
            assert first.stdout.read() == second.stdout.read() == f"{SUM}  {tmp_path / NAME}\n"
    assert (
        (tmp_path / NAME).read_bytes() == BODY
        and len(server.requests) == 1
        and left(tmp_path) == DONE
    )


def test_second_goes_on_where_the_first_was_killed(server, tmp_path):
    pytest.importorskip("fcntl")
    server.script = {0: {"stall": HALF}}
    with start(server, tmp_path) as first:
        wait_for(lambda: server.served == HALF)
        with start(server, tmp_path) as second:
            assert "waiting for another process" in second.stderr.readline()
            first.kill()
            assert second.wait(PATIENCE) == 0
            assert second.stdout.read() and first.wait(PATIENCE) != 0
    assert (tmp_path / NAME).read_bytes() == BODY and left(tmp_path) == DONE
