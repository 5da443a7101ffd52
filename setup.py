"""Puts .pth files into site-packages; everything else is in setup.cfg."""

from setuptools import Distribution, setup  # isort: skip; it provides distutils

from distutils.command.install_data import install_data
from pathlib import Path


class DistributionWithData(Distribution):
    """Has its data files installed by editable installs too: setuptools asks for `has_data`."""

    has_data = Distribution.has_data_files


class InstallBesidePackages(install_data):
    """Installs data files into site-packages instead of the environment's root folder."""

    def finalize_options(self):
        self.set_undefined_options("install", ("install_lib", "install_dir"))
        super().finalize_options()

    def run(self):
        """In editable installs, also lead tools that run no import hook to the sources.

        The file comes after yoco_eval_registration.pth, which imports the package by the hook:
        Python itself never looks there.
        """
        super().run()
        if self.get_finalized_command("build_py").editable_mode:
            path = Path(self.install_dir, "yoco_eval_sources.pth")
            path.write_text(f"{Path('.editable').resolve()}\n", encoding="utf-8")


setup(
    distclass=DistributionWithData,
    cmdclass={"install_data": InstallBesidePackages},
    data_files=[("", ["yoco_eval/yoco_eval_registration.pth"])],
)
