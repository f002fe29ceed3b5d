"""A door in front of Ollama, so that it takes turns with other programs on one GPU: python examples/ollama_door.py 6144

Clients ask port 11435 in place of 11434. A request for a model waits until so many MiB are free, has them reserved
while it is answered, and Ollama unloads the model after it (`keep_alive: 0`). Other requests go through at once.
The variables OLLAMA and PORT name Ollama's address and the door's port.
"""
import json
import os
import shutil
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cjm_fasthtml_resources import ResourceManager

OLLAMA = os.environ.get("OLLAMA", "http://localhost:11434")
LOADS = ("/api/generate", "/api/chat", "/api/embed", "/api/embeddings")   # what loads a model
manager, one_at_a_time = ResourceManager(app="ollama"), threading.Lock()


class Door(BaseHTTPRequestHandler):
    def do_GET(self) -> None: self.forward()

    def do_DELETE(self) -> None: self.forward()

    def do_POST(self) -> None:
        if self.path not in LOADS: return self.forward()
        wanted = json.loads(self.body())
        with one_at_a_time, manager.reserve(gpu_memory_mb=float(sys.argv[1])):
            self.forward(json.dumps({**wanted, "keep_alive": 0}).encode())

    def body(self) -> bytes: return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def forward(self, body: bytes | None = None) -> None:
        asked = urllib.request.Request(OLLAMA + self.path, body or self.body() or None, method=self.command,
                                       headers={"Content-Type": "application/json"})
        try: answer = urllib.request.urlopen(asked)
        except urllib.error.HTTPError as error: answer = error
        with answer:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.end_headers()
            shutil.copyfileobj(answer, self.wfile)   # as it comes


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(os.environ.get("PORT", "11435"))), Door).serve_forever()
