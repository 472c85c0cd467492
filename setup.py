"""Build hook: compile the C kernels into the wheel when there is a compiler; without one they are left out.

Everything else is in pyproject.toml. An editable install compiles at first use instead.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("ssmprune_cli") / "kernels" / "cpu"


class BuildKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        # By its path: importing the package would import torch, which the build does not have.
        spec = importlib.util.spec_from_file_location("kernel_build", KERNELS / "build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            build.compile_levels(Path(self.build_lib) / KERNELS / "csrc")
        except OSError as error:
            self.warn(f"the C kernels are left out: {error}")


class PlatformWheel(bdist_wheel):
    """Any Python 3, but one platform when there are compiled kernels inside.

    cibuildwheel builds one wheel for each platform and refuses one for all: there it is tagged so without kernels too.
    """

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        compiled = any((Path(self.bdist_dir) / KERNELS / "csrc").glob("*.so"))
        if not compiled and os.environ.get("CIBUILDWHEEL") != "1":
            return python, abi, platform
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel})
