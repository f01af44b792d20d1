"""core.downloads: a URL becomes a whole, checked file once, whatever the network does."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.downloads import cache_path, local_file, sha256_of
from core.errors import UserError

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site(ThreadingHTTPServer):
    """One file on the loopback interface, with switches for what can go wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.headers = {"ETag": '"first"'}
        self.status = 200
        self.ranges = True
        self.stops_after = None
        self.asked = []

    def url(self, path="weights/net%20work.pkl?token=1"):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        wanted = self.headers.get("Range")
        site.asked.append(wanted)
        start = self._start(wanted)
        if start is not None and start >= len(site.content):
            return self.send_error(416)
        body = site.content[start or 0 :]
        self.send_response(site.status if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/*")
        for name, value in site.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: site.stops_after])

    def _start(self, wanted):
        same = self.headers.get("If-Range") == self.server.headers.get("ETag")
        if wanted is None or not same or not self.server.ranges:
            return None
        return int(wanted.removeprefix("bytes=").rstrip("-"))

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch, tmp_path):
    """Give a running site, with an empty cache and no proxy in between."""
    monkeypatch.setenv("GAN_REFINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Site() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def interrupted(site, after=1000):
    """Let one download break off, then mend the site."""
    site.stops_after = after
    with pytest.raises(UserError, match=f"ended after {after} of {len(CONTENT)} bytes"):
        local_file(site.url())
    site.stops_after = None


def test_an_existing_path_is_returned_as_is(tmp_path):
    """A file that is there is itself, given as text or as a Path."""
    path = tmp_path / "a.pkl"
    path.write_bytes(CONTENT)
    assert local_file(path) == local_file(str(path), sha256=SHA256.upper()) == path


def test_a_missing_path_names_its_neighbours(tmp_path):
    """A misspelt name gives the names near it."""
    (tmp_path / "stylegan2-cifar10.pkl").touch()
    with pytest.raises(UserError, match=r"stylegan2-cifar\.pkl\. Near it: stylegan2-cifar10\.pkl"):
        local_file(tmp_path / "stylegan2-cifar.pkl")


def test_a_missing_folder_is_named(tmp_path):
    """Where not even the folder exists, the sentence says so."""
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        local_file(tmp_path / "nowhere" / "a.pkl")


def test_other_schemes_are_refused():
    """Only http and https are downloaded."""
    with pytest.raises(UserError, match="s3://bucket/a is neither a path nor a URL"):
        local_file("s3://bucket/a")


def test_a_path_of_another_checksum_is_refused_and_stays(tmp_path):
    """A user's own file is never moved, whatever it hashes to."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=f"expected {SHA256}"):
        local_file(path, sha256=SHA256)
    assert path.exists()


def test_a_folder_has_no_checksum(tmp_path):
    """A checksum of a folder is refused in a sentence."""
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        local_file(tmp_path, sha256=SHA256)


def test_a_url_is_downloaded_once(site):
    """The second call finds the whole file and asks the server nothing."""
    path = local_file(site.url(), sha256=SHA256)
    assert path == local_file(site.url(), sha256=SHA256)
    assert path.read_bytes() == CONTENT and len(site.asked) == 1
    assert path.name.endswith("-net_work.pkl")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    """GAN_REFINE_CACHE wins over XDG_CACHE_HOME, which wins over the home folder."""
    for name in ("GAN_REFINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache_path("http://a/b").parent) == "/home/somebody/.cache/gan-refine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_path("http://a/b").parent == tmp_path / "xdg" / "gan-refine"
    monkeypatch.setenv("GAN_REFINE_CACHE", str(tmp_path / "own"))
    assert cache_path("http://a/b").parent == tmp_path / "own"


def test_urls_of_one_file_name_do_not_collide():
    """Two networks that are both called model.pkl have two places in the cache."""
    assert cache_path("http://a/1/model.pkl") != cache_path("http://a/2/model.pkl")


def test_a_broken_download_is_resumed(site):
    """What has arrived is not asked for again, and the whole is the file."""
    interrupted(site)
    assert local_file(site.url()).read_bytes() == CONTENT
    assert site.asked == [None, "bytes=1000-"]


def test_a_server_without_ranges_starts_again(site):
    """A plain 200 to a range request replaces what had arrived."""
    interrupted(site)
    site.ranges = False
    assert local_file(site.url()).read_bytes() == CONTENT


def test_half_of_an_older_file_is_not_continued(site):
    """A file that changed between two attempts is fetched whole."""
    interrupted(site)
    site.content, site.headers = CONTENT[::-1], {"ETag": '"second"'}
    assert local_file(site.url()).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_half_a_file_without_a_mark_is_not_continued(site, headers):
    """Where the server gives nothing that tells two versions apart, a download starts again."""
    site.headers = headers
    interrupted(site)
    assert local_file(site.url()).read_bytes() == CONTENT
    assert site.asked == [None, None]


def test_a_download_that_was_whole_but_not_renamed_ends(site):
    """A range beyond the end is answered 416; the file is then fetched from its start."""
    interrupted(site, after=len(CONTENT) - 1)
    with cache_path(site.url()).with_name(cache_path(site.url()).name + ".part").open("ab") as part:
        part.write(CONTENT[-1:])
    assert local_file(site.url()).read_bytes() == CONTENT
    assert site.asked == [None, f"bytes={len(CONTENT)}-", None]


def test_a_wrong_checksum_sets_the_file_aside(site):
    """A download of another hash is refused, kept as .rejected, and fetched again next time."""
    wrong = hashlib.sha256(b"").hexdigest()
    path = cache_path(site.url())
    with pytest.raises(UserError, match=f"has SHA-256 {SHA256}, expected {wrong}"):
        local_file(site.url(), sha256=wrong)
    assert not path.exists()
    assert sha256_of(path.with_name(path.name + ".rejected")) == SHA256
    assert local_file(site.url(), sha256=SHA256) == path


@pytest.mark.parametrize("status", [404, 500])
def test_a_refusing_server_says_where_the_file_belongs(site, status):
    """An HTTP error names the status and the place in the cache, and leaves no file there."""
    site.status, site.content = status, b"no"
    with pytest.raises(UserError) as error:
        local_file(site.url())
    assert str(status) in str(error.value) and str(cache_path(site.url())) in str(error.value)
    assert not cache_path(site.url()).exists()


def test_an_unreachable_server_says_where_the_file_belongs(site):
    """Nothing listens: the sentence has the URL, the place in the cache and the other way out."""
    site.server_close()
    with pytest.raises(UserError) as error:
        local_file(site.url())
    for part in (site.url(), str(cache_path(site.url())), "the path of a copy"):
        assert part in str(error.value)


def test_a_web_page_is_not_taken_for_the_file(site):
    """A login or error page sent with status 200 does not reach the cache."""
    site.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(UserError, match="a web page"):
        local_file(site.url())
    assert not cache_path(site.url()).exists()


def test_downloads_at_once_fetch_once(site):
    """Eight callers of one URL make one request and all get the whole file."""
    found = []
    callers = [
        threading.Thread(target=lambda: found.append(local_file(site.url()).read_bytes()))
        for _ in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [CONTENT] * 8 and len(site.asked) == 1
