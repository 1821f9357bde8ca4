"""CleanRL's own ppo.py, from a copy of its repository: FOLDER ENVIRONMENTS STEPS; timed as it counts, from its first update."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import timing

folder, num_envs, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
command = [sys.executable, str((folder / "cleanrl" / "ppo.py").resolve()), "--no-cuda"]
command += ["--num-envs", str(num_envs), "--total-timesteps", str(steps)]
with tempfile.TemporaryDirectory() as where:
    printed = subprocess.run(command, cwd=where, check=True, capture_output=True, text=True).stdout
rate = int(re.findall(r"SPS: (\d+)", printed)[-1])
timing.report_seconds([steps / rate] * 2, packages=("torch", "gymnasium"))
