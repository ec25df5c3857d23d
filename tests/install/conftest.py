"""No machine's own toolkit is found."""

import compiled
import pytest


@pytest.fixture
def no_usual_prefix(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.setup_py, "USUAL_PREFIX", tmp_path / "nowhere")
