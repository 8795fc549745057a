"Packaging of diffda; everything that can change is read from settings.ini."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
# folders at the root of the repository that travel inside the package
CARRIED = ("papers", "data_splits")

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(HERE/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

README = HERE/"README.md"
CLASSIFIERS = [
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    "Natural Language :: English",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Scientific/Engineering :: Image Recognition",
]


class BuildWithPapers(build_py):
    """`build_py` that starts from an empty folder and puts `CARRIED` into the package.

    An editable install reads them where they lie."""
    def run(self):
        if self.editable_mode: return super().run()
        package = Path(self.build_lib)/"diffda"
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        leave = shutil.ignore_patterns(".*", "__pycache__")
        for name in CARRIED:
            if (HERE/name).is_dir():
                shutil.copytree(HERE/name, package/name, ignore=leave)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=README.read_text(encoding="utf-8") if README.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=CLASSIFIERS,
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["diffda", "diffda.*"]),
    package_data={"diffda": ["nano_world/**/*"]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "build", "data")},
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    cmdclass={"build_py": BuildWithPapers},
    zip_safe=False,
)
