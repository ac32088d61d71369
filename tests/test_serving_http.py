"""The endpoint as its clients see it: a real server process on a loopback port.

The model is a Llama whose layers pass everything through and whose head answers each word with the next one in a list,
so every reply is known beforehand.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gymtrl.errors import RunError, UserError
from gymtrl.serving.app import MAX_BODY_BYTES
from gymtrl.serving.chat import prompt_ids
from gymtrl.serving.server import _listening

CALL = '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>'
BROKEN = '<tool_call>{"name":</tool_call>'
SHOWN = '<tool_call>{"name":"add","arguments":{}}</tool_call>'
WORDS = ["<unk>", "<end>", *(f"w{i}" for i in range(50)), "call", CALL, "break", BROKEN, "T:add", SHOWN]
WORDS += ["<note>", "noted"]
TEMPLATE = (
    "{% for tool in tools or [] %}T:{{ tool.function.name }} {% endfor %}"
    "{% for m in messages if m.role != 'developer' %}{{ m.content }} "
    '{% for c in m.tool_calls or [] %}<tool_call>{"name":"{{ c.function.name }}","arguments":'
    "{{ c.function.arguments | tojson }}}</tool_call> {% endfor %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def make_model(folder: Path) -> Path:
    size = 64
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<note>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=60_000,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    follows = {i: i + 1 for i in range(2, 51)} | {51: 2, 52: 53, 53: 1, 54: 55, 55: 1, 59: 58, 58: 53}
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for word, successor in follows.items():
            model.lm_head.weight[successor, word] = 4.0
    model.save_pretrained(folder)
    return folder


def environment() -> dict[str, str]:
    source = str(Path(__file__).parent.parent / "src")
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "gymtrl.serving", str(model), "--threads", "2", *options]


@contextmanager
def running(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    ready = model.parent / f"ready-{time.monotonic_ns()}.json"
    process = subprocess.Popen(
        command(model, "--ready-file", str(ready), *options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, json.loads(ready.read_text())
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "chain")


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[httpx.Client]:
    with running(model) as (_, ready), httpx.Client(base_url=ready["url"], timeout=60) as http:
        yield http


def ask(http: httpx.Client, text: Any = "w0", **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 3} | fields
    return http.post("/v1/chat/completions", json=body)


def test_reply(client: httpx.Client) -> None:
    body = ask(client, "w7 w0", model="chain").json()
    assert body["object"] == "chat.completion" and body["model"] == "chain"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "w1 w2 w3"}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 3, 5)
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0


def test_token_ids_and_log_probs(client: httpx.Client) -> None:
    fields = {"logprobs": True, "top_logprobs": 0, "return_tokens_as_token_ids": True}
    choice = ask(client, "call", max_tokens=9, **fields).json()["choices"][0]
    message, content = choice["message"], choice["logprobs"]["content"]
    assert message["content"] == CALL and choice["finish_reason"] == "stop"  # no tools offered: just text
    assert message["prompt_token_ids"] == [52]
    assert message["generation_token_ids"] == [53, 1]  # the end of the reply included
    assert message["generation_log_probs"] == [entry["logprob"] for entry in content]
    assert [entry["token"] for entry in content] == ["token_id:53", "token_id:1"]
    assert all(-1e-3 < value <= 0 for value in message["generation_log_probs"])
    plain = ask(client, "w3", logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in plain] == ["w4", "w5", "w6"]
    assert bytes(plain[0]["bytes"]).decode() == "w4" and plain[0]["top_logprobs"] == []
    assert "generation_token_ids" in ask(client, return_token_ids=True).json()["choices"][0]["message"]


def test_tokenize_says_what_generation_sees(client: httpx.Client) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "w9"},
    ]
    tokens = client.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()
    assert tokens == {"tokens": [56, 3, 4, 57, 11], "count": 5, "max_model_len": 60_000}
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 1, "return_token_ids": True}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["prompt_token_ids"] == tokens["tokens"]


def test_tool_calls(client: httpx.Client) -> None:
    choice = ask(client, "call", tools=TOOLS, max_tokens=9).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    for fields in ({"tool_choice": "none"}, {"tools": None}):
        message = ask(client, "call", **({"tools": TOOLS, "max_tokens": 9} | fields)).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": CALL}
    cut = ask(client, "call", tools=TOOLS, max_tokens=1).json()["choices"][0]  # a whole call, and no token for the end
    assert cut["message"]["tool_calls"][0]["function"] == call["function"] and cut["finish_reason"] == "tool_calls"
    broken = ask(client, "break", tools=TOOLS, max_tokens=9).json()["choices"][0]
    assert (broken["message"]["content"], broken["finish_reason"]) == (BROKEN, "stop")


def test_stop_text_is_cut_off(client: httpx.Client) -> None:
    choice = ask(client, "w0", stop=["zzz", "w3 w4"], max_tokens=20, return_token_ids=True).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("w1 w2 ", "stop")
    assert choice["message"]["generation_token_ids"] == [3, 4, 5, 6]


def test_stop_text_cuts_before_tool_calls_are_read(client: httpx.Client) -> None:
    for word in ("call", "noted"):
        choice = ask(client, word, tools=TOOLS, max_tokens=9, stop='"arguments"').json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": '<tool_call>{"name":"add",'}
        assert choice["finish_reason"] == "stop"


def test_special_tokens_beside_a_tool_call_are_no_content(client: httpx.Client) -> None:
    message = ask(client, "noted", tools=TOOLS, max_tokens=9).json()["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1


def test_what_changes_nothing_is_accepted(client: httpx.Client) -> None:
    fields: dict[str, Any] = {
        "n": 1,
        "stream": False,
        "parallel_tool_calls": True,
        "user": "someone",
        "metadata": {"a": "b"},
        "store": True,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "service_tier": "auto",
        "seed": 5,
        "stop": None,
        "top_p": 1,
    }
    assert ask(client, **fields).status_code == 200
    assert ask(client, **dict.fromkeys([*fields, "temperature", "model", "tools"])).status_code == 200
    earlier = {"role": "assistant", "content": "w1", "prompt_token_ids": [2], "generation_token_ids": ["3"]}
    earlier["generation_log_probs"] = [-0.5]
    messages = [{"role": "user", "content": "w0"}, earlier, {"role": "user", "content": "w5"}]
    assert ask(client, messages=messages).status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 3}, ["max_new_tokens", "did you mean"]),
        ({"temprature": 1}, ["temprature", "'temperature'"]),
        ({"n": 2}, ["n:", "one reply"]),
        ({"stream": True}, ["streaming"]),
        ({"top_logprobs": 3}, ["top_logprobs"]),
        ({"tool_choice": "required"}, ["tool_choice"]),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, ["tool_choice"]),
        ({"max_tokens": "3"}, ["completion token limit"]),
        ({"max_tokens": 0}, ["completion token limit"]),
        ({"temperature": -1}, ["temperature"]),
        ({"top_p": 0}, ["top_p"]),
        ({"frequency_penalty": 0.5}, ["frequency_penalty"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"stop": [""]}, ["stop"]),
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, ["role"]),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, ["unknown field", "colour"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            ["only text"],
        ),
        ({"messages": [{"role": "developer", "content": "w3"}, {"role": "user", "content": "w1"}]}, ["developer"]),
        *(
            ({"chat_template_kwargs": {name: value}}, ["chat_template_kwargs", name])
            for name, value in {
                "tokenize": True,
                "continue_final_message": True,
                "return_assistant_tokens_mask": True,
                "return_dict": True,
                "padding": "huge",
                "return_tensors": "pt",
                "self": 1,
            }.items()
        ),
        ({"chat_template_kwargs": {"conversations": []}}, ["template fails"]),
    ],
)
def test_bad_requests(client: httpx.Client, fields: dict[str, Any], words: list[str]) -> None:
    response = ask(client, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == 400
    for word in words:
        assert word in error["message"]
    # By either of these Gym would take the error for a context that is full, and go on.
    assert "max_tokens" not in response.text and "context length" not in response.text


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": "half \\ud800"}]}',
        '{"messages": [{"role": "user", "content": "w0"}], "metadata": {"half \\ud800": 1}}',
        '{"messages": [{"role": "user", "content": "w0"}], "model": "half \\ud800"}',
        '{"messages": [{"role": "user", "content": "w0"}], "tools": [{"type": "function", "function": '
        '{"name": "add", "parameters": {"type": "\\ud800"}}}]}',
        '{"messages": ' + "[" * 100_000,
        '{"messages": [{"role": "user", "content": "w0"}], "tools": [{"type": "function", "function": '
        '{"name": "add", "parameters": ' + '{"a": ' * 5000 + "1" + "}" * 5000 + "}}]}",
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "w0"},
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "add", "arguments": "[" * 100_000 + "]" * 100_000}}],
                    },
                ]
            }
        ),
    ],
    ids=["text", "key", "model", "tool", "body", "parameters", "arguments"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_surrogates_and_depth_are_the_requests_fault(client: httpx.Client, path: str, body: str) -> None:
    assert client.post(path, content=body).status_code == 400


def render_call(arguments: str) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    call = {"function": {"name": "add", "arguments": arguments}}
    prompt_ids(tokenizer, [{"role": "assistant", "content": "", "tool_calls": [call]}])


def test_arguments_that_no_text_can_hold() -> None:
    with pytest.raises(UserError, match="template fails"):
        render_call('{"a": "\\ud800"}')


@pytest.mark.parametrize("depth", [900, 100_000])
def test_deep_arguments_are_shown_or_refused(depth: int) -> None:
    # How deep a template can go depends on the version of Python; it is never a crash.
    with contextlib.suppress(UserError):
        render_call("[" * depth + "]" * depth)


def test_large_bodies(client: httpx.Client) -> None:
    # Refused for what it holds when it is not too large.
    for size, status in ((MAX_BODY_BYTES, 400), (MAX_BODY_BYTES + 1, 413)):
        response = client.post("/tokenize", content=b" " * size)
        assert (response.status_code, response.json()["error"]["code"]) == (status, status)


def test_full_context(client: httpx.Client) -> None:
    for fields in ({"max_tokens": 60_000}, {"text": "w1 " * 60_001, "max_tokens": None}):
        response = ask(client, **fields)
        assert response.status_code == 400
        assert "maximum context length is 60000 tokens" in response.json()["error"]["message"]


def test_other_statuses(client: httpx.Client) -> None:
    assert ask(client, model="other").status_code == 404
    assert "chain" in ask(client, model="other").json()["error"]["message"]
    assert client.get("/nowhere").json()["error"]["code"] == 404
    assert client.get("/v1/chat/completions").json()["error"]["code"] == 405
    assert client.post("/v1/chat/completions", content=b"{oops").status_code == 400
    assert client.get("/v1/models").json()["data"][0]["id"] == "chain"


def test_concurrent_requests(client: httpx.Client) -> None:
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda i: ask(client, f"w{i % 40}", max_tokens=5 + i % 7).json(), range(96)))
    for i, reply in enumerate(replies):
        words = [f"w{(i % 40 + 1 + k) % 50}" for k in range(5 + i % 7)]
        assert reply["choices"][0]["message"]["content"] == " ".join(words)
    assert client.get("/health").json() == {"status": "ok", "model": "chain", "running": 0, "waiting": 0}


def test_a_client_that_leaves_frees_its_row(client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "w0"}], "max_tokens": 50_000},
            timeout=0.5,
        )
    deadline = time.monotonic() + 5
    while client.get("/health").json()["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.get("/health").json()["running"] == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_stops_fast_with_requests_running(model: Path, sent: signal.Signals) -> None:
    others = set(model.parent.glob("ready-*.json"))
    with running(model, "--served-name", "m") as (process, ready):
        assert ready == {"url": ready["url"], "pid": process.pid, "model": "m"}
        with httpx.Client(base_url=ready["url"], timeout=60) as http, ThreadPoolExecutor() as pool:
            pending = [pool.submit(ask, http, max_tokens=50_000) for _ in range(3)]
            while http.get("/health").json()["running"] < 3:
                time.sleep(0.05)
            start = time.monotonic()
            process.send_signal(sent)
            assert process.wait(10) == 0
            assert time.monotonic() - start < 2
            for future in pending:
                response = future.result(5)
                assert (response.status_code, response.json()["error"]["code"]) == (503, 503)
    assert set(model.parent.glob("ready-*.json")) == others


def test_start_failures(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (command(model, "--port", port), 3, "another one"),
            (command(tmp_path / "absent"), 2, "checkpoint"),
            (command(tmp_path / "empty"), 2, "config.json"),
            (command(tmp_path / "adapter"), 2, "also takes --model"),
            (command(model, "--max-batch", "0"), 2, "at least 1"),
            (command(model, "--port", "65536"), 2, "65535"),
            (command(model, "--port", "-1"), 2, "65535"),
        ]
        started = [
            subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for line, _, _ in cases
        ]
        for process, (_, status, words) in zip(started, cases, strict=True):
            output, _ = process.communicate(timeout=120)
            assert (process.returncode, "Traceback" in output) == (status, False), output
            assert words in output


def test_a_port_belongs_to_the_first_endpoint_that_asks() -> None:
    with _listening(0) as first, pytest.raises(RunError, match="cannot listen"):
        _listening(first.getsockname()[1])


def test_templates_that_leave_things_out() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    user = {"role": "user", "content": "hello"}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(tokenizer, [user])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert prompt_ids(tokenizer, [user])
    with pytest.raises(UserError, match="knows no tools"):
        prompt_ids(tokenizer, [user], TOOLS)
    with pytest.raises(UserError, match="leaves out tool calls"):
        prompt_ids(tokenizer, [user, {"role": "assistant", "content": None, "tool_calls": [call]}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        prompt_ids(tokenizer, [user])
