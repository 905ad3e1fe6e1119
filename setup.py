"""Package metadata. The five top-level folders become the package `onetrain`."""

from setuptools import find_packages, setup

ROOMS = ("launcher", "model", "parallel", "data", "cluster")

packages = [f"onetrain.{room}" for room in ROOMS]
packages += [f"onetrain.{room}.{sub}" for room in ROOMS for sub in find_packages(room)]

setup(
    name="onetrain",
    version="0.1.0",
    description="Distributed training of generative recommenders of the OneRec family",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir={f"onetrain.{room}": room for room in ROOMS},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "ray[default]>=2.60",
        "megatron-core>=0.16.1,<0.17",
        "wandb>=0.31",
        "pyyaml",
        "pydantic>=2.12",
        "typer>=0.20",
        "rich>=14",
        "duckdb>=2",
        "pyarrow>=20",
        "numpy>=2",
        "numba>=0.63",
        "scikit-learn>=1.6",
        "safetensors>=0.6",
        "fsspec",
        "xxhash",
        "psutil",
        "plotly>=6",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "jsonschema",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-psutil",
            "pre-commit",
        ],
        "text": ["sentence-transformers"],
        "s3": ["s3fs"],
    },
    entry_points={"console_scripts": ["onetrain = onetrain.launcher.cli:main"]},
)
