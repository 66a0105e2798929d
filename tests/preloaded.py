"""Python processes that need not import the large libraries again.

Importing PyTorch, `transformers` and their like takes seconds of every process. Here one process
imports them once, and each job runs in a fork of it: a process with memory, environment and
working directory of its own, that has not imported `tinylm` yet.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "OMP_NUM_THREADS": "1",  # threads do not survive a fork
    "MPLBACKEND": "agg",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

# Makes the process that runs it one of several, as torchrun does. One more process holds the store
# in which they find each other, so that no port has to be free.
RANKS = """
import os, signal, sys
from torch.distributed import TCPStore
import tinylm.pretrain

reader, writer = os.pipe()
keeper = os.fork()
if keeper == 0:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, str(store.port).encode())
    signal.pause()

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(reader, 9).decode()}
os.environ |= {"WORLD_SIZE": "{size}", "LOCAL_WORLD_SIZE": "{size}"}
os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
forks = []
for rank in range({size}):
    forks.append(os.fork())
    if forks[-1] == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        break
else:
    codes = [os.waitpid(fork, 0)[1] for fork in forks]
    os.kill(keeper, signal.SIGKILL)
    sys.exit(any(codes))
"""


def python(
    code: str,  # a program
    *words: str,  # its arguments, as in `sys.argv[1:]`
    cwd: Path = ROOT,
    timeout: float = 900,  # seconds
    **settings: str,  # more environment variables
) -> subprocess.CompletedProcess:
    """Run a program in a fork; like `subprocess.run` with `python -c`, and captured output."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        env = {**os.environ, **SETTINGS, **settings}
        files = {"out": str(out), "err": str(err)}
        job = {"code": code, "words": words, "cwd": str(cwd), "env": env, **files}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()

        # The server answers twice: with the id of the fork, and with its exit code.
        fork = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.killpg(fork, signal.SIGKILL)
            server.stdout.readline()
            raise subprocess.TimeoutExpired(code, timeout)
        returncode = int(server.stdout.readline())
        texts = [path.read_text("utf-8", errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess([code, *words], returncode, *texts)


def ranks(size: int, code: str, *words: str, **settings) -> subprocess.CompletedProcess:
    """Run a program in several processes that compute together; more arguments as for `python`.

    torchrun itself starts the two processes of tests/test_cli.py and tests/test_runs.py.
    """
    return python(RANKS.replace("{size}", str(size)) + code, *words, **settings)


@cache
def _server() -> subprocess.Popen:
    """Start the process that forks; one for each worker of the tests."""
    settings = {**SETTINGS, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-u", __file__],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """Fork for each line of the standard input."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import nbdev.test  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    del sys.path[0]  # the folder of this file
    while line := sys.stdin.readline():
        job = json.loads(line)
        fork = os.fork()
        if fork == 0:
            _work(job)
        print(fork)
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))


def _work(job: dict) -> None:
    """Do a job in this process, and end the process."""
    os.setsid()
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # the old one has been read
    sys.argv = ["-c", *job["words"]]

    # As Python does it: the exit code says how the program ended, errors are printed.
    code = 0
    try:
        exec(job["code"], {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
