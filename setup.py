"""This repository works from its checkout. A wheel of it would put `core`, `tools`, ... beside everybody's."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Refused(bdist_wheel):
    """``pip install -e .`` goes another way and does not come here."""

    def run(self) -> None:
        raise SystemExit(
            "this repository is not installed as a wheel: `pip install -e .` in its checkout for the commands, "
            "or `pip install ./core` (from elsewhere: `pip install 'git+URL#subdirectory=core'`) for `import adm`"
        )


setup(cmdclass={"bdist_wheel": Refused})
