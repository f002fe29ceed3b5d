"What a plugin and its configuration say: each rule at its boundary"
from dataclasses import FrozenInstanceError

import pytest
from conftest import Server

from cjm_fasthtml_resources.core import manager, plugins
from cjm_fasthtml_resources.core.plugins import (
    CloudAwarePlugin,
    LifecycleAwarePlugin,
    compare_plugin_resources,
    device_kind,
    find_plugin,
    get_plugin_resource_identifier,
    get_plugin_resource_requirements,
    is_local_plugin,
    uses_gpu_device,
)


class Registry:
    plugins = {
        "whisper": {"name": "Whisper", "config_schema": {"properties": {}}},
        "nameless": {"name": 7},
        "empty": {"name": ""},
        "remote": {"config_schema": {"properties": {"api_key": {}}}}}
    def get_plugin(self, plugin_id): return self.plugins[plugin_id]
    def load_plugin_config(self, plugin_id): return {"model": "large", "device": "cuda:1"}


class Quiet(Registry):
    "A registry that answers None"
    def get_plugin(self, plugin_id): return None


@pytest.mark.parametrize("device, kind", [
    (-2, "cpu"), (-1, "cpu"), (0, "cuda"), (1, "cuda"), (True, ""), (None, ""),
    (" CUDA:1 ", "cuda"), ("cpu", "cpu"), ("mps", "mps"), (1.0, "")])
def test_what_kind_of_device_is_meant(device, kind):
    assert device_kind(device) == kind
    assert uses_gpu_device({"device": device}) is (kind in ("cuda", "mps"))


def test_the_first_key_that_says_something_names_the_resource():
    assert get_plugin_resource_identifier({"model_path": "/p", "model": "m", "resource_id": ""}) == "m"
    assert get_plugin_resource_identifier({"model_id": 0}) == "0"
    assert get_plugin_resource_identifier({}) is get_plugin_resource_identifier(None) is None


@pytest.mark.parametrize("first, second, same", [
    ({"model": "b"}, {"model_id": "".join("b")}, True),
    ({"model": "large-v3"}, {"model": "-".join(["large", "v3"])}, True),
    ({"model": "a"}, {"model": "b"}, False), ({"model": "b"}, {"model": "a"}, False),
    ({}, {}, False), (None, {"model": "a"}, False), ({"model": "a"}, None, False)])
def test_what_is_not_known_is_not_the_same(first, second, same): assert compare_plugin_resources(first, second) is same


def test_a_plugin_is_called_by_its_name_else_by_its_id():
    assert [find_plugin(Registry(), name)[1] for name in Registry.plugins] == ["Whisper", "nameless", "empty", "remote"]
    for registry in (Registry(), Quiet()):
        with pytest.raises(LookupError, match="^no plugin is called 'other'$"): find_plugin(registry, "other")


def test_what_is_given_counts_before_what_is_saved_and_is_copied():
    given = {"model": "small"}
    _, _, config = find_plugin(Registry(), "whisper", given)
    assert config == given and config is not given
    assert find_plugin(Registry(), "whisper", {})[2] == {} and find_plugin(Registry(), "whisper")[2]["model"] == "large"


def test_a_plugin_that_needs_a_key_works_elsewhere():
    assert [is_local_plugin(plugin) for plugin in Registry.plugins.values()] == [True, True, True, False]
    assert is_local_plugin({"config_schema": {"properties": []}})
    here, there = (get_plugin_resource_requirements(Registry(), name) for name in ("whisper", "remote"))
    assert (here.is_local, here.uses_gpu, here.plugin_resource, here.device) == (True, True, "large", "cuda:1")
    assert (there.is_local, there.uses_gpu, there.plugin_resource) == (False, False, "large")
    with pytest.raises(FrozenInstanceError): here.is_local = False


def test_a_plugin_is_aware_that_has_the_methods():
    assert isinstance(Server(), LifecycleAwarePlugin) and not isinstance(Server(), CloudAwarePlugin)
    assert not isinstance(Registry(), LifecycleAwarePlugin)


def test_a_plugin_in_the_cloud_has_two_methods():
    "Renting, asking how it is and giving it back are the app's own"
    class Rented:
        def get_remote_resource_info(self): return {"provider": "acme"}
        def estimate_cost(self, duration_hours): return duration_hours

    assert isinstance(Rented(), CloudAwarePlugin) and not isinstance(Rented(), LifecycleAwarePlugin)


def test_the_manager_reads_the_same_keys():
    assert manager.PLUGIN_RESOURCE_CONFIG_KEYS == plugins.PLUGIN_RESOURCE_CONFIG_KEYS
