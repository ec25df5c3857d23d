"""The check of the kernels on a user's card, run over emulated ones: right, and planted wrong."""

import json
import os
import re
import warnings

import pytest
import torch
from support import emulated, planted
from support.marks import needs_compiler

import gemma4_kernels
from gemma4 import Gemma4ForCausalLM, demo
from gemma4.cli import main
from gemma4_kernels import extension, opset
from gemma4_kernels.check import judge, record, runner
from gemma4_kernels.check.cases import CASES, HOST, Draw
from gemma4_kernels.integrations.transformers import report

# Their cases are large.
SLOW = {name for name in CASES if name.startswith(("attention", "linear"))}
SLOW |= {name for name in CASES if name.endswith(("_norm", "_backward"))}
CARD = record.Card("A GPU", "9.0", "580.65.06", "ab" * 32)
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test sees the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gemma4-kernels"


@pytest.fixture
def gpu(monkeypatch):
    """A process with CARD as its device, and a library with kernels for it."""
    build = extension.Build(("sm_90a",), "13.0", "2.11", fingerprint=CARD.build)
    monkeypatch.setattr(extension, "BUILD", build)
    monkeypatch.setattr("gemma4_kernels.info.BUILD", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD.name)
    monkeypatch.setattr(record, "driver", lambda: CARD.driver)
    for function in (extension.covers, record.failed):
        function.cache_clear()
    yield
    for function in (extension.covers, record.failed):
        function.cache_clear()


# The cases and the judge


def verdict(op, kernel):
    """(name of the last case, what is wrong with it or None)."""
    return list(judge.judged(op, kernel, HOST))[-1]


def test_every_kernel_has_cases():
    assert set(CASES) == set(emulated.ops_with_kernels())


@pytest.mark.parametrize("op", CASES)
def test_kernels_serve_the_cases_and_none_is_like_another(op):
    seen = set()
    for dtype in opset.OPS[op].dtypes:
        for arguments in CASES[op](Draw(HOST, dtype)):
            assert opset.OPS[op].why_eager(arguments) is None
            seen.add(repr([x.shape if isinstance(x, torch.Tensor) else x for x in arguments]))
    assert len(seen) > 1


@needs_compiler
@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=pytest.mark.slow) if op in SLOW else op for op in CASES]
)
def test_right_kernels_are_right(op):
    assert verdict(op, planted.right()[op])[1] is None


@needs_compiler
@pytest.mark.parametrize("op", planted.WRONG)
def test_wrong_kernels_are_wrong(op):
    case, reason = verdict(op, planted.wrong()[op])
    assert re.match(planted.WRONG[op], reason), reason
    assert case.startswith("case 0, ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_how_far_is_too_far(dtype):
    """One unit in the last place of a row's largest value is not, nine are."""
    exact = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    expected, last_place = exact.to(dtype), torch.finfo(dtype).eps
    for places, near in ((1, True), (9, False)):
        found = (exact + torch.tensor([0, 0, places * last_place])).to(dtype)
        found[1] = 0
        assert (judge.why_far(found, expected, exact, 1) is None) == near
    found = expected.clone()
    found[1, 1] = 9 * last_place
    assert judge.why_far(found, expected, exact, 1).endswith("at [1, 1], 1 of 6 values are off")


def test_what_is_not_finite_must_be_equal():
    inf, nan = torch.inf, torch.nan
    exact = torch.tensor([inf, -inf, nan, 1.0], dtype=torch.float64)
    assert judge.why_far(exact.float(), exact.float(), exact, 1) is None
    for i, other in enumerate((-inf, 1.0, inf, nan)):
        found = exact.float()
        found[i] = other
        assert f"at [{i}], 1 of 4" in judge.why_far(found, exact.float(), exact, 1)


# The process


@needs_compiler
def test_a_kernel_that_traps_or_hangs_stops_no_other():
    found = {}
    with runner.Runner(HOST, planted.wrong) as checking:
        for op in ("ple_gate", "softcap", "qkv_norm_rope", "softcap_argmax"):
            checking.case_seconds = 2 if op == "ple_gate" else 60
            found[op] = checking.check(op)
    assert found == {
        "ple_gate": "hangs: no end in 2 s (case 0, float32)",
        "softcap": "ends its process with SIGABRT (case 0, float32)",
        "qkv_norm_rope": None,
        "softcap_argmax": "raises RuntimeError: CUDA error: an illegal memory access was "
        "encountered (case 0, float32)",
    }


def test_a_process_that_does_not_start():
    sentence = "the process that runs the kernels does not start: it ends its process with SIGKILL"
    with pytest.raises(RuntimeError, match=sentence), runner.Runner(HOST, planted.none) as checking:
        checking.check("rms_norm")


# The record


def test_record(cache):
    assert record.read(CARD) is None
    for failed in ({}, {"rms_norm": "hangs"}, {}):
        record.write(CARD, failed)
        assert record.read(CARD) == failed
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("field", ["name", "capability", "driver", "build"])
def test_another_card_driver_or_build_was_never_checked(field):
    record.write(CARD, {})
    other = record.Card(**{**vars(CARD), field: "another"})
    assert record.read(other) is None
    # Not even under its name.
    os.replace(record.path(CARD), record.path(other))
    assert record.read(other) is None


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"\xff\xfe", b"{", b"[]", b"5", b"null", b"{}", b"[" * 100_000),
        *({"failed": 5}, {"failed": []}, {"failed": None}, {"failed": {"geglu": 5}}, {"card": 5}),
    ],
    ids=repr,
)
def test_a_damaged_record_counts_for_nothing(damage):
    record.write(CARD, {"geglu": "hangs"})
    path = record.path(CARD)
    whole = json.loads(path.read_bytes())
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(whole | damage).encode())
    assert record.read(CARD) is None


def test_no_record_without_a_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert record.read(CARD) is None
    with pytest.raises(RuntimeError):
        record.write(CARD, {})


def test_what_cannot_be_written_leaves_what_was(cache, monkeypatch):
    record.write(CARD, {"geglu": "hangs"})
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        record.write(CARD, {})
    assert record.read(CARD) == {"geglu": "hangs"} and len(list(cache.iterdir())) == 1


# What comes of it


def test_info_says_what_was_checked(gpu):
    for failed, says in (
        (None, "never checked here: run gemma4 check"),
        ({}, "checked on this card"),
        ({"geglu": "hangs"}, "checked on this card; not used, for they failed: geglu"),
    ):
        if failed is not None:
            record.write(CARD, failed)
        assert gemma4_kernels.build_info()["checked"] == says


def test_explain_says_what_was_checked(monkeypatch):
    model = Gemma4ForCausalLM.from_pretrained(demo.path())
    layers = model.explain().splitlines()
    monkeypatch.setattr(extension, "covers", lambda device: True)
    monkeypatch.setattr(record, "summary", lambda device: "checked or not")
    expected = "kernels on cpu: checked or not"
    assert model.explain().splitlines() == [*layers, expected]
    assert report.explain(model) == expected  # no layer of transformers'


def test_the_record_is_read_when_a_card_is_first_used(gpu, monkeypatch):
    record.write(CARD, {"rms_norm": "hangs"})
    reads = []
    monkeypatch.setattr(
        record, "read", lambda card, read=record.read: reads.append(1) or read(card)
    )
    for _ in range(2):
        failed = opset.kernels.failed(DEVICE)
        assert failed == {"rms_norm": "it failed gemma4 check on this card, where it hangs"}
    assert len(reads) == 1


@needs_compiler
def test_the_twin_serves_for_a_failed_kernel_and_a_warning_names_it(monkeypatch):
    kernels = emulated.kernels()
    monkeypatch.setattr(opset, "kernels", kernels)
    monkeypatch.setattr(kernels, "failed", lambda device: {"rms_norm": "it failed"})
    called = []
    monkeypatch.setattr(kernels, "call", lambda op, args: called.append(op.name) or args[0])
    opset.warn.cache_clear()
    x = torch.randn(3, 8)
    with pytest.warns(UserWarning, match="rms_norm runs eager .* without a kernel: it failed"):
        torch.testing.assert_close(gemma4_kernels.rms_norm(x), torch.rms_norm(x, [8], eps=1e-6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gemma4_kernels.rms_norm(x)
    gemma4_kernels.softcap(x, 30.0)
    assert called == ["softcap"]


# The command


def test_nothing_to_check(capsys, monkeypatch):
    monkeypatch.setattr(extension, "BUILD", extension.Build(reason="they are not built"))
    assert main(["check"]) == 2
    expected = "gemma4: there are no kernels to check: they are not built\n"
    assert capsys.readouterr() == ("", expected)
    monkeypatch.setattr(extension, "BUILD", extension.Build(("sm_90a",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["check"]) == 2
    assert capsys.readouterr().err.endswith("torch sees no CUDA device\n")


def test_no_card_that_runs_the_kernels(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match="compute capability is 7.5"):
        assert main(["check", "--json"]) == 2
    error = "gemma4: no card here runs the kernels, which are compiled for sm_90a\n"
    assert capsys.readouterr() == ("", error)


@pytest.fixture
def verdicts(gpu, monkeypatch):
    """What the process would find, by op; both cards are alike, and one is checked."""
    verdicts = {"geglu": None, "rms_norm": None}

    class Told(runner.Runner):
        def check(self, op):
            assert self.device == DEVICE and self.case_seconds == runner.CASE_SECONDS
            return verdicts[op]

    monkeypatch.setattr(runner, "Runner", Told)
    monkeypatch.setattr(opset.kernels, "names", list(verdicts))
    return verdicts


def test_check(verdicts, capsys):
    assert main(["check"]) == 0
    head = "A GPU, driver 580.65.06: 2 kernels"
    assert capsys.readouterr() == (f"{head}\ngeglu     right\nrms_norm  right\n", "")
    assert record.read(CARD) == {}

    verdicts["rms_norm"] = "hangs"
    assert main(["check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        *(head, "geglu     right", "rms_norm  hangs"),
        "not used on this card from now on: rms_norm",
    ]
    assert record.read(CARD) == {"rms_norm": "hangs"}

    assert main(["check", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {**vars(CARD), "kernels": {"geglu": None, "rms_norm": "hangs"}}


def test_a_result_that_cannot_be_kept(verdicts, capsys, cache):
    cache.write_text("a file where the folder should be")
    assert main(["check"]) == 0
    assert capsys.readouterr().err.startswith("gemma4: the result is not kept: ")
