"The schemas say what the code says"
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.settings import MANAGER_SCHEMA, MONITOR_SCHEMA

values = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 200), st.floats(-1, 2e6),
    st.sampled_from(["", "45", "4 2", "ä"]), st.lists(st.integers(), max_size=1))


@pytest.mark.parametrize("schema", [MANAGER_SCHEMA, MONITOR_SCHEMA], ids=lambda schema: schema["title"])
def test_they_are_schemas_and_their_defaults_are_valid(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({name: p["default"] for name, p in schema["properties"].items()}, schema)
    assert all(p["description"] for p in schema["properties"].values())


@given(st.dictionaries(st.sampled_from([*MANAGER_SCHEMA["properties"], "nonsense"]), values, max_size=2))
def test_what_the_schema_allows_is_what_a_manager_takes(config):
    found = jsonschema.Draft202012Validator(MANAGER_SCHEMA).iter_errors(config)
    errors = [e.path[0] if e.path else "nonsense" for e in found]
    if errors:
        with pytest.raises((TypeError, ValueError)) as raised: ResourceManager.from_config(config)
        assert any(name in str(raised.value) for name in errors)  # the message names the field
    else:
        manager = ResourceManager.from_config(config)
        assert all(getattr(manager, name) == value for name, value in config.items())


def test_names_of_apps(folder):
    for name in ("a", "My-App_1.0", "x"*64):
        jsonschema.validate({"app": name}, MANAGER_SCHEMA)
        assert ResourceManager.from_config({"app": name}).app == name
    for name in ("", "1a", "x"*65, "a b", "../a", "a\n"):
        errors = list(jsonschema.Draft202012Validator(MANAGER_SCHEMA).iter_errors({"app": name}))
        assert errors or name == "a\n"  # $ in JSON Schema's dialect is Python's here
        with pytest.raises(ValueError, match="Invalid app name"): ResourceManager.from_config({"app": name})
