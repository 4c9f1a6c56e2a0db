"""An MCP server on its standard input and output, without the SDK: it starts at once, and misbehaves when asked to."""

import json
import os
import sys
import threading
import time

OBJECT = {"type": "object"}
NUMBER = {"type": "number"}
TOOLS = [
    {"name": "echo", "description": "Says it \u202e\u001b[2Jagain.",
     "inputSchema": {**OBJECT, "properties": {"text": {"type": "string", "pattern": "^(?=a)(a+)+!?$"}},
                                     "required": ["text"]}},
    {"name": "fail", "inputSchema": OBJECT},
    {"name": "wait", "inputSchema": {**OBJECT, "properties": {"seconds": NUMBER}}},
    {"name": "block", "inputSchema": OBJECT},
    {"name": "much", "inputSchema": {**OBJECT, "properties": {"size": {"type": "integer"}}}},
    {"name": "die", "inputSchema": OBJECT},
    {"name": "nonsense", "inputSchema": OBJECT},
    {"name": "log", "inputSchema": OBJECT},
    {"name": "key", "inputSchema": OBJECT},
    {"name": "bad name\u202e", "inputSchema": OBJECT},
    {"name": "slow", "inputSchema": OBJECT,
     "outputSchema": {**OBJECT, "properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}}},
    {"name": "odd", "inputSchema": {**OBJECT, "$ref": "http://127.0.0.1:9/schema"}},
]  # fmt: skip


def say(message: dict) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def text(number: int, said: str, *, failed: bool = False) -> None:
    say({"id": number, "result": {"content": [{"type": "text", "text": said}], "isError": failed}})


def call(number: int, params: dict) -> None:
    arguments = params.get("arguments") or {}
    match params["name"]:
        case "echo":
            text(number, arguments["text"])
        case "fail":
            text(number, "it broke", failed=True)
        case "wait":
            threading.Timer(arguments["seconds"], text, (number, "waited")).start()
        case "block":
            time.sleep(600)
        case "much":
            text(number, "x" * arguments["size"])
        case "die":
            os._exit(3)
        case "nonsense":
            print('}{ not JSON\n{"jsonrpc":"2.0","id":"x","result":7}', flush=True)
            text(number, "sorry")
        case "slow":
            answer = {"x": "a" * 60 + "!"}
            say({"id": number, "result": {"content": [], "structuredContent": answer}})
        case "log":
            print("x" * 1_000_000, file=sys.stderr, flush=True)
            text(number, "logged")
        case "key":
            text(number, params["_meta"]["swarmx/idempotency-key"])


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        number = message.get("id")
        match message.get("method"):
            case "initialize":
                version = message["params"]["protocolVersion"]
                information = {"name": "pipes", "version": "1"}
                say({"id": number, "result": {"protocolVersion": version, "capabilities": {"tools": {}},
                                              "serverInfo": information}})  # fmt: skip
            case "tools/list":
                say({"id": number, "result": {"tools": TOOLS}})
            case "tools/call":
                call(number, message["params"])
            case _ if number is not None:
                say({"id": number, "error": {"code": -32601, "message": "no such method"}})


main()
