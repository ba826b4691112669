"""Before an installation: is what it needs on this machine? Standard library only, any Python 3."""

import shutil
import subprocess
import sys

PYTHONS = ((3, 11), (3, 13))
DISK_GB_CPU, DISK_GB_GPU = 4, 14


def missing():
    """What is missing, one sentence each."""
    found = []
    version = sys.version_info[:2]
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        found.append(
            "Python 3.11 to 3.13 is needed and this is {}.{}; run make with PYTHON=/path/to/python3.12".format(*version)
        )
    if subprocess.run([sys.executable, "-c", "import venv, ensurepip"], capture_output=True).returncode:
        found.append("the venv module is missing; on Debian and Ubuntu: apt-get install python3-venv")
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        found.append("a C++ compiler is missing (DeepSpeed needs it); on Debian and Ubuntu: apt-get install g++")
    needed = DISK_GB_GPU if shutil.which("nvidia-smi") else DISK_GB_CPU
    free = shutil.disk_usage(".").free / 1e9
    if free < needed:
        found.append(f"the installation takes up to {needed} GB of disk and {free:.1f} GB are free here")
    return found


if __name__ == "__main__":
    sentences = missing()
    for sentence in sentences:
        print("missing:", sentence, file=sys.stderr)
    sys.exit(1 if sentences else 0)
