"""Serves completions over HTTP with sparse attention, from the standard library; one request at a time.

POST /v1/completions takes {"prompt": ..., "max_tokens": ...} and answers as OpenAI's interface does.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch

from eval_tasks.models import LoadedModel, load_model
from nc_patch import patch_model


def complete(loaded: LoadedModel, request: dict) -> dict:
    """The answer to one request."""
    if not request["prompt"]:
        raise ValueError("the prompt is empty")
    inputs = loaded.tokenizer(str(request["prompt"]), return_tensors="pt").to(loaded.model.device)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        output = loaded.model.generate(**inputs, max_new_tokens=int(request.get("max_tokens", 16)), do_sample=False)
    text = loaded.tokenizer.decode(output[0, length:], skip_special_tokens=True)
    usage = {"prompt_tokens": length, "completion_tokens": output.shape[1] - length}
    return {"object": "text_completion", "choices": [{"index": 0, "text": text}], "usage": usage}


def server(loaded: LoadedModel, port: int) -> HTTPServer:
    """A server of this machine alone; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, answer = 404, {"error": f"no {self.path}: POST to /v1/completions"}
            if self.path == "/v1/completions":
                try:
                    request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    status, answer = 200, complete(loaded, request)
                except (KeyError, TypeError, ValueError) as error:
                    status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    return HTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a directory, a name on the hub, or smollm2")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    patch_model(model.model)
    server(model, arguments.port).serve_forever()
