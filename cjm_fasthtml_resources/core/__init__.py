from typing import Any

def __getattr__(name: str) -> Any:
    "Import a module of this package when it is asked for, as after `import cjm_fasthtml_resources`"
    from importlib import import_module
    try: return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}": raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
