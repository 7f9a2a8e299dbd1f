"""For the findings about sglang-router: the router, and two workers that remember what reached them."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Worker:
    """As much of an SGLang server as the router asks for; `requests` are the bodies that came, in order."""

    def __init__(self, answer):
        self.requests = []
        worker = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def reply(self, status, body, headers=()):
                data = json.dumps(body).encode()
                self.send_response(status)
                for name, value in [("Content-Type", "application/json"), ("Content-Length", len(data)), *headers]:
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self.reply(
                    200,
                    {
                        "status": "ok",
                        "model_path": "m",
                        "served_model_name": "m",
                        "is_generation": True,
                        "tp_size": 1,
                        "dp_size": 1,
                        "data": [{"id": "m", "object": "model"}],
                    },
                )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                worker.requests.append(body)
                self.reply(*answer(self.path, body))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def completion(path, body):
    """A valid answer on either of the OpenAI routes."""
    choice = {"index": 0, "finish_reason": "stop", "text": "ok", "message": {"role": "assistant", "content": "ok"}}
    return 200, {
        "id": "x",
        "object": "completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


class Router:
    """The router with two workers, for a `with` block."""

    def __init__(self, *options, answer=completion):
        self.workers = [Worker(answer), Worker(answer)]
        self.port = free_port()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sglang_router.launch_router",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--prometheus-port",
                str(free_port()),
                "--worker-urls",
                *(w.url for w in self.workers),
                *options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def __enter__(self):
        for _ in range(120):
            try:
                workers = json.loads(self.call("GET", "/workers")[1])["workers"]
                if len(workers) == 2 and all(worker["is_healthy"] for worker in workers):
                    return self
            except (OSError, ValueError, KeyError):
                pass
            time.sleep(0.5)
        self.__exit__()
        raise SystemExit("the router did not take its workers")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        for worker in self.workers:
            worker.server.shutdown()
