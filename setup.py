"""Package metadata. Ranges here admit CPU and CUDA builds of torch; constraints.txt has one tested set of versions."""

from setuptools import find_packages, setup

setup(
    name="seesaw-ds",
    version="0.1.0",
    description="Offline LLM inference: prefill under pipeline parallelism, decode under tensor parallelism",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["seesaw_ds", "seesaw_ds.*"]),
    package_data={"": ["*.cu", "*.cuh"]},
    install_requires=[
        "torch>=2.10,<2.14",
        "megatron-core>=0.16",
        "deepspeed>=0.18",
        "transformers>=5",
        "numpy",
        "safetensors",
        "msgspec",
        "pyzmq",
        "psutil",
        "tqdm",
        "pyyaml",
        "jinja2",
    ],
    extras_require={
        "cuda": ["flashinfer-python"],
        "plot": ["matplotlib"],
        "test": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-psutil",
        ],
    },
)
