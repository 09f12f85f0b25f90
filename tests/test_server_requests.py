"""Requests to a server that answers slowly, wrongly, elsewhere or not at all."""
import http.server
import json
import threading
import time

import pytest

from posttrain.rollout.server_requests import ServerRequests


class Slow(http.server.ThreadingHTTPServer):
    "Answers each request after the seconds that it names, with the number that it names, and counts what is going on."
    daemon_threads, request_queue_size = True, 256

    def __init__(self):
        self.open, self.most, self.has_cut = 0, 0, False
        self.paths, self.headers = [], []
        self.connected, self.left = set(), threading.Semaphore(0)
        self.broken, self.lock = threading.Event(), threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def count(self, change):
        with self.lock:
            self.open += change
            self.most = max(self.most, self.open)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.connected.add(self.client_address)

    def finish(self):
        super().finish()
        self.server.left.release()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.paths.append(self.path)
        self.server.headers.append(dict(self.headers))
        if body.get("cuts") and not self.server.has_cut:  # the connection, without an answer, once
            self.server.has_cut = self.close_connection = True
            return
        self.server.count(1)
        if body.get("waits"):  # until the client is gone
            self.server.count(-1)
            self.connection.settimeout(10)
            if self.connection.recv(1) == b"": self.server.broken.set()
            self.close_connection = True
            return
        time.sleep(body.get("seconds", 0))
        self.server.count(-1)
        answer = json.dumps({"n": body["n"]}).encode()
        self.send_response(body.get("status", 200))
        if "to" in body: self.send_header("Location", body["to"])
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args): pass


@pytest.fixture
def server():
    server = Slow()
    yield server
    server.shutdown(), server.server_close()


def number(answer): return answer["n"]


def test_answers_keep_their_order_and_at_most_so_many_are_open(server):
    bodies = [{"n": n, "seconds": .05 * (n % 3)} for n in range(40)]
    asks = ServerRequests(server.url, timeout=5, requests=8)
    assert asks.ask_all("numbers", "/n", bodies, number) == list(range(40))
    assert 2 <= server.most <= 8 and asks.ask_all("numbers", "/n", [], number) == []


def test_patience_is_measured_between_answers(server):
    bodies = [{"n": n, "seconds": .4} for n in range(4)]
    asks = ServerRequests(server.url, timeout=1, requests=1)
    start = time.monotonic()
    assert asks.ask_all("numbers", "/n", bodies, number) == [0, 1, 2, 3]
    assert time.monotonic() - start > 1.5  # longer than the timeout
    with pytest.raises(TimeoutError, match="no answer for 1 s when asked for numbers"):
        asks.ask_all("numbers", "/n", [{"n": 0}, {"n": 1, "seconds": 3}], number)


def test_one_failure_ends_the_others(server):
    bodies = [{"n": 0, "waits": True}, {"n": 1, "seconds": .2, "status": 503}]
    asks = ServerRequests(server.url, timeout=30, requests=2)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="503 Service Unavailable.*resume_from_checkpoint=True"):
        asks.ask_all("numbers", "/n", bodies, number)
    assert server.broken.wait(5) and time.monotonic() - start < 10  # the server sees that nobody waits any more


def test_connections_are_kept_between_calls_and_closed_at_the_end(server):
    asks = ServerRequests(server.url, timeout=5, requests=4)
    for _ in range(3): asks.ask_all("numbers", "/n", [{"n": n, "seconds": .05} for n in range(8)], number)
    assert len(server.connected) == 4 and not server.left.acquire(blocking=False)
    del asks
    assert all(server.left.acquire(timeout=5) for _ in range(4))


def test_an_idle_connection_is_not_used_again(server, monkeypatch):
    "A server that closes idle connections may do so while a request is on its way."
    import httpx

    from posttrain.rollout import server_requests
    monkeypatch.setattr(server_requests, "_KEPT", httpx.Limits(keepalive_expiry=.1))
    asks = ServerRequests(server.url, timeout=5)
    for _ in range(2):
        assert asks.ask_all("numbers", "/n", [{"n": 1}], number) == [1]
        time.sleep(.2)
    assert len(server.connected) == 2


def test_a_connection_that_was_idle_and_is_cut_off_is_made_anew(server):
    "A new one that is cut off is an error: then the server is in trouble."
    asks = ServerRequests(server.url, timeout=5)
    with pytest.raises(RuntimeError, match="broke off when asked for numbers"):
        asks.ask_all("numbers", "/n", [{"n": 1, "cuts": True}], number)
    asks, server.has_cut = ServerRequests(server.url, timeout=5), False
    assert asks.ask_all("numbers", "/n", [{"n": 1}, {"n": 2}], number) == [1, 2]
    assert asks.ask_all("numbers", "/n", [{"n": 3, "cuts": True}, {"n": 4}], number) == [3, 4] and server.has_cut
    server.has_cut = False
    with pytest.raises(RuntimeError, match="broke off when asked for numbers"):  # this connection is in use
        asks.ask_all("numbers", "/n", [{"n": 5}, {"n": 6, "cuts": True}], number)


def test_no_other_address_hears_anything(server, monkeypatch):
    "Not a proxy, and not where an answer points to; and no password is read from a file."
    other = Slow()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.setenv(name, other.url)
    asks = ServerRequests(server.url, timeout=5)
    assert asks.ask("a number", "POST", "/n", {"n": 3}) == {"n": 3}
    with pytest.raises(RuntimeError, match="it answered 307"):
        asks.ask("a number", "POST", "/n", {"n": 3, "status": 307, "to": f"{other.url}/elsewhere"})
    assert not other.paths and all("Authorization" not in headers for headers in server.headers)
    other.shutdown(), other.server_close()


def test_a_path_in_front_and_a_machine_that_listens_everywhere(server):
    asks = ServerRequests(f"{server.url.replace('127.0.0.1', '0.0.0.0')}/behind/", timeout=5)
    assert asks.ask("a number", "POST", "/v1/n", {"n": 1}) == {"n": 1} and server.paths == ["/behind/v1/n"]
    assert asks.ask_all("numbers", "/v1/n", [{"n": 2}], number) == [2] and "0.0.0.0" in repr(asks)


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "127.0.0.1:8000", "http://", "ftp://127.0.0.1"])
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match=f"base_url='{url}': expected something like http://127.0.0.1:8000"):
        ServerRequests(url, timeout=1)
