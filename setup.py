"""The package's metadata. pyproject.toml holds the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_jq" / "__init__.py").read_text()).group(1)
README = HERE / "README.md"

setup(
    name="megatron-jq",
    version=VERSION,
    description="Post-train reasoning policies on Megatron-core with the Tsallis J_Q loss (GARL, PAFT)",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_jq", "megatron_jq.*"]),
    package_data={"megatron_jq.data": ["templates/*.toml"]},
    python_requires=">=3.10",
    install_requires=[
        "megatron-core>=0.16,<0.20",
        # Megatron-core imports it from 0.18 on and does not ask for it; a CPU build of torch does not bring it. Later
        # versions than 0.16 are for Python 3.12 and later alone. Triton 3.9 reports leaks of its own as a run ends.
        'triton>=3,<3.8; python_version >= "3.12" and sys_platform == "linux"',
        "torch>=2.8,<2.14",
        "numpy",
        "sentencepiece>=0.2",
        "tyro>=1.0,<2",
        "tqdm",  # the progress bar; Megatron-core imports it too, without requiring it
        "tensorboard",
        "matplotlib>=3.8",
        "jinja2>=3.1",  # chat templates; torch requires it too
        "psutil",  # Megatron-core's dist_checkpointing, which does not require it
        'tomli>=2; python_version < "3.11"',
    ],
    # NVIDIA Apex is used where it is installed and is in no list: the name `apex` on PyPI is another project.
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.9"],
        # protobuf: sentencepiece to tokenizer.json; gguf: unpacks the weights of GGUF files
        "hf": ["safetensors>=0.4", "tokenizers", "transformers", "protobuf", "gguf>=0.10"],
        "math": ["math-verify[antlr4-13-2]==0.9.*"],  # --match math
        "datasets": ["datasets>=4"],  # hub:NAME and parquet, by its pyarrow; before 4 it could run code of a data set
        # reasoning-gym:NAME. Its sets were checked in this version; others give other items.
        "reasoning-gym": ["reasoning-gym==0.1.25"],
        # launch/nemo_run. nemo-run imports leptonai, of which later versions lack what it imports.
        "nemo": ["nemo-run>=0.11.1,<0.12", "leptonai==0.27.3"],
        "dev": ["ruff==0.17.6", "pyright[nodejs]==1.1.414"],  # tests/check.py
        "test": [
            "gguf>=0.10", "hypothesis>=6.100", "math-verify[antlr4-13-2]==0.9.*", "mpmath", "protobuf", "pyarrow",
            "pytest>=8", "pytest-xdist>=3.5", "safetensors", "tokenizers", "transformers>=5,<6",
        ],  # fmt: skip
    },
    entry_points={"console_scripts": ["megatron-jq = megatron_jq.__main__:program"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
