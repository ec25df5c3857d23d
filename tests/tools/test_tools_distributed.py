"""The model on two processes: DDP, FSDP2 layer by layer, distributed checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import distributed_checks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What each check found; both processes start once for all of them."""
    file = tmp_path_factory.mktemp("distributed") / "results.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*launch, "-m", "support.distributed_checks", str(file)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[1],
    )
    assert file.is_file(), run.stdout + run.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", distributed_checks.NAMES)
@pytest.mark.parametrize("check", distributed_checks.CHECKS)
def test_distributed(check: str, name: str, results: dict[str, str | None]) -> None:
    error = results[f"{check} {name}"]
    assert error is None, error
