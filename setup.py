"""Puts yoco_eval_registration.pth into site-packages; everything else is in setup.cfg."""

from setuptools import Distribution, setup  # isort: skip; it provides distutils

from distutils.command.install_data import install_data


class DistributionWithData(Distribution):
    """Has its data files installed by editable installs too: setuptools asks for `has_data`."""

    has_data = Distribution.has_data_files


class InstallBesidePackages(install_data):
    """Installs data files into site-packages instead of the environment's root folder."""

    def finalize_options(self):
        self.set_undefined_options("install", ("install_lib", "install_dir"))
        super().finalize_options()


setup(
    distclass=DistributionWithData,
    cmdclass={"install_data": InstallBesidePackages},
    data_files=[("", ["yoco_eval/yoco_eval_registration.pth"])],
)
