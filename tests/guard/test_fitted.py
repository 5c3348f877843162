from pathlib import Path

import pytest

from rsafe_plugins import Category, Guard, Policy, SettingsError
from rsafe_plugins.backends import LlamaCppBackend
from rsafe_plugins.guard.fitted import PACKAGED, OperatingPoint, operating_point, read, write
from rsafe_plugins.testing import ScriptedBackend

POLICY = Policy(name="mine", categories=(Category(id="A", name="a"),))


def scripted(unsafe: float) -> ScriptedBackend:
    return ScriptedBackend("", candidates={"safe": 1 - unsafe, "unsafe": unsafe}, model="m")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fitted.yaml"
    point = OperatingPoint(threshold=0.8, band=(0.6, 0.9), digest=POLICY.digest)
    write(path, "m", {"other": OperatingPoint(threshold=0.2, band=(0.2, 0.2)), "mine": point})
    return path


def test_a_guard_draws_its_lines_where_they_were_fitted(file: Path) -> None:
    guard = Guard(POLICY, backend=scripted(0.7), reasoning="never", threshold=file)
    assert guard.operating_point.band == (0.6, 0.9)
    assert guard.check("x").label == "safe"


def test_what_is_given_comes_before_what_was_fitted(file: Path) -> None:
    guard = Guard(POLICY, backend=scripted(0.7), threshold=file, band=(0.1, 0.2))
    assert (guard.operating_point.threshold, guard.operating_point.band) == (0.8, (0.1, 0.2))
    assert Guard(POLICY, backend=scripted(0.7), threshold=0.6).operating_point.threshold == 0.6


def test_a_policy_that_was_changed_or_never_fitted_takes_the_models_first_point(file: Path) -> None:
    changed = Policy(name="mine", categories=(Category(id="A", name="b"),))
    assert operating_point("m", changed, file).threshold == 0.2


def test_a_model_that_was_not_fitted_has_the_defaults(file: Path) -> None:
    assert operating_point("unknown", POLICY, file) == OperatingPoint(threshold=0.5, band=(0.3, 0.7))


def test_a_threshold_of_ones_own_does_not_make_a_guard_think_for_which_it_does_not_pay() -> None:
    point = Guard(backend="embedded", threshold=0.6).operating_point
    assert (point.threshold, point.band) == (0.6, (0.6, 0.6))
    point = Guard(backend=scripted(0.5), threshold=0.6).operating_point
    assert (point.threshold, point.band) == (0.6, (0.3, 0.7))


def test_a_band_of_no_width_thinks_never(file: Path) -> None:
    backend = scripted(0.5)
    Guard(POLICY, backend=backend, reasoning="adaptive", threshold=0.5, band=(0.5, 0.5)).check("x")
    assert all(request.candidates or "Categories" in request.prefill for request in backend.requests)


def test_other_models_stay_when_one_is_written(file: Path) -> None:
    write(file, "n", {"mine": OperatingPoint(threshold=0.3)})
    assert set(read(file)) == {"m", "n"}


def test_other_policies_stay_when_one_is_written(file: Path) -> None:
    write(file, "m", {"third": OperatingPoint(threshold=0.3), "mine": OperatingPoint(threshold=0.4)})
    assert {name: point.threshold for name, point in read(file)["m"].items()} == {
        "other": 0.2,
        "mine": 0.4,
        "third": 0.3,
    }


@pytest.mark.parametrize("text", ["", "another: {mine: {threshold: 0.1}}"])
def test_a_file_of_ones_own_without_the_model_fails_the_check(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fitted.yaml"
    path.write_text(text)
    verdict = Guard(POLICY, backend=scripted(0.2), reasoning="never", threshold=path).check("x")
    assert (verdict.label, verdict.blocked) == (None, True)
    assert "The model is m, and the thresholds in" in str(verdict.error)


@pytest.mark.parametrize("name", ["rsafe-18", "prompt-injection"])
def test_the_packaged_guard_and_the_built_in_policies_have_been_fitted(name: str) -> None:
    point = read(PACKAGED)[LlamaCppBackend().model][name]
    assert point.digest == Policy.load(name).digest


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "m: {mine: {threshold: yes}}",
        "m: {mine: {band: [yes, 1]}}",
        "m: {mine: {threshold: 2}}",
        "m: {mine: {treshold: 0.2}}",
        "\x00",
        "m: [",
    ],
)
def test_a_bad_file_is_one_sentence_when_the_guard_is_made(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"bad\.yaml"):
        Guard(POLICY, backend=scripted(0.5), threshold=path)


def test_a_file_that_is_not_there_is_named_as_a_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'threshold'.*a file that"):
        Guard(POLICY, backend=scripted(0.5), threshold=tmp_path / "none.yaml")


def test_a_file_that_cannot_be_written_keeps_what_was_in_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def full(self: Path, *arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SettingsError, match="No space left"):
        write(file, "another", {"p": OperatingPoint(threshold=0.5)})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
