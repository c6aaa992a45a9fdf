"""The command line as a user runs it: processes, signals, launchers.

`kmem` commands are forks of a process that has imported everything (`tests/warm_processes.py`); `--full` repeats the
tests with commands that a new interpreter executes. Launchers always execute theirs.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kmem.checkpoint.commit import committed_steps
from kmem.cli import COMMANDS, main
from kmem.config import load_config, packaged_configs
from kmem.parallel.local_launch import INTERRUPTED, free_port, launch_local
from tests.warm_processes import start_command

ROOT = Path(__file__).resolve().parents[2]
KMEM = [sys.executable, "-m", "kmem.cli"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


def run(command, **options):
    return subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False, **options
    )


def executed(words, environment=ENVIRONMENT):
    """A `kmem` command in a new interpreter."""
    return subprocess.Popen(
        [*KMEM, *words], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def forked(words, environment=ENVIRONMENT):
    """The same in a fork that has imported everything."""
    return start_command(words, environment)


@pytest.fixture(params=[forked, pytest.param(executed, marks=pytest.mark.full)], ids=lambda start: start.__name__)
def start(request):
    """start(words of a `kmem` command) -> the running process."""
    return request.param


@pytest.fixture
def finish(start):
    """finish(words) -> exit code, output and errors of a `kmem` command."""

    def run_command(words):
        process = start(words)
        out, errors = process.communicate(timeout=150)
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    return run_command


def checkpoints(tree):
    return Path(tree["folder"]) / tree["name"] / "checkpoints"


def test_without_avx_512_bf16_trains_and_is_said_to_be_slow(run_config):
    _, path = run_config(train__steps=1, train__precision="bf16", parallel__zero_stage=1)
    environment = ENVIRONMENT | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    process = executed(["train", "--config", str(path)], environment)
    out, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert re.search(r"^train\.precision: .*\bfp32$", out, re.M)


@pytest.mark.parametrize(("nproc", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT), (2, signal.SIGUSR1)])
def test_a_signal_finishes_the_step_saves_and_tells_by_the_exit_code(run_config, start, finish, nproc, number):
    tree, path = run_config(train__steps=100000, checkpoint__every=None, evaluation__at_start=False)
    words = ["train", "--config", str(path), "--nproc", str(nproc)]
    process = start(words)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED == 75
    assert "interrupted: " in rest
    (stopped,) = committed_steps(checkpoints(tree))
    assert stopped >= 3
    tree["train"]["steps"] = stopped + 1
    path.write_text(yaml.safe_dump(tree))
    again = finish(words)
    assert again.returncode == 0, again.stderr
    assert f"from step {stopped}" in again.stdout


def test_the_size_of_the_vocabulary_is_taken_from_the_data_once(run_config, finish):
    tree, path = run_config(train__steps=1, model__vocab_size=None)
    planned = finish(["train", "--config", str(path), "--dry-run", "--json"])
    assert json.loads(planned.stdout)["config"]["model"]["vocab_size"] == 257
    printed = finish(["train", "--config", str(path), "--dry-run"]).stdout
    assert re.search(rf"^model\.vocab_size: 257\b.*{tree['data']['sources'][0]['path']}", printed)
    words = ["train", "--config", str(path), "--set", "evaluation.at_start=false"]
    assert finish([*words, "--nproc", "2"]).returncode == 0
    saved = load_config(Path(tree["folder"]) / tree["name"] / "config.yaml")
    assert saved.model.vocab_size == 257
    again = finish([*words, "train.steps=2"])  # resumed by one rank
    assert again.returncode == 0, again.stderr
    assert "from step 1" in again.stdout
    small = finish([*words, "model.vocab_size=256"])
    assert small.returncode == 2
    assert re.search(r"model\.vocab_size: 256 .*--set model\.vocab_size=257", small.stderr)


def test_a_dry_run_without_the_data_that_has_its_vocabulary_shows_what_to_set(run_config, finish):
    _, path = run_config(model__vocab_size=None, data__sources=[{"path": "/none"}])
    answer = finish(["train", "--config", str(path), "--dry-run"])
    assert answer.returncode == 2
    assert re.search(r"model\.vocab_size: .*/none: .*--set model\.vocab_size=\d+", answer.stderr)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_dead_console_loses_nothing(run_config, start, nproc):
    """As `kmem train | tee log` and Ctrl-C: tee ends first, and the next line of progress has no reader."""
    tree, path = run_config(train__steps=100000, checkpoint__every=None, evaluation__at_start=False)
    process = start(["train", "--config", str(path), "--nproc", str(nproc)])
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.stdout.close()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == INTERRUPTED
    (stopped,) = committed_steps(checkpoints(tree))
    assert stopped > 3


def test_a_dead_rank_ends_the_others(run_config, start):
    """One rank is killed: the command ends with an error instead of hanging, and the last checkpoint is valid."""
    tree, path = run_config(train__steps=100000, checkpoint__every=2, evaluation__at_start=False)
    process = start(["train", "--config", str(path), "--nproc", "2"])
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGSTOP)  # or it might end before the launcher has seen the other's death
    os.kill(int(children[1]), signal.SIGKILL)
    _wait_until(lambda: not Path(f"/proc/{children[1]}").exists(), "the launcher does not see that a rank is dead")
    os.kill(int(children[0]), signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "was ended by SIGKILL" in errors
    assert committed_steps(checkpoints(tree))


def test_ranks_end_with_their_launcher(run_config, start):
    """Also when it is killed and can pass nothing on."""
    _, path = run_config(train__steps=100000, checkpoint__every=None, evaluation__at_start=False)
    process = start(["train", "--config", str(path), "--nproc", "2"])
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    _wait_until(lambda: not any(_runs(child) for child in children), "the ranks go on without their launcher")


def _wait_until(condition, otherwise: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def _runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_launcher_executes_one_interpreter_per_rank(capfd):
    assert launch_local(["--version"], 2) == 0
    assert len(set(capfd.readouterr().out.splitlines())) == 1
    assert launch_local(["train", "--config", "none"], 2) == 2
    assert "kmem train: error: " in capfd.readouterr().err


def test_a_run_killed_again_and_again_keeps_a_valid_checkpoint(run_config, start):
    """SIGKILL at moments of no choice, most of them within a save: the next start always finds a complete state."""
    tree, path = run_config(train__steps=100000, checkpoint={"every": 1}, evaluation__at_start=False)
    reached = 0
    for delay in (0.0, 0.05, 0.13):
        process = start(["train", "--config", str(path)])
        for line in process.stdout:
            if line.startswith(f"step {reached + 4}/"):
                break
        time.sleep(delay)
        process.kill()
        process.communicate()
        newest = committed_steps(checkpoints(tree))[-1]
        assert newest >= reached + 3
        reached = newest


def test_torchrun_starts_the_same_run(run_config):
    tree, path = run_config(train__steps=2, parallel={"pipeline": 2})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    answer = run([*torchrun, "-m", "kmem.pretrain", "--config", str(path)])
    assert answer.returncode == 0, answer.stderr
    assert "mesh pipeline 2 x data 1" in answer.stdout
    assert committed_steps(checkpoints(tree)) == [2]


@pytest.mark.full
def test_processes_that_torchrun_starts_again_form_a_run(run_config, tmp_path):
    """The store at which ranks meet may be the same one."""
    tree, path = run_config(train__steps=2, parallel={"pipeline": 2, "timeout_seconds": 30})
    (tmp_path / "rank.py").write_text(
        "import os, sys\n"
        "from kmem.config import load_config\n"
        "from kmem.parallel.joining import join_mesh\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    join_mesh(load_config(sys.argv[-1]))\n"
        "    os._exit(1)\n"
        "from kmem.cli import main\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    answer = run([*torchrun, tmp_path / "rank.py", "--config", path])
    assert answer.returncode == 0, answer.stderr
    assert committed_steps(checkpoints(tree)) == [2]


@pytest.mark.full
def test_two_torchrun_agents_form_one_run(run_config):
    """Two nodes on one machine."""
    tree, path = run_config(train__steps=2, parallel={"pipeline": 2, "expert": 2})
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
             "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "29517",
             "--module", "kmem.pretrain", "--config", str(path)],
            env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "mesh pipeline 2 x data 2 (expert 2)" in outputs[0] + outputs[1]
    assert committed_steps(checkpoints(tree)) == [2]


@pytest.mark.full
def test_deepspeed_launcher_passes_local_rank(run_config):
    tree, path = run_config(train__steps=2, parallel={"pipeline": 2})
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "29518"]
    answer = run([*launcher, "--module", "kmem.pretrain", "--config", str(path)])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert committed_steps(checkpoints(tree)) == [2]


@pytest.mark.full
def test_deepspeed_launcher_with_a_hostfile(run_config, tmp_path):
    """Two nodes of a hostfile on one machine, started on each as without ssh."""
    tree, path = run_config(train__steps=2, parallel={"pipeline": 2, "expert": 2})
    (tmp_path / "hostfile").write_text("node-0 slots=2\nnode-1 slots=2\n")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    nodes = [
        subprocess.Popen(
            [launcher, "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--node_rank", str(node),
             "--master_addr", "127.0.0.1", "--master_port", "29519", "--module", "kmem.pretrain",
             "--config", str(path)],
            env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=150)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert committed_steps(checkpoints(tree)) == [2]


def test_errors_are_one_line_and_exit_code_2(run_config, finish, tmp_path):
    _, path = run_config()
    for arguments, message in (
        (
            ["train", "--config", str(path), "--set", "model.moe.topk=1"],
            r"model\.moe\.topk: .*\btop_k\b",
        ),
        (["train", "--config", str(tmp_path / "none.yaml")], r"none\.yaml: no such"),
        (["train", "--config", str(path), "--nproc", "3"], r"train\.global_batch_size: 8\b.*\b6\b"),
        (
            ["train", "--config", str(path), "--nproc", "2", "--set", "data.sources.0.path=/none"],
            "/none: .*kmem data prepare",
        ),
    ):
        answer = finish(arguments)
        assert answer.returncode == 2
        assert re.search(message, answer.stderr)
        assert "Traceback" not in answer.stderr
        assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr


def test_bad_input_of_one_rank_is_reported_by_all(run_config, corpus, tmp_path, start):
    """As on two machines, one of which lacks the data; no rank waits for the others."""
    _, path = run_config(data__sources=[{"path": "~/text"}])
    homes = [tmp_path / name for name in ("first", "second")]
    for home in homes:
        home.mkdir()
    (homes[0] / "text").symlink_to(corpus)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        start(
            ["train", "--config", str(path)],
            ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "HOME": str(home)},
        )
        for rank, home in enumerate(homes)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert f"rank 1: {homes[1] / 'text'}: " in errors


def test_help_lists_the_packaged_configs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in packaged_configs()), "no name is broken at the end of a line"


def test_dry_run_needs_no_data_and_prints_exact_integers(run_config, finish):
    _, path = run_config(data__sources=[{"path": "/none"}])
    answer = finish(["train", "--config", str(path), "--dry-run", "--json"])
    assert answer.returncode == 0, answer.stderr
    figures = json.loads(answer.stdout)
    assert figures["total"] == sum(figures["components"].values())
    assert figures["non_embedding"] == figures["total"] - 2 * 257 * 32
    inactive = 3 * 2 * 3 * 32 * 32  # 3 MoE layers, 2 of 4 experts, 3 matrices
    assert figures["active"] == figures["total"] - inactive
    assert figures["tables"] == 0
    table = finish(["train", "--config", str(path), "--dry-run", "--nproc", "4", "--set", "parallel.pipeline=2"])
    assert table.returncode == 0, table.stderr
    assert "pipeline 2 x data 2" in table.stdout


def test_importing_kmem_is_quick():
    """The package itself stays far below the 1.5 s that it may take beyond torch."""
    code = "import time; t = time.perf_counter(); import kmem, kmem.cli; print(time.perf_counter() - t)"
    assert float(run([sys.executable, "-c", code]).stdout) < 1.5
    heavy = "{'torch', 'deepspeed', 'transformers', 'wandb'}"
    code = f"import sys, kmem, kmem.cli; print({heavy} & sys.modules.keys())"
    assert run([sys.executable, "-c", code]).stdout.strip() == "set()"


def loaded_after(commands, heavy):
    """Of the heavy modules, those that are there after some commands in one process; what they printed in errors."""
    code = (
        "import contextlib, os, sys\n"
        "from kmem.cli import main\n"
        f"for words in {commands!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, 'w')):\n"
        "        main(words)\n"
        f"print({heavy} & sys.modules.keys())"
    )
    answer = run([sys.executable, "-c", code])
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip(), answer.stderr


def test_help_and_errors_of_a_config_import_nothing_that_takes_seconds(run_config):
    _, path = run_config()
    heavy = {"torch", "numba", "deepspeed", "transformers", "tokenizers", "matplotlib", "wandb", "scipy", "sklearn"}
    below = {
        "bank": ("list", "erase", "replace", "merge"),
        **{command: tuple(found) for command, (found, _) in COMMANDS.items() if not isinstance(found, str)},
    }
    assert below["data"] == ("corpora", "prepare", "adopt", "cluster")
    commands = [["--help"], *([command, "--help"] for command in COMMANDS)]
    commands += [[command, action, "--help"] for command, actions in below.items() for action in actions]
    commands += [["train", "--config", "quikstart"], ["train", "--config", str(path), "--set", "train.stepz=3"]]
    loaded, errors = loaded_after(commands, heavy)
    assert loaded == "set()"
    assert re.search(r"quikstart: .*\bquickstart\b", errors)
    assert re.search(r"train\.stepz: .*\bsteps\b", errors)


def test_preparing_adopting_and_verifying_data_import_no_model_code(tmp_path):
    (tmp_path / "text.txt").write_text("one\ntwo\nthree\n" * 20)
    data, copy, adopted = (str(tmp_path / name) for name in ("data", "copy", "adopted"))
    prepare = ["data", "prepare", str(tmp_path / "text.txt"), "--documents", "line", "--workers", "1", "--out"]
    commands = [
        [*prepare, data, "--vocab-size", "257"],
        [*prepare, copy, "--tokenizer", f"{data}/tokenizer"],
        ["data", "adopt", f"{data}/train", "--tokenizer", f"{data}/tokenizer", "--out", adopted],
        ["verify", data, adopted],
    ]
    heavy = {
        "torch",
        "numba",
        "deepspeed",
        "megatron",
        "wandb",
        "transformers.modeling_utils",
        "transformers.models.auto",
    }
    loaded, errors = loaded_after(commands, heavy)
    assert loaded == "set()"
    assert "error" not in errors
    assert (tmp_path / "adopted" / "manifest.json").is_file()


def test_missing_data_is_said_before_deepspeed_is_imported(run_config):
    _, path = run_config(data__sources=[{"path": "/none"}])
    loaded, errors = loaded_after([["train", "--config", str(path)]], {"deepspeed"})
    assert loaded == "set()"
    assert "/none: " in errors


def test_time_is_spent_in_training_not_in_starting(run_config):
    """A one-step run, start-up and save included, stays below half a minute."""
    _, path = run_config(train__steps=1)
    began = time.monotonic()
    answer = run([*KMEM, "train", "--config", str(path)])
    assert answer.returncode == 0, answer.stderr
    assert time.monotonic() - began < 30


def test_hints_name_packages_that_an_index_has():
    """kmem itself is on none, so `pip install kmem[...]` would find something else or nothing."""
    declared = (ROOT / "setup.py").read_text()
    for path in (
        *ROOT.glob("kmem/**/*.py"),
        *ROOT.glob("kernels/**/*.py"),
        *ROOT.glob("docs/*.md"),
        ROOT / "README.md",
    ):
        text = path.read_text()
        assert not re.search(r"pip install '?kmem", text), path
        for requirement in re.findall(r"pip install '([^']+)'", text):
            assert f'"{requirement}"' in declared, f"{path}: {requirement}"


def test_it_runs_as_a_module():
    assert run([sys.executable, "-m", "kmem", "--version"]).stdout.startswith("kmem ")
