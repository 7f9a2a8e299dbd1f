"""`kvshare tenants` and `kvshare documents` against a small HTTP server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvshare_sched.tenants.identity import hash_of
from kvshare_sched.tools.cli import main


@pytest.fixture
def server():
    """Refuses documents called `bad`; keeps what came."""
    came = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
            came.append((self.command, self.path, self.headers["Authorization"], body))
            refused = body is not None and "bad" in body["name"]
            reply = {"error": {"message": "too long"}} if refused else {"name": "n", "version": 1, "tokens": 5}
            reply |= {"dropped": "later" not in self.path} if self.command == "DELETE" else {}
            if self.command == "GET":
                reply = {"documents": [reply | {"group": "g", "resident": True}]}
            self.send_response(413 if refused else 200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *args):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", came
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("KVSHARE_ADMIN_KEY", "root")


def test_a_new_key_and_its_hash_belong_together(capsys):
    assert main(["tenants", "key"]) == 0
    key, digest = (line.split(": ")[1].strip() for line in capsys.readouterr().out.splitlines())
    assert hash_of(key) == digest and len(key) > 40


def test_a_file_is_checked(tmp_path, capsys):
    path = tmp_path / "t.toml"
    path.write_text("unknown = 'reject'\n[groups.team]\ntrusted = true\n[tenants.acme]\n")
    assert main(["tenants", "check", str(path)]) == 0
    assert "1 tenants" in (out := capsys.readouterr().out) and "conversations: team" in out
    path.write_text("unknown = 'reject'\n[tenants.acme]\nweight = -1")
    assert main(["tenants", "check", str(path)]) == 1
    assert "tenants.acme.weight" in capsys.readouterr().err


def test_a_folder_is_added_with_progress_and_what_is_refused_is_told(server, tmp_path, capsys):
    url, came = server
    for name in ("a.txt", "bad.txt", "c/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert main(["documents", "--url", url, "add", "g", str(tmp_path), "--system", "S", "--ttl", "9"]) == 1
    told = capsys.readouterr()
    assert "[1/3]" in told.out and "[3/3]" in told.out and "too long" in told.err
    assert [body["text"] for *_, body in came] == ["text of a.txt", "text of bad.txt", "text of c/d.txt"]
    assert came[0][2] == "Bearer root" and came[0][3]["ttl_s"] == 9.0 and came[0][3]["system"] == "S"


def test_list_and_remove(server, capsys):
    url, came = server
    assert main(["documents", "--url", url, "list"]) == main(["documents", "--url", url, "remove", "g", "a b"]) == 0
    assert "5 tokens\tresident" in capsys.readouterr().out
    assert came[1][:2] == ("DELETE", "/kvshare/documents?group=g&name=a+b")
    assert main(["documents", "--url", url, "remove", "g", "later"]) == 1, "a script must not take it for done"
    assert "may still lend it" in capsys.readouterr().out


def test_what_is_missing_is_said(server, tmp_path, monkeypatch, capsys):
    url, _ = server
    assert main(["documents", "--url", url, "add", "g", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["documents", "--url", "http://127.0.0.1:1", "list"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    monkeypatch.delenv("KVSHARE_ADMIN_KEY")
    assert main(["documents", "list"]) == 1
    assert "KVSHARE_ADMIN_KEY" in capsys.readouterr().err
