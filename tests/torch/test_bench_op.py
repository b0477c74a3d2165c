"""supra bench op: what is wrong is not timed, what is right is, and a report is written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from supra_cli.main import app  # noqa: E402
from supra_torch.benchmark import operator, peers  # noqa: E402
from supra_torch.benchmark.peers import Candidate, Shape  # noqa: E402
from supra_torch.benchmark.problem import Problem  # noqa: E402

TINY = Shape("tiny", 2, 300, 4, 2, 24, 16)
MEASURED = ("forward_seconds", "forward_backward_seconds", "forward_bytes_per_second")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operator.SHAPES, TINY.name, TINY)
    monkeypatch.setattr(operator, "copy_bandwidth", lambda device: 1e10)


def _measured(dtype: str, *implementations: str) -> list[dict[str, Any]]:
    result = operator.benchmark(
        shapes=["tiny"], implementations=implementations, dtype=dtype, device="cpu", repeats=1,
        log=lambda line: None,
    )  # fmt: skip
    return result["rows"]


@pytest.mark.parametrize("dtype", operator.DTYPES)
def test_what_is_right_is_timed(dtype: str) -> None:
    for row in _measured(dtype, "chunked", "sdpa"):
        assert row["reason"] is None and not row["failed"], row
        assert all(row[name] > 0 for name in MEASURED)
        assert set(row["errors"]) == {"output", "dq", "dk", "dv"}


@pytest.mark.parametrize("changed", range(3))
def test_a_wrong_gradient_is_not_timed(changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(slope: Any) -> Any:
        right = peers.CANDIDATES["chunked"].prepare(slope)

        def run(*operands: Any) -> Any:
            out = right(*operands)
            # The output stays: only one operand's gradient is off, by 10 %.
            x = operands[changed].sum()
            return out + 0.1 * (right(*operands) - right(
                *(y.detach() if i == changed else y for i, y in enumerate(operands))
            )) + 0 * x  # fmt: skip

        return run

    monkeypatch.setitem(operator.CANDIDATES, "wrong", Candidate("wrong", prepare))
    (row,) = _measured("fp32", "wrong")
    assert row["failed"]
    assert row["reason"].startswith("not timed: ")
    assert ("dq", "dk", "dv")[changed] in row["reason"]
    assert all(row[name] is None for name in MEASURED)


def test_an_absent_peer_is_a_reason_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(slope: Any) -> Any:
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(operator.CANDIDATES, "peer", Candidate("peer", prepare))
    (row,) = _measured("fp32", "peer")
    assert row["reason"] == "not available: No module named 'peer'"
    assert not row["failed"]


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = Candidate("nan", lambda slope: lambda q, k, v: q @ (k * torch.nan).repeat(1, 1, 2, 1).mT)
    problem = Problem(Shape("square", 1, 16, 4, 2, 16, 4), torch.float32, torch.device("cpu"))
    assert problem.measure(nan, 1).failed


def test_bytes_are_those_of_the_tensors() -> None:
    q, k, v, out = (
        torch.empty(TINY.B, TINY.T, heads, size, dtype=torch.bfloat16)
        for heads, size in ((TINY.H, TINY.Dk), (TINY.K, TINY.Dk), (TINY.K, TINY.Dv),
                            (TINY.H, TINY.Dv))
    )  # fmt: skip
    assert TINY.forward_bytes(2) == sum(x.nbytes for x in (q, k, v, out))


def test_shapes_and_default_shapes_are_known() -> None:
    assert "B1-T8192-H96-D128" in operator.SHAPES
    assert set(peers.CPU_SHAPES) <= set(operator.SHAPES)


def test_the_command_writes_a_report_once(tmp_path: Path) -> None:
    arguments = ["bench", "op", "--shape", "tiny", "--implementation", "chunked", "--device", "cpu",
                 "--repeats", "1", "--out", str(tmp_path)]  # fmt: skip
    first = CliRunner().invoke(app, [*arguments, "--json"])
    assert first.exit_code == 0, first.output
    printed = json.loads(first.stdout)
    (stored,) = tmp_path.glob("operator-*.json")
    assert json.loads(stored.read_text()) == printed
    page = stored.with_suffix(".md").read_text()
    assert "| tiny | chunked |" in page
    assert printed["date"] in page and torch.__version__ in page
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0


def test_a_wrong_implementation_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = Candidate("zero", lambda slope: lambda q, k, v: (0 * q[..., :1]) + 0 * q[..., :16])
    monkeypatch.setitem(operator.CANDIDATES, "zero", zero)
    result = CliRunner().invoke(
        app, ["bench", "op", "--shape", "tiny", "--implementation", "zero", "--device", "cpu"]
    )
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shape", "huge"), ("--implementation", "magic"), ("--dtype", "int8"),
     ("--device", "tpu"), ("--device", "mps")],
)  # fmt: skip
def test_unknown_names_are_one_sentence(option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["bench", "op", option, value])
    assert result.exit_code == 2
    assert value in result.output and "Traceback" not in result.output
