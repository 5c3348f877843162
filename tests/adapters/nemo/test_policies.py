"""Several policies in one config."""

from __future__ import annotations

from pathlib import Path

import pytest
from nemoguardrails import LLMRails, RailsConfig
from support.nemo import ANSWER, REFUSAL, SAFE, UNSAFE, App, MainModel, build, user

from rsafe_plugins import Category, Policy
from rsafe_plugins.backends import Request
from rsafe_plugins.errors import SettingsError
from rsafe_plugins.testing import ScriptedBackend

THREE = "flows: [rsafe check input $policy=mlcommons, rsafe check input $policy='rsafe-18']"


def asks_under(request: Request) -> str:
    """The policy that a request of the guard's is under."""
    text = request.messages[-1].content
    return next(
        name
        for name in ("rsafe-18", "mlcommons", "prompt-injection")
        if f"{Policy.load(name).categories[0].id}: {Policy.load(name).categories[0].name}" in text
    )


def unsafe_under(policy: str) -> ScriptedBackend:
    return ScriptedBackend(lambda request: UNSAFE if asks_under(request) == policy else SAFE)


def under(backend: ScriptedBackend) -> list[str]:
    return [asks_under(request) for request in backend.requests]


@pytest.fixture(scope="module", params=["false", "true"], ids=["sequential", "parallel"])
def several(request: pytest.FixtureRequest) -> App:
    return build(
        f"{{input: {{parallel: {request.param}, {THREE}}}, output: {{flows: [rsafe check output]}}}}"
    )


async def test_each_instance_judges_under_its_own_policy(several: App) -> None:
    backend = ScriptedBackend(SAFE)
    several.guard_with(backend, policy="rsafe-18")
    assert await several.reply(user("Hello.")) == ANSWER
    assert sorted(under(backend)[:2]) == ["mlcommons", "rsafe-18"]
    # A flow that names no policy has that of the settings, whatever the flows before it were given.
    assert under(backend)[2:] == ["rsafe-18"]


@pytest.mark.parametrize("policy", ["mlcommons", "rsafe-18"])
async def test_what_one_policy_forbids_is_blocked(several: App, policy: str) -> None:
    several.guard_with(unsafe_under(policy), policy="rsafe-18")
    assert await several.reply(user("Hello.")) == REFUSAL


@pytest.mark.parametrize("chosen", ["prompt-injection", "mlcommons", "nonsense", 3])
async def test_a_client_can_choose_no_policy(several: App, chosen: object) -> None:
    backend = ScriptedBackend(SAFE)
    several.guard_with(backend, policy="rsafe-18")
    context = {"role": "context", "content": {"policy": chosen}}
    assert await several.reply(context, user("Hello.")) == ANSWER
    assert sorted(under(backend)) == ["mlcommons", "rsafe-18", "rsafe-18"]


async def test_a_stream_is_judged_under_the_policy_of_its_rail() -> None:
    app = build(
        "{output: {flows: [rsafe check output $policy=mlcommons],"
        " streaming: {enabled: true, stream_first: false}}}"
    )
    backend = ScriptedBackend(SAFE)
    app.guard_with(backend)
    assert await app.stream(user("Hello.")) == ANSWER
    assert set(under(backend)) == {"mlcommons"}


async def test_a_rail_has_the_policy_that_the_settings_give_it() -> None:
    app = build("{input: {flows: [rsafe check input]}, output: {flows: [rsafe check output]}}")
    backend = ScriptedBackend(SAFE)
    app.guard_with(backend, policies={"output": "mlcommons"})
    assert await app.reply(user("Hello.")) == ANSWER
    assert under(backend) == ["rsafe-18", "mlcommons"]


@pytest.mark.parametrize(
    ("rails", "settings", "message"),
    [
        (
            "input: {flows: [rsafe check input, rsafe check input $policy=mlcommons]}",
            {},
            "must each name a policy",
        ),
        (
            "input: {flows: [rsafe check input $policy=mlcommons, 'rsafe check input(policy=mlcommons)']}",
            {},
            "must each name a policy",
        ),
        ("input: {flows: [rsafe check input $policy=nonsense]}", {}, "nonsense"),
        ("input: {flows: [rsafe check input]}", {"policies": ["mlcommons"]}, "policies must be a mapping"),
        ("input: {flows: [rsafe check input]}", {"policies": {"inputs": "mlcommons"}}, "not 'inputs'"),
        (
            "input: {flows: [rsafe check input]}",
            {"policies": {"input": 3}},
            "policies.input must be a policy",
        ),
        ("input: {flows: [rsafe check input]}", {"policies": {"input": "nonsense"}}, "nonsense"),
        ("input: {flows: [rsafe check input]}", {"policies": {"retrieval": "nonsense"}}, "nonsense"),
        ("input: {flows: [rsafe check input $polcy=mlcommons]}", {}, "not '$polcy=mlcommons'"),
        (
            "input: {flows: ['rsafe check input(polcy=mlcommons)']}",
            {},
            "takes nothing but a policy",
        ),
        (
            "input: {flows: [rsafe check input $policy=mlcommons $mode=fast]}",
            {},
            "not '$policy=mlcommons $mode=fast'",
        ),
        ("input: {flows: [rsafe check input $policy]}", {}, "takes nothing but a policy"),
        (
            "input: {flows: [rsafe check output]}",
            {},
            "'rsafe check output', which belongs under rails.output.flows",
        ),
        ("output: {flows: [rsafe check tool call]}", {}, "belongs under rails.tool_output.flows"),
        ("tool_input: {flows: [rsafe check tool call]}", {}, "belongs under rails.tool_output.flows"),
        (
            "tool_output: {flows: [rsafe check tool calls]}",
            {},
            "'rsafe check tool calls', which is none of our flows",
        ),
    ],
)
def test_what_cannot_work_stops_the_app(rails: str, settings: dict[str, object], message: str) -> None:
    config = RailsConfig.from_content(
        yaml_content=f"models: []\nimport_paths: [rsafe_plugins/rails]\nrails: {{{rails}}}\n"
    )
    config.custom_data["rsafe"] = {"backend": ScriptedBackend(SAFE), **settings}
    with pytest.raises(RuntimeError) as raised:
        LLMRails(config, llm=MainModel())
    assert message in str(raised.value.__cause__)


def test_a_policy_of_a_rail_in_colang_2_is_read_when_the_app_is_built() -> None:
    config = RailsConfig.from_content(
        yaml_content='models: []\nimport_paths: [rsafe_plugins/rails]\ncolang_version: "2.x"\n'
    )
    config.custom_data["rsafe"] = {"backend": ScriptedBackend(SAFE), "policies": {"retrieval": "nonsense"}}
    with pytest.raises(RuntimeError) as raised:
        LLMRails(config, llm=MainModel())
    assert "nonsense" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ('rsafe check input $policy="nonsense"', "nonsense"),
        ("await rsafe check output $policy='nonsense'", "nonsense"),
        ('$r = await rsafe check tool result $results=[] $policy="nonsense"', "nonsense"),
        ('rsafe check input $policy="agents.json"', "needs a policy with a category that applies to prompt"),
        ("rsafe check input $input_text", "not $input_text: it finds the text itself"),
        ("await rsafe check output $policy=$output_text", "not $output_text: it finds"),
        # What isn't known before the flow runs, isn't code, or is well.
        ('rsafe check input "nonsense"', "nonsense"),
        ('rsafe check input(policy="nonsense")', "nonsense"),
        ('if $x\n    pass\n  else\n    start rsafe check  input $policy="nonsense"', "nonsense"),
        ('when rsafe check input $policy="nonsense"\n    pass', "nonsense"),
        ("rsafe check input $policy=$mine", ""),
        ('rsafe check input $policy="{$mine}.json"', ""),
        ('rsafe check input # $policy="nonsense"', ""),
        ('"""Was: rsafe check input $policy="nonsense"."""\n  rsafe check input', ""),
        ("""bot say "write rsafe check input $policy='nonsense'\"""", ""),
        ('my rsafe check input $policy="nonsense"', ""),
        ("my rsafe check input $input_text", ""),
        ('rsafe check input strictly $policy="nonsense"', ""),
        ('rsafe check retrieval $policy="nonsense"', ""),
        ('rsafe check input $policy="house.json"', ""),
        ('await rsafe check input and rsafe check tool call $tool_calls=[] $policy="agents.json"', ""),
    ],
)
def test_what_a_flow_of_colang_2_is_given_is_checked_when_the_app_is_built(
    tmp_path: Path, call: str, message: str
) -> None:
    category = Category(id="P1", name="Threats")
    for name, kind in (("house", "prompt"), ("agents", "tool_call")):
        policy = Policy(name=name, categories=(category.model_copy(update={"applies_to": (kind,)}),))
        (tmp_path / f"{name}.json").write_text(policy.model_dump_json(exclude_none=True))
    (tmp_path / "config.yml").write_text('models: []\ncolang_version: "2.x"\n')
    (tmp_path / "main.co").write_text(
        f"import core\nimport guardrails\nimport rsafe_plugins.rails\n\nflow input rails $input_text\n  {call}\n"
        "\nflow my rsafe check input $policy\n  pass\n\nflow rsafe check input strictly $policy\n  pass\n"
        "\n@override\nflow rsafe check retrieval $policy\n  pass\n"
    )
    config = RailsConfig.from_path(str(tmp_path))
    config.custom_data["rsafe"] = {"backend": ScriptedBackend(SAFE)}
    if not message:
        LLMRails(config, llm=MainModel())
        return
    with pytest.raises(RuntimeError) as raised:
        LLMRails(config, llm=MainModel())
    assert message in str(raised.value.__cause__)


def test_a_policy_file_is_found_in_the_config_s_folder(tmp_path: Path) -> None:
    category = {"id": "P1", "name": "Threats", "description": "Threats."}
    policy = Policy.model_validate({"name": "house", "categories": [category]})
    (tmp_path / "house.json").write_text(policy.model_dump_json(exclude_none=True))
    (tmp_path / "config.yml").write_text(
        "models: []\nimport_paths: [rsafe_plugins/rails]\n"
        "rails: {input: {flows: ['rsafe check input $policy=house.json']}}\n"
    )
    config = RailsConfig.from_path(str(tmp_path))
    config.custom_data["rsafe"] = {"backend": ScriptedBackend(SAFE)}
    rails = LLMRails(config, llm=MainModel())
    check = rails.runtime.action_dispatcher.get_action("rsafe_check_input")
    assert check.__self__.guards.of("input", None, config).policy.name == "house"


def test_a_name_that_is_none_of_the_configured_is_refused() -> None:
    app = build(f"{{input: {{{THREE}}}}}")
    check = app.rails.runtime.action_dispatcher.get_action("rsafe_check_input")
    for given in (None, "$policy", "prompt-injection", 3):
        with pytest.raises(SettingsError, match="must be given one of the policies"):
            check.__self__.guards.of("input", given, app.rails.config)
