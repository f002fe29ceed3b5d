"Everything that pip needs to know stands in settings.ini; this file only hands it over"
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_path"]
extras = {key.removesuffix("_requirements"): shlex.split(value)
          for key, value in cfg.items() if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=[lib, f"{lib}.*"]), zip_safe=False,
    package_data={lib: ["py.typed", "ui/static/*", "simulated/states/*"]},
    python_requires=f">={cfg['min_python']}", install_requires=shlex.split(cfg["requirements"]), extras_require=extras,
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"]), "nbdev": [f"{lib}={lib}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Natural Language :: English",
                 "Programming Language :: Python :: 3", "Typing :: Typed"],
)
