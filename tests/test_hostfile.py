"""`deepspeed --hostfile` on two "machines": pdsh over a real ssh, to two addresses of this one."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT, environment, metrics, overridden, pretrain, wait_for, wait_for_the_end

from mlm_dist import checkpoint
from mlm_dist.world import free_port

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")
PATH = os.environ["PATH"] + ":/usr/sbin"
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
HOSTS = ("127.0.0.1", "127.0.0.2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"pdsh and ssh are not installed: no {', '.join(MISSING)}"),
]


class Hosts:
    """Two addresses with an sshd; `ssh` finds the way by a configuration of its own, in place of ~/.ssh.

    folder: keys, configurations, the list of hosts, and the variables that the ranks get
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port, user = free_port(), pwd.getpwuid(os.getuid()).pw_name
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(
            "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
            + f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        key = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text("".join(f"[{host}]:{port} {key}" for host in HOSTS))
        (folder / "ssh_config").write_text(
            f"User {user}\nPort {port}\nIdentityFile {folder}/user_key\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {folder}/known_hosts\nBatchMode yes\nLogLevel ERROR\n"
        )
        (folder / "bin").mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        # told to stop, the launcher ends every DeepSpeed of its Python on the hosts: it gets a name of its own for that
        (folder / "python").symlink_to(Path(sys.executable).parent.parent)
        self.python = str(folder / "python" / "bin" / Path(sys.executable).name)
        (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
        (folder / "environment").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        self.env = environment() | {"PATH": f"{folder}/bin:{PATH}", "DS_ENV_FILE": str(folder / "environment")}

    def start(self) -> subprocess.Popen[bytes]:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # an empty folder that sshd shuts itself up in
        command = [shutil.which("sshd", path=PATH), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("wb") as log:
            return subprocess.Popen(command, stderr=log)

    def reach(self, host: str) -> bool:
        done = subprocess.run(["ssh", host, "true"], env=self.env, capture_output=True, timeout=30)
        return done.returncode == 0

    def launch(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                self.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(self.folder / "hosts"),
                "--master_addr", "127.0.0.1", "--master_port", str(free_port()), *arguments,
            ],
            cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    sshd = hosts.start()
    try:
        deadline = time.monotonic() + 20
        while not all(map(hosts.reach, HOSTS)):
            if sshd.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"no sshd to be had here: {(hosts.folder / 'sshd.log').read_text()}")
            time.sleep(0.2)
        yield hosts
    finally:
        sshd.kill()
        sshd.wait()


def command_of(toy: Path, folder: Path, *overrides: str) -> list[str]:
    return ["launch/pretrain.py", "--config", "configs/quickstart.yaml", *overridden(toy, folder, *overrides)]


def test_two_machines_by_hostfile(hosts: Hosts, toy: Path, tmp_path: Path) -> None:
    done = hosts.launch(*command_of(toy, tmp_path / "run", "run.steps=12"))
    said, _ = done.communicate(timeout=300)
    assert done.returncode == 0, said
    for number, host in enumerate(HOSTS):
        assert re.search(rf"^{host}: .*nnodes=2, num_local_procs=1, node_rank={number}", said, re.MULTILINE), said
    assert pretrain(toy, tmp_path / "here", "run.steps=12").returncode == 0
    assert metrics(tmp_path / "run", "loss") == metrics(tmp_path / "here", "loss")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_both_machines_save_and_one_goes_on(
    hosts: Hosts, toy: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The launcher cuts its connections, then tells the ranks: what they print from then on goes nowhere."""
    folder = tmp_path / "run"
    launcher = hosts.launch(*command_of(toy, folder, "run.steps=2000", "log.every_steps=1"))
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder, "loss")) >= 3, launcher)
    os.killpg(launcher.pid, number)
    said, _ = launcher.communicate(timeout=120)
    status = wait_for_the_end(folder)
    assert (status["status"], status["exit_code"]) == ("stopped", 85), (status, said)
    assert checkpoint.find(folder).name == checkpoint.step_name(status["step"])
    again = pretrain(toy, folder, f"run.steps={status['step'] + 2}", ranks=1)
    assert again.returncode == 0 and f"resumed from step {status['step']}" in again.stdout, again.stdout


def test_the_exit_code_of_a_refusal_comes_back(hosts: Hosts, toy: Path, tmp_path: Path) -> None:
    refused = hosts.launch(*command_of(toy, tmp_path / "run", "optim.lrr=1"))
    said, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "did you mean optim.lr?" in said, said
