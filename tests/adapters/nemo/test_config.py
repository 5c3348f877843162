"""What a user's config folder says, and what becomes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.testing import FakeLLMModel

from rsafe_plugins import Guard, Policy
from rsafe_plugins.errors import SettingsError
from rsafe_plugins.nemo import guard_from_config
from rsafe_plugins.nemo.guards import RailGuards
from rsafe_plugins.testing import ScriptedBackend

ROOT = Path(__file__).parents[3]
LIBRARY = ROOT / "rails" / "library"

CONFIG = """
models: []
import_paths: [rsafe_plugins/rails]
rails: {input: {flows: [rsafe check input]}, output: {parallel: true, flows: [rsafe check output]}}
custom_data: {mine: 1, rsafe: {policy: mlcommons, reasoning: always, on_error: allow, timeout: 5}}
"""
POLICY = Policy.load("rsafe-18").model_copy(update={"name": "house-rules"}).model_dump_json()


def config_with(rsafe: object) -> RailsConfig:
    return RailsConfig(models=[], custom_data={"rsafe": rsafe})


def scripted(**settings: Any) -> dict[str, Any]:
    return {"backend": ScriptedBackend(), **settings}


def test_settings_of_the_config_are_those_of_its_guard(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(CONFIG)
    config = RailsConfig.from_path(str(tmp_path))
    config.custom_data["rsafe"]["backend"] = ScriptedBackend()
    guard = guard_from_config(config)
    assert guard.policy.name == "mlcommons"
    settings = guard.settings
    assert (settings.reasoning, settings.on_error, settings.timeout) == ("always", "allow", 5)


def test_rails_and_custom_data_of_the_config_survive_the_import(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(CONFIG)
    config = RailsConfig.from_path(str(tmp_path))
    assert config.custom_data["mine"] == 1
    assert config.rails.input.flows == ["rsafe check input"]
    assert config.rails.output.flows == ["rsafe check output"]
    assert config.rails.output.parallel is True
    assert config.models == []


def test_config_made_in_python_may_hold_a_guard() -> None:
    guard = Guard(backend=ScriptedBackend())
    assert guard_from_config(config_with(guard)) is guard


def test_policy_is_found_in_the_folder_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "policy.json").write_text(POLICY)
    monkeypatch.chdir(tmp_path)
    config = config_with(scripted(policy="policy.json"))
    for path in (str(folder), f"{tmp_path},{folder}"):  # NeMo names those that were joined so
        config.config_path = path
        assert guard_from_config(config).policy.name == "house-rules"


def test_thresholds_are_found_in_the_folder_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "fitted.yaml").write_text(
        "scripted:\n  rsafe-18:\n    threshold: 0.9\n    band: [0.9, 0.9]\n"
    )
    config = config_with({"backend": ScriptedBackend(), "threshold": "fitted.yaml"})
    config.config_path = str(tmp_path)
    assert guard_from_config(config).operating_point.threshold == 0.9


def test_a_dialect_file_is_found_in_the_folder_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ntemplate: p.jinja\nlabels: {ok: safe, bad: unsafe}\n")
    (tmp_path / "p.jinja").write_text("{{ conversation }}")
    config = config_with({"backend": ScriptedBackend(), "dialect": "mine.yaml"})
    config.config_path = str(tmp_path)
    assert guard_from_config(config).dialect.name == "mine"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (scripted(polcy="rsafe-18"), "custom_data.rsafe: there is no setting 'polcy'"),
        (scripted(on_error="ignore"), "custom_data.rsafe: the setting 'on_error' can't be 'ignore'"),
        (scripted(policy="rsafe-19"), "rsafe-19"),
        (scripted(policy="missing.json"), "missing.json"),
        ("rsafe-18", "custom_data.rsafe must be a mapping of settings, not str."),
        (["policy"], "custom_data.rsafe must be a mapping of settings, not list."),
        ({1: 2}, "there is no setting '1'"),
    ],
)
def test_bad_setting_is_named_when_the_app_is_built(settings: object, said: str) -> None:
    config = RailsConfig.from_content(yaml_content=CONFIG)
    config.custom_data["rsafe"] = settings
    with pytest.raises(RuntimeError) as raised:
        LLMRails(config, llm=FakeLLMModel(responses=[]))
    cause = raised.value.__cause__
    assert isinstance(cause, ValueError)
    assert said in str(cause)
    assert "\n" not in str(cause)


@pytest.mark.parametrize(
    "given",
    [{"custom_data": {"RSafe": {}}}, {"models": [{"type": "Rsafe", "engine": "openai", "model": "g"}]}],
)
def test_a_name_in_other_letters_is_not_ignored(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"is 'rsafe', not '(RSafe|Rsafe)'"):
        guard_from_config(RailsConfig(**{"models": [], **given}))


def test_installation_is_found_by_nemo_without_an_import_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(CONFIG)
    code = (
        "from nemoguardrails import RailsConfig; print(*RailsConfig.from_path('.').imported_paths.values())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    current = {path.name: path.read_text() for path in LIBRARY.iterdir() if path.is_file()}
    installed = {path.name: path.read_text() for path in found.iterdir() if path.is_file()}
    assert installed == current, "the installed rails are out of date: pip install -e . again"


@pytest.mark.parametrize(
    ("rails", "flows", "warned"),
    [
        ("{}", "", True),
        ("{inputs: {flows: [rsafe check input]}}", "", True),
        ("{input: {flows: [self check input]}}", "", True),
        ("{input: {flows: [rsafe check input]}}", "", False),
        ("{retrieval: {flows: [rsafe check retrieval]}}", "", False),
        ("{}", "define flow\n  user ...\n  do rsafe check input\n  bot respond\n", False),
        ("{}", "define flow\n  user ...\n  $x = execute rsafe_check_input(text=$user_message)\n", False),
    ],
)
def test_app_in_which_nothing_is_judged_says_so(
    tmp_path: Path, rails: str, flows: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yml").write_text(
        f"models: []\nimport_paths: [rsafe_plugins/rails]\nrails: {rails}\ncustom_data: {{timeout: 3}}\n"
        "prompts: [{task: self_check_input, content: x}]\n"
    )
    (tmp_path / "flows.co").write_text(flows)
    config = RailsConfig.from_path(str(tmp_path))
    config.custom_data["rsafe"] = scripted()
    LLMRails(config, llm=FakeLLMModel(responses=[]))
    assert ("Nothing is judged" in caplog.text) == warned
    assert "custom_data has" not in caplog.text


def test_settings_of_the_guard_in_the_wrong_place_are_named(caplog: pytest.LogCaptureFixture) -> None:
    guards = RailGuards(Guard(backend=ScriptedBackend()), {}, Policy.load)
    guards.check(RailsConfig(models=[], custom_data={"timeout": 3, "mine": 1}))
    assert "custom_data has timeout, which the guard reads under custom_data.rsafe alone" in caplog.text
