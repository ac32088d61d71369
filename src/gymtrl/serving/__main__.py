"""Serves a checkpoint folder over HTTP, OpenAI-compatible. Run as: python -m gymtrl.serving MODEL --port 8000"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gymtrl.errors import GymtrlError


def main() -> int:
    """Reads the command line and serves until stopped.

    Returns:
        `int`: Exit status: 0 stopped by a signal, 2 a bad model folder or option, 3 the port cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gymtrl.serving",
        description="Serve a transformers checkpoint at /v1/chat/completions, for machines without vLLM.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a checkpoint, an adapter or a run")
    parser.add_argument("--model", dest="base", help="the model of an adapter (default: the one that it names)")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 picks a free one (default: 0)")
    parser.add_argument("--served-name", help="name of the model in requests (default: the folder's name)")
    parser.add_argument(
        "--max-batch",
        type=int,
        default=64,
        help="requests generated together at most (default: 64)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", help="torch device (default: the GPU if there is one, else cpu)")
    parser.add_argument(
        "--ready-file",
        type=Path,
        help="file to write when the model answers: JSON with url, pid, model",
    )
    options = parser.parse_args()
    # After the options: torch takes seconds to import, and --help needs none of it.
    from gymtrl.serving.server import serve

    try:
        serve(
            options.model,
            model=options.base,
            port=options.port,
            served_name=options.served_name,
            max_batch=options.max_batch,
            threads=options.threads,
            device=options.device,
            ready_file=options.ready_file,
        )
    except GymtrlError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.remedy:
            print(f"remedy: {error.remedy}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        # Only while the model loads; later the server handles it.
        return 130
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the engine's thread may be inside a forward pass, and would crash on an interpreter taken down.
    os._exit(status)
