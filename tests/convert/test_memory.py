"""Memory does not grow with the layers that are converted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.convert.fake_checkpoint import fake_checkpoint
from tests.convert.helpers import REPOSITORY, convert_argv

PROGRAM = """
import json, re, sys
from convert.command import main
sizes = []
def on_layers(finished, total):
    sizes.append(int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
code = main(sys.argv[1:], on_layers)
print(json.dumps(sizes))
sys.exit(code)
"""


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """Keeping a layer's source or its packed weights would take 3 MB more with each layer."""
    hidden, intermediate, experts, layers = 1024, 512, 2, 8
    fake = fake_checkpoint("fp8", hidden, intermediate, experts, layers + 1)
    argv = convert_argv(fake.write(tmp_path / "model"), tmp_path / "out", "--quant-method", "int8")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *argv], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    sizes = json.loads(ran.stdout.splitlines()[-1])
    layer_bytes = 3 * hidden * intermediate * experts
    assert len(sizes) == layers + 1
    # After two layers the workers' buffers and the allocator have what they need.
    assert sizes[-1] - sizes[2] < (layers - 2) * layer_bytes / 2, sizes
